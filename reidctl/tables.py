"""Every Parquet table: its columns, how it is read, checked and written.

The only module that knows a column's type. A table is written to a temporary file, synced, then renamed, so a
reader sees a whole table or none. The file's footer carries `{"table": NAME, "version": 1}`.
"""

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reidctl.errors import DataError

VERSION = 1

_TEXT = pa.string()
_ENUM = pa.dictionary(pa.int32(), pa.string())
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_FOOTER_KEY = b"reidctl"


def _schema(required: dict[str, pa.DataType], optional: dict[str, pa.DataType] | None = None) -> pa.Schema:
    columns = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    columns += [pa.field(name, kind, nullable=True) for name, kind in (optional or {}).items()]
    return pa.schema(columns)


SCHEMAS: dict[str, pa.Schema] = {
    "images": _schema(
        {
            "image_id": _TEXT,
            "path": _TEXT,
            "dataset": _ENUM,
            "split": _ENUM,
            "person_id": _TEXT,
            "width": pa.int32(),
            "height": pa.int32(),
            "sha256": _TEXT,
        },
        {"role": _ENUM, "camera_id": _ENUM, "outfit_id": _TEXT, "attributes": pa.map_(_TEXT, _TEXT)},
    ),
    "captions": _schema(
        {
            "caption_id": _TEXT,
            "image_id": _TEXT,
            "kind": _ENUM,
            "source": _ENUM,
            "conditioned_on": _ENUM,
            "status": _ENUM,
        },
        {
            "text": _TEXT,
            "parent_id": _TEXT,
            "char_start": pa.int32(),
            "char_end": pa.int32(),
            "style_id": _ENUM,
            "model": _ENUM,
            "prompt_sha256": _TEXT,
            "reason": _TEXT,
        },
    ),
    # Who is who after datasets were combined, and the images that were taken out of training for it.
    "identities": _schema({"original_id": _TEXT, "dataset": _ENUM, "person_id": _TEXT, "rule": _ENUM}),
    "purged": _schema(
        {
            "image_id": _TEXT,
            "dataset": _ENUM,
            "split": _ENUM,
            "person_id": _TEXT,
            "reason": _ENUM,
            "evidence": _TEXT,
        }
    ),
    # Digests of the people and image files that a model was trained on: what `evaluate` compares its test set with.
    "seen": _schema({"kind": _ENUM, "digest": _TEXT}),
    "styles": _schema(
        {
            "style_id": _TEXT,
            "size": pa.int32(),
            "instruction": _TEXT,
            "exemplars": pa.list_(_TEXT),
            "centroid": _FLOATS,
        }
    ),
    "parts": _schema({"image_id": _TEXT, "part": _ENUM, "box": _INTS, "mask": _INTS}, {"phrase": _TEXT}),
    "prompts": _schema({"scope": _ENUM, "key": _TEXT, "position": pa.int32(), "vector": _FLOATS}),
    "history": _schema(
        {
            "stage": _ENUM,
            "step": pa.int64(),
            "epoch": pa.int32(),
            "split": _ENUM,
            "name": _ENUM,
            "value": pa.float64(),
            "seconds": pa.float64(),
        }
    ),
    "embeddings": _schema(
        {
            "item_id": _TEXT,
            "role": _ENUM,
            "modality": _ENUM,
            "condition": _ENUM,
            "dataset": _ENUM,
            "split": _ENUM,
            "person_id": _TEXT,
            "embedding": _FLOATS,
        },
        {"camera_id": _ENUM},
    ),
    "rankings": _schema(
        {
            "query_id": _TEXT,
            "condition": _ENUM,
            "rank": pa.int32(),
            "gallery_id": _TEXT,
            "score": pa.float32(),
            "match": pa.bool_(),
        }
    ),
    "queries": _schema(
        {"query_id": _TEXT, "condition": _ENUM, "person_id": _TEXT, "matches": pa.int32()},
        {"first_match": pa.float64(), "average_precision": pa.float64(), "inp": pa.float64()},
    ),
    "metrics": _schema(
        {
            "direction": _ENUM,
            "dataset": _ENUM,
            "split": _ENUM,
            "condition": _ENUM,
            "metric": _ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
            "skipped": pa.int64(),
            "gallery": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64()},
    ),
    "explanations": _schema(
        {
            "query_id": _TEXT,
            "image_id": _TEXT,
            "phrase": _TEXT,
            "char_start": pa.int32(),
            "char_end": pa.int32(),
            "explainer": _ENUM,
            "similarity": pa.float32(),
            "grid_h": pa.int32(),
            "grid_w": pa.int32(),
            "relevance": _FLOATS,
        }
    ),
    "faithfulness": _schema(
        {
            "query_id": _TEXT,
            "image_id": _TEXT,
            "explainer": _ENUM,
            "control": _ENUM,
            "fill": _ENUM,
            "removed": pa.float32(),
            "score": pa.float32(),
            "rank": pa.float64(),
        }
    ),
}


def empty(name: str) -> pd.DataFrame:
    """Return table `name` without rows."""
    return _to_pandas(_plain(SCHEMAS[name].empty_table()))


def read_table(path: Path, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the rows of table `name` as plain pandas columns.

    Args:
        path: the Parquet file.
        name: which table it must be.
        columns: only these columns, in this order; None for all.

    Raises:
        DataError: the file is missing, unreadable, another table, another version, or lacks a column.
    """
    schema = SCHEMAS[name]
    if not path.is_file():
        raise DataError(f"No {name} table at {path}.", hint="Run the stage that writes it, or give its path.")
    try:
        found = pq.read_schema(path)
        _check_footer(path, name, found)
        missing = [column for column in columns or schema.names if column not in found.names]
        if missing:
            raise DataError(f"Table {path} ({name}) lacks the column(s) {', '.join(missing)}.")
        table = pq.read_table(path, columns=list(columns or schema.names))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {_first_line(error)}.") from None
    wanted = pa.schema([schema.field(column) for column in table.column_names])
    return _to_pandas(_plain(_cast(table, wanted, str(path))))


def rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, read from its footer."""
    return int(pq.read_metadata(path).num_rows)


def write_table(path: Path, name: str, frame: pd.DataFrame | pa.Table) -> None:
    """Write `frame` as table `name`: checked, cast, and whole or not at all.

    Raises:
        DataError: a missing or unknown column, a null where none is allowed, a value of the wrong type,
            an embedding that is not of unit length, or no space left.
    """
    with TableWriter(path, name) as writer:
        writer.write(frame)


class TableWriter:
    """Write a table in pieces with bounded memory; the file appears only when all went well.

    Used as a context manager. An exception inside removes the temporary file and leaves an older table alone.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        footer = json.dumps({"table": name, "version": VERSION}).encode()
        self._schema = SCHEMAS[name].with_metadata({_FOOTER_KEY: footer})
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._width: int | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise DataError(f"Cannot write {self.path}: {_first_line(error)}.", hint="Is the disk full?") from None
        return self

    def write(self, frame: pd.DataFrame | pa.Table) -> None:
        """Append rows.

        Raises:
            DataError: see `write_table`.
        """
        assert self._writer is not None, "TableWriter is used as a context manager"
        table = _conform(frame, self._schema, self.name)
        if self.name == "embeddings":
            self._check_vectors(table)
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {_first_line(error)}.", hint="Is the disk full?") from None

    def _check_vectors(self, table: pa.Table) -> None:
        if table.num_rows == 0:
            return
        values = matrix(table.column("embedding").to_pandas())
        if self._width not in (None, values.shape[1]):
            raise DataError(f"Embeddings of width {values.shape[1]} among width {self._width} in {self.path}.")
        self._width = values.shape[1]
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        # A comparison with NaN is False, so NaN rows are caught too.
        wrong = np.flatnonzero(~(np.abs(norms - 1.0) < 1e-3))
        if len(wrong):
            item = table.column("item_id")[int(wrong[0])].as_py()
            raise DataError(
                f"The embedding of {item} has length {norms[wrong[0]]:.4g}, not 1 ({len(wrong)} such rows)."
            )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        try:
            self._writer.close()
            if kind is None:
                _sync_and_rename(self._temporary, self.path)
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {_first_line(error)}.", hint="Is the disk full?") from None
        finally:
            self._temporary.unlink(missing_ok=True)


def matrix(column: "pd.Series[Any]") -> npt.NDArray[np.float32]:
    """Return a vector column as one matrix, shape (N, D), float32, writable.

    Raises:
        DataError: rows of different width.
    """
    if not len(column):
        return np.zeros((0, 0), np.float32)
    width = len(column.iloc[0])
    if any(len(row) != width for row in column):
        raise DataError("A vector column holds rows of different width.")
    return np.stack([np.asarray(row, np.float32) for row in column])


def vectors(values: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
    """Return the rows of a matrix (N, D) as a list fit for a vector column."""
    return list(np.ascontiguousarray(values, np.float32))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, payload: bytes) -> None:
    """Write a file whole or not at all: temporary file, sync, rename.

    Raises:
        DataError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(payload)
        _sync_and_rename(temporary, path)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {_first_line(error)}.", hint="Is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sync_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _conform(frame: pd.DataFrame | pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """The frame as an Arrow table of exactly the schema's columns; absent optional columns become null."""
    given = list(frame.column_names) if isinstance(frame, pa.Table) else [str(column) for column in frame.columns]
    unknown = sorted(set(given) - set(schema.names))
    missing = [field.name for field in schema if not field.nullable and field.name not in given]
    if unknown or missing:
        raise DataError(f"Table {name}: missing column(s) {missing}, unknown column(s) {unknown}.")
    arrays = [_column(frame, field, given, name) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(frame: pd.DataFrame | pa.Table, field: pa.Field, given: Sequence[str], name: str) -> pa.Array:
    length = frame.num_rows if isinstance(frame, pa.Table) else len(frame)
    if field.name not in given:
        return pa.nulls(length, field.type)
    try:
        if isinstance(frame, pa.Table):
            array = _combine(frame.column(field.name)).cast(field.type)
        else:
            array = _from_pandas(frame[field.name], field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:
        raise DataError(f"Table {name}, column {field.name}: {_first_line(error)}.") from None
    if not field.nullable and array.null_count:
        raise DataError(f"Table {name}, column {field.name}: {array.null_count} empty value(s) where none is allowed.")
    return array


def _from_pandas(column: "pd.Series[Any]", kind: pa.DataType) -> pa.Array:
    if pa.types.is_map(kind):
        pairs = [list(row.items()) if isinstance(row, dict) else None for row in column]
        return pa.array(pairs, type=kind)
    if pa.types.is_dictionary(kind):
        return _combine(pa.array(column.astype(object), type=kind.value_type, from_pandas=True)).dictionary_encode()
    if pa.types.is_list(kind):
        return pa.array(list(column), type=kind)
    return _combine(pa.array(column, type=kind, from_pandas=True))


def _combine(array: Any) -> Any:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _plain(table: pa.Table) -> pa.Table:
    """Dictionary columns as plain strings: users compare and concatenate them."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, pa.field(field.name, _TEXT), table.column(index).cast(_TEXT))
    return table


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """Pandas columns of plain Python and NumPy values: None for an absent text, dict for a map."""
    frame = pd.DataFrame(index=range(table.num_rows))
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_map(field.type):
            values: Any = [dict(row) if row is not None else None for row in column.to_pylist()]
            frame[field.name] = pd.Series(values, index=frame.index, dtype=object)
        elif pa.types.is_string(field.type):
            frame[field.name] = pd.Series(column.to_pylist(), index=frame.index, dtype=object)
        else:
            frame[field.name] = column.to_pandas().to_numpy() if table.num_rows else column.to_pandas()
    return frame


def _cast(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    try:
        table = table.replace_schema_metadata(None).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"{where}: a column has the wrong type: {_first_line(error)}.") from None
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise DataError(f"{where}: column {field.name} has empty values where none is allowed.")
    return table


def _check_footer(path: Path, name: str, found: pa.Schema) -> None:
    raw = (found.metadata or {}).get(_FOOTER_KEY)
    if raw is None:
        return  # A table made by other tools is welcome as long as its columns fit.
    footer = json.loads(raw)
    if footer.get("table") != name:
        raise DataError(f"{path} holds the table {footer.get('table')}, not {name}.")
    if footer.get("version") != VERSION:
        raise DataError(
            f"{path} is version {footer.get('version')} of the {name} table; this reidctl reads version {VERSION}.",
            hint="Write it again with this version.",
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
