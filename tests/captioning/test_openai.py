import asyncio
import base64
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakeserver import IDENTITY, Answer, busy, completion, date_in, described, good, refused, serve
from PIL import Image

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.backends.chat import parse_completion, resolve_model, unwrap_description
from reidctl.captioning.backends.openai import OpenAIDescriber
from reidctl.captioning.backends.picture import data_url
from reidctl.captioning.backends.server import connection, redact, waiting_time
from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.errors import RemoteError, UsageError

KEY = "sk-test-0123456789abcdefSECRET"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "person.png"
    Image.new("RGB", (300, 900), (10, 20, 30)).save(path)
    return str(path)


def asked(picture: str, count: int = 1) -> list[Request]:
    return [
        Request(f"image-{index}", picture, "identity", "system", "identity: describe", "d") for index in range(count)
    ]


def ask(url: str, requests: list[Request], **remote: Any) -> list[Reply]:
    options = {"backoff_s": 0.01, "attempts": 3, "timeout_s": 5.0} | remote
    config = CaptionConfig(remote=RemoteConfig(base_url=url, **options))
    return list(OpenAIDescriber("gpt-4", config).describe(requests))


@pytest.mark.covers(132, 133)
def test_a_request_carries_image_prompt_settings_and_schema(picture: str) -> None:
    with serve() as seen:
        (reply,) = ask(seen.url, asked(picture), temperature=0.7, max_tokens=77, image_side=128, image_detail="high")
    assert (reply.status, reply.text, reply.tokens_in, reply.tokens_out) == ("ok", IDENTITY, 100, 20)
    (body,) = seen.requests
    assert body["model"] == "gpt-4o"
    assert (body["temperature"], body["max_tokens"]) == (0.7, 77)
    assert body["response_format"]["type"] == "json_schema"
    text, image = body["messages"][1]["content"]
    assert text["text"] == "identity: describe" and image["image_url"]["detail"] == "high"
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",", 1)[1])))
    assert max(sent.size) == 128


def test_no_metadata_of_the_photo_leaves_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "home address"
    Image.new("RGB", (32, 64)).save(path, exif=exif)
    with serve() as seen:
        ask(seen.url, asked(str(path)))
    url = seen.requests[0]["messages"][1]["content"][1]["image_url"]["url"]
    assert b"home address" not in base64.b64decode(url.split(",", 1)[1])


def test_requests_run_side_by_side_up_to_the_bound(picture: str) -> None:
    with serve(seconds=0.1) as seen:
        started = time.monotonic()
        replies = ask(seen.url, asked(picture, 24), concurrency=8)
        elapsed = time.monotonic() - started
    assert len(replies) == len(seen.requests) == 24
    assert 4 <= seen.busiest <= 8
    assert elapsed < 24 * 0.1


def test_retry_after_holds_back_every_request(picture: str) -> None:
    def busy(request: dict[str, Any], number: int) -> Answer:
        return (
            Answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.6"})
            if number == 1
            else good(request, number)
        )

    with serve(busy) as seen:
        replies = ask(seen.url, asked(picture, 3), concurrency=1)
    assert [reply.status for reply in replies] == ["ok"] * 3
    assert len(seen.requests) == 4
    assert seen.times[1] - seen.times[0] >= 0.55


def test_a_longer_retry_after_than_we_wait_fails_the_item(picture: str) -> None:
    busy = Answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "3600"})
    with serve(lambda request, number: busy) as seen:
        (reply,) = ask(seen.url, asked(picture), max_wait_s=1.0)
    assert reply.status == "failed" and "3600" in str(reply.reason)
    assert len(seen.requests) == 1


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


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(None, refusal="I can't help with that."), "refused"),
        (completion("", finish="content_filter"), "refused"),
        (completion('{"description": "The per', finish="length"), "breaks off"),
        (completion('{"description": "The per'), "JSON"),
        (completion('{"other": 1}'), "JSON"),
        (completion(None), "empty"),
    ],
)
def test_an_unusable_answer_is_rejected_not_failed(picture: str, answer: Answer, reason: str) -> None:
    with serve(lambda request, number: answer) as seen:
        (reply,) = ask(seen.url, asked(picture))
    assert reply.status == "rejected" and reason in str(reply.reason)
    assert reply.tokens_in == 100
    assert len(seen.requests) == 1


def test_a_server_without_structured_output_is_asked_in_plain_text(picture: str) -> None:
    def plain(request: dict[str, Any], number: int) -> Answer:
        if "response_format" in request:
            return Answer(400, {"error": {"message": "response_format is not supported"}})
        return completion("Just a text.")

    with serve(plain) as seen:
        replies = ask(seen.url, asked(picture, 4), concurrency=1)
    assert [reply.text for reply in replies] == ["Just a text."] * 4
    assert len(seen.requests) == 6  # refused by schema, as an object, then never again


def test_a_rejected_request_fails_alone(picture: str) -> None:
    def choosy(request: dict[str, Any], number: int) -> Answer:
        return Answer(400, {"error": {"message": "bad image"}}) if number == 1 else described("fine")

    with serve(choosy) as seen:
        replies = ask(seen.url, asked(picture, 2), concurrency=1)
    assert [reply.status for reply in replies] == ["failed", "ok"]
    assert len(seen.requests) == 2


def test_a_damaged_image_is_a_failed_row_and_is_not_sent(tmp_path: Path, picture: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    requests = [
        Request("a", str(broken), "identity", "s", "p", "d"),
        Request("b", str(tmp_path), "identity", "s", "p", "d"),
    ]
    with serve() as seen:
        replies = ask(seen.url, requests + asked(picture))
    assert sorted(reply.status for reply in replies) == ["failed", "failed", "ok"]
    assert len(seen.requests) == 1


def test_an_unreachable_server_fails_rows_without_the_key_in_any_log(
    picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        (reply,) = ask("http://127.0.0.1:9/v1", asked(picture), attempts=2)
    assert reply.status == "failed"
    assert KEY not in caplog.text + str(reply.reason)


def test_redact_hides_whole_and_masked_keys() -> None:
    assert redact(f"key {KEY}.") == "key [key]."
    assert "wxyz" not in redact("Incorrect API key provided: sk-proj-********wxyz.")


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


def test_the_word_detail_around_a_message_is_no_reason_to_leave_the_field_out(picture: str) -> None:
    answer = Answer(422, {"detail": [{"loc": ["body", "foo"], "msg": "Extra inputs are not permitted"}]})
    with serve(lambda *_: answer) as seen:
        (reply,) = ask(seen.url, asked(picture))
    assert reply.status == "failed" and len(seen.requests) == 1


def test_a_server_that_always_says_the_same_costs_one_request_more(picture: str) -> None:
    with serve(same_id=True) as seen:
        replies = ask(seen.url, asked(picture, 12), concurrency=2)
    assert [reply.status for reply in replies] == ["ok"] * 12
    assert len(seen.requests) <= 14


def test_a_pause_may_be_named_in_seconds_milliseconds_or_as_a_date() -> None:
    for headers in ({"retry-after": date_in(600)}, {"retry-after-ms": "600000"}, {"retry-after": "600"}):
        assert waiting_time(headers, 120.0) == pytest.approx(600, abs=5)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-reset-requests": "1m30.5s"}, 90.5),
        ({"x-ratelimit-reset-requests": "6m0s"}, 120.0),  # the whole allowance: more than we ever wait
        ({"x-ratelimit-reset-requests": "20ms", "x-ratelimit-reset-tokens": "1h"}, 120.0),
        (
            {"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "1h", "x-ratelimit-remaining-tokens": "9"},
            2.0,
        ),
        ({"retry-after": "3", "x-ratelimit-reset-requests": "6m0s"}, 3.0),
        ({"x-ratelimit-reset-requests": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-5"}, None),
        ({}, None),
    ],
)
def test_the_reset_of_an_allowance_counts_where_no_pause_is_named(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert waiting_time(headers, 120.0) == seconds


@pytest.mark.parametrize(
    "headers", [{"retry_after_ms": "500"}, {"retry_after": date_in(0)}, {"x_ratelimit_reset_requests": "500ms"}]
)
def test_each_form_of_a_pause_is_kept(picture: str, headers: dict[str, str]) -> None:
    shortest = 0.45
    if "retry_after" in headers:  # dates have whole seconds
        headers, shortest = {"retry_after": date_in(2)}, 0.9
    with serve(lambda request, number: busy(**headers) if number == 1 else good(request, number)) as seen:
        replies = ask(seen.url, asked(picture, 2), concurrency=1)
    assert [reply.status for reply in replies] == ["ok", "ok"]
    assert len(seen.requests) == 3
    assert seen.times[1] - seen.times[0] >= shortest


def test_after_a_storm_of_refusals_requests_come_back_a_few_at_a_time(picture: str) -> None:
    def storm(request: dict[str, Any], number: int) -> Answer:
        return busy(retry_after="0.4") if number <= 32 else replace(good(request, number), hang=0.15)

    with serve(storm) as seen:
        replies = ask(seen.url, asked(picture, 64), concurrency=32)
    assert [reply.status for reply in replies] == ["ok"] * 64
    assert len(seen.requests) == 32 + 64
    after = sorted(when - seen.times[32] for when in seen.times[32:])
    assert after[0] - (seen.times[0] - seen.times[32]) >= 0.35
    assert sum(when < 0.1 for when in after) <= 8  # a quarter of 32
    assert len(after) == 64


def strict(**refusals: str) -> Callable[[dict[str, Any], int], Answer]:
    """A server that refuses fields by name, in OpenAI's words."""

    def answer(request: dict[str, Any], number: int) -> Answer:
        for name, message in refusals.items():
            if name in request or (name == "detail" and '"detail"' in json.dumps(request["messages"])):
                return refused(message, param=name, code="unsupported_parameter")
        return described(IDENTITY)

    return answer


def test_what_a_server_refuses_is_learned_once_for_all_requests(picture: str, caplog: pytest.LogCaptureFixture) -> None:
    server = strict(
        max_tokens="Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
        temperature="Unsupported value: 'temperature' does not support 0.4 with this model. Only the default is.",
        seed="Extra inputs are not permitted: seed",
        detail="Unknown parameter: 'detail'.",
    )
    with serve(server) as seen, caplog.at_level(logging.INFO, "reidctl"):
        replies = ask(seen.url, asked(picture, 20), concurrency=1, max_tokens=77)
    assert [reply.status for reply in replies] == ["ok"] * 20
    assert len(seen.requests) == 24
    assert sum("refuses a field" in line for line in caplog.messages) == 4
    last = seen.requests[-1]
    assert last["max_completion_tokens"] == 77
    assert not {"max_tokens", "temperature", "seed"} & set(last)
    assert last["response_format"]["type"] == "json_schema"


def test_requests_in_flight_learn_together(picture: str) -> None:
    with serve(strict(seed="seed is not supported"), seconds=0.1) as seen:
        replies = ask(seen.url, asked(picture, 40), concurrency=8)
    assert [reply.status for reply in replies] == ["ok"] * 40
    assert len(seen.requests) <= 48


def test_a_server_may_lack_the_schema_and_still_write_json(picture: str) -> None:
    def half(request: dict[str, Any], number: int) -> Answer:
        form = request["response_format"]["type"]
        return refused("json_schema is not available") if form == "json_schema" else described(IDENTITY)

    with serve(half) as seen:
        replies = ask(seen.url, asked(picture, 3), concurrency=1)
    assert [reply.text for reply in replies] == [IDENTITY] * 3
    assert len(seen.requests) == 4
    assert "JSON" in seen.requests[-1]["messages"][0]["content"]
    assert "JSON" not in seen.requests[0]["messages"][0]["content"]


def test_a_server_that_refuses_everything_is_asked_a_bounded_number_of_times(picture: str) -> None:
    words = "response_format max_tokens temperature seed detail are not supported"
    with serve(lambda request, number: refused(words)) as seen:
        replies = ask(seen.url, asked(picture, 2), concurrency=1)
    assert [reply.status for reply in replies] == ["failed", "failed"]
    assert len(seen.requests) == 8


def test_a_limit_that_is_too_high_is_no_reason_to_rename_it(picture: str) -> None:
    answer = refused("max_tokens is too large: 9000. This model allows at most 4096.", param="max_tokens")
    with serve(lambda request, number: answer) as seen:
        (reply,) = ask(seen.url, asked(picture), max_tokens=9000)
    assert reply.status == "failed" and "too large" in str(reply.reason)
    assert len(seen.requests) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"description": "A man."}', "A man."),
        ('```json\n{"description": "A man."}\n```', "A man."),
        ('Here it is: {"description": "A man."} I hope it helps.', "A man."),
        ("<think>Is it a man? {...}</think>\nA man.", "A man."),
        ("It may be a man.</think>A man.", "A man."),
        ('<think>a</think><think>b</think>{"description": "A man."}', "A man."),
        ("A man.", "A man."),
        ('"A man."', "A man."),
        ('"Red" is the coat of the man.', '"Red" is the coat of the man.'),
        ("A man with a {logo} shirt.", "A man with a {logo} shirt."),
        ('{"description": 5}', None),
        ('{"text": "A man."}', None),
        ('{"description": "A ma', None),
        ("[1]", None),
        ("{" * 50_000, None),
    ],
)
def test_the_description_is_found_in_what_models_wrap_it_in(content: str, text: str | None) -> None:
    assert unwrap_description(content, structured=True) == text


@pytest.mark.parametrize("body", [None, [], "text", {}, {"choices": None}, {"choices": [None]}, {"choices": [{}]}])
def test_what_is_no_completion_is_an_error_and_not_a_reply(body: Any) -> None:
    with pytest.raises(ValueError):
        parse_completion(body, asked("")[0], structured=True)


def test_a_reply_in_parts_and_without_usage_is_read() -> None:
    parts = [{"type": "text", "text": "A tall "}, {"type": "text", "text": "man."}]
    body = {"choices": [{"message": {"content": parts}}], "usage": {"prompt_tokens": None}}
    reply = parse_completion(body, asked("")[0], structured=False)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("A tall man.", 0, 0)


def test_thinking_that_never_ends_is_an_empty_reply() -> None:
    reply = parse_completion(completion("<think>hm, well").body, asked("")[0], structured=False)
    assert (reply.status, reply.reason) == ("rejected", "the reply is empty")


def test_gpt4_is_resolved_told_and_recorded(picture: str, caplog: pytest.LogCaptureFixture) -> None:
    with serve(lambda *_: completion("A man.", model="gpt-4o-2024-08-06")) as seen:
        describer = OpenAIDescriber("gpt-4", CaptionConfig(remote=RemoteConfig(base_url=seen.url)))
        with caplog.at_level(logging.INFO, "reidctl"):
            list(describer.describe(asked(picture, 3)))
    assert describer.model == seen.requests[0]["model"] == "gpt-4o"
    assert sum("gpt-4 means gpt-4o here" in line for line in caplog.messages) == 1
    assert sum("gpt-4o answers as gpt-4o-2024-08-06" in line for line in caplog.messages) == 1
    assert [resolve_model(name) for name in ("GPT-4", "gpt-4.1", "qwen2-vl")] == ["gpt-4o", "gpt-4.1", "qwen2-vl"]


def test_a_request_without_an_image_is_text_alone(picture: str) -> None:
    with serve() as seen:
        (reply,) = ask(seen.url, [replace(asked(picture)[0], image_path="", prompt="identity: rewrite")])
    assert reply.text == IDENTITY
    assert seen.requests[0]["messages"][1] == {"role": "user", "content": "identity: rewrite"}


def test_further_fields_are_sent_but_replace_neither_model_nor_messages(picture: str) -> None:
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "model": "x",
        "messages": [],
        "stream": True,
        "top_p": 1,
    }
    with serve() as seen:
        ask(seen.url, asked(picture), extra=extra)
    (body,) = seen.requests
    assert (body["model"], body["top_p"]) == ("gpt-4o", 1)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(body["messages"]) == 2 and "stream" not in body


@pytest.mark.parametrize(("status", "words"), [(413, "Payload Too Large"), (400, "The image is too large.")])
def test_an_image_that_is_too_large_is_sent_once_more_at_half_the_size(picture: str, status: int, words: str) -> None:
    def width(body: dict[str, Any]) -> int:
        url = body["messages"][1]["content"][1]["image_url"]["url"]
        return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).height

    with serve(lambda body, n: refused(words, status) if width(body) > 300 else good(body, n)) as seen:
        assert ask(seen.url, asked(picture), image_side=512)[0].status == "ok"
    assert [width(body) for body in seen.requests] == [512, 256]
    with serve(lambda body, n: refused(words, status)) as seen:
        assert ask(seen.url, asked(picture), image_side=512)[0].status == "failed"
    assert len(seen.requests) == 2


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


def test_azure_s_older_addresses_name_the_deployment_and_the_version(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    with serve() as seen:
        (reply,) = ask(seen.url.removesuffix("/v1"), asked(picture), api_version="2024-10-21")
    assert reply.status == "ok"
    # A deployment bears the name its owner gave it: `gpt-4` stays `gpt-4`.
    assert seen.paths == ["/openai/deployments/gpt-4/chat/completions?api-version=2024-10-21"]
    assert seen.headers[0]["api-key"] == KEY and "authorization" not in seen.headers[0]
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "eyJhead.eyJbody.signature")
    with serve() as seen:
        ask(seen.url.removesuffix("/v1"), asked(picture), api_version="2024-10-21")
    assert seen.keys == ["Bearer eyJhead.eyJbody.signature"] and "api-key" not in seen.headers[0]


def test_azure_s_newer_address_gets_a_key_in_its_own_header_and_a_token_as_bearer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = connection(CaptionConfig(remote=RemoteConfig(base_url="https://name.openai.azure.com")))
    assert (server.base_url, server.is_azure) == ("https://name.openai.azure.com/openai/v1", True)
    with serve() as seen:
        for key in (KEY, "eyJhead.eyJbody.signature"):
            client = replace(server, base_url=seen.url, key=key).client()
            asyncio.run(_hello(client))
    assert seen.headers[0]["api-key"] == KEY and "authorization" not in seen.headers[0]
    assert seen.headers[1]["authorization"] == "Bearer eyJhead.eyJbody.signature"
    assert "api-key" not in seen.headers[1]


@pytest.mark.parametrize("version", [None, "2024-10-21"])
def test_a_high_concurrency_is_spread_over_clients_that_are_all_alike(version: str | None) -> None:
    with serve() as seen:
        remote = RemoteConfig(base_url=seen.url, concurrency=1024, api_version=version)
        server = replace(connection(CaptionConfig(remote=remote)), is_azure=True)
        clients = server.clients()
        for client in clients:
            assert client.max_retries == 0
            asyncio.run(_hello(client))
    assert len(clients) == 8
    assert all(headers["api-key"] == KEY and "authorization" not in headers for headers in seen.headers)
    assert len(set(seen.paths)) == 1


async def _hello(client: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "identity: hello"}]
    await client.chat.completions.create(model="m", messages=messages)
    await client.close()


def test_the_address_may_come_from_the_environment_and_is_checked(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as seen:
        monkeypatch.setenv("OPENAI_BASE_URL", seen.url)
        config = CaptionConfig(remote=RemoteConfig())
        assert [reply.status for reply in OpenAIDescriber("gpt-4", config).describe(asked(picture))] == ["ok"]
    monkeypatch.setenv("OPENAI_BASE_URL", "https://user:secret-password@example.org/v1")
    with pytest.raises(UsageError) as caught:
        connection(config)
    assert "secret-password" not in str(caught.value)


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


def test_the_source_is_read_in_the_callers_thread_and_never_ahead_of_the_bound(picture: str) -> None:
    taken: list[int] = []
    answered = 0

    def source() -> Iterator[Request]:
        for request in asked(picture, 30):
            assert threading.current_thread() is threading.main_thread()
            taken.append(len(taken) - answered)
            yield request

    with serve() as seen:
        config = CaptionConfig(remote=RemoteConfig(base_url=seen.url, concurrency=4))
        for _ in OpenAIDescriber("gpt-4", config).describe(source()):
            answered += 1
    assert answered == 30
    assert max(taken) <= 3  # three others unanswered when the fourth is taken


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


def test_the_connections_do_not_bound_the_requests_in_flight(picture: str) -> None:
    with serve(seconds=1.0) as seen:
        replies = ask(seen.url, asked(picture, 150), concurrency=150, timeout_s=30.0)
    assert [reply.status for reply in replies] == ["ok"] * 150
    assert seen.busiest > 110


def test_the_two_texts_of_an_image_share_one_encoding(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def counted(path: str, *args: Any, **options: Any) -> str:
        encoded.append(threading.current_thread().name)
        return data_url(path, *args, **options)

    monkeypatch.setattr("reidctl.captioning.backends.picture.data_url", counted)
    identity = asked(picture)[0]
    with serve() as seen:
        ask(seen.url, [identity, replace(identity, kind="clothing")], concurrency=2)
    assert len(seen.requests) == 2
    assert len(encoded) == 1 and encoded[0].startswith("picture")
