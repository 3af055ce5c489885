"""Pictures: the same bits everywhere, and masks that tell the truth about them."""

import dataclasses
import hashlib

import numpy as np
import pytest

from reidctl.synthped import cast
from reidctl.synthped.canvas import BACKGROUND, UPPER, Canvas, plain
from reidctl.synthped.captions import captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws, balanced
from reidctl.synthped.figure import Figure
from reidctl.synthped.png import png_bytes
from reidctl.synthped.render import draw_person, render
from reidctl.synthped.scene import draw_occluder
from reidctl.synthped.shot import Item, make_shot

CONFIG = SynthConfig(people=20, clone_pairs=0)

# Made with numpy 2.4 on x86-64 Linux; a change of any drawing code changes them on purpose, another machine must not.
GOLDEN = {
    ("a", 0, 0): "65ced992923e44c8dbccf93e46dbe89e08469998d13b3dd02a54bbf7a1ce46c1",
    ("a", 7, 3): "3a67fcd110130bcbd925a10cf64e7489fc8a426c072c671a7288de74eda9d65b",
    ("b", 11, 5): "9f9a7b759f7021cb4c080a4930a59e3a47220f7cf00f73d2ec243884ac51cb6e",
}
GOLDEN_CAPTION = "tall elderly man brown and pink two-tone collared shirt blue pants grey ankle boots gray backpack"


@pytest.mark.parametrize(("domain", "person", "image"), list(GOLDEN))
def test_file_bytes_are_the_recorded_ones(domain, person, image):
    picture = render(CONFIG, person, image, domain=domain)
    assert hashlib.sha256(png_bytes(picture.pixels)).hexdigest() == GOLDEN[domain, person, image]


def test_caption_is_the_recorded_one():
    assert captions(CONFIG, render(CONFIG, 7, 3))[0].text == GOLDEN_CAPTION


def test_draws_equal_the_documented_raw_stream():
    """PCG64's raw 64-bit stream is guaranteed stable by numpy; `unit` is its upper 53 bits."""
    raw = np.random.PCG64(np.random.SeedSequence([3, 1])).random_raw(2)
    rng = Draws(3, 1)
    assert rng.unit() == (int(raw[0]) >> 11) / 2**53
    assert rng.below(10) == int(raw[1]) % 10


def test_noise_has_mean_zero_and_unit_deviation():
    noise = Draws(0).noise(100, 100, 3)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_balanced_options_differ_by_at_most_one():
    drawn = [balanced("abcde", index, 9, 9) for index in range(23)]
    counts = [drawn.count(option) for option in "abcde"]
    assert max(counts) - min(counts) <= 1
    assert drawn[:5] != list("abcde") or drawn[5:10] != list("abcde")


def test_a_picture_does_not_depend_on_the_number_of_people_or_images():
    more = CONFIG.replace(people=40)
    assert np.array_equal(render(CONFIG, 3, 2).pixels, render(more, 3, 2).pixels)


def test_seeds_give_different_pictures():
    other = CONFIG.replace(seed=1)
    assert not np.array_equal(render(CONFIG, 3, 2).pixels, render(other, 3, 2).pixels)


@pytest.mark.covers(20)
@pytest.mark.parametrize("size", [(64, 32), (128, 64), (256, 128), (384, 128)])
def test_every_size_shows_the_same_scene(size):
    """Masks of other sizes, reduced to a 16x8 grid, agree with those of 128x64."""
    picture = render(CONFIG.replace(size=size), 4, 1)
    assert picture.pixels.shape == (*size, 3)
    coarse, reference = _coarse(picture.masks["person"]), _coarse(render(CONFIG, 4, 1).masks["person"])
    assert np.abs(coarse - reference).mean() < 0.03


def _coarse(mask):
    height, width = mask.shape
    return mask.reshape(16, height // 16, 8, width // 8).mean(axis=(1, 3))


@pytest.mark.covers(188)
def test_person_mask_is_the_union_of_the_parts_and_bare_skin():
    for person in range(6):
        masks = render(CONFIG, person, 0).masks
        leaves = [masks[part] for part in masks if part not in ("person", "head")]
        total = np.sum(leaves, axis=0)
        assert total.max() <= 1, "leaf parts never overlap"
        assert not (total.astype(bool) & ~masks["person"]).any()
        assert (masks["head"] <= masks["person"]).all()


def test_parts_are_where_a_person_has_them():
    for person in range(8):
        masks = render(CONFIG.replace(occlusion=0), person, 0).masks
        middle = {part: np.argwhere(mask)[:, 0].mean() for part, mask in masks.items()}
        assert middle["head"] < middle["upper"] < middle["lower"] < middle["shoes"]


def test_upper_pixels_have_the_garment_colour_without_a_camera():
    studio = CONFIG.replace(difficulty=0, occlusion=0)
    picture = next(
        picture
        for picture in (render(studio, person, 0) for person in range(20))
        if picture.shot.outfit.upper_pattern == "plain" and picture.shot.outfit.upper_colour in ("red", "blue")
    )
    red, _, blue = np.median(picture.pixels[picture.masks["upper"]], axis=0)
    assert (red > blue) == (picture.shot.outfit.upper_colour == "red")


def test_an_occluder_takes_pixels_away_from_the_masks():
    canvas = Canvas(128, 64)
    canvas.paint(canvas.profile([(0, 0, 64), (127, 0, 64)]), UPPER, plain((200, 0, 0)))
    before = int((canvas.labels() == UPPER).sum())
    draw_occluder(canvas, Draws(5), "pole", "a")
    after = canvas.labels()
    assert before * 0.8 < int((after == UPPER).sum()) < before
    assert (after[64] == BACKGROUND).any(), "the pole crosses the middle row"


def test_hidden_share_is_zero_without_an_occluder():
    assert all(render(CONFIG.replace(occlusion=0), person, 0).hidden == 0 for person in range(3))
    assert any(render(CONFIG.replace(occlusion=1), person, 0).hidden > 0.02 for person in range(6))


def _drawn(view, items=()):
    person = cast.person(CONFIG, "a", 2)
    shot = dataclasses.replace(make_shot(CONFIG, person, 0), view=view, items=items, shift_x=0.0)
    canvas = Canvas(128, 64)
    draw_person(canvas, Figure(person, shot))
    return canvas.labels()


def test_a_face_shows_from_the_front_and_not_from_behind():
    from reidctl.synthped.canvas import FACE

    front, side, back = (int((_drawn(view) == FACE).sum()) for view in ("front", "left side", "back"))
    assert front > 20
    assert side > 20
    assert back == 0


@pytest.mark.covers(19)
@pytest.mark.parametrize(
    ("view", "side", "right_half"),
    [("front", "left", True), ("front", "right", False), ("back", "left", False), ("back", "right", True)],
)
def test_the_persons_left_hand_is_on_the_pictures_right_only_from_the_front(view, side, right_half):
    from reidctl.synthped.canvas import BAG

    columns = np.argwhere(_drawn(view, (Item("handbag", "red", side, "hand"),)) == BAG)[:, 1]
    assert (columns.mean() > 32) == right_half


def test_a_person_whose_left_side_shows_looks_to_the_left():
    from reidctl.synthped.canvas import FACE, HAIR

    labels = _drawn("left side")
    face, hair = np.argwhere(labels == FACE)[:, 1].mean(), np.argwhere(labels == HAIR)[:, 1].mean()
    assert face < hair


def test_a_backpack_is_larger_from_behind_than_from_the_front():
    from reidctl.synthped.canvas import BAG

    pack = (Item("backpack", "red", "", "back"),)
    assert (_drawn("back", pack) == BAG).sum() > 1.5 * (_drawn("front", pack) == BAG).sum()
