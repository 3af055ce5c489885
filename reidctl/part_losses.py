"""InterPartAbility's losses on phrase-patch maps: pure functions of tensors.

The paper's text was not obtainable; every formula here is our reading (docs/methods.md, `interpart`). A map a_k is a
distribution over the N patches of an image; places are patch centres, each axis of the picture scaled to [0, 1].
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
    count = len(scores)
    said = F.one_hot(index.clamp_min(0), max(count, 1)).bool() & (index >= 0)[..., None]
    said = said.any(dim=1)  # (B, P): the caption of image j says p
    same = person[:, None] == person[None, :]
    right = (same.float() @ said.float() > 0).T  # (P, B)
    unit = F.normalize(phrases.detach(), dim=1)
    alike = unit @ unit.T > similar
    if words is not None:
        alike = alike | (words[:, None] == words[None, :])
    near = alike.float() @ said.T.float() > 0
    valid = right | ~near
    logits = scores / temperature
    return (contrast(logits, right, valid=valid) + contrast(logits.T, right.T, valid=valid.T)) / 2


def places(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return the patch centres (y, x), each axis in (0, 1), shape (N, 2), on the device and of the type of `like`."""
    axes = [(torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size for size in grid]
    return torch.cartesian_prod(*axes)


def spread(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the spatial variance of distributions (..., N) over a grid: sum_n a_n ||pos_n - mu||^2, shape (...)."""
    place = places(grid, maps)
    mean = maps @ place
    return maps @ place.square().sum(dim=1) - mean.square().sum(dim=-1)


@in_full_precision
def compactness(maps: Tensor, mask: Tensor, grid: tuple[int, int], *, floor: float = 0.01) -> Tensor:
    """How far maps are spread beyond a floor: mean_k max(0, spread(a_k) - floor).

    The floor keeps regions that are long, or in two pieces like shoes, from being pressed into one spot.

    Args:
        maps: a_k, shape (B, K, N), rows sum to 1.
        mask: which phrases there are, shape (B, K).
        grid: (h, w), N = h w.
        floor: in squared picture sides, >= 0.

    Returns:
        Scalar >= 0.
    """
    if not mask.any():
        return zero(maps)
    return (spread(maps[mask], grid) - floor).relu().mean()


@in_full_precision
def alignment(maps: Tensor, mask: Tensor, attention: Tensor) -> Tensor:
    """KL( mean_k a_k || attention ), the mean over images: what the class token attends to must cover the phrases.

    Args:
        maps: a_k, shape (B, K, N), rows sum to 1.
        mask: which phrases there are, shape (B, K).
        attention: of the class token to the patches, shape (B, N), rows sum to 1.

    Returns:
        Scalar in nats, >= 0.
    """
    usable = mask.any(dim=1)
    if not usable.any():
        return zero(maps, attention)
    weight = mask[usable].to(maps.dtype)[..., None]
    mean = (maps[usable] * weight).sum(dim=1) / weight.sum(dim=1)
    target = mean.clamp_min(1e-8)
    return (mean * (target.log() - attention[usable].clamp_min(1e-8).log())).sum(dim=1).mean()


@in_full_precision
def overlap(maps: Tensor, mask: Tensor, part: Tensor) -> Tensor:
    """The mean cosine of the maps of two phrases of a caption that are about different parts, over all such pairs.

    Without it all maps may settle on one compact place, the trivial optimum of `compactness`.

    Args:
        maps: a_k, shape (B, K, N).
        mask: which phrases there are, shape (B, K).
        part: what each is about, shape (B, K).

    Returns:
        Scalar in [0, 1]; 0 without such a pair.
    """
    unit = F.normalize(maps, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    pair = mask[:, :, None] & mask[:, None, :] & (part[:, :, None] != part[:, None, :])
    return cosine[pair].mean() if pair.any() else zero(maps)


@in_full_precision
def grounding(without_map: Tensor, without_random: Tensor, *, margin: float = 0.05) -> Tensor:
    """A map must name patches that matter: mean max(0, margin - (s_random - s_map)).

    s_map is the similarity of phrase and image without the map's highest patches, s_random without as many random ones.

    Args:
        without_map, without_random: similarities, shape (B,).
        margin: by how much more it must fall, in cosine units.

    Returns:
        Scalar >= 0.
    """
    return (margin - (without_random - without_map)).relu().mean() if len(without_map) else zero(without_map)
