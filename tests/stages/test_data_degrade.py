"""The degrade stage: the same images and ids, other captions, and an evaluation that takes them."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import typer
from cli.commandline import MODEL, cli
from typer.main import get_command

from reidctl import tables
from reidctl.cli import data_degrade as command
from reidctl.datasets.degrade import degrade, word_overlap
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import data_degrade, evaluate
from reidctl.stages.sources import find_source
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run that holds a finished dataset of 12 people."""
    run = Run(tmp_path_factory.mktemp("source") / "run")
    write_dataset(SynthConfig(people=12, images_per_person=2, size=(64, 32), seed=1), run.stage_dir("data"), workers=1)
    run.finish(
        "data", settings={}, inputs={}, outputs=[], started=data_degrade.datetime.now(data_degrade.UTC),
        extra={"source": "synthped", "root": "/photos", "known_people": True},
    )  # fmt: skip
    return run


def read(run, name):
    return tables.read_table(run.table("data", name), name)


def degraded(source, folder, kind="drop", level=0.3, **options):
    run = Run(Path(folder))
    return run, data_degrade.run(run, source=source.path, kind=kind, level=level, **options)


@pytest.mark.covers(22)
def test_captions_of_the_split_change_and_nothing_else_does(source, tmp_path):
    run, record = degraded(source, tmp_path / "out", level=0.5)
    before, after = read(source, "images"), read(run, "images")
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in after["path"])
    assert before.drop(columns="path").equals(after.drop(columns="path"))
    split = dict(zip(before["image_id"], before["split"], strict=True))
    old, new = (read(r, "captions").set_index("caption_id") for r in (source, run))
    for name, row in old.iterrows():
        test = split[row["image_id"]] == "test"
        if row["kind"] == "full" and test:
            assert new.loc[name, "text"] == degrade(row["text"], "drop", 0.5, seed=0, key=name) != row["text"]
        elif row["kind"] == "phrase" and test:
            assert name not in new.index
    same = [
        name
        for name, row in old.iterrows()
        if row["kind"] in ("identity", "clothing") or split[row["image_id"]] != "test"
    ]
    pd.testing.assert_frame_equal(new.loc[same], old.loc[same])
    full = [name for name, row in old.iterrows() if row["kind"] == "full" and split[row["image_id"]] == "test"]
    overlaps = [word_overlap(old.loc[name, "text"], new.loc[name, "text"]) for name in full]
    assert record["metrics"]["word_overlap"] == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-4)
    assert record["metrics"]["captions"] == record["metrics"]["changed"] == len(full)


@pytest.mark.covers(22)
@pytest.mark.parametrize(
    "kind, measure", [("drop", "word_overlap"), ("typo", "word_overlap"), ("shuffle", "word_order")]
)
def test_the_record_falls_with_the_level(source, tmp_path, kind, measure):
    found = [
        degraded(source, tmp_path / f"{n}", kind, level)[1]["metrics"][measure] for n, level in enumerate((0, 0.2, 0.6))
    ]
    assert found[0] == 1 and found[0] > found[1] > found[2]


def test_the_record_carries_what_later_stages_ask_for(source, tmp_path):
    run, record = degraded(source, tmp_path / "out", splits=["all"])
    assert (record["source"], record["root"], record["known_people"]) == ("degrade", "/photos", True)
    assert set(record["splits"]) == {"train", "val", "test"} and "drop, level 0.3, seed 0" in record["notes"][0]
    assert run.record("data")["fingerprint"] == record["fingerprint"]
    json.dumps(record)


def test_texts_that_came_with_the_dataset_and_older_names_of_people_stay_known(source, tmp_path):
    folder = tmp_path / "in" / "data"
    for name in ("images", "captions"):
        tables.write_table(folder / f"{name}.parquet", name, read(source, name))
    schema = tables.SCHEMAS["identities"]
    row = {field.name: read(source, "images")["person_id"][0] for field in schema}
    tables.write_table(folder / "identities.parquet", "identities", pd.DataFrame([row]))
    Run(folder.parent).finish(
        "data", settings={}, inputs={}, outputs=[], started=data_degrade.datetime.now(data_degrade.UTC),
        extra={"source": "combine", "known_people": True, "described": True},
    )  # fmt: skip
    run, record = degraded(Run(folder.parent), tmp_path / "out")
    assert record["described"] is True and len(read(run, "identities")) == 1 and run.record("caption") is None
    assert find_source(Run(tmp_path), run.stage_dir("data")).described == run.table("data", "captions")


def test_phrases_of_unchanged_captions_stay(source, tmp_path):
    run, record = degraded(source, tmp_path / "out", level=0)
    assert record["metrics"]["changed"] == 0 and read(run, "captions").equals(read(source, "captions"))


def test_the_stage_repeats_only_when_something_changed(source, tmp_path):
    def status(**options):
        return degraded(source, tmp_path / "out", **options)[1]["status"]

    found = [status(), status(), status(force=True), status(level=0.4), status(seed=1, level=0.4)]
    assert found == ["done", "up-to-date", "done", "done", "done"]


def test_a_degraded_dataset_can_be_the_source_again(source, tmp_path):
    first, _ = degraded(source, tmp_path / "one")
    second, record = degraded(first, tmp_path / "two", "typo", 0.5)
    assert read(second, "images").equals(read(first, "images")) and len(record["notes"]) >= 2


def test_mistakes_are_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(UsageError, match="is the source itself"):
        degraded(source, source.path)
    with pytest.raises(UsageError, match="No kind of degradation `blur`"):
        degraded(source, tmp_path / "out", "blur")
    with pytest.raises(UsageError, match="level 2 is not between"):
        degraded(source, tmp_path / "out", level=2)
    with pytest.raises(DataError, match="no `dev` split"):
        degraded(source, tmp_path / "out", splits=["dev"])
    with pytest.raises(DataError, match="no run with a dataset"):
        degraded(Run(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_dataset_is_not_replaced(source, tmp_path):
    other = Run(tmp_path / "other")
    write_dataset(SynthConfig(people=12, images_per_person=2, size=(32, 16)), other.stage_dir("data"), workers=1)
    other.finish("data", settings={}, inputs={}, outputs=[], started=data_degrade.datetime.now(data_degrade.UTC))
    with pytest.raises(DataError, match="holds another dataset"):
        degraded(source, other.path, force=True)


def test_images_without_captions_are_refused(source, tmp_path):
    folder = tmp_path / "bare" / "data"
    images = read(source, "images").assign(path="x.png")
    tables.write_table(folder / "images.parquet", "images", images)
    with pytest.raises(DataError, match="no full caption in the split test"):
        data_degrade.run(Run(tmp_path / "out"), source=folder, kind="drop", level=0.5)


def test_the_command_prints_a_table_or_one_json_object(source, tmp_path):
    app = typer.Typer()
    app.command(epilog=command.EPILOG)(command.command)
    args = ["--from", str(source.path), "--run", str(tmp_path / "out"), "--kind", "drop", "--level", "0.3", "--quiet"]
    out = io.StringIO()
    with redirect_stdout(out):
        get_command(app).main(args, standalone_mode=False)
        get_command(app).main([*args, "--json"], standalone_mode=False)
    *text, last = out.getvalue().splitlines()
    assert "words kept, %" in "\n".join(text) and json.loads(last)["status"] == "up-to-date"


@pytest.mark.slow
@pytest.mark.covers(22)
def test_a_trained_model_is_evaluated_on_degraded_captions_and_finds_the_texts_of_the_images(tmp_path):
    run = tmp_path / "run"
    small = ("--people", "12", "--images-per-person", "2", "--size", "64x32", "--workers", "1")
    for args in (
        ("data", "synth", *small), ("caption", "--mllm", "template"),
        ("finetune", *MODEL, "--set", "train.epochs=1"),
    ):  # fmt: skip
        result = cli(*args, "--run", run, "--json")
        assert result.code == 0, result.err
    out, _ = degraded(Run(run), tmp_path / "out", level=0.9)
    plain = evaluate.run(Run(run))
    worse = evaluate.run(Run(run), data=out.stage_dir("data"))
    assert plain["status"] == worse["status"] == "done"
    assert plain["inputs"]["captions"] != worse["inputs"]["captions"]
    asked = [[table["queries"] for table in record["tables"].values()] for record in (plain, worse)]
    assert asked[0] == asked[1] and "t2i" in worse["metrics"]
    # A method with texts on its gallery side asks for those of `caption`; they say the same of the same images.
    found = find_source(Run(run), out.stage_dir("data"))
    assert found.described == out.table("caption", "captions")
    before, after = (
        tables.read_table(path, "captions") for path in (Run(run).table("caption", "captions"), found.described)
    )
    pd.testing.assert_frame_equal(before, after)
    assert found.corpus().identity.count(None) == 0
