"""The table of embeddings as one object: a matrix and, row by row, what each vector belongs to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError
from reidctl.tables import matrix, read_table, vectors, write_table

KEY = ["item_id", "role", "modality", "condition"]
_TOLERANCE = 1e-3


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
        """Return the rows that a boolean mask or an array of positions picks."""
        chosen = np.asarray(keep)
        positions = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return EmbeddingTable(self.rows.iloc[positions].reset_index(drop=True), self.vectors[positions])


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
    _refuse(frame, widths != (widths[0] if len(widths) else 0), where, "has another width than row 0")
    table = EmbeddingTable(frame.drop(columns="embedding").reset_index(drop=True), matrix(frame["embedding"]))
    check(table, where=where)
    return table


def check(table: EmbeddingTable, *, where: str = "embeddings") -> None:
    """Raise what `from_frame` raises for vectors and ids that cannot be searched."""
    norms = np.linalg.norm(table.vectors.astype(np.float64), axis=1)
    _refuse(table.rows, ~np.isfinite(norms), where, "holds NaN or infinite values")
    _refuse(table.rows, norms == 0, where, "is all zeros")
    _refuse(table.rows, np.abs(norms - 1) > _TOLERANCE, where, "does not have length 1")
    _refuse(
        table.rows, table.rows.duplicated(KEY).to_numpy(), where, "occurs twice with one role, modality and condition"
    )


def _refuse(rows: pd.DataFrame, wrong: npt.NDArray[np.bool_], where: str, what: str) -> None:
    found = np.flatnonzero(wrong)
    if len(found):
        row = int(found[0])
        raise DataError(
            f"{where}: row {row} ({rows['item_id'].iloc[row]}) {what}; {len(found)} such row(s).",
            hint="Write the embeddings again with `reidctl index`.",
        )


def read_embeddings(path: Path) -> EmbeddingTable:
    """Return the checked table at `path`.

    Raises:
        DataError: the table cannot be read, or see `from_frame`.
    """
    return from_frame(read_table(path, "embeddings"), where=str(path))


def write_embeddings(path: Path, table: EmbeddingTable) -> None:
    """Write `table` to `path`.

    Raises:
        DataError: the table cannot be written, or see `from_frame`.
    """
    check(table, where=str(path))
    column = pd.Series(vectors(table.vectors), index=table.rows.index, dtype=object)
    write_table(path, "embeddings", table.rows.assign(embedding=column))
