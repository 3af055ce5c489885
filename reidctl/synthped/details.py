"""What tells garment types apart: necklines, collars, lapels, hoods, pockets, buttons, belts, folds."""

from collections.abc import Callable

from reidctl.synthped.canvas import SKIN, UPPER, Canvas, plain
from reidctl.synthped.fabrics import cloth, hem, skin, upper_fabric
from reidctl.synthped.figure import Figure


def draw_folds(canvas: Canvas, figure: Figure) -> None:
    """Soft creases at the waist and a shadow under the chest."""
    w = figure.depth if figure.side_on else figure.waist_w
    for sign, rise in ((-1, 3.0), (1, 2.2), (1, 5.5)):
        start, end = (
            figure.at(sign * w * 0.95, figure.waist - rise),
            figure.at(sign * w * 0.25, figure.waist + 1.5 - rise * 0.3),
        )
        canvas.tint(canvas.capsule(*start, *end, 0.65, 0.2), 0.83, UPPER)
    canvas.tint(canvas.ellipse(*figure.at(0, figure.shoulder + 8), 4.2 * figure.u, 5 * figure.u), 1.05, UPPER)


def draw_dress(canvas: Canvas, figure: Figure, low: float) -> None:
    """A dark belt and a flared, pleated skirt down to `low`."""
    half = (figure.depth if figure.side_on else figure.waist_w) * 1.02
    belt = canvas.profile(figure.nodes((figure.waist - 0.6, -half, half), (figure.waist + 1.0, -half, half)))
    canvas.tint(belt, 0.55, UPPER)
    wide = (figure.depth if figure.side_on else figure.hip_w) * 1.32
    top = figure.crotch - 4
    skirt = canvas.profile(
        figure.nodes(
            (figure.waist + 1, -half, half), (top, -wide * 0.84, wide * 0.84), (low, -wide * 1.12, wide * 1.12)
        )
    )
    canvas.paint(skirt, UPPER, upper_fabric(figure))
    for fold in (-0.5, 0.0, 0.5):
        crease = canvas.capsule(*figure.at(fold * half, figure.waist + 3), *figure.at(fold * wide * 1.1, low), 0.2, 0.6)
        canvas.tint(crease, 0.8, UPPER)


def draw_neckline(canvas: Canvas, figure: Figure, kind: str) -> None:
    """A round opening with a rim, wider for dresses and tank tops; nothing to see from behind or the side."""
    if figure.view == "back" or figure.side_on:
        return
    if kind in ("t-shirt", "dress", "sweater", "tank top"):
        deep = {"dress": 4.6, "tank top": 5.2}.get(kind, 2.6)
        rim = canvas.ellipse(*figure.at(0, figure.shoulder - 2.2), 4.3 * figure.u, (deep + 1.1) * figure.u)
        canvas.tint(rim, 0.72, UPPER)
        scoop = canvas.ellipse(*figure.at(0, figure.shoulder - 2.4), 3.4 * figure.u, deep * figure.u)
        canvas.paint(scoop, SKIN, skin(figure), 0.9)


def draw_shirt(canvas: Canvas, figure: Figure) -> None:
    """A collar of two points and a row of buttons."""
    if figure.view == "back":
        canvas.tint(
            canvas.capsule(*figure.at(-3.4, figure.shoulder - 1.8), *figure.at(3.4, figure.shoulder - 1.8), 0.8, 0.8),
            1.2,
            UPPER,
        )
        canvas.tint(
            canvas.capsule(*figure.at(-8, figure.shoulder + 5), *figure.at(8, figure.shoulder + 5), 0.3, 0.3),
            0.75,
            UPPER,
        )
        return
    if figure.side_on:
        x = figure.lean + figure.facing * 2
        canvas.tint(
            canvas.capsule(
                *figure.at(x, figure.shoulder - 1.6), *figure.at(x - figure.facing * 4.2, figure.shoulder - 2.2), 1, 1
            ),
            1.2,
            UPPER,
        )
        return
    neck = canvas.polygon(
        figure.at(-2.6, figure.shoulder - 2.4),
        figure.at(2.6, figure.shoulder - 2.4),
        figure.at(0, figure.shoulder + 2.6),
    )
    canvas.paint(neck, SKIN, skin(figure), 0.85)
    bright = plain(cloth(figure, figure.outfit.upper_colour), gloss=0.05)
    for sign in (-1, 1):
        flap = canvas.polygon(
            figure.at(sign * 1.4, figure.shoulder - 3.2),
            figure.at(sign * 4.4, figure.shoulder - 2.2),
            figure.at(sign * 3.4, figure.shoulder + 2.6),
            figure.at(sign * 0.3, figure.shoulder + 1.2),
        )
        canvas.paint(flap, UPPER, bright, 1.1)
        canvas.tint(
            canvas.capsule(
                *figure.at(sign * 4.2, figure.shoulder - 1.8), *figure.at(sign * 3.3, figure.shoulder + 3.0), 0.35, 0.35
            ),
            0.6,
            UPPER,
        )
    canvas.tint(
        canvas.capsule(*figure.at(0.9, figure.shoulder + 3), *figure.at(0.9, figure.crotch + 3), 0.3, 0.3), 0.66, UPPER
    )
    dark = figure.outfit.upper_colour in ("black", "blue", "brown", "purple", "green", "red")
    for step in range(5):
        y = figure.shoulder + 5 + step * (figure.crotch - figure.shoulder - 4) / 5
        canvas.dye(
            canvas.ellipse(*figure.at(-0.2, y), 0.62 * figure.u, 0.62 * figure.u),
            (225, 225, 220) if dark else (70, 66, 66),
            UPPER,
        )


def draw_hoodie(canvas: Canvas, figure: Figure) -> None:
    """A hood on the back or around the neck, a front pocket, drawstrings."""
    fabric = plain(cloth(figure, figure.outfit.upper_colour), gloss=0.4)
    if figure.view == "back":
        hood = canvas.profile(
            figure.nodes(
                (figure.chin - 2, -3.6, 3.6),
                (figure.shoulder, -6.4, 6.4),
                (figure.shoulder + 5, -5.2, 5.2),
                (figure.shoulder + 8.5, -0.8, 0.8),
            )
        )
        canvas.tint(canvas.ellipse(*figure.at(0, figure.shoulder + 4), 7.2 * figure.u, 6.4 * figure.u), 0.66, UPPER)
        canvas.paint(hood, UPPER, fabric, 0.95)
        canvas.tint(
            canvas.capsule(*figure.at(0, figure.shoulder - 2), *figure.at(0, figure.shoulder + 7), 0.35, 0.35),
            0.7,
            UPPER,
        )
        return
    if figure.side_on:
        d, lean = figure.facing, figure.lean
        canvas.paint(
            canvas.ellipse(*figure.at(lean - d * 5.0, figure.shoulder - 0.4), 3.9 * figure.u, 3.7 * figure.u),
            UPPER,
            fabric,
            0.88,
        )
        return
    ring = canvas.ellipse(*figure.at(0, figure.shoulder - 1.2), 6.0 * figure.u, 3.6 * figure.u)
    canvas.paint(ring, UPPER, fabric, 0.84)
    canvas.paint(
        canvas.ellipse(*figure.at(0, figure.shoulder - 2.4), 3.2 * figure.u, 2.8 * figure.u), SKIN, skin(figure), 0.75
    )
    pocket = canvas.profile(
        figure.nodes((figure.waist + 1, -4.0, 4.0), (figure.waist + 4, -6.4, 6.4), (figure.crotch - 1.5, -6.4, 6.4))
    )
    canvas.tint(pocket, 0.78, UPPER)
    inner = canvas.profile(
        figure.nodes((figure.waist + 1.6, -3.4, 3.4), (figure.waist + 4.4, -5.7, 5.7), (figure.crotch - 2, -5.7, 5.7))
    )
    canvas.tint(inner, 1.22, UPPER)
    string = (238, 238, 234) if figure.outfit.upper_colour not in ("white", "yellow") else (80, 80, 86)
    for sign in (-1, 1):
        canvas.dye(
            canvas.capsule(
                *figure.at(sign * 2.2, figure.shoulder + 1.2), *figure.at(sign * 2.5, figure.shoulder + 8), 0.5, 0.5
            ),
            string,
            UPPER,
        )


def draw_jacket(canvas: Canvas, figure: Figure) -> None:
    """Open at the front with another garment under it; zip edges and a short stand-up collar."""
    dark = plain(tuple(channel * 0.62 for channel in cloth(figure, figure.outfit.upper_colour)), gloss=0.1)  # type: ignore[arg-type]
    if figure.view == "back":
        canvas.tint(
            canvas.capsule(*figure.at(-4, figure.shoulder - 1.6), *figure.at(4, figure.shoulder - 1.6), 1.2, 1.2),
            0.7,
            UPPER,
        )
        half = figure.hip_w * 1.1
        canvas.tint(
            canvas.profile(figure.nodes((figure.crotch - 1.4, -half, half), (figure.crotch + 1.6, -half, half))),
            0.7,
            UPPER,
        )
        return
    if figure.side_on:
        x = figure.lean + figure.facing * 1.0
        canvas.tint(
            canvas.capsule(
                *figure.at(x, figure.shoulder - 1.6), *figure.at(x - figure.facing * 4, figure.shoulder - 2), 1.3, 1.3
            ),
            0.66,
            UPPER,
        )
        front = figure.belly * 0.74 * figure.facing
        strip = canvas.capsule(
            *figure.at(figure.lean * 0.6 + front, figure.shoulder + 5), *figure.at(front, figure.crotch), 0.5, 0.5
        )
        canvas.tint(strip, 0.55, UPPER)
        return
    inner = plain(cloth(figure, figure.outfit.inner_colour), gloss=0.1)
    gap = canvas.profile(
        figure.nodes(
            (figure.shoulder - 2, -3, 3),
            (figure.shoulder + 6, -2.6, 2.6),
            (figure.waist, -3.0, 3.0),
            (figure.crotch + 1.5, -4.2, 4.2),
        )
    )
    canvas.paint(gap, UPPER, inner, 0.86)
    canvas.paint(
        canvas.ellipse(*figure.at(0, figure.shoulder - 2.4), 3 * figure.u, 2.8 * figure.u), SKIN, skin(figure), 0.82
    )
    for sign in (-1, 1):
        flap = canvas.polygon(
            figure.at(sign * 2.4, figure.shoulder - 3.4),
            figure.at(sign * 5.4, figure.shoulder - 1.6),
            figure.at(sign * 4.4, figure.shoulder + 3.4),
            figure.at(sign * 2.6, figure.shoulder + 6),
        )
        canvas.paint(flap, UPPER, dark)
        edge = canvas.capsule(
            *figure.at(sign * 2.8, figure.shoulder + 5), *figure.at(sign * 4.4, figure.crotch + 1), 0.4, 0.4
        )
        canvas.dye(edge, (196, 196, 200), UPPER)


def draw_coat(canvas: Canvas, figure: Figure) -> None:
    """Long, with wide lapels, two rows of buttons and a belt or a back vent."""
    low = hem(figure)
    half = (figure.depth if figure.side_on else figure.waist_w) * 1.1
    belt = canvas.profile(figure.nodes((figure.waist, -half, half), (figure.waist + 2.2, -half, half)))
    canvas.tint(belt, 0.6, UPPER)
    if figure.view == "back":
        canvas.tint(
            canvas.capsule(*figure.at(-4.4, figure.shoulder - 1.4), *figure.at(4.4, figure.shoulder - 1.4), 1.5, 1.5),
            0.76,
            UPPER,
        )
        canvas.tint(canvas.capsule(*figure.at(0, figure.crotch), *figure.at(0, low), 0.3, 0.7), 0.55, UPPER)
        return
    if figure.side_on:
        x = figure.lean + figure.facing * 1.5
        canvas.tint(
            canvas.capsule(
                *figure.at(x, figure.shoulder - 1.2), *figure.at(x - figure.facing * 5, figure.shoulder - 2), 1.5, 1.5
            ),
            0.7,
            UPPER,
        )
        return
    vee = canvas.polygon(
        figure.at(-3, figure.shoulder - 2.4), figure.at(3, figure.shoulder - 2.4), figure.at(0.4, figure.shoulder + 8)
    )
    canvas.paint(vee, UPPER, plain(cloth(figure, figure.outfit.inner_colour), gloss=0.1), 0.84)
    canvas.paint(
        canvas.ellipse(*figure.at(0, figure.shoulder - 2.6), 2.6 * figure.u, 2.6 * figure.u), SKIN, skin(figure), 0.8
    )
    for sign in (-1, 1):
        lapel = canvas.polygon(
            figure.at(sign * 2.2, figure.shoulder - 3.2),
            figure.at(sign * 5.8, figure.shoulder - 1.2),
            figure.at(sign * 6.0, figure.shoulder + 4),
            figure.at(sign * 0.5, figure.shoulder + 9),
        )
        canvas.tint(lapel, 0.8, UPPER)
        for step in range(3):
            y = figure.shoulder + 12 + step * 7
            canvas.dye(
                canvas.ellipse(*figure.at(sign * 2.4, y), 0.75 * figure.u, 0.75 * figure.u),
                (36, 32, 32) if figure.outfit.upper_colour not in ("black", "blue") else (190, 180, 150),
                UPPER,
            )
    canvas.tint(canvas.capsule(*figure.at(0.4, figure.shoulder + 9), *figure.at(0.4, low), 0.35, 0.45), 0.6, UPPER)


OF_TYPE: dict[str, Callable[[Canvas, Figure], None]] = {
    "shirt": draw_shirt,
    "hoodie": draw_hoodie,
    "jacket": draw_jacket,
    "coat": draw_coat,
}
