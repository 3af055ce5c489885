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
