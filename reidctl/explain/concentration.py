"""How concentrated maps are, whatever they point at, and how per-phrase scores become rows of `interpretability`.

A concentrated map may look convincing and win tests that follow mass, so concentration is reported on its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.errors import UsageError
from reidctl.explain.maps import named_rows
from reidctl.metrics import Floats, Interval, bootstrap_interval

METRICS: Mapping[str, Sequence[str]] = {"entropy": (), "top10_mass": (), "spread": ()}
"""What `score_concentration` measures; none of it has a control."""

_TOP = 0.1


def entropy(maps: npt.ArrayLike) -> Floats:
    """Return the entropy of each map as a distribution over patches, divided by that of the uniform one, shape (M,).

    H = -Σ_n p_n log p_n / log N,  p = map / Σ map

    Range [0, 1]: 0 for one patch, 1 for a constant map. A map of zeros counts as a constant one. Moving the patches
    of a map to other places does not change it.

    Args:
        maps: values >= 0, shape (M, N).
    """
    p = _distribution(maps)
    if p.shape[1] < 2:
        return np.ones(len(p))
    terms = p * np.log(np.where(p > 0, p, 1.0))
    return np.asarray(np.clip(-terms.sum(axis=1) / math.log(p.shape[1]), 0.0, 1.0))


def top_mass(maps: npt.ArrayLike, share: float = _TOP) -> Floats:
    """Return the share of each map's mass in its highest patches, shape (M,), in [share, 1].

    The highest `share` of N patches need not be a whole number: the last patch counts by its fraction, so a constant
    map (and one of zeros, which counts as constant) scores exactly `share`. Ties cannot matter: tied patches hold
    the same mass.

    Args:
        maps: values >= 0, shape (M, N).
        share: of the patches, in (0, 1].

    Raises:
        UsageError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UsageError(f"A share of {share} of the patches makes no sense.", hint="Give a number in (0, 1].")
    p = _distribution(maps)
    weight = np.clip(share * p.shape[1] - np.arange(p.shape[1]), 0.0, 1.0)
    return np.asarray(np.clip(-np.sort(-p, axis=1) @ weight, 0.0, 1.0))


def spread(maps: npt.ArrayLike, grid: tuple[int, int]) -> Floats:
    """Return the spatial variance of each map, shape (M,).

    Σ_n p_n ||pos_n - μ||²,  μ = Σ_n p_n pos_n,  pos the centres of patches with both axes scaled to [0, 1]

    Range [0, 0.5]: 0 for one patch, about 1/6 for a constant map, 0.5 for halves in opposite corners of a fine grid.

    Args:
        maps: values >= 0, shape (M, N), row-major over the grid.
        grid: (h, w), h * w = N.
    """
    p = _distribution(maps).reshape(-1, *grid)
    return _variance(p.sum(axis=2)) + _variance(p.sum(axis=1))


def _variance(p: Floats) -> Floats:
    """The variance of a distribution (M, n) over n cells of [0, 1]."""
    place = (np.arange(p.shape[1]) + 0.5) / p.shape[1]
    distance = place - (p @ place)[:, None]  # (M, n)
    return np.asarray((p * distance**2).sum(axis=1))


def _distribution(maps: npt.ArrayLike) -> Floats:
    values = np.asarray(maps, np.float64)
    assert values.ndim == 2 and (values >= 0).all(), "maps are (M, N) and not negative"
    total = values.sum(axis=1, keepdims=True)
    return np.where(total > 0, values / np.where(total > 0, total, 1.0), 1.0 / values.shape[1])


def score_concentration(explanations: pd.DataFrame) -> pd.DataFrame:
    """Return entropy, mass in the highest tenth of patches and spread of every map.

    Args:
        explanations: rows of the `explanations` table; grids may differ from row to row.

    Returns:
        Columns query_id, image_id, phrase, explainer, entropy, top10_mass, spread, in the order of the rows.
    """
    found = explanations[["query_id", "image_id", "phrase", "explainer"]].reset_index(drop=True)
    found = found.assign(**dict.fromkeys(METRICS, math.nan))
    for grid, rows in same_grids(explanations):
        maps = tables.matrix(explanations["relevance"].iloc[rows])
        for name, values in zip(METRICS, (entropy(maps), top_mass(maps), spread(maps, grid)), strict=True):
            found.loc[rows, name] = values
    return found


def same_grids(explanations: pd.DataFrame) -> list[tuple[tuple[int, int], npt.NDArray[np.int64]]]:
    """Return the places of the rows of an `explanations` table by their grid (h, w), in order of appearance."""
    grids: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(named_rows(explanations)):
        grids.setdefault((int(row.grid_h), int(row.grid_w)), []).append(place)
    return [(grid, np.asarray(rows, np.int64)) for grid, rows in grids.items()]


def summarise_scores(
    scores: pd.DataFrame,
    people: Mapping[str, str],
    metrics: Mapping[str, Sequence[str]],
    *,
    judge: str = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Return per-phrase scores as rows of the `interpretability` table, with 95 % intervals over people.

    For every explainer and metric: the mean, the mean of each control, and the mean of metric - control over the rows
    that have both. Rows where a value is NaN are left out of its mean; `items` counts the others. What no row has is
    left out whole.

    Args:
        scores: columns image_id, explainer, and for every metric `<metric>` and `<metric>.<control>`.
        people: the person of each image.
        metrics: the names of the controls of each metric.
        judge: the other model that gave the scores; empty for the explained one.
        seed: of the bootstrap.
    """
    rows: list[dict[str, Any]] = []
    for explainer, part in scores.groupby("explainer", sort=False, observed=True):
        person = np.asarray([people[str(image)] for image in part["image_id"]], object)
        for metric, controls in metrics.items():
            fixed = {"explainer": str(explainer), "judge": judge, "metric": metric, "fill": "", "removed": math.nan}
            for kind, control, values in _kinds(part, metric, controls):
                items = int((~np.isnan(values)).sum())
                if not items:
                    continue  # nothing was measured, such as the correlations of maps that are all constant
                interval = bootstrap_interval(values, person, seed=seed)
                rows.append({**fixed, "kind": kind, "control": control, **_numbers(interval), "items": items})
    names = list(tables.empty("interpretability").columns)
    return pd.DataFrame(rows, columns=names) if rows else tables.empty("interpretability")


def _kinds(part: pd.DataFrame, metric: str, controls: Sequence[str]) -> list[tuple[str, str, Floats]]:
    value = part[metric].to_numpy(np.float64)
    found = [("value", "", value)]
    for control in controls:
        other = part[f"{metric}.{control}"].to_numpy(np.float64)
        found += [("control", control, other), ("difference", control, value - other)]
    return found


def _numbers(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
