"""Logging and progress, all on stderr, so that stdout carries results alone."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("reidctl")

_PLAIN_INTERVAL_S = 10.0


def configure(*, quiet: bool = False) -> None:
    """Send the package's log lines to stderr; `quiet` keeps warnings and errors only.

    Called by the command line once per process. A library user configures `logging` instead.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "images") -> Iterator[Callable[..., None]]:
    """Show how far a long task is, its rate and the time left; yields `advance(n=1, note="")`.

    A note (`$1.20 of $5.00`) replaces the last one.

    A terminal gets a live bar; a pipe or a log file gets one line every ten seconds and a last one.
    `--quiet` shows nothing.
    """
    from rich.console import Console

    if not log.isEnabledFor(logging.INFO):
        yield lambda n=1, note="": None
    elif Console(stderr=True).is_terminal:
        with _bar(description, total, unit) as advance:
            yield advance
    else:
        meter = _PlainMeter(description, total, unit)
        yield meter.advance
        meter.report(final=True)


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(description, total=total, rate="", note="")
        started = time.monotonic()
        done = 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:,.1f} {unit}/s")
            if note:
                bar.update(task, note=note)

        yield advance


class _PlainMeter:
    """Progress lines for logs: at most one every ten seconds, and the last."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.note = ""
        self.started = self.reported = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if time.monotonic() - self.reported >= _PLAIN_INTERVAL_S:
            self.report()

    def report(self, *, final: bool = False) -> None:
        self.reported = time.monotonic()
        seconds = max(self.reported - self.started, 1e-9)
        rate = self.done / seconds
        line = f"{self.description}: {self.done}"
        if self.total is not None:
            line += f"/{self.total}"
        line += f" {self.unit}, {rate:,.1f} {self.unit}/s"
        if final:
            line += f", {seconds:.1f} s"
        elif self.total is not None and rate > 0:
            line += f", {max(self.total - self.done, 0) / rate:.0f} s left"
        log.info(f"{line}, {self.note}" if self.note else line)
