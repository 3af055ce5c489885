"""Carried objects: backpack, handbag, shoulder bag, umbrella, phone, cap."""

from reidctl.synthped import palette
from reidctl.synthped.canvas import BAG, HAT, PHONE, SKIN, UMBRELLA, UPPER, Canvas, plain
from reidctl.synthped.fabrics import cloth, skin
from reidctl.synthped.figure import Arm, Figure
from reidctl.synthped.shot import Item


def draw_behind(canvas: Canvas, figure: Figure) -> None:
    """What is hidden by the person: an umbrella's canopy, a backpack seen from the front or the side."""
    umbrella = figure.item("umbrella")
    if umbrella:
        _canopy(canvas, figure, umbrella)
    pack = figure.item("backpack")
    if pack and figure.view == "front":
        half = figure.shoulder_w * 0.98
        rows = figure.nodes(
            (figure.shoulder - 2.4, -half * 0.62, half * 0.62),
            (figure.shoulder - 0.4, -half * 0.8, half * 0.8),
            (figure.crotch - 6, -half, half),
        )
        canvas.paint(canvas.profile(rows), BAG, plain(cloth(figure, pack.colour)), 0.72)
    if pack and figure.side_on:
        _pack_from_side(canvas, figure, pack)


def draw_on_trunk(canvas: Canvas, figure: Figure) -> None:
    """Straps over the chest and the strap of a shoulder bag, drawn after the trunk and before the near arm."""
    pack, bag = figure.item("backpack"), figure.item("shoulder bag")
    if pack and figure.view == "front":
        fabric = plain(cloth(figure, pack.colour), gloss=0.1)
        for sign in (-1, 1):
            top, low = (
                figure.at(sign * figure.shoulder_w * 0.5, figure.shoulder - 1.2),
                figure.at(sign * figure.shoulder_w * 0.68, figure.waist - 1),
            )
            canvas.tint(canvas.capsule(*top, *low, 1.7 * figure.u, 1.5 * figure.u), 0.7, UPPER)
            canvas.paint(canvas.capsule(*top, *low, 1.35 * figure.u, 1.15 * figure.u), BAG, fabric, 0.95)
    if pack and figure.side_on:
        x = figure.lean
        top = figure.at(x - figure.facing * 2, figure.shoulder)
        low = figure.at(x * 0.6 + figure.facing * 1.6, figure.shoulder + 10)
        end = figure.at(-figure.facing * figure.depth * 0.9, figure.waist - 1)
        fabric = plain(cloth(figure, pack.colour), gloss=0.1)
        canvas.paint(canvas.capsule(*top, *low, 1.2 * figure.u, 1.2 * figure.u), BAG, fabric, 0.9)
        canvas.paint(canvas.capsule(*low, *end, 1.1 * figure.u, 0.8 * figure.u), BAG, fabric, 0.85)
    if bag and not figure.side_on:
        sign = figure.sign_of(bag.side)
        fabric = plain(cloth(figure, bag.colour), gloss=0.1)
        top = figure.at(sign * figure.shoulder_w * 0.62, figure.shoulder - 0.6)
        low = figure.at(sign * (figure.hip_w + 1.5), figure.crotch - 5)
        canvas.paint(canvas.capsule(*top, *low, 0.85 * figure.u, 0.85 * figure.u), BAG, fabric)


def draw_over(canvas: Canvas, figure: Figure) -> None:
    """What is in front of everything: backpack from behind, bag bodies, cap, phone, an umbrella's stick."""
    pack = figure.item("backpack")
    if pack and figure.view == "back":
        _pack_from_behind(canvas, figure, pack)
    bag = figure.item("shoulder bag")
    if bag:
        _shoulder_bag(canvas, figure, bag)
    for arm in figure.arms:
        held = figure.held_in(arm.side)
        if held is None or (figure.side_on and arm.side != figure.near_side() and held.kind == "handbag"):
            continue
        {"handbag": _handbag, "phone": _phone, "umbrella": _stick}[held.kind](canvas, figure, arm, held)


def draw_far_hand(canvas: Canvas, figure: Figure, arm: Arm) -> None:
    """A handbag in the hand that is away from the camera, drawn before the legs hide it."""
    held = figure.held_in(arm.side)
    if held and held.kind == "handbag":
        _handbag(canvas, figure, arm, held)


def draw_cap(canvas: Canvas, figure: Figure) -> None:
    """A baseball cap: crown and, unless seen from behind, a brim."""
    cap = figure.item("cap")
    if cap is None:
        return
    u, w, top, x = figure.u, figure.head_w, figure.chin - figure.head_h, figure.head_x
    fabric = plain(cloth(figure, cap.colour), gloss=0.34)
    wide = w * (1.2 if not figure.side_on else 1.24)
    low = top + (4.6 if figure.view != "back" else 6.2)
    rows = figure.nodes(
        (top - 1.6, x - wide * 0.42, x + wide * 0.42),
        (top - 0.6, x - wide * 0.78, x + wide * 0.78),
        (top + 1.6, x - wide * 0.97, x + wide * 0.97),
        (low, x - wide, x + wide),
    )
    canvas.paint(canvas.profile(rows), HAT, fabric, 1.04)
    canvas.dye(canvas.ellipse(*figure.at(x, top - 1.4), 0.8 * u, 0.5 * u), (230, 230, 226), HAT)
    if figure.view == "front":
        brim = canvas.ellipse(*figure.at(0, low + 0.2), (wide + 0.9) * u, 1.5 * u)
        canvas.paint(brim, HAT, fabric, 0.72)
    elif figure.side_on:
        d = figure.facing
        brim = canvas.capsule(
            *figure.at(x + d * wide * 0.6, low - 0.4), *figure.at(x + d * (wide + 4.2), low + 0.5), 1.1 * u, 0.7 * u
        )
        canvas.paint(brim, HAT, fabric, 0.74)
    else:
        canvas.paint(canvas.ellipse(*figure.at(0, low - 0.4), 1.7 * u, 1.2 * u), SKIN, skin(figure), 0.7)


def _canopy(canvas: Canvas, figure: Figure, item: Item) -> None:
    arm = next(arm for arm in figure.arms if arm.side == item.side)
    x, u = arm.wrist[0] * 0.55 + figure.at(figure.head_x, 0)[0] * 0.45, figure.u
    base = figure.top + 5.5 * u
    dome = canvas.ellipse(x, base, 19.5 * u, 13 * u)
    upper = canvas.ys[dome.rows] <= base + canvas.xs[:, dome.columns] * 0
    canvas.paint(dome.where(upper), UMBRELLA, plain(cloth(figure, item.colour), gloss=0.42))
    for share in (-0.6, -0.2, 0.2, 0.6):
        canvas.tint(
            canvas.capsule(x + share * 4 * u, base - 12 * u, x + share * 19 * u, base, 0.25, 0.4), 0.68, UMBRELLA
        )
    for number in range(-2, 3):
        notch = canvas.ellipse(x + number * 7.8 * u, base + 0.4 * u, 3.9 * u, 1.9 * u)
        canvas.tint(notch, 0.72, UMBRELLA)
    canvas.paint(canvas.capsule(x, base - 14.5 * u, x, base - 12 * u, 0.5, 0.6), UMBRELLA, plain((60, 60, 64)))


def _stick(canvas: Canvas, figure: Figure, arm: Arm, item: Item) -> None:
    x = arm.wrist[0] * 0.55 + figure.at(figure.head_x, 0)[0] * 0.45
    u = figure.u
    metal = plain((150, 150, 156), gloss=0.1)
    canvas.paint(
        canvas.capsule(*arm.wrist, arm.wrist[0] * 0.9 + x * 0.1, figure.top + 6 * u, 0.75 * u, 0.7 * u), UMBRELLA, metal
    )
    wx, wy = arm.wrist
    canvas.paint(
        canvas.capsule(wx, wy, wx, wy + 3 * u, 0.8 * u, 0.8 * u), UMBRELLA, plain(cloth(figure, item.colour)), 0.7
    )
    canvas.paint(canvas.ellipse(wx, wy, 2.0 * u, 2.0 * u), SKIN, skin(figure), 0.95)


def _pack_from_behind(canvas: Canvas, figure: Figure, item: Item) -> None:
    half, fabric, u = figure.shoulder_w * 0.74, plain(cloth(figure, item.colour)), figure.u
    for sign in (-1, 1):
        strap = canvas.capsule(
            *figure.at(sign * half * 0.75, figure.shoulder - 1),
            *figure.at(sign * half * 0.8, figure.shoulder + 5),
            1.3 * u,
            1.3 * u,
        )
        canvas.paint(strap, BAG, fabric, 0.8)
    shadow = canvas.ellipse(*figure.at(0.8, figure.shoulder + 15), (half + 2) * u, 15.5 * u)
    canvas.tint(shadow, 0.72, UPPER)
    rows = (
        (figure.shoulder + 1.6, -half * 0.7, half * 0.7),
        (figure.shoulder + 3.4, -half * 0.96, half * 0.96),
        (figure.shoulder + 12, -half * 1.06, half * 1.06),
        (figure.crotch - 6, -half * 1.1, half * 1.1),
        (figure.crotch - 4.6, -half * 0.9, half * 0.9),
    )
    canvas.paint(canvas.profile(figure.nodes(*rows)), BAG, fabric)
    low = figure.crotch - 6.5
    pocket = canvas.profile(figure.nodes((low - 9, -half * 0.72, half * 0.72), (low, -half * 0.78, half * 0.78)))
    canvas.tint(pocket, 0.72, BAG)
    canvas.tint(
        canvas.profile(figure.nodes((low - 8, -half * 0.64, half * 0.64), (low - 0.8, -half * 0.7, half * 0.7))),
        1.26,
        BAG,
    )
    canvas.tint(
        canvas.capsule(
            *figure.at(-half * 0.85, figure.shoulder + 9), *figure.at(half * 0.85, figure.shoulder + 9), 0.4, 0.4
        ),
        0.6,
        BAG,
    )
    canvas.paint(
        canvas.capsule(
            *figure.at(-1.2, figure.shoulder + 1.2), *figure.at(1.2, figure.shoulder + 1.2), 0.6 * u, 0.6 * u
        ),
        BAG,
        fabric,
        0.6,
    )


def _pack_from_side(canvas: Canvas, figure: Figure, item: Item) -> None:
    d, fabric, u = figure.facing, plain(cloth(figure, item.colour), gloss=0.34), figure.u
    x = figure.lean * 0.8 - d * figure.depth * 0.85
    rows = [
        (figure.shoulder + 0.5, 1.0, 4.6),
        (figure.shoulder + 4, -1, 7.4),
        (figure.waist - 1, -1, 8.4),
        (figure.crotch - 4.5, 0, 6.4),
    ]
    turned = [(y, *sorted((x - d * near, x - d * far))) for y, near, far in rows]
    canvas.paint(canvas.profile(figure.nodes(*((y, left, right) for y, left, right in turned))), BAG, fabric)
    canvas.tint(
        canvas.capsule(
            *figure.at(x - d * 3.2, figure.shoulder + 4), *figure.at(x - d * 3.6, figure.crotch - 6), 0.3 * u, 0.3 * u
        ),
        0.68,
        BAG,
    )
    canvas.paint(
        canvas.capsule(
            *figure.at(x - d * 7.0, figure.waist - 3), *figure.at(x - d * 7.4, figure.crotch - 7), 2.2 * u, 2.0 * u
        ),
        BAG,
        fabric,
        0.82,
    )


def _bag_body(
    canvas: Canvas, figure: Figure, x: float, y: float, half: float, tall: float, colour: palette.Colour
) -> None:
    u = figure.u
    rows = [
        (y, x - half * 0.86 * u, x + half * 0.86 * u),
        (y + tall * 0.25 * u, x - half * u, x + half * u),
        (y + tall * u, x - half * 1.06 * u, x + half * 1.06 * u),
    ]
    canvas.paint(canvas.profile(rows), BAG, plain(colour, gloss=0.3))
    canvas.tint(
        canvas.profile(
            [(y + 0.4 * u, x - half * 0.9 * u, x + half * 0.9 * u), (y + tall * 0.42 * u, x - half * u, x + half * u)]
        ),
        0.78,
        BAG,
    )
    canvas.dye(canvas.ellipse(x, y + tall * 0.45 * u, 0.7 * u, 0.6 * u), (222, 196, 110), BAG)


def _shoulder_bag(canvas: Canvas, figure: Figure, item: Item) -> None:
    colour, u = cloth(figure, item.colour), figure.u
    if figure.side_on and item.side != figure.near_side():
        # On the far shoulder only the strap and the front edge show.
        x, y = figure.at(figure.facing * figure.depth * 0.95, figure.crotch - 5)
        _bag_body(canvas, figure, x, y, 2.2, 8.5, tuple(0.8 * channel for channel in colour))  # type: ignore[arg-type]
        return
    if figure.side_on:
        top, low = (
            figure.at(figure.lean - figure.facing, figure.shoulder),
            figure.at(-figure.facing * 1.5, figure.crotch - 5),
        )
        canvas.paint(canvas.capsule(*top, *low, 0.85 * u, 0.85 * u), BAG, plain(colour, gloss=0.1), 0.9)
        x, y = low
        _bag_body(canvas, figure, x, y, 6.0, 10.0, colour)
        return
    sign = figure.sign_of(item.side)
    x, y = figure.at(sign * (figure.hip_w + 2.6), figure.crotch - 6)
    _bag_body(canvas, figure, x, y, 4.6, 10.5, colour)


def _handbag(canvas: Canvas, figure: Figure, arm: Arm, item: Item) -> None:
    u, (x, y) = figure.u, arm.wrist
    y += 2.2 * u
    handle = plain(tuple(0.7 * channel for channel in cloth(figure, item.colour)), gloss=0.1)  # type: ignore[arg-type]
    for sign in (-1, 1):
        canvas.paint(canvas.capsule(x, y, x + sign * 2.6 * u, y + 4 * u, 0.55 * u, 0.55 * u), BAG, handle)
    _bag_body(canvas, figure, x, y + 3.6 * u, 4.6 if not figure.side_on else 5.4, 8.0, cloth(figure, item.colour))


def _phone(canvas: Canvas, figure: Figure, arm: Arm, item: Item) -> None:
    u, (x, y) = figure.u, arm.wrist
    y -= 3.2 * u
    x += figure.facing * 1.2 * u
    wide = 1.8 if not figure.side_on else 1.3
    frame = canvas.profile([(y - 2.6 * u, x - wide * u, x + wide * u), (y + 2.8 * u, x - wide * u, x + wide * u)])
    rim = canvas.profile(
        [
            (y - 3.3 * u, x - (wide + 0.6) * u, x + (wide + 0.6) * u),
            (y + 2.8 * u, x - (wide + 0.6) * u, x + (wide + 0.6) * u),
        ]
    )
    canvas.paint(rim, PHONE, plain((22, 22, 26), gloss=0.05))
    canvas.paint(frame, PHONE, plain(cloth(figure, item.colour), gloss=0.08))
    if figure.view == "front":
        canvas.dye(canvas.ellipse(x - 0.7 * u, y - 1.5 * u, 0.6 * u, 0.6 * u), (24, 24, 26), PHONE)
    canvas.tint(
        canvas.profile(
            [(y - 2.6 * u, x - wide * u, x - (wide - 0.5) * u), (y + 2.8 * u, x - wide * u, x - (wide - 0.5) * u)]
        ),
        1.5,
        PHONE,
    )
    canvas.paint(canvas.ellipse(x, arm.wrist[1] + 0.2 * u, 2.1 * u, 1.7 * u), SKIN, skin(figure))
