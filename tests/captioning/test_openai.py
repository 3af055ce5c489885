import asyncio
import base64
import gzip
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import OPENAI_KEY as KEY
from fakeserver import (
    IDENTITY,
    Answer,
    ask,
    asked,
    completion,
    described,
    good,
    refused,
    serve,
)
from PIL import Image

from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.chat import resolve_model
from reidctl.captioning.backends.openai import OpenAIDescriber
from reidctl.captioning.backends.picture import data_url
from reidctl.captioning.backends.server import connection, redact
from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.errors import UsageError

pytestmark = pytest.mark.usefixtures("openai_key")


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


def test_a_refusal_in_fastapis_words_is_understood(picture: str) -> None:
    def no_seed(request: dict[str, Any], number: int) -> Answer:
        detail = [{"loc": ["body", "seed"], "msg": "extra fields not permitted"}]
        return Answer(422, {"detail": detail}) if "seed" in request else good(request, number)

    with serve(no_seed) as seen:
        replies = ask(seen.url, asked(picture, 4), concurrency=1)
    assert [reply.status for reply in replies] == ["ok"] * 4 and len(seen.requests) == 5


@pytest.mark.parametrize("key", ["sk-tést-0123456789", "sk-test-0123\nX-Evil: 1"])
def test_a_key_that_no_key_can_be_is_refused_before_anything_is_sent(
    picture: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve() as seen:
        with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
            ask(seen.url, asked(picture))
        assert not seen.requests and "0123" not in str(caught.value)


def test_the_word_detail_around_a_message_is_no_reason_to_leave_the_field_out(picture: str) -> None:
    answer = Answer(422, {"detail": [{"loc": ["body", "foo"], "msg": "Extra inputs are not permitted"}]})
    with serve(lambda *_: answer) as seen:
        (reply,) = ask(seen.url, asked(picture))
    assert reply.status == "failed" and len(seen.requests) == 1


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


def test_a_refusal_that_repeats_words_of_the_prompt_turns_nothing_off(picture: str) -> None:
    def choosy(request: dict[str, Any], number: int) -> Answer:
        echo = "Invalid prompt: 'a structured blazer, guided by the image'"
        return refused(echo) if number == 1 else good(request, number)

    with serve(choosy) as seen:
        replies = ask(seen.url, asked(picture, 2), concurrency=1)
    assert [reply.status for reply in replies] == ["failed", "ok"]
    assert [body["response_format"]["type"] for body in seen.requests] == ["json_schema"] * 2


@pytest.mark.parametrize("words", ["guided_json is off", "Structured outputs are off", "no structured_output"])
def test_a_refusal_that_names_the_form_turns_it_off(picture: str, words: str) -> None:
    with serve(lambda body, n: refused(words) if "response_format" in body else good(body, n)) as seen:
        assert ask(seen.url, asked(picture))[0].status == "ok"
    assert len(seen.requests) == 3


def test_a_zipped_answer_is_read(picture: str) -> None:
    def zipped(request: dict[str, Any], number: int) -> Answer:
        body = good(request, number).body | {"id": f"chatcmpl-{number}"}
        return Answer(200, gzip.compress(json.dumps(body).encode()), {"Content-Encoding": "gzip"})

    with serve(zipped) as seen:
        replies = ask(seen.url, asked(picture, 4), concurrency=1)
    assert [reply.text for reply in replies] == [IDENTITY] * 4
    assert (len(seen.requests), seen.connections) == (4, 1)


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


def test_redact_hides_whole_and_masked_keys() -> None:
    assert redact(f"key {KEY}.") == "key [key]."
    assert "wxyz" not in redact("Incorrect API key provided: sk-proj-********wxyz.")
