"""Captions as human annotators might write them, in six writing styles, with the span of every phrase.

A caption says only what its picture shows, and each annotator leaves some of it out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from reidctl.synthped import words
from reidctl.synthped.cast import WORDS
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws
from reidctl.synthped.palette import OBJECT_PART
from reidctl.synthped.render import Rendered
from reidctl.synthped.shot import Item
from reidctl.synthped.words import article

STYLES = ("keywords", "plain sentence", "long narrative", "labelled list", "hedged witness", "police report")

Piece = tuple[str, str]  # (part or "", text)


@dataclass(frozen=True, slots=True)
class Span:
    """A phrase inside a caption: `text[start:end]`, about `part`."""

    part: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption, its style number and its phrases in order."""

    text: str
    style: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What one annotator mentions: phrases without article; "" for what is left out."""

    noun: str
    build: str
    stature: str
    hair: str
    beard: str
    upper: str
    lower: str
    shoes: str
    items: tuple[tuple[Item, str], ...]
    view: str
    walking: bool | None
    pronoun: str
    possessive: str


def captions(config: SynthConfig, picture: Rendered) -> list[Caption]:
    """Return the captions of a picture, each in another style, decided by (seed, person, image)."""
    person = picture.person
    address = (config.seed, WORDS, person.own_number, picture.shot.image)
    styles = Draws(*address).shuffled(range(len(STYLES)))[: config.captions_per_image]
    return [caption(picture, style, Draws(*address, 1 + style)) for style in styles]


def caption(picture: Rendered, style: int, rng: Draws) -> Caption:
    """Return a caption of a picture in style 0 to 5."""
    pieces = _WRITERS[style](_tell(picture, rng), rng)
    text, spans = "", []
    for part, piece in pieces:
        if part:
            spans.append(Span(part, len(text), len(text) + len(piece)))
        text += piece
    if style != 0:
        text = text[0].upper() + text[1:]
    return Caption(text, style, tuple(spans))


def _tell(picture: Rendered, rng: Draws) -> Told:
    """Choose what to mention among what is visible."""
    body, outfit, visible = picture.person.body, picture.shot.outfit, picture.visible
    bald = body.hair_length == "bald"
    hair_shows = ("face" in visible and "hat" not in visible) if bald else "hair" in visible
    face_shows = "face" in visible and picture.shot.view != "back"
    beard = f"{words.say(body.hair_colour, rng)} beard" if body.hair_colour != "none" else "beard"
    items = [(thing, words.item(thing, rng)) for thing in words.visible_items(picture) if rng.chance(0.85)]
    pronoun, possessive = words.pronouns(body)
    upper, lower = words.upper(outfit, rng), words.lower(outfit, rng)
    return Told(
        noun=words.noun(body),
        build=words.say(body.build, rng) if rng.chance(0.4) and body.build != "average" else "",
        stature=body.stature if rng.chance(0.4) and body.stature != "average" else "",
        hair=words.hair(body, rng) if hair_shows and rng.chance(0.6) else "",
        beard=beard if body.beard and face_shows and rng.chance(0.6) else "",
        upper=upper if "upper" in visible and rng.chance(0.95) else "",
        lower=lower if "lower" in visible and rng.chance(0.88) else "",
        shoes=words.shoes(outfit, rng) if "shoes" in visible and rng.chance(0.6) else "",
        items=tuple(items),
        view=picture.shot.view if rng.chance(0.4) else "",
        walking=picture.shot.walking if rng.chance(0.5) else None,
        pronoun=pronoun,
        possessive=possessive,
    )


def _series(chunks: list[list[Piece]], separator: str = ", ", last: str = " and ") -> list[Piece]:
    """Join chunks: a, b and c."""
    joined: list[Piece] = []
    for number, chunk in enumerate(chunks):
        if number:
            joined.append(("", last if number == len(chunks) - 1 else separator))
        joined += chunk
    return joined


def _subject(told: Told) -> str:
    return " ".join(word for word in (told.stature, told.build, told.noun) if word)


def _worn(told: Told) -> list[list[Piece]]:
    """Garments with articles, as chunks."""
    named = (("upper", told.upper), ("lower", told.lower), ("shoes", told.shoes))
    return [[(part, article(phrase))] for part, phrase in named if phrase]


def _hair(told: Told) -> list[list[Piece]]:
    chunks = [[("hair" if "head" not in told.hair else "head", article(told.hair))]] if told.hair else []
    return chunks + ([[("face", article(told.beard))]] if told.beard else [])


def _carried(told: Told, thing: Item, phrase: str) -> list[Piece]:
    """An object with where it is: "a black backpack on his back"."""
    part = OBJECT_PART[thing.kind]
    where = {
        "back": f" on {told.possessive} back",
        "head": f" on {told.possessive} head",
        "shoulder": f" over {told.possessive} {thing.side} shoulder",
        "hand": f" in {told.possessive} {thing.side} hand",
    }[thing.place]
    return [(part, article(phrase)), ("", where)]


def _view(told: Told) -> str:
    return {
        "": "",
        "front": "from the front",
        "back": "from behind",
        "left side": f"from {told.possessive} left side",
        "right side": f"from {told.possessive} right side",
    }[told.view]


def _keywords(told: Told, rng: Draws) -> list[Piece]:
    """Style 0: bare search words, no articles, no punctuation."""
    chunks: list[list[Piece]] = [[("person", _subject(told))]]
    named = (("hair", told.hair), ("upper", told.upper), ("lower", told.lower), ("shoes", told.shoes))
    chunks += [[("head" if "head" in phrase else part, phrase)] for part, phrase in named if phrase]
    chunks += [[(OBJECT_PART[thing.kind], phrase)] for thing, phrase in told.items]
    if told.walking is not None:
        chunks.append([("", "walking" if told.walking else "standing")])
    return _series(chunks, " ", " ")


def _plain(told: Told, rng: Draws) -> list[Piece]:
    """Style 1: one plain sentence."""
    pieces: list[Piece] = [("person", article(_subject(told)))]
    if _hair(told):
        pieces += [("", " with "), *_series(_hair(told))]
    worn = _worn(told)
    if worn:
        pieces += [("", rng.pick((" wearing ", " in ", " dressed in "))), *_series(worn)]
    if told.items:
        pieces += [("", " and with " if worn else " with "), *_series([_carried(told, *entry) for entry in told.items])]
    if told.walking is not None:
        pieces.append(("", " is walking" if told.walking else " is standing still"))
        pieces.append(("", f", seen {_view(told)}" if told.view else ""))
    elif told.view:
        pieces.append(("", f" is seen {_view(told)}"))
    else:
        pieces.append(("", " is shown"))
    return [*pieces, ("", ".")]


def _narrative(told: Told, rng: Draws) -> list[Piece]:
    """Style 2: a long account with many clauses."""
    opening = rng.pick(
        ("In this picture we can see ", "The photograph, taken by a camera above the street, shows ", "Here we have ")
    )
    pieces: list[Piece] = [("", opening), ("person", article(_subject(told)))]
    pace = {
        True: "is walking along at an easy pace",
        False: "is standing there quietly",
        None: "is in the middle of the scene",
    }
    pieces.append(("", f" who {pace[told.walking]}"))
    pieces.append(("", f" and whom we look at {_view(told)}, " if told.view else ", "))
    if _hair(told):
        pieces += [("", f"and {told.pronoun} has "), *_series(_hair(told)), ("", ", ")]
    if told.upper:
        pieces += [
            ("", f"and on the upper part of the body {told.pronoun} wears "),
            ("upper", article(told.upper)),
            ("", ", "),
        ]
    if told.lower:
        joint = f"which {told.pronoun} has combined with " if told.upper else f"and {told.pronoun} has put on "
        pieces += [("", joint), ("lower", article(told.lower)), ("", ", ")]
    if told.shoes:
        pieces += [("", f"while on {told.possessive} feet there are "), ("shoes", article(told.shoes)), ("", ", ")]
    if told.items:
        pieces += [
            ("", f"and, besides all that, {told.pronoun} has "),
            *_series([_carried(told, *entry) for entry in told.items]),
            ("", ", "),
        ]
    return [
        *pieces,
        (
            "",
            rng.pick(
                (
                    "as people do on an ordinary day.",
                    "all of which makes for an everyday sight.",
                    "and nothing else stands out.",
                )
            ),
        ),
    ]


def _list(told: Told, rng: Draws) -> list[Piece]:
    """Style 3: labels and semicolons."""
    chunks: list[list[Piece]] = [[("", "Person: "), ("person", _subject(told))]]
    named = (
        ("Hair", "hair", told.hair),
        ("Face", "face", told.beard),
        ("Top", "upper", told.upper),
        ("Bottom", "lower", told.lower),
        ("Shoes", "shoes", told.shoes),
    )
    chunks += [
        [("", f"{label}: "), ("head" if "head" in phrase else part, phrase)] for label, part, phrase in named if phrase
    ]
    if told.items:
        chunks.append(
            [
                ("", "Carrying: "),
                *_series(
                    [
                        [
                            (OBJECT_PART[thing.kind], phrase),
                            ("", f" ({thing.side} {thing.place})" if thing.side else f" ({thing.place})"),
                        ]
                        for thing, phrase in told.items
                    ],
                    ", ",
                    ", ",
                ),
            ]
        )
    if told.view:
        chunks.append([("", f"View: {told.view}")])
    if told.walking is not None:
        chunks.append([("", "Pose: " + ("walking" if told.walking else "standing"))])
    return _series(chunks, "; ", "; ")


def _witness(told: Told, rng: Draws) -> list[Piece]:
    """Style 4: someone who is not sure."""
    pieces: list[Piece] = [
        ("", rng.pick(("I think I saw ", "It appears to be ", "As far as I can tell it was "))),
        ("person", article(_subject(told))),
    ]
    if _hair(told):
        pieces += [("", ", probably with "), *_series(_hair(told))]
    worn = _worn(told)
    if worn:
        pieces += [
            ("", rng.pick((", seemingly wearing ", ", who seemed to be dressed in ", ", apparently in "))),
            *_series(worn, ", maybe ", " and possibly "),
        ]
    if told.walking is not None:
        pieces.append(("", ", perhaps walking" if told.walking else ", perhaps just standing"))
    pieces.append(("", f", viewed roughly {_view(told)}" if told.view else ""))
    if told.items:
        pieces += [("", "; there may also have been "), *_series([_carried(told, *entry) for entry in told.items])]
    return [*pieces, ("", rng.pick((", but I am not certain.", ", though I could be wrong.", ", or so it looked.")))]


def _police(told: Told, rng: Draws) -> list[Piece]:
    """Style 5: a formal report in the third person."""
    pieces: list[Piece] = [("", "Subject is "), ("person", article(_subject(told))), ("", ". ")]
    if _hair(told):
        pieces += [("", "Subject has "), *_series(_hair(told)), ("", ". ")]
    worn = _worn(told)
    if worn:
        pieces += [("", "Subject was observed wearing "), *_series(worn), ("", ". ")]
    if told.items:
        pieces += [
            ("", "Subject was in possession of "),
            *_series([_carried(told, *entry) for entry in told.items]),
            ("", ". "),
        ]
    if told.walking is not None:
        pieces.append(("", "Subject was proceeding on foot. " if told.walking else "Subject was stationary. "))
    if told.view:
        pieces.append(("", f"Subject was recorded {_view(told)}. "))
    return [*pieces, ("", "End of description.")]


_WRITERS: tuple[Callable[[Told, Draws], list[Piece]], ...] = (_keywords, _plain, _narrative, _list, _witness, _police)
