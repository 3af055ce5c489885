"""Distances within and between people."""

import math
from itertools import combinations

import numpy as np
import pytest

from reidctl.evaluation import compactness as compact


def slowly(features, person, camera=None):
    """intra and inter of the definition, pair by pair."""
    unit = [row / np.linalg.norm(row) for row in np.asarray(features, float)]
    people = sorted(set(person))
    rows = {name: [row for row, other in enumerate(person) if other == name] for name in people}

    def apart(i, j):
        return 1 - float(unit[i] @ unit[j])

    def other_camera(i, j):
        return camera is None or camera[i] is None or camera[j] is None or camera[i] != camera[j]

    within = []
    for name in people:
        found = [apart(i, j) for i, j in combinations(rows[name], 2) if other_camera(i, j)]
        within += [np.mean(found)] if found else []
    between = [np.mean([apart(i, j) for i in rows[p] for j in rows[q]]) for p, q in combinations(people, 2)]
    return float(np.mean(within)), float(np.mean(between))


def planted(people, angle):
    """People along their own axes, each with two images at an angle of +-`angle` in a plane of their own."""
    rows, names = [], []
    for number in range(people):
        for side in (-1, 1):
            row = np.zeros(2 * people)
            row[2 * number], row[2 * number + 1] = math.cos(angle), side * math.sin(angle)
            rows.append(row)
            names.append(f"p{number}")
    return np.array(rows), np.array(names, dtype=object)


def noisy(seed=0, people=15):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 7, people)
    person = np.repeat([f"p{number:02d}" for number in range(people)], size).astype(object)
    features = np.repeat(rng.normal(size=(people, 8)), size, axis=0) + rng.normal(size=(len(person), 8))
    camera = rng.choice(np.array(["a", "b", "c", None], dtype=object), len(person))
    return features, person, camera


@pytest.mark.covers(219)
@pytest.mark.parametrize("angle", [0.0, 0.2, math.pi / 6, math.pi / 4])
def test_planted_clusters_give_the_known_ratio(angle):
    # Two images of a person are 2 angle apart; strangers are at right angles.
    features, person = planted(7, angle)
    found = compact.compactness(compact.spread(3.7 * features, person))
    expected = 1 - math.cos(2 * angle)
    assert found.intra.value == pytest.approx(expected, abs=1e-12) and found.inter.value == pytest.approx(1)
    assert found.ratio.value == pytest.approx(expected, abs=1e-12)
    for entry in (found.intra, found.inter, found.ratio):  # all people are alike, so no resample differs
        assert entry.low == pytest.approx(entry.value, abs=1e-9) and entry.high == pytest.approx(entry.value, abs=1e-9)


@pytest.mark.covers(219)
@pytest.mark.parametrize("cameras", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_are_those_of_a_loop_over_all_pairs(seed, cameras):
    features, person, camera = noisy(seed)
    camera = camera if cameras else None
    found = compact.compactness(compact.spread(features, person, camera), resamples=50)
    intra, inter = slowly(features, person, camera)
    assert found.intra.value == pytest.approx(intra) and found.inter.value == pytest.approx(inter)
    assert found.ratio.value == pytest.approx(intra / inter)
    assert 0 <= found.ratio.low <= found.ratio.value <= found.ratio.high


def test_a_resample_is_the_loop_over_the_people_who_were_drawn():
    features, person, _ = noisy(2, people=6)
    given = compact.spread(features, person)
    weight = np.array([[2.0, 0, 1, 1, 0, 2]])
    found = compact._distances(given, weight)[0]
    each = {name: given.intra[place] for place, name in enumerate(sorted(set(person)))}
    drawn = ["p00", "p00", "p02", "p03", "p05", "p05"]
    within = [each[name] for name in drawn if not math.isnan(each[name])]
    apart = []
    for one, other in combinations(drawn, 2):
        if one != other:  # somebody who is drawn twice is no stranger to himself
            both = np.isin(person, [one, other])
            apart.append(slowly(np.vstack([features[both]] * 1), person[both])[1])
    assert found == pytest.approx([np.mean(within), np.mean(apart)])


def test_images_under_one_camera_are_no_pair_and_an_unknown_camera_is_another_one():
    features, person = planted(3, 0.3)
    same = np.array(["a"] * 6, dtype=object)
    assert compact.spread(features, person, same) is None
    same[0] = None
    given = compact.spread(features, person, same)
    assert given.pairs == 1 and list(np.isnan(given.intra)) == [False, True, True]
    assert compact.compactness(given).intra.value == pytest.approx(1 - math.cos(0.6))


def test_one_person_or_single_images_have_no_numbers():
    features, person = planted(3, 0.3)
    assert compact.spread(features[:2], person[:2]) is None
    assert compact.spread(features[::2], person[::2]) is None


def test_equal_features_have_distances_of_zero_and_no_ratio():
    person = np.array(["a", "a", "b", "b"], dtype=object)
    found = compact.compactness(compact.spread(np.ones((4, 3)), person), resamples=20)
    assert found.intra.value == pytest.approx(0, abs=1e-12) and found.inter.value == pytest.approx(0, abs=1e-12)
    assert math.isnan(found.ratio.value)


@pytest.mark.covers(217, 219)
def test_a_difference_of_two_models_is_paired_over_the_same_people():
    features, person, _ = noisy(1, people=40)
    centre = np.stack([features[person == name].mean(axis=0) for name in person])
    tight, loose = compact.spread(features + 1.0 * centre, person), compact.spread(features, person)
    found = compact.ratio_difference(tight, loose)
    ratios = [compact.compactness(side).ratio for side in (tight, loose)]
    assert found.value == pytest.approx(ratios[0].value - ratios[1].value) and found.high < 0
    # The same people are drawn for both, so what both share is not in the interval.
    assert found.high - found.low < (ratios[0].high - ratios[0].low) + (ratios[1].high - ratios[1].low)
    nothing = compact.ratio_difference(loose, loose)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_an_interval_holds_the_number_of_the_whole_population_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(2000, 6))
    width = rng.uniform(0.1, 1.2, 2000)
    features = np.repeat(centres, 3, axis=0) + np.repeat(width, 3)[:, None] * rng.normal(size=(6000, 6))
    person = np.repeat([f"p{n:04d}" for n in range(2000)], 3).astype(object)
    truth = compact.compactness(compact.spread(features, person), resamples=1).ratio.value
    hits = 0
    for trial in range(60):
        some = np.random.default_rng(trial).choice(2000, 60, replace=False)
        rows = np.repeat(3 * some, 3) + np.tile(np.arange(3), 60)
        ratio = compact.compactness(compact.spread(features[rows], person[rows]), resamples=300, seed=trial).ratio
        hits += ratio.low <= truth <= ratio.high
    assert hits >= 51


def test_four_thousand_images_need_no_matrix_of_all_pairs():
    import tracemalloc

    rng = np.random.default_rng(0)
    features, person = (
        rng.normal(size=(4000, 64)).astype(np.float32),
        np.array([f"p{n // 4}" for n in range(4000)], object),
    )
    tracemalloc.start()
    compact.compactness(compact.spread(features, person))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * 4000 * 8 * 0.9
