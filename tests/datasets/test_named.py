"""Datasets whose file names are the annotation: written from rendered people, read again, and given hostile input."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from reidctl import tables
from reidctl.datasets.base import Entry, Options, measure
from reidctl.datasets.named import Reading
from reidctl.datasets.registry import format_names, probe, reader, writer
from reidctl.errors import DataError, UsageError
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

STANDARD = ("market-1501", "dukemtmc-reid", "msmt17")
CHANGING = ("prcc", "ltcc")
ALL = STANDARD + CHANGING


def rendered(folder, **settings):
    config = SynthConfig(people=12, images_per_person=6, size=(32, 16), seed=1, **settings)
    write_dataset(config, folder, workers=1)
    return tables.read_table(folder / "images.parquet", "images"), folder


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    return rendered(tmp_path_factory.mktemp("standard"))


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    return rendered(tmp_path_factory.mktemp("changing"), variant="cloth-changing")


@pytest.fixture(scope="module")
def source(standard, changing):
    return lambda name: changing if name in CHANGING else standard


@pytest.fixture
def layout(source, tmp_path):
    """Write rendered people in a layout; return its root."""

    def write(name, out=tmp_path):
        images, folder = source(name)
        return writer(name)(images, tables.empty("captions"), folder, out)

    return write


def load(name, root, **options):
    chosen = Options(**options)
    return measure(reader(name)(root, chosen), chosen)


def draft(name, root, **options):
    return reader(name)(root, Options(**options))


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 32), colour).save(path)
    return path


def by_file(images):
    return images.set_index("sha256").sort_index()


def same_grouping(one, other):
    """Whether two series of labels, aligned by index, split their rows alike."""
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == one.nunique() == other.nunique()


# --- what is written is read again


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("market-1501", marks=pytest.mark.covers(4)),
        pytest.param("msmt17", marks=pytest.mark.covers(5)),
        pytest.param("dukemtmc-reid", marks=pytest.mark.covers(6)),
        "ltcc",
    ],
)
def test_what_a_layout_holds_comes_back(layout, source, name):
    before, after = by_file(source(name)[0]), by_file(load(name, layout(name)).images)
    assert len(before) == 72 and list(after.index) == list(before.index), "the same files"
    assert list(after["split"]) == list(before["split"].replace("val", "train"))
    test = after["split"] == "test"
    assert list(after.loc[test, "role"]) == list(before.loc[test, "role"])
    assert after.loc[~test, "role"].isna().all()
    assert list(after["camera_id"]) == list(before["camera_id"])
    assert same_grouping(before["person_id"], after["person_id"])
    assert after["person_id"].str.startswith(f"{name}:").all() and after["image_id"].is_unique


@pytest.mark.covers(12)
@pytest.mark.parametrize("name", ALL)
def test_nobody_is_in_two_splits(layout, name):
    images = load(name, layout(name), carve_val=3).images
    assert set(images["split"]) == {"train", "val", "test"}
    assert (images.groupby("person_id")["split"].nunique() == 1).all()


@pytest.mark.covers(13)
@pytest.mark.parametrize("name", ALL)
def test_people_are_carved_out_of_train_by_seed(layout, name):
    root = layout(name)
    first, again, other = (draft(name, root, carve_val=3, seed=seed).entries for seed in (5, 5, 6))
    assert first == again != other
    val = {entry.person for entry in first if entry.split == "val"}
    assert len(val) == 3 and {entry.role for entry in first if entry.split == "val"} == {"query", "gallery"}
    assert not val & {entry.person for entry in first if entry.split == "train"}
    with pytest.raises(UsageError, match="9 training people"):
        draft(name, root, carve_val=9)


@pytest.mark.parametrize("name", ALL)
def test_images_come_in_the_order_of_their_names_and_other_files_are_passed_over(layout, name):
    root = layout(name)
    before = draft(name, root).entries
    folder = before[0].path.parent
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / f"._{before[0].path.name}").write_bytes(b"macOS")
    (folder / ".hidden").mkdir()
    assert draft(name, root).entries == before
    keys = [entry.key for entry in before if entry.path.parent == folder]
    # MSMT17's order is that of its lists.
    assert name == "msmt17" or keys == sorted(keys)


@pytest.mark.parametrize("name", ALL)
def test_counts_unlike_the_release_are_said(layout, name):
    notes = " ".join(draft(name, layout(name)).notes)
    assert "train: found 9 people, 54 images" in notes and "Published numbers do not compare" in notes


# --- cloth-changing


@pytest.mark.covers(24)
def test_ltcc_queries_wear_what_their_person_never_wears_in_the_gallery(layout, source):
    after, before = by_file(load("ltcc", layout("ltcc")).images), by_file(source("ltcc")[0])
    own = after["person_id"] + after["outfit_id"]
    assert same_grouping(before["person_id"] + before["outfit_id"], own)
    assert after.groupby("outfit_id")["person_id"].nunique().eq(1).all(), "an outfit's id belongs to one person"
    assert _overlap(after[after["split"] == "test"]) == [False] * 6


@pytest.mark.covers(24)
def test_prcc_has_queries_in_the_gallery_clothes_and_in_others(layout, source):
    before, after = by_file(source("prcc")[0]), by_file(load("prcc", layout("prcc")).images)
    assert list(after.index) == list(before.index) and same_grouping(before["person_id"], after["person_id"])
    assert same_grouping(before["person_id"] + before["outfit_id"], after["outfit_id"])
    test = after[after["split"] == "test"]
    roles = {camera: set(rows["role"]) for camera, rows in test.groupby("camera_id")}
    assert roles == {"c1": {"gallery"}, "c2": {"query"}, "c3": {"query"}}
    gallery = test[test["role"] == "gallery"]
    # Every person's first gallery camera is A; the other three views of the same outfit became B.
    assert gallery.groupby("person_id").size().tolist() == [1, 1, 1]
    assert _overlap(test[test["camera_id"] != "c2"]) == [False] * 6, "C against A: other clothes"
    assert _overlap(test[test["camera_id"] != "c3"]) == [True] * 9, "B against A: the same clothes"
    # The queries of the rendered set are the C of this one.
    asked = before[(before["split"] == "test") & (before["role"] == "query")]
    assert set(asked.index) == set(test.index[test["camera_id"] == "c3"])


def _overlap(test):
    """For every query, whether its person wears its outfit in the gallery."""
    worn = test[test["role"] == "gallery"].groupby("person_id")["outfit_id"].agg(set)
    return [row.outfit_id in worn[row.person_id] for row in test[test["role"] == "query"].itertuples()]


def test_prcc_joins_val_with_train_and_carved_people_get_the_roles_of_the_test(layout):
    root = layout("prcc")
    assert list((root / "rgb" / "val").glob("*/*.png")), "the release has a folder val of training people"
    entries = draft("prcc", root, carve_val=3).entries
    assert {entry.key.split("/")[0] for entry in entries if entry.split == "train"} == {"train", "val"}
    val = {(entry.camera, entry.role) for entry in entries if entry.split == "val"}
    assert val == {("c1", "gallery"), ("c2", "query"), ("c3", "query")}


@pytest.mark.parametrize("name", CHANGING)
def test_a_cloth_changing_layout_needs_people_who_change_clothes(standard, tmp_path, name):
    images, folder = standard
    for frame in (images, images.assign(outfit_id=None)):
        with pytest.raises(UsageError) as caught:
            writer(name)(frame, tables.empty("captions"), folder, tmp_path)
        assert "--set synth.variant=cloth-changing" in caught.value.hint
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_prcc_needs_the_gallery_outfit_under_two_cameras(changing, tmp_path):
    images, folder = changing
    keep = (images["split"] != "test") | (images["role"] == "query") | ~images.duplicated(["person_id", "role"])
    with pytest.raises(UsageError, match="two cameras"):
        writer("prcc")(images[keep], tables.empty("captions"), folder, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_layout_needs_cameras_queries_and_one_dataset(source, tmp_path, name):
    images, folder = source(name)
    for frame, message in (
        (images.assign(camera_id=None), "camera"),
        (images.assign(role=None), "query and gallery images"),
        (images.assign(dataset=["a", "b"] * 36), "one dataset"),
    ):
        with pytest.raises(UsageError, match=message):
            writer(name)(frame, tables.empty("captions"), folder, tmp_path)


def test_market_with_more_cameras_than_the_release_is_refused_in_writing_and_noted_in_reading(standard, tmp_path):
    images, folder = standard
    with pytest.raises(UsageError, match="6 cameras"):
        writer("market-1501")(images.assign(camera_id="c7"), tables.empty("captions"), folder, tmp_path)
    picture(tmp_path / "bounding_box_train" / "0001_c10s1_000001_00.jpg")
    picture(tmp_path / "query" / "0007_c1s1_000001_00.jpg")
    (tmp_path / "bounding_box_test").mkdir()
    found = draft("market-1501", tmp_path)
    assert found.entries[0].camera == "c10", "all digits count"
    assert any("6 cameras; here there are also c10" in note for note in found.notes)


# --- the folder


@pytest.mark.parametrize(
    "name, inner, variant",
    [
        ("market-1501", "Market-1501-v15.09.15", "Market-1501, with attributes"),
        ("market-1501", "market1501", "Market-1501, with attributes"),
        ("market-1501", "Market-1501", "Market-1501, with attributes"),
        ("market-1501", "market1501/Market-1501-v15.09.15", "Market-1501, with attributes"),
        ("dukemtmc-reid", "DukeMTMC-reID", "DukeMTMC-reID, with attributes"),
        ("dukemtmc-reid", "dukemtmcreid/DukeMTMC-reID", "DukeMTMC-reID, with attributes"),
        ("msmt17", "MSMT17", "MSMT17_V1 (faces visible)"),
        ("msmt17", "msmt17/MSMT17_V1", "MSMT17_V1 (faces visible)"),
        ("prcc", "prcc", "PRCC, rgb (cloth-changing)"),
        ("ltcc", "LTCC_ReID", "LTCC (cloth-changing)"),
        *[(name, "renamed", None) for name in ALL],
    ],
)
def test_a_dataset_is_found_where_people_put_it(layout, tmp_path, name, inner, variant):
    home = tmp_path / "data" / inner
    home.parent.mkdir(parents=True)
    layout(name, tmp_path / "out").rename(home)
    for root in [home] if inner == "renamed" else [home, tmp_path / "data"]:
        found = probe(name, root)
        assert found is not None and found.missing == () and variant in (found.variant, None)
        assert found.folder == (home / "rgb" if name == "prcc" else home)
        assert len(draft(name, root).entries) == 72
        assert [other for other in format_names() if other in ALL and probe(other, root)] == [name]


@pytest.mark.parametrize(
    "name, part",
    [
        ("market-1501", "query"),
        ("market-1501", "bounding_box_train"),
        ("dukemtmc-reid", "bounding_box_test"),
        ("msmt17", "list_query.txt"),
        ("msmt17", "test"),
        ("prcc", "rgb/val"),
        ("prcc", "rgb/test/C"),
        ("ltcc", "query"),
    ],
)
def test_what_is_missing_is_named(layout, name, part):
    root = layout(name)
    gone = root / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert probe(name, root).missing == (part.removeprefix("rgb/"),)
    with pytest.raises(DataError, match=f"{gone.name} is missing"):
        draft(name, root)
    found = draft(name, root, lenient=True)
    assert found.entries and any(f"{gone} is missing" in problem for problem in found.problems)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_or_absent_folder_is_no_dataset(tmp_path, name):
    for root in (tmp_path, tmp_path / "absent"):
        assert probe(name, root) is None
        with pytest.raises(DataError, match="No "):
            draft(name, root)


@pytest.mark.parametrize("name", ALL)
def test_linked_folders_are_followed_and_a_link_to_itself_is_refused(layout, tmp_path, name):
    root = layout(name, tmp_path / "out")
    part = draft(name, root).entries[-1].path.parent
    moved = tmp_path / "disk"
    part.rename(moved)
    part.symlink_to(moved)
    assert len(draft(name, root).entries) == 72
    top = {"prcc": "rgb/train", "ltcc": "train", "msmt17": "train"}.get(name, "bounding_box_train")
    shutil.rmtree(root / top)
    (root / top).symlink_to(root / top)
    with pytest.raises(DataError, match="leads nowhere or to itself"):
        draft(name, root)
    (root / top).unlink()
    (root / top).symlink_to("..")
    with pytest.raises(DataError, match="is a link back to"):
        draft(name, root)
    assert len(draft(name, root, lenient=True).problems) == 1


@pytest.mark.parametrize("name", ALL)
def test_an_image_that_links_to_itself_is_refused(layout, name):
    root = layout(name)
    path = draft(name, root).entries[0].path
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(DataError, match="leads nowhere or to itself"):
        draft(name, root)
    found = draft(name, root, lenient=True)
    assert len(found.entries) == 71 and len(found.problems) == 1


@pytest.mark.parametrize(
    "name, place",
    [
        ("market-1501", "query/holiday.jpg"),
        ("market-1501", "query/0000_c1s1_000001_00.jpg"),
        ("dukemtmc-reid", "bounding_box_train/7_f1.png"),
        ("prcc", "rgb/train/001/D_cropped.jpg"),
        ("prcc", "rgb/test/A/anna/x.jpg"),
        ("ltcc", "test/001_c1_5.png"),
    ],
)
def test_a_strange_name_is_refused_or_listed(layout, name, place):
    root = layout(name)
    picture(root / place)
    word = place.split("/")[-2 if "anna" in place else -1]
    with pytest.raises(DataError, match=word):
        draft(name, root)
    found = draft(name, root, lenient=True)
    assert len(found.entries) == 72 and len(found.problems) == 1 and word in found.problems[0]


@pytest.mark.parametrize("name", ["market-1501", "prcc", "ltcc"])
def test_a_file_name_that_is_not_utf8_is_refused(layout, name):
    root = layout(name)
    image = draft(name, root).entries[0].path
    os.link(image, os.fsencode(image.parent) + b"/0001_c1s1_\xff.png")
    with pytest.raises(DataError, match="not UTF-8"):
        draft(name, root)


def test_duke_names_the_people_of_the_gallery_whom_nobody_looks_for(layout):
    root = layout("dukemtmc-reid")
    picture(root / "bounding_box_test" / "7001_c5_f0049478.jpg")
    notes = draft("dukemtmc-reid", root).notes
    assert any(note.startswith("1 people of the gallery have no query") for note in notes)
    assert any("withdrawn" in note for note in notes)


# --- MSMT17's lists

LINE = "0000/0000_000_01_0303morning_0008_0.jpg 0"


@pytest.fixture
def msmt(tmp_path):
    """Two people in train, two others with the same numbers in test; one file per list and line."""

    def make(train="train", test="test", **lists):
        lines = {
            "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_02_0303noon_0001_1.jpg 1"],
            "val": ["0000/0000_001_02_0303morning_0009_0.jpg 0"],
            "query": ["0000/0000_002_01_0113afternoon_0001_0_ex.jpg 0"],
            "gallery": [
                "0000/0000_003_15_0113afternoon_0002_0.jpg 0",
                "0001/0001_001_03_0113afternoon_0003_0.jpg 1",
            ],
        }
        for name, content in lines.items():
            for line in content:
                folder = train if name in ("train", "val") else test
                picture(tmp_path / folder / line.split()[0], (len(line), 0, 0))
            text = lists.get(name, "\n".join(content) + "\n")
            (tmp_path / f"list_{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return make


@pytest.mark.covers(5)
def test_msmt17_keeps_the_two_numberings_apart_and_joins_val_with_train(msmt):
    images = load("msmt17", msmt()).images
    assert images.groupby("person_id").size().to_dict() == {
        "msmt17:train-0000": 2,
        "msmt17:train-0001": 1,
        "msmt17:test-0000": 2,
        "msmt17:test-0001": 1,
    }
    assert list(images["split"]) == ["train"] * 3 + ["test"] * 3
    assert list(images["camera_id"]) == ["c1", "c2", "c2", "c1", "c15", "c3"]
    assert list(images["role"].fillna("")) == ["", "", "", "query", "gallery", "gallery"]
    assert images["image_id"][0] == "msmt17:train/0000/0000_000_01_0303morning_0008_0.jpg"


def test_msmt17_tells_its_versions_apart(msmt, tmp_path):
    root = msmt("mask_train_v2", "mask_test_v2")
    assert probe("msmt17", root).variant == "MSMT17_V2 (faces masked)"
    found = draft("msmt17", root)
    assert "MSMT17_V2" in found.notes[0] and found.entries[0].key.startswith("mask_train_v2/0000/")


def test_msmt17_refuses_to_choose_between_versions(layout, tmp_path):
    layout("msmt17")
    for folder in ("mask_train_v2", "mask_test_v2"):
        (tmp_path / "MSMT17_V2" / folder).mkdir(parents=True)
    with pytest.raises(DataError, match="two versions of MSMT17"):
        draft("msmt17", tmp_path)
    assert "MSMT17_V2" in probe("msmt17", tmp_path).notes[0]


def test_msmt17_lists_may_have_windows_ends_a_byte_order_mark_and_blank_lines(msmt):
    entries = draft("msmt17", msmt(train=("train"), val="", query="\ufeff0000/0000_002_01_a_0001_0.jpg 0\r\n\r\n"))
    assert [entry.camera for entry in entries.entries if entry.role == "query"] == ["c1"]
    assert len(entries.entries) == 5


HOSTILE = [
    ("../../etc/passwd 0", "leads outside"),
    ("/etc/passwd_0_01_x 0", "leads outside"),
    ("..\\..\\0_0_01_x.jpg 0", "leads outside"),
    ("a\0/0_0_01_x.jpg 0", "not a file name"),
    ("0000/0000_000_01_0303morning_0008_0.jpg", "is not `PATH PERSON`"),
    ("0000/0000_000_01_x.jpg zero", "is not `PATH PERSON`"),
    ("0000/0000_000_01_x.jpg -1", "is not `PATH PERSON`"),
    ("0000/0000_000_01_x.jpg 99999999999999999999", "is not `PATH PERSON`"),
    ("0000/0000.jpg 0", "is not a camera's number"),
    (f"{LINE}", "was listed before"),
    ("x" * 5000 + " 0", "longer than 4096 bytes"),
    (b"0000/\xe4_0_01_x.jpg 0", "not UTF-8"),
]


@pytest.mark.parametrize("line, message", HOSTILE)
def test_msmt17_refuses_a_hostile_line_by_number(msmt, line, message):
    raw = line if isinstance(line, bytes) else line.encode()
    root = msmt(val=LINE.replace("_000_", "_001_").encode() + b"\n" + raw + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        draft("msmt17", root)
    assert "list_val.txt, line 2" in caught.value.message


def test_msmt17_lists_every_hostile_line_when_lenient(msmt):
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in HOSTILE]
    found = draft("msmt17", msmt(val=b"\n".join(lines) + b"\n"), lenient=True)
    assert len(found.problems) == len(HOSTILE) and len(found.entries) == 5
    assert [f"line {number}" in problem for number, problem in enumerate(found.problems, start=1)].count(False) == 0


def test_a_million_bad_lines_do_not_become_a_million_sentences(msmt):
    found = draft("msmt17", msmt(val="x\n" * 5000), lenient=True)
    assert len(found.problems) == 1001 and found.problems[-1].startswith("4,000 further problem(s)")


def test_msmt17_refuses_a_huge_list_without_reading_it(msmt):
    root = msmt()
    with (root / "list_val.txt").open("wb") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(DataError, match="larger than 256 MiB"):
        draft("msmt17", root)


# --- what is another dataset, or half of one


OTHER = {"market-1501": "dukemtmc-reid", "dukemtmc-reid": "market-1501"}


@pytest.mark.parametrize("name", OTHER)
def test_a_folder_of_the_other_release_in_this_layout_is_refused(layout, name):
    root = layout(OTHER[name])
    with pytest.raises(DataError, match=f"holds {OTHER[name]}, not") as caught:
        draft(name, root)
    assert OTHER[name] in caught.value.hint
    found = draft(name, root, lenient=True)
    assert len(found.problems) == 1 and OTHER[name] in found.problems[0]


def test_a_few_names_of_the_other_release_and_names_of_neither_are_read(layout, tmp_path):
    root = layout("market-1501")
    for number, entry in enumerate(draft("market-1501", root).entries[:20]):
        entry.path.rename(entry.path.with_name(f"{entry.person}_{entry.camera}_f{number:07d}.png"))
    assert len(draft("market-1501", root).entries) == 72
    for path in [entry.path for entry in draft("market-1501", root).entries]:
        path.rename(path.with_name(f"{path.name[:7]}-{path.stem}{path.suffix}"))
    assert len(draft("market-1501", root).entries) == 72


@pytest.mark.parametrize("name", ALL)
def test_a_copy_without_queries_is_refused_or_listed(layout, name):
    root = layout(name)
    for entry in draft(name, root).entries:
        if entry.role == "query":
            entry.path.unlink()
    if name == "msmt17":
        (root / "list_query.txt").write_text("")
    with pytest.raises(DataError, match="No query images in"):
        draft(name, root)
    found = draft(name, root, lenient=True)
    assert found.entries and len(found.problems) == 1 and "No query images" in found.problems[0]


@pytest.mark.parametrize(
    "name, queries, gallery",
    [("market-1501", 3368, 15913), ("dukemtmc-reid", 2228, 17661), ("msmt17", 11659, 82161), ("ltcc", 493, 7050)],
)
def test_queries_and_gallery_are_compared_one_by_one(layout, name, queries, gallery):
    found = draft(name, layout(name))
    roles = Counter(entry.role for entry in found.entries)
    (note,) = [note for note in found.notes if " query and " in note]
    assert f"test: found {roles['query']} query and {roles['gallery']} gallery images; " in note
    assert note.endswith(f"the release has {queries:,} and {gallery:,}. Published numbers do not compare.")


def test_images_that_moved_from_the_gallery_to_the_queries_are_noted():
    entries = [Entry(str(i), Path("x"), "test", "1", "query" if i < 3 else "gallery") for i in range(5)]
    for roles, notes in (({"query": 3, "gallery": 2}, 0), ({"query": 2, "gallery": 3}, 1)):
        reading = Reading(False, entries)
        reading.compare("X", {"test": (1, 5, 0)}, 6, roles)
        assert len(reading.notes) == notes


# --- folders that may not be read


@pytest.fixture
def closed(monkeypatch):
    """Make a folder one that may not be read, also for root: what is asked about it or inside it is refused."""
    scandir, listdir, stat = os.scandir, os.listdir, os.stat

    def close(folder):
        def refuse(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

        def closed_scandir(path="."):
            return refuse(path) if Path(path).is_relative_to(folder) else scandir(path)

        def closed_listdir(path="."):
            return refuse(path) if Path(path).is_relative_to(folder) else listdir(path)

        def closed_stat(path, *args, **more):
            inside = isinstance(path, str | os.PathLike) and folder in Path(path).parents
            return refuse(path) if inside else stat(path, *args, **more)

        monkeypatch.setattr(os, "scandir", closed_scandir)
        monkeypatch.setattr(os, "listdir", closed_listdir)
        monkeypatch.setattr(os, "stat", closed_stat)

    return close


@pytest.mark.parametrize(
    "name, part",
    [
        ("market-1501", "bounding_box_train"),
        ("dukemtmc-reid", "bounding_box_test"),
        ("prcc", "rgb/train"),
        ("prcc", "rgb/test/C"),
        ("prcc", "rgb/train/001"),
        ("ltcc", "train"),
    ],
)
def test_a_sub_folder_that_may_not_be_read_is_refused_or_listed(layout, closed, name, part):
    folder = layout(name) / part
    closed(folder)
    root = folder.parents[len(part.split("/")) - 1]
    with pytest.raises(DataError, match=f"{folder.name} cannot be listed \\(Permission denied\\)") as caught:
        draft(name, root)
    assert "--run" not in caught.value.hint and "chmod" in caught.value.hint
    found = draft(name, root, lenient=True)
    assert found.entries and len(found.problems) == 1 and "Permission denied" in found.problems[0]
    assert probe(name, root) is not None


@pytest.mark.parametrize(
    "name, part", [("prcc", "rgb/test"), ("prcc", "rgb"), ("market-1501", ""), ("ltcc", ""), ("msmt17", "")]
)
def test_a_closed_folder_that_hides_the_dataset_is_named(layout, closed, name, part):
    root = layout(name)
    closed(root / part)
    with pytest.raises(DataError, match="cannot be listed"):
        draft(name, root if part else root.parent)


@pytest.mark.parametrize("name", [*ALL, "folder"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_root_that_may_not_be_read_says_so(layout, closed, name, lenient):
    root = layout("market-1501" if name == "folder" else name)
    closed(root)
    with pytest.raises(DataError, match="cannot be listed \\(Permission denied\\)") as caught:
        draft(name, root, lenient=lenient)
    assert "--run" not in caught.value.hint and "chmod" in caught.value.hint


# --- attributes


def market(folder):
    """Person 2 trains; 7 is looked for; 9 has no row; one distractor and one piece of junk."""
    picture(folder / "bounding_box_train" / "0002_c1s1_000451_03.jpg")
    picture(folder / "query" / "0007_c1s1_000001_00.jpg")
    picture(folder / "bounding_box_test" / "0007_c3s1_000002_01.jpg")
    picture(folder / "bounding_box_test" / "0009_c3s1_000002_01.jpg")
    picture(folder / "bounding_box_test" / "-1_c1s1_000003_01.jpg")
    picture(folder / "bounding_box_test" / "0000_c6s1_000004_01.jpg")
    return folder


def codes(number, **values):
    """One person as the published file has it: 1 = no, 2 = yes; other codes as its README says."""
    colours = ("upblack", "upred", "upgray", "downblue", "downbrown")
    fields = dict.fromkeys(("hat", "backpack", "bag", "handbag", *colours), 1) | values
    index = np.empty((1, 1), dtype=object)
    index[0, 0] = number
    return {name: np.array([[value]], np.uint8) for name, value in fields.items()} | {"image_index": index}


def attribute_file(path, compress=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    woman = codes("0002", gender=2, hair=2, up=1, down=1, clothes=2, age=3, upred=2, downblue=2, backpack=2)
    boy = codes("0007", gender=1, hair=1, up=2, down=2, clothes=2, age=2, upgray=2, top=0)
    savemat(path, {"market_attribute": {"train": woman, "test": boy}}, do_compression=compress)
    return path


@pytest.mark.parametrize("place", ["", "attribute", "Market-1501_Attribute"])
@pytest.mark.parametrize("compress", [True, False])
def test_market_1501_gives_every_image_the_attributes_of_its_person_in_words(tmp_path, place, compress):
    attribute_file(market(tmp_path) / place / "market_attribute.mat", compress)
    found = load("market-1501", tmp_path)
    images = found.images.set_index("image_id")
    assert images.loc["market-1501:bounding_box_train/0002_c1s1_000451_03.jpg", "attributes"] == {
        "gender": "woman",
        "age": "adult",
        "hair_length": "long",
        "sleeves": "long",
        "upper_type": "long-sleeved top",
        "upper_colour": "red",
        "lower_length": "long",
        "lower_type": "trousers",
        "lower_colour": "blue",
        "hat": "no",
        "backpack": "yes",
        "bag": "no",
        "handbag": "no",
    }
    boy = images[images["person_id"] == "market-1501:0007"]["attributes"]
    assert len(boy) == 2 and boy.iloc[0] == boy.iloc[1]
    assert (boy.iloc[0]["age"], boy.iloc[0]["upper_colour"], boy.iloc[0]["lower_type"]) == ("teenage", "grey", "shorts")
    assert "lower_colour" not in boy.iloc[0], "no colour is marked"
    assert images.loc[images["person_id"].isin(["market-1501:0009", "market-1501:0000"]), "attributes"].isna().all()
    assert "Attributes of 2 people from market_attribute.mat." in found.notes
    assert any(note.startswith("1 people have no row") for note in found.notes), "distractors are not counted"


def test_a_changed_attribute_file_is_the_annotation_of_the_import(tmp_path):
    market(tmp_path)
    assert draft("market-1501", tmp_path).annotation is None
    path = attribute_file(tmp_path / "market_attribute.mat")
    assert draft("market-1501", tmp_path).annotation == path


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 200, "MATLAB 7.3"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM", "MATLAB 7.3"),
        (b"", "no little-endian MATLAB 5 header"),
        (b"hello" * 50, "no little-endian MATLAB 5 header"),
        (b"MATLAB 5.0".ljust(124) + b"\0\1IM", "lacks the variable"),
        (b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"\x0e\0\0\0\xff\xff\xff\x7f", "cut off"),
        (b"MATLAB 5.0".ljust(1 << 21), "larger than 1 MiB"),
    ],
)
def test_a_damaged_attribute_file_is_refused_in_one_sentence(tmp_path, content, message):
    (market(tmp_path) / "market_attribute.mat").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        draft("market-1501", tmp_path)
    assert "market_attribute.mat" in caught.value.message and caught.value.hint
    found = draft("market-1501", tmp_path, lenient=True)
    assert len(found.entries) == 5 and len(found.problems) == 1


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"train": codes("0002"), "test": codes("0002")}, "describes person 2 twice"),
        ({"train": codes("anna")}, "'anna' is not a person's number"),
        ({"train": codes("0002") | {"hat": np.array([[1, 2]], np.uint8)}}, "`hat` does not hold one number per person"),
        ({"train": codes("0002") | {"hat": "yes"}}, "`hat` does not hold one number per person"),
        ({"train": {"hat": 1}}, "lacks the variable"),
        ([1, 2], "lacks the variable"),
    ],
)
def test_attributes_unlike_the_published_ones_are_refused(tmp_path, parts, message):
    savemat(market(tmp_path) / "market_attribute.mat", {"market_attribute": parts})
    with pytest.raises(DataError, match=message):
        draft("market-1501", tmp_path)


def test_no_damage_to_an_attribute_file_ends_the_process(tmp_path):
    """scipy's reader ends it with a segmentation fault on some of these, which is why it is not used."""
    content = attribute_file(tmp_path / "whole.mat", compress=False).read_bytes()
    path, rng = market(tmp_path) / "market_attribute.mat", random.Random(1)
    code = (
        "import random, sys; from pathlib import Path; from reidctl.datasets.matlab import variables\n"
        "content, rng, kinds = Path(sys.argv[1]).read_bytes(), random.Random(1), set()\n"
        "for _ in range(3000):\n"
        "    damaged = bytearray(content)\n"
        "    for _ in range(rng.choice((1, 2, 5))):\n"
        "        damaged[rng.randrange(128, len(damaged))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))\n"
        "    try: variables(bytes(damaged)); kinds.add('read')\n"
        "    except Exception as error: kinds.add(type(error).__name__)\n"
        "print(*sorted(kinds))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "whole.mat"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"read", "ValueError", "UnicodeDecodeError", "error"}, "error: struct or zlib"
    for _ in range(20):
        path.write_bytes(content[: rng.randrange(128, len(content) - 8)])
        with pytest.raises(DataError):
            draft("market-1501", tmp_path)


def test_rendered_attributes_reach_the_market_file_in_its_codes(layout, standard):
    """scipy reads what is written, so other tools can."""
    root = layout("market-1501")
    parts = loadmat(root / "market_attribute.mat", simplify_cells=True)["market_attribute"]
    assert (len(parts["train"]["image_index"]), len(parts["test"]["image_index"])) == (9, 3)
    truth = {f"{int(row.attributes['true_person']) + 1:04d}": dict(row.attributes) for row in standard[0].itertuples()}
    for part in parts.values():
        for row, number in enumerate(part["image_index"]):
            person = truth[number]
            assert part["gender"][row] == {"man": 1, "woman": 2}[person["gender"]]
            assert part["age"][row] == {"teenage": 2, "adult": 3, "elderly": 4}[person["age"]]
            assert part["upblue"][row] == (2 if person["upper_colour"] == "blue" else 1)
    images = load("market-1501", root).images
    read = {row.person_id.split(":")[1]: row.attributes for row in images.itertuples()}
    assert {number: words["gender"] for number, words in read.items()} == {n: p["gender"] for n, p in truth.items()}
    shared = [number for number, person in truth.items() if person["upper_colour"] in ("black", "red", "grey", "blue")]
    assert shared and all(read[number]["upper_colour"] == truth[number]["upper_colour"] for number in shared)


def test_the_same_people_give_the_same_attribute_file(layout, tmp_path):
    one, other = (layout("dukemtmc-reid", tmp_path / name) / "duke_attribute.mat" for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    parts = loadmat(one, simplify_cells=True)["duke_attribute"]
    assert set(parts["train"]) >= {"gender", "top", "boots", "shoes", "upbrown", "downred", "image_index"}
