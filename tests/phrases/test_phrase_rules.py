"""The rules on captions whose phrases are known, and on what must not be a phrase."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from sentences import SENTENCES

from reidctl.phrases.base import PARTS, Phrase
from reidctl.phrases.rules import colours, extract, part_of, swap_attributes
from reidctl.synthped.captions import STYLES, captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.render import render

TRUE_PARTS = {"hair": "head", "face": "head", "hat": "head", "shoes": "feet"} | dict.fromkeys(
    ("bag", "umbrella", "phone"), "carried"
)
CONFIG = SynthConfig(people=40, clone_pairs=0, carry=0.9, captions_per_image=6)


def found(text, limit=8):
    return [(phrase.text, phrase.part) for phrase in extract(text, limit=limit)]


def texts(text):
    return [phrase.text for phrase in extract(text)]


@pytest.fixture(scope="module")
def written():
    return [text for person in range(30) for text in captions(CONFIG, render(CONFIG, person, 0))]


def overlaps(phrase, start, end):
    return phrase.start < end and start < phrase.end


@pytest.mark.covers(171)
@pytest.mark.parametrize("style", range(6), ids=STYLES)
def test_known_phrases_are_found_in_every_writing_style(written, style):
    counts = Counter()
    for caption in (text for text in written if text.style == style):
        phrases = extract(caption.text, limit=32)
        true = [span for span in caption.spans if span.part != "person"]
        for span in true:
            inside = re.sub("^an? ", "", caption.text[span.start : span.end])
            hits = [phrase for phrase in phrases if overlaps(phrase, span.start, span.end)]
            part = "whole" if inside.endswith("dress") else TRUE_PARTS.get(span.part, span.part)
            counts["true"] += 1
            counts["hit"] += bool(hits)
            counts["exact"] += [phrase.text for phrase in hits] == [inside]
            counts["part"] += [phrase.part for phrase in hits] == [part]
        counts["found"] += len(phrases)
        counts["right"] += sum(any(overlaps(phrase, span.start, span.end) for span in true) for phrase in phrases)
    assert counts["true"] > 80
    assert counts["hit"] >= 0.98 * counts["true"], "recall"
    assert counts["right"] >= 0.98 * counts["found"], "precision"
    assert counts["exact"] >= 0.95 * counts["true"]
    assert counts["part"] >= 0.95 * counts["true"]


@pytest.mark.covers(171)
def test_sentences_of_another_hand_give_what_a_reader_would_mark():
    counts = Counter()
    for text, wanted in SENTENCES:
        phrases = extract(text)
        spans = [(text.index(words), text.index(words) + len(words)) for words, _ in wanted]
        counts["true"] += len(wanted)
        counts["hit"] += sum(any(overlaps(phrase, *span) for phrase in phrases) for span in spans)
        counts["same"] += sum(pair in found(text) for pair in wanted)
        counts["found"] += len(phrases)
        counts["right"] += sum(any(overlaps(phrase, *span) for span in spans) for phrase in phrases)
    assert counts["hit"] >= 0.95 * counts["true"], "recall"
    assert counts["right"] >= 0.95 * counts["found"], "precision"
    assert counts["same"] >= 0.9 * counts["true"]


def test_phrases_are_pieces_of_the_caption_in_order_and_never_twice(written):
    for caption in written:
        phrases = extract(caption.text)
        assert all(caption.text[phrase.start : phrase.end] == phrase.text for phrase in phrases)
        assert all(one.end <= two.start for one, two in pairwise(phrases))
        assert len({phrase.text.casefold() for phrase in phrases}) == len(phrases) <= 8
        assert all(phrase.part in PARTS for phrase in phrases)


@pytest.mark.covers(171)
@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a turquoise serape", ("turquoise serape", "whole")),
        ("He is wearing a fascinator.", ("fascinator", "whole")),
        ("She carries a wooden didgeridoo.", ("wooden didgeridoo", "carried")),
        ("with a green fez on his head", ("green fez", "head")),
        ("Upper: red ruana; Lower: none", ("red ruana", "upper")),
        ("in a purple zimarra over blue jeans", ("purple zimarra", "whole")),
    ],
)
def test_nouns_that_no_list_has_are_kept(text, phrase):
    assert phrase in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "The man is walking to the left.",
        "A picture of a person who looks at us from behind.",
        "She has her hands in her pockets and turns her head.",
        "He is standing on the right side of the street near a tall building.",
        "They walk in the middle of the road on a long escalator.",
        "A man with no hat and without a bag, not wearing a jacket. He doesn't have an umbrella.",
        "",
        " \n,,;; -- 12 % ",
        "她穿着红色的衬衫",
    ],
)
def test_people_places_actions_and_what_is_not_there_are_no_phrases(text):
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a shirt with white stripes and a red collar", ["shirt with white stripes and a red collar"]),
        ("a black, grey and white backpack", ["black, grey and white backpack"]),
        ("a pair of dark brown leather boots", ["dark brown leather boots"]),
        ("His trousers are black and white.", ["trousers are black and white"]),
        ("The shirt is white and black pants are worn with it.", ["shirt is white", "black pants"]),
        ("Shoes: white; Top: black and white striped shirt", ["Shoes: white", "black and white striped shirt"]),
        ("Male, 30s, blk hoodie, lt blue jeans, wht sneakers", ["blk hoodie", "lt blue jeans", "wht sneakers"]),
        ("girl pink t-shirt denim skirt white flip flops", ["pink t-shirt", "denim skirt", "white flip flops"]),
        ("a woman in jeans, Jeans and jeans", ["jeans"]),
        ("red shoes, blue shoes", ["red shoes", "blue shoes"]),
        ("a long-sleeved, light-blue button down shirt", ["long-sleeved, light-blue button down shirt"]),
        ("She is tall, slim and wears black tights.", ["black tights"]),
    ],
)
def test_phrases_end_where_they_should(text, wanted):
    assert texts(text) == wanted


def test_the_first_phrases_count_when_there_are_too_many():
    text = "red hat, blue scarf, green coat, black belt"
    assert [phrase.text for phrase in extract(text, limit=2)] == ["red hat", "blue scarf"]


def test_many_thousand_words_are_read_in_one_pass():
    assert found("very dark blue and " * 5_000 + "hat")[0][1] == "head"
    assert len(extract("red wugs blargs " * 10_000, limit=32)) <= 32


@pytest.mark.parametrize(
    ("phrase", "part"),
    [
        ("a pair of knee-high boots", "feet"),
        ("the hat", "head"),
        ("wugs", "whole"),
        ("shirt with stripes", "upper"),
        ("hair", "head"),
    ],
)
def test_the_part_of_a_phrase_is_that_of_its_noun(phrase, part):
    assert part_of(phrase) == part


def test_colours_of_several_words_are_one():
    text = "a Dark blue coat, navy blue jeans, cream-colored socks, a black-and-white cap and a dark bag"
    assert [word for _, _, word in colours(text)] == ["dark blue", "navy blue", "cream-colored"]
    assert all(text[start:end].lower() == word for start, end, word in colours(text))


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("red shirt and black trousers", "black shirt and red trousers"),
        ("an orange coat and a black hat", "a black coat and an orange hat"),
        ("Red shirt, dark blue jeans.", "Dark blue shirt, red jeans."),
        ("His pants are black, his hat is red.", "His pants are red, his hat is black."),
        ("grey shirt, gray trousers, white shoes", "white shirt, gray trousers, grey shoes"),
        ("black and white shirt, red shorts, green socks", "black and white shirt, green shorts, red socks"),
        ("red shirt, black trousers, red bag", "black shirt, red trousers, red bag"),
    ],
)
def test_a_swap_exchanges_the_colours_of_two_parts(text, swapped):
    assert swap_attributes(text, extract(text)) == swapped


@pytest.mark.parametrize(
    "text",
    ["red shirt", "red shirt and red trousers", "red shirt under a black jacket", "striped shirt and black shorts", ""],
)
def test_there_is_no_swap_without_two_parts_of_different_colour(text):
    assert swap_attributes(text, extract(text)) is None


def test_phrases_that_are_not_in_the_caption_are_not_swapped():
    phrases = [Phrase("red shirt", 0, 0, "upper"), Phrase("black shoes", 0, 0, "feet")]
    assert swap_attributes("a red shirt, black shoes", phrases) is None


def test_swapping_changes_no_other_word(written):
    swapped = [(text.text, swap_attributes(text.text, extract(text.text))) for text in written]
    changed = [(one, two) for one, two in swapped if two is not None]
    assert len(changed) > len(written) / 2

    def bag(text):
        return Counter(word for word in re.findall(r"[\w-]+", text.lower()) if word not in ("a", "an"))

    assert all(one != two and bag(one) == bag(two) for one, two in changed)
