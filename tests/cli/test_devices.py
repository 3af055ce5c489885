"""`--devices`, torchrun and Slurm from the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import write_dataset

from reidctl.cli import devices, options
from reidctl.errors import UsageError

SMALL = ["--method", "clip-tiny", "--device", "cpu", "--set", "backbone.spec=clip:micro", "--set", "train.epochs=1",
         "--set", "train.batch=8", "--set", "train.instances=2"]  # fmt: skip
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = {**dict.fromkeys(range(8), "train"), **dict.fromkeys(range(8, 12), "val")}
    return write_dataset(tmp_path_factory.mktemp("cli-devices") / "blocks", people=12, splits=splits)


def environment(**more):
    env = {name: value for name, value in os.environ.items() if name not in PLACES}
    return env | {"OMP_NUM_THREADS": "1"} | more


def reidctl(*arguments, launcher=("-m", "reidctl"), **more):
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=300)


@pytest.mark.slow
def test_two_devices_train_one_model_and_speak_once(data, tmp_path):
    done = reidctl("finetune", "--run", tmp_path, "--data", data, *SMALL, "--devices", 2, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "done" and record["devices"] == 2
    assert done.stderr.count("samples of 8 people") == 1
    again = reidctl("finetune", "--run", tmp_path, "--data", data, *SMALL, "--devices=2", "--json")
    assert json.loads(again.stdout)["status"] == "up-to-date"


@pytest.mark.slow
def test_under_torchrun_it_joins(data, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "reidctl")
    done = reidctl("finetune", "--run", tmp_path, "--data", data, *SMALL, "--json", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2


@pytest.mark.slow
def test_under_slurm_it_joins(data, tmp_path):
    common = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(os.getpid() % 10_000),
              "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-m", "reidctl", "finetune", "--run", tmp_path, "--data", data, *SMALL, "--json"]
    tasks = [
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert json.loads(said[0][0])["devices"] == 2 and said[1][0] == ""


@pytest.mark.slow
def test_a_mistake_is_said_once_with_its_exit_code(data, tmp_path):
    done = reidctl("finetune", "--run", tmp_path, "--data", data, *SMALL, "--set", "train.lr=-1", "--devices", 2)
    assert done.returncode == 2 and done.stderr.count("reidctl: ") == 1 and "lr" in done.stderr
    assert not (tmp_path / "finetune").exists()


@pytest.mark.slow
def test_an_interrupt_stops_all_processes_and_the_same_command_goes_on(data, tmp_path):
    arguments = ["finetune", "--run", tmp_path, "--data", data, *SMALL, "--set", "train.epochs=60", "--devices", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "reidctl", *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    state = tmp_path / "finetune" / "last" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130, child.stderr.read()
    assert len(children) == 2 and not any(os.path.exists(f"/proc/{number}") for number in children)
    assert not (tmp_path / "finetune" / "stage.json").exists()
    done = reidctl(*arguments, "--set", "train.epochs=60", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_from_epoch"] >= 1


def test_a_process_that_fails_alone_is_heard_and_its_code_returned(tmp_path, capfd, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    sys.stderr.write('reidctl: rank 1 cannot read.\\n'); sys.exit(3)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(devices, "_GRACE_S", 0.3)
    plain = subprocess.Popen
    monkeypatch.setattr(devices.subprocess, "Popen", lambda command, **more: plain([sys.executable, script], **more))
    started = time.monotonic()
    assert devices.launch(2, ["finetune"]) == 3 and time.monotonic() - started < 20
    assert "reidctl: rank 1 cannot read." in capfd.readouterr().err


def test_a_process_that_is_killed_is_named(tmp_path, capfd, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(
        "import os, signal, time\nos.environ['RANK'] == '0' and os.kill(os.getpid(), 9)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(devices, "_GRACE_S", 0.3)
    plain = subprocess.Popen
    monkeypatch.setattr(devices.subprocess, "Popen", lambda command, **more: plain([sys.executable, script], **more))
    assert devices.launch(2, ["finetune"]) == 137
    assert "process 0 of 2 was killed (signal 9)" in capfd.readouterr().err


FAILING = """
import os, sys
from reidctl.training import feed
plain = feed.Feed._batch
def broken(self, keys):
    if os.environ.get("RANK") == "1":
        {what}
    return plain(self, keys)
feed.Feed._batch = broken
from reidctl.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (
            "from reidctl.errors import DataError; raise DataError('Image x cannot be read.')",
            3,
            "Image x cannot be read.",
        ),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 of 2 was killed (signal 9)"),
    ],
)
def test_what_stops_another_process_than_the_first_is_told(data, tmp_path, monkeypatch, capfd, what, code, said):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("{what}", what))
    plain = subprocess.Popen

    def start(command, **more):
        return plain([sys.executable, script, *command[3:]], **more)

    monkeypatch.setattr(devices.subprocess, "Popen", start)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["finetune", "--run", tmp_path / "run", "--data", data, *SMALL]
    assert devices.launch(2, list(map(str, arguments))) == code
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err and "Another process of this training has failed." in err
    assert not (tmp_path / "run" / "finetune" / "stage.json").exists()


@pytest.mark.slow
def test_processes_die_with_the_one_that_started_them(data, tmp_path):
    arguments = ["finetune", "--run", tmp_path, "--data", data, *SMALL, "--set", "train.epochs=400", "--devices", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "reidctl", *map(str, arguments)], stderr=subprocess.DEVNULL, env=environment()
    )
    state = tmp_path / "finetune" / "last" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    child.kill()
    child.wait()
    assert len(children) == 2
    while any(os.path.exists(f"/proc/{number}") for number in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{number}") for number in children)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["finetune", "--devices", "2", "--run", "x"], ["finetune", "--run", "x"]),
        (["finetune", "--devices=2", "--quiet"], ["finetune", "--quiet"]),
        (["finetune", "--device", "cpu"], ["finetune", "--device", "cpu"]),
    ],
)
def test_children_get_the_command_without_devices(given, kept):
    assert devices.without_devices(given) == kept


def test_devices_must_agree_with_the_launcher_and_the_machine(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--devices 2 was asked for, but a launcher started 4 processes"):
        options.spread(2, "cpu")
    assert options.spread(4, "cpu") is None
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert options.spread(None, "cpu") is None and options.spread(1, "cpu") is None


@pytest.mark.slow
def test_evaluation_is_shared_and_finds_the_same(tmp_path):
    splits = {**dict.fromkeys(range(6), "train"), 6: "val", 7: "val", **dict.fromkeys(range(8, 12), "test")}
    data = write_dataset(tmp_path / "blocks", people=12, splits=splits)
    assert reidctl("finetune", "--run", tmp_path / "run", "--data", data, *SMALL).returncode == 0
    records = []
    for more in ([], ["--devices", "2"]):
        done = reidctl("evaluate", "--run", tmp_path / "run", "--device", "cpu", "--force", "--json", *more)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
    assert records[0]["metrics"] == records[1]["metrics"] and records[0]["outputs"] == records[1]["outputs"]
    refused = reidctl("evaluate", "--run", tmp_path / "run", "--devices", 2, "--embeddings", "x.parquet")
    assert refused.returncode == 2 and "--devices" in refused.stderr
