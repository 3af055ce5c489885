"""ICFG-PEDES: images of MSMT17 with one long sentence each (`ICFG-PEDES.json`, `imgs/train/`, `imgs/test/`).

The folders `train` and `test` are MSMT17's, not the split: the file alone says that (authors' README, zifyloo/SSAN).
It has no validation split.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.datasets import captioned
from reidctl.datasets.base import Draft, Entry, Options, Probe
from reidctl.datasets.writing import numbered_people, place, rows

OPTIONS = frozenset({"seed", "carve_val"})
NAME = "icfg-pedes"
OFFICIAL = {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)}
RELEASE = captioned.Release(
    NAME,
    "ICFG-PEDES",
    ("ICFG-PEDES", "ICFG-PEDES/ICFG-PEDES"),
    # The authors' README and others derived from it write the second.
    ("ICFG-PEDES.json", "ICFG_PEDES.json"),
    OFFICIAL,
    subfolders=("train", "test"),
    # 0627_010_05_0303afternoon_1591_0: person, number, camera, day and time, frame, box.
    camera=re.compile(r"\d{4}_\d{3}_(\d{2})_[^_]+_\d+_\d+(?:_\w+)?"),
)
_MSMT17_PERSON = re.compile(r"(train|test)/(\d{4})(?=/)")


def read(root: Path, options: Options) -> Draft:
    """Return the images and sentences of `root` or `root/ICFG-PEDES`; the file name says the camera.

    Raises:
        DataError: no annotation file, or an entry that is not as documented.
        UsageError: `carve_val` asks for more people than train has.
    """
    found = captioned.locate(root, RELEASE)
    draft = captioned.read(found, RELEASE, replace(options, carve_val=0), captioned.load(found.annotation))
    _number_test_apart(draft)
    captioned.carve(draft, options)
    return draft


def _number_test_apart(draft: Draft) -> None:
    """Rename the people of test where their numbers begin again at 0, which no public source rules out.

    The file names tell the two cases apart: one number for two people of MSMT17 is a new count, one number for one
    person of MSMT17 in both splits is a leak, and stays one person for the checks to find.
    """
    train, test = (_by_number(draft.entries, split) for split in ("train", "test"))
    both = train.keys() & test.keys()
    if not both or any(not train[name] or not test[name] or train[name] & test[name] for name in both):
        return
    draft.entries = [replace(e, person=f"test-{e.person}") if e.split == "test" else e for e in draft.entries]
    draft.notes.append(
        f"{len(both)} id(s) name one person in train and another in test (so do the MSMT17 numbers in their file "
        "names): the people of test are called test-<id>."
    )


def _by_number(entries: list[Entry], split: str) -> dict[str, set[str]]:
    """The people of MSMT17, by folder and number, that each id of a split stands for."""
    people: dict[str, set[str]] = {}
    for entry in entries:
        if entry.split == split:
            match = _MSMT17_PERSON.match(entry.key)
            people.setdefault(entry.person, set()).update([match[0]] if match else [])
    return people


def probe(root: Path) -> Probe | None:
    """Return what of the layout is there."""
    return captioned.probe(root, RELEASE)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay the rows out as ICFG-PEDES: the first sentence of every image, people of val in train; return its folder.

    As in the release, the folders `train` and `test` do not say the split.

    Raises:
        UsageError: several datasets, no captions, or more people than four digits hold.
    """
    folder = out / RELEASE.inner[0]
    texts = captioned.sentences_to_write(images, captions, RELEASE.title)
    numbers, ids = numbered_people(images), captioned.ranked_people(images, 0)
    items: list[dict[str, Any]] = []
    shots: dict[str, int] = {}
    for row in rows(images):
        shots[row.person_id] = shots.get(row.person_id, -1) + 1
        name = f"{_stem(numbers[row.person_id], shots[row.person_id], row)}{Path(row.path).suffix}"
        place(source / row.path, folder / "imgs" / name)
        sentences = texts.get(row.image_id, [])[:1]
        tokens = [captioned.words(text) for text in sentences]
        split = "test" if row.split == "test" else "train"
        entry = {"split": split, "captions": sentences, "file_path": name, "processed_tokens": tokens}
        items.append({**entry, "id": ids[row.person_id]})
    captioned.save(folder / RELEASE.annotations[0], items)
    return folder


def _stem(person: int, shot: int, row: Any) -> str:
    camera = captioned.camera_number(row.camera_id)
    # The frame follows from the file, so that equal names in other layouts mean equal files.
    frame = int(str(row.sha256)[:4] or "0", 16) % 10_000
    rest = "" if camera is None else f"_{camera:02d}_0303morning_{frame:04d}_0"
    return f"{'test' if person % 2 == 0 else 'train'}/{person:04d}/{person:04d}_{shot:03d}{rest}"
