"""LTCC: people who change clothes under twelve cameras; person, outfit and camera are in the file name."""

import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from reidctl.datasets.base import Draft, Entry, Options, Probe
from reidctl.datasets.named import (
    Reading,
    camera_numbers,
    has_folder,
    images_in,
    laid_out,
    locate,
    located,
    missing_in,
    need_test,
    outfits_of,
    some_image,
)
from reidctl.datasets.writing import numbered_people, place

OPTIONS = frozenset({"seed", "carve_val"})
NAME, TITLE = "ltcc", "LTCC"
ROOTS = ("LTCC_ReID", "LTCC-reID", "ltcc")
FOLDERS = (("train", "train", None), ("query", "test", "query"), ("test", "test", "gallery"))
OFFICIAL = {"train": (77, 9576, 0), "test": (75, 493 + 7050, 0)}
ROLES = {"query": 493, "gallery": 7050}
CAMERAS = 12
_FILE = re.compile(r"(\d+)_(\d+)_c(\d+)(?!\d)")


def read(root: Path, options: Options) -> Draft:
    """Return the images of `root` or `root/LTCC_ReID`; an outfit's id is `<person>-<clothes>`.

    Raises:
        DataError: a folder is missing, a file name does not say person, clothes and camera, or there are no queries.
        UsageError: `carve_val` asks for more people than train has.
    """
    folder = located(root, ROOTS, ("query", "test"), TITLE)
    reading = Reading(options.lenient)
    for name, split, role in FOLDERS:
        for path in images_in(folder / name, folder, reading):
            match = _FILE.match(path.name)
            if match is None:
                reading.reject(
                    f"{path}: the name does not begin with PERSON_CLOTHES_cCAMERA, e.g. 000_1_c11_015859.png."
                )
                continue
            person, clothes, camera = match.groups()
            outfit = f"{person}-{int(clothes)}"
            key = f"{name}/{path.name}"
            reading.entries.append(Entry(key, path, split, person, role, f"c{int(camera)}", outfit))
    reading.need_queries(folder / "query")
    reading.compare(TITLE, OFFICIAL, CAMERAS, ROLES)
    reading.carve(options)
    return reading.draft(NAME)


def probe(root: Path) -> Probe | None:
    """Return what there is of LTCC, told from other datasets by a file name."""
    folder = locate(root, ROOTS, _recognise)
    if folder is None:
        return None
    return Probe(folder, "LTCC (cloth-changing)", missing_in(folder, [name for name, _, _ in FOLDERS]))


def _recognise(folder: Path) -> bool:
    if not has_folder(folder, [name for name, _, _ in FOLDERS]):
        return False
    names = [name for name in (some_image(folder / part) for part, _, _ in FOLDERS) if name]
    return any(_FILE.match(name) for name in names) if names else folder.name in ROOTS


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as LTCC; captions have no place in it.

    Raises:
        UsageError: nobody changes clothes, no cameras or too many, or no query or gallery images.
    """
    worn = outfits_of(images, TITLE)
    cameras = camera_numbers(images, CAMERAS, TITLE)
    need_test(images, TITLE)
    people = numbered_people(images)
    folder_of = {(split, role): name for name, split, role in FOLDERS}
    frames: dict[str, int] = defaultdict(int)
    for row, split, role in laid_out(images):
        clothes = worn[row.person_id].index(row.outfit_id) + 1
        stem = f"{people[row.person_id]:03d}_{clothes}_c{cameras[row.camera_id]}"
        frames[row.person_id] += 1
        name = f"{stem}_{frames[row.person_id]:06d}{Path(row.path).suffix.lower()}"
        place(source / row.path, out / ROOTS[0] / folder_of[split, role] / name)
    return out / ROOTS[0]
