"""Retrieval metrics as expectations over the order of tied items, and intervals over people.

A ranking is described by its positives alone: how many items score higher than each, and how many score exactly the
same. Tied items are taken to be in uniformly random order, so a model that gives every image the same score gets
exactly the score of chance, whatever order a sort would have left them in.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CUTOFFS = (1, 5, 10, 20)
METRICS = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP", "rSum")
_SUM_OF = (1, 5, 10)  # what rSum adds up, whatever else is reported


@dataclass(frozen=True)
class QueryMetrics:
    """Expected metrics of each query, shape (Q,); queries without a match hold NaN and `matches` 0.

    Args:
        matches: number of relevant gallery items P.
        first_match: expected rank of the first relevant item, from 1.
        average_precision: expected AP in [0, 1], not interpolated, over the full ranking.
        inp: expected inverse negative penalty P / (rank of the last relevant item), in (0, 1].
        hits: for each cutoff k, the probability of a relevant item among the first k.
    """

    matches: Ints
    first_match: Floats
    average_precision: Floats
    inp: Floats
    hits: dict[int, Floats]

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Which queries have a match and are therefore scored."""
        return self.matches > 0

    @property
    def scored(self) -> int:
        """How many queries the means are taken over."""
        return int(self.valid.sum())

    @property
    def skipped(self) -> int:
        """How many queries have no match; they count in no mean."""
        return len(self.matches) - self.scored

    def values(self, metric: str) -> Floats:
        """Return the per-query values behind one of `names`, shape (Q,); rSum is in [0, 3], the others in [0, 1]."""
        if metric == "mAP":
            return self.average_precision
        if metric == "mINP":
            return self.inp
        if metric == "rSum":
            return np.asarray(np.sum([self.hits[k] for k in _SUM_OF], axis=0), np.float64)
        return self.hits[int(metric.removeprefix("rank"))]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics: rank-k for every cutoff, mAP, mINP, and rSum = rank-1 + rank-5 + rank-10."""
        return (*(f"rank{k}" for k in self.hits), "mAP", "mINP", "rSum")

    def means(self) -> dict[str, float]:
        """Return every metric of `names` averaged over the scored queries; NaN where none is scored."""
        return {metric: mean(self.values(metric)[self.valid]) for metric in self.names}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: Floats) -> float:
    """Return the mean, correctly rounded, so that the order of the values cannot change its last bit."""
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


def expected_metrics(
    query: Ints, before: Ints, tied: Ints, *, queries: int, cutoffs: Sequence[int] = CUTOFFS
) -> QueryMetrics:
    """Return the metrics of every query from the places of its positives, averaged over the order of ties.

    For a group of n tied items, r of them positive, with a items and c positives ranked above, and
    b = (r - 1) / (n - 1), the group adds to P·AP

        Σ_{i=1..n} (r/n) (c + 1 + b (i-1)) / (a + i)  =  (r/n) (n b + (c + 1 - b (a + 1)) (H(a+n) - H(a)))

    with the harmonic numbers H; its first positive is expected at a + (n+1)/(r+1); no positive is among its first m
    with probability C(n-r, m) / C(n, m); its last positive is at a + x with probability C(x-1, r-1) / C(n, r).
    Without ties this is the usual definition: P = matches, AP = Σ precision at each match / P.

    Args:
        query: which query each positive belongs to, shape (M,), values in [0, queries).
        before: number of gallery items that score strictly higher than the positive, shape (M,).
        tied: number of gallery items with exactly its score, itself included, shape (M,).
        queries: number of queries Q; those that do not occur in `query` have no match.
        cutoffs: the k of rank-k; those of rSum (1, 5, 10) are always among them.
    """
    order = np.lexsort((before, query))
    query, before, tied = query[order], before[order], tied[order]
    first = np.ones(len(query), bool)
    first[1:] = (query[1:] != query[:-1]) | (before[1:] != before[:-1])
    start = np.flatnonzero(first)
    matches = np.bincount(query, minlength=queries)
    hits = np.diff(np.append(start, len(query)))
    before_hits = start - (np.cumsum(matches) - matches)[query[start]]
    return _from_groups(_Groups(query[start], before[start], tied[start], hits, before_hits), matches, cutoffs)


def chance(matches: npt.ArrayLike, gallery: npt.ArrayLike, *, cutoffs: Sequence[int] = CUTOFFS) -> QueryMetrics:
    """Return the expected metrics of a uniformly random ranking.

    Args:
        matches: relevant items of each query, shape (Q,); 0 marks a skipped query.
        gallery: number of ranked items, a scalar or one per query.
        cutoffs: the k of rank-k.
    """
    count = np.atleast_1d(np.asarray(matches, np.int64))
    size = np.broadcast_to(np.asarray(gallery, np.int64), count.shape)
    assert (count <= size).all(), "more matches than gallery items"
    query = np.flatnonzero(count)
    zeros = np.zeros(len(query), np.int64)
    return _from_groups(_Groups(query, zeros, size[query], count[query], zeros), count, cutoffs)


@dataclass(frozen=True)
class _Groups:
    """Tie groups that hold a positive, sorted by query, then best first; all arrays of shape (T,)."""

    query: Ints
    before: Ints  # items ranked above the group
    size: Ints
    hits: Ints  # positives inside
    before_hits: Ints  # positives ranked above


def _from_groups(groups: _Groups, matches: Ints, cutoffs: Sequence[int]) -> QueryMetrics:
    count = len(matches)
    new = np.ones(len(groups.query), bool)
    new[1:] = groups.query[1:] != groups.query[:-1]
    head, tail = np.flatnonzero(new), np.flatnonzero(np.append(new[1:], True)[: len(new)])
    scored = groups.query[head]

    def spread(values: Floats) -> Floats:
        full = np.full(count, np.nan)
        full[scored] = values
        return full

    # bincount adds in the given order, so a query's sum does not depend on the other queries.
    precision = np.bincount(groups.query, weights=_precision_sums(groups), minlength=count)[scored]
    a, n, r = groups.before[head], groups.size[head], groups.hits[head]
    return QueryMetrics(
        matches=matches,
        first_match=spread(a + (n + 1) / (r + 1)),
        average_precision=spread(precision / matches[scored]),
        inp=spread(matches[scored] * _expected_inverse_last(groups.before[tail], groups.size[tail], groups.hits[tail])),
        hits={k: spread(_hit_probability(a, n, r, k)) for k in sorted({*cutoffs, *_SUM_OF})},
    )


def _precision_sums(groups: _Groups) -> Floats:
    """The sum over a group's positives of the expected precision at each, shape (T,)."""
    a, n, r, c = groups.before, groups.size, groups.hits, groups.before_hits
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, (a + n).max(initial=0) + 1))])
    b = (r - 1) / np.maximum(n - 1, 1)
    grouped = (r / n) * (n * b + (c + 1 - b * (a + 1)) * (harmonic[a + n] - harmonic[a]))
    return np.asarray(np.where(n == 1, (c + 1) / (a + 1), grouped))


def _hit_probability(a: Ints, n: Ints, r: Ints, k: int) -> Floats:
    """The probability that the first group with positives puts one of them at rank k or better."""
    miss = np.ones(len(a))
    for drawn in range(k):
        counts = (drawn < k - a) & (drawn < n)
        miss = np.where(counts, miss * np.maximum(n - r - drawn, 0) / np.maximum(n - drawn, 1), miss)
    return np.asarray(1.0 - miss)


def _expected_inverse_last(a: Ints, n: Ints, r: Ints) -> Floats:
    """E[1 / (a + X)], X the place of the last of r positives among n in random order; shape (T,)."""
    cases, inverse = np.unique(np.stack([a, n, r], axis=1), axis=0, return_inverse=True)
    values = [_inverse_last(int(above), int(size), int(hits)) for above, size, hits in cases]
    return np.asarray(values, np.float64)[inverse.reshape(-1)]


def _inverse_last(a: int, n: int, r: int) -> float:
    if n == r:
        return 1.0 / (a + n)
    # P(X = n) = r/n and P(X = x-1) = P(X = x) (x-r)/(x-1), for x = n down to r.
    place = np.arange(n, r - 1, -1, dtype=np.float64)
    probability = (r / n) * np.concatenate([[1.0], np.cumprod((place[:-1] - r) / (place[:-1] - 1))])
    return float((probability / (a + place)).sum())


def bootstrap_interval(
    values: Floats, person: Sequence[str] | npt.NDArray[np.object_], *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Return the mean of `values` with a 95 % percentile interval from resampling people, not queries.

    Queries of one person are alike, so resampling queries would promise too much. A resample draws as many people as
    there are, with replacement, and takes the mean over all their queries. Queries with NaN are left out.
    If all values are equal the interval has no width: it cannot tell 20 of 20 from 2000 of 2000.

    Args:
        values: one value per query, shape (Q,).
        person: the person of each query, shape (Q,).
        seed: the same seed, values and people give the same interval in any order of the queries.
        resamples: number of bootstrap samples.
    """
    person = np.asarray(person, dtype=object)[~np.isnan(values)].astype(str)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    order = np.lexsort((values, person))
    _, code = np.unique(person[order], return_inverse=True)
    count = np.bincount(code).astype(np.float64)
    total = np.bincount(code, weights=values[order])
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    step = max(1, 2_000_000 // len(count))  # 16 MB of weights at a time
    for begin in range(0, resamples, step):
        weight = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=min(step, resamples - begin))
        drawn[begin : begin + step] = (weight * total).sum(axis=1) / (weight * count).sum(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean(values), float(low), float(high))


def summarise(
    queries: QueryMetrics, person: Sequence[str] | npt.NDArray[np.object_], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """Return every metric of `queries.names` with its interval over people."""
    return {
        metric: bootstrap_interval(queries.values(metric), person, seed=seed, resamples=resamples)
        for metric in queries.names
    }


def distinct_query_ceiling(texts: Sequence[str], people: Sequence[str]) -> float:
    """Return the highest rank-1 that any model can reach when equal query texts give equal rankings.

    ceiling = (1/Q) Σ_d max_id n(d, id), n(d, id) the number of queries with text d of person id: each distinct text
    has one top image, which shows one person. Range (0, 1]; NaN without queries.
    """
    best: dict[str, int] = {}
    for (text, _), count in Counter(zip(texts, people, strict=True)).items():
        best[text] = max(best.get(text, 0), count)
    return sum(best.values()) / len(texts) if len(texts) else math.nan
