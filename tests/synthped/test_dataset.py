"""What is written: tables, files, digests, and independence from the number of workers."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl import tables
from reidctl.errors import UsageError
from reidctl.masks import decode_mask
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import contact_sheet, write_dataset
from reidctl.synthped.render import render

CONFIG = SynthConfig(people=6, images_per_person=3, domain="both", size=(64, 32))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    counts = []
    write_dataset(CONFIG, folder, workers=1, progress=counts.append)
    assert sum(counts) == 6 * 3 * 2
    return folder


def read(folder, name):
    return tables.read_table(folder / f"{name}.parquet", name)


def test_every_image_exists_with_the_recorded_size_and_digest(written):
    images = read(written, "images")
    assert len(images) == 36
    assert images.image_id.is_unique
    assert set(images.dataset) == {"synthped-a", "synthped-b"}
    for row in images.itertuples():
        data = (written / row.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row.sha256
        assert Image.open(written / row.path).size == (row.width, row.height) == (32, 64)


def test_the_file_holds_the_rendered_pixels(written):
    row = read(written, "images").iloc[4]
    pixels = np.asarray(Image.open(written / row["path"]))
    assert np.array_equal(pixels, render(CONFIG, 1, 1, domain="a").pixels)


def test_two_workers_write_the_same_bytes_as_one(written, tmp_path):
    write_dataset(CONFIG, tmp_path, workers=2)
    for path in sorted(written.rglob("*.p*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name
    assert not list(tmp_path.rglob(".*"))


def test_phrases_are_exact_spans_of_their_captions(written):
    captions = read(written, "captions")
    text = dict(zip(captions.caption_id, captions.text, strict=True))
    phrases = captions[captions.kind == "phrase"]
    assert len(phrases) > 100
    for row in phrases.itertuples():
        assert text[row.parent_id][int(row.char_start) : int(row.char_end)] == row.text


def test_every_image_has_two_captions_an_identity_and_a_clothing_text(written):
    captions = read(written, "captions")
    counts = captions.groupby(["image_id", "kind"]).size().unstack()
    assert (counts["full"] == 2).all()
    assert (counts["identity"] == 1).all()
    assert (counts["clothing"] == 1).all()
    assert set(captions.conditioned_on) == {"image"}


def test_a_set_without_captions_is_the_same_set_in_everything_else(written, tmp_path):
    write_dataset(CONFIG.replace(captioned="a"), tmp_path, workers=1)
    for path in sorted(written.rglob("*")):
        if path.is_file() and path.name != "captions.parquet":
            assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name
    before, after = read(written, "captions"), read(tmp_path, "captions")
    gone = before["image_id"].str.startswith("synthped-b") & before["kind"].isin(("full", "phrase"))
    assert set(before.loc[gone, "kind"]) == {"full", "phrase"}
    pd.testing.assert_frame_equal(after, before[~gone].reset_index(drop=True))


def test_the_only_dataset_cannot_be_the_one_without_captions():
    assert SynthConfig(domain="b", captioned="b").captioned == "b"
    assert SynthConfig(domain="c", captioned="c").captioned == "c"
    for domain, captioned in (("b", "a"), ("c", "a"), ("a", "c")):
        with pytest.raises(ValueError, match=f"only dataset, {domain}"):
            SynthConfig(domain=domain, captioned=captioned)
    with pytest.raises(ValueError, match="both datasets without captions"):
        SynthConfig(domain="both", captioned="c")


def test_part_masks_fit_their_boxes(written):
    parts = read(written, "parts")
    assert {"person", "upper", "lower", "head"} <= set(parts.part)
    for row in parts.itertuples():
        mask = decode_mask(list(row.mask), 64, 32)
        x0, y0, x1, y1 = row.box
        inside = mask[y0:y1, x0:x1]
        assert inside.sum() == mask.sum() > 0
        assert inside[0].any()
        assert inside[:, -1].any()


@pytest.mark.covers(169)
def test_attributes_name_every_factor(written):
    attributes = read(written, "images").attributes.iloc[0]
    expected = {"gender", "age", "build", "stature", "skin", "hair_length", "hair_colour", "upper_type", "upper_colour"}
    expected |= {
        "upper_pattern",
        "lower_type",
        "lower_colour",
        "shoe_type",
        "shoe_colour",
        "carried",
        "view",
        "occluded",
    }
    expected |= {"blur", "outfit", "domain", "true_person", "clone_of", "clone_kind"}
    assert expected <= set(attributes)


def test_training_images_have_no_role_and_the_others_have_one(written):
    images = read(written, "images")
    assert images[images.split == "train"].role.isna().all()
    assert set(images[images.split != "train"].role) == {"query", "gallery"}


def test_workers_below_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="workers"):
        write_dataset(CONFIG, tmp_path, workers=0)


def test_a_contact_sheet_places_pictures_in_rows():
    red, blue = np.zeros((4, 2, 3), np.uint8), np.zeros((4, 2, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([red, blue, red], columns=2, zoom=2)
    assert sheet.size == (8, 16)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((7, 0)) == (0, 0, 255)
    assert sheet.getpixel((7, 15)) == (0, 0, 0)
    with pytest.raises(UsageError):
        contact_sheet([])


def test_the_number_of_the_first_identity_renames_everybody_and_changes_no_pixel(tmp_path):
    plain, moved = (SynthConfig(people=6, images_per_person=2, clone_pairs=1, first=first) for first in (0, 500))
    for config, name in ((plain, "plain"), (moved, "moved")):
        write_dataset(config, tmp_path / name, workers=1)
    before, after = (tables.read_table(tmp_path / name / "images.parquet", "images") for name in ("plain", "moved"))
    assert list(before["sha256"]) == list(after["sha256"])
    number = lambda person: int(person.split(":")[1])  # noqa: E731
    assert [number(a) - number(b) for a, b in zip(after["person_id"], before["person_id"], strict=True)] == [500] * 12
    clones = [
        {row["person_id"]: dict(row["attributes"])["clone_of"] for row in frame.to_dict("records")}
        for frame in (before, after)
    ]
    for mine in clones:
        paired = {person: other for person, other in mine.items() if other}
        assert len(paired) == 2 and all(paired[other] == person for person, other in paired.items())
    assert not set(before["image_id"]) & set(after["image_id"])
