"""The form of a reply: what is wrapped around a description, its sentences, repetition and small mistakes.

No pattern here nests one unbounded quantifier in another and every free run is bounded, so the time is linear in the
length of a reply whatever a model writes.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
from functools import lru_cache

from reidctl.captioning.form import Form
from reidctl.captioning.language import Finding
from reidctl.captioning.neutralise import lexicon, split_words

# A longer reply is no description of a person; it is refused for its length and gets no repair but the first two.
REPAIR_LIMIT = 8_000
_ACCENTS = 4
_ANSI = re.compile(r"\x1b\[[0-9;?]{0,20}[A-Za-z]")
_FENCE = re.compile(r"^`{3,}\w{0,20}\s*")
_END_TOKEN = re.compile(r"\s*(?:<\|[\w ]{1,30}\|>|</s>|<(?:eos|end_of_utterance|endoftext)>)$", re.I)
_HEADING = re.compile(r"^#{1,6}\s+\S")
_BULLET = re.compile(r"^\s*(?:[-*•·–]|\d{1,2}[.)])\s+(?=\S)")
_EMPHASIS = re.compile(r"\*\*|(?<!_)__(?!_)|(?<![\w*])\*(?=[^*\s][^*\n]{0,80}\*(?![\w*]))|(?<=\w)\*(?![\w*])")
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("`", "`"))
_PREAMBLES = (
    re.compile(
        r"^(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|got it|no problem|understood)"
        r"[!.,:]+\s+(?=\S)",
        re.I,
    ),
    re.compile(
        r"^(?:here(?:['’]s| is| are)|below is|the following is) [^.:\n]{0,60}"
        r"\b(?:description|summary|answer|text|caption|sentence|response|version)\b[^.:\n]{0,100}:\s*(?=\S)",
        re.I,
    ),
    re.compile(
        r"^(?:(?:identity|clothing|image|concise|short|revised|new) )?"
        r"(?:description|answer|output|response|caption|assistant|result)\s?:\s*(?=\S)",
        re.I,
    ),
)
_CLOSING = re.compile(
    r"(?<=[.!?\"”)])\s+(?:please )?(?:let me know|i hope (?:this|that|it)|hope this|feel free|is there anything"
    r"|if you(?:['’]d| would)? (?:need|have|like|want)|would you like|do you (?:need|want)|don['’]t hesitate"
    r"|(?:i['’]m )?happy to help|you['’]re welcome)\b[^.!?]{0,200}[.!?]{0,3}$",
    re.I,
)
_SPACED_STOP = re.compile(r" +(?=[,.;!?](?:\s|$))")

_END = frozenset(".!?)\"'”’»")
_BLOCK, _TIMES, _LONG_GRAM = 8, 3, 8
_AGE = re.compile(r"\b\d0s$")
_PUNCTUATION = re.compile(r"\.{4,}|(?<!\.)\.\.(?!\.)|[,;:]\s?[,;:]|[!?]\s?[,;]|\.\s\.")
_ARTICLE_A = re.compile(r"\ba (?!(?:one|once|eu|uni|use|usu|uti|ura|uk)[a-z-]*\b)(?=[aeiou][a-z])", re.I)
_ARTICLE_AN = re.compile(r"\ban (?!(?:hour|honest|honou?r|heir|x-|s-|f-|l-|m-|n-|r-)[a-z-]*)(?=[b-df-hj-np-tv-z][a-z])")
_AGREEMENT = re.compile(
    r"\b(?:he|she|it|person|man|woman|individual|pedestrian|boy|girl) (?:have|are|wear|appear|seem|carry|hold)\b", re.I
)
_PLURAL_ARTICLE = re.compile(
    r"\ba (?:[a-z-]{1,15} )?(?:jeans|trousers|pants|shorts|shoes|sneakers|boots|glasses|leggings|sandals)"
    r"(?=[.,;]| and\b)",
    re.I,
)


def repair(reply: str) -> tuple[str, tuple[str, ...]]:
    """Return a reply as one line of plain text, and the names of the repairs that it took.

    What is removed is what surrounds a description: invisible characters, code fences, emphasis, list marks, quotation
    marks, a preamble, closing chatter. No word of the description changes.
    """
    text = _ANSI.sub("", reply)
    bad = {letter: kind for letter in set(text) if (kind := _unwanted(letter))}
    text = text.translate({ord(letter): "\n" if kind == "line break" else None for letter, kind in bad.items()})
    # Thin before and after: putting thousands of accents in order takes quadratic time, and some count as two.
    text = _thin(unicodedata.normalize("NFC", _thin(text))).strip()
    names = ["invisible characters"] * ("invisible" in bad.values() or "\x1b" in reply)
    names += ["symbols"] * ("symbol" in bad.values())
    if len(" ".join(text.split())) > REPAIR_LIMIT:
        return " ".join(text.split()), tuple(names)
    while True:
        before = text
        for name, step in _STEPS:
            after = step(text)
            if after != text and name:
                names.append(name)
            text = after
        if text == before:
            return text, tuple(dict.fromkeys(names))


@lru_cache(maxsize=4096)
def _unwanted(letter: str) -> str:
    """Why a character must not stay: controls, bidirectional and zero-width marks, surrogates, pictographs."""
    if letter in "\n\t ":
        return ""
    if letter in "\r\x0b\x0c\x85\u2028\u2029":
        return "line break"
    kind = unicodedata.category(letter)
    if kind in ("Cc", "Cf", "Cs", "Co", "Cn") or "\ufe00" <= letter <= "\ufe0f" or letter == "\u034f":
        return "invisible"
    return "symbol" if (kind == "So" and letter != "°") or "\U0001f3fb" <= letter <= "\U0001f3ff" else ""


def _thin(text: str) -> str:
    """The text with at most four accents on a letter."""
    if text.isascii():
        return text
    kept, run = [], 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run <= _ACCENTS:
            kept.append(letter)
    return "".join(kept)


def _unfence(text: str) -> str:
    text = _FENCE.sub("", text.strip()).strip()
    if text.endswith("```"):
        text = text.rstrip("`").rstrip()
    while hit := _END_TOKEN.search(text, max(0, len(text) - 40)):
        text = text[: hit.start()].strip()
    return text


def _unwrap_json(text: str) -> str:
    """The one string in a JSON object such as {"description": "..."}; anything else stays as it is."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    values = list(value.values()) if isinstance(value, dict) else []
    # JSON can write characters that the first pass has removed.
    return repair(values[0])[0] if len(values) == 1 and isinstance(values[0], str) else text


def _join_lines(text: str) -> str:
    """Lines in one: list items become sentences, or a series when they start in lower case."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _HEADING.match(lines[0]) and len(lines[0].split()) <= 5:
        lines = lines[1:]
    items = [bool(_BULLET.match(line)) for line in lines]
    joined = ""
    for line, item in zip(lines, items, strict=True):
        words = " ".join(_BULLET.sub("", line).split())
        if joined and (item or words[:1].isupper()) and joined[-1] not in '.!?:;,"”':
            joined += "." if words[:1].isupper() else ","
        joined = f"{joined} {words}".strip()
    return joined


def _unquote(text: str) -> str:
    while len(text) > 1 and (text[0], text[-1]) in _QUOTES:
        inner = text[1:-1]
        # 'NIKE' and 'PUMA' begins and ends with quotation marks that are no pair; the apostrophe of "man's" is none.
        if re.search(rf"{text[0]}(?!\w)|(?<!\w){text[-1]}", inner):
            break
        text = inner.strip()
    return text


def _without_preamble(text: str) -> str:
    while True:
        before = text
        for pattern in _PREAMBLES:
            text = pattern.sub("", text, count=1)
        if text == before:
            return text


_STEPS = (
    ("code fence", _unfence),
    ("JSON", _unwrap_json),
    ("emphasis", lambda text: _EMPHASIS.sub("", text)),
    ("line breaks", _join_lines),
    ("quotation marks", _unquote),
    ("preamble", _without_preamble),
    ("closing", lambda text: _CLOSING.sub("", text)),
    ("spacing", lambda text: _SPACED_STOP.sub("", text).strip()),
    ("", lambda text: unicodedata.normalize("NFC", text)),
)


def is_notes(form: Form | None) -> bool:
    """Return whether a style asks for notes, which need no capital, no verb and no full stop."""
    return form is not None and (form.fragments or form.opening == "label" or form.lower)


def finish(text: str, form: Form | None) -> tuple[str, tuple[str, ...]]:
    """Return a complete sentence with its capital and its full stop, and the names of what was added.

    Only a text whose last word can end a sentence is complete: a noun that we know. "... and white" is not.
    """
    names: list[str] = []
    if not text or is_notes(form):
        return text, ()
    first = split_words(text[:40])[:1]
    if text[0].islower() and first and first[0].lower() not in lexicon().groups["cannot_begin"]:
        text = text[0].upper() + text[1:]
        names.append("capital")
    if text[-1] not in _END and text[-1].isalnum() and _ends(text):
        text += "."
        names.append("full stop")
    return text, tuple(names)


def grammar_findings(text: str, form: Form | None) -> list[Finding]:
    """Return what is wrong with the sentences of a text."""
    tokens = split_words(text)
    words = [word.lower() for word in tokens if word[0].isalnum()]
    found: list[Finding] = []
    if _cut_off(text, words, form):
        found.append(("cut-off", "it breaks off: the last sentence has no end"))
    if not is_notes(form) and not (text[0].isupper() or text[0].isdigit() or text[0] in "\"'“‘("):
        found.append(("grammar", "it does not begin as a sentence"))
    if _unbalanced(text):
        found.append(("grammar", "its brackets or quotation marks do not match"))
    if _PUNCTUATION.search(text):
        found.append(("grammar", "its punctuation is broken"))
    if form is not None and not is_notes(form) and not _has_clause(words):
        found.append(("grammar", "it is a list of notes; write whole sentences"))
    if _repeats(text, tokens, words):
        found.append(("repetition", "it repeats itself"))
    return found


def mistakes(text: str) -> tuple[str, ...]:
    """Return the small mistakes that are tolerated: "a old man", "he have", "a jeans". A re-ask would cost more."""
    patterns = (_ARTICLE_A, _ARTICLE_AN, _AGREEMENT, _PLURAL_ARTICLE)
    hits = [hit for pattern in patterns for hit in pattern.finditer(text)]
    return tuple(text[hit.start() : hit.end() + 12].split(".")[0].strip() for hit in hits)


def _ends(text: str) -> bool:
    """Whether the last word can be the last of a description."""
    known = lexicon()
    last = split_words(text)[-1]
    tail = text.rsplit(maxsplit=1)[-1].lower()
    if _AGE.search(tail) or last.lower() in known.groups["closers"]:
        return True
    return known.find(last) in known.nouns


def _cut_off(text: str, words: list[str], form: Form | None) -> bool:
    if text.endswith(("…", "...", ",", ";", ":", "-", "–", "/", "&", "(")):
        return True
    if not words:
        return False
    if words[-1] in lexicon().groups["cannot_end"] and text[-1] not in "\"'”’»)":
        return True
    return not is_notes(form) and text[-1] not in _END


def _unbalanced(text: str) -> bool:
    # 5'10" is a height, not half a quotation.
    plain = re.sub(r"(?<=\d)(?:\"|”|''|′′)", "", text)
    return plain.count("(") != plain.count(")") or plain.count('"') % 2 == 1 or plain.count("“") != plain.count("”")


def _has_clause(words: list[str]) -> bool:
    """Whether there is a verb or a determiner: "Young man, slim build" has neither."""
    groups = lexicon().groups
    return not (groups["determiners"] | groups["verbs"] | groups["dressing"]).isdisjoint(words)


def _repeats(text: str, tokens: list[str], words: list[str]) -> bool:
    twice = lexicon().groups["said_twice"]
    pairs = itertools.pairwise(token.lower() for token in tokens)
    if any(first == second and first.isalpha() and first not in twice for first, second in pairs):
        return True
    sentences = Counter(" ".join(split_words(part)).lower() for part in re.split(r"[.!?]", text))
    if any(count > 1 and len(sentence.split()) > 2 for sentence, count in sentences.items()):
        return True
    grams = Counter(tuple(words[start : start + _LONG_GRAM]) for start in range(len(words) - _LONG_GRAM + 1))
    return any(_has_loop(words, size) for size in range(1, _BLOCK + 1)) or max(grams.values(), default=0) >= _TIMES


def _has_loop(words: list[str], size: int) -> bool:
    """Whether a block of so many words stands three times in a row."""
    run = 0
    for word, before in zip(words[size:], words, strict=False):
        run = run + 1 if word == before else 0
        if run >= size * (_TIMES - 1):
            return True
    return False
