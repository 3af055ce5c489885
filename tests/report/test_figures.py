"""Figures are written with their data, and fit into a page."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl.report import figures


def metrics():
    rows = [
        {"condition": c, "metric": m, "value": v, "low": v - 0.02, "high": v + 0.02}
        for c, v in (("chance", 0.1), ("standard", 0.6), ("occluded", 0.4), ("oracle", 0.9))
        for m in ("rank1", "mAP")
    ]
    return pd.DataFrame(rows)


def history():
    rows = [
        {"stage": "finetune", "step": e, "epoch": e, "split": s, "name": n, "value": v / (e + 1), "seconds": 0.0}
        for e in range(4)
        for s, n, v in (("train", "loss/sdm", 4.0), ("train", "weight/sdm", 1.0), ("val", "rank1", 0.5))
    ]
    return pd.DataFrame(rows)


def check(paths):
    png, svg, csv = paths
    with Image.open(png) as image:
        assert image.format == "PNG"
    assert "<svg" in svg.read_text()
    return pd.read_csv(csv), svg.read_text()


@pytest.mark.covers(231)
def test_metric_bars_save_their_data_and_label_their_axes(tmp_path):
    data, svg = check(figures.metric_bars(metrics(), tmp_path / "bars"))
    assert data["value"].tolist() == metrics()["value"].tolist()
    for text in ("rank-1", "mAP", "percent of queries (mean), 95 % interval", "model", "chance", "occluded"):
        assert text in svg


@pytest.mark.covers(231)
def test_training_curves_hold_losses_only_and_one_point_per_epoch(tmp_path):
    data, svg = check(figures.training_curves(history(), tmp_path / "losses"))
    assert set(data["name"]) == {"loss/sdm"}
    assert data["value"].tolist() == [4.0, 2.0, pytest.approx(4 / 3), 1.0]
    assert "epoch" in svg and "loss, unweighted" in svg


@pytest.mark.covers(231)
def test_the_validation_curve_marks_the_chosen_epoch(tmp_path):
    data, svg = check(figures.validation_curve(history(), tmp_path / "val", best_epoch=2))
    assert set(data["name"]) == {"rank1"}
    assert "chosen epoch" in svg


@pytest.mark.covers(158, 231)
def test_gate_histograms_save_every_sample_and_means_of_complements_sum_to_one(tmp_path):
    gate = np.random.default_rng(0).beta(5, 3, 100)
    data, svg = check(figures.gate_histograms({"identity": gate, "clothing": 1 - gate}, tmp_path / "gates"))
    assert data["identity"].mean() + data["clothing"].mean() == pytest.approx(1)
    assert "percent of samples" in svg and f"mean {gate.mean():.2f}" in svg


@pytest.mark.covers(231)
def test_equal_data_give_equal_files(tmp_path):
    first = figures.metric_bars(metrics(), tmp_path / "a")
    second = figures.metric_bars(metrics(), tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_score_bars_take_names_values_and_bounds(tmp_path):
    data, _ = check(
        figures.score_bars({"map": (0.5, 0.4, 0.6), "map.random": (0.2, 0.1, 0.3)}, tmp_path / "s", label="x")
    )
    assert data["low"].tolist() == [0.4, 0.1]


def test_conditions_start_with_the_model_and_end_with_the_points_of_reference():
    assert figures.conditions(["chance", "occluded", "oracle", "standard"]) == [
        "standard", "occluded", "oracle", "chance"
    ]  # fmt: skip


def test_a_missing_bound_draws_no_whisker(tmp_path):
    frame = metrics()
    frame["low"] = np.nan
    check(figures.metric_bars(frame, tmp_path / "bars"))


class _Ids(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.used = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                self.used.append(value.removeprefix("#"))
            self.used += re.findall(r"url\(#([^)]*)\)", value or "")


def test_an_inline_figure_has_its_own_ids_the_pages_colours_and_no_addresses(tmp_path):
    _, svg, _ = figures.metric_bars(metrics(), tmp_path / "bars")
    drawn = figures.inline_svg(svg.read_text(), prefix="p1")
    assert "http" not in drawn and "<style" not in drawn and "<?xml" not in drawn
    assert "var(--s1)" in drawn and "var(--ink)" in drawn
    ids = _Ids()
    ids.feed(drawn)
    assert all(name.startswith("p1-") for name in ids.ids)
    assert set(ids.used) <= set(ids.ids)


def test_a_series_name_cannot_close_the_figure(tmp_path):
    frame = metrics()
    frame["condition"] = "</svg><script>alert(1)</script>"
    _, svg, _ = figures.metric_bars(frame.drop_duplicates("metric"), tmp_path / "bars")
    assert "<script" not in figures.inline_svg(svg.read_text(), prefix="p")
