"""A trained method applied to many images or texts; the gallery side reads only images and texts written from them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from reidctl import parallel
from reidctl.batch import Batch, Tokens
from reidctl.data import Corpus, known_cameras
from reidctl.errors import DataError
from reidctl.loading import loader_threads
from reidctl.methods.base import Method, Task
from reidctl.pixels import PixelStore, image_batches

Advance = Callable[[int], None]
Vector = npt.NDArray[np.float32]

_CHUNK = 4096  # texts that are tokenised at a time


def embed_gallery(
    method: Method,
    corpus: Corpus,
    *,
    device: torch.device,
    batch: int = 128,
    store: PixelStore | None = None,
    advance: Advance | None = None,
) -> npt.NDArray[np.float32]:
    """Return the unit vectors of all images of a corpus that texts are compared with, in order, shape (N, D).

    Captions are not passed on: no query text can reach these vectors. Methods that read a text on the gallery side get
    the ones that were written from the image alone (checked when the corpus was built).

    Raises:
        DataError: a gallery text is missing, or an image cannot be read.
    """
    return embed_gallery_tasks(method, corpus, device=device, batch=batch, store=store, advance=advance)["t2i"]


def embed_gallery_tasks(
    method: Method,
    corpus: Corpus,
    *,
    device: torch.device,
    batch: int = 128,
    store: PixelStore | None = None,
    advance: Advance | None = None,
) -> dict[Task, Vector]:
    """Return the unit vectors of all images for each task, in order, each (N, D), from one forward pass per image.

    `t2i` is compared with texts and `i2i` with images: one and the same array where the method has one vector per
    image. Nothing but what `embed_gallery` says is read.

    Raises:
        DataError: a gallery text is missing, or an image cannot be read.
    """
    texts = {kind: _all_texts(corpus, kind) for kind in method.gallery_texts}
    backbone = method.backbone
    store = store or PixelStore(
        corpus.paths(), backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation
    )
    names = list(corpus.images["image_id"])
    cameras = known_cameras(corpus.images, method.cameras)
    pieces: dict[Task, list[Vector]] = {task: [] for task in method.tasks}
    mine = parallel.share(len(store), batch)
    threads = loader_threads(device.type)
    with torch.inference_mode():
        for rows, image in image_batches(
            store, backbone.mean, backbone.std, batch=batch, threads=threads, start=mine.start, stop=mine.stop
        ):
            tokens = {kind: backbone.tokenize(all_texts[rows]) for kind, all_texts in texts.items()}
            camera = None if cameras is None else cameras[rows]
            given = Batch(image=image, texts=tokens, image_id=tuple(names[rows]), camera=camera).to(device)
            made = method.embed_tasks(given)
            for task, members in pieces.items():
                members.append(made[task].float().cpu().numpy())
            if advance:
                advance(rows.stop - rows.start)
    return _both({task: _gathered(members) for task, members in pieces.items()})


def _gathered(pieces: Sequence[Vector]) -> Vector:
    """The vectors of all processes, each of which made some."""
    return parallel.gather_rows(np.concatenate(pieces) if pieces else np.zeros((0, 0), np.float32))


def _both(vectors: Mapping[Task, Vector]) -> dict[Task, Vector]:
    """Both tasks, whatever the method has: without vectors of their own images are compared by those for texts."""
    return {"t2i": vectors["t2i"], "i2i": vectors.get("i2i", vectors["t2i"])}


def embed_blank(
    method: Method,
    corpus: Corpus,
    *,
    device: torch.device,
    grey: int = 128,
    batch: int = 128,
    advance: Advance | None = None,
) -> npt.NDArray[np.float32]:
    """Return the unit vectors, compared with texts, that a corpus has if every picture is the same plain grey (N, D).

    Equal inputs are embedded once and share one vector: forward passes of different batch shapes differ in their last
    bits, which would break ties that must be ties. Without gallery texts all rows are equal, bit for bit.

    Raises:
        DataError: a gallery text is missing.
    """
    return embed_blank_tasks(method, corpus, device=device, grey=grey, batch=batch, advance=advance)["t2i"]


def embed_blank_tasks(
    method: Method,
    corpus: Corpus,
    *,
    device: torch.device,
    grey: int = 128,
    batch: int = 128,
    advance: Advance | None = None,
) -> dict[Task, Vector]:
    """Return what `embed_blank` does for each task; see `embed_gallery_tasks`.

    Raises:
        DataError: a gallery text is missing.
    """
    texts = {kind: _all_texts(corpus, kind) for kind in method.gallery_texts}
    keys = list(zip(*texts.values(), strict=True)) if texts else [()] * len(corpus.images)
    first: dict[tuple[str, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    place = {key: number for number, key in enumerate(first)}
    part = _rows(corpus, list(first.values()))
    store = _Blank(method.backbone.image_size, len(first), grey)
    vectors = embed_gallery_tasks(method, part, device=device, batch=batch, store=store)
    if advance:
        advance(len(keys))
    rows = [place[key] for key in keys]
    return _both({task: vectors[task][rows] for task in method.tasks})


class _Blank(PixelStore):
    """Any number of equal grey pictures that exist as no file."""

    def __init__(self, size: tuple[int, int], count: int, grey: int) -> None:
        super().__init__([], size, cache_bytes=0)
        self._count, self._pixels = count, np.full((*size, 3), grey, np.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        return self._pixels


def _rows(corpus: Corpus, rows: list[int]) -> Corpus:
    """Some images of a corpus and their described texts, without captions."""
    return replace(
        corpus,
        images=corpus.images.iloc[rows].reset_index(drop=True),
        captions=corpus.captions.iloc[:0],
        identity=[corpus.identity[row] for row in rows],
        clothing=[corpus.clothing[row] for row in rows],
    )


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
    known: Mapping[bytes, Vector] | None = None,
    advance: Advance | None = None,
) -> npt.NDArray[np.float32]:
    """Return the unit vectors of query texts, in order, shape (Q, D).

    Texts with the same tokens are embedded once, so they have equal vectors, bit for bit: equal texts, and those that
    differ in what the tokenizer does not keep (capitals, or everything beyond the longest text it takes).

    Args:
        method: the model.
        texts: the queries.
        device: where to compute.
        batch: texts per forward pass.
        known: vectors that need not be made again, by `token_keys`.
        advance: called with a number of texts whenever that many more are done.
    """
    vector_of, key_of = dict(known or {}), dict[str, bytes]()
    times = Counter(texts)
    distinct = list(times)
    for start in range(0, len(distinct), _CHUNK):
        part = distinct[start : start + _CHUNK]
        tokens = method.backbone.tokenize(part)
        keys = _keys(tokens)
        key_of |= dict(zip(part, keys, strict=True))
        fresh = {key: row for row, key in reversed(list(enumerate(keys))) if key not in vector_of}
        rows = sorted(fresh.values())
        mine, pieces = parallel.share(len(rows), batch), []
        for begin in range(mine.start, mine.stop, batch):
            some = rows[begin : min(begin + batch, mine.stop)]
            pieces.append(_embed_tokens(method, tokens[torch.tensor(some)], device))
            if advance:
                advance(len(some))
        if rows:
            vector_of |= {keys[row]: vector for row, vector in zip(rows, _gathered(pieces), strict=True)}
        if advance:
            advance(sum(times[text] for text in part) - len(rows))
    return np.stack([vector_of[key_of[text]] for text in texts]) if texts else np.zeros((0, 0), np.float32)


def token_keys(method: Method, texts: Sequence[str]) -> list[bytes]:
    """Return for each text what the text tower reads of it: equal keys are equal inputs."""
    keys: list[bytes] = []
    for start in range(0, len(texts), _CHUNK):
        keys += _keys(method.backbone.tokenize(list(texts[start : start + _CHUNK])))
    return keys


def _keys(tokens: Tokens) -> list[bytes]:
    return [ids[mask].numpy().tobytes() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _embed_tokens(method: Method, tokens: Tokens, device: torch.device) -> npt.NDArray[np.float32]:
    """The vectors of one batch, padded to its own longest text."""
    length = int(tokens.mask.sum(1).max())
    trimmed = Tokens(tokens.ids[:, :length], tokens.mask[:, :length])
    with torch.inference_mode():
        vectors: npt.NDArray[np.float32] = (
            method.embed_texts(Batch(texts={"full": trimmed}).to(device)).float().cpu().numpy()
        )
    return vectors
