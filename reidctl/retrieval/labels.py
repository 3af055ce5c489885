"""Which gallery items are right for a query, which are dropped, and in what order equal scores stand.

Nothing here sees a score: exact search, re-ranking and pairwise scorers share one reading of people, cameras, outfits
and ids. Labels of any type become integer codes once; a missing label (None, NaN) equals nothing and differs from
nothing, so it drops nothing, and a query without a person has no match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError

Exclude = Literal["none", "same_camera", "same_outfit", "same_item", "cloth_changing", "same_clothes"]
Labels = Sequence[Any] | npt.NDArray[Any] | pd.Series
Sides = tuple[Labels | None, Labels | None]  # of the queries, of the gallery
Ints = npt.NDArray[np.int64]

# Label and whether equal or different items are dropped.
_RULES: dict[Exclude, tuple[tuple[str, bool], ...]] = {
    "none": (),
    "same_camera": (("camera", True),),
    "same_outfit": (("outfit", True),),
    "same_item": (("item", True),),
    "cloth_changing": (("camera", True), ("outfit", True)),
    "same_clothes": (("camera", True), ("outfit", False)),
}


@dataclass(frozen=True)
class Key:
    """Labels that decide which items of the query's person are dropped: those that equal its own, or those that do
    not."""

    query: Labels
    gallery: Labels
    equal: bool


@dataclass(frozen=True)
class Pairs:
    """Queries of a block with the gallery items of the same person, shape (M,); sorted by query, then position.

    Args:
        row: query, from the start of the block.
        column: position of the item in tie order.
        drop: whether it is dropped, neither right nor wrong.
    """

    row: Ints
    column: Ints
    drop: npt.NDArray[np.bool_]


def keys_of(exclude: Exclude, *, camera: Sides, outfit: Sides, item: Sides) -> list[Key]:
    """Return the label comparisons behind a rule.

    Raises:
        DataError: a label that the rule needs is absent.
    """
    sides = {"camera": camera, "outfit": outfit, "item": item}
    found = []
    for name, equal in _RULES[exclude]:
        query, gallery = sides[name]
        if query is None or gallery is None:
            raise DataError(f"exclude={exclude} needs that label for queries and gallery.")
        found.append(Key(query, gallery, equal))
    return found


class SamePerson:
    """Which gallery items show a query's person, and which of them are dropped.

    Args:
        query_person: shape (Q,).
        gallery_person: shape (G,).
        keys: from `keys_of`.
        order: gallery row at each position, see `tie_order`.

    Attributes:
        query_code: the person of each query as an integer, shape (Q,).
        gallery_code: likewise of each gallery row, shape (G,).
    """

    def __init__(self, query_person: Labels, gallery_person: Labels, keys: Sequence[Key], order: Ints) -> None:
        self.query_code, self.gallery_code = codes(query_person, gallery_person)
        assert len(order) == len(self.gallery_code), "one person id per gallery item"
        code = self.gallery_code[order]
        self._by_person = np.argsort(code, kind="stable")
        self._first = np.searchsorted(code[self._by_person], self.query_code, side="left")
        self._count = np.searchsorted(code[self._by_person], self.query_code, side="right") - self._first
        self._count[self.query_code < 0] = 0  # people without a name are not one person
        self._keys: list[tuple[Ints, Ints, bool]] = []
        for key in keys:
            query_codes, gallery_codes = codes(key.query, key.gallery)
            self._keys.append((query_codes, gallery_codes[order], key.equal))

    def of(self, start: int, stop: int) -> Pairs:
        """Return the pairs of queries `start` to `stop`."""
        count = self._count[start:stop]
        row = np.repeat(np.arange(stop - start), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = self._by_person[self._first[start:stop][row] + within]
        drop = np.zeros(len(row), bool)
        for query_codes, gallery_codes, equal in self._keys:
            mine, theirs = query_codes[start:stop][row], gallery_codes[column]
            drop |= (mine >= 0) & (theirs >= 0) & ((mine == theirs) == equal)
        return Pairs(row, column, drop)

    def matches(self, index: Ints) -> npt.NDArray[np.bool_]:
        """Return whether gallery rows (Q, top) show the person of their query; -1 matches nobody."""
        mine = self.query_code[:, None]
        return np.asarray((index >= 0) & (mine >= 0) & (self.gallery_code[index] == mine))


def codes(first: Labels, second: Labels) -> tuple[Ints, Ints]:
    """Return both lists as integers, equal where the labels are equal; -1 for a missing label."""
    joined = np.concatenate([np.asarray(first, dtype=object), np.asarray(second, dtype=object)])
    code = np.asarray(pd.factorize(joined)[0], np.int64)
    return code[: len(first)], code[len(first) :]


def padded(values: npt.NDArray[np.float64], row: Ints, rows: int, fill: float) -> npt.NDArray[np.float64]:
    """Return ragged values, sorted by row, as a matrix, each row ascending, padded with `fill`."""
    count = np.bincount(row, minlength=rows)
    full = np.full((rows, int(count.max(initial=0))), fill)
    full[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = values
    return np.sort(full, axis=1)


def tie_order(ids: Labels | None, count: int) -> Ints:
    """Return the gallery rows in the order in which equal scores stand: by id as a string, else by row."""
    if ids is None:
        return np.arange(count)
    assert len(ids) == count, "one id per gallery item"
    return np.argsort(np.asarray(ids, dtype=object).astype(str), kind="stable")
