"""ViT and BERT: the encoders of BDAM, computed here, with weights and tokenizer from transformers.

The towers are our own because attention maps, isolated class tokens and soft prompts need the inside of a block, and
transformers renames that inside between releases; a trained run must outlive such a release. Their outputs equal
`ViTModel` and `BertModel` to 1e-5.
"""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reidctl.backbones.attention import Alike, Isolation, Local, attend, attend_alike, split_heads, token_mask
from reidctl.backbones.base import (
    Adapt,
    Backbone,
    BackboneConfig,
    ImageFeatures,
    ImageTower,
    Shown,
    TextFeatures,
    TextTower,
    Tower,
    check_stride,
    fill_dropped,
    join_class_tokens,
    of_patches,
)
from reidctl.backbones.tokenizers import WordPieceTokenizer
from reidctl.config import Section
from reidctl.errors import DataError, UsageError

Pool = Literal["cls", "mean", "pooler"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class VitSize(Section):
    """Sizes of a ViT, in the words of transformers' `ViTConfig`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    patch_size: int = 16
    qkv_bias: bool = True


class BertSize(Section):
    """Sizes of a BERT, in the words of transformers' `BertConfig`."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


# Descriptions are long; 128 tokens is the BERT length BDAM's texts need, and half the cost of 512.
DEFAULT_CONTEXT = 128


class EncoderBlock(nn.Module):
    """One Transformer block, with the norms in front (ViT) or behind (BERT)."""

    def __init__(self, size: VitSize | BertSize, *, pre_norm: bool, qkv_bias: bool = True) -> None:
        super().__init__()
        width, eps = size.hidden_size, size.layer_norm_eps
        if size.hidden_act not in _ACTIVATIONS:
            raise UsageError(
                f"Activation `{size.hidden_act}` is not supported.", hint=f"Known: {', '.join(_ACTIVATIONS)}."
            )
        self.heads = size.num_attention_heads
        self.pre_norm = pre_norm
        self.attention_dropout = size.attention_probs_dropout_prob
        self.activation = _ACTIVATIONS[size.hidden_act]
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, size.intermediate_size)
        self.fc2 = nn.Linear(size.intermediate_size, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(size.hidden_dropout_prob)

    def attend(
        self, tokens: Tensor, mask: Tensor | None, attention: bool, alike: Alike | None = None, classes: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the self-attention's output (B, T, width) and its probabilities if asked for."""
        dropout = self.attention_dropout if self.training else 0.0
        looks = split_heads(self.qkv(tokens), self.heads)
        if alike is None:
            mixed, probabilities = attend(*looks, mask=mask, dropout=dropout, attention=attention)
        else:
            mixed, probabilities = attend_alike(*looks, alike, classes, mask=mask, dropout=dropout, attention=attention)
        return self.dropout(self.out(mixed)), probabilities

    def mlp(self, tokens: Tensor) -> Tensor:
        """Return the two-layer perceptron's output."""
        return cast(Tensor, self.dropout(self.fc2(self.activation(self.fc1(tokens)))))

    def forward(
        self, tokens: Tensor, mask: Tensor | None, attention: bool, alike: Alike | None = None, classes: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's output and its attention probabilities if asked for."""
        if self.pre_norm:
            mixed, probabilities = self.attend(self.norm1(tokens), mask, attention, alike, classes)
            tokens = tokens + mixed
            return tokens + self.mlp(self.norm2(tokens)), probabilities
        mixed, probabilities = self.attend(tokens, mask, attention)
        tokens = self.norm1(tokens + mixed)
        return self.norm2(tokens + self.mlp(tokens)), probabilities


class _Tower(Tower):
    """A stack of `EncoderBlock`s and the learned projection to the joint space."""

    layers: nn.ModuleList
    projection: nn.Linear

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.layers)

    def project(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.projection(hidden))

    def run_block(
        self,
        block: nn.Module,
        tokens: Tensor,
        mask: Tensor | None,
        attention: bool,
        alike: Alike | None = None,
        classes: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        return cast(tuple[Tensor, Tensor | None], block(tokens, mask, attention, alike, classes))


class VitTower(_Tower, ImageTower):
    """`ViTModel` without its pooler, for one image size."""

    def __init__(self, size: VitSize, image_size: tuple[int, int], dim: int, stride: int | None = None) -> None:
        super().__init__()
        patch, step = size.patch_size, stride or size.patch_size
        check_stride(step, patch)
        self.width, self.image_size, self.patch_size = size.hidden_size, image_size, (patch, patch)
        self.grid = ((image_size[0] - patch) // step + 1, (image_size[1] - patch) // step + 1)
        self.cls_token = nn.Parameter(torch.zeros(self.width))
        self.positions = nn.Parameter(torch.zeros(1 + self.grid[0] * self.grid[1], self.width))
        self.patch_projection = nn.Conv2d(3, self.width, kernel_size=patch, stride=step)
        self.dropout = nn.Dropout(size.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            EncoderBlock(size, pre_norm=True, qkv_bias=size.qkv_bias) for _ in range(size.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(self.width, eps=size.layer_norm_eps)
        self.projection = nn.Linear(self.width, dim, bias=False)
        _initialise(self, size.initializer_range)

    @property
    def class_token(self) -> Tensor:
        return self.cls_token

    @property
    def last_norm(self) -> nn.Module:
        return cast(EncoderBlock, self.layers[-1]).norm1

    @property
    def tail(self) -> Sequence[nn.Parameter]:
        return [*self.norm.parameters(), *self.projection.parameters()]

    @property
    def last_mlp_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(EncoderBlock, self.layers[-1]).fc2.weight)

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
        patches = self.patch_projection(images).flatten(2).transpose(1, 2)  # (B, N, V)
        classes = join_class_tokens(self.cls_token, extra_cls, len(images), shift).to(patches.dtype)  # (B, K, V)
        # Extra class tokens share the first one's position, so they differ only by content.
        tokens = self.dropout(torch.cat([classes + self.positions[0], patches + self.positions[1:]], dim=1))
        count = classes.shape[1]
        mask = token_mask(count, patches.shape[1], isolation, keep, patches.device)
        tokens, previous, maps = self.run_blocks(tokens, mask, attention, of_patches(adapt, count, keep), local, count)
        hidden = self.norm(tokens)
        joint = self.project(hidden)
        return ImageFeatures(
            cls=joint[:, :count],
            patches=fill_dropped(joint[:, count:], keep),
            grid=self.grid,
            hidden_cls=hidden[:, :count],
            hidden_patches=fill_dropped(hidden[:, count:], keep),
            previous_cls=previous[:, :count],
            attention=maps,
        )


class BertTower(_Tower, TextTower):
    """`BertModel` as an encoder of single texts; its pooler exists only when it is the pooled feature."""

    def __init__(self, size: BertSize, context_length: int, dim: int, pool: Pool) -> None:
        super().__init__()
        self.width, self.context_length, self.pool = size.hidden_size, context_length, pool
        self.words = nn.Embedding(size.vocab_size, self.width)
        self.positions = nn.Embedding(size.max_position_embeddings, self.width)
        self.types = nn.Embedding(size.type_vocab_size, self.width)
        self.norm = nn.LayerNorm(self.width, eps=size.layer_norm_eps)
        self.dropout = nn.Dropout(size.hidden_dropout_prob)
        self.layers = nn.ModuleList(EncoderBlock(size, pre_norm=False) for _ in range(size.num_hidden_layers))
        self.pooler = nn.Linear(self.width, self.width) if pool == "pooler" else None
        self.projection = nn.Linear(self.width, dim, bias=False)
        _initialise(self, size.initializer_range)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.words(ids))

    def encode_embedded(
        self, embeddings: Tensor, mask: Tensor, eos_index: Tensor | None = None, *, attention: bool = False
    ) -> TextFeatures:
        tokens = embeddings + self.types.weight[0] + self.positions.weight[: embeddings.shape[1]]
        tokens, _, maps = self.run_blocks(self.dropout(self.norm(tokens)), mask[:, None, None, :], attention)
        return TextFeatures(
            pooled=self.project(self._pooled(tokens, mask)), tokens=self.project(tokens), hidden=tokens, attention=maps
        )

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pool == "mean":
            weight = mask[..., None].to(hidden.dtype)
            return (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        return hidden[:, 0] if self.pooler is None else torch.tanh(self.pooler(hidden[:, 0]))


class VitBertBackbone(Backbone):
    """A ViT and a BERT from their configuration, with random weights until `load_vit_bert` fills it.

    `cls`, `patches`, `pooled` and `tokens` pass learned projections to the joint space, which no checkpoint brings;
    BDAM works on `hidden_patches` and `hidden[:, 0]` instead, the encoders' own 768 numbers.
    """

    image: VitTower
    text: BertTower

    def __init__(self, config: BackboneConfig) -> None:
        vit, bert = VitSize(**config.image), BertSize(**{k: v for k, v in config.text.items() if k != "context_length"})
        context = min(int(config.text.get("context_length", DEFAULT_CONTEXT)), bert.max_position_embeddings)
        tokenizer = WordPieceTokenizer(context, vocabulary=config.vocabulary, lower_case=config.lower_case)
        if tokenizer.vocabulary_size > bert.vocab_size:
            raise DataError(f"The vocabulary has {tokenizer.vocabulary_size} pieces, the BERT only {bert.vocab_size}.")
        super().__init__(
            config,
            image=VitTower(vit, config.image_size, config.dim, config.stride),
            text=BertTower(bert, context, config.dim, cast(Pool, config.pool)),
            tokenizer=tokenizer,
        )


@torch.no_grad()
def _initialise(tower: nn.Module, std: float) -> None:
    """Initialise as ViT and BERT do: normal weights, zero biases; the projection keeps the scale of its input."""
    for name, parameter in tower.named_parameters():
        if name == "projection.weight":
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif parameter.dim() > 1 or name == "cls_token":
            nn.init.trunc_normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
