"""Phrases from any program: one JSON object per line in, one per line out."""

import contextlib
import hashlib
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from reidctl.console import log
from reidctl.errors import RemoteError, UsageError
from reidctl.phrases.base import Phrase
from reidctl.phrases.reading import Missing, read_phrases
from reidctl.phrases.rules import extract

_MOST_BYTES = 1 << 20
_WARNINGS = 5
_GENTLE_S, _LOOK_S = 2.0, 0.2
_BACKLOG = 32
_SHORTEST_SECRET = 6


class CommandSource:
    """Asks a program that runs for the whole time and answers in any order; a `PhraseSource`.

    In:  `{"id", "caption", "limit"}`, ASCII.
    Out: `{"id", "phrases": [...]}` (see `reading.read_phrases`) or `{"id", "error"}`, UTF-8, at most 1 MiB. Other
    lines, second answers and ids that nobody asked for are left out with a warning. A caption with an error, or with
    something that is no list of phrases, gets those of the rules, with a counted warning.

    The program starts with the first question, without a shell, in a process group of its own. It should end when its
    input ends; when we are done with it, it is killed. It inherits our stderr and our environment. Nothing of an answer
    that repeats the API key is kept.

    Attributes:
        unanswered: captions that the rules answered; not to be stored as the program's.
        identity: of the program and its arguments, which may hold a secret: a digest.

    Args:
        command: the program and its arguments.
        limit: most phrases of a caption.
        timeout_s: longest time without any answer.
        concurrency: captions that the program has at a time.
        key_env: the environment variable that holds an API key.

    Raises:
        UsageError: the command line cannot be split.
    """

    def __init__(
        self,
        command: str,
        limit: int,
        *,
        timeout_s: float = 60.0,
        concurrency: int = 8,
        key_env: str = "OPENAI_API_KEY",
    ) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"The command of the phrases cannot be split into words: {error}.") from None
        if not self._argv or not self._argv[0]:
            raise UsageError("The command of the phrases is empty.")
        self._limit, self._timeout_s, self._concurrency = limit, timeout_s, concurrency
        digest = hashlib.sha256("\0".join(self._argv).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.identity = f"command {os.path.basename(self._argv[0])} {digest}"
        self.unanswered: set[str] = set()
        keys = (os.environ.get(name, "").strip() for name in {key_env, "OPENAI_API_KEY", "AZURE_OPENAI_API_KEY"})
        self._secrets = [key for key in keys if len(key) >= _SHORTEST_SECRET]
        self._missing = Missing("have no usable answer of the program: the rules find their phrases")
        self._program: _Program | None = None
        self._number = self._warned = 0

    def __call__(self, captions: Sequence[str]) -> list[list[Phrase]]:
        """Return the phrases of each caption.

        Raises:
            RemoteError: the program cannot be started, ended, or gave no answer for too long.
        """
        found = dict(self._exchange(list(dict.fromkeys(captions))))
        left = [text for text, phrases in found.items() if phrases is None]
        self.unanswered.difference_update(found)
        self.unanswered.update(left)
        self._missing.add(len(left))
        return [
            extract(text, limit=self._limit) if (phrases := found[text]) is None else list(phrases) for text in captions
        ]

    def _exchange(self, captions: list[str]) -> Iterator[tuple[str, list[Phrase] | None]]:
        """Send and receive until every caption has its answer; None for one that cannot be used."""
        if captions and self._program is None:
            self._program = _Program(self._argv)
        waiting, pending = iter(captions), dict[int, str]()
        deadline = time.monotonic() + self._timeout_s
        while True:
            while len(pending) < self._concurrency and (text := next(waiting, None)) is not None:
                self._send(text, pending)
            if not pending:
                return
            answer = self._answer(self._receive(deadline), pending)
            if answer is not None:
                deadline = time.monotonic() + self._timeout_s
                yield answer

    def _send(self, caption: str, pending: dict[int, str]) -> None:
        assert self._program is not None
        pending[self._number] = caption
        row = {"id": self._number, "caption": caption, "limit": self._limit}
        self._program.send(json.dumps(row).encode("ascii") + b"\n")
        self._number += 1

    def _receive(self, deadline: float) -> bytes:
        assert self._program is not None
        line = self._program.receive(deadline)
        if line:
            return line
        why = f"gave no answer for {self._timeout_s:g} s" if line is None else self._program.ending()
        self._program.stop()
        self._program = None
        raise RemoteError(
            f"The program `{self._argv[0]}` that finds phrases {why}.",
            hint="What was stored is kept; run it again when the program is mended.",
        )

    def _answer(self, line: bytes, pending: dict[int, str]) -> tuple[str, list[Phrase] | None] | None:
        """The caption that a line answers, with its phrases; None for a line that answers nothing."""
        try:
            row = json.loads(line) if len(line) <= _MOST_BYTES else None
        except (ValueError, RecursionError):
            row = None
        # JSON's true and 1.0 would find the number 1 as well.
        if not isinstance(row, dict) or type(row.get("id")) is not int or row["id"] not in pending:
            self._warn()
            return None
        caption = pending.pop(row["id"])
        if any(secret.encode() in line for secret in self._secrets):
            return caption, None
        try:
            return caption, read_phrases(row.get("phrases"), caption, self._limit)
        except ValueError:
            return caption, None

    def _warn(self) -> None:
        self._warned += 1
        if self._warned <= _WARNINGS:
            more = "; more are not reported" if self._warned == _WARNINGS else ""
            log.warning("phrases: a line of the program answers nothing that was asked and is left out%s", more)


class _Program:
    """One life of the program: a thread writes to it, another reads, so that neither pipe can block the other."""

    def __init__(self, argv: list[str]) -> None:
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RemoteError(f"Cannot start the program `{argv[0]}` that finds phrases: {reason}.") from None
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lines: queue.Queue[bytes] = queue.Queue(_BACKLOG)
        stopped = threading.Event()
        for work, arguments in (
            (_write, (self._process.stdin, self._out)),
            (_read, (self._process.stdout, self._lines, stopped)),
        ):
            threading.Thread(target=work, args=arguments, daemon=True).start()
        # Runs when nobody holds the source any more, and at the end of our process.
        self.stop = weakref.finalize(self, _stop, self._process, self._out, stopped)

    def send(self, line: bytes) -> None:
        """Hand a line to the writing thread."""
        self._out.put(line)

    def receive(self, deadline: float) -> bytes | None:
        """Return the next line; b"" at the end of the output, None if nothing came until the deadline."""
        # A program that writes noise without end is as silent as one that writes nothing.
        if (left := deadline - time.monotonic()) <= 0:
            return None
        try:
            return self._lines.get(timeout=left)
        except queue.Empty:
            return None

    def ending(self) -> str:
        """Return how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GENTLE_S)
        code = self._process.poll()
        if code is None:
            return "closed its output"
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _write(stream: BinaryIO, out: "queue.SimpleQueue[bytes | None]") -> None:
    with contextlib.suppress(OSError, ValueError):  # the reading thread notices that the program ended
        while (data := out.get()) is not None:
            while data:
                data = data[stream.write(data) :]
    with contextlib.suppress(OSError):
        stream.close()


def _read(stream: BinaryIO, lines: "queue.Queue[bytes]", stopped: threading.Event) -> None:
    """Put lines into the queue as they come, at the end an empty one; a huge line is cut above the bound."""
    rest = bytearray()
    with contextlib.suppress(OSError, ValueError):  # the same as an end of the output
        while chunk := stream.read(1 << 16):
            *ended, tail = chunk.split(b"\n")
            for part in ended:
                _grow(rest, part)
                if rest.strip():
                    _put(lines, stopped, bytes(rest))
                rest.clear()
            _grow(rest, tail)
    _put(lines, stopped, b"")


def _put(lines: "queue.Queue[bytes]", stopped: threading.Event, line: bytes) -> None:
    """Wait for room in the queue; afterwards lines are dropped, so that the program can end."""
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            lines.put(line, timeout=_LOOK_S)
            return


def _grow(line: bytearray, part: bytes) -> None:
    if len(line) <= _MOST_BYTES:
        line += part


def _stop(process: "subprocess.Popen[bytes]", out: "queue.SimpleQueue[bytes | None]", stopped: threading.Event) -> None:
    """End the input, give the program a moment to finish, then kill its group."""
    stopped.set()
    out.put(None)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GENTLE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
