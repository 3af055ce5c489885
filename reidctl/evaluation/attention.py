"""Where two class tokens look: how spread and how different their attention is, and how much of it lies on regions.

Attention is a distribution over patches, as is every map here; logarithms are natural. The tokens of one image meet in
the patches, so equal attention does not make equal features, nor the other way round.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.masks import decode_mask

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

OBJECTS = frozenset({"bag", "backpack", "handbag", "phone", "umbrella", "hat", "cap"})
"""Parts that an image has and its person need not: instance objects. Rendered caps are the part `hat`."""


def over_patches(attention: npt.NDArray[Any], classes: int) -> Floats:
    """Return each class token's attention to the patches as distributions: A_k = mean_heads a_kn / sum_n of it.

    Args:
        attention: probabilities (B, heads, K + N, K + N), class tokens first.
        classes: K.

    Returns:
        Shape (B, K, N), rows sum to 1.
    """
    return as_distribution(np.asarray(attention, np.float64).mean(axis=1)[:, :classes, classes:])


def as_distribution(maps: npt.NDArray[Any]) -> Floats:
    """Return maps (..., N) >= 0 over their sums, (..., N); a map of zeros becomes a uniform one."""
    maps = np.asarray(maps, np.float64)
    total = maps.sum(axis=-1, keepdims=True)
    return np.where(total > 0, maps / np.where(total > 0, total, 1), 1 / maps.shape[-1])


def entropy(p: npt.NDArray[Any]) -> Floats:
    """Return H = -sum_n p_n log p_n in nats of distributions (..., N), (...): 0 for one-hot, log N for uniform."""
    p = np.asarray(p, np.float64)
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1) + 0.0)


def js_divergence(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> Floats:
    """Return H((p + q) / 2) - (H(p) + H(q)) / 2 in nats of distributions (..., N), (...), in [0, log 2]."""
    middle = (np.asarray(p, np.float64) + np.asarray(q, np.float64)) / 2
    return np.maximum(entropy(middle) - (entropy(p) + entropy(q)) / 2, 0)


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """Return the cosine of vectors (..., D), (...), in [-1, 1]; 0 with a vector of zeros."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(axis=-1) / np.maximum(length, 1e-12))


def correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """Return Pearson's correlation of maps (B, N), (B,), in [-1, 1]; NaN where one of them is constant."""
    a, b = (np.asarray(m, np.float64) - np.mean(m, axis=-1, keepdims=True) for m in (a, b))
    flat = (np.abs(a).max(axis=-1) < 1e-12) | (np.abs(b).max(axis=-1) < 1e-12)
    return np.where(flat, np.nan, cosine(a, b))


def patch_shares(mask: npt.NDArray[Any], grid: tuple[int, int]) -> Floats:
    """Return which share of each patch's area a mask covers, exactly, also where patches cut pixels.

    S = R M C^T: R (h, H) holds the overlap of patch rows with pixel rows over a patch's height, C likewise.

    Args:
        mask: shape (H, W).
        grid: (h, w).

    Returns:
        Shape (h, w), in [0, 1].
    """
    height, width = mask.shape
    return np.asarray(_overlap(grid[0], height) @ np.asarray(mask, np.float64) @ _overlap(grid[1], width).T)


def _overlap(cells: int, pixels: int) -> Floats:
    """How much of each of `cells` equal pieces lies on each of `pixels` pixels, (cells, pixels), rows sum to 1."""
    cell = np.arange(cells + 1) * pixels / cells
    pixel = np.arange(pixels + 1)
    end = np.minimum(cell[1:, None], pixel[None, 1:])
    begin = np.maximum(cell[:-1, None], pixel[None, :-1])
    return np.asarray(np.maximum(end - begin, 0) * cells / pixels)


def union_shares(parts: Iterable[Any], size: tuple[int, int], grid: tuple[int, int]) -> Floats | None:
    """Return the patch shares (h, w) of the union of an image's parts, None where nothing of it is visible.

    Args:
        parts: rows of the table `parts` with its columns as attributes, of one image.
        size: (height, width) of the image.
        grid: (h, w).
    """
    masks = [decode_mask(part.mask, *size) for part in parts]
    whole = np.any(masks, axis=0) if masks else np.zeros(size, bool)
    return patch_shares(whole, grid) if whole.any() else None


def mass(maps: npt.NDArray[Any], shares: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> Floats:
    """Return the part of distributions (B, N) that lies on regions, sum_n p_n s_n, (B,), in [0, 1].

    A uniform distribution gives the region's share of the picture.

    Args:
        maps: distributions over patches.
        shares: the share of each patch that is inside, (B, N).
    """
    return np.asarray((np.asarray(maps, np.float64) * np.asarray(shares, np.float64)).sum(axis=-1))
