"""The BNNeck head."""

import pytest
import torch

from reidctl.layers.bnneck import BNNeck


@pytest.mark.covers(46)
def test_the_bias_is_frozen_and_the_classifier_has_none() -> None:
    neck = BNNeck(4, 3)
    trained = {name for name, parameter in neck.named_parameters() if parameter.requires_grad}
    assert trained == {"norm.weight", "classifier.weight"}
    neck(torch.randn(8, 4)).logits.sum().backward()
    assert neck.norm.bias.grad is None and (neck.norm.bias == 0).all()


@pytest.mark.covers(46)
def test_training_features_are_standardised_and_logits_are_linear_in_them() -> None:
    torch.manual_seed(0)
    neck, x = BNNeck(4, 3), torch.randn(64, 4) * 5 + 2
    output = neck(x)
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(output.feature, expected, atol=1e-5)
    assert torch.allclose(output.logits, output.feature @ neck.classifier.weight.T)


@pytest.mark.covers(57)
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_one_uses_the_running_statistics_and_leaves_them_alone(training: bool) -> None:
    neck = BNNeck(4, 3).train(training)
    before = neck.norm.running_mean.clone()
    x = torch.full((1, 4), 3.0)
    assert torch.allclose(neck(x).feature, x, atol=1e-4)
    assert torch.equal(neck.norm.running_mean, before)
