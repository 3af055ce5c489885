import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidctl.captioning.config import CaptionConfig, CheckConfig
from reidctl.captioning.form import Form
from reidctl.captioning.validation import attribute_coverage, check_reply, clean, clothing_words

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
        ("the person is a young man with a slim build.", "does not begin"),
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


def test_notes_need_no_full_stop() -> None:
    assert "breaks off" in reasons("young man, slim build")
    assert check_reply("young man, slim build", "identity", CONFIG, form=Form(fragments=True, lower=True)).ok


def test_clean_strips_what_is_not_text() -> None:
    assert clean('```\n"A \u202eman\x00 walks."\n```') == "A man walks."
    assert clean("- **A man** walks.\n- He is tall.") == "A man walks. He is tall."


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_no_reply_breaks_the_checks_or_leaves_control_characters(text: str) -> None:
    verdict = check_reply(text, "identity", CONFIG)
    assert all(ord(letter) >= 32 for letter in verdict.text)
    assert 0 <= verdict.coverage <= 1
