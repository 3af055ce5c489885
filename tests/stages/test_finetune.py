from pathlib import Path

import pytest
import torch
from cli.commandline import cli
from conftest import corpus_of, write_dataset
from PIL import Image
from safetensors.torch import load_file

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.device import resolve_device
from reidctl.errors import DataError
from reidctl.methods.base import build_method
from reidctl.pixels import PixelStore
from reidctl.runs import Run
from reidctl.stages import finetune
from reidctl.stages.finetune import _validation


def validate(folder, images_of_split, captions=0):
    corpus = corpus_of(folder)
    corpus = type(corpus)(
        images_of_split(corpus.images), corpus.captions.iloc[:captions], corpus.identity, corpus.clothing, corpus.root
    )
    torch.manual_seed(0)
    method = build_method("clip", {}, build("clip:micro"), 4).eval()
    store = PixelStore(corpus.paths(), method.backbone.image_size, cache_bytes=0)
    return _validation(corpus, store, resolve_device("cpu"))(method)


def test_a_split_without_captions_is_validated_from_image_to_image(tmp_path):
    found = validate(write_dataset(tmp_path / "blocks", people=4), lambda images: images)
    assert 0 <= found["rank1"] <= 1 and 0 < found["mAP"] <= 1


def test_a_split_in_which_nothing_can_be_found_is_a_data_error_and_no_epoch_is_chosen(tmp_path):
    folder = write_dataset(tmp_path / "blocks", people=4)
    with pytest.raises(DataError, match="no epoch can be chosen"):
        validate(folder, lambda images: images.assign(camera_id="c0"))
    with pytest.raises(DataError, match="no epoch can be chosen"):
        validate(folder, lambda images: images.assign(role=None, camera_id=None))


def test_without_captions_and_roles_every_image_is_looked_for_under_other_cameras(tmp_path):
    found = validate(write_dataset(tmp_path / "blocks", people=4), lambda images: images.assign(role=None))
    assert list(found) == ["rank1", "mAP"] and 0 < found["mAP"] <= 1


@pytest.mark.covers(38)
@pytest.mark.parametrize("role", ["given", None])
def test_a_split_with_both_tasks_is_validated_in_both_and_text_to_image_chooses(tmp_path, role):
    folder = write_dataset(tmp_path / "blocks", people=4)
    change = (lambda images: images) if role else (lambda images: images.assign(role=None))
    both, images = validate(folder, change, 99), validate(folder, change)
    assert list(both) == ["rank1", "mAP", "i2i.rank1", "i2i.mAP"]
    assert (both["i2i.rank1"], both["i2i.mAP"]) == (images["rank1"], images["mAP"])
    texts = validate(folder, lambda images: images.assign(role="query"), 99)
    assert list(texts) == ["rank1", "mAP"] and (both["rank1"], both["mAP"]) == (texts["rank1"], texts["mAP"])


SMALL = {
    "method": {"name": "clip"},
    "backbone": {"spec": "clip:micro"},
    "train": {
        "epochs": 3, "batch": 6, "instances": 2, "lr": 1e-3, "warmup_epochs": 0, "device": "cpu", "workers": 0,
    },
}  # fmt: skip


def train(tmp_path, name="run", force=False, **settings):
    folder = tmp_path / "blocks"
    if not folder.is_dir():
        write_dataset(folder, people=8, splits={4: "val", 5: "val", 6: "test", 7: "test"})
    recipe = {**SMALL, "train": {**SMALL["train"], **settings}}
    return finetune.run(Run(tmp_path / name), recipe, data=folder, device="cpu", force=force)


@pytest.mark.covers(38)
def test_a_joint_run_has_both_validation_curves(tmp_path):
    train(tmp_path, epochs=2)
    history = tables.read_table(tmp_path / "run" / "finetune" / "history.parquet", "history")
    curves = history[history["split"] == "val"].groupby("name")["epoch"].agg(list).to_dict()
    assert curves == {name: [0, 1] for name in ("rank1", "mAP", "i2i.rank1", "i2i.mAP")}


def test_keeping_epochs_changes_no_weight_and_is_off_by_default(tmp_path):
    kept, plain = train(tmp_path, "kept", keep_epochs=True), train(tmp_path, "plain")
    files = sorted(path.name for path in (tmp_path / "kept" / "finetune" / "epochs").iterdir())
    assert files == [f"epoch-00{epoch}.safetensors" for epoch in (1, 2, 3)]
    assert kept["kept_epochs"] == [1, 2, 3] and kept["kept_bytes"] > 0
    assert plain["kept_epochs"] == [] and not (tmp_path / "plain" / "finetune" / "epochs").exists()
    weights = "finetune/model.safetensors"
    assert kept["outputs"][weights]["sha256"] == plain["outputs"][weights]["sha256"]
    chosen = load_file(tmp_path / "kept" / "finetune" / "epochs" / f"epoch-00{kept['best_epoch']}.safetensors")
    saved = load_file(tmp_path / "kept" / weights)
    assert saved.keys() == chosen.keys() and all(torch.equal(saved[name], chosen[name]) for name in saved)


def test_a_run_from_before_epochs_could_be_kept_stays_up_to_date_and_asking_for_them_trains_again(tmp_path):
    first = train(tmp_path)
    assert "keep_epochs" not in first["settings"]["train"]
    assert train(tmp_path)["status"] == "up-to-date"
    assert train(tmp_path, keep_epochs=True)["status"] == "done"
    # Whoever deletes them to win space does not train again.
    for path in (tmp_path / "run" / "finetune" / "epochs").iterdir():
        path.unlink()
    assert train(tmp_path, keep_epochs=True)["status"] == "up-to-date"


def test_kept_epochs_of_other_settings_are_removed(tmp_path):
    train(tmp_path, keep_epochs=True)
    train(tmp_path, keep_epochs=True, epochs=1)
    folder = tmp_path / "run" / "finetune"
    assert [path.name for path in (folder / "epochs").iterdir()] == ["epoch-001.safetensors"]
    (folder / "epochs" / "notes.txt").write_text("mine")
    train(tmp_path)
    assert [path.name for path in (folder / "epochs").iterdir()] == ["notes.txt"]


@pytest.mark.covers(31)
def test_training_opens_no_image_of_a_test_person_and_keeping_epochs_changes_nothing_about_it(tmp_path, monkeypatch):
    opened = set()
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: (opened.add(Path(file).name), read(file, *args))[1])
    train(tmp_path, keep_epochs=True, epochs=1)
    assert {name[:2] for name in opened} == {f"p{person}" for person in range(6)}


def test_finetune_says_what_keeping_epochs_cost(tmp_path):
    folder = write_dataset(tmp_path / "blocks", people=8, splits={4: "val", 5: "val", 6: "test", 7: "test"})
    given = [f"train.{name}={value}" for name, value in (("epochs", 2), ("batch", 6), ("instances", 2))]
    sets = [part for text in (*given, "backbone.spec=clip:micro", "train.keep_epochs=true") for part in ("--set", text)]
    done = cli("finetune", "--run", tmp_path / "run", "--method", "clip-tiny", "--data", folder, *sets)
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "finetune" / "epochs").iterdir())
    assert done.code == 0 and f"kept the weights of 2 epochs, {size / 1e6:,.0f} MB" in done.out
