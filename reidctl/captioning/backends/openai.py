"""A describer behind OpenAI's chat completions, at OpenAI or at any server that speaks the same protocol."""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.chat import (
    Dialect,
    first_dialect,
    lesson,
    parse_completion,
    request_body,
    resolve_model,
    told,
    too_large,
)
from reidctl.captioning.backends.gate import Gate, Spent, backoff
from reidctl.captioning.backends.picture import PictureCache
from reidctl.captioning.backends.server import connection, is_flagged, judged, stop_if_hopeless, waiting_time
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_GRACE_S = 2.0


@dataclass
class _Trouble:
    """Why a try brought nothing: `asked` is the pause that the service named, `busy` a 429."""

    problem: str
    asked: float | None = None
    busy: bool = False


class _Worker:
    """An event loop in a thread: requests go in, what became of them comes out of `outcomes`.

    The caller may wait for a disk or a person meanwhile; answers and images go on being handled.
    """

    def __init__(
        self, clients: "list[AsyncOpenAI]", pictures: PictureCache, ask: Callable[[Request], Awaitable[Reply]]
    ) -> None:
        self.outcomes: queue.SimpleQueue[Reply | BaseException] = queue.SimpleQueue()
        self._clients, self._pictures, self._ask = clients, pictures, ask
        self._tasks: set[asyncio.Future[Reply]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="openai", daemon=True)

    def __enter__(self) -> "_Worker":
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def submit(self, request: Request) -> None:
        """Start a request."""
        self._loop.call_soon_threadsafe(self._start, request)

    def _start(self, request: Request) -> None:
        task = asyncio.ensure_future(self._ask(request), loop=self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: "asyncio.Future[Reply]") -> None:
        self._tasks.discard(task)
        problem = asyncio.CancelledError() if task.cancelled() else task.exception()
        self.outcomes.put(problem if problem is not None else task.result())

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        self._thread.join(timeout=5)

    async def _stop(self) -> None:
        self._pictures.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()
        self._loop.stop()


class OpenAIDescriber:
    """Sends each image with its prompt to a chat-completions server, several at a time.

    The image is re-encoded (no metadata leaves the machine) and resized to `remote.image_side`. The key is read from
    the environment variable `remote.key_env` and is kept out of every message. 429 and 5xx answers and broken
    connections are tried again; Retry-After holds back all requests, not just the one that was told. A 429 uses up no
    try, only time: at most `attempts` times `max_wait_s`. What the server refuses (a schema, `max_tokens`,
    `temperature`, `seed`) is learned once and left out from then on.

    Args:
        model: name at the server; `gpt-4` means a GPT-4-class model that sees images. Azure's names are the user's own.
        config: see `RemoteConfig`.

    Raises:
        UsageError: OPENAI_BASE_URL is not a plain address.
    """

    name = "openai"
    source = "mllm"
    deferred = False
    repeats = False

    def __init__(self, model: str, config: CaptionConfig) -> None:
        self._server = connection(config)
        self.model = model if self._server.is_azure else resolve_model(model)
        self._asked_for = model
        self._config, self._remote = config, config.remote
        self._dialect = first_dialect(self.model, structured=config.remote.structured)
        self._announced = False
        self._snapshot: str | None = None
        self._repeats = _Repeats()

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield replies as they arrive; at most `concurrency` requests are taken and not yet answered.

        Raises:
            RemoteError: no key, a key that is refused, a spent quota, an unknown model or address.
        """
        source = iter(requests)
        first = next(source, None)
        if first is None:  # nothing to ask: no key is needed
            return
        source = chain([first], source)
        clients = self._server.clients(self._judge)
        turn = cycle(clients)
        self._announce()
        gate = Gate(self._remote)
        pictures = PictureCache(self._remote.image_side, self._remote.image_quality)
        with _Worker(clients, pictures, lambda request: self._ask(next(turn), gate, pictures, request)) as worker:
            yield from self._exchange(worker, gate, source)

    def _announce(self) -> None:
        """Say once where the images go and which model a spelling of GPT-4 means."""
        if self._announced:
            return
        self._announced = True
        log.info("caption: requests go to %s, model %s", self._server.host, self.model)
        if self.model != self._asked_for:
            log.info("caption: %s means %s here: a model that sees images", self._asked_for, self.model)

    def _exchange(self, worker: _Worker, gate: Gate, source: Iterator[Request]) -> Iterator[Reply]:
        flying = 0
        while True:
            while flying < self._remote.concurrency and (request := next(source, None)) is not None:
                worker.submit(request)
                flying += 1
            if not flying:
                return
            outcome = worker.outcomes.get()
            flying -= 1
            if isinstance(outcome, BaseException):
                gate.close()
                yield from _last(worker, flying)
                raise outcome
            yield outcome

    async def _ask(self, client: "AsyncOpenAI", gate: Gate, pictures: PictureCache, request: Request) -> Reply:
        """Ask until there is an answer or the tries are used up."""
        import openai

        if not _is_text(request.system + request.prompt):
            return failed(request, "the prompt holds half a character", own_fault=True)
        spent, shrink, sent = Spent(), 1, 0.0
        while True:
            dialect = self._dialect
            try:
                image = await pictures.get(request.image_path, shrink=shrink) if request.image_path else None
                body = request_body(request, self.model, self._config, image, dialect=dialect)
                async with gate as sent, asyncio.timeout(self._remote.timeout_s):
                    answer = await self._send(client, body)
                return self._read(answer, request, dialect)
            except DataError as error:
                return failed(request, str(error), own_fault=True)
            except openai.APIStatusError as error:
                if self._learn(error, dialect):
                    continue
                if shrink == 1 and request.image_path and too_large(error):
                    shrink = 2
                    continue
                result = self._refused(error, request)
            except (openai.APIConnectionError, TimeoutError) as error:
                result = self._unanswered(error)
            except (openai.APIError, ValueError, RecursionError) as error:  # no chat completion at all
                result = _Trouble(f"the service sent no valid answer: {self._server.redact(str(error))}")
            if isinstance(result, Reply):
                return result
            if not await self._wait(gate, result, spent, sent):
                return failed(request, result.problem)

    def _refused(self, error: "APIStatusError", request: Request) -> Reply | _Trouble:
        """The end of a request that is refused for good, or what to wait for."""
        if is_flagged(error):
            return rejected(request, "the model refused")
        stop_if_hopeless(error, self._server)
        status = error.status_code
        problem = f"the service answered {status}: {self._server.redact(told(error))}"
        if status not in (408, 409, 425, 429) and status < 500:
            return failed(request, problem, own_fault=True)
        return _Trouble(problem, waiting_time(error.response.headers, self._remote.max_wait_s), status == 429)

    def _unanswered(self, error: Exception) -> _Trouble:
        import openai

        cause = error.__cause__ or error
        told = self._server.redact(str(cause)) or type(cause).__name__
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            told = f"nothing within {self._remote.timeout_s:g} s"
        return _Trouble(f"{type(error).__name__}: {told}")

    async def _wait(self, gate: Gate, trouble: _Trouble, spent: Spent, sent: float) -> bool:
        """Wait for the next try; False where there is none."""
        remote, asked = self._remote, trouble.asked
        if asked is not None and asked > remote.max_wait_s:
            trouble.problem += f" (asked to wait {asked:.0f} s)"
            return False
        if trouble.busy:  # nobody looked at it: not a try
            if is_worth_it := gate.is_worth_waiting(spent):
                gate.hold(asked, sent, busy=True)
            return is_worth_it
        spent.tries += 1
        if spent.tries >= remote.attempts:
            return False
        if asked is not None:
            gate.hold(asked, sent)
        await asyncio.sleep(max(0.0, backoff(remote, spent.tries) - (asked or 0.0)))
        return True

    async def _send(self, client: "AsyncOpenAI", body: dict[str, Any]) -> Any:
        fields = dict(body)
        model, messages = fields.pop("model"), fields.pop("messages")
        raw = await client.chat.completions.with_raw_response.create(model=model, messages=messages, extra_body=fields)
        return judged(raw.http_response)

    def _judge(self, stream: Any, body: bytes) -> Any:
        if self._repeats.suspect(stream, body):
            raise ValueError("the last reply once more")
        return json.loads(body)

    def _read(self, answer: Any, request: Request, dialect: Dialect) -> Reply:
        reply = parse_completion(answer, request, structured=dialect.structured)
        name = answer.get("model")
        if self._snapshot is None and isinstance(name, str):
            self._snapshot = self._server.redact(name)
            if name != self.model:
                log.info("caption: %s answers as %s", self.model, self._snapshot)
        return reply

    def _learn(self, error: "APIStatusError", used: Dialect) -> bool:
        """Whether to ask again, without counting it, because the server does not take what `used` sends.

        Each change takes something away, so a request comes back here a few times at most.
        """
        if self._dialect != used:  # another request learned meanwhile
            return error.status_code in (400, 422, 501)
        learned = lesson(error, used)
        if learned is None:
            return False
        self._dialect = learned
        changes = {k: v for k, v in vars(learned).items() if v != getattr(used, k)}
        changed = ", ".join(f"{name} -> {'left out' if new is False else new}" for name, new in changes.items())
        log.info(
            "caption: the server refuses a field, so from now on %s (was told: %s)",
            changed,
            self._server.redact(told(error)),
        )
        return True


class _Repeats:
    """Recognises a reply that a server sends twice: the next request on its connection would take it for its own.

    Completions carry their own id, so two equal ones in a row on one connection are suspect, and the request is asked
    again. A server that repeats itself honestly costs one more request in all.
    """

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._doubted: set[int] = set()
        self._off = False

    def suspect(self, stream: Any, body: bytes) -> bool:
        """Return whether a reply is the last one of its connection once more."""
        if stream is None or self._off:
            return False
        digest = hash(body)
        before, self._last[stream] = self._last.get(stream), digest
        self._off = before == digest and digest in self._doubted
        if before != digest or self._off:
            return False
        self._doubted.add(digest)
        return True


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last(worker: _Worker, flying: int) -> Iterator[Reply]:
    """What else comes in shortly after the end was decided: it was paid for."""
    until = time.monotonic() + _GRACE_S
    while flying:
        try:
            outcome = worker.outcomes.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return
        flying -= 1
        if isinstance(outcome, Reply):
            yield outcome
