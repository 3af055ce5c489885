"""Figures of `analyse`: numbers of several features side by side, and maps of features in two dimensions."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from reidctl.report.figures import GRID, INK, SERIES, bare, dress, named_rows, save_figure

_FAINT = "#9a9a9a"
_MOST = 14  # labels with a colour of their own; the others share one


def dot_panels(
    rows: pd.DataFrame, stem: Path, *, label: str, control: str, reference: float | None = None
) -> list[Path]:
    """Draw fractions as dots with intervals, one panel for each feature, one line for each target.

    Args:
        rows: columns feature, target, value, low, high, control; features and targets are drawn in the order they come.
        stem: where to write, without the ending.
        label: of the horizontal axis.
        control: what the grey marks are; nothing is said where no row has a control.
        reference: draw a dotted line here.
    """
    features, targets = list(dict.fromkeys(rows["feature"])), list(dict.fromkeys(rows["target"]))
    figure = Figure(figsize=(7.6, 1.35 + 0.24 * len(targets)), layout="constrained")
    panels = figure.subplots(1, len(features), sharex=True, sharey=True, squeeze=False)[0]
    place = {target: len(targets) - 1 - number for number, target in enumerate(targets)}
    for axes, feature in zip(panels, features, strict=True):
        dress(axes)
        axes.set_title(feature.replace("_", " "), size=8.5, color=INK, loc="left", parse_math=False)
        for row in named_rows(rows[rows["feature"] == feature]):
            y = place[row.target]
            axes.plot([row.low, row.high], [y, y], color=SERIES[0], linewidth=1.6, solid_capstyle="butt")
            axes.plot(row.control, y, "|", color=_FAINT, markersize=8, markeredgewidth=2)
            axes.plot(row.value, y, "o", color=SERIES[0], markersize=4.5)
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=1, linestyle=":")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(wspace=0.06)  # type: ignore[call-arg]
    panels[0].set_yticks(range(len(targets)), [_shown(target) for target in reversed(targets)])
    panels[0].set_ylim(-0.7, len(targets) - 0.3)
    panels[0].set_xlim(-0.03, 1.03)
    panels[0].set_xticks([0, 0.5, 1])
    panels[0].xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    marks = f" (grey: {control})" if rows["control"].notna().any() else ""
    figure.supxlabel(f"{label}{marks}", size=9, color=INK)
    return save_figure(figure, stem, rows)


def tsne_map(
    points: pd.DataFrame, stem: Path, *, highlight: tuple[str, ...], coloured_by: str, note: str
) -> list[Path]:
    """Draw t-SNE maps: the streams (identity as dots, clothing as crosses), and the retrieved feature by a label.

    Args:
        points: columns panel (`streams` or `embedding`), feature, image_id, person_id, label, x, y.
        stem: where to write, without the ending.
        highlight: people whose points in the map of the streams are coloured.
        coloured_by: what `label` is.
        note: written below.
    """
    panels = [name for name in ("streams", "embedding") if name in set(points["panel"])]
    figure = Figure(figsize=(3.8 * len(panels) + 0.4, 4.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = points[points["panel"] == name]
        bare(axes)
        axes.set_xlabel("t-SNE 1", size=8, color=INK)
        axes.set_ylabel("t-SNE 2", size=8, color=INK)
        if name == "streams":
            _streams(axes, rows, highlight)
        else:
            _labelled(axes, rows, coloured_by)
    width = 62 * len(panels)
    figure.supxlabel("\n".join(textwrap.wrap(note, width)), size=7.5, color=INK, x=0.02, ha="left")
    return save_figure(figure, stem, points)


@dataclass(frozen=True)
class Side:
    """One of the models that are shown side by side.

    Attributes:
        panel: its value in the column `panel`.
        title: what people read above.
        feature: which of its features.
        below: a number that belongs to it.
    """

    panel: str
    title: str
    feature: str
    below: str


def tsne_sides(
    points: pd.DataFrame, sides: Sequence[Side], stem: Path, *, highlight: tuple[str, ...], note: str
) -> list[Path]:
    """Draw t-SNE maps of the same images by several models side by side, some people in the same colours.

    Args:
        points: columns panel, model, feature, image_id, person_id, x, y.
        sides: from left to right.
        stem: where to write, without the ending.
        highlight: people with a colour of their own; the others are grey.
        note: written below.
    """
    figure = Figure(figsize=(3.8 * len(sides) + 0.4, 5.2), layout="constrained")
    colours = SERIES[:-1]  # the last one is grey, as everybody else is
    shown = highlight[: 2 * len(colours)]
    style = {name: (colours[n % len(colours)], "os"[n // len(colours)]) for n, name in enumerate(shown)}
    for axes, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        rows = points[points["panel"] == side.panel]
        bare(axes)
        axes.set_aspect("equal", adjustable="datalim")
        rest = rows[~rows["person_id"].isin(shown)]
        axes.scatter(rest["x"], rest["y"], s=9, color=_FAINT, alpha=0.5, linewidths=0)
        for person, (colour, mark) in style.items():
            some = rows[rows["person_id"] == person]
            axes.scatter(some["x"], some["y"], s=34, color=colour, marker=mark, edgecolors="white", linewidths=0.5)
        axes.set_title(f"{side.title}\nfeature {side.feature}", size=9, color=INK, loc="left", parse_math=False)
        axes.set_xlabel(side.below, size=8.5, color=INK)
    keys = [
        Line2D([], [], color=colour, marker=mark, linestyle="", markersize=6, label=person)
        for person, (colour, mark) in style.items()
    ]
    if len(set(points["person_id"])) > len(shown):
        keys.append(Line2D([], [], color=_FAINT, marker="o", linestyle="", markersize=4, label="everybody else"))
    figure.legend(handles=keys, loc="outside upper left", ncols=5, frameon=False, fontsize=7.5, labelcolor=INK)
    figure.supxlabel("\n".join(textwrap.wrap(note, 62 * len(sides))), size=7.5, color=INK, x=0.02, ha="left")
    return save_figure(figure, stem, points)


def _streams(axes: Axes, rows: pd.DataFrame, highlight: tuple[str, ...]) -> None:
    marks = {"identity": ("o", 9.0), "clothing": ("x", 13.0)}
    colours = {person: SERIES[number % len(SERIES)] for number, person in enumerate(highlight)}
    for person in (None, *highlight):
        for feature, (mark, size) in marks.items():
            chosen = ~rows["person_id"].isin(highlight) if person is None else rows["person_id"] == person
            some = rows[chosen & (rows["feature"] == feature)]
            style: Any = {"color": _FAINT, "alpha": 0.55} if person is None else {"color": colours[person], "zorder": 3}
            scale = 1.0 if person is None else 3.2
            axes.scatter(some["x"], some["y"], s=size * scale, marker=mark, linewidths=0.8 * scale**0.5, **style)
    keys = [
        Line2D([], [], color=INK, marker=mark, linestyle="", markersize=5, label=name)
        for name, (mark, _) in marks.items()
    ]
    keys += [Line2D([], [], color=colours[p], marker="s", linestyle="", markersize=6, label=p) for p in highlight]
    keys += [Line2D([], [], color=_FAINT, marker="s", linestyle="", markersize=6, label="everybody else")]
    axes.set_title("identity and clothing features", size=9, color=INK, loc="left")
    _key(axes, keys, 3)


def _labelled(axes: Axes, rows: pd.DataFrame, coloured_by: str) -> None:
    counts = rows["label"].value_counts()
    names = sorted(counts.index[: _MOST if len(counts) > _MOST else len(counts)])
    # Colour words are drawn as what they say.
    literal = all(is_color_like(name) for name in names)
    rest = rows[~rows["label"].isin(names)]
    axes.scatter(rest["x"], rest["y"], s=9, color=_FAINT, alpha=0.5)
    keys = []
    for number, name in enumerate(names):
        some = rows[rows["label"] == name]
        style: Any = {
            "color": name if literal else SERIES[number % len(SERIES)],
            "marker": "o" if literal else ("o", "s")[number // len(SERIES) % 2],
            "edgecolors": INK if literal else "none",
            "linewidths": 0.3,
        }
        axes.scatter(some["x"], some["y"], s=16, **style)
        keys.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=style["marker"],
                color=style["color"],
                markeredgecolor=INK if literal else style["color"],
                markeredgewidth=0.4,
                markersize=5.5,
                label=name,
            )
        )
    if len(rest):
        keys.append(Line2D([], [], color=_FAINT, marker="o", linestyle="", markersize=5, label="others"))
    feature = rows["feature"].iloc[0] if len(rows) else "embedding"
    axes.set_title(f"retrieved feature ({feature}), by {_shown(coloured_by)}", size=9, color=INK, loc="left")
    _key(axes, keys, 4)


def _key(axes: Axes, keys: list[Line2D], columns: int) -> None:
    axes.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0, -0.08),
        ncols=columns,
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        borderaxespad=0.2,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def _shown(name: str) -> str:
    return name.replace("_", " ")


def order_targets(rows: pd.DataFrame, last: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return rows sorted so that the targets in `last` come after the others, which keep their order."""
    rank = np.array([last.index(target) if target in last else -1 for target in rows["target"]])
    return rows.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True)
