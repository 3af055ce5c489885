"""The captioned family: what is written in each layout is read back, and hostile files are refused in one sentence."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl import tables
from reidctl.data import build_corpus
from reidctl.datasets import captioned
from reidctl.datasets.base import Options, measure
from reidctl.datasets.formats import cuhk_pedes, icfg_pedes, rstpreid, ufine6926
from reidctl.datasets.registry import format_names, probe, reader, supported_options, writer
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.protocols import text_to_image
from reidctl.retrieval.store import EmbeddingTable
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

FORMATS = ["cuhk-pedes", "icfg-pedes", "rstpreid", "ufine6926"]
WITHOUT_VAL = ["icfg-pedes", "ufine6926"]
MODULES = {"cuhk-pedes": cuhk_pedes, "icfg-pedes": icfg_pedes, "rstpreid": rstpreid, "ufine6926": ufine6926}
COVERED = {"cuhk-pedes": [pytest.mark.covers(1)], "icfg-pedes": [pytest.mark.covers(2)]}
COVERED["rstpreid"] = [pytest.mark.covers(3)]
EVERY = [pytest.param(name, marks=COVERED.get(name, [])) for name in FORMATS]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Twelve rendered people in three splits, two captions per image: (images, captions, folder)."""
    folder = tmp_path_factory.mktemp("rendered")
    write_dataset(SynthConfig(people=12, images_per_person=4, size=(64, 32), seed=1), folder, workers=1)
    frames = (tables.read_table(folder / f"{name}.parquet", name) for name in ("images", "captions"))
    return (*frames, folder)


@pytest.fixture(scope="module")
def laid_out(rendered, tmp_path_factory):
    """The folder of each layout, written once; tests read it and leave it as it is."""
    images, captions, folder = rendered
    out = tmp_path_factory.mktemp("layouts")
    return {name: writer(name)(images, captions, folder, out) for name in FORMATS}


def load(format, root, **options):
    chosen = Options(**options)
    return measure(reader(format)(root, chosen), chosen)


def merged_split(split, format):
    return "train" if split == "val" and format in WITHOUT_VAL else split


def facts(images, captions, *, each):
    """By content hash: split, camera, captions, and the hashes of all images of the same person."""
    texts = captions[captions["kind"] == "full"].groupby("image_id")["text"].agg(list).to_dict()
    group = images.groupby("person_id")["sha256"].agg(frozenset).to_dict()
    return {
        row.sha256: (row.split, row.camera_id, texts[row.image_id][:each], group[row.person_id])
        for row in images.itertuples()
    }


@pytest.mark.parametrize("format", EVERY)
def test_a_written_layout_is_read_back_image_by_image(rendered, laid_out, format):
    images, captions, _ = rendered
    found = load(format, laid_out[format])
    cameras = images["camera_id"] if format in ("icfg-pedes", "rstpreid") else None
    source = images.assign(split=[merged_split(split, format) for split in images["split"]], camera_id=cameras)
    each = 1 if format == "icfg-pedes" else 2
    assert facts(found.images, found.captions, each=9) == facts(source, captions, each=each)
    assert len(found.images) == len(images) == 48 and len(found.captions) == 48 * each
    assert set(found.images["dataset"]) == {format} and found.images["role"].isna().all()
    assert found.images["image_id"].str.startswith(f"{format}:").all()
    assert set(found.captions["conditioned_on"]) == {"image"}


@pytest.mark.parametrize("format, start", [("cuhk-pedes", 1), ("icfg-pedes", 0), ("rstpreid", 0), ("ufine6926", 1)])
def test_people_are_numbered_as_the_release_does_train_first_and_without_a_gap(laid_out, format, start):
    images = load(format, laid_out[format]).images
    raw = images["person_id"].str.removeprefix(f"{format}:").astype(int)
    train = sorted(set(raw[images["split"] == "train"]))
    assert train == list(range(start, start + len(train)))
    assert sorted(set(raw)) == list(range(start, start + 12))


@pytest.mark.parametrize("format", FORMATS)
def test_counts_unlike_the_release_are_said_for_every_split(laid_out, format):
    notes = " ".join(load(format, laid_out[format]).notes)
    for people, images, texts in MODULES[format].OFFICIAL.values():
        assert f"the release has {people:,}, {images:,}, {texts:,}" in notes
    assert notes.count("Published numbers do not compare.") == len(MODULES[format].OFFICIAL)


@pytest.mark.parametrize(
    "format, totals",
    [("cuhk-pedes", (13003, 40206, 80440)), ("icfg-pedes", (4102, 54522, 54522)), ("rstpreid", (4101, 20505, 41010)),
     ("ufine6926", (6926, 26206, 52412))],
)  # fmt: skip
def test_official_counts_of_the_splits_add_up_to_the_printed_totals(format, totals):
    assert tuple(map(sum, zip(*MODULES[format].OFFICIAL.values(), strict=True))) == totals


def test_a_copy_as_large_as_the_release_gives_no_note(tmp_path, monkeypatch):
    monkeypatch.setattr(rstpreid, "RELEASE", replace(rstpreid.RELEASE, official={"train": (1, 2, 3)}))
    listed = [item(img_path="a.png", captions=["One.", "Two."]), item(img_path="b.png", captions=["Three."])]
    assert read(tmp_path, "rstpreid", listed).notes == []


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_above_and_a_file_in_annotations_are_found(rendered, tmp_path, format):
    images, captions, folder = rendered
    root = writer(format)(images, captions, folder, tmp_path)
    first = reader(format)(root, Options())
    assert reader(format)(tmp_path, Options()).entries == first.entries
    (root / "annotations").mkdir()
    first.annotation.rename(root / "annotations" / first.annotation.name)
    assert reader(format)(root, Options()).entries == first.entries
    assert "annotations/" in probe(format, root).variant


def test_a_layout_of_captions_is_not_written_without_any(rendered, tmp_path):
    images, captions, folder = rendered
    for format in FORMATS:
        with pytest.raises(UsageError, match="No image has a caption"):
            writer(format)(images, captions[captions["kind"] != "full"], folder, tmp_path)
    with pytest.raises(UsageError, match="one dataset"):
        writer("rstpreid")(images.assign(dataset=["a", "b"] * 24), captions, folder, tmp_path)


def test_an_unknown_camera_is_left_out_of_the_names(rendered, tmp_path):
    images, captions, folder = rendered
    for format in ("icfg-pedes", "rstpreid"):
        root = writer(format)(images.assign(camera_id=None), captions, folder, tmp_path)
        assert load(format, root).images["camera_id"].isna().all()


# --- validation


@pytest.mark.covers(2)
@pytest.mark.parametrize("format", WITHOUT_VAL)
def test_asking_for_a_validation_split_that_was_not_carved_says_what_to_do(laid_out, format):
    found = load(format, laid_out[format])
    corpus = build_corpus(found.images, found.captions, None, laid_out[format])
    with pytest.raises(DataError, match=r"no `val` split \(it has: test, train\).*Import it with a validation split"):
        corpus.of_split("val")


@pytest.mark.covers(13)
@pytest.mark.parametrize("format", WITHOUT_VAL)
def test_carved_people_leave_train_by_seed_and_as_many_as_asked(laid_out, format):
    whole = load(format, laid_out[format]).images
    people = []
    for seed in range(6):
        images = load(format, laid_out[format], carve_val=3, seed=seed).images
        val, train = (set(images.loc[images["split"] == split, "person_id"]) for split in ("val", "train"))
        assert len(val) == 3 and not val & train
        assert val | train == set(whole.loc[whole["split"] == "train", "person_id"])
        assert images.loc[images["split"] == "test", "image_id"].equals(whole.loc[whole["split"] == "test", "image_id"])
        people.append(frozenset(val))
    assert len(set(people)) > 1
    again = load(format, laid_out[format], carve_val=3, seed=5)
    assert frozenset(again.images.loc[again.images["split"] == "val", "person_id"]) == people[5]
    assert "3 people moved from train to val (seed 5)." in again.notes
    with pytest.raises(UsageError, match="Cannot carve 9 people out of 9"):
        load(format, laid_out[format], carve_val=9)


@pytest.mark.covers(13, 14)
@pytest.mark.parametrize("format", WITHOUT_VAL)
def test_every_caption_of_a_carved_split_asks_and_every_image_answers(laid_out, format):
    found = load(format, laid_out[format], carve_val=3)
    val = found.images[found.images["split"] == "val"]
    texts = found.captions[found.captions["image_id"].isin(val["image_id"])]
    assert val["role"].isna().all()
    protocol = text_to_image(
        found.images, found.captions, embeddings(found.images, found.captions), dataset=format, split="val"
    )
    assert sorted(protocol.gallery.item) == sorted(val["image_id"])
    assert sorted(protocol.query.item) == sorted(texts["caption_id"]) and protocol.exclude == "none"


def embeddings(images, captions):
    ids = [*images["image_id"], *captions["caption_id"]]
    kinds = ["image"] * len(images) + ["text"] * len(captions)
    roles = ["gallery" if kind == "image" else "query" for kind in kinds]
    rows = pd.DataFrame({"item_id": ids, "role": roles, "modality": kinds, "condition": "standard"})
    return EmbeddingTable(rows, np.eye(1, 4, dtype=np.float32).repeat(len(ids), axis=0))


def test_options_are_heeded_only_where_they_mean_something():
    assert set(FORMATS) <= set(format_names())
    heeded = {name: supported_options(name) for name in FORMATS}
    assert heeded["cuhk-pedes"] == {"seed", "fractions"} and heeded["rstpreid"] == frozenset()
    assert heeded["icfg-pedes"] == heeded["ufine6926"] == {"seed", "carve_val"}


# --- CUHK-PEDES, the two files


@pytest.fixture(scope="module")
def first_release(rendered, tmp_path_factory):
    return cuhk_pedes.write_first_release(*rendered, tmp_path_factory.mktemp("first"))


@pytest.fixture
def both_files(rendered, first_release, tmp_path):
    root = cuhk_pedes.write(*rendered, tmp_path)
    (root / "caption_all.json").write_bytes((first_release / "caption_all.json").read_bytes())
    return root


@pytest.mark.covers(1)
def test_the_first_release_is_read_split_by_people_and_called_what_it_is(rendered, first_release):
    images, captions, _ = rendered
    found = load("cuhk-pedes", first_release, fractions=(0.5, 0.25, 0.25), seed=3)
    people = found.images.groupby("split")["person_id"].nunique().to_dict()
    assert people == {"train": 6, "val": 3, "test": 3}
    assert (found.images.groupby("person_id")["split"].nunique() == 1).all()
    mine = facts(found.images.assign(split="x"), found.captions, each=9)
    assert mine == facts(images.assign(split="x", camera_id=None), captions, each=9)
    notes = " ".join(found.notes)
    assert "Read caption_all.json, the first release" in notes and "0.5/0.25/0.25" in notes and "(seed 3)" in notes
    assert "This is not the official split, so no number compares" in notes
    assert "CUHK-PEDES all: found 12 people, 48 images, 96 captions; the release has 13,003, 40,206" in notes


@pytest.mark.covers(1)
def test_the_split_of_the_first_release_depends_on_the_seed_and_defaults_to_the_documented_shares(first_release):
    def members(seed):
        images = load("cuhk-pedes", first_release, seed=seed).images
        return frozenset(images.loc[images["split"] == "test", "person_id"])

    assert members(1) == members(1) and len({members(seed) for seed in range(6)}) > 1
    assert len(members(1)) == 2, "a fifth of twelve people"


def test_of_two_files_the_one_with_splits_is_read_and_a_note_says_so(both_files):
    found = load("cuhk-pedes", both_files)
    assert {"train", "val", "test"} == set(found.images["split"])
    notes = " ".join(found.notes)
    assert "Read reid_raw.json" in notes and "caption_all.json beside it" in notes
    with pytest.raises(UsageError, match="official splits, so `fractions` has no meaning"):
        load("cuhk-pedes", both_files, fractions=(0.5, 0.2, 0.3))


def test_the_files_are_told_apart_by_their_content(both_files):
    newer, first = both_files / "reid_raw.json", both_files / "caption_all.json"
    content = newer.read_bytes()
    newer.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=r"no entry with a `split`.*call it caption_all\.json"):
        load("cuhk-pedes", both_files)
    newer.unlink()
    first.write_bytes(content)
    found = load("cuhk-pedes", both_files)
    assert "Read caption_all.json, which has the official split." in found.notes


def test_cuhk_pedes_writes_what_public_readers_expect(laid_out):
    items = json.loads((laid_out["cuhk-pedes"] / "reid_raw.json").read_text())
    assert set(items[0]) == {"split", "captions", "file_path", "processed_tokens", "id"}
    assert [len(item["processed_tokens"]) for item in items] == [2] * 48
    assert items[0]["processed_tokens"][0] == captioned.words(items[0]["captions"][0])
    market = [item for item in items if item["file_path"].startswith("Market/")]
    assert 0 < len({item["id"] for item in market}) < 12
    for item in market:
        number, camera, _, end = item["file_path"].removeprefix("Market/").split("_")
        assert int(number) % 2 == 0 and len(number) == 4 and camera.endswith("s1") and end == "00.png"
    assert len({item["file_path"].split("/")[0] for item in items}) > 3


def test_words_are_lower_case_and_without_punctuation():
    assert captioned.words("A man's T-shirt, no. 5!") == ["a", "man's", "t", "shirt", "no", "5"]


# --- ICFG-PEDES and UFine6926


@pytest.mark.covers(2)
def test_icfg_pedes_takes_the_misspelt_file_and_the_camera_of_msmt17_names(tmp_path):
    names = ["test/0627/0627_010_05_0303afternoon_1591_0.jpg", "train/0002/0002_001_15_0113noon_0001_1_ex.jpg", "x.jpg"]
    items = [item(file_path=name, id=number, captions=["One."]) for number, name in enumerate(names)]
    (tmp_path / "ICFG_PEDES.json").write_text(json.dumps(items))
    (tmp_path / "imgs").mkdir()
    entries = reader("icfg-pedes")(tmp_path, Options()).entries
    assert [entry.camera for entry in entries] == ["c5", "c15", None]
    assert [entry.split for entry in entries] == ["train"] * 3, "the folder `test` is MSMT17's"


@pytest.mark.covers(2)
def test_icfg_pedes_counts_an_image_that_is_listed_twice_as_its_release_does(tmp_path, monkeypatch):
    monkeypatch.setattr(icfg_pedes, "RELEASE", replace(icfg_pedes.RELEASE, official={"train": (1, 2, 2)}))
    draft = read(tmp_path, "icfg-pedes", [item(captions=["One."]), item(captions=["Two."])])
    assert [text for _, text, _ in draft.entries[0].texts] == ["One.", "Two."] and len(draft.entries) == 1
    assert draft.notes == ["1 image(s) listed more than once; their captions were joined."]


def test_icfg_pedes_tells_a_new_count_in_test_from_a_person_in_two_splits(tmp_path):
    train = item(file_path="test/0003/a.png", id=0)
    other = item(file_path="train/0003/b.png", id=0, split="test")
    draft = read(tmp_path, "icfg-pedes", [train, other])
    assert [entry.person for entry in draft.entries] == ["0", "test-0"]
    assert any("the people of test are called test-<id>" in note for note in draft.notes)
    for path in ("test/0003/b.png", "elsewhere/b.png"):
        draft = read(tmp_path, "icfg-pedes", [train, {**other, "file_path": path}])
        assert [entry.person for entry in draft.entries] == ["0", "0"]
        with pytest.raises(DataError, match="two splits"):
            measure(draft, Options())


def test_ufine6926_finds_images_that_were_moved_below_imgs(tmp_path):
    (tmp_path / "imgs" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(tmp_path / "imgs" / "images" / "1.jpg")
    assert probe("ufine6926", tmp_path) is None
    draft = read(tmp_path, "ufine6926", [item(file_path="images/1.jpg")])
    assert measure(draft, Options()).images["image_id"].tolist() == ["ufine6926:images/1.jpg"]
    assert probe("ufine6926", tmp_path).missing == ()


def test_ufine6926_finds_images_whose_folder_was_renamed_imgs(tmp_path):
    (tmp_path / "imgs").mkdir()
    Image.new("RGB", (4, 8)).save(tmp_path / "imgs" / "1.jpg")
    draft = read(tmp_path, "ufine6926", [item(file_path="images/1.jpg")])
    found = measure(draft, Options()).images
    assert found["image_id"].tolist() == ["ufine6926:images/1.jpg"]
    assert found["path"].tolist() == [(tmp_path / "imgs" / "1.jpg").as_posix()]
    assert probe("ufine6926", tmp_path).missing == ()


@pytest.mark.parametrize("format", FORMATS)
def test_the_annotation_file_itself_may_be_given_and_another_file_is_refused(laid_out, format, tmp_path, monkeypatch):
    root, name = laid_out[format], MODULES[format].RELEASE.annotations[0]
    of_file = reader(format)(root / name, Options())
    assert of_file.entries == reader(format)(root, Options()).entries
    assert probe(format, root / name) == probe(format, root)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "imgs").mkdir()
    aside = tmp_path / "annotations" / name
    aside.write_bytes((root / name).read_bytes())
    assert {e.path.is_relative_to(tmp_path) for e in reader(format)(aside, Options()).entries} == {True}
    monkeypatch.chdir(root)
    assert probe(format, Path(name)) == probe(format, root), "a relative path, without a folder"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=rf"other\.json is a file, not a folder of .*Give the folder with `{name}`"):
        reader(format)(tmp_path / "other.json", Options())


def test_of_the_two_files_of_cuhk_pedes_the_one_given_is_read(both_files):
    notes = reader("cuhk-pedes")(both_files / "caption_all.json", Options()).notes
    assert any(note.startswith("Read caption_all.json, the first release") for note in notes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_without_its_folder_of_images_is_refused_in_one_sentence(tmp_path, format):
    listed = [item(file_path="images/1.jpg")]
    (tmp_path / MODULES[format].RELEASE.annotations[0]).write_text(json.dumps(listed))
    with pytest.raises(DataError, match=r"holds no folder .*`imgs/`, where the images of .* lie.*data check"):
        reader(format)(tmp_path, Options())
    assert len(reader(format)(tmp_path, Options(lenient=True)).entries) == 1, "the checks name what is missing"


def test_one_person_is_moved_and_not_one_people(laid_out):
    assert "1 person moved from train to val (seed 0)." in load("icfg-pedes", laid_out["icfg-pedes"], carve_val=1).notes


@pytest.mark.covers(3)
def test_rstpreid_says_when_a_file_is_the_withdrawn_first_download(tmp_path, monkeypatch):
    monkeypatch.setattr(rstpreid, "_WITHDRAWN", {"train": 2, "val": 0, "test": 1})
    items = [item(img_path=f"000{i}_c1_0.jpg", id=i, split=split) for i, split in enumerate(["train", "train", "test"])]
    assert any("download again" in note for note in read(tmp_path, "rstpreid", items).notes)


@pytest.mark.covers(3)
def test_both_counts_of_rstpreid_are_documented():
    assert "4,104" in rstpreid.__doc__ and "4,101 = 3,701 + 200 + 200" in rstpreid.__doc__


# --- probes


@pytest.mark.parametrize("format", FORMATS)
def test_a_probe_knows_its_own_layout_and_no_other(laid_out, format, tmp_path):
    found = probe(format, laid_out[format])
    assert found.folder == laid_out[format] and found.missing == ()
    above = probe(format, laid_out[format].parent)
    assert above.folder == laid_out[format] and "one folder below" in above.variant
    assert [probe(format, laid_out[other]) for other in FORMATS if other != format] == [None] * 3
    assert probe(format, tmp_path) is None and probe(format, tmp_path / "missing") is None


@pytest.mark.covers(1)
def test_a_probe_names_the_image_folders_that_a_partial_copy_lacks(rendered, tmp_path):
    root = cuhk_pedes.write(*rendered, tmp_path)
    for name in ("Market", "train_query"):
        (root / "imgs" / name).rename(tmp_path / name)
    assert probe("cuhk-pedes", root).missing == ("imgs/Market", "imgs/train_query")
    (root / "imgs").rename(tmp_path / "imgs")
    assert probe("cuhk-pedes", root).missing == ("imgs",)
    (root / "reid_raw.json").unlink()
    found = probe("cuhk-pedes", root)
    assert found.variant == "CUHK-PEDES without its annotation file" and found.missing == ("reid_raw.json", "imgs")


def test_a_probe_names_the_first_release(both_files):
    assert "reid_raw.json" in probe("cuhk-pedes", both_files).variant
    (both_files / "reid_raw.json").unlink()
    found = probe("cuhk-pedes", both_files)
    assert "caption_all.json" in found.variant and "no splits" in found.notes[0]


# --- hostile input


def item(**change):
    """One entry, with the keys of all sets."""
    entry = {"split": "train", "captions": ["One.", "Two."], "file_path": "a.png", "img_path": "a.png", "id": 1}
    return {**entry, **change}


def read(folder, format, items, **options):
    (folder / MODULES[format].RELEASE.annotations[0]).write_text(json.dumps(items))
    (folder / "imgs").mkdir(exist_ok=True)
    return reader(format)(folder, Options(**options))


HOSTILE = [
    ({"id": None}, "id 'None' is not a whole number"),
    ({"id": True}, "id 'True' is not"),
    ({"id": float("nan")}, "id 'nan' is not a whole number"),
    ({"id": 1.5}, "id '1.5' is not"),
    ({"id": " "}, "id ' ' is not"),
    ({"id": "7\0"}, "the id holds a NUL byte"),
    ({"split": "dev"}, "split 'dev' is none of train, val, test"),
    ({"split": ["train"]}, "is none of train, val, test"),
    ({"captions": "text"}, "captions must be a list of texts"),
    ({"captions": [None]}, "captions must be a list of texts"),
    ({"captions": ["a\0"]}, "a caption holds a NUL byte"),
    ({"captions": ["a\ud800"]}, "lone surrogate"),
    ({"path": 3}, "is not a text"),
    ({"path": ""}, "is not a file name"),
    ({"path": "a\0b.png"}, "holds a NUL byte"),
    ({"path": "\udcff.png"}, "lone surrogate"),
    ({"path": "../../etc/passwd"}, "leads outside"),
    ({"path": "/etc/passwd"}, "leads outside"),
    ({"path": "..\\..\\etc\\passwd"}, "leads outside"),
    ({"path": "imgs/../../x.png"}, "leads outside"),
    ({"path": "imgs/../imgs/x.png"}, "relative to the folder; `..` and absolute paths are not allowed"),
    ({"path": "C:\\imgs\\x.png"}, "is an absolute path of Windows"),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("change, message", HOSTILE, ids=[message for _, message in HOSTILE])
def test_an_entry_unlike_the_format_is_refused_by_number_or_listed(tmp_path, format, change, message):
    if "path" in change:
        change = {MODULES[format].RELEASE.path_key: change["path"]}
    items = [item(file_path="b.png", img_path="b.png"), item(**change), item(file_path="c.png", img_path="c.png", id=2)]
    with pytest.raises(DataError, match=f"entry 1: .*{message}"):
        read(tmp_path, format, items)
    draft = read(tmp_path, format, items, lenient=True)
    assert [entry.path.name for entry in draft.entries] == ["b.png", "c.png"]
    assert len(draft.problems) == 1 and "entry 1" in draft.problems[0] and "\n" not in draft.problems[0]


@pytest.mark.parametrize("entry, message", [({"id": 1}, "lacks split, captions, file_path"), ([], "must be an object")])
def test_a_lenient_reader_lists_every_entry_it_skips(tmp_path, entry, message):
    draft = read(tmp_path, "cuhk-pedes", [item(), entry, item(id=2), item(file_path="../x")], lenient=True)
    assert len(draft.entries) == 1 and [message in draft.problems[0], len(draft.problems)] == [True, 3]
    assert "listed before with another id or split" in draft.problems[1]


def test_captions_that_are_missing_are_said(tmp_path):
    draft = read(tmp_path, "ufine6926", [item(captions=[" ", "Two."]), item(file_path="b.png", captions=[])])
    assert "1 empty caption(s) left out, the first of a.png." in draft.notes
    assert "1 image(s) have no caption, the first: b.png." in draft.notes


FILES = [
    (b"[{", "not valid JSON"),
    (b"{}", "must be a list of images, not dict"),
    (b"[" * 100_000, "nested too deeply"),
    (b'[{"a": "\xff"}]', r"not UTF-8 \(byte 8\)"),
    (b'\xef\xbb\xbf[{"a": "\xff"}]', r"not UTF-8 \(byte 11\)"),
    ("[]".encode("utf-16"), r"not UTF-8 \(byte 0\)"),
    (b'[{"a": "\0"}]', "not valid JSON"),
    (b"[" + b"1" * 5000 + b"]", "holds a number of thousands of digits"),
    (b"", "not valid JSON"),
]


@pytest.mark.parametrize("content, message", FILES, ids=[message for _, message in FILES])
def test_a_damaged_annotation_file_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "data_captions.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        reader("rstpreid")(tmp_path, Options(lenient=True))
    assert "data_captions.json" in caught.value.message and "\n" not in caught.value.message


def test_a_file_of_two_gigabytes_is_refused_without_reading_it(tmp_path, monkeypatch):
    huge = tmp_path / "data_captions.json"
    huge.touch()
    os.truncate(huge, 2 << 30)
    monkeypatch.setattr(type(huge), "read_bytes", lambda self: pytest.fail("the file was read"))
    with pytest.raises(DataError, match="2,048 MiB; the limit is 512 MiB"):
        reader("rstpreid")(tmp_path, Options())


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "data_captions.json")
    with pytest.raises(DataError, match="not a regular file"):
        reader("rstpreid")(tmp_path, Options())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds `data_captions\.json`"):
        reader("rstpreid")(tmp_path / "empty", Options())


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path, mark):
    text = mark + json.dumps([item(captions=["Käthe.\r\n"])], ensure_ascii=False, indent=1).replace("\n", "\r\n")
    (tmp_path / "data_captions.json").write_bytes(text.encode())
    (tmp_path / "imgs").mkdir()
    entry = reader("rstpreid")(tmp_path, Options()).entries[0]
    assert entry.texts == [("full", "Käthe.", "image")]
