"""What a method sees: every tensor of a batch, with its shape."""

from collections.abc import Callable
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

    def pin(self) -> "Tokens":
        """Return the same tokens in page-locked memory."""
        return Tokens(self.ids.pin_memory(), self.mask.pin_memory())

    def to(self, device: torch.device | str) -> "Tokens":
        """Return the same tokens on another device."""
        return Tokens(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


@dataclass(frozen=True)
class PhraseSets:
    """The part phrases of T texts; each different phrase is held once.

    Attributes:
        tokens: the P different phrases, each a text of its own.
        index: which phrases a text has, -1 for none, shape (T, K), int64.
        part: the part of the body that each of them is about, a number in `phrases.base.PARTS`, -1 for none, (T, K).
        span: first and last + 1 of the phrase's tokens in the text `full`, (T, K, 2), int64; equal: not known.
    """

    tokens: Tokens
    index: Tensor
    part: Tensor
    span: Tensor

    @property
    def mask(self) -> Tensor:
        """True where there is a phrase, shape (T, K)."""
        return self.index >= 0

    def __len__(self) -> int:
        return self.index.shape[0]

    def pin(self) -> "PhraseSets":
        """Return the same phrases in page-locked memory."""
        return PhraseSets(self.tokens.pin(), self.index.pin_memory(), self.part.pin_memory(), self.span.pin_memory())

    def to(self, device: torch.device | str) -> "PhraseSets":
        """Return the same phrases on another device."""
        moved = [value.to(device, non_blocking=True) for value in (self.index, self.part, self.span)]
        return PhraseSets(self.tokens.to(device), *moved)


@dataclass(frozen=True)
class Batch:
    """Images and texts of B samples, T of which have a text; what no sample has is None for the whole batch.

    Texts have T rows: a sample without a caption carries no text tensor. `pairs` returns the part where images and
    texts are aligned.

    Attributes:
        image: pixels normalised with the backbone's statistics, shape (B, 3, H, W).
        person: training identity index, shape (B,), int64.
        texts: tokens by role. `full` is the caption, `identity` and `clothing` the two MLLM texts;
            `fusion` is the identity text of ANOTHER image of the same person (never of this sample's own texts).
        image_id, text_id: where each row came from, for messages and for the leak tests.
        clothing_group: equal numbers mean equal clothing texts, shape (B,), int64.
        has_fusion: rows whose `fusion` text may be read, shape (B,), bool.
        has_text: samples with a text, in the order of the texts' rows, shape (B,), bool; None: all of them.
        frozen: features that a prompt stage keeps instead of computing: names that start with `image` have a row per
            sample, names that start with `text` a row per text.
        domain: which dataset a sample is from, shape (B,), int64; numbers follow the sorted names of the datasets.
        camera: which of the cameras that the method knows (`Roster.cameras`) took each image, shape (B,), int64; -1 for
            another or an unknown one; None where no method asks.
        phrases: the part phrases of the texts `full`, in the order of their rows; None where no method asks.
    """

    image: Tensor | None = None
    person: Tensor | None = None
    texts: dict[str, Tokens] = field(default_factory=dict)
    image_id: tuple[str, ...] = ()
    text_id: tuple[str, ...] = ()
    clothing_group: Tensor | None = None
    has_fusion: Tensor | None = None
    has_text: Tensor | None = None
    domain: Tensor | None = None
    camera: Tensor | None = None
    frozen: dict[str, Tensor] = field(default_factory=dict)
    phrases: PhraseSets | None = None

    def __len__(self) -> int:
        if self.image is not None:
            return self.image.shape[0]
        if "image" in self.frozen:
            return self.frozen["image"].shape[0]
        return len(next(iter(self.texts.values()))) if self.texts else 0

    def pin(self) -> "Batch":
        """Return the same batch in page-locked memory, from which a GPU copies while it computes."""
        texts = {name: tokens.pin() for name, tokens in self.texts.items()}
        phrases = self.phrases.pin() if self.phrases is not None else None
        return self._mapped(lambda value: value.pin_memory(), texts, phrases)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        texts = {name: tokens.to(device) for name, tokens in self.texts.items()}
        phrases = self.phrases.to(device) if self.phrases is not None else None
        return self._mapped(lambda value: value.to(device, non_blocking=True), texts, phrases)

    def _mapped(
        self, change: Callable[[Tensor], Tensor], texts: dict[str, Tokens], phrases: PhraseSets | None
    ) -> "Batch":
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        changed: dict[str, Any] = {n: change(value) for n, value in tensors.items() if isinstance(value, Tensor)}
        frozen = {name: change(value) for name, value in self.frozen.items()}
        return replace(self, texts=texts, frozen=frozen, phrases=phrases, **changed)

    def require(self, name: str) -> Tensor:
        """Return tensor `name`, which the caller cannot do without.

        Raises:
            ValueError: the batch was built without it (a bug in the sampler or collate, not in the data).
        """
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"this batch carries no `{name}`")
        return value

    def pairs(self) -> "Batch":
        """Return the samples that have a text: image i belongs to text i."""
        if self.has_text is None:
            return self
        rows = self.has_text.nonzero().flatten()
        kept = {
            name: getattr(self, name)
            for name in ("image", "person", "clothing_group", "has_fusion", "domain", "camera")
        }
        parts: dict[str, Any] = {name: value if value is None else value[rows] for name, value in kept.items()}
        whole = {name: value if name.startswith("text") else value[rows] for name, value in self.frozen.items()}
        return replace(
            self,
            **parts,
            frozen=whole,
            image_id=tuple(self.image_id[row] for row in rows.tolist()) if self.image_id else (),
            text_id=tuple(self.text_id[row] for row in rows.tolist()) if self.text_id else (),
            has_text=None,
        )


@dataclass(frozen=True)
class Roster:
    """Who and what is in a training set, for methods that tell datasets or cameras apart; it is saved with the model.

    Attributes:
        domains: names of the datasets, sorted; their numbers are those of `Batch.domain`.
        people: for each dataset the numbers of its people, rising; a person may be in several.
        cameras: names `dataset/camera`, sorted; their numbers are those of `Batch.camera`.
    """

    domains: tuple[str, ...] = ()
    people: tuple[tuple[int, ...], ...] = ()
    cameras: tuple[str, ...] = ()

    @classmethod
    def single(cls, persons: int) -> "Roster":
        """Return the roster of people of one nameless dataset, taken by nameless cameras."""
        return cls(("",), (tuple(range(persons)),))
