import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sixstyles import captions

from reidctl.captioning.config import CaptionConfig, CheckConfig
from reidctl.captioning.form import Form
from reidctl.captioning.grammar import REPAIR_LIMIT
from reidctl.captioning.language import body_words, ethnic_words, hair_words
from reidctl.captioning.neutralise import lexicon, neutralise
from reidctl.captioning.prompts import neutral_prompt
from reidctl.captioning.validation import (
    CODES,
    agreement,
    attribute_coverage,
    check_neutral,
    check_reply,
    clean,
    clothing_words,
)

CONFIG = CaptionConfig()
IDENTITY = "The person is a young man with a slim build and tall stature."
CLOTHING = "The person is wearing a red shirt, blue trousers and white sneakers."


def reasons(text: str, kind: str = "identity", config: CaptionConfig = CONFIG, **options: object) -> str:
    return "; ".join(check_reply(text, kind, config, **options).reasons)  # type: ignore[arg-type]


def test_good_texts_pass() -> None:
    assert check_reply(IDENTITY, "identity", CONFIG).ok
    assert check_reply(CLOTHING, "clothing", CONFIG).ok


@pytest.mark.covers(134)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  \x00 ", "empty"),
        ("A man.", "fewer than"),
        ("The person is a young man of slim build " * 20 + ".", "more than"),
        ("I'm sorry, but I can't assist with identifying the young man of slim build.", "refusal"),
        ("El hombre joven tiene una constitución delgada y una estatura alta y camina.", "not in English"),
        ("这个人是一个年轻的男人", "not in English"),
        ("The person is a young man with a slim build and tall", "breaks off"),
        ("of slim build and a young man is the person.", "does not begin"),
        ("<b>The person</b> is a young man with a slim build.", "markup"),
        ("The person is a young man (with a slim build.", "do not match"),
        ("A young slim man. A young slim man. A young slim man.", "repeats itself"),
        ("The person is walking along a street with trees.", "does not mention gender, age, build"),
        ("The person is a young asian man with a slim build.", "ethnicity"),
        ("The person is a young black man with a slim build.", "ethnicity"),
        ("The person is a young man with short black hair and a slim build.", "hair"),
    ],
)
def test_planted_faults_are_named(text: str, reason: str) -> None:
    assert reason in reasons(text)


@pytest.mark.covers(135)
@pytest.mark.parametrize("word", ["a red jacket", "jeans", "sneakers", "carrying a bag", "a cotton top", "glasses"])
def test_clothing_in_an_identity_text_is_caught(word: str) -> None:
    assert "mentions clothing" in reasons(f"The person is a young man of slim build with {word}.")
    assert check_reply(f"A young man of slim build, {word}.", "identity", CONFIG).clothing_words


@pytest.mark.covers(135)
def test_everyday_meanings_are_no_clothing() -> None:
    assert clothing_words("Seen from top to bottom, he likes to watch and is tall.") == []
    assert clothing_words("He wears a top.") == ["wears", "top"]


def test_an_echo_of_the_prompt_is_caught() -> None:
    prompt = "Describe the person's identity: gender presentation, age group, build and stature."
    echo = "The person's identity gender presentation age group build and stature of a young man."
    assert "repeats the prompt" in reasons(echo, prompt=prompt)
    assert "repeats the prompt" not in reasons(IDENTITY, prompt=prompt)


@pytest.mark.covers(134)
def test_coverage_is_the_share_of_expected_slots() -> None:
    assert attribute_coverage("a young man", "identity") == (pytest.approx(2 / 3), ["build"])
    assert attribute_coverage("a red shirt", "clothing") == (1.0, [])
    # Nothing is known of the build, so it is not expected.
    assert attribute_coverage("a young man", "identity", {"gender": "man", "age": "young"}) == (1.0, [])


def test_sensitive_and_hair_options_open_what_they_name() -> None:
    assert check_reply("A young asian man of slim build walks.", "identity", CaptionConfig(sensitive=True)).ok
    assert check_reply("A young man with black hair and slim build.", "identity", CaptionConfig(hair="identity")).ok
    assert "hair" in reasons("A person with black hair in a red shirt.", "clothing", CaptionConfig(hair="drop"))


@pytest.mark.covers(133)
def test_length_bounds_come_from_the_config() -> None:
    short = CaptionConfig(check=CheckConfig(min_words=4, max_words=8))
    assert "more than 8" in reasons(IDENTITY, config=short)


def test_notes_need_no_full_stop_and_sentences_get_theirs_only_when_they_are_complete() -> None:
    notes = check_reply("young man, slim build", "identity", CONFIG, form=Form(fragments=True, lower=True))
    assert notes.ok and notes.text == "young man, slim build" and notes.repairs == ()
    complete = check_reply("the person is a young man of slim build", "identity", CONFIG, form=Form())
    assert complete.ok and complete.text == "The person is a young man of slim build."
    assert complete.repairs == ("capital", "full stop")
    assert "breaks off" in reasons("The person is a young man of slim build and wears a blue", form=Form())


def test_clean_strips_what_is_not_text() -> None:
    assert clean('```\n"A \u202eman\x00 walks."\n```') == "A man walks."
    assert clean("- **A man** walks.\n- He is tall.") == "A man walks. He is tall."


def test_repairs_are_named_and_touch_no_word_of_the_description() -> None:
    verdict = check_reply(f"Sure! Here is the description:\n\n**{IDENTITY}**", "identity", CONFIG)
    assert verdict.ok and verdict.text == IDENTITY
    assert verdict.repairs == ("emphasis", "line breaks", "preamble")
    assert check_reply(IDENTITY, "identity", CONFIG).repairs == ()


def test_what_is_inside_a_text_is_never_repaired() -> None:
    for text in ("A young man, I hope this helps, of slim build.", "A 'red' shirt and a \"blue\" one are worn."):
        assert clean(text) == text


@pytest.mark.covers(134)
def test_codes_stand_beside_reasons() -> None:
    verdict = check_reply("A black man in a red jacket, I'm sorry", "identity", CONFIG)
    assert verdict.codes == ("refusal", "cut-off", "clothing-in-identity", "sensitive", "coverage")
    assert len(verdict.codes) == len(verdict.reasons) and set(verdict.codes) <= set(CODES)
    assert "jacket" in verdict.reasons[2] and "black man" in verdict.reasons[3].lower()


@pytest.mark.covers(135)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("at the top of the frame, facing the camera", []),
        ("he wears a smile and carries himself well", []),
        ("he wears a short beard and carries some extra weight", []),
        ("his hair is worn long", []),
        ("hooded eyes, a belt of trees, broad-shouldered and heavy-set", ["belt"]),
        ("a hooded figure, barefoot, dressed casually", ["hooded", "barefoot", "dressed"]),
        ("a man in black, in a suit and tie", ["suit", "black"]),
        ("she holds a camera and a walking stick", ["camera", "walking stick"]),
        ("wears a smile and a hat", ["hat"]),
    ],
)
def test_clothing_words_depend_on_their_neighbours(text: str, words: list[str]) -> None:
    assert clothing_words(text) == words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a black man's coat, a brown man bag and a white shirt", False),
        ("an Indian kurta with Chinese characters and an African print", False),
        ("skin-tight leggings, bare skin visible, race number 12", False),
        ("the text 'AFRICA' on a shirt", False),
        ("a black man", True),
        ("an Indian woman in a kurta", True),
        ("the man is white", True),
        ("a woman of mixed race", True),
        ("his skin is fair", True),
        ("a light-skinned boy", True),
    ],
)
def test_ethnic_words_are_about_people(text: str, found: bool) -> None:
    assert bool(ethnic_words(text)) is found


def test_hair_words_leave_out_hair_ties_and_in_clothing_texts_trimmings() -> None:
    assert hair_words("a hair tie and a suede jacket with a fringe", strict=False) == []
    assert hair_words("a fringe, a dark-haired and bald head, a buzz cut", strict=True) == [
        "buzz cut", "fringe", "dark-haired", "bald",
    ]  # fmt: skip


def test_body_words_are_not_the_sizes_of_garments() -> None:
    assert body_words("a long slim coat and short jeans") == []
    assert body_words("a tall slim man in a long coat of heavy build") == ["tall", "slim", "man", "build"]


def test_what_cannot_be_seen_is_not_covered() -> None:
    text = "The person is a woman, her age cannot be determined, the build is unclear."
    assert attribute_coverage(text, "identity") == (pytest.approx(1 / 3), ["age", "build"])
    assert attribute_coverage("A man of 1.80 m in his 30s.", "identity") == (1.0, [])
    assert attribute_coverage("A man, aged 35, about 80 kg.", "identity") == (1.0, [])


SYNTHPED = {
    "gender": "woman", "age": "elderly", "build": "slim", "upper_type": "hoodie", "upper_colour": "grey",
    "upper_pattern": "striped", "lower_type": "jeans", "lower_colour": "blue",
}  # fmt: skip
MARKET = {
    "gender": "1",
    "age": "3",
    "up": "2",
    "down": "1",
    "clothes": "2",
    "upred": "2",
    "upblack": "1",
    "downblack": "2",
}


@pytest.mark.covers(134)
@pytest.mark.parametrize(
    ("text", "kind", "attributes", "counts"),
    [
        ("An old woman of slim build.", "identity", SYNTHPED, (2, 0)),
        ("A young man of slim build.", "identity", SYNTHPED, (0, 2)),
        ("A lady in her 70s.", "identity", SYNTHPED, (2, 0)),
        ("A person.", "identity", SYNTHPED, (0, 0)),
        ("A man in his thirties.", "identity", MARKET, (2, 0)),
        ("A boy or a girl, a teenager.", "identity", MARKET, (0, 1)),
        ("A gray striped sweatshirt and navy-blue pants.", "clothing", SYNTHPED, (4, 0)),
        ("The hoodie is grey, the jeans are blue, and the shoes are red.", "clothing", SYNTHPED, (4, 0)),
        ("A white hoodie with blue stripes, black shorts and grey shoes.", "clothing", SYNTHPED, (1, 3)),
        ("A grey hoodie.", "clothing", SYNTHPED, (2, 0)),
        ("A red dress.", "clothing", SYNTHPED, (0, 0)),
        ("A crimson t-shirt and black slacks.", "clothing", MARKET, (4, 0)),
        ("A black shirt and red shorts.", "clothing", MARKET, (1, 3)),
        ("A grey hoodie.", "clothing", {}, (0, 0)),
    ],
)
def test_agreement_counts_what_the_text_says_right_and_wrong(
    text: str, kind: str, attributes: dict[str, str], counts: tuple[int, int]
) -> None:
    assert agreement(text, kind, attributes) == counts


CAPTION = "A tall man with short black hair wears a red jacket, blue jeans and white shoes."


@pytest.mark.covers(125)
def test_a_neutral_reply_loses_what_the_model_left() -> None:
    model = check_neutral("A some person with some hair wears some jacket, blue garment and some footwear.", CAPTION)
    assert model.ok and model.clothing_words == ("blue", "jacket")
    for word in ("tall", "man", "jacket", "blue", "jeans", "white", "shoes"):
        assert word not in model.text.lower().split()
    assert model.coverage == pytest.approx(1 - 2 / 10)  # tall man short black red jacket blue jeans white shoes
    assert check_neutral(CAPTION, CAPTION).text == neutralise(CAPTION)
    assert check_neutral(CAPTION, CAPTION).coverage == 0.0
    assert check_neutral("[person] with [hair] wears [garment] and [footwear].", CAPTION).ok


@pytest.mark.parametrize("text", captions(60)[0])
def test_an_accepted_neutral_text_is_accepted_again_unchanged(text: str) -> None:
    # A stored reply is judged again when the checks change.
    first = check_neutral(text, text)
    again = check_neutral(first.text, text)
    assert first.ok and again.ok and again.text == first.text


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("", "empty"),
        ("I'm sorry, I can't rewrite that.", "refusal"),
        ("Person.", "length"),
        ("a person wears some garment and " * 20, "length"),
        ("garment " * 20_000, "length"),
        ("Rewrite the quoted description so that it could be about anybody.", "echo"),
        ("Keep all other words, the punctuation, the order of the parts.", "echo"),
        ("Eine Person mit Haaren trägt ein Kleidungsstück und Schuhe, die mit der Hose passt.", "language"),
        ("<b>Some person</b> wears some garment and some footwear.", "markup"),
    ],
)
def test_faulty_neutral_replies_are_refused(reply: str, code: str) -> None:
    assert code in check_neutral(reply, CAPTION, prompt=neutral_prompt(CAPTION, CONFIG, model="m").text).codes


def test_the_caption_itself_is_no_echo_of_the_prompt() -> None:
    spaced = CAPTION.replace(" with", "  with")
    assert check_neutral(CAPTION, spaced, prompt=neutral_prompt(spaced, CONFIG, model="m").text).ok


ANYTHING = st.text(st.characters(exclude_categories=()), max_size=300)
PARTS = [
    "Sure! ", "Here is a description: ", "Answer:", "```", "**", "*", "__", "- ", "\n", "# A\n", '"', "'", "“", "”",
    "{", '{"a": "', '"}', "A young man. ", " I hope this helps!", " Let me know.", "</s>", "<|im_end|>", "\u200b",
    "\u202e", "é", "e\u0301", " ", ".", ",", "slim build", "1. ", "👍", "\ud800", "\x1b[0m", "\r\n", "\u2028", "\t",
    "`", "«", "»", "okay, ",
]  # fmt: skip
REPLY_LIKE = st.lists(st.sampled_from(PARTS), max_size=25).map("".join)


@settings(max_examples=300, deadline=None)
@given(ANYTHING | REPLY_LIKE)
@example('{"a": "\\u202e{\\"b\\": \\"x\\"}"}')
@example("- - - ```\n```\"'A man.'\"")
def test_cleaning_twice_changes_nothing_and_leaves_no_invisible_character(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert not [
        letter for letter in cleaned if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    ]
    assert cleaned == " ".join(cleaned.split())
    cleaned.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(ANYTHING | REPLY_LIKE, st.sampled_from(["identity", "clothing"]))
def test_no_reply_breaks_the_checks(text: str, kind: str) -> None:
    verdict = check_reply(text, kind, CONFIG, prompt=text, form=Form(), attributes=None)
    assert 0 <= verdict.coverage <= 1
    assert len(verdict.codes) == len(verdict.reasons) and set(verdict.codes) <= set(CODES)
    assert check_neutral(text, text, prompt=text).text.isascii() or text
    agreement(text, kind, SYNTHPED)


@pytest.mark.parametrize(
    "part",
    [
        "a", " ", "<", "<a ", "(", "[", '"', "'", "*", "**a", "- a\n", "_", "$", "&", "{", '{"a":', "red ", "a-",
        "two ", "man and a ", "Sure, ", "\n", "/a", "a@", ". Let me know", "\x1b[", "`", "```", "</s>", "\"'", "é",
        "红", "\u0301", "\u0301\u0316", "\u0344", "unknown ", "is ", "1", "wearing ", "a man ", "describing ",
    ],
)  # fmt: skip
def test_replies_of_200_kb_and_just_below_the_limits_are_answered(part: str) -> None:
    # Quadratic work on 200,000 characters would take minutes: the file's own time shows it, no clock is read here.
    for size in (200_000, REPAIR_LIMIT, 1_200):
        text = (part * (size // len(part) + 1))[:size]
        verdict = check_reply(text, "identity", CONFIG, prompt=text[:2000])
        assert len(verdict.text) <= 2001
        assert clean(text) == clean(clean(text))


def test_words_of_the_lexicon_are_words() -> None:
    # YAML reads a bare `no`, `on` or `off` as true or false.
    everything = [word for group in lexicon().groups.values() for word in group] + list(lexicon().classes)
    assert [word for word in everything if not isinstance(word, str) or word != word.lower().strip()] == []
