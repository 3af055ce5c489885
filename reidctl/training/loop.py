"""One loop for every method and training stage: deterministic, resumable, selected on validation.

`step.py` computes a step, `feed.py` loads, `state.py` keeps what a killed training continues from, `watch.py` stops it
when numbers are not finite. On several processes all run this loop; the first one writes and speaks.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from reidctl import parallel, tables
from reidctl.batch import Batch
from reidctl.console import log, progress
from reidctl.data import TrainingSet
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.layers.gradients import local_gradients
from reidctl.methods.base import Look, Method
from reidctl.training.compiling import compile_blocks
from reidctl.training.config import TrainConfig
from reidctl.training.ema import Average
from reidctl.training.feed import EpochPlan, Feed
from reidctl.training.memory import advice, is_out_of_memory, measure_needs
from reidctl.training.optimizer import build_optimizer, learning_rate_factor
from reidctl.training.sharding import Sharded, copy_to_share, fill, full, require_shardable, share_state
from reidctl.training.state import Progress, epoch_files, kept_epochs, read_state, save_whole, tensors
from reidctl.training.step import Done, Losses, Step
from reidctl.training.tracking import Tracker, open_trackers
from reidctl.training.watch import Watch

Validate = Callable[[Method], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What training leaves: the history, the chosen epoch (0-based) and its value.

    Attributes:
        seconds: spent in steps, in all sessions together.
        resumed_from: the epoch that this session began with (0-based).
        stopped: whether `patience` ended it before its last epoch.
    """

    history: pd.DataFrame
    best_epoch: int
    best_value: float
    seconds: float
    images_per_second: float
    resumed_from: int
    stopped: bool = False


class Trainer:
    """The training loop.

    After every epoch, and every `save_steps` steps, all state goes to `folder/last/state.pt`, replaced atomically; a
    run that was killed continues from there and ends with the same weights, bit for bit on the CPU, as one that was
    not.

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
        self.device = parallel.own_device(resolve_device(config.device))
        self.place = parallel.place()
        self.validate, self.config = validate, config
        self.folder, self.seed, self.stage, self.fingerprint = folder, seed, stage, fingerprint
        self.whole, self.method = method, method
        self.sharded: Sharded | None = None
        self._put(method)
        self.feed = Feed(samples, config, seed, self.device)
        self.optimizer = build_optimizer(self.method, stage, config)
        self.average = None if config.ema is None else Average(self.method, config.ema)
        self.watch = Watch(folder, self.device)
        self.progress = Progress()
        self.tracker = Tracker([])
        self.loader_rate = math.inf
        self._complained = False

    def _put(self, method: Method) -> None:
        """Put the method on the device, whole or shared out."""
        if self.place.world > 1 and self.config.parallel == "fsdp":
            require_shardable(method, self.config)
            # Which parameters train must be known before they are shared out.
            build_optimizer(method, self.stage, self.config)
            method.begin(self.stage)
            self.method = copy_to_share(method, self.device)
            self.sharded = Sharded(Losses(self.method, self.stage), self.method, self.device)
            return
        self.method = method.to(self.device)
        if self.config.channels_last:
            self.method.to(memory_format=torch.channels_last)

    def run(self) -> Outcome:
        """Train to the end, leave the best weights in the method, and return the history.

        Raises:
            DataError: a loss is not finite, an image cannot be read, or the disk is full.
        """
        first = self._resume()
        if self.sharded is None:
            self.method.begin(self.stage)
        parallel.first_does(lambda: self._forget_epochs(first))
        if self.config.epochs == 0:
            self._untrained()
        if first < self.config.epochs and not self.progress.stopped:
            self._train(first)
        self._restore_best()
        done = self.progress
        rate = done.images / max(done.seconds, 1e-9)
        history = pd.DataFrame(done.rows)
        return Outcome(history, done.best_epoch, done.best_value, done.seconds, rate, first, done.stopped)

    def _train(self, first: int) -> None:
        # One epoch tells the length of all: they differ by a few batches at most.
        plan = self.feed.plan(first)
        if self.config.compile and self.sharded is not None:
            log.warning("train.compile is left out: blocks that are shared out (fsdp) are not compiled.")
        elif self.config.compile:
            compile_blocks(self.method, self.config)
        self.step = Step(self.method, self.optimizer, self.config, self.stage, self.sharded)
        with open_trackers(self.config, self.folder, self.stage) as self.tracker:
            if not self.progress.within:
                self.loader_rate = self.feed.measure(plan) * self.place.world
                self._log(first, "train", {"loader_images_per_second": self.loader_rate})
            images = plan.images * self.place.world * (self.config.epochs - first)
            with progress(f"{self.stage} {self.method.name}", images) as advance:
                for epoch in range(first, self.config.epochs):
                    self._epoch(plan if epoch == first else self.feed.plan(epoch), advance)
                    if self.progress.stopped:
                        break
        # What holds the group of processes must not outlive it.
        self.method.gradients = local_gradients
        del self.step

    def _untrained(self) -> None:
        """Zero-shot: validate the weights as they are."""
        self.method.eval()
        if self.validate is None:
            return
        found = self._measured(self.validate)
        self._log(0, self.config.select, found)
        self.progress.best_value = found[self.config.select_metric]

    def _compare_rates(self, step_rate: float) -> None:
        """Say once if training waits for images, and what helps."""
        if self.loader_rate < step_rate and not self._complained:
            self._complained = True
            log.warning(
                f"Training waits for images: the loader alone gives {self.loader_rate:,.0f} images/s, a step "
                f"could take {step_rate:,.0f}. Raise train.workers ({self.feed.threads} now) or train.cache_mb."
            )

    # An epoch

    def _epoch(self, plan: EpochPlan, advance: Callable[..., None]) -> None:
        start = self._enter(plan)
        within = self.progress
        total = len(plan.batches)
        mark = time.monotonic()
        for number, batch in enumerate(self.feed.load(plan, start), start):
            within.waited += time.monotonic() - mark
            self._set_rates(plan.epoch + (number / total if self.config.schedule_by == "step" else 0))
            last = number == total - 1
            reporting = within.step % self.config.log_every == 0 or last
            check = partial(self.watch.look, batch=batch, epoch=plan.epoch, step=within.step)
            try:
                done = self.step(batch, reporting=reporting, check=check)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self._out_of_memory(error, batch) from None
            if self.average is not None:
                self.average.update()
            if reporting:
                self.watch.settle()
                self._report(plan.epoch, done)
            images = len(batch) * self.place.world
            within.count(images, time.monotonic() - mark, number + 1)
            advance(images)
            if self.config.save_steps and within.step % self.config.save_steps == 0 and not last:
                self._save(plan.epoch)
            mark = time.monotonic()
        self._leave(plan.epoch)

    def _out_of_memory(self, error: BaseException, batch: Batch) -> UsageError:
        """What to change; measured on small parts of the batch that did not fit."""
        self.optimizer.zero_grad(set_to_none=True)
        images = len(batch) * self.place.world
        message = f"{self.device} ran out of memory in a batch of {images} images."
        if self.place.world > 1:
            # The others do not measure: whatever asks them for something would wait for ever.
            hint = "Try backbone.grad_checkpointing=true, train.precision=bf16, train.accumulate=2 or a smaller batch;"
            return UsageError(message, hint=f"{hint} `--dry-run --devices {self.place.world}` says what would fit.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        checkpointing = self.method.backbone.image.checkpointing
        self.method.gradients = local_gradients
        try:
            needs = measure_needs(self.method, batch, self.stage, self.config, checkpointing=checkpointing)
            return UsageError(message, hint=advice(error, needs, self.device))
        except (RuntimeError, MemoryError) as again:
            if not is_out_of_memory(again):
                raise
            return UsageError(message, hint="Not even a small part of it fits: is the device used by others?")

    def _enter(self, plan: EpochPlan) -> int:
        """Prepare for an epoch; return the number of its batches that are done."""
        start = self.progress.within
        if start:
            self.progress.restore_random(self.device, self.seed)
        else:
            # Dropout and masking draw from the process-wide generator: one seed per epoch makes an epoch a unit.
            torch.manual_seed(self.seed * 1_000_003 + plan.epoch + self.place.rank * 1_000_000_007)
            self.progress.begin_epoch()
            if self.stage == "finetune" and self.method.surveys:
                self.method.begin_epoch(plan.epoch, lambda look: self._survey(plan, look))
        self.method.train()
        return start

    def _leave(self, epoch: int) -> None:
        self.watch.settle()
        within = self.progress
        seconds = max(within.epoch_seconds, 1e-9)
        step_rate = within.epoch_images / max(seconds - within.waited, 1e-9)
        rates = {"images_per_second": within.epoch_images / seconds, "step_images_per_second": step_rate}
        if self.device.type == "cuda":
            rates["peak_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 1e6
        self._log(epoch, "train", {**rates, "loader_share": within.waited / seconds})
        self._compare_rates(step_rate)
        self.progress.within = 0
        self._validate(epoch)
        self._save(epoch)

    def _survey(self, plan: EpochPlan, look: Look) -> dict[str, Tensor]:
        """What `look` says of every sample of an epoch, by sample number; see `Method.begin_epoch`."""
        self.method.eval()
        numbers: list[Tensor] = []
        pieces: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            if self.sharded is not None:
                stack.enter_context(self.sharded.whole())
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.step.autocast())
            for batch in self.feed.load(plan):
                prepared = self.method.prepare(batch)
                for name, value in look(self.step.send(prepared)).items():
                    pieces.setdefault(name, []).append(value.float().cpu())
                numbers.append(batch.require("sample"))
        rows = parallel.gather_rows(torch.cat(numbers).numpy())
        found = {}
        for name, values in pieces.items():
            every = torch.from_numpy(np.array(parallel.gather_rows(torch.cat(values).numpy())))
            table = torch.full((len(self.feed.samples), *every.shape[1:]), math.nan)
            table[torch.from_numpy(np.array(rows))] = every
            found[name] = table
        return found

    def _set_rates(self, epoch: float) -> None:
        factor = learning_rate_factor(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("base_lr", 0.0) * factor

    def _report(self, epoch: int, done: Done) -> None:
        weights = self.method.current_weights(self.stage)
        values = {"total": float(done.objective)}
        for name, value in done.losses.items():
            values[f"loss/{name}"] = float(value.detach())
            values[f"weight/{name}"] = weights[name]
            if name in done.norms:
                values[f"grad_norm/{name}"] = done.norms[name]
        values |= self.method.training_report()
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        self._log(epoch, "train", values)

    def _log(self, epoch: int, split: str, values: Mapping[str, float]) -> None:
        now = time.time()
        common = {"stage": self.stage, "step": self.progress.step, "epoch": epoch, "split": split, "seconds": now}
        rows = [{**common, "name": name, "value": float(value)} for name, value in values.items()]
        self.progress.rows += rows
        self.tracker.write(rows)

    # Validation and what is kept

    def _validate(self, epoch: int) -> None:
        if (epoch + 1) % self.config.validate_every and epoch + 1 < self.config.epochs:
            return
        self.method.eval()
        if self.validate is None:
            return
        with nullcontext() if self.average is None else self.average.in_place():
            self._judge(epoch, self._measured(self.validate))

    def _measured(self, validate: Validate) -> dict[str, float]:
        """The metrics of the weights as they are, the first process's for all."""
        with nullcontext() if self.sharded is None else self.sharded.whole():
            return parallel.from_first(validate(self.method))

    def _judge(self, epoch: int, found: Mapping[str, float]) -> None:
        self._log(epoch, self.config.select, found)
        better = self.progress.judge(epoch, found[self.config.select_metric])
        if better or self.config.keep_epochs:
            self._keep(epoch, better)
        shown = ", ".join(f"{name} {100 * number:.1f}" for name, number in found.items())
        log.info(f"epoch {epoch + 1}/{self.config.epochs}: {self.config.select} {shown}")
        patience = self.config.patience
        if patience is not None and self.progress.worse >= patience and epoch + 1 < self.config.epochs:
            self.progress.stopped = True
            log.info(
                f"No better {self.config.select_metric} in {self.progress.worse} validations: stopping after epoch "
                f"{epoch + 1} of {self.config.epochs}."
            )

    def _keep(self, epoch: int, best: bool) -> None:
        """Write the weights that were validated, as the best ones and as those of their epoch."""
        weights = tensors(self.method) if self.sharded is None else tensors(full(self.method.state_dict()))
        if self.place.rank != 0:
            return
        if self.config.keep_epochs:
            payload = save(weights, metadata={"fingerprint": self.fingerprint})
            tables.write_bytes(self.folder / "epochs" / f"epoch-{epoch + 1:03d}.safetensors", payload)
        if best:
            tables.write_bytes(self._best_path(), save(weights))

    def _best_path(self) -> Path:
        # Named after the training and the epoch: a file of another training, or newer than the state, is never taken.
        return self.folder / "last" / f"best-{self.fingerprint[:12]}-{self.progress.best_epoch}.safetensors"

    def _forget_epochs(self, first: int) -> None:
        """Remove kept weights of another training, and those newer than the state that is continued."""
        mine = kept_epochs(self.folder, self.fingerprint) if self.config.keep_epochs else {}
        kept = {path for epoch, path in mine.items() if epoch <= first}
        for path in epoch_files(self.folder):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _save(self, epoch: int) -> None:
        self.watch.settle()
        state = {
            "fingerprint": self.fingerprint,
            "epoch": epoch,
            "method": full(self.method.state_dict()),
            "training_state": self.method.training_state(),
            "optimizer": full(self.optimizer.state_dict()),
            "average": None if self.average is None else full(self.average.state_dict()),
            "progress": self.progress.state_dict(self.device),
        }
        if self.place.rank == 0:
            save_whole(state, self.folder / "last" / "state.pt")
            for file in (self.folder / "last").iterdir():
                stale = file.name.startswith("best-") and file != self._best_path()
                if stale or file.name.endswith(".tmp"):
                    file.unlink(missing_ok=True)

    def _resume(self) -> int:
        """Load the state of the same training, if any; return the epoch to go on with."""
        state = read_state(self.folder / "last" / "state.pt", self.fingerprint)
        if state is None:
            return 0
        self._load(state)
        self.method.load_training_state(state["training_state"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress.load_state_dict(state["progress"])
        self._say_continuing(int(state["epoch"]))
        return int(state["epoch"]) + (0 if self.progress.within else 1)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Weights and optimiser, on whatever number of devices they were kept."""
        if self.sharded is None:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            return
        fill(self.method, state["method"])
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self.optimizer.load_state_dict(share_state(state["optimizer"], parameters))

    def _say_continuing(self, epoch: int) -> None:
        done = self.progress
        after = f"after batch {done.within} of epoch {epoch + 1}" if done.within else f"after epoch {epoch + 1}"
        log.info(f"Continuing {after} of {self.config.epochs}.")
        if done.world != self.place.world:
            log.warning(
                f"This training ran on {done.world} device(s) so far and goes on with {self.place.world}: what is "
                "drawn at random and how sums are rounded differ from here on; batches are the same as far as they "
                "divide."
            )

    def _restore_best(self) -> None:
        if self.average is not None and self.config.epochs:
            self.average.adopt()
        if self.sharded is not None:
            self.whole.load_state_dict({n: v.cpu() for n, v in full(self.method.state_dict()).items()})
            self.method = self.whole
        if self.progress.best_epoch >= 0:
            path = self._best_path()
            parallel.wait()
            try:
                self.method.load_state_dict(load_file(path), strict=False)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is missing or damaged ({error}).", hint="Train again with --force.") from None
        self.method.eval()
