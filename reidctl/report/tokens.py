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
_WIDE, _TRIPLE, _TITLE = 0.85, 2.95, 0.55  # inches: a picture, a picture with its maps and a gap, the room above
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
    tall = _WIDE * items[0].pictures[0].shape[0] / items[0].pictures[0].shape[1]
    width, height = columns * _TRIPLE + 0.75, lines * (tall + _TITLE) + 0.35
    figure = Figure(figsize=(width, height))

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        """Axes at inches from the upper left corner; a layout engine's last digits differ from run to run."""
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    for number, item in enumerate(items):
        x, y = _TRIPLE * (number % columns) + 0.1, (tall + _TITLE) * (number // columns) + _TITLE
        _triple([place(x + step * (_WIDE + 0.05), y, _WIDE, tall) for step in range(3)], item)
    scale = ScalarMappable(cmap=colours)
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, cax=place(width - 0.7, _TITLE, 0.1, min(height - 1.1, 2.4)))
    bar.set_label("relevance (1 = most of the image)", fontsize=7.5, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.text(0.1 / width, 0.1 / height, note, size=7.5, color=INK)
    return save_figure(figure, stem, data)


def _triple(panels: Sequence[Axes], item: Explained) -> None:
    """An image and its two maps; the title stands over all three."""
    title = [textwrap.shorten(line, 42, placeholder=" …") for line in item.title.splitlines()]
    for axes, picture, name in zip(panels, item.pictures, ("image", "t2i", "i2i"), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        above = title if name == "t2i" else []
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
