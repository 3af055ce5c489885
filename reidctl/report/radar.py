"""A radar of what models cost and reach ("002" Fig. 5), with the raw values beside it, because a radar hides them."""

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from reidctl.report.figures import GRID, INK, PAPER, SERIES, save_figure

COSTS = ("Params", "FLOPs", "Memory")
"""Criteria of which less is better."""
UNITS = {"Params": "", "FLOPs": "per item", "Memory": "B per item", "Speed": "items/s", "mAP": ""}

_WIDTH = 7.6  # inches
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_DASHES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P")
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def normalise(raw: pd.DataFrame, *, costs: Collection[str] = COSTS) -> pd.DataFrame:
    """Return raw values as scores in [0, 100] where more is better: min-max over the models, costs inverted.

    score = 100 (value - worst) / (best - worst), per criterion.

    The best model of a criterion always gets 100 and the worst 0, however small the difference. Where all models are
    equal all get 100: nobody is behind. A criterion's scores depend on which models are compared.

    Args:
        raw: one row per model, one column per criterion; NaN where a value is missing, which stays NaN.
        costs: columns of which less is better.

    Raises:
        ValueError: fewer than two models, or an infinite value.
    """
    if len(raw) < 2:
        raise ValueError(f"min-max compares at least two models, got {len(raw)}")
    values = raw.astype(float)
    if np.isinf(values.to_numpy()).any():
        raise ValueError("an infinite value has no place on a scale from 0 to 100")
    signs = pd.Series({name: -1.0 if name in costs else 1.0 for name in values.columns})
    better = values * signs
    low, span = better.min(), better.max() - better.min()
    scores = 100 * (better - low) / span.where(span > 0)
    return scores.where((span > 0) | values.isna(), 100.0)


def radar(
    raw: pd.DataFrame,
    stem: Path,
    *,
    costs: Collection[str] = COSTS,
    units: Mapping[str, str] = UNITS,
    note: str = "",
) -> list[Path]:
    """Draw the scores of models on a radar with a table of the raw values beside it; return PNG, SVG and CSV.

    The CSV has one row per model and criterion: `model, criterion, unit, raw, score`. A criterion that some model
    lacks is in the table and the CSV, not on the radar.

    Args:
        raw: see `normalise`; the index names the models (at most eight), the columns the criteria.
        stem: where to write, without the ending.
        costs: columns of which less is better.
        units: by column; absent ones have none.
        note: how it was measured, set under the figure: machine, threads, batch, lengths.

    Raises:
        ValueError: see `normalise`; or fewer than three criteria that every model has.
        DataError: a file cannot be written.
    """
    scores = normalise(raw, costs=costs)
    complete = [name for name in raw.columns if not raw[name].isna().any()]
    if len(complete) < 3:
        raise ValueError(f"a radar needs three criteria that every model has, got {complete}")
    if len(raw) > len(SERIES):
        raise ValueError(f"a radar of more than {len(SERIES)} models cannot be read, got {len(raw)}")
    top, lines = 3.5, 0.75 + 0.27 * len(raw)
    height = top + lines
    figure = Figure(figsize=(_WIDTH, height))
    web = figure.add_axes((0.6 / _WIDTH, (lines + 0.4) / height, 2.7 / _WIDTH, 2.7 / height), projection="polar")
    assert isinstance(web, PolarAxes)
    _web(web, scores[complete], costs)
    _legend(figure, web, len(raw))
    words = "\n".join(textwrap.fill(line, 58) for line in _caveats(raw, complete, note))
    figure.text(4.15 / _WIDTH, (lines + 0.15) / height, words, size=8, color=INK, va="bottom", linespacing=1.4)
    side = figure.add_axes((0.15 / _WIDTH, 0.08 / height, (_WIDTH - 0.3) / _WIDTH, (lines - 0.12) / height))
    _raw_table(side, raw, costs, units)
    return save_figure(figure, stem, _long(raw, scores, units))


def _web(axes: PolarAxes, scores: pd.DataFrame, costs: Collection[str]) -> None:
    names = list(scores.columns)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    axes.set_facecolor("none")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    for number, (model, row) in enumerate(scores.iterrows()):
        closed, around = np.append(row.to_numpy(float), row.iloc[0]), np.append(angles, angles[0])
        colour = SERIES[number]
        dash, mark = _DASHES[number % len(_DASHES)], _MARKS[number % len(_MARKS)]
        # Not clipped: half of a marker at 0 or 100 would look like a value beyond the scale.
        axes.plot(around, closed, dash, color=colour, marker=mark, markersize=5, linewidth=1.7, label=str(model),
                  clip_on=False, zorder=3)  # fmt: skip
        axes.fill(around, closed, color=colour, alpha=0.08)
    axes.set_ylim(0, 100)
    axes.set_yticks([25, 50, 75, 100], ["", "50", "", "100"], size=7, color=INK, zorder=4)
    axes.set_rlabel_position(180 / len(names))
    for text in axes.get_yticklabels():
        text.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines["polar"].set_color(GRID)
    labels = [f"{name} ↓" if name in costs else str(name) for name in names]
    axes.set_xticks(angles, labels, size=8.5, color=INK, parse_math=False)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = np.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.tick_params(axis="x", pad=1)


def _legend(figure: Figure, axes: PolarAxes, entries: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    names = [textwrap.shorten(label, 44, placeholder="…") for label in labels]
    legend = figure.legend(handles, names, loc="upper left", bbox_to_anchor=(4.05 / _WIDTH, 0.97), frameon=False,
                           fontsize=8.5, labelcolor=INK, handlelength=3, borderaxespad=0, labelspacing=0.5)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _raw_table(axes: Axes, raw: pd.DataFrame, costs: Collection[str], units: Mapping[str, str]) -> None:
    """One row per model, one column per criterion."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(raw) + 2, 0)
    first = 0.28
    places = [first + (1 - first) * (number + 1) / len(raw.columns) for number in range(len(raw.columns))]
    style: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}
    axes.text(0, 1.1, "raw values", size=8.5, weight="bold", **style)
    for name, x in zip(raw.columns, places, strict=True):
        axes.text(x, 0.55, f"{name} {'↓' if name in costs else '↑'}", size=8.5, ha="right", **style)
        axes.text(x, 1.25, units.get(name, ""), size=7, ha="right", **style)
    axes.plot([0, 1], [1.75, 1.75], color=INK, linewidth=0.8)
    for row, (model, values) in enumerate(raw.iterrows()):
        y = row + 2.3
        axes.text(0, y, textwrap.shorten(str(model), 34, placeholder="…"), size=8.5, **style)
        for x, value in zip(places, values, strict=True):
            axes.text(x, y, _short(float(value)), size=8.5, ha="right", **style)
    axes.set_ylim(len(raw) + 1.9, 0)


def _short(value: float) -> str:
    """Three significant digits with a letter for the thousands; a dash for a missing value."""
    if np.isnan(value):
        return "–"
    for size, letter in _PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size)} {letter}"
    return _digits(value)


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    places = max(0, 2 - int(np.floor(np.log10(abs(float(f"{value:.2e}"))))))
    return f"{value:.{places}f}"


def _caveats(raw: pd.DataFrame, complete: Collection[str], note: str) -> list[str]:
    count = _NUMBERS.get(len(raw), str(len(raw)))
    equal = [str(name) for name in complete if raw[name].nunique() == 1]
    apart = f", unless all are equal ({', '.join(equal)}: all 100)" if equal else ""
    lines = [
        f"Scores: min-max over these {count} models, 100 the best, 0 the worst; ↓ less is better.",
        f"With {count} models min-max always yields a 0 and a 100 on every axis{apart}, however small the difference: "
        "read the raw values.",
    ]
    missing = [str(name) for name in raw.columns if name not in complete]
    if missing:
        lines.append(f"Not on the radar, because some model lacks it: {', '.join(missing)}.")
    return [*lines, note] if note else lines


def _long(raw: pd.DataFrame, scores: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame:
    rows = [
        {"model": str(model), "criterion": name, "unit": units.get(name, ""), "raw": float(value), "score": score}
        for (model, values), (_, scored) in zip(raw.iterrows(), scores.iterrows(), strict=True)
        for name, value, score in zip(raw.columns, values, scored, strict=True)
    ]
    return pd.DataFrame(rows)
