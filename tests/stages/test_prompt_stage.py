"""`prompt-stage`, and what `finetune` and `evaluate` make of it: a tiny HPL on captioned and caption-free people."""

import json
import shutil

import numpy as np
import pytest
import torch
from cli.commandline import cli, refused
from conftest import corpus_of, without_captions, write_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import build_method, load_method
from reidctl.methods.hpl import Hpl
from reidctl.pixels import PixelStore, image_batches
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.runs import Run
from reidctl.stages import building, evaluate, finetune, prompt_stage
from reidctl.training.loop import Trainer

LOOP = {
    "batch": 4, "batch_images": 4, "instances": 2, "sampler": "mixed", "device": "cpu", "workers": 0, "log_every": 1,
    "augment": {"flip": 0, "pad": 0, "erase": 0},
}  # fmt: skip
RECIPE = {
    # A copied second token ranks like the first one after so few steps.
    "method": {
        "name": "hpl",
        "inversion": {"layers": 1, "heads": 2},
        "n_id_tokens": 2,
        "n_inst_tokens": 2,
        "trt": {"init": "random"},
    },
    "backbone": {"spec": "clip:micro"},
    "prompt": {**LOOP, "epochs": 2, "lr_new": 1e-3, "cache": "fp32"},
    "train": {**LOOP, "epochs": 1, "lr": 1e-3, "warmup_epochs": 0},
}
SPLITS = {6: "val", 7: "val", **dict.fromkeys(range(8, 16), "test")}
HANDED = {"id_tokens", "invert_image", "invert_text", "second_token"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """People 0-2 train with captions, 3-5 without; 6 and 7 validate, the others test."""
    folder = tmp_path_factory.mktemp("stage") / "blocks"
    return without_captions(write_dataset(folder, people=16, splits=SPLITS), {3, 4, 5})


def changed(**sections):
    """The recipe with settings changed: `prompt={...}`, `method={...}`, `train={...}`, `seed=1`."""
    return RECIPE | {
        name: {**RECIPE.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }


def learn(run, data, force=False, **sections):
    return prompt_stage.run(run, changed(**sections), data=data, device="cpu", force=force)


def train(run, data, force=False, **sections):
    return finetune.run(run, changed(**sections), data=data, device="cpu", force=force)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, data):
    """A run with a finished prompt stage, and its record. Nobody may change it."""
    run = Run(tmp_path_factory.mktemp("learnt") / "run")
    return run, learn(run, data)


@pytest.fixture
def run(learnt, tmp_path):
    """A copy of it."""
    shutil.copytree(learnt[0].path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def trained(learnt, data, tmp_path_factory):
    """A run with both stages, and the record of the second. Nobody may change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(learnt[0].path, folder)
    return Run(folder), train(Run(folder), data)


def handed(run):
    return load_file(prompt_stage.prompts_file(run))


def untrained(data, **sections):
    checked = building.check(building.resolve(changed(**sections), None))
    corpus = corpus_of(data).of_split("train")
    return building.build_model(corpus, checked, checked.prompts, sections.get("seed", 0))


def history(run, stage="prompt-stage"):
    return tables.read_table(run.table(stage, "history"), "history")


def first_losses(run):
    rows = history(run)
    rows = rows[(rows["step"] == 0) & rows["name"].str.startswith("loss/")]
    return dict(zip(rows["name"], rows["value"], strict=True))


# The stage


def test_the_stage_leaves_prompts_for_every_training_person_and_a_record(learnt):
    run, record = learnt
    assert record["status"] == "done" and record["people"] == 6 and record["epochs"] == 2
    assert set(record["metrics"]) == {"loss/ic", "loss/proto_t2i", "loss/proto_i2t"}
    assert sorted(record["outputs"]) == [
        "prompt-stage/history.parquet", "prompt-stage/prompts.parquet", "prompt-stage/prompts.safetensors",
    ]  # fmt: skip
    assert record["training_seconds"] > 0 and record["encoding_seconds"] > 0
    assert record["parameters"] == sum(value.numel() for value in handed(run).values())
    assert not (run.stage_dir("prompt-stage") / "frozen").exists()


@pytest.mark.covers(66)
def test_the_table_of_prompts_holds_every_vector_of_every_person(learnt):
    run, _ = learnt
    table = tables.read_table(run.table("prompt-stage", "prompts"), "prompts")
    tokens = handed(run)["id_tokens"]
    assert tokens.shape == (6, 2, 32) and len(table) == 12
    assert set(table["scope"]) == {"person"}
    assert sorted(set(table["key"])) == [f"blocks:{person}" for person in range(6)]
    for row in table.itertuples():
        expected = tokens[int(row.key.removeprefix("blocks:")), row.position].numpy()
        assert np.array_equal(np.asarray(row.vector, np.float32), expected)


@pytest.mark.covers(74)
def test_encoders_end_as_they_began_and_the_named_modules_alone_change(data, tmp_path, monkeypatch):
    ended, write = {}, prompt_stage._write
    monkeypatch.setattr(
        prompt_stage, "_write", lambda run, model, *rest: ended.update(model.state_dict()) or write(run, model, *rest)
    )
    learn(Run(tmp_path / "run"), data, prompt={"cache": "off", "epochs": 1})
    began = untrained(data).state_dict()
    assert ended.keys() == began.keys()
    moved = {name for name in began if not torch.equal(began[name], ended[name])}
    assert {name.partition(".")[0] for name in moved} == HANDED - {"second_token"}
    # What is handed over is what the model ended with.
    kept = handed(Run(tmp_path / "run"))
    assert {name.partition(".")[0] for name in kept} == HANDED
    assert all(torch.equal(value, ended[name]) for name, value in kept.items())


@pytest.mark.covers(74)
def test_a_stage_that_changed_an_encoder_is_a_bug_that_stops_it(data, tmp_path, monkeypatch):
    trainer = Trainer.run

    def careless(self):
        outcome = trainer(self)
        with torch.no_grad():
            next(self.method.backbone.text.parameters()).add_(1e-3)
        return outcome

    monkeypatch.setattr(Trainer, "run", careless)
    run = Run(tmp_path / "run")
    with pytest.raises(RuntimeError, match="frozen encoder changed"):
        learn(run, data, prompt={"epochs": 0})
    assert run.record("prompt-stage") is None


@pytest.mark.covers(72)
def test_inversion_consistency_falls_while_the_stage_runs(data, tmp_path):
    run = Run(tmp_path / "run")
    learn(run, data, prompt={"epochs": 8, "lr_new": 1e-2, "gamma": 1.0})
    rows = history(run)
    ic = rows[rows["name"] == "loss/ic"].groupby("epoch")["value"].mean()
    assert len(ic) == 8 and ic.iloc[-1] < 0.7 * ic.iloc[0]


@pytest.mark.covers(75)
def test_the_learning_rate_falls_by_its_factor_after_every_epoch(learnt):
    rows = history(learnt[0])
    rates = rows[rows["name"] == "lr"].groupby("epoch")["value"].agg(["min", "max"])
    assert rates.to_numpy() == pytest.approx(np.array([[0.02, 0.02], [0.016, 0.016]]))


@pytest.mark.covers(72)
def test_kept_features_give_the_first_losses_of_encoders_that_run_at_every_step(data, tmp_path):
    found = {}
    for cache in ("off", "fp32", "fp16"):
        run = Run(tmp_path / cache)
        learn(run, data, prompt={"cache": cache, "epochs": 1})
        found[cache] = first_losses(run)
    assert found["fp32"] == pytest.approx(found["off"], abs=1e-5)
    assert found["fp16"] == pytest.approx(found["off"], abs=2e-2)
    assert len(found["off"]) == 3


class Killed(Exception):
    pass


@pytest.mark.parametrize("cache", ["fp32", "off"])
def test_a_killed_stage_goes_on_after_its_last_whole_epoch_and_ends_bit_equal(data, tmp_path, monkeypatch, cache):
    settings = {"epochs": 2, "cache": cache, "augment": {"flip": 0.5, "pad": 2, "erase": 0.5}}
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    learn(whole, data, prompt=settings)
    epoch = Trainer._epoch

    def dies(self, plan, advance):
        if plan.epoch == 1:
            raise Killed
        epoch(self, plan, advance)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", dies)
        with pytest.raises(Killed):
            learn(broken, data, prompt=settings)
    assert broken.record("prompt-stage") is None
    assert (broken.stage_dir("prompt-stage") / "frozen" / "images.json").is_file() == (cache == "fp32")
    encoded = []
    if cache == "fp32":
        monkeypatch.setattr(Hpl, "frozen_features", lambda self, batch: encoded.append(batch))
    record = learn(broken, data, prompt=settings)
    assert record["resumed_from_epoch"] == 1 and not encoded
    assert prompt_stage.prompts_file(whole).read_bytes() == prompt_stage.prompts_file(broken).read_bytes()
    assert not (broken.stage_dir("prompt-stage") / "frozen").exists()


def test_the_same_settings_are_up_to_date_and_others_or_force_learn_again(run, data):
    assert learn(run, data)["status"] == "up-to-date"
    # What only `finetune` reads does not matter.
    assert learn(run, data, train={"epochs": 7}, method={"lambda1": 0.7})["status"] == "up-to-date"
    before = prompt_stage.prompts_file(run).read_bytes()
    assert learn(run, data, force=True)["status"] == "done"
    assert prompt_stage.prompts_file(run).read_bytes() == before
    assert learn(run, data, method={"tau_prompt": 0.5})["status"] == "done"
    assert prompt_stage.prompts_file(run).read_bytes() != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "plain"}, "learns nothing in a prompt stage"),
        ({"prompts": "none"}, "learns nothing in a prompt stage"),
        ({"two_stage": False}, "learns nothing in a prompt stage"),
    ],
)
def test_settings_without_anything_to_learn_are_refused(data, tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        learn(Run(tmp_path / "run"), data, method=change)
    assert not (tmp_path / "run" / "prompt-stage").exists()


def test_a_stage_of_no_epochs_hands_over_what_it_began_with(data, tmp_path):
    run = Run(tmp_path / "run")
    record = learn(run, data, prompt={"epochs": 0})
    assert record["metrics"] == {}
    state = untrained(data).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in handed(run).items())


# The hand-over


@pytest.mark.covers(82)
def test_finetune_begins_with_what_the_stage_learnt(run, data):
    # Another seed: other starting networks, and another second class token than the prompts were learnt beside.
    for seed in (0, 1):
        train(run, data, train={"epochs": 0}, seed=seed, force=True)
        state = load_method(run.stage_dir("finetune")).state_dict()
        kept = handed(run)
        assert {name.partition(".")[0] for name in kept} == HANDED
        assert all(torch.equal(state[name], value) for name, value in kept.items())
        assert not torch.equal(untrained(data, seed=seed).id_tokens, kept["id_tokens"])


@pytest.mark.covers(82)
def test_finetune_refuses_to_start_without_the_stage_and_says_the_three_ways_on(data, tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(DataError, match=r"no finished prompt stage.*prompt-stage --method hpl.*prompt\.use.*two_stage"):
        train(run, data)
    assert run.record("finetune") is None


@pytest.mark.covers(82)
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": {"template": "A photo of a {id} and {inst} person"}}, "template"),
        ({"method": {"tau_prompt": 1.0}}, "tau_prompt"),
        ({"method": {"weights": {"ic": 2.0}}}, r"weights\.ic"),
        ({"method": {"trt": {"init": "random", "isolation": "full"}}}, r"trt\.(init|isolation)"),
        ({"method": {"inversion": {"layers": 2, "heads": 2}}}, r"inversion\.layers"),
        ({"method": {"train_tasks": ("i2i",)}, "train": {"sampler": "identity"}}, "texts"),
        ({"backbone": {"text_length": 24}}, "text_length"),
    ],
)
def test_finetune_refuses_a_stage_with_other_settings_by_name(run, data, sections, said):
    with pytest.raises(DataError, match=rf"other settings: `(method|backbone)\.{said}`"):
        train(run, data, **sections)


@pytest.mark.covers(82)
def test_settings_that_the_stage_does_not_read_may_change(run, data):
    record = train(run, data, method={"lambda1": 0.0, "cmpr": False, "weights": {"cic": 0.5}}, train={"epochs": 0})
    assert record["status"] == "done"


@pytest.mark.covers(82)
def test_finetune_refuses_the_prompts_of_other_people_and_a_damaged_file(run, data, tmp_path):
    others = write_dataset(tmp_path / "others", people=17, splits={**SPLITS, 16: "train"})
    with pytest.raises(DataError, match="learnt on other images or captions"):
        train(run, without_captions(others, {3, 4, 5}))
    with pytest.raises(DataError, match="other training people"):
        prompt_stage.hand_over(run, build_method("hpl", {}, build("clip:micro"), 3), ["a", "b", "c"])
    path = prompt_stage.prompts_file(run)
    state = handed(run)
    save_file({name: value for name, value in state.items() if name != "id_tokens"}, path)
    with pytest.raises(DataError, match="lacks `id_tokens`"):
        train(run, data)
    save_file({**state, "id_tokens": state["id_tokens"][:3].contiguous()}, path)
    with pytest.raises(DataError, match="damaged"):
        train(run, data)
    path.write_bytes(b"not a tensor")
    with pytest.raises(DataError, match="damaged"):
        train(run, data)


@pytest.mark.covers(82)
def test_finetune_refuses_prompts_that_were_learnt_on_other_starting_weights(run, trained, data):
    start = {"backbone": {"start": str(trained[0].path)}}
    with pytest.raises(DataError, match="started from other weights"):
        train(run, data, **start)
    learn(run, data, **start)
    assert train(run, data, train={"epochs": 0}, **start)["status"] == "done"
    with pytest.raises(DataError, match="started from other weights"):
        train(run, data)


@pytest.mark.covers(82)
def test_another_run_s_prompts_may_be_used_and_new_prompts_train_again(learnt, run, data, tmp_path):
    own = Run(tmp_path / "second")
    section = {"prompt": {"use": str(run.path)}}
    record = train(own, data, train={"epochs": 0}, **section)
    assert record["prompts"]["run"] == str(run.path.resolve())
    assert own.record("prompt-stage") is None
    tokens = load_method(own.stage_dir("finetune")).id_tokens
    assert torch.equal(tokens, handed(learnt[0])["id_tokens"])
    assert train(own, data, train={"epochs": 0}, **section)["status"] == "up-to-date"
    learn(run, data, seed=3)
    assert train(own, data, train={"epochs": 0}, **section)["status"] == "done"
    with pytest.raises(DataError, match="no finished prompt stage"):
        train(own, data, prompt={"use": str(tmp_path / "nothing")})


@pytest.mark.covers(82, 109, 110)
@pytest.mark.parametrize("method", [{"two_stage": False}, {"prompts": "none"}, {"prompts": "plain"}])
def test_what_needs_no_prompt_stage_trains_without_one(data, tmp_path, method):
    run = Run(tmp_path / "run")
    record = train(run, data, method=method)
    assert record["status"] == "done" and record["prompts"] is None
    names = {name for name in history(run, "finetune")["name"] if name.startswith("loss/")}
    assert ("loss/ic" in names) == ("two_stage" in method) and ("loss/cic" in names) == (method != {"prompts": "none"})
    if "two_stage" in method:
        trained = load_method(run.stage_dir("finetune")).state_dict()
        began = untrained(data, method=method).state_dict()
        assert not torch.equal(trained["id_tokens"], began["id_tokens"])
        assert all(torch.equal(trained[name], began[name]) for name in began if name.startswith("prompt_text."))


@pytest.mark.covers(85)
def test_a_model_of_image_to_image_alone_runs_through_both_stages(data, tmp_path):
    run = Run(tmp_path / "run")
    settings = {
        "method": {"train_tasks": ("i2i",)}, "prompt": {"sampler": "identity"}, "train": {"sampler": "identity"},
    }  # fmt: skip
    learn(run, data, **settings)
    record = train(run, data, **settings)
    names = {name.removeprefix("loss/") for name in history(run, "finetune")["name"] if name.startswith("loss/")}
    assert record["status"] == "done" and names == {"triplet", "id_i2i", "cic"}


# Stage II


@pytest.mark.covers(80, 109)
def test_the_record_holds_the_weights_the_seconds_of_both_stages_and_where_the_prompts_came_from(trained, learnt):
    run, record = trained
    method = record["settings"]["method"]
    assert (method["lambda1"], method["lambda2"]) == (0.4, 0.06)
    assert record["training_seconds"] > 0
    first = learnt[1]
    assert record["prompts"]["run"] == str(run.path.resolve())
    assert record["prompts"]["training_seconds"] == first["training_seconds"] > 0
    assert record["prompts"]["seconds"] == first["seconds"] >= first["training_seconds"]
    assert record["settings"]["backbone"]["spec"] == "clip:micro"
    assert isinstance(record["alarms"], list)
    weights = history(run, "finetune").query("name.str.startswith('weight/')").groupby("name")["value"].first()
    assert (weights["weight/tgps"], weights["weight/vgps"], weights["weight/cmpr"]) == (0.4, 0.4, 0.06)


@pytest.mark.covers(64)
def test_the_history_has_the_angle_between_the_tasks_and_the_state_of_the_pseudo_words(trained):
    rows = history(trained[0], "finetune")
    found = rows[rows["split"] == "train"].groupby("name")["value"]
    for name, low in (("task_cosine", -1), ("pseudo/diversity", 0), ("pseudo/mismatch", 0)):
        values = found.get_group(name)
        assert len(values) and values.between(low, 2).all(), name


@pytest.mark.covers(81)
def test_stage_two_leaves_identity_tokens_and_the_prompt_encoder_and_trains_the_encoders(trained, data):
    run, _ = trained
    state, began = load_method(run.stage_dir("finetune")).state_dict(), untrained(data).state_dict()
    began |= handed(run)
    moved = {name for name in began if not torch.equal(began[name], state[name])}
    parts = {".".join(name.split(".")[:2]) if name.startswith("backbone") else name.split(".")[0] for name in moved}
    expected = {
        "backbone.image", "backbone.text", "second_token", "classifier", "neck", "invert_image", "invert_text",
    }  # fmt: skip
    assert parts == expected


@pytest.mark.covers(108)
def test_frozen_encoders_are_those_of_the_start_after_stage_two(run, data):
    train(run, data, method={"freeze": ("image", "text")})
    state, began = load_method(run.stage_dir("finetune")).state_dict(), untrained(data).state_dict()
    towers = [name for name in began if name.startswith("backbone.")]
    assert towers and all(torch.equal(began[name], state[name]) for name in towers)
    assert not torch.equal(handed(run)["second_token"], state["second_token"])


@pytest.mark.covers(82)
def test_a_killed_stage_two_ends_bit_equal(run, trained, data, tmp_path, monkeypatch):
    settings = {"train": {"epochs": 2}}
    whole = Run(tmp_path / "whole")
    shutil.copytree(run.path, whole.path)
    train(whole, data, **settings)
    epoch = Trainer._epoch

    def dies(self, plan, advance):
        if plan.epoch == 1:
            raise Killed
        epoch(self, plan, advance)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", dies)
        with pytest.raises(Killed):
            train(run, data, **settings)
    assert train(run, data, **settings)["resumed_from_epoch"] == 1
    weights = [each.stage_dir("finetune") / "model.safetensors" for each in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.covers(62, 105)
def test_one_checkpoint_answers_texts_and_images_each_by_its_own_token(trained, data, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(trained[0].path, run.path)
    # Coloured blocks are found by either token; among pictures of noise every ranking is another.
    noise, rng = tmp_path / "noise", np.random.default_rng(0)
    shutil.copytree(data, noise)
    for path in corpus_of(noise).of_split("test").paths():
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(path)
    data = noise
    metrics = evaluate.run(run, device="cpu", data=data)["metrics"]
    found = {task: metrics[task]["mAP"] for task in ("t2i", "i2i")}
    queries = tables.read_table(run.table("evaluate", "queries"), "queries")
    assert {"t2i", "i2i"} <= set(queries["direction"])
    assert found == pytest.approx(by_tokens(run, data, texts=0, images=1), abs=1e-6)
    wrong = by_tokens(run, data, texts=1, images=0)
    assert all(abs(found[task] - wrong[task]) > 1e-3 for task in found)


def by_tokens(run, data, texts, images):
    """mAP of both directions with the image encoder's class tokens of these numbers, from labels and vectors alone."""
    method, corpus = load_method(run.stage_dir("finetune")), corpus_of(data).of_split("test")
    tower = method.backbone
    with torch.no_grad():
        ((_, pixels),) = image_batches(PixelStore(corpus.paths(), tower.image_size), tower.mean, tower.std, batch=99)
        cls = functional.normalize(method.see(pixels).cls, dim=-1).numpy()
        words = tower.encode_text(tower.tokenize([str(text) for text in corpus.captions["text"]])).pooled
        words = functional.normalize(words, dim=-1).numpy()
    people, cameras = corpus.images["person_id"].to_numpy(), corpus.images["camera_id"].to_numpy()
    query = (corpus.images["role"] == "query").to_numpy()
    told = evaluate_ranking(
        words, cls[:, texts], query_person=people[corpus.captions["row"]], gallery_person=people, top=0
    )
    shown = evaluate_ranking(
        cls[query, images], cls[~query, images], query_person=people[query], gallery_person=people[~query],
        query_camera=cameras[query], gallery_camera=cameras[~query], exclude="same_camera", top=0,
    )  # fmt: skip
    return {"t2i": told.queries.means()["mAP"], "i2i": shown.queries.means()["mAP"]}


@pytest.mark.parametrize("change", [{"method": {"prompts": "words"}}, {"backbone": {"spec": "vit-bert:micro"}}, {}])
def test_both_stages_run_in_half_precision(data, tmp_path, change):
    run, narrow = Run(tmp_path / "run"), {"precision": "bf16", "epochs": 1}
    wide = Run(tmp_path / "wide")
    learn(run, data, **change, prompt={**narrow, "cache": "fp16"})
    learn(wide, data, **change, prompt={"epochs": 1})
    expected = first_losses(wide)
    assert first_losses(run) == {name: pytest.approx(value, rel=0.1, abs=0.05) for name, value in expected.items()}
    assert train(run, data, **change, train=narrow)["status"] == "done"


# The command


def sets(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


CLI = (
    "--method", "hpl-tiny",
    *sets(
        "backbone.spec=clip:micro", "method.inversion.layers=1", "method.inversion.heads=2", "prompt.epochs=1",
        "prompt.batch=4", "prompt.batch_images=4", "prompt.instances=2",
    ),
)  # fmt: skip


def test_the_command_prints_its_record_and_the_second_call_is_up_to_date(data, tmp_path):
    asked = ("prompt-stage", "--run", tmp_path / "run", "--data", data, *CLI, "--device", "cpu")
    first = cli(*asked, "--json")
    assert first.code == 0, first.err
    assert first.json["status"] == "done" and first.json["method"] == "hpl" and first.json["people"] == 6
    assert first.json["stage"] == "prompt-stage"
    second = cli(*asked, "--json")
    assert second.json["status"] == "up-to-date"
    assert second.json["outputs"] == first.json["outputs"]
    told = cli(*asked)
    assert told.code == 0 and "prompts of 6 people" in told.out and "ic " in told.out
    stored = json.loads((tmp_path / "run" / "prompt-stage" / "stage.json").read_text())
    assert stored["people_digest"] == first.json["people_digest"]


def test_the_command_refuses_a_method_without_prompts_and_settings_without_any(data, tmp_path):
    where = ("prompt-stage", "--run", tmp_path / "run", "--data", data)
    refused(2, "`irra` has no prompt stage", "hpl", args=(*where, "--method", "irra"))
    refused(2, "learns nothing", "finetune", args=(*where, *CLI, "--set", "method.prompts=plain"))
    refused(2, "prompt", args=(*where, *CLI, "--set", "prompt.cache=fp8"))
    refused(2, "heads", args=(*where, *CLI, "--set", "method.inversion.heads=5"))
    assert not (tmp_path / "run" / "prompt-stage" / "stage.json").exists()
