"""A describer that reads finished texts from a table."""

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.backends.replay import filling
from reidctl.console import log
from reidctl.datasets.manifest import Complaints, Row, Table, open_table, shown, text_of
from reidctl.errors import DataError

KINDS = ("identity", "clothing")
_NAMES = ("image", "image_id", "path")
_TEXTS = {"identity_text": "identity", "clothing_text": "clothing"}
_CHUNK = 1 << 20
_MOST_MODELS = 8


class FileDescriber:
    """Texts that are there already, in a CSV, TSV, JSON Lines or Parquet file.

    Columns: `image` (or `image_id`, `path`), and either `identity` and/or `clothing` (or `identity_text`,
    `clothing_text`), or `kind` and `text` with one row per text (a `captions.parquet` of reidctl is such a table; rows
    of other kinds and without a text are passed over); optional `model`.

    An image is named by its full id (`dataset:path`), its path in the dataset, or its `path` in the images table, by
    such names only as mean no other image of the table (`Request.names`). Where rows name one image in several of
    these ways, the first of them in this order that has a text of the kind counts: the full id was surely meant for
    this image, while a bare path may come from a file about another dataset.

    The rows go into a temporary SQLite file with an index by image, so memory does not grow with the file; disk in
    the temporary folder does, by about the file's size.

    Raises:
        DataError: not such a table, or two rows of one image and kind that disagree.
    """

    name = "file"
    source = "mllm"
    deferred = False
    repeats = True

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        schema = "CREATE TABLE texts (image, kind, text, PRIMARY KEY (image, kind)) WITHOUT ROWID"
        with filling(self._path, schema) as self._store:
            models = self._load()
        who = f" ({'+'.join(sorted(models))})" if models else ""
        self.model = f"file:{self._path.name}#{_digest(self._path)}{who}"

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the text of each request, `failed` where the file has none."""
        for request in requests:
            text = self._find(request)
            if text is None:
                yield failed(request, f"no text in {self._path.name} for this image and kind ({request.kind})")
            else:
                yield Reply(request, "ok", text=text)

    def _find(self, request: Request) -> str | None:
        select = "SELECT text FROM texts WHERE image = ? AND kind = ?"
        for name in request.names:
            row = self._store.execute(select, (_plain(name), request.kind)).fetchone()
            if row is not None:
                return str(row[0])
        return None

    def _load(self) -> set[str]:
        """Read the table into the store; return who wrote the texts."""
        table = open_table(self._path, Complaints(), rename=_rename)
        models: set[str] = set()
        passed = number = 0
        for number, row in table.rows:
            if number == 1:  # of JSON Lines the columns are known now
                _check_columns(self._path, table.columns)
            where = table.where(number)
            passed += self._add(row, table, where)
            model = text_of(row.get("model"), where, "model")
            if model and len(models) < _MOST_MODELS:
                models.add(model)
        _check_columns(self._path, table.columns if number else [])
        if passed:
            log.info("caption: %s: %d row(s) without a text, or of another kind, passed over", self._path.name, passed)
        return models

    def _add(self, row: Row, table: Table, where: str) -> bool:
        """Store the texts of a row; return whether it has none."""
        image = _plain(text_of(row.get("image"), where, "image"))
        if not image:
            raise DataError(f"{where}: `image` is empty.")
        if "text" in table.columns and "kind" in table.columns:
            pairs = [(text_of(row.get("kind"), where, "kind"), text_of(row.get("text"), where, "text"))]
        else:
            pairs = [(kind, text_of(row.get(kind), where, kind)) for kind in KINDS]
        told = [(kind, text) for kind, text in pairs if kind in KINDS and text]
        for kind, text in told:
            self._insert(image, kind, text, where)
        return not told

    def _insert(self, image: str, kind: str, text: str, where: str) -> None:
        insert = "INSERT INTO texts VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        if self._store.execute(insert, (image, kind, text)).rowcount:
            return
        stored = self._store.execute("SELECT text FROM texts WHERE image = ? AND kind = ?", (image, kind)).fetchone()
        if stored[0] != text:
            raise DataError(f"{where}: image {image} has another {kind} text in an earlier row.", hint="Keep one.")


def _plain(name: str) -> str:
    """A name as it is compared; one with half characters, which SQLite cannot hold, stays unlike all others."""
    return name.replace("\\", "/").removeprefix("./").encode("utf-8", "backslashreplace").decode("utf-8")


def _rename(names: Sequence[str]) -> list[str]:
    """Names in lower case; the first of `_NAMES` that is there names the image, others stay as they are."""
    found = [name.lower() for name in names]
    image = next((name for name in _NAMES if name in found), None)
    aliases = {alias: name for alias, name in _TEXTS.items() if name not in found}
    return ["image" if name == image else aliases.get(name, name) for name in found]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if not columns:
        raise DataError(f"{path} has no rows.")
    if "image" not in columns or not (set(KINDS) & set(columns) or {"kind", "text"} <= set(columns)):
        raise DataError(
            f"{path} needs the columns `image` and `identity` or `clothing`, or `image`, `kind` and `text`; it has: "
            f"{shown(columns)}."
        )


def _digest(path: Path) -> str:
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from None
        return hashlib.file_digest(stream, "sha256").hexdigest()[:8]
