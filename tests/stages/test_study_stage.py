"""A whole small study through the stage: what it leaves, what it repeats, and what happens when something fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from reidctl import tables
from reidctl.errors import DataError
from reidctl.runs import Run
from reidctl.stages import study
from reidctl.stages.study_unit import flatten

SMALL = """
about: A <script> study of nothing
method: bdam
seeds: [0, 1]
start:
  seed: 7
  synth: {people: 12, first: 500, images_per_person: 2, train_fraction: 0.5, val_fraction: 0.25, size: [64, 32]}
  method: {name: clip}
  backbone: {spec: "vit-bert:micro"}
  train: {epochs: 1, batch: 8, instances: 2, warmup_epochs: 0, device: cpu}
recipe:
  synth: {people: 16, images_per_person: 3, train_fraction: 0.5, val_fraction: 0.25, size: [64, 32]}
  caption: {mllm: template}
  method: {depth: 1, heads: 2, mlp_ratio: 1.0, fusion: {sequence: vector, width: 16, out_dim: 16}}
  backbone: {spec: "vit-bert:micro", image_size: null}
  train: {epochs: 1, batch: 8, instances: 2, warmup_epochs: 0, device: cpu}
conditions:
  plain: {label: "no | gate", row: "w/o Gate", set: {method: {gate: false}}}
  full: {label: "<b>all</b>", row: "+ BDAM"}
measure:
  settings: [identity-only, clothes-conflict]
  elsewhere: {other: {domain: b}}
table:
  - {measure: t2i.mAP, title: mAP}
  - {measure: clothes-conflict.t2i.mAP.drop, title: drop}
  - {measure: other.t2i.mAP, title: elsewhere}
  - {measure: train.parameters, unit: number, scale: 1.0e-3, title: thousand parameters}
published: {bdam-icme: II}
claims:
  - {say: "The gate | helps <i>", measure: t2i.mAP, more: full, than: plain}
  - {say: never measured, measure: nothing.at.all, more: full, than: plain}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def finished(home):
    path = home / "small.yaml"
    path.write_text(SMALL)
    return path, study.run(Run(home / "runs"), [path], jobs=2)[0]


@pytest.mark.slow
@pytest.mark.covers(30, 230)
def test_a_study_leaves_values_claims_a_page_and_a_figure(home, finished):
    record = finished[1]
    assert record["status"] == "done" and record["metrics"]["undecided"] == 2
    frame = tables.read_table(home / "runs" / "small" / "study.parquet", "study")
    measured = frame.groupby(["condition", "seed"], observed=True)["measure"].agg(set)
    assert len(measured) == 4
    wanted = {"t2i.mAP", "identity-only.t2i.rank1", "clothes-conflict.t2i.mAP.drop", "other.t2i.mAP", "chance.t2i.mAP"}
    assert all(wanted <= names and "weight.info" in names for names in measured)
    claims = tables.read_table(home / "runs" / "small" / "claims.parquet", "claims")
    assert list(claims["verdict"]) == ["undecided", "undecided"]
    assert claims["reason"][1] == "nothing.at.all of full was not measured"
    for ending in ("png", "svg", "csv"):
        assert (home / "runs" / "small" / f"figure.{ending}").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.covers(30, 230)
def test_the_page_puts_ours_beside_the_printed_numbers_under_the_banner_and_escapes_names(home, finished):
    page = (home / "runs" / "small" / "study.md").read_text()
    frame = tables.read_table(home / "runs" / "small" / "study.parquet", "study")
    own = frame[(frame["condition"] == "full") & (frame["measure"] == "t2i.mAP")]["value"]
    row = next(line for line in page.splitlines() if "all" in line and "±" in line)
    assert f"{100 * own.mean():.1f} ± {100 * own.std(ddof=1):.1f}" in row and "66.74" in row
    assert "NOT COMPARABLE" in page and "<b>" not in page and "<script>" not in page and r"no \| gate" in page


@pytest.mark.slow
def test_the_metrics_are_those_of_the_run_itself(home, finished):
    """The table is read from the units' own evaluations, not computed apart from them."""
    frame = tables.read_table(home / "runs" / "small" / "study.parquet", "study")
    for (name, seed), unit in study._plans(home / "runs", [finished[0]], None)[0].units.items():
        record = unit.run.require("evaluate")
        mine = frame[(frame["condition"] == name) & (frame["seed"] == seed)].set_index("measure")["value"]
        assert mine["t2i.mAP"] == record["metrics"]["t2i"]["mAP"]
        assert record["settings"]["split"] == "test"
        assert unit.run.require("finetune")["selected_on"] == "val"
        assert unit.run.require("finetune")["settings"]["seed"] == seed


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_says_up_to_date(home, finished):
    def trained():
        return {p: p.stat().st_mtime_ns for p in (home / "runs" / "units").glob("*/finetune/model.safetensors")}

    before = trained()
    assert study.run(Run(home / "runs"), [finished[0]], jobs=2)[0]["status"] == "up-to-date"
    assert trained() == before and len(before) == 5  # four and the one they start from


@pytest.mark.slow
def test_a_training_that_fails_is_named_and_the_others_are_kept(home, finished):
    broken = SMALL.replace("plain: {label", "wild: {set: {train: {lr: 1.0e+30, lr_new: 1.0e+30}}}\n  plain: {label")
    broken = broken.replace("seeds: [0, 1]", "seeds: [0]")
    path = home / "broken.yaml"
    path.write_text(broken)
    kept = set((home / "runs" / "units").glob("*/finetune/stage.json"))
    with pytest.raises(DataError, match=r"1 of 3 trainings failed.*not finite"):
        study.run(Run(home / "runs"), [path], jobs=1)
    assert kept == set((home / "runs" / "units").glob("*/finetune/stage.json"))
    assert not (home / "runs" / "broken").exists()


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was_and_ends_with_the_same_values(tmp_path, home, finished):
    """kill -9 of the study's process ends its workers too; finished trainings are not repeated.

    What it leaves, one training at a time, is what two at a time left without a kill.
    """
    path = tmp_path / "killed.yaml"
    path.write_text(SMALL.replace("start:", "notes: []\nstart:"))
    command = [sys.executable, "-m", "reidctl", "study", str(path), "--run", str(tmp_path / "runs"), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    units = tmp_path / "runs" / "units"
    deadline = time.monotonic() + 180
    while len(list(units.glob("*/values/evaluate-*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in units.glob("*/finetune/stage.json")}
    assert 1 < len(done) < 5
    time.sleep(3)
    alive = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True)  # its session, workers included
    assert not alive.stdout.strip(), "a worker outlived the study"
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "done"
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert measured(tmp_path / "runs" / "killed") == measured(home / "runs" / "small")


def measured(folder):
    rows = tables.read_table(folder / "study.parquet", "study").to_dict("records")
    return {
        (row["condition"], row["seed"], row["measure"]): row["value"]
        for row in rows
        if row["measure"] not in ("train.images_per_second", "train.seconds")
    }


def test_nested_metrics_become_dotted_names():
    found = flatten({"a": {"b": {"value": 0.5, "low": 0.1, "note": "x"}, "c": 2}, "d": True})
    assert found == {"a.b": 0.5, "a.b.low": 0.1, "a.c": 2.0}


def _die(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_from_outside_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(study, "work", _die)
    with pytest.raises(DataError, match="killed from outside, perhaps because memory ran out"):
        list(study._parallel([study.Job(None)], 1))
