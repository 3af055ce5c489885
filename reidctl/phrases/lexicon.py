"""The words that the rules know: things on a person by part, what describes them, and what ends a phrase."""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

_ENDINGS = (("", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"))


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Words by class (lexicon.yaml).

    Attributes:
        parts: noun -> part, of things.
        body: noun -> part, of the body.
        details: what belongs to a thing, and the part it is most often seen on.
        labels: label of a listed description -> part.
        groups: every other list by its name.
    """

    parts: dict[str, str]
    body: dict[str, str]
    details: dict[str, str]
    labels: dict[str, str]
    groups: dict[str, frozenset[str]]

    def has(self, group: str, word: str) -> bool:
        """Return whether a word in lower case, or its singular, is in a list."""
        known = self.groups[group]
        return word in known or singular(word, known) is not None

    def noun(self, word: str) -> str | None:
        """Return the part of a thing, a detail or a part of the body; None for any other word."""
        for table in (self.parts, self.details, self.body):
            if (found := singular(word, table)) is not None:
                return table[found]
        last = word.rpartition("-")[2]
        return self.noun(last) if last != word and not self.describes_things(word) else None

    def is_detail(self, word: str) -> bool:
        """Return whether a noun names a detail of a thing and no thing."""
        return singular(word, self.parts) is None and singular(word, self.details) is not None

    def is_body(self, word: str) -> bool:
        """Return whether a noun names a part of the body."""
        return singular(word, self.parts) is None and singular(word, self.body) is not None

    def describes_things(self, word: str) -> bool:
        """Return whether a word is an adjective of things: a colour, a pattern, a material, a cut."""
        if any(word in self.groups[group] for group in ("colours", "shades", "modifiers")):
            return True
        parts = word.split("-")
        if len(parts) == 1 or parts[-1] in ("old", "aged"):
            return False
        return (
            parts[-1].endswith("ed") or parts[-1] in self.groups["describing_ends"] or all(map(self._is_piece, parts))
        )

    def _is_piece(self, word: str) -> bool:
        return word == "and" or self.describes_things(word)


def singular(word: str, known: "dict[str, str] | frozenset[str]") -> str | None:
    """Return the entry that a word is or is the plural of; the word itself comes first (`glasses`, `shorts`)."""
    for ending, stem in _ENDINGS:
        if word.endswith(ending) and (found := word.removesuffix(ending) + stem) in known:
            return found
    return None


@cache
def lexicon() -> Lexicon:
    """Return the shipped lexicon."""
    raw = yaml.safe_load((resources.files("reidctl.phrases") / "lexicon.yaml").read_text(encoding="utf-8"))
    nouns, body, labels = raw.pop("nouns"), raw.pop("body"), raw.pop("labels")
    details = dict.fromkeys(nouns.pop("detail"), "whole") | _by_word(raw.pop("detail_parts"))
    groups = {name: frozenset(words) for name, words in raw.items()}
    return Lexicon(_by_word(nouns), _by_word(body), details, _by_word(labels), groups)


def _by_word(lists: dict[str, list[str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for part, words in lists.items():
        for word in words:
            table.setdefault(word, part)  # the first list that has a word keeps it
    return table
