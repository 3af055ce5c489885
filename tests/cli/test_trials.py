"""`finetune --dry-run`, `--find-lr`, `--overfit` and `--resume` from the command line."""

import json

import pytest
from commandline import cli, refused
from conftest import write_dataset
from PIL import Image

SMALL = ("--method", "clip-tiny", "--device", "cpu", "--set", "backbone.spec=clip:micro", "--set", "train.batch=8",
         "--set", "train.instances=2", "--set", "train.epochs=1")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = {**dict.fromkeys(range(8), "train"), **dict.fromkeys(range(8, 12), "val")}
    return write_dataset(tmp_path_factory.mktemp("trials") / "blocks", people=12, splits=splits)


def words(run, data, *more):
    return ("finetune", "--run", run, "--data", data, *SMALL, *more)


def finetune(run, data, *more):
    return cli(*words(run, data, *more))


def test_a_dry_run_prints_costs_draws_the_batch_and_trains_nothing(data, tmp_path):
    run = tmp_path / "run"
    done = finetune(run, data, "--dry-run", "--devices", 2)
    assert done.code == 0, done.err
    for part in ("trainable", "memory of each device", "operations", "images/s", "Nothing was trained", "dry run"):
        assert part in done.out, part
    assert [path.name for path in run.iterdir()] == ["dry-run.png"]
    with Image.open(run / "dry-run.png") as picture:
        assert picture.width > 100
    elsewhere = tmp_path / "first.png"
    record = json.loads(finetune(run, data, "--dry-run", "--sheet", elsewhere, "--json").out)
    assert record["status"] == "dry-run" and record["stage"] == "finetune" and elsewhere.exists()
    assert record["parameters"]["trainable"] > 0 and record["batch"]["samples"] == 8


def test_a_search_for_a_rate_suggests_one_draws_it_and_trains_nothing(data, tmp_path):
    done = finetune(tmp_path, data, "--find-lr", "--steps", 30, "--json")
    record = json.loads(done.out)
    assert record["status"] == "trial" and len(record["points"]) > 5 and record["now"] == 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetune-lr.png"]
    assert "train.lr" in finetune(tmp_path, data, "--find-lr", "--steps", 10).out


def test_one_batch_is_learnt_or_the_exit_code_is_5(data, tmp_path):
    done = finetune(tmp_path, data, "--overfit", "--steps", 60)
    assert done.code == 0 and "-> 100.0" in done.out and not list(tmp_path.iterdir())
    never = finetune(tmp_path, data, "--overfit", "--steps", 10, "--set", "train.lr=0", "--set", "train.lr_new=0")
    assert never.code == 5 and "not learnt by heart in 10 steps" in never.err and "itc" in never.out


def test_resuming_without_a_stopped_training_is_refused(data, tmp_path):
    refused(3, "no stopped training to resume", args=words(tmp_path, data, "--resume"))
    assert not (tmp_path / "finetune").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dry-run", "--overfit"), "two different trials"),
        (("--find-lr", "--steps", "3"), "--steps"),
        (("--find-lr", "--devices", "2"), "`--devices` has no use beside --find-lr"),
        (("--overfit", "--resume"), "`--resume` has no use beside --overfit"),
        (("--dry-run", "--force"), "`--force` has no use beside --dry-run"),
        (("--sheet", "x.png"), "`--sheet` has no use without --dry-run"),
        (("--set", "train.betas=[1.5,0.9]"), "betas"),
        (("--set", "train.eps=0"), "eps"),
        (("--set", "train.weight_decay=-1"), "weight_decay"),
        (("--set", "train.lr_new=-1"), "lr_new"),
        (("--set", "train.clip_grad_norm=0"), "clip_grad_norm"),
        (("--set", "train.warmup_factor=-5"), "warmup_factor"),
        (("--set", "train.gamma=-1"), "gamma"),
        (("--devices", "0"), "--devices"),
        (("--find-lr", "--set", "train.lr=0"), "train.lr above 0"),
        (("--set", "train.ema=1.0"), "ema"),
        (("--set", "train.accumulate=0"), "accumulate"),
        (("--set", "train.groups=[{match: 'nothing', factor: 2.0}]"), "nothing"),
    ],
)
def test_bad_trials_are_refused_in_one_sentence(data, tmp_path, more, said):
    refused(2, said, args=words(tmp_path, data, *more))
    assert not (tmp_path / "finetune").exists()


def test_a_wrong_setting_leaves_a_finished_result_alone(data, tmp_path):
    assert finetune(tmp_path, data).code == 0
    record = (tmp_path / "finetune" / "stage.json").read_bytes()
    rules = "train.groups=[{match: 'nothing', factor: 2.0}]"
    for more in (("--set", "train.betas=[1.5,0.9]"), ("--set", rules), ("--set", "train.eps=-1")):
        refused(2, args=words(tmp_path, data, *more))
        assert (tmp_path / "finetune" / "stage.json").read_bytes() == record


def test_two_trainings_in_one_folder_are_refused(data, tmp_path):
    from reidctl.runs import Run

    with Run(tmp_path).locked("finetune"):
        refused(3, "Another process is training in", args=words(tmp_path, data))
    assert finetune(tmp_path, data).code == 0


def test_a_run_that_cannot_be_written_is_found_out_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    for more in ((), ("--dry-run",), ("--find-lr",)):
        refused(3, "cannot be a run", args=words(tmp_path / "file" / "run", data, *more))
