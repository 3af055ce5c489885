"""Maps of points: every image in its place, by its person's or its label's colour."""

import numpy as np
import pandas as pd
import pytest

from reidctl.report import space


def points(labels=("red", "navy", ""), panel="embedding", features=("i2i",)):
    rows = []
    for feature in features:
        for n in range(6):
            rows.append(
                {
                    "panel": panel, "feature": feature, "image_id": f"i{n}", "person_id": f"p{n // 2}",
                    "label": labels[n % len(labels)], "x": float(n), "y": float(n) * 2,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def one(frame, highlight=()):
    (found,) = space.point_maps(frame, highlight=highlight, titles={"embedding": "The map"})
    return found


@pytest.mark.covers(159, 231)
def test_both_axes_have_one_scale_and_the_map_is_the_right_way_up():
    marks = {mark.image: mark for mark in one(points()).marks}
    xs, ys = (np.array([getattr(marks[f"i{n}"], axis) for n in range(6)]) for axis in "xy")
    assert np.diff(xs) * 2 == pytest.approx(-np.diff(ys), abs=0.21)
    assert ys[0] == pytest.approx(space.SIDE - 14) and ys[-1] == pytest.approx(14)
    assert xs.mean() == pytest.approx(space.SIDE / 2)


def test_words_for_colours_are_drawn_as_what_they_say_and_others_in_series():
    assert {mark.colour for mark in one(points()).marks} == {"#ff0000", "#000080", "rest"}
    assert {mark.colour for mark in one(points(labels=("red", "checked"))).marks} == {"s1", "s2"}


def test_a_label_is_text_in_the_legend_and_never_a_colour_of_its_own_making():
    found = one(points(labels=('"><script>', "red")))
    assert {mark.colour for mark in found.marks} == {"s1", "s2"}
    assert {key.text for key in found.keys} == {'"><script>', "red"}


def test_streams_have_crosses_for_clothing_and_colours_for_highlighted_people():
    found = one(points(panel="streams", features=("identity", "clothing")), highlight=("p2",))
    assert sum(mark.cross for mark in found.marks) == 6
    assert {mark.person for mark in found.marks if mark.colour == "s1"} == {"p2"}
    assert [mark.person for mark in found.marks[-4:]] == ["p2"] * 4  # drawn above the others
    assert [key.text for key in found.keys] == ["identity", "clothing", "p2", "everybody else"]


def test_a_point_tells_image_person_feature_and_label():
    marks = {mark.image: mark for mark in one(points()).marks}
    assert marks["i0"].text == "i0; p0; i2i; red" and marks["i2"].text == "i2; p1; i2i"


def test_points_on_one_spot_have_a_place():
    frame = points().assign(x=1.0, y=1.0)
    assert {(mark.x, mark.y) for mark in one(frame).marks} == {(space.SIDE / 2, space.SIDE / 2)}


def test_pictures_of_highlighted_people_come_first_and_there_is_an_end(monkeypatch):
    monkeypatch.setattr(space, "THUMBNAILS", 3)
    assert space.thumbnail_order(points(), ["p2"]) == ["i4", "i5", "i0"]
    assert space.most_pictured(points(), 2) == ["p0", "p1"]
