"""PRCC: people in two outfits under three cameras; A and B see one outfit, C the other."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from reidctl.datasets.base import Draft, Entry, Options, Probe
from reidctl.datasets.named import (
    Reading,
    camera_numbers,
    check_listable,
    folders_in,
    has_folder,
    images_in,
    laid_out,
    locate,
    missing_in,
    need_test,
    outfits_of,
)
from reidctl.datasets.writing import numbered_people, place
from reidctl.errors import DataError, UsageError

OPTIONS = frozenset({"seed", "carve_val"})
NAME, TITLE = "prcc", "PRCC"
# Folders that hold train, val and test.
ROOTS = ("rgb", "prcc/rgb", "PRCC/rgb", "prcc", "PRCC")
# 22,898 = 17,896 of train and 5,002 of val, which shows the same people.
OFFICIAL = {"train": (150, 17896 + 5002, 0), "test": (71, 10800, 0)}
CAMERA = {"A": "c1", "B": "c2", "C": "c3"}
OUTFIT = {"A": "1", "B": "1", "C": "2"}
# The same people in A and B in the same clothes, in A and C in others: A is the gallery of both settings.
ROLE = {"A": "gallery", "B": "query", "C": "query"}
EXPECTED = ("train", "val", *(f"test/{letter}" for letter in CAMERA))
_FILE = re.compile(r"([ABC])_")


def read(root: Path, options: Options) -> Draft:
    """Return the images of `prcc/rgb`: val joined with train, gallery = A, queries = B and C.

    An outfit's id is `<person>-1` (A, B) or `<person>-2` (C). People carved out for validation get the roles of the
    test split.

    Raises:
        DataError: a folder is missing, a person's folder is not a number, a file name does not begin with A_, B_ or
            C_, or there are no queries.
        UsageError: `carve_val` asks for more people than train has.
    """
    folder = locate(root, ROOTS, _recognise)
    if folder is None:
        check_listable(root, [*ROOTS, "test", *(f"{name}/test" for name in ROOTS)])
        raise DataError(
            f"No PRCC in {root}: neither it nor {', '.join(ROOTS)} in it holds a folder `test/A`.",
            hint="The reader wants the `rgb` part; docs/datasets.md shows the expected folder tree.",
        )
    reading = Reading(options.lenient)
    reading.entries += [*_train(folder, reading), *_test(folder, reading)]
    reading.need_queries(folder / "test")
    reading.compare(TITLE, OFFICIAL, len(CAMERA))
    reading.carve(options)
    if options.carve_val:
        reading.entries = [_with_test_role(entry) for entry in reading.entries]
    return reading.draft(NAME)


def _train(folder: Path, reading: Reading) -> Iterator[Entry]:
    for part in ("train", "val"):
        for person, home in _people(folder / part, folder, reading):
            for path in images_in(home, folder, reading):
                match = _FILE.match(path.name)
                if match is None:
                    reading.reject(f"{path}: the name does not begin with the camera, e.g. A_cropped_rgb001.jpg.")
                else:
                    yield _entry(path, folder, "train", person, match[1])


def _test(folder: Path, reading: Reading) -> Iterator[Entry]:
    for letter in CAMERA:
        for person, home in _people(folder / "test" / letter, folder, reading):
            for path in images_in(home, folder, reading):
                yield _entry(path, folder, "test", person, letter)


def _people(folder: Path, home: Path, reading: Reading) -> Iterator[tuple[str, Path]]:
    for path in folders_in(folder, home, reading):
        if re.fullmatch(r"\d{1,9}", path.name) is None:
            reading.reject(f"{path}: a folder is named with a person's number, e.g. 001.")
        else:
            yield path.name, path


def _entry(path: Path, folder: Path, split: str, number: str, letter: str) -> Entry:
    # Train and test number their people on their own, as far as we know: 001 of one is not 001 of the other.
    person = f"{split}-{number}"
    role = ROLE[letter] if split == "test" else None
    key = path.relative_to(folder).as_posix()
    return Entry(key, path, split, person, role, CAMERA[letter], f"{person}-{OUTFIT[letter]}")


def _with_test_role(entry: Entry) -> Entry:
    if entry.split != "val":
        return entry
    letter = next(letter for letter, camera in CAMERA.items() if camera == entry.camera)
    return replace(entry, role=ROLE[letter])


def probe(root: Path) -> Probe | None:
    """Return what there is of PRCC."""
    folder = locate(root, ROOTS, _recognise)
    return None if folder is None else Probe(folder, "PRCC, rgb (cloth-changing)", missing_in(folder, EXPECTED))


def _recognise(folder: Path) -> bool:
    return has_folder(folder / "test", CAMERA)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as PRCC; captions have no place in it.

    The outfit of a test person's gallery is outfit 1: its first camera becomes A (gallery), its other cameras B
    (queries in the same clothes); queries in the other outfit become C. Of training people the outfits are taken in
    sorted order. Further outfits are left out. Every third image of a training person goes to `val`.

    Raises:
        UsageError: nobody changes clothes, no camera for B, or no query or gallery images.
    """
    worn = outfits_of(images, TITLE)
    cameras = camera_numbers(images, 999, TITLE)
    need_test(images, TITLE)
    letters = _letters(images, worn, cameras)
    people = numbered_people(images)
    root = out / "prcc" / "rgb"
    shots: dict[tuple[str, str], int] = defaultdict(int)
    for row, split, role in laid_out(images):
        letter = letters.get((row.person_id, row.outfit_id, row.camera_id))
        # A query in the gallery's clothes is B whatever its camera: A would make it a gallery image.
        letter = "B" if letter == "A" and role == "query" else letter
        if letter is None or (letter == "C" and role == "gallery"):
            continue
        shots[row.person_id, letter] += 1
        shot, number = shots[row.person_id, letter], f"{people[row.person_id]:03d}"
        file = f"cropped_rgb{shot:03d}{Path(row.path).suffix.lower()}"
        part = "val" if shot % 3 == 2 else "train"
        name = f"test/{letter}/{number}/{file}" if split == "test" else f"{part}/{number}/{letter}_{file}"
        place(source / row.path, root / name)
    return root.parent


def _letters(
    images: pd.DataFrame, worn: dict[str, list[str]], cameras: dict[str, int]
) -> dict[tuple[str, str, str], str]:
    """Return the letter of every (person, outfit, camera)."""
    letters: dict[tuple[str, str, str], str] = {}
    for name, mine in images.groupby("person_id"):
        person = str(name)
        gallery = set(mine.loc[(mine["split"] == "test") & (mine["role"] == "gallery"), "outfit_id"])
        order = sorted(worn[person], key=lambda outfit: (outfit not in gallery, outfit))
        first = sorted(set(mine.loc[mine["outfit_id"] == order[0], "camera_id"]), key=cameras.__getitem__)
        letters |= {(person, order[0], camera): "B" if nth else "A" for nth, camera in enumerate(first)}
        letters |= {(person, outfit, camera): "C" for outfit in order[1:2] for camera in cameras}
    test = set(images.loc[images["split"] == "test", "person_id"])
    if not any(letter == "B" for (person, _, _), letter in letters.items() if person in test):
        raise UsageError(
            "PRCC needs a test person's gallery outfit under two cameras (A and B).",
            hint="Render more images per person: --set synth.images_per_person=6.",
        )
    return letters
