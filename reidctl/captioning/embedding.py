"""Text encoders for styles: hashed n-grams beside measurements of form, CLIP's text tower, any sentence encoder."""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.captioning.form import measure

Embed = Callable[[list[str]], npt.NDArray[Any]]

_WIDTH = 384
# How much of the unit vector each group takes; forms generalise over wording, words separate phrasings.
_WORD_SHARE, _CHAR_SHARE, _FORM_SHARE = 0.5, 0.3, 0.7
_BATCH = 256


def make_embed(spec: str, device: str = "auto") -> Embed:
    """Return the text encoder that `StyleConfig.encoder` names: texts -> float32 vectors (N, D), any scale.

    `hashed` needs no weights; `sentence:ID or FOLDER` is any sentence encoder (`SentenceEncoder`); anything else is
    the text tower of a backbone: `clip:NAME/TAG`, or the bare `NAME/TAG`.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`; `hashed` uses none.

    Raises:
        UsageError: an unknown encoder, pooling or device.
        DataError: weights that are missing or cannot be used.
    """
    if spec == "hashed":
        return hashed
    kind, _, source = spec.partition(":")
    if kind == "sentence":
        from reidctl.captioning.sentence import SentenceEncoder

        return SentenceEncoder(source, device)
    return _tower(spec if ":" in spec else f"clip:{spec}", device)


def _tower(spec: str, device: str) -> Embed:
    import torch

    from reidctl.backbones.weights import build
    from reidctl.console import progress
    from reidctl.device import resolve_device

    place = resolve_device(device)
    backbone = build(spec).eval().to(place)

    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        # Each result goes into place at once; a list of parts would hold everything twice when it is joined.
        out = np.zeros((len(texts), backbone.dim), np.float32)
        with torch.inference_mode(), progress("embed texts", len(texts), unit="texts") as advance:
            for start in range(0, len(texts), _BATCH):
                tokens = backbone.tokenize(texts[start : start + _BATCH]).to(place)
                out[start : start + len(tokens)] = backbone.encode_text(tokens).pooled.float().cpu().numpy()
                advance(len(tokens))
        return out

    return embed


def hashed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return one unit vector per text, shape (N, 776), the same on every machine.

    Word unigrams and bigrams, and character trigrams of punctuation and function words, hashed with CRC-32 into signed
    buckets, square-root damped; then eight scaled measurements of form. A stand-in for the CLIP text encoder of
    001/002 where no weights are at hand: it knows wording and layout, not meaning.

    Args:
        texts: neutral texts (`neutralise`).
    """
    out = np.zeros((len(texts), 2 * _WIDTH + 8), np.float32)
    for row, text in zip(out, texts, strict=True):
        words = text.lower().split()
        pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
        padded = f" {text} "
        trigrams = [padded[start : start + 3] for start in range(len(padded) - 2)]
        row[:_WIDTH] = _WORD_SHARE * _hash(words + pairs)
        row[_WIDTH : 2 * _WIDTH] = _CHAR_SHARE * _hash(trigrams)
        row[2 * _WIDTH :] = _FORM_SHARE * _form(text)
    return unit(out).astype(np.float32)


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return rows scaled to length 1, in their own precision; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0))


def _hash(items: list[str]) -> npt.NDArray[np.float32]:
    counts = np.zeros(_WIDTH, np.float32)
    for item in items:
        # Python's own hash is salted per process; CRC-32 is the same everywhere.
        code = zlib.crc32(item.encode("utf-8"))
        counts[code % _WIDTH] += 1.0 if code & 0x80000000 else -1.0
    damped = np.sign(counts) * np.sqrt(np.abs(counts))
    norm = float(np.linalg.norm(damped))
    return np.asarray(damped / norm if norm else damped, np.float32)


def _form(text: str) -> npt.NDArray[np.float32]:
    form = measure([text])
    scaled = [
        np.log1p(form.words) / 4.0,
        min(form.sentences, 6.0) / 4.0,
        min(form.commas, 8.0) / 8.0,
        min(4.0 * form.articles, 1.0),
        min(8.0 * form.hedges, 1.0),
        min(6.0 * form.connectives, 1.0),
        min(6.0 * form.ornaments, 1.0),
        min(2.0 * form.separators, 2.0) / 2.0,
    ]
    return np.asarray(scaled, np.float32)
