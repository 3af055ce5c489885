"""Everything that is not the person: backgrounds, occluders, and what a camera does to the picture."""

import numpy as np

from reidctl.synthped import palette
from reidctl.synthped.canvas import BACKGROUND, Canvas, Floats, plain
from reidctl.synthped.draws import Draws

# One row per camera of a domain (cycled): gain of red, green, blue; offset; haze (pull towards grey).
CAMERAS: dict[str, tuple[tuple[float, float, float, float, float], ...]] = {
    "a": (
        (1.00, 1.00, 1.00, 0, 0.02),
        (1.10, 0.99, 0.88, 4, 0.04),
        (0.86, 0.93, 1.05, -4, 0.06),
        (0.76, 0.78, 0.80, -2, 0.04),
        (1.10, 1.12, 1.10, 10, 0.10),
    ),
    "b": (
        (1.05, 0.97, 0.86, 8, 0.10),
        (0.90, 1.00, 0.92, 4, 0.12),
        (0.94, 0.94, 1.04, 12, 0.14),
        (0.80, 0.75, 0.72, 4, 0.08),
        (1.02, 1.06, 1.10, 2, 0.20),
    ),
    "c": (
        (0.88, 0.94, 1.08, -2, 0.04),
        (1.12, 1.00, 0.86, -6, 0.06),
        (1.02, 1.06, 1.12, 14, 0.16),
        (0.88, 0.80, 0.94, 0, 0.02),
        (0.96, 1.10, 0.94, 6, 0.12),
    ),
}
NOISE = {"a": 3.0, "b": 5.0, "c": 7.0}  # standard deviation of the sensor noise, in grey levels
POLES: dict[str, palette.Colour] = {"a": (112, 114, 116), "b": (186, 180, 170), "c": (74, 92, 84)}


def draw_background(canvas: Canvas, rng: Draws, domain: str, camera: int) -> None:
    """Paint wall, floor and clutter; each camera of a domain prefers one kind of place."""
    places = {
        "a": (_brick, _hedge, _road, _facade),
        "b": (_tiles, _platform, _glass, _shelves),
        "c": (_lamps, _snow, _market, _fence),
    }[domain]
    horizon = rng.between(62, 84)
    # Mostly a camera looks anywhere: a background that always gave it away would outweigh the clothes.
    place = rng.below(len(places)) if rng.chance(0.85) else (camera - 1) % len(places)
    places[place](canvas, rng, horizon)
    for _ in range(rng.below(4)):
        _clutter(canvas, rng, horizon)


def _fill(canvas: Canvas, y0: float, y1: float, colour: palette.Colour, slope: float = 0.0) -> None:
    """A horizontal band over the whole width, brightening downwards by `slope` per unit."""
    rows = slice(max(0, int(y0 / canvas.y_step)), max(0, int(y1 / canvas.y_step)))
    ramp = 1 + (canvas.ys[rows] - y0) * np.float32(slope)
    canvas.rgb[rows] = ramp[..., None] * np.array(colour, dtype=np.float32)


def _lines(canvas: Canvas, y0: float, y1: float, period: float, width: float, factor: float, shift: float) -> None:
    """Darken (or brighten) vertical lines of a band, `period` units apart."""
    rows = slice(max(0, int(y0 / canvas.y_step)), max(0, int(y1 / canvas.y_step)))
    columns = np.mod(canvas.xs[0] + np.float32(shift), np.float32(period)) < np.float32(width)
    canvas.rgb[rows, columns] *= np.float32(factor)


def _joints(canvas: Canvas, y0: float, y1: float, period: float, width: float, factor: float) -> None:
    """Darken horizontal lines of a band, `period` units apart."""
    y = canvas.ys[:, 0]
    rows = (y >= y0) & (y < y1) & (np.mod(y - np.float32(y0), np.float32(period)) < np.float32(width))
    canvas.rgb[rows] *= np.float32(factor)


def _grain(canvas: Canvas, rng: Draws, y0: float, y1: float, cell: float, strength: float) -> None:
    """Blocky random texture: cells of `cell` units, each a little brighter or darker."""
    rows = slice(max(0, int(y0 / canvas.y_step)), max(0, int(y1 / canvas.y_step)))
    y = (canvas.ys[rows, 0] / np.float32(cell)).astype(np.int64)
    x = (canvas.xs[0] / np.float32(cell)).astype(np.int64)
    if y.size == 0:
        return
    table = rng.noise(int(128 / cell) + 2, int(64 / cell) + 2, 1)[..., 0]
    canvas.rgb[rows] *= (1 + np.float32(strength) * table[y][:, x])[..., None]


def _tone(rng: Draws, colour: palette.Colour, spread: float = 14) -> palette.Colour:
    delta = rng.between(-spread, spread)
    return (colour[0] + delta, colour[1] + delta, colour[2] + delta)


def _brick(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (150, 96, 78)))
    _grain(canvas, rng, 0, horizon, 4.5, 0.10)
    shift = rng.between(0, 8)
    _joints(canvas, 0, horizon, 4.5, 0.8, 1.25)
    _lines(canvas, 0, horizon, 9, 0.8, 1.18, shift)
    _fill(canvas, horizon, 128, _tone(rng, (128, 126, 122)), 0.003)
    _joints(canvas, horizon, 128, 11, 0.8, 0.82)
    _grain(canvas, rng, horizon, 128, 2, 0.05)


def _hedge(canvas: Canvas, rng: Draws, horizon: float) -> None:
    sky = horizon * 0.35
    _fill(canvas, 0, sky, _tone(rng, (186, 204, 220)))
    _fill(canvas, sky, horizon, _tone(rng, (66, 96, 54)))
    _grain(canvas, rng, 0, sky, 9, 0.03)
    _grain(canvas, rng, sky, horizon, 1.6, 0.20)
    _grain(canvas, rng, sky, horizon, 6, 0.12)
    _fill(canvas, horizon, 128, _tone(rng, (164, 150, 126)), 0.002)
    _grain(canvas, rng, horizon, 128, 1.3, 0.06)


def _road(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (150, 152, 158)))
    _grain(canvas, rng, 0, horizon, 16, 0.14)
    _fill(canvas, horizon, 128, _tone(rng, (88, 90, 94)), 0.002)
    _grain(canvas, rng, horizon, 128, 1.2, 0.06)
    shift = rng.between(-10, 50)
    for step in range(3):
        y = horizon + 6 + step * 16
        stripe = canvas.polygon(
            (shift + step * 6, y),
            (shift + step * 6 + 3, y),
            (shift + step * 6 + 8, y + 9),
            (shift + step * 6 + 4, y + 9),
        )
        canvas.paint(stripe, BACKGROUND, plain((214, 212, 204), gloss=0.02))
    _joints(canvas, horizon - 3, horizon, 9, 2.4, 1.3)


def _facade(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (184, 172, 150)))
    _grain(canvas, rng, 0, horizon, 2.4, 0.04)
    shift, period = rng.between(0, 20), rng.between(16, 24)
    for number in range(-1, 5):
        x = number * period + shift
        for y in (6.0, 38.0):
            window = canvas.profile([(y, x, x + 9), (y + 18, x, x + 9)])
            canvas.paint(window, BACKGROUND, plain(_tone(rng, (74, 92, 112), 24), gloss=0.14))
    _fill(canvas, horizon, 128, _tone(rng, (150, 146, 142)), 0.002)
    _lines(canvas, horizon, 128, 13, 0.7, 0.8, shift)
    _joints(canvas, horizon, 128, 7, 0.7, 0.84)


def _tiles(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (204, 194, 176)))
    _grain(canvas, rng, 0, horizon, 21, 0.06)
    _joints(canvas, horizon - 3, horizon, 9, 3, 0.6)
    _fill(canvas, horizon, 128, _tone(rng, (190, 184, 172)), 0.001)
    _grain(canvas, rng, horizon, 128, 8, 0.07)
    _joints(canvas, horizon, 128, 8, 0.7, 0.8)
    _lines(canvas, horizon, 128, 8, 0.7, 0.8, rng.between(0, 8))


def _platform(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (92, 98, 96)))
    _joints(canvas, 0, horizon, 6, 0.5, 0.8)
    _fill(canvas, horizon * 0.4, horizon * 0.52, _tone(rng, (62, 120, 128)))
    _grain(canvas, rng, 0, horizon, 11, 0.08)
    _fill(canvas, horizon, 128, _tone(rng, (126, 122, 116)), 0.002)
    _fill(canvas, horizon + 3, horizon + 7, (206, 178, 74))
    _grain(canvas, rng, horizon, 128, 2, 0.05)


def _glass(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (150, 170, 178)), 0.003)
    _grain(canvas, rng, 0, horizon, 13, 0.12)
    _lines(canvas, 0, horizon, rng.between(17, 26), 1.6, 0.45, rng.between(0, 20))
    _fill(canvas, horizon, 128, _tone(rng, (110, 92, 80)), 0.002)
    _lines(canvas, horizon, 128, 5, 0.5, 0.8, rng.between(0, 5))


def _shelves(canvas: Canvas, rng: Draws, horizon: float) -> None:
    _fill(canvas, 0, horizon, _tone(rng, (120, 100, 84)))
    for row in range(5):
        for column in range(9):
            x, y = column * 7.4 + rng.between(-1, 1), row * 15 + rng.between(2, 5)
            colour = palette.CLOTH["b"][rng.pick(palette.UPPER_COLOURS)]
            goods = canvas.profile([(y, x, x + 6), (row * 15 + 12, x, x + 6)])
            canvas.paint(goods, BACKGROUND, plain(colour, gloss=0.1), 0.78)
    _fill(canvas, horizon, 128, _tone(rng, (168, 152, 138)), 0.002)
    _grain(canvas, rng, horizon, 128, 1.2, 0.07)


def _lamps(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """A street at night: houses with some lit windows, and lamps whose light lies on the wet ground."""
    _fill(canvas, 0, horizon, _tone(rng, (62, 70, 104), 8), 0.004)
    _grain(canvas, rng, 0, horizon, 12, 0.08)
    shift = rng.between(0, 13)
    for number in range(5):
        for row in range(3):
            x, y = number * 13 + shift - 10, 5 + row * 20
            lit = (232, 190, 104) if rng.chance(0.35) else (44, 50, 76)
            window = canvas.profile([(y, x, x + 6), (min(y + 11, horizon - 3), x, x + 6)])
            canvas.paint(window, BACKGROUND, plain(_tone(rng, lit, 10), gloss=0.05))
    _fill(canvas, horizon, 128, _tone(rng, (84, 88, 112), 8), 0.002)
    _grain(canvas, rng, horizon, 128, 3, 0.08)
    for lamp in (rng.between(2, 16), rng.between(40, 54)):
        canvas.paint(
            canvas.profile([(14, lamp - 0.7, lamp + 0.7), (horizon + 4, lamp - 0.9, lamp + 0.9)]),
            BACKGROUND,
            plain((34, 36, 46)),
        )
        for radius, factor in ((13.0, 1.14), (8.0, 1.2), (4.5, 1.3)):
            canvas.tint(canvas.ellipse(lamp, 13, radius, radius), factor)
            canvas.tint(canvas.ellipse(lamp, horizon + 18, radius * 0.6, radius * 2), factor)
        canvas.paint(canvas.ellipse(lamp, 13, 2.4, 2.4), BACKGROUND, plain((255, 240, 196), gloss=0.05))


def _snow(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """A park in winter: bare trunks before a pale sky, trodden snow."""
    _fill(canvas, 0, horizon, _tone(rng, (160, 176, 196), 10), 0.003)
    _grain(canvas, rng, 0, horizon, 18, 0.05)
    edge = horizon - rng.between(10, 18)
    _fill(canvas, edge, horizon, _tone(rng, (104, 116, 126), 8))
    _grain(canvas, rng, edge, horizon, 3, 0.16)
    for _ in range(4 + rng.below(4)):
        x, half, foot = rng.between(-2, 58), rng.between(0.8, 2.4), horizon + rng.between(-2, 5)
        bark = plain(_tone(rng, (74, 66, 66), 12), gloss=0.4)
        canvas.paint(
            canvas.profile([(-1, x - half * 0.7, x + half * 0.7), (foot, x - half, x + half)]), BACKGROUND, bark
        )
        for side in (-1, 1):
            y = rng.between(8, 44)
            canvas.paint(canvas.capsule(x, y, x + side * 9, y - 11, half * 0.5, 0.3), BACKGROUND, bark)
    _fill(canvas, horizon, 128, _tone(rng, (198, 208, 224), 10), 0.001)
    _grain(canvas, rng, horizon, 128, 7, 0.04)
    _grain(canvas, rng, horizon, 128, 1.6, 0.05)
    for number in range(6):
        x, y = rng.between(4, 52), horizon + 5 + number * 8
        canvas.tint(canvas.ellipse(x, y, 2.6, 1.1), 0.84)


def _market(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """A stall: a striped awning, the dim inside, crates of fruit, cobbles."""
    _fill(canvas, 0, horizon, _tone(rng, (96, 84, 92), 10), 0.004)
    _grain(canvas, rng, 0, horizon, 10, 0.10)
    awning = rng.between(15, 24)
    colours = ((186, 60, 56), (54, 112, 96), (62, 84, 150), (190, 132, 54))
    dyed, cream, shift = rng.pick(colours), _tone(rng, (222, 214, 196), 8), rng.between(0, 14)
    for number in range(-1, 9):
        x = number * 7 + shift - 7
        stripe = plain(dyed if number % 2 else cream, gloss=0.1)
        canvas.paint(canvas.profile([(-1, x, x + 7), (awning, x, x + 7)]), BACKGROUND, stripe, 0.9)
        canvas.paint(canvas.ellipse(x + 3.5, awning, 3.5, 3.2), BACKGROUND, stripe, 0.9)
    fruit = ((206, 64, 48), (232, 152, 52), (226, 206, 84), (92, 150, 70), (126, 70, 120))
    for column in range(-1, 5):
        x, colour = column * 14 + shift, rng.pick(fruit)
        for place in range(4):
            ball = canvas.ellipse(x + 2 + place * 3, horizon - 13, 2.2, 2.4)
            canvas.paint(ball, BACKGROUND, plain(_tone(rng, colour, 16)), 0.85)
        crate = canvas.profile([(horizon - 12, x, x + 13), (horizon, x + 0.6, x + 12.4)])
        canvas.paint(crate, BACKGROUND, plain(_tone(rng, (164, 130, 88), 10), gloss=0.1), 0.85)
    _joints(canvas, horizon - 12, horizon, 4, 0.8, 0.7)
    _fill(canvas, horizon, 128, _tone(rng, (122, 120, 128), 10), 0.002)
    _joints(canvas, horizon, 128, 5, 0.8, 0.78)
    _lines(canvas, horizon, 128, 6.5, 0.8, 0.82, shift)
    _grain(canvas, rng, horizon, 128, 5, 0.07)


def _fence(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """Weathered boards below an evening sky, before short grass."""
    top = rng.between(10, 24)
    _fill(canvas, 0, top + 5, _tone(rng, (190, 160, 176), 12))
    width, shift = rng.between(5.5, 8), rng.between(0, 8)
    for number in range(-1, 11):
        x, y = number * width + shift - 4, top + rng.between(-1.5, 1.5)
        board = plain(_tone(rng, (148, 132, 122), 16), gloss=0.12)
        middle = x + width * 0.46
        nodes = [(y - 4, middle - 0.2, middle + 0.2), (y, x, x + width * 0.92), (horizon, x, x + width * 0.92)]
        canvas.paint(canvas.profile(nodes), BACKGROUND, board)
    for y in (top + 8, horizon - 9):
        canvas.tint(canvas.profile([(y, -1, 57), (y + 2.6, -1, 57)]), 0.74)
    _grain(canvas, rng, top, horizon, 1.6, 0.06)
    _fill(canvas, horizon, 128, _tone(rng, (122, 140, 92), 10), 0.002)
    _grain(canvas, rng, horizon, 128, 1.4, 0.14)
    _grain(canvas, rng, horizon, 128, 9, 0.06)


def _clutter(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """A poster, a bin, a far-away person or a column of light."""
    x, kind = rng.between(2, 54), rng.below(4)
    colour = _tone(rng, rng.pick(tuple(palette.CLOTH["a"].values())), 20)
    if kind == 0:
        y = rng.between(6, horizon - 26)
        canvas.paint(
            canvas.profile([(y, x - 6, x + 6), (y + 20, x - 6, x + 6)]), BACKGROUND, plain(colour, gloss=0.05), 0.85
        )
    elif kind == 1:
        canvas.paint(
            canvas.profile([(horizon - 8, x - 4, x + 4), (horizon + 8, x - 3.4, x + 3.4)]),
            BACKGROUND,
            plain(colour),
            0.7,
        )
    elif kind == 2:
        foot = horizon + rng.between(2, 8)
        canvas.paint(canvas.capsule(x, foot - 12, x, foot, 2.4, 1.6), BACKGROUND, plain((60, 62, 74)), 0.9)
        canvas.paint(canvas.capsule(x, foot - 22, x, foot - 13, 3.4, 3.0), BACKGROUND, plain(colour), 0.85)
        canvas.paint(canvas.ellipse(x, foot - 28, 2.2, 2.8), BACKGROUND, plain((150, 116, 92)), 0.9)
    else:
        canvas.tint(canvas.polygon((x - 5, 0), (x + 5, 0), (x + 16, 128), (x + 2, 128)), 1.13)


def draw_ground_shadow(canvas: Canvas, x: float, foot: float, light: float) -> None:
    """A soft shadow at the feet, away from the light."""
    for radius, factor in ((15.0, 0.9), (11.5, 0.84), (8.0, 0.8)):
        canvas.tint(canvas.ellipse(x - light * 8, foot + 0.4, radius, radius * 0.2), factor)


def draw_occluder(canvas: Canvas, rng: Draws, kind: str, domain: str) -> None:
    """Paint what stands between camera and person; it takes the labels of what it hides."""
    if kind == "pole":
        x, half = rng.between(10, 46), rng.between(1.8, 3.4)
        metal = plain(_tone(rng, POLES[domain], 20), gloss=0.5)
        canvas.paint(canvas.profile([(-1, x - half, x + half), (129, x - half, x + half)]), BACKGROUND, metal)
    elif kind == "car":
        top = rng.between(100, 110)
        paint = plain(_tone(rng, rng.pick(tuple(palette.CLOTH[domain].values())), 10), gloss=0.2)
        x = rng.between(6, 50)
        canvas.paint(canvas.ellipse(x, 134, 58, 134 - top), BACKGROUND, paint, 0.95)
        canvas.tint(canvas.ellipse(x, 138, 56, 134 - top), 0.8)
        canvas.tint(canvas.ellipse(x - 6, top + 6, 16, 1.2), 1.4)
    elif kind == "passer-by":
        sign = rng.pick((-1, 1))
        x = 28 + sign * rng.between(26, 31)
        cloth = plain(_tone(rng, rng.pick(tuple(palette.CLOTH[domain].values())), 10))
        canvas.paint(canvas.capsule(x, 74, x, 134, 9, 8), BACKGROUND, plain((58, 60, 70)), 0.9)
        canvas.paint(canvas.capsule(x, 40, x, 74, 12, 11), BACKGROUND, cloth)
        canvas.paint(canvas.ellipse(x, 20, 7, 9), BACKGROUND, plain((60, 44, 38)))


def expose(picture: Floats, rng: Draws, domain: str, camera: int, blur: int, strength: float) -> np.ndarray:
    """Return the uint8 picture that a camera makes of a scene: cast, haze, brightness, blur, noise, clipping.

    Args:
        picture: mean scene colour per pixel, shape (H, W, 3).
        rng: source of the per-image brightness and the noise.
        domain: "a", "b" or "c".
        camera: 1, 2, ...
        blur: passes of a [1, 2, 1] / 4 blur at 128 pixels height; more pixels get more passes.
        strength: 0 leaves the picture alone, 1 is the normal camera.
    """
    red, green, blue, offset, haze = CAMERAS[domain][(camera - 1) % len(CAMERAS[domain])]
    level = 1 + strength * rng.between(-0.13, 0.13)
    gains = np.array([1 + strength * (gain - 1) for gain in (red, green, blue)], dtype=np.float32) * np.float32(level)
    pull = np.float32(strength * haze)
    image = picture * (gains * (1 - pull)) + (np.float32(strength * offset) + np.float32(128) * pull)
    height = picture.shape[0]
    ratio = height * height // (128 * 128)  # the variance of repeated blurs grows with the number of passes
    for _ in range(blur * min(ratio, 9)):
        image = _blur(image)
    noise = rng.noise(height, picture.shape[1], 3) * np.float32(strength * NOISE[domain])
    result: np.ndarray = np.clip(image + noise + np.float32(0.5), 0, 255).astype(np.uint8)
    return result


def _blur(image: Floats) -> Floats:
    """One pass of [1, 2, 1] / 4 in both directions, edges repeated."""
    rows = np.concatenate((image[:1], image, image[-1:]))
    image = (rows[:-2] + 2 * rows[1:-1] + rows[2:]) * np.float32(0.25)
    columns = np.concatenate((image[:, :1], image, image[:, -1:]), axis=1)
    result: Floats = (columns[:, :-2] + 2 * columns[:, 1:-1] + columns[:, 2:]) * np.float32(0.25)
    return result
