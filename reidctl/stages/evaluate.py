"""`evaluate`: retrieval metrics on unseen people, beside chance, a colour histogram and the attribute oracle."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from reidctl import tables
from reidctl.console import log, progress
from reidctl.data import Corpus
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import baselines, protocols
from reidctl.methods.base import Method, load_method
from reidctl.metrics import METRICS, Interval, distinct_query_ceiling, summarise
from reidctl.retrieval.store import EmbeddingTable, read_embeddings
from reidctl.runs import Run
from reidctl.stages.index import embedding_rows, model_digest
from reidctl.stages.sources import Source, find_source

STAGE = "evaluate"
# The model's own rankings, as opposed to those of baselines and controls.
OWN = ("standard", "cloth-changing", "same-clothes")
QUERIES = ("caption", "identity+clothing", "identity", "clothing")


def run(
    run: Run,
    *,
    split: str = "test",
    query: str = "caption",
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Measure text-to-image retrieval and, where cameras or roles are known, image-to-image retrieval.

    Args:
        run: with a trained model; its index is used when it fits, else the gallery is embedded here.
        split: which people.
        query: what a text query is: the caption, or texts that a model wrote from the query's image.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts.
        seed: of the bootstrap and the label shuffle.
        force: measure again even if nothing changed.

    Raises:
        UsageError: an unknown kind of query.
        DataError: no model, no such split, or nobody to find.
    """
    if query not in QUERIES:
        raise UsageError(f"`--query {query}` is not known.", hint=f"One of: {', '.join(QUERIES)}.")
    target = resolve_device(device)
    weights = model_digest(run)
    source = find_source(run, data, captions)
    imported = Run(source.folder.parent).record(source.folder.name)
    if imported is not None and imported.get("known_people") is False:
        raise DataError(
            f"The images in {imported.get('root', source.folder)} were imported without person ids, so nothing can be "
            "counted as right or wrong.",
            hint="Search them with `reidctl search`, or import them with one folder per person.",
        )
    settings: Mapping[str, Any] = {"split": split, "query": query, "seed": seed, "model": weights}
    inputs = source.digests()
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    whole = source.corpus()
    corpus = whole.of_split(split)
    method = load_method(run.stage_dir("finetune"), target)
    texts = _queries(corpus, query)
    run.unfinish(STAGE)
    if query != "caption" and method.gallery_texts:
        raise UsageError(
            f"The gallery of `{method.name}` with this protocol contains texts written from the images; "
            f"`--query {query}` would look for those very texts.",
            hint="Use --query caption.",
        )
    notes = [*_check_seen(run, source, corpus, split), *_other_data(run, source)]
    stored = _embed(run, method, corpus, texts, weights, split, inputs, target)
    found: list[protocols.Evaluation] = []
    for dataset in sorted(set(corpus.images["dataset"])):
        parts, said = _evaluate(whole, corpus, texts, stored, dataset, split, seed, str(target))
        found += parts
        notes += said
    if not found:
        raise DataError(
            f"No query of the {split} split has a match, so there is nothing to measure.",
            hint="Metrics need person ids and, for each query, another image of the person.",
        )
    outputs = _write(run, found)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics=_summary(found),
        extra={"split": split, "tables": _tables(found), "notes": notes, "data": str(source.folder.resolve())},
    )
    return {**record, "status": "done"}


def _check_seen(run: Run, source: Source, corpus: Corpus, split: str) -> list[str]:
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
    if split == trained["selected_on"]:
        return [f"The epoch of this model was chosen on the {split} split: these numbers flatter it."]
    return []


def _other_data(run: Run, source: Source) -> list[str]:
    """A note if the dataset is not the one that the model was trained on, and on how its captions were spoilt."""
    folder = source.folder.resolve()
    if str(folder) == run.require("finetune")["data"]:
        return []
    record = Run(folder.parent).record(folder.name) or {}
    notes = [f"Measured on {folder}, another dataset than the one of the training."]
    if record.get("source") == "degrade":
        spoilt = record["settings"]["degrade"]
        notes.append(f"Its captions were degraded: {spoilt['kind']}, level {spoilt['level']:g}.")
    return notes


def _queries(corpus: Corpus, kind: str) -> pd.DataFrame:
    """The text queries: rows of a `captions` table of kind `full`."""
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


def _embed(
    run: Run,
    method: Method,
    corpus: Corpus,
    texts: pd.DataFrame,
    weights: str,
    split: str,
    inputs: Mapping[str, str],
    device: torch.device,
) -> EmbeddingTable:
    """Gallery vectors from the index if it fits, else made here; query vectors made here."""
    record = run.record("index")
    fits = record is not None and record["inputs"] == dict(inputs) and record["settings"]["model"] == weights
    if fits and record is not None and record["settings"]["split"] in (split, "all"):
        gallery = read_embeddings(run.table("index", "embeddings"))
    else:
        log.info("No index of these images by this model: embedding the gallery now.")
        with progress("gallery", len(corpus.images)) as advance:
            vectors = embed_gallery(method, corpus, device=device, advance=advance)
        frame = embedding_rows(corpus.images, vectors).drop(columns="embedding")
        gallery = EmbeddingTable(frame.reset_index(drop=True), vectors)
    with progress("queries", len(texts), unit="texts") as advance:
        vectors = embed_queries(method, [str(text) for text in texts["text"]], device=device, advance=advance)
    if not len(texts):
        return gallery
    images = corpus.images.iloc[texts["row"].to_numpy(int)].reset_index(drop=True)
    rows = embedding_rows(images, vectors).drop(columns="embedding")
    rows = rows.assign(item_id=texts["caption_id"].to_numpy(), role="query", modality="text")
    columns = list(gallery.rows.columns)
    return EmbeddingTable(
        pd.concat([gallery.rows, rows[columns]], ignore_index=True), np.concatenate([gallery.vectors, vectors])
    )


def _evaluate(
    whole: Corpus,
    corpus: Corpus,
    texts: pd.DataFrame,
    stored: EmbeddingTable,
    dataset: str,
    split: str,
    seed: int,
    device: str,
) -> tuple[list[protocols.Evaluation], list[str]]:
    """The model and its reference rows on one dataset, in both directions where the data allow."""
    found: list[protocols.Evaluation] = []
    notes: list[str] = []
    asked: list[protocols.Protocol] = []
    mine = corpus.images["dataset"] == dataset
    if texts["image_id"].isin(set(corpus.images.loc[mine, "image_id"])).any():
        asked.append(protocols.text_to_image(corpus.images, texts, stored, dataset=dataset, split=split))
    else:
        notes.append(f"{dataset}: no captions in the {split} split, so no text-to-image result.")
    roles = set(corpus.images.loc[mine, "role"].dropna())
    by_camera = not roles and corpus.images.loc[mine, "camera_id"].notna().all()
    if {"query", "gallery"} <= roles or by_camera:
        changing = _changes_clothes(corpus.images[mine])
        asked.append(
            protocols.image_to_image(corpus.images, stored, dataset=dataset, split=split, cloth_changing=changing)
        )
    for protocol in asked:
        with progress(f"rank {protocol.direction}", len(protocol.query.item), unit="queries") as advance:
            model = protocols.evaluate(protocol, seed=seed, device=device, advance=advance)
        if not model.ranking.queries.scored:
            continue
        found.append(model)
        for setting in protocols.clothes_settings(protocol):
            part = protocols.evaluate(setting, seed=seed, device=device)
            found += [part] if part.ranking.queries.scored else []
        found += [part for part in _references(whole, protocol, model, texts, seed, notes) if len(part.metrics)]
    return found, notes


def _changes_clothes(images: pd.DataFrame) -> bool:
    """Whether every query wears an outfit that its person does not wear in the gallery."""
    if images["outfit_id"].isna().any() or images["role"].isna().any():
        return False
    gallery = images[images["role"] == "gallery"].groupby("person_id")["outfit_id"].agg(set)
    query = images[images["role"] == "query"]
    worn = [row.outfit_id in gallery.get(row.person_id, set()) for row in query.itertuples()]
    return bool(worn) and not any(worn)


def _references(
    whole: Corpus,
    protocol: protocols.Protocol,
    model: protocols.Evaluation,
    texts: pd.DataFrame,
    seed: int,
    notes: list[str],
) -> list[protocols.Evaluation]:
    """Chance, the label-shuffle control, the colour histogram and the attribute oracles."""
    found = [_chance(protocol, model, seed)]
    shuffled = baselines.label_shuffle(protocol, seed=seed)
    found.append(protocols.evaluate(replace(shuffled, condition="shuffled"), seed=seed))
    for condition, vectors in _simple_vectors(whole, protocol, texts, notes).items():
        other = protocols.with_vectors(protocol, *vectors, condition=condition)
        found.append(protocols.evaluate(other, seed=seed))
    return found


def _chance(protocol: protocols.Protocol, model: protocols.Evaluation, seed: int) -> protocols.Evaluation:
    expected = summarise(baselines.chance_of(model.ranking), protocol.query.person, seed=seed)
    rows = model.metrics.assign(condition="chance")
    for metric, interval in expected.items():
        rows.loc[rows["metric"] == metric, ["value", "low", "high"]] = [interval.value, None, None]
    plain = {name: Interval(value.value, float("nan"), float("nan")) for name, value in expected.items()}
    return protocols.Evaluation(model.ranking, plain, rows, model.queries.iloc[:0], model.rankings.iloc[:0])


def _simple_vectors(
    whole: Corpus, protocol: protocols.Protocol, texts: pd.DataFrame, notes: list[str]
) -> dict[str, tuple[Any, Any]]:
    images = whole.images
    row_of = {name: row for row, name in enumerate(images["image_id"])}
    paths = whole.paths()
    attributes = list(images["attributes"])
    gallery_rows = [row_of[name] for name in protocol.gallery.image]
    query_rows = [row_of[name] for name in protocol.query.image]
    gallery = baselines.colour_histograms([paths[row] for row in gallery_rows])
    found: dict[str, tuple[Any, Any]] = {}
    if protocol.direction == "i2i":
        found["histogram"] = (baselines.colour_histograms([paths[row] for row in query_rows]), gallery)
    else:
        text_of = dict(zip(texts["caption_id"], texts["text"], strict=True))
        asked = [str(text_of[name]) for name in protocol.query.item]
        learned = _words_to_colours(whole, paths)
        if learned is None:
            notes.append("No training captions: the colour-histogram baseline for text queries is left out.")
        else:
            found["histogram"] = (learned.predict(asked), gallery)
        found |= _named(
            "oracle-caption",
            baselines.caption_oracle(asked, [attributes[r] for r in query_rows], [attributes[r] for r in gallery_rows]),
        )
        ceiling = distinct_query_ceiling(asked, list(protocol.query.person))
        notes.append(f"{protocol.dataset}: no model can exceed rank-1 {100 * ceiling:.1f} % with these query texts.")
    full = baselines.attribute_oracle([attributes[r] for r in query_rows], [attributes[r] for r in gallery_rows])
    found |= _named("oracle", full)
    if full is None:
        notes.append(f"{protocol.dataset}: no true attributes, so no attribute oracle.")
    return found


def _named(name: str, vectors: tuple[Any, Any] | None) -> dict[str, tuple[Any, Any]]:
    return {} if vectors is None else {name: vectors}


def _words_to_colours(whole: Corpus, paths: list[Path]) -> baselines.WordsToColours | None:
    train = (whole.images["split"] == "train").to_numpy()
    captions = whole.captions[train[whole.captions["row"].to_numpy(int)]]
    if not len(captions):
        return None
    rows = sorted(set(captions["row"]))
    place = {row: number for number, row in enumerate(rows)}
    histograms = baselines.colour_histograms([paths[row] for row in rows])
    return baselines.fit_words_to_colours(
        [str(text) for text in captions["text"]], histograms[[place[row] for row in captions["row"]]]
    )


def _write(run: Run, found: list[protocols.Evaluation]) -> list[Path]:
    own = [part for part in found if part.metrics["condition"].iloc[0] in OWN]
    frames = {
        "metrics": pd.concat([part.metrics for part in found], ignore_index=True),
        "queries": pd.concat([part.queries for part in own], ignore_index=True),
        "rankings": pd.concat([part.rankings for part in own], ignore_index=True),
    }
    for name, frame in frames.items():
        tables.write_table(run.table(STAGE, name), name, frame)
    return [run.table(STAGE, name) for name in frames]


def _summary(found: list[protocols.Evaluation]) -> dict[str, dict[str, float]]:
    """The model's own numbers by direction; of several datasets the lowest of each, so that a gate guards them all."""
    summary: dict[str, dict[str, float]] = {}
    for part in found:
        first = part.metrics.iloc[0]
        if first["condition"] == "standard":
            held = summary.setdefault(str(first["direction"]), {})
            for name in METRICS:
                held[name] = min(part.summary[name].value, held.get(name, 1.0))
    return summary


def _tables(found: list[protocols.Evaluation]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for part in found:
        first = part.metrics.iloc[0]
        facts = shown.setdefault(
            f"{first['direction']}:{first['dataset']}",
            {
                "direction": str(first["direction"]),
                "dataset": str(first["dataset"]),
                "queries": int(first["queries"]),
                "skipped": int(first["skipped"]),
                "gallery": int(first["gallery"]),
                "rows": {},
            },
        )
        if first["condition"] == "standard":
            facts["people"] = int(part.queries["person_id"].nunique())
        values = {name: [value.value, _number(value.low), _number(value.high)] for name, value in part.summary.items()}
        facts["rows"][str(first["condition"])] = values
    return shown


def _number(value: float) -> float | None:
    return None if value != value else value
