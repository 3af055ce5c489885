"""The report page: pictures as data URIs, marked sentences, and the template that puts them together."""

import base64
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

ROOM = (176, 208)
"""Largest width and height of an embedded picture; twice of what is shown, for sharp screens."""


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
    text = environment.get_template("page.html").render(
        {**page, "style": _text("page.css"), "script": _text("page.js")}
    )
    # A caption may hold a NUL, HTML may not.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _text(name: str) -> Markup:
    return Markup((resources.files("reidctl.report") / name).read_text(encoding="utf-8"))


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in [0, 1] as people read it; a dash for none."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}"


def picture_uri(path: Path) -> str | None:
    """Return a picture file, made small enough to show, as a data URI; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _uri(rgb)


def pixels_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return RGB pixels (H, W, 3), made small enough to show, as a data URI."""
    return _uri(Image.fromarray(pixels))


def _uri(picture: Image.Image) -> str:
    picture.thumbnail(ROOM, Image.Resampling.LANCZOS)
    # A rendered thumbnail is smaller as PNG; a photograph is as JPEG.
    kind = "PNG" if picture.width * picture.height <= 64 * 64 else "JPEG"
    held = BytesIO()
    picture.save(held, kind, quality=84, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode('ascii')}"


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
