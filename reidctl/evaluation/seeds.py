"""Mean and spread of the same metrics over runs that differ in the training seed alone."""

import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from reidctl.errors import DataError

KEYS = ("direction", "dataset", "split", "condition", "metric")
_COUNTS = ("queries", "skipped", "gallery")


def summarise_runs(metrics: Sequence[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Return rows of the table `seeds`: mean, standard deviation, minimum and maximum of every metric over runs.

    std = sqrt(Σ (x - mean)² / (n - 1)), empty for a single run. It is the spread of single runs, not the error of the
    mean (std / sqrt(n)), and with few runs it is itself known badly: its relative error is about 1 / sqrt(2 (n - 1)),
    50 % for three runs. The order of the runs changes no bit.

    Args:
        metrics: rows of the table `metrics` of each run.
        names: what to call each run in messages.

    Raises:
        DataError: a row that one run has and another lacks, a row that occurs twice, or other numbers of queries or
            gallery items.
    """
    assert len(metrics) == len(names) > 0, "one name per run, at least one run"
    tables = [_by_key(frame, name) for frame, name in zip(metrics, names, strict=True)]
    for table, name in zip(tables[1:], names[1:], strict=True):
        _check_same(tables[0], names[0], table, name)
    return pd.DataFrame([_row(key, [float(table[key]["value"]) for table in tables]) for key in tables[0]])


def _row(key: tuple[str, ...], values: list[float]) -> dict[str, Any]:
    return {
        **dict(zip(KEYS, key, strict=True)),
        "runs": len(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "minimum": min(values),
        "maximum": max(values),
    }


def _by_key(frame: pd.DataFrame, name: str) -> dict[tuple[str, ...], dict[str, Any]]:
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in frame.to_dict("records"):
        key = tuple(str(row[column]) for column in KEYS)
        if key in found:
            raise DataError(f"{name}: {' '.join(key)} occurs more than once.", hint="Run `reidctl evaluate` again.")
        found[key] = {str(column): value for column, value in row.items()}
    return found


def _check_same(
    first: dict[tuple[str, ...], dict[str, Any]],
    first_name: str,
    other: dict[tuple[str, ...], dict[str, Any]],
    name: str,
) -> None:
    lone = sorted(set(first) ^ set(other))
    if lone:
        holder, without = (first_name, name) if lone[0] in first else (name, first_name)
        raise DataError(
            f"{holder} has a result that {without} lacks: {' '.join(lone[0])} ({len(lone)} such rows).",
            hint="Evaluate all runs with this version of reidctl.",
        )
    for key, row in first.items():
        for count in _COUNTS:
            if row[count] != other[key][count]:
                raise DataError(
                    f"{first_name} and {name} were not measured alike: {' '.join(key)} has {row[count]} and "
                    f"{other[key][count]} {count}.",
                    hint="Evaluate all runs on the same data.",
                )
