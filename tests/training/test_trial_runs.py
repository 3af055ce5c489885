"""The search for a learning rate and the batch that must be learnt by heart."""

import math

import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import SETTINGS

from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.data import TrainingSet
from reidctl.errors import UsageError
from reidctl.methods.base import build_method
from reidctl.report.rates import draw_rates
from reidctl.training.config import TrainConfig
from reidctl.training.feed import Feed
from reidctl.training.probes import _steepest, find_rate, overfit

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch=8, instances=2, lr=1e-3, lr_new=1e-3, warmup_epochs=0, device="cpu",
                     augment=AugmentConfig(recipe="none"))  # fmt: skip


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("probes") / "blocks", people=8)


def made(blocks, name="clip", config=CONFIG, **settings):
    torch.manual_seed(0)
    spec, base = SETTINGS[name]
    tower = build(spec)
    method = build_method(name, {**base, **settings}, tower, 8)
    samples = TrainingSet(
        corpus_of(blocks), size=tower.image_size, mean=tower.mean, std=tower.std, tokenize=tower.tokenize,
        texts=method.train_texts, target=method.target_text, augment=config.augment,
    )  # fmt: skip
    return method, Feed(samples, config, 0, CPU)


def test_the_rate_grows_evenly_on_a_logarithmic_scale_and_the_suggestion_is_where_the_objective_falls(blocks):
    method, feed = made(blocks)
    found = find_rate(method, feed, CONFIG, stage="finetune", seed=0, steps=40, low=1e-6, high=1e-1)
    assert found.rates[0] == pytest.approx(1e-6)
    ratios = {round(math.log(b / a), 6) for a, b in zip(found.rates, found.rates[1:], strict=False)}
    assert len(ratios) == 1 and all(math.isfinite(value) for value in found.objectives)
    assert found.suggested is not None and 1e-6 < found.suggested < 1e-1


def test_the_search_ends_where_the_objective_blows_up_or_is_not_finite(blocks):
    method, feed = made(blocks)
    losses = method.losses_of
    calls = []

    def exploding(parts, stage):
        calls.append(0)
        return {name: value * (1e6 if len(calls) > 15 else 1.0) for name, value in losses(parts, stage).items()}

    method.losses_of = exploding
    found = find_rate(method, feed, CONFIG, stage="finetune", seed=0, steps=40)
    assert len(found.rates) == 10  # five steps at the lowest rate come first
    method, feed = made(blocks)
    method.losses_of = lambda parts, stage: {name: value * math.nan for name, value in losses(parts, stage).items()}
    assert find_rate(method, feed, CONFIG, stage="finetune", seed=0, steps=20).suggested is None


@pytest.mark.parametrize(
    ("objectives", "place"),
    [
        ([5, 5, 5, 5, 4, 2, 1, 1, 1, 1], 4),
        ([9, 8, 8, 8, 8, 8, 4, 2, 2, 2], 6),
        ([1, 1, 2, 3, 3, 4, 5, 6, 7, 8], None),
        ([1.0], None),
        ([], None),
    ],
)
def test_the_steepest_fall_is_that_of_a_hand_made_curve(objectives, place):
    rates = [10.0**-number for number in range(len(objectives), 0, -1)]
    found = _steepest(rates, [float(value) for value in objectives])
    assert found == (None if place is None else pytest.approx(rates[place]))


def test_what_sinks_after_a_jump_up_is_no_fall():
    rates = [10.0**-number for number in range(10, 0, -1)]
    found = _steepest(rates, [9.0, 9.0, 8.0, 5.0, 4.0, 3.5, 9.0, 5.0, 1.0, 1.0])
    assert found == pytest.approx((rates[2] * rates[3]) ** 0.5)


def test_a_rate_of_nothing_has_no_ratio(blocks):
    method, feed = made(blocks)
    with pytest.raises(UsageError, match=r"train\.lr above 0"):
        find_rate(method, feed, CONFIG.replace(lr=0.0), stage="finetune", seed=0)


@pytest.mark.parametrize("name", ["clip", "clip-reid"])
def test_a_batch_is_learnt_by_heart_and_a_model_that_cannot_learn_is_found_out(blocks, name):
    method, feed = made(blocks, name)
    found = overfit(method, feed, CONFIG, stage="finetune", seed=0, steps=60)
    assert found.learnt and found.rank1[1] == 1.0 and found.last["total"] < found.first["total"]
    method, feed = made(blocks, name)
    frozen = overfit(method, feed, CONFIG.replace(lr=0.0, lr_new=0.0), stage="finetune", seed=0, steps=3)
    assert frozen.rank1[0] == frozen.rank1[1] and frozen.learnt == (frozen.rank1[0] == 1.0)


def test_the_picture_is_a_png_with_and_without_a_suggestion():
    for suggested in (1e-4, None):
        assert draw_rates([1e-6, 1e-5, 1e-4], [3.0, 2.5, 2.0], suggested, 1e-3).startswith(b"\x89PNG")
