"""Who is who across datasets, and what may not be trained on."""

import json

import pandas as pd
import pytest
from cli.commandline import cli
from hypothesis import given
from hypothesis import strategies as st

from reidctl import tables
from reidctl.datasets.identities import (
    Link,
    find_links,
    inherited,
    known_as,
    merged_within,
    read_links,
    rename,
    restore,
    unify,
)
from reidctl.datasets.leaks import find_leaks, guard, purge
from reidctl.errors import DataError


def images(*rows):
    """Rows as (image id, person, split[, file]); the file defaults to one of its own."""
    return pd.DataFrame(
        [
            {
                "image_id": name,
                "dataset": name.split(":")[0],
                "person_id": f"{name.split(':')[0]}:{person}",
                "split": split,
                "sha256": file[0] if file else f"hash of {name}",
            }
            for name, person, split, *file in rows
        ]
    )


CROSSING = images(
    ("cuhk-pedes:Market/0007_c1.jpg", 12, "train"),
    ("cuhk-pedes:Market/0007_c2.jpg", 12, "train"),
    ("cuhk-pedes:CUHK01/0007_x.jpg", 13, "train"),
    ("market-1501:query/0007_c1s1_000001_00.jpg", "0007", "test"),
    ("market-1501:bounding_box_test/0000_c1s1_000001_00.jpg", "0000", "test"),
    ("market-1501:bounding_box_train/0008_c1s1_000001_00.jpg", "0008", "train"),
)


@pytest.mark.covers(9)
def test_market_pictures_in_cuhk_pedes_are_the_people_of_market_1501():
    assert find_links(CROSSING) == [Link("cuhk-pedes:12", "market-1501:0007", "file-name")]
    people = unify(CROSSING, find_links(CROSSING)).set_index("original_id")
    assert people.loc["market-1501:0007", "person_id"] == people.loc["cuhk-pedes:12", "person_id"] == "cuhk-pedes:12"
    assert people.loc["cuhk-pedes:13", "rule"] == "own" and people["person_id"].nunique() == 4


def test_equal_files_of_two_datasets_show_one_person_and_those_of_one_dataset_show_nothing():
    found = find_links(
        images(
            ("a:1", "x", "train", "same"),
            ("b:1", "y", "test", "same"),
            ("c:1", "p", "train", "twin"),
            ("c:2", "q", "train", "twin"),
            ("a:2", "z", "train", "twin"),
        )
    )
    assert found == [Link("a:x", "b:y", "same-image")]


def test_names_kept_from_msmt17_link_people():
    name = "0005_003_07_0303noon_0123_2.jpg"
    found = find_links(
        images(
            (f"icfg-pedes:test/0005/{name}", 9, "test"),
            (f"msmt17:train/0005/{name}", "train-0005", "train"),
            ("msmt17:train/0005/0005_004_07_0303noon_0124_2.jpg", "train-0005", "train"),
        )
    )
    assert found == [Link("icfg-pedes:9", "msmt17:train-0005", "file-name")]


def test_distractors_are_nobody_and_link_nobody():
    rows = images(("a:1", "x", "train", "same"), ("market-1501:bounding_box_test/0000_c1.jpg", "0000", "test", "same"))
    assert not find_links(rows)
    assert [leak.kind for leak in find_leaks(rows)] == ["image"], "the file itself still leaks"


def test_a_users_file_says_who_is_who(tmp_path):
    rows = images(("a:1", 1, "train"), ("b:1", 1, "test"), ("c:1", 7, "val"))
    known = set(rows["person_id"])
    table = tmp_path / "map.csv"
    table.write_text("dataset,person,identity\r\na,1,anna\r\nc,7,anna\r\n", encoding="utf-8-sig")
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"a:1": "anna", "c:7": "anna"}))
    assert read_links(table, known) == read_links(mapping, known) == [Link("a:1", "c:7", "user")]
    people = unify(rows, read_links(table, known))
    assert list(people["person_id"]) == ["a:1", "b:1", "a:1"] and list(people["rule"]) == ["user", "own", "user"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("m.csv", b"dataset,person\na,1\n", "lacks one of the columns"),
        ("m.csv", b"dataset,person,identity\na,9,x\n", "a:9"),
        ("m.csv", b"dataset,person,identity\na,,x\n", "data row 1"),
        ("m.csv", b"dataset,person,identity\na,1,\xff\n", "not UTF-8"),
        ("m.csv", b"dataset,person,identity\na,1,x\0\n", "NUL"),
        ("m.csv", b"", "lacks one of the columns"),
        ("m.csv", b"dataset;person\na;1\n", "it has: dataset, person"),
        ("m.csv", b"dataset;person;identity\na;1;x\na;1;y\n", "two identities"),
        ("m.csv", b"dataset,person,identity\nmarket-1501,0000,x\n", "distractors"),
        ("m.json", b"[1]", "must be an object"),
        ("m.json", b"{", "not valid JSON"),
        ("m.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_identity_map_is_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_links(tmp_path / name, {"a:1", "a:2", "market-1501:0000"})


def test_links_form_chains_and_several_ids_of_one_dataset_are_reported():
    rows = images(("a:1", 1, "train"), ("a:2", 2, "train"), ("b:1", 1, "train"), ("c:1", 1, "train"))
    people = unify(rows, [Link("a:1", "b:1", "user"), Link("b:1", "c:1", "file-name"), Link("a:2", "c:1", "user")])
    assert set(people["person_id"]) == {"a:1"} and merged_within(people) == ["a:1"]
    assert set(rename(rows, people)["person_id"]) == {"a:1"}


@pytest.mark.covers(9)
def test_a_combination_of_a_combination_knows_everybody_by_all_names():
    market = images(("market-1501:query/0007_c1.jpg", "0007", "test"), ("own:1", 5, "train"))
    first = unify(market, [Link("market-1501:0007", "own:5", "user")])
    # Own data came first in the first combination, so that person 0007 lost the Market name that the rule reads.
    first["person_id"] = "own:5"
    renamed = rename(market, first)
    again = restore(renamed, first)
    assert list(again["person_id"]) == ["market-1501:0007", "own:5"]
    rows = pd.concat([again, CROSSING.iloc[:1]], ignore_index=True)
    people = unify(rows, [*inherited(first), *find_links(rows)])
    assert people["person_id"].nunique() == 1 and set(people["original_id"]) == {
        "market-1501:0007", "own:5", "cuhk-pedes:12",
    }  # fmt: skip
    gone = unify(rows.iloc[:1], inherited(first), first.rename(columns={"person_id": "x", "original_id": "person_id"}))
    assert "own:5" in set(gone["original_id"]), "a purged person's name is kept"


def test_other_releases_know_people_by_their_file_names():
    found = known_as(CROSSING)
    assert {tuple(row) for row in found.to_numpy()} == {("cuhk-pedes:12", "market-1501:0007")}
    name = "0005_003_07_0303noon_0123_2"
    assert list(known_as(images((f"icfg-pedes:test/0005/{name}.jpg", 9, "test")))["name"]) == [f"msmt17-file:{name}"]


@pytest.mark.covers(10)
def test_purging_takes_test_people_out_of_training_and_touches_no_test_image():
    rows = rename(CROSSING, unify(CROSSING, find_links(CROSSING)))
    kept, purged = purge(rows)
    assert list(purged["image_id"]) == ["cuhk-pedes:Market/0007_c1.jpg", "cuhk-pedes:Market/0007_c2.jpg"]
    assert set(purged["evidence"]) == {"market-1501:query/0007_c1s1_000001_00.jpg"}
    assert set(kept.loc[kept["split"] == "test", "image_id"]) == set(rows.loc[rows["split"] == "test", "image_id"])
    assert not find_leaks(kept)


@pytest.mark.covers(10)
def test_without_purging_the_leak_check_finds_them():
    rows = rename(CROSSING, unify(CROSSING, find_links(CROSSING)))
    found = find_leaks(rows)
    assert [(leak.kind, leak.name, leak.split, leak.found_in) for leak in found] == [
        ("person", "cuhk-pedes:12", "train", "test")
    ]
    with pytest.raises(DataError, match="1 person and 0 image files shared by two splits"):
        guard(rows, "error")
    assert "cuhk-pedes:12" in guard(rows, "warn")[0] and guard(rows, "off") == []


@pytest.mark.covers(11)
def test_a_test_image_copied_into_train_under_another_name_is_a_leak():
    rows = images(("a:train/1", 1, "train", "bytes"), ("a:test/9", 9, "test", "bytes"), ("a:val/5", 5, "val"))
    assert [(leak.kind, leak.name, leak.evidence) for leak in find_leaks(rows)] == [("image", "a:train/1", "a:test/9")]
    kept, purged = purge(rows)
    assert list(purged["reason"]) == ["image"] and len(kept) == 2


def test_validation_people_leave_train_and_test_people_leave_validation():
    rows = images(("a:1", 1, "val"), ("a:2", 1, "train"), ("a:3", 2, "test"), ("a:4", 2, "val"), ("a:5", 3, "train"))
    kept, purged = purge(rows)
    assert sorted(purged["image_id"]) == ["a:2", "a:4"] and sorted(kept["image_id"]) == ["a:1", "a:3", "a:5"]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["train", "val", "test"]), st.integers(0, 9)),
        min_size=1,
        max_size=30,
    )
)
def test_after_purging_no_person_and_no_file_is_in_two_splits(rows):
    frame = images(*((f"a:{n}", person, split, f"f{file}") for n, (person, split, file) in enumerate(rows)))
    kept, purged = purge(frame)
    assert len(kept) + len(purged) == len(frame)
    for column in ("person_id", "sha256"):
        if len(kept):
            assert (kept.groupby(column)["split"].nunique() == 1).all()


@pytest.mark.covers(8, 97)
def test_rendered_people_who_are_in_both_worlds_are_linked_and_leave_training(tmp_path):
    rendered = ("--people", 20, "--images-per-person", 3, "--size", "64x32", "--domain", "both", "--workers", 1)
    made = cli("data", "synth", *rendered, "--crossing", 6, "--captioned", "a", "--run", tmp_path / "two")
    assert made.code == 0, made.err
    record = cli("data", "combine", tmp_path / "two", "--run", tmp_path / "one", "--json").json
    people = tables.read_table(tmp_path / "one" / "data" / "identities.parquet", "identities")
    assert people.loc[people["rule"] == "rendered", "person_id"].nunique() == 6
    assert record["metrics"]["purged_people"] == 2, "a third trains in a and is tested in b"
    images = tables.read_table(tmp_path / "one" / "data" / "images.parquet", "images")
    assert (images.groupby("person_id", observed=True)["split"].nunique() == 1).all()


def test_people_of_two_renderings_with_one_number_are_not_linked():
    same = {"gender": "woman", "age": "adult", "build": "slim", "stature": "tall", "skin": "fair", "beard": "no",
            "hair_length": "long", "hair_colour": "black", "true_person": "00001"}  # fmt: skip
    rows = [("synthped-a", "synthped-a:1", same), ("synthped-b", "synthped-b:1", {**same, "stature": "short"})]
    images = pd.DataFrame(
        [{"image_id": f"{name}-x", "dataset": name, "person_id": person, "sha256": "", "attributes": attributes}
         for name, person, attributes in rows]
    )  # fmt: skip
    assert find_links(images) == []
    images.at[1, "attributes"] = same
    assert [link.rule for link in find_links(images)] == ["rendered"]
