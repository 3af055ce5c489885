"""A describer that is any program: one JSON object per line in, one per line out."""

import contextlib
import hashlib
import itertools
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.config import RemoteConfig
from reidctl.console import log
from reidctl.errors import RemoteError, UsageError

MAX_LINE = 1 << 20
_CHUNK = 1 << 16
_BACKLOG = 32
_MOST_TOKENS = 10**9
_WARNINGS = 5
_LOOK_S = 0.2
# What an ended program left in the pipe is read for so long; a child of it may keep the pipe open for ever.
_DRAIN_S = 0.5
_GENTLE_S, _FIRM_S = 5.0, 1.0


class _Line(NamedTuple):
    """What came from the program.

    Attributes:
        at: when it was read (monotonic seconds): the caller may have been busy since.
        data: None at the end of its output, or if nothing came in time.
    """

    at: float
    data: bytes | None


@dataclass
class _Item:
    """A request that the program has, or had when it ended.

    Attributes:
        lives: programs that ended while they had it.
        sent: when (monotonic seconds).
    """

    request: Request
    lives: int = 0
    sent: float = 0.0


class CommandDescriber:
    """Asks a program that runs for the whole time and answers in any order.

    In:  `{"id", "image_id", "image_path", "kind", "system", "prompt", "instruction", "style_id", "attributes",
    "attempt"}`, ASCII.
    Out: `{"id", "text", "tokens_in"?, "tokens_out"?}` or `{"id", "error"}`, UTF-8, at most 1 MiB. Other lines, second
    answers and ids that nobody asked for are left out with a warning.

    At most `concurrency` requests are unanswered at a time, and each has `timeout_s` from when it was sent: a program
    that works on one after the other needs a lower concurrency or a longer time. A program that ends or hangs is
    started again, `attempts` starts in all; what it was working on is asked once more, one at a time, so that one
    request that kills it does not take others along. Then everything left fails as rows.

    The program is started without a shell, in a process group of its own that is killed at the end (a child that left
    the group survives). It inherits our stderr and our environment, an API key in it included: it may need them.

    Raises:
        UsageError: the command line cannot be split.
    """

    name = "command"
    source = "mllm"
    deferred = False
    repeats = False

    def __init__(self, command: str, remote: RemoteConfig) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"The command `{command}` cannot be split into words: {error}.") from None
        if not self._argv or not self._argv[0]:
            raise UsageError("The command is empty.")
        self._remote = remote
        # The arguments may hold a secret, so a digest tells two programs apart.
        digest = hashlib.sha256("\0".join(self._argv).encode("utf-8", "surrogatepass")).hexdigest()[:8]
        self.model = f"command:{os.path.basename(self._argv[0])}#{digest}"

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the program's replies.

        Raises:
            RemoteError: the program cannot be started, or ended or hung before it answered anything.
        """
        source = iter(requests)
        first = next(source, None)
        if first is None:
            return
        again = deque([_Item(first)])
        answers, problem = 0, ""
        for _ in range(self._remote.attempts):
            program = _Program(self._argv)
            try:
                yield from self._exchange(program, again, source)
            finally:
                program.stop(gentle=program.finished)
            if program.finished:
                return
            answers, problem = answers + program.answers, program.problem
            if not answers:
                raise RemoteError(f"The describer `{self._argv[0]}` {problem} before it answered anything.")
            log.warning("describer: the program %s", problem)
        left = (item.request for item in again)
        yield from (failed(request, f"the describer {problem}") for request in itertools.chain(left, source))

    def _exchange(self, program: "_Program", again: deque[_Item], source: Iterator[Request]) -> Iterator[Reply]:
        """Send and receive until everything is answered (`program.finished`) or the program is lost.

        `again` holds what to send before anything new; what a lost program leaves is put there or fails.
        """
        pending: dict[int, _Item] = {}
        while True:
            self._fill(program, pending, again, source)
            if not pending:
                program.finished = True
                return
            line = program.receive(self._deadline(pending))
            reply = _reply(line.data, pending, program) if line.data is not None else None
            if reply is not None:
                program.answered(line.at)
                yield reply
                continue
            if not program.problem:
                yield from self._expire(program, pending, line.at)
            if program.problem:
                yield from _leave(program, pending, again)
                return

    def _deadline(self, pending: dict[int, _Item]) -> float:
        return min(item.sent for item in pending.values()) + self._remote.timeout_s

    def _fill(
        self, program: "_Program", pending: dict[int, _Item], again: deque[_Item], source: Iterator[Request]
    ) -> None:
        while len(pending) < self._remote.concurrency:
            # Who was there when a program died is asked alone.
            if pending and (any(item.lives for item in pending.values()) or (again and again[0].lives)):
                return
            if again:
                item = again.popleft()
            else:
                request = next(source, None)
                if request is None:
                    return
                item = _Item(request)
            item.sent = time.monotonic()
            pending[program.send(item.request)] = item

    def _expire(self, program: "_Program", pending: dict[int, _Item], now: float) -> Iterator[Reply]:
        """Fail what took too long; a program that answered nothing in all that time hangs."""
        why = f"timed out after {self._remote.timeout_s:g} s"
        late = [number for number, item in pending.items() if item.sent + self._remote.timeout_s <= now]
        for number in late:
            item = pending.pop(number)
            if program.answered_at < item.sent:
                program.problem = why
            yield failed(item.request, f"the describer {why}")


def _leave(program: "_Program", pending: dict[int, _Item], again: deque[_Item]) -> Iterator[Reply]:
    """What a lost program had: once more, unless it was alone with it when it was lost for the second time."""
    for item in pending.values():
        item.lives += 1
        if item.lives > 1:
            yield failed(item.request, f"the describer {program.problem}")
        else:
            again.append(item)


class _Program:
    """One life of the program: a thread writes to it, another reads, so that neither pipe can block the other.

    Attributes:
        problem: how it was lost; empty while it lives.
        answers, answered_at: how many answers it gave, and when the last one came (monotonic seconds).
        finished: everything is answered.

    Raises:
        RemoteError: it cannot be started.
    """

    def __init__(self, argv: list[str]) -> None:
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RemoteError(f"Cannot start the describer `{argv[0]}`: {reason}.") from None
        self.problem = ""
        self.finished = False
        self.answers = 0
        self.answered_at = -1.0
        self._warned = self._sent = 0
        self._ended_at: float | None = None
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lines: queue.Queue[_Line] = queue.Queue(_BACKLOG)
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

    def receive(self, deadline: float) -> _Line:
        """Return the next line; without data at the deadline, or with `problem` set when the program is lost."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(_LOOK_S, deadline - time.monotonic())))
            except queue.Empty:
                now = time.monotonic()
                if self._is_gone(now):
                    self.problem = self._ending()
                if self.problem or now >= deadline:
                    return _Line(now, None)
                continue
            if line.data is None:
                self.problem = self._ending()
            return line

    def answered(self, at: float) -> None:
        """Count an answer."""
        self.answers += 1
        self.answered_at = max(self.answered_at, at)

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


def _reply(data: bytes, pending: dict[int, _Item], program: _Program) -> Reply | None:
    """The reply in a line; None for a line that answers nothing that was asked."""
    if len(data) > MAX_LINE:
        program.warn(f"a line longer than {MAX_LINE:,} bytes is left out")
        return None
    try:
        row = json.loads(data.decode("utf-8", "replace"))
        # JSON's true and 1.0 would find the request number 1 as well.
        number = row["id"] if type(row["id"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        row = number = None
    if row is None or number is None or number not in pending:
        program.warn("a line is not the answer to a pending request and is left out")
        return None
    request = pending.pop(number).request
    if isinstance(row.get("text"), str):
        sent, received = _count(row, "tokens_in"), _count(row, "tokens_out")
        return Reply(request, "ok", row["text"], tokens_in=sent, tokens_out=received)
    return failed(request, str(row.get("error") or "the answer has no text"))


def _count(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    return value if type(value) is int and 0 < value <= _MOST_TOKENS else 0


def _write(stream: BinaryIO, out: "queue.SimpleQueue[bytes | None]") -> None:
    """Write what is handed over, in a thread of its own: a program that does not read blocks only this one."""
    with contextlib.suppress(OSError, ValueError):  # the reading thread notices that the program ended
        while (data := out.get()) is not None:
            while data:
                data = data[stream.write(data) :]
    with contextlib.suppress(OSError):
        stream.close()


def _read(stream: BinaryIO, lines: "queue.Queue[_Line]", stopped: threading.Event) -> None:
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


def _put(lines: "queue.Queue[_Line]", stopped: threading.Event, data: bytes | None) -> None:
    """Wait for room in the queue; after the end of the exchange lines are dropped, so that the program can end."""
    if data is not None and not data.strip():
        return
    item = _Line(time.monotonic(), data)
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            lines.put(item, timeout=_LOOK_S)
            return
