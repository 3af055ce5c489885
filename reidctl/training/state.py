"""The files of a training: its state after each epoch, and the weights that it keeps."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reidctl import parallel
from reidctl.console import log
from reidctl.errors import DataError
from reidctl.methods.base import Method, unique_tensors


@dataclass
class Progress:
    """How far a training is, what it has measured, and what must survive a kill beside weights and optimiser.

    Attributes:
        step: steps done.
        within: batches done of an epoch that is not finished; 0 between epochs.
        best_epoch, best_value: the chosen epoch (0-based) and its value.
        worse: validations since the last better one.
        stopped: whether it ended early.
        seconds, images: of all steps.
        epoch_seconds, epoch_images, waited: of this epoch; `waited` for the loader.
        rows: the history.
        world: the number of processes that it ran on.
    """

    step: int = 0
    within: int = 0
    best_epoch: int = -1
    best_value: float = -math.inf
    worse: int = 0
    stopped: bool = False
    seconds: float = 0.0
    images: int = 0
    epoch_seconds: float = 0.0
    epoch_images: int = 0
    waited: float = 0.0
    world: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    random: list[dict[str, Tensor]] = field(default_factory=list)

    def begin_epoch(self) -> None:
        """Count an epoch from nothing."""
        self.epoch_seconds, self.epoch_images, self.waited = 0.0, 0, 0.0

    def count(self, images: int, seconds: float, within: int) -> None:
        """Count a step."""
        self.step += 1
        self.within = within
        self.images += images
        self.seconds += seconds
        self.epoch_images += images
        self.epoch_seconds += seconds

    def judge(self, epoch: int, value: float) -> bool:
        """Note a validation; return whether it is the best so far."""
        if value > self.best_value:
            self.best_epoch, self.best_value, self.worse = epoch, value, 0
            return True
        self.worse += 1
        return False

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Plain values and tensors; every process must ask, because all random states are in it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "random"}
        return {**plain, "world": parallel.place().world, "random": _random_states(device)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)

    def restore_random(self, device: torch.device, seed: int) -> None:
        """Go on with this process's random numbers; on another number of processes with fresh ones."""
        here = parallel.place()
        if self.world != here.world:
            torch.manual_seed(seed * 1_000_003 + self.step * 7_919 + here.rank * 1_000_000_007)
            return
        own = self.random[here.rank]
        torch.set_rng_state(own["host"])
        if device.type == "cuda" and len(own["device"]):
            torch.cuda.set_rng_state(own["device"], device)


def _random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """The states of the random generators of all processes."""
    host = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0, dtype=torch.uint8)
    both = parallel.gather_rows(torch.cat([host, own])[None].numpy())
    every = torch.from_numpy(np.array(both))
    return [{"host": row[: len(host)].clone(), "device": row[len(host) :].clone()} for row in every]


def read_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the state of the same training; None if there is none, or of another.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        # On the CPU first: the optimiser then keeps its step counters there, and no second copy fills the GPU.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}).", hint="Start over with --force.") from None
    if not isinstance(state, dict) or "fingerprint" not in state:
        raise DataError(f"{path} is not the state of a training.", hint="Start over with --force.")
    if state["fingerprint"] != fingerprint:
        log.info("The settings or inputs changed since the last training here: starting over.")
        return None
    if not {"progress", "method", "optimizer", "training_state", "average", "epoch"} <= set(state):
        log.info("The last training here was stopped under another version of reidctl: starting over.")
        return None
    return state


def require_state(path: Path, fingerprint: str) -> None:
    """Refuse to resume where no training with these settings and inputs was stopped.

    Raises:
        DataError: there is none.
    """
    found = None
    if path.is_file():
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["fingerprint"]
        except Exception as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}).", hint="Start over with --force.") from None
    if found != fingerprint:
        what = "one with other settings or inputs" if found else "none"
        raise DataError(f"There is no stopped training to resume in {path.parent.parent} ({what}).",
                        hint="Without --resume it begins anew.")  # fmt: skip


def kept_epochs(folder: Path, fingerprint: str) -> dict[int, Path]:
    """Return the weights that a training kept (`keep_epochs`), by epoch from 1.

    Files of another training, and unreadable ones, are not among them.

    Args:
        folder: of the stage.
        fingerprint: of the training.
    """
    return {epoch: path for path, epoch in epoch_files(folder).items() if _fingerprint_of(path) == fingerprint}


def epoch_files(folder: Path) -> dict[Path, int]:
    """Return the files of kept epochs, whoever wrote them, with the number of each."""
    names = {path: re.fullmatch(r"epoch-(\d+)\.safetensors", path.name) for path in (folder / "epochs").glob("*")}
    return {path: int(match[1]) for path, match in sorted(names.items()) if match}


def _fingerprint_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as stream:
            return (stream.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError):
        return None


def save_whole(state: Mapping[str, Any], path: Path) -> None:
    """Write training state, whole or not at all, without a second copy in memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # PyTorch reports a full disk as a RuntimeError of its zip writer, and an interrupted one too.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise DataError(f"Cannot write {path}: {str(error).splitlines()[0]}.", hint="Is the disk full?") from None
    finally:
        # Gone after a success; an interrupt may come at any moment before.
        temporary.unlink(missing_ok=True)


def tensors(source: Method | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a method, or a state of one, on the CPU, each once."""
    state = source if isinstance(source, Mapping) else source.state_dict()
    return {name: value.detach().cpu().contiguous() for name, value in unique_tensors(state).items()}
