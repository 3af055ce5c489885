"""The gradients of several losses at some weights, which balancing and reporting need beside the training step."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Gradients(Protocol):
    """Returns the gradient of each loss at each weight, None where it does not depend on it; graphs stay intact."""

    def __call__(self, losses: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, list[Tensor | None]]: ...


def local_gradients(losses: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
    """Return the gradients in this process, from graphs that reach the weights; no `.grad` is touched."""
    found: dict[str, list[Tensor | None]] = {}
    for name, value in losses.items():
        found[name] = [None] * len(weights)
        if value.requires_grad and weights:
            found[name] = list(torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True))
    return found
