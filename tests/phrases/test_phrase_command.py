"""A program that finds phrases: any order, noise, errors, death, silence; never a shell."""

import os
import sys
import time

import pytest

from reidctl.errors import RemoteError, UsageError
from reidctl.phrases.base import Phrase, PhraseConfig
from reidctl.phrases.command import CommandSource
from reidctl.phrases.rules import extract
from reidctl.stages.phrases import phrase_source

ECHO = """
import json, sys
def say(**row):
    print(json.dumps(row), flush=True)
for line in sys.stdin:
    row = json.loads(line)
    if row["caption"] == "bad":
        say(id=row["id"], error="no")
    elif row["caption"] == "odd":
        say(id=row["id"], phrases="red")
    else:
        say(id=row["id"], phrases=row["caption"].split(", ")[: row["limit"]])
"""


def program(folder, source=ECHO):
    path = folder / "program.py"
    path.write_text(source)
    return f"{sys.executable} {path}"


@pytest.mark.covers(172)
def test_a_program_answers_every_caption_over_several_calls(tmp_path):
    source = CommandSource(program(tmp_path), 8, concurrency=4)
    texts = [f"red hat, blue shoe {n}" for n in range(30)]
    found = source([*texts, texts[0]])
    assert [[p.text for p in phrases] for phrases in found[:30]] == [text.split(", ") for text in texts]
    assert found[30] == found[0] and found[0][0] == Phrase("red hat", 0, 7, "head")
    assert source(["a wug"]) == [[Phrase("a wug", 0, 5, "whole")]]


def test_answers_may_come_in_any_order_with_noise_between(tmp_path, caplog):
    source = """
import json, sys
rows = [json.loads(sys.stdin.readline()) for _ in range(3)]
print("loading", flush=True)
print(json.dumps({"id": 99, "phrases": ["ghost"]}), flush=True)
print(json.dumps({"id": True, "phrases": ["ghost"]}), flush=True)
print("[" * 100000, flush=True)
print("x" * 3000000, flush=True)
for row in reversed(rows):
    print(json.dumps({"id": row["id"], "phrases": [row["caption"]]}), flush=True)
"""
    texts = ["red hat", "blue hat", "green hat"]
    found = CommandSource(program(tmp_path, source), 8)(texts)
    assert [phrases[0].text for phrases in found] == texts
    assert caplog.text.count("left out") == 5


def test_errors_of_single_captions_fall_back_to_the_rules_and_are_not_stored(tmp_path, caplog):
    config = PhraseConfig(backend="command", command=program(tmp_path))
    path = tmp_path / "phrases.jsonl"
    texts = ["bad", "odd", "a red hat"]
    found = phrase_source(config, cache=path)(texts)
    assert found == [extract("bad"), extract("odd"), [Phrase("a red hat", 0, 9, "head")]]
    assert len(path.read_text().splitlines()) == 1
    assert "2 caption(s) so far have no usable answer of the program" in caplog.text


def test_a_second_run_starts_no_program(tmp_path):
    marker = tmp_path / "starts"
    command = program(tmp_path, f"open({str(marker)!r}, 'a').write('x')\n{ECHO}")
    config = PhraseConfig(backend="command", command=command)
    for _ in range(2):
        assert phrase_source(config, cache=tmp_path / "p.jsonl")(["red hat"]) == [[Phrase("red hat", 0, 7, "head")]]
    assert marker.read_text() == "x"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise SystemExit(3)", "ended with code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("import time; time.sleep(60)", "gave no answer for 0.5 s"),
        ("while True: print('noise', flush=True)", "gave no answer for 0.5 s"),
    ],
)
def test_a_lost_program_is_a_remote_error(tmp_path, source, problem):
    timeout_s = 0.5 if "0.5" in problem else 30
    with pytest.raises(RemoteError, match=problem):
        CommandSource(program(tmp_path, source), 8, timeout_s=timeout_s)(["red hat"])


def test_what_came_before_a_program_died_is_stored_and_the_next_run_goes_on(tmp_path):
    dying = ECHO + "    if row['id'] == 299: sys.exit(7)\n"
    config = PhraseConfig(backend="command", command=program(tmp_path, dying))
    texts = [f"red hat {number}" for number in range(400)]
    path = tmp_path / "p.jsonl"
    with pytest.raises(RemoteError, match="ended with code 7"):
        phrase_source(config, cache=path)(texts)
    assert len(path.read_text().splitlines()) == 256
    assert len(phrase_source(config, cache=path)(texts)) == 400


def test_a_program_that_cannot_start_or_is_none(tmp_path):
    with pytest.raises(RemoteError, match="Cannot start"):
        CommandSource("/no/such/program", 8)(["red hat"])
    for command in ("a 'b", "''"):
        with pytest.raises(UsageError):
            CommandSource(command, 8)
    CommandSource("/no/such/program", 8)([])


def test_no_shell_reads_the_command(tmp_path):
    marker = tmp_path / "owned"
    assert CommandSource(f"{program(tmp_path)} ; touch {marker}", 8)(["red hat"])[0]
    assert not marker.exists()


def test_the_identity_holds_no_argument():
    one, two = CommandSource("prog --token s3cret", 8), CommandSource("prog", 8)
    assert "s3cret" not in one.identity and one.identity != two.identity


@pytest.mark.usefixtures("openai_key")
def test_an_answer_that_repeats_the_key_is_dropped(tmp_path):
    source = ECHO.replace('row["caption"].split(", ")', '[__import__("os").environ["OPENAI_API_KEY"]]')
    assert CommandSource(program(tmp_path, source), 8)(["a red hat"]) == [extract("a red hat")]


def test_the_program_and_its_children_end_with_the_source(tmp_path):
    pids = tmp_path / "pids"
    source = f"""
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
{ECHO}"""
    find = CommandSource(program(tmp_path, source), 8)
    find(["red hat"])
    numbers = [int(word) for word in pids.read_text().split()]
    del find
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(lives, numbers)):
        time.sleep(0.05)
    assert not any(map(lives, numbers))


def lives(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False
