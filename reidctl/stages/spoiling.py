"""Queries and pictures under robustness settings, and a model that is asked with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.captioning.language import clothing_words
from reidctl.captioning.neutralise import split_words
from reidctl.console import progress
from reidctl.embedding import embed_blank_tasks, embed_gallery_tasks, embed_queries, token_keys
from reidctl.errors import DataError
from reidctl.evaluation import protocols
from reidctl.evaluation.paraphrase import rewrite_synthped
from reidctl.evaluation.robustness import (
    CAPTIONS,
    TEXTS,
    Case,
    SpoiltImages,
    caption_cases,
    described_cases,
    image_cases,
    vectors_digest,
)
from reidctl.evaluation.settings import SETTINGS
from reidctl.methods.base import Task
from reidctl.runs import Run
from reidctl.stages.measuring import Subject, embed, protocols_of, with_queries
from reidctl.synthped.config import SynthConfig

_DESCRIBED = ("identity-only", "clothes-conflict")
_TEXT_COLUMNS = ["caption_id", "image_id", "kind", "status", "text", "row"]


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        cases: the references first.
        ids: the query ids of each reference, in the order of its cases' texts.
        described: queries made of identity and clothing texts, columns of a `captions` table; may be empty.
        notes: what had to be left out.
        clothing_share: share of the words of the identity texts that are clothing vocabulary; None without such texts.
        seed: of the intervals.
    """

    cases: tuple[Case, ...]
    ids: Mapping[str, tuple[str, ...]]
    described: pd.DataFrame
    notes: tuple[str, ...]
    clothing_share: float | None
    seed: int


def plan(subject: Subject, names: Sequence[str], *, query: str, seed: int, level: float | None) -> Asked:
    """Return the measurements that some settings ask for on one split, the same for every model."""
    captions, notes = subject.texts, list[str]()
    texts = [str(text) for text in captions["text"]]
    found = [Case("standard", "standard", CAPTIONS, seed, None, tuple(texts))]
    if len(captions):
        found += caption_cases(names, [str(name) for name in captions["caption_id"]], texts, seed=seed, level=level)
        found += _rewritten(subject, seed, notes) if "paraphrase" in names else []
    elif any(SETTINGS[name].kind == "caption" for name in names):
        notes.append(f"The {subject.split} split has no captions: the settings that change them are left out.")
    rows = _described_rows(subject, query, notes) if set(_DESCRIBED) & set(names) else pd.DataFrame()
    if len(rows):
        cases = _described(rows, names, query, seed, notes)
        found += [Case(TEXTS, TEXTS, TEXTS, seed, None, tuple(rows["text"])), *cases] if cases else []
    found += image_cases(names, seed=seed, level=level)
    share = _clothing_share([str(text) for text in rows["identity"]]) if len(rows) else None
    columns = rows[_TEXT_COLUMNS] if len(rows) else tables.empty("captions")
    ids = {CAPTIONS: tuple(captions["caption_id"]), TEXTS: tuple(columns["caption_id"])}
    return Asked(tuple(found), ids, columns, tuple(notes), share, seed)


def _rewritten(subject: Subject, seed: int, notes: list[str]) -> list[Case]:
    """The captions of a synthped dataset in each of its own writing styles, written anew from the truth."""
    folder = subject.source.folder.resolve()
    record = Run(folder.parent).record(folder.name) or {}
    if record.get("source") != "synthped":
        return []
    rows = subject.texts
    try:
        config = SynthConfig(**record["settings"]["synth"])
        with progress("rewrite captions", len(rows), unit="captions") as advance:
            written = rewrite_synthped(config, rows["image_id"], rows["style_id"], rows["text"], advance=advance)
    except DataError as error:
        notes.append(f"{error.message} Its own writing styles are left out of `paraphrase`.")
        return []
    return [
        Case(f"paraphrase:truth-{style}", "paraphrase", CAPTIONS, seed, None, tuple(texts))
        for style, texts in written.items()
    ]


def _described_rows(subject: Subject, query: str, notes: list[str]) -> pd.DataFrame:
    """One query per image that has the texts, with what `described_cases` reads."""
    if subject.method.gallery_texts:
        notes.append(
            f"The gallery of `{subject.method.name}` with this protocol contains texts written from the images, and "
            "identity + clothing queries would look for those very texts: identity-only and clothes-conflict are left "
            "out."
        )
        return pd.DataFrame()
    corpus = subject.corpus
    pairs = zip(corpus.identity, corpus.clothing, strict=True)
    known = [bool(identity and (clothing or query == "identity")) for identity, clothing in pairs]
    if not all(known):
        some = "No image has" if not any(known) else f"{known.count(False):,} of {len(known):,} images lack"
        left = "identity-only and clothes-conflict are left out" if not any(known) else "they are no queries there"
        notes.append(f"{some} identity and clothing texts, so {left}; `reidctl caption` writes them.")
    rows = corpus.images[["image_id", "dataset", "person_id", "outfit_id"]].assign(
        caption_id=corpus.images["image_id"] + ":" + ("identity" if query == "identity" else "identity+clothing"),
        kind="full",
        status="ok",
        row=range(len(known)),
        identity=[text or "" for text in corpus.identity],
        clothing=[text or "" for text in corpus.clothing],
    )[known]
    both = rows["identity"] + " " + rows["clothing"]
    return rows.assign(text=rows["identity"] if query == "identity" else both).reset_index(drop=True)


def _described(rows: pd.DataFrame, names: Sequence[str], query: str, seed: int, notes: list[str]) -> list[Case]:
    found: list[Case] = []
    for name in set(_DESCRIBED) & set(names):
        try:
            found += described_cases([name], rows, seed=seed, clothing=query != "identity")
        except DataError as error:
            notes.append(f"{error.message} {name} is left out.")
    return sorted(found, key=lambda case: (_DESCRIBED.index(case.setting), case.seed))


def _clothing_share(texts: Sequence[str]) -> float:
    """The share of words that name clothes, belongings, fabrics or the act of wearing (`captioning/lexicon.yaml`)."""
    words = sum(sum(word[0].isalnum() for word in split_words(text)) for text in texts)
    return sum(len(clothing_words(text)) for text in texts) / words if words else 0.0


@dataclass(frozen=True)
class Measured:
    """One case measured: a `queries` table and, by `direction:dataset`, the digest of the vectors and gallery size."""

    queries: pd.DataFrame
    facts: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass
class Bench:
    """A model at work. Nothing is embedded before the first measurement asks for it."""

    subject: Subject
    asked: Asked
    notes: list[str] = field(default_factory=list)
    _vectors: dict[str, dict[bytes, npt.NDArray[np.float32]]] = field(default_factory=dict)

    def skips(self, case: Case) -> bool:
        """Whether this model cannot be asked that: its gallery holds the texts of the queries."""
        return case.reference == TEXTS and bool(self.subject.method.gallery_texts)

    @cached_property
    def captions(self) -> list[protocols.Protocol]:
        """The standard protocols of every dataset."""
        found: list[protocols.Protocol] = []
        self._stored = embed(self.subject)
        for dataset in sorted(set(self.subject.corpus.images["dataset"])):
            part, said = protocols_of(self.subject, self._stored, dataset)
            found += part
            self.notes += said
        return found

    @cached_property
    def described(self) -> list[protocols.Protocol]:
        """Text-to-image retrieval with identity and clothing texts."""
        rows, images = self.asked.described, self.subject.corpus.images
        assert self.captions is not None  # embeds the gallery
        stored = with_queries(self._stored, replace(self.subject, texts=rows), [str(text) for text in rows["text"]])
        datasets = sorted(set(images["dataset"].iloc[rows["row"].to_numpy(int)]))
        split = self.subject.split
        return [protocols.text_to_image(images, rows, stored.t2i, dataset=name, split=split) for name in datasets]

    def measure(self, case: Case) -> Measured:
        """Rank every query of a case."""
        base = self.captions if case.reference == CAPTIONS else self.described
        if case.row != case.reference:
            base = list(self._under(case, base))
        frames, facts = [], {}
        for protocol in base:
            # Intervals are made later, from the queries: one resample here is thrown away.
            found = protocols.evaluate(protocol, top=0, resamples=1, device=str(self.subject.device))
            frames.append(found.queries.assign(condition=case.key))
            where = f"{protocol.direction}:{protocol.dataset}"
            facts[where] = {"vectors": vectors_digest(protocol), "gallery": len(protocol.gallery)}
        queries = pd.concat(frames, ignore_index=True) if frames else tables.empty("queries")
        return Measured(queries, facts, tuple(self.notes) if case.row == case.reference else ())

    def _under(self, case: Case, base: Sequence[protocols.Protocol]) -> Iterator[protocols.Protocol]:
        if case.texts is None and case.level == 0:
            yield from base
            return
        if case.texts is not None:
            told = self._text_vectors(case, base)
            for protocol in base:
                if protocol.direction == "t2i":
                    asked = np.stack([told[item] for item in protocol.query.item])
                    yield protocols.with_vectors(protocol, asked, protocol.gallery.vectors, condition=case.row)
            return
        vectors, images = self._image_vectors(case), self.subject.corpus.images
        row_of = {name: row for row, name in enumerate(images["image_id"])}
        for protocol in base:
            query, gallery = protocol.query, protocol.gallery
            i2i, both = protocol.direction == "i2i", case.setting == "blank"
            made = vectors["i2i" if i2i else "t2i"]
            yield protocols.with_vectors(
                protocol,
                made[[row_of[name] for name in query.item]] if i2i else query.vectors,
                made[[row_of[name] for name in gallery.item]] if not i2i or both else gallery.vectors,
                condition=case.row,
            )

    def _text_vectors(self, case: Case, base: Sequence[protocols.Protocol]) -> dict[str, npt.NDArray[np.float32]]:
        """A vector by query id; what reads like a text of the reference has that text's vector, bit for bit."""
        assert case.texts is not None
        rows = self.subject.texts if case.reference == CAPTIONS else self.asked.described
        method, device = self.subject.method, self.subject.device
        with progress(case.key, len(rows), unit="texts") as advance:
            made = embed_queries(
                method, case.texts, device=device, known=self._known(case.reference, base), advance=advance
            )
        return dict(zip(rows["caption_id"], made, strict=True))

    def _known(self, reference: str, base: Sequence[protocols.Protocol]) -> dict[bytes, npt.NDArray[np.float32]]:
        """The vectors of a reference's queries by their tokens."""
        if reference not in self._vectors:
            rows = self.subject.texts if reference == CAPTIONS else self.asked.described
            text_of = dict(zip(rows["caption_id"], rows["text"], strict=True))
            asked = [protocol.query for protocol in base if protocol.direction == "t2i"]
            keys = token_keys(self.subject.method, [str(text_of[item]) for side in asked for item in side.item])
            self._vectors[reference] = dict(
                zip(keys, (vector for side in asked for vector in side.vectors), strict=True)
            )
        return self._vectors[reference]

    def _image_vectors(self, case: Case) -> dict[Task, npt.NDArray[np.float32]]:
        subject = self.subject
        corpus, method, images = subject.corpus, subject.method, subject.corpus.images
        with progress(case.row, len(images)) as advance:
            if case.setting == "blank":
                return embed_blank_tasks(method, corpus, device=subject.device, advance=advance)
            store = SpoiltImages(
                corpus.paths(),
                list(images["image_id"]),
                list(zip(images["height"], images["width"], strict=True)),
                method.backbone.image_size,
                interpolation=method.backbone.interpolation,
                setting=case.setting,
                level=case.level,
                seed=case.seed,
            )
            return embed_gallery_tasks(method, corpus, device=subject.device, store=store, advance=advance)
