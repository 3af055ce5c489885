import numpy as np
import pytest

from reidctl.datasets.degrade import degrade
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.settings import (
    IMAGE_SETTINGS,
    TEXT_SETTINGS,
    conflicting_donors,
    degrade_image,
    degrade_texts,
    stream,
)

IDS = [f"q{i}" for i in range(12)]
TEXTS = [f"a tall person number {i} wearing something rather colourful today" for i in range(12)]
PEOPLE = [f"p{i // 2}" for i in range(12)]
IDENTITY = [f"tall person {i // 2}" for i in range(12)]
CLOTHING = [("red", "blue", "green")[i // 4] for i in range(12)]  # p0 and p1 share red, and so on
GIVEN = dict(identity=IDENTITY, clothing=CLOTHING, people=PEOPLE)


@pytest.mark.parametrize("setting", TEXT_SETTINGS)
def test_every_text_setting_is_seeded_and_answers_every_query(setting):
    found = degrade_texts(setting, IDS, TEXTS, **GIVEN, seed=1)
    assert len(found) == len(TEXTS)
    assert all(found)
    assert degrade_texts(setting, IDS, TEXTS, **GIVEN, seed=1) == found


@pytest.mark.parametrize("setting", ["word-dropout", "typos", "truncation"])
def test_a_text_is_degraded_alike_in_any_company(setting):
    whole = degrade_texts(setting, IDS, TEXTS)
    assert degrade_texts(setting, IDS[5:6], TEXTS[5:6]) == whole[5:6]
    assert whole != TEXTS


def test_standard_changes_nothing():
    assert degrade_texts("standard", IDS, TEXTS) == TEXTS


def test_identity_only_holds_no_clothing():
    assert degrade_texts("identity-only", IDS, TEXTS, **GIVEN) == IDENTITY


@pytest.mark.parametrize("seed", range(20))
def test_clothes_conflict_gives_everybody_another_person_s_different_clothes(seed):
    donors = conflicting_donors(CLOTHING, PEOPLE, seed=seed)
    assert sorted(donors) == list(range(12))
    for i, donor in enumerate(donors):
        assert PEOPLE[donor] != PEOPLE[i]
        assert CLOTHING[donor] != CLOTHING[i]


def test_clothes_conflict_keeps_identity_and_exchanges_clothing():
    found = degrade_texts("clothes-conflict", IDS, TEXTS, **GIVEN)
    for i, text in enumerate(found):
        assert text.startswith(IDENTITY[i])
        assert not text.endswith(CLOTHING[i])


def test_clothes_conflict_is_refused_where_all_wear_the_same():
    with pytest.raises(DataError, match="nobody different"):
        conflicting_donors(["red"] * 3 + ["blue"], list("abcd"))


def test_text_noise_is_that_of_data_degrade():
    for setting, kind in (("word-dropout", "drop"), ("typos", "typo"), ("truncation", "shorten")):
        expected = [degrade(text, kind, 0.4, seed=2, key=item) for item, text in zip(IDS, TEXTS, strict=True)]
        assert degrade_texts(setting, IDS, TEXTS, seed=2, share=0.4) == expected != TEXTS


def test_settings_without_their_texts_or_of_unknown_name_are_refused():
    with pytest.raises(DataError, match="identity"):
        degrade_texts("identity-only", IDS, TEXTS)
    with pytest.raises(UsageError, match="Unknown"):
        degrade_texts("shouting", IDS, TEXTS)
    with pytest.raises(UsageError, match="Unknown"):
        degrade_image("sepia", "x", np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("setting", IMAGE_SETTINGS)
def test_every_image_setting_keeps_shape_is_seeded_and_leaves_the_input_alone(setting):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    before = pixels.copy()
    found = degrade_image(setting, "a", pixels, seed=1)
    assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
    assert (found != pixels).any()
    assert (pixels == before).all()
    assert (degrade_image(setting, "a", pixels, seed=1) == found).all()


@pytest.mark.parametrize("setting", [s for s in IMAGE_SETTINGS if s != "blank"])
def test_strength_zero_leaves_an_image_as_it_was(setting):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    assert (degrade_image(setting, "a", pixels, strength=0.0) == pixels).all()


def test_occlusion_covers_the_share_it_was_asked_for():
    covered = (degrade_image("occlusion", "a", np.zeros((100, 100, 3), np.uint8), strength=0.25) == 128).mean()
    assert covered == pytest.approx(0.25)


def test_streams_of_different_items_differ():
    assert stream(0, "a").random() != stream(0, "b").random()
    assert stream(0, "a").random() == stream(0, "a").random()
