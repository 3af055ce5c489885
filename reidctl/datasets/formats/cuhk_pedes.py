"""CUHK-PEDES: people with two sentences per image, in the two files that are in circulation.

`reid_raw.json` has a `split` for every image. `caption_all.json`, the first release, has none, and no public source
shows how to derive the official one. Its `id` numbers people in another order: the release's readme gives id 1 to
`test_query/p10376_s14337.jpg`, while id 1 of `reid_raw.json` is `CUHK01/0363004.png`. Public code takes a random split
(BDAM), the folder names, or the ranges 1-11003, 11004-12003, 12004-13003 that hold for the other file. A project that
does the last (yerson001/textreid-train-tessis) reports 4,251 training batches of 16; the official 68,126 captions are
4,257 or 4,258. So it is split here by people, and the notes say what that costs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.datasets import captioned
from reidctl.datasets.base import Draft, Entry, Options, Probe, compare_counts
from reidctl.datasets.splits import count_people, split_people
from reidctl.datasets.writing import numbered_people, place, rows
from reidctl.errors import DataError, UsageError

OPTIONS = frozenset({"seed", "fractions"})
NAME = "cuhk-pedes"
NEWER, FIRST = "reid_raw.json", "caption_all.json"
# People, images, captions: the release of 40,206 images with the split of Li et al. 2017.
OFFICIAL = {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)}
# The first release: 80,412 as its readme prints (two per image); 80,440 when the captions of OFFICIAL are added up.
PEOPLE, IMAGES, CAPTIONS = 13003, 40206, (80412, 80440)
# CUHK-SYSU's two, VIPeR's two and one each of CUHK01, CUHK03 and Market-1501.
SUBFOLDERS = ("CUHK01", "CUHK03", "Market", "cam_a", "cam_b", "test_query", "train_query")
RELEASE = captioned.Release(
    NAME,
    "CUHK-PEDES",
    ("CUHK-PEDES", "CUHK-PEDES/CUHK-PEDES"),
    (NEWER, FIRST),
    OFFICIAL,
    subfolders=SUBFOLDERS,
)
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
# What entries carry until they are split by people.
_ALL = "all"


def read(root: Path, options: Options) -> Draft:
    """Return the images and sentences of `root` or `root/CUHK-PEDES`; `reid_raw.json` is preferred.

    Raises:
        DataError: no annotation file, or an entry that is not as documented.
        UsageError: `fractions` for a file that has its splits.
    """
    found = captioned.locate(root, RELEASE)
    items = captioned.load(found.annotation)
    # Told apart by what is in them: code that asks for the newer file invites renaming the first (RDE, issue 4).
    first = bool(items) and not any("split" in item for item in items if isinstance(item, dict))
    if first and found.annotation.name == NEWER:
        raise DataError(
            f"{found.annotation} has no entry with a `split`.",
            hint=f"If it is the first release under another name, call it {FIRST} to have it split by people.",
        )
    return _read_first(found, options, items) if first else _read_newer(found, options, items)


def _read_newer(found: captioned.Place, options: Options, items: list[Any]) -> Draft:
    if options.fractions:
        raise UsageError(
            f"{found.annotation} has the official splits, so `fractions` has no meaning.",
            hint="Leave --fractions out.",
        )
    draft = captioned.read(found, RELEASE, options, items)
    draft.notes.append(f"Read {found.annotation.name}, which has the official split.")
    if found.annotation.name == NEWER and found.annotation.with_name(FIRST).exists():
        draft.notes.append(f"{FIRST} beside it, the first release without splits, was not read.")
    return draft


def _read_first(found: captioned.Place, options: Options, items: list[Any]) -> Draft:
    draft = captioned.read(found, replace(RELEASE, official={}), options, items, split=_ALL)
    draft.notes += _compare_whole(draft.entries)
    fractions = options.fractions or DEFAULT_FRACTIONS
    split = split_people([entry.person for entry in draft.entries], fractions, options.seed)
    draft.entries = [replace(entry, split=split[entry.person]) for entry in draft.entries]
    shares = "/".join(f"{share:g}" for share in fractions)
    draft.notes += [
        f"Read {found.annotation.name}, the first release, which has no `split` field: {count_people(len(split))} "
        f"split {shares} into train/val/test (seed {options.seed}).",
        f"This is not the official split, so no number compares with a published one; {NEWER} has it.",
    ]
    return draft


def _compare_whole(entries: Sequence[Entry]) -> list[str]:
    counted = sum(len(entry.texts) for entry in entries)
    expected = counted if counted in CAPTIONS else CAPTIONS[0]
    return compare_counts(entries, {_ALL: (PEOPLE, IMAGES, expected)}, RELEASE.title)


def probe(root: Path) -> Probe | None:
    """Return which of the two files is there and which of the seven image folders are not."""
    found = captioned.probe(root, RELEASE)
    if found is None:
        return None
    place = captioned.find(root, RELEASE)
    if place is None or place.annotation.name == NEWER:
        return found
    return replace(found, notes=(f"{FIRST} has no splits; {NEWER} is the file with the official ones.",))


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay the rows out as CUHK-PEDES with `reid_raw.json`; return its folder.

    Every second person lies in `Market/` under a file name that Market-1501 could have given, as in the release.

    Raises:
        UsageError: several datasets, no captions, or more people than four digits hold.
    """
    folder = out / RELEASE.inner[0]
    items = [
        {**item, "processed_tokens": [captioned.words(text) for text in item["captions"]]}
        for item in _place(images, captions, source, folder)
    ]
    captioned.save(folder / NEWER, items)
    return folder


def write_first_release(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay the rows out as `write` does, with `caption_all.json`: no splits, and people numbered in another order.

    Raises:
        UsageError: as `write`.
    """
    folder = out / RELEASE.inner[0]
    items = _place(images, captions, source, folder)
    last = max(item["id"] for item in items) + 1
    keys = ("id", "file_path", "captions")
    captioned.save(folder / FIRST, [{key: {**item, "id": last - item["id"]}[key] for key in keys} for item in items])
    return folder


def _place(images: pd.DataFrame, captions: pd.DataFrame, source: Path, folder: Path) -> list[dict[str, Any]]:
    texts = captioned.sentences_to_write(images, captions, RELEASE.title)
    numbers, ids = numbered_people(images), captioned.ranked_people(images, 1)
    for name in SUBFOLDERS:
        (folder / "imgs" / name).mkdir(parents=True, exist_ok=True)
    items: list[dict[str, Any]] = []
    for serial, row in enumerate(rows(images)):
        stem = _stem(numbers[row.person_id], captioned.camera_number(row.camera_id) or 1, serial)
        name = f"{stem}{Path(row.path).suffix}"
        place(source / row.path, folder / "imgs" / name)
        sentences = texts.get(row.image_id, [])
        items.append({"split": row.split, "captions": sentences, "file_path": name, "id": ids[row.person_id]})
    return items


def _stem(person: int, camera: int, serial: int) -> str:
    """A name in the manner of the set that a folder was taken from; `serial` keeps it unique."""
    styles = (
        f"CUHK01/{person:04d}{serial:03d}",
        f"CUHK03/{camera}_{person:03d}_1_{serial:02d}",
        f"cam_a/{person:03d}_{serial}",
        f"cam_b/{person:03d}_{serial}",
        f"test_query/p{person}_s{serial}",
        f"train_query/p{person}_s{serial}",
    )
    return f"Market/{person:04d}_c{camera}s1_{serial:06d}_00" if person % 2 == 0 else styles[person // 2 % len(styles)]


VARIANTS = {"caption-all": write_first_release}
