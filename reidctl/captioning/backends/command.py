"""A describer that is any program: one JSON object per line in, one per line out."""

import contextlib
import hashlib
import json
import os
import queue
import shlex
import subprocess
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.config import RemoteConfig
from reidctl.console import log
from reidctl.errors import RemoteError, UsageError

_Process = subprocess.Popen[str]


class CommandDescriber:
    """Asks a program that runs for the whole time and answers in any order.

    In:  `{"id", "image_id", "image_path", "kind", "system", "prompt", "style_id", "attempt"}`.
    Out: `{"id", "text", "tokens_in"?, "tokens_out"?}` or `{"id", "error"}`.
    At most `concurrency` requests are unanswered at a time. The program is started without a shell; its stderr is ours.

    Raises:
        UsageError: the command line cannot be split.
    """

    name = "command"
    source = "mllm"

    def __init__(self, command: str, remote: RemoteConfig) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"The command `{command}` cannot be split into words: {error}.") from None
        if not self._argv:
            raise UsageError("The command is empty.")
        self._remote = remote
        # The arguments may hold a secret, so a digest tells two programs apart.
        digest = hashlib.sha256("\0".join(self._argv).encode()).hexdigest()[:8]
        self.model = f"command:{os.path.basename(self._argv[0])}#{digest}"

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the program's replies.

        Raises:
            RemoteError: the program cannot be started, or ended before it answered anything.
        """
        source = iter(requests)
        first = next(source, None)
        if first is None:
            return
        process = self._start()
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
        try:
            yield from self._exchange(process, lines, first, source)
        finally:
            _stop(process)

    def _start(self) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                bufsize=1,
            )
        except OSError as error:
            raise RemoteError(f"Cannot start the describer `{self._argv[0]}`: {error.strerror}.") from None

    def _exchange(
        self, process: _Process, lines: "queue.Queue[str | None]", first: Request, rest: Iterator[Request]
    ) -> Iterator[Reply]:
        pending: dict[int, Request] = {}
        number = answered = 0
        following: Request | None = first
        alive = True
        while following is not None or pending:
            while alive and following is not None and len(pending) < self._remote.concurrency:
                pending[number] = following
                alive = _send(process, number, following)
                number += 1
                following = next(rest, None)
            line = _receive(lines, self._remote.timeout_s) if alive else None
            if line is None:
                alive = False
                why = "timed out" if process.poll() is None else f"ended with code {process.poll()}"
                if not answered:
                    raise RemoteError(f"The describer `{self._argv[0]}` {why} before it answered anything.")
                yield from (failed(request, f"the describer {why}") for request in pending.values())
                pending.clear()
                if following is not None:
                    yield failed(following, f"the describer {why}")
                    following = next(rest, None)
                continue
            reply = _reply(line, pending)
            if reply is not None:
                answered += 1
                yield reply


def _send(process: _Process, number: int, request: Request) -> bool:
    """Write one request; False when the program no longer reads."""
    assert process.stdin is not None
    fields: dict[str, Any] = {
        "id": number,
        "image_id": request.image_id,
        "image_path": request.image_path,
        "kind": request.kind,
        "system": request.system,
        "prompt": request.prompt,
        "style_id": request.style_id,
        "attempt": request.attempt,
    }
    try:
        process.stdin.write(json.dumps(fields) + "\n")
        process.stdin.flush()
    except OSError:
        return False
    return True


def _reply(line: str, pending: dict[int, Request]) -> Reply | None:
    """The reply in a line; None for a line that answers nothing that was asked."""
    try:
        row = json.loads(line)
        request = pending.pop(row["id"])
    except (ValueError, KeyError, TypeError):
        log.warning("describer: a line is not the answer to a pending request and is left out")
        return None
    if isinstance(row.get("text"), str):
        sent, received = _count(row, "tokens_in"), _count(row, "tokens_out")
        return Reply(request, "ok", row["text"], tokens_in=sent, tokens_out=received)
    return failed(request, str(row.get("error") or "the answer has no text"))


def _count(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _read_lines(process: _Process, lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:
        pass  # closed by _stop while reading
    lines.put(None)


def _receive(lines: "queue.Queue[str | None]", timeout_s: float) -> str | None:
    try:
        return lines.get(timeout=timeout_s)
    except queue.Empty:
        return None


def _stop(process: _Process) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it ended first
        process.stdin.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
