import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of, without_captions, write_dataset
from PIL import Image

from reidctl import tables
from reidctl.augment import AugmentConfig
from reidctl.batch import Tokens
from reidctl.data import (
    TokenTable,
    TrainingSet,
    build_corpus,
    camera_names,
    camera_numbers,
    datasets_part,
    roster_of,
    training_part,
)
from reidctl.errors import DataError
from reidctl.pixels import PixelStore, normalise, read_pixels

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


def test_a_sample_depends_on_seed_epoch_and_place_only(blocks):
    one, other = training_set(blocks, augment=AugmentConfig()), training_set(blocks, augment=AugmentConfig())
    first = one[(3, 5, 7)]
    _ = [other[(0, n, n)] for n in range(10)]  # what was loaded before must not matter
    assert np.array_equal(first.pixels, other[(3, 5, 7)].pixels)
    assert not np.array_equal(first.pixels, one[(4, 5, 7)].pixels)


@pytest.mark.covers(19)
@pytest.mark.parametrize("kind", ["full", "identity", "clothing"])
def test_a_text_that_says_left_is_never_paired_with_a_mirrored_image(blocks, kind):
    path = blocks / ("captions.parquet" if kind == "full" else "described.parquet")
    texts = tables.read_table(path, "captions")
    texts.loc[texts.index[texts["kind"] == kind][0], "text"] = "A bag in the Left-hand side."
    tables.write_table(path, "captions", texts)
    samples = training_set(blocks, augment=AugmentConfig(flip=1.0, pad=0, erase=0))
    for epoch in range(3):
        for n in range(len(samples)):
            sample = samples[(epoch, n, n)]
            batch = samples.collate([sample])
            read = " ".join(decode(tokens, 0) for tokens in batch.texts.values())
            assert sample.flipped == ("Left-hand" not in read)
    assert not samples[(0, 0, 0)].flipped
    ignoring = training_set(blocks, augment=AugmentConfig(flip=1.0, pad=0, erase=0, flip_respects_sides=False))
    assert ignoring[(0, 0, 0)].flipped


@pytest.mark.covers(16)
def test_a_picture_that_is_in_two_datasets_is_one_picture(blocks):
    """ICFG-PEDES and MSMT17 share files: captioned in one, caption-free in the other."""
    without_captions(blocks, range(5, 8))
    images = tables.read_table(blocks / "images.parquet", "images")
    images.loc[15:17, "sha256"] = images.loc[0:2, "sha256"].to_numpy()
    tables.write_table(blocks / "images.parquet", "images", images)
    samples = training_set(blocks, texts=("full",), caption_free=True)
    assert (len(samples), samples.paired) == (21, 15), "three of the nine bare images are captioned elsewhere"
    assert len(set(samples.picture_of_sample)) == 21
    everything = training_set(blocks, texts=())
    assert everything.picture_of_sample[15] == everything.picture_of_sample[0]


def test_an_erased_training_image_has_a_box_of_what_the_recipe_says(blocks):
    """Erasing acts on normalised values: 0 for the mean pixel, the mean itself for IRRA's recipe."""
    for fill, value in (("mean-pixel", 0.0), ("mean-after", 0.25)):
        config = AugmentConfig(flip=0, pad=0, erase=1.0, erase_fill=fill)
        samples = training_set(blocks, augment=config, mean=(0.25,) * 3, std=(0.5,) * 3)
        plain = training_set(blocks, mean=(0.25,) * 3, std=(0.5,) * 3)
        erased, whole = (chosen.collate([chosen[(0, 3, 3)]]).image[0] for chosen in (samples, plain))
        changed = (erased != whole).any(dim=0)
        assert 0.01 < changed.float().mean() < 0.45
        assert torch.allclose(erased[:, changed], torch.tensor(value))


@pytest.mark.covers(20)
def test_images_are_resized_as_the_checkpoint_says(blocks):
    path = next((blocks / "images").iterdir())
    one, other = (read_pixels(path, (31, 17), way) for way in ("bicubic", "bilinear"))
    assert not np.array_equal(one, other)
    assert np.array_equal(PixelStore([path], (31, 17), interpolation="bilinear")[0], other)


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
    for target in ("mix", "identity+clothing", "identity", "clothing", "caption"):
        samples = training_set(blocks, target=target)
        batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
        usable = batch.has_fusion.nonzero().flatten().tolist()
        assert bool(usable) == (target in ("mix", "caption"))
        for row in usable:
            for other in usable:
                assert decode(batch.texts["fusion"], row) not in decode(batch.texts["full"], other)


@pytest.mark.covers(165)
def test_every_text_source_puts_its_own_text_in_the_place_of_the_query(blocks):
    corpus = corpus_of(blocks)
    captions = [str(text) for text in corpus.captions["text"]]
    both = [f"{one} {other}" for one, other in zip(corpus.identity, corpus.clothing, strict=True)]
    expected = {
        "caption": [captions], "identity": [corpus.identity], "clothing": [corpus.clothing],
        "identity+clothing": [both], "mix": [captions, both],
    }  # fmt: skip
    for target, sources in expected.items():
        samples = training_set(blocks, target=target)
        batch = samples.collate([samples[(0, n, n)] for n in range(24)])
        found = [decode(batch.texts["full"], row) for row in range(24)]
        assert all(any(text == source[row] for source in sources) for row, text in enumerate(found)), target
        assert all(any(text in source for text in found) for source in sources), target


@pytest.mark.parametrize(
    ("target", "kind", "needed"),
    [
        ("clothing", "clothing", True), ("clothing", "identity", False), ("identity", "clothing", False),
        ("identity", "identity", True), ("identity+clothing", "clothing", True), ("mix", "identity", True),
        ("mix", "clothing", True), ("caption", "identity", False),
    ],
)  # fmt: skip
def test_a_text_source_needs_its_own_texts_and_no_others(blocks, target, kind, needed):
    corpus = corpus_of(blocks)
    getattr(corpus, kind)[3] = None
    given = {"size": (64, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "tokenize": tokenize, "texts": ("full",)}
    if not needed:
        assert len(TrainingSet(corpus, target=target, **given)) == 24
        return
    with pytest.raises(DataError, match=rf"no {kind} text.*reidctl caption"):
        TrainingSet(corpus, target=target, **given)


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
    with pytest.raises(DataError, match=r"no captions.*method\.target"):
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
    assert len(small._first) + len(small._recent) == 3


def test_the_pixel_cache_keeps_what_came_first_and_a_few_of_the_latest(blocks, monkeypatch):
    """An LRU over a shuffled sweep forgets every image just before it is asked for again."""
    monkeypatch.setattr("reidctl.pixels._RECENT", 2)
    paths = corpus_of(blocks).paths()[:8]
    store = PixelStore(paths, (64, 32), cache_bytes=5 * 3 * 64 * 32)
    for _ in range(2):
        for row in range(8):
            store[row]
    assert (sorted(store._first), sorted(store._recent)) == ([0, 1, 2], [6, 7])
    assert PixelStore(paths, (64, 32), cache_bytes=0)[3].shape == (64, 32, 3)


def test_the_table_of_normalised_bytes_gives_the_same_bits_as_the_arithmetic():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 8, 3), dtype=np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    plain = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float().div(255.0)
    plain = plain.sub(torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1))
    assert torch.equal(normalise(pixels, mean, std), plain)


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


@pytest.mark.covers(16)
def test_a_training_may_see_the_captioned_images_alone_or_those_without(blocks):
    corpus = corpus_of(blocks)
    without_captions(blocks, range(5, 8))
    train = corpus_of(blocks).of_split("train")
    parts = {part: training_part(train, part) for part in ("all", "captioned", "caption-free")}
    assert parts["all"] is train
    names = {part: list(found.images["image_id"]) for part, found in parts.items()}
    assert names["captioned"] == [name for name in names["all"] if int(name[1 : name.index("-")]) < 5]
    assert names["caption-free"] == [name for name in names["all"] if name not in names["captioned"]]
    assert len(parts["captioned"].captions) == len(train.captions) and not len(parts["caption-free"].captions)
    owners = parts["captioned"].images["image_id"].iloc[parts["captioned"].captions["row"]]
    assert list(owners) == list(parts["captioned"].captions["image_id"])
    assert parts["caption-free"].identity == train.identity[15:]
    with pytest.raises(DataError, match="no caption-free images"):
        training_part(corpus.of_split("train"), "caption-free")


@pytest.mark.covers(16)
def test_caption_free_images_are_samples_without_text_tensors(blocks):
    without_captions(blocks, range(5, 8))
    samples = training_set(blocks, texts=("full",), caption_free=True)
    assert (len(samples), samples.paired, len(samples.persons)) == (24, 15, 8)
    batch = samples.collate([samples[(0, n, n)] for n in (0, 15, 1, 23)])
    assert batch.has_text.tolist() == [True, False, True, False]
    assert len(batch.texts["full"]) == 2 and len(batch) == 4
    assert batch.text_id[1] == batch.text_id[3] == "" and decode(batch.texts["full"], 1) == samples_text(samples, 1)
    pairs = batch.pairs()
    assert (len(pairs), pairs.image_id) == (2, (batch.image_id[0], batch.image_id[2]))
    assert torch.equal(pairs.image, batch.image[[0, 2]]) and pairs.has_text is None
    alone = samples.collate([samples[(0, 20, 0)], samples[(0, 21, 1)]])
    assert alone.texts == {} and not alone.has_text.any()


def samples_text(samples, row):
    return samples.corpus.captions["text"].iloc[row]


@pytest.mark.covers(23)
def test_every_sample_says_which_dataset_it_is_from(blocks):
    without_captions(blocks, range(5, 8))
    samples = training_set(blocks, texts=("full",), caption_free=True)
    batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
    assert samples.domains.tolist() == ["bare", "blocks"]
    assert batch.domain.tolist() == [1] * 15 + [0] * 9
    people = [set(batch.person[batch.domain == domain].tolist()) for domain in (0, 1)]
    assert not people[0] & people[1]


@pytest.mark.covers(9)
def test_people_without_captions_count_in_the_classifier_although_they_are_not_sampled(blocks):
    without_captions(blocks, range(5, 8))
    samples = training_set(blocks, texts=("full",))
    assert len(samples) == 15 and len(samples.persons) == 8


@pytest.mark.covers(17)
def test_a_dataset_without_captions_is_refused_with_what_is_missing_and_the_command(blocks):
    without_captions(blocks, range(8))
    with pytest.raises(DataError, match=r"no captions.*data import csv-table"):
        training_set(blocks, texts=("full",))
    described = blocks / "described.parquet"
    tables.write_table(described, "captions", tables.read_table(described, "captions").iloc[:0])
    with pytest.raises(DataError, match=r"no identity text.*reidctl caption"):
        training_set(blocks, texts=("identity",))


def of_two_datasets(images):
    """Images whose person 0 is in both datasets; `a` and `b` have a camera 1 each, and one camera is unknown."""
    rows = [("b", "p", "1"), ("a", "q", "2"), ("b", "r", None), ("a", "p", "1"), ("a", "q", "1")]
    frame = images.iloc[: len(rows)].copy()
    for column, place in (("dataset", 0), ("person_id", 1), ("camera_id", 2)):
        frame[column] = [row[place] for row in rows]
    return frame


@pytest.mark.covers(215)
def test_a_roster_numbers_datasets_people_and_cameras_in_the_order_of_their_names(blocks):
    images = of_two_datasets(corpus_of(blocks).images)
    found = roster_of(images)
    assert found.domains == ("a", "b")
    # p, q, r are 0, 1, 2; p is in both.
    assert found.people == ((0, 1), (0, 2))
    assert found.cameras == ("a/1", "a/2", "b/1")
    assert roster_of(images.iloc[::-1]) == found
    assert roster_of(images.assign(camera_id=None)).cameras == ()


@pytest.mark.covers(215)
def test_a_roster_s_numbers_are_those_of_the_batches(blocks):
    without_captions(blocks, range(5, 8))
    corpus = corpus_of(blocks)
    corpus.images["camera_id"] = corpus.images["camera_id"].where(corpus.images.index % 5 != 0, None)
    samples = TrainingSet(
        corpus, size=(64, 32), mean=(0.5,) * 3, std=(0.5,) * 3, tokenize=tokenize, texts=(), augment=STILL
    )
    roster = roster_of(corpus.images)
    batch = samples.collate([samples[(0, n, n)] for n in range(len(samples))])
    assert tuple(samples.domains) == roster.domains
    for domain, people in enumerate(roster.people):
        assert set(batch.person[batch.domain == domain].tolist()) == set(people)
    names = [None if number < 0 else roster.cameras[number] for number in batch.camera.tolist()]
    assert names == list(camera_names(corpus.images))
    assert batch.camera.dtype == torch.int64 and names[0] is None and names[1] == "blocks/c1"
    # Parts of a batch keep their cameras.
    pairs = replace(batch, has_text=torch.arange(len(batch)) % 2 == 0).pairs()
    assert torch.equal(pairs.camera, batch.camera[::2]) and torch.equal(pairs.domain, batch.domain[::2])


def test_cameras_of_two_datasets_never_agree_and_an_unknown_one_has_no_name_and_the_number_minus_one(blocks):
    images = of_two_datasets(corpus_of(blocks).images)
    assert camera_names(images).tolist() == ["b/1", "a/2", None, "a/1", "a/1"]
    numbers = camera_numbers(images, ("a/1", "b/1", "c/9"))
    assert numbers.tolist() == [1, -1, -1, 0, 0] and numbers.dtype == np.int64
    assert camera_numbers(images, ()).tolist() == [-1] * 5
    assert camera_names(images.iloc[:0]).tolist() == [] and camera_numbers(images.iloc[:0], ("a/1",)).tolist() == []


@pytest.mark.covers(215)
def test_a_part_of_a_corpus_is_the_images_and_captions_of_the_named_datasets(blocks):
    images = tables.read_table(blocks / "images.parquet", "images")
    even = images["image_id"].str.endswith(("0", "2"))
    tables.write_table(blocks / "images.parquet", "images", images.assign(dataset=np.where(even, "x", "y")))
    corpus = corpus_of(blocks)
    assert datasets_part(corpus, ()) is corpus
    found = datasets_part(corpus, ("y",))
    assert len(found.images) == len(found.captions) == 8 and set(found.images["dataset"]) == {"y"}
    named = found.images["image_id"].iloc[found.captions["row"].to_numpy()]
    assert named.tolist() == found.captions["image_id"].tolist()
    assert found.identity == [text for text, own in zip(corpus.identity, ~even, strict=True) if own]
    assert len(datasets_part(corpus, ("y", "x")).images) == 24
    with pytest.raises(DataError, match=r"no images of dataset `z`.*Known: x, y"):
        datasets_part(corpus, ("x", "z"))
