"""How the tests of this folder drive `reidctl`."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest

DATA = ("--people", "12", "--images-per-person", "3", "--size", "64x32", "--workers", "1")
MODEL = (
    "--method", "bdam-tiny", "--set", "backbone.spec=vit-bert:micro", "--set", "train.batch=8", "--set",
    "train.instances=2", "--set", "method.fusion.width=16", "--set", "method.heads=2",
)  # fmt: skip
ONE_EPOCH = (*MODEL, "--set", "train.epochs=1")
STAGES = {
    "data": ("data", "synth", *DATA),
    "caption": ("caption", "--mllm", "template"),
    "finetune": ("finetune", *ONE_EPOCH),
    "index": ("index",),
    "evaluate": ("evaluate",),
    "interpret": ("interpret", "--samples", "2"),
    "analyse": ("analyse",),
    "report": ("report",),
}


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one JSON value on stdout; NaN is not JSON."""

        def refuse(name):
            raise ValueError(f"{name} is not JSON")

        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out, parse_constant=refuse)

    def complaint(self):
        """The one line for the user; anything that looks like a bug fails."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("reidctl:")]
        assert len(lines) == 1 and self.err.splitlines()[-1] == lines[0], self.err
        return lines[0]


def cli(*args, env=None, cwd=None):
    """Run the command line in this process: no second for every import of torch. A bug raises here."""
    from reidctl.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    home = Path.cwd()
    clean = {name: value for name, value in os.environ.items() if name != "REIDCTL_RUN"} | (env or {})
    try:
        if cwd is not None:
            os.chdir(cwd)
        argv = ["reidctl", *map(str, args)]
        with (
            patch.dict(os.environ, clean, clear=True),
            patch.object(sys, "argv", argv),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            main()
    finally:
        os.chdir(home)
        signal.signal(signal.SIGTERM, handler)
    return Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def refused(code, *pieces, args, **options):
    """Run a command that must fail with `code` and one sentence that holds all `pieces`."""
    result = cli(*args, **options)
    assert result.code == code, (result.code, result.out, result.err)
    sentence = result.complaint()
    for piece in pieces:
        assert piece in sentence, sentence
    assert not result.out
    return result


def program(*args, **options):
    """Start the command line as a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "REIDCTL_RUN"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "reidctl", *map(str, args)], env=env, **(piped | options))


def leftovers(folder):
    """Temporary files below a folder: what a stopped stage must not leave."""
    return [path.name for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]


@dataclass
class Chain:
    """A run in which every stage has finished, and what each printed with --json."""

    run: Path
    results: dict[str, Result] = field(default_factory=dict)

    def copy(self, folder, *stages):
        """A copy of the run with these stages (default: all) that a test may change."""
        target = Path(folder) / "run"
        for stage in stages or [path.name for path in self.run.iterdir()]:
            shutil.copytree(self.run / stage, target / stage)
        return target
