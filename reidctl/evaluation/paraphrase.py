"""The same description in other words: rule-based styles that keep the meaning, without a model and without chance.

A rule that cannot tell which sense a word has leaves it alone: `light` (colour or weight), `top` (garment or place),
`tie`, `watch`, `orange`, `thin` (body or cloth) stay as they are, and so does a capitalised word inside a sentence,
which may be a name. What rules cannot promise is idiom: a rewritten sentence says the same, but not always as a person
would. English only.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reidctl.errors import DataError, UsageError
from reidctl.synthped import captions, cast
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws
from reidctl.synthped.render import Rendered, render_shot

_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:['’-]\w+)*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTION_WORDS = _words(
    """a an the this that these those some of in on at with and or but as to from for by is are was were be been
    being am has have had having he she it they him her his hers its their theirs them himself herself themselves who
    whom whose which there here i me my we us our you your it's he's she's do does did can could may might would will
    while when then also just so very quite rather"""
)
# First words that lose their capital when they no longer begin a sentence; any other may be a name.
_COMMON = _FUNCTION_WORDS - {"i"} | _words(
    """man woman person male female boy girl lady gentleman guy someone pedestrian individual young old elderly tall
    short slim teenage middle-aged wearing carrying holding dressed walking standing seen subject no"""
)
# What may begin a clause that can stand elsewhere: not `who`, `is`, `and a bag`, which lean on what stands before them,
# nor `with a logo`, which may belong to a garment.
_CLAUSE = re.compile(
    r",\s+(?:(?:and\s+)?(?=(?:wearing|carrying|holding|walking|standing|dressed|seen|viewed)\s"
    r"|with\s[^,;]*\b(?:hair|beard|moustache|ponytail)\b)"
    r"|and\s+(?=(?:he|she|they|his hair|her hair|his shoes|her shoes)\s))",
    re.I,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")
# What points back: after it has moved to the front there is nothing for it to point at.
_BACK = re.compile(
    r"\b(?:it|its|it['’]s|itself|they|them|their|theirs|one|ones|this|these|those|both|other|others|another|same|such"
    r"|also|too|then|former|latter)\b"
    r"|(?:^|\b(?:under|over|above|below|behind|beneath|beside|near|with|on|in|to|from|of|at|by|after|and)\s+)that\b"
    r"|\bthat(?=\s*(?:[.,;:!?]|$))",
    re.I,
)
_PEOPLE = re.compile(
    r"\b(?:man|woman|men|women|person|people|boys?|girls?|lady|ladies|guys?|gentlem[ae]n|child|children|kids?|individuals?"
    r"|male|female|someone|pedestrians?|friends?|couple|baby|toddler|teenagers?|subject)\b",
    re.I,
)
# `, and a boy wearing a cap`: what follows belongs to something else than what began the sentence.
_ANOTHER = re.compile(r",\s+and\s+(?:an?|the|another|one|two|three|some|other|others)\b", re.I)
# A clause after which the sentence goes on is no clause at its end: `, wearing a coat, walks past`.
_GOES_ON = re.compile(
    r"(?<!who )(?<!which )(?<!that )\b(?:is|are|was|were|has|had|have|walks?|walked|stands?|stood|wears?|wore|carries"
    r"|carried|holds?|held|looks|looked|sits?|sat|rides|rode|runs|ran|faces|faced|moves|moved|passes|passed|talks|talked"
    r"|goes|went|comes|came|turns|turned|steps|stepped|leans|leaned|waits|waited|crosses|crossed|heads|uses|used|can"
    r"|could|will|would|seems|seemed|appears|appeared|strolls|strolled|enters|leaves|pushes|pulls|does|did)\b"
    r"|,\s+(?:\w+ly\s+)?\w+s\s+(?:past|by|through|along|down|up|to|towards?|away|across|into|off|an?|the|his|her)\b",
    re.I,
)
_OF_ITS_OWN = re.compile(r"(?:he|she|they|his|her)\s", re.I)


# Kept by `keywords` beside content: places and relations, alternatives, doubt, and whom somebody is with.
_MEANING = _words(
    "with from to of in on at by for as or but may might could would them me us you rather do does did can"
)
_DROPPED = _FUNCTION_WORDS - _MEANING
_OF_GENDER = {
    "he": (_words("he he's him his himself"), _words("man boy guy gentleman male men boys"), ("man", "boy")),
    "she": (
        _words("she she's her hers herself"),
        _words("woman girl lady female women girls ladies"),
        ("woman", "girl"),
    ),
}
_SEVERAL = _words("men women boys girls ladies")
_YOUNG = _words("child kid baby toddler teenager")


def _keywords(text: str) -> str:
    """Articles, auxiliaries, `and` and punctuation left out, lower case; pronouns give way to whom they mean.

    What would change the meaning stays: negations, prepositions, `or`, and the gender that only a pronoun tells.
    """
    hits = list(_WORD.finditer(text))
    words = [hit[0].lower().replace("’", "'") for hit in hits]
    # A word directly after another one, without punctuation between them; "" else.
    spaced = [not text[one.end() : two.start()].strip() for one, two in pairwise(hits)]
    after = [word if close else "" for word, close in zip(words[1:], spaced, strict=True)] + [""]
    kept = [_keyword(words, place, after[place]) for place in range(len(words))]
    return " ".join(word for word in kept if word)


def _keyword(words: Sequence[str], place: int, after: str) -> str:
    """What a word becomes among keywords; "" if it is left out."""
    word = words[place]
    for gender, (pronouns, _, _) in _OF_GENDER.items():
        if word in pronouns:
            return _whom(words, place, gender, after)
    if word in ("it", "it's"):  # `it has` begins a sentence; in `holding it` something is held
        return "" if word == "it's" or after in _words("is was has had") else word
    return "" if word in _DROPPED else word


def _whom(words: Sequence[str], place: int, gender: str, after: str) -> str:
    """The noun that a pronoun stands for; a possessive is left out where another word tells the gender of all."""
    word, (_, nouns, (adult, young)) = words[place], _OF_GENDER[gender]
    owns = word in ("his", "hers", "himself", "herself") or (
        word == "her" and after != "" and after not in _FUNCTION_WORDS and after not in _PLACES
    )
    if not owns:  # the first who was named is whom the text describes
        named = [other for other in words[:place] if other in nouns - _SEVERAL]
        return [*named, young if _YOUNG & set(words) else adult][0]
    (other,) = (pair for name, pair in _OF_GENDER.items() if name != gender)
    told = any(other_word in nouns or other_word == gender for other_word in words)
    alone = not any(other_word in other[0] | other[1] for other_word in words)
    return "" if told and alone else word


_PLACES = _words("behind beside near over under above below before after along while next without around against")


def _request(text: str) -> str:
    return f"Find the person who fits this description: {_lowered(text)}"


def _reordered(text: str) -> str:
    """Sentences in reverse order; of a single sentence its parts between semicolons, else its clauses.

    A text whose later sentences point back (`it`, `one`, `this`), or whose clauses may belong to several people or
    lie inside the sentence, stays as it is.
    """
    sentences = _SENTENCE.split(text.strip())
    if len(sentences) > 1:
        if any(_BACK.search(sentence) for sentence in sentences[1:]):
            return text
        return " ".join(_capital(sentence) for sentence in reversed(sentences))
    body = text.strip().rstrip(".!?")
    mark = text.strip()[len(body) :]
    joint = "; "
    parts = [part.strip() for part in body.split(";") if part.strip()]
    if len(parts) < 2:
        joint, parts = ", ", _clauses(body)
    if len(parts) < 2 or any(_BACK.search(part) for part in parts[1:]):
        return text
    turned = [_lowered(part) for part in reversed(parts)]
    return (_capital(joint.join(turned)) if text[:1].isupper() else joint.join(turned)) + mark


def _clauses(body: str) -> list[str]:
    """The clauses of a sentence that can change places; the whole sentence where that might change what it says."""
    parts = [part.strip() for part in _CLAUSE.split(body)]
    people = len(_PEOPLE.findall(body))
    inside = any(_GOES_ON.search(f", {part}") for part in parts[1:] if not _OF_ITS_OWN.match(part))
    return [body] if people > 1 or inside or _ANOTHER.search(body) else parts


def _plain_case(text: str) -> str:
    """Lower case, no punctuation but hyphens and apostrophes inside words."""
    return " ".join(_WORD.findall(text)).lower()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lowered(text: str) -> str:
    first = _WORD.match(text)
    # "Person: slim man" begins with a label, which keeps its capital.
    plain = first is not None and first[0].lower() in _COMMON and text[first.end() : first.end() + 1] != ":"
    return text[:1].lower() + text[1:] if plain else text


@dataclass(frozen=True)
class _Swap:
    """A replacement and the neighbours that would give the word another sense, or repeat a word.

    `only` names the words of which one must follow.
    """

    new: str
    not_after: frozenset[str] = frozenset()
    not_before: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()


_SHADES = _words("dark deep light bright pale")
_CLAUSE_WORDS = _words("is has with in who wearing walking standing carrying wears and")
_PLAIN = _words(
    """man=guy men=guys woman=lady women=ladies lady=woman ladies=women gentleman=man gentlemen=men guy=man
    guys=men child=kid kid=child children=kids kids=children person=individual teenage=adolescent elderly=old
    slender=slim overweight=heavyset stocky=thickset t-shirts=tees tees=t-shirts sweaters=pullovers pullovers=sweaters
    hoodie=hooded_sweatshirt
    hooded_sweatshirt=hoodie trousers=pants pants=trousers slacks=trousers sneakers=trainers trainers=sneakers
    backpack=rucksack backpacks=rucksacks rucksack=backpack rucksacks=backpacks purse=handbag
    mobile_phone=cell_phone cell_phone=mobile_phone cellphone=mobile_phone spectacles=glasses
    sunglasses=dark_glasses moustache=mustache mustache=moustache haircut=hairstyle raincoat=waterproof_coat
    tank_top=sleeveless_top denim_jeans=jeans grey=gray gray=grey purple=violet violet=purple navy_blue=dark_blue
    checkered=checked plaid=tartan wears=is_wearing walks=is_walking carries=is_carrying"""
)
_DRESSES = _words("dress dresses vest vests skirt skirts")
_GUARDED = {
    "jumper": _Swap("sweater", not_before=_DRESSES),
    "sweater": _Swap("pullover", not_before=_DRESSES),
    "pullover": _Swap("sweater", not_before=_DRESSES),
    "t-shirt": _Swap("tee", not_before=_DRESSES),
    "tee": _Swap("t-shirt", not_before=_DRESSES),
    "individual": _Swap("person", only=_CLAUSE_WORDS),
    "slim": _Swap("slender", not_before=_words("fit fitting cut jeans trousers pants leggings")),
    "jeans": _Swap("denim trousers", not_after=_words("denim"), not_before=_words("jacket shirt shorts skirt")),
    "overcoat": _Swap("long coat", not_after=_words("long short")),
    "blazer": _Swap("suit jacket", not_after=_words("suit")),
    "phone": _Swap(
        "mobile phone",
        not_after=_words("mobile cell smart head pay"),
        not_before=_words("booth box case call calls number"),
    ),
    "glasses": _Swap("spectacles", not_after=_words("sun dark drinking wine safety"), not_before=_words("of case")),
    "blonde": _Swap("fair", only=_words("hair beard ponytail bob haircut")),
    "blond": _Swap("fair", only=_words("hair beard ponytail bob haircut")),
    "checked": _Swap(
        "checkered", only=_words("shirt blouse dress skirt coat jacket scarf trousers pants sweater tee t-shirt hoodie")
    ),
    "navy": _Swap("navy blue", not_after=_SHADES, not_before=_words("blue")),
    "maroon": _Swap("dark red", not_after=_SHADES, not_before=_words("red")),
    "burgundy": _Swap("dark red", not_after=_SHADES, not_before=_words("red")),
    "crimson": _Swap("deep red", not_after=_SHADES, not_before=_words("red")),
    "scarlet": _Swap("bright red", not_after=_SHADES, not_before=_words("red")),
    "teal": _Swap("blue-green", not_before=_words("blue green")),
}
_THESAURUS: dict[str, _Swap] = {
    **{old.replace("_", " "): _Swap(new.replace("_", " ")) for old, new in (pair.split("=") for pair in _PLAIN)},
    **_GUARDED,
}
# Longest first: `navy blue` is found before `navy`; parts of hyphenated words never.
_ENTRY = re.compile(
    r"(?<![\w’'-])(?:" + "|".join(map(re.escape, sorted(_THESAURUS, key=lambda key: (-len(key), key)))) + r")(?![\w-])",
    re.I,
)
_ARTICLE = re.compile(r"(?<![\w-])(an?)(\s+)$", re.I)


def _synonyms(text: str) -> str:
    """Words for people, clothes and colours replaced by others of the same sense, once, from left to right."""
    made, end = "", 0
    for hit in _ENTRY.finditer(text):
        made += text[end : hit.start()]
        end = hit.end()
        swap = _THESAURUS[hit[0].lower()]
        new = _cased(swap.new, hit[0], made) if _fits(swap, text, hit) else hit[0]
        if new != hit[0]:
            made = _ARTICLE.sub(lambda article, word=new: _article(article, word), made)  # type: ignore[misc]
        made += new
    return made + text[end:]


def _fits(swap: _Swap, text: str, hit: re.Match[str]) -> bool:
    if text[hit.end() : hit.end() + 1] == ":":  # a label, as in `Person: slim man`
        return False
    before = re.search(r"([\w’'-]+)\s+$", text[: hit.start()])
    after = re.match(r"\s+([\w’'-]+)", text[hit.end() :])
    last, following = before[1].lower() if before else "", after[1].lower() if after else ""
    return last not in swap.not_after and following not in swap.not_before and (not swap.only or following in swap.only)


def _cased(new: str, old: str, before: str) -> str:
    """The new word in the case of the old one; a capital inside a sentence may be a name and keeps the old word."""
    if old == old.lower():
        return new
    starts = re.search(r"(?:^|[.!?:;])\s*$", before) is not None
    return _capital(new) if starts and old[1:] == old[1:].lower() else old


def _article(found: re.Match[str], word: str) -> str:
    """`a` or `an` as the new word sounds: by its first letter, which for the words of the thesaurus is enough."""
    article = found[1][0] + ("n" if word[0].lower() in "aeiou" else "")
    return article + found[2]


@dataclass(frozen=True)
class Style:
    """A way to say the same: one line about it, and the rewriting."""

    summary: str
    rewrite: Callable[[str], str]


STYLES: dict[str, Style] = {
    "keywords": Style("articles, auxiliaries and punctuation left out", _keywords),
    "request": Style('"Find the person who fits this description: ..."', _request),
    "reordered": Style("sentences, or the clauses of a single one, in reverse order", _reordered),
    "synonyms": Style("other words for people, clothes and colours", _synonyms),
    "plain-case": Style("lower case without punctuation", _plain_case),
}


def paraphrase(text: str, style: str) -> str:
    """Return a text in another style; the same text gives the same answer everywhere.

    A text that the style cannot change, or of which nothing would be left, is returned as it is.

    Raises:
        UsageError: an unknown style.
    """
    if style not in STYLES:
        raise UsageError(f"Unknown style `{style}`.", hint=f"Known: {', '.join(STYLES)}.")
    return STYLES[style].rewrite(text) or text


TRUTH_STYLES = tuple(name.replace(" ", "-") for name in captions.STYLES)
"""The writing styles of synthped, in the order of their numbers."""

_IMAGE = re.compile(r"synthped-([abc])-(\d+)-c\d+-(\d+)")


def rewrite_synthped(
    config: SynthConfig,
    image_ids: Iterable[str],
    style_ids: Iterable[str | None],
    texts: Iterable[str],
    *,
    advance: Callable[[int], None] | None = None,
) -> dict[str, list[str]]:
    """Return synthped's own captions as the same annotator would have put them in each of its six writing styles.

    A caption of synthped is decided by what its annotator mentions and by a style. Both are drawn from one stream that
    can be started again, so a rewriting mentions the same things of the same picture; only `keywords` and `labelled
    list` have no room for some of it. Pictures are rendered anew to know what they show.

    Args:
        config: what rendered the dataset.
        image_ids: the image of each caption.
        style_ids: `style-0` to `style-5`: the style of each caption.
        texts: the captions.
        advance: called with 1 after each caption.

    Raises:
        DataError: a caption is not what these settings write, e.g. because it was edited or comes from elsewhere.
    """
    found: dict[str, list[str]] = {name: [] for name in TRUTH_STYLES}
    rendered: dict[str, Rendered] = {}
    for image_id, style_id, text in zip(image_ids, style_ids, texts, strict=True):
        if image_id not in rendered:
            rendered = {image_id: _render(config, image_id)}  # captions of one image follow one another
        written = _written(config, rendered[image_id], style_id)
        if text not in written or written[int(str(style_id)[-1])] != text:
            raise DataError(f"A caption of image `{image_id}` is not what synthped writes with these settings.")
        for name, version in zip(TRUTH_STYLES, written, strict=True):
            found[name].append(version)
        if advance:
            advance(1)
    return found


def _render(config: SynthConfig, image_id: str) -> Rendered:
    match = _IMAGE.fullmatch(image_id)
    index = int(match[2]) - config.first if match else -1
    if match is None or match[1] not in config.domains or not 0 <= index < config.people:
        raise DataError(f"Image `{image_id}` is not one that synthped renders with these settings.")
    return render_shot(config, cast.person(config, match[1], index), int(match[3]))


def _written(config: SynthConfig, picture: Rendered, style_id: str | None) -> list[str]:
    """What one annotator writes in every style; empty for an unknown style."""
    if style_id not in {f"style-{number}" for number in range(len(captions.STYLES))}:
        return []
    person, number = picture.person, int(style_id[-1])
    # The address of `synthped.captions.captions`: what is mentioned depends on the stream of the caption's own style.
    address = (config.seed, cast.WORDS, person.own_number, picture.shot.image)
    return [captions.caption(picture, style, Draws(*address, 1 + number)).text for style in range(len(captions.STYLES))]
