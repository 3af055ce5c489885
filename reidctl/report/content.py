"""From tables to what the page shows: which rows, in which order, chosen by which rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reidctl import naming
from reidctl.report.figures import METRIC_NAMES, conditions, named_rows

DIRECTIONS = {name: text.capitalize() for name, text in naming.DIRECTIONS.items()}

CONDITION_TEXTS = {
    "chance": "The expected score of a random order, computed exactly.",
    "histogram": "Ranks by an image's colours without layout; a text's colours are learned from training captions.",
    "oracle": "Ranks by the share of true attributes that agree: what a perfect reader of attributes would reach.",
    "oracle-caption": "Ranks by the true attributes that the query caption names: what its words can reach.",
    "shuffled": "The model's ranking with the gallery's people exchanged among its images: must stay at chance.",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A value in [0, 1] with its 95 % interval; None for a bound that there is not."""

    value: float
    low: float | None = None
    high: float | None = None


def metric_groups(metrics: pd.DataFrame) -> list[Row]:
    """Return the metrics table as one table of conditions x metrics per direction, dataset and split.

    Keys: title, caption, metrics, rows (name, model, cells, queries, skipped) and `frame`, the rows behind it.
    """
    groups = []
    # Single-shot galleries hold one image of each person: their numbers do not compare with the others.
    marked = metrics.assign(single=metrics["condition"].astype(str).str.startswith("single-shot"))
    for (direction, dataset, split, single), frame in marked.groupby(["direction", "dataset", "split", "single"]):
        title = f"{DIRECTIONS.get(str(direction), str(direction))}, {dataset}, {split} split"
        title += ", single-shot" if single else ""
        frame = frame.drop(columns="single")
        names = [name for name in METRIC_NAMES if name in set(frame["metric"])]
        rows = [_condition_row(frame[frame["condition"] == c], c, names) for c in conditions(list(frame["condition"]))]
        caption = f"Gallery of {int(frame['gallery'].max()):,} images"
        shown = [METRIC_NAMES[name] for name in names]
        groups.append({"title": title, "caption": caption, "metrics": shown, "rows": rows, "frame": frame})
    # People read text-to-image first; it is what the toolkit is about.
    return sorted(groups, key=lambda group: not str(group["title"]).startswith("Text"))


def _condition_row(frame: pd.DataFrame, condition: str, names: Sequence[str]) -> Row:
    at = {row.metric: row for row in named_rows(frame)}
    cells = [_cell(at[name]) if name in at else None for name in names]
    first = frame.iloc[0]
    return {
        "name": naming.label(condition),
        "model": condition == "standard",
        "cells": cells,
        "queries": f"{int(first['queries']):,}",
        "skipped": f"{int(first['skipped']):,}",
    }


def _cell(row: Any) -> Cell:
    bounded = not (pd.isna(row.low) or pd.isna(row.high))
    return Cell(float(row.value), float(row.low) if bounded else None, float(row.high) if bounded else None)


def headline_cards(metrics: pd.DataFrame) -> list[Row]:
    """Return the model's rank-1 and mAP per direction, each with the interval and what chance gives."""
    cards = []
    for (direction, dataset, _), frame in metrics.groupby(["direction", "dataset", "split"], sort=True):
        for name in ("rank1", "mAP"):
            rows = {row.condition: row for row in named_rows(frame[frame["metric"] == name])}
            if "standard" not in rows:
                continue
            row = rows["standard"]
            notes = [] if pd.isna(row.low) else [f"{100 * row.low:.1f}–{100 * row.high:.1f}"]
            notes += [f"chance {100 * rows['chance'].value:.1f}"] if "chance" in rows else []
            label = f"{METRIC_NAMES[name]}, {DIRECTIONS.get(str(direction), str(direction)).lower()}"
            label += f" ({dataset})" if metrics["dataset"].nunique() > 1 else ""
            cards.append({"label": label, "value": f"{100 * row.value:.1f} %", "note": "; ".join(notes)})
    return sorted(cards, key=lambda card: "text to image" not in str(card["label"]))


def pick_queries(rankings: pd.DataFrame, *, shown: int, seed: int) -> tuple[list[str], str]:
    """Return query ids to show and the rule by which they were drawn, in words.

    Half of them are drawn at random from the queries with a right image at rank 1, the rest from the others; where one
    kind has too few, the other fills up. The choice depends on the ids and the seed alone.

    Args:
        rankings: rows of the `rankings` table of one condition.
        shown: how many.
        seed: of the draw.
    """
    first = rankings[rankings["rank"] == rankings["rank"].min()].groupby("query_id")["match"].max()
    found = sorted(first.index[first.astype(bool)])
    missed = sorted(first.index[~first.astype(bool)])
    rng = np.random.default_rng((seed, 23))
    wrong = min(len(missed), max(shown // 2, shown - len(found)))
    right = min(len(found), shown - wrong)
    chosen = [found[i] for i in sorted(rng.permutation(len(found))[:right])]
    chosen += [missed[i] for i in sorted(rng.permutation(len(missed))[:wrong])]
    rule = (
        f"{len(found):,} of {len(first):,} queries have the right person first. Shown are {right} of these and "
        f"{wrong} of the {len(missed):,} others, each drawn at random (seed {seed}); nobody picked them, and the share "
        "of failures here is not the model's."
    )
    return chosen, rule


def split_rows(images: pd.DataFrame, captions: pd.DataFrame) -> list[Row]:
    """Return the counts of images, people, cameras and captions of every split."""
    full = captions[captions["kind"] == "full"] if len(captions) else captions
    rows = []
    order = {"train": 0, "val": 1, "test": 2}
    for split in sorted(set(images["split"]), key=lambda name: (order.get(name, 3), name)):
        part = images[images["split"] == split]
        texts = int(full["image_id"].isin(set(part["image_id"])).sum()) if len(full) else 0
        counts = {"images": len(part), "people": part["person_id"].nunique(), "cameras": part["camera_id"].nunique()}
        rows.append({"split": split, **{key: f"{n:,}" for key, n in counts.items()}, "captions": f"{texts:,}"})
    return rows


def pick_images(images: pd.DataFrame, *, shown: int, seed: int) -> list[str]:
    """Return ids of images of different people where possible, drawn at random."""
    rng = np.random.default_rng((seed, 29))
    order = images.iloc[rng.permutation(len(images))]
    others = order[order["person_id"].duplicated()]
    different = order[~order["person_id"].duplicated()]
    return [str(name) for name in pd.concat([different, others])["image_id"].iloc[:shown]]


def grounding_rows(scores: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of the grounding table from the `interpret` stage's metrics.

    Args:
        scores: `{value, low, high}` by name, as `explain.grounding.summarise_grounding` names them.
    """
    columns = {"": "map", ".random": "random", ".centre": "centre", ".pooled": "pooled truth"}
    differences = {"-random": "map − random", "-centre": "map − centre"}
    rows = []
    for name, shown in (("pointing", "pointing"), ("mass", "mass on part"), ("iou", "IoU")):
        entries = [scores.get(name + kind) for kind in (*columns, *differences)]
        if any(entries):
            cells = [Cell(entry["value"], entry["low"], entry["high"]) if entry else None for entry in entries]
            rows.append({"name": shown, "cells": cells})
    return [*columns.values(), *differences.values()], rows


def provenance_row(record: Mapping[str, Any]) -> Row:
    """Return one line of the provenance table from a stage's record."""
    settings = record.get("settings", {})
    seed = settings.get(
        "seed", settings.get("synth", {}).get("seed") if isinstance(settings.get("synth"), dict) else None
    )
    return {
        "stage": record["stage"],
        "command": " ".join(str(word) for word in record.get("command", [])),
        "finished": str(record.get("finished", ""))[:19].replace("T", " "),
        "seconds": f"{float(record.get('seconds', 0)):,.1f}",
        "device": record.get("device", ""),
        "version": record.get("version", ""),
        "commit": record.get("git_commit"),
        "seed": "–" if seed is None else seed,
        "inputs": sorted(record.get("inputs", {}).items()),
    }
