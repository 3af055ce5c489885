"""Figures of `analyse` for models with two class tokens and pseudo-words: relevance maps, pairs in two dimensions."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reidctl.report.figures import GRID, INK, SERIES, save_figure

_PER_LINE = 4  # images beside each other, each with its two maps
_FAINT = "#9a9a9a"


@dataclass(frozen=True)
class Explained:
    """An image beside its two maps.

    Attributes:
        title: lines that stand above.
        pictures: the image, and under the map of each token, (H, W, 3) each.
    """

    title: str
    pictures: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


def map_sheet(items: Sequence[Explained], data: pd.DataFrame, stem: Path, *, colours: str, note: str) -> list[Path]:
    """Draw images beside the maps of their two class tokens, four to a line.

    Args:
        items: at least one.
        data: written beside, as CSV.
        stem: where to write, without the ending.
        colours: the map's colours, by matplotlib's name.
        note: written below.
    """
    columns = min(len(items), _PER_LINE)
    lines = -(-len(items) // columns)
    height, width = items[0].pictures[0].shape[:2]
    figure = Figure(figsize=(2.7 * columns + 0.7, (0.74 * height / width + 0.6) * lines + 0.3), layout="constrained")
    gaps = [1.0, 1.0, 1.0, 0.15] * columns
    panels = figure.subplots(lines, len(gaps), width_ratios=gaps, squeeze=False)
    for axes in panels.ravel():
        axes.set_axis_off()
    for number, item in enumerate(items):
        line, start = number // columns, 4 * (number % columns)
        _triple(panels[line, start : start + 3], item)
    scale = ScalarMappable(cmap=colours)
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, ax=list(panels.ravel()), fraction=0.02, pad=0.01, shrink=0.6, aspect=25)
    bar.set_label("relevance (1 = most of the image)", fontsize=7.5, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.supxlabel("\n".join(textwrap.wrap(note, 44 * columns)), size=7.5, color=INK, x=0.01, ha="left")
    return save_figure(figure, stem, data)


def _triple(panels: Any, item: Explained) -> None:
    """An image and its two maps; the title stands over all three."""
    title = [textwrap.shorten(line, 42, placeholder=" …") for line in item.title.splitlines()]
    for axes, picture, name in zip(panels, item.pictures, ("image", "t2i", "i2i"), strict=True):
        axes.imshow(picture, interpolation="nearest")
        above = title if name == "t2i" else [""] * len(title)
        axes.set_title("\n".join([*above, name]), size=7.5, color=INK, pad=2, parse_math=False)


def pair_map(points: pd.DataFrame, stem: Path, *, note: str) -> list[Path]:
    """Draw a t-SNE map of the pseudo-tokens of images and texts, those of a pair joined by a line.

    Args:
        points: columns modality (`image` or `text`, in the same order of pairs), image_id, person_id, x, y.
        stem: where to write, without the ending.
        note: written below.
    """
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    image, text = (points.loc[points["modality"] == side, ["x", "y"]].to_numpy(float) for side in ("image", "text"))
    joined = np.stack([image, text], axis=1)
    axes.add_collection(LineCollection(list(joined), colors=_FAINT, linewidths=0.5, alpha=0.6, zorder=1))
    keys = []
    for where, name, mark, colour in ((image, "$P^v$ of an image", "o", 0), (text, "$P^t$ of its caption", "^", 1)):
        style: Any = {"color": SERIES[colour], "marker": mark}
        axes.scatter(where[:, 0], where[:, 1], s=11, linewidths=0, alpha=0.85, zorder=2, **style)
        keys.append(Line2D([], [], linestyle="", markersize=5, label=name, **style))
    keys.append(Line2D([], [], color=_FAINT, linewidth=0.8, label="a pair"))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.set_xlabel("t-SNE 1", size=8, color=INK)
    axes.set_ylabel("t-SNE 2", size=8, color=INK)
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, labelcolor=INK
    )
    figure.supxlabel("\n".join(textwrap.wrap(note, 92)), size=7.5, color=INK, x=0.02, ha="left")
    return save_figure(figure, stem, points)
