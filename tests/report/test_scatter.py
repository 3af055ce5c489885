"""Figures of `analyse` are written with their data, labelled, and show every number."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl.report import scatter


def check(paths):
    png, svg, csv = paths
    with Image.open(png) as image:
        assert image.format == "PNG" and image.width > 600
    return pd.read_csv(csv), " ".join(svg.read_text().split())


@pytest.mark.covers(231)
def test_dot_panels_hold_every_number_and_name_features_targets_and_controls(tmp_path):
    rows = pd.DataFrame(
        [
            {"feature": f, "target": t, "value": v, "low": v - 0.1, "high": v + 0.1, "control": 0.25}
            for f, shift in (("identity", 0.0), ("pooled_clothing", 0.3))
            for t, v in (("upper_colour", 0.4 + shift), ("gender", 0.5))
        ]
    )
    data, svg = check(scatter.dot_panels(rows, tmp_path / "dots", label="percent", control="exchanged", reference=0.5))
    pd.testing.assert_frame_equal(data, rows)
    for text in ("identity", "pooled clothing", "upper colour", "gender", "percent (grey: exchanged)"):
        assert text in svg
    bare = rows.assign(control=np.nan)
    assert "grey" not in check(scatter.dot_panels(bare, tmp_path / "bare", label="percent", control="exchanged"))[1]


def points(labels):
    rng = np.random.default_rng(0)
    rows = [
        {
            "panel": panel, "feature": feature, "image_id": f"i{n}", "person_id": f"p{n % 6}",
            "label": labels[n % len(labels)], "x": rng.normal(), "y": rng.normal(),
        }
        for panel, feature in (("streams", "identity"), ("streams", "clothing"), ("embedding", "embedding"))
        for n in range(30)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.covers(231)
@pytest.mark.covers(159)
def test_the_map_marks_people_features_and_labels_and_carries_its_note(tmp_path):
    frame = points(["red", "white"])
    paths = scatter.tsne_map(
        frame, tmp_path / "map", highlight=("p1", "p4"), coloured_by="upper_colour", note="Distances mean nothing."
    )
    data, svg = check(paths)
    assert len(data) == 90
    for text in ("identity", "clothing", "p1", "p4", "everybody else", "by upper colour", "red", "white", "t-SNE 1"):
        assert text in svg
    assert "Distances mean nothing." in svg
    again = [path.read_bytes() for path in paths]
    scatter.tsne_map(
        frame, tmp_path / "map", highlight=("p1", "p4"), coloured_by="upper_colour", note="Distances mean nothing."
    )
    assert [path.read_bytes() for path in paths] == again


def test_a_map_of_one_feature_has_one_panel_and_many_labels_share_a_colour(tmp_path):
    frame = points([f"person {n}" for n in range(30)])
    frame = frame[frame["panel"] == "embedding"]
    _, svg = check(scatter.tsne_map(frame, tmp_path / "map", highlight=(), coloured_by="person", note="n"))
    assert "everybody else" not in svg and "others" in svg
    assert len(set(re.findall(r"person \d+", svg))) == 14


def test_targets_can_be_put_last():
    rows = pd.DataFrame({"feature": "f", "target": ["body", "a", "person", "b"]})
    assert list(scatter.order_targets(rows, ("body", "person"))["target"]) == ["a", "b", "body", "person"]


def side_points(people=20):
    rng = np.random.default_rng(0)
    rows = [
        {
            "panel": panel, "model": f"clip ({panel})", "feature": "embedding", "image_id": f"i{n}",
            "person_id": f"p{n % people:02d}", "x": rng.normal(), "y": rng.normal(),
        }
        for panel in ("against", "this")
        for n in range(60)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.covers(217, 231)
def test_sides_name_their_models_and_numbers_and_people_have_one_colour_in_both(tmp_path):
    sides = [
        scatter.Side("against", "irra ($base$)", "embedding", "silhouette of people 0.120"),
        scatter.Side("this", "hpl (ours)", "i2i", "silhouette of people 0.340"),
    ]
    people = tuple(f"p{number:02d}" for number in range(9))
    data, svg = check(scatter.tsne_sides(side_points(), sides, tmp_path / "s", highlight=people, note="Not compared."))
    assert len(data) == 120
    for text in ("irra ($base$)", "hpl (ours)", "feature i2i", "people 0.120", "people 0.340", "p08", "everybody else"):
        assert text in svg
    assert "Not compared." in svg
    # Three images of each of nine people in each panel, and one mark of each in the key: seven colours, then squares.
    for number, colour in enumerate(scatter.SERIES[:7]):
        shown = 2 if number < 2 else 1
        assert svg.count(f"fill: {colour}") >= shown * 2 * 3
    assert scatter.SERIES[7] not in svg, "grey is for everybody else"


def test_nobody_is_everybody_else_where_all_people_are_coloured(tmp_path):
    side = scatter.Side("this", "clip", "embedding", "")
    people = ("p00", "p01", "p02")
    svg = check(scatter.tsne_sides(side_points(3), [side], tmp_path / "s", highlight=people, note="x"))[1]
    assert "p02" in svg and "everybody else" not in svg
