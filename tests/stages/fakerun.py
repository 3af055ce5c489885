"""A run directory made by hand: small pictures of coloured figures, and the tables of every stage."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from reidctl import tables
from reidctl.masks import encode_mask
from reidctl.runs import Run, digest
from reidctl.stages.gates import write_gates

COLOURS = {
    "red": "#b03030",
    "blue": "#3050b0",
    "green": "#308040",
    "white": "#e8e8e8",
    "black": "#303030",
    "yellow": "#d8b830",
}
INJECTION = 'a <script>alert("pwned")</script> & "quoted" red shirt'


def draw_person(upper: str, lower: str, shift: int = 0) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """A figure of 64x32 and the masks of its upper and lower half."""
    image = Image.new("RGB", (32, 64), "#9aa0a6")
    draw = ImageDraw.Draw(image)
    draw.ellipse((13 + shift, 5, 20 + shift, 14), fill="#c99a7a")
    boxes = {"upper": (10 + shift, 15, 23 + shift, 34), "lower": (11 + shift, 35, 22 + shift, 58)}
    masks = {}
    for part, colour in (("upper", upper), ("lower", lower)):
        draw.rectangle(boxes[part], fill=COLOURS[colour])
        x0, y0, x1, y1 = boxes[part]
        masks[part] = np.zeros((64, 32), bool)
        masks[part][y0 : y1 + 1, x0 : x1 + 1] = True
    return image, masks


def make_data(folder: Path, *, people: int = 6, each: int = 3, dataset: str = "synthped", splits=("test",)) -> None:
    """Write images.parquet, captions.parquet, parts.parquet and the pictures."""
    rng = np.random.default_rng(5)
    images, captions, parts = [], [], []
    (folder / "images").mkdir(parents=True)
    for person in range(people):
        upper, lower = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
        for shot in range(each):
            name = f"p{person}s{shot}"
            picture, masks = draw_person(upper, lower, shift=int(rng.integers(-3, 4)))
            path = folder / "images" / f"{name}.png"
            picture.save(path)
            images.append(
                {
                    "image_id": name, "path": f"images/{name}.png", "dataset": dataset,
                    "split": splits[person % len(splits)], "person_id": f"{dataset}:{person}",
                    "width": 32, "height": 64,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "camera_id": f"c{shot}",
                    "role": "query" if shot == 0 else "gallery",
                }
            )  # fmt: skip
            sentence = f"A person with a {upper} shirt walks in {lower} trousers."
            common = {"image_id": name, "source": "template", "conditioned_on": "image", "status": "ok"}
            captions.append({**common, "caption_id": f"{name}-c", "kind": "full", "text": sentence})
            for part, phrase in (("upper", f"{upper} shirt"), ("lower", f"{lower} trousers")):
                start = sentence.index(phrase)
                captions.append(
                    {
                        **common, "caption_id": f"{name}-{part}", "kind": "phrase", "text": phrase,
                        "parent_id": f"{name}-c", "char_start": start, "char_end": start + len(phrase),
                    }
                )  # fmt: skip
                mask = masks[part]
                box = [int(mask.any(0).argmax()), int(mask.any(1).argmax()), 0, 0]
                parts.append({"image_id": name, "part": part, "phrase": phrase, "box": box, "mask": encode_mask(mask)})
    tables.write_table(folder / "images.parquet", "images", pd.DataFrame(images))
    tables.write_table(folder / "captions.parquet", "captions", pd.DataFrame(captions))
    tables.write_table(folder / "parts.parquet", "parts", pd.DataFrame(parts))


def finish(run: Run, stage: str, **extra: object) -> None:
    run.stage_dir(stage).mkdir(parents=True, exist_ok=True)
    settings = {"seed": 3, "method": {"name": "bdam"}}
    outputs = sorted(run.stage_dir(stage).glob("*.parquet"))
    metrics = extra.pop("metrics", {})
    images = run.table("data", "images")
    inputs = {"images": digest(images) if images.is_file() else "ab" * 32}
    run.finish(
        stage, settings=settings, inputs=inputs, outputs=outputs, started=datetime.now(UTC), extra=extra,
        metrics=metrics,
    )  # fmt: skip


def make_run(folder: Path, *, dataset: str = "synthped", people: int = 6, each: int = 3) -> Run:
    """Write a run with every stage; the last caption holds markup."""
    run = Run(folder)
    make_data(run.stage_dir("data"), dataset=dataset, people=people, each=each)
    captions = tables.read_table(run.table("data", "captions"), "captions")
    captions.loc[captions["kind"] == "full", "text"] = INJECTION
    tables.write_table(run.table("data", "captions"), "captions", captions)
    finish(run, "data")
    _caption(run)
    _finetune(run)
    _evaluate(run, dataset)
    _interpret(run)
    return run


def _caption(run: Run) -> None:
    images = tables.read_table(run.table("data", "images"), "images")
    rows = [
        {
            "caption_id": f"{name}-{kind}", "image_id": name, "kind": kind, "source": "mllm", "conditioned_on": "image",
            "status": "ok", "text": f"{kind} text of {name} <b>bold</b>", "model": "template", "style_id": "s0",
        }
        for name in images["image_id"] for kind in ("identity", "clothing")
    ]  # fmt: skip
    tables.write_table(run.table("caption", "captions"), "captions", pd.DataFrame(rows))
    style = {
        "style_id": "s0",
        "size": 18,
        "instruction": "Short notes, no verbs.",
        "exemplars": ["man, red shirt"],
        "centroid": [0.1],
    }
    tables.write_table(run.table("caption", "styles"), "styles", pd.DataFrame([style]))
    finish(run, "caption")


def _finetune(run: Run) -> None:
    rows = []
    for epoch in range(12):
        common = {"stage": "finetune", "step": epoch * 10, "epoch": epoch, "seconds": float(epoch)}
        for name, scale in (("info", 3.0), ("triplet", 0.6), ("aln", 2.0), ("decouple", 0.05)):
            value = scale * (0.15 + np.exp(-epoch / 4))
            rows += [{**common, "split": "train", "name": f"loss/{name}", "value": value}]
        rows += [{**common, "split": "val", "name": "rank1", "value": 0.8 - 0.7 * np.exp(-epoch / 5)}]
        rows += [{**common, "split": "val", "name": "mAP", "value": 0.6 - 0.5 * np.exp(-epoch / 5)}]
    tables.write_table(run.table("finetune", "history"), "history", pd.DataFrame(rows))
    finish(
        run, "finetune", method="bdam", best_epoch=11, epochs=12, selected_on="val", parameters=3_400_000,
        images_per_second=212.4, data=str(run.stage_dir("data").resolve()),
    )  # fmt: skip


def _evaluate(run: Run, dataset: str) -> None:
    rng = np.random.default_rng(1)
    images = tables.read_table(run.table("data", "images"), "images")
    base = {"standard": 0.62, "chance": 0.12, "histogram": 0.31, "oracle": 0.93, "shuffled": 0.11}
    metrics = [
        {
            "direction": direction, "dataset": dataset, "split": "test", "condition": condition, "metric": metric,
            "value": min(value * factor, 1.0), "low": min(value * factor, 1.0) * 0.93,
            "high": min(min(value * factor, 1.0) * 1.07, 1.0), "queries": 18, "skipped": 1, "gallery": 18,
        }
        for direction in ("t2i", "i2i")
        for condition, value in base.items()
        for metric, factor in (("rank1", 0.8), ("rank5", 1.0), ("rank10", 1.07), ("mAP", 0.65), ("mINP", 0.45))
    ]  # fmt: skip
    tables.write_table(run.table("evaluate", "metrics"), "metrics", pd.DataFrame(metrics))
    person = dict(zip(images["image_id"], images["person_id"], strict=True))
    rankings, queries = [], []
    for query, owner in [(f"{n}-c", p) for n, p in person.items()] + [
        (n, p) for n, p in person.items() if n.endswith("s0")
    ]:
        order = list(rng.permutation(list(person)))
        if rng.random() < 0.5:
            order.sort(key=lambda name: person[name] != owner)
        first = next(place for place, name in enumerate(order, start=1) if person[name] == owner)
        direction = "t2i" if query.endswith("-c") else "i2i"
        common = {"direction": direction, "dataset": dataset, "query_id": query, "condition": "standard"}
        hits = {f"rank{k}": float(first <= k) for k in (1, 5, 10, 20)}
        queries.append(
            {
                **common, "person_id": owner, "matches": 3, "gallery": len(order), "first_match": first,
                "average_precision": 0.5, "inp": 0.3, **hits,
            }
        )  # fmt: skip
        rankings += [
            {**common, "rank": place, "gallery_id": name, "score": 0.9 - 0.03 * place, "match": person[name] == owner}
            for place, name in enumerate(order[:12], start=1)
        ]
    tables.write_table(run.table("evaluate", "rankings"), "rankings", pd.DataFrame(rankings))
    tables.write_table(run.table("evaluate", "queries"), "queries", pd.DataFrame(queries))
    finish(run, "evaluate", notes=["No model can exceed rank-1 99.0 %."])


def _interpret(run: Run) -> None:
    images = tables.read_table(run.table("data", "images"), "images")
    rows = []
    for name in images["image_id"][:8]:
        start = INJECTION.index("red shirt")
        for number, (phrase, begin, end) in enumerate(
            (("red shirt", start, start + 9), ('"quoted"', start - 9, start - 1))
        ):
            grid = np.exp(-((np.arange(8)[:, None] - 2.5 - 3 * number) ** 2 + (np.arange(4)[None] - 1.5) ** 2) / 2)
            rows.append(
                {
                    "query_id": f"{name}-c", "image_id": name, "phrase": phrase, "char_start": begin, "char_end": end,
                    "explainer": "gradcam", "similarity": 0.31, "grid_h": 8, "grid_w": 4,
                    "relevance": (grid / grid.max()).astype(np.float32).ravel(),
                }
            )  # fmt: skip
    tables.write_table(run.table("interpret", "explanations"), "explanations", pd.DataFrame(rows))
    rng = np.random.default_rng(0)
    identity, image = rng.beta(9, 6, 200), rng.beta(30, 28, 200)
    gates = {"identity": identity, "clothing": 1 - identity, "image": image, "text": 1 - image}
    write_gates(run.stage_dir("interpret"), [f"i{n}" for n in range(200)], gates)
    scores = {"pointing": (0.7, 0.6, 0.8), "pointing.random": (0.2, 0.18, 0.22), "pointing.centre": (0.5, 0.4, 0.6)}
    scores |= {
        "pointing.pooled": (1.0, 1.0, 1.0),
        "pointing-random": (0.5, 0.4, 0.6),
        "pointing-centre": (0.2, 0.1, 0.3),
    }
    metrics = {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in scores.items()}
    finish(run, "interpret", metrics=metrics, grounded=16)
