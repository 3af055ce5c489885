"""Market-1501: people under six cameras, with a query and a gallery set; person and camera are in the file name."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from reidctl.datasets.base import Draft, Entry, Options, Probe
from reidctl.datasets.matlab import AttributeFile
from reidctl.datasets.named import (
    MAY_READ,
    Official,
    Reading,
    camera_numbers,
    has_folder,
    images_in,
    laid_out,
    locate,
    located,
    missing_in,
    need_test,
    person_words,
    some_image,
    with_attributes,
)
from reidctl.datasets.writing import numbered_people, place

OPTIONS = frozenset({"seed", "carve_val"})
FOLDERS = (("bounding_box_train", "train", None), ("query", "test", "query"), ("bounding_box_test", "test", "gallery"))
MARKERS = ("bounding_box_train", "bounding_box_test")
JUNK, DISTRACTOR = -1, 0
NO_YES = ("no", "yes")
# Names that tell whose release this is.
LOOKED_AT = 50
MARKET_STYLE = re.compile(r"-?\d+_c\d+s\d+_")
DUKE_STYLE = re.compile(r"\d+_c\d+_f\d+")
_FILE = re.compile(r"(-?\d+)_c(\d+)(?!\d)")
_CARRIED = {"backpack": "backpack", "shoulder bag": "bag", "handbag": "handbag", "cap": "hat"}
_LONG_SLEEVES = frozenset({"shirt", "hoodie", "jacket", "coat", "sweater"})
_LONG_LOWER = frozenset({"trousers", "leggings"})


@dataclass(frozen=True)
class Release:
    """A dataset in Market-1501's layout.

    Attributes:
        name: in ids.
        title: in sentences.
        roots: folders it may lie in, below the folder that is given.
        official: people, images and captions by split.
        roles: how many query and gallery images.
        cameras: how many.
        style: what the images of this release are called and those of its relatives are not.
        relative: name and style of the other release in this layout.
        file: the style, for writing.
        attributes: its file of attributes.
    """

    name: str
    title: str
    roots: tuple[str, ...]
    official: Official
    roles: Mapping[str, int]
    cameras: int
    style: re.Pattern[str]
    relative: tuple[str, re.Pattern[str]]
    file: str
    attributes: AttributeFile

    def read(self, root: Path, options: Options) -> Draft:
        """Return the images: junk (-1) dropped, distractors (0000) kept, attributes added where there are any.

        Raises:
            DataError: a folder is missing, a file name does not say person and camera, most are those of another
                release, there are no queries, or attributes are damaged.
            UsageError: `carve_val` asks for more people than train has.
        """
        folder = located(root, self.roots, MARKERS, self.title)
        reading = Reading(options.lenient)
        self._read_images(folder, reading)
        self._check_style(folder, reading)
        reading.need_queries(folder / "query")
        reading.compare(self.title, self.official, self.cameras, self.roles)
        annotation, people = self._read_attributes(folder, reading)
        if annotation is not None:
            reading.entries = with_attributes(reading.entries, people)
            found = {int(entry.person) for entry in reading.entries} - {DISTRACTOR}
            lacking = len(found - people.keys())
            reading.notes.append(f"Attributes of {len(found) - lacking:,} people from {annotation.name}.")
            if lacking:
                reading.notes.append(f"{lacking:,} people have no row in {annotation.name}, so no attributes.")
        reading.carve(options)
        return reading.draft(self.name, annotation)

    def _check_style(self, folder: Path, reading: Reading) -> None:
        """Refuse the other release in this layout, or its people would get this one's name and numbers."""
        other, style = self.relative
        names = [entry.path.name for entry in reading.entries[:LOOKED_AT]]
        foreign = [name for name in names if style.match(name)]
        if 2 * len(foreign) > len(names):
            reading.reject(
                f"{folder} holds {other}, not {self.title}: its images have names such as {foreign[0]}.",
                f"Read it as {other}.",
            )

    def _read_attributes(self, folder: Path, reading: Reading) -> tuple[Path | None, dict[int, dict[str, str]]]:
        try:
            return self.attributes.read(folder, reading)
        except OSError as error:
            reading.reject(f"{error.filename or folder} cannot be read ({error.strerror}).", MAY_READ)
            return None, {}

    def _read_images(self, folder: Path, reading: Reading) -> None:
        junk = distractors = 0
        for name, split, role in FOLDERS:
            for path in images_in(folder / name, folder, reading):
                match = _FILE.match(path.name)
                if match is None:
                    example = self.file.format(person=2, camera=1, frame=451, suffix=".jpg")
                    reading.reject(f"{path}: the name does not begin with PERSON_cCAMERA, e.g. {example}.")
                    continue
                person = int(match[1])
                if person == JUNK:
                    junk += 1
                elif person == DISTRACTOR and role != "gallery":
                    reading.reject(f"{path}: a distractor (person 0) belongs in bounding_box_test.")
                else:
                    distractors += person == DISTRACTOR
                    key = f"{name}/{path.name}"
                    reading.entries.append(Entry(key, path, split, match[1], role, f"c{int(match[2])}"))
        if junk:
            reading.notes.append(f"{junk:,} junk image(s) (person -1) left out, as the benchmark's protocol has it.")
        if distractors:
            reading.notes.append(
                f"{distractors:,} distractor(s) (person 0000) kept in the gallery; they share one person_id."
            )

    def probe(self, root: Path) -> Probe | None:
        """Return what there is of this release, told from its relatives by a file name."""
        folder = locate(root, self.roots, self._recognise)
        if folder is None:
            return None
        attributes = [folder / inner / f"{self.attributes.name}.mat" for inner in self.attributes.folders]
        described = "with" if any(os.path.isfile(path) for path in attributes) else "without"
        missing = missing_in(folder, [name for name, _, _ in FOLDERS])
        return Probe(folder, f"{self.title}, {described} attributes", missing)

    def _recognise(self, folder: Path) -> bool:
        if not has_folder(folder, MARKERS):
            return False
        names = [name for name in (some_image(folder / part) for part, _, _ in FOLDERS) if name]
        if names:
            return any(self.style.match(name) for name in names)
        return folder.name in {Path(inner).name for inner in self.roots}

    def write(self, images: pd.DataFrame, source: Path, out: Path) -> Path:
        """Lay images out as this release; with attributes as far as rendered ones have a code in it.

        Raises:
            UsageError: no cameras or too many, or no query or gallery images.
        """
        cameras = camera_numbers(images, self.cameras, self.title)
        need_test(images, self.title)
        people = numbered_people(images)
        words = person_words(images, words_of)
        folder_of = {(split, role): name for name, split, role in FOLDERS}
        root = out / self.roots[0]
        described: dict[str, dict[int, Mapping[str, str]]] = {"train": {}, "test": {}}
        for frame, (row, split, role) in enumerate(laid_out(images)):
            number = people[row.person_id]
            name = self.file.format(
                person=number, camera=cameras[row.camera_id], frame=frame, suffix=Path(row.path).suffix.lower()
            )
            place(source / row.path, root / folder_of[split, role] / name)
            if row.person_id in words:
                described[split][number] = words[row.person_id]
        if words:
            self.attributes.write(root, {split: dict(sorted(rows.items())) for split, rows in described.items()})
        return root


def words_of(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes of a rendered image in the words of the attribute files."""
    words = {
        name: attributes[name] for name in ("gender", "age", "upper_colour", "lower_colour") if attributes.get(name)
    }
    upper, lower, shoes = (attributes.get(name, "") for name in ("upper_type", "lower_type", "shoe_type"))
    if attributes.get("hair_length"):
        words["hair_length"] = "long" if attributes["hair_length"] in {"bob", "long"} else "short"
    if upper:
        words["sleeves"] = "long" if upper in _LONG_SLEEVES else "short"
        words["upper_length"] = "long" if upper in {"coat", "dress"} else "short"
    if upper or lower:
        words["lower_length"] = "long" if lower in _LONG_LOWER else "short"
        words["lower_type"] = "dress" if "dress" in (upper, lower) or lower == "skirt" else "trousers"
    if shoes:
        words["boots"] = NO_YES[shoes == "boots"]
        words["shoe_colour"] = "light" if attributes.get("shoe_colour") in {"white", "grey"} else "dark"
    if "carried" in attributes:
        things = attributes["carried"].split(", ")
        words |= {name: NO_YES[any(t.endswith(kind) for t in things)] for kind, name in _CARRIED.items()}
    return words


COLOURS = ("black", "white", "red", "purple", "yellow", "gray", "blue", "green")
SHARED_FIELDS = {
    "gender": ("gender", ("man", "woman")),
    "hat": ("hat", NO_YES),
    "backpack": ("backpack", NO_YES),
    "bag": ("bag", NO_YES),
    "handbag": ("handbag", NO_YES),
}
# Lin et al. 2019; codes from the README of github.com/vana77/Market-1501_Attribute.
MARKET_ATTRIBUTES = AttributeFile(
    name="market_attribute",
    folders=("", "attribute", "Market-1501_Attribute"),
    fields={
        **SHARED_FIELDS,
        "age": ("age", ("young", "teenage", "adult", "elderly")),
        "hair": ("hair_length", ("short", "long")),
        "up": ("sleeves", ("long", "short")),
        "down": ("lower_length", ("long", "short")),
        "clothes": ("lower_type", ("dress", "trousers")),
    },
    colours=(
        ("up", "upper_colour", COLOURS),
        ("down", "lower_colour", ("black", "white", "pink", "purple", "yellow", "gray", "blue", "green", "brown")),
    ),
)
MARKET = Release(
    name="market-1501",
    title="Market-1501",
    roots=("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501", "Market-1501"),
    # 750 test people and the distractors' common id.
    official={"train": (751, 12936, 0), "test": (751, 3368 + 15913, 0)},
    roles={"query": 3368, "gallery": 15913},
    cameras=6,
    style=MARKET_STYLE,
    relative=("dukemtmc-reid", DUKE_STYLE),
    file="{person:04d}_c{camera}s1_{frame:06d}_00{suffix}",
    attributes=MARKET_ATTRIBUTES,
)


def read(root: Path, options: Options) -> Draft:
    """Return the images of Market-1501; see `Release.read`."""
    return MARKET.read(root, options)


def probe(root: Path) -> Probe | None:
    """Return what there is of Market-1501."""
    return MARKET.probe(root)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as Market-1501; see `Release.write`. Captions have no place in it."""
    return MARKET.write(images, source, out)
