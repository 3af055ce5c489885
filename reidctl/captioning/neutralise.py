"""Captions without their content: words about the person become class tokens, so that only the style is left."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*|\d+(?:[.,]\d+)*|[^\sA-Za-z\d]")
_DETAIL = "detail"
_NOUNS = "garment|footwear|accessory|hair|person|body|skin"
_ARTICLES = frozenset({"a", "an", "some"})
# Agreement follows the content ("trousers are", "shirt is"; "he", "she"), not the style.
_AGREEMENT = {
    "he": "they",
    "she": "they",
    "him": "them",
    "his": "their",
    "her": "their",
    "hers": "theirs",
    "himself": "themselves",
    "herself": "themselves",
    "are": "is",
    "were": "was",
    "have": "has",
    "these": "this",
    "those": "that",
    "wear": "wears",
}


@dataclass(frozen=True)
class Lexicon:
    """Words by class.

    Attributes:
        classes: word -> class name, e.g. `shirt` -> `garment`, `navy` -> `colour`.
        nouns: the class names that stand for a thing; the others qualify one.
        groups: named word lists that are not attribute classes, e.g. `hedges`.
    """

    classes: dict[str, str]
    nouns: frozenset[str]
    groups: dict[str, frozenset[str]]

    def find(self, word: str) -> str | None:
        """Return the class of a word in any case and number, or None; a hyphenated word has its last part's class."""
        word = word.lower().replace("’", "'").removesuffix("'s")
        if (found := self._lookup(word)) or "-" not in word:
            return found
        parts = [self._lookup(part) for part in word.split("-")]
        return parts[-1] if any(parts[:-1]) or parts[-1] in self.nouns else None

    def _lookup(self, word: str) -> str | None:
        if word[:1].isdigit():
            return "number"
        # The word itself comes first: `glasses` and `shorts` are not plurals of another entry.
        for ending, stem in (("", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f")):
            if word.endswith(ending) and (found := self.classes.get(word.removesuffix(ending) + stem)):
                return found
        return None


@cache
def lexicon() -> Lexicon:
    """Return the shipped lexicon (lexicon.yaml beside this file)."""
    raw = yaml.safe_load((resources.files("reidctl.captioning") / "lexicon.yaml").read_text(encoding="utf-8"))
    nouns, modifiers = raw.pop("noun"), raw.pop("modifier")
    classes: dict[str, str] = {}
    for name, words in [*nouns.items(), *modifiers.items()]:
        for word in words:
            classes.setdefault(word, name)
    return Lexicon(classes, frozenset(nouns), {name: frozenset(words) for name, words in raw.items()})


def split_words(text: str) -> list[str]:
    """Return words, numbers and single punctuation marks in order."""
    return _WORD.findall(text)


def neutralise(text: str, *, collapse: bool = True) -> str:
    """Return the caption with every attribute word replaced by a class token.

    The offline stand-in for the language model of 002 (section 3.3) that "substitutes entity attributes to
    emphasize expression style rather than content".

    Args:
        text: a caption.
        collapse: also join what the content decides: any run of modifiers is one `detail`, a list of garments is
            one garment, indefinite articles before a token go, verbs and pronouns lose number and gender. Two
            people described in one style then give the same text. False keeps one token per word.
    """
    words = split_words(text)
    tokens = [_token(word, collapse) for word in words]
    if not collapse:
        return _join(tokens)
    neutral = _join(_without_articles(words, tokens))
    return _capitalise_like(text, _collapse(neutral))


def neutralise_all(texts: Iterable[str], *, collapse: bool = True) -> list[str]:
    """Return every caption neutralised; see `neutralise`."""
    return [neutralise(text, collapse=collapse) for text in texts]


def _token(word: str, collapse: bool) -> str:
    found = lexicon().find(word)
    if found is None:
        lower = word.lower()
        if collapse and lower in _AGREEMENT:
            return _cased(_AGREEMENT[lower], word)
        return word
    return _cased(found if found in lexicon().nouns or not collapse else _DETAIL, word)


def _cased(token: str, word: str) -> str:
    return token.capitalize() if word[:1].isupper() else token


def _without_articles(words: list[str], tokens: list[str]) -> list[str]:
    """Tokens without `a`, `an`, `some`, `pair of`, which follow number and sound of what was there."""
    kept: list[str] = []
    skip = 0
    for index, (word, token) in enumerate(zip(words, tokens, strict=True)):
        if skip:
            skip -= 1
            continue
        lower = [following.lower() for following in words[index : index + 3]]
        if lower[:2] in (["pair", "of"], ["pairs", "of"]):
            skip = 1
            continue
        if word.lower() in _ARTICLES:
            continue
        kept.append(token)
    return kept


def _collapse(text: str) -> str:
    joint = r"(?:\s*(?:,|/|&|-|and|or|with)\s*|\s*,\s*and\s+|\s+)"
    text = re.sub(rf"\b{_DETAIL}(?:{joint}{_DETAIL}\b)+", _DETAIL, text, flags=re.I)
    text = re.sub(rf"\b(?:(?:{_NOUNS})\s+)+({_NOUNS})\b", r"\1", text, flags=re.I)
    text = re.sub(rf"\b(?:{_DETAIL}\s+)*({_NOUNS})\b", r"\1", text, flags=re.I)
    # "shirt, trousers and shoes" against "dress and boots": how many things there are is content.
    thing = r"(?:garment|footwear|accessory)"
    listed = r"(?:\s*,\s*and\s+|\s+and\s+|\s*,\s*)"
    return re.sub(rf"\b({thing})(?:{listed}{thing}\b)+", r"\1", text, flags=re.I)


def _join(tokens: list[str]) -> str:
    text = " ".join(tokens)
    return re.sub(r"\s+([,.;:!?)])", r"\1", text)


def _capitalise_like(original: str, text: str) -> str:
    """Sentence starts in capitals exactly where the caption had them; tokens inside a sentence in lower case."""
    text = re.sub(rf"\b({_DETAIL}|{_NOUNS})\b", lambda match: match.group().lower(), text, flags=re.I)
    if original.strip()[:1].isupper():
        return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda match: match.group().upper(), text)
    return text
