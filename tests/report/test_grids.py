"""Numbers as people read them."""

import pytest

from reidctl.report.grids import NOTHING, Entry, Grid, Line, measured, number, p_text, spread

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "how", "text"),
    [
        (0.1234, {"scale": 100}, "12.3"),
        (-0.5, {"digits": 2}, "−0.50"),
        (0.5, {"signed": True}, "+0.5"),
        (-0.001, {}, "0.0"),
        (0.0, {"signed": True}, "0.0"),
        (-0.04, {"signed": True}, "0.0"),
        (12345.6, {}, "12,345.6"),
        (None, {}, "–"),
        (NAN, {}, "–"),
        (float("inf"), {}, "–"),
    ],
)
def test_a_number_has_its_sign_and_unit(value, how, text):
    assert number(value, **how) == text


def test_an_interval_needs_both_bounds():
    assert spread(0.1, 0.2, scale=100) == "10.0 to 20.0"
    assert spread(0.1, NAN) == spread(None, 0.2) == ""


def test_a_cell_holds_the_interval_and_what_follows_under_the_number():
    assert measured((0.5, 0.4, 0.6), scale=100, after=["p 0.010", ""]) == Entry("50.0", ("40.0 to 60.0", "p 0.010"))
    assert measured((0.5,), digits=3) == Entry("0.500")
    assert measured((NAN, 0.1, 0.2)) == NOTHING


def test_a_row_with_a_cell_too_few_is_a_mistake():
    with pytest.raises(AssertionError):
        Grid("c", "x", ("a", "b"), (Line("r", (Entry("1"),)),))


def test_a_p_value_is_never_nothing():
    assert [p_text(value) for value in (0.0, 0.0004, 0.0314, 1.0, NAN, None)] == [
        "p < 0.001", "p < 0.001", "p 0.031", "p 1.000", "", ""
    ]  # fmt: skip
