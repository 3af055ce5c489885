import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reidctl import tables
from reidctl.errors import DataError
from reidctl.runs import Run, digest


def finished(run, settings=None, inputs=None):
    path = run.stage_dir("data") / "note.txt"
    tables.write_text(path, "hello")
    return run.finish(
        "data", settings=settings or {"a": 1}, inputs=inputs or {}, outputs=[path], started=datetime.now(UTC)
    )


@pytest.mark.covers(227)
def test_a_record_holds_settings_digests_versions_and_times(tmp_path):
    record = finished(Run(tmp_path), {"seed": 3}, {"images": "abc"})
    on_disk = json.loads((tmp_path / "data" / "stage.json").read_text())
    assert on_disk == json.loads(json.dumps(record))
    assert record["settings"] == {"seed": 3} and record["inputs"] == {"images": "abc"}
    assert record["outputs"]["data/note.txt"]["sha256"] == digest(tmp_path / "data" / "note.txt")
    assert record["libraries"]["torch"] and record["started"] <= record["finished"]


def test_same_settings_inputs_and_outputs_mean_up_to_date(tmp_path):
    run = Run(tmp_path)
    finished(run, {"a": 1}, {"x": "1"})
    assert run.up_to_date("data", {"a": 1}, {"x": "1"})
    assert run.up_to_date("data", {"a": 2}, {"x": "1"}) is None
    assert run.up_to_date("data", {"a": 1}, {"x": "2"}) is None
    (tmp_path / "data" / "note.txt").unlink()
    assert run.up_to_date("data", {"a": 1}, {"x": "1"}) is None


def test_a_stage_that_started_over_does_not_look_finished(tmp_path):
    run = Run(tmp_path)
    finished(run)
    run.unfinish("data")
    assert run.record("data") is None
    with pytest.raises(DataError, match="reidctl data"):
        run.require("data")


def test_a_run_of_another_version_is_refused_with_the_next_step(tmp_path):
    run = Run(tmp_path)
    finished(run)
    path = tmp_path / "data" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match=r"another version \(run format 99.*--run"):
        run.record("data")
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        run.record("data")


def test_the_digest_of_a_folder_knows_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert digest(tmp_path / "a") != first


def test_a_place_that_takes_no_files_is_refused_before_any_work(tmp_path):
    Run(tmp_path / "new" / "run").check_writable()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="is a file"):
            Run(place).check_writable()
    with pytest.raises(DataError, match="cannot be written"):
        Run(Path("/proc/nope")).check_writable()
