"""Sections of the report with numbers of retrieval: results, spoilt settings, numbers beside others."""

from typing import Any

import pandas as pd

from reidctl import naming
from reidctl.errors import DataError
from reidctl.evaluation import comparison
from reidctl.evaluation.protocols import JOINT
from reidctl.report import beside, content, figures
from reidctl.stages.report_parts import Material, Section


def results(material: Material, metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the metrics of every direction, dataset and split, with a figure each."""
    groups = content.metric_groups(metrics)
    for number, group in enumerate(groups):
        paths = figures.metric_bars(group.pop("frame"), material.stem(f"metrics-{number + 1}"))
        alt = f"Bar chart of the table above: {group['title']}"
        group["figure"] = material.figure(paths, group["title"], alt)
    return groups


def condition_texts(metrics: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the names and meanings of the conditions that need one."""
    present = figures.conditions(list(metrics["condition"]))
    texts = content.CONDITION_TEXTS
    return [(naming.label(name), texts[name]) for name in present if name in texts]


def robustness(material: Material) -> Section:
    """Return what spoilt queries and pictures cost."""
    rows = material.table("robustness", "robustness")
    if not len(rows):
        return None
    record = material.record("robustness")
    control = beside.control_grid(record.get("differences", []))
    grids = [*beside.robustness_grids(rows), *([control] if control else [])]
    return {"grids": grids, "notes": beside.unique(record.get("notes", []))}


def compared(material: Material) -> Section:
    """Return the numbers beside printed ones and those of other data, epochs, seeds and runs, as far as measured."""
    parts = [part for part in (_other_run(material), _seeds(material), _epochs(material), _matrix(material)) if part]
    printed = _printed(material)
    return {"printed": printed, "parts": parts} if printed or parts else None


def _printed(material: Material) -> list[dict[str, Any]]:
    """Our numbers beside the published ones, each under its banner."""
    record = material.record("evaluate")
    if not record.get("tables") or "data" not in record:
        return []
    try:
        context = comparison.context_of(material.run, record)
    except DataError:
        return []  # the training is gone, so nobody knows what the numbers are numbers of
    joint = JOINT if record["settings"].get("joint") else None
    shown = [
        comparison.compare(facts, dataset=facts["dataset"], direction=facts["direction"], context=context).as_dict()
        for facts in record["tables"].values()
        if facts["direction"] in ("t2i", "i2i") and not facts["about"] and facts["dataset"] != joint
    ]
    return [{**found, "grid": beside.printed_grid(found)} for found in shown]


def _other_run(material: Material) -> Section:
    rows = material.table("against", "differences")
    if not len(rows):
        return None
    record = material.record("against")
    title = "Beside another run"
    about = f"The same queries in this run and in {record.get('other', 'another one')}."
    return _part(title, about, beside.difference_grids(rows), record)


def _seeds(material: Material) -> Section:
    record = material.record("seeds")
    return _part("Training seeds", "Runs that differ in the seed alone.", beside.seed_grids(record), record)


def _epochs(material: Material) -> Section:
    record = material.record("epochs")
    grid = beside.epochs_grid(record)
    return _part("Epochs", "Every kept epoch was measured.", [grid] if grid else [], record)


def _matrix(material: Material) -> Section:
    record = material.record("matrix")
    about = "What a training on one dataset is worth on another."
    return _part("Models on datasets", about, beside.matrix_grids(record), record)


def _part(title: str, about: str, grids: list[Any], record: dict[str, Any]) -> Section:
    if not grids:
        return None
    return {"title": title, "about": about, "grids": grids, "notes": beside.unique(record.get("notes", []))}
