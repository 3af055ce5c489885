"""A small painter: shapes on a supersampled canvas with a colour and a part label per sample.

Coordinates are virtual units: a picture is always 128 high and 56 wide, y down, whatever its size in pixels. All
arithmetic is +, -, *, /, sqrt, remainders and comparisons on float32, which IEEE 754 defines to the last bit; no libm,
no reordered sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reidctl.synthped.palette import Colour

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

# 56, not 64: pedestrian detectors cut tight boxes, and resizing these to 1:2 makes people a little stout.
HEIGHT, WIDTH = 128.0, 56.0
BACKGROUND, SKIN, HAIR, FACE, UPPER, LOWER, SHOES, BAG, HAT, PHONE, UMBRELLA = range(11)
LABELS = {"hair": HAIR, "face": FACE, "upper": UPPER, "lower": LOWER, "shoes": SHOES, "bag": BAG, "hat": HAT}
LABELS |= {"phone": PHONE, "umbrella": UMBRELLA}


@dataclass(frozen=True, slots=True)
class Region:
    """Samples covered by a shape, inside a window of the canvas.

    `across` runs over the shape in units from its middle line, `along` from its start; `bulge` is -1 at one edge and
    1 at the other: a cylinder's cross-section, used for shading.
    """

    rows: slice
    columns: slice
    mask: Bools
    bulge: Floats
    across: Floats
    along: Floats

    def where(self, extra: Bools) -> "Region":
        """The same region cut to where `extra` (same window) is true."""
        return Region(self.rows, self.columns, self.mask & extra, self.bulge, self.across, self.along)


@dataclass(frozen=True, slots=True)
class Fabric:
    """How a surface is coloured: base colour, second colour and the pattern that mixes them.

    `period` is the pattern's repeat in virtual units; `gloss` is how strongly the shape's roundness shows.
    """

    colour: Colour
    second: Colour
    pattern: str = "plain"
    period: float = 5.0
    gloss: float = 0.26
    split: float = 18.0  # along which a two-tone garment changes colour


def plain(colour: Colour, gloss: float = 0.26) -> Fabric:
    """A fabric of one colour."""
    return Fabric(colour, colour, gloss=gloss)


class Canvas:
    """Colours and labels under construction, at `oversample` samples per pixel and direction."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.oversample = max(1, min(4, -(-256 // height)))
        tall, wide = height * self.oversample, width * self.oversample
        self.y_step, self.x_step = HEIGHT / tall, WIDTH / wide
        self.ys = ((np.arange(tall, dtype=np.float32) + np.float32(0.5)) * np.float32(self.y_step))[:, None]
        self.xs = ((np.arange(wide, dtype=np.float32) + np.float32(0.5)) * np.float32(self.x_step))[None, :]
        self.rgb: Floats = np.zeros((tall, wide, 3), dtype=np.float32)
        self.label = np.zeros((tall, wide), dtype=np.uint8)
        self.light = 0.25  # where the light comes from: -1 left, 1 right

    def _window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice, Floats, Floats]:
        tall, wide = self.label.shape
        top, bottom = max(0, int(y0 / self.y_step)), min(tall, int(y1 / self.y_step) + 2)
        left, right = max(0, int(x0 / self.x_step)), min(wide, int(x1 / self.x_step) + 2)
        rows, columns = slice(top, max(top, bottom)), slice(left, max(left, right))
        return rows, columns, self.ys[rows], self.xs[:, columns]

    def capsule(self, ax: float, ay: float, bx: float, by: float, ra: float, rb: float) -> Region:
        """A limb from (ax, ay) with radius ra to (bx, by) with radius rb, round ends."""
        reach = max(ra, rb) + 1
        rows, columns, y, x = self._window(
            min(ax, bx) - reach, min(ay, by) - reach, max(ax, bx) + reach, max(ay, by) + reach
        )
        dx, dy = bx - ax, by - ay
        square = dx * dx + dy * dy + 1e-6
        length = math.sqrt(square)
        px, py = x - ax, y - ay
        t: Floats = np.clip((px * dx + py * dy) * (1 / square), 0, 1)
        radius = ra + t * (rb - ra)
        ox, oy = px - t * dx, py - t * dy
        across = (py * (dx / length) - px * (dy / length)) if dy < 0 else (px * (dy / length) - py * (dx / length))
        return Region(rows, columns, ox * ox + oy * oy <= radius * radius, across / radius, across, t * length)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> Region:
        """An axis-parallel ellipse."""
        rows, columns, y, x = self._window(cx - rx - 1, cy - ry - 1, cx + rx + 1, cy + ry + 1)
        u, v = (x - cx) * (1 / rx), (y - cy) * (1 / ry)
        zeros = np.zeros((y.shape[0], x.shape[1]), dtype=np.float32)
        return Region(rows, columns, u * u + v * v <= 1, u + zeros, x - cx + zeros, y - (cy - ry) + zeros)

    def profile(self, nodes: Sequence[tuple[float, float, float]]) -> Region:
        """A shape given by its edges at some heights: (y, left, right), y increasing, straight between."""
        lefts, rights = [node[1] for node in nodes], [node[2] for node in nodes]
        rows, columns, y, x = self._window(min(lefts) - 1, nodes[0][0], max(rights) + 1, nodes[-1][0])
        heights = np.array([node[0] for node in nodes], dtype=np.float32)
        segment: Floats = np.clip(np.searchsorted(heights, y[:, 0], side="right") - 1, 0, len(nodes) - 2)
        below, above = np.array(nodes, dtype=np.float32)[segment], np.array(nodes, dtype=np.float32)[segment + 1]
        t = ((y[:, 0] - below[:, 0]) / np.maximum(above[:, 0] - below[:, 0], np.float32(1e-3)))[:, None]
        left = below[:, 1:2] + t * (above[:, 1:2] - below[:, 1:2])
        right = below[:, 2:3] + t * (above[:, 2:3] - below[:, 2:3])
        half = np.maximum((right - left) * np.float32(0.5), np.float32(1e-3))
        across = x - (left + right) * np.float32(0.5)
        inside = (np.abs(across) <= half) & (y >= heights[0]) & (y <= heights[-1])
        along = (y - heights[0]) + np.zeros_like(across)
        return Region(rows, columns, inside, across / half, across, along)

    def polygon(self, *points: tuple[float, float]) -> Region:
        """A convex polygon, corners in either direction of turning."""
        px, py = [point[0] for point in points], [point[1] for point in points]
        rows, columns, y, x = self._window(min(px), min(py), max(px), max(py))
        positive = np.ones((y.shape[0], x.shape[1]), dtype=bool)
        negative = positive.copy()
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
            positive &= side >= 0
            negative &= side <= 0
        middle, half = (min(px) + max(px)) / 2, max((max(px) - min(px)) / 2, 1e-3)
        across = x - middle + np.zeros(positive.shape, dtype=np.float32)
        along = y - min(py) + np.zeros(positive.shape, dtype=np.float32)
        return Region(rows, columns, positive | negative, across * (1 / half), across, along)

    def paint(self, region: Region, label: int, fabric: Fabric, dim: float = 1.0) -> None:
        """Cover a region: set its label and its shaded, patterned colour.

        Args:
            region: where.
            label: the part it belongs to.
            fabric: what it looks like.
            dim: multiplies the brightness; below 1 for what lies in shadow or farther away.
        """
        offset = region.bulge - np.float32(self.light)
        shade = np.float32(1.07 * dim) - np.float32(fabric.gloss * dim) * (offset * offset)
        shade = np.maximum(shade, np.float32(0.35 * dim))
        colour = np.array(fabric.colour, dtype=np.float32)
        second = np.array(fabric.second, dtype=np.float32)
        if fabric.pattern == "plain":
            paint = shade[..., None] * colour
        else:
            paint = shade[..., None] * np.where(_pattern(region, fabric)[..., None], second, colour)
        np.copyto(self.rgb[region.rows, region.columns], paint, where=region.mask[..., None])
        self.label[region.rows, region.columns][region.mask] = label

    def tint(self, region: Region, factor: float, label: int | None = None) -> None:
        """Multiply the brightness of a region, only where it shows `label` if one is given: folds, seams, shadows."""
        mask = region.mask
        if label is not None:
            mask = mask & (self.label[region.rows, region.columns] == label)
        window = self.rgb[region.rows, region.columns]
        np.multiply(window, np.float32(factor), out=window, where=mask[..., None])

    def dye(self, region: Region, colour: Colour, label: int) -> None:
        """Set the flat colour of a region where it shows `label`, leaving the label: buttons, eyes, soles."""
        mask = region.mask & (self.label[region.rows, region.columns] == label)
        self.rgb[region.rows, region.columns][mask] = np.array(colour, dtype=np.float32)

    def pixels(self) -> Floats:
        """The mean colour of every pixel, shape (H, W, 3), range about 0 to 255."""
        n = self.oversample
        total = self.rgb[0::n, 0::n].copy()
        for row in range(n):
            for column in range(n):
                if row or column:
                    total += self.rgb[row::n, column::n]
        return total * np.float32(1 / (n * n))

    def labels(self) -> npt.NDArray[np.uint8]:
        """The label that most samples of each pixel have, shape (H, W); the smaller one when there is a tie."""
        n = self.oversample
        best = np.zeros((self.height, self.width), dtype=np.uint8)
        most = np.zeros((self.height, self.width), dtype=np.uint8)
        for label in np.unique(self.label).tolist():
            hit = (self.label == label).astype(np.uint8)
            count = np.zeros_like(most)
            for row in range(n):
                for column in range(n):
                    count += hit[row::n, column::n]
            better = count > most
            best[better] = label
            most[better] = count[better]
        return best


def _pattern(region: Region, fabric: Fabric) -> Bools:
    """Where the second colour shows."""
    period = np.float32(fabric.period)
    across, along = np.mod(region.across + 100 * period, period), np.mod(region.along, period)
    second: Bools = region.along > np.float32(fabric.split)  # two-tone
    if fabric.pattern == "striped":
        second = along < period * np.float32(0.42)
    elif fabric.pattern == "vertically striped":
        second = across < period * np.float32(0.42)
    elif fabric.pattern == "checked":
        narrow = period * np.float32(0.5)
        second = (along < narrow) ^ (across < narrow)
    elif fabric.pattern == "dotted":
        dx, dy = across - period * np.float32(0.5), along - period * np.float32(0.5)
        second = dx * dx + dy * dy <= period * period * np.float32(0.075)
    return second
