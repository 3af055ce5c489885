"""`clip-reid`: prompts for every person, then image-to-image retrieval (Li et al. 2023, arXiv:2211.13977).

Stage 1 (`prompt-stage`, both encoders frozen) learns four tokens per person by contrast of the person's images with the
sentence that holds them. Stage 2 (`finetune`) trains the image encoder: identity and triplet losses on several of its
features, and classification among the sentences of all people, which are fixed. Settings are those of the published
code (Syliz517/CLIP-ReID at eb1898b, configs/person/vit_clipreid.yml) without what breaks there: the empty last batch
when the images divide by 64, batches that must hold exactly K images of everybody, devices written into the code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from reidctl import losses, prompt_losses
from reidctl.backbones.base import Backbone
from reidctl.batch import Batch, Roster
from reidctl.config import Section
from reidctl.errors import UsageError
from reidctl.layers.bnneck import BNNeck
from reidctl.layers.groups import GroupedBatch, grouped, split_parts
from reidctl.layers.prompts import Prompt, PromptTemplate
from reidctl.layers.settings import RawTripletConfig
from reidctl.methods.base import Method, MethodConfig, Role, Task, unit
from reidctl.parts import Parts


class SieConfig(Section):
    """Side information embedding: a learnt vector per camera on the class token (TransReID; off as published)."""

    camera: bool = False
    coefficient: float = 1.0
    """1.0 in the published runs with it, 3.0 in the code's defaults."""


class ScoreConfig(Section):
    """How an image and a prompt are compared, as the losses take it; the defaults are the published code's."""

    normalize: bool = False
    """Cosine instead of the dot product; with encoders trained from nothing use it with a temperature of 0.07."""
    temperature: float = Field(default=1.0, gt=0)


class ClipReidConfig(MethodConfig):
    """Settings of `clip-reid`; the defaults are those of the published code."""

    template: str = "A photo of a {id} person."
    n_id_tokens: int = Field(default=4, ge=1)
    con: ScoreConfig = ScoreConfig()
    """Of the contrast of stage 1."""
    i2t: ScoreConfig = ScoreConfig()
    """Of the classification among prompts in stage 2."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Of the identity and image-to-text losses."""
    triplet: RawTripletConfig = RawTripletConfig()
    sie: SieConfig = SieConfig()
    i2i_feature: Literal["concat", "proj", "bn"] = "concat"
    """What is compared image to image: class token before and after the projection, joined; the projected one alone; or
    both after the norms of their identity heads (NECK_FEAT "after")."""

    @property
    def needs_prompt_stage(self) -> bool:
        """Without the image-to-text loss nothing of stage 1 is read."""
        return self.weights.get("i2t", 1.0) != 0

    @property
    def spares_prompt_stage(self) -> str:
        """Without the loss that reads prompts."""
        return "method.weights.i2t=0"

    def prompt_settings(self) -> dict[str, Any]:
        """Everything that stage 1 reads of the settings."""
        whole = self.model_dump(mode="json")
        weights = {"con": self.weights.get("con", 1.0)}
        return {"weights": weights, **{name: whole[name] for name in ("template", "n_id_tokens", "con")}}


@dataclass(frozen=True)
class Seen:
    """What stage 2 reads of images.

    Attributes:
        previous: class token that enters the last block, (B, width of the tower).
        hidden: class token after the last norm, (B, width of the tower).
        proj: in the joint space, (B, D).
    """

    previous: Tensor
    hidden: Tensor
    proj: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Seen":
        return Seen(self.previous[rows], self.hidden[rows], self.proj[rows])


class ClipReid(Method):
    """Two-stage image-to-image retrieval with learnt sentences as classifiers.

    People are told apart within groups: here all people are one group; `mta-clip` has one per dataset.
    """

    name = "clip-reid"
    summary = "a prompt per person, then ID + triplet + image-to-text; image to image (Li et al. 2023)"
    Config: ClassVar[type[MethodConfig]] = ClipReidConfig
    stages: ClassVar = ("prompt-stage", "finetune")
    learns_without_text: ClassVar = True
    reads_roster: ClassVar = True
    loss_weights: ClassVar[Mapping[str, float]] = {"con": 1.0, "id": 0.25, "triplet": 1.0, "i2t": 1.0}
    first_stage: ClassVar[tuple[str, ...]] = ("con",)
    """The losses of stage 1; the others are stage 2's."""
    config: ClipReidConfig
    local: Tensor
    """Number of each person within each group, (groups, N), -1 where it is not in the group."""

    def __init__(self, config: ClipReidConfig, backbone: Backbone, persons: int, roster: Roster) -> None:
        super().__init__(config, backbone, persons)
        self.roster = roster
        self.stage = "finetune"
        self._texts: list[Tensor] = []
        groups = self._groups()
        local = torch.full((len(groups), persons), -1)
        for number, members in enumerate(groups):
            local[number, list(members)] = torch.arange(len(members))
        self.register_buffer("local", local, persistent=False)
        hidden = self._hidden_width()
        self.necks = nn.ModuleList(
            nn.ModuleDict({"hidden": BNNeck(hidden, len(members)), "proj": BNNeck(backbone.dim, len(members))})
            for members in groups
        )
        if config.sie.camera:
            if not roster.cameras:
                raise UsageError(
                    "`method.sie.camera` embeds cameras, but no training image names its camera.",
                    hint="Use a dataset with camera ids, or set method.sie.camera=false.",
                )
            self.camera_vectors = nn.Parameter(torch.empty(len(roster.cameras), backbone.width_image))
            nn.init.trunc_normal_(self.camera_vectors, std=0.02)
        self._build_prompts(config, backbone, persons)

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        """The people of each group, by number."""
        return (tuple(range(self.persons)),)

    def _hidden_width(self) -> int:
        """Width of `Seen.hidden`."""
        return self.backbone.width_image

    def _build_prompts(self, config: ClipReidConfig, backbone: Backbone, persons: int) -> None:
        self.id_tokens = nn.Parameter(0.02 * torch.randn(persons, config.n_id_tokens, backbone.width_text))
        self.sentence = PromptTemplate(
            config.template,
            {"id": config.n_id_tokens},
            lambda words: backbone.tokenize(words),
            context=backbone.context_length,
        )
        if "id" not in self.sentence.slots:
            raise UsageError("`method.template` has no slot `{id}`.", hint=f"It says: {config.template!r}.")

    @property
    def train_texts(self) -> tuple[str, ...]:
        """None: it learns from images and who is on them."""
        return ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The projected class token for texts, which no loss trains for captions, and `i2i_feature` for images."""
        return ("t2i", "i2i")

    @property
    def selects_by(self) -> Task:
        """The epoch is chosen on image-to-image retrieval."""
        return "i2i"

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that have a vector."""
        return self.roster.cameras if self.config.sie.camera else ()

    def current_weights(self, stage: str = "finetune") -> dict[str, float]:
        """The weight of each loss of a stage."""
        return {
            name: self.weight(name)
            for name in self.loss_weights
            if self.active(name) and (name in self.first_stage) == (stage == "prompt-stage")
        }

    # Prompts

    def prompt(self, tokens: Tensor, group: int) -> Prompt:
        """Return the sentences of people with these tokens (B, M, W) in a group."""
        filled: Prompt = self.sentence(self.backbone.embed_tokens, {"id": tokens}, len(tokens))
        return filled

    def prompt_features(self, person: Tensor, group: int = 0, *, block: int = 1024) -> Tensor:
        """Return the text features of people (B,) in a group, (B, D), in blocks of people."""
        found = []
        for rows in torch.split(person, block):
            # An embedding lookup: only the rows of these people get a gradient.
            flat = nn.functional.embedding(rows, self.id_tokens.flatten(1))
            prompt = self.prompt(flat.view(len(rows), *self.id_tokens.shape[1:]), group)
            found.append(self.backbone.encode_embedded(prompt.embeddings, prompt.mask).pooled)
        return torch.cat(found)

    def group_texts(self, group: int) -> Tensor:
        """Return the fixed text features of a group's people, (people, D), in the order of `local`."""
        if self._texts:
            return self._texts[group]
        members = (self.local[group] >= 0).nonzero().flatten()
        with torch.no_grad():
            return self.prompt_features(members, group)

    def _text_target(self, group: int, target: Tensor) -> Tensor:
        """Return which row of `group_texts` belongs to each image, given its person's number within the group."""
        return target

    def begin(self, stage: str) -> None:
        """Compute the sentences of all people, which stage 2 does not change, once."""
        self.stage = stage
        self.train(self.training)  # what this stage freezes has no dropout from here on
        self._texts = []
        if stage == "finetune" and self.active("i2t"):
            self._texts = [self.group_texts(group) for group in range(len(self.local))]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "ClipReid":
        # Kept sentences go where the model goes.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._texts = [fn(texts) for texts in self._texts]
        return self

    def train(self, mode: bool = True) -> "ClipReid":
        """Switch to training; what a stage freezes stays without dropout."""
        super().train(mode)
        self.backbone.text.eval()
        if self.stage == "prompt-stage":
            self.backbone.image.eval()
        return self

    # Images

    def look(self, images: Tensor, shift: Tensor | None = None) -> Seen:
        """Return the features of images; `shift` is added to their class tokens."""
        seen = self.backbone.encode_image(images, shift=shift)
        return Seen(seen.previous_cls[:, 0], seen.hidden_cls[:, 0], seen.cls[:, 0])

    def see(self, batch: Batch) -> Seen:
        """Return the features of a batch's images, with what is known of their cameras if the model reads that."""
        return self.look(batch.require("image"), self.side_of(batch))

    def side_of(self, batch: Batch) -> Tensor | None:
        """Return each image's side information, (B, width), if there is any; an unknown camera has the mean of all."""
        if not self.config.sie.camera:
            return None
        vectors, camera = self.camera_vectors, batch.camera
        if camera is None:
            camera = torch.full((len(batch),), -1, device=vectors.device)
        known = nn.functional.embedding(camera.clamp(min=0), vectors)
        return self.config.sie.coefficient * torch.where(camera[:, None] >= 0, known, vectors.mean(dim=0))

    # Losses

    def prepare(self, batch: Batch) -> GroupedBatch:
        """Find out who is in the batch, by group."""
        return grouped(batch, len(self.local), self.persons)

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return `person` (B,), `group<k>`, the samples of each group if there are several, and what a stage reads.

        Stage 1: `image` (B, D), `prompt` (U, D), each different person's sentence in each group, and numbers that say
        whose: `owner` (U,) of the sentences, `label` (B,) of the images. Stage 2: the features of `Seen`.
        """
        # Training prepares batches on the CPU; here a device would be asked who is in them.
        batch = batch if isinstance(batch, GroupedBatch) else self.prepare(batch)
        rows = {"person": batch.require("person")}
        if stage != "prompt-stage":
            rows |= vars(self.see(batch))
        elif self.active("con"):
            rows |= self._first_rows(batch)
        groups = batch.group_rows()
        return Parts(rows | groups, dict.fromkeys(groups, "person"))

    def _first_rows(self, batch: GroupedBatch) -> dict[str, Tensor]:
        """What the contrast of stage 1 reads."""
        prompts = [self.prompt_features(who, group) for group, who in enumerate(batch.people()) if len(who)]
        return {"image": self._kept(batch), "prompt": torch.cat(prompts), "owner": batch.owner, "label": batch.label}

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return `con` (stage 1), or `id`, `triplet` and `i2t` (stage 2), each unweighted and summed over groups."""
        wanted = self.current_weights(stage)
        if stage == "prompt-stage":
            return {"con": self._contrast(parts)} if "con" in wanted else {}
        seen, person = Seen(parts["previous"], parts["hidden"], parts["proj"]), parts["person"]
        each = split_parts(parts, len(self.local))
        found = [self._of_group(group, seen[rows], person[rows], wanted) for group, rows in each]
        return {name: torch.stack([part[name] for part in found]).sum() for name in wanted}

    def _contrast(self, parts: Parts) -> Tensor:
        """L_con, summed over groups; of a person whom several parts hold, the first sentence counts."""
        image, label, asked = parts["image"], parts["label"], dict(self.config.con)
        found = [
            prompt_losses.prompt_contrast(image[rows], parts["prompt"], label[rows], parts["owner"], **asked)
            for _, rows in split_parts(parts, len(self.local))
        ]
        return torch.stack(found).sum()

    def _kept(self, batch: Batch) -> Tensor:
        """What stage 1 reads of images, kept or computed, in the precision of the prompts."""
        held = batch.frozen or self.frozen_features(batch)
        return held["image"].to(self.id_tokens.dtype)

    def _of_group(self, group: int, seen: Seen, person: Tensor, wanted: Mapping[str, float]) -> dict[str, Tensor]:
        config, target = self.config, self.local[group, person]
        heads: Any = self.necks[group]
        found: dict[str, Tensor] = {}
        if "id" in wanted:
            scores = (heads["hidden"](seen.hidden).logits, heads["proj"](seen.proj).logits)
            each = [losses.cross_entropy(score, target, smoothing=config.smoothing) for score in scores]
            found["id"] = torch.stack(each).sum()
        if "triplet" in wanted:
            found["triplet"] = self._triplets(seen, person)
        if "i2t" in wanted:
            texts = self.group_texts(group)
            found["i2t"] = prompt_losses.image_to_text(
                seen.proj, texts, self._text_target(group, target), smoothing=config.smoothing, **dict(config.i2t)
            )
        return found

    def _triplets(self, seen: Seen, person: Tensor) -> Tensor:
        """The sum over the last-but-one block's, the last block's and the projected class token."""
        settings, found = self.config.triplet, []
        asked = settings.model_dump(exclude={"normalize"})
        for feature in (seen.previous, seen.hidden, seen.proj):
            feature = unit(feature) if settings.normalize else feature
            found.append(losses.batch_hard_triplet(feature, person, **asked))
        return torch.stack(found).sum()

    # Stage 1 on frozen encoders

    def frozen_features(self, batch: Batch) -> dict[str, Tensor]:
        """Return `image`: the projected feature, without cameras, as stage 1 of the published code reads it."""
        with torch.no_grad():
            return {"image": self.look(batch.require("image")).proj}

    def prompt_rows(self, persons: Sequence[str]) -> list[tuple[str, str, Tensor]]:
        """Return the tokens of every person."""
        return [("person", name, tokens) for name, tokens in zip(persons, self.id_tokens, strict=True)]

    def parameters_by_role(self, stage: str) -> dict[Role, list[tuple[str, nn.Parameter]]]:
        """Return the prompts in stage 1; image encoder, heads and camera vectors in stage 2; never the text encoder."""
        roles: dict[Role, list[tuple[str, nn.Parameter]]] = {"image": [], "text": [], "new": [], "prompt": []}
        for name, parameter in self.named_parameters():
            role = self._role(name, parameter, stage)
            if role is not None:
                roles[role].append((name, parameter))
        return roles

    def _role(self, name: str, parameter: nn.Parameter, stage: str) -> Role | None:
        prompts = name == "id_tokens"
        if stage == "prompt-stage":
            return "prompt" if prompts else None
        if prompts or name.startswith("backbone.text."):
            return None
        if name.endswith("norm.bias") and name.startswith("necks."):
            return None  # BNNeck: the norm has no shift
        return "image" if name.startswith("backbone.image.") else "new"

    # Retrieval

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit projected class tokens, shape (B, D)."""
        return unit(self.see(batch).proj)

    def embed_tasks(self, batch: Batch) -> dict[Task, Tensor]:
        """Return the unit projected class token for texts and the unit `i2i_feature` for images, from one pass."""
        seen = self.see(batch)
        return {"t2i": unit(seen.proj), "i2i": unit(self._i2i(seen))}

    def _i2i(self, seen: Seen) -> Tensor:
        """The feature that is compared image to image; joined before it is normalised."""
        if self.config.i2i_feature == "proj":
            return seen.proj
        if self.config.i2i_feature == "concat":
            return torch.cat([seen.hidden, seen.proj], dim=-1)
        heads: Any = self.necks[0]
        return torch.cat([heads["hidden"](seen.hidden).feature, heads["proj"](seen.proj).feature], dim=-1)

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit features of captions by the text encoder, which stays as it came, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return the vectors of both tasks."""
        made = self.embed_tasks(batch)
        return {"embedding": made["t2i"], "i2i": made["i2i"]}


METHOD = ClipReid
