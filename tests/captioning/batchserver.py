"""A server on loopback that speaks files and batches, counts what it is given, and misbehaves on order."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fakeserver import CLOTHING, IDENTITY, completion


@dataclass
class Fault:
    """Instead of an answer, or (`after`) instead of the answer to something that was done."""

    status: int = 500
    body: Any = field(default_factory=lambda: {"error": {"message": "oops"}})
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    reset: bool = False
    cut: bool = False
    after: bool = False


@dataclass
class Ended:
    """What a batch comes to."""

    output: list[Any] | None = None
    errors: list[Any] | None = None
    status: str = "completed"
    problems: list[dict[str, Any]] | None = None


def answer(row: dict[str, Any], *, text: str | None = None, status: int = 200, body: Any = None) -> dict[str, Any]:
    """An output line, laid out as the provider's guide shows it."""
    asked = row["body"]["messages"][1]["content"]
    asked = asked if isinstance(asked, str) else asked[0]["text"]
    good = text or (IDENTITY if "identity:" in asked else CLOTHING)
    body = completion(json.dumps({"description": good})).body if body is None else body
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": row["custom_id"], "response": response, "error": None}


def failure(row: dict[str, Any], code: str) -> dict[str, Any]:
    error = {"code": code, "message": f"it is {code}"}
    return {"id": "batch_req_2", "custom_id": row["custom_id"], "response": None, "error": error}


def all_good(rows: list[dict[str, Any]]) -> Ended:
    return Ended([answer(row) for row in rows])


@dataclass
class Provider:
    """What the tests set, and what they look at.

    `polls`: looks at a batch before it ends. `end(rows)`: what it comes to. `fault(kind, number)`: what goes wrong at
    the n-th call of a kind (upload, create, retrieve, list, content, delete, files, cancel).
    """

    url: str = ""
    polls: int = 0
    end: Callable[[list[dict[str, Any]]], Ended] = all_good
    fault: Callable[[str, int], Fault | None] = lambda kind, number: None
    calls: Counter[str] = field(default_factory=Counter)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    stored: int = 0
    most_open: int = 0
    keys: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def submitted(self) -> Counter[str]:
        """How often each custom id is in a batch."""
        return Counter(row["custom_id"] for row in self.rows)

    def wait_for(self, kind: str, count: int) -> None:
        end = time.monotonic() + 20
        while self.calls[kind] < count:
            assert time.monotonic() < end, f"no {kind}"
            time.sleep(0.005)

    def store(self, name: str, content: bytes) -> str:
        self.stored += 1
        file_id = f"file-{self.stored}"
        self.files[file_id] = (name, content)
        return file_id

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        rows = [json.loads(line) for line in self.files[body["input_file_id"]][1].splitlines()]
        self.rows += rows
        self.sizes.append((len(rows), len(self.files[body["input_file_id"]][1])))
        batch = {
            "id": f"batch_{len(self.batches) + 1}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "request_counts": {"total": len(rows), "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        self.batches[batch["id"]] = batch
        self.most_open = max(self.most_open, len(self.open))
        return batch

    @property
    def open(self) -> list[dict[str, Any]]:
        return [one for one in self.batches.values() if one["status"] in ("validating", "in_progress", "cancelling")]

    def look(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.looks[batch["id"]] += 1
        if batch in self.open:
            batch["status"] = "in_progress"
            if self.looks[batch["id"]] > self.polls:
                self.finish(batch)
        return batch

    def finish(self, batch: dict[str, Any]) -> None:
        rows = [json.loads(line) for line in self.files[batch["input_file_id"]][1].splitlines()]
        ended = self.end(rows)
        for name, lines in (("output_file_id", ended.output), ("error_file_id", ended.errors)):
            if lines is not None:
                batch[name] = self.store("result.jsonl", b"".join(map(_line, lines)))
        batch["status"] = ended.status
        batch["errors"] = {"object": "list", "data": ended.problems} if ended.problems else None
        done, bad = len(ended.output or []), len(ended.errors or [])
        batch["request_counts"] = {"total": len(rows), "completed": done, "failed": bad}

    def respond(self, kind: str, name: str, query: dict[str, list[str]], body: bytes, content_type: str) -> Any:
        """The body of the answer: bytes as they are, anything else as JSON; None for not found."""
        if kind == "upload":
            filename, content = _uploaded(body, content_type)
            file_id = self.store(filename, content)
            return {"id": file_id, "object": "file", "bytes": len(content), "filename": filename, "purpose": "batch"}
        if kind == "create":
            return self.create(json.loads(body))
        if kind == "list":
            known = list(reversed(self.batches.values()))
            after = [batch["id"] for batch in known].index(query["after"][0]) + 1 if "after" in query else 0
            page = known[after : after + 2]  # short pages: a client must follow them
            more = after + 2 < len(known)
            return {"object": "list", "data": page, "has_more": more, "last_id": page[-1]["id"] if page else None}
        if kind == "files":
            listed = [{"id": key, "filename": value[0], "purpose": "batch"} for key, value in self.files.items()]
            return {"object": "list", "data": listed, "has_more": False}
        if kind in ("retrieve", "cancel"):
            batch = self.batches.get(name)
            if kind == "cancel" and batch is not None:
                batch["status"] = "cancelled"
            return batch and (self.look(batch) if kind == "retrieve" else batch)
        if name not in self.files:
            return None
        if kind == "content":
            return self.files[name][1]
        del self.files[name]
        return {"id": name, "object": "file", "deleted": True}


def _line(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


def _uploaded(body: bytes, content_type: str) -> tuple[str, bytes]:
    boundary = content_type.split("boundary=")[1].strip('"').encode()
    for part in body.split(b"--" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if found := re.search(rb'filename="([^"]*)"', head):
            return found[1].decode(), content.removesuffix(b"\r\n")
    raise AssertionError("no file in the upload")


_ROUTES = (
    ("POST", r"/v1/files", "upload"),
    ("GET", r"/v1/files", "files"),
    ("GET", r"/v1/files/([\w-]+)/content", "content"),
    ("DELETE", r"/v1/files/([\w-]+)", "delete"),
    ("POST", r"/v1/batches", "create"),
    ("GET", r"/v1/batches", "list"),
    ("GET", r"/v1/batches/(\w+)", "retrieve"),
    ("POST", r"/v1/batches/(\w+)/cancel", "cancel"),
)


def _route(method: str, path: str) -> tuple[str, str]:
    for verb, pattern, kind in _ROUTES:
        if verb == method and (found := re.fullmatch(pattern, path)):
            return kind, (found.groups() or ("",))[0]
    return "unknown", ""


@contextmanager
def serve_batches(**settings: Any) -> Iterator[Provider]:
    provider = Provider(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes: 40 ms otherwise

        def _handle(self) -> None:
            try:
                self._serve()
            except Exception as error:
                if not isinstance(error, OSError):  # a mistake of this server must not look like an outage
                    self._send(400, {"error": {"message": repr(error)}}, {})

        def _serve(self) -> None:
            address = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind, name = _route(self.command, address.path)
            with provider.lock:
                provider.keys.add(self.headers.get("Authorization", ""))
                fault = provider.fault(kind, provider.calls[kind] + 1)
                answered: Any = None
                if fault is None or fault.after or fault.cut:
                    kind_of_body = self.headers.get("Content-Type", "")
                    answered = provider.respond(kind, name, parse_qs(address.query), body, kind_of_body)
                provider.calls[kind] += 1
            if fault is not None:
                time.sleep(fault.hang)
                if fault.reset:
                    # Linger of zero: the client sees a reset, not an orderly end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                if not fault.cut:
                    self._send(fault.status, fault.body, fault.headers)
                    return
            missing = answered is None
            body_sent = {"error": {"message": "not found"}} if missing else answered
            self._send(404 if missing else 200, body_sent, {}, cut=fault is not None)

        def _send(self, status: int, body: Any, headers: dict[str, str], *, cut: bool = False) -> None:
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json" if not isinstance(body, bytes) else "text/plain")
                self.send_header("Content-Length", str(len(payload)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload[: len(payload) // 2] if cut else payload)
            except OSError:
                pass
            self.close_connection = self.close_connection or cut

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    provider.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
