"""Random draws that are the same on every machine and with every numpy version.

numpy promises a stable stream for `random_raw` of a bit generator, not for the methods of `Generator`, and `normal`
reaches libm in its tails. Everything here is integer arithmetic on that raw stream.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Draws:
    """A seeded stream of random numbers, addressed by integers such as (seed, purpose, person, image)."""

    def __init__(self, *address: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(address)))

    def unit(self) -> float:
        """A number in [0, 1) with 53 random bits."""
        return (int(self._bits.random_raw()) >> 11) / 9007199254740992.0

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """An integer in [0, count); the bias of the modulo is below 2^-50 for any count used here."""
        return int(self._bits.random_raw()) % count

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in random order (Fisher-Yates)."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def noise(self, height: int, width: int, channels: int) -> npt.NDArray[np.float32]:
        """Bell-shaped noise, shape (height, width, channels), mean 0, standard deviation 1, range about [-3.4, 3.4].

        The sum of four random bytes (Irwin-Hall), because sums of small integers are exact everywhere.
        """
        count = height * width * channels
        raw = np.asarray(self._bits.random_raw((count + 1) // 2), dtype="<u8").view(np.uint8)
        total = raw.reshape(-1, 4).astype(np.int32)[:count]
        summed = total[:, 0] + total[:, 1] + total[:, 2] + total[:, 3]
        # Four uniform bytes: mean 510, variance 4 * (256^2 - 1) / 12 = 21845.
        return ((summed - 510) * np.float32(1 / 147.8)).astype(np.float32).reshape(height, width, channels)


def balanced(options: Sequence[T], index: int, *address: int) -> T:
    """Return the option of the index-th member of a population in which options are near uniform.

    Members come in blocks as long as the option list and every block holds each option once, in its own random order:
    counts over any population differ by at most 1 between options, whatever its size.
    """
    block, position = divmod(index, len(options))
    return Draws(*address, block).shuffled(options)[position]
