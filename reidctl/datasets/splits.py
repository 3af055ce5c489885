"""Splits by identity: a person is in one split, whatever the number of images."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from reidctl.datasets.base import Entry
from reidctl.errors import UsageError


def split_people(people: Sequence[str], fractions: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Return the split of every person: shares of people, not of images, drawn with `seed`.

    The result depends on the set of people and the seed alone. A share above zero gets at least one person while
    there are enough, test first.

    Raises:
        UsageError: shares that are no finite numbers, negative or do not add up to 1.
    """
    # NaN compares as false with everything, so it has to be asked for.
    if not all(map(math.isfinite, fractions)) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        shares = ",".join(f"{share:g}" for share in fractions)
        raise UsageError(
            f"Split fractions {shares} must be at least 0 and add up to 1.", hint="For example 0.7,0.1,0.2."
        )
    order = sorted(set(people))
    random.Random(seed).shuffle(order)
    total = len(order)
    test = min(total, max(round(total * fractions[2]), int(fractions[2] > 0)))
    val = min(total - test, max(round(total * fractions[1]), int(fractions[1] > 0 and total > 2)))
    if fractions[0] == 0:
        # Rounding must not leave anybody in a split that has no share.
        test, val = (total, 0) if fractions[1] == 0 else (total - val, val)
    bounds = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    return {person: split for split, members in bounds.items() for person in members}


def carve_validation(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """Return the entries with `count` people moved from train to val, drawn with `seed`, with roles by camera.

    Raises:
        UsageError: not 0 <= count < people in train.
    """
    people = sorted({entry.person for entry in entries if entry.split == "train"})
    if not 0 <= count < max(len(people), 1):
        raise UsageError(
            f"Cannot carve {count_people(count)} out of {len(people):,} training {_noun(len(people))}.",
            hint="Give at least 0."
            if count < 0
            else f"Give at most {max(len(people) - 1, 0):,}, so that somebody is left to train on.",
        )
    chosen = set(random.Random(seed).sample(people, count))
    moved = [entry for entry in entries if entry.person in chosen and entry.split == "train"]
    queries = _queries_by_camera(moved)
    return [
        replace(e, split="val", role="query" if e.key in queries else "gallery")
        if e.person in chosen and e.split == "train"
        else e
        for e in entries
    ]


def count_people(count: int) -> str:
    """Return "1 person" or "1,200 people"."""
    return f"{count:,} {_noun(count)}"


def _noun(count: int) -> str:
    return "person" if count == 1 else "people"


def _queries_by_camera(entries: Sequence[Entry]) -> set[str]:
    """The first image of every camera with several, so that each query keeps a match in another camera's gallery."""
    seen: dict[str, dict[str | None, list[str]]] = {}
    for entry in sorted(entries, key=lambda e: e.key):
        seen.setdefault(entry.person, {}).setdefault(entry.camera, []).append(entry.key)
    queries: set[str] = set()
    for cameras in seen.values():
        if len(cameras) > 1:
            several = [keys[0] for keys in cameras.values() if len(keys) > 1]
            queries.update(several or [next(iter(cameras.values()))[0]])
    return queries
