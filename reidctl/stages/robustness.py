"""`evaluate --setting`: what spoilt queries and pictures cost a model, beside a control model, paired by query."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.robustness import (
    MEAN,
    Case,
    Scores,
    averaged,
    chance_note,
    drop_differences,
    drops,
    equality_note,
    numbers,
    scores_of,
    shown,
    summary,
    table_rows,
    weakness_note,
)
from reidctl.evaluation.settings import level_of, resolve
from reidctl.metrics import distinct_query_ceiling
from reidctl.runs import Run
from reidctl.stages.index import model_digest, training_digest
from reidctl.stages.measuring import Subject, check_people, find_subject
from reidctl.stages.robustness_notes import notes
from reidctl.stages.robustness_parts import PART, Parts
from reidctl.stages.sources import Source, find_source
from reidctl.stages.spoiling import Asked, Bench, Measured, plan

STAGE = "robustness"
QUERIES = ("caption", "identity+clothing", "identity")
_QUERIES_OF = {"model": "queries", "control": "control"}


def run(
    run: Run,
    *,
    settings: Sequence[str] = ("all",),
    control: Run | None = None,
    split: str = "test",
    query: str = "caption",
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    level: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure a model under settings that spoil its queries or pictures, and what each costs against its reference.

    Captions are the queries of most settings (reference `standard`); `identity-only` and `clothes-conflict` ask with
    identity + clothing texts (reference `standard-texts`). Settings of pictures spoil the gallery in text-to-image
    retrieval and the queries alone in image-to-image retrieval, where a camera fails that is not the archive's;
    `blank` blanks both sides. Only standard protocols are measured, not the clothes settings of `evaluate`.

    Writes the table `robustness` (`ceiling` in rows of rank1; `seed` -1: the mean over seeds), the per-query table
    `queries` (condition: setting#seed) and, with a control, `control`. Every measurement leaves a part that later
    calls reuse, so a killed run repeats one measurement at most.

    Args:
        run: with a trained model.
        settings: names of `SETTINGS`, or `all`.
        control: a run with another model, measured with the same queries and pictures.
        split: which people.
        query: what `identity-only` and `clothes-conflict` ask with: `identity` leaves the clothing texts out of the
            queries, so that nothing about clothing can change (the rows say so); else identity + clothing.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts.
        seed: of the settings and of the intervals; clothes-conflict takes it and the next two.
        level: the strength of every setting that has one, in [0, 1]; default: each its own.
        force: measure everything again.

    Raises:
        UsageError: an unknown setting or kind of query, a level outside [0, 1], or the model as its own control.
        DataError: no model, no such split, people that a model was trained on, or a control of other data.
    """
    names = resolve(settings)
    levels = {name: level_of(name, level) for name in names}
    if level is not None and set(levels.values()) == {None}:
        raise UsageError(
            f"None of the settings asked for has a level ({', '.join(settings)}).", hint="Leave the level out."
        )
    if query not in QUERIES:
        raise UsageError(f"`--query {query}` is not known here.", hint=f"One of: {', '.join(QUERIES)}.")
    source = find_source(run, data, captions)
    check_people(source)
    facts = {"settings": names, "levels": levels, "split": split, "query": query, "seed": seed}
    facts |= {"model": model_digest(run), "control": _control_digest(run, control, source, data), "part": PART}
    # Equal weights may come from other people or another rule of selection: then other things are refused and said.
    facts |= {"training": training_digest(run), "control_training": training_digest(control) if control else None}
    inputs = source.digests()
    current = None if force else run.up_to_date(STAGE, facts, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    subjects = {"model": find_subject(run, split=split, device=device, data=data, captions=captions)}
    if control is not None:
        subjects["control"] = find_subject(
            control, split=split, device=device, data=source.folder, captions=source.described
        )
    run.unfinish(STAGE)
    run.table(STAGE, _QUERIES_OF["control"]).unlink(missing_ok=True)  # an earlier call may have had one
    parts = Parts(run.stage_dir(STAGE) / "parts", force=force)
    asked = plan(subjects["model"], names, query=query, seed=seed, level=level)
    measured = {name: _measure_all(Bench(subject, asked), parts) for name, subject in subjects.items()}
    record = _finish(run, subjects, asked, measured, facts, inputs, started)
    parts.forget_others(list(subjects.values()))
    return record


def _control_digest(run: Run, control: Run | None, source: Source, data: Path | None) -> str | None:
    """The control's model, after refusing one that cannot be compared.

    Raises:
        UsageError: it is the model itself.
        DataError: it belongs to other data, and no common data were named.
    """
    if control is None:
        return None
    weights = model_digest(control)
    if weights == model_digest(run):
        raise UsageError(f"The control {control.path} is the model itself.", hint="Name a run with another model.")
    try:
        own = find_source(control).digests()
    except DataError:
        return weights  # it has no data of its own that could differ
    mine = source.digests()
    if data is None and any(own.get(name) != mine.get(name) for name in ("images", "captions")):
        raise DataError(
            f"The control {control.path} belongs to other data than {run.path}: its drops would not be comparable.",
            hint="Train it on the same data, or give --data FOLDER to measure both on one dataset.",
        )
    return weights


def _measure_all(bench: Bench, parts: Parts) -> dict[str, Measured]:
    """Every case that the model can be asked, by key."""
    return {case.key: parts.measure(bench, case) for case in bench.asked.cases if not bench.skips(case)}


Where = tuple[str, str]
"""Direction and dataset."""


def _finish(
    run: Run,
    subjects: Mapping[str, Subject],
    asked: Asked,
    measured: Mapping[str, Mapping[str, Measured]],
    facts: Mapping[str, Any],
    inputs: Mapping[str, str],
    started: datetime,
) -> dict[str, Any]:
    """Write the tables and the record."""
    scores = {name: _scores(found) for name, found in measured.items()}
    rows = [
        {"model": name, "direction": where[0], "dataset": where[1], "split": subjects[name].split, **line}
        for name, subject in subjects.items()
        for where in scores[name]
        for line in _lines(subject, asked, scores[name][where], measured[name], where)
    ]
    if not rows:
        raise DataError(
            f"No query of the {subjects['model'].split} split has a match, so there is nothing to measure.",
            hint="Metrics need person ids and, for each query, another image of the person.",
        )
    differences = _differences(asked, scores)
    outputs = [run.table(STAGE, "robustness"), *(run.table(STAGE, _QUERIES_OF[name]) for name in subjects)]
    tables.write_table(outputs[0], "robustness", pd.DataFrame(table_rows(rows)))
    for path, found in zip(outputs[1:], measured.values(), strict=True):
        queries = pd.concat([part.queries for part in found.values()], ignore_index=True)
        tables.write_table(path, "queries", queries)
    record = run.finish(
        STAGE,
        settings=facts,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(subjects["model"].device),
        metrics=summary(rows),
        extra={
            "split": subjects["model"].split,
            "runs": {name: str(subject.run.path.resolve()) for name, subject in subjects.items()},
            "rows": rows,
            "differences": differences,
            "notes": notes(subjects, asked, measured, scores["model"], rows, differences),
            "data": str(subjects["model"].source.folder.resolve()),
        },
    )
    return {**record, "status": "done"}


def _scores(found: Mapping[str, Measured]) -> dict[Where, dict[str, Scores]]:
    """Scores by direction and dataset, then by case."""
    scores: dict[Where, dict[str, Scores]] = {}
    for key, part in found.items():
        for (direction, dataset), rows in part.queries.groupby(["direction", "dataset"], observed=True):
            if (rows["matches"] > 0).any():
                vectors = str(part.facts[f"{direction}:{dataset}"]["vectors"])
                scores.setdefault((str(direction), str(dataset)), {})[key] = scores_of(rows, vectors)
    return dict(sorted(scores.items(), key=lambda item: (item[0][0] != "t2i", item[0])))


def _with_means(cases: Sequence[Case], scores: Mapping[str, Scores]) -> list[tuple[Case, Scores, list[Case]]]:
    """The cases that were measured with what they scored, and after several seeds of one row their mean."""
    found: list[tuple[Case, Scores, list[Case]]] = []
    for place, case in enumerate(cases):
        if case.key not in scores:
            continue
        found.append((case, scores[case.key], [case]))
        alike = [other for other in cases if other.row == case.row]
        if len(alike) > 1 and case.row not in {other.row for other in cases[place + 1 :]}:
            mean = averaged([scores[other.key] for other in alike])
            found.append((Case(case.row, case.setting, case.reference, MEAN, case.level, case.texts), mean, alike))
    return found


def _lines(
    subject: Subject, asked: Asked, scores: Mapping[str, Scores], measured: Mapping[str, Measured], where: Where
) -> list[dict[str, Any]]:
    """The rows of one model in one direction on one dataset, ready to print: values as [mean, low, high]."""
    lines = []
    references = {case.reference: case for case in asked.cases if case.row == case.reference}
    for case, own, alike in _with_means(asked.cases, scores):
        base = references[case.reference]
        before = scores[base.key]
        is_base = case.row == base.row
        texts = [_texts(asked, part, own) for part in alike]
        original = _texts(asked, base, own) if case.texts is not None else []
        same = case.texts is not None and all(part == original for part in texts)
        ceiling = _ceiling(texts, own) if where[0] == "t2i" and case.texts is not None else None
        note = weakness_note(own, seed=asked.seed)
        if not is_base:
            note = _note(subject, asked, case, before, own, same_texts=same, ceiling=ceiling)
        lines.append(
            {
                "setting": case.row,
                "reference": case.reference,
                "seed": case.seed,
                "level": case.level,
                "spoilt": case.spoils(where[0]),
                "queries": int(own.valid.sum()),
                "skipped": int((~own.valid).sum()),
                "gallery": int(measured[alike[0].key].facts[":".join(where)]["gallery"]),
                "values": {name: numbers(*vars(it).values()) for name, it in own.intervals(asked.seed).items()},
                "drops": {} if is_base else shown(drops(before, own, seed=asked.seed)),
                "ceiling": ceiling,
                "changed": None if case.texts is None or where[0] != "t2i" else _changed(texts, original),
                "clothing_share": asked.clothing_share if case.row == "identity-only" else None,
                "note": note or None,
            }
        )
    return lines


def _texts(asked: Asked, case: Case, scores: Scores) -> list[str]:
    """The query texts of a case in the order of its scores; nothing in image-to-image retrieval."""
    if case.texts is None:
        return []
    text_of = dict(zip(asked.ids[case.reference], case.texts, strict=True))
    return [text_of[item] for item in scores.query if item in text_of]


def _ceiling(texts: Sequence[Sequence[str]], scores: Scores) -> float:
    """The highest rank-1 that equal texts allow, of the scored queries; of several seeds the mean."""
    kept = [row for row, valid in enumerate(scores.valid) if valid]
    people = [str(scores.person[row]) for row in kept]
    return math.fsum(distinct_query_ceiling([part[row] for row in kept], people) for part in texts) / len(texts)


def _changed(texts: Sequence[Sequence[str]], original: Sequence[str]) -> float:
    """The share of query texts that differ from the reference's."""
    pairs = [(one, other) for part in texts for one, other in zip(part, original, strict=True)]
    return sum(one != other for one, other in pairs) / len(pairs)


def _note(
    subject: Subject,
    asked: Asked,
    case: Case,
    before: Scores,
    after: Scores,
    *,
    same_texts: bool,
    ceiling: float | None,
) -> str:
    """What a reader of the row must know."""
    if case.setting == "blank":
        read = subject.method.gallery_texts
        return (
            f"Blank pictures still carry their gallery text ({', '.join(read)}): this is what that text alone finds."
            if read
            else chance_note(after)
        )
    said = [equality_note(case, before, after, same_texts=same_texts)]
    if case.seed == MEAN:
        said.append(f"Mean over seeds {asked.seed} to {asked.seed + 2}, each query averaged first.")
    if case.row == "identity-only" and asked.clothing_share is not None:
        said.append(f"{100 * asked.clothing_share:.1f} % of the words of the identity texts are clothing vocabulary.")
        said.append(
            f"No model can exceed rank-1 {100 * ceiling:.1f} % with these texts." if ceiling is not None else ""
        )
    return " ".join(part for part in said if part)


def _differences(asked: Asked, scores: Mapping[str, Mapping[Where, Mapping[str, Scores]]]) -> list[dict[str, Any]]:
    """The model's drop minus the control's for every row that both have: values as [mean, low, high, p]."""
    found: list[dict[str, Any]] = []
    references = {case.reference: case.key for case in asked.cases if case.row == case.reference}
    for where, theirs in scores.get("control", {}).items():
        mine = scores["model"].get(where, {})
        control = {(case.row, case.seed): part for case, part, _ in _with_means(asked.cases, theirs)}
        for case, part, _ in _with_means(asked.cases, mine):
            other, base = control.get((case.row, case.seed)), references[case.reference]
            if case.row == case.reference or other is None:
                continue
            gap = drop_differences((mine[base], part), (theirs[base], other), seed=asked.seed)
            keys = {"direction": where[0], "dataset": where[1], "setting": case.row, "reference": case.reference}
            found.append({**keys, "seed": case.seed, "level": case.level, "values": shown(gap)})
    return found
