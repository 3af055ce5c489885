"""Published numbers, by paper, table, row and dataset, with the contradictions between them.

Quoted as printed. A number's `paper` is the text that prints it: IRRA's numbers in three texts are three entries, and
they differ. Nothing here was measured by us.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Published:
    """One printed number.

    Attributes:
        paper: the text that prints it (`bdam-icme`, `hpl`, `irra-readme`, ...), not the method's own paper.
        table: the table's number or name as printed.
        about: what the table shows.
        kind: `comparison`, `ablation`, `robustness`, `cross-domain` or `analysis` (not a retrieval metric).
        row: the row's name as printed; `Ours` is the paper's own method.
        direction: `t2i` or `i2i`.
        dataset: dataset name.
        metric: `rank1`, `rank5`, `rank10`, `mAP` or `mINP`; of kind `analysis` others.
        value: in [0, 1].
        printed: the number as printed, in per cent unless `kind` is `analysis`.
        source: `paper`, `readme`, `leaderboard` or `recalled`.
        verified: whether the number was read in that very text; False if it was handed down by somebody else.
        selection: what the epoch was chosen on: `val`, `test`, `last` (the last epoch) or `not said`.
        quoted: whether the text repeats another text's number, so that nothing is known of how it came about.
        backbone: as the text says; empty if it does not.
        pretraining: what the weights started from; empty if the text does not say.
        reranked: whether it was measured with re-ranking.
        note: what a reader of the text should know.
        notes: the contradictions that this number is part of.
    """

    paper: str
    table: str
    about: str
    kind: str
    row: str
    direction: str
    dataset: str
    metric: str
    value: float
    printed: str
    source: str
    verified: bool
    selection: str
    quoted: bool
    backbone: str
    pretraining: str
    reranked: bool
    note: str
    notes: tuple[str, ...]


@functools.cache
def registry() -> tuple[Published, ...]:
    """Return every number of the registry, in printed order."""
    content = _content()
    rules = [(pattern, entry["note"]) for entry in content["contradictions"] for pattern in entry.get("at", ())]
    return tuple(entry for table in content["tables"] for entry in _entries(table, content["sources"], rules))


def contradictions(*, numbers: bool = False) -> list[str]:
    """Return what the papers contradict each other or themselves in, one sentence each.

    Args:
        numbers: only those that numbers of this registry are part of.
    """
    return [entry["note"] for entry in _content()["contradictions"] if "at" in entry or not numbers]


def titles() -> dict[str, str]:
    """Return what each `paper` of the registry is."""
    return {name: source["title"] for name, source in _content()["sources"].items()}


def find(
    *, dataset: str | None = None, direction: str | None = None, paper: str | None = None, row: str | None = None
) -> list[Published]:
    """Return the numbers that fit; case and hyphens of dataset names do not matter (`CUHK-PEDES`, `cuhkpedes`)."""
    return [
        entry
        for entry in registry()
        if (dataset is None or plain(entry.dataset) == plain(dataset))
        and direction in (None, entry.direction)
        and paper in (None, entry.paper)
        and row in (None, entry.row)
    ]


def comparison(*, dataset: str | None = None, direction: str) -> list[Published]:
    """Return the rows of the comparison tables for one dataset, or all; each keeps its paper, none are merged."""
    return [entry for entry in find(dataset=dataset, direction=direction) if entry.kind == "comparison"]


def plain(name: str) -> str:
    """Return a dataset's name without case and punctuation, by which names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@functools.cache
def _content() -> dict[str, Any]:
    text = (resources.files("reidctl.evaluation") / "published.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _entries(table: Mapping[str, Any], sources: Mapping[str, Any], rules: list[tuple[str, str]]) -> list[Published]:
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
        facts = _facts(table, sources[table["paper"]], row)
        for (direction, dataset, metric), value in zip(cells, values, strict=True):
            if value is None:
                continue
            name = "/".join((table["paper"], table["table"], row, dataset, metric))
            found.append(
                Published(
                    **facts,
                    row=row,
                    direction=direction,
                    dataset=dataset,
                    metric=metric,
                    value=float(value) if table.get("unit") == "fraction" else round(value / 100, 6),
                    printed=f"{value:.{table.get('decimals', 2)}f}",
                    # One sentence may name the same number twice.
                    notes=tuple(dict.fromkeys(note for pattern, note in rules if fnmatchcase(name, pattern))),
                )
            )
    return found


def _facts(table: Mapping[str, Any], source: Mapping[str, Any], row: str) -> dict[str, Any]:
    """What holds for a whole row. What a text says of its own training does not hold for rows that it quotes."""
    compares = table["kind"] == "comparison" and "Ours" in table["rows"]
    quoted = row in table.get("quoted", ()) or (compares and row != "Ours")
    towers = [name for name, rows in table.get("backbone", {}).items() if row in rows]
    return {
        **{name: table[name] for name in ("paper", "table", "about", "kind")},
        "source": source["source"],
        "verified": bool(source.get("verified", True)),
        "selection": "not said" if quoted else source.get("selection", "not said"),
        "quoted": quoted,
        "backbone": "".join(towers),
        "pretraining": "" if quoted else source.get("pretraining", ""),
        "reranked": bool(table.get("reranked", False)),
        "note": source.get("note", ""),
    }
