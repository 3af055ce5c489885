"""One loop for every method and training stage: deterministic, resumable, selected on validation."""

import itertools
import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from reidctl import tables
from reidctl.batch import Batch
from reidctl.console import log, progress
from reidctl.data import Key, TrainingSet
from reidctl.device import resolve_device
from reidctl.errors import DataError
from reidctl.loading import load_ahead, loader_threads
from reidctl.methods.base import Method
from reidctl.training.batches import epoch_batches
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor
from reidctl.training.state import epoch_files, kept_epochs, save_whole, tensors

Validate = Callable[[Method], dict[str, float]]


# How much of the first epoch is loaded once more to know the loader's own speed.
_LOADER_BATCHES, _LOADER_SECONDS = 16, 3.0


@dataclass(frozen=True)
class Outcome:
    """What training leaves: the history, the chosen epoch (0-based) and its value."""

    history: pd.DataFrame
    best_epoch: int
    best_value: float
    seconds: float
    images_per_second: float
    resumed_from: int


class Trainer:
    """The training loop.

    After every epoch all state goes to `folder/last/state.pt`, replaced atomically; a run that was killed continues
    after its last whole epoch and ends with the same weights, bit for bit on the CPU, as one that was not.

    Args:
        method: what is trained, on the CPU.
        samples: the training set.
        validate: metrics of the model on the selection split; None: nothing is selected, the last epoch stays.
        config: see `TrainConfig`.
        folder: where the stage keeps its files.
        seed: of sampling, augmentation, dropout and masking.
        stage: the training stage.
        fingerprint: of settings and inputs; state of another fingerprint is not continued.
    """

    def __init__(
        self,
        method: Method,
        samples: TrainingSet,
        validate: Validate | None,
        config: TrainConfig,
        folder: Path,
        *,
        seed: int,
        stage: str,
        fingerprint: str,
    ) -> None:
        self.device = resolve_device(config.device)
        self.method = method.to(self.device)
        self.samples, self.validate, self.config = samples, validate, config
        self.folder, self.seed, self.stage, self.fingerprint = folder, seed, stage, fingerprint
        self.optimizer = build_optimizer(method, stage, config)
        self.rows: list[dict[str, Any]] = []
        self.step = 0
        self.best_epoch, self.best_value = -1, -math.inf
        self.trained_seconds = 0.0
        self.trained_images = 0
        self.threads = loader_threads(self.device.type) if config.workers is None else config.workers
        self.loader_rate = math.inf
        self._complained = False

    def run(self) -> Outcome:
        """Train to the end, leave the best weights in the method, and return the history.

        Raises:
            DataError: a loss is not finite, an image cannot be read, or the disk is full.
        """
        first = self._resume()
        self.method.begin(self.stage)
        self._forget_epochs(first)
        if self.config.epochs == 0:
            self._untrained()
        # One epoch tells the length of all: they differ by a few batches at most.
        images = 0
        if first < self.config.epochs:
            batches = self._batches(first)
            images = sum(map(len, batches)) * (self.config.epochs - first)
            self._measure_loader(first, batches)
        with progress(f"{self.stage} {self.method.name}", images) as advance:
            for epoch in range(first, self.config.epochs):
                self._epoch(epoch, advance)
        self._restore_best()
        rate = self.trained_images / max(self.trained_seconds, 1e-9)
        history = pd.DataFrame(self.rows)
        return Outcome(history, self.best_epoch, self.best_value, self.trained_seconds, rate, first)

    def _untrained(self) -> None:
        """Zero-shot: validate the weights as they are."""
        self.method.eval()
        if self.validate is None:
            return
        found = self.validate(self.method)
        self._log(0, self.config.select, found)
        self.best_value = found[self.config.select_metric]

    def _batches(self, epoch: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        return epoch_batches(self.samples, self.config, self.seed, epoch)

    def _load(self, epoch: int, batches: list[np.ndarray[Any, np.dtype[np.int64]]]) -> Generator[Batch]:
        keys: list[list[Key]] = []
        position = 0
        for batch in batches:
            keys.append([(epoch, int(sample), position + place) for place, sample in enumerate(batch)])
            position += len(batch)
        return load_ahead(self._batch, keys, threads=self.threads)

    def _batch(self, keys: list[Key]) -> Batch:
        batch = self.samples.collate([self.samples[key] for key in keys])
        return batch.pin() if self.device.type == "cuda" else batch

    def _measure_loader(self, epoch: int, batches: list[np.ndarray[Any, np.dtype[np.int64]]]) -> None:
        """Log how fast the loader is when nobody else computes, over the first batches; they are loaded again."""
        started = time.monotonic()
        images = 0
        loading = self._load(epoch, batches)
        for batch in itertools.islice(loading, _LOADER_BATCHES):
            images += len(batch)
            if time.monotonic() - started > _LOADER_SECONDS:
                break
        loading.close()
        self.loader_rate = images / (time.monotonic() - started)
        self._log(epoch, "train", {"loader_images_per_second": self.loader_rate})

    def _compare_rates(self, step_rate: float) -> None:
        """Say once if training waits for images, and what helps."""
        if self.loader_rate < step_rate and not self._complained:
            self._complained = True
            log.warning(
                f"Training waits for images: the loader alone gives {self.loader_rate:,.0f} images/s, a step "
                f"could take {step_rate:,.0f}. Raise train.workers ({self.threads} now) or train.cache_mb."
            )

    def _epoch(self, epoch: int, advance: Callable[..., None]) -> None:
        # Dropout and masking draw from the process-wide generator: one seed per epoch makes an epoch a unit.
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        self.method.train()
        batches = self._batches(epoch)
        waited = 0.0
        started = mark = time.monotonic()
        images = 0
        for number, batch in enumerate(self._load(epoch, batches)):
            waited += time.monotonic() - mark
            self._set_rates(epoch + (number / len(batches) if self.config.schedule_by == "step" else 0))
            self._step(batch, epoch, last=number == len(batches) - 1)
            images += len(batch)
            advance(len(batch))
            mark = time.monotonic()
        seconds = time.monotonic() - started
        self.trained_seconds += seconds
        self.trained_images += images
        step_rate = images / max(seconds - waited, 1e-9)
        rates = {"images_per_second": images / seconds, "step_images_per_second": step_rate}
        self._log(epoch, "train", {**rates, "loader_share": waited / seconds})
        self._compare_rates(step_rate)
        self._validate(epoch)
        self._save(epoch)

    def _set_rates(self, epoch: float) -> None:
        factor = learning_rate_factor(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("base_lr", 0.0) * factor

    def _step(self, batch: Batch, epoch: int, *, last: bool) -> None:
        batch = batch.to(self.device)
        narrow = self.config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow):
            losses = self.method.losses(batch, self.stage)
        self._stop_if_not_finite(losses, batch, epoch)
        reporting = self.step % self.config.log_every == 0 or last
        norms = self.method.gradient_norms(losses) if reporting else {}
        objective = self.method.objective(losses)
        self.optimizer.zero_grad(set_to_none=True)
        if objective.requires_grad:
            objective.backward()  # type: ignore[no-untyped-call]
        # Infinity clips nothing but still measures: a gradient that is not finite must not reach the weights.
        limit = math.inf if self.config.clip_grad_norm is None else self.config.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.method.parameters(), limit)
        self._stop_if_not_finite({"gradient of the objective": norm}, batch, epoch)
        self.optimizer.step()
        if reporting:
            self._report(epoch, losses, norms, objective)
        self.step += 1

    def _report(self, epoch: int, losses: Mapping[str, Tensor], norms: Mapping[str, float], total: Tensor) -> None:
        weights = self.method.current_weights(self.stage)
        values = {"total": float(total.detach())}
        for name, value in losses.items():
            values[f"loss/{name}"] = float(value.detach())
            values[f"weight/{name}"] = weights[name]
            if name in norms:
                values[f"grad_norm/{name}"] = norms[name]
        values |= self.method.training_report()
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        self._log(epoch, "train", values)

    def _stop_if_not_finite(self, losses: Mapping[str, Tensor], batch: Batch, epoch: int) -> None:
        bad = [name for name, value in losses.items() if not bool(torch.isfinite(value).all())]
        if not bad:
            return
        path = self.folder / "not_finite.json"
        facts = {
            "epoch": epoch,
            "step": self.step,
            "losses": {name: str(float(value.detach())) for name, value in losses.items()},
            "image_id": list(batch.image_id),
            "text_id": list(batch.text_id),
        }
        tables.write_text(path, json.dumps(facts, indent=2) + "\n")
        raise DataError(
            f"`{bad[0]}` is not finite at step {self.step} (epoch {epoch + 1}), in the batch that starts with "
            f"image `{batch.image_id[0] if batch.image_id else '?'}`; the whole batch is listed in {path}.",
            hint="Lower train.lr or set train.clip_grad_norm; with other settings the training starts over.",
        )

    def _log(self, epoch: int, split: str, values: Mapping[str, float]) -> None:
        now = time.time()
        common = {"stage": self.stage, "step": self.step, "epoch": epoch, "split": split, "seconds": now}
        self.rows += [{**common, "name": name, "value": float(value)} for name, value in values.items()]

    def _validate(self, epoch: int) -> None:
        if (epoch + 1) % self.config.validate_every and epoch + 1 < self.config.epochs:
            return
        self.method.eval()
        if self.validate is None:
            return
        found = self.validate(self.method)
        self._log(epoch, self.config.select, found)
        value = found[self.config.select_metric]
        if self.config.keep_epochs:
            payload = save(tensors(self.method), metadata={"fingerprint": self.fingerprint})
            tables.write_bytes(self.folder / "epochs" / f"epoch-{epoch + 1:03d}.safetensors", payload)
        shown = ", ".join(f"{name} {100 * number:.1f}" for name, number in found.items())
        log.info(f"epoch {epoch + 1}/{self.config.epochs}: {self.config.select} {shown}")
        if value > self.best_value:
            self.best_epoch, self.best_value = epoch, value
            tables.write_bytes(self._best_path(), save(tensors(self.method)))

    def _best_path(self) -> Path:
        # Named after the training and the epoch: a file of another training, or newer than the state, is never taken.
        return self.folder / "last" / f"best-{self.fingerprint[:12]}-{self.best_epoch}.safetensors"

    def _forget_epochs(self, first: int) -> None:
        """Remove kept weights of another training, and those newer than the state that is continued."""
        mine = kept_epochs(self.folder, self.fingerprint) if self.config.keep_epochs else {}
        kept = {path for epoch, path in mine.items() if epoch <= first}
        for path in epoch_files(self.folder):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _save(self, epoch: int) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "epoch": epoch,
            "step": self.step,
            "method": self.method.state_dict(),
            "training_state": self.method.training_state(),
            "optimizer": self.optimizer.state_dict(),
            "best": [self.best_epoch, self.best_value],
            "trained": [self.trained_seconds, self.trained_images],
            "history": self.rows,
        }
        save_whole(state, self.folder / "last" / "state.pt")
        for file in (self.folder / "last").iterdir():
            stale = file.name.startswith("best-") and file != self._best_path()
            if stale or file.name.endswith(".tmp"):
                file.unlink(missing_ok=True)

    def _resume(self) -> int:
        """Load the last whole epoch of the same training, if any; return the epoch to go on with."""
        path = self.folder / "last" / "state.pt"
        if not path.is_file():
            return 0
        try:
            # On the CPU first: the optimiser then keeps its step counters there, and no second copy fills the GPU.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}).", hint="Start over with --force.") from None
        if state["fingerprint"] != self.fingerprint:
            log.info("The settings or inputs changed since the last training here: starting over.")
            return 0
        self.method.load_state_dict(state["method"])
        self.method.load_training_state(state["training_state"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_epoch, self.best_value = state["best"]
        self.trained_seconds, self.trained_images = state["trained"]
        self.rows, self.step = state["history"], state["step"]
        log.info(f"Continuing after epoch {state['epoch'] + 1} of {self.config.epochs}.")
        return int(state["epoch"]) + 1

    def _restore_best(self) -> None:
        if self.best_epoch >= 0:
            path = self._best_path()
            try:
                self.method.load_state_dict(load_file(path, device=str(self.device)), strict=False)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is missing or damaged ({error}).", hint="Train again with --force.") from None
        self.method.eval()
