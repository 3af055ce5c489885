import itertools
import math

import numpy as np
import pytest

from reidctl.metrics import METRICS, bootstrap_interval, chance, distinct_query_ceiling, expected_metrics, summarise


def metrics_of_order(match):
    """AP, INP, first rank and hits of one definite order, straight from the definitions."""
    places = [place for place, hit in enumerate(match, 1) if hit]
    precision = [(i + 1) / place for i, place in enumerate(places)]
    hits = {f"rank{k}": float(places[0] <= k) for k in (1, 5, 10, 20)}
    return {
        "mAP": sum(precision) / len(places),
        "mINP": len(places) / places[-1],
        "first": places[0],
        **hits,
        "rSum": hits["rank1"] + hits["rank5"] + hits["rank10"],
    }


def places_of_positives(scores, match):
    positive = scores[match]
    before = (scores[None, :] > positive[:, None]).sum(1)
    tied = (scores[None, :] == positive[:, None]).sum(1)
    return np.zeros(len(positive), np.int64), before, tied


@pytest.mark.covers(29)
@pytest.mark.parametrize("seed", range(25))
def test_expectation_over_ties_equals_the_mean_over_all_permutations(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 8))
    scores = rng.integers(0, rng.integers(1, 5), size).astype(float)
    match = rng.random(size) < 0.5
    match[rng.integers(size)] = True
    orders = []
    for order in itertools.permutations(range(size)):
        if all(scores[order[i]] >= scores[order[i + 1]] for i in range(size - 1)):
            orders.append(metrics_of_order(match[list(order)]))
    found = expected_metrics(*places_of_positives(scores, match), queries=1)
    for metric in METRICS:
        assert found.values(metric)[0] == pytest.approx(np.mean([o[metric] for o in orders]), abs=1e-12)
    assert found.first_match[0] == pytest.approx(np.mean([o["first"] for o in orders]))


@pytest.mark.covers(28)
def test_inverse_negative_penalty_by_hand():
    # Positives at ranks 1 and 4: AP = (1/1 + 2/4) / 2, INP = 2 / 4.
    found = expected_metrics(np.array([0, 0]), np.array([0, 3]), np.array([1, 1]), queries=1)
    assert found.inp[0] == 0.5
    assert found.average_precision[0] == 0.75
    assert found.first_match[0] == 1.0


def test_queries_without_a_match_are_skipped_and_counted():
    found = expected_metrics(np.array([1]), np.array([1]), np.array([1]), queries=3)
    assert (found.scored, found.skipped) == (1, 2)
    assert np.isnan(found.average_precision[[0, 2]]).all()
    assert found.means()["mAP"] == 0.5


def test_means_without_a_scored_query_are_nan():
    none = np.zeros(0, np.int64)
    found = expected_metrics(none, none, none, queries=2)
    assert all(math.isnan(value) for value in found.means().values())


def test_chance_of_one_match_in_ten():
    found = chance([1], 10).means()
    assert found["rank1"] == pytest.approx(0.1)
    assert found["rank5"] == pytest.approx(0.5)
    assert found["rank10"] == pytest.approx(1.0)
    assert found["mAP"] == pytest.approx(sum(1 / k for k in range(1, 11)) / 10)  # AP = 1 / rank


@pytest.mark.covers(29)
def test_chance_agrees_with_simulated_random_rankings():
    rng = np.random.default_rng(0)
    match = np.arange(60) < 7
    drawn = [metrics_of_order(rng.permutation(match)) for _ in range(4000)]
    found = chance([7], 60).means()
    for metric in METRICS:
        values = [d[metric] for d in drawn]
        assert abs(found[metric] - np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def test_chance_with_many_matches_stays_finite_and_exact_at_the_edge():
    assert chance([50_000], 50_000).means() == {m: pytest.approx(3.0 if m == "rSum" else 1.0) for m in METRICS}
    assert 0 < chance([1000], 1_000_000).means()["mINP"] < 0.01


@pytest.mark.covers(40)
def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    # People differ (Beta), queries of one person share the person's rate: the intervals must see people, not queries.
    rng = np.random.default_rng(1)
    covered, narrow = 0, 0
    trials, people, each = 400, 80, 6
    person = np.repeat([f"p{i}" for i in range(people)], each)
    for trial in range(trials):
        rate = rng.beta(1.4, 0.6, people)  # mean 0.7
        values = (rng.random(people * each) < np.repeat(rate, each)).astype(float)
        interval = bootstrap_interval(values, person, seed=trial, resamples=300)
        covered += interval.low <= 0.7 <= interval.high
        half = 1.96 * math.sqrt(0.21 / len(values))
        narrow += abs(values.mean() - 0.7) <= half
    assert 0.91 <= covered / trials <= 0.98
    assert narrow / trials < 0.85  # resampling queries would have promised too much


def test_bootstrap_does_not_depend_on_the_order_of_queries_and_is_seeded():
    rng = np.random.default_rng(2)
    values = rng.random(200)
    person = np.array([f"p{i}" for i in rng.integers(0, 30, 200)])
    shuffled = rng.permutation(200)
    first = bootstrap_interval(values, person, seed=3)
    assert bootstrap_interval(values[shuffled], person[shuffled], seed=3) == first
    assert bootstrap_interval(values, person, seed=4) != first


def test_bootstrap_leaves_skipped_queries_out():
    values = np.array([1.0, math.nan, 0.0])
    assert bootstrap_interval(values, np.array(["a", "b", "c"])).value == 0.5


def test_summary_of_a_perfect_model_is_one_everywhere():
    found = summarise(
        expected_metrics(np.arange(4), np.zeros(4, int), np.ones(4, int), queries=4), ["a", "a", "b", "c"]
    )
    perfect = {name: 3.0 if name == "rSum" else 1.0 for name in METRICS}
    assert {name: (i.value, i.low, i.high) for name, i in found.items()} == {m: (v, v, v) for m, v in perfect.items()}


@pytest.mark.covers(34)
def test_ceiling_of_four_texts_over_twenty_people_is_one_fifth():
    texts = [f"text {i % 4}" for i in range(20)]
    people = [f"p{i}" for i in range(20)]
    assert distinct_query_ceiling(texts, people) == pytest.approx(4 / 20)


def test_ceiling_counts_the_most_frequent_person_of_each_text():
    assert distinct_query_ceiling(["x", "x", "x", "y"], ["a", "a", "b", "b"]) == pytest.approx(3 / 4)
