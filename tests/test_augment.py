"""Every operator against its published definition: torchvision's own code for IRRA, timm's for CLIP-ReID."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomErasing
from torchvision.transforms import functional as F

from reidctl import augment
from reidctl.augment import RECIPES, AugmentConfig, Erase, apply_erase, augment_pixels
from reidctl.backbones.statistics import STATISTICS
from reidctl.config import Section, parse_section
from reidctl.errors import UsageError
from reidctl.pixels import normalise
from reidctl.sides import mentions_side

CLIP_MEAN, CLIP_STD = STATISTICS["clip"]
STILL = {"flip": 0, "pad": 0, "erase": 0}


class Train(Section):
    augment: AugmentConfig = AugmentConfig()


def recipe(name, **changes):
    return AugmentConfig.model_validate({"recipe": name, **changes})


def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def many(config, count, size, **given):
    """The same image augmented with `count` different generators."""
    pixels = noise_image(*size)
    return [augment_pixels(pixels, config, np.random.default_rng((9, n)), **given) for n in range(count)]


def boxes(config, count, size):
    return [found.erase for found in many(config, count, size) if found.erase is not None]


# Rates and distributions


@pytest.mark.covers(19)
@pytest.mark.parametrize("name", ["irra", "irra-flip", "clip-reid", "transreid"])
def test_half_of_the_images_are_mirrored(name):
    flipped = sum(found.flipped for found in many(recipe(name), 1600, (12, 6)))
    assert abs(flipped - 800) < 4 * np.sqrt(1600 * 0.25)


@pytest.mark.covers(19)
def test_every_crop_offset_is_equally_likely_and_the_extremes_occur():
    rows, columns = np.mgrid[0:20, 0:12]
    where = np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)
    config = AugmentConfig(flip=0, pad=3, erase=0)
    seen = np.zeros((7, 7), int)
    for number in range(2450):
        pixels = augment_pixels(where, config, np.random.default_rng((1, number))).pixels
        y, x = pixels[10, 6, :2].astype(int) - (10, 6)
        seen[y + 3, x + 3] += 1
    assert seen.min() > 0
    assert stats.chisquare(seen.ravel()).pvalue > 1e-3


@pytest.mark.covers(19)
def test_erased_boxes_are_distributed_as_torchvision_draws_them_for_irra():
    size = (384, 128)
    ours = boxes(recipe("irra", erase=1), 1500, size)
    image = torch.zeros(3, *size)
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(image, (0.02, 0.4), (0.3, 3.3), [0.0]) for _ in range(1500)]
    for mine, other in (
        ([box.height * box.width for box in ours], [h * w for _, _, h, w, _ in theirs]),
        ([box.height / box.width for box in ours], [h / w for _, _, h, w, _ in theirs]),
        ([box.top for box in ours], [top for top, _, _, _, _ in theirs]),
        ([box.left for box in ours], [left for _, left, _, _, _ in theirs]),
    ):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.covers(19)
def test_erased_boxes_are_distributed_as_timm_draws_them_for_clip_reid():
    timm = pytest.importorskip("timm.data.random_erasing")
    size = (256, 128)
    erasing = timm.RandomErasing(probability=0.5, mode="pixel", max_count=1, device="cpu")
    random.seed(0)
    theirs = []
    for _ in range(1200):
        rows, columns = (axis.unique() for axis in torch.nonzero(erasing(torch.zeros(3, *size))[0], as_tuple=True))
        if len(rows):
            theirs.append((len(rows), len(columns), int(rows[0]), int(columns[0])))
    ours = [(box.height, box.width, box.top, box.left) for box in boxes(recipe("clip-reid"), 1200, size)]
    assert abs(len(theirs) - len(ours)) < 4 * np.sqrt(2 * 1200 * 0.25)
    for number in range(4):
        assert stats.ks_2samp([box[number] for box in ours], [box[number] for box in theirs]).pvalue > 1e-3
    assert stats.ks_2samp([h * w for h, w, _, _ in ours], [h * w for h, w, _, _ in theirs]).pvalue > 1e-3


@pytest.mark.covers(19)
@pytest.mark.parametrize(("name", "largest", "tallest"), [("irra", 0.4, 3.3), ("clip-reid", 1 / 3, 1 / 0.3)])
def test_half_of_the_images_lose_a_box_of_the_published_area_and_shape(name, largest, tallest):
    found = boxes(recipe(name, flip=0, pad=0), 3000, (400, 400))
    assert abs(len(found) - 1500) < 4 * np.sqrt(3000 * 0.25)
    share = np.asarray([box.height * box.width / 160_000 for box in found])
    aspect = np.asarray([box.height / box.width for box in found])
    # Sides are whole pixels: the smallest, about 31 of them, can be half a pixel off, which is 1.6 %.
    assert 0.0195 < share.min() < 0.025 and 0.97 * largest < share.max() < 1.01 * largest
    assert 0.29 < aspect.min() < 0.31 and 0.95 * tallest < aspect.max() < 1.03 * tallest
    assert all(box.top + box.height <= 400 and box.left + box.width <= 400 for box in found)


def test_a_box_reaches_every_edge_of_the_image():
    most = AugmentConfig(**{**STILL, "erase": 1}, erase_area=(9 / 16, 9 / 16), erase_aspect=(1, 1))
    assert {(box.top, box.left, box.height, box.width) for box in boxes(most, 60, (4, 4))} == {
        (top, left, 3, 3) for top in (0, 1) for left in (0, 1)
    }


def test_a_box_that_never_fits_is_not_erased():
    flat = AugmentConfig(**{**STILL, "erase": 1}, erase_area=(1, 1), erase_aspect=(1, 1))
    assert boxes(flat, 20, (16, 8)) == []


# The same pixels as upstream's operators


@pytest.mark.covers(19)
def test_mirror_pad_and_crop_give_what_torchvision_gives_at_one_of_its_offsets():
    pixels = noise_image(20, 10)
    config = AugmentConfig(flip=0.5, pad=3, erase=0)
    for number in range(40):
        found = augment_pixels(pixels, config, np.random.default_rng(number))
        picture = Image.fromarray(pixels)
        padded = F.pad(F.hflip(picture) if found.flipped else picture, 3)
        crops = [np.asarray(F.crop(padded, top, left, 20, 10)) for top in range(7) for left in range(7)]
        assert sum(np.array_equal(found.pixels, crop) for crop in crops) == 1


@pytest.mark.parametrize(("pad", "size"), [(10, (6, 4)), (3, (3, 3)), (1, (1, 1))])
def test_padding_wider_than_the_image_is_what_padding_and_cropping_gives(pad, size):
    pixels = noise_image(*size)
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = augment._window(pixels, top - pad, left - pad)
            assert np.array_equal(window, padded[top : top + size[0], left : left + size[1]])


def upstream(pixels, flipped, shown):
    """torchvision's mirror, padding, crop, ToTensor and Normalize at whichever offset shows those pixels."""
    height, width, _ = pixels.shape
    picture = Image.fromarray(pixels)
    padded = F.pad(F.hflip(picture) if flipped else picture, 10)
    crops = [F.crop(padded, top, left, height, width) for top in range(21) for left in range(21)]
    (found,) = [crop for crop in crops if np.array_equal(np.asarray(crop), shown)]
    return F.normalize(F.to_tensor(found), CLIP_MEAN, CLIP_STD)


@pytest.mark.covers(19)
@pytest.mark.parametrize("name", ["irra", "clip-reid"])
def test_a_whole_recipe_equals_upstreams_transforms_for_the_same_draws(name):
    pixels = noise_image(40, 20)
    config = recipe(name, erase=1)
    for number in range(10):
        found = augment_pixels(pixels, config, np.random.default_rng(number))
        ours = normalise(found.pixels[None], CLIP_MEAN, CLIP_STD)[0]
        apply_erase(ours, found.erase, config, mean=CLIP_MEAN)
        box = found.erase
        inside = ours[:, box.top : box.top + box.height, box.left : box.left + box.width].clone()
        value = torch.tensor(CLIP_MEAN)[:, None, None] if name == "irra" else inside
        image = upstream(pixels, found.flipped, found.pixels)
        assert torch.allclose(ours, F.erase(image, box.top, box.left, box.height, box.width, value), atol=1e-6)


@pytest.mark.covers(19)
def test_the_clip_reid_recipe_fills_its_box_with_unit_noise_per_pixel_and_nothing_else():
    config = recipe("clip-reid")
    before = torch.full((3, 200, 100), 7.0)
    after = before.clone()
    apply_erase(after, Erase(top=20, left=10, height=150, width=70, seed=3), config)
    box = after[:, 20:170, 10:80]
    assert abs(float(box.mean())) < 0.03 and abs(float(box.std()) - 1) < 0.02
    assert stats.kstest(box.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(box[0].flatten(), box[1].flatten())[0, 1]) < 0.04, "channels are independent"
    after[:, 20:170, 10:80] = 7.0
    assert torch.equal(after, before)


# Where the fill and the padding stand relative to normalisation, worked by hand


@pytest.mark.covers(19)
def test_irra_puts_the_mean_in_after_normalising_so_that_an_erased_pixel_is_light_grey_not_the_mean():
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    box = Erase(top=1, left=1, height=2, width=2, seed=0)
    erased = {}
    for fill in ("mean-after", "mean-pixel"):
        image = normalise(white, CLIP_MEAN, CLIP_STD)[0]
        apply_erase(image, box, recipe("irra", erase_fill=fill), mean=CLIP_MEAN)
        assert image[0, 0, 0].item() == pytest.approx((1 - 0.48145466) / 0.26862954)
        erased[fill] = [float(value) for value in image[:, 1, 1]]
    assert erased["mean-after"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert erased["mean-pixel"] == [0, 0, 0]
    red = 255 * (erased["mean-after"][0] * 0.26862954 + 0.48145466)
    assert red == pytest.approx(155.75, abs=0.01), "the mean pixel would be 122.77"


def test_the_fill_follows_the_statistics_that_were_used():
    image = torch.zeros(3, 2, 2)
    apply_erase(image, Erase(0, 0, 1, 1, 0), recipe("irra"), mean=(0.5, 0.25, 0.125))
    assert image[:, 0, 0].tolist() == [0.5, 0.25, 0.125] and image[:, 1].abs().sum() == 0


@pytest.mark.covers(19)
def test_the_margin_is_black_before_normalising():
    white = np.full((8, 8, 3), 255, np.uint8)
    corners = set()
    for number in range(30):
        found = augment_pixels(white, AugmentConfig(flip=0, pad=2, erase=0), np.random.default_rng(number))
        corners |= {round(float(v), 3) for v in normalise(found.pixels[None], CLIP_MEAN, CLIP_STD)[0, 0].flatten()}
    # (0 - 0.48145466) / 0.26862954 and (1 - 0.48145466) / 0.26862954
    assert corners == {-1.792, 1.930}


@pytest.mark.parametrize(
    ("name", "mode"), [("irra", InterpolationMode.BILINEAR), ("clip-reid", InterpolationMode.BICUBIC)]
)
def test_the_resize_of_a_recipe_is_torchvisions_with_the_same_name(name, mode):
    picture = Image.fromarray(noise_image(128, 64))
    pillow = Image.Resampling[recipe(name).interpolation.upper()]
    ours = np.asarray(picture.resize((32, 96), pillow))
    assert np.array_equal(ours, np.asarray(F.resize(picture, [96, 32], mode)))


# Draws


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_same_generator_gives_the_same_sample_and_leaves_the_image_alone(name):
    pixels = noise_image(48, 24)
    kept = pixels.copy()
    one, other = (augment_pixels(pixels, recipe(name), np.random.default_rng((0, 3, 5, 7))) for _ in range(2))
    assert np.array_equal(one.pixels, other.pixels) and one.erase == other.erase
    assert np.array_equal(pixels, kept) and one.pixels.shape == kept.shape and one.pixels.flags.c_contiguous
    config = recipe(name)
    images = [normalise(found.pixels[None], CLIP_MEAN, CLIP_STD)[0] for found in (one, other)]
    for image, found in zip(images, (one, other), strict=True):
        apply_erase(image, found.erase, config)
    assert torch.equal(*images)


def test_forbidding_one_operator_leaves_the_draws_of_the_others():
    for number in range(30):
        pixels = noise_image(48, 24)
        rngs = [np.random.default_rng(number) for _ in range(4)]
        free = augment_pixels(pixels, AugmentConfig(), rngs[0])
        kept = augment_pixels(pixels, AugmentConfig(), rngs[1], may_flip=False)
        still = augment_pixels(pixels, AugmentConfig(pad=0), rngs[2])
        whole = augment_pixels(pixels, AugmentConfig(erase=0), rngs[3])
        assert free.erase == kept.erase == still.erase and whole.erase is None
        assert not kept.flipped and free.flipped == still.flipped == whole.flipped
        assert np.array_equal(whole.pixels, free.pixels)


def test_nothing_is_done_under_the_recipe_none():
    pixels = noise_image(16, 8)
    found = augment_pixels(pixels, recipe("none"), np.random.default_rng(0))
    assert np.array_equal(found.pixels, pixels) and not found.flipped and found.erase is None


# Sides


@pytest.mark.covers(19)
@pytest.mark.parametrize(
    "text",
    [
        "A bag in the left hand.",
        "A bag on her RIGHT.",
        "a left-handed man",
        "a lefthand strap, and a bag",
        "the right_side pocket",
        "the leftmost stripe",
        "walking rightwards",
        "a rightward glance",
        "'left'",
        "left/right stripes",
        "A bag on the right after all.",
        "He is turning right now.",
        "The leftmost, right after the door",
        "all right-hand pockets are open",
        "all right arm sleeves are red",
        "The woman's (right) arm\nholds a phone",
        "He left the shop with a bag.",
    ],
)
def test_a_caption_with_a_side_is_never_paired_with_a_mirrored_image(text):
    config = recipe("irra", flip=1)
    assert not any(found.flipped for found in many(config, 20, (8, 4), may_flip=not mentions_side(text)))


@pytest.mark.covers(19)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "A woman in bright red.",
        "She stands upright; alright.",
        "He looks all right in this coat.",
        "A boy walks in right after his mother",
        "Right after a shop, a man waits.",
        "A collar at right angles, a right-angled pattern",
        "carrying leftovers, cleft chin",
        "a copyright sign on a T-shirt, outright ugly",
    ],
)
def test_words_that_only_look_like_a_side_do_not_forbid_the_mirror(text):
    assert not mentions_side(text)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_every_recipe_respects_sides_unless_told_otherwise(name):
    assert recipe(name).flip_respects_sides and not recipe(name, flip_respects_sides=False).flip_respects_sides


# Settings


def test_a_recipe_is_a_name_or_a_mapping_that_changes_some_of_it():
    default = parse_section(Train, {}, "train").augment
    assert default.recipe == "standard" and default == parse_section(Train, {"augment": "standard"}, "train").augment
    named = parse_section(Train, {"augment": "clip-reid"}, "train").augment
    changed = parse_section(Train, {"augment": {"recipe": "clip-reid", "flip": 0}}, "train").augment
    assert (named.erase_fill, named.interpolation, named.erase_area) == ("noise", "bicubic", (0.02, 1 / 3))
    assert changed == named.replace(flip=0) and changed.flip == 0
    older = parse_section(Train, {"augment": {"pad": 4, "erase": 0.3, "erase_area": [0.02, 0.15]}}, "train").augment
    assert (older.recipe, older.pad, older.erase_fill) == ("standard", 4, "mean-pixel")


def test_settings_written_to_a_record_give_the_same_settings_back():
    for name in RECIPES:
        config = recipe(name, flip_respects_sides=False)
        assert AugmentConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_published_settings_of_every_recipe():
    irra, flip, reid, none = (recipe(name) for name in ("irra", "irra-flip", "clip-reid", "none"))
    assert (irra.flip, irra.pad, irra.erase, irra.erase_area, irra.erase_aspect) == (
        0.5,
        10,
        0.5,
        (0.02, 0.4),
        (0.3, 3.3),
    )
    assert (irra.erase_fill, irra.interpolation) == ("mean-after", "bilinear")
    assert (flip.flip, flip.pad, flip.erase, flip.interpolation) == (0.5, 0, 0, "bilinear")
    assert (reid.flip, reid.pad, reid.erase) == (0.5, 10, 0.5)
    assert recipe("transreid").replace(recipe="clip-reid") == reid
    assert (none.flip, none.pad, none.erase, none.interpolation) == (0, 0, 0, None)
    assert augment.CLIP_MEAN == CLIP_MEAN


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("clipreid", "Unknown augmentation recipe `clipreid`. Did you mean `clip-reid`?"),
        ({"recipe": "IRRA", "flip": 0}, "Unknown augmentation recipe `IRRA`. Did you mean `irra`?"),
        ("xyz", "Known recipes: standard, irra, irra-flip, clip-reid, transreid, none."),
        ({"recipe": ["irra"]}, "Unknown augmentation recipe"),
        ({"recipe": "irra", "flipp": 0}, "Unknown setting `train.augment.flipp`. Did you mean `flip`?"),
        ({"flip": 1.5}, "train.augment.flip"),
        ({"erase_area": [0.4, 0.1]}, "the smaller one first"),
        ({"erase_area": [0.1, 40]}, "at most 1"),
        ({"erase_fill": "black"}, "train.augment.erase_fill"),
        ({"pad": -1}, "train.augment.pad"),
        (3, "train.augment"),
        (None, "train.augment"),
    ],
)
def test_unknown_names_and_impossible_values_are_refused(value, message):
    with pytest.raises(UsageError) as refusal:
        parse_section(Train, {"augment": value}, "train")
    assert message in str(refusal.value)
