import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from reidctl.captioning.backends.base import Reply, Request, make_describer
from reidctl.captioning.backends.command import CommandDescriber
from reidctl.captioning.backends.replay import ReplayDescriber
from reidctl.captioning.config import CaptionConfig, RemoteConfig
from reidctl.errors import DataError, RemoteError, UsageError

ECHO = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"id": row["id"], "text": row["image_id"] + "/" + row["kind"], "tokens_in": 3}), flush=True)
"""


def requests(count: int) -> list[Request]:
    return [Request(f"image-{index}", "x.png", "identity", "s", "p", "d") for index in range(count)]


def program(tmp_path: Path, source: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(source)
    return f"{sys.executable} {path}"


@pytest.mark.covers(132)
def test_a_program_answers_every_request_once(tmp_path: Path) -> None:
    describer = CommandDescriber(program(tmp_path, ECHO), RemoteConfig(concurrency=4))
    replies = list(describer.describe(requests(50)))
    assert sorted(reply.text or "" for reply in replies) == sorted(f"image-{index}/identity" for index in range(50))
    assert replies[0].tokens_in == 3


def test_answers_may_come_in_any_order_with_noise_between(tmp_path: Path) -> None:
    source = """
import json, sys
rows = [json.loads(sys.stdin.readline()) for _ in range(3)]
print("loading model", flush=True)
print(json.dumps({"id": 99, "text": "nobody asked"}), flush=True)
for row in reversed(rows):
    print(json.dumps({"id": row["id"], "text": row["image_id"]}), flush=True)
"""
    replies = list(CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=3)).describe(requests(3)))
    assert [reply.text for reply in replies] == ["image-2", "image-1", "image-0"]
    assert all(reply.text == reply.request.image_id for reply in replies)


def test_a_program_that_dies_fails_the_rest_as_rows(tmp_path: Path) -> None:
    source = ECHO + "\n    sys.exit(7)\n"
    remote = RemoteConfig(concurrency=1, attempts=1)
    replies = list(CommandDescriber(program(tmp_path, source), remote).describe(requests(4)))
    assert [reply.status for reply in replies] == ["ok", "failed", "failed", "failed"]
    assert "ended with code 7" in str(replies[-1].reason)


def test_a_program_that_never_answers_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="before it answered"):
        list(CommandDescriber(program(tmp_path, "raise SystemExit(3)"), RemoteConfig()).describe(requests(2)))
    with pytest.raises(RemoteError, match="timed out"):
        silent = program(tmp_path, "import time; time.sleep(30)")
        list(CommandDescriber(silent, RemoteConfig(timeout_s=0.3)).describe(requests(2)))
    with pytest.raises(RemoteError, match="Cannot start"):
        list(CommandDescriber("/no/such/program", RemoteConfig()).describe(requests(1)))


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    describer = CommandDescriber(f"{program(tmp_path, ECHO)} ; touch {marker}", RemoteConfig())
    assert next(iter(describer.describe(requests(1)))).status == "ok"
    assert not marker.exists()


def test_the_recorded_model_name_holds_no_argument(tmp_path: Path) -> None:
    one = CommandDescriber("prog --token s3cret", RemoteConfig())
    assert "s3cret" not in one.model and one.model != CommandDescriber("prog", RemoteConfig()).model


def counted(tmp_path: Path, source: str) -> str:
    """A program that writes a line into `starts` each time it is started; `LIFE` is the number of the start."""
    head = f"""
starts = {str(tmp_path / "starts")!r}
open(starts, "a").write("x")
LIFE = len(open(starts).read())
"""
    return program(tmp_path, head + source)


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text())


def by_image(replies: list[Reply]) -> dict[str, str]:
    assert len({reply.request.image_id for reply in replies}) == len(replies)
    return {reply.request.image_id: reply.status for reply in replies}


@pytest.mark.covers(132)
def test_a_program_that_dies_in_the_middle_is_started_again(tmp_path: Path) -> None:
    source = """
import json, sys
for number, line in enumerate(sys.stdin):
    row = json.loads(line)
    if LIFE == 1 and number == 5:
        sys.stdout.write('{"id": ' + str(row["id"]) + ', "te')
        sys.stdout.flush()
        sys.exit(3)
    print(json.dumps({"id": row["id"], "text": row["image_id"]}), flush=True)
"""
    describer = CommandDescriber(counted(tmp_path, source), RemoteConfig(concurrency=4))
    replies = list(describer.describe(requests(20)))
    assert set(by_image(replies).values()) == {"ok"} and len(replies) == 20
    assert all(reply.text == reply.request.image_id for reply in replies)
    assert starts(tmp_path) == 2


def test_a_request_that_kills_the_program_fails_alone(tmp_path: Path) -> None:
    source = """
import json, os, sys
for line in sys.stdin:
    row = json.loads(line)
    if row["image_id"] == "image-7":
        os.kill(os.getpid(), 9)
    print(json.dumps({"id": row["id"], "text": "fine"}), flush=True)
"""
    replies = list(CommandDescriber(counted(tmp_path, source), RemoteConfig(concurrency=8)).describe(requests(20)))
    found = by_image(replies)
    assert [image for image, status in found.items() if status != "ok"] == ["image-7"] and len(found) == 20
    assert any("killed by signal 9" in str(reply.reason) for reply in replies)
    assert starts(tmp_path) == 3


def test_a_program_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    source = ECHO + "\n    sys.exit(1)\n"
    remote = RemoteConfig(concurrency=1, attempts=3)
    found = by_image(list(CommandDescriber(counted(tmp_path, source), remote).describe(requests(10))))
    assert list(found.values()).count("ok") == 3 and len(found) == 10
    assert starts(tmp_path) == 3


def test_a_program_gets_the_attributes_and_the_instruction(tmp_path: Path) -> None:
    source = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    text = row["instruction"] + "|" + row["attributes"]["gender"] + "|" + ",".join(sorted(row))
    print(json.dumps({"id": row["id"], "text": text}), flush=True)
"""
    request = replace(requests(1)[0], attributes={"gender": "woman \u2603"}, instruction="Be brief.")
    reply = next(CommandDescriber(program(tmp_path, source), RemoteConfig()).describe([request]))
    fields = "attempt,attributes,id,image_id,image_path,instruction,kind,prompt,style_id,system"
    assert reply.text == f"Be brief.|woman \u2603|{fields}"


def test_garbage_huge_lines_and_second_answers_are_left_out(tmp_path: Path) -> None:
    source = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    out = sys.stdout
    out.write("x" * 5_000_000 + "\\n" + "[" * 100_000 + "\\n" + "null\\n[1]\\n\\n")
    out.write('{"id": [1]}\\n{"id": true, "text": "t"}\\n')
    out.write('{"id": 1e400, "text": "t"}\\n{"id": ' + "9" * 5000 + ', "text": "t"}\\n')
    out.buffer.write(b"\\xff\\xfe\\n")
    for text in ("first", "second"):
        out.write(json.dumps({"id": row["id"], "text": text, "tokens_in": True, "tokens_out": 10**12}) + "\\n")
    out.flush()
"""
    replies = list(CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=2)).describe(requests(6)))
    assert [reply.text for reply in replies] == ["first"] * 6 and len(by_image(replies)) == 6
    assert {(reply.tokens_in, reply.tokens_out) for reply in replies} == {(0, 0)}


def test_warnings_about_garbage_are_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = """
import json, sys
for line in sys.stdin:
    print("noise\\n" * 1000 + json.dumps({"id": json.loads(line)["id"], "text": "fine"}), flush=True)
"""
    with caplog.at_level("WARNING", logger="reidctl"):
        list(CommandDescriber(program(tmp_path, source), RemoteConfig()).describe(requests(3)))
    assert len(caplog.records) <= 5


def test_a_program_that_does_not_read_blocks_nobody(tmp_path: Path) -> None:
    # 200 prompts of 10,000 characters are more than a pipe holds.
    many = [replace(request, prompt="p" * 10_000) for request in requests(200)]
    silent = program(tmp_path, "import time; time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"timed out after 0\.4 s before it answered"):
        list(CommandDescriber(silent, RemoteConfig(timeout_s=0.4, concurrency=200)).describe(many))
    assert time.monotonic() - began < 30


def test_a_program_that_writes_before_it_reads_blocks_nobody(tmp_path: Path) -> None:
    source = """
import json, sys
sys.stdout.write("noise\\n" * 20_000)
sys.stdout.flush()
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "text": "fine"}), flush=True)
"""
    many = [replace(request, prompt="p" * 10_000) for request in requests(60)]
    replies = list(CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=60)).describe(many))
    assert [reply.status for reply in replies] == ["ok"] * 60


def test_each_request_has_its_own_time(tmp_path: Path) -> None:
    # One request is never answered; the others keep the program busy for longer than the limit.
    source = """
import json, sys, time
for line in sys.stdin:
    row = json.loads(line)
    if row["image_id"] != "image-0":
        time.sleep(0.25)
        print(json.dumps({"id": row["id"], "text": "fine"}), flush=True)
"""
    replies = list(
        CommandDescriber(counted(tmp_path, source), RemoteConfig(concurrency=2, timeout_s=1.5)).describe(requests(12))
    )
    found = by_image(replies)
    assert [image for image, status in found.items() if status == "failed"] == ["image-0"] and len(found) == 12
    assert "timed out" in str(next(reply.reason for reply in replies if reply.status == "failed"))
    assert starts(tmp_path) == 1


def test_a_caller_who_takes_long_does_not_make_answers_late(tmp_path: Path) -> None:
    replies = CommandDescriber(program(tmp_path, ECHO), RemoteConfig(concurrency=4, timeout_s=1.5)).describe(
        requests(4)
    )
    found = [next(replies)]
    time.sleep(2.0)
    found += list(replies)
    assert [reply.status for reply in found] == ["ok"] * 4


def test_a_program_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    source = """
import json, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for number, line in enumerate(sys.stdin):
    if LIFE == 1 and number == 3:
        time.sleep(60)
    print(json.dumps({"id": json.loads(line)["id"], "text": "fine"}), flush=True)
"""
    began = time.monotonic()
    describer = CommandDescriber(counted(tmp_path, source), RemoteConfig(concurrency=1, timeout_s=1.5))
    found = by_image(list(describer.describe(requests(8))))
    assert list(found.values()).count("ok") == 7 and found["image-3"] == "failed"
    assert starts(tmp_path) == 2 and time.monotonic() - began < 30


def test_a_program_that_closes_its_output_but_lives_is_lost(tmp_path: Path) -> None:
    source = """
import json, os, sys, time
line = sys.stdin.readline()
print(json.dumps({"id": json.loads(line)["id"], "text": "fine"}), flush=True)
os.close(1)
time.sleep(60)
"""
    began = time.monotonic()
    replies = list(
        CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=2, attempts=1)).describe(requests(3))
    )
    assert [reply.status for reply in replies] == ["ok", "failed", "failed"]
    assert "closed its output" in str(replies[-1].reason) and time.monotonic() - began < 30


def is_alive(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("way", ["end", "close", "interrupt"])
def test_no_child_of_the_program_survives(tmp_path: Path, way: str) -> None:
    source = f"""
import json, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", sleep])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
for line in sys.stdin:
    print(json.dumps({{"id": json.loads(line)["id"], "text": "fine"}}), flush=True)
"""
    replies = CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=1)).describe(requests(3))
    assert next(replies).status == "ok"
    pids = [int(number) for number in (tmp_path / "pids").read_text().split()]
    assert all(is_alive(number) for number in pids)
    if way == "end":
        assert len(list(replies)) == 2
    elif way == "close":
        replies.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            replies.throw(KeyboardInterrupt())
    until = time.monotonic() + 3
    while any(is_alive(number) for number in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert [number for number in pids if is_alive(number)] == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_program_that_ignores_its_input_does_not_outlive_a_killed_client(tmp_path: Path) -> None:
    source = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}\\n")
time.sleep(60)
"""
    client = f"""
from reidctl.captioning.backends.base import Request
from reidctl.captioning.backends.command import CommandDescriber
from reidctl.captioning.config import RemoteConfig
describer = CommandDescriber({program(tmp_path, source)!r}, RemoteConfig())
list(describer.describe([Request("i", "", "identity", "", "", "")]))
"""
    running = subprocess.Popen([sys.executable, "-c", client])
    pids = tmp_path / "pids"
    wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    numbers = [int(number) for number in pids.read_text().split()]
    assert all(is_alive(number) for number in numbers)
    running.kill()
    running.wait()
    wait_until(lambda: not any(is_alive(number) for number in numbers))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_nothing_waits_beside_a_program_that_ended(tmp_path: Path) -> None:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = children.read_text()
    assert len(list(CommandDescriber(program(tmp_path, ECHO), RemoteConfig()).describe(requests(3)))) == 3
    assert children.read_text() == before


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_OWN_KEY"])
def test_a_key_that_the_program_repeats_is_stored_nowhere(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reidctl.captioning.run import caption_images

    monkeypatch.setenv(name, "plainsecret0123456789")
    source = f"""
import json, os, sys
for line in sys.stdin:
    row, key = json.loads(line), os.environ[{name!r}]
    said = {{"error": f"Incorrect API key provided: {{key}}, sk-proj-abcdefghijklmnop"}}
    if row["kind"] == "clothing":
        said = {{"text": f"The person wears a red coat and black boots, {{key}}."}}
    print(json.dumps({{"id": row["id"]}} | said), flush=True)
"""
    images = pd.DataFrame(
        {"image_id": ["a", "b"], "path": "x.png", "split": "train", "sha256": "0", "width": 64, "height": 128}
    )
    remote = RemoteConfig(key_env="MY_OWN_KEY", max_failures=100)
    config = CaptionConfig(mllm="command:x", remote=remote)
    describer = CommandDescriber(program(tmp_path, source), remote)
    made = caption_images(images, None, describer, config, tmp_path / "run")
    reasons = dict(zip(made.captions["kind"], made.captions["reason"], strict=True))
    assert reasons["identity"].endswith(": [key], [key]")
    assert reasons["clothing"] == "the text repeats an API key"
    stored = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"plainsecret" not in stored and b"sk-proj" not in stored


def test_a_child_that_keeps_the_output_open_does_not_hide_the_end(tmp_path: Path) -> None:
    source = """
import json, subprocess, sys
line = sys.stdin.readline()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"id": json.loads(line)["id"], "text": "fine"}), flush=True)
"""
    began = time.monotonic()
    replies = list(
        CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=1, attempts=1)).describe(requests(2))
    )
    assert [reply.status for reply in replies] == ["ok", "failed"] and time.monotonic() - began < 30


def test_requests_are_read_as_replies_are_taken(tmp_path: Path) -> None:
    read = 0

    def counting() -> Iterator[Request]:
        nonlocal read
        for request in requests(100):
            read += 1
            yield request

    replies = CommandDescriber(program(tmp_path, ECHO), RemoteConfig(concurrency=4)).describe(counting())
    for taken in range(1, 20):
        next(replies)
        assert read <= taken + 4
    replies.close()


def test_nothing_is_started_for_no_requests(tmp_path: Path) -> None:
    assert list(CommandDescriber("/no/such/program", RemoteConfig()).describe([])) == []


@pytest.mark.parametrize("command", ["", "  ", "'open", "''"])
def test_a_command_that_is_none_is_a_usage_error(command: str) -> None:
    with pytest.raises(UsageError):
        CommandDescriber(command, RemoteConfig())


@pytest.mark.covers(132)
def test_replay_gives_the_nth_reply_to_the_nth_attempt(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    rows = [{"image_id": "image-0", "kind": "identity", "text": text, "model": "m"} for text in ("first", "second")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    describer = ReplayDescriber(path)
    asked = [Request("image-0", "", "identity", "", "", "", attempt=attempt) for attempt in (1, 2, 3)]
    assert [reply.text for reply in describer.describe(asked)] == ["first", "second", "second"]
    assert describer.model == "m"
    assert next(describer.describe([Request("other", "", "identity", "", "", "")])).status == "failed"


@pytest.mark.parametrize("line", ["not json", '{"image_id": "a"}', "[1]"])
def test_a_damaged_replay_file_is_a_data_error_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match="line 1"):
        ReplayDescriber(path)
    with pytest.raises(DataError, match="Cannot read"):
        ReplayDescriber(tmp_path / "absent")


def test_names_choose_the_describer() -> None:
    def made(mllm: str, **remote: object) -> str:
        return make_describer(CaptionConfig(mllm=mllm, remote=RemoteConfig(**remote))).model  # type: ignore[arg-type]

    assert made("template") == "template-3"
    assert made("gpt-4") == "gpt-4o"
    assert made("openai:some-model") == "some-model"
    assert made("qwen-vl", base_url="http://127.0.0.1:1/v1") == "qwen-vl"
    assert made("command:prog x").startswith("command:prog#")
    for wrong in ("qwen-vl", "replay:", "file:", "hf:", "command:", ""):
        with pytest.raises(UsageError):
            made(wrong)
