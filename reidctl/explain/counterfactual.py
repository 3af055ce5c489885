"""Counterfactual masking: what happens to a ranking when the patches that a map names are removed.

    drop = s(q, x) - s(q, fill(x, top patches of the map)),  likewise for rank, rank-1 and average precision.

Only the target image is encoded again (or all right images of the query), every other gallery vector stays. The same
number of patches, chosen by something else and filled alike, is the control; a claim holds where the interval of the
paired difference excludes 0. Interpretability protocol of papers.md 4.8; masking as in Samek et al. 2017.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from reidctl import tables
from reidctl.explain.controls import Chosen, Grid, Ints, Key, Maps, Plan, order_patches, pair_seed, patch_count
from reidctl.explain.fills import Fill, Pictures, make_fill
from reidctl.explain.masking import (
    Advance,
    Chunk,
    Floats,
    Judge,
    Parts,
    Study,
    embed_masked,
    gallery_scores,
    intact_scores,
    masked_scores,
    run_chunks,
)
from reidctl.explain.summaries import summary_rows
from reidctl.metrics import expected_metrics
from reidctl.retrieval.products import lattice
from reidctl.schemas import SCHEMAS

_PARTS = Parts(
    "parquet",
    lambda path: tables.read_table(path, "faithfulness"),
    lambda path, frame: tables.write_table(path, "faithfulness", frame),
)
_GAPS = [
    "query_id",
    "image_id",
    "person_id",
    "judge",
    "explainer",
    "control",
    "fill",
    "removed",
    "phrase",
    "specificity",
]


def images_per_pair(study: Study) -> int:
    """Return the images that `measure` masks for one pair, equal masks counted each time."""
    return 1 + len(study.plan.fills) * len(study.plan.fractions) * study.orders


def count_images(study: Study) -> int:
    """Return what `measure` advances by in total: all masked images, those counted too that it need not encode."""
    return len(study.pairs) * images_per_pair(study)


def measure(
    study: Study, *, chunk: int | None = None, folder: Path | None = None, key: str = "", advance: Advance | None = None
) -> pd.DataFrame:
    """Return the rows of table `faithfulness`: every pair, explainer, control, fill and fraction, draws averaged.

    The row of an explainer with `removed` 0, no control and no fill holds the intact picture, encoded by the same
    model. Pairs without a map of an explainer have no rows of it; a control that is not available for a pair has none.

    Args:
        study: what to measure.
        chunk: pairs between two parts; by default about 4,096 images. Results do not depend on it.
        folder: finished parts are kept here, and a second call makes only the missing ones.
        key: what else a result depends on, such as the digest of the weights or the version of a plug-in; parts of
            another key are left alone.
        advance: called with the number of images done; see `count_images`.

    Raises:
        DataError: a picture cannot be read, or a part cannot be written.
        UsageError: a plug-in fill returns something else than pictures, or, with the scope `all_positives`, a query
            has two maps of one image.
    """
    parts = list(measure_parts(study, chunk=chunk, folder=folder, key=key, advance=advance))
    return pd.concat(parts, ignore_index=True) if parts else tables.empty("faithfulness")


def measure_parts(
    study: Study, *, chunk: int | None = None, folder: Path | None = None, key: str = "", advance: Advance | None = None
) -> Iterator[pd.DataFrame]:
    """Yield the rows of `measure` chunk by chunk, in little memory."""
    gallery = lattice(study.pairs.gallery, torch.device("cpu"))
    images = images_per_pair(study)
    for _, frame in run_chunks(
        study,
        lambda made, step: _measure_chunk(study, made, gallery, step),
        _PARTS,
        images=images,
        chunk=chunk,
        folder=folder,
        key=key,
        advance=advance,
    ):
        yield frame


@dataclass(frozen=True)
class Places:
    """Where the right images of a query stand in V rankings, in each of which some of them have new scores.

    Attributes:
        before: images that score higher than each right image, int64 (V, R).
        tied: images with exactly its score, itself included, int64 (V, R).
        rank: expected rank of each re-scored image among the gallery, from 1, shape (k, V).
    """

    before: Ints
    tied: Ints
    rank: Floats


def find_places(scores: Floats, right: Ints, target: Ints, new: Floats) -> Places:
    """Return the places of all right images when `target` images get new scores and the others keep theirs.

    Args:
        scores: of the query with the gallery, shape (G,).
        right: gallery rows of the query's person, shape (R,).
        target: those among them that are scored anew, shape (k,).
        new: their new scores, shape (k, V).
    """
    kept = np.sort(np.delete(scores, target))
    of_target = [int(np.flatnonzero(right == row)[0]) for row in target.tolist()]
    value = np.repeat(scores[right][:, None], new.shape[1], axis=1)  # (R, V)
    value[of_target] = new
    above, not_below = np.searchsorted(kept, value, side="right"), np.searchsorted(kept, value, side="left")
    # Among the kept ones an image that was not scored anew counts itself; the new ones are compared apart.
    before = len(kept) - above + (new[:, None] > value[None]).sum(axis=0)
    tied = above - not_below + (new[:, None] == value[None]).sum(axis=0)
    rank = (1 + before + (tied - 1) / 2)[of_target]
    return Places(before.T.astype(np.int64), tied.T.astype(np.int64), rank)


def _outcomes(study: Study, chunk: Chunk, score: Floats, gallery: Tensor) -> Floats:
    """Rank of the target, rank-1 and average precision of the query behind every score (p, V), shape (3, p, V)."""
    pairs, variants = study.pairs, score.shape[1]
    groups = _groups(study, chunk)
    scores = gallery_scores(pairs.query[chunk.rows[[group[0] for group in groups]]], gallery)
    missing = np.isnan(score)
    result = np.empty((3, *score.shape))
    found: list[Places] = []
    for group, row in zip(groups, scores, strict=True):
        missing[group] = missing[group].any(axis=0)
        members = chunk.rows[group]
        places = find_places(row, pairs.right[members[0]], pairs.target[members], np.nan_to_num(score[group]))
        result[0, group] = places.rank
        found.append(places)
    query = [np.repeat(np.arange(variants) + n * variants, p.before.shape[1]) for n, p in enumerate(found)]
    before, tied = ([getattr(p, name).ravel() for p in found] for name in ("before", "tied"))
    made = expected_metrics(*map(np.concatenate, (query, before, tied)), queries=len(groups) * variants, cutoffs=(1,))
    for number, group in enumerate(groups):
        some = slice(number * variants, (number + 1) * variants)
        result[1, group], result[2, group] = made.hits[1][some], made.average_precision[some]
    result[:, missing] = np.nan
    return result


def _groups(study: Study, chunk: Chunk) -> list[list[int]]:
    """Which pairs of a chunk are masked together: every one alone, or all of one query."""
    if study.plan.scope == "target":
        return [[number] for number in range(len(chunk.rows))]
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(chunk.rows.tolist()):
        groups.setdefault(study.pairs.query_id[row], []).append(number)
    return list(groups.values())


def _measure_chunk(study: Study, chunk: Chunk, gallery: Tensor, advance: Advance) -> pd.DataFrame:
    plan, pairs = study.plan, len(chunk.rows)
    counts = np.array([patch_count(fraction, study.grid[0] * study.grid[1]) for fraction in plan.fractions])
    removed = chunk.orders.place[:, :, None] < counts[:, None]  # (p, K, R, N)
    assert (removed.sum(axis=-1) == counts)[~chunk.orders.missing].all(), "a control has another number of patches"
    intact = intact_scores(study, chunk, advance)
    masked = np.stack([masked_scores(study, chunk, fill, removed, advance) for fill in plan.fills], axis=1)
    score = np.concatenate([intact[:, None], masked.reshape(pairs, -1)], axis=1)  # (p, 1 + F K R)
    measured = np.concatenate([score[None], _outcomes(study, chunk, score, gallery)])  # (4, p, 1 + F K R)
    measured[0, np.isnan(measured[1])] = np.nan  # masked together with a picture that has no such map
    every = measured[:, :, 1:].reshape(4, *masked.shape)  # (4, p, F, K, R)
    mean = {key: every[:, :, :, slot].mean(axis=3) for key, slot in chunk.orders.slots().items()}
    return _frame(study, chunk.rows, measured[:, :, 0], mean)


def _frame(study: Study, rows: Ints, intact: Floats, mean: Mapping[Key, Floats]) -> pd.DataFrame:
    """The table's rows, pair by pair; `intact` is (4, p), the values of `mean` are (4, p, F, R)."""
    plan, pieces = study.plan, []
    sweep = [(fill, fraction) for fill in plan.fills for fraction in plan.fractions]
    for explainer in study.maps:
        here = ~np.isnan(mean[explainer, ""][0, :, 0, 0])
        pieces.append(_piece((explainer, ""), [("", 0.0)], intact[:, :, None], here))
        for control in ("", *plan.controls):
            values = mean.get((explainer, control), mean.get(("", control)))
            if values is not None:
                flat = values.reshape(4, len(rows), -1)  # (4, p, F R)
                pieces.append(_piece((explainer, control), sweep, flat, here & ~np.isnan(flat[0, :, 0])))
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    order = np.argsort(columns["pair"], kind="stable")
    return _typed(study, rows, intact[0], {name: values[order] for name, values in columns.items()})


def _typed(study: Study, rows: Ints, intact: Floats, columns: dict[str, npt.NDArray[Any]]) -> pd.DataFrame:
    """The table of columns, in the types of a part that is read: a run that was stopped ends with the same frame."""
    pair = columns.pop("pair")
    for name in ("query_id", "image_id", "person_id"):
        columns[name] = np.array([getattr(study.pairs, name)[row] for row in rows.tolist()], object)[pair]
    columns["judge"] = np.full(len(pair), study.judge.name, object)
    columns["drop"] = intact[pair] - columns["score"]
    columns |= {name: columns[name].astype(np.float32) for name in ("removed", "score", "drop")}
    found = {name: columns[name] for name in SCHEMAS["faithfulness"].names}
    return pd.DataFrame({name: pd.Series(values, dtype=values.dtype) for name, values in found.items()})


def _piece(key: Key, sweep: Sequence[tuple[str, float]], values: Floats, here: Chosen) -> dict[str, npt.NDArray[Any]]:
    """Rows of one explainer and control as columns; `values` is (4, p, sweep), pairs outside `here` are left out."""
    pair = np.repeat(np.flatnonzero(here), len(sweep))
    times = int(here.sum())
    columns: dict[str, npt.NDArray[Any]] = {"pair": pair}
    columns |= {
        name: np.full(len(pair), text, object) for name, text in zip(("explainer", "control"), key, strict=True)
    }
    columns["fill"] = np.tile(np.array([fill for fill, _ in sweep], object), times)
    columns["removed"] = np.tile([fraction for _, fraction in sweep], times)
    measured = zip(("score", "rank", "first", "ap"), values, strict=True)
    return columns | {name: table[here].ravel() for name, table in measured}


def summarise(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the rows of table `interpretability` that a table `faithfulness` amounts to.

    `similarity_drop`, `rank_shift` (rank after masking minus before), `rank1_drop` and `mAP_drop` of every explainer,
    fill and fraction: of the map, of each control, and the paired difference; see `summaries.summary_rows`.
    """
    names = ["query_id", "image_id", "judge", "explainer"]
    intact = frame[frame["removed"] == 0].groupby(names, as_index=False)[["rank", "first", "ap"]].mean()
    masked = frame[frame["removed"] > 0].merge(intact, on=names, suffixes=("", "_intact"))
    values = masked[["query_id", "person_id", "judge", "explainer", "control", "fill", "removed"]].assign(
        similarity_drop=masked["drop"],
        rank_shift=masked["rank"] - masked["rank_intact"],
        rank1_drop=masked["first_intact"] - masked["first"],
        mAP_drop=masked["ap_intact"] - masked["ap"],
    )
    return summary_rows(values, ("similarity_drop", "rank_shift", "rank1_drop", "mAP_drop"), seed=seed)


@dataclass(frozen=True)
class PhraseMaps:
    """The phrases of one caption and where each is seen in one image.

    Args:
        query_id, image_id, person_id: names.
        row: gallery row of the image.
        maps: one per phrase by explainer, each (K, N).
    """

    query_id: str
    image_id: str
    person_id: str
    row: int
    maps: Mapping[str, Maps]


ScorePhrases = Callable[[Tensor, Tensor | None, PhraseMaps], Tensor]
"""(images (B, 3, H, W), patches to keep bool (B, N) or None, caption) -> score of each of its phrases (B, K)."""


def measure_specificity(
    score: ScorePhrases,
    judge: Judge,
    captions: Sequence[PhraseMaps],
    plan: Plan,
    *,
    grid: Grid,
    advance: Advance | None = None,
) -> pd.DataFrame:
    """Return how much more masking a phrase's patches lowers its own score than those of the caption's other phrases.

    gap_k = drop_k(k) - mean_{l ≠ k} drop_l(k),  drop_l(j) = s_l(x) - s_l(fill(x, top patches of phrase j))

    The control `phrase` puts the regions of the other phrases in the place of k's own, with the mean of them:
    (mean_{j ≠ k} drop_k(j)) - (mean_{l ≠ k, j ≠ k} drop_l(j)); `random` puts random patches there. Other controls of
    the plan are not used, nor is its scope, and the fill `swap` is not possible. Captions with fewer than two phrases
    are left out, and so are explainers without a map of each.

    Args:
        score: similarity of masked images with each phrase of a caption.
        judge: where the pictures come from; its `embed` is not used.
        captions: what is explained.
        plan: fractions, fills, draws and seed.
        grid: (h, w) of the maps.
        advance: called with the number of captions done.

    Returns:
        One row per phrase, explainer, control, fill and fraction: query_id, image_id, person_id, judge, explainer,
        control, fill, removed, phrase (its number in the caption), specificity (the gap).
    """
    frames = []
    for caption in captions:
        maps = {name: rows for name, rows in caption.maps.items() if len(rows) > 1 and not np.isnan(rows).any()}
        if maps:
            frames.append(_specificity(score, judge, replace(caption, maps=maps), plan, grid))
        if advance:
            advance(1)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_GAPS)


def _specificity(score: ScorePhrases, judge: Judge, caption: PhraseMaps, plan: Plan, grid: Grid) -> pd.DataFrame:
    pictures, place = _phrase_orders(judge, caption, plan, grid)  # place: (V, N), V = draws + E K
    counts = np.array([patch_count(fraction, place.shape[1]) for fraction in plan.fractions])
    removed = place < counts[:, None, None]  # (R, V, N)
    pieces = []
    for fill in plan.fills:
        drops = _phrase_drops(score, judge, caption, make_fill(fill, pictures), removed.reshape(-1, place.shape[1]))
        for fraction, part in zip(plan.fractions, np.split(drops, len(counts)), strict=True):
            pieces.append(_gaps(part, caption.maps, plan).assign(fill=fill, removed=np.float32(fraction)))
    facts = {name: getattr(caption, name) for name in ("query_id", "image_id", "person_id")}
    return pd.concat(pieces, ignore_index=True).assign(**facts, judge=judge.name)[_GAPS]


def _phrase_orders(judge: Judge, caption: PhraseMaps, plan: Plan, grid: Grid) -> tuple[Pictures, Ints]:
    """The caption's picture, and the orders of its patches: random ones, then those of each explainer's phrases."""
    seed = pair_seed(caption.query_id, caption.image_id)
    pictures = Pictures(
        judge.store[caption.row][None],
        grid=grid,
        mean=judge.mean,
        std=judge.std,
        tower_grid=judge.grid,
        seeds=[(plan.seed, pair_seed("", caption.image_id))],
        device=judge.device,
    )
    blank = np.zeros((plan.draws, grid[0] * grid[1]), np.float32)
    orders = [order_patches(rows, np.random.default_rng((plan.seed, seed))) for rows in (blank, *caption.maps.values())]
    return pictures, np.concatenate(orders)


def _phrase_drops(score: ScorePhrases, judge: Judge, caption: PhraseMaps, fill: Fill, removed: Chosen) -> Floats:
    """How much each masking (V, N) lowers the score of each phrase, shape (V, K)."""
    asked = replace(judge, embed=lambda images, keep, _: score(images, keep, caption))
    rows, whole = np.array([caption.row]), np.concatenate([np.zeros_like(removed[:1]), removed])
    made = embed_masked(asked, fill, rows, np.zeros(len(whole), np.int64), whole)
    scores = made.double().numpy()
    return np.asarray(scores[0] - scores[1:])


def _gaps(drops: Floats, maps: Mapping[str, Maps], plan: Plan) -> pd.DataFrame:
    """The gap of each phrase under its own mask, under those of other phrases and under random ones."""
    phrases = drops.shape[1]
    # own - mean of the others, for every mask and phrase
    gap = drops - (drops.sum(axis=1, keepdims=True) - drops) / (phrases - 1)
    random, pieces = gap[: plan.draws].mean(axis=0), []
    for number, explainer in enumerate(maps):
        square = gap[plan.draws + number * phrases :][:phrases]  # (mask j, phrase k)
        own = np.diagonal(square)
        values = {"": own, "random": random, "phrase": (square.sum(axis=0) - own) / (phrases - 1)}
        for control, specificity in values.items():
            if control in ("", *plan.controls):
                facts = {"explainer": explainer, "control": control, "phrase": np.arange(phrases)}
                pieces.append(pd.DataFrame({**facts, "specificity": specificity}))
    return pd.concat(pieces, ignore_index=True)


def summarise_specificity(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the rows of table `interpretability` for the metric `specificity`."""
    return summary_rows(frame, ("specificity",), seed=seed)
