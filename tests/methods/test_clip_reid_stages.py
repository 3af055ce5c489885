"""`clip-reid` through both stages and the commands: what trains, what is refused, how the epoch is chosen."""

import hashlib
import shutil

import numpy as np
import pytest
from cli.commandline import cli, refused
from conftest import corpus_of, without_captions, write_dataset
from methods.test_clip_reid import CPU, reid
from safetensors.torch import load_file

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.config import parse_section
from reidctl.data import TrainingSet, roster_of
from reidctl.embedding import embed_gallery_tasks, embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import load_method, method_class
from reidctl.methods.clip_reid import ClipReid, ClipReidConfig
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.runs import Run
from reidctl.stages import building, finetune, prompt_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clip_reid") / "blocks", people=6)


LOOP = {
    "batch": 4, "instances": 2, "device": "cpu", "workers": 0, "log_every": 1, "warmup_epochs": 0,
    "schedule": "constant", "augment": {"flip": 0, "pad": 0, "erase": 0},
}  # fmt: skip
RECIPE = {
    "method": {"name": "clip-reid", "n_id_tokens": 2},
    "backbone": {"spec": "clip:micro"},
    "prompt": {**LOOP, "sampler": "random", "epochs": 1, "lr_prompt": 1e-2, "cache": "fp32"},
    "train": {**LOOP, "sampler": "identity", "epochs": 1, "lr": 1e-3, "lr_new": 1e-3, "select_metric": "mAP"},
}
SPLITS = {**dict.fromkeys(range(6, 12), "val"), **dict.fromkeys(range(12, 16), "test")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """People 0 to 5 train, 6 to 11 validate, 12 to 15 test, three images each from three cameras; 3 to 5 and 9 to 11
    are of the dataset `bare`, without captions."""
    folder = write_dataset(tmp_path_factory.mktemp("stages") / "blocks", people=16, splits=SPLITS)
    return without_captions(folder, {3, 4, 5, 9, 10, 11})


def changed(**sections):
    whole = RECIPE | {name: {**RECIPE.get(name, {}), **value} for name, value in sections.items()}
    return building.resolve(whole, None)


def learn(run, data, /, **sections):
    return prompt_stage.run(run, changed(**sections), data=data, device="cpu")


def train(run, data, /, **sections):
    return finetune.run(run, changed(**sections), data=data, device="cpu")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, data):
    """A run with a finished prompt stage. Nobody may change it."""
    run = Run(tmp_path_factory.mktemp("learnt") / "run")
    learn(run, data)
    return run


@pytest.fixture
def run(learnt, tmp_path):
    shutil.copytree(learnt.path, tmp_path / "run")
    return Run(tmp_path / "run")


def untrained(data, stage="prompts", **sections):
    checked = building.check(changed(**sections))
    corpus = corpus_of(data).of_split("train")
    return building.build_model(corpus, checked, getattr(checked, stage), 0)


def handed(run):
    return load_file(prompt_stage.prompts_file(run))


def digests(state, start=""):
    return {
        name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for name, value in state.items()
        if name.startswith(start)
    }


@pytest.mark.covers(205, 222)
@pytest.mark.parametrize("cache", ["off", "fp32"])
def test_stage_one_leaves_both_encoders_and_everything_but_the_prompts_as_they_were(data, tmp_path, monkeypatch, cache):
    ended, write = {}, prompt_stage._write
    monkeypatch.setattr(
        prompt_stage, "_write", lambda run, model, *rest: ended.update(model.state_dict()) or write(run, model, *rest)
    )
    learn(Run(tmp_path / "run"), data, prompt={"cache": cache, "epochs": 2})
    before, after = digests(untrained(data).state_dict()), digests(ended)
    assert {name for name in before if before[name] != after[name]} == {"id_tokens"}
    assert set(handed(Run(tmp_path / "run"))) == {"id_tokens"}
    table = tables.read_table(Run(tmp_path / "run").table("prompt-stage", "prompts"), "prompts")
    assert len(table) == 12 and set(table["scope"]) == {"person"}


@pytest.mark.covers(213, 222)
def test_stage_two_starts_from_stage_one_and_leaves_the_text_side_as_it_was(run, data):
    record = train(run, data)
    assert record["status"] == "done" and record["train_people"] == 6
    began = untrained(data, "training").state_dict() | handed(run)
    before, after = digests(began), digests(load_method(run.stage_dir("finetune")).state_dict())
    moved = {name for name in before if before[name] != after[name]}
    assert moved and {name for name in moved if not name.startswith(("backbone.image.", "necks."))} == set()
    towers = {name for name in before if name.startswith("backbone.image.")}
    assert {name for name in towers if before[name] == after[name]} == set()
    assert not {name for name in moved if name.endswith("norm.bias") and name.startswith("necks.")}
    assert before["id_tokens"] != digests(untrained(data).state_dict())["id_tokens"]


def test_the_first_image_to_text_loss_is_that_of_the_learnt_prompts(run, data):
    def first(run):
        train(run, data, train={"lr": 0.0, "lr_new": 0.0})
        rows = tables.read_table(run.table("finetune", "history"), "history")
        return float(rows[(rows["name"] == "loss/i2t") & (rows["step"] == 0)]["value"].iloc[0])

    found = first(run)
    path = prompt_stage.prompts_file(run)
    assert path.is_file()
    learn(run, data, prompt={"lr_prompt": 0.5})
    assert abs(first(run) - found) > 1e-4


@pytest.mark.covers(222)
@pytest.mark.parametrize(
    ("size", "sizes"), [(6, [6, 6, 6]), (9, [9, 9]), (4, [4, 4, 4, 4, 2]), (17, [18]), (7, [7, 7, 4])]
)
def test_stage_one_has_no_empty_last_batch_when_the_images_divide_and_a_smaller_one_when_not(
    data, tmp_path, monkeypatch, size, sizes
):
    """18 images. The published loop has a 4th batch of nothing for 6, whose loss is not a number."""
    seen, encode = [], ClipReid.encode

    def watched(self, batch, stage):
        seen.append(len(batch))
        return encode(self, batch, stage)

    monkeypatch.setattr(ClipReid, "encode", watched)
    learn(Run(tmp_path / "run"), data, prompt={"batch": size})
    assert seen == sizes


@pytest.mark.covers(222)
def test_stage_two_needs_stage_one_unless_no_loss_reads_it(data, run, tmp_path):
    with pytest.raises(DataError, match="no finished prompt stage"):
        train(Run(tmp_path / "new"), data)
    record = train(Run(tmp_path / "new"), data, method={"weights": {"i2t": 0}})
    assert record["status"] == "done" and record["prompts"] is None
    rows = tables.read_table(Run(tmp_path / "new").table("finetune", "history"), "history")
    assert {name for name in rows["name"] if name.startswith("loss/")} == {"loss/id", "loss/triplet"}
    with pytest.raises(UsageError, match="learns nothing in a prompt stage"):
        learn(Run(tmp_path / "new"), data, method={"weights": {"i2t": 0}})
    with pytest.raises(DataError, match=r"other settings: `method\.n_id_tokens`"):
        train(run, data, method={"n_id_tokens": 3})
    # What only stage 2 reads may change.
    assert train(run, data, train={"epochs": 0}, method={"smoothing": 0.0, "i2i_feature": "bn"})["status"] == "done"


def image_to_image(method, corpus):
    """mAP of the split's queries in its gallery, other cameras only."""
    vectors = embed_gallery_tasks(method, corpus, device=CPU)["i2i"]
    people, cameras = corpus.images["person_id"].to_numpy(), corpus.images["camera_id"].to_numpy()
    query = (corpus.images["role"] == "query").to_numpy()
    return evaluate_ranking(
        vectors[query], vectors[~query], query_person=people[query], gallery_person=people[~query],
        query_camera=cameras[query], gallery_camera=cameras[~query], exclude="same_camera", top=0,
    ).queries.means()["mAP"]  # fmt: skip


def test_the_epoch_is_chosen_on_images_although_there_are_captions(run, data):
    record = train(run, data, train={"epochs": 0})
    method, corpus = load_method(run.stage_dir("finetune")), corpus_of(data).of_split("val")
    assert len(corpus.captions)
    people = corpus.images["person_id"].to_numpy()
    texts = evaluate_ranking(
        embed_queries(method, list(corpus.captions["text"]), device=CPU),
        embed_gallery_tasks(method, corpus, device=CPU)["t2i"],
        query_person=people[corpus.captions["row"]], gallery_person=people, top=0,
    ).queries.means()["mAP"]  # fmt: skip
    assert record["metrics"]["val.mAP"] == pytest.approx(image_to_image(method, corpus), abs=1e-6)
    assert abs(record["metrics"]["val.mAP"] - texts) > 0.01
    rows = tables.read_table(run.table("finetune", "history"), "history")
    assert set(rows[rows["split"] == "val"]["name"]) == {"rank1", "mAP"}


@pytest.mark.covers(222)
def test_cameras_and_overlap_go_through_both_stages_and_into_the_saved_model(data, tmp_path):
    run = Run(tmp_path / "run")
    sections = {"method": {"sie": {"camera": True}}, "backbone": {"stride": 12}}
    learn(run, data, **sections)
    assert train(run, data, **sections)["status"] == "done"
    method = load_method(run.stage_dir("finetune"))
    assert method.backbone.grid == (5, 2) and method.backbone.config.stride == 12
    assert method.cameras == tuple(f"{name}/c{n}" for name in ("bare", "blocks") for n in range(3))
    assert method.roster == roster_of(corpus_of(data).of_split("train").images)
    began = untrained(data, "training", **sections).camera_vectors
    assert (method.camera_vectors != began).any(dim=1).all()
    with pytest.raises(DataError, match=r"`backbone\.stride`"):
        train(run, data, method=sections["method"])


def test_a_dataset_without_cameras_is_refused_for_side_information(tmp_path):
    folder = write_dataset(tmp_path / "blocks", people=8, splits={6: "val", 7: "val"})
    images = tables.read_table(folder / "images.parquet", "images")
    tables.write_table(folder / "images.parquet", "images", images.assign(camera_id=None))
    with pytest.raises(UsageError, match="names its camera"):
        learn(Run(tmp_path / "run"), folder, method={"sie": {"camera": True}})


@pytest.mark.covers(215)
def test_one_of_several_datasets_is_trained_on_and_chooses_the_epoch_by_itself(data, tmp_path):
    run, only = Run(tmp_path / "run"), {"data": {"datasets": ["blocks"]}}
    assert learn(run, data, **only)["people"] == 3
    record = train(run, data, **only)
    method = load_method(run.stage_dir("finetune"))
    assert record["train_people"] == 3 and method.roster.domains == ("blocks",)
    seen = tables.read_table(run.table("finetune", "seen"), "seen")
    both = Run(tmp_path / "both")
    learn(both, data)
    train(both, data)
    assert len(seen) < len(tables.read_table(both.table("finetune", "seen"), "seen"))
    # The people who chose the epoch are those of this dataset.
    val = corpus_of(data).of_split("val")
    own = val.of_rows(np.flatnonzero(val.images["dataset"] == "blocks"))
    assert 0 < len(own.images) < len(val.images)
    assert record["metrics"]["val.mAP"] == pytest.approx(image_to_image(method, own), abs=1e-6)


def test_a_training_refuses_unknown_datasets_and_prompts_of_others(data, run, tmp_path):
    unknown, reads_no_prompts = {"datasets": ["blocks", "elsewhere"]}, {"weights": {"i2t": 0}}
    for call, method in ((learn, {}), (train, reads_no_prompts)):
        with pytest.raises(DataError, match=r"no images of dataset `elsewhere`.*bare, blocks"):
            call(Run(tmp_path / "new"), data, data=unknown, method=method)
    with pytest.raises(DataError, match="other images or captions"):
        train(run, data, data={"datasets": ["blocks"]})
    learn(run, data, data={"datasets": ["blocks"]})
    with pytest.raises(DataError, match="other images or captions"):
        train(run, data)
    # All of them by name, in any order, are the same people.
    learn(run, data, data={"datasets": ["blocks", "bare"]})
    assert train(run, data, data={"datasets": ["bare", "blocks"]}, train={"epochs": 0})["status"] == "done"


# The commands


@pytest.mark.covers(222)
def test_the_chain_of_commands_runs_from_pictures_to_metrics(tmp_path):
    run = ("--run", tmp_path / "run", "--json")
    small = [
        "--method", "clip-reid-tiny", "--device", "cpu", "--set", "backbone.spec=clip:micro", "--set",
        "prompt.epochs=1", "--set", "train.epochs=1", "--set", "prompt.batch=8", "--set", "train.batch=8", "--set",
        "train.instances=2",
    ]  # fmt: skip
    made = cli("data", "synth", *run, "--people", "12", "--images-per-person", "3", "--size", "64x32", "--workers", "1")
    assert made.code == 0, made.err
    refused(3, "no finished prompt stage", "prompt-stage", args=("finetune", *run[:2], *small))
    first = cli("prompt-stage", *run, *small)
    assert first.code == 0 and first.json["method"] == "clip-reid", first.err
    second = cli("finetune", *run, *small)
    assert second.code == 0 and second.json["selected_on"] == "val" and second.json["select_metric"] == "mAP", (
        second.err
    )
    assert 0 < second.json["metrics"]["val.mAP"] <= 1
    measured = cli("evaluate", *run, "--device", "cpu")
    assert measured.code == 0, measured.err
    assert 0 < measured.json["metrics"]["i2i"]["mAP"] <= 1
    for name, kwargs in (("prompt-stage", small), ("finetune", small)):
        assert cli(name, *run, *kwargs).json["status"] == "up-to-date"


def test_one_setting_of_the_triplet_loss_leaves_the_others_as_published():
    assert ClipReidConfig(triplet={"margin": 0.5}).triplet.model_dump() == {
        "margin": 0.5,
        "squared": False,
        "mining": "batch_hard",
        "normalize": False,
    }
    hpl = parse_section(method_class("hpl").Config, {"triplet": {"margin": 0.5}}, "method").triplet
    assert not hpl.squared and hpl.normalize


def test_a_sentence_without_the_persons_tokens_is_refused():
    with pytest.raises(UsageError, match=r"no slot `\{id\}`"):
        reid(template="A photo of a person.")


@pytest.mark.parametrize(
    ("stage", "weights"), [("prompt-stage", {"con": 0}), ("finetune", {"id": 0, "triplet": 0, "i2t": 0})]
)
def test_a_stage_in_which_nothing_has_weight_is_refused(stage, weights):
    with pytest.raises(UsageError, match=f"`{stage}` has weight 0"):
        building.require_losses(reid(weights=weights), stage)
    building.require_losses(reid(), stage)


def test_shuffled_labels_give_everybody_images_of_anybody_of_the_dataset(folder):
    method, corpus = reid(), corpus_of(folder)
    corpus.images["dataset"] = ["a" if row < 9 else "b" for row in range(len(corpus.images))]
    given = {"size": (64, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "tokenize": method.backbone.tokenize, "texts": ()}
    true = TrainingSet(corpus, **given).person_of_row
    shuffled = TrainingSet(corpus, shuffle_labels=True, **given).person_of_row
    for part in (slice(0, 9), slice(9, None)):
        assert sorted(shuffled[part]) == sorted(true[part])
        assert (shuffled[part] != true[part]).mean() > 0.3
    assert np.array_equal(shuffled, TrainingSet(corpus, shuffle_labels=True, **given).person_of_row)


@pytest.mark.parametrize("stage", ["prompt-stage", "finetune"])
def test_a_wrong_setting_leaves_the_finished_stage_as_it_was(tmp_path, stage):
    folder = write_dataset(tmp_path / "blocks", people=8, splits={6: "val", 7: "val"})
    recipe = {"method": {"name": "clip-reid", "n_id_tokens": 2}, "backbone": {"spec": "clip:micro"}}
    short = {"batch": 4, "instances": 2, "epochs": 1, "device": "cpu"}
    recipe |= {"prompt": {**short, "sampler": "random"}, "train": short}
    run = Run(tmp_path / "run")
    prompt_stage.run(run, recipe, data=folder)
    finetune.run(run, recipe, data=folder)
    record = run.record(stage)
    section = "prompt" if stage == "prompt-stage" else "train"
    wrong = recipe | {section: {**recipe[section], "sampler": "mixed"}}
    with pytest.raises(UsageError, match="reads no captions"):
        (prompt_stage if stage == "prompt-stage" else finetune).run(run, wrong, data=folder)
    assert run.record(stage) == record


def test_without_cameras_and_roles_the_epoch_is_chosen_by_all_other_images_of_a_person(folder):
    corpus, method = corpus_of(folder), reid()
    corpus.images["camera_id"] = None
    corpus.images["role"] = None
    vectors = embed_gallery_tasks(method, corpus, device=CPU)["i2i"]
    assert finetune._image_to_image(corpus, vectors) is None
    found = finetune._image_to_image(corpus, vectors, always=True)
    people, names = corpus.images["person_id"].to_numpy(), corpus.images["image_id"].to_numpy()
    hits = []
    for row in range(len(people)):
        order = np.argsort(-(vectors @ vectors[row]))
        hits.append(people[next(n for n in order if names[n] != names[row])] == people[row])
    assert found.scored == len(people) and found.means()["rank1"] == pytest.approx(np.mean(hits))


def test_cameras_of_two_datasets_are_different_cameras_when_the_epoch_is_chosen(folder):
    corpus, method = corpus_of(folder), reid()
    corpus.images["role"] = None
    corpus.images["camera_id"] = "c1"
    vectors = embed_gallery_tasks(method, corpus, device=CPU)["i2i"]
    assert not finetune._image_to_image(corpus, vectors).scored
    corpus.images["dataset"] = ["a" if row % 2 else "b" for row in range(len(corpus.images))]
    assert finetune._image_to_image(corpus, vectors).scored


@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
@pytest.mark.parametrize("stride", [17, 500])
def test_a_stride_that_leaves_pixels_unread_is_refused(spec, stride):
    with pytest.raises(UsageError, match=f"stride of {stride} pixels does not fit"):
        build(spec, stride=stride)


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match=r"method\.weights\.id.*grow"):
        reid(weights={"id": -1.0})
