"""What training must not see: people and image files of the splits that measure it.

`find_leaks` looks, `purge` mends. Both read the `images` table alone, so that a model can be guarded wherever its
dataset came from.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from reidctl import tables
from reidctl.console import log
from reidctl.datasets.identities import DISTRACTORS
from reidctl.errors import DataError

LeakCheck = Literal["error", "warn", "off"]

# A split must not share people or files with those before it; the epoch is chosen on val, the result read on test.
PRECEDENCE = ("test", "val", "train")


@dataclass(frozen=True)
class Leak:
    """One thing that two splits share.

    Attributes:
        kind: `person` or `image`.
        name: the person id, or the image id in the split that should not have it.
        split: the split that should not have it.
        found_in: the split that has the right to it.
        evidence: an image id of `found_in` that shows it.
    """

    kind: str
    name: str
    split: str
    found_in: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of {self.split} is also in {self.found_in} ({self.evidence})"


def find_leaks(images: pd.DataFrame) -> list[Leak]:
    """Return every person and every image file (by content hash) that two splits share.

    A file counts once per image of the split that should not have it. Distractors, whose one id stands for many
    people, are compared by file only.
    """
    wrong = _wrong_rows(images)
    people = wrong[wrong["reason"] == "person"].drop_duplicates(["person_id", "split"])
    files = wrong[wrong["reason"] == "image"]
    return [*_leaks("person", people, "person_id"), *_leaks("image", files, "image_id")]


def _leaks(kind: str, rows: pd.DataFrame, name: str) -> list[Leak]:
    columns = zip(*(rows[column] for column in (name, "split", "found_in", "evidence")), strict=True)
    return [Leak(kind, *(str(value) for value in values)) for values in columns]


def purge(images: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images without those that leak, and the `purged` table that lists them.

    An image leaves train if its person or its file is in val or test, and leaves val if they are in test. Test is
    never touched.
    """
    wrong = _wrong_rows(images).drop_duplicates("image_id")
    kept = images[~images["image_id"].isin(wrong["image_id"])].reset_index(drop=True)
    listed = wrong[["image_id", "dataset", "split", "person_id", "reason", "evidence"]]
    return kept, listed.reset_index(drop=True)


def _wrong_rows(images: pd.DataFrame) -> pd.DataFrame:
    """Rows of images that their split should not have: columns of `images` and reason, found_in, evidence."""
    frame = images[["image_id", "dataset", "split", "person_id", "sha256"]].astype(str)
    level = frame["split"].map({name: number for number, name in enumerate(PRECEDENCE)})
    # Splits of other names (a user's own) are beside the order: nothing is trained or measured on them by default.
    frame = frame.assign(level=level)[level.notna()]
    persons = frame[~frame["person_id"].isin(DISTRACTORS)]
    return pd.concat(
        [
            _below(persons, "person_id").assign(reason="person"),
            _below(frame[frame["sha256"] != ""], "sha256").assign(reason="image"),
        ],
        ignore_index=True,
    )


def _below(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows whose value of `key` occurs in a split that comes first, with that split and its first image."""
    order = np.argsort(frame["level"].to_numpy(), kind="stable")
    first = frame.iloc[order].drop_duplicates(key).set_index(key)
    owner = first.loc[frame[key]]
    wrong = owner["level"].to_numpy() < frame["level"].to_numpy()
    found = {"found_in": owner["split"].to_numpy()[wrong], "evidence": owner["image_id"].to_numpy()[wrong]}
    return frame[wrong].assign(**found)


def guard(images: pd.DataFrame, check: LeakCheck) -> list[str]:
    """Refuse or report a dataset whose training would see what measures it; return the sentences of a warning.

    Args:
        images: the `images` table.
        check: `error` raises, `warn` logs, `off` does not look.

    Raises:
        DataError: with `error`, a person or a file is in two splits.
    """
    if check == "off":
        return []
    leaks = find_leaks(images)
    if not leaks:
        return []
    people, files = (sum(leak.kind == kind for leak in leaks) for kind in ("person", "image"))
    counted = f"{people:,} {'person' if people == 1 else 'people'} and {files:,} image file{'s' * (files != 1)}"
    sentence = f"{counted} shared by two splits, the first: {leaks[0]}."
    if check == "error":
        raise DataError(
            sentence,
            hint="`reidctl data combine` (without --no-purge) takes them out of training; `data.leak_check: warn` goes "
            "on regardless.",
        )
    log.warning(f"LEAK: {sentence} The result is not a test of anything unseen.")
    return [f"Leak: {sentence}"]


def seen_table(images: pd.DataFrame, digests: Iterable[str]) -> pd.DataFrame:
    """Return the `seen` table of a training set: digests of its people (given) and of its image files."""
    people, files = sorted(set(digests)), sorted(set(images["sha256"]) - {""})
    frame = pd.DataFrame({"kind": ["person"] * len(people) + ["image"] * len(files), "digest": [*people, *files]})
    return frame if len(frame) else tables.empty("seen")
