"""What the page shows of `analyse`: numbers of features as tables, each beside its control and chance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reidctl.report.figures import named_rows
from reidctl.report.grids import NOTHING, Entry, Grid, Line, known, measured, number, p_text

NAMES = {"tsne": "Groups", "clones": "Look-alikes", "cam": "Grad-CAM", "pseudo": "Pseudo-words"}
"""Headings of analyses that their own names do not make clear."""
ABOUT = {
    "probes": "What a linear probe reads from each feature, on images of unseen people; control: exchanged labels.",
    "dependence": "How much the two streams depend on each other; control: people exchanged.",
    "compactness": "Cosine distances within people and between people.",
    "tsne": "How well people and clothes form groups in each feature's own space; control: labels exchanged.",
    "clones": "Look-alikes: how often the right person wins, percent of comparisons; chance 50.",
    "attention": "What prompts and class tokens look at.",
    "cam": "How much of the relevance lies on the person and on carried objects.",
    "pseudo": "Whether an image and its caption are inverted to the same pseudo-words, and what that costs.",
    "words": "The nearest words of learnt prompts or pseudo-words, by cosine.",
    "alarms": "Rules that say whether the training went wrong.",
    "efficiency": "What each part costs, on noise of its own input sizes.",
}
_PERCENT = {
    ("probes", "accuracy"),
    ("probes", "balanced-accuracy"),
    ("probes", "excess"),
    ("clones", "i2i"),
    ("clones", "t2i"),
}
_BY_FEATURE = ("probes", "clones", "tsne")
"""Analyses with one table per metric: targets down, features across; of others there is one, metrics across."""


@dataclass(frozen=True)
class Part:
    """The tables of one analysis."""

    name: str
    about: str
    grids: tuple[Grid, ...]


def analysis_parts(rows: pd.DataFrame) -> list[Part]:
    """Return the tables of every analysis but the gates, which have a section of their own.

    Args:
        rows: of the table `analysis`.
    """
    parts, order = [], list(ABOUT)
    found = dict.fromkeys(rows["analysis"].astype(str))
    for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
        mine = rows[rows["analysis"] == name].astype({"feature": str, "target": str, "metric": str})
        if name != "gates":
            grids = _by_feature(mine, name) if name in _BY_FEATURE else [_by_metric(mine)]
            parts.append(Part(NAMES.get(name, name.capitalize()), ABOUT.get(name, ""), tuple(grids)))
    return parts


def _by_feature(rows: pd.DataFrame, name: str) -> list[Grid]:
    return [
        _grid(
            rows[rows["metric"] == metric],
            f"{metric}{', percent' if (name, metric) in _PERCENT else ''}",
            "target",
            lambda row: row.target or "all",
            lambda row: row.feature,
        )
        for metric in dict.fromkeys(rows["metric"])
    ]


def _by_metric(rows: pd.DataFrame) -> Grid:
    def heading(row: Any) -> str:
        return " · ".join(part for part in (row.feature, row.target) if part) or "model"

    return _grid(
        rows,
        "Each feature, with 95 % intervals over people where there are any",
        "feature",
        heading,
        lambda row: row.metric,
    )


def _grid(
    rows: pd.DataFrame, caption: str, corner: str, down: Callable[[Any], str], across: Callable[[Any], str]
) -> Grid:
    found = named_rows(rows)
    cells = {(down(row), across(row)): _cell(row) for row in found}
    names = list(dict.fromkeys(key[0] for key in cells))
    columns = list(dict.fromkeys(key[1] for key in cells))
    lines = [Line(_shown(name), tuple(cells.get((name, column), NOTHING) for column in columns)) for name in names]
    return Grid(caption, corner, tuple(_shown(name) for name in columns), tuple(lines))


def _cell(row: Any) -> Entry:
    scale, digits = (100.0, 1) if (row.analysis, row.metric) in _PERCENT else (1.0, _digits(row))
    beside = [
        f"{name} {number(value, scale=scale, digits=digits)}"
        for name, value in (("control", row.control), ("chance", row.chance))
        if known(value)
    ]
    told = p_text(row.p_value)
    return measured((row.value, row.low, row.high), scale=scale, digits=digits, after=[*beside, told])


def _digits(row: Any) -> int:
    """Digits after the point: none for counts and large rates, three for what lies in (-10, 10)."""
    size = abs(row.value)
    if size >= 100 or (float(row.value).is_integer() and not known(row.low)):
        return 0
    return 1 if size >= 10 else 3


def _shown(name: str) -> str:
    for prefix, text in (("against.", "other model: "), ("difference.", "difference of the models: ")):
        if name.startswith(prefix):
            name = text + name.removeprefix(prefix)
    return name.replace("_", " ")
