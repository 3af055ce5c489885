"""Phrases on disk: append-only JSON lines that a kill at any moment leaves readable."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from reidctl.console import progress
from reidctl.errors import DataError
from reidctl.phrases.base import PARTS, Phrase, PhraseSource

_BLOCK = 1 << 16


def cache_key(identity: str, caption: str) -> str:
    """Return the sha256 that a caption's phrases are stored under; another backend or setting has another one."""
    return hashlib.sha256(f"{identity}\0{caption}".encode("utf-8", "surrogatepass")).hexdigest()


def cached(
    source: PhraseSource,
    path: Path,
    identity: str,
    *,
    batch: int = 256,
    keep: Callable[[str], bool] | None = None,
) -> PhraseSource:
    """Return a source that asks `source` only for captions that are not stored yet.

    A line is `{"key", "caption", "phrases": [{"text", "start", "end", "part"}, ...]}`; the file is also one that the
    `file` backend reads. Each batch is synced to disk before the next is asked for. A last line that breaks off is
    passed over and written anew. Several processes may share the file.

    Args:
        source: who is asked, `batch` different captions at a time.
        path: the file; made with its folder when something is stored.
        identity: of the backend with every setting that changes its answers.
        batch: captions that are asked for, and lost by a kill, at most.
        keep: whether the answer for a caption may be stored; None for all. What a fallback answered may not.

    Raises:
        DataError: (when called) the file is damaged, or cannot be written.
    """
    return _Cached(source, path, identity, batch, keep)


class _Cached:
    def __init__(
        self, source: PhraseSource, path: Path, identity: str, batch: int, keep: Callable[[str], bool] | None
    ) -> None:
        self._source, self._path, self._identity, self._batch, self._keep = source, path, identity, batch, keep
        self._store: dict[str, list[Phrase]] | None = None

    def __call__(self, captions: Sequence[str]) -> list[list[Phrase]]:
        if self._store is None:
            self._store = _load(self._path)
        keys = {text: cache_key(self._identity, text) for text in captions}
        unknown = [text for text, key in keys.items() if key not in self._store]
        passing = self._ask(unknown, self._store)
        return [list(passing[text] if text in passing else self._store[keys[text]]) for text in captions]

    def _ask(self, unknown: list[str], store: dict[str, list[Phrase]]) -> dict[str, list[Phrase]]:
        """Ask batch by batch and store; return what may not be stored."""
        passing: dict[str, list[Phrase]] = {}
        # A single batch is no long task: a search asks for one caption.
        shown = progress("phrases", len(unknown), unit="captions") if len(unknown) > self._batch else nullcontext()
        with shown as advance:
            for start in range(0, len(unknown), self._batch):
                some = unknown[start : start + self._batch]
                found = dict(zip(some, self._source(some), strict=True))
                kept = {text: found[text] for text in some if self._keep is None or self._keep(text)}
                _append(self._path, self._identity, kept)
                store |= {cache_key(self._identity, text): phrases for text, phrases in kept.items()}
                passing |= {text: phrases for text, phrases in found.items() if text not in kept}
                if advance is not None:
                    advance(len(some))
        return passing


def _load(path: Path) -> dict[str, list[Phrase]]:
    """Every stored list by its key."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None
    lines = data.split(b"\n")[:-1]  # what follows the last line break was torn by a kill
    return dict(_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1))


def _entry(line: bytes, where: str) -> tuple[str, list[Phrase]]:
    try:
        row = json.loads(line)
        caption, phrases = row["caption"], [_phrase(value, row["caption"]) for value in row["phrases"]]
        if not isinstance(row["key"], str) or not isinstance(caption, str):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{where} is no stored list of phrases.", hint="Delete the file; what it held is asked for again."
        ) from None
    return row["key"], phrases


def _phrase(value: Any, caption: str) -> Phrase:
    phrase = Phrase(**value)
    is_there = phrase.end > phrase.start >= 0 and caption[phrase.start : phrase.end] == phrase.text
    if not isinstance(phrase.text, str) or phrase.part not in PARTS:
        raise ValueError
    if not is_there and (phrase.start, phrase.end) != (0, 0):
        raise ValueError
    return phrase


def _append(path: Path, identity: str, found: dict[str, list[Phrase]]) -> None:
    rows = [
        {"key": cache_key(identity, text), "caption": text, "phrases": [asdict(phrase) for phrase in phrases]}
        for text, phrases in found.items()
    ]
    if not rows:
        return
    payload = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # so that a torn tail is a dead writer's, not one at work
            stream.truncate(_whole(stream))
            _write(stream, payload)
            os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror}.", hint="Is the disk full?") from None


def _write(stream: Any, payload: bytes) -> None:
    while payload:
        payload = payload[stream.write(payload) :]


def _whole(stream: "BinaryIO | Any") -> int:
    """The length of the file up to its last line break."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        stream.seek(start)
        block = stream.read(end - start)
        if (last := block.rfind(b"\n")) >= 0:
            return int(start + last + 1)
        end = start
    return 0
