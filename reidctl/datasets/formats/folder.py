"""A folder of images: one sub-folder per person, or a flat folder of own photos whose people nobody knows."""

from collections import Counter
from pathlib import Path

from reidctl.datasets.base import IMAGE_SUFFIXES, Draft, Entry, Options, readable_name
from reidctl.datasets.splits import split_people
from reidctl.errors import DataError

OPTIONS = frozenset({"seed", "name", "fractions"})
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


def read(root: Path, options: Options) -> Draft:
    """Return the images in `root` (flat) or in its sub-folders (one per person).

    Raises:
        DataError: no such folder, no images, both layouts at once, a broken link, or a sub-folder that is a link
            back to the folder itself.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.", hint="Give a folder of images, or of one folder per person.")
    root = root.absolute()
    name = options.name or readable_name(root.resolve()) or "folder"
    flat = _images(root)
    people = {readable_name(path): _images(path) for path in _subfolders(root)}
    people = {person: images for person, images in people.items() if images}
    if flat and people:
        raise DataError(
            f"{root} holds images beside folders of images.",
            hint="Either all images lie in the folder, or every person has a sub-folder.",
        )
    if not flat and not people:
        raise DataError(
            f"No images in {root} or its sub-folders ({', '.join(sorted(IMAGE_SUFFIXES))}).",
            hint="Images are looked for in the folder and one level below.",
        )
    return _flat(name, flat) if flat else _by_person(name, people, options)


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


def _images(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    for path in found:
        readable_name(path)
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link that leads nowhere or to itself.", hint="Remove it.")
    return sorted(path for path in found if path.is_file())


def _subfolders(root: Path) -> list[Path]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    home = root.resolve()
    for path in folders:
        if path.is_symlink() and home.is_relative_to(path.resolve()):
            raise DataError(f"{path} is a link back to {root}.", hint="Remove it.")
    return folders
