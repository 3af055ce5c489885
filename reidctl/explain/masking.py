"""The engine behind every masked picture: who judges, which pairs, their pictures made ready, and exact scores.

The time goes to the encoder: pictures are decoded once per chunk, equal masks of a picture are encoded once whichever
explainers and controls they come from, and batches are full. Work goes on in chunks of pairs, each of which may be
kept on disk, so that a run that was killed goes on where it stopped.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reidctl.backbones.base import Triple
from reidctl.errors import DataError, UsageError
from reidctl.explain.controls import (
    Chosen,
    Grid,
    Ints,
    Key,
    Maps,
    Orders,
    Plan,
    order_pairs,
    pair_seed,
    patch_count,
    plan_keys,
)
from reidctl.explain.fills import Fill, Pictures, Pixels, check_fill, make_fill
from reidctl.loading import load_ahead
from reidctl.retrieval.products import lattice

T = TypeVar("T")
Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Advance = Callable[[int], None]
Embed = Callable[[Tensor, Tensor | None, Ints], Tensor]
"""(images (B, 3, H, W), patches to keep bool (B, N) or None, gallery rows (B,)) -> vectors (B, D)."""

_IMAGES = 4096  # about so many images are encoded between two parts on disk
_ROWS = 8192  # gallery vectors that are doubled at a time
_MOST_PAIRS = 64
_CPU = torch.device("cpu")


class Source(Protocol):
    """Decoded pictures by gallery row, uint8 (H, W, 3): a `PixelStore`, or a list of arrays."""

    def __getitem__(self, row: int, /) -> Pixels: ...


@dataclass(frozen=True)
class Judge:
    """The model that sees the masked pictures: the explained one, or another one.

    Args:
        embed: unit vectors of images. It is told the gallery rows of the images, because a method may read texts or
            the camera of an image too, and which patches to keep when the fill is `drop`.
        store: the gallery's pictures at the size that `embed` takes.
        mean, std: the checkpoint's pixel statistics.
        grid: (h, w) of the patches that the model reads; only `drop` needs it.
        name: what the column `judge` says.
        device: where images are filled; `embed` gets them there.
        batch: images per call of `embed`.
    """

    embed: Embed
    store: Source
    mean: Triple
    std: Triple
    grid: Grid
    name: str = ""
    device: torch.device | str = "cpu"
    batch: int = 128


@dataclass(frozen=True)
class Pairs:
    """Queries, each with the image that is explained, and the gallery that the image is ranked in.

    Args:
        query_id, image_id, person_id: names of each pair, M each.
        query: query vectors of the judge, shape (M, D); with the scope `all_positives` pairs of a query share theirs.
        target: gallery row of the image, shape (M,).
        right: for each pair the gallery rows of the query's person, the target among them.
        gallery: gallery vectors of the judge, shape (G, D).
        donor: gallery row of a picture of another person for each pair, for the fill `swap`.
    """

    query_id: Sequence[str]
    image_id: Sequence[str]
    person_id: Sequence[str]
    query: Vectors
    target: Ints
    right: Sequence[Ints]
    gallery: Vectors
    donor: Ints | None = None

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Study:
    """Who judges which maps of which pairs, and how.

    Args:
        judge: the model that sees masked pictures.
        pairs: what is explained.
        maps: relevance by explainer, each (M, N); a row with NaN means that this pair has no map of it.
        grid: (h, w) of the maps.
        plan: fractions, fills and controls.
        others: maps of the controls `phrase` and `query` by (explainer, control), and of ("", "pooled"), each (M, N).

    Raises:
        UsageError: a fill or a shape does not fit, or there is no map.
        DataError: a target is not among the right images of its query.
    """

    judge: Judge
    pairs: Pairs
    maps: Mapping[str, Maps]
    grid: Grid
    plan: Plan = field(default_factory=Plan)
    others: Mapping[Key, Maps] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.maps:
            raise UsageError("There are no maps to test.", hint="Name an explainer.")
        shape = (len(self.pairs), self.grid[0] * self.grid[1])
        wrong = [name for name, values in [*self.maps.items(), *self.others.items()] if values.shape != shape]
        if wrong:
            raise UsageError(f"The maps of {wrong[0]} are not {shape[0]} times {shape[1]} patches.")
        for fill in self.plan.fills:
            check_fill(fill)
        if "swap" in self.plan.fills and self.pairs.donor is None:
            raise UsageError("The fill `swap` needs a donor for each pair.", hint="See `controls.pick_donors`.")
        if "drop" in self.plan.fills and patch_count(max(self.plan.fractions), shape[1]) == shape[1]:
            raise UsageError("The fill `drop` cannot drop every patch.", hint="Give smaller fractions.")
        for row, (target, right) in enumerate(zip(self.pairs.target.tolist(), self.pairs.right, strict=True)):
            if target not in right:
                raise DataError(
                    f"Image `{self.pairs.image_id[row]}` is not a right one of query `{self.pairs.query_id[row]}`."
                )

    @property
    def orders(self) -> int:
        """The orders in which the patches of one pair are removed."""
        return len(plan_keys(self.plan, list(self.maps), self.others))


@dataclass(frozen=True)
class Parts(Generic[T]):
    """How the results of chunks are kept: the end of their names, and functions that read and write them whole."""

    suffix: str
    read: Callable[[Path], T]
    write: Callable[[Path, T], None]


def run_chunks(
    study: Study,
    work: Callable[["Chunk", Advance], T],
    parts: Parts[T],
    *,
    images: int,
    chunk: int | None = None,
    folder: Path | None = None,
    key: object = "",
    advance: Advance | None = None,
) -> Iterator[tuple[Ints, T]]:
    """Yield (rows of pairs, `work` of their chunk) for all pairs; results in `folder` are read, not made.

    Args:
        study: the pairs.
        work: makes the result of a chunk, and says how many images it has encoded.
        parts: how results are kept.
        images: of one pair, equal masks counted each time.
        chunk: pairs per chunk; by default about 4,096 images.
        folder: where results are kept.
        key: what results depend on beside the study; parts of another key are left alone.
        advance: called with the number of images done.
    """
    chunks = _chunks(study, chunk or min(_MOST_PAIRS, max(1, _IMAGES // images)))
    state = _fingerprint(study, key) if folder else ""
    firsts = np.cumsum([0, *map(len, chunks)]).tolist()
    names = [
        f"part-{first:07d}-{len(rows)}-{state}.{parts.suffix}" for first, rows in zip(firsts, chunks, strict=False)
    ]
    paths = [folder / name if folder else None for name in names]
    done = [path is not None and path.is_file() for path in paths]
    fresh = [rows for rows, kept in zip(chunks, done, strict=True) if not kept]
    prepared = load_ahead(lambda rows: prepare(study, rows), fresh, threads=_threads(study.judge))
    with contextlib.closing(prepared):
        for rows, path, kept in zip(chunks, paths, done, strict=True):
            with _Meter(advance, len(rows) * images) as meter:
                if path and kept:
                    result = parts.read(path)
                else:
                    result = work(next(prepared), meter.advance)
                    if path:
                        parts.write(path, result)
            yield rows, result


def _threads(judge: Judge) -> int:
    """Beside a GPU the next chunk is made ready by a thread; beside a CPU that would only fight for the core."""
    return int(torch.device(judge.device).type == "cuda")


class _Meter:
    """Progress of one chunk; what need not be encoded is added at its end."""

    def __init__(self, advance: Advance | None, total: int) -> None:
        self._advance, self._left = advance, total

    def advance(self, count: int) -> None:
        self._left -= count
        if self._advance:
            self._advance(count)

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._left:
            self.advance(self._left)


def _chunks(study: Study, size: int) -> list[Ints]:
    """Rows of the pairs in chunks of about `size`; with the scope `all_positives` a query is never split."""
    pairs, whole = study.pairs, study.plan.scope == "all_positives"
    queries: dict[object, list[int]] = {}
    for row, name in enumerate(pairs.query_id):
        queries.setdefault(name if whole else row, []).append(row)
    chunks: list[list[int]] = []
    for rows in queries.values():
        if whole and len(set(pairs.target[rows].tolist())) < len(rows):
            raise UsageError(
                f"Query `{pairs.query_id[rows[0]]}` has two maps of one image.",
                hint="With the scope all_positives each right image is masked once.",
            )
        if not chunks or len(chunks[-1]) + len(rows) > size:
            chunks.append([])
        chunks[-1] += rows
    return [np.asarray(rows, np.int64) for rows in chunks]


def _fingerprint(study: Study, key: object) -> str:
    """Everything that decides the numbers, as far as it can be read: names, vectors, maps and the plan."""
    pairs, judge = study.pairs, study.judge
    state = hashlib.sha256(repr((key, study.plan, study.grid, judge.name, judge.grid, judge.mean, judge.std)).encode())
    state.update(repr((list(pairs.query_id), list(pairs.image_id), list(pairs.person_id))).encode())
    arrays: list[npt.NDArray[Any]] = [pairs.query, pairs.target, *pairs.right, pairs.gallery]
    arrays += [] if pairs.donor is None else [pairs.donor]
    arrays += [*study.maps.values(), *study.others.values()]
    state.update(repr((list(study.maps), list(study.others), [array.shape for array in arrays])).encode())
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:20]


@dataclass(frozen=True)
class Chunk:
    """Some pairs made ready: decoded pictures and the orders in which their patches are removed.

    Attributes:
        rows: the pairs, shape (p,).
        picture: which picture each pair shows, shape (p,); pairs of one image share it.
        image: gallery row of each picture.
        pictures: the pixels.
        orders: see `controls.Orders`.
    """

    rows: Ints
    picture: Ints
    image: Ints
    pictures: Pictures
    orders: Orders


def prepare(study: Study, rows: Ints) -> Chunk:
    """Return some pairs made ready, each picture decoded once.

    Raises:
        DataError: a picture cannot be read.
    """
    pairs, judge, seed = study.pairs, study.judge, study.plan.seed
    donor = pairs.donor if pairs.donor is not None and "swap" in study.plan.fills else None
    foreign = pairs.target if donor is None else donor
    shown, first, picture = np.unique(
        np.stack([pairs.target[rows], foreign[rows]], axis=1), axis=0, return_index=True, return_inverse=True
    )
    pictures = Pictures(
        np.stack([judge.store[row] for row in shown[:, 0].tolist()]),
        grid=study.grid,
        mean=judge.mean,
        std=judge.std,
        tower_grid=judge.grid,
        seeds=[(seed, pair_seed("", pairs.image_id[row])) for row in rows[first].tolist()],
        donors=None if donor is None else np.stack([judge.store[row] for row in shown[:, 1].tolist()]),
        device=judge.device,
    )
    seeds = [pair_seed(pairs.query_id[row], pairs.image_id[row]) for row in rows.tolist()]
    orders = order_pairs(study.plan, rows, seeds, study.maps, study.others, study.grid)
    return Chunk(rows, picture.reshape(-1), shown[:, 0], pictures, orders)


def embed_masked(
    judge: Judge, fill: Fill, image: Ints, picture: Ints, removed: Chosen, *, advance: Advance | None = None
) -> Tensor:
    """Return what the judge makes of masked pictures, on the CPU, shape (V, D).

    Equal masks of a picture are encoded once, so they have equal vectors, bit for bit.

    Args:
        judge: the model.
        fill: of the pictures; see `fills.make_fill`.
        image: gallery row of each picture, shape (P,).
        picture: which picture, shape (V,).
        removed: which patches, shape (V, N).
        advance: called with the number of images encoded.
    """
    first, place = _distinct(picture, removed)
    pieces: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(first), judge.batch):
            some = first[start : start + judge.batch]
            shown = torch.from_numpy(picture[some]).to(judge.device)
            images, keep = fill(shown, torch.from_numpy(removed[some]).to(judge.device))
            pieces.append(judge.embed(images, keep, image[picture[some]]).float())
            if advance:
                advance(len(some))
    # One copy from the device at the end: it never waits for the host in between.
    return torch.cat(pieces).cpu()[torch.from_numpy(place)] if pieces else torch.zeros(0, 0)


def _distinct(picture: Ints, removed: Chosen) -> tuple[Ints, Ints]:
    """The first occurrences of different masked pictures, and for each one which of them it equals."""
    bits = np.packbits(removed, axis=1)
    known: dict[tuple[int, bytes], int] = {}
    keys = zip(picture.tolist(), map(bytes, bits), strict=True)
    place = np.fromiter((known.setdefault(key, len(known)) for key in keys), np.int64, len(picture))
    return np.unique(place, return_index=True)[1], place


def masked_scores(study: Study, chunk: Chunk, fill: str, removed: Chosen, advance: Advance | None = None) -> Floats:
    """Return the similarity of each pair's query with its masked picture, exact, shape (p, K, R).

    Args:
        study: the judge and the pairs.
        chunk: p of the pairs, with K orders each.
        fill: what stands in for the patches; "" for the intact pictures.
        removed: which patches, shape (p, K, R, N); those of missing orders are not encoded, their score is NaN.
        advance: called with the number of images encoded.
    """
    shape = removed.shape[:3]
    valid = np.broadcast_to(~chunk.orders.missing[..., None], shape)
    pair = np.nonzero(valid)[0]
    made = make_fill(fill, chunk.pictures)
    vectors = embed_masked(study.judge, made, chunk.image, chunk.picture[pair], removed[valid], advance=advance)
    scores = np.full(shape, np.nan)
    scores[valid] = _dots(vectors, study.pairs.query[chunk.rows], pair)
    return scores


def intact_scores(study: Study, chunk: Chunk, advance: Advance | None = None) -> Floats:
    """Return the similarity of each pair's query with its picture as it is, shape (p,)."""
    patches = study.grid[0] * study.grid[1]
    nothing = np.zeros((len(chunk.rows), patches), bool)
    made = make_fill("", chunk.pictures)
    vectors = embed_masked(study.judge, made, chunk.image, chunk.picture, nothing, advance=advance)
    return _dots(vectors, study.pairs.query[chunk.rows], np.arange(len(chunk.rows)))


def _dots(vectors: Tensor, query: Vectors, pair: Ints) -> Floats:
    """Exact scores of vectors (V, D) with the queries of their pairs, pairs in ascending order, shape (V,)."""
    asked = lattice(query, _CPU).double()
    borders = np.searchsorted(pair, np.arange(len(query) + 1))
    scores = [
        lattice(vectors[start:stop].numpy(), _CPU).double() @ asked[number]
        for number, (start, stop) in enumerate(itertools.pairwise(borders.tolist()))
        if stop > start
    ]
    return torch.cat(scores).numpy() if scores else np.zeros(0)


def gallery_scores(query: Vectors, gallery: Tensor) -> Floats:
    """Return exact scores of queries with the gallery on the lattice, shape (q, G); see `retrieval.products`."""
    asked = lattice(query, _CPU).double()
    blocks = [asked @ gallery[start : start + _ROWS].double().T for start in range(0, len(gallery), _ROWS)]
    return torch.cat(blocks, dim=1).numpy()
