import io
import struct
import zipfile

import numpy as np
import pytest

from reidctl.errors import DataError
from reidctl.evaluation import archive
from reidctl.evaluation.given import protocols_of, read_given


def unit(rows, width=8, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def whole(**changes):
    """Two queries among four images; `changes` replace arrays, None removes one."""
    arrays = {"query_features": unit(2), "query_pids": [1, 2], "gallery_features": unit(4, seed=1)}
    arrays |= {"gallery_pids": [1, 2, 0, -1]} | changes
    return {name: values for name, values in arrays.items() if values is not None}


def packed(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def header(shape, kind="<i8"):
    """An array's beginning, whatever follows."""
    text = str({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def members(path, changes, compression=zipfile.ZIP_DEFLATED):
    """A whole archive whose members are replaced by raw bytes, or removed by None."""
    raw = {f"{name}.npy": packed(values) for name, values in whole().items()} | changes
    with zipfile.ZipFile(path, "w", compression) as stream:
        for name, payload in raw.items():
            if payload is not None:
                stream.writestr(name, payload)
    return path


def measured(path):
    """What is left of the files for measuring: the protocols, and the notes."""
    given = read_given([path])
    return protocols_of(given.table, split="test")[0], given.notes


@pytest.mark.parametrize("block", [1, 16, 40, 1 << 22])
@pytest.mark.parametrize("junk", [range(0, 9), range(9, 20), range(21, 30), [*range(0, 9), 12, *range(21, 30)]])
def test_junk_may_fill_whole_blocks_at_the_start_in_the_middle_and_at_the_end(tmp_path, monkeypatch, junk, block):
    # Market-1501's 3,819 junk images sort first, so the first block of its gallery holds nobody.
    monkeypatch.setattr(archive, "_BLOCK", block)
    vectors, people = unit(30, seed=1), np.arange(30) % 5
    people[list(junk)] = -1
    np.savez(tmp_path / "e.npz", **whole(gallery_features=vectors, gallery_pids=people))
    (protocol,), notes = measured(tmp_path / "e.npz")
    assert protocol.gallery.vectors.tobytes() == vectors[people >= 0].tobytes()
    assert protocol.gallery.item.tolist() == [f"gallery{row}" for row in np.flatnonzero(people >= 0)]
    assert any(f"{len(junk)} item(s) with person -1 are junk" in note for note in notes)


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_side_of_nothing_but_junk_is_refused_by_name(tmp_path, monkeypatch, side, block):
    monkeypatch.setattr(archive, "_BLOCK", block)
    np.savez(tmp_path / "e.npz", **whole(**{f"{side}_pids": [-1] * (2 if side == "query" else 4)}))
    with pytest.raises(DataError, match=f"No rows with role {side}"):
        measured(tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pid": [0, 1]}, r"unknown array\(s\) query_pid"),
        ({"query_pids": None}, r"lacks the array\(s\) query_pids"),
        ({"query_pids": [0, 1, 2]}, r"query_pids has shape \(3,\).*2 row"),
        ({"query_pids": [[0], [1]]}, r"query_pids has shape \(2, 1\).*2 row"),
        ({"query_pids": 1}, r"query_pids has shape \(\)"),
        ({"query_pids": np.array([0, None])}, "query_pids holds Python objects.*Save plain arrays"),
        ({"query_pids": [True, False]}, "query_pids has type bool.*whole numbers or short texts"),
        ({"query_pids": np.array(["2020", "2021"], "M8[Y]")}, r"query_pids has type datetime64\[Y\]"),
        ({"query_pids": np.zeros(2, [("a", "i4")])}, "query_pids has type .*'a'"),
        ({"query_pids": np.zeros(2, complex)}, "query_pids has type complex128"),
        ({"query_pids": np.array(["a" * 5000, "b"])}, "query_pids has type <U5000"),
        ({"query_pids": [0, np.nan]}, "has the person_id ``"),
        ({"query_features": np.ones(2)}, r"query_features has shape \(2,\)"),
        ({"query_features": np.ones((2, 0))}, r"query_features has shape \(2, 0\)"),
        ({"query_features": np.ones((2, 0)), "gallery_features": np.ones((4, 0))}, r"features has shape \(\d, 0\)"),
        ({"query_features": np.eye(2, 8, dtype=int)}, "type int64"),
        ({"query_features": np.array([[None]])}, "query_features holds Python objects"),
        ({"query_features": np.asfortranarray(unit(2))}, "column by column"),
        ({"query_features": unit(2, 5)}, r"query_features has width 5, gallery_features has width 8\. Queries and"),
        ({"query_features": None, "query_pids": None}, "No rows with role query"),
        ({"dataset": ["a", "b"]}, r"dataset has shape \(2,\)"),
        ({"dataset": []}, r"dataset has shape \(0,\)"),
        (dict.fromkeys(whole()), "lacks the array"),
    ],
)
def test_a_wrong_archive_is_refused_by_name(tmp_path, changes, message):
    np.savez(tmp_path / "e.npz", **whole(**changes))
    with pytest.raises(DataError, match=message) as error:
        measured(tmp_path / "e.npz")
    assert "e.npz" in str(error.value) or "split test" in str(error.value)
    assert "reidctl index" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pids.npy": None, "query_pids": packed([1, 2])}, "holds query_pids, which is no NumPy array"),
        ({"query_features.npy": None, "query_features": packed(unit(2))}, "holds query_features, which is no NumPy"),
        ({"readme.txt": b"hello"}, "holds readme.txt, which is no NumPy array"),
        ({"query_pids.npy": b""}, "query_pids is no NumPy array: EOF"),
        ({"query_pids.npy": b"hello world"}, "query_pids is no NumPy array: the magic string"),
        ({"query_features.npy": b"hello world"}, "query_features is no NumPy array: the magic string"),
        ({"query_pids.npy": header("((((")}, "query_pids is no NumPy array: shape"),
        ({"query_pids.npy": b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64}, "query_pids is no NumPy array"),
        ({"query_pids.npy": b"\x93NUMPY\x01\x00\x40\x00" + b"{[]: 1}".ljust(64)}, "query_pids is no NumPy array"),
        ({"query_pids.npy": header((10**13,))}, r"query_pids is damaged: .* needs 80,000,000,000,000 bytes.* are 0"),
        ({"query_features.npy": header((2, 10**13), "<f4")}, "query_features is damaged"),
        ({"query_features.npy": header((2, -8), "<f4")}, "query_features is damaged"),
        ({"query_features.npy": packed(unit(2))[:-4]}, "query_features is damaged: .* needs 64 bytes, .* are 60"),
    ],
)
def test_a_member_that_is_no_whole_array_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"e\.npz.*{message}"):
        measured(members(tmp_path / "e.npz", changes))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(tmp_path):
    path = members(tmp_path / "e.npz", {})
    with zipfile.ZipFile(path, "a") as stream:
        stream.writestr("query_pids.npy", packed([1, 2]))
    with pytest.raises(DataError, match=r"e\.npz holds query_pids\.npy twice"):
        measured(path)


@pytest.mark.parametrize("name", ["gallery_camids", "dataset"])
def test_an_array_that_is_too_large_for_its_place_is_never_inflated(tmp_path, monkeypatch, name):
    def load(*_, **__):
        raise AssertionError("loaded")

    path = tmp_path / "e.npz"
    np.savez_compressed(
        path, **whole(**{"query_camids": [1, 2], "gallery_camids": 4 * [3], name: np.zeros(10**6, int)})
    )
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(np.lib.format, "read_array", load)
    with pytest.raises(DataError, match=rf"{name} has shape \(1000000,\)"):
        measured(path)


@pytest.mark.parametrize(
    ("local", "central", "value", "message"),
    [(8, 10, 99, "compression method is not supported"), (6, 8, 1, "encrypted")],
)
def test_an_archive_with_an_unknown_compression_or_a_password_is_refused(tmp_path, local, central, value, message):
    path = members(tmp_path / "e.npz", {}, zipfile.ZIP_STORED)
    raw = path.read_bytes()
    for mark, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        parts = raw.split(mark)
        raw = mark.join([parts[0], *(p[: place - 4] + bytes([value]) + p[place - 3 :] for p in parts[1:])])
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"e\.npz cannot be read: .*{message}"):
        measured(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whatever_bytes_are_changed_the_archive_is_read_or_refused_by_name(tmp_path, compression):
    path, rng = tmp_path / "e.npz", np.random.default_rng(0)
    raw = np.frombuffer(members(path, {}, compression).read_bytes(), np.uint8)
    assert len(measured(path)[0]) == 1
    for _ in range(150):
        damaged = raw.copy()
        damaged[rng.integers(0, len(raw), rng.integers(1, 4))] = rng.integers(0, 256)
        path.write_bytes(damaged[: len(raw) if rng.random() < 0.9 else rng.integers(0, len(raw))].tobytes())
        try:
            read_given([path])
        except DataError as error:
            assert "e.npz" in str(error)


def test_a_file_of_another_width_is_named_beside_the_first(tmp_path):
    np.savez(tmp_path / "q.npz", query_features=unit(2, 5), query_pids=[1, 2])
    np.savez(tmp_path / "g.npz", gallery_features=unit(4), gallery_pids=[1, 2, 0, 0])
    with pytest.raises(DataError, match=r"g\.npz holds vectors of width 8, .*q\.npz of width 5"):
        read_given([tmp_path / "q.npz", tmp_path / "g.npz"])


@pytest.mark.parametrize("value", ["m", ["m"], [["m"]], b"m", np.array([b"m"])])
def test_a_fact_is_one_text_in_any_shape(tmp_path, value):
    np.savez(tmp_path / "e.npz", **whole(dataset=value, model=["abc"]))
    given = read_given([tmp_path / "e.npz"])
    assert given.table.rows["person_id"].tolist() == ["m:1", "m:2", "m:1", "m:2", "m:0"]
    assert list(given.models.values()) == ["abc"]


def test_people_cameras_and_ids_may_be_of_any_type_of_number_or_text(tmp_path):
    expected = None
    for people in (np.array([1, 2], ">i8"), np.array([1.0, 2.0]), np.array(["1", "2"]), np.array([b"1", b"2"])):
        cameras = np.array([-1.0, 3.0]) if people.dtype.kind == "f" else [-1, 3]
        changes = dict(query_pids=people, query_camids=cameras, query_ids=["a", "b"], gallery_camids=4 * [7])
        np.savez(tmp_path / "e.npz", **whole(**changes))
        rows = read_given([tmp_path / "e.npz"]).table.rows.astype(object).fillna("nothing").to_dict("list")
        assert rows["person_id"][:2] == ["given:1", "given:2"] and rows["camera_id"][:2] == ["nothing", "3"]
        expected = expected or rows
        assert rows == expected


def test_cameras_of_one_side_alone_are_refused(tmp_path):
    np.savez(tmp_path / "e.npz", **whole(gallery_camids=4 * [7]))
    with pytest.raises(DataError, match="gallery_camids alone"):
        measured(tmp_path / "e.npz")
