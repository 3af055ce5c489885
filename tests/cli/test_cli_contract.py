import contextlib
import json
import math
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest
import torch
from commandline import STAGES, cli, program, refused
from PIL import Image
from typer.main import get_command

from reidctl.cli.app import app

pytest_plugins = ["finished"]

KEYS = {"stage", "status", "run", "outputs", "metrics", "seconds"}
HEAVY = ("torch", "pandas", "pyarrow", "transformers", "openai", "sklearn", "open_clip", "numpy", "matplotlib")


def commands(node=None, path=()):
    """Every command and group as (words, object)."""
    node = node or get_command(app)
    found = [(path, node)]
    for name, child in getattr(node, "commands", {}).items():
        found += commands(child, (*path, name))
    return found


ALL = commands()
LEAVES = [(path, node) for path, node in ALL if not hasattr(node, "commands")]


def parse(words):
    """Parse the words after `reidctl` with the real parser, running nothing."""
    node, name = get_command(app), "reidctl"
    while hasattr(node, "commands"):
        name, *words = words
        assert name in node.commands, f"no command {name}"
        node = node.commands[name]
    node.make_context(name, list(words))


def named(cases):
    return pytest.mark.parametrize(("path", "node"), cases, ids=[" ".join(path) or "reidctl" for path, _ in cases])


@named(ALL)
def test_help_lists_every_option_with_a_text_and_ends_with_an_example_that_parses(path, node):
    result = cli(*path, "--help")
    assert result.code == 0 and not result.err
    for option in node.params:
        if option.param_type_name == "option":
            assert option.help, option.name
            assert option.opts[0] in result.out
    example = re.search(r"Example: +(reidctl .*)\Z", re.sub(r"\s+", " ", result.out).strip())
    assert example, result.out
    words = shlex.split(example[1])
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        assert words[0] == "reidctl"
        parse(words[1:end])
        words = words[end + 1 :]


@named([case for case in LEAVES if case[0][0] not in ("methods", "doctor")])
def test_every_stage_shares_the_flags_of_the_design(path, node):
    flags = {flag for option in node.params for flag in option.opts}
    assert {"--run", "--json", "--quiet"} <= flags
    # What keeps no result has nothing to do again.
    if path not in {("search",), ("data", "check")}:
        assert "--force" in flags


@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"], ["--version"]])
def test_help_loads_no_heavy_library(words):
    code = (
        "import sys; from reidctl.cli.app import app; sys.argv = ['reidctl']\n"
        f"app({words!r}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and done.stdout


def test_the_version_is_printed():
    from reidctl import __version__

    assert cli("--version").out == f"reidctl {__version__}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_json_is_one_object_with_the_documented_keys_and_notes_go_to_stderr(chain, stage):
    result = chain.results[stage]
    record = result.json
    assert set(record) >= KEYS and record["stage"] == stage and record["status"] == "done"
    assert record["run"] == str(chain.run) and record["seconds"] >= 0
    assert record["outputs"] and all((chain.run / name).is_file() for name in record["outputs"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_is_up_to_date(chain, stage):
    result = cli(*STAGES[stage], "--run", chain.run, "--json")
    assert result.code == 0 and result.json["status"] == "up-to-date"
    again, first = result.json, chain.results[stage].json
    assert {**again, "status": "done"} == first
    shown = cli(*STAGES[stage], "--run", chain.run)
    assert shown.code == 0 and shown.out.endswith(f"{stage}: up to date\n")


CHANGES = {
    "data": ("--seed", "5"),
    "caption": ("--limit", "5"),
    "finetune": ("--set", "train.lr=2e-3"),
    "index": ("--split", "all"),
    "evaluate": ("--split", "val"),
    "interpret": ("--phrase", "a red coat"),
    "analyse": ("--what", "gates"),
}


@pytest.mark.parametrize("stage", CHANGES)
def test_a_changed_setting_runs_the_stage_again(chain, tmp_path, stage):
    run = chain.copy(tmp_path)
    result = cli(*STAGES[stage], *CHANGES[stage], "--run", run, "--json")
    assert result.json["status"] == "done", result.err
    assert cli(*STAGES[stage], *CHANGES[stage], "--run", run, "--json").json["status"] == "up-to-date"


@pytest.mark.parametrize("stage", ["data", "finetune", "index", "evaluate", "analyse", "report"])
def test_force_runs_the_stage_again_with_the_same_result(chain, tmp_path, stage):
    run = chain.copy(tmp_path)
    result = cli(*STAGES[stage], "--force", "--run", run, "--json")
    assert result.json["status"] == "done"
    before, after = (json.loads((r / stage / "stage.json").read_text()) for r in (chain.run, run))
    assert before["settings"] == after["settings"] and before["started"] < after["started"]
    if stage not in ("report", "finetune"):
        assert before["outputs"] == after["outputs"]
    if stage == "finetune":
        model = "finetune/model.safetensors"
        assert before["outputs"][model]["sha256"] == after["outputs"][model]["sha256"]


def test_a_stage_whose_output_was_deleted_runs_again(chain, tmp_path):
    run = chain.copy(tmp_path)
    (run / "index" / "embeddings.parquet").unlink()
    assert cli("index", "--run", run, "--json").json["status"] == "done"
    assert (run / "index" / "embeddings.parquet").is_file()


def test_quiet_leaves_stderr_empty(chain, tmp_path):
    run = chain.copy(tmp_path)
    assert cli("evaluate", "--force", "--run", run).err
    assert not cli("evaluate", "--force", "--quiet", "--run", run).err


def test_evaluate_gives_both_directions_in_fractions(chain):
    metrics = chain.results["evaluate"].json["metrics"]
    for direction in ("t2i", "i2i"):
        values = metrics[direction]
        assert set(values) == {"rank1", "rank5", "mAP", "mINP"}  # the galleries have less than 10 images
        assert all(0 <= value <= 1 for value in values.values())
        assert values["rank1"] <= values["rank5"]


LABELS = ("model", "chance", "colour histogram", "label-shuffle control", "oracle, all attributes")


def test_the_table_for_people_names_its_rows_and_puts_each_on_one_line(chain):
    shown = cli("evaluate", "--run", chain.run).out
    value = 100 * chain.results["evaluate"].json["metrics"]["t2i"]["mAP"]
    assert re.search(rf"^│ model .* {value:.1f} \[", shown, re.MULTILINE), shown
    for label in LABELS:
        assert re.search(rf"^│ {label} ", shown, re.MULTILINE), shown
    assert "95 % intervals" in shown.splitlines()[0]


def test_the_table_keeps_its_row_names_on_a_narrow_terminal(chain):
    master, slave = pty.openpty()
    child = program("evaluate", "--run", chain.run, stdout=slave, env={"COLUMNS": "80", "TERM": "xterm"})
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a pseudo-terminal as an error.
        while piece := os.read(master, 65536):
            shown += piece
    os.close(master)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")
    for label in LABELS:
        assert re.search(rf"^│ {label} ", text, re.MULTILINE), text
    table = [line for line in text.splitlines() if line and line[0] in "│┏┃┡└"]
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize("gate", ["rank1=1.01", "rank1", "rank1=", "rank1=nan", "rank0=0.5", "t3i.rank1=0.5", "=1"])
def test_a_gate_that_is_not_a_fraction_of_a_metric_is_a_usage_error(chain, gate):
    refused(2, f"`--min {gate}`", "rank1=0.7", args=("evaluate", "--run", chain.run, "--min", gate))


def test_gates_pass_at_the_value_and_fail_above_it_after_the_result_was_printed(chain):
    value = chain.results["evaluate"].json["metrics"]["t2i"]["mAP"]
    run = ("evaluate", "--run", chain.run, "--json")
    assert cli(*run, "--min", f"mAP={value!r}", "--min", "i2i.rank5=0.5").code == 0
    failed = cli(*run, "--min", "rank1=0", "--min", f"t2i.mAP={math.nextafter(value, 2)!r}", "--min", "rank3=0")
    assert failed.code == 5
    # Every miss is named, and what was not measured is no pass.
    assert "t2i mAP is" in failed.complaint() and "t2i rank3 was not measured" in failed.complaint()
    assert "--ranks" in failed.complaint()
    assert failed.json["metrics"]["t2i"]["mAP"] == value


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["--help"], ["doctor", "--json"]])
def test_a_reader_that_went_away_is_exit_141_without_a_word(words):
    reader, writer = os.pipe()
    os.close(reader)
    child = program(*words, stdout=writer)
    os.close(writer)
    assert (child.communicate()[1], child.returncode) == ("", 141)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["retrain"], "retrain"),
        (["evaluate", "--rnu", "x"], "--rnu"),
        (["data", "synth", "--people", "many"], "--people"),
        (["index", "--batch", "0"], "--batch"),
        (["search", "a", "--top", "0"], "--top"),
        (["data", "import", "folder"], "root"),
        (["methods", "extra"], "extra"),
    ],
)
def test_a_mistyped_command_line_is_exit_2_and_named_in_one_sentence(words, wrong):
    assert wrong.lower() in refused(2, "--help", args=words).err.lower()


def test_no_command_shows_the_help():
    result = cli()
    assert result.code == 2 and "finetune" in result.out + result.err


def test_methods_lists_every_shipped_recipe():
    rows = cli("methods", "--json").json
    assert {row["recipe"] for row in rows} >= {"bdam", "bdam-icme", "bdam-long", "bdam-tiny", "irra", "clip"}
    assert all(set(row) == {"recipe", "method", "backbone", "about"} and all(row.values()) for row in rows)
    shown = cli("methods").out
    assert all(f"│ {row['recipe']} " in shown for row in rows)


def test_doctor_says_whether_a_key_is_set_and_never_the_key():
    secret = {"OPENAI_API_KEY": "sk-very-secret-0123456789"}
    for words in (["doctor"], ["doctor", "--json"]):
        result = cli(*words, env=secret)
        assert result.code == 0 and "secret" not in result.out + result.err
    assert cli("doctor", "--json", env=secret).json["OPENAI_API_KEY"] == "set"
    assert cli("doctor", "--json", env={"OPENAI_API_KEY": ""}).json["OPENAI_API_KEY"].startswith("not set")


def test_the_run_comes_from_the_flag_else_the_environment_else_a_default(chain, tmp_path):
    env = {"REIDCTL_RUN": str(chain.run)}
    assert cli("evaluate", "--json", env=env).json["run"] == str(chain.run)
    other = tmp_path / "other"
    refused(3, str(other), args=("evaluate", "--run", other), env=env)
    refused(3, "runs/default", args=("evaluate",), cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.covers(226)
def test_a_seed_fixes_the_pictures_the_model_and_the_metrics_and_another_changes_them(chain, tmp_path):
    def chain_of(name, seed):
        run = tmp_path / name
        for stage in ("data", "caption", "finetune", "evaluate"):
            result = cli(*STAGES[stage], "--seed", seed, "--run", run, "--json")
            assert result.code == 0, result.err
        files = ("data/images.parquet", "data/captions.parquet", "finetune/model.safetensors")
        return [(run / name).read_bytes() for name in files], result.json["metrics"]

    files, metrics = chain_of("same", 0)
    names = ("data/images.parquet", "data/captions.parquet", "finetune/model.safetensors")
    assert files == [(chain.run / name).read_bytes() for name in names]
    assert metrics == chain.results["evaluate"].json["metrics"]
    others, other = chain_of("other", 1)
    assert all(a != b for a, b in zip(files, others, strict=True)) and other != metrics


@pytest.mark.covers(227)
def test_the_record_of_a_result_is_complete_and_measuring_again_reproduces_it(chain, tmp_path):
    record = json.loads((chain.run / "evaluate" / "stage.json").read_text())
    assert record["settings"]["seed"] == 0 and record["libraries"]["torch"] == torch.__version__.split("+")[0]
    trained = json.loads((chain.run / "finetune" / "stage.json").read_text())
    weights = trained["outputs"]["finetune/model.safetensors"]["sha256"]
    assert record["settings"]["model"] == weights
    data = json.loads((chain.run / "data" / "stage.json").read_text())
    assert record["inputs"]["images"] == trained["inputs"]["images"] == data["outputs"]["data/images.parquet"]["sha256"]
    assert trained["settings"]["train"]["lr"] == 1e-3 and record["version"]
    # From the checkpoint alone, without the index.
    run = chain.copy(tmp_path, "data", "caption", "finetune")
    assert cli("evaluate", "--run", run, "--json").json["metrics"] == record["metrics"]


def stored(run):
    from reidctl.retrieval.store import read_embeddings

    table = read_embeddings(run / "index" / "embeddings.parquet")
    return list(table.rows["item_id"]), table.vectors


@pytest.mark.covers(228)
def test_search_by_text_equals_brute_force_over_the_embeddings_table(chain):
    from reidctl.embedding import embed_queries
    from reidctl.methods.base import load_method

    names, vectors = stored(chain.run)
    method = load_method(chain.run / "finetune", torch.device("cpu"))
    for text in ("a woman in a red coat", "ein Mann & <b>", "?"):
        query = embed_queries(method, [text], device=torch.device("cpu"))[0]
        scores = [float(sum(a * b for a, b in zip(row.tolist(), query.tolist(), strict=True))) for row in vectors]
        order = sorted(range(len(names)), key=lambda row: -scores[row])
        record = cli("search", text, "--top", 4, "--run", chain.run, "--json").json
        assert set(record) >= KEYS and record["stage"] == "search" and record["query"] == text
        assert [hit["image_id"] for hit in record["results"]] == [names[row] for row in order[:4]]
        expected = pytest.approx([scores[row] for row in order[:4]], abs=1e-5)
        assert [hit["score"] for hit in record["results"]] == expected
        assert [hit["rank"] for hit in record["results"]] == [1, 2, 3, 4]


@pytest.mark.covers(228)
def test_search_by_an_indexed_image_finds_that_image_first(chain):
    first = cli("search", "a person", "--run", chain.run, "--json").json["results"][3]
    found = cli("search", "--image", first["path"], "--run", chain.run, "--json").json["results"]
    assert found[0]["image_id"] == first["image_id"] and found[0]["score"] == pytest.approx(1.0, abs=1e-5)


def test_search_asks_for_more_than_there_is_and_gets_everything(chain):
    names, _ = stored(chain.run)
    found = cli("search", "a person", "--top", 1000, "--run", chain.run, "--json").json["results"]
    assert sorted(hit["image_id"] for hit in found) == sorted(names)
    shown = cli("search", "a person", "--top", 1000, "--run", chain.run).out
    assert all(name in shown for name in names) and re.search(r"^│ 9 +│", shown, re.MULTILINE)


def test_search_saves_a_picture_that_opens(chain, tmp_path):
    path = tmp_path / "new folder" / "sheet.png"
    result = cli("search", "a person", "--top", 3, "--save", path, "--run", chain.run, "--json")
    assert result.code == 0 and result.json["outputs"] == [str(path)]
    with Image.open(path) as sheet:
        sheet.load()
        assert sheet.format == "PNG" and sheet.width > 96 and len(set(sheet.convert("L").tobytes())) > 10


def test_report_copies_its_page_where_it_is_asked_to(chain, tmp_path):
    out = tmp_path / "there" / "page.html"
    assert cli("report", "--run", chain.run, "--out", out).code == 0
    assert out.read_bytes() == (chain.run / "report" / "report.html").read_bytes()


def test_the_customer_s_literal_calls_are_understood():
    for line in ("caption --mllm gpt-4", "finetune --method bdam", "evaluate"):
        parse(line.split())
