"""The records of `evaluate` and its analyses as tables for people: title, columns, rows of text, notes."""

from collections.abc import Mapping, Sequence
from typing import Any

from reidctl.evaluation.comparison import Comparison
from reidctl.evaluation.render import caption, interval, percent
from reidctl.naming import DIRECTIONS, label

Table = dict[str, Any]

METRICS = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP", "rSum")
_BARE = ("rank20", "rSum")  # shown without an interval: a terminal is only so wide


def evaluated(record: Mapping[str, Any], *, short: bool = True) -> list[Table]:
    """Return one table per direction and dataset: the model's rows, then what they must be compared with.

    Args:
        record: of `evaluate`.
        short: leave the intervals of rank-20 and rSum out, for a terminal.
    """
    found = []
    for facts in record["tables"].values():
        names = [*METRICS[:4], *_more_ranks(facts["rows"]), *METRICS[4:]]
        rows = []
        for condition, values in facts["rows"].items():
            cells = [_metric(name, values.get(name), short=short) for name in names]
            rows.append([label(condition), *cells])
        found.append(_table(caption(facts, split=record["split"]), ["", *names], rows))
    return found


def sliced(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return, per direction and dataset, rank-1 and mAP of every part of the queries.

    Args:
        record: of `evaluate`.
        rows: of its table `slices`.
    """
    found = []
    for (direction, dataset), mine in _grouped(rows, "direction", "dataset"):
        lines = []
        for (name, part), values in _grouped(mine, "slice", "part"):
            at = {row["metric"]: row for row in values}
            cells = [_side(at[metric]) if metric in at else "-" for metric in ("rank1", "mAP")]
            lines.append([f"{name}: {part}", *cells, f"{values[0]['queries']:,}", f"{values[0]['people']:,}"])
        title = f"{_where(record, direction, dataset)}: parts of the queries; percent, 95 % intervals over people"
        found.append(_table(title, ["part", "rank1", "mAP", "queries", "people"], lines))
    return found


def robustness(record: Mapping[str, Any]) -> list[Table]:
    """Return, per direction, dataset and model, the settings with their drops; then the drops beside the control's."""
    found = []
    groups = dict.fromkeys((row["direction"], row["dataset"], row["model"]) for row in record["rows"])
    for direction, dataset, model in groups:
        mine = [r for r in record["rows"] if (r["direction"], r["dataset"], r["model"]) == (direction, dataset, model)]
        title = (
            f"{_where(record, direction, dataset)}, {model}: robustness; percent, 95 % intervals over people; "
            "drop: reference minus setting"
        )
        columns = ["setting", "seed", "level", "against", "rank1", "drop", "p", "mAP", "drop", "ceiling"]
        found.append(_table(title, columns, [_setting(row) for row in mine]))
    if record["differences"]:
        rows = [
            [
                *(row["dataset"], DIRECTIONS.get(row["direction"], row["direction"]), row["setting"]),
                *(_seed(row["seed"]), *_difference(row["values"].get("rank1")), *_difference(row["values"].get("mAP"))),
            ]
            for row in record["differences"]
        ]
        title = "Model's drop minus the control's, same queries: below 0, the model loses less; points, 95 % intervals"
        columns = ["dataset", "direction", "setting", "seed", "rank1", "p", "mAP", "p"]
        found.append(_table(title, columns, rows))
    return found


def against(record: Mapping[str, Any]) -> list[Table]:
    """Return one table of differences per direction, dataset and condition."""
    found = []
    for key, rows in _grouped(record["rows"], "direction", "dataset", "condition"):
        direction, dataset, condition = key
        first = rows[0]
        title = (
            f"{_where(record, direction, dataset)}, {label(condition)}: this run minus {record['other']}, the same "
            f"{first['queries']:,} queries of {first['people']:,} people; points, 95 % intervals over people"
        )
        lines = [
            [
                *(row["metric"], percent(row["value"]), percent(row["other"])),
                interval(row["difference"], row["low"], row["high"]),
                *(_p(row["p_value"]), f"{row['better']:,} / {row['worse']:,} / {row['equal']:,}"),
            ]
            for row in rows
        ]
        columns = ["metric", "this run", "other", "difference", "p", "queries better / worse / equal"]
        found.append(_table(title, columns, lines))
    return found


def seeds(record: Mapping[str, Any]) -> list[Table]:
    """Return one table per direction, dataset and condition: a row per run, then mean and standard deviation."""
    found = []
    for (direction, dataset, condition), rows in _grouped(record["rows"], "direction", "dataset", "condition"):
        title = f"{_where(record, direction, dataset)}, {label(condition)}: seeds; percent"
        lines = [[row["run"], _seed(row["seed"]), *(percent(row.get(name)) for name in METRICS)] for row in rows]
        found.append(_table(title, ["run", "seed", *METRICS], lines))
    return found


def matrix(record: Mapping[str, Any]) -> list[Table]:
    """Return one matrix per direction for rank-1 and mAP: models down, datasets across."""
    found = []
    for part in record["tables"]:
        if part["metric"] not in ("rank1", "mAP"):
            continue
        title = (
            f"{_where(record, part['direction'], part['metric'])}: models down, test data across; percent, 95 % "
            "intervals, in brackets the loss against the best model trained on these data"
        )
        lines = [[row["model"], *(_cell(cell) for cell in row["cells"])] for row in part["rows"]]
        found.append(_table(title, ["model", *part["columns"]], lines))
    refused = [[cell["model"], cell["data"], cell["reason"]] for cell in record["refused"]]
    return [*found, *([_table("Not measured", ["model", "data", "why"], refused)] if refused else [])]


def epochs(record: Mapping[str, Any]) -> list[Table]:
    """Return the selected epoch and the best on the measured split, side by side."""
    found = []
    for (direction, dataset), rows in _grouped(record["rows"], "direction", "dataset"):
        sides = [next((row[name] for row in rows if row[name]), None) for name in ("selected", "best")]
        # What follows the colon, that the best epoch on test is optimistic, is said by a note as well.
        heads = [f"{side['label'].partition(':')[0]} (epoch {side['epoch']})" if side else "-" for side in sides]
        title = f"{_where(record, direction, dataset)}: kept epochs; percent, 95 % intervals"
        lines = [[row["metric"], _side(row["selected"]), _side(row["best"]), _gap(row["gap"])] for row in rows]
        found.append(_table(title, ["metric", *heads, "gap"], lines))
    return found


def comparison(found: Comparison) -> Table:
    """Return a comparison with published numbers; its banner comes first among the notes."""
    drawn = found.as_dict()
    return _table(drawn["title"], drawn["columns"], drawn["rows"], drawn["notes"])


def _where(record: Mapping[str, Any], direction: str, subject: str) -> str:
    return f"{subject}, {DIRECTIONS.get(direction, direction)} ({record['split']})"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Table:
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "notes": list(notes)}


def _grouped(rows: Sequence[Mapping[str, Any]], *names: str) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    return [(key, [row for row in rows if tuple(row[name] for name in names) == key]) for key in keys]


def _metric(name: str, value: Sequence[float | None] | None, *, short: bool = True) -> str:
    if value is None:
        return "-"
    return percent(value[0]) if short and name in _BARE else interval(*value)


def _more_ranks(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rank-k that were asked for besides the usual ones, by k."""
    found = {name for values in rows.values() for name in values if name.startswith("rank")} - set(METRICS)
    return sorted(found, key=lambda name: int(name.removeprefix("rank")))


def _setting(row: Mapping[str, Any]) -> list[str]:
    values, drops = row["values"], row["drops"]
    first = drops.get("rank1")
    return [
        *(row["setting"], _seed(row["seed"]), "-" if row["level"] is None else f"{row['level']:g}"),
        "-" if row["setting"] == row["reference"] else row["reference"],
        *(_metric("rank1", values.get("rank1")), *_difference(first)),
        *(_metric("mAP", values.get("mAP")), _difference(drops.get("mAP"))[0]),
        percent(row["ceiling"]),
    ]


def _difference(values: Sequence[float | None] | None) -> tuple[str, str]:
    """A difference with its interval, and its p-value."""
    if not values:
        return "-", "-"
    return interval(*values[:3]), _p(values[3])


def _p(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _seed(value: int | None) -> str:
    return "-" if value is None else "mean" if value < 0 else str(value)


def _cell(cell: Mapping[str, Any]) -> str:
    if "reason" in cell:
        return "-"
    drop = "" if cell["drop"] is None else f" ({percent(-cell['drop'])})"
    return interval(cell["value"], cell["low"], cell["high"]) + drop


def _side(side: Mapping[str, Any] | None) -> str:
    return "-" if side is None else interval(side["value"], side["low"], side["high"])


def _gap(gap: Mapping[str, Any] | None) -> str:
    return "-" if gap is None else interval(gap["value"], gap["low"], gap["high"])
