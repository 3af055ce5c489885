"""The figures of studies: their data, and labels that do not run into each other."""

import itertools
import math

import pandas as pd
import pytest
from matplotlib.figure import Figure

from reidctl.report import study_figures
from reidctl.report.study_figures import Panel, study_bars, study_curve

LONG = "clothing read from the identity stream, beyond exchanged labels, percent"


@pytest.fixture
def drawn(monkeypatch):
    """The figure that is saved, as it was drawn."""
    kept = []
    save = study_figures.save_figure
    monkeypatch.setattr(
        study_figures, "save_figure", lambda figure, *rest: (kept.append(figure), save(figure, *rest))[1]
    )
    return kept


@pytest.mark.covers(231)
def test_the_csv_holds_every_seed_of_every_condition_and_measure(tmp_path):
    panels = [Panel("mAP", [[1.0, 2.0], [3.0, 4.0]]), Panel("rank-1", [[5.0, 6.0], [7.0, math.nan]])]
    paths = study_bars(["a", "$b$"], panels, tmp_path / "figure")
    assert [path.suffix for path in paths] == [".png", ".svg", ".csv"]
    frame = pd.read_csv(tmp_path / "figure.csv")
    assert len(frame) == 8
    assert frame.query("measure == 'mAP' and condition == '$b$' and seed == 1")["value"].item() == 4.0


def test_a_curve_has_the_place_of_every_value_beside_it_whatever_the_order(tmp_path):
    study_curve(["late", "early"], [1.0, 0.0], [Panel("mAP", [[1.0], [2.0]])], tmp_path / "figure", axis="share")
    frame = pd.read_csv(tmp_path / "figure.csv")
    assert dict(zip(frame["condition"], frame["x"], strict=True)) == {"late": 1.0, "early": 0.0}


def test_bars_are_means_without_what_was_not_measured(tmp_path, drawn):
    study_bars(["a", "b"], [Panel("mAP", [[1.0, 3.0, math.nan], [math.nan]])], tmp_path / "figure")
    widths = [bar.get_width() for bar in drawn[0].axes[0].patches]
    assert widths[0] == 2.0 and math.isnan(widths[1])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_titles_of_neighbouring_panels_do_not_touch(tmp_path, drawn, count):
    study_bars([LONG, "b"], [Panel(LONG, [[1.0], [2.0]])] * count, tmp_path / "figure")
    figure: Figure = drawn[0]
    figure.draw_without_rendering()
    boxes = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1


def test_equal_data_give_equal_files(tmp_path):
    for name in ("one", "two"):
        study_bars(["a"], [Panel("mAP", [[1.0, 2.0]])], tmp_path / name)
    for ending in ("png", "svg", "csv"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
