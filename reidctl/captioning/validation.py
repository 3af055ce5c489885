"""Checks of a reply: is it a text of the asked kind, in English, of the asked size, about the asked things?

Every finding has a code to count by and a reason short enough to be quoted to the model. What can be repaired without
touching a word of the description is repaired (`grammar.repair`, `grammar.finish`); small mistakes are only counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from reidctl.captioning.backends.facts import facts_of
from reidctl.captioning.config import CaptionConfig, CheckConfig
from reidctl.captioning.form import Form
from reidctl.captioning.grammar import finish, grammar_findings, mistakes, repair
from reidctl.captioning.language import (
    Finding,
    body_words,
    clothing_words,
    ethnic_words,
    hair_words,
    image_words,
    language_findings,
    message_findings,
    other_people,
)
from reidctl.captioning.neutralise import lexicon, neutralise, split_words
from reidctl.captioning.prompts import NEUTRAL_LIMIT, quote

CHECKS_VERSION = 2
"""Rises whenever a verdict can change, so that stored replies are judged again instead of being paid for again."""

CODES = (
    "empty",
    "refusal",
    "reasoning",
    "echo",
    "placeholder",
    "markup",
    "address",
    "language",
    "length",
    "cut-off",
    "grammar",
    "repetition",
    "clothing-in-identity",
    "hair",
    "sensitive",
    "people",
    "image",
    "coverage",
)
_SLOTS = {"identity": ("gender", "age", "build"), "clothing": ("garment", "colour")}
# A clause that says that something cannot be seen mentions it without describing it.
_UNSEEN = re.compile(
    r"\b(?:(?:cannot|can['’]t|could not) be (?:determined|seen|identified|discerned|described|told)|not (?:clearly )?"
    r"(?:visible|discernible|apparent|possible|clear)|impossible|(?:difficult|hard) to (?:tell|determine|say"
    r"|discern)|unclear"
    r"|indeterminate|undetermined)\b",
    re.I,
)
_CLAUSE = re.compile(r"[,;.!?]")
_AGE_NUMBER = re.compile(
    r"\b(?:[1-9]0['’]?s|teens)\b|\b\d{1,2}[- ](?:year|yr)|\b(?:aged?|about|around|roughly|approximately|nearly|almost)"
    r"(?: of)? \d{1,2}(?![\d'’.,]| ?(?:cm|kg|m|ft|feet|lbs|pounds|inches|%))",
    re.I,
)
_HEIGHT = re.compile(r"\b\d['’′]\s?\d{0,2}|\b\d{2,3} ?(?:cm|kg|lbs|pounds)\b|\b[12][.,]\d{1,2} ?m\b")


@dataclass(frozen=True)
class Verdict:
    """The outcome of the checks.

    Attributes:
        text: the reply, cleaned; cut when it is far too long.
        reasons: what is wrong, in words; empty when nothing is.
        coverage: share of the expected slots that the text mentions, 0..1.
        clothing_words: clothing words found (they matter in identity texts).
        codes: one word per reason, from `CODES`, in the order of `reasons`.
        repairs: what was removed around the text or added to its ends; no word of it.
        mistakes: small mistakes of grammar that were let pass.
        body_words: words about gender, age and build in a clothing text; reported only.
    """

    text: str
    reasons: tuple[str, ...]
    coverage: float
    clothing_words: tuple[str, ...]
    codes: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    mistakes: tuple[str, ...] = ()
    body_words: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.reasons


def check_reply(
    reply: str,
    kind: str,
    config: CaptionConfig,
    *,
    prompt: str = "",
    form: Form | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Verdict:
    """Return the reply cleaned, and every reason to refuse it.

    Args:
        reply: what the describer wrote.
        kind: `identity` or `clothing`.
        config: bounds and options.
        prompt: what was asked, to recognise an echo.
        form: the style asked for; note forms need no full stop and no verb, all others need sentences. None: either.
        attributes: what is known of the image; slots about which nothing is known are not expected. None expects all.
    """
    text, repairs = repair(reply)
    words = _words(text)
    limit = max(2000, 20 * config.check.max_words)
    if not words:
        return Verdict(text[:limit].strip(), ("the reply is empty",), 0.0, (), ("empty",), repairs)
    if len(text) > limit:
        reason = f"it has {len(words)} words, more than {config.check.max_words}"
        return Verdict(text[:limit].strip(), (reason,), 0.0, (), ("length",), repairs)
    text, added = finish(text, form)
    clothes = tuple(clothing_words(text))
    coverage, absent = attribute_coverage(text, kind, attributes)
    found = [
        *message_findings(text, prompt),
        *language_findings(text, min_letters=config.check.min_letters, min_english=config.check.min_english),
        *_size(words, config.check),
        *grammar_findings(text, form),
        *_content(text, kind, config, clothes),
    ]
    if coverage < config.check.min_coverage:
        found.append(("coverage", f"it does not mention {', '.join(absent)}"))
    return Verdict(
        text,
        tuple(reason for _, reason in found),
        coverage,
        clothes,
        tuple(code for code, _ in found),
        repairs + added,
        mistakes(text),
        tuple(body_words(text)) if kind == "clothing" else (),
    )


def check_neutral(reply: str, original: str, check: CheckConfig | None = None, *, prompt: str = "") -> Verdict:
    """Return a caption that a model took the content out of, and every reason to refuse it.

    The lexicon goes over the reply afterwards, so that attribute words which the model left are gone for certain.
    `coverage` is the share of the caption's attribute words that the model itself replaced, `clothing_words` those it
    left.

    Args:
        reply: what the model wrote.
        original: the caption it was asked about.
        check: bounds of the language; the length follows from the caption, about half to twice its words.
        prompt: what was asked, to recognise an echo.
    """
    bounds = check or CheckConfig()
    text, repairs = repair(reply)
    # "[garment]" is what was asked for, with brackets.
    text = re.sub(r"\[([A-Za-z][\w /-]{0,40})\]", r"\1", text)
    words, before = _words(text), _words(original)
    if not words:
        return Verdict(text[:2000].strip(), ("the reply is empty",), 0.0, (), ("empty",), repairs)
    # The lexicon's own neutral form is short; a reply that went through it must pass again when it is judged again.
    short = len(_words(neutralise(original))) // 2
    low, high = max(1, min(short, len(before) // 2 - 5)), 2 * len(before) + 5
    if len(text) > 20 * high + 200:
        return Verdict(
            text[: 20 * high], (f"it has {len(words)} words, more than {high}",), 0.0, (), ("length",), repairs
        )
    # The caption stands in the prompt too, and repeating its words is what was asked for.
    found = message_findings(text, prompt.replace(quote(original, NEUTRAL_LIMIT), " "))
    found += language_findings(text, min_letters=bounds.min_letters, min_english=bounds.min_english)
    found += _size(words, bounds.replace(min_words=low, max_words=high))
    attributes = {word.lower() for word in before if lexicon().find(word)} - lexicon().groups["general"]
    left = attributes & {word.lower() for word in words}
    share = 1.0 - len(left) / len(attributes) if attributes else 1.0
    return Verdict(
        neutralise(text),
        tuple(reason for _, reason in found),
        share,
        tuple(sorted(left)),
        tuple(code for code, _ in found),
        repairs,
    )


def clean(reply: str) -> str:
    """Return the reply as one line of plain text, without control, bidirectional and zero-width characters.

    Preamble, closing chatter, quotation marks and markdown emphasis go too (`grammar.repair`). Cleaning twice changes
    nothing.
    """
    return repair(reply)[0]


def attribute_coverage(text: str, kind: str, attributes: Mapping[str, str] | None = None) -> tuple[float, list[str]]:
    """Return the share of expected slots that a text mentions, and the slots that it leaves out.

    Identity: gender, age, build (or stature). Clothing: garment, colour. A clause that says that something cannot be
    seen does not mention it.
    """
    expected = [slot for slot in _SLOTS[kind] if attributes is None or _given(slot, attributes)]
    mentioned = _mentioned(". ".join(part for part in _CLAUSE.split(text) if not _UNSEEN.search(part)), text)
    absent = [slot for slot in expected if slot not in mentioned]
    return (1.0 - len(absent) / len(expected) if expected else 1.0), absent


def agreement(text: str, kind: str, attributes: Mapping[str, str]) -> tuple[int, int]:
    """Return how many known attributes of the image a text gives correctly, and how many it gives wrongly.

    For a report, never a reason to refuse: the attributes may be wrong themselves. What the text leaves out, and what
    is not known, counts on neither side. Identity: gender and age group. Clothing: colour and type of the upper and
    the lower garment. Reads synthped's attributes and those of Market-1501-Attribute (`backends.facts`); neighbouring
    words agree (navy is blue, a sweatshirt is a hoodie, jeans are trousers).
    """
    facts = facts_of(attributes, sensitive=False)
    if kind == "identity":
        pairs = [_same_gender(text, facts.noun), _same_age(text, facts.age)]
    else:
        said = _said_garments(text)
        known = {place: phrase for place, phrase in facts.garments if place in said}
        pairs = [same for place, phrase in known.items() for same in _same_garment(said[place], phrase)]
    return sum(pair is True for pair in pairs), sum(pair is False for pair in pairs)


def _words(text: str) -> list[str]:
    return [word for word in split_words(text) if word[0].isalnum()]


def _given(slot: str, attributes: Mapping[str, str]) -> bool:
    keys = {
        "gender": ("gender",),
        "age": ("age",),
        "build": ("build", "stature"),
        "garment": ("upper_type", "lower_type"),
        "colour": ("upper_colour", "lower_colour"),
    }[slot]
    return any(attributes.get(key, "") not in ("", "none", "unknown") for key in keys)


def _mentioned(text: str, whole: str) -> set[str]:
    """The slots that a text fills; `whole` is the text before its clauses were chosen, for numbers with punctuation."""
    known, found = lexicon(), set[str]()
    for word in split_words(text):
        kind, lower = known.find(word), re.sub(r"['’]s?$", "", word.lower())
        if lower in known.groups["gender"]:
            found.add("gender")
        if kind == "age" or lower in known.groups["age_nouns"]:
            found.add("age")
        if kind in ("body", "body_look") or lower in known.groups["build_words"]:
            found.add("build")
        if kind in ("garment", "footwear"):
            found.add("garment")
        if kind in ("colour", "pattern"):
            found.add("colour")
    found |= {"age"} if _AGE_NUMBER.search(whole) else set()
    return found | ({"build"} if _HEIGHT.search(whole) else set())


def _size(words: list[str], check: CheckConfig) -> list[Finding]:
    if len(words) < check.min_words:
        return [("length", f"it has {len(words)} words, fewer than {check.min_words}")]
    if len(words) > check.max_words:
        return [("length", f"it has {len(words)} words, more than {check.max_words}")]
    return []


def _content(text: str, kind: str, config: CaptionConfig, clothes: tuple[str, ...]) -> list[Finding]:
    found: list[Finding] = []
    if kind == "identity" and len(clothes) > config.check.max_clothing_words:
        found.append(("clothing-in-identity", f"the identity text mentions clothing: {_some(clothes)}"))
    if kind != config.hair and (hair := hair_words(text, strict=kind == "identity")):
        found.append(("hair", f"the {kind} text mentions hair: {_some(hair)}"))
    if not (config.sensitive and kind == "identity") and (ethnic := ethnic_words(text)):
        found.append(("sensitive", f"it mentions ethnicity or skin: {_some(ethnic)}"))
    if people := other_people(text):
        found.append(("people", f"it describes more than one person: {people}"))
    if judged := image_words(text):
        found.append(("image", f"it describes the image, not the person: {judged}"))
    return found


def _some(words: list[str] | tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(word[:30] for word in words[:5]))


# What an attribute may be called. A word may stand in several rows.
_COLOURS = {
    "black": "black blackish",
    "white": "white whitish cream ivory off-white",
    "grey": "grey gray silver charcoal greyish",
    "red": "red reddish crimson scarlet maroon burgundy",
    "orange": "orange rust coral peach",
    "yellow": "yellow mustard gold golden lime",
    "green": "green greenish olive lime mint emerald khaki teal turquoise",
    "blue": "blue bluish navy azure cobalt indigo teal turquoise cyan aqua denim-blue",
    "purple": "purple violet lavender lilac mauve indigo magenta plum burgundy",
    "pink": "pink salmon fuchsia magenta coral peach",
    "brown": "brown brownish tan camel bronze rust khaki beige",
    "beige": "beige cream tan khaki ivory sand taupe ecru",
}
_UPPER = {
    "t-shirt": "t-shirt tshirt tee shirt top",
    "shirt": "shirt blouse polo top",
    "hoodie": "hoodie hoody sweatshirt sweater pullover jumper top",
    "jacket": "jacket blazer windbreaker parka anorak coat windcheater",
    "coat": "coat overcoat raincoat parka jacket peacoat",
    "sweater": "sweater jumper pullover sweatshirt cardigan knitwear top jersey",
    "top": "t-shirt tshirt tee shirt blouse polo top hoodie hoody sweatshirt sweater pullover jumper jacket blazer "
    "windbreaker coat vest tank cardigan jersey camisole singlet tunic",
    "tank": "tank vest singlet camisole top",
    "dress": "dress gown frock",
}
_LOWER = {
    "trousers": "trousers trouser pants pant slacks chinos joggers sweatpants jeans",
    "jeans": "jeans jean trousers pants",
    "shorts": "shorts bermudas bermuda",
    "skirt": "skirt miniskirt",
    "leggings": "leggings legging tights trousers pants",
    "dress": "dress gown frock skirt",
}
_PLACES = {
    word: place
    for place, table in (("Lower", _LOWER), ("Upper", _UPPER))
    for row in table.values()
    for word in row.split()
}
_AGES = {
    "young": "child kid boy girl young teenage teenager teen adolescent youth twenties youthful",
    "teenage": "teenage teenager teen adolescent young youth boy girl youngster youthful",
    "adult": "adult young middle-aged middle twenties thirties forties fifties mature grown younger",
    "elderly": "elderly old older senior sixties seventies eighties pensioner aged",
}
_DECADES = {"10s": "teen", "20s": "twenties", "30s": "thirties", "40s": "forties", "50s": "fifties", "60s": "sixties"}
_DECADES |= {"70s": "seventies", "80s": "eighties"}
_Said = tuple[set[str], set[str]]


def _same_gender(text: str, noun: str) -> bool | None:
    groups, said = lexicon().groups, {re.sub(r"['’]s?$", "", word.lower()) for word in split_words(text)}
    he, she = bool(said & groups["masculine"]), bool(said & groups["feminine"])
    if noun == "person" or he == she:
        return None
    return he == (noun in ("man", "boy"))


def _same_age(text: str, age: str) -> bool | None:
    words = {word.lower() for word in split_words(text)}
    words |= {_DECADES.get(hit.lower(), "") for hit in re.findall(r"\b\d0s\b", text, re.I)}
    said = words & {word for row in _AGES.values() for word in row.split()}
    if age not in _AGES or not said:
        return None
    return bool(said & set(_AGES[age].split()))


def _same_garment(said: _Said, phrase: str) -> list[bool | None]:
    """Whether colour and type in a phrase such as `red striped t-shirt` are what was said; a dress hides trousers."""
    words, (colours, types) = phrase.split(), said
    known = next((word for word in words if word in _COLOURS or word == "gray"), "").replace("gray", "grey")
    noun = "tank" if phrase.endswith("tank top") else words[-1]
    if noun != "dress" and types <= set(_UPPER["dress"].split()):
        return []
    names = set({**_UPPER, **_LOWER}.get(noun, "").split())
    return [
        bool(colours & set(_COLOURS[known].split())) if known and colours else None,
        bool(types & names) if names and types else None,
    ]


def _said_garments(text: str) -> dict[str, _Said]:
    """Colours and types that a text gives to the upper and the lower garment, in front of the noun or after "is"."""
    said: dict[str, _Said] = {}
    waiting: set[str] = set()
    place = ""
    known = lexicon()
    for word in (word.lower() for word in split_words(text)):
        if known.find(word) == "colour":
            colours = {word, *word.split("-")}
            (said[place][0] if place else waiting).update(colours)
        elif found := _PLACES.get(word):
            for target in ("Upper", "Lower") if word in ("dress", "gown", "frock") else (found,):
                said.setdefault(target, (set(), set()))
                said[target][0].update(waiting)
                said[target][1].add(word)
            waiting, place = set(), ""
            subject = found
        elif word in ("is", "are") and said:
            place, waiting = subject, set()
        elif word in (".", ";", "with") or known.find(word) in known.nouns or word in known.groups["closers"]:
            waiting, place = set(), ""
    return said
