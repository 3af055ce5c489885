"""RSTPReid: five images of a person from 15 cameras of MSMT17, two sentences each (`data_captions.json`, `imgs/`).

Two counts of people are in circulation: 4,101 = 3,701 + 200 + 200 by the splits and by the authors' README, and 4,104
as some papers print. The reader compares with the first.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.datasets import captioned
from reidctl.datasets.base import Draft, Options, Probe
from reidctl.datasets.writing import place, rows

OPTIONS: frozenset[str] = frozenset()
NAME = "rstpreid"
OFFICIAL = {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)}
RELEASE = captioned.Release(
    NAME,
    "RSTPReid",
    ("RSTPReid", "RSTPReid/RSTPReid"),
    ("data_captions.json",),
    OFFICIAL,
    path_key="img_path",
    # 0000_c14_0031: person, camera, number.
    camera=re.compile(r"\d+_c(\d+)_\d+"),
)
# The first download had 3,901, 100 and 100 people (NjtechCVLab/RSTPReid-Dataset, issue 2).
_WITHDRAWN = {"train": 3901, "val": 100, "test": 100}


def read(root: Path, options: Options) -> Draft:
    """Return the images and sentences of `root` or `root/RSTPReid`; the file name says the camera.

    Raises:
        DataError: no annotation file, or an entry that is not as documented.
    """
    found = captioned.locate(root, RELEASE)
    draft = captioned.read(found, RELEASE, options, captioned.load(found.annotation))
    people = {split: len({e.person for e in draft.entries if e.split == split}) for split in OFFICIAL}
    if people == _WITHDRAWN:
        draft.notes.append("These are the splits of the first download, which its authors replaced: download again.")
    return draft


def probe(root: Path) -> Probe | None:
    """Return what of the layout is there."""
    return captioned.probe(root, RELEASE)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay the rows out as RSTPReid, all images in one folder; return the folder above.

    Raises:
        UsageError: several datasets, or no captions.
    """
    folder = out / RELEASE.inner[0]
    texts = captioned.sentences_to_write(images, captions, RELEASE.title)
    ids = captioned.ranked_people(images, 0)
    items: list[dict[str, Any]] = []
    for serial, row in enumerate(rows(images)):
        camera = captioned.camera_number(row.camera_id)
        middle = "" if camera is None else f"c{camera}_"
        name = f"{ids[row.person_id]:04d}_{middle}{serial:04d}{Path(row.path).suffix}"
        place(source / row.path, folder / "imgs" / name)
        sentences = texts.get(row.image_id, [])
        items.append({"id": ids[row.person_id], "img_path": name, "captions": sentences, "split": row.split})
    captioned.save(folder / RELEASE.annotations[0], items)
    return folder
