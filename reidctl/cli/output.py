"""What goes to stdout: a short table for people or one JSON object for programs, and nothing else."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ClosedPipe(Exception):
    """The reader of stdout went away (`reidctl ... | head`)."""


_UNLIMITED = 10_000
"""Columns of a table in a pipe: it is as wide as it needs to be, so that a program finds every row on one line."""

_UNFINISHED = {
    "pending": "pending",
    "part": "one part",
    "dry-run": "dry run",
    "trial": "trial",
    "cancelled": "cancelled",
    "budget": "stopped",
}
"""Statuses of a stage that did not finish, as people read them."""

_INTERNAL = ("settings", "inputs", "fingerprint", "libraries", "machine", "command", "format")

KEYS = ("stage", "status", "run", "outputs", "metrics", "seconds")


def write(lines: Sequence[str]) -> None:
    """Write lines to stdout and flush.

    Raises:
        ClosedPipe: nobody reads any more. Typer would turn a BrokenPipeError into exit code 1.
    """
    try:
        sys.stdout.write("".join(line + "\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def emit(record: Mapping[str, Any], *, run: Path, as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print the result of a stage.

    Args:
        record: what the stage returned; must hold `stage`, `status`, `outputs`, `metrics`, `seconds`.
        run: the run directory.
        as_json: one object with the documented keys instead of text.
        lines: the text for people.
    """
    if as_json:
        shown = {**record, "run": str(run), "outputs": list(record.get("outputs", {}))}
        write([json.dumps(_strict(public(shown)), default=str)])
        return
    if record["status"] == "up-to-date":
        done = "up to date"
    else:
        done = f"{_UNFINISHED.get(record['status'], 'done')} in {record['seconds']:.1f} s"
    write([*lines, f"{record['stage']}: {done}"])


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--json` shows of a stage's record: what is needed to run it again stays in `stage.json`."""
    return {name: value for name, value in record.items() if name not in _INTERNAL}


def _strict(value: Any) -> Any:
    """The value with NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> list[str]:
    """Return a table as lines of plain text, drawn by rich; only a terminal's width makes cells wrap."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for number, heading in enumerate(headings):
        # The first column says what a row is: it is never shortened.
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=not number, overflow="fold")
        if not number:
            drawn.columns[0].min_width = max([len(heading), *(len(row[0]) for row in rows)])
    for row in rows:
        # Text, not str: a caption in square brackets must not be read as markup.
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _UNLIMITED, file=sys.stdout, highlight=False)
    with console.capture() as held:
        console.print(drawn)
    return [*([printable(title)] if title else []), *(line.rstrip() for line in held.get().rstrip("\n").split("\n"))]


def printable(text: str) -> str:
    """Return the text with control characters escaped: a file name must not steer the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def percent(value: float | None) -> str:
    """Return a fraction in [0, 1] as people read it: percent with one decimal."""
    return "-" if value is None or value != value else f"{100 * value:.1f}"
