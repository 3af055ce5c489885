"""Look-alikes: is an image more like another image of the person than like one of the look-alike?

Two kinds of pairs take clothes and bodies apart: `outfit` (another body in the same clothes: only the body tells them
apart) and `body` (the same body in other clothes: only the clothes do). A feature of bodies alone scores 1 and 1/2, one
of clothes alone 1/2 and 1. A retrieval model needs both; how far a stream was decoupled shows in the difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.metrics import Interval, bootstrap_interval

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FEWEST_PAIRS = 5  # below, a share has no interval
KINDS = ("outfit", "body", "outfit-changed", "strangers")
_SAME = 1e-9  # cosines up to this apart are equal: their order is rounding


@dataclass(frozen=True)
class Share:
    """How often the person wins.

    Attributes:
        share: mean over the questions, with a 95 % interval from resampling pairs of people; no interval below 5 pairs.
        questions: images (or texts) that were asked about.
        triples: comparisons of two similarities.
        pairs: pairs of look-alikes.
    """

    share: Interval
    questions: int
    triples: int
    pairs: int


@dataclass(frozen=True)
class LookAlikes:
    """Who looks like whom among some images, all of shape (N,).

    Attributes:
        person: code of the person.
        partner: code of the look-alike, -1 for those without one among the images.
        kind: `outfit`, `body` or empty.
        camera: code of the camera; an unknown one is no other image's.
        outfit: code of the outfit; -1 if unknown.
    """

    person: npt.NDArray[np.int64]
    partner: npt.NDArray[np.int64]
    kind: npt.NDArray[np.object_]
    camera: npt.NDArray[np.int64]
    outfit: npt.NDArray[np.int64]

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len({(min(a, b), max(a, b)) for a, b in zip(self.person, self.partner, strict=True) if b >= 0})


def look_alikes(images: pd.DataFrame) -> LookAlikes:
    """Return who looks like whom, from the attributes `clone_of` and `clone_kind`.

    Args:
        images: rows of the table `images`.
    """
    people = {str(name): number for number, name in enumerate(sorted(set(images["person_id"].astype(str))))}
    column = images["attributes"] if "attributes" in images else [None] * len(images)
    known: list[dict[str, str]] = [row if isinstance(row, dict) else {} for row in column]
    partner = np.array([people.get(row.get("clone_of") or "", -1) for row in known], np.int64)
    kind = np.array(
        [row.get("clone_kind") or "" if there >= 0 else "" for row, there in zip(known, partner, strict=True)], object
    )
    camera = pd.factorize(images["camera_id"])[0] if "camera_id" in images else np.full(len(images), -1)
    outfit = pd.factorize(images["outfit_id"])[0] if "outfit_id" in images else np.full(len(images), -1)
    unknown = camera < 0
    camera = np.where(unknown, len(images) + np.arange(len(images)), camera)
    person = np.array([people[str(name)] for name in images["person_id"]], np.int64)
    return LookAlikes(person, partner, kind, camera, np.asarray(outfit, np.int64))


def image_shares(features: npt.NDArray[Any], alike: LookAlikes, *, seed: int = 0) -> dict[str, Share]:
    """Return by kind how often cos(a, a') > cos(a, b), a tie counting 1/2: chance is 1/2.

    a is an image of somebody with a look-alike, a' another image of the same person, b one of the look-alike. a' and b
    come from other cameras than a's where both can, and a' wears a's outfit where outfits are known. The share is the
    mean over the images a of the share of its triples (a, a', b).

    `outfit` and `body`: by the kind of the look-alike; b of an `outfit` pair wears a's outfit. `outfit-changed`: the
    same bodies, but a' wears another outfit than a while b wears a's: the clothes speak for the wrong one.
    `strangers`: a' against everybody else than the person and the look-alike, for the same a: the point of reference.
    A kind without any triple is left out.

    Args:
        features: shape (N, D), any length.
        alike: of the same images.
        seed: of the bootstrap.
    """
    unit = _unit(features)
    rows = np.flatnonzero(alike.partner >= 0)
    return _shares(unit[rows] @ unit.T, rows, alike, seed, text=False)


def text_shares(
    texts: npt.NDArray[Any], row: npt.NDArray[np.int64], features: npt.NDArray[Any], alike: LookAlikes, *, seed: int = 0
) -> dict[str, Share]:
    """Return by kind how often a text is more like an image of its person than like one of the look-alike.

    As `image_shares` with a text of image a in the place of a: a' may be a itself, and cameras do not matter.

    Args:
        texts: vectors of texts in the space of `features`, shape (T, D).
        row: the image that each text describes, shape (T,).
        features: of the images, shape (N, D).
        alike: of the images.
        seed: of the bootstrap.
    """
    asked = alike.partner[row] >= 0
    return _shares(_unit(texts)[asked] @ _unit(features).T, row[asked], alike, seed, text=True)


def _unit(features: npt.NDArray[Any]) -> Floats:
    values = np.asarray(features, np.float64)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def _shares(
    similar: Floats, rows: npt.NDArray[np.int64], alike: LookAlikes, seed: int, *, text: bool
) -> dict[str, Share]:
    found: dict[str, list[tuple[float, int, str]]] = {kind: [] for kind in KINDS}
    for scores, row in zip(similar, rows, strict=True):
        pair = sorted((int(alike.person[row]), int(alike.partner[row])))
        for kind, own, others in _choices(int(row), alike, text=text):
            found[kind].append((_wins(scores[own], scores[others]), int(own.sum() * others.sum()), f"{pair}"))
    shares = {}
    for kind, answers in found.items():
        if answers:
            values, triples, pairs = zip(*answers, strict=True)
            shares[kind] = Share(_interval(np.array(values), pairs, seed), len(values), sum(triples), len(set(pairs)))
    return shares


def _choices(row: int, alike: LookAlikes, *, text: bool) -> Iterator[tuple[str, Mask, Mask]]:
    """The kinds that an image takes part in: which images are its person's, and which they are compared with."""
    mine, partner = alike.person == alike.person[row], alike.person == alike.partner[row]
    own, others, kind = mine.copy(), partner, str(alike.kind[row])
    own[row] = text
    strangers = ~mine & ~partner
    known = alike.outfit[row] >= 0
    same = alike.outfit == alike.outfit[row] if known else np.ones(len(own), bool)
    if kind == "outfit":
        yield from _asked("outfit", own & same, others & same, row, alike, text=text)
        yield from _asked("outfit-changed", own & ~same, others & same, row, alike, text=text)
    elif kind == "body":
        yield from _asked("body", own & same, others, row, alike, text=text)
    yield from _asked("strangers", own & same, strangers, row, alike, text=text)


def _asked(
    kind: str, own: Mask, others: Mask, row: int, alike: LookAlikes, *, text: bool
) -> Iterator[tuple[str, Mask, Mask]]:
    """A kind, with images of other cameras alone where both sides have some; nothing if a side is empty."""
    away = alike.camera != alike.camera[row]
    if not text and (own & away).any() and (others & away).any():
        own, others = own & away, others & away
    if own.any() and others.any():
        yield kind, own, others


def _wins(own: Floats, others: Floats) -> float:
    """The share of pairs in which `own` is larger, a tie counting 1/2."""
    ranked = np.sort(others)
    below = np.searchsorted(ranked, own - _SAME, side="left")
    up_to = np.searchsorted(ranked, own + _SAME, side="right")
    return float((below + up_to).mean() / (2 * len(ranked)))


def _interval(values: Floats, pairs: tuple[str, ...], seed: int) -> Interval:
    found = bootstrap_interval(values, pairs, seed=seed)
    return found if len(set(pairs)) >= FEWEST_PAIRS else Interval(found.value, np.nan, np.nan)
