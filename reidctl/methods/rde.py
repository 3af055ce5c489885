"""`rde`: robust dual embedding (Qin et al. 2024, arXiv:2308.09911; code QinYang79/RDE at b3fd396).

Two embeddings of image and text, a global one and one of selected tokens, are aligned by a triplet loss that reads all
negatives. Before each epoch the losses of all pairs say which of them may be trusted; the others are not learnt from.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reidctl.backbones.base import Backbone, last_real, recording
from reidctl.batch import Batch, Tokens, trimmed
from reidctl.config import Section
from reidctl.errors import UsageError
from reidctl.layers.division import Division, Fit, PairLoss, divide, pair_losses
from reidctl.layers.tse import TokenSelection
from reidctl.methods.base import Method, MethodConfig, Survey, unit
from reidctl.parallel import exchange, place
from reidctl.parts import Parts, join


class DivisionConfig(Section):
    """How clean pairs are told from noisy ones (confident consensus division)."""

    enabled: bool = True
    """Divide before every epoch, at the price of one more forward pass over it; off: all pairs are clean."""
    start: int = Field(default=0, ge=0)
    """Epochs in which all pairs are clean, before the first division. Published: 0, from pretrained towers; those that
    start from nothing have no opinion yet, and a division would leave out half the pairs by chance."""
    fit: Fit = "coarse"
    """How exactly the mixtures are fitted; the authors take `fine` for RSTPReid and above 40 % noise."""
    seed: int = Field(default=0, ge=0)
    """Of the mixtures' start and of the coins for uncertain pairs, together with the epoch."""


class RdeConfig(MethodConfig):
    """Settings of `rde`; the defaults are those of the published code."""

    loss: PairLoss = "tal"
    """Of both embeddings; see `pair_losses`."""
    temperature: float = Field(0.015, gt=0)
    """Of `tal`, and of the positives of `trl`."""
    margin: float = 0.1
    """Of `tal` and `trl`."""
    contrast_temperature: float = Field(0.02, gt=0)
    """Of `infonce` and `sdm`."""
    reduction: Literal["published", "sum", "mean"] = "published"
    """How the losses of the clean pairs become one number. `published` sums `tal` and `trl`, so that they grow with the
    batch, and averages `infonce` and `sdm`."""
    select_ratio: float = Field(0.3, gt=0, le=1)
    """Share of the patches, and of the longest text, that the token selection takes."""
    width: int = Field(1024, ge=2, multiple_of=2)
    """Of the token selection embedding."""
    retrieve: Literal["both", "bge", "tse"] = "both"
    """What is compared in retrieval: the mean of both cosines, or that of one embedding."""
    division: DivisionConfig = DivisionConfig()
    text_augment: float = Field(0.2, ge=0, le=1)
    """Share of the words that are hidden (60 %), replaced (20 %) or left out (20 %) in training."""
    eval_norm: bool = False
    """Quirk of the code before November 2024: training went on in evaluation mode, so that the batch norms of the token
    selection kept their first statistics, 0 and 1. The published numbers under noise come from it (issue 8)."""


class Rde(Method):
    """A global (BGE) and a token selection embedding (TSE), trained on the pairs that both hold for clean."""

    name = "rde"
    summary = "global + selected tokens, triplet alignment, division of noisy pairs (Qin et al. 2024)"
    Config = RdeConfig
    loss_weights: ClassVar = {"bge": 1.0, "tse": 1.0}
    config: RdeConfig

    def __init__(self, config: RdeConfig, backbone: Backbone, persons: int) -> None:
        super().__init__(config, backbone, persons)
        if config.retrieve != "bge" and not self.active("tse"):
            raise UsageError(
                f"`method.retrieve` is {config.retrieve}, but with `method.weights.tse` 0 that embedding never learns.",
                hint="Set method.retrieve=bge too.",
            )
        if self.active("tse"):
            self.tse_image = TokenSelection(backbone.dim, config.width)
            self.tse_text = TokenSelection(backbone.dim, config.width)
        self._labels: Tensor | None = None
        self._report: dict[str, float] = {}

    def train(self, mode: bool = True) -> "Rde":
        """As `nn.Module.train`; `eval_norm` keeps the batch norms in evaluation mode."""
        super().train(mode)
        if self.config.eval_norm and self.active("tse"):
            self.tse_image.norm.eval()
            self.tse_text.norm.eval()
        return self

    # Which pairs are clean

    @property
    def surveys(self) -> bool:
        """It reads the losses of all pairs where it divides them."""
        return self.config.division.enabled

    def begin_epoch(self, epoch: int, survey: Survey) -> None:
        """Divide the pairs of the epoch by the losses of both embeddings (`divide`); before `start` all are clean."""
        settings = self.config.division
        if epoch < settings.start:
            return
        found = divide(survey(self._look), fit=settings.fit, seed=(settings.seed, epoch))
        self._take(found.labels, found)

    def _take(self, labels: Tensor, found: Division | None = None) -> None:
        self._labels = labels.to(next(self.parameters()).device)
        if found is not None:
            self._report = {f"division/{name}": share for name, share in found.shares().items()}

    def _look(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of every pair by each embedding, (B,), among the pairs of all processes, as in training."""
        every = exchange(self.encode(batch, "finetune"))
        before = sum(len(part["person"]) for part in every[: place().rank])
        return {name: value[before : before + len(batch)] for name, value in self._pairs(join(every)).items()}

    def _clean(self, batch: Batch) -> Tensor:
        """The label of every sample, (B,): 1 where nothing was divided."""
        person = batch.require("person")
        if self._labels is None:
            return torch.ones(len(person), device=person.device)
        return self._labels.to(person.device)[batch.require("sample")]

    def training_report(self) -> dict[str, float]:
        """The last division: `division/clean`, `noisy`, `uncertain` and `used`, shares of the epoch's pairs."""
        return self._report

    def training_state(self) -> dict[str, Any]:
        """The labels, which a training that goes on inside an epoch needs."""
        return {} if self._labels is None else {"labels": self._labels.cpu(), "division": dict(self._report)}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore the labels."""
        if "labels" in state:
            self._take(state["labels"])
            self._report = dict(state["division"])

    # Losses

    def prepare(self, batch: Batch) -> Batch:
        """Change some words of the captions."""
        if not self.config.text_augment or "full" not in batch.texts:
            return batch
        changed = change_words(batch.texts["full"], self.backbone, self.config.text_augment)
        return replace(batch, texts={**batch.texts, "full": changed})

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return `image` and `text` (B, D), `image_tse` and `text_tse` (B, width), `person` and `clean` (B,).

        In training the norms of the token selection see the tokens of all processes, and of one pass.
        """
        rows = {"person": batch.require("person"), "clean": self._clean(batch)}
        rows["image"], image = self._images(batch)
        rows["text"], text = self._texts(batch)
        return Parts(rows if image is None or text is None else rows | {"image_tse": image, "text_tse": text})

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return `bge` and `tse`, over the clean pairs; losses of weight 0 are not computed."""
        config, clean = self.config, parts["clean"]
        sums = config.reduction == "sum" or (config.reduction == "published" and config.loss in ("tal", "trl"))
        found = {name: (value * clean).sum() for name, value in self._pairs(parts).items()}
        return found if sums else {name: value / clean.sum().clamp(min=1) for name, value in found.items()}

    def _pairs(self, parts: Parts) -> dict[str, Tensor]:
        config, found = self.config, {}
        temperature = config.temperature if config.loss in ("tal", "trl") else config.contrast_temperature
        for name, end in (("bge", ""), ("tse", "_tse")):
            if self.active(name):
                sides = parts[f"image{end}"], parts[f"text{end}"], parts["person"]
                found[name] = pair_losses(*sides, config.loss, temperature=temperature, margin=config.margin)
        return found

    # The two embeddings

    def _images(self, batch: Batch, *, tse: bool = True) -> tuple[Tensor, Tensor | None]:
        """The global (B, D) and the token selection embedding (B, width) of images, as they are."""
        tse = tse and self.active("tse")
        seen = self.backbone.encode_image(batch.require("image"), attention="last" if tse else False)
        if not tse:
            return seen.cls[:, 0], None
        assert seen.attention is not None
        looks = seen.attention[-1].mean(dim=1)[:, 0, seen.cls.shape[1] :]  # (B, N)
        kept = self.backbone.image.kept
        usable = None if kept is None else kept | ~kept.any(dim=1, keepdim=True)
        return seen.cls[:, 0], self.tse_image(self._watched(seen.patches), looks, self._count_patches, usable)

    def _texts(self, batch: Batch, *, tse: bool = True) -> tuple[Tensor, Tensor | None]:
        """The global (T, D) and the token selection embedding (T, width) of the texts `full`, as they are."""
        words = batch.texts["full"]
        if not (tse and self.active("tse")):
            return self.backbone.encode_text(words).pooled, None
        with recording(self.backbone.text, -1) as kept:
            seen = self.backbone.encode_text(words)
        end = last_real(words.mask)
        rows = torch.arange(len(end), device=end.device)
        read = end if self.backbone.config.pool == "eos" else torch.zeros_like(end)
        looks = kept[-1].mean(dim=1)[rows, read]  # (T, L)
        # A text without any word is read at its special tokens, so that everything can be asked for.
        plain = self._words(words, end)
        usable = torch.where(plain.any(dim=1, keepdim=True), plain, words.mask)
        return seen.pooled, self.tse_text(seen.tokens, looks, self._count_words, usable)

    @staticmethod
    def _words(tokens: Tokens, end: Tensor) -> Tensor:
        """Where a text has words, (T, L): not at its first and last real token."""
        column = torch.arange(tokens.ids.shape[1], device=end.device)
        return tokens.mask & (column > 0) & (column < end[:, None])

    @property
    def _count_patches(self) -> int:
        rows, columns = self.backbone.grid
        return max(1, int(rows * columns * self.config.select_ratio))

    @property
    def _count_words(self) -> int:
        # Of the longest text that the tower takes, whatever is in the batch: published code pads all to it.
        return max(1, int((self.backbone.context_length - 2) * self.config.select_ratio))

    # Retrieval

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit vectors (B, D + width), or those of one embedding (`retrieve`)."""
        return self._vector(*self._images(batch, tse=self.config.retrieve != "bge"))

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit vectors of the texts `full`, as of images."""
        return self._vector(*self._texts(batch, tse=self.config.retrieve != "bge"))

    def _vector(self, bge: Tensor, tse: Tensor | None) -> Tensor:
        """[unit(bge), unit(tse)] / √2, whose products are the means of both cosines."""
        if tse is None or self.config.retrieve == "bge":
            return unit(bge)
        if self.config.retrieve == "tse":
            return unit(tse)
        return torch.cat([unit(bge), unit(tse)], dim=-1) / math.sqrt(2)

    @property
    def reads_out(self) -> tuple[float, float]:
        """The global embedding is read at the class token, the other one at patches."""
        return {"bge": (1.0, 0.0), "tse": (0.0, 1.0), "both": (0.5, 0.5)}[self.config.retrieve]

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return `embedding`, `bge` (B, D) and `tse` (B, width)."""
        bge, tse = self._images(batch)
        found = {"embedding": self._vector(bge, tse), "bge": bge.float()}
        return found if tse is None else found | {"tse": tse}

    def patch_features(self, batch: Batch) -> Tensor:
        """Return every patch as the image vector that it would give alone, shape (B, N, D + width)."""
        patches = self.backbone.encode_image(batch.require("image")).patches
        return self._vector(patches, self.tse_image.each(patches) if self.active("tse") else None)

    def extra_parts(self, batch: Batch) -> dict[str, Any]:
        """Return the two token selections as `tse`, without the towers."""
        if not self.active("tse"):
            return {}
        patches = self.backbone.encode_image(batch.require("image")).patches
        words = self.backbone.encode_text(batch.texts["full"]).tokens

        def run() -> Tensor:
            # Whichever tokens are taken, their cost is the same.
            sides = (self.tse_image, patches, self._count_patches), (self.tse_text, words, self._count_words)
            return torch.cat([head(tokens, tokens[..., 0], count) for head, tokens, count in sides])

        return {"tse": run}


def change_words(tokens: Tokens, backbone: Backbone, rate: float) -> Tokens:
    """Return texts with some words hidden, replaced or left out, on the device that they are on.

    Each word is changed with probability `rate`: with p = 0.6 it becomes the mask token, with p = 0.2 a random word,
    with p = 0.2 it goes, and the text closes up (RDE's data loader). Differs from it: a text that would lose all its
    words keeps their places, where theirs gives NaN; and `!`, whose id is 0 like the padding's, is a word.

    Args:
        tokens: shape (T, L).
        backbone: whose tokenizer names the mask token and the words.
        rate: in [0, 1].
    """
    ids, tokenizer, device = tokens.ids, backbone.tokenizer, tokens.ids.device
    special = (ids == tokenizer.start_id) | (ids == tokenizer.end_id) | (ids == tokenizer.mask_id) | ~tokens.mask
    # As in the published code, one draw decides whether and how.
    draw = torch.rand(ids.shape, device=device).masked_fill(special, 2.0)
    words = torch.randint(tokenizer.word_ids.start, tokenizer.word_ids.stop, ids.shape, device=device)
    changed = torch.where(draw < 0.8 * rate, words, ids)
    changed = torch.where(draw < 0.6 * rate, tokenizer.mask_id, changed)
    gone = (draw >= 0.8 * rate) & (draw < rate)
    gone &= ~(gone | special).all(dim=1, keepdim=True)
    kept = tokens.mask & ~gone
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    mask = kept.gather(1, order)
    return trimmed(Tokens(changed.gather(1, order).masked_fill(~mask, tokenizer.pad_id), mask))


METHOD = Rde
