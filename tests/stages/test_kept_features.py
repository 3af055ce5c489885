"""Features that a run keeps between analyses: read when they fit, never when they do not."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import write_dataset
from stages.test_analyse import trained

from reidctl import tables
from reidctl.console import log
from reidctl.data import camera_names, camera_numbers
from reidctl.methods.base import load_method, save_method
from reidctl.methods.clip import Clip
from reidctl.runs import Run, digest
from reidctl.stages import analyse, features, kept_features
from reidctl.stages.measuring import find_subject

WHAT = ["compactness"]


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", splits={person: "test" for person in range(6)})


@pytest.fixture
def run(tmp_path, data):
    return trained(tmp_path / "r", data, name="clip", config={}, described=False)


@pytest.fixture
def computed(monkeypatch):
    """How many images went through the model, call by call."""
    counts = []
    original = features.collect_features

    def count(method, corpus, **more):
        counts.append(len(corpus.images))
        return original(method, corpus, **more)

    monkeypatch.setattr(kept_features, "collect_features", count)
    return counts


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", False)  # whatever an earlier command line made of it
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "reidctl"):
        yield caplog
    log.removeHandler(caplog.handler)


def analysed(run, **flags):
    return analyse.run(run, **{"what": WHAT, "device": "cpu", "force": True, **flags})


def entries(run):
    return sorted((run.path / "features").iterdir()) if (run.path / "features").is_dir() else []


def retrain(run, seed=1):
    """Other weights, and a record that says so."""
    method = load_method(run.stage_dir("finetune"), "cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        method.backbone.image.class_token.normal_()
    save_method(method, run.stage_dir("finetune"))
    path = run.stage_dir("finetune") / "stage.json"
    record = json.loads(path.read_text())
    record["outputs"]["finetune/model.safetensors"]["sha256"] = digest(run.stage_dir("finetune") / "model.safetensors")
    path.write_text(json.dumps(record))


@pytest.mark.covers(216)
def test_a_second_analysis_reads_what_the_first_computed(run, computed, said):
    first = analysed(run)
    assert first["features"]["cached"] is False and computed == [18] and "computed 18 images and kept" in said.text
    folder = run.path / "features" / first["features"]["key"]
    assert entries(run) == [folder] and {path.name for path in folder.iterdir()} == {"embedding.npy", "facts.json"}
    again = analysed(run)
    assert again["features"] == {"cached": True, "key": first["features"]["key"]} and computed == [18]
    assert again["metrics"] == first["metrics"]
    for flags in ({"seed": 5}, {"what": ["tsne", "probes"]}, {"force": False, "sensitive": True}):
        assert analysed(run, **flags)["features"]["cached"]
    assert computed == [18] and f"features: read 18 images from {folder}" in said.text


@pytest.mark.covers(216)
def test_another_checkpoint_does_not_read_them_and_removes_them(run, computed, said):
    first = analysed(run)
    retrain(run)
    second = analysed(run)
    assert second["features"]["cached"] is False and second["features"]["key"] != first["features"]["key"]
    assert computed == [18, 18] and [path.name for path in entries(run)] == [second["features"]["key"]]
    assert "is of another model and is removed" in said.text
    assert second["metrics"] != first["metrics"]


@pytest.mark.covers(216)
def test_other_data_do_not_read_them_and_leave_them(run, data, computed):
    first = analysed(run)
    images = tables.read_table(data / "images.parquet", "images")
    images.loc[images["split"] == "test", "sha256"] += "-changed"
    tables.write_table(data / "images.parquet", "images", images)
    second = analysed(run)
    assert computed == [18, 18] and len(entries(run)) == 2
    assert second["features"]["key"] != first["features"]["key"]


@pytest.mark.covers(216)
def test_a_part_of_what_is_kept_is_read_and_more_than_it_is_computed(run, computed):
    few = analysed(run, limit=9)
    assert few["images"] == 9 and computed == [9]
    whole = analysed(run)
    assert computed == [9, 18] and len(entries(run)) == 2
    for seed in (1, 2):
        part = analysed(run, limit=9, seed=seed)
        assert part["features"] == {"cached": True, "key": whole["features"]["key"]}
    assert computed == [9, 18]
    # The rows are those of the images, whatever their order in the entry.
    subject = find_subject(run, device="cpu")
    part = features.part_of(subject.corpus, np.array([11, 2, 7]))
    read = kept_features.kept_features(subject, part)
    alone = features.collect_features(subject.method, part, device=subject.device)
    assert read.cached
    np.testing.assert_allclose(read.features["embedding"], alone["embedding"], atol=1e-5)


@pytest.mark.covers(216)
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "embedding.npy").write_bytes((folder / "embedding.npy").read_bytes()[:200]),
        lambda folder: (folder / "embedding.npy").write_bytes(b"\x80\x04." + (folder / "embedding.npy").read_bytes()),
        lambda folder: (folder / "embedding.npy").unlink(),
        lambda folder: (folder / "facts.json").write_text("{"),
        lambda folder: (folder / "facts.json").write_text("[]"),
        lambda folder: (folder / "facts.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "facts.json").unlink(),
    ],
)
def test_a_damaged_entry_is_computed_again_with_a_warning(run, computed, said, damage):
    first = analysed(run)
    damage(run.path / "features" / first["features"]["key"])
    again = analysed(run)
    assert again["features"]["cached"] is False and again["metrics"] == first["metrics"] and computed == [18, 18]
    assert [record.levelname for record in said.records if " is damaged (" in record.message] == ["WARNING"]
    assert analysed(run)["features"]["cached"]


def test_a_changed_number_is_noticed(run, computed):
    path = run.path / "features" / analysed(run)["features"]["key"] / "embedding.npy"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(bytes(payload))
    assert not analysed(run)["features"]["cached"]


def test_another_format_is_not_read(run, computed, monkeypatch):
    analysed(run)
    monkeypatch.setattr(kept_features, "FORMAT", 2)
    assert not analysed(run)["features"]["cached"] and len(entries(run)) == 1


@pytest.mark.covers(216)
def test_without_the_cache_nothing_is_read_and_nothing_written(run, computed):
    first = analysed(run, cache=False)
    assert computed == [18] and entries(run) == [] and first["features"]["cached"] is False
    kept = analysed(run)
    assert computed == [18, 18] and kept["features"]["key"] == first["features"]["key"]
    assert not analysed(run, cache=False)["features"]["cached"] and computed == [18, 18, 18]


def test_what_reads_no_features_says_so(run, computed):
    record = analysed(run, what=["architecture"])
    assert record["features"] is None and computed == [] and entries(run) == []


def test_a_run_that_cannot_be_written_is_a_warning(run, computed, said):
    (run.path / "features").write_text("a file")
    record = analysed(run)
    assert record["features"]["cached"] is False and "could not be kept" in said.text


def test_other_folders_stay_and_dead_writers_leave_nothing(run, computed, monkeypatch):
    own, left, fresh = (run.path / "features" / name for name in ("mine", f".{'a' * 32}.1.tmp", f".{'a' * 32}.2.tmp"))
    for folder in (own, left, fresh):
        folder.mkdir(parents=True)
    monkeypatch.setattr(kept_features, "_ABANDONED_S", -1.0)
    key = analysed(run)["features"]["key"]
    assert {path.name for path in entries(run)} == {"mine", key}


def test_texts_of_the_gallery_are_part_of_what_was_read(tmp_path, data):
    config = {"depth": 1, "heads": 2, "text_pool": "end", "protocol": "own_text"}
    run = trained(tmp_path / "b", data, config=config)
    path = data / "described.parquet"
    analysed(run, captions=path)
    assert analysed(run, captions=path)["features"]["cached"]
    texts = tables.read_table(path, "captions")
    texts.loc[texts["kind"] == "identity", "text"] = "somebody else"
    tables.write_table(path, "captions", texts)
    assert not analysed(run, captions=path)["features"]["cached"]


class ByCamera(Clip):
    """`clip` that knows two of three cameras and returns their numbers."""

    @property
    def cameras(self):
        return ("blocks/c0", "blocks/c2")

    def features(self, batch):
        return {"embedding": self.embed_images(batch), "camera": batch.require("camera")[:, None].float()}


def test_cameras_reach_the_method_and_the_key(run, monkeypatch):
    subject = find_subject(run, device="cpu")
    plain = kept_features.kept_features(subject, subject.corpus)
    subject.method.__class__ = ByCamera
    found = kept_features.kept_features(subject, subject.corpus)
    assert not found.cached and found.key != plain.key
    expected = camera_numbers(subject.corpus.images, ByCamera.cameras.fget(None))
    np.testing.assert_array_equal(found.features["camera"][:, 0], expected)
    assert set(expected) == {-1, 0, 1} and camera_names(subject.corpus.images)[0] == "blocks/c0"


def test_the_same_files_elsewhere_are_read(run, tmp_path, data):
    analysed(run)
    moved = run.path.rename(tmp_path / "moved")
    assert analysed(Run(moved))["features"]["cached"]
