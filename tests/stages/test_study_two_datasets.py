"""A study over a captioned and a caption-free dataset: joined, purged, trained on both, measured on each."""

from pathlib import Path

import pytest

from reidctl import tables
from reidctl.errors import UsageError
from reidctl.evaluation.study import Measures, load_study
from reidctl.runs import Run
from reidctl.stages import evaluate, study, study_unit
from reidctl.stages.study_unit import Dataset, Job, Unit, home_of, measure

SYNTH = {
    "people": 15, "images_per_person": 4, "size": [32, 16], "domain": "both", "captioned": "a", "crossing": 6,
    "train_fraction": 0.6, "val_fraction": 0.2, "clone_pairs": 0,
}  # fmt: skip
RECIPE = {
    "seed": 3,
    "synth": SYNTH,
    "caption": {"mllm": "template"},
    "method": {"name": "irra", "mlm_layers": 1},
    "backbone": {"spec": "vit-bert:micro", "image_size": None},
    "train": {
        "epochs": 1, "batch": 8, "batch_images": 8, "instances": 2, "sampler": "mixed", "warmup_epochs": 0,
        "device": "cpu",
    },
}  # fmt: skip


def truth(rendered):
    """Who is in both datasets by the renderer's word: true person -> split by dataset."""
    images = tables.read_table(rendered.table("data", "images"), "images")
    images["true"] = [row["true_person"] for row in images["attributes"]]
    return images.groupby(["true", "dataset"], observed=True)["split"].first().unstack().dropna()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def unit(home):
    made = Unit(home, RECIPE)
    made.dataset.make()
    return made


@pytest.mark.covers(8, 10)
def test_two_rendered_datasets_become_one_in_which_nobody_is_trained_on_and_tested(unit):
    people = unit.dataset
    crossing = truth(people.pictures)
    leaking = (crossing == "test").any(axis=1) & (crossing == "train").any(axis=1)
    assert len(crossing) == 6 and leaking.sum() == 2
    record = Run(people.folder.parent).require("data")
    assert record["metrics"]["people"] == 24 and record["metrics"]["linked_people"] == 12
    assert record["metrics"]["purged_people"] == 2 and record["metrics"]["purged_images"] == 8
    images = tables.read_table(people.folder / "images.parquet", "images")
    images["true"] = [row["true_person"] for row in images["attributes"]]
    assert (images.groupby("person_id")["true"].nunique() == 1).all()
    assert (images.groupby("true")["person_id"].nunique() == 1).all()
    assert (images.groupby("true")["split"].nunique() == 1).all()
    # The texts are about what is left.
    texts = tables.read_table(people.captions, "captions")
    assert set(texts["image_id"]) == set(images["image_id"])
    captions = tables.read_table(people.folder / "captions.parquet", "captions")
    told = set(captions.loc[captions["kind"] == "full", "image_id"])
    assert told == set(images.loc[images["dataset"] == "synthped-a", "image_id"])


def test_data_that_is_made_is_not_made_again(unit):
    paths = [unit.dataset.folder / "images.parquet", unit.dataset.captions]
    before = [path.stat().st_mtime_ns for path in paths]
    unit.dataset.make()
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_how_the_two_are_joined_is_the_recipes_to_say_and_has_a_place_of_its_own(unit, home):
    leaky = Unit(home, {**RECIPE, "data": {"purge": False, "leak_check": "off", "part": "captioned"}})
    assert leaky.dataset.pictures.path == unit.dataset.pictures.path
    assert leaky.dataset.both.path != unit.dataset.both.path and leaky.dataset.texts.path != unit.dataset.texts.path
    leaky.dataset.make()
    assert leaky.dataset.both.require("data")["metrics"]["purged_images"] == 0
    # What else `data` says is the training's business.
    part = Unit(home, {**RECIPE, "data": {"part": "captioned", "caption_noise": 0.1}})
    assert part.dataset == unit.dataset and part.name != unit.name


def test_a_wrong_setting_of_data_is_found_before_anything_is_rendered(tmp_path):
    with pytest.raises(UsageError, match="purge"):
        Dataset(tmp_path, {**RECIPE, "data": {"purge": "perhaps"}}).make()
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_both_datasets_are_trained_on_and_measured_by_their_names(unit):
    record = unit.train()
    images = tables.read_table(unit.dataset.folder / "images.parquet", "images")
    train = images[images["split"] == "train"]
    assert record["train_people"] == train["person_id"].nunique()
    assert train.groupby("dataset", observed=True)["person_id"].nunique().min() > 0
    elsewhere = {
        "far": {"seed": 9, "first": 700},
        "lone": {"domain": "b", "captioned": "both", "crossing": 0, "first": 900},
    }
    measures = Measures(elsewhere=elsewhere, settings=("identity-only", "blur"))
    values = measure(unit, record, measures)
    wanted = {"synthped-a.t2i.rank1", "synthped-a.i2i.mAP", "synthped-b.i2i.rank1", "synthped-b.i2i.mAP"}
    assert wanted <= set(values)
    assert not any(name.startswith("synthped-b.t2i") for name in values)
    # Only a has captions, so its direction has plain names too; both have images.
    assert values["t2i.rank1"] == values["synthped-a.t2i.rank1"] and "i2i.rank1" not in values
    assert values["chance.t2i.mAP"] == values["synthped-a.chance.t2i.mAP"]
    assert {f"far.{name}" for name in wanted} <= set(values)
    assert {"lone.t2i.mAP", "lone.i2i.mAP"} <= set(values)
    found = unit.run.require("evaluate")["tables"]
    assert values["synthped-b.i2i.mAP"] == found["i2i:synthped-b"]["rows"]["standard"]["mAP"][0]
    assert values["synthped-a.i2i.mAP"] == found["i2i:synthped-a"]["rows"]["standard"]["mAP"][0]
    assert values["synthped-a.blur.i2i.mAP"] != values["synthped-b.blur.i2i.mAP"]
    # b has no captions, but it is described.
    assert values["blur.t2i.mAP"] == values["synthped-a.blur.t2i.mAP"]
    assert "synthped-b.identity-only.t2i.mAP" in values and "identity-only.t2i.mAP" not in values
    assert measure(unit, record, measures) == values


def rows(*names):
    """What `evaluate` would leave of these tables."""
    tables = {
        name: {"direction": name[:3], "dataset": name[4:], "about": "", "rows": {"standard": {"mAP": [0.5, 0, 1]}}}
        for name in names
    }
    return {"tables": tables}


def test_a_joint_table_has_its_own_name_and_changes_that_of_no_other(unit, monkeypatch):
    asked = []

    def fake(run, *, joint, **options):
        asked.append(joint)
        return rows("t2i:a", "i2i:a", "i2i:b", *(["t2i:joint", "i2i:joint"] if joint else []))

    monkeypatch.setattr(evaluate, "run", fake)
    plain = study_unit._evaluate(unit, Measures(), 3, unit.dataset)
    joint = study_unit._evaluate(unit, Measures(joint=True), 3, unit.dataset)
    assert set(plain) == {"a.t2i.mAP", "t2i.mAP", "a.i2i.mAP", "b.i2i.mAP"}
    assert set(joint) == {*plain, "joint.t2i.mAP", "joint.i2i.mAP"} and asked == [False, True]


def test_what_was_measured_without_a_joint_gallery_is_filed_as_before_there_was_one():
    assert study_unit._asked(Measures()) == {"query": "caption", "rerank": ()}
    assert study_unit._asked(Measures(joint=True)) == {"query": "caption", "rerank": (), "joint": True}


@pytest.mark.slow
def test_a_study_measures_the_joint_gallery_where_there_are_two_datasets(unit):
    record = unit.train()
    plain = measure(unit, record, Measures())
    elsewhere = {
        "far": {"seed": 9, "first": 700},
        "lone": {"domain": "b", "captioned": "both", "crossing": 0, "first": 900},
    }
    values = measure(unit, record, Measures(joint=True, elsewhere=elsewhere))
    found = unit.run.require("evaluate")["tables"]
    assert values["joint.t2i.mAP"] == found["t2i:joint"]["rows"]["standard"]["mAP"][0]
    assert values["joint.i2i.rank1"] == found["i2i:joint"]["rows"]["standard"]["rank1"][0]
    assert {"joint.chance.i2i.mAP", "far.joint.t2i.mAP"} <= set(values)
    assert not any(name.startswith("lone.joint") for name in values) and "lone.t2i.mAP" in values
    assert {name: values[name] for name in plain} == plain


def test_trainings_and_data_of_one_dataset_are_called_what_they_were_called_before_there_were_two():
    """Or finished studies would be trained again; the names are those that commit 4128adc gave."""
    units = study._units(Path("/h"), load_study(Path("pipelines/studies/bdam-base.yaml")))
    baseline = units[("baseline", 0)]
    assert (baseline.name, baseline.start.name) == ("6bfe946312d6", "7470012084dd")
    assert units[("full", 2)].name == "5907e8778212"
    assert baseline.dataset.folder == Path("/h/people/40965bbd3c34/data")
    assert baseline.dataset.captions == Path("/h/texts/fe0b507be224/caption/captions.parquet")
    alone = {
        "seed": 3, "synth": {"people": 20, "domain": "a"}, "caption": {"mllm": "template"}, "method": {"name": "clip"},
        "backbone": {"spec": "clip:micro"}, "data": {"description_noise": 0.5, "purge": True},
    }  # fmt: skip
    before = {**alone, "data": {"description_noise": 0.5}}
    assert Unit(Path("h"), before).name == "6bcd796efec1"
    # A lone dataset is not joined with anything, whatever is said of it.
    assert Unit(Path("h"), alone).dataset.folder == Path("h/people/b546990117e8/data")
    assert Unit(Path("h"), alone).dataset.captions == Path("h/texts/b1f8dcec5eb7/caption/captions.parquet")


def test_the_log_of_a_dataset_lies_where_its_last_step_writes(home):
    bare = Dataset(home, {name: RECIPE[name] for name in ("seed", "synth")})
    assert home_of(Job(bare).work).path == bare.both.path
