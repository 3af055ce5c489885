"""Every Parquet table: its columns, how it is read, checked and written.

With `schemas` the only module that knows a column's type. A table is written to a temporary file, synced, then renamed,
so a reader sees a whole table or none. The file's footer carries `{"table": NAME, "version": 1}` and facts about the
whole table, such as the model that made its vectors.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reidctl.errors import DataError
from reidctl.schemas import ENUM, FLOATS, SCHEMAS, TEXT, version

_FOOTER_KEY = b"reidctl"
_NUMBERS = 1 << 22  # of a vector column at a time: 16 MiB
_UNIT = 1e-3


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
    with _readable(path, name):
        found = pq.read_schema(path)
        _check_footer(path, name, found)
        _check_columns(path, name, columns or schema.names, found)
        table = pq.read_table(path, columns=list(columns or schema.names))
    wanted = pa.schema([schema.field(column) for column in table.column_names])
    return _to_pandas(_plain(_cast(table, wanted, str(path))))


def read_labels(path: Path, name: str, *, extra: Sequence[str] = ()) -> pd.DataFrame:
    """Return the text columns of table `name` in little memory: the first as Arrow strings, the others as categories.

    Args:
        path: the Parquet file; it may lack the optional columns, which are then empty.
        name: which table it must be.
        extra: text columns beyond the table's own, taken if the file has them.

    Raises:
        DataError: see `read_table`.
    """
    wanted = [field for field in SCHEMAS[name] if field.type in (TEXT, ENUM)]
    wanted += [pa.field(column, TEXT) for column in extra if column not in SCHEMAS[name].names]
    with _readable(path, name):
        found = pq.read_schema(path)
        _check_footer(path, name, found)
        _check_columns(path, name, [field.name for field in wanted if not field.nullable], found)
        present = [field for field in wanted if field.name in found.names]
        table = pq.read_table(path, columns=[field.name for field in present])
    table = _cast(table, pa.schema(present), str(path))
    columns = {field.name: _compact(table, field.name, first=field is wanted[0]) for field in wanted}
    kept = {key: values for key, values in columns.items() if key not in extra or key in found.names}
    return pd.DataFrame(kept, index=range(table.num_rows))


def vector_pieces(
    path: Path, name: str, column: str
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yield a vector column of table `name` piece by piece: the width of every row (n,), and the numbers in a row.

    Lists of fixed and of any length, of 16, 32 or 64 bit, are read. A missing vector has width 0, a missing number is
    NaN. About 16 MiB are held at a time, whatever the size of the file's row groups.

    Raises:
        DataError: see `read_table`; the column holds no numbers.
    """
    with _readable(path, name), pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        _check_footer(path, name, file.schema_arrow)
        _check_columns(path, name, [column], file.schema_arrow)
        kind = file.schema_arrow.field(column).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_floating(kind.value_type):
            raise DataError(f"Column {column} of {path} is {kind}, not a list of float numbers per row.")
        for batch in file.iter_batches(_rows_at_a_time(file, column), columns=[column], use_threads=False):
            yield _unpacked(batch.column(0))


def footer(path: Path) -> dict[str, Any]:
    """Return what a table's footer says: `table`, `version` and the facts it was written with; {} if another tool
    wrote it.

    Raises:
        DataError: the file is missing or unreadable.
    """
    with _readable(path, ""):
        return _footer(path, pq.read_schema(path))


def rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, read from its footer."""
    return int(pq.read_metadata(path).num_rows)


def write_table(
    path: Path,
    name: str,
    frame: pd.DataFrame | pa.Table,
    *,
    matrices: Mapping[str, npt.NDArray[Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `frame` as table `name`: checked, cast, and whole or not at all.

    Args:
        path: the Parquet file.
        name: which table it is.
        frame: its rows.
        matrices: vector columns by name, each (N, D), which `frame` then lacks.
        facts: about the whole table, JSON values; `footer` returns them.

    Raises:
        DataError: a missing or unknown column, a null where none is allowed, a value of the wrong type,
            an embedding that is not of unit length, or no space left.
    """
    with TableWriter(path, name, facts=facts) as writer:
        writer.write(frame, matrices=matrices)


class TableWriter:
    """Write a table in pieces with bounded memory; the file appears only when all went well.

    Used as a context manager. An exception inside removes the temporary file and leaves an older table alone.
    """

    def __init__(self, path: Path, name: str, *, facts: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.name = name
        about = {**(facts or {}), "table": name, "version": version(name)}
        self._schema = SCHEMAS[name].with_metadata({_FOOTER_KEY: json.dumps(about).encode()})
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._width: int | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A vector hardly ever occurs twice, so a dictionary of its numbers would only cost time.
            plain = [field.name for field in self._schema if field.type != FLOATS]
            dictionary = plain if len(plain) < len(self._schema) else True
            self._writer = pq.ParquetWriter(
                self._temporary, self._schema, compression="zstd", use_dictionary=dictionary
            )
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise DataError(f"Cannot write {self.path}: {_first_line(error)}.", hint="Is the disk full?") from None
        return self

    def write(self, frame: pd.DataFrame | pa.Table, *, matrices: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        """Append rows; see `write_table`. Vectors given as matrices are converted and written block by block.

        Raises:
            DataError: see `write_table`.
        """
        given = {column: np.asarray(values) for column, values in (matrices or {}).items()}
        assert all(values.ndim == 2 and len(values) == len(frame) for values in given.values()), "one vector per row"
        widest = max((values.shape[1] for values in given.values()), default=0)
        step = _step(widest) if given and len(frame) else max(1, len(frame))
        for start in range(0, max(1, len(frame)), step):
            some = slice(start, start + step)
            part = frame.slice(start, step) if isinstance(frame, pa.Table) else frame.iloc[some]
            self._write(_conform(part, self._schema, self.name, {key: values[some] for key, values in given.items()}))

    def _write(self, table: pa.Table) -> None:
        assert self._writer is not None, "TableWriter is used as a context manager"
        if self.name == "embeddings":
            self._check_vectors(table)
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {_first_line(error)}.", hint="Is the disk full?") from None

    def _check_vectors(self, table: pa.Table) -> None:
        if table.num_rows == 0:
            return
        widths, numbers = _unpacked(_combine(table.column("embedding")))
        width = int(widths[0])
        if (widths != width).any():
            raise DataError(f"A vector column holds rows of different width: {widths.min()} to {widths.max()}.")
        if self._width not in (None, width):
            raise DataError(f"Embeddings of width {width} among width {self._width} in {self.path}.")
        self._width = width
        norms = norms_of(numbers.reshape(-1, width))
        # A comparison with NaN is False, so NaN rows are caught too.
        wrong = np.flatnonzero(~(np.abs(norms - 1.0) < _UNIT))
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
    rows = column.tolist()
    widths = np.fromiter(map(len, rows), np.int64, len(rows))
    if (widths != widths[0]).any():
        raise DataError("A vector column holds rows of different width.")
    return np.concatenate(rows, dtype=np.float32, casting="unsafe").reshape(len(rows), int(widths[0]))


def vectors(values: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
    """Return the rows of a matrix (N, D) as a list fit for a vector column; for many rows give `write_table` the
    matrix itself.
    """
    return list(np.ascontiguousarray(values, np.float32))


def norms_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the lengths of the rows of a matrix (N, D), computed in float64 block by block, shape (N,)."""
    found = np.empty(len(values), np.float64)
    step = max(1, _step(values.shape[1]) // 8)
    for start in range(0, len(values), step):
        found[start : start + step] = np.linalg.norm(values[start : start + step].astype(np.float64), axis=1)
    return found


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


def _conform(
    frame: pd.DataFrame | pa.Table, schema: pa.Schema, name: str, matrices: Mapping[str, npt.NDArray[Any]]
) -> pa.Table:
    """The frame as an Arrow table of exactly the schema's columns; absent optional columns become null."""
    given = list(frame.column_names) if isinstance(frame, pa.Table) else [str(column) for column in frame.columns]
    given += list(matrices)
    unknown = sorted(set(given) - set(schema.names))
    missing = [field.name for field in schema if not field.nullable and field.name not in given]
    if unknown or missing:
        raise DataError(f"Table {name}: missing column(s) {missing}, unknown column(s) {unknown}.")
    arrays = [
        _packed(matrices[field.name]) if field.name in matrices else _column(frame, field, given, name)
        for field in schema
    ]
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
        if isinstance(column.dtype, pd.CategoricalDtype) and len(column.cat.categories):
            return pa.array(column, from_pandas=True).cast(kind)
        return _combine(pa.array(column.astype(object), type=kind.value_type, from_pandas=True)).dictionary_encode()
    if pa.types.is_list(kind):
        rows = column.tolist()
        if kind == FLOATS and rows and all(isinstance(row, np.ndarray) and row.ndim == 1 for row in rows):
            ends = np.cumsum([0, *map(len, rows)])
            return pa.ListArray.from_arrays(ends.astype(np.int32), np.concatenate(rows).astype(np.float32))
        return pa.array(rows, type=kind)
    return _combine(pa.array(column, type=kind, from_pandas=True))


def _packed(values: npt.NDArray[Any]) -> pa.Array:
    """A matrix as lists, without a Python object per row."""
    count, width = values.shape
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * width, flat)


def _unpacked(array: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The width of every list and all their numbers."""
    widths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    # flatten() leaves out what a null list hides; a null number becomes NaN.
    numbers = array.flatten().to_numpy(zero_copy_only=False)
    return widths, np.asarray(numbers, np.float32)


def _step(width: int) -> int:
    return max(1, _NUMBERS // max(1, width))


def _rows_at_a_time(file: pq.ParquetFile, column: str) -> int:
    """How many rows hold about `_NUMBERS` numbers, by the counts in the file's own footer."""
    facts = file.metadata
    for group in range(facts.num_row_groups):
        for place in range(facts.num_columns):
            leaf = facts.row_group(group).column(place)
            if leaf.path_in_schema.split(".")[0] == column and facts.row_group(group).num_rows:
                return _step(leaf.num_values // facts.row_group(group).num_rows)
    return 1


def _compact(table: pa.Table, column: str, *, first: bool) -> Any:
    if column not in table.column_names:
        return pd.Categorical.from_codes(np.full(table.num_rows, -1), categories=pd.Index([], dtype=object))
    values = table.column(column)
    if first:
        return pd.array(values.cast(TEXT), dtype=pd.StringDtype("pyarrow"))
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    whole = _combine(values.unify_dictionaries())
    codes = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(codes, categories=pd.Index(whole.dictionary.to_pylist(), dtype=object))


def _combine(array: Any) -> Any:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _plain(table: pa.Table) -> pa.Table:
    """Dictionary columns as plain strings: users compare and concatenate them."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, pa.field(field.name, TEXT), table.column(index).cast(TEXT))
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
    """The columns of `schema` in its types, whatever other tools wrote them as."""
    columns = [_fitting(table.column(field.name), field, f"{where}: column {field.name}") for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _fitting(column: pa.ChunkedArray, field: pa.Field, where: str) -> pa.ChunkedArray:
    try:
        fitting = (_texts(column) if field.type in (TEXT, ENUM) else column).cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, TypeError) as error:
        wanted = "text" if field.type in (TEXT, ENUM) else field.type
        raise DataError(f"{where} is {column.type}, not {wanted}: {_first_line(error)}.") from None
    if not field.nullable and fitting.null_count:
        row = pc.index(fitting.is_null(), True).as_py()
        raise DataError(
            f"{where} has empty values where none is allowed: {fitting.null_count}, the first in row {row}."
        )
    return fitting


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of texts as it is, one of numbers as texts: pandas keeps ids as int64, and as double beside a NaN."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        return column.cast(kind).cast(TEXT)
    if pa.types.is_floating(kind):
        numbers, place = np.unique(column.cast(kind).to_numpy().astype(np.float64), return_inverse=True)
        names = pa.array([_number_text(number) for number in numbers.tolist()], TEXT)
        return pa.chunked_array([names.take(pa.array(place))])
    is_ = pa.types  # bytes are texts of tools that do not say so
    texts = (is_.is_string, is_.is_large_string, is_.is_string_view, is_.is_binary, is_.is_large_binary, is_.is_null)
    if not any(test(kind) for test in texts):
        raise TypeError("its values are neither texts nor numbers")
    return column.cast(TEXT) if kind != TEXT else column


def _number_text(number: float) -> str | None:
    """A whole number without its point; None for NaN, which stands for an absent value."""
    if np.isnan(number):
        return None
    return str(int(number)) if np.isfinite(number) and number == round(number) else repr(number)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """Turn Arrow's complaints about a file into an error that names it."""
    if not path.is_file():
        raise DataError(f"No {name or 'such'} table at {path}.", hint="Run the stage that writes it, or give its path.")
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {_first_line(error)}.") from None


def _check_columns(path: Path, name: str, wanted: Sequence[str], found: pa.Schema) -> None:
    missing = [column for column in wanted if column not in found.names]
    if missing:
        needed = ", ".join(field.name for field in SCHEMAS[name] if not field.nullable)
        raise DataError(
            f"Table {path} ({name}) lacks the column(s) {', '.join(missing)}.", hint=f"It must have {needed}."
        )


def _footer(path: Path, found: pa.Schema) -> dict[str, Any]:
    raw = (found.metadata or {}).get(_FOOTER_KEY)
    try:
        facts = json.loads(raw) if raw is not None else {}
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise DataError(f"The footer of {path} is damaged.", hint="Write the table again.")
    return facts


def _check_footer(path: Path, name: str, found: pa.Schema) -> None:
    facts = _footer(path, found)
    if not facts:
        return  # A table made by other tools is welcome as long as its columns fit.
    if facts.get("table") != name:
        raise DataError(f"{path} holds the table {facts.get('table')}, not {name}.")
    if facts.get("version") != version(name):
        raise DataError(
            f"{path} is version {facts.get('version')} of the {name} table; this reidctl reads version "
            f"{version(name)}.",
            hint="Write it again with this version.",
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
