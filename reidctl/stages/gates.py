"""Gate activations of many images: collected, summed up and drawn."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.data import Corpus
from reidctl.explain.maps import pair_batch
from reidctl.methods.base import Method
from reidctl.pixels import PixelStore
from reidctl.report.figures import gate_histograms

_GATE_IMAGES = 2000

Gates = dict[str, npt.NDArray[np.float64]]


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
