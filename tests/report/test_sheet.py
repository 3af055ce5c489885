"""Ranked lists as pictures."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from reidctl.errors import DataError
from reidctl.report.sheet import RIGHT, UNKNOWN, WRONG, SheetItem, contact_sheet, ranking_sheet


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p.png"
    Image.new("RGB", (32, 64), "#808080").save(path)
    return path


def colours(path):
    with Image.open(path) as image:
        return {tuple(colour) for colour in np.asarray(image.convert("RGB")).reshape(-1, 3)}


@pytest.mark.covers(37)
def test_right_and_wrong_results_have_their_colours(picture, tmp_path):
    for match, colour in ((True, RIGHT), (False, WRONG), (None, UNKNOWN)):
        ranking_sheet("a person", [SheetItem(picture, "x", 0.5, match)], tmp_path / "s.png")
        found = colours(tmp_path / "s.png")
        assert ImageColor.getrgb(colour) in found
        if match is None:
            assert ImageColor.getrgb(RIGHT) not in found and ImageColor.getrgb(WRONG) not in found


@pytest.mark.covers(37)
def test_right_and_wrong_differ_without_colour(picture, tmp_path):
    drawn = []
    for match in (True, False):
        ranking_sheet("a person", [SheetItem(picture, "x", 0.5, match)], tmp_path / "s.png")
        with Image.open(tmp_path / "s.png") as image:
            drawn.append(np.asarray(image.convert("L"))[12:45, 280:352])
    white = [(area > 240) for area in drawn]
    assert (white[0] != white[1]).sum() > 20


@pytest.mark.covers(37)
def test_results_stand_in_the_given_order(tmp_path):
    items = []
    for number, colour in enumerate(("#ff0000", "#00ff00", "#0000ff")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 64), colour).save(path)
        items.append(SheetItem(path, colour, 1 - number / 10))
    ranking_sheet("q", items, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    places = [np.argwhere((pixels == ImageColor.getrgb(item.caption)).all(-1))[:, 1].mean() for item in items]
    assert places == sorted(places) and len(set(places)) == 3


def test_more_results_than_columns_go_on_in_the_next_line(picture, tmp_path):
    def height(count):
        ranking_sheet("q", [SheetItem(picture, "x", 0.5)] * count, tmp_path / "s.png", columns=4)
        with Image.open(tmp_path / "s.png") as image:
            return image.height

    assert height(4) == height(1)
    assert height(5) > 1.8 * height(4)


def test_an_unreadable_image_becomes_a_placeholder(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    items = [SheetItem(tmp_path / "broken.png", "b", 0.4), SheetItem(tmp_path / "missing.png", "m", 0.3)]
    ranking_sheet("q", items, tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file()


def test_an_image_query_is_drawn_and_no_results_are_no_error(picture, tmp_path):
    contact_sheet([(picture, []), ("long text " * 100, [SheetItem(picture, "x" * 100, 0.1, True)])], tmp_path / "s.png")
    assert (128, 128, 128) in colours(tmp_path / "s.png")


def test_nothing_to_draw_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no ranked list"):
        contact_sheet([], tmp_path / "s.png")
