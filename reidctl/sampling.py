"""Which samples meet in a batch, as functions of a generator: P x K, random, mixed and domain-alternating.

A sample is a caption with its image, or an image alone. No batch makes an image its own only positive: where two
samples of one person meet, two images of the person meet, unless the person has only one.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError, UsageError

Indices = npt.NDArray[np.int64]


def identity_batches(
    person: Indices,
    image: Indices,
    *,
    batch: int,
    instances: int,
    rng: np.random.Generator,
    what: str = "training split",
) -> list[Indices]:
    """Return the P x K batches of one epoch: K samples of each of P = batch / instances people.

    A person's samples are dealt so that one image repeats only when the person has fewer than K; people with
    fewer samples than K are filled up by drawing again. The epoch ends when fewer than P people have samples left,
    but everyone appears at least once: leftover first chunks are topped up with random other people.

    Args:
        person: identity index of every sample, shape (S,).
        image: which picture a sample shows, shape (S,); equal numbers are one picture.
        batch: P * K samples; fewer only when there are fewer than P people.
        instances: K.
        rng: decides everything.
        what: is dealt, for messages.

    Raises:
        UsageError: `batch` is not a multiple of `instances`.
        DataError: there are fewer than two people.
    """
    if instances < 1 or batch % instances:
        raise UsageError(f"A batch of {batch} cannot hold {instances} samples of each person.")
    people, members = _by_value(person)
    if len(people) < 2:
        raise DataError(f"The {what} has fewer than two people; there is nothing to tell apart.")
    per_batch = min(batch // instances, len(people))
    chunks = [_chunks(samples, image, instances, rng) for samples in members]
    left = np.asarray([len(chunk) for chunk in chunks])
    fresh = np.ones(len(people), bool)
    batches = []
    while (left > 0).sum() >= per_batch or fresh.any():
        chosen = rng.permutation(np.flatnonzero(left))[:per_batch]
        missing = per_batch - len(chosen)
        spare = rng.permutation(np.setdiff1d(np.arange(len(people)), chosen))[:missing] if missing else chosen[:0]
        dealt = [chunks[p].pop() for p in chosen]
        dealt += [_chunks(members[p], image, instances, rng).pop() for p in spare]
        batches.append(np.concatenate(dealt))
        left[chosen] -= 1
        fresh[chosen] = False
    return batches


def _by_value(values: Indices) -> tuple[Indices, list[Indices]]:
    """The distinct values, sorted, and the positions of each."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    return distinct, np.split(order, starts[1:])


def _chunks(samples: Indices, image: Indices, instances: int, rng: np.random.Generator) -> list[Indices]:
    """One person's samples in groups of K different images; images repeat only if the person has fewer than K.

    Every sample is in a group. The images with most samples left are dealt first; what a group lacks is drawn again.
    """
    order = rng.permutation(samples).tolist()
    all_of: dict[int, list[int]] = {}
    for sample, picture in zip(order, image[order].tolist(), strict=True):
        all_of.setdefault(picture, []).append(sample)
    left = {picture: list(own) for picture, own in all_of.items()}
    groups = []
    while left:
        first = sorted(left, key=lambda picture: -len(left[picture]))[:instances]
        group = [left[picture].pop() for picture in first]
        left = {picture: own for picture, own in left.items() if own}
        if len(group) < instances:
            group += _fill(set(first), all_of, left, instances - len(group), rng)
            left = {picture: own for picture, own in left.items() if own}
        groups.append(np.asarray(group, np.int64))
    return groups[::-1]


def _fill(
    held: set[int], all_of: dict[int, list[int]], left: dict[int, list[int]], missing: int, rng: np.random.Generator
) -> list[int]:
    """Samples to fill a group: of images that it does not hold, then undealt ones, then any."""
    others = [picture for picture in all_of if picture not in held]
    drawn = [all_of[p][int(rng.integers(len(all_of[p])))] for p in rng.permutation(others)[:missing].tolist()]
    while len(drawn) < missing and any(left.values()):
        # One of each image in turn, so that no image comes three times where two would do.
        for own in left.values():
            if own and len(drawn) < missing:
                drawn.append(own.pop())
    every = [sample for own in all_of.values() for sample in own]
    return drawn + [every[int(rng.integers(len(every)))] for _ in range(missing - len(drawn))]


def random_batches(image: Indices, *, batch: int, rng: np.random.Generator) -> list[Indices]:
    """Return one shuffled epoch in batches; every sample occurs once, and no image twice in a batch.

    An image that would come twice waits for a later batch, so the last batches can be smaller. A batch of a single
    sample, which has nothing to be told apart from, joins one that does not hold its image.

    Args:
        image: which picture a sample shows, shape (S,).
        batch: samples in a batch.
        rng: decides the order.
    """
    queue = deque(rng.permutation(len(image)).tolist())
    rows = image.tolist()
    waiting: list[int] = []
    batches: list[list[int]] = []
    while queue or waiting:
        taken: dict[int, int] = {}
        again: list[int] = []
        for sample in waiting:
            _take(sample, rows, taken, again, batch)
        while queue and len(taken) < batch:
            _take(queue.popleft(), rows, taken, again, batch)
        waiting = again
        batches.append(list(taken.values()))
    if len(batches[-1]) == 1:
        alone = batches[-1][0]
        home = next((b for b in reversed(batches[:-1]) if rows[alone] not in {rows[sample] for sample in b}), None)
        if home is not None:
            home.append(alone)
            batches.pop()
    return [np.asarray(samples, np.int64) for samples in batches]


def shuffled_batches(count: int, *, batch: int, rng: np.random.Generator) -> list[Indices]:
    """Return one shuffled epoch of `count` samples in batches, as a plain data loader deals them.

    An image with two captions may come twice in a batch; the last batch is smaller. A last batch of one sample, from
    which nothing is learnt and whose statistics norms do not have, joins the one before.
    """
    order = rng.permutation(count).astype(np.int64)
    cuts = list(range(batch, count, batch))
    if cuts and count - cuts[-1] == 1:
        cuts.pop()
    return np.split(order, cuts)


def _take(sample: int, rows: list[int], taken: dict[int, int], again: list[int], batch: int) -> None:
    if rows[sample] in taken or len(taken) >= batch:
        again.append(sample)
    else:
        taken[rows[sample]] = sample


def mixed_batches(
    person: Indices,
    image: Indices,
    captioned: npt.NDArray[np.bool_],
    *,
    batch: int,
    batch_images: int,
    instances: int,
    identity_pairs: bool,
    rng: np.random.Generator,
) -> list[Indices]:
    """Return batches of `batch` captioned samples followed by `batch_images` caption-free images (HPL: 64 + 64).

    The captioned samples define the epoch; the images are dealt P x K, anew whenever they run out, because the losses
    that read them compare images of a person.

    Args:
        person, image: identity index and picture of every sample, shape (S,).
        captioned: whether a sample has a text, shape (S,).
        batch, batch_images: samples of each kind.
        instances: K.
        identity_pairs: deal the captioned samples P x K too; else at random.
        rng: decides everything.

    Raises:
        DataError: there is nothing of one kind.
    """
    pairs, alone = np.flatnonzero(captioned), np.flatnonzero(~captioned)
    for kind, found in (("captioned", pairs), ("caption-free", alone)):
        if not len(found):
            raise DataError(
                f"The training split has no {kind} images to mix.",
                hint="Use train.sampler: identity (prompt.sampler in the prompt stage).",
            )
    if identity_pairs:
        first = identity_batches(person[pairs], image[pairs], batch=batch, instances=instances, rng=rng)
    else:
        first = random_batches(image[pairs], batch=batch, rng=rng)
    second: list[Indices] = []
    while len(second) < len(first):
        second += identity_batches(
            person[alone], image[alone], batch=batch_images, instances=instances, rng=rng, what="caption-free part"
        )
    return [np.concatenate([pairs[a], alone[b]]) for a, b in zip(first, second, strict=False)]


def alternating_batches(
    person: Indices,
    image: Indices,
    domain: Indices,
    *,
    batch: int,
    instances: int | None,
    power: float,
    rng: np.random.Generator,
) -> list[Indices]:
    """Return batches of one domain each; domain d gets a share of size_d ** power of the batches.

    The epoch is long enough for every person of every domain to appear; a domain that runs out is dealt anew. The
    domains take turns as evenly as their shares allow. MTA-CLIP does not state its rule; 0.5 is our reading. Of one
    domain they are the batches of `identity_batches` or `random_batches`.

    Args:
        person, image, domain: identity index, picture and dataset of every sample, shape (S,).
        batch, instances: P * K and K; without K the batches are random ones (`random_batches`).
        power: 1 is proportional to size, 0 gives every domain the same.
        rng: decides everything.
    """
    _, members = _by_value(domain)
    share = np.asarray([len(samples) for samples in members], float) ** power
    share /= share.sum()

    def deal(samples: Indices) -> list[Indices]:
        if instances is None:
            return [samples[rows] for rows in random_batches(image[samples], batch=batch, rng=rng)]
        found = identity_batches(
            person[samples], image[samples], batch=batch, instances=instances, rng=rng, what="part of one dataset"
        )
        return [samples[rows] for rows in found]

    queues = [deque(deal(samples)) for samples in members]
    total = int(np.ceil(max(len(queue) / part for queue, part in zip(queues, share, strict=True)) - 1e-9))
    given = np.zeros(len(members))
    batches = []
    for step in range(1, total + 1):
        turn = int(np.argmax(share * step - given))
        given[turn] += 1
        if not queues[turn]:
            queues[turn].extend(deal(members[turn]))
        batches.append(queues[turn].popleft())
    return batches


def share_of_rank(
    batches: Sequence[Indices],
    rank: int,
    world: int,
    *,
    instances: int = 1,
    captioned: npt.NDArray[np.bool_] | None = None,
) -> list[Indices]:
    """Return one process's part of every batch: all processes get the same number of batches of the same sizes.

    The batches are those of the whole group (`world` times what one process holds), made by every process from the
    same seed; the parts together are the whole batch, in order of rank. Groups of K samples of one person stay
    together, and of a mixed batch every process gets its part of both kinds. Groups that do not divide (fewer than
    `world` in a batch) are left out of this epoch, so that no process waits for a batch that never comes and no sample
    is counted twice.

    Args:
        batches: the batches of the whole group.
        rank: 0 <= rank < world.
        world: number of processes.
        instances: K; 1 where samples are not grouped.
        captioned: whether a sample has a text, shape (S,); needed for mixed batches.

    Raises:
        UsageError: `rank` is not below `world`.
    """
    if not 0 <= rank < world:
        raise UsageError(f"Process {rank} is not one of {world}.")
    shares = []
    for whole in batches:
        kinds = [whole] if captioned is None else [whole[captioned[whole]], whole[~captioned[whole]]]
        sizes = [len(kind) // instances // world * instances for kind in kinds]
        if all(sizes):
            parts = [kind[rank * size : (rank + 1) * size] for kind, size in zip(kinds, sizes, strict=True)]
            shares.append(np.concatenate(parts))
    return shares
