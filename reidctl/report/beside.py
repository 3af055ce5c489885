"""Tables of numbers beside others: spoilt settings, printed numbers, other data, epochs, seeds and runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reidctl import naming
from reidctl.report.figures import METRIC_NAMES, named_rows
from reidctl.report.grids import NOTHING, Entry, Grid, Line, known, measured, number, p_text

Record = Mapping[str, Any]
_SHOWN = ("rank1", "mAP")


def robustness_grids(rows: pd.DataFrame) -> list[Grid]:
    """Return one table per direction and dataset: settings x value, drop against the reference, and ceiling.

    Args:
        rows: of the table `robustness`.
    """
    grids = []
    for (direction, dataset, split), part in rows.groupby(["direction", "dataset", "split"], observed=True, sort=False):
        names = [name for name in _SHOWN if name in set(part["metric"])]
        columns = [text for name in names for text in (METRIC_NAMES[name], f"drop of {METRIC_NAMES[name]}")]
        lines = [
            _robust_line(group, names)
            for _, group in part.groupby(["model", "setting", "seed"], observed=True, sort=False)
        ]
        caption = f"{_where(direction)}, {dataset}, {split} split: percent and points, 95 % intervals over people"
        grids.append(Grid(caption, "setting", (*columns, "ceiling of rank-1", "queries"), tuple(lines)))
    return grids


def _robust_line(group: pd.DataFrame, names: Sequence[str]) -> Line:
    at = {str(row.metric): row for row in named_rows(group)}
    first = group.iloc[0]
    cells = [cell for name in names for cell in (_value(at.get(name)), _drop(at.get(name)))]
    ceiling = getattr(at.get("rank1"), "ceiling", None)
    cells += [Entry(number(ceiling, scale=100)), Entry(f"{int(first['queries']):,}")]
    model = "" if first["model"] == "model" else f"{first['model']}: "
    seed = {-1: ", mean over seeds"}.get(int(first["seed"]), "")
    several = f", seed {first['seed']}" if str(first["setting"]) == "clothes-conflict" and not seed else ""
    level = f", level {first['level']:g}" if known(first["level"]) else ""
    reference = first["setting"] == first["reference"]
    return Line(f"{model}{first['setting']}{level}{seed}{several}", tuple(cells), strong=bool(reference))


def _value(row: Any) -> Entry:
    return NOTHING if row is None else measured((row.value, row.low, row.high), scale=100)


def _drop(row: Any) -> Entry:
    if row is None or not known(row.drop):
        return NOTHING
    told = told_apart(row.drop_low, row.drop_high)
    p = p_text(row.p_value)
    return measured((row.drop, row.drop_low, row.drop_high), scale=100, signed=True, after=[p, told])


def told_apart(low: float | None, high: float | None) -> str:
    """Return in words whether an interval excludes 0; nothing without an interval."""
    if low is None or high is None or not (known(low) and known(high)):
        return ""
    return "may be chance" if low <= 0 <= high else "not chance"


def control_grid(differences: Sequence[Record]) -> Grid | None:
    """Return by how much more the model drops than its control; None without a control.

    Args:
        differences: of the `robustness` record.
    """
    if not differences:
        return None
    names = [name for name in _SHOWN if any(name in row["values"] for row in differences)]
    lines = []
    for row in differences:
        cells = []
        for name in names:
            value, low, high, p = (*row["values"].get(name, ()), None, None, None, None)[:4]
            after = [p_text(p), told_apart(low, high)]
            cells.append(measured((value, low, high), scale=100, signed=True, after=after))
        mean = ", mean over seeds" if row["seed"] == -1 else ""
        lines.append(
            Line(f"{row['dataset']}, {_where(row['direction']).lower()}, {row['setting']}{mean}", tuple(cells))
        )
    columns = tuple(f"{METRIC_NAMES[name]}, drop of the model − drop of the control" for name in names)
    return Grid("The model's drop beside the control's, points", "setting", columns, tuple(lines))


def printed_grid(shown: Record) -> Grid:
    """Return our numbers beside printed ones as a table of words.

    Args:
        shown: a comparison as `Comparison.as_dict` gives it.
    """
    lines = [
        Line(str(row[0]), tuple(Entry(str(cell)) for cell in row[1:]), strong=str(row[1]) == "this run")
        for row in shown["rows"]
    ]
    return Grid(
        str(shown["title"]), "model", tuple(str(name) for name in shown["columns"][1:]), tuple(lines), worded=True
    )


def matrix_grids(record: Record) -> list[Grid]:
    """Return one table per direction and metric: models down, datasets across, a reason where there is no number."""
    grids = []
    for table in record.get("tables", []):
        metric = METRIC_NAMES.get(table["metric"], table["metric"])
        lines = [Line(row["model"], tuple(_crossed(cell) for cell in row["cells"])) for row in table["rows"]]
        caption = f"{_where(table['direction'])}, {metric}, percent: every model on every dataset"
        grids.append(Grid(caption, "model", tuple(table["columns"]), tuple(lines)))
    return grids


def _crossed(cell: Record) -> Entry:
    if "reason" in cell:
        return Entry("–", (str(cell["reason"]),))
    drop = "" if cell["drop"] is None else _below(cell["drop"])
    home = "trained there" if cell["relation"] == "same" else ""
    return measured((cell["value"], cell["low"], cell["high"]), scale=100, after=[home, drop])


def _below(drop: float) -> str:
    """How far a cell is from the best model that was trained on its dataset."""
    size = number(abs(drop), scale=100)
    return f"{size} {'below' if drop >= 0 else 'above'} the model trained there"


def epochs_grid(record: Record) -> Grid | None:
    """Return the chosen epoch beside the best one on the split; None without rows."""
    lines = []
    for row in record.get("rows", []):
        cells = [_epoch(row["selected"]), _epoch(row["best"]), _interval(row["gap"], signed=True)]
        name = f"{row['dataset']}, {_where(row['direction']).lower()}, {METRIC_NAMES.get(row['metric'], row['metric'])}"
        lines.append(Line(name, tuple(cells)))
    columns = ("chosen epoch", f"best epoch on {record.get('split', 'the split')} (optimistic)", "gap")
    caption = "The epoch that was chosen beside the one that is best, percent, 95 % intervals"
    return Grid(caption, "metric", columns, tuple(lines)) if lines else None


def _epoch(found: Record | None) -> Entry:
    if found is None:
        return NOTHING
    return measured((found["value"], found["low"], found["high"]), scale=100, after=[f"epoch {found['epoch']}"])


def _interval(found: Record | None, *, signed: bool = False) -> Entry:
    return (
        NOTHING if found is None else measured((found["value"], found["low"], found["high"]), scale=100, signed=signed)
    )


def seed_grids(record: Record) -> list[Grid]:
    """Return one table per direction, dataset and condition: runs, their mean and standard deviation."""
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for row in record.get("rows", []):
        grouped.setdefault((row["direction"], row["dataset"], row["condition"]), []).append(row)
    grids = []
    for (direction, dataset, condition), rows in grouped.items():
        names = [name for name in METRIC_NAMES if any(known(row.get(name)) for row in rows)]
        lines = [
            Line(
                _seed_name(row), tuple(Entry(number(row.get(name), scale=100)) for name in names), row["run"] == "mean"
            )
            for row in rows
        ]
        caption = f"{_where(direction)}, {dataset}, {naming.label(condition)}: training seeds, percent"
        grids.append(Grid(caption, "run", tuple(METRIC_NAMES[name] for name in names), tuple(lines)))
    return grids


def _seed_name(row: Record) -> str:
    return {"mean": "mean", "std": "standard deviation"}.get(str(row["run"]), f"seed {row['seed']}")


def difference_grids(rows: pd.DataFrame) -> list[Grid]:
    """Return this run minus another on the same queries, one table per direction and dataset.

    Args:
        rows: of the table `differences`.
    """
    grids = []
    for (direction, dataset, split), part in rows.groupby(["direction", "dataset", "split"], observed=True, sort=False):
        lines = [_difference_line(row) for row in named_rows(part)]
        columns = ("this run", "other run", "difference", "queries better / worse / equal")
        caption = f"{_where(direction)}, {dataset}, {split} split: this run beside the other, percent and points"
        grids.append(Grid(caption, "metric", columns, tuple(lines)))
    return grids


def _difference_line(row: Any) -> Line:
    p = p_text(row.p_value)
    gap = measured(
        (row.difference, row.low, row.high), scale=100, signed=True, after=[p, told_apart(row.low, row.high)]
    )
    counts = Entry(f"{row.better:,} / {row.worse:,} / {row.equal:,}")
    name = METRIC_NAMES.get(str(row.metric), str(row.metric))
    label = "" if row.condition == "standard" else f", {naming.label(str(row.condition))}"
    cells = (Entry(number(row.value, scale=100)), Entry(number(row.other, scale=100)), gap, counts)
    return Line(f"{name}{label}", cells, strong=row.condition == "standard")


def _where(direction: object) -> str:
    return naming.DIRECTIONS.get(str(direction), str(direction)).capitalize()


def unique(notes: Iterable[object]) -> list[str]:
    """Return notes once each, in order."""
    return list(dict.fromkeys(str(note) for note in notes))
