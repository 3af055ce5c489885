"""`data check` on rendered and hand-made datasets with planted faults: what it finds, says and leaves alone."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from cli.commandline import cli
from PIL import Image
from typer.main import get_command

from reidctl import tables
from reidctl.cli import data_check as command
from reidctl.cli import main as entry
from reidctl.datasets import registry
from reidctl.datasets.base import Probe
from reidctl.datasets.checks import CHECKS
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import data_check, data_import, data_synth

SYNTH = {"seed": 1, "synth": {"people": 12, "images_per_person": 4, "size": (64, 32)}}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run with a rendered dataset; not to be changed."""
    path = tmp_path_factory.mktemp("clean") / "run"
    data_synth.run(Run(path), SYNTH, workers=1)
    return path


@pytest.fixture
def rendered(clean, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(clean, tmp_path / "run")


def check(run, **options):
    return data_check.run(Run(run), **{"tokenizers": ["none"], **options})


def found(record, check):
    (item,) = [item for item in record["findings"] if item["check"] == check]
    return item


def faults(record):
    return [item["check"] for item in record["findings"] if item["severity"] == "error"]


def images_of(run):
    return tables.read_table(run / "data" / "images.parquet", "images")


def write_images(run, frame):
    tables.write_table(run / "data" / "images.parquet", "images", frame)


def write_captions(run, change):
    path = run / "data" / "captions.parquet"
    frame = tables.read_table(path, "captions")
    change(frame)
    tables.write_table(path, "captions", frame)


def state(folder):
    """Names, contents and times of change of everything below a folder."""
    paths = sorted(folder.rglob("*"))
    return [
        (path, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in [folder, *paths]
    ]


# --- a run


def test_a_rendered_dataset_has_no_error_and_stays_as_it_was(clean):
    before = state(clean)
    record = check(clean, near=True)
    assert record["status"] == "ok" and not faults(record)
    assert record["metrics"]["errors"] == 0 and record["metrics"]["images"] == 48
    assert not {"leaked-images", "near-duplicates", "ambiguous-images"} & {f["check"] for f in record["findings"]}
    assert state(clean) == before


@pytest.mark.covers(11)
def test_a_test_image_copied_into_train_under_another_name_is_an_error(rendered):
    frame = images_of(rendered)
    test = frame[frame["split"] == "test"].iloc[0]
    train = frame[frame["split"] == "train"].iloc[0]
    other = "images/renamed.png"
    shutil.copy(rendered / "data" / test["path"], rendered / "data" / other)
    frame.loc[frame["image_id"] == train["image_id"], ["path", "sha256"]] = [other, test["sha256"]]
    write_images(rendered, frame)
    record = check(rendered)
    leak = found(record, "leaked-images")
    assert record["status"] == "problems" and (leak["severity"], leak["count"], leak["total"]) == ("error", 1, 48)
    assert leak["examples"] == [f"{train['image_id']} = {test['image_id']}"]
    assert leak["details"] == {"pairs": {"train also in test": 1}}
    assert found(record, "ambiguous-images")["count"] == 2, "the copy has another person's label, too"
    assert sorted(faults(record)) == ["ambiguous-images", "leaked-images"]


def test_a_test_image_saved_again_in_train_is_found_by_its_pixels_and_shrunk_by_near(rendered):
    frame = images_of(rendered)
    test = frame[frame["split"] == "test"].iloc[0]
    train = frame[frame["split"] == "train"].iloc[0]
    image = Image.open(rendered / "data" / test["path"])
    image.save(rendered / "data" / train["path"].replace(".png", ".bmp"))
    path = train["path"].replace(".png", ".bmp")
    content = (rendered / "data" / path).read_bytes()
    frame.loc[frame["image_id"] == train["image_id"], ["path", "sha256"]] = [path, hashlib.sha256(content).hexdigest()]
    write_images(rendered, frame)
    assert found(check(rendered), "leaked-images")["count"] == 1
    image.resize((24, 48)).save(rendered / "data" / path)
    record = check(rendered, near=True)
    assert found(record, "near-duplicates")["examples"] == [f"{train['image_id']} ~ {test['image_id']}"]
    assert faults(record) == ["changed-images"]
    assert "near-duplicates" not in {item["check"] for item in check(rendered)["findings"]}


@pytest.mark.covers(12)
def test_a_person_moved_into_two_splits_is_an_error(rendered):
    frame = images_of(rendered)
    train = frame[frame["split"] == "train"].iloc[0]
    frame.loc[frame["image_id"] == train["image_id"], "split"] = "test"
    write_images(rendered, frame)
    record = check(rendered)
    item = found(record, "people-in-two-splits")
    assert (item["count"], item["total"]) == (1, 12) and item["examples"][0].startswith(train["person_id"])
    assert faults(record) == ["people-in-two-splits"]


def test_damaged_and_missing_files_are_counted_by_kind(rendered):
    paths = [rendered / "data" / name for name in images_of(rendered)["path"]]
    paths[0].unlink()
    paths[1].write_bytes(b"no image")
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    Image.new("1", (9000, 9000)).save(paths[3])
    record = check(rendered)
    for kind, path in zip(("missing", "unreadable", "truncated", "huge"), paths, strict=False):
        item = found(record, f"{kind}-images")
        assert (item["count"], item["total"]) == (1, 48) and str(path) in item["examples"][0]
    assert sorted(faults(record)) == ["huge-images", "missing-images", "truncated-images", "unreadable-images"]


def test_captions_of_a_run_are_checked(rendered):
    def damage(frame):
        full = frame.index[frame["kind"] == "full"]
        frame.loc[full[0], "text"] = "A man in a cafÃ© coat."
        frame.loc[full[1], "text"] = None

    write_captions(rendered, damage)
    record = check(rendered)
    assert found(record, "encoding-captions")["count"] == found(record, "empty-captions")["count"] == 1
    assert record["status"] == "ok"


@pytest.mark.slow
@pytest.mark.covers(21)
def test_the_truncation_rate_is_that_of_the_real_tokenizers(rendered):
    def lengthen(frame):
        full = frame.index[frame["kind"] == "full"]
        # CLIP and BERT both give one token to each of these words; start and end come on top.
        frame.loc[full[0], "text"] = "red " * 75
        frame.loc[full[1], "text"] = "red " * 76
        frame.loc[full[2], "text"] = "red " * 600
        frame.loc[full[3:], "text"] = "A man in red walks."
        frame.loc[frame["kind"] != "full", "text"] = "red"

    write_captions(rendered, lengthen)
    record = check(rendered, tokenizers=["clip", "bert"])
    total = record["metrics"]["captions"]
    rates = record["metrics"]["truncation"]["synthped-a"]
    assert {name: round(rate * total) for name, rate in rates.items()} == {
        "CLIP 77": 2, "CLIP 168": 1, "BERT 64": 3, "BERT 128": 1, "BERT 512": 1,
    }  # fmt: skip
    cut = [item for item in record["findings"] if item["check"] == "truncated-captions"]
    assert {(item["details"]["tokenizer"], item["details"]["context"], item["count"]) for item in cut} >= {
        ("CLIP", 77, 2)
    }
    assert check(rendered)["metrics"]["truncation"] == {}


def test_a_vocabulary_of_ones_own_counts_its_pieces(rendered, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    write_captions(rendered, lambda frame: frame.__setitem__("text", "red " * 63))
    for spec in (tmp_path, tmp_path / "vocab.txt"):
        record = check(rendered, tokenizers=[str(spec)])
        assert record["metrics"]["truncation"]["synthped-a"] == {"BERT 64": 1.0, "BERT 128": 0.0, "BERT 512": 0.0}
    with pytest.raises(UsageError, match="No tokenizer `gpt`"):
        check(rendered, tokenizers=["gpt"])
    (tmp_path / "vocab.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        check(rendered, tokenizers=[str(tmp_path)])


def test_a_run_without_a_dataset_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no finished `data` stage") as caught:
        check(tmp_path)
    assert "data import" in caught.value.hint


# --- a folder


def market(folder, people=3):
    """Three training people with two cameras, one query and its match: pictures all different."""
    names = [f"bounding_box_train/{p:04d}_c{c}s1_000001_01.jpg" for p in range(1, people + 1) for c in (1, 2)]
    names += ["query/0100_c1s1_000001_00.jpg", "bounding_box_test/0100_c3s1_000002_01.jpg"]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 32), (number * 20, 0, 0)).save(path)
    return folder


def test_a_folder_is_recognised_and_checked_without_an_import(tmp_path):
    root = market(tmp_path / "Market-1501-v15.09.15")
    before = state(tmp_path)
    for format in ("market-1501", "market_1501", None):
        record = check(tmp_path / "no run", root=root, format=format)
        assert record["source"] == "market-1501" and record["status"] == "ok" and record["root"] == str(root)
        assert found(record, "layout")["sentence"].startswith("market-1501: ")
        assert found(record, "split-counts")["count"] == 2
    assert state(tmp_path) == before


def test_what_an_import_would_refuse_is_listed_instead(tmp_path):
    root = market(tmp_path / "m")
    shutil.copy(root / "query" / "0100_c1s1_000001_00.jpg", root / "bounding_box_train" / "holiday.jpg")
    shutil.copy(root / "query" / "0100_c1s1_000001_00.jpg", root / "bounding_box_train" / "0001_c3s1_000001_01.jpg")
    record = check(tmp_path, root=root, format="market-1501")
    assert "holiday.jpg" in found(record, "bad-entries")["examples"][0]
    assert found(record, "leaked-images")["count"] == 1
    assert sorted(faults(record)) == ["ambiguous-images", "bad-entries", "leaked-images"]


def test_a_folder_that_its_reader_refuses_altogether_is_a_finding(tmp_path):
    (tmp_path / "reid_raw.json").write_text("[{")
    record = check(tmp_path, root=tmp_path, format="cuhk-pedes")
    assert faults(record) == ["bad-entries"] and "not valid JSON" in found(record, "bad-entries")["sentence"]
    assert record["status"] == "problems" and record["splits"] == {}


def test_a_flat_folder_names_no_people_so_none_are_checked(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 16)).save(tmp_path / f"{name}.png")
    record = check(tmp_path, root=tmp_path, format="folder")
    assert not faults(record) and found(record, "duplicate-images")["count"] == 1
    assert "single-image-people" not in {item["check"] for item in record["findings"]}


def probes(monkeypatch, **known):
    """Formats that recognise anything, by name."""
    monkeypatch.setattr(registry, "format_names", lambda: sorted(known))
    monkeypatch.setattr(registry, "probe", lambda name, root: known[name](root))


def sees(*missing):
    return lambda root: Probe(root, "variant", missing)


def blind(root):
    return SimpleNamespace().probe


def refuses(root):
    raise DataError("Broken.")


def broken(root):
    return root.no_such_thing


def test_the_most_specific_format_is_chosen(tmp_path, monkeypatch):
    for known, chosen in (
        ({"folder": sees(), "a": sees("x")}, "a"),
        ({"folder": sees(), "b": lambda root: None}, "folder"),
        ({"a": sees("x"), "b": sees()}, "b"),
        ({"a": blind, "b": refuses, "c": sees()}, "c"),
    ):
        probes(monkeypatch, **known)
        assert data_check.detect(tmp_path)[0] == chosen


def test_an_undecided_unknown_or_absent_folder_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path, root=tmp_path / "none")
    with pytest.raises(UsageError, match="cuhk-pedes"):
        check(tmp_path, root=tmp_path, format="cuhk-pedess")
    with pytest.raises(UsageError, match="does not have the option `images`"):
        check(tmp_path, root=tmp_path, format="market-1501", images=tmp_path)
    probes(monkeypatch, a=sees(), b=sees(), folder=sees())
    with pytest.raises(UsageError, match="could be a or b"):
        check(tmp_path, root=tmp_path)
    probes(monkeypatch, a=lambda root: None)
    with pytest.raises(DataError, match="No format recognises"):
        check(tmp_path, root=tmp_path)
    probes(monkeypatch, a=broken)
    with pytest.raises(AttributeError):
        check(tmp_path, root=tmp_path)


def test_every_format_can_be_asked_about_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="No format recognises"):
        check(tmp_path, root=tmp_path)


# --- what used to stop or mislead it


def refused(monkeypatch, folder):
    """Make the listing of a folder fail as for a user without the right, also for root."""
    scandir = os.scandir

    def closed(path="."):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)


def test_a_sub_folder_that_may_not_be_read_is_a_finding_among_others(tmp_path, monkeypatch):
    root = market(tmp_path / "m")
    refused(monkeypatch, root / "bounding_box_train")
    record = check(tmp_path, root=root)
    item = found(record, "bad-entries")
    assert (item["count"], item["total"]) == (1, 3) and "Permission denied" in item["examples"][0]
    assert record["source"] == "market-1501" and record["metrics"]["images"] == 2


def test_a_root_that_may_not_be_read_is_one_sentence_without_the_option_run(tmp_path, monkeypatch):
    root = market(tmp_path / "m")
    refused(monkeypatch, root)
    for format in (None, "market-1501"):
        with pytest.raises(DataError, match="cannot be listed") as caught:
            check(tmp_path, root=root, format=format)
        assert "--run" not in caught.value.hint


def denied(root, *_):
    raise PermissionError(errno.EACCES, "Permission denied", str(root / "imgs"))


def test_a_format_that_trips_over_a_closed_folder_is_still_chosen_and_checked(tmp_path, monkeypatch):
    probes(monkeypatch, a=denied, folder=sees())
    monkeypatch.setattr(registry, "reader", lambda name: denied)
    record = check(tmp_path, root=tmp_path)
    assert faults(record) == ["bad-entries"] and "imgs may not be read" in found(record, "bad-entries")["sentence"]
    assert "imgs" in found(record, "layout")["sentence"]


def test_a_dataset_that_a_closed_folder_hides_is_not_unknown(tmp_path, monkeypatch):
    market(tmp_path / "d" / "m").rename(tmp_path / "d" / "other name")
    refused(monkeypatch, tmp_path / "d" / "other name")
    with pytest.raises(DataError, match="other name cannot be listed"):
        check(tmp_path, root=tmp_path / "d")


@pytest.mark.parametrize("part, code", [("m", 2), ("m/query", 3)])
def test_folders_of_mode_0_are_findings_or_one_sentence(tmp_path, doctor, part, code):
    root = market(tmp_path / "m")
    closed = tmp_path / part
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("root may read everything")
        result = doctor("market-1501", root, "--tokenizer", "none", "-q")
    finally:
        closed.chmod(0o755)
    assert result.code == code and "--run" not in result.complaint()


def test_a_release_without_queries_and_a_run_without_queries_are_findings(rendered, tmp_path):
    root = market(tmp_path / "m")
    (root / "query" / "0100_c1s1_000001_00.jpg").unlink()
    assert "No query images" in found(check(tmp_path, root=root), "bad-entries")["examples"][0]
    frame = images_of(rendered)
    write_images(rendered, frame[frame["role"] != "query"])
    captions = rendered / "data" / "captions.parquet"
    write_captions(rendered, lambda table: table.drop(table.index[~table["image_id"].isin(frame["image_id"])]))
    assert "no-queries" not in {item["check"] for item in check(rendered)["findings"]}, "captions search the gallery"
    captions.unlink()
    item = found(check(rendered), "no-queries")
    assert (item["severity"], item["count"]) == ("warning", item["total"])


def test_a_table_in_a_folder_goes_before_the_folder(tmp_path):
    for person in "ab":
        path = tmp_path / "images" / f"{person}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 16), (ord(person), 0, 0)).save(path)
    assert check(tmp_path, root=tmp_path)["source"] == "folder"
    (tmp_path / "manifest.csv").write_text("image,person,split\nimages/a.png,a,train\nimages/b.png,b,test\n")
    record = check(tmp_path, root=tmp_path)
    assert record["source"] == "csv-table" and record["metrics"]["images"] == 2


def test_a_pipe_is_counted_and_has_one_wording(tmp_path):
    (tmp_path / "people" / "anna").mkdir(parents=True)
    Image.new("RGB", (8, 16)).save(tmp_path / "people" / "anna" / "0.png")
    os.mkfifo(tmp_path / "people" / "anna" / "1.png")
    item = found(check(tmp_path, root=tmp_path / "people", format="folder"), "bad-entries")
    assert (item["count"], item["total"]) == (1, 2) and item["examples"][0].endswith("is not a regular file.")
    item = {"id": 1, "split": "train", "captions": ["A man in a red coat."], "file_path": "1.png"}
    (tmp_path / "imgs").mkdir()
    os.mkfifo(tmp_path / "imgs" / "1.png")
    (tmp_path / "reid_raw.json").write_text(json.dumps([item]))
    record = check(tmp_path, root=tmp_path, format="cuhk-pedes")
    assert found(record, "unreadable-images")["examples"][0].endswith("is not a regular file.")
    assert "missing-images" not in {item["check"] for item in record["findings"]}


def test_empty_captions_are_counted_among_all_captions(tmp_path):
    items = [
        {"id": i, "split": "train", "captions": ["A man in red.", f"He carries {i} bags."], "file_path": f"{i}.png"}
        for i in range(4)
    ]
    items[0]["captions"][1] = items[1]["captions"][1] = " "
    (tmp_path / "imgs").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 16), (i, 0, 0)).save(tmp_path / "imgs" / f"{i}.png")
    (tmp_path / "reid_raw.json").write_text(json.dumps(items))
    item = found(check(tmp_path, root=tmp_path, format="cuhk-pedes"), "empty-captions")
    assert (item["count"], item["total"], item["rate"]) == (2, 8, 0.25)
    data_import.run(Run(tmp_path / "run"), format="cuhk-pedes", root=tmp_path)
    item = found(check(tmp_path / "run"), "empty-captions")
    assert (item["count"], item["total"]) == (2, 8)


def test_a_run_given_as_the_folder_is_named_as_one(clean, tmp_path):
    with pytest.raises(DataError, match=r"No format recognises .* a run") as caught:
        check(tmp_path, root=clean)
    assert f"--run {clean}" in caught.value.hint


def test_options_that_would_be_ignored_are_refused(clean, doctor):
    with pytest.raises(UsageError, match="`images`"):
        check(clean, images=clean)
    result = doctor("--run", clean, "--images", clean)
    assert result.code == 2 and "`images`" in result.complaint()
    for names in (["none", "clip"], ["bert", "none"]):
        result = doctor("--run", clean, *(part for name in names for part in ("--tokenizer", name)))
        assert result.code == 2 and "`none` stands alone" in result.complaint()
    assert check(clean, tokenizers=["none", "none"])["status"] == "ok"


def test_a_dataset_without_captions_loads_no_tokenizer_but_their_names_are_checked(tmp_path, monkeypatch):
    root = market(tmp_path / "m")
    monkeypatch.setattr(data_check, "_tokenizer", lambda name: pytest.fail("loaded"))
    assert check(tmp_path, root=root, tokenizers=["clip", "bert"])["metrics"]["truncation"] == {}
    with pytest.raises(UsageError, match="No tokenizer `gpt`"):
        check(tmp_path, root=root, tokenizers=["clip", "gpt"])


# --- the command


@pytest.fixture
def doctor(monkeypatch):
    """`reidctl data check ...` in this process, with the command on an application of its own."""
    app, data = typer.Typer(), typer.Typer()
    data.command("check", epilog=command.EPILOG)(command.check)
    data.command("other")(lambda: None)
    app.add_typer(data, name="data")
    monkeypatch.setattr(entry, "app", app)
    return lambda *args: cli("data", "check", *args)


KEYS = {"stage", "status", "run", "outputs", "metrics", "seconds", "source", "root", "datasets", "splits", "findings"}


def test_the_command_ends_with_0_on_good_data_and_prints_a_table(doctor, clean):
    result = doctor("--run", clean, "--tokenizer", "none")
    assert result.code == 0 and "image-sizes" in result.out and "read images: 48/48" in result.err
    assert result.out.splitlines()[-1].startswith("data-check: done in")
    assert "48 images and 192 captions: 0 errors" in result.out
    quiet = doctor("--run", clean, "--tokenizer", "none", "--quiet")
    assert quiet.code == 0 and not quiet.err


def test_json_is_one_object_with_the_documented_keys(doctor, clean):
    record = doctor("--run", clean, "--tokenizer", "none", "--json", "-q").json
    assert set(record) == KEYS and record["stage"] == "data-check" and record["outputs"] == []
    assert set(record["metrics"]) == {"errors", "warnings", "notes", "images", "captions", "truncation"}
    for item in record["findings"]:
        assert set(item) == {
            "check", "severity", "count", "total", "rate", "unit", "sentence", "examples", "details",
        }  # fmt: skip
        assert item["check"] in CHECKS


def test_errors_are_printed_first_and_end_the_command_with_3(doctor, tmp_path):
    root = market(tmp_path / "m")
    shutil.copy(root / "query" / "0100_c1s1_000001_00.jpg", root / "bounding_box_train" / "0001_c3s1_000001_01.jpg")
    result = doctor("market-1501", root, "--tokenizer", "none", "-q")
    assert result.code == 3
    assert result.complaint().startswith(f"reidctl: 2 errors found in {root}: leaked-images, ambiguous-images.")
    assert result.out.index("leaked-images") < result.out.index("split-counts") < result.out.index("image-sizes")
    result = doctor(root, "--tokenizer", "none", "-q", "--json")
    assert result.code == 3 and result.json["status"] == "problems" and result.complaint()


def test_a_single_argument_is_the_folder(doctor, tmp_path):
    result = doctor("market-1501")
    assert result.code == 2 and "lacks the folder" in result.complaint()
    assert doctor(tmp_path / "none").code == 3
    result = doctor("market-1501", market(tmp_path / "m"), "--tokenizer", "gpt")
    assert result.code == 2 and "No tokenizer" in result.complaint()


def test_a_file_name_cannot_steer_the_terminal(doctor, tmp_path):
    root = market(tmp_path / "m")
    (root / "query" / "0100_c1s1_\x1b[2J.jpg").write_bytes(b"x")
    result = doctor("market-1501", root, "--tokenizer", "none", "-q")
    assert result.code == 3 and "\x1b[2J" not in result.out and "\\x1b[2J" in result.out


def test_the_command_has_help_for_every_option_and_loads_nothing_heavy(doctor):
    result = doctor("--help")
    assert result.code == 0 and "Example:  reidctl data check" in result.out
    (check,) = [c for name, c in get_command(entry.app).commands["data"].commands.items() if name == "check"]
    assert all(option.help for option in check.params)
    code = (
        "import sys, reidctl.cli.data_check;"
        "assert not {'torch', 'pandas', 'numpy', 'PIL', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_check_without_tokenizers_loads_no_torch(clean):
    code = (
        "import sys; from pathlib import Path; from reidctl.runs import Run; from reidctl.stages import data_check;"
        f"record = data_check.run(Run(Path({str(clean)!r})), tokenizers=['none']);"
        "assert record['status'] == 'ok'; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_record_is_json(clean):
    json.dumps(check(clean), allow_nan=False)
