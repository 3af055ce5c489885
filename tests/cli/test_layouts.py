"""`data synth --layout` writes every public layout, and `data import` reads the same rows back from each."""

import shutil
from pathlib import Path

import pytest
from commandline import cli, refused

from reidctl import tables
from reidctl.datasets.registry import format_names, layout_names

CHANGING = ("ltcc", "prcc")
SIZE = ("--people", 15, "--images-per-person", 6, "--size", "64x32", "--workers", 1)
# What a layout cannot hold is lost, and only that.
NO_CAPTIONS = {"market-1501", "dukemtmc-reid", "msmt17", "prcc", "ltcc", "folder"}
HAS_ROLES = {"market-1501", "dukemtmc-reid", "msmt17", "ltcc", "csv-table"}
HAS_VAL = {"cuhk-pedes", "rstpreid", "csv-table"}
# Without splits of their own the people are split anew.
OWN_SPLIT = {"folder", "cuhk-pedes:caption-all"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A rendered dataset of each variant, laid out in every format that fits it."""
    home = tmp_path_factory.mktemp("layouts")
    runs = {}
    for variant, names in (("cloth-changing", CHANGING), ("standard", sorted(set(layout_names()) - set(CHANGING)))):
        words = [word for name in names for word in ("--layout", name)]
        result = cli("data", "synth", "--run", home / variant, "--variant", variant, *SIZE, *words, "--json")
        assert result.code == 0, result.err
        runs |= {name: (home / variant, result.json["layouts"][f"synthped-a as {name}"]) for name in names}
    return runs


def loaded(run):
    return tuple(tables.read_table(run / "data" / f"{name}.parquet", name) for name in ("images", "captions"))


@pytest.mark.covers(1, 2, 3, 4, 5, 6, 7)
@pytest.mark.parametrize("layout", layout_names())
def test_the_same_rows_come_back_through_every_layout(rendered, tmp_path, layout):
    run, root = rendered[layout]
    name = layout.partition(":")[0]
    result = cli("data", "import", name, root, "--run", tmp_path / "run")
    assert result.code == 0, result.err
    source, texts = loaded(run)
    images, captions = loaded(tmp_path / "run")
    both = source.merge(images, on="sha256", suffixes=("", "_read"))
    assert len(both) == len(images) and len(images) >= (len(source) if name != "prcc" else len(source) // 2)
    assert (
        both["person_id"].nunique()
        == both["person_id_read"].nunique()
        == len(both[["person_id", "person_id_read"]].drop_duplicates())
    ), "people are told apart as before"
    if layout not in OWN_SPLIT:
        expected = both["split"].astype(str)
        expected = expected if name in HAS_VAL else expected.replace("val", "train")
        assert (both["split_read"].astype(str) == expected).all()
    if name in HAS_ROLES:
        tested = both[both["split"] == "test"]
        assert (tested["role"].astype(str) == tested["role_read"].astype(str)).all()
        assert (both["camera_id"].astype(str) == both["camera_id_read"].astype(str)).all()
    full = texts[texts["kind"] == "full"]
    given = full.groupby("image_id")["text"].agg(list)
    read = captions[captions["kind"] == "full"].groupby("image_id")["text"].agg(list)
    assert len(read) == (0 if name in NO_CAPTIONS else len(images))
    for row in both.itertuples() if len(read) else ():
        known = given[row.image_id]
        assert read[row.image_id_read] == (known[:1] if name == "icfg-pedes" else known)


@pytest.mark.covers(12)
@pytest.mark.parametrize("name", format_names())
def test_validation_people_can_be_carved_out_where_a_layout_has_none(rendered, tmp_path, name):
    words = ("data", "import", name, rendered[name][1], "--carve-val", 3, "--run", tmp_path / "run")
    if name in HAS_VAL | OWN_SPLIT:
        refused(2, "carve-val", args=words)
        return
    assert any("--carve-val" in note for note in cli(*words[:4], "--run", tmp_path / "none", "--json").json["notes"])
    assert cli(*words).code == 0
    people = loaded(tmp_path / "run")[0].groupby("split", observed=True)["person_id"].agg(set)
    assert len(people["val"]) == 3 and not people["val"] & (people["train"] | people["test"])


def test_an_unknown_layout_is_refused_before_anything_is_rendered(tmp_path):
    words = ("data", "synth", "--run", tmp_path / "run", *SIZE)
    refused(2, "no layout `v3`", "v2", args=(*words, "--layout", "msmt17:v3"))
    refused(2, "cuhk-pedes", args=("data", "synth", "--run", tmp_path / "run", *SIZE, "--layout", "cuhk-pedess"))
    assert not (tmp_path / "run").exists()


def test_a_layout_that_cannot_hold_the_dataset_says_which_option_helps_and_costs_nothing(tmp_path):
    """The dataset is finished and stays; a layout that fits is added without rendering again."""
    words = ("data", "synth", "--run", tmp_path / "run", *SIZE)
    refused(2, "cloth-changing", args=(*words, "--layout", "prcc"))
    stage = tmp_path / "run" / "data" / "stage.json"
    before = stage.stat().st_mtime_ns
    layouts = tmp_path / "run" / "data" / "layouts"
    assert not list(layouts.rglob("*prcc*"))
    added = cli(*words, "--layout", "cuhk-pedes", "--json").json
    assert added["status"] == "up-to-date" and stage.stat().st_mtime_ns == before
    root = Path(added["layouts"]["synthped-a as cuhk-pedes"])
    assert (root / "reid_raw.json").is_file()
    shutil.rmtree(layouts)
    assert cli(*words, "--layout", "cuhk-pedes", "--json").code == 0 and (root / "reid_raw.json").is_file()
    other = cli("data", "synth", "--run", tmp_path / "run", *SIZE, "--seed", 9)
    assert other.code == 0 and not layouts.exists(), "layouts of another dataset do not stay"
