"""A trained method applied to many images or texts; the gallery side reads only images and texts written from them."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from reidctl.batch import Batch, Tokens
from reidctl.data import Corpus
from reidctl.errors import DataError
from reidctl.loading import loader_threads
from reidctl.methods.base import Method
from reidctl.pixels import PixelStore, image_batches

Advance = Callable[[int], None]


def embed_gallery(
    method: Method,
    corpus: Corpus,
    *,
    device: torch.device,
    batch: int = 128,
    store: PixelStore | None = None,
    advance: Advance | None = None,
) -> npt.NDArray[np.float32]:
    """Return the unit vectors of all images of a corpus, in order, shape (N, D).

    Captions are not passed on: no query text can reach these vectors. Methods that read a text on the gallery side get
    the ones that were written from the image alone (checked when the corpus was built).

    Raises:
        DataError: a gallery text is missing, or an image cannot be read.
    """
    texts = {kind: _all_texts(corpus, kind) for kind in method.gallery_texts}
    backbone = method.backbone
    store = store or PixelStore(
        corpus.paths(), backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation
    )
    names = list(corpus.images["image_id"])
    pieces = []
    with torch.inference_mode():
        for rows, image in image_batches(
            store, backbone.mean, backbone.std, batch=batch, threads=loader_threads(device.type)
        ):
            tokens = {kind: backbone.tokenize(all_texts[rows]) for kind, all_texts in texts.items()}
            given = Batch(image=image, texts=tokens, image_id=tuple(names[rows])).to(device)
            pieces.append(method.embed_images(given).float().cpu().numpy())
            if advance:
                advance(rows.stop - rows.start)
    return np.concatenate(pieces) if pieces else np.zeros((0, 0), np.float32)


def _all_texts(corpus: Corpus, kind: str) -> list[str]:
    texts: list[str | None] = getattr(corpus, kind)
    lacking = [row for row, text in enumerate(texts) if not text]
    if lacking:
        name = corpus.images["image_id"].iloc[lacking[0]]
        raise DataError(
            f"{len(lacking)} gallery images have no {kind} text (first: `{name}`), which this protocol reads.",
            hint="Run `reidctl caption` on them, or use a protocol that needs images alone.",
        )
    return [str(text) for text in texts]


def embed_queries(
    method: Method,
    texts: Sequence[str],
    *,
    device: torch.device,
    batch: int = 256,
    advance: Advance | None = None,
) -> npt.NDArray[np.float32]:
    """Return the unit vectors of query texts, in order, shape (Q, D)."""
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            tokens: Tokens = method.backbone.tokenize(list(texts[start : start + batch]))
            pieces.append(method.embed_texts(Batch(texts={"full": tokens}).to(device)).float().cpu().numpy())
            if advance:
                advance(len(tokens))
    return np.concatenate(pieces) if pieces else np.zeros((0, 0), np.float32)
