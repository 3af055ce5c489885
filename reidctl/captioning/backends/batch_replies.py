"""Replies of ended batches, on this disk until the run has stored them."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.batch_service import BatchService
from reidctl.captioning.backends.batch_state import Batch, BatchState, key_id, known_batches, replies_path
from reidctl.captioning.backends.chat import parse_completion
from reidctl.console import log
from reidctl.errors import DataError, RemoteError

if TYPE_CHECKING:
    from openai.types import Batch as RemoteBatch

# A reply is a few kilobytes; a line beyond this is not one, and must not fill the memory.
_LINE_LIMIT = 16 * 1024 * 1024
_DOWNLOADS = 3
_PARTS = "parts/replies-*.jsonl"
_ANYONE = Request("", "", "", "", "", "")


@dataclass(frozen=True)
class Place:
    """Where a reply lies: the submission, and the line's bytes in its file."""

    batch: str
    offset: int
    length: int


def known_requests(folder: Path) -> frozenset[str]:
    """Return the custom ids of all requests that are with the provider, or whose reply lies here.

    What a batch that ended brought no reply to is not among them: to ask for it again costs again.

    Raises:
        DataError: the state file is damaged.
    """
    names: set[str] = set()
    for batch in known_batches(folder):
        path = replies_path(folder, batch)
        if batch.is_open:
            names.update(batch.custom_ids)
        elif batch.phase in ("downloaded", "aside") and path.is_file():
            names.update(_kept(path, batch))
    return frozenset(names)


def _kept(path: Path, batch: Batch) -> dict[str, Place]:
    """What an earlier run fetched and left. An error that was put aside is left out: the request may be sent again."""
    return index_replies(path, batch, usable_only=batch.phase == "aside", quiet=True)


def index_replies(path: Path, batch: Batch, *, usable_only: bool = False, quiet: bool = False) -> dict[str, Place]:
    """Return where the reply to each custom id lies; the first one counts.

    Lines that are no reply, answer nothing that was asked, or answer it again are counted in one warning.

    Args:
        path: of the downloaded lines.
        batch: what was asked.
        usable_only: leave out what would be a failed reply.
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
        elif not usable_only or _is_usable(row, batch):
            found[row["custom_id"]] = Place(batch.id, offset, len(line))
    if any(strange.values()) and not quiet:
        told = ", ".join(f"{count} {name}" for name, count in strange.items() if count)
        log.warning("caption: batch %s: lines that answer nothing are left out: %s", batch.batch_id, told)
    return found


def download(
    batch: Batch, remote: "RemoteBatch", state: BatchState, service: BatchService, backoff_s: float
) -> dict[str, Place]:
    """Bring the replies of an ended batch to this disk and return where each lies.

    A download that is cut is tried again a few times, with pauses from `backoff_s` on.

    Raises:
        RemoteError: fewer lines than the provider counts, or none that answers anything; they stay there.
    """
    part = state.folder / f"batch-{batch.id}.part"
    done = (remote.request_counts.completed or 0) if remote.request_counts else 0
    lines = 0
    for tries in range(_DOWNLOADS):
        if not _bring(batch, remote, service, part):
            done = 0
        lines, is_whole = _count_lines(part)
        if is_whole and lines >= done:
            break
        log.info("caption: batch %s: the download is incomplete (try %d)", batch.batch_id, tries + 1)
        time.sleep(backoff_s * 2**tries)
    found = index_replies(part, batch) if lines >= done else {}
    if done and not found:
        what = f"{lines} of {done} replies" if lines < done else "nothing that is a reply"
        raise RemoteError(
            f"Of batch {batch.batch_id} the service sends {what}.",
            hint="They stay with the provider; run it again later.",
        )
    state.keep_replies(batch, part)
    return found


def _bring(batch: Batch, remote: "RemoteBatch", service: BatchService, part: Path) -> bool:
    """Write the files of a batch into one; False if the provider no longer has one of them."""
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    is_there = True
    for file_id in filter(None, (remote.output_file_id, remote.error_file_id)):
        try:
            service.download(file_id, part)
        except FileNotFoundError:
            log.warning("caption: batch %s: the provider no longer has a file of it", batch.batch_id)
            is_there = False
        with part.open("ab") as stream:
            stream.write(b"\n")  # the two files must not share a line
    return is_there


def _count_lines(path: Path) -> tuple[int, bool]:
    """How many lines a download has, and whether the last one is whole."""
    count, last = 0, b"{}"
    for _, line in _lines(path):
        count, last = count + 1, line
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return count, False
    return count, True


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


def _is_usable(row: dict[str, Any], batch: Batch) -> bool:
    """Whether the line holds an answer of the model: a text, or a refusal."""
    body = answer_body(row)
    try:
        return _is_filtered(row) if body is None else bool(parse_completion(body, _ANYONE, structured=batch.structured))
    except ValueError:
        return False


def _is_filtered(row: dict[str, Any]) -> bool:
    """Whether the provider's content filter took the answer's place; asked one at a time, that is a refusal too."""
    error = _error(row)[1]
    return isinstance(error, dict) and error.get("code") in ("content_filter", "content_policy_violation")


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


@dataclass(frozen=True)
class _Reason:
    """Why there is no reply."""

    text: str
    own_fault: bool


class Shelf:
    """Replies by custom id: where they lie, or why there is none. A file goes when the run has stored all it holds.

    Args:
        state: of the folder.
        redact: takes keys out of what the service says.
    """

    def __init__(self, state: BatchState, redact: Callable[[str], str]) -> None:
        self._state, self._redact = state, redact
        self._places: dict[str, Place | _Reason] = {}
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
            self.add(batch, _kept(path, batch))

    def add(self, batch: Batch, found: dict[str, Place]) -> None:
        """Take in the replies of a downloaded batch."""
        self._places |= found
        self._left[batch.id] = len(found)
        self._close_if_empty(batch)

    def explain(self, name: str, reason: str, *, own_fault: bool = False) -> None:
        """Note why a request has no reply; it is told once.

        Args:
            name: custom id.
            reason: what the failed reply says.
            own_fault: see `Reply.own_fault`.
        """
        self._places[name] = _Reason(reason, own_fault)

    def left(self, batch: Batch) -> int:
        """Return how many replies of a batch nobody asked for."""
        return self._left[batch.id]

    def reply(self, name: str, request: Request) -> Reply:
        """Return the reply."""
        place = self._places[name]
        if isinstance(place, _Reason):
            return failed(request, place.text, own_fault=place.own_fault)
        batch = self._state.batches[place.batch]
        row = _read_row(self._state.replies_path(batch), place)
        body = answer_body(row)
        if body is None and _is_filtered(row):
            return rejected(request, "the model refused")
        if body is None:
            return failed(request, self._redact(_problem(row)), own_fault=_is_own_fault(row))
        try:
            return parse_completion(body, request, structured=batch.structured)
        except ValueError as error:
            return failed(request, f"the reply is no completion: {self._redact(str(error))}")

    def done(self, name: str) -> None:
        """Forget a reply: the run asked for the next one, so it has stored this one."""
        place = self._places.pop(name)
        if isinstance(place, Place):
            self._left[place.batch] -= 1
            self._close_if_empty(self._state.batches[place.batch])

    def forget_stored(self, batches: Collection[Batch]) -> None:
        """Drop the replies of these batches that the run's journal has: a kill came before we could forget them."""
        chosen = {batch.id for batch in batches}
        left = {name for name, place in self._places.items() if isinstance(place, Place) and place.batch in chosen}
        for name in _stored(self._state.folder, left) if left else ():
            self.done(name)

    def _close_if_empty(self, batch: Batch) -> None:
        if self._left[batch.id] <= 0:
            _sync_journal(self._state.folder)  # the run's own file reaches the disk before ours goes
            self._state.note(batch, "fetched")
            self._state.replies_path(batch).unlink(missing_ok=True)


def _read_row(path: Path, place: Place) -> dict[str, Any]:
    with path.open("rb") as stream:
        row = parse_line(os.pread(stream.fileno(), place.length, place.offset))
    if row is None:
        raise DataError(f"{path} changed while it was being read.", hint="Run the stage again.")
    return row


def _sync_journal(folder: Path) -> None:
    """Bring the run's parts to the disk; other files, and other disks, are not waited for."""
    for path in folder.glob(_PARTS):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _stored(folder: Path, names: Collection[str]) -> set[str]:
    """Those custom ids whose answer is in the run's parts; a failed attempt is no answer."""
    found = set()
    for path in sorted(folder.glob(_PARTS)):
        with path.open("rb") as stream:
            for line in stream:
                if (name := _entry_id(line)) in names:
                    found.add(name)
    return found


def _entry_id(line: bytes) -> str:
    """The custom id of the request that a line of a part answers; empty where it answers none."""
    try:
        row = json.loads(line)
        key = (row["image_id"], row["image_version"], row["kind"], row["prompt_sha256"])
        return "" if row["status"] == "failed" else key_id(key, row["attempt"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _error(row: dict[str, Any]) -> tuple[Any, Any]:
    """The status and the error in an output line without a completion."""
    response = row.get("response")
    status, body = (response.get("status_code"), response.get("body")) if isinstance(response, dict) else (None, None)
    return status, row.get("error") or (body.get("error") if isinstance(body, dict) else None) or body


def _is_own_fault(row: dict[str, Any]) -> bool:
    status = _error(row)[0]
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429)


def _problem(row: dict[str, Any]) -> str:
    """What an output line with an error says."""
    status, error = _error(row)
    detail = (error.get("message") or error.get("code")) if isinstance(error, dict) else error
    return f"the service answered {status}: {detail}" if status is not None else f"the request failed: {detail}"
