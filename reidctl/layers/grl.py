"""Gradient reversal: a critic learns to read something while the features learn to hide it."""

from typing import Any

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by `-strength` on the way back.

    Ganin & Lempitsky 2015, arXiv:1409.7495, Eq. 7-8 (λ = strength).

    Args:
        x: any shape.
        strength: >= 0; 0 cuts the gradient, the critic behind still learns.
    """
    reversed_: Tensor = _Reverse.apply(x, strength)
    return reversed_
