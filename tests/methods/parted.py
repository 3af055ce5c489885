"""A batch in one and in several parts, for the tests of methods: losses, gradients and what a device is asked."""

from contextlib import nullcontext

import torch

from reidctl import losses, prompt_losses
from reidctl.parts import join


def doubled(method, batch):
    """Both in double precision, where rounding does not hide anything."""
    return method.double(), batch._mapped(
        lambda value: value.double() if value.is_floating_point() else value, lambda value: value
    )


def halves(batch):
    """Two parts of a prepared batch, of different sizes, in another order."""
    rows = list(range(1, len(batch), 3)) + list(range(0, len(batch), 7))
    first = list(dict.fromkeys(rows))
    return [batch.take(first), batch.take([row for row in range(len(batch)) if row not in first])]


def in_order(batch, parts):
    """The whole batch in the order in which its parts are joined."""
    return batch.take(torch.cat([part.sample for part in parts]).tolist())


def step(method, parts, stage):
    """Losses of the joined parts, gradients of every parameter, and running statistics that they leave."""
    method.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    found = method.losses_of(join([method.encode(part, stage) for part in parts]), stage)
    method.objective(found).backward()
    grads = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    buffers = {name: value.clone() for name, value in method.named_buffers() if "running" in name}
    return {name: value.detach() for name, value in found.items()}, grads, buffers


def assert_near(one, other, what):
    """Equal to 1e-6 of the largest number of each tensor; what is 0 but for rounding, to that of all."""
    assert set(one) == set(other), what
    sizes = {name: float(value.detach().abs().max()) for name, value in one.items()}
    floor = 1e-6 * max(sizes.values(), default=0.0)
    for name, value in one.items():
        gap = float((value - other[name]).detach().abs().max())
        assert gap <= 1e-6 * max(sizes[name], floor), (what, name, gap, sizes[name])


def without_asking(monkeypatch):
    """Stand-ins for the two losses that ask the device which rows have a partner; no autocast, which `meta` lacks."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    monkeypatch.setattr(losses, "batch_hard_triplet", lambda features, person, **asked: features.sum())
    for module in (losses, prompt_losses):
        monkeypatch.setattr(module, "contrast", lambda logits, positive, **asked: logits.sum())
