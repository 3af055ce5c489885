"""The flags of `reidctl evaluate`, through the command line, on one small run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commandline import ONE_EPOCH, cli, refused

from reidctl import tables

pytest_plugins = ["finished"]


@pytest.fixture(scope="module")
def pair(chain, tmp_path_factory):
    """Two trainings of one recipe with other seeds, both evaluated on the same people; the first keeps its epochs."""
    folder = tmp_path_factory.mktemp("pair")
    data, texts = chain.run / "data", chain.run / "caption" / "captions.parquet"
    for name, seed in (("one", "1"), ("two", "2")):
        args = ("--data", data, "--captions", texts, "--seed", seed, "--set", "train.keep_epochs=true")
        assert cli("finetune", *ONE_EPOCH, *args, "--run", folder / name).code == 0
        assert cli("evaluate", "--run", folder / name, "--data", data, "--captions", texts).code == 0
    return folder


def shown(result):
    assert result.code == 0, result.err
    return result.out


def test_every_analysis_is_one_part_of_one_json_object(pair):
    run = ("evaluate", "--run", pair / "one", "--json")
    more = ("--against", pair / "two", "--seeds", pair / "two", "--epochs", "--setting", "typos", "--compare")
    found = cli(*run, *more).json
    assert found["stage"] == "evaluate"
    assert {"robustness", "epochs", "seeds", "against", "published"} <= set(found)
    for name in ("robustness", "epochs", "seeds", "against"):
        part = found[name]
        assert part["status"] == "done"
        assert {"rows", "notes", "outputs", "metrics"} <= set(part)
        assert not {"settings", "inputs", "fingerprint"} & set(part)
        assert all((pair / "one" / output).is_file() for output in part["outputs"])
    again = cli(*run, *more).json
    assert [again[name]["status"] for name in ("robustness", "epochs", "seeds", "against")] == 4 * ["up-to-date"]


def test_tables_of_all_analyses_are_printed_for_people(pair):
    more = ("--against", pair / "two", "--seeds", pair / "two", "--epochs", "--setting", "typos", "--slices")
    text = shown(cli("evaluate", "--run", pair / "one", *more))
    for title in ("this run minus", "seeds; percent", "kept epochs", "robustness", "parts of the queries"):
        assert title in text
    assert "selected on val (epoch 1)" in text and "best epoch on test (epoch 1)" in text


@pytest.mark.parametrize("name", ["markdown", "latex"])
def test_tables_come_in_the_format_asked_for_and_lie_in_the_run(name, chain):
    text = shown(cli("evaluate", "--run", chain.run, "--format", name))
    file = {"markdown": "results.md", "latex": "results.tex"}[name]
    kept = (chain.run / "evaluate" / file).read_text()
    mark = {"markdown": "| model |", "latex": "\\toprule"}[name]
    assert mark in text and mark in kept
    assert "evaluate: " not in text  # nothing but the tables


def test_re_ranking_image_text_and_single_shot_rows_are_named(chain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain.run, run)
    more = ("--rerank", "3/2/0.3", "--protocol", "i2i", "--protocol", "it2i", "--protocol", "single-shot")
    found = cli("evaluate", "--run", run, "--json", *more, "--ranks", "1,2").json
    rows = {name: set(part["rows"]) for name, part in found["tables"].items()}
    assert {name.split(":")[0] for name in rows} == {"i2i", "it2i"}
    assert {"standard", "rerank-3/2/0.3", "chance", "shuffled"} <= rows["i2i:synthped-a"]
    assert rows["i2i:synthped-a:single-shot"] == {"single-shot", "single-shot-chance"}
    one_each = found["tables"]["i2i:synthped-a:single-shot"]
    assert one_each["gallery"] < found["tables"]["i2i:synthped-a"]["gallery"]
    table = tables.read_table(run / "evaluate" / "metrics.parquet", "metrics")
    assert {"rank1", "rank2", "rank5"} <= set(table["metric"])
    queries = tables.read_table(run / "evaluate" / "queries.parquet", "queries")
    assert {"i2i", "it2i"} == set(queries["direction"])
    assert not queries.duplicated(["direction", "dataset", "condition", "query_id"]).any()


def test_published_numbers_stand_under_a_banner_that_says_why_they_do_not_compare(chain):
    text = shown(cli("evaluate", "--run", chain.run, "--compare"))
    assert text.index("NOT COMPARABLE") < text.index("ours beside published")
    for needed in ("rendered", "random", "91.93", "92.95", "Data:", "Weights:", "Protocol:"):
        assert needed in text


@pytest.mark.covers(168)
def test_a_model_of_one_dataset_is_measured_on_another(pair, tmp_path):
    other = tmp_path / "other"
    data = ("--people", "12", "--images-per-person", "3", "--size", "64x32", "--domain", "b", "--seed", "9")
    assert cli("data", "synth", *data, "--workers", "1", "--run", other).code == 0
    run = tmp_path / "matrix"
    found = cli("evaluate", "--run", run, "--matrix", pair / "one", "--data", other / "data", "--json").json
    assert found["stage"] == "matrix"
    table = tables.read_table(run / "matrix" / "matrix.parquet", "matrix")
    assert set(table["relation"]) == {"same", "cross"}
    assert "models down, test data across" in shown(
        cli("evaluate", "--run", run, "--matrix", pair / "one", "--data", other / "data")
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--ranks", "1,x"), "not a list of whole numbers"),
        (("--ranks", "0"), "not a list of whole numbers"),
        (("--protocol", "t3i"), "`--protocol t3i`"),
        (("--rerank", "20/6"), "20/6"),
        (("--setting", "fog"), "fog"),
        (("--control", "x"), "`--control`"),
        (("--level", "0.5"), "`--level`"),
        (("--format", "html"), "`--format html`"),
        (("--min", "rank0=0.5"), "`--min rank0=0.5`"),
        (("--min", "rSum=3.5"), "`--min rSum=3.5`"),
        (("--joint", "--min", "joint.rank1=0.5"), "joint.t2i.mAP"),
        (("--matrix", "a", "--joint"), "cannot be combined"),
        (("--embeddings", "a", "--joint"), "cannot be combined"),
        (("--matrix", "a", "--against", "b"), "cannot be combined"),
        (("--embeddings", "a", "--setting", "all"), "cannot be combined"),
        (("--embeddings", "a", "--data", "b"), "cannot be combined"),
        (("--matrix", "a", "--slices"), "cannot be combined"),
        (("--normalise",), "cannot be combined with `a trained model`"),
        (("--setting", "typos", "--level", "1.5"), "--level"),
        (("--weight", "2"), "--weight"),
    ],
)
def test_flags_that_mean_nothing_are_refused_in_one_sentence(args, words, chain):
    refused(2, words, args=("evaluate", "--run", chain.run, *args))


@pytest.fixture(scope="module")
def worlds(chain, tmp_path_factory):
    """A run whose model is measured on two datasets that it never saw, joined; and the flags that say so."""
    folder = tmp_path_factory.mktemp("worlds")
    data = ("--people", "10", "--images-per-person", "3", "--size", "64x32", "--domain", "both", "--captioned", "a")
    further = ("--seed", "9", "--set", "synth.first=500", "--workers", "1")
    assert cli("data", "synth", *data, *further, "--run", folder / "synth").code == 0
    assert cli("data", "combine", folder / "synth", "--run", folder / "both").code == 0
    run = chain.copy(folder, "finetune")
    return ("evaluate", "--run", run, "--data", folder / "both" / "data")


def test_a_joint_gallery_is_a_further_table_with_gates_of_its_own_and_nothing_published(worlds):
    plain, found = cli(*worlds, "--json").json, cli(*worlds, "--joint", "--json").json
    more = {name.split(":")[0] for name in set(found["tables"]) - set(plain["tables"])}
    assert more == {"t2i", "i2i"} and {"t2i:joint", "i2i:joint"} <= set(found["tables"])
    assert found["metrics"].keys() - plain["metrics"].keys() == {"joint.t2i", "joint.i2i"}
    assert {name: found["metrics"][name] for name in plain["metrics"]} == plain["metrics"]
    sizes = {name: part["gallery"] for name, part in found["tables"].items()}
    assert sizes["i2i:joint"] == sizes["i2i:synthped-a"] + sizes["i2i:synthped-b"]
    value = found["metrics"]["joint.i2i"]["mAP"]
    assert value == found["tables"]["i2i:joint"]["rows"]["standard"]["mAP"][0]
    assert cli(*worlds, "--joint", "--min", f"joint.i2i.mAP={value - 1e-6}", "--min", "joint.t2i.rank1=0").code == 0
    missed = cli(*worlds, "--joint", "--min", f"joint.i2i.mAP={value + 1e-3}")
    assert missed.code == 5 and "joint.i2i mAP is" in missed.err and "joint, image" in missed.out.lower()
    # An analysis takes the evaluation that is there; nobody published anything about this gallery.
    told = cli(*worlds, "--compare", "--json").json
    assert told["tables"] == found["tables"] and {part["title"].split(",")[0] for part in told["published"]} == {
        "synthped-a",
        "synthped-b",
    }
    unknown = cli(*worlds, "--min", "joint.i2i.mAP=0")
    assert unknown.code == 5 and "joint.i2i mAP was not measured" in unknown.err and "--joint" in unknown.err


def test_one_dataset_has_no_joint_gallery(chain):
    refused(3, "single dataset", "data combine", args=("evaluate", "--run", chain.run, "--joint"))


def test_a_rank_beyond_the_gallery_is_refused_and_leaves_the_old_result(chain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain.run, run)
    before = (run / "evaluate" / "metrics.parquet").read_bytes()
    refused(3, "rank-500 needs a gallery of at least 500", args=("evaluate", "--run", run, "--ranks", "500"))
    assert (run / "evaluate" / "metrics.parquet").read_bytes() == before


def test_comparing_with_a_run_that_was_not_evaluated_names_the_command(pair, tmp_path):
    refused(3, "reidctl evaluate", args=("evaluate", "--run", pair / "one", "--against", tmp_path))
    refused(2, "itself", args=("evaluate", "--run", pair / "one", "--against", pair / "one"))


def test_gates_read_settings_and_sums(pair):
    run = ("evaluate", "--run", pair / "one", "--setting", "typos", "--quiet")
    assert cli(*run, "--min", "typos/rank1=0", "--min", "rSum=0", "--min", "i2i.typos/mAP=0").code in (0, 5)
    assert cli(*run, "--min", "typos/rank1=0").code == 0
    assert cli(*run, "--min", "typos/rank1=1").code == 5
    assert cli(*run, "--min", "rSum=2.99").code == 5
    assert cli("evaluate", "--run", pair / "one", "--min", "typos/rank1=0").code == 5  # not measured: no pass


def test_given_embeddings_are_evaluated_without_a_model(tmp_path):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(30, 16))
    person = np.repeat(np.arange(30), 4)
    vectors = centre[person] + 0.3 * rng.normal(size=(120, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    frame = pd.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(120)],
            "role": np.where(np.arange(120) % 4 == 0, "query", "gallery"),
            "modality": "image",
            "condition": "standard",
            "dataset": "mine",
            "split": "test",
            "person_id": [f"mine:{n}" for n in person],
            "camera_id": [f"c{n % 4}" for n in range(120)],
            "embedding": list(vectors.astype(np.float32)),
        }
    )
    path = tmp_path / "mine.parquet"
    tables.write_table(path, "embeddings", frame)
    found = cli("evaluate", "--run", tmp_path / "run", "--embeddings", path, "--min", "i2i.rank1=0.9", "--json")
    assert found.code == 0, found.err
    assert found.json["metrics"]["i2i"]["rank1"] > 0.9
    frame["embedding"] = list((2 * vectors).astype(np.float32))
    frame.to_parquet(path)
    refused(3, "mine.parquet", args=("evaluate", "--run", tmp_path / "run", "--embeddings", path))
    assert json.loads((tmp_path / "run" / "evaluate" / "stage.json").read_text())["metrics"]["i2i"]["rank1"] > 0.9


def test_an_analysis_takes_the_evaluation_that_is_there(pair, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair / "one", run)
    more = ("--protocol", "t2i", "--rerank", "3/2/0.3")
    assert cli("evaluate", "--run", run, *more).code == 0
    before = (run / "evaluate" / "stage.json").read_bytes()
    assert cli("evaluate", "--run", run, "--setting", "typos").code == 0
    assert (run / "evaluate" / "stage.json").read_bytes() == before
    assert cli("evaluate", "--run", run).code == 0  # asked for itself, it is measured as asked
    assert (run / "evaluate" / "stage.json").read_bytes() != before


def test_a_training_that_ends_with_the_same_weights_but_chose_on_test_is_measured_anew(chain, tmp_path):
    run, data = tmp_path / "run", chain.run / "data"
    args = ("--data", data, "--captions", chain.run / "caption" / "captions.parquet", "--run", run)
    assert cli("finetune", *ONE_EPOCH, *args).code == 0
    assert "flatter" not in shown(cli("evaluate", *args))
    assert cli("finetune", *ONE_EPOCH, "--set", "train.select=test", *args).code == 0
    assert "flatter" in shown(cli("evaluate", *args))


def test_the_example_of_the_docs_writes_an_archive_and_a_table_that_are_measured_alike(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = [
        cli("evaluate", "--run", tmp_path / name, "--embeddings", tmp_path / f"mine.{name}", "--json").json["metrics"]
        for name in ("npz", "parquet")
    ]
    assert found[0]["i2i"]["mAP"] > 0.9
    assert found[0]["i2i"]["mAP"] == pytest.approx(found[1]["i2i"]["mAP"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"a,b\n", "neither a Parquet table nor a .npz archive"),
        ("x.npy", b"\x93NUMPY", "neither a Parquet table nor a .npz archive"),
        ("folder", None, "is a folder"),
    ],
)
def test_files_that_hold_no_embeddings_are_refused_with_what_would_do(name, content, words, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    refused(3, words, "Given embeddings", args=("evaluate", "--run", tmp_path / "run", "--embeddings", path))
