"""Tables of embeddings as objects: a matrix and, row by row, what each vector belongs to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError
from reidctl.tables import matrix, norms_of, read_labels, vector_pieces, write_table

KEY = ["item_id", "role", "modality", "condition"]
_TOLERANCE = 1e-3
_BLOCK = 8192

# The width of every row of a piece, and all numbers of the piece in a row.
Piece = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class EmbeddingTable:
    """Unit vectors with their labels; row i of `rows` describes `vectors[i]`.

    Args:
        rows: every column of the table `embeddings` except `embedding`, shape (N,), index 0..N-1.
        vectors: shape (N, D), float32, unit norm.
    """

    rows: pd.DataFrame
    vectors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Any) -> "EmbeddingTable":
        """Return the rows that a boolean mask or an array of positions picks; neighbouring rows share the memory."""
        chosen = np.asarray(keep)
        positions = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return EmbeddingTable(self.rows.iloc[positions].reset_index(drop=True), rows_of(self.vectors, positions))


@dataclass(frozen=True)
class Stored:
    """The vectors of a model by what they are compared with; one object twice if it has one vector per image.

    Args:
        t2i: images as texts are compared with them, and the texts.
        i2i: images as they are compared with each other.
    """

    t2i: EmbeddingTable
    i2i: EmbeddingTable


@dataclass(frozen=True)
class Source:
    """Where vectors come from: a file's labels, and its vectors piece by piece.

    Args:
        name: how messages name it.
        rows: the labels, index 0..n-1.
        pieces: the vectors of these rows, in order.
    """

    name: str
    rows: pd.DataFrame
    pieces: Iterable[Piece]


def rows_of(values: npt.NDArray[np.float32], positions: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return rows of a matrix: a view where they are neighbours in order, else a copy."""
    if len(positions) and (np.diff(positions) == 1).all():
        return values[int(positions[0]) : int(positions[-1]) + 1]
    return np.asarray(values[positions])


def from_frame(frame: pd.DataFrame, *, where: str = "embeddings") -> EmbeddingTable:
    """Return a frame of the table `embeddings` as one object, checked.

    Args:
        frame: with the table's columns.
        where: how messages name the source.

    Raises:
        DataError: rows of different width, NaN, a zero vector, a length other than 1, or an item that
            occurs twice with the same role, modality and condition; the message names the row.
    """
    widths = frame["embedding"].map(len).to_numpy() if len(frame) else np.zeros(0, np.int64)
    _refuse(frame, widths != (widths[0] if len(widths) else 0), [(where, len(frame))], "has another width than row 0")
    table = EmbeddingTable(frame.drop(columns="embedding").reset_index(drop=True), matrix(frame["embedding"]))
    check(table, where=where)
    return table


def check(table: EmbeddingTable, *, where: str | Sequence[tuple[str, int]] = "embeddings") -> None:
    """Raise what `from_frame` raises for vectors and ids that cannot be searched.

    Args:
        table: to check.
        where: how messages name the source, or every source in order with its number of rows.
    """
    sources = [(where, len(table))] if isinstance(where, str) else where
    norms = norms_of(table.vectors)
    check_norms(table.rows, norms, sources)
    check_lengths(table.rows, norms, sources)
    check_ids(table.rows, sources)


def check_norms(rows: pd.DataFrame, norms: npt.NDArray[np.float64], sources: Sequence[tuple[str, int]]) -> None:
    """Refuse vectors without a direction.

    Raises:
        DataError: NaN, infinite values, or a zero vector; the message names file, row, item and count.
    """
    _refuse(rows, ~np.isfinite(norms), sources, "holds NaN or infinite values")
    _refuse(rows, norms == 0, sources, "is all zeros")


def check_lengths(
    rows: pd.DataFrame,
    norms: npt.NDArray[np.float64],
    sources: Sequence[tuple[str, int]],
    *,
    hint: str = "Divide every vector by its own length: features / numpy.linalg.norm(features, axis=1, keepdims=True).",
) -> None:
    """Refuse vectors that are not unit vectors.

    Raises:
        DataError: naming file, row, item and count.
    """
    _refuse(rows, np.abs(norms - 1) > _TOLERANCE, sources, "does not have length 1", hint)


def check_ids(rows: pd.DataFrame, sources: Sequence[tuple[str, int]]) -> None:
    """Refuse an item that occurs twice with the same role, modality and condition.

    Raises:
        DataError: naming file, row, item and count.
    """
    twice = rows.duplicated(KEY).to_numpy()
    _refuse(rows, twice, sources, "occurs twice with one role, modality and condition", "Give every item one vector.")


def normalise(vectors: npt.NDArray[np.float32], norms: npt.NDArray[np.float64]) -> None:
    """Divide the rows of a matrix (N, D) by their lengths (N,), in place."""
    for start in range(0, len(vectors), _BLOCK):
        part = vectors[start : start + _BLOCK]
        np.divide(part, norms[start : start + _BLOCK, None], out=part, casting="same_kind")


def _refuse(
    rows: pd.DataFrame,
    wrong: npt.NDArray[np.bool_],
    sources: Sequence[tuple[str, int]],
    what: str,
    hint: str = "Embed these items again (`reidctl index` does for its own models).",
) -> None:
    found = np.flatnonzero(wrong)
    if not len(found):
        return
    row = int(found[0])
    item = rows["item_id"].iloc[row]
    where = ""
    for where, count in sources:  # noqa: B007
        if row < count:
            break
        row -= count
    raise DataError(f"{where}: row {row} ({item}) {what}; {len(found)} such row(s).", hint=hint)


def read_embeddings(path: Path) -> EmbeddingTable:
    """Return the checked table at `path`; its text columns are categories, the item ids Arrow strings.

    Beside the matrix itself some 100 bytes per row and 0.1 GiB are used.

    Raises:
        DataError: the table cannot be read, or see `from_frame`.
    """
    table = gather([parquet_source(path)])
    check(table, where=str(path))
    return table


def parquet_source(path: Path, *, extra: Sequence[str] = ()) -> Source:
    """Return a table `embeddings` as a source.

    Args:
        path: the Parquet file.
        extra: text columns beyond the table's own, taken if the file has them.

    Raises:
        DataError: the table cannot be read.
    """
    rows = read_labels(path, "embeddings", extra=extra)
    return Source(str(path), rows, vector_pieces(path, "embeddings", "embedding"))


def without(source: Source, dropped: npt.NDArray[np.bool_]) -> Source:
    """Return a source without some of its rows; messages count the rows that are left."""

    def pieces() -> Iterator[Piece]:
        start = 0
        for lengths, numbers in source.pieces:
            keep = ~dropped[start : start + len(lengths)]
            start += len(lengths)
            yield lengths[keep], numbers[np.repeat(keep, lengths)]

    return Source(source.name, source.rows[~dropped].reset_index(drop=True), pieces())


def gather(sources: Sequence[Source]) -> EmbeddingTable:
    """Return all vectors in one matrix, which is filled in place, and all labels; lengths and ids are not checked.

    Raises:
        DataError: rows or sources of different width, a row without a vector, or not enough memory.
    """
    total = sum(len(source.rows) for source in sources)
    vectors = np.zeros((0, 0), np.float32)
    begin, first = 0, ""
    for source in sources:
        widths = np.zeros(len(source.rows), np.int64)
        end = begin
        for lengths, numbers in source.pieces:
            if not vectors.size and lengths.any():
                vectors, first = _allocated(total, int(lengths[lengths > 0][0])), source.name
            stop = end + len(lengths)
            widths[end - begin : stop - begin] = lengths
            # A piece of which every row was dropped has no width to infer.
            if vectors.size and (lengths == vectors.shape[1]).all():
                vectors[end:stop] = numbers.reshape(len(lengths), vectors.shape[1])
            end = stop
        _check_widths(source, widths, vectors.shape[1], first)
        begin = end
    return EmbeddingTable(_joined([source.rows for source in sources]), vectors)


def _allocated(rows: int, width: int) -> npt.NDArray[np.float32]:
    try:
        return np.empty((rows, width), np.float32)
    except (MemoryError, ValueError):
        size = rows * width * 4 / 2**30
        raise DataError(f"{rows:,} vectors of width {width} need {size:.1f} GiB of memory.") from None


def _check_widths(source: Source, widths: npt.NDArray[np.int64], wanted: int, first: str) -> None:
    origin = [(source.name, len(widths))]
    _refuse(source.rows, widths == 0, origin, "has no vector")
    if len(widths) and source.name != first and (widths == widths[0]).all() and widths[0] != wanted:
        raise DataError(
            f"{source.name} holds vectors of width {widths[0]}, {first} of width {wanted}.",
            hint="Queries and gallery must be embedded by one model.",
        )
    _refuse(source.rows, widths != wanted, origin, f"has another width than the first row ({wanted})")


def _joined(labels: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Labels of several files below each other; categories stay categories."""
    if len(labels) == 1:
        return labels[0]
    columns = list(dict.fromkeys(str(column) for rows in labels for column in rows))
    joined: dict[str, Any] = {}
    for column in columns:
        parts = [rows[column] if column in rows else _missing(len(rows)) for rows in labels]
        if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
            joined[column] = pd.api.types.union_categoricals(parts)
        else:
            joined[column] = pd.concat(parts, ignore_index=True)
    return pd.DataFrame(joined)


def _missing(count: int) -> "pd.Series[Any]":
    return pd.Series(pd.Categorical.from_codes(np.full(count, -1), categories=pd.Index([], dtype=object)))


def write_embeddings(path: Path, table: EmbeddingTable, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write `table` to `path`.

    Args:
        path: the Parquet file.
        table: what to write; it is converted block by block.
        facts: kept in the footer, e.g. `model`, the digest of what made the vectors.

    Raises:
        DataError: the table cannot be written, or see `from_frame`.
    """
    check(table, where=str(path))
    write_table(path, "embeddings", table.rows, matrices={"embedding": table.vectors}, facts=facts)
