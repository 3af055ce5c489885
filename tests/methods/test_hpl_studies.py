"""Every condition of the HPL studies differs from the full model in what its label says, and trains."""

from pathlib import Path

import pytest
import torch
from conftest import without_captions, write_dataset
from methods.test_method_contract import training_batch

from reidctl.backbones.weights import build
from reidctl.config import merge
from reidctl.evaluation import published
from reidctl.evaluation.study import load_study
from reidctl.methods.base import build_method
from reidctl.stages import building

FOLDER = Path("pipelines/studies")
CONDITIONS = [
    (path.stem, name)
    for path in sorted(FOLDER.glob("hpl-*.yaml"))
    for name in load_study(path).conditions
    if path.stem != "hpl-base"
]
BASE = {"sdm", "id_t2i", "triplet", "id_i2i"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_dataset(tmp_path_factory.mktemp("studies") / "blocks", people=6)
    return without_captions(made, [4, 5])


def recipe(study, name):
    content = load_study(FOLDER / f"hpl-{study}.yaml")
    return building.resolve(merge(content.recipe, content.conditions[name].set), content.method)


def made(study, name):
    torch.manual_seed(0)
    settings = dict(recipe(study, name)["method"])
    return build_method(settings.pop("name"), settings, build("vit-bert:micro"), 6)


def active(study, name):
    return set(made(study, name).current_weights())


@pytest.mark.covers(83, 84, 85, 86, 98, 99, 101, 107, 110)
@pytest.mark.parametrize(("study", "name"), CONDITIONS)
def test_every_condition_trains_a_step_with_finite_losses(study, name, folder):
    study = study.removeprefix("hpl-")
    checked = building.check(recipe(study, name))
    method = made(study, name).train()
    batch = training_batch(method, folder)
    found = method.losses(batch, "finetune")
    method.objective(found).backward()
    assert set(found) == set(method.current_weights()) and all(torch.isfinite(value) for value in found.values())
    assert checked.prompts.sampler == checked.training.sampler or not checked.method.needs_prompt_stage


@pytest.mark.covers(83)
def test_the_rows_of_table_3_add_one_part_each():
    assert active("modules", "none") == active("modules", "trt") == BASE
    assert not made("modules", "none").config.trt.dual and made("modules", "trt").config.trt.dual
    assert active("modules", "prompts") == BASE | {"cic", "tgps", "vgps"}
    assert active("modules", "full") == BASE | {"cic", "tgps", "vgps", "cmpr"}


@pytest.mark.covers(89)
def test_one_class_token_is_compared_with_two_on_both_tasks_beside_the_printed_gains():
    study = load_study(FOLDER / "hpl-modules.yaml")
    compared = {claim.measure for claim in study.claims if claim.more == "trt" and claim.than == "none"}
    assert compared == {"synthped-a.t2i.mAP", "synthped-b.i2i.mAP"}
    rows = {name: study.conditions[name].printed_row("hpl") for name in ("none", "trt")}
    printed = {
        (name, entry.direction, entry.metric): float(entry.printed)
        for name, row in rows.items()
        for entry in published.find(paper="hpl", row=row)
        if entry.table == "3"
    }
    gain = {key[1:]: printed[key] - printed["none", *key[1:]] for key in printed if key[0] == "trt"}
    assert gain["t2i", "rank1"] == pytest.approx(1.05) and gain["i2i", "mAP"] == pytest.approx(2.07)


@pytest.mark.covers(84)
def test_the_rows_of_table_4_have_the_halves_of_the_alignment():
    assert active("prompt-losses", "trt") == BASE
    assert active("prompt-losses", "tgps") == BASE | {"tgps"}
    assert active("prompt-losses", "vgps") == BASE | {"vgps"}
    assert active("prompt-losses", "prompts") == active("modules", "prompts")


@pytest.mark.covers(85, 107)
def test_separate_models_see_their_own_set_and_losses_alone():
    for study in ("joint", "stress"):
        assert active(study, "t2i") == {"sdm", "id_t2i"} and active(study, "i2i") == {"triplet", "id_i2i"}
        parts = {name: recipe(study, name)["data"]["part"] for name in ("t2i", "i2i")}
        assert parts == {"t2i": "captioned", "i2i": "caption-free"}
        assert active(study, "none") == BASE and not made(study, "none").config.trt.dual


@pytest.mark.covers(86)
def test_the_sweeps_hold_the_extremes_and_zero_removes_the_terms():
    for study, key in (("lambda1", "lambda1"), ("lambda2", "lambda2")):
        content = load_study(FOLDER / f"hpl-{study}.yaml")
        places = sorted(c.x for name, c in content.conditions.items() if c.x is not None)
        assert places[0] == 0 and 1.0 in places
        for name, condition in content.conditions.items():
            if condition.x and name != "none":
                assert getattr(made(study, name).config, key) == condition.x
    assert not {"tgps", "vgps"} & active("lambda1", "zero") and "cmpr" not in active("lambda2", "zero")


@pytest.mark.covers(98, 101)
def test_the_studies_of_captions_and_of_one_set_change_the_data_alone():
    assert [recipe("captions", n)["data"]["caption_noise"] for n in ("half", "most")] == [0.5, 0.75]
    assert {recipe("same-set", name)["data"]["part"] for name in ("none", "trt", "full")} == {"captioned"}
    assert recipe("captions", "half")["method"] == recipe("captions", "full")["method"]


@pytest.mark.covers(99, 108, 109, 110)
def test_templates_and_ways_of_training_are_conditions():
    texts = {made("templates", name).config.template for name in ("full", "figure", "instance")}
    assert len(texts) == 3
    assert made("training", "frozen").config.freeze == ("image", "text")
    assert not made("training", "one-stage").config.two_stage
    assert {made("training", name).config.prompts for name in ("full", "words", "plain")} == {"soft", "words", "plain"}
    assert {"prompt.seconds", "train.seconds"} <= {c.measure for c in load_study(FOLDER / "hpl-training.yaml").table}
