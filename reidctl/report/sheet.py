"""Ranked lists as a picture: the query on the left, results in order, right and wrong marked by colour and symbol."""

import textwrap
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from reidctl import tables
from reidctl.errors import DataError

RIGHT, WRONG, UNKNOWN = "#00705a", "#b3400a", "#767676"
"""Bluish green, vermilion and grey (after Okabe and Ito), dark enough for white symbols on them."""

_PICTURE = (112, 224)  # width, height of the room for one picture
_BORDER, _GAP, _TEXT = 5, 12, 62
_QUERY_WIDTH = 210
_INK, _FAINT, _PAPER = "#1a1a1a", "#5c5c5c", "#ffffff"


class SheetItem(NamedTuple):
    """One result; a plain tuple in this order will do.

    Attributes:
        path: the image file; one that cannot be read becomes a grey placeholder.
        caption: a short line below it, for instance the image or person id.
        score: the similarity.
        match: whether it shows the right person; None if nobody knows.
    """

    path: Path
    caption: str
    score: float
    match: bool | None = None


Item = tuple[Path, str, float, bool | None]


def ranking_sheet(query: str | Path, results: Sequence[Item], out: Path, *, columns: int = 10) -> None:
    """Write a PNG of one query and its ranked results.

    Args:
        query: the text, or the file of the query image.
        results: best first, each (image file, caption line, score, right person?), see `SheetItem`.
        out: the PNG file.
        columns: results per line.

    Raises:
        DataError: the file cannot be written.
    """
    contact_sheet([(query, results)], out, columns=columns)


def contact_sheet(rows: Sequence[tuple[str | Path, Sequence[Item]]], out: Path, *, columns: int = 10) -> None:
    """Write a PNG of several queries, one below the other, each with its ranked results.

    Args:
        rows: (query text or image file, results best first).
        out: the PNG file.
        columns: results per line; longer lists go on in the next line.

    Raises:
        DataError: there is nothing to draw, or the file cannot be written.
    """
    if not rows:
        raise DataError("There is no ranked list to draw.")
    widest = min(columns, max(len(results) for _, results in rows))
    cell_w, cell_h = _PICTURE[0] + 2 * _BORDER + _GAP, _PICTURE[1] + 2 * _BORDER + _TEXT
    lines = [max(1, -(-len(results) // columns)) for _, results in rows]
    width = _QUERY_WIDTH + max(widest, 1) * cell_w + 2 * _GAP
    known = any(item[3] is not None for _, results in rows for item in results)
    height = sum(lines) * cell_h + len(rows) * _GAP + _GAP + (30 if known else 0)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for (query, results), count in zip(rows, lines, strict=True):
        _draw_query(sheet, draw, query, top)
        for place, item in enumerate(results):
            left = _QUERY_WIDTH + _GAP + (place % columns) * cell_w
            _draw_item(sheet, draw, SheetItem(*item), place + 1, (left, top + (place // columns) * cell_h))
        top += count * cell_h + _GAP
    if known:
        _draw_legend(draw, (_GAP, top))
    drawn = BytesIO()
    sheet.save(drawn, "PNG", optimize=True)
    tables.write_bytes(out, drawn.getvalue())


def _draw_query(sheet: Image.Image, draw: ImageDraw.ImageDraw, query: str | Path, top: int) -> None:
    draw.text((_GAP, top), "QUERY", _FAINT, _font(11, bold=True))
    if isinstance(query, Path):
        sheet.paste(_thumbnail(query), (_GAP, top + 20))
        return
    lines = textwrap.wrap(query, 27, max_lines=14, placeholder=" …")
    draw.multiline_text((_GAP, top + 20), "\n".join(lines), _INK, _font(13), spacing=4)


def _draw_item(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, item: SheetItem, rank: int, corner: tuple[int, int]
) -> None:
    left, top = corner
    colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[item.match]
    right, bottom = left + _PICTURE[0] + 2 * _BORDER, top + _PICTURE[1] + 2 * _BORDER
    draw.rectangle((left, top, right - 1, bottom - 1), fill="#ececec", outline=colour, width=_BORDER)
    picture = _thumbnail(item.path)
    place = left + (right - left - picture.width) // 2, top + (bottom - top - picture.height) // 2
    sheet.paste(picture, place)
    if item.match is not None:
        _draw_mark(draw, item.match, colour, (right - 27, top + 3))
    draw.text((left, bottom + 4), f"{rank}.", _INK, _font(14, bold=True))
    draw.text((right, bottom + 5), f"{item.score:.3f}", _INK, _font(13), anchor="ra")
    lines = textwrap.wrap(item.caption, 17, max_lines=2, placeholder="…", break_on_hyphens=False)
    draw.multiline_text((left, bottom + 24), "\n".join(lines), _FAINT, _font(11), spacing=2)


def _draw_mark(draw: ImageDraw.ImageDraw, match: bool, colour: str, corner: tuple[int, int]) -> None:
    """A white check or cross on a disc: the form says the same as the colour."""
    x, y = corner
    draw.ellipse((x, y, x + 23, y + 23), fill=colour, outline="white", width=2)
    if match:
        draw.line((x + 6, y + 12, x + 10, y + 17, x + 18, y + 7), fill="white", width=3, joint="curve")
        return
    draw.line((x + 7, y + 7, x + 16, y + 16), fill="white", width=3)
    draw.line((x + 7, y + 16, x + 16, y + 7), fill="white", width=3)


def _draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    x, y = corner
    for match, colour, text in ((True, RIGHT, "right person"), (False, WRONG, "wrong person")):
        _draw_mark(draw, match, colour, (x, y - 4))
        draw.text((x + 30, y), text, _INK, _font(12))
        x += 140


def _thumbnail(path: Path) -> Image.Image:
    """The picture fitted into its room, small ones enlarged; grey if it cannot be read."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        missing = Image.new("RGB", _PICTURE, "#d0d0d0")
        ImageDraw.Draw(missing).text((_PICTURE[0] // 2, _PICTURE[1] // 2), "unreadable", _INK, _font(12), anchor="mm")
        return missing
    factor = min(_PICTURE[0] / rgb.width, _PICTURE[1] / rgb.height)
    size = max(1, round(rgb.width * factor)), max(1, round(rgb.height * factor))
    return rgb.resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu, which has the letters of most languages; the system may have no font at all.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
