"""Tables of the page: numbers with intervals as texts, in a form that one template draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A cell.

    Attributes:
        text: the number or the words.
        below: lines under it, smaller: an interval, a control, a verdict.
    """

    text: str
    below: tuple[str, ...] = ()


NOTHING = Entry("–")


@dataclass(frozen=True)
class Line:
    """A row.

    Attributes:
        name: its heading.
        entries: one per column.
        strong: whether it is the row that the table is about.
    """

    name: str
    entries: tuple[Entry, ...]
    strong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: what it shows.
        corner: heading of the rows' names.
        columns: headings.
        lines: rows.
        notes: sentences below.
        worded: whether the cells hold words, which are set flush left and may wrap.
    """

    caption: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    worded: bool = False

    def __post_init__(self) -> None:
        assert all(len(line.entries) == len(self.columns) for line in self.lines), self.caption


def known(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, *, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """Return a number as people read it, with a true minus; a dash for none.

    Args:
        value: the number.
        scale: 100 for percent.
        digits: after the point.
        signed: whether a positive number has its sign too.
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{scale * value:{'+' if signed else ''},.{digits}f}"
    # What rounds to nothing has no sign.
    text = text.lstrip("+-") if not text.strip("+-0.,") else text
    return text.replace("-", "\N{MINUS SIGN}")


def spread(low: float | None, high: float | None, *, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """Return an interval as people read it; empty where a bound is missing."""
    if not (known(low) and known(high)):
        return ""
    bounds = (number(bound, scale=scale, digits=digits, signed=signed) for bound in (low, high))
    return " to ".join(bounds)


def p_text(value: float | None) -> str:
    """Return a p-value as people read it; empty for none. A p-value is never 0."""
    if value is None or not math.isfinite(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def measured(
    values: Sequence[float | None],
    *,
    scale: float = 1.0,
    digits: int = 1,
    signed: bool = False,
    after: Sequence[str] = (),
) -> Entry:
    """Return a cell of (value, low, high), the last two of which may be missing.

    Args:
        values: one to three numbers.
        scale: 100 for percent.
        digits: after the point.
        signed: whether positive numbers have a sign.
        after: lines under the interval; empty ones are left out.
    """
    value, low, high = (*values, None, None)[:3]
    if not known(value):
        return NOTHING
    below = (spread(low, high, scale=scale, digits=digits, signed=signed), *after)
    text = number(value, scale=scale, digits=digits, signed=signed)
    return Entry(text, tuple(line for line in below if line))
