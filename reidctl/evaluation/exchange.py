"""Who wears whose clothing text: a random exchange in which nobody keeps their own clothes, wherever there is one."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reidctl.errors import DataError

Codes = npt.NDArray[np.int64]

_ROUNDS = 50


def conflicting_donors(
    clothing: Sequence[str],
    people: Sequence[str],
    *,
    outfits: Sequence[str | None] | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> Codes:
    """Return whose clothing text each query wears: a permutation in which nobody gets their own or an equal text.

    For every i, people[donor[i]] != people[i] and clothing[donor[i]] != clothing[i], and where both outfits are known
    outfits[donor[i]] != outfits[i]. The paper "shuffles" clothing descriptions; a plain shuffle can hand back the same
    outfit, so we take a derangement: a random permutation whose misfits are swapped with random partners that fit, and
    where none does, longer exchanges among several queries are sought until one is found or there can be none.

    Args:
        clothing: clothing texts.
        people: person ids.
        outfits: outfit ids, None where unknown.
        ids: query ids; with them the answer does not depend on the order of the queries.
        seed: of the permutation.

    Raises:
        DataError: there is no such permutation, e.g. because most texts are equal.
    """
    count = len(people)
    if not count:
        return np.zeros(0, np.int64)
    names = ids if ids is not None else [f"{row:012d}" for row in range(count)]
    order = np.asarray(sorted(range(count), key=lambda row: (people[row], clothing[row], names[row])), np.int64)
    labels = [_codes(values, order) for values in (people, clothing, outfits or [None] * count)]
    # What more than half of all share cannot be given to the rest alone: said before anything is sought.
    most = max(int(np.bincount(code[code >= 0]).max(initial=0)) for code in labels)
    rng = np.random.default_rng(seed)
    donor = None if 2 * most > count else _exchanged(labels, *_swapped(labels, rng), rng)
    if donor is None:
        raise DataError(
            f"The {count} clothing texts cannot be exchanged: however it is done, for some there is nobody different "
            "to swap with."
        )
    found = np.empty(count, np.int64)
    found[order] = order[donor]
    return found


def _codes(values: Sequence[str | None], order: Codes) -> Codes:
    """Labels as numbers, in `order`; -1 for an unknown one."""
    number = {value: place for place, value in enumerate(sorted({value for value in values if value is not None}))}
    return np.asarray([-1 if values[row] is None else number[values[row]] for row in order], np.int64)


def _clash(labels: Sequence[Codes], mine: Codes | int, other: Codes | int) -> npt.NDArray[np.bool_]:
    """Where two rows share a person, a text or a known outfit."""
    found = [(code[mine] == code[other]) & (code[mine] >= 0) for code in labels]
    return np.asarray(np.logical_or.reduce(found))


def _swapped(labels: Sequence[Codes], rng: np.random.Generator) -> tuple[Codes, Codes]:
    """A random permutation after swaps of two, and the rows that still do not fit."""
    everyone = np.arange(len(labels[0]))
    donor = rng.permutation(len(everyone))
    wrong = np.flatnonzero(_clash(labels, everyone, donor))
    for _ in range(_ROUNDS):
        for row in wrong:
            fits = ~_clash(labels, int(row), donor) & ~_clash(labels, everyone, int(donor[row]))
            partners = np.flatnonzero(fits)
            if len(partners):
                other = partners[rng.integers(len(partners))]
                donor[row], donor[other] = donor[other], donor[row]
        before, wrong = len(wrong), np.flatnonzero(_clash(labels, everyone, donor))
        if len(wrong) in (0, before):
            break
    return donor, wrong


def _exchanged(labels: Sequence[Codes], donor: Codes, wrong: Codes, rng: np.random.Generator) -> Codes | None:
    """The permutation with the misfits mended along augmenting paths; None if some misfit has no such path.

    A row that cannot be reached by an augmenting path stays without a donor in every matching (Berge), so None means
    that there is no such permutation at all.
    """
    if not len(wrong):
        return donor
    owner = np.full(len(donor), -1)
    owner[donor] = np.arange(len(donor))
    owner[donor[wrong]] = -1
    donor[wrong] = -1
    kinds = np.unique(np.stack(labels), axis=1, return_inverse=True)[1].ravel()
    return donor if all(_augment(labels, kinds, donor, owner, int(row), rng) for row in wrong) else None


def _augment(
    labels: Sequence[Codes], kinds: Codes, donor: Codes, owner: Codes, start: int, rng: np.random.Generator
) -> bool:
    """Give `start` a donor by passing donors on along a shortest chain of rows; False if there is no such chain.

    Almost every text fits almost every row, so the search keeps the donors that it has not met instead of listing who
    fits whom: time and memory grow with the number of those, not with all pairs.
    """
    unmet, via = rng.permutation(len(donor)), np.full(len(donor), -1)
    queue, asked = [start], set[int]()
    for row in queue:  # grows while it is read
        if not len(unmet):
            break
        if int(kinds[row]) in asked:
            continue  # what fits it has been met
        asked.add(int(kinds[row]))
        clash = _clash(labels, row, unmet)
        met, unmet = unmet[~clash], unmet[clash]
        via[met] = row
        free = met[owner[met] < 0]
        if len(free):
            _pass_on(donor, owner, via, int(free[0]))
            return True
        queue += owner[met].tolist()
    return False


def _pass_on(donor: Codes, owner: Codes, via: Codes, column: int) -> None:
    """Let every row of the chain that ends at a free donor take the donor that it reached, and free its own."""
    while column >= 0:
        row = int(via[column])
        freed = int(donor[row])
        donor[row], owner[column] = column, row
        column = freed
