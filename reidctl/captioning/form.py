"""The form of a text, measured on examples and written out as an instruction that a describer can follow."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reidctl.captioning.neutralise import lexicon, split_words

Opening = Literal["image", "pronoun", "imperative", "label", "verb", "noun"]

_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_OPENINGS: tuple[tuple[Opening, str], ...] = (
    ("label", r"^[A-Za-z ]{3,20}:"),
    ("image", r"^(?:the|this|in the|in this|here)?\s*(?:image|picture|photo|photograph|frame|shot|scene|there|we)\b"),
    ("pronoun", r"^(?:he|she|they|it|their|his|her|this is)\b"),
    ("imperative", r"^(?:look|find|search|note|spot|watch|please|locate|seek|picture|imagine|notice|see)\b"),
    ("verb", r"^(?:\w+ing|dressed|clad|seen)\b"),
)


@dataclass(frozen=True)
class Measures:
    """Means over texts: `words`, `sentences` and `commas` per text, the other counts per word or per sentence.

    Attributes:
        articles, hedges, connectives, ornaments, verbs: share of words.
        separators: semicolons, colons and dashes per sentence.
        exclamations: share of sentences.
        lower: share of texts without any capital letter.
    """

    words: float
    sentences: float
    commas: float
    articles: float
    hedges: float
    connectives: float
    ornaments: float
    verbs: float
    separators: float
    exclamations: float
    lower: float


@dataclass(frozen=True)
class Form:
    """The choices of form that a describer is asked to follow.

    Attributes:
        words: length of one text, rounded to 5.
        sentences: sentences of one text.
        opening: how the first sentence starts.
        fragments: notes without articles and verbs.
        hedged: says "appears", "probably".
        connected: clauses joined by "while", "together with".
        ornate: adverbs and evaluating adjectives.
        separators: semicolons, colons or dashes.
        exclaiming, lower: exclamation marks; no capital letters.
    """

    words: int = 20
    sentences: int = 1
    opening: Opening = "noun"
    fragments: bool = False
    hedged: bool = False
    connected: bool = False
    ornate: bool = False
    separators: bool = False
    exclaiming: bool = False
    lower: bool = False

    def instruction(self) -> str:
        """Return the form as sentences for a describer; `parse_instruction` reads them back."""
        plural = "" if self.sentences == 1 else "s"
        size = f"Write {self.sentences} sentence{plural}, about {self.words} words in all."
        lines = [size, _OPENING_TEXT[self.opening]]
        lines += [text for name, text in _CHOICE_TEXT.items() if getattr(self, name)]
        if not (self.ornate or self.hedged or self.fragments):
            lines.append(_PLAIN_TEXT)
        return " ".join(lines)


_OPENING_TEXT: dict[Opening, str] = {
    "image": "Start with the image, as in 'The image shows'.",
    "pronoun": "Start with a pronoun.",
    "imperative": "Start with a request to look for the person.",
    "label": "Start each item with a label and a colon.",
    "verb": "Start with a participle.",
    "noun": "Start with a noun for the person.",
}
_CHOICE_TEXT: dict[str, str] = {
    "fragments": "Use clipped notes without articles and verbs.",
    "hedged": "Hedge: say what appears, seems or is probably so.",
    "connected": "Join clauses with connectives such as 'while' and 'together with'.",
    "ornate": "Use many adjectives and adverbs.",
    "separators": "Separate items by semicolons or dashes.",
    "exclaiming": "End with an exclamation mark.",
    "lower": "Use lower-case letters only.",
}
_PLAIN_TEXT = "Use plain, factual words."


def measure(texts: Sequence[str]) -> Measures:
    """Return the mean measures of texts; all zero for none."""
    rows = [_measure_one(text) for text in texts] or [(0.0,) * 11]
    return Measures(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def form_of(texts: Sequence[str]) -> Form:
    """Return the form that the texts share: measures cut at fixed thresholds, the most frequent opening."""
    found = measure(texts)
    openings = sorted(opening_of(text) for text in texts)
    return Form(
        words=max(5, 5 * round(found.words / 5)),
        sentences=max(1, round(found.sentences)),
        opening=max(openings, key=openings.count) if openings else "noun",
        fragments=found.articles < 0.03 and found.verbs < 0.05,
        hedged=found.hedges > 0.03,
        connected=found.connectives > 0.08,
        ornate=found.ornaments > 0.05,
        separators=found.separators > 0.5,
        exclaiming=found.exclamations > 0.3,
        lower=found.lower > 0.5,
    )


def opening_of(text: str) -> Opening:
    """Return how a text starts."""
    for name, pattern in _OPENINGS:
        if re.match(pattern, text.strip(), re.I):
            return name
    return "noun"


def parse_instruction(instruction: str) -> Form:
    """Return the form written in an instruction; what it does not say takes the default."""
    size = re.search(r"Write (\d+) sentences?, about (\d+) words", instruction)
    openings = [name for name, text in _OPENING_TEXT.items() if text in instruction]
    choices = {name: text in instruction for name, text in _CHOICE_TEXT.items()}
    return Form(
        words=int(size.group(2)) if size else 20,
        sentences=max(1, int(size.group(1))) if size else 1,
        opening=openings[0] if openings else "noun",
        **choices,
    )


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with its end mark."""
    return [part.strip() for part in _SENTENCE.findall(text) if re.search(r"\w", part)]


def _measure_one(text: str) -> tuple[float, ...]:
    words = [word.lower() for word in split_words(text) if word[0].isalnum()]
    parts = sentences(text)
    count, stops = max(1, len(words)), max(1, len(parts))
    groups = lexicon().groups

    def share(name: str) -> float:
        return sum(word in groups[name] for word in words) / count

    return (
        float(len(words)),
        float(len(parts)),
        float(text.count(",")),
        share("articles"),
        share("hedges"),
        share("connectives"),
        share("ornaments"),
        share("verbs"),
        len(re.findall(r"[;:–—]|\s-\s", text)) / stops,
        text.count("!") / stops,
        float(not any(letter.isupper() for letter in text)),
    )
