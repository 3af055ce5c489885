"""Part phrases of texts as tensors."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from reidctl.batch import PhraseSets, Tokens
from reidctl.phrases.base import PARTS, Phrase, PhraseSource

Tokenize = Callable[[Sequence[str]], Tokens]
Offsets = Callable[[str], Sequence[tuple[int, int]]]
_PART: dict[str, int] = {name: number for number, name in enumerate(PARTS)}


class PhraseTable:
    """The phrases of many texts, tokenised once; `sets` picks those of a batch.

    Args:
        texts: the texts that may be asked for.
        source: finds the phrases of texts.
        tokenize: of the backbone.
        sentence: what is encoded for a phrase, such as "a person with a red shirt".
        offsets: characters of each token of a text; None: the places of phrases among tokens are not needed.
    """

    def __init__(
        self,
        texts: Sequence[str],
        source: PhraseSource,
        tokenize: Tokenize,
        sentence: Callable[[str], str],
        offsets: Offsets | None = None,
    ) -> None:
        unique = list(dict.fromkeys(texts))
        found = source(unique)
        # A text in which nothing is named is its own phrase: it must be scored by something.
        self.phrases: dict[str, list[Phrase]] = {
            text: list(phrases) or [Phrase(text, 0, len(text), "whole")]
            for text, phrases in zip(unique, found, strict=True)
        }
        words = sorted({phrase.text.lower() for phrases in self.phrases.values() for phrase in phrases})
        self._number = {word: place for place, word in enumerate(words)}
        self._tokens = tokenize([sentence(word) for word in words]) if words else None
        self._offsets = offsets
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def sets(self, texts: Sequence[str]) -> PhraseSets:
        """Return the phrases of some of the texts; K is the most that one of them has, at least 1."""
        chosen = [self.phrases[text] for text in texts]
        most = max([1, *map(len, chosen)])
        number = np.full((len(texts), most), -1, np.int64)
        part = number.copy()
        span = np.zeros((len(texts), most, 2), np.int64)
        for row, (text, phrases) in enumerate(zip(texts, chosen, strict=True)):
            number[row, : len(phrases)] = [self._number[phrase.text.lower()] for phrase in phrases]
            part[row, : len(phrases)] = [_PART[phrase.part] for phrase in phrases]
            if self._offsets is not None and phrases:
                span[row, : len(phrases)] = self._of_text(text, phrases)
        used, index = np.unique(number, return_inverse=True)
        index = index.reshape(number.shape) - int((number < 0).any())
        tokens = self._picked(used[used >= 0])
        return PhraseSets(tokens, torch.from_numpy(index), torch.from_numpy(part), torch.from_numpy(span))

    def _picked(self, rows: npt.NDArray[np.int64]) -> Tokens:
        """The tokens of some phrases, trimmed to the longest of them."""
        if self._tokens is None or not len(rows):
            return Tokens(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.bool))
        some = self._tokens[torch.from_numpy(rows)]
        length = int(some.mask.sum(dim=1).max())
        return Tokens(some.ids[:, :length], some.mask[:, :length])

    def _of_text(self, text: str, phrases: Sequence[Phrase]) -> list[tuple[int, int]]:
        if text not in self._spans:
            assert self._offsets is not None
            self._spans[text] = [token_span(self._offsets(text), phrase.start, phrase.end) for phrase in phrases]
        return self._spans[text]


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return first and last + 1 of the tokens that share a character with `start`:`end`; (0, 0) if none does.

    Args:
        offsets: (start, end) characters of each token, half-open; special tokens are empty.
        start, end: of the phrase, half-open.
    """
    inside = [place for place, (low, high) in enumerate(offsets) if low < min(high, end) and start < high]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
