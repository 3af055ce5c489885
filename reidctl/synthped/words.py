"""The words for what a picture shows: canonical phrases for the truth tables, synonyms for the captions."""

from reidctl.synthped import palette
from reidctl.synthped.cast import Body, Outfit
from reidctl.synthped.draws import Draws
from reidctl.synthped.render import Rendered
from reidctl.synthped.shot import Item

# Plural nouns take no article.
PLURAL = (
    "trousers",
    "jeans",
    "shorts",
    "leggings",
    "pants",
    "tights",
    "trainers",
    "boots",
    "shoes",
    "sandals",
    "sneakers",
)

SYNONYMS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt", "t-shirt", "tee"),
    "shirt": ("shirt", "collared shirt", "button-up shirt"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket", "open jacket"),
    "coat": ("coat", "long coat", "overcoat"),
    "sweater": ("sweater", "pullover", "jumper"),
    "tank top": ("tank top", "sleeveless top"),
    "dress": ("dress", "knee-length dress"),
    "trousers": ("trousers", "pants"),
    "jeans": ("jeans", "denim jeans"),
    "leggings": ("leggings", "tights"),
    "trainers": ("trainers", "sneakers"),
    "boots": ("boots", "ankle boots"),
    "leather shoes": ("leather shoes", "shoes"),
    "backpack": ("backpack", "backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "phone": ("phone", "mobile phone"),
    "cap": ("cap", "baseball cap"),
    "grey": ("grey", "gray"),
    "striped": ("striped", "horizontally striped"),
    "vertically striped": ("vertically striped", "pinstriped"),
    "checked": ("checked", "checkered"),
    "dotted": ("dotted", "polka-dot"),
    "blonde": ("blonde", "fair"),
    "heavy": ("heavy", "heavily built", "stout"),
    "slim": ("slim", "thin", "slender"),
}


def say(word: str, rng: Draws | None) -> str:
    """The word itself, or with a random stream one of its synonyms."""
    return rng.pick(SYNONYMS.get(word, (word,))) if rng else word


def article(phrase: str) -> str:
    """Put "a" or "an" before a noun phrase unless its noun is plural or uncountable.

    The sound decides, which for these words is the first letter, except "u" as in "uniform".
    """
    if phrase.endswith(PLURAL) or phrase.endswith(("hair", "clothing", "clothes")):
        return phrase
    return f"{'an' if phrase[0] in 'aeio' or phrase.startswith('um') else 'a'} {phrase}"


def noun(body: Body) -> str:
    """Gender and age as a noun: man, elderly woman, teenage boy, ..."""
    if body.age == "teenage":
        return "teenage boy" if body.gender == "man" else "teenage girl"
    return f"elderly {body.gender}" if body.age == "elderly" else body.gender


def pronouns(body: Body) -> tuple[str, str]:
    """Subject pronoun and possessive."""
    return ("he", "his") if body.gender == "man" else ("she", "her")


def hair(body: Body, rng: Draws | None = None) -> str:
    """The hair as a phrase without article."""
    if body.hair_length == "bald":
        return "bald head"
    colour = say(body.hair_colour, rng)
    return f"{colour} bob haircut" if body.hair_length == "bob" else f"{body.hair_length} {colour} hair"


def upper(outfit: Outfit, rng: Draws | None = None) -> str:
    """The upper garment as a phrase without article; with a random stream the pattern's second colour may be named."""
    words = [say(outfit.upper_colour, rng)]
    if outfit.upper_pattern != "plain":
        if rng and rng.chance(0.4):
            words += ["and", say(outfit.upper_second, rng)]
        words.append(say(outfit.upper_pattern, rng))
    return " ".join([*words, say(outfit.upper_type, rng)])


def lower(outfit: Outfit, rng: Draws | None = None) -> str:
    """The lower garment as a phrase without article."""
    return f"{say(outfit.lower_colour, rng)} {say(outfit.lower_type, rng)}"


def shoes(outfit: Outfit, rng: Draws | None = None) -> str:
    """The shoes as a phrase without article."""
    return f"{say(outfit.shoe_colour, rng)} {say(outfit.shoe_type, rng)}"


def item(thing: Item, rng: Draws | None = None) -> str:
    """A carried object as a phrase without article."""
    return f"{say(thing.colour, rng)} {say(thing.kind, rng)}"


def visible_items(picture: Rendered) -> list[Item]:
    """The carried objects that can be seen in the picture."""
    return [thing for thing in picture.shot.items if palette.OBJECT_PART[thing.kind] in picture.visible]


def part_phrases(picture: Rendered) -> dict[str, str]:
    """The canonical phrase, with article, of every part that is large enough to be described."""
    body, outfit, visible = picture.person.body, picture.shot.outfit, picture.visible
    phrases = {
        "person": article(noun(body)),
        "head": f"the {noun(body)}'s head",
        "face": f"the {noun(body)}'s face",
        "hair": article(hair(body)),
        "upper": article(upper(outfit)),
        "lower": article(lower(outfit)),
        "shoes": article(shoes(outfit)),
    }
    for thing in visible_items(picture):
        part, phrase = palette.OBJECT_PART[thing.kind], article(item(thing))
        phrases[part] = f"{phrases[part]} and {phrase}" if part in phrases else phrase
    return {part: phrase for part, phrase in phrases.items() if part in visible}


def identity_text(picture: Rendered) -> str:
    """What stays with the person: gender presentation, age group, build, stature. Hair counts as clothing side."""
    body = picture.person.body
    return f"{article(noun(body)).capitalize()} of {body.build} build and {body.stature} height."


def clothing_text(picture: Rendered) -> str:
    """What can be changed: hair, garments, shoes and carried objects, as far as this picture shows them."""
    phrases = part_phrases(picture)
    worn = [phrases[part] for part in ("hair", "upper", "lower", "shoes") if part in phrases]
    if picture.person.body.hair_length == "bald" and "face" in phrases and "hat" not in phrases:
        worn.insert(0, "a bald head")
    worn += [article(item(thing)) for thing in visible_items(picture)]
    if not worn:
        return "Clothing hidden."
    text = worn[0] if len(worn) == 1 else f"{', '.join(worn[:-1])} and {worn[-1]}"
    return f"{text[0].upper()}{text[1:]}."
