"""`bdam`: bidirectional decoupled alignment with gated Mamba fusion, from two versions of one unpublished paper.

"001" is the ICME submission (*... from Transient Attributes*), "002" the longer one (*... from Clothing*). They share
one architecture and contradict each other in places; the recipes `bdam-icme` and `bdam-long` follow one each and `bdam`
is our own choice between them. docs/methods.md lists every point where the papers are silent and what we took.
"""

import difflib
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from reidctl import losses
from reidctl.backbones.base import Backbone, last_real
from reidctl.batch import Batch, Tokens
from reidctl.console import log
from reidctl.errors import UsageError
from reidctl.layers.decoupling import CrossAttention, Decoupling, Streams
from reidctl.layers.fusion import Fusion, FusionSettings, gate_balance, gate_entropy
from reidctl.layers.gradnorm import GradNorm, GradNormConfig
from reidctl.layers.grl import reverse_gradient
from reidctl.layers.matching import Encoded, MatchHead, matching_pairs
from reidctl.layers.settings import HsicConfig, InfoNceConfig, TripletConfig
from reidctl.layers.shared import AUTO, LAST_MLP, SharedLayer
from reidctl.methods.base import Method, MethodConfig, Role, TargetText, unit
from reidctl.parts import Parts

Protocol = Literal["image_only", "own_text", "visual", "pairwise"]
ClothingLoss = Literal["aln", "adv", "grl"]


class BdamConfig(MethodConfig):
    """Settings of `bdam`; the defaults are the recipe `bdam`."""

    decouple: bool = True
    """False is the papers' baseline "w/o BDAM": the average of the patch tokens, no streams."""
    depth: int = 6
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    cross_attention: CrossAttention = "after"
    gate: bool = True
    clothing_loss: tuple[ClothingLoss, ...] = ("aln", "grl")
    """`aln` pulls the clothing stream to its text (001), `adv` pushes it away (002, literal), `grl` lets a critic read
    clothing from the identity stream and reverses its gradient (our reading of what both papers want)."""
    clothing_temperature: float = 0.05
    p_pos: Literal["softmax", "sigmoid"] = "softmax"
    mask_duplicates: bool = True
    """Leave other people's identical texts out of the negatives of the clothing losses and of `match`."""
    grl_strength: float = 0.1
    protocol: Protocol = "image_only"
    """What is compared: `image_only` F(image, null) with F(null, text); `own_text` F(image, text written from that
    image) with F(null, text); `visual` the projected identity feature with the text feature (002 Eq. 3); `pairwise` is
    `image_only` and a match head on F(image, text) that re-ranks its first items."""
    target: TargetText = "mix"
    """Which text plays t_i in training; `mix` draws caption or identity+clothing with p = 1/2. A described text never
    meets a fused feature: with those alone F(image, text) is trained by `match` or not at all."""
    text_pool: Literal["cls", "mean", "end"] = "cls"
    fusion: FusionSettings = FusionSettings()
    hsic: HsicConfig = HsicConfig()
    info_nce: InfoNceConfig = InfoNceConfig()
    triplet: TripletConfig = TripletConfig()
    gradnorm: GradNormConfig | None = GradNormConfig(ref="mean", targets="feasible")
    """None uses fixed weights; `layer` says where gradients are measured. As printed (reference: the first task) the
    weights of the others fall to the clip within some hundred steps (tests/layers/test_gradnorm.py), so only
    `bdam-icme` and `bdam-long` take it literally."""
    freeze: tuple[Literal["image", "text"], ...] = ()
    """Encoders that keep their starting weights, without dropout; the papers do not say whether any does."""
    gate_regulariser: Literal["none", "balance", "entropy"] = "none"
    """002 names "gate regularization" without a formula; its numbers are those of 001's weight regulariser, so the
    ablation is `gradnorm.weight_reg: 0`. `balance` and `entropy` are `gate_balance` and `gate_entropy` of
    `layers.fusion`."""


class Bdam(Method):
    """Identity and clothing streams, decorrelated; only the identity stream is fused and retrieved."""

    name = "bdam"
    summary = "identity/clothing decoupling, HSIC, GradNorm, Mamba fusion (two unpublished versions)"
    Config = BdamConfig
    loss_weights: ClassVar = {
        "info": 1.0,
        "triplet": 1.0,
        "aln": 1.0,
        "adv": 1.0,
        "grl": 1.0,
        "decouple": 1.0,
        "gate": 0.01,
        "match": 1.0,
    }
    config: BdamConfig

    def __init__(self, config: BdamConfig, backbone: Backbone, persons: int) -> None:
        super().__init__(config, backbone, persons)
        if config.text_pool == "cls" and backbone.config.pool == "eos":
            raise UsageError(
                "The first token of a CLIP text tower sees nothing but itself.", hint="Use method.text_pool=end."
            )
        if config.protocol == "own_text" and config.target not in ("caption", "mix"):
            raise UsageError(
                f"With protocol own_text the gallery holds described texts; method.target={config.target} would train "
                "on finding those very texts.",
                hint="Use method.target=caption.",
            )
        width, text_width = backbone.width_image, backbone.width_text
        if config.decouple:
            self.decoupling = Decoupling(
                width,
                depth=config.depth,
                heads=config.heads,
                cross_attention=config.cross_attention,
                gated=config.gate,
                mlp_ratio=config.mlp_ratio,
                dropout=config.dropout,
            )
            self.clothing_head = nn.Linear(width, text_width)
        if self.active("grl"):
            self.critic = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, text_width))
        self.fusion = Fusion(width, text_width, **config.fusion.model_dump())
        if config.protocol == "visual":
            self.visual_head = nn.Linear(width, text_width)
        if self.active("match"):
            self.match_head = MatchHead(config.fusion.out_dim)
        # The critic's loss never falls for long: it is an adversary. GradNorm would read that as a task that needs more
        # and more weight, so the critic keeps its fixed one.
        names = [name for name in self.loss_weights if self.active(name) and name != "grl"]
        self.balancer = GradNorm(names, config.gradnorm) if config.gradnorm and names else None
        self._balanced: dict[str, float] = {}
        self.layer = self._layer(config.gradnorm, names) if config.gradnorm and names else None

    def _layer(self, config: GradNormConfig, tasks: list[str]) -> SharedLayer:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        if config.layer not in (LAST_MLP, AUTO, *self._trained()):
            known = [LAST_MLP, AUTO, *self._trained()]
            near = difflib.get_close_matches(config.layer, known, n=1, cutoff=0.0)[0]
            frozen = " that trains" if config.layer in names.values() else ""
            raise UsageError(f"There is no parameter `{config.layer}`{frozen}.", hint=f"Did you mean `{near}`?")
        return SharedLayer(config.layer, tasks, names[id(self.backbone.image.last_mlp_weight)])

    def active(self, loss: str) -> bool:
        """Whether the settings ask for a loss."""
        config = self.config
        if loss in ("aln", "adv", "grl"):
            return config.decouple and loss in config.clothing_loss and super().active(loss)
        if loss == "decouple":
            return config.decouple and super().active(loss)
        if loss == "gate":
            balance = config.gate_regulariser == "balance" and config.fusion.gate
            entropy = config.gate_regulariser == "entropy" and config.decouple and config.gate
            return (balance or entropy) and super().active(loss)
        if loss == "match":
            return config.protocol == "pairwise" and super().active(loss)
        return super().active(loss)

    @property
    def train_texts(self) -> tuple[str, ...]:
        """The caption, or what plays it, and the two described texts."""
        return ("full", "identity", "clothing")

    @property
    def reads_out(self) -> tuple[float, float]:
        """Patches alone: 002 drops the class token."""
        return 0.0, 1.0

    @property
    def gallery_texts(self) -> tuple[str, ...]:
        """`own_text` reads the identity text that was written from the gallery image alone."""
        return ("identity",) if self.config.protocol == "own_text" else ()

    @property
    def target_text(self) -> TargetText:
        """With `own_text` the query must not be the text that sits in the gallery, so it is the caption."""
        return "caption" if self.config.protocol == "own_text" else self.config.target

    def streams(self, image: Tensor) -> Streams:
        """Return the decoupled features of images (B, 3, H, W); the class token is dropped, as 002 says."""
        patches = self.backbone.encode_image(image).hidden_patches  # (B, N, D)
        if self.config.decouple:
            streams: Streams = self.decoupling(patches)
            return streams
        pooled = patches.mean(dim=1)
        return Streams(pooled, pooled, pooled, pooled, None, patches)

    def text_features(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return one vector per text (B, W) and all its token features (B, L, W)."""
        hidden = self.backbone.encode_text(tokens).hidden
        if self.config.text_pool == "cls":
            return hidden[:, 0], hidden
        if self.config.text_pool == "end":
            return hidden[torch.arange(len(hidden), device=hidden.device), last_real(tokens.mask)], hidden
        share = tokens.mask / tokens.mask.sum(dim=1, keepdim=True)
        return torch.einsum("bl,blw->bw", share, hidden), hidden

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return what the active losses read of B samples; what none of them reads is left out.

        `person` (B,); `identity` and `clothing`, the gated streams (B, D); the tensors of `_encode_matching` and
        `_encode_clothing`; and `usable` (M,): the samples whose `fused` may be read.
        """
        rows = {"person": batch.require("person")}
        matching, clothing = self._any_active("info", "gate", "match"), self._any_active("aln", "adv", "grl")
        if matching:
            # The one question to the device, asked before there is work that the answer would have to wait for.
            rows["usable"] = batch.fused_samples()
        streams = self.streams(batch.require("image"))
        if matching:
            rows |= self._encode_matching(batch, streams)
        if clothing:
            rows |= self._encode_clothing(batch, streams)
        if self._any_active("triplet", "grl", "decouple"):
            rows["identity"] = streams.identity
        if self.active("decouple"):
            rows["clothing"] = streams.clothing
        return Parts(rows, {"usable": "fused"} if matching else {})

    def _any_active(self, *names: str) -> bool:
        return any(self.active(name) for name in names)

    def _encode_matching(self, batch: Batch, streams: Streams) -> dict[str, Tensor]:
        """What images and texts are compared by.

        `image` as in the gallery and its `query`; `fused`, the image with the identity text of ANOTHER image of the
        person, and its `key`; `gate`, if it is regularised.
        """
        full, other = batch.texts["full"], batch.texts["fusion"]
        text, text_tokens = self.text_features(full)
        key = self.fusion(None, text, text_tokens=text_tokens, text_mask=full.mask).feature
        mate, mate_tokens = self.text_features(other)
        fused = self.fusion(
            streams.identity,
            mate,
            image_tokens=streams.identity_tokens,
            text_tokens=mate_tokens,
            text_mask=other.mask,
        )
        image = self._image_feature(streams, batch)
        rows = {"image": image, "key": key, "fused": fused.feature}
        if self.config.protocol == "visual":
            rows["query"] = text
        if self.active("gate"):
            gate = fused.weights if self.config.gate_regulariser == "balance" else streams.gate
            assert gate is not None
            rows["gate"] = gate
        if self.active("match"):
            rows |= self.fusion.encode_text(text, text_tokens, full.mask).rows("pair_text")
            rows |= self.fusion.encode_image(streams.identity, streams.identity_tokens).rows("pair_image")
            # Joined parts are padded with 0, which is a word of some vocabularies.
            rows["words"] = (full.ids + 1).masked_fill(~full.mask, 0)
        return rows

    def _encode_clothing(self, batch: Batch, streams: Streams) -> dict[str, Tensor]:
        """`described`, the clothing texts (B, W), their `group` (B,), and `worn`, the clothing seen (B, W)."""
        rows = {"described": self.text_features(batch.texts["clothing"])[0]}
        if self.config.mask_duplicates:
            rows["group"] = batch.require("clothing_group")
        if self._any_active("aln", "adv"):
            rows["worn"] = self.clothing_head(streams.pooled_clothing)
        return rows

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return the active ones of `info`, `triplet`, `aln`, `adv`, `grl`, `decouple`, `gate`, `match`.

        `match` and the triplet loss with random mining draw from the process-wide generator.
        """
        makers = {
            "info": self._info,
            "gate": self._gate,
            "match": self._match,
            "triplet": self._triplet,
            "aln": self._aln,
            "adv": self._adv,
            "grl": self._grl,
            "decouple": self._decouple,
        }
        found = {name: make(parts) for name, make in makers.items() if self.active(name)}
        return {name: found[name] for name in self.loss_weights if name in found}

    def _info(self, parts: Parts) -> Tensor:
        """InfoNCE of the images as they are retrieved, and of fused features, against the texts."""
        person, usable, key = parts["person"], parts["usable"], parts["key"]
        query = parts["query"] if self.config.protocol == "visual" else key
        alone = self._info_nce(parts["image"], query, person)
        together = self._info_nce(parts["fused"][usable], key[usable], person[usable])
        share = self.config.info_nce.fused_share
        return (1 - share) * alone + share * together

    def _info_nce(self, image: Tensor, text: Tensor, person: Tensor) -> Tensor:
        settings = self.config.info_nce
        return losses.info_nce(
            image,
            text,
            temperature=settings.temperature,
            positives=person if settings.positives == "id" else None,
            direction="both" if settings.direction == "both" else "q2k",
            multiple=settings.multiple,
        )

    def _gate(self, parts: Parts) -> Tensor:
        regulariser = gate_balance if self.config.gate_regulariser == "balance" else gate_entropy
        return regulariser(parts["gate"])

    def _match(self, parts: Parts) -> Tensor:
        wrong = parts["person"][:, None] != parts["person"]
        if self.config.mask_duplicates:
            wrong = wrong & (parts["words"][:, None] != parts["words"]).any(dim=-1)
        # Similarity only steers the draw.
        gallery, texts = parts["image"].detach(), parts["key"].detach()
        similarity = torch.cosine_similarity(gallery[:, None], texts[None], -1)
        image, text, label = matching_pairs(similarity, wrong, self.config.info_nce.temperature)
        pairs = Encoded.of(parts, "pair_image")[image], Encoded.of(parts, "pair_text")[text]
        return losses.match(self.match_head(self.fusion.mix(*pairs).feature), label)

    def _triplet(self, parts: Parts) -> Tensor:
        settings, identity = self.config.triplet, parts["identity"]
        return losses.batch_hard_triplet(
            functional.normalize(identity, dim=-1) if settings.normalize else identity,
            parts["person"],
            margin=settings.margin,
            squared=settings.squared,
            mining=settings.mining,
        )

    def _aln(self, parts: Parts) -> Tensor:
        return self._alignment(parts, parts["worn"], parts["described"])

    def _grl(self, parts: Parts) -> Tensor:
        # The texts are a fixed target here: an adversary must not be beaten by blurring what it aims at.
        guess = self.critic(reverse_gradient(parts["identity"], self.config.grl_strength))
        return self._alignment(parts, guess, parts["described"].detach())

    def _alignment(self, parts: Parts, seen: Tensor, text: Tensor) -> Tensor:
        temperature = self.config.clothing_temperature
        return losses.clothing_alignment(seen, text, temperature=temperature, group=parts.get("group"))

    def _adv(self, parts: Parts) -> Tensor:
        config, group = self.config, parts.get("group")
        return losses.clothing_adversarial(
            parts["worn"],
            parts["described"],
            temperature=config.clothing_temperature,
            p_pos=config.p_pos,
            group=group,
        )

    def _decouple(self, parts: Parts) -> Tensor:
        settings = self.config.hsic
        return losses.hsic(parts["identity"], parts["clothing"], kernel=settings.kernel, normalize=settings.normalize)

    def train(self, mode: bool = True) -> "Bdam":
        """Switch to training; frozen encoders stay without dropout."""
        super().train(mode)
        for side in self.config.freeze:
            getattr(self.backbone, side).eval()
        return self

    def parameters_by_role(self, stage: str) -> dict[Role, list[tuple[str, nn.Parameter]]]:
        """Return the parameters that train: all but those of frozen encoders."""
        roles = super().parameters_by_role(stage)
        return {role: [] if role in self.config.freeze else members for role, members in roles.items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return dict(itertools.chain.from_iterable(self.parameters_by_role(self.stages[0]).values()))

    def shared_weight(self) -> nn.Parameter | None:
        """Where GradNorm measures, or would like to before it has chosen; without it the last image MLP's output."""
        if self.layer is None:
            return super().shared_weight()
        name = self.layer.name or self.layer.wanted
        weight = None if name is None else self.get_parameter(name)
        return weight if weight is not None and weight.requires_grad else None

    def gradient_norms(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the norms at the layer where GradNorm measures them."""
        self._choose_layer(losses)
        return super().gradient_norms(losses)

    @property
    def balances(self) -> bool:
        """With GradNorm."""
        return self.balancer is not None

    def _choose_layer(self, losses: Mapping[str, Tensor]) -> None:
        if self.layer is None or self.balancer is None or not self.training:
            return
        if self.layer.choose(losses, self._trained(), wait=self.balancer.warming, gradients=self.gradients):
            why = f": {self.layer.reason}" if self.layer.reason else ""
            log.info(f"GradNorm measures gradients at `{self.layer.name}`{why}.")

    def training_facts(self) -> dict[str, Any]:
        """Where GradNorm measured gradients; None with fixed weights."""
        return {"gradnorm_layer": self.layer.name if self.layer is not None else None}

    def training_report(self) -> dict[str, float]:
        """GradNorm's loss `gradnorm`, per task `ratio/` (r_k) and `pull/` (w_k |grad L_k|), when it last balanced."""
        shown = {"gradnorm": "gradnorm", "ratio": "ratio/", "gradient": "pull/"}
        kinds = {name: name.partition("_") for name in self._balanced}
        return {
            f"{shown[kind]}{task}": self._balanced[name] for name, (kind, _, task) in kinds.items() if kind in shown
        }

    def objective(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, with GradNorm's weights times the fixed ones if it is on."""
        scaled = {name: self.weight(name) * value for name, value in losses.items()}
        if self.balancer is None:
            return torch.stack(list(scaled.values())).sum()
        raw = {name: value for name, value in losses.items() if name in self.balancer.tasks}
        if self.training:
            # The balancer sees unweighted losses: it would undo the fixed weights, which multiply its own.
            self._choose_layer(losses)
            report = self.balancer.step(raw, self.shared_weight(), gradients=self.gradients)
            self._balanced = report if "gradnorm" in report else self._balanced
        total = self.balancer.combine({name: scaled[name] for name in raw})
        return total + scaled["grl"] if "grl" in scaled else total

    def current_weights(self, stage: str = "finetune") -> dict[str, float]:
        """The fixed weight of each loss times GradNorm's."""
        fixed = super().current_weights(stage)
        if self.balancer is None:
            return fixed
        balanced = self.balancer.weights()
        return {name: value * balanced.get(name, 1.0) for name, value in fixed.items()}

    def training_state(self) -> dict[str, Any]:
        """GradNorm's log-weights, first losses, optimiser and layer."""
        if self.balancer is None or self.layer is None:
            return {}
        return {"balancer": self.balancer.state_dict(), "layer": self.layer.state_dict()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore GradNorm."""
        if self.balancer is not None and self.layer is not None:
            self.balancer.load_state_dict(state["balancer"])
            self.layer.load_state_dict(state["layer"])

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit vectors of the images under the protocol, shape (B, D)."""
        return unit(self._image_feature(self.streams(batch.require("image")), batch))

    def _image_feature(self, streams: Streams, batch: Batch) -> Tensor:
        if self.config.protocol == "visual":
            projected: Tensor = self.visual_head(streams.identity)
            return projected
        if self.config.protocol == "own_text":
            own = batch.texts["identity"]
            text, tokens = self.text_features(own)
            mask: Tensor | None = own.mask
        else:
            text = tokens = mask = None  # type: ignore[assignment]
        feature: Tensor = self.fusion(
            streams.identity, text, image_tokens=streams.identity_tokens, text_tokens=tokens, text_mask=mask
        ).feature
        return feature

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit vectors of the texts under the protocol, shape (B, D)."""
        text, tokens = self.text_features(batch.texts["full"])
        if self.config.protocol == "visual":
            return unit(text)
        return unit(self.fusion(None, text, text_tokens=tokens, text_mask=batch.texts["full"].mask).feature)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return `embedding`, `identity` (f_id, gated) and, with streams, `clothing` (f_clo, gated) and both ungated.

        The ungated ones are `pooled_identity` and `pooled_clothing`. Without streams `identity` is the average of the
        patch tokens.
        """
        streams = self.streams(batch.require("image"))
        found = {"embedding": unit(self._image_feature(streams, batch)), "identity": streams.identity.float()}
        if self.config.decouple:
            for name in ("clothing", "pooled_identity", "pooled_clothing"):
                found[name] = getattr(streams, name).float()
        return found

    @property
    def scores_pairs(self) -> bool:
        """With protocol `pairwise`, unless its loss has weight 0."""
        return self.active("match")

    def encode_pair_images(self, batch: Batch) -> Encoded:
        """Return the identity streams of the images, aligned; reads no text."""
        self.require_pairs()
        streams = self.streams(batch.require("image"))
        return self.fusion.encode_image(streams.identity, streams.identity_tokens)

    def encode_pair_texts(self, batch: Batch) -> Encoded:
        """Return the texts `full`, aligned."""
        self.require_pairs()
        return self.fusion.encode_text(*self.text_features(batch.texts["full"]), batch.texts["full"].mask)

    def pair_scores(self, image: Encoded, text: Encoded) -> Tensor:
        """Return the match head's log-odds of F(image, text), shape (P,)."""
        self.require_pairs()
        odds: Tensor = self.match_head(self.fusion.mix(image, text).feature)
        return odds.float()

    def gates(self, batch: Batch) -> dict[str, Tensor]:
        """Return per sample: `identity` (mean of g), and the fusion weights `image` and `text`, each (B,).

        The fusion weights are those of the image fused with its own identity text if the batch carries it.
        """
        streams = self.streams(batch.require("image"))
        found = {} if streams.gate is None else {"identity": streams.gate.mean(dim=1)}
        if "identity" in batch.texts:
            text, tokens = self.text_features(batch.texts["identity"])
            mask = batch.texts["identity"].mask
            weights = self.fusion(
                streams.identity, text, image_tokens=streams.identity_tokens, text_tokens=tokens, text_mask=mask
            ).weights
            found |= {"image": weights[:, 0], "text": weights[:, 1]}
        return found

    def patch_features(self, batch: Batch) -> Tensor:
        """Return every identity token taken as if it were the whole image, unit vectors, (B, N, W)."""
        tokens = self.streams(batch.require("image")).identity_tokens
        count, patches, _ = tokens.shape
        each = tokens.flatten(0, 1)  # (B * N, D)
        if self.config.protocol == "visual":
            features = self.visual_head(each)
        else:
            features = self.fusion(each, None, image_tokens=each[:, None]).feature
        return unit(features).view(count, patches, -1)


METHOD = Bdam
