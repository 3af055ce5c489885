"""Scores of maps against true masks."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidctl.explain.grounding import (
    centre_map,
    find_mask,
    mask_iou,
    mass_inside,
    part_names,
    pointing_game,
    pooled_map,
    score_explanations,
    summarise_grounding,
)
from reidctl.masks import encode_mask

MASK = np.zeros((8, 4), bool)
MASK[2:4, 1:3] = True  # 4 of 32 pixels
SHARE = 4 / 32


@pytest.mark.covers(188)
def test_an_oracle_map_scores_one_everywhere():
    heat = MASK.astype(np.float32)
    assert pointing_game(heat, MASK) == mass_inside(heat, MASK) == mask_iou(heat, MASK) == 1.0


@pytest.mark.covers(188)
def test_a_map_without_preference_scores_the_area_share():
    heat = np.full(MASK.shape, 0.3, np.float32)
    assert pointing_game(heat, MASK) == pytest.approx(SHARE)
    assert mass_inside(heat, MASK) == pytest.approx(SHARE)
    # 4 pixels at random: 0.5 fall inside on average, IoU = 0.5 / (8 - 0.5).
    assert mask_iou(heat, MASK) == pytest.approx(0.5 / 7.5)


@pytest.mark.covers(188)
def test_random_maps_point_into_the_mask_as_often_as_its_area_share():
    rng = np.random.default_rng(0)
    hits = [pointing_game(rng.random(MASK.shape).astype(np.float32), MASK) for _ in range(4000)]
    # Binomial with p = 1/8: standard error 0.0052.
    assert np.mean(hits) == pytest.approx(SHARE, abs=4 * 0.0053)


def test_a_map_on_the_wrong_place_scores_zero():
    heat = np.zeros(MASK.shape, np.float32)
    heat[6:8, 1:3] = 1
    assert pointing_game(heat, MASK) == mass_inside(heat, MASK) == mask_iou(heat, MASK) == 0.0


def test_a_map_of_zeros_counts_as_no_preference():
    assert mass_inside(np.zeros(MASK.shape, np.float32), MASK) == pytest.approx(SHARE)


def test_iou_by_hand_with_half_the_region_right():
    heat = np.zeros(MASK.shape, np.float32)
    heat[2, 1:3] = 1.0
    heat[7, 0:2] = 0.9
    # The 4 highest pixels hold 2 of the mask's 4: IoU = 2 / 6.
    assert mask_iou(heat, MASK) == pytest.approx(2 / 6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.floats(0.2, 5))
def test_concentration_alone_moves_neither_pointing_nor_iou(seed, power):
    heat = np.random.default_rng(seed).random(MASK.shape).astype(np.float32) + 0.01
    assert pointing_game(heat**power, MASK) == pointing_game(heat, MASK)
    assert mask_iou(heat**power, MASK) == mask_iou(heat, MASK)


def test_tolerance_counts_a_near_miss():
    heat = np.zeros(MASK.shape, np.float32)
    heat[5, 1] = 1  # two pixels below the mask
    assert pointing_game(heat, MASK, tolerance=1) == 0.0
    assert pointing_game(heat, MASK, tolerance=2) == 1.0


def test_centre_map_is_highest_in_the_middle_and_symmetric():
    heat = centre_map((8, 4))
    assert np.unravel_index(heat.argmax(), heat.shape) in [(3, 1), (3, 2), (4, 1), (4, 2)]
    np.testing.assert_allclose(heat, heat[::-1, ::-1], atol=1e-6)


def test_pooled_map_of_a_mask_that_fills_patches_is_exact_at_patch_centres():
    assert pooled_map(MASK, (4, 2))[2, 1] > pooled_map(MASK, (4, 2))[6, 1]
    assert pointing_game(pooled_map(MASK, (8, 4)), MASK) == 1.0


def part(name, phrase, mask):
    return SimpleNamespace(part=name, phrase=phrase, mask=encode_mask(mask))


def test_a_phrase_finds_its_part_despite_articles_and_case():
    parts = [part("upper", "red shirt", MASK), part("lower", "blue trousers", ~MASK)]
    np.testing.assert_array_equal(find_mask("a Red shirt", parts, (8, 4)), MASK)
    np.testing.assert_array_equal(find_mask("the wide blue trousers", parts, (8, 4)), ~MASK)
    assert find_mask("long hair", parts, (8, 4)) is None


def test_a_known_part_wins_over_words():
    parts = [part("upper", "red shirt", MASK), part("lower", "blue trousers", ~MASK)]
    np.testing.assert_array_equal(find_mask("crimson top", parts, (8, 4), name="upper"), MASK)
    np.testing.assert_array_equal(find_mask("red shirt", parts, (8, 4), name="hat"), MASK)


@pytest.mark.covers(188)
def test_part_names_come_from_the_ids_of_phrases():
    captions = pd.DataFrame(
        [
            {"caption_id": "i-t0", "kind": "full", "parent_id": None, "char_start": None, "char_end": None},
            {"caption_id": "i-t0-p0-upper", "kind": "phrase", "parent_id": "i-t0", "char_start": 2, "char_end": 8},
        ]
    )
    assert part_names(captions) == {("i-t0", 2, 8): "upper"}


def test_a_hidden_part_has_no_mask():
    assert find_mask("red shirt", [part("upper", "red shirt", np.zeros_like(MASK))], (8, 4)) is None


def tables_of(relevance, phrase="red shirt"):
    explained = pd.DataFrame(
        {
            "char_start": 0,
            "char_end": 9,
            "query_id": [f"q{n}" for n in range(len(relevance))], "image_id": "i", "phrase": phrase, "grid_h": 8,
            "grid_w": 4, "relevance": [r.ravel() for r in relevance],
        }
    )  # fmt: skip
    parts = pd.DataFrame([{"image_id": "i", "part": "upper", "phrase": "red shirt", "mask": encode_mask(MASK)}])
    images = pd.DataFrame([{"image_id": "i", "person_id": "d:1", "height": 8, "width": 4}])
    return explained, parts, images


@pytest.mark.covers(188)
def test_the_table_of_scores_holds_controls_and_differences():
    scores = score_explanations(*tables_of([MASK.astype(np.float32)] * 3))
    assert len(scores) == 3
    assert set(scores["area"]) == {SHARE}
    assert (scores["pointing"] == 1).all()
    assert scores["pointing.random"].to_numpy() == pytest.approx(SHARE)
    found = summarise_grounding(scores)
    assert found["pointing"].value == 1.0
    assert found["pointing-random"].value == pytest.approx(1 - SHARE)
    assert found["pointing-random"].low > 0
    assert found["iou.pooled"].value == 1.0


def test_phrases_without_a_part_are_left_out():
    scores = score_explanations(*tables_of([MASK.astype(np.float32)], phrase="long hair"))
    assert scores.empty
    assert summarise_grounding(scores) == {}
