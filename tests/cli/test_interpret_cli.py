"""`reidctl interpret` as people and programs see it: flags, the table of explainers, sentences, exit codes."""

import json
import re
import sys
from pathlib import Path

import pytest
from commandline import cli, refused
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from test_interpret import ODD_TEXT, make_model, make_trained, state_of

from reidctl import tables
from reidctl.runs import Run

FAST = ("--samples", "2", "--device", "cpu", "--explainer", "patch,centre")
MASK = ("--what", "masking", "--removed", "25", "--control", "random,least")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("cli") / "r", "clip", described=False)[0]


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    found = Run(tmp_path_factory.mktemp("judge") / "seed1")
    make_model(found, seed=1, data=run.stage_dir("data"))
    return found


def interpret(run, *args, **options):
    return cli("interpret", "--run", run.path, *FAST, *args, **options)


def settings_of(run):
    return json.loads((run.stage_dir("interpret") / "stage.json").read_text())["settings"]


@pytest.mark.covers(193)
def test_one_command_prints_a_line_per_explainer_with_intervals_against_random(run):
    done = interpret(run, "--what", "all", "--removed", "10,25", "--control", "random,least", "--force")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    heading = next(line for line in lines if "explainer" in line and "pointing" in line)
    columns = [cell.strip() for cell in re.split(r"[│┃|]", heading) if cell.strip()]
    assert columns == [
        "explainer", "pointing", "IoU", "similarity drop", "mAP drop", "deletion", "insertion", "specificity",
        "entropy", "spread", "new weights", "other phrase",
    ]  # fmt: skip
    rows = {name: [line for line in lines if re.match(rf"[│|] {name} ", line)] for name in ("patch", "centre")}
    assert all(len(found) == 1 for found in rows.values()), "one line each in a pipe"
    assert lines.index(rows["patch"][0]) < lines.index(rows["centre"][0]), "in the order asked for"
    frame = tables.read_table(run.table("interpret", "interpretability"), "interpretability")
    mine = frame[(frame["explainer"] == "patch") & (frame["metric"] == "pointing")]
    value = mine.loc[mine["kind"] == "value", "value"].iloc[0]
    beside = mine[(mine["kind"] == "difference") & (mine["control"] == "random")].iloc[0]
    cells = [cell.strip() for cell in re.split(r"[│|]", rows["patch"][0]) if cell.strip()]
    sure = "*" if beside["low"] > 0 or beside["high"] < 0 else ""
    assert cells[1] == f"{100 * value:.1f} ({100 * beside['value']:+.1f}{sure})"
    drop = frame[(frame["explainer"] == "patch") & (frame["metric"] == "mAP_drop") & (frame["kind"] == "value")]
    assert cells[4].startswith(f"{100 * drop[drop['removed'].round(2) == 0.25]['value'].iloc[0]:.1f} (")
    assert "Drops at 25% removed" in done.out, "25 % is nearest to 20 %"
    assert done.out.count("The true caption beats") == 2
    assert "stability: not done" in done.out and "alignment: not done" in done.out
    assert lines[-1].startswith("interpret: done in")
    assert interpret(run, "--what", "all", "--removed", "10,25", "--control", "random,least").out.endswith(
        "interpret: up to date\n"
    )


@pytest.mark.covers(189, 190)
def test_other_models_come_as_judge_and_encoder(run, other):
    given = ("--judge", other.path, "--encoder", other.path, "--what", "masking,alignment,stability", "--removed", "25")
    done = interpret(run, *given, "--control", "random")
    assert done.code == 0, done.err
    assert "alignment" in done.out
    found = interpret(run, *given, "--control", "random", "--json").json
    assert {"patch.stability.clip seed1", "patch.alignment-random"} <= set(found["metrics"])
    assert "patch.mAP_drop@0.25.clip seed1-random" in found["metrics"]


def test_json_is_one_object_with_the_documented_keys(run):
    found = interpret(run, *MASK, "--json").json
    keys = {
        "stage", "status", "run", "outputs", "metrics", "seconds", "explained", "explainers", "grounded", "gates",
        "pictures", "parts", "notes", "data",
    }  # fmt: skip
    assert keys <= set(found) and not {"settings", "inputs", "fingerprint"} & set(found)
    assert found["explainers"] == ["patch", "centre"] and found["explained"] == 6
    assert all((run.path / name).is_file() for name in found["outputs"])
    assert {"interpret/faithfulness.parquet", "interpret/interpretability.parquet"} <= set(found["outputs"])
    assert set(found["metrics"]["patch.mAP_drop@0.25-random"]) == {"value", "low", "high"}


@pytest.mark.covers(185)
@pytest.mark.parametrize(("text", "shares"), [("25", [0.25]), ("5, 50", [0.05, 0.5]), ("12.5,", [0.125]), ("100", [1])])
def test_removed_is_a_list_of_percentages(run, text, shares):
    assert interpret(run, "--removed", text).code == 0
    assert settings_of(run)["interpret"]["fractions"] == pytest.approx(shares)


def test_flags_are_handed_on(run):
    flags = (
        "--fill", "zero", "--fill", "blur", "--control", "least,centre", "--control", "random", "--draws", "11",
        "--scope", "all_positives", "--level", "phrase", "--aggregate", "max", "--phrases", "rules", "--seed", "7",
        "--what", "grounding", "--what", "concentration", "--split", "test",
    )  # fmt: skip
    done = interpret(run, *flags)
    assert done.code == 0, done.err
    kept = settings_of(run)
    expected = {
        "fills": ["zero", "blur"], "controls": ["least", "centre", "random"], "draws": 11, "scope": "all_positives",
        "level": "phrase", "aggregate": "max", "phrases": "rules", "what": ["grounding", "concentration"],
    }  # fmt: skip
    assert kept["seed"] == 7 and {name: kept["interpret"][name] for name in expected} == expected


@pytest.mark.covers(173)
def test_a_phrase_of_the_user_on_a_picture_of_the_user(run, tmp_path):
    path = tmp_path / "[bold]me[red] <i>.png"
    Image.new("RGB", (50, 90), (20, 160, 30)).save(path)
    done = interpret(run, "--phrase", ODD_TEXT, "--image", path)
    assert done.code == 0 and "Traceback" not in done.err, done.err
    frame = tables.read_table(run.table("interpret", "explanations"), "explanations")
    assert set(frame["phrase"]) == {ODD_TEXT} and set(frame["image_id"]) == {path.name}
    assert len(list((run.stage_dir("interpret") / "pictures").glob("*.png"))) == 1


REFUSED = [
    (2, "no list of shares", ("--removed", "a")),
    (2, "no list of shares", ("--removed", "")),
    (2, "no list of shares", ("--removed", "0,5")),
    (2, "no list of shares", ("--removed", "101")),
    (2, "no list of shares", ("--removed", "nan")),
    (2, "gradcam", ("--explainer", "magic")),
    (2, "binding", ("--what", "magic")),
    (2, "shifted", ("--control", "magic")),
    (2, "swap", ("--fill", "mean,glitter")),
    (2, "all_positives", ("--scope", "magic")),
    (2, "caption, phrase", ("--level", "magic")),
    (2, "weighted", ("--aggregate", "magic")),
    (2, "spacy", ("--phrases", "magic")),
    (2, "exclude each other", ("--phrase", "hat", "--query", "a hat")),
    (2, "The query is empty", ("--query", " ")),
    (2, "--draws", ("--draws", "2")),
    (2, "--samples", ("--samples", "0")),
    (2, "--batch", ("--batch", "0")),
    (2, "Unknown backbone", ("--encoder", "magic:thing")),
    (3, "no finished `finetune`", ("--judge", "/nowhere")),
    (3, "/nowhere", ("--parts", "/nowhere")),
    (3, "no image of the test split and no file", ("--image", "nobody.png")),
    (3, "--judge RUN", ("--what", "stability")),
    (3, "no caption of the split", ("--what", "masking", "--phrase", "hat")),
]


@pytest.mark.parametrize(("code", "words", "args"), REFUSED, ids=[" ".join(args) for _, _, args in REFUSED])
def test_a_bad_input_is_one_sentence_with_its_code_and_the_old_result_stays(run, code, words, args):
    if not (run.stage_dir("interpret") / "stage.json").is_file():
        assert interpret(run).code == 0
    before = state_of(run)
    refused(code, words, args=("interpret", "--run", run.path, *FAST, *args))
    assert state_of(run) == before


def test_an_interrupted_command_leaves_the_old_result_and_goes_on(run, monkeypatch):
    assert interpret(run, "--force").code == 0
    before = state_of(run)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("reidctl.explain.counterfactual.masked_scores", stop)
    assert interpret(run, *MASK, "--seed", "3").code == 130
    assert state_of(run) == before
    monkeypatch.undo()
    assert interpret(run, *MASK, "--seed", "3", "--json").json["status"] == "done"


def test_help_names_every_flag_and_ends_with_an_example_that_runs(run):
    shown = cli("interpret", "--help").out
    flags = (
        "--run", "--samples", "--explainer", "--what", "--phrase", "--query", "--image", "--split", "--removed",
        "--fill", "--control", "--draws", "--scope", "--level", "--aggregate", "--judge", "--encoder", "--parts",
        "--phrases", "--batch", "--device", "--data", "--captions", "--seed", "--force", "--json", "--quiet",
    )  # fmt: skip
    assert all(flag in shown for flag in flags)
    example = " ".join(shown[shown.rindex("Example:") :].split()).removeprefix("Example: reidctl ")
    assert example.startswith("interpret --run runs/demo")
    assert cli(*example.replace("runs/demo", str(run.path)).split(), "--device", "cpu").code == 0
