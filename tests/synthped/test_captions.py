"""Captions: grammar, six styles, exact spans, and nothing that cannot be seen."""

import re

import pytest

from reidctl.synthped import words
from reidctl.synthped.captions import STYLES, caption, captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws
from reidctl.synthped.palette import CARRIED
from reidctl.synthped.render import render

CONFIG = SynthConfig(people=40, clone_pairs=0, carry=0.9)
PICTURES = [render(CONFIG, person, image) for person in range(12) for image in range(4)]
WRITTEN = [(picture, text) for picture in PICTURES for text in captions(CONFIG, picture)]


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("orange coat", "an orange coat"),
        ("umbrella", "an umbrella"),
        ("red shirt", "a red shirt"),
        ("blue jeans", "blue jeans"),
        ("long black hair", "long black hair"),
        ("elderly man", "an elderly man"),
        ("black bob haircut", "a black bob haircut"),
    ],
)
def test_articles_follow_the_sound_and_spare_plurals(phrase, expected):
    assert words.article(phrase) == expected


def test_spans_are_the_phrases_they_claim():
    for picture, text in WRITTEN:
        for span in text.spans:
            phrase = text.text[span.start : span.end]
            assert phrase == phrase.strip()
            assert phrase
            last = phrase.split()[-1].lower()
            if span.part == "person":
                assert last in ("man", "woman", "boy", "girl")
            if span.part == "lower":
                assert last in ("trousers", "pants", "jeans", "shorts", "skirt", "leggings", "tights")
            assert span.part in picture.visible


def test_captions_name_only_objects_that_can_be_seen():
    names = {kind: words.SYNONYMS.get(kind, (kind,)) for kind in CARRIED}
    for picture, text in WRITTEN:
        seen = {item.kind for item in words.visible_items(picture)}
        for kind, synonyms in names.items():
            if any(re.search(rf"\b{word}\b", text.text) for word in synonyms):
                assert kind in seen


def test_beards_and_front_views_are_not_told_from_behind():
    for picture, text in WRITTEN:
        if picture.shot.view == "back":
            assert "beard" not in text.text
            assert "from the front" not in text.text


@pytest.mark.covers(127)
def test_each_style_has_a_form_of_its_own():
    picture = PICTURES[5]
    texts = [caption(picture, style, Draws(1, style)).text for style in range(len(STYLES))]
    keywords, plain, narrative, listed, witness, police = texts
    assert not re.search(r"[.,;:]", keywords)
    assert plain.count(".") == 1
    assert plain.endswith(".")
    assert len(narrative) > 1.4 * len(plain)
    assert listed.startswith("Person: ")
    assert "; " in listed
    assert re.search(r"think|appears|can tell", witness)
    assert police.startswith("Subject is ")
    assert police.count("Subject") >= 2


def test_all_six_styles_occur_and_an_image_never_repeats_one():
    assert {text.style for _, text in WRITTEN} == set(range(6))
    for picture in PICTURES:
        styles = [text.style for text in captions(CONFIG, picture)]
        assert len(set(styles)) == len(styles) == 2


def test_annotators_leave_things_out():
    told = [any(span.part == "shoes" for span in text.spans) for _, text in WRITTEN]
    assert 0.2 < sum(told) / len(told) < 0.9


@pytest.mark.covers(19)
def test_sides_in_captions_are_the_true_ones():
    checked = 0
    for picture, text in WRITTEN:
        for side in re.findall(r"in (?:his|her) (left|right) hand", text.text):
            checked += 1
            assert side in {item.side for item in picture.shot.items}
    assert checked > 3


def test_grammar_has_no_double_spaces_or_wrong_articles():
    for _, text in WRITTEN:
        assert "  " not in text.text
        assert not re.search(r"\b[Aa] [aeio]", text.text), text.text
        assert not re.search(r"\b[Aa]n [^aeiou]", text.text), text.text
        assert not re.search(r"\ban? \w+ (?:trousers|jeans|shorts|leggings|boots|trainers)\b", text.text), text.text


@pytest.mark.covers(135)
def test_identity_texts_name_no_clothing_and_clothing_texts_no_body():
    for picture in PICTURES:
        identity, clothing = words.identity_text(picture), words.clothing_text(picture)
        assert picture.shot.outfit.upper_type not in identity
        assert not re.search(r"hair|carry", identity)
        assert not re.search(r"\b(?:man|woman|boy|girl|build|height)\b", clothing)
