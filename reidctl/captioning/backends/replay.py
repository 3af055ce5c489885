"""A describer that reads replies recorded earlier, from JSON lines."""

import json
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.errors import DataError


class ReplayDescriber:
    """Replies from a file of lines `{"image_id", "kind", "text", "model"?, "tokens_in"?, "tokens_out"?}`.

    The n-th line of an image and kind answers the n-th attempt; the last one answers all further attempts.

    Raises:
        DataError: the file is missing, or a line is not such an object.
    """

    name = "replay"
    source = "mllm"

    def __init__(self, path: str | Path) -> None:
        self._replies: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        models = set()
        for row in _read(Path(path)):
            self._replies[row["image_id"], row["kind"]].append(row)
            models.add(str(row.get("model") or "replay"))
        self.model = "+".join(sorted(models)) or "replay"

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the recorded reply of each request, `failed` where there is none."""
        for request in requests:
            rows = self._replies.get((request.image_id, request.kind))
            if not rows:
                yield failed(request, "no recorded reply")
                continue
            row = rows[min(request.attempt, len(rows)) - 1]
            tokens = int(row.get("tokens_in") or 0), int(row.get("tokens_out") or 0)
            yield Reply(request, "ok", text=row["text"], tokens_in=tokens[0], tokens_out=tokens[1])


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        stream = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot read the recorded replies {path}: {error.strerror}.") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: not JSON.") from None
            keys = ("image_id", "kind", "text")
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
                raise DataError(f"{path}, line {number}: needs image_id, kind and text, each a string.")
            yield row
