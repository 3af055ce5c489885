"""What `interpret` explains: which captions and phrases, on which images."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from reidctl import tables
from reidctl.config import parse_section
from reidctl.data import Corpus
from reidctl.errors import DataError
from reidctl.explain.maps import USER_QUERY, Phrase, of_captions, pick_phrases
from reidctl.phrases.base import PhraseConfig, PhraseSource
from reidctl.runs import Run, digest
from reidctl.stages import building
from reidctl.stages.interpret_asked import is_there
from reidctl.stages.sources import Source

_LOOSE = "loose"
"""The person of a picture that belongs to no dataset."""


def captions_of(source: Source) -> pd.DataFrame:
    """Return the captions of a dataset; empty where it has none."""
    return tables.read_table(source.captions, "captions") if source.captions.is_file() else tables.empty("captions")


def corpus_of(source: Source, split: str, image: str | None) -> Corpus:
    """The split, or one picture that belongs to no dataset.

    Raises:
        DataError: the image is neither.
    """
    corpus = source.corpus().of_split(split)
    if image is None or (corpus.images["image_id"] == image).any():
        return corpus
    path = Path(image)
    if not is_there(path) or not path.is_file():
        raise DataError(
            f"`{image}` is no image of the {split} split and no file.", hint="Give an image id, or a path to a picture."
        )
    return _of_file(corpus, path)


def file_of(corpus: Corpus) -> str | None:
    """The file of a picture that belongs to no dataset."""
    loose = len(corpus.images) == 1 and corpus.images["dataset"].iloc[0] == _LOOSE
    return str(corpus.images["path"].iloc[0]) if loose else None


def _of_file(corpus: Corpus, path: Path) -> Corpus:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({type(error).__name__}).") from None
    row = {
        "image_id": path.name, "path": str(path.resolve()), "dataset": _LOOSE, "split": "test", "person_id": _LOOSE,
        "width": width, "height": height, "sha256": digest(path),
    }  # fmt: skip
    images = pd.DataFrame([row]).reindex(columns=corpus.images.columns)
    return Corpus(images, corpus.captions.iloc[:0], [None], [None], path.resolve().parent)


def phrases_of(run: Run, source: Source, backend: str) -> PhraseSource | None:
    """What finds the phrases of captions that the dataset has none of; None: only the dataset's own are taken."""
    if backend == "trained":
        saved = dict(run.require("finetune")["settings"].get("phrases") or {})
        return building.find_phrases(run, source, parse_section(PhraseConfig, saved, "phrases"))
    return building.find_phrases(run, source, PhraseConfig(backend="spacy" if backend == "spacy" else "rules"))


def pick(
    corpus: Corpus,
    written: pd.DataFrame,
    known: PhraseSource | None,
    *,
    samples: int,
    seed: int,
    phrase: str | None,
    query: str | None,
    image: str | None,
) -> list[Phrase]:
    """The phrases that are explained; whole captions in front of their own."""
    images = corpus.images["image_id"].astype(str).tolist()
    where = image if image in images else images[0] if len(images) == 1 and image is not None else None
    if phrase is not None:
        if where is None:
            return pick_phrases(corpus, written, samples=samples, seed=seed, phrase=phrase)
        return [Phrase(USER_QUERY, where, phrase, 0, len(phrase))]
    if query is None:
        if where is None:
            return pick_phrases(corpus, written, samples=samples, seed=seed, source=known, whole=True)
        own = corpus.captions[corpus.captions["image_id"] == where]
        if not len(own):
            raise DataError(f"Image `{where}` has no caption.", hint="Give words: --query or --phrase.")
        return of_captions(own, written, source=known, whole=True)
    return _of_query(corpus, written, known, query, where, samples, seed)


def _of_query(
    corpus: Corpus,
    written: pd.DataFrame,
    known: PhraseSource | None,
    query: str,
    where: str | None,
    samples: int,
    seed: int,
) -> list[Phrase]:
    """A caption by its id, on its own image unless another is named; or words, on random images unless one is."""
    full = written[(written["caption_id"] == query) & (written["kind"] == "full")]
    if len(full):
        chosen = full.assign(image_id=where) if where else full
        if str(chosen["image_id"].iloc[0]) not in set(corpus.images["image_id"]):
            raise DataError(f"The image of caption `{query}` is not in this split.", hint="Name one: --image ID.")
        return of_captions(chosen, written, source=known, whole=True)
    rows = np.sort(np.random.default_rng((seed, 11)).permutation(len(corpus.images))[:samples])
    images = [where] if where else corpus.images["image_id"].iloc[rows].astype(str).tolist()
    frame = pd.DataFrame({"caption_id": USER_QUERY, "image_id": images, "text": query})
    return of_captions(frame, tables.empty("captions"), source=known, whole=True)


def on_all_positives(picked: Sequence[Phrase], corpus: Corpus) -> list[Phrase]:
    """The phrases on their image and, after that, on every other image of the person on it."""
    names, people = corpus.images["image_id"].astype(str), corpus.images["person_id"].astype(str)
    person = dict(zip(names, people, strict=True))
    shown = {one: list(some) for one, some in names.groupby(people, sort=False)}
    asked = {(phrase.query_id, phrase.image_id) for phrase in picked}
    found: list[Phrase] = []
    for (query, image), group in groupby(picked, key=lambda phrase: (phrase.query_id, phrase.image_id)):
        members = list(group)
        more = shown[person[image]] if query != USER_QUERY else []
        others = [name for name in more if (query, name) not in asked]
        found += [replace(member, image_id=name) for name in (image, *others) for member in members]
    return found
