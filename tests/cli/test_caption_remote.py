"""`reidctl caption` against a real server on loopback: what it saw, what is on disk, what it cost, and after a kill."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from commandline import cli, program, refused

sys.path.insert(0, str(Path(__file__).parents[1] / "captioning"))
from batchserver import Fault, serve_batches
from fakeserver import CLOTHING, IDENTITY, Answer, completion, good, serve

from reidctl import tables

KEY = "sk-test-THISISTHEKEY0123456789"
ENV = {"OPENAI_API_KEY": KEY}
# One text style, and a server that writes well: every image costs exactly two requests.
PLAIN = ("--styles", "none", "--set", "caption.remote.backoff_s=0.01")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    run = tmp_path_factory.mktemp("caption-remote") / "run"
    words = ("--people", 10, "--images-per-person", 4, "--size", "64x32", "--workers", 1, "--seed", 3)
    assert cli("data", "synth", "--run", run, *words).code == 0
    return run


@pytest.fixture
def run(rendered, tmp_path):
    shutil.copytree(rendered, tmp_path / "run")
    return tmp_path / "run"


def caption(run, seen, *words, **options):
    base = ("caption", "--run", run, "--mllm", "gpt-4", "--base-url", seen.url, *PLAIN)
    return cli(*base, *words, env=ENV, **options)


def question(body):
    """What a request asks: the picture and the prompt without the reason of a retry."""
    text, picture = body["messages"][1]["content"]
    asked = text["text"].split("\nYour previous answer", 1)[0] + picture["image_url"]["url"]
    return hashlib.sha256(asked.encode()).hexdigest()


def asked(seen):
    return Counter(map(question, seen.requests))


def files(run):
    return [path for path in (run / "caption").rglob("*") if path.is_file()]


@pytest.mark.covers(124, 132)
def test_gpt_4_writes_two_texts_per_image_and_a_second_run_asks_nothing(run):
    with serve() as seen:
        result = caption(run, seen, "--json")
        assert result.code == 0, result.err
        assert asked(seen) == Counter({key: 1 for key in asked(seen)}) and len(seen.requests) == 80
        again = caption(run, seen, "--json", "--force")
        assert again.code == 0 and len(seen.requests) == 80
        assert caption(run, seen, "--json").json["status"] == "up-to-date"
    record = result.json
    assert record["asked_for"] == "gpt-4" and record["model"] == "gpt-4o"
    assert "gpt-4o" in result.err  # which model that is, before anything is sent
    assert record["texts"] == {"identity": {"ok": 40}, "clothing": {"ok": 40}}
    frame = tables.read_table(run / "caption" / "captions.parquet", "captions")
    assert set(frame["model"]) == {"gpt-4o"} and set(frame["conditioned_on"]) == {"image"}
    assert record["metrics"]["tokens_in"] == 8000 and record["metrics"]["tokens_out"] == 1600


def test_the_key_is_in_no_file_no_output_and_no_error(run):
    with serve() as seen:
        done = caption(run, seen, "--json")
    refusal = Answer(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with serve(lambda request, number: refusal) as seen:
        dead = caption(run, seen, "--force", "--set", "caption.seed=1")
    assert seen.keys and all(key == f"Bearer {KEY}" for key in seen.keys)
    assert dead.code == 4
    for text in (done.out, done.err, dead.out, dead.err):
        assert KEY not in text and KEY[8:20] not in text
    for path in run.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_dead_key_stops_at_once_with_exit_4_and_keeps_what_came(run):
    def dies(request, number):
        dead = Answer(401, {"error": {"message": "invalid key", "code": "invalid_api_key"}})
        return good(request, number) if number <= 30 else dead

    with serve(dies) as seen:
        result = caption(run, seen, "--concurrency", 4)
    assert result.code == 4 and "key" in result.complaint()
    assert len(seen.requests) <= 30 + 4 + 4
    assert not (run / "caption" / "stage.json").exists()
    with serve() as later:
        assert caption(run, later).code == 0
    assert len(later.requests) == 80 - 30
    assert not set(asked(later)) & set(map(question, seen.requests[:30]))


@pytest.mark.slow
@pytest.mark.covers(132)
def test_after_kill_9_nothing_stored_is_asked_again(run):
    part = run / "caption" / "parts" / "replies-000.jsonl"
    with serve(seconds=0.05) as seen:
        words = ("caption", "--run", run, "--mllm", "gpt-4", "--base-url", seen.url, "--concurrency", 4, *PLAIN)
        for least in (12, 40):
            client = program(*words, env=ENV)
            limit = time.monotonic() + 60
            while (not part.is_file() or part.read_bytes().count(b"\n") < least) and time.monotonic() < limit:
                assert client.poll() is None, client.communicate()
                time.sleep(0.01)
            os.kill(client.pid, signal.SIGKILL)
            client.wait()
            client.stdout.close()
            client.stderr.close()
            assert not (run / "caption" / "captions.parquet").exists()
        stored = part.read_bytes().count(b"\n")
        before = len(seen.requests)
        result = caption(run, seen, "--concurrency", 4, "--json")
    assert result.code == 0, result.err
    assert before - stored <= 2 * (4 + 1)  # two kills, four in flight at each
    assert len(seen.requests) - before == 80 - stored
    assert len(asked(seen)) == 80 and max(asked(seen).values()) <= 3
    frame = tables.read_table(run / "caption" / "captions.parquet", "captions")
    assert len(frame) == 80 and frame["status"].eq("ok").all() and frame["caption_id"].is_unique


def test_faults_on_the_way_end_in_one_good_text_each(run):
    def faulty(request, number):
        broken = {
            3: Answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"}),
            7: Answer(500, {"error": {"message": "oops"}}),
            11: Answer(200, b"<html>gateway</html>"),
            17: Answer(200, {"choices": []}),
            23: Answer(200, b'{"choices": [{"mess'),
        }
        return broken.get(number) or good(request, number)

    with serve(faulty) as seen:
        result = caption(run, seen, "--json")
    assert result.code == 0, result.err
    assert result.json["metrics"]["ok"] == 80
    assert len(seen.requests) == 85 and len(asked(seen)) == 80


def test_what_failed_is_asked_by_the_same_command_and_then_it_is_up_to_date(run):
    with serve(
        lambda request, number: Answer(400, {"error": {"message": "no"}}) if number == 5 else good(request, number)
    ) as seen:
        first = caption(run, seen, "--json")
        assert first.code == 0 and first.json["metrics"]["failed"] == 1
        second = caption(run, seen, "--json")
        assert second.json["status"] == "done" and second.json["metrics"]["failed"] == 0
        assert caption(run, seen, "--json").json["status"] == "up-to-date"
    assert len(seen.requests) == 81


def test_a_dry_run_prints_what_a_run_then_asks_and_touches_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with serve() as seen:
        result = caption(run, seen, "--dry-run", "--json")
        assert result.code == 0, result.err
        assert not seen.requests and not seen.keys
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
        ahead = result.json["metrics"]
        assert (ahead["texts"], ahead["stored"], ahead["requests"]) == (80, 0, 80)
        assert ahead["price"] > 0 and ahead["price_max"] > ahead["price"]
        shown = caption(run, seen, "--dry-run")
        assert "price in USD" in shown.out and "80" in shown.out
        assert caption(run, seen, "--limit", 10).code == 0
        ahead = caption(run, seen, "--dry-run", "--json").json["metrics"]
        assert (ahead["stored"], ahead["requests"]) == (20, 60)
    assert cli("caption", "--run", run, "--mllm", "gpt-4", "--dry-run", env={"OPENAI_API_KEY": ""}).code == 0


def test_the_budget_is_kept_to_the_cent_and_exit_5_says_so(run, tmp_path):
    # 100 tokens in and 20 out per reply: 0.12 a text.
    table = tmp_path / "prices.yaml"
    table.write_text("currency: EUR\nmodels:\n  gpt-4o:\n    input: 1000\n    output: 1000\n    image: {rule: none}\n")
    words = ("--prices", table, "--set", "caption.remote.max_tokens=20", "--concurrency", 1)
    with serve() as seen:
        result = caption(run, seen, *words, "--max-cost", 3, "--json")
        assert result.code == 5, result.err
        record = json.loads(result.out)
        assert record["status"] == "budget" and record["over_budget"] and record["currency"] == "EUR"
        assert not (run / "caption" / "stage.json").exists()
        spent = record["metrics"]["cost"]
        assert spent == pytest.approx(0.12 * len(seen.requests)) and 1.5 < spent <= 3
        assert record["metrics"]["not_asked"] == 80 - len(seen.requests)
        paid = len(seen.requests)
        assert caption(run, seen, *words, "--max-cost", 3).code == 5 and len(seen.requests) == paid
        result = caption(run, seen, *words, "--max-cost", 100, "--json")
        assert result.code == 0 and len(seen.requests) == 80
        assert json.loads(result.out)["metrics"]["cost"] == pytest.approx(9.6)


def test_what_a_stopped_run_bought_can_be_used(run, tmp_path):
    with serve() as seen:
        result = caption(run, seen, "--max-cost", 0.05, "--set", "caption.remote.max_tokens=20", "--json")
        assert result.code == 5
        bought = result.json["metrics"]["ok"]
        assert 0 < bought < 80 and f"replay:{run}" in result.err
    taken = cli("caption", "--run", run, "--mllm", f"replay:{run}", *PLAIN, "--json")
    assert taken.code == 0 and taken.json["metrics"]["ok"] == bought, taken.err


def test_a_finished_table_outlives_a_dead_key_and_a_small_budget(run):
    assert cli("caption", "--run", run, "--mllm", "template").code == 0
    kept = {path: path.read_bytes() for path in (run / "caption").glob("*") if path.is_file()}
    with serve(lambda request, number: Answer(401, {"error": {"message": "no"}})) as seen:
        assert caption(run, seen).code == 4
    with serve() as seen:
        assert caption(run, seen, "--max-cost", 0.00001).code == 5
    assert {path: path.read_bytes() for path in (run / "caption").glob("*") if path.is_file()} == kept


def test_a_damaged_record_is_mended_by_force(run):
    words = ("caption", "--run", run, "--mllm", "template")
    assert cli(*words).code == 0
    (run / "caption" / "stage.json").write_text("{")
    refused(3, "--force", args=words)
    assert cli(*words, "--force").code == 0


@pytest.mark.covers(124)
def test_the_styles_of_the_train_captions_reach_the_server(run):
    with serve() as seen:
        base = ("caption", "--run", run, "--mllm", "gpt-4", "--base-url", seen.url, "--json")
        result = cli(*base, env=ENV)
    assert result.code == 0, result.err
    frame = tables.read_table(run / "caption" / "styles.parquet", "styles")
    assert len(frame) >= 2
    asked_in = {text for body in seen.requests for text in frame["instruction"] if text in prompt_of(body)}
    assert asked_in == set(frame["instruction"])
    captions = tables.read_table(run / "data" / "captions.parquet", "captions")
    assert not any(text in prompt_of(body) for text in captions["text"] for body in seen.requests[:5])


def prompt_of(body):
    return body["messages"][1]["content"][0]["text"]


def test_the_arguments_of_a_program_and_other_secrets_are_in_no_record(run, tmp_path):
    script = tmp_path / "writes.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        f"    text = {IDENTITY!r} if row['kind'] == 'identity' else {CLOTHING!r}\n"
        "    print(json.dumps({'id': row['id'], 'text': text}), flush=True)\n"
    )
    mllm = f"command:{sys.executable} {script} --api-key s3cret-argument"
    result = cli("caption", "--run", run, "--mllm", mllm, *PLAIN, "--json")
    assert result.code == 0, result.err
    assert all(b"s3cret" not in path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert "s3cret" not in result.out + result.err
    refused(2, "environment", args=("caption", "--run", run, "--set", "caption.remote.extra={api_key: s3cret}"))


def test_recorded_texts_are_an_input_and_an_edited_file_is_read_again(run, tmp_path):
    images = tables.read_table(run / "data" / "images.parquet", "images")
    table = tmp_path / "texts.csv"

    def write(build):
        rows = [f'{name},"The person is a young man with a {build} build.","{CLOTHING}"' for name in images["image_id"]]
        table.write_text("image,identity,clothing\n" + "\n".join(rows) + "\n")

    for build in ("slim", "stocky"):
        write(build)
        result = cli("caption", "--run", run, "--mllm", f"file:{table}", *PLAIN, "--json")
        assert result.code == 0 and result.json["status"] == "done", result.err
        frame = tables.read_table(run / "caption" / "captions.parquet", "captions")
        assert frame.query("kind == 'identity'")["text"].str.contains(build).all()
    assert cli("caption", "--run", run, "--mllm", f"file:{table}", *PLAIN, "--json").json["status"] == "up-to-date"


def test_a_dry_run_counts_what_stricter_checks_would_ask_again(run):
    thin = completion(json.dumps({"description": "The person is a young man in a red shirt."}))
    full = completion(json.dumps({"description": CLOTHING}))
    with serve(lambda request, number: thin if "identity:" in prompt_of(request) else full) as seen:
        loose = ("--set", "caption.check.max_clothing_words=3")
        assert caption(run, seen, *loose).code == 0
        assert caption(run, seen, *loose, "--dry-run", "--json").json["metrics"]["requests"] == 0
        ahead = caption(run, seen, "--dry-run", "--json").json["metrics"]["requests"]
        assert ahead == 40 and len(seen.requests) == 80
        caption(run, seen, "--set", "caption.retries=2")
    assert len(seen.requests) == 80 + 2 * 40


def test_a_budget_without_a_price_is_refused_before_anything_is_sent(run):
    words = ("caption", "--run", run, "--mllm", "openai:model-of-nobody", "--max-cost", 1)
    refused(2, "model-of-nobody", "--prices", args=words, env=ENV)


@pytest.mark.covers(132)
def test_shards_merge_by_copying_and_every_image_is_asked_once(run, tmp_path):
    with serve() as seen:
        for number in (1, 2):
            machine = tmp_path / f"machine-{number}"
            shutil.copytree(run, machine)
            result = caption(machine, seen, "--shard", f"{number}/2", "--json")
            assert result.code == 0 and result.json["status"] == "part", result.err
            assert not (machine / "caption" / "stage.json").exists()
            shutil.copytree(machine / "caption" / "parts", run / "caption" / "parts", dirs_exist_ok=True)
        assert len(seen.requests) == 80 and max(asked(seen).values()) == 1
        # Nobody has to have the key where the parts are merged.
        # Without a base URL it would be OpenAI's own service, which refuses to start without one.
        result = cli("caption", "--run", run, "--mllm", "gpt-4", *PLAIN, "--json", env={"OPENAI_API_KEY": ""})
        assert result.code == 0, result.err
        assert len(seen.requests) == 80 and result.json["texts"]["identity"]["ok"] == 40


@pytest.mark.covers(132)
def test_a_batch_is_submitted_today_and_fetched_tomorrow_and_never_asked_directly(run):
    batch = ("--batch", "--set", "caption.batch.poll_s=0.01", "--json")
    with serve_batches(polls=3) as provider:
        today = caption(run, provider, *batch, "--no-wait")
        assert today.code == 0 and today.json["status"] == "pending" and today.json["pending"] == 80, today.err
        assert not (run / "caption" / "captions.parquet").exists()
        direct = caption(run, provider)
        assert direct.code == 2 and "80 of the texts are in a batch" in direct.err.splitlines()[-1]
        # Another writer asks for other texts: nothing is paid twice.
        assert cli("caption", "--run", run, "--mllm", "template", *PLAIN).code == 0
        tomorrow = caption(run, provider, *batch)
        assert tomorrow.code == 0 and tomorrow.json["texts"]["clothing"] == {"ok": 40}, tomorrow.err
        assert set(provider.submitted.values()) == {1} and len(provider.submitted) == 80
        assert caption(run, provider, "--json").json["metrics"]["asked"] == 0  # no batch is open any more
    full = tomorrow.json["metrics"]["cost"]
    assert full == pytest.approx(80 * (100 * 2.5 + 20 * 10) / 1e6 / 2)  # half of gpt-4o's price
    assert KEY not in today.err + tomorrow.err
    assert all(KEY.encode() not in path.read_bytes() for path in files(run))


def test_batches_can_be_cancelled(run):
    batch = ("--batch", "--set", "caption.batch.poll_s=0.01")
    with serve_batches(polls=5) as provider:
        assert caption(run, provider, *batch, "--no-wait").code == 0
        result = caption(run, provider, *batch, "--cancel", "--json")
        assert result.code == 0 and result.json["metrics"]["cancelled"] == 1, result.err
        assert caption(run, provider, *batch, "--no-wait").code in (0, 4)  # fetches what there is: nothing
    with serve() as seen:
        assert caption(run, seen).code == 0 and len(seen.requests) == 80


def test_a_service_without_batches_does_not_lock_the_folder(run):
    with serve_batches(fault=lambda kind, number: Fault(404, {"error": {"message": "no such path"}})) as provider:
        assert caption(run, provider, "--batch").code == 4
    with serve() as seen:
        assert caption(run, seen).code == 0 and len(seen.requests) == 80


@pytest.mark.parametrize(
    ("code", "words", "pieces"),
    [
        (2, ("--shard", "3/2"), ("shard",)),
        (2, ("--max-cost", "-1"), ("max_cost",)),
        (2, ("--no-wait",), ("--batch",)),
        (2, ("--cancel",), ("--batch",)),
        (2, ("--base-url", "http://user:secret@localhost/v1"), ("environment",)),
        (2, ("--base-url", "localhost:8000"), ("http://",)),
        (3, ("--prices", "/nowhere/prices.yaml"), ("/nowhere/prices.yaml",)),
        (3, ("--mllm", "file:/nowhere/texts.csv"), ("/nowhere/texts.csv",)),
        (3, ("--mllm", "hf:/nowhere/model"), ("/nowhere/model",)),
        (2, ("--mllm", "template", "--batch"), ("batch",)),
        (2, ("--set", "caption.remote.key_env=sk-0123"), ("key_env",)),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_nothing_is_written(rendered, code, words, pieces):
    given = words if "--mllm" in words else ("--mllm", "gpt-4", *words)
    result = refused(code, *pieces, args=("caption", "--run", rendered, *given), env=ENV)
    assert "secret" not in result.err
    assert not (rendered / "caption" / "captions.parquet").exists()
