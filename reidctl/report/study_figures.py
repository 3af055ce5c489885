"""The figure of a study: bars of its conditions, or a curve, with every seed as a dot."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reidctl.report.figures import GRID, INK, SERIES, dress, save_figure

_TITLE, _LABEL = 26, 32  # characters that fit into a line of a panel's title and of a condition's name


@dataclass(frozen=True)
class Panel:
    """One measure of every condition.

    Attributes:
        title: of the panel, with its unit.
        values: one list per condition, one value per seed; NaN where nothing was measured.
    """

    title: str
    values: Sequence[Sequence[float]]


def study_bars(conditions: Sequence[str], panels: Sequence[Panel], stem: Path) -> list[Path]:
    """Draw each measure as horizontal bars of the mean over seeds, with every seed as a dot.

    Bars start at zero, so that small differences look small.

    Args:
        conditions: their labels, drawn from top to bottom.
        panels: one per measure, side by side.
        stem: where to write, without the ending.
    """
    figure = Figure(figsize=(2.6 + 2.2 * len(panels), 1.2 + 0.38 * len(conditions)), layout="constrained")
    axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    place = np.arange(len(conditions))[::-1]
    for number, (axes, panel) in enumerate(zip(axes_of, panels, strict=True)):
        _dress_sideways(axes)
        means = [_mean(values) for values in panel.values]
        axes.barh(place, means, 0.66, color=SERIES[number % len(SERIES)], alpha=0.55)
        for y, values in zip(place, panel.values, strict=True):
            axes.plot(values, np.full(len(values), y), "o", color=INK, markersize=3, alpha=0.8)
        axes.set_title(_wrapped(panel.title, _TITLE), size=9, color=INK, loc="left", parse_math=False)
        axes.axvline(0, color=INK, linewidth=0.8)
    axes_of[0].set_yticks(place, [_wrapped(name, _LABEL) for name in conditions], size=8, parse_math=False)
    figure.supxlabel("bars: mean over seeds; dots: seeds", size=8, color=INK)
    return save_figure(figure, stem, _data(conditions, panels))


def study_curve(
    conditions: Sequence[str], x: Sequence[float], panels: Sequence[Panel], stem: Path, *, axis: str
) -> list[Path]:
    """Draw each measure over `x` as the mean over seeds, with every seed as a dot.

    Args:
        conditions: their labels.
        x: place of each condition.
        panels: one per measure, side by side.
        stem: where to write, without the ending.
        axis: the name of `x`.
    """
    figure = Figure(figsize=(1.2 + 3.2 * len(panels), 3.0), layout="constrained")
    axes_of = figure.subplots(1, len(panels), squeeze=False).ravel()
    order = np.argsort(x, kind="stable")
    for number, (axes, panel) in enumerate(zip(axes_of, panels, strict=True)):
        dress(axes)
        colour = SERIES[number % len(SERIES)]
        axes.plot([x[i] for i in order], [_mean(panel.values[i]) for i in order], "-", color=colour, linewidth=1.8)
        for i in order:
            axes.plot(np.full(len(panel.values[i]), x[i]), panel.values[i], "o", color=colour, markersize=3.5)
        axes.set_title(_wrapped(panel.title, _TITLE), size=9, color=INK, loc="left", parse_math=False)
        top = max([value for values in panel.values for value in values if value == value], default=1.0)
        axes.set_ylim(0, 1.06 * top)
        axes.set_xlabel(axis)
        axes.xaxis.label.set_fontsize(9)
    return save_figure(figure, stem, _data(conditions, panels).assign(x=_places(x, panels)))


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _places(x: Sequence[float], panels: Sequence[Panel]) -> list[float]:
    return [at for panel in panels for at, values in zip(x, panel.values, strict=True) for _ in values]


def _data(conditions: Sequence[str], panels: Sequence[Panel]) -> pd.DataFrame:
    rows: list[Mapping[str, object]] = [
        {"measure": panel.title, "condition": name, "seed": seed, "value": value}
        for panel in panels
        for name, values in zip(conditions, panel.values, strict=True)
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["measure", "condition", "seed", "value"])


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if value == value]
    return float(np.mean(kept)) if kept else float("nan")


def _dress_sideways(axes: Axes) -> None:
    dress(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
