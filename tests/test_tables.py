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


def labels(count):
    return embeddings(np.eye(2)[[0] * count]).drop(columns="embedding")


def unit(rows, width):
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("numbers", [1, 10, 1 << 22])
def test_a_matrix_is_written_like_a_list_of_its_rows_whatever_the_block(tmp_path, numbers, monkeypatch):
    values = unit(9, 4)
    tables.write_table(tmp_path / "rows.parquet", "embeddings", embeddings(values))
    monkeypatch.setattr(tables, "_NUMBERS", numbers)
    tables.write_table(tmp_path / "whole.parquet", "embeddings", labels(9), matrices={"embedding": values})
    first, second = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("rows", "whole"))
    assert first.schema.equals(second.schema, check_metadata=True)
    assert first.to_pylist() == second.to_pylist()


def test_matrices_can_be_arrow_tables_strided_or_of_double_precision(tmp_path):
    values = unit(9, 4)
    strided = np.asfortranarray(values.astype(np.float64))
    table = pa.Table.from_pandas(labels(9), preserve_index=False)
    tables.write_table(tmp_path / "e.parquet", "embeddings", table, matrices={"embedding": strided})
    back = tables.matrix(tables.read_table(tmp_path / "e.parquet", "embeddings")["embedding"])
    assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", [list, np.asarray, lambda row: np.asarray(row, np.float64)])
def test_a_vector_column_may_hold_lists_or_arrays(tmp_path, kind):
    column = pd.Series([kind([0.25, 0.5]), kind([1.0]), kind([])])
    frame = pd.DataFrame({"style_id": list("abc"), "size": 1, "instruction": "", "exemplars": [["x"]] * 3})
    tables.write_table(tmp_path / "s.parquet", "styles", frame.assign(centroid=column))
    back = tables.read_table(tmp_path / "s.parquet", "styles")["centroid"]
    assert [list(row) for row in back] == [[0.25, 0.5], [1.0], []]


@pytest.mark.parametrize("row", [[2.0, 0, 0, 0], [np.nan, 0, 0, 0], [0, 0, 0, 0]])
def test_a_matrix_with_a_vector_that_is_not_of_unit_length_leaves_no_file(tmp_path, row):
    values = unit(9, 4)
    values[7] = row
    with pytest.raises(DataError, match="i7"):
        tables.write_table(tmp_path / "e.parquet", "embeddings", labels(9), matrices={"embedding": values})
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_different_width_are_refused(tmp_path):
    with (
        pytest.raises(DataError, match="width 3 among width 4"),
        tables.TableWriter(tmp_path / "e.parquet", "embeddings") as writer,
    ):
        writer.write(labels(2), matrices={"embedding": unit(2, 4)})
        writer.write(labels(2), matrices={"embedding": unit(2, 3)})


def test_facts_stand_in_the_footer_beside_table_and_version(tmp_path):
    path, facts = tmp_path / "t.parquet", {"model": "ab" * 32, "preprocessing": {"image_size": [384, 128]}}
    tables.write_table(path, "images", images(), facts=facts)
    assert tables.footer(path) == {"table": "images", "version": 1, **facts}
    assert len(tables.read_table(path, "images")) == 2
    tables.write_table(path, "images", images())
    assert tables.footer(path) == {"table": "images", "version": 1}


def test_the_footer_of_other_tools_is_empty_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write_table(path, "images", images())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    assert tables.footer(path) == {}
    for damaged in (b"{", b"[]", b"\xff"):
        pq.write_table(table.replace_schema_metadata({b"reidctl": damaged}), path)
        for read in (lambda: tables.footer(path), lambda: tables.read_table(path, "images")):
            with pytest.raises(DataError, match=r"footer of .*t\.parquet is damaged"):
                read()
    with pytest.raises(DataError, match="No such table"):
        tables.footer(tmp_path / "gone.parquet")


def test_labels_come_as_categories_and_lack_what_the_file_lacks(tmp_path):
    path = tmp_path / "e.parquet"
    tables.write_table(
        path, "embeddings", labels(3).assign(camera_id=["c0", None, "c1"]), matrices={"embedding": unit(3, 2)}
    )
    found = tables.read_labels(path, "embeddings", extra=["outfit_id"])
    assert found["item_id"].tolist() == ["i0", "i1", "i2"] and str(found["item_id"].dtype) == "string"
    assert "embedding" not in found and "outfit_id" not in found
    assert all(str(found[name].dtype) == "category" for name in found if name != "item_id")
    assert found["camera_id"].isna().tolist() == [False, True, False]
    assert found["camera_id"].tolist()[::2] == ["c0", "c1"]
    table = pq.read_table(path).drop_columns("camera_id")
    pq.write_table(table.append_column("outfit_id", pa.array(["a", "b", None])), path)
    found = tables.read_labels(path, "embeddings", extra=["outfit_id"])
    assert found["camera_id"].isna().all() and found["outfit_id"].tolist()[:2] == ["a", "b"]


def test_an_empty_value_is_named_by_column_count_and_row(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write_table(path, "images", images(3))
    table = pq.read_table(path)
    people = pa.array(["a", None, None])
    pq.write_table(table.set_column(table.schema.get_field_index("person_id"), "person_id", people), path)
    with pytest.raises(DataError, match="person_id has empty values where none is allowed: 2, the first in row 1"):
        tables.read_table(path, "images")


def test_pieces_have_the_rows_of_the_file_in_order_and_a_null_has_width_zero(tmp_path, monkeypatch):
    path = tmp_path / "e.parquet"
    rows = [[1.0, 0.0], None, [0.0, 1.0, 0.0], [None, 1.0]]
    table = pa.Table.from_pandas(labels(4), preserve_index=False)
    pq.write_table(table.append_column("embedding", pa.array(rows, pa.list_(pa.float32()))), path, row_group_size=3)
    for numbers in (1, 1 << 22):
        monkeypatch.setattr(tables, "_NUMBERS", numbers)
        pieces = list(tables.vector_pieces(path, "embeddings", "embedding"))
        assert np.concatenate([widths for widths, _ in pieces]).tolist() == [2, 0, 3, 2]
        np.testing.assert_array_equal(np.concatenate([found for _, found in pieces]), [1, 0, 0, 1, 0, np.nan, 1])


def test_lengths_of_rows_do_not_depend_on_the_block(monkeypatch):
    values = unit(50, 7) * np.arange(1, 51, dtype=np.float32)[:, None]
    whole = tables.norms_of(values)
    np.testing.assert_allclose(whole, np.arange(1, 51), rtol=1e-6)
    monkeypatch.setattr(tables, "_NUMBERS", 1)
    assert tables.norms_of(values).tobytes() == whole.tobytes()


def foreign_labels(tmp_path, **changes):
    """As pandas writes them: no footer of ours, column types of its choice."""
    path = tmp_path / "e.parquet"
    labels(3).assign(embedding=[[1.0, 0.0]] * 3, **changes).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([3, 0, -1], ["3", "0", "-1"]),
        ([3.0, np.nan, 2.0**53], ["3", None, str(2**53)]),
        ([3.0, None, 1.5], ["3", None, "1.5"]),
        (pd.array([3, None, 12], "Int64"), ["3", None, "12"]),
        (pd.Categorical([3, None, 3]), ["3", None, "3"]),
        (np.array([3, 0, 255], np.uint8), ["3", "0", "255"]),
        (np.array([3, np.nan, 2], np.float16), ["3", None, "2"]),
        ([None, None, None], [None] * 3),
        (["c1", None, "c2"], ["c1", None, "c2"]),
        (pd.Categorical(["c1", None, "c2"]), ["c1", None, "c2"]),
    ],
)
@pytest.mark.parametrize("read", [tables.read_labels, tables.read_table])
def test_numbers_of_other_tools_are_read_as_texts_and_nan_as_nothing(tmp_path, column, expected, read):
    path = foreign_labels(tmp_path, camera_id=column)
    found = read(path, "embeddings")["camera_id"]
    assert [None if pd.isna(value) else value for value in found] == expected


def test_ids_people_and_outfits_may_be_numbers_too(tmp_path):
    path = foreign_labels(tmp_path, item_id=[7, 8, 9], person_id=[1.0, 2.0, -1.0], outfit_id=[1.0, np.nan, 2.0])
    found = tables.read_labels(path, "embeddings", extra=["outfit_id"])
    assert found["item_id"].tolist() == ["7", "8", "9"]
    assert found["person_id"].tolist() == ["1", "2", "-1"]
    assert found["outfit_id"].tolist()[::2] == ["1", "2"] and pd.isna(found["outfit_id"][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_id": [True, False, True]}, r"column camera_id is bool, not text: its values are neither"),
        ({"camera_id": pd.to_datetime(["2020", "2021", "2022"])}, r"column camera_id is timestamp.*, not text"),
        ({"camera_id": [["a"], ["b"], ["c"]]}, r"column camera_id is list.*, not text"),
        ({"person_id": [1.0, np.nan, 2.0]}, "column person_id has empty values where none is allowed: 1, .* row 1"),
    ],
)
def test_a_column_of_another_type_is_named_with_its_type(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        tables.read_labels(foreign_labels(tmp_path, **changes), "embeddings")


def test_a_number_column_of_another_type_is_named_with_both_types(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write_table(path, "images", images(2))
    table = pq.read_table(path)
    place = table.schema.get_field_index("width")
    for wide, message in ((["wide", "w"], "is string, not int32"), ([1.5, 2], "is double, not int32")):
        pq.write_table(table.set_column(place, "width", pa.array(wide)), path)
        with pytest.raises(DataError, match=f"t.parquet: column width {message}"):
            tables.read_table(path, "images")
