"""`evaluate --against RUN`: whether this run differs from another on the same queries, with intervals and p-values."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.paired import EXACT, Comparison, compare
from reidctl.runs import Run, digest

STAGE = "against"
EVALUATED = "evaluate"


def run(run: Run, other: Run, *, seed: int = 0, resamples: int = 10_000, force: bool = False) -> dict[str, Any]:
    """Compare the evaluations of two runs query by query; write `differences` and `paired`, and return the record.

    The record's `metrics` hold this run's difference of each metric by direction under the standard condition, the
    lowest of several datasets; `rows` all of them with intervals, p-values and counts of queries.

    Args:
        run: where the stage writes.
        other: what it is compared with; only read.
        seed: of the bootstrap and the sign flips.
        resamples: number of each.
        force: compare again even if nothing changed.

    Raises:
        UsageError: a run is compared with itself.
        DataError: a run is not evaluated, or was trained again since; the evaluations differ in split, kind of query
            or data; or see `evaluation.paired.compare`.
    """
    if run.path.resolve() == other.path.resolve():
        raise UsageError(f"{run.path} would be compared with itself.", hint="Name another run.")
    ours, theirs = evaluated(run), evaluated(other)
    check_same_evaluation(run, ours, other, theirs)
    models = {"model": ours["settings"]["model"], "other_model": theirs["settings"]["model"]}
    settings = {"other": str(other.path.resolve()), **models, "seed": seed, "resamples": resamples}
    inputs = {
        f"{name}.{part}": digest(one.stage_dir(EVALUATED) / file)
        for name, one in (("ours", run), ("other", other))
        for part, file in (("queries", "queries.parquet"), ("record", "stage.json"))
    }
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    queries = [tables.read_table(one.table(EVALUATED, "queries"), "queries") for one in (run, other)]
    found = compare(queries[0], queries[1], seed=seed, resamples=resamples)
    run.unfinish(STAGE)
    rows = found.differences.assign(split=ours["settings"]["split"])
    written = {"differences": rows, "paired": found.paired}
    for name, frame in written.items():
        tables.write_table(run.table(STAGE, name), name, frame)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, name) for name in written],
        started=started,
        metrics=_summary(rows),
        extra={
            "split": ours["settings"]["split"],
            "other": str(other.path.resolve()),
            "rows": rows.to_dict("records"),
            "notes": [*_notes(found), *_differences_of_runs(run, ours, other, theirs)],
        },
    )
    return {**record, "status": "done"}


def evaluated(run: Run) -> dict[str, Any]:
    """Return the record of a run's evaluation.

    Raises:
        DataError: there is none, or the model was trained again since.
    """
    record = run.require(EVALUATED)
    trained = run.record("finetune")
    weights = "" if trained is None else trained["outputs"]["finetune/model.safetensors"]["sha256"]
    if weights not in ("", record["settings"]["model"]):
        raise DataError(
            f"The model of {run.path} was trained again after its evaluation.",
            hint=f"Run `reidctl evaluate --run {run.path}` again.",
        )
    if not run.table(EVALUATED, "queries").is_file():
        raise DataError(
            f"{run.table(EVALUATED, 'queries')} is missing.", hint=f"Run `reidctl evaluate --run {run.path} --force`."
        )
    return record


def check_same_evaluation(run: Run, ours: Mapping[str, Any], other: Run, theirs: Mapping[str, Any]) -> None:
    """Refuse to set two evaluations side by side that did not measure the same thing.

    Raises:
        DataError: they differ in split, kind of query, or data.
    """
    for key in ("split", "query"):
        one, two = ours["settings"][key], theirs["settings"][key]
        if one != two:
            raise DataError(
                f"{run.path} was evaluated with --{key} {one}, {other.path} with --{key} {two}.",
                hint=f"Evaluate both with the same --{key}.",
            )
    # Texts that a model wrote are queries too unless captions are.
    written = ["described"] if ours["settings"]["query"] != "caption" else []
    for name in ("images", "captions", *written):
        if ours["inputs"].get(name) != theirs["inputs"].get(name):
            raise DataError(
                f"{run.path} and {other.path} were evaluated on different data: the tables of {name} are not the same.",
                hint=f"Evaluate both on one dataset: `reidctl evaluate --data FOLDER --run {other.path}`.",
            )


def selected_on(run: Run) -> str:
    """Return the split on which the run's epoch was chosen, `unknown` if the run does not say."""
    return str((run.record("finetune") or {}).get("selected_on", "unknown"))


def _summary(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows[rows["condition"] == "standard"].to_dict("records"):
        held = found.setdefault(str(row["direction"]), {})
        held[row["metric"]] = min(row["difference"], held.get(row["metric"], row["difference"]))
    return found


def _notes(found: Comparison) -> list[str]:
    """What the numbers do and do not say."""
    tests, people = len(found.differences), int(found.differences["people"].min())
    notes = [
        f"{tests} metrics were tested and nothing was corrected for that: without any true difference up to "
        f"{0.05 * tests:.1f} of them fall below p = 0.05 on average.",
        "Intervals and p-values are over people; they say nothing about other training seeds (see `--seeds`).",
    ]
    if people <= EXACT:
        least = 2.0 ** (1 - people)
        notes.append(f"With {people} people no p-value can be below {least:.2g}, and the intervals are too narrow.")
    if found.left_out:
        notes.append(f"In one of the runs only, so not compared: {', '.join(found.left_out)}.")
    return notes


def _differences_of_runs(run: Run, ours: Mapping[str, Any], other: Run, theirs: Mapping[str, Any]) -> list[str]:
    """In what else the two runs differ."""
    notes = []
    if ours["settings"]["model"] == theirs["settings"]["model"]:
        notes.append("Both runs hold the same weights.")
    here, there = selected_on(run), selected_on(other)
    notes.append(f"The epoch was chosen on: {here} ({run.path}), {there} ({other.path}).")
    flattered = [str(one.path) for one in (run, other) if selected_on(one) == ours["settings"]["split"]]
    if flattered:
        notes.append(f"Chosen on the split that is measured here, so flattered: {', '.join(flattered)}.")
    ignored = {"split", "query", "seed", "model"}
    one, two = ours["settings"], theirs["settings"]
    for key in sorted((set(one) | set(two)) - ignored):
        if one.get(key) != two.get(key):
            notes.append(f"The evaluations differ in `{key}`: {one.get(key)} here, {two.get(key)} there.")
    trained = [one.record("finetune") for one in (run, other)]
    if all(trained) and len({str(sorted(record["inputs"].items())) for record in trained if record}) > 1:
        notes.append("The two models were trained on different data.")
    return notes
