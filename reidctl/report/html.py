"""The report page: pictures as data URIs, marked sentences, and the template that puts them together."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from reidctl.report import grids

ROOM = (176, 208)
"""Largest width and height of an embedded picture; twice of what is shown, for sharp screens."""
SMALL = (72, 112)
"""The same of pictures that are shown by the hundred."""


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page.

    Attributes:
        uri: its data.
        width, height: in pixels; a page that knows them does not jump when a picture comes late.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Segment:
    """A stretch of a sentence; `number` is that of the phrase it is, None for text in between."""

    text: str
    number: int | None = None


def render(page: Mapping[str, Any]) -> str:
    """Return the page as HTML with style and script inside.

    Every value is escaped; only figures (`Markup`) are not, and they come from `figures.inline_svg`.

    Args:
        page: the values that `page.html` names; a missing one is an error.
    """
    environment = Environment(
        loader=PackageLoader("reidctl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "digest": lambda text: str(text)[:12]}
    script = _text("page.js")
    # Only this very script may run, whatever else got into the page.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    held = {"style": _text("page.css"), "script": script, "script_hash": f"sha256-{allowed}"}
    text = environment.get_template("page.html").render({**page, **held})
    # A caption may hold a NUL, HTML may not.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _text(name: str) -> Markup:
    return Markup((resources.files("reidctl.report") / name).read_text(encoding="utf-8"))


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in [0, 1] as people read it; a dash for none."""
    return grids.number(value, scale=100, digits=digits)


def embed_file(path: Path, *, small: bool = False) -> Embedded | None:
    """Return a picture file, made small enough to show; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _embed(rgb, SMALL if small else ROOM, quality=72 if small else 84)


def embed_pixels(pixels: npt.NDArray[np.uint8]) -> Embedded:
    """Return RGB pixels (H, W, 3), made small enough to show."""
    return _embed(Image.fromarray(pixels), ROOM, quality=84)


def _embed(picture: Image.Image, room: tuple[int, int], *, quality: int) -> Embedded:
    picture.thumbnail(room, Image.Resampling.LANCZOS)
    # A rendered thumbnail is smaller as PNG; a photograph is as JPEG.
    kind = "PNG" if picture.width * picture.height <= 64 * 64 else "JPEG"
    held = BytesIO()
    picture.save(held, kind, quality=quality, optimize=True)
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode('ascii')}"
    return Embedded(uri, *picture.size)


def mark_phrases(sentence: str, spans: Iterable[tuple[int, int, int]]) -> list[Segment]:
    """Return a sentence in pieces, the phrases numbered.

    Spans that are empty, lie outside the sentence or overlap an earlier one are left unmarked.

    Args:
        sentence: the text.
        spans: (start, end, number) with half-open character positions.
    """
    pieces: list[Segment] = []
    done = 0
    for start, end, number in sorted(spans):
        if start < done or end <= start or end > len(sentence):
            continue
        if start > done:
            pieces.append(Segment(sentence[done:start]))
        pieces.append(Segment(sentence[start:end], number))
        done = end
    if done < len(sentence):
        pieces.append(Segment(sentence[done:]))
    return pieces


def navigation(sections: Sequence[tuple[str, str, object]]) -> list[tuple[str, str]]:
    """Return (anchor, title) of the sections that have content."""
    return [(anchor, title) for anchor, title, content in sections if content]
