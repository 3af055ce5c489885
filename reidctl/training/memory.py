"""What a training holds in the memory of a device, and which settings would make it fit."""

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reidctl.batch import Batch
from reidctl.methods.base import Method
from reidctl.training.config import TrainConfig
from reidctl.training.cost import Growth, Kept, growth, measure_kept, part_of, sizes_measured

USABLE = 0.9
"""Share of a device's memory that tensors can have: kernels, libraries and gaps between tensors take the rest."""
_MOST_PASSES = 64
_SHOWN = 4


@dataclass(frozen=True)
class Plan:
    """The settings that decide how much memory a step needs.

    Attributes:
        checkpointing: `backbone.grad_checkpointing`.
        narrow: whether `train.precision` is bf16.
        accumulate: `train.accumulate`.
        batch: samples of the whole batch.
    """

    checkpointing: bool
    narrow: bool
    accumulate: int
    batch: int


@dataclass(frozen=True)
class Needs:
    """What a training needs on each device, in bytes.

    Attributes:
        weights, gradients, optimizer, averages: of weights and buffers, their gradients, Adam's two moments, and the
            moving average of those that train (`train.ema`).
        inputs: of one sample's pixels and words.
        growth: gives the activations with and without checkpointing and bf16, asked for when it is needed.
        plan: the settings now.
        instances: samples of a person; a batch has at least two people.
        devices: processes that share a batch.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    inputs: int
    growth: Callable[[bool, bool], Growth]
    plan: Plan
    instances: int = 1
    devices: int = 1

    def parts(self, plan: Plan | None = None) -> dict[str, int]:
        """Return bytes by what they are for, with the settings of `plan` instead of the present ones."""
        plan = plan or self.plan
        grown = self.growth(plan.checkpointing, plan.narrow)
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "averages": self.averages,
            "batch": round(self.inputs * plan.batch / self.devices),
            "activations": grown.activations(plan.batch, accumulate=plan.accumulate, devices=self.devices),
        }

    def total(self, plan: Plan | None = None) -> int:
        """Return the sum of `parts`: an upper bound, because gradients grow while activations are freed."""
        return sum(self.parts(plan).values())


def measure_needs(
    method: Method,
    batch: Batch,
    stage: str,
    config: TrainConfig,
    *,
    checkpointing: bool,
    devices: int = 1,
    seconds: float = 15.0,
) -> Needs:
    """Return what a training needs, measured on parts of a real batch; see `cost.measure_kept`.

    Args:
        method: on its device, in training mode, with the parameters that train asking for gradients.
        batch: a whole batch, on the CPU.
        stage: the training stage.
        config: `precision`, `accumulate`, `instances`, `ema` and `parallel` are read.
        checkpointing: whether blocks are computed again in the backward pass now.
        devices: processes that share a batch.
        seconds: about how long each pair of checkpointing and precision may be measured.
    """
    tensors = [*method.parameters(), *method.buffers()]
    weights = _bytes(tensors)
    gradients = _bytes([parameter for parameter in method.parameters() if parameter.requires_grad])
    shared = devices if config.parallel == "fsdp" else 1
    known: dict[tuple[bool, bool], Growth] = {}

    def grown(checkpointed: bool, narrow: bool) -> Growth:
        if (checkpointed, narrow) not in known:
            changed = config.replace(precision="bf16" if narrow else "fp32")
            known[checkpointed, narrow] = _measured(method, batch, stage, changed, checkpointed, checkpointing, seconds)
        return known[checkpointed, narrow]

    return Needs(
        weights=weights // shared,
        gradients=gradients // shared,
        optimizer=2 * gradients // shared,
        averages=(gradients if config.ema is not None else 0) // shared,
        inputs=_bytes(tensors_of(batch.finished())) // max(len(batch), 1),
        growth=grown,
        plan=Plan(checkpointing, config.precision == "bf16", config.accumulate, len(batch)),
        instances=config.instances if grouped(config) else 1,
        devices=devices,
    )


def _measured(
    method: Method, batch: Batch, stage: str, config: TrainConfig, asked: bool, now: bool, seconds: float
) -> Growth:
    instances = config.instances if grouped(config) else 1
    device = next(method.parameters()).device

    def measure(size: int) -> Kept:
        return measure_kept(method, part_of(batch, size, instances), stage, config)

    def most(kept: Kept) -> int:
        each = (kept.encode + kept.losses + kept.spike) / least
        return int(0.5 * free_bytes(device) / max(each, 1.0))

    least = least_samples(batch, instances)
    method.backbone.set_grad_checkpointing(asked)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return growth(sizes_measured(measure, len(batch), least, seconds=seconds, instances=instances, most=most))
    finally:
        method.backbone.set_grad_checkpointing(now)


def grouped(config: TrainConfig) -> bool:
    """Whether the sampler puts `instances` samples of a person into a batch."""
    return config.sampler in ("identity", "mixed", "alternating")


def least_samples(batch: Batch, instances: int) -> int:
    """Return the fewest samples worth measuring: two people, with two samples each where there are, of every kind."""
    kinds = 1 if batch.has_text is None else 2
    return min(2 * min(instances, 2) * kinds, len(batch))


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return all tensors in a batch, tokens and phrases included."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).values()
    return [tensor for one in inner for tensor in tensors_of(one)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device: CUDA's, or that of the machine or of the container that this process runs in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free now; what PyTorch keeps for later is free."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def fits(needs: Needs, room: float) -> list[tuple[dict[str, Any], int]]:
    """Return changes of settings that would fit, each with the bytes that are then needed, cheapest first.

    In this order: checkpointing (a third more time, the same result), bf16 (less time, rounding), passes (a third more
    time, the same result), then smaller batches, which are another training. Alone before together; a change is not
    offered with another one that it does not need, and passes and batches are changed no more than they must.

    Args:
        needs: of the training.
        room: bytes that it may have.
    """
    found: list[tuple[dict[str, Any], int]] = []
    for batch in _halves(needs):
        changes = [_changes(needs.plan, plan) for plan in _plans(needs.plan, batch)]
        for change in sorted(changes, key=len):
            if change and not any(_covers(known, change) for known, _ in found):
                total = needs.total(_changed(needs.plan, change))
                found += [(change, total)] if total <= room else []
        if found:
            break
    return found


def _halves(needs: Needs) -> list[int]:
    """The batch, and its halves as long as they hold whole people, at least two of them."""
    sizes = [needs.plan.batch]
    step = needs.instances * needs.devices
    while sizes[-1] // 2 >= max(2 * needs.instances, step, 2):
        sizes.append(sizes[-1] // 2 // step * step)
    return sizes


def _plans(plan: Plan, batch: int) -> list[Plan]:
    """Every choice of the other settings, cheapest first; several passes only for the whole batch."""
    passes = [plan.accumulate]
    while passes[-1] * 2 <= min(batch, _MOST_PASSES):
        passes.append(passes[-1] * 2)
    # The smallest number of passes comes first, so that it is the one that is kept.
    frugal = itertools.product(passes, (False, True), (False, True))
    return [
        Plan(plan.checkpointing or checkpointed, plan.narrow or narrow, accumulate, batch)
        for accumulate, narrow, checkpointed in frugal
    ]


def _changes(old: Plan, new: Plan) -> dict[str, Any]:
    """The settings that differ, by the names of the recipe."""
    changes: dict[str, Any] = {}
    if new.checkpointing != old.checkpointing:
        changes["backbone.grad_checkpointing"] = True
    if new.narrow != old.narrow:
        changes["train.precision"] = "bf16"
    if new.accumulate != old.accumulate:
        changes["train.accumulate"] = new.accumulate
    if new.batch != old.batch:
        changes["train.batch"] = new.batch
    return changes


def _changed(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    return Plan(
        bool(changes.get("backbone.grad_checkpointing", plan.checkpointing)),
        "train.precision" in changes or plan.narrow,
        int(changes.get("train.accumulate", plan.accumulate)),
        int(changes.get("train.batch", plan.batch)),
    )


def _covers(known: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Whether `change` only adds to what fits already."""
    return set(known) <= set(change)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def advice(error: BaseException, needs: Needs, device: torch.device) -> str:
    """Return one sentence on what a training that ran out of memory needs, and which settings would fit.

    Args:
        error: what was raised.
        needs: of the training.
        device: where it ran.

    Raises:
        ValueError: the error is about something else.
    """
    if not is_out_of_memory(error):
        raise ValueError(f"not about memory: {error}")
    total, whole = needs.total(), total_bytes(device)
    # Others may use the device too, and the estimate may be low: what failed did not fit, whatever they say.
    room = min(USABLE * whole, 0.9 * total)
    ways = in_words(fits(needs, room))
    return f"A step needs about {gib(total)} and {device} has {gib(whole)}{_beside(total, whole)}; " + (
        f"these would fit: {ways}." if ways else "no setting of reidctl makes it fit: take a smaller model."
    )


def _beside(total: int, whole: int) -> str:
    return ", which others use too or which is in pieces" if total <= USABLE * whole else ""


def in_words(ways: list[tuple[dict[str, Any], int]]) -> str:
    """Return the changes that `fits` found as words, the first few of them; empty for none."""
    shown = [
        f"{' with '.join(f'{name}={str(value).lower()}' for name, value in change.items())} ({gib(total)})"
        for change, total in ways[:_SHOWN]
    ]
    return ", or ".join(shown)


def gib(count: float) -> str:
    """Return bytes as text, such as `1.5 GiB`."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
