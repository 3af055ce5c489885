"""Replies on disk as they come: append-only JSON lines that a kill at any moment leaves readable."""

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from reidctl.captioning.backends.base import Key
from reidctl.console import log
from reidctl.errors import DataError

_SYNC_EVERY = 32
_SYNC_SECONDS = 1.0
_FINAL = ("ok", "rejected")


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
        codes: names of the checks that failed, for counting.
        checks: digest of the check settings that judged the text; with other settings it is judged again, not asked.
        model: who wrote it, for the price.
        batch: whether it came at the batch price.
        time: seconds since 1970 when it was stored; the parts of several machines are put in order by it.
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
    codes: tuple[str, ...] = ()
    checks: str = ""
    model: str = ""
    batch: bool = False
    time: float = 0.0

    @property
    def key(self) -> Key:
        """See `Request.key`."""
        return self.image_id, self.image_version, self.kind, self.prompt_sha256

    @property
    def final(self) -> bool:
        """Whether it is never asked again; a failed one is, by the next run."""
        return self.status in _FINAL


class Slot(NamedTuple):
    """Where the entry that counts for a key lies, and what decides whether it is asked again.

    Attributes:
        part, offset, length: number of the part file, and the line's bytes in it.
        status, attempt: of the entry.
        stale: judged under other check settings than today's.
        time: see `Entry`.
    """

    part: int
    offset: int
    length: int
    status: str
    attempt: int
    stale: bool
    time: float

    @property
    def final(self) -> bool:
        """See `Entry.final`."""
        return self.status in _FINAL


class Usage(NamedTuple):
    """Who was asked, and at which price."""

    model: str
    batch: bool


class Index:
    """The stored replies of a folder by key. The texts stay on disk: memory grows by about 300 bytes per reply.

    The first final reply of a key counts. One that was judged under other check settings gives way to a later judgement
    but not to a failure: the text may pass today. Parts are read in the order of their names and judgements compared by
    their times, so every machine comes to the same choice.

    Args:
        folder: of the parts `replies-*.jsonl`; need not exist.
        checks: digest of today's check settings.

    Attributes:
        tokens: over every reply ever stored, by who was asked and `in` or `out`.
        prompts: number of texts by kind and prompt digest.
    """

    def __init__(self, folder: Path, checks: str = "") -> None:
        self._folder = folder
        self._checks = checks
        self._slots: dict[bytes, Slot] = {}
        self._parts: list[Path] = []
        self._readers: dict[int, BinaryIO] = {}
        self.tokens: Counter[tuple[Usage, str]] = Counter()
        self.prompts: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._slots)

    def load(self) -> Self:
        """Read all parts and return self."""
        for path in sorted(self._folder.glob("replies-*.jsonl")):
            number = self._number(path)
            for entry, offset, length in _read_part(path):
                self._keep(entry, number, offset, length)
        return self

    def find(self, key: Key) -> Slot | None:
        """Return where the reply to a key lies; None if there is none."""
        return self._slots.get(_short(key))

    def read(self, slot: Slot) -> Entry:
        """Return the reply at a place.

        Raises:
            DataError: the part file changed under us.
        """
        if slot.part not in self._readers:
            self._readers[slot.part] = self._parts[slot.part].open("rb")
        line = os.pread(self._readers[slot.part].fileno(), slot.length, slot.offset)
        entry = _parse(line)
        if entry is None:
            raise DataError(f"{self._parts[slot.part]} changed while it was being read.", hint="Run the stage again.")
        return entry

    def entry(self, key: Key) -> Entry | None:
        """Return the reply that counts for a key; None if there is none."""
        slot = self.find(key)
        return None if slot is None else self.read(slot)

    def entries(self) -> Iterator[Entry]:
        """Yield the reply that counts for every key."""
        return (self.read(slot) for slot in self._slots.values())

    @property
    def tokens_in(self) -> int:
        """Tokens sent, over every reply ever stored."""
        return sum(count for (_, way), count in self.tokens.items() if way == "in")

    @property
    def tokens_out(self) -> int:
        """Tokens received, over every reply ever stored."""
        return sum(count for (_, way), count in self.tokens.items() if way == "out")

    def close(self) -> None:
        """Close the part files."""
        for stream in self._readers.values():
            stream.close()
        self._readers.clear()

    def _number(self, path: Path) -> int:
        if path not in self._parts:
            self._parts.append(path)
        return self._parts.index(path)

    def _keep(self, entry: Entry, part: int, offset: int, length: int) -> None:
        short = _short(entry.key)
        known = self._slots.get(short)
        # The same line in two parts (a part that was copied under two names) was paid for once.
        copied = known is not None and (known.attempt, known.time) == (entry.attempt, entry.time) and entry.time > 0
        if not copied:
            used = Usage(entry.model, entry.batch)
            self.tokens[used, "in"] += entry.tokens_in
            self.tokens[used, "out"] += entry.tokens_out
        if known is None:
            self.prompts[entry.kind, entry.prompt_sha256] += 1
        stale = entry.checks != self._checks
        new = Slot(part, offset, length, entry.status, entry.attempt, stale, entry.time)
        if known is None or not known.final or (known.stale and _overrules(new, known)):
            self._slots[short] = new


class Journal(Index):
    """The part files of a folder, and this process's own part open for appending.

    A line is handed to the system at once (a killed process loses none) and synced every second (a power cut loses
    little). A last line without its end is cut off when the part is opened.

    Args:
        folder: of the parts `replies-*.jsonl`; all are read.
        part: name of the part this process writes.
        checks: see `Index`.

    Raises:
        DataError: another process writes this part, or the folder cannot be written.
    """

    def __init__(self, folder: Path, part: str = "replies-000.jsonl", checks: str = "") -> None:
        super().__init__(folder, checks)
        self._path = folder / part
        self._stream: BinaryIO | None = None
        self._end = 0
        self._unsynced = 0
        self._synced_at = 0.0

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("ab+", buffering=0)
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.") from None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise DataError(f"Another process is writing {self._path}.", hint="Wait for it to finish.") from None
        _cut_unfinished_line(self._stream)
        self._end = self._stream.seek(0, os.SEEK_END)
        return self.load()

    def append(self, entry: Entry) -> None:
        """Store a reply."""
        assert self._stream is not None, "Journal is used as a context manager"
        line = json.dumps(asdict(entry)).encode("ascii") + b"\n"
        offset, length = self._end, len(line)
        try:
            # An unbuffered write may be short (disk nearly full); the rest must follow or fail.
            while line:
                line = line[self._stream.write(line) :]
            self._unsynced += 1
            if self._unsynced >= _SYNC_EVERY or time.monotonic() - self._synced_at > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.", hint="Is the disk full?") from None
        self._end += length
        self._keep(entry, self._number(self._path), offset, length)

    def _sync(self) -> None:
        assert self._stream is not None
        os.fsync(self._stream.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        self._sync()
        if not self._end:
            self._path.unlink(missing_ok=True)  # an empty part would be in the way where parts are merged
        self._stream.close()
        self.close()


def _overrules(new: Slot, known: Slot) -> bool:
    """Whether a judgement replaces one that was made under other check settings."""
    return new.status != "failed" and (not new.stale or new.time >= known.time)


def _short(key: Key) -> bytes:
    """A key in 16 bytes: the ids of a million images would fill the memory."""
    return hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()


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


def _read_part(path: Path) -> Iterator[tuple[Entry, int, int]]:
    """Every stored reply of a part with its offset and length in bytes."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            entry = _parse(line)
            if entry is not None:
                yield entry, offset, len(line)
            elif line.endswith(b"\n"):
                # A last line without its end is another process at work, not damage.
                log.warning("caption: %s line %d is not a stored reply and is left out", path, number)
            offset += len(line)


_NAMES = frozenset(field.name for field in fields(Entry))
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("image_id", "image_version", "kind", "prompt_sha256", "status", "checks", "model"), str),
    **dict.fromkeys(("attempt", "tokens_in", "tokens_out", "clothing_words"), int),
    **dict.fromkeys(("text", "reason"), (str, type(None))),
    "coverage": (float, int, type(None)),
    "time": (float, int),
    "batch": bool,
    "codes": tuple,
}


def _parse(line: bytes) -> Entry | None:
    """The reply in a line; fields of a later version are left out, those of an earlier one take their defaults."""
    if not line.endswith(b"\n"):
        return None
    try:
        row: dict[str, Any] = {name: value for name, value in json.loads(line).items() if name in _NAMES}
        entry = Entry(**{**row, "codes": tuple(map(str, row.get("codes", ())))})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if all(isinstance(getattr(entry, name), kind) for name, kind in _TYPES.items()) else None
