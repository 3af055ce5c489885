"""`index`: embed a gallery with a trained model."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from reidctl import tables
from reidctl.console import progress
from reidctl.data import Corpus, build_corpus
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery_tasks
from reidctl.errors import DataError
from reidctl.methods.base import Task, load_method
from reidctl.retrieval.store import Stored, read_embeddings
from reidctl.runs import Run
from reidctl.stages.sources import find_source

STAGE = "index"
TABLES: Mapping[Task, str] = {"t2i": "embeddings", "i2i": "embeddings_i2i"}
"""The tables of an index by task; there is no second one where images have one vector."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def model_digest(run: Run) -> str:
    """Return what identifies the run's trained model; an index remembers it.

    Raises:
        DataError: nothing was trained in this run.
    """
    outputs = run.require("finetune")["outputs"]
    return str(outputs["finetune/model.safetensors"]["sha256"])


def training_digest(run: Run) -> str:
    """Return what identifies the training behind the model: other people, rules of selection, ... give another one.

    Two trainings can end with the same weights, yet what may be measured with them, and what must be said, differs.

    Raises:
        DataError: nothing was trained in this run.
    """
    return str(run.require("finetune")["fingerprint"])


def run(
    run: Run,
    *,
    split: str = "test",
    images: Path | None = None,
    batch: int = 128,
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Embed the images of a split, or of a folder, and write the `embeddings` table.

    Only images, and texts written from these very images, are read: no query can reach the gallery. Where a method
    compares images with images by other vectors than with texts, those are a second table, `embeddings_i2i`.

    Args:
        run: where the trained model is and the stage writes.
        split: which images of the dataset; `all` for every one.
        images: a folder of own images instead.
        batch: images per forward pass.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: texts written from the images, for methods that read one.
        force: embed again even if nothing changed.
    """
    target = resolve_device(device)
    weights = model_digest(run)
    if images is not None:
        corpus, inputs = _folder(images)
        folder = images
    else:
        source = find_source(run, data, captions)
        whole = source.corpus()
        corpus = whole if split == "all" else whole.of_split(split)
        inputs, folder = source.digests(), source.folder
    settings: Mapping[str, Any] = {"split": split, "images": str(images) if images else None, "model": weights}
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    run.unfinish(STAGE)
    method = load_method(run.stage_dir("finetune"), target)
    with progress("index", len(corpus.images)) as advance:
        vectors = embed_gallery_tasks(method, corpus, device=target, batch=batch, advance=advance)
    preprocessing = {
        "image_size": list(method.backbone.image_size),
        "mean": list(method.backbone.mean),
        "std": list(method.backbone.std),
    }
    # A table says what it is even when it is copied out of the run.
    facts = {"model": weights, "split": "own" if images is not None else split, "preprocessing": preprocessing}
    several = len(method.tasks) > 1
    run.table(STAGE, TABLES["i2i"]).unlink(missing_ok=True)  # an earlier model may have had one
    outputs = []
    for task in method.tasks:
        outputs.append(run.table(STAGE, TABLES[task]))
        tables.write_table(
            outputs[-1],
            "embeddings",
            label_rows(corpus.images),
            matrices={"embedding": vectors[task]},
            facts={**facts, "task": task} if several else facts,
        )
    seconds = (datetime.now(UTC) - started).total_seconds()
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics={
            "images": len(vectors["t2i"]),
            "dimensions": int(vectors["t2i"].shape[1]),
            "images_per_second": round(len(vectors["t2i"]) / max(seconds, 1e-9), 1),
        },
        extra={
            "data": str(folder.resolve()),
            "own_images": images is not None,
            "split": split,
            "model_sha256": weights,
            "preprocessing": preprocessing,
            **({"tasks": list(method.tasks)} if several else {}),
        },
    )
    return {**record, "status": "done"}


def indexed_tasks(record: Mapping[str, Any]) -> tuple[Task, ...]:
    """Return the tasks whose vectors an index holds, from its record."""
    return tuple(record.get("tasks", ("t2i",)))


def read_index(run: Run, record: Mapping[str, Any]) -> Stored:
    """Return all vectors of an index.

    Raises:
        DataError: a table is missing or damaged.
    """
    held = {task: read_embeddings(run.table(STAGE, TABLES[task])) for task in indexed_tasks(record)}
    return Stored(held["t2i"], held.get("i2i", held["t2i"]))


def label_rows(images: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the `embeddings` table for images (N rows), without the vectors."""
    return pd.DataFrame(
        {
            "item_id": images["image_id"],
            "role": images["role"].fillna("gallery"),
            "modality": "image",
            "condition": "standard",
            "dataset": images["dataset"],
            "split": images["split"],
            "person_id": images["person_id"],
            "camera_id": images["camera_id"],
        }
    )


def _folder(folder: Path) -> tuple[Corpus, dict[str, str]]:
    """A folder of pictures as a corpus without people: searchable, not measurable."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images.")
    root = folder.resolve()
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    outside = [file for file in files if not file.resolve().is_relative_to(root)]
    if outside:
        raise DataError(f"{outside[0]} points outside {folder}.", hint="Copy the image into the folder.")
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))}).")
    rows = []
    listing = hashlib.sha256()
    for file in files:
        name = _readable(file.relative_to(root).as_posix(), folder)
        facts = file.stat()
        listing.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        rows.append({"image_id": name, "path": name, **_size(file)})
    frame = pd.DataFrame(rows)
    for column, value in {"dataset": "own", "split": "own", "sha256": "", "role": "gallery"}.items():
        frame[column] = value
    frame["person_id"] = ["own:" + name for name in frame["image_id"]]
    for column in ("camera_id", "outfit_id", "attributes"):
        frame[column] = None
    return build_corpus(frame, tables.empty("captions"), None, root), {"listing": listing.hexdigest()}


def _readable(name: str, folder: Path) -> str:
    """The name, which must be text because it becomes the image's id."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"The file name {name!a} in {folder} is not UTF-8 text.", hint="Rename the file.") from None
    return name


def _size(file: Path) -> dict[str, int]:
    try:
        with Image.open(file) as image:
            return {"width": image.width, "height": image.height}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Image {file} cannot be read ({error}).", hint="Remove it from the folder.") from None
