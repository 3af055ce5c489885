"""The same description in other words: rule-based styles that keep the meaning, without a model and without chance.

A rule that cannot tell which sense a word has leaves it alone: `light` (colour or weight), `top` (garment or place),
`tie`, `watch`, `orange`, `thin` (body or cloth) stay as they are, and so does a capitalised word inside a sentence,
which may be a name. What rules cannot promise is idiom: a rewritten sentence says the same, but not always as a person
would. English only.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
# What may begin a clause that can stand elsewhere: not `who`, `is`, `and a bag`, which lean on what stands before them.
_CLAUSE = re.compile(
    r",\s+(?:(?:and\s+)?(?=(?:wearing|carrying|holding|walking|standing|dressed|seen|viewed|with)\s)"
    r"|and\s+(?=(?:he|she|they|his hair|her hair|his shoes|her shoes)\s))",
    re.I,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")


def _keywords(text: str) -> str:
    """Function words and punctuation left out, lower case; negations and `under`, `over`, `without` stay."""
    return " ".join(word.lower() for word in _WORD.findall(text) if word.lower() not in _FUNCTION_WORDS)


def _request(text: str) -> str:
    return f"Find the person who fits this description: {_lowered(text)}"


def _reordered(text: str) -> str:
    """Sentences in reverse order; of a single sentence its parts between semicolons, else its clauses."""
    sentences = _SENTENCE.split(text.strip())
    if len(sentences) > 1:
        return " ".join(_capital(sentence) for sentence in reversed(sentences))
    body = text.strip().rstrip(".!?")
    mark = text.strip()[len(body) :]
    joint = "; "
    parts = [part.strip() for part in body.split(";") if part.strip()]
    if len(parts) < 2:
        joint, parts = ", ", [part.strip() for part in _CLAUSE.split(body)]
    if len(parts) < 2:
        return text
    turned = [_lowered(part) for part in reversed(parts)]
    return (_capital(joint.join(turned)) if text[:1].isupper() else joint.join(turned)) + mark


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
    slender=slim overweight=heavyset stocky=thickset t-shirt=tee t-shirts=tees tee=t-shirt tees=t-shirts
    sweater=pullover sweaters=pullovers pullover=sweater pullovers=sweaters jumper=sweater hoodie=hooded_sweatshirt
    hooded_sweatshirt=hoodie trousers=pants pants=trousers slacks=trousers sneakers=trainers trainers=sneakers
    backpack=rucksack backpacks=rucksacks rucksack=backpack rucksacks=backpacks purse=handbag
    mobile_phone=cell_phone cell_phone=mobile_phone cellphone=mobile_phone spectacles=glasses
    sunglasses=dark_glasses moustache=mustache mustache=moustache haircut=hairstyle raincoat=waterproof_coat
    tank_top=sleeveless_top denim_jeans=jeans grey=gray gray=grey purple=violet violet=purple navy_blue=dark_blue
    checkered=checked plaid=tartan wears=is_wearing walks=is_walking carries=is_carrying"""
)
_GUARDED = {
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
    "keywords": Style("function words and punctuation left out", _keywords),
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

_IMAGE = re.compile(r"synthped-([ab])-(\d+)-c\d+-(\d+)")


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
    if match is None or match[1] not in config.domains or int(match[2]) >= config.people:
        raise DataError(f"Image `{image_id}` is not one that synthped renders with these settings.")
    return render_shot(config, cast.person(config, match[1], int(match[2])), int(match[3]))


def _written(config: SynthConfig, picture: Rendered, style_id: str | None) -> list[str]:
    """What one annotator writes in every style; empty for an unknown style."""
    if style_id not in {f"style-{number}" for number in range(len(captions.STYLES))}:
        return []
    person, number = picture.person, int(style_id[-1])
    # The address of `synthped.captions.captions`: what is mentioned depends on the stream of the caption's own style.
    address = (config.seed, cast.WORDS, person.index + (10000 if person.domain == "b" else 0), picture.shot.image)
    return [captions.caption(picture, style, Draws(*address, 1 + number)).text for style in range(len(captions.STYLES))]
