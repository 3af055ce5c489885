import json
from pathlib import Path

import pytest

from reidctl.captioning.journal import Entry, Index, Journal, Usage
from reidctl.errors import DataError


def entry(image: str, status: str = "ok", **changes) -> Entry:
    return Entry(image, "0", "identity", "d", 1, status, **({"text": f"text of {image}", "reason": None} | changes))


def images(stored: Index) -> list[str]:
    return [found.image_id for found in stored.entries()]


@pytest.mark.covers(132)
def test_a_reply_is_found_by_its_key_and_read_from_disk(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for name in ("a", "b"):
            journal.append(entry(name, codes=("length",), model="m", batch=True))
        assert journal.entry(entry("b").key) == entry("b", codes=("length",), model="m", batch=True)
        assert journal.find(entry("c").key) is None and journal.entry(entry("c").key) is None
    stored = Index(tmp_path).load()
    assert stored.entry(entry("a").key) == entry("a", codes=("length",), model="m", batch=True)
    stored.close()


def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(entry("a"))
        journal.append(entry("b"))
    part = tmp_path / "replies-000.jsonl"
    whole = part.read_bytes()
    for cut in (1, 2, 50, len(whole.splitlines(keepends=True)[1]) - 1):
        part.write_bytes(whole[:-cut])
        with Journal(tmp_path) as journal:
            assert images(journal) == ["a"]
            journal.append(entry("c"))
        with Journal(tmp_path) as journal:
            assert images(journal) == ["a", "c"]


def test_damage_in_the_middle_loses_its_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path) as journal:
        for name in ("a", "b", "c"):
            journal.append(entry(name))
    part = tmp_path / "replies-000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    for broken in (b"\x00" * 40 + b"\n", b"[1]\n", b'{"image_id": 3}\n', b"\xff\xfe\n", b"{}\n"):
        part.write_bytes(lines[0] + broken + lines[2])
        with caplog.at_level("WARNING", logger="reidctl"), Journal(tmp_path) as journal:
            assert images(journal) == ["a", "c"]


def test_all_parts_are_read_and_one_process_writes_a_part(tmp_path: Path) -> None:
    with Journal(tmp_path, "replies-001.jsonl") as other:
        other.append(entry("b"))
        with Journal(tmp_path) as journal:
            assert images(journal) == ["b"]
            with pytest.raises(DataError, match="Another process"), Journal(tmp_path):
                pass


def test_the_part_another_process_is_writing_may_end_in_half_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal(tmp_path, "replies-001.jsonl") as other:
        other.append(entry("b"))
        with (tmp_path / "replies-001.jsonl").open("ab") as stream:
            stream.write(b'{"image_id": "half')
        with caplog.at_level("WARNING", logger="reidctl"), Journal(tmp_path) as journal:
            assert images(journal) == ["b"]
    assert not caplog.records


def test_a_failed_entry_is_replaced_and_a_final_one_stays(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for status in ("failed", "ok", "failed"):
            journal.append(entry("a", status))
        assert [kept.status for kept in journal.entries()] == ["ok"]


def test_two_machines_with_one_reply_agree_on_the_first_part(tmp_path: Path) -> None:
    for part, text in (("replies-0002-of-0002.jsonl", "two"), ("replies-0001-of-0002.jsonl", "one")):
        with Journal(tmp_path, part) as journal:
            journal.append(entry("a", text=text))
    stored = Index(tmp_path).load()
    assert [kept.text for kept in stored.entries()] == ["one"]
    stored.close()


def test_a_final_reply_judged_by_other_checks_gives_way_to_a_later_one(tmp_path: Path) -> None:
    with Journal(tmp_path, checks="new") as journal:
        journal.append(entry("a", "rejected", checks="old"))
        slot = journal.find(entry("a").key)
        assert slot is not None and slot.stale and slot.final
        journal.append(entry("a", "ok", checks="new"))
        journal.append(entry("a", "rejected", checks="new"))
        assert [kept.status for kept in journal.entries()] == ["ok"]


def test_judgements_of_several_parts_are_put_in_order_by_their_time(tmp_path: Path) -> None:
    with Journal(tmp_path, "replies-0001-of-0001.jsonl") as shard:
        shard.append(entry("a", "ok", text="early", checks="old", time=1.0))
    with Journal(tmp_path) as merged:  # its part comes first by name
        merged.append(entry("a", "ok", text="late", checks="strict", time=2.0))
        merged.append(entry("a", "failed", text=None, time=3.0))
    stored = Index(tmp_path, checks="new").load()
    assert [(kept.text, kept.status) for kept in stored.entries()] == [("late", "ok")]
    stored.close()


@pytest.mark.parametrize(
    "change", [{"tokens_in": None}, {"text": 5}, {"attempt": "1"}, {"codes": 3}, {"time": "x"}, {"batch": None}]
)
def test_a_line_with_a_value_of_another_type_is_left_out(tmp_path: Path, change: dict) -> None:
    row = {"image_id": "a", "image_version": "0", "kind": "identity", "prompt_sha256": "d", "attempt": 1}
    row |= {"status": "ok", "text": "x", "reason": None}
    tmp_path.joinpath("replies-000.jsonl").write_text(json.dumps(row | change) + "\n" + "[" * 100_000 + "\n")
    assert len(Index(tmp_path).load()) == 0


def test_tokens_are_summed_over_everything_that_was_paid_for(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(entry("a", "retry", tokens_in=10, tokens_out=1, model="m"))
        journal.append(entry("a", "ok", tokens_in=10, tokens_out=2, model="m"))
        journal.append(entry("b", "ok", tokens_in=5, tokens_out=3, model="m", batch=True))
    stored = Index(tmp_path).load()
    assert (stored.tokens_in, stored.tokens_out) == (25, 6)
    assert stored.tokens[Usage("m", False), "in"] == 20 and stored.tokens[Usage("m", True), "out"] == 3
    stored.close()


def test_lines_of_an_earlier_and_a_later_version_are_read(tmp_path: Path) -> None:
    old = {"image_id": "a", "image_version": "0", "kind": "identity", "prompt_sha256": "d", "attempt": 1}
    old |= {"status": "ok", "text": "old", "reason": None}
    tmp_path.joinpath("replies-000.jsonl").write_text(
        json.dumps(old) + "\n" + json.dumps(old | {"image_id": "b", "new": 1}) + "\n"
    )
    stored = Index(tmp_path).load()
    assert images(stored) == ["a", "b"]
    stored.close()


def test_texts_are_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    long = "x" * 2000
    with Journal(tmp_path) as journal:
        journal.append(entry("warm", text=long))
        tracemalloc.start()
        for number in range(2000):
            journal.append(entry(f"image-{number}", text=long))
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert grown < 2000 * 600, f"{grown / 2000:.0f} bytes per reply of 2,000 characters"
