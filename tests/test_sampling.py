from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidctl.errors import DataError, UsageError
from reidctl.sampling import (
    alternating_batches,
    identity_batches,
    mixed_batches,
    random_batches,
    share_of_rank,
)


def generator(seed=0):
    return np.random.default_rng(seed)


# People with some images, each with some captions: [[captions of image 0, ...] of person 0, ...].
PEOPLE = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=2, max_size=8)


def samples_of(people):
    """Person and image of every caption."""
    person, image, row = [], [], 0
    for number, images in enumerate(people):
        for captions in images:
            person += [number] * captions
            image += [row] * captions
            row += 1
    return np.asarray(person), np.asarray(image)


@pytest.mark.covers(15)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_batch_has_k_samples_of_p_people_and_the_epoch_covers_everyone(counts, p, k, seed):
    person = np.repeat(np.arange(len(counts)), counts)
    batches = identity_batches(
        person, np.arange(len(person)), batch=p * k, instances=k, rng=np.random.default_rng(seed)
    )
    for batch in batches:
        sizes = Counter(person[batch].tolist())
        assert len(sizes) == min(p, len(counts)) and set(sizes.values()) == {k}
    assert set(person[np.concatenate(batches)]) == set(range(len(counts)))


@pytest.mark.covers(15)
@pytest.mark.parametrize("images", [4, 5, 6, 7, 9])  # also numbers that leave groups which span two turns
def test_no_batch_repeats_an_image_of_a_person_who_has_enough_of_them(images):
    person, image = samples_of([[2] * images, [3] * images, [1, 4] + [2] * (images - 2)])
    for seed in range(20):
        for batch in identity_batches(person, image, batch=8, instances=4, rng=generator(seed)):
            for one in np.unique(person[batch]):
                rows = batch[person[batch] == one]
                assert len(set(image[rows])) == 4


def test_sampling_that_cannot_work_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="batch of 10"):
        identity_batches(np.asarray([0, 1]), np.arange(2), batch=10, instances=4, rng=rng)
    with pytest.raises(DataError, match="fewer than two people"):
        identity_batches(np.asarray([0, 0]), np.arange(2), batch=4, instances=2, rng=rng)


@pytest.mark.covers(15)
@settings(max_examples=60, deadline=None)
@given(PEOPLE, st.integers(2, 4), st.integers(0, 99))
def test_an_image_is_its_own_only_positive_only_if_the_person_has_no_other(people, k, seed):
    person, image = samples_of(people)
    images_of = {p: set(image[person == p]) for p in range(len(people))}
    for batch in identity_batches(person, image, batch=2 * k, instances=k, rng=generator(seed)):
        for one in np.unique(person[batch]):
            met = set(image[batch[person[batch] == one]])
            assert len(met) > 1 or len(images_of[one]) == 1


def test_a_batch_of_a_person_with_one_much_described_image_still_shows_the_other():
    person, image = samples_of([[5, 1], [5, 1]])
    for seed in range(10):
        for batch in identity_batches(person, image, batch=4, instances=2, rng=generator(seed)):
            assert len(set(image[batch])) == 4


@settings(max_examples=60, deadline=None)
@given(PEOPLE, st.integers(2, 9), st.integers(0, 99))
def test_random_batches_hold_every_sample_once_and_no_image_twice(people, size, seed):
    _, image = samples_of(people)
    batches = random_batches(image, batch=size, rng=generator(seed))
    assert sorted(np.concatenate(batches)) == list(range(len(image)))
    for batch in batches:
        assert len(set(image[batch])) == len(batch) <= size + 1


def test_random_batches_leave_no_lonely_last_one():
    batches = random_batches(np.arange(13), batch=4, rng=generator())
    assert [len(batch) for batch in batches] == [4, 4, 5]


@pytest.mark.covers(16)
@pytest.mark.parametrize("identity_pairs", [True, False])
def test_a_mixed_batch_holds_64_captioned_samples_and_then_64_caption_free_images(identity_pairs):
    person = np.concatenate([np.repeat(np.arange(40), 8), np.repeat(np.arange(30, 60), 6)])
    captioned = np.arange(len(person)) < 320
    batches = mixed_batches(
        person,
        np.arange(len(person)),
        captioned,
        batch=64,
        batch_images=64,
        instances=4,
        identity_pairs=identity_pairs,
        rng=generator(),
    )
    assert batches and {len(batch) for batch in batches} == {128}
    for batch in batches:
        assert captioned[batch[:64]].all() and not captioned[batch[64:]].any()
        assert set(Counter(person[batch[64:]]).values()) == {4}
    if not identity_pairs:
        assert sorted(np.concatenate([batch[:64] for batch in batches])) == list(range(320))


def test_images_are_dealt_anew_when_they_run_out_before_the_captions():
    person = np.concatenate([np.repeat(np.arange(16), 10), [0, 0, 1, 1]])
    captioned = np.arange(164) < 160
    batches = mixed_batches(
        person, np.arange(164), captioned, batch=8, batch_images=4, instances=2, identity_pairs=True, rng=generator()
    )
    assert len(batches) > 10 and all(sorted(batch[8:]) == [160, 161, 162, 163] for batch in batches)


def test_mixing_needs_both_kinds():
    person, image = np.repeat([0, 1], 4), np.arange(8)
    for captioned, lacking in ((np.ones(8, bool), "caption-free"), (np.zeros(8, bool), "captioned")):
        with pytest.raises(DataError, match=f"no {lacking}"):
            mixed_batches(
                person,
                image,
                captioned,
                batch=4,
                batch_images=4,
                instances=2,
                identity_pairs=True,
                rng=generator(),
            )


@pytest.mark.covers(23)
def test_alternating_batches_hold_one_domain_each_in_the_shares_asked_and_cover_everyone():
    domain = np.repeat([0, 1], [400, 100])
    person = np.arange(500) // 5
    for power, expected in ((1.0, 0.8), (0.5, 2 / 3), (0.0, 0.5)):
        batches = alternating_batches(
            person, np.arange(500), domain, batch=20, instances=5, power=power, rng=generator()
        )
        drawn = [set(domain[batch]) for batch in batches]
        assert all(len(found) == 1 for found in drawn)
        share = np.mean([found == {0} for found in drawn])
        assert share == pytest.approx(expected, abs=1 / len(batches))
        assert set(person[np.concatenate(batches)]) == set(range(100))


def test_domains_take_turns_as_evenly_as_their_shares_allow():
    domain = np.repeat([0, 1], [200, 200])
    person = np.arange(400) // 5
    batches = alternating_batches(person, np.arange(400), domain, batch=20, instances=5, power=0.5, rng=generator())
    assert [int(domain[batch[0]]) for batch in batches[:6]] == [0, 1, 0, 1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(PEOPLE, st.integers(1, 4), st.integers(0, 99))
def test_the_parts_of_all_processes_are_the_batch_and_all_wait_for_the_same_number(people, world, seed):
    person, image = samples_of(people)
    batches = identity_batches(person, image, batch=4 * world, instances=2, rng=generator(seed))
    parts = [share_of_rank(batches, rank, world, instances=2) for rank in range(world)]
    assert len({tuple(len(part) for part in mine) for mine in parts}) == 1
    for number, whole in enumerate(batch for batch in batches if len(batch) >= 2 * world):
        joined = np.concatenate([mine[number] for mine in parts])
        assert np.array_equal(joined, whole[: len(joined)]) and len(whole) - len(joined) < 2 * world
        for mine in parts:
            assert set(Counter(person[mine[number]]).values()) <= {2}


def test_every_process_gets_its_part_of_both_kinds_of_a_mixed_batch():
    captioned = np.arange(32) < 16
    whole = np.concatenate([np.arange(8), np.arange(16, 24)])
    parts = [share_of_rank([whole], rank, 2, instances=2, captioned=captioned)[0] for rank in range(2)]
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 16, 17, 18, 19], [4, 5, 6, 7, 20, 21, 22, 23]]


def test_a_process_that_is_not_one_of_the_group_is_refused():
    with pytest.raises(UsageError, match="Process 2 is not one of 2"):
        share_of_rank([np.arange(4)], 2, 2)


def test_the_same_seed_deals_the_same_batches():
    person, image = samples_of([[2, 1, 3]] * 6)
    one, other = (identity_batches(person, image, batch=8, instances=2, rng=generator(5)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.covers(215)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(2, 7), st.integers(0, 99))
def test_alternating_random_batches_hold_one_domain_each_and_every_sample_of_the_longest(sizes, size, seed):
    domain = np.repeat(np.arange(len(sizes)), sizes)
    image = np.arange(len(domain))
    asked = {"batch": size, "instances": None, "rng": generator(seed)}
    batches = alternating_batches(np.zeros(len(domain), int), image, domain, **asked, power=1.0)
    assert all(len(set(domain[batch])) == 1 for batch in batches)
    assert all(0 < len(batch) <= size + 1 and len(set(batch)) == len(batch) for batch in batches)
    # An epoch is long enough that nobody is left out.
    assert set(np.concatenate(batches)) == set(range(len(domain)))


@pytest.mark.covers(215)
def test_alternating_random_batches_of_one_domain_are_random_batches():
    image = np.repeat(np.arange(15), 2)
    found = alternating_batches(
        np.arange(30) // 4, image, np.zeros(30, int), batch=7, instances=None, power=0.5, rng=generator(3)
    )
    expected = random_batches(image, batch=7, rng=generator(3))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]
    assert sorted(np.concatenate(found)) == list(range(30))


def test_alternating_random_batches_take_turns_by_size_to_the_power():
    domain = np.repeat([0, 1], [400, 100])
    for power, expected in ((1.0, 0.8), (0.5, 2 / 3), (0.0, 0.5)):
        batches = alternating_batches(
            np.zeros(500, int), np.arange(500), domain, batch=20, instances=None, power=power, rng=generator()
        )
        share = np.mean([domain[batch[0]] == 0 for batch in batches])
        assert share == pytest.approx(expected, abs=1 / len(batches))
