"""Binary pixel masks as run lengths: the form in which the `parts` table stores them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError


def encode_mask(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the row-major run lengths of a mask, starting with a run of zeros (which may be empty).

    `[[0, 1], [1, 0]]` becomes `[1, 2, 1]`; an all-true 1x3 mask becomes `[0, 3]`.

    Args:
        mask: shape (H, W), anything that reads as true or false.

    Returns:
        Lengths that add up to H * W; only the first can be 0. An empty mask gives `[0]`.
    """
    flat = np.asarray(mask, dtype=bool).ravel()
    if flat.size == 0:
        return [0]
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate(([0], changes, [flat.size]))
    runs: list[int] = np.diff(edges).tolist()
    return [0, *runs] if flat[0] else runs


def decode_mask(runs: Sequence[int], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the mask of shape (height, width) that `encode_mask` turned into these run lengths.

    Raises:
        DataError: the lengths are negative or do not add up to height * width.
    """
    lengths = np.asarray(runs, dtype=np.int64)
    if (lengths < 0).any() or int(lengths.sum()) != height * width:
        raise DataError(
            f"A mask of {height}x{width} pixels has run lengths adding up to {int(lengths.sum())}.",
            hint="The image size in the images table and the mask belong to different renderings.",
        )
    values = np.arange(lengths.size) % 2 == 1
    return np.repeat(values, lengths).reshape(height, width)


def mask_box(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return [x0, y0, x1, y1] around the true pixels, half-open; all zeros for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
