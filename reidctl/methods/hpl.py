"""`hpl`: hierarchical prompts for text-to-image and image-to-image retrieval by one model (Zhou et al., 2511.13575).

One image encoder with two class tokens: `v_t2i` is compared with texts, `v_i2i` with images. Stage I (`prompt-stage`,
encoders frozen) learns tokens for every training person and two inversion networks that turn an image or a text into
pseudo-words; stage II (`finetune`) trains the encoders against the prompts made of them. Retrieval uses neither prompts
nor networks. The paper has no public code; docs/methods.md lists what it leaves open and what we took.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from reidctl import losses, prompt_losses
from reidctl.backbones.base import Backbone, ImageFeatures, TextFeatures, last_real
from reidctl.batch import Batch
from reidctl.layers.bnneck import BNNeck
from reidctl.layers.groups import GroupedBatch, grouped
from reidctl.layers.hpl_settings import HplSettings, InversionConfig, check
from reidctl.layers.inversion import Inversion, diversity, mismatch
from reidctl.layers.prompts import PromptTemplate, to_words
from reidctl.methods.base import Method, MethodConfig, Role, Task, unit
from reidctl.parts import Parts

Slots = dict[str, Tensor]
CONSTRUCTION = ("ic", "proto_t2i", "proto_i2t")
"""The losses of stage I."""
TEXT_LOSSES, IMAGE_LOSSES = ("sdm", "id_t2i", "tgps", "vgps", "cmpr"), ("triplet", "id_i2i", "cic")
"""Those of stage II that serve text-to-image and image-to-image retrieval."""


class HplConfig(HplSettings, MethodConfig):
    """Settings of `hpl`; the defaults are the recipe `hpl`."""

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
        check(config)
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

    # What is computed of each sample by itself

    def prepare(self, batch: Batch) -> GroupedBatch:
        """Find out which different people are in the batch."""
        return grouped(batch, 1, self.persons)

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return what the losses of a stage read of B samples, their T texts and their U people.

        Always `person` (B,), `t2i` (B, D), `text` (T, D) and `row` (T,), the sample of each text. For L_ic the features
        of the prompts that invert each sample: `inverted_image` (B, D) and `inverted_text` (T, D). In `finetune` also
        `i2i` (B, D) and `metric`, see `Seen`; `uncaptioned`, where the losses of v_i2i read these samples alone; and
        what `_align` returns. What `_people` returns is about the part's own people; the prompts of all people are
        nobody's part, so that `losses_of` encodes them.
        """
        # Training prepares batches on the CPU; here a device would be asked who is in them.
        batch = batch if isinstance(batch, GroupedBatch) else self.prepare(batch)
        wanted, person = self.current_weights(stage), batch.require("person")
        seen = None if stage == "prompt-stage" else self.split(self.see(batch.require("image")))
        given = self._frozen(batch) if seen is None else self._read(seen, batch)
        rows = {"person": person, "t2i": given.image, "text": given.text, "row": given.row}
        if "ic" in wanted:
            rows |= self._invert(given, person)
        rows |= self._people(batch.owner, wanted)
        if seen is not None:
            rows |= {"i2i": seen.i2i, "metric": seen.metric, **self._uncaptioned(batch)}
            rows |= self._align(given, person, wanted)
        return Parts(rows, {name: "t2i" for name in ("row", "uncaptioned") if name in rows})

    def _read(self, seen: Seen, batch: Batch) -> "_Given":
        if not _has_texts(batch):
            return _Given.without_texts(seen.t2i, seen.tokens)
        tokens = batch.texts["full"]
        text = self.backbone.encode_text(tokens)
        words = self.text_tokens(text)
        return _Given(seen.t2i, seen.tokens, text.pooled, batch.image_of_text(), words, tokens.mask)

    def _uncaptioned(self, batch: Batch) -> Slots:
        """The samples without a caption, in order, where the settings ask for them and some may have one."""
        if self.config.i2i_losses_on == "all" or batch.has_text is None:
            return {}
        # Sorted rather than searched for: how many there are is known without asking the device.
        count = len(batch) - len(batch.image_of_text())
        return {"uncaptioned": batch.has_text.int().argsort(stable=True)[:count]}

    def _invert(self, given: "_Given", person: Tensor) -> Slots:
        """The features of the prompts that hold an image's or a text's own pseudo-words (Eq. 5), (B, D) and (T, D)."""
        image = self.prompted(self.pseudo_image(given.tokens), person)
        text = image.new_zeros(0, image.shape[1])
        if given.words is not None:
            text = self.prompted(self.pseudo_text(given.words, given.mask), person[given.row])
        return {"inverted_image": image, "inverted_text": text}

    def _people(self, owner: Tensor, wanted: Mapping[str, float]) -> Slots:
        """`owner` (U,), and `prompt` (U, D), their identity prompts unless kept; as far as a loss is about the batch's.

        People whom several parts hold are there several times.
        """
        contrasted = "proto_t2i" in wanted or "proto_i2t" in wanted
        classified = "cic" in wanted and self.config.cic_over == "batch"
        if contrasted or (classified and self.prototypes is None):
            return {"owner": owner, "prompt": self.identity_prompts(owner)}
        return {"owner": owner} if classified else {}

    def _align(self, given: "_Given", person: Tensor, wanted: Mapping[str, float]) -> Slots:
        """Pseudo-words P^v and P^t of the pairs, (T, M, W), and as far as wanted their prompts v~ and t~, (T, D)."""
        prompts = {"text_prompt": "tgps", "image_prompt": "vgps"}
        asked = [name for name, loss in prompts.items() if loss in wanted]
        if not self.config.inverts or not (asked or "cmpr" in wanted):
            return {}
        if given.words is None:
            # A part without captions: as the others, with no rows.
            words = given.image.new_zeros(0, self.config.n_inst_tokens, self.backbone.width_text)
            return {"image_words": words, "text_words": words, **dict.fromkeys(asked, given.text)}
        image = self.pseudo_image(_of(given.tokens, given.row))
        text = self.pseudo_text(given.words, given.mask)
        owner, pseudo = _of(person, given.row), {"text_prompt": text, "image_prompt": image}
        return {"image_words": image, "text_words": text} | {name: self.prompted(pseudo[name], owner) for name in asked}

    # Losses

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return the stage's losses by name, each unweighted; see `current_weights`."""
        wanted = self.current_weights(stage)
        if stage == "prompt-stage":
            return self._construction(parts, wanted)
        found = self._base(parts, wanted)
        if "cic" in wanted:
            found["cic"] = self._cic(parts)
        found |= self._construction(parts, wanted) | self._alignment(parts, wanted)
        return {name: found[name] for name in wanted}

    def _base(self, parts: Parts, wanted: Mapping[str, float]) -> Slots:
        """L_base = L_sdm + L_id of v_t2i on pairs, L_tri + L_id of v_i2i on images (Eq. 2)."""
        image, words, owner = _of(parts["t2i"], parts["row"]), parts["text"], _of(parts["person"], parts["row"])
        found: Slots = {}
        if "sdm" in wanted:
            found["sdm"] = losses.sdm(image, words, owner, temperature=self.config.temperature)
        if "id_t2i" in wanted:
            found["id_t2i"] = losses.id_loss(self.classifier(image), self.classifier(words), owner)
        return found | self._base_of_images(parts, wanted)

    def _base_of_images(self, parts: Parts, wanted: Mapping[str, float]) -> Slots:
        """L_tri + L_id of v_i2i, on all images or on those without a caption."""
        uncaptioned = parts.get("uncaptioned")
        rows = slice(None) if uncaptioned is None else uncaptioned
        metric, people = parts["metric"][rows], parts["person"][rows]
        found: Slots = {}
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

    def _cic(self, parts: Parts) -> Tensor:
        """L_cic (Eq. 11), among the prompts of all people or of those in the batch."""
        config, owner = self.config, None
        if config.cic_over == "batch":
            owner = parts["owner"]
            every = parts["prompt"] if self.prototypes is None else self.prototypes[owner]
        else:
            every = self.identity_prompts() if self.prototypes is None else self.prototypes
        return prompt_losses.prompt_classification(
            parts["i2i"],
            every.to(parts["i2i"].device),
            parts["person"],
            owner,
            temperature=config.tau_prompt,
            reduction=config.cic_reduction,
        )

    def _construction(self, parts: Parts, wanted: Mapping[str, float]) -> Slots:
        """L_ic, L_t2i and L_i2t (Eq. 6-9) as far as wanted; the text half of L_ic reads pairs only."""
        found: Slots = {}
        if "ic" in wanted:
            found["ic"] = self._distance(parts["inverted_image"], parts["t2i"])
            if len(parts["text"]):
                found["ic"] = found["ic"] + self._distance(parts["inverted_text"], parts["text"])
        if "proto_t2i" in wanted or "proto_i2t" in wanted:
            both = prompt_losses.identity_contrast(
                parts["t2i"],
                parts["prompt"],
                parts["person"],
                parts["owner"],
                temperature=self.config.tau_prompt,
                positives=self.config.proto_positives,
            )
            found |= dict(zip(("proto_t2i", "proto_i2t"), both, strict=True))
        return {name: found[name] for name in CONSTRUCTION if name in wanted}

    def _alignment(self, parts: Parts, wanted: Mapping[str, float]) -> Slots:
        """L_CMPR, L_tgps and L_vgps (Eq. 10, 12) of pairs; zero for a batch without any."""
        asked = [name for name in ("cmpr", "tgps", "vgps") if name in wanted]
        text = parts["text"]
        if not asked or not len(text):
            return dict.fromkeys(asked, losses.zero(parts["t2i"]))
        if self.config.inverts:
            self._pseudo = (parts["image_words"].detach(), parts["text_words"].detach())
        found: Slots = {}
        if "cmpr" in asked:
            found["cmpr"] = prompt_losses.prompt_regularisation(parts["text_words"], parts["image_words"])
        if "tgps" in asked:
            found["tgps"] = self._ilpa(parts.get("text_prompt"), _of(parts["t2i"], parts["row"]))
        if "vgps" in asked:
            found["vgps"] = self._ilpa(parts.get("image_prompt"), text)
        return found

    def _ilpa(self, prompt: Tensor | None, feature: Tensor) -> Tensor:
        """The distance of prompts from features (T, D); without a prompt of its own, from the plain sentence."""
        detach = self.config.ilpa_detach
        prompt = self._plain(len(feature)) if prompt is None else prompt
        prompt = prompt.detach() if detach == "prompt" else prompt
        feature = feature.detach() if detach == "feature" else feature
        return self._distance(prompt, feature)

    def _distance(self, prompt: Tensor, feature: Tensor) -> Tensor:
        return prompt_losses.feature_distance(prompt, feature, space=self.config.l2_space)

    # Stage I on frozen encoders

    def frozen_features(self, batch: Batch) -> Slots:
        """Return `image` (v_t2i), `image_tokens` (F^v), `text` (t_eos) and `text_tokens` (F^t), as far as asked."""
        with torch.no_grad():
            if batch.image is not None:
                seen = self.split(self.see(batch.image))
                return {"image": seen.t2i, "image_tokens": seen.tokens}
            text = self.backbone.encode_text(batch.texts["full"])
            return {"text": text.pooled, "text_tokens": self.text_tokens(text)}

    def _frozen(self, batch: Batch) -> "_Given":
        width = self.classifier.weight.dtype
        held = {name: value.to(width) for name, value in batch.frozen.items()}
        if "image" not in held:
            held |= self.frozen_features(Batch(image=batch.require("image")))
        if not _has_texts(batch):
            return _Given.without_texts(held["image"], held["image_tokens"])
        texts = batch.texts["full"]
        if "text" not in held:
            held |= self.frozen_features(Batch(texts={"full": texts}))
        # Kept texts are as long as the longest of all: the rest of each is padding, which I_t does not read.
        words = held["text_tokens"][:, : texts.mask.shape[1]]
        return _Given(held["image"], held["image_tokens"], held["text"], batch.image_of_text(), words, texts.mask)

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
        sides = {}
        for task, names in (("t2i", TEXT_LOSSES), ("i2i", IMAGE_LOSSES)):
            members = [weights[n] * found[n] for n in names if n in found and found[n].requires_grad]
            if shared is None or not members:
                return {}
            sides[task] = torch.stack(members).sum()
        assert shared is not None
        grads = [grad for (grad,) in self.gradients(sides, [shared]).values() if grad is not None]
        if len(grads) < 2 or not all(bool(grad.norm() > 0) for grad in grads):
            return {}
        t2i, i2i = (grad.float().flatten() for grad in grads)
        return {"task_cosine": float(nn.functional.cosine_similarity(t2i, i2i, dim=0))}

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
class _Given:
    """What pseudo-words and prompts are made from, of B images and the T texts that they have.

    Attributes:
        image, text: v_t2i, (B, D), and t_eos, (T, D).
        tokens: F^v, (B, K + N, width).
        row: the image of each text, (T,).
        words: F^t, (T, L, width); None without texts.
        mask: True on real tokens, (T, L).
    """

    image: Tensor
    tokens: Tensor
    text: Tensor
    row: Tensor
    words: Tensor | None
    mask: Tensor

    @classmethod
    def without_texts(cls, image: Tensor, tokens: Tensor) -> "_Given":
        """Return what images alone give; the texts' tensors have no rows, but the widths and types of any others."""
        none = torch.zeros(0, dtype=torch.long, device=image.device)
        return cls(image, tokens, image.new_zeros(0, image.shape[1]), none, None, none.bool()[:, None])


def _has_texts(batch: Batch) -> bool:
    return "full" in batch.texts and len(batch.texts["full"]) > 0


def _of(values: Tensor, row: Tensor) -> Tensor:
    """The images' rows that texts have, one for each text; rows rise, so as many as there are images means all."""
    # A slice copies nothing, and its readers' gradients add up in the order in which an index would add them.
    return values[:] if len(row) == len(values) else values[row]


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


METHOD = Hpl
