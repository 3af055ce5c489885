"""`interpret`: which image regions a phrase rests on, how well that fits true parts, and the method's gates."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.console import log, progress
from reidctl.data import Corpus
from reidctl.device import resolve_device
from reidctl.errors import UsageError
from reidctl.explain.grounding import PartNames, find_mask, part_names, score_explanations, summarise_grounding
from reidctl.explain.maps import explain_phrases, grid_map, named_rows, pair_batch, pick_phrases
from reidctl.explain.pictures import draw_explanation
from reidctl.methods.base import Explainer, Method, load_method
from reidctl.pixels import PixelStore, read_pixels
from reidctl.report.figures import gate_histograms
from reidctl.runs import Run, digest
from reidctl.stages.sources import Source, find_source

STAGE = "interpret"
_GATE_IMAGES = 2000

Gates = dict[str, npt.NDArray[np.float64]]


def run(
    run: Run,
    *,
    data: Path | None = None,
    captions: Path | None = None,
    samples: int = 100,
    explainer: str = "gradcam",
    phrase: str | None = None,
    split: str = "test",
    pictures: int = 24,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Explain phrases of test captions on their images; score the maps where true part masks exist; plot the gates.

    Writes `explanations.parquet`, `pictures/*.png`, and where they apply `grounding.csv` (every score and control of
    every phrase) and `gates.json` with `gates.png`, `.svg` and `.csv`.

    Args:
        run: holds the trained model; where the stage writes.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        samples: how many captions, drawn at random.
        explainer: `gradcam` or `patch`, see `Method.explain`.
        phrase: explain this text on `samples` random images instead of the captions' own phrases.
        split: whose captions and images.
        pictures: how many maps are also drawn as PNG, in the order of the table.
        seed: of the draw.
        device: where to compute.
        force: do it again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`; `metrics` holds `{value, low, high}` by score.

    Raises:
        UsageError: an unknown explainer or device, or an empty phrase.
        DataError: no trained model, no dataset, no captions.
    """
    chosen = _check(explainer, phrase)
    target = resolve_device(device)
    run.require("finetune")
    source = find_source(run, data, captions)
    inputs = {**source.digests(), "model": digest(run.stage_dir("finetune") / "model.safetensors")}
    if source.parts.is_file():
        inputs["parts"] = digest(source.parts)
    settings = {
        "seed": seed,
        "interpret": {
            "samples": samples, "explainer": explainer, "phrase": phrase, "split": split, "pictures": pictures
        },
    }  # fmt: skip
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    method = load_method(run.stage_dir("finetune"), target)
    corpus = source.corpus().of_split(split)
    run.unfinish(STAGE)
    folder = run.stage_dir(STAGE)
    _clear(folder)
    written = tables.read_table(source.captions, "captions") if source.captions.is_file() else tables.empty("captions")
    phrases = pick_phrases(corpus, written, samples=samples, seed=seed, phrase=phrase)
    with progress("explain", len(phrases), unit="phrases") as advance:
        table = explain_phrases(method, corpus, phrases, explainer=chosen, device=target, advance=advance)
    outputs = [folder / "explanations.parquet"]
    tables.write_table(outputs[0], "explanations", table)
    parts, names = _parts(source, corpus), part_names(written)
    scores = score_explanations(table, parts, corpus.images, names) if len(parts) else pd.DataFrame()
    if len(scores):
        outputs.append(_write_csv(folder / "grounding.csv", scores))
    outputs += _draw(folder / "pictures", table, corpus, parts, names, pictures)
    gates = collect_gates(method, corpus, device=target, seed=seed)
    outputs += write_gates(folder, gates[0], gates[1])
    metrics: dict[str, Any] = {name: asdict(entry) for name, entry in summarise_grounding(scores, seed=seed).items()}
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics=metrics,
        extra={
            "explained": len(table),
            "grounded": len(scores),
            "gates": gate_summary(gates[1]),
            "pictures": min(pictures, len(table)),
        },
    )
    return {**record, "status": "done"}


def _check(explainer: str, phrase: str | None) -> Explainer:
    known: tuple[Explainer, ...] = get_args(Explainer)
    chosen = next((name for name in known if name == explainer), None)
    if chosen is None:
        raise UsageError(f"Unknown explainer `{explainer}`.", hint=f"One of: {', '.join(known)}.")
    if phrase is not None and not phrase.strip():
        raise UsageError("The phrase is empty.", hint="Give words: --phrase 'red shirt'.")
    return chosen


def _clear(folder: Path) -> None:
    """Remove what an earlier run of this stage may have left and this one may not write."""
    stale = [folder / "grounding.csv", *folder.glob("gates.*"), *(folder / "pictures").glob("*.png")]
    for path in stale:
        path.unlink(missing_ok=True)


def _parts(source: Source, corpus: Corpus) -> pd.DataFrame:
    if not source.parts.is_file():
        log.info("The dataset has no true part masks: the maps are drawn but not scored.")
        return tables.empty("parts")
    parts = tables.read_table(source.parts, "parts")
    return parts[parts["image_id"].isin(set(corpus.images["image_id"]))]


def _write_csv(path: Path, frame: pd.DataFrame) -> Path:
    text = StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    tables.write_text(path, text.getvalue())
    return path


def _draw(
    folder: Path, table: pd.DataFrame, corpus: Corpus, parts: pd.DataFrame, names: PartNames, count: int
) -> list[Path]:
    """The first maps of the table as PNG; a thousand pictures would help nobody."""
    facts = {row.image_id: row for row in named_rows(corpus.images)}
    written = []
    for number, row in enumerate(named_rows(table.head(count))):
        image: Any = facts[row.image_id]
        size = (int(image.height), int(image.width))
        of_image = named_rows(parts[parts["image_id"] == row.image_id])
        name = names.get((row.query_id, int(row.char_start), int(row.char_end)))
        truth = find_mask(str(row.phrase), of_image, size, name=name)
        path = folder / f"{number + 1:03d}.png"
        note = f"{row.image_id}   cos {row.similarity:.3f}   {row.explainer}"
        picture = read_pixels(corpus.root / str(image.path), size)
        draw_explanation(picture, grid_map(row), str(row.phrase), path, note=note, truth=truth)
        written.append(path)
    return written


def collect_gates(
    method: Method, corpus: Corpus, *, device: torch.device, seed: int = 0, batch: int = 64
) -> tuple[list[str], Gates]:
    """Return image ids and each gate's mean per image, shape (S,); no gates for methods that have none.

    At most 2,000 images of the corpus, drawn at random. A gate `identity` brings its complement `clothing` = 1 -
    `identity`, which the papers plot as if it were a second measurement. Texts written from the image alone are
    handed over where every image has one.
    """
    rows = np.sort(np.random.default_rng((seed, 13)).permutation(len(corpus.images))[:_GATE_IMAGES])
    store = PixelStore(
        corpus.paths(),
        method.backbone.image_size,
        cache_bytes=0,
        interpolation=method.backbone.interpolation,
    )
    pieces: list[Mapping[str, npt.NDArray[np.float64]]] = []
    for start in range(0, len(rows), batch):
        some = [int(row) for row in rows[start : start + batch]]
        given = _with_identity_text(method, corpus, some, pair_batch(method, corpus, some, None, store)).to(device)
        with torch.inference_mode():
            found = method.gates(given)
        if not found:
            return [], {}
        pieces.append({name: value.double().flatten(1).mean(1).cpu().numpy() if value.ndim > 1 else
                       value.double().cpu().numpy() for name, value in found.items()})  # fmt: skip
    gates: Gates = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}
    if "identity" in gates and "clothing" not in gates:
        names = list(gates)
        gates["clothing"] = 1 - gates["identity"]
        gates = {name: gates[name] for name in ("identity", "clothing", *names[1:])}
    return [str(name) for name in corpus.images["image_id"].iloc[rows]], gates


def _with_identity_text(method: Method, corpus: Corpus, rows: list[int], batch: Batch) -> Batch:
    texts = corpus.identity
    if "identity" in batch.texts or not all(texts[row] for row in range(len(texts))):
        return batch
    batch.texts["identity"] = method.backbone.tokenize([str(texts[row]) for row in rows])
    return batch


def gate_summary(gates: Gates) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of each gate over the samples."""
    return {name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in gates.items()}


def write_gates(folder: Path, images: list[str], gates: Gates) -> list[Path]:
    """Write `gates.json` (every sample) and the histogram as PNG, SVG and CSV; nothing without gates."""
    if not gates:
        return []
    rule = f"Mean activation of each gate per image, over {len(images):,} images of the split."
    if "clothing" in gates:
        rule += (
            " The clothing gate is one minus the identity gate by construction: it carries no information of its own."
        )
    samples = [
        {"image_id": image, **{name: round(float(values[row]), 6) for name, values in gates.items()}}
        for row, image in enumerate(images)
    ]
    path = folder / "gates.json"
    described = {"rule": rule, "summary": gate_summary(gates), "samples": samples}
    tables.write_text(path, json.dumps(described, indent=1) + "\n")
    return [path, *gate_histograms(gates, folder / "gates")]
