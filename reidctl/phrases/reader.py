"""Reads the tokens of a caption once and finds adjectives with their noun."""

from dataclasses import dataclass, field
from typing import NamedTuple

from reidctl.phrases.lexicon import Lexicon, singular
from reidctl.phrases.tokens import Token

_JOINTS = ("and", "or", "&", ",", "/", "+")
_ENDS = (".", ";", "!", "?", "\n")
_OWN = ("a", "an", "his", "her", "their", "some")
_MOST_STRANGERS = 2
_REACH = 8
_MOST_JOINTS = 3


class Found(NamedTuple):
    """A phrase as tokens `first` to `last`, both included, and its part."""

    first: int
    last: int
    part: str


@dataclass
class Reader:
    """Finds (adverb | adjective | describing noun)* noun in tokens.

    "black, grey and white backpack" is one phrase, and so are "shirt with white stripes" (a detail belongs to its
    garment) and "trousers are black" (else the colour would be lost).

    Attributes:
        tokens: of the whole caption.
        lexicon: the words.
        found: the phrases so far, in order.
    """

    tokens: list[Token]
    lexicon: Lexicon
    found: list[Found] = field(default_factory=list)
    _first: int | None = None  # of the phrase that is being read
    _governor: str = ""  # the last verb or preposition that may take a garment
    _label: str | None = None  # the part that a label ("Upper:") announced

    def read(self) -> list[Found]:
        """Return the phrases of the caption."""
        place = 0
        while place < len(self.tokens):
            place = self._step(place)
        return self.found

    def _step(self, at: int) -> int:
        """Read one token; return the place of the next."""
        token = self.tokens[at]
        if (after := self._labelled(at)) is not None:
            return after
        if token.kind in ("describes", "people", "adverb"):
            self._first = at if self._first is None else self._first
            return at + 1
        if token.kind == "thing":
            return self._close(at)
        if token.kind == "unknown":
            return self._stranger(at)
        if token.word in _JOINTS and self._joins(at):
            return at + 1
        self._interrupt(token)
        return at + 1

    def _interrupt(self, token: Token) -> None:
        self._first = None
        groups = self.lexicon.groups
        if token.word in _ENDS:
            self._governor, self._label = "", None
        elif token.word in groups["wearing"] or token.word in groups["dressed"]:
            self._governor = token.word
        elif token.kind == "break" and token.word in ("in", "on", "at", "by", "near") and not self._is_dressed():
            self._governor = ""

    def _is_dressed(self) -> bool:
        return self._governor in self.lexicon.groups["dressed"]

    def _word(self, at: int) -> str:
        return self.tokens[at].word if 0 <= at < len(self.tokens) else ""

    def _kind(self, at: int) -> str:
        return self.tokens[at].kind if 0 <= at < len(self.tokens) else "mark"

    def _labelled(self, at: int) -> int | None:
        """The place behind a label, and behind its value where that has no noun ("Shoes: white")."""
        for size in (2, 1):
            if self._word(at + size) != ":" or self._kind(at - 1) != "mark":
                continue
            part = self.lexicon.labels.get(" ".join(token.word for token in self.tokens[at : at + size]))
            if part is None:
                continue
            self._first, self._label, self._governor = None, part, ""
            last = self._adjectives(at + size + 1)
            if last is not None and self._ends_here(last + 1):
                self.found.append(Found(at, last, part))
                return last + 1
            return at + size + 1
        return None

    def _ends_here(self, at: int) -> bool:
        """Whether no noun follows that the adjectives before could belong to."""
        place = at
        while self._word(place) in _JOINTS:
            place += 1
        goes_on = place > at and self._kind(place) in ("describes", "adverb")
        return self._kind(at) in ("mark", "break") and not goes_on

    def _joins(self, at: int) -> bool:
        """Whether a comma or an "and" stands inside a list of adjectives of one noun, which follows."""
        if self._first is None or self._is_predicate():
            return False
        place = at + 1
        while self._word(place) in _JOINTS and place - at < _MOST_JOINTS:  # ", and"
            place += 1
        inside = self._kind(at - 1) == "describes" or self._word(at - 1) in _JOINTS
        return inside and self._kind(place) == "describes"

    def _is_predicate(self) -> bool:
        """Whether the adjectives are said of a noun before them ("is tall, ..."); "there are black and ..." is not."""
        assert self._first is not None
        before = self._word(self._first - 1)
        return before in self.lexicon.groups["copulas"] and self._word(self._first - 2) != "there"

    def _adjectives(self, at: int) -> int | None:
        """The last of the adjectives of things from here on, "black, white and grey" in one; None without any."""
        last, place = None, at
        while True:
            while self._kind(place) in ("adverb", "people"):
                place += 1
            if self._kind(place) != "describes":
                return last
            end = place
            while self._kind(end + 1) == "describes":
                end += 1
            if self._kind(end + 1) in ("thing", "unknown", "people"):
                return last  # these belong to another noun
            last, place = end, end + 1
            while self._word(place) in _JOINTS:
                place += 1
            if place == end + 1:
                return last

    def _stranger(self, at: int) -> int:
        """A word that nobody knows: a describing noun ("bomber jacket"), a noun ("turquoise serape"), or nothing."""
        if self._describes_next(at):
            self._first = at if self._first is None else self._first
        elif self.tokens[at].may_head and self._is_thing(at):
            self._first = at if self._first is None else self._first
            self._emit(at, self._guess(at))
        else:
            self._first = None
        return at + 1

    def _describes_next(self, at: int) -> bool:
        place = at + 1
        while self._kind(place) in ("unknown", "describes") and place - at < _MOST_STRANGERS:
            place += 1
        is_followed = self._kind(place) == "thing" or self._is_strange_noun(at + 1)
        introduced = self._first is not None or self._word(at - 1) in (
            *self.lexicon.groups["determiners"],
            *self.lexicon.groups["wearing"],
            *("in", "and", ",", ":"),
        )
        return introduced and is_followed

    def _is_strange_noun(self, at: int) -> bool:
        """Whether an unknown word behind an unknown word can be its noun; an "s" is more often that of a verb."""
        return self._kind(at) == "unknown" and self.tokens[at].may_head and not self._word(at).endswith("s")

    def _is_thing(self, at: int) -> bool:
        """Whether an adjective, or an article behind a verb of wearing, makes a thing of an unknown word."""
        if self._label is not None and self._first is not None:
            return True
        first = at if self._first is None else self._first
        if any(self._has_look(place) for place in range(first, at)):
            return True
        has_article = self._word(first - 1) in self.lexicon.groups["determiners"]
        return has_article and bool(self._governor)

    def _has_look(self, at: int) -> bool:
        """Whether an adjective tells a colour, a pattern or a material rather than a size."""
        word = self._word(at)
        return self._kind(at) == "describes" and word not in ("short", "long", "big", "small", "large", "little", "old")

    def _guess(self, at: int) -> str:
        """The part of an unknown thing: by its label, by where it is ("on his head"), by who has it."""
        if self._label is not None:
            return self._label
        where = [token.word for token in self.tokens[at + 1 : at + 5]]
        if where[:1] in (["on"], ["over"], ["in"], ["around"]):
            for words, part in ((("head", "hair"), "head"), (("foot", "feet"), "feet"), (("neck",), "upper")):
                if any(word in words for word in where):
                    return part
            if any(word.startswith(("hand", "shoulder", "back", "arm")) for word in where):
                return "carried"
        return "carried" if self._governor in self.lexicon.groups["carrying"] else "whole"

    def _close(self, at: int) -> int:
        """End the phrase with its noun at `at`; return the place behind it and what is said of it."""
        word = self._word(at)
        part = self.lexicon.noun(word) or "whole"
        last = self._said_of(at)
        self._first = at if self._first is None else self._first
        self._first += self._of_people(at)
        is_told = self._first < at or last > at
        if self.lexicon.is_detail(word):
            self._detail(at, part)
        elif is_told or self._stands_alone(at):
            self._emit(last, part)
        self._first = None
        return last + 1

    def _of_people(self, at: int) -> int:
        """How many words in front are about the person: "tall" of "tall slim black coat", not of "tall boots"."""
        assert self._first is not None
        kinds = [self._kind(place) for place in range(self._first, at)]
        leading = next((number for number, kind in enumerate(kinds) if kind not in ("people", "adverb")), 0)
        return leading if "people" in kinds[:leading] else 0

    def _said_of(self, at: int) -> int:
        """The last word of what is said of a noun: "trousers are black", "a coat in dark blue"; `at` without any."""
        first = at if self._first is None else self._first
        if any(self._is_colour(place) for place in range(first, at)):
            return at
        verb = at + 1 + (self._word(at + 1) in ("that", "which"))
        is_said = self._word(verb) in self.lexicon.groups["copulas"]
        last = self._adjectives(verb + 1) if is_said or self._word(at + 1) == "in" else None
        if last is None or (not is_said and not self._is_colour(last)):
            return at
        return last

    def _is_colour(self, at: int) -> bool:
        return self._word(at) in self.lexicon.groups["colours"]

    def _stands_alone(self, at: int) -> bool:
        """Whether a noun without an adjective tells enough: "a backpack", not "his head", "on top", "her hair"."""
        word = self._word(at)
        if self.lexicon.is_body(word) or singular(word, self.lexicon.groups["bare"]) is not None:
            return False
        if self._label is not None and self._word(at + 1) == ":":
            return False
        if singular(word, self.lexicon.groups["ambiguous"]) is None:
            return True
        return self._word(at - 1) in _OWN or self._word(at - 1) in self.lexicon.groups["wearing"]

    def _detail(self, at: int, part: str) -> None:
        """Stripes, a collar: part of the garment before them ("shirt with stripes"), alone a phrase with a look."""
        assert self._first is not None
        before = self._first - 1
        while self._word(before) in self.lexicon.groups["determiners"]:
            before -= 1
        owner = self.found[-1] if self.found else None
        if owner is not None and owner.last == before - 1 and self._ties(before, owner):
            self.found[-1] = owner._replace(last=at)
        elif any(self._has_look(place) for place in range(self._first, at)):
            self._emit(at, self._owner(at) if part == "whole" else part)

    def _owner(self, at: int) -> str:
        """The part that a detail alone is on: that of the next thing in its clause ("a white logo on his shirt")."""
        for place in range(at + 1, at + _REACH):
            if self._word(place) in (*_ENDS, *_JOINTS):
                break
            if self._kind(place) == "thing" and (part := self.lexicon.noun(self._word(place))):
                return part
        return "whole"

    def _ties(self, at: int, owner: Found) -> bool:
        """Whether the word between a garment and a detail ties them: "with", or "and" behind another detail."""
        return self._word(at) == "with" or (self._word(at) == "and" and self.lexicon.is_detail(self._word(owner.last)))

    def _emit(self, last: int, part: str) -> None:
        assert self._first is not None
        if not self._is_denied(self._first):
            self.found.append(Found(self._first, last, part))
        self._first = None

    def _is_denied(self, first: int) -> bool:
        """Whether the words before a phrase say that it is not there: "no hat", "without a bag", "not wearing one"."""
        before = first - 1
        while self._word(before) in self.lexicon.groups["determiners"]:
            before -= 1
        verb = self._word(before)
        if verb in self.lexicon.groups["wearing"]:
            return self._word(before - 1) in ("not", "never") or self._word(before - 1).endswith("n't")
        return verb in ("no", "without")
