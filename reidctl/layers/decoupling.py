"""The BDAM module: patch tokens into an identity and a clothing stream ("001" section III-C, "002" section 3.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

CrossAttention = Literal["after", "interleaved", "none"]


@dataclass(frozen=True)
class Streams:
    """What the module returns.

    Attributes:
        identity, clothing: gated features f_id = g * pooled_identity and f_clo = (1 - g) * pooled_clothing, (B, D).
        pooled_identity, pooled_clothing: averages over the tokens before the gate, (B, D).
        gate: g in (0, 1), (B, D); None without a gate.
        identity_tokens: the identity stream before pooling, times g, (B, N, D); their mean is `identity`.
    """

    identity: Tensor
    clothing: Tensor
    pooled_identity: Tensor
    pooled_clothing: Tensor
    gate: Tensor | None
    identity_tokens: Tensor


class SelfBlock(nn.Module):
    """Pre-norm self-attention and MLP, both residual.

    Args:
        width: D.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        dropout: in [0, 1).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_ratio, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (B, N, D)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.dropout(self.attention(normed, normed, normed, need_weights=False)[0])
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class CrossBlock(nn.Module):
    """One stream queries the other: pre-norm cross-attention and MLP, both residual. Arguments as in `SelfBlock`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_ratio, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Return `tokens` (B, N, D) after a look at `context` (B, M, D)."""
        seen = self.norm_context(context)
        tokens = tokens + self.dropout(self.attention(self.norm_query(tokens), seen, seen, need_weights=False)[0])
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


def _mlp(width: int, ratio: float, dropout: float) -> nn.Sequential:
    hidden = round(width * ratio)
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
    )


class Decoupling(nn.Module):
    """Bidirectional decoupled alignment: two projections, self-attention per stream, cross-attention, pooling, gate.

        g = sigmoid(W [mean(identity); mean(clothing)] + b)
        f_id = g * mean(identity),  f_clo = (1 - g) * mean(clothing)

    The papers do not state the depth; the ablation "Shallow (3-layer)" is a reduction, so it is more than 3: we take 6.
    Nor do they state where cross-attention stands; "followed by" is read as one block after the stack (`after`). Both
    directions read the streams BEFORE either is updated.

    The gate sees both pooled streams and cross-attention mixes tokens, so clothing information has two open paths
    into `identity`: discarding `clothing` later does not by itself remove it. Measure it.

    Args:
        width: D, of tokens in and out.
        depth: self-attention blocks per stream.
        heads: attention heads.
        cross_attention: `after` the stack, `interleaved` after every block, or `none`.
        gated: False makes both outputs the plain averages (ablation "w/o Gate").
        mlp_ratio, dropout: of every block.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int = 6,
        heads: int = 12,
        cross_attention: CrossAttention = "after",
        gated: bool = True,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        shape = (width, heads, mlp_ratio, dropout)
        self.cross_attention = cross_attention
        self.project_identity = nn.Linear(width, width)
        self.project_clothing = nn.Linear(width, width)
        self.identity_blocks = nn.ModuleList(SelfBlock(*shape) for _ in range(depth))
        self.clothing_blocks = nn.ModuleList(SelfBlock(*shape) for _ in range(depth))
        exchanges = {"after": 1, "interleaved": depth, "none": 0}[cross_attention]
        self.identity_cross = nn.ModuleList(CrossBlock(*shape) for _ in range(exchanges))
        self.clothing_cross = nn.ModuleList(CrossBlock(*shape) for _ in range(exchanges))
        self.norm_identity = nn.LayerNorm(width)
        self.norm_clothing = nn.LayerNorm(width)
        self.gate = nn.Linear(2 * width, width) if gated else None

    def forward(self, patches: Tensor) -> Streams:
        """Return the two streams of patch tokens (B, N, D); see `Streams`."""
        identity, clothing = self.project_identity(patches), self.project_clothing(patches)  # (B, N, D) each
        for layer in range(len(self.identity_blocks)):
            identity, clothing = self.identity_blocks[layer](identity), self.clothing_blocks[layer](clothing)
            if self.cross_attention == "interleaved":
                identity, clothing = self._exchange(identity, clothing, layer)
        if self.cross_attention == "after":
            identity, clothing = self._exchange(identity, clothing, 0)
        # Pre-norm blocks leave the residual stream unnormalised; one norm before the average keeps the gate in range.
        identity, clothing = self.norm_identity(identity), self.norm_clothing(clothing)
        return self._gate(identity, clothing.mean(dim=1))

    def _exchange(self, identity: Tensor, clothing: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.identity_cross[layer](identity, clothing), self.clothing_cross[layer](clothing, identity)

    def _gate(self, tokens: Tensor, clothing: Tensor) -> Streams:
        identity = tokens.mean(dim=1)  # (B, D)
        if self.gate is None:
            return Streams(identity, clothing, identity, clothing, None, tokens)
        gate = torch.sigmoid(self.gate(torch.cat([identity, clothing], dim=-1)))  # (B, D)
        return Streams(gate * identity, (1 - gate) * clothing, identity, clothing, gate, gate[:, None] * tokens)
