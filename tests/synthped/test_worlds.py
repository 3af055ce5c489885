"""The third world: people, places and tones that a model of worlds a and b never saw, told in the same words."""

import hashlib
import itertools

import numpy as np
import pytest
from cli.commandline import cli

from reidctl import tables
from reidctl.synthped import cast, palette, words
from reidctl.synthped.captions import captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset
from reidctl.synthped.png import png_bytes
from reidctl.synthped.render import render
from reidctl.synthped.shot import make_shot

CONFIG = SynthConfig(people=40, clone_pairs=0)
STUDIO = CONFIG.replace(difficulty=0, occlusion=0)
WORLDS = ("a", "b", "c")
MOST = 9999  # the largest index or number of people

# Made with numpy 2.4 on x86-64 Linux; a change of any drawing code changes it on purpose, another machine must not.
GOLDEN = "3d8694ed6d2dbb1fe86075fe77a9e7d2bf9c2e18d7fb8cb177828c3bd2a59cec"


def everyone(config, domain):
    return [cast.person(config, domain, index) for index in range(config.people)]


def surroundings(picture):
    """The mean colour of what is not the person."""
    return picture.pixels[~picture.masks["person"]].mean(axis=0)


def test_both_is_a_and_b_and_leaves_c_unseen():
    assert SynthConfig(domain="both").domains == ("a", "b")
    assert SynthConfig(domain="c").domains == ("c",)


def test_file_bytes_of_the_third_world_are_the_recorded_ones():
    picture = render(CONFIG, 3, 1, domain="c")
    assert hashlib.sha256(png_bytes(picture.pixels)).hexdigest() == GOLDEN
    assert np.array_equal(picture.pixels, render(CONFIG.replace(domain="c", people=90), 3, 1).pixels)


@pytest.mark.covers(220)
def test_nobody_and_no_picture_of_the_unseen_world_is_in_the_worlds_of_training(tmp_path):
    for domain in ("both", "c"):
        config = SynthConfig(people=12, images_per_person=3, size=(64, 32), domain=domain)
        write_dataset(config.replace(crossing=3) if domain == "both" else config, tmp_path / domain, workers=1)
    seen, unseen = (tables.read_table(tmp_path / domain / "images.parquet", "images") for domain in ("both", "c"))
    assert set(seen["dataset"]) == {"synthped-a", "synthped-b"}
    assert set(unseen["dataset"]) == {"synthped-c"}
    for column in ("image_id", "person_id", "outfit_id", "sha256"):
        assert not set(seen[column]) & set(unseen[column]), column
    people = [{dict(row)["true_person"] for row in frame["attributes"]} for frame in (seen, unseen)]
    assert not people[0] & people[1]
    assert set(unseen["split"]) == {"train", "val", "test"}


def test_numbers_of_people_wardrobes_and_look_alikes_never_meet():
    """Bodies and wardrobes come from own numbers, 20000 + those of a or b (crossing), 40000 + own (look-alikes)."""
    own = {world: cast.own_number(world, 0) for world in WORLDS}
    starts = [*own.values(), 20000 + own["a"], 20000 + own["b"], *(40000 + first for first in own.values())]
    for one, other in itertools.combinations(starts, 2):
        assert abs(one - other) > MOST


def test_people_of_the_third_world_have_other_bodies_clothes_and_pictures_than_those_of_the_same_number():
    for domain in ("a", "b"):
        for theirs, ours in zip(everyone(CONFIG, domain), everyone(CONFIG, "c"), strict=True):
            assert ours.body != theirs.body
            assert ours.outfits != theirs.outfits
            assert ours.true_person != theirs.true_person
            assert make_shot(CONFIG, ours, 0) != make_shot(CONFIG, theirs, 0)


def test_nobody_of_the_third_world_wears_a_second_wardrobe_or_is_a_double():
    config = SynthConfig(people=60, domain="both", crossing=9, crossing_outfit="different", clone_pairs=0)
    alone = config.replace(domain="c", crossing=0)
    assert everyone(config, "c") == everyone(alone, "c")
    wardrobes = {person.outfits[0].outfit_id for person in everyone(alone, "c")}
    assert wardrobes == {f"outfit-{60000 + index}-0" for index in range(60)}


def test_places_and_tones_of_the_third_world_are_others_and_colder():
    means = {
        domain: np.mean([surroundings(render(STUDIO, person, 0, domain=domain)) for person in range(40)], axis=0)
        for domain in WORLDS
    }
    for domain in ("a", "b"):
        assert np.abs(means["c"] - means[domain]).max() > 8, means
        assert all(palette.CLOTH["c"][name] != tone for name, tone in palette.CLOTH[domain].items())
    blueness = {domain: mean[2] - mean[0] for domain, mean in means.items()}
    assert blueness["c"] > max(blueness["a"], blueness["b"]) + 10, "night and snow"


@pytest.mark.parametrize("domain", WORLDS)
def test_every_world_paints_the_colours_it_names(domain):
    """The middle colour of a plain garment, without a camera, is nearest to the tone of the colour that is told."""
    tones = {name: np.array(palette.CLOTH[domain][name]) for name in palette.UPPER_COLOURS}
    checked = set()
    for person in range(40):
        picture = render(STUDIO.replace(carry=0), person, 0, domain=domain)
        outfit = picture.shot.outfit
        if outfit.upper_pattern == "plain" and outfit.upper_type in ("t-shirt", "shirt", "hoodie", "sweater", "dress"):
            middle = np.median(picture.pixels[picture.masks["upper"]], axis=0)
            assert min(tones, key=lambda name: np.abs(tones[name] - middle).sum()) == outfit.upper_colour
            checked.add(outfit.upper_colour)
    assert len(checked) >= 3


def test_all_worlds_have_the_same_colour_names():
    assert set(palette.CLOTH["a"]) == set(palette.CLOTH["b"]) == set(palette.CLOTH["c"])


def test_captions_of_the_third_world_say_the_colours_that_are_painted():
    told = 0
    for person in range(20):
        picture = render(CONFIG, person, 0, domain="c")
        outfit = picture.shot.outfit
        for text in captions(CONFIG, picture):
            spans = {span.part: text.text[span.start : span.end].lower() for span in text.spans}
            for part, colour in (("upper", outfit.upper_colour), ("lower", outfit.lower_colour)):
                if part in spans:
                    told += 1
                    assert any(name in spans[part] for name in words.SYNONYMS.get(colour, (colour,)))
    assert told > 40


def test_people_of_the_third_world_fit_into_the_picture_and_stand_out_from_their_surroundings():
    """On average the garment and what is beside it differ by more than the noise of the camera."""
    gaps = []
    for person in range(40):
        picture = render(CONFIG.replace(occlusion=0), person, person % 6, domain="c")
        upper, whole = picture.masks["upper"], picture.masks["person"]
        rows = np.flatnonzero(whole.any(axis=1))
        assert rows[0] > 0 and rows[-1] < 127
        beside = (np.roll(upper, 4, axis=1) | np.roll(upper, -4, axis=1)) & ~whole
        colours = [np.median(picture.pixels[mask], axis=0) for mask in (upper, beside)]
        gaps.append(np.abs(colours[0] - colours[1]).max())
    assert np.median(gaps) > 30
    assert np.mean(np.array(gaps) < 12) < 0.1


def test_the_third_world_is_rendered_by_option_or_setting_and_passes_the_doctor(tmp_path):
    asked = ("data", "synth", "--people", 6, "--images-per-person", 4, "--size", "64x32", "--workers", 1)
    assert cli(*asked, "--domain", "c", "--run", tmp_path / "run").code == 0
    for kind in ("images", "captions"):
        frame = tables.read_table(tmp_path / "run" / "data" / f"{kind}.parquet", kind)
        assert frame["image_id"].str.startswith("synthped-c-").all()
    assert set(frame["kind"]) == {"full", "phrase", "identity", "clothing"}
    same = cli(*asked, "--set", "synth.domain=c", "--run", tmp_path / "run", "--json")
    assert same.json["status"] == "up-to-date"
    assert same.json["rendered"] == ["synthped-c"]
    assert cli("data", "check", "--run", tmp_path / "run", "--json").code == 0
    assert "a, b, c or both" in " ".join(cli("data", "synth", "--help").out.split())
    refused = cli(*asked, "--domain", "c", "--crossing", 2, "--run", tmp_path / "other")
    assert refused.code == 2 and "domain=both" in refused.err
