"""The losses between images and learnt prompts (HPL, arXiv:2511.13575; CLIP-ReID, arXiv:2211.13977): pure functions.

As in `losses`: scalar results in float32 or float64, zero with a gradient of zeros where nothing takes part.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reidctl.losses import contrast, cross_entropy, in_full_precision, supcon, zero

Space = Literal["unit", "raw"]


@in_full_precision
def feature_distance(a: Tensor, b: Tensor, *, space: Space = "unit") -> Tensor:
    """Mean squared Euclidean distance of features that belong together: L_ic, L_tgps and L_vgps (HPL Eq. 6, 10).

    loss = mean_i ||a_i - b_i||^2.  `unit` puts both on the unit sphere first (range 0 to 4); `raw` does not, and is of
    order 100 for CLIP's features, whose norm is about 10. The paper does not say which.

    Args:
        a, b: features, shape (B, D).
        space: see above.
    """
    if len(a) == 0:
        return zero(a, b)
    if space == "unit":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return (a - b).square().sum(dim=-1).mean()


@in_full_precision
def identity_contrast(
    image: Tensor,
    prompt: Tensor,
    person: Tensor,
    owner: Tensor,
    *,
    temperature: float = 0.02,
    positives: Literal["id", "literal"] = "id",
) -> tuple[Tensor, Tensor]:
    """Contrast of images with the prompts of their people, L_t2i and L_i2t (HPL Eq. 8-9).

    `literal`, as printed: one prompt per image, r_i = prompt of person_i, repeated where people repeat;
        L_t2i = -mean_i log exp(s(v_i, r_i)) / Σ_j exp(s(v_j, r_i)),  L_i2t the same with Σ_j over exp(s(v_i, r_j)).
        Other images of the person are negatives of its prompt.
    `id`: every image of a person is a positive of its prompt (mean over them, SupCon), and each prompt is there once.
    s is the cosine / temperature; the paper prints none, that is 1.

    Args:
        image: v_t2i, shape (B, D).
        prompt: one feature per person, shape (U, D).
        person: of the images, shape (B,).
        owner: person of each prompt, shape (U,); of a person who has several the first alone is read.
        temperature: > 0.
        positives: see above.

    Returns:
        L_t2i (prompt to images) and L_i2t (image to prompts), in nats.
    """
    if len(image) == 0:
        return zero(image, prompt), zero(image, prompt)
    first = _first(owner)
    match = (person[:, None] == owner[None, :]) & first  # (B, U)
    logits = F.normalize(image, dim=-1) @ F.normalize(prompt, dim=-1).T / temperature
    if positives == "id":
        return contrast(logits.T, match.T, multiple="mean"), contrast(logits, match, valid=first.expand_as(match))
    own = match.int().argmax(dim=1)
    square = logits[:, own]  # (B, B): image i, prompt of image j's person
    target = torch.arange(len(image), device=image.device)
    return cross_entropy(square.T, target), cross_entropy(square, target)


@in_full_precision
def prompt_classification(
    image: Tensor,
    prompt: Tensor,
    person: Tensor,
    owner: Tensor | None = None,
    *,
    temperature: float = 0.02,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Classification of images among the prompts of all training people, L_cic (HPL Eq. 11).

    loss = -Σ_i log softmax_j(cos(v_i, r_j) / temperature) at j = person_i; `sum` as printed, `mean` over the batch.

    Args:
        image: v_i2i, shape (B, D).
        prompt: identity prompt features, shape (N, D); of all people, row y for person y, unless `owner` says whose.
        person: of the images, shape (B,); in 0..N-1, or in `owner`.
        owner: person of each prompt, shape (N,); of a person who has several the first alone is read.
        temperature: > 0; the paper prints none (1): with 11,003 people the loss then stays between 7.3 and 9.3.
        reduction: see above.
    """
    if len(image) == 0:
        return zero(image, prompt)
    logits = F.normalize(image, dim=-1) @ F.normalize(prompt, dim=-1).T / temperature
    if owner is not None:
        logits = logits.masked_fill(~_first(owner), -torch.inf)
        person = (person[:, None] == owner[None, :]).int().argmax(dim=1)
    return F.cross_entropy(logits, person, reduction=reduction)


def _first(owner: Tensor) -> Tensor:
    """True on the first prompt of each person, shape (U,)."""
    # By comparing all with all: whatever searches must ask the device how many it found.
    same = owner[:, None] == owner[None, :]
    return same.int().argmax(dim=1) == torch.arange(len(owner), device=owner.device)


@in_full_precision
def prompt_regularisation(text: Tensor, image: Tensor) -> Tensor:
    """Squared Frobenius distance of the pseudo-tokens of texts and their images, L_CMPR (HPL section "CMPR").

    loss = mean_i ||P_i^t - P_i^v||_F^2, a sum over all M * W numbers of a prompt; 0 for equal ones.

    Args:
        text, image: pseudo-tokens, shape (B, M, W).
    """
    return (text - image).square().sum(dim=(1, 2)).mean() if len(text) else zero(text, image)


@in_full_precision
def prompt_contrast(
    image: Tensor, prompt: Tensor, person: Tensor, owner: Tensor, *, temperature: float = 1.0, normalize: bool = False
) -> Tensor:
    """Contrast of images with their people's prompts, one prompt per image, both directions (CLIP-ReID stage 1, L_con).

    `losses.supcon` of image i and the prompt r_i of person_i: prompts repeat where people do, as in the published code,
    and all same-person columns are positives. Prompts are given once per person.

    Args:
        image: shape (B, D).
        prompt: one feature per person, shape (U, D).
        person: of the images, shape (B,); every one is in `owner`.
        owner: person of each prompt, shape (U,), different numbers.
        temperature: > 0; published is 1 on the dot product of features that are not normalised.
        normalize: put both on the unit sphere first; then 0.07 is a usual temperature.

    Returns:
        Scalar in nats, image to prompt plus prompt to image.
    """
    if normalize:
        image, prompt = F.normalize(image, dim=-1), F.normalize(prompt, dim=-1)
    own = (person[:, None] == owner[None, :]).int().argmax(dim=1)
    return supcon(image, prompt[own], person, person, temperature=temperature)


@in_full_precision
def class_contrast(
    image: Tensor, prompt: Tensor, target: Tensor, *, temperature: float = 1.0, normalize: bool = False
) -> Tensor:
    """Contrast of images with prompts of classes, every class there once, both directions (prompts of datasets alone).

    -mean_i log softmax_k(v_i . r_k / temperature) at k = target_i, over all classes, whoever is in the batch; and for
    each class in the batch -mean_{i of k} log softmax_i(v_i . r_k / temperature), averaged over them.

    Args:
        image: shape (B, D).
        prompt: shape (K, D).
        target: class of each image, shape (B,), in 0..K-1.
        temperature, normalize: see `prompt_contrast`.

    Returns:
        Scalar in nats.
    """
    if normalize:
        image, prompt = F.normalize(image, dim=-1), F.normalize(prompt, dim=-1)
    logits = image @ prompt.T / temperature
    match = target[:, None] == torch.arange(len(prompt), device=target.device)[None, :]
    return contrast(logits, match) + contrast(logits.T, match.T, multiple="mean")


@in_full_precision
def image_to_text(
    image: Tensor,
    prompt: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    normalize: bool = False,
    smoothing: float = 0.1,
) -> Tensor:
    """Classification of images among the prompts of all people, L_i2t (CLIP-ReID stage 2).

    Cross-entropy of v_i . r_j / temperature over all people j at j = target_i, with label smoothing; the published code
    has no temperature and does not normalise.

    Args:
        image: shape (B, D).
        prompt: shape (N, D), row y for person y.
        target: shape (B,), in 0..N-1.
        temperature, normalize: see `prompt_contrast`.
        smoothing: in [0, 1].
    """
    if normalize:
        image, prompt = F.normalize(image, dim=-1), F.normalize(prompt, dim=-1)
    return cross_entropy(image @ prompt.T / temperature, target, smoothing=smoothing)
