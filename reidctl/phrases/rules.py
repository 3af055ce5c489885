"""Part phrases by a lexicon and a pattern: offline, instant, without any model."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import combinations

from reidctl.phrases.base import Phrase
from reidctl.phrases.lexicon import lexicon
from reidctl.phrases.reader import Reader
from reidctl.phrases.tokens import split

Colour = tuple[int, int, str]


def extract(text: str, *, limit: int = 8) -> list[Phrase]:
    """Return the phrases of a caption that name something to see on a person, in order, none twice.

    A phrase is (adverb | adjective | describing noun)* noun without its article. The noun is in the lexicon, or it is
    unknown and follows an adjective of things or, behind a verb of wearing or carrying, an article ("a turquoise
    serape"). People, pronouns, places, directions and verbs are no phrases; a noun that says nothing alone ("hair",
    "clothes", "face") needs an adjective.

    One phrase, not two: "shirt with white stripes" and "jacket with a red collar" (both name one region), and
    "trousers are black" (the noun alone would lose the colour).

    Args:
        text: a caption in English, in any style: sentences, search words, labelled lists.
        limit: at most so many, the first ones.

    Returns:
        Phrases with `text == caption[start:end]`; the part is that of the noun, `whole` for an unknown one unless a
        label ("Upper: ..."), a place ("on his head") or a verb ("carrying") tells more.
    """
    words = lexicon()
    tokens = split(text, words)
    seen: set[str] = set()
    phrases: list[Phrase] = []
    for first, last, part in Reader(tokens, words).read():
        start, end = tokens[first].start, tokens[last].end
        name = " ".join(text[start:end].casefold().split())
        if name not in seen and len(phrases) < limit:
            seen.add(name)
            phrases.append(Phrase(text[start:end], start, end, part))
    return phrases


def part_of(phrase: str) -> str:
    """Return the part that a phrase names, by its nouns; `whole` where the lexicon knows none of them."""
    found = extract(phrase, limit=1)
    if found and found[0].part != "whole":
        return found[0].part
    known = [part for word in re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", phrase.lower()) if (part := lexicon().noun(word))]
    return known[-1] if known else "whole"


def colours(text: str) -> list[Colour]:
    """Return the colours that a text names, as (start, end, word in lower case), in order.

    Several words that make one colour are one entry: "dark blue", "navy blue", "light grey". A shade alone ("dark")
    is no colour, and neither is one inside a longer word ("black-and-white", "red-framed").
    """
    return [(match.start(), match.end(), match[0].lower()) for match in _colour_pattern().finditer(text)]


@cache
def _colour_pattern() -> re.Pattern[str]:
    groups = lexicon().groups
    colour = "|".join(sorted(map(re.escape, groups["colours"]), key=len, reverse=True))
    shade = "|".join(sorted(map(re.escape, groups["shades"]), key=len, reverse=True))
    words = rf"(?<![\w-])(?:(?:{shade})[ -])*(?:{colour})(?:[ -](?:{colour}))*(?:[ -]colou?red)?(?![\w-])"
    return re.compile(words, re.IGNORECASE)


def swap_attributes(caption: str, phrases: Sequence[Phrase]) -> str | None:
    """Return the caption with the colours of two phrases exchanged; None if no two phrases allow it.

    "red shirt and black trousers" becomes "black shirt and red trousers": the same words, bound the wrong way. The
    first two phrases (in their order) count that name different parts and have one colour each, not the same. Articles
    right before a colour ("an orange coat") and capitals follow, so that grammar does not give the swap away.

    Args:
        caption: the text.
        phrases: its phrases; those that do not occur in it are passed over.
    """
    single = [(phrase, found[0]) for phrase in phrases if len(found := _inside(caption, phrase)) == 1]
    for (one, left), (two, right) in combinations(single, 2):
        apart = one.end <= two.start or two.end <= one.start
        if apart and one.part != two.part and _name(left) != _name(right):
            return _exchange(caption, *sorted((left, right)))
    return None


def _inside(caption: str, phrase: Phrase) -> list[Colour]:
    here = colours(caption[phrase.start : phrase.end])
    return [(phrase.start + start, phrase.start + end, word) for start, end, word in here]


def _name(colour: Colour) -> str:
    return colour[2].replace("gray", "grey").replace("-", " ")


def _exchange(caption: str, left: Colour, right: Colour) -> str:
    before, between, after = caption[: left[0]], caption[left[1] : right[0]], caption[right[1] :]
    one, two = caption[left[0] : left[1]], caption[right[0] : right[1]]
    first, second = _in_case_of(one, two), _in_case_of(two, one)
    return _agreeing(before, first) + first + _agreeing(between, second) + second + after


def _in_case_of(model: str, word: str) -> str:
    """The word with a capital where the model has one."""
    if model.isupper() != word.isupper():
        return word.upper() if model.isupper() else word.lower()
    return (word[0].upper() if model[0].isupper() else word[0].lower()) + word[1:]


def _agreeing(before: str, colour: str) -> str:
    """The text before a colour, its article fitted to it."""
    ending = re.search(r"\b(a)n?(\s+)$", before, re.IGNORECASE)
    if ending is None:
        return before
    return f"{before[: ending.start()]}{ending[1]}{'n' if colour[0].lower() in 'aeiou' else ''}{ending[2]}"
