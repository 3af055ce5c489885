"""`interpart`: InterPartAbility, part phrases bound to image patches (seed 003; no public code, paper not obtainable).

A standard dual encoder (SDM + ID, or TAL) gets a patch-phrase module that scores each phrase of a caption against the
patches, a contrast of whole phrase sets, and a constraint on the attention of the Vision Transformer. Retrieval can do
without the module (`score: global`), or re-rank the first images by it (`global+part`).

Everything beyond the seed's sentences is our reading; docs/methods.md lists it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from reidctl import losses, part_losses
from reidctl.backbones.attention import Alike, Local, distance_bias
from reidctl.backbones.base import Backbone, ImageFeatures, TextFeatures
from reidctl.batch import Batch, PhraseSets
from reidctl.config import Section
from reidctl.errors import UsageError
from reidctl.layers.matching import Encoded
from reidctl.layers.ppim import Ppim, PpimConfig, PpimOutput, one_of_each, set_mean
from reidctl.methods.base import Method, MethodConfig, unit
from reidctl.parts import Parts

_BIASED = 3
_STEEP = 20.0
"""Scores of pairs are multiplied by it, so that what rounds and clips log-odds neither ties nor cuts cosines."""


class PartConfig(PpimConfig):
    """The patch-phrase module and its contrast."""

    contrast: Literal["set", "phrase_masked"] = "set"
    """`set` compares whole phrase sets; `phrase_masked` single phrases, without negatives that may be true."""
    contrast_temperature: Annotated[float, Field(gt=0)] = 0.05
    similar: Annotated[float, Field(ge=-1, le=1)] = 0.9
    """`phrase_masked`: phrases with a higher cosine are taken to mean the same."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> "PartConfig":
        if self.kind == "slots" and self.contrast == "phrase_masked":
            raise ValueError("slots score whole captions, not single phrases: use contrast set")
        return self


class TalConfig(Section):
    """RDE's triplet alignment loss; see `losses.tal`."""

    temperature: Annotated[float, Field(gt=0)] = 0.015
    margin: float = 0.1


class BiasConfig(Section):
    """`attn_constraint: bias`: patches look at near patches."""

    sigma: Annotated[float, Field(gt=0)] = 0.25
    """Standard deviation of the Gaussian in picture heights."""
    blocks: Annotated[int, Field(ge=1)] = _BIASED
    """In how many of the last blocks; three are all of a tower with fewer."""


class InterpartConfig(MethodConfig):
    """Settings of `interpart`."""

    base_loss: Literal["sdm", "tal"] = "sdm"
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Of SDM."""
    tal: TalConfig = TalConfig()
    ppim: PartConfig = PartConfig()
    phrase_encode: Literal["separate", "span"] = "separate"
    """Each phrase through the text encoder alone, or the average of the caption's token features over the phrase, into
    which attention can mix the rest of the caption."""
    phrase_template: str = "a person with {}"
    attn_constraint: Literal["loss", "bias", "selfself", "none"] = "loss"
    """`loss`: compactness, alignment and diversity terms; `bias`: a Gaussian distance bias between patches of the last
    blocks; `selfself`: patches of the last block compare keys with keys (or values with values)."""
    compact_floor: Annotated[float, Field(ge=0)] = 0.01
    align_stop: bool = True
    """The alignment term moves the attention towards the phrase maps; False lets it move the maps as well."""
    bias: BiasConfig = BiasConfig()
    alike: Alike = "key"
    """What `selfself` compares."""
    beta: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the mean phrase score in `global+part`; 0 re-ranks by the global cosine alone."""
    ground_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ground_margin: float = 0.05
    """Of the optional loss `ground` (weight 0): which share of the patches is removed, and by how much it must hurt."""

    @field_validator("phrase_template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("needs {} where the phrase stands, once")
        return value


class Interpart(Method):
    """SDM + ID (or TAL) with phrase-patch grounding."""

    name = "interpart"
    summary = "part phrases bound to patches, tested explanations (InterPartAbility, no public code)"
    Config = InterpartConfig
    reads_phrases: ClassVar = True
    loss_weights: ClassVar = {
        "sdm": 1.0,
        "tal": 1.0,
        "id": 1.0,
        "ppim": 1.0,
        "compact": 0.1,
        "align": 0.1,
        "diverse": 0.05,
        "ground": 0.0,
    }
    config: InterpartConfig

    def __init__(self, config: InterpartConfig, backbone: Backbone, persons: int) -> None:
        super().__init__(config, backbone, persons)
        self.reads_phrase_places = config.phrase_encode == "span"
        self.classifier = nn.Linear(backbone.dim, persons)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.ppim = Ppim(config.ppim, backbone.dim)
        self._said: dict[str, Tensor] = {}
        if config.attn_constraint == "bias":
            count = len(backbone.image.blocks)
            if config.bias.blocks > max(count, _BIASED):
                raise UsageError(
                    f"`method.bias.blocks` is {config.bias.blocks}; the image encoder has {count} blocks.",
                    hint=f"Give a number from 1 to {count}.",
                )
            self.register_buffer("distance", distance_bias(backbone.grid, config.bias.sigma), persistent=False)

    def active(self, loss: str) -> bool:
        """Whether the settings ask for a loss."""
        config = self.config
        if loss in ("sdm", "tal") and loss != config.base_loss:
            return False
        if loss in ("compact", "align", "diverse") and config.attn_constraint != "loss":
            return False
        return super().active(loss)

    @property
    def _local(self) -> Local | None:
        """How patches look at each other."""
        config = self.config
        if config.attn_constraint == "bias":
            return Local(bias=self.get_buffer("distance"), blocks=config.bias.blocks)
        return Local(alike=config.alike) if config.attn_constraint == "selfself" else None

    def see(self, images: Tensor, keep: Tensor | None = None, *, attention: bool = False) -> ImageFeatures:
        """Return the features of images (B, 3, H, W), with the last block's attention if asked for."""
        return self.backbone.encode_image(
            images, keep=keep, attention="last" if attention else False, local=self._local
        )

    # Phrases

    def phrase_sentence(self, phrase: str) -> str:
        """Return the phrase in its template."""
        return self.config.phrase_template.replace("{}", phrase)

    def encode_phrases(self, sets: PhraseSets, words: TextFeatures | None = None) -> tuple[Tensor, Tensor]:
        """Return embeddings of phrases (P, D) and which of them each text has, (T, K), -1 for none.

        Args:
            sets: the phrases.
            words: the features of the texts that they stand in, which `phrase_encode: span` reads; a phrase whose
                place is not known is encoded alone.
        """
        alone, present = self._alone(sets), sets.located().present
        assert present is not None
        if self.config.phrase_encode == "separate" or words is None or not len(present):
            return alone, sets.index
        every = alone[sets.index.clamp_min(0)]  # (T, K, D)
        place = torch.arange(words.tokens.shape[1], device=words.tokens.device)
        inside = (place >= sets.span[..., :1]) & (place < sets.span[..., 1:])  # (T, K, L)
        known = inside.any(dim=-1, keepdim=True)
        weight = inside.to(words.tokens.dtype) / inside.sum(dim=-1, keepdim=True).clamp_min(1)
        found = torch.where(known, torch.einsum("tkl,tld->tkd", weight, words.tokens), every)
        number = sets.mask.flatten().cumsum(0).view_as(sets.index) - 1
        return found.flatten(0, 1)[present], number.masked_fill(~sets.mask, -1)

    def _alone(self, sets: PhraseSets) -> Tensor:
        if not len(sets.tokens):
            return torch.zeros(1, self.backbone.dim, device=sets.index.device)
        return self.backbone.encode_text(sets.tokens).pooled

    def interact(self, batch: Batch, image: ImageFeatures, words: TextFeatures | None = None) -> PpimOutput:
        """Return what the phrases of each text see in its image."""
        sets = _phrases(batch)
        phrases, index = self.encode_phrases(sets, words)
        found: PpimOutput = self.ppim(phrases[index.clamp_min(0)], sets.mask, image.patches)
        return found

    def phrase_maps(self, batch: Batch) -> Tensor:
        """Return a_k, where each phrase is seen, distributions (B, K, N)."""
        words = self.backbone.encode_text(batch.texts["full"]) if self.reads_phrase_places else None
        return self.interact(batch, self.see(batch.require("image")), words).maps

    def activation(self, batch: Batch) -> Tensor:
        """Return how much each patch speaks for its image's feature, (B, h, w); see `Method.activation`."""
        seen = self.see(batch.require("image"))
        return self._towards(seen.patches, seen.cls[:, 0])

    def patch_features(self, batch: Batch) -> Tensor:
        """Return every patch as a unit vector of the joint space, shape (B, N, D)."""
        return unit(self.see(batch.require("image")).patches)

    # Losses

    @property
    def _wanted(self) -> list[str]:
        """The losses about phrases that the settings ask for."""
        return [name for name in ("ppim", "compact", "align", "diverse", "ground") if self.active(name)]

    def prepare(self, batch: Batch) -> Batch:
        """Note where phrases stand, and which are the same in every table, as far as a loss asks for it."""
        if batch.phrases is None or not self._wanted:
            return batch
        sets = batch.phrases.located()
        return replace(batch, phrases=sets.labelled() if self.config.ppim.contrast == "phrase_masked" else sets)

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return the global features `image` and `text` (B, D), `person` (B,), and what the active losses read.

        `ppim`: `patches` (B, N, D), `phrases` (P, D), of which a caption has `index` (B, K), and `words` (P,), equal
        for equal phrases. `spread` of each phrase's map (M,), `overlap` of each pair of phrases (Q,), `align` and
        `ground` of each image whose caption has a phrase (U,), and `cls_spread` (B,) for the report.
        """
        image = self.see(batch.require("image"), attention=self.active("align"))
        words = self.backbone.encode_text(batch.texts["full"])
        rows = {"image": image.cls[:, 0], "text": words.pooled, "person": batch.require("person")}
        return Parts(rows | self._parts(batch, image, words), {"index": "phrases"})

    def _parts(self, batch: Batch, image: ImageFeatures, words: TextFeatures) -> dict[str, Tensor]:
        if not (wanted := self._wanted):
            return {}
        sets = _phrases(batch).located()
        phrases, index = self.encode_phrases(sets, words)
        found: dict[str, Tensor] = {}
        if "ppim" in wanted:
            found |= {"patches": image.patches, "phrases": phrases, "index": index}
            if self.config.ppim.contrast == "phrase_masked":
                found["words"] = sets.labels_of(index, len(phrases))
        if wanted == ["ppim"]:
            return found
        own: PpimOutput = self.ppim(phrases[index.clamp_min(0)], sets.mask, image.patches)
        found |= self._constraint(own.maps, sets, image)
        if "ground" in wanted:
            found["ground"] = self._ground(batch, own.maps, phrases, index)[sets.speaking]
        return found

    def _constraint(self, maps: Tensor, sets: PhraseSets, image: ImageFeatures) -> dict[str, Tensor]:
        """What the terms on the attention average, one by one."""
        present, speaking, apart, grid = sets.present, sets.speaking, sets.apart, self.backbone.grid
        assert present is not None and speaking is not None and apart is not None
        shown = maps if self.active("compact") else maps.detach()
        found = {"spread": part_losses.spread(shown.flatten(0, 1)[present], grid)}
        if self.active("align"):
            assert image.attention is not None
            looks = to_patches(image.attention[-1])
            found["cls_spread"] = part_losses.spread(looks.detach(), grid)
            target = maps.detach() if self.config.align_stop else maps
            found["align"] = part_losses.alignment(target[speaking], sets.mask[speaking], looks[speaking])
        if self.active("diverse"):
            found["overlap"] = part_losses.overlap(maps, apart)
        return found

    def _ground(self, batch: Batch, maps: Tensor, phrases: Tensor, index: Tensor) -> Tensor:
        """Remove the patches of one phrase of each caption, and as many others: the first must hurt more, (B,)."""
        rows, chosen = torch.arange(len(maps), device=maps.device), one_of_each(index >= 0)
        count = max(1, round(self.config.ground_share * maps.shape[-1]))
        named = maps[rows, chosen].detach()
        asked = unit(phrases[index[rows, chosen].clamp_min(0)])
        without = []
        for order in (named, torch.rand_like(named)):
            keep = torch.ones_like(named, dtype=torch.bool).scatter(1, order.topk(count, dim=1).indices, False)
            without.append((unit(self.see(batch.require("image"), keep).cls[:, 0]) * asked).sum(dim=1))
        return part_losses.grounding(*without, margin=self.config.ground_margin)

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return the active ones of `sdm` or `tal`, `id`, `ppim`, `compact`, `align`, `diverse` and `ground`."""
        config, person, v, t = self.config, parts["person"], parts["image"], parts["text"]
        found: dict[str, Tensor] = {}
        if self.active("sdm"):
            found["sdm"] = losses.sdm(v, t, person, temperature=config.temperature)
        if self.active("tal"):
            found["tal"] = losses.tal(v, t, person, temperature=config.tal.temperature, margin=config.tal.margin)
        if self.active("id"):
            found["id"] = losses.id_loss(self.classifier(v), self.classifier(t), person)
        if self.active("ppim"):
            found["ppim"] = self._contrast(parts)
        return found | self._averages(parts)

    def _contrast(self, parts: Parts) -> Tensor:
        settings, phrases, index = self.config.ppim, parts["phrases"], parts["index"]
        if settings.contrast == "set":
            scores = self.ppim.set_scores(phrases, index, parts["patches"])
            return part_losses.set_contrast(scores, parts["person"], temperature=settings.contrast_temperature)
        if self.config.phrase_encode == "separate":
            index = part_losses.firsts(index, parts["words"])
        return part_losses.phrase_contrast(
            self.ppim.phrase_scores(phrases, parts["patches"]),
            index,
            parts["person"],
            phrases,
            words=parts["words"],
            temperature=settings.contrast_temperature,
            similar=settings.similar,
        )

    def _averages(self, parts: Parts) -> dict[str, Tensor]:
        """The losses that are means over phrases or images, and what the report says of them."""
        config, reported = self.config, {"ppim/spread": "spread", "cls/spread": "cls_spread"}
        # Tensors: a number would be asked of the device in every step, and is told only in some.
        self._said = {name: part_losses.average(parts[row]).detach() for name, row in reported.items() if row in parts}
        found: dict[str, Tensor] = {}
        if self.active("compact"):
            excess = part_losses.compactness(parts["spread"], floor=config.compact_floor)
            found["compact"] = part_losses.average(excess)
        for name, row in (("align", "align"), ("diverse", "overlap"), ("ground", "ground")):
            if self.active(name):
                found[name] = part_losses.average(parts[row])
        return found

    def training_report(self) -> dict[str, float]:
        """`ppim/spread` and `cls/spread`: spatial variance of phrase maps and of the class token's attention."""
        return {name: float(value) for name, value in self._said.items()}

    # Retrieval

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit class-token features, shape (B, D)."""
        return unit(self.see(batch.require("image")).cls[:, 0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit text features, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)

    @property
    def scores_pairs(self) -> bool:
        """Part-wise matching needs a trained module."""
        return self.active("ppim")

    def encode_pair_images(self, batch: Batch) -> Encoded:
        """Return image vectors and patches; reads no text."""
        self.require_pairs()
        image = self.see(batch.require("image"))
        return Encoded(unit(image.cls[:, 0]), image.patches.float())

    def encode_pair_texts(self, batch: Batch) -> Encoded:
        """Return text vectors and the embeddings of their phrases."""
        self.require_pairs()
        words, sets = self.backbone.encode_text(batch.texts["full"]), _phrases(batch)
        phrases, index = self.encode_phrases(sets, words)
        return Encoded(unit(words.pooled), phrases[index.clamp_min(0)].float(), sets.mask)

    def pair_scores(self, image: Encoded, text: Encoded) -> Tensor:
        """Return 20 (cos(v, t) + beta mean_k s_k), shape (P,): `global+part`, on the scale of log-odds."""
        self.require_pairs()
        assert image.tokens is not None and text.tokens is not None and text.mask is not None
        cosine = (image.pooled * text.pooled).sum(dim=1)
        seen: PpimOutput = self.ppim(text.tokens, text.mask, image.tokens)
        return _STEEP * (cosine + self.config.beta * set_mean(seen.scores, text.mask))

    # What it costs

    def extra_parts(self, batch: Batch) -> dict[str, Callable[[], Tensor]]:
        """The patch-phrase module alone, eight phrases for each image."""
        count = len(batch)
        device = batch.require("image").device
        phrases = functional.normalize(torch.randn(count, 8, self.backbone.dim, device=device), dim=-1)
        patches = torch.randn(count, self.backbone.grid[0] * self.backbone.grid[1], self.backbone.dim, device=device)
        mask = torch.ones(count, 8, dtype=torch.bool, device=device)
        return {"ppim": lambda: self.ppim(phrases, mask, patches).scores}


def to_patches(attention: Tensor) -> Tensor:
    """Return the attention of the first class token to the patches, mean of heads, rows that sum to 1, (B, N).

    Args:
        attention: of one block, shape (B, heads, 1 + N, 1 + N).
    """
    looks = attention[:, :, 0, 1:].float().mean(dim=1)
    return looks / looks.sum(dim=1, keepdim=True).clamp_min(1e-8)


def _phrases(batch: Batch) -> PhraseSets:
    if batch.phrases is None:
        raise ValueError("this batch carries no phrases")
    return batch.phrases


METHOD = Interpart
