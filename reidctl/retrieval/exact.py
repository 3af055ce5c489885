"""Exact search and evaluation in blocks, with the same bits for every block size, thread count and row order.

The usual way to compute similarities, a float32 matrix product, gives other last bits for other block shapes, thread
counts and machines, so near-ties change places. Rounding its results to a grid does not help: a result next to
a boundary of the grid still falls on either side. Here the inputs are rounded instead: every component becomes
an integer multiple of 2^-26. A product of two components is then an integer multiple of 2^-52, and for vectors no
longer than 1 the sum over any subset of the products is at most 1 by Cauchy and Schwarz, so every partial sum, in any
order, with or without fused multiply-add, fits the 53 bits of a float64 exactly. Floating-point addition without
rounding is associative: the score is a function of the two vectors and nothing else.

The price is a float64 product (about half the speed of float32 on CPUs and data-centre GPUs) and a rounding
error in the score of about 2^-27, at most sqrt(D)·2^-26: below that of a float32 product, for typical vectors by ten.

Memory beyond the inputs and results is at most 24·q·g + 16·D·(q + g) + 64·q·(P + J + top) + 2^17·D bytes for blocks
of q queries and g gallery items, P (J) the largest number of relevant (dropped) items of one query, besides what the
matrix library keeps: about 210 MB for the default blocks and D = 512, whatever Q and G are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl.errors import DataError
from reidctl.metrics import QueryMetrics, expected_metrics

Exclude = Literal["none", "same_camera", "same_outfit", "same_item", "cloth_changing", "same_clothes"]
Labels = Sequence[Any] | npt.NDArray[Any] | pd.Series
Matrix = npt.NDArray[np.float32]

QUERY_BLOCK = 1024
GALLERY_BLOCK = 4096
_SCALE = 2.0**26
_PAIRS = 4096  # pairs of vectors multiplied at a time for the positives' own scores
_FEW = 8  # up to so many positives, comparing with each beats a binary search


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
        query_block: queries per block.
        gallery_block: gallery items per block.
        device: where products and counts are computed; needs float64.
        advance: called with the number of queries after each block.

    Raises:
        DataError: widths differ, a vector is longer than 1 or not finite, or a label that `exclude` needs is absent.
    """
    _check_vectors(query, gallery)
    camera, outfit = (query_camera, gallery_camera), (query_outfit, gallery_outfit)
    labels: dict[Exclude, tuple[tuple[tuple[Labels | None, Labels | None], bool], ...]] = {
        "none": (),
        "same_camera": ((camera, True),),
        "same_outfit": ((outfit, True),),
        "same_item": (((query_id, gallery_id), True),),
        "cloth_changing": ((camera, True), (outfit, True)),
        "same_clothes": ((camera, True), (outfit, False)),
    }
    keys = [_Key(query, gallery, equal) for (query, gallery), equal in labels[exclude] if _both(query, gallery)]
    if len(keys) < len(labels[exclude]):
        raise DataError(f"exclude={exclude} needs that label for queries and gallery.")
    blocks = _Gallery(gallery, _tie_order(gallery_id, len(gallery)), gallery_block, torch.device(device))
    pairs = _SamePerson(query_person, gallery_person, keys, blocks.order)
    top = min(top, len(gallery))
    result = _empty_result(len(query), len(gallery), top)
    positives: list[tuple[npt.NDArray[np.int64], ...]] = []
    for start in range(0, len(query), query_block):
        stop = min(start + query_block, len(query))
        part = _lattice(query[start:stop], blocks.device)
        positives.append(_rank_block(part, start, blocks, pairs.of(start, stop), result))
        if advance is not None:
            advance(stop - start)
    row, before, tied = (
        (np.concatenate(column) for column in zip(*positives, strict=True))
        if positives
        else 3 * [np.zeros(0, np.int64)]
    )
    result.match[:] = (pairs.gallery_code[result.index] == pairs.query_code[:, None]) & (result.index >= 0)
    queries = expected_metrics(row, before, tied, queries=len(query))
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
    _check_vectors(query, gallery)
    blocks = _Gallery(gallery, _tie_order(gallery_id, len(gallery)), gallery_block, torch.device(device))
    top = min(top, len(gallery))
    index = np.zeros((len(query), top), np.int64)
    score = np.zeros((len(query), top), np.float32)
    for start in range(0, len(query), query_block):
        part = _lattice(query[start : start + query_block], blocks.device)
        best = _Best(len(part), top, blocks.device)
        for offset, scores in blocks.scores(part):
            best.update(scores, offset)
        index[start : start + query_block], score[start : start + query_block] = best.result(blocks.order)
    return index, score


def _empty_result(queries: int, gallery: int, top: int) -> Ranking:
    none = np.zeros(0, np.int64)
    return Ranking(
        queries=expected_metrics(none, none, none, queries=0),
        gallery=np.full(queries, gallery, np.int64),
        index=np.full((queries, top), -1, np.int64),
        score=np.full((queries, top), np.nan, np.float32),
        match=np.zeros((queries, top), bool),
    )


def _rank_block(
    part: torch.Tensor, start: int, blocks: "_Gallery", pairs: "_Pairs", result: Ranking
) -> tuple[npt.NDArray[np.int64], ...]:
    """Fill the result's rows from `start`; return query, items before and items tied of every positive of the block."""
    scores_of_pairs = blocks.pair_scores(part, pairs)
    positive = _padded(scores_of_pairs[~pairs.drop], pairs.row[~pairs.drop], len(part), np.inf)
    dropped = _padded(scores_of_pairs[pairs.drop], pairs.row[pairs.drop], len(part), -np.inf)
    level = torch.from_numpy(positive).to(part.device)
    higher = torch.zeros_like(level, dtype=torch.int64)
    reach = torch.zeros_like(higher)
    best = _Best(len(part), result.index.shape[1], part.device)
    junk_row, junk_column = pairs.row[pairs.drop], pairs.column[pairs.drop]
    for offset, scores in blocks.scores(part):
        _count(scores, level, higher, reach)
        here = (junk_column >= offset) & (junk_column < offset + scores.shape[1])
        scores[junk_row[here], junk_column[here] - offset] = -torch.inf
        best.update(scores, offset)
    before, at_least = higher.cpu().numpy(), reach.cpu().numpy()
    for column in dropped.T[:, :, None]:  # counted above with everybody else
        before -= column > positive
        at_least -= column >= positive
    rows = slice(start, start + len(part))
    result.index[rows], result.score[rows] = best.result(blocks.order)
    result.gallery[rows] -= np.bincount(junk_row, minlength=len(part))
    real = np.isfinite(positive)
    return np.nonzero(real)[0] + start, before[real], (at_least - before)[real]


def _count(scores: torch.Tensor, level: torch.Tensor, higher: torch.Tensor, reach: torch.Tensor) -> None:
    """Add to `higher` and `reach` (q, P) how many of `scores` (q, g) are above, at least, each of `level` (q, P)."""
    if level.shape[1] <= _FEW:
        for column in range(level.shape[1]):
            bound = level[:, column : column + 1]
            higher[:, column] += torch.count_nonzero(scores > bound, dim=1)
            reach[:, column] += torch.count_nonzero(scores >= bound, dim=1)
        return
    # Scores are integers, so "above p" is "at least p + 1": one binary search over both kinds of bound.
    # Levels ascend in each row, hence p, p + 1, p', p' + 1, ... does too, unless p = p': then sorting restores it.
    bounds, place = torch.sort(torch.cat([level, level + 1], dim=1), dim=1, stable=True)
    width = bounds.shape[1] + 1
    bins = torch.searchsorted(bounds, scores, right=True)  # bounds at or below each score
    bins += torch.arange(len(scores), device=scores.device)[:, None] * width
    counts = torch.bincount(bins.view(-1), minlength=len(scores) * width).view(len(scores), width)
    above = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # scores that reach bound j
    reached = torch.zeros_like(above).scatter_(1, place, above)
    reach += reached[:, : level.shape[1]]
    higher += reached[:, level.shape[1] :]


class _Best:
    """The best items so far, by score, then by position."""

    def __init__(self, queries: int, top: int, device: torch.device) -> None:
        self.top = top
        self.score = torch.zeros((queries, 0), dtype=torch.float64, device=device)
        self.index = torch.zeros((queries, 0), dtype=torch.int64, device=device)

    def update(self, scores: torch.Tensor, offset: int) -> None:
        """Take in a block of scores (q, g) of the gallery from position `offset`; blocks come in order."""
        index = _first_best(scores, min(self.top, scores.shape[1]))
        # Positions ascend from block to block and within `index`, so a stable sort keeps ties in order.
        score = torch.cat([self.score, scores.gather(1, index)], dim=1)
        index = torch.cat([self.index, index + offset], dim=1)
        self.score, order = torch.sort(score, dim=1, descending=True, stable=True)
        self.score, self.index = self.score[:, : self.top], index.gather(1, order[:, : self.top])

    def result(self, order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Matrix]:
        """Gallery rows and cosines; -1 and NaN where only dropped items were left."""
        score, position = self.score.cpu().numpy(), self.index.cpu().numpy()
        gone = np.isneginf(score)
        cosine = np.where(gone, np.nan, score / _SCALE**2).astype(np.float32)
        return np.where(gone, -1, order[position]), cosine


def _first_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The positions (q, count) of the best scores in ascending order, the first ones where the last place is tied."""
    if count == 0:
        return torch.zeros((len(scores), 0), dtype=torch.int64, device=scores.device)
    value, index = torch.topk(scores, count, dim=1)
    last = value[:, -1:]
    crowded = torch.count_nonzero(scores >= last, dim=1) > count  # topk chose among equals as it liked
    if crowded.any():
        few, bound = scores[crowded], last[crowded]
        above, equal = few > bound, few == bound
        room = count - torch.count_nonzero(above, dim=1)[:, None]
        keep = above | (equal & (equal.cumsum(1) <= room))
        index[crowded] = keep.nonzero()[:, 1].view(-1, count)
    return index.sort(dim=1).values


class _Gallery:
    """The gallery in tie order, block by block, as integers in float64."""

    def __init__(self, vectors: Matrix, order: npt.NDArray[np.int64], block: int, device: torch.device) -> None:
        self.vectors, self.order, self.block, self.device = vectors, order, block, device

    def scores(self, query: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first item, scores (q, g) in units of 2^-52); the tensor is reused."""
        buffer = torch.empty((len(query), min(self.block, len(self.order))), dtype=torch.float64, device=self.device)
        for start in range(0, len(self.order), self.block):
            items = _lattice(self.vectors[self.order[start : start + self.block]], self.device)
            whole = len(items) == buffer.shape[1]
            yield start, torch.mm(query, items.T, out=buffer) if whole else query @ items.T

    def pair_scores(self, query: torch.Tensor, pairs: "_Pairs") -> npt.NDArray[np.float64]:
        """Scores of single pairs, shape (M,); exact arithmetic makes them equal to those of `scores`."""
        found = np.empty(len(pairs.row), np.float64)
        for start in range(0, len(found), _PAIRS):
            some = slice(start, start + _PAIRS)
            items = _lattice(self.vectors[self.order[pairs.column[some]]], self.device)
            rows = torch.from_numpy(pairs.row[some]).to(self.device)
            found[some] = (query[rows] * items).sum(dim=1).cpu().numpy()
        return found


@dataclass(frozen=True)
class _Pairs:
    """Queries of a block with the gallery items of the same person, shape (M,)."""

    row: npt.NDArray[np.int64]  # query, from the start of the block
    column: npt.NDArray[np.int64]  # position of the item in tie order
    drop: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Key:
    """Labels that decide which items of the query's person are dropped: those that equal its own, or those that do
    not."""

    query: Labels | None
    gallery: Labels | None
    equal: bool


def _both(query: Labels | None, gallery: Labels | None) -> bool:
    return query is not None and gallery is not None


class _SamePerson:
    """Which gallery items show a query's person, and which of them are dropped."""

    def __init__(
        self, query_person: Labels, gallery_person: Labels, keys: Sequence[_Key], order: npt.NDArray[np.int64]
    ) -> None:
        self.query_code, self.gallery_code = _codes(query_person, gallery_person)
        assert len(order) == len(self.gallery_code), "one person id per gallery item"
        code = self.gallery_code[order]
        self._by_person = np.argsort(code, kind="stable")
        self._first = np.searchsorted(code[self._by_person], self.query_code, side="left")
        self._count = np.searchsorted(code[self._by_person], self.query_code, side="right") - self._first
        self._keys: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], bool]] = []
        for key in keys:
            assert key.query is not None and key.gallery is not None
            query_codes, gallery_codes = _codes(key.query, key.gallery)
            self._keys.append((query_codes, gallery_codes[order], key.equal))

    def of(self, start: int, stop: int) -> _Pairs:
        count = self._count[start:stop]
        row = np.repeat(np.arange(stop - start), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = self._by_person[self._first[start:stop][row] + within]
        drop = np.zeros(len(row), bool)
        for query_codes, gallery_codes, equal in self._keys:
            mine, theirs = query_codes[start:stop][row], gallery_codes[column]
            # A missing label equals nothing and differs from nothing: it drops nothing.
            drop |= (mine >= 0) & (theirs >= 0) & ((mine == theirs) == equal)
        return _Pairs(row, column, drop)


def _codes(first: Labels, second: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Both lists as integers, equal where the labels are equal; -1 for a missing label."""
    joined = np.concatenate([np.asarray(first, dtype=object), np.asarray(second, dtype=object)])
    code = np.asarray(pd.factorize(joined)[0], np.int64)
    return code[: len(first)], code[len(first) :]


def _padded(
    values: npt.NDArray[np.float64], row: npt.NDArray[np.int64], rows: int, fill: float
) -> npt.NDArray[np.float64]:
    """Ragged values as a matrix, each row ascending, padded with `fill`."""
    count = np.bincount(row, minlength=rows)
    full = np.full((rows, int(count.max(initial=0))), fill)
    full[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = values
    return np.sort(full, axis=1)


def _tie_order(ids: Labels | None, count: int) -> npt.NDArray[np.int64]:
    if ids is None:
        return np.arange(count)
    assert len(ids) == count, "one id per gallery item"
    return np.argsort(np.asarray(ids, dtype=object).astype(str), kind="stable")


def _lattice(vectors: Matrix, device: torch.device) -> torch.Tensor:
    """Components in units of 2^-26, whole numbers in float64."""
    return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device).double().mul_(_SCALE).round_()


def _check_vectors(query: Matrix, gallery: Matrix) -> None:
    if query.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have width {query.shape[1]}, the gallery {gallery.shape[1]}.", hint="Embed both with one model."
        )
    for side, vectors in (("query", query), ("gallery", gallery)):
        for start in range(0, len(vectors), GALLERY_BLOCK):
            norm = np.linalg.norm(vectors[start : start + GALLERY_BLOCK].astype(np.float64), axis=1)
            wrong = np.flatnonzero(~(norm <= 1.001))  # NaN compares false and is caught too
            if len(wrong):
                row = start + int(wrong[0])
                raise DataError(f"The {side} vector in row {row} has length {norm[wrong[0]]:.4g}, more than 1.")
