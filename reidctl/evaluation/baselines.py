"""What any score must be compared with: chance, colours alone, an oracle that knows the attributes, shuffled labels.

Every baseline is a pair of vector sets for the protocol at hand, evaluated by the same code as a trained model
(`protocols.with_vectors`). `metrics.chance` gives the score of a random ranking.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from reidctl.errors import DataError
from reidctl.evaluation.protocols import Protocol
from reidctl.metrics import QueryMetrics, chance
from reidctl.retrieval.exact import Ranking

Matrix = npt.NDArray[np.float32]
Attributes = Sequence[Mapping[str, str] | None]

# True of the picture or of the moment, not of the person and the outfit.
PER_IMAGE = frozenset({"view", "camera", "carried", "carrying", "pose", "occluder", "occluded", "background"})
_CHUNK = 4096
_VOCABULARY = 2000


def chance_of(ranking: Ranking) -> QueryMetrics:
    """Return the score of a random ranking with the same matches and gallery sizes."""
    return chance(ranking.queries.matches, ranking.gallery, cutoffs=tuple(ranking.queries.hits))


def label_shuffle(protocol: Protocol, *, seed: int = 0) -> Protocol:
    """Return the protocol with the gallery's people shuffled among its images: every honest score becomes chance.

    A score above chance here would mean that the evaluation, not the model, finds people. The people are dealt in
    the order of image ids, so the order of the rows does not matter.
    """
    order = np.argsort(protocol.gallery.item.astype(str), kind="stable")
    person = protocol.gallery.person.copy()
    person[order] = person[order][np.random.default_rng(seed).permutation(len(order))]
    return replace(protocol, condition="label-shuffle", gallery=replace(protocol.gallery, person=person))


def colour_histograms(paths: Sequence[Path], *, bins: int = 8) -> Matrix:
    """Return joint RGB histograms of whole images, unit length, shape (N, bins^3): colours without any layout.

    Raises:
        DataError: an image that cannot be read.
    """
    found = np.zeros((len(paths), bins**3), np.float32)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"), np.int64)
        except OSError as error:
            raise DataError(f"Cannot read image {path}: {error}.") from None
        found[row] = histogram(pixels, bins=bins)
    return found


def histogram(pixels: npt.NDArray[Any], *, bins: int = 8) -> Matrix:
    """Return the joint RGB histogram of pixels (H, W, 3) in 0..255, unit length, shape (bins^3,)."""
    level = pixels.reshape(-1, 3).astype(np.int64) * bins // 256
    counts = np.bincount(level @ np.array([bins * bins, bins, 1]), minlength=bins**3).astype(np.float64)
    return np.asarray(counts / np.linalg.norm(counts), np.float32)


@dataclass(frozen=True)
class WordsToColours:
    """A ridge regression from the words of a caption to the colour histogram of its image.

    Args:
        vocabulary: column of each known word.
        weights: shape (V + 1, C); the last row is the intercept.
    """

    vocabulary: dict[str, int]
    weights: npt.NDArray[np.float64]

    def predict(self, texts: Sequence[str]) -> Matrix:
        """Return the predicted histogram of each text, unit length, shape (N, C)."""
        parts = [
            _bag(texts[start : start + _CHUNK], self.vocabulary) @ self.weights
            for start in range(0, len(texts), _CHUNK)
        ]
        return _unit(np.concatenate(parts) if parts else np.zeros((0, self.weights.shape[1])))


def fit_words_to_colours(texts: Sequence[str], histograms: Matrix, *, penalty: float = 1.0) -> WordsToColours:
    """Fit W = (XᵀX + penalty·I)⁻¹ XᵀY on training captions X (word present or not) and their images' histograms Y.

    The 2,000 most frequent words that occur at least twice are known. The intercept is not penalised. Nothing
    is tuned; pass training rows only.

    Args:
        texts: training captions, shape (N,).
        histograms: the histogram of each caption's image, shape (N, C).
        penalty: > 0.
    """
    assert len(texts) == len(histograms), "one histogram per caption"
    if not len(texts):
        raise DataError("The colour baseline for text needs training captions.", hint="Use a split that has them.")
    counts = Counter(word for text in texts for word in set(_words(text)))
    frequent = sorted(((-n, word) for word, n in counts.items() if n > 1))[:_VOCABULARY]
    vocabulary = {word: column for column, (_, word) in enumerate(frequent)}
    gram = np.diag(np.append(np.full(len(vocabulary), penalty), 1e-9))
    target = np.zeros((len(vocabulary) + 1, histograms.shape[1]))
    for start in range(0, len(texts), _CHUNK):
        bag = _bag(texts[start : start + _CHUNK], vocabulary)
        gram += bag.T @ bag
        target += bag.T @ histograms[start : start + _CHUNK].astype(np.float64)
    return WordsToColours(vocabulary, np.asarray(np.linalg.solve(gram, target), np.float64))


def attribute_oracle(
    query: Attributes, gallery: Attributes, *, ignore: Collection[str] = PER_IMAGE
) -> tuple[Matrix, Matrix] | None:
    """Return vectors whose cosine is the share of true attributes on which two images agree.

    A model cannot know more about identity and clothing than this; people who agree on everything (clones) tie.

    Args:
        query: true attributes of each query image, shape (Q,).
        gallery: likewise, shape (G,).
        ignore: attributes of the image, not of the person.

    Returns:
        Vectors of shapes (Q, V) and (G, V), or None when an image has no attributes.
    """
    if not _complete(query, gallery):
        return None
    columns = _columns(gallery, ignore)
    return _encode(map(_pairs(ignore), query), columns), _encode(map(_pairs(ignore), gallery), columns)


def caption_oracle(
    texts: Sequence[str], query: Attributes, gallery: Attributes, *, ignore: Collection[str] = frozenset()
) -> tuple[Matrix, Matrix] | None:
    """Return vectors whose product counts on how many attribute values named by the caption an image agrees.

    A value counts as named if all its words occur in the caption (singular or with s). It knows what the words
    mean, which a model must learn, yet not what the caption does not say: the ceiling for text queries.

    Args:
        texts: query captions, shape (Q,).
        query: true attributes of the image that each caption describes, shape (Q,).
        gallery: true attributes of the gallery images, shape (G,).
        ignore: attributes to leave out.

    Returns:
        Vectors of shapes (Q, V) and (G, V), of length at most 1 (a caption that names nothing is all zeros and ties
        everywhere), or None when an image has no attributes.
    """
    if not _complete(query, gallery):
        return None
    columns = _columns(gallery, ignore)
    pairs = _pairs(ignore)
    named = []
    for text, values in zip(texts, query, strict=True):
        words = set(_words(text))
        named.append([pair for pair in pairs(values) if _is_named(pair[1], words)])
    return _encode(named, columns), _encode(map(pairs, gallery), columns)


def _complete(query: Attributes, gallery: Attributes) -> bool:
    return bool(len(query) and len(gallery)) and all(query) and all(gallery)


def _pairs(ignore: Collection[str]) -> Any:
    return lambda values: [pair for pair in values.items() if pair[0] not in ignore]


def _columns(gallery: Attributes, ignore: Collection[str]) -> dict[tuple[str, str], int]:
    # Values that no gallery image has cannot distinguish gallery images, so they need no column.
    pairs = {pair for values in gallery if values for pair in values.items() if pair[0] not in ignore}
    return {pair: column for column, pair in enumerate(sorted(pairs))}


def _encode(items: Iterable[Sequence[tuple[str, str]]], columns: Mapping[tuple[str, str], int]) -> Matrix:
    """One column per attribute value, scaled by one number for all rows so that none is longer than 1.

    One number, because images with more attributes must not be punished, and equal agreement must tie exactly.
    """
    rows = [[columns[pair] for pair in pairs if pair in columns] for pairs in items]
    scale = 1 / np.sqrt(max((len(row) for row in rows), default=1) or 1)
    found = np.zeros((len(rows), len(columns)), np.float32)
    for row, chosen in enumerate(rows):
        found[row, chosen] = scale
    return found


def _is_named(value: str, words: set[str]) -> bool:
    parts = _words(value)
    return bool(parts) and all(part in words or part + "s" in words for part in parts)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _bag(texts: Sequence[str], vocabulary: Mapping[str, int]) -> npt.NDArray[np.float64]:
    """Which known words occur, shape (N, V + 1); the last column is the intercept's one."""
    bag = np.zeros((len(texts), len(vocabulary) + 1))
    bag[:, -1] = 1
    for row, text in enumerate(texts):
        bag[row, [vocabulary[word] for word in _words(text) if word in vocabulary]] = 1
    return bag


def _unit(values: npt.NDArray[np.float64]) -> Matrix:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12), np.float32)
