"""`backbone.start`: towers of an earlier training as starting weights, and what that training saw counts as seen."""

import shutil

import pytest
import torch
from conftest import write_dataset
from safetensors.torch import load_file

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import evaluate, finetune

SPLITS = {4: "val", 5: "val", 6: "test", 7: "test"}
TRAIN = {"epochs": 1, "batch": 6, "instances": 2, "lr": 1e-3, "warmup_epochs": 0, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("start") / "blocks", people=8, splits=SPLITS)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("start") / "first")
    finetune.run(run, {"method": {"name": "clip"}, "backbone": {"spec": "clip:micro"}, "train": TRAIN}, data=data)
    return run


def train(folder, data, start, **backbone):
    recipe = {
        "seed": 3,
        "method": {"name": "irra", "mlm_layers": 1},
        "backbone": {"spec": "clip:micro", "start": str(start), **backbone},
        "train": {**TRAIN, "epochs": 0},
    }
    return finetune.run(Run(folder), recipe, data=data)


def test_the_towers_are_those_of_the_earlier_training_bit_for_bit(tmp_path, data, first):
    record = train(tmp_path / "run", data, first.path)
    before, after = (load_file(path / "finetune" / "model.safetensors") for path in (first.path, tmp_path / "run"))
    towers = [name for name in before if name.startswith("backbone.")]
    assert len(towers) > 20 and all(torch.equal(before[name], after[name]) for name in towers)
    assert record["start"] == str(first.path.resolve())


def test_another_model_to_start_from_trains_again_and_the_same_one_elsewhere_does_not(tmp_path, data, first):
    copy = tmp_path / "copy"
    shutil.copytree(first.path, copy)
    assert train(tmp_path / "run", data, first.path)["status"] == "done"
    assert train(tmp_path / "run", data, copy)["status"] == "up-to-date"
    again = {"method": {"name": "clip"}, "backbone": {"spec": "clip:micro"}, "train": TRAIN, "seed": 9}
    finetune.run(Run(copy), again, data=data)
    assert train(tmp_path / "run", data, copy)["status"] == "done"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "vit-bert:micro"}, "backbone.spec clip:micro"),
        ({"image_size": (96, 32)}, "backbone.image_size"),
        ({"text_length": 16}, "backbone.text_length"),
    ],
)
def test_towers_of_another_kind_or_size_are_refused(tmp_path, data, first, change, message):
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", data, first.path, **change)


def test_a_start_without_a_training_is_refused(tmp_path, data):
    with pytest.raises(DataError, match="no finished `finetune`"):
        train(tmp_path / "run", data, tmp_path / "nothing")


def test_whom_the_first_training_saw_cannot_be_tested_after_the_second(tmp_path, data, first):
    """The second training's own people are others; without the first one's list nobody would notice."""
    other = write_dataset(tmp_path / "blocks", people=8, splits={0: "test", 1: "test", 2: "val", 3: "val"})
    images = tables.read_table(other / "images.parquet", "images")
    # Other pictures of the same people: only their names give them away.
    tables.write_table(
        other / "images.parquet", "images", images.assign(sha256=[f"{i:064x}" for i in range(len(images))])
    )
    train(tmp_path / "run", other, first.path)
    with pytest.raises(DataError, match="2 people of the test split were used to train this model"):
        evaluate.run(Run(tmp_path / "run"), data=other, device="cpu")
