"""Images that come as bytes and are finished on a device have the numbers of those finished by the loader."""

import numpy as np
import pytest
import torch
from conftest import without_captions
from test_data import training_set

from reidctl.augment import AugmentConfig, Erase, apply_erase, finish_of
from reidctl.backbones.statistics import STATISTICS
from reidctl.batch import Batch
from reidctl.pixels import levels, normalise

FILLS = ["mean-pixel", "mean-after", "noise"]
MEAN, STD = STATISTICS["clip"]


def bits(image):
    """Floats as whole numbers: 0 and -0 differ, and so does the last digit."""
    return image.contiguous().view(torch.int32)


def both(folder, fill, keys, **changes):
    """The same samples finished by the loader and left as bytes."""
    config = AugmentConfig(erase=0.7, pad=4, erase_fill=fill)
    samples = training_set(folder, augment=config, mean=MEAN, std=STD, **changes)
    done = samples.collate([samples[key] for key in keys])
    samples.raw = True
    return done, samples.collate([samples[key] for key in keys])


def erased_by_hand(pixels, erases, fill):
    image = normalise(pixels, MEAN, STD)
    for one, erase in zip(image, erases, strict=True):
        apply_erase(one, erase, AugmentConfig(erase_fill=fill), mean=MEAN)
    return image


@pytest.mark.parametrize("fill", FILLS)
def test_bytes_become_the_same_numbers_bit_for_bit(blocks, fill):
    for epoch in range(3):
        done, raw = both(blocks, fill, [(epoch, n, n) for n in range(24)])
        assert raw.image.dtype == torch.uint8 and raw.image.shape == (24, 64, 32, 3)
        assert 0 < sum(int(bottom > top) for top, _, bottom, _ in raw.finish.box.tolist()) < 24
        finished = raw.finished()
        assert finished.finish is None and finished.image.is_contiguous()
        assert torch.equal(bits(finished.image), bits(done.image))
        assert finished.image_id == done.image_id and torch.equal(finished.person, done.person)


@pytest.mark.parametrize("fill", FILLS)
def test_every_byte_and_rectangles_at_every_edge_become_what_the_loader_makes_of_them(fill):
    pixels = np.arange(5 * 16 * 32 * 3, dtype=np.int64).reshape(5, 16, 32, 3).astype(np.uint8)
    erases = [
        Erase(0, 0, 1, 1, seed=3),
        None,
        Erase(15, 31, 1, 1, seed=4),
        Erase(1, 2, 14, 29, seed=2**63 - 1),
        Erase(0, 5, 16, 3, seed=0),
    ]
    finish = finish_of(erases, levels(MEAN, STD), AugmentConfig(erase_fill=fill), mean=MEAN)
    finished = finish(torch.from_numpy(pixels))
    assert torch.equal(bits(finished), bits(erased_by_hand(pixels, erases, fill)))


def test_noise_is_drawn_per_rectangle_and_packed_without_gaps():
    erases = [Erase(1, 1, 2, 3, seed=1), None, Erase(0, 0, 4, 2, seed=2)]
    finish = finish_of(erases, levels(MEAN, STD), AugmentConfig(erase_fill="noise"))
    assert finish.table.shape == (3 * 256 + 3 * 2 * 3 + 3 * 4 * 2,)
    assert finish.walk.tolist() == [[768, 6, 3, 1], [0, 0, 0, 0], [786, 8, 2, 1]]
    expected = np.random.default_rng(2).standard_normal(24, dtype=np.float32)
    assert np.array_equal(finish.table[786:].numpy(), expected)


@pytest.mark.parametrize("fill", FILLS)
def test_a_part_of_a_batch_of_bytes_is_finished_like_the_whole(blocks, fill):
    done, raw = both(blocks, fill, [(0, n, n) for n in range(12)])
    chosen = [7, 2, 11, 0]
    assert torch.equal(bits(raw.take(chosen).finished().image), bits(done.image[chosen]))
    assert torch.equal(bits(raw.to("cpu").finished().image), bits(done.image))


def test_the_captioned_part_of_a_batch_of_bytes_keeps_its_own_rectangles(blocks):
    without_captions(blocks, range(5, 8))
    keys = [(0, n, place) for place, n in enumerate((0, 15, 1, 23, 16, 2))]
    done, raw = both(blocks, "noise", keys, texts=("full",), caption_free=True)
    assert torch.equal(bits(raw.pairs().finished().image), bits(done.image[[0, 2, 5]]))


def test_a_batch_of_numbers_is_finished_already():
    batch = Batch(image=torch.zeros(2, 3, 4, 4))
    assert batch.finished() is batch


def test_bytes_and_what_is_left_to_do_are_a_quarter_of_the_numbers(blocks):
    done, raw = both(blocks, "mean-pixel", [(0, n, n) for n in range(24)])
    parts = (raw.image, raw.finish.table, raw.finish.box, raw.finish.walk)
    assert sum(part.nbytes for part in parts) < 0.3 * done.image.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fill", FILLS)
def test_a_gpu_finishes_bytes_bit_for_bit_as_the_loader(blocks, fill):
    done, raw = both(blocks, fill, [(0, n, n) for n in range(24)])
    assert torch.equal(bits(raw.pin().to("cuda").finished().image.cpu()), bits(done.image))
