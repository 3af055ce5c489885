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
    unit = np.asarray(features, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    distance = np.maximum(1 - unit @ unit.T, 0)
    np.fill_diagonal(distance, 0)
    each = _silhouettes(distance, code)
    alone = len(set(zip(label, person, strict=True))) == len(values)  # one person per label
    controls = []
    for number in range(permutations):
        rng = np.random.default_rng((seed, 35, number))
        exchanged = rng.permutation(label) if alone else labels_of_others(label, person, rng)
        found, given = np.unique(exchanged.astype(str), return_inverse=True)
        controls.append(float(_silhouettes(distance, given).mean()) if len(found) > 1 else 0.0)
    return Silhouette(
        bootstrap_interval(each, person, seed=seed), float(np.mean(controls)), len(label), len(set(person))
    )


def _silhouettes(distance: Floats, code: npt.NDArray[np.int64]) -> Floats:
    """The silhouette of every image from all distances (N, N) and label numbers (N,)."""
    member = np.eye(int(code.max()) + 1)[code]  # (N, K)
    total, size = distance @ member, member.sum(axis=0)
    rows = np.arange(len(code))
    own = total[rows, code] / np.maximum(size[code] - 1, 1)
    other = total / size
    other[rows, code] = np.inf
    near = other.min(axis=1)
    larger = np.maximum(own, near)
    value = np.divide(near - own, larger, out=np.zeros(len(code)), where=larger > 0)
    return np.where(size[code] > 1, value, 0.0)


def tsne(features: npt.NDArray[Any], *, seed: int = 0) -> Floats:
    """Return a t-SNE map of features (N, D), shape (N, 2); N must be at least 5.

    van der Maaten & Hinton 2008 in scikit-learn's Barnes-Hut form: started from the first two principal components,
    perplexity 30 or a third of what a smaller number of images allows, Euclidean distance of rows scaled to length 1.

    Args:
        features: shape (N, D).
        seed: of the ties in its search for neighbours; the start is not random.
    """
    from sklearn.manifold import TSNE

    unit = np.asarray(features, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    # The width of the start must not be 0: equal features get an arbitrary map instead of an error.
    if unit.shape[1] < 2 or np.allclose(unit, unit[0]):
        unit = np.hstack([unit, np.random.default_rng(seed).normal(scale=1e-4, size=(len(unit), 2))])
    perplexity = min(30.0, (len(unit) - 1) / 3)
    model = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(unit), np.float64)
