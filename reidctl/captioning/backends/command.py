"""A describer that is any program: one JSON object per line in, one per line out."""

import hashlib
import itertools
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.backends.program import MAX_LINE, Program
from reidctl.captioning.config import RemoteConfig
from reidctl.console import log
from reidctl.errors import RemoteError, UsageError

MOST_TOKENS = 10**9


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
    the group survives). A small Python process waits beside it and kills the group when we end without a chance to, by
    `kill -9` for example. The program inherits our stderr and our environment, an API key in it included: it may need
    them. Keys are taken out of its errors, and a text that repeats one is a failed reply.

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
            program = Program(self._argv, self._remote.key_env)
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

    def _exchange(self, program: Program, again: deque[_Item], source: Iterator[Request]) -> Iterator[Reply]:
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
        self, program: Program, pending: dict[int, _Item], again: deque[_Item], source: Iterator[Request]
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

    def _expire(self, program: Program, pending: dict[int, _Item], now: float) -> Iterator[Reply]:
        """Fail what took too long; a program that answered nothing in all that time hangs."""
        why = f"timed out after {self._remote.timeout_s:g} s"
        late = [number for number, item in pending.items() if item.sent + self._remote.timeout_s <= now]
        for number in late:
            item = pending.pop(number)
            if program.answered_at < item.sent:
                program.problem = why
            yield failed(item.request, f"the describer {why}")


def _leave(program: Program, pending: dict[int, _Item], again: deque[_Item]) -> Iterator[Reply]:
    """What a lost program had: once more, unless it was alone with it when it was lost for the second time."""
    for item in pending.values():
        item.lives += 1
        if item.lives > 1:
            yield failed(item.request, f"the describer {program.problem}")
        else:
            again.append(item)


def _reply(data: bytes, pending: dict[int, _Item], program: Program) -> Reply | None:
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
    text = row.get("text")
    if not isinstance(text, str):
        reason = program.redact(str(row.get("error") or "the answer has no text"))
        return failed(request, reason, own_fault=True)
    if program.tells_a_secret(text):
        return failed(request, "the text repeats an API key", own_fault=True)
    return Reply(
        request,
        "ok",
        text,
        tokens_in=token_count(row.get("tokens_in")),
        tokens_out=token_count(row.get("tokens_out")),
    )


def token_count(value: Any) -> int:
    """Return a number that a stranger calls a count of tokens; 0 for what can be none."""
    return value if type(value) is int and 0 < value <= MOST_TOKENS else 0
