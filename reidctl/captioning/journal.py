"""Replies on disk as they come: append-only JSON lines that a kill at any moment leaves readable."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from reidctl.captioning.backends.base import Key
from reidctl.console import log
from reidctl.errors import DataError

_SYNC_EVERY = 32
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """One stored reply.

    Attributes:
        image_id, image_version, kind, prompt_sha256: what was asked; the key.
        attempt: 1 for the first.
        status: `ok`, `rejected` (checked and refused for good), `retry` (refused, to be asked again), `failed`.
        text: as checked; for `rejected` and `retry` what was refused. Never markup, never a path: text.
        reason: why it is not ok.
        tokens_in, tokens_out: of this reply.
        coverage, clothing_words: from the checks.
    """

    image_id: str
    image_version: str
    kind: str
    prompt_sha256: str
    attempt: int
    status: str
    text: str | None
    reason: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    coverage: float | None = None
    clothing_words: int = 0

    @property
    def key(self) -> Key:
        """See `Request.key`."""
        return self.image_id, self.image_version, self.kind, self.prompt_sha256

    @property
    def final(self) -> bool:
        """Whether it is never asked again; a failed one is, by the next run."""
        return self.status in ("ok", "rejected")


class Journal:
    """The part files of a folder, and this process's own part open for appending.

    A line is handed to the system at once (a killed process loses none) and synced every second (a power cut loses
    little). A last line without its end is cut off when the part is opened.

    Args:
        folder: of the parts `replies-*.jsonl`; all are read.
        part: name of the part this process writes.

    Raises:
        DataError: another process writes this part, or the folder cannot be written.
    """

    def __init__(self, folder: Path, part: str = "replies-000.jsonl") -> None:
        self._path = folder / part
        self._folder = folder
        self._stream: BinaryIO | None = None
        self._unsynced = 0
        self._synced_at = 0.0
        self.entries: dict[Key, Entry] = {}
        self.tokens_in = 0
        self.tokens_out = 0

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("ab+", buffering=0)
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.") from None
        assert self._stream is not None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise DataError(f"Another process is writing {self._path}.", hint="Wait for it to finish.") from None
        _cut_unfinished_line(self._stream)
        for entry in _read_parts(self._folder):
            self._keep(entry)
        return self

    def append(self, entry: Entry) -> None:
        """Store a reply."""
        assert self._stream is not None, "Journal is used as a context manager"
        line = json.dumps(asdict(entry)).encode("ascii") + b"\n"
        try:
            # An unbuffered write may be short (disk nearly full); the rest must follow or fail.
            while line:
                line = line[self._stream.write(line) :]
            self._unsynced += 1
            if self._unsynced >= _SYNC_EVERY or time.monotonic() - self._synced_at > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.", hint="Is the disk full?") from None
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self.tokens_in += entry.tokens_in
        self.tokens_out += entry.tokens_out
        known = self.entries.get(entry.key)
        if known is None or not known.final:
            self.entries[entry.key] = entry

    def _sync(self) -> None:
        assert self._stream is not None
        os.fsync(self._stream.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        self._sync()
        self._stream.close()


def _cut_unfinished_line(stream: BinaryIO) -> None:
    size = stream.seek(0, os.SEEK_END)
    end = size
    while end:
        start = max(0, end - 65536)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        log.warning("caption: the last stored reply was cut short by a kill and is asked again")
        stream.truncate(end)


def _read_parts(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("replies-*.jsonl")):
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield Entry(**json.loads(line))
                except (ValueError, TypeError):
                    # Another process may be writing its part: its last line is not an error.
                    log.warning("caption: %s line %d is not a stored reply and is left out", path, number)
