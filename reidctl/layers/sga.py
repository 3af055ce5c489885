"""The Semantic Grouping Adapter (SGA) of MTA-CLIP: patch tokens reweighted by channel groups and by the whole picture.

The README of MTA-CLIP, which is all there is, says: channels are split into groups with a light transform or
reweighting of each, a global context branch stands beside, learnable softmax weights fuse the two, a residual adds the
result. Number of groups, transform, reduction and initial values are ours.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from reidctl.config import Section

Kind = Literal["gate", "linear", "ema", "none"]


class SgaConfig(Section):
    """The adapter; only that it has groups, a global branch, softmax weights and a residual is published."""

    enabled: bool = True
    groups: int = Field(default=8, ge=1)
    """G; must divide the channels (96 per group for 768)."""
    kind: Kind = "gate"
    """What a group does to its channels: `gate` multiplies them by a sigmoid of a depthwise 3x3 and a pointwise
    convolution, `linear` replaces them by the convolutions' output, `ema` is Efficient Multi-scale Attention (Ouyang et
    al. 2023, arXiv:2305.13563), whose weights the groups share. `none` adapts nothing and leaves the read-out alone, to
    tell the adapter's effect from that of averaging patches."""
    context: Literal["gate", "broadcast"] = "gate"
    """The global branch multiplies tokens by one channel gate (squeeze and excitation), or adds one vector to all."""
    reduction: int = Field(default=16, ge=1)
    """The global branch is C / reduction wide inside."""
    gamma_init: float = 0.0
    """Of the residual; 0 leaves the tokens as they are at the start, and then gamma alone gets a gradient in the first
    step."""
    readout: Literal["cls_plus_gap", "concat", "gap", "pre_last"] = "cls_plus_gap"
    """How the adapted patches reach the retrieved feature, which in CLIP is that of the class token: their mean is
    added to it, set beside it or replaces it; `pre_last` adapts the patches that the class token attends to in the last
    block instead."""


class GroupGate(nn.Module):
    """U = sigmoid(W_p * (W_d * X)) X, with W_d a depthwise 3x3 and W_p a pointwise convolution within each group.

    Args:
        width: C, channels.
        groups: G; no channel sees one of another group.
        gated: multiply by the sigmoid; else U = W_p * (W_d * X).

    Raises:
        ValueError: G does not divide C.
    """

    def __init__(self, width: int, groups: int, *, gated: bool = True) -> None:
        super().__init__()
        _check_groups(width, groups)
        self.gated = gated
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1, groups=groups)

    def gate(self, x: Tensor) -> Tensor:
        """Return what multiplies a map (B, C, h, w): numbers in (0, 1) of the same shape."""
        return torch.sigmoid(self.pointwise(self.depthwise(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Return U of a map (B, C, h, w)."""
        if self.gated:
            return self.gate(x) * x
        changed: Tensor = self.pointwise(self.depthwise(x))
        return changed


class GroupEma(nn.Module):
    """Efficient Multi-scale Attention (Ouyang et al. 2023): each group by itself, one set of weights for all groups.

    Branch 1: Z1 = GN(X sigmoid(a_h) sigmoid(a_w)), [a_h; a_w] a pointwise convolution of X's row and column means.
    Branch 2: Z2 = conv3x3(X).
    U = sigmoid(softmax(mean Z1) Z2 + softmax(mean Z2) Z1) X: the gate is one number per place and group.

    Args:
        width, groups: see `GroupGate`.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        _check_groups(width, groups)
        self.groups, inner = groups, width // groups
        self.pointwise = nn.Conv2d(inner, inner, 1)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1)
        self.norm = nn.GroupNorm(inner, inner)

    def gate(self, x: Tensor) -> Tensor:
        """Return what multiplies a map (B, C, h, w): numbers in (0, 1), equal within a group, same shape."""
        batch, width, height, columns = x.shape
        part = x.reshape(batch * self.groups, width // self.groups, height, columns)
        rows, cols = part.mean(dim=3), part.mean(dim=2)  # (BG, c, h), (BG, c, w)
        along = self.pointwise(torch.cat([rows, cols], dim=2)[..., None])[..., 0]
        down, across = along.split([height, columns], dim=2)
        one = self.norm(part * down.sigmoid()[..., None] * across.sigmoid()[:, :, None])
        two = self.conv(part)
        weights = _attend(one, two) + _attend(two, one)
        gate = weights.sigmoid().reshape(batch, self.groups, 1, height, columns)
        return gate.expand(-1, -1, width // self.groups, -1, -1).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return U of a map (B, C, h, w)."""
        return self.gate(x) * x


def _attend(channels: Tensor, places: Tensor) -> Tensor:
    """softmax(spatial mean of one) times the other's channels: (B, h w)."""
    share = channels.mean(dim=(2, 3)).softmax(dim=1)  # (B, c)
    return torch.einsum("bc,bcn->bn", share, places.flatten(2))


class GlobalContext(nn.Module):
    """V = sigmoid(W_2 relu(W_1 mean(X))) X: squeeze and excitation (Hu et al. 2018, arXiv:1709.01507).

    Args:
        width: C.
        reduction: the inside is max(1, C / reduction) wide.
        gated: multiply by the sigmoid; else V = W_2 relu(W_1 mean(X)) at every place.
    """

    def __init__(self, width: int, reduction: int, *, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.squeeze = nn.Linear(width, max(1, width // reduction))
        self.excite = nn.Linear(max(1, width // reduction), width)

    def context(self, x: Tensor) -> Tensor:
        """Return the picture's vector (B, C) of a map (B, C, h, w): the gate in (0, 1), or what is broadcast."""
        inner: Tensor = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3)))))
        return inner.sigmoid() if self.gated else inner

    def forward(self, x: Tensor) -> Tensor:
        """Return V of a map (B, C, h, w)."""
        vector = self.context(x)[:, :, None, None]
        return vector * x if self.gated else vector.expand_as(x)


class SemanticGroupingAdapter(nn.Module):
    """out = X + gamma (a_1 U + a_2 V), a = softmax(w): groups U and global context V over patch tokens X.

    Args:
        width: C.
        config: see `SgaConfig`.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    def __init__(self, width: int, config: SgaConfig) -> None:
        super().__init__()
        if config.kind == "ema":
            self.local: GroupGate | GroupEma = GroupEma(width, config.groups)
        else:
            self.local = GroupGate(width, config.groups, gated=config.kind == "gate")
        self.context = GlobalContext(width, config.reduction, gated=config.context == "gate")
        self.fusion = nn.Parameter(torch.zeros(2))
        self.gamma = nn.Parameter(torch.tensor(float(config.gamma_init)))

    @property
    def shares(self) -> Tensor:
        """a = softmax(w), shape (2,): the shares of the local and the global stream."""
        return self.fusion.softmax(dim=0)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return adapted patch tokens (B, N, C) of tokens (B, N, C), row-major over the grid (h, w), N = h w."""
        x = as_map(tokens, grid)
        local, whole = self.shares
        changed: Tensor = local * self.local(x) + whole * self.context(x)
        return tokens + self.gamma * changed.flatten(2).transpose(1, 2)

    def gates(self, tokens: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the gates of both streams, (B, C) each: `local` is a mean over places, `global` is equal at all.

        A stream without a gate is left out.
        """
        x = as_map(tokens, grid)
        found = {}
        if not isinstance(self.local, GroupGate) or self.local.gated:
            found["local"] = self.local.gate(x).mean(dim=(2, 3))
        if self.context.gated:
            found["global"] = self.context.context(x)
        return found


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return patch tokens (B, N, C) as maps (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def _check_groups(width: int, groups: int) -> None:
    if width % groups:
        raise ValueError(f"{groups} groups do not divide {width} channels")
