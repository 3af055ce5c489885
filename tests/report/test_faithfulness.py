"""What the page says of explanations, on numbers chosen by hand."""

import numpy as np
import pandas as pd
import pytest

from reidctl.report import faithfulness as f
from reidctl.report.curves import curve_rows, faithfulness_curves
from reidctl.report.grids import Entry


def row(explainer, metric, kind, value, **more):
    common = {"explainer": explainer, "judge": "", "metric": metric, "kind": kind, "control": "", "fill": ""}
    return {
        **common, "removed": np.nan, "value": value, "low": value - 0.05, "high": value + 0.05, "items": 40, **more
    }  # fmt: skip


def triple(explainer, metric, own, other, control="random", **more):
    return [
        row(explainer, metric, "value", own, **more),
        row(explainer, metric, "control", other, control=control, **more),
        row(explainer, metric, "difference", own - other, control=control, **more),
    ]


@pytest.mark.parametrize(
    ("low", "high", "better", "text"),
    [
        (0.01, 0.2, 1, "better than random"),
        (-0.2, -0.01, 1, "worse than random"),
        (-0.2, -0.01, -1, "better than random"),
        (0.01, 0.2, -1, "worse than random"),
        (-0.1, 0.1, 1, "not told apart from random"),
        (0.0, 0.1, 1, "not told apart from random"),
        (0.1, 0.2, 0, "differs from random"),
        (np.nan, 0.2, 1, ""),
        (None, None, 1, ""),
    ],
)
def test_a_verdict_follows_from_the_interval_and_from_which_way_is_good(low, high, better, text):
    assert f.verdict(low, high, better, "random") == text


@pytest.mark.covers(193)
def test_the_table_sets_every_explainer_and_metric_beside_its_first_control():
    rows = triple("ppim", "deletion", 0.3, 0.5) + triple("random", "deletion", 0.49, 0.5)
    rows += triple("ppim", "pointing", 0.8, 0.2) + triple("ppim", "pointing", 0.8, 0.7, control="centre")
    parts, masking = f.metric_grids(pd.DataFrame(rows), caption="c")
    assert parts.columns == ("pointing, %",) and [line.name for line in parts.lines] == ["ppim"]
    assert parts.lines[0].entries == (Entry("80.0", ("75.0 to 85.0", "+60.0 (+55.0 to +65.0)", "better than random")),)
    assert masking.columns == ("deletion",)
    below = [line.entries[0].below[-1] for line in masking.lines]
    assert below == ["better than random", "not told apart from random"]


@pytest.mark.covers(193)
def test_every_control_has_a_row_with_its_own_value():
    rows = triple("ppim", "pointing", 0.8, 0.2) + triple("ppim", "pointing", 0.8, 0.78, control="centre")
    rows += triple("ppim", "pointing", 0.8, 0.6, control="gradcam")
    grid = f.control_grids(pd.DataFrame(rows))[0]
    shown = [tuple(entry.text for entry in line.entries) for line in grid.lines]
    assert shown == [
        ("random", "80.0", "20.0", "+60.0", "better than random"),
        ("centre", "80.0", "78.0", "+2.0", "not told apart from centre"),
        ("gradcam", "80.0", "60.0", "+20.0", "better than gradcam"),
    ]


@pytest.mark.covers(199)
def test_scores_on_masks_of_the_user_are_marked_wherever_they_stand():
    rows = triple("ppim", "pointing", 0.8, 0.2) + triple("ppim", "alignment", 0.3, 0.2)
    frame = pd.DataFrame(rows)
    parts, rest = f.metric_grids(frame, caption="c", user_supplied=True)
    assert parts.columns == ("pointing, % (user-supplied masks)",) and rest.columns == ("alignment",)
    assert f.control_grids(frame, user_supplied=True)[0].lines[0].name == "pointing, % (user-supplied masks)"
    assert f.metric_grids(frame, caption="c")[0].columns == ("pointing, %",)
    assert "user-supplied" in f.limits("user-supplied") and "user-supplied" not in f.limits("true")
    for parts in ("true", "user-supplied", None):
        assert "no human part annotation" in f.limits(parts)


def swept():
    rows = []
    for removed in np.asarray([0.05, 0.1, 0.2, 0.5], np.float32):
        rows += triple("ppim", "similarity_drop", float(removed), removed / 2, fill="mean", removed=removed)
        rows += triple("gradcam", "similarity_drop", removed / 3, removed / 2, fill="blur", removed=removed)
    return pd.DataFrame(rows)


def test_tables_show_the_share_next_to_a_fifth():
    found = f.at_headline(swept())
    assert set(found["removed"].round(3)) == {np.float32(0.2)}
    without = swept()
    without = without[without["removed"].round(2) != np.float32(0.2)]
    assert set(f.at_headline(without)["removed"].round(3)) == {np.float32(0.1)}
    assert len(f.at_headline(pd.DataFrame(triple("a", "pointing", 0.1, 0.2)))) == 3


def test_fills_and_explainers_come_in_the_order_that_people_expect():
    assert f.fills(swept().assign(fill=["blur", "plugin:a:b", "", "mean"] * 6)) == ["mean", "blur", "plugin:a:b"]
    rows = pd.DataFrame([row(name, "iou", "value", 0.1) for name in ("centre", "cls", "ppim", "cls")])
    assert f.in_order(rows, ["ppim", "cls"])["explainer"].tolist() == ["ppim", "cls", "cls", "centre"]


@pytest.mark.covers(231)
def test_curves_hold_the_map_and_its_controls_and_their_data_beside(tmp_path):
    rows = curve_rows(swept(), "similarity_drop", "mean")
    assert set(rows["explainer"]) == {"ppim"} and len(rows) == 8
    png, svg, csv = faithfulness_curves(rows, tmp_path / "c")
    text = svg.read_text()
    for word in ("ppim", "random", "map", "similarity drop", "removed share of the patches, percent"):
        assert word in text
    saved = pd.read_csv(csv, keep_default_na=False)
    assert saved["value"].tolist() == pytest.approx(rows["value"].tolist())
    assert set(saved["control"]) == {"", "random"} and png.stat().st_size > 1000
    assert not len(curve_rows(swept(), "mAP_drop", "mean"))


def test_an_unknown_control_gets_a_look_of_its_own(tmp_path):
    frame = swept()
    frame["control"] = frame["control"].replace("random", "a $new$ one")
    _, svg, _ = faithfulness_curves(curve_rows(frame, "similarity_drop", "mean"), tmp_path / "c")
    assert svg.is_file()


@pytest.mark.covers(190)
def test_other_judges_stand_beside_the_model_itself():
    own = triple("ppim", "similarity_drop", 0.4, 0.1) + triple("ppim", "pointing", 0.8, 0.1)
    other = triple("ppim", "similarity_drop", 0.11, 0.1, judge="other")
    assert f.judge_grid(pd.DataFrame(own), caption="c") is None
    grid = f.judge_grid(pd.DataFrame(own + other), caption="c")
    assert grid.columns == ("similarity drop",)
    assert [line.name for line in grid.lines] == ["ppim, judged by the model itself", "ppim, judged by other"]
    assert [line.entries[0].below[-1] for line in grid.lines] == ["better than random", "not told apart from random"]


def test_sanity_stability_and_binding_are_told_in_words():
    rows = [row("ppim", "sanity.weights", "value", 0.1), row("cls", "sanity.weights", "value", 0.9)]
    rows += [row("ppim", "stability", "value", 0.7, judge="runs/b")]
    rows += [row("", "binding.swap", "value", 0.5), row("", "binding.random", "value", 0.9)]
    weights, stability, swap, other = f.sentences(pd.DataFrame(rows))
    assert "0.10 [0.05 to 0.15] for ppim, 0.90 [0.85 to 0.95] for cls (40 maps)" in weights
    assert "another model (runs/b): 0.70" in stability
    assert "50.0 [45.0 to 55.0], where chance is 50. Nothing shows" in swap and "90.0" in other
    rows[3]["low"] = 0.51
    assert "tells better than chance" in f.sentences(pd.DataFrame(rows))[2]
    assert f.sentences(pd.DataFrame(triple("a", "pointing", 0.1, 0.2))) == []


def test_rows_of_sentences_and_of_masking_are_not_among_the_plain_ones():
    rows = [row("ppim", "stability", "value", 0.7, judge="b"), row("ppim", "entropy", "value", 0.7)]
    rows += triple("ppim", "deletion", 0.1, 0.2, fill="mean") + triple("ppim", "alignment", 0.1, 0.2, judge="clip")
    assert set(f.plain_rows(pd.DataFrame(rows))["metric"]) == {"entropy", "alignment"}


def test_a_metric_that_the_page_does_not_know_is_shown_without_a_verdict():
    grids = f.metric_grids(pd.DataFrame(triple("ppim", "new", 0.5, 0.1)), caption="c")
    assert grids[0].columns == ("new",) and grids[0].lines[0].entries[0].below[-1] == "differs from random"


def test_of_two_shares_that_are_equally_near_the_smaller_is_shown():
    rows = [
        r for share in (0.1, 0.3) for r in triple("a", "mAP_drop", share, 0.0, fill="mean", removed=np.float32(share))
    ]
    assert set(f.at_headline(pd.DataFrame(rows))["removed"].round(3)) == {np.float32(0.1)}
