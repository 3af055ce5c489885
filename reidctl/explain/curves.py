"""Deletion and insertion: how fast the target is lost, or found, when patches go, or come, in the map's order.

    y(f) = exp(s_f / τ) / (exp(s_f / τ) + Σ_{j ≠ target} exp(s_j / τ)),   area = ∫ y df  over f from 0 to 1

s_f is the query's score with the masked target. Petsiuk et al. 2018 (RISE), arXiv:1806.07421, with the softmax over the
gallery in place of class probabilities, so that y lies in [0, 1] and an area does too. Low deletion and high insertion
are good.
"""

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from reidctl.errors import DataError, UsageError
from reidctl.explain.controls import Ints, Key, plan_keys
from reidctl.explain.masking import (
    Advance,
    Chunk,
    Floats,
    Parts,
    Study,
    gallery_scores,
    masked_scores,
    run_chunks,
)
from reidctl.explain.summaries import summary_rows
from reidctl.retrieval.products import lattice

SUBSTRATES = ("mean", "zero", "blur", "noise")
TEMPERATURE = 0.02


def area(y: Floats, x: Floats) -> Floats:
    """Return the trapezoid area under curves, divided by the length of x, shape (...,).

    Args:
        y: heights, shape (..., S).
        x: increasing places, shape (S,).
    """
    return np.asarray(((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(axis=-1) / (x[-1] - x[0]))


def count_curve_images(study: Study, *, steps: int = 11) -> int:
    """Return what `measure_curves` advances by in total."""
    return len(study.pairs) * _images(study, steps)


def _images(study: Study, steps: int) -> int:
    return 2 * steps * study.orders


def measure_curves(
    study: Study,
    *,
    steps: int = 11,
    fill: str = "mean",
    temperature: float = TEMPERATURE,
    chunk: int | None = None,
    folder: Path | None = None,
    key: str = "",
    advance: Advance | None = None,
) -> pd.DataFrame:
    """Return the areas of every pair, explainer and control, draws averaged.

    Columns: query_id, image_id, person_id, judge, explainer, control, fill, deletion, insertion. Rows that lack a map
    are left out; see `counterfactual.measure`, whose arguments `chunk`, `folder`, `key` and `advance` mean the same.

    Args:
        study: who judges which maps; the plan's controls, draws and seed are used, its fractions and fills are not.
        steps: fractions from 0 to 1 at which a curve is measured.
        fill: the substrate, one of `SUBSTRATES`.
        temperature: of the softmax over the gallery, > 0; 0.02 is the one that most methods here are trained with.

    Raises:
        UsageError: the fill is no substrate, or steps or temperature are out of range.
        DataError: see `counterfactual.measure`.
    """
    if fill not in SUBSTRATES:
        raise UsageError(f"The fill `{fill}` is no substrate of a curve.", hint=f"Known: {', '.join(SUBSTRATES)}.")
    if steps < 2 or not temperature > 0:
        raise UsageError(f"A curve of {steps} steps at temperature {temperature}.", hint="Give 2 or more, above 0.")
    study = replace(study, plan=replace(study.plan, fills=(fill,), scope="target"))
    gallery = lattice(study.pairs.gallery, torch.device("cpu"))
    keys = list(dict.fromkeys(plan_keys(study.plan, list(study.maps), study.others)))
    frames = []
    for rows, areas in run_chunks(
        study,
        lambda made, step: _measure_chunk(study, made, gallery, steps, temperature, step),
        Parts("npy", _read, _write),
        images=_images(study, steps),
        chunk=chunk,
        folder=folder,
        key=("curves", key, steps, temperature),
        advance=advance,
    ):
        frames.append(_frame(study, rows, dict(zip(keys, areas, strict=True))))
    columns = ["query_id", "image_id", "person_id", "judge", "explainer", "control", "fill", "deletion", "insertion"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _measure_chunk(
    study: Study, chunk: Chunk, gallery: Tensor, steps: int, temperature: float, advance: Advance
) -> Floats:
    """Areas of deletion and insertion for each key of the orders, draws averaged, shape (keys, p, 2)."""
    patches = study.grid[0] * study.grid[1]
    counts = np.floor(np.linspace(0, patches, steps) + 0.5).astype(np.int64)
    gone = chunk.orders.place[:, :, None] < counts[:, None]  # (p, K, S, N)
    rest = _log_rest(study, chunk, gallery, temperature)[:, None, None]
    found = []
    for removed in (gone, ~gone):
        scores = masked_scores(study, chunk, study.plan.fills[0], removed, advance)
        found.append(area(1 / (1 + np.exp(rest - scores / temperature)), counts / patches))  # (p, K)
    both = np.stack(found, axis=-1)
    return np.stack([both[:, slot].mean(axis=1) for slot in chunk.orders.slots().values()])


def _log_rest(study: Study, chunk: Chunk, gallery: Tensor, temperature: float) -> Floats:
    """log Σ exp(s_j / τ) over the gallery without the target, shape (p,)."""
    scores = gallery_scores(study.pairs.query[chunk.rows], gallery) / temperature
    scores[np.arange(len(scores)), study.pairs.target[chunk.rows]] = -np.inf
    top = scores.max(axis=1)
    if not np.isfinite(top).all():
        raise DataError("A gallery of one image has no other image to compare with.")
    return np.asarray(top + np.log(np.exp(scores - top[:, None]).sum(axis=1)))


def _frame(study: Study, rows: Ints, areas: Mapping[Key, Floats]) -> pd.DataFrame:
    pairs, pieces = study.pairs, []
    for explainer in study.maps:
        here = ~np.isnan(areas[explainer, ""][:, 0])
        for control in ("", *study.plan.controls):
            values = areas.get((explainer, control), areas.get(("", control)))
            if values is None:
                continue
            kept = here & ~np.isnan(values[:, 0])
            facts = {"row": rows[kept], "explainer": explainer, "control": control}
            pieces.append(pd.DataFrame({**facts, "deletion": values[kept, 0], "insertion": values[kept, 1]}))
    frame = pd.concat(pieces).sort_values("row", kind="stable", ignore_index=True)
    row = frame["row"].to_numpy()
    names = {name: np.asarray(getattr(pairs, name), object)[row] for name in ("query_id", "image_id", "person_id")}
    return frame.assign(**names, judge=study.judge.name, fill=study.plan.fills[0])


def _read(path: Path) -> Floats:
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}).", hint="Delete it and run again.") from None


def _write(path: Path, areas: Floats) -> None:
    """Write a part whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, areas, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error}.", hint="Is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def summarise_curves(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the rows of table `interpretability` for the metrics `deletion` and `insertion`; `removed` is NaN."""
    return summary_rows(frame.assign(removed=np.nan), ("deletion", "insertion"), seed=seed)
