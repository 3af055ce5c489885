"""A describer behind OpenAI's chat completions, at OpenAI or at any server that speaks the same protocol."""

import asyncio
import json
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.chat import Dialect, first_dialect, parse_completion, request_body, resolve_model
from reidctl.captioning.backends.picture import PictureCache
from reidctl.captioning.backends.server import connection, stop_if_hopeless, waiting_time
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_UNSUPPORTED = (
    r"not support|unsupported|unrecogni[sz]ed|unknown|unexpected|extra|not permitted|not allowed|deprecated|only the"
)
_GRACE_S = 2.0


def _lesson(error: "APIStatusError", dialect: Dialect) -> Dialect | None:
    """The dialect without what a server has just refused; None when the refusal is about something else."""
    if error.status_code not in (400, 422, 501):
        return None
    # FastAPI puts its whole message under a key that is called like one of our fields.
    named = re.sub(r"""['"]detail['"]:""", "", str(error.param or error.message)[:1000])
    if dialect.structured and re.search(r"response_format|json_schema|json_object|structured|guided", named):
        return replace(dialect, answer="json_object" if dialect.answer == "schema" else "plain")
    if not re.search(_UNSUPPORTED, error.message[:1000], re.I):
        return None
    if re.search(r"\bmax_tokens\b", named) and dialect.limit == "max_tokens":
        return replace(dialect, limit="max_completion_tokens")
    for option in ("temperature", "seed", "detail"):
        if getattr(dialect, option) and re.search(rf"\b{option}\b", named):
            off: dict[str, Any] = {option: False}
            return replace(dialect, **off)
    return None


def _too_large(error: "APIStatusError") -> bool:
    words = re.search(
        r"(?:image|payload|request).{0,40}too (?:large|big)|exceed.{0,40}(?:size|pixels)", error.message, re.I
    )
    return error.status_code == 413 or (error.status_code == 400 and words is not None)


class _Gate:
    """Lets requests out: none during a pause, and after one only as many more as answers come back."""

    def __init__(self, most: int) -> None:
        self._most = self._width = most
        self._out = 0
        self._quiet_until = 0.0
        self._closed = False
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        while not self._closed:
            if (pause := self._quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            elif self._out < self._width:
                self._out += 1
                return
            else:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._out < self._width)
        raise asyncio.CancelledError

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._out -= 1
        self._width = min(self._most, self._width + (kind is None))
        async with self._changed:
            self._changed.notify(2)

    def hold(self, seconds: float) -> None:
        """Let nobody out for so long, and then few at first: all at once would meet the same refusal again."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._width = max(1, self._width // 4)
            if seconds >= 5:
                log.info("caption: the service asks us to wait %.0f s", seconds)
        self._quiet_until = max(self._quiet_until, now + seconds)

    def close(self) -> None:
        """Let nobody out any more."""
        self._closed = True


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
    connections are tried again; Retry-After holds back all requests, not just the one that was told. What the server
    refuses (a schema, `max_tokens`, `temperature`, `seed`) is learned once and left out from then on.

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
        self._snapshot: str | None = None
        self._repeats = _Repeats()

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield replies as they arrive; at most `concurrency` requests are taken and not yet answered.

        Raises:
            RemoteError: no key, a key that is refused, a spent quota, an unknown model or address.
        """
        source = iter(requests)
        clients = self._server.clients()
        turn = cycle(clients)
        log.info("caption: images go to %s, model %s", self._server.host, self.model)
        if self.model != self._asked_for:
            log.info("caption: %s means %s here: a model that sees images", self._asked_for, self.model)
        gate = _Gate(self._remote.concurrency)
        pictures = PictureCache(self._remote.image_side, self._remote.image_quality)
        with _Worker(clients, pictures, lambda request: self._ask(next(turn), gate, pictures, request)) as worker:
            yield from self._exchange(worker, gate, source)

    def _exchange(self, worker: _Worker, gate: _Gate, source: Iterator[Request]) -> Iterator[Reply]:
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

    async def _ask(self, client: "AsyncOpenAI", gate: _Gate, pictures: PictureCache, request: Request) -> Reply:
        """Ask until there is an answer or the tries are used up."""
        import openai

        tries, shrink, problem = 0, 1, "no answer"
        while tries < self._remote.attempts:
            dialect = self._dialect
            try:
                image = await pictures.get(request.image_path, shrink=shrink) if request.image_path else None
                body = request_body(request, self.model, self._config, image, dialect=dialect)
                async with gate, asyncio.timeout(self._remote.timeout_s):
                    answer = await self._send(client, body)
                return self._read(answer, request, dialect)
            except DataError as error:
                return failed(request, str(error))
            except openai.APIStatusError as error:
                problem = f"the service answered {error.status_code}: {self._server.redact(error.message)}"
                if self._learn(error, dialect):
                    continue
                if shrink == 1 and request.image_path and _too_large(error):
                    shrink = 2
                    continue
                stop_if_hopeless(error, self._server)
                if error.code in ("content_filter", "content_policy_violation"):
                    return rejected(request, "the model refused")
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    return failed(request, problem)
                asked, busy = waiting_time(error.response.headers, self._remote.max_wait_s), error.status_code == 429
            except (openai.APIConnectionError, TimeoutError) as error:
                cause = (
                    self._server.redact(str(error.__cause__ or error)) or f"nothing within {self._remote.timeout_s:g} s"
                )
                problem, asked, busy = f"{type(error).__name__}: {cause}", None, False
            except (openai.APIError, ValueError, RecursionError) as error:  # no chat completion at all
                problem = f"the service sent no valid answer: {self._server.redact(str(error))}"
                asked, busy = None, False
            tries += 1
            if asked is not None and asked > self._remote.max_wait_s:
                return failed(request, f"{problem} (asked to wait {asked:.0f} s)")
            if tries < self._remote.attempts:
                await self._pause(gate, asked, tries, busy)
        return failed(request, problem)

    async def _send(self, client: "AsyncOpenAI", body: dict[str, Any]) -> Any:
        import openai

        fields = dict(body)
        model, messages = fields.pop("model"), fields.pop("messages")
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_body=fields
            )
        except openai.APIStatusError as error:
            await _hang_up(error.response)
            raise
        response = raw.http_response
        try:
            if self._repeats.suspect(response):
                raise ValueError("the last reply once more")
            return json.loads(response.content)
        except ValueError:
            await _hang_up(response)
            raise

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
        lesson = _lesson(error, used)
        if lesson is None:
            return False
        self._dialect = lesson
        changes = {k: v for k, v in vars(lesson).items() if v != getattr(used, k)}
        told = ", ".join(f"{name} -> {'left out' if new is False else new}" for name, new in changes.items())
        log.info(
            "caption: the server refuses a field, so from now on %s (was told: %s)",
            told,
            self._server.redact(error.message),
        )
        return True

    async def _pause(self, gate: _Gate, asked: float | None, tries: int, busy: bool) -> None:
        own = min(self._remote.max_wait_s, self._remote.backoff_s * 2 ** min(tries - 1, 30)) * random.uniform(0.5, 1.0)
        if asked is not None or busy:
            gate.hold(own if asked is None else asked)
        await asyncio.sleep(max(0.0, own - (asked or 0.0)))


class _Repeats:
    """Recognises a reply that a server sends twice: the next request on its connection would take it for its own.

    Completions carry their own id, so two equal ones in a row on one connection are suspect, and the request is asked
    again. A server that repeats itself honestly costs one more request in all.
    """

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._doubted: set[int] = set()
        self._off = False

    def suspect(self, response: Any) -> bool:
        """Return whether a reply is the last one of its connection once more."""
        stream = response.extensions.get("network_stream")
        if stream is None or self._off:
            return False
        digest = hash(response.content)
        before, self._last[stream] = self._last.get(stream), digest
        self._off = before == digest and digest in self._doubted
        if before != digest or self._off:
            return False
        self._doubted.add(digest)
        return True


async def _hang_up(response: Any) -> None:
    """Close the connection of an answer that is in doubt: whatever else comes from it would answer another request."""
    stream = response.extensions.get("network_stream")
    if stream is not None:
        await stream.aclose()


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
