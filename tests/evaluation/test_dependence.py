"""Dependence of two features, beside exchanged people."""

import numpy as np
import pytest
import torch

from reidctl import losses
from reidctl.evaluation import dependence as dep

PEOPLE, EACH = 30, 4


def people(people=PEOPLE, each=EACH):
    return np.repeat([f"p{number:02d}" for number in range(people)], each).astype(object)


def of_people(rng, width=6, noise=0.3):
    """A feature that is alike within a person."""
    return np.repeat(rng.normal(size=(PEOPLE, width)), EACH, axis=0) + noise * rng.normal(size=(PEOPLE * EACH, width))


@pytest.mark.covers(50)
@pytest.mark.parametrize("measure", dep.MEASURES)
def test_a_copy_has_a_low_p_value_and_cka_one(measure):
    a = of_people(np.random.default_rng(0))
    found = dep.dependence(a, a * 3, people())[measure]
    assert found.p_value == 1 / (1 + dep.PERMUTATIONS)
    assert found.value > found.control_high > found.control > 0
    if measure.startswith("cka"):
        assert found.value == pytest.approx(1)


def test_features_that_only_share_who_belongs_together_are_not_called_dependent():
    """Both are alike within people, and independent across: exchanging single images would call that dependence."""
    p_values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = dep.dependence(of_people(rng), of_people(rng), people(), seed=seed, permutations=39)
        p_values.append([found[name].p_value for name in dep.MEASURES])
    small = (np.array(p_values) <= 0.05).mean(axis=0)
    assert (small <= 0.175).all(), small  # 40 trials at 5 %: more than 7 of them has a probability of 0.1 %


def test_exchanging_single_images_would_have_called_them_dependent():
    rng = np.random.default_rng(1)
    single = np.array([f"i{number}" for number in range(PEOPLE * EACH)], dtype=object)
    hits = [
        dep.dependence(of_people(rng), of_people(rng), single, permutations=39)["cka-linear"].p_value <= 0.05
        for _ in range(10)
    ]
    assert sum(hits) >= 8


def test_a_relation_that_is_not_linear_is_seen_by_the_kernel_alone():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(PEOPLE * EACH, 1))
    found = dep.dependence(a, a**2 - 1 + 0.05 * rng.normal(size=a.shape), people(), permutations=99)
    assert found["cka-rbf"].p_value <= 0.02 and found["cka-rbf"].value > 3 * found["cka-linear"].value


@pytest.mark.covers(50)
def test_the_measures_are_those_of_the_losses_and_of_the_definition():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(40, 7))
    found = dep.dependence(a, b, people(10, 4), permutations=5)
    cross = (a - a.mean(0)).T @ (b - b.mean(0)) / 39
    assert found["hsic-linear"].value == pytest.approx((cross**2).sum())
    rbf = losses.hsic(torch.tensor(a), torch.tensor(b), kernel="rbf", normalize="cka")
    assert found["cka-rbf"].value == pytest.approx(float(rbf))
    assert 0 <= found["cka-linear"].value <= 1


@pytest.mark.parametrize("measure", dep.MEASURES)
def test_controls_equal_the_losses_of_exchanged_rows(measure):
    rng = np.random.default_rng(4)
    a, b, person = rng.normal(size=(40, 5)), rng.normal(size=(40, 7)), people(10, 4)
    how = {
        "hsic-linear": {"normalize": "none"},
        "hsic-linear-unit": {"normalize": "l2"},
        "cka-linear": {"normalize": "cka"},
        "cka-rbf": {"kernel": "rbf", "normalize": "cka"},
    }[measure]
    slow = [
        float(losses.hsic(torch.tensor(a), torch.tensor(b[order]), **how))
        for order in dep.exchanged_rows(person, seed=7, permutations=12)
    ]
    found = dep.dependence(a, b, person, seed=7, permutations=12)[measure]
    assert found.control == pytest.approx(np.mean(slow))
    assert found.control_high == pytest.approx(np.quantile(slow, 0.95))
    assert found.p_value == pytest.approx((1 + sum(value >= found.value for value in slow)) / 13)


def test_an_exchange_gives_all_images_of_a_person_rows_of_one_other_person():
    person = np.array(["a"] * 3 + ["b"] * 3 + ["c"] * 2, dtype=object)
    orders = dep.exchanged_rows(person, permutations=30)
    for order in orders:
        for name in "abc":
            assert len(set(person[order[person == name]])) == 1
    assert any((order[:3] != np.sort(order[:3])).any() for order in orders), "images are in random order too"
    assert len({tuple(person[order]) for order in orders}) > 3


def test_constant_features_depend_on_nothing():
    found = dep.dependence(
        np.ones((20, 3)), np.random.default_rng(0).normal(size=(20, 3)), people(5, 4), permutations=9
    )
    for measure in dep.MEASURES:
        assert found[measure].value == pytest.approx(0, abs=1e-12) and found[measure].p_value == 1
