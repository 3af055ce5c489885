"""Tables of numbers beside others, of analyses and of recipes."""

import pandas as pd
import pytest
import yaml

from reidctl.report import analyses, beside
from reidctl.report.grids import NOTHING, Entry
from reidctl.report.recipe import as_yaml

NAN = float("nan")


def spoilt(setting, value, drop=(NAN, NAN, NAN, NAN), **more):
    names = ("drop", "drop_low", "drop_high", "p_value")
    common = {"model": "model", "direction": "t2i", "dataset": "d", "split": "test", "reference": "standard"}
    return {
        **common, "setting": setting, "seed": 0, "metric": "rank1", "value": value, "low": NAN, "high": NAN,
        "queries": 1200, "ceiling": 0.9, "level": NAN, **dict(zip(names, drop, strict=True)), **more,
    }  # fmt: skip


def test_a_setting_shows_its_drop_and_whether_it_may_be_chance():
    rows = [spoilt("standard", 0.5), spoilt("typos", 0.4, (0.1, 0.05, 0.15, 0.01), level=0.2)]
    rows += [spoilt("blank", 0.49, (0.01, -0.01, 0.03, 0.4)), spoilt("clothes-conflict", 0.4, seed=-1)]
    rows += [spoilt("typos", 0.3, model="control")]
    (grid,) = beside.robustness_grids(pd.DataFrame(rows))
    assert grid.columns == ("rank-1", "drop of rank-1", "ceiling of rank-1", "queries")
    names = ["standard", "typos, level 0.2", "blank", "clothes-conflict, mean over seeds", "control: typos"]
    assert [line.name for line in grid.lines] == names
    assert [line.strong for line in grid.lines] == [True, False, False, False, False]
    assert grid.lines[0].entries[1] == NOTHING
    assert grid.lines[1].entries[1] == Entry("+10.0", ("+5.0 to +15.0", "p 0.010", "not chance"))
    assert grid.lines[2].entries[1].below[-1] == "may be chance"
    assert grid.lines[1].entries[2:] == (Entry("90.0"), Entry("1,200"))


def test_the_difference_of_drops_is_told_apart_from_nothing_or_not():
    keys = {"direction": "t2i", "dataset": "d", "setting": "typos", "reference": "standard", "seed": -1}
    grid = beside.control_grid([{**keys, "values": {"rank1": [0.02, -0.01, 0.05, 0.2]}}])
    assert grid.lines[0].name == "d, text to image, typos, mean over seeds"
    assert grid.lines[0].entries == (Entry("+2.0", ("−1.0 to +5.0", "p 0.200", "may be chance")),)
    assert beside.control_grid([]) is None


def test_a_matrix_shows_reasons_where_there_are_no_numbers():
    home = {"value": 0.5, "low": 0.4, "high": 0.6, "relation": "same", "drop": None}
    away = {"value": 0.2, "low": None, "high": None, "relation": "cross", "drop": 0.3}
    rows = [{"model": "a", "cells": [home, {"reason": "No captions."}]}, {"model": "b", "cells": [away, home]}]
    table = {"direction": "i2i", "metric": "mAP", "columns": ["x", "y"], "rows": rows}
    (grid,) = beside.matrix_grids({"tables": [table]})
    assert grid.lines[0].entries == (Entry("50.0", ("40.0 to 60.0", "trained there")), Entry("–", ("No captions.",)))
    assert grid.lines[1].entries[0] == Entry("20.0", ("30.0 below the model trained there",))


def test_epochs_seeds_and_differences_have_their_numbers():
    chosen = {"epoch": 3, "value": 0.5, "low": 0.4, "high": 0.6}
    gap = {"value": 0.1, "low": 0.0, "high": 0.2}
    row = {"direction": "t2i", "dataset": "d", "metric": "rank1", "selected": None, "best": chosen, "gap": None}
    grid = beside.epochs_grid({"split": "test", "rows": [row, {**row, "selected": chosen, "gap": gap}]})
    assert grid.lines[0].entries == (NOTHING, Entry("50.0", ("40.0 to 60.0", "epoch 3")), NOTHING)
    assert grid.lines[1].entries[2].text == "+10.0"
    assert beside.epochs_grid({}) is None
    where = {"direction": "t2i", "dataset": "d", "condition": "standard"}
    rows = [{**where, "run": "/a", "seed": 1, "rank1": 0.5}, {**where, "run": "std", "seed": None, "rank1": None}]
    (grid,) = beside.seed_grids({"rows": rows})
    assert [(line.name, line.entries[0].text) for line in grid.lines] == [
        ("seed 1", "50.0"),
        ("standard deviation", "–"),
    ]
    pair = {**where, "split": "test", "metric": "mAP", "value": 0.5, "other": 0.4, "difference": 0.1, "low": 0.05}
    frame = pd.DataFrame([{**pair, "high": 0.15, "p_value": 0.01, "better": 5, "worse": 1, "equal": 4}])
    (grid,) = beside.difference_grids(frame)
    assert [entry.text for entry in grid.lines[0].entries] == ["50.0", "40.0", "+10.0", "5 / 1 / 4"]
    assert grid.lines[0].entries[2].below[-1] == "not chance"


def measured(analysis, feature, target, metric, value, **more):
    common = {"low": NAN, "high": NAN, "control": NAN, "chance": NAN, "p_value": NAN, "items": 9, "people": 3}
    return {
        "analysis": analysis, "feature": feature, "target": target, "metric": metric, "value": value, **common, **more
    }  # fmt: skip


@pytest.mark.covers(159)
def test_analyses_stand_beside_their_control_and_chance():
    rows = [
        measured("compactness", "identity", "", "ratio", 0.25, chance=1.0),
        measured("gates", "identity", "", "mean", 0.6),
        measured("probes", "identity", "hat", "accuracy", 0.7, control=0.2, chance=0.1),
        measured("probes", "clothing", "hat", "accuracy", 0.5, low=0.4, high=0.6),
        measured("tsne", "identity", "person", "silhouette", 0.2, control=0.01),
        measured("efficiency", "image", "", "parameters", 123456.0),
    ]
    parts = {part.name: part.grids for part in analyses.analysis_parts(pd.DataFrame(rows))}
    assert list(parts) == ["Probes", "Compactness", "Groups", "Efficiency"]  # the gates have a section of their own
    (probes,) = parts["Probes"]
    assert probes.columns == ("identity", "clothing") and probes.lines[0].name == "hat"
    assert probes.lines[0].entries == (Entry("70.0", ("control 20.0", "chance 10.0")), Entry("50.0", ("40.0 to 60.0",)))
    assert parts["Groups"][0].lines[0].entries == (Entry("0.200", ("control 0.010",)),)
    assert parts["Compactness"][0].lines[0].entries == (Entry("0.250", ("chance 1.000",)),)
    assert parts["Efficiency"][0].lines[0].entries == (Entry("123,456"),)


@pytest.mark.parametrize(
    ("value", "low", "text"), [(4.0, NAN, "4"), (1.0, 0.9, "1.000"), (0.5, NAN, "0.500"), (12.34, NAN, "12.3")]
)
def test_counts_have_no_digits_after_the_point(value, low, text):
    rows = pd.DataFrame([measured("words", "against.i2i", "", "distinct", value, low=low, high=value)])
    line = analyses.analysis_parts(rows)[0].grids[0].lines[0]
    assert (line.name, line.entries[0].text) == ("other model: i2i", text)


def test_a_recipe_reads_back_as_what_it_was_and_keeps_its_order():
    settings = {
        "seed": 3,
        "method": {"name": "a: b", "rate": 1e-5, "parts": ["größe", None]},
        "a": {"long": "x " * 200},
    }
    text = as_yaml(settings)
    assert yaml.safe_load(text) == settings
    assert text.index("seed") < text.index("method") < text.index("\na:") and "größe" in text


def test_notes_are_told_once():
    assert beside.unique(["b", "a", "b"]) == ["b", "a"]
