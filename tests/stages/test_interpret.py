"""The interpret stage on an untrained micro model."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fakerun import finish, make_data

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.data import build_corpus
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import build_method, save_method
from reidctl.runs import Run
from reidctl.stages import interpret, report

BDAM = {"depth": 1, "heads": 2, "text_pool": "end"}


def make_trained(folder, name="bdam", described=True):
    run = Run(folder)
    make_data(run.stage_dir("data"), people=4, each=2)
    finish(run, "data")
    images = tables.read_table(run.table("data", "images"), "images")
    if described:
        rows = [
            {
                "caption_id": f"{n}-{kind}", "image_id": n, "kind": kind, "source": "template", "status": "ok",
                "conditioned_on": "image", "text": f"a {kind} text",
            }
            for n in images["image_id"] for kind in ("identity", "clothing")
        ]  # fmt: skip
        tables.write_table(run.table("caption", "captions"), "captions", pd.DataFrame(rows))
        finish(run, "caption")
    torch.manual_seed(0)
    method = build_method(name, BDAM if name == "bdam" else {}, build("clip:micro"), 4)
    save_method(method, run.stage_dir("finetune"))
    finish(run, "finetune", method=name, data=str(run.stage_dir("data").resolve()), described=None)
    return run, method.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run, method = make_trained(tmp_path_factory.mktemp("i") / "r")
    return run, method, interpret.run(run, samples=5, pictures=3, device="cpu")


@pytest.mark.covers(180)
def test_explanations_and_overlays_are_written(made):
    run, _, record = made
    table = tables.read_table(run.table("interpret", "explanations"), "explanations")
    assert len(table) == record["explained"] == 10  # two phrases per caption
    assert set(table["phrase"].str.split().str[1]) == {"shirt", "trousers"}
    assert len(list((run.stage_dir("interpret") / "pictures").glob("*.png"))) == 3


@pytest.mark.covers(188)
def test_grounding_is_scored_against_the_true_parts_with_controls(made):
    run, _, record = made
    scores = pd.read_csv(run.stage_dir("interpret") / "grounding.csv")
    assert len(scores) == record["grounded"] == 10
    np.testing.assert_allclose(scores["pointing.random"], scores["area"])
    assert scores["iou.pooled"].mean() > 2 * scores["iou.random"].mean()
    for name in ("pointing", "mass", "iou", "pointing-centre", "mass-random"):
        entry = record["metrics"][name]
        assert entry["low"] <= entry["value"] <= entry["high"]


@pytest.mark.covers(158)
def test_gate_means_of_complements_sum_to_one_and_every_sample_is_kept(made):
    run, _, _ = made
    gates = json.loads((run.stage_dir("interpret") / "gates.json").read_text())
    means = {name: entry["mean"] for name, entry in gates["summary"].items()}
    assert list(means) == ["identity", "clothing", "image", "text"]
    assert means["identity"] + means["clothing"] == pytest.approx(1, abs=1e-5)
    assert means["image"] + means["text"] == pytest.approx(1, abs=1e-5)
    assert len(gates["samples"]) == 8
    saved = pd.read_csv(run.stage_dir("interpret") / "gates.csv")
    assert saved["image"].mean() == pytest.approx(means["image"], abs=1e-6)
    for ending in ("png", "svg"):
        assert (run.stage_dir("interpret") / f"gates.{ending}").is_file()


def test_gates_come_from_the_images_whatever_the_batch(made):
    run, method, _ = made
    folder = run.stage_dir("data")
    images, captions = (tables.read_table(folder / f"{n}.parquet", n) for n in ("images", "captions"))
    described = tables.read_table(run.table("caption", "captions"), "captions")
    corpus = build_corpus(images, captions, described, folder)
    names, one = interpret.collect_gates(method, corpus, device=torch.device("cpu"), batch=3)
    _, other = interpret.collect_gates(method, corpus, device=torch.device("cpu"), batch=8)
    assert names == list(images["image_id"])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_the_stage_is_up_to_date_until_a_setting_changes(made):
    run = made[0]
    assert interpret.run(run, samples=5, pictures=3, device="cpu")["status"] == "up-to-date"


def test_a_method_without_gates_leaves_no_gate_files(tmp_path):
    run, _ = make_trained(tmp_path / "r", name="clip", described=False)
    (run.stage_dir("interpret")).mkdir()
    (run.stage_dir("interpret") / "gates.json").write_text("{}")  # left by an earlier model
    record = interpret.run(run, samples=2, pictures=1, device="cpu", explainer="patch")
    assert record["gates"] == {}
    assert not (run.stage_dir("interpret") / "gates.json").exists()


def test_a_user_phrase_without_masks_is_explained_but_not_scored(tmp_path):
    run, _ = make_trained(tmp_path / "r", name="clip", described=False)
    record = interpret.run(run, samples=3, pictures=0, device="cpu", phrase="long purple hair")
    assert record["explained"] == 3 and record["grounded"] == 0 and record["metrics"] == {}
    assert report.run(run)["status"] == "done"
    assert "long purple hair" in (run.stage_dir("report") / "report.html").read_text()


@pytest.mark.parametrize(("flags", "message"), [({"explainer": "magic"}, "gradcam"), ({"phrase": " "}, "empty")])
def test_wrong_flags_are_usage_errors(made, flags, message):
    with pytest.raises(UsageError, match=message):
        interpret.run(made[0], device="cpu", **flags)


def test_no_model_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="finetune"):
        interpret.run(Run(tmp_path), device="cpu")
