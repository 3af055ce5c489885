"""Features in two dimensions for looking at, and silhouettes, which are what may be compared.

A t-SNE map keeps who is near whom and nothing else: distances between groups, their sizes and their number depend on
its settings. Features that come from different heads live in different places, so they separate in every map, whether
or not they hold the same information. The silhouettes are of each feature alone, in its own space, beside a control.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.evaluation.probes import labels_of_others
from reidctl.metrics import Interval, bootstrap_interval

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.object_]

PERMUTATIONS = 20
_BLOCK = 1024
_NOTHING = 1e-12  # a distance that is only rounding


@dataclass(frozen=True)
class Silhouette:
    """How tight the images of one label are.

    Attributes:
        value: mean over images of (b - a) / max(a, b), a the mean cosine distance to images of the same label, b that
            to those of the nearest other label, in [-1, 1], with a 95 % interval from resampling people.
        control: the mean with exchanged labels, over permutations.
        images: how many.
        people: how many they show.
    """

    value: Interval
    control: float
    images: int
    people: int


def silhouette(
    features: npt.NDArray[Any], label: Labels, person: Labels, *, seed: int = 0, permutations: int = PERMUTATIONS
) -> Silhouette | None:
    """Return the silhouette of labels in the space of the features, cosine distance; None if all labels are equal.

    The control exchanges the labels of people, or, where the labels are the people, those of single images. Labels of a
    single image count 0, as usual.

    Args:
        features: shape (N, D).
        label: none missing, shape (N,).
        person: shape (N,).
        seed: of the permutations and the bootstrap.
        permutations: how many controls the mean is taken over.
    """
    values, code = np.unique(label.astype(str), return_inverse=True)
    if not 2 <= len(values) < len(label):
        return None
    rows = unit(features)
    each = _silhouettes(rows, code)
    alone = len(set(zip(label, person, strict=True))) == len(values)  # one person per label
    controls = []
    for number in range(permutations):
        rng = np.random.default_rng((seed, 35, number))
        exchanged = rng.permutation(label) if alone else labels_of_others(label, person, rng)
        found, given = np.unique(exchanged.astype(str), return_inverse=True)
        controls.append(float(_silhouettes(rows, given).mean()) if len(found) > 1 else 0.0)
    return Silhouette(
        bootstrap_interval(each, person, seed=seed), float(np.mean(controls)), len(label), len(set(person))
    )


def silhouettes(features: npt.NDArray[Any], label: Labels) -> Floats:
    """Return the silhouette of every image (N,), see `Silhouette`; 0 where its label has no other image.

    Args:
        features: shape (N, D).
        label: at least two different ones, shape (N,).
    """
    return _silhouettes(unit(features), np.unique(label.astype(str), return_inverse=True)[1])


def unit(features: npt.NDArray[Any]) -> Floats:
    """Return features (N, D) at length 1 in float64; rows of zeros stay zeros."""
    rows = np.asarray(features, np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _silhouettes(rows: Floats, code: npt.NDArray[np.int64]) -> Floats:
    """The silhouette of every image from unit rows (N, D) and label numbers (N,).

    The distances to a label add up to n - u . (sum of its rows), so no matrix of all distances is needed.
    """
    size = np.bincount(code).astype(np.float64)
    sums = sums_by(rows, code)
    found = np.empty(len(code))
    for start in range(0, len(code), _BLOCK):
        some, own_label = rows[start : start + _BLOCK], code[start : start + _BLOCK]
        place = np.arange(len(some))
        total = size - some @ sums.T  # (block, K)
        # Its distance to itself is 0 by definition, also where its row is zero.
        itself = 1 - (some * some).sum(axis=1)
        own = (total[place, own_label] - itself) / np.maximum(size[own_label] - 1, 1)
        other = total / size
        other[place, own_label] = np.inf
        near, own = np.maximum(other.min(axis=1), 0), np.maximum(own, 0)
        larger = np.maximum(own, near)
        value = np.divide(near - own, larger, out=np.zeros(len(some)), where=larger > _NOTHING)
        found[start : start + _BLOCK] = np.where(size[own_label] > 1, value, 0.0)
    return found


def sums_by(rows: Floats, code: npt.NDArray[np.int64]) -> Floats:
    """Return the sum of the rows (N, D) of each number of `code` (N,), shape (largest + 1, D)."""
    order = np.argsort(code, kind="stable")
    found = np.zeros((int(code.max()) + 1, rows.shape[1]))
    present, first = np.unique(code[order], return_index=True)
    found[present] = np.add.reduceat(rows[order], first, axis=0)
    return found


def tsne(features: npt.NDArray[Any], *, seed: int = 0) -> Floats:
    """Return a t-SNE map of features (N, D), shape (N, 2); N must be at least 5.

    van der Maaten & Hinton 2008 in scikit-learn's Barnes-Hut form: started from the first two principal components,
    perplexity 30 or a third of what a smaller number of images allows, Euclidean distance of rows scaled to length 1.

    Args:
        features: shape (N, D).
        seed: of the ties in its search for neighbours; the start is not random.
    """
    from sklearn.manifold import TSNE

    rows = unit(features)
    # The width of the start must not be 0: equal features get an arbitrary map instead of an error.
    if rows.shape[1] < 2 or np.allclose(rows, rows[0]):
        rows = np.hstack([rows, np.random.default_rng(seed).normal(scale=1e-4, size=(len(rows), 2))])
    perplexity = min(30.0, (len(rows) - 1) / 3)
    model = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(rows), np.float64)
