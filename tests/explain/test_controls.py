"""Which patches are removed: equal numbers, by whatever they are chosen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidctl.errors import UsageError
from reidctl.explain.controls import (
    CONTROLS,
    GIVEN,
    Plan,
    control_patches,
    order_control,
    order_pairs,
    order_patches,
    pair_seed,
    patch_count,
    pick_donors,
    plan_keys,
    shift_maps,
    top_patches,
)

GRID = (6, 4)
N = 24


def maps(rows, seed=0):
    return np.random.default_rng(seed).random((rows, N)).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def connected(chosen, grid):
    """Whether the chosen patches hang together through sides, by flooding from one of them."""
    left = {divmod(int(n), grid[1]) for n in np.flatnonzero(chosen)}
    queue = [left.pop()]
    while queue:
        y, x = queue.pop()
        for beside in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if beside in left:
                left.remove(beside)
                queue.append(beside)
    return not left


def test_the_count_is_rounded_half_up_and_never_zero():
    assert [patch_count(fraction, 10) for fraction in (0.01, 0.14, 0.15, 0.25, 1.0)] == [1, 1, 2, 3, 10]
    assert patch_count(0.145, 100) == 15  # 0.145 * 100 is 14.499999999999998
    assert [patch_count(fraction, 192) for fraction in (0.05, 0.1, 0.2, 0.3, 0.5)] == [10, 19, 38, 58, 96]


def test_the_highest_patches_are_taken():
    relevance = np.array([[0.1, 0.9, 0.3, 0.8]], np.float32)
    assert top_patches(relevance, 2, rng()).tolist() == [[False, True, False, True]]
    assert order_patches(relevance, rng()).tolist() == [[3, 0, 2, 1]]


def test_ties_are_broken_at_random_with_equal_chances():
    relevance = np.tile(np.array([1, 0.5, 0.5, 0.5, 0], np.float32), (6000, 1))
    taken = top_patches(relevance, 2, rng()).mean(axis=0)
    assert taken[0] == 1 and taken[4] == 0
    # Binomial with p = 1/3: standard error 0.0061.
    assert taken[1:4] == pytest.approx(1 / 3, abs=4 * 0.0061)


@pytest.mark.covers(184)
@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, N), seed=st.integers(0, 99))
def test_every_control_removes_as_many_patches_as_the_map(name, count, seed):
    relevance = maps(5, seed).round(1)  # with ties
    chosen = control_patches(name, relevance, GRID, count, rng=rng(seed), other=maps(5, seed + 1).round(1))
    assert chosen.sum(axis=1).tolist() == top_patches(relevance, count, rng()).sum(axis=1).tolist() == [count] * 5


@pytest.mark.parametrize("count", [1, 2, 5, 12, 24])
def test_a_block_hangs_together_and_comes_in_many_shapes(count):
    chosen = control_patches("block", maps(60), GRID, count, rng=rng())
    assert all(connected(row, GRID) for row in chosen)
    assert len(np.unique(chosen, axis=0)) >= (1 if count == 24 else 15)


def test_a_block_is_more_compact_than_random_patches():
    def sides(chosen):
        grid = chosen.reshape(-1, 24, 8)
        return (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()

    relevance = np.zeros((50, 192), np.float32)
    block, random = (control_patches(name, relevance, (24, 8), 38, rng=rng()) for name in ("block", "random"))
    assert sides(block) > 3 * sides(random)


def test_random_patches_are_taken_with_equal_chances_whatever_the_map_says():
    share = control_patches("random", maps(8000), GRID, 6, rng=rng(1)).mean(axis=0)
    # Binomial with p = 1/4: standard error 0.0048.
    assert share == pytest.approx(0.25, abs=4.5 * 0.0048)


def test_the_centre_control_takes_the_middle():
    chosen = control_patches("centre", maps(1), GRID, 4, rng=rng())[0].reshape(GRID)
    assert np.argwhere(chosen).tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]


def test_the_least_control_takes_what_the_map_leaves():
    relevance = maps(3)
    top = top_patches(relevance, 10, rng())
    assert (control_patches("least", relevance, GRID, 14, rng=rng()) == ~top).all()


@pytest.mark.covers(191)
def test_a_shifted_map_has_the_same_values_in_the_same_arrangement_elsewhere():
    relevance = maps(400)
    moved = shift_maps(relevance, GRID, rng())
    assert (np.sort(moved, axis=1) == np.sort(relevance, axis=1)).all()  # so any entropy of it is the same
    assert (moved != relevance).any(axis=1).all()
    steps = set()
    for before, after in zip(relevance.reshape(-1, *GRID), moved.reshape(-1, *GRID), strict=True):
        y, x = np.argwhere(after == before[0, 0])[0].tolist()
        assert (np.roll(before, (y, x), axis=(0, 1)) == after).all()
        steps.add((y, x))
    assert len(steps) == N - 1  # every translation but the one by zero


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_given_maps_are_taken_and_missing_ones_take_nothing(name):
    other = maps(3, 5)
    other[1, 7] = np.nan
    chosen = control_patches(name, maps(3), GRID, 5, rng=rng(), other=other)
    assert not chosen[1].any()
    assert (chosen[[0, 2]] == top_patches(other[[0, 2]], 5, rng())).all()
    with pytest.raises(UsageError, match=name):
        control_patches(name, maps(3), GRID, 5, rng=rng())


@pytest.mark.parametrize("name", CONTROLS)
def test_choices_of_one_order_are_nested(name):
    place = order_control(name, maps(2), GRID, rng=rng(), other=maps(2, 3))
    assert (np.sort(place, axis=1) == np.arange(N)).all()


def test_unknown_names_and_impossible_plans_are_refused():
    with pytest.raises(UsageError, match="middle"):
        order_control("middle", maps(1), GRID, rng=rng())
    with pytest.raises(UsageError, match="middle"):
        Plan(controls=("middle",))
    with pytest.raises(UsageError, match="fractions"):
        Plan(fractions=(0.1, 1.5))
    with pytest.raises(UsageError, match="draws"):
        Plan(draws=9)
    with pytest.raises(UsageError, match="one patch"):
        shift_maps(np.ones((1, 1), np.float32), (1, 1), rng())


def of_pairs(rows, explainers=("a", "b"), controls=CONTROLS):
    every = {name: maps(4, seed) for seed, name in enumerate("ab")}
    given_ = {(name, control): maps(4, 9) for name in "ab" for control in ("phrase", "query")}
    given_["", "pooled"] = maps(4, 10)
    rows = np.array(rows)
    seeds = [pair_seed(f"q{row}", f"i{row}") for row in rows]
    plan = Plan(controls=controls)
    return order_pairs(plan, rows, seeds, {name: every[name] for name in explainers}, given_, GRID)


def test_what_a_pair_is_masked_with_depends_on_its_names_alone():
    whole = of_pairs([0, 1, 2, 3])
    assert (of_pairs([2, 0]).place == whole.place[[2, 0]]).all()
    fewer = of_pairs([2], explainers=("b",), controls=("shifted", "random"))
    for key, slot in fewer.slots().items():
        assert (fewer.place[0, slot] == whole.place[2, whole.slots()[key]]).all()
    assert not (whole.place[0, whole.slots()["", "random"]] == whole.place[1, whole.slots()["", "random"]]).all()


def test_controls_without_an_explainer_come_once():
    plan = Plan(draws=10, placements=3)
    keys = plan_keys(plan, ["a", "b"], {("a", "phrase"): maps(1)})
    assert {key: keys.count(key) for key in keys} == {
        ("", "random"): 10,
        ("", "block"): 3,
        ("", "centre"): 1,
        **{(name, control): 1 for name in "ab" for control in ("", "least")},
        **{(name, "shifted"): 3 for name in "ab"},
        ("a", "phrase"): 1,  # b has no such map
    }


def test_a_donor_is_an_image_of_somebody_else():
    people = ["x", "x", "y", "z"]
    rows = np.tile(np.arange(4), 50)
    donors = pick_donors(people, rows)
    assert all(people[donor] != people[row] for donor, row in zip(donors, rows, strict=True))
    assert (donors[:4] == donors[4:8]).all()
    with pytest.raises(UsageError, match="swap"):
        pick_donors(["x", "x"], np.array([0]))
