"""From tables to batches: decoding, augmentation and collation; `sampling.py` says which samples meet in a batch.

Every random choice for a sample is a function of (seed, epoch, position), never of how many workers load it or of
what was loaded before; this is what makes a killed training continue bit-exactly.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset

from reidctl.batch import Batch, Tokens
from reidctl.config import Section
from reidctl.errors import DataError

TargetText = Literal["caption", "identity", "identity+clothing", "mix"]
Tokenize = Callable[[list[str]], Tokens]

_SIDE_WORDS = ("left", "right")
# Anything larger than this is a decompression bomb, not a picture of a person (Pillow warns at half of it).
_MAX_PIXELS = 64_000_000


class AugmentConfig(Section):
    """What happens to a training image, in this order; IRRA's recipe by default."""

    flip: float = 0.5
    """Probability of a horizontal mirror image."""
    flip_respects_sides: bool = True
    """Never mirror an image whose texts say left or right."""
    pad: int = 10
    """Pixels of black added on each side before a random crop back to size."""
    erase: float = 0.5
    """Probability of erasing one random rectangle with the mean pixel."""
    erase_area: tuple[float, float] = (0.02, 0.4)
    """Smallest and largest erased share of the image."""


def read_pixels(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return an image as RGB at (height, width), bicubic, shape (H, W, 3).

    Raises:
        DataError: the file is missing, not an image, truncated, or absurdly large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{path} has {image.width}x{image.height} pixels; the limit is {_MAX_PIXELS:,}.")
            rgb = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise DataError(f"Image {path} does not exist.", hint="Was the dataset moved? Import it again.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"Image {path} cannot be read ({error}).", hint="Replace it or remove its row.") from None
    return np.asarray(rgb)


class PixelStore:
    """Decoded images by row, the most recent ones kept in memory.

    Args:
        paths: one file per row.
        size: (height, width) of what is returned.
        cache_bytes: decoded bytes to keep; 0 keeps none.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], *, cache_bytes: int = 1 << 29) -> None:
        self.paths = list(paths)
        self.size = size
        self._room = cache_bytes // (size[0] * size[1] * 3)
        self._kept: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """Return image `row`, shape (H, W, 3); see `read_pixels` for what is raised."""
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        pixels = read_pixels(self.paths[row], self.size)
        if self._room:
            self._kept[row] = pixels
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return pixels


def normalise(pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (B, H, W, 3) bytes as (B, 3, H, W) float32 with the checkpoint's pixel statistics."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(255.0)
    shape = (1, 3, 1, 1)
    return image.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


@dataclass(frozen=True)
class Corpus:
    """The images and texts of some splits, aligned by row.

    Attributes:
        images: rows of the `images` table, index 0..N-1.
        captions: rows of kind `full` with an extra column `row` that points into `images`.
        identity, clothing: one text per image, None where there is none.
        root: what relative image paths are relative to.
    """

    images: pd.DataFrame
    captions: pd.DataFrame
    identity: list[str | None]
    clothing: list[str | None]
    root: Path

    def paths(self) -> list[Path]:
        """The image files, one per row."""
        return [self.root / path for path in self.images["path"]]

    def of_split(self, *splits: str) -> "Corpus":
        """Return the part of the corpus in the given splits.

        Raises:
            DataError: no image is in them.
        """
        rows = np.flatnonzero(self.images["split"].isin(splits))
        if not len(rows):
            present = ", ".join(sorted(set(self.images["split"])))
            raise DataError(
                f"The dataset has no `{'`, `'.join(splits)}` split (it has: {present or 'no images'}).",
                hint="Import it with a validation split, or name another split.",
            )
        place = {int(old): new for new, old in enumerate(rows)}
        captions = self.captions[self.captions["row"].isin(place)].copy()
        captions["row"] = [place[int(row)] for row in captions["row"]]
        return Corpus(
            self.images.iloc[rows].reset_index(drop=True),
            captions.reset_index(drop=True),
            [self.identity[row] for row in rows],
            [self.clothing[row] for row in rows],
            self.root,
        )


def build_corpus(images: pd.DataFrame, captions: pd.DataFrame, described: pd.DataFrame | None, root: Path) -> Corpus:
    """Join the tables of a dataset.

    Args:
        images: the `images` table.
        captions: a `captions` table; rows of kind `full` become the captions.
        described: a `captions` table with kinds `identity` and `clothing`, one accepted text per image; None if
            nobody has described the images yet.
        root: what relative paths are relative to.

    Raises:
        DataError: duplicate image ids, a caption of an unknown image, an empty caption.
    """
    duplicated = images["image_id"][images["image_id"].duplicated()]
    if len(duplicated):
        raise DataError(f"Image id `{duplicated.iloc[0]}` occurs more than once in the images table.")
    repeated = captions["caption_id"][captions["caption_id"].duplicated()]
    if len(repeated):
        raise DataError(f"Caption id `{repeated.iloc[0]}` occurs more than once in the captions table.")
    row_of = {name: row for row, name in enumerate(images["image_id"])}
    full = captions[(captions["kind"] == "full") & (captions["status"] == "ok")].reset_index(drop=True)
    for name, image_id, text in zip(full["caption_id"], full["image_id"], full["text"], strict=True):
        if image_id not in row_of:
            raise DataError(f"Caption `{name}` belongs to image `{image_id}`, which is not in the images table.")
        if not (isinstance(text, str) and text.strip()):
            raise DataError(f"Caption `{name}` of image `{image_id}` is empty.", hint="Remove the row or write a text.")
    full["row"] = [row_of[image_id] for image_id in full["image_id"]]
    return Corpus(
        images.reset_index(drop=True),
        full,
        _texts_of(described, "identity", row_of),
        _texts_of(described, "clothing", row_of),
        root,
    )


def _texts_of(described: pd.DataFrame | None, kind: str, row_of: Mapping[str, int]) -> list[str | None]:
    texts: list[str | None] = [None] * len(row_of)
    if described is None:
        return texts
    accepted = described[(described["kind"] == kind) & (described["status"] == "ok")]
    foreign = accepted[accepted["conditioned_on"] != "image"]
    if len(foreign):
        raise DataError(
            f"The {kind} text of image `{foreign['image_id'].iloc[0]}` was not written from its image alone "
            f"(conditioned_on = {foreign['conditioned_on'].iloc[0]}).",
            hint="Texts that saw a query caption may not describe a gallery image; caption the images again.",
        )
    for image_id, text in zip(accepted["image_id"], accepted["text"], strict=True):
        if image_id not in row_of or not (isinstance(text, str) and text.strip()):
            continue
        if texts[row_of[image_id]] is not None:
            raise DataError(f"Image `{image_id}` has two {kind} texts.", hint="Keep one row per image and kind.")
        texts[row_of[image_id]] = text
    return texts


class TokenTable:
    """Texts tokenised once, looked up by number.

    Args:
        texts: any texts, repeated or not; text i is number i.
        tokenize: the backbone's tokenizer.
    """

    def __init__(self, texts: Sequence[str], tokenize: Tokenize) -> None:
        unique = sorted(set(texts))
        number = {text: index for index, text in enumerate(unique)}
        self.group = np.asarray([number[text] for text in texts], np.int64)
        tokens = tokenize(unique) if unique else Tokens(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1) > 0)
        self._ids, self._mask = tokens.ids.to(torch.int32), tokens.mask

    def __call__(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Tokens:
        """Return the tokens of some texts, trimmed to the longest among them, shapes (B, L)."""
        rows = torch.from_numpy(self.group[np.asarray(numbers, np.int64)])
        mask = self._mask[rows]
        length = int(mask.sum(1).max()) if len(rows) else 1
        return Tokens(self._ids[rows, :length].long(), mask[:, :length])


Key = tuple[int, int, int]
"""(epoch, sample number, position in the epoch): all that decides what a sample looks like."""


@dataclass(frozen=True)
class Sample:
    """One training example before collation; numbers point into the token tables."""

    pixels: npt.NDArray[np.uint8]
    row: int
    target: int
    fusion: int
    flipped: bool


class TrainingSet(Dataset[Sample]):
    """Training examples: one per caption if the method reads texts, else one per image.

    Args:
        corpus: the training split.
        size: image size (height, width).
        tokenize: the backbone's tokenizer.
        texts: which texts the method reads: any of `full`, `identity`, `clothing`.
        target: what plays the query text t_i during training.
        augment: see `AugmentConfig`.
        seed: of all random choices.
        shuffle_labels: give every person all texts of another person (the control that must stay at chance).

    Raises:
        DataError: a text that the method needs is missing.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        tokenize: Tokenize,
        texts: Sequence[str],
        target: TargetText = "caption",
        augment: AugmentConfig | None = None,
        seed: int = 0,
        cache_bytes: int = 1 << 29,
        shuffle_labels: bool = False,
    ) -> None:
        self.corpus = corpus
        self.statistics = (tuple(mean), tuple(std))
        self.augment = augment or AugmentConfig()
        self.target, self.seed = target, seed
        self.texts = tuple(texts)
        self.store = PixelStore(corpus.paths(), size, cache_bytes=cache_bytes)
        self.persons = sorted(set(corpus.images["person_id"]))
        index = {name: number for number, name in enumerate(self.persons)}
        self.person_of_row = np.asarray([index[name] for name in corpus.images["person_id"]], np.int64)
        self._prepare_texts(tokenize, shuffle_labels)

    def _prepare_texts(self, tokenize: Tokenize, shuffle_labels: bool) -> None:
        corpus = self.corpus
        self._need(corpus)
        if "full" in self.texts:
            self.row_of_sample = corpus.captions["row"].to_numpy(np.int64)
            captions = [str(text) for text in corpus.captions["text"]]
        else:
            self.row_of_sample = np.arange(len(corpus.images))
            captions = [""] * len(corpus.images)
        self.text_ids = (
            [str(name) for name in corpus.captions["caption_id"]]
            if "full" in self.texts
            else list(corpus.images["image_id"])
        )
        identity = [text or "" for text in corpus.identity]
        clothing = [text or "" for text in corpus.clothing]
        if shuffle_labels:
            captions, identity, clothing = self._shuffled(captions, identity, clothing)
        both = [f"{a} {b}".strip() for a, b in zip(identity, clothing, strict=True)]
        # One table for all roles: caption s is number s; the texts of image row r follow at fixed offsets.
        self._offsets = {"identity": len(captions), "clothing": len(captions) + len(identity)}
        self._offsets["identity+clothing"] = self._offsets["clothing"] + len(clothing)
        everything = captions + identity + clothing + both
        self.tokens = TokenTable(everything, tokenize)
        self._has_side = np.asarray([_mentions_side(text) for text in everything])
        self._rows_of_person = [np.flatnonzero(self.person_of_row == p) for p in range(len(self.persons))]

    def _shuffled(self, captions: list[str], identity: list[str], clothing: list[str]) -> tuple[list[str], ...]:
        """All texts of every person replaced by those of one other person, image by image at random."""
        rng = np.random.default_rng((self.seed, 7))
        order = rng.permutation(len(self.persons))
        donor = np.empty_like(order)
        donor[order] = np.roll(order, 1)  # a cycle through all people: nobody keeps their own texts
        rows = [np.flatnonzero(self.person_of_row == person) for person in donor]
        samples = [np.flatnonzero(self.person_of_sample == person) for person in donor]
        given = [int(rng.choice(rows[person])) for person in self.person_of_row]
        captions = [captions[int(rng.choice(samples[person]))] for person in self.person_of_sample]
        return captions, [identity[row] for row in given], [clothing[row] for row in given]

    def _need(self, corpus: Corpus) -> None:
        if "full" in self.texts and not len(corpus.captions):
            raise DataError(
                "The training split has no captions, which this method needs.",
                hint="Use a captioned dataset, or a method that trains on images alone.",
            )
        for kind in ("identity", "clothing"):
            if kind not in self.texts and kind not in self.target:
                continue
            lacking = [i for i, text in enumerate(getattr(corpus, kind)) if not text]
            if lacking:
                name = corpus.images["image_id"].iloc[lacking[0]]
                raise DataError(
                    f"{len(lacking)} of {len(corpus.images)} training images have no {kind} text (first: `{name}`).",
                    hint="Run `reidctl caption` on this dataset first.",
                )

    def __len__(self) -> int:
        return len(self.row_of_sample)

    @property
    def person_of_sample(self) -> npt.NDArray[np.int64]:
        """The identity index of every sample, shape (S,)."""
        people: npt.NDArray[np.int64] = self.person_of_row[self.row_of_sample]
        return people

    def __getitem__(self, key: Key) -> Sample:
        """Return sample `key[1]` as it looks at that place of that epoch."""
        epoch, sample, position = key
        rng = np.random.default_rng((self.seed, epoch, position, sample))
        row = int(self.row_of_sample[sample])
        target = self._target(sample, row, rng)
        fusion = self._fusion(row, target, rng)
        used = [target] + ([self._offsets["clothing"] + row] if "clothing" in self.texts else [])
        used += [fusion] if fusion >= 0 else []
        may_flip = not (self.augment.flip_respects_sides and bool(self._has_side[used].any()))
        pixels, flipped = augment_image(self.store[row], self.augment, rng, self.statistics[0], may_flip=may_flip)
        return Sample(pixels, row, target, fusion, flipped)

    def _target(self, sample: int, row: int, rng: np.random.Generator) -> int:
        """The number of the text that plays t_i; `mix` is caption or identity+clothing with p = 1/2."""
        kind = self.target
        if kind == "mix":
            kind = "caption" if rng.random() < 0.5 else "identity+clothing"
        return sample if kind == "caption" else self._offsets[kind] + row

    def _fusion(self, row: int, target: int, rng: np.random.Generator) -> int:
        """The identity text of ANOTHER image of this person; -1 if there is none, or if t_i is a described text.

        Described identity texts of one person are often the same words. If some t_j of the batch contained them, the
        fused feature could find its positive by copying; with captions as targets it cannot.
        """
        if "identity" not in self.texts or target >= self._offsets["identity"]:
            return -1
        mates = self._rows_of_person[self.person_of_row[row]]
        mates = mates[mates != row]
        return self._offsets["identity"] + int(mates[rng.integers(len(mates))]) if len(mates) else -1

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as one batch; texts that the method does not read are left out."""
        rows = np.asarray([sample.row for sample in samples])
        texts: dict[str, Tokens] = {}
        if "full" in self.texts:
            texts["full"] = self.tokens([sample.target for sample in samples])
        for kind in ("identity", "clothing"):
            if kind in self.texts:
                texts[kind] = self.tokens(self._offsets[kind] + rows)
        fusion = np.asarray([sample.fusion for sample in samples])
        if "identity" in self.texts:
            # Rows without a fusion text carry their own identity tokens as filler; `has_fusion` keeps them unread.
            texts["fusion"] = self.tokens(np.where(fusion >= 0, fusion, self._offsets["identity"] + rows))
        return Batch(
            image=normalise(np.stack([sample.pixels for sample in samples]), *self.statistics),
            person=torch.from_numpy(self.person_of_row[rows]),
            texts=texts,
            image_id=tuple(self.corpus.images["image_id"].iloc[rows]),
            text_id=tuple(self._text_name(sample) for sample in samples),
            clothing_group=torch.from_numpy(self.tokens.group[self._offsets["clothing"] + rows]),
            has_fusion=torch.from_numpy(fusion >= 0),
        )

    def _text_name(self, sample: Sample) -> str:
        if sample.target < self._offsets["identity"]:
            return self.text_ids[sample.target]
        return f"{self.corpus.images['image_id'].iloc[sample.row]}:described"


def augment_image(
    pixels: npt.NDArray[np.uint8],
    config: AugmentConfig,
    rng: np.random.Generator,
    mean: Sequence[float],
    *,
    may_flip: bool = True,
) -> tuple[npt.NDArray[np.uint8], bool]:
    """Return a randomly mirrored, shifted and erased copy (H, W, 3), and whether it was mirrored.

    Written here rather than taken from torchvision because its transforms draw from a process-wide generator, which
    would tie a sample's look to the order of loading.
    """
    height, width, _ = pixels.shape
    flipped = may_flip and rng.random() < config.flip
    if flipped:
        pixels = pixels[:, ::-1]
    if config.pad:
        padded = np.pad(pixels, ((config.pad, config.pad), (config.pad, config.pad), (0, 0)))
        top, left = rng.integers(2 * config.pad + 1), rng.integers(2 * config.pad + 1)
        pixels = padded[top : top + height, left : left + width]
    if rng.random() < config.erase:
        pixels = pixels.copy()
        y, x, h, w = _erased_box(height, width, config.erase_area, rng)
        pixels[y : y + h, x : x + w] = np.round(np.asarray(mean) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels), bool(flipped)


def _erased_box(
    height: int, width: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random rectangle of that share of the image and an aspect ratio in [0.3, 3.3] (Zhong et al. 2020)."""
    for _ in range(10):
        size = rng.uniform(*area) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        h, w = round(np.sqrt(size * aspect)), round(np.sqrt(size / aspect))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, 0, 0


def _mentions_side(text: str) -> bool:
    words = text.lower().replace("-", " ").split()
    return any(word.strip(".,;:()'\"") in _SIDE_WORDS for word in words)


def image_batches(
    store: PixelStore, mean: Sequence[float], std: Sequence[float], *, batch: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield all images in order as (rows, normalised pixels of shape (b, 3, H, W))."""
    for start in range(0, len(store), batch):
        rows = slice(start, min(start + batch, len(store)))
        pixels = np.stack([store[row] for row in range(rows.start, rows.stop)])
        yield rows, normalise(pixels, mean, std)
