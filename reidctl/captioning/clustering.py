"""Clustering of unit vectors by cosine distance, with every vector in a cluster of a decent size at the end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.captioning.config import StyleConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MIN_EPS = 1e-4
_BLOCK = 1024


@dataclass(frozen=True)
class Grouping:
    """A finished clustering.

    Attributes:
        labels: cluster per vector, 0..K-1, no -1, shape (N,).
        eps: neighbourhood radius (cosine distance) or None.
        found: clusters before merging.
        noise: share of vectors that the algorithm called noise.
    """

    labels: Ints
    eps: float | None
    found: int
    noise: float


def group(points: Floats, config: StyleConfig, seed: int) -> Grouping:
    """Return the clustering of unit vectors (N, D) by `config.algorithm`."""
    if len(points) < 2 or config.algorithm == "none":
        return Grouping(np.zeros(len(points), np.int64), None, min(1, len(points)), 0.0)
    if config.algorithm == "dbscan":
        return _dbscan(points, config)
    if config.algorithm == "hdbscan":
        return _hdbscan(points, config)
    count = _dbscan(points, config).labels.max() + 1 if config.clusters == "auto" else config.clusters
    raw = _partition(points, config.algorithm, min(int(count), len(np.unique(points, axis=0))), seed)
    return Grouping(compact(raw), None, int(count), 0.0)


def knee(values: Floats) -> float:
    """Return the value at the knee of an increasing curve: the point furthest below its chord (Satopää et al. 2011).

    Args:
        values: sorted increasingly, at least one.
    """
    span = float(values[-1] - values[0])
    if len(values) < 3 or span <= 0:
        return float(values[-1])
    across = np.linspace(0, 1, len(values))
    return float(values[int(np.argmax(across - (values - values[0]) / span))])


def k_distances(points: Floats, k: int) -> Floats:
    """Return the sorted cosine distances to the k-th nearest neighbour (the point itself is the first)."""
    k = min(k, len(points))
    found = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        distances = 1.0 - points[start : start + _BLOCK] @ points.T  # (block, N)
        found[start : start + _BLOCK] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return np.sort(np.maximum(found, 0.0))


def nearest(points: Floats, middle: Floats) -> Ints:
    """Return the index of the centroid with the largest cosine for each vector; middle (K, D), K >= 1."""
    return np.asarray(np.argmax(points @ middle.T, axis=1), np.int64)


def centroids(points: Floats, labels: Ints) -> Floats:
    """Return the unit mean of each cluster 0..K-1, shape (K, D); label -1 is left out."""
    count = int(labels.max()) + 1
    middle = np.stack([points[labels == label].mean(axis=0) for label in range(count)])
    norms = np.linalg.norm(middle, axis=1, keepdims=True)
    return np.asarray(middle / np.where(norms > 0, norms, 1.0))


def compact(labels: npt.NDArray[Any]) -> Ints:
    """Return labels renumbered 0..K-1 in order; -1 stays."""
    kept = np.unique(labels[labels >= 0])
    return np.asarray(np.where(labels < 0, -1, np.searchsorted(kept, labels)), np.int64)


def subsample(count: int, limit: int, seed: int) -> Ints:
    """Return sorted row numbers, at most `limit`, a fair draw."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def settle(points: Floats, labels: Ints, config: StyleConfig) -> Ints:
    """Return labels without noise and without small clusters.

    Noise joins the nearest centroid; then, smallest first, clusters below `min_cluster_size` and beyond `max_styles`
    join the nearest other centroid.
    """
    if labels.max() < 0:
        return np.zeros(len(points), np.int64)
    labels = compact(labels)
    lost = labels < 0
    if lost.any():
        labels = np.where(lost, nearest(points, centroids(points, labels)), labels)
    while (count := int(labels.max()) + 1) > 1:
        sizes = np.bincount(labels, minlength=count)
        smallest = int(np.argmin(sizes))
        if sizes[smallest] >= config.min_cluster_size and count <= config.max_styles:
            break
        middle = centroids(points, labels)
        similarity = middle @ middle[smallest]
        similarity[smallest] = -np.inf
        labels = compact(np.where(labels == smallest, int(np.argmax(similarity)), labels))
    return labels


def _dbscan(points: Floats, config: StyleConfig) -> Grouping:
    from sklearn.cluster import DBSCAN

    # Equal vectors are one weighted vector: the same clusters (core = weight within eps), a fraction of the memory.
    distinct, back, weight = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    back = back.reshape(-1)
    eps = config.eps if config.eps != "auto" else _auto_eps(distinct, len(points), config.min_samples)
    model = DBSCAN(eps=eps, min_samples=config.min_samples, metric="cosine")
    raw = model.fit(distinct, sample_weight=weight).labels_[back].astype(np.int64)
    return _settled(points, raw, config, float(eps))


def _auto_eps(distinct: Floats, total: int, min_samples: int) -> float:
    """The knee of the k-distance curve of the distinct vectors.

    Repeats have distance 0 and would pull the knee to 0, so they are left out; k shrinks with their share, from
    `min_samples` (no repeats) to 2, the nearest other vector (all repeated: weight alone makes them cores).
    """
    k = max(2, round(1 + (min_samples - 1) * len(distinct) / total))
    return max(knee(k_distances(distinct, k)), _MIN_EPS)


def _hdbscan(points: Floats, config: StyleConfig) -> Grouping:
    from sklearn.cluster import HDBSCAN

    size = min(max(2, config.min_cluster_size), len(points))
    # On unit vectors the Euclidean distance is sqrt(2 * cosine distance): the same hierarchy.
    model = HDBSCAN(min_cluster_size=size, min_samples=min(config.min_samples, len(points)), copy=True)
    return _settled(points, model.fit(points).labels_.astype(np.int64), config, None)


def _settled(points: Floats, raw: Ints, config: StyleConfig, eps: float | None) -> Grouping:
    return Grouping(settle(points, raw, config), eps, int(raw.max()) + 1, float((raw < 0).mean()))


def _partition(points: Floats, algorithm: str, count: int, seed: int) -> Ints:
    if algorithm == "random":
        return np.random.default_rng(seed).integers(count, size=len(points)).astype(np.int64)
    if algorithm == "kmeans":
        from sklearn.cluster import KMeans

        return np.asarray(KMeans(count, n_init=10, random_state=seed).fit_predict(points), np.int64)
    if algorithm == "gmm":
        from sklearn.mixture import GaussianMixture

        # Diagonal covariances: full ones need more captions than any of our data sets has dimensions squared.
        model = GaussianMixture(count, covariance_type="diag", random_state=seed, reg_covar=1e-4)
        return np.asarray(model.fit_predict(points), np.int64)
    assert algorithm == "agglomerative", algorithm
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(count, metric="cosine", linkage="average")
    return np.asarray(model.fit_predict(points), np.int64)
