"""What stands in for removed patches: paint, a blurred or foreign picture, noise, nothing at all, or a user's function.

A fill changes the chosen pixels and no other one, bit for bit. Filled pixels still enter attention, dropped patches do
not: the two answer different questions.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from reidctl.backbones.base import Triple
from reidctl.errors import UsageError
from reidctl.pixels import normalise

Pixels = npt.NDArray[np.uint8]
Grid = tuple[int, int]
Fill = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(rows (B,), removed bool (B, N)) -> (images (B, 3, H, W), patches to keep bool (B, N) or None for all)."""
Plugin = Callable[[Pixels, npt.NDArray[np.bool_]], Any]

FILLS = ("mean", "zero", "blur", "noise", "drop", "swap")
PLUGIN = "plugin:"


@dataclass
class Pictures:
    """Some pictures that are to be masked, at the size that the model takes.

    Args:
        pixels: RGB bytes, shape (P, H, W, 3).
        grid: (h, w) of the maps, whose cells tile the picture; with overlapping patches a cell is smaller than a patch.
        mean, std: the checkpoint's pixel statistics.
        tower_grid: (h, w) of the patches that the model reads, where the maps come from another model; `drop` takes
            the patches whose centres lie in removed cells.
        seeds: one per picture, for `noise`.
        donors: other pictures (P, H, W, 3), for `swap`.
        device: where the images are filled.
    """

    pixels: Pixels
    grid: Grid
    mean: Triple
    std: Triple
    tower_grid: Grid | None = None
    seeds: Sequence[Any] | None = None
    donors: Pixels | None = None
    device: torch.device | str = "cpu"

    images: Tensor = field(init=False)
    """The pictures as the model takes them, shape (P, 3, H, W)."""

    def __post_init__(self) -> None:
        self.images = self.normalised(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def normalised(self, pixels: Pixels) -> Tensor:
        """Return bytes (B, H, W, 3) as images (B, 3, H, W) on the device."""
        return normalise(pixels, self.mean, self.std).to(self.device)


def cell_of(pixels: int, cells: int) -> Tensor:
    """Return the cell that each of `pixels` lies in when `cells` tile the line as evenly as whole pixels allow."""
    borders = np.linspace(0, pixels, cells + 1).round().astype(np.int64)
    return torch.from_numpy(np.searchsorted(borders[1:], np.arange(pixels), side="right"))


def pixel_mask(removed: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Return which pixels removed cells cover, bool (B, H, W).

    Args:
        removed: bool (B, N), row-major over the grid.
        grid: (h, w); the cells tile the picture, also where H or W is not divisible.
        size: (H, W).
    """
    rows, columns = (cell_of(pixels, cells).to(removed.device) for pixels, cells in zip(size, grid, strict=True))
    # Columns first: then whole rows of the picture are copied.
    return removed.reshape(-1, *grid).index_select(2, columns).index_select(1, rows)


def check_fill(name: str) -> None:
    """Refuse a fill that does not exist; a plug-in's module is imported.

    Raises:
        UsageError: the name is unknown, or the plug-in cannot be imported.
    """
    if name.startswith(PLUGIN):
        load_plugin(name)
    elif name not in FILLS:
        raise UsageError(
            f"Unknown fill `{name}`.", hint=f"Known: {', '.join(FILLS)} and plugin:PACKAGE.MODULE:FUNCTION."
        )


def make_fill(name: str, pictures: Pictures) -> Fill:
    """Return the function that removes patches from some of the pictures.

    `mean` paints the mean of the checkpoint's pixel statistics, which is 0 for the model, not the picture's own mean;
    `zero` paints black; `blur` shows the picture under a Gaussian whose standard deviation is one cell's side; `noise`
    is normal, with the mean and standard deviation of each channel of the picture, clipped to what pixels can be, one
    field per picture; `swap` shows the same place of another picture; `drop` leaves the pixels and drops the patches;
    `plugin:PACKAGE.MODULE:FUNCTION` calls `FUNCTION(pixels uint8 (B, H, W, 3), mask bool (B, H, W))` and takes from
    the pictures that it returns the masked pixels. "" changes nothing.

    Raises:
        UsageError: the fill is unknown, lacks its donors or seeds, or a plug-in returns anything but pictures.
    """
    if name == "":
        return lambda rows, removed: (pictures.images[rows], None)
    check_fill(name)
    if name == "drop":
        return partial(_drop, pictures)
    if name.startswith(PLUGIN):
        return partial(_plug, load_plugin(name), name, pictures)
    return partial(_paint, _paint_of(name, pictures), pictures)


def _paint(paint: Tensor, pictures: Pictures, rows: Tensor, removed: Tensor) -> tuple[Tensor, None]:
    mask = pixel_mask(removed, pictures.grid, pictures.size)[:, None]  # (B, 1, H, W)
    images = pictures.images.index_select(0, rows)
    # In place: a second batch would cost as much as the painting.
    return torch.where(mask, paint if len(paint) == 1 else paint[rows], images, out=images), None


def _drop(pictures: Pictures, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.images[rows], ~to_grid(removed, pictures.grid, pictures.tower_grid or pictures.grid)


def to_grid(removed: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Return cells of one grid over another one, bool (B, N'): those whose centres lie in a removed cell."""
    if grid == wanted:
        return removed
    rows, columns = (
        ((torch.arange(new) + 0.5) / new * old).long().to(removed.device) for new, old in zip(wanted, grid, strict=True)
    )
    return removed.reshape(-1, *grid)[:, rows][:, :, columns].flatten(1)


def _plug(plugin: Plugin, name: str, pictures: Pictures, rows: Tensor, removed: Tensor) -> tuple[Tensor, None]:
    mask = pixel_mask(removed, pictures.grid, pictures.size)
    before = pictures.pixels[rows.cpu().numpy()]
    try:
        made = plugin(before.copy(), mask.cpu().numpy())
    except (Exception, SystemExit) as error:  # whatever the user's function does
        raise UsageError(
            f"The fill `{name}` failed: {type(error).__name__}: {' '.join(str(error).split())}.",
            hint="It is called with pictures uint8 (B, H, W, 3) and masks bool (B, H, W).",
        ) from error
    if not isinstance(made, np.ndarray) or made.dtype != np.uint8 or made.shape != before.shape:
        found = f"{made.dtype} of shape {made.shape}" if isinstance(made, np.ndarray) else type(made).__name__
        raise UsageError(
            f"The fill `{name}` returned {found}, not uint8 of shape {before.shape}.",
            hint="It must return all pictures that it is given, RGB, filled where the mask is true.",
        )
    return torch.where(mask[:, None], pictures.normalised(made), pictures.images[rows]), None


def plugin_digest(name: str) -> str:
    """Return the sha256 of the file that defines a plug-in's function; empty if there is none, as for a built-in.

    Raises:
        UsageError: see `load_plugin`.
    """
    try:
        path = inspect.getsourcefile(load_plugin(name))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except (TypeError, OSError):
        return ""


def load_plugin(name: str) -> Plugin:
    """Return the function that `plugin:PACKAGE.MODULE:FUNCTION` names.

    The user names code of their own on the command line; nothing from a caption or a model gets here.

    Raises:
        UsageError: the name has another form, the module cannot be imported or has no such function.
    """
    module, _, function = name.removeprefix(PLUGIN).partition(":")
    if not module or not function:
        raise UsageError(f"`{name}` names no function.", hint="Write plugin:PACKAGE.MODULE:FUNCTION.")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UsageError(
            f"The module `{module}` of the fill `{name}` cannot be imported ({' '.join(str(error).split())}).",
            hint="Install it, or set PYTHONPATH to the folder that holds it.",
        ) from None
    if not callable(found):
        raise UsageError(f"The module `{module}` has no function `{function}`.")
    plugin: Plugin = found
    return plugin


def _paint_of(name: str, pictures: Pictures) -> Tensor:
    """What shows where patches are removed: one colour (1, 3, 1, 1) or one picture each (P, 3, H, W)."""
    if name == "mean":
        return torch.zeros(1, 3, 1, 1, device=pictures.device)
    if name == "zero":
        return pictures.normalised(np.zeros((1, 1, 1, 3), np.uint8))
    if name == "blur":
        return blur(pictures.images, pictures.grid)
    if name == "noise":
        return _noise(pictures)
    if pictures.donors is None:
        raise UsageError("The fill `swap` needs another picture for each.", hint="See `controls.pick_donors`.")
    return pictures.normalised(pictures.donors)


def blur(images: Tensor, grid: Grid) -> Tensor:
    """Return images under a Gaussian with the sides of one cell as standard deviations, cut at three of them.

    Beyond the border the picture goes on as its last row or column.
    """
    for axis, cells in ((2, grid[0]), (3, grid[1])):
        kernel = _gaussian(images.shape[axis] / cells).to(images)
        reach = len(kernel) // 2
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        weight = kernel.view(1, 1, -1, 1) if axis == 2 else kernel.view(1, 1, 1, -1)
        padded = functional.pad(images, pad, mode="replicate")
        images = functional.conv2d(padded, weight.expand(3, 1, -1, -1), groups=3)
    return images


def _gaussian(sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return weight / weight.sum()


def _noise(pictures: Pictures) -> Tensor:
    if pictures.seeds is None:
        raise UsageError("The fill `noise` needs a seed for each picture.")
    fields = [
        np.random.default_rng(seed).standard_normal((3, *pictures.size), dtype=np.float32) for seed in pictures.seeds
    ]
    images = pictures.images
    noise = torch.from_numpy(np.stack(fields)).to(images)
    mean, std = images.mean(dim=(2, 3), keepdim=True), images.std(dim=(2, 3), keepdim=True)
    black, white = (pictures.normalised(np.full((1, 1, 1, 3), level, np.uint8)) for level in (0, 255))
    return torch.minimum(torch.maximum(noise * std + mean, black), white)
