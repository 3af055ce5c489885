"""The batches of an epoch, as `train.sampler` says."""

from typing import Any

import numpy as np

from reidctl.data import TrainingSet
from reidctl.sampling import alternating_batches, identity_batches, mixed_batches, random_batches, shuffled_batches
from reidctl.training.config import TrainConfig


def epoch_batches(
    samples: TrainingSet, config: TrainConfig, seed: int, epoch: int
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the batches of an epoch as numbers of samples; they depend on nothing but the arguments.

    Raises:
        DataError: the samples do not allow the sampler.
    """
    rng = np.random.default_rng((seed, 1, epoch))
    person, image = samples.person_of_sample, samples.picture_of_sample
    if config.sampler == "random":
        return random_batches(image, batch=config.batch, rng=rng)
    if config.sampler == "shuffle":
        return shuffled_batches(len(samples), batch=config.batch, rng=rng)
    if config.sampler == "identity":
        return identity_batches(person, image, batch=config.batch, instances=config.instances, rng=rng)
    if config.sampler in ("alternating", "alternating-random"):
        return alternating_batches(
            person,
            image,
            samples.domain_of_row[samples.row_of_sample],
            batch=config.batch,
            instances=config.instances if config.sampler == "alternating" else None,
            power=config.alternation_power,
            rng=rng,
        )
    return mixed_batches(
        person,
        image,
        np.arange(len(samples)) < samples.paired,
        batch=config.batch,
        batch_images=config.batch_images,
        instances=config.instances,
        identity_pairs=config.mixed_pairs == "identity",
        rng=rng,
    )
