"""The report's figures; each is written as PNG and SVG with its data beside it as CSV.

Colours are those of Okabe and Ito, told apart with every common colour-vision deficiency; the report's page replaces
them by its own variables so that the same figure reads in light and dark.
"""

import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reidctl import naming, tables

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
INK, GRID, PAPER = "#222222", "#d9d9d9", "#fefefe"
_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

METRIC_NAMES = {
    "rank1": "rank-1",
    "rank5": "rank-5",
    "rank10": "rank-10",
    "rank20": "rank-20",
    "mAP": "mAP",
    "mINP": "mINP",
}
_CURVE_NAMES = {**METRIC_NAMES, "i2i.rank1": "rank-1, image to image", "i2i.mAP": "mAP, image to image"}
_REFERENCES = ("oracle", "oracle-caption", "histogram", "shuffled", "chance", "single-shot-chance")


def named_rows(frame: pd.DataFrame) -> list[Any]:
    """Return a frame's rows with its columns as attributes."""
    return list(frame.itertuples())


def conditions(found: Sequence[str]) -> list[str]:
    """Return condition names in the order of display: the model, its other settings, then the points of reference."""
    other = sorted(set(found) - {"standard", *_REFERENCES})
    return [name for name in ("standard", *other, *_REFERENCES) if name in set(found)]


def bare(axes: Axes) -> None:
    """No ticks, because the numbers of a map mean nothing, and a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(GRID)


def save_figure(figure: Figure, stem: Path, data: pd.DataFrame) -> list[Path]:
    """Write `<stem>.png`, `<stem>.svg` and `<stem>.csv`; return the three paths.

    Equal data give equal bytes: neither dates nor random ids enter the files.

    Raises:
        DataError: a file cannot be written.
    """
    png, svg, csv = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg", "csv"))
    # Text stays text in the SVG: it can be searched, read aloud, and takes the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "reidctl"}):
        drawn = BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        tables.write_bytes(svg, drawn.getvalue())
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=160, metadata={"Software": None}, facecolor=PAPER)
        tables.write_bytes(png, drawn.getvalue())
    text = StringIO()
    data.to_csv(text, index=False, lineterminator="\n")
    tables.write_text(csv, text.getvalue())
    return [png, svg, csv]


def metric_bars(metrics: pd.DataFrame, stem: Path) -> list[Path]:
    """Draw each metric of one (direction, dataset, split) as bars with 95 % intervals, the points of reference beside.

    Args:
        metrics: rows of the `metrics` table of one direction, dataset and split.
        stem: where to write, without the ending.
    """
    names = [name for name in METRIC_NAMES if name in set(metrics["metric"])]
    shown = conditions(list(metrics["condition"]))
    figure, axes = _axes(7.6, 3.4)
    style: Any = {"textcoords": "offset points", "ha": "center", "size": 7, "color": INK}
    width = 0.84 / max(len(shown), 1)
    at = {(row.condition, row.metric): row for row in named_rows(metrics)}
    for number, condition in enumerate(shown):
        rows = [at.get((condition, name)) for name in names]
        place = np.arange(len(names)) + (number - (len(shown) - 1) / 2) * width
        value = np.asarray([getattr(row, "value", np.nan) for row in rows], float)
        spread = np.asarray([_spread(row) for row in rows], float).reshape(-1, 2).T
        axes.bar(place, value, width * 0.92, color=_bar_colour(condition, number), label=naming.label(condition))
        axes.errorbar(place, value, spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for x, y, above in zip(place, value, spread[1], strict=True):
            if y == y:
                axes.annotate(f"{100 * y:.0f}", (x, y + above), (0, 2), **style)
    axes.set_xticks(range(len(names)), [METRIC_NAMES[name] for name in names])
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_ylabel("percent of queries (mean), 95 % interval")
    _legend(axes, len(shown))
    return save_figure(figure, stem, metrics)


def _bar_colour(condition: str, number: int) -> str:
    fixed = {"standard": 0, "oracle": 2, "oracle-caption": 3, "histogram": 4, "chance": 7, "shuffled": 6}
    fixed |= {"single-shot": 0, "single-shot-chance": 7}
    return SERIES[fixed.get(condition, 1 if number % 2 else 5)]


def _spread(row: Any) -> tuple[float, float]:
    if row is None or pd.isna(row.low) or pd.isna(row.high):
        return 0.0, 0.0
    return max(row.value - row.low, 0.0), max(row.high - row.value, 0.0)


def training_curves(history: pd.DataFrame, stem: Path) -> list[Path]:
    """Draw every loss term over the epochs (mean of each epoch's reports), on a logarithmic axis if it helps.

    Args:
        history: rows of the `history` table.
        stem: where to write, without the ending.
    """
    losses = history[(history["split"] == "train") & history["name"].str.startswith("loss/")]
    means = losses.groupby(["name", "epoch"], observed=True)["value"].mean().reset_index()
    figure, axes = _axes(7.6, 3.2)
    names = sorted(set(means["name"]))
    for number, name in enumerate(names):
        rows = means[means["name"] == name].sort_values("epoch")
        _line(axes, rows["epoch"] + 1, rows["value"], str(name).removeprefix("loss/"), number)
    if len(means) and (means["value"] > 0).all() and means["value"].max() > 20 * means["value"].min():
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss, unweighted (mean of the epoch)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, len(names))
    return save_figure(figure, stem, means)


def validation_curve(history: pd.DataFrame, stem: Path, *, best_epoch: int | None = None) -> list[Path]:
    """Draw the metrics on the selection split over the epochs; the chosen epoch is marked.

    Args:
        history: rows of the `history` table; all rows that are not of the train split are drawn.
        stem: where to write, without the ending.
        best_epoch: the chosen epoch, from 1.
    """
    rows = history[(history["split"] != "train") & (history["value"].between(0, 1))]
    figure, axes = _axes(7.6, 3.0)
    groups = list(rows.groupby(["split", "name"], observed=True))
    for number, ((split, name), group) in enumerate(groups):
        group = group.sort_values("epoch")
        label = f"{_CURVE_NAMES.get(str(name), str(name))} ({split})"
        _line(axes, group["epoch"] + 1, group["value"], label, number)
    if best_epoch is not None:
        axes.axvline(best_epoch, color=INK, linewidth=1, linestyle=":", label="chosen epoch")
    axes.set_xlabel("epoch")
    axes.set_ylabel("percent")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="", decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, len(groups) + 1)
    return save_figure(figure, stem, rows[["split", "name", "epoch", "value"]])


def gate_histograms(gates: Mapping[str, npt.NDArray[Any]], stem: Path) -> list[Path]:
    """Draw the distribution of each gate over samples, with its mean; the CSV holds the value of every sample.

    Args:
        gates: values in [0, 1] by gate name, each of shape (S,).
        stem: where to write, without the ending.
    """
    columns = min(max(len(gates), 1), 4)
    lines = -(-max(len(gates), 1) // columns)
    figure = Figure(figsize=(7.6, 0.5 + 2.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    edges = [step / 40 for step in range(41)]
    for axes in panels:
        dress(axes)
        axes.set_visible(False)
    for number, (axes, (name, values)) in enumerate(zip(panels, gates.items(), strict=False)):
        axes.set_visible(True)
        colour = SERIES[number % len(SERIES)]
        axes.hist(values, edges, weights=np.full(len(values), 1 / max(len(values), 1)), color=colour)
        axes.axvline(float(np.mean(values)), color=INK, linewidth=1.2, linestyle="--")
        title = f"{name}\nmean {np.mean(values):.2f}, std {np.std(values):.2f}"
        axes.set_title(title, size=8.5, color=INK, loc="left", parse_math=False)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    figure.supxlabel("activation, mean over the gate's units (dashed: mean over samples)", size=9, color=INK)
    figure.supylabel("percent of samples", size=9, color=INK)
    return save_figure(figure, stem, pd.DataFrame({name: np.asarray(values, float) for name, values in gates.items()}))


def score_bars(scores: Mapping[str, tuple[float, float, float]], stem: Path, *, label: str) -> list[Path]:
    """Draw named fractions as horizontal bars with intervals.

    Args:
        scores: (value, low, high) in [0, 1] by name, drawn from top to bottom.
        stem: where to write, without the ending.
        label: of the horizontal axis.
    """
    figure, axes = _axes(7.6, 0.9 + 0.3 * len(scores))
    place = np.arange(len(scores))[::-1]
    table = np.asarray(list(scores.values()), float).reshape(-1, 3)
    spread = np.maximum([table[:, 0] - table[:, 1], table[:, 2] - table[:, 0]], 0)
    colours = [SERIES[7] if "." in name else SERIES[0] for name in scores]
    axes.barh(place, table[:, 0], 0.72, color=colours)
    axes.errorbar(table[:, 0], place, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.set_yticks(place, list(scores))
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    data = pd.DataFrame({"name": list(scores), "value": table[:, 0], "low": table[:, 1], "high": table[:, 2]})
    return save_figure(figure, stem, data)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """Give axes the look that all figures share."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8.5)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    for spine in axes.spines.values():
        spine.set_color(INK)


def _line(axes: Axes, x: Any, y: Any, label: str, number: int) -> None:
    """One series, told apart by colour, dashes and markers."""
    colour, dashes = SERIES[number % len(SERIES)], _LINES[number % len(_LINES)]
    every = max(1, len(x) // 12)
    mark = _MARKS[number % len(_MARKS)]
    axes.plot(x, y, dashes, color=colour, marker=mark, markevery=every, markersize=4, linewidth=1.6, label=label)


def _legend(axes: Axes, entries: int) -> None:
    """A legend above the axes, where it hides no data."""
    if entries:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=entries if entries <= 4 else -(-entries // 2),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            borderaxespad=0.1,
            handlelength=2.2,
        )


def inline_svg(svg: str, *, prefix: str) -> str:
    """Return a figure's SVG fit to stand inside a page: no outside names, ids of its own, the page's colours and font.

    Args:
        svg: the text of a file that `save_figure` wrote.
        prefix: put before every id, so that several figures fit into one page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    for number, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--s{number})")
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--line)").replace(PAPER, "none")
    # A style element inside an inline SVG would apply to the whole page; the font is the page's.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: [^;\"]*;?", "", svg)
