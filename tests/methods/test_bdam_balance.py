"""Bdam under GradNorm and with frozen encoders: which layer, which tensors move."""

import logging

import pytest
import torch
from conftest import write_dataset
from methods.test_bdam import bdam as plain
from methods.test_method_contract import training_batch

from reidctl.errors import UsageError
from reidctl.layers.gradients import local_gradients
from reidctl.runs import Run
from reidctl.stages import finetune
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer


def bdam(**changes):
    """With a margin that the untrained model does not keep, so that every loss has a gradient."""
    return plain(**{"triplet": {"margin": 2.0}, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("balance") / "blocks", people=6)


@pytest.fixture(scope="module")
def batch(folder):
    return training_batch(bdam(), folder)


def train(method, batch, steps=3):
    """Some steps as the trainer does them."""
    method.train()
    optimizer = build_optimizer(method, "finetune", TrainConfig(lr=1e-2, lr_new=1e-2))
    for _ in range(steps):
        found = method.losses(batch, "finetune")
        norms = method.gradient_norms(found)
        optimizer.zero_grad(set_to_none=True)
        method.objective(found).backward()
        optimizer.step()
    return found, norms


def name_of(method, wanted):
    return next(name for name, parameter in method.named_parameters() if parameter is wanted)


@pytest.mark.covers(146)
def test_the_default_layer_is_the_last_image_mlp_and_is_printed_once_and_recorded(batch, monkeypatch):
    method = bdam()
    assert method.training_facts() == {"gradnorm_layer": None}
    # A handler of its own: caplog hears a logger that other tests left without propagation once or twice.
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("reidctl"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("reidctl"), "level", logging.INFO)
    found, norms = train(method, batch)
    name = name_of(method, method.backbone.image.last_mlp_weight)
    said = [record.getMessage() for record in records if "GradNorm" in record.getMessage()]
    assert said == [f"GradNorm measures gradients at `{name}`."]
    assert method.training_facts() == {"gradnorm_layer": name}
    assert set(norms) == set(found)


@pytest.mark.covers(146)
def test_norms_in_the_history_are_measured_at_the_named_layer(batch):
    name = "decoupling.project_identity.weight"
    method = bdam(gradnorm={"layer": name}).train()
    found = method.losses(batch, "finetune")
    norms = method.gradient_norms(found)
    for loss in ("triplet", "info"):
        grad = torch.autograd.grad(found[loss], method.decoupling.project_identity.weight, retain_graph=True)[0]
        assert norms[loss] == pytest.approx(float(grad.norm()), rel=1e-5) and norms[loss] > 0
    assert method.training_facts() == {"gradnorm_layer": name}


@pytest.mark.covers(146)
def test_an_unknown_or_frozen_name_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"no parameter `decoupling\.gate\.wait`.*`decoupling\.gate\.weight`"):
        bdam(gradnorm={"layer": "decoupling.gate.wait"})
    with pytest.raises(UsageError, match="`last_mlp`"):
        bdam(gradnorm={"layer": "lastmlp"})
    method = bdam()
    name = name_of(method, method.backbone.image.last_mlp_weight)
    with pytest.raises(UsageError, match="that trains"):
        bdam(gradnorm={"layer": name}, freeze=("image",))


@pytest.mark.covers(59, 146)
@pytest.mark.parametrize("cross_attention", ["after", "interleaved", "none"])
def test_a_frozen_vit_still_leaves_a_shared_layer_because_the_streams_are_not_separate(batch, cross_attention):
    """The projections are per branch, but cross-attention and the gate lead every loss into the clothing stream."""
    method = bdam(freeze=("image",), cross_attention=cross_attention, clothing_loss=("aln",))
    found, norms = train(method, batch, steps=2)
    assert method.layer.name.startswith("decoupling.clothing_") and "does not train" in method.layer.reason
    assert set(norms) == set(found) and all(value > 0 for value in norms.values())


@pytest.mark.covers(59, 146)
def test_a_frozen_vit_without_gate_and_cross_attention_shares_no_layer_and_gradnorm_is_refused(batch):
    apart = {"freeze": ("image",), "cross_attention": "none", "gate": False, "clothing_loss": ("aln",)}
    method = bdam(**apart)
    with pytest.raises(UsageError, match=r"`triplet` and `aln` share no weight.*gradnorm=null"):
        train(method, batch)
    found, norms = train(bdam(**apart, gradnorm=None), batch)
    assert norms == {} and all(torch.isfinite(value) for value in found.values())


@pytest.mark.covers(146)
def test_the_baseline_on_a_frozen_vit_names_the_loss_that_trains_nothing(batch):
    with pytest.raises(UsageError, match="`triplet` does not depend on any weight that trains"):
        train(bdam(decouple=False, freeze=("image",)), batch)


@pytest.mark.covers(59)
@pytest.mark.parametrize("freeze", [(), ("image",), ("text",), ("image", "text")])
def test_frozen_encoders_are_bit_identical_after_training_and_the_rest_moves(batch, freeze):
    method = bdam(freeze=freeze)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    train(method, batch)
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    for side in ("image", "text"):
        assert any(name.startswith(f"backbone.{side}.") for name in moved) == (side not in freeze)
    assert {"decoupling.project_identity.weight", "fusion.project.weight"} <= moved


@pytest.mark.covers(59)
def test_frozen_encoders_are_left_out_of_the_optimiser_and_have_no_dropout():
    method = bdam(freeze=("text",)).train()
    roles = method.parameters_by_role("finetune")
    assert roles["text"] == [] and roles["image"] and roles["new"]
    assert method.training and method.backbone.image.training and not method.backbone.text.training
    assert bdam().train().backbone.text.training


@pytest.mark.covers(52, 146)
def test_after_every_step_weights_sum_to_k_within_the_clip_and_the_network_gets_the_weighted_sum_alone(batch):
    method = bdam(gradnorm={"warm_steps": 1, "clip": (0.5, 1.3), "lr": 0.2}, clothing_loss=("aln",)).train()
    torch.manual_seed(0)
    for _ in range(5):
        found = method.losses(batch, "finetune")
        total = method.objective(found)
        weights = method.current_weights()
        assert sum(weights.values()) == pytest.approx(len(weights), rel=1e-6)
        assert all(0.5 - 1e-9 <= value <= 1.3 + 1e-9 for value in weights.values())
        weight = method.backbone.image.last_mlp_weight
        assert weight.grad is None, "balancing leaves no gradient behind"
        own = torch.autograd.grad(total, weight, retain_graph=True)[0]
        parts = [value * torch.autograd.grad(found[n], weight, retain_graph=True)[0] for n, value in weights.items()]
        assert torch.allclose(own, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-7)
        log_weights = method.balancer.log_weights
        assert torch.autograd.grad(total, log_weights, retain_graph=True, allow_unused=True)[0] is None
    assert any(value == pytest.approx(0.5) or value == pytest.approx(1.3) for value in weights.values())


@pytest.mark.covers(60, 146)
def test_the_layer_survives_the_training_state(batch):
    method = bdam(freeze=("image",))
    train(method, batch, steps=1)
    other = bdam(freeze=("image",))
    other.load_training_state(method.training_state())
    assert other.training_facts() == method.training_facts() != {"gradnorm_layer": None}


@pytest.mark.covers(146)
def test_a_triplet_loss_of_zero_defers_the_choice_to_the_end_of_the_warm_up(batch):
    """The margin is kept from the start: no gradient for reasons of values, not because no layer is shared."""
    method = plain(gradnorm={"warm_steps": 3}).train()
    assert method.losses(batch, "finetune")["triplet"] == 0
    names = []
    for _ in range(5):
        found = method.losses(batch, "finetune")
        assert set(method.gradient_norms(found)) == set(found)
        method.objective(found)
        names.append(method.layer.name)
    last_mlp = name_of(method, method.backbone.image.last_mlp_weight)
    assert names == [None, None, None, last_mlp, last_mlp]


@pytest.mark.covers(60, 146)
def test_the_layer_is_in_the_record_of_finetune_also_of_a_resumed_one(tmp_path):
    folder = write_dataset(tmp_path / "blocks", people=8, splits={6: "val", 7: "val"})
    recipe = {
        "method": {
            "name": "bdam", "depth": 1, "heads": 2, "fusion": {"width": 16, "sequence": "pair"},
            "triplet": {"margin": 2.0}, "freeze": ["image"], "gradnorm": {"warm_steps": 1},
        },
        "backbone": {"spec": "vit-bert:micro"},
        "train": {"epochs": 2, "batch": 6, "instances": 2, "warmup_epochs": 0, "workers": 0},
    }  # fmt: skip
    described = folder / "described.parquet"

    def train(run, settings=recipe):
        return finetune.run(Run(tmp_path / run), settings, data=folder, captions=described, device="cpu")

    whole = train("whole")
    assert whole["gradnorm_layer"].startswith("decoupling.clothing_")
    # What is left of a training that was killed after its last epoch and before its record.
    Run(tmp_path / "whole").unfinish("finetune")
    resumed = train("whole")
    assert resumed["resumed_from_epoch"] == 2 and resumed["gradnorm_layer"] == whole["gradnorm_layer"]
    fixed = {**recipe, "method": {**recipe["method"], "gradnorm": None}, "train": {**recipe["train"], "epochs": 1}}
    assert train("fixed", fixed)["gradnorm_layer"] is None


@pytest.mark.covers(39, 146)
def test_the_history_gets_what_gradnorm_saw_once_it_balances(batch):
    method = bdam(gradnorm={"warm_steps": 2}, clothing_loss=("aln",)).train()
    reports = []
    for _ in range(3):
        found = method.losses(batch, "finetune")
        method.objective(found)
        reports.append(method.training_report())
    tasks = set(found)
    assert reports[0] == reports[1] == {}
    kinds = {f"{kind}/{task}" for kind in ("ratio", "pull") for task in tasks}
    assert set(reports[2]) == {"gradnorm", *kinds}
    # Relative rates have mean 1 by definition; at weights of 1 the pull is the gradient's norm itself.
    assert sum(reports[2][f"ratio/{task}"] for task in tasks) == pytest.approx(len(tasks))
    norms = method.gradient_norms(found)
    assert all(reports[2][f"pull/{task}"] == pytest.approx(norms[task], rel=1e-4) for task in tasks)
    assert bdam(gradnorm=None).training_report() == {}


@pytest.mark.covers(146)
def test_whoever_trains_in_several_passes_can_bring_the_gradients_of_the_whole_batch(batch):
    """Doubled ones show in the choice of the layer, in the history and in what is balanced."""
    asked = []

    def doubled(losses, weights):
        asked.append((set(losses), len(weights)))
        found = local_gradients(losses, weights)
        return {name: [None if grad is None else 2 * grad for grad in grads] for name, grads in found.items()}

    plain_pull, plain_norm = pulls(bdam(gradnorm={"warm_steps": 1}), batch)
    method = bdam(gradnorm={"warm_steps": 1})
    method.gradients = doubled
    pull, norm = pulls(method, batch)
    tasks = set(method.balancer.tasks)
    # Found in the first step: the layer, then the norms of all losses; in the second the norms, then the balance.
    assert asked == [(tasks, 1), (tasks | {"grl"}, 1), (tasks | {"grl"}, 1), (tasks, 1)]
    assert all(norm[task] == pytest.approx(2 * plain_norm[task]) for task in norm)
    assert all(pull[task] == pytest.approx(2 * plain_pull[task]) for task in tasks)


def pulls(method, batch):
    """What GradNorm and the history saw in the second step, the first after the warm-up."""
    method.train()
    for step in range(2):
        torch.manual_seed(step)
        found = method.losses(batch, "finetune")
        norms = method.gradient_norms(found)
        method.objective(found)
    report = method.training_report()
    return {name.removeprefix("pull/"): value for name, value in report.items() if name.startswith("pull/")}, norms
