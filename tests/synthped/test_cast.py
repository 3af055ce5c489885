"""Who exists: splits, balance, look-alikes, doubles, outfits, queries."""

from collections import Counter

import pytest

from reidctl.config import parse_section
from reidctl.errors import UsageError
from reidctl.synthped import cast, palette
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.shot import make_shot

CONFIG = SynthConfig(people=200)
PLAIN = CONFIG.replace(clone_pairs=0)


def everyone(config, domain="a"):
    return [cast.person(config, domain, index) for index in range(config.people)]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"people": 0}, "synth.people"),
        ({"images_per_person": 1}, "synth.images_per_person"),
        ({"size": [8, 8]}, "size 8x8"),
        ({"train_fraction": 0.9, "val_fraction": 0.2}, "test split"),
        ({"crossing": 3}, "domain=both"),
        ({"crossing": 3, "domain": "c"}, "domain=both"),
        ({"domain": "d"}, "synth.domain"),
        ({"people": 10, "clone_pairs": 6}, "6 pairs"),
        ({"peple": 10}, "Did you mean `people`"),
    ],
)
def test_impossible_settings_are_a_usage_error_that_names_them(values, named):
    with pytest.raises(UsageError, match=named):
        parse_section(SynthConfig, values, "synth")


@pytest.mark.covers(12)
def test_splits_by_identity_have_the_sizes_asked_for():
    assert Counter(person.split for person in everyone(CONFIG)) == {"train": 120, "val": 40, "test": 40}


@pytest.mark.parametrize("people", [5, 6, 7, 11])
def test_small_datasets_still_have_a_test_split(people):
    assert {"train", "test"} <= {person.split for person in everyone(SynthConfig(people=people, clone_pairs=0))}


def test_colours_patterns_and_bodies_are_near_uniform():
    people = everyone(PLAIN)
    factors = {
        "upper_colour": (palette.UPPER_COLOURS, [person.outfits[0].upper_colour for person in people]),
        "pattern": (palette.PATTERNS, [person.outfits[0].upper_pattern for person in people]),
        "lower_colour": (palette.LOWER_COLOURS, [person.outfits[0].lower_colour for person in people]),
        "build": (palette.BUILDS, [person.body.build for person in people]),
        "stature": (palette.STATURES, [person.body.stature for person in people]),
        "skin": (palette.SKINS, [person.body.skin for person in people]),
        "gender": (palette.GENDERS, [person.body.gender for person in people]),
    }
    for name, (options, values) in factors.items():
        counts = Counter(values)
        assert set(counts) == set(options), name
        assert max(counts.values()) - min(counts.values()) <= 1, name


@pytest.mark.covers(166)
def test_look_alikes_share_exactly_the_outfit_or_the_body():
    people = everyone(CONFIG.replace(clone_pairs=10))
    by_id = {person.person_id: person for person in people}
    pairs = [(person, by_id[person.clone_of]) for person in people if person.clone_of and person.index % 2]
    assert Counter(person.clone_kind for person, _ in pairs) == {"outfit": 5, "body": 5}
    for person, other in pairs:
        assert other.clone_of == person.person_id
        assert other.split == person.split
        assert (person.outfits == other.outfits) == (person.clone_kind == "outfit")
        assert (person.body == other.body) == (person.clone_kind == "body")


def test_outfit_look_alikes_have_visibly_other_bodies():
    people = everyone(CONFIG.replace(clone_pairs=40))
    for one in (person for person in people if person.clone_kind == "outfit" and person.index % 2):
        other = people[one.index - 1]
        assert one.body.build != other.body.build
        assert one.body.skin != other.body.skin
        assert one.body.stature != other.body.stature


def test_a_share_of_people_can_be_given_instead_of_a_number_of_pairs():
    assert CONFIG.replace(clone_pairs=0.1).pairs == 10
    assert CONFIG.replace(clone_pairs=7).pairs == 7


@pytest.mark.covers(9, 10)
def test_crossing_people_are_in_both_datasets_and_a_third_changes_split():
    config = SynthConfig(people=60, domain="both", crossing=15, clone_pairs=0)
    in_a = {person.true_person: person for person in everyone(config, "a")}
    in_b = {person.true_person: person for person in everyone(config, "b")}
    shared = set(in_a) & set(in_b)
    assert len(shared) == 15
    assert len(in_b) == 60
    leaks = [number for number in shared if (in_a[number].split, in_b[number].split) == ("train", "test")]
    assert len(leaks) == 5
    assert all(in_a[number].split == in_b[number].split == "train" for number in shared - set(leaks))
    assert all(in_a[number].body == in_b[number].body for number in shared)
    assert all(in_a[number].outfits == in_b[number].outfits for number in shared)


@pytest.mark.covers(97)
def test_crossing_people_can_change_clothes_between_datasets():
    config = SynthConfig(people=60, domain="both", crossing=9, clone_pairs=0, crossing_outfit="different")
    in_a = {person.true_person: person for person in everyone(config, "a")}
    for person in everyone(config, "b"):
        if person.true_person in in_a:
            assert person.body == in_a[person.true_person].body
            assert person.outfits[0].outfit_id != in_a[person.true_person].outfits[0].outfit_id


@pytest.mark.covers(23)
def test_the_two_datasets_share_no_person_ids():
    config = SynthConfig(people=10, domain="both")
    ids = [{person.person_id for person in everyone(config, domain)} for domain in config.domains]
    assert not ids[0] & ids[1]


@pytest.mark.covers(24)
def test_cloth_changing_queries_wear_what_no_gallery_image_of_the_person_shows():
    config = SynthConfig(people=30, variant="cloth-changing")
    for person in everyone(config):
        shots = [make_shot(config, person, image) for image in range(6)]
        worn = {
            role: {shot.outfit.outfit_id for shot in shots if shot.role == role} for role in ("query", "gallery", "")
        }
        if person.split == "train":
            assert len(worn[""]) == 2
        else:
            assert not worn["query"] & worn["gallery"]
            first, second = person.outfits
            assert first.upper_colour != second.upper_colour
            assert first.lower_colour != second.lower_colour


@pytest.mark.parametrize("images", [2, 3, 6, 9])
def test_every_query_has_a_gallery_image_from_another_camera(images):
    config = SynthConfig(people=20, images_per_person=images)
    for person in everyone(config):
        shots = [make_shot(config, person, image) for image in range(images)]
        queries = [shot for shot in shots if shot.role == "query"]
        assert bool(queries) == (person.split != "train")
        assert len({shot.camera for shot in queries}) == len(queries)
        for query in queries:
            assert any(shot.role == "gallery" and shot.camera != query.camera for shot in shots)


def test_each_kind_of_object_is_carried_in_at_most_one_image_of_a_person():
    for person in everyone(CONFIG)[:60]:
        items = [item for image in range(6) for item in make_shot(CONFIG, person, image).items]
        assert max(Counter(item.kind for item in items).values(), default=1) == 1


def test_a_hand_never_holds_two_things():
    for person in everyone(CONFIG.replace(carry=1.0, images_per_person=2))[:60]:
        for image in range(2):
            items = make_shot(CONFIG.replace(carry=1.0, images_per_person=2), person, image).items
            hands = [item.side for item in items if item.place == "hand"]
            assert len(hands) == len(set(hands))
