"""Where requests go, with which key, and what the server's refusals mean."""

import logging
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.console import log
from reidctl.errors import RemoteError, UsageError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

# Takes the stream that an answer came over and its body; raises ValueError where the body is not the awaited one.
Judge = Callable[[Any, bytes], Any]
_OFFICIAL = "https://api.openai.com/v1"
_AZURE = (".openai.azure.com", ".services.ai.azure.com", ".cognitiveservices.azure.com", ".openai.azure.us")
_SPENT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_FLAGGED = re.compile(
    r"moderation|content[_ -]?(?:policy|filter)|flagged_input|\b(?:input|prompt|image|content)\b.{0,40}\bflagged\b",
    re.I,
)
_CONNECTIONS = 128  # of one client


def redact(text: str, *secrets: str) -> str:
    """Return a message without `secrets`, anything else that looks like a key, and images: one line, bounded."""
    known = (os.environ.get(name, "") for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY"))
    for secret in {*secrets, *(value.strip() for value in known)}:
        if len(secret) >= 6:
            text = text.replace(secret, "[key]")
    text = re.sub(r"(?:data:image/[\w.+-]*;base64,)?[A-Za-z0-9+/]{120,}=*", "[image]", text)
    # OpenAI's own 401 message repeats the key's ends around asterisks.
    return " ".join(re.sub(r"\b(?:sk|key|Bearer)[-_ ][\w*.-]{6,}", "[key]", text).split())[:200]


@dataclass(frozen=True)
class Connection:
    """Where requests go and with what.

    Attributes:
        base_url: of the server.
        key: empty where none is set; not in the repr.
        key_env: the environment variable that holds it.
        is_azure: whether a key goes into Azure's own header.
        api_version: of Azure's older addresses.
        remote: timeout and concurrency.
    """

    base_url: str
    key: str = field(repr=False)
    key_env: str
    is_azure: bool
    api_version: str | None
    remote: RemoteConfig = field(repr=False)

    @property
    def host(self) -> str:
        """The server's name."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def _is_token(self) -> bool:
        return self.key.count(".") == 2  # Microsoft Entra's are; they go out as bearer

    @property
    def _is_local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    def redact(self, text: str) -> str:
        """Return `redact` of a text, this connection's key included."""
        return redact(text, self.key)

    def client(self, judge: Judge | None = None) -> "AsyncOpenAI":
        """Return a client that tries once: we count the tries and honour long pauses, the library does not.

        Args:
            judge: see `judged`.

        Raises:
            RemoteError: a server that asks for a key, and none in the environment.
        """
        import openai

        if not self.key and (self.is_azure or self.base_url == _OFFICIAL):
            raise RemoteError(f"There is no {self.key_env} in the environment.", hint="Set it, or use --mllm template.")
        if self.key and self.base_url.startswith("http:") and not self._is_local:
            log.warning("caption: the key of %s goes to %s unencrypted", self.key_env, self.host)
        logger = logging.getLogger("openai._base_client")  # at DEBUG its older versions log whole requests
        others = [one for one in logger.filters if not isinstance(getattr(one, "__self__", None), Connection)]
        logger.filters[:] = [*others, self._hide]
        options: dict[str, Any] = {
            "api_key": self.key or "none",  # local servers ask for no key, the library insists on one
            "timeout": self.remote.timeout_s,
            "max_retries": 0,
            "http_client": self._transport(judge),
        }
        if self.api_version:
            address = "base_url" if "/deployments/" in self.base_url else "azure_endpoint"
            options[address] = self.base_url.removesuffix("/openai")
            if self._is_token:
                options["azure_ad_token"] = options.pop("api_key")
            return openai.AsyncAzureOpenAI(api_version=self.api_version, **options)
        return openai.AsyncOpenAI(base_url=self.base_url, **options)

    def clients(self, judge: Judge | None = None) -> "list[AsyncOpenAI]":
        """Return as many clients as the concurrency needs: the work for one request grows with a client's connections.

        Args:
            judge: see `judged`.

        Raises:
            RemoteError: see `client`.
        """
        first = self.client(judge)
        more = range(1, -(-self.remote.concurrency // _CONNECTIONS))
        return [first, *(first.copy(http_client=self._transport(judge)) for _ in more)]

    def _transport(self, judge: Judge | None) -> Any:
        import openai

        # The library stands on httpx, newer versions on httpx2.
        httpx = import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
        transport = openai.DefaultAsyncHttpxClient(
            timeout=self.remote.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            follow_redirects=False,  # neither key nor image goes to a host that nobody named
            # Nothing is encrypted at an http address: a context that trusts nobody saves reading all certificates.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self.base_url.startswith("http:") else True,
            trust_env=not self._is_local,  # no proxy between us and ourselves
        )
        hooks: dict[str, Any] = {} if judge is None else {"response": [_watch(httpx, judge)]}
        if self.is_azure and not self.api_version and not self._is_token:
            hooks["request"] = [self._sign_for_azure]
        transport.event_hooks = hooks
        return transport

    async def _sign_for_azure(self, request: Any) -> None:
        request.headers.pop("Authorization", None)
        request.headers["api-key"] = self.key

    def _hide(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.redact(record.getMessage()), ()
        return True


def connection(config: CaptionConfig) -> Connection:
    """Return where `config.remote` points, with the key from the environment. Nothing is contacted.

    Raises:
        UsageError: OPENAI_BASE_URL is not a plain address, or the key is none.
    """
    remote = config.remote
    named = os.environ.get("OPENAI_BASE_URL", "").strip()
    if not remote.base_url and named:
        try:
            RemoteConfig(base_url=named)
        except ValueError:  # the value may hold a password: it is not repeated
            raise UsageError("OPENAI_BASE_URL is not a plain http(s) address.", hint="Use --base-url.") from None
    base_url = (remote.base_url or named or _OFFICIAL).rstrip("/")
    parts = urlsplit(base_url)
    is_azure = bool(remote.api_version) or (parts.hostname or "").endswith(_AZURE)
    if is_azure and not remote.api_version and parts.path == "":
        base_url += "/openai/v1"
    names = [remote.key_env, *(["AZURE_OPENAI_API_KEY"] if is_azure else [])]
    keys = {name: os.environ.get(name, "").strip() for name in names}
    name = next((name for name in names if keys[name]), names[-1])
    if not re.fullmatch(r"[!-~]*", keys[name]):
        raise UsageError(f"{name} holds characters that no key has.", hint="Set it again, without line breaks.")
    return Connection(base_url, keys[name], name, is_azure, remote.api_version, remote)


def _watch(httpx: Any, judge: Judge) -> Callable[[Any], Awaitable[None]]:
    """A response hook that closes the connection of an answer in doubt before another request can take it.

    Whatever else came over that connection would answer the next request. Afterwards is too late: by then the pool may
    have lent the connection, and closing it breaks off a request that was sent and is paid for.
    """

    class Watched(httpx.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, response: Any) -> None:
            self._stream, self._status, self._headers = response.stream, response.status_code, response.headers
            self._extensions = response.extensions  # of the response itself, which would be a cycle
            self._parts: list[bytes] | None = []
            self._is_whole = False

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self._stream:
                if self._parts is not None:
                    self._parts.append(part)
                yield part
            self._is_whole = True

        async def aclose(self) -> None:
            parts, self._parts = self._parts, None
            if parts is not None and not self._is_good(b"".join(parts)):
                stream = self._extensions.get("network_stream")
                if stream is not None:
                    await stream.aclose()
            await self._stream.aclose()

        def _is_good(self, body: bytes) -> bool:
            if not self._is_whole or self._status >= 300:
                return False
            try:
                if "content-encoding" in self._headers:
                    body = httpx.Response(self._status, headers=self._headers, content=body).content
                self._extensions["judged"] = judge(self._extensions.get("network_stream"), body)
            except (ValueError, RecursionError, httpx.DecodingError) as error:
                self._extensions["doubt"] = error
                return False
            return True

    async def hook(response: Any) -> None:
        response.stream = Watched(response)

    return hook


def judged(response: Any) -> Any:
    """Return what the judge that `Connection.client` got made of a whole answer.

    Raises:
        ValueError: the judge doubts it.
    """
    if "judged" not in response.extensions:
        raise ValueError(str(response.extensions.get("doubt", "the answer breaks off")))
    return response.extensions["judged"]


def is_flagged(error: "APIStatusError") -> bool:
    """Return whether one input was refused for its content, which says nothing about the key or other inputs."""
    if error.code in ("content_filter", "content_policy_violation"):
        return True
    return error.status_code == 403 and _FLAGGED.search(f"{error.code} {error.message} {error.body}"[:4000]) is not None


def stop_if_hopeless(error: "APIStatusError", server: Connection) -> None:
    """Raise for an answer that every other request will get too.

    Raises:
        RemoteError: a refused key, a spent quota, an unknown model or address.
    """
    status = error.status_code
    problem = f"the service answered {status}: {server.redact(error.message)}"
    if status == 402 or any(word in f"{error.code} {error.type} {error.message}" for word in _SPENT):
        raise RemoteError(
            f"The quota is spent: {problem}.", hint="Stored replies are kept; run it again later."
        ) from None
    if status in (401, 403):
        raise RemoteError(f"The key was refused: {problem}.", hint=f"Check {server.key_env}.") from None
    if status in (404, 405):
        raise RemoteError(
            f"No such model or address: {problem}.", hint="Check --mllm and --base-url (.../v1)."
        ) from None
    if 300 <= status < 400:
        target = urlsplit(error.response.headers.get("location", "")).hostname or "another address"
        raise RemoteError(f"{server.host} sends us on to {target}.", hint="Name the final --base-url.") from None


def waiting_time(headers: Mapping[str, str], most: float) -> float | None:
    """Return the seconds that an answer asks us to wait; None where it does not say.

    `Retry-After` counts as it is (seconds or a date; `retry-after-ms` is finer). OpenAI's `x-ratelimit-reset-*`
    (`6m0s`) tell when a whole allowance is back, which is longer than needed, so at most `most` of it is waited.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d+(?:\.\d*)?", value):
            return float(value) * unit
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        pass  # no date either
    resets = [
        _seconds(headers.get(f"x-ratelimit-reset-{of}", ""))
        for of in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{of}", "0") == "0"
    ]
    return min(most, max(resets)) if any(resets) else None


def _seconds(text: str) -> float:
    """The seconds in `1h2m3.5s`, `20ms` or a bare number; 0 for anything else."""
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ms|[dhms])?)+", text):
        return 0.0
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|[dhms])?", text))
