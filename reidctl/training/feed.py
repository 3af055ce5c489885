"""The batches of an epoch, loaded ahead: this process's part of each."""

import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reidctl import parallel
from reidctl.batch import Batch
from reidctl.data import Key, TrainingSet
from reidctl.errors import UsageError
from reidctl.loading import load_ahead, loader_threads
from reidctl.sampling import share_of_rank
from reidctl.training.batches import epoch_batches
from reidctl.training.config import TrainConfig

Places = np.ndarray[Any, np.dtype[np.int64]]

# How much of the first epoch is loaded once more to know the loader's own speed.
_LOADER_BATCHES, _LOADER_SECONDS = 16, 3.0


@dataclass(frozen=True)
class EpochPlan:
    """What this process loads in an epoch.

    Attributes:
        samples: sample numbers of the epoch, batch after batch, for all processes together.
        batches: this process's part of each batch, as places in `samples`.
    """

    epoch: int
    samples: Places
    batches: list[Places]

    @property
    def images(self) -> int:
        """Images that this process loads."""
        return sum(map(len, self.batches))


class Feed:
    """Loads batches.

    Args:
        samples: the training set.
        config: sampler, sizes and threads.
        seed: of sampling and augmentation.
        device: where batches go to; those for a GPU lie in page-locked memory.
    """

    def __init__(self, samples: TrainingSet, config: TrainConfig, seed: int, device: torch.device) -> None:
        self.samples, self.config, self.seed, self.device = samples, config, seed, device
        # As if all processes were on this machine: too few threads on several are better than too many on one.
        own = loader_threads(device.type, parallel.place().world)
        self.threads = own if config.workers is None else config.workers
        # A GPU normalises and erases bytes itself: a quarter of the copy, and less for the loader to do.
        samples.raw = device.type == "cuda"

    def plan(self, epoch: int) -> EpochPlan:
        """Return the batches of an epoch; every process has as many, of the same sizes."""
        whole = epoch_batches(self.samples, self.config, self.seed, epoch)
        flat = np.concatenate(whole)
        places = np.split(np.arange(len(flat)), np.cumsum([len(batch) for batch in whole])[:-1])
        here = parallel.place()
        if here.world > 1:
            mixed = self.config.sampler == "mixed"
            together = self.config.sampler in ("identity", "mixed", "alternating")
            places = share_of_rank(
                places,
                here.rank,
                here.world,
                instances=self.config.instances if together else 1,
                captioned=flat < self.samples.paired if mixed else None,
            )
            if not places:
                raise UsageError(
                    f"Batches of {self.config.batch} cannot be shared by {here.world} devices: each would get less "
                    "than one group.",
                    hint="Raise train.batch, lower train.instances, or use fewer devices.",
                )
        return EpochPlan(epoch, flat, list(places))

    def load(self, plan: EpochPlan, start: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from number `start` on, in order."""
        keys = [self._keys(plan, batch) for batch in plan.batches[start:]]
        return load_ahead(self._batch, keys, threads=self.threads)

    def _keys(self, plan: EpochPlan, batch: Places) -> Sequence[Key]:
        # The place within the whole epoch: a sample looks the same whichever process loads it.
        return [(plan.epoch, int(plan.samples[place]), int(place)) for place in batch]

    def _batch(self, keys: Sequence[Key]) -> Batch:
        batch = self.samples.collate([self.samples[key] for key in keys])
        return batch.pin() if self.device.type == "cuda" else batch

    def measure(self, plan: EpochPlan) -> float:
        """Return how many images a second the loader gives when nobody else computes; they are loaded again."""
        started = time.monotonic()
        images = 0
        loading = self.load(plan)
        for batch in itertools.islice(loading, _LOADER_BATCHES):
            images += len(batch)
            if time.monotonic() - started > _LOADER_SECONDS:
                break
        loading.close()
        return images / (time.monotonic() - started)
