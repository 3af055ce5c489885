"""Curves of faithfulness: a metric over the removed share, the map and every control, one panel per explainer."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from reidctl.report.faithfulness import CONTROLS, measure
from reidctl.report.figures import INK, SERIES, dress, save_figure

_DASHES = ("--", "-.", ":")
_MARKS = ("s", "^", "D", "v", "P", "X", "*", "h")
_COLOURS = (*SERIES[1:], INK)
_ACROSS = 3


def curve_rows(frame: pd.DataFrame, metric: str, fill: str) -> pd.DataFrame:
    """Return the rows of a metric over the removed share: the map's and the controls' own means.

    Args:
        frame: rows of the table `interpretability` of one judge.
        metric: its name.
        fill: what was put in place of removed patches.
    """
    chosen = frame["metric"].eq(metric) & frame["fill"].eq(fill) & frame["removed"].notna()
    rows = frame[chosen & frame["kind"].isin(["value", "control"])]
    kept = ["explainer", "metric", "fill", "control", "removed", "value", "low", "high", "items"]
    return rows[kept].astype({"explainer": str, "control": str}).reset_index(drop=True)


def faithfulness_curves(rows: pd.DataFrame, stem: Path) -> list[Path]:
    """Draw a metric over the removed share with 95 % bands, one panel per explainer, all with the same axes.

    Args:
        rows: as `curve_rows` gives them, at least one.
        stem: where to write, without the ending.
    """
    explainers = list(dict.fromkeys(rows["explainer"]))
    shown = measure(str(rows["metric"].iloc[0]))
    across = min(len(explainers), _ACROSS)
    down = -(-len(explainers) // across)
    figure = Figure(figsize=(1.0 + 2.5 * across, 0.9 + 2.1 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(explainers) :]:
        axes.set_visible(False)
    for axes in panels[max(len(explainers) - across, 0) : len(explainers)]:
        axes.tick_params(labelbottom=True)  # nothing stands below
    for axes, explainer in zip(panels, explainers, strict=False):
        _panel(axes, rows[rows["explainer"] == explainer], shown.scale)
        axes.set_title(explainer, size=9, color=INK, loc="left", parse_math=False)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles=list(handles.values()),
        labels=list(handles),
        loc="outside upper left",
        ncols=min(len(handles), 5 if across > 1 else 2),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=2.6,
    )
    figure.supxlabel("removed share of the patches, percent", size=9, color=INK)
    figure.supylabel(shown.name, size=9, color=INK)
    return save_figure(figure, stem, rows)


def _panel(axes: Axes, rows: pd.DataFrame, scale: float) -> None:
    dress(axes)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol="", decimals=0))
    found = set(rows["control"])
    order = [name for name in CONTROLS if name in found] + sorted(found - {"", *CONTROLS})
    # The map is drawn last, above its controls.
    for name in [*order, *([""] if "" in found else [])]:
        some = rows[rows["control"] == name].sort_values("removed")
        colour, line, mark = _look(name, order)
        x, y = some["removed"].to_numpy(float), scale * some["value"].to_numpy(float)
        axes.fill_between(
            x, scale * some["low"], scale * some["high"], color=colour, alpha=0.08 if name else 0.2, linewidth=0
        )
        axes.plot(
            x, y, line, color=colour, marker=mark, markersize=3.4, linewidth=1.3 if name else 2.4, label=name or "map"
        )


def _look(name: str, order: list[str]) -> tuple[str, str, str]:
    """Colour, dashes and marker; those of a control do not depend on which others were measured."""
    if not name:
        return SERIES[0], "-", "o"
    place = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS) + order.index(name)
    return _COLOURS[place % len(_COLOURS)], _DASHES[place % len(_DASHES)], _MARKS[place % len(_MARKS)]
