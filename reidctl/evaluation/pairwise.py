"""Pairwise re-ranking: a match head scores the first k items of every text query, the rest keeps its order.

A score of a pair needs both sides, so it cannot be indexed: Q queries on G images are Q·G forward passes of the fusion.
It is for the first k items and nothing else, and never with the cosine of a fused feature and the query that is in it.
Each image and each text is encoded once; per pair only the fusion and the head run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from reidctl.batch import Batch, Tokens
from reidctl.errors import UsageError
from reidctl.evaluation.protocols import Evaluation, Protocol, check_cutoffs, evaluation_of, rank, rank_by
from reidctl.layers.matching import Encoded, join
from reidctl.loading import loader_threads
from reidctl.methods.base import Method
from reidctl.metrics import CUTOFFS
from reidctl.pixels import PixelStore, image_batches
from reidctl.retrieval.products import full_precision, lattice

Advance = Callable[[int], None]
Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]

DEEPEST = 1000
"""The largest k: beyond it a search is paid for like Q·G."""
ABOVE = 2.0
"""Re-ranked items score this much plus their match probability, which no cosine reaches."""
_IMAGES, _TEXTS = 64, 256  # encoded at a time
_PAIRS, _VECTOR_PAIRS = 64, 4096  # fused at a time, with and without tokens: a scan keeps 2 MB for each
# Forward passes of other batch shapes differ in their last bits; pairs that are equal must tie.
_STEPS = 4096.0
_LIMIT = 30.0  # log-odds beyond which a probability in float64 is no longer told from 1


@dataclass(frozen=True)
class Pairwise:
    """Re-rank the first `depth` items.

    Raises:
        UsageError: `depth` is below 2 or above `DEEPEST`.
    """

    depth: int

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise UsageError(f"Re-ranking the first {self.depth} items changes nothing.", hint="Use pairwise/50, say.")
        if self.depth > DEEPEST:
            raise UsageError(
                f"`{self.name}` is too deep: every query is fused with every one of its k images, so the whole gallery "
                f"costs queries x images (O(Q·G)). It is only for re-ranking the first items, at most {DEEPEST}.",
                hint="Use pairwise/50, say.",
            )

    @property
    def name(self) -> str:
        """As people write it, e.g. `pairwise/50`."""
        return f"pairwise/{self.depth}"


def is_pairwise(text: str) -> bool:
    """Whether a `--rerank` value asks for this kind of re-ranking."""
    return text.split("/")[0] == "pairwise"


def parse(text: str) -> Pairwise:
    """Return what `pairwise/50` asks for.

    Raises:
        UsageError: k is missing, no whole number, below 2 or too large.
    """
    _, _, depth = text.partition("/")
    if not (depth.isascii() and depth.isdigit()):
        raise UsageError(
            f"`--rerank {text}` does not say how many of the first items to re-rank.", hint="Use pairwise/50, say."
        )
    return Pairwise(int(depth))


def check(method: Method, asked: Pairwise, gallery: int, where: str) -> None:
    """Refuse what has no head, and a k that is the whole gallery.

    Args:
        method: the model.
        asked: how deep.
        gallery: number of gallery images.
        where: which gallery, for the message.

    Raises:
        UsageError: no match head, or k is not below the gallery's size.
    """
    method.require_pairs()
    if asked.depth >= gallery:
        raise UsageError(
            f"`{asked.name}` would fuse every query with all {gallery} images of {where}: that is O(Q·G), and it is "
            "only for re-ranking the first items of a search.",
            hint=f"Use a k below {gallery}.",
        )


def score_pairs(
    method: Method,
    paths: Sequence[Path],
    texts: Sequence[str],
    candidates: Ints,
    *,
    device: torch.device,
    advance: Advance | None = None,
) -> Scores:
    """Return the log-odds of the candidates of every query, NaN where there is none, shape (Q, k).

    Rounded to 1/4096, so that equal pairs tie whatever batch they were computed in. Reads only the images that are a
    candidate, each once; texts are encoded once for each distinct one. In memory are all encoded texts and one block
    of encoded images: 4·W·(L + 1) bytes per text, W the fusion's width, L the longest text's tokens.

    Args:
        method: with a match head, in evaluation mode on `device`.
        paths: the gallery's image files.
        texts: the queries, length Q.
        candidates: rows of `paths`, -1 for none, shape (Q, k).
        device: where to compute.
        advance: called with a number of different pairs whenever so many more are done; see `count_pairs`.

    Raises:
        UsageError: no match head.
        DataError: an image cannot be read.
    """
    method.require_pairs()
    distinct, code, inverse = _distinct(texts, candidates)
    odds = np.zeros(len(code), np.float64)
    image, text = code // max(len(distinct), 1), code % max(len(distinct), 1)  # sorted by image
    rows, place = np.unique(image, return_inverse=True)
    backbone = method.backbone
    store = PixelStore(
        [paths[row] for row in rows], backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation
    )
    with torch.inference_mode():
        words = _encoded_texts(method, distinct, device)
        for block, pixels in image_batches(
            store, backbone.mean, backbone.std, batch=_IMAGES, threads=loader_threads(device.type)
        ):
            seen = method.encode_pair_images(Batch(image=pixels.to(device)))
            start, stop = np.searchsorted(place, [block.start, block.stop])
            step = _VECTOR_PAIRS if seen.tokens is None else _PAIRS
            for begin in range(start, stop, step):
                some = slice(begin, min(begin + step, stop))
                pairs = (torch.from_numpy(part[some]).to(device) for part in (place - block.start, text))
                odds[some] = _fused(method, seen, words, *pairs)
                if advance:
                    advance(some.stop - some.start)
    scores = np.full(candidates.shape, np.nan)
    scores[candidates >= 0] = odds[inverse]
    return scores


def count_pairs(texts: Sequence[str], candidates: Ints) -> int:
    """Return how many different pairs of text and image there are: what `score_pairs` computes."""
    return len(_distinct(texts, candidates)[1])


def _distinct(texts: Sequence[str], candidates: Ints) -> tuple[list[str], Ints, Ints]:
    """The different texts; the different pairs as image x texts + text, sorted; which one each candidate is."""
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    own = np.asarray([number[text] for text in texts], np.int64)
    query, column = np.nonzero(candidates >= 0)
    code, inverse = np.unique(candidates[query, column] * len(number) + own[query], return_inverse=True)
    return list(number), code, inverse


def _encoded_texts(method: Method, texts: list[str], device: torch.device) -> Encoded:
    parts = []
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        tokens = method.backbone.tokenize(some)
        length = int(tokens.mask.sum(1).max())
        trimmed = Tokens(tokens.ids[:, :length], tokens.mask[:, :length])
        given = Batch(texts={"full": trimmed}, phrases=method.phrases_of(some))
        parts.append(method.encode_pair_texts(given.to(device)))
    return join(parts)


def _fused(method: Method, images: Encoded, texts: Encoded, image: torch.Tensor, text: torch.Tensor) -> Scores:
    """Rounded log-odds of pairs; texts are cut to the longest among them."""
    words = texts[text]
    if words.tokens is not None and words.mask is not None:
        length = int(words.mask.sum(1).max())
        words = Encoded(words.pooled, words.tokens[:, :length], words.mask[:, :length])
    odds = method.pair_scores(images[image], words).double().cpu().numpy()
    rounded: Scores = np.rint(odds * _STEPS) / _STEPS
    return rounded


def candidates_of(protocol: Protocol, depth: int, *, device: str = "cpu") -> Ints:
    """Return the gallery rows of the first items of every query by its vectors, -1 where left out, shape (Q, depth).

    Items tied across the end of the list are all left out: which of them is in it would depend on their ids, and where
    ids are sorted, they know the person. So a model that gives every image one vector keeps scoring chance.
    """
    first = rank(protocol, top=depth + 1, device=device)
    score = np.where(first.index < 0, -np.inf, first.score)
    clear = score[:, :depth] > score[:, depth:]
    return np.where(clear, first.index[:, :depth], -1)


def evaluate_pairwise(
    protocol: Protocol,
    asked: Pairwise,
    score: Callable[[Ints], Scores],
    *,
    seed: int = 0,
    resamples: int = 1000,
    top: int = 50,
    cutoffs: Sequence[int] | None = None,
    device: str = "cpu",
    advance: Advance | None = None,
) -> Evaluation:
    """Re-rank the first items of every query and summarise; the frames are those of `protocols.evaluate`.

    In `rankings`, `score` is 2 + match probability of re-ranked items and the cosine of the others, which therefore
    stand below in their old order.

    Args:
        protocol: text queries among images; vectors must be unit vectors.
        asked: how many of the first items.
        score: returns the log-odds of candidates (gallery rows, -1 for none), shape (Q, k); see `score_pairs`.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        top: how many items of each ranking to keep.
        cutoffs: see `protocols.evaluate`.
        device: where products are computed.
        advance: called with the number of queries after each block.

    Raises:
        UsageError: k is not below the gallery's size, or the queries are no texts.
    """
    query, gallery = protocol.query, protocol.gallery
    check_cutoffs(protocol, cutoffs or ())
    if protocol.direction != "t2i" or asked.depth >= len(gallery):
        raise UsageError(f"`{asked.name}` re-ranks the first items of text queries among more than {asked.depth}.")
    rows = candidates_of(protocol, asked.depth, device=device)
    shown = shown_score(score(rows))
    # Products of lattice vectors are exact in float64: the order of the others is that of the first search.
    images = lattice(gallery.vectors, torch.device("cpu")).double().T

    def block(part: slice) -> Scores:
        with full_precision():
            scores: Scores = (lattice(query.vectors[part], torch.device("cpu")).double() @ images).numpy()
        mine = rows[part]
        line, column = np.nonzero(mine >= 0)
        scores[line, mine[line, column]] = shown[part][line, column]
        return scores

    ranking = rank_by(protocol, block, top=top, cutoffs=cutoffs or CUTOFFS, advance=advance)
    name = f"rerank-{asked.name}"
    condition = name if protocol.condition == "standard" else f"{protocol.condition}+{name}"
    return evaluation_of(replace(protocol, condition=condition), ranking, seed=seed, resamples=resamples)


def shown_score(odds: Scores) -> Scores:
    """Return 2 + match probability: above every cosine, in the order of the log-odds."""
    return ABOVE + 1 / (1 + np.exp(-np.clip(odds, -_LIMIT, _LIMIT)))


def caveat(protocol: Protocol, asked: Pairwise) -> str:
    """Return what a reader of the numbers must know."""
    return (
        f"{protocol.dataset}, {protocol.direction}: {asked.name} fuses each of {len(protocol.query)} queries with its "
        f"first {asked.depth} of {len(protocol.gallery)} images (O(Q·k)) and leaves the order of the rest; a person "
        f"beyond them is not found by it."
    )
