"""What stands in for removed patches."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from reidctl.errors import UsageError
from reidctl.explain.fills import FILLS, Pictures, blur, check_fill, make_fill, pixel_mask, to_grid
from reidctl.pixels import normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GRID, SIZE = (4, 2), (32, 16)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
DONORS = RNG.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
ROWS = torch.tensor([2, 0, 1, 0])
REMOVED = torch.from_numpy(RNG.random((4, 8)) < 0.4)


def pictures(**changes):
    facts = {"seeds": [1, 2, 3], "donors": DONORS, **changes}
    return Pictures(PIXELS, GRID, MEAN, STD, **facts)


def invert(pixels, mask):
    """A plug-in that also touches what it was not asked to."""
    assert pixels.shape == (len(mask), *SIZE, 3) and mask.dtype == bool
    return 255 - pixels


def halve(pixels, mask):
    return pixels[:, ::2]


def tell(pixels, mask):
    return "a man in red"


def by_cell(removed, grid, size):
    """A slow mask: each cell is painted, pixel by pixel."""
    mask = np.zeros((len(removed), *size), bool)
    rows = np.linspace(0, size[0], grid[0] + 1).round().astype(int)
    columns = np.linspace(0, size[1], grid[1] + 1).round().astype(int)
    for b in range(len(removed)):
        for n in np.flatnonzero(removed[b]):
            i, j = divmod(int(n), grid[1])
            mask[b, rows[i] : rows[i + 1], columns[j] : columns[j + 1]] = True
    return mask


@pytest.mark.parametrize(("grid", "size"), [((4, 2), (32, 16)), ((3, 2), (32, 17)), ((5, 3), (7, 4)), ((1, 1), (5, 5))])
def test_cells_tile_the_picture_also_where_it_is_not_divisible(grid, size):
    removed = torch.from_numpy(RNG.random((6, grid[0] * grid[1])) < 0.5)
    assert (pixel_mask(removed, grid, size).numpy() == by_cell(removed.numpy(), grid, size)).all()
    each = pixel_mask(torch.eye(grid[0] * grid[1], dtype=torch.bool), grid, size)
    assert (each.sum(dim=0) == 1).all()  # every pixel lies in exactly one cell


@pytest.mark.covers(185)
@pytest.mark.parametrize("name", [*FILLS, f"plugin:{__name__}:invert"])
def test_a_fill_changes_exactly_the_chosen_patches(name):
    images, keep = make_fill(name, pictures())(ROWS, REMOVED)
    before = normalise(PIXELS, MEAN, STD)[ROWS]
    mask = torch.from_numpy(by_cell(REMOVED.numpy(), GRID, SIZE))[:, None].expand_as(before)
    assert (images[~mask] == before[~mask]).all()  # bit for bit
    if name == "drop":
        assert (images == before).all()
        assert (keep == ~REMOVED).all()
    else:
        assert keep is None
        # A pixel may by chance be what it is replaced by; of 3 channels hardly ever are all.
        assert (images != before).any(dim=1)[mask[:, 0]].float().mean() > 0.999


@pytest.mark.covers(185)
def test_each_fill_shows_what_it_says():
    whole = torch.ones(3, 8, dtype=torch.bool)
    every = torch.arange(3)
    shown = {name: make_fill(name, pictures())(every, whole)[0] for name in FILLS}
    assert (shown["mean"] == 0).all()
    assert (shown["zero"] == normalise(np.zeros_like(PIXELS), MEAN, STD)).all()
    assert (shown["swap"] == normalise(DONORS, MEAN, STD)).all()
    assert (shown["blur"] == blur(normalise(PIXELS, MEAN, STD), GRID)).all()
    inverted = make_fill(f"plugin:{__name__}:invert", pictures())(every, whole)[0]
    assert (inverted == normalise(255 - PIXELS, MEAN, STD)).all()


def test_noise_has_the_picture_s_own_mean_and_spread_and_lies_in_the_range_of_pixels():
    level, spread = np.array([90, 128, 160]), np.array([10, 20, 5])
    pixels = (RNG.standard_normal((1, 64, 64, 3)) * spread + level).round().clip(0, 255).astype(np.uint8)
    given = Pictures(pixels, (4, 4), MEAN, STD, seeds=[7])
    noise = make_fill("noise", given)(torch.tensor([0]), torch.ones(1, 16, dtype=torch.bool))[0]
    back = noise * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (back.mean(dim=(0, 2, 3)) * 255).numpy() == pytest.approx(level, abs=1.5)
    assert (back.std(dim=(0, 2, 3)) * 255).numpy() == pytest.approx(spread, rel=0.05)
    wide = make_fill("noise", pictures())(torch.arange(3), torch.ones(3, 8, dtype=torch.bool))[0]
    black, white = (normalise(np.full_like(PIXELS, v), MEAN, STD) for v in (0, 255))
    assert ((wide >= black) & (wide <= white)).all()


def test_noise_belongs_to_its_picture_not_to_the_batch():
    whole = torch.ones(3, 8, dtype=torch.bool)
    made = make_fill("noise", pictures())(torch.tensor([2, 0, 2]), whole)[0]
    alone = Pictures(PIXELS[2:], GRID, MEAN, STD, seeds=[3])
    assert (made[0] == made[2]).all()
    assert (make_fill("noise", alone)(torch.tensor([0]), whole[:1])[0][0] == made[0]).all()


def test_blur_keeps_one_colour_and_equals_a_slow_gaussian():
    plain = torch.full((1, 3, 16, 16), 0.7)
    assert blur(plain, (4, 4)) == pytest.approx(plain, abs=1e-6)
    image = torch.rand(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    reach = 12  # three standard deviations of 4 pixels
    offsets = torch.arange(-reach, reach + 1)
    weight = torch.exp(-0.5 * (offsets / 4.0) ** 2)
    kernel = torch.outer(weight, weight) / weight.sum() ** 2
    padded = functional.pad(image, (reach, reach, reach, reach), mode="replicate")
    slow = torch.stack(
        [(padded[0, :, y : y + 25, x : x + 25] * kernel).sum(dim=(1, 2)) for y in range(16) for x in range(8)], dim=1
    )
    assert blur(image, (4, 2))[0].flatten(1).numpy() == pytest.approx(slow.numpy(), abs=1e-5)


def test_patches_of_another_model_are_dropped_where_their_centres_are_removed():
    removed = torch.tensor([[True, False, False, True]])  # 2 x 2
    finer = to_grid(removed, (2, 2), (4, 4)).reshape(4, 4)
    assert finer.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert to_grid(removed, (2, 2), (2, 2)) is removed
    coarse = to_grid(torch.eye(9, dtype=torch.bool), (3, 3), (1, 1))
    assert coarse.flatten().nonzero().flatten().tolist() == [4]  # the middle cell
    _, keep = make_fill("drop", pictures(tower_grid=(2, 2)))(ROWS[:1], torch.tensor([[True] * 4 + [False] * 4]))
    assert keep.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("name", ["inpaint", "plugin:", "plugin:math", f"plugin:{__name__}:none", "plugin:no.such:run"])
def test_a_fill_that_does_not_exist_is_refused(name):
    with pytest.raises(UsageError):
        check_fill(name)


@pytest.mark.parametrize(("function", "found"), [("halve", "shape"), ("tell", "str")])
def test_a_plug_in_that_returns_no_such_pictures_is_refused(function, found):
    with pytest.raises(UsageError, match=found):
        make_fill(f"plugin:{__name__}:{function}", pictures())(ROWS, REMOVED)


def test_fills_that_lack_what_they_need_are_refused():
    with pytest.raises(UsageError, match="swap"):
        make_fill("swap", pictures(donors=None))
    with pytest.raises(UsageError, match="noise"):
        make_fill("noise", pictures(seeds=None))


def test_no_fill_shows_the_picture():
    images, keep = make_fill("", pictures())(ROWS, REMOVED)
    assert keep is None and (images == normalise(PIXELS, MEAN, STD)[ROWS]).all()
