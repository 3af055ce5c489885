"""Where the joints are: the geometry of one person in one image, shared by everything that draws."""

from dataclasses import dataclass

from reidctl.synthped.cast import Person
from reidctl.synthped.shot import Item, Shot

Point = tuple[float, float]
# How large the people of a domain are and where they stand: the cameras of b and c hang higher and farther away.
SCALE_AND_FOOT = {"a": (1.0, 124.0), "b": (0.95, 121.0), "c": (0.92, 118.0)}


@dataclass(frozen=True, slots=True)
class Arm:
    """Shoulder, elbow and wrist of one arm; `sign` is -1 on the left of the picture, 1 on the right."""

    side: str
    sign: int
    shoulder: Point
    elbow: Point
    wrist: Point


@dataclass(frozen=True, slots=True)
class Leg:
    """Hip, knee and ankle of one leg; `dim` is its brightness, below 1 when it is the rear one."""

    hip: Point
    knee: Point
    ankle: Point
    dim: float


class Figure:
    """Joints and sizes in virtual units. `u` is a hundredth of the figure's height."""

    def __init__(self, person: Person, shot: Shot) -> None:
        body = person.body
        self.person, self.body, self.shot, self.outfit = person, body, shot, shot.outfit
        self.view = shot.view
        self.side_on = shot.view.endswith("side")
        self.facing = {"left side": -1, "right side": 1}.get(shot.view, 0)
        small, foot = SCALE_AND_FOOT[person.domain]
        self.height = 111.0 * body.height * shot.scale * small
        self.u = self.height / 100
        self.x = 28.0 + shot.shift_x
        self.foot = foot + shot.shift_y
        self.top = self.foot - self.height
        stoop = 1.5 if body.age == "elderly" else 0.0
        self.head_h = 14.2 * body.head * (1.04 if body.girth > 1.2 else 1.0)
        self.head_w = 4.9 * body.head * (0.9 + 0.1 * body.girth)
        self.chin = self.head_h + stoop
        self.shoulder = 14.2 + 4.6 + stoop * 0.5
        self.crotch = 51.0 - (body.legs - 1.0) * 40
        self.waist = self.shoulder + 0.6 * (self.crotch - self.shoulder)
        self.knee = self.crotch + 0.47 * (96 - self.crotch)
        woman = body.gender == "woman"
        self.shoulder_w = 10.6 * body.shoulders * (0.55 + 0.45 * body.girth)
        self.waist_w = (6.7 if woman else 8.5) * (0.1 + 0.9 * body.girth)
        self.hip_w = (9.7 if woman else 8.5) * (0.35 + 0.65 * body.girth)
        self.depth = 6.4 * (0.3 + 0.7 * body.girth)
        self.belly = self.depth * (1.0 if body.girth < 1.2 else 1.22)
        self.lean = 0.0
        if self.side_on:
            self.lean = self.facing * (4.0 if body.age == "elderly" else 1.0 if shot.walking else 0.0)
        self.head_x = self.lean * 1.25
        self.arm_r = 2.9 * (0.35 + 0.65 * body.girth)
        self.leg_r = 4.7 * (0.35 + 0.65 * body.girth)
        self.arms = tuple(self._arm(side) for side in ("left", "right"))
        self.legs = self._side_legs() if self.side_on else self._front_legs()

    def at(self, x: float, y: float) -> Point:
        """Virtual coordinates of a point in hundredths of the figure's height, x from its middle, y from its top."""
        return self.x + x * self.u, self.top + y * self.u

    def nodes(self, *rows: tuple[float, float, float]) -> list[tuple[float, float, float]]:
        """A profile (y, left, right) in hundredths, converted to virtual units."""
        return [(self.top + y * self.u, self.x + left * self.u, self.x + right * self.u) for y, left, right in rows]

    def sign_of(self, side: str) -> int:
        """Which side of the picture the person's left or right is on, in front and back views."""
        return (1 if side == "left" else -1) * (-1 if self.view == "back" else 1)

    def near_side(self) -> str:
        """The person's side that the camera sees, in side views."""
        return "left" if self.facing < 0 else "right"

    def item(self, *kinds: str) -> Item | None:
        """The carried object of one of these kinds, if there is one."""
        return next((item for item in self.shot.items if item.kind in kinds), None)

    def held_in(self, side: str) -> Item | None:
        """The object in this hand."""
        return next((item for item in self.shot.items if item.place == "hand" and item.side == side), None)

    def _arm(self, side: str) -> Arm:
        held = self.held_in(side)
        kind = held.kind if held else ""
        return self._side_arm(side, kind) if self.side_on else self._front_arm(side, kind)

    def _front_arm(self, side: str, kind: str) -> Arm:
        sign = self.sign_of(side)
        swing = self.shot.stride * sign * (1 if self.view == "front" else -1)
        out = self.shoulder_w + 0.3
        shoulder = self.at(sign * (self.shoulder_w - 1.6), self.shoulder + 2.2)
        hang = self.shoulder + 15.5
        if kind == "umbrella":
            return Arm(
                side, sign, shoulder, self.at(sign * (out + 3.4), hang - 1.5), self.at(sign * (out - 1), hang - 11)
            )
        if kind == "phone" and self.view == "front":
            return Arm(side, sign, shoulder, self.at(sign * (out + 2), hang - 0.5), self.at(sign * 2.2, hang - 5.5))
        if kind == "phone":
            return Arm(side, sign, shoulder, self.at(sign * (out + 5), hang - 5), self.at(sign * 6.8, self.chin - 3))
        wide = out + 1.2 + 1.4 * (self.body.girth - 0.8)
        elbow = self.at(sign * wide, hang + swing * 0.8)
        return Arm(
            side, sign, shoulder, elbow, self.at(sign * (wide + 0.6 - swing * 0.8), hang + 13.5 - swing * swing * 1.2)
        )

    def _side_arm(self, side: str, kind: str) -> Arm:
        near = side == self.near_side()
        ahead = self.facing
        swing = self.shot.stride * (1 if near else -1) * 6
        shoulder = self.at(self.lean - ahead * 0.4, self.shoulder + 3)
        hang = self.shoulder + 16
        if kind == "umbrella":
            return Arm(side, ahead, shoulder, self.at(ahead * 4, hang - 0.5), self.at(ahead * 9.5, hang - 9))
        if kind == "phone":
            return Arm(side, ahead, shoulder, self.at(ahead * 2.5, hang), self.at(ahead * 13, hang - 5))
        elbow = self.at(self.lean * 0.5 + swing * 0.5 - ahead * 0.8, hang)
        return Arm(side, ahead, shoulder, elbow, self.at(swing + ahead * 1.6, hang + 13))

    def _front_legs(self) -> tuple[Leg, ...]:
        legs = []
        for sign in (-1, 1):
            lifted = max(0.0, self.shot.stride * sign)
            apart = self.hip_w * 0.49
            hip = self.at(sign * apart, self.crotch - 2)
            knee = self.at(sign * (apart + 0.2), self.knee - lifted * 2.0)
            ankle = self.at(sign * (apart - 0.3 - lifted * 0.6), 95.3 - lifted * 3.6)
            legs.append(Leg(hip, knee, ankle, 1.0 - 0.16 * lifted))
        return tuple(sorted(legs, key=lambda leg: leg.dim))

    def _side_legs(self) -> tuple[Leg, ...]:
        legs = []
        for near in (False, True):
            swing = self.shot.stride * (-1 if near else 1) * self.facing
            hip = self.at(self.lean * 0.2, self.crotch - 2)
            knee = self.at(swing * 5.2 + self.facing * 1.3, self.knee)
            back = swing * self.facing < 0
            lift = 2.5 * abs(swing) if back else 0.0
            ankle = self.at(swing * 10.5 - (0.6 * self.facing if back else 0), 95.3 - lift)
            legs.append(Leg(hip, knee, ankle, 1.0 if near else 0.78))
        return tuple(legs)
