"""What the attributes of an image say, as noun phrases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_MARKET_COLOURS = ("black", "white", "red", "purple", "yellow", "gray", "blue", "green", "pink", "brown")
_MARKET_AGES = {"1": "young", "2": "teenage", "3": "adult", "4": "elderly", "teenager": "teenage", "old": "elderly"}
_NOUNS = {
    "man": "man",
    "male": "man",
    "1": "man",
    "woman": "woman",
    "female": "woman",
    "2": "woman",
    "boy": "boy",
    "girl": "girl",
}
_AGE_WORDS = {
    "old": "elderly",
    "teenager": "teenage",
    "teen": "teenage",
    "adult": "adult",
    "middle aged": "middle-aged",
}
_YOUNGEST = frozenset({"child", "children", "kid", "toddler", "baby", "infant"})
_CARRIED = ("hat", "backpack", "bag", "handbag")
_ABSENT = frozenset({"", "none", "no", "unknown", "nan", "n/a", "-"})
_PLURALS = re.compile(
    r"(?:trousers|pants|jeans|shorts|leggings|tights|shoes|boots|sandals|trainers|sneakers|heels|loafers|slippers|socks|gloves"
    r"|glasses|sunglasses|headphones|slacks|chinos|overalls|joggers|sweatpants|culottes|dungarees)$"
)


@dataclass(frozen=True)
class Facts:
    """Phrases without articles, in the order in which they are told.

    Attributes:
        noun: man, woman, boy, girl, child or person.
        age: an adjective, or "".
        body: build, stature and what else is allowed, e.g. `slim build`.
        hair: e.g. `short black hair`, or "".
        garments: (place, phrase), e.g. `("Upper", "red striped shirt")`.
        belongings: things carried.
    """

    noun: str
    age: str
    body: tuple[str, ...]
    hair: str
    garments: tuple[tuple[str, str], ...]
    belongings: tuple[str, ...]


def facts_of(attributes: Mapping[str, str], *, sensitive: bool) -> Facts:
    """Return the facts in an attribute map.

    It has synthped's keys, those that our reader makes of Market-1501-Attribute and DukeMTMC-attribute (the same keys
    where they fit, and yes or no for belongings), or the MATLAB codes of Market-1501-Attribute themselves.
    """
    given = {key: str(value).strip().lower() for key, value in attributes.items()}
    if "upblack" in given or "downblack" in given:
        given = _from_market(given)

    def get(key: str) -> str:
        value = given.get(key, "").replace("_", " ")
        return "" if value in _ABSENT else value

    noun, age = _who(get("gender"), _AGE_WORDS.get(get("age"), get("age")))
    body = [f"{get(key)} {key}" for key in ("build", "stature") if get(key)]
    if sensitive and get("skin"):
        body.append(f"{get('skin')} skin")
    shoes = get("shoe_type") or ("boots" if get("boots") == "yes" else "shoes" if get("shoe_colour") else "")
    garments = [
        ("Upper", _phrase(get("upper_colour"), get("upper_pattern"), get("upper_type"), "top")),
        ("Lower", _phrase(get("lower_colour"), "", get("lower_type"), "lower garment")),
        ("Shoes", _phrase(get("shoe_colour"), "", shoes, "shoes")),
    ]
    carried = [item.strip() for item in get("carried").split(",")] + [item for item in _CARRIED if get(item) == "yes"]
    return Facts(
        noun=noun,
        age=age,
        body=tuple(body),
        hair=_hair(get("hair_length"), get("hair_colour")),
        garments=tuple((place, phrase) for place, phrase in garments if phrase),
        belongings=tuple(item for item in carried if item not in _ABSENT),
    )


def with_article(phrase: str) -> str:
    """Return a noun phrase with `a` or `an`; plural and mass nouns stay bare."""
    if _PLURALS.search(phrase) or phrase.endswith(("hair", "skin", "clothing")):
        return phrase
    vowel = re.match(r"(?:[aeio]|u(?!ni|se))", phrase) and not re.match(r"(?:one|eu)", phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def join(phrases: list[str]) -> str:
    """Return `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _who(gender: str, age: str) -> tuple[str, str]:
    """The noun and the adjective before it: a boy is a child already."""
    noun = _NOUNS.get(gender, "person")
    if age != "teenage" and age not in _YOUNGEST:
        return noun, age
    noun = {"man": "boy", "woman": "girl"}.get(noun, noun)
    if age == "teenage":
        return noun, age
    return "child" if noun == "person" else noun, ""


def _phrase(colours: str, pattern: str, kind: str, unknown: str) -> str:
    """A garment; `unknown` names one of which only the colour is known."""
    if not kind and not colours:
        return ""
    colour = join([colour.strip() for colour in colours.split(",")])
    return " ".join(word for word in (colour, "" if pattern == "plain" else pattern, kind or unknown) if word)


def _hair(length: str, colour: str) -> str:
    if length == "bald":
        return "bald head"
    if length == "bob":
        return f"{colour} bob haircut".strip()
    words = [word for word in (length, colour) if word]
    return " ".join([*words, "hair"]) if words else ""


def _from_market(given: Mapping[str, str]) -> dict[str, str]:
    """Market-1501-Attribute (Lin et al. 2019) in synthped's keys, from its MATLAB codes (1 no, 2 yes) or words."""

    def yes(key: str) -> bool:
        return given.get(key, "") in ("2", "yes", "true")

    def colour(part: str) -> str:
        return ", ".join(name for name in _MARKET_COLOURS if yes(f"{part}{name}")).replace("gray", "grey")

    dress = given.get("clothes") in ("1", "dress")
    long_lower = given.get("down") in ("1", "long", "long lower body clothing")
    lower = "dress" if dress else ("trousers" if long_lower else "shorts")
    sleeves = "short-sleeved" if given.get("up") in ("2", "short", "short sleeve") else "long-sleeved"
    hair = given.get("hair", "")
    return {
        "gender": given.get("gender", ""),
        "age": _MARKET_AGES.get(given.get("age", ""), given.get("age", "")),
        "hair_length": {"1": "short", "2": "long"}.get(hair, hair.removesuffix(" hair")),
        "upper_colour": colour("up"),
        "upper_type": f"{sleeves} top",
        "lower_colour": colour("down"),
        "lower_type": lower,
        "carried": ",".join(item for item in _CARRIED if yes(item)),
    }
