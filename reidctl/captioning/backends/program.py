"""One life of a program that answers lines with lines."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO, NamedTuple

from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.server import redact
from reidctl.console import log
from reidctl.errors import RemoteError

MAX_LINE = 1 << 20
_CHUNK = 1 << 16
_BACKLOG = 32
_SHORTEST_SECRET = 6
# A process beside the program: its input ends when we end, however that happens, and then it kills the group.
_GUARD = """
import os, signal, sys
if not os.read(0, 1):
    try:
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    except OSError:
        pass
"""
_WARNINGS = 5
_LOOK_S = 0.2
# What an ended program left in the pipe is read for so long; a child of it may keep the pipe open for ever.
_DRAIN_S = 0.5
_GENTLE_S, _FIRM_S = 5.0, 1.0


class Line(NamedTuple):
    """What came from the program.

    Attributes:
        at: when it was read (monotonic seconds): the caller may have been busy since.
        data: None at the end of its output, or if nothing came in time.
    """

    at: float
    data: bytes | None


class Program:
    """One life of the program: a thread writes to it, another reads, so that neither pipe can block the other.

    Attributes:
        problem: how it was lost; empty while it lives.
        answers, answered_at: how many answers it gave, and when the last one came (monotonic seconds).
        finished: everything is answered.

    Args:
        argv: what to start.
        key_env: the environment variable that holds the API key.

    Raises:
        RemoteError: it cannot be started.
    """

    def __init__(self, argv: list[str], key_env: str) -> None:
        names = {key_env, "OPENAI_API_KEY", "AZURE_OPENAI_API_KEY"}
        values = (os.environ.get(name, "").strip() for name in names)
        self._secrets = [value for value in values if len(value) >= _SHORTEST_SECRET]
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RemoteError(f"Cannot start the describer `{argv[0]}`: {reason}.") from None
        self._guard = _guard(self._process.pid)
        self.problem = ""
        self.finished = False
        self.answers = 0
        self.answered_at = -1.0
        self._warned = self._sent = 0
        self._ended_at: float | None = None
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lines: queue.Queue[Line] = queue.Queue(_BACKLOG)
        self._stopped = threading.Event()
        threading.Thread(target=_write, args=(self._process.stdin, self._out), daemon=True).start()
        self._reader = threading.Thread(
            target=_read, args=(self._process.stdout, self._lines, self._stopped), daemon=True
        )
        self._reader.start()

    def send(self, request: Request) -> int:
        """Hand a request to the writing thread and return its number."""
        number = self._sent
        self._sent += 1
        fields = {
            "id": number,
            "image_id": request.image_id,
            "image_path": request.image_path,
            "kind": request.kind,
            "system": request.system,
            "prompt": request.prompt,
            "instruction": request.instruction,
            "style_id": request.style_id,
            "attributes": dict(request.attributes),
            "attempt": request.attempt,
        }
        self._out.put(json.dumps(fields).encode("ascii") + b"\n")
        return number

    def receive(self, deadline: float) -> Line:
        """Return the next line; without data at the deadline, or with `problem` set when the program is lost."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(_LOOK_S, deadline - time.monotonic())))
            except queue.Empty:
                now = time.monotonic()
                if self._is_gone(now):
                    self.problem = self._ending()
                if self.problem or now >= deadline:
                    return Line(now, None)
                continue
            if line.data is None:
                self.problem = self._ending()
            return line

    def answered(self, at: float) -> None:
        """Count an answer."""
        self.answers += 1
        self.answered_at = max(self.answered_at, at)

    def redact(self, text: str) -> str:
        """Return what the program says without keys."""
        return redact(text, *self._secrets)

    def tells_a_secret(self, text: str) -> bool:
        """Return whether a text holds an API key."""
        return any(secret in text for secret in self._secrets)

    def warn(self, what: str) -> None:
        """Log what a line is, a few times: a program may write millions of them."""
        self._warned += 1
        if self._warned <= _WARNINGS:
            log.warning("describer: %s%s", what, "; more are not reported" if self._warned == _WARNINGS else "")

    def stop(self, *, gentle: bool) -> None:
        """End the program and its children; a gentle end lets it finish by itself first."""
        self._stopped.set()
        self._out.put(None)
        try:
            if gentle:
                self._wait(_GENTLE_S)
            if self._process.poll() is None:
                self._signal(signal.SIGTERM)
                self._wait(_FIRM_S)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            if self._guard is not None:
                _dismiss(self._guard)
        self._reader.join(_DRAIN_S)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _is_gone(self, now: float) -> bool:
        if self._process.poll() is None:
            return False
        if self._ended_at is None:
            self._ended_at = now
        return now - self._ended_at > _DRAIN_S

    def _ending(self) -> str:
        self._wait(_DRAIN_S)
        code = self._process.poll()
        if code is None:
            return "closed its output"
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _signal(self, number: int) -> None:
        # The group bears the number of the program that we started; it may be empty by now.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _guard(group: int) -> "subprocess.Popen[bytes] | None":
    """Start what kills the group when we end; None where there is no Python to start."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for us: we end the program ourselves
        )
    except (OSError, ValueError):
        return None


def _dismiss(guard: "subprocess.Popen[bytes]") -> None:
    """End the guard without a kill: from now on the number of the group may be somebody else's."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        guard.communicate(b".", timeout=_FIRM_S)
    guard.kill()
    guard.wait()


def _write(stream: BinaryIO, out: "queue.SimpleQueue[bytes | None]") -> None:
    """Write what is handed over, in a thread of its own: a program that does not read blocks only this one."""
    with contextlib.suppress(OSError, ValueError):  # the reading thread notices that the program ended
        while (data := out.get()) is not None:
            while data:
                data = data[stream.write(data) :]
    with contextlib.suppress(OSError):
        stream.close()


def _read(stream: BinaryIO, lines: "queue.Queue[Line]", stopped: threading.Event) -> None:
    """Put lines into the queue as they come, then one without data; of a huge line a little more than `MAX_LINE`."""
    line = bytearray()
    with contextlib.suppress(OSError, ValueError):  # the same as an end of the output
        while chunk := stream.read(_CHUNK):
            *ended, rest = chunk.split(b"\n")
            for part in ended:
                _put(lines, stopped, bytes(_longer(line, part)))
                line.clear()
            _longer(line, rest)
    if line:
        _put(lines, stopped, bytes(line))
    _put(lines, stopped, None)


def _longer(line: bytearray, part: bytes) -> bytearray:
    if len(line) <= MAX_LINE:
        line += part
    return line


def _put(lines: "queue.Queue[Line]", stopped: threading.Event, data: bytes | None) -> None:
    """Wait for room in the queue; after the end of the exchange lines are dropped, so that the program can end."""
    if data is not None and not data.strip():
        return
    item = Line(time.monotonic(), data)
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            lines.put(item, timeout=_LOOK_S)
            return
