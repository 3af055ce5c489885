"""The import stage: tables, counts, and when it does nothing."""

import json

import pytest
from PIL import Image

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import data_import
from reidctl.stages.sources import find_source


def table_of(folder, rows="a.png,1,train,One.\nb.png,2,test,Two.\n"):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 16), "red").save(folder / name)
    (folder / "mine.csv").write_text("image,person,split,caption\n" + rows)
    return folder / "mine.csv"


def test_the_stage_writes_two_tables_and_its_record_last(tmp_path):
    run = Run(tmp_path / "run")
    record = data_import.run(run, format="csv-table", root=table_of(tmp_path))
    assert record["status"] == "done" and "status" not in run.record("data")
    assert record["splits"]["train"] == {"people": 1, "images": 1, "captions": 1}
    images = tables.read_table(run.table("data", "images"), "images")
    assert list(images["path"]) == [(tmp_path / name).as_posix() for name in ("a.png", "b.png")]
    assert len(tables.read_table(run.table("data", "captions"), "captions")) == 2
    assert record["root"] == (tmp_path / "mine.csv").resolve().as_posix()
    json.dumps(record)


def test_the_stage_repeats_only_when_something_changed(tmp_path):
    run, root = Run(tmp_path / "run"), table_of(tmp_path)

    def status(**options):
        return data_import.run(run, format="csv-table", root=root, **options)["status"]

    assert [status(), status(), status(force=True), status()] == ["done", "up-to-date", "done", "up-to-date"]
    assert status(name="other") == "done"
    Image.new("RGB", (8, 20), "blue").save(tmp_path / "a.png")
    assert status(name="other") == "done"
    root.write_text(root.read_text().replace("One.", "Three."))
    assert status(name="other") == "done"
    assert status(name="other") == "up-to-date"


def test_a_failed_import_leaves_the_finished_one_alone(tmp_path):
    run, root = Run(tmp_path / "run"), table_of(tmp_path)
    data_import.run(run, format="csv-table", root=root)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a\.png"):
        data_import.run(run, format="csv-table", root=root)
    assert run.record("data") is not None
    record = data_import.run(run, format="csv-table", root=root, skip_bad=True)
    assert sum(split["images"] for split in record["splits"].values()) == 1


def test_an_option_that_the_format_would_ignore_is_refused(tmp_path):
    with pytest.raises(UsageError, match="csv-table does not have the option `carve-val`"):
        data_import.run(Run(tmp_path / "run"), format="csv-table", root=table_of(tmp_path), carve_val=3)


def test_images_without_people_are_marked_as_such(tmp_path):
    table_of(tmp_path)
    record = data_import.run(Run(tmp_path / "run"), format="folder", root=tmp_path)
    assert record["known_people"] is False and record["splits"]["test"]["captions"] == 0
    assert len(tables.read_table(tmp_path / "run" / "data" / "captions.parquet", "captions")) == 0


def test_a_missing_root_and_an_unknown_format_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data_import.run(Run(tmp_path / "run"), format="folder", root=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="No dataset format `foldr`"):
        data_import.run(Run(tmp_path / "run"), format="foldr", root=tmp_path)


@pytest.mark.covers(18)
def test_descriptions_that_come_with_a_dataset_are_what_a_method_reads(tmp_path):
    """No `caption` stage is needed, and the texts count as written by a model."""
    root = table_of(tmp_path)
    texts = tmp_path / "texts.csv"
    texts.write_text(
        "image,identity,clothing,model\na.png,Tall.,Red coat.,some-vlm\nb.png,Small.,Blue coat.,some-vlm\n"
    )
    run = Run(tmp_path / "run")
    record = data_import.run(run, format="csv-table", root=root, descriptions=texts)
    assert record["described"] and any("some-vlm" in note for note in record["notes"])
    captions = tables.read_table(run.table("data", "captions"), "captions")
    written = captions[captions["kind"] != "full"]
    assert set(written["source"]) == {"mllm"} and set(written["model"]) == {"some-vlm"}
    assert set(captions.loc[captions["kind"] == "full", "source"]) == {"human"}
    corpus = find_source(run).corpus()
    assert corpus.identity == ["Tall.", "Small."] and corpus.clothing == ["Red coat.", "Blue coat."]
    texts.write_text(texts.read_text().replace("Tall.", "Thin."))
    assert data_import.run(run, format="csv-table", root=root, descriptions=texts)["status"] == "done"
    assert data_import.run(run, format="csv-table", root=root)["described"] is False
    assert find_source(run).described is None


@pytest.mark.parametrize("name", ["a:b", "a/b", "..\\x", "", " ", "a\nb"])
def test_a_name_that_would_make_ids_of_two_datasets_equal_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be the name of a dataset"):
        data_import.run(Run(tmp_path / "run"), format="csv-table", root=table_of(tmp_path), name=name)
