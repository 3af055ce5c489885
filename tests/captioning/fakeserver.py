"""A chat-completions server on loopback that counts what it sees and misbehaves on order."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.config import CaptionConfig, RemoteConfig

IDENTITY = "The person is a young man with a slim build and tall stature."
CLOTHING = "The person is in a red shirt, blue trousers and white sneakers."


@dataclass
class Answer:
    """What to send: a status, a body (dict -> JSON), headers; and what goes wrong with it.

    Attributes:
        hang: seconds before anything is sent.
        cut: half of the body is sent, then the connection closes.
        reset: nothing is sent, the connection is reset (RST).
        twice: the same response is sent once more after so many seconds; 0.0: in the same segment.
        drip: seconds between two bytes of the body.
        length: added to the Content-Length that the body has.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False
    reset: bool = False
    twice: float | None = None
    drip: float = 0.0
    length: int = 0


@dataclass
class Seen:
    """What came in, one entry per request in order of arrival; `statuses` are what went out."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    connections: int = 0
    busiest: int = 0


def completion(content: Any, *, finish: str = "stop", refusal: str | None = None, model: str = "m") -> Answer:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
    return Answer(body=body)


def described(text: str) -> Answer:
    return completion(json.dumps({"description": text}))


def good(request: dict[str, Any], number: int) -> Answer:
    content = request["messages"][1]["content"]
    asked = content if isinstance(content, str) else content[0]["text"]
    return described(IDENTITY if "identity:" in asked else CLOTHING)


def refused(message: str, status: int = 400, **details: Any) -> Answer:
    return Answer(status, {"error": {"message": message, **details}})


def busy(**headers: str) -> Answer:
    """429 with headers; `retry_after="0.6"` is written `retry-after: 0.6`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(429, {"error": {"message": "slow down"}}, named)


def date_in(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


@contextmanager
def serve(
    answer: Callable[[dict[str, Any], int], Answer] = good, *, seconds: float = 0.0, same_id: bool = False
) -> Iterator[Seen]:
    """A running server. Completions get an id of their own, as everywhere; `same_id` keeps the one they have."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with lock:
                seen.connections += 1

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                seen.requests.append(body)
                seen.times.append(time.monotonic())
                seen.keys.append(self.headers.get("Authorization", ""))
                seen.paths.append(self.path)
                seen.headers.append({name.lower(): value for name, value in self.headers.items()})
                seen.busiest = max(seen.busiest, running)
                number = len(seen.requests)
            time.sleep(seconds)
            reply = answer(body, number)
            time.sleep(reply.hang)
            with lock:
                running -= 1
                seen.statuses.append(0 if reply.reset else reply.status)
            with suppress(OSError):  # the client went away
                self._send(reply, number)

        def _send(self, reply: Answer, number: int) -> None:
            if reply.reset:
                # Closing with unsent data and no patience makes the kernel send RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            content = reply.body
            if isinstance(content, dict) and "choices" in content and not same_id:
                content = {**content, "id": f"chatcmpl-{number}"}
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(payload) + reply.length)}
            lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | reply.headers).items())
            head = f"HTTP/1.1 {reply.status} Fine\r\n{lines}\r\n".encode()
            if reply.cut:
                payload = payload[: len(payload) // 2]
            if reply.drip:
                self.wfile.write(head)
                for byte in payload:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)
                return
            self.wfile.write((head + payload) * (2 if reply.twice == 0 else 1))
            if reply.twice:
                time.sleep(reply.twice)
                self.wfile.write(head + payload)
            if reply.cut or reply.length:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client went away
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):  # we reset it
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    seen = Seen(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


def asked(picture: str, count: int = 1) -> list[Request]:
    return [
        Request(f"image-{index}", picture, "identity", "system", "identity: describe", "d") for index in range(count)
    ]


def ask(url: str, requests: list[Request], **remote: Any) -> list[Reply]:
    """The replies of the remote describer, with short pauses."""
    from reidctl.captioning.backends.openai import OpenAIDescriber

    options = {"backoff_s": 0.01, "attempts": 3, "timeout_s": 5.0} | remote
    config = CaptionConfig(remote=RemoteConfig(base_url=url, **options))
    return list(OpenAIDescriber("gpt-4", config).describe(requests))
