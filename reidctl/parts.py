"""What the losses read of a batch, made part by part: on several processes, or in several passes on one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """Named tensors of a batch, or of a part of one; `join` puts the parts of a batch together.

    The first dimension of each counts something: samples, texts, phrases, or parts (a sum over a part has shape (1,)).
    No tensor may say anything about samples of another part.

    Attributes:
        rows: the tensors by name.
        points: names of index tensors, each with the name of the tensor whose rows it numbers; -1 stands for none.
    """

    rows: Mapping[str, Tensor]
    points: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, None if it is not there."""
        return self.rows.get(name)

    def with_rows(self, rows: Mapping[str, Tensor]) -> "Parts":
        """Return other tensors with the same pointers."""
        return Parts(rows, self.points)


def join(parts: Sequence[Parts]) -> Parts:
    """Return the parts of one batch as one, in their order.

    Further dimensions (words of a text, phrases of a text) are padded at the end to the longest: with 0, and with -1
    where a tensor points. Pointers are shifted to the rows that they mean. One part comes back as it is.

    Raises:
        ValueError: the parts hold different tensors.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(set(part) != set(first) for part in parts):
        raise ValueError(f"parts of one batch hold different tensors: {[sorted(part) for part in parts]}")
    rows = {}
    for name in first:
        members = [part[name] for part in parts]
        if name in first.points:
            members = _shifted(members, [len(part[first.points[name]]) for part in parts])
        rows[name] = torch.cat(_padded(members, -1 if name in first.points else 0))
    return Parts(rows, first.points)


def _shifted(members: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Pointers of each part, counted from the first row of the first part."""
    shifted, start = [], 0
    for pointer, length in zip(members, lengths, strict=True):
        shifted.append(torch.where(pointer >= 0, pointer + start, pointer))
        start += length
    return shifted


def _padded(members: Sequence[Tensor], value: int) -> list[Tensor]:
    """Tensors with all dimensions but the first as long as the longest of each."""
    shape = [max(sizes) for sizes in zip(*(member.shape[1:] for member in members), strict=True)]
    return [pad_to(member, [len(member), *shape], value) for member in members]


def pad_to(tensor: Tensor, shape: Sequence[int], value: int = 0) -> Tensor:
    """Return a tensor padded at the end of each dimension to a shape."""
    missing = [wanted - own for own, wanted in zip(tensor.shape, shape, strict=True)]
    if not any(missing):
        return tensor
    # `pad` counts dimensions from the last.
    amounts = [amount for count in reversed(missing) for amount in (0, count)]
    return torch.nn.functional.pad(tensor, amounts, value=value)
