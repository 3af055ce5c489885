"""Paired comparison of two runs: by hand, against slow versions, against scipy, and calibrated on simulated nulls."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation import paired
from reidctl.evaluation.paired import COLUMNS, compare, intervals_over_people, paired_differences
from reidctl.metrics import METRICS, bootstrap_interval, expected_metrics


def queries_of(first, people, *, gallery=50, condition="standard", direction="t2i"):
    """Rows of a `queries` table: query i has one match, at rank first[i] (0: no match)."""
    first = np.asarray(first)
    found = np.flatnonzero(first)
    scores = expected_metrics(found, first[found] - 1, np.ones(len(found), np.int64), queries=len(first))
    return pd.DataFrame(
        {
            "direction": direction,
            "dataset": "toy",
            "condition": condition,
            "query_id": [f"q{row:03d}" for row in range(len(first))],
            "person_id": [f"toy:{person}" for person in people],
            "matches": scores.matches,
            "gallery": gallery,
            "first_match": scores.first_match,
            "average_precision": scores.average_precision,
            "inp": scores.inp,
            **{f"rank{k}": scores.hits[k] for k in (1, 5, 10, 20)},
        }
    )


def random_pair(seed=0, people=30, most=6, gallery=50):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(people), rng.integers(1, most + 1, people))
    return (queries_of(rng.integers(1, gallery, len(owner)), owner) for _ in range(2))


def one(ours, other, person, **options):
    return paired_differences({"x": np.asarray(ours, float)}, {"x": np.asarray(other, float)}, person, **options)["x"]


def by_metric(found):
    return found.differences.set_index("metric")


def test_differences_of_a_hand_worked_pair():
    # Ranks 1, 2, 6 against 2, 2, 11; the last query has no match and counts nowhere.
    found = compare(queries_of([1, 2, 6, 0], "aabb"), queries_of([2, 2, 11, 0], "aabb"), resamples=200)
    rows = by_metric(found)
    assert list(rows.index) == list(METRICS)
    assert rows.loc["rank1", ["value", "other", "difference"]].tolist() == [1 / 3, 0, 1 / 3]
    assert rows.loc["rank5", ["value", "other", "difference"]].tolist() == [2 / 3, 2 / 3, 0]
    assert rows.loc["rank10", ["value", "other", "difference"]].tolist() == [1, 2 / 3, 1 / 3]
    assert rows.loc["mAP", "difference"] == pytest.approx(((1 - 1 / 2) + 0 + (1 / 6 - 1 / 11)) / 3)
    assert rows.loc["mINP", "difference"] == pytest.approx(rows.loc["mAP", "difference"])  # one match each
    assert rows.loc["rSum", ["value", "other"]].tolist() == pytest.approx([2, 4 / 3])
    assert rows.loc["rank1", ["better", "worse", "equal", "queries", "people"]].tolist() == [1, 0, 2, 3, 2]
    # rank1: person b does not differ; mAP: both signs of both people: |+ +| = |- -| is largest, 2 of 4 patterns.
    assert rows.loc["rank1", "p_value"] == 1.0
    assert rows.loc["mAP", "p_value"] == 0.5
    assert rows.loc["rank5", ["low", "high", "p_value"]].tolist() == [0, 0, 1]


def test_all_sign_patterns_of_five_people_by_hand():
    # Σ = 15 is only reached by all five signs alike: 2 of 32.
    assert one([1, 2, 3, 4, 5], [0] * 5, list("abcde"), resamples=10).p_value == 2 / 32
    # 1 + 2 + 3 + 4 - 5 = 5: count by hand with a loop over all patterns.
    gaps = [1, 2, 3, 4, -5]
    hits = sum(abs(np.dot(signs, gaps)) >= 5 for signs in itertools.product((-1, 1), repeat=5))
    assert one(gaps, [0] * 5, list("abcde"), resamples=10).p_value == hits / 32


def test_a_person_s_queries_flip_together():
    # Two people, ten queries each, all better: 2 of 4 patterns, however many queries there are.
    assert one(np.ones(20), np.zeros(20), ["a"] * 10 + ["b"] * 10).p_value == 0.5
    assert one(np.ones(20), np.zeros(20), [str(n) for n in range(20)]).p_value <= 2 / 10_001


def test_identical_runs_differ_by_nothing():
    ours, _ = random_pair()
    rows = by_metric(compare(ours, ours.copy(), resamples=300))
    assert (rows[["difference", "low", "high", "better", "worse"]] == 0).all(axis=None)
    assert (rows["p_value"] == 1).all() and (rows["equal"] == len(ours)).all()


@pytest.mark.parametrize("people", [9, 40], ids=["exact", "monte-carlo"])
def test_the_vectorised_version_equals_slow_loops(people):
    ours, other = random_pair(3, people=people)
    fast = by_metric(compare(ours, other, seed=5, resamples=80))
    columns = {**COLUMNS, "rSum": None}
    names = sorted(set(ours["person_id"]))
    weights = np.random.default_rng(5).multinomial(len(names), [1 / len(names)] * len(names), size=80)
    flips = np.random.default_rng((5, 1)).random((80, len(names))) < 0.5
    for metric, column in columns.items():
        total, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for row in range(len(ours)):
            pair = [
                frame.iloc[row][column] if column else sum(frame.iloc[row][f"rank{k}"] for k in (1, 5, 10))
                for frame in (ours, other)
            ]
            total[ours.iloc[row]["person_id"]] += pair[0] - pair[1]
            count[ours.iloc[row]["person_id"]] += 1
        means = [
            sum(w * total[name] for w, name in zip(draw, names, strict=True))
            / sum(w * count[name] for w, name in zip(draw, names, strict=True))
            for draw in weights
        ]
        observed = abs(sum(total.values()))
        if sum(abs(value) > 1e-12 for value in total.values()) <= paired.EXACT:
            kept = [value for value in total.values() if abs(value) > 1e-12]
            patterns = [np.dot(s, kept) for s in itertools.product((-1, 1), repeat=len(kept))]
            expected = np.mean([abs(value) >= observed - 1e-9 for value in patterns])
        else:
            sums = [sum(-total[n] if f else total[n] for f, n in zip(row, names, strict=True)) for row in flips]
            expected = (1 + sum(abs(value) >= observed - 1e-9 for value in sums)) / 81
        assert fast.loc[metric, "difference"] == pytest.approx(sum(total.values()) / len(ours))
        assert fast.loc[metric, ["low", "high"]].tolist() == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
        assert fast.loc[metric, "p_value"] == pytest.approx(expected)


def test_the_p_value_equals_scipy_s_sign_permutation_test():
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.4, 1, 12)
    exact = stats.permutation_test(
        (gaps,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert one(gaps, np.zeros(12), [str(n) for n in range(12)]).p_value == pytest.approx(exact.pvalue, abs=1e-12)


def test_monte_carlo_is_close_to_all_patterns_and_to_the_t_test(monkeypatch):
    rng = np.random.default_rng(2)
    gaps = rng.normal(0.5, 1, 16)
    exact = one(gaps, np.zeros(16), [str(n) for n in range(16)]).p_value
    monkeypatch.setattr(paired, "EXACT", 0)
    drawn = one(gaps, np.zeros(16), [str(n) for n in range(16)], resamples=20_000).p_value
    assert drawn == pytest.approx(exact, abs=0.01)
    many = rng.normal(0.2, 1, 100)
    drawn = one(many, np.zeros(100), [str(n) for n in range(100)]).p_value
    assert drawn == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def clustered(rng, people, *, shift=0.0):
    """Differences whose person part is as large as their own part; 1 to 12 queries a person."""
    person = np.repeat(np.arange(people), rng.integers(1, 13, people))
    return shift + rng.normal(size=people)[person] + rng.normal(size=len(person)), person.astype(str).astype(object)


def test_under_the_null_five_percent_of_p_values_are_below_five_percent():
    rng = np.random.default_rng(21)
    ours, naive, runs = 0, 0, 800
    for number in range(runs):
        gaps, person = clustered(rng, 24)
        ours += one(gaps, np.zeros(len(gaps)), person, seed=number, resamples=199).p_value <= 0.05
        naive += stats.ttest_1samp(gaps, 0).pvalue <= 0.05
    # Standard error 0.8 %. A test over queries, as if they were independent, is wrong more than four times as often.
    assert 0.035 <= ours / runs <= 0.065
    assert naive / runs > 0.2


def test_with_few_people_the_exact_p_value_is_valid_too():
    rng = np.random.default_rng(12)
    hits = [one(*(lambda g, p: (g, np.zeros(len(g)), p))(*clustered(rng, 9)), resamples=9).p_value for _ in range(800)]
    assert 0.035 <= np.mean(np.asarray(hits) <= 0.05) <= 0.065


def test_the_interval_covers_the_true_difference():
    rng = np.random.default_rng(13)
    covered = {12: 0, 60: 0}
    for people in covered:
        for number in range(500):
            gaps, person = clustered(rng, people, shift=0.7)
            found = one(gaps, np.zeros(len(gaps)), person, seed=number, resamples=300)
            covered[people] += found.low <= 0.7 <= found.high
    # Nominal 95 %; the percentile interval is known to be too narrow with few people, and this says by how much.
    assert 0.92 <= covered[60] / 500 <= 0.97
    assert 0.84 <= covered[12] / 500 <= 0.95


def test_the_order_of_rows_changes_no_bit():
    ours, other = random_pair(7)
    shuffled = [frame.sample(frac=1, random_state=seed) for seed, frame in enumerate((ours, other))]
    first, second = compare(ours, other, resamples=200), compare(*shuffled, resamples=200)
    pd.testing.assert_frame_equal(first.differences, second.differences, check_exact=True)
    pd.testing.assert_frame_equal(first.paired, second.paired, check_exact=True)


def test_the_block_size_changes_no_bit(monkeypatch):
    ours, other = random_pair(8)
    first = compare(ours, other, resamples=200).differences
    monkeypatch.setattr(paired, "_CELLS", 90)
    pd.testing.assert_frame_equal(first, compare(ours, other, resamples=200).differences, check_exact=True)


def test_exchanged_runs_give_the_opposite():
    ours, other = random_pair(9)
    one_way, back = (by_metric(compare(*pair, resamples=400)) for pair in ((ours, other), (other, ours)))
    assert one_way["difference"].tolist() == (-back["difference"]).tolist()
    assert one_way["p_value"].tolist() == back["p_value"].tolist()
    assert one_way["low"].to_numpy() == pytest.approx(-back["high"].to_numpy())
    assert (one_way["better"] == back["worse"]).all()


def test_joint_intervals_equal_bootstrap_interval_bit_for_bit():
    ours, _ = random_pair(4)
    values = {metric: ours[column].to_numpy() for metric, column in COLUMNS.items()}
    found = intervals_over_people(values, ours["person_id"].to_numpy(), seed=3, resamples=150)
    for metric, value in values.items():
        assert found[metric] == bootstrap_interval(value, ours["person_id"].to_numpy(), seed=3, resamples=150)


def test_paired_rows_fit_their_table_and_hold_every_query(tmp_path):
    found = compare(queries_of([1, 2, 0], "abc"), queries_of([3, 2, 0], "abc"), resamples=10)
    tables.write_table(tmp_path / "paired.parquet", "paired", found.paired)
    read = tables.read_table(tmp_path / "paired.parquet", "paired")
    assert read["rank1_difference"].tolist()[:2] == [1.0, 0.0] and np.isnan(read["rank1_difference"][2])


def test_conditions_and_directions_are_compared_apart_and_the_others_named():
    ours = pd.concat([queries_of([1, 1], "ab"), queries_of([1, 4], "ab", direction="i2i")])
    other = pd.concat([queries_of([1, 2], "ab"), queries_of([1, 1], "ab", condition="cloth-changing")])
    found = compare(ours, other, resamples=10)
    assert set(zip(found.differences["direction"], found.differences["condition"], strict=True)) == {
        ("t2i", "standard")
    }
    assert found.left_out == ("i2i toy standard", "t2i toy cloth-changing")


def refused(ours, other, *words):
    with pytest.raises(DataError) as error:
        compare(ours, other, resamples=10)
    for word in words:
        assert word in str(error.value)


def test_other_queries_people_galleries_and_conditions_are_refused_by_name():
    ours = queries_of([1, 2, 3], "abc")
    refused(ours, queries_of([1, 2], "ab"), "not the same queries", "1 are only here", "0 only in", "q002")
    refused(ours, ours.assign(person_id=["toy:a", "toy:x", "toy:c"]), "not the same people", "q001", "toy:x there")
    refused(ours, ours.assign(gallery=[50, 50, 49]), "not the same gallery or protocol", "q002", "gallery 50 here")
    refused(ours, ours.assign(matches=2), "not the same gallery or protocol", "3 of 3")
    refused(ours, ours.assign(condition="same-clothes"), "t2i toy standard here", "t2i toy same-clothes there")
    refused(ours, ours.iloc[:0], "t2i toy standard here, nothing there")
    refused(pd.concat([ours, ours.iloc[:1]]), ours, "q000", "more than once")
    refused(queries_of([0, 0], "ab"), queries_of([0, 0], "ab"), "nothing to compare")
    refused(ours.assign(rank20=np.nan), ours, "no rank20")


def test_rank_k_beyond_a_small_gallery_is_left_out():
    ours, other = (
        queries_of(ranks, "ab", gallery=8).assign(rank10=np.nan, rank20=np.nan) for ranks in ([1, 2], [3, 2])
    )
    assert list(by_metric(compare(ours, other, resamples=10)).index) == ["rank1", "rank5", "mAP", "mINP"]
