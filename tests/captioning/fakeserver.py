"""A chat-completions server on loopback that counts what it sees and misbehaves on order."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

IDENTITY = "The person is a young man with a slim build and tall stature."
CLOTHING = "The person is in a red shirt, blue trousers and white sneakers."


@dataclass
class Answer:
    """What to send: a status, a body (dict -> JSON), headers; or nothing for `hang` seconds."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False


@dataclass
class Seen:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    busiest: int = 0


def completion(content: str | None, *, finish: str = "stop", refusal: str | None = None) -> Answer:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return Answer(body=body)


def described(text: str) -> Answer:
    return completion(json.dumps({"description": text}))


def good(request: dict[str, Any], number: int) -> Answer:
    asked = request["messages"][1]["content"][0]["text"]
    return described(IDENTITY if "identity:" in asked else CLOTHING)


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Answer] = good, *, seconds: float = 0.0) -> Iterator[Seen]:
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                seen.requests.append(body)
                seen.times.append(time.monotonic())
                seen.keys.append(self.headers.get("Authorization", ""))
                seen.busiest = max(seen.busiest, running)
                number = len(seen.requests)
            time.sleep(seconds)
            reply = answer(body, number)
            time.sleep(reply.hang)
            with lock:
                running -= 1
            payload = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload[: len(payload) // 2] if reply.cut else payload)
                if reply.cut:
                    self.close_connection = True
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    seen = Seen(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
