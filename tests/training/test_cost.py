"""Costs that were measured on parts of a batch, against what the whole batch really takes."""

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import SETTINGS, model, training_batch

from reidctl.batch import Batch, Tokens
from reidctl.evaluation.efficiency import count_flops
from reidctl.training import cost
from reidctl.training.config import TrainConfig
from reidctl.training.memory import least_samples, tensors_of
from reidctl.training.optimizer import build_optimizer
from reidctl.training.step import Step

SIZE, INSTANCES = 48, 8
CONFIG = TrainConfig(batch=SIZE, instances=INSTANCES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("cost") / "blocks", people=6, per_person=INSTANCES)


def trained(name, config=CONFIG, **changes):
    """A method whose parameters train as in `finetune`, and its optimiser."""
    method = model(name, **changes).train()
    return method, build_optimizer(method, "finetune", config)


def grown(method, batch, config, sizes=(16, 24, 32)):
    parts = {size: cost.part_of(batch, size, INSTANCES) for size in sizes}
    return cost.growth([(size, cost.measure_kept(method, part, "finetune", config)) for size, part in parts.items()])


def saved_bytes(method, batch, config):
    """What autograd saves in a real forward pass: different storages, without weights, buffers and the batch itself."""
    prepared = method.prepare(batch)
    known = [*method.parameters(), *method.buffers(), *tensors_of(prepared)]
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept alive, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cost.autocast(method, config):
        losses = method.losses(batch, "finetune")
    assert losses
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["irra", "bdam", "hpl", "clip-reid", "interpart"])
def test_activations_of_parts_of_a_batch_foretell_what_autograd_saves_of_the_whole(name, precision, folder):
    config = CONFIG.replace(precision=precision)
    # As few words as there can be, one of each text: how many IRRA hides is chance, and what it asks about each word is
    # large beside these small towers.
    changes = {"mask_rate": 1e-6} if name == "irra" else {}
    method, _ = trained(name, **changes)
    batch = training_batch(method, folder, range(SIZE))
    curves = grown(method, batch, config)
    assert curves.encode(SIZE) + curves.losses(SIZE) == pytest.approx(saved_bytes(method, batch, config), rel=0.1)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("name", ["clip", "hpl", "clip-reid"])
def test_the_peak_of_a_real_step_is_as_foretold(name, accumulate, folder):
    config = CONFIG.replace(accumulate=accumulate)
    method, optimizer = trained(name, config)
    batch = training_batch(method, folder, range(SIZE))
    foretold = grown(method, batch, config).activations(SIZE, accumulate=accumulate)
    step = Step(method, optimizer, config, "finetune")
    step(batch, check=lambda _: None)  # the optimiser's state is there from now on
    with cost.Alive() as alive:
        alive.ignored = cost.shapes_of_weights(method)
        step(batch, check=lambda _: None)
    # On the CPU the passes are copies of the batch; on a GPU they wait in the memory of the host.
    copies = 0 if accumulate == 1 else sum(tensor.nbytes for tensor in tensors_of(batch))
    assert foretold + copies == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("name", ["clip", "hpl"])
def test_checkpointing_keeps_less_and_what_it_computes_again_is_seen(name, folder):
    method, _ = trained(name)
    batch = training_batch(method, folder, range(SIZE))
    plain = grown(method, batch, CONFIG)
    method.backbone.set_grad_checkpointing(True)
    frugal = grown(method, batch, CONFIG)
    whole = cost.measure_kept(method, batch, "finetune", CONFIG)
    assert frugal.encode(SIZE) < 0.8 * plain.encode(SIZE)
    assert frugal.encode(SIZE) + frugal.losses(SIZE) == pytest.approx(whole.encode + whole.losses, rel=0.02)
    assert frugal.spike(SIZE) == pytest.approx(whole.spike, rel=0.05)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", ["clip", "hpl"])
def test_operations_of_parts_of_a_batch_foretell_those_of_a_real_step(name, accumulate, folder):
    config = CONFIG.replace(accumulate=accumulate)
    method, optimizer = trained(name, config)
    batch = training_batch(method, folder, range(SIZE))
    points = [
        (size, cost.count_operations(method, cost.part_of(batch, size, INSTANCES), "finetune", config, count_flops,
                                     forward=True))
        for size in (16, 24, 32)
    ]  # fmt: skip
    step = Step(method, optimizer, config, "finetune")
    real = count_flops(lambda: step(batch, check=lambda _: None), method)
    assert cost.work(points).step(SIZE, accumulate=accumulate) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("name", SETTINGS)
def test_measuring_changes_no_weight_and_leaves_no_gradient(name, folder):
    method, _ = trained(name)
    batch = training_batch(method, folder, range(16))
    before = {key: value.clone() for key, value in method.named_parameters()}
    kept = cost.measure_kept(method, batch, "finetune", CONFIG)
    found = cost.count_operations(method, batch, "finetune", CONFIG, count_flops, forward=True)
    assert kept.encode + kept.losses > 0 and kept.spike >= 0 and found.encode + found.losses > 0
    assert all(torch.equal(value, before[key]) for key, value in method.named_parameters())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_several_devices_hold_their_share_and_what_the_losses_read_of_the_rest():
    curves = cost.Growth(*(cost.Curve((slope, 0.0)) for slope in (100.0, 0.0, 10.0, 5.0)), measured=8)
    one, two = curves.activations(8), curves.activations(8, devices=2)
    assert one == 8 * 105 and two == 4 * 105 + 4 * 10
    # Features and their gradients of the whole batch, and the graph of one of four passes.
    assert curves.activations(8, accumulate=4) == 2 * 8 * 10 + 2 * 105


def test_a_curve_finds_the_polynomial_and_is_never_negative():
    points = [(size, 3.0 * size**2 - 2 * size + 7) for size in (2, 5, 9)]
    assert cost.curve(points, 2)(64) == pytest.approx(3 * 64**2 - 2 * 64 + 7)
    assert cost.curve([(4, 10.0)], 2)(64) == pytest.approx(10)
    assert cost.curve([(2, 10.0), (4, 2.0)], 1)(64) == 0
    # Parts that are not alike bend the wrong way: a line is left.
    assert cost.curve([(16, 116.0), (20, 167.0), (24, 204.0)], 2)(48) > 400


def test_only_new_storages_count_and_only_as_long_as_they_live():
    weight = torch.zeros(100, 100, requires_grad=True)
    inputs = torch.zeros(50, 100)
    with cost.Alive() as alive:
        view = weight.t().reshape(-1)[:10]
        assert alive.now == 100 * 100 * 4  # `reshape` copies; `t` and the slice do not
        del view
        hidden = inputs @ weight
        out = hidden.exp()
        del hidden
        assert alive.now == 50 * 100 * 4  # `exp` keeps its result, nobody keeps its input
        total = out.sum()
        del out
        assert alive.now == 50 * 100 * 4 + 4
        total.backward()
        assert alive.now == 4 + 100 * 100 * 4
    assert alive.peak >= 100 * 100 * 4 + 50 * 100 * 4


def batch_of(people, has_text=None):
    people, told = torch.tensor(people), None if has_text is None else torch.tensor(has_text)
    texts = len(people) if told is None else int(told.sum())
    lengths = torch.arange(texts) % 7 + 3
    tokens = Tokens(torch.arange(texts)[:, None].expand(texts, 9).clone(), torch.arange(9)[None] < lengths[:, None])
    image = torch.arange(len(people)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Batch(image=image, person=people, texts={"full": tokens}, has_text=told).located()


def rows_of(batch):
    return batch.image[:, 0, 0, 0].int().tolist()


def test_a_part_has_whole_people_and_texts_as_long_as_the_batch():
    batch = batch_of([5] * 4 + [2] * 4 + [9] * 4)
    assert rows_of(cost.part_of(batch, 8, 4)) == list(range(8))
    assert rows_of(cost.part_of(batch, 4, 4)) == [0, 1, 4, 5]
    part = cost.part_of(batch, 3, 4)
    assert rows_of(part) == [0, 1, 4] and part.person.tolist() == [5, 5, 2]
    assert part.texts["full"].ids.shape == (3, 9) and part.texts["full"].ids[:, 0].tolist() == [0, 1, 4]
    assert cost.part_of(batch, 12, 4) is batch
    random = batch_of([5, 2, 9, 5, 1])
    assert rows_of(cost.part_of(random, 3, 1)) == [0, 1, 2]


def test_a_part_of_a_mixed_batch_has_both_kinds_and_the_texts_of_its_samples():
    batch = batch_of([0, 0, 1, 1, 2, 2, 3, 3] * 2, [True] * 8 + [False] * 8)
    part = cost.part_of(batch, 8, 2)
    assert rows_of(part) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert part.has_text.tolist() == [True] * 4 + [False] * 4 and part.texts["full"].ids[:, 0].tolist() == [0, 1, 2, 3]
    assert least_samples(batch, 4) == 8 and least_samples(batch_of([0, 0, 1, 1]), 1) == 2


def test_the_sizes_reach_the_batch_where_time_allows_and_stop_at_a_bound():
    seen = []

    def measure(size):
        seen.append(size)
        return size

    found = cost.sizes_measured(measure, 64, 4, seconds=5.0)
    assert (
        [size for size, _ in found[:3]] == [4, 34, 64] and len(found) == 12 and all(size == got for size, got in found)
    )
    assert seen[0] == 4 and sorted(seen) == sorted(size for size, _ in found)
    bounded = cost.sizes_measured(measure, 64, 4, seconds=5.0, most=lambda first: 3 * first)
    assert max(size for size, _ in bounded) == 12
    assert {size for size, _ in cost.sizes_measured(measure, 64, 4, seconds=0.0)} == {4, 5, 6}
    assert {size for size, _ in cost.sizes_measured(measure, 3, 4, seconds=0.0)} == {3}
    # Whole people, as far as there is time for two of them.
    assert {size for size, _ in cost.sizes_measured(measure, 62, 4, seconds=5.0, instances=4)} == {12, 28, 62}
    assert {size for size, _ in cost.sizes_measured(measure, 62, 4, seconds=0.0, instances=4)} == {4, 5, 6}
