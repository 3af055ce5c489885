import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import corpus_of, without_captions, write_dataset
from safetensors.torch import load_file, save

from reidctl import tables
from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.config import parse_section
from reidctl.data import TrainingSet
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import build_method, unique_state
from reidctl.training.config import TrainConfig
from reidctl.training.loop import Trainer
from reidctl.training.optimizer import build_optimizer, learning_rate_factor
from reidctl.training.state import kept_epochs, save_whole

SMALL = TrainConfig(
    epochs=4, batch=12, instances=3, lr=1e-3, lr_new=1e-3, warmup_epochs=0, log_every=1, device="cpu",
    augment=AugmentConfig(pad=2),
)  # fmt: skip


def trainer(folder, out, config=SMALL, name="bdam", validate=None, seed=0, caption_free=False):
    torch.manual_seed(seed)
    spec, settings = {
        "bdam": (
            "vit-bert:micro",
            {"depth": 1, "heads": 2, "dropout": 0.1, "fusion": {"width": 16, "sequence": "pair"}},
        ),
        "irra": ("clip:micro", {"mlm_layers": 1}),
    }[name]
    backbone = build(spec)
    method = build_method(name, settings, backbone, 8)
    samples = TrainingSet(
        corpus_of(folder), size=backbone.image_size, mean=backbone.mean, std=backbone.std, tokenize=backbone.tokenize,
        texts=method.train_texts, target=method.target_text, augment=config.augment, seed=seed,
        caption_free=caption_free,
    )  # fmt: skip
    return Trainer(
        method, samples, validate or (lambda m: {"rank1": 0.5, "mAP": 0.5}), config, out, seed=seed, stage="finetune",
        fingerprint="f",
    )  # fmt: skip


def state(method):
    return {name: value.clone() for name, value in unique_state(method).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    pass


@pytest.mark.covers(60)
@pytest.mark.parametrize("name", ["bdam", "irra"])
def test_a_training_that_was_killed_ends_with_the_same_weights_bit_for_bit(blocks, tmp_path, name):
    values = iter([0.2, 0.6, 0.4, 0.5])
    whole = trainer(blocks, tmp_path / "whole", name=name, validate=lambda m: {"rank1": next(values), "mAP": 0.0})
    expected = whole.run()

    values = {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5}
    calls = []

    def validate(method):
        calls.append(0)
        if len(calls) == 3:
            raise Killed
        return {"rank1": values[len(calls) - (len(calls) > 3)], "mAP": 0.0}

    with pytest.raises(Killed):
        trainer(blocks, tmp_path / "parts", name=name, validate=validate).run()
    second = trainer(blocks, tmp_path / "parts", name=name, validate=validate)
    outcome = second.run()
    assert outcome.resumed_from == 2 and outcome.best_epoch == expected.best_epoch == 1
    assert same(state(whole.method), state(second.method))
    shown = ["epoch", "step", "name"]
    losses = outcome.history["name"].str.startswith(("loss", "weight", "grad", "total", "lr"))
    mine, theirs = (
        outcome.history[losses],
        expected.history[expected.history["name"].isin(set(outcome.history["name"][losses]))],
    )
    assert mine[shown].values.tolist() == theirs[shown].values.tolist()
    assert mine["value"].tolist() == theirs["value"].tolist()


@pytest.mark.covers(226)
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(blocks, tmp_path):
    config = SMALL.replace(epochs=1)
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        one = trainer(blocks, tmp_path / str(number), config, seed=seed)
        one.run()
        runs.append(state(one.method))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_state_of_other_settings_is_not_continued(blocks, tmp_path):
    trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()
    other = trainer(blocks, tmp_path, SMALL.replace(epochs=1))
    other.fingerprint = "g"
    assert other.run().resumed_from == 0


def test_damaged_state_is_named(blocks, tmp_path):
    trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()
    (tmp_path / "last" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"state\.pt is damaged.*--force"):
        trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()


@pytest.mark.covers(31)
def test_the_epoch_with_the_best_validation_value_is_kept(blocks, tmp_path):
    seen, values = [], [0.1, 0.7, 0.3, 0.6]

    def validate(method):
        seen.append(state(method))
        return {"rank1": values[len(seen) - 1], "mAP": 0.0}

    one = trainer(blocks, tmp_path, validate=validate)
    outcome = one.run()
    assert (outcome.best_epoch, outcome.best_value) == (1, 0.7)
    assert same(state(one.method), seen[1]) and not same(seen[1], seen[3])
    (kept,) = (tmp_path / "last").glob("best-*")
    assert kept.name.endswith("-1.safetensors") and same(load_file(kept), seen[1])


@pytest.mark.covers(39)
def test_history_has_every_loss_its_weight_its_gradient_norm_and_the_rate(blocks, tmp_path):
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=1))
    history = one.run().history
    for loss in one.method.current_weights():
        for kind in ("loss", "weight", "grad_norm"):
            assert (history["name"] == f"{kind}/{loss}").any()
    assert {
        "total",
        "lr",
        "images_per_second",
        "step_images_per_second",
        "loader_images_per_second",
        "loader_share",
        "rank1",
        "mAP",
    } <= set(history["name"])
    step = history[(history["step"] == 0) & (history["split"] == "train")].set_index("name")["value"]
    weighted = sum(step[f"weight/{loss}"] * step[f"loss/{loss}"] for loss in one.method.current_weights())
    assert step["total"] == pytest.approx(weighted, rel=1e-5)


def kept_by(folder):
    """The kept epochs; a kill may leave the temporary file of one, which the next start of the stage removes."""
    return {path.name: path.read_bytes() for path in sorted((folder / "epochs").glob("[!.]*"))}


@pytest.mark.covers(31)
def test_every_validated_epoch_is_kept_as_it_was_validated(blocks, tmp_path):
    seen = {}
    config = SMALL.replace(keep_epochs=True, validate_every=2, epochs=5)

    def validate(method):
        seen[one.progress.step] = state(method)
        return {"rank1": 0.1, "mAP": 0.1}

    one = trainer(blocks, tmp_path, config, validate=validate)
    one.run()
    kept = kept_epochs(tmp_path, "f")
    assert list(kept) == [2, 4, 5]
    for path, expected in zip(kept.values(), seen.values(), strict=True):
        assert same(load_file(path), expected)
    assert kept_epochs(tmp_path, "another training") == {}
    kept[4].write_bytes(kept[4].read_bytes()[:100])
    assert list(kept_epochs(tmp_path, "f")) == [2, 5], "a damaged file is none"


@pytest.mark.parametrize("at", [1, 3])
def test_a_training_killed_between_an_epoch_s_weights_and_its_state_keeps_the_same_files(
    blocks, tmp_path, at, monkeypatch
):
    config = SMALL.replace(keep_epochs=True)
    trainer(blocks, tmp_path / "whole", config).run()
    save = Trainer._save

    def killed(self, epoch):
        if epoch == at:
            raise Killed
        save(self, epoch)

    monkeypatch.setattr(Trainer, "_save", killed)
    with pytest.raises(Killed):
        trainer(blocks, tmp_path / "parts", config).run()
    assert len(kept_by(tmp_path / "parts")) == at + 1
    monkeypatch.setattr(Trainer, "_save", save)
    assert trainer(blocks, tmp_path / "parts", config).run().resumed_from == at
    assert kept_by(tmp_path / "parts") == kept_by(tmp_path / "whole") and len(kept_by(tmp_path / "whole")) == 4


def test_epochs_of_another_training_and_those_newer_than_the_state_are_removed(blocks, tmp_path):
    config = SMALL.replace(epochs=2, keep_epochs=True)
    trainer(blocks, tmp_path, config).run()
    first = kept_by(tmp_path)
    (tmp_path / "epochs" / "epoch-003.safetensors").write_bytes(first["epoch-002.safetensors"])
    (tmp_path / "epochs" / "epoch-x.safetensors").write_bytes(b"mine")
    trainer(blocks, tmp_path, config).run()
    assert kept_by(tmp_path) == {**first, "epoch-x.safetensors": b"mine"}
    # Of a training that was killed before its first state: this one continues at epoch 2 and must not take it over.
    foreign = save(load_file(tmp_path / "epochs" / "epoch-001.safetensors"), metadata={"fingerprint": "g"})
    (tmp_path / "epochs" / "epoch-001.safetensors").write_bytes(foreign)
    trainer(blocks, tmp_path, config).run()
    assert list(kept_by(tmp_path)) == ["epoch-002.safetensors", "epoch-x.safetensors"]
    other = trainer(blocks, tmp_path, SMALL.replace(epochs=1))
    other.fingerprint = "g"
    other.run()
    assert list(kept_by(tmp_path)) == ["epoch-x.safetensors"]


def test_a_best_file_of_another_training_is_never_taken(blocks, tmp_path):
    values = iter([0.9, 0.1, 0.2])
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=3), validate=lambda m: {"rank1": next(values), "mAP": 0.0})
    one.fingerprint = "first"
    one.run()
    expected = state(one.method)
    other = trainer(blocks, tmp_path, SMALL.replace(epochs=1), seed=1)
    other.fingerprint = "second"
    other._validate(0)  # killed after its best weights, before its state
    again = trainer(blocks, tmp_path, SMALL.replace(epochs=3))
    again.fingerprint = "first"
    assert again.run().resumed_from == 3 and same(state(again.method), expected)


def test_zero_epochs_keep_the_starting_weights_and_still_validate(blocks, tmp_path):
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=0))
    before = state(one.method)
    outcome = one.run()
    assert same(state(one.method), before) and outcome.best_value == 0.5
    assert set(outcome.history["name"]) == {"rank1", "mAP"}


@pytest.mark.parametrize(
    "change", [{"log_every": 0}, {"batch": 0}, {"batch": 10}, {"batch": 3}, {"select_metric": "f1"}]
)
def test_settings_that_cannot_work_are_refused_before_training(change):
    with pytest.raises(UsageError, match="train"):
        parse_section(TrainConfig, {**SMALL.model_dump(), **change}, "train")


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(blocks, tmp_path):
    one = trainer(blocks, tmp_path, SMALL)
    with torch.no_grad():
        one.method.backbone.image.last_mlp_weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"not finite at step 0 .*image `p\d-\d`.*not_finite\.json"):
        one.run()
    assert "image_id" in (tmp_path / "not_finite.json").read_text()


@pytest.mark.covers(58)
def test_learning_rates_follow_their_closed_forms():
    config = TrainConfig(epochs=60, warmup_epochs=5, warmup_factor=0.1)
    assert learning_rate_factor(config, 0) == pytest.approx(0.1)
    assert learning_rate_factor(config, 2.5) == pytest.approx(0.55)
    assert learning_rate_factor(config, 5) == pytest.approx(1.0)
    assert learning_rate_factor(config, 32.5) == pytest.approx(0.5)
    assert learning_rate_factor(config, 59) == pytest.approx(0.5 * (1 + math.cos(math.pi * 54 / 55)))
    steps = TrainConfig(epochs=60, warmup_epochs=0, schedule="step", milestones=(30, 50))
    assert [learning_rate_factor(steps, e) for e in (29, 30, 50)] == pytest.approx([1.0, 0.1, 0.01])
    falling = TrainConfig(epochs=10, warmup_epochs=0, schedule="exponential", gamma=0.8)
    assert learning_rate_factor(falling, 3) == pytest.approx(0.8**3)


@pytest.mark.covers(59, 148)
def test_groups_give_each_role_its_rate_and_spare_biases_and_mamba_states_from_decay(blocks, tmp_path):
    config = SMALL.replace(lr=1e-4, lr_text=2e-5, lr_new=3e-4, weight_decay=1e-3, bias_lr_factor=2.0)
    one = trainer(blocks, tmp_path, config)
    groups = {
        id(p): group for group in build_optimizer(one.method, "finetune", config).param_groups for p in group["params"]
    }
    facts = {name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in one.method.named_parameters()}
    for name, (rate, decay) in facts.items():
        base = 1e-4 if name.startswith("backbone.image") else 2e-5 if name.startswith("backbone.text") else 3e-4
        assert rate == pytest.approx(base * (2 if name.endswith("bias") else 1)), name
        spared = name.endswith(("bias", "A_log", ".D"))
        assert decay == (0.0 if spared else 1e-3), name


def test_a_device_that_is_not_there_is_a_usage_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UsageError, match=r"cuda.*no CUDA device.*--device cpu"):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="not a device"):
        resolve_device("tpu-9000")


@pytest.mark.slow
@pytest.mark.covers(60)
def test_kill_9_at_any_moment_and_again_ends_with_the_same_weights(tmp_path):
    """A child process trains; it is killed at three different moments, then run to its end."""
    folder = write_dataset(tmp_path / "blocks")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, torch
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_training import SMALL, trainer, state
        from safetensors.torch import save_file
        torch.set_num_threads(1)
        one = trainer(Path({str(folder)!r}), Path(sys.argv[1]), SMALL.replace(epochs=8, keep_epochs=True))
        print("ready", flush=True)
        one.run()
        save_file(state(one.method), sys.argv[1] + "/end.safetensors")
        """)
    )

    def start(out):
        out.mkdir(exist_ok=True)
        child = subprocess.Popen([sys.executable, script, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout.readline() == b"ready\n"
        return child

    assert start(tmp_path / "whole").wait() == 0
    killed = 0
    for delay in (0.15, 0.4, 0.8):
        child = start(tmp_path / "parts")
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    assert killed, "the child was always faster than the kill"
    assert start(tmp_path / "parts").wait() == 0
    assert same(load_file(tmp_path / "whole" / "end.safetensors"), load_file(tmp_path / "parts" / "end.safetensors"))
    assert kept_by(tmp_path / "whole") == kept_by(tmp_path / "parts") and len(kept_by(tmp_path / "whole")) == 8


def test_the_loaders_threads_do_not_change_the_weights(blocks, tmp_path):
    ends = []
    for workers in (0, 1, 3):
        one = trainer(blocks, tmp_path / str(workers), SMALL.replace(epochs=1, workers=workers))
        one.run()
        ends.append(state(one.method))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_a_training_that_waits_for_images_says_so_once(blocks, tmp_path, caplog, monkeypatch):
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=2))
    load = one.feed.samples.__class__.__getitem__
    slow = lambda self, key: (time.sleep(0.1), load(self, key))[1]  # noqa: E731
    monkeypatch.setattr(one.feed.samples.__class__, "__getitem__", slow)
    with caplog.at_level("WARNING", "reidctl"):
        one.run()
    said = [record.message for record in caplog.records if "waits for images" in record.message]
    assert len(said) == 1 and "train.workers" in said[0]


def batches_in(one, epoch):
    """The sample numbers of an epoch's batches."""
    plan = one.feed.plan(epoch)
    return [plan.samples[places] for places in plan.batches]


def batches_of(one):
    """The batches that a trainer's method sees."""
    seen = []
    encode = one.method.encode
    one.method.encode = lambda batch, stage: (seen.append(batch), encode(batch, stage))[1]
    one.run()
    return seen


@pytest.mark.covers(16)
def test_a_combination_trains_on_pairs_and_caption_free_images_in_one_batch(blocks, tmp_path):
    without_captions(blocks, range(5, 8))
    settings = SMALL.replace(epochs=1, sampler="mixed", batch=4, instances=2, batch_images=4)
    seen = batches_of(trainer(blocks, tmp_path, settings, name="irra", caption_free=True))
    assert seen
    for batch in seen:
        assert batch.has_text.tolist() == [True] * 4 + [False] * 4 and batch.domain.tolist() == [1] * 4 + [0] * 4
        assert len(batch.texts["full"]) == 4


@pytest.mark.covers(23)
def test_alternating_batches_come_from_one_dataset_each(blocks, tmp_path):
    captions = (blocks / "captions.parquet").read_bytes()
    without_captions(blocks, range(4, 8))
    (blocks / "captions.parquet").write_bytes(captions)
    settings = SMALL.replace(epochs=1, sampler="alternating", batch=6, instances=3)
    found = [batch.domain.unique().tolist() for batch in batches_of(trainer(blocks, tmp_path, settings, name="irra"))]
    assert sorted(found) == [[0], [0], [1], [1]] and found[0] != found[1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_while_the_state_is_written_is_an_interrupt_and_leaves_nothing(tmp_path, monkeypatch, wrapped):
    """PyTorch's zip writer turns an interrupt in its midst into a RuntimeError."""

    def save(state, stream):
        stream.write(b"half")
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if wrapped:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
            raise

    monkeypatch.setattr("reidctl.training.state.torch.save", save)
    (tmp_path / "state.pt").write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        save_whole({}, tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert (tmp_path / "state.pt").read_bytes() == b"older"


@pytest.mark.covers(58)
def test_a_schedule_may_count_epochs_from_one_as_clip_reid_does():
    plain = TrainConfig(epochs=60, warmup_epochs=10, warmup_factor=0.1, schedule="step", milestones=(30, 50))
    shifted = plain.replace(first_epoch=1)
    assert [learning_rate_factor(plain, e) for e in (0, 9, 10, 29)] == pytest.approx([0.1, 0.91, 1.0, 1.0])
    # The warm-up ends, and the milestones come, an epoch earlier.
    assert [learning_rate_factor(shifted, e) for e in (0, 8, 9)] == pytest.approx([0.19, 0.91, 1.0])
    assert [learning_rate_factor(shifted, e) for e in (28, 29, 48, 49)] == pytest.approx([1.0, 0.1, 0.1, 0.01])
    falling = TrainConfig(epochs=10, warmup_epochs=0, schedule="exponential", gamma=0.8, first_epoch=1)
    assert learning_rate_factor(falling, 0) == pytest.approx(0.8)


@pytest.mark.covers(58)
def test_a_cosine_may_run_under_the_warm_up_and_end_above_zero():
    rest = TrainConfig(epochs=20, warmup_epochs=4, warmup_factor=0.5, final_factor=0.1)
    over_all = rest.replace(cosine_over="all")
    for config in (rest, over_all):
        assert [learning_rate_factor(config, e) for e in (0, 2)] == pytest.approx([0.5, 0.75])
        assert learning_rate_factor(config, 20) == pytest.approx(0.1)
    # From 1 where the warm-up ends; or in the middle of a curve that began with it.
    assert [learning_rate_factor(rest, e) for e in (4, 12)] == pytest.approx([1.0, 0.55])
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 5)) / 2
    assert [learning_rate_factor(over_all, e) for e in (4, 10)] == pytest.approx([quarter, 0.55])
    # Beyond the last epoch (it is number 20 when they are counted from 1) it stays at the end.
    assert learning_rate_factor(over_all.replace(first_epoch=1), 19) == pytest.approx(0.1)
    assert learning_rate_factor(over_all, 25) == pytest.approx(0.1)
    defaults = TrainConfig()
    assert (defaults.final_factor, defaults.cosine_over, defaults.first_epoch) == (0.0, "rest", 0)


@pytest.mark.covers(59)
def test_biases_decay_like_everything_else_when_asked_to_and_only_then(blocks, tmp_path):
    one = trainer(blocks, tmp_path)
    for asked, expected in ((False, 0.0), (True, 1e-3)):
        config = SMALL.replace(lr=1e-4, lr_new=1e-4, weight_decay=1e-3, bias_lr_factor=2.0, decay_biases=asked)
        groups = build_optimizer(one.method, "finetune", config).param_groups
        facts = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        for name, parameter in one.method.named_parameters():
            rate, decay = facts[id(parameter)]
            if name.endswith("bias"):
                assert (rate, decay) == (pytest.approx(2e-4), expected), name
            else:
                assert decay == (0.0 if name.endswith(("A_log", ".D")) else 1e-3), name
    assert TrainConfig().decay_biases is False


@pytest.mark.covers(58)
def test_the_rates_of_a_training_are_those_of_its_schedule_counted_from_one(blocks, tmp_path):
    config = SMALL.replace(
        epochs=3, warmup_epochs=2, warmup_factor=0.2, final_factor=0.1, cosine_over="all", first_epoch=1
    )
    rows = trainer(blocks, tmp_path, config, name="irra").run().history
    found = rows[rows["name"] == "lr"].groupby("epoch")["value"].agg(["min", "max"]).to_numpy()
    # Epoch 1 of 2 is half-way up from 0.2; then the cosine of 3 epochs at 2 and at 3. Biases are twice as fast.
    rates = [2e-3 * factor for factor in (0.6, 0.1 + 0.9 * 0.25, 0.1)]
    assert found == pytest.approx(np.array([[rate, rate] for rate in rates]))


@pytest.mark.covers(215)
def test_alternating_random_batches_come_from_one_dataset_each_and_need_no_k(blocks, tmp_path):
    without_captions(blocks, range(5, 8))
    images = tables.read_table(blocks / "images.parquet", "images")
    one = trainer(blocks, tmp_path, SMALL.replace(sampler="random", batch=5, instances=3), name="irra")
    assert len(images) == 24 and all(len(batch) for batch in batches_in(one, 0))
    # All captions are of one dataset: the batches are the random ones.
    alternating = trainer(blocks, tmp_path, SMALL.replace(sampler="alternating-random", batch=5), name="irra")
    assert [b.tolist() for b in batches_in(alternating, 1)] == [b.tolist() for b in batches_in(one, 1)]
    assert [b.tolist() for b in batches_in(alternating, 1)] != [b.tolist() for b in batches_in(alternating, 2)]
    alternating.feed.samples.domain_of_row = np.arange(24) % 2
    for batch in batches_in(alternating, 0):
        assert len(set(batch % 2)) == 1
