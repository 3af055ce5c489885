"""Every condition of the BDAM studies differs from the full model in what its label says, and trains."""

from pathlib import Path

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import training_batch

from reidctl.backbones.weights import build
from reidctl.config import merge
from reidctl.evaluation.published import registry
from reidctl.evaluation.study import load_study
from reidctl.methods.base import build_method
from reidctl.stages import building

FOLDER = Path("pipelines/studies")
CONDITIONS = [
    (path.stem, name)
    for path in sorted(FOLDER.glob("bdam-*.yaml"))
    for name in load_study(path).conditions
    if path.stem != "bdam-base"
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


def modules(study, name):
    return {part for part, _ in made(study, name).named_parameters() if not part.startswith("backbone.")}


def difference(study, one, other):
    """First two words of the parameters that only the first of two conditions has."""
    return {".".join(part.split(".")[:2]) for part in modules(study, one) - modules(study, other)}


@pytest.mark.covers(149, 150, 151, 152, 164, 165)
@pytest.mark.parametrize(("study", "name"), CONDITIONS)
def test_every_condition_trains_a_step_with_finite_losses(study, name, folder):
    method = made(study, name).train()
    batch = training_batch(method, folder)
    found = method.losses(batch, "finetune")
    method.objective(found).backward()
    assert found and all(torch.isfinite(value) for value in found.values())


@pytest.mark.covers(149)
def test_the_module_ablations_lack_what_they_say():
    study = "bdam-module"
    assert difference(study, "bdam", "baseline") >= {"decoupling.project_identity", "decoupling.gate", "critic.0"}
    assert not any("decoupling" in part for part in modules(study, "baseline"))
    assert difference(study, "bdam", "no-cross") == {"decoupling.identity_cross", "decoupling.clothing_cross"}
    assert difference(study, "bdam", "no-gate") == {"decoupling.gate"}
    assert difference(study, "bdam", "shallow") == {"decoupling.identity_blocks", "decoupling.clothing_blocks"}
    # As printed, this table is without the fusion module: no sequence model, no FFN, no learned modality weights.
    lacking = difference(study, "full", "bdam")
    assert {"fusion.body", "fusion.gate"} <= lacking and recipe(study, "bdam")["method"]["info_nce"]["fused_share"] == 0


@pytest.mark.covers(150)
def test_the_fusion_ablations_lack_what_they_say_and_alignment_is_the_ffn():
    study = "bdam-fusion"
    assert difference(study, "full", "no-mamba") == {"fusion.body"}
    assert difference(study, "full", "no-fusion-gate") == {"fusion.gate"}
    # Of the FFN Linear-GELU-Linear one linear map is left, as 256 must be reached somehow.
    assert difference(study, "full", "no-fusion-align") == {"fusion.align_image", "fusion.align_text"}
    assert made(study, "no-fusion-align").fusion.align_image.weight.shape == (64, 32)


@pytest.mark.covers(151)
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("no-infonce", {"info"}),
        ("no-triplet", {"triplet"}),
        ("no-clothing", {"aln", "grl"}),
        ("aln", {"grl"}),
        ("grl", {"aln"}),
        ("no-decoupling", {"decouple"}),
        ("no-weight-reg", set()),
        ("fixed", set()),
    ],
)
def test_the_loss_ablations_lack_exactly_what_they_say(name, gone):
    full = set(made("bdam-losses", "full").current_weights())
    assert full - set(made("bdam-losses", name).current_weights()) == gone


@pytest.mark.covers(151)
def test_the_regulariser_is_off_and_fixed_weights_have_no_balancer():
    assert made("bdam-losses", "no-weight-reg").config.gradnorm.weight_reg == 0
    assert made("bdam-losses", "full").config.gradnorm.weight_reg == 1e-3
    assert made("bdam-losses", "fixed").balancer is None


@pytest.mark.covers(152)
def test_the_clustering_study_has_the_seven_printed_rows_and_differs_in_the_algorithm_alone():
    study = load_study(FOLDER / "bdam-styles.yaml")
    printed = {entry.row for entry in registry() if entry.paper == "bdam-long" and entry.table == "4"}
    assert {condition.row for condition in study.conditions.values() if condition.row} == printed and len(printed) == 7
    for name, condition in study.conditions.items():
        if name not in ("full", "baseline"):
            assert set(condition.set) == {"caption"} and set(condition.set["caption"]["style"]) == {"algorithm"}


@pytest.mark.covers(164)
def test_the_noise_study_is_a_curve_over_the_share_that_it_trains_with():
    study = load_study(FOLDER / "bdam-noise.yaml")
    shares = {
        name: condition.set.get("data", {}).get("description_noise", 0.0)
        for name, condition in study.conditions.items()
    }
    assert study.draw.kind == "curve"
    assert all(study.conditions[name].x == share for name, share in shares.items() if name != "baseline")
    assert sorted(set(shares.values())) == [0.0, 0.25, 1.0]


@pytest.mark.covers(165)
def test_the_text_study_trains_on_each_source_with_the_same_budget():
    study = load_study(FOLDER / "bdam-texts.yaml")
    targets = {name: recipe("bdam-texts", name)["method"].get("target", "mix") for name in study.conditions}
    wanted = {"full": "mix", "caption": "caption", "described": "identity+clothing", "clothing": "clothing"}
    assert wanted.items() <= targets.items() and targets["identity"] == "identity"
    assert len({str(recipe("bdam-texts", name)["train"]) for name in study.conditions}) == 1


@pytest.mark.covers(161)
def test_the_efficiency_study_compares_the_three_kinds_on_the_same_tokens():
    fusion = {name: made("bdam-efficiency", name).config.fusion for name in ("mamba-tokens", "transformer", "simple")}
    assert [fusion[name].kind for name in fusion] == ["mamba", "transformer", "simple"]
    assert fusion["mamba-tokens"].sequence == fusion["transformer"].sequence == "tokens"
    assert len(made("bdam-efficiency", "transformer").fusion.body.layers) == 4


def test_nothing_but_the_named_sections_differs_between_conditions_of_one_study():
    """A condition may not train longer, on other people or at another rate than the one it is compared with."""
    for path in sorted(FOLDER.glob("bdam-*.yaml")):
        study = load_study(path)
        for name, condition in study.conditions.items():
            assert set(condition.set) <= {"method", "caption", "data"}, (path.name, name)
