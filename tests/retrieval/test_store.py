import numpy as np
import pandas as pd
import pytest

from reidctl.errors import DataError
from reidctl.retrieval.store import from_frame, read_embeddings, write_embeddings
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


def test_embeddings_survive_a_round_trip_bit_by_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 8))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    table = from_frame(frame(vectors(values)))
    write_embeddings(tmp_path / "embeddings.parquet", table)
    again = read_embeddings(tmp_path / "embeddings.parquet")
    assert again.vectors.tobytes() == table.vectors.tobytes()
    assert again.rows["item_id"].tolist() == table.rows["item_id"].tolist()
    assert list(again.rows.columns) == [c for c in table.rows.columns]


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


def test_no_rows_are_fine():
    assert len(from_frame(frame([]))) == 0


def test_selection_keeps_rows_and_vectors_together():
    table = from_frame(frame(list(np.eye(3, dtype=np.float32))))
    for keep in (np.array([False, True, True]), np.array([1, 2])):
        part = table.select(keep)
        assert part.rows["item_id"].tolist() == ["i1", "i2"]
        assert part.vectors.tolist() == np.eye(3)[1:].tolist()
