"""One batch in several passes, or on several processes, gives the losses and gradients of the whole."""

import copy

import numpy as np
import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import SETTINGS, model, training_batch
from torch import nn
from training.ranks import in_processes

from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer
from reidctl.training.step import Step, split

ROWS = 12
CASES = {
    **{name: (name, {}) for name in SETTINGS},
    "bdam that balances": ("bdam", {"gradnorm": {"warm_steps": 1}}),
    "bdam with fixed weights": ("bdam", {"gradnorm": None}),
}
PROMPTS = ("hpl", "clip-reid", "mta-clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("step") / "blocks", people=6)


def quiet(method):
    """Take what draws at random, and norms within a part, out of a method."""
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return method


def made(case, folder, stage, *, rank=0, world=1, accumulate=1, bare=False):
    """A step and this process's part of a batch whose words were hidden once."""
    name, settings = CASES[case]
    method = quiet(model(name, **settings))
    config = TrainConfig(lr=0.0, accumulate=accumulate, clip_grad_norm=None)
    optimizer = build_optimizer(method, stage, config)
    method.begin(stage)
    method.train()
    if name == "rde":
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not bare:
                module.eval()
    torch.manual_seed(3)
    batch = method.prepare(training_batch(method, folder, range(ROWS)))
    part = batch.take(range(rank * ROWS // world, (rank + 1) * ROWS // world)) if world > 1 else batch
    method.prepare = lambda given: given
    return Step(method, optimizer, config, stage), part


def outcome(case, folder, stage, steps=2, **how):
    """Losses, norms, weights and gradients of the last of some steps that change nothing."""
    step, part = made(case, folder, stage, **how)
    for _ in range(steps):
        done = step(part, reporting=True, check=lambda values: None)
    method = step.method
    numbers = {f"loss {name}": float(value.detach()) for name, value in done.losses.items()}
    numbers |= {f"norm {name}": value for name, value in done.norms.items()}
    numbers |= {f"weight {name}": value for name, value in method.current_weights(stage).items()}
    numbers["gradient"] = float(done.gradient)
    grads = {name: p.grad.numpy().copy() for name, p in method.named_parameters() if p.grad is not None}
    return numbers, grads


def compare(found, expected, tolerance=1e-6):
    numbers, grads = found
    assert numbers.keys() == expected[0].keys() and grads.keys() == expected[1].keys()
    for name, value in expected[0].items():
        assert numbers[name] == pytest.approx(value, rel=20 * tolerance, abs=tolerance), name
    for name, value in expected[1].items():
        # Relative to the length of the gradient where that is above one: float32 has seven digits.
        scale = max(np.linalg.norm(value), 1.0)
        assert np.abs(grads[name] - value).max() <= tolerance * scale, name


def stages_of(case):
    return ("finetune", "prompt-stage") if CASES[case][0] in PROMPTS else ("finetune",)


EVERY = [(case, stage) for case in CASES for stage in stages_of(case)]


@pytest.mark.parametrize(("case", "stage"), EVERY)
@pytest.mark.parametrize("passes", [2, 5])
def test_a_batch_in_several_passes_has_the_losses_and_gradients_of_the_whole(folder, case, stage, passes):
    compare(outcome(case, folder, stage, accumulate=passes), outcome(case, folder, stage))


def _every_case(rank, folder, accumulate):
    return {
        (case, stage): outcome(case, folder, stage, rank=rank, world=2, accumulate=accumulate) for case, stage in EVERY
    }


@pytest.fixture(scope="module", params=[1, 3], ids=["ddp", "three passes each"])
def two_processes(request, folder):
    return in_processes(_every_case, folder, request.param)


@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_two_processes_have_the_losses_and_gradients_of_one(folder, two_processes, case, stage):
    expected = outcome(case, folder, stage)
    for found in two_processes:
        compare(found[case, stage], expected)


def test_passes_draw_the_same_random_numbers_twice(folder):
    step, part = made("bdam with fixed weights", folder, "finetune", accumulate=3)
    for module in step.method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    seen = []
    encode = step.method.encode
    step.method.encode = lambda batch, stage: (seen.append(encode(batch, stage)), seen[-1])[1]
    torch.manual_seed(5)
    step(part, check=lambda values: None)
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(seen[0]["image"], encode(split(part, 3)[0], "finetune")["image"])


def test_statistics_of_norms_count_every_pass_once(folder):
    step, part = made("rde", folder, "finetune", accumulate=2, bare=True)
    norms = [m for m in step.method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [copy.deepcopy(norm.running_mean) for norm in norms]
    expected = model("rde").train()
    for piece in split(part, 2):
        expected.encode(piece, "finetune")
    step(part, check=lambda values: None)
    theirs = [m for m in expected.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert any(not torch.equal(old, norm.running_mean) for old, norm in zip(before, norms, strict=True))
    for norm, other in zip(norms, theirs, strict=True):
        assert torch.allclose(norm.running_mean, other.running_mean, atol=1e-6)
