import base64
import io
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from fakeserver import IDENTITY, Answer, completion, described, good, serve
from PIL import Image

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.backends.openai import OpenAIDescriber, redact
from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.errors import RemoteError

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
        (completion("not json at all"), "JSON"),
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
    assert len(seen.requests) == 5


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
