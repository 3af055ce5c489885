"""What a method sees: every tensor of a batch, with its shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
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
        label: equal numbers mean equal tokens, also in another table, shape (P,), int64; see `labelled`.
        present: where `index` laid flat has a phrase, shape (M,), int64; see `located`, as for the next two.
        speaking: the texts that have a phrase, shape (U,), int64.
        apart: where (T, K, K) laid flat has two phrases of a text about different parts, shape (Q,), int64.
    """

    tokens: Tokens
    index: Tensor
    part: Tensor
    span: Tensor
    label: Tensor | None = None
    present: Tensor | None = None
    speaking: Tensor | None = None
    apart: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True where there is a phrase, shape (T, K)."""
        return self.index >= 0

    def __len__(self) -> int:
        return self.index.shape[0]

    def pin(self) -> "PhraseSets":
        """Return the same phrases in page-locked memory."""
        return self._mapped(self.tokens.pin(), lambda value: value.pin_memory())

    def to(self, device: torch.device | str) -> "PhraseSets":
        """Return the same phrases on another device."""
        return self._mapped(self.tokens.to(device), lambda value: value.to(device, non_blocking=True))

    def _mapped(self, tokens: Tokens, change: Callable[[Tensor], Tensor]) -> "PhraseSets":
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "tokens"}
        changed = {name: None if value is None else change(value) for name, value in named.items()}
        return PhraseSets(tokens, **changed)  # type: ignore[arg-type]

    def take(self, texts: Tensor) -> "PhraseSets":
        """Return the phrases of some texts, by number, on the CPU; the table keeps those that they have."""
        index = self.index[texts]
        used = torch.unique(index[index >= 0])
        number = torch.full((len(self.tokens) + 1,), -1).index_copy(0, used, torch.arange(len(used)))
        label = None if self.label is None else self.label[used]
        # -1 reads the last number, which is no phrase's.
        taken = PhraseSets(trimmed(self.tokens[used]), number[index], self.part[texts], self.span[texts], label)
        return taken if self.present is None else taken.located()

    def located(self) -> "PhraseSets":
        """Return the phrases with `present`, `speaking` and `apart`, so that nobody asks a device for them."""
        if self.present is not None:
            return self
        mask = self.mask
        apart = mask[:, :, None] & mask[:, None, :] & (self.part[:, :, None] != self.part[:, None, :])
        present, speaking, apart = (each.flatten().nonzero().flatten() for each in (mask, mask.any(dim=1), apart))
        return replace(self, present=present, speaking=speaking, apart=apart)

    def labelled(self) -> "PhraseSets":
        """Return the phrases with `label`, 63 bits of the BLAKE2 digest of each phrase's token ids without padding."""
        if self.label is not None:
            return self
        ids, mask = self.tokens.ids.cpu().numpy().astype("<i8"), self.tokens.mask.cpu().numpy()
        texts = [row[real].tobytes() for row, real in zip(ids, mask, strict=True)]
        found = [int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1 for text in texts]
        return replace(self, label=torch.tensor(found, dtype=torch.int64, device=self.index.device))

    def labels_of(self, index: Tensor, count: int) -> Tensor:
        """Return the labels of embeddings, shape (count,), -1 for one that no text has.

        Args:
            index: which of the embeddings stands for each phrase, laid out as `self.index`, shape (T, K).
            count: how many embeddings there are.
        """
        known = self.located().labelled()
        assert known.present is not None and known.label is not None
        found = torch.full((count,), -1, device=index.device)
        found[index.flatten()[known.present]] = known.label[self.index.flatten()[known.present]]
        return found


def trimmed(tokens: Tokens) -> Tokens:
    """Return tokens (B, L) without the columns that are padding in every text."""
    length = max(int(tokens.mask.sum(dim=1).max()), 1) if len(tokens) else 1
    return Tokens(tokens.ids[:, :length], tokens.mask[:, :length])


@dataclass(frozen=True)
class Finish:
    """What is left to do with images that come as bytes: a quarter of the copy to a GPU, which does the rest.

    Every number of the finished image is read from a table, so that no device rounds it in its own way. Byte v of
    channel c is entry 256 c + v. Pixel (y, x) of an erased rectangle is entry
    first + c plane + (y - top) row + (x - left) column instead: a colour (steps 1, 0, 0), or noise of its own.

    Attributes:
        table: the numbers, shape (768 + F,), float32.
        box: the rectangle of each image, (top, left, bottom, right), shape (B, 4), int32; without area for none.
        walk: first, plane, row and column of each image, shape (B, 4), int32.
    """

    table: Tensor
    box: Tensor
    walk: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, H, W, 3) bytes as normalised numbers with the rectangles erased, (B, 3, H, W), float32."""
        batch, height, width, channels = pixels.shape
        y = torch.arange(height, device=pixels.device, dtype=torch.int32).view(1, -1, 1)
        x = torch.arange(width, device=pixels.device, dtype=torch.int32).view(1, 1, -1)
        top, left, bottom, right = (edge.view(-1, 1, 1) for edge in self.box.unbind(1))
        first, plane, row, column = (step.view(-1, 1, 1) for step in self.walk.unbind(1))
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, H, W)
        place = first + (y - top) * row + (x - left) * column
        image = self.table.new_empty(batch, channels, height, width)
        # One channel at a time: the entries' numbers take as much memory as the image.
        for channel in range(channels):
            entry = torch.where(inside, place + channel * plane, pixels[..., channel].int() + 256 * channel)
            image[:, channel] = self.table.index_select(0, entry.flatten()).view_as(entry)
        return image

    def pin(self) -> "Finish":
        """Return the same in page-locked memory."""
        return Finish(self.table.pin_memory(), self.box.pin_memory(), self.walk.pin_memory())

    def to(self, device: torch.device | str) -> "Finish":
        """Return the same on another device."""
        return Finish(*(value.to(device, non_blocking=True) for value in (self.table, self.box, self.walk)))

    def take(self, samples: Tensor) -> "Finish":
        """Return what is left to do with some images, by number; the table stays whole."""
        return Finish(self.table, self.box[samples], self.walk[samples])


@dataclass(frozen=True)
class Batch:
    """Images and texts of B samples, T of which have a text; what no sample has is None for the whole batch.

    Texts have T rows: a sample without a caption carries no text tensor. `pairs` returns the part where images and
    texts are aligned.

    Attributes:
        image: pixels normalised with the backbone's statistics, shape (B, 3, H, W); where there is a `finish`, bytes
            still, shape (B, H, W, 3).
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
        masked: the texts `full` with words hidden, for methods that guess them.
        asked: which words are hidden, (text, place), shape (M, 2), int64.
        answer: their ids, shape (M,), int64.
        text_row: the sample of each text, shape (T,), int64; None: as `has_text` says.
        fused_row: the samples with a `fusion` text, shape (F,), int64; None: as `has_fusion` says.
        sample: numbers of the samples in the training set, shape (B,), int64.
        finish: what is left to do with the images; methods never see it, because `finished` comes before them.
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
    masked: Tokens | None = None
    asked: Tensor | None = None
    answer: Tensor | None = None
    text_row: Tensor | None = None
    fused_row: Tensor | None = None
    sample: Tensor | None = None
    finish: Finish | None = None

    def __len__(self) -> int:
        if self.image is not None:
            return self.image.shape[0]
        if "image" in self.frozen:
            return self.frozen["image"].shape[0]
        return len(next(iter(self.texts.values()))) if self.texts else 0

    def pin(self) -> "Batch":
        """Return the same batch in page-locked memory, from which a GPU copies while it computes."""
        return self._mapped(lambda value: value.pin_memory(), lambda value: value.pin())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        return self._mapped(lambda value: value.to(device, non_blocking=True), lambda value: value.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor], inner: Callable[[Any], Any]) -> "Batch":
        """Every tensor changed, and everything that holds tensors by `inner`."""
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = change(value)
            elif isinstance(value, (Tokens, PhraseSets, Finish)):
                changed[item.name] = inner(value)
        texts = {name: inner(tokens) for name, tokens in self.texts.items()}
        frozen = {name: change(value) for name, value in self.frozen.items()}
        return replace(self, texts=texts, frozen=frozen, **changed)

    def with_image(self, image: Tensor) -> "Batch":
        """Return the same batch with other pixels."""
        return replace(self, image=image)

    def finished(self) -> "Batch":
        """Return the batch with its images as normalised numbers, computed where the bytes lie; no device is asked."""
        if self.finish is None:
            return self
        return replace(self, image=self.finish(self.require("image")), finish=None)

    def image_of_text(self) -> Tensor:
        """Return which sample each text belongs to, shape (T,), int64."""
        if self.has_text is None:
            person = self.require("person")
            return torch.arange(len(person), device=person.device)
        if self.text_row is not None:
            return self.text_row
        return self.has_text.nonzero().flatten()

    def take(self, samples: Sequence[int]) -> "Batch":
        """Return some samples with their texts, on the CPU; texts are trimmed to the longest that is left.

        Of the table of phrases a part keeps what its texts have.
        """
        rows = torch.as_tensor(samples, dtype=torch.long)
        texts = self._texts_of(rows)
        kept: dict[str, Any] = {}
        for name in ("image", "person", "clothing_group", "has_fusion", "has_text", "domain", "camera", "sample"):
            value = getattr(self, name)
            kept[name] = None if value is None else value[rows if len(value) == len(self) else texts]
        frozen = {n: value[texts if n.startswith("text") else rows] for n, value in self.frozen.items()}
        return replace(
            self,
            **kept,
            **self._asked_of(texts),
            text_row=None,
            fused_row=None,
            texts={name: trimmed(tokens[texts]) for name, tokens in self.texts.items()},
            frozen=frozen,
            image_id=tuple(self.image_id[row] for row in samples) if self.image_id else (),
            text_id=tuple(self.text_id[row] for row in samples) if self.text_id else (),
            phrases=None if self.phrases is None else self.phrases.take(texts),
            finish=None if self.finish is None else self.finish.take(rows),
        ).located()

    def _texts_of(self, rows: Tensor) -> Tensor:
        """The texts of some samples, by number."""
        if self.has_text is None:
            return rows
        number = self.has_text.cumsum(0) - 1
        return number[rows][self.has_text[rows]]

    def _asked_of(self, texts: Tensor) -> dict[str, Any]:
        """The hidden words of some texts."""
        if self.masked is None or self.asked is None or self.answer is None:
            return {}
        place = torch.full((len(self.masked),), -1)
        place[texts] = torch.arange(len(texts))
        row = place[self.asked[:, 0]]
        # By text as they are numbered now, so that nothing depends on the order in the whole batch.
        kept = (row >= 0).nonzero().flatten()
        kept = kept[torch.argsort(row[kept], stable=True)]
        asked = torch.stack([row[kept], self.asked[kept, 1]], dim=1)
        return {"masked": trimmed(self.masked[texts]), "asked": asked, "answer": self.answer[kept]}

    def fused_samples(self) -> Tensor:
        """Return the samples whose `fusion` text may be read, shape (F,), int64."""
        return self.require("has_fusion").nonzero().flatten() if self.fused_row is None else self.fused_row

    def located(self) -> "Batch":
        """Return the batch with `text_row` and `fused_row`, so that nobody asks a device which samples have a text."""
        text = None if self.has_text is None else self.has_text.nonzero().flatten()
        fused = None if self.has_fusion is None else self.has_fusion.nonzero().flatten()
        return replace(self, text_row=text, fused_row=fused)

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
        rows = self.image_of_text()
        # Names are kept where they can be picked without asking a device for numbers.
        named = rows.tolist() if rows.device.type == "cpu" else []
        kept = {
            name: getattr(self, name)
            for name in ("image", "person", "clothing_group", "has_fusion", "domain", "camera", "sample")
        }
        parts: dict[str, Any] = {name: value if value is None else value[rows] for name, value in kept.items()}
        whole = {name: value if name.startswith("text") else value[rows] for name, value in self.frozen.items()}
        return replace(
            self,
            **parts,
            frozen=whole,
            image_id=tuple(self.image_id[row] for row in named) if self.image_id else (),
            text_id=tuple(self.text_id[row] for row in named) if self.text_id else (),
            has_text=None,
            text_row=None,
            fused_row=None,
            finish=None if self.finish is None else self.finish.take(rows),
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
