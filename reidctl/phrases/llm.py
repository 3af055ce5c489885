"""Phrases that a language model lists: the question, a strict reading of the answer, and the rules where it fails."""

import json
import re
from collections.abc import Callable, Sequence

from reidctl.console import log
from reidctl.phrases.base import Phrase
from reidctl.phrases.reading import Missing, read_phrases
from reidctl.phrases.rules import extract

Ask = Callable[[Sequence[str]], list[str | None]]
"""Answers prompts, in their order; None where there was no answer."""

SYSTEM = "You mark phrases in descriptions of people. You answer with JSON only."
_MOST_LETTERS = 20_000
_FENCE = re.compile(r"\A```\w*\s*(.*?)\s*```\Z", re.DOTALL)


class LlmSource:
    """Asks a model for the phrases of captions; a `PhraseSource`.

    An answer is a JSON array of `{"phrase", "part"}`. What does not occur in the caption is dropped and counted: a
    caption is a stranger's text and may tell the model anything, but only its own words can come back. An answer that
    is something else is asked for once more with the reason. After that, or without any answer, the rules find the
    phrases, with a counted warning.

    Attributes:
        unanswered: captions that the rules answered; not to be stored as the model's.
        dropped: phrases that did not occur in their caption.

    Args:
        ask: the way to the model.
        prompt: the question; see `PhraseConfig.prompt`.
        limit: most phrases of a caption.
    """

    def __init__(self, ask: Ask, prompt: str, limit: int) -> None:
        self.unanswered: set[str] = set()
        self.dropped = 0
        self._ask, self._prompt, self._limit = ask, prompt, limit
        self._missing = Missing("have no usable answer of the model: the rules find their phrases")

    def __call__(self, captions: Sequence[str]) -> list[list[Phrase]]:
        """Return the phrases of each caption."""
        texts = list(dict.fromkeys(captions))
        dropped = self.dropped
        found, refused = self._round({text: self.question(text) for text in texts})
        if refused:
            again = {
                text: f"{self.question(text)}\n\nYour last answer was refused: {why}." for text, why in refused.items()
            }
            found |= self._round(again)[0]
        left = [text for text in texts if text not in found]
        self.unanswered.difference_update(found)
        self.unanswered.update(left)
        self._missing.add(len(left))
        if self.dropped > dropped:
            log.warning("phrases: %d phrase(s) of the model do not occur in their caption", self.dropped - dropped)
        return [list(found[text]) if text in found else extract(text, limit=self._limit) for text in captions]

    def question(self, caption: str) -> str:
        """Return what the model is asked about a caption."""
        # The caption comes last, so that braces in it mean nothing.
        return self._prompt.replace("{limit}", str(self._limit)).replace("{caption}", caption)

    def _round(self, questions: dict[str, str]) -> tuple[dict[str, list[Phrase]], dict[str, str]]:
        """Ask; return the phrases of those that were answered well, and why other answers are refused."""
        found: dict[str, list[Phrase]] = {}
        refused: dict[str, str] = {}
        for text, answer in zip(questions, self._ask(list(questions.values())), strict=True):
            if answer is None:
                continue
            try:
                found[text] = self._read(answer, text)
            except ValueError as error:
                refused[text] = str(error)
        return found, refused

    def _read(self, answer: str, caption: str) -> list[Phrase]:
        values = parse_answer(answer)
        phrases = read_phrases(values, caption, len(values))
        kept = [phrase for phrase in phrases if phrase.end > phrase.start]
        if phrases and not kept:
            raise ValueError("none of the phrases occurs in the description, copy them word for word")
        self.dropped += len(phrases) - len(kept)
        return kept[: self._limit]


def parse_answer(answer: str) -> list[object]:
    """Return the list in a model's answer: a JSON array, alone or in a code fence, or an object with `phrases`.

    Raises:
        ValueError: anything else.
    """
    text = answer.strip()
    if len(text) > _MOST_LETTERS:
        raise ValueError("it is too long")
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise ValueError("it is not a JSON array alone") from None
    if isinstance(value, dict):
        value = value.get("phrases")
    if not isinstance(value, list):
        raise ValueError("it is not a JSON array")
    return value
