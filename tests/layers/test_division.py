"""Losses of single pairs, and which pairs a division holds for clean."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from reidctl import losses
from reidctl.layers.division import clean_probability, divide, pair_losses, split

KINDS = ("tal", "trl", "infonce", "sdm")


def features(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    sides = (torch.randn(count, 5, dtype=torch.float64, generator=random) for _ in range(2))
    return (*sides, torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])[:count])  # type: ignore[return-value]


def planted(noisy: int, clean: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Losses of two groups far apart, shuffled, and which are clean."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0.9, 0.05, noisy), rng.normal(0.2, 0.05, clean)])
    order = rng.permutation(len(values))
    return torch.from_numpy(values[order]), (np.arange(len(values)) >= noisy)[order]


# Losses


def test_tal_and_sdm_of_pairs_average_to_the_losses_of_the_batch() -> None:
    image, text, person = features()
    for kind in ("tal", "sdm"):
        mean = pair_losses(image, text, person, kind, temperature=0.2, margin=0.3).mean()
        other = {"tal": {"margin": 0.3}, "sdm": {}}[kind]
        assert mean.item() == pytest.approx(getattr(losses, kind)(image, text, person, temperature=0.2, **other).item())


def test_infonce_of_pairs_averages_to_the_symmetric_contrast_with_the_own_pair_alone() -> None:
    image, text, person = features()
    mean = pair_losses(image, text, person, "infonce", temperature=0.2).mean()
    assert mean.item() == pytest.approx(losses.info_nce(image, text, temperature=0.2).item())


def test_trl_equals_a_loop_over_pairs_and_a_negative_below_zero_counts_as_zero() -> None:
    image, text, person = features(8)
    cosine = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    found = pair_losses(image, text, person, "trl", temperature=0.2, margin=0.3)
    floors = 0
    for i in range(8):
        expected = 0.0
        for row in (cosine[i], cosine[:, i]):
            own = person == person[i]
            nearest = row[~own].max().item()
            floors += nearest < 0
            positive = (torch.softmax(row[own] / 0.2, 0) @ row[own]).item()
            expected += max(0.0, 0.3 + max(0.0, nearest) - positive)
        assert found[i].item() == pytest.approx(expected)
    apart = torch.eye(3, dtype=torch.float64) - 0.4
    alone = pair_losses(apart, apart, torch.arange(3), "trl", temperature=0.2, margin=1.5)
    assert alone.tolist() == pytest.approx([2 * (1.5 - 1.0)] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_is_left_out_of_the_sum_still_serves_as_negative(kind: str) -> None:
    image, text, person = features()
    image.requires_grad_()
    pair_losses(image, text, person, kind, temperature=0.2)[0].backward()
    assert (image.grad.abs().sum(dim=1) > 0).sum() > 2


@pytest.mark.parametrize("kind", KINDS)
def test_people_without_negatives_and_empty_batches_have_finite_gradients(kind: str) -> None:
    for person in (torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 0, 1]), torch.zeros(0, dtype=torch.long)):
        image, text, _ = features()
        image = image[: len(person)].clone().requires_grad_()
        found = pair_losses(image, text[: len(person)], person, kind)
        assert found.shape == person.shape and torch.isfinite(found).all()
        found.sum().backward()
        assert torch.isfinite(image.grad).all()
    assert pair_losses(image, text[:0], person, kind).shape == (0,)


def test_tal_is_zero_for_a_batch_of_one_person_and_large_scores_do_not_overflow() -> None:
    image, text, person = features()
    assert (pair_losses(image, text, torch.zeros_like(person), "tal") == 0).all()
    cold = pair_losses(image.float(), text.float(), person, "tal", temperature=1e-3)
    assert torch.isfinite(cold).all() and (cold > 0).any()


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        pair_losses(*features(), "tal", temperature=0.0)


# Division


@pytest.mark.parametrize("fit", ["coarse", "fine"])
def test_a_mixture_tells_planted_noise_from_clean_pairs(fit: str) -> None:
    values, clean = planted(60, 140)
    found = divide({"bge": values, "tse": values * 3 + 1}, fit=fit)
    assert np.array_equal(found.labels.numpy() > 0, clean)
    assert found.shares() == {"clean": 0.7, "noisy": 0.3, "uncertain": 0.0, "used": 0.7}


def test_a_coin_decides_where_two_views_disagree() -> None:
    values, clean = planted(500, 500)
    found = divide({"bge": values, "tse": values.flip(0)}, seed=(0, 3))
    both = torch.from_numpy(clean & clean[::-1])
    neither = torch.from_numpy(~clean & ~clean[::-1])
    assert (found.labels[both] == 1).all() and (found.labels[neither] == 0).all()
    uncertain = ~both & ~neither
    assert (found.votes[uncertain] == 1).all() and uncertain.sum() > 300
    share = found.labels[uncertain].mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(int(uncertain.sum()))
    again, later = (divide({"bge": values, "tse": values.flip(0)}, seed=(0, epoch)) for epoch in (3, 4))
    assert torch.equal(found.labels, again.labels) and not torch.equal(found.labels, later.labels)


def test_the_generators_of_the_process_are_neither_read_nor_moved() -> None:
    values, _ = planted(50, 50)
    torch.manual_seed(1), np.random.seed(1)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = divide({"bge": values, "tse": values.flip(0)})
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], legacy)
    torch.manual_seed(2), np.random.seed(2)
    assert torch.equal(divide({"bge": values, "tse": values.flip(0)}).labels, first.labels)


def test_samples_that_no_batch_held_are_unknown_and_do_not_move_the_others() -> None:
    values, _ = planted(30, 70)
    gaps = values.clone()
    gaps[::5] = math.nan
    found = divide({"bge": gaps, "tse": values})
    held = ~torch.isnan(gaps)
    assert (found.votes[~held] == -1).all() and (found.labels[~held] == 1).all()
    alone = divide({"bge": values[held], "tse": values[held]})
    assert torch.equal(found.labels[held], alone.labels)
    assert found.shares() == alone.shares()
    nobody = divide({"bge": torch.full((4,), math.nan)})
    assert (nobody.labels == 1).all() and nobody.shares()["used"] == 0


def test_where_all_are_clean_the_lowest_hundredth_is_noisy_all_the_same() -> None:
    probability = np.linspace(0.6, 0.9, 300)
    # Place 300 // 100 = 3: the four lowest are not above its probability.
    assert np.array_equal(np.flatnonzero(~split(probability)), [0, 1, 2, 3])
    assert np.array_equal(split(probability - 0.2), probability - 0.2 > 0.5)


def test_probabilities_that_many_share_at_the_top_stay_clean() -> None:
    shared = np.concatenate([[0.9, 0.95], np.ones(298)])
    assert np.array_equal(np.flatnonzero(~split(shared)), [0, 1])
    assert split(np.ones(50)).all()


def test_equal_losses_say_nothing_against_anybody() -> None:
    assert (clean_probability(np.full(9, 0.3)) == 1).all()
    assert (divide({"bge": torch.full((9,), 0.3)}).labels == 1).all()
    assert (divide({"bge": torch.tensor([0.3])}).labels == 1).all()


def test_the_published_limit_of_iterations_is_no_warning() -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_probability(rng.uniform(size=400))
