"""What the page says of a summary of explanations: which map tells more than which control, and which claims hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reidctl.report.figures import named_rows
from reidctl.report.grids import NOTHING, Entry, Grid, Line, known, measured, number, spread

HEADLINE = 0.2
"""The removed share that tables show, or the measured one next to it; the curves show all."""
CONTROLS = ("random", "block", "centre", "least", "phrase", "query", "shifted", "pooled")
FILLS = ("mean", "zero", "blur", "noise", "drop", "swap")
DRAWN = ("similarity_drop", "rank1_drop", "mAP_drop")
"""Metrics that are drawn over the removed share."""
ON_PARTS = ("pointing", "mass", "iou")
"""Metrics that need masks of parts."""
ON_MASKING = ("similarity_drop", "rank_shift", "rank1_drop", "mAP_drop")
"""Metrics of what happens when a share of the patches goes."""
ON_ORDER = ("deletion", "insertion", "specificity")
"""Metrics of the order of all patches, and of one phrase against the others."""


@dataclass(frozen=True)
class Measure:
    """How a metric is shown.

    Attributes:
        name: heading.
        text: what it is; empty for one that the page does not know.
        better: 1 if a good map has more of it, -1 if less, 0 if neither.
        scale: 100 for percent.
        digits: after the point.
    """

    name: str
    text: str = ""
    better: int = 0
    scale: float = 1.0
    digits: int = 3


MEASURES = {
    "pointing": Measure("pointing, %", "the map's highest place lies on the part", 1, 100, 1),
    "mass": Measure("mass on part, %", "share of the map that lies on the part", 1, 100, 1),
    "iou": Measure("IoU, %", "overlap of the part with equally many highest places", 1, 100, 1),
    "similarity_drop": Measure("similarity drop", "what the masking takes from query and image", 1),
    "rank_shift": Measure("rank shift", "places that the image falls by", 1, 1, 1),
    "rank1_drop": Measure("rank-1 drop, points", "queries that lose the first place", 1, 100, 1),
    "mAP_drop": Measure("mAP drop, points", "loss of average precision", 1, 100, 1),
    "deletion": Measure("deletion", "area under the similarity while the map's best places go; lower is better", -1),
    "insertion": Measure("insertion", "the same while they come back; higher is better", 1),
    "specificity": Measure("specificity", "how much more a phrase loses by its own region than the others do", 1),
    "alignment": Measure("alignment", "cosine of phrase and highlighted crop, by an independent encoder", 1),
    "entropy": Measure("entropy", "of the map, 1 = spread evenly; neither is better"),
    "top10_mass": Measure("mass in top 10 %, %", "how concentrated the map is; neither is better", 0, 100, 1),
    "spread": Measure("spread", "spatial variance of the map; neither is better"),
}
_WORDED = ("sanity.weights", "sanity.phrases", "stability", "binding.swap", "binding.random")
"""Metrics that are told in sentences."""


def measure(metric: str) -> Measure:
    """Return how a metric is shown; an unknown one under its own name."""
    return MEASURES.get(metric, Measure(metric))


def fills(frame: pd.DataFrame) -> list[str]:
    """Return the names of what was put in place of removed patches: the usual ones in their order, then others."""
    found = {str(name) for name in frame["fill"]} - {""}
    return [name for name in FILLS if name in found] + sorted(found - set(FILLS))


def in_order(frame: pd.DataFrame, explainers: Sequence[str]) -> pd.DataFrame:
    """Return the rows sorted so that explainers come in a given order, others after them.

    Args:
        frame: rows of the table `interpretability`.
        explainers: names, the one that matters most first.
    """
    rank = {name: place for place, name in enumerate(explainers)}
    place = frame["explainer"].astype(str).map(lambda name: rank.get(name, len(rank)))
    return frame.iloc[np.argsort(place.to_numpy(), kind="stable")]


def plain_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of metrics for which nothing is removed, by whatever judge, that are shown in tables."""
    return frame[(frame["fill"] == "") & ~frame["metric"].isin(_WORDED)]


def at_headline(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without a removed share, and of the others those next to `HEADLINE`, the smaller of two."""
    shares = sorted({round(float(share), 6) for share in frame["removed"].dropna()})
    if not shares:
        return frame
    # Rounded: shares are float32, and equal distances would differ in the last digits.
    chosen = min(shares, key=lambda share: (round(abs(share - HEADLINE), 6), share))
    return frame[frame["removed"].isna() | ((frame["removed"] - chosen).abs() < 1e-5)]


def verdict(low: float | None, high: float | None, better: int, other: str) -> str:
    """Return what an interval of (map - control) says, in words."""
    if low is None or high is None or not (known(low) and known(high)):
        return ""
    if low <= 0 <= high:
        return f"not told apart from {other}"
    if not better:
        return f"differs from {other}"
    return f"{'better' if (low > 0) == (better > 0) else 'worse'} than {other}"


class Summary:
    """The rows of one judge and one fill at the headline share, by explainer, metric, kind and control.

    Args:
        frame: rows of the table `interpretability`.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._at = {(str(r.explainer), str(r.metric), str(r.kind), str(r.control)): r for r in named_rows(frame)}
        self.explainers = list(dict.fromkeys(key[0] for key in self._at if key[0]))
        found = dict.fromkeys(key[1] for key in self._at if key[0] and key[1] not in _WORDED)
        order = list(MEASURES)
        self.metrics = sorted(found, key=lambda name: order.index(name) if name in order else len(order))

    def row(self, explainer: str, metric: str, kind: str = "value", control: str = "") -> Any:
        """Return a row; None if it was not measured."""
        return self._at.get((explainer, metric, kind, control))

    def controls(self, metric: str) -> list[str]:
        """Return the controls that a metric was compared with."""
        found = {key[3] for key in self._at if key[1] == metric and key[2] == "difference"}
        return [name for name in CONTROLS if name in found] + sorted(found - set(CONTROLS))

    def value(self, explainer: str, metric: str, *, against: str | None = None) -> Entry:
        """Return the cell of a metric, with its difference to a control and what that means."""
        row, shown = self.row(explainer, metric), measure(metric)
        if row is None:
            return NOTHING
        after = [] if against is None else self._difference(explainer, metric, against)
        return measured((row.value, row.low, row.high), scale=shown.scale, digits=shown.digits, after=after)

    def _difference(self, explainer: str, metric: str, control: str) -> list[str]:
        row, shown = self.row(explainer, metric, "difference", control), measure(metric)
        if row is None:
            return []
        size = number(row.value, scale=shown.scale, digits=shown.digits, signed=True)
        bounds = spread(row.low, row.high, scale=shown.scale, digits=shown.digits, signed=True)
        return [f"{size} ({bounds})" if bounds else size, verdict(row.low, row.high, shown.better, control)]


def metric_grids(frame: pd.DataFrame, *, caption: str, user_supplied: bool = False) -> list[Grid]:
    """Return tables of explainers x metrics, each beside its first control, a few metrics in each.

    Args:
        frame: rows of one judge, one fill and the headline share.
        caption: of the tables.
        user_supplied: whether the masks of parts came from the user.
    """
    table = Summary(frame)
    rest = tuple(name for name in table.metrics if name not in (*ON_PARTS, *ON_MASKING, *ON_ORDER))
    groups = {
        "On parts": ON_PARTS,
        "When the region goes": ON_MASKING,
        "Deletion, insertion, specificity": ON_ORDER,
        "Meaning and form": rest,
    }
    grids = []
    for title, names in groups.items():
        metrics = [name for name in table.metrics if name in names]
        lines = [Line(name, tuple(_judged(table, name, metrics))) for name in table.explainers]
        lines = [line for line in lines if any(entry != NOTHING for entry in line.entries)]
        if lines:
            columns = tuple(heading(name, user_supplied=user_supplied) for name in metrics)
            grids.append(Grid(f"{title}. {caption}", "explainer", columns, tuple(lines)))
    return grids


def heading(metric: str, *, user_supplied: bool = False) -> str:
    """Return the heading of a metric; one on user-supplied masks says so."""
    return measure(metric).name + (" (user-supplied masks)" if user_supplied and metric in ON_PARTS else "")


def control_grids(frame: pd.DataFrame, *, user_supplied: bool = False) -> list[Grid]:
    """Return one table per explainer: every metric beside every control, the difference and what it says.

    Args:
        frame: rows of one judge, one fill and the headline share.
        user_supplied: whether the masks of parts came from the user.
    """
    table = Summary(frame)
    columns = ("control", "map", "its control", "difference", "reading")
    grids = []
    for explainer in table.explainers:
        lines = [
            Line(
                heading(metric, user_supplied=user_supplied),
                (Entry(control), *_beside(table, explainer, metric, control)),
            )
            for metric in table.metrics
            for control in table.controls(metric)
            if table.row(explainer, metric, "difference", control) is not None
        ]
        if lines:
            grids.append(Grid(f"{explainer} beside every control", "metric", columns, tuple(lines), worded=True))
    return grids


def _beside(table: Summary, explainer: str, metric: str, control: str) -> tuple[Entry, Entry, Entry, Entry]:
    shown = measure(metric)
    own, other = table.row(explainer, metric), table.row(explainer, metric, "control", control)
    gap = table.row(explainer, metric, "difference", control)
    cells = [
        NOTHING if row is None else measured((row.value, row.low, row.high), scale=shown.scale, digits=shown.digits)
        for row in (own, other)
    ]
    difference = measured((gap.value, gap.low, gap.high), scale=shown.scale, digits=shown.digits, signed=True)
    return cells[0], cells[1], difference, Entry(verdict(gap.low, gap.high, shown.better, control) or "–")


def judge_grid(frame: pd.DataFrame, *, caption: str) -> Grid | None:
    """Return what the maps of one model do to others: explainer and judge x metrics; None without another judge.

    Args:
        frame: rows of all judges, of one fill and the headline share.
        caption: of the table.
    """
    if not (frame["judge"] != "").any():
        return None
    tables = {str(judge): Summary(frame[frame["judge"] == judge]) for judge in dict.fromkeys(frame["judge"])}
    shared = [metric for judge, table in tables.items() if judge for metric in table.metrics]
    metrics = list(dict.fromkeys(shared))
    lines = [
        Line(f"{explainer}, judged by {judge or 'the model itself'}", tuple(_judged(table, explainer, metrics)))
        for explainer in dict.fromkeys(name for table in tables.values() for name in table.explainers)
        for judge, table in sorted(tables.items())
        if explainer in table.explainers
    ]
    lines = [line for line in lines if any(entry != NOTHING for entry in line.entries)]
    return Grid(caption, "maps", tuple(heading(name) for name in metrics), tuple(lines)) if metrics else None


def _judged(table: Summary, explainer: str, metrics: Sequence[str]) -> list[Entry]:
    return [table.value(explainer, name, against=next(iter(table.controls(name)), None)) for name in metrics]


def terms(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the names and meanings of the metrics in a table."""
    found = set(frame["metric"].astype(str))
    return [(shown.name, shown.text) for name, shown in MEASURES.items() if name in found]


def limits(parts: object) -> str:
    """Return what can be said about masks of parts in these data.

    Args:
        parts: `true`, `user-supplied` or anything else, as the record of `interpret` says.
    """
    none = "CUHK-PEDES, ICFG-PEDES and RSTPReid have no human part annotation, so no map can be called right on them."
    if parts == "user-supplied":
        return (
            f"{none} Scores on parts (pointing, mass, IoU) are measured here against user-supplied parsing masks, "
            "which are marked so; they say how well maps agree with whatever made the masks."
        )
    if parts == "true":
        return (
            "Scores on parts are measured against the true masks of rendered people. The benchmarks of photographs "
            "(CUHK-PEDES, ICFG-PEDES, RSTPReid) have no human part annotation: nothing here carries over to them."
        )
    return f"{none} The tests below ask instead what happens to retrieval when the highlighted region is taken away."


def sentences(frame: pd.DataFrame) -> list[str]:
    """Return what shuffled weights, exchanged phrases, other models and exchanged colours say, in words.

    Args:
        frame: rows of the table `interpretability`.
    """
    values = named_rows(frame[(frame["kind"] == "value") & frame["metric"].isin(_WORDED)])
    found = []
    for metric, (what, reading) in _CORRELATED.items():
        for judge in dict.fromkeys(str(row.judge) for row in values if row.metric == metric):
            rows = [row for row in values if (row.metric, str(row.judge)) == (metric, judge)]
            each = ", ".join(f"{_with_bounds(row, digits=2)} for {row.explainer}" for row in rows)
            found.append(f"{what}{f' ({judge})' if judge else ''}: {each} ({_maps(rows)}). {reading}")
    return found + _binding({str(row.metric): row for row in values})


_CORRELATED = {
    "sanity.weights": (
        "Rank correlation of the maps with those of the same model with its weights shuffled",
        "Near 0 is right: a map that stays does not show what was learnt.",
    ),
    "sanity.phrases": (
        "Rank correlation of the maps with those of exchanged phrases",
        "Low is right: a map that stays does not depend on the phrase.",
    ),
    "stability": (
        "Rank correlation of the maps with those of another model",
        "High is right: the maps do not depend on one training (`centre` and `random` cannot but agree).",
    ),
}


def _with_bounds(row: Any, *, scale: float = 1.0, digits: int = 1) -> str:
    bounds = spread(row.low, row.high, scale=scale, digits=digits)
    return f"{number(row.value, scale=scale, digits=digits)}{f' [{bounds}]' if bounds else ''}"


def _maps(rows: Sequence[Any]) -> str:
    counts = sorted({int(row.items) for row in rows})
    return f"{' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} maps"


def _binding(rows: Mapping[str, Any]) -> list[str]:
    swap, other = rows.get("binding.swap"), rows.get("binding.random")
    found = []
    if swap is not None:
        found.append(
            f"Binding: the true caption beats the same words with two colours exchanged in percent of "
            f"{swap.items:,} captions: {_with_bounds(swap, scale=100)}, where chance is 50. {_bound(swap)}"
        )
    if other is not None:
        share = _with_bounds(other, scale=100)
        found.append(f"It beats another person's caption in percent of {other.items:,} captions: {share}.")
    return found


def _bound(row: Any) -> str:
    if row.low > 0.5:
        return "The model tells better than chance which colour belongs to which part."
    return "Nothing shows that the model knows which colour belongs to which part."
