import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reidctl import tables
from reidctl.errors import DataError
from reidctl.retrieval import store
from reidctl.retrieval.store import from_frame, gather, parquet_source, read_embeddings, write_embeddings
from reidctl.tables import vectors


def frame(values, ids=None):
    rows = len(values)
    return pd.DataFrame(
        {
            "item_id": ids or [f"i{n}" for n in range(rows)],
            "role": "gallery",
            "modality": "image",
            "condition": "standard",
            "dataset": "toy",
            "split": "test",
            "person_id": [f"toy:{n}" for n in range(rows)],
            "camera_id": None,
            "embedding": list(values),
        }
    )


def unit(rows, width, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def save(path, values, kind=None, **changes):
    """As another tool would: no footer of ours, the vector type of its choice, few rows per row group."""
    labels = frame(values).drop(columns=["embedding", "camera_id"]).assign(**changes)
    table = pa.Table.from_pandas(labels, preserve_index=False)
    column = pa.array(
        [None if row is None else list(map(float, row)) for row in values], kind or pa.list_(pa.float32())
    )
    pq.write_table(table.append_column("embedding", column), path, row_group_size=7)
    return path


def test_embeddings_survive_a_round_trip_bit_by_bit(tmp_path):
    table = from_frame(frame(vectors(unit(5, 8))))
    write_embeddings(tmp_path / "embeddings.parquet", table, facts={"model": "abc"})
    again = read_embeddings(tmp_path / "embeddings.parquet")
    assert again.vectors.tobytes() == table.vectors.tobytes()
    assert again.rows["item_id"].tolist() == table.rows["item_id"].tolist()
    assert list(again.rows.columns) == [c for c in table.rows.columns]
    assert tables.footer(tmp_path / "embeddings.parquet")["model"] == "abc"
    again.vectors[0] = 0  # ours, not Arrow's read-only memory


@pytest.mark.parametrize(
    ("row", "message"),
    [([np.nan, 0.0], "NaN"), ([0.0, 0.0], "all zeros"), ([2.0, 0.0], "length 1"), ([1.0, 0.0, 0.0], "another width")],
)
def test_a_damaged_vector_is_named_by_row_and_item(row, message):
    with pytest.raises(DataError, match=rf"row 1 \(i1\).*{message}"):
        from_frame(frame([[1.0, 0.0], row, [0.0, 1.0]]))


def test_an_item_twice_under_one_condition_is_refused():
    with pytest.raises(DataError, match=r"row 1 \(a\) occurs twice"):
        from_frame(frame([[1.0, 0.0], [0.0, 1.0]], ids=["a", "a"]))


def test_no_rows_are_fine(tmp_path):
    assert len(from_frame(frame([]))) == 0
    write_embeddings(tmp_path / "e.parquet", from_frame(frame([])))
    assert len(read_embeddings(tmp_path / "e.parquet")) == 0


def test_selection_keeps_rows_and_vectors_together():
    table = from_frame(frame(list(np.eye(3, dtype=np.float32))))
    for keep in (np.array([False, True, True]), np.array([1, 2])):
        part = table.select(keep)
        assert part.rows["item_id"].tolist() == ["i1", "i2"]
        assert part.vectors.tolist() == np.eye(3)[1:].tolist()
        assert np.shares_memory(part.vectors, table.vectors)  # a million neighbours are not copied
    assert table.select([2, 0]).vectors.tolist() == np.eye(3)[[2, 0]].tolist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float32(), 6),
        pa.large_list(pa.float64()),
        pa.list_(pa.float16()),
    ],
    ids=str,
)
def test_vectors_of_other_tools_are_read_whatever_their_list_type(tmp_path, kind):
    values = unit(40, 6)
    table = read_embeddings(save(tmp_path / "e.parquet", values, kind))
    assert table.vectors.dtype == np.float32
    np.testing.assert_allclose(table.vectors, values, atol=5e-4 if "half" in str(kind) else 0)
    assert table.rows["item_id"].tolist() == [f"i{n}" for n in range(40)]
    assert table.rows["camera_id"].isna().all()


@pytest.mark.parametrize("numbers", [1, 13, 100, 1 << 22])
def test_the_size_of_the_pieces_changes_nothing(tmp_path, numbers, monkeypatch):
    monkeypatch.setattr(tables, "_NUMBERS", numbers)
    table = from_frame(frame(vectors(unit(40, 6))))
    write_embeddings(tmp_path / "e.parquet", table)
    again = read_embeddings(tmp_path / "e.parquet")
    assert again.vectors.tobytes() == table.vectors.tobytes()
    assert again.rows["person_id"].tolist() == table.rows["person_id"].tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([np.nan] * 6, r"row 23 \(i23\) holds NaN or infinite values; 2 such"),
        ([np.inf] + [0.0] * 5, r"row 23 \(i23\) holds NaN or infinite values; 2 such"),
        ([0.0] * 6, r"row 23 \(i23\) is all zeros; 2 such"),
        ([0.5] * 6, r"row 23 \(i23\) does not have length 1; 2 such.*Divide every vector"),
        ([1.0], r"row 23 \(i23\) has another width than the first row \(6\); 2 such"),
        (None, r"row 23 \(i23\) has no vector; 2 such"),
    ],
)
def test_damage_beyond_the_first_row_group_is_named_by_file_row_item_and_count(tmp_path, row, message):
    values = [*unit(40, 6)]
    values[23] = values[31] = row
    with pytest.raises(DataError, match=rf"e\.parquet: {message}"):
        read_embeddings(save(tmp_path / "e.parquet", values))


def test_a_number_missing_inside_a_vector_counts_as_nan(tmp_path):
    path = save(tmp_path / "e.parquet", unit(3, 2))
    column = pa.array([[1.0, 0.0], [None, 1.0], [0.0, 1.0]], pa.list_(pa.float32()))
    pq.write_table(pq.read_table(path).drop_columns("embedding").append_column("embedding", column), path)
    with pytest.raises(DataError, match=r"row 1 \(i1\) holds NaN"):
        read_embeddings(path)


def test_files_are_read_into_one_matrix_and_rows_are_counted_per_file(tmp_path):
    one = save(tmp_path / "one.parquet", unit(9, 4))
    two = save(tmp_path / "two.parquet", unit(5, 4, 1), item_id=[f"j{n}" for n in range(5)], outfit_id=list("aabbc"))
    table = gather([parquet_source(one), parquet_source(two, extra=("outfit_id",))])
    assert table.vectors.tobytes() == np.concatenate([unit(9, 4), unit(5, 4, 1)]).tobytes()
    assert table.rows["item_id"].tolist() == [f"i{n}" for n in range(9)] + [f"j{n}" for n in range(5)]
    assert table.rows["outfit_id"].iloc[:9].isna().all() and table.rows["outfit_id"].iloc[9:].tolist() == list("aabbc")
    table.vectors[11] *= 2
    with pytest.raises(DataError, match=r"two: row 2 \(j2\) does not have length 1; 1 such"):
        store.check(table, where=[("one", 9), ("two", 5)])


def test_files_of_different_width_are_refused_with_both_widths(tmp_path):
    files = [save(tmp_path / "one.parquet", unit(9, 4)), save(tmp_path / "two.parquet", unit(5, 3))]
    with pytest.raises(DataError, match=r"two\.parquet holds vectors of width 3, .*one\.parquet of width 4"):
        gather([parquet_source(path) for path in files])


def pieces_of(values, steps):
    """The rows of a matrix in pieces of the given sizes, as a reader that drops rows yields them."""
    starts = np.cumsum([0, *steps])
    assert starts[-1] == len(values)
    return [(np.full(n, values.shape[1]), values[a : a + n].reshape(-1)) for a, n in zip(starts, steps, strict=False)]


@pytest.mark.parametrize("steps", [(0, 5), (2, 0, 3), (5, 0), (0, 0, 1, 0, 4, 0)])
def test_a_piece_without_rows_may_stand_anywhere(steps):
    values = unit(5, 3)
    source = store.Source("one", frame(values).drop(columns="embedding"), pieces_of(values, steps))
    nothing = store.Source("none", frame(values[:0]).drop(columns="embedding"), pieces_of(values[:0], (0, 0)))
    for sources in ([source], [nothing, source]):
        fresh = [store.Source(one.name, one.rows, list(one.pieces)) for one in sources]
        assert gather(fresh).vectors.tobytes() == values.tobytes()
    assert len(gather([nothing])) == 0


@pytest.mark.parametrize("steps", [(6,), (2, 4), (3, 3)])
def test_dropped_rows_take_their_numbers_with_them_also_where_widths_differ(steps):
    dropped = np.array([True, True, False, True, False, True])
    widths, numbers = np.array([2, 3, 2, 0, 2, 1]), np.arange(10, dtype=np.float32)
    place, row, pieces = np.cumsum([0, *widths]), 0, []
    for n in steps:
        pieces.append((widths[row : row + n], numbers[place[row] : place[row + n]]))
        row += n
    rows = frame(unit(6, 2)).drop(columns="embedding")
    table = gather([store.without(store.Source("one", rows, pieces), dropped)])
    assert table.rows["item_id"].tolist() == ["i2", "i4"]
    assert table.vectors.tolist() == [[5, 6], [7, 8]]


def test_vectors_of_width_zero_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"row 0 \(i0\) has no vector; 3 such"):
        read_embeddings(save(tmp_path / "e.parquet", np.zeros((3, 0))))


def test_vectors_that_no_memory_can_hold_are_refused_with_their_size():
    with pytest.raises(DataError, match=r"10,000,000,000,000 vectors of width 512 need 19073486\.3 GiB"):
        store._allocated(10**13, 512)


def test_a_column_that_is_no_vector_and_a_missing_one_are_named(tmp_path):
    path = save(tmp_path / "e.parquet", unit(3, 2))
    pq.write_table(pq.read_table(path).set_column(7, "embedding", pa.array(["a", "b", "c"])), path)
    with pytest.raises(DataError, match=r"Column embedding of .* is string"):
        read_embeddings(path)
    pq.write_table(pq.read_table(path).drop_columns("embedding"), path)
    with pytest.raises(DataError, match=r"lacks the column\(s\) embedding"):
        read_embeddings(path)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200,000 x 64 in a single row group, the worst case for a reader."""
    rows, path = 200_000, tmp_path_factory.mktemp("many") / "e.parquet"
    labels = pa.table(
        {
            "item_id": [f"camera/{n:07d}.jpg" for n in range(rows)],
            "person_id": [f"toy:{n // 20}" for n in range(rows)],
            **{
                name: pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [value])
                for name, value in {
                    "role": "gallery",
                    "modality": "image",
                    "condition": "standard",
                    "dataset": "toy",
                    "split": "test",
                }.items()
            },
        }
    )
    values = unit(rows, 64)
    column = pa.ListArray.from_arrays(np.arange(0, values.size + 1, 64, dtype=np.int32), values.reshape(-1))
    pq.write_table(labels.append_column("embedding", column), path, row_group_size=rows, use_dictionary=["role"])
    return path, values


def test_reading_makes_no_python_object_per_row(many):
    path, values = many
    read_embeddings(path)  # imports and caches
    before, most = sys.getallocatedblocks(), 0
    for _ in tables.vector_pieces(path, "embeddings", "embedding"):
        most = max(most, sys.getallocatedblocks() - before)
    assert most < 5_000
    table = read_embeddings(path)
    # 10,000 people are 10,000 texts; the 200,000 items are not.
    assert sys.getallocatedblocks() - before < 30_000
    assert table.vectors.tobytes() == values.tobytes()


MEASURE = """
import sys, tracemalloc
from pathlib import Path
import pyarrow as pa
from reidctl.retrieval.store import read_embeddings
tracemalloc.start()
table = read_embeddings(Path(sys.argv[1]))
print(table.vectors.nbytes, tracemalloc.get_traced_memory()[1], pa.default_memory_pool().max_memory())
"""


def test_reading_holds_little_beside_the_matrix_even_from_one_huge_row_group(many):
    path, values = many
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(store.__file__).parents[2])
    matrix, python, arrow = map(int, done.stdout.split())
    assert matrix == values.nbytes == 51_200_000
    assert arrow < 110e6  # a piece of 16 MiB in the making (numbers and levels), and the labels
    assert python - matrix < 40e6  # a block in float64, norms, codes of the ids
