import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from conftest import OPENAI_KEY as KEY
from fakeserver import (
    Answer,
    ask,
    asked,
    completion,
    described,
    good,
    refused,
    serve,
)

from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.openai import OpenAIDescriber
from reidctl.captioning.backends.picture import data_url
from reidctl.captioning.backends.server import connection
from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.errors import RemoteError

pytestmark = pytest.mark.usefixtures("openai_key")


@pytest.mark.parametrize("fault", ["500", "html", "cut", "hang", "array"])
def test_a_passing_fault_is_tried_again(picture: str, fault: str) -> None:
    faults = {
        "500": Answer(500, {"error": {"message": "oops"}}),
        "html": Answer(200, b"<html>gateway</html>"),
        "cut": Answer(200, completion("x" * 200).body, cut=True),
        "hang": Answer(200, {}, hang=1.0),
        "array": Answer(200, {"choices": []}),
    }
    with serve(lambda request, number: faults[fault] if number == 1 else good(request, number)) as seen:
        (reply,) = ask(seen.url, asked(picture), timeout_s=0.5)
        assert reply.status == "ok", reply
        assert len(seen.requests) == 2


def test_a_lasting_fault_fails_the_item_after_the_allowed_tries(picture: str) -> None:
    with serve(lambda request, number: Answer(503, {"error": {"message": "down"}})) as seen:
        (reply,) = ask(seen.url, asked(picture), attempts=3)
    assert reply.status == "failed" and "503" in str(reply.reason)
    assert len(seen.requests) == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
        (403, {"error": {"message": "forbidden"}}),
        (403, {"error": {"message": "Your account was flagged."}}),
        (404, {"error": {"message": "no such model"}}),
        (429, {"error": {"message": "insufficient_quota", "code": "insufficient_quota"}}),
    ],
)
def test_a_dead_key_stops_at_once_with_exit_code_4(picture: str, status: int, body: dict[str, Any]) -> None:
    with serve(lambda request, number: Answer(status, body)) as seen:
        with pytest.raises(RemoteError) as caught:
            ask(seen.url, asked(picture, 20), concurrency=2)
        assert len(seen.requests) <= 4
    assert caught.value.exit_code == 4
    assert KEY not in str(caught.value)


def test_no_key_stops_before_anything_is_sent(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RemoteError, match="OPENAI_API_KEY"):
        list(OpenAIDescriber("gpt-4", CaptionConfig()).describe(asked(picture)))
    with serve() as seen:  # a local server asks for none
        assert ask(seen.url, asked(picture))[0].status == "ok"
    assert KEY not in seen.keys[0]


def test_a_rejected_request_fails_alone(picture: str) -> None:
    def choosy(request: dict[str, Any], number: int) -> Answer:
        return Answer(400, {"error": {"message": "bad image"}}) if number == 1 else described("fine")

    with serve(choosy) as seen:
        replies = ask(seen.url, asked(picture, 2), concurrency=1)
    assert [reply.status for reply in replies] == ["failed", "ok"]
    assert len(seen.requests) == 2


def test_an_unreachable_server_fails_rows_without_the_key_in_any_log(
    picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        (reply,) = ask("http://127.0.0.1:9/v1", asked(picture), attempts=2)
    assert reply.status == "failed"
    assert KEY not in caplog.text + str(reply.reason)


def test_every_fault_ends_in_exactly_one_reply_per_request(picture: str) -> None:
    faults = [
        Answer(500, {"error": {"message": "oops"}}),
        Answer(200, b""),
        Answer(200, b'{"choices": [{"mess'),
        Answer(200, b"[" * 100_000),
        Answer(reset=True),
        Answer(200, completion("x" * 200).body, cut=True),
        Answer(200, completion("x").body, length=5),
        Answer(200, completion("x").body, drip=0.2),
        Answer(200, b"<html>gateway</html>", {"Content-Type": "text/html"}),
        Answer(409, {"error": {"message": "conflict"}}),
        Answer(200, {}, hang=0.8),
    ]
    fresh = iter(faults)
    lock = threading.Lock()

    def faulty(request: dict[str, Any], number: int) -> Answer:
        with lock:
            return next(fresh, None) or good(request, number)

    with serve(faulty) as seen:
        replies = ask(seen.url, asked(picture, 30), concurrency=6, attempts=12, timeout_s=0.5)
    assert sorted(reply.request.image_id for reply in replies) == sorted(f"image-{index}" for index in range(30))
    assert {reply.status for reply in replies} == {"ok"}
    assert len(seen.requests) == 30 + len(faults)


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_a_reply_that_comes_twice_never_answers_the_next_request(picture: str, delay: float) -> None:
    def twice(request: dict[str, Any], number: int) -> Answer:
        answer = described(f"About {request['messages'][1]['content'][0]['text']}.")
        return replace(answer, twice=delay if number in (2, 5) else None, hang=0.1)

    requests = [Request(f"i{n}", picture, "identity", "s", f"picture {n}", "d") for n in range(8)]
    with serve(twice) as seen:
        replies = ask(seen.url, requests, concurrency=1)
    assert [reply.text for reply in replies] == [f"About picture {n}." for n in range(8)]
    # A duplicate that arrives while nothing is asked makes a new connection; one that arrives later, a second request.
    assert 8 <= len(seen.requests) <= 10
    assert seen.connections == 3


@pytest.mark.parametrize("delay", [0.0, 0.05])
@pytest.mark.parametrize("body", [{"error": {"message": "oops"}}, b"<html>"])
def test_an_error_that_comes_twice_shifts_no_reply(picture: str, delay: float, body: Any) -> None:
    def twice(request: dict[str, Any], number: int) -> Answer:
        if number == 2:
            return Answer(200 if isinstance(body, bytes) else 500, body, twice=delay)
        return replace(described(f"About {request['messages'][1]['content'][0]['text']}."), hang=0.1)

    requests = [Request(f"i{n}", picture, "identity", "s", f"picture {n}", "d") for n in range(5)]
    with serve(twice) as seen:
        replies = ask(seen.url, requests, concurrency=1)
    assert [reply.text for reply in replies] == [f"About picture {n}." for n in range(5)]
    assert len(seen.requests) == 6


def test_a_server_that_always_says_the_same_costs_one_request_more(picture: str) -> None:
    with serve(same_id=True) as seen:
        replies = ask(seen.url, asked(picture, 12), concurrency=2)
    assert [reply.status for reply in replies] == ["ok"] * 12
    assert len(seen.requests) <= 14


def test_a_dead_key_loses_no_reply_that_is_in_or_on_its_way(picture: str) -> None:
    def spent(request: dict[str, Any], number: int) -> Answer:
        if number == 6:
            return refused("You exceeded your current quota", 429, code="insufficient_quota")
        return replace(good(request, number), hang=0.4 if number == 5 else 0.0)

    replies = []
    with serve(spent) as seen:
        config = CaptionConfig(remote=RemoteConfig(base_url=seen.url, concurrency=2))
        with pytest.raises(RemoteError, match="quota"):
            for reply in OpenAIDescriber("gpt-4", config).describe(asked(picture, 20)):
                replies.append(reply)
        assert len(replies) == 5 and len(seen.requests) == 6


def test_a_redirect_carries_neither_key_nor_image_to_another_host(picture: str) -> None:
    def moved(request: dict[str, Any], number: int) -> Answer:
        return Answer(307, {}, {"Location": f"{other.url}/chat/completions"})

    with serve() as other, serve(moved) as seen, pytest.raises(RemoteError, match=r"sends us on to 127\.0\.0\.1"):
        ask(seen.url, asked(picture))
    assert (len(seen.requests), len(other.requests)) == (1, 0)


def test_the_key_comes_from_the_variable_that_is_named(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "another-key-123456")
    refusal = refused("Wrong key another-key-123456", 401)
    with serve(lambda *_: refusal) as seen, pytest.raises(RemoteError, match="MY_KEY") as caught:
        ask(seen.url, asked(picture), key_env="MY_KEY")
    assert seen.keys == ["Bearer another-key-123456"]
    assert "another-key" not in str(caught.value)
    config = CaptionConfig(remote=RemoteConfig(base_url=seen.url, key_env="MY_KEY"))
    assert "another-key" not in repr(connection(config)) + repr(vars(OpenAIDescriber("m", config)))


@pytest.mark.covers(132, 133)
def test_neither_key_nor_image_is_in_the_library_s_own_debug_log(picture: str) -> None:
    program = f"""
import sys
from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.openai import OpenAIDescriber
from reidctl.captioning.config import CaptionConfig, RemoteConfig
import logging
logging.basicConfig(level=logging.DEBUG)
config = CaptionConfig(remote=RemoteConfig(base_url=sys.argv[1], attempts=2, backoff_s=0.01))
for reply in OpenAIDescriber("gpt-4", config).describe([Request("i", {picture!r}, "identity", "s", "identity:", "d")]):
    print(reply.status)
"""
    answers = {1: refused(f"bad gateway for {KEY}", 500)}
    with serve(lambda request, number: answers.get(number) or good(request, number)) as seen:
        environment = os.environ | {"OPENAI_LOG": "debug", "OPENAI_API_KEY": KEY}
        done = subprocess.run(
            [sys.executable, "-c", program, seen.url], capture_output=True, text=True, env=environment, check=True
        )
    assert done.stdout == "ok\n"
    assert "openai._base_client" in done.stderr  # it did log
    sent = seen.requests[0]["messages"][1]["content"][1]["image_url"]["url"]
    assert KEY not in done.stderr and sent[-40:] not in done.stderr and sent[40:80] not in done.stderr


def test_what_older_versions_of_the_library_log_is_shortened(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("openai._base_client")
    server = connection(CaptionConfig(remote=RemoteConfig(base_url="http://127.0.0.1:9/v1")))
    for _ in range(3):
        server.client()
    with caplog.at_level(logging.DEBUG, "openai"):
        logger.debug("Request options: %s", {"api-key": KEY, "url": "data:image/jpeg;base64," + "QUJD" * 5000})
    assert KEY not in caplog.text and "QUJDQUJD" not in caplog.text and "Request options" in caplog.text
    assert sum(isinstance(getattr(one, "__self__", None), type(server)) for one in logger.filters) == 1


def test_closing_stops_at_once_and_leaves_no_thread(picture: str) -> None:
    with serve(lambda r, n: good(r, n) if n == 1 else Answer(200, {}, hang=30.0)) as seen:
        config = CaptionConfig(remote=RemoteConfig(base_url=seen.url, concurrency=4))
        replies = OpenAIDescriber("gpt-4", config).describe(asked(picture, 20))
        assert next(replies).status == "ok"
        started = time.monotonic()
        replies.close()
        assert time.monotonic() - started < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "openai"]


def test_closing_while_pictures_are_encoded_is_silent(
    picture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(*_: Any, **__: Any) -> str:
        time.sleep(0.4)
        return data_url(picture, 64)

    with serve() as seen:
        config = CaptionConfig(remote=RemoteConfig(base_url=seen.url, concurrency=8))
        many = [replace(request, image_path=f"{n}") for n, request in enumerate(asked(picture, 8))]
        monkeypatch.setattr("reidctl.captioning.backends.picture.data_url", slow)
        replies = OpenAIDescriber("gpt-4", config).describe(many)
        assert next(replies).status == "ok"
        replies.close()
        time.sleep(0.6)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_filter_of_the_service_is_a_refusal(picture: str) -> None:
    with serve(lambda *_: refused("The response was filtered.", code="content_filter")) as seen:
        (reply,) = ask(seen.url, asked(picture))
    assert (reply.status, reply.reason) == ("rejected", "the model refused")
    assert len(seen.requests) == 1


def test_a_key_that_leaves_the_machine_unencrypted_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for address in ("http://127.0.0.1:8000/v1", "https://vllm.example.org/v1", "http://vllm.example.org/v1"):
        connection(CaptionConfig(remote=RemoteConfig(base_url=address))).client()
    assert [line for line in caplog.messages if "unencrypted" in line] == [
        "caption: the key of OPENAI_API_KEY goes to vllm.example.org unencrypted"
    ]


def test_an_interrupt_reaches_the_caller_while_it_waits(picture: str) -> None:
    sent: list[float] = []

    def interrupt() -> None:
        while len(seen.requests) < 4:
            time.sleep(0.02)
        time.sleep(0.2)  # the caller waits for a reply by now
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with serve(lambda r, n: Answer(200, {}, hang=30.0)) as seen:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask(seen.url, asked(picture, 4), concurrency=4, attempts=1, timeout_s=15.0)
    assert time.monotonic() - sent[0] < 3


@pytest.mark.covers(132)
def test_an_error_closes_no_connection_that_another_request_has_taken(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: Counter[str] = Counter()
    lock, chance = threading.Lock(), random.Random(0)
    send = OpenAIDescriber._send

    async def counted(self: OpenAIDescriber, *args: Any) -> Any:
        try:
            answer = await send(self, *args)
        except Exception as error:
            tries[type(error).__name__] += 1
            raise
        tries["ok"] += 1
        return answer

    def faulty(request: dict[str, Any], number: int) -> Answer:
        with lock:
            kind = chance.random()
        if kind < 0.3:
            return refused("down", 503)
        return Answer(200, b"<html>") if kind < 0.4 else replace(good(request, number), hang=0.1)

    monkeypatch.setattr(OpenAIDescriber, "_send", counted)
    with serve(faulty) as seen:
        replies = ask(seen.url, asked(picture, 400), concurrency=64, attempts=30, image_side=32, timeout_s=30.0)
    assert [reply.status for reply in replies] == ["ok"] * 400
    assert set(tries) == {"ok", "InternalServerError", "ValueError"} and tries["ok"] == 400
    assert len(seen.requests) == tries.total()  # nothing was asked, and paid, twice
    assert seen.statuses.count(503) == tries["InternalServerError"]


def test_a_dead_key_at_a_high_concurrency_stops_with_what_is_under_way(picture: str) -> None:
    started = time.monotonic()
    with serve(lambda *_: replace(refused("Incorrect API key", 401), hang=0.1)) as seen:
        with pytest.raises(RemoteError, match="key was refused"):
            ask(seen.url, asked(picture, 2000), concurrency=64)
        assert len(seen.requests) <= 64
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "openai"]


@pytest.mark.parametrize(
    "error",
    [
        {"message": 'openai/gpt-4o requires moderation on OpenAI. Your input was flagged for "violence".', "code": 403},
        {"message": "Forbidden", "code": 403, "metadata": {"reasons": ["sexual"], "flagged_input": "a"}},
        {"message": "no", "code": "content_policy_violation"},
    ],
)
def test_one_input_that_a_gateway_flags_says_nothing_about_the_key(picture: str, error: dict[str, Any]) -> None:
    with serve(lambda body, n: Answer(403, {"error": error}) if n == 1 else good(body, n)) as seen:
        first, second = ask(seen.url, asked(picture, 2), concurrency=1)
    assert (first.status, first.reason, second.status) == ("rejected", "the model refused", "ok")
    assert len(seen.requests) == 2


def test_half_a_character_in_a_prompt_fails_at_once_and_alone(picture: str) -> None:
    broken = replace(asked(picture)[0], prompt="identity: \ud83d")
    with serve() as seen:
        replies = ask(seen.url, [broken, *asked(picture)], concurrency=1, backoff_s=5.0)
    assert [(reply.status, reply.own_fault) for reply in replies] == [("failed", True), ("ok", False)]
    assert "half a character" in str(replies[0].reason) and len(seen.requests) == 1


def test_only_a_timeout_is_called_one(picture: str) -> None:
    with serve(lambda *_: Answer(reset=True)) as seen:
        (reply,) = ask(seen.url, asked(picture), attempts=1)
    assert "nothing within" not in str(reply.reason) and "Error: " in str(reply.reason)
    with serve(lambda *_: Answer(200, {}, hang=1.0)) as seen:
        (reply,) = ask(seen.url, asked(picture), attempts=1, timeout_s=0.3)
    assert "nothing within 0.3 s" in str(reply.reason)
