"""What a training needs on a device, and which changes are offered when it has less."""

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import model, training_batch

from reidctl.training import memory
from reidctl.training.config import TrainConfig
from reidctl.training.cost import Curve, Growth
from reidctl.training.memory import Needs, Plan, advice, fits, gib, is_out_of_memory, measure_needs, total_bytes
from reidctl.training.optimizer import build_optimizer
from reidctl.training.step import Step

CPU = torch.device("cpu")
GIB = 1 << 30


def needs(batch=64, instances=4, fixed=0, **plan):
    """A training whose samples need 100 bytes each: 40 with checkpointing, half of either with bf16."""

    def growth(checkpointed, narrow):
        each = (40.0 if checkpointed else 100.0) / (2 if narrow else 1)
        return Growth(Curve((each, 0.0)), Curve((0.0,)), Curve((1.0, 0.0)), Curve((0.0,)), measured=8)

    now = {"checkpointing": False, "narrow": False, "accumulate": 1, "batch": batch} | plan
    return Needs(fixed, 0, 0, 0, 0, growth, Plan(**now), instances=instances)


def test_each_change_that_fits_alone_is_offered_cheapest_first():
    ways = fits(needs(), 64 * 60)
    assert ways == [
        ({"backbone.grad_checkpointing": True}, 64 * 40),
        ({"train.precision": "bf16"}, 64 * 50),
        ({"train.accumulate": 2}, 2 * 64 + 32 * 100),
    ]


def test_changes_are_joined_only_where_none_of_them_is_enough():
    # Neither checkpointing nor bf16 alone fits; passes with either would, but then passes alone do.
    assert fits(needs(), 64 * 21) == [
        ({"train.accumulate": 8}, 2 * 64 + 8 * 100),
        ({"backbone.grad_checkpointing": True, "train.precision": "bf16"}, 64 * 20),
    ]
    # One pass of one sample is not enough without both.
    assert fits(needs(batch=8), 2 * 8 + 39) == [({"train.accumulate": 8, "backbone.grad_checkpointing": True,
                                                  "train.precision": "bf16"}, 2 * 8 + 20)]  # fmt: skip


def test_what_is_on_already_is_not_offered_and_passes_go_on_from_there():
    ways = fits(needs(checkpointing=True, narrow=True, accumulate=2), 400)
    assert ways == [({"train.accumulate": 8}, 2 * 64 + 8 * 20)]


def test_a_smaller_batch_is_the_last_resort_and_holds_whole_people():
    assert all("train.batch" not in change for change, _ in fits(needs(), 64 * 5))
    # Weights and features of the whole batch alone do not fit: only fewer samples help.
    ways = fits(needs(batch=24), 24 * 2 + 19)
    assert ways and all(change["train.batch"] == 12 for change, _ in ways)
    assert fits(needs(fixed=1000), 1000) == []
    assert fits(needs(batch=8), 10) == []


def test_the_sentence_names_what_is_needed_what_there_is_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 4 * GIB)
    failed = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    sentence = advice(failed, needs(fixed=3 * GIB, batch=64 * GIB // 100 // 64 * 4), CPU)
    assert sentence.startswith("A step needs about 7.0 GiB and cpu has 4.0 GiB; these would fit: ")
    assert "train.precision=bf16 with" in sentence or "train.accumulate=" in sentence
    assert sentence.endswith(").")


def test_where_the_estimate_fits_others_are_blamed_and_clearly_less_is_offered(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 100 * 64 * 10)
    sentence = advice(MemoryError(), needs(), CPU)
    assert "which others use too" in sentence and "backbone.grad_checkpointing=true" in sentence


def test_where_nothing_helps_it_says_so(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 100)
    assert "no setting of reidctl makes it fit" in advice(MemoryError(), needs(fixed=1000), CPU)


def test_other_errors_are_not_about_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(ValueError, match="not about memory: boom"):
        advice(RuntimeError("boom"), needs(), CPU)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("memory") / "blocks", people=6)
    return training_batch(model("clip"), folder, range(12))


def measured(batch, devices=1, **settings):
    config = TrainConfig(batch=12, instances=3, **settings)
    method = model("clip").train()
    optimizer = build_optimizer(method, "finetune", config)
    found = measure_needs(method, batch, "finetune", config, checkpointing=False, devices=devices, seconds=0.5)
    return found, method, optimizer, config


def test_weights_gradients_and_optimiser_are_those_of_a_real_step(batch):
    found, method, optimizer, config = measured(batch, ema=0.9)
    Step(method, optimizer, config, "finetune")(batch, check=lambda _: None)
    tensors = [*method.parameters(), *method.buffers()]
    assert found.weights == sum(tensor.nbytes for tensor in tensors)
    assert found.gradients == sum(p.grad.nbytes for p in method.parameters()) == found.averages
    moments = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == sum(moments)
    assert sum(found.parts().values()) == found.total() > found.weights + found.gradients + found.optimizer
    image = batch.image
    assert found.parts()["batch"] == pytest.approx(image.nbytes, rel=0.1) and found.parts()["batch"] > image.nbytes


def test_checkpointing_and_bf16_are_measured_when_asked_for_and_left_as_they_were(batch):
    found, method, _, _ = measured(batch)
    plain, frugal = found.growth(False, False), found.growth(True, False)
    assert frugal.encode(12) < plain.encode(12) and found.growth(False, True).encode(12) < plain.encode(12)
    assert not method.backbone.image.checkpointing and not method.backbone.text.checkpointing
    assert found.growth(True, False) is frugal
    assert found.averages == 0


def test_shared_parameters_are_counted_by_their_share(batch):
    whole, shared = measured(batch)[0], measured(batch, devices=2, parallel="fsdp")[0]
    assert (shared.weights, shared.optimizer) == (whole.weights // 2, whole.optimizer // 2)
    assert measured(batch, devices=2)[0].weights == whole.weights
    assert shared.parts()["batch"] == pytest.approx(whole.parts()["batch"] / 2, abs=1)


def test_the_random_state_is_left_alone(batch):
    torch.manual_seed(3)
    expected = torch.rand(2)
    found, *_ = measured(batch)
    torch.manual_seed(3)
    found.growth(False, False)
    assert torch.equal(torch.rand(2), expected)


def test_bytes_read_well_and_a_machine_has_some():
    assert [gib(n) for n in (12, 2048, 3 << 20, 1.5 * GIB, 2000 * GIB)] == [
        "12 bytes", "2.0 KiB", "3.0 MiB", "1.5 GiB", "2,000.0 GiB",
    ]  # fmt: skip
    assert total_bytes(CPU) > 1 << 28
