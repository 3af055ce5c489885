import re

import pytest

from reidctl.errors import DataError, UsageError
from reidctl.evaluation.paraphrase import STYLES, TRUTH_STYLES, paraphrase, rewrite_synthped
from reidctl.synthped.captions import captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.render import render

CAPTION = "A tall man with short hair, wearing a grey hoodie, navy jeans and sneakers, carrying a backpack."


def test_keywords_keep_content_negation_and_place():
    assert paraphrase("The man has no hat, and a coat over his shirt.", "keywords") == "man no hat coat over shirt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A pronoun gives way to whom it means, and is left out only where another word tells the gender.
        ("He is wearing a white shirt.", "man wearing white shirt"),
        ("Her bag is white.", "her bag white"),
        ("She has her coat on.", "woman coat on"),
        ("The boy runs. He has a cap on his head.", "boy runs boy cap on head"),
        ("A man with a boy. He wears a hat.", "man with boy man wears hat"),
        ("A child in red. He’s running.", "child in red boy running"),
        ("A man holds her bag, a woman waits.", "man holds her bag woman waits"),
        # Places and relations stay.
        ("A woman stands next to him.", "woman stands next to man"),
        ("A man walks behind her, slowly.", "man walks behind woman slowly"),
        ("A man is seen from behind.", "man seen from behind"),
        ("A man walks with a woman.", "man walks with woman"),
        ("It has a strap, he is holding it.", "strap man holding it"),
        ("Blue or black shoes, accompanied by a boy", "blue or black shoes accompanied by boy"),
    ],
)
def test_keywords_keep_gender_and_who_is_where(text, expected):
    assert paraphrase(text, "keywords") == expected


def test_a_request_quotes_the_whole_caption():
    assert paraphrase(CAPTION, "request") == f"Find the person who fits this description: a{CAPTION[1:]}"
    assert paraphrase("Nike shirt, a man.", "request").endswith(": Nike shirt, a man.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man walks. He wears a hat.", "He wears a hat. A man walks."),
        ("Person: slim man; Top: red shirt", "Top: red shirt; Person: slim man"),
        ("A man, wearing a hat, carrying a bag.", "Carrying a bag, wearing a hat, a man."),
        ("A woman, and she has a bag.", "She has a bag, a woman."),
        # A list of things, or of colours, is no clause: taken apart it would say something else.
        ("A man in red, white and blue shorts.", "A man in red, white and blue shorts."),
        ("A man, who has a bag, is seen.", "A man, who has a bag, is seen."),
    ],
)
def test_reordered_moves_whole_sentences_and_clauses(text, expected):
    assert paraphrase(text, "reordered") == expected


@pytest.mark.parametrize(
    "text",
    [
        # What points back must not come first.
        "Her bag is white. It has a black strap.",
        "A man has two bags. The left one is red.",
        "A woman wears a coat. Under that she wears jeans.",
        "A man stands here. This person wears a hat.",
        "Shoes: white; Socks: the same colour",
        # A clause inside a sentence is not one at its end.
        "A man, wearing a red coat, walks past.",
        "A man, wearing a red coat, slowly jogs along the street.",
        # It may belong to somebody else.
        "A girl, carrying a red purse, and a boy wearing a blue cap.",
        "A girl with a purse and a boy, wearing a blue cap.",
        "A bag, and a coat, wearing jeans.",
        "A man in a shirt, with a logo.",
    ],
)
def test_reordered_leaves_alone_what_would_say_something_else(text):
    assert paraphrase(text, "reordered") == text


@pytest.mark.parametrize("style", ["reordered", "plain-case", "keywords"])
def test_these_styles_add_no_word(style):
    before, after = (re.findall(r"[\w-]+", text.lower()) for text in (CAPTION, paraphrase(CAPTION, style)))
    assert set(after) <= set(before)
    if style != "keywords":
        assert sorted(after) == sorted(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An elderly man in a grey hoodie.", "An old guy in a gray hooded sweatshirt."),
        ("A person in trousers.", "An individual in pants."),
        ("An individual with a purse.", "A person with a handbag."),
        ("A teenage boy.", "An adolescent boy."),
        ("a pair of navy blue jeans", "a pair of dark blue denim trousers"),
        ("She wears a maroon coat.", "She is wearing a dark red coat."),
        # Other senses, names and words inside words stay.
        ("a dark maroon coat", "a dark maroon coat"),
        ("He checked a light top with an orange tie.", "He checked a light top with an orange tie."),
        ("denim jeans, slim-fit slim jeans", "jeans, slim-fit slim denim trousers"),
        ("blonde hair on a blonde boy", "fair hair on a blonde boy"),
        ("a jumper dress under a jumper", "a jumper dress under a sweater"),
        ("Person: slim man", "Person: slender guy"),
        ("two glasses of water", "two glasses of water"),
        ("the Guy logo", "the Guy logo"),
        ("a phone booth and a mobile phone", "a phone booth and a cell phone"),
    ],
)
def test_synonyms_mind_articles_and_senses(text, expected):
    assert paraphrase(text, "synonyms") == expected


def test_plain_case_has_neither_capitals_nor_punctuation():
    assert paraphrase("A man's T-shirt, 1.80 m; red!", "plain-case") == "a man's t-shirt 1.80 m red"


@pytest.mark.parametrize("style", STYLES)
def test_nothing_comes_out_empty_and_the_rules_are_no_lottery(style):
    for text in (CAPTION, "", "...", "and the", "He is."):
        assert paraphrase(text, style) == paraphrase(text, style)
        assert bool(paraphrase(text, style)) or not text


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(UsageError) as error:
        paraphrase("a", "pirate")
    assert "synonyms" in str(error.value.hint)


CONFIG = SynthConfig(people=5, images_per_person=2, size=(64, 32), captions_per_image=3)


def written():
    rows = []
    for person in range(3):
        for image in range(2):
            picture = render(CONFIG, person, image)
            name = f"synthped-a-{person:04d}-c{picture.shot.camera}-{image:02d}"
            rows += [(name, f"style-{found.style}", found.text) for found in captions(CONFIG, picture)]
    return rows


def test_synthped_is_rewritten_with_the_same_content_in_each_of_its_styles():
    images, styles, texts = zip(*written(), strict=True)
    found = rewrite_synthped(CONFIG, images, styles, texts)
    assert tuple(found) == TRUTH_STYLES
    for row, (style, text) in enumerate(zip(styles, texts, strict=True)):
        assert found[TRUTH_STYLES[int(style[-1])]][row] == text
    # What one annotator mentions, every style mentions: the colours of a caption are those of its plain sentence.
    colours = re.compile(r"\b(?:black|white|red|blue|green|yellow|orange|purple|pink|brown|beige|navy|gr[ae]y)\b")
    for plain, report in zip(found["plain-sentence"], found["police-report"], strict=True):
        assert sorted(colours.findall(plain)) == sorted(colours.findall(report))


@pytest.mark.parametrize("change", ["text", "style", "image"])
def test_captions_that_synthped_did_not_write_are_refused(change):
    image, style, text = written()[0]
    row = {
        "text": (image, style, text + " And more."),
        "style": (image, None, text),
        "image": ("other-0", style, text),
    }[change]
    with pytest.raises(DataError, match="synthped"):
        rewrite_synthped(CONFIG, *([value] for value in row))
