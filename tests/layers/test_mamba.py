"""The Mamba layer against its recurrence, its closed form and transformers' implementation."""

import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from benchmarks.bench_mamba import fitted_exponent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reidctl.errors import UsageError
from reidctl.evaluation.efficiency import count_flops, kept_bytes
from reidctl.layers.fusion import _transformer
from reidctl.layers.mamba import Mamba, MambaStack, associative_scan, linear_scan, selective_scan


def sequence(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> Mamba:
    torch.manual_seed(seed)
    layer = Mamba(8, d_state=4, dt_rank=3, **options).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.dt_proj.bias.add_(3)  # long steps, so that the state both writes and forgets
    return layer


def slow_mamba(layer: Mamba, u: Tensor) -> Tensor:
    """The recurrence token by token, one line per printed equation."""
    x, z = (u @ layer.in_proj.weight.T).chunk(2, dim=-1)
    taps = layer.conv1d.weight.shape[-1]
    padded = torch.cat([x.new_zeros(x.shape[0], taps - 1, x.shape[2]), x], dim=1)
    convolved = sum(padded[:, k : k + x.shape[1]] * layer.conv1d.weight[:, 0, k] for k in range(taps))
    x = F.silu(convolved + layer.conv1d.bias)
    rank, n = layer.dt_proj.weight.shape[1], layer.A_log.shape[1]
    low, b, c = (x @ layer.x_proj.weight.T).split([rank, n, n], dim=-1)
    time = F.softplus(low @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    a, state, outputs = -layer.A_log.exp(), x.new_zeros(x.shape[0], x.shape[2], n), []
    for t in range(x.shape[1]):
        state = (time[:, t, :, None] * a).exp() * state + (time[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        outputs.append((state * c[:, t, None, :]).sum(-1) + layer.D * x[:, t])
    return (torch.stack(outputs, dim=1) * F.silu(z)) @ layer.out_proj.weight.T


@pytest.mark.covers(54, 138)
def test_parameter_counts_are_those_of_the_papers_sizes() -> None:
    assert sum(p.numel() for p in Mamba(256, 16, 4).parameters()) == 437_760
    assert sum(p.numel() for p in MambaStack(2, 256, d_state=16, d_conv=4).parameters()) == 875_520


@pytest.mark.covers(54)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 33, 64, 65, 150])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_layer_equals_the_explicit_recurrence_in_float64(length: int, chunk: int) -> None:
    layer, u = small(chunk=chunk), sequence(2, length, 8)
    assert torch.allclose(layer(u), slow_mamba(layer, u), atol=1e-9, rtol=0)


@pytest.mark.covers(54)
def test_layer_equals_the_explicit_recurrence_in_float32() -> None:
    layer, u = small(dtype=torch.float32), sequence(2, 100, 8, dtype=torch.float32)
    assert torch.allclose(layer(u), slow_mamba(layer, u), atol=1e-5, rtol=0)


@pytest.mark.covers(54)
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (13, 64), (45, 16)])
def test_gradients_equal_those_of_the_explicit_recurrence(length: int, chunk: int) -> None:
    layer, u = small(chunk=chunk), sequence(2, length, 8).requires_grad_()
    weight = sequence(2, length, 8, seed=1)
    wanted = [u, *layer.parameters()]
    slow = torch.autograd.grad((slow_mamba(layer, u) * weight).sum(), wanted)
    fast = torch.autograd.grad((layer(u) * weight).sum(), wanted)
    for ours, theirs in zip(fast, slow, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.covers(54)
def test_scan_gradients_are_those_of_finite_differences() -> None:
    decay, drive, state = sequence(2, 5, 3).sigmoid(), sequence(2, 5, 3, seed=1), sequence(2, 3, seed=2)
    inputs = [value.requires_grad_() for value in (decay, drive, state)]
    assert torch.autograd.gradcheck(linear_scan, inputs)


def test_scan_by_hand() -> None:
    decay = torch.tensor([[9.0, 0.5, 0.0, 1.0, 0.5]])  # the first factor has nothing to act on
    drive = torch.tensor([[2.0, 1.0, 3.0, -1.0, 4.0]])
    assert associative_scan(decay, drive).tolist() == [[2.0, 2.0, 3.0, 2.0, 5.0]]


@pytest.mark.covers(54)
def test_scan_neither_overflows_nor_loses_the_last_token_when_everything_is_forgotten() -> None:
    # exp(-cumulative sum) reaches e^20000 here: a scan that divides by it gives inf / inf.
    x = sequence(1, 200, 4, dtype=torch.float32)
    time, a = torch.full((1, 200, 4), 50.0), -torch.full((4, 2), 2.0)
    ones = torch.ones(1, 200, 2)
    y = selective_scan(x, time, a, ones, ones)
    assert torch.allclose(y, 2 * 50 * x)  # exp(-100) of the previous state is below float32's resolution


@pytest.mark.covers(54, 139)
def test_one_token_equals_the_closed_form_of_a_gated_mlp() -> None:
    layer, u = small(), sequence(3, 1, 8)
    x, z = layer.in_proj(u[:, 0]).chunk(2, dim=-1)
    x = F.silu(x * layer.conv1d.weight[:, 0, -1] + layer.conv1d.bias)
    low, b, c = layer.x_proj(x).split([3, 4, 4], dim=-1)
    y = (F.softplus(layer.dt_proj(low)) * (b * c).sum(-1, keepdim=True) + layer.D) * x
    assert torch.allclose(layer(u)[:, 0], layer.out_proj(y * F.silu(z)), atol=1e-12)


@pytest.mark.covers(54)
def test_a_future_change_leaves_past_outputs_bit_identical() -> None:
    layer, u = small(chunk=8), sequence(1, 30, 8)
    changed = u.clone()
    changed[:, 17:] += 1
    before, after = layer(u), layer(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.allclose(before[:, 17:], after[:, 17:])
    assert not torch.allclose(before[:, 29], after[:, 29])


@pytest.mark.covers(54)
def test_bidirectional_lets_the_past_see_the_future_and_is_equivariant_to_reversal() -> None:
    layer, u = small(bidirectional=True), sequence(1, 9, 8)
    changed = u.clone()
    changed[:, 8] += 1
    assert not torch.allclose(layer(u)[:, 0], layer(changed)[:, 0])
    assert torch.allclose(layer(u.flip(1)).flip(1), layer(u))
    one = sequence(1, 1, 8)
    assert torch.allclose(layer(one), small()(one))


@pytest.mark.covers(54, 139)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_at_the_end_changes_nothing_for_real_tokens(bidirectional: bool) -> None:
    layer, u = small(bidirectional=bidirectional), sequence(2, 12, 8)
    mask = torch.arange(12)[None, :] < torch.tensor([[12], [7]])
    padded = layer(u, mask)
    assert torch.allclose(padded[1, :7], layer(u[1:, :7])[0], atol=1e-12)
    assert torch.allclose(padded[0], layer(u[:1])[0], atol=1e-12)


def transformers_model(layers: int) -> torch.nn.Module:
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(3)
    config = MambaConfig(
        vocab_size=2, hidden_size=32, state_size=16, conv_kernel=4, expand=2, num_hidden_layers=layers, use_cache=False
    )
    return MambaModel(config).eval()


@pytest.mark.covers(54)
@pytest.mark.parametrize("length", [1, 5, 70])
def test_layer_equals_transformers_mixer_with_the_same_state_dict(length: int) -> None:
    mixer = transformers_model(1).layers[0].mixer
    layer = Mamba(32)
    with torch.no_grad():
        mixer.dt_proj.bias.copy_(layer.dt_proj.bias)  # a stand-alone mixer may start without the step lengths
    layer.load_state_dict(mixer.state_dict(), strict=True)
    u = sequence(2, length, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(layer(u), mixer(u), atol=1e-5, rtol=0)


@pytest.mark.covers(54)
def test_state_dict_names_and_shapes_equal_transformers_both_ways() -> None:
    theirs, ours = transformers_model(1).layers[0].mixer.state_dict(), Mamba(32).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
    transformers_model(1).layers[0].mixer.load_state_dict(ours, strict=True)


@pytest.mark.covers(55)
def test_prenorm_stack_equals_transformers_model() -> None:
    model, stack = transformers_model(3), MambaStack(3, 32, prenorm=True)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("embeddings")}
    stack.load_state_dict(weights, strict=True)
    u = sequence(2, 11, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(stack(u), model(inputs_embeds=u).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.covers(55)
def test_stack_with_zeroed_out_proj_is_the_identity() -> None:
    stack, u = MambaStack(2, 16, d_state=4), sequence(2, 6, 16, dtype=torch.float32)
    assert not torch.equal(stack(u), u)
    for block in stack.layers:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    assert torch.equal(stack(u), u)


@pytest.mark.covers(54)
def test_initial_step_lengths_state_matrix_and_skip() -> None:
    layer = Mamba()
    steps = F.softplus(layer.dt_proj.bias)
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    assert steps.log().std() > 1  # log-uniform over two decades: 4.6 / sqrt(12) = 1.33
    assert layer.dt_proj.weight.abs().max() <= 16**-0.5
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert (layer.D == 1).all()


@pytest.mark.covers(54, 148)
def test_a_log_and_d_are_flagged_and_stay_exact_in_float32_when_the_layer_is_cast() -> None:
    layer = Mamba(16)
    before = layer.A_log.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.in_proj.weight.dtype == torch.bfloat16
    assert layer.A_log.dtype == layer.D.dtype == torch.float32
    assert torch.equal(layer.A_log, before)
    flagged = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert flagged == {"A_log", "D"}


@pytest.mark.covers(57)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_finite_and_near_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    layer, u = Mamba(32), sequence(1, 70, 32, dtype=torch.float32)
    exact = layer(u)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(u)
    else:
        y = layer.to(torch.bfloat16)(u.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.covers(54)
def test_the_kernel_is_refused_on_cpu_and_never_used_by_auto() -> None:
    u = sequence(1, 4, 8, dtype=torch.float32)
    with pytest.raises(UsageError, match="cpu"):
        small(dtype=torch.float32, use_kernel="always")(u)
    assert small(dtype=torch.float32, use_kernel="auto")(u).isfinite().all()


@pytest.mark.covers(54)
def test_kernel_call_follows_mamba_ssms_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the kernel's documented signature and layout, (B, E, L) and (B, N, L), must give our output."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):  # type: ignore[no-untyped-def]
        assert delta_softplus and z is None and u.is_contiguous()
        delta = F.softplus(delta + delta_bias[:, None])
        state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            state = (delta[:, :, t, None] * A).exp() * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
            outputs.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
        return torch.stack(outputs, dim=2)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    layer, u = small(), sequence(2, 9, 8)
    mask = torch.arange(9)[None, :] < torch.tensor([[9], [4]])
    expected = layer(u, mask)
    monkeypatch.setattr(layer, "_kernel_wanted", lambda x: True)
    assert torch.allclose(layer(u, mask), expected, atol=1e-10)


LENGTHS = (64, 128, 256, 512, 1024, 2048)


def slopes(values: Sequence[float]) -> list[float]:
    """The exponent from each length to its double."""
    return [math.log2(after / before) for before, after in itertools.pairwise(values)]


def encoder(dropout: float) -> torch.nn.Module:
    """One layer and one head as in the fusion's comparator; with dropout no fused kernel fits on the CPU."""
    return _transformer(16, 1, 1, dropout).train()


def operations(model: torch.nn.Module, length: int) -> int:
    with torch.no_grad():
        return count_flops(lambda: model(torch.zeros(1, length, 16)), model)


def kept(model: torch.nn.Module, length: int) -> int:
    x = torch.zeros(1, length, 16)
    return kept_bytes(lambda: model(x), [x, *model.parameters()])


def test_fitted_exponent_by_hand() -> None:
    assert fitted_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert fitted_exponent([1, 2, 4], [1, 2, 1]) == pytest.approx(0)
    assert math.isnan(fitted_exponent([64], [1.0]))


@pytest.mark.covers(140)
def test_operations_grow_linearly_with_the_length_and_those_of_attention_towards_its_square() -> None:
    ours = [operations(MambaStack(2, 16), length) for length in LENGTHS]
    attention = [operations(encoder(0.0), length) for length in LENGTHS]
    assert fitted_exponent(LENGTHS, ours) == pytest.approx(1, abs=0.005)
    assert slopes(ours) == pytest.approx([1] * 5, abs=0.005)
    assert slopes(attention) == sorted(slopes(attention)) and 1.9 < slopes(attention)[-1] < 2
    assert 1.6 < fitted_exponent(LENGTHS, attention) < fitted_exponent(LENGTHS[3:], attention[3:]) < 2


@pytest.mark.covers(140)
def test_kept_memory_is_linear_in_the_length_and_quadratic_only_where_attention_holds_its_matrix() -> None:
    ours, fused, held = ([kept(build(), n) for n in LENGTHS] for build in (
        lambda: MambaStack(2, 16), lambda: encoder(0.0), lambda: encoder(0.1)))  # fmt: skip
    # A single chunk is not computed again, so 64 tokens keep all their states: the exponent is that of what follows.
    assert slopes(ours)[0] < 0
    assert fitted_exponent(LENGTHS[1:], ours[1:]) == pytest.approx(1, abs=0.02)
    assert fitted_exponent(LENGTHS, fused) == pytest.approx(1, abs=0.02)
    assert slopes(held) == sorted(slopes(held)) and 1.85 < slopes(held)[-1] < 2


@pytest.mark.covers(140)
def test_memory_kept_for_the_backward_pass_does_not_hold_the_states() -> None:
    layer = Mamba(16)
    states = 32 * 16 * 4  # bytes of one token's (E, N) state
    per_token = (kept(layer, 1024) - kept(layer, 512)) / 512
    assert states / 64 < per_token < states  # one state per chunk is, with what the maps around it keep


class Dispatched(TorchDispatchMode):
    """Counts operations that compute or copy; views cost nothing and are left out."""

    VIEWS = frozenset(
        {"slice", "select", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "t", "detach"}
        | {"alias", "split", "split_with_sizes", "as_strided", "permute"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += str(func).split(".")[1] not in self.VIEWS
        return func(*args, **(kwargs or {}))


def dispatched(run: Callable[[Tensor], Tensor], length: int, *, backward: bool) -> int:
    u = sequence(1, length, 8).requires_grad_(backward)
    with torch.set_grad_enabled(backward), Dispatched() as mode:
        y = run(u)
        if backward:
            y.sum().backward()
    return mode.count


@pytest.mark.covers(140)
@pytest.mark.parametrize("backward", [False, True])
def test_no_loop_over_tokens_operations_grow_with_the_logarithm_in_a_chunk_and_with_the_chunks(backward: bool) -> None:
    def counts(chunk: int, lengths: Sequence[int]) -> list[int]:
        return [dispatched(small(chunk=chunk), length, backward=backward) for length in lengths]

    whole = counts(4096, LENGTHS)
    steps = [after - before for before, after in itertools.pairwise(whole)]
    assert len(set(steps)) == 1 and 0 < steps[0] < 20, "a doubling costs one more round of the scan"
    # More chunks: the same operations again for each of them, none for a token.
    cut = counts(64, LENGTHS[1:])
    per_chunk = [
        (after - before) / more for (before, after), more in zip(itertools.pairwise(cut), (2, 4, 8, 16), strict=True)
    ]
    assert per_chunk == [per_chunk[0]] * 4 and per_chunk[0] < 2 * whole[0]
    halves = counts(32, (1024, 2048))
    assert 1.5 * 16 * per_chunk[0] < halves[1] - halves[0] < 2.5 * 16 * per_chunk[0]


@pytest.mark.covers(140)
def test_a_loop_over_tokens_would_be_seen() -> None:
    layer = small()
    loop = [dispatched(lambda u: slow_mamba(layer, u), length, backward=False) for length in (64, 128)]
    assert loop[1] - loop[0] > 5 * 64


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Without TF32, whose three digits would hide what is compared."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The Euclidean distance over the length: 0.004 is one bfloat16 step everywhere."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


NEEDS_KERNEL = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba_ssm",
)


@pytest.mark.gpu
@NEEDS_KERNEL
@pytest.mark.covers(54)
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("length", [1, 64, 333])
def test_the_cuda_kernel_gives_what_the_plain_scan_gives(dtype: torch.dtype, tolerance: float, length: int) -> None:
    torch.manual_seed(0)
    plain, kernel = (Mamba(256, use_kernel=use).cuda() for use in ("never", "always"))
    kernel.load_state_dict(plain.state_dict())
    mask = (torch.arange(length)[None] < torch.tensor([[length], [max(length // 2, 1)]])).cuda()
    outputs, gradients = [], []
    for layer in (plain, kernel):
        u = sequence(2, length, 256, dtype=torch.float32).cuda().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(u, mask)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        outputs.append(y.detach())
        gradients.append([u.grad, *(p.grad for p in layer.parameters())])
    assert relative(*outputs) < tolerance
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None
        if theirs.any():  # A_log has no effect on one token
            assert relative(ours, theirs) < 10 * tolerance


@pytest.mark.gpu
@NEEDS_KERNEL
@pytest.mark.covers(54)
@pytest.mark.usefixtures("exact_products")
def test_layer_equals_mamba_ssms_with_the_same_state_dict() -> None:
    from mamba_ssm import Mamba as Theirs

    torch.manual_seed(0)
    theirs, ours = Theirs(d_model=256, d_state=16, d_conv=4, expand=2).cuda(), Mamba(256, use_kernel="never").cuda()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    u = sequence(2, 100, 256, dtype=torch.float32).cuda()
    with torch.no_grad():
        assert relative(ours(u), theirs(u)) < 1e-4
