"""Features of frozen encoders on disk: what is kept, from where a killed encoding goes on, and what batches bring."""

import json

import numpy as np
import pytest
import torch
from conftest import corpus_of, without_captions, write_dataset
from methods.test_method_contract import CPU, model

from reidctl import frozen
from reidctl.augment import AugmentConfig
from reidctl.batch import Batch
from reidctl.data import TrainingSet
from reidctl.errors import DataError
from reidctl.frozen import forget_features, keep_features

KEY = "a-key"


@pytest.fixture(scope="module")
def method():
    return model("hpl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("frozen") / "blocks", people=6)


def samples_of(folder, method, **changes):
    tower = method.backbone
    return TrainingSet(
        corpus_of(folder), size=tower.image_size, mean=tower.mean, std=tower.std, tokenize=tower.tokenize,
        texts=changes.pop("texts", method.train_texts), augment=AugmentConfig(flip=0, pad=0, erase=0), **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples(folder, method):
    return samples_of(folder, method)


class Counting:
    """Counts what is encoded; may stop before a batch as a killed program does."""

    def __init__(self, method, monkeypatch, stop_after=99):
        self.images, self.texts, self.calls = 0, 0, 0
        encode = method.frozen_features

        def spy(batch):
            if self.calls == stop_after:
                raise KeyboardInterrupt
            self.calls += 1
            if batch.image is None:
                self.texts += len(batch)
            else:
                self.images += len(batch)
            return encode(batch)

        monkeypatch.setattr(method, "frozen_features", spy)


def keep(method, samples, path, key=KEY, **options):
    return keep_features(method, samples, path, key, device=CPU, **{"batch": 4, "precision": "fp32", **options})


EVERY = np.arange(18)


def direct(method, samples):
    images = torch.stack([samples.collate([samples[(0, row, row)]]).image[0] for row in range(18)])
    with torch.no_grad():
        seen = method.frozen_features(Batch(image=images))
        return seen, method.frozen_features(Batch(texts={"full": samples.tokens.unique}))


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_what_is_kept_is_what_the_encoders_give_row_by_row(tmp_path, method, samples, precision, near):
    kept = keep(method, samples, tmp_path, precision=precision)
    images, texts = direct(method, samples)
    assert set(images) == {"image", "image_tokens"} and set(texts) == {"text", "text_tokens"}
    found = kept.images(EVERY) | kept.texts(np.arange(len(samples.tokens.unique)))
    for name, value in {**images, **texts}.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == (torch.float16 if precision == "fp16" else torch.float32)
        torch.testing.assert_close(found[name].float(), value, atol=near, rtol=near)
    some = np.array([7, 2, 7])
    assert torch.equal(kept.images(some)["image"], found["image"][some])
    assert torch.equal(kept.texts(some[1:2])["text"], found["text"][2:3])


def test_half_precision_takes_half_the_disk(tmp_path, method, samples):
    sizes = {}
    for precision in ("fp16", "fp32"):
        keep(method, samples, tmp_path / precision, precision=precision)
        sizes[precision] = sum(path.stat().st_size - 128 for path in (tmp_path / precision).glob("*.npy"))
    assert sizes["fp32"] == 2 * sizes["fp16"]


def test_what_is_there_is_not_computed_again(tmp_path, method, samples, monkeypatch):
    first = keep(method, samples, tmp_path).images(EVERY)["image"]
    counted, told = Counting(method, monkeypatch), []
    again = keep(method, samples, tmp_path, advance=told.append)
    texts = len(samples.tokens.unique)
    assert counted.calls == 0 and sum(told) == 18 + texts
    assert torch.equal(again.images(EVERY)["image"], first)


def change_rows(path, side, rows):
    """As if only so many rows had been counted when the program was killed."""
    facts = json.loads((path / f"{side}.json").read_text())
    (path / f"{side}.json").write_text(json.dumps({**facts, "rows": rows}))


@pytest.mark.covers(74)
def test_a_killed_encoding_goes_on_after_the_rows_that_were_counted(tmp_path, method, samples, monkeypatch):
    whole = keep(method, samples, tmp_path)
    images, text = whole.images(EVERY), whole.texts(np.array([0, 1]))
    change_rows(tmp_path, "images", 8)
    for name in ("image", "image_tokens"):
        array = np.lib.format.open_memmap(tmp_path / f"images-{name}.npy", mode="r+")
        array[8:] = 0  # what had not reached the disk
        array[3] = 7  # a mark: counted rows are not touched
        array.flush()
    counted, told = Counting(method, monkeypatch), []
    again = keep(method, samples, tmp_path, advance=told.append)
    assert (counted.images, counted.texts) == (10, 0) and sum(told) == 18 + len(samples.tokens.unique)
    found = again.images(EVERY)
    for name, value in images.items():
        assert (found[name][3] == 7).all()
        rest = [row for row in range(18) if row != 3]
        torch.testing.assert_close(found[name][rest], value[rest], atol=1e-6, rtol=1e-5)
    assert torch.equal(again.texts(np.array([0, 1]))["text"], text["text"])


def test_an_encoding_that_is_killed_between_two_counts_starts_at_the_last_one(tmp_path, method, samples, monkeypatch):
    """Batches of one image: a stop after 10 leaves nothing counted (the 64th would be), one after all leaves all."""
    with monkeypatch.context() as patch:
        Counting(method, patch, stop_after=10)
        with pytest.raises(KeyboardInterrupt):
            keep(method, samples, tmp_path, batch=1)
    assert not (tmp_path / "images.json").exists()
    with monkeypatch.context() as patch:
        first = Counting(method, patch, stop_after=19)
        with pytest.raises(KeyboardInterrupt):
            keep(method, samples, tmp_path, batch=1)
    assert first.images == 18 and json.loads((tmp_path / "images.json").read_text())["rows"] == 18
    rest = Counting(method, monkeypatch)
    keep(method, samples, tmp_path, batch=1)
    assert (rest.images, rest.texts) == (0, len(samples.tokens.unique))


@pytest.mark.parametrize("way", ["key", "precision", "count", "file", "facts"])
def test_features_of_anything_else_are_computed_anew(tmp_path, method, folder, samples, monkeypatch, way):
    keep(method, samples, tmp_path)
    options, asked = {}, samples
    if way == "key":
        options["key"] = "another"
    elif way == "precision":
        options["precision"] = "fp16"
    elif way == "count":
        corpus = samples.corpus
        asked = samples_of(folder, method)
        asked.store.paths = corpus.paths()[:15]
    elif way == "file":
        (tmp_path / "images-image.npy").unlink()
    else:
        (tmp_path / "images.json").write_text("{")
    counted = Counting(method, monkeypatch)
    found = keep(method, asked, tmp_path, **options).images(np.arange(15))
    assert counted.images == (15 if way == "count" else 18)
    assert (counted.texts > 0) == (way in ("key", "precision"))
    torch.testing.assert_close(found["image"].float(), direct(method, samples)[0]["image"][:15], atol=5e-3, rtol=5e-3)


def test_forgetting_removes_what_was_kept_and_nothing_else(tmp_path, method, samples):
    path = tmp_path / "frozen"
    keep(method, samples, path)
    assert list(path.glob("*.npy"))
    forget_features(path)
    assert not path.exists()
    forget_features(path)
    keep(method, samples, path)
    (path / "notes.txt").write_text("mine")
    forget_features(path)
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_a_data_error(tmp_path, method, samples, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen.tables, "write_text", full)
    with pytest.raises(DataError, match=r"No space left.*disk full"):
        keep(method, samples, tmp_path)


@pytest.mark.covers(72)
def test_batches_bring_kept_features_instead_of_pixels_and_open_no_image(tmp_path, method, folder, monkeypatch):
    source = without_captions(write_dataset(tmp_path / "mixed", people=6), {4, 5})
    mixed = samples_of(source, method, caption_free=True)
    keys = [(0, sample, place) for place, sample in enumerate([0, 3, 12, 7, 15])]
    pixels = mixed.collate([mixed[key] for key in keys])
    mixed.frozen = keep(method, mixed, tmp_path / "kept")
    opened = []
    monkeypatch.setattr(type(mixed.store), "__getitem__", lambda store, row: opened.append(row))
    held = mixed.collate([mixed[key] for key in keys])
    assert held.image is None and not opened and len(held) == 5
    assert held.has_text.tolist() == pixels.has_text.tolist() == [True, True, False, True, False]
    assert held.frozen["image"].shape[0] == 5 and held.frozen["text"].shape[0] == 3
    before, after = (method.losses(batch, "prompt-stage") for batch in (pixels, held))
    assert set(before) == {"ic", "proto_t2i", "proto_i2t"}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-5)


def test_a_method_that_reads_no_text_keeps_none(tmp_path, folder, monkeypatch):
    single = model("hpl", train_tasks=("i2i",))
    samples = samples_of(folder, single)
    counted = Counting(single, monkeypatch)
    kept = keep(single, samples, tmp_path)
    assert (counted.images, counted.texts) == (18, 0) and kept.texts(np.array([], np.int64)) == {}
    samples.frozen = kept
    batch = samples.collate([samples[(0, row, row)] for row in range(6)])
    assert set(batch.frozen) == {"image", "image_tokens"} and not batch.texts
    assert torch.isfinite(single.losses(batch, "prompt-stage")["ic"])
