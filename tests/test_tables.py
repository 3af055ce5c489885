import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reidctl import tables
from reidctl.errors import DataError


def images(count=2, **changes):
    frame = pd.DataFrame(
        {
            "image_id": [f"i{n}" for n in range(count)],
            "path": [f"{n}.png" for n in range(count)],
            "dataset": "d",
            "split": "train",
            "person_id": [f"d:{n}" for n in range(count)],
            "width": 64,
            "height": 128,
            "sha256": "0",
            "attributes": [{"hair": "red"}] + [None] * (count - 1),
        }
    )
    return frame.assign(**changes)


def embeddings(vectors):
    count = len(vectors)
    return pd.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(count)],
            "role": "gallery",
            "modality": "image",
            "condition": "standard",
            "dataset": "d",
            "split": "test",
            "person_id": "d:0",
            "embedding": tables.vectors(vectors),
        }
    )


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "images.parquet"
    tables.write_table(path, "images", images())
    back = tables.read_table(path, "images")
    assert list(back["image_id"]) == ["i0", "i1"]
    assert back["attributes"].tolist() == [{"hair": "red"}, None]
    assert back["role"].tolist() == [None, None]
    assert back["width"].dtype == np.int32


def test_columns_can_be_chosen_and_keep_their_order(tmp_path):
    tables.write_table(tmp_path / "t.parquet", "images", images())
    assert list(tables.read_table(tmp_path / "t.parquet", "images", ["path", "image_id"])) == ["path", "image_id"]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (images().drop(columns="sha256"), "sha256"),
        (images(colour="red"), "colour"),
        (images(person_id=["a", None]), "person_id"),
        (images(width=["wide", "wider"]), "width"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_column_and_leaves_no_file(tmp_path, frame, message):
    with pytest.raises(DataError, match=message):
        tables.write_table(tmp_path / "t.parquet", "images", frame)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_table(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write_table(path, "images", images(3))
    with pytest.raises(RuntimeError), tables.TableWriter(path, "images") as writer:
        writer.write(images(1))
        raise RuntimeError("killed")
    assert len(tables.read_table(path, "images")) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def test_a_table_can_be_written_in_pieces(tmp_path):
    with tables.TableWriter(tmp_path / "t.parquet", "images") as writer:
        writer.write(images(2))
        writer.write(images(3))
    assert tables.rows(tmp_path / "t.parquet") == 5


def test_missing_file_column_table_and_version_are_named(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="No images table"):
        tables.read_table(path, "images")
    pq.write_table(pa.table({"image_id": ["a"]}), path)
    with pytest.raises(DataError, match="person_id"):
        tables.read_table(path, "images")
    tables.write_table(path, "images", images())
    with pytest.raises(DataError, match="holds the table images, not captions"):
        tables.read_table(path, "captions")
    newer = pq.read_table(path).replace_schema_metadata({b"reidctl": b'{"table": "images", "version": 9}'})
    pq.write_table(newer, path)
    with pytest.raises(DataError, match="version 9"):
        tables.read_table(path, "images")
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable Parquet"):
        tables.read_table(path, "images")


def test_embeddings_come_back_as_a_writable_matrix(tmp_path):
    vectors = np.eye(4, dtype=np.float32)[:3]
    tables.write_table(tmp_path / "e.parquet", "embeddings", embeddings(vectors))
    back = tables.matrix(tables.read_table(tmp_path / "e.parquet", "embeddings")["embedding"])
    assert np.array_equal(back, vectors)
    back += 1  # Arrow's memory is read-only; ours must not be


@pytest.mark.parametrize("bad", [[[2.0, 0.0]], [[np.nan, 1.0]], [[0.0, 0.0]]])
def test_an_embedding_that_is_not_a_unit_vector_is_refused_by_name(tmp_path, bad):
    with pytest.raises(DataError, match="i0"):
        tables.write_table(tmp_path / "e.parquet", "embeddings", embeddings(np.asarray(bad)))


def test_rows_of_different_width_are_refused(tmp_path):
    frame = embeddings(np.eye(2))
    frame["embedding"] = [np.asarray([1.0, 0.0]), np.asarray([1.0])]
    with pytest.raises(DataError, match="width"):
        tables.write_table(tmp_path / "e.parquet", "embeddings", frame)


@pytest.mark.parametrize("name", sorted(tables.SCHEMAS))
def test_every_table_can_be_empty(tmp_path, name):
    tables.write_table(tmp_path / "t.parquet", name, tables.empty(name))
    assert len(tables.read_table(tmp_path / "t.parquet", name)) == 0
