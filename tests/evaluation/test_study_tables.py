"""The page of a study: means and spreads worked by hand, printed numbers as printed, foreign text escaped."""

import pytest

from reidctl.evaluation.claims import judge
from reidctl.evaluation.study import Study
from reidctl.evaluation.study_tables import claim_rows, column_of, page, value_rows

STUDY = {
    "about": "A study",
    "method": "bdam",
    "conditions": {"a": {"label": "x | y", "row": "+ BDAM"}, "b": {"row": {"bdam-long": "w/o Gate"}}},
    "published": {"bdam-icme": "II", "bdam-long": "1"},
    "claims": [{"say": "a <i>wins</i>", "measure": "t2i.mAP", "more": "a", "than": "b"}],
}
VALUES = {
    "a": {0: {"t2i.mAP": 0.5, "t2i.rank1": 0.4}, 1: {"t2i.mAP": 0.6, "t2i.rank1": 0.5}},
    "b": {0: {"t2i.mAP": 0.4, "t2i.rank1": 0.4}, 1: {"t2i.mAP": 0.502, "t2i.rank1": 0.5}},
}


def shown(**changes):
    study = Study.model_validate(STUDY | changes)
    judged = [judge(claim, VALUES, (0, 1)) for claim in study.claims]
    return page(study, "name", VALUES, judged, figure="", command="reidctl study x.yaml"), judged


@pytest.mark.covers(30, 230)
def test_our_mean_and_std_stand_beside_the_numbers_of_each_paper_under_the_banner():
    text, _ = shown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    head, first, second = rows[0], rows[2], rows[3]
    cells = lambda line: [cell.strip() for cell in line.split(" | ")]  # noqa: E731
    assert "bdam-icme II: mAP" in head and "bdam-long 1: rank1" in head
    # 0.5 and 0.6: mean 55, std (n - 1) 7.07; 40 and 50.2: 45.1 ± 7.2. Columns: rank-1, mAP, icme mAP/rank1, long ...
    assert cells(first)[1:3] == ["45.0 ± 7.1", "55.0 ± 7.1"] and cells(second)[2] == "45.1 ± 7.2"
    assert cells(first)[3:5] == ["66.74", "76.27"]
    assert cells(second)[3:5] == ["-", "-"] and cells(second)[5].startswith("65.11")
    assert text.index("NOT COMPARABLE") < text.index("66.74")


def test_what_papers_contradict_each_other_in_is_said_below_their_numbers():
    text, _ = shown(published={"bdam-icme": "IV", "bdam-long": "3"}, conditions={"a": {"row": "Full Model"}, "b": {}})
    assert "91.93" in text and "92.95" in text


def test_rows_that_are_no_conditions_are_listed_as_printed():
    text, _ = shown(published={"bdam-icme": "V"}, conditions={"a": {}, "b": {}})
    assert "Clothes-Conflict: mAP 68.24, rank1 76.12" in text.replace("\\", "")


def test_foreign_text_is_no_markup():
    text, _ = shown(about="<script>alert(1)</script> | [x](http://y)")
    assert "<script>" not in text and "<i>" not in text and r"x \| y" in text


@pytest.mark.covers(235)
def test_no_page_says_that_a_paper_is_reproduced():
    text, _ = shown()
    assert "reproduc" not in text.lower()


def test_the_tables_hold_every_value_and_every_claim():
    _, judged = shown()
    values = value_rows(VALUES)
    assert (
        len(values) == 8
        and values.query("condition == 'a' and seed == 1 and measure == 't2i.mAP'")["value"].item() == 0.6
    )
    row = claim_rows(judged).iloc[0]
    # d = 0.1, 0.098: mean 0.099, half width 12.706 * 0.001414 / 1.414 = 0.0127.
    assert row["effect"] == pytest.approx(0.099) and row["low"] == pytest.approx(0.099 - 0.012706, abs=1e-5)
    assert row["verdict"] == "holds" and row["p_holm"] == row["p_value"] and row["seeds"] == 2


@pytest.mark.parametrize(
    ("measure", "unit"),
    [("x.t2i.mAP", "percent"), ("x.t2i.mAP.drop", "percent"), ("probes.a.b.excess", "percent"), ("f.flops", "number")],
)
def test_measures_outside_the_table_are_shown_in_their_unit(measure, unit):
    assert column_of(Study.model_validate(STUDY), measure).unit == unit
