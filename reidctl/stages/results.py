"""What an evaluation leaves behind: its tables, the record's summary, and the same as Markdown and LaTeX."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.evaluation.protocols import Evaluation
from reidctl.evaluation.render import latex, markdown
from reidctl.runs import Run
from reidctl.stages.references import REFERENCES

STAGE = "evaluate"


def condition_of(part: Evaluation) -> str:
    """Return the condition of an evaluation that scored at least one query."""
    return str(part.metrics["condition"].iloc[0])


def write_results(
    run: Run, found: Sequence[Evaluation], slices: Sequence[pd.DataFrame], *, split: str, notes: Sequence[str]
) -> list[Path]:
    """Write the tables of a run's `evaluate` stage and `results.md`, `results.tex`; return their paths.

    `queries` and `rankings` hold the model's own conditions, not the reference rows.
    """
    own = [part for part in found if condition_of(part) not in REFERENCES]
    frames = {
        "metrics": pd.concat([part.metrics for part in found], ignore_index=True),
        "queries": pd.concat([part.queries for part in own], ignore_index=True),
        "rankings": pd.concat([part.rankings for part in own], ignore_index=True),
        "slices": pd.concat([tables.empty("slices"), *slices], ignore_index=True) if slices else tables.empty("slices"),
    }
    for name, frame in frames.items():
        tables.write_table(run.table(STAGE, name), name, frame)
    shown = result_tables(found)
    texts = {
        "results.md": markdown(shown, split=split, notes=notes),
        "results.tex": latex(shown, split=split, notes=notes),
    }
    for file, text in texts.items():
        tables.write_text(run.stage_dir(STAGE) / file, text)
    return [*(run.table(STAGE, name) for name in frames), *(run.stage_dir(STAGE) / file for file in texts)]


def summary(found: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
    """Return the model's own numbers by direction; of several datasets the lowest, so that a gate guards them all."""
    lowest: dict[str, dict[str, float]] = {}
    for part in found:
        if condition_of(part) == "standard":
            held = lowest.setdefault(str(part.metrics["direction"].iloc[0]), {})
            for name, interval in part.summary.items():
                held[name] = min(interval.value, held.get(name, math.inf))
    return lowest


def result_tables(found: Sequence[Evaluation]) -> dict[str, Any]:
    """Return, by `direction:dataset`, what was counted and condition -> metric -> [value, low, high].

    Single-shot rows have other galleries and stand in a table of their own, `direction:dataset:single-shot`.
    """
    shown: dict[str, Any] = {}
    for part in found:
        first, condition = part.metrics.iloc[0], condition_of(part)
        where = [str(first["direction"]), str(first["dataset"])]
        about = "single-shot" if condition.startswith("single-shot") else ""
        counts = {name: int(first[name]) for name in ("queries", "skipped", "gallery")}
        facts = shown.setdefault(
            ":".join([*where, about] if about else where),
            {
                "direction": where[0],
                "dataset": where[1],
                "about": about,
                **counts,
                "rule": part.rule,
                "rows": {},
                "counts": {},
            },
        )
        if condition in ("standard", "single-shot"):
            scored = part.queries["matches"] > 0
            facts["people"] = int(part.queries.loc[scored, "person_id"].nunique())
        facts["rows"][condition] = {
            name: [value.value, _number(value.low), _number(value.high)] for name, value in part.summary.items()
        }
        facts["counts"][condition] = counts
    return shown


def remarks(part: Evaluation) -> list[str]:
    """Return sentences about queries that could not be scored and metrics that could not be measured."""
    first = part.metrics.iloc[0]
    where = f"{first['dataset']}, {first['direction']}"
    said = []
    if part.unmatched:
        shown = ", ".join(part.unmatched[:3]) + (", ..." if len(part.unmatched) > 3 else "")
        said.append(f"{where}: {len(part.unmatched)} queries have no match and count in no mean: {shown}.")
    if part.left_out:
        missing = ", ".join(part.left_out)
        said.append(f"{where}: {missing} left out, the gallery has only {int(first['gallery'])} images.")
    return said


def _number(value: float) -> float | None:
    return None if value != value else value
