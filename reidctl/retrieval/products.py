"""Scores of queries with a gallery: fast ones in blocks, wrong by less than a proven bound, and exact ones of pairs.

The exact score is a function of the two vectors and nothing else. Every component is rounded to an integer multiple of
2^-26. A product of two components is then a multiple of 2^-52, and for vectors no longer than 1 the sum over any subset
of the products is at most 1 by Cauchy and Schwarz, so every partial sum, in any order, with or without fused
multiply-add, fits the 53 bits of a float64 exactly. Floating-point addition without rounding is associative: no block
shape, thread count or library changes a bit. The rounding moves a score by about 2^-27, at most sqrt(D)·2^-26.

The approximate score is the float32 product of the same rounded vectors (they are float32 numbers too), twice as fast.
For D products summed in any order its error is at most γ_D Σ|q_i g_i| <= γ_D |q| |g|, γ_D = D u / (1 - D u), u = 2^-24
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1): 3.1e-5 for D = 512. Whoever compares scores
may trust it outside that margin and must ask for the exact score inside.
"""

import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reidctl.errors import DataError

Matrix = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

QUERY_BLOCK = 1024
GALLERY_BLOCK = 4096
LONGEST = 1.001
_SCALE = 2.0**26
_PAIRS = 256  # pairs of vectors gathered at a time: they should fit the cache
_FEW = 2048  # up to so many pairs, gathering them beats the set-up of the other ways
_LARGE = 1 << 20  # truth values that are worth several threads
_DENSE = 0.06  # share of all pairs above which multiplying everything in float64 is cheaper


class Gallery:
    """The gallery in tie order, handed out in blocks.

    Args:
        vectors: shape (G, D), length at most 1.
        order: the rows in the order that ties are broken in, shape (G,).
        block: items per block.
        device: where products are computed; needs float64.
    """

    def __init__(self, vectors: Matrix, order: Ints, block: int, device: torch.device) -> None:
        self.vectors, self.order, self.block, self.device = vectors, order, block, device
        self._in_place = bool((order == np.arange(len(order))).all())

    def __len__(self) -> int:
        return len(self.order)

    @property
    def slack(self) -> float:
        """The largest possible difference of an approximate and an exact score."""
        width = self.vectors.shape[1]
        gamma = width * 2.0**-24 / (1 - width * 2.0**-24)
        # A little more than proven: comparisons with rounded bounds must stay on the safe side.
        return float(LONGEST**2 * gamma + 2.0**-22)

    def blocks(self, query: torch.Tensor) -> Iterator["Block"]:
        """Yield the products of `query` (q, D) with the gallery; the tensor of scores is reused."""
        shape = (len(query), min(self.block, len(self)))
        scores = torch.empty(shape, dtype=torch.float32, device=self.device)
        wide = query.double()
        for start in range(0, len(self), self.block):
            items = self._items(slice(start, start + self.block))
            part = scores if len(items) == shape[1] else scores.view(-1)[: len(query) * len(items)]
            part = part.view(len(query), len(items))
            torch.mm(query, items.T, out=part)
            yield Block(start, wide, items, part)

    def pair_scores(self, query: torch.Tensor, row: Ints, position: Ints) -> torch.Tensor:
        """Return the exact scores of single pairs, float64, shape (M,).

        Args:
            query: shape (q, D), from `lattice`.
            row: the query of each pair, shape (M,).
            position: its gallery item in tie order, shape (M,).
        """
        found = torch.empty(len(row), dtype=torch.float64, device=self.device)
        for start in range(0, len(row), _PAIRS):
            some = slice(start, start + _PAIRS)
            items = lattice(self.vectors[self.order[position[some]]], self.device)
            rows = torch.from_numpy(row[some]).to(self.device)
            found[some] = (query[rows].double() * items.double()).sum(dim=1)
        return found

    def _items(self, some: slice) -> torch.Tensor:
        rows = self.vectors[some] if self._in_place else self.vectors[self.order[some]]
        return lattice(rows, self.device)


class Block:
    """The scores of some queries with some of the gallery.

    Attributes:
        start: position of the first item in tie order.
        scores: approximate cosines, float32, shape (q, g); may be overwritten.
    """

    def __init__(self, start: int, query: torch.Tensor, items: torch.Tensor, scores: torch.Tensor) -> None:
        self.start, self.scores = start, scores
        self._query, self._items = query, items  # float64 and float32

    def all_exact(self) -> torch.Tensor:
        """Return the exact scores of the whole block, float64, shape (q, g); minus infinity where `scores` are."""
        return (self._query @ self._items.double().T).masked_fill_(torch.isneginf(self.scores), -torch.inf)

    def exact(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return the exact scores of pairs, float64, shape (M,); pairs ascend by row, then column."""
        if len(row) > _DENSE * self.scores.numel():
            return self.all_exact()[row, column]
        if len(row) <= _FEW or self.scores.device.type != "cpu":
            found = torch.empty(len(row), dtype=torch.float64, device=row.device)
            for start in range(0, len(row), _PAIRS):
                some = slice(start, start + _PAIRS)
                found[some] = (self._query[row[some]] * self._items[column[some]].double()).sum(dim=1)
            return found
        return self._sampled(row, column)

    def _sampled(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """A product at the places of a sparse matrix: four times faster than gathering the vectors of each pair."""
        first = torch.zeros(len(self._query) + 1, dtype=torch.int64)
        first[1:] = torch.bincount(row, minlength=len(self._query)).cumsum(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            places = torch.sparse_csr_tensor(
                first,
                column,
                torch.zeros(len(row), dtype=torch.float64),
                size=tuple(self.scores.shape),
                check_invariants=False,  # pairs ascend by row, then column: they hold
            )
            found: torch.Tensor = torch.sparse.sampled_addmm(places, self._query, self._items.double().T, beta=0.0)
        return found.values()


def lattice(vectors: Matrix, device: torch.device) -> torch.Tensor:
    """Return the components rounded to multiples of 2^-26, float32.

    Scaling by a power of two is exact, and so is the result: components below 1/4 become integers below 2^24 times
    2^-26, larger ones are such multiples already.
    """
    values = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)
    return (values * _SCALE).round_().mul_(1 / _SCALE)


@contextmanager
def full_precision() -> Iterator[None]:
    """Make float32 products true float32: TF32 or bfloat16 shortcuts would break the error bound."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # PyTorch before 2.9
        general = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(general)
        return
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def places(mask: torch.Tensor) -> torch.Tensor:
    """Return the flat positions where a contiguous mask is true, ascending."""
    if mask.device.type != "cpu":
        return mask.view(-1).nonzero()[:, 0]
    flat = mask.numpy().reshape(-1)  # NumPy is four times faster than PyTorch here
    threads = torch.get_num_threads()
    if threads == 1 or len(flat) < _LARGE:
        return torch.from_numpy(np.flatnonzero(flat))
    parts = np.array_split(flat, threads)
    found = list(_pool(threads).map(np.flatnonzero, parts))
    starts = np.cumsum([0, *map(len, parts[:-1])])
    return torch.from_numpy(np.concatenate([part + start for part, start in zip(found, starts, strict=True)]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def check_vectors(query: Matrix, gallery: Matrix) -> None:
    """Refuse vectors that cannot be compared.

    Raises:
        DataError: widths differ, or a vector is longer than 1 or not finite.
    """
    if query.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have width {query.shape[1]}, the gallery {gallery.shape[1]}.", hint="Embed both with one model."
        )
    for side, vectors in (("query", query), ("gallery", gallery)):
        for start in range(0, len(vectors), GALLERY_BLOCK):
            part = np.asarray(vectors[start : start + GALLERY_BLOCK], np.float32)
            norm = np.sqrt(np.einsum("nd,nd->n", part, part))
            wrong = np.flatnonzero(~(norm <= LONGEST))  # NaN compares false and is caught too
            if len(wrong):
                row = start + int(wrong[0])
                raise DataError(f"The {side} vector in row {row} has length {norm[wrong[0]]:.4g}, more than 1.")
