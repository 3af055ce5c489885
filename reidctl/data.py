"""From tables to batches: decoding and collation; `augment.py` changes images, `sampling.py` says which samples meet.

Every random choice for a sample is a function of (seed, epoch, position), never of how many workers load it or of
what was loaded before; this is what makes a killed training continue bit-exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl.augment import AugmentConfig, Erase, Interpolation, apply_erase, augment_pixels, finish_of
from reidctl.batch import Batch, Finish, PhraseSets, Roster, Tokens
from reidctl.console import log
from reidctl.errors import DataError
from reidctl.phrases.sets import PhraseTable
from reidctl.pixels import PixelStore, levels, normalise
from reidctl.sides import mentions_side

TargetText = Literal["caption", "identity", "identity+clothing", "clothing", "mix"]
Tokenize = Callable[[list[str]], Tokens]


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
                hint=_split_hint(splits),
            )
        return self.of_rows(rows)

    def of_rows(self, rows: npt.NDArray[np.int64]) -> "Corpus":
        """Return the part of the corpus with these images, in this order."""
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


def training_part(train: Corpus, part: str) -> Corpus:
    """Return the images of a training split that are trained on.

    Args:
        train: the training split.
        part: `captioned` (those with a caption of kind `full`), `caption-free` (the others) or `all`.

    Raises:
        DataError: nothing is left.
    """
    if part == "all":
        return train
    captioned = np.isin(np.arange(len(train.images)), train.captions["row"].to_numpy(np.int64))
    rows = np.flatnonzero(captioned if part == "captioned" else ~captioned)
    if not len(rows):
        raise DataError(f"The training split has no {part} images.", hint="Set data.part to `all`.")
    return train.of_rows(rows)


def camera_names(images: pd.DataFrame) -> npt.NDArray[np.object_]:
    """Return `dataset/camera` of each image, None where the camera is unknown; cameras of two datasets never agree."""
    names = images["dataset"].astype(str) + "/" + images["camera_id"].astype(str)
    return names.astype(object).where(images["camera_id"].notna(), None).to_numpy(dtype=object)


def camera_numbers(images: pd.DataFrame, cameras: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the place of each image's camera among `cameras`, -1 for another or an unknown one."""
    place = {name: number for number, name in enumerate(cameras)}
    return np.asarray([place.get(name, -1) for name in camera_names(images)], np.int64)


def cameras_of(images: pd.DataFrame) -> tuple[str, ...]:
    """Return the names of all known cameras of some images, sorted: the order in which a training set numbers them."""
    return tuple(sorted({name for name in camera_names(images) if name is not None}))


def known_cameras(images: pd.DataFrame, cameras: Sequence[str]) -> torch.Tensor | None:
    """Return `Batch.camera` of images for a method that knows some cameras; None for one that knows none."""
    return torch.from_numpy(camera_numbers(images, cameras)) if cameras else None


def roster_of(images: pd.DataFrame) -> Roster:
    """Return the roster of a training split; people, datasets and cameras are numbered in the order of their names."""
    persons = sorted(set(images["person_id"]))
    number = {name: place for place, name in enumerate(persons)}
    datasets = images["dataset"].astype(str)
    domains = tuple(sorted(set(datasets)))
    people = tuple(tuple(sorted({number[name] for name in images["person_id"][datasets == one]})) for one in domains)
    return Roster(domains, people, cameras_of(images))


def datasets_part(corpus: Corpus, names: Sequence[str]) -> Corpus:
    """Return the part of a corpus in some of its datasets; empty names mean all.

    Raises:
        DataError: one of them is not there.
    """
    check_datasets(corpus.images, names)
    return corpus.of_rows(np.flatnonzero(corpus.images["dataset"].isin(names))) if names else corpus


def check_datasets(images: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse names of datasets that no image is of.

    Raises:
        DataError: one of them is not there.
    """
    known = sorted(set(images["dataset"].astype(str)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"There are no images of dataset `{unknown[0]}`.", hint=f"Known: {', '.join(known)}.")


def _split_hint(splits: Sequence[str]) -> str:
    if "val" in splits:
        return "Import it with a validation split (`--carve-val N` takes people out of train), or name another."
    return "Name another split, or look at the dataset with `reidctl data check`."


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

    @property
    def unique(self) -> Tokens:
        """The tokens of the different texts, numbered as in `group`, padded to the longest."""
        return Tokens(self._ids.long(), self._mask)

    def __call__(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Tokens:
        """Return the tokens of some texts, trimmed to the longest among them, shapes (B, L)."""
        rows = torch.from_numpy(self.group[np.asarray(numbers, np.int64)])
        mask = self._mask[rows]
        length = int(mask.sum(1).max()) if len(rows) else 1
        return Tokens(self._ids[rows, :length].long(), mask[:, :length])


Numbers = npt.NDArray[np.int64]
Key = tuple[int, int, int]
"""(epoch, sample number, position in the epoch): all that decides what a sample looks like."""


@dataclass(frozen=True)
class Sample:
    """One training example before collation; numbers point into the token tables."""

    number: int
    pixels: npt.NDArray[np.uint8]
    row: int
    target: int
    fusion: int
    flipped: bool
    erase: Erase | None


class FrozenStore(Protocol):
    """Features of frozen encoders that were computed once; see `reidctl.frozen`."""

    def images(self, rows: Numbers) -> dict[str, torch.Tensor]:
        """Return the kept features of some images, by name."""

    def texts(self, groups: Numbers) -> dict[str, torch.Tensor]:
        """Return the kept features of some texts, numbered as in `TokenTable.group`, by name."""


class TrainingSet:
    """Training examples: one per caption if the method reads captions, else one per image.

    Images without a caption follow after the captions when `caption_free` says so; otherwise they are left out, but
    their people count: classifiers have the size of the union.

    Args:
        corpus: the training split.
        size: image size (height, width).
        tokenize: the backbone's tokenizer.
        texts: which texts the method reads: any of `full`, `identity`, `clothing`.
        target: what plays the query text t_i during training.
        augment: see `AugmentConfig`.
        interpolation: how images are resized.
        seed: of all random choices.
        shuffle_labels: give every person all texts of another person, or, where no text is read, images of anybody (the
            control that must stay at chance).
        caption_free: make samples of images without a caption too.
        phrases: of the captions, for methods that read part phrases; the target must be the caption then.

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
        interpolation: Interpolation = "bicubic",
        seed: int = 0,
        cache_bytes: int = 1 << 29,
        shuffle_labels: bool = False,
        caption_free: bool = False,
        phrases: PhraseTable | None = None,
    ) -> None:
        self.corpus = corpus
        self.phrases = phrases
        self.statistics = (tuple(mean), tuple(std))
        self.augment = augment or AugmentConfig()
        self.target, self.seed = target, seed
        self.texts = tuple(texts)
        self.frozen: FrozenStore | None = None
        """Kept features that batches bring instead of pixels."""
        self.raw = False
        """Whether batches bring bytes, which `Batch.finished` makes the same numbers of on the device."""
        self.store = PixelStore(corpus.paths(), size, cache_bytes=cache_bytes, interpolation=interpolation)
        self._names: list[str] = [str(name) for name in corpus.images["image_id"]]
        self.persons = sorted(set(corpus.images["person_id"]))
        index = {name: number for number, name in enumerate(self.persons)}
        self.person_of_row = np.asarray([index[name] for name in corpus.images["person_id"]], np.int64)
        self.domains, self.domain_of_row = np.unique(corpus.images["dataset"].astype(str), return_inverse=True)
        self.camera_of_row = camera_numbers(corpus.images, cameras_of(corpus.images))
        # A combination may hold one picture twice, captioned in one dataset and not in the other.
        names = [digest or name for digest, name in zip(corpus.images["sha256"], self._names, strict=True)]
        self.picture_of_row = np.asarray(pd.factorize(np.asarray(names, object))[0], np.int64)
        if shuffle_labels and "full" not in self.texts:
            self.person_of_row = self._shuffled_people()
        self._choose_samples(caption_free)
        self._prepare_texts(tokenize, shuffle_labels)

    def _choose_samples(self, caption_free: bool) -> None:
        """Captions first, so that the number of a caption is its sample's; then images without one, if wanted."""
        captions, rows = self.corpus.captions, np.arange(len(self.corpus.images))
        if "full" not in self.texts:
            self.row_of_sample, self.paired = rows, len(rows)
            self.text_ids = self._names
            return
        described = captions["row"].to_numpy(np.int64)
        # A picture that is captioned somewhere brings nothing new without its caption.
        bare = np.flatnonzero(~np.isin(self.picture_of_row, self.picture_of_row[described]))
        self.row_of_sample = np.concatenate([described, bare]) if caption_free else described
        self.paired = len(described)
        self.text_ids = [str(name) for name in captions["caption_id"]]
        if len(bare) and not caption_free:
            log.info(
                f"{len(bare):,} training images have no caption and are not used (train.sampler: mixed uses them)."
            )

    def _prepare_texts(self, tokenize: Tokenize, shuffle_labels: bool) -> None:
        corpus = self.corpus
        self._need(corpus)
        captions = [str(text) for text in corpus.captions["text"]] if "full" in self.texts else [""] * self.paired
        identity = [text or "" for text in corpus.identity]
        clothing = [text or "" for text in corpus.clothing]
        if shuffle_labels:
            captions, identity, clothing = self._shuffled(captions, identity, clothing)
        self._captions = captions
        both = [f"{a} {b}".strip() for a, b in zip(identity, clothing, strict=True)]
        # One table for all roles: caption s is number s; the texts of image row r follow at fixed offsets.
        self._offsets = {"identity": len(captions), "clothing": len(captions) + len(identity)}
        self._offsets["identity+clothing"] = self._offsets["clothing"] + len(clothing)
        everything = captions + identity + clothing + both
        self.tokens = TokenTable(everything, tokenize)
        self._has_side = np.asarray([mentions_side(text) for text in everything])
        # Whose identity text a fused feature may read: images that have one.
        own = np.asarray([bool(text) for text in corpus.identity])
        by_person = np.argsort(self.person_of_row, kind="stable")
        bounds = np.searchsorted(self.person_of_row[by_person], np.arange(1, len(self.persons)))
        self._mates_of_person = [rows[own[rows]] for rows in np.split(by_person, bounds)]

    def _shuffled_people(self) -> npt.NDArray[np.int64]:
        """Every image given to some person of its dataset at random; everybody keeps their number of images."""
        rng, given = np.random.default_rng((self.seed, 7)), self.person_of_row.copy()
        for domain in range(len(self.domains)):
            rows = np.flatnonzero(self.domain_of_row == domain)
            given[rows] = self.person_of_row[rng.permutation(rows)]
        return given

    def _shuffled(self, captions: list[str], identity: list[str], clothing: list[str]) -> tuple[list[str], ...]:
        """All texts of every person replaced by those of one other person, image by image at random."""
        rng = np.random.default_rng((self.seed, 7))
        order = rng.permutation(len(self.persons))
        donor = np.empty_like(order)
        donor[order] = np.roll(order, 1)  # a cycle through all people: nobody keeps their own texts
        rows = [np.flatnonzero(self.person_of_row == person) for person in donor]
        owners = self.person_of_sample[: self.paired]
        # A person without captions has none to give: everybody then draws from all captions.
        samples = [np.flatnonzero(owners == person) for person in donor]
        samples = [own if len(own) else np.arange(self.paired) for own in samples]
        given = [int(rng.choice(rows[person])) for person in self.person_of_row]
        captions = [captions[int(rng.choice(samples[person]))] for person in owners]
        return captions, [identity[row] for row in given], [clothing[row] for row in given]

    def _need(self, corpus: Corpus) -> None:
        if "full" in self.texts and not len(corpus.captions):
            raise DataError(
                "The training split has no captions, which this method needs: one sample is made of each, whichever "
                "text `method.target` puts in its place.",
                hint="Use a captioned dataset, or give each image a caption (`reidctl data import csv-table`, column "
                "`caption`).",
            )
        used = np.unique(self.row_of_sample)
        target = "identity+clothing" if self.target == "mix" else self.target
        for kind in ("identity", "clothing"):
            if kind not in (*self.texts, *target.split("+")):
                continue
            lacking = [int(row) for row in used if not getattr(corpus, kind)[row]]
            if lacking:
                name = corpus.images["image_id"].iloc[lacking[0]]
                raise DataError(
                    f"{len(lacking)} of {len(used)} training images have no {kind} text (first: `{name}`).",
                    hint="Run `reidctl caption` on this dataset first.",
                )

    def __len__(self) -> int:
        return len(self.row_of_sample)

    @property
    def person_of_sample(self) -> npt.NDArray[np.int64]:
        """The identity index of every sample, shape (S,)."""
        people: npt.NDArray[np.int64] = self.person_of_row[self.row_of_sample]
        return people

    @property
    def picture_of_sample(self) -> npt.NDArray[np.int64]:
        """Which picture every sample shows, by content, shape (S,)."""
        pictures: npt.NDArray[np.int64] = self.picture_of_row[self.row_of_sample]
        return pictures

    def __getitem__(self, key: Key) -> Sample:
        """Return sample `key[1]` as it looks at that place of that epoch."""
        epoch, sample, position = key
        rng = np.random.default_rng((self.seed, epoch, position, sample))
        row = int(self.row_of_sample[sample])
        target = self._target(sample, row, rng)
        fusion = self._fusion(row, target, rng)
        used = [text for text in (target, fusion) if text >= 0]
        used += [self._offsets[kind] + row for kind in ("identity", "clothing") if kind in self.texts]
        if self.frozen is not None:
            return Sample(sample, np.zeros((0, 0, 3), np.uint8), row, target, fusion, False, None)
        may_flip = not (self.augment.flip_respects_sides and bool(self._has_side[used].any()))
        seen = augment_pixels(self.store[row], self.augment, rng, may_flip=may_flip)
        return Sample(sample, seen.pixels, row, target, fusion, seen.flipped, seen.erase)

    def _target(self, sample: int, row: int, rng: np.random.Generator) -> int:
        """The number of the text that plays t_i, -1 for none; `mix` is caption or identity+clothing with p = 1/2."""
        if sample >= self.paired:
            return -1
        kind = self.target
        if kind == "mix":
            kind = "caption" if rng.random() < 0.5 else "identity+clothing"
        return sample if kind == "caption" else self._offsets[kind] + row

    def _fusion(self, row: int, target: int, rng: np.random.Generator) -> int:
        """The identity text of ANOTHER image of this person; -1 if there is none, or if t_i is a described text.

        Described identity texts of one person are often the same words. If some t_j of the batch contained them, the
        fused feature could find its positive by copying; with captions as targets it cannot.
        """
        if "identity" not in self.texts or not 0 <= target < self._offsets["identity"]:
            return -1
        mates = self._mates_of_person[self.person_of_row[row]]
        mates = mates[mates != row]
        return self._offsets["identity"] + int(mates[rng.integers(len(mates))]) if len(mates) else -1

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as one batch; texts that the method does not read, or that a sample lacks, are left out."""
        rows = np.asarray([sample.row for sample in samples])
        target = np.asarray([sample.target for sample in samples])
        fusion = np.asarray([sample.fusion for sample in samples])
        paired = target >= 0
        image, finish = (None, None) if self.frozen is not None else self._pixels(samples)
        return Batch(
            image=image,
            frozen=self._kept(rows, target[paired]),
            person=torch.from_numpy(self.person_of_row[rows]),
            texts=self._tokens(rows[paired], target[paired], fusion[paired]),
            image_id=tuple(self._names[row] for row in rows),
            text_id=tuple(self._text_name(sample) for sample in samples),
            clothing_group=torch.from_numpy(self.tokens.group[self._offsets["clothing"] + rows]),
            has_fusion=torch.from_numpy(fusion >= 0),
            has_text=None if paired.all() else torch.from_numpy(paired),
            domain=torch.from_numpy(self.domain_of_row[rows]),
            phrases=self._phrases_of(target[paired]),
            camera=torch.from_numpy(self.camera_of_row[rows]),
            sample=torch.tensor([sample.number for sample in samples]),
            finish=finish,
        ).located()

    def _pixels(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, Finish | None]:
        """The images, normalised and erased; or bytes and what is left to do with them."""
        pixels, mean = np.stack([sample.pixels for sample in samples]), self.statistics[0]
        if self.raw:
            erases = [sample.erase for sample in samples]
            return torch.from_numpy(pixels), finish_of(erases, levels(*self.statistics), self.augment, mean=mean)
        image = normalise(pixels, *self.statistics)
        for own, sample in zip(image, samples, strict=True):
            apply_erase(own, sample.erase, self.augment, mean=mean)
        return image, None

    def _phrases_of(self, target: Numbers) -> PhraseSets | None:
        return None if self.phrases is None else self.phrases.sets([self._captions[number] for number in target])

    def _kept(self, rows: Numbers, target: Numbers) -> dict[str, torch.Tensor]:
        if self.frozen is None:
            return {}
        texts = self.frozen.texts(self.tokens.group[target]) if "full" in self.texts and len(target) else {}
        return self.frozen.images(rows) | texts

    def _tokens(self, rows: Numbers, target: Numbers, fusion: Numbers) -> dict[str, Tokens]:
        """The texts of the samples that have one."""
        texts: dict[str, Tokens] = {}
        if not len(rows):
            return texts
        if "full" in self.texts:
            texts["full"] = self.tokens(target)
        for kind in ("identity", "clothing"):
            if kind in self.texts:
                texts[kind] = self.tokens(self._offsets[kind] + rows)
        if "identity" in self.texts:
            # Rows without a fusion text carry their own identity tokens as filler; `has_fusion` keeps them unread.
            texts["fusion"] = self.tokens(np.where(fusion >= 0, fusion, self._offsets["identity"] + rows))
        return texts

    def _text_name(self, sample: Sample) -> str:
        if sample.target < 0:
            return ""
        if sample.target < self._offsets["identity"]:
            return self.text_ids[sample.target]
        return f"{self._names[sample.row]}:described"
