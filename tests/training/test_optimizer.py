"""Rates and decays of parameters: rules by name, and the recipes that repeat published solvers."""

import math

import pytest
import torch

from reidctl.backbones.weights import build
from reidctl.config import load_recipe, parse_section
from reidctl.errors import UsageError
from reidctl.methods.base import build_method
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor, require_groups


def model(name, **settings):
    torch.manual_seed(0)
    return build_method(name, settings, build("clip:micro"), 5)


def recipe(name, section="train", kind=TrainConfig):
    return parse_section(kind, load_recipe(name)[section], section)


def facts(method, config, stage="finetune"):
    """(rate, decay) by name of every parameter that trains."""
    groups = build_optimizer(method, stage, config).param_groups
    held = {id(p): (group["base_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: held[id(p)] for name, p in method.named_parameters() if id(p) in held}


def irra_name(ours):
    """What anosorae/IRRA calls a parameter of our `irra`."""
    for mine, theirs in (
        ("backbone.image.", "base_model."),
        ("backbone.text.text.", "base_model."),
        ("mlm.transformer.", "cross_modal_transformer."),
        ("mlm.dense.", "mlm_head.dense."),
        ("mlm.ln.", "mlm_head.ln."),
        ("mlm.classifier.", "mlm_head.fc."),
        ("mlm.", ""),
    ):
        if ours.startswith(mine):
            return theirs + ours.removeprefix(mine)
    return ours


@pytest.mark.covers(59)
def test_irra_paper_gives_every_parameter_the_rate_and_decay_of_the_published_solver():
    method = model("irra", mlm_layers=2)
    found = facts(method, recipe("irra-paper"))
    assert set(found) == {name for name, _ in method.named_parameters()}
    for name, (rate, decay) in found.items():
        theirs, expected = irra_name(name), (1e-5, 4e-5)  # solver/build.py, in its order
        if "cross" in theirs:
            expected = (5e-5, expected[1])
        if "bias" in theirs:
            expected = (2e-5, 0.0)
        if "classifier" in theirs or "mlm_head" in theirs:
            expected = (5e-5, expected[1])
        assert (rate, decay) == pytest.approx(expected, rel=1e-12), name
    by_hand = {
        "backbone.image.visual.proj": (1e-5, 4e-5),
        "backbone.text.text.ln_final.bias": (2e-5, 0.0),
        "classifier.weight": (5e-5, 4e-5),
        "classifier.bias": (5e-5, 0.0),
        "mlm.cross_attn.in_proj_weight": (5e-5, 4e-5),
        "mlm.cross_attn.in_proj_bias": (2e-5, 0.0),
        "mlm.transformer.resblocks.1.mlp.c_fc.bias": (2e-5, 0.0),
        "mlm.ln_pre_t.weight": (1e-5, 4e-5),
        "mlm.ln_post.bias": (2e-5, 0.0),
        "mlm.ln.weight": (5e-5, 4e-5),
        "mlm.classifier.bias": (5e-5, 0.0),
    }
    for name, expected in by_hand.items():
        assert found[name] == pytest.approx(expected, rel=1e-12), name


@pytest.mark.covers(59)
def test_rde_paper_trains_token_selection_at_its_own_rate_biases_included():
    found = facts(model("rde", width=16), recipe("rde-paper"))
    for name, (rate, decay) in found.items():
        new, bias = name.startswith("tse_"), name.endswith("bias")
        assert rate == pytest.approx(1e-3 if new else 2e-5 if bias else 1e-5, rel=1e-12), name
        assert decay == (0.0 if bias else 4e-5), name
    assert sum(name.startswith("tse_") for name in found) == 16


@pytest.mark.covers(58)
@pytest.mark.parametrize("name", ["irra-paper", "rde-paper"])
def test_their_rates_rise_over_five_epochs_and_fall_as_a_cosine_to_the_sixtieth(name):
    config = recipe(name)
    factors = [learning_rate_factor(config, epoch) for epoch in range(config.epochs)]
    assert len(factors) == 60
    assert factors[:6] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    for epoch in range(5, 60):
        assert factors[epoch] == pytest.approx((1 + math.cos(math.pi * (epoch - 5) / 55)) / 2)


@pytest.mark.parametrize("name", ["irra-paper", "rde-paper"])
def test_their_batches_and_pictures_are_the_published_ones_and_the_epoch_is_not_chosen_on_test(name):
    config, towers = recipe(name), load_recipe(name)["backbone"]
    assert (config.optimizer, config.eps, config.betas, config.batch) == ("adam", 1e-3, (0.9, 0.999), 64)
    assert (config.sampler, config.select, config.schedule_by) == ("shuffle", "val", "epoch")
    assert (config.augment.recipe, config.augment.flip_respects_sides) == ("irra", False)
    assert towers == {"spec": "clip:ViT-B-16/openai", "image_size": [384, 128]}
    assert "test" in load_recipe(name)["about"]


@pytest.mark.covers(59)
def test_clip_reid_paper_is_clip_reid_and_its_solver_is_the_published_one():
    published, usual = load_recipe("clip-reid-paper"), load_recipe("clip-reid")
    assert {**published, "about": ""} == {
        **usual,
        "about": "",
        "train": {**usual["train"], "select": "val"},
    }
    method, config = model("clip-reid", n_id_tokens=2), recipe("clip-reid-paper")
    for name, found in facts(method, config).items():
        # SOLVER.STAGE2: base 5e-6, biases twice as fast, one weight decay for all of them.
        assert found == pytest.approx((1e-5 if name.endswith("bias") else 5e-6, 1e-4), rel=1e-12), name
    factors = [learning_rate_factor(config, epoch) for epoch in (0, 8, 9, 28, 29, 48, 49, 59)]
    assert factors == pytest.approx([0.19, 0.91, 1, 1, 0.1, 0.1, 0.01, 0.01])
    first = recipe("clip-reid-paper", "prompt", PromptConfig)
    assert facts(method, first, "prompt-stage") == {"id_tokens": pytest.approx((3.5e-4, 1e-4))}
    # timm's cosine from 3.5e-4 to 1e-6 over 120 epochs, with 5 epochs from 1e-5 up in front of it.
    rates = [3.5e-4 * learning_rate_factor(first, epoch) for epoch in (0, 3, 4, 119)]
    half = [1e-6 + 0.5 * (3.5e-4 - 1e-6) * (1 + math.cos(math.pi * epoch / 120)) for epoch in (5, 120)]
    assert rates == pytest.approx([1e-5 + 3.4e-4 / 5, 1e-5 + 4 * 3.4e-4 / 5, *half], rel=1e-6)


def rules(*groups):
    return TrainConfig(lr=1e-4, lr_new=3e-4, weight_decay=1e-3, groups=groups)


def test_of_several_rules_the_last_says_the_rate_and_one_that_does_not_name_it_leaves_it():
    method = model("irra", mlm_layers=1)
    config = rules(
        {"match": r"^mlm\.", "factor": 2.0},
        {"match": "cross_attn", "lr": 7e-5},
        {"match": r"bias$", "weight_decay": 0.5},
        {"match": "cross_attn.out_proj", "factor": 0.0},
    )
    found = facts(method, config)
    assert found["mlm.dense.weight"] == pytest.approx((2e-4, 1e-3))
    assert found["mlm.cross_attn.in_proj_weight"] == pytest.approx((7e-5, 1e-3))
    assert found["mlm.cross_attn.in_proj_bias"] == pytest.approx((7e-5, 0.5))
    assert found["mlm.cross_attn.out_proj.bias"] == (0.0, 0.5)
    # No rule speaks of its rate: biases learn twice as fast, as ever.
    assert found["classifier.bias"] == pytest.approx((6e-4, 0.5))
    assert found["classifier.weight"] == pytest.approx((3e-4, 1e-3))


def test_without_rules_nothing_changes():
    method = model("irra", mlm_layers=1)
    assert facts(method, rules()) == facts(method, TrainConfig(lr=1e-4, lr_new=3e-4, weight_decay=1e-3))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "cros_attn", "factor": 5.0}, r"train\.groups\[1\].match` is `cros_attn`.*found in no name"),
        ({"match": "mlm(", "factor": 5.0}, "no regular expression"),
        ({"match": "mlm"}, "changes nothing"),
        ({"match": "mlm", "factor": 5.0, "lr": 1e-3}, "both `factor` and `lr`"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_before_anything_is_frozen(rule, message):
    method = model("irra", mlm_layers=1)
    config = rules({"match": "bias$", "factor": 1.0}, rule)
    with pytest.raises(UsageError, match=message) as caught:
        require_groups(method, "finetune", config)
    assert all(parameter.requires_grad for parameter in method.parameters())
    if "no name" in message:
        assert "classifier.weight" in caught.value.hint
    with pytest.raises(UsageError, match=message):
        build_optimizer(method, "finetune", config)


def test_a_rule_for_what_a_stage_freezes_matches_nothing():
    with pytest.raises(UsageError, match="found in no name"):
        require_groups(model("clip-reid", n_id_tokens=2), "finetune", rules({"match": "id_tokens", "lr": 1e-3}))


def steps(optimizer, parameters):
    torch.manual_seed(1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape).to(parameter.device)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_on_the_cpu_the_step_is_the_plain_one_bit_for_bit(kind):
    config = TrainConfig(lr=1e-3, optimizer=kind, weight_decay=1e-2)
    ours, plain = model("clip"), model("clip")
    named = dict(ours.named_parameters())
    optimizer = build_optimizer(ours, "finetune", config)
    held = {name: (rate, decay) for name, (rate, decay) in facts(plain, config).items()}
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    own = dict(plain.named_parameters())
    groups = [{"params": [own[name]], "lr": rate, "weight_decay": decay} for name, (rate, decay) in held.items()]
    after = steps(optimizer, list(named.values()))
    assert torch.equal(after, steps(cls(groups, foreach=False), list(own.values())))
    assert not any(group["fused"] for group in optimizer.param_groups)


@pytest.mark.gpu
def test_on_cuda_the_step_is_one_kernel_and_gives_the_same_numbers():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    config = TrainConfig(lr=1e-3, weight_decay=1e-2)
    here, there = model("clip"), model("clip").to("cuda")
    optimizer = build_optimizer(there, "finetune", config)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = steps(build_optimizer(here, "finetune", config), list(here.parameters()))
    assert torch.allclose(steps(optimizer, list(there.parameters())).cpu(), expected, atol=1e-6)
