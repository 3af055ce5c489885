import hashlib
import json
from collections.abc import Generator, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reidctl.captioning.backends.base import Reply, Request, failed, make_describer, rejected
from reidctl.captioning.backends.file import FileDescriber
from reidctl.captioning.backends.replay import ReplayDescriber
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.journal import Entry
from reidctl.errors import DataError, UsageError

BODY, CLOTHES = "The person is an adult woman of slim build.", "The person wears a red coat and black boots."


def ask(image_id: str, kind: str = "identity", path: str = "", attempt: int = 1, digest: str = "") -> Request:
    """A request for an image whose every name means it alone."""
    names = (image_id, image_id.partition(":")[2] or image_id, *((path,) if path else ()))
    return Request(image_id, "/root/" + path, kind, "", "", digest, attempt=attempt, names=names)


def answer(describer: FileDescriber | ReplayDescriber, request: Request) -> Reply:
    return next(describer.describe([request]))


def wide(tmp_path: Path, suffix: str, **columns: list[object]) -> Path:
    path = tmp_path / f"texts{suffix}"
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        mark = "\t" if suffix == ".tsv" else ","
        path.write_text(
            "\n".join(mark.join(map(str, cells)) for cells in [list(columns), *(row.values() for row in rows)])
        )
    return path


@pytest.mark.covers(132)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_texts_are_found_by_id_by_path_in_the_dataset_and_by_path(tmp_path: Path, suffix: str) -> None:
    path = wide(
        tmp_path, suffix, image=["d:a/1.png", "a/2.png", "/data/3.png"], identity=[BODY] * 3, clothing=[CLOTHES] * 3
    )
    describer = FileDescriber(path)
    for request in (ask("d:a/1.png"), ask("d:a/2.png"), ask("d:x/3.png", path="/data/3.png")):
        assert answer(describer, request).text == BODY
    assert answer(describer, ask("d:a/1.png", "clothing")).text == CLOTHES
    absent = answer(describer, ask("d:a/9.png"))
    assert absent.status == "failed" and str(absent.reason).startswith(f"no text in texts{suffix}")
    assert answer(describer, ask("d:a/1.png", "neutral")).status == "failed"


@pytest.mark.parametrize("column", ["image", "image_id", "path", "IMAGE_ID"])
@pytest.mark.parametrize("suffix", ["", "_text"])
def test_columns_have_the_names_of_other_tables_too(tmp_path: Path, column: str, suffix: str) -> None:
    path = wide(tmp_path, ".csv", **{column: ["1.png"], f"identity{suffix}": [BODY], f"clothing{suffix}": [CLOTHES]})
    assert [answer(FileDescriber(path), ask("d:1.png", kind)).text for kind in ("identity", "clothing")] == [
        BODY,
        CLOTHES,
    ]


def test_one_row_per_text_and_rows_of_other_kinds(tmp_path: Path) -> None:
    path = wide(
        tmp_path, ".jsonl", image_id=["d:1", "d:1", "d:1", "d:2"], path=["x", "y", "z", "w"],
        kind=["identity", "clothing", "full", "identity"], text=[BODY, CLOTHES, "Whatever.", None],
    )  # fmt: skip
    describer = FileDescriber(path)
    assert [answer(describer, ask("d:1", kind)).text for kind in ("identity", "clothing")] == [BODY, CLOTHES]
    assert answer(describer, ask("d:1", "full")).status == answer(describer, ask("d:2")).status == "failed"


def test_the_captions_table_of_a_run_is_such_a_file(tmp_path: Path) -> None:
    from reidctl.tables import empty, write_table

    row = {name: None for name in empty("captions").columns} | {
        "caption_id": "c", "image_id": "d:1", "kind": "identity", "source": "mllm", "conditioned_on": "image",
        "text": BODY, "model": "gpt-4o", "status": "ok",
    }  # fmt: skip
    write_table(tmp_path / "captions.parquet", "captions", pd.DataFrame([row], dtype=object))
    describer = FileDescriber(tmp_path / "captions.parquet")
    assert answer(describer, ask("d:1")).text == BODY
    assert describer.model.endswith(" (gpt-4o)")


def test_the_model_names_the_file_its_content_and_who_wrote_it(tmp_path: Path) -> None:
    one = FileDescriber(wide(tmp_path, ".csv", image=["1"], identity=[BODY]))
    digest = hashlib.sha256((tmp_path / "texts.csv").read_bytes()).hexdigest()[:8]
    assert (one.model, one.source, one.repeats) == (f"file:texts.csv#{digest}", "mllm", True)
    two = FileDescriber(wide(tmp_path, ".csv", image=["1", "2"], identity=[BODY, BODY], model=["b", "a"]))
    assert two.model.startswith("file:texts.csv#") and two.model.endswith(" (a+b)") and digest not in two.model


def test_the_same_text_again_is_fine_and_another_one_is_not(tmp_path: Path) -> None:
    FileDescriber(wide(tmp_path, ".csv", image=["1", "1", r".\1"], identity=[BODY] * 3))
    with pytest.raises(DataError, match="data row 2: image 1 has another identity text"):
        FileDescriber(wide(tmp_path, ".csv", image=["1", "1"], identity=[BODY, CLOTHES]))


@pytest.mark.covers(132)
def test_a_name_that_two_images_share_gives_neither_the_text_of_the_other(tmp_path: Path) -> None:
    """Whoever is asked first, also where only the second image is asked, as a resumed run does."""
    from reidctl.captioning.run import caption_images

    path = wide(tmp_path, ".csv", image=["1.png", "b:2.png", "deep/3.png"], identity=[BODY] * 3, clothing=[CLOTHES] * 3)
    ids, paths = ["a:1.png", "b:1.png", "b:2.png", "b:x"], ["a/1.png", "b/1.png", "b/2.png", "deep/3.png"]
    images = pd.DataFrame({"image_id": ids, "path": paths, "split": "train", "sha256": "x", "width": 64, "height": 128})
    for wanted in (images, images.iloc[::-1]):
        out = tmp_path / f"run-{wanted['image_id'].iloc[0][0]}"
        for _ in range(2):
            made = caption_images(wanted, None, FileDescriber(path), CaptionConfig(mllm="file:x"), out)
        found = made.captions.set_index("image_id")["status"]
        assert {image: set(found[image]) for image in ids} == {
            "a:1.png": {"failed"}, "b:1.png": {"failed"}, "b:2.png": {"ok"}, "b:x": {"ok"},
        }  # fmt: skip


def test_of_the_names_of_a_request_the_first_with_a_text_counts_and_no_other_name(tmp_path: Path) -> None:
    describer = FileDescriber(
        wide(tmp_path, ".csv", image=["1.png", "d:1.png", "d/1.png"], identity=["Bare.", "Full.", "Path."])
    )
    request = Request("d:1.png", "d/1.png", "identity", "", "", "", names=("d:1.png", "1.png", "d/1.png"))
    assert answer(describer, request).text == "Full."
    assert answer(describer, replace(request, names=("d:9.png", "d/1.png"))).text == "Path."
    assert answer(describer, replace(request, names=())).status == "failed"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("image,identity\n", "has no rows"),
        ("image,body\n1,2\n", "needs the columns"),
        ("identity\nx\n", "needs the columns"),
        ("image,identity\n,text\n", "data row 1: `image` is empty"),
        ('image,identity\n1,"open\n', "quot"),
        ("image,identity\n1,a\0b\n", "NUL"),
    ],
)
def test_a_damaged_table_is_a_data_error(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "texts.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        FileDescriber(path)


def test_a_missing_file_and_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        make_describer(CaptionConfig(mllm=f"file:{tmp_path}/absent.csv"))
    with pytest.raises(UsageError, match="no batch service"):
        make_describer(CaptionConfig.model_validate({"mllm": "file:x.csv", "batch": {"enabled": True}}))


def test_half_characters_are_found_and_do_not_stop_the_reading(tmp_path: Path) -> None:
    path = wide(tmp_path, ".jsonl", image=["1"], identity=["A person of \u2603 build"])
    assert answer(FileDescriber(path), ask("d:\udcff")).status == "failed"


# A recorded run.


def entry(attempt: int, status: str, text: str | None, *, digest: str = "p", reason: str | None = None) -> Entry:
    return Entry("d:1", "v", "identity", digest, attempt, status, text, reason, tokens_in=attempt, model="gpt-4o")


def recorded(folder: Path, *entries: Entry, part: str = "replies-000.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / part).open("a") as stream:
        stream.writelines(json.dumps(asdict(one)) + "\n" for one in entries)
    return folder


def replayed(describer: ReplayDescriber, *attempts: int, digest: str = "p") -> list[tuple[str, str | None]]:
    replies = describer.describe([ask("d:1", attempt=attempt, digest=digest) for attempt in attempts])
    return [(reply.status, reply.text or reply.reason) for reply in replies]


@pytest.mark.covers(132)
def test_a_recorded_run_is_replayed_attempt_by_attempt(tmp_path: Path) -> None:
    parts = recorded(
        tmp_path / "run" / "parts",
        entry(1, "failed", None, reason="the service answered 500"),
        entry(1, "retry", "Too short.", reason="too short"),
        entry(2, "retry", None, reason="the model refused"),
        entry(3, "ok", BODY),
    )
    expected = [("ok", "Too short."), ("rejected", "the model refused"), ("ok", BODY), ("ok", BODY)]
    for place in (parts, parts.parent, parts / "replies-000.jsonl"):
        describer = ReplayDescriber(place)
        assert replayed(describer, 1, 2, 3, 4) == expected
        assert describer.model == "gpt-4o"
    assert answer(ReplayDescriber(parts), ask("d:1", attempt=3, digest="p")).tokens_in == 3


def test_an_attempt_that_only_failed_fails_again(tmp_path: Path) -> None:
    describer = ReplayDescriber(recorded(tmp_path, entry(1, "failed", None, reason="no answer")))
    assert replayed(describer, 1) == [("failed", "no answer")]
    assert answer(describer, ask("d:2")).reason == "no recorded reply"


def test_several_parts_are_one_recording(tmp_path: Path) -> None:
    recorded(tmp_path, entry(1, "retry", "First."), part="replies-0001-of-0002.jsonl")
    recorded(tmp_path, entry(2, "ok", "Second."), part="replies-0002-of-0002.jsonl")
    assert replayed(ReplayDescriber(tmp_path), 1, 2) == [("ok", "First."), ("ok", "Second.")]


def test_the_same_prompt_comes_before_another(tmp_path: Path) -> None:
    describer = ReplayDescriber(
        recorded(tmp_path, entry(1, "ok", "Old.", digest="p"), entry(1, "ok", "New.", digest="q"))
    )
    assert replayed(describer, 1, digest="p") == [("ok", "Old.")]
    assert replayed(describer, 1, digest="q") == replayed(describer, 1, digest="unknown") == [("ok", "New.")]


def test_a_line_that_a_kill_cut_short_is_left_out_of_a_part_only(tmp_path: Path) -> None:
    parts = recorded(tmp_path, entry(1, "ok", BODY))
    with (parts / "replies-000.jsonl").open("a") as stream:
        stream.write('{"image_id": "d:2", "ki')
    assert replayed(ReplayDescriber(parts), 1) == [("ok", BODY)]
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text('{"image_id": "d:2", "ki')
    with pytest.raises(DataError, match="line 1: not JSON"):
        ReplayDescriber(foreign)
    (parts / "replies-001.jsonl").write_text("garbage\n" + json.dumps(asdict(entry(1, "ok", BODY))) + "\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        ReplayDescriber(parts)


@pytest.mark.parametrize(
    "changes", [{"text": 5}, {"attempt": 0}, {"attempt": "1"}, {"status": None}, {"image_id": 1}, {"kind": None}]
)
def test_a_damaged_line_of_a_part_is_a_data_error(tmp_path: Path, changes: dict[str, object]) -> None:
    (tmp_path / "replies-000.jsonl").write_text(json.dumps(asdict(entry(1, "ok", BODY)) | changes) + "\n")
    with pytest.raises(DataError, match="line 1"):
        ReplayDescriber(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = '{"image_id": "d:1", "kind": "identity", "text": "Text."}\n'
    for before in ("", "\n"):
        path.write_text(before + line, encoding="utf-8-sig")
        assert answer(ReplayDescriber(path), ask("d:1")).text == "Text."
    path.write_text(line + "\ufeff" + line, encoding="utf-8")
    with pytest.raises(DataError, match="line 2: not JSON"):
        ReplayDescriber(path)


def test_the_content_of_a_recording_is_the_digest_of_all_its_parts(tmp_path: Path) -> None:
    recorded(tmp_path, entry(1, "ok", "First."))
    recorded(tmp_path, entry(1, "ok", "Second."), part="replies-001.jsonl")
    whole = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert ReplayDescriber(tmp_path).content == hashlib.sha256(whole).hexdigest()
    edited = tmp_path / "replies-001.jsonl"
    edited.write_text(edited.read_text().replace("Second", "Other"))
    assert ReplayDescriber(tmp_path).content != hashlib.sha256(whole).hexdigest()


def test_an_empty_folder_and_an_endless_line_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded replies"):
        ReplayDescriber(tmp_path)
    (tmp_path / "long.jsonl").write_text(" " * (1 << 20) + "\n")
    with pytest.raises(DataError, match="longer than"):
        ReplayDescriber(tmp_path / "long.jsonl")


def test_half_characters_in_a_recording_do_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"image_id": "a", "kind": "identity", "text": "half \\ud800 a character", "tokens_in": true}\n')
    reply = answer(ReplayDescriber(path), ask("a"))
    assert (reply.text, reply.tokens_in) == ("half ? a character", 0)


class Flaky:
    """Fails, refuses, writes too little and writes well, by a digest of the request and of the session."""

    name, model, source, deferred, repeats = "openai", "gpt-4o", "mllm", False, False

    def __init__(self, session: int) -> None:
        self._session = session

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        for request in requests:
            code = f"{request.image_id}{request.kind}{request.attempt}{self._session}"
            way = hashlib.sha256(code.encode()).digest()[0] % 6
            if way == 0:
                yield failed(request, "the service answered 500")
            elif way == 1:
                yield rejected(request, "the model refused", tokens_in=5)
            else:
                good = BODY if request.kind == "identity" else CLOTHES
                yield Reply(request, "ok", "Too short." if way == 2 else good, tokens_in=7, tokens_out=9)


@pytest.mark.covers(132)
def test_a_run_in_two_sessions_is_replayed_to_the_same_table(tmp_path: Path) -> None:
    from reidctl.captioning.run import caption_images

    ids = [f"d:{number}.png" for number in range(60)]
    images = pd.DataFrame({"image_id": ids, "path": ids, "split": "train", "sha256": "x", "width": 64, "height": 128})
    config = CaptionConfig.model_validate({"mllm": "gpt-4o", "remote": {"max_failures": 1000}})
    for session in (1, 2):
        caption_images(images, None, Flaky(session), config, tmp_path / "run")
    caption_images(images, None, ReplayDescriber(tmp_path / "run"), config, tmp_path / "again")
    first, again = (pd.read_parquet(tmp_path / name / "captions.parquet") for name in ("run", "again"))
    assert set(first["status"]) == {"ok", "rejected", "failed"}
    # The digest of the recording is part of the image's version, and that of the id.
    pd.testing.assert_frame_equal(first.drop(columns="caption_id"), again.drop(columns="caption_id"))
