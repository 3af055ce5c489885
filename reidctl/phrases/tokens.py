"""The words of a caption with their places and what each of them is to the rules."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from reidctl.phrases.lexicon import Lexicon

Kind = Literal["thing", "describes", "people", "adverb", "break", "other", "unknown", "mark"]
# Several words that are one: "zip up hoodie" has an adjective, not a noun and a preposition.
_WORD = re.compile(
    r"(?:zip|button|lace|slip|pull|roll)[ -](?:up|down|on|over)(?= [a-z])"
    r"|(?:chin|shoulder|elbow|waist|hip|thigh|knee|calf|ankle|floor|medium|full|mid)[ -]length\b"
    r"|walking[ -]stick|(?:high|low)[ -]tops?\b"
    r"|[^\W\d_]+(?:['’‐‑-][^\W\d_]+)*|\d[^\W_]*(?:[.,-]\w+)*|\n|[^\w\s]|_",
    re.IGNORECASE,
)
_NEVER_A_HEAD = ("ing", "ly", "ed")


@dataclass(frozen=True, slots=True)
class Token:
    """A word or a mark: `caption[start:end]`; `word` is in lower case, `kind` what it is to the rules."""

    start: int
    end: int
    word: str
    kind: Kind

    @property
    def may_head(self) -> bool:
        """Whether a word that nobody knows can be a noun by its ending."""
        return self.kind == "unknown" and not self.word.endswith(_NEVER_A_HEAD)


def split(text: str, lexicon: Lexicon) -> list[Token]:
    """Return the tokens of a text in order; linear in its length."""
    found = [(match.start(), match.end(), _plain(match[0])) for match in _WORD.finditer(text)]
    words = [word for _, _, word in found] + [""]
    return [
        Token(start, end, word, _kind(word, words[number + 1], lexicon))
        for number, (start, end, word) in enumerate(found)
    ]


def _plain(word: str) -> str:
    return re.sub("[‐‑ ]", "-", word.lower().replace("’", "'")) if word != "\n" else word


# Descriptions repeat themselves; the lexicon is one object, compared by identity.
@lru_cache(maxsize=1 << 16)
def _kind(word: str, following: str, lexicon: Lexicon) -> Kind:
    if not word[0].isalpha():
        return "break" if word[0].isdigit() else "mark"
    before_noun = lexicon.noun(following) is not None
    modifies = word in lexicon.groups["modifying_nouns"] or lexicon.describes_things(word)
    if before_noun and modifies:
        return "describes"
    if "'" in word or word in lexicon.groups["breaks"]:
        return "break"
    if lexicon.noun(word) is not None:
        return "thing"
    if lexicon.describes_things(word):
        return "describes"
    if word in lexicon.groups["people_modifiers"]:
        return "people"
    if lexicon.has("others", word):
        return "other"
    return _stranger(word, following, before_noun, lexicon)


def _stranger(word: str, following: str, before_noun: bool, lexicon: Lexicon) -> Kind:
    """What a word that is in no list is, by its ending and the word behind it."""
    before_adjective = lexicon.describes_things(following)
    if word in lexicon.groups["adverbs"]:
        return "adverb"
    if word.endswith("ly"):
        return "adverb" if before_adjective or following.endswith("ed") else "break"
    if word.endswith("ed"):
        return "describes" if before_noun or before_adjective else "break"
    if word.endswith("ing"):
        return "break"
    return "unknown"
