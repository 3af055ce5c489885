"""Costs against counts worked by hand, on every method."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from methods.test_method_contract import SETTINGS, model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from reidctl.backbones.weights import build
from reidctl.errors import UsageError
from reidctl.evaluation.efficiency import (
    compare_fusions,
    costs_table,
    count_flops,
    example_batch,
    graph_leaves,
    kept_bytes,
    measure_costs,
    scan_flops,
    seconds,
)
from reidctl.layers.fusion import Fusion
from reidctl.layers.mamba import Mamba, MambaStack
from reidctl.methods.clip import Clip


def forward_flops(module, *inputs):
    with torch.no_grad():
        return count_flops(lambda: module(*inputs), module)


def attention_flops(length, width):
    """Query, key, value and output maps, then scores and their products with the values."""
    return 4 * 2 * length * width * width + 4 * length * length * width


def encoder(width=16, dropout=0.0):
    layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


@pytest.mark.covers(161, 233)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_costs_two_operations_per_row_input_and_output(bias):
    assert forward_flops(nn.Linear(7, 5, bias=bias), torch.zeros(11, 7)) == 2 * 11 * 7 * 5


@pytest.mark.covers(233)
def test_a_convolution_costs_two_operations_per_output_and_tap():
    assert forward_flops(nn.Conv2d(3, 8, 4, stride=4), torch.zeros(2, 3, 16, 8)) == 2 * (2 * 8 * 4 * 2) * (3 * 4 * 4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_every_gradient_of_a_convolution_costs_its_forward_pass_however_many_groups(kind, groups):
    layer = kind(4, 8, 3, groups=groups)
    for inputs in (torch.zeros(2, 4, 9), torch.zeros(2, 4, 9, requires_grad=True)):
        forward = forward_flops(layer, inputs)
        both = count_flops(lambda x=inputs: layer(x).sum().backward(), layer)
        assert both == (3 if inputs.requires_grad else 2) * forward


@pytest.mark.covers(233)
def test_a_product_with_a_vector_counts_like_any_other():
    matrix, vector = torch.zeros(6, 4), torch.zeros(4)
    assert count_flops(lambda: matrix @ vector, nn.Identity()) == 2 * 6 * 4
    assert count_flops(lambda: vector @ vector, nn.Identity()) == 2 * 4


@pytest.mark.covers(161, 233)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_counted_on_every_path_of_an_encoder(training, gradients, dropout):
    module, x, length, width = encoder(dropout=dropout).train(training), torch.zeros(2, 10, 16), 10, 16
    expected = 3 * 2 * (attention_flops(length, width) + 2 * 2 * length * width * 4 * width)
    with torch.set_grad_enabled(gradients):
        assert count_flops(lambda: module(x), module) == expected


def test_the_counter_alone_sees_nothing_on_the_fast_path_which_is_why_it_is_switched_off():
    module, x = encoder().eval(), torch.zeros(2, 10, 16)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() < forward_flops(module, x)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_fused_operation_that_would_count_nothing_is_an_error_and_not_a_zero():
    module, x = encoder().eval(), torch.zeros(2, 10, 16)

    def sneaky():
        torch.backends.mha.set_fastpath_enabled(True)
        module(x)

    with torch.no_grad(), pytest.raises(AssertionError, match="would count as 0"):
        count_flops(sneaky, module)


@pytest.mark.covers(233)
@pytest.mark.parametrize("spec", ["clip", "bdam"])
def test_an_image_tower_costs_the_closed_formula_of_a_vision_transformer(spec):
    method = model(spec)
    images = example_batch(method, 2, text_length=5).image
    with torch.no_grad():
        counted = count_flops(lambda: method.backbone.encode_image(images), method)
    tower, dim = method.backbone.image, method.backbone.dim
    patches, width = tower.grid[0] * tower.grid[1], tower.width
    length = patches + 1
    hidden = tower.last_mlp_weight.shape[1]
    block = attention_flops(length, width) + 2 * 2 * length * width * hidden
    embedding = 2 * patches * width * 3 * tower.patch_size[0] * tower.patch_size[1]
    assert counted == 2 * (embedding + len(tower.blocks) * block + 2 * length * width * dim)


def hand_counted_mamba(batch, length, width, inner, states, taps, rank, scans=1):
    tokens = batch * length
    return scans * (
        2 * tokens * width * 2 * inner  # in_proj
        + 2 * batch * (length + taps - 1) * inner * taps  # the convolution runs over its padding too
        + 2 * tokens * inner * (rank + 2 * states)  # x_proj
        + 2 * tokens * rank * inner  # dt_proj
        + tokens * inner * (5 * states + 3)  # decay, drive, recurrence, skip
        + 2 * tokens * inner * states  # C h
        + 2 * tokens * inner * width  # out_proj
    )


@pytest.mark.covers(161, 233)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_a_mamba_layer_costs_what_its_equations_say(length, bidirectional):
    layer = Mamba(8, d_state=4, dt_rank=3, bidirectional=bidirectional)
    counted = forward_flops(layer, torch.zeros(2, length, 8))
    assert counted == hand_counted_mamba(2, length, 8, 16, 4, 4, 3, scans=1 + bidirectional)


def test_a_scan_of_one_token_one_channel_and_one_state_is_eight_operations():
    # exp(d * a) * h + (d * x) * b, and + D * x: products 5, sums 2, exp 1; C h is the counter's.
    assert scan_flops(1, 1, 1) == 8


@pytest.mark.covers(233)
def test_a_backward_pass_costs_two_forward_passes():
    layer = nn.Linear(7, 5)
    x = torch.zeros(11, 7, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward(), layer) == 3 * 2 * 11 * 7 * 5
    mamba, u = Mamba(8, d_state=4, dt_rank=3), torch.zeros(2, 5, 8, requires_grad=True)
    both = count_flops(lambda: mamba(u).sum().backward(), mamba)
    assert both == 3 * hand_counted_mamba(2, 5, 8, 16, 4, 4, 3)


def test_counting_leaves_the_choice_of_kernel_and_no_hooks_behind():
    layer = Mamba(8)
    forward_flops(layer, torch.zeros(1, 3, 8))
    assert layer.use_kernel == "auto" and not layer._forward_hooks


@pytest.mark.covers(161, 233)
def test_kept_bytes_are_the_activations_that_the_backward_pass_reads():
    first, last, x = nn.Linear(8, 16), nn.Linear(16, 2), torch.zeros(4, 8)
    known = [x, *first.parameters(), *last.parameters()]
    # ReLU keeps its output, which the next layer keeps too; GELU keeps its input besides.
    assert kept_bytes(lambda: last(first(x).relu()), known) == 4 * 16 * 4
    assert kept_bytes(lambda: last(nn.functional.gelu(first(x))), known) == 2 * 4 * 16 * 4
    assert kept_bytes(lambda: last(first(x)), known) == 4 * 16 * 4
    with torch.no_grad():
        assert kept_bytes(lambda: last(first(x).relu()), known) == 0
    with_inputs = kept_bytes(lambda: last(first(x * 2).relu()), known)
    assert with_inputs == 4 * 16 * 4 + 4 * 8 * 4  # what the pass itself makes of its inputs counts


def test_what_a_checkpoint_keeps_to_compute_again_is_counted():
    layer, x = nn.Linear(8, 8), torch.zeros(4, 8, requires_grad=True)
    known = [x, *layer.parameters()]
    deep = lambda y: nn.functional.gelu(nn.functional.gelu(y))  # noqa: E731
    plain = kept_bytes(lambda: deep(layer(x)), known)
    again = kept_bytes(lambda: checkpoint(deep, layer(x), use_reentrant=False), known)
    assert plain == 2 * 4 * 8 * 4  # the inputs of both GELUs
    assert again == 4 * 8 * 4  # the input of the first


@pytest.mark.covers(161)
def test_kept_bytes_of_a_scan_hold_a_state_per_chunk_and_not_per_token():
    def kept(length):
        layer = Mamba(32)
        return kept_bytes(lambda: layer(torch.zeros(1, length, 32)), layer.parameters())

    per_token = (kept(1024) - kept(512)) / 512
    state, inner = 64 * 16 * 4, 64 * 4  # bytes of one token's (E, N) state and of one (E,) row
    assert state / 64 < per_token < state
    assert per_token > 5 * inner


@pytest.mark.covers(161, 233)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_has_costs_for_its_parts_and_stays_as_it_was(name):
    method = model(name).train()
    weights = {key: value.clone() for key, value in method.state_dict().items()}
    required = [parameter.requires_grad for parameter in method.parameters()]
    random = torch.get_rng_state()
    found = measure_costs(method, batch=4, text_length=9, repeats=1)
    more = {"bdam": {"fusion"}, "interpart": {"ppim"}, "mta-clip": {"sga", "image_without_sga"}, "rde": {"tse"}}
    assert set(found) == {"image", "text", "step"} | more.get(name, set())
    reads_texts = bool(method.train_texts)
    for part, cost in found.items():
        trains = part != "text" or reads_texts
        assert cost.flops > 0 and cost.items_per_second > 0 and cost.peak_bytes is None
        assert (cost.kept_bytes > 0) == (cost.trainable > 0) == trains
        assert cost.trainable <= cost.parameters
        assert cost.milliseconds == pytest.approx(4e3 / cost.items_per_second)
    read = found["image"].flops + (found["text"].flops if reads_texts else 0)
    assert found["step"].flops > 2 * read
    assert method.training and torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in method.parameters())
    assert [parameter.requires_grad for parameter in method.parameters()] == required
    assert all(torch.equal(value, weights[key]) for key, value in method.state_dict().items())
    table = costs_table(found)
    assert list(table["name"]) == list(found) and table["parameters"].tolist() == [c.parameters for c in found.values()]


@pytest.mark.covers(233)
def test_parameters_are_those_that_a_part_reads():
    method = model("clip")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in method.backbone.named_children()}
    found = measure_costs(method, batch=2, text_length=9, repeats=1)
    assert found["image"].parameters == count["image"] and found["text"].parameters == count["text"]
    assert found["step"].parameters == count["image"] + count["text"]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_leaves_of_a_graph_are_what_autograd_finds_a_gradient_for(name):
    method = model(name)
    batch = example_batch(method, 4, text_length=9)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    for value in (method.embed_images(batch), *method.losses(batch, "finetune").values()):
        gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, retain_graph=True)
        with_gradient = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        assert graph_leaves(value) == with_gradient
    leaf = torch.zeros(2, requires_grad=True)
    assert graph_leaves(leaf) == graph_leaves(leaf * 2) == {id(leaf)} and not graph_leaves(leaf.detach() * 2)


@pytest.mark.covers(233)
def test_operations_and_memory_are_per_item_and_the_same_each_time():
    small, large, again = (measure_costs(model("bdam"), batch=b, text_length=9, repeats=1) for b in (2, 4, 4))
    for part in ("image", "text", "fusion"):
        assert small[part].flops == large[part].flops
        # What does not grow with the batch, such as exp(A_log), is shared by more items.
        assert large[part].kept_bytes <= small[part].kept_bytes < 1.05 * large[part].kept_bytes
    for part, cost in large.items():
        assert dataclasses.replace(cost, items_per_second=1.0) == dataclasses.replace(again[part], items_per_second=1.0)


@pytest.mark.covers(233)
def test_a_frozen_tower_is_not_trainable_and_keeps_less(monkeypatch):
    method = model("clip")
    whole = measure_costs(method, batch=2, text_length=9, repeats=1)

    plain = type(method).parameters_by_role

    def by_role(self, stage):
        return {"text": [], "new": [], "image": plain(self, stage)["image"]}

    monkeypatch.setattr(type(method), "parameters_by_role", by_role)
    frozen = measure_costs(method, batch=2, text_length=9, repeats=1)
    assert frozen["text"].parameters == whole["text"].parameters
    assert frozen["text"].trainable == 0 and frozen["text"].kept_bytes == 0
    assert frozen["step"].trainable == whole["image"].parameters
    assert frozen["step"].kept_bytes < whole["step"].kept_bytes


class Adapted(Clip):
    """`clip` with a module of its own that writes down how it is called."""

    calls: ClassVar[list[tuple[bool, bool]]] = []

    def __init__(self, config, backbone, persons):
        super().__init__(config, backbone, persons)
        self.adapter = nn.Linear(backbone.width_image, backbone.width_image)

    def extra_parts(self, batch):
        patches = self.backbone.encode_image(batch.require("image")).hidden_patches
        assert not self.training and not patches.requires_grad, "what a part reads is made without gradients"

        def adapt():
            self.calls.append((self.training, torch.is_grad_enabled()))
            return self.adapter(patches)

        return {"adapter": adapt}


@pytest.mark.covers(221)
def test_a_part_of_its_own_has_its_parameters_operations_and_time():
    torch.manual_seed(0)
    backbone = build("clip:micro")
    method = Adapted(Clip.Config(), backbone, 4)
    Adapted.calls.clear()
    found = measure_costs(method, batch=4, text_length=9, repeats=2)
    assert list(found) == ["image", "text", "adapter", "step"]
    part, width, patches = found["adapter"], backbone.width_image, backbone.grid[0] * backbone.grid[1]
    assert part.parameters == part.trainable == width * width + width
    assert part.flops == 2 * patches * width * width, "what it reads is made before, and not counted"
    assert part.milliseconds == pytest.approx(4e3 / part.items_per_second)
    assert Adapted.calls[-3:] == [(False, False)] * 3, "timed as in retrieval"
    assert method.training and all(p.grad is None for p in method.parameters())
    row = costs_table(found).set_index("name").loc["adapter"]
    assert row["parameters"] == part.parameters and row["milliseconds"] == part.milliseconds


@pytest.mark.covers(161)
def test_fusion_reads_all_patches_and_text_tokens_as_one_sequence():
    sizes = {"patches": 9, "text_length": 5, "width": 16, "out_dim": 6, "chunks": 2, "heads": 2, "batch": 2}
    found = compare_fusions(12, 10, repeats=1, **sizes)
    assert list(found) == ["simple", "transformer", "mamba"]
    pooled = 2 * (12 + 10) * 16 + 2 * 2 * 16 * 16 + 2 * 32 * 2 + 2 * 16 * 6  # both alignments, gate, projection
    tokens = 2 * (9 * 12 + 5 * 10) * 16 + 2 * 14 * 16 * 16  # the alignments of the tokens
    assert found["simple"].flops == pooled + 2 * 32 * 16
    assert found["transformer"].flops == pooled + tokens + 4 * (attention_flops(14, 16) + 2 * 2 * 14 * 16 * 64)
    assert found["mamba"].flops == pooled + tokens + 2 * hand_counted_mamba(1, 14, 16, 32, 16, 4, 1)
    assert found["simple"].parameters < found["mamba"].parameters < found["transformer"].parameters
    vector = compare_fusions(12, 10, repeats=1, sequence="vector", kinds=("mamba",), **sizes)["mamba"]
    assert vector.flops == pooled + 2 * hand_counted_mamba(1, 1, 16, 32, 16, 4, 1)


@pytest.mark.covers(161)
def test_fusion_of_a_method_is_measured_with_the_patches_of_its_backbone():
    method = model("bdam")
    grid = method.backbone.grid
    found = measure_costs(method, batch=2, text_length=9, repeats=1)["fusion"]
    sizes = {"patches": grid[0] * grid[1], "text_length": 9, "width": 16, "out_dim": 16}
    width = (method.backbone.width_image, method.backbone.width_text)
    same = compare_fusions(*width, batch=2, repeats=1, kinds=("mamba",), **sizes)["mamba"]
    assert found.flops == same.flops and found.kept_bytes == pytest.approx(same.kept_bytes)


@pytest.mark.covers(233)
def test_the_speed_is_that_of_the_median_pass(monkeypatch):
    times = iter([0.0, 9.0, 9.0, 9.1, 10.0, 10.3, 20.0, 20.2])  # the first pair warms up, then 0.1, 0.3 and 0.2
    monkeypatch.setattr("reidctl.evaluation.efficiency.time.perf_counter", lambda: next(times))
    assert seconds(lambda: None, 3) == pytest.approx([0.1, 0.3, 0.2])
    monkeypatch.setattr("reidctl.evaluation.efficiency.seconds", lambda run, repeats, device: [0.1, 7.0, 0.2])
    cost = compare_fusions(4, 4, patches=2, text_length=3, batch=6, repeats=3, kinds=("simple",))["simple"]
    assert cost.items_per_second == pytest.approx(6 / 0.2) and cost.milliseconds == pytest.approx(200)


@pytest.mark.covers(161)
def test_memory_is_that_of_training_so_dropout_masks_are_in_it():
    sizes = {"patches": 2, "text_length": 3, "batch": 4, "repeats": 1, "kinds": ("simple",), "width": 16, "chunks": 2}
    none, some = (compare_fusions(4, 4, dropout=p, **sizes)["simple"].kept_bytes for p in (0.0, 0.5))
    # Per alignment and channel a mask, of one byte or more.
    assert some >= none + 2 * 16


def test_bad_sizes_are_the_users_mistake():
    method = model("clip")
    for wrong in ({"batch": 0}, {"repeats": 0}, {"text_length": 2}, {"text_length": 10_000}):
        with pytest.raises(UsageError):
            measure_costs(method, **wrong)
    with pytest.raises(UsageError, match="patches"):
        compare_fusions(4, 4, patches=0, text_length=3)


def test_an_example_batch_has_full_texts_and_pairs_of_one_person():
    method = model("bdam")
    batch = example_batch(method, 6)
    assert batch.person.tolist() == [0, 0, 1, 1, 2, 2]
    tokens = batch.texts["full"]
    assert tokens.mask.all() and tokens.ids.shape == (6, method.backbone.context_length)
    assert (tokens.ids[:, 0] == method.backbone.tokenizer.start_id).all()
    assert not torch.equal(tokens.ids, batch.texts["clothing"].ids)
    assert torch.equal(example_batch(method, 6).image, batch.image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_counts_are_those_of_the_cpu_and_the_peak_is_reported():
    method = model("bdam")
    there, here = (measure_costs(method, batch=2, text_length=9, repeats=1, device=d) for d in ("cuda", "cpu"))
    for part, cost in there.items():
        assert cost.peak_bytes is not None and cost.peak_bytes > 4 * cost.parameters
        assert cost.parameters == here[part].parameters
        assert part == "step" or cost.flops == here[part].flops


def test_a_stack_counts_both_layers_and_a_fusion_without_mamba_none():
    assert forward_flops(MambaStack(2, 8), torch.zeros(1, 4, 8)) == 2 * forward_flops(Mamba(8), torch.zeros(1, 4, 8))
    assert forward_flops(Fusion(4, 4, width=8, kind="none"), torch.zeros(1, 4), torch.zeros(1, 4)) > 0
