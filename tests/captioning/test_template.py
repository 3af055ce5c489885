# ruff: noqa: E501
import itertools

import pytest

from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.facts import facts_of, with_article
from reidctl.captioning.backends.template import TemplateDescriber
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import Form
from reidctl.captioning.validation import check_reply, clothing_words

PERSON = {
    "gender": "woman", "age": "adult", "build": "slim", "stature": "tall", "skin": "light", "hair_length": "long",
    "hair_colour": "red", "upper_type": "t-shirt", "upper_colour": "orange", "upper_pattern": "striped", "lower_type": "trousers",
    "lower_colour": "blue", "shoe_type": "boots", "shoe_colour": "black", "carried": "umbrella,red backpack", "view": "front",
}  # fmt: skip
MARKET = {
    "gender": "2", "age": "3", "hair": "2", "up": "2", "down": "2", "clothes": "2", "hat": "1", "backpack": "2", "bag": "1",
    "handbag": "1", "upred": "2", "upblack": "1", "downblack": "2",
}  # fmt: skip


def text(kind: str, form: Form = Form(), config: CaptionConfig = CaptionConfig(), **changes: str) -> str | None:  # noqa: B008
    request = Request("a", "a.png", kind, "", "", "", None, form.instruction(), PERSON | changes)
    return next(TemplateDescriber(config).describe([request])).text


def test_plain_texts_are_the_expected_sentences() -> None:
    assert text("identity") == "The person is an adult woman with a slim build and a tall stature."
    assert text("clothing") == (
        "The person is wearing an orange striped t-shirt, blue trousers and black boots, "
        "with long red hair, an umbrella and a red backpack."
    )


def test_note_and_label_forms() -> None:
    assert text("identity", Form(fragments=True, lower=True)) == "adult woman, slim build, tall stature."
    assert text("identity", Form(opening="label", sentences=4)) == "Person: adult woman. Build: slim. Stature: tall."


@pytest.mark.covers(131, 135)
@pytest.mark.parametrize("opening", ["image", "pronoun", "imperative", "label", "verb", "noun"])
def test_every_form_passes_its_own_checks(opening: str) -> None:
    config = CaptionConfig()
    names = ("fragments", "hedged", "connected", "ornate", "separators", "exclaiming", "lower")
    for choice, count in itertools.product(itertools.product((False, True), repeat=len(names)), (1, 2, 4)):
        form = Form(opening=opening, sentences=count, **dict(zip(names, choice, strict=True)))  # type: ignore[arg-type]
        for kind in ("identity", "clothing"):
            written = text(kind, form)
            assert written is not None
            verdict = check_reply(written, kind, config, form=form, attributes=PERSON)
            assert verdict.ok, (verdict.reasons, written)
            assert verdict.coverage == 1.0


def test_ethnicity_is_opt_in_and_hair_follows_its_option() -> None:
    assert "skin" not in str(text("identity"))
    assert "light skin" in str(text("identity", config=CaptionConfig(sensitive=True)))
    assert "hair" in str(text("identity", config=CaptionConfig(hair="identity")))
    dropped = CaptionConfig(hair="drop")
    assert "hair" not in str(text("identity", config=dropped)) + str(text("clothing", config=dropped))


def test_clothing_text_names_no_gender_and_identity_text_no_clothes() -> None:
    assert clothing_words(str(text("identity"))) == []
    assert not {"woman", "she", "her"} & set(str(text("clothing", Form(opening="pronoun"))).lower().split())


def test_dress_without_lower_garment_and_bare_hands() -> None:
    written = text(
        "clothing", upper_type="dress", upper_pattern="plain", lower_type="none", lower_colour="none", carried=""
    )
    assert written == "The person is wearing an orange dress and black boots, with long red hair."


def test_market_attributes_are_read() -> None:
    facts = facts_of(MARKET, sensitive=False)
    assert (facts.noun, facts.age, facts.hair, facts.belongings) == ("woman", "adult", "long hair", ("backpack",))
    assert facts.garments == (("Upper", "red short-sleeved top"), ("Lower", "black shorts"))


def test_an_image_without_attributes_is_a_failed_row() -> None:
    reply = next(TemplateDescriber(CaptionConfig()).describe([Request("a", "a.png", "identity", "", "", "")]))
    assert reply.status == "failed" and "no attributes" in str(reply.reason)


def test_articles() -> None:
    phrases = ("orange coat", "red coat", "blue jeans", "umbrella", "uniform", "short hair", "red dress")
    assert [with_article(phrase) for phrase in phrases] == [
        "an orange coat", "a red coat", "blue jeans", "an umbrella", "a uniform", "short hair", "a red dress",
    ]  # fmt: skip
