"""`hpl`: hierarchical prompts for text-to-image and image-to-image retrieval by one model (Zhou et al., 2511.13575).

One image encoder with two class tokens: `v_t2i` is compared with texts, `v_i2i` with images. Stage I (`prompt-stage`,
encoders frozen) learns tokens for every training person and two inversion networks that turn an image or a text into
pseudo-words; stage II (`finetune`) trains the encoders against the prompts made of them. Retrieval uses neither prompts
nor networks. The paper has no public code; docs/methods.md lists what it leaves open and what we took.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from reidctl import losses, prompt_losses
from reidctl.backbones.attention import Isolation
from reidctl.backbones.base import Backbone, ImageFeatures, TextFeatures, last_real
from reidctl.batch import Batch
from reidctl.config import Section
from reidctl.errors import UsageError
from reidctl.layers.bnneck import BNNeck
from reidctl.layers.inversion import Inversion, Readout, diversity, mismatch
from reidctl.layers.prompts import PromptTemplate, to_words
from reidctl.layers.settings import PlainTripletConfig
from reidctl.methods.base import Method, MethodConfig, Role, Task, unit

Slots = dict[str, Tensor]
CONSTRUCTION = ("ic", "proto_t2i", "proto_i2t")
"""The losses of stage I."""


class TrtConfig(Section):
    """The Task-Routed Transformer: a second class token."""

    dual: bool = True
    """False: one class token serves both tasks (Table 3, first row)."""
    init: Literal["copy", "random", "zeros"] = "copy"
    """The new token: a copy of the first with N(0, 0.01) noise, N(0, 0.02) or zeros; not stated."""
    isolation: Isolation = "none"
    """Who sees whom: everybody (`none`, as published), class tokens not each other (`cls`; they still meet through the
    patches), patches not the class tokens either (`full`: only then no token reaches the other's output)."""
    i2i_proj: Literal["shared", "own", "none"] = "shared"
    """v_i2i passes CLIP's projection, one of its own that starts as a copy, or none (its width is then the tower's)."""


class InversionConfig(Section):
    """The inversion networks; see `layers.inversion`. The paper gives their depth alone."""

    layers: int = Field(default=4, ge=1)
    width: int | None = Field(default=None, ge=8)
    """None: the width of the joint space."""
    heads: int = Field(default=8, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    readout: Readout = "queries"
    input: Literal["proj", "hidden"] = "proj"
    """Token features in the joint space, or the towers' own before the projection."""


class StageTwoConfig(Section):
    """What stage II trains of stage I's modules; not stated."""

    train_inversion: bool = True
    train_id_tokens: bool = False
    train_prompt_encoder: bool = False
    """With either of the last two, the prompts of all people are encoded anew at every step."""
    keep_ic: float = Field(default=0.0, ge=0)
    """Weight of stage I's inversion consistency in stage II; CMPR alone is least for a constant prompt."""


class HplConfig(MethodConfig):
    """Settings of `hpl`; the defaults are the recipe `hpl`."""

    trt: TrtConfig = TrtConfig()
    prompts: Literal["soft", "words", "plain", "none"] = "soft"
    """`soft` as published; `words` moves every learnt or inverted token to its nearest word (a hard prompt);
    `plain` is the fixed sentence `plain_template`, which knows neither person nor image; `none` leaves L_base."""
    cmpr: bool = True
    """False leaves L_CMPR out ("TRT + HPL")."""
    two_stage: bool = True
    """False trains everything at once, stage I's losses included, without a prompt stage."""
    train_tasks: tuple[Task, ...] = ("t2i", "i2i")
    """Whose losses count: one task alone is a single-task model (Fig. 1a)."""
    template: str = "A photo of {id} and {inst} person"
    """Without the full stop of the printed T^v; Fig. 2 draws "A photo of a {id} and {inst} person."."""
    identity_template: str = "A photo of {id} person"
    instance_template: str = "A photo of {inst} person"
    """For people who were never trained on and have no identity tokens: analyses only, retrieval needs no prompt."""
    plain_template: str = "A photo of a person"
    n_id_tokens: int = Field(4, ge=0)
    n_inst_tokens: int = Field(default=4, ge=1)
    id_tokens: Literal["per_identity", "global"] = "per_identity"
    """"Shared" tokens: by the three prompts of a person, or by everybody (then Eq. 11 cannot tell people apart)."""
    inversion: InversionConfig = InversionConfig()
    temperature: float = Field(0.02, gt=0)
    """Of SDM."""
    tau_prompt: float = Field(0.02, gt=0)
    """Of Eq. 8, 9 and 11; 1 is the literal reading."""
    proto_positives: Literal["id", "literal"] = "id"
    l2_space: Literal["unit", "raw"] = "unit"
    lambda1: float = Field(0.4, ge=0)
    """Weight of L_tgps and L_vgps."""
    lambda2: float = Field(0.06, ge=0)
    """Weight of L_CMPR."""
    cic_reduction: Literal["mean", "sum"] = "mean"
    """`sum` over the batch is printed in Eq. 11; all other losses are means."""
    cic_over: Literal["all", "batch"] = "all"
    """Among whose prompts an image is classified. `batch` spares one-stage training N text passes per step."""
    i2i_losses_on: Literal["all", "i2i"] = "all"
    """Whether triplet and identity loss of v_i2i read all images or those without a caption (a batch in which all have
    one is read whole)."""
    ilpa_detach: Literal["none", "prompt", "feature"] = "none"
    """Which side of L_tgps and L_vgps gets no gradient."""
    stage2: StageTwoConfig = StageTwoConfig()
    triplet: PlainTripletConfig = PlainTripletConfig()
    freeze: tuple[Literal["image", "text"], ...] = ()
    """Encoders that stage II leaves as they are; the second class token still trains."""
    i2i_feature: Literal["proj", "concat", "bn"] = "proj"
    """What is compared image to image: v_i2i; beside it the same token before the projection; or v_i2i after the norm
    of its identity head."""

    @property
    def inverts(self) -> bool:
        """Whether there are learnt tokens and inversion networks."""
        return self.prompts in ("soft", "words")

    @property
    def needs_prompt_stage(self) -> bool:
        """Stage II needs stage I unless nothing is learnt there, or everything at once."""
        return self.inverts and self.two_stage

    @property
    def spares_prompt_stage(self) -> str:
        """Everything at once."""
        return "method.two_stage=false"

    def prompt_settings(self) -> dict[str, Any]:
        """Everything that stage I reads of the settings."""
        names = ("prompts", "template", "identity_template", "n_id_tokens", "n_inst_tokens", "id_tokens", "inversion",
                 "tau_prompt", "proto_positives", "l2_space")  # fmt: skip
        whole = self.model_dump(mode="json")
        return {
            "weights": {name: self.weights.get(name, 1.0) for name in CONSTRUCTION},
            "trt": {name: whole["trt"][name] for name in ("dual", "init", "isolation")},
            "texts": "t2i" in self.train_tasks,
            **{name: whole[name] for name in names},
        }


@dataclass(frozen=True)
class Seen:
    """What one pass of the image encoder gives.

    Attributes:
        t2i, i2i: the class features in the joint space, (B, D).
        tokens: what the inversion network reads, (B, K + N, width), class tokens first.
        metric: what triplet, identity loss and retrieval use of the second token, (B, D or the tower's width).
        hidden: the second token before the projection, (B, tower's width).
    """

    t2i: Tensor
    i2i: Tensor
    tokens: Tensor
    metric: Tensor
    hidden: Tensor


class Hpl(Method):
    """Two class tokens, identity prompts, pseudo-word prompts of images and texts, and their regularisation."""

    name = "hpl"
    summary = "hierarchical prompts, a class token per task, T2I and I2I by one model (Zhou et al., no public code)"
    Config = HplConfig
    stages: ClassVar = ("prompt-stage", "finetune")
    learns_without_text: ClassVar = True
    loss_weights: ClassVar = {
        "ic": 1.0,
        "proto_t2i": 1.0,
        "proto_i2t": 1.0,
        "sdm": 1.0,
        "id_t2i": 1.0,
        "triplet": 1.0,
        "id_i2i": 1.0,
        "cic": 1.0,
        "tgps": 0.4,
        "vgps": 0.4,
        "cmpr": 0.06,
    }
    config: HplConfig
    prototypes: Tensor | None
    """Cached identity prompt features (N, D); None until stage II begins, or where they change with every step."""

    def __init__(self, config: HplConfig, backbone: Backbone, persons: int) -> None:
        super().__init__(config, backbone, persons)
        _check(config)
        self.stage = "finetune"
        self.prototypes = None
        self._conflict: dict[str, float] = {}
        self._pseudo: tuple[Tensor, Tensor] | None = None
        if config.trt.dual:
            self.second_token = nn.Parameter(_second_token(backbone, config.trt.init))
        if config.trt.dual and config.trt.i2i_proj == "own":
            self.second_projection = nn.Linear(backbone.width_image, backbone.dim, bias=False)
            with torch.no_grad():
                self.second_projection.weight.copy_(backbone.image.project(torch.eye(backbone.width_image)).T)
        metric = backbone.width_image if config.trt.i2i_proj == "none" else backbone.dim
        self.classifier = nn.Linear(backbone.dim, persons)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.neck = BNNeck(metric, persons)
        if config.prompts != "none":
            self._build_prompts(config, backbone, persons)

    def _build_prompts(self, config: HplConfig, backbone: Backbone, persons: int) -> None:
        sizes = {"id": config.n_id_tokens, "inst": config.n_inst_tokens}
        plain = config.prompts == "plain"
        texts = {"whole": config.template, "identity": config.identity_template, "instance": config.instance_template}
        self.templates = nn.ModuleDict(
            {
                name: PromptTemplate(
                    config.plain_template if plain else text,
                    {} if plain else sizes,
                    lambda words: backbone.tokenize(words),
                    context=backbone.context_length,
                )
                for name, text in texts.items()
            }
        )
        # M~_t: "another CLIP text encoder". It starts as the first one's copy and stays that.
        self.prompt_text = copy.deepcopy(backbone.text)
        if plain:
            return
        rows = persons if config.id_tokens == "per_identity" else 1
        self.id_tokens = nn.Parameter(0.02 * torch.randn(rows, config.n_id_tokens, backbone.width_text))
        self.invert_image = self._inversion(config.inversion, backbone, backbone.width_image)
        self.invert_text = self._inversion(config.inversion, backbone, backbone.width_text)

    def _inversion(self, config: InversionConfig, backbone: Backbone, hidden: int) -> Inversion:
        return Inversion(
            backbone.dim if config.input == "proj" else hidden,
            backbone.width_text,
            count=self.config.n_inst_tokens,
            width=config.width or backbone.dim,
            layers=config.layers,
            heads=config.heads,
            readout=config.readout,
            scale=_word_scale(backbone),
            mlp_ratio=config.mlp_ratio,
        )

    # What is asked for

    def weight(self, loss: str) -> float:
        """Return the weight of a loss: `method.weights` first, then lambda1, lambda2 and `stage2.keep_ic`."""
        if loss in self.config.weights:
            return self.config.weights[loss]
        own = {"tgps": self.config.lambda1, "vgps": self.config.lambda1, "cmpr": self.config.lambda2}
        return own.get(loss, self.loss_weights[loss])

    def active(self, loss: str) -> bool:
        """Whether the settings ask for a loss, in whatever stage."""
        config = self.config
        if not super().active(loss):
            return False
        if loss in ("sdm", "id_t2i"):
            return "t2i" in config.train_tasks
        if loss in ("triplet", "id_i2i"):
            return "i2i" in config.train_tasks
        if loss == "cic":
            return config.prompts != "none" and "i2i" in config.train_tasks
        if loss in ("tgps", "vgps"):
            return config.prompts != "none" and "t2i" in config.train_tasks
        if loss == "cmpr":
            return config.cmpr and self.config.inverts and "t2i" in config.train_tasks
        if loss == "ic":
            return self.config.inverts
        return self.config.inverts and config.n_id_tokens > 0

    def current_weights(self, stage: str = "finetune") -> dict[str, float]:
        """The weight of each loss of a stage; stage I's losses take part in stage II only where asked for."""
        weights = {}
        for name in self.loss_weights:
            if not self.active(name):
                continue
            first = name in CONSTRUCTION
            if first == (stage == "prompt-stage") or (first and not self.config.two_stage):
                weights[name] = self.weight(name)
            elif name == "ic" and self.config.stage2.keep_ic > 0:
                weights[name] = self.config.stage2.keep_ic
        return weights

    def objective(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses of the stage that trains, a scalar."""
        weights = self.current_weights(self.stage)
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    @property
    def train_texts(self) -> tuple[str, ...]:
        """The caption; none for a model of image-to-image alone."""
        return ("full",) if "t2i" in self.config.train_tasks else ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Two vectors per image, unless one class token serves both tasks with the same feature."""
        same = not self.config.trt.dual and self.config.trt.i2i_proj != "none" and self.config.i2i_feature == "proj"
        return ("t2i",) if same else ("t2i", "i2i")

    def begin(self, stage: str) -> None:
        """Cache the identity prompts of all people, where stage II does not change them."""
        self.stage = stage
        self.train(self.training)  # what this stage freezes has no dropout from here on
        two = self.config.stage2
        fixed = self.config.two_stage and not two.train_id_tokens and not two.train_prompt_encoder
        self.prototypes = None
        if stage == "finetune" and fixed and self.active("cic"):
            with torch.no_grad():
                self.prototypes = self.identity_prompts()

    # Features

    def see(self, images: Tensor, *, attention: bool = False) -> ImageFeatures:
        """Return the image encoder's output; class token 0 is v_t2i, class token 1, if there, v_i2i."""
        extra = self.second_token[None] if self.config.trt.dual else None
        return self.backbone.encode_image(
            images, extra_cls=extra, isolation=self.config.trt.isolation, attention=attention
        )

    def split(self, features: ImageFeatures) -> Seen:
        """Return what the losses and the retrieval read of the encoder's output."""
        config, last = self.config, features.cls.shape[1] - 1
        i2i, hidden = features.cls[:, last], features.hidden_cls[:, last]
        if config.trt.dual and config.trt.i2i_proj == "own":
            i2i = self.second_projection(hidden)
        parts = (features.hidden_cls, features.hidden_patches)
        if config.inversion.input == "proj":
            parts = (features.cls, features.patches)
        metric = hidden if config.trt.i2i_proj == "none" else i2i
        return Seen(features.cls[:, 0], i2i, torch.cat(parts, dim=1), metric, hidden)

    def pseudo_image(self, tokens: Tensor) -> Tensor:
        """Return P^v (B, M, W) of token features (B, K + N, width): I_v, Eq. 3."""
        return self._worded(self.invert_image(tokens))

    def pseudo_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return P^t (B, M, W) of token features (B, L, width): I_t, Eq. 4; padding is not read."""
        end = last_real(mask) if self.backbone.config.pool == "eos" else torch.zeros_like(last_real(mask))
        return self._worded(self.invert_text(tokens, mask, end))

    def text_tokens(self, features: TextFeatures) -> Tensor:
        """Return what I_t reads of the text encoder's output."""
        return features.tokens if self.config.inversion.input == "proj" else features.hidden

    def _worded(self, tokens: Tensor) -> Tensor:
        return to_words(tokens, self.word_table) if self.config.prompts == "words" else tokens

    @property
    def word_table(self) -> Tensor:
        """Embeddings of all words of the prompt encoder, (V, W)."""
        count = self.backbone.tokenizer.vocabulary_size
        device = next(self.prompt_text.parameters()).device
        return self.prompt_text.embed_tokens(torch.arange(count, device=device)[None])[0]

    def encode_prompts(self, template: str, slots: Slots, batch: int) -> Tensor:
        """Return M~_t's feature of prompts, (B, D).

        Args:
            template: `whole` (T^v and T^t), `identity` (T^id) or `instance` (for people without identity tokens).
            slots: vectors (B, M, W) for `id` and `inst`, as far as the template has them.
            batch: B.
        """
        prompt = self.templates[template](self.prompt_text.embed_tokens, slots, batch)
        return self.prompt_text.encode_embedded(prompt.embeddings, prompt.mask).pooled

    def tokens_of(self, person: Tensor) -> Tensor:
        """Return the identity tokens (B, M, W) of training people (B,)."""
        rows = person if self.config.id_tokens == "per_identity" else torch.zeros_like(person)
        # An embedding lookup: only the rows of the batch's people get a gradient.
        flat = nn.functional.embedding(rows, self.id_tokens.flatten(1))
        return self._worded(flat.view(len(person), *self.id_tokens.shape[1:]))

    def identity_prompts(self, person: Tensor | None = None, *, block: int = 1024) -> Tensor:
        """Return r~ (N, D), the features of the identity prompts of people; default all, in order."""
        device = self.classifier.weight.device
        every = torch.arange(self.persons, device=device) if person is None else person
        if not self.config.inverts:
            return self.encode_prompts("identity", {}, 1).expand(len(every), -1)
        parts = torch.split(every, block)
        return torch.cat([self.encode_prompts("identity", {"id": self.tokens_of(rows)}, len(rows)) for rows in parts])

    def prompted(self, pseudo: Tensor, person: Tensor | None) -> Tensor:
        """Return the feature of the prompts with these pseudo-tokens (B, M, W), (B, D): v~ or t~, Eq. 5.

        Without `person` the template is the one without identity tokens, for people who have none.
        """
        slots = {"inst": pseudo}
        if person is None:
            return self.encode_prompts("instance", slots, len(pseudo))
        return self.encode_prompts("whole", {**slots, "id": self.tokens_of(person)}, len(pseudo))

    def _plain(self, count: int) -> Tensor:
        return self.encode_prompts("whole", {}, 1).expand(count, -1)

    # Losses

    def losses(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        """Return the stage's losses by name, each unweighted; see `current_weights`."""
        wanted = self.current_weights(stage)
        if stage == "prompt-stage":
            return self._construction(self._frozen(batch), batch, wanted)
        seen = self.split(self.see(batch.require("image")))
        has_texts = "full" in batch.texts and bool(len(batch.texts["full"]))
        text = self.backbone.encode_text(batch.texts["full"]) if has_texts else None
        found = self._base(seen, text, batch, wanted) | self._prompting(seen, text, batch, wanted)
        return {name: found[name] for name in wanted if name in found}

    def _base(self, seen: Seen, text: TextFeatures | None, batch: Batch, wanted: Mapping[str, float]) -> Slots:
        """L_base = L_sdm + L_id of v_t2i on pairs, L_tri + L_id of v_i2i on images (Eq. 2)."""
        person, pairs = batch.require("person"), _pairs(batch)
        found: Slots = {}
        image = seen.t2i[pairs]
        words = seen.t2i[:0] if text is None else text.pooled
        image = image if text is not None else image[:0]
        owner = person[pairs][: len(image)]
        if "sdm" in wanted:
            found["sdm"] = losses.sdm(image, words, owner, temperature=self.config.temperature)
        if "id_t2i" in wanted:
            found["id_t2i"] = losses.id_loss(self.classifier(image), self.classifier(words), owner)
        rows = self._i2i_rows(batch)
        metric, people = seen.metric[rows], person[rows]
        if "triplet" in wanted:
            settings = self.config.triplet
            feature = nn.functional.normalize(metric, dim=-1) if settings.normalize else metric
            found["triplet"] = losses.batch_hard_triplet(
                feature, people, margin=settings.margin, squared=settings.squared, mining=settings.mining
            )
        if "id_i2i" in wanted:
            logits = self.neck(metric).logits if len(metric) else self.neck.classifier(metric)
            found["id_i2i"] = losses.cross_entropy(logits, people)
        return found

    def _i2i_rows(self, batch: Batch) -> Tensor | slice:
        if self.config.i2i_losses_on == "all" or batch.has_text is None:
            return slice(None)
        return ~batch.has_text

    def _prompting(self, seen: Seen, text: TextFeatures | None, batch: Batch, wanted: Mapping[str, float]) -> Slots:
        """L_cic, L_tgps, L_vgps and L_CMPR (Eq. 10-12), and stage I's losses where they go on."""
        person, pairs = batch.require("person"), _pairs(batch)
        found: Slots = {}
        if "cic" in wanted:
            found["cic"] = self._cic(seen.i2i, person)
        first = [name for name in CONSTRUCTION if name in wanted]
        if first:
            tokens = None if text is None else self.text_tokens(text)
            given = _Frozen(seen.t2i, seen.tokens, None if text is None else text.pooled, tokens)
            found |= self._construction(given, batch, {name: wanted[name] for name in first})
        if text is None or not any(name in wanted for name in ("tgps", "vgps", "cmpr")):
            nothing = losses.zero(seen.t2i)
            return found | {name: nothing for name in ("tgps", "vgps", "cmpr") if name in wanted}
        owner, mask = person[pairs], batch.texts["full"].mask
        if self.config.inverts:
            image_tokens = self.pseudo_image(seen.tokens[pairs])
            text_tokens = self.pseudo_text(self.text_tokens(text), mask)
            self._pseudo = (image_tokens.detach(), text_tokens.detach())
            if "cmpr" in wanted:
                found["cmpr"] = prompt_losses.prompt_regularisation(text_tokens, image_tokens)
        if "tgps" in wanted:
            prompt = self.prompted(text_tokens, owner) if self.config.inverts else self._plain(len(owner))
            found["tgps"] = self._ilpa(prompt, seen.t2i[pairs])
        if "vgps" in wanted:
            prompt = self.prompted(image_tokens, owner) if self.config.inverts else self._plain(len(owner))
            found["vgps"] = self._ilpa(prompt, text.pooled)
        return found

    def _ilpa(self, prompt: Tensor, feature: Tensor) -> Tensor:
        detach = self.config.ilpa_detach
        prompt = prompt.detach() if detach == "prompt" else prompt
        feature = feature.detach() if detach == "feature" else feature
        return prompt_losses.feature_distance(prompt, feature, space=self.config.l2_space)

    def _cic(self, image: Tensor, person: Tensor) -> Tensor:
        config = self.config
        if config.cic_over == "batch":
            owner, person = torch.unique(person, return_inverse=True)
            every = self.identity_prompts(owner) if self.prototypes is None else self.prototypes[owner]
        else:
            every = self.identity_prompts() if self.prototypes is None else self.prototypes
        return prompt_losses.prompt_classification(
            image, every.to(image.device), person, temperature=config.tau_prompt, reduction=config.cic_reduction
        )

    def _construction(self, given: "_Frozen", batch: Batch, wanted: Mapping[str, float]) -> Slots:
        """L_ic, L_t2i and L_i2t (Eq. 6-9); the text half of L_ic reads pairs only."""
        person = batch.require("person")
        found: Slots = {}
        if "ic" in wanted:
            image = self.prompted(self.pseudo_image(given.tokens), person)
            found["ic"] = prompt_losses.feature_distance(image, given.image, space=self.config.l2_space)
            if given.text is not None and given.text_tokens is not None:
                mask = batch.texts["full"].mask
                text = self.prompted(self.pseudo_text(given.text_tokens, mask), person[_pairs(batch)])
                found["ic"] = found["ic"] + prompt_losses.feature_distance(text, given.text, space=self.config.l2_space)
        if "proto_t2i" in wanted or "proto_i2t" in wanted:
            owner = torch.unique(person)
            both = prompt_losses.identity_contrast(
                given.image,
                self.identity_prompts(owner),
                person,
                owner,
                temperature=self.config.tau_prompt,
                positives=self.config.proto_positives,
            )
            found |= dict(zip(("proto_t2i", "proto_i2t"), both, strict=True))
        return {name: found[name] for name in wanted}

    # Stage I on frozen encoders

    def frozen_features(self, batch: Batch) -> Slots:
        """Return `image` (v_t2i), `image_tokens` (F^v), `text` (t_eos) and `text_tokens` (F^t), as far as asked."""
        with torch.no_grad():
            if batch.image is not None:
                seen = self.split(self.see(batch.image))
                return {"image": seen.t2i, "image_tokens": seen.tokens}
            text = self.backbone.encode_text(batch.texts["full"])
            return {"text": text.pooled, "text_tokens": self.text_tokens(text)}

    def _frozen(self, batch: Batch) -> "_Frozen":
        width = self.classifier.weight.dtype
        held = {name: value.to(width) for name, value in batch.frozen.items()}
        if "image" not in held:
            held |= self.frozen_features(Batch(image=batch.require("image")))
        texts = "full" in batch.texts and bool(len(batch.texts["full"]))
        if texts and "text" not in held:
            held |= self.frozen_features(Batch(texts={"full": batch.texts["full"]}))
        if not texts:
            return _Frozen(held["image"], held["image_tokens"], None, None)
        # Kept texts are as long as the longest of all: the rest of each is padding, which I_t does not read.
        tokens = held["text_tokens"][:, : batch.texts["full"].mask.shape[1]]
        return _Frozen(held["image"], held["image_tokens"], held["text"], tokens)

    def prompt_rows(self, persons: Sequence[str]) -> list[tuple[str, str, Tensor]]:
        """Return the identity tokens: of every person, or the one set that all share."""
        if not self.config.inverts:
            return []
        if self.config.id_tokens == "global":
            return [("shared", "", self.id_tokens[0])]
        return [("person", name, tokens) for name, tokens in zip(persons, self.id_tokens, strict=True)]

    def prompt_state(self) -> dict[str, Tensor]:
        """The learnt tokens, the inversion networks, and the second class token that they were learnt beside."""
        state = super().prompt_state()
        if self.config.trt.dual:
            state["second_token"] = self.second_token.detach()
        return state

    def train(self, mode: bool = True) -> "Hpl":
        """Switch to training; what a stage freezes stays without dropout."""
        super().train(mode)
        frozen = ("image", "text") if self.stage == "prompt-stage" else self.config.freeze
        for side in frozen:
            getattr(self.backbone, side).eval()
        if self.config.prompts != "none" and not (self.stage == "finetune" and self.config.stage2.train_prompt_encoder):
            self.prompt_text.eval()
        return self

    def parameters_by_role(self, stage: str) -> dict[Role, list[tuple[str, nn.Parameter]]]:
        """Return what a stage trains: I_v, I_t and identity tokens in stage I; see `stage2` and `freeze` for II."""
        roles: dict[Role, list[tuple[str, nn.Parameter]]] = {"image": [], "text": [], "new": [], "prompt": []}
        for name, parameter in self.named_parameters():
            role = self._role(name, stage)
            if role is not None:
                roles[role].append((name, parameter))
        return roles

    def _role(self, name: str, stage: str) -> Role | None:
        config, part = self.config, name.partition(".")[0]
        first, once = stage == "prompt-stage", not config.two_stage
        if part == "id_tokens":
            return "prompt" if first or once or config.stage2.train_id_tokens else None
        if part in ("invert_image", "invert_text"):
            return "new" if first or once or config.stage2.train_inversion else None
        if first:
            return None
        if part == "prompt_text":
            return "text" if config.stage2.train_prompt_encoder else None
        if name.startswith("backbone."):
            side: Role = "image" if name.startswith("backbone.image.") else "text"
            return None if side in config.freeze else side
        if name.startswith("neck.norm.bias"):
            return None  # BNNeck: the norm has no shift
        return "image" if name == "second_token" else "new"

    # Retrieval

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit v_t2i, shape (B, D)."""
        return unit(self.see(batch.require("image")).cls[:, 0])

    def embed_tasks(self, batch: Batch) -> dict[Task, Tensor]:
        """Return unit v_t2i for texts and the unit `i2i_feature` for images, from one pass."""
        seen = self.split(self.see(batch.require("image")))
        found: dict[Task, Tensor] = {"t2i": unit(seen.t2i)}
        if "i2i" in self.tasks:
            found["i2i"] = unit(self._i2i(seen))
        return found

    def _i2i(self, seen: Seen) -> Tensor:
        if self.config.i2i_feature == "concat":
            return torch.cat([seen.hidden, seen.i2i], dim=-1)
        if self.config.i2i_feature == "bn":
            return cast(Tensor, self.neck(seen.metric).feature)
        return seen.metric

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit t_eos, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return the two class features and the flattened pseudo-tokens P^v as `pseudo`."""
        seen = self.split(self.see(batch.require("image")))
        found = {"embedding": unit(seen.t2i)}
        if "i2i" in self.tasks:
            found["i2i"] = unit(self._i2i(seen))
        if self.config.inverts:
            found["pseudo"] = self.pseudo_image(seen.tokens).flatten(1).float()
        return found

    # What the training says about itself

    def gradient_norms(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the norms; on the way measure how far the two tasks pull the shared weight apart."""
        self._conflict = self._compare(losses)
        return super().gradient_norms(losses)

    def _compare(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """`task_cosine`: cosine of the tasks' weighted gradients at the shared weight, where both reach it."""
        shared, weights = self.shared_weight(), self.current_weights(self.stage)
        sides = []
        for names in (("sdm", "id_t2i", "tgps", "vgps", "cmpr"), ("triplet", "id_i2i", "cic")):
            parts = [weights[n] * found[n] for n in names if n in found and found[n].requires_grad]
            if shared is None or not parts:
                return {}
            grad = torch.autograd.grad(torch.stack(parts).sum(), shared, retain_graph=True, allow_unused=True)[0]
            if grad is None or not bool(grad.norm() > 0):
                return {}
            sides.append(grad.float().flatten())
        return {"task_cosine": float(nn.functional.cosine_similarity(sides[0], sides[1], dim=0))}

    def training_report(self) -> dict[str, float]:
        """What the alarms read: `task_cosine`, and `pseudo/diversity`, `pseudo/mismatch` of the last batch of pairs.

        `task_cosine` in [-1, 1]: below zero, what helps one task hurts the other at the shared weight. The others: see
        `layers.inversion.diversity` and `mismatch`.
        """
        found = dict(self._conflict)
        if self._pseudo is not None and len(self._pseudo[0]) > 1:
            image, text = self._pseudo
            found |= {"pseudo/diversity": diversity(image), "pseudo/mismatch": mismatch(image, text)}
        return found


@dataclass(frozen=True)
class _Frozen:
    """What stage I reads of frozen encoders; no texts for a batch without captions."""

    image: Tensor
    tokens: Tensor
    text: Tensor | None
    text_tokens: Tensor | None


def _pairs(batch: Batch) -> Tensor | slice:
    return slice(None) if batch.has_text is None else batch.has_text


def _second_token(backbone: Backbone, init: str) -> Tensor:
    first = backbone.image.class_token.detach()
    if init == "copy":
        # Some noise: equal tokens would stay equal as long as no loss splits them.
        return first + 0.01 * torch.randn_like(first)
    return 0.02 * torch.randn_like(first) if init == "random" else torch.zeros_like(first)


@torch.no_grad()
def _word_scale(backbone: Backbone) -> float:
    """Root mean square of the numbers of all word embeddings."""
    every = torch.arange(backbone.tokenizer.vocabulary_size, device=next(backbone.text.parameters()).device)
    return float(backbone.embed_tokens(every[None]).float().square().mean().sqrt())


def _check(config: HplConfig) -> None:
    if not config.train_tasks or len(set(config.train_tasks)) != len(config.train_tasks):
        raise UsageError("`method.train_tasks` needs `t2i`, `i2i` or both, each once.")
    for key, slots in (("template", {"inst"}), ("identity_template", {"id"}), ("instance_template", {"inst"})):
        text = getattr(config, key)
        missing = [slot for slot in sorted(slots) if f"{{{slot}}}" not in text]
        if missing:
            raise UsageError(f"`method.{key}` has no slot `{{{missing[0]}}}`.", hint=f"It says: {text!r}.")
    if "{inst}" in config.identity_template or "{id}" in config.instance_template:
        raise UsageError("`method.identity_template` takes {id} alone, `method.instance_template` takes {inst} alone.")


METHOD = Hpl
