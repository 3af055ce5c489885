"""The backbone contract: an image tower and a text tower that meet in one joint space.

Methods see only what this file names. `hidden` features are those after the tower's last layer norm, before the
projection; `cls`, `patches`, `pooled` and `tokens` are in the joint space of width D and are NOT normalised.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reidctl.backbones.attention import Alike, Isolation, Local, biased
from reidctl.backbones.tokenizers import Tokenizer
from reidctl.batch import Tokens
from reidctl.config import Section
from reidctl.errors import UsageError

Triple = tuple[float, float, float]
Shown = bool | Literal["last"]
"""Which attention probabilities are returned: none, those of all blocks, or those of the last one."""
Adapt = Callable[[Tensor], Tensor]
"""Patch tokens (B, N, width_image) to changed ones of the same shape."""


class BackboneConfig(Section):
    """Everything that rebuilds a backbone without its weights, without network and without the original files.

    Attributes:
        kind: which class; the module name with "-" for "_".
        spec: the text the user gave, for people to read.
        image_size: (height, width) in pixels.
        image, text: sizes of the two towers, in the words of the library they come from.
        dim: width D of the joint space.
        mean, std: pixel statistics of the checkpoint, for pixels in [0, 1].
        interpolation: how images were resized when the checkpoint was trained.
        pool: how the text tower makes one vector (`eos` for CLIP; `cls`, `mean` or `pooler` for BERT).
        vocabulary: the WordPiece vocabulary in order; None means the one shipped with the package.
        lower_case: whether WordPiece lower-cases.
        stride: step between patches in pixels, if they overlap.
        quick_gelu: whether CLIP's towers use x sigmoid(1.702 x) instead of GELU (OpenAI's weights do).
    """

    kind: Literal["clip", "vit-bert"]
    spec: str
    image_size: tuple[int, int]
    image: dict[str, Any]
    text: dict[str, Any]
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    pool: Literal["eos", "cls", "mean", "pooler"] = "eos"
    vocabulary: tuple[str, ...] | None = None
    lower_case: bool = True
    stride: int | None = None
    quick_gelu: bool = False


@dataclass(frozen=True)
class ImageFeatures:
    """What an image tower returns for B images, K class tokens and N = h * w patches.

    Attributes:
        cls: class tokens in the joint space, shape (B, K, D).
        patches: patch tokens through the same last norm and projection, shape (B, N, D), row-major over the grid.
        grid: (h, w).
        hidden_cls: class tokens after the last norm, shape (B, K, width_image).
        hidden_patches: patch tokens after the last norm, shape (B, N, width_image).
        previous_cls: class tokens entering the last block, shape (B, K, width_image): CLIP-ReID's third triplet
            feature.
        attention: per block (B, heads, K + N, K + N), rows sum to 1, differentiable; None unless asked for, and of the
            last block alone if only that was.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]
    hidden_cls: Tensor
    hidden_patches: Tensor
    previous_cls: Tensor
    attention: list[Tensor] | None = None


@dataclass(frozen=True)
class TextFeatures:
    """What a text tower returns for B texts of L tokens.

    Attributes:
        pooled: one vector per text in the joint space, shape (B, D).
        tokens: every token in the joint space, shape (B, L, D); rows outside the mask are meaningless.
        hidden: every token after the last norm, shape (B, L, width_text).
        attention: per block (B, heads, L, L); None unless asked for.
    """

    pooled: Tensor
    tokens: Tensor
    hidden: Tensor
    attention: list[Tensor] | None = None


class Tower(nn.Module, ABC):
    """What both towers share: a stack of blocks that can be run one by one."""

    width: int
    checkpointing = False
    recorded: list[Tensor] | None = None
    """Where each pass leaves its attention probabilities, block by block; see `recording`."""
    record_from = 0
    """The first block that `recorded` holds."""
    compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """What runs a block in training in place of `run_block`, with the same result; see `training.compiling`."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The Transformer blocks in order."""

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """Map hidden features (..., width) to the joint space (..., D)."""

    @abstractmethod
    def run_block(
        self,
        block: nn.Module,
        tokens: Tensor,
        mask: Tensor | None,
        attention: bool,
        alike: Alike | None = None,
        classes: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's output tokens (B, T, width) and its attention probabilities if asked for.

        With `alike` the tokens behind the first `classes` compare keys with keys, or values with values.
        """

    def through(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what `run_block` does, by the compiled form of it in training, if there is one."""
        return self.run_block(block, *inputs) if self.compiled is None else self.compiled(block, *inputs)

    def run_blocks(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        attention: Shown,
        before_last: Adapt | None = None,
        local: Local | None = None,
        classes: int = 0,
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        """Return the tokens after the last block, the tokens that entered it, and the attention maps asked for.

        `before_last` changes all tokens in front of the last block; `local` is about the tokens behind `classes`.
        """
        maps: list[Tensor] = []
        recorded = self.recorded
        if recorded is not None:
            recorded.clear()
        previous = tokens
        count = len(self.blocks)
        for number, block in enumerate(self.blocks):
            if before_last is not None and number == count - 1:
                tokens = before_last(tokens)
            previous = tokens
            near, alike = _local(local, mask, count - number, classes)
            kept = attention is True or (attention == "last" and number == count - 1)
            record = recorded is not None and number >= self.record_from
            if self.checkpointing and self.training and not (kept or record):
                tokens, _ = checkpoint(self.through, block, tokens, near, False, alike, classes, use_reentrant=False)
                continue
            run = self.through if self.training and not (kept or record) else self.run_block
            tokens, probabilities = run(block, tokens, near, kept or record, alike, classes)
            if probabilities is not None and kept:
                maps.append(probabilities)
            if probabilities is not None and recorded is not None and record:
                recorded.append(probabilities)
        return tokens, previous, maps if attention else None


def _local(local: Local | None, mask: Tensor | None, left: int, classes: int) -> tuple[Tensor | None, Alike | None]:
    """The mask and the kind of comparison in the block with `left` - 1 blocks behind it."""
    if local is None:
        return mask, None
    near = mask if local.bias is None or left > local.blocks else biased(mask, local.bias, classes)
    return near, local.alike if left == 1 else None


@contextmanager
def recording(tower: Tower, start: int = 0) -> Iterator[list[Tensor]]:
    """Let every pass through a tower leave its attention probabilities in a list, whoever calls it.

    The list holds those of the last pass, (B, heads, T, T) of each block from `start` on (negative: from the end), and
    they are what the output was computed from, so it can be differentiated by them.
    """
    before = tower.recorded, tower.record_from
    tower.recorded, tower.record_from = [], start if start >= 0 else len(tower.blocks) + start
    try:
        yield tower.recorded
    finally:
        tower.recorded, tower.record_from = before


@contextmanager
def dropping(tower: "ImageTower", keep: Tensor) -> Iterator[None]:
    """Let every pass through an image tower drop the patches with False in `keep`, bool (B, N), whoever calls it."""
    before = tower.kept
    tower.kept = keep
    try:
        yield
    finally:
        tower.kept = before


def fill_dropped(patches: Tensor, keep: Tensor | None) -> Tensor:
    """Return patch features (B, N, width) with those of dropped patches replaced by the mean of the kept ones.

    What a dropped patch's own output says comes from nowhere but itself; a method that averages patches would read it.
    """
    if keep is None:
        return patches
    weight = keep[..., None].to(patches.dtype)
    mean = (patches * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(keep[..., None], patches, mean)


class ImageTower(Tower):
    """A Vision Transformer for one input size."""

    image_size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    kept: Tensor | None = None
    """Patches that every pass keeps, bool (B, N); see `dropping`."""

    @property
    @abstractmethod
    def class_token(self) -> Tensor:
        """The class embedding, shape (width,): what an extra class token starts as a copy of."""

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """The norm in front of the last block's attention (Grad-CAM reads its output)."""

    @property
    @abstractmethod
    def tail(self) -> Sequence[nn.Parameter]:
        """The parameters behind the last block: the last norm and the projection."""

    @property
    @abstractmethod
    def last_mlp_weight(self) -> nn.Parameter:
        """The output weight of the last block's MLP: the last weight that all image losses share (GradNorm)."""

    @abstractmethod
    def encode(
        self,
        images: Tensor,
        *,
        extra_cls: Tensor | None = None,
        isolation: Isolation = "none",
        keep: Tensor | None = None,
        attention: Shown = False,
        shift: Tensor | None = None,
        adapt: Adapt | None = None,
        local: Local | None = None,
    ) -> ImageFeatures:
        """See `Backbone.encode_image`."""


class TextTower(Tower):
    """A text Transformer that takes token ids or embeddings."""

    context_length: int

    @abstractmethod
    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return token embeddings (B, L, width) without positions."""

    @abstractmethod
    def encode_embedded(
        self, embeddings: Tensor, mask: Tensor, eos_index: Tensor | None = None, *, attention: bool = False
    ) -> TextFeatures:
        """See `Backbone.encode_embedded`."""


class Backbone(nn.Module):
    """An image tower, a text tower and the tokenizer that belongs to it.

    The towers are modules of their own: `backbone.image.parameters()` are the image weights, and
    `copy.deepcopy(backbone.text)` is a second text encoder with the same methods.
    """

    def __init__(self, config: BackboneConfig, *, image: ImageTower, text: TextTower, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.text = text
        self.tokenizer = tokenizer
        self.image_size = config.image_size
        self.grid = image.grid
        self.mean, self.std = config.mean, config.std
        self.width_image, self.width_text, self.dim = image.width, text.width, config.dim
        self.context_length = text.context_length

    @property
    def interpolation(self) -> Literal["bilinear", "bicubic"]:
        """How images are resized before they are encoded."""
        return self.config.interpolation

    def prepare_images(
        self, *, mean: Triple, std: Triple, interpolation: Literal["bilinear", "bicubic"] | None = None
    ) -> None:
        """Take other pixel statistics, or another way to resize, than the checkpoint's; saved with the model."""
        changed = {"mean": mean, "std": std, "interpolation": interpolation or self.config.interpolation}
        self.config = self.config.replace(**changed)
        self.mean, self.std = mean, std

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return the texts as tokens on the CPU, padded at the right to the longest of them.

        Longer texts than `context_length` lose their end but keep the final special token.
        """
        return self.tokenizer(texts)

    def truncation_rate(self, texts: Sequence[str]) -> float:
        """Return the fraction of texts in [0, 1] that `tokenize` cuts; 0.0 for no texts."""
        return self.tokenizer.truncation_rate(texts)

    def tokenize_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) characters of `text`, half-open, for each token that `tokenize` keeps.

        Special tokens have empty spans.
        """
        return self.tokenizer.offsets(text)

    def encode_image(
        self,
        images: Tensor,
        *,
        extra_cls: Tensor | None = None,
        isolation: Isolation = "none",
        keep: Tensor | None = None,
        attention: Shown = False,
        shift: Tensor | None = None,
        adapt: Adapt | None = None,
        local: Local | None = None,
    ) -> ImageFeatures:
        """Return class and patch features of images.

        Args:
            images: normalised with `mean` and `std`, shape (B, 3, H, W) with (H, W) = `image_size`.
            extra_cls: further class tokens, shape (K - 1, width_image); they share the first one's position, so they
                differ from it only by content.
            isolation: "none" (every token sees every token), "cls" (class tokens do not see each other) or "full"
                (patches do not see class tokens either: no path between class tokens is left).
            keep: bool (B, N); patches with False are dropped: no token attends to them, and their outputs are the mean
                of those of the kept ones.
            attention: also return the attention probabilities of every block (slower, quadratic memory) or the last.
            shift: added to the class token of each image, shape (B, width_image): what is known about the image beside
                its pixels, such as its camera (CLIP-ReID's side information embedding).
            adapt: changes the patch tokens (B, N, width_image) that enter the last block; class tokens see the result.
            local: how patches may look at each other; None: as they were trained to.

        Raises:
            UsageError: the images are not of `image_size`.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise UsageError(
                f"Images of {images.shape[-2]}x{images.shape[-1]} pixels for a backbone of "
                f"{self.image_size[0]}x{self.image_size[1]}.",
                hint="Resize the images, or build the backbone with that image_size.",
            )
        return self.image.encode(
            images,
            extra_cls=extra_cls,
            isolation=isolation,
            keep=self.image.kept if keep is None else keep,
            attention=attention,
            shift=shift,
            adapt=adapt,
            local=local,
        )

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, width_text) of token ids (B, L), before positions are added."""
        return self.text.embed_tokens(ids)

    def encode_embedded(
        self, embeddings: Tensor, mask: Tensor, eos_index: Tensor | None = None, *, attention: bool = False
    ) -> TextFeatures:
        """Return text features of embeddings: soft prompts enter here.

        Args:
            embeddings: shape (B, L, width_text), before positions, L <= `context_length`.
            mask: bool (B, L), True on real tokens, which come first (padding at the right).
            eos_index: int64 (B,), position of the end token; default: the last real token. Ignored by BERT.
        """
        if embeddings.shape[1] > self.context_length:
            raise UsageError(f"A text of {embeddings.shape[1]} tokens for a context of {self.context_length}.")
        return self.text.encode_embedded(embeddings, mask, eos_index, attention=attention)

    def encode_text(self, tokens: Tokens, *, attention: bool = False) -> TextFeatures:
        """Return text features of token ids; the same as `encode_embedded(embed_tokens(ids), mask)`."""
        return self.encode_embedded(self.embed_tokens(tokens.ids), tokens.mask, attention=attention)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass: less memory, about a third more time."""
        self.image.checkpointing = self.text.checkpointing = enable


def check_stride(stride: int, patch: int) -> None:
    """Refuse a step between patches that leaves pixels unread.

    Raises:
        UsageError: it is not between 1 and the patch size.
    """
    if not 1 <= stride <= patch:
        raise UsageError(
            f"A stride of {stride} pixels does not fit patches of {patch}.", hint=f"Give a number from 1 to {patch}."
        )


def last_real(mask: Tensor) -> Tensor:
    """Return the index (B,) of the last real token of each text."""
    return mask.sum(dim=1) - 1


def join_class_tokens(first: Tensor, extra: Tensor | None, batch: int, shift: Tensor | None = None) -> Tensor:
    """Return the class tokens (B, K, width): the tower's own one first, then the extra ones, each plus `shift`."""
    stacked = first[None] if extra is None else torch.cat([first[None], extra.to(first.dtype)])  # (K, width)
    joined = stacked.expand(batch, -1, -1)
    return joined if shift is None else joined + shift[:, None].to(first.dtype)


def of_patches(adapt: Adapt | None, classes: int, keep: Tensor | None = None) -> Adapt | None:
    """Return a change of patch tokens as one of all tokens that leaves the first `classes` of them alone.

    It sees the mean of the kept patches where one is dropped.
    """
    if adapt is None:
        return None
    return lambda tokens: torch.cat([tokens[:, :classes], adapt(fill_dropped(tokens[:, classes:], keep))], dim=1)
