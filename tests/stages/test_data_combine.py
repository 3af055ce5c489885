"""Datasets as one: common ids, nobody of a test split in training, and what happens when that is switched off."""

import shutil

import pandas as pd
import pytest
from cli.commandline import cli, refused

from reidctl import tables
from reidctl.evaluation.origin import MARKER
from reidctl.runs import Run

SYNTH = (
    "--people", 15, "--images-per-person", 4, "--size", "64x32", "--domain", "both", "--crossing", 6, "--workers", 1,
    "--layout", "cuhk-pedes", "--layout", "market-1501",
)  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Domain a as CUHK-PEDES and domain b as Market-1501, imported; six people are in both."""
    home = tmp_path_factory.mktemp("combine")
    assert cli("data", "synth", "--run", home / "synth", *SYNTH).code == 0
    layouts = home / "synth" / "data" / "layouts"
    for format, dataset in (("cuhk-pedes", "synthped-a"), ("market-1501", "synthped-b")):
        result = cli("data", "import", format, layouts / dataset / format, "--run", home / format)
        assert result.code == 0, result.err
    return home


@pytest.mark.covers(32)
def test_rendered_people_stay_rendered_when_their_layouts_travel_and_are_combined(sources, tmp_path):
    records = {name: Run(sources / name).record("data") for name in ("synth", "cuhk-pedes", "market-1501")}
    assert records["synth"]["rendered"] == ["synthped-a", "synthped-b"]
    assert records["cuhk-pedes"]["rendered"] == ["cuhk-pedes"]
    layouts = sources / "synth" / "data" / "layouts"
    # The folder that users know, without anything of the run around it, as a copy and as a link.
    root = next(layouts.rglob("reid_raw.json")).parent
    shutil.copytree(root, tmp_path / "CUHK-PEDES")
    (tmp_path / "link").symlink_to(tmp_path / "CUHK-PEDES")
    for name in ("CUHK-PEDES", "link"):
        out = tmp_path / f"{name}-run"
        assert cli("data", "import", "cuhk-pedes", tmp_path / name, "--run", out).code == 0
        assert Run(out).record("data")["rendered"] == ["cuhk-pedes"]
    # Photographs beside them are none; only the marker tells, so without it nobody knows.
    shutil.copytree(tmp_path / "CUHK-PEDES", tmp_path / "photos")
    (tmp_path / "photos" / MARKER).unlink()
    assert cli("data", "import", "cuhk-pedes", tmp_path / "photos", "--run", tmp_path / "plain").code == 0
    assert Run(tmp_path / "plain").record("data")["rendered"] == []
    both = ("data", "combine", tmp_path / "plain", sources / "market-1501", "--run", tmp_path / "both")
    assert cli(*both).code == 0
    assert Run(tmp_path / "both").record("data")["rendered"] == ["market-1501"]
    spoil = ("--kind", "typo", "--level", 0.2, "--split", "all")
    result = cli("data", "degrade", "--from", tmp_path / "both", "--run", tmp_path / "spoilt", *spoil)
    assert result.code == 0, result.err
    assert Run(tmp_path / "spoilt").record("data")["rendered"] == ["market-1501"]


def combined(home, out, *words):
    return cli("data", "combine", home / "cuhk-pedes", home / "market-1501", "--run", out, *words, "--json")


def crossing(home):
    """Who is in both datasets, by the renderer's own word: true person -> split of a, split of b."""
    images = tables.read_table(home / "synth" / "data" / "images.parquet", "images")
    images["true"] = [row["true_person"] for row in images["attributes"]]
    splits = images.groupby(["true", "dataset"], observed=True)["split"].first().unstack()
    return splits.dropna()


@pytest.mark.covers(8, 9, 10)
def test_people_in_both_datasets_get_one_id_and_leave_training_if_they_are_tested_in_one(sources, tmp_path):
    truth = crossing(sources)
    assert len(truth) == 6
    record = combined(sources, tmp_path / "both").json
    images = tables.read_table(tmp_path / "both" / "data" / "images.parquet", "images")
    people = tables.read_table(tmp_path / "both" / "data" / "identities.parquet", "identities")
    linked = people[people["rule"] == "file-name"]
    # CUHK-PEDES keeps the names of half of its people's pictures (its Market/ folder): those can be recognised.
    in_market = {name.split("/")[1][:4] for name in images["image_id"] if name.startswith("cuhk-pedes:Market/")}
    purged = tables.read_table(tmp_path / "both" / "data" / "purged.parquet", "purged")
    known = in_market | {name.split("/")[1][:4] for name in purged["image_id"] if ":Market/" in name}
    expected = {true for true in truth.index if f"{int(true) + 1:04d}" in known}
    assert expected and linked["person_id"].nunique() == len(expected) == record["metrics"]["linked_people"] / 2
    leaking = {true for true in expected if (truth.loc[true] == "test").any() and (truth.loc[true] == "train").any()}
    assert leaking and record["metrics"]["purged_people"] == len(leaking)
    assert {row["person_id"] for row in record["purged"]} == set(purged["person_id"])
    assert not images["image_id"].isin(purged["image_id"]).any()
    assert (images.groupby("person_id")["split"].nunique() == 1).all()
    union = people["person_id"].nunique()
    assert record["metrics"]["people"] == union == 30 - len(expected)


@pytest.mark.covers(10)
def test_without_purging_a_leak_is_refused_or_warned_of(sources, tmp_path):
    words = ("data", "combine", sources / "cuhk-pedes", sources / "market-1501", "--run", tmp_path / "leaky")
    refused(3, "shared by two splits", "data combine", args=(*words, "--no-purge"))
    assert not (tmp_path / "leaky" / "data" / "stage.json").exists()
    record = combined(sources, tmp_path / "leaky", "--no-purge", "--leak-check", "warn").json
    assert any(note.startswith("Leak:") for note in record["notes"])
    refused(3, "shared by two splits", args=("finetune", "--run", tmp_path / "leaky", "--method", "irra-tiny"))


def test_a_users_map_links_people_that_no_rule_finds(sources, tmp_path):
    truth = crossing(sources)
    images = tables.read_table(sources / "cuhk-pedes" / "data" / "images.parquet", "images")
    market = tables.read_table(sources / "market-1501" / "data" / "images.parquet", "images")
    original = tables.read_table(sources / "synth" / "data" / "images.parquet", "images")
    true_of = {row.sha256: row.attributes["true_person"] for row in original.itertuples()}
    rows = [
        {"dataset": name.split(":")[0], "person": name.split(":")[1], "identity": true_of[digest]}
        for frame in (images, market)
        for name, digest in frame.drop_duplicates("person_id")[["person_id", "sha256"]].itertuples(index=False)
        if true_of[digest] in truth.index
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "map.csv", index=False)
    record = combined(sources, tmp_path / "mapped", "--identity-map", tmp_path / "map.csv").json
    assert record["metrics"]["people"] == 24 and record["metrics"]["linked_people"] == 12
    again = combined(sources, tmp_path / "mapped", "--identity-map", tmp_path / "map.csv").json
    assert again["status"] == "up-to-date"


@pytest.mark.covers(11)
def test_a_single_dataset_is_purged_of_files_that_its_own_splits_share(sources, tmp_path):
    copy = tmp_path / "leaky" / "data"
    shutil.copytree(sources / "cuhk-pedes" / "data", copy)
    images = tables.read_table(copy / "images.parquet", "images")
    place = {split: images.index[images["split"] == split][0] for split in ("train", "test")}
    images.loc[place["train"], "sha256"] = images.loc[place["test"], "sha256"]
    tables.write_table(copy / "images.parquet", "images", images)
    refused(3, "1 image file shared", args=("finetune", "--run", tmp_path / "leaky", "--method", "clip-tiny"))
    result = cli("data", "combine", tmp_path / "leaky", "--run", tmp_path / "clean", "--json")
    assert [(entry["reason"], entry["images"]) for entry in result.json["purged"]] == [("image", 1)]
    shown = cli("data", "combine", tmp_path / "leaky", "--run", tmp_path / "clean", "--force")
    assert "Taken out of training:" in shown.out and images.loc[place["test"], "image_id"] in shown.out


def test_what_cannot_be_combined_is_refused(sources, tmp_path):
    one = sources / "cuhk-pedes"
    refused(2, "Missing argument", args=("data", "combine", "--run", tmp_path / "x"))
    refused(3, "cuhk-pedes is in", "--name", args=("data", "combine", one, one, "--run", tmp_path / "x"))
    refused(2, "Choose another --run", args=("data", "combine", one, sources / "market-1501", "--run", one))
    nothing = ("data", "combine", one, tmp_path / "nothing", "--run", tmp_path / "x")
    refused(3, "no run with a dataset", "data import", args=nothing)
    refused(2, "--leak-check maybe", args=("data", "combine", one, one, "--leak-check", "maybe"))
    missing = ("data", "combine", one, sources / "market-1501", "--identity-map", tmp_path / "no.csv")
    refused(3, "no.csv", args=(*missing, "--run", tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.covers(8)
def test_a_combination_trains_one_epoch_and_evaluates_both_tasks_in_one_command(sources, tmp_path):
    run = tmp_path / "both"
    assert combined(sources, run).code == 0
    micro = (
        "--set", "backbone.spec=clip:micro", "--set", "train.batch=8", "--set", "train.instances=2",
        "--set", "train.batch_images=8", "--set", "train.sampler=mixed", "--set", "train.epochs=1",
    )  # fmt: skip
    result = cli("finetune", "--run", run, "--method", "irra-tiny", *micro, "--json")
    assert result.code == 0, result.err
    images = tables.read_table(run / "data" / "images.parquet", "images")
    assert result.json["train_people"] == images.loc[images["split"] == "train", "person_id"].nunique()
    found = cli("evaluate", "--run", run, "--json").json["tables"]
    assert {"t2i:cuhk-pedes", "i2i:market-1501"} <= set(found)
    refused(2, "mixed", "irra", args=("finetune", "--run", run, "--method", "clip-tiny", *micro))


@pytest.mark.slow
@pytest.mark.covers(10)
def test_a_model_knows_the_people_it_was_trained_on_by_all_their_names(sources, tmp_path):
    run = tmp_path / "leaky"
    assert combined(sources, run, "--no-purge", "--leak-check", "off").code == 0
    words = ("--method", "irra-tiny", "--set", "backbone.spec=clip:micro", "--set", "train.epochs=1")
    refused(3, "shared by two splits", args=("finetune", "--run", run, *words))
    assert cli("finetune", "--run", run, *words, "--set", "data.leak_check=off").code == 0
    # Market-1501 alone calls them by its own ids.
    market = sources / "market-1501" / "data"
    refused(3, "were used to train this model", args=("evaluate", "--run", run, "--data", market))


@pytest.mark.slow
@pytest.mark.covers(10)
def test_a_model_is_not_tested_on_people_whom_file_names_show_in_its_training_set(sources, tmp_path):
    """The ordinary cross-dataset run: trained on CUHK-PEDES, evaluated on Market-1501, never combined."""
    words = ("--method", "irra-tiny", "--set", "backbone.spec=clip:micro", "--set", "train.epochs=1")
    assert cli("finetune", "--run", tmp_path / "run", "--data", sources / "cuhk-pedes" / "data", *words).code == 0
    market = sources / "market-1501" / "data"
    refused(3, "were used to train", "data combine", args=("evaluate", "--run", tmp_path / "run", "--data", market))


def test_what_a_purge_leaves_empty_is_said(sources, tmp_path):
    original = sources / "market-1501" / "data"
    twin = tmp_path / "twin" / "data"
    shutil.copytree(original, twin)
    images = tables.read_table(twin / "images.parquet", "images")
    for column in ("image_id", "person_id", "dataset"):
        images[column] = images[column].astype(str).str.replace("market-1501", "twin")
    tables.write_table(twin / "images.parquet", "images", images.assign(split="test"))
    record = cli("data", "combine", sources / "market-1501", tmp_path / "twin", "--run", tmp_path / "x", "--json").json
    assert any("Nothing is left of train of market-1501" in note for note in record["notes"])


def test_the_true_texts_of_rendered_images_do_not_pass_for_a_models(sources, tmp_path):
    """One dataset was described, the rendered one was not: it has no identity texts in the combination."""
    texts = tmp_path / "texts.csv"
    names = tables.read_table(sources / "cuhk-pedes" / "data" / "images.parquet", "images")["image_id"]
    pd.DataFrame({"image": names, "identity": "Tall.", "clothing": "Red coat."}).to_csv(texts, index=False)
    root = sources / "synth" / "data" / "layouts" / "synthped-a" / "cuhk-pedes"
    words = ("data", "import", "cuhk-pedes", root, "--run", tmp_path / "told", "--descriptions", texts)
    assert cli(*words).code == 0
    joined = ("data", "combine", tmp_path / "told", sources / "synth", "--run", tmp_path / "both", "--no-purge")
    assert cli(*joined, "--leak-check", "off", "--json").json["described"] is True
    captions = tables.read_table(tmp_path / "both" / "data" / "captions.parquet", "captions")
    described = captions[captions["kind"].isin(("identity", "clothing"))]
    assert set(described["source"]) == {"mllm"} and described["image_id"].str.startswith("cuhk-pedes:").all()
