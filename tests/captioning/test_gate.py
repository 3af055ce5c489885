import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakeserver import Answer, ask, asked, busy, date_in, good, serve

from reidctl.captioning.backends.gate import Gate
from reidctl.captioning.backends.server import waiting_time
from reidctl.captioning.config import RemoteConfig

pytestmark = pytest.mark.usefixtures("openai_key")


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


def limited(rate: float, burst: float, **headers: str) -> Callable[[dict[str, Any], int], Answer]:
    """A server that takes `rate` requests a second, after a pause up to `burst` at once."""
    lock, state = threading.Lock(), {"left": burst, "at": time.monotonic()}

    def answer(request: dict[str, Any], number: int) -> Answer:
        with lock:
            now = time.monotonic()
            state["left"] = min(burst, state["left"] + rate * (now - state["at"]))
            state["at"] = now
            if state["left"] < 1:
                return busy(**headers)
            state["left"] -= 1
        return good(request, number)

    return answer


@pytest.mark.covers(132)
@pytest.mark.parametrize("headers", [{"retry_after_ms": "200"}, {}], ids=["told", "untold"])
def test_a_rate_below_the_concurrency_fails_no_item_and_is_found(headers: dict[str, str]) -> None:
    with serve(limited(100, 20, **headers)) as seen:
        replies = ask(seen.url, asked("", 200), concurrency=64, backoff_s=0.1, attempts=2)
    assert [reply.status for reply in replies] == ["ok"] * 200
    # the first storm of 64 was not to be known; later ones are
    assert seen.statuses.count(429) - 44 <= 0.1 * 200


def test_a_service_that_never_has_time_fails_all_items_after_the_longest_wait_for_one() -> None:
    started = time.monotonic()
    with serve(lambda *_: busy()) as seen:
        replies = ask(seen.url, asked("", 12), concurrency=4, attempts=2, max_wait_s=0.5)
    assert [reply.status for reply in replies] == ["failed"] * 12
    assert all("429" in str(reply.reason) and not reply.own_fault for reply in replies)
    assert 0.9 < time.monotonic() - started < 5
    assert len(seen.requests) < 60


def remote(**settings: Any) -> RemoteConfig:
    return RemoteConfig(**({"concurrency": 64, "backoff_s": 0.1} | settings))


async def answers(gate: Gate, count: int) -> None:
    for _ in range(count):
        async with gate:
            pass


def test_after_a_refusal_the_number_in_flight_grows_by_one_a_round() -> None:
    async def widths() -> list[float]:
        gate = Gate(remote())
        found = [gate._width]
        for _ in range(2):
            gate.hold(0.01, time.monotonic(), busy=True)
            found.append(gate._width)
        gate._gap = 0.0
        await answers(gate, 8)
        return [*found, gate._width]

    first, second, third, later = asyncio.run(widths())
    assert (first, second, third) == (64, 16, 8)
    assert 8.9 < later < 9


def test_refusals_of_requests_that_were_out_together_count_once() -> None:
    async def widths() -> tuple[float, float]:
        gate = Gate(remote())
        sent = time.monotonic()
        for _ in range(64):
            gate.hold(0.01, sent, busy=True)
        once = gate._width
        gate.hold(0.01, time.monotonic(), busy=True)
        return once, gate._width

    assert asyncio.run(widths()) == (16, 8)


def test_requests_go_out_in_their_order() -> None:
    async def order() -> list[int]:
        gate, out = Gate(remote(concurrency=1)), []

        async def one(number: int) -> None:
            async with gate:
                out.append(number)
                if number == 2:
                    gate.hold(0.05, time.monotonic())

        await asyncio.gather(*(one(number) for number in range(6)))
        return out

    assert asyncio.run(order()) == list(range(6))
