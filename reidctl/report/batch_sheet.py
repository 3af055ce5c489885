"""A training batch as a picture: every image as the model gets it, whose it is, and its text."""

import colorsys
import textwrap
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from reidctl import tables
from reidctl.errors import DataError

_PICTURE = (148, 222)  # width, height of the room for one picture
_BORDER, _GAP, _LABEL, _LINE, _LINES = 5, 14, 22, 14, 9
_COLUMNS = 8
_INK, _FAINT, _PAPER = "#1a1a1a", "#5c5c5c", "#ffffff"


class Shown(NamedTuple):
    """One sample.

    Attributes:
        pixels: the image as the model gets it, back in bytes, shape (H, W, 3).
        person: number of the person in the training set; samples with one number get one colour.
        name: of the person.
        text: its text, data and never markup; None where the sample has none.
    """

    pixels: npt.NDArray[np.uint8]
    person: int
    name: str
    text: str | None


def to_pixels(image: npt.NDArray[np.float32], mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.uint8]:
    """Return a normalised image (3, H, W) as bytes (H, W, 3); what no byte can be (erased by noise) is cut."""
    values = image * np.asarray(std)[:, None, None] + np.asarray(mean)[:, None, None]
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(255 * values), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels


def batch_sheet(title: str, samples: Sequence[Shown], out: Path) -> None:
    """Write a PNG of a batch; people in the order of their first sample, with one colour for each.

    Args:
        title: a line above.
        samples: in the order of the batch.
        out: the PNG file.

    Raises:
        DataError: there is nothing to draw, or the file cannot be written.
    """
    if not samples:
        raise DataError("There is no sample to draw.")
    colours = person_colours([sample.person for sample in samples])
    columns = min(_COLUMNS, len(samples))
    rows = [samples[start : start + columns] for start in range(0, len(samples), columns)]
    heights = [_row_height(row) for row in rows]
    width = _GAP + columns * _cell_width()
    sheet = Image.new("RGB", (max(width, 420), _GAP + 30 + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, _font(15, bold=True))
    top = _GAP + 30
    for row, height in zip(rows, heights, strict=True):
        for place, sample in enumerate(row):
            _draw(sheet, draw, sample, colours[sample.person], (_GAP + place * _cell_width(), top))
        top += height
    drawn = BytesIO()
    sheet.save(drawn, "PNG", optimize=True)
    tables.write_bytes(out, drawn.getvalue())


def person_colours(people: Sequence[int]) -> dict[int, str]:
    """Return a colour for each person: neighbours in the batch get hues far apart, near hues differ in shade."""
    found = {}
    for number, person in enumerate(dict.fromkeys(people)):
        hue, light = number * 0.618034 % 1.0, (0.40, 0.55, 0.28)[number % 3]
        red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.75))
        found[person] = f"#{red:02x}{green:02x}{blue:02x}"
    return found


def _cell_width() -> int:
    return _PICTURE[0] + 2 * _BORDER + _GAP


def _row_height(row: Sequence[Shown]) -> int:
    lines = max(len(_wrapped(sample.text)) for sample in row)
    return _PICTURE[1] + 2 * _BORDER + _LABEL + lines * _LINE + _GAP


def _draw(sheet: Image.Image, draw: ImageDraw.ImageDraw, sample: Shown, colour: str, corner: tuple[int, int]) -> None:
    left, top = corner
    width, bottom = _PICTURE[0] + 2 * _BORDER, top + _PICTURE[1] + 2 * _BORDER
    picture = _fitted(sample.pixels)
    # At the foot of its room, so that a row of pictures of other shapes still has its names on one line.
    edge = bottom - picture.height - 2 * _BORDER
    draw.rectangle((left, edge, left + picture.width + 2 * _BORDER - 1, bottom - 1), outline=colour, width=_BORDER)
    sheet.paste(picture, (left + _BORDER, edge + _BORDER))
    draw.rectangle((left, bottom + 5, left + 10, bottom + 15), fill=colour)
    draw.text((left + 16, bottom + 3), _cut(draw, sample.name, width - 16), _INK, _font(12, bold=True))
    ink = _FAINT if sample.text is None else _INK
    for number, line in enumerate(_wrapped(sample.text)):
        draw.text((left, bottom + _LABEL + number * _LINE), line, ink, _font(11))


def _fitted(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """The picture as large as its room allows; pixels of small ones stay visible, as the model has no more of them."""
    picture = Image.fromarray(pixels)
    factor = min(_PICTURE[0] / picture.width, _PICTURE[1] / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str | None) -> list[str]:
    if text is None:
        return ["no text"]
    return textwrap.wrap(text, 25, max_lines=_LINES, placeholder=" …") or ["(empty text)"]


def _cut(draw: ImageDraw.ImageDraw, name: str, width: int) -> str:
    """A name that fits, its start left out: names of people differ at their end."""
    name = " ".join(name.split())
    start = 0
    while (
        start < len(name) and draw.textlength(name if not start else f"…{name[start:]}", _font(12, bold=True)) > width
    ):
        start += 1
    return name if not start else f"…{name[start:]}"


@cache
def _font(size: int, *, bold: bool = False) -> Any:
    # matplotlib ships DejaVu, which has the letters of most languages; the system may have no font at all.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
