"""InterPartAbility's losses on phrase-patch maps: pure functions of tensors.

The paper's text was not obtainable; every formula here is our reading (docs/methods.md, `interpart`). A map a_k is a
distribution over the N patches of an image; places are patch centres, each axis of the picture scaled to [0, 1].

The contrasts compare the samples of a whole batch. What is a mean over phrases or images is returned one by one, so
that the parts of a batch can be computed apart; `average` then takes the mean over all of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from reidctl.losses import contrast, in_full_precision, zero


@in_full_precision
def set_contrast(scores: Tensor, person: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Contrast of whole phrase sets: InfoNCE over S_ij in both directions, all pairs of one person as positives.

    S_ij = mean_k s(phrase k of caption i, image j);  the mean of the text-to-image and the image-to-text loss.

    Args:
        scores: S, shape (T, B), T = B; row i belongs to the caption of image i.
        person: identity of each, shape (B,).
        temperature: > 0.

    Returns:
        Scalar in nats, >= 0.
    """
    same = person[:, None] == person[None, :]
    logits = scores / temperature
    return (contrast(logits, same) + contrast(logits.T, same.T)) / 2


@in_full_precision
def phrase_contrast(
    scores: Tensor,
    index: Tensor,
    person: Tensor,
    phrases: Tensor,
    *,
    words: Tensor | None = None,
    temperature: float = 0.05,
    similar: float = 0.9,
) -> Tensor:
    """Contrast of single phrases; what may be true of an image is no negative for it.

    A phrase is right for the images of every person of whom a caption says it. It is left out, neither right nor wrong,
    for an image whose caption says something alike: a phrase whose embedding has a cosine above `similar` with it.
    "black trousers" fits a third of a batch; without this most negatives would be false. Mean of both directions.
    A phrase that no caption says takes no part.

    Args:
        scores: of P different phrases with B images, shape (P, B).
        index: which phrases the caption of each image has, -1 for none, shape (B, K).
        person: identity of each image, shape (B,).
        phrases: embeddings of the phrases, shape (P, D).
        words: equal numbers mean equal words, shape (P,), where one phrase may have several embeddings.
        temperature: > 0.
        similar: cosine above which two phrases are alike, in [-1, 1].

    Returns:
        Scalar in nats, >= 0.
    """
    said = _said(index, len(scores))
    same = person[:, None] == person[None, :]
    right = (same.float() @ said.float() > 0).T  # (P, B)
    unit = F.normalize(phrases.detach(), dim=1)
    alike = unit @ unit.T > similar
    if words is not None:
        alike = alike | (words[:, None] == words[None, :])
    near = alike.float() @ said.T.float() > 0
    valid = (right | ~near) & said.any(dim=0)[:, None]
    logits = scores / temperature
    return (contrast(logits, right, valid=valid) + contrast(logits.T, right.T, valid=valid.T)) / 2


def _said(index: Tensor, count: int) -> Tensor:
    """Whether the caption of image j says phrase p, of an index (B, K) of phrases, -1 for none; shape (B, P)."""
    nothing = torch.zeros(len(index), count + 1, dtype=torch.bool, device=index.device)
    # What is none says the column behind the last phrase.
    return nothing.scatter(1, torch.where(index >= 0, index, count), True)[:, :count]


def firsts(index: Tensor, words: Tensor) -> Tensor:
    """Return an index in which every phrase stands for all that say the same: the first of them.

    The tables of several parts of a batch hold one phrase more than once; a contrast must count it once.

    Args:
        index: phrases by number, -1 for none, any shape.
        words: equal numbers mean equal phrases, shape (P,), P > 0.
    """
    first = (words[:, None] == words[None, :]).int().argmax(dim=1)
    return torch.where(index >= 0, first[index.clamp_min(0)], index)


def average(values: Tensor) -> Tensor:
    """Return the mean of the values (M,) of phrases or images, a scalar; a zero with a gradient if there are none."""
    return values.mean() if len(values) else zero(values)


def places(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return the patch centres (y, x), each axis in (0, 1), shape (N, 2), on the device and of the type of `like`."""
    axes = [(torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size for size in grid]
    return torch.cartesian_prod(*axes)


@in_full_precision
def spread(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the spatial variance of distributions (..., N) over a grid: sum_n a_n ||pos_n - mu||^2, shape (...)."""
    place = places(grid, maps)
    mean = maps @ place
    return maps @ place.square().sum(dim=1) - mean.square().sum(dim=-1)


@in_full_precision
def compactness(spreads: Tensor, *, floor: float = 0.01) -> Tensor:
    """How far maps are spread beyond a floor: max(0, spread(a_k) - floor).

    The floor keeps regions that are long, or in two pieces like shoes, from being pressed into one spot.

    Args:
        spreads: of maps, see `spread`, shape (M,).
        floor: in squared picture sides, >= 0.

    Returns:
        One for each map, >= 0, shape (M,).
    """
    return (spreads - floor).relu()


@in_full_precision
def alignment(maps: Tensor, mask: Tensor, attention: Tensor) -> Tensor:
    """KL( mean_k a_k || attention ): what the class token attends to must cover the phrases.

    Args:
        maps: a_k, shape (U, K, N), rows sum to 1.
        mask: which phrases there are, at least one of each image, shape (U, K).
        attention: of the class token to the patches, shape (U, N), rows sum to 1.

    Returns:
        One for each image in nats, >= 0, shape (U,).
    """
    weight = mask.to(maps.dtype)[..., None]
    mean = (maps * weight).sum(dim=1) / weight.sum(dim=1)
    target = mean.clamp_min(1e-8)
    return (mean * (target.log() - attention.clamp_min(1e-8).log())).sum(dim=1)


@in_full_precision
def overlap(maps: Tensor, apart: Tensor) -> Tensor:
    """The cosine of the maps of two phrases of a caption that are about different parts.

    Without it all maps may settle on one compact place, the trivial optimum of `compactness`.

    Args:
        maps: a_k, shape (B, K, N).
        apart: such pairs, by their places in (B, K, K) laid flat, shape (Q,).

    Returns:
        One for each pair in [0, 1], shape (Q,).
    """
    unit = F.normalize(maps, dim=-1)
    return (unit @ unit.transpose(1, 2)).flatten()[apart]


@in_full_precision
def grounding(without_map: Tensor, without_random: Tensor, *, margin: float = 0.05) -> Tensor:
    """A map must name patches that matter: max(0, margin - (s_random - s_map)).

    s_map is the similarity of phrase and image without the map's highest patches, s_random without as many random ones.

    Args:
        without_map, without_random: similarities, shape (B,).
        margin: by how much more it must fall, in cosine units.

    Returns:
        One for each image, >= 0, shape (B,).
    """
    return (margin - (without_random - without_map)).relu()
