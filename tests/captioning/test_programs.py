import json
import sys
from pathlib import Path

import pytest

from reidctl.captioning.backends.base import Request, make_describer
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
    replies = list(CommandDescriber(program(tmp_path, source), RemoteConfig(concurrency=1)).describe(requests(4)))
    assert [reply.status for reply in replies] == ["ok", "failed", "failed", "failed"]


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

    assert made("template") == "template-1"
    assert made("gpt-4") == "gpt-4o"
    assert made("openai:some-model") == "some-model"
    assert made("qwen-vl", base_url="http://127.0.0.1:1/v1") == "qwen-vl"
    assert made("command:prog x").startswith("command:prog#")
    for wrong in ("qwen-vl", "replay:", "hf:org/model", ""):
        with pytest.raises(UsageError):
            made(wrong)
