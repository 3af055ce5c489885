"""The training losses: pure functions of tensors, computed in float32 or float64 also under autocast.

Common to all: scalar results; a batch without any pair gives a zero that `backward` accepts; a temperature divides
cosines (a logit scale of 50 is a temperature of 0.02) and raises ValueError unless positive.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Run `loss` on float32 or float64: a softmax at temperature 0.02 has no digits left in bfloat16."""

    def widen(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if narrow else value

    @functools.wraps(loss)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        wide_args = [widen(value) for value in args]
        wide_kwargs = {name: widen(value) for name, value in kwargs.items()}
        tensors = [value for value in (*wide_args, *wide_kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss(*wide_args, **wide_kwargs)

    return wrapper


def zero(*features: Tensor) -> Tensor:
    """A zero that still has a gradient (of zeros), so that `backward` works on a batch without any pair."""
    return torch.stack([feature.sum() for feature in features]).sum() * 0.0


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """The mean of `values` where `keep`, 0 where nothing is kept."""
    return torch.where(keep, values, 0.0).sum() / keep.sum().clamp(min=1)


def _same(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] == columns[None, :]


def _cosine(rows: Tensor, columns: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1) @ F.normalize(columns, dim=-1).T


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@in_full_precision
def sdm(image: Tensor, text: Tensor, person: Tensor, temperature: float = 0.02) -> Tensor:
    """Similarity distribution matching: KL from predicted to true match distribution, both directions.

    p = softmax(cos / temperature),  q_ij = [person_i = person_j] / Σ_k [person_i = person_k]
    loss = mean_i Σ_j p_ij (log p_ij - log(q_ij + 1e-8)), image to text plus text to image.
    Jiang & Ye 2023 (IRRA), arXiv:2303.12501, section "Similarity Distribution Matching"; constants from the
    authors' code. The directions are summed, not averaged.

    Args:
        image: features, shape (B, D); need not be normalised.
        text: features, shape (B, D); row i describes image i.
        person: identity indices, shape (B,).
        temperature: > 0.

    Returns:
        Scalar in nats, averaged over the batch; at least -2e-8 B, 0 when p = q.
    """
    _check_temperature(temperature)
    if len(image) == 0:
        return zero(image, text)
    match = _same(person, person).to(image.dtype)
    # Rows, with keepdim: dividing by column sums is right only while the mask is symmetric.
    log_target = (match / match.sum(dim=1, keepdim=True) + 1e-8).log()
    logits = _cosine(image, text) / temperature
    return _divergence(logits, log_target) + _divergence(logits.T, log_target)


def _divergence(logits: Tensor, log_target: Tensor) -> Tensor:
    log_prediction = logits.log_softmax(dim=1)
    return (log_prediction.exp() * (log_prediction - log_target)).sum(dim=1).mean()


@in_full_precision
def contrast(
    logits: Tensor, positive: Tensor, *, valid: Tensor | None = None, multiple: Literal["mass", "mean"] = "mass"
) -> Tensor:
    """Multi-positive cross-entropy over the rows of a score matrix, for callers that compute their own scores.

    mass: -log( Σ_{j in positive} exp s_ij / Σ_j exp s_ij ).  Zero at the optimum; two positives never compete
        (MIL-NCE: Miech et al. 2020, arXiv:1912.06430, Eq. 1).
    mean: -mean_{j in positive} log( exp s_ij / Σ_k exp s_ik ).  Pulls every positive equally, at the price that
        positives compete; minimum log |positive| (SupCon "out": Khosla et al. 2020, arXiv:2004.11362, Eq. 2).

    Args:
        logits: scores already divided by the temperature, shape (Q, K).
        positive: True where column j is a right answer to row i, shape (Q, K), bool.
        valid: True where column j may take part in row i at all, shape (Q, K), bool; default everywhere.
        multiple: how several positives of a row are joined; equal when every row has one.

    Returns:
        Scalar in nats, the mean over the rows that have a positive; 0 if none has.
    """
    if not logits.numel():
        return zero(logits)
    # A copy, laid out anew: both directions of a transposed pair are then summed in the same order, forwards and back.
    logits = logits.clone(memory_format=torch.contiguous_format)
    valid = torch.ones_like(positive) if valid is None else valid
    positive = positive & valid
    counted = positive.any(dim=1)
    # Rows without a positive get one here and no weight below: picking the others would ask the device how many they
    # are, and -inf would pass NaN gradients even through where().
    spare = ~counted[:, None]
    positive, valid = positive | spare, valid | spare
    total = logits.masked_fill(~valid, -torch.inf).logsumexp(dim=1)
    if multiple == "mass":
        rows = total - logits.masked_fill(~positive, -torch.inf).logsumexp(dim=1)
    else:
        rows = total - torch.where(positive, logits, 0.0).sum(dim=1) / positive.sum(dim=1)
    return _mean(rows, counted)


@in_full_precision
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.05,
    positives: Tensor | None = None,
    direction: Literal["both", "q2k"] = "both",
    valid: Tensor | None = None,
    multiple: Literal["mass", "mean"] = "mass",
) -> Tensor:
    """InfoNCE on cosine similarities, with all pairs of one person as positives.

    loss = -mean_i log( Σ_{j: person_j = person_i} exp(cos_ij / temperature) / Σ_j exp(cos_ij / temperature) )
    van den Oord et al. 2018, arXiv:1807.03748, Eq. 4; several positives as in `contrast`.

    Args:
        query: features, shape (B, D); need not be normalised.
        key: features, shape (B, D); row i belongs to query i.
        temperature: > 0.
        positives: person indices, shape (B,): equal numbers are positives, never negatives. None: only the own row.
        direction: `q2k` ranks keys for each query (the BDAM papers' Eq. 3); `both` averages it with the reverse.
        valid: rows whose pair exists, shape (B,), bool; the others are neither query nor key.
        multiple: see `contrast`.

    Returns:
        Scalar in nats, averaged over the valid rows; 0 for a batch of one.
    """
    _check_temperature(temperature)
    person = torch.arange(len(query), device=query.device) if positives is None else positives
    logits, match = _cosine(query, key) / temperature, _same(person, person)
    pairs = None if valid is None else valid[:, None] & valid[None, :]
    forward = contrast(logits, match, valid=pairs, multiple=multiple)
    if direction == "q2k":
        return forward
    return (forward + contrast(logits.T, match, valid=pairs, multiple=multiple)) / 2


@in_full_precision
def supcon(a: Tensor, b: Tensor, person_a: Tensor, person_b: Tensor, temperature: float = 1.0) -> Tensor:
    """CLIP-ReID's supervised contrast: every same-person column is a positive, both directions summed.

    loss = -mean_i mean_{j: person_j = person_i} log softmax_j(a_i · b_j / temperature)  + the same from b to a
    Li et al. 2023 (CLIP-ReID), arXiv:2211.13977; the dot product is NOT normalised. Differs from the authors'
    code: a row without a positive is left out instead of dividing by zero.

    Args:
        a: features, shape (A, D).
        b: features, shape (B, D).
        person_a: person indices, shape (A,).
        person_b: person indices, shape (B,).
        temperature: > 0; give unit vectors and 0.07 for encoders trained from scratch.

    Returns:
        Scalar in nats; each direction is averaged over the rows with a positive.
    """
    _check_temperature(temperature)
    logits, match = a @ b.T / temperature, _same(person_a, person_b)
    return contrast(logits, match, multiple="mean") + contrast(logits.T, match.T, multiple="mean")


@in_full_precision
def cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of scores (B, K) with the target (1 - smoothing) one-hot + smoothing / K, in nats, mean over B.

    Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing spreads over all K classes, the right one included).
    """
    return F.cross_entropy(logits, target, label_smoothing=smoothing) if len(target) else zero(logits)


def id_loss(
    logits_image: Tensor,
    logits_text: Tensor,
    person: Tensor,
    *,
    text_person: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Identity classification of image and text by one shared classifier: the mean of two cross-entropies.

    (CE(image) + CE(text)) / 2.  Zheng et al. 2017, arXiv:1711.05535; halved as in IRRA's code.

    Args:
        logits_image: class scores of the images, shape (B, K).
        logits_text: class scores of the texts, shape (T, K), from the SAME classifier.
        person: class indices of the images, shape (B,).
        text_person: class indices of the texts, shape (T,); None: those of the images.
        smoothing: label smoothing in [0, 1].

    Returns:
        Scalar in nats, averaged over the batch.
    """
    image = cross_entropy(logits_image, person, smoothing=smoothing)
    owners = person if text_person is None else text_person
    return (image + cross_entropy(logits_text, owners, smoothing=smoothing)) / 2


@in_full_precision
def mlm(logits: Tensor, labels: Tensor, *, ignore: int = 0) -> Tensor:
    """Cross-entropy of masked tokens, averaged over them; 0 if the batch has none.

    Devlin et al. 2019, arXiv:1810.04805; IRRA uses index 0 (padding) for "not masked".

    Args:
        logits: vocabulary scores, shape (..., V).
        labels: true token where masked, `ignore` elsewhere, shape (...,).
        ignore: the label that takes no part.
    """
    masked = labels != ignore
    return F.cross_entropy(logits[masked], labels[masked]) if masked.any() else zero(logits)


@in_full_precision
def batch_hard_triplet(
    features: Tensor,
    person: Tensor,
    *,
    margin: float = 0.3,
    squared: bool = False,
    mining: Literal["batch_hard", "random", "all"] = "batch_hard",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Triplet loss inside a batch of any composition: same person nearer than another by `margin`.

    mean_anchor max(0, d(anchor, positive) - d(anchor, negative) + margin), d = Euclidean distance (squared: d²).
    Hermans et al. 2017, arXiv:1703.07737, Eq. 5 (batch_hard) and Eq. 6 (all: the mean over ALL valid triplets,
    zeros included); squared as in BDAM's Eq. 4.

    Args:
        features: shape (B, D); distances are those of the features as given.
        person: person indices, shape (B,). Anchors without a positive or without a negative are skipped.
        margin: in the units of d.
        squared: compare squared distances.
        mining: `batch_hard` farthest positive and nearest negative; `random` one of each per anchor; `all`.
        generator: source of the random choice.

    Returns:
        Scalar >= 0; 0 (with a zero gradient) if the batch holds no triplet.
    """
    if not len(person):
        return zero(features)
    positive = _same(person, person)
    negative = ~positive
    positive = positive & ~torch.eye(len(person), dtype=torch.bool, device=person.device)
    # The exact mode: |a|² + |b|² - 2ab loses close pairs of long vectors, and its root has no gradient at 0.
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance**2 if squared else distance
    if mining == "all":
        gap = distance[:, :, None] - distance[:, None, :] + margin  # (A, B positive, B negative)
        return _mean(gap.relu(), positive[:, :, None] & negative[:, None, :])
    anchors = positive.any(dim=1) & negative.any(dim=1)
    if mining == "random":
        return _random_triplets(distance, positive, negative, anchors, margin, generator)
    # Where there is none the difference is -inf, whose relu is 0 and passes no gradient.
    hardest_positive = distance.masked_fill(~positive, -torch.inf).amax(dim=1)
    hardest_negative = distance.masked_fill(~negative, torch.inf).amin(dim=1)
    return _mean((hardest_positive - hardest_negative + margin).relu(), anchors)


def _random_triplets(
    distance: Tensor,
    positive: Tensor,
    negative: Tensor,
    anchors: Tensor,
    margin: float,
    generator: torch.Generator | None,
) -> Tensor:
    """One random triplet per anchor; the draw needs rows that have something to draw, so the device is asked."""
    if not anchors.any():
        return zero(distance)
    distance, positive, negative = distance[anchors], positive[anchors], negative[anchors]
    near = _pick(distance, positive, generator), _pick(distance, negative, generator)
    return (near[0] - near[1] + margin).relu().mean()


def _pick(distance: Tensor, candidates: Tensor, generator: torch.Generator | None) -> Tensor:
    """One random candidate of each row."""
    chosen = torch.multinomial(candidates.float(), 1, generator=generator)
    return distance.gather(1, chosen).squeeze(1)


@in_full_precision
def hsic(
    a: Tensor,
    b: Tensor,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    normalize: Literal["none", "l2", "cka"] = "none",
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two sets of features (biased estimator).

    tr(K_a H K_b H) / (N - 1)²,  H = I - 11ᵀ/N.   Gretton et al. 2005, Eq. 9; BDAM Eq. 2 with the linear kernel.
    With the linear kernel this is the squared Frobenius norm of the cross-covariance: it measures linear
    correlation, not independence, and shrinks with the features (x10 on one side is x100) unless normalised.

    Args:
        a: features, shape (N, D_a).
        b: features, shape (N, D_b); row i belongs to row i of `a`.
        kernel: `rbf` is exp(-d² / 2σ²), σ the median distance of each side.
        normalize: `l2` scales every row to length 1 first; `cka` returns hsic(a, b) / √(hsic(a, a) hsic(b, b)),
            in [0, 1] (Kornblith et al. 2019, arXiv:1905.00414, Eq. 4).

    Returns:
        Scalar >= 0 in (units of a · units of b)²; 0 for N < 2 and for constant features.
    """
    if len(a) < 2:
        return zero(a, b)
    if normalize == "l2":
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    if kernel == "linear" and max(a.shape[1], b.shape[1]) < len(a):
        dependence: Callable[[Tensor, Tensor], Tensor] = _squared_cross_covariance
    else:
        dependence = functools.partial(_centred_trace, kernel=kernel)
    if normalize != "cka":
        return dependence(a, b)
    scale = dependence(a, a) * dependence(b, b)
    return dependence(a, b) / scale.clamp(min=torch.finfo(a.dtype).tiny ** 0.5).sqrt()


def _squared_cross_covariance(a: Tensor, b: Tensor) -> Tensor:
    """Linear HSIC from the (D_a, D_b) matrix: cheaper while the features are narrower than the batch is long."""
    cross = (a - a.mean(dim=0)).T @ (b - b.mean(dim=0)) / (len(a) - 1)
    return cross.square().sum()


def _centred_trace(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """HSIC from two (N, N) kernel matrices."""
    gram_a, gram_b = (_gram(x - x.mean(dim=0), kernel) for x in (a, b))
    centred = gram_a - gram_a.mean(dim=0, keepdim=True)
    centred = centred - centred.mean(dim=1, keepdim=True)
    return (centred * gram_b).sum() / (len(a) - 1) ** 2


def _gram(x: Tensor, kernel: str) -> Tensor:
    if kernel == "linear":
        return x @ x.T
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    rows, columns = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    # The width is a scale read off the data, not something to learn by moving the data.
    width = squared.detach()[rows, columns].median().clamp(min=torch.finfo(x.dtype).eps)
    return (-squared / (2 * width)).exp()


def _clothing_logits(
    clothing: Tensor, text: Tensor, temperature: float, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all clothing texts, which column is the own text, and which columns may take part, all (B, B)."""
    _check_temperature(temperature)
    own = torch.eye(len(text), dtype=torch.bool, device=text.device)
    valid = torch.ones_like(own) if group is None else ~_same(group, group) | own
    return _cosine(clothing, text) / temperature, own, valid


@in_full_precision
def clothing_alignment(
    clothing: Tensor, text: Tensor, *, temperature: float = 0.05, group: Tensor | None = None
) -> Tensor:
    """Pulls the clothing feature of an image to its own clothing text (BDAM, seed 001, L_aln).

    -mean_i log softmax_j(cos(clothing_i, text_j) / temperature)_i
    Differs from Eq. 1 as printed: it multiplies vision with vision; the sentence before it names the texts.

    Args:
        clothing: clothing features of the images, projected to the text width, shape (B, D).
        text: features of the clothing texts, shape (B, D).
        temperature: > 0; the paper does not state it.
        group: equal numbers mean equal clothing texts, shape (B,): those columns are left out, not negatives.

    Returns:
        Scalar in nats, averaged over the batch.
    """
    logits, own, valid = _clothing_logits(clothing, text, temperature, group)
    return contrast(logits, own, valid=valid)


@in_full_precision
def clothing_adversarial(
    clothing: Tensor,
    text: Tensor,
    *,
    temperature: float = 0.05,
    p_pos: Literal["softmax", "sigmoid"] = "softmax",
    group: Tensor | None = None,
) -> Tensor:
    """Pushes the clothing feature of an image AWAY from its own clothing text (BDAM, seed 002, L_adv).

    mean_i -log(1 - P_i), Eq. 1, with 1 - P_i >= 1e-6: above P = 0.999999 the gradient is zero.
    The paper calls P_i a "temperature-scaled dot-product similarity", which is no probability; we take
    P_i = softmax_j(cos_ij / temperature)_i (L_aln's counterpart, 1/B at the start) or sigmoid(cos_ii / temperature).

    Args:
        clothing: clothing features of the images, projected to the text width, shape (B, D).
        text: features of the clothing texts, shape (B, D).
        temperature: > 0; the paper does not state it.
        p_pos: the reading of P_i.
        group: as in `clothing_alignment`; used by `softmax` only.

    Returns:
        Scalar in nats, in [0, 13.8]; rows that have nothing to contrast with (B = 1, softmax) are left out.
    """
    logits, own, valid = _clothing_logits(clothing, text, temperature, group)
    if not len(own):
        return zero(clothing, text)
    lowest = math.log(1e-6)
    if p_pos == "sigmoid":
        return -F.logsigmoid(-logits.diagonal()).clamp(min=lowest).mean()
    contrasted = (valid & ~own).any(dim=1)
    # As in `contrast`: rows that do not count get something to be contrasted with, and no weight.
    valid = valid | ~contrasted[:, None]
    # log(1 - P) as a difference of two log-sums: 1 - softmax would lose all digits near P = 1.
    total = logits.masked_fill(~valid, -torch.inf).logsumexp(dim=1)
    rest = logits.masked_fill(~valid | own, -torch.inf).logsumexp(dim=1)
    # A batch of one has nothing else at all; -inf must not meet a gradient.
    alone = len(own) == 1
    return zero(clothing, text) if alone else _mean(-(rest - total).clamp(min=lowest), contrasted)


@in_full_precision
def match(odds: Tensor, label: Tensor) -> Tensor:
    """Image-text matching: binary cross-entropy of whether a pair belongs together.

    mean_p [label_p softplus(-odds_p) + (1 - label_p) softplus(odds_p)]
    Li et al. 2021 (ALBEF), arXiv:2107.07651, Eq. 4, with one logit for its two classes.

    Args:
        odds: log-odds of each pair, shape (P,).
        label: 1 where the pair belongs together, else 0, shape (P,).

    Returns:
        Scalar in nats, the mean over pairs; log 2 for odds of 0; 0 without pairs.
    """
    return F.binary_cross_entropy_with_logits(odds, label.to(odds.dtype)) if len(odds) else zero(odds)


@in_full_precision
def tal(image: Tensor, text: Tensor, person: Tensor, *, temperature: float = 0.015, margin: float = 0.1) -> Tensor:
    """Triplet alignment loss: a soft nearest negative must stay `margin` below the softly chosen positive.

    mean_i max(0, margin - Σ_{j pos} α_ij cos_ij + temperature · log Σ_{j neg} exp(cos_ij / temperature)),
    α = softmax of the positives at the same temperature, detached; both directions summed.
    Qin et al. 2024 (RDE), arXiv:2308.09911. Averaged over the batch (the authors' code sums).

    Args:
        image: features, shape (B, D); need not be normalised.
        text: features, shape (B, D); row i describes image i.
        person: person indices, shape (B,).
        temperature: > 0.
        margin: in cosine units.

    Returns:
        Scalar >= 0 in cosine units; a row without a negative counts 0.
    """
    _check_temperature(temperature)
    if not len(person):
        return zero(image, text)
    cosine, match = _cosine(image, text), _same(person, person)
    lonely = match.all(dim=1)
    both = (_tal_rows(scores, match, lonely, temperature, margin).sum() / len(match) for scores in (cosine, cosine.T))
    return sum(both, start=zero(image, text))


def _tal_rows(cosine: Tensor, match: Tensor, lonely: Tensor, temperature: float, margin: float) -> Tensor:
    scaled = cosine / temperature
    choice = scaled.masked_fill(~match, -torch.inf).softmax(dim=1).detach()
    # A row without a negative keeps its scores, so that its gradient, which nobody reads, is a number.
    negative = temperature * scaled.masked_fill(match & ~lonely[:, None], -torch.inf).logsumexp(dim=1)
    return torch.where(lonely, 0.0, (margin - (choice * cosine).sum(dim=1) + negative).relu())
