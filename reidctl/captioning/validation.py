"""Checks of a reply: is it a text of the asked kind, in English, of the asked size, about the asked things?"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import Form, sentences
from reidctl.captioning.neutralise import lexicon, split_words

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_FENCE = re.compile(r"^```\w*\s*|\s*```$")
_MARKUP = re.compile(r"</?[A-Za-z!][^>]*>|\]\(|\{\{|```|^#{1,6}\s|&[a-z]+;", re.M)
_REFUSAL = re.compile(
    r"\b(?:i['’]?m sorry|i am sorry|i apologi[sz]e|as an ai"
    r"|i (?:cannot|can['’]?t|can not|am unable|am not able|won['’]?t|must decline)"
    r"|unable to (?:assist|help|identify|describe|comply|provide)|cannot (?:assist|help|identify|comply|provide)"
    r"|can['’]?t (?:assist|help|identify)|not able to (?:assist|help|identify))\b",
    re.I,
)
_BLACK_OR_WHITE_PERSON = re.compile(
    r"\b(?:black|white|brown)[- ](?:man|woman|male|female|person|boy|girl|guy|lady)\b", re.I
)
_CLOTHES = frozenset({"garment", "footwear", "accessory", "material"})
_DETERMINERS = frozenset({"a", "an", "the", "his", "her", "their", "with", "in"})
_ECHO_WORDS = 7
_LOOP_WORDS = 3
_SLOTS = {"identity": ("gender", "age", "build"), "clothing": ("garment", "colour")}


@dataclass(frozen=True)
class Verdict:
    """The outcome of the checks.

    Attributes:
        text: the reply, cleaned.
        reasons: what is wrong, in words; empty when nothing is.
        coverage: share of the expected slots that the text mentions, 0..1.
        clothing_words: clothing words found (they matter in identity texts).
    """

    text: str
    reasons: tuple[str, ...]
    coverage: float
    clothing_words: tuple[str, ...]

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
        form: the style asked for; note forms need no full stop and no verb.
        attributes: what is known of the image; slots about which nothing is known are not expected. None expects all.
    """
    text = clean(reply)
    words = [word for word in split_words(text) if word[0].isalnum()]
    if not words:
        return Verdict(text, ("the reply is empty",), 0.0, ())
    clothes = tuple(clothing_words(text))
    coverage, absent = attribute_coverage(text, kind, attributes)
    reasons = [
        *_language(text, words, config),
        *_size(words, config),
        *_structure(text, words, form),
        *_content(text, kind, config, clothes),
    ]
    if _REFUSAL.search(text[:300]):
        reasons.insert(0, "the reply is a refusal")
    if _echoes(words, prompt):
        reasons.append("the reply repeats the prompt")
    if coverage < config.check.min_coverage:
        reasons.append(f"it does not mention {', '.join(absent)}")
    return Verdict(text, tuple(reasons), coverage, clothes)


def clean(reply: str) -> str:
    """Return the reply as one line of plain text, without control, bidirectional and zero-width characters."""
    text = _CONTROL.sub("", unicodedata.normalize("NFC", reply.encode("utf-8", "replace").decode("utf-8")))
    text = _FENCE.sub("", text.strip())
    text = re.sub(r"\*\*|__|^[ \t]*[-*•]\s+", "", text, flags=re.M)
    text = " ".join(text.split())
    while len(text) > 1 and (text[0], text[-1]) in {('"', '"'), ("'", "'"), ("“", "”"), ("«", "»")}:
        text = text[1:-1].strip()
    return text


def clothing_words(text: str) -> list[str]:
    """Return the words of a text that name clothes, belongings, fabrics or the act of wearing.

    A word with an everyday meaning ("top", "tie") counts after an article, a possessive, a preposition of wearing
    or a modifier only.
    """
    words = split_words(text)
    return [word for index, word in enumerate(words) if _is_clothing(word, words[index - 1] if index else "")]


def attribute_coverage(text: str, kind: str, attributes: Mapping[str, str] | None = None) -> tuple[float, list[str]]:
    """Return the share of expected slots that a text mentions, and the slots that it leaves out.

    Identity: gender, age, build (or stature). Clothing: garment, colour.
    """
    expected = [slot for slot in _SLOTS[kind] if attributes is None or _known(slot, attributes)]
    mentioned = _mentioned(split_words(text))
    absent = [slot for slot in expected if slot not in mentioned]
    return (1.0 - len(absent) / len(expected) if expected else 1.0), absent


def _known(slot: str, attributes: Mapping[str, str]) -> bool:
    keys = {
        "gender": ("gender",),
        "age": ("age",),
        "build": ("build", "stature"),
        "garment": ("upper_type", "lower_type"),
        "colour": ("upper_colour", "lower_colour"),
    }[slot]
    return any(attributes.get(key, "") not in ("", "none", "unknown") for key in keys)


def _mentioned(words: list[str]) -> set[str]:
    found = set()
    known = lexicon()
    for word in words:
        kind, lower = known.find(word), word.lower()
        if lower in known.groups["gender"]:
            found.add("gender")
        if kind == "age" or lower in known.groups["age_nouns"]:
            found.add("age")
        if kind in ("body", "body_look"):
            found.add("build")
        if kind in ("garment", "footwear"):
            found.add("garment")
        if kind in ("colour", "pattern"):
            found.add("colour")
    return found


def _is_clothing(word: str, before: str) -> bool:
    known, lower = lexicon(), word.lower()
    if lower in known.groups["dressing"] or lower in known.groups["carrying"]:
        return True
    kind = known.find(word)
    if kind not in _CLOTHES:
        return False
    if not known.groups["ambiguous"] & {lower, lower.removesuffix("s")}:
        return True
    return before.lower() in _DETERMINERS or known.find(before) in ("colour", "pattern", "material", "cut")


def _language(text: str, words: list[str], config: CaptionConfig) -> list[str]:
    letters = [letter for letter in text if letter.isalpha()]
    ascii_share = sum(letter.isascii() for letter in letters) / max(1, len(letters))
    known = lexicon()
    english = sum(word.lower() in known.groups["function"] or known.find(word) is not None for word in words)
    if ascii_share < config.check.min_letters or english / len(words) < config.check.min_english:
        return ["the reply is not in English"]
    return []


def _size(words: list[str], config: CaptionConfig) -> list[str]:
    if len(words) < config.check.min_words:
        return [f"it has {len(words)} words, fewer than {config.check.min_words}"]
    if len(words) > config.check.max_words:
        return [f"it has {len(words)} words, more than {config.check.max_words}"]
    return []


def _structure(text: str, words: list[str], form: Form | None) -> list[str]:
    found = []
    if _MARKUP.search(text):
        found.append("it contains markup")
    if text.count("(") != text.count(")") or text.count('"') % 2:
        found.append("its brackets or quotation marks do not match")
    lower = [word.lower() for word in words]
    grams = [tuple(lower[start : start + _LOOP_WORDS]) for start in range(len(lower) - _LOOP_WORDS + 1)]
    if grams and max(grams.count(gram) for gram in set(grams)) > 2:
        found.append("it repeats itself")
    notes = form is not None and (form.fragments or form.opening == "label" or form.lower)
    if not notes:
        if text[-1] not in ".!?)\"'":
            found.append("it breaks off: the last sentence has no end")
        if not text[0].isupper() and not text[0].isdigit():
            found.append("it does not begin as a sentence")
        if any(len(sentence) < 3 for sentence in sentences(text)):
            found.append("a sentence is empty")
    return found


def _content(text: str, kind: str, config: CaptionConfig, clothes: tuple[str, ...]) -> list[str]:
    found = []
    if kind == "identity" and len(clothes) > config.check.max_clothing_words:
        found.append(f"the identity text mentions clothing: {', '.join(clothes[:5])}")
    kinds = {lexicon().find(word) for word in split_words(text)}
    if "hair" in kinds and kind != config.hair:
        found.append(f"the {kind} text mentions hair")
    allowed = config.sensitive and kind == "identity"
    if not allowed and (kinds & {"ethnic", "skin"} or _BLACK_OR_WHITE_PERSON.search(text)):
        found.append("it mentions ethnicity or skin")
    return found


def _echoes(words: list[str], prompt: str) -> bool:
    asked = [word.lower() for word in split_words(prompt) if word[0].isalnum()]
    grams = {tuple(asked[start : start + _ECHO_WORDS]) for start in range(len(asked) - _ECHO_WORDS + 1)}
    said = [word.lower() for word in words]
    return any(tuple(said[start : start + _ECHO_WORDS]) in grams for start in range(len(said) - _ECHO_WORDS + 1))
