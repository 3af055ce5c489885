"""Descriptions damaged on purpose, to measure how much training depends on them."""

import numpy as np

from reidctl.data import Corpus
from reidctl.errors import DataError


def exchange_descriptions(corpus: Corpus, share: float, *, seed: int = 0) -> Corpus:
    """Return the corpus with the identity and clothing texts of some train images taken from other people's images.

    The limitation that 001 and 002 name (their texts are only as good as the model that wrote them), made measurable:
    train at several shares and draw the curve. Other splits keep their texts. The draw depends on the seed and the
    image alone: a higher share damages the same images in the same way, and more.

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
    order = np.random.default_rng((seed, 164)).permutation(len(rows))
    for place in order[: round(share * len(rows))]:
        others = np.flatnonzero(people != people[place])
        giver = rows[others[np.random.default_rng((seed, 165, int(rows[place]))).integers(len(others))]]
        identity[rows[place]], clothing[rows[place]] = corpus.identity[giver], corpus.clothing[giver]
    return Corpus(corpus.images, corpus.captions, identity, clothing, corpus.root)
