"""`search`: rank the index for a sentence or an image."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.device import resolve_device
from reidctl.embedding import embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import pairwise
from reidctl.methods.base import Method, Task, load_method
from reidctl.pixels import normalise, read_pixels
from reidctl.report.sheet import ranking_sheet
from reidctl.retrieval.exact import search
from reidctl.retrieval.store import read_embeddings
from reidctl.runs import Run, digest
from reidctl.stages.building import give_phrases
from reidctl.stages.index import TABLES, indexed_tasks, model_digest
from reidctl.stages.sources import Source, find_source


def run(
    run: Run,
    *,
    text: str | None = None,
    image: Path | None = None,
    top: int = 10,
    save: Path | None = None,
    rerank: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Return the best items of the run's index for one query.

    A sentence is compared with the vectors that the model gives images for texts; an image is embedded as images are
    compared with images, and compared with the index's vectors of that kind. Most models have one vector for both.

    Args:
        run: with a trained model and an index made by it.
        text: what to look for; exactly one of `text` and `image`.
        image: a picture of the person to look for.
        top: how many results.
        save: also draw the results as a PNG here.
        rerank: let the model's match head order the first so many items of a sentence; reads their images. Their
            `score` is then 2 + match probability.
        device: where to compute.

    Raises:
        UsageError: not exactly one query, or re-ranking of an image query or by a model without a match head.
        DataError: no index, one made by another model, or one without the vectors that an image is compared with.
    """
    if (text is None) == (image is None):
        raise UsageError("Give either a sentence or --image, not both and not none.")
    if text is not None and not text.strip():
        raise UsageError("The sentence is empty.")
    if rerank is not None and text is None:
        raise UsageError("--rerank asks whether an image fits a sentence; an image query has none.")
    deep = None if rerank is None else pairwise.Pairwise(rerank)
    started = time.monotonic()
    record = run.require("index")
    _table(run, record, "t2i")  # before a model is loaded
    target = resolve_device(device)
    method = load_method(run.stage_dir("finetune"), target)
    task: Task = "i2i" if image is not None and "i2i" in method.tasks else "t2i"
    stored = read_embeddings(_table(run, record, task))
    names, people = stored.rows["item_id"], stored.rows["person_id"]
    if deep is not None:
        pairwise.check(method, deep, len(stored), "the index")
        give_phrases(run, _source(run), method)
    query = _query(method, text, image, target)
    found, cosines = search(query, stored.vectors, top=max(top, rerank or 0), gallery_id=names)
    rows, scores = found[0], cosines[0].astype(np.float64)
    paths = _paths(run, record)
    if deep is not None:
        files = [paths[str(names[row])] for row in rows[: deep.depth]]
        rows, scores = _by_pairs(method, str(text), files, rows, scores, target)
    results: list[dict[str, Any]] = [
        {
            "rank": place + 1,
            "image_id": str(names[row]),
            "person_id": str(people[row]),
            "score": float(score),
            "path": str(paths[str(names[row])]),
        }
        for place, (row, score) in enumerate(zip(rows[:top], scores[:top], strict=True))
    ]
    if save is not None:
        shown = [(Path(hit["path"]), hit["image_id"], hit["score"], None) for hit in results]
        ranking_sheet(text if text is not None else Path(str(image)), shown, save)
    return {
        "stage": "search",
        "status": "done",
        "outputs": {str(save): {}} if save else {},
        "metrics": {"gallery": len(stored)},
        **({"rerank": deep.name} if deep is not None else {}),
        "seconds": round(time.monotonic() - started, 3),
        "query": text if text is not None else str(image),
        "results": results,
    }


def _source(run: Run) -> Source | None:
    """The run's dataset; a search can do without."""
    try:
        return find_source(run)
    except DataError:
        return None


def _table(run: Run, record: dict[str, Any], task: Task) -> Path:
    """Where the index keeps the vectors of a task.

    Raises:
        DataError: it has none, or another model made them.
    """
    path, model = run.table("index", TABLES[task]), model_digest(run)
    if task not in indexed_tasks(record) or (task == "i2i" and not path.is_file()):
        raise DataError(
            "The index lacks the vectors by which this model compares images with images.",
            hint="Run `reidctl index --force` again.",
        )
    # The record speaks of the stage, the footer of the table itself; older tables have no `model`.
    if {record["model_sha256"], tables.footer(path).get("model", model)} != {model}:
        raise DataError("The index was made by another model than the run's.", hint="Run `reidctl index` again.")
    return path


def _query(method: Method, text: str | None, image: Path | None, device: torch.device) -> np.ndarray[Any, Any]:
    if text is not None:
        return embed_queries(method, [text], device=device)
    assert image is not None
    if method.gallery_texts:
        raise UsageError(f"`{method.name}` with this protocol reads a text beside each image; search by text instead.")
    backbone = method.backbone
    picture = read_pixels(image, backbone.image_size, backbone.interpolation)
    pixels = normalise(picture[None], backbone.mean, backbone.std)
    with torch.inference_mode():
        made = method.embed_tasks(Batch(image=pixels.to(device)))
        found: np.ndarray[Any, Any] = made.get("i2i", made["t2i"]).float().cpu().numpy()
    return found


def _by_pairs(
    method: Method,
    text: str,
    files: list[Path],
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    device: torch.device,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Put the items that `files` show in the match head's order, equal ones in the order that they had."""
    count = len(files)
    odds = pairwise.score_pairs(method, files, [text], np.arange(count)[None], device=device)
    order = np.argsort(-odds[0], kind="stable")
    scored = pairwise.shown_score(odds[0][order])
    return np.concatenate([rows[order], rows[count:]]), np.concatenate([scored, scores[count:]])


def _paths(run: Run, record: dict[str, Any]) -> dict[str, Path]:
    """Where every indexed image lies."""
    root = Path(record["data"])
    if record["own_images"]:
        return _OwnPaths(root)
    # The run's own data first: a run directory may have been moved since it was indexed.
    for folder in (run.stage_dir("data"), root):
        table = folder / "images.parquet"
        if table.is_file() and digest(table) == record["inputs"]["images"]:
            root = folder
            break
    else:
        raise DataError("The images that were indexed are gone or have changed.", hint="Run `reidctl index` again.")
    images = tables.read_table(root / "images.parquet", "images", ["image_id", "path"])
    return {name: root / path for name, path in zip(images["image_id"], images["path"], strict=True)}


class _OwnPaths(dict[str, Path]):
    """Own images are named by their path below the folder."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        return self.root / name
