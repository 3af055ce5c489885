"""What datasets share whose file names are the annotation: finding the folder, listing images, attributes, writing."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.datasets.base import IMAGE_SUFFIXES, Draft, Entry, Options, compare_counts, readable_name
from reidctl.datasets.splits import carve_validation
from reidctl.datasets.writing import rows
from reidctl.errors import DataError, UsageError

MAY_READ = "Give yourself the right to read it: chmod -R u+rX."
TREE = "docs/datasets.md shows the expected folder tree."
# A list of a million bad lines must not become a million sentences.
MAX_PROBLEMS = 1000
Official = Mapping[str, tuple[int, int, int]]
Words = Mapping[str, str]


@dataclass
class Reading:
    """One dataset being read: what was kept, what to tell the user, and what was not as documented."""

    lenient: bool
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    more: int = 0

    def reject(self, message: str, hint: str = "") -> None:
        """Note something that is not as documented, and go on.

        Raises:
            DataError: the reading is not lenient.
        """
        if not self.lenient:
            raise DataError(message, hint=hint)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message)
        else:
            self.more += 1

    def draft(self, name: str, annotation: Path | None = None) -> Draft:
        """Return what was read."""
        more = [f"{self.more:,} further problem(s) of the same kinds."] if self.more else []
        return Draft(name, self.entries, annotation, self.notes, problems=[*self.problems, *more])

    def compare(self, title: str, official: Official, cameras: int, roles: Mapping[str, int] | None = None) -> None:
        """Note where people, images, queries, gallery (`roles`) and cameras differ from the release's."""
        self.notes += compare_counts(self.entries, official, title)
        found = Counter(entry.role for entry in self.entries if entry.split == "test")
        if roles and any(found[role] != count for role, count in roles.items()):
            counts = " and ".join(f"{found[role]:,} {role}" for role in roles)
            wanted = " and ".join(f"{count:,}" for count in roles.values())
            note = f"{title} test: found {counts} images; the release has {wanted}. Published numbers do not compare."
            self.notes.append(note)
        known = {f"c{number}" for number in range(1, cameras + 1)}
        strange = sorted({entry.camera for entry in self.entries if entry.camera} - known)
        if strange:
            self.notes.append(f"{title} has {cameras} cameras; here there are also {', '.join(strange[:9])}.")

    def need_queries(self, folder: Path) -> None:
        """Check that there is something to look for.

        Raises:
            DataError: there are no query images, and the reading is not lenient.
        """
        if not any(entry.role == "query" for entry in self.entries):
            self.reject(f"No query images in {folder}, so nothing can be measured on this copy.", TREE)

    def carve(self, options: Options) -> None:
        """Move people from train to val, as no public split does.

        Raises:
            UsageError: `carve_val` asks for more people than train has.
        """
        if options.carve_val:
            self.entries = carve_validation(self.entries, options.carve_val, options.seed)
            self.notes.append(f"{options.carve_val} people moved from train to val (seed {options.seed}).")


# --- finding


def locate(root: Path, names: Iterable[str], recognise: Callable[[Path], bool]) -> Path | None:
    """Return the first of `root` and the folders `names` below it that is recognised, absolute."""
    home = root.absolute()
    return next((folder for folder in (home, *(home / name for name in names)) if recognise(folder)), None)


def located(root: Path, names: Sequence[str], markers: Sequence[str], title: str) -> Path:
    """Return the folder of a dataset: `root` or one of `names` below it that holds one of `markers`.

    Raises:
        DataError: there is none.
    """
    found = locate(root, names, lambda folder: has_folder(folder, markers))
    if found is None:
        check_listable(root, names)
        wanted, places = " or ".join(f"`{marker}`" for marker in markers), ", ".join(names)
        raise DataError(f"No {title} in {root}: neither it nor {places} in it holds a folder {wanted}.", hint=TREE)
    return found


def has_folder(folder: Path, names: Iterable[str]) -> bool:
    """Return whether a folder holds one of these sub-folders; no, too, where it may not be looked into."""
    # `Path.is_dir` raises there.
    return any(os.path.isdir(folder / name) for name in names)


def check_listable(root: Path, inner: Iterable[str] = ()) -> None:
    """Look whether a folder, and those of `inner` that it holds, may be read; if not, that is why nothing was found.

    Raises:
        DataError: one may not.
    """
    for folder in (root, *(root / name for name in inner)):
        try:
            with os.scandir(folder):
                pass
        except PermissionError as error:
            raise DataError(f"{folder} cannot be listed ({error.strerror}).", hint=MAY_READ) from None
        except OSError:
            # Absent, or no folder: whoever reads it says so.
            continue


def missing_in(folder: Path, expected: Iterable[str]) -> tuple[str, ...]:
    """Return which of the expected files and sub-folders are not there."""
    return tuple(name for name in expected if not os.path.exists(folder / name))


def some_image(folder: Path, tries: int = 50) -> str:
    """Return the name of an image in a folder, "" if the first few entries hold none. Reads no long listing."""
    try:
        with os.scandir(folder) as found:
            names = (item.name for item, _ in zip(found, range(tries), strict=False))
            return next((name for name in names if _is_image(name)), "")
    except OSError:
        return ""


# --- listing


def images_in(folder: Path, home: Path, reading: Reading) -> list[Path]:
    """Return the images that lie in a folder, sorted by name; none are opened and other files are passed over.

    Linked folders and images are followed.

    Raises:
        DataError: unless lenient: the folder is missing or links to itself or back to `home`, a linked image leads
            nowhere, or a name is not UTF-8.
    """
    found = []
    for item in _listing(folder, home, reading):
        if not _is_image(item.name) or item.is_dir(follow_symlinks=False):
            continue
        path = folder / item.name
        if item.is_symlink() and not os.path.exists(path):
            reading.reject(f"{path} is a link that leads nowhere or to itself.", "Remove it.")
        elif _is_readable(path, reading):
            found.append(path)
    return found


def folders_in(folder: Path, home: Path, reading: Reading) -> list[Path]:
    """Return the sub-folders of a folder, sorted by name; hidden ones are passed over.

    Raises:
        DataError: as `images_in`.
    """
    # A link is kept whatever it leads to: whoever lists it next says what is wrong with it.
    found = [folder / item.name for item in _listing(folder, home, reading) if item.is_symlink() or item.is_dir()]
    return [path for path in found if _is_readable(path, reading)]


def is_usable(folder: Path, home: Path, reading: Reading) -> bool:
    """Return whether a folder is there; it may be a link, unless one to itself or back to `home`.

    Raises:
        DataError: it is not, and the reading is not lenient.
    """
    if os.path.islink(folder) and not os.path.exists(folder):
        reading.reject(f"{folder} is a link that leads nowhere or to itself.", "Remove it.")
    elif not os.path.isdir(folder):
        reading.reject(f"{folder} is missing.", TREE)
    elif os.path.islink(folder) and _holds(folder, home):
        reading.reject(f"{folder} is a link back to {home}.", "Remove it.")
    else:
        return True
    return False


def _listing(folder: Path, home: Path, reading: Reading) -> list[os.DirEntry[str]]:
    if not is_usable(folder, home, reading):
        return []
    try:
        with os.scandir(folder) as found:
            return sorted((item for item in found if not item.name.startswith(".")), key=lambda item: item.name)
    except OSError as error:
        reading.reject(f"{folder} cannot be listed ({error.strerror}).", MAY_READ)
        return []


def _holds(folder: Path, home: Path) -> bool:
    return Path(os.path.realpath(home)).is_relative_to(os.path.realpath(folder))


def _is_image(name: str) -> bool:
    # "._0002_c1s1.jpg" is what macOS leaves beside the files of an archive.
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_readable(path: Path, reading: Reading) -> bool:
    try:
        readable_name(path)
    except DataError as error:
        reading.reject(error.message)
        return False
    return True


# --- writing


def laid_out(images: pd.DataFrame) -> Iterator[tuple[Any, str, str | None]]:
    """Yield (row, split, role): people of val belong to train, which has no roles; a test image without one is gallery.

    Raises:
        UsageError: the table holds several datasets.
    """
    for row in rows(images):
        if row.split == "test":
            yield row, "test", "query" if row.role == "query" else "gallery"
        else:
            yield row, "train", None


def camera_numbers(images: pd.DataFrame, most: int, title: str) -> dict[str, int]:
    """Return the number of every camera: that in its id (`c3`), else its place in sorted order.

    Raises:
        UsageError: an image has no camera, or there are more cameras than the layout numbers.
    """
    cameras = sorted(set(images["camera_id"].dropna()))
    if images["camera_id"].isna().any() or not cameras:
        raise UsageError(
            f"{title} names the camera of every image, and these images have none.", hint="Use another --layout."
        )
    numbers = {camera: place for place, camera in enumerate(cameras, start=1)}
    if all(re.fullmatch(r"c[1-9]\d{0,2}", camera) for camera in cameras):
        numbers = {camera: int(camera[1:]) for camera in cameras}
    if max(numbers.values()) > most:
        raise UsageError(f"{title} has {most} cameras, these images have camera {max(numbers.values())}.")
    return numbers


def need_test(images: pd.DataFrame, title: str) -> None:
    """Check that a layout with a query and a gallery folder can be filled.

    Raises:
        UsageError: the test split lacks queries or a gallery.
    """
    roles = Counter(role for _, split, role in laid_out(images) if split == "test")
    if not roles["query"] or not roles["gallery"]:
        raise UsageError(
            f"{title} needs query and gallery images in the test split; there are {roles['query']} and "
            f"{roles['gallery']}.",
            hint="`data synth` gives both; a dataset of captions alone has no query images.",
        )


def outfits_of(images: pd.DataFrame, title: str) -> dict[str, list[str]]:
    """Return the outfits of every person in sorted order.

    Raises:
        UsageError: images without an outfit, or nobody with two.
    """
    hint = "Render people who change clothes: --set synth.variant=cloth-changing."
    if images["outfit_id"].isna().any():
        raise UsageError(f"{title} names the outfit in every image, and some of these images have none.", hint=hint)
    worn = {str(name): sorted(set(outfits)) for name, outfits in images.groupby("person_id")["outfit_id"]}
    if all(len(outfits) < 2 for outfits in worn.values()):
        raise UsageError(f"{title} is about changing clothes, and nobody here wears two outfits.", hint=hint)
    return worn


def person_words(images: pd.DataFrame, words_of: Callable[[Words], dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return attributes by person: what all images of the person agree on, and `yes` where a single image says so."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in rows(images):
        if row.attributes:
            values = seen.setdefault(str(row.person_id), defaultdict(set))
            for name, word in words_of(dict(row.attributes)).items():
                values[name].add(word)
    agreed: dict[str, dict[str, str]] = {}
    for person, values in seen.items():
        certain = {name: "yes" if "yes" in words else words.copy().pop() for name, words in values.items()}
        agreed[person] = {n: w for n, w in certain.items() if w == "yes" or len(values[n]) == 1}
    return agreed


def with_attributes(entries: Sequence[Entry], people: Mapping[int, Mapping[str, str]]) -> list[Entry]:
    """Return the entries with the attributes of their person, where there are any."""
    return [replace(entry, attributes=people.get(int(entry.person), {})) for entry in entries]
