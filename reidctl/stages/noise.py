"""Descriptions and captions damaged on purpose, to measure how much training depends on them."""

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.data import Corpus
from reidctl.datasets.degrade import degrade
from reidctl.errors import DataError


def exchange_descriptions(corpus: Corpus, share: float, *, seed: int = 0) -> Corpus:
    """Return the corpus with the identity and clothing texts of some train images taken from other people's images.

    The limitation that 001 and 002 name (their texts are only as good as the model that wrote them), made measurable:
    train at several shares and draw the curve. Other splits keep their texts. Whether an image
    is damaged depends on the seed and its id: a higher share damages the same images in the same way, and more.

    Args:
        corpus: all splits.
        share: of the described train images, in [0, 1].
        seed: of the draw.

    Raises:
        DataError: fewer than two described people.
    """
    if not share:
        return corpus
    described = np.asarray([bool(a and b) for a, b in zip(corpus.identity, corpus.clothing, strict=True)])
    rows = np.flatnonzero((corpus.images["split"] == "train").to_numpy() & described)
    people = corpus.images["person_id"].to_numpy()[rows]
    if len(np.unique(people)) < 2:
        raise DataError(
            "data.description_noise exchanges texts between people, and fewer than two people are described.",
            hint="Run `reidctl caption` first.",
        )
    identity, clothing = list(corpus.identity), list(corpus.clothing)
    ids = [str(corpus.images["image_id"].iloc[row]) for row in rows]
    order = np.argsort([_draw(seed, image_id, "order") for image_id in ids], kind="stable")
    by_person = np.argsort(people, kind="stable")
    first = np.searchsorted(people[by_person], people, side="left")
    count = np.searchsorted(people[by_person], people, side="right") - first
    for place in order[: round(share * len(rows))]:
        # Among the images of all others: sorted by person, the own ones are one block that is stepped over.
        draw = _draw(seed, ids[place], "giver") % (len(rows) - count[place])
        giver = rows[by_person[draw if draw < first[place] else draw + count[place]]]
        identity[rows[place]], clothing[rows[place]] = corpus.identity[giver], corpus.clothing[giver]
    return Corpus(corpus.images, corpus.captions, identity, clothing, corpus.root)


def degrade_captions(corpus: Corpus, kind: str, level: float, *, seed: int = 0) -> Corpus:
    """Return the corpus with the captions of the train split made worse; see `datasets.degrade`.

    Other splits keep theirs: the curve shows what a training owes to the quality of its captions.

    Args:
        corpus: all splits.
        kind: `drop`, `shorten`, `typo` or `shuffle` spoil words; `exchange` gives a share `level` of the captions to
            each other's images, the noisy correspondence of RDE (Qin et al. 2024, arXiv:2308.09911, section 4.1).
        level: in [0, 1].
        seed: of all draws.
    """
    if not level:
        return corpus
    train = (corpus.images["split"] == "train").to_numpy()
    captions = corpus.captions.copy()
    spoilt = train[captions["row"].to_numpy(int)]
    if kind == "exchange":
        captions["text"] = _exchanged(captions["text"], captions["caption_id"], spoilt, level, seed)
        return replace(corpus, captions=captions)
    captions["text"] = [
        degrade(str(text), kind, level, seed=seed, key=str(name)) if bad else text
        for text, name, bad in zip(captions["text"], captions["caption_id"], spoilt, strict=True)
    ]
    return replace(corpus, captions=captions)


def _exchanged(
    texts: "pd.Series[str]", names: "pd.Series[str]", train: npt.NDArray[np.bool_], share: float, seed: int
) -> list[str]:
    """The texts with a share of those in training passed on in a ring; a higher share takes the same ones and more.

    The next in the ring may be of the same person by chance, as where published code shuffles.
    """
    given = [str(text) for text in texts]
    rows = np.flatnonzero(train)
    order = np.argsort([_draw(seed, str(names.iloc[row]), "exchange") for row in rows], kind="stable")
    chosen = rows[order[: round(share * len(rows))]]
    for row, giver in zip(chosen, np.roll(chosen, 1), strict=True):
        given[row] = str(texts.iloc[giver])
    return given


def _draw(seed: int, image_id: str, what: str) -> int:
    code = hashlib.blake2b(f"{seed}\0{what}\0{image_id}".encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return int.from_bytes(code, "big")
