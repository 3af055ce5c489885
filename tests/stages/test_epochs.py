"""Every kept epoch on the test split: the chosen one and the best one, side by side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.device import resolve_device
from reidctl.errors import DataError
from reidctl.evaluation import protocols
from reidctl.methods.base import load_method
from reidctl.runs import Run, digest
from reidctl.stages import epochs, finetune
from reidctl.stages.measuring import embed, find_subject, protocols_of
from reidctl.training.state import kept_epochs

RECIPE = {
    "method": {"name": "clip"},
    "backbone": {"spec": "clip:micro"},
    "train": {
        "epochs": 4, "batch": 8, "instances": 2, "lr": 2e-3, "lr_new": 2e-3, "warmup_epochs": 0, "device": "cpu",
        "workers": 0, "keep_epochs": True,
    },
}  # fmt: skip
OPTIMISTIC = "best epoch on test: optimistic, for comparison with papers that report it only"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that kept four epochs of a training on 6 people; 6 others are the test."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("epochs")
    splits = {**{n: "val" for n in (6, 7)}, **{n: "test" for n in range(8, 14)}}
    folder = write_dataset(home / "blocks", people=14, splits=splits)
    run = Run(home / "run")
    finetune.run(run, RECIPE, data=folder, device="cpu")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Run(shutil.copytree(trained.path, tmp_path / "run"))


def measured_alone(run, path):
    """The metrics of one weights file, by the plain evaluation."""
    subject = find_subject(run, device="cpu")
    subject.method.load_state_dict(load_file(path), strict=False)
    found = {}
    for protocol in protocols_of(subject, embed(subject), "blocks")[0]:
        for name, interval in protocols.evaluate(protocol, seed=3).summary.items():
            found[protocol.direction, name] = vars(interval)
    return found


@pytest.mark.covers(31)
def test_every_kept_epoch_is_measured_as_evaluate_would_and_both_choices_are_labelled(run):
    record = epochs.run(run, device="cpu", seed=3)
    table = tables.read_table(run.table("epochs", "epochs"), "epochs")
    assert sorted(set(table["epoch"])) == [1, 2, 3, 4] and set(table["direction"]) == {"t2i", "i2i"}
    for epoch, path in kept_epochs(run.stage_dir("finetune"), run.require("finetune")["fingerprint"]).items():
        expected = measured_alone(run, path)
        rows = table[table["epoch"] == epoch]
        assert {(row.direction, row.metric) for row in rows.itertuples()} == expected.keys()
        for row in rows.itertuples():
            assert {"value": row.value, "low": row.low, "high": row.high} == expected[row.direction, row.metric]
    chosen = run.require("finetune")["best_epoch"]
    rank1 = table[table["metric"] == "rank1"]
    for direction, rows in rank1.groupby("direction"):
        best = min(rows.loc[rows["value"] == rows["value"].max(), "epoch"])
        labels = rows.set_index("epoch")["chosen"]
        expected = {chosen: ["selected on val"], best: [OPTIMISTIC]}
        if chosen == best:
            expected = {chosen: ["selected on val", OPTIMISTIC]}
        assert labels.dropna().to_dict() == {epoch: "; ".join(said) for epoch, said in expected.items()}
        shown = next(r for r in record["rows"] if (r["direction"], r["metric"]) == (direction, "rank1"))
        assert (shown["selected"]["epoch"], shown["best"]["epoch"]) == (chosen, best)
        assert shown["selected"]["label"] == "selected on val" and shown["best"]["label"] == OPTIMISTIC
        assert shown["gap"]["value"] == pytest.approx(shown["best"]["value"] - shown["selected"]["value"])
        assert shown["gap"]["low"] <= shown["gap"]["value"] <= shown["gap"]["high"] and shown["gap"]["value"] >= 0
        assert record["metrics"][direction]["rank1"] == shown["selected"]["value"]
    queries = tables.read_table(run.table("epochs", "queries"), "queries")
    assert set(queries["condition"]) == {f"epoch-00{epoch}" for epoch in (1, 2, 3, 4)}
    assert "optimistic" in record["notes"][-1]


def test_comparing_epochs_touches_nothing_of_the_training_and_is_up_to_date_afterwards(run):
    before = digest(run.stage_dir("finetune"))
    first = epochs.run(run, device="cpu")
    assert digest(run.stage_dir("finetune")) == before and first["status"] == "done"
    assert [path.name for path in sorted(run.stage_dir("epochs").iterdir())] == [
        "epochs.parquet",
        "queries.parquet",
        "stage.json",
    ]
    again = epochs.run(run, device="cpu")
    assert again["status"] == "up-to-date" and again["rows"] == first["rows"]
    assert epochs.run(run, device="cpu", seed=1)["status"] == "done"


def test_a_killed_comparison_repeats_one_epoch_at_most_and_ends_the_same(run, tmp_path, monkeypatch):
    whole = Run(shutil.copytree(run.path, tmp_path / "whole"))
    expected = epochs.run(whole, device="cpu")
    measured = []
    measure = epochs._queries

    def stops(subject, epoch):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(epoch)
        return measure(subject, epoch)

    monkeypatch.setattr(epochs, "_queries", stops)
    with pytest.raises(KeyboardInterrupt):
        epochs.run(run, device="cpu")
    assert run.record("epochs") is None
    monkeypatch.setattr(epochs, "_queries", lambda s, e: (measured.append(e), measure(s, e))[1])
    record = epochs.run(run, device="cpu")
    assert measured == [1, 2, 3, 4] and record["rows"] == expected["rows"]
    for name in ("epochs", "queries"):
        assert run.table("epochs", name).read_bytes() == whole.table("epochs", name).read_bytes()


def test_without_kept_epochs_the_flag_is_named(run):
    shutil.rmtree(run.stage_dir("finetune") / "epochs")
    with pytest.raises(DataError, match=r"kept no epochs.*train\.keep_epochs=true"):
        epochs.run(run, device="cpu")
    with pytest.raises(DataError, match="finetune"):
        epochs.run(Run(run.path / "nothing"), device="cpu")


def test_lost_epochs_are_named_and_the_rest_is_measured(run):
    chosen = run.require("finetune")["best_epoch"]
    (run.stage_dir("finetune") / "epochs" / f"epoch-00{chosen}.safetensors").unlink()
    record = epochs.run(run, device="cpu")
    assert any(f"1 validated epochs are gone or unreadable: {chosen}." in note for note in record["notes"])
    assert record["rows"][0]["selected"] is None and record["rows"][0]["gap"] is None and record["metrics"] == {}


def test_an_index_of_the_chosen_model_is_not_taken_for_other_epochs(run):
    from reidctl.stages import index

    index.run(run, device="cpu")
    indexed = epochs.run(run, device="cpu", force=True)
    shutil.rmtree(run.stage_dir("index"))
    assert epochs.run(run, device="cpu", force=True)["rows"] == indexed["rows"]


def test_weights_that_a_file_lacks_do_not_stay_those_of_the_epoch_before(run):
    path = run.stage_dir("finetune") / "epochs" / "epoch-003.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    state = load_file(path)
    left_out = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != left_out}, path, facts)
    with pytest.raises(DataError, match=rf"epoch-003.*missing \['{left_out}'\]"):
        epochs.run(run, device="cpu")
    save_file({**state, "another.layer": torch.zeros(2)}, path, facts)
    with pytest.raises(DataError, match=r"unexpected \['another.layer'\]"):
        epochs.run(run, device="cpu")


def test_a_damaged_part_is_measured_again(run, monkeypatch):
    expected = epochs.run(Run(shutil.copytree(run.path, run.path.with_name("whole"))), device="cpu")
    monkeypatch.setattr(epochs, "_clear", lambda folder: None)
    epochs.run(run, device="cpu")
    part = sorted((run.stage_dir("epochs") / "parts").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-50])
    run.unfinish("epochs")
    assert epochs.run(run, device="cpu")["rows"] == expected["rows"]


def test_other_data_and_texts_are_measured_where_they_are_named(run, tmp_path):
    """The captions of other people are what the model is asked, not those of its own data."""
    own = Path(run.require("finetune")["data"])
    folder = tmp_path / "other"
    shutil.copytree(own, folder)
    captions = tables.read_table(folder / "captions.parquet", "captions")
    captions["text"] = captions["text"].to_numpy()[::-1]
    tables.write_table(folder / "captions.parquet", "captions", captions)
    first = epochs.run(run, device="cpu")
    assert epochs.run(run, data=own, device="cpu")["status"] == "up-to-date"
    record = epochs.run(run, data=folder, device="cpu")
    assert record["status"] == "done" and record["data"] == str(folder.resolve())
    assert record["rows"] != first["rows"] and any("another dataset" in note for note in record["notes"])
    with pytest.raises(DataError, match="No table of texts"):
        epochs.run(run, captions=tmp_path / "none.parquet", device="cpu")
    assert next(row["direction"] for row in record["rows"]) == "t2i"


def test_a_copy_of_the_data_is_the_same_dataset_and_changed_tables_are_another(run, tmp_path):
    own = Path(run.require("finetune")["data"])
    copy = Path(shutil.copytree(own, tmp_path / "copy"))
    assert not any("dataset" in note for note in find_subject(run, data=copy, device="cpu").notes)
    captions = tables.read_table(copy / "captions.parquet", "captions")
    tables.write_table(copy / "captions.parquet", "captions", captions.iloc[::-1].reset_index(drop=True))
    assert any("another dataset" in note for note in find_subject(run, data=copy, device="cpu").notes)
    path = run.stage_dir("finetune") / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": str(copy.resolve())}))
    (said,) = [note for note in find_subject(run, device="cpu").notes if "training" in note]
    assert said == f"The tables of captions in {copy.resolve()} are no longer those of the training."


def test_the_people_that_chose_the_epoch_are_named_on_val(run):
    record = epochs.run(run, split="val", device="cpu")
    assert "both numbers are optimistic" in record["notes"][-1]
    assert any(row["best"]["label"].startswith("best epoch on val") for row in record["rows"])


def test_a_damaged_epoch_is_left_out(run):
    path = run.stage_dir("finetune") / "epochs" / "epoch-002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    record = epochs.run(run, device="cpu")
    assert any("gone or unreadable: 2." in note for note in record["notes"])
    # Somebody else's weights under the right name are not this training's.
    save_file(load_file(path.with_name("epoch-001.safetensors")), path)
    assert 2 not in kept_epochs(run.stage_dir("finetune"), run.require("finetune")["fingerprint"])
    assert build("clip:micro") and load_method(run.stage_dir("finetune"), resolve_device("cpu"))
