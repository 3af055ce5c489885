"""PPIM, InterPartAbility's patch-phrase interaction: which patches a phrase is about, and how well they fit it.

The paper's text was not obtainable; the four forms are our candidates (docs/methods.md, `interpart`).
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from reidctl.config import Section


class PpimConfig(Section):
    """Settings of the interaction."""

    kind: Literal["xattn", "max", "slots", "sigmoid"] = "xattn"
    """`xattn`: each phrase attends over the patches; `max`: its best patch (FILIP, Yao et al. 2022); `slots`: the
    phrases of a caption compete for the patches (slot attention, Locatello et al. 2020, as PLOT and DiCo do);
    `sigmoid`: soft masks, without competition of any kind."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """tau_a, of the cosines between phrase and patches."""
    iterations: Annotated[int, Field(ge=1)] = 3
    """Rounds of slot attention."""
    background: bool = True
    """`slots`: one more slot takes what no phrase names."""


class PpimOutput(NamedTuple):
    """What a caption's phrases see in its image.

    Attributes:
        maps: a_k, distributions over patches, shape (B, K, N); rows of absent phrases are zero.
        scores: s_k, cosines in [-1, 1], shape (B, K); 0 for absent phrases.
        assigned: `slots`: share of each patch that goes to each slot, (B, K or K + 1, N), columns sum to 1.
    """

    maps: Tensor
    scores: Tensor
    assigned: Tensor | None = None


class Ppim(nn.Module):
    """Phrases (.., D) look at patches (B, N, D) of the joint space.

    xattn:  a_kn = softmax_n( cos(W_q e_k, W_k x_n) / tau ),  r_k = sum_n a_kn W_v x_n,  s_k = cos(r_k, e_k)
    sigmoid: a_kn = m_kn / sum_n m_kn,  m = sigmoid((cos - b) / tau), b learnt;  r, s as above
    slots:  m_kn = softmax_k( cos(W_q z_k, W_k x_n) / tau ),  a_kn = m_kn / sum_n m_kn,  r, s as above,
        z_k <- z_k + unit(r_k), some rounds from z_k = unit(e_k)
    max:    s_k = max_n cos(W_q e_k, W_k x_n),  a as in xattn (for drawing)

    W start as the identity: at step 0 the order of the patches is that of their cosines with the phrase.

    Args:
        config: its settings.
        dim: width D of the joint space.
    """

    def __init__(self, config: PpimConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.query, self.key = _identity(dim), _identity(dim)
        if config.kind != "max":
            self.value = _identity(dim)
        if config.kind == "sigmoid":
            self.threshold = nn.Parameter(torch.zeros(()))
        if config.kind == "slots" and config.background:
            self.background = nn.Parameter(F.normalize(torch.randn(dim), dim=0))

    @property
    def compares_sets(self) -> bool:
        """Whether what a phrase sees depends on the other phrases of its caption."""
        return self.config.kind == "slots"

    def forward(self, phrases: Tensor, mask: Tensor, patches: Tensor) -> PpimOutput:
        """Return what the phrases of image i see in it.

        Args:
            phrases: e, shape (B, K, D).
            mask: which there are, shape (B, K).
            patches: x, shape (B, N, D).
        """
        with torch.autocast(patches.device.type, enabled=False):
            phrases, patches = phrases.float(), patches.float()
            if self.compares_sets:
                return self._slots(phrases, mask, patches)
            cosine = _cosine(self.query(phrases), self.key(patches))  # (B, K, N)
            maps = self._weights(cosine) * mask[..., None]
            if self.config.kind == "max":
                return PpimOutput(maps, cosine.amax(dim=-1) * mask)
            return PpimOutput(maps, F.cosine_similarity(maps @ self.value(patches), phrases, dim=-1) * mask)

    def phrase_scores(self, phrases: Tensor, patches: Tensor, *, chunk: int = 16) -> Tensor:
        """Return s of every phrase (P, D) with every image (B, N, D), shape (P, B); not for `slots`.

        Goes through `chunk` images at a time: P * chunk * (N + D) numbers are held for each.
        """
        with torch.autocast(patches.device.type, enabled=False):
            asked, phrases = self.query(phrases.float()), phrases.float()
            return torch.cat([self._all(asked, phrases, some.float()) for some in _pieces(patches, chunk)], dim=1)

    def set_scores(self, phrases: Tensor, index: Tensor, patches: Tensor, *, chunk: int = 4) -> Tensor:
        """Return S_ij = mean_k s(phrase k of caption i, image j), shape (T, B).

        Args:
            phrases: the different phrases, shape (P, D).
            index: which of them a caption has, -1 for none, shape (T, K).
            patches: shape (B, N, D).
            chunk: images at a time where phrases compete.
        """
        mask = index >= 0
        if self.compares_sets:
            sets, count = phrases[index.clamp_min(0)], len(index)  # (T, K, D)
            parts = []
            for some in _pieces(patches, chunk):
                width = len(some)
                output = self(
                    sets.repeat_interleave(width, dim=0), mask.repeat_interleave(width, dim=0), some.repeat(count, 1, 1)
                )
                parts.append(set_mean(output.scores, mask.repeat_interleave(width, dim=0)).view(count, width))
            return torch.cat(parts, dim=1)
        each = self.phrase_scores(phrases, patches)[index.clamp_min(0)]  # (T, K, B)
        return set_mean(each.transpose(1, 2), mask[:, None, :])

    def _all(self, asked: Tensor, phrases: Tensor, patches: Tensor) -> Tensor:
        cosine = torch.einsum("pd,bnd->pbn", F.normalize(asked, dim=-1), F.normalize(self.key(patches), dim=-1))
        if self.config.kind == "max":
            return cosine.amax(dim=-1)
        regions = torch.einsum("pbn,bnd->pbd", self._weights(cosine), self.value(patches))
        return F.cosine_similarity(regions, phrases[:, None], dim=-1)

    def _weights(self, cosine: Tensor) -> Tensor:
        """Cosines (..., N) as distributions over patches."""
        if self.config.kind != "sigmoid":
            return (cosine / self.config.temperature).softmax(dim=-1)
        soft = ((cosine - self.threshold) / self.config.temperature).sigmoid()
        return soft / soft.sum(dim=-1, keepdim=True).clamp_min(1e-8)

    def _slots(self, phrases: Tensor, mask: Tensor, patches: Tensor) -> PpimOutput:
        keys, values = F.normalize(self.key(patches), dim=-1), self.value(patches)
        count = phrases.shape[1]
        slots = F.normalize(phrases, dim=-1)
        present = mask
        if self.config.background:
            slots = torch.cat([slots, self.background.expand(len(phrases), 1, -1)], dim=1)
            present = F.pad(mask, (0, 1), value=True)
        for _ in range(self.config.iterations):
            logits = F.normalize(self.query(slots), dim=-1) @ keys.transpose(1, 2) / self.config.temperature
            # -1e4 and not -inf: a caption without any phrase and without background must not give NaN.
            assigned = logits.masked_fill(~present[..., None], -1e4).softmax(dim=1)
            weights = assigned / assigned.sum(dim=-1, keepdim=True).clamp_min(1e-8)
            regions = weights @ values
            slots = slots + F.normalize(regions, dim=-1)
        maps = weights[:, :count] * mask[..., None]
        scores = F.cosine_similarity(regions[:, :count], phrases, dim=-1) * mask
        return PpimOutput(maps, scores, assigned)


def set_mean(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of scores (..., K) over the phrases that there are; 0 where there is none."""
    return (scores * mask).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)


def one_of_each(mask: Tensor) -> Tensor:
    """Return one of the phrases of each row (B, K) at random, all equally likely, shape (B,); any where there is none.

    As `torch.multinomial` draws it, which asks the device whether the probabilities are such.
    """
    weight = mask.float() + 1e-6
    return (weight / torch.empty_like(weight).exponential_()).argmax(dim=1)


def _pieces(values: Tensor, size: int) -> list[Tensor]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def _identity(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(layer.weight)
    return layer
