"""What people can wear, carry and look like, and the colours these are painted in."""

Colour = tuple[float, float, float]

GENDERS = ("man", "woman")
AGES = ("teenage", "adult", "elderly")
BUILDS = ("slim", "average", "heavy")
STATURES = ("short", "average", "tall")
SKINS = ("pale", "light", "tan", "brown", "dark")
HAIR_LENGTHS = ("bald", "short", "bob", "long")
HAIR_COLOURS = ("black", "brown", "blonde", "red")  # and grey for the elderly

UPPER_TYPES = ("t-shirt", "shirt", "hoodie", "jacket", "coat", "sweater", "tank top")  # and dress, for women
UPPER_COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
PATTERNS = ("plain", "striped", "vertically striped", "checked", "dotted", "two-tone")
LOWER_COLOURS = ("black", "white", "grey", "blue", "brown", "green", "beige", "red")
DENIM_COLOURS = ("black", "white", "grey", "blue")
SHOE_TYPES = ("trainers", "boots", "leather shoes", "sandals")
SHOE_COLOURS = ("black", "white", "brown", "grey", "red", "blue")
CARRIED = ("backpack", "handbag", "shoulder bag", "umbrella", "phone", "cap")
CARRIED_COLOURS = ("black", "red", "blue", "green", "brown", "yellow", "pink", "grey")
VIEWS = ("front", "back", "left side", "right side")  # "left side": the person's left side is towards the camera

# The named part that each carried object belongs to in the parts table.
OBJECT_PART = {
    "backpack": "bag",
    "handbag": "bag",
    "shoulder bag": "bag",
    "umbrella": "umbrella",
    "phone": "phone",
    "cap": "hat",
}

CLOTH: dict[str, dict[str, Colour]] = {
    "a": {
        "black": (34, 34, 38),
        "white": (232, 232, 230),
        "grey": (132, 134, 138),
        "red": (196, 40, 42),
        "orange": (232, 128, 34),
        "yellow": (232, 206, 58),
        "green": (52, 130, 66),
        "blue": (44, 82, 172),
        "purple": (112, 56, 144),
        "pink": (232, 140, 176),
        "brown": (112, 72, 44),
        "beige": (206, 186, 148),
    },
    "b": {
        "black": (42, 40, 40),
        "white": (220, 218, 210),
        "grey": (142, 140, 134),
        "red": (166, 44, 56),
        "orange": (206, 118, 54),
        "yellow": (212, 188, 88),
        "green": (72, 122, 96),
        "blue": (62, 96, 150),
        "purple": (104, 70, 126),
        "pink": (212, 144, 158),
        "brown": (104, 76, 58),
        "beige": (196, 176, 144),
    },
    "c": {
        "black": (26, 26, 34),
        "white": (244, 244, 250),
        "grey": (120, 126, 136),
        "red": (216, 52, 40),
        "orange": (248, 148, 44),
        "yellow": (246, 226, 92),
        "green": (34, 148, 92),
        "blue": (52, 108, 208),
        "purple": (136, 72, 182),
        "pink": (246, 158, 196),
        "brown": (130, 82, 46),
        "beige": (222, 204, 164),
    },
}
SKIN: dict[str, Colour] = {
    "pale": (240, 206, 186),
    "light": (222, 178, 146),
    "tan": (192, 142, 104),
    "brown": (144, 96, 64),
    "dark": (94, 62, 44),
}
HAIR: dict[str, Colour] = {
    "black": (30, 26, 26),
    "brown": (88, 56, 34),
    "blonde": (214, 176, 96),
    "red": (164, 76, 34),
    "grey": (172, 172, 174),
    "none": (60, 50, 44),
}


def second_colour(colour: str, choice: int) -> str:
    """The colour that a pattern combines with this one: visibly lighter or darker, never the same."""
    dark = ("black", "blue", "brown", "purple", "green")
    options = ("white", "yellow", "pink") if colour in dark else ("black", "blue", "brown")
    usable = [option for option in options if option != colour]
    return usable[choice % len(usable)]
