"""How many gallery items score above, and at least, each positive of a query: exact counts from approximate scores.

A level is the exact score of a positive. An approximate score further than the slack from a level is on its side of it
for certain; only the others, a few in ten thousand, are computed exactly. Scores below all levels, most of them with
a good model, are never looked at one by one.
"""

import numpy as np
import torch

from reidctl.retrieval.products import Block, places

_CHUNK = 1 << 20  # candidates handled at a time
_EVERY = 64  # of so many columns one is looked at to tell whether a block is crowded
_MANY = 0.08  # share of scores above which computing all of them exactly is cheaper
_FEW_LEVELS = 40  # up to so many, comparing with each beats a binary search
_WORDS = 128  # words of 8 truth values whose sums fit the bytes of a word
_GROUP = 16  # items whose highest score stands for them where a first bound is looked for
_ROW = 4.0  # scores of one query lie within (-2, 2): adding 4 times the row keeps rows apart in one sorted list
_BEYOND = 1.75  # stands for "no level": above every score


class Levels:
    """The levels of some queries and the counts so far.

    Args:
        exact: exact scores of the positives, each row ascending, padded with infinity, float64, shape (q, P).
        slack: the largest possible error of an approximate score.
    """

    def __init__(self, exact: torch.Tensor, slack: float) -> None:
        queries, self.count = exact.shape
        self.exact = exact.clamp(max=_BEYOND)
        # Row by row 2P bounds: where a level's doubt begins, and where it ends.
        both = torch.cat([self.exact - slack, self.exact + slack], dim=1)
        bounds, place = torch.sort(both, dim=1, stable=True)
        self.slack = slack
        rows = torch.arange(queries, device=exact.device, dtype=torch.float64)[:, None] * _ROW
        self._bounds = (bounds + rows).view(-1)
        ends = (place >= self.count).cumsum(dim=1)
        self._ended = torch.cat([ends.new_zeros(queries, 1), ends], dim=1)  # ends among the first 0, 1, ... bounds
        self._distinct, number = torch.unique(self.exact, return_inverse=True)
        row_number = torch.arange(queries, device=exact.device)[:, None] * (len(self._distinct) + 1)
        self._keys = (number.view(queries, self.count) + row_number).view(-1)
        self.tally = Tally(queries, self.count, exact.device)
        self.whole = torch.zeros((2, queries, self.count), dtype=torch.int64, device=exact.device)

    def add_whole(self, scores: torch.Tensor) -> None:
        """Count a block of exact scores (q, g) in `whole`: above each level, and at or above it, shape (2, q, P)."""
        if self.count > _FEW_LEVELS:
            return self._search_whole(scores)
        for level in range(self.count):
            bound = self.exact[:, level : level + 1]
            self.whole[0, :, level] += row_sums(scores > bound)
            self.whole[1, :, level] += row_sums(scores >= bound)

    def _search_whole(self, scores: torch.Tensor) -> None:
        width = self.count + 1
        row = torch.arange(len(scores), device=scores.device)[:, None] * width
        for kind, right in enumerate((False, True)):
            below = torch.searchsorted(self.exact, scores, right=right)
            counts = torch.bincount((below + row).view(-1), minlength=len(scores) * width).view(-1, width)
            self.whole[kind] += counts.flip(1).cumsum(1).flip(1)[:, 1:]

    def floor(self, skipped: int) -> torch.Tensor:
        """Return the score below which an item is below all levels but the lowest `skipped`, shape (q,)."""
        if skipped >= self.count:
            return self.exact.new_full((len(self.exact),), _BEYOND)
        return self.exact[:, skipped] - self.slack

    def place(self, row: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many levels of its row each approximate score is above for certain, and which are in doubt."""
        position = torch.searchsorted(self._bounds, score + row * _ROW, right=True) - row * (2 * self.count)
        above = self._ended[row, position]
        return above, position > 2 * above  # more doubts begun than ended

    def place_exactly(self, row: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many levels of its row each exact score is above, and how many it is at or above."""
        base, first = row * (len(self._distinct) + 1), row * self.count
        above, reach = (
            torch.searchsorted(self._keys, base + torch.searchsorted(self._distinct, score, right=right)) - first
            for right in (False, True)
        )
        return above, reach


class Tally:
    """Counts of items by how many levels of their row they are above, and at or above.

    Args:
        queries: number of rows.
        levels: P.
        device: where.
    """

    def __init__(self, queries: int, levels: int, device: torch.device) -> None:
        self._width = levels + 1
        self._above = torch.zeros(queries * self._width, dtype=torch.int64, device=device)
        self._reach = torch.zeros_like(self._above)

    def add(self, row: torch.Tensor, above: torch.Tensor) -> None:
        """Count items that are above so many levels and reach no other."""
        counts = self._counts(row, above)
        self._above += counts
        self._reach += counts

    def correct(self, row: torch.Tensor, was: torch.Tensor, above: torch.Tensor, reach: torch.Tensor) -> None:
        """Count items, counted as `was` so far, by what they really are above and reach."""
        before = self._counts(row, was)
        self._above += self._counts(row, above) - before
        self._reach += self._counts(row, reach) - before

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many items are above, and at or above, each level, shapes (q, P)."""
        above, reach = (counts.view(-1, self._width).flip(1).cumsum(1).flip(1) for counts in (self._above, self._reach))
        return above[:, 1:], reach[:, 1:]

    def _counts(self, row: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return torch.bincount(row * self._width + levels, minlength=len(self._above))


class Best:
    """The best items of some queries so far, by exact score, then by position.

    Args:
        queries: how many queries q.
        top: how many items of each.
        device: where.
    """

    def __init__(self, queries: int, top: int, device: torch.device) -> None:
        self.top = top
        # Fillers score below every cosine.
        self.score = torch.full((queries, top), -2.0, dtype=torch.float64, device=device)
        self.position = torch.full((queries, top), -1, dtype=torch.int64, device=device)
        self._new: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._waiting = 0
        self._fillers = True

    def floor(self) -> torch.Tensor:
        """The exact score that an item must reach to get in, shape (q,)."""
        if not self.top:
            return torch.full((len(self.score),), torch.inf, dtype=torch.float64, device=self.score.device)
        if self._fillers:  # without a floor everything would be let in
            self.merge()
        return self.score[:, -1]

    def add(self, row: torch.Tensor, position: torch.Tensor, score: torch.Tensor) -> None:
        """Take in items with exact scores; positions are higher than those of earlier calls."""
        self._new.append((row, position, score))
        self._waiting += len(row)
        if self._waiting > self.score.numel():
            self.merge()

    def merge(self) -> None:
        """Sort what came in since the last time into the best."""
        if not self._new or not self.top:
            return
        rows = torch.arange(len(self.score), device=self.score.device).repeat_interleave(self.top)
        row = torch.cat([rows, *(new[0] for new in self._new)])
        position = torch.cat([self.position.view(-1), *(new[1] for new in self._new)])
        score = torch.cat([self.score.view(-1), *(new[2] for new in self._new)])
        # Positions ascend within a row already: earlier items come first, and within a call they are in order.
        order = torch.sort(score, descending=True, stable=True).indices
        order = order[torch.sort(row[order], stable=True).indices]
        size = torch.bincount(row, minlength=len(self.score))
        rank = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size).repeat_interleave(size)
        order = order[rank < self.top]
        self.score, self.position = score[order].view(-1, self.top), position[order].view(-1, self.top)
        self._new, self._waiting = [], 0
        self._fillers = bool((self.position[:, -1] < 0).any())


def take_in(block: Block, levels: Levels, best: Best, *, skipped: int) -> None:
    """Count a block of the gallery against all levels but the lowest `skipped`, and keep its best items."""
    floor = _floor(block, levels, best)
    # Rounding the bound to float32 moves it by less than the slack's reserve.
    bound = torch.minimum(levels.floor(skipped), floor).float()
    for flat in torch.split(places(block.scores >= bound[:, None]), _CHUNK):
        _look(flat, block, levels, best, floor)


def is_crowded(block: Block, levels: Levels, best: Best) -> bool:
    """Return whether so many scores of a block must be computed exactly that all of them may as well be.

    So it is with a collapsed model, whose scores are all equal or nearly so. A sample of the columns tells.
    """
    sample = block.scores[:, ::_EVERY]
    row = torch.arange(len(sample), device=sample.device)[:, None].expand_as(sample).reshape(-1)
    score = sample.reshape(-1).double()
    _, doubtful = levels.place(row, score.clamp(min=-_ROW / 4))
    asked = doubtful | (score >= _floor(block, levels, best)[row])
    # A block of few items holds many of the best by right.
    return bool(torch.count_nonzero(asked) > max(_MANY, 2 * best.top / block.scores.shape[1]) * len(asked))


def take_in_whole(block: Block, levels: Levels, best: Best) -> None:
    """Count a block by its exact scores alone, against all levels, and keep its best items."""
    exact = block.all_exact()
    levels.add_whole(exact)
    position = first_best(exact, min(best.top, exact.shape[1]))
    row = torch.arange(len(exact), device=exact.device)[:, None].expand_as(position).reshape(-1)
    score = exact.gather(1, position).view(-1)
    real = score > -torch.inf
    best.add(row[real], position.view(-1)[real] + block.start, score[real])


def first_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions (q, count) of the best scores, ascending; the first ones where the last place is tied."""
    if count == 0:
        return torch.zeros((len(scores), 0), dtype=torch.int64, device=scores.device)
    value, index = torch.topk(scores, count, dim=1)
    last = value[:, -1:]
    tied = torch.count_nonzero(scores >= last, dim=1) > count  # topk chose among equals as it liked
    if tied.any():
        few, bound = scores[tied], last[tied]
        above, equal = few > bound, few == bound
        room = count - torch.count_nonzero(above, dim=1)[:, None]
        keep = above | (equal & (equal.cumsum(1) <= room))
        index[tied] = keep.nonzero()[:, 1].view(-1, count)
    return index.sort(dim=1).values


def _floor(block: Block, levels: Levels, best: Best) -> torch.Tensor:
    """The approximate score below which an item cannot be among the best, shape (q,)."""
    floor = best.floor() - levels.slack
    if block.start or not best.top:
        return floor
    # Nothing is known yet: whatever is clearly below the block's own best cannot be among them.
    return torch.maximum(floor, _reached(block.scores, best.top).double() - 2 * levels.slack)


def _reached(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a score that at least `count` items of each row reach, or all if there are fewer, shape (q,).

    The highest scores of 16 items at a time are searched instead of all: ten times faster, and hardly lower.
    """
    groups = scores.shape[1] // _GROUP
    if groups >= 3 * count:
        scores = scores[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amax(dim=1)  # type: ignore[no-untyped-call]
    return torch.topk(scores, min(count, scores.shape[1]), dim=1).values[:, -1]


def _look(flat: torch.Tensor, block: Block, levels: Levels, best: Best, floor: torch.Tensor) -> None:
    """Count the items at flat positions of the block, and let those at or above the floor into the best."""
    row = torch.div(flat, block.scores.shape[1], rounding_mode="floor")
    column = flat - row * block.scores.shape[1]
    score = torch.take(block.scores, flat).double()
    above, doubtful = levels.place(row, score)
    levels.tally.add(row, above)
    good = score >= floor[row]
    asked = places(doubtful | good)
    row, column, above, doubtful, good = (values[asked] for values in (row, column, above, doubtful, good))
    exact = block.exact(row, column)
    unsure = places(doubtful)
    levels.tally.correct(row[unsure], above[unsure], *levels.place_exactly(row[unsure], exact[unsure]))
    best.add(row[good], column[good] + block.start, exact[good])


def row_sums(mask: torch.Tensor) -> torch.Tensor:
    """Return the number of true values in each row, shape (q,); on the CPU ten times faster than summing them."""
    queries, width = mask.shape
    if mask.device.type != "cpu" or width % (8 * _WORDS):
        return torch.count_nonzero(mask, dim=1)
    words = mask.numpy().view(np.uint64).reshape(queries, -1, _WORDS)
    sums = np.add.reduce(words, axis=2).view(np.uint8)
    return torch.from_numpy(sums.sum(axis=1, dtype=np.int64))
