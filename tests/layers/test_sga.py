"""The Semantic Grouping Adapter: every formula beside a slow version of it, and what must not mix with what."""

import math

import pytest
import torch
from torch.nn import functional

from reidctl.backbones.weights import build
from reidctl.errors import UsageError
from reidctl.layers.sga import GlobalContext, GroupEma, GroupGate, SemanticGroupingAdapter, SgaConfig
from reidctl.methods.base import build_method

WIDTH, GROUPS, GRID = 12, 3, (3, 2)
INNER = WIDTH // GROUPS
KINDS = ("gate", "linear", "ema")


def adapter(kind="gate", *, gamma=0.5, **changes):
    """An adapter with random weights everywhere, in double precision."""
    torch.manual_seed(0)
    made = SemanticGroupingAdapter(
        WIDTH, SgaConfig(groups=GROUPS, kind=kind, reduction=3, gamma_init=gamma, **changes)
    ).double()
    with torch.no_grad():
        for parameter in [*made.local.parameters(), *made.context.parameters()]:
            parameter.copy_(0.6 * torch.randn_like(parameter))
        made.fusion.copy_(torch.tensor([0.3, -0.4]))
    return made


def tokens(batch=2, grid=GRID, width=WIDTH):
    made = torch.randn(batch, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(1))
    return made.double()


def as_map(x, grid=GRID):
    """Token r * w + c at row r and column c, place by place."""
    rows, columns = grid
    found = torch.zeros(len(x), x.shape[2], rows, columns, dtype=x.dtype)
    for row in range(rows):
        for column in range(columns):
            found[:, :, row, column] = x[:, row * columns + column]
    return found


# Slow versions


def slow_convolutions(layer, x):
    """Group after group: each channel's own 3x3, then a matrix of the group's channels."""
    parts = []
    for first in range(0, WIDTH, INNER):
        own = range(first, first + INNER)
        each = [
            functional.conv2d(
                x[:, c : c + 1], layer.depthwise.weight[c : c + 1], layer.depthwise.bias[c : c + 1], padding=1
            )
            for c in own
        ]
        matrix, shift = (
            layer.pointwise.weight[first : first + INNER, :, 0, 0],
            layer.pointwise.bias[first : first + INNER],
        )
        parts.append(functional.linear(torch.cat(each, 1).permute(0, 2, 3, 1), matrix, shift).permute(0, 3, 1, 2))
    return torch.cat(parts, 1)


def slow_ema(layer, x):
    """Efficient Multi-scale Attention, picture by picture and group by group (Ouyang et al. 2023, figure 2b)."""
    found = torch.zeros_like(x)
    matrix, shift = layer.pointwise.weight[:, :, 0, 0], layer.pointwise.bias
    rows, columns = x.shape[2:]
    for picture in range(len(x)):
        for first in range(0, WIDTH, INNER):
            part = x[picture, first : first + INNER]  # (c, h, w)
            down = torch.stack([matrix @ part[:, row].mean(dim=1) + shift for row in range(rows)], 1)
            across = torch.stack([matrix @ part[:, :, column].mean(dim=1) + shift for column in range(columns)], 1)
            first_branch = []
            for channel in range(INNER):
                places = [
                    part[channel, row, column]
                    * torch.sigmoid(down[channel, row])
                    * torch.sigmoid(across[channel, column])
                    for row in range(rows)
                    for column in range(columns)
                ]
                weighted = torch.stack(places).reshape(rows, columns)
                normed = (weighted - weighted.mean()) / (weighted.var(unbiased=False) + 1e-5).sqrt()
                first_branch.append(normed * layer.norm.weight[channel] + layer.norm.bias[channel])
            second_branch = functional.conv2d(part[None], layer.conv.weight, layer.conv.bias, padding=1)[0]
            weights = 0
            for pooled, seen in ((first_branch, second_branch), (second_branch, first_branch)):
                score = torch.stack([pooled[channel].mean() for channel in range(INNER)])
                share = score.exp() / score.exp().sum()
                weights = weights + sum(share[channel] * seen[channel] for channel in range(INNER))
            found[picture, first : first + INNER] = part / (1 + torch.exp(-weights))
    return found


def slow_context(layer, x, gated):
    found = torch.zeros_like(x)
    for picture in range(len(x)):
        mean = torch.stack([x[picture, channel].mean() for channel in range(WIDTH)])
        inner = (layer.squeeze.weight @ mean + layer.squeeze.bias).clamp_min(0)
        vector = layer.excite.weight @ inner + layer.excite.bias
        for channel in range(WIDTH):
            one = vector[channel]
            found[picture, channel] = x[picture, channel] * torch.sigmoid(one) if gated else one
    return found


def slow(made, kind, context, x, grid):
    picture = as_map(x, grid)
    if kind == "ema":
        local = slow_ema(made.local, picture)
    else:
        changed = slow_convolutions(made.local, picture)
        local = torch.sigmoid(changed) * picture if kind == "gate" else changed
    whole = slow_context(made.context, picture, context == "gate")
    one, other = made.fusion.exp() / made.fusion.exp().sum()
    mixed = one * local + other * whole
    found = x.clone()
    for row in range(grid[0]):
        for column in range(grid[1]):
            found[:, row * grid[1] + column] += made.gamma * mixed[:, :, row, column]
    return found


@pytest.mark.covers(207, 208, 209, 210, 211)
@pytest.mark.parametrize("grid", [(3, 2), (2, 3)])
@pytest.mark.parametrize("context", ["gate", "broadcast"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_its_formula_written_out_group_by_group_and_place_by_place(kind, context, grid):
    made, x = adapter(kind, context=context), tokens()
    with torch.no_grad():
        found, expected = made(x, grid), slow(made, kind, context, x, grid)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert (found - x).abs().max() > 0.1
    # In the precision of training.
    with torch.no_grad():
        torch.testing.assert_close(made.float()(x.float(), grid).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_s_gradients_are_those_of_the_slow_version(kind):
    made, x = adapter(kind), tokens().requires_grad_()
    of = [x, *made.parameters()]
    fast = torch.autograd.grad(made(x, GRID).square().sum(), of)
    other = torch.autograd.grad(slow(made, kind, "gate", x, GRID).square().sum(), of)
    for one, two in zip(fast, other, strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-8)


# Groups


def mixing(call, x):
    """Which output channel (rows) reads which input channel (columns): the largest absolute derivative."""
    jacobian = torch.autograd.functional.jacobian(call, x)
    return jacobian.abs().amax(dim=(0, 2, 3, 4, 6, 7))


@pytest.mark.covers(207)
@pytest.mark.parametrize("kind", KINDS)
def test_no_channel_of_the_local_stream_reads_one_of_another_group_and_every_one_of_its_own(kind):
    made, picture = adapter(kind), as_map(tokens(1))
    found = mixing(made.local, picture)
    group = torch.arange(WIDTH) // INNER
    own = group[:, None] == group[None, :]
    assert (found[~own] == 0).all(), "exactly"
    assert (found[own] > 0).all()
    # The global stream is what lets groups see each other.
    assert (mixing(made.context, picture) > 0).all()


@pytest.mark.covers(207)
def test_ema_has_one_set_of_weights_for_all_groups_and_the_convolutions_one_per_group():
    shared = GroupEma(WIDTH, GROUPS)
    assert shared.conv.weight.shape == (INNER, INNER, 3, 3)
    own = GroupGate(WIDTH, GROUPS)
    assert own.depthwise.weight.shape == (WIDTH, 1, 3, 3) and own.pointwise.weight.shape == (WIDTH, INNER, 1, 1)
    x = tokens(1)
    x[:, :, INNER : 2 * INNER] = x[:, :, :INNER]
    with torch.no_grad():
        found = {kind: adapter(kind).local(as_map(x)) for kind in KINDS}
    for kind, value in found.items():
        assert torch.equal(value[:, :INNER], value[:, INNER : 2 * INNER]) == (kind == "ema"), kind


@pytest.mark.covers(207)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_do_not_divide_the_channels_are_refused(kind):
    with pytest.raises(ValueError, match="5 groups do not divide 12 channels"):
        SemanticGroupingAdapter(WIDTH, SgaConfig(groups=5, kind=kind))
    with pytest.raises(UsageError, match=r"`mta-clip` cannot be built.*5 groups do not divide 32 channels"):
        build_method("mta-clip", {"sga": {"groups": 5, "kind": kind}, "unfreeze_blocks": 1}, build("clip:micro"), 3)


@pytest.mark.covers(207, 208, 209)
def test_at_clip_s_width_the_defaults_are_eight_groups_of_96_and_an_inside_of_48():
    made = SemanticGroupingAdapter(768, SgaConfig())
    assert made.local.depthwise.weight.shape == (768, 1, 3, 3)
    assert made.local.pointwise.weight.shape == (768, 96, 1, 1)
    assert made.context.squeeze.weight.shape == (48, 768) and made.context.excite.weight.shape == (768, 48)
    assert made.gamma.item() == 0 and made.shares.tolist() == [0.5, 0.5]
    assert SgaConfig().enabled and SgaConfig().readout == "cls_plus_gap"
    assert GlobalContext(4, 16).squeeze.weight.shape == (1, 4), "never of no width"


# Gates


@pytest.mark.covers(208)
@pytest.mark.parametrize("kind", ["gate", "ema"])
def test_the_local_gate_lies_strictly_between_zero_and_one_and_multiplies_the_input(kind):
    made, picture = adapter(kind), as_map(tokens(3))
    with torch.no_grad():
        gate = made.local.gate(picture)
        assert gate.shape == picture.shape and gate.min() > 0 and gate.max() < 1
        assert gate.max() - gate.min() > 0.2
        torch.testing.assert_close(made.local(picture), gate * picture)
        assert (made.local(torch.zeros_like(picture)) == 0).all()
    each = gate.unflatten(1, (GROUPS, INNER))
    # ema: one number per place and group; gate: one per place and channel.
    assert (each.std(dim=2).max() < 1e-12) == (kind == "ema")


@pytest.mark.covers(208)
def test_linear_replaces_the_channels_instead_of_multiplying_them():
    made, picture = adapter("linear"), as_map(tokens())
    with torch.no_grad():
        zero = made.local(torch.zeros_like(picture))
        once, twice = made.local(picture) - zero, made.local(2 * picture) - zero
    torch.testing.assert_close(twice, 2 * once)
    assert zero.abs().max() > 0


@pytest.mark.covers(209)
def test_the_global_gate_reads_the_mean_of_the_tokens_and_nothing_else():
    made, x = adapter(), tokens(1)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    noise = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(3)).double()

    def gate(value):
        with torch.no_grad():
            return made.gates(value, GRID)["global"]

    def local(value):
        with torch.no_grad():
            return made.gates(value, GRID)["local"]

    before = gate(x)
    assert before.shape == (1, WIDTH) and before.min() > 0 and before.max() < 1
    same_mean = x + noise - noise.mean(dim=1, keepdim=True)
    for other in (x[:, order], same_mean):
        torch.testing.assert_close(gate(other), before, atol=1e-12, rtol=0)
        assert not torch.allclose(local(other), local(x), atol=1e-6, rtol=0), "the local one reads places"
    assert (gate(x + 0.5) - before).abs().max() > 1e-3
    # And it is one gate for all places.
    with torch.no_grad():
        stream = made.context(as_map(x)) / as_map(x)
    torch.testing.assert_close(stream, before[:, :, None, None].expand_as(stream))


@pytest.mark.covers(209)
def test_a_broadcast_context_adds_one_vector_to_every_place():
    made, x = adapter(context="broadcast"), tokens(2)
    with torch.no_grad():
        stream = made.context(as_map(x)).flatten(2)
        vector = made.context.context(as_map(x))
    assert torch.equal(stream, vector[:, :, None].expand_as(stream)) and vector.min() < 0
    assert not torch.allclose(vector[0], vector[1])


def test_streams_without_a_gate_are_left_out_of_the_gates():
    x = tokens()
    for kind in KINDS:
        for context in ("gate", "broadcast"):
            found = adapter(kind, context=context).gates(x, GRID)
            expected = {name for name, there in (("local", kind != "linear"), ("global", context == "gate")) if there}
            assert set(found) == expected
            assert all(value.shape == (2, WIDTH) for value in found.values())


# Fusion and residual


@pytest.mark.covers(210)
@pytest.mark.parametrize("kind", KINDS)
def test_the_softmax_shares_sum_to_one_and_learn(kind):
    made, x = adapter(kind), tokens()
    before = made.shares.detach().clone()
    assert before.sum().item() == pytest.approx(1) and before.min() > 0
    assert before[0].item() == pytest.approx(math.exp(0.3) / (math.exp(0.3) + math.exp(-0.4)))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    (made(x, GRID) - tokens().flip(1)).square().mean().backward()
    assert made.fusion.grad.abs().min() > 0
    optimizer.step()
    after = made.shares.detach()
    assert (after - before).abs().max() > 1e-6 and after.sum().item() == pytest.approx(1)


@pytest.mark.covers(210)
def test_a_share_of_one_leaves_one_stream_alone():
    made, x = adapter(), tokens()
    for place, stream in ((0, made.local), (1, made.context)):
        with torch.no_grad():
            made.fusion.copy_(torch.tensor([-60.0, -60.0]))
            made.fusion[place] = 60.0
            expected = x + 0.5 * stream(as_map(x)).flatten(2).transpose(1, 2)
            torch.testing.assert_close(made(x, GRID), expected)


@pytest.mark.covers(211)
@pytest.mark.parametrize("context", ["gate", "broadcast"])
@pytest.mark.parametrize("kind", KINDS)
def test_gamma_zero_returns_the_tokens_bit_for_bit_and_another_gamma_does_not(kind, context):
    x = tokens().float()
    with torch.no_grad():
        assert torch.equal(adapter(kind, gamma=0.0, context=context).float()(x, GRID), x)
        assert not torch.allclose(adapter(kind, gamma=1e-3, context=context).float()(x, GRID), x, atol=1e-5)


@pytest.mark.covers(211)
@pytest.mark.parametrize("kind", KINDS)
def test_from_gamma_zero_the_first_step_moves_gamma_alone_and_the_second_everything(kind):
    made, x = adapter(kind, gamma=0.0), tokens()
    target = tokens().flip(1)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (made(x, GRID) - target).square().mean().backward()
        for name, parameter in made.named_parameters():
            reached = parameter.grad.abs().max().item()
            assert (reached > 0) == (name == "gamma" or step == 1), (step, name)
        optimizer.step()
    assert made.gamma.item() != 0


# Places and pictures


def test_a_place_reaches_its_neighbours_on_the_grid_and_not_those_in_the_row_of_tokens():
    """A grid of 4 x 3: the token after the last of a row begins the next row, at the other side."""
    made, grid = adapter("linear"), (4, 3)
    with torch.no_grad():
        x = torch.zeros(1, 12, WIDTH).double()
        nothing = made.local(as_map(x, grid))
        x[0, 2] = 1.0  # row 0, column 2
        changed = (made.local(as_map(x, grid)) - nothing).abs().amax(dim=(0, 1))
    near = [(row, column) for row in (0, 1) for column in (1, 2)]
    for row in range(4):
        for column in range(3):
            assert (changed[row, column] > 0) == ((row, column) in near), (row, column)
    # The whole adapter with all weight on the local stream says the same of tokens.
    with torch.no_grad():
        made.fusion.copy_(torch.tensor([80.0, -800.0]).double())
        moved = (made(x, grid) - made(torch.zeros_like(x), grid) - x)[0].abs().amax(dim=1)
    assert (moved > 0).nonzero().flatten().tolist() == sorted(3 * row + column for row, column in near)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_adapted_alike_whatever_stands_beside_it(kind):
    made, x = adapter(kind), tokens(4)
    with torch.no_grad():
        whole = made.train()(x, GRID)
        for order in (torch.tensor([2]), torch.tensor([3, 0])):
            torch.testing.assert_close(made(x[order], GRID), whole[order], atol=1e-12, rtol=0)
        torch.testing.assert_close(made.eval()(x, GRID), whole, atol=0, rtol=0)
        assert made(x[:0], GRID).shape == (0, 6, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_half_precision_stay_finite_and_near(kind):
    made, x = adapter(kind).float(), tokens().float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = made(x, GRID)
    with torch.no_grad():
        torch.testing.assert_close(narrow.float(), made(x, GRID), atol=0.05, rtol=0.05)


def test_a_grid_of_another_number_of_places_is_an_error():
    with pytest.raises(RuntimeError):
        adapter()(tokens(), (2, 2))
