"""UFine6926: two very long sentences per image, 81 words on average (`UFine6926_Annotations.json`, `images/`).

The authors' README (Zplusdragon/UFineBench) gives the keys and `file_path: images/1.jpg`, relative to the folder of
the annotation file, but not the file's name; that is from public code which reads the set (CLS-2001/DFLSG,
datasets/ufine.py). It has no validation split.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.datasets import captioned
from reidctl.datasets.base import Draft, Options, Probe
from reidctl.datasets.writing import place, rows

OPTIONS = frozenset({"seed", "carve_val"})
NAME = "ufine6926"
OFFICIAL = {"train": (4926, 18577, 2 * 18577), "test": (2000, 7629, 2 * 7629)}
RELEASE = captioned.Release(
    NAME,
    "UFine6926",
    ("UFine6926", "UFine6926/UFine6926", "UFineBench/UFine6926"),
    ("UFine6926_Annotations.json",),
    OFFICIAL,
    # Copies made for code that expects `imgs/` moved the folder there, or gave it that name.
    images=(".", "imgs"),
    subfolders=("images",),
    renamed="imgs",
)


def read(root: Path, options: Options) -> Draft:
    """Return the images and sentences of `root` or `root/UFine6926`.

    Raises:
        DataError: no annotation file, or an entry that is not as documented.
        UsageError: `carve_val` asks for more people than train has.
    """
    found = captioned.locate(root, RELEASE)
    return captioned.read(found, RELEASE, options, captioned.load(found.annotation))


def probe(root: Path) -> Probe | None:
    """Return what of the layout is there."""
    return captioned.probe(root, RELEASE)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay the rows out as UFine6926, people of val in train; return its folder.

    Raises:
        UsageError: several datasets, or no captions.
    """
    folder = out / RELEASE.inner[0]
    texts = captioned.sentences_to_write(images, captions, RELEASE.title)
    ids = captioned.ranked_people(images, 1)
    items: list[dict[str, Any]] = []
    for number, row in enumerate(rows(images), start=1):
        name = f"images/{number}{Path(row.path).suffix}"
        place(source / row.path, folder / name)
        split = "test" if row.split == "test" else "train"
        sentences = texts.get(row.image_id, [])
        items.append({"split": split, "id": ids[row.person_id], "file_path": name, "captions": sentences})
    captioned.save(folder / RELEASE.annotations[0], items)
    return folder
