"""Exact evaluation of scores that are no product of two vectors: re-ranked distances, pairwise scorers.

The scores come in blocks of queries from a function, so a Q x G matrix need not exist. Everything else is as in
`exact.evaluate_ranking`: ranks of the positives only, expected value over ties, the same rules for dropped items.
The result does not depend on the block size or on the order of the rows, as long as the function's scores do not.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError, UsageError
from reidctl.metrics import CUTOFFS, expected_metrics
from reidctl.retrieval.exact import Ranking
from reidctl.retrieval.labels import Exclude, Ints, Labels, SamePerson, check_length, keys_of, tie_order

Scores = npt.NDArray[np.float64]
QUERY_BLOCK = 64


def rank_scores(
    block: Callable[[slice], Scores],
    *,
    queries: int,
    gallery: int,
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
    advance: Callable[[int], None] | None = None,
) -> Ranking:
    """Rank the whole gallery for every query by given scores and return metrics and the best items.

    Memory beyond what `block` takes and the result: 16·G bytes and a few lists of the length of a query's positives.
    Time is that of sorting G numbers per query, besides `block`. In the result, `score` is the given score as float32;
    the order was decided in float64.

    Args:
        block: returns the scores of the queries in a slice (start and stop given, step none), shape (q, G), higher is
            better; infinities are allowed. It is called once for each block, in order; the array is not changed.
        queries: number of queries Q.
        gallery: number of gallery items G.
        query_person: and the other labels, `exclude`, `top` and `cutoffs`: see `exact.evaluate_ranking`.
        gallery_person: see `query_person`.
        query_camera: see `query_person`.
        gallery_camera: see `query_person`.
        query_outfit: see `query_person`.
        gallery_outfit: see `query_person`.
        query_id: see `query_person`.
        gallery_id: orders equal scores in `index`; without it they follow the gallery's rows.
        exclude: see `query_person`.
        top: see `query_person`.
        cutoffs: see `query_person`.
        query_block: queries per call of `block`.
        advance: called with the number of queries after each block.

    Raises:
        UsageError: an unknown rule, a negative `top`, or blocks of fewer than one query.
        DataError: a score is NaN, a block has the wrong shape, a list of labels the wrong length, or a label that
            `exclude` needs is absent.
    """
    if top < 0 or query_block < 1:
        raise UsageError(f"top={top} and query_block={query_block}: they start at 0 and 1.")
    order = tie_order(gallery_id, gallery)
    keys = keys_of(
        exclude,
        camera=(query_camera, gallery_camera),
        outfit=(query_outfit, gallery_outfit),
        item=(query_id, gallery_id),
    )
    check_length(query_person, queries, "query person")
    people = SamePerson(query_person, gallery_person, keys, order)
    top = min(top, gallery)
    ranked = np.full(queries, gallery, np.int64)
    index = np.full((queries, top), -1, np.int64)
    shown = np.full((queries, top), np.nan, np.float32)
    found: list[tuple[Ints, Ints, Ints]] = []
    for start in range(0, queries, query_block):
        stop = min(start + query_block, queries)
        scores = _checked(block(slice(start, stop)), start, stop, gallery)
        pairs = people.of(start, stop)
        bounds = np.searchsorted(pairs.row, np.arange(stop - start + 1))
        for row in range(stop - start):
            mine = slice(bounds[row], bounds[row + 1])
            column, drop = pairs.column[mine], pairs.drop[mine]
            line = scores[row, order]
            level = line[column[~drop]]
            line = np.delete(line, column[drop])
            ascending = np.sort(line)
            found.append(_places(ascending, level, start + row))
            ranked[start + row] = len(line)
            # The items that are left, in tie order, as gallery rows.
            best = _best(line, ascending, top)
            index[start + row, : len(best)] = np.delete(order, column[drop])[best]
            shown[start + row, : len(best)] = line[best]
        if advance is not None:
            advance(stop - start)
    query, before, tied = (np.concatenate(part) for part in zip(*found, strict=True)) if found else _nothing()
    metrics = expected_metrics(query, before, tied, queries=queries, cutoffs=cutoffs)
    return Ranking(metrics, ranked, index, shown, people.matches(index))


def _nothing() -> tuple[Ints, Ints, Ints]:
    none = np.zeros(0, np.int64)
    return none, none, none


def _checked(scores: Scores, start: int, stop: int, gallery: int) -> Scores:
    if scores.shape != (stop - start, gallery):
        raise DataError(
            f"Scores of queries {start} to {stop - 1} have shape {scores.shape}, not {(stop - start, gallery)}."
        )
    wrong = np.isnan(scores).any(axis=1)
    if wrong.any():
        raise DataError(f"The scores of query row {start + int(wrong.argmax())} hold NaN.")
    return scores


def _places(ascending: Scores, level: Scores, query: int) -> tuple[Ints, Ints, Ints]:
    """Query, items before and items tied of every positive, each with its score in `level`."""
    above = len(ascending) - np.searchsorted(ascending, level, side="right")
    reach = len(ascending) - np.searchsorted(ascending, level, side="left")
    return np.full(len(level), query, np.int64), above.astype(np.int64), (reach - above).astype(np.int64)


def _best(line: Scores, ascending: Scores, top: int) -> Ints:
    """Positions of the best scores, best first, equal ones in order of position."""
    count = min(top, len(line))
    if count == 0:
        return np.zeros(0, np.int64)
    near = np.flatnonzero(line >= ascending[-count])
    return near[np.argsort(-line[near], kind="stable")][:count]
