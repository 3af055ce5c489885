"""Exact DBSCAN on the cosine distance: scikit-learn's labels from half the distances, in float32 and bounded memory."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_BLOCK = 1024
_LANDMARKS = 64
_CANDIDATES = 4096
_PAIRS = 2048
# A float64 sum of up to some thousand products of unit vectors is off by less; closer calls are made by matrix product.
_TIE = 1e-12


def dbscan(
    points: npt.NDArray[Any],
    eps: float,
    min_samples: int,
    *,
    weight: npt.NDArray[Any] | None = None,
    block: int = _BLOCK,
) -> Ints:
    """Return the DBSCAN cluster of every row, shape (N,): 0, 1, ... in the order of their first core row; noise is -1.

    The labels equal `sklearn.cluster.DBSCAN(eps, min_samples, metric="cosine").fit(points as float64, weight).labels_`
    unless a distance lies within 1e-12 of eps, as on grids of whole numbers.
    Two rows are neighbours if 1 - x.y <= eps with x, y scaled to length 1, all in float64; a row of zeros has distance
    1 to every other row; every row is its own neighbour. A core has neighbours of total weight >= min_samples; cores
    that are neighbours share a cluster; another row belongs to the lowest-numbered cluster that has a core near it.

    Half of the float32 products decide nearly all pairs: what float32 rounding could turn (|1 - x.y - eps| within its
    worst-case bound) is computed again in float64, and what is a tie there too (1e-12) by a float64 matrix product, as
    scikit-learn computes it. For such ties the last bit belongs to the BLAS at hand, in scikit-learn as well as here.
    Blocks of rows whose distances to some landmark differ by more than eps are skipped (triangle inequality of the
    angle). Memory: a float32 copy of the points and at most N^2 / 16 bytes (400 MB for 80,000 rows), whatever eps.

    Args:
        points: rows of any length, shape (N, D).
        eps: cosine distance, > 0.
        min_samples: the row itself counts.
        weight: of each row, shape (N,), as scikit-learn's `sample_weight`; 1 by default.
        block: rows of a tile; changes speed, and the outcome of ties in the last bit (see above).

    Raises:
        DataError: a value is not finite.
    """
    if not len(points):
        return np.zeros(0, np.int64)
    if not np.isfinite(points).all() or (weight is not None and not np.isfinite(weight).all()):
        raise DataError(
            "The vectors to cluster hold a value that is not finite.", hint="Check the encoder of the texts."
        )
    space = _space(points, block)
    graph = _radius_graph(space, eps, None if weight is None else np.asarray(weight, np.float64))
    core = _cores(graph, min_samples)
    labels = np.full(len(points), -1, np.int64)
    labels[space.order] = _clusters(graph, core)
    return labels


@dataclass(frozen=True)
class _Space:
    """Rows in an order that puts neighbours side by side; positions count in that order.

    Attributes:
        given: the points as they came, shape (N, D).
        order: row of `given` at each position.
        rows: unit vectors in that order, float32.
        norms: float64 length of each row of `given`; 1 for a row of zeros.
        block: positions in a tile.
        nearest, farthest: least and greatest angle between the positions of a block and each landmark, (blocks, L).
    """

    given: npt.NDArray[Any]
    order: Ints
    rows: Singles
    norms: Doubles
    block: int
    nearest: Doubles
    farthest: Doubles

    @property
    def error(self) -> float:
        """Bound of the rounding of a float32 dot product of unit vectors, whatever the order of summation."""
        return float(self.rows.shape[1] + 16) * 2.0**-24

    @property
    def blocks(self) -> int:
        return -(-len(self.rows) // self.block)

    def part(self, index: int) -> slice:
        return slice(index * self.block, min((index + 1) * self.block, len(self.rows)))

    def exact(self, part: slice) -> Doubles:
        """Unit vectors of a block in float64."""
        chosen = self.order[part]
        return np.asarray(self.given[chosen], np.float64) / self.norms[chosen, None]


@dataclass(frozen=True)
class _Graph:
    """Which positions are neighbours.

    Attributes:
        tiles: (row block, column block >= row block) -> neighbour bits, packed along the columns; empty ones left out.
        reach: total weight of the neighbours of each position.
        weight: of each position, or None.
    """

    space: _Space
    tiles: dict[tuple[int, int], npt.NDArray[np.uint8]]
    reach: Doubles
    weight: Doubles | None

    def tile(self, key: tuple[int, int]) -> Bools:
        columns = self.space.part(key[1])
        return np.unpackbits(self.tiles[key], axis=1, count=columns.stop - columns.start).view(np.bool_)

    def neighbours(self, position: int) -> Ints:
        """Positions of the neighbours of one position."""
        block, inside = divmod(position, self.space.block)
        found = []
        for row, column in self.tiles:
            if row == block:
                found.append(np.flatnonzero(self.tile((row, column))[inside]) + column * self.space.block)
            elif column == block:
                found.append(np.flatnonzero(self.tile((row, column))[:, inside]) + row * self.space.block)
        return np.concatenate(found)


def _space(points: npt.NDArray[Any], block: int) -> _Space:
    norms = _lengths(points)
    if len(points) <= 2 * block:
        order, landmarks = np.arange(len(points)), np.zeros((0, points.shape[1]), np.float32)
    else:
        landmarks = _landmarks(points, norms)
        order = _order(points, norms, landmarks)
    rows = np.empty(points.shape, np.float32)
    for start in range(0, len(points), block):
        chosen = order[start : start + block]
        rows[start : start + block] = np.asarray(points[chosen], np.float64) / norms[chosen, None]
    blocks = -(-len(points) // block)
    space = _Space(points, order, rows, norms, block, np.zeros((blocks, 0)), np.zeros((blocks, 0)))
    if not len(landmarks):
        return space
    nearest, farthest = (np.empty((blocks, len(landmarks))) for _ in range(2))
    for index in range(blocks):
        cosine = (rows[space.part(index)] @ landmarks.T).astype(np.float64)
        # The bound keeps the angle safe where the arc cosine is steep: near 0 and near 180 degrees.
        nearest[index] = np.arccos(np.clip(cosine.max(axis=0) + space.error, -1, 1))
        farthest[index] = np.arccos(np.clip(cosine.min(axis=0) - space.error, -1, 1))
    return _Space(points, order, rows, norms, block, nearest, farthest)


def _lengths(points: npt.NDArray[Any]) -> Doubles:
    norms = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        part = np.asarray(points[start : start + _BLOCK], np.float64)
        norms[start : start + _BLOCK] = np.sqrt(np.einsum("ij,ij->i", part, part))
    norms[norms == 0] = 1.0
    return norms


def _landmarks(points: npt.NDArray[Any], norms: Doubles) -> Singles:
    """Rows far from each other: each is the farthest from those before it, among an even sample."""
    sample = np.linspace(0, len(points) - 1, min(len(points), _CANDIDATES)).astype(np.int64)
    rows = (points[sample] / norms[sample, None]).astype(np.float32)
    chosen = [0]
    closest = rows @ rows[0]
    while len(chosen) < _LANDMARKS:
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, rows @ rows[chosen[-1]])
    found = rows[chosen]
    # Each is followed by the nearest one left, so that the landmarks of one cluster stand together and so do its rows.
    cosine = found @ found.T
    chain = [0]
    while len(chain) < len(found):
        cosine[:, chain[-1]] = -2
        chain.append(int(np.argmax(cosine[chain[-1]])))
    return found[chain]


def _order(points: npt.NDArray[Any], norms: Doubles, landmarks: Singles) -> Ints:
    nearest, cosine = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    for start in range(0, len(points), _BLOCK):
        part = slice(start, start + _BLOCK)
        found = (points[part] / norms[part, None]).astype(np.float32) @ landmarks.T
        nearest[part], cosine[part] = found.argmax(axis=1), found.max(axis=1)
    return np.lexsort((-cosine, nearest)).astype(np.int64)


def _radius_graph(space: _Space, eps: float, weight: Doubles | None) -> _Graph:
    weight = None if weight is None else weight[space.order]
    reach = np.zeros(len(space.rows))
    tiles = {}
    for (row, column), found in _each(lambda key: _tile(space, eps, key, weight), list(_pairs(space, eps))):
        if found is None:
            continue
        tiles[row, column], of_rows, of_columns = found
        reach[space.part(row)] += of_rows
        if row != column:
            reach[space.part(column)] += of_columns
    return _Graph(space, tiles, reach, weight)


def _pairs(space: _Space, eps: float) -> Iterator[tuple[int, int]]:
    """Pairs of blocks that may hold neighbours: their angles to no landmark differ by more than that of eps."""
    limit = float(np.arccos(max(1.0 - eps, -1.0))) + 1e-6
    for row in range(space.blocks):
        if not space.nearest.shape[1] or eps >= 2:
            yield from ((row, column) for column in range(row, space.blocks))
            continue
        gap = np.maximum(space.nearest[row] - space.farthest[row:], space.nearest[row:] - space.farthest[row]).max(
            axis=1
        )
        yield from ((row, row + int(step)) for step in np.flatnonzero(gap <= limit))


def _each(work: Callable[[tuple[int, int]], Any], keys: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Any]]:
    """Results in order, computed by as many threads as the BLAS may use; each product then takes one."""
    from threadpoolctl import threadpool_info, threadpool_limits

    threads = max((int(one["num_threads"]) for one in threadpool_info() if one["user_api"] == "blas"), default=1)
    threads = min(threads, os.cpu_count() or 1, max(len(keys), 1))
    if threads == 1:
        yield from ((key, work(key)) for key in keys)
        return
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield from zip(keys, pool.map(work, keys), strict=True)


def _tile(
    space: _Space, eps: float, key: tuple[int, int], weight: Doubles | None
) -> tuple[npt.NDArray[np.uint8], Doubles, Doubles] | None:
    """Packed neighbour bits of a tile and the weight of the neighbours of its rows and of its columns."""
    rows, columns = space.part(key[0]), space.part(key[1])
    cosine = space.rows[rows] @ space.rows[columns].T  # (block, block)
    low, high = np.float32(1 - eps - space.error), np.float32(1 - eps + space.error)
    if cosine.max() < low and rows != columns:
        return None
    near = cosine >= low
    doubtful = cosine <= high
    doubtful &= near
    if doubtful.any():
        near = _decided(space, eps, key, near, doubtful)
    if rows == columns:
        np.fill_diagonal(near, True)
    if weight is None:
        counted = near.view(np.uint8).astype(np.float32)  # exact: no tile holds 2^24 neighbours in a row
        of_rows, of_columns = counted.sum(axis=1), counted.sum(axis=0)
    else:
        of_rows, of_columns = near @ weight[columns], weight[rows] @ near
    return np.packbits(near, axis=1), of_rows.astype(np.float64), of_columns.astype(np.float64)


def _decided(space: _Space, eps: float, key: tuple[int, int], near: Bools, doubtful: Bools) -> Bools:
    """`near` with the doubtful pairs settled in float64."""
    left, right = space.exact(space.part(key[0])), space.exact(space.part(key[1]))
    first, second = np.nonzero(doubtful)
    # Beyond some per cent of a tile the matrix product is cheaper than gathering the pairs.
    if len(first) <= doubtful.size // 32:
        distance = np.empty(len(first))
        for start in range(0, len(first), _PAIRS):
            part = slice(start, start + _PAIRS)
            distance[part] = 1.0 - np.einsum("ij,ij->i", left[first[part]], right[second[part]])
        if np.abs(distance - eps).min() > _TIE:
            near[first, second] = distance <= eps
            return near
    return np.where(doubtful, 1.0 - left @ right.T <= eps, near)


def _cores(graph: _Graph, min_samples: int) -> Bools:
    """Which positions have neighbours of enough weight."""
    weight, reach = graph.weight, graph.reach.copy()
    if weight is not None and (weight != np.round(weight)).any():
        # Fractions round by the order of summation; scikit-learn's order decides the close calls.
        close = np.abs(reach - min_samples) < 1e-9 * np.abs(weight).sum()
        for position in np.flatnonzero(close):
            near = graph.neighbours(int(position))
            reach[position] = np.sum(weight[near[np.argsort(graph.space.order[near])]])
    return np.asarray(reach >= min_samples)


def _clusters(graph: _Graph, core: Bools) -> Ints:
    """Cluster of each position, numbered by the first core in the order of the given points; -1 for noise."""
    order = graph.space.order
    joined = _components(graph, core)
    first = np.full(len(core), len(core), np.int64)
    np.minimum.at(first, joined[core], order[core])
    number = np.full(len(core), -1, np.int64)
    used = np.flatnonzero(first < len(core))
    number[used[np.argsort(first[used])]] = np.arange(len(used))
    labels = np.where(core, number[joined], len(core))
    for key in graph.tiles if not core.all() and core.any() else ():
        _give_borders(graph, key, core, labels)
    return np.where(labels == len(core), -1, labels)


def _components(graph: _Graph, core: Bools) -> Ints:
    """Connected component of every core (cores only are joined).

    Tile by tile, each row and column names one neighbour in another component, and `connected_components` joins them:
    a component with any such neighbour is joined at least once, so their number halves until a tile has none left.
    """
    joined = np.arange(len(core))
    for block in range(graph.space.blocks):
        keys = [key for key in graph.tiles if key[0] == block]
        while keys:
            edges = {key: found for key in keys if len(found := _crossings(graph, key, core, joined))}
            keys = list(edges)
            if keys:
                joined = _join(joined, np.concatenate(list(edges.values())))
    return joined


def _crossings(graph: _Graph, key: tuple[int, int], core: Bools, joined: Ints) -> Ints:
    """Pairs of components with an edge between them in a tile, shape (E, 2): one or more per component that has any."""
    rows, columns = graph.space.part(key[0]), graph.space.part(key[1])
    rows_joined, columns_joined = joined[rows], joined[columns]
    present = np.concatenate([rows_joined[core[rows]], columns_joined[core[columns]]])
    if not len(present) or (present == present[0]).all():
        return np.zeros((0, 2), np.int64)
    cross = graph.tile(key)
    cross &= core[columns]
    cross &= core[rows, None]
    cross &= rows_joined[:, None].astype(np.int32) != columns_joined.astype(np.int32)
    by_row, by_column = cross.argmax(axis=1), cross.argmax(axis=0)
    has_row = cross[np.arange(len(by_row)), by_row]
    has_column = cross[by_column, np.arange(len(by_column))]
    left = np.concatenate([rows_joined[has_row], rows_joined[by_column[has_column]]])
    right = np.concatenate([columns_joined[by_row[has_row]], columns_joined[has_column]])
    return np.stack([left, right], axis=1)


def _join(joined: Ints, edges: Ints) -> Ints:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = int(joined.max()) + 1
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1][joined], np.int64)


def _give_borders(graph: _Graph, key: tuple[int, int], core: Bools, labels: Ints) -> None:
    """Lower `labels` of positions that are no cores to the lowest cluster among their neighbours in a tile."""
    rows, columns = graph.space.part(key[0]), graph.space.part(key[1])
    if core[rows].all() and core[columns].all():
        return
    near = graph.tile(key)
    for mine, other, tile in ((rows, columns, near), (columns, rows, near.T)):
        border, cores = np.flatnonzero(~core[mine]), np.flatnonzero(core[other])
        if not len(border) or not len(cores):
            continue
        found = np.where(tile[np.ix_(border, cores)], labels[other][cores], len(core)).min(axis=1)
        labels[mine.start + border] = np.minimum(labels[mine.start + border], found)
