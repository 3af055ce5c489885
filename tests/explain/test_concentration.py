"""Concentration of maps against hand-worked values, and the rows of the summary."""

import math

import numpy as np
import pandas as pd
import pytest

from reidctl import tables
from reidctl.errors import UsageError
from reidctl.explain.concentration import (
    METRICS,
    entropy,
    score_concentration,
    spread,
    summarise_scores,
    top_mass,
)

ONE_HOT = np.eye(8)[[3]]
HALVES = np.asarray([[0.7, 0, 0, 0, 0, 0, 0, 0.7]])  # opposite corners of a 4 x 2 grid


@pytest.mark.covers(191)
def test_entropy_of_worked_maps():
    maps = np.concatenate([ONE_HOT, HALVES, np.full((1, 8), 0.3), np.zeros((1, 8))])
    # log 2 / log 8 = 1/3 for two equal patches.
    assert entropy(maps) == pytest.approx([0.0, 1 / 3, 1.0, 1.0])
    assert entropy([[0.4]]).tolist() == [1.0]


@pytest.mark.covers(191)
def test_top_mass_of_worked_maps():
    maps = np.concatenate([ONE_HOT, HALVES, np.full((1, 8), 0.3), np.zeros((1, 8))])
    # A quarter of 8 patches is 2 of them; a tenth is 0.8 of one.
    assert top_mass(maps, 0.25) == pytest.approx([1.0, 1.0, 0.25, 0.25])
    assert top_mass(maps) == pytest.approx([0.8, 0.4, 0.1, 0.1])
    assert top_mass(maps, 1.0) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(UsageError, match="share"):
        top_mass(ONE_HOT, share)


@pytest.mark.covers(191)
def test_spread_of_worked_maps():
    maps = np.concatenate([ONE_HOT, HALVES, np.zeros((1, 8))])
    # Corners of 4 x 2: centres at 1/8 and 7/8 down, 1/4 and 3/4 across; half their distance is 3/8 and 1/4.
    # Constant: (1 - 1/n²) / 12 per axis.
    constant = (1 - 1 / 16) / 12 + (1 - 1 / 4) / 12
    assert spread(maps, (4, 2)) == pytest.approx([0.0, (3 / 8) ** 2 + (1 / 4) ** 2, constant])


@pytest.mark.covers(191)
def test_a_shifted_map_is_as_concentrated_as_the_map():
    rng = np.random.default_rng(0)
    maps = rng.random((5, 6, 4)) ** 4
    shifted = np.roll(maps, (2, 1), axis=(1, 2)).reshape(5, 24)
    maps = maps.reshape(5, 24)
    assert entropy(shifted) == pytest.approx(entropy(maps))
    assert top_mass(shifted) == pytest.approx(top_mass(maps))
    assert np.abs(spread(shifted, (6, 4)) - spread(maps, (6, 4))).max() > 1e-3  # what is cut by the border moves apart


def explained(maps, grids, explainers):
    return pd.DataFrame(
        {
            "query_id": [f"q{n}" for n in range(len(maps))], "image_id": [f"i{n}" for n in range(len(maps))],
            "phrase": "hat", "explainer": explainers, "grid_h": [g[0] for g in grids], "grid_w": [g[1] for g in grids],
            "relevance": [np.asarray(m, np.float32) for m in maps],
        },
        index=range(7, 7 + len(maps)),
    )  # fmt: skip


def test_maps_of_several_grids_are_scored_in_order():
    frame = explained([ONE_HOT[0], [1, 1], HALVES[0]], [(4, 2), (1, 2), (4, 2)], ["ppim", "cls", "ppim"])
    found = score_concentration(frame)
    assert list(found.columns) == ["query_id", "image_id", "phrase", "explainer", *METRICS]
    assert found["query_id"].tolist() == ["q0", "q1", "q2"]
    assert found["entropy"].tolist() == pytest.approx([0.0, 1.0, 1 / 3])
    assert found["spread"].tolist() == pytest.approx([0.0, 0.0625, (3 / 8) ** 2 + 1 / 16])
    assert score_concentration(frame.iloc[:0]).empty


def test_the_summary_holds_means_controls_and_paired_differences_and_fits_the_schema(tmp_path):
    scores = pd.DataFrame(
        {
            "image_id": ["a", "b", "c", "a"],
            "explainer": ["ppim", "ppim", "ppim", "cls"],
            "score": [1.0, 2.0, 6.0, 5.0],
            "score.random": [0.0, math.nan, 2.0, 5.0],
        }
    )
    people = {"a": "p1", "b": "p1", "c": "p2"}
    found = summarise_scores(scores, people, {"score": ("random",)}, judge="other")
    ppim = found[found["explainer"] == "ppim"].set_index("kind")
    assert ppim["value"].to_dict() == {"value": 3.0, "control": 1.0, "difference": 2.5}
    assert ppim["items"].to_dict() == {"value": 3, "control": 2, "difference": 2}
    # Two people: the bootstrap draws either of them twice, or both.
    assert (ppim.loc["difference", "low"], ppim.loc["difference", "high"]) == (1.0, 4.0)
    assert (ppim.loc["value", "low"], ppim.loc["value", "high"]) == (1.5, 6.0)
    assert found[found["explainer"] == "cls"]["value"].tolist() == [5.0, 5.0, 0.0]
    tables.write_table(tmp_path / "i.parquet", "interpretability", found)
    tables.write_table(
        tmp_path / "e.parquet", "interpretability", summarise_scores(scores.iloc[:0], people, {"score": ()})
    )
    assert len(tables.read_table(tmp_path / "i.parquet", "interpretability")) == 6
