"""Whether maps depend on what they claim to: on the weights, on the phrase, and not on the seed of the training.

An explainer whose maps survive a model without information (Adebayo et al. 2018, arXiv:1810.03292) or another phrase
draws the picture, not the model.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import tables
from reidctl.errors import DataError
from reidctl.explain.concentration import same_grids
from reidctl.explain.maps import Heat, Phrase, grid_map, named_rows, upsample
from reidctl.methods.base import Method
from reidctl.metrics import Floats

WEIGHTS, PHRASES, STABILITY = "sanity.weights", "sanity.phrases", "stability"
"""Names of the three correlations in the `interpretability` table."""

Rows = int | npt.NDArray[np.int64]

_KEYS = ["query_id", "image_id", "phrase", "explainer"]


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Return Spearman's rank correlation of each pair of maps, shape (M,), in [-1, 1].

    Pearson's correlation of the ranks; tied patches have the mean of their ranks. A constant map orders nothing: its
    correlation is 0.

    Args:
        a, b: shape (M, N).
    """
    from scipy.stats import rankdata  # scipy.stats takes most of a second to import

    ranks = [rankdata(np.asarray(maps), axis=1) for maps in (a, b)]
    x, y = (rank - (rank.shape[1] + 1) / 2 for rank in ranks)  # (M, N), of mean 0
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.asarray(np.clip((x * y).sum(axis=1) / np.where(scale > 0, scale, 1.0), -1.0, 1.0))


def randomised(method: Method, seed: int) -> Method:
    """Return a copy of a method whose weights hold no information, in the same mode and on the same device.

    The entries of every parameter change places at random, so each keeps its distribution and the activations their
    rough size. Buffers stay. A parameter of equal entries, such as an untrained norm, cannot change.

    Args:
        method: the trained method; not changed.
        seed: the same seed gives the same weights, on any device.
    """
    copied = copy.deepcopy(method)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            order = torch.randperm(parameter.numel(), generator=rng).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return copied


def shuffled_phrases(phrases: Sequence[Phrase], *, seed: int = 0) -> list[Phrase]:
    """Return each pair with a phrase of another caption and of another text (capitals aside), in order.

    Phrases change hands, so that each is given away once; where one caption or one text has so many that this does not
    work out, some that fit are taken again. The new phrase stands alone, without a sentence and a place in it.

    Args:
        phrases: the explained pairs.
        seed: of the exchange.

    Raises:
        DataError: a pair to which no phrase fits.
    """
    caption = np.unique([phrase.query_id for phrase in phrases], return_inverse=True)[1]
    text = np.unique([phrase.text.casefold() for phrase in phrases], return_inverse=True)[1]
    givers = _exchange(caption, text, np.random.default_rng((seed, 51)))
    alone = {"char_start": 0, "char_end": 0, "sentence": ""}
    return [
        replace(phrases[giver], query_id=phrase.query_id, image_id=phrase.image_id, **alone)
        for phrase, giver in zip(phrases, givers.tolist(), strict=True)
    ]


def _exchange(
    caption: npt.NDArray[np.int64], text: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Whose phrase each row gets: a random order, in which rows that got none that fits swap with others."""
    given = rng.permutation(len(caption))

    def fits(row: Rows, giver: Rows) -> npt.NDArray[np.bool_]:
        return np.asarray((caption[row] != caption[giver]) & (text[row] != text[giver]))

    everyone = np.arange(len(caption))
    for row in np.flatnonzero(~fits(everyone, given)).tolist():
        swaps = np.flatnonzero(fits(row, given) & fits(everyone, int(given[row])))
        if len(swaps):
            other = rng.choice(swaps)
            given[row], given[other] = given[other], given[row]
        elif not fits(row, int(given[row])):
            again = np.flatnonzero(fits(row, everyone))
            if not len(again):
                raise DataError(
                    "Phrases cannot be exchanged: all others are of the same caption or of the same text.",
                    hint="Explain more captions, without --phrase.",
                )
            given[row] = rng.choice(again)
    return given


def compare_maps(first: pd.DataFrame, second: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the rank correlation of two tables of maps, row by row; NaN where the first map is constant.

    A constant map has no order that could be kept: counted as 0, an explainer that draws nothing would pass.

    Args:
        first: rows of the `explanations` table.
        second: as many rows: other maps of the same images by the same explainers, in the same order. Maps over
            another grid are compared on that of the first, bilinear in between.
        name: of the column with the correlation: `WEIGHTS`, `PHRASES` or `STABILITY`.

    Returns:
        Columns query_id, image_id, phrase, explainer (of the first) and `name`; see `summarise_scores`.
    """
    for column in ("image_id", "explainer"):
        assert first[column].tolist() == second[column].tolist(), f"the rows differ in {column}"
    found = first[_KEYS].reset_index(drop=True).assign(**{name: math.nan})
    for grid, rows in same_grids(first):
        a = tables.matrix(first["relevance"].iloc[rows])
        drawn = a.max(axis=1) > a.min(axis=1)
        found.loc[rows, name] = np.where(drawn, spearman(a, _on_grid(second.iloc[rows], grid)), np.nan)
    return found


def _on_grid(explanations: pd.DataFrame, grid: tuple[int, int]) -> Heat:
    maps = [grid_map(row) for row in named_rows(explanations)]
    return np.stack([(heat if heat.shape == grid else upsample(heat, grid)).ravel() for heat in maps])


def stability(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return the rank correlation of the maps of two models, for every phrase, image and explainer that both have.

    Two models that differ in the seed, or in the dataset they were trained on, should point at the same place for the
    same phrase.

    Args:
        first, second: rows of the `explanations` table; a phrase that occurs twice in a caption counts once.

    Returns:
        As `compare_maps`, with the column `stability`; in the order of the first.

    Raises:
        DataError: they have no row in common.
    """
    one, other = (frame.drop_duplicates(_KEYS).reset_index(drop=True) for frame in (first, second))
    places = one[_KEYS].assign(a=one.index).merge(other[_KEYS].assign(b=other.index), on=_KEYS).sort_values("a")
    if places.empty:
        raise DataError(
            "The two models have no explained phrase in common.",
            hint="Run `reidctl interpret` on both with the same data, --samples, --seed and --explainer.",
        )
    return compare_maps(one.iloc[places["a"]], other.iloc[places["b"]], STABILITY)
