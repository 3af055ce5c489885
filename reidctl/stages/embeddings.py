"""`evaluate` on given embeddings: vectors that any program made, measured as a model of reidctl is."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reidctl.console import progress
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import protocols
from reidctl.evaluation.given import Given, protocols_of, read_given
from reidctl.evaluation.protocols import Evaluation, Protocol, Side
from reidctl.evaluation.reranking import caveats, evaluate_reranked
from reidctl.evaluation.slices import slice_rows
from reidctl.retrieval.rerank import Parameters, parse
from reidctl.runs import Run, digest
from reidctl.stages import results
from reidctl.stages.references import REFERENCES, chance_of, control_of

STAGE = results.STAGE

# Names of rows that the evaluation itself makes.
RESERVED = frozenset({*REFERENCES, "cloth-changing", "same-clothes", "single-shot"})


def run(
    run: Run,
    files: Sequence[Path],
    *,
    split: str | None = None,
    cutoffs: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "auto",
    rerank: Sequence[str] = (),
    normalise: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Measure embeddings that were made elsewhere; no model and no image is read.

    Writes what `stages.evaluate` writes, in the same place, so that everything that reads an evaluation reads this one.

    Args:
        run: where the tables and the record go; it needs no other stage.
        files: tables `embeddings` or NumPy archives (see `evaluation.given`) that together hold queries and gallery.
        split: which rows; None if there is one split only.
        cutoffs: the k of rank-k; None for 1, 5, 10 and 20, as far as the gallery reaches.
        seed: of the bootstrap and the label shuffle.
        device: where to compute.
        rerank: parameter sets of k-reciprocal re-ranking, such as `20/6/0.3`.
        normalise: divide vectors by their lengths instead of refusing those that are not of length 1.
        force: measure again even if nothing changed.

    Returns:
        The record with `status` `done` or `up-to-date`.

    Raises:
        UsageError: no files, a file twice, or several splits and none chosen.
        DataError: see `evaluation.given.read_given` and `protocols_of`; nobody to find; a cutoff beyond the gallery.
    """
    if not files:
        raise UsageError("No file of embeddings was given.")
    target = str(resolve_device(device))
    again = list(dict.fromkeys(parse(text) for text in rerank))
    inputs = _digests(files)
    # `query` and `model` are what comparisons of evaluations look at.
    asked_for = {
        "given": sorted(inputs), "asked_split": split, "cutoffs": None if cutoffs is None else sorted(set(cutoffs)),
        "seed": seed, "normalise": normalise, "rerank": [parameters.name for parameters in again], "query": "caption",
    }  # fmt: skip
    current = None if force else _up_to_date(run, asked_for, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    given = read_given(files, normalise=normalise)
    chosen = _split(given, split)
    asked, notes = protocols_of(given.table, split=chosen)
    notes += [note for protocol in asked if protocol.condition == "standard" for note in _remarks(protocol)]
    _check_conditions(asked)
    found, slices = _evaluate(asked, again, cutoffs, seed, target, notes)
    notes = [*given.notes, *notes, _WITHOUT_IMAGES]
    model = next((model for model in given.models.values() if model is not None), None)
    run.unfinish(STAGE)
    record = run.finish(
        STAGE,
        settings={**asked_for, "split": chosen, "model": model},
        inputs=inputs,
        outputs=results.write_results(run, found, slices, split=chosen, notes=notes),
        started=started,
        device=target,
        metrics=results.summary(found),
        extra={
            "split": chosen,
            "tables": results.result_tables(found),
            "notes": notes,
            "data": None,
            "embeddings": [str(path.resolve()) for path in files],
            "given": _identities(files, inputs, given),
            "model_sha256": model,
        },
    )
    return {**record, "status": "done"}


_WITHOUT_IMAGES = (
    "Measured on given embeddings: no images or texts, so no colour histogram, attribute oracle or query ceiling, and "
    "no check that these people were absent from the training."
)


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """The files' digests by name; the order of the files does not matter."""
    found: dict[str, str] = {}
    if len({path.resolve() for path in files}) < len(files):
        raise UsageError("A file of embeddings was given twice.")
    for path in sorted(files, key=str):
        found[path.name if path.name not in found else str(path)] = digest(path)
    return found


def _identities(files: Sequence[Path], inputs: Mapping[str, str], given: Given) -> list[dict[str, str | None]]:
    """What was measured, file by file: where it lay, its digest, and the model that it says made its vectors."""
    ordered = sorted(files, key=str)  # as in `_digests`
    return [
        {"path": str(path.resolve()), "sha256": sha256, "model": given.models[str(path)]}
        for path, sha256 in zip(ordered, inputs.values(), strict=True)
    ]


def _up_to_date(run: Run, asked_for: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """The finished evaluation of the same request, if any; the same files give the same split and model."""
    held = (run.record(STAGE) or {}).get("settings", {})
    return run.up_to_date(STAGE, {**asked_for, "split": held.get("split"), "model": held.get("model")}, inputs)


def _split(given: Given, split: str | None) -> str:
    known = sorted(set(given.table.rows["split"].unique()))
    if split is None and len(known) == 1:
        return str(known[0])
    if split is None and known:
        raise UsageError(f"The embeddings are of the splits {', '.join(known)}.", hint="Choose one with --split.")
    if split not in known:
        raise DataError(
            f"No embeddings of split {split}.", hint=f"Known: {', '.join(known) or 'none, there are no rows'}."
        )
    return str(split)


def _check_conditions(asked: Sequence[Protocol]) -> None:
    conditions = {protocol.condition for protocol in asked}
    taken = sorted(name for name in conditions if name in RESERVED or "rerank-" in name)
    if taken:
        raise DataError(
            f"The condition {taken[0]} of the embeddings is the name of a row that the evaluation makes itself.",
            hint="Give the condition another name.",
        )


def _evaluate(
    asked: Sequence[Protocol],
    rerank: Sequence[Parameters],
    cutoffs: Sequence[int] | None,
    seed: int,
    device: str,
    notes: list[str],
) -> tuple[list[Evaluation], list[pd.DataFrame]]:
    """The given vectors under every condition, and beside the standard one its settings and reference rows; slices.

    Raises:
        DataError: no query has a match.
    """
    found: list[Evaluation] = []
    slices: list[pd.DataFrame] = []
    unmatched: list[str] = []
    for protocol in asked:
        with progress(f"rank {protocol.direction}", len(protocol.query), unit="queries") as advance:
            model = protocols.evaluate(protocol, cutoffs=cutoffs, seed=seed, device=device, advance=advance)
        if not model.ranking.queries.scored:
            unmatched.append(_without_match(protocol))
            continue
        found.append(model)
        if protocol.condition != "standard":
            continue
        notes += results.remarks(model)
        images = pd.DataFrame({"image_id": protocol.query.image, "attributes": None})
        slices.append(slice_rows(protocol, model, images, None, seed=seed))
        for parameters in rerank:
            found.append(evaluate_reranked(protocol, parameters, cutoffs=cutoffs, seed=seed, device=device))
            notes += [note for note in caveats(protocol, parameters) if note not in notes]
        found += _beside(protocol, model, cutoffs, seed, device, notes)
    if not found:
        raise DataError(
            f"No query has a match, so there is nothing to measure: {' '.join(unmatched)}",
            hint="person_id must be written alike on both sides, and each query needs another image of the person.",
        )
    notes += unmatched
    return found, slices


def _beside(
    protocol: Protocol, model: Evaluation, cutoffs: Sequence[int] | None, seed: int, device: str, notes: list[str]
) -> list[Evaluation]:
    """The settings of cloth-changing sets, chance, and the label shuffle, as far as they have a scored query."""
    settings = protocols.clothes_settings(protocol)
    found = [protocols.evaluate(part, cutoffs=cutoffs, seed=seed, device=device) for part in settings]
    control, said = control_of(protocol, cutoffs=cutoffs, seed=seed, device=device)
    notes += said
    return [part for part in (*found, chance_of(protocol, model, seed=seed), control) if len(part.metrics)]


def _without_match(protocol: Protocol) -> str:
    """Why no query of a protocol is scored."""
    query, gallery = set(protocol.query.person), set(protocol.gallery.person)
    name = f"{protocol.dataset} {protocol.direction} ({protocol.condition})"
    if query & gallery:
        return f"{name}: every match shares the camera, or the image itself, with its query."
    return (
        f"{name}: nobody of the {len(query)} people of the queries (e.g. {min(query)}) is among the {len(gallery)} of "
        f"the gallery (e.g. {min(gallery)})."
    )


def _remarks(protocol: Protocol) -> list[str]:
    """What readers must know about cameras and about items on both sides."""
    query, gallery, notes = protocol.query, protocol.gallery, []
    name = f"{protocol.dataset} {protocol.direction}"
    lacking = [int(pd.isna(side.camera).sum()) for side in (query, gallery)]
    if protocol.exclude == "same_item":
        notes.append(f"{name}: cameras unknown, so images of the same person and camera are not dropped.")
    elif protocol.exclude == "same_camera" and any(lacking):
        notes.append(
            f"{name}: {lacking[0]} of {len(query)} queries and {lacking[1]} of {len(gallery)} gallery images have no "
            "camera_id; for them only the query image itself is dropped."
        )
    if protocol.direction == "i2i":
        notes += _on_both_sides(query, gallery, name)
    equal = _equal_vectors(query, gallery)
    if equal:
        notes.append(
            f"{name}: {len(equal)} queries have exactly the vector of a gallery image of another id, e.g. "
            f"{query.item[equal[0]]}: copies, or a model that does not look."
        )
    return notes


def _on_both_sides(query: Side, gallery: Side, name: str) -> list[str]:
    place = pd.Index(gallery.item).get_indexer(pd.Index(query.item))
    both = np.flatnonzero(place >= 0)
    if not len(both):
        return []
    for what, mine, theirs in (("person", query.person, gallery.person), ("camera", query.camera, gallery.camera)):
        differ = both[mine[both] != theirs[place[both]]]
        if len(differ):
            row = int(differ[0])
            raise DataError(
                f"{name}: item {query.item[row]} has {what} {mine[row]} as query and {theirs[place[row]]} in the "
                f"gallery; {len(differ)} such item(s).",
                hint="Different items need different ids.",
            )
    return [f"{name}: {len(both)} items are query and gallery item at once; none is searched for itself."]


def _equal_vectors(query: Side, gallery: Side) -> list[int]:
    """Queries whose vector stands in the gallery too, bit by bit, under another id."""
    if query.vectors.shape[1] != gallery.vectors.shape[1] or query.vectors.shape[1] < 2:
        return []
    # Two components decide almost always; the rest is compared only where they agree.
    mine, theirs = (np.ascontiguousarray(side.vectors[:, :2]).view(np.uint64)[:, 0] for side in (query, gallery))
    key, row = np.unique(theirs, return_index=True)
    place = np.minimum(np.searchsorted(key, mine), len(key) - 1)
    candidates = np.flatnonzero(key[place] == mine)
    return [
        int(i)
        for i in candidates
        if query.item[i] != gallery.item[row[place[i]]]
        and np.array_equal(query.vectors[i], gallery.vectors[row[place[i]]])
    ]
