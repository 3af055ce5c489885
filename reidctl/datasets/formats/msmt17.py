"""MSMT17: fifteen cameras; four list files name images and people, the camera is in the file name."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from reidctl.datasets.base import Draft, Entry, Options, Probe, safe_join
from reidctl.datasets.named import (
    MAY_READ,
    Reading,
    camera_numbers,
    check_listable,
    has_folder,
    is_usable,
    laid_out,
    locate,
    missing_in,
    need_test,
)
from reidctl.datasets.writing import numbered_people, place
from reidctl.errors import DataError

OPTIONS = frozenset({"seed", "carve_val"})
NAME, TITLE = "msmt17", "MSMT17"
# 32,621 = list_train and list_val together.
OFFICIAL = {"train": (1041, 32621, 0), "test": (3060, 11659 + 82161, 0)}
ROLES = {"query": 11659, "gallery": 82161}
CAMERAS = 15
# The val list holds further images of the training people, so it is training data.
LISTS = (
    ("list_train.txt", "train", None),
    ("list_val.txt", "train", None),
    ("list_query.txt", "test", "query"),
    ("list_gallery.txt", "test", "gallery"),
)
PLACES = ("MSMT17_V1", "MSMT17_V2", "MSMT17")
# Unpacked archives often have the folder twice.
ROOTS = (*PLACES, "msmt17", *(f"{outer}/{inner}" for outer in ("msmt17", *PLACES) for inner in PLACES))
# The published lists have a few MiB; this is room for millions of lines.
MAX_LIST = 256 << 20
MAX_LINE = 4096
_CAMERA = re.compile(r"[^_]*_[^_]*_(\d{1,3})_")
_PERSON = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Version:
    """One of the two releases: the folders it keeps images in tell them apart."""

    title: str
    train: str
    test: str

    def folder(self, split: str) -> str:
        """Return the folder of a split's images."""
        return self.train if split == "train" else self.test


VERSIONS = (
    Version("MSMT17_V2 (faces masked)", "mask_train_v2", "mask_test_v2"),
    Version("MSMT17_V1 (faces visible)", "train", "test"),
)


def read(root: Path, options: Options) -> Draft:
    """Return the listed images of V1 or V2; person 5 of train is `train-0005`, another than `test-0005`.

    Raises:
        DataError: no such dataset or both versions of it, a list is missing, not UTF-8 or huge, a line is not
            `PATH PERSON` or leads out of the folder, or there are no queries.
        UsageError: `carve_val` asks for more people than train has.
    """
    folder = _folder(root)
    version = _version(folder)
    reading = Reading(options.lenient)
    reading.notes.append(f"This is {version.title}; numbers of the two versions do not compare.")
    seen: set[str] = set()
    usable = {split: is_usable(folder / version.folder(split), folder, reading) for split in ("train", "test")}
    for name, split, role in LISTS:
        for where, line in _lines(folder / name, reading) if usable[split] else ():
            entry = _entry(line, where, folder / version.folder(split), split, role, reading)
            if entry is None:
                continue
            if entry.key in seen:
                reading.reject(f"{where}: {entry.key} was listed before.")
                continue
            seen.add(entry.key)
            reading.entries.append(entry)
    reading.need_queries(folder)
    reading.compare(TITLE, OFFICIAL, CAMERAS, ROLES)
    reading.carve(options)
    return reading.draft(NAME, folder / LISTS[0][0])


def _folder(root: Path) -> Path:
    found = [folder for folder in map(root.absolute().joinpath, ("", *ROOTS)) if _recognise(folder)]
    if not found:
        check_listable(root, ROOTS)
        lists = ", ".join(name for name, _, _ in LISTS)
        raise DataError(
            f"No MSMT17 in {root}: neither it nor {', '.join(PLACES)} in it holds {lists}.",
            hint="The lists come with the images from the authors; without them nobody knows who is who.",
        )
    versions = {_version(folder): folder for folder in found}
    if len(versions) > 1:
        names = " and ".join(str(folder) for folder in versions.values())
        raise DataError(f"{root} holds two versions of MSMT17: {names}.", hint="Give the folder of one of them.")
    return found[0]


def _recognise(folder: Path) -> bool:
    # `Path.is_file` and `Path.is_dir` raise where a folder may not be looked into.
    if any(os.path.isfile(folder / name) for name, _, _ in LISTS) or os.path.isdir(folder / VERSIONS[0].train):
        return True
    return folder.name in PLACES and all(os.path.isdir(folder / part) for part in ("train", "test"))


def _version(folder: Path) -> Version:
    masked = VERSIONS[0]
    return masked if has_folder(folder, (masked.train, masked.test)) else VERSIONS[1]


def _lines(path: Path, reading: Reading) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of every line of a list that is not empty, without loading the file."""
    if not os.path.isfile(path):
        reading.reject(f"{path} is missing.", "The four list files come with the images; ask the authors.")
        return
    if path.stat().st_size > MAX_LIST:
        reading.reject(f"{path} is larger than {MAX_LIST >> 20} MiB, so it is not a list of MSMT17.")
        return
    if not os.access(path, os.R_OK):
        reading.reject(f"{path} cannot be read (Permission denied).", MAY_READ)
        return
    with path.open("rb") as stream:
        number, whole = 0, True
        for raw in iter(lambda: stream.readline(MAX_LINE), b""):
            # A piece that does not begin a line belongs to a line that was refused.
            begins, whole = whole, raw.endswith(b"\n") or len(raw) < MAX_LINE
            number += begins
            where = f"{path}, line {number}"
            if not (begins and whole):
                if begins:
                    reading.reject(f"{where}: longer than {MAX_LINE} bytes.")
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                reading.reject(f"{where}: not UTF-8 (byte {error.start + 1} of the line).")
                continue
            if text:
                yield where, text


def _entry(line: str, where: str, images: Path, split: str, role: str | None, reading: Reading) -> Entry | None:
    name, person = line.rsplit(None, 1) if len(line.split(None, 1)) == 2 else (line, "")
    if _PERSON.fullmatch(person) is None:
        reading.reject(f"{where}: {line[:80]!r} is not `PATH PERSON`, e.g. 0000/0000_000_01_0303morning_0008_0.jpg 0.")
        return None
    try:
        path = safe_join(images, name, where)
    except DataError as error:
        reading.reject(error.message, error.hint)
        return None
    camera = _CAMERA.match(path.name)
    if camera is None:
        reading.reject(f"{where}: the third field of {path.name[:80]!r} is not a camera's number.")
        return None
    # One call to the system per image, where `exists` would follow every link.
    if os.path.islink(path) and not os.path.exists(path):
        reading.reject(f"{path} is a link that leads nowhere or to itself.", "Remove it.")
        return None
    key = f"{images.name}{path.as_posix().removeprefix(images.as_posix())}"
    return Entry(key, path, split, f"{split}-{int(person):04d}", role, f"c{int(camera[1])}")


def probe(root: Path) -> Probe | None:
    """Return which version of MSMT17 there is, and what it lacks."""
    folder = locate(root, ROOTS, _recognise)
    if folder is None:
        return None
    version = _version(folder)
    missing = missing_in(folder, [name for name, _, _ in LISTS] + [version.train, version.test])
    others = [path for path in map(root.absolute().joinpath, ROOTS) if _recognise(path) and _version(path) != version]
    notes = tuple(f"{_version(path).title} is there too: give the folder to import." for path in others[:1])
    return Probe(folder, version.title, missing, notes)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as MSMT17_V1; train and test count their people from 0 each. Captions have no place in it.

    Every third image of a training person goes to the val list, which the reader joins with train.

    Raises:
        UsageError: no cameras or too many, or no query or gallery images.
    """
    return _write(images, source, out / "MSMT17_V1", VERSIONS[1])


def write_masked(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as `write` does, in the folders of MSMT17_V2.

    Raises:
        UsageError: as `write`.
    """
    return _write(images, source, out / "MSMT17_V2", VERSIONS[0])


VARIANTS = {"v2": write_masked}


def _write(images: pd.DataFrame, source: Path, root: Path, version: Version) -> Path:
    cameras = camera_numbers(images, CAMERAS, TITLE)
    need_test(images, TITLE)
    order = numbered_people(images)
    people: dict[str, dict[str, int]] = {}
    for split, part in images.assign(split=images["split"].replace("val", "train")).groupby("split"):
        names = sorted(set(part["person_id"]), key=order.__getitem__)
        people[str(split)] = {name: number for number, name in enumerate(names)}
    lists: dict[str, list[str]] = {name: [] for name, _, _ in LISTS}
    shots: dict[str, int] = defaultdict(int)
    for row, split, role in laid_out(images):
        person, shot = people[split][row.person_id], shots[row.person_id]
        shots[row.person_id] += 1
        # The frame follows from the file, so that equal names in other layouts mean equal files.
        frame = int(str(row.sha256)[:4] or "0", 16) % 10_000
        stem = f"{person:04d}_{shot:03d}_{cameras[row.camera_id]:02d}_0303morning_{frame:04d}_0"
        name = f"{person:04d}/{stem}{Path(row.path).suffix.lower()}"
        place(source / row.path, root / version.folder(split) / name)
        listed = f"list_{role}.txt" if role else ("list_val.txt" if shot % 3 == 2 else "list_train.txt")
        lists[listed].append(f"{name} {person}\n")
    for listed, lines in lists.items():
        (root / listed).write_text("".join(lines), encoding="utf-8", newline="\n")
    return root
