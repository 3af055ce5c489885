"""What linear probes find when it is there, and what they must not find when it is not."""

import numpy as np
import pandas as pd
import pytest

from reidctl.evaluation import probes

PEOPLE, EACH, VALUES = 60, 4, 5


def planted(seed=0, people=PEOPLE, each=EACH, values=VALUES):
    """Person of each image, a label that is fixed for a person, and a generator."""
    rng = np.random.default_rng(seed)
    person = np.repeat([f"p{number:02d}" for number in range(people)], each).astype(object)
    label = np.repeat([f"v{number % values}" for number in rng.permutation(people)], each).astype(object)
    return person, label, rng


def one_hot(label, rng, noise=0.1, width=24):
    codes = np.unique(label.astype(str), return_inverse=True)[1]
    features = rng.normal(scale=noise, size=(len(label), width))
    features[np.arange(len(label)), codes] += 1
    return features


@pytest.mark.covers(160)
def test_a_feature_that_holds_the_attribute_is_read_on_unseen_people():
    person, label, rng = planted()
    probe = probes.probe_attribute(one_hot(label, rng), label, person)
    assert probe.accuracy.value > 0.97 and probe.accuracy.low > probe.control + 0.5
    assert probe.chance == 1 / VALUES and abs(probe.control - 1 / VALUES) < 0.12
    assert probe.images == PEOPLE * EACH and probe.people == PEOPLE and probe.classes == VALUES
    assert probe.balanced is None


@pytest.mark.covers(160)
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_read_like_its_control(seed):
    person, label, rng = planted(seed)
    # Alike within a person, as features are: the hard kind of noise.
    features = np.repeat(rng.normal(size=(PEOPLE, 24)), EACH, axis=0) + 0.3 * rng.normal(size=(len(person), 24))
    probe = probes.probe_attribute(features, label, person, seed=seed)
    assert probe.accuracy.low <= probe.control <= probe.accuracy.high
    gain = probes.excess([probe], seed=seed)
    assert gain.low <= 0 <= gain.high


def test_a_feature_of_who_somebody_is_tells_nothing_about_attributes_of_unseen_people():
    person, label, _ = planted()
    own = np.eye(PEOPLE)[np.unique(person.astype(str), return_inverse=True)[1]]
    probe = probes.probe_attribute(own, label, person)
    assert probe.accuracy.value < 0.4
    assert probes.probe_identity(own, person, np.tile(list("abcd"), PEOPLE).astype(object)).accuracy.value == 1


def test_probes_do_not_depend_on_the_units_of_a_feature_or_on_constant_features():
    person, label, rng = planted()
    features = one_hot(label, rng)
    scaled = np.hstack([features * 1000 + 5, np.full((len(person), 3), 7.0)])
    one, other = (probes.probe_attribute(given, label, person, permutations=1) for given in (features, scaled))
    assert one.accuracy == other.accuracy and one.control == other.control


def test_no_person_and_no_family_is_on_both_sides(monkeypatch):
    person, label, rng = planted()
    family = np.array([f"f{int(name[1:]) // 2}" for name in person], dtype=object)
    features = np.arange(len(person), dtype=float)[:, None] * 1000 + rng.random((len(person), 1))
    seen = []

    def fitted(train, given, of, test, rng):
        rows = (features[:, 0][None] == test[:, 0][:, None]).argmax(1)
        seen.append((set(of), set(family[rows])))
        return np.full(len(test), given[0], dtype=object)

    monkeypatch.setattr(probes, "_fitted", fitted)
    probes.probe_attribute(features, label, person, family=family)
    assert len(seen) == 2 * (1 + probes.PERMUTATIONS)
    for train, test in seen:
        assert train and test and not train & test


def test_the_penalty_is_chosen_without_a_look_at_the_test_half(monkeypatch):
    person, label, rng = planted()
    features, given = one_hot(label, rng), []
    real = probes._logistic

    def watched(train, of, test, strength):
        given.append((len(train), len(test)))
        return real(train, of, test, strength)

    monkeypatch.setattr(probes, "_logistic", watched)
    probes.probe_attribute(features, label, person, permutations=0 + 1)
    # Of 240 images, 120 are the training half: 60 teach, 60 judge, then all 120 teach and the other 120 are asked.
    sizes = given[: len(probes.STRENGTHS) + 1]
    assert sizes == [*[(60, 60)] * len(probes.STRENGTHS), (120, 120)]


def test_labels_of_others_leave_nobody_their_own_and_keep_people_whole():
    person, _, _ = planted(people=9, each=3)
    for seed in range(5):
        given = probes.labels_of_others(person, person, np.random.default_rng(seed))
        assert (given != person).all()
        frame = pd.DataFrame({"own": person, "given": given}).drop_duplicates()
        assert len(frame) == 9 and set(frame["given"]) == set(person)


def test_labels_of_others_follow_the_person_where_a_family_of_two_gives_to_one():
    person = np.array(["a"] * 4 + ["b"] * 4 + ["c"] * 4, dtype=object)
    family = np.array(["ab"] * 8 + ["c"] * 4, dtype=object)
    for seed in range(8):
        given = probes.labels_of_others(person, person, np.random.default_rng(seed), family=family)
        assert set(given[:8]) == {"c"} and len(set(given[8:])) == 1


def test_chance_is_the_largest_share_and_a_skewed_attribute_gets_a_balanced_accuracy():
    person, _, rng = planted()
    label = np.where(np.arange(PEOPLE) < 48, "no", "yes").repeat(EACH).astype(object)
    probe = probes.probe_attribute(rng.normal(size=(len(person), 4)), label, person)
    assert probe.chance == 0.8 and probe.accuracy.value > 0.6
    assert abs(probe.balanced.value - 0.5) < 0.12 and abs(probe.balanced_control - 0.5) < 0.12
    sure = probes.probe_attribute(one_hot(label, rng, width=4), label, person)
    assert sure.balanced.value > 0.95 and sure.balanced.low > 0.85


def slow_mean_of_ratios(probe_values, seed, resamples=1000):
    """The mean over probes of the mean over images, people drawn one by one."""
    people = sorted({name for _, person in probe_values for name in person})
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(people), np.full(len(people), 1 / len(people)), size=resamples)
    drawn = []
    for weight in weights:
        times = dict(zip(people, weight, strict=True))
        means = []
        for value, person in probe_values:
            every = [v for v, name in zip(value, person, strict=True) for _ in range(times[name])]
            means += [np.mean(every)] if every else []
        drawn.append(np.mean(means))
    return np.quantile(drawn, [0.025, 0.975])


def made_probe(right, control, person):
    person = np.array(person, dtype=object)
    return probes.Probe(
        probes.Interval(0, 0, 0),
        0,
        0,
        None,
        np.nan,
        np.array(right, float),
        np.array(control, float),
        person,
        person,
        2,
    )


def test_means_over_probes_and_their_intervals_equal_a_slow_version():
    one = made_probe([1, 0, 1, 1], [0.5, 0.5, 0, 0], ["a", "a", "b", "c"])
    two = made_probe([0, 0, 1], [0, 0, 0], ["a", "b", "d"])
    found = probes.mean_accuracy([one, two], seed=3)
    assert found.value == pytest.approx((3 / 4 + 1 / 3) / 2)
    expected = slow_mean_of_ratios([(one.right, one.person), (two.right, two.person)], 3)
    np.testing.assert_allclose([found.low, found.high], expected)
    gain = probes.excess([one, two], seed=3)
    assert gain.value == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert gain.low <= gain.value <= gain.high


def test_identity_is_asked_in_other_cameras_and_a_feature_of_the_camera_does_not_help():
    person, _, rng = planted(people=20)
    camera = np.tile(["c0", "c0", "c1", "c1"], 20).astype(object)
    own = np.eye(20)[np.unique(person.astype(str), return_inverse=True)[1]]
    place = (camera == "c1")[:, None] * 3.0
    found = probes.probe_identity(np.hstack([own, place]), person, camera)
    assert found.accuracy.value == 1 and found.chance == 1 / 20 and found.control < 0.2
    noise = probes.probe_identity(rng.normal(size=(80, 8)), person, camera)
    assert noise.accuracy.low <= 1 / 20 <= noise.accuracy.high


def test_the_nearest_mean_equals_a_slow_version_and_equal_features_share_the_vote():
    person, _, rng = planted(people=6, each=4)
    camera = np.tile(["c0", "c1", "c0", "c1"], 6).astype(object)
    features = rng.normal(size=(24, 3))
    right = probes.probe_identity(features, person, camera).right
    for row in range(24):
        train = camera != camera[row]
        scale = features[train].std(axis=0)
        means = {name: features[train & (person == name)].mean(axis=0) / scale for name in set(person)}
        distance = {name: np.linalg.norm(features[row] / scale - mean) for name, mean in means.items()}
        assert right[row] == (min(distance, key=distance.get) == person[row])
    flat = probes.probe_identity(np.ones((24, 3)), person, camera)
    np.testing.assert_allclose(flat.right, 1 / 6)


def test_across_outfits_only_people_with_two_outfits_are_asked_and_clothes_do_not_help():
    person = np.array(["a"] * 4 + ["b"] * 4 + ["c"] * 4, dtype=object)
    outfit = np.array(["1", "1", "2", "2", "3", "3", "4", "4", "5", "5", "5", "5"], dtype=object)
    clothes = np.eye(5)[[int(name) - 1 for name in outfit]]
    found = probes.probe_identity(clothes, person, outfit, strict=True)
    assert found.images == 8 and found.people == 2 and found.accuracy.value == 0.5  # equally far from both means
    assert probes.probe_identity(clothes, person, person).accuracy.value == 1  # image by image, the clothes name them


def test_identity_needs_two_people_with_two_images():
    person = np.array(["a", "a", "b"], dtype=object)
    assert probes.probe_identity(np.eye(3), person, np.array(["x", "y", "x"], dtype=object)) is None


def images_with(columns, people=10, each=2):
    person = np.repeat([f"p{number}" for number in range(people)], each)
    rows = [{name: values[number // each] for name, values in columns.items()} for number in range(people * each)]
    return pd.DataFrame({"person_id": person, "attributes": rows}), person.astype(object)


def test_which_attributes_can_be_probed():
    images, family = images_with(
        {
            "gender": ["man", "woman"] * 5,
            "upper_colour": ["red"] * 4 + ["blue"] * 4 + ["green"] + [""],
            "clone_of": ["x", "y"] * 5,
            "skin": ["pale", "dark"] * 5,
            "age": ["adult"] * 10,
            "id": [str(number) for number in range(10)],
            "rare": ["a", "b"] * 2 + [""] * 6,
        }
    )
    found, left_out = probes.attribute_labels(images, family)
    assert list(found) == ["gender", "upper_colour"] and left_out == ["age", "id", "rare"]
    assert set(found["upper_colour"][:16]) == {"red", "blue"} and set(found["upper_colour"][16:]) == {None}
    assert "skin" in probes.attribute_labels(images, family, sensitive=True)[0]
    alike = np.array(["f0"] * 4 + list(family[4:]), dtype=object)
    assert set(probes.attribute_labels(images, alike)[0]) == {"gender"}  # upper_colour is left with 7 families


def test_images_without_attributes_have_nothing_to_probe():
    images, family = images_with({})
    images["attributes"] = None
    assert probes.attribute_labels(images, family) == ({}, [])


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("upper_colour", "clothing"),
        ("shoe_type", "clothing"),
        ("gender", "body"),
        ("hair_colour", "body"),
        ("view", "other"),
    ],
)
def test_attributes_are_grouped_by_name(name, group):
    assert probes.group_of(name) == group
