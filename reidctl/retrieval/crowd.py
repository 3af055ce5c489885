"""Counting for levels inside the crowd: positives that a weak model, or shuffled labels, put among everybody else.

Looking at items one by one pays only for the few above all levels. Where many are, every score of a block is compared
with such a level at once. The scores are coded as 15-bit integers for that, which NumPy compares four times faster than
floats: a code above (below) that of a level's doubt is above (below) the level; equal codes are looked at again.
"""

import numpy as np
import numpy.typing as npt
import torch

from reidctl.retrieval.counting import Levels, Tally, row_sums
from reidctl.retrieval.products import Block, places

_TOP_CODE = 32_000
_NEVER = _TOP_CODE + 3  # above the code of every score
_REAL = 1.5  # what stands for "no level" is higher
_GROUP = 1024  # columns are filled up to a multiple: 128 words of 8 truth values, whose sums fit the bytes of a word
_TILE = 64  # rows compared at a time: codes and truth values of some should fit the cache
_SAMPLE = 16  # every so many columns of the first block tell how crowded a level is
# Nanoseconds per score, roughly, on one core of the machine this was written on. They choose between two exact ways,
# so a machine with other ratios loses time, never a bit of the result.
_COMPARE, _LOOK = 0.4, 30.0


def crowded_levels(scores: torch.Tensor, levels: Levels) -> int:
    """Return how many of the lowest levels are cheaper compared with every score than with those above them.

    Args:
        scores: of some items, shape (q, g).
        levels: of which only the exact scores are read.
    """
    if scores.device.type != "cpu" or not levels.count:
        return 0
    sample = scores[:, ::_SAMPLE].double().contiguous()
    number = torch.searchsorted((levels.exact - levels.slack).contiguous(), sample, right=True)
    share = torch.bincount(number.view(-1), minlength=levels.count + 1).double() / max(sample.numel(), 1)
    # Share of scores that must be looked at when the lowest 0, 1, ..., P levels are compared.
    seen = np.append(share.flip(0).cumsum(0).flip(0)[1:].numpy(), 0.0)
    cost = _COMPARE * np.arange(levels.count + 1) + (2 * _COMPARE) * (np.arange(levels.count + 1) > 0) + _LOOK * seen
    return int(cost.argmin())


class Crowd:
    """Counts for the lowest levels of some queries.

    Args:
        levels: all levels of the queries.
        lowest: how many of them are compared with every score, at least 1.
    """

    def __init__(self, levels: Levels, lowest: int) -> None:
        self.levels, self.lowest = levels, lowest
        exact = levels.exact[:, :lowest]
        begin, end = (exact - levels.slack).float(), (exact + levels.slack).float()
        # Rows of few positives have fewer levels: the rest lies above every score and must not stretch the codes.
        real = exact < _REAL
        self._base = begin[:, :1] - 2.0**-20
        highest = torch.where(real, end, begin[:, :1]).amax(dim=1, keepdim=True)
        self._scale = _TOP_CODE / (highest - self._base + 2.0**-20)
        self._begin, self._end = (torch.where(real, self._code(b), _NEVER).numpy() for b in (begin, end))
        self._keys = self._key(torch.arange(len(exact))[:, None], torch.from_numpy(self._end))
        self._passed = np.zeros((len(exact), lowest), np.int64)
        self._tally = Tally(len(exact), levels.count, levels.exact.device)

    def count(self, block: Block) -> None:
        """Count a block of the gallery."""
        codes = self._padded(block.scores)
        doubt = np.zeros(codes.shape, bool)
        for start in range(0, len(codes), _TILE):
            self._compare(slice(start, start + _TILE), codes, doubt)
        flat = places(torch.from_numpy(doubt))
        row = torch.div(flat, codes.shape[1], rounding_mode="floor")
        self._correct(block, row, flat - row * codes.shape[1], torch.take(torch.from_numpy(codes), flat))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many items are above, and at or above, each of the lowest levels, shapes (q, lowest)."""
        passed = torch.from_numpy(self._passed)
        above, reach = self._tally.result()
        return passed + above[:, : self.lowest], passed + reach[:, : self.lowest]

    def _compare(self, rows: slice, codes: npt.NDArray[np.int16], doubt: npt.NDArray[np.bool_]) -> None:
        part = codes[rows]
        above, reach = np.empty(part.shape, bool), np.empty(part.shape, bool)
        for level in range(self.lowest):
            np.greater(part, self._end[rows, level : level + 1], out=above)
            np.greater_equal(part, self._begin[rows, level : level + 1], out=reach)
            doubt[rows] |= np.bitwise_xor(reach, above, out=reach)
            self._passed[rows, level] += row_sums(torch.from_numpy(above)).numpy()

    def _correct(self, block: Block, row: torch.Tensor, column: torch.Tensor, code: torch.Tensor) -> None:
        """Replace what the codes said of these items by what is true."""
        was = torch.searchsorted(self._keys.view(-1), self._key(row, code)) - row * self.lowest
        above, doubtful = self.levels.place(row, block.scores[row, column].double())
        reach = above.clone()
        asked = places(doubtful)
        exact = block.exact(row[asked], column[asked])
        above[asked], reach[asked] = self.levels.place_exactly(row[asked], exact)
        self._tally.correct(row, was, above, reach)

    def _code(self, scores: torch.Tensor) -> torch.Tensor:
        # Every step keeps the order of scores, in float32 arithmetic too.
        return ((scores - self._base) * self._scale).add_(1).clamp_(0, _TOP_CODE + 2).to(torch.int16)

    def _padded(self, scores: torch.Tensor) -> npt.NDArray[np.int16]:
        queries, width = scores.shape
        codes = np.zeros((queries, -(-width // _GROUP) * _GROUP), np.int16)  # 0: below every level
        codes[:, :width] = self._code(scores).numpy()
        return codes

    @staticmethod
    def _key(row: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return row * (_NEVER + 1) + code
