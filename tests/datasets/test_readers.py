"""The readers, on small files in the layout of each dataset, and on hostile input."""

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reidctl.datasets.base import Entry, Options, measure, safe_join
from reidctl.datasets.registry import format_names, probe, reader
from reidctl.datasets.scan import image_facts
from reidctl.datasets.splits import carve_validation, split_people
from reidctl.errors import DataError, UsageError


def picture(path, colour=(200, 30, 30), size=(16, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def cuhk(folder, items=None):
    """Six people in three splits, one image and two captions each, as the release writes them."""
    names = ["CUHK01/a.png", "Market/b.png", "CUHK03/c.png", "train_query/d.png", "test_query/e.png", "CUHK01/f.png"]
    splits = ["train", "train", "train", "val", "test", "test"]
    made = [
        {
            "split": split,
            "captions": [f"Person {i} wears red.", f"A bag, {i}."],
            "file_path": name,
            "processed_tokens": [["person"], ["bag"]],
            "id": i,
        }
        for i, (name, split) in enumerate(zip(names, splits, strict=True), start=1)
    ]
    for i, item in enumerate(made):
        picture(folder / "imgs" / item["file_path"], (i * 20, 0, 0))
    made = items(made) if items else made
    (folder / "reid_raw.json").write_text(json.dumps(made))
    return folder


def market(folder, people=4):
    """Every train person has two images under two cameras; test has queries, gallery, junk and a distractor."""
    for person in range(1, people + 1):
        for camera in (1, 2):
            for shot in (1, 2):
                picture(folder / "bounding_box_train" / f"{person:04d}_c{camera}s1_00000{shot}_01.jpg")
    picture(folder / "query" / "0100_c1s1_000001_00.jpg")
    picture(folder / "bounding_box_test" / "0100_c3s1_000002_01.jpg")
    picture(folder / "bounding_box_test" / "-1_c1s1_000003_01.jpg")
    picture(folder / "bounding_box_test" / "0000_c6s1_000004_01.jpg")
    (folder / "bounding_box_test" / "Thumbs.db").write_bytes(b"x")
    return folder


def load(format, root, **options):
    chosen = Options(**options)
    return measure(reader(format)(root, chosen), chosen)


def test_format_names_are_the_file_names_and_load_no_reader():
    assert {"cuhk-pedes", "csv-table", "folder", "market-1501"} <= set(format_names())
    assert not {"base", "formats", "splits"} & set(format_names())
    code = (
        "import sys; from reidctl.datasets.registry import format_names; format_names();"
        "assert not {'torch', 'pandas', 'PIL', 'reidctl.datasets.formats.csv_table'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(UsageError, match="cuhk-pedes"):
        reader("cuhk-pedess")


# --- CUHK-PEDES


@pytest.mark.covers(1)
def test_cuhk_pedes_gives_every_caption_its_split_and_person(tmp_path):
    found = load("cuhk-pedes", cuhk(tmp_path / "CUHK-PEDES").parent)
    assert found.images["split"].value_counts().to_dict() == {"train": 3, "test": 2, "val": 1}
    assert len(found.captions) == 12 and set(found.captions["kind"]) == {"full"}
    first = found.images.iloc[0]
    assert (first["image_id"], first["person_id"]) == ("cuhk-pedes:CUHK01/a.png", "cuhk-pedes:1")
    assert (first["width"], first["height"]) == (16, 32)
    texts = found.captions[found.captions["image_id"] == first["image_id"]]
    assert list(texts["text"]) == ["Person 1 wears red.", "A bag, 1."]
    assert list(texts["caption_id"]) == ["cuhk-pedes:CUHK01/a.png#0", "cuhk-pedes:CUHK01/a.png#1"]
    assert any("34,054" in note for note in found.notes), "counts unlike the release's must be said"


def test_cuhk_pedes_refuses_the_first_release_under_the_name_of_the_newer_file(tmp_path):
    cuhk(tmp_path, lambda items: [{key: item[key] for key in ("id", "file_path", "captions")} for item in items])
    with pytest.raises(DataError, match=r"no entry with a `split`.*call it caption_all\.json"):
        load("cuhk-pedes", tmp_path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\etc\\passwd", "a/../../x.png", "", "a\0b"]
)
def test_cuhk_pedes_refuses_a_path_outside_its_folder(tmp_path, name):
    cuhk(tmp_path, lambda items: [{**items[0], "file_path": name}, *items[1:]])
    with pytest.raises(DataError, match="entry 0"):
        load("cuhk-pedes", tmp_path)


def test_cuhk_pedes_names_an_empty_caption_and_one_that_is_code(tmp_path):
    cuhk(tmp_path, lambda items: [{**items[0], "captions": ["  ", "</div> self.text()"]}, *items[1:]])
    found = load("cuhk-pedes", tmp_path)
    assert len(found.captions) == 11
    assert any("1 empty caption" in note and "CUHK01/a.png" in note for note in found.notes)
    assert any("1 caption(s) look like code" in note for note in found.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "dev"},
        {"captions": "text"},
        {"captions": [None]},
        {"id": None},
        {"file_path": 3},
        {"captions": ["a\0"]},
    ],
)
def test_cuhk_pedes_refuses_an_entry_unlike_the_format(tmp_path, change):
    cuhk(tmp_path, lambda items: [{**items[0], **change}, *items[1:]])
    with pytest.raises(DataError, match="entry 0"):
        load("cuhk-pedes", tmp_path)


@pytest.mark.parametrize("content", [b"[{", b"{}", b"\xff\xfe", b"[1]", b"[]", b"[" * 100_000])
def test_cuhk_pedes_refuses_a_damaged_file_in_one_sentence(tmp_path, content):
    (tmp_path / "reid_raw.json").write_bytes(content)
    with pytest.raises(DataError):
        load("cuhk-pedes", tmp_path)


@pytest.mark.covers(12)
def test_a_person_in_two_splits_is_refused(tmp_path):
    cuhk(tmp_path, lambda items: [*items[:-1], {**items[-1], "id": 1}])
    with pytest.raises(DataError, match="two splits, train and test"):
        load("cuhk-pedes", tmp_path)


# --- Market-1501


@pytest.mark.covers(4)
def test_market_1501_drops_junk_and_keeps_distractors_in_the_gallery(tmp_path):
    images = load("market-1501", market(tmp_path / "Market-1501-v15.09.15").parent).images
    test = images[images["split"] == "test"].set_index("image_id")
    assert len(images) == 16 + 3 and not images["person_id"].str.contains("-1$").any()
    assert test["role"].value_counts().to_dict() == {"gallery": 2, "query": 1}
    assert test.loc["market-1501:bounding_box_test/0000_c6s1_000004_01.jpg", "person_id"] == "market-1501:0000"
    query = test.loc["market-1501:query/0100_c1s1_000001_00.jpg"]
    assert (query["person_id"], query["camera_id"], query["role"]) == ("market-1501:0100", "c1", "query")
    assert images[images["split"] == "train"]["role"].isna().all()


@pytest.mark.covers(13)
def test_market_1501_carves_people_out_of_train_by_seed(tmp_path):
    root = market(tmp_path)
    first, again = (load("market-1501", root, carve_val=2, seed=5).images for _ in range(2))
    assert first.equals(again)
    val, train = (set(first[first["split"] == split]["person_id"]) for split in ("val", "train"))
    assert len(val) == 2 and len(train) == 2 and not val & train
    seeds = {
        tuple(sorted(e.person for e in carve_validation(_train(root), 2, s) if e.split == "val")) for s in range(9)
    }
    assert len(seeds) > 1
    for _, person in first[first["split"] == "val"].groupby("person_id"):
        queries = person[person["role"] == "query"]
        assert sorted(queries["camera_id"]) == ["c1", "c2"]
        for camera in queries["camera_id"]:
            assert ((person["role"] == "gallery") & (person["camera_id"] != camera)).any()


def _train(root):
    return [entry for entry in reader("market-1501")(root, Options()).entries if entry.split == "train"]


def test_market_1501_refuses_to_carve_everybody_and_strange_names(tmp_path):
    root = market(tmp_path)
    with pytest.raises(UsageError, match="4 training people"):
        load("market-1501", root, carve_val=4)
    picture(root / "query" / "holiday.jpg")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        load("market-1501", root)


# --- folder


def test_a_flat_folder_has_no_known_people(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        picture(tmp_path / name)
    draft = reader("folder")(tmp_path, Options(name="mine"))
    assert not draft.known_people and "no metrics" in draft.notes[0]
    images = measure(draft, Options()).images
    assert list(images["person_id"]) == ["mine:a.jpg", "mine:a.png", "mine:b"]
    assert set(images["split"]) == {"test"} and set(images["role"]) == {"gallery"}


@pytest.mark.covers(12)
def test_a_folder_of_people_is_split_by_identity(tmp_path):
    for person in range(10):
        for shot in range(2):
            picture(tmp_path / f"p{person}" / f"{shot}.png")
    images = load("folder", tmp_path, fractions=(0.5, 0.2, 0.3)).images
    people = images.groupby("split")["person_id"].nunique().to_dict()
    assert people == {"train": 5, "val": 2, "test": 3}
    assert (images.groupby("person_id")["split"].nunique() == 1).all()


def test_a_link_loop_is_refused_by_name(tmp_path):
    picture(tmp_path / "anna" / "1.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match="loop is a link back"):
        load("folder", tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "anna" / "2.png").symlink_to(tmp_path / "anna" / "2.png")
    with pytest.raises(DataError, match=r"2\.png is a link that leads nowhere"):
        load("folder", tmp_path)


@pytest.mark.parametrize("place", ["1.png", "anna/1.png"])
def test_a_pipe_named_like_an_image_is_refused_or_listed(tmp_path, place):
    picture(tmp_path / Path(place).with_name("0.png"))
    os.mkfifo(tmp_path / place)
    with pytest.raises(DataError, match=f"{place} is not a regular file"):
        load("folder", tmp_path)
    found = reader("folder")(tmp_path, Options(lenient=True))
    assert len(found.entries) == len(found.problems) == 1 and found.problems[0].endswith("is not a regular file.")


def test_a_persons_folder_that_may_not_be_read_is_refused_or_listed(tmp_path, monkeypatch):
    for name in ("anna", "bert"):
        picture(tmp_path / name / "1.png")
    iterdir = Path.iterdir

    def closed(path):
        if path.name == "anna":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(DataError, match=r"anna cannot be listed \(Permission denied\)") as caught:
        load("folder", tmp_path)
    assert "--run" not in caught.value.hint
    found = reader("folder")(tmp_path, Options(lenient=True))
    assert [entry.key for entry in found.entries] == ["bert/1.png"] and len(found.problems) == 1
    assert probe("folder", tmp_path) is not None
    (tmp_path / "bert" / "1.png").unlink()
    with pytest.raises(DataError, match="anna cannot be listed"):
        reader("folder")(tmp_path, Options(lenient=True))


def test_a_folder_with_both_layouts_or_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="No images"):
        load("folder", tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "anna" / "1.png")
    with pytest.raises(DataError, match="beside folders"):
        load("folder", tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    picture(tmp_path / "ok.png")
    os.link(tmp_path / "ok.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(DataError, match="not UTF-8"):
        load("folder", tmp_path)


# --- images


def png_header(width, height):
    """A PNG that only claims a size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_hostile_images_are_refused_by_name(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    files = {
        "truncated.jpg": content[: len(content) // 2],
        "bomb.png": png_header(50_000, 50_000),
        "large.png": png_header(9_000, 9_000),
        "empty.png": b"",
        "text.png": b"hello",
    }
    for name, payload in files.items():
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(DataError, match=name):
            image_facts(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        image_facts(tmp_path / "pipe.png")


def test_bad_images_stop_the_import_or_are_counted(tmp_path):
    picture(tmp_path / "anna" / "1.png")
    (tmp_path / "anna" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png"):
        load("folder", tmp_path)
    found = load("folder", tmp_path, skip_bad=True)
    assert len(found.images) == 1
    assert any(note.startswith("1 unreadable image(s) left out") for note in found.notes)
    (tmp_path / "anna" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="None of the 2 images"):
        load("folder", tmp_path, skip_bad=True)


def test_a_linked_dataset_folder_is_followed(tmp_path):
    picture(tmp_path / "disk" / "a.png")
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "Market").symlink_to(tmp_path / "disk")
    assert image_facts(safe_join(tmp_path / "imgs", "Market/a.png", "row"))[:2] == (16, 32)


# --- tables


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.covers(7)
def test_csv_and_native_reader_give_the_same_ids_and_captions(tmp_path):
    native = load("cuhk-pedes", cuhk(tmp_path / "c"))
    items = json.loads((tmp_path / "c" / "reid_raw.json").read_text())
    rows = [
        {"image": i["file_path"], "person": i["id"], "split": i["split"], "captions": json.dumps(i["captions"])}
        for i in items
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    wide = [
        {**row, "caption": i["captions"][0], "caption_2": i["captions"][1]} for row, i in zip(rows, items, strict=True)
    ]
    pd.DataFrame(wide).drop(columns="captions").to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        other = load("csv-table", tmp_path / name, name="cuhk-pedes", images=tmp_path / "c" / "imgs")
        pd.testing.assert_frame_equal(other.images, native.images)
        pd.testing.assert_frame_equal(other.captions, native.captions)


def test_csv_keeps_leading_zeros_cameras_roles_and_attributes(tmp_path):
    picture(tmp_path / "a.png")
    text = "image,person,split,role,camera,outfit,attributes.hat,identity_text,conditioned_on\n"
    table = write(tmp_path / "t.csv", text + "a.png,0007,test,query,c1,o2,yes,Tall.,image\n")
    found = load("csv-table", table)
    row = found.images.iloc[0]
    assert tuple(row[["person_id", "role", "camera_id", "outfit_id"]]) == ("t:0007", "query", "c1", "o2")
    assert row["attributes"] == {"hat": "yes"}
    assert list(found.captions["kind"]) == ["identity"] and list(found.captions["conditioned_on"]) == ["image"]


def test_described_texts_of_unknown_origin_may_not_reach_a_gallery(tmp_path):
    picture(tmp_path / "a.png")
    found = load("csv-table", write(tmp_path / "t.csv", "image,person,clothing_text\na.png,1,Red.\n"))
    assert list(found.captions["conditioned_on"]) == ["none"]


@pytest.mark.parametrize("encoding, ends", [("utf-8", "\r\n"), ("utf-8-sig", "\n"), ("utf-8-sig", "\r\n")])
def test_csv_takes_windows_line_ends_and_a_byte_order_mark(tmp_path, encoding, ends):
    picture(tmp_path / "a.png")
    text = ends.join(["image;person;caption", 'a.png;1;"Käthe, ""tall"""', ""])
    assert list(load("csv-table", write(tmp_path / "t.csv", text, encoding)).captions["text"]) == ['Käthe, "tall"']


@pytest.mark.parametrize(
    "content, message",
    [
        (b"image,person\na.png,1\0\n", "NUL byte at offset 20"),
        (b"image,person,caption\na.png,1,K\xe4the\n", "not UTF-8"),
        ("image,person\na.png,1\n".encode("utf-16"), "UTF-16"),
        (b"image,who\na.png,1\n", r"lacks the column `person`; it has: image, who"),
        (b"image,person,person\na.png,1,1\n", "person twice"),
        (b"image,person\na.png,1,2,3\n", "data row 1: 4 cells, but the header has 2"),
        (b"image,person\na.png,\n", r"data row 1: `person` is empty"),
        (b"image,person,split\na.png,1,dev\n", r"data row 1: `split` is none of train, val, test \(got 'dev'\)"),
        (b"image,person\n../../etc/passwd,1\n", "leads outside"),
        (b"image,person,captions\na.png,1,[oops\n", "not a JSON list"),
        (b"image,person\na.png,1\na.png,2\n", "`person` of a.png differs"),
        (b"image,person\n", "has no rows"),
        (b"", "is empty"),
        (b"image,person\nmissing.png,1\n", "missing.png does not exist"),
    ],
)
def test_csv_refuses_what_it_cannot_read_in_one_sentence(tmp_path, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("csv-table", tmp_path / "t.csv")


def test_csv_joins_duplicate_rows_and_skips_blank_captions(tmp_path):
    picture(tmp_path / "a.png")
    table = write(tmp_path / "t.csv", "image,person,caption\na.png,1,One.\na.png,1,One.\na.png,1,Two.\na.png,1, \n")
    found = load("csv-table", table)
    assert list(found.captions["text"]) == ["One.", "Two."]
    assert any(note.startswith("3 further row(s)") for note in found.notes)


@pytest.mark.slow
def test_csv_reads_a_million_rows_in_bounded_time(tmp_path):
    import time

    for i in range(100):
        picture(tmp_path / f"{i}.png", size=(4, 8))
    rows = (f"{i % 100}.png,{i % 100},Caption {i % 1000}.\n" for i in range(1_000_000))
    table = write(tmp_path / "t.csv", "image,person,caption\n" + "".join(rows))
    started = time.monotonic()
    assert len(load("csv-table", table).captions) == 1000
    assert time.monotonic() - started < 60


# --- splits


@pytest.mark.covers(12)
@given(
    people=st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=60),
    seed=st.integers(0, 100),
    fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0, 0.5), (1, 0, 0), (0, 0, 1), (0, 0.5, 0.5), (0, 1, 0)]),
)
def test_every_person_is_in_exactly_one_split_with_a_share(people, seed, fractions):
    found = split_people(sorted(people), fractions, seed)
    assert set(found) == people
    shares = dict(zip(("train", "val", "test"), fractions, strict=True))
    assert all(shares[split] > 0 for split in found.values())
    assert found == split_people(sorted(people, reverse=True) * 2, fractions, seed)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (-1, 1, 1), (float("nan"),) * 3, (float("inf"), 0, 0)])
def test_fractions_must_be_numbers_that_add_up(fractions):
    with pytest.raises(UsageError, match="must be at least 0 and add up to 1"):
        split_people(["a", "b"], fractions, 0)


@pytest.mark.parametrize("count, people, message", [
    (16, 16, r"Cannot carve 16 people out of 16 training people\. Give at most 15"),
    (1, 1, r"Cannot carve 1 person out of 1 training person\. Give at most 0"),
    (1, 0, r"0 training people\. Give at most 0"),
    (-1, 3, r"Give at least 0\."),
])  # fmt: skip
def test_carving_too_many_says_how_many_are_possible(count, people, message):
    entries = [Entry(str(i), None, "train", str(i)) for i in range(people)]
    with pytest.raises(UsageError, match=message):
        carve_validation(entries, count, 0)


def test_a_person_under_one_camera_gives_no_query():
    entries = [Entry(f"{p}{i}", None, "train", p, camera="c1") for p in "ab" for i in range(3)]
    moved = [e for e in carve_validation(entries, 1, 0) if e.split == "val"]
    assert len(moved) == 3 and {e.role for e in moved} == {"gallery"}
