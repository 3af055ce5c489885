"""A training that is interrupted, terminated or killed through the command line, and the shipped pipelines."""

import hashlib
import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from commandline import MODEL, cli, leftovers, program
from test_cli_contract import parse

pytest_plugins = ["finished"]

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5
TRAIN = ("finetune", *MODEL, "--set", f"train.epochs={EPOCHS}")


def model(run):
    return hashlib.sha256((run / "finetune" / "model.safetensors").read_bytes()).hexdigest()


def until(run, marker, number):
    """Start the training, send a signal when stderr shows the marker, return what was said and the exit code."""
    child = program(*TRAIN, "--run", run)
    said = ""
    for line in child.stderr:
        said += line
        if re.search(marker, line):
            child.send_signal(number)
            break
    out, rest = child.communicate()
    assert not out
    return said + rest, child.returncode


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """The same training, never disturbed."""
    run = chain.copy(tmp_path_factory.mktemp("whole"), "data", "caption")
    assert cli(*TRAIN, "--run", run).code == 0
    return run


@pytest.mark.slow
@pytest.mark.covers(60)
def test_kill_9_at_several_moments_and_running_again_gives_the_same_bytes(chain, whole, tmp_path):
    run = chain.copy(tmp_path, "data", "caption")
    for moment in (r"samples of", r"epoch 1/", r"epoch 3/", rf"epoch {EPOCHS}/"):
        said, code = until(run, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        assert not (run / "finetune" / "stage.json").exists()
    # What a process leaves that was killed in the middle of writing a table.
    (run / "finetune" / ".history.parquet.0123abcd.tmp").write_bytes(b"half")
    result = cli(*TRAIN, "--run", run, "--json")
    assert result.code == 0 and result.json["resumed_from_epoch"] >= 3
    assert model(run) == model(whole)
    assert not leftovers(run), "a killed process could not clean up; the next one must"


@pytest.mark.slow
def test_ctrl_c_and_terminate_say_so_and_running_again_finishes(chain, whole, tmp_path):
    run = chain.copy(tmp_path, "data", "caption")
    for moment, number in ((r"epoch 1/", signal.SIGINT), (r"epoch 3/", signal.SIGTERM)):
        said, code = until(run, moment, number)
        assert code == 130 and "Traceback" not in said
        assert said.splitlines()[-1].startswith("reidctl: Interrupted.") and "again" in said.splitlines()[-1]
        assert not (run / "finetune" / "stage.json").exists() and not leftovers(run)
    result = cli(*TRAIN, "--run", run, "--json")
    assert result.json["resumed_from_epoch"] >= 2 and model(run) == model(whole)


def test_every_stage_of_the_chain_left_its_record_and_tables(chain):
    for stage in ("data", "caption", "finetune", "index", "evaluate", "interpret", "analyse", "report"):
        record = json.loads((chain.run / stage / "stage.json").read_text())
        assert record["stage"] == stage and record["version"] and record["fingerprint"]
        for name, facts in record["outputs"].items():
            path = chain.run / name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
    assert not leftovers(chain.run)


def test_the_report_makes_no_external_request(chain):
    page = (chain.run / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"']?(?:https?:)?//", page)
    assert not re.search(r"url\(\s*[\"']?(?!data:|#|&#39;data:|[\"']?data:)", page)
    assert "@import" not in page and "fetch(" not in page and "XMLHttpRequest" not in page


def lines_of(script):
    """The `reidctl` command lines of a pipeline, with variables filled in."""
    joined = script.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in joined.splitlines():
        if match := re.match(r"\s*\"?\$\{?REIDCTL\}?\"?\s+(.*)", line):
            yield re.sub(r"\$\{?\w+\}?", "x", match[1].partition(" #")[0])


@pytest.mark.parametrize("script", sorted((ROOT / "pipelines").glob("*.sh")), ids=lambda path: path.name)
def test_every_command_line_of_a_pipeline_parses(script):
    found = list(lines_of(script))
    assert found
    for line in found:
        words = shlex.split(line)
        parse(words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", "||", ";")), len(words))])
