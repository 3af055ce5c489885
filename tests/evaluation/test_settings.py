from itertools import permutations

import numpy as np
import pytest

from reidctl.datasets.degrade import degrade
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.exchange import conflicting_donors
from reidctl.evaluation.settings import (
    IMAGE_SETTINGS,
    SETTINGS,
    TEXT_SETTINGS,
    degrade_image,
    degrade_texts,
    level_of,
    resolve,
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


@pytest.mark.covers(155)
@pytest.mark.parametrize("seed", range(20))
def test_clothes_conflict_gives_everybody_another_person_s_different_clothes(seed):
    donors = conflicting_donors(CLOTHING, PEOPLE, seed=seed)
    assert sorted(donors) == list(range(12))
    for i, donor in enumerate(donors):
        assert PEOPLE[donor] != PEOPLE[i]
        assert CLOTHING[donor] != CLOTHING[i]


@pytest.mark.covers(155)
@pytest.mark.parametrize("seed", range(20))
def test_clothes_conflict_minds_outfits_where_they_are_known(seed):
    # Without the outfits p0 (red) could wear the blue of p1, who has the same outfit "o".
    outfits = [None if i == 3 else ("o" if i < 8 and i % 2 else f"o{i}") for i in range(12)]
    donors = conflicting_donors(CLOTHING, PEOPLE, outfits=outfits, seed=seed)
    assert sorted(donors) == list(range(12))
    for i, donor in enumerate(donors):
        assert PEOPLE[donor] != PEOPLE[i] and CLOTHING[donor] != CLOTHING[i]
        assert outfits[donor] is None or outfits[donor] != outfits[i]


def test_clothes_conflict_does_not_depend_on_the_order_of_the_queries():
    def given(order):
        donors = conflicting_donors(
            [CLOTHING[i] for i in order], [PEOPLE[i] for i in order], ids=[IDS[i] for i in order], seed=3
        )
        return {IDS[order[place]]: IDS[order[donor]] for place, donor in enumerate(donors)}

    assert given(range(12)) == given(list(reversed(range(12)))) == given([5, 3, 1, 0, 2, 4, 11, 9, 7, 6, 8, 10])


def test_different_seeds_dress_people_differently():
    found = {tuple(conflicting_donors(CLOTHING, PEOPLE, seed=seed)) for seed in range(3)}
    assert len(found) == 3


def test_clothes_conflict_solves_a_tight_case_and_is_quick_to_refuse_an_impossible_one():
    # Half wear red: every other text must go to them, and theirs to all others.
    donors = conflicting_donors(["red"] * 50 + [f"c{i}" for i in range(50)], [f"p{i}" for i in range(100)])
    assert all((i < 50) != (donor < 50) for i, donor in enumerate(donors))
    with pytest.raises(DataError, match="nobody different"):
        conflicting_donors(["red"] * 600 + [f"c{i}" for i in range(400)], [f"p{i}" for i in range(1000)])
    assert len(conflicting_donors([], [])) == 0


@pytest.mark.parametrize("seed", range(60))
def test_clothes_conflict_finds_the_exchange_of_people_who_all_wear_two_texts(seed):
    # Everybody owns an "a" and a "b": swaps of two can end where the last misfits belong to one person.
    clothing, people = ["a", "b"] * 20, [f"p{i // 2}" for i in range(40)]
    donors = conflicting_donors(clothing, people, seed=seed)
    assert sorted(donors) == list(range(40))
    assert all(people[i] != people[d] and clothing[i] != clothing[d] for i, d in enumerate(donors))


@pytest.mark.parametrize("seed", range(10))
def test_clothes_conflict_finds_the_exchange_of_few_people_with_many_queries(seed):
    # Four people with fifty queries in either text: many misfits are left that no swap of two mends.
    clothing, people = ["a", "b"] * 200, [f"p{i // 100}" for i in range(400)]
    donors = conflicting_donors(clothing, people, seed=seed)
    assert sorted(donors) == list(range(400))
    assert all(people[i] != people[d] and clothing[i] != clothing[d] for i, d in enumerate(donors))


def test_clothes_conflict_is_refused_exactly_where_trying_everything_finds_nothing():
    rng, refused = np.random.default_rng(5), 0
    for _ in range(400):
        count = int(rng.integers(1, 7))
        people = [f"p{n}" for n in rng.integers(0, 4, count)]
        clothing = [f"c{n}" for n in rng.integers(0, 4, count)]
        outfits = [None if n == 0 else f"o{n}" for n in rng.integers(0, 5, count)]

        def fits(i, d, values=(people, clothing, outfits)):
            return all(part[i] is None or part[i] != part[d] for part in values)

        possible = any(all(fits(i, d) for i, d in enumerate(order)) for order in permutations(range(count)))
        if not possible:
            refused += 1
            with pytest.raises(DataError, match="nobody different"):
                conflicting_donors(clothing, people, outfits=outfits)
            continue
        donors = conflicting_donors(clothing, people, outfits=outfits)
        assert sorted(donors) == list(range(count)) and all(fits(i, d) for i, d in enumerate(donors))
    assert 50 < refused < 350


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


NOISE = np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)


def test_every_setting_has_a_line_of_help_and_degrees_only_where_they_mean_something():
    assert set(TEXT_SETTINGS) | set(IMAGE_SETTINGS) | {"paraphrase"} == set(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.name == name and setting.summary
        assert ("LEVEL" in setting.summary) == (setting.level is not None)


def test_names_come_back_in_one_order_with_the_reference():
    assert resolve(["blank", "typos"]) == ("standard", "typos", "blank") == resolve(["typos", "blank", "typos"])
    assert resolve(["all"]) == resolve(["blur", "all"]) == tuple(SETTINGS)
    with pytest.raises(UsageError) as error:
        resolve(["blur", "sepia"])
    assert "sepia" in str(error.value) and "low-resolution" in str(error.value.hint)
    with pytest.raises(UsageError, match="No setting"):
        resolve([])


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_level_outside_its_range_is_refused(level):
    with pytest.raises(UsageError, match="between 0 and 1"):
        level_of("blur", level)
    with pytest.raises(UsageError, match="between 0 and 1"):
        degrade_image("blur", "a", NOISE, strength=level)
    with pytest.raises(UsageError, match="between 0 and 1"):
        degrade_texts("typos", IDS, TEXTS, share=level)


def test_a_setting_has_its_own_level_unless_told_otherwise():
    assert level_of("truncation") == SETTINGS["truncation"].level == 0.5
    assert level_of("truncation", 0.0) == 0.0
    assert level_of("blank", 0.7) is None
    half = degrade_texts("truncation", IDS, TEXTS)
    assert all(len(text.split()) == (len(whole.split()) + 1) // 2 for text, whole in zip(half, TEXTS, strict=True))
    assert (degrade_image("blur", "a", NOISE) == degrade_image("blur", "a", NOISE, strength=0.3)).all()


def test_blur_has_the_stated_width():
    # A bright line blurred across: its profile is a Gaussian of 0.05 x 0.4 x 200 = 4 pixels.
    line = np.zeros((200, 101, 3), np.uint8)
    line[:, 50] = 255
    profile = degrade_image("blur", "a", line, strength=0.4)[100, :, 0].astype(float)
    place = np.arange(101) - 50
    assert np.sqrt((profile * place**2).sum() / profile.sum()) == pytest.approx(4, rel=0.1)


def test_low_resolution_is_shrinking_and_enlarging_by_the_stated_factor():
    # Level 1 is 8 times fewer pixels along each side: a checkerboard of single pixels becomes one grey.
    board = (np.indices((64, 32)).sum(0) % 2 * 255).astype(np.uint8)
    grey = degrade_image("low-resolution", "a", np.stack([board] * 3, axis=2), strength=1.0)
    assert grey.std() < 2 and abs(grey.mean() - 127.5) < 2
    # Blocks of 8 x 8 survive: their means are what is left.
    blocks = np.kron(NOISE[:8, :4], np.ones((8, 8, 1), np.uint8))
    left = degrade_image("low-resolution", "a", blocks, strength=1.0)
    assert abs(left[28:36, 12:20].mean(axis=(0, 1)) - blocks[28:36, 12:20].mean(axis=(0, 1))).max() < 40


def test_occlusion_is_one_grey_rectangle_and_nothing_else():
    changed = (degrade_image("occlusion", "b", NOISE, strength=0.3) != NOISE).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    inside = degrade_image("occlusion", "b", NOISE, strength=0.3)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (inside == 128).all()
    assert len(rows) * len(columns) / changed.size == pytest.approx(0.3, abs=0.02)


def test_illumination_multiplies_and_clips_as_a_loop_over_pixels_does():
    seen = set()
    for item in "abcdefgh":
        found = degrade_image("illumination", item, NOISE, strength=0.5)
        gain = 2.0 if found.mean() > NOISE.mean() else 0.5
        slow = [min(255, max(0, round(float(value) * gain))) for value in NOISE.ravel()]
        assert found.ravel().tolist() == slow
        seen.add(gain)
    assert seen == {2.0, 0.5}


def test_every_image_is_spoilt_alike_in_any_company_and_differently_from_others():
    for setting in ("occlusion", "illumination"):
        made = {degrade_image(setting, f"i{n}", NOISE, seed=4).tobytes() for n in range(20)}
        assert len(made) > 1
        assert degrade_image(setting, "i3", NOISE, seed=4).tobytes() in made


def test_blank_pictures_are_all_the_same():
    assert (degrade_image("blank", "a", NOISE) == degrade_image("blank", "b", NOISE[::-1].copy(), seed=9)).all()
