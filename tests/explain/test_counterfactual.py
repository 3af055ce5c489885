"""Counterfactual masking: exact rankings behind every mask, planted truths, and runs that go on after a kill."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from explain.planted import GRID, MEAN, REGIONS, STD, Looker, N, oracle, study, world
from torch.nn import functional

from reidctl import tables
from reidctl.backbones.base import dropping
from reidctl.backbones.weights import build
from reidctl.errors import DataError, UsageError
from reidctl.explain.controls import CONTROLS, Plan, order_pairs, pair_seed, patch_count, pick_donors
from reidctl.explain.counterfactual import (
    PhraseMaps,
    count_images,
    find_places,
    measure,
    measure_parts,
    measure_specificity,
    summarise,
    summarise_specificity,
)
from reidctl.explain.fills import Pictures, make_fill
from reidctl.explain.masking import Judge, Pairs, Study
from reidctl.explain.summaries import intervals, summary_rows
from reidctl.metrics import bootstrap_interval, expected_metrics

PLAN = Plan(fractions=(1 / 12, 1 / 6), fills=("mean",), controls=("random", "block", "centre", "least", "shifted"))
LINE = ["query_id", "image_id", "explainer", "control", "fill", "removed"]


def rows_of(summary, **wanted):
    for name, value in wanted.items():
        column = summary[name]
        summary = summary[np.isclose(column.astype(float), value) if isinstance(value, float) else column == value]
    return summary


@pytest.fixture(scope="module")
def planted():
    """Four explainers of a model that looks at one corner: the truth, its opposite, noise and nothing."""
    pixels = world(people=40)
    rng = np.random.default_rng(3)
    other = {("oracle", "phrase"): np.tile(oracle(REGIONS[1]), (40, 1)), ("oracle", "query"): rng.random((40, N))}
    other["", "pooled"] = np.tile(oracle(REGIONS[0]), (40, 1))
    maps = {
        "oracle": oracle(REGIONS[0]),
        "wrong": oracle(REGIONS[3]),
        "noise": rng.random((40, N)).astype(np.float32),
        "flat": np.ones(N, np.float32),
    }
    plan = Plan(fractions=(1 / 12, 1 / 6), controls=CONTROLS)
    return measure(study(pixels, maps, plan, others={key: v.astype(np.float32) for key, v in other.items()}))


@pytest.fixture(scope="module")
def summary(planted):
    return summarise(planted)


@pytest.mark.covers(183)
@pytest.mark.parametrize("metric", ["similarity_drop", "rank_shift", "rank1_drop", "mAP_drop"])
def test_the_true_region_hurts_more_than_every_control(summary, metric):
    found = rows_of(summary, explainer="oracle", metric=metric, kind="difference", removed=1 / 6)
    assert set(found["control"]) == set(CONTROLS)
    for row in found[found["control"] != "pooled"].itertuples():
        assert row.low > 0, row.control
    assert found.loc[found["control"] == "pooled", "value"].item() == 0.0  # the same patches


@pytest.mark.covers(183)
def test_a_wrong_region_hurts_less_than_random_patches(summary):
    found = rows_of(summary, explainer="wrong", metric="similarity_drop", kind="difference")
    assert (found.loc[found["control"] == "random", "high"] < 0).all()
    own = rows_of(summary, explainer="wrong", metric="similarity_drop", kind="value")
    assert (own["value"] == 0).all()  # the model never looks there


def test_a_map_without_meaning_hurts_as_much_as_random_patches(planted):
    for name in ("noise", "flat"):
        drops = planted[(planted["explainer"] == name) & (planted["removed"] > 0)]
        wide = drops.pivot(index=["query_id", "removed"], columns="control", values="drop")
        for _, part in (wide[""] - wide["random"]).groupby("removed"):
            assert abs(part.mean()) < 4 * part.std() / np.sqrt(len(part))


@pytest.mark.covers(191)
def test_the_same_concentration_in_another_place_does_less_damage(summary):
    found = rows_of(summary, explainer="oracle", metric="similarity_drop", control="shifted")
    own = rows_of(summary, explainer="oracle", metric="similarity_drop", kind="value")
    assert (found.loc[found["kind"] == "difference", "low"] > 0).all()
    assert (found.loc[found["kind"] == "control", "high"].to_numpy() < own["low"].to_numpy()).all()


def test_the_table_is_one_that_can_be_written(planted, summary, tmp_path):
    tables.write_table(tmp_path / "f.parquet", "faithfulness", planted)
    pd.testing.assert_frame_equal(tables.read_table(tmp_path / "f.parquet", "faithfulness"), planted)
    tables.write_table(tmp_path / "s.parquet", "interpretability", summary)
    assert set(tables.read_table(tmp_path / "s.parquet", "interpretability")["items"]) == {40}


def slow_rows(given):
    """Every row of `measure` from whole score lists, one mask at a time: {line: (score, drop, rank, first, ap)}."""
    pairs, plan, judge = given.pairs, given.plan, given.judge
    m = len(pairs)
    seeds = [pair_seed(pairs.query_id[row], pairs.image_id[row]) for row in range(m)]
    orders = order_pairs(plan, np.arange(m), seeds, given.maps, given.others, GRID)

    def score(row, vector):
        # The engine's scores are of vectors rounded to 2^-26; in whole numbers they are exact.
        a, b = (np.round(v.astype(np.float64) * 2**26).astype(object) for v in (pairs.query[row], vector))
        return int((a * b).sum()) / 2**52

    def vectors(fill, removed):  # (M, N) -> (M, D)
        pictures = Pictures(
            np.stack([judge.store[row] for row in pairs.target]),
            GRID,
            MEAN,
            STD,
            seeds=[(plan.seed, pair_seed("", name)) for name in pairs.image_id],
            donors=None if pairs.donor is None else np.stack([judge.store[row] for row in pairs.donor]),
        )
        images, keep = make_fill(fill, pictures)(torch.arange(m), torch.from_numpy(removed))
        return judge.embed(images, keep, pairs.target).numpy()

    def outcome(new):
        found = []
        for row in range(m):
            scores = np.array([score(row, vector) for vector in pairs.gallery])
            together = (
                [row] if plan.scope == "target" else [k for k in range(m) if pairs.query_id[k] == pairs.query_id[row]]
            )
            for member in together:
                scores[pairs.target[member]] = score(row, new[member])
            own = scores[pairs.target[row]]
            rank = 1 + (scores > own).sum() + ((scores == own).sum() - 1) / 2
            right = scores[pairs.right[row]]
            before, tied = (scores > right[:, None]).sum(axis=1), (scores == right[:, None]).sum(axis=1)
            one = expected_metrics(np.zeros(len(right), np.int64), before, tied, queries=1)
            found.append((own, rank, one.hits[1][0], one.average_precision[0]))
        return np.array(found)

    nothing = np.zeros((m, N), bool)
    intact, lines = outcome(vectors("", nothing)), {}

    def keep_(explainer, control, fill, fraction, values):
        for row in range(m):
            own, rank, first, ap = values[row]
            line = (pairs.query_id[row], pairs.image_id[row], explainer, control, fill, np.float32(fraction))
            lines[line] = (own, intact[row, 0] - own, rank, first, ap)

    for explainer in given.maps:
        keep_(explainer, "", "", 0.0, intact)
        for control in ("", *plan.controls):
            key = (explainer, control) if (explainer, control) in orders.slots() else ("", control)
            for fill in plan.fills:
                for fraction in plan.fractions:
                    places = orders.place[:, orders.slots()[key]]
                    made = [
                        outcome(vectors(fill, places[:, k] < patch_count(fraction, N))) for k in range(places.shape[1])
                    ]
                    keep_(explainer, control, fill, fraction, np.mean(made, axis=0))
    return lines


def check_against_slow(given):
    frame = measure(given, chunk=3)
    slow = slow_rows(given)
    assert len(frame) == len(slow)
    for row in frame.itertuples():
        line = tuple(getattr(row, name) for name in LINE)
        score, drop, rank, first, ap = slow[(*line[:-1], np.float32(row.removed))]
        assert (row.score, row.drop) == (pytest.approx(score, abs=1e-6), pytest.approx(drop, abs=1e-6)), line
        assert (row.rank, row.first, row.ap) == pytest.approx((rank, first, ap), abs=1e-9), line


def varied(fills, scope, *, every, people=4, **changes):
    each = 3 if every else 2
    pixels = world(people=people, each=each, twins=True)
    count = people * each if every else people
    maps = {"a": np.random.default_rng(1).random((count, N)).astype(np.float32).round(1), "b": oracle(REGIONS[0])}
    plan = replace(PLAN, fills=fills, scope=scope, fractions=(1 / 6, 0.5), controls=("random", "shifted", "least"))
    target = np.arange(count) if every else np.arange(0, count * each, each)
    donor = pick_donors([f"p{row // each}" for row in range(len(pixels))], target)
    return study(pixels, maps, plan, each=each, every=every, donor=donor, noise=0.0, **changes)


@pytest.mark.covers(183, 185)
@pytest.mark.parametrize("fill", ["mean", "zero", "blur", "noise", "drop", "swap", "plugin:explain.test_fills:invert"])
def test_every_row_equals_a_ranking_of_the_whole_gallery(fill, monkeypatch):
    if fill.startswith("plugin"):
        monkeypatch.setattr("explain.test_fills.SIZE", (24, 16))
    check_against_slow(varied((fill,), "target", every=False))


def test_every_row_equals_a_ranking_of_the_whole_gallery_when_all_right_images_are_masked():
    given = varied(("mean",), "all_positives", every=True, people=3)
    check_against_slow(given)
    # It is another question than masking one of them.
    alone = measure(replace(given, plan=replace(given.plan, scope="target")))
    assert (alone["ap"] - measure(given)["ap"]).abs().max() > 0.01


def test_places_with_ties_are_worked_by_hand():
    scores = np.array([0.9, 0.5, 0.5, 0.2, 0.7])
    right = np.array([1, 3])  # a target at 1, another right image at 3
    places = find_places(scores, right, np.array([1]), np.array([[0.5, 0.9, 0.2, 1.0]]))
    assert places.rank.tolist() == [[3.5, 1.5, 4.5, 1.0]]
    assert places.before.tolist() == [[2, 4], [0, 4], [3, 3], [0, 4]]
    assert places.tied.tolist() == [[2, 1], [2, 1], [2, 2], [1, 1]]


@pytest.mark.covers(184)
def test_only_new_masks_are_encoded_and_controls_are_shared_by_all_explainers():
    maps = {"oracle": oracle(REGIONS[0]), "wrong": oracle(REGIONS[1])}
    plan = replace(PLAN, controls=("random", "block", "centre"), fractions=(1 / 6,))
    alone, both = Looker(), Looker()
    pixels = world(people=6)
    measure(study(pixels, {"oracle": maps["oracle"]}, plan, embed=alone))
    frame = measure(study(pixels, maps, plan, embed=both))
    # Per pair: intact, the map, ten random ones, three blocks and the centre, less what happens to be equal.
    assert 6 * 14 <= alone.images <= 6 * 16
    assert both.images <= alone.images + 6
    shared = frame[frame["control"] == "random"].set_index("query_id")["score"]
    assert (shared.groupby(level=0).nunique() == 1).all()


def test_batches_are_full():
    looker = Looker()
    measure(study(world(people=8), {"oracle": oracle(REGIONS[0])}, PLAN, embed=looker, batch=50))
    assert looker.calls[0] == 8  # the intact pictures
    assert all(call == 50 for call in looker.calls[1:-1]) and len(looker.calls) > 4


def test_progress_ends_at_the_count_that_was_promised():
    steps = []
    given = study(world(people=6), {"oracle": oracle(REGIONS[0]), "flat": np.ones(N, np.float32)}, PLAN)
    measure(given, chunk=4, advance=steps.append)
    assert sum(steps) == count_images(given) == 6 * (1 + 2 * ((10 + 3 + 1) + 2 * (1 + 1 + 3)))


def test_results_depend_neither_on_batch_nor_on_chunk():
    maps = {"flat": np.ones(N, np.float32)}
    plan = replace(PLAN, fills=("mean", "noise"))
    frames = [measure(study(world(people=5), maps, plan, batch=b), chunk=c) for b, c in ((7, 1), (64, 2), (1000, 5))]
    for other in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], other)


def test_a_pair_s_rows_do_not_depend_on_the_other_pairs():
    pixels, flat = world(people=5), np.ones(N, np.float32)
    whole = study(pixels, {"flat": flat}, PLAN)
    pairs = whole.pairs
    fewer = replace(
        pairs,
        **{
            name: getattr(pairs, name)[2:4]
            for name in ("query_id", "image_id", "person_id", "query", "target", "right")
        },
    )
    part = measure(replace(whole, pairs=fewer, maps={"flat": np.tile(flat, (2, 1))}))
    expected = measure(whole)
    expected = expected[expected["query_id"].isin(fewer.query_id)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    pixels, maps = world(people=6), {"flat": np.ones(N, np.float32)}
    whole = Looker()
    expected = measure(study(pixels, maps, PLAN, embed=whole), chunk=2)
    killed = Looker(stop=whole.images * 5 // 6)
    with pytest.raises(KeyboardInterrupt):
        measure(study(pixels, maps, PLAN, embed=killed), chunk=2, folder=tmp_path)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    rest, steps = Looker(), []
    given = study(pixels, maps, PLAN, embed=rest)
    found = measure(given, chunk=2, folder=tmp_path, advance=steps.append)
    pd.testing.assert_frame_equal(found, expected)
    assert 0 < rest.images <= whole.images // 2
    assert sum(steps) == count_images(given)
    again = Looker()
    pd.testing.assert_frame_equal(measure(study(pixels, maps, PLAN, embed=again), chunk=2, folder=tmp_path), expected)
    assert again.images == 0


def test_parts_of_other_inputs_are_not_taken(tmp_path):
    pixels = world(people=3)
    first = study(pixels, {"flat": np.ones(N, np.float32)}, PLAN)
    measure(first, folder=tmp_path, key="weights a")
    changes = [
        (first, "weights b"),
        (replace(first, plan=replace(PLAN, seed=1)), "weights a"),
        (replace(first, maps={"flat": np.full((3, N), 2, np.float32)}), "weights a"),
        (replace(first, pairs=replace(first.pairs, query=first.pairs.query[::-1].copy())), "weights a"),
        (replace(first, judge=replace(first.judge, name="other")), "weights a"),
    ]
    for count, (given, key) in enumerate(changes, start=2):
        measure(given, folder=tmp_path, key=key)
        assert len(list(tmp_path.iterdir())) == count


def test_what_is_missing_is_left_out():
    pixels = world(people=4)
    heat = np.tile(oracle(REGIONS[0]), (4, 1))
    heat[1] = np.nan
    other = np.tile(oracle(REGIONS[1]), (4, 1))
    other[2] = np.nan
    plan = replace(PLAN, controls=("random", "phrase", "query"))
    frame = measure(
        study(pixels, {"oracle": heat, "flat": np.ones(N, np.float32)}, plan, others={("oracle", "phrase"): other})
    )
    assert set(frame.loc[frame["explainer"] == "oracle", "query_id"]) == {"q0", "q2", "q3"}
    assert set(frame.loc[frame["control"] == "phrase", "query_id"]) == {"q0", "q3"}
    assert set(frame.loc[frame["explainer"] == "flat", "control"]) == {"", "random"}
    summary = summarise(frame)
    counts = summary[(summary["metric"] == "similarity_drop") & (summary["explainer"] == "oracle")]
    assert set(counts.loc[counts["control"] == "phrase", "items"]) == {2}
    assert set(counts.loc[counts["control"] == "random", "items"]) == {3}


def test_right_images_are_masked_together_or_not_at_all():
    given = varied(("mean",), "all_positives", every=True, people=3)
    heat = given.maps["a"].copy()
    heat[4] = np.nan  # the second of the three images of the second query
    frame = measure(replace(given, maps={**given.maps, "a": heat}))
    assert set(frame.loc[frame["explainer"] == "a", "query_id"]) == {"q0", "q2"}
    assert set(frame.loc[frame["explainer"] == "b", "query_id"]) == {"q0", "q1", "q2"}
    assert not frame.isna().any(axis=None)


def test_a_study_that_does_not_fit_is_refused():
    pixels, flat = world(people=3), {"flat": np.ones(N, np.float32)}
    with pytest.raises(UsageError, match="swap"):
        study(pixels, flat, replace(PLAN, fills=("swap",)))
    with pytest.raises(UsageError, match="every patch"):
        study(pixels, flat, replace(PLAN, fills=("drop",), fractions=(1.0,)))
    with pytest.raises(UsageError, match="flat"):
        study(pixels, {"flat": np.ones((2, N), np.float32)}, PLAN)
    with pytest.raises(UsageError, match="no maps"):
        study(pixels, {}, PLAN)
    given = study(pixels, flat, PLAN)
    with pytest.raises(DataError, match="`i0`"):
        replace(given, pairs=replace(given.pairs, right=[np.array([1])] * 3))
    twice = replace(given.pairs, query_id=["q0"] * 3, target=np.zeros(3, np.int64), right=[np.array([0, 1])] * 3)
    with pytest.raises(UsageError, match="two maps"):
        measure(replace(given, pairs=twice, plan=replace(PLAN, scope="all_positives")))


def test_no_pairs_give_no_rows():
    given = study(world(people=2), {"flat": np.ones(N, np.float32)}, PLAN)
    pairs = Pairs([], [], [], given.pairs.query[:0], given.pairs.target[:0], [], given.pairs.gallery)
    empty = measure(replace(given, pairs=pairs, maps={"flat": np.zeros((0, N), np.float32)}))
    assert empty.empty and summarise(empty).empty


@pytest.mark.parametrize("fill", ["mean", "drop"])
def test_a_real_image_tower_is_masked_as_if_by_hand(fill):
    torch.manual_seed(0)
    backbone = build("vit-bert:micro").eval()
    n = backbone.grid[0] * backbone.grid[1]
    pixels = np.random.default_rng(0).integers(0, 256, (4, *backbone.image_size, 3), dtype=np.uint8)

    def embed(images, keep, rows):
        if keep is None:
            return functional.normalize(backbone.encode_image(images).cls[:, 0], dim=1)
        with dropping(backbone.image, keep):
            return functional.normalize(backbone.encode_image(images).cls[:, 0], dim=1)

    judge = Judge(embed, pixels, backbone.mean, backbone.std, backbone.grid)
    images = Pictures(pixels, backbone.grid, backbone.mean, backbone.std).images
    with torch.no_grad():
        gallery = embed(images, None, None).numpy()
    pairs = Pairs(["q"], ["i2"], ["p"], gallery[:1], np.array([2]), [np.array([2])], gallery)
    heat = np.random.default_rng(1).random((1, n)).astype(np.float32)
    plan = Plan(fractions=(0.5,), fills=(fill,), controls=())
    frame = measure(Study(judge, pairs, {"a": heat}, backbone.grid, plan))
    keep = torch.from_numpy(heat < np.sort(heat[0])[n - patch_count(0.5, n)])
    one = images[2:3].clone()
    if fill == "mean":
        h, w = backbone.grid
        cells = keep.reshape(1, 1, h, w).repeat_interleave(one.shape[2] // h, 2).repeat_interleave(one.shape[3] // w, 3)
        one = torch.where(cells, one, torch.zeros(()))
    with torch.no_grad():
        cls = backbone.encode_image(one, keep=keep if fill == "drop" else None).cls[:, 0]
    expected = float(functional.normalize(cls, dim=1)[0] @ torch.from_numpy(gallery[0]))
    assert frame["score"].tolist() == pytest.approx([float(gallery[2] @ gallery[0]), expected], abs=2e-5)
    assert frame["drop"].iloc[1] == pytest.approx(frame["score"].iloc[0] - frame["score"].iloc[1], abs=1e-6)


def hand_frame():
    """Two queries of one person and one of another; the second query has two pairs."""
    lines = []
    for query, person, image, own, control in (
        ("q0", "p0", "i0", 0.4, 0.1),
        ("q1", "p0", "i1", 0.2, 0.3),
        ("q1", "p0", "i2", 0.6, 0.1),
        ("q2", "p1", "i3", 0.9, 0.3),
    ):
        names = {"query_id": query, "image_id": image, "person_id": person, "judge": "", "explainer": "a"}
        lines.append(
            {**names, "control": "", "fill": "", "removed": 0.0, "drop": 0.0, "rank": 2.0, "first": 0.5, "ap": 0.7}
        )
        for name, drop in (("", own), ("random", control)):
            hurt = {"drop": drop, "rank": 2 + 10 * drop, "first": 0.5 - drop / 10, "ap": 0.7 - drop / 2}
            lines.append({**names, "control": name, "fill": "mean", "removed": 0.1, **hurt})
    return pd.DataFrame(lines)


def test_the_summary_is_worked_by_hand():
    found = summarise(hand_frame())

    def value(metric, kind, control=""):
        return rows_of(found, metric=metric, kind=kind, control=control)["value"].item()

    # A query with two images counts once: (0.4 + (0.2 + 0.6) / 2 + 0.9) / 3.
    assert value("similarity_drop", "value") == pytest.approx(1.7 / 3)
    assert value("similarity_drop", "control", "random") == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert value("similarity_drop", "difference", "random") == pytest.approx(1.1 / 3)
    assert value("rank_shift", "difference", "random") == pytest.approx(11 / 3)
    assert value("rank1_drop", "difference", "random") == pytest.approx(0.11 / 3)
    assert value("mAP_drop", "value") == pytest.approx(0.85 / 3)
    assert len(found) == 4 * 3 and set(found["items"]) == {3}


def test_intervals_are_those_of_the_bootstrap_over_people():
    rng = np.random.default_rng(0)
    values = rng.random((60, 4))
    values[rng.random((60, 4)) < 0.2] = np.nan
    values[:, 1] = np.where(np.isnan(values[:, 0]), np.nan, values[:, 2].mean())
    values[:, 3] = np.nan
    people = np.array([f"p{n % 13}" for n in range(60)], object)
    for column, found in zip(values.T, intervals(values, people, seed=4), strict=True):
        slow = bootstrap_interval(column, people, seed=4)
        assert found.tolist() == pytest.approx([slow.value, slow.low, slow.high], abs=1e-12, nan_ok=True)


def test_a_summary_without_rows_is_an_empty_table():
    assert (
        summary_rows(hand_frame().iloc[:0], ("drop",)).columns.tolist()
        == tables.empty("interpretability").columns.tolist()
    )


def captions_of(pixels, order):
    """Captions of four phrases, one per corner; `order` says whose map each phrase is given."""
    truth = np.stack([oracle(region) for region in REGIONS])
    return [PhraseMaps(f"q{row}", f"i{row}", f"p{row}", row, {"a": truth[order(row)]}) for row in range(len(pixels))]


def part_scores(pixels):
    """Scores of four phrases: how alike each corner is to that of the untouched picture."""
    looker = Looker(REGIONS)

    def score(images, keep, caption):
        now = looker(images, keep, np.zeros(len(images)))[:, :-1].reshape(-1, 4, 3)
        before = torch.from_numpy(looker.of_pixels(pixels[caption.row][None]))[:, :-1].reshape(1, 4, 3)
        return (now * before).sum(dim=2)

    return score


@pytest.mark.covers(187)
def test_masking_a_phrase_s_region_lowers_its_own_score_most():
    pixels = world(people=20, each=1)
    judge = Judge(Looker(), pixels, MEAN, STD, GRID)
    plan = replace(PLAN, fractions=(1 / 6,), controls=("random", "phrase"))
    rng = np.random.default_rng(0)
    true = measure_specificity(part_scores(pixels), judge, captions_of(pixels, lambda _: slice(None)), plan, grid=GRID)
    found = summarise_specificity(true)
    assert rows_of(found, kind="value")["low"].item() > 0.05
    assert (rows_of(found, kind="difference")["low"] > 0).all()
    assert set(found["control"]) == {"", "random", "phrase"}
    mixed = measure_specificity(
        part_scores(pixels), judge, captions_of(pixels, lambda _: rng.permutation(4)), plan, grid=GRID
    )
    shuffled = rows_of(summarise_specificity(mixed), kind="value")
    assert shuffled["low"].item() < 0 < shuffled["high"].item()


@pytest.mark.covers(187)
def test_the_gap_is_worked_by_hand():
    """Two phrases with scores that fall by a known amount for every patch that is gone."""
    pixels = np.full((1, 24, 16, 3), 255, np.uint8)
    weight = torch.tensor([[1.0] * 12 + [0.0] * 12, [0.25] * 24])  # what a patch is worth to each phrase

    def score(images, keep, caption):
        assert caption.query_id == "q"
        return keep.float() @ weight.T

    top = np.arange(N, 0, -1).astype(np.float32)
    caption = PhraseMaps("q", "i", "p", 0, {"a": np.stack([top, -top])})
    plan = replace(PLAN, fractions=(0.25,), fills=("drop",), controls=("random", "phrase"))
    steps = []
    frame = measure_specificity(
        score, Judge(Looker(), pixels, MEAN, STD, GRID), [caption], plan, grid=GRID, advance=steps.append
    )
    assert steps == [1]
    gaps = frame.set_index(["control", "phrase"])["specificity"]
    # Six patches: the first half costs phrase 0 six and phrase 1 a quarter of that, the second half 0 and 1.5.
    assert gaps[""].tolist() == [4.5, 1.5]
    assert gaps["phrase"].tolist() == [-1.5, -4.5]
    assert gaps["random"][0] == -gaps["random"][1]


def test_captions_with_one_phrase_or_a_missing_map_have_no_gap():
    pixels = world(people=2, each=1)
    judge = Judge(Looker(), pixels, MEAN, STD, GRID)
    one = PhraseMaps("q0", "i0", "p0", 0, {"a": oracle(REGIONS[0])[None]})
    lost = PhraseMaps("q1", "i1", "p1", 1, {"a": np.full((2, N), np.nan, np.float32)})
    frame = measure_specificity(part_scores(pixels), judge, [one, lost], PLAN, grid=GRID)
    assert frame.empty and summarise_specificity(frame).empty


def test_parts_come_one_by_one():
    given = study(world(people=5), {"flat": np.ones(N, np.float32)}, PLAN)
    parts = measure_parts(given, chunk=2)
    assert set(next(parts)["query_id"]) == {"q0", "q1"}
    assert given.judge.embed.images < 2 * count_images(given) / 5
