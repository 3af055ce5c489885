"""Replies of ended batches, on this disk until the run has stored them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.backends.batch_state import Batch, BatchState
from reidctl.captioning.backends.chat import parse_completion
from reidctl.console import log
from reidctl.errors import DataError

# A reply is a few kilobytes; a line beyond this is not one, and must not fill the memory.
_LINE_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class Place:
    """Where a reply lies: the submission, and the line's bytes in its file."""

    batch: str
    offset: int
    length: int


def index_replies(path: Path, batch: Batch, *, usable_only: bool = False, quiet: bool = False) -> dict[str, Place]:
    """Return where the reply to each custom id lies; the first one counts.

    Lines that are no reply, answer nothing that was asked, or answer it again are counted in one warning.

    Args:
        path: of the downloaded lines.
        batch: what was asked.
        usable_only: leave out errors.
        quiet: no warning.
    """
    asked = set(batch.custom_ids)
    found: dict[str, Place] = {}
    strange = {"malformed": 0, "unknown": 0, "duplicate": 0}
    for offset, line in _lines(path):
        row = parse_line(line)
        if row is None:
            strange["malformed"] += 1
        elif _never_ran(row):
            continue
        elif row["custom_id"] not in asked:
            strange["unknown"] += 1
        elif row["custom_id"] in found:
            strange["duplicate"] += 1
        elif not usable_only or answer_body(row) is not None:
            found[row["custom_id"]] = Place(batch.id, offset, len(line))
    if any(strange.values()) and not quiet:
        told = ", ".join(f"{count} {name}" for name, count in strange.items() if count)
        log.warning("caption: batch %s: lines that answer nothing are left out: %s", batch.batch_id, told)
    return found


def is_whole(path: Path, at_least: int) -> bool:
    """Return whether a download has so many lines and does not break off within one."""
    count, last = 0, b"{}"
    for _, line in _lines(path):
        count, last = count + 1, line
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return False
    return count >= at_least


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        offset = 0
        while line := stream.readline(_LINE_LIMIT):
            if line.strip():
                yield offset, line
            offset += len(line)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return an output line as an object with a `custom_id` and a `response` or an `error`; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return None
    good = isinstance(row.get("response"), dict) or row.get("error") is not None
    return row if good else None


def _never_ran(row: dict[str, Any]) -> bool:
    """Whether the line only says that the batch ended before it came to the request."""
    error = row.get("error")
    return isinstance(error, dict) and error.get("code") in ("batch_expired", "batch_cancelled")


def answer_body(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the completion in an output line; None if it holds an error."""
    response = row.get("response")
    if row.get("error") is not None or not isinstance(response, dict) or response.get("status_code") != 200:
        return None
    body = response.get("body")
    return body if isinstance(body, dict) else None


class Shelf:
    """Replies by custom id: where they lie, or why there is none. A file goes when the run has stored all it holds.

    Args:
        state: of the folder.
        redact: takes keys out of what the service says.
    """

    def __init__(self, state: BatchState, redact: Callable[[str], str]) -> None:
        self._state, self._redact = state, redact
        self._places: dict[str, Place | str] = {}
        self._left: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def load(self) -> None:
        """Take up what earlier runs fetched and left."""
        for batch in self._state.in_phase("downloaded", "aside"):
            path = self._state.replies_path(batch)
            if not path.is_file():
                log.warning("caption: %s is gone; its requests are asked again where they are wanted", path)
                self._state.note(batch, "fetched")
                continue
            # An error that was put aside was told once already: the request may be sent again.
            self.add(batch, index_replies(path, batch, usable_only=batch.phase == "aside", quiet=True))

    def add(self, batch: Batch, found: dict[str, Place]) -> None:
        """Take in the replies of a downloaded batch."""
        self._places |= found
        self._left[batch.id] = len(found)
        self._close_if_empty(batch)

    def explain(self, name: str, reason: str) -> None:
        """Note why a request has no reply; it is told once."""
        self._places[name] = reason

    def left(self, batch: Batch) -> int:
        """Return how many replies of a batch nobody asked for."""
        return self._left[batch.id]

    def reply(self, name: str, request: Request) -> Reply | None:
        """Return the reply; None for one that was put aside and turns out to be none, so that it is asked again."""
        place = self._places[name]
        if isinstance(place, str):
            return failed(request, place)
        batch = self._state.batches[place.batch]
        row = _read_row(self._state.replies_path(batch), place)
        body = answer_body(row)
        if body is None:
            return failed(request, self._redact(_problem(row)))
        try:
            return parse_completion(body, request, structured=batch.structured)
        except ValueError as error:
            problem = self._redact(str(error))
        if batch.phase == "aside":
            self.done(name)
            return None
        return failed(request, f"the reply is no completion: {problem}")

    def done(self, name: str) -> None:
        """Forget a reply: the run asked for the next one, so it has stored this one."""
        place = self._places.pop(name)
        if isinstance(place, Place):
            self._left[place.batch] -= 1
            self._close_if_empty(self._state.batches[place.batch])

    def _close_if_empty(self, batch: Batch) -> None:
        if self._left[batch.id] <= 0:
            os.sync()  # the run's own file reaches the disk before ours goes
            self._state.note(batch, "fetched")
            self._state.replies_path(batch).unlink(missing_ok=True)


def _read_row(path: Path, place: Place) -> dict[str, Any]:
    with path.open("rb") as stream:
        row = parse_line(os.pread(stream.fileno(), place.length, place.offset))
    if row is None:
        raise DataError(f"{path} changed while it was being read.", hint="Run the stage again.")
    return row


def _problem(row: dict[str, Any]) -> str:
    """What an output line with an error says."""
    response = row.get("response")
    status, body = (response.get("status_code"), response.get("body")) if isinstance(response, dict) else (None, None)
    error = row.get("error") or (body.get("error") if isinstance(body, dict) else None) or body
    detail = (error.get("message") or error.get("code")) if isinstance(error, dict) else error
    return f"the service answered {status}: {detail}" if status is not None else f"the request failed: {detail}"
