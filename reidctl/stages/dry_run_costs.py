"""What a dry run measures of a training that is ready to start: its parameters, memory, operations and speed."""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from reidctl.batch import Batch
from reidctl.data import TrainingSet
from reidctl.evaluation.efficiency import count_flops, seconds
from reidctl.methods.base import Method
from reidctl.stages.building import Settings
from reidctl.training.config import TrainConfig
from reidctl.training.cost import Operations, Work, count_operations, curve, part_of, sizes_measured, work
from reidctl.training.memory import USABLE, Needs, fits, grouped, least_samples, total_bytes
from reidctl.training.step import Step

STAGE = "finetune"
BUDGET = 12.0
"""Seconds for each of memory, operations and speed; with the loader's few and the reading of data under a minute."""


@dataclass(frozen=True)
class Trial:
    """A training that is ready to start.

    Attributes:
        checked, training: its settings.
        model: on its device, in training mode; its weights are of no use once it was measured.
        samples: the training set.
        batches: of the first epoch, as numbers of samples.
        batch: the first of them, loaded.
        loader: images a second that the loader gives, with `threads` threads.
        optimizer: of the model.
        notes: what the user should know.
    """

    checked: Settings
    training: TrainConfig
    seed: int
    model: Method
    samples: TrainingSet
    batches: list[np.ndarray[Any, np.dtype[np.int64]]]
    batch: Batch
    loader: float
    threads: int
    optimizer: torch.optim.Optimizer
    notes: list[str]

    @property
    def instances(self) -> int:
        """Samples of a person that stay together."""
        return self.training.instances if grouped(self.training) else 1


def parameter_facts(model: Method) -> dict[str, Any]:
    """Numbers that train and that do not, of the two towers, the rest of the backbone and each of the method's modules.

    Each parameter counts once, so `modules` add up to `trainable` and `frozen`.
    """
    modules: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        row = modules.setdefault(_module_of(name), {"module": _module_of(name), "trainable": 0, "frozen": 0})
        row["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    rows = list(modules.values())
    sums = {kind: sum(row[kind] for row in rows) for kind in ("trainable", "frozen")}
    return {"modules": rows, **sums}


def _module_of(name: str) -> str:
    first, _, rest = name.partition(".")
    tower = rest.partition(".")[0]
    if first != "backbone":
        return first
    return f"{tower} tower" if tower in ("image", "text") else "rest of the backbone"


def learning_rates(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rate before its schedule, decay, tensors and numbers of each group, the highest rate first."""
    rows = [
        {
            "lr": group["base_lr"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "numbers": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in optimizer.param_groups
        if "base_lr" in group  # the group of a training without parameters has none
    ]
    return sorted(rows, key=lambda row: (-row["lr"], -row["weight_decay"]))


def memory_facts(needs: Needs, device: torch.device) -> dict[str, Any]:
    """Return the bytes that a step needs, by what they are for, those that the device has, and what would fit."""
    total, room = needs.total(), total_bytes(device)
    enough = total <= USABLE * room
    return {
        "bytes": needs.parts(),
        "total": total,
        "device": room,
        "fits": enough,
        "measured_samples": needs.growth(needs.plan.checkpointing, needs.plan.narrow).measured,
        "changes": []
        if enough
        else [{"settings": change, "bytes": size} for change, size in fits(needs, USABLE * room)],
    }


def count_work(trial: Trial, needs: Needs) -> Work:
    """The operations of a step as curves over samples."""
    forward = trial.training.accumulate > 1 or trial.model.surveys
    batch, instances = trial.batch, trial.instances

    def measure(size: int) -> Operations:
        part = part_of(batch, size, instances)
        return count_operations(trial.model, part, STAGE, trial.training, count_flops, forward=forward)

    measured = needs.growth(needs.plan.checkpointing, needs.plan.narrow).measured
    least = least_samples(batch, instances)
    return work(
        sizes_measured(measure, len(batch), least, seconds=BUDGET, instances=instances, most=lambda _: measured)
    )


def operation_facts(counted: Work, trial: Trial, devices: int) -> dict[str, Any]:
    """Return the operations of a step on one device, of an image, and of an epoch on all devices."""
    size = len(trial.batch)
    step = counted.step(size, accumulate=trial.training.accumulate, devices=devices)
    survey = counted.forward(size) / devices if trial.model.surveys else 0.0
    return {
        "step": step,
        "image": step * devices / size,
        "epoch": (step + survey) * devices * sum(map(len, trial.batches)) / size,
        "counted_samples": counted.measured,
    }


def speed_facts(trial: Trial, needs: Needs, counted: Work, devices: int) -> dict[str, Any]:
    """Images a second of steps and loader, and hours; several devices are taken to be as many times as fast."""
    size, epochs = len(trial.batch), trial.training.epochs
    step_seconds, way = _step_seconds(trial, needs, counted)
    step, loader = size / step_seconds * devices, trial.loader * devices
    survey = counted.forward(size) / counted.step(size) if trial.model.surveys else 0.0
    # Without threads of its own the loader works while the device waits.
    both = min(step, loader) if trial.threads else 1 / (1 / step + 1 / loader)
    images = sum(map(len, trial.batches))
    hours = images * (1 / both + survey / step) * epochs / 3600
    return {
        "step_images_per_second": round(step, 2),
        "loader_images_per_second": round(loader, 2),
        "images_per_second": round(both, 2),
        "slower": "step" if step <= loader else "loader",
        "threads": trial.threads,
        "step_seconds": step_seconds,
        "way": way,
        "epochs": epochs,
        "hours": hours,
    }


def _step_seconds(trial: Trial, needs: Needs, counted: Work) -> tuple[float, str]:
    """Seconds of a step at the whole batch on this device, and how they were found.

    The whole batch is timed where time and memory allow; else as much as they allow and half of it, and the line
    through both is continued. Where the time allows but a few samples, the operations say how much more the whole batch
    takes.
    """
    size, passes = len(trial.batch), trial.training.accumulate
    least = min(max(least_samples(trial.batch, trial.instances), passes), size)
    step = Step(trial.model, trial.optimizer, trial.training, STAGE)
    device = next(trial.model.parameters()).device

    def timed(samples: int, repeats: int) -> float:
        part = part_of(trial.batch, samples, trial.instances)
        return statistics.median(seconds(lambda: step(part, check=lambda _: None), repeats, device))

    small = timed(least, 1)
    largest = min(int(least * BUDGET / 4 / small), _timed_at_most(trial, needs))
    if largest < 2 * least and largest < size:
        ratio = counted.step(size, accumulate=passes) / counted.step(least, accumulate=passes)
        return small * ratio, f"a step of {least} samples was timed; the rest follows from the operations"
    large = timed(largest, 3)
    if largest == size:
        return large, "steps of the whole batch were timed"
    half = largest // 2
    line = curve([(half, timed(half, 1)), (largest, large)], 1)
    return line(size), f"steps of {half} and {largest} samples were timed"


def _timed_at_most(trial: Trial, needs: Needs) -> int:
    """The largest part of the batch, by halves, whose step fits into the device."""
    size = len(trial.batch)
    room = USABLE * total_bytes(next(trial.model.parameters()).device)
    while size > 2 and needs.total(replace(needs.plan, batch=size)) > room:
        size //= 2
    return size
