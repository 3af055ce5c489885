"""Runs that differ in the seed alone."""

import json
import sys
from pathlib import Path

import pytest
from conftest import write_dataset

sys.path.insert(0, str(Path(__file__).parent))
from test_against import DATA, RECIPE, make_evaluated

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import against, evaluate, finetune, seeds

RANKS = {0: [1, 1, 2, 2], 1: [1, 1, 1, 2], 2: [1, 3, 3, 2]}  # rank-1: 0.5, 0.75, 0.25


@pytest.fixture
def three(tmp_path):
    return [make_evaluated(tmp_path / f"s{s}", ranks, seed=s, weights=f"w{s}") for s, ranks in RANKS.items()]


@pytest.mark.covers(30)
def test_three_seeds_give_three_rows_their_mean_and_standard_deviation(three):
    record = seeds.run(three[1], [three[2], three[0]])
    assert record["status"] == "done"
    rows = record["rows"]
    assert [(row["seed"], row["rank1"]) for row in rows[:3]] == [(0, 0.5), (1, 0.75), (2, 0.25)]
    assert [row["run"] for row in rows[3:]] == ["mean", "std"]
    assert rows[3]["rank1"] == 0.5 and rows[4]["rank1"] == 0.25
    assert record["metrics"]["t2i"]["rank1"] == 0.5
    assert {row["condition"] for row in rows} == {"standard"}  # chance is no result of the model
    stored = tables.read_table(three[1].table("seeds", "seeds"), "seeds")
    found = stored[(stored["metric"] == "rank1") & (stored["condition"] == "standard")].iloc[0]
    assert found[["runs", "mean", "std", "minimum", "maximum"]].tolist() == [3, 0.5, 0.25, 0.25, 0.75]
    assert "3 runs with the same recipe" in record["notes"][0] and "± 50 %" in record["notes"][0]
    on_disk = json.loads((three[1].stage_dir("seeds") / "stage.json").read_text())
    assert on_disk == {name: value for name, value in record.items() if name != "status"}


def test_the_order_of_the_runs_does_not_matter_and_nothing_is_done_twice(three):
    first = seeds.run(three[0], three[1:])
    again = seeds.run(three[0], three[:0:-1])
    assert again["status"] == "up-to-date" and again["rows"] == first["rows"]
    assert seeds.run(three[0], three[1:], force=True)["status"] == "done"
    make_evaluated(three[2].path, [1] * 4, seed=2, weights="w2")
    assert seeds.run(three[0], three[1:])["rows"][2]["rank1"] == 1


def test_a_single_run_has_a_mean_and_no_standard_deviation(three):
    record = seeds.run(three[0], [])
    assert [row["rank1"] for row in record["rows"]] == [0.5, 0.5, None]
    assert record["notes"][0] == "One run: no standard deviation."


def refused(first, other, *words, error=DataError):
    with pytest.raises(error) as found:
        seeds.run(first, [other])
    for word in words:
        assert word in str(found.value)
    assert not (first.stage_dir("seeds") / "stage.json").exists()


@pytest.mark.covers(30)
def test_the_same_seed_twice_is_refused_and_said_to_be_identical_or_not(three, tmp_path):
    refused(three[0], Run(three[0].path), "named twice", error=UsageError)
    twin = make_evaluated(tmp_path / "twin", RANKS[0], seed=0, weights="w0")
    refused(three[0], twin, "both trained with seed 0, to identical weights, so it is one run")
    odd = make_evaluated(tmp_path / "odd", RANKS[0], seed=0, weights="w9")
    refused(three[0], odd, "both trained with seed 0, to different weights")
    copied = make_evaluated(tmp_path / "copied", RANKS[0], seed=5, weights="w0")
    refused(three[0], copied, "hold the same weights although their seeds differ")


def test_anything_else_than_the_seed_is_refused_by_its_key(three, tmp_path):
    def made(name, recipe):
        return make_evaluated(tmp_path / name, RANKS[1], seed=1, weights=name, recipe=recipe)

    other = made("lr", {**RECIPE, "train": {"epochs": 3, "lr": 2e-4}})
    refused(three[0], other, "differ in more than the seed: `train.lr` is 0.0001 and 0.0002", "--against")
    other = made("noise", {**RECIPE, "description_noise": 0.5})
    refused(three[0], other, "`description_noise` is absent and 0.5")
    other = made("method", {**RECIPE, "method": {"name": "bdam"}})
    refused(three[0], other, "`method.name` is clip and bdam")
    data = make_evaluated(tmp_path / "data", RANKS[1], seed=1, weights="d", trained_on={**DATA, "captions": "x"})
    refused(three[0], data, "trained on different data", "captions")


def test_evaluations_that_measure_something_else_are_refused(three, tmp_path):
    val = make_evaluated(tmp_path / "val", RANKS[1], seed=1, weights="v", evaluation={"split": "val"})
    refused(three[0], val, "--split test", "--split val")
    pictures = make_evaluated(tmp_path / "pictures", RANKS[1], seed=1, weights="p", measured={**DATA, "images": "x"})
    refused(three[0], pictures, "evaluated on different data")
    longer = make_evaluated(tmp_path / "longer", [1] * 6, seed=1, weights="l")
    refused(three[0], longer, "were not measured alike", "4 and 6 queries")
    refused(three[0], Run(tmp_path / "none"), "no finished `finetune` stage")


@pytest.mark.covers(30)
@pytest.mark.parametrize(
    ("name", "here", "there", "flag"),
    [
        ("weight", 0.5, 0.9, "--weight"),
        ("seed", 0, 1, "--seed"),
        ("measure", ["t2i", "i2i"], ["t2i"], "--protocol"),
        ("rerank", [], ["rerank-20/6/0.3"], "--rerank"),
        ("cutoffs", None, [1, 3], "--ranks"),
    ],
)
def test_evaluations_that_measured_in_another_way_have_no_mean(tmp_path, name, here, there, flag):
    runs = [
        make_evaluated(tmp_path / f"r{seed}", RANKS[seed], seed=seed, weights=f"w{seed}", evaluation={name: value})
        for seed, value in enumerate((here, there))
    ]
    refused(*runs, f"differ in `{name}`: ", f"with the same {flag}.")


def test_the_order_in_which_cutoffs_and_re_rankings_were_named_is_no_difference(tmp_path):
    runs = [
        make_evaluated(tmp_path / f"r{seed}", RANKS[seed], seed=seed, weights=f"w{seed}", evaluation={"cutoffs": ks})
        for seed, ks in enumerate(([1, 5], [5, 1]))
    ]
    assert seeds.run(runs[0], runs[1:])["status"] == "done"


def test_given_embeddings_are_of_no_seed(three):
    make_evaluated(three[1].path, RANKS[1], seed=1, weights="w1", evaluation={"given": ["q.npz"], "model": None})
    refused(three[0], three[1], "evaluated on given embeddings", "without --embeddings")


def test_another_kind_of_device_is_said_and_not_refused(three, tmp_path):
    recipe = {**RECIPE, "device": "cuda", "train": {**RECIPE["train"], "keep_epochs": True}}
    gpu = make_evaluated(tmp_path / "gpu", RANKS[1], seed=1, weights="g", recipe=recipe)
    assert "different kinds of device (cpu, cuda)" in " ".join(seeds.run(three[0], [gpu])["notes"])


@pytest.mark.slow
@pytest.mark.covers(30)
def test_trained_runs_of_one_seed_are_identical_and_of_three_seeds_are_summarised(tmp_path):
    splits = {person: "val" if person in (4, 5) else "test" for person in range(4, 8)}
    data = write_dataset(tmp_path / "blocks", people=8, splits=splits)
    recipe = {
        "method": {"name": "clip"}, "backbone": {"spec": "clip:micro"},
        "train": {"epochs": 1, "batch": 4, "instances": 2, "warmup_epochs": 0, "lr": 1e-3},
    }  # fmt: skip

    def trained(name, seed):
        run = Run(tmp_path / name)
        finetune.run(run, {**recipe, "seed": seed}, data=data, device="cpu")
        evaluate.run(run, data=data, device="cpu")
        return run

    runs = [trained(f"s{seed}", seed) for seed in range(3)]
    record = seeds.run(runs[0], runs[1:])
    assert [row["seed"] for row in record["rows"][:3]] == [0, 1, 2]
    assert len({facts["model"] for facts in record["runs"]}) == 3
    twin = trained("twin", 0)
    tables_of = [tables.read_table(run.table("evaluate", "queries"), "queries") for run in (runs[0], twin)]
    assert tables_of[0].equals(tables_of[1])
    with pytest.raises(DataError, match="to identical weights, so it is one run"):
        seeds.run(runs[0], [twin])
    same = against.run(runs[0], twin, resamples=100)
    assert {(row["difference"], row["low"], row["high"], row["p_value"]) for row in same["rows"]} == {(0, 0, 0, 1)}
    assert "Both runs hold the same weights." in same["notes"]
    assert any(row["better"] or row["worse"] for row in against.run(runs[0], runs[1], resamples=100)["rows"])
