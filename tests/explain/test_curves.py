"""Deletion and insertion curves."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from explain.planted import GRID, MEAN, REGIONS, STD, Looker, N, oracle, study, world

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.explain.controls import Plan
from reidctl.explain.curves import area, count_curve_images, measure_curves, summarise_curves
from reidctl.explain.masking import Judge, Pairs, Study

PLAN = Plan(controls=("random", "least", "centre", "shifted"))


def test_the_area_of_a_straight_line_is_its_mean():
    assert area(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5
    assert area(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.array([0.0, 0.5, 2.0])).tolist() == [0.625, 0.375]


class Additive:
    """A monotone toy: two numbers, the sum of what the patches that are left are worth and what is missing to 1.

    Pictures are white where a patch is left; `worth` sums to 1.
    """

    def __init__(self, worth):
        self.worth = torch.from_numpy(worth.astype(np.float32))

    def __call__(self, images, keep, rows):
        left = (images[:, 0].reshape(len(images), 6, 4, 4, 4).mean(dim=(2, 4)).flatten(1) > 1).float()
        share = left @ self.worth
        return torch.stack([share.clamp(0, 1), (1 - share**2).clamp_min(0).sqrt()], dim=1)


def toy(worth, heat, plan=PLAN):
    """One query that asks for the first number; one other image that scores 0.5."""
    white = np.full((2, 24, 16, 3), 255, np.uint8)
    pairs = Pairs(
        ["q"], ["i"], ["p"], np.array([[1, 0]], np.float32), np.array([0]), [np.array([0])],
        np.array([[1, 0], [0.5, np.sqrt(0.75)]], np.float32),
    )  # fmt: skip
    judge = Judge(Additive(worth), white, MEAN, STD, GRID)
    return Study(judge, pairs, {"a": heat[None].astype(np.float32)}, GRID, plan)


def closed_form(shares, temperature=1.0):
    """Area of sigmoid((share - 0.5) / τ) at equal steps."""
    y = 1 / (1 + np.exp(-(np.asarray(shares) - 0.5) / temperature))
    return float(((y[1:] + y[:-1]) / 2).mean())


@pytest.mark.covers(186)
def test_a_monotone_model_has_the_area_in_closed_form():
    """Four patches are worth a quarter each; the map knows them, or ranks them last."""
    worth = np.zeros(N)
    worth[[3, 8, 15, 20]] = 0.25
    for heat, first in ((worth, True), (-worth, False)):
        frame = measure_curves(toy(worth, heat), steps=N + 1, temperature=1.0).set_index("control")
        taken = np.arange(N + 1)
        gone = np.clip(taken, 0, 4) / 4 if first else np.clip(taken - 20, 0, 4) / 4
        assert frame.loc["", "deletion"] == pytest.approx(closed_form(1 - gone), abs=1e-6)
        assert frame.loc["", "insertion"] == pytest.approx(closed_form(gone), abs=1e-6)
        # `least` takes the map from behind: what it deletes last, insertion adds last.
        other = np.clip(taken - 20, 0, 4) / 4 if first else np.clip(taken, 0, 4) / 4
        assert frame.loc["least", "deletion"] == pytest.approx(closed_form(1 - other), abs=1e-6)


@pytest.mark.covers(186)
def test_a_model_that_values_all_patches_alike_gives_every_order_the_same_area():
    worth = np.full(N, 1 / N)
    frame = measure_curves(toy(worth, np.random.default_rng(0).random(N)), steps=7, temperature=1.0)
    expected = closed_form(1 - np.linspace(0, 1, 7))
    assert frame["deletion"].tolist() == pytest.approx([expected] * 5, abs=1e-6)
    assert frame["insertion"].tolist() == pytest.approx([expected] * 5, abs=1e-6)


@pytest.mark.covers(186)
@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_the_true_region_is_better_than_every_control(fill):
    pixels = world(people=30)
    given = study(pixels, {"oracle": oracle(REGIONS[0]), "wrong": oracle(REGIONS[3])}, PLAN)
    found = summarise_curves(measure_curves(given, fill=fill))
    difference = found[found["kind"] == "difference"]
    own = difference[difference["explainer"] == "oracle"]
    assert set(own["control"]) == set(PLAN.controls)
    assert (own.loc[own["metric"] == "deletion", "high"] < 0).all()
    assert (own.loc[own["metric"] == "insertion", "low"] > 0).all()
    wrong = difference[(difference["explainer"] == "wrong") & (difference["control"] == "random")].set_index("metric")
    assert wrong.loc["deletion", "low"] > 0 > wrong.loc["insertion", "high"]


def test_areas_equal_a_softmax_over_the_whole_gallery():
    pixels = world(people=4, twins=True)
    given = study(pixels, {"flat": np.random.default_rng(0).random(N).astype(np.float32)}, replace(PLAN, controls=()))
    frame = measure_curves(given, steps=4, temperature=0.1)
    order = np.argsort(-given.maps["flat"][0])
    for row, pair in enumerate(frame.itertuples()):
        areas = []
        for insertion in (False, True):
            heights = []
            for count in (0, 8, 16, 24):
                removed = np.zeros(N, bool)
                removed[order[count:] if insertion else order[:count]] = True
                picture = pixels[given.pairs.target[row]].astype(float)
                picture[np.kron(removed.reshape(GRID), np.ones((4, 4), bool))] = 127.5  # the mean of the statistics
                image = torch.from_numpy((picture / 255 - 0.5) / 0.25).permute(2, 0, 1).float()
                scores = given.pairs.gallery @ given.pairs.query[row]
                scores[given.pairs.target[row]] = Looker().one(image).numpy() @ given.pairs.query[row]
                powers = np.exp(scores.astype(float) / 0.1)
                heights.append(powers[given.pairs.target[row]] / powers.sum())
            areas.append((heights[0] / 2 + heights[1] + heights[2] + heights[3] / 2) / 3)
        assert (pair.deletion, pair.insertion) == pytest.approx(areas, abs=1e-5)


def test_a_killed_curve_goes_on_where_it_stopped(tmp_path):
    pixels, maps = world(people=6), {"flat": np.ones(N, np.float32)}
    whole = Looker()
    expected = measure_curves(study(pixels, maps, PLAN, embed=whole), chunk=2, steps=3)
    with pytest.raises(KeyboardInterrupt):
        killed = study(pixels, maps, PLAN, embed=Looker(stop=whole.images * 5 // 6))
        measure_curves(killed, chunk=2, steps=3, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    rest, steps = Looker(), []
    given = study(pixels, maps, PLAN, embed=rest)
    found = measure_curves(given, chunk=2, steps=3, folder=tmp_path, advance=steps.append)
    pd.testing.assert_frame_equal(found, expected)
    assert 0 < rest.images <= whole.images // 2
    assert sum(steps) == count_curve_images(given, steps=3)
    # Other settings are other parts; a damaged part is named.
    measure_curves(given, chunk=2, steps=3, folder=tmp_path, temperature=0.5)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 6
    for part in parts:
        part.write_bytes(b"")
    with pytest.raises(DataError, match="part-"):
        measure_curves(given, chunk=2, steps=3, folder=tmp_path)


def test_the_summary_is_a_table_that_can_be_written(tmp_path):
    given = study(world(people=3), {"flat": np.ones(N, np.float32)}, PLAN)
    tables.write_table(tmp_path / "s.parquet", "interpretability", summarise_curves(measure_curves(given, steps=3)))
    found = tables.read_table(tmp_path / "s.parquet", "interpretability")
    assert found["removed"].isna().all() and set(found["metric"]) == {"deletion", "insertion"}
    assert len(found) == 2 * (1 + 2 * len(PLAN.controls))


def test_what_is_missing_is_left_out():
    heat = np.ones((3, N), np.float32)
    heat[1, 0] = np.nan
    frame = measure_curves(study(world(people=3), {"flat": heat}, PLAN), steps=3)
    assert set(frame["query_id"]) == {"q0", "q2"}


def test_curves_that_make_no_sense_are_refused():
    given = study(world(people=3), {"flat": np.ones(N, np.float32)}, PLAN)
    for wrong in ({"fill": "drop"}, {"steps": 1}, {"temperature": 0.0}):
        with pytest.raises(UsageError):
            measure_curves(given, **wrong)
    alone = replace(
        given.pairs, gallery=given.pairs.gallery[:1], target=np.zeros(3, np.int64), right=[np.array([0])] * 3
    )
    with pytest.raises(DataError, match="one image"):
        measure_curves(replace(given, pairs=alone), steps=3)
