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

from reidctl.errors import DataError, UsageError

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
    not; `name` is how messages call them."""

    query: Labels
    gallery: Labels
    equal: bool
    name: str = "label"


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
        UsageError: there is no such rule.
        DataError: a label that the rule needs is absent.
    """
    if exclude not in _RULES:
        raise UsageError(f"There is no rule exclude={exclude}.", hint=f"Known: {', '.join(_RULES)}.")
    sides = {"camera": camera, "outfit": outfit, "item": item}
    found = []
    for name, equal in _RULES[exclude]:
        query, gallery = sides[name]
        if query is None or gallery is None:
            raise DataError(f"exclude={exclude} needs that label for queries and gallery.")
        found.append(Key(query, gallery, equal, name))
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

    Raises:
        DataError: lists of labels whose lengths differ, or labels that cannot be compared; the message names them.
    """

    def __init__(self, query_person: Labels, gallery_person: Labels, keys: Sequence[Key], order: Ints) -> None:
        _check_lengths([Key(query_person, gallery_person, True, "person"), *keys], len(query_person), len(order))
        self.query_code, self.gallery_code = codes(query_person, gallery_person, name="person")
        code = self.gallery_code[order]
        self._by_person = np.argsort(code, kind="stable")
        self._first = np.searchsorted(code[self._by_person], self.query_code, side="left")
        self._count = np.searchsorted(code[self._by_person], self.query_code, side="right") - self._first
        self._count[self.query_code < 0] = 0  # people without a name are not one person
        self._keys: list[tuple[Ints, Ints, bool]] = []
        for key in keys:
            query_codes, gallery_codes = codes(key.query, key.gallery, name=key.name)
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


def _check_lengths(keys: Sequence[Key], queries: int, gallery: int) -> None:
    for key in keys:
        for side, labels, count in (("query", key.query, queries), ("gallery", key.gallery, gallery)):
            check_length(labels, count, f"{side} {key.name}")


def check_length(labels: Labels, count: int, name: str) -> None:
    """Refuse a list that has not one label per item.

    Raises:
        DataError: naming the list and both numbers.
    """
    if len(labels) != count:
        raise DataError(f"The list of the {name} labels has {len(labels)} for {count} items.")


def objects(labels: Labels) -> npt.NDArray[np.object_]:
    """Return labels of any type as objects, shape (N,); a tuple is one label.

    Raises:
        DataError: an array of several columns.
    """
    if isinstance(labels, np.ndarray) and labels.ndim > 1:
        raise DataError(f"Labels have shape {labels.shape}; one label per item is needed.")
    if isinstance(labels, (list, tuple)):
        return np.fromiter(labels, dtype=object, count=len(labels))
    return np.asarray(labels, dtype=object)


def texts(labels: Labels) -> npt.NDArray[np.str_]:
    """Return labels of any type as texts, shape (N,)."""
    found = objects(labels)
    if any(isinstance(label, tuple) for label in found):
        found = np.fromiter(map(str, found), dtype=object, count=len(found))
    return found.astype(str)


def codes(first: Labels, second: Labels, *, name: str = "given") -> tuple[Ints, Ints]:
    """Return both lists as integers, equal where the labels are equal; -1 for a missing label.

    Raises:
        DataError: labels that cannot be compared, such as lists; `name` is how the message calls them.
    """
    joined = np.concatenate([objects(first), objects(second)])
    try:
        code = np.asarray(pd.factorize(joined)[0], np.int64)
    except TypeError as error:
        raise DataError(f"The {name} labels cannot be compared: {error}.", hint="Use texts or numbers.") from None
    return code[: len(first)], code[len(first) :]


def padded(values: npt.NDArray[np.float64], row: Ints, rows: int, fill: float) -> npt.NDArray[np.float64]:
    """Return ragged values, sorted by row, as a matrix, each row ascending, padded with `fill`."""
    count = np.bincount(row, minlength=rows)
    full = np.full((rows, int(count.max(initial=0))), fill)
    full[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = values
    return np.sort(full, axis=1)


def tie_order(ids: Labels | None, count: int) -> Ints:
    """Return the gallery rows in the order in which equal scores stand: by id as a string, else by row.

    Raises:
        DataError: not one id per row.
    """
    if ids is None:
        return np.arange(count)
    check_length(ids, count, "gallery id")
    return np.argsort(texts(ids), kind="stable")
