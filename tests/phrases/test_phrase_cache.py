"""Stored phrases: asked for once, whole after a kill, refused when damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from reidctl.errors import DataError
from reidctl.phrases.base import Phrase
from reidctl.phrases.cache import cache_key, cached
from reidctl.phrases.rules import extract


class Source:
    """The rules, and what they were asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, captions):
        self.asked.append(list(captions))
        return [extract(text) for text in captions]


TEXTS = [f"a red shirt and {n} black shoes" for n in ("two", "old", "torn", "shiny", "new")]


@pytest.mark.covers(172)
def test_only_unknown_captions_are_asked_for_in_bounded_batches(tmp_path):
    source = Source()
    find = cached(source, tmp_path / "deep" / "phrases.jsonl", "x", batch=2)
    first = find([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]])
    assert source.asked == [TEXTS[:2], TEXTS[2:3]]
    assert first == [extract(text) for text in (TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2])]
    assert find(TEXTS[:3]) == first[:2] + first[3:]
    assert len(source.asked) == 2


def test_another_process_finds_what_is_stored_and_another_backend_does_not(tmp_path):
    path, source = tmp_path / "phrases.jsonl", Source()
    cached(source, path, "x")(TEXTS)
    again = Source()
    assert cached(again, path, "x")(TEXTS) == [extract(text) for text in TEXTS]
    assert again.asked == []
    cached(again, path, "y")(TEXTS[:1])
    assert again.asked == [TEXTS[:1]]
    assert cache_key("x", "y") != cache_key("y", "x")


def test_a_caller_cannot_change_what_is_stored(tmp_path):
    find = cached(Source(), tmp_path / "phrases.jsonl", "x")
    find(TEXTS[:1])[0].clear()
    assert find(TEXTS[:1])[0] == extract(TEXTS[0])


def test_captions_without_phrases_and_with_odd_letters_are_stored_too(tmp_path):
    odd = ["", "nothing", "红 shirt\u2028 and a bow\n", "half \ud800 a red hat"]
    path, source = tmp_path / "phrases.jsonl", Source()
    cached(source, path, "x")(odd)
    assert cached(source, path, "x")(odd) == [extract(text) for text in odd]
    assert len(source.asked) == 1


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_that_breaks_off_is_passed_over_and_written_anew(tmp_path, cut):
    path = tmp_path / "phrases.jsonl"
    cached(Source(), path, "x")(TEXTS[:2])
    path.write_bytes(path.read_bytes()[:-cut])
    source = Source()
    assert cached(source, path, "x")(TEXTS[:2]) == [extract(text) for text in TEXTS[:2]]
    assert source.asked == [TEXTS[1:2]]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["caption"] for row in rows] == TEXTS[:2]


def test_a_file_that_is_one_torn_line_is_written_anew(tmp_path):
    path = tmp_path / "phrases.jsonl"
    path.write_bytes(b'{"key": "' + b"x" * 200_000)
    cached(Source(), path, "x")(TEXTS[:1])
    assert len(path.read_text().splitlines()) == 1


def test_two_writers_share_a_file(tmp_path):
    path = tmp_path / "phrases.jsonl"
    one, two = cached(Source(), path, "x"), cached(Source(), path, "x")
    one(TEXTS[:1])
    two(TEXTS[1:2])
    one(TEXTS[2:3])
    last = Source()
    cached(last, path, "x")(TEXTS[:3])
    assert last.asked == []


GOOD = {"key": "k", "caption": "red hat", "phrases": [{"text": "red hat", "start": 0, "end": 7, "part": "head"}]}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "null",
        json.dumps({**GOOD, "key": 1}),
        json.dumps({**GOOD, "caption": None}),
        json.dumps({**GOOD, "phrases": ["red hat"]}),
        json.dumps({**GOOD, "phrases": [{**GOOD["phrases"][0], "part": "tail"}]}),
        json.dumps({**GOOD, "phrases": [{**GOOD["phrases"][0], "end": 6}]}),
        json.dumps({**GOOD, "phrases": [{**GOOD["phrases"][0], "end": "7"}]}),
        json.dumps({**GOOD, "phrases": [{**GOOD["phrases"][0], "more": 1}]}),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_one_error_with_its_line(tmp_path, line):
    path = tmp_path / "phrases.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError, match=r"phrases\.jsonl, line 2 ") as caught:
        cached(Source(), path, "x")(TEXTS)
    assert "Delete" in caught.value.hint


def test_what_a_fallback_answered_is_used_and_not_stored(tmp_path):
    path, source = tmp_path / "phrases.jsonl", Source()
    find = cached(source, path, "x", keep=lambda text: text != TEXTS[0])
    assert find(TEXTS[:2]) == [extract(text) for text in TEXTS[:2]]
    find(TEXTS[:2])
    assert source.asked == [TEXTS[:2], TEXTS[:1]]
    assert len(path.read_text().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot"):
        cached(Source(), tmp_path / "file" / "phrases.jsonl", "x")(TEXTS)


KILLED = """
import sys, time
from pathlib import Path
from reidctl.phrases.cache import cached
from reidctl.phrases.rules import extract
def slow(captions):
    time.sleep(0.02)
    return [extract(text) for text in captions]
cached(slow, Path(sys.argv[1]), "x", batch=1)([f"a red shirt {number}" for number in range(100_000)])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "phrases.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stored = path.read_bytes().count(b"\n")
    assert stored >= 3
    source = Source()
    found = cached(source, path, "x")([f"a red shirt {number}" for number in range(stored + 2)])
    assert sum(map(len, source.asked)) == 2
    assert found[0] == [Phrase("red shirt", 2, 11, "upper")]
