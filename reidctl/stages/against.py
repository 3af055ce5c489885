"""`evaluate --against RUN`: whether this run differs from another on the same queries, with intervals and p-values."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.paired import EXACT, Comparison, compare
from reidctl.runs import Run, digest
from reidctl.stages.index import model_digest, training_digest

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
            or data; or see `evaluation.paired.compare`, which is all that is checked of given embeddings.
    """
    if run.path.resolve() == other.path.resolve():
        raise UsageError(f"{run.path} would be compared with itself.", hint="Name another run.")
    ours, theirs = evaluated(run), evaluated(other)
    check_same_evaluation(run, ours, other, theirs)
    models = {
        f"{side}{name}": record["settings"].get(name)
        for side, record in (("", ours), ("other_", theirs))
        for name in ("model", "training")
    }
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
    """Return the record of a run's evaluation, of its own model or of given embeddings.

    Raises:
        DataError: there is none, or the run's model was trained again since.
    """
    record = run.require(EVALUATED)
    if not is_given(record):
        _check_training(run, record["settings"])
    if not run.table(EVALUATED, "queries").is_file():
        raise DataError(
            f"{run.table(EVALUATED, 'queries')} is missing.", hint=f"Run `reidctl evaluate --run {run.path} --force`."
        )
    return record


def is_given(record: Mapping[str, Any]) -> bool:
    """Whether an evaluation measured given embeddings, which no training of the run made as far as anybody knows."""
    return "given" in record["settings"]


def _check_training(run: Run, settings: Mapping[str, Any]) -> None:
    """Refuse an evaluation of another training than the run's: equal weights may have been chosen on other people.

    Raises:
        DataError: it is, or the evaluation does not say.
    """
    if run.record("finetune") is None:
        return
    same = settings["model"] == model_digest(run)
    hint = f"Run `reidctl evaluate --run {run.path}` again."
    if same and "training" not in settings:
        raise DataError(f"The evaluation of {run.path} does not say which training it measured.", hint=hint)
    if not same or settings["training"] != training_digest(run):
        how = ", to the same weights by other settings or data" if same else ""
        raise DataError(f"The model of {run.path} was trained again after its evaluation{how}.", hint=hint)


def check_same_evaluation(run: Run, ours: Mapping[str, Any], other: Run, theirs: Mapping[str, Any]) -> None:
    """Refuse to set two evaluations side by side that did not measure the same thing.

    Of given embeddings only the split is known here: neither their data nor what a query was.

    Raises:
        DataError: they differ in split, kind of query, or data.
    """
    given = is_given(ours) or is_given(theirs)
    for key in ("split",) if given else ("split", "query"):
        one, two = ours["settings"][key], theirs["settings"][key]
        if one != two:
            raise DataError(
                f"{run.path} was evaluated with --{key} {one}, {other.path} with --{key} {two}.",
                hint=f"Evaluate both with the same --{key}.",
            )
    if given:
        return
    # Texts that a model wrote are queries too unless captions are.
    written = ["described"] if ours["settings"]["query"] != "caption" else []
    for name in ("images", "captions", *written):
        if ours["inputs"].get(name) != theirs["inputs"].get(name):
            raise DataError(
                f"{run.path} and {other.path} were evaluated on different data: the tables of {name} are not the same.",
                hint=f"Evaluate both on one dataset: `reidctl evaluate --data FOLDER --run {other.path}`.",
            )


def selected_on(run: Run, evaluation: Mapping[str, Any]) -> str:
    """Return the split on which the epoch that was evaluated was chosen, `unknown` if nobody says."""
    return "unknown" if is_given(evaluation) else str((run.record("finetune") or {}).get("selected_on", "unknown"))


def _summary(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows[rows["condition"] == "standard"].to_dict("records"):
        held = found.setdefault(str(row["direction"]), {})
        held[row["metric"]] = min(row["difference"], held.get(row["metric"], row["difference"]))
    return found


def _notes(found: Comparison) -> list[str]:
    """What the numbers do and do not say."""
    tests, people = len(found.differences), int(found.differences["people"].min())
    least, row = min((count, row) for row, count in enumerate((*found.differing, EXACT + 1)) if count)
    notes = [
        f"{tests} metrics were tested and nothing was corrected for that: without any true difference up to "
        f"{0.05 * tests:.1f} of them fall below p = 0.05 on average.",
        "Intervals and p-values are over people; they say nothing about other training seeds (see `--seeds`).",
    ]
    if least <= EXACT:
        tested = found.differences.iloc[row]
        notes.append(
            f"With k people that differ no p-value can be below 2^(1-k): {2.0 ** (1 - least):.2g} for "
            f"{tested['direction']} {tested['metric']}, in which {least} differ."
        )
    if people <= EXACT:
        notes.append(f"With {people} people the intervals are too narrow.")
    if found.left_out:
        notes.append(f"In one of the runs only, so not compared: {', '.join(found.left_out)}.")
    return notes


def _differences_of_runs(run: Run, ours: Mapping[str, Any], other: Run, theirs: Mapping[str, Any]) -> list[str]:
    """In what else the two runs differ."""
    given = [str(one.path) for one, record in ((run, ours), (other, theirs)) if is_given(record)]
    notes = []
    if given:
        notes.append(
            f"Given embeddings ({', '.join(given)}): only query ids, people, numbers of matches and gallery sizes were "
            "seen to agree. That both measured the same images and texts, and which models made them, was not checked; "
            "ids that an archive does not hold are numbers of rows."
        )
    model = ours["settings"]["model"]
    if model is not None and model == theirs["settings"]["model"]:
        notes.append("Both evaluations name the same model." if given else "Both runs hold the same weights.")
    chosen = {one.path: selected_on(one, record) for one, record in ((run, ours), (other, theirs))}
    notes.append("The epoch was chosen on: " + ", ".join(f"{on} ({path})" for path, on in chosen.items()) + ".")
    flattered = [str(path) for path, on in chosen.items() if on == ours["settings"]["split"]]
    if flattered:
        notes.append(f"Chosen on the split that is measured here, so flattered: {', '.join(flattered)}.")
    notes += _other_settings(ours, theirs)
    trained = [] if given else [one.record("finetune") for one in (run, other)]
    if trained and all(trained) and len({str(sorted(record["inputs"].items())) for record in trained if record}) > 1:
        notes.append("The two models were trained on different data.")
    return notes


def _other_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In which settings two evaluations differ, as far as both kinds of evaluation have them."""
    one, two = ours["settings"], theirs["settings"]
    names = set(one) | set(two) if is_given(ours) == is_given(theirs) else set(one) & set(two)
    names -= {"split", "query", "model", "training", "given", "asked_split"}
    # The draws of single-shot follow the seed; elsewhere it only moves ends of intervals.
    if "single-shot" not in (one.get("measure") or ()):
        names.discard("seed")
    return [
        f"The evaluations differ in `{key}`: {one.get(key)} here, {two.get(key)} there."
        for key in sorted(names)
        if one.get(key) != two.get(key)
    ]
