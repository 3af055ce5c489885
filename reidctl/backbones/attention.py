"""Multi-head attention that can show its probabilities, and the masks that isolate class tokens."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Isolation = Literal["none", "cls", "full"]


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
        mask: bool, broadcastable to (B, heads, T, T), True where attention is allowed; not together with `causal`.
        causal: token i sees tokens 0..i only.
        dropout: probability of dropping an attention weight.
        attention: also return the probabilities. They are the very tensor that the output was computed from, so
            gradients with respect to them exist; the fused kernel is not used then.

    Returns:
        Output (B, T, heads * head width) and probabilities (B, heads, T, T) or None.
    """
    if not attention:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return out.transpose(1, 2).flatten(2), None
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, heads, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = scores.softmax(dim=-1)
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
