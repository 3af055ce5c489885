"""A describer behind OpenAI's chat completions, at OpenAI or at any server that speaks the same protocol."""

import asyncio
import json
import os
import re
import time
from collections.abc import Generator, Iterable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.picture import data_url
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError, RemoteError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_OFFICIAL = "https://api.openai.com/v1"
# "GPT-4" in 001/002 is a model that sees images; the API's `gpt-4` does not.
_ALIASES = {"gpt-4": "gpt-4o", "gpt4": "gpt-4o", "chatgpt-4": "gpt-4o", "gpt-4-vision": "gpt-4o", "gpt-4v": "gpt-4o"}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "description",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"description": {"type": "string"}},
            "required": ["description"],
            "additionalProperties": False,
        },
    },
}


class OpenAIDescriber:
    """Sends each image with its prompt to a chat-completions server, several at a time.

    The image is re-encoded (no metadata leaves the machine), resized to `remote.image_side`. The key is read from the
    environment variable OPENAI_API_KEY and is kept out of every message. 429 and 5xx answers and broken connections
    are tried again; Retry-After holds back all requests, not just the one that was told.

    Args:
        model: name at the server; `gpt-4` means a GPT-4-class model that sees images.
        config: see `RemoteConfig`.
    """

    name = "openai"
    source = "mllm"

    def __init__(self, model: str, config: CaptionConfig) -> None:
        self.model = _ALIASES.get(model.lower(), model)
        self._config = config
        self._remote = config.remote
        self._base_url = config.remote.base_url or os.environ.get("OPENAI_BASE_URL") or _OFFICIAL
        self._structured = config.remote.structured
        self._quiet_until = 0.0

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield replies as they arrive.

        Raises:
            RemoteError: no key, a key that is refused, a spent quota, an unknown model or address.
        """
        source = iter(requests)
        key = self._key()
        host = urlsplit(self._base_url).hostname
        log.info("caption: images go to %s, model %s", host, self.model)
        with asyncio.Runner() as runner:
            client = self._client(key)
            pending: set[asyncio.Task[Reply]] = set()
            try:
                while True:
                    while len(pending) < self._remote.concurrency and (request := next(source, None)) is not None:
                        pending.add(runner.get_loop().create_task(self._ask(client, request)))
                    if not pending:
                        break
                    done, pending = runner.run(_first(pending))
                    # Finished replies first: one dead request must not lose what its neighbours brought.
                    yield from (task.result() for task in sorted(done, key=lambda task: task.exception() is not None))
            finally:
                runner.run(_close(client, pending))

    def _key(self) -> str:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            return key
        if self._base_url.rstrip("/") == _OFFICIAL:
            raise RemoteError("There is no OPENAI_API_KEY in the environment.", hint="Set it, or use --mllm template.")
        return "none"  # local servers ask for no key, the library insists on one

    def _client(self, key: str) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        # We count the tries ourselves: the library's are silent and ignore long Retry-After values.
        return AsyncOpenAI(api_key=key, base_url=self._base_url, timeout=self._remote.timeout_s, max_retries=0)

    async def _ask(self, client: "AsyncOpenAI", request: Request) -> Reply:
        try:
            image = await asyncio.to_thread(data_url, request.image_path, self._remote.image_side)
        except DataError as error:
            return failed(request, str(error))
        return await self._persist(client, request, image)

    async def _persist(self, client: "AsyncOpenAI", request: Request, image: str) -> Reply:
        """Ask until there is an answer or the tries are used up."""
        import openai

        problem = "no answer"
        tries = 0
        while tries < self._remote.attempts:
            await asyncio.sleep(max(0.0, self._quiet_until - time.monotonic()))
            structured = self._structured
            try:
                return _parse(await self._complete(client, request, image, structured), request, structured)
            except openai.APIStatusError as error:
                problem = f"the service answered {error.status_code}: {redact(error.message)}"
                if structured and _refuses_schema(error):
                    self._structured = False  # this server lacks structured output: plain text, same request
                    continue
                _stop_if_hopeless(error, problem)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    return failed(request, problem)
                wait = _retry_after(error.response.headers.get("retry-after"))
            except openai.APIConnectionError as error:  # a timeout is one of these
                problem, wait = f"{type(error).__name__}: {redact(str(error.__cause__ or error))}", None
            except (openai.APIError, ValueError) as error:  # an answer that is no chat completion at all
                problem, wait = f"the service sent no valid answer: {redact(str(error))}", None
            tries += 1
            if wait is not None and wait > self._remote.max_wait_s:
                return failed(request, f"{problem} (asked to wait {wait:.0f} s)")
            if tries < self._remote.attempts:
                await self._pause(wait, tries)
        return failed(request, problem)

    async def _complete(self, client: "AsyncOpenAI", request: Request, image: str, structured: bool) -> Any:
        picture = {"type": "image_url", "image_url": {"url": image, "detail": self._remote.image_detail}}
        messages: list[Any] = [
            {"role": "system", "content": request.system},
            {"role": "user", "content": [{"type": "text", "text": request.prompt}, picture]},
        ]
        options: dict[str, Any] = {"response_format": _SCHEMA} if structured else {}
        return await client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=self._remote.temperature,
            max_tokens=self._remote.max_tokens,
            seed=self._config.seed + request.attempt - 1,
            **options,
        )

    async def _pause(self, wait: float | None, tries: int) -> None:
        if wait is not None:
            self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
            return
        await asyncio.sleep(min(self._remote.max_wait_s, self._remote.backoff_s * 2 ** (tries - 1)))


def redact(text: str) -> str:
    """Return a message without anything that looks like a key, one line, bounded."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:
        text = text.replace(key, "[key]")
    # OpenAI's own 401 message repeats the key's ends around asterisks.
    return " ".join(re.sub(r"\b(?:sk|key|Bearer)[-_ ][\w*.-]{6,}", "[key]", text).split())[:200]


def _parse(completion: Any, request: Request, structured: bool) -> Reply:
    """The reply in a completion; an unusable one is `rejected`, so that it is asked again."""
    usage = getattr(completion, "usage", None)
    sent = int(getattr(usage, "prompt_tokens", 0) or 0)
    received = int(getattr(usage, "completion_tokens", 0) or 0)
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("no choices")
    choice = choices[0]
    if getattr(choice.message, "refusal", None) or choice.finish_reason == "content_filter":
        return rejected(request, "the model refused", tokens_in=sent, tokens_out=received)
    if choice.finish_reason == "length":
        return rejected(request, "the reply breaks off: it ran into max_tokens", tokens_in=sent, tokens_out=received)
    content = choice.message.content
    if not isinstance(content, str):
        return rejected(request, "the reply is empty", tokens_in=sent, tokens_out=received)
    text = _unwrap(content, structured)
    if text is None:
        return rejected(request, "the reply is not the JSON that was asked for", tokens_in=sent, tokens_out=received)
    return Reply(request, "ok", text, tokens_in=sent, tokens_out=received)


def _unwrap(content: str, structured: bool) -> str | None:
    """The description inside a JSON reply; plain text is fine unless JSON was asked for."""
    bare = re.sub(r"^```\w*\s*|\s*```$", "", content.strip())
    try:
        value = json.loads(bare)
    except ValueError:
        return None if structured or bare.startswith("{") else content
    if isinstance(value, dict) and isinstance(value.get("description"), str):
        return str(value["description"])
    return value if isinstance(value, str) else None


def _refuses_schema(error: "APIStatusError") -> bool:
    words = re.search(r"response_format|json_schema|structured", str(error.message), re.I)
    return error.status_code in (400, 422) and words is not None


def _stop_if_hopeless(error: "APIStatusError", problem: str) -> None:
    """Raise for what no other request will survive."""
    if error.status_code in (401, 403):
        raise RemoteError(f"The key was refused: {problem}.", hint="Check OPENAI_API_KEY.") from None
    if error.status_code == 404:
        raise RemoteError(f"No such model or address: {problem}.", hint="Check --mllm and --base-url.") from None
    if error.status_code == 429 and "insufficient_quota" in f"{error.code} {error.message}":
        raise RemoteError(
            f"The quota is spent: {problem}.", hint="Stored replies are kept; run it again later."
        ) from None


def _retry_after(header: str | None) -> float | None:
    """Seconds in a Retry-After header: a number or an HTTP date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass  # a date then
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


async def _first(pending: set["asyncio.Task[Reply]"]) -> tuple[set["asyncio.Task[Reply]"], set["asyncio.Task[Reply]"]]:
    return await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)


async def _close(client: "AsyncOpenAI", pending: set["asyncio.Task[Reply]"]) -> None:
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.close()
