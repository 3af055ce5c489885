"""Clothes and shoes on a figure: lower garments, trunk, sleeves."""

from reidctl.synthped import details
from reidctl.synthped.canvas import LOWER, SHOES, SKIN, UPPER, Canvas, Fabric, Region, plain
from reidctl.synthped.fabrics import cloth, hem, skin, upper_fabric
from reidctl.synthped.figure import Arm, Figure, Leg

LONG_SLEEVES = ("shirt", "hoodie", "jacket", "coat", "sweater")


def draw_legs(canvas: Canvas, figure: Figure) -> None:
    """Legs, shoes and the lower garment, the rear leg first."""
    for leg in figure.legs:
        _leg(canvas, figure, leg)
    kind = figure.outfit.lower_type
    lower = plain(cloth(figure, figure.outfit.lower_colour))
    half = figure.depth * 0.98 if figure.side_on else figure.hip_w
    top, low = figure.waist + 2, figure.crotch + 3
    seat = canvas.profile(
        figure.nodes(
            (top, -half * 0.86, half * 0.86), (figure.crotch - 3, -half, half), (low, -half * 0.96, half * 0.96)
        )
    )
    if kind == "skirt":
        flare = half * 1.3 + (abs(figure.shot.stride) * 2.4 if figure.side_on else 0.6)
        length = figure.knee - 1.5
        skirt = canvas.profile(
            figure.nodes(
                (top, -half * 0.86, half * 0.86),
                (figure.crotch - 3, -half * 1.04, half * 1.04),
                (length, -flare, flare),
            )
        )
        canvas.paint(skirt, LOWER, lower)
        for fold in (-0.55, -0.1, 0.4):
            crease = canvas.capsule(
                *figure.at(fold * half, figure.crotch), *figure.at(fold * flare * 1.05, length), 0.2, 0.55
            )
            canvas.tint(crease, 0.8, LOWER)
        return
    if not figure.side_on:
        canvas.paint(seat, LOWER, lower)
        seam = canvas.capsule(*figure.at(0, figure.crotch - 4), *figure.at(0, figure.crotch + 4.5), 0.35, 0.5)
        canvas.tint(seam, 0.62, LOWER)
        return
    canvas.paint(seat, LOWER, lower)


def _leg(canvas: Canvas, figure: Figure, leg: Leg) -> None:
    kind, u, thick = figure.outfit.lower_type, figure.u, figure.leg_r * figure.u
    bare = kind in ("shorts", "skirt")
    lower = plain(cloth(figure, figure.outfit.lower_colour), gloss=0.32)
    _shoe(canvas, figure, leg)
    if bare:
        canvas.paint(canvas.capsule(*leg.hip, *leg.knee, thick * 0.86, thick * 0.62), SKIN, skin(figure), leg.dim)
        canvas.paint(canvas.capsule(*leg.knee, *leg.ankle, thick * 0.64, thick * 0.4), SKIN, skin(figure), leg.dim)
        if kind == "shorts":
            kx, ky = leg.knee
            hx, hy = leg.hip
            end = (hx + (kx - hx) * 0.8, hy + (ky - hy) * 0.8)
            canvas.paint(canvas.capsule(*leg.hip, *end, thick * 1.06, thick * 1.08), LOWER, lower, leg.dim)
        return
    fit = {"leggings": (0.86, 0.62, 0.4), "jeans": (0.97, 0.74, 0.6)}.get(kind, (1.04, 0.9, 0.86))
    ax, ay = leg.ankle
    end = (ax, ay - (2.2 * u if kind == "leggings" else 0.4 * u))
    for start, stop, r0, r1 in ((leg.hip, leg.knee, fit[0], fit[1]), (leg.knee, end, fit[1], fit[2])):
        canvas.paint(canvas.capsule(*start, *stop, thick * r0, thick * r1), LOWER, lower, leg.dim)
    if kind == "leggings":
        canvas.paint(canvas.capsule(*end, *leg.ankle, thick * 0.36, thick * 0.36), SKIN, skin(figure), leg.dim)
    if kind == "jeans":
        _denim(canvas, figure, leg, thick)
    elif kind == "trousers":
        canvas.tint(canvas.capsule(*leg.hip, *end, 0.3, 0.35), 1.13, LOWER)  # pressed crease
    kx, ky = leg.knee
    canvas.tint(canvas.capsule(kx - thick * 0.6, ky + 0.6, kx + thick * 0.5, ky + 1.6, 0.3, 0.3), 0.8, LOWER)


def _denim(canvas: Canvas, figure: Figure, leg: Leg, thick: float) -> None:
    """Faded thighs, a turned-up pale cuff and a side seam."""
    (hx, hy), (kx, ky), (ax, ay) = leg.hip, leg.knee, leg.ankle
    fade = canvas.capsule(hx, hy + (ky - hy) * 0.3, kx, ky - 2, thick * 0.32, thick * 0.3)
    canvas.tint(fade, 1.22, LOWER)
    u = figure.u
    cuff = canvas.profile(
        [(ay - 2.0 * u, ax - thick * 0.72, ax + thick * 0.72), (ay + 0.4 * u, ax - thick * 0.76, ax + thick * 0.76)]
    )
    canvas.paint(
        cuff,
        LOWER,
        plain((150, 160, 178) if figure.outfit.lower_colour in ("blue", "black") else (120, 130, 150)),
        leg.dim,
    )


def _shoe(canvas: Canvas, figure: Figure, leg: Leg) -> None:
    u, kind = figure.u, figure.outfit.shoe_type
    (x, y), colour = leg.ankle, cloth(figure, figure.outfit.shoe_colour)
    fabric = plain(colour, gloss=0.22)
    sole = (236, 236, 232) if kind == "trainers" else (48, 38, 34)
    if kind == "boots":
        canvas.paint(canvas.capsule(x, y - 6.5 * u, x, y + 1.5 * u, 2.9 * u, 2.5 * u), SHOES, fabric, leg.dim)
    if figure.side_on:
        toe, d = x + figure.facing * 5.6 * u, figure.facing
        foot = canvas.capsule(x - d * 0.7 * u, y + 2.4 * u, toe, y + 3.3 * u, 2.4 * u, 1.5 * u)
    else:
        long = 1.0 if figure.view == "front" else 0.55
        foot = canvas.capsule(x, y + 1.2 * u, x, y + (2.1 + 0.9 * long) * u, 2.3 * u, 2.7 * u)
    if kind == "sandals":
        canvas.paint(foot, SKIN, skin(figure), leg.dim)
        for step in (0.2, 0.75):
            band = (
                (foot.along > (0.2 + step * 3) * u) & (foot.along < (1.3 + step * 3) * u)
                if figure.side_on
                else foot.along > step * 2 * u
            )
            canvas.paint(foot.where(band), SHOES, fabric, leg.dim)
    else:
        canvas.paint(foot, SHOES, fabric, leg.dim)
    edge = canvas.ellipse(x + figure.facing * 2.4 * u, y + 5.4 * u, 9 * u, 1.2 * u)
    canvas.dye(edge, sole, SHOES)
    if kind == "trainers" and figure.view != "back":
        lace = canvas.capsule(
            x + figure.facing * 2.0 * u - u, y + 1.4 * u, x + figure.facing * 2.0 * u + u, y + 1.4 * u, 0.5 * u, 0.5 * u
        )
        canvas.dye(lace, (245, 245, 245) if figure.outfit.shoe_colour != "white" else (120, 120, 130), SHOES)


def trunk(canvas: Canvas, figure: Figure, low: float, spread: float = 1.0) -> Region:
    """The outline of the torso from the neck to height `low`, in the figure's view."""
    return canvas.profile(
        figure.nodes(*_side_rows(figure, low, spread) if figure.side_on else _front_rows(figure, low, spread))
    )


def _front_rows(figure: Figure, low: float, spread: float) -> list[tuple[float, float, float]]:
    s, w, h = figure.shoulder_w * spread, figure.waist_w * spread, figure.hip_w * spread
    rows = [
        (figure.shoulder - 2.2, -3.0, 3.0),
        (figure.shoulder - 0.8, -s * 0.62, s * 0.62),
        (figure.shoulder + 1.4, -s * 0.95, s * 0.95),
        (figure.shoulder + 3.5, -s, s),
        (figure.shoulder + 11, -s * 0.88, s * 0.88),
        (figure.waist, -w, w),
        (figure.crotch - 2, -h, h),
    ]
    flare = h * (1.0 + max(0.0, low - figure.crotch) * 0.022)
    return [*rows, (max(low, figure.crotch - 1), -flare, flare)]


def _side_rows(figure: Figure, low: float, spread: float) -> list[tuple[float, float, float]]:
    d, lean = figure.facing, figure.lean
    deep, belly = figure.depth * spread, figure.belly * spread
    woman = figure.body.gender == "woman"

    def row(y: float, back: float, front: float, shift: float) -> tuple[float, float, float]:
        ends = (shift - d * back, shift + d * front)
        return (y, min(ends), max(ends))

    flare = 1.0 + max(0.0, low - figure.crotch) * 0.03
    return [
        row(figure.shoulder - 2.2, 3.0, 2.4, lean),
        row(figure.shoulder + 1.5, deep * 0.86, deep * 0.62, lean),
        row(figure.shoulder + 9, deep * 0.94, deep * (1.08 if woman else 0.96), lean * 0.7),
        row(figure.waist, deep * 0.74, belly * 0.92, lean * 0.3),
        row(figure.crotch - 2, deep * 1.02, deep * 0.92, 0),
        row(max(low, figure.crotch - 1), deep * 1.02 * flare, deep * 0.95 * flare, 0),
    ]


def draw_upper(canvas: Canvas, figure: Figure) -> None:
    """The garment on the trunk, with what makes its type recognisable. Sleeves come with the arms."""
    kind = figure.outfit.upper_type
    spread = {"coat": 1.1, "jacket": 1.07, "hoodie": 1.06, "sweater": 1.04, "tank top": 0.93}.get(kind, 1.0)
    low = hem(figure)
    body = trunk(canvas, figure, low, spread)
    canvas.paint(body, UPPER, upper_fabric(figure))
    details.draw_folds(canvas, figure)
    if kind == "dress":
        details.draw_dress(canvas, figure, low)
    details.draw_neckline(canvas, figure, kind)
    if kind in ("hoodie", "sweater"):
        band = body.where(body.along > (low - figure.shoulder + 2.2 - 2.6) * figure.u)
        canvas.tint(band, 0.74, UPPER)
    detail = details.OF_TYPE.get(kind)
    if detail is not None:
        detail(canvas, figure)


def draw_arm(canvas: Canvas, figure: Figure, arm: Arm, dim: float = 1.0) -> None:
    """An arm with its sleeve and hand."""
    kind, u = figure.outfit.upper_type, figure.u
    thick = figure.arm_r * u * {"coat": 1.18, "jacket": 1.12, "hoodie": 1.12, "sweater": 1.06}.get(kind, 1.0)
    bare = figure.arm_r * u * 0.86
    fabric = upper_fabric(figure, 0.9)
    wx, wy = arm.wrist
    ex, ey = arm.elbow
    hand = (wx + (wx - ex) * 0.13, wy + (wy - ey) * 0.13)
    canvas.paint(canvas.capsule(wx, wy, *hand, bare * 0.72, bare * 0.78), SKIN, skin(figure), dim)
    if kind in LONG_SLEEVES:
        lower_half = (
            Fabric(fabric.second, fabric.second, gloss=fabric.gloss) if fabric.pattern == "two-tone" else fabric
        )
        canvas.paint(canvas.capsule(*arm.elbow, *arm.wrist, thick * 0.94, thick * 0.74), UPPER, lower_half, dim * 0.97)
        canvas.paint(canvas.capsule(*arm.shoulder, *arm.elbow, thick * 1.06, thick * 0.94), UPPER, fabric, dim)
        if kind in ("hoodie", "sweater", "jacket"):
            cuff = (wx - (wx - ex) * 0.12, wy - (wy - ey) * 0.12)
            canvas.tint(canvas.capsule(wx, wy, *cuff, thick * 0.8, thick * 0.8), 0.72, UPPER)
    else:
        canvas.paint(canvas.capsule(*arm.elbow, *arm.wrist, bare * 0.88, bare * 0.66), SKIN, skin(figure), dim)
        canvas.paint(canvas.capsule(*arm.shoulder, *arm.elbow, bare, bare * 0.88), SKIN, skin(figure), dim)
        if kind != "tank top":
            sx, sy = arm.shoulder
            share = 0.5 if kind == "dress" else 0.66
            end = (sx + (ex - sx) * share, sy + (ey - sy) * share)
            canvas.paint(
                canvas.capsule(sx, sy, *end, thick * 1.1, thick * 1.14),
                UPPER,
                Fabric(
                    fabric.colour,
                    fabric.second,
                    "plain" if fabric.pattern == "two-tone" else fabric.pattern,
                    fabric.period,
                    0.3,
                ),
                dim,
            )
    if figure.view in ("front", "back"):
        # Where the arm meets the trunk: a thin shadow, or both would melt into one block.
        inner = arm.sign * figure.arm_r * u * 0.95
        sx, sy = arm.shoulder
        line = canvas.capsule(sx - inner, sy + 4 * u, ex - inner, ey + 2 * u, 0.35, 0.4)
        canvas.tint(line, 0.66, UPPER)
