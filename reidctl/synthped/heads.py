"""Heads: hair by length and view, face, profile, beard, neck."""

from reidctl.synthped import palette
from reidctl.synthped.canvas import FACE, HAIR, SKIN, Canvas, Fabric, plain
from reidctl.synthped.fabrics import skin
from reidctl.synthped.figure import Figure

EYE: palette.Colour = (38, 30, 30)


def hair(figure: Figure) -> Fabric:
    """The colour of the hair, a little glossier than cloth."""
    return plain(palette.HAIR[figure.body.hair_colour], gloss=0.36)


def draw_hair_behind(canvas: Canvas, figure: Figure) -> None:
    """Long hair and bobs seen from the front: what lies behind the face and the neck, drawn before the trunk."""
    if figure.view != "front" or figure.body.hair_length not in ("long", "bob"):
        return
    w, chin = figure.head_w, figure.chin
    end = chin + 9.0 if figure.body.hair_length == "long" else chin + 0.6
    rows = figure.nodes(
        (3, -w * 1.05, w * 1.05),
        (chin - 4, -w * 1.42, w * 1.42),
        (end - 2, -w * 1.5, w * 1.5),
        (end, -w * 1.2, w * 1.2),
    )
    canvas.paint(canvas.profile(rows), HAIR, hair(figure), 0.85)


def draw_neck(canvas: Canvas, figure: Figure) -> None:
    """The neck and, from behind or for bare-shouldered clothes, the skin at its root."""
    wide = 2.5 * (0.7 + 0.3 * figure.body.girth)
    x = figure.head_x * 0.75
    neck = canvas.capsule(
        *figure.at(x, figure.chin - 4),
        *figure.at(figure.lean, figure.shoulder + 0.5),
        wide * figure.u,
        wide * 1.1 * figure.u,
    )
    canvas.paint(neck, SKIN, skin(figure), 0.8)
    if figure.outfit.upper_type == "tank top" and not figure.side_on:
        s = figure.shoulder_w
        rows = figure.nodes(
            (figure.shoulder - 2, -3, 3),
            (figure.shoulder, -s * 0.8, s * 0.8),
            (figure.shoulder + 3, -s, s),
            (figure.shoulder + 8, -s, s),
        )
        canvas.paint(canvas.profile(rows), SKIN, skin(figure), 0.97)


def draw_head(canvas: Canvas, figure: Figure) -> None:
    """Head in the figure's view: a face, a profile, or the back of the hair."""
    if figure.side_on:
        _profile(canvas, figure)
    elif figure.view == "front":
        _front(canvas, figure)
    else:
        _back(canvas, figure)


def _front(canvas: Canvas, figure: Figure) -> None:
    w, chin, u, fair = figure.head_w, figure.chin, figure.u, skin(figure)
    top = chin - figure.head_h
    middle = top + figure.head_h * 0.54
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(*figure.at(sign * w * 0.98, middle + 0.6), 1.0 * u, 1.7 * u), FACE, fair, 0.85)
    rows = (
        (top + 1, -w * 0.6, w * 0.6),
        (top + 3.5, -w * 0.98, w * 0.98),
        (middle + 1, -w, w),
        (chin - 3, -w * 0.8, w * 0.8),
        (chin - 1, -w * 0.5, w * 0.5),
        (chin, -w * 0.2, w * 0.2),
    )
    canvas.paint(canvas.profile(figure.nodes(*rows)), FACE, fair, 1.04)
    for sign in (-1, 1):
        eye = sign * w * 0.42
        canvas.dye(canvas.ellipse(*figure.at(eye, middle + 0.2), 0.85 * u, 0.6 * u), EYE, FACE)
        canvas.tint(
            canvas.capsule(*figure.at(eye - 1.0, middle - 1.5), *figure.at(eye + 1.0, middle - 1.5), 0.35, 0.35),
            0.55,
            FACE,
        )
    canvas.tint(canvas.capsule(*figure.at(0.2, middle + 0.6), *figure.at(0.4, middle + 2.6), 0.4, 0.65), 0.84, FACE)
    canvas.tint(canvas.capsule(*figure.at(-1.3, chin - 2.6), *figure.at(1.3, chin - 2.6), 0.45, 0.45), 0.62, FACE)
    if figure.body.gender == "woman":
        canvas.dye(
            canvas.capsule(*figure.at(-1.0, chin - 2.6), *figure.at(1.0, chin - 2.6), 0.5, 0.5),
            _lips(fair.colour),
            FACE,
        )
    if figure.body.beard:
        _beard(canvas, figure, middle)
    if figure.body.hair_length == "bald":
        canvas.paint(
            canvas.ellipse(*figure.at(0, top + 4.4), w * 0.96 * u, 4.4 * u), FACE, plain(fair.colour, gloss=0.34), 1.06
        )
        return
    locks = hair(figure)
    rise = 0.6 if figure.body.hair_length == "short" else 1.0
    cap = canvas.ellipse(*figure.at(0, top + 4.6), (w + rise * 0.9) * u, (4.8 + rise * 0.7) * u)
    parting = 3.7 if figure.body.gender == "man" else 4.7
    fx, fy = figure.at(w * 0.15, top + parting + 5.0)
    y, x = canvas.ys[cap.rows], canvas.xs[:, cap.columns]
    # The forehead: hair keeps clear of an ellipse around the face.
    du, dv = (x - fx) * (1 / (w * 0.94 * u)), (y - fy) * (1 / (5.4 * u))
    canvas.paint(cap.where(du * du + dv * dv > 1), HAIR, locks, 1.03)
    if figure.body.hair_length in ("bob", "long"):
        reach = chin - 1.0 if figure.body.hair_length == "bob" else figure.shoulder + 7.5
        for sign in (-1, 1):
            lock = canvas.capsule(
                *figure.at(sign * w * 1.02, top + 4.4), *figure.at(sign * w * 1.22, reach), 0.9 * u, 1.5 * u
            )
            canvas.paint(lock, HAIR, locks, 0.97)


def _lips(colour: palette.Colour) -> palette.Colour:
    return (min(255.0, colour[0] * 0.9 + 12), colour[1] * 0.58, colour[2] * 0.6)


def _beard(canvas: Canvas, figure: Figure, middle: float) -> None:
    w, chin = figure.head_w, figure.chin
    colour = figure.body.hair_colour
    if colour == "none":
        colour = "grey" if figure.body.age == "elderly" else "brown"
    locks = plain(palette.HAIR[colour], gloss=0.2)
    mouth = figure.at(0, chin - 2.9)
    rows = (
        (middle + 2.6, -w, w),
        (chin - 3, -w * 0.86, w * 0.86),
        (chin - 0.5, -w * 0.58, w * 0.58),
        (chin + 0.8, -w * 0.22, w * 0.22),
    )
    shape = canvas.profile(figure.nodes(*rows))
    y, x = canvas.ys[shape.rows], canvas.xs[:, shape.columns]
    aside, above = (x - mouth[0]) * (1 / (1.9 * figure.u)), (y - mouth[1]) * (1 / (0.7 * figure.u))
    cheeks = (y > mouth[1] - 1.1 * figure.u) | (abs(x - figure.x) > w * 0.72 * figure.u)
    canvas.paint(shape.where((aside * aside + above * above > 1) & cheeks), FACE, locks, 0.95)


def _back(canvas: Canvas, figure: Figure) -> None:
    w, chin, u = figure.head_w, figure.chin, figure.u
    top, length = chin - figure.head_h, figure.body.hair_length
    middle = top + figure.head_h * 0.54
    fair, locks = skin(figure), hair(figure)
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(*figure.at(sign * w * 0.98, middle + 0.8), 1.0 * u, 1.7 * u), SKIN, fair, 0.8)
    skull = (
        (top, -w * 0.4, w * 0.4),
        (top + 1.6, -w * 0.86, w * 0.86),
        (middle - 1, -w * 1.04, w * 1.04),
        (chin - 3.6, -w * 0.8, w * 0.8),
        (chin - 1.6, -w * 0.55, w * 0.55),
    )
    canvas.paint(canvas.profile(figure.nodes(*skull)), SKIN, fair, 0.94)
    if length == "bald":
        canvas.tint(canvas.ellipse(*figure.at(-w * 0.2, top + 3.5), 2.4 * u, 2 * u), 1.1, SKIN)
        return
    rows = [(top - 0.4, -w * 0.35, w * 0.35), (top + 1.2, -w * 0.9, w * 0.9), (middle - 1, -w * 1.16, w * 1.16)]
    if length == "short":
        rows += [(chin - 4.4, -w * 0.95, w * 0.95), (chin - 2.6, -w * 0.66, w * 0.66)]
    elif length == "bob":
        rows += [(chin - 2.5, -w * 1.42, w * 1.42), (chin + 0.8, -w * 1.36, w * 1.36)]
    else:
        rows += [
            (chin, -w * 1.4, w * 1.4),
            (figure.shoulder + 9, -w * 1.3, w * 1.3),
            (figure.shoulder + 13, -w * 0.7, w * 0.7),
        ]
    canvas.paint(canvas.profile(figure.nodes(*rows)), HAIR, locks)
    bottom = rows[-1][0] - 1
    for share in (-0.5, 0.05, 0.55):
        strand = canvas.capsule(*figure.at(share * w * 0.5, top + 2), *figure.at(share * w * 1.2, bottom), 0.25, 0.45)
        canvas.tint(strand, 0.78 if share else 1.3, HAIR)


def _profile(canvas: Canvas, figure: Figure) -> None:
    d, u, chin = figure.facing, figure.u, figure.chin
    x, w, fair = figure.head_x, figure.head_w * 1.1, skin(figure)
    top = chin - figure.head_h
    middle = top + figure.head_h * 0.54
    length = figure.body.hair_length
    if length in ("bob", "long"):
        end = chin + 0.8 if length == "bob" else figure.shoulder + 11
        back = _mirrored(
            figure,
            x,
            d,
            (top + 2, -w * 0.9, w * 0.5),
            (middle, -w * 1.22, -w * 0.05),
            (chin - 1, -w * 1.3, -w * 0.15),
            (end, -w * 1.15, -w * 0.35),
        )
        canvas.paint(canvas.profile(back), HAIR, hair(figure), 0.92)
    canvas.paint(
        canvas.ellipse(*figure.at(x - d * 0.4, top + figure.head_h * 0.45), w * u, figure.head_h * 0.45 * u), FACE, fair
    )
    jaw = _mirrored(
        figure,
        x,
        d,
        (middle - 2, -w * 0.2, w * 0.94),
        (middle + 1.5, -w * 0.3, w * 0.98),
        (chin - 2.4, -w * 0.3, w * 0.9),
        (chin - 0.6, -w * 0.1, w * 0.8),
        (chin, w * 0.1, w * 0.6),
    )
    canvas.paint(canvas.profile(jaw), FACE, fair, 1.03)
    nose = canvas.polygon(
        figure.at(x + d * w * 0.85, middle - 0.8),
        figure.at(x + d * (w * 1.02 + 1.5), middle + 2.0),
        figure.at(x + d * w * 0.85, middle + 2.6),
    )
    canvas.paint(nose, FACE, fair, 1.02)
    canvas.dye(canvas.ellipse(*figure.at(x + d * w * 0.66, middle + 0.1), 0.7 * u, 0.65 * u), EYE, FACE)
    canvas.tint(
        canvas.capsule(
            *figure.at(x + d * w * 0.5, middle - 1.4), *figure.at(x + d * w * 0.88, middle - 1.5), 0.3, 0.35
        ),
        0.55,
        FACE,
    )
    lip = canvas.capsule(*figure.at(x + d * w * 0.62, chin - 2.7), *figure.at(x + d * w * 0.95, chin - 2.9), 0.35, 0.45)
    canvas.tint(lip, 0.62, FACE)
    if figure.body.beard:
        colour = (
            figure.body.hair_colour
            if figure.body.hair_colour != "none"
            else "grey"
            if figure.body.age == "elderly"
            else "brown"
        )
        rows = _mirrored(
            figure,
            x,
            d,
            (middle + 1.6, -w * 0.12, w * 0.12),
            (chin - 3.4, -w * 0.15, w * 0.5),
            (chin - 2, -w * 0.1, w * 0.95),
            (chin + 0.9, w * 0.3, w * 0.75),
        )
        canvas.paint(canvas.profile(rows), FACE, plain(palette.HAIR[colour], gloss=0.2), 0.95)
    canvas.tint(canvas.ellipse(*figure.at(x - d * w * 0.12, middle + 1.0), 1.0 * u, 1.6 * u), 0.76, FACE)
    if length == "bald":
        return
    locks = hair(figure)
    bulk = 0.7 if length == "short" else 1.1
    low = middle + 1.0 if length == "short" else chin - 0.5
    rows = _mirrored(
        figure,
        x,
        d,
        (top - bulk, -w * 0.5, w * 0.35),
        (top + 0.8, -w * 0.95, w * 0.9),
        (top + 2.6, -w * 1.14, w * 0.98),
        (top + 4.0, -w * 1.2, w * 0.5),
        (middle - 1, -w * 1.22, w * 0.05),
        (middle + 0.6, -w * 1.16, -w * 0.3 if length == "short" else w * 0.06),
        (low + 1.6, -w * 0.95, -w * 0.5 if length == "short" else -w * 0.1),
    )
    canvas.paint(canvas.profile(rows), HAIR, locks)
    gleam = canvas.capsule(*figure.at(x - d * w * 0.4, top + 1.0), *figure.at(x + d * w * 0.4, top + 1.2), 0.4, 0.3)
    canvas.tint(gleam, 1.35, HAIR)


def _mirrored(figure: Figure, x: float, d: int, *rows: tuple[float, float, float]) -> list[tuple[float, float, float]]:
    """Profile rows written for a person facing right (back edge, front edge), turned to face `d` and moved to `x`."""
    turned = [(y, *sorted((x + d * back, x + d * front))) for y, back, front in rows]
    return figure.nodes(*((y, left, right) for y, left, right in turned))
