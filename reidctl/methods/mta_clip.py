"""`mta-clip`: image-to-image retrieval over several datasets (MTA-CLIP; no paper text and no code, a README alone).

CLIP-ReID with prompts in three levels (HCP: shared, of the dataset, of the person), an adapter over the patch tokens
(SGA), losses and identity heads of each dataset by itself, and an image encoder that is trained in part (PTSO stage 2).
With HCP and SGA off, joint heads and everything trained it is `clip-reid`; with one dataset it is a training on that
dataset. Almost every number is ours: docs/methods.md lists what the README says and what we took.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from reidctl import prompt_losses
from reidctl.backbones.base import Backbone
from reidctl.batch import Batch, Roster
from reidctl.errors import UsageError
from reidctl.layers.context import HcpConfig, HierarchicalContext
from reidctl.layers.groups import GroupedBatch
from reidctl.layers.prompts import Prompt
from reidctl.layers.sga import SemanticGroupingAdapter, SgaConfig
from reidctl.methods.base import Role, unit
from reidctl.methods.clip_reid import ClipReid, ClipReidConfig, Seen
from reidctl.parts import Parts


class MtaClipConfig(ClipReidConfig):
    """Settings of `mta-clip`; the README gives none of their values."""

    hcp: HcpConfig = HcpConfig()
    sga: SgaConfig = SgaConfig()
    unfreeze_blocks: int | Literal["all"] = 4
    """Last blocks of the image encoder that stage 2 trains, with the norm and projection behind them; `all` trains the
    whole encoder, as CLIP-ReID does. "Partially unfreeze" is all that is said."""
    heads: Literal["per_domain", "joint"] = "per_domain"
    """One pair of identity heads and one list of prompts to classify among for each dataset, or for all together."""

    @field_validator("unfreeze_blocks", mode="before")
    @classmethod
    def _is_a_number_or_all(cls, value: object) -> object:
        if isinstance(value, str) and value != "all" and not value.isdigit():
            raise ValueError("a number of blocks is needed, or `all`")
        return value

    def prompt_settings(self) -> dict[str, Any]:
        """Everything that stage 1 reads of the settings."""
        whole = self.model_dump(mode="json")
        # Nothing is adapted there, so read-outs with the same projected feature share their prompts.
        same = {"concat": "cls_plus_gap", "pre_last": None}
        readout = same.get(self.sga.readout, self.sga.readout) if self.sga.enabled else None
        found = super().prompt_settings()
        found["weights"]["orth"] = self.weights.get("orth", 0.0)
        return {**found, "hcp": whole["hcp"], "sga": {"readout": readout}, "heads": whole["heads"]}


class MtaClip(ClipReid):
    """CLIP-ReID over datasets: hierarchical prompts, semantic grouping adapter, a group of people per dataset."""

    name = "mta-clip"
    summary = "CLIP-ReID over several datasets: shared and per-dataset prompts, SGA (README only, no public code)"
    Config = MtaClipConfig
    loss_weights: ClassVar = {**ClipReid.loss_weights, "orth": 0.0}
    first_stage: ClassVar = ("con", "orth")
    config: MtaClipConfig
    adapting = True
    """False reads the tokens as they are, to measure what the adapter costs."""

    def __init__(self, config: MtaClipConfig, backbone: Backbone, persons: int, roster: Roster) -> None:
        _check(config, backbone, roster)
        super().__init__(config, backbone, persons, roster)
        if self._has_adapter:
            self.sga = SemanticGroupingAdapter(backbone.width_image, config.sga)

    @property
    def _has_adapter(self) -> bool:
        return self.config.sga.enabled and self.config.sga.kind != "none"

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return self.roster.people if self.config.heads == "per_domain" else super()._groups()

    def _hidden_width(self) -> int:
        joined = self.config.sga.enabled and self.config.sga.readout == "concat"
        return self.backbone.width_image * (2 if joined else 1)

    def _build_prompts(self, config: ClipReidConfig, backbone: Backbone, persons: int) -> None:
        super()._build_prompts(config, backbone, persons)
        hcp = self.config.hcp
        if hcp.enabled:
            self.context = HierarchicalContext(
                hcp,
                self.roster.domains,
                config.n_id_tokens,
                backbone.width_text,
                lambda words: backbone.tokenize(words),
                context=backbone.context_length,
            )

    # Prompts

    @property
    def _by_domain(self) -> bool:
        """Whether images are told apart by dataset alone, because prompts have no tokens of people."""
        return self.config.hcp.enabled and self.config.hcp.layout == "domain"

    def prompt(self, tokens: Tensor, group: int) -> Prompt:
        """Return the sentences of people with these tokens (B, M, W) in a dataset."""
        if not self.config.hcp.enabled:
            return super().prompt(tokens, group)
        prompt: Prompt = self.context(self.backbone.embed_tokens, tokens, group)
        return prompt

    def domain_features(self) -> Tensor:
        """Return the text features of datasets whose prompts have no tokens of people, (K, D)."""
        first = torch.zeros(1, dtype=torch.long, device=self.id_tokens.device)
        return torch.cat([self.prompt_features(first, domain) for domain in range(len(self.roster.domains))])

    def group_texts(self, group: int) -> Tensor:
        """Return the fixed text features of a dataset's people, or of all datasets where prompts have no people."""
        if not self._by_domain or self._texts:
            return super().group_texts(group)
        with torch.no_grad():
            return self.domain_features()

    def _text_target(self, group: int, target: Tensor) -> Tensor:
        return torch.full_like(target, group) if self._by_domain else target

    def prompt_rows(self, persons: Sequence[str]) -> list[tuple[str, str, Tensor]]:
        """Return the tokens that all share, those of each dataset and those of each person, as far as there are any."""
        rows: list[tuple[str, str, Tensor]] = []
        if self.config.hcp.enabled and self.config.hcp.layout != "words":
            rows.append(("shared", "", self.context.shared))
            rows += [
                ("domain", name, tokens) for name, tokens in zip(self.roster.domains, self.context.domain, strict=True)
            ]
        return rows if self._by_domain else rows + super().prompt_rows(persons)

    # Images

    def look(self, images: Tensor, shift: Tensor | None = None) -> Seen:
        """Return the features of images; stage 1 reads the same read-out of patches that are not adapted."""
        config, adapts = self.config.sga, self._has_adapter and self.adapting and self.stage != "prompt-stage"
        if not config.enabled:
            return super().look(images, shift)
        if config.readout == "pre_last":
            seen = self.backbone.encode_image(images, shift=shift, adapt=self._adapt if adapts else None)
            return Seen(seen.previous_cls[:, 0], seen.hidden_cls[:, 0], seen.cls[:, 0])
        seen = self.backbone.encode_image(images, shift=shift)
        patches = self._watched(seen.hidden_patches)
        pooled, first = (self._adapt(patches) if adapts else patches).mean(dim=1), seen.hidden_cls[:, 0]
        joint = pooled if config.readout == "gap" else first + pooled
        hidden = torch.cat([first, pooled], dim=-1) if config.readout == "concat" else joint
        return Seen(seen.previous_cls[:, 0], hidden, self.backbone.image.project(joint))

    @property
    def reads_out(self) -> tuple[float, float]:
        """Class token and average patch alike, or what `sga.readout` says."""
        config = self.config.sga
        if not config.enabled or config.readout == "pre_last":
            return 1.0, 0.0
        return (0.0, 1.0) if config.readout == "gap" else (0.5, 0.5)

    def _adapt(self, patches: Tensor) -> Tensor:
        adapted: Tensor = self.sga(patches, self.backbone.grid)
        return adapted

    def activation(self, batch: Batch) -> Tensor:
        """Return how much each adapted patch speaks for its image's feature, (B, h, w); see `Method.activation`."""
        return self._towards(self._patches(batch), self.see(batch).proj)

    def patch_features(self, batch: Batch) -> Tensor:
        """Return every adapted patch as a unit vector of the joint space, shape (B, N, D)."""
        return unit(self._patches(batch))

    def _patches(self, batch: Batch) -> Tensor:
        """The patches as the feature reads them, in the joint space, (B, N, D)."""
        early = self._has_adapter and self.config.sga.readout == "pre_last"
        adapt = self._adapt if early else None
        hidden = self.backbone.encode_image(
            batch.require("image"), shift=self.side_of(batch), adapt=adapt
        ).hidden_patches
        adapted = self._adapt(hidden) if self._has_adapter and not early else hidden
        return self.backbone.image.project(adapted)

    # Losses

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return `con` and `orth` (stage 1), or `id`, `triplet` and `i2t` (stage 2), each summed over datasets."""
        found = super().losses_of(parts, stage)
        if "orth" in self.current_weights(stage):
            found["orth"] = self.context.orthogonality()
        return found

    def active(self, loss: str) -> bool:
        """Whether the settings ask for a loss, in whatever stage."""
        learnt = self.config.hcp.enabled and self.config.hcp.layout != "words"
        return super().active(loss) and (loss != "orth" or learnt)

    def _first_rows(self, batch: GroupedBatch) -> dict[str, Tensor]:
        """As `clip-reid`; where prompts have no people, `image` and `domain` (B,) alone."""
        if not self._by_domain:
            return super()._first_rows(batch)
        return {"image": self._kept(batch), "domain": batch.require("domain")}

    def _contrast(self, parts: Parts) -> Tensor:
        if not self._by_domain:
            return super()._contrast(parts)
        # Sentences of datasets are nobody's samples: each process computes these few.
        prompts, asked = self.domain_features(), dict(self.config.con)
        return prompt_losses.class_contrast(parts["image"], prompts, parts["domain"], **asked)

    # What trains

    def parameters_by_role(self, stage: str) -> dict[Role, list[tuple[str, nn.Parameter]]]:
        """Return the prompts in stage 1; adapter, heads and the last blocks of the image encoder in stage 2."""
        self._trained = self._unfrozen()
        return super().parameters_by_role(stage)

    def train(self, mode: bool = True) -> "MtaClip":
        """Switch to training; what a stage freezes stays without dropout."""
        super().train(mode)
        count, blocks = self.config.unfreeze_blocks, self.backbone.image.blocks
        for block in blocks[: len(blocks) - count] if count != "all" else []:
            block.eval()
        return self

    def _unfrozen(self) -> set[int] | None:
        """The `id` of every parameter of the image encoder that stage 2 trains; None: all."""
        count, image = self.config.unfreeze_blocks, self.backbone.image
        if count == "all":
            return None
        blocks = list(image.blocks)[len(image.blocks) - count :]
        return {id(value) for block in blocks for value in block.parameters()} | {id(value) for value in image.tail}

    def _role(self, name: str, parameter: nn.Parameter, stage: str) -> Role | None:
        if name.startswith("context."):
            return "prompt" if stage == "prompt-stage" else None
        if name == "id_tokens" and self._by_domain:
            return None
        role = super()._role(name, parameter, stage)
        frozen = role == "image" and self._trained is not None and id(parameter) not in self._trained
        return None if frozen else role

    # What it says about itself

    def training_report(self) -> dict[str, float]:
        """`hcp/cosine`: mean |cos(P_S, P_Dk)|; `sga/gamma`; `sga/local`, the local stream's share in [0, 1]."""
        found: dict[str, float] = {}
        if self.config.hcp.enabled:
            cosines = self.context.cosines().detach()
            found |= {"hcp/cosine": float(cosines.abs().mean())} if cosines.numel() else {}
        if self._has_adapter and self.stage != "prompt-stage":
            found |= {"sga/gamma": float(self.sga.gamma.detach()), "sga/local": float(self.sga.shares[0].detach())}
        return found

    def training_facts(self) -> dict[str, Any]:
        """The datasets with their numbers of people, and the blocks of the image encoder that train, from 1."""
        count, whole = self.config.unfreeze_blocks, len(self.backbone.image.blocks)
        first = 0 if count == "all" else whole - count
        people = {name: len(members) for name, members in zip(self.roster.domains, self.roster.people, strict=True)}
        return {"domains": people, "trained_blocks": list(range(first + 1, whole + 1))}

    def gates(self, batch: Batch) -> dict[str, Tensor]:
        """Return the adapter's gates as `sga_local` and `sga_global`, each (B, channels)."""
        if not self._has_adapter:
            return {}
        kept: list[Tensor] = []

        def keep(tokens: Tensor) -> Tensor:
            kept.append(tokens)
            return self._adapt(tokens)

        before = self.config.sga.readout == "pre_last"
        images, shift = batch.require("image"), self.side_of(batch)
        seen = self.backbone.encode_image(images, shift=shift, adapt=keep if before else None)
        found = self.sga.gates(kept[0] if before else seen.hidden_patches, self.backbone.grid)
        return {f"sga_{name}": value for name, value in found.items()}

    def extra_parts(self, batch: Batch) -> dict[str, Callable[[], Tensor]]:
        """The adapter alone, on tokens of the batch's size, and the image encoder without it."""
        if not self._has_adapter:
            return {}
        images = batch.require("image")
        tokens = torch.randn(
            len(images), self.backbone.grid[0] * self.backbone.grid[1], self.backbone.width_image, device=images.device
        )

        def without() -> Tensor:
            self.adapting = False
            try:
                return self.look(images).proj
            finally:
                self.adapting = True

        return {"sga": lambda: self._adapt(tokens), "image_without_sga": without}


def _check(config: MtaClipConfig, backbone: Backbone, roster: Roster) -> None:
    """Refuse settings that contradict each other or the training set."""
    count, whole = config.unfreeze_blocks, len(backbone.image.blocks)
    if count != "all" and not 0 <= count <= whole:
        raise UsageError(
            f"`method.unfreeze_blocks` is {count}; the image encoder has {whole} blocks.",
            hint="Give a number from 0 up to that, or `all`.",
        )
    several = len(roster.domains) > 1
    if config.i2i_feature == "bn" and several and config.heads == "per_domain":
        raise UsageError(
            "`method.i2i_feature: bn` needs one norm for all images, but every dataset has its own.",
            hint="Use `concat` or `proj`, or method.heads=joint.",
        )
    if not config.hcp.enabled:
        return
    if config.heads == "joint" and several:
        raise UsageError(
            "`method.heads: joint` classifies among people of all datasets, but prompts of HCP belong to one.",
            hint="Set method.hcp.enabled=false, or method.heads=per_domain.",
        )
    if config.hcp.layout == "domain" and not several:
        raise UsageError(
            "`method.hcp.layout: domain` has prompts of datasets alone, and there is one dataset.",
            hint="Take another layout, or train on several datasets (`reidctl data combine`).",
        )


METHOD = MtaClip
