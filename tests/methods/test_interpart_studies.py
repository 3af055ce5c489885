"""Every condition of the InterPartAbility studies differs from the full model in what its label says, and trains."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli.commandline import cli
from conftest import write_dataset
from methods.test_method_contract import training_batch
from PIL import Image

from reidctl.backbones.weights import build
from reidctl.config import merge
from reidctl.evaluation.study import load_study
from reidctl.methods.base import build_method
from reidctl.stages import building

FOLDER = Path("pipelines/studies")
CONDITIONS = [
    (path.stem, name)
    for path in sorted(FOLDER.glob("interpart-*.yaml"))
    for name in load_study(path).conditions
    if path.stem != "interpart-base"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("studies") / "blocks", people=6)


def recipe(study, name):
    content = load_study(FOLDER / f"{study}.yaml")
    condition = content.conditions[name]
    return building.resolve(merge(content.recipe, condition.set), condition.method or content.method)


def made(study, name):
    torch.manual_seed(0)
    settings = dict(recipe(study, name)["method"])
    return build_method(settings.pop("name"), settings, build("vit-bert:micro"), 6)


@pytest.mark.parametrize(("study", "name"), CONDITIONS)
def test_every_condition_trains_a_step_with_finite_losses(study, name, folder):
    building.check(recipe(study, name))
    method = made(study, name).train()
    found = method.losses(training_batch(method, folder), "finetune")
    method.objective(found).backward()
    assert set(found) == set(method.current_weights()) and all(torch.isfinite(value) for value in found.values())


@pytest.mark.covers(194)
def test_retrieval_with_and_without_the_module_is_compared_over_three_seeds_on_equal_people_and_training():
    study = load_study(FOLDER / "interpart-maps.yaml")
    assert len(study.seeds) == 3
    full, base = (recipe("interpart-maps", name) for name in ("full", "base"))
    assert {name: full[name] for name in full if name != "method"} == {n: base[n] for n in base if n != "method"}
    parts = {"ppim", "compact", "align", "diverse"}
    assert (
        set(made("interpart-maps", "full").current_weights()) - set(made("interpart-maps", "base").current_weights())
        == parts
    )
    pays = [claim for claim in study.claims if claim.measure == "t2i.mAP" and claim.less == "full"]
    assert {claim.than for claim in pays} == {"base", "baseline"}
    assert "t2i.rank1" in {column.measure for column in study.table}


def test_what_a_condition_is_called_is_what_it_is():
    constraint = {
        name: made("interpart-constraint", name).config.attn_constraint for name in ("none", "bias", "selfself")
    }
    assert constraint == {"none": "none", "bias": "bias", "selfself": "selfself"}
    kinds = {name: made("interpart-module", name).config.ppim.kind for name in ("max", "sigmoid", "slots", "full")}
    assert kinds == {"max": "max", "sigmoid": "sigmoid", "slots": "slots", "full": "xattn"}
    assert made("interpart-module", "masked").config.ppim.contrast == "phrase_masked"
    assert made("interpart-module", "span").config.phrase_encode == "span"
    assert made("interpart-module", "tal").config.base_loss == "tal"
    assert "ground" in made("interpart-module", "ground").current_weights()
    assert building.check(recipe("interpart-module", "given")).phrases.backend == "given"
    assert made("interpart-keys", "keys").config == made("interpart-constraint", "selfself").config


@pytest.mark.covers(197)
def test_images_and_texts_of_anything_are_trained_and_explained_from_a_csv(tmp_path):
    rows, rng = [], np.random.default_rng(0)
    for item in range(8):
        for shot in range(2):
            path = tmp_path / f"{item}-{shot}.png"
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
            split = ("train", "train", "train", "train", "val", "val", "test", "test")[item]
            rows.append(
                {"path": path.name, "person": item, "split": split, "caption": f"a blue teapot with {item} dots"}
            )
    pd.DataFrame(rows).to_csv(tmp_path / "items.csv", index=False)
    run = tmp_path / "run"
    tiny = ("backbone.spec=vit-bert:micro", "train.epochs=1", "train.batch=4", "train.instances=2")
    for words in (
        ("data", "import", "csv-table", tmp_path / "items.csv"),
        ("finetune", "--method", "interpart-tiny", *(part for one in tiny for part in ("--set", one))),
    ):
        result = cli(*words, "--run", run)
        assert result.code == 0, result.err
    result = cli("interpret", "--phrases", "rules", "--samples", 2, "--what", "masking", "--removed", 50, "--run", run)
    assert result.code == 0 and "ppim" in result.out
