"""From values per explained pair to rows of the table `interpretability`: means, controls and paired differences."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.metrics import mean

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000
_GROUP = ["judge", "explainer", "fill", "removed"]


def summary_rows(values: pd.DataFrame, metrics: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Return rows of table `interpretability`: each metric of the maps, of every control, and their difference.

    All pairs of one query count as one item, their mean: a query with many phrases or images weighs no more than
    another. The difference is map - control of the same query; queries that lack one of them count in neither. The
    95 % intervals resample people; see `intervals`.

    Args:
        values: columns query_id, person_id, judge, explainer, control ("" for the map), fill, removed, and `metrics`;
            one row per pair and whatever it was compared with.
        metrics: names of columns that are summarised.
        seed: of the resampling.
    """
    rows: list[dict[str, object]] = []
    names = ["query_id", "person_id", *_GROUP, "control"]
    items = values.groupby(names, sort=True, dropna=False)[list(metrics)].mean().reset_index()
    for group, part in items.groupby(_GROUP, sort=False, dropna=False):
        facts = dict(zip(_GROUP, group, strict=True))
        for metric in metrics:
            wide = part.pivot(index=["person_id", "query_id"], columns="control", values=metric)
            if "" in wide:
                rows += [{**facts, "metric": metric, **found} for found in _compare(wide, seed)]
    return pd.DataFrame(rows) if rows else tables.empty("interpretability")


def _compare(wide: pd.DataFrame, seed: int) -> list[dict[str, object]]:
    """The map, each control and the differences of one metric; `wide` has a row per query, the controls as columns."""
    controls = [str(name) for name in wide.columns if name != ""]
    own = wide[""].to_numpy(np.float64)
    given = wide[controls].to_numpy(np.float64)
    kinds = [("value", ""), *(("control", name) for name in controls), *(("difference", name) for name in controls)]
    table = np.concatenate([own[:, None], given, own[:, None] - given], axis=1)
    people = wide.index.get_level_values("person_id").to_numpy(object)
    found = intervals(table, people, seed=seed)
    items = (~np.isnan(table)).sum(axis=0).tolist()
    return [
        {"kind": kind, "control": control, "value": value, "low": low, "high": high, "items": count}
        for (kind, control), (value, low, high), count in zip(kinds, found.tolist(), items, strict=True)
        if count
    ]


def intervals(values: Floats, person: npt.NDArray[np.object_], *, seed: int = 0) -> Floats:
    """Return what `metrics.bootstrap_interval` says of each column, up to rounding: (value, low, high), shape (K, 3).

    Columns that lack the same rows share one draw of people, which is where a bootstrap's time goes.

    Args:
        values: one row per item, NaN where it has none, shape (Q, K).
        person: the person of each item, shape (Q,).
        seed: of the resampling.
    """
    result = np.full((values.shape[1], 3), np.nan)
    present = ~np.isnan(values)
    patterns, which = np.unique(present, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.any():
            columns = np.flatnonzero(which.reshape(-1) == number)
            result[columns] = _intervals(values[np.ix_(pattern, columns)], person[pattern], seed)
    return result


def _intervals(values: Floats, person: npt.NDArray[np.object_], seed: int) -> Floats:
    _, code = np.unique(person.astype(str), return_inverse=True)
    count = np.bincount(code).astype(np.float64)
    total = np.stack([np.bincount(code, weights=column) for column in values.T], axis=1)  # (people, k)
    rng = np.random.default_rng(seed)
    drawn, step = np.empty((_RESAMPLES, values.shape[1])), max(1, 2_000_000 // len(count))
    for begin in range(0, _RESAMPLES, step):
        some = min(step, _RESAMPLES - begin)
        weight = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=some).astype(np.float64)
        drawn[begin : begin + some] = (weight @ total) / (weight @ count)[:, None]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return np.stack([[mean(column) for column in values.T], low, high], axis=1)
