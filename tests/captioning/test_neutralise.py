# ruff: noqa: E501
import random

import pytest
from sixstyles import person, write

from reidctl.captioning.neutralise import lexicon, neutralise


@pytest.mark.covers(125)
@pytest.mark.parametrize("style", range(6))
def test_two_people_in_one_style_give_the_same_neutral_text(style: int) -> None:
    first, second = random.Random(1), random.Random(2)
    one = person(first) | {"item": "a backpack"}
    other = person(second) | {"item": "an umbrella", "noun": "woman", "pronoun": "She", "own": "her"}
    # The same generator state makes the style choose the same connectives.
    assert neutralise(write(style, one, random.Random(5))) == neutralise(write(style, other, random.Random(5)))


@pytest.mark.covers(125)
def test_attribute_words_are_gone_and_form_words_stay() -> None:
    text = (
        "A tall, slim man of 30 appears to be wearing a pair of dark-blue jeans, a striped T-shirt and white sneakers."
    )
    neutral = neutralise(text).lower()
    for word in ("tall", "slim", "man", "30", "dark", "blue", "jeans", "striped", "shirt", "white", "sneakers"):
        assert word not in neutral.split()
    assert "appears to be wearing" in neutral


def test_one_token_per_word_without_collapsing() -> None:
    assert (
        neutralise("a red shirt and two black bags", collapse=False) == "a colour garment and number colour accessory"
    )


def test_plurals_and_compounds_are_found() -> None:
    known = lexicon()
    assert [known.find(word) for word in ("shoes", "dresses", "scarves", "dark-blue", "long-sleeved", "tree", "glasses")] == [
        "footwear", "garment", "accessory", "colour", "cut", None, "accessory",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "   ", "\x00", "<script>alert(1)</script>", "../../etc/passwd", "日本語の文", "🙂"]
)
def test_any_text_is_only_text(text: str) -> None:
    assert isinstance(neutralise(text), str)


@pytest.mark.covers(125)
@pytest.mark.parametrize(
    "word",
    ["sari", "kurta", "bandana", "earbuds", "clutch", "off-white", "tie-dye", "cashmere", "broad-shouldered", "balding",
     "portly", "high-waisted", "slip-on", "henley", "scrubs"],
)  # fmt: skip
def test_rarer_attribute_words_are_gone_too(word: str) -> None:
    assert word not in neutralise(f"A person with {word} is walking.").lower()


def test_case_follows_the_caption() -> None:
    assert neutralise("a man walks. a bag is red.")[0].islower()
    assert neutralise("A man walks.").startswith("Person")
