"""What is known of the batches of a run, in an append-only file, and the file of requests being written."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

from reidctl.captioning.backends.base import Key, Request
from reidctl.errors import DataError

_FILE = "batches.jsonl"
_OWN_ID = re.compile(r"[0-9a-f]{32}")
# Where the provider may still be working for us, or may be without our knowing.
_OPEN = ("intended", "uploaded", "submitted")


def custom_id(request: Request) -> str:
    """Return what a reply is matched by: 40 hex characters, one value per key and attempt."""
    return key_id(request.key, request.attempt)


def key_id(key: Key, attempt: int) -> str:
    """Return `custom_id` of the request with this key and attempt."""
    name = "\0".join((*key, str(attempt)))
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]


@dataclass
class Batch:
    """One submission.

    Attributes:
        id: ours, random; also in the provider's metadata, so that a batch is found whose answer never arrived.
        custom_ids: what it asks for; empty once it is fetched.
        host: of the service that it was given to.
        structured: whether its requests ask for JSON.
        started: seconds since 1970, before anything was sent.
        phase: `intended` (nothing known to be sent), `uploaded`, `submitted`, `dropped` (never became a batch),
            `downloaded` (ended, its replies are on disk), `aside` (those left over belong to no request of the run that
            fetched it), `fetched` (every reply was stored by the run).
        file_id, batch_id: the provider's.
        status: the provider's last word.
        replies: that were on disk when it was downloaded.
    """

    id: str
    custom_ids: list[str]
    host: str
    structured: bool
    started: float
    phase: str = "intended"
    file_id: str = ""
    batch_id: str = ""
    status: str = ""
    replies: int = 0

    @property
    def is_open(self) -> bool:
        """Whether the provider has it, or may have it without our knowing."""
        return self.phase in _OPEN

    @property
    def waiting(self) -> int:
        """Requests that are paid for, or may be, and whose replies the run does not have."""
        if self.is_open:
            return len(self.custom_ids)
        return self.replies if self.phase == "downloaded" else 0


def open_requests(folder: Path) -> int:
    """Return how many requests are with the provider, or fetched and not yet stored by the run.

    Read from the state file alone. A run that asked for them in another way would pay twice.

    Raises:
        DataError: the state file is damaged.
    """
    return sum(batch.waiting for batch in known_batches(folder))


def known_batches(folder: Path) -> list[Batch]:
    """Return all submissions of a folder, oldest first; the file is only read.

    Raises:
        DataError: the state file is damaged.
    """
    path = Path(folder) / _FILE
    return list(_read(path)[0].values()) if path.is_file() else []


def replies_path(folder: Path, batch: Batch) -> Path:
    """Return where the fetched replies of a submission lie; made of our own id, never of the provider's."""
    assert _OWN_ID.fullmatch(batch.id)
    return Path(folder) / f"batch-{batch.id}.jsonl"


class BatchState:
    """The state file of a folder, open for appending: a line counts once it is on the disk.

    Args:
        folder: where `batches.jsonl` and the fetched replies lie.

    Raises:
        DataError: another process uses the folder, it cannot be written, or the state file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: dict[str, Batch] = {}
        self.limit = 0
        self._path = folder / _FILE
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = open(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "ab+", buffering=0)
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.") from None
        try:
            self._claim()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def _claim(self) -> None:
        assert self._stream is not None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another process is using {self._path}.", hint="Wait for it to finish.") from None
        self.batches, self.limit, end = _read(self._path)
        if end < self._path.stat().st_size:
            self._stream.truncate(end)  # a kill cut the last line: what it announced was not begun
        _sync_folder(self.folder)
        for leftover in self.folder.glob("batch-*.part"):
            leftover.unlink(missing_ok=True)

    def intend(self, custom_ids: list[str], host: str, *, structured: bool) -> Batch:
        """Return a new submission, on disk before anything is sent."""
        batch = Batch(secrets.token_hex(16), custom_ids, host, structured, time.time())
        self._append(
            {
                "id": batch.id,
                "phase": "intended",
                "started": batch.started,
                "host": host,
                "structured": structured,
                "custom_ids": custom_ids,
            }
        )
        self.batches[batch.id] = batch
        return batch

    def note(self, batch: Batch, phase: str, **fields: Any) -> None:
        """Record what became of a submission; `fields` are `file_id`, `batch_id`, `status`, `replies` or `limit`."""
        row = {"id": batch.id, "phase": phase, "at": round(time.time(), 3), **fields}
        self._append(row)
        self.limit = int(fields.get("limit", self.limit))
        _apply(batch, row)

    def in_phase(self, *phases: str) -> list[Batch]:
        """Return the submissions in these phases, oldest first."""
        return [batch for batch in self.batches.values() if batch.phase in phases]

    def replies_path(self, batch: Batch) -> Path:
        """Return `replies_path` in the folder."""
        return replies_path(self.folder, batch)

    def keep_replies(self, batch: Batch, part: Path) -> None:
        """Give downloaded replies their name, once they are on the disk."""
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(self.replies_path(batch))
        _sync_folder(self.folder)

    def _append(self, row: dict[str, Any]) -> None:
        assert self._stream is not None, "BatchState is used as a context manager"
        line = json.dumps(row).encode("ascii") + b"\n"
        try:
            # An unbuffered write may be short (disk nearly full); the rest must follow or fail.
            while line:
                line = line[self._stream.write(line) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise DataError(f"Cannot write {self._path}: {error.strerror}.", hint="Is the disk full?") from None


def _read(path: Path) -> tuple[dict[str, Batch], int, int]:
    """The submissions, the last known limit of requests per batch, and where the last whole line ends."""
    batches: dict[str, Batch] = {}
    limit = end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line)
                if row["phase"] == "intended":
                    batches[row["id"]] = _intended(row)
                else:
                    _apply(batches[row["id"]], row)
                limit = int(row.get("limit", limit))
            except (ValueError, KeyError, TypeError, AttributeError):
                # Skipping it could mean asking, and paying, for thousands of requests twice.
                raise DataError(
                    f"{path}, line {number}: damaged, so it is unknown which requests are with the provider.",
                    hint="Restore the file, or delete it to give the open batches up.",
                ) from None
    return batches, limit, end


def _intended(row: dict[str, Any]) -> Batch:
    if not _OWN_ID.fullmatch(row["id"]):
        raise ValueError("not an id of ours")
    return Batch(row["id"], list(row["custom_ids"]), str(row["host"]), bool(row["structured"]), float(row["started"]))


def _apply(batch: Batch, row: dict[str, Any]) -> None:
    batch.phase = str(row["phase"])
    for name in ("file_id", "batch_id", "status"):
        setattr(batch, name, str(row.get(name, getattr(batch, name))))
    batch.replies = int(row.get("replies", batch.replies))
    if batch.phase in ("dropped", "fetched"):
        batch.custom_ids = []  # a run of a million requests must not carry them all


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RequestFile:
    """The file of requests being written: without a name and readable by nobody else, so that no kill leaves images.

    Args:
        folder: whose disk is used.
        requests, size: most lines and bytes.
    """

    def __init__(self, folder: Path, requests: int, size: int) -> None:
        self.custom_ids: list[str] = []
        self._requests, self._size = requests, size
        self._written = 0
        self.stream: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    def add(self, name: str, body: dict[str, Any]) -> bool:
        """Append a request; False, and nothing is written, when the file is full.

        Raises:
            DataError: the disk is full.
            ValueError: the request alone is too large for any batch.
        """
        row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(row).encode("ascii") + b"\n"
        if len(line) > self._size:
            raise ValueError(f"the request has {len(line):,} bytes, a batch takes {self._size:,}")
        if len(self.custom_ids) >= self._requests or self._written + len(line) > self._size:
            return False
        try:
            self.stream.write(line)
        except OSError as error:
            raise DataError(
                f"Cannot write the requests of a batch: {error.strerror}.", hint="Free disk space."
            ) from None
        self.custom_ids.append(name)
        self._written += len(line)
        return True

    def close(self) -> None:
        """Forget the requests; the system frees the space."""
        self.stream.close()
