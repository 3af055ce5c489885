"""What `evaluate` measures: a trained model, the people of a split, their query texts, and vectors of both sides.

Shared by the commands that measure: the evaluation itself, robustness settings, the cross-domain matrix, kept epochs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from reidctl import tables
from reidctl.console import log, progress
from reidctl.data import Corpus, camera_names
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery_tasks, embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import protocols
from reidctl.evaluation.origin import other_tables
from reidctl.evaluation.protocols import JOINT
from reidctl.methods.base import Method, load_method
from reidctl.retrieval.store import EmbeddingTable, Stored
from reidctl.runs import Run
from reidctl.stages.building import give_phrases
from reidctl.stages.index import indexed_tasks, label_rows, model_digest, read_index
from reidctl.stages.sources import Source, find_source

QUERIES = ("caption", "identity+clothing", "identity", "clothing")
_NEEDED = {
    "t2i": "captions",
    "i2i": "images of both roles, or cameras",
    "it2i": "captions beside images of both roles, or cameras",
}


@dataclass(frozen=True)
class Subject:
    """A trained model and whom it is measured on.

    Attributes:
        run: where the model is.
        source: the dataset's files.
        whole: every split of the dataset.
        corpus: the split that is measured.
        texts: the text queries, rows of a `captions` table of kind `full`, with `row`, the image's row in `corpus`.
        method: the model, in evaluation mode on `device`.
        weights: digest of the model.
        split: which people.
        query: what a text query is, one of `QUERIES`.
        device: where to compute.
        notes: what readers of the numbers must know.
    """

    run: Run
    source: Source
    whole: Corpus
    corpus: Corpus
    texts: pd.DataFrame
    method: Method
    weights: str
    split: str
    query: str
    device: torch.device
    notes: tuple[str, ...]


def find_subject(
    run: Run,
    *,
    split: str = "test",
    query: str = "caption",
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
) -> Subject:
    """Load the model and the split, and refuse what would be no test.

    Raises:
        UsageError: an unknown kind of query, or one that the gallery already contains.
        DataError: no model, no such split, unknown people, or people that the model was trained on.
    """
    check_query(query)
    target = resolve_device(device)
    weights = model_digest(run)
    source = find_source(run, data, captions)
    check_people(source)
    whole = source.corpus()
    corpus = whole.of_split(split)
    method = load_method(run.stage_dir("finetune"), target)
    give_phrases(run, source, method)
    if query != "caption" and method.gallery_texts:
        raise UsageError(
            f"The gallery of `{method.name}` with this protocol contains texts written from the images; "
            f"`--query {query}` would look for those very texts.",
            hint="Use --query caption.",
        )
    notes = (*check_unseen(run, source, corpus, split), *_other_data(run, source))
    texts = query_texts(corpus, query)
    if len(texts) and "full" not in method.train_texts:
        notes = (*notes, f"`{method.name}` read no captions in training: text to image is what its start could do.")
    return Subject(run, source, whole, corpus, texts, method, weights, split, query, target, notes)


def check_query(query: str) -> None:
    """Refuse a kind of query that nobody knows.

    Raises:
        UsageError: it is not one of `QUERIES`.
    """
    if query not in QUERIES:
        raise UsageError(f"`--query {query}` is not known.", hint=f"One of: {', '.join(QUERIES)}.")


def check_people(source: Source) -> None:
    """Refuse a dataset in which nobody knows who is who.

    Raises:
        DataError: it was imported without person ids.
    """
    imported = Run(source.folder.parent).record(source.folder.name)
    if imported is not None and imported.get("known_people") is False:
        raise DataError(
            f"The images in {imported.get('root', source.folder)} were imported without person ids, so nothing can be "
            "counted as right or wrong.",
            hint="Search them with `reidctl search`, or import them with one folder per person.",
        )


def embed(subject: Subject) -> Stored:
    """Return gallery vectors, from the index if it fits, else made here, and vectors of the query texts, made here."""
    run, corpus = subject.run, subject.corpus
    record = run.record("index")
    fits = (
        record is not None
        and record["inputs"] == subject.source.digests()
        and record["settings"]["model"] == subject.weights
        and record["settings"]["split"] in (subject.split, "all")
        and indexed_tasks(record) == subject.method.tasks
    )
    if record is not None and fits:
        gallery = read_index(run, record)
    else:
        log.info("No index of these images by this model: embedding the gallery now.")
        with progress("gallery", len(corpus.images)) as advance:
            vectors = embed_gallery_tasks(subject.method, corpus, device=subject.device, advance=advance)
        rows = label_rows(corpus.images).reset_index(drop=True)
        held = {task: EmbeddingTable(rows, vectors[task]) for task in subject.method.tasks}
        gallery = Stored(held["t2i"], held.get("i2i", held["t2i"]))
    return with_queries(gallery, subject, [str(text) for text in subject.texts["text"]])


def with_queries(gallery: Stored, subject: Subject, sentences: list[str], *, condition: str = "standard") -> Stored:
    """Return the gallery's vectors and those of one sentence for each row of `subject.texts`."""
    texts, corpus = subject.texts, subject.corpus
    if not len(texts):
        return gallery
    with progress("queries", len(texts), unit="texts") as advance:
        vectors = embed_queries(subject.method, sentences, device=subject.device, advance=advance)
    images = corpus.images.iloc[texts["row"].to_numpy(int)].reset_index(drop=True)
    rows = label_rows(images).assign(
        item_id=texts["caption_id"].to_numpy(), role="query", modality="text", condition=condition
    )
    shown = gallery.t2i
    columns = list(shown.rows.columns)
    whole = EmbeddingTable(
        pd.concat([shown.rows, rows[columns]], ignore_index=True), np.concatenate([shown.vectors, vectors])
    )
    return Stored(whole, whole if gallery.i2i is shown else gallery.i2i)


def protocols_of(subject: Subject, stored: Stored, dataset: str) -> tuple[list[protocols.Protocol], list[str]]:
    """Return the standard protocols that the data of one dataset allow, and notes about those that they do not."""
    corpus, texts, split = subject.corpus, subject.texts, subject.split
    found: list[protocols.Protocol] = []
    notes: list[str] = []
    mine = corpus.images["dataset"] == dataset
    if texts["image_id"].isin(set(corpus.images.loc[mine, "image_id"])).any():
        found.append(protocols.text_to_image(corpus.images, texts, stored.t2i, dataset=dataset, split=split))
    else:
        notes.append(f"{dataset}: no captions in the {split} split, so no text-to-image result.")
    roles = set(corpus.images.loc[mine, "role"].dropna())
    by_camera = not roles and corpus.images.loc[mine, "camera_id"].notna().all()
    if {"query", "gallery"} <= roles or by_camera:
        changing = _changes_clothes(corpus.images[mine])
        found.append(
            protocols.image_to_image(corpus.images, stored.i2i, dataset=dataset, split=split, cloth_changing=changing)
        )
    return found, notes


def datasets_of(subject: Subject) -> list[str]:
    """Return the names of the datasets in the split, sorted."""
    return sorted({str(name) for name in subject.corpus.images["dataset"]})


def check_joint(subject: Subject) -> None:
    """Refuse data that have no joint gallery.

    Raises:
        DataError: the split holds a single dataset, or one that is called as the joint table is.
    """
    names = datasets_of(subject)
    if JOINT in names:
        raise DataError(
            f"A dataset here is called `{JOINT}`, as the table that `--joint` adds.",
            hint="Import it under another name, or evaluate without --joint.",
        )
    if len(names) == 1:
        raise DataError(
            f"The {subject.split} split holds a single dataset, {names[0]}, so there is no gallery of several.",
            hint="Evaluate without --joint, or join datasets with `reidctl data combine`.",
        )


def told_apart(subject: Subject) -> Subject:
    """Return the subject with cameras called `dataset/camera`: camera c1 of one dataset is not that of another."""
    images = subject.corpus.images
    return replace(subject, corpus=replace(subject.corpus, images=images.assign(camera_id=camera_names(images))))


def joint_protocols(
    subject: Subject,
    stored: Stored,
    parts: Mapping[str, Sequence[protocols.Protocol]],
    *,
    directions: Collection[protocols.Direction],
) -> tuple[list[protocols.Protocol], list[str]]:
    """Return the protocols in which the queries of all datasets search one gallery, and notes about what is left out.

    Text to image needs captions in one of the datasets, since every image is searched anyway. The other directions need
    all datasets: one whose images have no part in them would be missing in the gallery.

    Args:
        subject: with cameras told apart.
        stored: the vectors.
        parts: the protocols of each dataset, from this subject.
        directions: those that are asked for.
    """
    found: list[protocols.Protocol] = []
    notes: list[str] = []
    own = {name: {part.direction: part for part in mine} for name, mine in parts.items()}
    for direction in directions:
        lacking = [name for name, mine in own.items() if direction not in mine]
        who = f"{JOINT}, {direction}: {' and '.join(lacking)} without {_NEEDED[direction]}"
        if direction == "t2i" and len(lacking) < len(own):
            images, split = subject.corpus.images.assign(dataset=JOINT), subject.split
            found.append(protocols.text_to_image(images, subject.texts, stored.t2i, dataset=JOINT, split=split))
            notes += [f"{who}: the images are searched, and no text asks for them."] if lacking else []
        elif lacking:
            notes.append(f"{who}, so no joint result.")
        else:
            found.append(protocols.together([mine[direction] for mine in own.values()]))
    return found, notes


def query_texts(corpus: Corpus, kind: str) -> pd.DataFrame:
    """Return the text queries of a split: rows of a `captions` table of kind `full`, with the image's `row`.

    Raises:
        DataError: an image has no text of this kind.
    """
    if kind == "caption":
        return corpus.captions
    parts = [getattr(corpus, name) for name in kind.split("+")]
    rows = [" ".join(text for text in texts if text) if all(texts) else "" for texts in zip(*parts, strict=True)]
    lacking = [row for row, text in enumerate(rows) if not text]
    if lacking:
        name = corpus.images["image_id"].iloc[lacking[0]]
        raise DataError(f"{len(lacking)} images have no {kind} text (first: `{name}`).", hint="Run `reidctl caption`.")
    names = corpus.images["image_id"]
    return pd.DataFrame(
        {
            "caption_id": names + f":{kind}",
            "image_id": names,
            "kind": "full",
            "status": "ok",
            "text": rows,
            "row": range(len(rows)),
        }
    )


def check_unseen(run: Run, source: Source, corpus: Corpus, split: str) -> list[str]:
    """Refuse people and image files that the model was trained on; return notes about what the result is not.

    Raises:
        DataError: a person or a file of the split was in the training split of the model.
    """
    trained = run.require("finetune")
    path = run.table("finetune", "seen")
    if not path.is_file():
        raise DataError(f"{path} is missing: an older reidctl trained this model.", hint="Train it again.")
    seen = tables.read_table(path, "seen")
    known = {str(kind): set(rows["digest"]) for kind, rows in seen.groupby("kind", observed=True)}
    names = source.person_digests(corpus.images)
    people = names.loc[names["digest"].isin(known.get("person", set())), "person_id"].nunique()
    files = corpus.images["sha256"].isin(known.get("image", set())).sum()
    if people or files:
        what = f"{people:,} people" if people else f"{files:,} image files"
        raise DataError(
            f"{what} of the {split} split were used to train this model, so this would be no test.",
            hint="Was the dataset imported again with other splits? Choose another split, or train again on a "
            "combination (`reidctl data combine`), which takes the people of test splits out of training.",
        )
    # Of a published checkpoint, and of what was trained from one, nobody knows whom it saw.
    notes = [str(trained["seen_note"])] if "seen_note" in trained else []
    if split == trained["selected_on"]:
        notes.append(f"The epoch of this model was chosen on the {split} split: these numbers flatter it.")
    return notes


def _other_data(run: Run, source: Source) -> list[str]:
    """A note if the dataset is not the one that the model was trained on, and on how its captions were spoilt."""
    trained, folder = run.require("finetune"), source.folder.resolve()
    other = other_tables(source.digests(), trained["inputs"])
    if not other:
        return []
    if trained.get("source") == "convert":
        return []  # it may be the one: `check_unseen` says that nobody knows
    record = Run(folder.parent).record(folder.name) or {}
    notes = [f"Measured on {folder}, another dataset than the one of the training."]
    if str(folder) == trained["data"]:
        notes = [f"The tables of {' and '.join(other)} in {folder} are no longer those of the training."]
    if record.get("source") == "degrade":
        spoilt = record["settings"]["degrade"]
        notes.append(f"Its captions were degraded: {spoilt['kind']}, level {spoilt['level']:g}.")
    return notes


def _changes_clothes(images: pd.DataFrame) -> bool:
    """Whether every query wears an outfit that its person does not wear in the gallery."""
    if images["outfit_id"].isna().any() or images["role"].isna().any():
        return False
    gallery = images[images["role"] == "gallery"].groupby("person_id")["outfit_id"].agg(set)
    query = images[images["role"] == "query"]
    worn = [row.outfit_id in gallery.get(row.person_id, set()) for row in query.itertuples()]
    return bool(worn) and not any(worn)
