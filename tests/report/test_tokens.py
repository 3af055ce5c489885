"""Sheets of pictures beside their maps."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl.report.tokens import Explained, map_sheet


@pytest.mark.covers(218, 231)
@pytest.mark.parametrize(
    ("names", "images", "columns"),
    [
        (("picture", "i2i", "activation"), 8, 4),
        (("picture", "t2i", "i2i", "activation"), 8, 2),
        (("picture", "i2i"), 1, 1),
    ],
)
def test_every_picture_has_its_maps_and_all_have_room(tmp_path, names, images, columns):
    rng = np.random.default_rng(0)
    items = [
        Explained(f"person {n}\nred bag $x$", {name: rng.integers(0, 255, (96, 48, 3), np.uint8) for name in names})
        for n in range(images)
    ]
    data = pd.DataFrame({"image_id": ["a"], "i2i": [1.0]})
    png, svg, csv = map_sheet(items, data, tmp_path / "cam", colours="inferno", note="What the maps are. " * 8)
    with Image.open(png) as picture:
        assert picture.width == pytest.approx(160 * (columns * (0.9 * len(names) + 0.25) + 0.75), abs=2)
    text = svg.read_text()
    assert all(text.count(f">{name}<") == images for name in names) and text.count("red bag $x$") == images
    assert "person 0" in text and "relevance" in text and len(pd.read_csv(csv)) == 1
