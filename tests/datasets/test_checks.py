"""Every check of `data check` on tables made by hand: what it counts, what it names, and that it can be silent."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidctl import tables
from reidctl.datasets import checks
from reidctl.datasets.base import Draft, Entry, Probe, compare_counts
from reidctl.datasets.caption_checks import caption_texts, check_captions, check_truncation
from reidctl.datasets.image_checks import check_duplicates, check_near, check_people, check_queries
from reidctl.datasets.scan import Facts, Problem


def images(*rows, **common):
    """A table of images that were read; every row differs from the others unless it says otherwise."""
    made = []
    for number, row in enumerate(rows):
        usual = {
            "image_id": f"d:{number}",
            "path": f"/d/imgs/{number}.png",
            "dataset": "d",
            "split": "train",
            "role": None,
            "person_id": f"d:p{number}",
            "camera_id": None,
            "file_width": 4,
            "file_height": 8,
            "file_sha256": f"sha{number}",
            "pixels": f"pixels{number}",
            "dhash": 0,
            "problem": "",
            "message": "",
        }
        made.append(usual | common | row)
    return pd.DataFrame(made).astype({"dhash": np.uint64})


def captions(*rows):
    made = []
    for number, row in enumerate(rows):
        usual = {
            "caption_id": f"c{number}",
            "kind": "full",
            "source": "human",
            "conditioned_on": "image",
            "status": "ok",
        }
        made.append(usual | row)
    return pd.DataFrame(made)


def said(image, text, **more):
    return {"image_id": f"d:{image}", "text": text} | more


def named(findings):
    """Findings by check; no check may report twice."""
    found = {item.check: item for item in findings}
    assert len(found) == len(findings)
    return found


def only(findings, check):
    """The one finding, which must be of this check."""
    assert [item.check for item in findings] == [check]
    return findings[0]


GOOD = "A man in a red coat walks."


# --- files


def test_image_table_holds_the_facts_and_problems_in_order():
    plain = pd.DataFrame({"image_id": ["a", "b"], "path": ["a.png", "b.png"]}, index=[7, 9])
    found = checks.image_table(plain, [Facts(3, 5, "s", "p", 2**63 + 1), Problem("huge", "Too big.")])
    assert found.iloc[0][["file_width", "file_height", "file_sha256", "pixels", "problem"]].tolist() == [
        3,
        5,
        "s",
        "p",
        "",
    ]
    assert found["dhash"].tolist() == [2**63 + 1, 0]
    assert found.iloc[1][["pixels", "problem", "message"]].tolist() == ["", "huge", "Too big."]


def test_good_files_give_only_their_sizes():
    found = only(checks.check_files(images({}, {}, {"file_width": 2, "file_height": 3})), "image-sizes")
    assert found.severity == "note" and found.details == {"median": (4, 8), "smallest": (2, 3)}
    assert "4x8" in found.sentence and found.examples == ("d:2",)


def test_missing_images_are_counted_by_subfolder():
    rows = [{"path": f"/d/imgs/{folder}/{n}.png"} for folder in ("CUHK01", "Market") for n in range(3)]
    for number in (0, 1, 4):
        rows[number] |= {"problem": "missing", "message": "gone"}
    found = named(checks.check_files(images(*rows)))["missing-images"]
    assert (found.severity, found.count, found.total, found.rate) == ("error", 3, 6, 0.5)
    assert found.sentence == "3 images are missing: CUHK01 2 of 3, Market 1 of 3."
    assert found.details["folders"]["CUHK01"] == {"missing": 2, "total": 3}
    assert found.examples == ("/d/imgs/CUHK01/0.png", "/d/imgs/CUHK01/1.png", "/d/imgs/Market/1.png")


def test_missing_images_of_one_folder_name_it():
    found = checks.check_files(images({"problem": "missing"}, {}))[0]
    assert found.sentence == "1 image is missing: imgs 1 of 2."


@pytest.mark.parametrize("kind", ["unreadable", "truncated", "huge"])
def test_a_bad_file_is_an_error_with_its_message(kind):
    found = named(checks.check_files(images({}, {"problem": kind, "message": "Image b is bad."})))[f"{kind}-images"]
    assert (found.severity, found.count, found.total, found.examples) == ("error", 1, 2, ("Image b is bad.",))


def test_a_file_that_is_not_the_imported_one_is_an_error():
    table = images({"sha256": "sha0"}, {"sha256": "before"}, {"sha256": "x", "problem": "missing"})
    found = named(checks.check_files(table))["changed-images"]
    assert (found.severity, found.count, found.examples) == ("error", 1, ("/d/imgs/1.png",))


def test_wide_images_are_a_note_with_a_rate():
    found = named(checks.check_files(images({"file_width": 9}, {}, {"file_width": 8}, {})))["wide-images"]
    assert (found.severity, found.count, found.rate) == ("note", 1, 0.25)


def test_an_image_listed_twice_and_no_image_are_errors():
    assert named(checks.check_files(images({}, {"image_id": "d:0"})))["repeated-ids"].examples == ("d:0",)
    assert only(checks.check_files(images({})[:0]), "no-images").severity == "error"


# --- duplicates


def test_different_pictures_give_no_duplicates():
    assert check_duplicates(images({}, {"split": "test"}, {"pixels": ""}, {"pixels": "", "split": "test"})) == []


@pytest.mark.covers(11)
def test_a_test_picture_in_train_is_a_leak():
    table = images({}, {"pixels": "x", "person_id": "d:a"}, {"pixels": "x", "person_id": "d:a", "split": "test"})
    found = only(check_duplicates(table), "leaked-images")
    assert (found.severity, found.count, found.total, found.examples) == ("error", 1, 3, ("d:1 = d:2",))
    assert found.details["pairs"] == {"train also in test": 1} and "0 of 2 equal byte for byte" in found.sentence


def test_a_leak_is_counted_by_pair_of_splits():
    rows = [{"pixels": "x", "split": split, "file_sha256": "s"} for split in ("train", "val", "test", "train")]
    found = named(check_duplicates(images(*rows, person_id="d:a")))["leaked-images"]
    assert found.count == 3 and found.details["pairs"] == {"train also in test": 2, "val also in test": 1}
    assert "4 of 4 equal byte for byte" in found.sentence


def test_one_picture_of_two_people_is_a_wrong_label():
    found = only(check_duplicates(images({"pixels": "x"}, {"pixels": "x"}, {})), "ambiguous-images")
    assert (found.severity, found.count, found.examples) == (
        "error",
        2,
        ("d:0 = d:1",),
    ) and "2 people" in found.sentence
    found = only(check_duplicates(images({"pixels": "x"}, {"pixels": "x"}), known_people=False), "duplicate-images")
    assert found.severity == "note"


def test_a_picture_twice_within_a_person_is_a_note_about_the_copies():
    found = only(check_duplicates(images(*[{"pixels": "x"}] * 3, {}, person_id="d:a")), "duplicate-images")
    assert (found.severity, found.count, found.total) == ("note", 2, 4)


@pytest.mark.parametrize(("query", "gallery", "reported"), [("c1", "c1", 0), (None, None, 1), ("c1", "c2", 1)])
def test_a_query_in_its_gallery_matters_where_no_camera_rule_drops_it(query, gallery, reported):
    table = images(
        {"role": "query", "camera_id": query}, {"role": "gallery", "camera_id": gallery},
        pixels="x", person_id="d:a", split="test",
    )  # fmt: skip
    found = named(check_duplicates(table))
    assert ("query-in-gallery" in found) == bool(reported)
    if reported:
        item = found["query-in-gallery"]
        assert (item.severity, item.count, item.total, item.examples) == ("warning", 1, 1, ("d:0 = d:1",))


# --- near duplicates

BITS = 0x00FF00FF00FF00FF


def test_a_nearly_equal_training_image_is_a_warning():
    table = images(
        {"dhash": BITS}, {"dhash": BITS ^ 0b1111, "split": "test"}, {"dhash": ~BITS % 2**64, "split": "test"}
    )
    found = only(check_near(table), "near-duplicates")
    assert (found.severity, found.count, found.total, found.examples) == ("warning", 1, 1, ("d:0 ~ d:1",))


def test_distance_five_equal_pixels_flat_pictures_and_other_train_images_are_not_near():
    assert check_near(images({"dhash": BITS}, {"dhash": BITS ^ 0b11111, "split": "test"})) == []
    assert check_near(images({"dhash": BITS, "pixels": "x"}, {"dhash": BITS, "pixels": "x", "split": "test"})) == []
    assert check_near(images({"dhash": 0b111}, {"dhash": 0b111, "split": "test"})) == []
    assert check_near(images({"dhash": BITS}, {"dhash": BITS})) == []
    assert check_near(images({"dhash": BITS, "split": "test"})) == []


# --- people


def test_people_of_one_split_with_two_cameras_give_nothing():
    rows = [{"person_id": f"d:{p}", "camera_id": camera} for p in "ab" for camera in ("c1", "c2")]
    assert check_people(images(*rows)) == []


@pytest.mark.covers(12)
def test_a_person_in_two_splits_is_an_error():
    rows = [{"person_id": "d:a"}, {"person_id": "d:a", "split": "test"}, {"person_id": "d:b"}, {"person_id": "d:b"}]
    found = only(check_people(images(*rows)), "people-in-two-splits")
    assert (found.severity, found.count, found.total, found.examples) == ("error", 1, 2, ("d:a (train, test)",))


def test_people_without_a_second_image_or_camera_are_notes():
    found = named(
        check_people(images({"camera_id": "c1"}, *[{"person_id": "d:a", "camera_id": "c1"}] * 2, {"camera_id": None}))
    )
    assert (found["single-image-people"].count, found["single-image-people"].severity) == (2, "note")
    assert found["single-camera-people"].examples == ("d:a",) and found["single-camera-people"].total == 3
    assert "single-camera-people" not in named(check_people(images({}, {"person_id": "d:a"}, {"person_id": "d:a"})))


@pytest.mark.parametrize(
    ("gallery", "answered"),
    [
        ({"camera_id": "c2"}, True),
        ({"camera_id": "c1"}, False),
        ({"camera_id": None}, True),
        ({"camera_id": "c2", "person_id": "d:b"}, False),
        ({"camera_id": "c2", "split": "val"}, False),
        ({"camera_id": "c2", "dataset": "e"}, False),
    ],
)
def test_a_query_needs_its_person_under_another_camera(gallery, answered):
    query = {"role": "query", "camera_id": "c1", "person_id": "d:a", "split": "test"}
    found = named(check_people(images(query, {"role": "gallery", "person_id": "d:a", "split": "test"} | gallery)))
    assert ("queries-without-match" not in found) == answered
    if not answered:
        item = found["queries-without-match"]
        assert (item.severity, item.count, item.total, item.examples) == ("warning", 1, 1, ("d:0",))


def test_a_query_without_cameras_is_answered_by_any_image_of_its_person():
    rows = [{"role": role, "person_id": "d:a", "split": "test"} for role in ("query", "gallery")]
    assert check_people(images(*rows)) == []


def test_a_gallery_that_nothing_searches_is_a_warning():
    gallery, query, train = ({"role": role, "split": "test"} for role in ("gallery", "query", None))
    table = images(gallery, gallery, train | {"split": "train"})
    found = only(check_queries(table, captions(said(2, GOOD))), "no-queries")
    assert (found.severity, found.count, found.total, found.examples) == ("warning", 1, 1, ("d test",))
    table = images(gallery, query, gallery | {"split": "val"}, gallery | {"dataset": "e"}, query | {"dataset": "e"})
    found = only(check_queries(table, tables.empty("captions")), "no-queries")
    assert (found.count, found.total, found.examples) == (1, 3, ("d val",))


def test_a_gallery_with_queries_or_captions_and_a_split_without_roles_are_well():
    gallery, query = ({"role": role, "split": "test"} for role in ("gallery", "query"))
    assert check_queries(images(gallery, query), tables.empty("captions")) == []
    assert check_queries(images(gallery, gallery), captions(said(1, GOOD))) == []
    assert check_queries(images({}, {"split": "test"}), tables.empty("captions")) == []


# --- captions


CODE_LIKE = [
    "def f(x): return x[0] + 1; import os",
    "import os",
    "import numpy as np",
    "A man.\nimport sys, os\n",
    "from os import path",
    "print(x)",
    "for i in range(10): x += 1",
    "for name in names: print(name)",
    "lambda x: x+1",
    "#include <stdio.h>",
    "self.id = id",
    "x = a[0]",
    "caption = 'A man'",
    "names['a']",
    "SELECT * FROM x",
    "</div>",
    "A man. <br/> He walks.",
    '<p class="x">A man.',
    "A man in red&nbsp;walks.",
    "var x = 1;",
    "const a = b",
    "if (x == 1) { return; }",
    "return result;",
    "class Person(object): pass",
    "items.append(caption)",
    "self.text() wears a coat.",
    "The man wears {colour} shoes.",
    "None",
    "nan",
]
ENGLISH = [
    "The man is going to return",
    "She is 1.6m tall; she walks;",
    "He wears a none-too-new coat (grey).",
    "A coat that costs $20.50 (on sale) and €5 socks.",
    "He carries a bag, i.e. a backpack, e.g. for school.",
    "A T-shirt with `NY` on it.",
    "She is wearing jeans / trousers.",
    "A player in a #7 jersey.",
    'A well-built, middle-aged man in a so-called "bomber" jacket.',
    "An import of class; she will return.",
    "The import shop's class of bags is for return.",
    "A girl with a 'Hello' print (blue and white) on her shirt.",
    "A woman in a dress(red), boots(black) and a hat.",
    "A man & a woman; the man's coat is 50% wool.",
    "H&M; black&white; his shoes are size 9.5 (US).",
    "Her T-shirt reads E=mc2 and 1 + 1 = 2.",
    "He walks; he returns the class's books;",
    "The man has none.",
    "His coat is null and void.",
    "Select a coat from the rack: SALE.",
    "A man in a coat.He(the man) walks.",
    "a man in a t-shirt.his coat is red (dark).",
    "She has a bag for men in suits: black.",
    "Import jacket, blue jeans; a class A driver.",
    "He wears a C++ T-shirt and lets a dog run.",
    "for a man in his forties: a coat.",
    "5'10\", 70kg; from left to right he wears red -> blue.",
]


@pytest.mark.parametrize("text", CODE_LIKE)
def test_program_text_is_told_from_a_caption(text):
    assert "code-captions" in named(check_captions(images({}), captions(said(0, text))))


@pytest.mark.parametrize("text", ENGLISH)
def test_english_with_the_signs_and_words_of_programs_is_a_caption(text):
    assert "code-captions" not in named(check_captions(images({}), captions(said(0, text))))


def test_good_captions_and_no_captions_give_nothing():
    table = images({}, {})
    texts = captions(said(0, GOOD), said(0, "He carries a bag."), said(1, "A woman — naïve, café, “quoted”; 5’ tall."))
    assert check_captions(table, texts) == []
    assert check_captions(table, texts[:0]) == []


def test_described_texts_may_be_short():
    texts = captions(said(0, GOOD), said(0, "Tall man.", kind="identity"), said(0, "Red coat.", kind="clothing"))
    assert check_captions(images({}), texts) == []


def test_phrases_and_failed_texts_are_no_captions():
    more = captions(
        said(0, GOOD), said(1, "A tall woman in blue."), said(0, "", status="failed"), said(1, "bag", kind="phrase")
    )
    assert check_captions(images({}, {}), more) == []


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        ("empty-captions", "  \n"),
        ("empty-captions", None),
        ("code-captions", "The man </div> wears a coat."),
        ("code-captions", "self.text() wears a coat."),
        ("encoding-captions", "A man in a cafÃ© coat."),
        ("encoding-captions", "A manâ€™s red coat."),
        ("encoding-captions", "A man in a \ufffd coat."),
        ("encoding-captions", "A man in\x07 a coat."),
        ("encoding-captions", "\ufeffA man in a coat."),
        ("short-captions", "A man."),
        ("left-right", "A bag on the LEFT shoulder."),
    ],
)
def test_a_bad_caption_is_found_by_its_check_alone(check, bad):
    found = only(
        check_captions(images({}, {}), captions(said(0, GOOD), said(1, bad), said(1, "A woman in blue."))), check
    )
    assert (found.count, found.total if "empty" in check else 3) == (1, 3)
    assert found.severity == ("note" if check == "left-right" else "warning")
    assert found.examples[0].startswith("c1") and all(text.isprintable() for text in found.examples)


def test_a_word_that_contains_a_side_does_not_name_it():
    assert check_captions(images({}), captions(said(0, "A bright coat and leftover bags."))) == []


def test_the_same_caption_over_people_counts_captions_texts_and_people():
    rows = [
        said(0, GOOD),
        said(1, " a man in a RED coat  walks"),
        said(0, "He is tall."),
        said(2, "He is tall."),
        said(2, GOOD),
    ]
    found = only(check_captions(images({}, {}, {}), captions(*rows)), "shared-captions")
    assert (found.severity, found.count, found.total) == ("warning", 5, 5)
    assert found.details == {"texts": 2, "people": 3, "generic_texts": 1}
    assert found.examples[0] == "'a man in a red coat walks' (3 people)"
    found = only(
        check_captions(images({}, {}), captions(*(said(i, "A young man.") for i in range(2)))), "shared-captions"
    )
    assert found.severity == "note"


def test_the_same_caption_for_one_person_is_no_sharing_and_for_one_image_a_repetition():
    table = images({}, {}, person_id="d:a")
    assert check_captions(table, captions(said(0, GOOD), said(1, GOOD))) == []
    found = only(check_captions(table[:1], captions(said(0, GOOD), said(0, GOOD.upper()))), "duplicate-captions")
    assert (found.severity, found.count, found.examples) == ("note", 1, ("c1",))
    assert check_captions(images({}, {}), captions(said(0, GOOD), said(1, GOOD)), known_people=False) == []


def test_orphans_and_images_without_captions_are_found():
    table = images({}, {}, {"split": "test"})
    found = named(check_captions(table, captions(said(0, GOOD), said(9, "Nobody is in this picture."))))
    assert (found["orphan-captions"].severity, found["orphan-captions"].examples) == ("error", ("c1",))
    bare = found["uncaptioned-images"]
    assert (bare.severity, bare.count, bare.total, bare.examples) == ("warning", 1, 2, ("d:1",))


@pytest.mark.covers(21)
def test_truncation_is_a_rate_for_each_dataset_and_context():
    table = images({}, {}, {"dataset": "e"})
    texts = caption_texts(table, captions(said(0, "one"), said(1, "two"), said(2, "three")))
    findings, rates = check_truncation(texts, [77, 78, 200], "CLIP", (77, 168))
    assert rates == {"d": {"CLIP 77": 0.5, "CLIP 168": 0.0}, "e": {"CLIP 77": 1.0, "CLIP 168": 1.0}}
    assert [(f.details["dataset"], f.details["context"], f.count, f.total) for f in findings] == [
        ("d", 77, 1, 2), ("e", 77, 1, 1), ("e", 168, 1, 1),
    ]  # fmt: skip
    assert findings[0].examples == ("c1",) and "longest: 78 tokens" in findings[0].sentence
    assert check_truncation(texts, [1, 2, 3], "CLIP", (77,))[0] == []


# --- layout


def entry(name, split="train"):
    return Entry(name, Path("/d") / name, split, "1", texts=[("full", GOOD, "image")])


def test_the_layout_names_variant_missing_parts_and_what_the_reader_skipped():
    probe = Probe(Path("/d"), "reid_raw.json", ("imgs/Market",), ("An old copy.",))
    draft = Draft("d", [entry("a")], problems=["entry 3 has no id."], notes=["2 rows were joined."])
    found = named(checks.check_layout("cuhk-pedes", probe, draft))
    assert found["layout"].sentence == "cuhk-pedes: reid_raw.json, in /d." and found["layout"].severity == "note"
    assert (found["missing-parts"].severity, found["missing-parts"].examples) == ("warning", ("imgs/Market",))
    assert (found["bad-entries"].severity, found["bad-entries"].count, found["bad-entries"].total) == ("error", 1, 2)
    assert found["reader-notes"].examples == ("An old copy.", "2 rows were joined.")
    assert checks.check_layout("folder", None, Draft("d", [entry("a")])) == []


def test_counts_unlike_the_release_are_a_warning():
    notes = compare_counts([entry("a")], {"train": (1, 1, 1), "test": (5, 6, 7)}, "CUHK-PEDES")
    found = only(checks.check_notes(notes), "split-counts")
    assert found.severity == "warning" and found.count == 1 and "release has 5, 6, 7" in found.examples[0]
    assert checks.check_notes(compare_counts([entry("a")], {"train": (1, 1, 1)}, "CUHK-PEDES")) == []


def test_a_split_with_other_people_and_other_queries_is_one_split():
    ends = "the release has {}. Published numbers do not compare."
    notes = [
        f"Market-1501 test: found 1 people, 2 images, 0 captions; {ends.format('751, 19,281, 0')}",
        f"Market-1501 test: found 1 query and 1 gallery images; {ends.format('3,368 and 15,913')}",
    ]
    found = only(checks.check_notes(notes), "split-counts")
    assert (found.count, found.total) == (1, 1) and found.examples == tuple(notes)
    assert found.sentence.startswith("1 split is unlike")


def test_empty_captions_that_a_reader_left_out_are_counted():
    notes = ["1,024 empty caption(s) left out, the first of a.png."]
    found = only(checks.check_notes(notes, 76), "empty-captions")
    assert (found.severity, found.count, found.total) == ("warning", 1024, 1100)
    draft = Draft("d", [entry("a"), entry("b")], notes=["2 empty caption(s) left out, the first of a.png."])
    found = only(checks.check_layout("cuhk-pedes", None, draft), "empty-captions")
    assert (found.count, found.total, found.rate) == (2, 4, 0.5)


# --- findings


def test_examples_are_few_printable_and_short():
    found = checks.finding("wide-images", "note", 9, 9, "images", "x", [f"a\x1b[2J{'b' * 500}"] * 9)
    assert len(found.examples) == 5 and all(len(text) <= 160 and text.isprintable() for text in found.examples)
    assert found.examples[0].startswith("a\\x1b[2J")


def test_a_row_has_the_documented_keys():
    row = checks.finding("wide-images", "note", 1, 4, "images", "x", ["a"], more=2).row()
    assert row == {
        "check": "wide-images", "severity": "note", "count": 1, "total": 4, "rate": 0.25, "unit": "images",
        "sentence": "x", "examples": ["a"], "details": {"more": 2},
    }  # fmt: skip
    assert checks.finding("no-images", "error", 0, 0, "images", "x").rate == 0.0


def test_every_check_is_described_and_its_name_is_stable():
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) and text for name, text in checks.CHECKS.items())
    with pytest.raises(AssertionError):
        checks.finding("no-such-check", "note", 0, 0, "images", "x")
