"""The report of a run that has everything: what further stages left is shown, marked and beside its data."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from fullrun import make_full_run, summary

from reidctl import tables
from reidctl.errors import DataError
from reidctl.runs import Run
from reidctl.stages import report
from reidctl.stages.report_parts import Material


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = make_full_run(tmp_path_factory.mktemp("full") / "r")
    record = report.run(run)
    return run, record, (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    # Figures are what takes time, and `made` has them; a copy is about the page.
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **_: out.write(b"<svg></svg>"))
    run = Run(tmp_path / "r")
    shutil.copytree(made[0].path, run.path)
    return run


def again(run):
    report.run(run, force=True)
    return (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")


def section(text, anchor):
    return re.search(rf'<section id="{anchor}".*?</section>', text, re.DOTALL).group()


def change(run, stage, **values):
    path = run.stage_dir(stage) / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_section_is_there_and_nothing_is_missing(made):
    expected = ["results", "comparison", "robustness", "rankings", "maps", "faithfulness", "features", "gates"]
    expected += ["training", "recipe", "captions", "data", "provenance"]
    assert made[1]["sections"] == expected
    assert 'id="missing"' not in made[2]


@pytest.mark.covers(231)
def test_curves_lie_beside_the_page_with_their_data(made):
    run, record, _ = made
    names = {Path(name).name for name in record["outputs"]}
    for stem in ("faithfulness-1-similarity_drop", "faithfulness-2-mAP_drop"):
        assert {f"{stem}.{ending}" for ending in ("png", "svg", "csv")} <= names
    saved = pd.read_csv(run.stage_dir("report") / "figures" / "faithfulness-2-mAP_drop.csv", keep_default_na=False)
    table = summary()
    chosen = table["metric"].eq("mAP_drop") & table["fill"].eq("blur") & table["kind"].isin(["value", "control"])
    assert saved["value"].sum() == pytest.approx(table[chosen]["value"].sum())
    assert set(saved["control"]) == {"", "random", "block", "shifted", "phrase"}


def test_the_explained_captions_show_every_explainer_and_the_whole_caption(made):
    maps = section(made[2], "maps")
    assert re.findall(r'data-show="([^"]*)"', maps) == ["all", "gradcam", "ppim", "random"]
    assert maps.count('class="strip"') == 18
    assert maps.count('<span class="label">the whole caption<br>') == 18
    # The map of a whole caption marks nothing in the sentence: its phrases stay marked.
    assert len(re.findall(r"<mark ", maps)) == 12


@pytest.mark.covers(199)
def test_masks_of_the_user_are_announced_and_marked(made, copy):
    plain = made[2]
    assert "User-supplied" not in plain and "true masks of rendered people" in section(plain, "faithfulness")
    change(copy, "interpret", parts="user-supplied")
    text = again(copy)
    assert "User-supplied parsing masks." in text
    assert "pointing, % (user-supplied masks)" in section(text, "faithfulness")
    change(copy, "interpret", parts=None)
    assert "have no human part annotation" in section(again(copy), "faithfulness")


def test_printed_numbers_stand_under_their_banner(made):
    compared = section(made[2], "comparison")
    assert "<strong>NOT COMPARABLE:</strong> The people are rendered" in compared
    assert "IRRA" in compared and "50.0 [45.0, 55.0]" in compared
    for title in ("Training seeds", "Epochs", "Models on datasets"):
        assert f"<h3>{title}</h3>" in compared


@pytest.mark.covers(159)
def test_points_of_the_map_name_their_image_and_person_and_their_pictures_are_inside(made):
    run, _, text = made
    features = section(text, "features")
    points = pd.read_csv(run.stage_dir("analyse") / "tsne.csv")
    drawn = re.findall(r'class="pt [^"]*".*?data-image="([^"]*)" data-person="([^"]*)"', features)
    assert sorted(drawn) == sorted(zip(points["image_id"], points["person_id"], strict=True))
    held = re.search(r"<template>(.*?)</template>", features, re.DOTALL).group(1)
    assert held.count('<img src="data:image/') == points["image_id"].nunique()


def test_many_images_get_points_but_not_all_of_them_pictures(copy, monkeypatch):
    monkeypatch.setattr("reidctl.report.space.THUMBNAILS", 5)
    features = section(again(copy), "features")
    held = re.search(r"<template>(.*?)</template>", features, re.DOTALL).group(1)
    assert held.count("<img") == 5 and "the pictures of 5 of them" in features


def test_an_older_model_is_named_in_a_banner(made, copy):
    assert "trained again" not in made[2]
    change(copy, "finetune", outputs={"finetune/model.safetensors": {"sha256": "new"}})
    change(copy, "robustness", settings={"model": "old"})
    change(copy, "analyse", settings={"model": "new"})
    text = again(copy)
    assert (
        "The model was trained again since." in text
        and "The numbers of robustness are those of the older model" in text
    )


@pytest.mark.parametrize(
    ("stage", "name", "content"),
    [
        ("interpret", "interpretability.parquet", b"PAR1 broken"),
        ("robustness", "robustness.parquet", b""),
        ("analyse", "analysis.parquet", b"x"),
        ("analyse", "tsne.csv", b"a,b\n1,2\n"),
        ("analyse", "tsne.csv", b"panel,feature,image_id,person_id,x,y\na,b,c,d,e,f\n"),
        ("analyse", "tsne.csv", b"\xff\xfe\x00"),
        ("interpret", "gates.json", b"{"),
        ("interpret", "gates.json", b'{"summary": {"a": 3}, "rule": "", "samples": []}'),
        ("interpret", "gates.svg", b"not a figure"),
    ],
)
def test_a_damaged_file_is_one_sentence_that_names_it(copy, stage, name, content):
    (copy.stage_dir(stage) / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)) as error:
        report.run(copy, force=True)
    assert "\n" not in error.value.message
    assert copy.record("report") is None  # a page that could not be made is not called finished


def test_what_an_unfinished_stage_left_is_not_reported(copy):
    (copy.stage_dir("robustness") / "stage.json").unlink()
    (copy.stage_dir("interpret") / "stage.json").unlink()
    text = again(copy)
    assert 'id="robustness"' not in text and 'id="faithfulness"' not in text and 'id="maps"' not in text
    assert "reidctl evaluate --setting all" in text and "reidctl interpret --run" in text


def test_a_page_of_one_fill_and_one_explainer_offers_no_choice(copy):
    rows = summary()
    rows = rows[rows["fill"].isin(["", "mean"])]
    tables.write_table(copy.table("interpret", "interpretability"), "interpretability", rows)
    shown = tables.read_table(copy.table("interpret", "explanations"), "explanations")
    shown = shown[shown["explainer"] == "ppim"]
    tables.write_table(copy.table("interpret", "explanations"), "explanations", shown)
    text = again(copy)
    assert 'data-filter="fills"' not in text and 'data-filter="explained"' not in text
    assert "Removed patches filled by mean" in text


def test_a_run_that_has_only_its_tables_of_maps_still_has_a_page(copy):
    tables.write_table(
        copy.table("interpret", "interpretability"), "interpretability", tables.empty("interpretability")
    )
    tables.write_table(copy.table("analyse", "analysis"), "analysis", tables.empty("analysis"))
    (copy.stage_dir("analyse") / "tsne.csv").unlink()
    text = again(copy)
    assert 'id="faithfulness"' not in text and 'id="features"' not in text
    assert "The maps are drawn but not tested." in text


def test_a_sentence_of_no_caption_is_the_text_that_holds_its_phrases(made):
    from reidctl.stages.report_maps import _sentence

    material = Material(made[0], {}, 0)
    keys = [(0, 9, "a red hat"), (2, 9, "red hat")]
    assert _sentence(material, "user", keys) == "a red hat"
    assert _sentence(material, "gone", [(2, 5, "hat"), (7, 9, "shoe")]) == "hat · shoe"
    assert _sentence(material, "p3s0-c", keys).startswith("a <script>")
