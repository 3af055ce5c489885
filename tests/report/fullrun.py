"""A run with everything that a report can show: the fake run of the stages' tests and what further stages leave."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent / "stages"))
from fakerun import make_run

from reidctl import tables
from reidctl.runs import Run

EXPLAINERS = {"gradcam": 0.02, "ppim": 0.05, "centre": 0.0}
"""How much more of the similarity each of the maps takes than a random choice, per unit of the removed share."""
CONTROLS = ("random", "block", "shifted", "phrase")
SCRIPT = '<script>document.title="x"</script>'
IMAGE = '"><img src=x onerror=\'document.title="x"\'>'


def make_full_run(folder: Path, *, parts: str = "true") -> Run:
    """Write a run with every stage; two captions hold markup."""
    run = make_run(folder, people=8)
    captions = tables.read_table(run.table("data", "captions"), "captions")
    full = np.flatnonzero(captions["kind"] == "full")
    captions.loc[full[0], "text"] = f"{SCRIPT} a red shirt"
    captions.loc[full[1], "text"] = f"{IMAGE} a red shirt"
    tables.write_table(run.table("data", "captions"), "captions", captions)
    _explain(run)
    tables.write_table(run.table("interpret", "interpretability"), "interpretability", summary())
    _change(run, "interpret", parts=parts)
    _evaluate(run)
    _robustness(run)
    _analyse(run)
    _others(run)
    return run


def _change(run: Run, stage: str, **values: object) -> None:
    path = run.stage_dir(stage) / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _finish(run: Run, stage: str, outputs: list[Path], **extra: object) -> None:
    run.stage_dir(stage).mkdir(parents=True, exist_ok=True)
    settings = extra.pop("settings", {"seed": 3})
    run.finish(stage, settings=settings, inputs={}, outputs=outputs, started=datetime.now(UTC), extra=extra)


def _explain(run: Run) -> None:
    rows = tables.read_table(run.table("interpret", "explanations"), "explanations")
    texts = tables.read_table(run.table("data", "captions"), "captions").set_index("caption_id")["text"]
    for place, name in enumerate(rows["query_id"]):
        if SCRIPT in texts[name] or IMAGE in texts[name]:  # other captions than those that the maps were made for
            phrase = "red shirt" if rows.at[place, "phrase"] == "red shirt" else '"x"'
            start = texts[name].index(phrase)
            rows.loc[place, ["phrase", "char_start", "char_end"]] = [phrase, start, start + len(phrase)]
    whole = rows.drop_duplicates("query_id")
    sentences = [texts[name] for name in whole["query_id"]]
    whole = whole.assign(phrase=sentences, char_start=0, char_end=[len(text) for text in sentences])
    rows = pd.concat([whole, rows], ignore_index=True)
    every = [rows.assign(explainer=name) for name in ("gradcam", "ppim", "random")]
    tables.write_table(run.table("interpret", "explanations"), "explanations", pd.concat(every, ignore_index=True))


def _row(explainer: str, metric: str, kind: str, value: float, **more: object) -> dict[str, object]:
    wide = 0.1 * abs(value) + 0.004
    common = {
        "explainer": explainer,
        "judge": "",
        "metric": metric,
        "kind": kind,
        "control": "",
        "fill": "",
        "items": 90,
    }
    return {**common, "removed": np.nan, "value": value, "low": value - wide, "high": value + wide, **more}


def _triple(
    explainer: str, metric: str, own: float, controls: dict[str, float], **more: object
) -> list[dict[str, object]]:
    rows = [_row(explainer, metric, "value", own, **more)]
    for name, value in controls.items():
        rows.append(_row(explainer, metric, "control", value, **more, control=name))
        rows.append(_row(explainer, metric, "difference", own - value, **more, control=name))
    return rows


def summary() -> pd.DataFrame:
    """Rows of the table `interpretability`: ppim beats every control, gradcam some, centre none."""
    rows: list[dict[str, object]] = []
    for name, gain in EXPLAINERS.items():
        for fill in ("mean", "blur"):
            for removed in (0.05, 0.1, 0.2, 0.3, 0.5):
                base = 0.1 * removed * (1 if fill == "mean" else 0.6)
                for metric, scale in (("similarity_drop", 1.0), ("rank1_drop", 4.0), ("mAP_drop", 3.0)):
                    controls = {control: scale * base * (1 + 0.1 * n) for n, control in enumerate(CONTROLS)}
                    own = scale * (base + 4 * gain * removed**0.7)
                    rows += _triple(name, metric, own, controls, fill=fill, removed=removed)
                    if fill == "mean" and metric != "mAP_drop":
                        rows += _triple(name, metric, own / 2, controls, fill=fill, removed=removed, judge="plain-clip")
            rows += _triple(name, "deletion", 0.5 - 5 * gain, {"random": 0.5}, fill=fill)
            rows += _triple(name, "insertion", 0.5 + 4 * gain, {"random": 0.5}, fill=fill)
        rows += _triple(name, "pointing", 0.4 + 8 * gain, {"random": 0.2, "centre": 0.4})
        rows += _triple(name, "alignment", 0.2 + gain, {"random": 0.2, "phrase": 0.21}, judge="clip:ViT-B-32")
        rows += [_row(name, "entropy", "value", 0.9 - 5 * gain), _row(name, "sanity.weights", "value", 0.1)]
        rows += [_row(name, "stability", "value", 0.7, judge="runs/b")]
    rows += [_row("", "binding.swap", "value", 0.62), _row("", "binding.random", "value", 0.9)]
    return pd.DataFrame(rows)


def _evaluate(run: Run) -> None:
    rows = {"standard": {m: [v, v - 0.05, v + 0.05] for m, v in (("rank1", 0.5), ("rank5", 0.7), ("mAP", 0.4))}}
    facts = {
        "queries": 18,
        "skipped": 0,
        "gallery": 18,
        "people": 8,
        "about": "",
        "rule": "",
        "rows": rows,
        "counts": {},
    }
    shown = {f"{d}:synthped": {**facts, "direction": d, "dataset": "synthped"} for d in ("t2i", "i2i")}
    _change(run, "evaluate", tables=shown, split="test", data=str(run.stage_dir("data").resolve()))
    settings = {
        "seed": 3,
        "backbone": {"spec": "vit-bert:tiny"},
        "method": {"name": "bdam", "note": "größe <b>"},
        "train": {"epochs": 12, "select_metric": "rank1", "rate": 1e-5},
    }
    _change(run, "finetune", settings=settings, start=None)


def _robustness(run: Run) -> None:
    rows = []
    for setting, value in (("standard", 0.5), ("typos", 0.42), ("occlusion", 0.3), ("truncation", 0.49)):
        reference = setting == "standard"
        for metric, scale in (("rank1", 1.0), ("mAP", 0.8)):
            drop = (0.5 - value) * scale
            beside = (
                {} if reference else {"drop": drop, "drop_low": drop - 0.03, "drop_high": drop + 0.03, "p_value": 0.01}
            )
            rows.append(
                {
                    "model": "model", "direction": "t2i", "dataset": "synthped", "split": "test", "setting": setting,
                    "reference": "standard", "seed": 3, "metric": metric, "value": value * scale,
                    "low": value * scale - 0.05, "high": value * scale + 0.05, "queries": 24, "skipped": 0,
                    "gallery": 24, "ceiling": 0.96 if metric == "rank1" else None,
                    "level": None if reference else 0.2, **beside,
                }
            )  # fmt: skip
    path = run.table("robustness", "robustness")
    tables.write_table(path, "robustness", pd.DataFrame(rows))
    notes = ["synthped t2i, model, occlusion: Mean over nothing."]
    gap = {"rank1": [0.02, -0.01, 0.05, 0.2], "mAP": [0.05, 0.01, 0.09, 0.02]}
    keys = {"direction": "t2i", "dataset": "synthped", "reference": "standard", "seed": 3, "level": 0.2}
    _finish(run, "robustness", [path], notes=notes, differences=[{**keys, "setting": "typos", "values": gap}])


def _analyse(run: Run) -> None:
    images = tables.read_table(run.table("data", "images"), "images")
    rng = np.random.default_rng(4)
    frames = []
    for panel, feature in (("streams", "identity"), ("streams", "clothing"), ("embedding", "i2i")):
        centre = {name: rng.normal(size=2) * 8 for name in sorted(set(images["person_id"]))}
        place = np.array([centre[name] for name in images["person_id"]]) + rng.normal(size=(len(images), 2))
        labels = [("red", "navy", "white", "")[n % 4] for n in range(len(images))]
        named = {"image_id": images["image_id"], "person_id": images["person_id"], "label": labels}
        frames.append(pd.DataFrame({"panel": panel, "feature": feature, **named, "x": place[:, 0], "y": place[:, 1]}))
    folder = run.stage_dir("analyse")
    folder.mkdir()
    pd.concat(frames).to_csv(folder / "tsne.csv", index=False)
    rows = []
    for feature in ("identity", "clothing"):
        common = {"feature": feature, "items": 24, "people": 8}
        for target, value in (("upper_colour", 0.7), ("gender", 0.6)):
            beside = {"low": value - 0.1, "high": value + 0.1, "control": 0.2, "chance": 0.15}
            rows.append(
                {**common, "analysis": "probes", "target": target, "metric": "accuracy", "value": value, **beside}
            )
        beside = {"low": 0.1, "high": 0.3, "control": 0.01}
        rows.append({**common, "analysis": "tsne", "target": "person", "metric": "silhouette", "value": 0.2, **beside})
        for metric, value in (("intra", 0.2), ("inter", 0.8), ("ratio", 0.25)):
            beside = {"low": value - 0.05, "high": value + 0.05}
            rows.append({**common, "analysis": "compactness", "target": "", "metric": metric, "value": value, **beside})
    beside = {"low": 0.01, "high": 0.03, "control": 0.005, "p_value": 0.002, "items": 24, "people": 8}
    pair = {"analysis": "dependence", "feature": "identity", "target": "clothing"}
    rows.append({**pair, "metric": "hsic", "value": 0.02, **beside})
    path = run.table("analyse", "analysis")
    tables.write_table(path, "analysis", pd.DataFrame(rows))
    _finish(
        run, "analyse", [path, folder / "tsne.csv"], images=len(images), people=8, notes=["tsne: read silhouettes."]
    )


def _others(run: Run) -> None:
    where = {"direction": "t2i", "dataset": "synthped", "condition": "standard"}
    seeds = [{**where, "run": f"/r/{n}", "seed": n, "rank1": 0.5 + 0.01 * n, "mAP": 0.4} for n in range(3)]
    seeds += [{**where, "run": "mean", "seed": None, "rank1": 0.51, "mAP": 0.4}]
    seeds += [{**where, "run": "std", "seed": None, "rank1": 0.01, "mAP": 0.0}]
    _finish(run, "seeds", [], rows=seeds, notes=["3 runs with the same recipe."])
    chosen = {"label": "selected on val", "epoch": 11, "value": 0.5, "low": 0.4, "high": 0.6}
    gap = {"value": 0.02, "low": -0.01, "high": 0.05}
    best = {**chosen, "label": "best", "epoch": 9, "value": 0.52}
    row = {"direction": "t2i", "dataset": "synthped", "split": "test", "metric": "rank1"}
    _finish(run, "epochs", [], split="test", rows=[{**row, "selected": chosen, "best": best, "gap": gap}], notes=[])
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "queries": 9, "skipped": 0, "gallery": 9}
    home, away = {**score, "relation": "same", "drop": None}, {**score, "value": 0.2, "relation": "cross", "drop": 0.3}
    cells = [
        {"model": "a", "cells": [home, {"reason": "Its people were trained on."}]},
        {"model": "b", "cells": [away, home]},
    ]
    table = {"direction": "t2i", "metric": "rank1", "columns": ["one", "two"], "rows": cells}
    _finish(run, "matrix", [], tables=[table], notes=[])
