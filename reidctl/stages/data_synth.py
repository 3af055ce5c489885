"""`data synth`: render the synthetic benchmark into a run."""

import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reidctl import tables
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.errors import DataError
from reidctl.runs import Run
from reidctl.stages.counting import count_splits
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

STAGE = "data"


def run(run: Run, recipe: Mapping[str, Any], *, workers: int | None = None, force: bool = False) -> dict[str, Any]:
    """Render people with known truth and write images, captions and parts.

    Args:
        run: where the stage writes.
        recipe: sections `synth` and `seed` are read; `synth.seed` follows `seed`.
        workers: processes that render; the result does not depend on it. None: one per core.
        force: render again even if nothing changed.
    """
    config = parse_section(SynthConfig, {"seed": recipe.get("seed", 0), **recipe.get("synth", {})}, "synth")
    settings = {"synth": config.model_dump(mode="json")}
    current = None if force else run.up_to_date(STAGE, settings, {})
    if current is not None:
        return {**current, "status": "up-to-date"}
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
        extra={"splits": count_splits(images, captions), "source": "synthped"},
    )
    return {**record, "status": "done"}


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
    for name in ("images", "captions", "parts"):
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    shutil.rmtree(folder / "images", ignore_errors=True)
