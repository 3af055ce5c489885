"""Which samples meet in a batch: P x K identity sampling and plain shuffling, as functions of a generator."""

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError, UsageError


def identity_batches(
    person: npt.NDArray[np.int64],
    image: npt.NDArray[np.int64],
    *,
    batch: int,
    instances: int,
    rng: np.random.Generator,
) -> list[npt.NDArray[np.int64]]:
    """Return the P x K batches of one epoch: K samples of each of P = batch / instances people.

    A person's samples are dealt so that one image repeats only when the person has fewer than K; people with
    fewer samples than K are filled up by drawing again. The epoch ends when fewer than P people have samples left,
    but everyone appears at least once: leftover first chunks are topped up with random other people.

    Args:
        person: identity index of every sample, shape (S,).
        image: image row of every sample, shape (S,).

    Raises:
        UsageError: `batch` is not a multiple of `instances`, or there are fewer than two people.
    """
    if instances < 1 or batch % instances:
        raise UsageError(f"A batch of {batch} cannot hold {instances} samples of each person.")
    people = np.unique(person)
    if len(people) < 2:
        raise DataError("The training split has fewer than two people; there is nothing to tell apart.")
    per_batch = min(batch // instances, len(people))
    by_person = np.argsort(person, kind="stable")
    members = dict(
        zip(people.tolist(), np.split(by_person, np.searchsorted(person[by_person], people[1:])), strict=True)
    )
    chunks = {p: _chunks(members[p], image, instances, rng) for p in members}
    batches = []
    fresh = set(members)
    while len(chunks) >= per_batch or fresh:
        names = np.asarray(sorted(chunks))
        chosen = [int(p) for p in rng.permutation(names)[:per_batch]]
        fillers: list[int] = []
        if len(chosen) < per_batch:
            fillers = [int(p) for p in rng.permutation(people) if int(p) not in chosen][: per_batch - len(chosen)]
        spare = {p: _chunks(members[p], image, instances, rng) for p in fillers}
        batches.append(np.concatenate([chunks[p].pop() for p in chosen] + [spare[p].pop() for p in fillers]))
        fresh.difference_update(chosen)
        chunks = {p: left for p, left in chunks.items() if left}
    return batches


def _chunks(
    samples: npt.NDArray[np.int64], image: npt.NDArray[np.int64], instances: int, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """One person's samples in groups of K, different images first within the deal."""
    order = rng.permutation(samples)
    turn: dict[int, int] = {}
    turns = np.empty(len(order), np.int64)
    for place, sample in enumerate(order):
        turns[place] = turn[int(image[sample])] = turn.get(int(image[sample]), -1) + 1
    order = order[np.argsort(turns, kind="stable")]
    groups = []
    for start in range(0, len(order), instances):
        group = order[start : start + instances]
        if len(group) < instances:
            group = np.concatenate([group, _fill(group, order, image, instances - len(group), rng)])
        groups.append(group)
    return groups[::-1]


def _fill(
    group: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    image: npt.NDArray[np.int64],
    missing: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Draw samples to fill a group, images not yet in it first."""
    have = set(image[group].tolist())
    others: list[int] = []
    for sample in rng.permutation(samples):
        if int(image[sample]) not in have:
            have.add(int(image[sample]))
            others.append(int(sample))
    drawn = others[:missing]
    while len(drawn) < missing:
        drawn.append(int(samples[rng.integers(len(samples))]))
    return np.asarray(drawn, np.int64)


def random_batches(samples: int, *, batch: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Return one shuffled epoch in batches; a last batch of one sample joins the one before it."""
    order = rng.permutation(samples)
    batches = [order[start : start + batch] for start in range(0, samples, batch)]
    if len(batches) > 1 and len(batches[-1]) < 2:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches
