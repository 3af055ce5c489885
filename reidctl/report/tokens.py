"""Figures of `analyse` of single images: maps of relevance beside the picture, pairs in two dimensions."""

import textwrap
from collections.abc import Mapping, Sequence
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

from reidctl.report.figures import INK, SERIES, bare, save_figure

_WIDE, _STEP, _GAP, _TITLE = 0.85, 0.9, 0.25, 0.55  # inches: a picture, from one to the next, after an item, above it
_WIDEST = 12.0  # inches that items beside each other may take
_FAINT = "#9a9a9a"


@dataclass(frozen=True)
class Explained:
    """An image beside its maps.

    Attributes:
        title: lines that stand above.
        pictures: the image, and under each map, by what stands above them, (H, W, 3) each.
    """

    title: str
    pictures: Mapping[str, npt.NDArray[np.uint8]]


def map_sheet(items: Sequence[Explained], data: pd.DataFrame, stem: Path, *, colours: str, note: str) -> list[Path]:
    """Draw images beside their maps, several to a line.

    Args:
        items: at least one, all with the same names of pictures.
        data: written beside, as CSV.
        stem: where to write, without the ending.
        colours: the map's colours, by matplotlib's name.
        note: written below.
    """
    first = next(iter(items[0].pictures.values()))
    across = len(items[0].pictures) * _STEP + _GAP
    # An even number of lines is filled by the eight images that are usual.
    columns = min(len(items), 4 if 4 * across <= _WIDEST else 2)
    lines = -(-len(items) // columns)
    tall = _WIDE * first.shape[0] / first.shape[1]
    width = columns * across + 0.75
    said = textwrap.wrap(note, int(16.5 * width))
    height = lines * (tall + _TITLE) + 0.22 + 0.13 * len(said)
    figure = Figure(figsize=(width, height))

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        """Axes at inches from the upper left corner; a layout engine's last digits differ from run to run."""
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    for number, item in enumerate(items):
        x, y = across * (number % columns) + 0.1, (tall + _TITLE) * (number // columns) + _TITLE
        _row([place(x + step * _STEP, y, _WIDE, tall) for step in range(len(item.pictures))], item)
    scale = ScalarMappable(cmap=colours)
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, cax=place(width - 0.7, _TITLE, 0.1, min(height - 1.1, 2.4)))
    bar.set_label("relevance (1 = most of the image)", fontsize=7.5, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.text(0.1 / width, 0.1 / height, "\n".join(said), size=7.5, color=INK, linespacing=1.15)
    return save_figure(figure, stem, data)


def _row(panels: Sequence[Axes], item: Explained) -> None:
    """An image and its maps; the title stands over all of them."""
    title = [textwrap.shorten(line, 14 * len(panels), placeholder=" …") for line in item.title.splitlines()]
    for axes, (name, picture) in zip(panels, item.pictures.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(name, size=7.5, color=INK, pad=2, parse_math=False)
    style: Any = {"size": 7.5, "color": INK, "ha": "left", "va": "bottom", "parse_math": False}
    panels[0].annotate("\n".join(title), (0, 1), (0, 13), "axes fraction", "offset points", **style)


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
    bare(axes)
    axes.set_xlabel("t-SNE 1", size=8, color=INK)
    axes.set_ylabel("t-SNE 2", size=8, color=INK)
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, labelcolor=INK
    )
    figure.supxlabel("\n".join(textwrap.wrap(note, 92)), size=7.5, color=INK, x=0.02, ha="left")
    return save_figure(figure, stem, points)
