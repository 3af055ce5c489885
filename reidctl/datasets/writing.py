"""What the writers of dataset layouts share. They exist so that every reader is tested on real files."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.errors import UsageError


def place(source: Path, target: Path) -> None:
    """Put an image at `target`, as a hard link where the disk allows it, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def numbered_people(images: pd.DataFrame) -> dict[str, int]:
    """Return a number from 1 to 9999 for every `person_id`, the same for one person in every dataset.

    Rendered people carry the attribute `true_person`, and their number follows from it: a person in two rendered
    datasets gets one number, which is what the file names of CUHK-PEDES and Market-1501 have in common. People
    without it are numbered in sorted order.

    Raises:
        UsageError: there are more people than four digits hold.
    """
    known = {str(row.person_id): _true_person(row.attributes) for row in images.itertuples()}
    true = {name: number for name, number in known.items() if number is not None}
    # Domain b of the renderer numbers its own people from 10,000: they come down from 9999 here.
    numbers = {name: number + 1 if number < 9999 else 19999 - number for name, number in true.items()}
    fits = all(0 < number < 10_000 for number in numbers.values())
    if len(numbers) < len(known) or len(set(numbers.values())) < len(numbers) or not fits:
        numbers = {name: number for number, name in enumerate(sorted(known), start=1)}
    if len(numbers) > 9999:
        raise UsageError(f"{len(numbers):,} people do not fit the four digits of this layout.")
    return numbers


def _true_person(attributes: Any) -> int | None:
    text = dict(attributes or {}).get("true_person", "")
    return int(text) if str(text).isdecimal() else None


def captions_of(captions: pd.DataFrame, kind: str = "full") -> dict[str, list[str]]:
    """Return the texts of a kind by image id, in the order of the table."""
    texts: dict[str, list[str]] = {}
    for row in captions[(captions["kind"] == kind) & (captions["status"] == "ok")].itertuples():
        texts.setdefault(str(row.image_id), []).append(str(row.text))
    return texts


def rows(images: pd.DataFrame) -> Iterator[Any]:
    """Yield the rows of one dataset in the order of the table.

    Raises:
        UsageError: the table holds several datasets; a layout holds one.
    """
    if images["dataset"].nunique() > 1:
        raise UsageError("A layout holds one dataset; write each dataset on its own.")
    yield from images.itertuples(index=False)
