"""Maps over pictures."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from reidctl.explain.pictures import ALPHA, COLOURS, draw_explanation, overlay


@pytest.mark.covers(180)
def test_an_overlaid_pixel_is_the_stated_mixture_of_colour_and_grey():
    picture = np.full((4, 2, 3), 100, np.uint8)
    relevance = np.asarray([[0.0], [0.0], [1.0], [1.0]], np.float32)
    drawn = overlay(picture, relevance)
    top = np.asarray(matplotlib.colormaps[COLOURS](1.0)[:3])
    none = np.asarray(matplotlib.colormaps[COLOURS](0.0)[:3])
    np.testing.assert_allclose(drawn[3, 0], 255 * (ALPHA * top + (1 - ALPHA) * 100 / 255), atol=1)
    np.testing.assert_allclose(drawn[0, 0], 255 * (ALPHA / 2 * none + (1 - ALPHA / 2) * 100 / 255), atol=1)


def test_the_overlay_forgets_the_colours_of_the_picture():
    red, grey = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    red[..., 0], grey[...] = 200, round(0.299 * 200)
    np.testing.assert_allclose(overlay(red, np.zeros((1, 1))), overlay(grey, np.zeros((1, 1))), atol=1)


@pytest.mark.covers(180)
def test_a_drawing_is_a_png_and_deterministic_even_for_odd_phrases(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    relevance = np.random.default_rng(1).random((8, 4)).astype(np.float32)
    truth = np.zeros((64, 32), bool)
    truth[20:40, 8:20] = True
    for name in ("a.png", "b.png"):
        draw_explanation(picture, relevance, "a $5_ hat\\frac{ <b>" * 9, tmp_path / name, note="cos 0.3", truth=truth)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 300


def test_an_empty_phrase_can_be_drawn(tmp_path):
    draw_explanation(np.zeros((8, 4, 3), np.uint8), np.zeros((2, 1), np.float32), "", tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()
