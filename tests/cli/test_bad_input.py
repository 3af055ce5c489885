"""Bad input of somebody who has read no documentation: one sentence, the right code, nothing half-written."""

import contextlib
import json
import os
import resource
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commandline import ONE_EPOCH, STAGES, cli, leftovers, refused
from PIL import Image

from reidctl import tables
from reidctl.runs import digest

pytest_plugins = ["finished"]


def rewrite(path, name, change):
    """Change a table in place; `change` gets the frame."""
    frame = change(tables.read_table(path, name))
    tables.write_table(path, name, frame)


def photo(path, colour=(200, 30, 30), size=(32, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def unfinished(run, stage):
    """A stage that failed left neither a record nor temporary files."""
    assert not (run / stage / "stage.json").exists()
    assert not leftovers(run)


# Images


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "missing", "folder"])
@pytest.mark.parametrize("stage", ["finetune", "index", "evaluate"])
def test_an_image_that_cannot_be_read_stops_the_stage_and_is_named(chain, tmp_path, stage, damage):
    run = chain.copy(tmp_path, "data", "caption", *(() if stage == "finetune" else ("finetune",)))
    images = tables.read_table(run / "data" / "images.parquet", "images")
    victim = run / "data" / images[images["split"] == ("train" if stage == "finetune" else "test")]["path"].iloc[1]
    whole = victim.read_bytes()
    victim.unlink()
    if damage == "folder":
        victim.mkdir()
    elif damage != "missing":
        victim.write_bytes({"text": b"not a picture", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    hint = "Was the dataset moved?" if damage == "missing" else "Replace it or remove its row."
    refused(3, str(victim), hint, args=(*STAGES[stage], "--run", run))
    unfinished(run, stage)
    assert not list((run / stage).glob("*.parquet"))


def test_a_truncated_image_of_the_query_is_named(chain, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photo(tmp_path / "good.png").read_bytes()[:60])
    refused(3, str(bad), "cannot be read", args=("search", "--image", bad, "--run", chain.run))
    refused(3, "none.png", "does not exist", args=("search", "--image", tmp_path / "none.png", "--run", chain.run))


def test_import_names_a_bad_image_or_leaves_it_out_counted(tmp_path):
    for person in range(10):
        photo(tmp_path / "photos" / f"p{person}" / "a.png", (person * 20, 0, 0))
        photo(tmp_path / "photos" / f"p{person}" / "b.png", (person * 20, 9, 0))
    bad = tmp_path / "photos" / "p3" / "b.png"
    bad.write_bytes(bad.read_bytes()[:50])
    run = tmp_path / "run"
    refused(3, str(bad), "--skip-bad", args=("data", "import", "folder", tmp_path / "photos", "--run", run))
    unfinished(run, "data")
    result = cli("data", "import", "folder", tmp_path / "photos", "--run", run, "--skip-bad", "--json")
    assert result.code == 0 and sum(split["images"] for split in result.json["splits"].values()) == 19
    assert any(bad.name in note for note in result.json["notes"])


# Tables


@pytest.mark.parametrize("text", ["", "   ", "\n", None])
def test_an_empty_caption_is_named(chain, tmp_path, text):
    run = chain.copy(tmp_path, "data", "caption")
    path = run / "data" / "captions.parquet"
    full = tables.read_table(path, "captions").query("kind == 'full'")["caption_id"].iloc[0]
    rewrite(path, "captions", lambda frame: frame.assign(text=frame["text"].where(frame["caption_id"] != full, text)))
    refused(3, f"`{full}`", "is empty", "Remove the row", args=(*STAGES["finetune"], "--run", run))
    unfinished(run, "finetune")


@pytest.mark.parametrize("column", ["person_id", "path", "split", "image_id"])
def test_a_missing_column_of_the_images_table_is_named(chain, tmp_path, column):
    run = chain.copy(tmp_path, "data", "caption")
    path = run / "data" / "images.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    refused(3, str(path), column, args=(*STAGES["finetune"], "--run", run))
    unfinished(run, "finetune")


def test_a_table_that_is_not_parquet_or_of_another_version_or_kind_is_named(chain, tmp_path):
    run = chain.copy(tmp_path, "data", "caption")
    path = run / "data" / "images.parquet"
    good = path.read_bytes()
    for bad in (b"", b"hello", good[:-20]):
        path.write_bytes(bad)
        refused(3, str(path), args=(*STAGES["finetune"], "--run", run))
    path.write_bytes(good)
    table = pq.read_table(path)
    for footer, word in (
        ({"table": "images", "version": 99}, "version 99"),
        ({"table": "parts", "version": 1}, "parts"),
    ):
        key = next(iter(table.schema.metadata))
        pq.write_table(table.replace_schema_metadata({key: json.dumps(footer)}), path)
        refused(3, str(path), word, args=(*STAGES["finetune"], "--run", run))
    unfinished(run, "finetune")


def test_a_duplicate_image_id_and_a_caption_of_nobody_are_named(chain, tmp_path):
    run = chain.copy(tmp_path, "data", "caption")
    images, captions = run / "data" / "images.parquet", run / "data" / "captions.parquet"
    held = captions.read_bytes()
    rewrite(captions, "captions", lambda frame: frame.assign(image_id=["ghost", *frame["image_id"][1:]]))
    refused(3, "`ghost`", args=(*STAGES["finetune"], "--run", run))
    captions.write_bytes(held)
    rewrite(images, "images", lambda frame: pd.concat([frame, frame.iloc[:1]], ignore_index=True))
    refused(3, "occurs more than once", args=(*STAGES["finetune"], "--run", run))
    unfinished(run, "finetune")


def vectors_with(change):
    """Change the embedding column of a table, past the checks of our own writer."""

    def edit(path):
        frame = change(pq.read_table(path).to_pandas())
        columns = {name: frame[name].tolist() for name in frame}
        columns["embedding"] = pa.array([row.tolist() for row in frame["embedding"]], pa.list_(pa.float32()))
        pq.write_table(pa.table(columns), path)

    return edit


def _first_vector(frame, vector):
    frame.at[0, "embedding"] = np.asarray(vector, np.float32)
    return frame


def width_of(frame):
    return len(frame["embedding"].iloc[0])


DAMAGED = {
    "nan": (lambda f: _first_vector(f, [np.nan] * width_of(f)), "NaN"),
    "zero": (lambda f: _first_vector(f, [0.0] * width_of(f)), "zero"),
    "long": (lambda f: _first_vector(f, [1.0] * width_of(f)), "length 1"),
    "width": (lambda f: _first_vector(f, [1.0, 0.0]), "width"),
    "twice": (lambda f: pd.concat([f, f.iloc[:1]], ignore_index=True), "occurs twice"),
    "all another width": (lambda f: f.assign(embedding=[np.float32([1.0, 0.0])] * len(f)), "width"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_embeddings_that_cannot_be_searched_are_refused(chain, tmp_path, damage):
    run = chain.copy(tmp_path)
    change, word = DAMAGED[damage]
    vectors_with(change)(run / "index" / "embeddings.parquet")
    refused(3, word, args=("search", "a person", "--run", run))


# Recipes and flags


@pytest.mark.parametrize(
    ("setting", "pieces"),
    [
        ("train.epohcs=1", ["`train.epohcs`", "`epochs`"]),
        ("trian.epochs=1", ["`trian`", "`train`"]),
        ("method.fusion.widht=1", ["`method.fusion.widht`", "`width`"]),
        ("backbone.specs=x", ["`backbone.specs`", "`spec`"]),
        ("train.epochs=many", ["`train.epochs`", "many"]),
        ("train.epochs", ["section.key=value"]),
        ("train=3", ["train"]),
        ("train.epochs=[", ["YAML"]),
        ("=3", ["section.key=value"]),
        ("train.epochs=-1", ["train.epochs"]),
        ("train.batch=0", ["train.batch"]),
        ("train.instances=0", ["train.instances"]),
        ("train.select_metric=rank7", ["rank7"]),
        ("train.log_every=0", ["train.log_every"]),
        ("train.validate_every=0", ["train.validate_every"]),
        ("train.workers=-1", ["train.workers"]),
        ("train.lr=.nan", ["train.lr"]),
        ("seed=abc", ["seed"]),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_read_or_written(tmp_path, setting, pieces):
    run = tmp_path / "run"
    refused(2, *pieces, args=(*STAGES["finetune"], "--run", run, "--set", setting))
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("train:\n  epohcs: 3\n", "epochs"),
        ("a: [", "not valid YAML"),
        ("- 1\n- 2\n", "mapping"),
        ("train: 5\n", "train"),
        ("method: bdam\n", "method"),
        ("\x00", "YAML"),
    ],
)
def test_a_wrong_recipe_file_is_explained(tmp_path, text, piece):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    refused(2, piece, args=("finetune", "--method", "bdam-tiny", "--recipe", recipe, "--run", tmp_path / "run"))


def test_a_recipe_that_is_not_text_or_not_there_is_explained(tmp_path):
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    refused(2, str(binary), args=("finetune", "--recipe", binary, "--run", tmp_path / "run"))
    refused(2, "nothing.yaml", "bdam-tiny", args=("finetune", "--recipe", "nothing.yaml", "--run", tmp_path / "run"))


def test_a_method_that_does_not_exist_or_was_not_named_is_explained(tmp_path):
    refused(2, "`bdma`", "bdam", args=("finetune", "--method", "bdma", "--run", tmp_path / "run"))
    refused(2, "--method", "bdam", args=("finetune", "--run", tmp_path / "run"))


@pytest.mark.parametrize("size", ["12xx", "x", "128", "-4x5", "128 x 64", "0x0", "1x1", "²x²", "99999999x2"])
def test_a_size_that_is_none_is_a_usage_error(tmp_path, size):
    refused(2, "size", args=("data", "synth", f"--size={size}", "--people", 6, "--run", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--people", "0"),
        ("--people", "-3"),
        ("--people", "1"),
        ("--images-per-person", "0"),
        ("--domain", "d"),
        ("--variant", "x"),
        ("--clone-pairs", "-1"),
        ("--clone-pairs", "nan"),
        ("--clone-pairs", "inf"),
        ("--crossing", "5"),
        ("--captioned", "b"),
        ("--captioned", "none", "--domain", "both"),
        ("--workers", "0"),
        ("--workers", "-1"),
        ("--seed", "-1"),
    ],
)
def test_synth_refuses_what_it_cannot_render(tmp_path, flags):
    refused(2, args=("data", "synth", "--people", "6", "--size", "64x32", "--run", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["finetune", "index", "evaluate", "interpret", "analyse", "search"])
def test_a_gpu_that_is_not_there_is_a_usage_error_with_the_way_out(chain, tmp_path, stage):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    run = chain.copy(tmp_path)
    words = ("search", "a person") if stage == "search" else STAGES[stage]
    refused(2, "`cuda`", "--device cpu", args=(*words, "--run", run, "--device", "cuda"))
    assert stage == "search" or (run / stage / "stage.json").is_file()
    refused(2, "`gpu`", "auto, cpu, cuda", args=(*words, "--run", run, "--device", "gpu"))


def test_search_wants_exactly_one_query(chain):
    run = ("--run", chain.run)
    refused(2, "--image", args=("search", *run))
    refused(2, "not both", args=("search", "a", "--image", "b.png", *run))
    refused(2, "empty", args=("search", "  ", *run))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("interpret", ("--explainer", "magic")),
        ("interpret", ("--phrase", " ")),
        ("evaluate", ("--query", "shoes")),
        ("analyse", ("--what", "magic")),
        ("analyse", ("--limit", "0")),
    ],
)
def test_an_unknown_choice_is_a_usage_error(chain, tmp_path, stage, words):
    run = chain.copy(tmp_path)
    refused(2, args=(stage, *words, "--run", run))
    assert (run / stage / "stage.json").is_file()


def test_an_analysis_that_does_not_apply_is_refused_by_name_and_keeps_the_old_result(chain, tmp_path):
    run = chain.copy(tmp_path)
    refused(3, "`--what dependence`", "too few to exchange", args=("analyse", "--what", "dependence", "--run", run))
    refused(3, "`nobody`", "test split", args=("analyse", "--highlight", "nobody", "--run", run))
    assert (run / "analyse" / "stage.json").is_file()


@pytest.mark.parametrize("stage", ["index", "evaluate", "analyse"])
def test_a_split_that_is_not_there_keeps_the_old_result(chain, tmp_path, stage):
    run = chain.copy(tmp_path)
    refused(3, "`nowhere`", args=(stage, "--split", "nowhere", "--run", run))
    assert (run / stage / "stage.json").is_file()


@pytest.mark.parametrize(
    ("code", "words", "pieces"),
    [
        (4, ("--mllm", "gpt-4"), ("OPENAI_API_KEY", "--mllm template")),
        (2, ("--mllm", "nonsense"), ("`nonsense`", "template")),
        (3, ("--mllm", "replay:/nowhere/replies.jsonl"), ("/nowhere/replies.jsonl",)),
        (4, ("--mllm", "command:/nowhere/program"), ("/nowhere/program",)),
        (2, ("--styles", "magic"), ("magic", "dbscan")),
        (2, ("--limit", "-1"), ("caption.limit",)),
    ],
)
def test_a_writer_that_cannot_write_is_explained(chain, tmp_path, code, words, pieces):
    run = chain.copy(tmp_path, "data")
    refused(code, *pieces, args=("caption", "--run", run, *words), env={"OPENAI_API_KEY": ""})
    unfinished(run, "caption")
    assert not (run / "caption" / "captions.parquet").exists()


# Runs


@pytest.mark.parametrize("stage", ["caption", "finetune", "index", "evaluate", "interpret", "analyse", "report"])
def test_a_run_that_is_not_there_names_the_next_step_and_makes_nothing(tmp_path, stage):
    run = tmp_path / "nowhere"
    refused(3, str(run), "reidctl ", args=(*STAGES[stage], "--run", run))
    refused(3, str(run), "reidctl ", args=("search", "a person", "--run", run))
    assert not run.exists()


def test_each_stage_asks_for_the_one_before_it(chain, tmp_path):
    run = chain.copy(tmp_path, "data")
    refused(3, "`reidctl caption`", args=(*STAGES["finetune"], "--run", run))
    unfinished(run, "finetune")
    for stage in ("index", "evaluate", "interpret", "analyse"):
        refused(3, f"`reidctl finetune --run {run}`", args=(stage, "--run", run))
    run = chain.copy(tmp_path / "trained", "data", "caption", "finetune")
    refused(3, f"`reidctl index --run {run}`", args=("search", "a person", "--run", run))


@pytest.mark.parametrize("stage", ["finetune", "index", "evaluate", "interpret", "analyse", "report"])
def test_a_run_of_another_version_is_refused_and_stays_as_it_is(chain, tmp_path, stage):
    run = chain.copy(tmp_path)
    path = run / "data" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    refused(3, "another version", "run format 99", "--run", args=(*STAGES[stage], "--force", "--run", run))
    assert (run / stage / "stage.json").is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01", "{}"])
def test_a_damaged_record_is_named_with_a_command_that_exists(chain, tmp_path, text):
    run = chain.copy(tmp_path)
    (run / "finetune" / "stage.json").write_text(text)
    refused(3, str(run), "--force", args=("evaluate", "--run", run))
    (run / "data" / "stage.json").write_text(text)
    result = refused(3, str(run), args=(*STAGES["caption"], "--run", run))
    assert "reidctl data --force" not in result.err


def test_force_repairs_a_damaged_record(chain, tmp_path):
    run = chain.copy(tmp_path)
    (run / "evaluate" / "stage.json").write_text("{")
    assert cli("evaluate", "--force", "--run", run).code == 0


def test_an_index_by_another_model_is_not_searched(chain, tmp_path):
    run = chain.copy(tmp_path)
    assert cli(*STAGES["finetune"], "--seed", "9", "--run", run).code == 0
    refused(3, "another model", "`reidctl index`", args=("search", "a person", "--run", run))
    # Evaluation does not use it either, and says so.
    result = cli("evaluate", "--run", run, "--json")
    assert result.json["status"] == "done" and "embedding the gallery now" in result.err


def test_a_run_path_that_is_a_file_is_explained(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for words in (STAGES["data"], STAGES["finetune"], ("search", "a"), ("report",)):
        result = cli(*words, "--run", file)
        assert result.code in (2, 3) and str(file) in result.complaint()
        assert "disk full" not in result.err
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_that_is_read_only_is_explained(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    result = cli(*STAGES["data"], "--run", locked / "run")
    assert result.code == 3 and "permission" in result.complaint().lower()


@contextlib.contextmanager
def no_file_above(size):
    """A disk that is full: writes fail with an error instead of a signal, which Python ignores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 400, 3000])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(chain, tmp_path, stage, limit):
    run = chain.copy(tmp_path)
    with no_file_above(limit):
        result = cli(*STAGES[stage], "--force", "--run", run)
    assert result.code == 3, (result.code, result.out, result.err)
    sentence = result.complaint().lower()
    assert "disk" in sentence or "space" in sentence, sentence
    if stage == "interpret":  # makes everything aside: the old result is still whole
        record = json.loads((run / stage / "stage.json").read_text())
        assert all(digest(run / name) == facts["sha256"] for name, facts in record["outputs"].items())
        assert not (run / stage / "new").exists() and not list((run / stage).rglob("*.tmp"))
    else:
        unfinished(run, stage)
    assert cli(*STAGES[stage], "--run", run).code == 0


def test_a_full_disk_under_several_rendering_processes(tmp_path):
    words = ("data", "synth", "--people", 12, "--images-per-person", 3, "--size", "64x32", "--workers", 2)
    with no_file_above(500):
        result = cli(*words, "--run", tmp_path / "run")
    assert result.code == 3
    result.complaint()
    unfinished(tmp_path / "run", "data")


def test_a_picture_that_cannot_be_saved_is_explained(chain, tmp_path):
    with no_file_above(100):
        result = cli("search", "a person", "--save", tmp_path / "s.png", "--run", chain.run)
    assert result.code == 3 and "s.png" in result.complaint() and not (tmp_path / "s.png").exists()
    (tmp_path / "file").write_text("")
    result = cli("search", "a person", "--save", tmp_path / "file" / "s.png", "--run", chain.run)
    assert result.code in (2, 3) and "s.png" in result.complaint() + str(tmp_path / "file" / "s.png")
    result = cli("search", "a person", "--save", tmp_path, "--run", chain.run)
    assert result.code in (2, 3) and str(tmp_path) in result.complaint()
    result = cli("search", "a person", "--save", tmp_path / "s.xyz", "--run", chain.run)
    assert result.code == 0 or "s.xyz" in result.complaint()


# Own photos


@pytest.mark.covers(229)
def test_own_photos_without_ids_are_searched_and_not_measured(chain, tmp_path):
    photos = tmp_path / "my photos"
    names = ["[bold]x[/bold].png", "é 你好.png", "sub/b.PNG", "\x1b[31mred.png"]
    for number, name in enumerate(names):
        photo(photos / name, (60 * number, 100, 30))
    run = chain.copy(tmp_path, "finetune")
    shutil.rmtree(run / "index", ignore_errors=True)
    result = cli("index", "--images", photos, "--run", run, "--json")
    assert result.code == 0 and result.json["metrics"]["images"] == 4
    found = cli("search", "a red coat", "--run", run, "--json").json["results"]
    assert sorted(hit["image_id"] for hit in found) == sorted(names)
    assert all((photos / hit["image_id"]).samefile(hit["path"]) for hit in found)
    shown = cli("search", "[red]markup[/red]", "--run", run).out
    assert "[bold]x[/bold].png" in shown and "你好" in shown and "\x1b" not in shown
    # The same photos as a dataset of their own: nobody is known, so nothing can be measured.
    mine = tmp_path / "mine"
    assert cli("data", "import", "folder", photos / "sub", "--run", mine).code == 0
    result = refused(3, "nothing can be counted", args=("evaluate", "--run", run, "--data", mine / "data"))
    assert "person ids" in result.err
    unfinished(run, "evaluate")


def test_a_photo_whose_name_is_not_text_is_handled(chain, tmp_path):
    photo(tmp_path / "photos" / "a.png")
    os.link(tmp_path / "photos" / "a.png", os.fsencode(tmp_path / "photos") + b"/\xff\xfe.png")
    run = chain.copy(tmp_path, "finetune")
    refused(3, "name", args=("index", "--images", tmp_path / "photos", "--run", run))
    unfinished(run, "index")


def test_an_index_of_nothing_is_explained(chain, tmp_path):
    run = chain.copy(tmp_path, "finetune")
    (tmp_path / "empty").mkdir()
    refused(3, "holds no image", args=("index", "--images", tmp_path / "empty", "--run", run))
    refused(3, "not a folder", args=("index", "--images", tmp_path / "none", "--run", run))
    (tmp_path / "empty" / "x.png").write_text("hello")
    refused(3, "x.png", "cannot be read", args=("index", "--images", tmp_path / "empty", "--run", run))
    unfinished(run, "index")


def test_import_of_a_wrong_place_or_format_is_explained(tmp_path):
    run = ("--run", tmp_path / "run")
    refused(3, "nowhere", "does not exist", args=("data", "import", "folder", tmp_path / "nowhere", *run))
    refused(2, "`tarot`", "market-1501", args=("data", "import", "tarot", tmp_path, *run))
    refused(2, "carve-val", args=("data", "import", "folder", tmp_path, "--carve-val", 3, *run))
    (tmp_path / "empty").mkdir()
    for format in ("folder", "market-1501", "cuhk-pedes"):
        refused(3, str(tmp_path / "empty"), args=("data", "import", format, tmp_path / "empty", *run))
    assert not (tmp_path / "run").exists()


# Hostile texts

HOSTILE = [
    "<script>alert(1)</script> a coat",
    "[red]markup[/red] hat",
    'a\x00b & "quotes" </td>',
    "{{ 7*7 }} {% raw %}",
]


def test_hostile_captions_stay_text_from_table_to_report(chain, tmp_path):
    run = chain.copy(tmp_path, "data", "caption", "finetune")
    path = run / "data" / "captions.parquet"

    def change(frame):
        rows = frame.index[frame["kind"] == "full"]
        return frame.assign(text=[" ".join(HOSTILE) if i in rows else t for i, t in enumerate(frame["text"])])

    rewrite(path, "captions", change)
    for stage in ("evaluate", "interpret", "report"):
        result = cli(*STAGES[stage], "--run", run, "--json")
        assert result.code == 0, (stage, result.err)
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page and "{{ 7*7 }}" in page
    assert "[red]markup[/red]" in page and "\x00" not in page
    cli("index", "--run", run)
    for text in ("<script>alert(1)</script>", "[red]markup[/red]", "x" * 100_000, "🧥", "-"):
        result = cli("search", text, "--run", run, "--json", "--save", tmp_path / "s.png")
        assert result.code == 0 and result.json["query"] == text, result.err


def test_an_option_without_heavy_work_is_checked_before_the_epochs(tmp_path):
    refused(2, args=("finetune", *ONE_EPOCH[:2], "--set", "train.precision=fp8", "--run", tmp_path / "run"))


def hostile(folder, name):
    """A CUHK-PEDES of one image, spoilt in one way; returns words of the complaint."""
    items = [{"split": "train", "captions": ["A man."], "file_path": "CUHK01/a.png", "id": 1}]
    picture = folder / "imgs" / "CUHK01" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 16)).save(picture)
    annotation = folder / "reid_raw.json"
    if name == "climbing":
        items[0]["file_path"] = "../../etc/passwd"
    elif name == "nul":
        items[0]["captions"] = ["a\0b"]
    elif name == "loop":
        picture.unlink()
        picture.symlink_to(picture)
    elif name == "bomb":
        picture.write_bytes(_png_header(50_000, 50_000))
    annotation.write_text(json.dumps(items))
    if name == "latin-1":
        annotation.write_bytes(annotation.read_bytes().replace(b"A man", "Käthe".encode("latin-1")))
    elif name == "huge":
        with annotation.open("wb") as stream:
            stream.truncate(2 << 30)
    elif name == "windows":
        annotation.write_bytes(b"\xef\xbb\xbf" + json.dumps(items, indent=1).replace("\n", "\r\n").encode())


def _png_header(width, height):
    """A PNG of a few bytes that announces many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("climbing", ["entry 0", "leads outside"]),
        ("nul", ["entry 0", "NUL"]),
        ("loop", ["a.png"]),
        ("bomb", ["a.png", "pixels"]),
        ("latin-1", ["reid_raw.json", "not UTF-8 (byte"]),
        ("huge", ["reid_raw.json", "2,048 MiB", "limit"]),
    ],
)
def test_a_hostile_dataset_is_refused_in_one_line_and_named_by_the_doctor(tmp_path, name, words):
    hostile(tmp_path / "CUHK-PEDES", name)
    refused(3, *words, args=("data", "import", "cuhk-pedes", tmp_path, "--run", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    found = cli("data", "check", tmp_path / "CUHK-PEDES", "--tokenizer", "none", "--json")
    assert found.code == 3 and found.json["status"] == "problems"
    assert any(words[-1].split()[0] in str(item) for item in found.json["findings"] if item["severity"] == "error")


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    hostile(tmp_path / "CUHK-PEDES", "windows")
    assert cli("data", "import", "cuhk-pedes", tmp_path, "--run", tmp_path / "run").code == 0
