"""How near the images of one person lie to each other, and how far from those of other people.

With u_i the features at length 1, d(i, j) = 1 - u_i . u_j in [0, 2], and every person counting the same however many
images there are of them:

    intra_p = mean of d(i, j) over the images i, j of person p under different cameras;  intra = mean of intra_p over p
    inter   = mean over pairs of people p, q of the mean of d(i, j) over the images i of p and j of q
    ratio   = intra / inter;  0: all images of a person are one point;  1: no nearer to each other than to strangers

An image of an unknown camera is under a camera of its own, so without cameras all different images of a person count.
Sums of distances are n - u . (sum of rows): nothing of size N x N is made. The intervals resample people on both sides
of a pair; a person who is drawn twice is no stranger to himself.

The numbers depend on how a feature uses its space (a common direction of all features shrinks both distances), so only
the ratio and the silhouette compare models, on the same images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reidctl.evaluation.projection import sums_by, unit
from reidctl.metrics import Interval

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.object_]

RESAMPLES = 1000
_DRAWS = 1 << 21  # weights at a time: 16 MiB


@dataclass(frozen=True)
class Spread:
    """What the distances of all pairs of images add up to, person by person.

    Attributes:
        intra: mean distance of a person's images under different cameras; NaN without such a pair, (P,).
        centre: mean of a person's unit features, (P, D).
        pairs: how many pairs `intra` is over, each counted once.
    """

    intra: Floats
    centre: Floats
    pairs: int


@dataclass(frozen=True)
class Compactness:
    """The numbers, each with a 95 % interval from resampling people.

    Attributes:
        intra, inter: mean distances, in [0, 2].
        ratio: intra / inter, >= 0.
    """

    intra: Interval
    inter: Interval
    ratio: Interval


def spread(features: npt.NDArray[np.floating], person: Labels, camera: Labels | None = None) -> Spread | None:
    """Return the sums behind `compactness`; None if there are not two people, or nobody has a pair of images.

    Args:
        features: shape (N, D), of any length.
        person: shape (N,).
        camera: shape (N,), None where unknown.
    """
    rows = unit(features)
    _, code = np.unique(person.astype(str), return_inverse=True)
    size = np.bincount(code).astype(np.float64)
    sums = sums_by(rows, code)
    group, owner = _groups(code, camera)
    inside, held = sums_by(rows, group), np.bincount(group).astype(np.float64)
    # Ordered pairs under different cameras: all of a person's less those within each camera.
    count = size**2 - np.bincount(owner, held**2, len(size))
    alike = (sums**2).sum(axis=1) - np.bincount(owner, (inside**2).sum(axis=1), len(size))
    intra = np.where(count > 0, np.maximum(1 - alike / np.maximum(count, 1), 0), math.nan)
    if len(size) < 2 or np.isnan(intra).all():
        return None
    return Spread(intra, sums / size[:, None], int(count.sum()) // 2)


def _groups(code: npt.NDArray[np.int64], camera: Labels | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number every person's cameras (N,), and say whose each of them is; an unknown one is only that image's."""
    known = [None] * len(code) if camera is None else list(camera)
    number: dict[tuple[int, object], int] = {}
    group = np.empty(len(code), np.int64)
    for row, (own, name) in enumerate(zip(code, known, strict=True)):
        group[row] = number.setdefault((int(own), ("", row) if name is None else str(name)), len(number))
    return group, np.array([own for own, _ in number], np.int64)


def compactness(given: Spread, *, seed: int = 0, resamples: int = RESAMPLES) -> Compactness:
    """Return the distances within and between people and their ratio, with intervals.

    Args:
        given: see `spread`.
        seed: of the bootstrap.
        resamples: how often people are drawn.
    """
    whole = _distances(given, np.ones((1, len(given.intra))))[0]
    drawn = _resampled(given, seed, resamples)
    values = [*whole, float(_ratio(whole[None])[0])]
    columns = (drawn[:, 0], drawn[:, 1], _ratio(drawn))
    return Compactness(*(_interval(float(v), each) for v, each in zip(values, columns, strict=True)))


def ratio_difference(one: Spread, other: Spread, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return ratio(one) - ratio(other) with an interval from drawing the same people for both: below 0, one is tighter.

    Args:
        one, other: of two models on the same people, in the same order.
        seed: of the bootstrap; see `compactness`.
        resamples: how often people are drawn.
    """
    assert len(one.intra) == len(other.intra), "the same people"
    whole, drawn = [], []
    for side in (one, other):
        whole.append(float(_ratio(_distances(side, np.ones((1, len(side.intra)))))[0]))
        drawn.append(_ratio(_resampled(side, seed, resamples)))
    return _interval(whole[0] - whole[1], drawn[0] - drawn[1])


def _interval(value: float, drawn: Floats) -> Interval:
    """The middle 95 % of resamples; those without the number (nobody drawn has a pair) are left out."""
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Interval(value, float(low), float(high))


def _ratio(distances: Floats) -> Floats:
    """intra / inter of rows (R, 2); NaN where other people are no distance away."""
    intra, inter = distances.T
    return np.asarray(np.divide(intra, inter, out=np.full(len(distances), math.nan), where=inter > 1e-12))


def _resampled(given: Spread, seed: int, resamples: int) -> Floats:
    return np.concatenate([_distances(given, weight) for weight in _weights(len(given.intra), seed, resamples)])


def _weights(people: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each person is drawn, (R, P) at a time; the same for everything with as many people."""
    rng = np.random.default_rng((seed, 61))
    step = max(1, _DRAWS // people)
    for begin in range(0, resamples, step):
        yield rng.multinomial(people, np.full(people, 1 / people), size=min(step, resamples - begin)).astype(np.float64)


def _distances(given: Spread, weight: Floats) -> Floats:
    """(intra, inter) if person p counts w_p times, for each row of weights (R, P): (R, 2).

    inter = 1 - (|sum_p w_p m_p|^2 - sum_p w_p^2 |m_p|^2) / ((sum_p w_p)^2 - sum_p w_p^2),  m_p the centre of p
    """
    known = ~np.isnan(given.intra)
    held = weight[:, known].sum(axis=1)
    total = weight[:, known] @ given.intra[known]
    intra = np.divide(total, held, out=np.full(len(weight), math.nan), where=held > 0)
    square = weight**2
    alike = ((weight @ given.centre) ** 2).sum(axis=1) - square @ (given.centre**2).sum(axis=1)
    pairs = weight.sum(axis=1) ** 2 - square.sum(axis=1)
    inter = np.divide(alike, pairs, out=np.full(len(weight), math.nan), where=pairs > 0)
    return np.column_stack([intra, np.maximum(1 - inter, 0)])
