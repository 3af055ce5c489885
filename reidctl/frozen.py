"""What frozen encoders give, computed once and kept on disk, so that a prompt stage reads it instead of pixels.

Arrays are memory-mapped files: a step reads the rows it needs, whatever the size of the whole. For CLIP ViT-B/16 at
384x128 all tokens of an image take 199 kB in half precision, 10 GB for 50,000 images.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.console import log
from reidctl.data import Numbers, TrainingSet
from reidctl.errors import DataError
from reidctl.loading import loader_threads
from reidctl.methods.base import Method
from reidctl.pixels import image_batches

Precision = Literal["fp16", "fp32"]
Advance = Callable[[int], None]
Array = npt.NDArray[np.floating[Any]]
Batches = Callable[[int], Iterator[tuple[slice, Batch]]]
"""From a starting row on."""

_TYPES: dict[str, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}


class FrozenFeatures:
    """The kept features of a training set; see `data.FrozenStore`."""

    def __init__(self, images: dict[str, Array], texts: dict[str, Array]) -> None:
        self._images, self._texts = images, texts

    def images(self, rows: Numbers) -> dict[str, torch.Tensor]:
        """Return the kept features of some images, by name."""
        return _rows(self._images, rows)

    def texts(self, groups: Numbers) -> dict[str, torch.Tensor]:
        """Return the kept features of some texts, by name."""
        return _rows(self._texts, groups)


def _rows(arrays: dict[str, Array], rows: Numbers) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array[rows])) for name, array in arrays.items()}


def keep_features(
    method: Method,
    samples: TrainingSet,
    folder: Path,
    key: str,
    *,
    precision: Precision = "fp16",
    batch: int = 128,
    device: torch.device,
    advance: Advance | None = None,
) -> FrozenFeatures:
    """Return `Method.frozen_features` of every image and text of a training set, from files or computed into them.

    A killed computation goes on where it was: rows are counted once they are on disk.

    Args:
        method: with frozen encoders, in evaluation mode on `device`.
        samples: whose images and captions; images are taken as they are, without augmentation.
        folder: where the arrays lie; those of another key are replaced.
        key: digest of everything that decides the features: weights, data, settings.
        precision: of the arrays.
        batch: images or texts per forward pass.
        device: where to compute.
        advance: told how many images and texts were done.

    Raises:
        DataError: the disk is full, or an image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = f"{key}-{precision}"
    backbone, store = method.backbone, samples.store
    threads = loader_threads(device.type)

    def pictures(start: int) -> Iterator[tuple[slice, Batch]]:
        for rows, image in image_batches(store, backbone.mean, backbone.std, batch=batch, threads=threads, start=start):
            yield rows, Batch(image=image)

    def sentences(start: int) -> Iterator[tuple[slice, Batch]]:
        tokens = samples.tokens.unique
        for first in range(start, len(tokens), batch):
            rows = slice(first, min(first + batch, len(tokens)))
            yield rows, Batch(texts={"full": tokens[rows]})

    keep = _Keeper(method, folder, key, precision, device, advance)
    texts = len(samples.tokens.unique) if "full" in samples.texts else 0
    return FrozenFeatures(keep("images", len(store), pictures), keep("texts", texts, sentences))


class _Keeper:
    """Fills arrays from batches; `<side>.json` says how many rows are on disk."""

    def __init__(
        self,
        method: Method,
        folder: Path,
        key: str,
        precision: Precision,
        device: torch.device,
        advance: Advance | None,
    ) -> None:
        self.method, self.folder, self.key, self.device = method, folder, key, device
        self.type, self.advance = _TYPES[precision], advance

    def __call__(
        self, side: str, count: int, batches: Callable[[int], Iterator[tuple[slice, Batch]]]
    ) -> dict[str, Array]:
        if not count:
            return {}
        done, names = self._found(side, count)
        arrays = {name: self._open(side, name) for name in names}
        if done:
            log.info(f"{done:,} of {count:,} {side} are already encoded.")
            self._tell(done)
        try:
            for number, (rows, batch) in enumerate(batches(done)):
                with torch.inference_mode():
                    found = self.method.frozen_features(batch.to(self.device))
                if not arrays:
                    arrays = {name: self._make(side, name, (count, *value.shape[1:])) for name, value in found.items()}
                for name, value in found.items():
                    arrays[name][rows] = value.float().cpu().numpy()
                self._tell(rows.stop - rows.start)
                if number % 64 == 63 or rows.stop == count:
                    for array in arrays.values():
                        array.flush()  # type: ignore[attr-defined]
                    facts = {"key": self.key, "rows": rows.stop, "count": count, "names": list(arrays)}
                    tables.write_text(self.folder / f"{side}.json", json.dumps(facts) + "\n")
        except OSError as error:
            raise DataError(f"Cannot write to {self.folder} ({error.strerror}).", hint="Is the disk full?") from None
        return arrays

    def _tell(self, count: int) -> None:
        if self.advance:
            self.advance(count)

    def _found(self, side: str, count: int) -> tuple[int, list[str]]:
        """How many rows of this very key are there, and the arrays' names."""
        try:
            facts = json.loads((self.folder / f"{side}.json").read_text(encoding="utf-8"))
            fits = facts["key"] == self.key and facts["count"] == count
            there = fits and all(self._path(side, name).is_file() for name in facts["names"])
            return (int(facts["rows"]), list(facts["names"])) if there else (0, [])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, []

    def _path(self, side: str, name: str) -> Path:
        return self.folder / f"{side}-{name}.npy"

    def _make(self, side: str, name: str, shape: tuple[int, ...]) -> Array:
        (self.folder / f"{side}.json").unlink(missing_ok=True)
        made: Array = np.lib.format.open_memmap(self._path(side, name), mode="w+", dtype=self.type, shape=shape)
        return made

    def _open(self, side: str, name: str) -> Array:
        found: Array = np.lib.format.open_memmap(self._path(side, name), mode="r+")
        return found


def forget_features(folder: Path) -> None:
    """Remove kept features."""
    for path in [*folder.glob("*.npy"), *folder.glob("*.json")]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
