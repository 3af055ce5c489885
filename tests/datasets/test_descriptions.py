"""Texts of a model by image: aligned by path, every mismatch said, contradictions refused."""

import json

import pandas as pd
import pytest
from PIL import Image

from reidctl.datasets.base import Draft, Entry, Options, measure
from reidctl.datasets.descriptions import attach, read_descriptions
from reidctl.errors import DataError


def draft(tmp_path, names=("x/a.png", "x/b.png", "c.png"), texts=()):
    entries = [Entry(n, tmp_path / "imgs" / n, "test", str(i), texts=list(texts)) for i, n in enumerate(names)]
    return Draft("mine", entries, tmp_path / "annotation.json", ["before"])


def table(folder, text, name="d.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts(found):
    return {entry.key: list(entry.texts) for entry in found.entries}


@pytest.mark.covers(18)
def test_texts_are_aligned_by_image_and_may_describe_a_gallery(tmp_path):
    # Not in the order of the dataset: position means nothing.
    path = table(tmp_path, "image,identity,clothing\nc.png,Old.,Blue.\nx/a.png,Tall.,Red.\nx/b.png,Young.,\n")
    found = attach(draft(tmp_path, texts=[("full", "A man.", "image")]), path)
    assert texts(found) == {
        "x/a.png": [("full", "A man.", "image"), ("identity", "Tall.", "image"), ("clothing", "Red.", "image")],
        "x/b.png": [("full", "A man.", "image"), ("identity", "Young.", "image")],
        "c.png": [("full", "A man.", "image"), ("identity", "Old.", "image"), ("clothing", "Blue.", "image")],
    }
    assert found.notes == [
        "before",
        "d.csv: texts of 3 images, taken as written from the image alone.",
        "d.csv: 1 image(s) lack the clothing text, the first: x/b.png.",
    ]
    for name in texts(found):
        (tmp_path / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(tmp_path / "imgs" / name)
    captions = measure(found, Options()).captions
    assert captions[captions["kind"] != "full"]["conditioned_on"].unique().tolist() == ["image"]


@pytest.mark.covers(18)
def test_missing_extra_repeated_and_empty_rows_are_counted_and_the_first_named(tmp_path):
    rows = "x/a.png,T.,R.,gpt\nx/a.png,T.,R.,gpt\nnew.png,T.,R.,gpt\nold.png,T.,R.,qwen\nx/b.png, ,,\n"
    notes = attach(draft(tmp_path), table(tmp_path, "image,identity,clothing,model\n" + rows)).notes[1:]
    assert notes == [
        "d.csv: texts of 1 image by gpt, qwen, taken as written from the image alone.",
        "d.csv: 1 image(s) are not described, the first: c.png.",
        "d.csv: 2 described image(s) are not in the dataset; their texts were left out, the first: new.png.",
        "d.csv: 1 row(s) repeat an earlier one, the first: x/a.png.",
        "d.csv: 1 image(s) have no text in their row, the first: x/b.png.",
    ]


@pytest.mark.covers(18)
def test_rows_that_disagree_are_refused(tmp_path):
    path = table(tmp_path, "image,identity\nx/a.png,Tall.\nx/a.png,Short.\n")
    with pytest.raises(DataError, match=r"data row 2: image x/a\.png was described before with other texts"):
        attach(draft(tmp_path), path)
    path = table(tmp_path, "image,identity\nx/a.png,Tall.\nmine:x/a.png,Short.\n")
    with pytest.raises(DataError, match=r"the rows of image x/a\.png disagree"):
        attach(draft(tmp_path), path)


@pytest.mark.covers(18)
@pytest.mark.parametrize("name", ["x/a.png", "mine:x/a.png", "imgs/x/a.png", "./x/a.png", "x\\a.png"])
def test_an_image_answers_to_its_path_and_its_id(tmp_path, name):
    path = table(tmp_path, json.dumps({"image_id": name, "identity_text": "Tall."}), "d.jsonl")
    assert texts(attach(draft(tmp_path), path))["x/a.png"] == [("identity", "Tall.", "image")]


def test_rows_of_empty_cells_are_passed_over_and_counted(tmp_path):
    path = table(tmp_path, "image,identity\n,\nx/a.png,Tall.\n,\n")
    found = attach(draft(tmp_path), path)
    assert texts(found)["x/a.png"] and found.notes[-1] == "d.csv: 2 row(s) of empty cells passed over."


def test_an_absolute_path_is_found_too(tmp_path):
    path = table(tmp_path, f"image,identity\n{tmp_path}/imgs/x/a.png,Tall.\n")
    assert texts(attach(draft(tmp_path), path))["x/a.png"] == [("identity", "Tall.", "image")]


@pytest.mark.covers(18)
def test_every_kind_of_table_gives_the_same_texts(tmp_path):
    rows = pd.DataFrame({"path": ["x/a.png"], "Identity": ["Tall."], "clothing": ["Käthe's coat."]})
    rows.to_csv(tmp_path / "d.csv", index=False)
    rows.to_csv(tmp_path / "d.tsv", index=False, sep="\t", encoding="utf-8-sig", lineterminator="\r\n")
    rows.to_parquet(tmp_path / "d.parquet")
    rows.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    for name in ("d.csv", "d.tsv", "d.parquet", "d.jsonl"):
        assert read_descriptions(tmp_path / name).texts == {"x/a.png": ("Tall.", "Käthe's coat.")}


def test_another_text_in_the_dataset_itself_is_refused_and_the_same_one_is_taken_over(tmp_path):
    path = table(tmp_path, "image,identity\nx/a.png,Tall.\n")
    with pytest.raises(DataError, match=r"x/a\.png has another identity text in the dataset"):
        attach(draft(tmp_path, texts=[("identity", "Short.", "image")]), path)
    found = attach(draft(tmp_path, texts=[("identity", "Tall.", "none")]), path)
    assert texts(found)["x/a.png"] == [("identity", "Tall.", "image")]


@pytest.mark.parametrize("content, message", [
    (b"image,text\na.png,x\n", "needs the columns `image` and `identity` or `clothing`; it has: image, text"),
    (b"identity,clothing\nTall.,Red.\n", "needs the columns"),
    (b"image,identity\n,Tall.\n", "data row 1: `image` is empty"),
    (b"image,identity\nx/a.png,K\xe4the\n", r"line 2 is not UTF-8 \(byte 24"),
    (b"image,identity\nx/a.png,T\0\n", "NUL byte at offset 24"),
    (b"image,identity\nx/a.png,T.,U.\n", "3 cells, but the header has 2"),
    (b"image,identity\nother.png,T.\n", r"none of its 1 image is in mine \(first: other.png\)"),
    (b"", "is empty"),
])  # fmt: skip
def test_a_hostile_file_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        attach(draft(tmp_path), table(tmp_path, content))


def test_a_missing_file_and_an_empty_json_file_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_descriptions(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="has no rows"):
        read_descriptions(table(tmp_path, "", "d.jsonl"))
    with pytest.raises(DataError, match="`identity` must be a text, not list"):
        read_descriptions(table(tmp_path, '{"image": "a", "identity": ["x"]}', "d.jsonl"))
