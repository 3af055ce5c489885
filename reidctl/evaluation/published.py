"""Published numbers, by paper, table, row and dataset, with the contradictions between them."""

import functools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Published:
    """One printed number.

    Args:
        paper: `bdam-icme`, `bdam-long` or `hpl`: the text that prints it, not the method's own paper.
        table: the table's number as printed.
        about: what the table shows.
        row: the row's name as printed; `Ours` is the paper's own method.
        direction: `t2i` or `i2i`.
        dataset: dataset name.
        metric: `rank1`, `rank5`, `rank10` or `mAP`.
        value: in [0, 1].
        notes: the contradictions that this number is part of.
    """

    paper: str
    table: str
    about: str
    row: str
    direction: str
    dataset: str
    metric: str
    value: float
    notes: tuple[str, ...]


@functools.cache
def registry() -> tuple[Published, ...]:
    """Return every number of the registry, in printed order."""
    content = _content()
    rules = [(pattern, entry["note"]) for entry in content["contradictions"] for pattern in entry["at"]]
    return tuple(entry for table in content["tables"] for entry in _entries(table, rules))


def contradictions() -> list[str]:
    """Return what the papers contradict each other or themselves in, one sentence each."""
    return [entry["note"] for entry in _content()["contradictions"]]


def find(
    *, dataset: str | None = None, direction: str | None = None, paper: str | None = None, row: str | None = None
) -> list[Published]:
    """Return the numbers that fit; case and hyphens of dataset names do not matter (`CUHK-PEDES`, `cuhkpedes`)."""
    return [
        entry
        for entry in registry()
        if (dataset is None or _plain(entry.dataset) == _plain(dataset))
        and direction in (None, entry.direction)
        and paper in (None, entry.paper)
        and row in (None, entry.row)
    ]


def comparison(*, dataset: str, direction: str) -> list[Published]:
    """Return the rows of the papers' comparison tables for one dataset; each keeps its paper, none are merged."""
    return [entry for entry in find(dataset=dataset, direction=direction) if "comparison" in entry.about]


def _content() -> dict[str, Any]:
    text = (resources.files("reidctl.evaluation") / "published.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _entries(table: dict[str, Any], rules: list[tuple[str, str]]) -> list[Published]:
    directions = table["direction"]
    if isinstance(directions, str):
        directions = [directions] * len(table["datasets"])
    cells = [
        (direction, dataset, metric)
        for direction, dataset in zip(directions, table["datasets"], strict=True)
        for metric in table["columns"]
    ]
    found = []
    for row, values in table["rows"].items():
        for (direction, dataset, metric), value in zip(cells, values, strict=True):
            if value is None:
                continue
            name = "/".join((table["paper"], table["table"], row, dataset, metric))
            notes = tuple(dict.fromkeys(note for pattern, note in rules if fnmatchcase(name, pattern)))
            found.append(
                Published(
                    table["paper"],
                    table["table"],
                    table["about"],
                    row,
                    direction,
                    dataset,
                    metric,
                    round(value / 100, 6),
                    notes,
                )
            )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
