"""Batches whose people belong to groups, such as datasets: who is where, found out on the CPU before the copy.

A device would have to be waited for to say which datasets a batch holds, and how many different people.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reidctl.batch import Batch
from reidctl.parts import Parts


@dataclass(frozen=True, kw_only=True)
class GroupedBatch(Batch):
    """A batch that knows its people by group.

    Attributes:
        label: group * `persons` + person of each sample, (B,), int64: equal for one person of one group.
        owner: the different labels, rising and therefore by group, (U,), int64.
        owners: how many of them each group has.
        order: the samples by group, each group in the order of the batch, (B,), int64.
        sizes: how many samples each group has.
        persons: number of training identities.
    """

    label: Tensor
    owner: Tensor
    owners: tuple[int, ...]
    order: Tensor
    sizes: tuple[int, ...]
    persons: int

    def take(self, samples: Sequence[int]) -> "GroupedBatch":
        """Return some samples, on the CPU, with the people and groups that are left; see `Batch.take`."""
        return grouped(super().take(samples), len(self.sizes), self.persons)

    def pairs(self) -> "GroupedBatch":
        """Return the samples that have a text, with their people and groups; see `Batch.pairs`."""
        return grouped(super().pairs(), len(self.sizes), self.persons)

    def people(self) -> list[Tensor]:
        """Return the different people of each group, rising, by number."""
        each = torch.split(self.owner, list(self.owners))
        return [labels - group * self.persons for group, labels in enumerate(each)]

    def group_rows(self) -> dict[str, Tensor]:
        """Return `group<k>`, the samples of each group by number; nothing if there is one group."""
        several = torch.split(self.order, list(self.sizes)) if len(self.sizes) > 1 else ()
        return {f"group{group}": rows for group, rows in enumerate(several)}


def grouped(batch: Batch, groups: int, persons: int) -> GroupedBatch:
    """Return a batch with its people by group; a sample's group is its `domain` where there are several.

    Args:
        batch: with `person`, and with `domain` if there are several groups; on the CPU, or its device is waited for.
        groups: how many there are; also those that the batch holds nobody of are listed.
        persons: number of training identities.

    Raises:
        ValueError: the batch lacks one of the two, or a sample belongs to no group.
    """
    person = batch.require("person")
    group = batch.require("domain") if groups > 1 else torch.zeros_like(person)
    label = group * persons + person
    owner = torch.unique(label)
    return GroupedBatch(
        **{item.name: getattr(batch, item.name) for item in fields(Batch)},
        label=label,
        owner=owner,
        owners=_counts(owner // persons, groups),
        order=torch.argsort(group, stable=True),
        sizes=_counts(group, groups),
        persons=persons,
    )


def _counts(group: Tensor, groups: int) -> tuple[int, ...]:
    """How often each group occurs."""
    found = [0] * groups
    for number in group.tolist():
        if not 0 <= number < groups:
            raise ValueError(f"a sample is of group {number}, and there are {groups}")
        found[number] += 1
    return tuple(found)


def split_parts(parts: Parts, groups: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Yield the groups that a batch holds somebody of, with the rows of each, from what `group_rows` gave.

    How many rows there are is known from the shape, so that no device is asked.
    """
    if groups == 1:
        yield 0, slice(None)
        return
    for group in range(groups):
        if len(rows := parts[f"group{group}"]):
            yield group, rows
