"""Which image-text pairs may be trusted: losses of single pairs, and the consensus of two views of them (RDE)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from reidctl.losses import in_full_precision

PairLoss = Literal["tal", "trl", "infonce", "sdm"]
Fit = Literal["coarse", "fine"]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_FITS: dict[Fit, dict[str, Any]] = {
    "coarse": {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4},
    "fine": {"max_iter": 100, "tol": 1e-4, "reg_covar": 1e-6},
}


@in_full_precision
def pair_losses(
    image: Tensor,
    text: Tensor,
    person: Tensor,
    kind: PairLoss,
    *,
    temperature: float = 0.015,
    margin: float = 0.1,
) -> Tensor:
    """Return the loss of every pair of a batch, both directions added, shape (B,); RDE's code before it sums them.

    s_ij = cos(text_i, image_j), P_i the columns of person i, α_i = softmax of s_ij / temperature over P_i, detached:

    * tal:  max(0, margin - Σ_{j in P_i} α_ij s_ij + temperature · log Σ_{j not in P_i} exp(s_ij / temperature))
    * trl:  max(0, margin - Σ_{j in P_i} α_ij s_ij + max(0, max_{j not in P_i} s_ij)); in the code, which multiplies by
      a mask, a nearest negative below 0 counts as 0
    * infonce:  -log softmax_j(s_ij / temperature)_i / 2; the person's other pairs are negatives
    * sdm:  Σ_j p_ij (log p_ij - log(q_ij + 1e-8)), as in `losses.sdm`

    and the same with image and text exchanged. Qin et al. 2024 (RDE), arXiv:2308.09911; the mean over pairs of `tal` is
    `losses.tal`, that of `sdm` is `losses.sdm`.

    Args:
        image: features, shape (B, D); need not be normalised.
        text: features, shape (B, D); row i describes image i.
        person: identity indices, shape (B,).
        kind: which loss.
        temperature: > 0; published: 0.015 for tal and trl, 0.02 for the others.
        margin: of tal and trl, in cosine units.

    Returns:
        Shape (B,); tal is 0 where a pair has no negative.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    cosine, match = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T, person[:, None] == person[None, :]
    if not len(match):
        return cosine.sum(dim=1)
    both = (_one_way(scores, match, kind, temperature, margin) for scores in (cosine, cosine.T))
    return sum(both, start=torch.zeros_like(cosine[:, 0]))


def _one_way(cosine: Tensor, match: Tensor, kind: PairLoss, temperature: float, margin: float) -> Tensor:
    logits = cosine / temperature
    if kind == "infonce":
        return -logits.log_softmax(dim=1).diagonal() / 2
    if kind == "sdm":
        share = match.to(cosine.dtype)
        target = (share / share.sum(dim=1, keepdim=True) + 1e-8).log()
        predicted = logits.log_softmax(dim=1)
        return (predicted.exp() * (predicted - target)).sum(dim=1)
    choice = logits.masked_fill(~match, -torch.inf).softmax(dim=1).detach()
    positive = (choice * cosine).sum(dim=1)
    if kind == "trl":
        nearest = cosine.masked_fill(match, 0.0).max(dim=1).values
        return (margin + nearest - positive).relu()
    # A row without a negative keeps its scores, so that its (unused) gradient is a number.
    lonely = match.all(dim=1)
    negative = temperature * logits.masked_fill(match & ~lonely[:, None], -torch.inf).logsumexp(dim=1)
    return torch.where(lonely, 0.0, (margin - positive + negative).relu())


@dataclass(frozen=True)
class Division:
    """What a division found of S samples.

    Attributes:
        labels: 1 for samples to learn from, 0 for the others, float32 (S,).
        votes: how many views hold a sample for clean, int64 (S,); -1 where nothing is known of it.
        views: the number of views.
    """

    labels: Tensor
    votes: Tensor
    views: int

    def shares(self) -> dict[str, float]:
        """Return the shares of `clean`, `noisy` and `uncertain` samples among the known ones, and of those `used`."""
        known = self.votes >= 0
        count = max(int(known.sum()), 1)
        sure = {"clean": self.votes == self.views, "noisy": self.votes == 0}
        sure["uncertain"] = known & ~sure["clean"] & ~sure["noisy"]
        sure["used"] = known & (self.labels > 0)
        return {name: int(chosen.sum()) / count for name, chosen in sure.items()}


def divide(losses: Mapping[str, Tensor], *, fit: Fit = "coarse", seed: Sequence[int] = (0,)) -> Division:
    """Return which samples are clean by consensus: all views agree, none does, or a fair coin decides.

    Each view (losses of all samples by one embedding) is scaled to [0, 1] and split by a mixture of two Gaussians; see
    `clean_probability` and `split`. Qin et al. 2024 (RDE), arXiv:2308.09911, "Confident Consensus Division".

    Args:
        losses: for each view (S,); a sample with NaN in any view is unknown, takes no part and has label 1.
        fit: how exactly the mixtures are fitted; the authors' code takes `fine` for RSTPReid and above 40 % noise.
        seed: of the mixtures' start and of the coins. The same numbers give the same labels in every process.
    """
    table = np.stack([value.detach().double().cpu().numpy() for value in losses.values()])  # (views, S)
    known = ~np.isnan(table).any(axis=0)
    votes = np.full(table.shape[1], -1)
    labels = np.ones(table.shape[1], np.float32)
    rng = np.random.default_rng(list(seed))
    starts = rng.integers(2**31, size=len(table))
    if known.any():
        views = [
            split(clean_probability(row[known], fit=fit, seed=int(start)))
            for row, start in zip(table, starts, strict=True)
        ]
        votes[known] = np.sum(views, axis=0)
    coins = rng.integers(2, size=len(votes))
    labels[known] = np.where((votes == 0) | (votes == len(table)), votes > 0, coins)[known]
    return Division(torch.from_numpy(labels), torch.from_numpy(votes), len(table))


def clean_probability(losses: Floats, *, fit: Fit = "coarse", seed: int = 0) -> Floats:
    """Return the probability (S,) that a loss belongs to the lower one of two Gaussians; 1 where all losses are equal.

    Losses are scaled to [0, 1] first.

    Args:
        losses: finite, shape (S,).
        fit: the authors' settings: `coarse` 10 iterations, tolerance 1e-2, 5e-4 added to the variance; `fine` 100,
            1e-4 and 1e-6.
        seed: of the k-means that the mixture starts from.
    """
    low, high = losses.min(), losses.max()
    if not high > low:
        return np.ones_like(losses)
    scaled = ((losses - low) / (high - low))[:, None]
    mixture = GaussianMixture(n_components=2, random_state=seed, **_FITS[fit])
    with warnings.catch_warnings():
        # Ten iterations are the published limit, whether it has converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(scaled)
    chances: Floats = mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
    return chances


def split(probability: Floats, threshold: float = 0.5) -> Flags:
    """Return which samples are clean: more probably so than `threshold`.

    Where all are, those up to the probability of place S // 100 (from the lowest, counted from 0) are noisy all the
    same, as in the authors' code, so that a mixture that sees no noise costs a hundredth of the data. Differs from it
    where that probability is the highest of all, which many share: there the code takes every sample for noisy, and
    here those below it alone.
    """
    if probability.min() > threshold:
        worst = float(np.sort(probability)[len(probability) // 100])
        if worst == probability.max():
            return np.equal(probability, worst)
        threshold = worst
    clean: Flags = probability > threshold
    return clean
