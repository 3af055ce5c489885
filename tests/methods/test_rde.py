"""`rde`: what each embedding reads, which pairs it learns from, and how captions are changed."""

import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from cli.commandline import cli, refused
from conftest import write_dataset
from methods.test_method_contract import model, training_batch

from reidctl import losses, tables
from reidctl.backbones.base import dropping
from reidctl.backbones.weights import build
from reidctl.batch import Batch, Tokens
from reidctl.config import load_recipe, parse_section
from reidctl.errors import UsageError
from reidctl.layers.division import pair_losses
from reidctl.methods.base import build_method, load_method, unit
from reidctl.methods.rde import change_words
from reidctl.parts import join
from reidctl.runs import Run
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer

PLAIN = {"text_augment": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("rde") / "blocks", people=6)


def rde(**changes):
    return model("rde", **changes)


@pytest.fixture(scope="module")
def batch(folder):
    """12 captioned images of 4 people."""
    return training_batch(rde(), folder)


def divided(method, labels):
    """The method after an epoch's division with these labels."""
    method._labels = torch.tensor(labels, dtype=torch.float32)
    return method


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# The two embeddings


def test_the_image_embedding_reads_the_patches_that_the_class_token_looks_at_most(batch):
    method = rde(select_ratio=0.4)
    seen = method.backbone.encode_image(batch.image, attention=True)
    looks = seen.attention[-1].mean(dim=1)[:, 0, 1:]
    chosen = looks.topk(3, dim=1).indices  # int(0.4 * 8)
    picked = torch.stack([seen.patches[row, chosen[row]] for row in range(len(batch))])
    expected = method.tse_image.each(picked).amax(dim=1)
    parts = method.encode(batch, "finetune")
    same(parts["image_tse"], expected)
    same(parts["image"], seen.cls[:, 0])
    assert parts["image_tse"].shape == (12, 32)


@pytest.mark.parametrize(("spec", "read"), [("clip:micro", "end"), ("vit-bert:micro", "start")])
def test_the_text_embedding_reads_the_words_that_the_text_feature_looks_at_most(folder, spec, read):
    torch.manual_seed(0)
    method = build_method("rde", {"width": 32, **PLAIN}, build(spec), 6).eval()
    words = training_batch(method, folder).texts["full"]
    seen = method.backbone.encode_text(words, attention=True)
    expected = []
    for row in range(len(words)):
        end = int(words.mask[row].sum()) - 1
        looks = seen.attention[-1][row].mean(dim=0)[end if read == "end" else 0, 1:end]
        # int(0.3 * (32 - 2)) words of a tower that takes 32 tokens, however long the texts of the batch are.
        chosen = 1 + looks.topk(min(9, len(looks))).indices
        expected.append(method.tse_text.each(seen.tokens[row, chosen][None])[0].amax(dim=0))
    same(method._texts(Batch(texts={"full": words}))[1], torch.stack(expected))


def test_an_image_vector_is_made_of_both_embeddings_and_products_are_mean_cosines(batch):
    method = rde(**PLAIN)
    with torch.no_grad():
        parts = method.encode(batch, "finetune")
        image, text = method.embed_images(batch), method.embed_texts(batch)
    bge = unit(parts["text"]) @ unit(parts["image"]).T
    tse = unit(parts["text_tse"]) @ unit(parts["image_tse"]).T
    same(text @ image.T, (bge + tse) / 2)
    for name, expected in (("bge", bge), ("tse", tse)):
        alone = rde(retrieve=name, **PLAIN)
        same(alone.embed_texts(batch) @ alone.embed_images(batch).T, expected)


def test_bge_alone_needs_no_second_head_and_others_refuse_to_go_without(batch):
    method = rde(weights={"tse": 0.0}, retrieve="bge")
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"backbone"}
    assert set(method.losses(batch, "finetune")) == {"bge"}
    assert set(method.features(batch)) == {"embedding", "bge"} and method.extra_parts(batch) == {}
    assert method.patch_features(batch).shape == (12, 8, 32)
    for name in ("both", "tse"):
        with pytest.raises(UsageError, match=rf"retrieve` is {name}.*never learns"):
            rde(weights={"tse": 0.0}, retrieve=name)


def test_a_text_without_words_and_an_image_without_patches_have_finite_vectors(batch):
    method = rde()
    empty = method.backbone.tokenize(["", "a man in a red coat"])
    vectors = method.embed_texts(Batch(texts={"full": empty}))
    assert torch.isfinite(vectors).all()
    same(vectors[:1], method.embed_texts(Batch(texts={"full": method.backbone.tokenize([""])})))
    with dropping(method.backbone.image, torch.zeros(12, 8, dtype=torch.bool)):
        assert torch.isfinite(method.embed_images(batch)).all()


def test_dropped_patches_are_never_selected(batch):
    method = rde(select_ratio=0.9)
    keep = torch.ones(12, 8, dtype=torch.bool)
    keep[:, ::2] = False
    with dropping(method.backbone.image, keep):
        seen = method.backbone.encode_image(batch.image)
        same(method._images(batch)[1], method.tse_image.each(seen.patches[:, 1::2]).amax(dim=1))


def test_a_patch_and_a_text_meet_by_the_mean_of_their_cosines(batch):
    method = rde(**PLAIN)
    patches = method.backbone.encode_image(batch.image).patches
    words = method.encode(batch, "finetune")
    bge = torch.einsum("bnd,bd->bn", unit(patches), unit(words["text"]))
    tse = torch.einsum("bnd,bd->bn", unit(method.tse_image.each(patches)), unit(words["text_tse"]))
    same(method.patch_similarity(batch), (bge + tse) / 2)


# Losses


@pytest.mark.parametrize("loss", ["tal", "trl", "infonce", "sdm"])
def test_parts_of_a_batch_joined_give_the_losses_and_gradients_of_the_whole(batch, loss):
    method = divided(rde(loss=loss, **PLAIN), [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    whole = method.encode(batch, "finetune")
    halves = join([method.encode(batch.take(rows), "finetune") for rows in (range(5), range(5, 12))])
    assert set(halves) == set(whole)
    for name in whole:
        same(halves[name], whole[name])
    weights = list(method.parameters())
    for name, value in method.losses_of(whole, "finetune").items():
        other = method.losses_of(halves, "finetune")[name]
        same(other, value)
        grads = (torch.autograd.grad(v, weights, retain_graph=True, allow_unused=True) for v in (other, value))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_tal_is_summed_as_published_or_averaged(batch):
    published, summed, mean = (rde(reduction=name, **PLAIN) for name in ("published", "sum", "mean"))
    parts = mean.encode(batch, "finetune")
    expected = losses.tal(parts["image"], parts["text"], batch.person, temperature=0.015, margin=0.1)
    found = {m.config.reduction: m.losses_of(parts, "finetune")["bge"] for m in (published, summed, mean)}
    same(found["mean"], expected)
    same(found["sum"], 12 * expected)
    assert torch.equal(found["published"], found["sum"])
    both = [rde(loss="sdm", reduction=name, **PLAIN).losses_of(parts, "finetune") for name in ("published", "mean")]
    assert torch.equal(both[0]["tse"], both[1]["tse"])
    same(both[0]["bge"], losses.sdm(parts["image"], parts["text"], batch.person, temperature=0.02))


@pytest.mark.parametrize("loss", ["tal", "infonce"])
def test_only_clean_pairs_are_learnt_from(batch, loss):
    labels = [1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1]
    method = divided(rde(loss=loss, **PLAIN), [9] * 5 + labels)
    method._labels[:5] = 0
    moved = replace(batch, sample=torch.arange(5, 17))
    parts = method.encode(moved, "finetune")
    temperature = 0.015 if loss == "tal" else 0.02
    each = pair_losses(parts["image_tse"], parts["text_tse"], batch.person, loss, temperature=temperature)
    kept = each[torch.tensor(labels) > 0]
    same(method.losses_of(parts, "finetune")["tse"], kept.sum() if loss == "tal" else kept.mean())


@pytest.mark.parametrize("loss", ["tal", "trl", "infonce", "sdm"])
def test_a_batch_of_noisy_pairs_alone_is_a_zero_with_a_gradient(batch, loss):
    method = divided(rde(loss=loss).train(), [0] * 12)
    found = method.losses(batch, "finetune")
    assert [value.item() for value in found.values()] == [0, 0]
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_in_training_the_norms_see_all_tokens_of_the_batch_and_move(batch):
    method = rde(**PLAIN).train()
    before = method.tse_image.norm.running_mean.clone()
    with torch.no_grad():
        parts = method.encode(batch, "finetune")
        alone = method.encode(batch.take(range(6)), "finetune")
    assert torch.equal(method.tse_image.norm.running_mean, before), "without gradients nothing moves"
    assert not torch.allclose(parts["image_tse"][:6], alone["image_tse"], atol=1e-4)
    method.encode(batch, "finetune")
    assert not torch.equal(method.tse_image.norm.running_mean, before)


def test_the_quirk_of_training_in_evaluation_mode_keeps_the_first_statistics(batch):
    quirk, plain = rde(eval_norm=True, **PLAIN).train(), rde(**PLAIN)
    assert quirk.training and quirk.tse_image.training and not quirk.tse_image.norm.training
    parts, expected = quirk.encode(batch, "finetune"), plain.encode(batch, "finetune")
    assert torch.equal(parts["text_tse"], expected["text_tse"])
    for norm in (quirk.tse_image.norm, quirk.tse_text.norm):
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    assert plain.train().tse_image.norm.training


# Captions


def test_words_are_hidden_replaced_and_left_out_in_the_published_shares():
    method = rde()
    tokenizer = method.backbone.tokenizer
    ids = torch.full((400, 30), 320)
    ids[:, 0], ids[:, -1] = tokenizer.start_id, tokenizer.end_id
    torch.manual_seed(0)
    found = change_words(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), method.backbone, 0.5)
    words = 400 * 28
    left_out = 400 * 30 - int(found.mask.sum())
    hidden = int((found.ids == tokenizer.mask_id).sum())
    unchanged = int((found.ids == 320).sum())
    other = int(found.mask.sum()) - hidden - unchanged - 800
    for count, share in ((unchanged, 0.5), (hidden, 0.3), (other, 0.1), (left_out, 0.1)):
        assert abs(count / words - share) < 4 * math.sqrt(share * (1 - share) / words)


def test_a_changed_text_closes_up_and_keeps_its_first_and_last_token_and_one_place():
    method = rde()
    tokenizer = method.backbone.tokenizer
    tokens = method.backbone.tokenize(["a man in a red coat", "!", "", "one"])
    torch.manual_seed(1)
    for _ in range(60):
        found = change_words(tokens, method.backbone, 1.0)
        lengths = found.mask.sum(dim=1)
        assert torch.equal(found.mask, torch.arange(found.mask.shape[1])[None] < lengths[:, None])
        assert found.mask.shape[1] == int(lengths.max())
        assert (found.ids[:, 0] == tokenizer.start_id).all()
        assert (found.ids[torch.arange(4), lengths - 1] == tokenizer.end_id).all()
        assert (found.ids[~found.mask] == tokenizer.pad_id).all()
        assert lengths[2] == 2 and lengths[[1, 3]].tolist() == [3, 3] and 3 <= lengths[0] <= 8
    unchanged = change_words(tokens, method.backbone, 0.0)
    assert torch.equal(unchanged.ids, tokens.ids) and torch.equal(unchanged.mask, tokens.mask)


def test_captions_are_changed_before_they_are_encoded_and_only_if_wanted(batch):
    assert rde(**PLAIN).prepare(batch) is batch
    method = rde(text_augment=0.5)
    torch.manual_seed(2)
    prepared = method.prepare(batch)
    torch.manual_seed(2)
    expected = change_words(batch.texts["full"], method.backbone, 0.5)
    assert torch.equal(prepared.texts["full"].ids, expected.ids)
    assert not torch.equal(prepared.texts["full"].ids, batch.texts["full"].ids)
    torch.manual_seed(2)
    found = method.losses(batch, "finetune")
    same(found["bge"], method.losses_of(method.encode(prepared, "finetune"), "finetune")["bge"])


# Division


def test_before_an_epoch_the_losses_of_all_pairs_divide_them(batch):
    method = rde(**PLAIN)
    assert method.surveys and not rde(division={"enabled": False}).surveys
    parts = method.encode(batch, "finetune")
    looked = {}

    def survey(look):
        looked.update(look(batch))
        # 200 further samples, far apart in both views, and one that no batch held.
        planted = torch.cat([torch.full((140,), 1.0), torch.full((60,), 90.0), torch.tensor([math.nan])])
        return {name: torch.cat([value, planted + torch.rand(201)]) for name, value in looked.items()}

    torch.manual_seed(0)
    method.begin_epoch(2, survey)
    for name, end in (("bge", ""), ("tse", "_tse")):
        expected = pair_losses(parts[f"image{end}"], parts[f"text{end}"], batch.person, "tal")
        same(looked[name], expected)
    labels = method.training_state()["labels"]
    assert len(labels) == 213 and (labels[12:152] == 1).all() and (labels[152:212] == 0).all()
    report = method.training_report()
    assert report["division/noisy"] == pytest.approx(60 / 212) and report["division/uncertain"] == 0
    later = replace(batch, sample=torch.arange(150, 162))
    assert method.encode(later, "finetune")["clean"].tolist() == [1, 1] + [0] * 10


def test_towers_that_start_from_nothing_may_learn_from_all_pairs_first(batch):
    method = rde(division={"start": 3})
    asked = []

    def survey(look):
        asked.append(look)
        return look(batch)

    for epoch in range(3):
        method.begin_epoch(epoch, survey)
    assert not asked and method.training_state() == {} and method.training_report() == {}
    method.begin_epoch(3, survey)
    assert len(asked) == 1 and len(method.training_state()["labels"]) == 12


def test_labels_survive_in_the_state_and_are_no_part_of_the_model(batch):
    method = divided(rde(), [0, 1] * 6)
    method._report = {"division/clean": 0.5}
    back = rde()
    back.load_training_state(method.training_state())
    assert torch.equal(back.encode(batch, "finetune")["clean"], torch.tensor([0.0, 1.0] * 6))
    assert back.training_report() == {"division/clean": 0.5}
    assert not [name for name in method.state_dict() if "label" in name]
    fresh = rde()
    fresh.load_training_state(fresh.training_state())
    assert (fresh.encode(replace(batch, sample=None), "finetune")["clean"] == 1).all()
    with pytest.raises(ValueError, match="no `sample`"):
        method.encode(replace(batch, sample=None), "finetune")


RANK = """
    import json, torch
    from methods.test_method_contract import model
    from reidctl.evaluation.efficiency import example_batch
    from reidctl.parallel import joined, place
    with joined("cpu"):
        torch.set_num_threads(1)
        method = model("rde", text_augment=0.0)
        batch = example_batch(method, 10, text_length=9)
        rows = [range(0, 6), range(6, 10)][place().rank] if place().world > 1 else range(10)
        with torch.no_grad():
            print(json.dumps({name: value.tolist() for name, value in method._look(batch.take(rows)).items()}))
"""


def test_two_processes_see_the_losses_that_one_sees():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    common = os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = []
    for env in (*places, {}):
        env = common | ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env} if env else {})
        command = [sys.executable, "-c", textwrap.dedent(RANK)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    first, second, alone = (json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in processes)
    for name in ("bge", "tse"):
        same(torch.tensor(first[name] + second[name]), torch.tensor(alone[name]))


# Recipes and commands


def test_the_published_recipe_gives_the_token_selection_its_own_rate_biases_too():
    config = parse_section(TrainConfig, load_recipe("rde")["train"], "train")
    method = rde()
    optimizer = build_optimizer(method, "finetune", config)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            bias = name.endswith("bias")
            expected = 1e-3 if name.startswith("tse_") else 2e-5 if bias else 1e-5
            assert group["base_lr"] == pytest.approx(expected), name
            assert group["weight_decay"] == (0.0 if bias else 4e-5), name
    assert (config.epochs, config.batch, config.eps, config.warmup_epochs) == (60, 64, 1e-3, 5)


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", 0), ("select_ratio", 0), ("width", 7), ("text_augment", 2), ("loss", "itc")]
)
def test_a_setting_that_makes_no_sense_is_refused(setting, value):
    with pytest.raises(UsageError, match=setting):
        rde(**{setting: value})


SMALL = (
    "--method", "rde-tiny", "--device", "cpu", "--set", "backbone.spec=clip:micro", "--set", "train.epochs=1", "--set",
    "train.batch=8", "--set", "train.instances=2", "--set", "method.width=32", "--set", "method.division.start=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run with a rendered dataset."""
    path = tmp_path_factory.mktemp("rde-run") / "run"
    made = cli("data", "synth", "--run", path, "--people", "12", "--images-per-person", "3", "--size", "64x32",
               "--workers", "1")  # fmt: skip
    assert made.code == 0, made.err
    return path


def test_the_chain_of_commands_runs_from_pictures_to_metrics(pictures):
    run = ("--run", pictures, "--json")
    trained = cli("finetune", *run, *SMALL)
    assert trained.code == 0 and trained.json["method"] == "rde", trained.err
    rows = tables.read_table(Run(pictures).table("finetune", "history"), "history")
    last = rows[rows["split"] == "train"].groupby("name")["value"].last()
    shares = [last[f"division/{name}"] for name in ("clean", "noisy", "uncertain")]
    assert sum(shares) == pytest.approx(1) and last["division/clean"] <= last["division/used"] <= 1
    assert {"loss/bge", "loss/tse"} <= set(last.index)
    method = load_method(Run(pictures).stage_dir("finetune"))
    assert method.config.width == 32 and (method.tse_image.norm.running_mean != 0).any()
    measured = cli("evaluate", *run, "--device", "cpu")
    assert measured.code == 0 and 0 < measured.json["metrics"]["t2i"]["mAP"] <= 1, measured.err
    assert cli("finetune", *run, *SMALL).json["status"] == "up-to-date"


@pytest.mark.parametrize("more", ["train.accumulate=2", "method.division.enabled=false"])
def test_other_trainings_run(pictures, tmp_path, more):
    found = cli("finetune", "--run", tmp_path / "run", "--data", pictures / "data", "--json", *SMALL, "--set", more)
    assert found.code == 0 and 0 < found.json["metrics"]["val.rank1"] <= 1, found.err
    rows = tables.read_table(Run(tmp_path / "run").table("finetune", "history"), "history")
    assert ("division/clean" in set(rows["name"])) == (more != "method.division.enabled=false")


def test_an_embedding_that_would_not_learn_is_refused_by_the_command(pictures, tmp_path):
    refused(2, "never learns", "method.retrieve=bge", args=("finetune", "--run", tmp_path / "run", "--data",
            pictures / "data", *SMALL, "--set", "method.weights.tse=0"))  # fmt: skip
