"""Gradient reversal: identity forwards, minus lambda backwards."""

import pytest
import torch

from reidctl.layers.grl import reverse_gradient


@pytest.mark.covers(51)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_forward_is_the_identity_and_backward_multiplies_by_minus_lambda(strength: float) -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    y = reverse_gradient(x, strength)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, -strength * torch.tensor([1.0, 10.0, 100.0]))


@pytest.mark.covers(51, 122)
def test_the_critic_descends_while_the_features_ascend() -> None:
    feature, critic = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    (critic * reverse_gradient(feature, 0.5)).sum().backward()
    assert critic.grad is not None and critic.grad.item() == 2.0
    assert feature.grad is not None and feature.grad.item() == -1.5
