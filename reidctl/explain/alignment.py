"""Whether another, frozen encoder finds the phrase in the region that a map points at.

Masking the regions of a map and asking the same model again is circular: the model that points is the model that
judges. Here an encoder that had no part in the map compares the phrase with a crop of the picture.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from reidctl import tables
from reidctl.backbones.base import Backbone
from reidctl.batch import Batch
from reidctl.data import Corpus
from reidctl.errors import UsageError
from reidctl.explain.concentration import same_grids
from reidctl.methods.base import unit
from reidctl.metrics import Floats
from reidctl.pixels import normalise, read_pixels

METRICS: Mapping[str, Sequence[str]] = {"alignment": ("random", "phrase")}
"""What `score_alignment` measures, with its controls; for `concentration.summarise_scores`."""

WINDOW = (0.35, 0.6)
"""Height and width of the crop as shares of the picture: about a shirt, or a pair of trousers."""

Place = tuple[int, int]
"""The first row and column of a window, in patches."""

Crop = tuple[str, Place]
"""An image and a place in it."""

_KEYS = ["query_id", "image_id", "phrase", "explainer"]
_COLUMNS = ["alignment", "alignment.random", "alignment.phrase"]
_IMAGES = 32


class Encoder(Protocol):
    """What judges: a trained `Method` of another run, or a `PlainEncoder`."""

    @property
    def backbone(self) -> Backbone:
        """The towers, for the size and the statistics of pictures and for tokens."""

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit vectors (B, D)."""

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit vectors (B, D) of the texts `full`."""


class PlainEncoder:
    """A pretrained backbone as it is: cosine of the first class token and the pooled text.

    Args:
        backbone: from `backbones.weights.build`; is put into evaluation mode.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone.eval()

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit class-token features, shape (B, D)."""
        return unit(self.backbone.encode_image(batch.require("image")).cls[:, 0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit features of the texts `full`, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)


@dataclass(frozen=True)
class Window:
    """A window of whole patches on a grid, (h, w) each; as large as the given shares of the picture allow."""

    grid: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of_shares(cls, grid: tuple[int, int], shares: tuple[float, float]) -> "Window":
        """Return the window of these shares of the picture, rounded to whole patches, at least one.

        Raises:
            UsageError: a share outside (0, 1].
        """
        if not all(0 < share <= 1 for share in shares):
            raise UsageError(f"A crop of {shares[0]} x {shares[1]} of the picture.", hint="Give shares in (0, 1].")
        height, width = (max(1, math.floor(n * share + 0.5)) for n, share in zip(grid, shares, strict=True))
        return cls(grid, (height, width))

    @property
    def places(self) -> tuple[int, int]:
        """How many places it has downwards and across."""
        return self.grid[0] - self.size[0] + 1, self.grid[1] - self.size[1] + 1

    def box(self, place: Place, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the window in a picture of (height, width) pixels.

        Whole pixels, so that nothing from outside reaches the crop when it is resized; equally large at every place.
        """
        shape = [max(1, round(n * s / g)) for n, s, g in zip(size, self.size, self.grid, strict=True)]
        start = [
            min(round(n * p / g), n - extent) for n, p, g, extent in zip(size, place, self.grid, shape, strict=True)
        ]
        return start[1], start[0], start[1] + shape[1], start[0] + shape[0]


def window_mass(maps: npt.NDArray[np.float32], window: Window) -> Floats:
    """Return the mass that every place of the window covers, shape (M, places down, places across).

    Args:
        maps: shape (M, N), row-major over the window's grid.
        window: which window.
    """
    height, width = window.size
    total = np.zeros((len(maps), window.grid[0] + 1, window.grid[1] + 1))
    total[:, 1:, 1:] = maps.reshape(-1, *window.grid).astype(np.float64).cumsum(axis=1).cumsum(axis=2)
    down = total[:, height:] - total[:, :-height]
    return np.asarray(down[:, :, width:] - down[:, :, :-width])


def best_places(maps: npt.NDArray[np.float32], window: Window, ids: Sequence[str], *, seed: int = 0) -> list[Place]:
    """Return where the window covers most of each map.

    Where several places cover the same (up to rounding) one of them is drawn, so that a map without any preference
    scores what random windows do.

    Args:
        maps: shape (M, N).
        window: which window.
        ids: what the draw depends on besides the seed, one per map.
        seed: of the draws.
    """
    mass = window_mass(maps, window).reshape(len(maps), -1)
    ties = mass >= mass.max(axis=1, keepdims=True) - 1e-9 * np.maximum(1.0, mass.max(axis=1, keepdims=True))
    chosen = [_rng(seed, 52, name).choice(np.flatnonzero(tied)) for name, tied in zip(ids, ties, strict=True)]
    return [_place(int(place), window) for place in chosen]


def random_places(window: Window, name: str, *, draws: int = 10, seed: int = 0) -> list[Place]:
    """Return places of the window drawn uniformly, with replacement; they depend on the seed and the name alone."""
    drawn = _rng(seed, 53, name).integers(window.places[0] * window.places[1], size=draws)
    return [_place(int(place), window) for place in drawn]


def _place(number: int, window: Window) -> Place:
    return divmod(number, window.places[1])


def _rng(seed: int, stream: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng((seed, stream, int.from_bytes(digest[:8], "big")))


def score_alignment(
    encoder: Encoder,
    corpus: Corpus,
    explanations: pd.DataFrame,
    *,
    window: tuple[float, float] = WINDOW,
    draws: int = 10,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Return for every map how well its region fits its phrase in the eyes of an independent encoder.

    alignment = cos(image(crop), text(phrase)), the crop being the window of fixed area that covers most of the map,
    resized (and so stretched) to the encoder's input. The area is fixed, not the mass: a concentrated map gets no
    smaller crop.

    `alignment.random` is the mean over random windows of the same size, which all maps of an image share;
    `alignment.phrase` the mean over the other phrases of the same caption on the same crop, NaN if it has none.

    Args:
        encoder: the judge, on `device`, in evaluation mode.
        corpus: holds the images.
        explanations: rows of the `explanations` table, of any explainers.
        window: height and width of the crop as shares of the picture, rounded to whole patches.
        draws: random windows per image, at least 1.
        seed: of the draws.
        batch: crops, or phrases, per forward pass.
        device: where to compute.
        advance: called with the number of maps done.

    Returns:
        Columns query_id, image_id, phrase, explainer, alignment, alignment.random, alignment.phrase, in order.

    Raises:
        UsageError: a window or number of draws out of range, or an encoder that reads a text beside the picture.
        DataError: an image cannot be read.
    """
    if draws < 1:
        raise UsageError(f"{draws} random windows cannot be averaged.", hint="Give 1 or more; 10 is usual.")
    if getattr(encoder, "gallery_texts", ()):
        raise UsageError("The judge reads a text beside the picture, not the crop alone.", hint="Take another model.")
    found = explanations[_KEYS].reset_index(drop=True).assign(**dict.fromkeys(_COLUMNS, math.nan))
    texts = _Texts(encoder, found, batch, device)
    for grid, rows in same_grids(explanations):
        crops = _Crops(encoder, corpus, Window.of_shares(grid, window), batch, device)
        for some in _of_images(found["image_id"].iloc[rows], rows):
            maps = tables.matrix(explanations["relevance"].iloc[some])
            own, random = crops.embed(found.iloc[some], maps, draws, seed)
            for row, crop, others in zip(some.tolist(), own, random, strict=True):
                found.loc[row, _COLUMNS] = texts.compare(row, crop, others)
            if advance:
                advance(len(some))
    return found


def _of_images(images: "pd.Series[Any]", rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The rows in pieces of whole images, a few dozen at a time, so that batches are full and memory is bounded."""
    number = pd.factorize(images)[0]
    for first in range(0, int(number.max(initial=-1)) + 1, _IMAGES):
        yield rows[(number >= first) & (number < first + _IMAGES)]


class _Texts:
    """The phrases of a table as vectors, and which other phrases the caption of each row has."""

    def __init__(self, encoder: Encoder, rows: pd.DataFrame, batch: int, device: torch.device | str) -> None:
        self._phrase = rows["phrase"].astype(str).tolist()
        self._caption = list(zip(rows["query_id"].astype(str), rows["image_id"].astype(str), strict=True))
        self._vector = dict(_embed_texts(encoder, list(dict.fromkeys(self._phrase)), batch, device))
        self._of_caption: dict[tuple[str, str], dict[str, str]] = {}
        for caption, phrase in zip(self._caption, self._phrase, strict=True):
            self._of_caption.setdefault(caption, {}).setdefault(phrase.casefold(), phrase)

    def compare(self, row: int, crop: Floats, random: Floats) -> tuple[float, float, float]:
        """Cosine of the row's phrase with its crop (D,), its mean over random crops (R, D), that of other phrases."""
        own = self._vector[self._phrase[row]]
        known = self._of_caption[self._caption[row]]
        others = [self._vector[text] for key, text in known.items() if key != self._phrase[row].casefold()]
        other = float((np.stack(others) @ crop).mean()) if others else math.nan
        return float(own @ crop), float((random @ own).mean()), other


def _embed_texts(
    encoder: Encoder, texts: list[str], batch: int, device: torch.device | str
) -> Iterator[tuple[str, Floats]]:
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        given = Batch(texts={"full": encoder.backbone.tokenize(some)}).to(device)
        with torch.inference_mode():
            yield from zip(some, encoder.embed_texts(given).double().cpu().numpy(), strict=True)


class _Crops:
    """Crops of the pictures of a corpus as vectors; each picture is decoded once, at its own size."""

    def __init__(
        self, encoder: Encoder, corpus: Corpus, window: Window, batch: int, device: torch.device | str
    ) -> None:
        self._encoder, self._corpus, self._window = encoder, corpus, window
        self._batch, self._device = batch, device
        self._row = {str(name): row for row, name in enumerate(corpus.images["image_id"])}

    def embed(
        self, rows: pd.DataFrame, maps: npt.NDArray[np.float32], draws: int, seed: int
    ) -> tuple[list[Floats], list[Floats]]:
        """Return for each row the vector of its map's crop (D,) and those of its image's random crops (draws, D)."""
        images = rows["image_id"].astype(str).tolist()
        names = [" ".join(map(str, key)) for key in rows[_KEYS].itertuples(index=False)]
        best = list(zip(images, best_places(maps, self._window, names, seed=seed), strict=True))
        drawn = {
            image: [(image, place) for place in random_places(self._window, image, draws=draws, seed=seed)]
            for image in dict.fromkeys(images)
        }
        vectors = self._vectors({*best, *(key for keys in drawn.values() for key in keys)})
        random = {image: np.stack([vectors[key] for key in keys]) for image, keys in drawn.items()}
        return [vectors[key] for key in best], [random[image] for image in images]

    def _vectors(self, wanted: set[Crop]) -> dict[Crop, Floats]:
        """The vector of every wanted crop; equal crops of several maps are one, so nothing is encoded twice."""
        vectors: dict[Crop, Floats] = {}
        cut = self._cut(sorted(wanted))
        while some := list(islice(cut, self._batch)):
            vectors |= zip([key for key, _ in some], self._encode([pixels for _, pixels in some]), strict=True)
        return vectors

    def _encode(self, pixels: list[npt.NDArray[np.uint8]]) -> Floats:
        backbone = self._encoder.backbone
        given = Batch(image=normalise(np.stack(pixels), backbone.mean, backbone.std)).to(self._device)
        with torch.inference_mode():
            return np.asarray(self._encoder.embed_images(given).double().cpu().numpy())

    def _cut(self, wanted: list[Crop]) -> Iterator[tuple[Crop, npt.NDArray[np.uint8]]]:
        """The crops at the size of the encoder's input; `wanted` is sorted, so crops of one picture are neighbours."""
        backbone = self._encoder.backbone
        size = (backbone.image_size[1], backbone.image_size[0])
        how = Image.Resampling[backbone.interpolation.upper()]
        shown, picture, shape = "", Image.new("RGB", (1, 1)), (1, 1)
        for image, place in wanted:
            if image != shown:
                facts = self._corpus.images.iloc[self._row[image]]
                shape = (int(facts["height"]), int(facts["width"]))
                picture = Image.fromarray(read_pixels(self._corpus.root / str(facts["path"]), shape))
                shown = image
            yield (image, place), np.asarray(picture.crop(self._window.box(place, shape)).resize(size, how))
