"""`--devices N`: the same command in N processes, which train one model together."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

_GRACE_S = 10.0
"""How long the others may take to leave by themselves when one process has failed."""
_POLL_S = 0.1
_LOST = 6
"""Exit code of a process that stopped because another had failed."""
_PARENT = "REIDCTL_PARENT"
_INTERRUPTED = 130


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `reidctl` with these arguments in `count` processes on this machine; return the exit code.

    Process 0 has the terminal; what the others say is kept, and shown if only they fail. When one fails all are
    stopped, and its exit code is returned. An interrupt reaches all of them.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reidctl-devices-")))
        logs = [stack.enter_context((folder / f"{rank}.log").open("w+b")) for rank in range(1, count)]
        port = _free_port()
        children = [_start(rank, count, port, arguments, logs) for rank in range(count)]
        stack.callback(_stop, children)
        before = signal.signal(signal.SIGTERM, lambda *_: _tell(children, signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)
        return _wait(children, logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    rank: int, count: int, port: int, arguments: Sequence[str], logs: Sequence[BinaryIO]
) -> "subprocess.Popen[bytes]":
    where = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place = {**where, _PARENT: os.getpid()}
    env = os.environ | {name: str(value) for name, value in place.items()}
    # Threads of all processes together: one per core.
    env.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    output = (None, None) if rank == 0 else (subprocess.DEVNULL, logs[rank - 1])
    return subprocess.Popen([sys.executable, "-m", "reidctl", *arguments], env=env, stdout=output[0], stderr=output[1])


def _wait(children: Sequence["subprocess.Popen[bytes]"], logs: Sequence[BinaryIO]) -> int:
    """Wait until all have finished, or one has failed."""
    order: list[int] = []
    try:
        while len(order) < len(children):
            ended = [rank for rank, child in enumerate(children) if child.poll() is not None and rank not in order]
            order += ended
            if any(children[rank].returncode for rank in ended):
                return _failure(children, logs, order)
            time.sleep(_POLL_S)
        return 0
    except KeyboardInterrupt:
        # A terminal has told the whole group; a bare signal to this process has not.
        _tell(children, signal.SIGINT)
        _leave(children)
        return _INTERRUPTED


def _failure(children: Sequence["subprocess.Popen[bytes]"], logs: Sequence[BinaryIO], order: Sequence[int]) -> int:
    """The exit code to leave with; what the process said that failed first is shown, unless it has the terminal.

    Others fail because they lost it; they say so by their exit code.
    """
    _leave(children)
    codes = [child.poll() or 0 for child in children]
    ranks = [*order, *(rank for rank in range(len(codes)) if rank not in order)]
    failed = min((rank for rank in ranks if codes[rank]), key=lambda rank: (codes[rank] == _LOST, ranks.index(rank)))
    # What all of them refuse, process 0 has said already.
    failed = 0 if codes[0] == codes[failed] else failed
    if failed:
        logs[failed - 1].seek(0)
        sys.stderr.write(logs[failed - 1].read().decode("utf-8", "replace"))
    if codes[failed] > 0:
        return codes[failed]
    sys.stderr.write(f"reidctl: process {failed} of {len(children)} was killed (signal {-codes[failed]}).\n")
    return 128 - codes[failed]


def _leave(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Give processes a while to leave by themselves."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_S)


def _tell(children: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _stop(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Stop whoever still runs."""
    _tell(children, signal.SIGKILL)
    for child in children:
        child.wait()


def without_devices(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without `--devices N`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--devices":
            skip = True
        elif not argument.startswith("--devices="):
            kept.append(argument)
    return kept
