"""Phrases as a file, a program or a model gives them, made into phrases of a caption; and what is missing, counted."""

import re
from collections.abc import Mapping
from typing import Any

from reidctl.console import log
from reidctl.phrases.base import PARTS, Phrase
from reidctl.phrases.rules import part_of

_MOST_ITEMS, _MOST_LETTERS = 256, 200


def read_phrases(values: object, caption: str, limit: int) -> list[Phrase]:
    """Return what a backend lists for a caption as phrases: in order of appearance, none twice.

    Args:
        values: a list of texts, or of `{"text" or "phrase", "start"?, "end"?, "part"?}`. A place is believed if the
            text stands there, else the first one where it does is taken, whatever the case. What occurs nowhere gets
            the place (0, 0) and comes last. A part that is none of `PARTS` is found by the rules.
        caption: the text.
        limit: at most so many.

    Raises:
        ValueError: not such a list.
    """
    if not isinstance(values, list):
        raise ValueError("the phrases are no list")
    phrases = [phrase for value in values[:_MOST_ITEMS] if (phrase := _phrase(value, caption)) is not None]
    phrases.sort(key=lambda phrase: (phrase.end == 0, phrase.start))
    unlike = {phrase.text.casefold(): phrase for phrase in reversed(phrases)}
    return [phrase for phrase in phrases if unlike[phrase.text.casefold()] is phrase][:limit]


def _phrase(value: object, caption: str) -> Phrase | None:
    """One phrase; None for an empty one."""
    facts: Mapping[str, Any] = value if isinstance(value, dict) else {"text": value}
    text = facts.get("text", facts.get("phrase"))
    if not isinstance(text, str):
        raise ValueError("a phrase is no text")
    if not text.strip() or not any(letter.isalnum() for letter in text):
        return None
    start, end = _place(text, caption, facts)
    shown = caption[start:end] if end else _plain(text)
    part = facts.get("part")
    return Phrase(shown, start, end, part if part in PARTS else part_of(shown))


def _place(text: str, caption: str, facts: Mapping[str, Any]) -> tuple[int, int]:
    start, end = facts.get("start"), facts.get("end")
    if type(start) is int and type(end) is int and 0 <= start < end and caption[start:end] == text:
        return start, end
    if len(text) > _MOST_LETTERS:
        return 0, 0
    words = r"\s+".join(map(re.escape, text.split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE)
    return found.span() if found else (0, 0)


def _plain(text: str) -> str:
    """A text that a stranger wrote as one bounded line of printable characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * _MOST_LETTERS])
    return " ".join(shown.split())[:_MOST_LETTERS]


class Missing:
    """Warns about captions that a backend gave nothing for, so that the rules took over: at 1, 2, 4, ... of them.

    Args:
        why: what is said of them, after their number.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self.count = 0
        self._next = 1

    def add(self, count: int) -> None:
        """Count so many more."""
        self.count += count
        if count and self.count >= self._next:
            self._next = 2 * self.count
            log.warning("phrases: %d caption(s) so far %s", self.count, self._why)
