"""What a training step needs of memory and arithmetic, measured on a few samples and continued to the whole batch.

**How it is continued.** `Method.encode` computes every sample by itself, so what it costs grows linearly with the
samples; losses compare samples with each other, so what they cost grows quadratically. Both curves are laid through
measurements of the real model on parts of a real batch, with texts as long as in the whole batch.

**Memory.** Counted are the bytes of tensors that are alive because the backward pass needs them, as the operations of
the step make and free them. What the allocator wastes is not among them.
"""

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reidctl.batch import Batch
from reidctl.methods.base import Method
from reidctl.parts import Parts
from reidctl.training.config import TrainConfig

T = TypeVar("T")
_DRAWS = 4
Count = Callable[[Callable[[], object], nn.Module], int]
"""Counts the operations of a call, as `evaluation.efficiency.count_flops` does."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one step.

    Attributes:
        encode: alive after `Method.encode` for its backward pass, what the losses read included.
        losses: alive after the losses, beyond `encode`.
        rows: of what the losses read; several passes or processes hold it of the whole batch.
        spike: most that was alive in the backward pass beyond `encode` and `losses`: gradients of activations, and what
            a checkpoint computes again. Gradients of matrices are not among it: they count as a whole elsewhere.
    """

    encode: int
    losses: int
    rows: int
    spike: int


@dataclass(frozen=True)
class Operations:
    """Floating-point operations, a multiply-add being two: `encode` and `losses` forward and backward, `forward` of
    `encode` alone.
    """

    encode: int
    losses: int
    forward: int


@dataclass(frozen=True)
class Curve:
    """A polynomial of the number of samples, never below 0."""

    coefficients: tuple[float, ...]
    """The highest power first."""

    def __call__(self, samples: float) -> float:
        """Return the value for so many samples."""
        return max(float(np.polyval(self.coefficients, samples)), 0.0)


def curve(points: Sequence[tuple[int, float]], degree: int) -> Curve:
    """Return the polynomial of at most that degree that is nearest to (samples, value) in squares.

    The highest power never has a negative factor: costs do not fall in the end, and parts of a batch that are not alike
    would otherwise be continued to nonsense.
    """
    sizes, values = zip(*points, strict=True)
    power = min(degree, len(set(sizes)) - 1)
    fitted = np.polyfit(sizes, values, power)
    if power > 1 and fitted[0] < 0:
        return curve(points, power - 1)
    return Curve(tuple(float(value) for value in fitted))


@dataclass(frozen=True)
class Growth:
    """How the bytes of `Kept` grow with the samples; `measured` is the largest size that was measured."""

    encode: Curve
    losses: Curve
    rows: Curve
    spike: Curve
    measured: int

    def activations(self, batch: int, *, accumulate: int = 1, devices: int = 1) -> int:
        """Return the most bytes of activations on one device during a step.

        In one pass: the device's share is encoded, and the losses are those of the whole batch. In several passes:
        features of the whole batch and their gradients, besides either the losses' graph or the graph of one pass.

        Args:
            batch: samples of the whole batch, of all devices.
            accumulate: passes.
            devices: processes that share the batch.
        """
        own = batch / devices
        foreign = self.rows(batch) - self.rows(own) if devices > 1 else 0.0
        if accumulate == 1:
            return round(self.encode(own) + foreign + self.losses(batch) + self.spike(own))
        each = own / accumulate
        return round(2 * self.rows(batch) + max(self.losses(batch), self.encode(each) + self.spike(each)))


@dataclass(frozen=True)
class Work:
    """How the operations of `Operations` grow with the samples; `measured` is the largest size that was counted."""

    encode: Curve
    losses: Curve
    forward: Curve
    measured: int

    def step(self, batch: int, *, accumulate: int = 1, devices: int = 1) -> float:
        """Return the operations of a step on one device; several passes encode everything once more, forwards."""
        each = batch / devices / accumulate
        again = self.forward(each) if accumulate > 1 else 0.0
        return accumulate * (self.encode(each) + again) + self.losses(batch)


def growth(points: Sequence[tuple[int, Kept]]) -> Growth:
    """Return the curves through measurements at several sizes."""
    fitted = {
        name: curve([(size, getattr(kept, name)) for size, kept in points], degree)
        for name, degree in (("encode", 1), ("losses", 2), ("rows", 1), ("spike", 1))
    }
    return Growth(**fitted, measured=max(size for size, _ in points))


def work(points: Sequence[tuple[int, Operations]]) -> Work:
    """Return the curves through counts at several sizes."""
    fitted = {
        name: curve([(size, getattr(found, name)) for size, found in points], degree)
        for name, degree in (("encode", 1), ("losses", 2), ("forward", 1))
    }
    return Work(**fitted, measured=max(size for size, _ in points))


def part_of(batch: Batch, size: int, instances: int) -> Batch:
    """Return some samples of a batch, of at least two people where there are, texts as long as in the batch.

    Of a mixed batch both kinds keep their shares. `instances` samples of a person stay together as far as `size` goes.
    """
    if size >= len(batch):
        return batch
    every = np.arange(len(batch))
    told = np.ones(len(batch), bool) if batch.has_text is None else batch.has_text.numpy()
    kinds = [kind for kind in (every[told], every[~told]) if len(kind)]
    counts = [max(round(size * len(kind) / len(batch)), 1) for kind in kinds]
    people = batch.require("person").numpy()
    chosen = [_chosen(kind, people[kind], count, instances) for kind, count in zip(kinds, counts, strict=True)]
    rows = np.sort(np.concatenate(chosen))
    row_of_text = batch.image_of_text().numpy()
    texts = torch.from_numpy(np.flatnonzero(np.isin(row_of_text, rows)))
    # `take` trims texts to the longest that is left: a part would look cheaper than its share of the batch.
    whole = {name: tokens[texts] for name, tokens in batch.texts.items()}
    return replace(batch.take(rows.tolist()), texts=whole)


def _chosen(
    rows: np.ndarray[Any, Any], people: np.ndarray[Any, Any], count: int, instances: int
) -> np.ndarray[Any, Any]:
    """The first `count` rows of as few people as hold them, at least of two, `instances` of each; people in turn."""
    _, first = np.unique(people, return_index=True)
    order = people[np.sort(first)]
    taken = order[: max(2, -(-count // instances))]
    places = [rows[people == person] for person in taken]
    turns = [own[turn] for turn in range(len(rows)) for own in places if turn < len(own)]
    rest = [row for row in rows if row not in set(turns)]
    return np.asarray([*turns, *rest][:count])


def sizes_measured(
    measure: Callable[[int], T],
    batch: int,
    least: int,
    *,
    seconds: float,
    instances: int = 1,
    most: Callable[[T], int] | None = None,
) -> list[tuple[int, T]]:
    """Return what `measure` gives at up to three sizes, the largest as near to the batch as the time allows.

    While time is left they are measured again, up to four times: what is drawn at random (hidden words) differs.

    Args:
        measure: measures at a number of samples.
        batch: samples of the whole batch.
        least: the first size.
        seconds: about how long everything may take; the smallest three sizes are measured once whatever it says.
        instances: samples of a person; parts of whole people are like the batch, smaller ones are less so.
        most: the largest size that memory allows, from what the first gave; None: no bound.
    """
    least = min(least, batch)
    started = time.perf_counter()
    first = measure(least)
    each = (time.perf_counter() - started) / least
    bound = batch if most is None else min(batch, most(first))
    # All sizes together are at most 1.75 times the largest, and the first was measured already.
    largest = max(min(int((seconds / each - least) / 1.75), bound), min(least + 2, batch))
    sizes = _spread(least, largest, batch, instances)
    found = [(size, first if size == least else measure(size)) for size in sizes]
    once = time.perf_counter() - started
    for _ in range(min(_DRAWS - 1, int(seconds / once) - 1)):
        found += [(size, measure(size)) for size in sizes]
    return found


def _spread(least: int, largest: int, batch: int, instances: int) -> list[int]:
    """Three sizes from `least` to `largest`; of whole people, two or more of them, where that leaves three."""
    whole = [size // instances * instances for size in (largest // 4, largest // 2)]
    end = largest if largest == batch else largest // instances * instances
    if instances > 1 and whole[0] >= 2 * instances and end > whole[1]:
        return [*whole, end]
    return sorted({least, (least + largest) // 2, largest})


def measure_kept(method: Method, batch: Batch, stage: str, config: TrainConfig) -> Kept:
    """Return the bytes of one step; no weight changes, gradients are lost, statistics of norms move.

    Args:
        method: on its device, in training mode, with the parameters that train asking for gradients.
        batch: on the CPU.
        stage: the training stage.
        config: `precision` is read.
    """
    device = next(method.parameters()).device
    given = method.prepare(batch).to(device).finished()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    for parameter in trained:
        # There already, so that the backward pass adds to them and only its own tensors are seen.
        parameter.grad = torch.zeros_like(parameter)
    try:
        with _without_collector(), Alive() as alive:
            return _kept(method, given, stage, config, alive)
    finally:
        for parameter in trained:
            parameter.grad = None


def _kept(method: Method, batch: Batch, stage: str, config: TrainConfig, alive: "Alive") -> Kept:
    with autocast(method, config):
        parts = method.encode(batch, stage)
    gc.collect(0)
    encode, rows = alive.now, sum(value.untyped_storage().nbytes() for value in _storages(parts))
    with autocast(method, config):
        losses = method.losses_of(parts, stage)
    del parts
    # The plain sum has the graph of the weighted one, and balancing keeps its state.
    total = torch.stack(list(losses.values())).sum()
    del losses
    gc.collect(0)
    after = alive.now
    alive.peak, alive.ignored = after, shapes_of_weights(method)
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    return Kept(encode, max(after - encode, 0), rows, alive.peak - after)


def _storages(parts: Parts) -> list[Tensor]:
    """The tensors of parts, one for each storage."""
    return list({parts[name].untyped_storage().data_ptr(): parts[name] for name in parts}.values())


def autocast(method: Method, config: TrainConfig) -> AbstractContextManager[Any]:
    """The precision in which `config` computes."""
    kind = next(method.parameters()).device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def count_operations(
    method: Method, batch: Batch, stage: str, config: TrainConfig, count: Count, *, forward: bool = False
) -> Operations:
    """Return the operations of one step without its optimiser; balancing of losses takes none here.

    Args:
        method, batch, stage, config: as `measure_kept`.
        count: counts them.
        forward: whether `Operations.forward` is wanted; else it is 0.
    """
    given = method.prepare(batch).to(next(method.parameters()).device).finished()
    leaves: list[Parts] = []

    def encode() -> None:
        with autocast(method, config):
            leaves[:] = [_back_from(method.encode(given, stage))]

    def encode_forward() -> None:
        with torch.no_grad(), autocast(method, config):
            method.encode(given, stage)

    def compare() -> None:
        with autocast(method, config):
            losses = method.losses_of(leaves[0], stage)
        total = torch.stack(list(losses.values())).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]

    found = Operations(
        encode=count(encode, method),
        losses=count(compare, method),
        forward=count(encode_forward, method) if forward else 0,
    )
    method.zero_grad(set_to_none=True)
    return found


def _back_from(parts: Parts) -> Parts:
    """Send ones back through the graph of parts; return the same numbers as leaves of a new one."""
    values = [parts[name] for name in parts if parts[name].requires_grad]
    if values:
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])
    cut = {name: parts[name].detach().requires_grad_(parts[name].requires_grad) for name in parts}
    return parts.with_rows(cut)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No collection by chance: what only a reference cycle holds is freed where the measurement says so."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, from their making to their end.

    Attributes:
        now: bytes that are alive.
        peak: the most there were.
        ignored: shapes of tensors that do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.ignored: frozenset[tuple[int, ...]] = frozenset()
        self._living: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {_storage(value)._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and tuple(value.shape) not in self.ignored:
                address = _storage(value)._cdata
                # A view of something from before, such as a weight, is not new.
                if address not in read and address not in self._living:
                    self._born(_storage(value))
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        self._living[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # The Python object of a storage lives as long as the storage.
        weakref.finalize(storage, self._gone, storage._cdata).atexit = False

    def _gone(self, address: int) -> None:
        self.now -= self._living.pop(address)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def shapes_of_weights(method: nn.Module) -> frozenset[tuple[int, ...]]:
    """Return the shapes that gradients of a method's matrices have, as they are and turned over."""
    shapes = [tuple(parameter.shape) for parameter in method.parameters() if parameter.ndim > 1]
    return frozenset(shapes) | {shape[::-1] for shape in shapes}
