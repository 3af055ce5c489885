"""Claims are judged by Student's interval over seeds; every expected value is worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reidctl.evaluation.claims import Claim, estimate, holm, judge

T2 = 4.302652729749464  # Student, 97.5 %, 2 degrees of freedom (any table)


def values(**conditions):
    """condition -> seeds 0, 1, ... of the measure m."""
    return {name: {seed: {"m": value} for seed, value in enumerate(found)} for name, found in conditions.items()}


def verdict(claim, found, seeds=(0, 1, 2)):
    return judge(Claim(say="so", measure="m", **claim), found, seeds).verdict


def test_the_interval_of_three_values_is_students():
    whole = estimate([1.0, 2.0, 3.0])
    half = T2 * 1.0 / math.sqrt(3)
    assert (whole.mean, whole.std) == (2.0, 1.0)
    assert whole.low == pytest.approx(2 - half) and whole.high == pytest.approx(2 + half)
    # t = 2 / (1 / sqrt 3) = 3.4641, two-sided with 2 degrees of freedom: 1 - t / sqrt(2 + t²) = 1 - sqrt(6/7).
    assert whole.p_value == pytest.approx(1 - math.sqrt(6 / 7))


def test_one_value_has_no_interval_and_decides_nothing():
    alone = estimate([0.5])
    assert math.isinf(alone.low) and math.isinf(alone.high) and alone.p_value == 1
    assert verdict({"more": "a", "than": "b"}, values(a=[0.9], b=[0.1])) == "undecided"
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_clear_paired_difference_holds_although_the_conditions_overlap():
    # Seeds differ by 0.4, the difference within a seed is 0.05 ± 0.001: pairing is what finds it.
    found = values(a=[0.15, 0.351, 0.549], b=[0.10, 0.30, 0.50])
    assert verdict({"more": "a", "than": "b"}, found) == "holds"
    assert verdict({"less": "b", "than": "a"}, found) == "holds"
    assert verdict({"more": "b", "than": "a"}, found) == "does not hold"
    assert verdict({"less": "a", "than": "b"}, found) == "does not hold"


def test_a_noisy_difference_is_undecided_and_a_surely_tiny_one_does_not_hold():
    assert verdict({"more": "a", "than": "b"}, values(a=[0.5, 0.2, 0.4], b=[0.4, 0.3, 0.2])) == "undecided"
    tiny = values(a=[0.501, 0.2005, 0.3999], b=[0.5, 0.2, 0.4])
    assert verdict({"more": "a", "than": "b"}, tiny) == "does not hold"
    assert verdict({"more": "a", "than": "b", "matters": 0.0001}, tiny) == "undecided"


@pytest.mark.parametrize(("measure", "chance"), [("x.t2i.mAP", "chance.t2i.mAP"), ("o.t2i.mAP", "o.chance.t2i.mAP")])
def test_chance_of_a_setting_or_of_another_dataset_is_found(measure, chance):
    found = {name: {seed: {measure: 0.11, chance: 0.1} for seed in range(3)} for name in "ab"}
    assert judge(Claim(say="so", measure=measure, more="a", than="b"), found, (0, 1, 2)).verdict == "undecided"


def test_equal_models_at_chance_say_nothing_about_what_distinguishes_them():
    found = {name: {seed: {"m": 0.11, "chance.m": 0.1} for seed in range(3)} for name in "ab"}
    judged = judge(Claim(say="so", measure="m", more="a", than="b"), found, (0, 1, 2))
    assert (judged.verdict, judged.reason) == ("undecided", "neither condition is clearly above chance")
    learnt = {name: {seed: {"m": 0.31, "chance.m": 0.1} for seed in range(3)} for name in "ab"}
    assert judge(Claim(say="so", measure="m", more="a", than="b"), learnt, (0, 1, 2)).verdict == "does not hold"


@pytest.mark.parametrize(
    ("found", "expected"),
    [([0.01, 0.02, 0.03], "holds"), ([0.2, 0.21, 0.22], "does not hold"), ([0.0, 0.05, 0.1], "undecided")],
)
def test_a_bound_holds_only_if_the_whole_interval_respects_it(found, expected):
    assert verdict({"of": "a", "at_most": 0.05}, values(a=found)) == expected


def test_two_measures_of_one_condition_are_compared_within_each_seed():
    found = {"a": {seed: {"m": 0.3 + seed, "n": 0.1 + seed + 0.001 * seed} for seed in range(3)}}
    assert verdict({"more": "a", "versus": "n"}, found) == "holds"


def test_seeds_without_a_value_are_left_out_and_a_missing_measure_is_named():
    found = values(a=[0.5, 0.6, 0.7], b=[0.1, 0.2, math.nan])
    judged = judge(Claim(say="so", measure="m", more="a", than="b"), found, (0, 1, 2))
    assert judged.seeds == (0, 1)
    absent = judge(Claim(say="so", measure="x", more="a", than="b"), found, (0, 1, 2))
    assert absent.verdict == "undecided" and absent.reason == "x of a was not measured" and absent.effect is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"more": "a", "less": "b", "than": "c"},
        {"more": "a"},
        {"more": "a", "versus": "m"},
        {"of": "a"},
        {"of": "a", "at_most": 1.0, "than": "b"},
        {"more": "a", "than": "b", "at_most": 1.0},
        {},
    ],
)
def test_a_claim_that_compares_nothing_is_refused(wrong):
    with pytest.raises(ValueError):
        Claim(say="so", measure="m", **wrong)


def test_holm_multiplies_the_smallest_by_their_number_and_never_decreases():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) or math.isclose(adjusted, raw)


def test_three_seeds_hold_by_accident_in_about_one_study_of_forty():
    """Under no difference, `holds` must be rare: half of 5 %, since only one side counts."""
    import numpy as np

    rng = np.random.default_rng(0)
    draws = rng.normal(0, 0.02, (4000, 3))
    hits = sum(estimate(list(row)).low > 0 for row in draws)
    assert 0.017 < hits / len(draws) < 0.033
