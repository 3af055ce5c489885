"""Mean and spread over runs."""

import math

import numpy as np
import pandas as pd
import pytest

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation.seeds import summarise_runs


def metrics(values, condition="standard", **changes):
    fixed = {"direction": "t2i", "dataset": "toy", "split": "test", "condition": condition}
    fixed |= {"queries": 10, "skipped": 1, "gallery": 20, "low": None, "high": None, **changes}
    return pd.DataFrame([{**fixed, "metric": name, "value": value} for name, value in values.items()])


def test_three_runs_by_hand(tmp_path):
    runs = [metrics({"rank1": value, "mAP": 0.5}) for value in (0.1, 0.2, 0.6)]
    rows = summarise_runs(runs, "abc").set_index("metric")
    assert rows.loc["rank1", ["runs", "mean", "minimum", "maximum"]].tolist() == pytest.approx([3, 0.3, 0.1, 0.6])
    assert rows.loc["rank1", "std"] == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert rows.loc["mAP", "std"] == 0
    tables.write_table(tmp_path / "seeds.parquet", "seeds", rows.reset_index())


def test_a_single_run_has_no_standard_deviation(tmp_path):
    rows = summarise_runs([metrics({"rank1": 0.4})], ["a"])
    assert rows["std"].tolist() == [None] and rows["mean"].tolist() == [0.4]
    tables.write_table(tmp_path / "seeds.parquet", "seeds", rows)
    assert tables.read_table(tmp_path / "seeds.parquet", "seeds")["std"].isna().all()


def test_it_equals_numpy_and_the_order_of_runs_and_rows_changes_no_bit():
    values = np.random.default_rng(0).random((5, 3))
    runs = [metrics(dict(zip(("rank1", "mAP", "rSum"), row, strict=True))) for row in values]
    rows = summarise_runs(runs, "abcde")
    assert rows["mean"].to_numpy() == pytest.approx(values.mean(0), rel=1e-15)
    assert rows["std"].to_numpy() == pytest.approx(values.std(0, ddof=1), rel=1e-14)
    mixed = summarise_runs([runs[n].iloc[::-1] for n in (3, 0, 4, 1, 2)], "dbeca")
    pd.testing.assert_frame_equal(rows, mixed.iloc[::-1].reset_index(drop=True), check_exact=True)


def test_conditions_are_kept_apart():
    runs = [pd.concat([metrics({"rank1": v}), metrics({"rank1": v / 10}, "chance")]) for v in (0.2, 0.4)]
    rows = summarise_runs(runs, "ab").set_index("condition")
    assert rows.loc["standard", "mean"] == pytest.approx(0.3) and rows.loc["chance", "mean"] == pytest.approx(0.03)


def test_results_that_do_not_match_are_refused_by_name():
    with pytest.raises(DataError, match=r"a has a result that b lacks: t2i toy test standard mAP \(1 such"):
        summarise_runs([metrics({"rank1": 0, "mAP": 0}), metrics({"rank1": 0})], "ab")
    with pytest.raises(DataError, match="b has a result that a lacks"):
        summarise_runs([metrics({"rank1": 0}), metrics({"rank1": 0, "mAP": 0})], "ab")
    with pytest.raises(DataError, match="rank1 has 20 and 21 gallery"):
        summarise_runs([metrics({"rank1": 0}), metrics({"rank1": 0}, gallery=21)], "ab")
    with pytest.raises(DataError, match="b: t2i toy test standard rank1 occurs more than once"):
        summarise_runs([metrics({"rank1": 0}), pd.concat([metrics({"rank1": 0})] * 2)], "ab")
