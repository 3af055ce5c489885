"""`evaluate --seeds RUN ...`: mean and spread over runs that differ in the training seed and in nothing else."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.seeds import summarise_runs
from reidctl.runs import Run, digest
from reidctl.stages.against import EVALUATED, check_same_evaluation, evaluated, is_given, selected_on

STAGE = "seeds"
# Recorded, but no other recipe: the kind of machine (said in a note) and which epochs are kept.
_NOT_RECIPE = frozenset({"seed", "device", "train.keep_epochs"})
# What else decides the numbers of an evaluation, and the flag that sets it.
_MEASURED = {
    "measure": "protocol",
    "cutoffs": "ranks",
    "rerank": "rerank",
    "weight": "weight",
    "seed": "seed",
    "joint": "joint",
}


def run(run: Run, others: Sequence[Run], *, force: bool = False) -> dict[str, Any]:
    """Write the table `seeds` of this run and others, and return the record.

    The record's `metrics` hold the mean of each metric by direction under the standard condition, the lowest of several
    datasets. `rows` hold, for each direction, dataset and condition of the model's own rankings, one row per run in
    order of seeds, then rows named `mean` and `std` (whose values are None for a single run).

    Args:
        run: one of the runs, and where the stage writes.
        others: the other ones; only read.
        force: compute again even if nothing changed.

    Raises:
        UsageError: a run is named twice.
        DataError: a run is not trained or not evaluated, or on given embeddings; recipes, training data or what was
            measured differ; a seed or the weights of a model occur twice.
    """
    runs = [run, *others]
    _check_paths(runs)
    trained = {one.path: one.require("finetune") for one in runs}
    runs.sort(key=lambda one: (int(trained[one.path]["settings"]["seed"]), str(one.path.resolve())))
    records = [trained[one.path] for one in runs]
    measured = [_own_evaluation(one) for one in runs]
    for index in range(1, len(runs)):
        _check_same_training(runs[0], records[0], runs[index], records[index])
        check_same_evaluation(runs[0], measured[0], runs[index], measured[index])
        _check_same_measure(runs[0], measured[0], runs[index], measured[index])
    _check_distinct(runs, records)
    names = [str(one.path) for one in runs]
    listed = [
        {"run": str(one.path.resolve()), "seed": int(record["settings"]["seed"]), "model": _weights(record)}
        for one, record in zip(runs, records, strict=True)
    ]
    settings = {"runs": listed, "training": [record["fingerprint"] for record in records]}
    inputs = {f"metrics.{place}": digest(one.table(EVALUATED, "metrics")) for place, one in enumerate(runs)}
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    metrics = [tables.read_table(one.table(EVALUATED, "metrics"), "metrics") for one in runs]
    found = summarise_runs(metrics, names)
    run.unfinish(STAGE)
    tables.write_table(run.table(STAGE, "seeds"), "seeds", found)
    own = tables.read_table(run.table(EVALUATED, "queries"), "queries", ["condition"])["condition"]
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, "seeds")],
        started=started,
        metrics=_summary(found),
        extra={
            "split": measured[0]["settings"]["split"],
            "runs": listed,
            "rows": _rows(found[found["condition"].isin(set(own))], metrics, listed),
            "notes": _notes(runs, records, measured),
        },
    )
    return {**record, "status": "done"}


def _check_paths(runs: Sequence[Run]) -> None:
    paths = [one.path.resolve() for one in runs]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice.", hint="Name each run once; --run is one of them.")


def _own_evaluation(run: Run) -> dict[str, Any]:
    """The record of the evaluation of the run's own model."""
    record = evaluated(run)
    if is_given(record):
        raise DataError(
            f"{run.path} was evaluated on given embeddings, which no seed of its training is known to have made.",
            hint=f"Run `reidctl evaluate --run {run.path}` without --embeddings.",
        )
    return record


def _check_same_measure(first: Run, one: Mapping[str, Any], second: Run, two: Mapping[str, Any]) -> None:
    """Refuse evaluations of one split and data that measured it in other ways: they have no mean."""
    for name, flag in _MEASURED.items():
        here, there = (_in_order(record["settings"].get(name)) for record in (one, two))
        if here != there:
            raise DataError(
                f"The evaluations of {first.path} and {second.path} differ in `{name}`: {here} and {there}.",
                hint=f"Evaluate all runs with the same --{flag}.",
            )


def _in_order(value: Any) -> Any:
    """A setting; of a list the order decides nothing."""
    return sorted(value) if isinstance(value, list) else value


def _weights(record: Mapping[str, Any]) -> str:
    return str(record["outputs"]["finetune/model.safetensors"]["sha256"])


def _check_same_training(first: Run, one: Mapping[str, Any], second: Run, two: Mapping[str, Any]) -> None:
    """Refuse runs that differ in more than the seed."""
    here, there = _flat(one["settings"]), _flat(two["settings"])
    for key in dict.fromkeys((*here, *there)):
        if key not in _NOT_RECIPE and here.get(key, "absent") != there.get(key, "absent"):
            raise DataError(
                f"{first.path} and {second.path} differ in more than the seed: `{key}` is "
                f"{here.get(key, 'absent')} and {there.get(key, 'absent')}.",
                hint="Compare such runs with `reidctl evaluate --against`.",
            )
    names = sorted(set(one["inputs"]) | set(two["inputs"]))
    other = [name for name in names if one["inputs"].get(name) != two["inputs"].get(name)]
    if other:
        raise DataError(
            f"{first.path} and {second.path} were trained on different data: the tables of {other[0]} differ.",
            hint="Train all seeds on one dataset (`--data FOLDER`).",
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _check_distinct(runs: Sequence[Run], records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the same seed or the same weights twice; the runs are in order of seeds."""
    seeds: dict[int, int] = {}
    weights: dict[str, int] = {}
    for place, (one, record) in enumerate(zip(runs, records, strict=True)):
        seed, model = int(record["settings"]["seed"]), _weights(record)
        if seed in seeds:
            same = model == _weights(records[seeds[seed]])
            proof = (
                "to identical weights, so it is one run" if same else "to different weights (other machine or version?)"
            )
            raise DataError(
                f"{runs[seeds[seed]].path} and {one.path} were both trained with seed {seed}, {proof}.",
                hint="Train one of them again with another --seed.",
            )
        if model in weights:
            raise DataError(
                f"{runs[weights[model]].path} and {one.path} hold the same weights although their seeds differ, so the "
                "seed decided nothing (no training, or copied weights).",
                hint="Name runs that were trained.",
            )
        seeds[seed], weights[model] = place, place


def _rows(
    found: pd.DataFrame, metrics: Sequence[pd.DataFrame], listed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What is printed: every run's values, then their mean and standard deviation."""
    rows: list[dict[str, Any]] = []
    for group, part in found.groupby(["direction", "dataset", "condition"], sort=False):
        where = dict(zip(("direction", "dataset", "condition"), map(str, group), strict=True))
        for facts, frame in zip(listed, metrics, strict=True):
            own = frame[(frame[list(where)] == pd.Series(where)).all(axis=1)]
            values = dict(zip(own["metric"], map(float, own["value"]), strict=True))
            rows.append({**where, "run": facts["run"], "seed": facts["seed"], **values})
        for name in ("mean", "std"):
            numbers = [None if pd.isna(value) else float(value) for value in part[name]]
            rows.append({**where, "run": name, "seed": None, **dict(zip(part["metric"], numbers, strict=True))})
    return rows


def _summary(found: pd.DataFrame) -> dict[str, dict[str, float]]:
    summary: dict[str, dict[str, float]] = {}
    for row in found[found["condition"] == "standard"].to_dict("records"):
        held = summary.setdefault(str(row["direction"]), {})
        held[row["metric"]] = min(row["mean"], held.get(row["metric"], math.inf))
    return summary


def _notes(
    runs: Sequence[Run], records: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> list[str]:
    notes = []
    if len(runs) == 1:
        notes.append("One run: no standard deviation.")
    else:
        error = 100 / math.sqrt(2 * (len(runs) - 1))
        notes.append(
            f"{len(runs)} runs with the same recipe and training data, different seeds and different weights; std is "
            f"the spread of single runs (n - 1), of which {len(runs)} runs tell no more than ± {error:.0f} %."
        )
    selected = sorted({selected_on(one, record) for one, record in zip(runs, measured, strict=True)})
    notes.append(f"The epochs were chosen on: {', '.join(selected)}.")
    for name, values in (
        ("kinds of device", {str(record["settings"].get("device")) for record in records}),
        ("versions of reidctl", {str(record["version"]) for record in records}),
    ):
        if len(values) > 1:
            notes.append(f"Trained with different {name} ({', '.join(sorted(values))}): not the seed alone.")
    return notes
