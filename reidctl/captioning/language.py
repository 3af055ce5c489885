"""The words of a reply: whether it is a description at all, in English, and what its words are about.

No pattern here nests one unbounded quantifier in another and every free run is bounded, so the time is linear in the
length of a reply whatever a model writes.
"""

import re
import unicodedata
from functools import lru_cache

from reidctl.captioning.neutralise import lexicon, split_words

Finding = tuple[str, str]
"""A code to count by, and a reason to quote to the model."""

_ECHO_WORDS = 7
_FOREIGN_WORDS, _FOREIGN_SHARE = 2, 0.1

_CLOTHES = frozenset({"garment", "footwear", "accessory", "material"})
_PERSON = r"(?:man|woman|male|female|person|boy|girl|guy|lady|gentleman|individual|child|teenager|pedestrian|adult)"
_PERSONS = (
    r"(?:men|women|people|persons|males|females|boys|girls|guys|ladies|gentlemen|individuals|children|kids|teenagers"
    r"|pedestrians|adults|figures)"
)
_COLOURS = r"(?:black|white|grey|gray|red|blue|green|yellow|orange|purple|pink|brown|beige|navy|khaki)"
_IN_COLOUR = re.compile(rf"\bin (?:all |dark |light |bright )?({_COLOURS})(?=[.,;!]|$| and\b| clothes\b)", re.I)
_BLACK_OR_WHITE = re.compile(
    rf"\b(?:black|white|brown|tanned|pale|swarthy)[- ](?:{_PERSON}|{_PERSONS})\b(?!['’]| (?:bag|purse|bun))"
    rf"|\b(?:tanned|swarthy|fair-complexioned|black|white) (?:young|old|older|elderly|adult|middle-aged"
    rf"|teenage) {_PERSON}\b(?!['’])",
    re.I,
)
_IS_BLACK = re.compile(
    rf"\b(?:{_PERSON}|he|she|they) (?:is|are|(?:appears|seems|looks)(?: to be)?) (?:black|white|brown|tanned)\b(?!-)"
    r"(?! and (?:white|black))",
    re.I,
)
_PEOPLES = re.compile(
    r"\b(?:middle[- ]eastern|(?:south|east|southeast)[- ]asian|latin[- ]american|native[- ]american|pacific islander"
    r"|mixed[- ]race|of colou?r)\b",
    re.I,
)
_HAIR_CUT = re.compile(
    r"\b(?:(?:buzz|crew|pixie|bowl)[- ]cuts?|shaved head|(?:red|bald|fair|grey|gray)[- ]headed)\b", re.I
)
_THINGS = re.compile(
    r"\b(?:walking (?:stick|frame|aid)s?|(?:school|football|sports|gym|work|rain|running) (?:kit|gear|wear))\b", re.I
)
_RELATIVE = r"(?:man|woman|boy|girl|child|person|lady|gentleman|mother|father|toddler|baby|friend|companion|partner)"
_ONE_PERSON = re.compile(r"\b(?:a|an) (?:[a-z-]{1,20},? ){0,3}(man|woman|boy|girl)\b(?!['’]| (?:bag|purse|bun))", re.I)
_FEW = r"(?:[a-z-]{1,20},? ){0,3}"
_PEOPLE = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"\b(?:two|three|four|five|six|seven|eight|nine|ten|several|multiple|many|both|various"
        rf"|[2-9]) {_FEW}{_PERSONS}\b(?!['’])",
        rf"\b(?:group|crowd|pair|couple) of {_FEW}{_PERSONS}\b(?!['’])",
        rf"(?<!no )\b(?:another|second|other|third) (?:[a-z-]{{1,20}} )?(?:{_PERSON}|{_PERSONS})\b(?!['’])",
        rf"\b{_RELATIVE} (?:and|with) (?:a|an|another|his|her) {_FEW}{_RELATIVE}\b(?!['’])",
        r"\ba (?:\w{1,15} )?couple (?:in|walking|standing|is|are|seen)\b",
    )
)
_IMAGE = re.compile(
    r"\b(?:image|photo|photograph|picture|footage|shot|frame)(?: quality)? (?:is|appears|seems|looks|was)(?: to be)?"
    r"(?: (?:very|too|quite|rather|somewhat|a bit|slightly|of)){0,2} (?:blurr(?:y|ed)|dark|grainy|pixelated|unclear|low"
    r"|poor|cropped|small|distorted|fuzzy|out of focus|not (?:very )?(?:clear|sharp)|black[- ]and[- ]white|overexposed)"
    r"|\b(?:blurr(?:y|ed)|pixelated|grainy|low[- ](?:quality|resolution)|distorted) (?:image|photo|photograph"
    r"|picture|shot)\b"
    r"|\b(?:low|poor|limited) (?:image )?(?:resolution|quality)\b|\bimage quality\b|\bresolution\b",
    re.I,
)
_QUOTED = re.compile(r"(?<!\w)[\"“'‘«][^\"”\n]{1,80}?[\"”'’»](?!\w)")

_REFUSAL = re.compile(
    r"\bi(?:['’]?m| am) (?:so |very )?(?:sorry|afraid|unable|not able|not allowed|not permitted|not comfortable)\b"
    r"|\bi (?:cannot|can not|can['’]?t|could not|couldn['’]t|won['’]?t|will not|will refrain|must decline|must refuse"
    r"|have to decline|refuse|apologi[sz]e|would rather not|do not|don['’]t)\b"
    r"|\bi['’]d rather not\b|^sorry\b|\bmy apologies\b|\bas an ai\b|\blanguage model\b|\bunfortunately,? i\b"
    r"|\b(?:describing|identifying|inferring|guessing)\b[^.]{0,80}\b(?:not|isn['’]t|against)\b"
    r"|\b(?:inappropriate|not appropriate|not possible for me) to\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|polic(?:y|ies)|programming|rules)\b"
    r"|\bmy (?:guidelines|polic(?:y|ies)|programming)\b|\b(?:isn['’]t|is not|not) something (?:that )?i\b"
    r"|\bunable to (?:assist|help|identify|describe|comply|provide|view|see|process|access)\b"
    r"|\b(?:cannot|can['’]?t|not able to) (?:assist|help|comply|provide|identify (?:people|individuals|anyone|who"
    r"|the person))\b"
    r"|\bno image (?:was|is|has been|provided|attached)\b|\b(?:please|can you|could you) (?:provide|upload|attach"
    r"|share)\b"
    r"|\bto (?:respect|protect) (?:\w+ )?privacy\b|\brespect for privacy\b",
    re.I,
)
_REASONING = re.compile(
    r"</?think(?:ing)?>|\blet me (?:analy[sz]e|think|describe|look|see|reconsider|start|break|re-?check|double-?check)"
    r"|\b(?:i|we) (?:need to|have to|should|must|will|want to|am going to|['’]ll) (?:describe|look|write|analy[sz]e"
    r"|identify|mention|focus|avoid|start|provide)|\bi need to\b|\bthe user\b|\bstep \d\s?[:.]"
    r"|\bwait,|^hmm\b|^(?:analysis|thought|thinking|reasoning|plan)\s?:|\bthe (?:request|task|question) (?:is|asks)\b"
    r"|\bword count\b|\bfinal answer\b|\bthe (?:prompt|instructions?) (?:asks?|says?|wants?)\b|\bfirst, i\b"
    r"|\blet['’]s (?:describe|analy[sz]e|look|see|break|start)\b",
    re.I,
)
_ORDERS = re.compile(
    r"(?:^|[.!?:;] )(?:describe (?:the|only)\b|do not (?:mention|describe)\b|use between \d|write (?:\d|between"
    r"|a new one|one|two)\b"
    r"|answer in english|follow this (?:writing )?style|include the hair(?:style)?\b|you describe\b"
    r"|your previous answer"
    r"|start (?:with|each) (?:the image|a (?:pronoun|noun|participle|request)|item)|hedge: say|join clauses"
    r"|use (?:clipped|many adjectives|lower-case|plain, factual))",
    re.I,
)
_MARKUP = re.compile(
    r"</?[A-Za-z!?][^<>]{0,300}>|<!--|<\|[^<>|]{1,40}\|>|\]\(|[{}`]|<%|%>|^#{1,6}\s|\[/?INST\]|\[\"|\s\|(?:\s|$)|\|\s?:?-{2,}"
    r"|&(?:[a-z]{2,8}|#\d{1,6}|#x[0-9a-f]{1,6});|\\[a-zA-Z]{2}|\$[^$\n]{1,80}\$|\s=\s?[\['\"]",
    re.I,
)
_ADDRESS = re.compile(
    r"https?:/|\bwww\.\w|\b[\w-]{1,60}\.[a-z]{2,10}/\w|[\w.+-]@[\w-]{1,64}\.\w|\.\./|\b[A-Za-z]:\\|(?<![\w/])/[\w.-]{1,60}/[\w.-]"
    r"|[\w-]\.(?:jpe?g|png|gif|webp|bmp|tiff?|txt|json|html?|py|sh|exe)\b",
    re.I,
)
_PLACEHOLDER = re.compile(
    r"\[[A-Za-z][\w /,-]{0,40}\]|<[a-z][\w /-]{0,30}>|\bTBD\b|\bXXX?\b|_{2}|\?\?|(?i:\bn/a\b|\bunspecified\b"
    r"|\blorem ipsum\b"
    r"|\bnot (?:specified|applicable|available)\b|\binsert (?:colou?r|text) here\b"
    r"|\((?:colou?r|age|build|gender|garment|item|type|pattern|material)s?\)"
    r"|\b(?:colou?r|gender|age|build|upper|lower|garment|shirt|trousers)\s?: (?:none|-)(?=[.;,]|$)"
    r"|\bunknown\b(?! (?:brand|logo|make|object|item|text)))"
)


def unquoted(text: str) -> str:
    """Return a text without what stands in quotation marks: the print on a shirt may be in any language."""
    return _QUOTED.sub(" ", text)


def message_findings(text: str, prompt: str) -> list[Finding]:
    """Return what shows that a text is no description but a message: refusal, reasoning, echo, markup, addresses."""
    found: list[Finding] = []
    if _REFUSAL.search(text):
        found.append(("refusal", "the reply is a refusal; describe what is visible, without guessing who it is"))
    if _REASONING.search(text):
        found.append(("reasoning", "it shows reasoning; give the description alone"))
    if _ORDERS.search(text) or _echoes(text, prompt):
        found.append(("echo", "the reply repeats the prompt"))
    if hit := _PLACEHOLDER.search(text):
        found.append(("placeholder", f"it contains the placeholder {hit.group()!r}; leave out what cannot be seen"))
    if _MARKUP.search(text):
        found.append(("markup", "it contains markup"))
    if _ADDRESS.search(text):
        found.append(("address", "it contains an address or a file name"))
    return found


def language_findings(text: str, *, min_letters: float, min_english: float) -> list[Finding]:
    """Return a finding when a text is not in English, or not in English throughout.

    Words in quotation marks do not count. Letters of another script are never English; neither are two or more function
    words of another language that make a tenth of the text.
    """
    plain = unquoted(text)
    words = [word.lower() for word in split_words(plain) if word[0].isalpha()]
    letters = [letter for letter in plain if letter.isalpha()]
    if not words or not letters:
        return []
    known = lexicon()
    common = known.groups["function"] | known.groups["english"]
    english = sum(word in common or known.find(word) is not None for word in words)
    strange = [word for word in re.findall(r"[^\W\d_]+", plain.lower()) if word in known.groups["foreign"]]
    foreign = len(set(strange)) >= _FOREIGN_WORDS and len(strange) >= _FOREIGN_SHARE * len(words)
    ascii_share = sum(letter.isascii() for letter in letters) / len(letters)
    if not all(map(_is_latin, set(letters))) or ascii_share < min_letters or foreign:
        return [("language", "the reply is not in English throughout")]
    if english / len(words) < min_english:
        return [("language", "the reply is not in English")]
    return []


@lru_cache(maxsize=4096)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or letter in "ªºµ" or unicodedata.name(letter, "").startswith("LATIN ")


def _echoes(text: str, prompt: str) -> bool:
    """Whether seven words in a row are the prompt's."""
    asked, said = ([word.lower() for word in split_words(part) if word[0].isalnum()] for part in (prompt, text))
    grams = {tuple(asked[start : start + _ECHO_WORDS]) for start in range(len(asked) - _ECHO_WORDS + 1)}
    return any(tuple(said[start : start + _ECHO_WORDS]) in grams for start in range(len(said) - _ECHO_WORDS + 1))


def clothing_words(text: str) -> list[str]:
    """Return the words of a text that name clothes, belongings, fabrics or the act of wearing.

    A word with an everyday meaning ("top", "tie") counts after an article, a possessive, a preposition of wearing
    or a modifier only, "the top of" and "the camera" never; wearing a smile or a beard, carrying weight or oneself is
    none of it; "a man in black" is.
    """
    words = split_words(text)
    found = [word for index, word in enumerate(words) if _is_clothing(words, index)]
    found += [hit.group() for hit in _THINGS.finditer(text)]
    return found + [hit.group(1) for hit in _IN_COLOUR.finditer(text)]


def _is_clothing(words: list[str], index: int) -> bool:
    known, word = lexicon(), words[index].lower()
    before, after = _around(words, index)
    groups, last = known.groups, word.rsplit("-", 1)[-1]
    if last in groups["dressing"] or last in groups["carrying"]:
        hair_worn = any(known.find(other) == "hair" for other in words[max(0, index - 2) : index])
        return not (hair_worn or _wears_no_clothes(words[index + 1 : index + 6]))
    if word in groups["attire"]:
        return after not in ("eyes", "eyelids")
    if known.find(word) not in _CLOTHES or (before, word) == ("the", "camera") or (word, after) == ("top", "of"):
        return False
    if not groups["ambiguous"] & {word, word.removesuffix("s")}:
        return True
    return before in groups["before_a_thing"] or known.find(before) in ("colour", "pattern", "material", "cut")


def _wears_no_clothes(following: list[str]) -> bool:
    """Whether a smile, a beard or the like is worn, and no garment before it."""
    known = lexicon()
    for word in following:
        if word.lower() in known.groups["not_worn"]:
            return True
        if known.find(word) in _CLOTHES or word in (".", ","):
            return False
    return False


def hair_words(text: str, *, strict: bool) -> list[str]:
    """Return the words about hair; not strict leaves out those that name trimmings too ("fringe", "bob")."""
    words, known = split_words(text), lexicon()
    found = [hit.group() for hit in _HAIR_CUT.finditer(text)]
    for index, word in enumerate(words):
        lower, after = word.lower(), _around(words, index)[1]
        noun = known.find(word) == "hair" and after not in known.groups["hair_things"]
        if noun and not strict and known.groups["hair_ambiguous"] & {lower, lower.removesuffix("s")}:
            continue
        if noun or lower in known.groups["hair_words"] or lower.rsplit("-", 1)[-1] == "haired":
            found.append(word)
    return found


def ethnic_words(text: str) -> list[str]:
    """Return the words about ethnicity, descent or skin of a person.

    Not among them: words about a garment ("an Indian kurta", "Chinese characters"), skin-tight, "bare skin", a race
    number, and "a black man's coat".
    """
    plain = unquoted(text)
    words, known = split_words(plain), lexicon()
    found = [hit.group() for pattern in (_BLACK_OR_WHITE, _IS_BLACK, _PEOPLES) for hit in pattern.finditer(plain)]
    for index, word in enumerate(words):
        kind = "skin" if word.lower().endswith("-complexioned") else known.find(word)
        ethnic = kind == "ethnic" and not _about_a_thing(words[index + 1 : index + 5])
        if ethnic or (kind == "skin" and not _harmless_skin(words, index)):
            found.append(word)
    return found


def _about_a_thing(following: list[str]) -> bool:
    """Whether a garment or a print comes before a person does."""
    known = lexicon()
    for word in following:
        kind = known.find(word)
        if kind == "person" or word in (".", ","):
            return False
        if kind in _CLOTHES or kind == "pattern" or word.lower() in known.groups["cultural"]:
            return True
    return False


def _harmless_skin(words: list[str], index: int) -> bool:
    word, (before, after) = words[index].lower(), _around(words, index)
    if word == "race":
        return before not in ("of", "mixed", "his", "her", "their", "the") or after in ("number", "bib", "car", "track")
    return word == "skin" and (
        before in ("bare", "exposed", "of") or after in ("tight", "visible", "showing", "exposed")
    )


def body_words(text: str) -> list[str]:
    """Return the words about gender, age and build of a person in a clothing text: reported, never refused.

    Sizes that garments have too ("slim jeans", "a long coat") count beside a person only.
    """
    words, known = split_words(text), lexicon()
    groups, found = known.groups, []
    for index, word in enumerate(words):
        lower = re.sub(r"['’]s?$", "", word.lower())
        near = [known.find(other) for other in words[index + 1 : index + 4]]
        qualifies = known.find(word) in ("age", "body_look") and "person" in near[: _until_thing(near)]
        named = lower in groups["gender"] and lower not in groups["pronouns"]
        if named or qualifies or lower in groups["age_nouns"] | groups["build_nouns"]:
            found.append(word)
    return found


def _until_thing(kinds: list[str | None]) -> int:
    return next((place for place, kind in enumerate(kinds) if kind in _CLOTHES), len(kinds))


def other_people(text: str) -> str:
    """Return the words that show that more than one person is described, or an empty string."""
    plain = unquoted(text)
    if hit := next((hit for pattern in _PEOPLE if (hit := pattern.search(plain))), None):
        return hit.group()
    # "a man in a red shirt; on the right, a woman" are two, "a man or a woman" is one.
    one = {hit.group(1).lower(): hit.group() for hit in _ONE_PERSON.finditer(plain)}
    both = {"man", "boy"} & set(one) and {"woman", "girl"} & set(one)
    return ", ".join(one.values()) if both and " or " not in plain else ""


def image_words(text: str) -> str:
    """Return the words that judge the image instead of describing the person, or an empty string."""
    hit = _IMAGE.search(text)
    return hit.group() if hit else ""


def _around(words: list[str], index: int) -> tuple[str, str]:
    before = words[index - 1].lower() if index else ""
    return before, words[index + 1].lower() if index + 1 < len(words) else ""
