"""`data synth`: render the synthetic benchmark into a run."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.datasets.registry import Write, writer
from reidctl.errors import DataError, ReidctlError
from reidctl.evaluation.origin import mark
from reidctl.runs import Run
from reidctl.stages.counting import count_splits
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

STAGE = "data"


def run(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    layouts: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Render people with known truth and write images, captions and parts.

    Args:
        run: where the stage writes.
        recipe: sections `synth` and `seed` are read; `synth.seed` follows `seed`.
        layouts: formats of public datasets in which the images are laid out too, below `data/layouts/DATASET/FORMAT`.
        workers: processes that render; the result does not depend on it. None: one per core.
        force: render again even if nothing changed.
    """
    config = parse_section(SynthConfig, {"seed": recipe.get("seed", 0), **recipe.get("synth", {})}, "synth")
    writers = {name: writer(name) for name in sorted({name.replace("_", "-") for name in layouts})}
    # Only where it is used: datasets from before it existed stay up to date.
    unused = {"captioned"} if config.captioned in ("both", config.domain) else set()
    settings = {"synth": config.model_dump(mode="json", exclude=unused)}
    current = None if force else run.up_to_date(STAGE, settings, {})
    if current is not None:
        return {**current, "status": "up-to-date", "layouts": _lay_out(run, writers)}
    run.check_writable()
    started = datetime.now(UTC)
    folder = run.stage_dir(STAGE)
    _clear(folder)
    total = config.people * config.images_per_person * len(config.domains)
    with progress("render", total) as advance:
        write_dataset(config, folder, workers=workers or os.cpu_count() or 1, progress=advance)
    outputs = [run.table(STAGE, name) for name in ("images", "captions", "parts")]
    images, captions = (tables.read_table(run.table(STAGE, name), name) for name in ("images", "captions"))
    seconds = (datetime.now(UTC) - started).total_seconds()
    log.info(f"{total} images in {seconds:.1f} s: {60 * total / seconds:,.0f} images per minute")
    record = run.finish(
        STAGE,
        settings=settings,
        inputs={},
        outputs=outputs,
        started=started,
        metrics={"images_per_minute": round(60 * total / seconds)},
        extra={
            "splits": count_splits(images, captions),
            "source": "synthped",
            "rendered": sorted(set(images["dataset"].astype(str))),
        },
    )
    # The dataset is finished whatever becomes of its layouts.
    return {**record, "status": "done", "layouts": _lay_out(run, writers)}


def _lay_out(run: Run, writers: Mapping[str, Write]) -> dict[str, str]:
    """Write every dataset in every layout that is not there yet; return their roots, to be given to `data import`.

    A layout is made under a temporary name, so one that exists is whole. `_clear` removes those of other settings.
    """
    if not writers:
        return {}
    images, captions = (tables.read_table(run.table(STAGE, name), name) for name in ("images", "captions"))
    folder = run.stage_dir(STAGE)
    roots: dict[str, str] = {}
    for dataset in sorted(set(images["dataset"])):
        mine = images[images["dataset"] == dataset].reset_index(drop=True)
        texts = captions[captions["image_id"].isin(mine["image_id"])].reset_index(drop=True)
        for name, write in writers.items():
            home = folder / "layouts" / str(dataset)
            place = home / name.replace(":", "-")
            pointer = home / f"{place.name}.json"
            if not (pointer.is_file() and place.is_dir()):
                _write_layout(write, mine, texts, folder, place, pointer)
            roots[f"{dataset} as {name}"] = (home / json.loads(pointer.read_text())["root"]).as_posix()
    return roots


def _write_layout(
    write: Write, images: pd.DataFrame, captions: pd.DataFrame, source: Path, target: Path, pointer: Path
) -> None:
    temporary = target.with_name(f".{target.name}.part")
    for stale in (temporary, target):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        root = write(images, captions, source, temporary)
    except ReidctlError:
        shutil.rmtree(temporary)
        raise
    # People under the name of a public dataset stay known as rendered wherever the folder goes.
    for folder in {temporary, root if root.is_dir() else root.parent}:
        mark(folder)
    temporary.rename(target)
    # What `data import` takes may be a folder or a file inside the layout.
    tables.write_text(
        pointer, json.dumps({"root": (Path(target.name) / root.relative_to(temporary)).as_posix()}) + "\n"
    )


def _clear(folder: Path) -> None:
    """Remove another configuration's pictures and tables, but only from a folder that this stage made."""
    marker = folder / ".rendered-by-reidctl"
    if (folder / "images").exists() and not marker.is_file():
        raise DataError(
            f"{folder / 'images'} exists and was not rendered by reidctl.", hint="Choose another --run directory."
        )
    # The marker comes first: a kill between the two leaves a folder that may be rendered again.
    tables.write_text(marker, "")
    (folder / "stage.json").unlink(missing_ok=True)
    for name in ("images", "captions", "parts", "identities", "purged"):
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    for name in ("images", "layouts"):
        shutil.rmtree(folder / name, ignore_errors=True)
