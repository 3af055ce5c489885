"""Which patches to remove: those that a map ranks highest, and equally many that something else chooses.

Every choice is an order of the patches of which the first ones are taken. Choices of one order are nested, so a sweep
over fractions and a deletion curve need one order per map, and a control removes exactly as many patches as the map.
Area is always fixed, never mass: a more concentrated map would otherwise remove fewer patches.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from reidctl.errors import UsageError
from reidctl.explain.explainers import centre_map

Maps = npt.NDArray[np.float32]
Chosen = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Grid = tuple[int, int]
Key = tuple[str, str]
"""(explainer, control); the explainer is "" where one choice serves all of them."""

CONTROLS = ("random", "block", "centre", "least", "phrase", "query", "shifted", "pooled")
GIVEN = frozenset(("phrase", "query", "pooled"))
"""Controls whose maps the caller gives."""
SHARED = frozenset(("random", "block", "centre", "pooled"))
"""Controls that do not depend on the explainer."""


@dataclass(frozen=True)
class Plan:
    """What to remove, what to put there, and what to compare with.

    Args:
        fractions: shares of the patches to remove, in (0, 1].
        fills: what stands in for removed patches; see `fills.make_fill`.
        controls: names of `CONTROLS`.
        draws: random sets of patches that `random` averages over, at least 10.
        placements: blocks that `block` and translations that `shifted` average over.
        scope: mask the target image alone, or all right images of a query at once, each with its own map.
        seed: of every draw; together with the names of a pair it decides what the pair's controls are.

    Raises:
        UsageError: a value is out of range or unknown.
    """

    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    fills: tuple[str, ...] = ("mean",)
    controls: tuple[str, ...] = tuple(name for name in CONTROLS if name != "pooled")
    draws: int = 10
    placements: int = 3
    scope: Literal["target", "all_positives"] = "target"
    seed: int = 0

    def __post_init__(self) -> None:
        check_controls(self.controls, self.draws, self.placements)
        wrong = [fraction for fraction in self.fractions if not 0 < fraction <= 1]
        if wrong or not self.fractions or not self.fills:
            raise UsageError(
                f"The fractions to remove are {list(self.fractions)} and the fills {list(self.fills)}.",
                hint="Give at least one of each; fractions lie above 0 and at most at 1.",
            )

    def repeats(self, control: str) -> int:
        """Return how many orders a control is averaged over."""
        return {"random": self.draws, "block": self.placements, "shifted": self.placements}.get(control, 1)


def check_controls(controls: Sequence[str], draws: int, placements: int) -> None:
    """Refuse unknown controls and too few draws.

    Raises:
        UsageError: see above.
    """
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise UsageError(f"Unknown control `{unknown[0]}`.", hint=f"Known: {', '.join(CONTROLS)}.")
    if draws < 10 or placements < 1:
        raise UsageError(
            f"{draws} draws of random patches and {placements} of blocks and shifts.", hint="Give at least 10 and 1."
        )


def patch_count(fraction: float, patches: int) -> int:
    """Return how many of `patches` a fraction in [0, 1] is: rounded half up, at least 1."""
    # 0.145 * 100 is a hair below 14.5.
    return max(1, int(np.floor(round(fraction * patches, 9) + 0.5)))


def order_patches(relevance: Maps, rng: np.random.Generator) -> Ints:
    """Return the place of every patch from 0, highest relevance first and ties at random, shape (M, N).

    A map with a NaN is missing: its places are all N, so no count takes any of its patches.
    """
    patches = relevance.shape[1]
    order = np.lexsort((rng.random(relevance.shape), -relevance), axis=-1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(patches)[None, :], axis=-1)
    place[np.isnan(relevance).any(axis=1)] = patches
    return np.asarray(place, np.int64)


def order_control(
    name: str, relevance: Maps, grid: Grid, *, rng: np.random.Generator, other: Maps | None = None
) -> Ints:
    """Return the places in which a control takes the patches, one independent draw per row, shape (M, N).

    Args:
        name: "" for the maps themselves, or one of `CONTROLS`: `random`; `block`, a 4-connected region grown from a
            random patch by taking random neighbours; `centre`, the prior that people are in the middle; `least`, the
            reverse of the map; `shifted`, the map moved by a random cyclic translation, never by zero: the same
            concentration in another place; `phrase`, `query` and `pooled`, the maps in `other`.
        relevance: the maps, shape (M, N).
        grid: (h, w), h * w = N.
        rng: draws and breaks ties.
        other: shape (M, N), for the last three; a row with NaN is not available. See `order_patches` for such rows.

    Raises:
        UsageError: the name is unknown, `other` is lacking, or a grid of one patch is to be shifted.
    """
    if name in GIVEN:
        if other is None:
            raise UsageError(f"The control `{name}` needs the maps that it takes.")
        return order_patches(other, rng)
    if name == "random":
        return order_patches(np.zeros_like(relevance), rng)
    if name == "block":
        return np.stack([_grow(_neighbours(grid), rng) for _ in relevance])
    if name == "centre":
        return order_patches(np.broadcast_to(centre_map(grid).ravel(), relevance.shape), rng)
    if name == "least":
        return order_patches(-relevance, rng)
    if name == "shifted":
        return order_patches(shift_maps(relevance, grid, rng), rng)
    if name == "":
        return order_patches(relevance, rng)
    raise UsageError(f"Unknown control `{name}`.", hint=f"Known: {', '.join(CONTROLS)}.")


def top_patches(relevance: Maps, count: int, rng: np.random.Generator) -> Chosen:
    """Return the `count` highest patches of each map, ties at random, shape (M, N); none of a map with NaN."""
    return order_patches(relevance, rng) < count


def control_patches(
    name: str, relevance: Maps, grid: Grid, count: int, *, rng: np.random.Generator, other: Maps | None = None
) -> Chosen:
    """Return the `count` patches that a control removes from each map's picture, shape (M, N).

    Every row has exactly `count` patches, or none where `other` is not available. See `order_control`.
    """
    chosen = order_control(name, relevance, grid, rng=rng, other=other) < count
    assert set(chosen.sum(axis=1).tolist()) <= {0, count}, "a control has another number of patches than its map"
    return chosen


def shift_maps(relevance: Maps, grid: Grid, rng: np.random.Generator) -> Maps:
    """Return each map moved over the grid by its own random cyclic translation, never by zero, shape (M, N).

    Raises:
        UsageError: the grid has one patch.
    """
    height, width = grid
    if height * width < 2:
        raise UsageError("A map of one patch cannot be shifted.", hint="Leave the control `shifted` out.")
    steps = rng.integers(1, height * width, size=len(relevance))
    moved = [
        np.roll(row.reshape(grid), divmod(int(step), width), axis=(0, 1)).ravel()
        for row, step in zip(relevance, steps, strict=True)
    ]
    return np.stack(moved) if moved else relevance


@lru_cache(maxsize=16)
def _neighbours(grid: Grid) -> tuple[tuple[int, ...], ...]:
    """The patches beside each patch: above, below, left and right of it."""
    height, width = grid
    around = []
    for y in range(height):
        for x in range(width):
            beside = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            around.append(tuple(i * width + j for i, j in beside if 0 <= i < height and 0 <= j < width))
    return tuple(around)


def _grow(neighbours: Sequence[Sequence[int]], rng: np.random.Generator) -> Ints:
    """The places of all patches when a region grows from a random one, each time by a random patch at its border.

    Equal chances for all of the border (the Eden model) keep the region compact.
    """
    place = np.empty(len(neighbours), np.int64)
    border = [int(rng.integers(len(neighbours)))]
    seen = set(border)
    for number, draw in enumerate(rng.random(len(neighbours)).tolist()):
        chosen = int(draw * len(border))
        border[chosen], border[-1] = border[-1], border[chosen]
        patch = border.pop()
        place[patch] = number
        fresh = [other for other in neighbours[patch] if other not in seen]
        seen.update(fresh)
        border.extend(fresh)
    return place


@dataclass(frozen=True)
class Orders:
    """The orders that the pairs of a chunk are masked in.

    Attributes:
        keys: for each of the K orders, what it belongs to; the draws of one control stand side by side.
        place: places of the patches, N everywhere where a map is missing, int64 (P, K, N).
    """

    keys: list[Key]
    place: Ints

    @property
    def missing(self) -> Chosen:
        """Which orders are not available, shape (P, K)."""
        return np.asarray(self.place[..., 0] >= self.place.shape[2])

    def slots(self) -> dict[Key, slice]:
        """Return which of the K orders belong to each key."""
        names = list(dict.fromkeys(self.keys))
        return {key: slice(self.keys.index(key), self.keys.index(key) + self.keys.count(key)) for key in names}


def plan_keys(plan: Plan, explainers: Sequence[str], others: Mapping[Key, Maps]) -> list[Key]:
    """Return what the orders of one pair are, the draws of a control one after another.

    Controls without an explainer come once. A given control that `others` lacks is left out.
    """
    shared = [("", name) for name in plan.controls if name in SHARED]
    own = [(explainer, name) for explainer in explainers for name in ("", *plan.controls) if name not in SHARED]
    known = [key for key in shared + own if key[1] not in GIVEN or key in others]
    return [key for key in known for _ in range(plan.repeats(key[1]))]


def order_pairs(
    plan: Plan,
    rows: Ints,
    seeds: Sequence[int],
    maps: Mapping[str, Maps],
    others: Mapping[Key, Maps],
    grid: Grid,
) -> Orders:
    """Return the orders of some pairs.

    Args:
        plan: see `Plan`.
        rows: which rows of the maps to take, shape (P,).
        seeds: what each pair is drawn with beside the plan's seed, P of them; see `pair_seed`.
        maps: by explainer, each (M, N).
        others: the maps of given controls, each (M, N).
        grid: (h, w).
    """
    keys = plan_keys(plan, list(maps), others)
    distinct = list(dict.fromkeys(keys))
    patches = grid[0] * grid[1]
    place = np.empty((len(rows), len(keys), patches), np.int64)
    for number, (row, seed) in enumerate(zip(rows.tolist(), seeds, strict=True)):
        found = [_orders(plan, key, row, seed, maps, others, grid) for key in distinct]
        place[number] = np.concatenate(found)
    return Orders(keys, place)


def _orders(
    plan: Plan, key: Key, row: int, seed: int, maps: Mapping[str, Maps], others: Mapping[Key, Maps], grid: Grid
) -> Ints:
    """All draws of one key for one pair, shape (draws, N)."""
    explainer, control = key
    # The draws do not know the explainer: all of them are shifted alike, and one more of them changes nothing.
    rng = np.random.default_rng((plan.seed, seed, ("", *CONTROLS).index(control)))
    repeats = plan.repeats(control)
    blank = np.zeros((repeats, grid[0] * grid[1]), np.float32)
    relevance = np.repeat(maps[explainer][row : row + 1], repeats, axis=0) if explainer else blank
    other = others[key][row : row + 1] if control in GIVEN else None
    return order_control(control, relevance, grid, rng=rng, other=other)


def pair_seed(query_id: str, image_id: str) -> int:
    """Return what a pair's draws depend on: its names alone, whatever stands beside it in a chunk."""
    return zlib.crc32(f"{query_id}\0{image_id}".encode())


def pick_donors(people: Sequence[str], rows: Ints, *, seed: int = 0) -> Ints:
    """Return for each image a random image of another person: whose pixels the fill `swap` takes, shape (M,).

    Args:
        people: the person of each gallery image.
        rows: gallery rows to find a donor for, shape (M,); equal rows get equal donors.
        seed: of the choice.

    Raises:
        UsageError: the gallery shows one person only.
    """
    person = np.asarray(people, object)
    if len(set(people)) < 2:
        raise UsageError("The fill `swap` needs images of two people or more.", hint="Choose another fill.")
    donors = np.empty(len(rows), np.int64)
    for number, row in enumerate(rows.tolist()):
        rng = np.random.default_rng((seed, row))
        drawn = int(rng.integers(len(person)))
        while person[drawn] == person[row]:
            drawn = int(rng.integers(len(person)))
        donors[number] = drawn
    return donors
