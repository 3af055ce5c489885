"""The radar's scores by hand, and that the raw values stand beside them."""

import pandas as pd
import pytest
from PIL import Image

from reidctl.report.figures import inline_svg
from reidctl.report.radar import _short, normalise, radar

NAN = float("nan")


def raw(**changes):
    columns = {
        "Params": [1e6, 5e6, 2e6],
        "FLOPs": [1e6, 2e9, 6e8],
        "Memory": [10.0, 50.0, 20.0],
        "Speed": [100.0, 20.0, 30.0],
        "mAP": [0.40, 0.44, 0.45],
        **changes,
    }
    return pd.DataFrame(columns, index=["simple", "transformer", "mamba"])


@pytest.mark.covers(161)
def test_scores_are_min_max_with_costs_inverted():
    scores = normalise(raw())
    assert scores["Params"].tolist() == [100, 0, 75]  # (5 - 2) / (5 - 1)
    assert scores["Speed"].tolist() == [100, 0, 12.5]  # (30 - 20) / (100 - 20)
    assert scores["mAP"].tolist() == pytest.approx([0, 80, 100])  # 0.04 / 0.05
    assert normalise(raw(), costs=())["Params"].tolist() == [0, 100, 25]


@pytest.mark.covers(161)
def test_with_three_models_every_axis_has_a_0_and_a_100_however_small_the_difference():
    scores = normalise(raw(mAP=[0.4500, 0.4501, 0.4502]))
    assert scores.min().tolist() == [0] * 5 and scores.max().tolist() == [100] * 5
    assert scores["mAP"].tolist() == pytest.approx([0, 50, 100])


def test_equal_values_score_100_for_all_and_a_missing_value_stays_missing():
    assert normalise(raw(Params=[7.0, 7.0, 7.0]))["Params"].tolist() == [100, 100, 100]
    scores = normalise(raw(mAP=[0.4, NAN, 0.5], Speed=[3.0, NAN, 3.0], Memory=[NAN] * 3))
    assert scores["mAP"].isna().tolist() == [False, True, False] and scores["mAP"]["mamba"] == 100
    assert scores["Speed"].isna().tolist() == [False, True, False] and scores["Speed"]["simple"] == 100
    assert scores["Memory"].isna().all()


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two models"):
        normalise(raw().iloc[:1])
    with pytest.raises(ValueError, match="infinite"):
        normalise(raw(Speed=[1.0, float("inf"), 2.0]))
    with pytest.raises(ValueError, match="three criteria"):
        radar(raw()[["Params", "mAP"]], tmp_path / "r")
    with pytest.raises(ValueError, match="more than 8"):
        radar(pd.concat([raw()] * 3), tmp_path / "r")


@pytest.mark.covers(161)
def test_the_figure_and_its_csv_hold_the_raw_values_and_say_what_min_max_does(tmp_path):
    png, svg, csv = radar(raw(), tmp_path / "radar", note="2 threads, 64 tokens")
    with Image.open(png) as image:
        assert image.format == "PNG" and image.width > 1000
    text = svg.read_text()
    for words in ("simple", "transformer", "mamba", "Params ↓", "Speed ↑", "5.00 M", "2.00 G", "0.450", "B per item"):
        assert words in text
    whole = " ".join(part.split("<")[0] for part in text.split(">"))
    flat = " ".join(whole.split())
    assert "With three models min-max always yields a 0 and a 100 on" in flat and "2 threads, 64 tokens" in flat
    data = pd.read_csv(csv)
    assert list(data.columns) == ["model", "criterion", "unit", "raw", "score"] and len(data) == 15
    for model in raw().index:
        rows = data[data["model"] == model].set_index("criterion")
        assert rows["raw"].to_dict() == pytest.approx(raw().loc[model].to_dict())
        assert rows["score"].to_dict() == pytest.approx(normalise(raw()).loc[model].to_dict())


def test_a_criterion_that_a_model_lacks_leaves_the_radar_and_stays_in_the_table(tmp_path):
    _, svg, csv = radar(raw(mAP=[0.4, NAN, 0.5], Params=[7.0, 7.0, 7.0]), tmp_path / "radar")
    text = svg.read_text()
    assert "Not on the radar, because some model lacks it: mAP." in text and "–" in text
    assert "Params: all 100" in " ".join(text.split())
    assert text.count(">mAP ↑<") == 1 and text.count("mAP<") == 0
    assert len(pd.read_csv(csv)) == 15


def test_models_of_one_name_are_kept_apart(tmp_path):
    twice = raw().set_axis(["a", "a", "b"])
    data = pd.read_csv(radar(twice, tmp_path / "radar")[2])
    assert data[data["criterion"] == "Params"]["score"].tolist() == [100, 0, 75]


def test_equal_data_give_equal_files_and_names_are_not_read_as_formulas(tmp_path):
    odd = raw().set_axis(["$x^2$ <b>", "a & b", "long " * 20])
    first, second = (radar(odd, tmp_path / name) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert "$x^2$ &lt;b&gt;" in first[1].read_text()
    assert "#0072b2" not in inline_svg(first[1].read_text(), prefix="radar")


def test_numbers_are_short_and_keep_three_digits():
    shown = {
        0.0: "0",
        0.4512: "0.451",
        0.00123456: "0.00123",
        9.999: "10.0",
        20.6: "20.6",
        999.4: "999",
        999.96: "1.00 k",
        1467648: "1.47 M",
        2.05e9: "2.05 G",
        3e12: "3.00 T",
        -1500: "-1.50 k",
    }
    assert {value: _short(value) for value in shown} == shown
    assert _short(NAN) == "–"
