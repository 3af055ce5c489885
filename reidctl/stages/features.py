"""The features that a trained method gives to images of a split, for analyses of what they hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl.batch import Batch
from reidctl.console import progress
from reidctl.data import Corpus, known_cameras
from reidctl.errors import DataError
from reidctl.loading import loader_threads
from reidctl.methods.base import Method
from reidctl.pixels import PixelStore, image_batches

Features = dict[str, npt.NDArray[np.float32]]
Rows = npt.NDArray[np.int64]


def collect_features(method: Method, corpus: Corpus, *, device: torch.device, batch: int = 128) -> Features:
    """Return the features of all images of a corpus by name, in order, each (N, D); see `Method.features`.

    Captions are not passed on. Methods that read a text on the gallery side get those written from the image alone.

    Raises:
        DataError: a text that the gallery side reads is missing, or an image cannot be read.
    """
    backbone, names = method.backbone, list(corpus.images["image_id"])
    texts = {kind: _texts(corpus, kind) for kind in method.gallery_texts}
    store = PixelStore(corpus.paths(), backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation)
    threads = loader_threads(device.type)
    cameras = known_cameras(corpus.images, method.cameras)
    pieces: list[Features] = []
    with torch.inference_mode(), progress("features", len(names)) as advance:
        for rows, image in image_batches(store, backbone.mean, backbone.std, batch=batch, threads=threads):
            tokens = {kind: backbone.tokenize(every[rows]) for kind, every in texts.items()}
            camera = None if cameras is None else cameras[rows]
            given = Batch(image=image, texts=tokens, image_id=tuple(names[rows]), camera=camera).to(device)
            pieces.append({name: value.float().cpu().numpy() for name, value in method.features(given).items()})
            advance(rows.stop - rows.start)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}


def _texts(corpus: Corpus, kind: str) -> list[str]:
    texts: list[str | None] = getattr(corpus, kind)
    lacking = [row for row, text in enumerate(texts) if not text]
    if lacking:
        name = corpus.images["image_id"].iloc[lacking[0]]
        raise DataError(
            f"{len(lacking)} images have no {kind} text (first: `{name}`), which this model reads.",
            hint="Run `reidctl caption` on them.",
        )
    return [str(text) for text in texts]


def families(images: pd.DataFrame) -> npt.NDArray[np.object_]:
    """Return for each image the smallest person id among its person and that one's look-alike (`clone_of`)."""
    column = images["attributes"] if "attributes" in images else [None] * len(images)
    found = []
    for person, known in zip(images["person_id"].astype(str), column, strict=True):
        partner = known.get("clone_of") if isinstance(known, dict) else None
        found.append(min(person, partner) if partner else person)
    return np.array(found, dtype=object)


def whole_families(images: pd.DataFrame, limit: int, *, seed: int = 0, first: Sequence[str] = ()) -> Rows:
    """Return rows of at most `limit` images, in order: all images of families that are drawn at random.

    A family that alone is larger than the limit is cut, so that there is always something.

    Args:
        images: rows of the table `images`.
        limit: how many rows at most.
        seed: of the draw.
        first: people whose families are taken before others are drawn.
    """
    if len(images) <= limit:
        return np.arange(len(images))
    family = families(images).astype(str)
    names, code = np.unique(family, return_inverse=True)
    wanted = set(family[images["person_id"].isin(first).to_numpy()])
    place = np.random.default_rng((seed, 36)).permutation(len(names)) - len(names) * np.isin(names, list(wanted))
    drawn = np.argsort(place[code], kind="stable")  # rows, family by family
    sizes = np.cumsum(np.bincount(code)[np.argsort(place)])
    whole = int(sizes[sizes <= limit].max(initial=0))
    return np.sort(drawn[: whole or limit])


def part_of(corpus: Corpus, rows: Rows) -> Corpus:
    """Return some images of a corpus, with their texts; captions point to their new rows."""
    place = {int(old): new for new, old in enumerate(rows)}
    captions = corpus.captions[corpus.captions["row"].isin(place)].reset_index(drop=True)
    captions["row"] = [place[int(row)] for row in captions["row"]]
    return replace(
        corpus,
        images=corpus.images.iloc[rows].reset_index(drop=True),
        captions=captions,
        identity=_some(corpus.identity, rows),
        clothing=_some(corpus.clothing, rows),
    )


def _some(values: Sequence[Any], rows: Rows) -> list[Any]:
    return [values[row] for row in rows]
