"""Which phrases to explain, and their relevance maps as rows of the `explanations` table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional

from reidctl import tables
from reidctl.batch import Batch, Tokens
from reidctl.data import Corpus, known_cameras
from reidctl.errors import DataError
from reidctl.methods.base import Explainer, Method
from reidctl.pixels import PixelStore, normalise

USER_QUERY = "user"
"""The `query_id` of a phrase that comes from the command line, not from a caption."""

Heat = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Phrase:
    """A piece of text and the image that it is looked for in.

    Attributes:
        query_id: the caption that the phrase stands in; `USER_QUERY` if it stands in none.
        image_id: the image.
        text: the phrase.
        char_start, char_end: where the phrase stands in the caption, half-open.
    """

    query_id: str
    image_id: str
    text: str
    char_start: int
    char_end: int


def pick_phrases(
    corpus: Corpus, captions: pd.DataFrame, *, samples: int, seed: int, phrase: str | None = None
) -> list[Phrase]:
    """Return the phrases of a seeded choice of captions, each with the caption's own image.

    Args:
        corpus: the images and full captions to choose from.
        captions: the `captions` table; its rows of kind `phrase` belong to captions by `parent_id`. A caption
            without phrases is explained as a whole.
        samples: how many captions (or images, with `phrase`) to choose; all if there are fewer.
        seed: of the choice.
        phrase: explain this text on a choice of images instead.

    Raises:
        DataError: there is nothing to choose from.
    """
    rng = np.random.default_rng((seed, 11))
    if phrase is not None:
        rows = _choose(len(corpus.images), samples, rng)
        images = corpus.images["image_id"].iloc[rows]
        return [Phrase(USER_QUERY, str(name), phrase, 0, len(phrase)) for name in images]
    if not len(corpus.captions):
        raise DataError("The split has no captions to explain.", hint="Give a text: --phrase 'red shirt'.")
    usable = (captions["kind"] == "phrase") & (captions["status"] == "ok") & captions["text"].notna()
    children = dict(list(captions[usable].groupby("parent_id", sort=False)))
    chosen = corpus.captions.iloc[_choose(len(corpus.captions), samples, rng)]
    return [phrase for row in chosen.to_dict("records") for phrase in _of_caption(row, children.get(row["caption_id"]))]


def _choose(count: int, samples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.sort(rng.permutation(count)[:samples])


def _of_caption(caption: dict[Any, Any], phrases: pd.DataFrame | None) -> list[Phrase]:
    query, image, sentence = str(caption["caption_id"]), str(caption["image_id"]), str(caption["text"])
    if phrases is None:
        return [Phrase(query, image, sentence, 0, len(sentence))]
    found = []
    for row in phrases.to_dict("records"):
        text = str(row["text"])
        # Tables of other tools may lack the offsets; a phrase that is not in its sentence gets an empty range.
        known = not (pd.isna(row["char_start"]) or pd.isna(row["char_end"]))
        start = int(row["char_start"]) if known else max(sentence.lower().find(text.lower()), 0)
        inside = known or text.lower() in sentence.lower()
        end = int(row["char_end"]) if known else start + len(text) * inside
        found.append(Phrase(query, image, text, start, end))
    return found


def explain_phrases(
    method: Method,
    corpus: Corpus,
    phrases: Sequence[Phrase],
    *,
    explainer: Explainer = "gradcam",
    batch: int = 32,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Return the `explanations` rows of phrases, in order: relevance over the patch grid and the phrase's similarity.

    Args:
        method: a trained method on `device`, in evaluation mode.
        corpus: holds the images of all phrases.
        phrases: what to explain.
        explainer: see `Method.explain`.
        batch: pairs per forward pass.
        device: where to compute.
        advance: called with the number of pairs done.

    Raises:
        UsageError: the explainer is unknown.
        DataError: an image cannot be read, or the method reads a gallery text that an image lacks.
    """
    row_of = {str(name): row for row, name in enumerate(corpus.images["image_id"])}
    store = PixelStore(
        corpus.paths(),
        method.backbone.image_size,
        cache_bytes=1 << 26,
        interpolation=method.backbone.interpolation,
    )
    frames = []
    for start in range(0, len(phrases), batch):
        part = list(phrases[start : start + batch])
        given = pair_batch(method, corpus, [row_of[p.image_id] for p in part], [p.text for p in part], store).to(device)
        relevance = method.explain(given, explainer).float().cpu().numpy()  # (b, h, w)
        with torch.no_grad():
            similarity = (method.embed_images(given) * method.embed_texts(given)).sum(dim=1).cpu().numpy()
        frames.append(_rows(part, relevance, similarity, explainer))
        if advance:
            advance(len(part))
    return pd.concat(frames, ignore_index=True) if frames else tables.empty("explanations")


def pair_batch(
    method: Method, corpus: Corpus, rows: Sequence[int], texts: Sequence[str] | None, store: PixelStore
) -> Batch:
    """Return images `rows` of the corpus with texts as one batch; also the texts that the method's gallery side reads.

    Raises:
        DataError: an image cannot be read or lacks a text that the gallery side reads.
    """
    backbone = method.backbone
    tokens: dict[str, Tokens] = {} if texts is None else {"full": backbone.tokenize(list(texts))}
    for kind in method.gallery_texts:
        described: list[str | None] = getattr(corpus, kind)
        lacking = [row for row in rows if not described[row]]
        if lacking:
            name = corpus.images["image_id"].iloc[lacking[0]]
            raise DataError(f"Image `{name}` has no {kind} text.", hint="Run `reidctl caption` on this dataset first.")
        tokens[kind] = backbone.tokenize([str(described[row]) for row in rows])
    pixels = np.stack([store[row] for row in rows])
    names = tuple(str(corpus.images["image_id"].iloc[row]) for row in rows)
    camera = known_cameras(corpus.images.iloc[list(rows)], method.cameras)
    return Batch(image=normalise(pixels, backbone.mean, backbone.std), texts=tokens, image_id=names, camera=camera)


def _rows(phrases: Sequence[Phrase], relevance: Heat, similarity: Heat, explainer: str) -> pd.DataFrame:
    height, width = relevance.shape[1:]
    return pd.DataFrame(
        {
            "query_id": [phrase.query_id for phrase in phrases],
            "image_id": [phrase.image_id for phrase in phrases],
            "phrase": [phrase.text for phrase in phrases],
            "char_start": [phrase.char_start for phrase in phrases],
            "char_end": [phrase.char_end for phrase in phrases],
            "explainer": explainer,
            "similarity": similarity,
            "grid_h": height,
            "grid_w": width,
            "relevance": tables.vectors(relevance.reshape(len(phrases), -1)),
        }
    )


def upsample(relevance: npt.NDArray[Any], size: tuple[int, int]) -> Heat:
    """Return a map (h, w) at the resolution of the picture (height, width), bilinear between patch centres."""
    grid = torch.tensor(np.asarray(relevance, np.float32))[None, None]
    return np.asarray(functional.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy())


def grid_map(row: Any) -> Heat:
    """Return the map of one `explanations` row (anything with its columns as attributes), shape (grid_h, grid_w)."""
    return np.asarray(row.relevance, np.float32).reshape(int(row.grid_h), int(row.grid_w))


def named_rows(frame: pd.DataFrame) -> list[Any]:
    """Return a frame's rows with its columns as attributes."""
    return list(frame.itertuples())
