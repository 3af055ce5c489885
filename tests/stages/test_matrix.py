"""Every model on every dataset."""

import shutil

import pytest
import torch
from conftest import write_dataset

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import evaluate, finetune, matrix

RECIPE = {
    "method": {"name": "clip"},
    "backbone": {"spec": "clip:micro"},
    "train": {
        "epochs": 1, "batch": 8, "instances": 2, "lr": 1e-3, "lr_new": 1e-3, "warmup_epochs": 0, "device": "cpu",
        "workers": 0,
    },
}  # fmt: skip
SPLITS = {**{n: "val" for n in (6, 7)}, **{n: "test" for n in range(8, 14)}}


def dataset(folder, name, splits=SPLITS):
    """Fourteen people of a dataset of this name, unlike those of any other name."""
    write_dataset(folder, people=14, splits=splits)
    images = tables.read_table(folder / "images.parquet", "images")
    captions = tables.read_table(folder / "captions.parquet", "captions")
    images["dataset"] = name
    for column in ("person_id", "sha256", "image_id"):
        images[column] = f"{name}:" + images[column].str.removeprefix("blocks:")
    captions["image_id"], captions["caption_id"] = f"{name}:" + captions["image_id"], name + captions["caption_id"]
    tables.write_table(folder / "images.parquet", "images", images)
    tables.write_table(folder / "captions.parquet", "captions", captions)
    (folder / "described.parquet").unlink()
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models A and B, each with its dataset; C without captions; D, whose test people A was trained on."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("matrix")
    for seed, name in enumerate(("a", "b")):
        dataset(home / f"data-{name}", name)
        finetune.run(Run(home / name), {**RECIPE, "seed": seed}, data=home / f"data-{name}", device="cpu")
    dataset(home / "bare", "c")
    (home / "bare" / "captions.parquet").unlink()
    dataset(home / "swapped", "a", splits={**{n: "test" for n in range(6)}, **{n: "train" for n in range(6, 14)}})
    return home


def runs(home):
    return Run(home / "a"), Run(home / "b")


def shown(record, direction="t2i", metric="rank1"):
    (found,) = (part for part in record["tables"] if (part["direction"], part["metric"]) == (direction, metric))
    cells = {
        (line["model"], column): cell
        for line in found["rows"]
        for column, cell in zip(found["columns"], line["cells"], strict=True)
    }
    return found, cells


@pytest.fixture
def out(tmp_path):
    return Run(tmp_path / "out")


@pytest.mark.covers(168)
def test_every_model_meets_every_dataset_and_each_cell_equals_evaluate(home, out, tmp_path):
    a, b = runs(home)
    record = matrix.run(out, [a, b], device="cpu", seed=5)
    found, cells = shown(record)
    assert found["columns"] == ["a", "b"] and [line["model"] for line in found["rows"]] == ["a", "b"]
    for model, column in cells:
        copy = Run(shutil.copytree(home / model, tmp_path / f"{model}-on-{column}"))
        alone = evaluate.run(copy, data=home / f"data-{column}", device="cpu", seed=5)
        rows = tables.read_table(copy.table("evaluate", "metrics"), "metrics")
        rows = rows[(rows["condition"] == "standard")].set_index(["direction", "metric"])
        for (direction, metric), row in rows.iterrows():
            cell = shown(record, direction, metric)[1][model, column]
            assert [cell[key] for key in ("value", "low", "high")] == row[["value", "low", "high"]].tolist(), alone
            assert [cell[key] for key in ("queries", "skipped", "gallery")] == row[
                ["queries", "skipped", "gallery"]
            ].tolist()
        cell = cells[model, column]
        assert cell["relation"] == ("same" if model == column else "cross")
        expected = None if model == column else cells[column, column]["value"] - cell["value"]
        assert cell["drop"] == expected
    table = tables.read_table(out.table("matrix", "matrix"), "matrix")
    assert set(zip(table["model"], table["data"], strict=True)) == {
        (model, data) for model in "ab" for data in ("data-a", "data-b")
    }
    assert record["refused"] == [] and record["metrics"]["t2i"]["rank1"] == min(c["value"] for c in cells.values())


@pytest.mark.covers(168)
def test_what_cannot_be_measured_is_a_cell_with_its_reason(home, out):
    a, b = runs(home)
    record = matrix.run(out, [a, b], datasets=[home / "bare", home / "swapped"], device="cpu")
    found, texts = shown(record)
    images = shown(record, "i2i")[1]
    assert found["columns"] == ["a (data-a)", "b", "c", "a (swapped)"]
    # Image to image needs no caption.
    assert "no captions" in texts["a", "c"]["reason"] and "value" in images["a", "c"]
    # Model A was trained on the very people; model B was not.
    (refused,) = record["refused"]
    assert (refused["model"], refused["data"]) == ("a", "swapped") and "used to train this model" in refused["reason"]
    assert texts["a", "a (swapped)"] == {"reason": refused["reason"]} and "value" in texts["b", "a (swapped)"]
    assert texts["b", "a (swapped)"]["drop"] is None, "no model was measured on it at home"


def test_a_killed_matrix_repeats_one_cell_at_most_and_a_further_model_costs_its_own_cells(home, out, monkeypatch):
    a, b = runs(home)
    done = []
    measure = matrix._measure

    def counted(model, column, asked, stop=None):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append((model.name, column.name))
        return measure(model, column, asked)

    monkeypatch.setattr(matrix, "_measure", lambda *given: counted(*given, stop=1))
    with pytest.raises(KeyboardInterrupt):
        matrix.run(out, [a], datasets=[home / "data-b"], device="cpu")
    assert out.record("matrix") is None
    monkeypatch.setattr(matrix, "_measure", counted)
    record = matrix.run(out, [a], datasets=[home / "data-b"], device="cpu")
    assert done == [("a", "data-a"), ("a", "data-b")]
    assert matrix.run(out, [a], datasets=[home / "data-b"], device="cpu")["status"] == "up-to-date"
    more = matrix.run(out, [a, b], device="cpu")
    assert done[2:] == [("b", "data-a"), ("b", "data-b")]
    assert shown(more)[1]["a", "b"]["value"] == shown(record)[1]["a", "b"]["value"]
    fresh = matrix.run(out, [a, b], device="cpu", force=True)
    assert len(done) == 8 and fresh["tables"] == more["tables"]
    matrix.run(out, [b], datasets=[home / "data-b"], device="cpu")
    assert len(list((out.path / "matrix" / "parts").iterdir())) == 1


def test_a_damaged_part_is_measured_again(home, out):
    a, _ = runs(home)
    first = matrix.run(out, [a], device="cpu")
    (part,) = (out.path / "matrix" / "parts").iterdir()
    for damage in (part.read_bytes()[:-20], b"\xff\xfe", b"[1]", b"{}"):
        part.write_bytes(damage)
        out.unfinish("matrix")
        assert matrix.run(out, [a], device="cpu")["tables"] == first["tables"]


@pytest.mark.covers(168)
def test_a_model_is_at_home_where_it_saw_half_of_the_training_images_not_one(home, out, tmp_path):
    """Datasets share single files; one of them makes no training domain."""
    a, _ = runs(home)
    own = tables.read_table(home / "data-a" / "images.parquet", "images")
    own = own.loc[own["split"] == "train", "sha256"].to_numpy()
    relations = {}
    for count in (1, len(own) // 2):
        folder = dataset(tmp_path / f"shared-{count}", "b")
        images = tables.read_table(folder / "images.parquet", "images")
        train = images.index[images["split"] == "train"]
        assert len(train) == len(own)
        images.loc[train[:count], "sha256"] = own[:count]
        tables.write_table(folder / "images.parquet", "images", images)
        record = matrix.run(out, [a], datasets=[folder], device="cpu")
        relations[count] = shown(record)[1]["a", "b"]["relation"]
        said = f"the model was trained on {count} of its {len(own)} training images, which counts as {relations[count]}"
        assert any(said in note for note in record["notes"])
        assert sum("training images" in note for note in record["notes"]) == 1, "all of its own is worth no note"
    assert relations == {1: "cross", len(own) // 2: "same"}


def test_the_run_s_own_model_is_the_first_row_and_copies_of_data_are_one_column(home, tmp_path):
    a, b = runs(home)
    mine = Run(shutil.copytree(b.path, tmp_path / "mine"))
    copied = shutil.copytree(home / "data-a", tmp_path / "copy-of-a")
    record = matrix.run(mine, [a, mine], datasets=[copied], device="cpu")
    found, cells = shown(record)
    assert [line["model"] for line in found["rows"]] == ["mine", "a"] and found["columns"] == ["b", "a"]
    assert cells["a", "a"]["relation"] == cells["mine", "b"]["relation"] == "same"


def test_models_of_one_name_are_told_apart_by_their_folders(home, tmp_path, out):
    first = Run(shutil.copytree(home / "a", tmp_path / "x" / "run"))
    second = Run(shutil.copytree(home / "b", tmp_path / "y" / "run"))
    assert [line["model"] for line in matrix.run(out, [first, second], device="cpu")["tables"][0]["rows"]] == [
        "x/run",
        "y/run",
    ]


def test_no_model_and_no_cell_are_errors(home, out, tmp_path):
    with pytest.raises(UsageError, match="needs models"):
        matrix.run(out, [])
    with pytest.raises(DataError, match="no finished `finetune`"):
        matrix.run(out, [Run(tmp_path / "nothing")])
    with pytest.raises(DataError, match=r"No model can be measured.*nowhere"):
        matrix.run(out, [Run(home / "a")], split="nowhere", device="cpu")
    with pytest.raises(UsageError, match="not known"):
        matrix.run(out, [Run(home / "a")], query="poem")


def test_equal_weights_that_saw_other_people_do_not_share_a_cell(home, out, tmp_path):
    """Zero epochs leave the starting weights, whatever they are trained on."""
    twins = []
    for name in ("a", "b"):
        run = Run(tmp_path / name)
        recipe = {**RECIPE, "train": {**RECIPE["train"], "epochs": 0}}
        twins.append(run)
        finetune.run(run, recipe, data=home / f"data-{name}", device="cpu")
    weights = [run.require("finetune")["outputs"]["finetune/model.safetensors"]["sha256"] for run in twins]
    assert weights[0] == weights[1]
    cells = shown(matrix.run(out, twins, datasets=[home / "swapped"], device="cpu"))[1]
    assert (cells["a", "a (data-a)"]["relation"], cells["b", "a (data-a)"]["relation"]) == ("same", "cross")
    assert "reason" in cells["a", "a (swapped)"] and "value" in cells["b", "a (swapped)"]
