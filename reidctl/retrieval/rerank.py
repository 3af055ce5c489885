"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, arXiv:1701.08398) without an N x N matrix.

All items, queries and gallery, are taken together, N of them. With d(i, j) = 2 - 2·cos, the squared Euclidean
distance of unit vectors, and d*(i, j) = d(i, j) / max_j' d(i, j'):

    L_m(i)  item i and its m nearest others
    R_m(i)  = {j in L_m(i): i in L_m(j)}
    R*(i)   = R_k1(i) and every R_h(j), j in R_k1(i), h = round(k1 / 2), with |R_h(j) ∩ R_k1(i)| > 2/3 |R_h(j)|
    V(i)    = exp(-d*(i, j)) for j in R*(i), else 0, divided by its sum
    W(i)    = mean of V over L_{k2-1}(i)
    J(i, j) = 1 - t / (2 - t),  t = Σ_c min(W(i)_c, W(j)_c)
    result  = (1 - weight)·J + weight·d*

These are the rules of the authors' code (zhunzhong07/person-re-ranking, in MATLAB and Python), which decides where the
paper could be read otherwise: lists hold the item itself, "more than" two thirds. For even k1 its two versions agree;
for odd k1 the Python one rounds k1/2 to even, and so do we. Others differ, so their numbers are not comparable digit
by digit. The authors' Python code computes in float16 throughout, CLIP-ReID does so for V, W and J; here all is
float64. torchreid and fast-reid's `evaluation/rerank.py` square what they are given, and torchreid gives squared
distances. fast-reid's evaluator in use has lists one item shorter, does not divide by the maximum, neither in V nor in
the result, and adds 1 - cos.

Differs from all of them in two places where theirs depend on the order of rows. Items tied across the end of a list
are all left out of it: an argsort keeps some of them by position, and where ids are sorted, position knows the
person. So a model that gives every image one vector scores exactly chance. And an image that is query and gallery
item at once, with one id and one vector, counts once.

The result of a query depends on the other queries, which is published practice and no property of a search engine
that answers one query at a time; for that pass one query. Text queries against images work, but where similarities
within a modality are higher than between the two, the neighbours of a caption are other captions, and only what they
share with it brings it near an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from reidctl.errors import DataError, UsageError
from reidctl.retrieval.exact import search
from reidctl.retrieval.labels import Ints, Labels, check_length, texts
from reidctl.retrieval.products import lattice

Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

BLOCK = 1024
_COLUMNS = 1024  # gallery items multiplied at a time
_PAIRS = 256  # few, for the processor's cache
_UNIT = 1e-3  # how far from 1 the length of a "unit vector" may be


@dataclass(frozen=True)
class Parameters:
    """The three numbers of the method.

    Args:
        k1: neighbours in which reciprocity is looked for, at least 1.
        k2: neighbours, the item itself included, over which encodings are averaged, at least 1 (1: no averaging).
        weight: share of the original distance in the result, in [0, 1].

    Raises:
        UsageError: a number out of range.
    """

    k1: int
    k2: int
    weight: float

    def __post_init__(self) -> None:
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.weight <= 1:
            raise UsageError(f"Re-ranking parameters {self.name}: k1 and k2 start at 1, the weight is in [0, 1].")

    @property
    def name(self) -> str:
        """The numbers as people write them, e.g. 20/6/0.3; different numbers have different names."""
        weight = repr(float(self.weight) + 0.0).removesuffix(".0")  # -0 is 0
        return f"{self.k1}/{self.k2}/{weight}"


PRESETS = {
    "zhong": Parameters(20, 6, 0.3),  # the paper; also the default of torchreid and fast-reid
    "clip-reid": Parameters(50, 15, 0.3),  # CLIP-ReID, utils/metrics.py
}


def parse(text: str) -> Parameters:
    """Return the parameters behind a preset's name or a text such as `20/6/0.3`.

    Raises:
        UsageError: neither of them, or a number out of range.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        k1, k2, weight = text.split("/")
        return Parameters(int(k1), int(k2), float(weight))
    except ValueError:
        known = ", ".join(f"{name} ({preset.name})" for name, preset in PRESETS.items())
        raise UsageError(
            f"Unknown re-ranking parameters {text}.", hint=f"Write k1/k2/weight, or one of: {known}."
        ) from None


class KReciprocal:
    """The re-ranked distances of queries and gallery, computed row by row on demand.

    Neighbours come from exact search and everything is summed in the order of ids, so the distances do not depend on
    the order of rows, the block size or the number of threads, bit for bit.

    Memory beyond the inputs is below 12·N·D + 50·N·(k + 2) + 32·N·w + b·(16·G + 16·k1²) + 2^18·D bytes for blocks of
    b rows, k = max(k1, k2), w non-zeros per row of W, besides the ids, the buffers of `exact.search` and 40·(t + G)
    bytes for the Jaccard distances of one query, t the non-zeros of W in the columns that the query has. t is at most
    G times their number, and largest where hubs are everybody's neighbours: there one query took 399 bytes per gallery
    item (20/6, 40,000 items). w is at most k2·(k1 + 1)·(k1 + 8) / 6, on clustered vectors 1 to 4 times k1 for 20/6 and
    4 to 8 times for 50/15; `nonzeros` tells. Quadratic is only the time: two exact searches of all items among all,
    and one product of queries and gallery.

    Args:
        query: unit vectors, shape (Q, D).
        gallery: unit vectors, shape (G, D).
        parameters: see `Parameters`.
        query_id: unique ids, shape (Q,); they decide nothing but the order of sums and which items count once.
        gallery_id: likewise, shape (G,).
        block: rows per block.
        device: where products are computed; needs float64.

    Attributes:
        items: number N of different items.
        nonzeros: number of non-zeros of W.

    Raises:
        DataError: k1 or k2 is beyond the gallery, there are no queries, widths differ, a vector is not finite or not
            of unit length, or an id occurs twice.
    """

    def __init__(
        self,
        query: Matrix,
        gallery: Matrix,
        parameters: Parameters,
        *,
        query_id: Labels,
        gallery_id: Labels,
        block: int = BLOCK,
        device: str | torch.device = "cpu",
    ) -> None:
        _check(query, gallery, parameters)
        self.parameters, self.device = parameters, torch.device(device)
        self._vectors, self._query, self._gallery = _together(query, gallery, query_id, gallery_id)
        self.items = len(self._vectors)
        k1, k2 = parameters.k1, parameters.k2
        farthest = self._farthest(block)
        lists = self._lists((k1, round(k1 / 2), k2 - 1), block)
        encoding = self._encode(_mutual(lists[0]), _mutual(lists[1]), farthest, block)
        expanded = _averaged(lists[2], encoding)
        self.nonzeros = int(expanded.nnz)
        self._farthest_query = farthest[self._query]
        self._rows = expanded[self._query]
        expanded = expanded[self._gallery]  # the rest is released before the next copy
        self._columns = expanded.tocsc()  # column c: which gallery items have c, and how much

    def distances(self, queries: slice) -> Floats:
        """Return the re-ranked distances of some queries to the whole gallery, shape (q, G), in [0, 1]."""
        numbers = np.arange(*queries.indices(len(self._query)))
        result = self._original(numbers)
        weight = self.parameters.weight
        for row, number in enumerate(numbers.tolist()):
            result[row] *= weight
            result[row] += (1 - weight) * self._jaccard(number)
        return result

    def _original(self, numbers: Ints) -> Floats:
        """d* of queries to the gallery, shape (q, G)."""
        part = self._double(self._query[numbers])
        result = np.empty((len(numbers), len(self._gallery)))
        for start in range(0, len(self._gallery), _COLUMNS):
            some = slice(start, start + _COLUMNS)
            result[:, some] = _distance((part @ self._double(self._gallery[some]).T).cpu().numpy())
        return _relative(result, self._farthest_query[numbers][:, None])

    def _double(self, item: Ints) -> torch.Tensor:
        return self._vectors[torch.from_numpy(item)].to(self.device).double()

    def _jaccard(self, number: int) -> Floats:
        """J of one query to the gallery, shape (G,)."""
        mine = slice(self._rows.indptr[number], self._rows.indptr[number + 1])
        columns, values = self._rows.indices[mine], self._rows.data[mine]
        first = self._columns.indptr[columns].astype(np.int64)
        count = self._columns.indptr[columns + 1] - first
        place = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        shared = np.minimum(np.repeat(values, count), self._columns.data[place])
        total = np.bincount(self._columns.indices[place], weights=shared, minlength=len(self._gallery))
        return np.asarray(1 - total / (2 - total))

    def _farthest(self, block: int) -> Floats:
        """max_j d(i, j) of every item, shape (N,)."""
        vectors = self._vectors.numpy()
        opposite, _ = search(-vectors, vectors, top=1, query_block=block, device=self.device)
        return self._pairs(np.arange(self.items), opposite[:, 0])

    def _lists(self, lengths: Sequence[int], block: int) -> list[Any]:
        """L_m for every m of `lengths`: sparse matrices (N, N) of ones, the diagonal included."""
        vectors = self._vectors.numpy()
        index, score = search(vectors, vectors, top=max(lengths) + 2, query_block=block, device=self.device)
        near, value = _others(index.astype(np.int32), score)
        del index, score
        return [self._list(near, value, length) for length in lengths]

    def _list(self, near: npt.NDArray[np.int32], value: Matrix, length: int) -> Any:
        """L_m from the others (N, K) and their cosines (N, K), nearest first."""
        keep = np.ones((self.items, min(length, near.shape[1])), bool)
        if 0 < length < near.shape[1]:
            # Equal float32 cosines are necessary for a tie across the end; the exact distances decide.
            for tied in np.flatnonzero(value[:, length - 1] == value[:, length]).tolist():
                exact = self._pairs(np.full(length + 1, tied), near[tied, : length + 1])
                keep[tied] = exact[:length] < exact[length]
        own = np.arange(self.items, dtype=np.int32)
        row = np.concatenate([np.repeat(own, keep.sum(axis=1)), own])
        column = np.concatenate([near[:, : keep.shape[1]][keep], own])
        return _pattern(row, column, self.items)

    def _encode(self, reciprocal: Any, half: Any, farthest: Floats, block: int) -> Any:
        """V as a sparse matrix (N, N)."""
        size = np.diff(half.indptr)
        turned = half.T.tocsr()
        parts = []
        for start in range(0, self.items, block):
            own = reciprocal[start : start + block]
            overlap = (own @ turned).multiply(own).tocoo()  # |R_h(j) ∩ R_k1(i)| for j in R_k1(i)
            wide = 3 * overlap.data > 2 * size[overlap.col]
            chosen = _ones(overlap.row[wide], overlap.col[wide], own.shape)
            grown = (own + chosen @ half).tocsr()
            grown.sort_indices()
            parts.append(self._weights(grown, start, farthest))
        return sparse.vstack(parts, format="csr")

    def _weights(self, members: Any, start: int, farthest: Floats) -> Any:
        """Rows of V from rows of R*."""
        count = np.diff(members.indptr)
        local = np.repeat(np.arange(members.shape[0]), count)
        distance = self._pairs(local + start, members.indices)
        value = np.exp(-_relative(distance, farthest[local + start]))
        value /= np.bincount(local, weights=value, minlength=members.shape[0])[local]
        return sparse.csr_array((value, members.indices, members.indptr), shape=members.shape)

    def _pairs(self, row: npt.NDArray[Any], column: npt.NDArray[Any]) -> Floats:
        """d of single pairs of items, shape (M,)."""
        vectors, found = self._vectors.numpy(), np.empty(len(row))
        for start in range(0, len(row), _PAIRS):
            some = slice(start, start + _PAIRS)
            left, right = vectors[row[some]].astype(np.float64), vectors[column[some]].astype(np.float64)
            found[some] = _distance(np.einsum("nd,nd->n", left, right))
        return found


def _check(query: Matrix, gallery: Matrix, parameters: Parameters) -> None:
    if not len(query) or not len(gallery):
        raise DataError(f"Re-ranking needs queries and gallery; there are {len(query)} and {len(gallery)}.")
    for name, needed in (("k1", parameters.k1), ("k2", parameters.k2)):
        if needed > len(gallery):
            raise DataError(
                f"Re-ranking {parameters.name} needs {name}={needed} gallery items, there are {len(gallery)}.",
                hint="Take smaller numbers, e.g. `--rerank 5/2/0.3`, or a larger gallery.",
            )
    if query.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have width {query.shape[1]}, the gallery {gallery.shape[1]}.", hint="Embed both with one model."
        )
    for side, vectors in (("query", query), ("gallery", gallery)):
        for start in range(0, len(vectors), _COLUMNS):
            length = np.linalg.norm(vectors[start : start + _COLUMNS].astype(np.float64), axis=1)
            wrong = np.flatnonzero(~(np.abs(length - 1) <= _UNIT))  # NaN compares false and is caught too
            if len(wrong):
                raise DataError(
                    f"The {side} vector in row {start + int(wrong[0])} has length {length[wrong[0]]:.4g}; "
                    "re-ranking needs unit vectors."
                )


def _together(query: Matrix, gallery: Matrix, query_id: Labels, gallery_id: Labels) -> tuple[torch.Tensor, Ints, Ints]:
    """All different items in the order of their ids; which of them each query, and each gallery row, is.

    The vectors are rounded such that products in float64 are exact in any order of summation, see `products`.
    """
    ids = np.concatenate([_unique(gallery_id, len(gallery), "gallery"), _unique(query_id, len(query), "query")])
    order = np.lexsort((np.arange(len(ids)) >= len(gallery), ids))  # a gallery item before the query of its name
    twice = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    fresh = np.ones(len(ids), bool)
    fresh[twice + 1] = (gallery[order[twice]] != query[order[twice + 1] - len(gallery)]).any(axis=1)
    item = np.empty(len(ids), np.int64)
    item[order] = np.cumsum(fresh) - 1
    vectors = np.empty((int(fresh.sum()), gallery.shape[1]), np.float32)
    vectors[item[len(gallery) :]] = query
    vectors[item[: len(gallery)]] = gallery
    return lattice(vectors, torch.device("cpu")), item[len(gallery) :], item[: len(gallery)]


def _unique(ids: Labels, count: int, side: str) -> npt.NDArray[Any]:
    check_length(ids, count, f"{side} id")
    names = texts(ids)
    seen, times = np.unique(names, return_counts=True)
    if (times > 1).any():
        raise DataError(f"The {side} id {seen[times > 1][0]} occurs {times[times > 1][0]} times.")
    return names


def _others(index: npt.NDArray[np.int32], score: Matrix) -> tuple[npt.NDArray[np.int32], Matrix]:
    """The lists (N, K + 1) without the item itself, shape (N, K); where ties pushed it out, without the last."""
    is_self = index == np.arange(len(index))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    shape = (len(index), index.shape[1] - 1)
    return index[~is_self].reshape(shape), score[~is_self].reshape(shape)


def _ones(row: npt.NDArray[Any], column: npt.NDArray[Any], shape: tuple[int, int]) -> Any:
    # Half the memory of SciPy's choice for 64-bit coordinates.
    where = (row.astype(np.int32, copy=False), column.astype(np.int32, copy=False))
    return sparse.csr_array((np.ones(len(row), np.int32), where), shape=shape)


def _pattern(row: npt.NDArray[Any], column: npt.NDArray[Any], items: int) -> Any:
    matrix = _ones(row, column, (items, items))
    matrix.sort_indices()
    return matrix


def _mutual(lists: Any) -> Any:
    """Which members of each item's list have the item in theirs."""
    both = lists.multiply(lists.T.tocsr()).tocsr()
    both.sort_indices()
    return both


def _averaged(lists: Any, encoding: Any) -> Any:
    """W: the mean of the encodings of each list's members, summed in the order of items."""
    mean = (lists.astype(np.float64) @ encoding).tocsr()
    mean.sort_indices()
    mean.data /= np.repeat(np.diff(lists.indptr), np.diff(mean.indptr))
    return mean


def _distance(cosine: Floats) -> Floats:
    """2 - 2·cos, not below 0."""
    return np.asarray(np.maximum(2 - 2 * cosine, 0.0))


def _relative(distance: Floats, farthest: Floats) -> Floats:
    """Distances divided by the farthest one; 0 where all are 0."""
    return np.divide(distance, farthest, out=np.zeros_like(distance), where=farthest > 0)
