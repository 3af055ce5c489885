"""`measure: {interpret: ...}` of a study: maps of every trained model as values `maps.…`."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from reidctl import tables
from reidctl.errors import UsageError
from reidctl.evaluation import study as studies
from reidctl.evaluation.study import Explained, Measures, load_study
from reidctl.explain.controls import CONTROLS
from reidctl.explain.explainers import EXPLAINERS
from reidctl.runs import Run
from reidctl.stages import interpret, study, study_unit
from reidctl.stages.interpret_tests import TESTS
from reidctl.stages.study_unit import Unit, measure

PEOPLE = {"people": 12, "images_per_person": 2, "train_fraction": 0.5, "val_fraction": 0.25, "size": [64, 32]}
TRAIN = {"epochs": 1, "batch": 8, "instances": 2, "warmup_epochs": 0, "device": "cpu"}
RECIPE = {
    "seed": 3,
    "synth": PEOPLE,
    "method": {"name": "clip"},
    "backbone": {"spec": "clip:micro", "image_size": None},
    "train": TRAIN,
}
PARTS = RECIPE | {"method": {"name": "interpart"}}
CHEAP = Explained(
    samples=3, explainers=("ppim", "centre"), what=("grounding", "masking", "stability"), fractions=(0.25,),
    controls=("random",),
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def trained(home, recipe, start=None):
    unit = Unit(home, recipe, start)
    unit.dataset.make()
    return unit, unit.train()


@pytest.fixture(scope="module")
def plain(home):
    return trained(home, RECIPE)


@pytest.fixture(scope="module")
def parted(home, plain):
    return trained(home, PARTS, plain[0])


@pytest.mark.covers(193, 230)
def test_scores_of_maps_are_values_of_a_training(parted):
    unit, record = parted
    values = measure(unit, record, Measures(interpret=CHEAP))
    said = json.loads((unit.run.stage_dir("interpret") / "stage.json").read_text())["metrics"]
    for name in ("ppim.iou", "ppim.iou-random", "ppim.mAP_drop@0.25-random", "centre.pointing:random", "iou"):
        assert values[f"maps.{name}"] == said[name]["value"]
        assert values[f"maps.{name}.low"] == said[name]["low"] <= said[name]["high"] == values[f"maps.{name}.high"]
    assert not any("stability" in name for name in values), "what does not apply is left out"
    assert "t2i.mAP" in values and not list((unit.run.stage_dir("interpret") / "pictures").glob("*"))
    assert unit.run.require("interpret")["settings"]["seed"] == 3


def test_an_explainer_that_a_method_lacks_is_left_out(plain):
    unit, record = plain
    values = measure(unit, record, Measures(interpret=CHEAP))
    assert "maps.centre.iou" in values and not any(name.startswith("maps.ppim") for name in values)
    every = measure(unit, record, Measures(interpret=CHEAP.replace(explainers=("all",), what=("concentration",))))
    assert {"maps.gradcam.entropy", "maps.slots.entropy"} <= set(every)


@pytest.mark.parametrize("wrong", [{"explainers": ("magic",)}, {"what": ("magic",)}, {"controls": ("magic",)}])
def test_names_that_nobody_knows_are_refused_before_anything_is_trained(wrong):
    with pytest.raises(ValidationError, match="magic"):
        CHEAP.replace(**wrong)
    with pytest.raises(ValidationError, match="above 0"):
        CHEAP.replace(fractions=(1.5,))


def test_a_study_knows_the_names_that_interpret_knows():
    assert (
        tuple(EXPLAINERS) == studies.EXPLAINERS and tuple(TESTS) == studies.MAP_TESTS and studies.CONTROLS == CONTROLS
    )


def test_a_measurement_is_kept_and_another_one_is_made(plain, monkeypatch):
    unit, record = plain
    first = measure(unit, record, Measures(interpret=CHEAP))
    calls = []
    monkeypatch.setattr(interpret, "run", lambda *_, **given: calls.append(given) or {"metrics": {"x": 1.0}})
    assert measure(unit, record, Measures(interpret=CHEAP)) == first and not calls
    other = measure(unit, record, Measures(interpret=CHEAP.replace(samples=4)))
    assert other["maps.x"] == 1 and [given["samples"] for given in calls] == [4]


@pytest.mark.covers(189)
def test_start_is_the_independent_encoder_that_the_training_began_with(parted, plain):
    unit, record = parted
    asked = CHEAP.replace(what=("alignment",), encoder="start")
    values = measure(unit, record, Measures(interpret=asked))
    # The names say nothing of the run: the values of several seeds and conditions go into one column.
    assert {"maps.ppim.alignment", "maps.ppim.alignment-random", "maps.centre.alignment:phrase"} <= set(values)
    kept = unit.run.require("interpret")["settings"]["interpret"]["encoder"]
    assert kept == str(plain[0].run.path)
    with pytest.raises(UsageError, match="no `start`"):
        measure(*plain, Measures(interpret=asked))


@pytest.mark.covers(189)
def test_another_start_is_trained_like_the_first_from_the_next_seed(parted, plain):
    unit, record = parted
    asked = CHEAP.replace(what=("alignment",), encoder="other-start")
    values = measure(unit, record, Measures(interpret=asked))
    other = Run(Path(unit.run.require("interpret")["settings"]["interpret"]["encoder"]))
    assert other.path != plain[0].run.path and other.require("finetune")["settings"]["seed"] == RECIPE["seed"] + 1
    own = measure(unit, record, Measures(interpret=asked.replace(encoder="start")))
    assert values["maps.ppim.alignment"] != own["maps.ppim.alignment"]


def test_what_was_measured_before_there_were_maps_is_filed_as_it_was(tmp_path):
    """Or every finished study would be trained and judged again."""
    path = tmp_path / "s.yaml"
    study_of = {"about": "x", "method": "clip", "recipe": {}, "conditions": {"a": {"label": "one"}}}
    path.write_text(yaml.safe_dump(study_of))
    plain = load_study(path)
    names = {"query", "settings", "analyses", "features", "elsewhere", "rerank"}
    assert set(plain.model_dump(mode="json")["measure"]) == names
    path.write_text(yaml.safe_dump(study_of | {"measure": {"interpret": {"samples": 5}}}))
    found = load_study(path)
    assert found.measure.interpret == Explained(samples=5)
    kept = found.model_dump(mode="json")["measure"]
    assert set(kept) == {*names, "interpret"} and kept["interpret"]["what"] == ["grounding", "concentration"]
    assert study_unit._asked(found.measure) == study_unit._asked(plain.measure)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"sampels": 5}, "samples"), ({"samples": 0}, "samples"), ({"level": "word"}, "level")]
)
def test_a_wrong_setting_is_named(tmp_path, wrong, words):
    path = tmp_path / "s.yaml"
    asked = {"about": "x", "method": "clip", "recipe": {}, "conditions": {"a": {"label": "one"}}}
    path.write_text(yaml.safe_dump(asked | {"measure": {"interpret": wrong}}))
    with pytest.raises(UsageError, match=words):
        load_study(path)


@pytest.mark.slow
@pytest.mark.covers(230)
def test_a_study_file_judges_claims_about_maps(tmp_path):
    asked = {
        "about": "maps", "method": "clip", "seeds": [0],
        "recipe": {name: part for name, part in RECIPE.items() if name not in ("seed", "method")},
        "conditions": {"plain": {"label": "plain"}, "short": {"label": "short", "set": {"train": {"lr": 1.0e-6}}}},
        "measure": {"interpret": {"samples": 3, "explainers": ["patch"], "what": ["grounding"]}},
        "table": [{"measure": "maps.patch.iou", "title": "IoU"}],
        "claims": [{"say": "it sees", "measure": "maps.patch.iou-random", "more": "plain", "than": "short"}],
    }  # fmt: skip
    path = tmp_path / "maps.yaml"
    path.write_text(yaml.safe_dump(asked))
    assert study.run(Run(tmp_path / "runs"), [path], jobs=1)[0]["status"] == "done"
    frame = tables.read_table(tmp_path / "runs" / "maps" / "study.parquet", "study")
    assert len(frame[frame["measure"] == "maps.patch.iou"]) == 2
    assert "IoU" in (tmp_path / "runs" / "maps" / "study.md").read_text()
    claims = tables.read_table(tmp_path / "runs" / "maps" / "claims.parquet", "claims")
    assert "was not measured" not in str(claims["reason"][0])
