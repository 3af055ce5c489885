"""A folder of images: one sub-folder per person, or a flat folder of own photos whose people nobody knows."""

import errno
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pandas as pd

from reidctl.datasets.base import IMAGE_SUFFIXES, Draft, Entry, Options, Probe, readable_name
from reidctl.datasets.formats.csv_table import file_names
from reidctl.datasets.manifest import Complaints
from reidctl.datasets.named import MAY_READ
from reidctl.datasets.splits import split_people
from reidctl.datasets.writing import place, rows
from reidctl.errors import DataError, UsageError

OPTIONS = frozenset({"seed", "name", "fractions"})
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
# Sub-folders that autodetection looks into before it gives up.
_LOOKED_AT = 50


def read(root: Path, options: Options) -> Draft:
    """Return the images in `root` (flat) or in its sub-folders (one per person).

    Raises:
        DataError: no such folder, no images, both layouts at once, a broken link, a pipe or device named like an
            image, a folder that may not be read, or a sub-folder that is a link back to the folder itself or round in
            a circle.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder.", hint="Give a folder of images, or of one folder per person.")
    root = root.absolute()
    name = options.name or readable_name(root.resolve()) or "folder"
    complain = Complaints(options.lenient)
    flat = _images(root, complain)
    people = {path.name: _images(path, complain) for path in _subfolders(root, complain)}
    people = {person: images for person, images in people.items() if images}
    if flat and people:
        complain(
            DataError(
                f"{root} holds images beside folders of images.",
                hint="Either all images lie in the folder, or every person has a sub-folder.",
            )
        )
        flat = []
    if not flat and not people and complain.problems:
        raise DataError(complain.problems[0])
    if not flat and not people:
        raise DataError(
            f"No images in {root} or its sub-folders ({', '.join(sorted(IMAGE_SUFFIXES))}).",
            hint="Images are looked for in the folder and one level below.",
        )
    draft = _flat(name, flat) if flat else _by_person(name, people, options)
    draft.problems = complain.sentences()
    return draft


def probe(root: Path) -> Probe | None:
    """Recognise a folder of images; ask this last, for the folders of every other format hold images too."""
    if not os.path.isdir(root):
        return None
    last = "(asked last: other formats hold such folders too)"
    inside = _listed(root)
    if any(path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path) for path in inside):
        return Probe(root, f"flat folder of images, people unknown {last}")
    folders = sorted(path for path in inside if os.path.isdir(path) and not path.name.startswith("."))
    if any(_shows_images(folder) for folder in folders[:_LOOKED_AT]):
        return Probe(root, f"{len(folders):,} sub-folders, taken for one per person {last}")
    return None


def _shows_images(folder: Path) -> bool:
    try:
        return any(path.suffix.lower() in IMAGE_SUFFIXES for path in islice(folder.iterdir(), 100))
    except OSError:
        return False


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Write one sub-folder per person and return `out`; it keeps images and people, no splits, cameras or texts.

    Raises:
        UsageError: the rows are of several datasets, or two people's ids make one folder name.
    """
    folders: dict[str, str] = {}
    for row, name in zip(rows(images), file_names(images), strict=True):
        person = str(row.person_id).removeprefix(f"{row.dataset}:")
        folder = person.replace("/", "_").replace("\\", "_").lstrip(".") or "_"
        if folders.setdefault(folder, person) != person:
            raise UsageError(
                f"People {folders[folder]} and {person} would share the folder {folder}.", hint="Use csv-table."
            )
        place(source / row.path, out / folder / name.replace("/", "_"))
    return out


def _flat(name: str, images: list[Path]) -> Draft:
    stems = Counter(path.stem for path in images)
    # a.jpg beside a.png are two people as far as anybody knows.
    people = [path.stem if stems[path.stem] == 1 else path.name for path in images]
    entries = [Entry(path.name, path, "test", person, "gallery") for path, person in zip(images, people, strict=True)]
    note = f"The {len(images)} images name no people, so they can be searched but not measured (no metrics)."
    return Draft(name, entries, None, [note], known_people=False)


def _by_person(name: str, people: dict[str, list[Path]], options: Options) -> Draft:
    fractions = options.fractions or DEFAULT_FRACTIONS
    split = split_people(list(people), fractions, options.seed)
    entries = [
        Entry(f"{person}/{path.name}", path, split[person], person)
        for person, images in people.items()
        for path in images
    ]
    shares = "/".join(f"{share:g}" for share in fractions)
    note = f"{len(people)} people split {shares} into train/val/test by identity (seed {options.seed})."
    return Draft(name, entries, None, [note])


def _images(folder: Path, complain: Complaints) -> list[Path]:
    found = []
    try:
        inside = _listed(folder)
    except DataError as error:
        complain(error)
        return []
    for path in inside:
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or os.path.isdir(path):
            continue
        try:
            _check_image(path)
        except DataError as error:
            complain(error)
        else:
            found.append(path)
    return sorted(found)


def _check_image(path: Path) -> None:
    """Refuse what only looks like an image file; a file that may not be opened is left to whoever opens it."""
    readable_name(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"{path} is a link that leads nowhere or to itself.", hint="Remove it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"Image {path} is not a regular file.", hint="Remove it.")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}).", hint=MAY_READ) from None


def _subfolders(root: Path, complain: Complaints) -> list[Path]:
    home = root.resolve()
    folders = []
    for path in sorted(path for path in _listed(root) if not path.name.startswith(".")):
        try:
            is_folder = os.path.isdir(path)
            if _is_circle(path) or (is_folder and os.path.islink(path) and home.is_relative_to(path.resolve())):
                raise DataError(f"{path} is a link back to {root} or round in a circle.", hint="Remove it.")
            if is_folder:
                readable_name(path)
                folders.append(path)
        except DataError as error:
            complain(error)
    return folders


def _is_circle(path: Path) -> bool:
    """Whether a link leads through other links back to itself; images that do are named by `_images`."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP and path.suffix.lower() not in IMAGE_SUFFIXES
    return False
