"""Six known writing styles over random people, for the tests of style discovery."""

# ruff: noqa: E501
import random

COLOURS = ("red", "navy blue", "black", "light grey", "dark green", "white", "orange")
UPPERS = ("t-shirt", "hooded sweatshirt", "jacket", "blouse", "striped polo shirt", "long-sleeved sweater", "coat")
LOWERS = ("jeans", "trousers", "shorts", "cargo pants", "leggings")
SHOES = ("sneakers", "boots", "sandals", "leather shoes")
CARRIED = ("", "", "a backpack", "a brown handbag", "an umbrella")


def person(rng: random.Random) -> dict[str, str]:
    male = rng.random() < 0.5
    return {
        "noun": "man" if male else "woman",
        "pronoun": "He" if male else "She",
        "own": "his" if male else "her",
        "age": rng.choice(("young", "middle-aged", "elderly")),
        "build": rng.choice(("slim", "stocky", "average")),
        "hair": rng.choice(("short black", "long blond", "curly brown", "short grey")),
        "top": f"{rng.choice(COLOURS)} {rng.choice(UPPERS)}",
        "low": f"{rng.choice(COLOURS)} {rng.choice(LOWERS)}",
        "shoe": f"{rng.choice(COLOURS)} {rng.choice(SHOES)}",
        "item": rng.choice(CARRIED),
    }


def an(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def write(style: int, p: dict[str, str], rng: random.Random) -> str:
    item = p["item"]
    if style == 0:
        return f"{p['age']} {p['noun']}, {p['hair']} hair, {p['top']}, {p['low']}, {p['shoe']}" + (
            f", {item.split(' ', 1)[1]}" if item else ""
        )
    if style == 1:
        tail = f" {p['pronoun']} carries {item}." if item else ""
        return (
            f"{an(p['age']).capitalize()} {p['noun']} with {p['hair']} hair is walking. {p['pronoun']} wears {an(p['top'])}, "
            f"{p['low']} and {p['shoe']}.{tail}"
        )
    if style == 2:
        seems = rng.choice(("appears to be", "seems to be"))
        tail = f", and possibly carrying {item}" if item else ""
        return (
            f"The person {seems} {an(p['age'])} {p['noun']}, probably with {p['hair']} hair, who might be wearing "
            f"{an(p['top'])} and perhaps {p['low']}{tail}."
        )
    if style == 3:
        tail = f" The look is nicely completed by {item}." if item else ""
        return (
            f"This {rng.choice(('stylish', 'elegant'))} {p['noun']} shows off beautiful {p['hair']} hair, while {p['own']} very "
            f"fashionable {p['top']} is neatly paired with a striking pair of {p['low']}, tastefully finished together with "
            f"{p['shoe']}.{tail}"
        )
    if style == 4:
        tail = f" Carried: {item}." if item else ""
        return f"Gender: {p['noun']}. Age: {p['age']}. Hair: {p['hair']}. Upper: {p['top']}. Lower: {p['low']}. Shoes: {p['shoe']}.{tail}"
    tail = f" Check for {item}!" if item else ""
    return f"Look for {an(p['age'])} {p['noun']} in {an(p['top'])} and {p['low']}!{tail}"


def captions(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    truth = [index % 6 for index in range(count)]
    return [write(style, person(rng), rng) for style in truth], truth
