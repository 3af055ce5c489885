"""A describer that reads replies recorded earlier, from JSON lines."""

import contextlib
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.command import token_count
from reidctl.console import log
from reidctl.errors import DataError

_PARTS = "replies-*.jsonl"
_MAX_LINE = 1 << 20
_BOM = b"\xef\xbb\xbf"


class _Recorded(NamedTuple):
    """One recorded reply; `digest` and `status` are empty in files that were not written by the caption stage."""

    digest: str
    attempt: int
    status: str
    text: str | None
    reason: str | None
    tokens_in: int
    tokens_out: int


class ReplayDescriber:
    """Replies from a file, or from the parts that a caption run wrote.

    A file has lines `{"image_id", "kind", "text", "model"?, "tokens_in"?, "tokens_out"?}`. The n-th line of an image
    and kind answers the n-th attempt; the last one answers all further attempts.

    The folder of a caption run, its `parts` folder, or one part, replays that run: each line answers the attempt that
    it was the reply to, those to the same prompt first, then those to the prompt that was recorded last. Lines without
    a text are the failed or refused attempts that they were. A last line cut short by a kill is left out.

    The lines go into a temporary SQLite file with an index, so memory does not grow with the recording; disk in the
    temporary folder does, by about its size.

    Attributes:
        content: hex digest of everything that was read.

    Raises:
        DataError: nothing is there, or a line is not such an object.
    """

    name = "replay"
    source = "mllm"
    deferred = False
    repeats = False

    def __init__(self, path: str | Path) -> None:
        columns = ", ".join(("image", "kind", *_Recorded._fields))
        digest = hashlib.sha256()
        with filling(Path(path), f"CREATE TABLE replies ({columns})") as self._store:
            models = self._load(_parts(Path(path)), digest.update)
        self.content = digest.hexdigest()
        self.model = "+".join(sorted(models - {""})) or "replay"

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the recorded reply of each request, `failed` where there is none."""
        for request in requests:
            recorded = self._find(request)
            if recorded is None:
                yield failed(request, "no recorded reply")
            elif recorded.text is not None:
                tokens = recorded.tokens_in, recorded.tokens_out
                yield Reply(request, "ok", text=recorded.text, tokens_in=tokens[0], tokens_out=tokens[1])
            elif recorded.status in ("retry", "rejected"):
                why = recorded.reason or "the recorded reply was refused"
                yield rejected(request, why, tokens_in=recorded.tokens_in, tokens_out=recorded.tokens_out)
            else:
                yield failed(request, recorded.reason or "the recorded attempt failed")

    def _load(self, parts: Iterable[Path], seen: Callable[[bytes], object]) -> set[str]:
        models: set[str] = set()
        for row in itertools.chain.from_iterable(_read(part, seen) for part in parts):
            self._keep(row)
            models.add(str(row.get("model") or ""))
        self._store.execute("CREATE INDEX place ON replies (image, kind)")
        return models

    def _keep(self, row: dict[str, Any]) -> None:
        recorded = _Recorded(
            digest=_text(row.get("prompt_sha256")),
            attempt=token_count(row.get("attempt")) if "status" in row else 0,
            status=_text(row.get("status")),
            text=row["text"] if row.get("text") is None else _text(row["text"]),
            reason=row.get("reason") if row.get("reason") is None else _text(row["reason"]),
            tokens_in=token_count(row.get("tokens_in")),
            tokens_out=token_count(row.get("tokens_out")),
        )
        values = (_text(row["image_id"]), _text(row["kind"]), *recorded)
        self._store.execute(f"INSERT INTO replies VALUES ({', '.join('?' * len(values))})", values)

    def _find(self, request: Request) -> _Recorded | None:
        select = f"SELECT {', '.join(_Recorded._fields)} FROM replies WHERE image = ? AND kind = ? ORDER BY rowid"
        rows = [_Recorded(*row) for row in self._store.execute(select, (_text(request.image_id), request.kind))]
        if not rows:
            return None
        digest = request.digest if any(row.digest == request.digest for row in rows) else rows[-1].digest
        rows = [row for row in rows if row.digest == digest]
        if not rows[0].status:
            return rows[min(request.attempt, len(rows)) - 1]
        # An attempt that failed was made again by a later run, under the same number: the one with a text counts.
        attempt = min(request.attempt, max(row.attempt for row in rows))
        made = [row for row in rows if row.attempt == attempt] or rows[:1]
        return next((row for row in reversed(made) if row.text is not None), made[-1])


def _parts(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    places = (path, path / "parts", path / "caption" / "parts")
    found = next((parts for place in places if (parts := sorted(place.glob(_PARTS)))), [])
    if not found:
        raise DataError(
            f"{path} has no recorded replies ({_PARTS}).", hint="Give a run directory, or its caption folder."
        )
    return found


def _read(path: Path, seen: Callable[[bytes], object]) -> Iterator[dict[str, Any]]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"Cannot read the recorded replies {path}: {error.strerror}.") from None
    with stream:
        number = 0
        while line := stream.readline(_MAX_LINE):
            number += 1
            seen(line)
            where = f"{path}, line {number}"
            if len(line) == _MAX_LINE:
                raise DataError(f"{where}: longer than {_MAX_LINE:,} bytes.")
            if not line.removeprefix(_BOM).strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and path.match(_PARTS):
                    log.warning("caption: the last line of %s was cut short by a kill and is left out", path)
                    return
                raise DataError(f"{where}: not JSON.") from None
            yield _checked(row, where)


def _checked(row: Any, where: str) -> dict[str, Any]:
    """The row, if it is one of ours or has all that a foreign one needs."""
    ours = isinstance(row, dict) and {"attempt", "status", "prompt_sha256"} <= row.keys()
    strings = ("image_id", "kind", "status", "prompt_sha256") if ours else ("image_id", "kind", "text")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in strings):
        raise DataError(f"{where}: needs {', '.join(strings[:-1])} and {strings[-1]}, each a string.")
    if ours and not (row.get("text") is None or isinstance(row["text"], str)):
        raise DataError(f"{where}: `text` must be a string or null.")
    if ours and not (type(row["attempt"]) is int and row["attempt"] >= 1):
        raise DataError(f"{where}: `attempt` must be a whole number from 1.")
    return row if ours else {key: value for key, value in row.items() if key not in ("status", "prompt_sha256")}


def _text(value: Any) -> str:
    return "" if value is None else storable(str(value))


def storable(text: str) -> str:
    """Return a text as SQLite can hold it: half characters become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def filling(path: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """Yield a temporary database, to be filled inside the block from `path`; it is gone when the process ends.

    Args:
        path: named in the error.
        schema: the statement that makes the table.

    Raises:
        DataError: the temporary folder is full.
    """
    store = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    try:
        store.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -65536; {schema}")  # 64 MiB
        store.execute("BEGIN")  # for good: nothing is to outlive the process
        yield store
    except sqlite3.Error as error:
        raise DataError(f"{path} cannot be indexed in the temporary folder ({error}).") from None
