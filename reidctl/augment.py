"""What happens to a training image: named recipes and their operators.

A recipe acts twice: on bytes before the pixels are normalised (mirror, shift) and on numbers after it (erase), because
that is where the published code acts, and the value an erased pixel gets depends on it. Every draw comes from the
generator that the caller passes, one per sample; torchvision's and timm's transforms draw from process-wide ones, which
would tie a sample's look to the order of loading.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from reidctl.batch import Finish
from reidctl.config import Section
from reidctl.errors import UsageError

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]
Fill = Literal["mean-pixel", "mean-after", "noise"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

# Differences from the defaults of AugmentConfig.
_IRRA: dict[str, Any] = {"erase_fill": "mean-after", "interpolation": "bilinear"}
_CLIP_REID: dict[str, Any] = {
    "erase_area": (0.02, 1 / 3),
    "erase_aspect": (0.3, 1 / 0.3),
    "erase_fill": "noise",
    "interpolation": "bicubic",
}
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "irra": _IRRA,
    "irra-flip": {**_IRRA, "pad": 0, "erase": 0.0},
    "clip-reid": _CLIP_REID,
    "transreid": _CLIP_REID,
    "none": {"flip": 0.0, "pad": 0, "erase": 0.0},
}
"""What each recipe sets, by name; what it does not name is as in `standard`."""


class AugmentConfig(Section):
    """What happens to a training image; a recipe's name alone, or a mapping that changes some of its settings.

    The order is fixed and the same in all of them: resize, mirror, pad and crop, normalise, erase.

    * `standard`: ours: IRRA's operators, with the two points mended that no text of a paper asks for: an erased pixel
      becomes the mean pixel, and images are resized as the checkpoint's were.
    * `irra`: IRRA with `--img_aug`, as its published runs (anosorae/IRRA, datasets/build.py:36-44 at cfc2378).
    * `irra-flip`: IRRA without `--img_aug`, its program's default (same file, 46-51).
    * `clip-reid`: CLIP-ReID (Syliz517/CLIP-ReID, datasets/make_dataloader_clipreid.py:43-52 at eb1898b, with the
      defaults of timm's RandomErasing and PROB, PADDING, RE_PROB of configs/person/*.yml).
    * `transreid`: the same operators (damo-cv/TransReID, datasets/make_dataloader.py at 4adbe30).
    * `none`: only the resize.

    `flip_respects_sides` is ours and on in every recipe: the published code mirrors whatever the caption says. Set it
    to false for the recipe as published.
    """

    recipe: Literal["standard", "irra", "irra-flip", "clip-reid", "transreid", "none"] = "standard"
    """Where the settings that are not given come from."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal mirror image."""
    flip_respects_sides: bool = True
    """Never mirror an image whose texts say left or right; see `sides.mentions_side`."""
    pad: int = Field(default=10, ge=0)
    """Pixels of black added on each side before a random crop back to size."""
    erase: float = Field(default=0.5, ge=0, le=1)
    """Probability of erasing one random rectangle."""
    erase_area: tuple[float, float] = (0.02, 0.4)
    """Smallest and largest erased share of the image."""
    erase_aspect: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the rectangle, drawn evenly on a logarithmic scale."""
    erase_fill: Fill = "mean-pixel"
    """What an erased pixel becomes, after normalisation. `mean-pixel`: 0, which is the checkpoint's mean pixel (what
    most code means by it, timm's `const`, APTM's value 0). `mean-after`: the mean itself as a normalised value, which
    is a light grey of about 0.6: IRRA passes the mean to RandomErasing after Normalize. `noise`: a number from
    N(0, 1) for every pixel and channel."""
    interpolation: Interpolation | None = None
    """How images are resized, in training and wherever the model is used; None: as the checkpoint's images were.
    (CLIP-ReID and TransReID test with bilinear after training with bicubic; one way everywhere is ours.)"""

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, values: Any) -> Any:
        """Put the recipe's settings under the given ones; a text is a recipe's name."""
        if isinstance(values, str):
            values = {"recipe": values}
        if not isinstance(values, Mapping):
            return values
        name = values.get("recipe", "standard")
        if not isinstance(name, str) or name not in RECIPES:
            close = difflib.get_close_matches(str(name).lower(), RECIPES, n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known recipes: {', '.join(RECIPES)}."
            raise UsageError(f"Unknown augmentation recipe `{name}`.", hint=hint)
        return {**RECIPES[name], **values}

    @field_validator("erase_area", "erase_aspect")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two numbers above 0 are needed, the smaller one first")
        if info.field_name == "erase_area" and value[1] > 1:
            raise ValueError("a share of the image is at most 1")
        return value


@dataclass(frozen=True)
class Erase:
    """A rectangle to erase after normalisation, in pixels, and the seed of its noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


@dataclass(frozen=True)
class Augmented:
    """An image after the operators that act on bytes, and what is left to do.

    Attributes:
        pixels: shape (H, W, 3), contiguous; may be the caller's own array, so do not write into it.
        flipped: whether it is a mirror image.
        erase: what `apply_erase` shall erase; None for nothing.
    """

    pixels: Pixels
    flipped: bool
    erase: Erase | None


def augment_pixels(
    pixels: Pixels, config: AugmentConfig, rng: np.random.Generator, *, may_flip: bool = True
) -> Augmented:
    """Return a randomly mirrored and shifted image of the same size, and the rectangle that is to be erased.

    Switching one operator off, or forbidding the mirror image, leaves the draws of the others as they are.

    Args:
        pixels: shape (H, W, 3), already resized; not changed.
        config: which operators, how likely and how far.
        rng: this sample's generator.
        may_flip: False if a text of this sample says left or right.
    """
    height, width, _ = pixels.shape
    mirror, down, right, erase = rng.random(4)
    flipped = may_flip and bool(mirror < config.flip)
    if flipped:
        pixels = _mirror(pixels)
    if config.pad:
        places = 2 * config.pad + 1
        pixels = _window(pixels, int(down * places) - config.pad, int(right * places) - config.pad)
    box = _draw_box(height, width, config, rng) if erase < config.erase else None
    return Augmented(np.ascontiguousarray(pixels), flipped, box)


def _mirror(pixels: Pixels) -> Pixels:
    """The mirror image; one channel at a time, a fifth of the time that numpy takes to copy `pixels[:, ::-1]`."""
    mirror = np.empty(pixels.shape, np.uint8)
    for channel in range(pixels.shape[2]):
        mirror[:, :, channel] = pixels[:, ::-1, channel]
    return mirror


def _window(pixels: Pixels, top: int, left: int) -> Pixels:
    """What an (H, W) window shows whose corner is at (top, left) of the image; black beside the image.

    The same as padding and cropping without the padded copy: a quarter of the time at 384 x 128.
    """
    height, width, _ = pixels.shape
    top, left = max(-height, min(top, height)), max(-width, min(left, width))
    shown = pixels[max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)]
    window = np.zeros(pixels.shape, np.uint8)
    y, x = max(-top, 0), max(-left, 0)
    window[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
    return window


def _draw_box(height: int, width: int, config: AugmentConfig, rng: np.random.Generator) -> Erase | None:
    """A random rectangle (Zhong et al. 2020, arXiv:1708.04896); None if ten tries gave none inside the image.

    Both torchvision and timm ask for a rectangle that is strictly smaller than the image in both directions.
    """
    low, high = np.log(config.erase_aspect)
    for _ in range(10):
        area = rng.uniform(*config.erase_area) * height * width
        aspect = np.exp(rng.uniform(low, high))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return Erase(top, left, h, w, seed=int(rng.integers(2**63)))
    return None


def apply_erase(
    image: torch.Tensor, erase: Erase | None, config: AugmentConfig, *, mean: Sequence[float] = CLIP_MEAN
) -> None:
    """Erase a rectangle of a normalised image in place; nothing for None.

    Args:
        image: shape (3, H, W), after normalisation.
        erase: from `augment_pixels`.
        config: its `erase_fill` says what the pixels become.
        mean: the value of `mean-after`: what the image was normalised with. IRRA's own is CLIP's.
    """
    if erase is None:
        return
    box = image[:, erase.top : erase.top + erase.height, erase.left : erase.left + erase.width]
    if config.erase_fill == "mean-pixel":
        box.zero_()
    elif config.erase_fill == "mean-after":
        box.copy_(torch.tensor(mean, dtype=image.dtype).view(3, 1, 1).expand_as(box))
    else:
        box.copy_(torch.from_numpy(_noise(erase)))


def _noise(erase: Erase) -> npt.NDArray[np.float32]:
    """What `noise` puts into a rectangle, shape (3, h, w)."""
    return np.random.default_rng(erase.seed).standard_normal((3, erase.height, erase.width), dtype=np.float32)


def finish_of(
    erases: Sequence[Erase | None], levels: torch.Tensor, config: AugmentConfig, *, mean: Sequence[float] = CLIP_MEAN
) -> Finish:
    """Return how a device normalises and erases a batch of bytes; the numbers are those of `apply_erase`, bit for bit.

    Args:
        erases: of each image, from `augment_pixels`.
        levels: what each byte of each channel becomes, shape (3, 256); see `pixels.levels`.
        config: its `erase_fill` says what the pixels become.
        mean: the value of `mean-after`.
    """
    box = np.zeros((len(erases), 4), np.int32)
    walk = np.zeros((len(erases), 4), np.int32)
    fills = [] if config.erase_fill == "noise" else [_colour(config, mean)]
    end = levels.numel()
    for number, erase in enumerate(erases):
        if erase is None:
            continue
        box[number] = (erase.top, erase.left, erase.top + erase.height, erase.left + erase.width)
        if config.erase_fill != "noise":
            walk[number] = (end, 1, 0, 0)
            continue
        walk[number] = (end, erase.height * erase.width, erase.width, 1)
        fills.append(_noise(erase).ravel())
        end += len(fills[-1])
    table = torch.from_numpy(np.concatenate([levels.numpy().ravel(), *fills]))
    return Finish(table, torch.from_numpy(box), torch.from_numpy(walk))


def _colour(config: AugmentConfig, mean: Sequence[float]) -> npt.NDArray[np.float32]:
    """The number of an erased pixel in each channel."""
    return np.zeros(3, np.float32) if config.erase_fill == "mean-pixel" else np.asarray(mean, np.float32)
