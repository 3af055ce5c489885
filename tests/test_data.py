import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reidctl import tables
from reidctl.batch import Tokens
from reidctl.data import (
    AugmentConfig,
    PixelStore,
    TokenTable,
    TrainingSet,
    augment_image,
    build_corpus,
    normalise,
    read_pixels,
)
from reidctl.errors import DataError, UsageError
from reidctl.sampling import identity_batches, random_batches

STILL = AugmentConfig(flip=0, pad=0, erase=0)


def tokenize(texts):
    """One token per letter: enough to tell texts apart."""
    length = max((len(text) for text in texts), default=1) or 1
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor([ord(letter) for letter in text], dtype=torch.long)
    return Tokens(ids, ids > 0)


def decode(tokens, row):
    return "".join(chr(value) for value in tokens.ids[row][tokens.mask[row]])


def training_set(folder, **changes):
    given = {
        "size": (64, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "tokenize": tokenize,
        "texts": ("full", "identity", "clothing"),
        "augment": STILL,
    }
    return TrainingSet(corpus_of(folder), **{**given, **changes})


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
def test_no_batch_repeats_an_image_of_a_person_who_has_enough_of_them():
    person = np.repeat([0, 1, 2, 3], 8)  # 4 images with 2 captions each
    image = np.repeat(np.arange(16), 2)
    for seed in range(20):
        for batch in identity_batches(person, image, batch=8, instances=4, rng=np.random.default_rng(seed)):
            for one in np.unique(person[batch]):
                rows = batch[person[batch] == one]
                assert len(set(image[rows])) == 4


def test_sampling_that_cannot_work_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="batch of 10"):
        identity_batches(np.asarray([0, 1]), np.arange(2), batch=10, instances=4, rng=rng)
    with pytest.raises(DataError, match="fewer than two people"):
        identity_batches(np.asarray([0, 0]), np.arange(2), batch=4, instances=2, rng=rng)


def test_random_batches_visit_every_sample_once_and_leave_no_lonely_last_one():
    batches = random_batches(13, batch=4, rng=np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == list(range(13))
    assert min(len(batch) for batch in batches) > 1


def test_a_sample_depends_on_seed_epoch_and_place_only(blocks):
    one, other = training_set(blocks, augment=AugmentConfig()), training_set(blocks, augment=AugmentConfig())
    first = one[(3, 5, 7)]
    _ = [other[(0, n, n)] for n in range(10)]  # what was loaded before must not matter
    assert np.array_equal(first.pixels, other[(3, 5, 7)].pixels)
    assert not np.array_equal(first.pixels, one[(4, 5, 7)].pixels)


@pytest.mark.covers(19)
def test_a_text_that_says_left_is_never_paired_with_a_mirrored_image(blocks):
    captions = tables.read_table(blocks / "captions.parquet", "captions")
    captions.loc[0, "text"] = "A bag in the Left-hand side."
    tables.write_table(blocks / "captions.parquet", "captions", captions)
    samples = training_set(blocks, augment=AugmentConfig(flip=1.0, pad=0, erase=0))
    flipped = {n: samples[(0, n, n)].flipped for n in range(len(samples))}
    assert flipped.pop(0) is False and all(flipped.values())
    ignoring = training_set(blocks, augment=AugmentConfig(flip=1.0, pad=0, erase=0, flip_respects_sides=False))
    assert ignoring[(0, 0, 0)].flipped


def test_a_mirrored_image_is_mirrored_and_an_erased_one_has_a_box_of_the_mean():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    mirrored, flipped = augment_image(pixels, AugmentConfig(flip=1.0, pad=0, erase=0), rng, (0.5,) * 3)
    assert flipped and np.array_equal(mirrored, pixels[:, ::-1])
    erased, _ = augment_image(pixels, AugmentConfig(flip=0, pad=0, erase=1.0), rng, (0.5,) * 3)
    share = (erased == 128).all(axis=2).mean()
    assert 0.01 < share < 0.45 and (erased != pixels).any()


@pytest.mark.covers(142)
def test_the_fusion_text_comes_from_another_image_of_the_same_person(blocks):
    samples = training_set(blocks)
    for epoch in range(3):
        batch = samples.collate([samples[(epoch, n, n)] for n in range(len(samples))])
        for row, name in enumerate(batch.image_id):
            own = samples.corpus.identity[int(np.flatnonzero(samples.corpus.images["image_id"] == name)[0])]
            fused = decode(batch.texts["fusion"], row)
            assert fused.split()[-1] == own.split()[-1], "same person"
            if batch.has_fusion[row]:
                assert batch.texts["fusion"].ids[row].tolist() != batch.texts["full"].ids[row].tolist()


@pytest.mark.covers(142)
def test_no_fused_feature_finds_its_text_in_any_positive_target(blocks):
    """Two images of a person often share the identity text: with described targets a fused feature could copy it."""
    described = tables.read_table(blocks / "described.parquet", "captions")
    same = described["kind"] == "identity"
    described.loc[same, "text"] = [f"Build {name.split('-')[0]}." for name in described.loc[same, "image_id"]]
    tables.write_table(blocks / "described.parquet", "captions", described)
    for target in ("mix", "identity+clothing", "caption"):
        samples = training_set(blocks, target=target)
        batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
        usable = batch.has_fusion.nonzero().flatten().tolist()
        assert bool(usable) == (target != "identity+clothing")
        for row in usable:
            for other in usable:
                assert decode(batch.texts["fusion"], row) not in decode(batch.texts["full"], other)


def test_a_person_with_one_image_has_no_fusion_text(tmp_path):
    samples = training_set(write_dataset(tmp_path / "one", per_person=1))
    batch = samples.collate([samples[(0, n, n)] for n in range(4)])
    assert not batch.has_fusion.any()


def test_clothing_groups_are_equal_exactly_for_equal_clothing_texts(blocks):
    samples = training_set(blocks)
    batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
    texts = [decode(batch.texts["clothing"], row) for row in range(len(batch))]
    group = batch.clothing_group.tolist()
    assert all(
        (a == b) == (x == y) for a, x in zip(group, texts, strict=True) for b, y in zip(group, texts, strict=True)
    )


@pytest.mark.covers(36)
def test_shuffled_labels_give_every_person_all_texts_of_another(blocks):
    samples = training_set(blocks, shuffle_labels=True, target="mix")
    owner = {text: row // 3 for row, text in enumerate(samples.corpus.clothing)}
    batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
    donors = {}
    for row, person in enumerate(batch.person.tolist()):
        donors.setdefault(person, set()).add(owner[decode(batch.texts["clothing"], row)])
    assert all(len(found) == 1 and person not in found for person, found in donors.items())
    assert len({next(iter(found)) for found in donors.values()}) == 8
    true = {text for text in samples.corpus.captions["text"]}
    for row, person in enumerate(batch.person.tolist()):
        text = decode(batch.texts["full"], row)
        mine = set(samples.corpus.captions["text"][samples.corpus.captions["row"] // 3 == person])
        assert text not in mine or text not in true


@pytest.mark.covers(17)
def test_missing_texts_name_the_field_and_the_command(blocks):
    corpus = corpus_of(blocks)
    corpus.identity[3] = None
    with pytest.raises(DataError, match=r"no identity text.*reidctl caption"):
        TrainingSet(
            corpus, size=(64, 32), mean=(0.5,) * 3, std=(0.5,) * 3, tokenize=tokenize, texts=("full", "identity")
        )
    bare = build_corpus(corpus.images, tables.empty("captions"), None, blocks)
    with pytest.raises(DataError, match="no captions"):
        TrainingSet(bare, size=(64, 32), mean=(0.5,) * 3, std=(0.5,) * 3, tokenize=tokenize, texts=("full",))
    assert len(TrainingSet(bare, size=(64, 32), mean=(0.5,) * 3, std=(0.5,) * 3, tokenize=tokenize, texts=())) == 24


def test_an_empty_caption_is_refused_by_name(blocks):
    captions = tables.read_table(blocks / "captions.parquet", "captions")
    captions.loc[4, "text"] = "  "
    with pytest.raises(DataError, match=r"`p1-1-full` of image `p1-1` is empty"):
        build_corpus(tables.read_table(blocks / "images.parquet", "images"), captions, None, blocks)


@pytest.mark.covers(142)
def test_a_described_text_that_saw_a_caption_is_refused(blocks):
    described = tables.read_table(blocks / "described.parquet", "captions")
    described.loc[0, "conditioned_on"] = "image+caption"
    with pytest.raises(DataError, match="not written from its image alone"):
        build_corpus(
            tables.read_table(blocks / "images.parquet", "images"),
            tables.read_table(blocks / "captions.parquet", "captions"),
            described,
            blocks,
        )


def test_unreadable_truncated_missing_and_huge_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.png does not exist"):
        read_pixels(tmp_path / "a.png", (8, 8))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        read_pixels(tmp_path / "b.png", (8, 8))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "c.jpg")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:400])
    with pytest.raises(DataError, match=r"c\.jpg cannot be read"):
        read_pixels(tmp_path / "c.jpg", (8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.new("1", (20_000, 5_000)).save(tmp_path / "d.png")
    with pytest.raises(DataError, match="20000x5000"):
        read_pixels(tmp_path / "d.png", (8, 8))


def test_the_pixel_cache_is_bounded_and_changes_nothing(blocks):
    paths = corpus_of(blocks).paths()
    small = PixelStore(paths, (64, 32), cache_bytes=3 * 64 * 32 * 3)
    for row in [0, 1, 2, 3, 4, 0, 1]:
        assert np.array_equal(small[row], read_pixels(paths[row], (64, 32)))
    assert len(small._kept) == 3


def test_normalised_pixels_follow_the_checkpoint_statistics():
    pixels = np.full((1, 2, 2, 3), 255, np.uint8)
    assert torch.allclose(
        normalise(pixels, (0.5, 0.0, 1.0), (0.5, 1.0, 2.0))[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0])
    )


def test_token_rows_are_trimmed_to_the_longest_of_the_batch():
    table = TokenTable(["a", "bcd", "a", "ef"], tokenize)
    assert table([0, 3]).ids.shape == (2, 2)
    assert decode(table([1]), 0) == "bcd" and table.group[0] == table.group[2]


@pytest.mark.covers(12)
def test_splits_that_do_not_exist_are_named(blocks):
    with pytest.raises(DataError, match="no `val` split"):
        corpus_of(blocks).of_split("val")
