"""Who exists: identities, their bodies, outfits, splits, look-alikes and doubles in the other dataset."""

from dataclasses import dataclass, replace

from reidctl.synthped import palette
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws, balanced

# Purposes: the second number of a Draws address, so that streams never overlap.
BODY, OUTFIT, SHOT, PIXELS, WORDS, ROUTE = 1, 2, 3, 4, 5, 6

# Where the numbers of each world's people begin. 20000 + number and 40000 + number are second wardrobes and the bodies
# of look-alikes, so up to 60000 everything may be taken by people of a and b.
FIRST_NUMBER = {"a": 0, "b": 10000, "c": 60000}


@dataclass(frozen=True, slots=True)
class Body:
    """What stays when a person changes clothes. Continuous values are multiples of an average adult's."""

    gender: str
    age: str
    build: str
    stature: str
    skin: str
    hair_length: str
    hair_colour: str
    beard: bool
    height: float  # of the figure; 1 = average
    girth: float  # width of trunk and limbs
    head: float  # head size relative to the body
    legs: float  # leg length relative to the body
    shoulders: float  # shoulder width


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a person wears in all images that share an outfit."""

    outfit_id: str
    upper_type: str
    upper_colour: str
    upper_pattern: str
    upper_second: str  # colour of the pattern; equals upper_colour for plain garments
    lower_type: str
    lower_colour: str
    shoe_type: str
    shoe_colour: str
    inner_colour: str  # what shows under an open jacket or coat


@dataclass(frozen=True, slots=True)
class Person:
    """One identity of one dataset."""

    domain: str
    index: int  # raw identity number within the dataset
    true_person: int  # equal numbers = the same person, also across datasets
    split: str
    body: Body
    outfits: tuple[Outfit, ...]
    clone_of: str = ""  # person_id of the look-alike, given on both members of a pair
    clone_kind: str = ""  # "outfit": same outfit, other body; "body": same body, other outfit
    number: int = 0  # what ids call the identity: index + `first`

    @property
    def own_number(self) -> int:
        """One number per identity of any dataset; doubles have one in each, and so pictures of their own."""
        return own_number(self.domain, self.index)

    @property
    def dataset(self) -> str:
        return f"synthped-{self.domain}"

    @property
    def person_id(self) -> str:
        return person_id(self.domain, self.number)


def person_id(domain: str, number: int) -> str:
    """The identifier of an identity in every table."""
    return f"synthped-{domain}:{number:04d}"


def own_number(domain: str, index: int) -> int:
    """Return the number of identity `index` of a dataset among the people of all worlds."""
    return FIRST_NUMBER[domain] + index


def split_of(config: SynthConfig, index: int) -> str:
    """The split of an identity: the first are train, then val, then test."""
    train, val = split_sizes(config)
    if index < train:
        return "train"
    return "val" if index < train + val else "test"


def split_sizes(config: SynthConfig) -> tuple[int, int]:
    """Numbers of training and validation identities per dataset; what is left is test."""
    train = max(1, int(config.people * config.train_fraction + 0.5))
    val = int(config.people * config.val_fraction + 0.5)
    return min(train, config.people - val - 1), val


def person(config: SynthConfig, domain: str, index: int) -> Person:
    """Return identity `index` of a dataset with everything that is fixed about it."""
    true = true_person(config, domain, index)
    at_home = true == own_number(domain, index)
    wardrobe = true if config.crossing_outfit == "same" or at_home else 20000 + true
    base = Person(
        domain=domain,
        index=index,
        true_person=true,
        split=split_of(config, index),
        body=make_body(config.seed, true),
        outfits=_outfits(config, wardrobe, make_body(config.seed, true)),
        number=config.first + index,
    )
    pair = clone_partner(config, index)
    if pair is None:
        return base
    partner, kind, copies = pair
    base = replace(base, clone_of=person_id(domain, config.first + partner), clone_kind=kind)
    return _copy_from(config, base, true_person(config, domain, partner), kind) if copies else base


def true_person(config: SynthConfig, domain: str, index: int) -> int:
    """Number the people of all worlds: a's are 0, 1, ..., b's are 10000, 10001, ..., except those who cross.

    Crossing people are the first training identities of a. A third of them (rounded up) is found again in b's test
    split, the others in b's training split. Nobody crosses into c.
    """
    if domain != "b":
        return own_number(domain, index)
    leaking = (config.crossing + 2) // 3
    train, val = split_sizes(config)
    leaking = min(leaking, config.people - train - val)
    if index >= config.people - leaking:
        return index - (config.people - leaking)
    if index < config.crossing - leaking:
        return leaking + index
    return own_number(domain, index)


def clone_partner(config: SynthConfig, index: int) -> tuple[int, str, bool] | None:
    """Return (partner, kind, whether this one is the copy) for members of a look-alike pair, else None.

    Pairs are neighbours (2k, 2k + 1) within one split, spread evenly over the identities. Crossing people are left out
    where that is possible, because a copy has one body and two names already.
    """
    pairs = config.pairs
    slots = _clone_slots(config)
    if pairs > len(slots):
        pairs = len(slots)
    chosen = {slots[(number * len(slots)) // pairs]: number for number in range(pairs)}
    first = index - index % 2
    if first not in chosen:
        return None
    kind = "outfit" if chosen[first] % 2 == 0 else "body"
    return (first, kind, True) if index % 2 else (first + 1, kind, False)


def _clone_slots(config: SynthConfig) -> list[int]:
    """First members of the neighbour pairs that may become look-alikes."""
    inside = [
        first for first in range(0, config.people - 1, 2) if split_of(config, first) == split_of(config, first + 1)
    ]
    crossing = config.crossing
    leaking = min((crossing + 2) // 3, config.people - sum(split_sizes(config)))
    free = [first for first in inside if first >= crossing and first + 1 < config.people - leaking]
    return free if crossing else inside


def _copy_from(config: SynthConfig, base: Person, source: int, kind: str) -> Person:
    """Give the copy of a pair the outfit or the body of the other member."""
    body = make_body(config.seed, source)
    if kind == "body":
        # Same body, own clothes; the wardrobe is drawn for the body so that it fits its gender.
        return replace(base, body=body, outfits=_outfits(config, 40000 + base.true_person, body))
    # The same clothes need a body that could own them (dresses) and that differs visibly.
    own = make_body(config.seed, 40000 + base.true_person, gender=body.gender, unlike=body)
    outfits = _outfits(config, source, body)
    return replace(base, body=own, outfits=outfits)


def make_body(seed: int, number: int, *, gender: str = "", unlike: Body | None = None) -> Body:
    """Return the body of person `number` of the world; named factors are near uniform over consecutive numbers.

    Args:
        seed: the configuration's seed.
        number: which person.
        gender: fixed instead of drawn, when given.
        unlike: a body that must differ in build, stature and skin.
    """
    rng = Draws(seed, BODY, number)
    stride = [(seed, BODY, 100 + factor) for factor in range(8)]
    gender = gender or balanced(palette.GENDERS, number, *stride[0])
    age = balanced(("teenage", "adult", "adult", "elderly"), number, *stride[1])
    build = balanced(palette.BUILDS, number, *stride[2])
    stature = balanced(palette.STATURES, number, *stride[3])
    skin = balanced(palette.SKINS, number, *stride[4])
    if unlike is not None:
        build = rng.pick([name for name in palette.BUILDS if name != unlike.build])
        stature = rng.pick([name for name in palette.STATURES if name != unlike.stature])
        skin = rng.pick([name for name in palette.SKINS if name != unlike.skin])
    lengths = ("bald", "short", "short", "long") if gender == "man" else ("short", "bob", "bob", "long")
    hair_length = balanced(lengths, number, *stride[5])
    if age == "teenage" and hair_length == "bald":
        hair_length = "short"
    colour = "grey" if age == "elderly" else balanced(palette.HAIR_COLOURS, number, *stride[6])
    return Body(
        gender=gender,
        age=age,
        build=build,
        stature=stature,
        skin=skin,
        hair_length=hair_length,
        hair_colour="none" if hair_length == "bald" else colour,
        beard=gender == "man" and age != "teenage" and rng.chance(0.4),
        height={"short": 0.86, "average": 0.94, "tall": 1.02}[stature] + rng.between(-0.02, 0.02),
        girth={"slim": 0.84, "average": 1.03, "heavy": 1.3}[build] + rng.between(-0.05, 0.05),
        head=rng.between(0.95, 1.05) * (1.1 if age == "teenage" else 1.0),
        legs=rng.between(0.95, 1.05),
        shoulders=rng.between(0.95, 1.05) * (1.09 if gender == "man" else 0.93),
    )


def _outfits(config: SynthConfig, wardrobe: int, body: Body) -> tuple[Outfit, ...]:
    count = 2 if config.variant == "cloth-changing" else 1
    first = make_outfit(config.seed, wardrobe, body.gender, 0)
    if count == 1:
        return (first,)
    second = make_outfit(config.seed, wardrobe, body.gender, 1, unlike=first)
    return (first, second)


def make_outfit(seed: int, wardrobe: int, gender: str, which: int, *, unlike: Outfit | None = None) -> Outfit:
    """Return a set of clothes; types, colours and patterns are near uniform over consecutive wardrobe numbers.

    Args:
        seed: the configuration's seed.
        wardrobe: number of the wardrobe; equal numbers give equal clothes.
        gender: decides which garment types are possible.
        which: 0 or 1, the first or second outfit of the wardrobe.
        unlike: an outfit whose upper colour, upper type and lower colour must not be repeated.
    """
    rng = Draws(seed, OUTFIT, wardrobe, which)
    stride = [(seed, OUTFIT, 100 + factor, which) for factor in range(8)]
    uppers = palette.UPPER_TYPES + (("dress",) if gender == "woman" else ())
    upper_type = balanced(uppers, wardrobe, *stride[0])
    upper_colour = balanced(palette.UPPER_COLOURS, wardrobe, *stride[1])
    lower_colour = balanced(palette.LOWER_COLOURS, wardrobe, *stride[2])
    if unlike is not None:
        upper_type = rng.pick([name for name in uppers if name != unlike.upper_type])
        upper_colour = rng.pick([name for name in palette.UPPER_COLOURS if name != unlike.upper_colour])
        lower_colour = rng.pick([name for name in palette.LOWER_COLOURS if name != unlike.lower_colour])
    pattern = balanced(palette.PATTERNS, wardrobe, *stride[3])
    lower_type = _lower_type(rng, gender, upper_type, lower_colour)
    second = palette.second_colour(upper_colour, rng.below(6))
    return Outfit(
        outfit_id=f"outfit-{wardrobe:05d}-{which}",
        upper_type=upper_type,
        upper_colour=upper_colour,
        upper_pattern=pattern,
        upper_second=upper_colour if pattern == "plain" else second,
        lower_type=lower_type,
        lower_colour=lower_colour,
        shoe_type=balanced(palette.SHOE_TYPES, wardrobe, *stride[4]),
        shoe_colour=balanced(palette.SHOE_COLOURS, wardrobe, *stride[5]),
        inner_colour=rng.pick(("white", "grey", "black")),
    )


def _lower_type(rng: Draws, gender: str, upper_type: str, colour: str) -> str:
    if upper_type == "dress":
        return "leggings"
    options = ["trousers", "shorts"] + (["skirt", "leggings"] if gender == "woman" else ["trousers"])
    if colour in palette.DENIM_COLOURS:
        options += ["jeans", "jeans"]
    return rng.pick(options)
