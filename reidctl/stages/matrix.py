"""`matrix`: every model on every dataset, to see what a training on one domain is worth on another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import log
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import protocols
from reidctl.runs import Run, fingerprint
from reidctl.stages.index import model_digest
from reidctl.stages.measuring import check_query, embed, find_subject, protocols_of
from reidctl.stages.sources import Source, find_source

STAGE = "matrix"
# From this share of its training images on a model counts as trained on a dataset: two datasets may share a file.
SAME = 0.5
SCORES = ("value", "low", "high", "queries", "skipped", "gallery", "relation")


def run(
    run: Run,
    models: Sequence[Run],
    *,
    datasets: Sequence[Path] = (),
    split: str = "test",
    query: str = "caption",
    device: str = "auto",
    seed: int = 0,
    resamples: int = 1000,
    force: bool = False,
) -> dict[str, Any]:
    """Measure every model on every dataset, in both directions where the data allow.

    The datasets are those that the models were trained on (each once, however many runs hold a copy) and further
    folders. A model and a dataset whose people it was trained on, without captions for text queries, without the
    texts that the gallery needs, ... make a cell with the reason instead of a number. `relation` is `same` where the
    model was trained on at least half of the training images of this dataset, else `cross`; a share below that is a
    note. A drop is the best value of the models that were trained
    on the dataset minus this model's, in the unit of the metric; it has no interval.

    Writes the table `matrix`, and a part for each cell, so that a killed run repeats one cell at most and a further
    model costs its own cells alone.

    Args:
        run: where the stage writes; its own model, if it has one, is the first row.
        models: runs with trained models.
        datasets: further data folders.
        split: which people.
        query: what a text query is; see `evaluate`.
        device: where to compute.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        force: measure again even if nothing changed.

    Raises:
        UsageError: no model, or an unknown kind of query.
        DataError: a model or a folder that is not there, or no cell that could be measured.
    """
    check_query(query)
    rows = _models(run, models)
    columns = _datasets([model.run for model in rows], datasets)
    settings: Mapping[str, Any] = {
        "split": split,
        "query": query,
        "seed": seed,
        "resamples": resamples,
        "models": {model.name: [model.weights, model.training] for model in rows},
        "data": [column.name for column in columns],
    }
    inputs = {f"{column.name}/{name}": value for column in columns for name, value in column.digests.items()}
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    run.unfinish(STAGE)
    asked = _Asked(split, query, device, seed, resamples)
    parts = _Parts(run.stage_dir(STAGE) / "parts", force=force)
    cells = [_cell(model, column, asked, parts) for model in rows for column in columns]
    found = pd.DataFrame([row for cell in cells for row in cell["rows"]])
    if not len(found):
        raise DataError(
            f"No model can be measured on any of the {len(columns)} datasets.",
            hint=f"The first reason: {next(cell['reason'] for cell in cells if cell['reason'])}",
        )
    path = run.table(STAGE, "matrix")
    tables.write_table(path, "matrix", found)
    parts.forget_others()
    refused = [_refusal(cell) for cell in cells if cell["reason"] and not cell["rows"]]
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[path],
        started=started,
        device=device,
        metrics=_summary(found),
        extra={
            "split": split,
            "tables": _matrices(found, cells),
            "refused": refused,
            "notes": sorted({f"{cell['model']} on {cell['data']}: {note}" for cell in cells for note in cell["notes"]}),
        },
    )
    return {**record, "status": "done"}


@dataclass(frozen=True)
class _Model:
    run: Run
    name: str
    method: str
    weights: str
    training: str  # fingerprint: equal weights, as those of zero epochs, may have seen different people
    trained_on: str
    seen: frozenset[str]  # digests of the training images


@dataclass(frozen=True)
class _Dataset:
    folder: Path
    name: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class _Asked:
    split: str
    query: str
    device: str
    seed: int
    resamples: int


def _models(run: Run, models: Sequence[Run]) -> list[_Model]:
    every = [run, *models] if run.record("finetune") is not None else list(models)
    unique = list({model.path.resolve(): model for model in every}.values())
    if not unique:
        raise UsageError("A matrix needs models.", hint="Name runs with a finished `finetune` stage.")
    return [_model(model, name) for model, name in zip(unique, _names([m.path for m in unique]), strict=True)]


def _model(run: Run, name: str) -> _Model:
    trained = run.require("finetune")
    seen = tables.read_table(run.table("finetune", "seen"), "seen")
    images = frozenset(seen.loc[seen["kind"] == "image", "digest"].astype(str))
    weights, training = model_digest(run), str(trained["fingerprint"])
    return _Model(run, name, str(trained["method"]), weights, training, str(trained["data"]), images)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    full = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, full)) + 1):
        short = ["/".join(parts[-count:]) for parts in full]
        if len(set(short)) == len(short):
            return short
    return [str(path) for path in paths]


def _datasets(models: Sequence[Run], folders: Sequence[Path]) -> list[_Dataset]:
    """The models' datasets and the folders; copies of one dataset count once."""
    sources: dict[tuple[str | None, str | None], Source] = {}
    for source in [*(find_source(model) for model in models), *(find_source(Run(f), f) for f in folders)]:
        digests = source.digests()
        sources.setdefault((digests.get("images"), digests.get("captions")), source)
    kept = list(sources.values())
    names = _names([source.folder for source in kept])
    return [_Dataset(s.folder, name, s.digests()) for s, name in zip(kept, names, strict=True)]


# What `_measure` returns.
_PART = {"rows", "notes", "reason", "datasets", "lacks"}


class _Parts:
    """Measured cells as files, named by everything that they depend on."""

    def __init__(self, folder: Path, *, force: bool) -> None:
        self.folder, self.force = folder, force
        self.used: set[Path] = set()

    def read(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if self.force or not path.is_file():
            return None
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            part = None
        # A damaged part is measured again.
        return part if isinstance(part, dict) and part.keys() == _PART else None

    def write(self, name: str, cell: Mapping[str, Any]) -> None:
        tables.write_text(self._path(name), json.dumps(cell) + "\n")

    def forget_others(self) -> None:
        """Remove the cells of models and datasets that are no longer asked for."""
        for path in set(self.folder.glob("*.json")) - self.used:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name[:32]}.json"
        self.used.add(path)
        return path


def _cell(model: _Model, column: _Dataset, asked: _Asked, parts: _Parts) -> dict[str, Any]:
    """What one model scores on one dataset: rows of the table, or the reason why there are none."""
    where = {"model": model.name, "data": column.name}
    try:
        source = find_source(model.run, column.folder)
        facts = {key: value for key, value in vars(asked).items() if key != "device"}
        name = fingerprint({**facts, "model": [model.weights, model.training]}, source.digests())
        known = parts.read(name)
        if known is None:
            log.info(f"{model.name} on {column.name}")
            known = _measure(model, column, asked)
            parts.write(name, known)
        common = {**where, "method": model.method, "trained_on": model.trained_on}
        return {**known, **where, "rows": [{**common, **row} for row in known["rows"]]}
    except (DataError, UsageError) as error:
        # A refusal is quickly found again, and its cause may be gone by then: it is not kept.
        names = _dataset_names(column, asked.split)
        return {**where, "rows": [], "notes": [], "reason": error.message, "datasets": names, "lacks": {}}


def _measure(model: _Model, column: _Dataset, asked: _Asked) -> dict[str, Any]:
    subject = find_subject(model.run, split=asked.split, query=asked.query, device=asked.device, data=column.folder)
    stored = embed(subject)
    rows: list[dict[str, Any]] = []
    notes = list(subject.notes)
    images = subject.whole.images
    lacks: dict[str, str] = {}
    names = sorted(set(subject.corpus.images["dataset"].astype(str)))
    for dataset in names:
        asking, said = protocols_of(subject, stored, dataset)
        notes += said
        lacks[dataset] = " ".join(said)
        mine = images[(images["dataset"] == dataset) & (images["split"] == "train")]
        relation, shared = _relation(mine["sha256"].isin(model.seen))
        notes += [f"{dataset}: {shared}"] if shared else []
        for protocol in asking:
            found = protocols.evaluate(
                protocol, top=0, seed=asked.seed, resamples=asked.resamples, device=str(subject.device)
            )
            if found.left_out:
                notes.append(f"{dataset}, {protocol.direction}: too few images for {', '.join(found.left_out)}.")
            # All of the standard condition, which the table has no column for.
            plain = found.metrics.drop(columns="condition").to_dict("records")
            rows += [{"relation": relation, **{str(key): value for key, value in row.items()}} for row in plain]
    reason = None if rows else " ".join(notes) or f"No query of the {asked.split} split has a match."
    return {"rows": rows, "notes": notes, "reason": reason, "datasets": names, "lacks": lacks}


def _relation(known: pd.Series) -> tuple[str, str]:
    """Whether a model was trained on a dataset, from which of its training images it saw, and a note if on a part."""
    count, total = int(known.sum()), len(known)
    relation = "same" if count and count >= SAME * total else "cross"
    if count in (0, total):
        return relation, ""
    return relation, f"the model was trained on {count:,} of its {total:,} training images, which counts as {relation}."


def _dataset_names(column: _Dataset, split: str) -> list[str]:
    images = tables.read_table(column.folder / "images.parquet", "images", ["dataset", "split"])
    return sorted(set(images.loc[images["split"] == split, "dataset"].astype(str)))


def _refusal(cell: Mapping[str, Any]) -> dict[str, str]:
    return {"model": cell["model"], "data": cell["data"], "reason": cell["reason"]}


def _summary(found: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The lowest value of all cells by direction and metric, so that a floor guards them all."""
    summary: dict[str, dict[str, float]] = {}
    for (direction, metric), rows in found.groupby(["direction", "metric"], sort=False):
        summary.setdefault(str(direction), {})[str(metric)] = float(rows["value"].min())
    return summary


def _matrices(found: pd.DataFrame, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One matrix per direction and metric, ready to print: models down, datasets across."""
    columns = list(dict.fromkeys((cell["data"], dataset) for cell in cells for dataset in cell["datasets"]))
    named = [dataset for _, dataset in columns]
    labels = [name if named.count(name) == 1 else f"{name} ({data})" for data, name in columns]
    whole = {(cell["model"], cell["data"]): cell for cell in cells}
    shown = []
    for (direction, metric), rows in found.groupby(["direction", "metric"], sort=False):
        at = {(row["model"], row["data"], row["dataset"]): row for row in rows.to_dict("records")}
        home = rows[rows["relation"] == "same"].groupby(["data", "dataset"])["value"].max().to_dict()
        lines = []
        for model in dict.fromkeys(cell["model"] for cell in cells):
            line: list[dict[str, Any]] = []
            for data, dataset in columns:
                row = at.get((model, data, dataset))
                if row is None:
                    line.append({"reason": _reason(whole[model, data], dataset, str(direction))})
                else:
                    line.append({**{key: row[key] for key in SCORES}, "drop": _drop(row, home.get((data, dataset)))})
            lines.append({"model": model, "cells": line})
        shown.append({"direction": direction, "metric": metric, "columns": labels, "rows": lines})
    return shown


def _reason(cell: Mapping[str, Any], dataset: str, direction: str) -> str:
    return str(cell["reason"] or cell["lacks"].get(dataset) or f"No {direction} result on these data.")


def _drop(row: Mapping[Any, Any], home: float | None) -> float | None:
    """How far a model stays below the best one trained on the dataset; None for such a model, or without one."""
    return None if home is None or row["relation"] == "same" else home - float(row["value"])
