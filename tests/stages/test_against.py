"""Two runs side by side: made by hand, so that every difference is known."""

import json
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.metrics import METRICS, expected_metrics
from reidctl.runs import Run
from reidctl.stages import against

RECIPE = {"method": {"name": "clip"}, "train": {"epochs": 3, "lr": 1e-4}, "device": "cpu"}
DATA = {"images": "i" * 64, "captions": "c" * 64}


def make_evaluated(
    path, ranks, *, seed=0, weights="w0", recipe=None, trained_on=None, selected="val", evaluation=None, measured=None
):
    """Write a run with a finished `finetune` and `evaluate`: two queries a person, one match each, at these ranks."""
    run = Run(path)
    model = run.stage_dir("finetune") / "model.safetensors"
    tables.write_text(model, weights)
    trained = run.finish(
        "finetune", settings={"seed": seed, **(recipe or RECIPE)}, inputs=trained_on or DATA, outputs=[model],
        started=datetime.now(UTC), extra={"selected_on": selected},
    )  # fmt: skip
    digest = trained["outputs"]["finetune/model.safetensors"]["sha256"]
    settings = {"split": "test", "query": "caption", "seed": 0, "model": digest, "training": trained["fingerprint"]}
    settings |= evaluation or {}
    ranks = np.asarray(ranks)
    scores = expected_metrics(np.arange(len(ranks)), ranks - 1, np.ones(len(ranks), np.int64), queries=len(ranks))
    where = {"direction": "t2i", "dataset": "toy", "condition": "standard"}
    queries = pd.DataFrame(
        {
            **where, "query_id": [f"q{n:02d}" for n in range(len(ranks))],
            "person_id": [f"toy:{n // 2:02d}" for n in range(len(ranks))], "matches": scores.matches, "gallery": 40,
            "first_match": scores.first_match, "average_precision": scores.average_precision, "inp": scores.inp,
            **{f"rank{k}": scores.hits[k] for k in (1, 5, 10, 20)},
        }
    )  # fmt: skip
    counts = {"queries": len(ranks), "skipped": 0, "gallery": 40, "split": settings["split"]}
    metrics = [
        {**where, "metric": metric, "value": value, **counts, "condition": condition}
        for condition, factor in (("standard", 1.0), ("chance", 0.1))
        for metric, value in ((name, factor * mean) for name, mean in scores.means().items())
    ]
    tables.write_table(run.table("evaluate", "queries"), "queries", queries)
    tables.write_table(run.table("evaluate", "metrics"), "metrics", pd.DataFrame(metrics))
    run.finish(
        "evaluate", settings=settings, inputs=measured or DATA,
        outputs=[run.table("evaluate", name) for name in ("queries", "metrics")], started=datetime.now(UTC),
    )  # fmt: skip
    return run


@pytest.fixture
def pair(tmp_path):
    ours = make_evaluated(tmp_path / "ours", [1, 1, 1, 1, 3, 1, 1, 6])
    other = make_evaluated(tmp_path / "other", [1, 2, 4, 1, 3, 2, 3, 6], weights="w1")
    return ours, other


def test_the_differences_are_those_of_the_queries_tables(pair):
    record = against.run(*pair, resamples=100)
    assert record["status"] == "done"
    assert record["metrics"]["t2i"]["rank1"] == pytest.approx(6 / 8 - 2 / 8)
    rows = {row["metric"]: row for row in record["rows"]}
    assert list(rows) == list(METRICS)
    assert (rows["rank1"]["better"], rows["rank1"]["worse"], rows["rank1"]["equal"]) == (4, 0, 4)
    # People 0 to 3 gain 1, 1, 1 and 1: all signs alike, 2 of 16 patterns.
    assert rows["rank1"]["p_value"] == 2 / 16
    assert rows["rank10"]["difference"] == rows["rank10"]["low"] == rows["rank10"]["high"] == 0
    stored = tables.read_table(pair[0].table("against", "differences"), "differences")
    assert stored["difference"].tolist() == [row["difference"] for row in record["rows"]]
    assert set(stored["split"]) == {"test"}
    paired = tables.read_table(pair[0].table("against", "paired"), "paired")
    assert paired["rank1_difference"].tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


def test_the_record_is_json_and_names_both_models_and_the_four_files(pair):
    record = against.run(*pair, resamples=50)
    on_disk = json.loads((pair[0].stage_dir("against") / "stage.json").read_text())
    assert on_disk == {name: value for name, value in record.items() if name != "status"}
    assert on_disk["settings"]["other"] == str(pair[1].path.resolve())
    assert on_disk["settings"]["model"] != on_disk["settings"]["other_model"]
    assert sorted(on_disk["inputs"]) == ["other.queries", "other.record", "ours.queries", "ours.record"]
    assert not (pair[1].stage_dir("against")).exists()  # the other run is only read


def test_it_is_up_to_date_until_one_of_the_runs_is_evaluated_again(pair, tmp_path):
    against.run(*pair, resamples=50)
    assert against.run(*pair, resamples=50)["status"] == "up-to-date"
    assert against.run(*pair, resamples=60)["status"] == "done"
    assert against.run(*pair, resamples=60, force=True)["status"] == "done"
    make_evaluated(pair[1].path, [1] * 8, weights="w1")
    record = against.run(*pair, resamples=60)
    assert record["status"] == "done" and record["metrics"]["t2i"]["rank1"] == -0.25


def test_the_notes_say_what_the_numbers_do_not(pair, tmp_path):
    notes = " ".join(against.run(*pair, resamples=50)["notes"])
    assert "7 metrics were tested and nothing was corrected" in notes
    assert "other training seeds" in notes
    assert "2^(1-k): 0.12 for t2i rank1, in which 4 differ." in notes and "With 4 people the intervals" in notes
    assert "The epoch was chosen on: val" in notes and "flattered" not in notes
    flattered = make_evaluated(
        tmp_path / "test-best", [1] * 8, weights="w2", selected="test", trained_on={"images": "other"}
    )
    notes = against.run(pair[0], flattered, resamples=50)["notes"]
    assert f"Chosen on the split that is measured here, so flattered: {flattered.path}." in notes
    assert "The two models were trained on different data." in notes
    copy = make_evaluated(tmp_path / "copy", [1] * 8, evaluation={"rerank": "20/6/0.3"})
    notes = against.run(pair[0], copy, resamples=50)["notes"]
    assert "Both runs hold the same weights." in notes
    assert "The evaluations differ in `rerank`: None here, 20/6/0.3 there." in notes


def refused(ours, other, *words, error=DataError):
    with pytest.raises(error) as found:
        against.run(ours, other, resamples=10)
    for word in words:
        assert word in str(found.value)
    assert not (ours.stage_dir("against") / "stage.json").exists()


def test_what_was_not_evaluated_alike_is_refused_by_name(pair, tmp_path):
    ours, ranks = pair[0], [1] * 8
    refused(ours, Run(ours.path / "."), "compared with itself", error=UsageError)
    refused(ours, Run(tmp_path / "none"), f"Run `reidctl evaluate --run {tmp_path / 'none'}` first")
    val = make_evaluated(tmp_path / "val", ranks, evaluation={"split": "val"})
    refused(ours, val, "--split test", "--split val")
    clothing = make_evaluated(tmp_path / "clothing", ranks, evaluation={"query": "clothing"})
    refused(ours, clothing, "--query caption", "--query clothing")
    pictures = make_evaluated(tmp_path / "pictures", ranks, measured={**DATA, "images": "x"})
    refused(ours, pictures, "different data", "images", "--data FOLDER")
    texts = make_evaluated(tmp_path / "texts", ranks, measured={"images": DATA["images"]})
    refused(ours, texts, "different data", "captions")
    longer = make_evaluated(tmp_path / "longer", [1] * 10)
    refused(ours, longer, "0 are only here and 2 only in the other run")


def test_written_texts_must_be_the_same_only_where_they_are_the_queries(tmp_path):
    def made(name, query, described):
        return make_evaluated(
            tmp_path / name, [1, 2], evaluation={"query": query}, measured={**DATA, "described": described}
        )

    assert against.run(made("a", "caption", "1"), made("b", "caption", "2"), resamples=10)["status"] == "done"
    refused(made("c", "identity", "1"), made("d", "identity", "2"), "tables of described")


def test_a_model_trained_again_since_its_evaluation_is_refused(pair):
    ours, other = pair
    train_again(other, "newer")
    refused(ours, other, "trained again after its evaluation.", f"reidctl evaluate --run {other.path}")


def train_again(run, weights, selected="val", **settings):
    model = run.stage_dir("finetune") / "model.safetensors"
    tables.write_text(model, weights)
    run.finish(
        "finetune", settings={"seed": 0, **RECIPE, **settings}, inputs=DATA, outputs=[model],
        started=datetime.now(UTC), extra={"selected_on": selected},
    )  # fmt: skip


@pytest.mark.covers(29)
def test_a_training_that_ends_with_the_same_weights_but_chose_its_epoch_on_test_is_another_one(pair):
    ours, other = pair
    against.run(ours, other, resamples=10)
    train_again(other, "w1", selected="test", train={**RECIPE["train"], "select": "test"})
    for force in (False, True):
        with pytest.raises(DataError, match=r"trained again after its evaluation, to the same weights.*again"):
            against.run(ours, other, resamples=10, force=force)


def test_an_evaluation_that_does_not_say_what_training_it_measured_must_be_repeated(pair):
    ours, other = pair
    path = other.stage_dir("evaluate") / "stage.json"
    record = json.loads(path.read_text())
    del record["settings"]["training"]
    path.write_text(json.dumps(record))
    refused(ours, other, "does not say which training it measured", f"reidctl evaluate --run {other.path}` again")


GIVEN = {"given": ["q.npz"], "asked_split": None, "model": None}


def given(path, ranks, **settings):
    return make_evaluated(path, ranks, measured={"q.npz": path.name}, evaluation={**GIVEN, **settings})


def test_of_given_embeddings_it_says_what_was_not_checked_and_claims_no_weights(tmp_path):
    one, two = given(tmp_path / "one", [1, 2]), given(tmp_path / "two", [1, 1], given=["z.npz"])
    notes = against.run(one, two, resamples=10)["notes"]
    assert not any("same weights" in note or "same model" in note or "`given`" in note for note in notes)
    (said,) = [note for note in notes if note.startswith("Given embeddings")]
    assert f"({one.path}, {two.path}): only query ids, people, numbers of matches and gallery sizes" in said
    assert "which models made them, was not checked" in said
    # A training in the same folder made neither of them, as far as anybody knows.
    assert f"The epoch was chosen on: unknown ({one.path}), unknown ({two.path})." in notes
    named = given(tmp_path / "three", [1, 1], model="m"), given(tmp_path / "four", [1, 2], model="m")
    assert "Both evaluations name the same model." in against.run(*named, resamples=10)["notes"]
    refused(
        given(tmp_path / "five", [1, 1]), given(tmp_path / "val", [1, 1], split="val"), "--split test", "--split val"
    )


@pytest.mark.covers(29)
def test_given_embeddings_compare_with_an_own_run_if_they_answer_the_same_queries(pair, tmp_path):
    ranks = [1, 2, 4, 1, 3, 2, 3, 6]
    other = given(tmp_path / "given", ranks)
    record = against.run(pair[0], other, resamples=10)
    assert record["metrics"]["t2i"]["rank1"] == 0.5
    assert any(note.startswith(f"Given embeddings ({other.path}):") for note in record["notes"])
    assert f"The epoch was chosen on: val ({pair[0].path}), unknown ({other.path})." in record["notes"]
    refused(pair[1], given(tmp_path / "longer", [1] * 10), "0 are only here and 2 only in the other run")


def test_embeddings_measured_in_the_folder_of_a_trained_run_are_not_its_model_trained_again(pair):
    given(pair[1].path, [1] * 8)
    assert against.run(*pair, resamples=10)["status"] == "done"


def test_the_seed_of_the_evaluation_is_a_difference_where_it_drew_galleries(pair, tmp_path):
    def notes(measure, seed):
        made = [
            make_evaluated(tmp_path / f"{len(measure)}{s}", [1, 2], evaluation={"measure": measure, "seed": s})
            for s in (0, seed)
        ]
        return " ".join(against.run(*made, resamples=10)["notes"])

    assert "differ in `seed`: 0 here, 1 there" in notes(["i2i", "single-shot"], 1)
    assert "differ in `seed`" not in notes(["t2i"], 1)


def test_the_lowest_p_value_counts_the_people_that_differ_and_text_to_image_comes_first(tmp_path):
    ours, other = (make_evaluated(tmp_path / name, ranks) for name, ranks in (("o", [1] * 40), ("x", [2] + [1] * 39)))
    for run in (ours, other):
        path = run.table("evaluate", "queries")
        queries = tables.read_table(path, "queries")
        shown = [
            queries.assign(direction=way, condition=how) for way in ("i2i", "t2i") for how in ("other", "standard")
        ]
        tables.write_table(path, "queries", pd.concat(shown, ignore_index=True))
    record = against.run(ours, other, resamples=50)
    notes = " ".join(record["notes"])
    # Twenty people, of whom one differs: neither sign of it is the rarer one.
    assert "below 2^(1-k): 1 for t2i rank1, in which 1 differ." in notes and "too narrow" not in notes
    groups = [(row["direction"], row["condition"]) for row in record["rows"]]
    order = [("t2i", "standard"), ("t2i", "other"), ("i2i", "standard"), ("i2i", "other")]
    assert list(dict.fromkeys(groups)) == order


def test_tables_of_an_older_version_or_missing_ones_are_refused(pair):
    ours, other = pair
    other.table("evaluate", "queries").unlink()
    refused(ours, other, "queries.parquet is missing", "--force")
