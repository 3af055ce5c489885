"""Part masks that users bring: label maps, tables, everything that can be wrong with them, and the words for parts."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from reidctl import tables
from reidctl.errors import DataError
from reidctl.explain.grounding import score_explanations, summarise_grounding
from reidctl.explain.parsing import part_of_phrase, read_label_map, read_labels, read_parsing
from reidctl.masks import decode_mask, encode_mask, mask_box
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

LIP = re.findall(
    r"\S+",
    "Hat Hair Glove Sunglasses Upper-clothes Dress Coat Socks Pants Jumpsuits Scarf Skirt Face Left-arm Right-arm "
    "Left-leg Right-leg Left-shoe Right-shoe",
)
ATR = re.findall(
    r"\S+",
    "Hat Hair Sunglasses Upper-clothes Skirt Pants Dress Belt Left-shoe Right-shoe Face Left-leg Right-leg Left-arm "
    "Right-arm Bag Scarf",
)
LABELS = {"0": "Background", "5": "Upper-clothes", "9": "Pants", "18": "shoes", "19": "Shoes", "255": None}
NUMBERS = np.asarray([[0, 5, 5, 0], [0, 5, 5, 255], [0, 9, 9, 0], [0, 18, 19, 0]], np.uint8)


def images_of(*paths, size=(8, 8)):
    """An `images` table; ids are `d:` and a number."""
    return pd.DataFrame(
        [
            {"image_id": f"d:{n}", "path": path, "height": size[0], "width": size[1], "person_id": f"d:p{n}"}
            for n, path in enumerate(paths)
        ]
    )


def save(path, numbers=NUMBERS, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(numbers, np.uint8))
    if mode == "P":
        image.putpalette([(n * 7) % 256 for n in range(768)])
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "maps"
    path.mkdir()
    (path / "labels.json").write_text(json.dumps(LABELS))
    return path


@pytest.mark.parametrize("mode", ["L", "P"])
def test_label_maps_become_rows_of_parts_at_the_size_of_the_picture(folder, mode, tmp_path):
    save(folder / "a.png", mode=mode)
    found = read_parsing(folder, images_of("images/x/a.jpg", "images/x/b.jpg"))
    assert (found.missing, found.unused) == (1, 0)
    assert found.parts["part"].tolist() == ["upper clothes", "pants", "shoes"]
    assert set(found.parts["image_id"]) == {"d:0"}
    for row, wanted in zip(found.parts.itertuples(), (NUMBERS == 5, NUMBERS == 9, NUMBERS >= 18), strict=True):
        expected = (wanted & (NUMBERS != 255)).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(decode_mask(row.mask, 8, 8), expected)
        assert row.box == mask_box(expected) and row.phrase is None
    tables.write_table(tmp_path / "parts.parquet", "parts", found.parts)


def test_sixteen_bit_maps_are_read(folder):
    Image.fromarray(np.asarray([[0, 300], [300, 0]], np.uint16)).save(folder / "a.png")
    (folder / "labels.json").write_text('{"300": "cloak"}')
    assert read_parsing(folder, images_of("a.jpg", size=(2, 2))).parts["part"].tolist() == ["cloak"]


def test_shrinking_takes_the_nearest_number_and_drops_parts_that_vanish(folder):
    numbers = np.zeros((9, 9), np.uint8)
    numbers[4, 4], numbers[0, 0] = 5, 9
    save(folder / "a.png", numbers)
    found = read_parsing(folder, images_of("a.png", size=(3, 3)))
    assert found.parts["part"].tolist() == ["upper clothes"]
    assert found.parts["mask"].tolist() == [[4, 1, 4]]


def test_maps_are_found_by_id_by_file_and_by_folder_and_file(folder):
    images = images_of("images/cam_a/1.jpg", "images/cam_b/1.jpg", "images/cam_b/2.jpg", "images/3.jpg")
    save(folder / "cam_a" / "1.png")
    save(folder / "cam_b" / "1.png", NUMBERS * (NUMBERS == 9))
    save(folder / "2.PNG", NUMBERS * (NUMBERS == 5))
    save(folder / "d:3.png", NUMBERS * (NUMBERS == 18))
    save(folder / "stranger.png", [[77]])
    found = read_parsing(folder, images)
    assert (found.missing, found.unused) == (0, 1)
    parts = found.parts.groupby("image_id")["part"].agg(list).to_dict()
    assert parts == {
        "d:0": ["upper clothes", "pants", "shoes"], "d:1": ["pants"], "d:2": ["upper clothes"], "d:3": ["shoes"],
    }  # fmt: skip


def test_dots_in_names_and_folders_are_no_suffix(folder):
    save(folder / "cam.1" / "0001.png", NUMBERS * (NUMBERS == 5))
    save(folder / "0002.c1.png", NUMBERS * (NUMBERS == 9))
    found = read_parsing(folder, images_of("cam.1/0001", "x/0002.c1.jpg"))
    assert found.parts[["image_id", "part"]].to_numpy().tolist() == [["d:0", "upper clothes"], ["d:1", "pants"]]


def test_a_name_that_fits_two_images_is_refused(folder):
    save(folder / "1.png")
    with pytest.raises(DataError, match=r"1\.png fits the images `d:0` and `d:1`"):
        read_parsing(folder, images_of("cam_a/1.jpg", "cam_b/1.jpg"))


def test_two_maps_of_one_image_are_refused(folder):
    save(folder / "1.png")
    save(folder / "cam_a" / "1.png")
    with pytest.raises(DataError, match="`d:0` has two label maps"):
        read_parsing(folder, images_of("cam_a/1.jpg"))


def test_ids_that_climb_out_of_the_folder_open_nothing(folder):
    save(folder.parent / "secret.png")
    save(folder / "a.png")
    images = images_of("a.jpg", "../secret.jpg")
    images.loc[1, "image_id"] = "../secret"
    assert read_parsing(folder, images).missing == 1


def damaged(path):
    save(path)
    path.write_bytes(path.read_bytes()[:60])


def coloured(path):
    Image.new("RGB", (4, 4)).save(path)


def with_alpha(path):
    Image.new("LA", (4, 4)).save(path)


def jpeg(path):
    Image.new("L", (4, 4)).save(path, "JPEG")


def wide(path):
    save(path, np.zeros((4, 12)))


def unknown(path):
    save(path, [[0, 7], [5, 5]])


def huge(path):
    """A few bytes that claim 100,000 x 100,000 pixels."""
    chunk = PngImagePlugin.o32(100_000) * 2 + b"\x08\x00\x00\x00\x00"
    with path.open("wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n")
        PngImagePlugin.putchunk(stream, b"IHDR", chunk)
        PngImagePlugin.putchunk(stream, b"IDAT", b"")
        PngImagePlugin.putchunk(stream, b"IEND", b"")


def large(path):
    Image.new("1", (8_100, 8_000)).save(path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (damaged, "cannot be read"),
        (jpeg, "cannot be read"),
        (huge, "cannot be read"),
        (large, "the limit is"),
        (coloured, "mode RGB"),
        (with_alpha, "mode LA"),
        (wide, "other proportions"),
        (unknown, "the number 7"),
    ],
)
def test_a_wrong_label_map_is_one_sentence_that_names_it(folder, make, why):
    make(folder / "a.png")
    with pytest.raises(DataError, match=why) as raised:
        read_parsing(folder, images_of("a.jpg"))
    assert str(folder / "a.png") in raised.value.message and raised.value.message.count("\n") == 0


def test_small_maps_may_round_their_proportions(folder):
    save(folder / "a.png", np.full((24, 8), 5))
    assert len(read_parsing(folder, images_of("a.jpg", size=(250, 87))).parts) == 1


def test_a_missing_label_map_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.png"):
        read_label_map(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1, 2]", "not an object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"five": "hat"}', "no label number"),
        ('{"-1": "hat"}', "no label number"),
        ('{"99999": "hat"}', "no label number"),
        ('{"٣": "hat"}', "no label number"),
        ('{"5": "hat", "05": "bag"}', "given twice"),
        ('{"5": "hat", "5": "bag"}', "given twice"),
        ('{"5": " "}', "has no name"),
        ('{"5": 3}', "has no name"),
        ('{"5": {"a": 1}}', "has no name"),
        ('{"0": "hat"}', "0 is background"),
    ],
)
def test_wrong_labels_are_one_sentence(tmp_path, text, why):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DataError, match=why) as raised:
        read_labels(tmp_path / "labels.json")
    assert "labels.json" in raised.value.message


def test_labels_that_are_no_text_or_missing_are_data_errors(tmp_path):
    (tmp_path / "labels.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_labels(tmp_path / "labels.json")
    with pytest.raises(DataError, match="need names"):
        read_labels(tmp_path / "none.json")


def test_labels_are_tidied_and_background_needs_no_entry(tmp_path):
    (tmp_path / "labels.json").write_text('{"5": " Upper-clothes", "6": "left_SHOE", "255": null}')
    assert read_labels(tmp_path / "labels.json") == {0: None, 5: "upper clothes", 6: "left shoe", 255: None}


def test_a_folder_without_any_map_of_the_images_is_an_error(folder):
    save(folder / "stranger.png")
    with pytest.raises(DataError, match="no part of the 1 images"):
        read_parsing(folder, images_of("a.jpg"))


def table(path, columns=("image_id", "part", "box", "mask"), **changes):
    mask = np.zeros((8, 8), bool)
    mask[2:4, 3:] = True
    row = {
        "image_id": "d:0",
        "part": "Pants",
        "box": mask_box(mask),
        "mask": encode_mask(mask),
        "phrase": "x",
        **changes,
    }
    other = {**row, "image_id": "elsewhere", "mask": [1]}
    pd.DataFrame([row, other])[list(columns)].to_parquet(path)
    return mask


def test_a_table_is_read_without_the_optional_phrase_and_cut_to_the_images(tmp_path):
    mask = table(tmp_path / "p.parquet")
    found = read_parsing(tmp_path / "p.parquet", images_of("a.jpg", "b.jpg"))
    assert (found.missing, found.unused) == (1, 1)
    row = found.parts.iloc[0]
    assert (row["part"], row["phrase"]) == ("Pants", None)
    np.testing.assert_array_equal(decode_mask(row["mask"], 8, 8), mask)
    tables.write_table(tmp_path / "parts.parquet", "parts", found.parts)


def test_a_table_keeps_its_phrases(tmp_path):
    table(tmp_path / "p.parquet", ("image_id", "part", "phrase", "box", "mask"), phrase="blue jeans")
    assert read_parsing(tmp_path / "p.parquet", images_of("a.jpg")).parts["phrase"].tolist() == ["blue jeans"]


@pytest.mark.parametrize("mask", [[63], [32, 33], [-1, 65], []])
def test_a_mask_of_another_size_is_refused(tmp_path, mask):
    table(tmp_path / "p.parquet", mask=mask)
    with pytest.raises(DataError, match="mask of `Pants` in image `d:0`"):
        read_parsing(tmp_path / "p.parquet", images_of("a.jpg"))


def test_a_missing_file_and_a_table_of_something_else_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"p\.parquet"):
        read_parsing(tmp_path / "p.parquet", images_of("a.jpg"))
    table(tmp_path / "p.parquet", ("image_id", "part"))
    with pytest.raises(DataError, match=r"p\.parquet"):
        read_parsing(tmp_path / "p.parquet", images_of("a.jpg"))


@pytest.mark.covers(188)
def test_maps_are_scored_against_label_maps_of_the_user(folder):
    save(folder / "a.png")
    images = images_of("a.jpg")
    parts = read_parsing(folder, images).parts
    truth = decode_mask(parts["mask"].iloc[1], 8, 8).astype(np.float32)
    explained = pd.DataFrame(
        [
            {
                "query_id": "q", "image_id": "d:0", "phrase": "black pants", "char_start": 0, "char_end": 11,
                "grid_h": 8, "grid_w": 8, "relevance": truth.ravel(),
            }
        ]
    )  # fmt: skip
    found = summarise_grounding(score_explanations(explained, parts, images))
    assert [found[name].value for name in ("pointing", "mass", "iou")] == [1.0, 1.0, 1.0]
    assert found["pointing.random"].value == pytest.approx(truth.mean())


@pytest.mark.parametrize(
    ("phrase", "lip", "atr"),
    [
        ("black trousers", ["Pants"], ["Pants"]),
        ("blue jean shorts", ["Pants"], ["Pants"]),
        ("white sneakers", ["Left-shoe", "Right-shoe"], ["Left-shoe", "Right-shoe"]),
        ("the LEFT shoe", ["Left-shoe"], ["Left-shoe"]),
        ("right arm", ["Right-arm"], ["Right-arm"]),
        ("a red backpack", [], ["Bag"]),
        ("bag on his left shoulder", [], ["Bag"]),
        ("a black jacket", ["Coat"], ["Upper-clothes"]),
        ("jean jacket", ["Coat"], ["Upper-clothes"]),
        ("white T-shirt with long sleeves", ["Upper-clothes"], ["Upper-clothes"]),
        ("a dress shirt", ["Upper-clothes"], ["Upper-clothes"]),
        ("short black hair", ["Hair"], ["Hair"]),
        ("a cap on the head", ["Hat"], ["Hat"]),
        ("two dresses", ["Dress"], ["Dress"]),
        ("a knee-length skirt", ["Skirt"], ["Skirt"]),
        ("dark glasses", ["Sunglasses"], ["Sunglasses"]),
        ("brown leather belt", [], ["Belt"]),
        ("red shirt and black pants", ["Upper-clothes", "Pants"], ["Upper-clothes", "Pants"]),
        ("a short man", [], []),
        ("left", [], []),
        ("", [], []),
    ],
)
def test_phrases_find_the_parts_of_known_parsing_networks(phrase, lip, atr):
    assert (part_of_phrase(phrase, LIP), part_of_phrase(phrase, ATR)) == (lip, atr)


def test_parts_without_synonyms_are_found_by_their_names_in_any_number():
    assert part_of_phrase("a green umbrella", ["hat", "umbrellas"]) == ["umbrellas"]
    assert part_of_phrase("long walking sticks", ["walking_stick", "stick"]) == ["walking_stick", "stick"]
    assert part_of_phrase("a red stick", ["walking_stick"]) == []


def test_phrases_of_synthped_find_the_part_that_their_truth_names(tmp_path):
    write_dataset(SynthConfig(people=12, images_per_person=2, size=(64, 32)), tmp_path, workers=1)
    captions = tables.read_table(tmp_path / "captions.parquet", "captions")
    parts = tables.read_table(tmp_path / "parts.parquet", "parts").groupby("image_id")["part"].agg(list)
    checked = 0
    for row in captions[captions["kind"] == "phrase"].itertuples():
        true = row.caption_id.rsplit("-", 1)[-1]
        if true != "person" and true in parts[row.image_id]:
            assert part_of_phrase(row.text, parts[row.image_id]) == [true], row.text
            checked += 1
    assert checked > 150
