# ruff: noqa: E501
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

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
    for choice, count in zip(
        itertools.product((False, True), repeat=len(names)), itertools.cycle((1, 2, 4)), strict=False
    ):
        form = Form(opening=opening, sentences=count, **dict(zip(names, choice, strict=True)))  # type: ignore[arg-type]
        for kind in ("identity", "clothing"):
            written = text(kind, form)
            assert written is not None
            verdict = check_reply(written, kind, config, form=form, attributes=PERSON)
            assert verdict.ok, (verdict.reasons, written)
            assert verdict.coverage == 1.0


@pytest.mark.parametrize(
    ("form", "kind", "expected"),
    [
        (Form(sentences=4), "identity",
         "The person is an adult woman. She has a slim build. She also has a tall stature. She has long red hair as well."),
        (Form(sentences=4, hedged=True), "clothing",
         "The person appears to be wearing an orange striped t-shirt. They may also wear blue trousers. The outfit probably "
         "includes black boots too. They appear to have an umbrella and a red backpack."),
        (Form(connected=True), "clothing",
         "The person is wearing an orange striped t-shirt and blue trousers together with black boots, with an umbrella and "
         "a red backpack."),
        (Form(sentences=2, separators=True), "identity",
         "The person is an adult woman. She has a slim build; a tall stature; and long red hair."),
    ],
)  # fmt: skip
def test_forms_of_several_sentences_or_joints_are_the_expected_ones(form: Form, kind: str, expected: str) -> None:
    assert text(kind, form, CaptionConfig(hair="identity")) == expected


def test_ornaments_fit_what_they_adorn() -> None:
    changes = {"build": "average", "stature": "average", "hair_length": "bob", "hair_colour": "black"}
    written = str(text("identity", Form(ornate=True), CaptionConfig(hair="identity"), **changes))
    assert "a rather average build, a rather average stature and a neat black bob haircut." in written
    bare = str(text("clothing", Form(ornate=True), upper_colour="", upper_type="dress", upper_pattern="plain"))
    assert bare.split(" dress")[0].split()[-1] in ("neat", "stylish", "smart", "modern")


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


def test_market_codes_are_read() -> None:
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


FLAGS = ("fragments", "hedged", "connected", "ornate", "separators", "exclaiming", "lower")
OPENINGS = ("image", "pronoun", "imperative", "label", "verb", "noun")


def some_forms() -> Iterator[Form]:
    """Every opening with every flag alone, none and all, with one and with three sentences."""
    choices: list[tuple[str, ...]] = [(), *((flag,) for flag in FLAGS), FLAGS]
    for opening, chosen, count in itertools.product(OPENINGS, choices, (1, 3)):
        yield Form(opening=opening, sentences=count, **dict.fromkeys(chosen, True))  # type: ignore[arg-type]


def check(people: list[dict[str, str]], config: CaptionConfig, forms: list[Form]) -> set[str]:
    """Write both texts of every person in the forms, by turns; return those that fail their checks."""
    describer, bad = TemplateDescriber(config), set()
    turns = itertools.cycle(forms)
    for number, person in enumerate(people):
        for form in itertools.islice(turns, 2):
            for kind in ("identity", "clothing"):
                request = Request(f"i{number}", "", kind, "", "", "", None, form.instruction(), person)
                reply = next(describer.describe([request]))
                assert reply.text is not None, (kind, person)
                verdict = check_reply(reply.text, kind, config, form=form, attributes=person)
                if not verdict.ok:
                    bad.add(f"{verdict.reasons}: {reply.text}")
    return bad


OPTIONS = [
    CaptionConfig(hair=hair, sensitive=sensitive)  # type: ignore[arg-type]
    for hair in ("clothing", "identity", "drop")
    for sensitive in (False, True)
]


@pytest.mark.covers(131)
@pytest.mark.parametrize("config", OPTIONS, ids=lambda config: f"hair-{config.hair}-{config.sensitive}")
def test_every_value_of_synthped_passes_in_every_form(config: CaptionConfig) -> None:
    from reidctl.synthped import palette

    values = {
        "gender": palette.GENDERS,
        "age": palette.AGES,
        "build": palette.BUILDS,
        "stature": palette.STATURES,
        "skin": palette.SKINS,
        "hair_length": palette.HAIR_LENGTHS,
        "hair_colour": (*palette.HAIR_COLOURS, "grey", "none"),
        "upper_type": (*palette.UPPER_TYPES, "dress"),
        "upper_colour": palette.UPPER_COLOURS,
        "upper_pattern": palette.PATTERNS,
        "lower_type": ("trousers", "shorts", "skirt", "leggings", "jeans"),
        "lower_colour": palette.LOWER_COLOURS,
        "shoe_type": palette.SHOE_TYPES,
        "shoe_colour": palette.SHOE_COLOURS,
        "carried": ("", *(f"{colour} {kind}" for colour in palette.CARRIED_COLOURS for kind in palette.CARRIED)),
    }
    people = [PERSON | {key: value} for key, known in values.items() for value in known]
    people += [PERSON | {"age": "child", "gender": gender} for gender in ("man", "woman", "unknown")]
    people.append(PERSON | {"carried": ", ".join(f"red {kind}" for kind in palette.CARRIED[:3])})
    assert check(people, config, list(some_forms())) == set()


def test_rendered_people_pass_with_the_attributes_that_the_dataset_gives_them() -> None:
    from reidctl.synthped.config import SynthConfig
    from reidctl.synthped.dataset import attributes
    from reidctl.synthped.render import render

    people = [attributes(render(SynthConfig(), index, 0)) for index in range(20)]
    assert len({person["upper_type"] for person in people}) > 3
    assert check(people * 3, CaptionConfig(), list(some_forms())) == set()


def imported(tmp_path: Path, attribute_file: object, people: Mapping[int, Mapping[str, str]]) -> list[dict[str, str]]:
    """Attributes through the published file's format and our reader of it."""
    from reidctl.datasets.matlab import AttributeFile
    from reidctl.datasets.named import Reading

    assert isinstance(attribute_file, AttributeFile)
    attribute_file.write(tmp_path, {"train": people})
    path, found = attribute_file.read(tmp_path, Reading(False))
    assert path is not None and len(found) == len(people)
    return list(found.values())


def market_people() -> dict[int, dict[str, str]]:
    from reidctl.datasets.formats.market_1501 import MARKET_ATTRIBUTES

    fields = dict(MARKET_ATTRIBUTES.fields.values())
    bags = {name: fields.pop(name) for name in ("hat", "backpack", "bag", "handbag")}
    _, uppers = MARKET_ATTRIBUTES.colours[0][1:]
    _, lowers = MARKET_ATTRIBUTES.colours[1][1:]
    people = {}
    for number, words in enumerate(itertools.product(*fields.values()), start=1):
        person = dict(zip(fields, words, strict=True))
        person |= {name: answers[(number >> place) % 2] for place, (name, answers) in enumerate(bags.items())}
        person["upper_colour"] = uppers[number % len(uppers)].replace("gray", "grey")
        person["lower_colour"] = lowers[number % len(lowers)].replace("gray", "grey")
        people[number] = person
    people[1]["upper_colour"] = "red, blue"
    return people


@pytest.mark.covers(131)
@pytest.mark.parametrize("config", OPTIONS[::2], ids=lambda config: f"hair-{config.hair}")
def test_every_column_of_market_1501_attribute_passes_in_every_form(tmp_path: Path, config: CaptionConfig) -> None:
    from reidctl.datasets.formats.market_1501 import MARKET_ATTRIBUTES

    people = imported(tmp_path, MARKET_ATTRIBUTES, market_people())
    assert len(people) == 128
    assert check(people, config, list(some_forms())) == set()


def test_what_our_reader_makes_of_market_1501_attribute_is_told_in_full(tmp_path: Path) -> None:
    from reidctl.datasets.formats.market_1501 import MARKET_ATTRIBUTES

    person = {
        "gender": "woman", "age": "elderly", "hair_length": "long", "sleeves": "short", "lower_length": "short",
        "lower_type": "trousers", "hat": "yes", "backpack": "no", "bag": "yes", "handbag": "no",
        "upper_colour": "white, red", "lower_colour": "grey",
    }  # fmt: skip
    (found,) = imported(tmp_path, MARKET_ATTRIBUTES, {7: person})
    assert told(found, "identity") == "The person is an elderly woman."
    assert told(found, "clothing") == (
        "The person is wearing a white and red short-sleeved top and grey shorts, with long hair, a hat and a bag."
    )


def test_what_our_reader_makes_of_dukemtmc_attribute_is_told_too(tmp_path: Path) -> None:
    from reidctl.datasets.formats.dukemtmc_reid import ATTRIBUTES

    person = {
        "gender": "man", "hat": "no", "backpack": "yes", "bag": "no", "handbag": "no", "upper_length": "long",
        "boots": "yes", "shoe_colour": "dark", "upper_colour": "purple", "lower_colour": "black",
    }  # fmt: skip
    (found,) = imported(tmp_path, ATTRIBUTES, {7: person})
    assert told(found, "clothing") == (
        "The person is wearing a purple long top, a black lower garment and dark boots, with a backpack."
    )
    assert check([found] * 60, CaptionConfig(), list(some_forms())) == set()


def told(person: Mapping[str, str], kind: str, config: CaptionConfig = CaptionConfig()) -> str | None:  # noqa: B008
    request = Request("a", "a.png", kind, "", "", "", None, Form().instruction(), person)
    return next(TemplateDescriber(config).describe([request])).text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"age": "teenage"}, "a teenage girl with"),
        ({"age": "teenage", "gender": "man"}, "a teenage boy with"),
        ({"age": "adult"}, "an adult woman with"),
        ({"age": "elderly", "gender": "man"}, "an elderly man with"),
        ({"gender": "unknown"}, "an adult person with"),
        ({"gender": "unknown", "age": "teenage"}, "The person is a teenager with"),
        ({"age": "child"}, "The person is a girl with"),
        ({"age": "child", "gender": "man"}, "The person is a boy with"),
        ({"age": "kid", "gender": "none"}, "The person is a child with"),
        ({"age": "none", "gender": "none"}, "The person has a slim build and a tall stature."),
        ({"build": "average", "stature": "short"}, "an average build and a short stature"),
        ({"build": "heavy", "stature": "none"}, "a heavy build."),
    ],
)
def test_age_gender_and_body_are_told(changes: dict[str, str], words: str) -> None:
    assert words in str(told(PERSON | changes, "identity"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hair_length": "bald", "hair_colour": "none"}, "a bald head"),
        ({"hair_length": "bob", "hair_colour": "black"}, "a black bob haircut"),
        ({"hair_length": "short", "hair_colour": "grey"}, "short grey hair"),
    ],
)
def test_hair_is_told_where_the_option_puts_it_and_nowhere_else(changes: dict[str, str], words: str) -> None:
    for place in ("clothing", "identity", "drop"):
        config = CaptionConfig(hair=place)  # type: ignore[arg-type]
        for kind in ("clothing", "identity"):
            assert (words in str(told(PERSON | changes, kind, config))) == (kind == place)


def test_skin_is_told_in_the_identity_text_and_only_if_asked_for() -> None:
    for skin in ("pale", "light", "tan", "brown", "dark"):
        person = PERSON | {"skin": skin}
        assert f"{skin} skin" in str(told(person, "identity", CaptionConfig(sensitive=True)))
        assert "skin" not in str(told(person, "clothing", CaptionConfig(sensitive=True)))
        assert "skin" not in f"{told(person, 'identity')}{told(person, 'clothing')}"


@pytest.mark.covers(133)
def test_little_knowledge_still_makes_a_text_of_the_least_length() -> None:
    little = {"gender": "woman", "lower_colour": "black"}
    assert text_of(little, "identity", Form(fragments=True)) == "Woman, one pedestrian in view."
    assert text_of(little, "identity", Form(opening="label")) == "Person: woman. Note: one pedestrian in view."
    assert text_of(little, "clothing", Form(fragments=True)) == "Black lower garment, one pedestrian in view."
    assert check([little] * 60, CaptionConfig(), list(some_forms())) == set()


def text_of(person: Mapping[str, str], kind: str, form: Form) -> str | None:
    request = Request("a", "a.png", kind, "", "", "", None, form.instruction(), person)
    return next(TemplateDescriber(CaptionConfig()).describe([request])).text


def test_asking_again_gives_the_same_text() -> None:
    describer = TemplateDescriber(CaptionConfig())
    request = Request("a", "a.png", "identity", "", "", "", None, Form(ornate=True).instruction(), PERSON)
    assert describer.repeats
    assert len({next(describer.describe([request])).text for _ in range(3)}) == 1


def test_a_neutral_text_is_not_the_templates_to_write() -> None:
    request = Request("a", "", "neutral", "", "", "", attributes={"caption": "A man in a red coat."})
    assert next(TemplateDescriber(CaptionConfig()).describe([request])).status == "failed"
