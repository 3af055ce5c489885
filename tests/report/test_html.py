"""Pieces of the page."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

from reidctl.report.html import ROOM, SMALL, Segment, embed_file, embed_pixels, mark_phrases, navigation, percent


def test_phrases_are_marked_in_their_sentence():
    assert mark_phrases("a red hat and shoes", [(14, 19, 2), (2, 9, 1)]) == [
        Segment("a "), Segment("red hat", 1), Segment(" and "), Segment("shoes", 2)
    ]  # fmt: skip


def test_overlapping_empty_and_outside_spans_stay_text():
    pieces = mark_phrases("a red hat", [(2, 9, 1), (6, 9, 2), (4, 4, 3), (5, 99, 4)])
    assert [piece.number for piece in pieces] == [None, 1]
    assert "".join(piece.text for piece in pieces) == "a red hat"


def opened(embedded):
    head, _, body = embedded.uri.partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    picture = Image.open(BytesIO(base64.b64decode(body)))
    assert picture.size == (embedded.width, embedded.height)
    return picture


def test_large_pictures_are_made_small_and_keep_their_aspect(tmp_path):
    path = tmp_path / "big.png"
    Image.new("RGB", (500, 1000), "red").save(path)
    picture = opened(embed_file(path))
    assert picture.height == ROOM[1] and picture.width == ROOM[1] // 2
    assert opened(embed_file(path, small=True)).size == (SMALL[1] // 2, SMALL[1])


def test_small_pictures_are_embedded_without_loss():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(opened(embed_pixels(pixels))), pixels)


def test_an_unreadable_picture_has_no_uri(tmp_path):
    (tmp_path / "x.png").write_bytes(b"<svg onload=alert(1)>")
    assert embed_file(tmp_path / "x.png") is None
    assert embed_file(tmp_path / "missing.png") is None


def test_percent_shows_a_dash_for_nothing():
    assert [percent(value) for value in (0.1234, None, float("nan"), 1.0)] == ["12.3", "–", "–", "100.0"]


def test_navigation_lists_sections_with_content():
    assert navigation([("a", "A", [1]), ("b", "B", []), ("c", "C", None)]) == [("a", "A")]
