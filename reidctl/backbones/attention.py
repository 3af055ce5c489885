"""Multi-head attention that can show its probabilities, and the masks that isolate class tokens."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Isolation = Literal["none", "cls", "full"]
Alike = Literal["key", "value"]


@dataclass(frozen=True)
class Local:
    """How patches may look at each other other than by query and key everywhere.

    Attributes:
        bias: added to the logits between patches, shape (N, N); None: nothing.
        blocks: in how many of the last blocks.
        alike: in the last block patches attend by key and key, or value and value, instead of query and key; class
            tokens do not.
    """

    bias: Tensor | None = None
    blocks: int = 1
    alike: Alike | None = None


def distance_bias(grid: tuple[int, int], sigma: float) -> Tensor:
    """Return -d^2 / (2 sigma^2) for all pairs of patches, shape (N, N), d in sides of the longer grid axis.

    Args:
        grid: (h, w).
        sigma: > 0, as a share of the picture's height (its longer side).
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1).float() / max(grid)
    return -torch.cdist(place, place).square() / (2 * sigma**2)


def biased(mask: Tensor | None, bias: Tensor, classes: int) -> Tensor:
    """Return a mask of logits: `bias` (N, N) between patches, 0 at class tokens, -inf where `mask` forbids."""
    whole = F.pad(bias, (classes, 0, classes, 0))
    return whole if mask is None else whole.masked_fill(~mask, float("-inf"))


def attend_alike(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alike: Alike,
    classes: int,
    *,
    mask: Tensor | None,
    attention: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, but the rows behind the first `classes` compare keys with keys, or values with values.

    Takes query, key and value (B, heads, T, head width); returns (B, T, heads * head width), and probabilities
    (B, heads, T, T) or None.
    """
    other = key if alike == "key" else value
    upper, lower = (None, None) if mask is None else (mask[..., :classes, :], mask[..., classes:, :])
    if attention:
        looks = [
            _probabilities(query[:, :, :classes], key, upper),
            _probabilities(other[:, :, classes:], other, lower),
        ]
        # Joined before they are used, so that the output can be differentiated by them.
        return _weigh(torch.cat(looks, dim=2), value, dropout)
    first, _ = attend(query[:, :, :classes], key, value, mask=upper, dropout=dropout)
    rest, _ = attend(other[:, :, classes:], other, value, mask=lower, dropout=dropout)
    return torch.cat([first, rest], dim=1), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(query key^T / sqrt(width)) value with the heads joined, and the probabilities if asked for.

    Args:
        query, key, value: shape (B, heads, T, head width).
        mask: broadcastable to (B, heads, T, T): bool, True where attention is allowed, or numbers that are added to the
            logits; not together with `causal`.
        causal: token i sees tokens 0..i only.
        dropout: probability of dropping an attention weight.
        attention: also return the probabilities. They are the very tensor that the output was computed from, so
            gradients with respect to them exist; the fused kernel is not used then.

    Returns:
        Output (B, T, heads * head width) and probabilities (B, heads, T, T) or None.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if not attention:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return out.transpose(1, 2).flatten(2), None
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return _weigh(_probabilities(query, key, mask), value, dropout)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, heads, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities: Tensor = scores.softmax(dim=-1)
    return probabilities


def _weigh(probabilities: Tensor, value: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    kept = F.dropout(probabilities, dropout) if dropout else probabilities
    return (kept @ value).transpose(1, 2).flatten(2), probabilities


def split_heads(joined: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a joint projection (B, T, 3 W) into query, key and value, each (B, heads, T, W / heads)."""
    batch, length, triple = joined.shape
    query, key, value = joined.view(batch, length, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def token_mask(
    classes: int, patches: int, isolation: Isolation, keep: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return which image token may attend to which, or None when every token sees every token.

    Tokens are ordered class tokens first. Isolation "cls" hides the class tokens from each other; they still meet
    through the patches. "full" hides them from the patches too: then no class token can influence another output.

    Args:
        keep: bool (B, N); a patch with False is seen by no token (its own output is then meaningless).

    Returns:
        Bool, shape (T, T) or (B, 1, T, T) with T = classes + patches.
    """
    mask: Tensor | None = None
    if isolation != "none" and (classes > 1 or isolation == "full"):
        mask = torch.ones(classes + patches, classes + patches, dtype=torch.bool, device=device)
        mask[:classes, :classes] = torch.eye(classes, dtype=torch.bool, device=device)
        if isolation == "full":
            mask[classes:, :classes] = False
    if keep is None:
        return mask
    seen = F.pad(keep, (classes, 0), value=True)[:, None, None, :]  # (B, 1, 1, T)
    # A token always sees itself: otherwise a class token without any kept patch would have a softmax over nothing.
    own = torch.eye(classes + patches, dtype=torch.bool, device=device)
    return (seen | own) if mask is None else (seen & mask) | own
