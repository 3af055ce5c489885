"""Image-text matching: a head that reads one fused pair, its hard negatives, and sides of pairs encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reidctl.parts import Parts


@dataclass(frozen=True)
class Encoded:
    """One side of pairs, B images or B texts, up to where the other side comes in.

    Attributes:
        pooled: one vector each, shape (B, W).
        tokens: token features, shape (B, T, W); None where the fusion reads the vectors alone.
        mask: True on real tokens, shape (B, T), bool; None: all.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: Tensor | slice) -> "Encoded":
        tokens, mask = self.tokens, self.mask
        return Encoded(
            self.pooled[rows], None if tokens is None else tokens[rows], None if mask is None else mask[rows]
        )

    def rows(self, name: str) -> dict[str, Tensor]:
        """Return its tensors under the names `NAME`, `NAME_tokens` and `NAME_mask`, for `Parts`."""
        found = {name: self.pooled, f"{name}_tokens": self.tokens, f"{name}_mask": self.mask}
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def of(cls, parts: Parts, name: str) -> "Encoded":
        """Return what `rows` put into parts; tokens that joining padded are masked if it has a mask."""
        return cls(parts[name], parts.get(f"{name}_tokens"), parts.get(f"{name}_mask"))


def join(parts: Sequence[Encoded]) -> Encoded:
    """Return several encoded parts as one, tokens padded to the longest; padding is masked."""
    pooled = torch.cat([part.pooled for part in parts])
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if len(tokens) < len(parts):
        return Encoded(pooled)
    masks = [
        part.mask if part.mask is not None else torch.ones(some.shape[:2], dtype=torch.bool, device=some.device)
        for part, some in zip(parts, tokens, strict=True)
    ]
    length = max(some.shape[1] for some in tokens)
    return Encoded(
        pooled,
        torch.cat([functional.pad(some, (0, 0, 0, length - some.shape[1])) for some in tokens]),
        torch.cat([functional.pad(mask, (0, length - mask.shape[1])) for mask in masks]),
    )


class MatchHead(nn.Module):
    """The log-odds that the image of a fused pair shows the person of its text.

    Norm, one hidden layer, one number. The papers name neither loss nor head of a pairwise protocol; this is the
    image-text matching head of ALBEF (Li et al. 2021, arXiv:2107.07651), which is one linear layer there, because its
    fusion has six cross-attention blocks and ours adds two vectors or two sequences.

    Args:
        width: of the fused feature.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, fused: Tensor) -> Tensor:
        """Return log-odds, shape (P,), of fused features (P, width)."""
        odds: Tensor = self.layers(fused)
        return odds.squeeze(-1)


def matching_pairs(similarity: Tensor, wrong: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return image rows, text rows and labels (1 or 0) of the pairs that a match loss reads, shape (P,) each.

    Every image with its own text is right. Every image meets one wrong text and every text one wrong image, drawn with
    p proportional to exp(similarity / temperature), so that hard ones are likely (ALBEF section 3.2; BLIP). The draw
    is from the process-wide generator. Rows in which nothing is wrong bring no wrong pair.

    A text occurs once in a right pair and at least once in a wrong one: the words alone do not tell.

    Args:
        similarity: cosines, image i with text j, shape (B, B).
        wrong: whether text j is of another person than image i, shape (B, B), bool.
        temperature: > 0.
    """
    own = torch.arange(len(similarity), device=similarity.device)
    images, texts = [own], [own]
    # How many pairs there are decides the shape of all that follows: both directions ask the device once.
    some = torch.stack([wrong.any(dim=1), wrong.any(dim=0)]).cpu()
    for scores, allowed, useful, row, column in (
        (similarity, wrong, some[0], images, texts),
        (similarity.T, wrong.T, some[1], texts, images),
    ):
        rows = useful.nonzero().flatten().to(similarity.device, non_blocking=True)
        if len(rows):
            logits = (scores.detach().float() / temperature).masked_fill(~allowed, -torch.inf)[rows]
            row.append(rows)
            column.append(_draw(logits.softmax(dim=1)))
    image, text = torch.cat(images), torch.cat(texts)
    label = (torch.arange(len(image), device=image.device) < len(own)).float()
    return image, text, label


def _draw(shares: Tensor) -> Tensor:
    """Draw a column of each row of shares (R, B) with p proportional to them, shape (R,).

    What `torch.multinomial` computes for one draw, the exponential race, without asking the device whether the shares
    are sound.
    """
    return (shares / torch.empty_like(shares).exponential_()).argmax(dim=1)
