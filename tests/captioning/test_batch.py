import json
import logging
import os
import random
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from batchclient import KEY, Store, asked, run, settings
from batchserver import Ended, all_good, answer, failure, serve_batches
from fakeserver import CLOTHING, IDENTITY, completion, serve
from PIL import Image

from reidctl.captioning.backends.base import Request, make_describer
from reidctl.captioning.backends.batch import BatchDescriber, cancel_all, open_requests
from reidctl.captioning.backends.batch_state import RequestFile, custom_id
from reidctl.captioning.backends.openai import OpenAIDescriber
from reidctl.captioning.config import BatchConfig, CaptionConfig, StyleConfig
from reidctl.captioning.run import caption_images
from reidctl.errors import RemoteError

pytestmark = pytest.mark.usefixtures("openai_key")


@pytest.mark.covers(132)
def test_a_round_submits_waits_and_matches_every_reply(tmp_path: Path, picture: str) -> None:
    requests = asked(picture)
    with serve_batches(polls=2) as provider:
        replies = run(tmp_path, settings(provider.url), requests)
    assert sorted(reply.request.key for reply in replies) == sorted(request.key for request in requests)
    texts = {"identity": IDENTITY, "clothing": CLOTHING}
    assert all((reply.status, reply.text) == ("ok", texts[reply.request.kind]) for reply in replies)
    assert all((reply.tokens_in, reply.tokens_out) == (100, 20) for reply in replies)
    assert (provider.calls["upload"], provider.calls["create"], provider.calls["retrieve"]) == (1, 1, 3)
    assert set(provider.submitted.values()) == {1}
    assert all(re_custom(row["custom_id"]) for row in provider.rows)
    assert open_requests(tmp_path) == 0
    # The images are gone here and there; the state remembers the batch.
    assert {path.name for path in tmp_path.iterdir()} == {"batches.jsonl", "stored.jsonl", "person.png"}
    assert [name for name, _ in provider.files.values()] == ["result.jsonl"]


def re_custom(name: str) -> bool:
    return len(name) <= 64 and set(name) <= set("0123456789abcdef")


@pytest.mark.covers(132)
def test_a_batch_asks_what_the_chat_backend_asks_and_reads_it_alike(tmp_path: Path, picture: str) -> None:
    requests = asked(picture, 1)
    with serve_batches() as provider, serve() as chat:
        config = settings(provider.url)
        describer = BatchDescriber("gpt-4", config, tmp_path)
        by_batch = list(describer.describe(requests))
        direct = OpenAIDescriber("gpt-4", settings(chat.url))
        directly = list(direct.describe(requests))
    assert (describer.name, describer.model, describer.source) == (direct.name, direct.model, direct.source)
    assert describer.deferred and not direct.deferred

    def ordered(bodies: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps(body, sort_keys=True) for body in bodies)

    assert ordered([row["body"] for row in provider.rows]) == ordered(chat.requests)
    assert sorted(by_batch, key=lambda reply: reply.request.kind) == sorted(
        directly, key=lambda reply: reply.request.kind
    )


def test_make_describer_gives_the_batch_backend(tmp_path: Path) -> None:
    describer = make_describer(settings("http://127.0.0.1:9/v1"), tmp_path)
    assert isinstance(describer, BatchDescriber) and describer.model == "gpt-4o"


def test_every_attempt_has_its_own_id(picture: str) -> None:
    first = asked(picture, 1)[0]
    again = Request(**{**first.__dict__, "attempt": 2})
    other = Request(**{**first.__dict__, "image_version": "2"})
    assert len({custom_id(first), custom_id(again), custom_id(other)}) == 3


def test_batches_respect_count_bytes_and_how_many_are_open(tmp_path: Path, picture: str) -> None:
    requests = asked(picture, 10)
    with serve_batches(polls=1) as provider:
        replies = run(tmp_path, settings(provider.url, requests=3, open=2), requests)
    assert len(replies) == 20 and set(provider.submitted.values()) == {1}
    assert [count for count, _ in provider.sizes] == [3, 3, 3, 3, 3, 3, 2]
    assert provider.most_open == 2


def test_a_file_of_requests_stays_below_its_bytes_and_belongs_to_nobody_else(tmp_path: Path) -> None:
    file = RequestFile(tmp_path, 10, 1000)
    added = [file.add(f"{number:040d}", {"text": "x" * 200}) for number in range(5)]
    with pytest.raises(ValueError, match="bytes"):
        file.add("0" * 40, {"text": "x" * 2000})
    file.stream.flush()
    status = os.fstat(file.stream.fileno())
    assert added == [True, True, True, False, False]
    assert status.st_size <= 1000 and stat.S_IMODE(status.st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []  # without a name: nothing is left after a kill
    file.close()


def test_batches_are_cut_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.frombytes("RGB", (600, 600), random.Random(0).randbytes(600 * 600 * 3)).save(path)
    with serve_batches() as provider:
        config = settings(provider.url, megabytes=1, remote={"image_side": None, "image_quality": 95})
        assert len(run(tmp_path, config, asked(str(path), 3))) == 6
    assert len(provider.sizes) > 1 and max(size for _, size in provider.sizes) <= 1_000_000


def test_requests_are_read_no_further_than_the_open_batches_reach(tmp_path: Path, picture: str) -> None:
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in asked(picture, 50):
            pulled += 1
            yield request

    with serve_batches() as provider:
        config = settings(provider.url, requests=4, open=2)
        with closing(BatchDescriber("gpt-4", config, tmp_path).describe(source())) as replies:
            next(replies)
    assert pulled <= 10


def test_output_in_any_order_with_repeats_strangers_and_rubbish(
    tmp_path: Path, picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    def mixed(rows: list[dict[str, Any]]) -> Ended:
        lines: list[Any] = [answer(row) for row in reversed(rows)]
        lines.insert(1, answer(rows[-1], text="A second answer to the same request."))
        lines.insert(2, answer({**rows[0], "custom_id": "../../etc/passwd"}))
        return Ended([b"not json\n", b"[1]\n", b'{"custom_id": 7}\n', b"\xff\xfe\n", b"[" * 9999 + b"\n", *lines])

    requests = asked(picture)
    with serve_batches(end=mixed) as provider, caplog.at_level(logging.WARNING):
        replies = run(tmp_path, settings(provider.url), requests)
    assert Counter(reply.request.key for reply in replies) == Counter(request.key for request in requests)
    assert {reply.text for reply in replies} == {IDENTITY, CLOTHING}
    assert "5 malformed, 1 unknown, 1 duplicate" in caplog.text


def test_a_missing_reply_fails_with_a_reason_and_is_asked_again_by_the_next_run(tmp_path: Path, picture: str) -> None:
    requests = asked(picture)
    store = Store(tmp_path)
    with serve_batches(end=lambda rows: Ended([answer(row) for row in rows[1:]] + [b'{"half']), polls=0) as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        first = store.run(describer, requests)
        provider.end = all_good
        second = store.run(describer, requests)
    (bad,) = [reply for reply in first if reply.status == "failed"]
    assert "no reply" in str(bad.reason) and bad.request == requests[0]
    assert [reply.request for reply in second] == [requests[0]]
    assert store.complete(requests) and sum(provider.submitted.values()) == 7


def test_errors_inside_a_batch_are_failed_replies_with_their_reason(tmp_path: Path, picture: str) -> None:
    def faulty(rows: list[dict[str, Any]]) -> Ended:
        slow = answer(rows[0], status=429, body={"error": {"message": "slow down"}})
        down = answer(rows[1], status=500, body={"error": {"message": f"it broke, {KEY}"}})
        empty = answer(rows[2], body={"choices": []})
        refused = answer(rows[3], body=completion(None, refusal="No.").body)
        return Ended([refused, empty, answer(rows[5])], [slow, down, failure(rows[4], "request_timeout")])

    requests = asked(picture)
    with serve_batches(end=faulty) as provider:
        replies = {reply.request.key: reply for reply in run(tmp_path, settings(provider.url), requests)}
    status = [replies[request.key].status for request in requests]
    assert status == ["failed", "failed", "failed", "rejected", "failed", "ok"]
    reasons = [str(replies[request.key].reason) for request in requests]
    assert "429: slow down" in reasons[0] and "500: it broke" in reasons[1] and "request_timeout" in reasons[4]
    assert KEY not in " ".join(reasons)
    assert replies[requests[3].key].tokens_in == 100
    assert open_requests(tmp_path) == 0


def test_what_the_content_filter_took_is_refused_as_it_is_one_at_a_time(tmp_path: Path, picture: str) -> None:
    def filtered(rows: list[dict[str, Any]]) -> Ended:
        error = {"error": {"code": "content_filter", "message": "The response was filtered."}}
        other = {"error": {"code": "invalid_image", "message": "no image"}}
        lines = [answer(rows[0], status=400, body=error), failure(rows[1], "content_policy_violation")]
        return Ended([], [*lines, answer(rows[2], status=400, body=other), answer(rows[3], status=500, body=other)])

    with serve_batches(end=filtered) as provider:
        replies = run(tmp_path, settings(provider.url), asked(picture, 2))
    told = [(reply.status, reply.own_fault) for reply in replies]
    assert told == [("rejected", False), ("rejected", False), ("failed", True), ("failed", False)]
    assert replies[0].reason == "the model refused"


def test_a_batch_that_fails_its_validation_shows_why(
    tmp_path: Path, picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = {"code": "invalid_json_line", "message": f"not parseable {KEY}", "line": 3, "param": None}
    requests = asked(picture)
    store = Store(tmp_path)
    with serve_batches(end=lambda rows: Ended(status="failed", problems=[problem])) as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        with caplog.at_level(logging.WARNING):
            replies = store.run(describer, requests)
        provider.end = all_good
        store.run(describer, requests)
    assert [reply.status for reply in replies] == ["failed"] * 6
    assert "invalid_json_line: not parseable [key] (line 3)" in str(replies[0].reason)
    assert "invalid_json_line" in caplog.text and KEY not in caplog.text
    assert store.complete(requests)


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached", "invalid_api_key"])
def test_a_batch_refused_for_money_or_the_key_stops_with_exit_code_4(tmp_path: Path, picture: str, code: str) -> None:
    problems = [{"code": code, "message": "no"}]
    with serve_batches(end=lambda rows: Ended(status="failed", problems=problems)) as provider:
        with pytest.raises(RemoteError, match=code) as caught:
            run(tmp_path, settings(provider.url), asked(picture))
        assert caught.value.exit_code == 4
    assert open_requests(tmp_path) == 0  # nothing was begun, so nothing is paid


def test_a_full_queue_at_the_provider_means_smaller_batches_then_fewer(tmp_path: Path, picture: str) -> None:
    message = "Enqueued token limit reached for gpt-4o. Limit: 5 enqueued tokens."

    def narrow(rows: list[dict[str, Any]]) -> Ended:
        if len(rows) > 3:
            return Ended(status="failed", problems=[{"code": "token_limit_exceeded", "message": message}])
        return all_good(rows)

    requests = asked(picture, 5)
    with serve_batches(end=narrow) as provider:
        replies = run(tmp_path, settings(provider.url), requests)
    assert [reply.status for reply in replies] == ["ok"] * 10
    assert len({reply.request.key for reply in replies}) == 10
    assert provider.sizes[0][0] == 10 and provider.sizes[-1][0] <= 3


@pytest.mark.covers(132)
def test_without_waiting_each_run_fetches_what_ended_and_submits_what_is_new(tmp_path: Path, picture: str) -> None:
    old, new = asked(picture, 4)[:4], asked(picture, 4)
    store = Store(tmp_path)
    with serve_batches(polls=1) as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url, wait=False, requests=3), tmp_path)
        assert store.run(describer, old) == []
        assert open_requests(tmp_path) == 4
        assert store.run(describer, new) == []  # the first look; four more requests went out
        assert open_requests(tmp_path) == 8
        assert len(store.run(describer, new)) == 4
        assert open_requests(tmp_path) == 4
        assert len(store.run(describer, new)) == 4
        assert store.run(describer, new) == []
    assert store.complete(new) and set(provider.submitted.values()) == {1}
    assert open_requests(tmp_path) == 0


def test_without_waiting_full_slots_hide_no_fetched_reply(tmp_path: Path, picture: str) -> None:
    """Twelve requests, one slot: the first run may submit two, and every later run fetches these and submits two."""
    requests = asked(picture, 6)
    store = Store(tmp_path)
    with serve_batches() as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url, wait=False, requests=2, open=1), tmp_path)
        counts = [len(store.run(describer, list(reversed(requests)))) for _ in range(8)]
    assert counts == [0, 2, 2, 2, 2, 2, 2, 0]
    assert store.complete(requests) and set(provider.submitted.values()) == {1}


def test_replies_to_other_settings_are_kept_and_serve_the_run_that_wants_them(
    tmp_path: Path, picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = asked(picture, 2, digest="old"), asked(picture, 2, digest="new")
    store = Store(tmp_path)
    with serve_batches() as provider, caplog.at_level(logging.WARNING):
        store.run(BatchDescriber("gpt-4", settings(provider.url, wait=False), tmp_path), old)
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        assert {reply.request.digest for reply in store.run(describer, new)} == {"new"}
        assert caplog.text.count("4 fetched replies belong to no request") == 1
        assert store.run(describer, new) == []
        assert len(store.run(describer, old)) == 4
        assert caplog.text.count("belong to no request") == 1
    assert set(provider.submitted.values()) == {1} and provider.calls["create"] == 2
    assert open_requests(tmp_path) == 0
    assert not list(tmp_path.glob("batch-*"))


def test_a_consumer_that_stops_gets_the_rest_later_without_a_second_submission(tmp_path: Path, picture: str) -> None:
    requests = asked(picture)
    with serve_batches() as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        with closing(describer.describe(requests)) as replies:
            kept = [next(replies), next(replies)]
        # The second was handed over, and nobody knows whether it was stored: it is counted as open.
        assert open_requests(tmp_path) == 6
        rest = [request for request in requests if request not in [reply.request for reply in kept]]
        assert {reply.request.key for reply in describer.describe(rest)} == {request.key for request in rest}
        assert provider.calls["content"] == 1
        assert open_requests(tmp_path) == 0
        (seen_again,) = describer.describe([kept[1].request])  # had it been lost: still there, not paid again
        assert seen_again.text == kept[1].text
    assert set(provider.submitted.values()) == {1}


def test_nothing_is_contacted_when_nothing_is_wanted_or_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve_batches() as provider:
        assert run(tmp_path, settings(provider.url), []) == []
    assert not provider.calls
    with pytest.raises(RemoteError, match="OPENAI_API_KEY"):
        official = CaptionConfig(batch=BatchConfig(enabled=True))
        list(BatchDescriber("gpt-4", official, tmp_path).describe([Request("a", "", "neutral", "s", "p", "d")]))


def test_a_finished_run_still_fetches_what_older_runs_left_open(tmp_path: Path, picture: str) -> None:
    with serve_batches() as provider:
        list(BatchDescriber("gpt-4", settings(provider.url, wait=False), tmp_path).describe(asked(picture, 1)))
        assert open_requests(tmp_path) == 2
        assert run(tmp_path, settings(provider.url), []) == []
    assert open_requests(tmp_path) == 0 and provider.calls["content"] == 1


def test_a_request_without_an_image_is_sent_without_one(tmp_path: Path) -> None:
    with serve_batches() as provider:
        (reply,) = run(tmp_path, settings(provider.url), [Request("c", "", "neutral", "s", "identity: p", "d")])
    assert reply.status == "ok" and provider.rows[0]["body"]["messages"][1]["content"] == "identity: p"


def test_all_open_batches_can_be_cancelled(tmp_path: Path, picture: str) -> None:
    with serve_batches(polls=9) as provider:
        config = settings(provider.url, wait=False, requests=2)
        assert cancel_all(config, tmp_path) == 0
        run(tmp_path, config, asked(picture, 2))
        assert cancel_all(config, tmp_path) == 2
        assert {batch["status"] for batch in provider.batches.values()} == {"cancelled"}


def test_waiting_says_what_it_waits_for_at_most_once_a_minute(
    tmp_path: Path, picture: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reidctl.captioning.backends.batch._REPORT_S", 0.2)
    started = time.monotonic()
    with serve_batches(polls=20) as provider, caplog.at_level(logging.INFO):
        run(tmp_path, settings(provider.url, poll_s=0.03), asked(picture, 1))
    elapsed = time.monotonic() - started
    told = [record.getMessage() for record in caplog.records if record.name == "reidctl"]
    waiting = [line for line in told if "waiting for batch_1: 0 of 2 done, 0 failed, 0:00 h. Ctrl-C is safe" in line]
    assert 1 <= len(waiting) <= elapsed / 0.2
    assert [line for line in told if "batch_1: completed, 2 of 2 done" in line]
    assert len(told) - len(waiting) <= 4  # where images go, submitted, in progress, completed


@pytest.mark.covers(132)
def test_a_run_comes_back_day_by_day_until_every_text_is_there(tmp_path: Path, picture: str) -> None:
    """Through `caption_images`: six images, two batches of four at a time, one reply that has to be asked again."""
    images = pd.DataFrame({"image_id": list("abcdef"), "path": picture, "split": "train", "sha256": "0"})
    refused: list[str] = []

    def once_bad(rows: list[dict[str, Any]]) -> Ended:
        lines = [answer(row, text=CLOTHING if "clothing" in prompt(row) else IDENTITY) for row in rows]
        if not refused:
            refused.append(rows[0]["custom_id"])
            lines[0] = answer(rows[0], text="I am sorry, I cannot help with that.")
        return Ended(lines)

    def prompt(row: dict[str, Any]) -> str:
        return row["body"]["messages"][1]["content"][0]["text"].split(".")[0]

    with serve_batches(end=once_bad, polls=1) as provider:
        totals: list[dict[str, float]] = []
        for wait in (False, False, True, True):
            config = settings(provider.url, wait=wait, requests=4, open=2)
            config = config.model_copy(update={"style": StyleConfig(algorithm="none")})
            describer = make_describer(config, tmp_path / "run")
            made = caption_images(images, None, describer, config, tmp_path / "run")
            totals.append(made.totals)
        seen = provider.calls["create"], provider.calls["upload"]
    assert [int(total["ok"]) for total in totals] == [0, 0, 12, 12]
    assert len(provider.submitted) == 13 and set(provider.submitted.values()) == {1}  # twelve and one second attempt
    assert totals[-1]["asked"] == 0 and seen[0] == seen[1] == 4
    assert totals[-1]["tokens_out"] == 13 * 20
    assert open_requests(tmp_path / "run") == 0


def test_an_interrupted_run_leaves_no_replies_once_all_are_stored(
    tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after three of eight; the parts reach the disk before the file with the replies goes."""
    images = pd.DataFrame({"image_id": list("abcd"), "path": picture, "split": "train", "sha256": "0"})
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.delattr(os, "sync")  # waits for every disk of the machine, one that is gone included
    stored = 0

    def advance(count: int, note: str) -> None:
        nonlocal stored
        stored += count
        if stored == 3:
            raise KeyboardInterrupt

    with serve_batches() as provider:
        config = settings(provider.url).model_copy(update={"style": StyleConfig(algorithm="none")})
        with pytest.raises(KeyboardInterrupt):
            caption_images(images, None, make_describer(config, tmp_path), config, tmp_path, advance=advance)
        assert len(list(tmp_path.glob("batch-*.jsonl"))) == 1
        synced.clear()
        made = caption_images(images, None, make_describer(config, tmp_path), config, tmp_path)
    assert made.totals["ok"] == 8 and set(provider.submitted.values()) == {1}
    assert not list(tmp_path.glob("batch-*.jsonl"))
    assert str(tmp_path / "parts" / "replies-000.jsonl") in synced
