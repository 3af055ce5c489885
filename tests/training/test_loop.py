"""What the loop does beside steps: state within an epoch, averages, stopping early, waiting for nobody, trackers."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import SETTINGS, model, training_batch
from safetensors.torch import load_file
from test_training import SMALL, same, state, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from reidctl.errors import DataError, UsageError
from reidctl.stages.building import what_matters
from reidctl.training import tracking
from reidctl.training.compiling import compile_blocks
from reidctl.training.config import TrainConfig
from reidctl.training.ema import Average
from reidctl.training.optimizer import build_optimizer
from reidctl.training.state import require_state
from reidctl.training.step import Step

TESTS = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("loop") / "blocks")


class Killed(BaseException):
    pass


def killed_at(one, step):
    """Run a trainer that dies when it takes this step."""
    look = one.watch.look

    def watch(values, **where):
        if where["step"] == step:
            raise Killed
        look(values, **where)

    one.watch.look = watch
    with pytest.raises(Killed):
        one.run()


# State within an epoch


@pytest.mark.covers(60)
@pytest.mark.parametrize("name", ["bdam", "irra"])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_state_within_an_epoch_is_continued_bit_for_bit(blocks, tmp_path, name, step):
    config = SMALL.replace(epochs=2, batch=6, save_steps=2, ema=0.9, keep_epochs=True, validate_every=2)
    whole = trainer(blocks, tmp_path / "whole", config, name=name)
    expected = whole.run()
    killed_at(trainer(blocks, tmp_path / "parts", config, name=name), step)
    second = trainer(blocks, tmp_path / "parts", config, name=name)
    outcome = second.run()
    assert second.progress.step == whole.progress.step and same(state(whole.method), state(second.method))
    shown = outcome.history[outcome.history["name"].str.startswith(("loss", "weight", "total", "lr", "grad"))]
    other = expected.history[expected.history["name"].str.startswith(("loss", "weight", "total", "lr", "grad"))]
    assert shown[["step", "name", "value"]].values.tolist() == other[["step", "name", "value"]].values.tolist()
    assert int(outcome.history["step"].max()) == int(expected.history["step"].max())
    assert outcome.resumed_from == (0 if step < 4 else 1)


def test_only_the_batches_that_are_left_are_loaded_again(blocks, tmp_path):
    config = SMALL.replace(epochs=1, batch=6, save_steps=1)
    killed_at(trainer(blocks, tmp_path, config), 3)
    second = trainer(blocks, tmp_path, config)
    loaded = []
    collate = second.feed.samples.collate
    second.feed.samples.collate = lambda samples: (loaded.append(len(samples)), collate(samples))[1]
    second.run()
    assert len(loaded) == len(second.feed.plan(0).batches) - 3


@pytest.mark.slow
@pytest.mark.covers(60)
@pytest.mark.parametrize("what", ["state", "best", "between"])
def test_a_kill_9_in_the_midst_of_a_write_leaves_the_state_before_it(tmp_path, what):
    """The process dies while bytes of the checkpoint, or of the best weights, are half written."""
    folder = write_dataset(tmp_path / "blocks")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, torch
        from pathlib import Path
        sys.path.insert(0, {TESTS!r})
        from test_training import SMALL, trainer, state
        from reidctl import tables
        from reidctl.training import loop, state as files
        from safetensors.torch import save_file
        torch.set_num_threads(1)
        values = iter([0.1, 0.2, 0.3, 0.4])
        one = trainer(Path({str(folder)!r}), Path(sys.argv[1]), SMALL.replace(epochs=4),
                      validate=lambda m: {{"rank1": 0.1 * (one.progress.step + 1), "mAP": 0.0}})
        die = sys.argv[2]
        count = 0
        def half(write, at):
            def writing(*arguments):
                global count
                count += 1
                if count < 3:
                    return write(*arguments)
                at(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return writing
        if die == "state":
            def torn(state, stream):
                files_save(state, stream)
                stream.flush(); stream.truncate(2000); os.fsync(stream.fileno())
            files_save = torch.save
            files.torch.save = half(files_save, torn)
        elif die == "best":
            plain = tables.write_bytes
            part = lambda path, data: path.with_name("." + path.name + ".tmp").write_bytes(data[:500])
            tables.write_bytes = half(plain, part)
        elif die == "between":
            files_replace = os.replace
            files.os.replace = half(files_replace, lambda *a: None)
        one.run()
        save_file(state(one.method), sys.argv[1] + "/end.safetensors")
        """)
    )

    def run(out, die):
        out.mkdir(exist_ok=True)
        return subprocess.run([sys.executable, script, out, die], capture_output=True, text=True)

    first = run(tmp_path / "whole", "never")
    assert first.returncode == 0, first.stderr
    assert run(tmp_path / "parts", what).returncode == -signal.SIGKILL
    again = run(tmp_path / "parts", "never")
    assert again.returncode == 0, again.stderr
    assert same(load_file(tmp_path / "whole" / "end.safetensors"), load_file(tmp_path / "parts" / "end.safetensors"))
    assert not list((tmp_path / "parts" / "last").glob("*.tmp")) and not list((tmp_path / "parts").glob(".*.tmp"))


def test_resuming_asks_for_a_stopped_training(blocks, tmp_path):
    path = tmp_path / "last" / "state.pt"
    with pytest.raises(DataError, match=r"no stopped training to resume.*\(none\).*begins anew"):
        require_state(path, "f")
    trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()
    require_state(path, "f")
    with pytest.raises(DataError, match="one with other settings or inputs"):
        require_state(path, "g")
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"damaged.*--force"):
        require_state(path, "f")
    torch.save([1, 2], path)
    with pytest.raises(DataError, match=r"is not the state of a training"):
        trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()


def test_state_of_an_older_version_begins_anew(blocks, tmp_path):
    (tmp_path / "last").mkdir()
    torch.save({"fingerprint": "f", "epoch": 3, "step": 9}, tmp_path / "last" / "state.pt")
    assert trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run().resumed_from == 0


# The average of the weights


def test_the_average_of_the_weights_is_the_recursion_and_what_is_validated_and_kept(blocks, tmp_path):
    config = SMALL.replace(epochs=2, ema=0.8, keep_epochs=True)
    seen = []
    one = trainer(blocks, tmp_path, config, validate=lambda m: (seen.append(state(m)), {"rank1": 0.1, "mAP": 0.1})[1])
    trained = {name for name, value in one.method.named_parameters() if value.requires_grad}
    slow = {name: value.detach().clone() for name, value in one.method.named_parameters() if name in trained}
    update = one.average.update

    def watched():
        update()
        for name, value in one.method.named_parameters():
            if name in trained:
                slow[name] = 0.8 * slow[name] + 0.2 * value.detach()

    one.average.update = watched
    one.run()
    for name, value in slow.items():
        assert torch.allclose(seen[-1][name], value, atol=1e-6), name
    # The first epoch was as good as the second: its average stays.
    assert same(state(one.method), seen[0])
    assert same(load_file(tmp_path / "epochs" / "epoch-002.safetensors"), seen[1])


def test_training_goes_on_from_the_weights_not_from_their_average(blocks, tmp_path):
    runs = []
    for ema in (None, 0.5):
        one = trainer(blocks, tmp_path / str(ema), SMALL.replace(epochs=2, ema=ema))
        outcome = one.run()
        runs.append(outcome.history[outcome.history["name"] == "total"]["value"].tolist())
    assert runs[0] == runs[1]


def test_without_validation_the_average_is_the_result(blocks, tmp_path):
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=1, ema=0.5))
    one.validate = None
    one.run()
    mean = one.average.state_dict()
    assert mean and all(torch.equal(dict(one.method.named_parameters())[name], value) for name, value in mean.items())


def test_frozen_weights_have_no_average():
    method = model("irra")
    build_optimizer(method, "finetune", TrainConfig())
    for parameter in method.backbone.parameters():
        parameter.requires_grad_(False)
    assert not any(name.startswith("backbone.") for name in Average(method, 0.9).state_dict())


# Stopping early


def test_training_stops_after_so_many_validations_without_a_better_one(blocks, tmp_path, caplog):
    values = [0.3, 0.5, 0.4, 0.5, 0.45, 0.9]
    config = SMALL.replace(epochs=6, patience=3)
    calls = []
    one = trainer(
        blocks, tmp_path, config, validate=lambda m: (calls.append(0), {"rank1": values[len(calls) - 1], "mAP": 0})[1]
    )
    with caplog.at_level("INFO", "reidctl"):
        outcome = one.run()
    assert len(calls) == 5 and outcome.stopped and outcome.best_epoch == 1 and outcome.best_value == 0.5
    assert "No better rank1 in 3 validations: stopping after epoch 5 of 6." in caplog.text
    # Run again it is finished, not continued.
    again = trainer(blocks, tmp_path, config, validate=one.validate)
    assert again.run().stopped and len(calls) == 5 and same(state(again.method), state(one.method))


def test_patience_is_counted_across_a_kill(blocks, tmp_path):
    values = [0.5, 0.4, 0.3, 0.2]
    calls = []

    def validate(method):
        calls.append(0)
        if len(calls) == 3:
            raise Killed
        return {"rank1": values[min(len(calls), 3) - (len(calls) > 3)], "mAP": 0.0}

    config = SMALL.replace(epochs=4, patience=2)
    with pytest.raises(Killed):
        trainer(blocks, tmp_path, config, validate=validate).run()
    outcome = trainer(blocks, tmp_path, config, validate=validate).run()
    assert outcome.stopped and len(calls) == 4


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal",
              "repeat_interleave")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        bools = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8)
            for one in args[1]
            if one is not None
        )
        if name in self.ASKING or bools:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_step_that_reports_nothing_never_waits_for_the_device(blocks, name):
    """Counted on the CPU, where the same operations run; what the loader and `prepare` do there is free."""
    # GradNorm keeps its weights on the host: one exchange per step costs less than 200 small kernels would.
    settings = {"gradnorm": None} if name == "bdam" else {}
    method = model(name, **settings)
    config = TrainConfig(lr=1e-3)
    step = Step(method, build_optimizer(method, "finetune", config), config, "finetune")
    method.begin("finetune")
    method.train()
    batch = training_batch(method, blocks)
    prepared = method.prepare(batch)
    method.prepare = lambda given: prepared
    step(batch, check=lambda values: None)
    # Counting steps is the host's own business.
    step.optimizer.step = lambda: None
    with Waits() as waits:
        step(batch, check=lambda values: None)
    assert waits.found == []


# Memory


def test_a_batch_that_does_not_fit_says_what_would(blocks, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Step, "__call__", full)
    for name in ("irra", "bdam"):
        with pytest.raises(UsageError) as caught:
            trainer(blocks, tmp_path / name, SMALL.replace(epochs=1), name=name).run()
        said = str(caught.value)
        assert said.startswith("cpu ran out of memory in a batch of 12 images. A step needs about ")
        assert "; these would fit: " in said and " MiB)" in said


def test_other_errors_are_not_about_memory(blocks, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Step, "__call__", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer(blocks, tmp_path, SMALL.replace(epochs=1)).run()


# Compiling


def test_a_compiler_that_fails_is_named_and_training_goes_on(blocks, tmp_path, caplog, monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level("WARNING", "reidctl"):
        one = trainer(blocks, tmp_path / "a", SMALL.replace(epochs=1, compile=True))
        one.run()
    assert "torch.compile failed (RuntimeError: no C++ compiler); training goes on without." in caplog.text
    assert one.method.backbone.image.compiled is None and one.method.backbone.text.compiled is None
    plain = trainer(blocks, tmp_path / "b", SMALL.replace(epochs=1))
    plain.run()
    assert same(state(one.method), state(plain.method))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers(blocks):
    methods = [model("clip"), model("clip")]
    assert compile_blocks(methods[0], TrainConfig())
    grads = []
    for method in methods:
        method.train()
        batch = training_batch(method, blocks)
        method.objective(method.losses(batch, "finetune")).backward()
        grads.append({name: value.grad for name, value in method.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[1].items():
        assert torch.allclose(grads[0][name], value, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["irra", "bdam"])
def test_a_compiled_training_reports_balances_and_ends_near_the_plain_one(blocks, tmp_path, name, caplog):
    runs = []
    for compiled in (False, True):
        config = SMALL.replace(epochs=1, compile=compiled, eps=1e-2)
        with caplog.at_level("WARNING", "reidctl"):
            one = trainer(blocks, tmp_path / str(compiled), config, name=name)
            one.run()
        runs.append(state(one.method))
    assert "torch.compile failed" not in caplog.text
    # Dropout inside a compiled block draws otherwise than outside.
    if name == "irra":
        assert all(torch.allclose(value, runs[1][key], atol=1e-4) for key, value in runs[0].items())


def test_channels_last_changes_no_weight_s_shape_and_trains_nearly_the_same(blocks, tmp_path):
    runs = []
    for last in (False, True):
        one = trainer(blocks, tmp_path / str(last), SMALL.replace(epochs=1, channels_last=last))
        one.run()
        runs.append(state(one.method))
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.allclose(value, runs[1][name], atol=1e-3), name


def test_the_fused_update_is_the_same_but_for_rounding_and_resumes(blocks, tmp_path):
    runs = {}
    for fused in (None, True):
        config = SMALL.replace(epochs=2, fused=fused, eps=1e-3)
        one = trainer(blocks, tmp_path / str(fused), config)
        assert one.optimizer.param_groups[0]["fused"] is fused
        one.run()
        runs[fused] = state(one.method)
    assert all(torch.allclose(value, runs[True][name], atol=1e-4) for name, value in runs[None].items())
    config = SMALL.replace(epochs=2, fused=True, eps=1e-3, save_steps=1)
    killed_at(trainer(blocks, tmp_path / "parts", config), 3)
    again = trainer(blocks, tmp_path / "parts", config)
    again.run()
    assert same(state(again.method), runs[True])


# What others see


def test_how_a_training_runs_does_not_make_it_another():
    plain = TrainConfig()
    other = plain.replace(
        compile=True, channels_last=True, parallel="fsdp", save_steps=5, tensorboard=True, wandb="x", device="cpu"
    )
    assert what_matters(plain) == what_matters(other)
    for changed in ({"accumulate": 2}, {"ema": 0.9}, {"patience": 3}, {"fused": True}):
        assert what_matters(plain.replace(**changed)) != what_matters(plain)


def test_trackers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for setting in ({"wandb": "reid"}, {"tensorboard": True}):
        with pytest.raises(UsageError, match=r"needs the package.*pip install"):
            tracking.require_trackers(TrainConfig(**setting))


class FakeRun:
    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finished")


def test_weights_and_biases_gets_every_row_of_the_history(blocks, tmp_path, monkeypatch):
    calls, started = [], []

    class Module:
        @staticmethod
        def init(**settings):
            started.append(settings)
            return FakeRun(calls)

    monkeypatch.setitem(sys.modules, "wandb", Module)
    one = trainer(blocks, tmp_path / "run" / "finetune", SMALL.replace(epochs=1, wandb="reid"))
    history = one.run().history
    assert started[0]["project"] == "reid" and started[0]["name"] == "run" and started[0]["config"]["batch"] == 12
    assert calls[-1] == "finished"
    sent = {(step, name): value for step, values in calls[:-1] for name, value in values.items() if name != "epoch"}
    rows = history[["step", "split", "name", "value"]].values.tolist()
    expected = {(step, f"{split}/{name}"): value for step, split, name, value in rows}
    assert sent == expected


def test_tensorboard_gets_every_row_of_the_history(blocks, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    one = trainer(blocks, tmp_path, SMALL.replace(epochs=1, tensorboard=True))
    history = one.run().history
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    for (split, name), rows in history.groupby(["split", "name"], observed=True):
        points = found.Scalars(f"{split}/{name}")
        assert [point.step for point in points] == rows["step"].tolist()
        assert [point.value for point in points] == pytest.approx(rows["value"].tolist(), rel=1e-5)
