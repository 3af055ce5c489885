"""`mta-clip` through both stages: what they hand over, what it reduces to, presets, and the command line."""

import shutil

import numpy as np
import pytest
import torch
from cli.commandline import cli
from conftest import corpus_of
from methods.twodatasets import (
    COSINE,
    CPU,
    LOCAL,
    NEITHER,
    READOUTS,
    ROSTER,
    SMALL,
    make,
    same,
    samples_of,
    stirred,
    text_of,
    two_datasets,
)
from safetensors.torch import load_file
from torch.nn import functional

from reidctl import tables
from reidctl.config import load_recipe
from reidctl.data import roster_of
from reidctl.embedding import embed_gallery_tasks
from reidctl.errors import DataError
from reidctl.layers.sga import SgaConfig
from reidctl.methods.base import load_method, save_method
from reidctl.methods.clip_reid import ClipReidConfig
from reidctl.methods.mta_clip import MtaClipConfig
from reidctl.runs import Run
from reidctl.stages import building, finetune, prompt_stage
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.loop import Trainer
from reidctl.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_datasets(tmp_path_factory.mktemp("mta") / "both")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return two_datasets(tmp_path_factory.mktemp("mta") / "single", one=True)


@pytest.fixture(scope="module")
def corpus(data):
    return corpus_of(data).of_split("train")


@pytest.fixture(scope="module")
def samples(corpus):
    return samples_of(corpus)


@pytest.fixture(scope="module")
def mixed(samples):
    """All 32 training images: 14 of a, 18 of b, in an order that mixes them."""
    order = np.random.default_rng(0).permutation(len(samples))
    return samples.collate([samples[(0, int(row), place)] for place, row in enumerate(order)])


LOOP = {
    "batch": 8, "instances": 2, "device": "cpu", "workers": 0, "log_every": 1,
    "augment": {"flip": 0.5, "pad": 2, "erase": 0},
}  # fmt: skip
RECIPE = {
    "method": {"name": "mta-clip", **SMALL},
    "backbone": {"spec": "clip:micro"},
    "prompt": {**LOOP, "sampler": "alternating-random", "epochs": 2, "lr_prompt": 0.02, "cache": "fp32"},
    "train": {**LOOP, "sampler": "alternating", "epochs": 2, "lr": 1e-3, "warmup_epochs": 0, "schedule": "constant"},
}


def changed(**sections):
    return RECIPE | {
        name: {**RECIPE.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }


def both_stages(folder, source, **sections):
    """A run with both stages and their records."""
    run, recipe = Run(folder), changed(**sections)
    first = prompt_stage.run(run, recipe, data=source, device="cpu")
    return run, first, finetune.run(run, recipe, data=source, device="cpu")


def untrained(data, **sections):
    checked = building.check(building.resolve(changed(**sections), None))
    return building.build_model(corpus_of(data).of_split("train"), checked, checked.prompts, 0)


def weights_of(run):
    return load_file(run.stage_dir("finetune") / "model.safetensors")


def equal(one, other):
    """The names that two sets of tensors do not hold alike, bit for bit."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run with both stages over two datasets, and the two records. Nobody may change it."""
    return both_stages(tmp_path_factory.mktemp("trained") / "run", data)


def history(run, stage):
    return tables.read_table(run.table(stage, "history"), "history")


@pytest.mark.covers(205)
def test_stage_one_leaves_encoders_adapter_and_heads_as_they_came_bit_for_bit(data, samples, tmp_path):
    method = untrained(data)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    settings = PromptConfig(**RECIPE["prompt"])
    Trainer(method, samples, None, settings, tmp_path, seed=0, stage="prompt-stage", fingerprint="x").run()
    after = method.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "id_tokens", "context.shared", "context.domain"
    }  # fmt: skip
    assert (method.context.domain - before["context.domain"]).abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.covers(201, 202, 203, 205)
def test_stage_one_hands_over_prompts_of_three_levels_and_writes_them_as_a_table(trained):
    run, first, _ = trained
    handed = load_file(prompt_stage.prompts_file(run))
    assert set(handed) == {"id_tokens", "context.shared", "context.domain"}
    assert first["parameters"] == 4 * 32 * (1 + 2 + 8)
    table = tables.read_table(run.table("prompt-stage", "prompts"), "prompts")
    for scope, keys in (("shared", [""]), ("domain", ["a", "b"]), ("person", [f"blocks:{n}" for n in range(8)])):
        rows = table[table["scope"] == scope]
        assert list(dict.fromkeys(rows["key"])) == keys and list(rows["position"]) == list(range(4)) * len(keys)
        name = {"shared": "context.shared", "domain": "context.domain", "person": "id_tokens"}[scope]
        assert np.array_equal(np.stack(rows["vector"]), handed[name].reshape(-1, 32).numpy())


@pytest.mark.covers(204)
def test_the_history_of_stage_one_has_the_cosine_of_shared_and_dataset_tokens(trained):
    run = trained[0]
    rows = history(run, "prompt-stage")
    cosines = rows[rows["name"] == "hcp/cosine"]["value"]
    assert len(cosines) == (rows["name"] == "loss/con").sum() > 2 and cosines.between(0, 1).all()
    handed = load_file(prompt_stage.prompts_file(run))
    expected = functional.cosine_similarity(
        handed["context.shared"][None, :, None], handed["context.domain"][:, None], dim=-1
    )
    assert cosines.iloc[-1] == pytest.approx(expected.abs().mean().item(), abs=1e-5)
    assert not {"sga/gamma", "sga/local"} & set(rows["name"])
    second = history(run, "finetune")
    assert second[second["name"] == "sga/local"]["value"].between(0, 1).all()
    assert second[second["name"] == "sga/gamma"]["value"].nunique() > 1


@pytest.mark.covers(213)
def test_stage_two_starts_from_stage_one_moves_the_last_block_and_tells_which(trained, data):
    run, _, record = trained
    assert record["trained_blocks"] == [2] and record["domains"] == {"a": 4, "b": 5}
    state, began = load_method(run.stage_dir("finetune")).state_dict(), untrained(data).state_dict()
    handed = load_file(prompt_stage.prompts_file(run))
    assert not any(torch.equal(handed[name], began[name]) for name in handed)
    began |= handed
    moved = {name for name in began if not torch.equal(began[name], state[name])}
    visual = "backbone.image.visual."
    parts = {name.removeprefix(visual) for name in moved if name.startswith("backbone.")}
    assert {name.split(".")[0] for name in parts} == {"transformer", "ln_post", "proj"}
    assert {name.split(".")[2] for name in parts if name.startswith("transformer")} == {"1"}
    others = {name.split(".")[0] for name in moved if not name.startswith("backbone.")}
    assert others == {"sga", "necks"}


@pytest.mark.covers(213)
def test_the_texts_of_stage_two_are_stage_one_s_prompts_of_the_right_dataset(trained, data):
    run = trained[0]
    method = untrained(data)
    prompt_stage.hand_over(run, method, [f"blocks:{n}" for n in range(8)])
    method.begin("finetune")
    handed = load_file(prompt_stage.prompts_file(run))
    assert torch.equal(method.context.domain, handed["context.domain"])
    for domain in (0, 1):
        with torch.no_grad():
            expected = torch.stack([text_of(method, person, domain) for person in LOCAL[domain]])
            wrong = torch.stack([text_of(method, person, 1 - domain) for person in LOCAL[domain]])
        assert same(method.group_texts(domain), expected) and not same(method.group_texts(domain), wrong)


@pytest.mark.covers(213)
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"hcp": {"n_shared": 3}}, r"hcp\.n_shared"),
        ({"hcp": {"enabled": False}}, r"hcp\.enabled"),
        ({"sga": {**SMALL["sga"], "readout": "gap"}}, r"sga\.readout"),
        ({"sga": {"enabled": False}}, r"sga\.readout"),
        ({"weights": {"orth": 0.1}}, r"weights\.orth"),
        ({"n_id_tokens": 3}, "n_id_tokens"),
        ({"heads": "joint", "hcp": {"enabled": False}}, r"(hcp\.enabled|heads)"),
    ],
)
def test_stage_two_refuses_prompts_of_other_settings_and_takes_what_stage_one_does_not_read(
    trained, data, tmp_path, method, said
):
    shutil.copytree(trained[0].path / "prompt-stage", tmp_path / "run" / "prompt-stage")
    run = Run(tmp_path / "run")
    with pytest.raises(DataError, match=rf"other settings: `method\.{said}`"):
        finetune.run(run, changed(method=method), data=data, device="cpu")


@pytest.mark.covers(213)
def test_adapter_weights_and_blocks_may_change_after_stage_one(trained, data, tmp_path):
    shutil.copytree(trained[0].path / "prompt-stage", tmp_path / "run" / "prompt-stage")
    more = {
        "sga": {"groups": 8, "kind": "ema", "gamma_init": 0.0}, "unfreeze_blocks": "all", "weights": {"i2t": 0.5},
    }  # fmt: skip
    record = finetune.run(Run(tmp_path / "run"), changed(method=more, train={"epochs": 1}), data=data, device="cpu")
    assert record["status"] == "done" and record["trained_blocks"] == [1, 2]


# What it reduces to


@pytest.mark.covers(215)
@pytest.mark.parametrize("several", [True, False])
def test_without_prompts_adapter_and_frozen_blocks_losses_and_gradients_are_clip_reid_s(mixed, single, several):
    batch, roster = mixed, ROSTER
    if not several:
        alone = samples_of(corpus_of(single).of_split("train"))
        batch = alone.collate([alone[(0, row, row)] for row in range(len(alone))])
        roster = roster_of(alone.corpus.images)
        assert len(roster.domains) == 1
    one, other = make("clip-reid", roster, **COSINE), make(roster=roster, **NEITHER)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1.0)
    other.load_state_dict(one.state_dict())
    for stage in ("prompt-stage", "finetune"):
        found = []
        for method in (one, other):
            settings = PromptConfig() if stage == "prompt-stage" else TrainConfig()
            build_optimizer(method.train(), stage, settings)
            method.begin(stage)
            losses = method.losses(batch, stage)
            method.zero_grad()
            method.objective(losses).backward()
            found.append((losses, {name: value.grad for name, value in method.named_parameters()}))
        assert list(found[0][0]) == list(found[1][0]) and list(found[0][1]) == list(found[1][1])
        for name, value in found[0][0].items():
            assert torch.equal(value, found[1][0][name]), name
        for name, grad in found[0][1].items():
            assert (grad is None) == (found[1][1][name] is None), name
            assert grad is None or torch.equal(grad, found[1][1][name]), name
        assert sum(grad is not None and bool(grad.any()) for grad in found[0][1].values()) >= 1
    with torch.no_grad():
        vectors = [method.eval().embed_tasks(batch) for method in (one, other)]
    assert all(torch.equal(vectors[0][task], vectors[1][task]) for task in ("t2i", "i2i"))


@pytest.mark.covers(215)
def test_so_reduced_both_stages_leave_clip_reid_s_weights_bit_for_bit_on_two_datasets(data, tmp_path):
    loops = {"prompt": {"sampler": "random"}, "train": {"sampler": "identity"}}
    runs = []
    for name, settings in (("clip-reid", COSINE), ("mta-clip", NEITHER)):
        recipe = {**RECIPE, "method": {"name": name, **settings}}
        recipe |= {section: {**RECIPE[section], **value} for section, value in loops.items()}
        run = Run(tmp_path / name)
        prompt_stage.run(run, recipe, data=data, device="cpu")
        finetune.run(run, recipe, data=data, device="cpu")
        runs.append(run)
    assert not equal(*(load_file(prompt_stage.prompts_file(run)) for run in runs))
    assert not equal(*map(weights_of, runs))


@pytest.fixture(scope="module")
def alternating(single, tmp_path_factory):
    """The recipe for several datasets on one. Nobody may change it."""
    return both_stages(tmp_path_factory.mktemp("one") / "alternating", single)[0]


@pytest.mark.covers(202, 215)
def test_on_one_dataset_the_recipe_for_several_leaves_the_weights_of_a_single_dataset_s(
    alternating, single, trained, tmp_path
):
    loops = {"prompt": {"sampler": "random"}, "train": {"sampler": "identity"}}
    run = both_stages(tmp_path / "run", single, **loops)[0]
    assert not equal(*(load_file(prompt_stage.prompts_file(each)) for each in (alternating, run)))
    assert not equal(weights_of(alternating), weights_of(run))
    # The comparison can fail: another sampler leaves other weights.
    shutil.copytree(run.path / "prompt-stage", tmp_path / "other" / "prompt-stage")
    other = Run(tmp_path / "other")
    finetune.run(other, changed(prompt=loops["prompt"], train={"sampler": "random"}), data=single, device="cpu")
    assert "sga.gamma" in equal(weights_of(other), weights_of(run))


@pytest.mark.covers(214, 215)
def test_on_one_dataset_heads_per_dataset_are_joint_heads(alternating, single, tmp_path):
    run = both_stages(tmp_path / "run", single, method={"heads": "joint"})[0]
    assert not equal(weights_of(alternating), weights_of(run))


# Presets

PRESETS = ("clip-reid", "clip-reid-tiny", "mta-clip", "mta-clip-single", "mta-clip-tiny")


def preset(name, **method):
    """A shipped preset on the smallest towers."""
    asked = {"backbone": {"spec": "clip:micro", "image_size": [64, 32]}}
    return building.check(building.resolve({**asked, **({"method": method} if method else {})}, name))


@pytest.mark.covers(215, 225)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_takes_a_step_of_both_stages(name, corpus, tmp_path):
    # The smallest towers have two blocks, so that four cannot be trained.
    checked = preset(name, **({"unfreeze_blocks": 1} if name in ("mta-clip", "mta-clip-single") else {}))
    assert checked.name == ("clip-reid" if name.startswith("clip-reid") else "mta-clip")
    small = {"epochs": 1, "batch": 8, "instances": 2, "device": "cpu", "workers": 0}
    for stage, section in (("prompt-stage", checked.prompts), ("finetune", checked.training)):
        training = section.replace(**small)
        method = building.build_model(corpus, checked, training, 0)
        samples = building.training_set(corpus, method, training, 0)
        before = {n: value.clone() for n, value in method.named_parameters()}
        trainer = Trainer(method, samples, None, training, tmp_path / stage, seed=0, stage=stage, fingerprint="x")
        found = trainer.run().history
        assert np.isfinite(found["value"]).all()
        assert {n for n, value in method.named_parameters() if not torch.equal(value, before[n])}
        losses = {n.removeprefix("loss/") for n in found["name"] if n.startswith("loss/")}
        assert losses == ({"con"} if stage == "prompt-stage" else {"id", "triplet", "i2t"})


@pytest.mark.covers(215)
def test_where_the_readme_is_silent_the_values_are_clip_reid_s():
    base, several, single = (preset(name) for name in ("clip-reid", "mta-clip", "mta-clip-single"))
    for section in ("training", "prompts"):
        first = getattr(base, section).model_dump()
        assert getattr(single, section).model_dump() == first
        differs = {key for key, value in getattr(several, section).model_dump().items() if value != first[key]}
        assert differs == {"sampler"}
    assert (several.training.sampler, several.prompts.sampler) == ("alternating", "alternating-random")
    assert (base.training.sampler, base.prompts.sampler) == ("identity", "random")
    for made in (several, single):
        assert made.towers == base.towers
        whole, own = base.method.model_dump(), made.method.model_dump()
        assert {name: own[name] for name in whole} == whole
    assert (several.method.hcp.enabled, several.method.sga.enabled, several.method.heads) == (True, True, "per_domain")
    assert (single.method.hcp.enabled, single.method.sga.enabled, single.method.heads) == (False, True, "joint")
    assert several.method.sga == SgaConfig() and several.method.unfreeze_blocks == 4
    raw = load_recipe("mta-clip")
    assert raw["backbone"] == load_recipe("clip-reid")["backbone"]
    assert raw["backbone"]["spec"] == "clip:ViT-B-16/openai" and raw["backbone"]["image_size"] == [256, 128]
    tiny, tiny_base = load_recipe("mta-clip-tiny"), load_recipe("clip-reid-tiny")
    assert {**tiny["train"], "sampler": "identity"} == tiny_base["train"]
    assert {**tiny["prompt"], "sampler": "random"} == tiny_base["prompt"]


@pytest.mark.covers(214, 215)
def test_the_published_numbers_of_clip_reid_are_the_defaults():
    method, checked = make(), preset("mta-clip")
    assert method.current_weights("finetune") == {"id": 0.25, "triplet": 1.0, "i2t": 1.0}
    assert method.current_weights("prompt-stage") == {"con": 1.0}
    plain = MtaClipConfig()
    assert (plain.smoothing, plain.triplet.margin, plain.con.temperature, plain.i2t.normalize) == (0.1, 0.3, 1.0, False)
    assert plain.triplet == ClipReidConfig().triplet and not plain.triplet.squared and not plain.triplet.normalize
    train, prompt = checked.training, checked.prompts
    assert (train.epochs, train.lr, train.batch, train.instances, train.milestones) == (60, 5e-6, 64, 4, (30, 50))
    assert (train.warmup_epochs, train.bias_lr_factor, train.optimizer) == (10, 2.0, "adam")
    assert (prompt.epochs, prompt.lr_prompt, prompt.batch, prompt.weight_decay) == (120, 3.5e-4, 64, 1e-4)
    assert prompt.lr_prompt * prompt.warmup_factor == pytest.approx(1e-5)
    assert prompt.lr_prompt * prompt.final_factor == pytest.approx(1e-6)


# Saved models and the gallery


def test_a_saved_model_keeps_its_datasets_and_every_vector(tmp_path, mixed):
    for readout in READOUTS:
        method = stirred(make(sga={**SMALL["sga"], "readout": readout}))
        save_method(method, tmp_path / readout)
        back = load_method(tmp_path / readout)
        assert back.roster == ROSTER and back.config == method.config
        with torch.no_grad():
            one, two = method.embed_tasks(mixed), back.embed_tasks(mixed)
            assert all(torch.equal(one[task], two[task]) for task in one)
            assert torch.equal(back.group_texts(1), method.group_texts(1))


@pytest.mark.covers(142)
def test_images_of_a_dataset_that_the_model_never_saw_need_no_prompt_and_no_caption(data, trained, tmp_path):
    """Trained on a alone, its roster knows no b."""
    run, _, record = both_stages(tmp_path / "run", data, data={"datasets": ["a"]}, prompt={"epochs": 1})
    method = load_method(run.stage_dir("finetune"))
    assert method.roster.domains == ("a",) and list(record["domains"]) == ["a"]
    for source, model in ((data, method), (data, load_method(trained[0].stage_dir("finetune")))):
        corpus = corpus_of(source).of_split("test")
        unseen = corpus.of_rows(np.flatnonzero(corpus.images["dataset"] == "b"))
        before = embed_gallery_tasks(model, unseen, device=CPU)
        unseen.captions["text"] = ["another text entirely"] * len(unseen.captions)
        unseen.images["dataset"] = "nobody knows"
        unseen.images["camera_id"] = None
        after = embed_gallery_tasks(model, unseen, device=CPU)
        for task in ("t2i", "i2i"):
            assert np.isfinite(before[task]).all() and len(before[task]) == 8
            assert np.array_equal(before[task], after[task]), task
        with torch.no_grad():  # nor do the prompts matter
            for name, value in model.named_parameters():
                if name.startswith(("context.", "id_tokens", "backbone.text.")):
                    value.zero_()
        assert np.array_equal(embed_gallery_tasks(model, unseen, device=CPU)["i2i"], before["i2i"])


# The command line


def sets(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


TINY = (
    "--method", "mta-clip-tiny", "--device", "cpu", "--json",
    *sets(
        "backbone.spec=clip:micro", "prompt.epochs=1", "prompt.batch=16", "train.epochs=1", "train.batch=16",
        "train.select_metric=mAP",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The run of two rendered worlds, and what each command printed."""
    folder = tmp_path_factory.mktemp("worlds")
    run, found = folder / "both", {}
    asked = {
        "synth": ("data", "synth", "--run", folder / "worlds", "--domain", "both", "--people", "24", "--crossing", "4",
                  "--images-per-person", "4", "--size", "64x32", "--workers", "1", "--json"),
        "combine": ("data", "combine", folder / "worlds", "--run", run, "--json"),
        "prompt-stage": ("prompt-stage", "--run", run, *TINY),
        "finetune": ("finetune", "--run", run, *TINY),
        "evaluate": ("evaluate", "--run", run, "--joint", "--device", "cpu", "--json"),
    }  # fmt: skip
    for name, args in asked.items():
        result = cli(*args)
        assert result.code == 0, (name, result.err)
        found[name] = result.json
    return Run(run), found


@pytest.mark.covers(213, 215, 220)
def test_the_commands_train_over_two_worlds_and_give_the_results_of_each(commands):
    run, found = commands
    worlds = ["synthped-a", "synthped-b"]
    assert list(found["finetune"]["domains"]) == worlds and found["finetune"]["trained_blocks"] == [1, 2]
    people = {name: facts["train"]["people"] for name, facts in found["combine"]["by_dataset"].items()}
    assert found["finetune"]["domains"] == people
    assert sum(people.values()) > found["finetune"]["train_people"], "some people are in both"
    assert {f"i2i:{name}" for name in (*worlds, "joint")} <= set(found["evaluate"]["tables"])
    frame = tables.read_table(run.table("evaluate", "metrics"), "metrics")
    rows = frame[(frame["direction"] == "i2i") & (frame["condition"] == "standard") & (frame["metric"] == "mAP")]
    assert sorted(rows["dataset"]) == ["joint", *worlds] and rows["value"].between(0, 1).all()


@pytest.mark.covers(201, 202, 203)
def test_the_table_of_prompts_of_two_worlds_has_the_three_scopes(commands):
    run, found = commands
    table = tables.read_table(run.table("prompt-stage", "prompts"), "prompts")
    keys = {scope: list(dict.fromkeys(part["key"])) for scope, part in table.groupby("scope", observed=True)}
    assert keys["shared"] == [""] and keys["domain"] == ["synthped-a", "synthped-b"]
    assert len(keys["person"]) == found["prompt-stage"]["people"] and set(keys) == {"shared", "domain", "person"}
    vectors = np.stack(table["vector"])
    assert vectors.shape == (4 * (1 + 2 + len(keys["person"])), 32) and np.isfinite(vectors).all()


def test_the_model_of_two_worlds_comes_back_with_its_roster_and_trains_batches_of_one(commands):
    run, found = commands
    method = load_method(run.stage_dir("finetune"))
    images = tables.read_table(run.stage_dir("data") / "images.parquet", "images")
    assert method.roster == roster_of(images[images["split"] == "train"])
    assert {name: len(people) for name, people in zip(method.roster.domains, method.roster.people, strict=True)} == (
        found["finetune"]["domains"]
    )
    assert set(method.roster.people[0]) & set(method.roster.people[1])
    again = cli("prompt-stage", "--run", run.path, *TINY)
    assert again.json["status"] == "up-to-date"
