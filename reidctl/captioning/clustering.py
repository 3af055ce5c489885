"""Clustering of unit vectors by cosine distance, with every vector in a cluster of a decent size at the end."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.captioning.config import StyleConfig
from reidctl.captioning.dbscan import dbscan

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

# Above the rounding of float32 distances: the pair whose distance is the knee must lie within eps on every machine.
_MARGIN = 1e-4
_BLOCK = 1024
_CURVE_ROWS = 5_000
# Points that an algorithm is fitted on. Agglomerative and HDBSCAN take time, and the first also memory (8 N^2 bytes),
# that grows with the square of their number; k-means and EM with ten and one start only grow in proportion.
FIT_ROWS = {"agglomerative": 5_000, "hdbscan": 5_000, "kmeans": 50_000, "gmm": 20_000}


@dataclass(frozen=True)
class Grouping:
    """A finished clustering.

    Attributes:
        labels: cluster per vector, 0..K-1, no -1, shape (N,).
        eps: neighbourhood radius (cosine distance) or None.
        found: clusters before merging.
        noise: share of the vectors seen that the algorithm left to the nearest centroid.
        merged: clusters that joined another because they were small or too many.
        seen: vectors that the algorithm was fitted on; fewer than N where it cannot take them all (`FIT_ROWS`).
    """

    labels: Ints
    eps: float | None
    found: int
    noise: float
    merged: int = 0
    seen: int = 0


def group(points: Floats, config: StyleConfig, seed: int) -> Grouping:
    """Return the clustering of unit vectors (N, D) by `config.algorithm`.

    Algorithms that cannot take all vectors (`FIT_ROWS`) see a seeded draw; the rest go to the nearest centroid.
    """
    if len(points) < 2 or config.algorithm == "none":
        return Grouping(np.zeros(len(points), np.int64), None, min(1, len(points)), 0.0, seen=len(points))
    if config.algorithm == "dbscan":
        return _dbscan(points, config, seed)
    rows = subsample(len(points), FIT_ROWS.get(config.algorithm, len(points)), seed)
    seen = points if len(rows) == len(points) else points[rows]
    raw = _hdbscan(seen, config) if config.algorithm == "hdbscan" else _partition(points, seen, config, seed)
    if config.algorithm == "hdbscan":
        found = _settled(seen, raw, config, None)
    else:
        found = Grouping(compact(raw), None, int(raw.max()) + 1, 0.0, seen=len(rows))
    if len(rows) == len(points):
        return found
    labels = nearest(points, centroids(seen, found.labels))
    labels[rows] = found.labels
    return replace(found, labels=labels)


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


def k_distances(points: Floats, k: int, *, rows: Ints | None = None) -> Floats:
    """Return the sorted cosine distances to the k-th nearest neighbour (the point itself is the first).

    Args:
        points: unit vectors, shape (N, D).
        k: at most N counts.
        rows: whose distances to ALL points are wanted; all by default. A fair draw of rows gives a fair draw of the
            curve, because each value is exact: its quantiles, and so its knee, keep their place.
    """
    rows = np.arange(len(points)) if rows is None else rows
    k = min(k, len(points))
    found = np.empty(len(rows))
    step = max(1, min(_BLOCK, 2**24 // max(len(points), 1)))  # 64 MB of float32 distances at a time
    for start in range(0, len(rows), step):
        distances = 1 - points[rows[start : start + step]] @ points.T  # (block, N)
        distances.partition(k - 1, axis=1)
        found[start : start + step] = distances[:, k - 1]
    return np.sort(np.maximum(found, 0.0))


def nearest(points: Floats, middle: Floats) -> Ints:
    """Return the index of the centroid with the largest cosine for each vector; middle (K, D), K >= 1."""
    found = np.empty(len(points), np.int64)
    for start in range(0, len(points), _BLOCK):
        found[start : start + _BLOCK] = np.argmax(points[start : start + _BLOCK] @ middle.T, axis=1)
    return found


def centroids(points: Floats, labels: Ints) -> Floats:
    """Return the unit mean of each cluster 0..K-1, shape (K, D), float64; label -1 is left out."""
    return _scaled(_sums(points, labels))


def _sums(points: Floats, labels: Ints) -> npt.NDArray[np.float64]:
    sums = np.zeros((int(labels.max()) + 1, points.shape[1]))
    for start in range(0, len(points), _BLOCK):
        part, of = points[start : start + _BLOCK], labels[start : start + _BLOCK]
        for label in np.unique(of[of >= 0]):
            sums[label] += part[of == label].sum(axis=0, dtype=np.float64)
    return sums


def _scaled(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(sums / np.where(norms > 0, norms, 1.0))


def compact(labels: npt.NDArray[Any]) -> Ints:
    """Return labels renumbered 0..K-1 in order; -1 stays."""
    kept = np.unique(labels[labels >= 0])
    return np.asarray(np.where(labels < 0, -1, np.searchsorted(kept, labels)), np.int64)


def subsample(count: int, limit: int, seed: int) -> Ints:
    """Return sorted row numbers, at most `limit`, a fair draw."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def distinct_rows(points: Floats) -> tuple[Ints, Ints, Ints]:
    """Return the first row of each distinct vector, the place of each row among those, and how often each occurs."""
    place: dict[bytes, int] = {}
    first: list[int] = []
    back = np.empty(len(points), np.int64)
    for row, point in enumerate(points):
        # A digest instead of the bytes: the keys would be a second copy of the points.
        key = hashlib.blake2b(point.tobytes(), digest_size=16).digest()
        if (known := place.setdefault(key, len(first))) == len(first):
            first.append(row)
        back[row] = known
    return np.asarray(first, np.int64), back, np.bincount(back, minlength=len(first)).astype(np.int64)


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
    # Sums add up when clusters merge, so the points are read once, however many clusters DBSCAN found.
    sums, sizes, owner = _sums(points, labels), np.bincount(labels), np.arange(int(labels.max()) + 1)
    alive = np.ones(len(sizes), bool)
    while (count := int(alive.sum())) > 1:
        smallest = int(np.argmin(np.where(alive, sizes, len(points) + 1)))
        if sizes[smallest] >= config.min_cluster_size and count <= config.max_styles:
            break
        alive[smallest] = False
        similarity = _scaled(sums) @ _scaled(sums[smallest : smallest + 1])[0]
        target = int(np.argmax(np.where(alive, similarity, -np.inf)))
        sums[target] += sums[smallest]
        sizes[target] += sizes[smallest]
        owner[owner == smallest] = target
    return compact(owner[labels])


def _dbscan(points: Floats, config: StyleConfig, seed: int) -> Grouping:
    # Equal vectors are one weighted vector: the same clusters (core = weight within eps), a fraction of the memory.
    first, back, weight = distinct_rows(points)
    distinct = points if len(first) == len(points) else points[first]
    eps = config.eps if config.eps != "auto" else _auto_eps(distinct, len(points), config.min_samples, seed)
    raw = dbscan(distinct, eps, config.min_samples, weight=weight)[back]
    return _settled(points, raw, config, float(eps))


def _auto_eps(distinct: Floats, total: int, min_samples: int, seed: int) -> float:
    """The knee of the k-distance curve of the distinct vectors, from a seeded draw of `_CURVE_ROWS` of them.

    Repeats have distance 0 and would pull the knee to 0, so they are left out; k shrinks with their share, from
    `min_samples` (no repeats) to 2, the nearest other vector (all repeated: weight alone makes them cores).
    """
    k = max(2, round(1 + (min_samples - 1) * len(distinct) / total))
    return knee(k_distances(distinct, k, rows=subsample(len(distinct), _CURVE_ROWS, seed))) + _MARGIN


def _settled(points: Floats, raw: Ints, config: StyleConfig, eps: float | None) -> Grouping:
    labels = settle(points, raw, config)
    found = int(raw.max()) + 1
    merged = max(found - (int(labels.max()) + 1), 0)
    return Grouping(labels, eps, found, float((raw < 0).mean()), merged, len(points))


def _hdbscan(points: Floats, config: StyleConfig) -> Ints:
    from sklearn.cluster import HDBSCAN

    size = min(max(2, config.min_cluster_size), len(points))
    # On unit vectors the Euclidean distance is sqrt(2 * cosine distance): the same hierarchy.
    model = HDBSCAN(min_cluster_size=size, min_samples=min(config.min_samples, len(points)), copy=True)
    return np.asarray(model.fit(points).labels_, np.int64)


def _partition(points: Floats, seen: Floats, config: StyleConfig, seed: int) -> Ints:
    """Labels of `seen` by an algorithm that is told how many clusters: as configured, or as DBSCAN finds."""
    wanted = int(_dbscan(points, config, seed).labels.max()) + 1 if config.clusters == "auto" else config.clusters
    count = min(wanted, len(distinct_rows(seen)[0]))
    if config.algorithm == "random":
        return np.random.default_rng(seed).integers(count, size=len(seen)).astype(np.int64)
    if config.algorithm == "kmeans":
        from sklearn.cluster import KMeans

        return np.asarray(KMeans(count, n_init=10, random_state=seed).fit_predict(seen), np.int64)
    if config.algorithm == "gmm":
        from sklearn.mixture import GaussianMixture

        # Diagonal covariances: full ones need more captions than any of our data sets has dimensions squared.
        model = GaussianMixture(count, covariance_type="diag", random_state=seed, reg_covar=1e-4)
        return np.asarray(model.fit_predict(seen), np.int64)
    if config.algorithm == "ups":
        return ups(seen, count, sigma=config.ups_sigma, samples=config.ups_samples, seed=seed)
    assert config.algorithm == "agglomerative", config.algorithm
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(count, metric="cosine", linkage="average")
    return np.asarray(model.fit_predict(seen), np.int64)


def ups(points: Floats, count: int, *, sigma: float, samples: int, seed: int) -> Ints:
    """Return the cluster of every vector by k-means centres beside uniformly drawn prototypes, after HAM.

    HAM's (as papers.md 3.5 reports it; its paper was not checked here): as many prototypes from k-means as drawn
    uniformly, per dimension, from [mu - sigma * s, mu + sigma * s] with the mean mu and the standard deviation s of
    the vectors (K1 = K2 = 1000, sigma = 7), and the `samples` (200) vectors nearest to a prototype make its style. A
    uniform prototype gives sparse regions a style of their own, which clustering by density or by mass starves.

    Ours, because HAM's styles overlap and leave vectors out while a caption here has one style: K1 = `count` - K2 and
    K2 = `count` // 2, so that the ablation compares equal numbers of styles; a vector that several prototypes claim
    goes to the one nearest by Euclidean distance; prototypes that claim none vanish; a vector that none claims goes to
    the nearest centroid (cosine) of the claimed ones; and a prototype claims at most its fair share N / `count`, so
    that the two hundred of a corpus of 80,000 captions do not make one style of a hundred captions.
    """
    from sklearn.cluster import KMeans

    drawn = count // 2
    rng = np.random.default_rng(seed)
    mean, spread = points.mean(axis=0, dtype=np.float64), points.std(axis=0, dtype=np.float64)
    fitted = points[subsample(len(points), FIT_ROWS["kmeans"], seed)]
    made = KMeans(count - drawn, n_init=10, random_state=seed).fit(fitted).cluster_centers_
    uniform = mean + sigma * spread * rng.uniform(-1, 1, size=(drawn, points.shape[1]))
    prototypes = np.concatenate([made, uniform]).astype(np.float64)
    squared = (prototypes**2).sum(axis=1)
    limit = max(1, min(samples, -(-len(points) // count)))
    distance = np.concatenate(
        [squared - 2 * (points[at : at + _BLOCK] @ prototypes.T) for at in range(0, len(points), _BLOCK)]
    )  # (N, K), less each vector's own squared length, which is 1
    labels = np.full(len(points), -1, np.int64)
    closest = np.full(len(points), np.inf)
    for prototype in range(count):
        column = distance[:, prototype]
        claimed = np.argsort(column, kind="stable")[:limit]
        won = claimed[column[claimed] < closest[claimed]]
        labels[won], closest[won] = prototype, column[won]
    labels = compact(labels)
    return np.where(labels < 0, nearest(points, centroids(points, labels)), labels)
