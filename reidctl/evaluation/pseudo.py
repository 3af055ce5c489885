"""What pseudo-tokens hold: whether an image and its caption invert to the same, what the prompts say, nearest words.

P^v and P^t are the pseudo-tokens (M, W) of an image and of a text, v~ and t~ the features of the prompts with them.
Everything is read beside a control: the caption of another person, or labels that belong to somebody else.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.evaluation.attention import cosine
from reidctl.evaluation.probes import labels_of_others
from reidctl.metrics import Interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.object_]

SHUFFLES = 20
RESAMPLES = 400
MODULES = {
    "second_token": ("second_token",),
    "second_projection": ("second_projection",),
    "inversion_image": ("invert_image",),
    "inversion_text": ("invert_text",),
    "identity_tokens": ("id_tokens",),
    "prompt_encoder": ("prompt_text",),
    "towers": ("backbone",),
}
"""The first parts of parameter names, by what they belong to."""


@dataclass(frozen=True)
class Control:
    """What exchanged labels give.

    Attributes:
        mean: over the exchanges.
        high: their 95th percentile.
    """

    mean: float
    high: float


def others(person: Labels, rng: np.random.Generator) -> Ints:
    """Return for each row the row of another person, (N,); no row twice as far as the numbers of rows allow."""
    rows = np.arange(len(person)).astype(object)
    return labels_of_others(rows, person, rng).astype(np.int64)


def exchanged(measure: Callable[[Ints], float], person: Labels, *, seed: int = 0, shuffles: int = SHUFFLES) -> Control:
    """Return what a measure gives if every row has the labels of another person's row.

    Args:
        measure: takes the rows (N,) whose labels stand at each place.
        person: shape (N,).
        seed: of the exchanges.
        shuffles: how many.
    """
    found = [measure(others(person, np.random.default_rng((seed, 41, number)))) for number in range(shuffles)]
    return Control(float(np.mean(found)), float(np.quantile(found, 0.95)))


def distances(image: npt.NDArray[Any], text: npt.NDArray[Any]) -> Floats:
    """Return ||P^t - P^v||_F of token sets (N, M, W) each, (N,), >= 0."""
    apart = np.asarray(text, np.float64) - np.asarray(image, np.float64)
    return np.asarray(np.sqrt(np.square(apart).reshape(len(apart), -1).sum(axis=1)))


def caption_auc(score: npt.NDArray[Any], person: Labels) -> Floats:
    """Return how often an image's own caption scores above one of another person, ties one half, (N,), in [0, 1].

    AUC_i = mean over captions j of other people of [s_ii > s_ij] + [s_ii = s_ij] / 2. NaN if there is no other person.

    Args:
        score: of image i with caption j, (N, N), image i's own caption in column i.
        person: of each image and its caption, (N,).
    """
    found = np.full(len(score), np.nan)
    for row, values in enumerate(np.asarray(score)):
        foreign = values[person != person[row]]
        if len(foreign):
            found[row] = (foreign < values[row]).mean() + (foreign == values[row]).mean() / 2
    return found


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the rank correlation of two rows of numbers (N,), in [-1, 1]; ties share ranks, constants give 0."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b)]
    return float(cosine(ranks[0] - ranks[0].mean(), ranks[1] - ranks[1].mean()))


def spearman_interval(
    a: npt.NDArray[Any], b: npt.NDArray[Any], person: Labels, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return `spearman` with a 95 % percentile interval from resampling people with all their rows.

    Args:
        a, b: shape (N,).
        person: shape (N,).
        seed: of the resamples.
        resamples: how many.
    """
    _, code = np.unique(person.astype(str), return_inverse=True)
    order = np.argsort(code, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(code))[:-1])
    rng = np.random.default_rng((seed, 42))
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([groups[number] for number in rng.integers(len(groups), size=len(groups))])
        drawn.append(spearman(a[rows], b[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(spearman(a, b), float(low), float(high))


def _counts(word: npt.NDArray[Any], label: npt.NDArray[Any]) -> Floats:
    """How often each word stands with each label, (words, labels)."""
    words, row = np.unique(word.astype(str), return_inverse=True)
    labels, column = np.unique(label.astype(str), return_inverse=True)
    counts = np.bincount(row * len(labels) + column, minlength=len(words) * len(labels))
    return counts.reshape(len(words), len(labels)).astype(np.float64)


def purity(word: npt.NDArray[Any], label: npt.NDArray[Any]) -> float:
    """Return the share of rows with their word's most frequent label, sum_w max_l n_wl / N, in (0, 1].

    Words that stand once count as right, so it is read beside the same with exchanged labels.

    Args:
        word, label: shape (N,).
    """
    return float(_counts(word, label).max(axis=1).sum() / len(word))


def mutual_information(word: npt.NDArray[Any], label: npt.NDArray[Any]) -> float:
    """Return 2 I(word; label) / (H(word) + H(label)), in [0, 1]; 0 if both are constant.

    Args:
        word, label: shape (N,).
    """
    joint = _counts(word, label) / len(word)
    one, other = joint.sum(axis=1), joint.sum(axis=0)
    known = joint > 0
    shared = float((joint[known] * np.log((joint / np.outer(one, other))[known])).sum())
    whole = -float((one * np.log(one)).sum() + (other * np.log(other)).sum())
    return max(2 * shared / whole, 0.0) if whole > 1e-12 else 0.0


def mean_over_positions(
    measure: Callable[[npt.NDArray[Any], npt.NDArray[Any]], float], words: npt.NDArray[Any], label: npt.NDArray[Any]
) -> float:
    """Return the mean over positions of a measure of words (N, M) and labels (N,)."""
    return float(np.mean([measure(words[:, position], label) for position in range(words.shape[1])]))


def bag_similarity(words: npt.NDArray[Any], captions: npt.NDArray[Any]) -> Floats:
    """Return the mean cosine of every word of an image with every word of its caption, (N,), in [-1, 1].

    The mean cosine of all pairs is the product of the mean unit vectors: s_i = mean_m u_im . mean_l c_il.

    Args:
        words: unit embeddings of the images' words, (N, M, W).
        captions: the mean unit embedding of each caption's words, (N, W).
    """
    return np.asarray((np.asarray(words, np.float64).mean(axis=1) * np.asarray(captions, np.float64)).sum(axis=1))


def bag_hits(words: npt.NDArray[Any], captions: Sequence[Collection[int]]) -> Floats:
    """Return which share of an image's words stands in its caption, (N,), in [0, 1].

    Args:
        words: token ids, (N, M).
        captions: the token ids of each caption.
    """
    pairs = zip(words.tolist(), captions, strict=True)
    return np.array([np.mean([word in said for word in own]) for own, said in pairs], np.float64)


def parameter_parts(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return how many parameters each of `MODULES` has; what is not there is left out.

    Args:
        sizes: (name, number of elements) of every parameter.
    """
    found: dict[str, int] = {}
    first = {start: part for part, starts in MODULES.items() for start in starts}
    for name, size in sizes:
        part = first.get(name.partition(".")[0])
        if part is not None:
            found[part] = found.get(part, 0) + size
    return {part: found[part] for part in MODULES if part in found}
