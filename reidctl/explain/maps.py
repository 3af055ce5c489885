"""Which phrases to explain, and their relevance maps as rows of the `explanations` table."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
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
from reidctl.explain.explainers import Aggregate, Asked, check_explainer, relevance
from reidctl.methods.base import Method
from reidctl.phrases.base import Phrase as PartPhrase
from reidctl.phrases.base import PhraseSource
from reidctl.phrases.sets import PhraseTable
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
        sentence: the caption; empty: the phrase stands alone.
        part: what it is about, of `phrases.base.PARTS`.
    """

    query_id: str
    image_id: str
    text: str
    char_start: int
    char_end: int
    sentence: str = ""
    part: str = "whole"

    @property
    def whole(self) -> bool:
        """Whether it is a whole caption, beside its phrases."""
        return bool(self.sentence) and self.text == self.sentence


def pick_phrases(
    corpus: Corpus,
    captions: pd.DataFrame,
    *,
    samples: int,
    seed: int,
    phrase: str | None = None,
    source: PhraseSource | None = None,
    whole: bool = False,
) -> list[Phrase]:
    """Return the phrases of a seeded choice of captions, each with the caption's own image.

    Args:
        corpus: the images and full captions to choose from.
        captions: the `captions` table; its rows of kind `phrase` belong to captions by `parent_id`.
        samples: how many captions (or images, with `phrase`) to choose; all if there are fewer.
        seed: of the choice.
        phrase: explain this text on a choice of images instead.
        source: finds the phrases of captions that the table has none of; without one they are explained as a whole.
        whole: also explain every caption as a whole, in front of its phrases.

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
    chosen = corpus.captions.iloc[_choose(len(corpus.captions), samples, rng)]
    return of_captions(chosen, captions, source=source, whole=whole)


def of_captions(
    chosen: pd.DataFrame, captions: pd.DataFrame, *, source: PhraseSource | None = None, whole: bool = False
) -> list[Phrase]:
    """Return the phrases of some captions (rows with caption_id, image_id, text), caption by caption.

    See `pick_phrases` for the arguments.
    """
    usable = (captions["kind"] == "phrase") & (captions["status"] == "ok") & captions["text"].notna()
    children = dict(list(captions[usable].groupby("parent_id", sort=False)))
    found: list[Phrase] = []
    for row in chosen.to_dict("records"):
        given = children.get(row["caption_id"])
        phrases = _given(row, given) if given is not None else _found(row, source)
        query, image, sentence = str(row["caption_id"]), str(row["image_id"]), str(row["text"])
        # A caption that is its own only phrase is explained once.
        phrases = [phrase for phrase in phrases if phrase.text != sentence]
        everything = Phrase(query, image, sentence, 0, len(sentence), sentence)
        found += ([everything] if whole or not phrases else []) + phrases
    return found


def _choose(count: int, samples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.sort(rng.permutation(count)[:samples])


def _given(caption: dict[Any, Any], phrases: pd.DataFrame) -> list[Phrase]:
    query, image, sentence = str(caption["caption_id"]), str(caption["image_id"]), str(caption["text"])
    found = []
    for row in phrases.to_dict("records"):
        text = str(row["text"])
        # Tables of other tools may lack the offsets; a phrase that is not in its sentence gets an empty range.
        known = not (pd.isna(row["char_start"]) or pd.isna(row["char_end"]))
        start = int(row["char_start"]) if known else max(sentence.lower().find(text.lower()), 0)
        inside = known or text.lower() in sentence.lower()
        end = int(row["char_end"]) if known else start + len(text) * inside
        found.append(Phrase(query, image, text, start, end, sentence))
    return found


def _found(caption: dict[Any, Any], source: PhraseSource | None) -> list[Phrase]:
    if source is None:
        return []
    query, image, sentence = str(caption["caption_id"]), str(caption["image_id"]), str(caption["text"])
    return [Phrase(query, image, p.text, p.start, p.end, sentence, p.part) for p in source([sentence])[0]]


def explain_phrases(
    method: Method,
    corpus: Corpus,
    phrases: Sequence[Phrase],
    *,
    explainer: str = "gradcam",
    batch: int = 32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    aggregate: Aggregate = "own",
    similarity: npt.NDArray[np.float32] | None = None,
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Return the `explanations` rows of phrases, in order: relevance over the patch grid and the phrase's similarity.

    Args:
        method: a trained method on `device`, in evaluation mode.
        corpus: holds the images of all phrases.
        phrases: what to explain; those of one caption and image stand together.
        explainer: one of `explainers.EXPLAINERS`.
        batch: pairs per forward pass, at least; a caption is never divided.
        device: where to compute.
        seed: of what an explainer draws at random.
        aggregate: how whole captions are explained; see `explainers.relevance`.
        similarity: of the phrases, shape (len(phrases),), where another explainer has made it; None: computed.
        advance: called with the number of pairs done.

    Raises:
        UsageError: the explainer is unknown, or the method does not have it.
        DataError: an image cannot be read, or the method reads a gallery text that an image lacks.
    """
    check_explainer(explainer, method)
    row_of = {str(name): row for row, name in enumerate(corpus.images["image_id"])}
    store = PixelStore(
        corpus.paths(),
        method.backbone.image_size,
        cache_bytes=1 << 26,
        interpolation=method.backbone.interpolation,
    )
    frames, done = [], 0
    for part in _parts(phrases, batch):
        asked = ask(method, corpus, part, row_of, store, device)
        found = relevance(method, asked, explainer, seed=seed, aggregate=aggregate).cpu().numpy()  # (b, h, w)
        known = None if similarity is None else similarity[done : done + len(part)]
        frames.append(_rows(part, found, _similarity(method, asked) if known is None else known, explainer))
        done += len(part)
        if advance:
            advance(len(part))
    return pd.concat(frames, ignore_index=True) if frames else tables.empty("explanations")


def _similarity(method: Method, asked: Asked) -> Heat:
    """The cosine of each phrase with its image, shape (P,); an image is encoded once for all phrases of a caption."""
    with torch.no_grad():
        images = method.embed_images(asked.captions)[asked.group]
        return np.asarray((images * method.embed_texts(asked.pairs)).sum(dim=1).float().cpu().numpy())


def _parts(phrases: Sequence[Phrase], batch: int) -> Iterator[list[Phrase]]:
    """Whole captions, together at least `batch` pairs each time."""
    part: list[Phrase] = []
    for _, members in groupby(phrases, key=lambda phrase: (phrase.query_id, phrase.image_id)):
        part += members
        if len(part) >= batch:
            yield part
            part = []
    if part:
        yield part


def ask(
    method: Method,
    corpus: Corpus,
    phrases: Sequence[Phrase],
    row_of: Mapping[str, int],
    store: PixelStore,
    device: torch.device | str,
) -> Asked:
    """Return phrases and their images as what explainers read; phrases of one caption and image stand together."""
    groups = [list(members) for _, members in groupby(phrases, key=lambda p: (p.query_id, p.image_id))]
    group = [number for number, members in enumerate(groups) for _ in members]
    place = [p for members in groups for p in _places(members)]
    pairs = pair_batch(method, corpus, [row_of[p.image_id] for p in phrases], [p.text for p in phrases], store)
    firsts = [members[0] for members in groups]
    sentences = [first.sentence or first.text for first in firsts]
    captions = pair_batch(method, corpus, [row_of[first.image_id] for first in firsts], sentences, store)
    # A sentence may come twice with different phrases: a table knows one list for each text.
    keys = [f"{number}\n{sentence}" for number, sentence in enumerate(sentences)]
    held = {
        key: [_plain(member, sentence) for member in members if not member.whole or len(members) == 1]
        for key, members, sentence in zip(keys, groups, sentences, strict=True)
    }
    offsets = method.backbone.tokenize_offsets if method.reads_phrase_places else None
    sets = PhraseTable(
        keys,
        lambda texts: [held[text] for text in texts],
        method.backbone.tokenize,
        method.phrase_sentence,
        None if offsets is None else lambda key: offsets(key.partition("\n")[2]),
    ).sets(keys)
    return Asked(
        pairs.to(device),
        replace(captions, phrases=sets).to(device),
        torch.tensor(group, device=device),
        torch.tensor(place, device=device),
        [f"{p.query_id}|{p.image_id}|{p.text}" for p in phrases],
    )


def _places(members: Sequence[Phrase]) -> list[int]:
    """Which phrase of its caption each member is, -1 for the caption itself; alone, a caption is its own phrase."""
    if all(member.whole for member in members):
        return [0] * len(members)
    place = itertools.count()
    return [-1 if member.whole else next(place) for member in members]


def _plain(phrase: Phrase, sentence: str) -> PartPhrase:
    inside = sentence[phrase.char_start : phrase.char_end] == phrase.text
    span = (phrase.char_start, phrase.char_end) if inside else (0, 0)
    return PartPhrase(phrase.text, *span, phrase.part)


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
