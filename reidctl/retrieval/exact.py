"""Exact search and evaluation in blocks, with the same bits for every block size, thread count and row order.

The usual way to compute similarities, a float32 matrix product, gives other last bits for other block shapes, thread
counts and machines, so near-ties change places. Here the order of two items is decided by exact scores, which are
a function of their vectors alone; the fast float32 product only says which scores need not be looked at, because it
is wrong by less than a proven bound (see `products`).

A ranking is never sorted. For each query the items above and equal to each of its positives are counted
(see `counting`), while the blocks of scores pass by; with them goes the search for the best items.

Memory beyond the inputs and results is about 14·q·g + 20·D·(q + g) + 200·q·(P + top) bytes for blocks of q queries
and g gallery items, P the largest number of relevant items of one query, whatever Q and G are; 40·q·g more where most
scores are nearly equal (a collapsed model). `tests/benchmarks/bench_evaluate.py` measures it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reidctl.errors import UsageError
from reidctl.metrics import CUTOFFS, QueryMetrics, expected_metrics
from reidctl.retrieval.counting import Best, Levels, is_crowded, take_in, take_in_whole
from reidctl.retrieval.crowd import Crowd, crowded_levels
from reidctl.retrieval.labels import Exclude, Labels, Pairs, SamePerson, check_length, keys_of, padded, tie_order
from reidctl.retrieval.products import (
    GALLERY_BLOCK,
    QUERY_BLOCK,
    Gallery,
    Matrix,
    check_vectors,
    full_precision,
    lattice,
)


@dataclass(frozen=True)
class Ranking:
    """The result of `evaluate_ranking`; row i belongs to query i as given.

    Args:
        queries: expected metrics per query, from the full ranking.
        gallery: number of ranked gallery items of each query, dropped ones not counted, shape (Q,).
        index: gallery rows of the best items, best first, shape (Q, top); -1 where the gallery is too small.
        score: their cosines, float32, NaN where `index` is -1.
        match: whether they show the query's person.
    """

    queries: QueryMetrics
    gallery: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    score: Matrix
    match: npt.NDArray[np.bool_]


def evaluate_ranking(
    query: Matrix,
    gallery: Matrix,
    *,
    query_person: Labels,
    gallery_person: Labels,
    query_camera: Labels | None = None,
    gallery_camera: Labels | None = None,
    query_outfit: Labels | None = None,
    gallery_outfit: Labels | None = None,
    query_id: Labels | None = None,
    gallery_id: Labels | None = None,
    exclude: Exclude = "none",
    top: int = 50,
    cutoffs: Sequence[int] = CUTOFFS,
    query_block: int = QUERY_BLOCK,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Ranking:
    """Rank the whole gallery for every query and return metrics and the best items; the Q x G matrix never exists.

    A gallery item of the query's own person is dropped, neither right nor wrong, if `exclude` says that it shares the
    camera, the outfit or the id with the query (Market-1501's rule is `same_camera`; LTCC's settings are `same_camera`
    and `cloth_changing`, which drops the same camera and the same outfit; `same_clothes` drops the same camera and all
    other outfits). A missing label equals nothing.
    Everybody else stays, distractors too. A query with no relevant item left is skipped and counted.

    Args:
        query: vectors of length at most 1 (unit vectors for cosines), shape (Q, D).
        gallery: likewise, shape (G, D).
        query_person: person ids, shape (Q,).
        gallery_person: person ids, shape (G,).
        query_camera: and the other labels: as needed by `exclude`.
        gallery_camera: see `query_camera`.
        query_outfit: see `query_camera`.
        gallery_outfit: see `query_camera`.
        query_id: see `query_camera`.
        gallery_id: orders equal scores in `index`; without it they follow the gallery's rows.
        exclude: which items of the same person are dropped.
        top: how many best items to return.
        cutoffs: the k of rank-k.
        query_block: queries per block.
        gallery_block: gallery items per block.
        device: where products and counts are computed; needs float64.
        advance: called with the number of queries after each block.

    Raises:
        UsageError: an unknown rule, a negative `top`, or an empty block.
        DataError: widths differ, a vector is longer than 1 or not finite, a list of labels has the wrong length, or a
            label that `exclude` needs is absent.
    """
    _check_sizes(top, query_block, gallery_block)
    check_vectors(query, gallery)
    check_length(query_person, len(query), "query person")
    keys = keys_of(
        exclude,
        camera=(query_camera, gallery_camera),
        outfit=(query_outfit, gallery_outfit),
        item=(query_id, gallery_id),
    )
    items = Gallery(gallery, tie_order(gallery_id, len(gallery)), gallery_block, torch.device(device))
    people = SamePerson(query_person, gallery_person, keys, items.order)
    top = min(top, len(gallery))
    result = _empty_result(len(query), len(gallery), top)
    positives: list[tuple[npt.NDArray[np.int64], ...]] = []
    with full_precision(), torch.inference_mode():
        for start in range(0, len(query), query_block):
            part = lattice(query[start : start + query_block], items.device)
            positives.append(_rank_block(part, start, items, people.of(start, start + len(part)), result))
            if advance is not None:
                advance(len(part))
    row, before, tied = (
        (np.concatenate(column) for column in zip(*positives, strict=True))
        if positives
        else 3 * [np.zeros(0, np.int64)]
    )
    result.match[:] = people.matches(result.index)
    queries = expected_metrics(row, before, tied, queries=len(query), cutoffs=cutoffs)
    return Ranking(queries, result.gallery, result.index, result.score, result.match)


def search(
    query: Matrix,
    gallery: Matrix,
    *,
    top: int = 10,
    gallery_id: Labels | None = None,
    query_block: int = QUERY_BLOCK,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Return the gallery rows and cosines of the `top` best items of each query, shapes (Q, min(top, G)), best first.

    Equal scores are ordered by `gallery_id`, or by row without ids. Exact: the same as sorting all scores.

    Raises:
        DataError: widths differ, or a vector is longer than 1 or not finite.
    """
    _check_sizes(top, query_block, gallery_block)
    check_vectors(query, gallery)
    items = Gallery(gallery, tie_order(gallery_id, len(gallery)), gallery_block, torch.device(device))
    top = min(top, len(gallery))
    result = _empty_result(len(query), len(gallery), top)
    nothing = _pairs_of_nobody()
    with full_precision(), torch.inference_mode():
        for start in range(0, len(query), query_block):
            part = lattice(query[start : start + query_block], items.device)
            _rank_block(part, start, items, nothing, result)
    return result.index, result.score


def _check_sizes(top: int, query_block: int, gallery_block: int) -> None:
    if top < 0 or query_block < 1 or gallery_block < 1:
        raise UsageError(f"top={top}, query_block={query_block}, gallery_block={gallery_block}: from 0, 1 and 1.")


def _empty_result(queries: int, gallery: int, top: int) -> Ranking:
    none = np.zeros(0, np.int64)
    return Ranking(
        queries=expected_metrics(none, none, none, queries=0),
        gallery=np.full(queries, gallery, np.int64),
        index=np.full((queries, top), -1, np.int64),
        score=np.full((queries, top), np.nan, np.float32),
        match=np.zeros((queries, top), bool),
    )


def _pairs_of_nobody() -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


def _rank_block(
    part: torch.Tensor, start: int, items: Gallery, pairs: Pairs, result: Ranking
) -> tuple[npt.NDArray[np.int64], ...]:
    """Fill the result's rows from `start`; return query, items before and items tied of every positive of the block."""
    kept = ~pairs.drop
    exact = items.pair_scores(part, pairs.row[kept], pairs.column[kept]).cpu().numpy()
    positive = padded(exact, pairs.row[kept], len(part), np.inf)
    levels = Levels(torch.from_numpy(positive).to(part.device), items.slack)
    best = Best(len(part), result.index.shape[1], part.device)
    crowd: Crowd | None = None
    chosen = False
    junk_row, junk = pairs.row[pairs.drop], pairs.column[pairs.drop]
    for block in items.blocks(part):
        here = (junk >= block.start) & (junk < block.start + block.scores.shape[1])
        block.scores[junk_row[here], junk[here] - block.start] = -torch.inf
        if is_crowded(block, levels, best):
            take_in_whole(block, levels, best)
            continue
        if not chosen:
            lowest, chosen = crowded_levels(block.scores, levels), True
            crowd = Crowd(levels, lowest) if lowest else None
        if crowd is not None:
            crowd.count(block)
        take_in(block, levels, best, skipped=crowd.lowest if crowd else 0)
    best.merge()
    _store(best, items.order, slice(start, start + len(part)), result)
    result.gallery[start : start + len(part)] -= np.bincount(junk_row, minlength=len(part))
    above, reach = (counts.cpu().numpy() for counts in levels.tally.result())
    if crowd is not None:
        above[:, : crowd.lowest], reach[:, : crowd.lowest] = (counts.numpy() for counts in crowd.result())
    above, reach = above + levels.whole[0].cpu().numpy(), reach + levels.whole[1].cpu().numpy()
    real = np.isfinite(positive)
    return np.nonzero(real)[0] + start, above[real], (reach - above)[real]


def _store(best: Best, order: npt.NDArray[np.int64], rows: slice, result: Ranking) -> None:
    score, position = best.score.cpu().numpy(), best.position.cpu().numpy()
    gone = position < 0  # only dropped items were left
    result.index[rows] = np.where(gone, -1, order[position])
    result.score[rows] = np.where(gone, np.nan, score)
