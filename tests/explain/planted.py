"""A world in which it is known what a model looks at: the mean colours of four parts of a picture, and nothing else."""

import numpy as np
import torch
from torch.nn import functional

from reidctl.explain.masking import Judge, Pairs, Study
from reidctl.pixels import normalise

GRID = (6, 4)
N = 24
SIZE = (24, 16)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CELL = 4
REGIONS = [(0, 1, 4, 5), (2, 3, 6, 7), (16, 17, 20, 21), (18, 19, 22, 23)]  # the four corners: 4 patches each


def oracle(region):
    heat = np.zeros(N, np.float32)
    heat[list(region)] = 1
    return heat


def pixels_of(region):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    for patch in region:
        y, x = divmod(patch, GRID[1])
        mask[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = True
    return mask


class Looker:
    """Unit vectors (3 per region, and a constant, so that a paler picture has another direction); counts images.

    With `keep` a dropped patch is as good as grey.
    """

    def __init__(self, regions=REGIONS[:1], stop=None):
        self.masks = [pixels_of(region) for region in regions]
        self.images, self.calls, self.stop = 0, [], stop

    def __call__(self, images, keep, rows):
        assert len(rows) == len(images)
        if self.stop is not None and self.images + len(images) > self.stop:
            raise KeyboardInterrupt
        self.images += len(images)
        self.calls.append(len(images))
        if keep is not None:
            cells = keep.reshape(-1, *GRID).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
            images = images * cells[:, None]
        # Every image by itself: no batch shape changes a bit.
        return torch.stack([self.one(image) for image in images])

    def one(self, image):
        seen = [image[:, mask].mean(dim=1) for mask in self.masks]
        return functional.normalize(torch.cat([*seen, torch.ones(1)]), dim=0)

    def of_pixels(self, pixels):
        return torch.stack([self.one(image) for image in normalise(pixels, MEAN, STD)]).numpy()


def world(people=12, each=2, *, seed=0, regions=REGIONS[:1], twins=False):
    """Pictures of people whose parts have colours of their own on a background of noise, shape (people * each, ...)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (people * each, *SIZE, 3), dtype=np.uint8)
    for region in REGIONS:
        mask = pixels_of(region).numpy()
        for person in range(people):
            colour = rng.integers(0, 256, 3)
            for image in range(person * each, (person + 1) * each):
                shade = rng.integers(-20, 21, 3)
                pixels[image][mask] = np.clip(colour + shade, 0, 255)
    if twins:  # ties: the first picture of every second person is that of the person before
        for person in range(1, people, 2):
            pixels[person * each] = pixels[(person - 1) * each]
    return pixels


def study(pixels, maps, plan, *, embed=None, each=2, others=None, every=False, batch=32, donor=None, noise=0.05):
    """Every person's first picture (or all) looked for by a query that is nearly its vector."""
    embed = embed or Looker()
    gallery = embed.of_pixels(pixels)
    target = np.arange(len(pixels)) if every else np.arange(0, len(pixels), each)
    person = target // each
    rng = np.random.default_rng(5)
    asked = gallery[person * each] + noise * rng.standard_normal((len(pixels), gallery.shape[1]))[person]
    query = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
    pairs = Pairs(
        [f"q{number}" for number in person],
        [f"i{number}" for number in target],
        [f"p{number}" for number in person],
        query,
        target,
        [np.arange(number * each, (number + 1) * each) for number in person],
        gallery,
        donor=donor,
    )
    judge = Judge(embed, pixels, MEAN, STD, GRID, batch=batch)
    rows = {name: np.tile(heat, (len(pairs), 1)) if heat.ndim == 1 else heat for name, heat in maps.items()}
    return Study(judge, pairs, rows, GRID, plan, others or {})
