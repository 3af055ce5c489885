"""The features of a split kept in the run, so that a second analysis need not look at a picture again.

`RUN/features/KEY/` holds one `NAME.npy` for each feature and, written last, `facts.json`. The key is a digest of the
model, the images table, the images that were read and whatever a method reads beside their pixels. An entry that is
damaged, or holds another model's features, is never read.
"""

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from reidctl import tables
from reidctl.console import log
from reidctl.data import Corpus, camera_names
from reidctl.errors import DataError
from reidctl.methods.base import Method
from reidctl.runs import digest, fingerprint
from reidctl.stages.features import Features, Rows, collect_features
from reidctl.stages.measuring import Subject

FORMAT = 1
"""Another number for another meaning of the files, or of what a method calls its features."""
FOLDER, FACTS = "features", "facts.json"
_KEY = re.compile(r"[0-9a-f]{32}")
_ABANDONED_S = 3600.0  # a writer that left its temporary folder alone for so long is dead


class _Damaged(Exception):
    """A kept file that cannot be used; says why."""


@dataclass(frozen=True)
class Kept:
    """The features of images.

    Attributes:
        features: by name, each (N, D).
        key: of the entry that holds them, or would.
        cached: whether they were read instead of computed.
    """

    features: Features
    key: str
    cached: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of an analysis says about them."""
        return {"cached": self.cached, "key": self.key}


def kept_features(subject: Subject, corpus: Corpus, *, cache: bool = True) -> Kept:
    """Return the features of the images of a part of the subject's split, from the run where it keeps them.

    What is computed is kept, and what other models left behind goes. A part of what is kept is read too; its last bits
    may differ from those of another batch. A run that cannot be written is no error, only a warning.

    Args:
        subject: the model, and the run that keeps its features.
        corpus: the images.
        cache: whether to read and to keep.

    Raises:
        DataError: see `collect_features`.
    """
    images, folder = _inputs(subject.method, corpus), subject.run.path / FOLDER
    about = {"format": FORMAT, "model": subject.weights, "images_table": digest(subject.source.images)}
    key = fingerprint({**about, "images": list(images.items())}, {})[:32]
    if cache:
        found = _find(folder, key, about, images)
        if found is not None:
            log.info(f"features: read {len(images):,} images from {folder / found.key}")
            return found
    features = collect_features(subject.method, corpus, device=subject.device)
    if cache and len(images) == len(corpus.images):
        facts = {**about, "split": subject.split, "method": subject.method.name, "images": images}
        _keep(folder, key, facts, features)
    return Kept(features, key, False)


def _inputs(method: Method, corpus: Corpus) -> dict[str, str]:
    """A digest of what is read of each image, by its id and in the order of the corpus."""
    names = [str(name) for name in corpus.images["image_id"]]
    read = [corpus.images["sha256"].astype(str).tolist()]
    read += [[str(name) for name in camera_names(corpus.images)]] if method.cameras else []
    read += [[str(text) for text in getattr(corpus, kind)] for kind in method.gallery_texts]
    lines = (json.dumps(parts) for parts in zip(names, *read, strict=True))
    return {name: hashlib.sha256(line.encode()).hexdigest()[:16] for name, line in zip(names, lines, strict=True)}


# Reading


def _find(folder: Path, key: str, about: dict[str, Any], images: dict[str, str]) -> Kept | None:
    """The features from the entry of exactly these images, else from one that holds them among others."""
    for entry in sorted(_entries(folder), key=lambda path: (path.name != key, path.name)):
        try:
            facts = _read_facts(entry)
            rows = _rows(facts, about, images)
            if rows is not None:
                return Kept(_read(entry, facts, rows), entry.name, True)
        except _Damaged as error:
            log.warning(f"{entry} is damaged ({error}): it is removed, and features are computed again.")
            shutil.rmtree(entry, ignore_errors=True)
    return None


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if _KEY.fullmatch(path.name) and path.is_dir())


def _read_facts(entry: Path) -> dict[str, Any]:
    try:
        facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Damaged(f"{FACTS}: {error}") from None
    if not isinstance(facts, dict):
        raise _Damaged(f"{FACTS} holds no facts")
    return facts


def _rows(facts: dict[str, Any], about: dict[str, Any], images: dict[str, str]) -> Rows | None:
    """Where an entry holds the images; None if it is about something else, or lacks one."""
    if any(facts.get(name) != value for name, value in about.items()):
        return None
    held = facts.get("images")
    if not isinstance(held, dict) or not isinstance(facts.get("features"), dict):
        raise _Damaged(f"{FACTS} is incomplete")
    if any(held.get(name) != value for name, value in images.items()):
        return None
    place = {name: row for row, name in enumerate(held)}
    return np.array([place[name] for name in images], np.int64)


def _read(entry: Path, facts: dict[str, Any], rows: Rows) -> Features:
    found, count = {}, len(facts["images"])
    for name, about in facts["features"].items():
        path = entry / f"{name}.npy"
        try:
            if digest(path) != about["sha256"]:
                raise _Damaged(f"{path.name} is not what was written")
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (DataError, OSError, ValueError, TypeError, KeyError) as error:
            raise _Damaged(f"{path.name}: {error}") from None
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != count:
            raise _Damaged(f"{path.name} holds {values.dtype} {values.shape}")
        found[name] = np.asarray(values[rows])
    return found


# Writing


def _keep(folder: Path, key: str, facts: dict[str, Any], features: Features) -> None:
    """Keep features under their key; a folder under another name becomes the entry when all of it is written."""
    temporary = folder / f".{key}.{secrets.token_hex(4)}.tmp"
    written = {}
    try:
        _clear(folder, facts)
        for name, values in features.items():
            payload = BytesIO()
            np.save(payload, np.ascontiguousarray(values, np.float32), allow_pickle=False)
            tables.write_bytes(temporary / f"{name}.npy", payload.getvalue())
            written[name] = {"width": int(values.shape[1]), "sha256": digest(temporary / f"{name}.npy")}
        tables.write_text(temporary / FACTS, json.dumps({**facts, "features": written}, indent=1) + "\n")
        shutil.rmtree(folder / key, ignore_errors=True)  # a damaged one
        temporary.replace(folder / key)
    except (DataError, OSError) as error:
        log.warning(f"The features could not be kept in {folder} ({error}).")
        return
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info(f"features: computed {len(facts['images']):,} images and kept them in {folder / key}")


def _clear(folder: Path, facts: dict[str, Any]) -> None:
    """Remove entries of other models and formats, damaged ones, and what killed processes left."""
    for entry in list(_entries(folder)):
        try:
            known = _read_facts(entry)
            stale = any(known.get(name) != facts[name] for name in ("format", "model"))
        except _Damaged:
            stale = True
        if stale:
            log.info(f"features: {entry} is of another model and is removed.")
            shutil.rmtree(entry, ignore_errors=True)
    for left in folder.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
