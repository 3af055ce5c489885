"""What a method sees: every tensor of a batch, with its shape."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Token ids of B texts padded to one length.

    Attributes:
        ids: shape (B, L), int64.
        mask: shape (B, L), bool, True on real tokens (special tokens included).
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Tokens":
        return Tokens(self.ids[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> "Tokens":
        """Return the same tokens on another device."""
        return Tokens(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Images and texts of B samples; what a sample lacks is None for the whole batch.

    Attributes:
        image: pixels normalised with the backbone's statistics, shape (B, 3, H, W).
        person: training identity index, shape (B,), int64.
        texts: tokens by role. `full` is the caption, `identity` and `clothing` the two MLLM texts;
            `fusion` is the identity text of ANOTHER image of the same person (never of this sample's own texts).
        image_id, text_id: where each row came from, for messages and for the leak tests.
        clothing_group: equal numbers mean equal clothing texts, shape (B,), int64.
        has_fusion: rows whose `fusion` text may be read, shape (B,), bool.
    """

    image: Tensor | None = None
    person: Tensor | None = None
    texts: dict[str, Tokens] = field(default_factory=dict)
    image_id: tuple[str, ...] = ()
    text_id: tuple[str, ...] = ()
    clothing_group: Tensor | None = None
    has_fusion: Tensor | None = None

    def __len__(self) -> int:
        if self.image is not None:
            return self.image.shape[0]
        return len(next(iter(self.texts.values()))) if self.texts else 0

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        moved: dict[str, Any] = {"texts": {name: tokens.to(device) for name, tokens in self.texts.items()}}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)

    def require(self, name: str) -> Tensor:
        """Return tensor `name`, which the caller cannot do without.

        Raises:
            ValueError: the batch was built without it (a bug in the sampler or collate, not in the data).
        """
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"this batch carries no `{name}`")
        return value
