import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import corpus_of, without_captions, write_dataset
from PIL import Image

from reidctl import tables
from reidctl.data import TrainingSet
from reidctl.errors import DataError, UsageError
from reidctl.report.batch_sheet import Shown, batch_sheet, person_colours, to_pixels
from reidctl.runs import Run
from reidctl.stages import building, dry_run, dry_run_costs, finetune
from reidctl.stages.dry_run_batch import batch_facts, epoch_facts, shares
from reidctl.training.config import TrainConfig
from reidctl.training.memory import USABLE

METHODS = {
    "clip": ("clip:micro", {}),
    "irra": ("clip:micro", {"mlm_layers": 1}),
    "bdam": ("vit-bert:micro", {"depth": 1, "heads": 2, "fusion": {"width": 16, "out_dim": 16}}),
    "clip-reid": ("clip:micro", {"n_id_tokens": 2}),
    "interpart": ("clip:micro", {}),
}
TRAIN = {"epochs": 2, "batch": 8, "instances": 2, "device": "cpu", "workers": 0}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    for module in (dry_run, dry_run_costs):
        monkeypatch.setattr(module, "BUDGET", 0.3)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry") / "blocks"
    return write_dataset(folder, people=8, splits={6: "val", 7: "test"})


def recipe(name="clip", train=None, **sections):
    spec, settings = METHODS[name]
    chosen = {"method": {"name": name, **settings}, "backbone": {"spec": spec}, "train": {**TRAIN, **(train or {})}}
    return {**chosen, **sections}


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_writes_nothing_and_its_numbers_add_up(name, blocks, tmp_path):
    before = files_below(tmp_path), files_below(blocks)
    described = blocks / "described.parquet"
    record = dry_run.run(Run(tmp_path / "run"), recipe(name), data=blocks, captions=described)
    assert (files_below(tmp_path), files_below(blocks)) == before and not (tmp_path / "run").exists()
    assert json.loads(json.dumps(record)) == record
    assert record["method"] == name and record["device"] == "cpu" and record["sheet"] is None
    found = record["parameters"]
    for kind in ("trainable", "frozen"):
        assert sum(row[kind] for row in found["modules"]) == found[kind]
    assert sum(row["numbers"] for row in record["learning_rates"]) == found["trainable"]
    assert {"image tower", "text tower"} <= {row["module"] for row in found["modules"]}
    assert sum(record["memory"]["bytes"].values()) == record["memory"]["total"] and record["memory"]["fits"]
    assert record["memory"]["bytes"]["activations"] > 0
    assert record["operations"]["image"] == pytest.approx(record["operations"]["step"] / 8)
    speed = record["speed"]
    both = 1 / (1 / speed["step_images_per_second"] + 1 / speed["loader_images_per_second"])
    assert speed["images_per_second"] == pytest.approx(both, rel=0.05)
    seconds = 2 * record["epoch"]["samples"] / speed["images_per_second"]
    assert speed["hours"] == pytest.approx(seconds / 3600, rel=0.05)
    text = "\n".join(dry_run.lines(record))
    assert f"{found['trainable']:,}" in text and "Nothing was trained" in text


def test_all_parameters_of_the_model_are_counted(blocks, tmp_path):
    given = recipe("irra")
    record = dry_run.run(Run(tmp_path / "run"), given, data=blocks)
    checked = building.check(building.resolve(given, None))
    train = corpus_of(blocks).of_split("train")
    model = building.build_model(train, checked, checked.training, 0)
    found = record["parameters"]
    assert found["trainable"] + found["frozen"] == sum(parameter.numel() for parameter in model.parameters())
    heads = {row["module"]: row["trainable"] for row in found["modules"]}
    assert heads["classifier"] == sum(parameter.numel() for parameter in model.classifier.parameters())


def test_the_first_batch_is_that_of_the_training(blocks, tmp_path, monkeypatch):
    seen = []
    collate = TrainingSet.collate

    def watching(self, samples):
        batch = collate(self, samples)
        seen.append(batch.image_id)
        return batch

    monkeypatch.setattr(TrainingSet, "collate", watching)
    record = dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks)
    dry = seen[0]
    seen.clear()
    finetune.run(Run(tmp_path / "run"), recipe(), data=blocks)
    assert seen[0] == dry and record["batch"]["samples"] == len(dry)


def test_the_picture_is_written_only_where_asked(blocks, tmp_path):
    run = Run(tmp_path / "run")
    out = dry_run.default_sheet(run)
    record = dry_run.run(run, recipe(), data=blocks, save=out)
    assert record["sheet"] == str(out) and files_below(tmp_path) == [out]
    assert any(str(out) in line for line in dry_run.lines(record))
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 8 * 100


def test_passes_and_checkpointing_need_less_and_an_average_more(blocks, tmp_path):
    def memory(train=None, **backbone):
        given = recipe(train=train)
        given["backbone"].update(backbone)
        return dry_run.run(Run(tmp_path / "run"), given, data=blocks)["memory"]["bytes"]

    plain = memory()
    assert memory({"accumulate": 4})["activations"] < plain["activations"]
    assert memory(grad_checkpointing=True)["activations"] < plain["activations"]
    assert memory({"ema": 0.9})["averages"] == plain["gradients"] and plain["averages"] == 0


def test_passes_take_more_operations(blocks, tmp_path):
    once, twice = (
        dry_run.run(Run(tmp_path / "run"), recipe(train={"accumulate": count}), data=blocks)["operations"]["step"]
        for count in (1, 2)
    )
    assert 1.25 * once < twice < 1.4 * once


def test_where_it_does_not_fit_changes_are_offered(blocks, tmp_path, monkeypatch):
    record = dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks)
    # Room for all but a third of the activations.
    need, activations = record["memory"]["total"], record["memory"]["bytes"]["activations"]
    monkeypatch.setattr(dry_run_costs, "total_bytes", lambda device: (need - activations / 3) / USABLE)
    tight = dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks)
    assert not tight["memory"]["fits"] and tight["memory"]["changes"]
    text = "\n".join(dry_run.lines(tight))
    assert "That does not fit. These would: " in text
    monkeypatch.setattr(dry_run_costs, "total_bytes", lambda device: 1000)
    text = "\n".join(dry_run.lines(dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks)))
    assert "No setting makes it fit" in text


def test_several_devices_share_each_batch(blocks, tmp_path):
    one = dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks)
    two = dry_run.run(Run(tmp_path / "run"), recipe(), data=blocks, devices=2)
    assert one["shares"] == [] and [row["samples"] for row in two["shares"]] == [4, 4]
    assert two["memory"]["total"] < one["memory"]["total"]
    assert two["operations"]["step"] < 0.6 * one["operations"]["step"]
    assert any(line.startswith("device 1: 4 samples of 2 people") for line in dry_run.lines(two))


def test_a_mixed_batch_shows_both_kinds_and_samples_without_a_text(tmp_path):
    folder = without_captions(write_dataset(tmp_path / "blocks", people=8, splits={6: "val", 7: "test"}), [0, 1, 2])
    mixed = {"sampler": "mixed", "batch": 4, "batch_images": 4}
    out = tmp_path / "mixed.png"
    record = dry_run.run(Run(tmp_path / "run"), recipe("irra", mixed), data=folder, save=out)
    batch = record["batch"]
    assert (batch["captioned"], batch["uncaptioned"]) == (4, 4) and batch["datasets"] == {"bare": 4, "blocks": 4}
    assert out.is_file()


def test_missing_prompts_are_told_and_the_costs_all_the_same(blocks, tmp_path):
    record = dry_run.run(Run(tmp_path / "run"), recipe("clip-reid"), data=blocks)
    (note,) = [note for note in record["notes"] if "stop here" in note]
    assert "has no finished prompt stage" in note and record["memory"]["total"] > 0
    assert f"note: {note}" in dry_run.lines(record)


def test_nobody_who_costs_money_is_asked_for_phrases(blocks, tmp_path, monkeypatch):
    asked = []
    whom = building.find_phrases
    monkeypatch.setattr(building, "find_phrases", lambda *a: asked.append(a[2].backend) or whom(*a))
    given = recipe("interpart", phrases={"backend": "llm", "model": "m", "base_url": "http://127.0.0.1:9"})
    record = dry_run.run(Run(tmp_path / "run"), given, data=blocks)
    assert asked == ["rules"] and any("phrases.backend=llm was not asked" in note for note in record["notes"])


def test_what_finetune_refuses_is_refused(blocks, tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(UsageError, match="0 devices"):
        dry_run.run(run, recipe(), data=blocks, devices=0)
    with pytest.raises(UsageError, match="is a PNG file"):
        dry_run.run(run, recipe(), data=blocks, save=tmp_path / "sheet.jpg")
    with pytest.raises(UsageError, match="weight 0"):
        dry_run.run(run, recipe(method={"name": "clip", "weights": {"itc": 0}}), data=blocks)
    leaky = write_dataset(tmp_path / "leaky", people=4, splits={3: "val"})
    images = tables.read_table(leaky / "images.parquet", "images")
    images.loc[images["person_id"] == "blocks:3", "person_id"] = "blocks:0"
    tables.write_table(leaky / "images.parquet", "images", images)
    with pytest.raises(DataError):
        dry_run.run(run, recipe(), data=leaky)
    alone = write_dataset(tmp_path / "alone", people=4)
    with pytest.raises(DataError, match="no `val` split"):
        dry_run.run(run, recipe(), data=alone)
    assert not run.path.exists()


class Samples(SimpleNamespace):
    def __len__(self):
        return len(self.person_of_sample)


def some_samples(people, pictures, paired=None, domains=("a",)):
    """What the facts about batches read of a training set."""
    people = np.asarray(people)
    return Samples(
        person_of_sample=people,
        picture_of_sample=np.asarray(pictures),
        row_of_sample=np.arange(len(people)),
        domain_of_row=np.arange(len(people)) % len(domains),
        domains=np.asarray(domains),
        texts=("full",),
        paired=len(people) if paired is None else paired,
        persons=sorted(set(people.tolist())),
    )


def test_a_batch_is_described_as_counted_by_hand():
    samples = some_samples([0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 3, 4], 5, ("a", "b"))
    facts = batch_facts(samples, np.arange(6))
    assert (facts["samples"], facts["people"], facts["per_person"]) == (6, 3, [1, 2.0, 3])
    assert facts["datasets"] == {"a": 3, "b": 3} and facts["repeated_images"] == 1
    assert (facts["captioned"], facts["uncaptioned"]) == (5, 1)
    # Of five captioned samples: each of person 0 has 2 others', of person 1 has 3, person 2 all five.
    assert facts["negatives"] == round((3 * 2 + 2 * 3 + 5) / 6, 2)
    epoch = epoch_facts(samples, [np.asarray([0, 1, 3]), np.asarray([0, 4])])
    assert (epoch["steps"], epoch["samples"], epoch["images"], epoch["people"]) == (2, 5, 3, 2)
    assert epoch["of_images"] == 5 and epoch["of_people"] == 3 and epoch["batches"] == [2, 3]
    assert epoch["repeated_images"] == 1


def test_shares_leave_out_what_cannot_be_dealt():
    samples = some_samples(np.repeat(np.arange(5), 2), np.arange(10))
    config = TrainConfig(sampler="identity", batch=10, instances=2)
    rows = shares(samples, [np.arange(10)], config, 2)
    assert [(row["samples"], row["people"], row["left_out"]) for row in rows] == [(4, 2, 2), (4, 2, 2)]
    random = shares(samples, [np.arange(10)], TrainConfig(sampler="random", batch=10), 2)
    assert [(row["samples"], row["left_out"]) for row in random] == [(5, 0), (5, 0)]


def test_pixels_come_back_from_their_normalised_form():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    image = ((pixels / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(to_pixels(image, mean, std), pixels)
    assert to_pixels(np.full((3, 1, 1), 99.0, np.float32), mean, std).max() == 255


def test_neighbours_have_different_colours_and_one_person_has_one():
    colours = person_colours([7, 7, 3, 3, *range(20, 80)])
    assert len(set(colours.values())) == len(colours) == 62


def test_texts_are_data_and_never_markup(tmp_path):
    pixels = np.full((6, 3, 3), 200, np.uint8)

    def drawn(text, name="p1"):
        batch_sheet("First batch", [Shown(pixels, 0, name, text), Shown(pixels, 1, "p2", None)], tmp_path / "sheet.png")
        return (tmp_path / "sheet.png").read_bytes()

    plain = drawn("red shirt")
    odd = [drawn(text) for text in (r"$\frac{$ red", "<b>red</b> shirt", "", "x" * 500, "a\n\nb", "%s {0}")]
    assert len({plain, *odd}) == 7 and drawn("red shirt") == plain
    assert drawn("red shirt", "a-very-long-name-of-a-dataset:" + "0" * 60) != plain
    with pytest.raises(DataError, match="no sample"):
        batch_sheet("First batch", [], tmp_path / "none.png")
