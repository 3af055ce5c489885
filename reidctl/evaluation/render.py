"""Result tables as Markdown and as LaTeX: the same numbers in the same order, every piece of text escaped.

Deterministic: nothing but the tables given decides the output. Names of datasets and people's notes are foreign text,
so none of their characters keeps a meaning in the output language.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reidctl.metrics import METRICS
from reidctl.naming import ABOUT, DIRECTIONS, RULES, label

TIES = "ties at their expected value"
"""How items with equal scores are ranked, as every caption says."""

BANNER = "NOT COMPARABLE"
"""How a note begins that must be read before the numbers: it is drawn above its table."""

# Columns whose numbers are fractions, shown in per cent. rSum is a sum of three of them.
_FRACTIONS = frozenset(
    {*METRICS, "value", "other", "difference", "low", "high", "drop", "drop_low", "drop_high", "ceiling"}
    | {"mean", "std", "minimum", "maximum", "share"}
)
# A number with its interval, in one cell: (number, low, high). The first that fits takes `low` and `high`.
_INTERVALS = (("difference", "low", "high"), ("value", "low", "high"), ("drop", "drop_low", "drop_high"))
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#!|~&$@])")
# What begins a list, a rule or a heading at the start of a line, and a link anywhere.
_BEGINNING = re.compile(r"^([-+=]|\d+(?=[.)]))")
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(?=:)|\b(www)(?=\.)")
_NUMBER = re.compile(r"[-+<]?\d[\d.,]*( \[-?[\d.]+, -?[\d.]+\])?", re.ASCII)
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "'": r"\textquoteright{}",
    "`": r"\textquoteleft{}",
    # A bracket or a star after `\\` would be its argument.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Grid:
    """A table that only needs to be drawn.

    Attributes:
        title: what the table shows.
        columns: headings.
        rows: cells as text, one per column.
        notes: sentences below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def markdown(tables: Any, *, split: str = "", notes: Sequence[str] = ()) -> str:
    """Return the tables in GitHub's Markdown: a heading, a table and its notes for each.

    Args:
        tables: the `tables` of an evaluate record, one generic table (`title`, `columns`, `rows`, `notes`), a `Grid`,
            or a sequence of the last two.
        split: which people, for the headings of an evaluate record.
        notes: sentences below the last table.
    """
    parts = [_markdown(grid) for grid in grids(tables, split=split)]
    parts += ["".join(f"- {escape_markdown(note)}\n" for note in notes)] if notes else []
    return "\n".join(parts)


def latex(tables: Any, *, split: str = "", notes: Sequence[str] = ()) -> str:
    """Return the tables as LaTeX floats for the package `booktabs`; see `markdown` for the arguments.

    Text outside ASCII is kept as it is, for engines that know the letters.
    """
    parts = [_latex(grid) for grid in grids(tables, split=split)]
    parts += [_latex_notes(notes)] if notes else []
    return "\n".join(["% \\usepackage{booktabs}\n", *parts])


def grids(tables: Any, *, split: str = "") -> list[Grid]:
    """Return what `markdown` and `latex` draw."""
    if isinstance(tables, Grid):
        return [tables]
    if not isinstance(tables, Mapping):
        return [grid for table in tables for grid in grids(table, split=split)]
    if "columns" in tables:
        return [_generic(tables)]
    return [_evaluated(facts, split) for facts in tables.values()]


def caption(facts: Mapping[str, Any], *, split: str = "") -> str:
    """Return what an evaluation counted, as one line: dataset, direction, queries, gallery, people, skipped, rules."""
    where = DIRECTIONS.get(facts["direction"], str(facts["direction"])) + (f" ({split})" if split else "")
    people = f"{facts['people']:,} people, " if "people" in facts else ""
    about = "".join(
        f"; {text}" for text in (ABOUT.get(facts.get("about", "")), RULES.get(facts.get("rule", ""))) if text
    )
    return (
        f"{facts['dataset']}, {where}: {_queries(facts['queries'])}, {facts['gallery']:,} images, {people}"
        f"{_queries(facts['skipped'])} without a match skipped{about}; {TIES}; percent, 95 % intervals over people"
    )


def _queries(count: int) -> str:
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def percent(value: float | None) -> str:
    """Return a fraction in percent with one decimal, `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return `value [low, high]` in percent; without the brackets where there is no interval."""
    known = all(number is not None and math.isfinite(number) for number in (low, high))
    return f"{percent(value)} [{percent(low)}, {percent(high)}]" if known else percent(value)


def escape_markdown(text: str) -> str:
    """Return the text on one line, with every character that Markdown could read as markup escaped."""
    return _BEGINNING.sub(lambda found: _held(found.group()), _inline(text))


def _inline(text: str) -> str:
    """As `escape_markdown`, for text that cannot begin a block, such as a cell."""
    escaped = _PUNCTUATION.sub(r"\\\1", one_line(text))
    return _LINK.sub(lambda found: f"{found.group()}\\", escaped)


def escape_latex(text: str) -> str:
    """Return the text on one line, with every character that TeX could read as a command or join to another escaped."""
    escaped = "".join(_LATEX.get(letter, letter) for letter in one_line(text))
    return re.sub(r"(?<=([-,]))\1", r"{\1}", escaped)


def one_line(text: str) -> str:
    """Return the text with line breaks and control characters as spaces, and no space at its ends or in a row."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def _held(found: str) -> str:
    """A sign that begins a list, escaped; a number is escaped at what follows it."""
    return f"{found}\\" if found.isdigit() else f"\\{found}"


def _evaluated(facts: Mapping[str, Any], split: str) -> Grid:
    found = {metric for values in facts["rows"].values() for metric in values}
    metrics = [metric for metric in METRICS if metric in found]
    metrics += sorted(found - set(metrics))
    rows = tuple(
        (label(condition), *(interval(*values[metric]) if metric in values else "-" for metric in metrics))
        for condition, values in facts["rows"].items()
    )
    return Grid(caption(facts, split=split), ("", *metrics), rows)


def _generic(table: Mapping[str, Any]) -> Grid:
    columns = [str(column) for column in table["columns"]]
    place = {column: number for number, column in enumerate(columns)}
    ends: dict[int, tuple[int, int]] = {}
    for number, low, high in _INTERVALS:
        taken = {at for pair in ends.values() for at in pair}
        if {number, low, high} <= set(place) and place[low] not in taken:
            ends[place[number]] = (place[low], place[high])
    hidden = {at for pair in ends.values() for at in pair}
    shown = [at for at in range(len(columns)) if at not in hidden]
    rows = [[row.get(name) for name in columns] if isinstance(row, Mapping) else list(row) for row in table["rows"]]
    assert all(len(row) == len(columns) for row in rows), "a row has one cell per column"
    cells = tuple(
        tuple(
            interval(row[at], *(row[end] for end in ends[at])) if at in ends else _cell(row[at], columns[at])
            for at in shown
        )
        for row in rows
    )
    notes = tuple(str(note) for note in table.get("notes", ()))
    return Grid(str(table.get("title", "")), tuple(columns[at] for at in shown), cells, notes)


def _cell(value: Any, column: str) -> str:
    if isinstance(value, (list, tuple)) and len(value) == 3:
        return interval(*value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value, column)
    return label(str(value)) if column == "condition" else str(value)


def _number(value: float, column: str) -> str:
    if not math.isfinite(value):
        return "-"
    if column == "p_value":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if column in _FRACTIONS:
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _markdown(grid: Grid) -> str:
    lines = [f"### {escape_markdown(grid.title)}", ""] if grid.title else []
    lines += [line for note in grid.notes if note.startswith(BANNER) for line in (f"**{escape_markdown(note)}**", "")]
    if grid.rows:
        lines.append("| " + " | ".join(_inline(column) for column in grid.columns) + " |")
        lines.append("|" + "|".join("---:" if number else "---" for number in _numeric(grid)) + "|")
        lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in grid.rows]
        lines.append("")
    lines += [f"- {escape_markdown(note)}" for note in grid.notes if not note.startswith(BANNER)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_cell(cell: str) -> str:
    return cell if cell == "-" or (_NUMBER.fullmatch(cell) and "<" not in cell) else _inline(cell)


def _latex(grid: Grid) -> str:
    layout = "".join("r" if number else "l" for number in _numeric(grid))
    body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in grid.rows]
    head = " & ".join(escape_latex(column) for column in grid.columns) + r" \\"
    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{escape_latex(grid.title)}.}}"] if grid.title else []),
        *[rf"\par\textbf{{{escape_latex(note)}}}\par" for note in grid.notes if note.startswith(BANNER)],
        rf"\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *[rf"\par {escape_latex(note)}" for note in grid.notes if not note.startswith(BANNER)],
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: str) -> str:
    if not _NUMBER.fullmatch(cell):
        return escape_latex(cell)
    return re.sub(r"-(?=\d)", "$-$", cell).replace("<", "$<$")


def _latex_notes(notes: Sequence[str]) -> str:
    items = [rf"\item {escape_latex(note)}" for note in notes]
    return "\n".join([r"\begin{itemize}", *items, r"\end{itemize}"]) + "\n"


def _numeric(grid: Grid) -> list[bool]:
    """Which columns hold numbers alone: they stand right."""
    empty = ("", "-")
    columns = list(zip(*grid.rows, strict=True)) if grid.rows else [() for _ in grid.columns]
    return [bool(cells) and all(cell in empty or _NUMBER.fullmatch(cell) for cell in cells) for cells in columns]
