"""Whether a model knows which attribute belongs to which garment, or only which words occur.

"A red shirt and black trousers" and "a black shirt and red trousers" have the same words. A model that reads a caption
as a bag of words cannot tell them apart, although it tells both from the caption of somebody else.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.explain.concentration import summarise_scores
from reidctl.metrics import Floats

METRICS: Mapping[str, Sequence[str]] = {"binding.swap": (), "binding.random": ()}
"""What `score_binding` measures."""

Vectors = npt.NDArray[np.float32]

_TIE = 1e-6
_CHUNK = 512


def score_binding(
    captions: pd.DataFrame,
    swapped: Sequence[str | None],
    images: Vectors,
    embed: Callable[[Sequence[str]], Vectors],
) -> pd.DataFrame:
    """Return for every usable caption whether its image prefers it over its swap and over other people's captions.

    win(t, t') = 1 if cos(image, t) > cos(image, t'), 1/2 if they are equal, else 0

    Cosines that differ by less than 1e-6, which float32 vectors cannot tell apart, are equal. Chance is 1/2 for both.
    A model that wins against other captions and not against swaps reads words without binding them.

    Args:
        captions: columns caption_id, image_id, person_id and text, one row per caption.
        swapped: each caption with the attributes of two of its phrases exchanged, of the same words; None where that
            is impossible. A swap that leaves the text as it is counts as None.
        images: unit vectors of each caption's own image, shape (M, D).
        embed: unit vectors (n, D) of n texts; see `embedding.embed_queries`.

    Returns:
        One row per usable caption: query_id, image_id, person_id, explainer (empty: no map has a part in it),
        binding.swap (win over the swap) and binding.random (mean win over the captions of all other people, which is
        the expectation of a random one; NaN if there is nobody else).
    """
    assert len(captions) == len(swapped) == len(images), "one swap and one image vector per caption"
    texts = captions["text"].astype(str).tolist()
    usable = [row for row, other in enumerate(swapped) if other is not None and other != texts[row]]
    found = captions.iloc[usable][["caption_id", "image_id", "person_id"]].reset_index(drop=True)
    found = found.rename(columns={"caption_id": "query_id"}).assign(explainer="")
    if not usable:
        return found.assign(**{"binding.swap": [], "binding.random": []})
    own = np.asarray(embed(texts), np.float64)  # (M, D)
    other = np.asarray(embed([str(swapped[row]) for row in usable]), np.float64)
    image = np.asarray(images, np.float64)[usable]
    true = (image * own[usable]).sum(axis=1)
    person = pd.factorize(captions["person_id"])[0]
    return found.assign(
        **{
            "binding.swap": _wins(true - (image * other).sum(axis=1)),
            "binding.random": _wins_over_others(image, true, own, person, person[usable]),
        }
    )


def _wins(margin: Floats) -> Floats:
    return np.asarray(np.where(np.abs(margin) < _TIE, 0.5, margin > 0), np.float64)


def _wins_over_others(
    image: Floats, true: Floats, texts: Floats, person: npt.NDArray[np.int64], mine: npt.NDArray[np.int64]
) -> Floats:
    """The mean win of each row over all texts of other people, shape (U,)."""
    means = np.full(len(image), np.nan)
    for start in range(0, len(image), _CHUNK):
        some = slice(start, start + _CHUNK)
        wins = _wins(true[some, None] - image[some] @ texts.T)  # (u, M)
        others = person[None, :] != mine[some, None]
        count = others.sum(axis=1)
        means[some] = np.where(count > 0, (wins * others).sum(axis=1) / np.maximum(count, 1), np.nan)
    return means


def summarise_binding(scores: pd.DataFrame, *, judge: str = "", seed: int = 0) -> pd.DataFrame:
    """Return both win rates as rows of the `interpretability` table; `items` is the number of usable captions.

    Args:
        scores: what `score_binding` returned.
        judge: name of the model, if it is not the explained one.
        seed: of the bootstrap over people.
    """
    people = dict(zip(scores["image_id"].astype(str), scores["person_id"].astype(str), strict=True))
    return summarise_scores(scores, people, METRICS, judge=judge, seed=seed)
