"""Image files as numbers: decoding, a store of what was decoded, and normalised batches."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from reidctl.augment import Interpolation
from reidctl.errors import DataError
from reidctl.loading import load_ahead

# Anything larger than this is a decompression bomb, not a picture of a person (Pillow warns at half of it).
_MAX_PIXELS = 64_000_000
_RECENT = 256
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def read_pixels(path: Path, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> npt.NDArray[np.uint8]:
    """Return an image as RGB at (height, width), resized with antialiasing, shape (H, W, 3).

    Raises:
        DataError: the file is missing, not an image, truncated, or absurdly large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{path} has {image.width}x{image.height} pixels; the limit is {_MAX_PIXELS:,}.")
            # Converting an image that is RGB already would copy it.
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            rgb = rgb.resize((size[1], size[0]), _RESAMPLING[interpolation])
    except FileNotFoundError:
        raise DataError(f"Image {path} does not exist.", hint="Was the dataset moved? Import it again.") from None
    except DataError:
        raise
    except Exception as error:  # whatever a decoder meets in a damaged file: Pillow has no common kind for it
        raise DataError(f"Image {path} cannot be read ({error}).", hint="Replace it or remove its row.") from None
    return np.asarray(rgb)


class PixelStore:
    """Decoded images by row, some of them kept in memory.

    Args:
        paths: one file per row.
        size: (height, width) of what is returned.
        cache_bytes: decoded bytes to keep; 0 keeps none.
        interpolation: how they are resized: as the checkpoint's images were.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        *,
        cache_bytes: int = 1 << 29,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.paths = list(paths)
        self.size, self.interpolation = size, interpolation
        room = cache_bytes // (size[0] * size[1] * 3)
        # A shuffled epoch asks for everything once: what came first is kept for good, because the least recently used
        # image is as likely to be asked for next as any other. Some places go to the latest ones: the second
        # caption of an image often follows soon.
        self._recent_room = min(_RECENT, room)
        self._room = room - self._recent_room
        self._first: dict[int, npt.NDArray[np.uint8]] = {}
        self._recent: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()  # several threads load at once

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """Return image `row`, shape (H, W, 3); see `read_pixels` for what is raised."""
        with self._lock:
            kept = self._first.get(row)
            if kept is None and (kept := self._recent.get(row)) is not None:
                self._recent.move_to_end(row)
        if kept is not None:
            return kept
        pixels = read_pixels(self.paths[row], self.size, self.interpolation)
        with self._lock:
            if len(self._first) < self._room:
                self._first[row] = pixels
            elif self._recent_room:
                self._recent[row] = pixels
                if len(self._recent) > self._recent_room:
                    self._recent.popitem(last=False)
        return pixels


def levels(mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return what each byte of each channel becomes, (byte / 255 - m) / s, shape (3, 256), float32."""
    values = torch.arange(256, dtype=torch.uint8).float().div_(255.0)
    return (values - torch.tensor(mean).view(3, 1)) / torch.tensor(std).view(3, 1)


def normalise(pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (B, H, W, 3) bytes as (B, 3, H, W) float32 with the checkpoint's pixel statistics: (byte / 255 - m) / s.

    A byte has 256 values, so each channel is looked up in a table: the same numbers in half the time.
    """
    tables = levels(mean, std).numpy()
    batch, height, width, _ = pixels.shape
    out = np.empty((batch, 3, height, width), np.float32)
    for image, planes in zip(pixels, out, strict=True):
        for channel, plane in enumerate(planes):
            np.take(tables[channel], image[..., channel], out=plane, mode="clip")
    return torch.from_numpy(out)


def image_batches(
    store: PixelStore,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch: int,
    threads: int = 1,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the images of rows `start` to `stop`, in order, as (rows, normalised pixels of shape (b, 3, H, W)).

    `threads` of the batches load ahead.
    """

    def load(rows: slice) -> tuple[slice, torch.Tensor]:
        return rows, normalise(np.stack([store[row] for row in range(rows.start, rows.stop)]), mean, std)

    end = len(store) if stop is None else stop
    slices = (slice(first, min(first + batch, end)) for first in range(start, end, batch))
    yield from load_ahead(load, slices, threads=threads, ahead=threads + 1)  # floats: a batch is large
