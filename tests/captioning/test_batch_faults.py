import logging
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from batchclient import KEY, Store, asked, run, settings
from batchserver import Ended, Fault, Provider, all_good, answer, failure, serve_batches

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.backends.batch import BatchDescriber, open_requests
from reidctl.captioning.backends.batch_state import BatchState, custom_id
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.errors import DataError, RemoteError, UsageError

pytestmark = pytest.mark.usefixtures("openai_key")


@pytest.mark.parametrize("kind", ["upload", "create", "retrieve", "content"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(429, headers={"Retry-After": "0.05"}),
        Fault(reset=True),
        Fault(reset=True, after=True),
        Fault(200, b"<html>gateway</html>"),
        Fault(cut=True),
        Fault(hang=0.7, after=True),
    ],
    ids=["500", "429", "reset", "lost", "html", "cut", "hang"],
)
def test_a_passing_fault_at_any_step_costs_nothing_twice(tmp_path: Path, picture: str, kind: str, fault: Fault) -> None:
    if kind == "content" and fault.body == b"<html>gateway</html>":
        fault = Fault(200, b"")  # an empty file: fewer lines than were counted
    requests = asked(picture, 1)
    with serve_batches(fault=lambda at, number: fault if at == kind and number == 1 else None) as provider:
        config = settings(provider.url, remote={"timeout_s": 0.05 if kind == "upload" and fault.hang else 0.5})
        replies = run(tmp_path, config, requests)
        assert [reply.status for reply in replies] == ["ok", "ok"]
    assert set(provider.submitted.values()) == {1}
    # A batch whose answer got lost is found in the list instead of being asked for again.
    assert provider.calls[kind] + (provider.calls["list"] if kind == "create" else 0) >= 2
    assert not [name for name, _ in provider.files.values() if name.startswith("reidctl")]  # no upload is left


def test_an_expired_batch_gives_what_it_finished_and_the_rest_goes_out_once_more(tmp_path: Path, picture: str) -> None:
    def late(rows: list[dict[str, Any]]) -> Ended:
        if len(rows) < 6:
            return all_good(rows)
        done, rest = rows[:4], rows[4:]
        return Ended([answer(row) for row in done], [failure(row, "batch_expired") for row in rest], "expired")

    requests = asked(picture)
    with serve_batches(end=late) as provider:
        replies = run(tmp_path, settings(provider.url), requests)
    assert [reply.status for reply in replies] == ["ok"] * 6
    times = provider.submitted
    assert [times[custom_id(request)] for request in requests] == [1, 1, 1, 1, 2, 2]


def test_a_batch_that_always_expires_fails_instead_of_going_round_forever(tmp_path: Path, picture: str) -> None:
    with serve_batches(end=lambda rows: Ended(status="expired")) as provider:
        replies = run(tmp_path, settings(provider.url), asked(picture, 1))
    assert [reply.status for reply in replies] == ["failed"] * 2 and "expired" in str(replies[0].reason)
    assert set(provider.submitted.values()) == {2}


def test_a_cancelled_batch_gives_what_it_finished_and_is_not_sent_again_at_once(tmp_path: Path, picture: str) -> None:
    def stopped(rows: list[dict[str, Any]]) -> Ended:
        return Ended([answer(rows[0])], [failure(row, "batch_cancelled") for row in rows[1:]], "cancelled")

    with serve_batches(end=stopped) as provider:
        replies = run(tmp_path, settings(provider.url), asked(picture, 1))
    assert [reply.status for reply in replies] == ["ok", "failed"]
    assert set(provider.submitted.values()) == {1}


def test_a_damaged_image_fails_alone_and_costs_no_request(tmp_path: Path, picture: str) -> None:
    broken = [Request("b", str(tmp_path / "none.png"), "identity", "s", "identity: p", "d")]
    with serve_batches() as provider:
        replies = run(tmp_path, settings(provider.url), broken + asked(picture, 1))
        only_broken = run(tmp_path, settings(provider.url), broken)
    assert sorted(reply.status for reply in replies) == ["failed", "ok", "ok"]
    assert [reply.status for reply in only_broken] == ["failed"]
    assert sum(provider.submitted.values()) == 2 and provider.calls["upload"] == 1


def test_retry_after_is_honoured_while_waiting(tmp_path: Path, picture: str) -> None:
    times: list[float] = []

    def busy(kind: str, number: int) -> Fault | None:
        if kind != "retrieve":
            return None
        times.append(time.monotonic())
        return Fault(429, headers={"Retry-After": "1"}) if number == 1 else None

    with serve_batches(fault=busy) as provider:
        run(tmp_path, settings(provider.url), asked(picture, 1))
    assert times[1] - times[0] >= 0.95


def test_waiting_outlasts_more_failures_than_one_request_may_have(tmp_path: Path, picture: str) -> None:
    outage = lambda kind, number: Fault(503) if kind == "retrieve" and number <= 12 else None  # noqa: E731
    with serve_batches(fault=outage) as provider:
        config = settings(provider.url, remote={"attempts": 2, "max_wait_s": 0.02})
        assert len(run(tmp_path, config, asked(picture, 1))) == 2


def test_without_waiting_a_dead_service_is_reported_and_nothing_is_lost(tmp_path: Path, picture: str) -> None:
    requests = asked(picture, 1)
    with serve_batches(fault=lambda kind, number: Fault(503) if kind == "retrieve" else None) as provider:
        config = settings(provider.url, wait=False)
        assert run(tmp_path, config, requests) == []
        with pytest.raises(RemoteError, match="503"):
            run(tmp_path, config, requests)
        provider.fault = lambda kind, number: None
        assert len(run(tmp_path, config, requests)) == 2
    assert set(provider.submitted.values()) == {1}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["upload", "create", "retrieve", "content"])
def test_a_refused_key_stops_at_once_without_being_shown(
    tmp_path: Path, picture: str, kind: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(status, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with serve_batches(fault=lambda at, number: fault if at == kind else None) as provider:
        with pytest.raises(RemoteError) as caught, caplog.at_level(logging.DEBUG):
            run(tmp_path, settings(provider.url), asked(picture, 1))
        assert caught.value.exit_code == 4 and provider.calls[kind] == 1
        provider.fault = lambda at, number: None
        store = Store(tmp_path)
        store.run(BatchDescriber("gpt-4", settings(provider.url), tmp_path), asked(picture, 1))
    assert store.complete(asked(picture, 1)) and set(provider.submitted.values()) == {1}
    assert KEY not in str(caught.value) + caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_submission_whose_answer_got_lost_is_found_among_many_pages(tmp_path: Path, picture: str) -> None:
    lost = Fault(reset=True, after=True)
    with serve_batches(fault=lambda kind, number: lost if kind == "create" and number == 1 else None) as provider:
        for number in range(7):
            provider.batches[f"other_{number}"] = {
                "id": f"other_{number}", "object": "batch", "status": "completed", "created_at": int(time.time()),
                "metadata": {"reidctl": "f" * 32} if number % 2 else None, "input_file_id": "file-x",
            }  # fmt: skip
        run(tmp_path, settings(provider.url), asked(picture, 1))
    assert provider.calls["create"] == 1 and set(provider.submitted.values()) == {1}


def test_a_twin_made_by_a_lost_answer_is_cancelled(tmp_path: Path, picture: str) -> None:
    """The first look at the list comes too early to see the batch, so a second one is made; then both are there."""

    class Slow(Provider):
        def respond(self, kind: str, *others: Any) -> Any:
            if kind == "list" and self.calls["list"] == 0:
                return {"object": "list", "data": [], "has_more": False}
            return super().respond(kind, *others)

    lost = Fault(reset=True, after=True)
    with serve_batches(polls=2) as provider:
        provider.__class__ = Slow
        provider.fault = lambda kind, number: lost if kind == "create" and number == 1 else None
        replies = run(tmp_path, settings(provider.url), asked(picture, 1))
    assert len(replies) == 2
    assert sorted(batch["status"] for batch in provider.batches.values()) == ["cancelled", "completed"]


def test_a_twin_that_shows_late_is_cancelled_too(tmp_path: Path, picture: str) -> None:
    class Slower(Provider):
        def respond(self, kind: str, *others: Any) -> Any:
            if kind == "list" and self.calls["list"] == 0:
                return {"object": "list", "data": [], "has_more": False}
            if kind == "list" and self.calls["list"] == 1:
                return {"object": "list", "data": [self.batches["batch_2"]], "has_more": False}
            return super().respond(kind, *others)

    lost = Fault(reset=True, after=True)
    with serve_batches(polls=2) as provider:
        provider.__class__ = Slower
        provider.fault = lambda kind, number: lost if kind == "create" and number == 1 else None
        assert len(run(tmp_path, settings(provider.url), asked(picture, 1))) == 2
    assert {name: batch["status"] for name, batch in provider.batches.items()} == {
        "batch_1": "cancelled",
        "batch_2": "completed",
    }


@pytest.mark.parametrize(("lines", "said"), [(1, "1 of 2 replies"), (2, "nothing that is a reply")])
def test_a_gateway_page_in_place_of_the_replies_does_not_make_them_paid_again(
    tmp_path: Path, picture: str, lines: int, said: str
) -> None:
    page = Fault(200, b"<html>gateway</html>\n" * lines)
    store, requests = Store(tmp_path), asked(picture, 1)
    with serve_batches(fault=lambda kind, number: page if kind == "content" else None) as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        with pytest.raises(RemoteError, match=f"sends {said}"):
            store.run(describer, requests)
        assert open_requests(tmp_path) == 2
        provider.fault = lambda kind, number: None
        store.run(describer, requests)
    assert store.complete(requests) and set(provider.submitted.values()) == {1}


def test_a_download_that_always_ends_early_at_a_line_is_kept_at_the_provider(tmp_path: Path, picture: str) -> None:
    class Short(Provider):
        def respond(self, kind: str, *others: Any) -> Any:
            whole = super().respond(kind, *others)
            return b"".join(whole.splitlines(keepends=True)[:3]) if kind == "content" else whole

    store, requests = Store(tmp_path), asked(picture)
    with serve_batches() as provider:
        provider.__class__ = Short
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        with pytest.raises(RemoteError, match="sends 3 of 6 replies"):
            store.run(describer, requests)
        assert open_requests(tmp_path) == 6 and provider.calls["content"] == 3
        provider.__class__ = Provider
        store.run(describer, requests)
    assert store.complete(requests) and set(provider.submitted.values()) == {1}


@pytest.mark.parametrize("lost", ["create", "upload"])
def test_a_list_that_gives_its_first_page_for_ever_ends_the_search(tmp_path: Path, picture: str, lost: str) -> None:
    class Same(Provider):
        def respond(self, kind: str, name: str, query: dict[str, list[str]], *others: Any) -> Any:
            if kind == "list":
                return super().respond(kind, name, {}, *others) | {"has_more": True}
            whole = super().respond(kind, name, query, *others)
            return whole | {"has_more": True} if kind == "files" else whole

    fault = Fault(reset=True, after=True)
    with serve_batches(fault=lambda kind, number: fault if kind == lost and number == 1 else None) as provider:
        provider.__class__ = Same
        assert len(run(tmp_path, settings(provider.url), asked(picture, 1))) == 2
    assert set(provider.submitted.values()) == {1}
    assert not [name for name, _ in provider.files.values() if name.startswith("reidctl")]


class OneEach:
    """Every reply of the fake provider costs 1."""

    def cost(self, tokens_in: int, tokens_out: int, *, batch: bool = False) -> float:
        return tokens_out / 20


def within(max_cost: float, folder: Path, config: CaptionConfig, requests: list[Request]) -> tuple[Ledger, list[Reply]]:
    """A run with a budget: what was spent, and every reply."""
    store = Store(folder)
    ledger = Ledger(OneEach(), most=(0, 20), max_cost=max_cost, batch=True)
    describer = BatchDescriber("gpt-4", config, folder)
    wanted = (request for request in requests if custom_id(request) not in store.times)
    replies = []
    for reply in describer.describe(ledger.affordable(wanted, describer.paid())):
        ledger.settle(reply)
        store.keep(reply)
        replies.append(reply)
    return ledger, replies


def two_of_all(status: str) -> Callable[[list[dict[str, Any]]], Ended]:
    def end(rows: list[dict[str, Any]]) -> Ended:
        return Ended([answer(row) for row in rows[:2]], [failure(row, f"batch_{status}") for row in rows[2:]], status)

    return end


@pytest.mark.covers(132)
@pytest.mark.parametrize("polls", [0, 1], ids=["ended-before", "ends-while-we-wait"])
@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_a_batch_left_undone_asks_the_budget_again(tmp_path: Path, picture: str, status: str, polls: int) -> None:
    """Run 1 submits ten; the batch ends with two; run 2 may spend nothing; run 3 may spend everything."""
    requests = asked(picture, 5)
    with serve_batches(end=two_of_all(status), polls=polls) as provider:
        within(10.0, tmp_path, settings(provider.url, wait=False), requests)
        assert len(provider.submitted) == 10
        ledger, replies = within(0.5, tmp_path, settings(provider.url), requests)
        assert ledger.spent == 2.0 and set(provider.submitted.values()) == {1}
        # What an expired batch left is not even let through; what is held, or was cancelled, gets a row that says so.
        bad = [reply for reply in replies if reply.status == "failed"]
        assert len(replies) - len(bad) == 2 and len(bad) == (0 if (status, polls) == ("expired", 0) else 8)
        assert all("the next run asks again" in str(reply.reason) and reply.own_fault for reply in bad)
        provider.end = all_good
        ledger, replies = within(8.0, tmp_path, settings(provider.url), requests)
    assert ledger.spent == 8.0 and Store(tmp_path).complete(requests)
    assert sorted(provider.submitted.values()) == [1, 1, *[2] * 8]


def test_the_errors_of_a_batch_that_was_put_aside_ask_the_budget_again(tmp_path: Path, picture: str) -> None:
    def one_good(rows: list[dict[str, Any]]) -> Ended:
        broken = [answer(rows[1], body={"choices": []}), *(answer(row, status=500, body={}) for row in rows[2:])]
        return Ended([answer(rows[0]), *broken])

    old, new = asked(picture, 2, digest="old"), asked(picture, 1, digest="new")
    with serve_batches(end=one_good) as provider:
        within(9.0, tmp_path, settings(provider.url, wait=False), old)
        provider.fault = lambda kind, number: None
        within(9.0, tmp_path, settings(provider.url), new)
        describer = BatchDescriber("gpt-4", settings(provider.url), tmp_path)
        assert list(map(describer.paid(), old)) == [True, False, False, False]
        before = provider.submitted
        ledger, replies = within(0.5, tmp_path, settings(provider.url), old)
    assert [reply.status for reply in replies] == ["ok"] and ledger.stopped
    assert provider.submitted == before


def test_a_batch_that_found_the_queue_full_asks_the_budget_before_it_goes_out_again(
    tmp_path: Path, picture: str
) -> None:
    problems = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]
    for polls in (0, 1):
        folder = tmp_path / str(polls)
        folder.mkdir()
        with serve_batches(end=lambda rows: Ended(status="failed", problems=problems), polls=polls) as provider:
            within(9.0, folder, settings(provider.url, wait=False), asked(picture, 2))
            ledger, replies = within(0.5, folder, settings(provider.url), asked(picture, 2))
        assert len(replies) == 4 * polls and {reply.status for reply in replies} <= {"failed"}
        assert ledger.spent == 0.0 and provider.calls["create"] == 1


def test_paid_are_requests_that_are_with_the_provider_or_here(tmp_path: Path, picture: str) -> None:
    requests, others = asked(picture, 2), asked(picture, 2, digest="other")
    with serve_batches() as provider:
        describer = BatchDescriber("gpt-4", settings(provider.url, wait=False), tmp_path)
        assert not any(map(describer.paid(), requests))  # before there is a file
        list(describer.describe(requests))
        assert all(map(describer.paid(), requests)) and not any(map(describer.paid(), others))
        with closing(describer.describe(requests)) as replies:
            kept = [next(replies), next(replies), next(replies)]
        assert all(map(describer.paid(), requests))  # here, and perhaps not stored
        assert [reply.request for reply in describer.describe(requests)] == requests
        assert not any(map(describer.paid(), requests))  # the run has stored them
    assert len(kept) == 3 and set(provider.submitted.values()) == {1}


def test_an_interrupted_wait_goes_on_with_the_next_run(tmp_path: Path, picture: str) -> None:
    """Ctrl-C in the middle of waiting."""
    requests = asked(picture)
    with serve_batches(polls=10**6) as provider:
        script = [sys.executable, "-c", _CLIENT, str(Path(__file__).parent), str(tmp_path), provider.url, "polling"]
        client = subprocess.Popen(script, stderr=subprocess.DEVNULL)
        provider.wait_for("retrieve", 1)
        client.send_signal(signal.SIGINT)
        assert client.wait(timeout=10) != 0
        provider.polls = 0
        store = Store(tmp_path)
        store.run(BatchDescriber("gpt-4", settings(provider.url), tmp_path), requests)
    assert store.complete(requests) and set(provider.submitted.values()) == {1}


def test_ids_from_the_server_lead_nowhere_else(tmp_path: Path, picture: str) -> None:
    with serve_batches(polls=1) as provider:
        config = settings(provider.url)
        describer = BatchDescriber("gpt-4", settings(provider.url, wait=False), tmp_path)
        assert list(describer.describe(asked(picture, 1))) == []
        (batch,) = provider.batches.values()
        batch |= {"status": "completed", "output_file_id": "../../v1/batches"}
        with pytest.raises(RemoteError, match="no id"):
            run(tmp_path, config, asked(picture, 1))
        batch["output_file_id"] = provider.store("result.jsonl", b"")
        provider.finish(batch)
        assert len(run(tmp_path, config, asked(picture, 1))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"batches.jsonl", "stored.jsonl", "person.png"}


def test_another_address_or_process_does_not_touch_open_batches(tmp_path: Path, picture: str) -> None:
    requests = asked(picture, 1)
    with serve_batches() as provider:
        run(tmp_path, settings(provider.url, wait=False), requests)
        with pytest.raises(UsageError, match=r"open at 127\.0\.0\.1"):
            run(tmp_path, settings(provider.url.replace("127.0.0.1", "localhost")), requests)
        with BatchState(tmp_path), pytest.raises(DataError, match="Another process"):
            run(tmp_path, settings(provider.url), requests)


def test_an_unknown_batch_is_not_paid_again_silently(tmp_path: Path, picture: str) -> None:
    with serve_batches() as provider:
        run(tmp_path, settings(provider.url, wait=False), asked(picture, 1))
        provider.batches.clear()
        with pytest.raises(RemoteError, match="knows no batch batch_1"):
            run(tmp_path, settings(provider.url), asked(picture, 1))
    assert provider.calls["create"] == 1


def test_a_damaged_state_stops_instead_of_paying_twice(tmp_path: Path, picture: str) -> None:
    with serve_batches() as provider:
        run(tmp_path, settings(provider.url, wait=False), asked(picture, 1))
        path = tmp_path / "batches.jsonl"
        whole = path.read_bytes()
        path.write_bytes(b"\0\0\0\n" + whole)
        for call in (lambda: open_requests(tmp_path), lambda: run(tmp_path, settings(provider.url), asked(picture, 1))):
            with pytest.raises(DataError, match="line 1"):
                call()
        path.write_bytes(whole + b'{"id": "cut by a ki')  # what a kill leaves
        assert open_requests(tmp_path) == 2
        assert len(run(tmp_path, settings(provider.url), asked(picture, 1))) == 2
        assert open_requests(tmp_path) == 0


_CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import batchclient as t
folder, url, slow = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
requests = t.asked(str(folder / "person.png"))
def wanted():
    for number, request in enumerate(requests):
        if slow == "writing" and number == 3:
            print("ready", flush=True)
            time.sleep(60)
        yield request
store = t.Store(folder)
with store._path.open("a") as stream:
    for number, reply in enumerate(t.BatchDescriber("gpt-4", t.settings(url), folder).describe(wanted())):
        stream.write(t.custom_id(reply.request) + chr(10))
        stream.flush()
        if slow == "fetching" and number == 2:
            print("ready", flush=True)
            time.sleep(60)
"""


@pytest.mark.covers(132)
@pytest.mark.parametrize("moment", ["writing", "uploaded", "created", "polling", "downloading", "fetching"])
def test_a_killed_client_pays_for_nothing_twice_and_loses_nothing(tmp_path: Path, picture: str, moment: str) -> None:
    requests = asked(picture)
    slow_at = {"uploaded": "upload", "created": "create", "downloading": "content"}.get(moment)
    hang = Fault(hang=30.0, after=True)
    with serve_batches(fault=lambda kind, number: hang if kind == slow_at else None) as provider:
        provider.polls = 10**6 if moment == "polling" else 0
        script = [sys.executable, "-c", _CLIENT, str(Path(__file__).parent), str(tmp_path), provider.url, moment]
        client = subprocess.Popen(script, stdout=subprocess.PIPE)
        try:
            if slow_at is not None or moment == "polling":
                provider.wait_for(slow_at or "retrieve", 1)
            else:
                assert client.stdout is not None and client.stdout.readline() == b"ready\n"
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()
        left = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
        assert not {name for name in left if "request" in name or name.startswith("tmp")}  # no image is left behind
        if moment not in ("writing",):
            assert open_requests(tmp_path) == 6
        provider.fault = lambda kind, number: None
        provider.polls = 0
        store = Store(tmp_path)
        before = sum(store.times.values())
        replies = store.run(BatchDescriber("gpt-4", settings(provider.url), tmp_path), requests)
    assert before == (3 if moment == "fetching" else 0) and len(replies) == 6 - before
    assert store.complete(requests)
    assert provider.submitted == Counter({custom_id(request): 1 for request in requests})
    assert provider.calls["create"] == 1
    assert not [name for name, _ in provider.files.values() if name.startswith("reidctl")]
    assert open_requests(tmp_path) == 0
