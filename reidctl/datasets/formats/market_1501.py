"""Market-1501: people under six cameras, with a query and a gallery set; person and camera are in the file name."""

import re
from pathlib import Path

from reidctl.datasets.base import (
    Draft,
    Entry,
    Options,
    compare_counts,
    find_root,
    readable_name,
)
from reidctl.datasets.splits import carve_validation
from reidctl.errors import DataError

OPTIONS = frozenset({"seed", "carve_val"})
NAME = "market-1501"
INNER = "Market-1501-v15.09.15"
FOLDERS = (("bounding_box_train", "train", None), ("query", "test", "query"), ("bounding_box_test", "test", "gallery"))
# People, images, captions. Test: 750 people and the distractors' common id; 3,368 queries and 15,913 in the gallery.
OFFICIAL = {"train": (751, 12936, 0), "test": (751, 3368 + 15913, 0)}
JUNK, DISTRACTOR = -1, 0
_FILE = re.compile(r"([-\d]+)_c(\d)")


def read(root: Path, options: Options) -> Draft:
    """Return the images of `root` or `root/Market-1501-v15.09.15`: junk (-1) dropped, distractors (0000) kept.

    Raises:
        DataError: a folder is missing, or a file name does not say person and camera.
        UsageError: `carve_val` asks for more people than train has.
    """
    folder = find_root(root, INNER, "bounding_box_train").absolute()
    entries: list[Entry] = []
    junk = distractors = 0
    for name, split, role in FOLDERS:
        for path in _files(folder / name):
            person, camera = _parse(path)
            if int(person) == JUNK:
                junk += 1
                continue
            if int(person) == DISTRACTOR:
                distractors += 1
                if role != "gallery":
                    raise DataError(f"{path}: a distractor (person 0) belongs in bounding_box_test.")
            entries.append(Entry(f"{name}/{path.name}", path, split, person, role, f"c{camera}"))
    notes = compare_counts(entries, OFFICIAL, "Market-1501")
    if junk:
        notes.append(f"{junk:,} junk image(s) (person -1) left out, as the benchmark's protocol has it.")
    if distractors:
        notes.append(f"{distractors:,} distractor(s) (person 0000) kept in the gallery; they share one person_id.")
    if options.carve_val:
        entries = carve_validation(entries, options.carve_val, options.seed)
        notes.append(f"{options.carve_val} people moved from train to val (seed {options.seed}).")
    return Draft(NAME, entries, None, notes)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing.", hint="docs/datasets.md shows the expected folder tree.")
    # The release ships a Thumbs.db in its folders.
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})


def _parse(path: Path) -> tuple[str, str]:
    match = _FILE.match(readable_name(path))
    if match is None or not re.fullmatch(r"-?\d+", match[1]):
        raise DataError(f"{path}: the name does not begin with PERSON_cCAMERA, e.g. 0002_c1s1_000451_03.jpg.")
    return match[1], match[2]
