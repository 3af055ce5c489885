"""Training on several processes: the loop, its files, and how it goes on with another number of them."""

import json

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import SETTINGS
from safetensors.torch import load_file
from training.ranks import in_processes

from reidctl import parallel
from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.data import TrainingSet
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import UsageError
from reidctl.methods.base import build_method
from reidctl.training.config import TrainConfig
from reidctl.training.loop import Trainer
from reidctl.training.step import Step

# A large epsilon keeps Adam from blowing rounding of small gradients up.
SMALL = TrainConfig(epochs=2, batch=8, instances=2, lr=1e-3, eps=1e-2, warmup_epochs=0, device="cpu", log_every=1)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("devices") / "blocks", people=8)


def trainer(blocks, folder, config, name="clip", **settings):
    torch.manual_seed(0)
    spec, base = SETTINGS[name]
    corpus = corpus_of(blocks)
    tower = build(spec)
    method = build_method(name, {**base, **settings}, tower, 8)
    samples = TrainingSet(
        corpus, size=tower.image_size, mean=tower.mean, std=tower.std, tokenize=tower.tokenize,
        texts=method.train_texts, target=method.target_text, augment=AugmentConfig(),
    )  # fmt: skip
    return Trainer(
        method, samples, lambda m: measured(m, corpus), config, folder, seed=0, stage="finetune", fingerprint="f"
    )


def measured(method, corpus):
    cpu = torch.device("cpu")
    gallery = embed_gallery(method, corpus, device=cpu, batch=4)
    queries = embed_queries(method, list(corpus.captions["text"]), device=cpu, batch=4)
    return {"rank1": float((queries @ gallery.T).max()), "mAP": float(np.abs(gallery).sum())}


def trained(rank, blocks, folder, config, name="clip", **settings):
    outcome = (one := trainer(blocks, folder, config, name, **settings)).run()
    weights = {key: value.numpy().copy() for key, value in one.method.state_dict().items()}
    return weights, outcome.history[["name", "split", "step", "value"]].to_dict("list"), outcome.resumed_from


def near(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(found[name], value, atol=tolerance, rtol=1e-4), (name, np.abs(found[name] - value).max())


@pytest.fixture(scope="module")
def alone(blocks, tmp_path_factory):
    return trained(0, blocks, tmp_path_factory.mktemp("alone"), SMALL)


@pytest.mark.parametrize(
    "config",
    [SMALL, SMALL.replace(parallel="fsdp"), SMALL.replace(accumulate=2)],
    ids=["ddp", "fsdp", "passes"],
)
def test_two_processes_train_the_model_of_one(blocks, tmp_path, alone, config):
    first, second = in_processes(trained, blocks, tmp_path, config)
    near(first[0], alone[0])
    for name, value in first[0].items():
        assert np.array_equal(value, second[0][name]), name
    kept = {path.name for path in (tmp_path / "last").iterdir()}
    assert kept == {"state.pt", *(path for path in kept if path.startswith("best-"))} and len(kept) == 2
    picked = [
        [
            value
            for name, value in zip(run[1]["name"], run[1]["value"], strict=True)
            if name in ("total", "rank1", "mAP")
        ]
        for run in (first, alone)
    ]
    assert picked[0] == pytest.approx(picked[1], rel=1e-4)


def test_an_average_is_kept_of_parameters_that_are_shared_out(blocks, tmp_path):
    config = SMALL.replace(ema=0.7, keep_epochs=True)
    expected = trained(0, blocks, tmp_path / "alone", config)
    found = in_processes(trained, blocks, tmp_path / "fsdp", config.replace(parallel="fsdp"))
    near(found[0][0], expected[0])
    for epoch in (1, 2):
        files = [tmp_path / kind / "epochs" / f"epoch-{epoch:03d}.safetensors" for kind in ("alone", "fsdp")]
        near(*[{name: value.numpy() for name, value in load_file(file).items()} for file in reversed(files)])


def test_nothing_to_train_is_validated_on_parameters_that_are_shared_out(blocks, tmp_path):
    found = in_processes(trained, blocks, tmp_path, SMALL.replace(epochs=0, parallel="fsdp"))
    near(found[0][0], trained(0, blocks, tmp_path, SMALL.replace(epochs=0))[0])


def _refusals(rank, blocks, config, name, settings):
    try:
        trainer(blocks, None, config, name, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [("clip", {"accumulate": 2}, "does not work with train.accumulate"), ("bdam", {}, "balances its losses")],
)
def test_what_cannot_be_shared_out_is_refused(blocks, name, change, said):
    found = in_processes(_refusals, blocks, SMALL.replace(parallel="fsdp", **change), name, {})
    assert all(text.startswith("UsageError") and said in text for text in found)


def _killed(rank, blocks, folder, config):
    """Train one epoch and stop, as if killed."""
    one = trainer(blocks, folder, config)
    epoch = one._epoch

    def stop(plan, advance):
        if plan.epoch == 1:
            raise KeyboardInterrupt
        epoch(plan, advance)

    one._epoch = stop
    try:
        one.run()
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize(("before", "after"), [("ddp", "alone"), ("alone", "ddp"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_a_training_goes_on_with_another_number_of_devices_and_says_so(blocks, tmp_path, alone, before, after, caplog):
    def go(function, kind):
        config = SMALL.replace(parallel="fsdp") if kind == "fsdp" else SMALL
        if kind == "alone":
            return [function(0, blocks, tmp_path, config)]
        return in_processes(function, blocks, tmp_path, config)

    assert all(go(_killed, before))
    with caplog.at_level("INFO", "reidctl"):
        found = go(trained, after)
    assert found[0][2] == 1
    near(found[0][0], alone[0])
    if after == "alone":
        assert "ran on 2 device(s) so far and goes on with 1" in caplog.text


def _shares(rank, blocks):
    one = trainer(blocks, None, SMALL)
    plan = one.feed.plan(0)
    batches = [(batch.image_id, batch.image.numpy().copy()) for batch in one.feed.load(plan)]
    return [names for names, _ in batches], [pixels for _, pixels in batches]


def test_processes_load_the_parts_of_each_batch_with_the_same_pixels(blocks):
    whole = _shares(0, blocks)
    parts = in_processes(_shares, blocks)
    for number, names in enumerate(whole[0]):
        assert [name for part in parts for name in part[0][number]] == list(names)
        assert np.array_equal(np.concatenate([part[1][number] for part in parts]), whole[1][number])


def _embedded(rank, blocks):
    one = trainer(blocks, None, SMALL)
    corpus = corpus_of(blocks)
    cpu = torch.device("cpu")
    seen = []
    embed = one.method.embed_tasks
    one.method.embed_tasks = lambda batch: (seen.append(len(batch)), embed(batch))[1]
    gallery = embed_gallery(one.method.eval(), corpus, device=cpu, batch=4)
    texts = [str(text) for text in corpus.captions["text"]]
    return gallery, embed_queries(one.method, texts, device=cpu, batch=3), sum(seen)


def test_evaluation_is_shared_and_gives_the_same_bits(blocks):
    whole = _embedded(0, blocks)
    parts = in_processes(_embedded, blocks)
    assert sum(part[2] for part in parts) == whole[2] and all(0 < part[2] < whole[2] for part in parts)
    for part in parts:
        assert np.array_equal(part[0], whole[0]) and np.array_equal(part[1], whole[1])


def _talk(rank):
    first = parallel.from_first({"rank": rank, "text": "größer"})
    rows = np.arange(3 * rank, dtype=np.float32).reshape(rank, 3)
    summed = parallel.sum_over_ranks(torch.tensor([1.0 + rank], requires_grad=True))
    return first, parallel.everyone(rank), parallel.gather_rows(rows), float(summed), parallel.place().world


def test_what_processes_tell_each_other(blocks):
    for first, every, rows, summed, world in in_processes(_talk):
        assert first == {"rank": 0, "text": "größer"} and every == [0, 1] and summed == 3.0 and world == 2
        assert rows.tolist() == [[0.0, 1.0, 2.0]]


def _fails(rank):
    def work():
        raise ValueError("no room")

    try:
        parallel.first_does(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_failure_of_the_first_process_reaches_the_others():
    assert in_processes(_fails) == ["ValueError: no room", "UsageError: The first process failed: no room"]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, (2, 8, 0)),
        # A shell that `salloc` opened is no task of a step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),
    ],
)
def test_the_place_is_the_launcher_s(env, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = parallel.announced()
    assert (found.rank, found.world, found.local) == expected


def test_a_place_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK=x and WORLD_SIZE=2"):
        parallel.announced()


def _first_fails(rank):
    try:
        with parallel.first_then_others():
            if rank == 0:
                raise ValueError("no phrases")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_what_the_first_process_could_not_prepare_stops_the_others():
    assert in_processes(_first_fails) == ["ValueError: no phrases", "UsageError: The first process failed: no phrases"]


def _not_finite(rank, blocks, folder):
    one = trainer(blocks, folder, SMALL.replace(lr=1e30))
    try:
        one.run()
    except Exception as error:
        return str(error)


def test_a_batch_that_is_not_finite_is_told_whole(blocks, tmp_path):
    said = in_processes(_not_finite, blocks, tmp_path)
    listed = json.loads((tmp_path / "not_finite.json").read_text())["image_id"]
    assert len(listed) == 8 and said[0] == said[1] and f"image `{listed[0]}`" in said[0]


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node[03-05,09],gpu1", "node03"),
        ("a-[1-2]-ib,b", "a-1-ib"),
        ("one,two", "one"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts, first):
    assert parallel.first_host(hosts) == first


def _drawing(rank, blocks):
    """The losses of a method that draws pairs, from parts of one batch on processes with generators of their own."""
    protocol = {"protocol": "pairwise", "gradnorm": None}
    one = trainer(blocks, None, SMALL, "bdam", **protocol)
    step = Step(one.method.train(), one.optimizer, SMALL, "finetune")
    for module in one.method.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(rank)
    batch = next(one.feed.load(one.feed.plan(0)))
    seen = []
    for _ in range(3):
        done = step(batch, check=lambda values: None)
        seen.append({name: float(value.detach()) for name, value in done.losses.items()})
    return seen


def test_processes_draw_the_same_pairs_in_their_losses(blocks):
    first, second = in_processes(_drawing, blocks)
    assert first == second and "match" in first[0]


def _plan(rank, blocks, batch):
    try:
        return len(trainer(blocks, None, SMALL.replace(batch=batch)).feed.plan(0).batches)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_batches_that_cannot_be_shared_are_refused(blocks):
    found = in_processes(_plan, blocks, 4, count=3)
    assert all(said.startswith("UsageError: Batches of 4 cannot be shared by 3 devices") for said in found)
    assert in_processes(_plan, blocks, 6, count=3)[0] > 0
