"""`data import`: read a public dataset, a folder or a table into a run; images stay where they are."""

import os
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.datasets.base import Draft, Options, listing_digest, measure
from reidctl.datasets.registry import reader, supported_options
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.origin import is_rendered
from reidctl.runs import Run, digest
from reidctl.stages.counting import count_splits

STAGE = "data"


def run(
    run: Run,
    *,
    format: str,
    root: Path,
    seed: int = 0,
    force: bool = False,
    carve_val: int = 0,
    skip_bad: bool = False,
    name: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    images: Path | None = None,
    descriptions: Path | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Write `images` and `captions` of a dataset; see `datasets.base.Options` for the choices.

    Returns:
        The stage's record with `status` (done, up-to-date), `splits`, `notes`, `root`, `known_people`, `described`
        (whether texts that a model wrote from the images came with them) and `rendered` (the dataset's name if `data
        synth` made the images, as the layout's marker tells).

    Raises:
        UsageError: an unknown format, or an option that this format does not have.
        DataError: whatever is wrong with the dataset.
    """
    options = Options(seed, carve_val, skip_bad, name, fractions, images, workers, descriptions)
    _check_options(format, options)
    if not os.path.exists(root):
        raise DataError(f"{root} does not exist.", hint="Give the folder that holds the dataset.")
    started = datetime.now(UTC)
    if name is not None:
        _check_name(name)
    try:
        draft = reader(format)(root, options)
    except PermissionError as error:
        raise DataError(f"{error.filename or root} may not be read.", hint="Fix its permissions.") from None
    _check_name(draft.dataset)
    splits = {entry.split for entry in draft.entries}
    if "train" in splits and "val" not in splits and "carve_val" in supported_options(format):
        draft.notes.append("No validation split: `--carve-val N` takes N people out of train, which `finetune` needs.")
    if descriptions is not None:
        from reidctl.datasets.descriptions import attach

        draft = attach(draft, descriptions)
    settings = _settings(format, root, options)
    inputs = _inputs(draft) | ({"descriptions": digest(descriptions)} if descriptions is not None else {})
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    run.check_writable()
    imported = measure(draft, options)
    run.unfinish(STAGE)
    made = {"images": imported.images, "captions": imported.captions}
    for table, frame in made.items():
        tables.write_table(run.table(STAGE, table), table, frame)
    # Tables of a rendered or combined dataset that this import replaces do not belong to these images.
    for table in ("parts", "identities", "purged"):
        run.table(STAGE, table).unlink(missing_ok=True)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, table) for table in made],
        started=started,
        extra={
            "splits": count_splits(imported.images, imported.captions),
            "notes": imported.notes,
            "root": root.resolve().as_posix(),
            "source": format,
            "known_people": draft.known_people,
            "described": _described(imported.captions),
            "rendered": [draft.dataset] if is_rendered({root, *(e.path.parent for e in draft.entries)}) else [],
        },
    )
    return {**record, "status": "done"}


def _check_options(format: str, options: Options) -> None:
    """An option that a format would ignore is a mistake, not a wish."""
    heeded = supported_options(format) | {"seed", "skip_bad", "workers", "descriptions"}
    for option in fields(Options):
        if getattr(options, option.name) != option.default and option.name not in heeded:
            raise UsageError(f"The format {format} does not have the option `{option.name.replace('_', '-')}`.")


def _check_name(name: str) -> None:
    """Ids are `<dataset>:<name>`: a colon or slash in the first part would make ids of two datasets equal."""
    if not name.strip() or any(letter in ":/\\" or not letter.isprintable() for letter in name):
        raise UsageError(
            f"{name!r} cannot be the name of a dataset: it must not be empty or hold colons, slashes or control "
            "characters.",
            hint="Give another with --name.",
        )


def _described(captions: pd.DataFrame) -> bool:
    """Whether there are identity and clothing texts written from the images alone: what `caption` would make."""
    mine = captions[(captions["conditioned_on"] == "image") & (captions["status"] == "ok")]
    return {"identity", "clothing"} <= set(mine["kind"])


def _settings(format: str, root: Path, options: Options) -> dict[str, Any]:
    return {
        "format": format.replace("_", "-"),
        "root": root.resolve().as_posix(),
        "seed": options.seed,
        "carve_val": options.carve_val,
        "skip_bad": options.skip_bad,
        "name": options.name,
        "fractions": list(options.fractions) if options.fractions else None,
        "images": options.images.resolve().as_posix() if options.images else None,
    }


def _inputs(draft: Draft) -> dict[str, str]:
    """Digests of the annotation file and of the images' names, sizes and times: no image is opened."""
    found = {"images": listing_digest(draft)}
    if draft.annotation is not None:
        found["annotation"] = digest(draft.annotation)
    return found
