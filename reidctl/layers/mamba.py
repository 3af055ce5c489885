"""The Mamba layer in plain PyTorch, with the parameter names of mamba_ssm and transformers."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from reidctl.errors import UsageError

Kernel = Literal["auto", "never", "always"]

# softplus of this is exactly 0, before and after the bias is added: a padded position neither writes nor forgets.
_NO_TIME = -1e4


def associative_scan(decay: Tensor, drive: Tensor) -> Tensor:
    """Return h with h_0 = drive_0 and h_t = decay_t h_{t-1} + drive_t along dimension 1, in log depth.

    Neighbours are joined into steps of two, the half as long problem is solved, and the gaps are filled: 2 log2(L)
    rounds and O(L) work (Blelloch 1990). Only products of decays occur, never a quotient or a growing exponential,
    so decays in [0, 1] can underflow to 0, which is right, but nothing can overflow.

    Args:
        decay: shape (B, L, ...), L >= 1.
        drive: shape (B, L, ...).

    Returns:
        h, shape (B, L, ...). Not differentiable through its own steps in small memory: see `linear_scan`.
    """
    length = drive.shape[1]
    if length == 1:
        return drive
    even, odd = slice(0, length - length % 2, 2), slice(1, None, 2)
    pairs = torch.addcmul(drive[:, odd], decay[:, odd], drive[:, even])
    states = torch.empty_like(drive)
    states[:, odd] = associative_scan(decay[:, odd] * decay[:, even], pairs)
    states[:, 0] = drive[:, 0]
    states[:, 2::2] = torch.addcmul(drive[:, 2::2], decay[:, 2::2], states[:, 1:-1:2])
    return states


class _LinearScan(torch.autograd.Function):
    """The scan and its adjoint, which is the same scan backwards: only `decay` and the states are kept."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        drive = drive.clone(memory_format=torch.contiguous_format)
        drive[:, 0].addcmul_(decay[:, 0], state)
        states = associative_scan(decay, drive)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, state = ctx.saved_tensors
        # total_t = gradient_t + decay_{t+1} total_{t+1}: what h_t does to everything after it.
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        total = associative_scan(following.flip(1), gradient.flip(1)).flip(1)
        previous = torch.cat([state[:, None], states[:, :-1]], dim=1)
        return total * previous, total, decay[:, 0] * total[:, 0]


def linear_scan(decay: Tensor, drive: Tensor, state: Tensor) -> Tensor:
    """Return all states of h_t = decay_t h_{t-1} + drive_t, once differentiable.

    Args:
        decay: factors in [0, 1], shape (B, L, ...), L >= 1.
        drive: inputs, shape (B, L, ...).
        state: h before the first step, shape (B, ...).

    Returns:
        States, shape (B, L, ...).
    """
    states: Tensor = _LinearScan.apply(decay, drive, state)
    return states


def selective_scan(x: Tensor, time: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk: int = 64) -> Tensor:
    """Return y_t = C_t h_t of the selective state space h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, h_{-1} = 0.

    Gu & Dao 2023, arXiv:2312.00752, Eq. 2a-2b with their code's Euler step for B. The sequence is cut into chunks:
    in parallel within one, one after the other between them; each chunk's (B, chunk, E, N) states are recomputed in
    the backward pass, so that memory does not hold them for the whole sequence.

    Args:
        x: input, shape (B, L, E).
        time: step lengths Δ >= 0, shape (B, L, E).
        a: state matrix diagonal, negative, shape (E, N).
        b: input map, shape (B, L, N).
        c: output map, shape (B, L, N).
        chunk: tokens per chunk, >= 1.

    Returns:
        y without the skip term D x, shape (B, L, E).
    """
    state = x.new_zeros(x.shape[0], *a.shape)
    recompute = torch.is_grad_enabled() and x.shape[1] > chunk
    outputs = []
    for start in range(0, x.shape[1], chunk):
        part = slice(start, start + chunk)
        inputs = (state, x[:, part], time[:, part], a, b[:, part], c[:, part])
        if recompute:
            y, state = checkpoint(_scan_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(*inputs)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def _scan_chunk(state: Tensor, x: Tensor, time: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    decay = (time[..., None] * a).exp()  # (B, T, E, N)
    drive = (time * x)[..., None] * b[:, :, None, :]
    states = linear_scan(decay, drive, state)
    # Cloned: a view handed to the next chunk would keep this chunk's states alive until the backward pass.
    return (states @ c[..., None]).squeeze(-1), states[:, -1].clone()


class Mamba(nn.Module):
    """One Mamba layer: gated, causal, selective state space (Gu & Dao 2023, arXiv:2312.00752).

    x, z = split(in_proj u);  x = SiLU(causal depthwise conv x);  Δ, B, C = x_proj x;  Δ = softplus(dt_proj Δ)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t;  y_t = C_t h_t + D x_t;  out = out_proj(y · SiLU(z))

    Parameter names and shapes are those of `mamba_ssm.Mamba` and transformers' `MambaMixer`, so one state dict fits
    all three; 437,760 parameters with the default sizes. On a sequence of ONE token there is no recurrence: the
    layer is the gated MLP y = (Δ C·B + D) x and A has no effect.

    Args:
        d_model: width of input and output.
        d_state: N, states per channel.
        d_conv: taps of the causal convolution.
        expand: inner width E = expand · d_model.
        dt_rank: rank of the step length map; "auto" is ceil(d_model / 16).
        bidirectional: the mean of the layer run forwards and backwards, sharing all weights; no longer causal.
        use_kernel: mamba_ssm's CUDA scan: "auto" if importable and the input is on CUDA, "always" or an error.
        chunk: see `selective_scan`.
    """

    def __init__(
        self,
        d_model: int = 256,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        bidirectional: bool = False,
        use_kernel: Kernel = "auto",
        chunk: int = 64,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.d_state, self.rank, self.chunk = d_state, rank, chunk
        self.bidirectional, self.use_kernel = bidirectional, use_kernel
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self._reset_step_length()
        # Decay would pull the time constants towards 1 and the skip towards 0, which is no prior anybody wants.
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _reset_step_length(self, shortest: float = 1e-3, longest: float = 0.1, floor: float = 1e-4) -> None:
        """Start with step lengths log-uniform in [shortest, longest], as mamba_ssm's constructor does."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        uniform = torch.rand_like(self.dt_proj.bias)
        time = (uniform * math.log(longest / shortest) + math.log(shortest)).exp().clamp(min=floor)
        self.dt_proj.bias.copy_(time + (-(-time).expm1()).log())  # the inverse of softplus

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast and move as any module, but keep A_log and D in float32 where the rest becomes float16 or bfloat16."""
        wide = {name: getattr(self, name).detach() for name in ("A_log", "D")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in wide.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = value.to(parameter.device)
        return self

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the layer's output, without residual.

        Args:
            u: sequence, shape (B, L, d_model), L >= 1.
            mask: True on real tokens, shape (B, L), bool. The state passes over other positions unchanged; with
                padding at the end, real tokens get exactly what they get without padding.

        Returns:
            Shape (B, L, d_model), in the dtype of `u` (or autocast's).

        Raises:
            UsageError: `use_kernel="always"` without mamba_ssm or without a CUDA input.
        """
        y = self._one_way(u, mask)
        if not self.bidirectional:
            return y
        return (y + self._one_way(u.flip(1), None if mask is None else mask.flip(1)).flip(1)) / 2

    def _one_way(self, u: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            u = u * mask[..., None].to(u.dtype)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)  # (B, L, E)
        low, b, c = self.x_proj(x).split([self.rank, self.d_state, self.d_state], dim=-1)
        time = F.linear(low, self.dt_proj.weight)
        if mask is not None:
            time = time.masked_fill(~mask[..., None], _NO_TIME)
        # Autocast would round the states; the recurrence multiplies such errors over the whole sequence.
        with torch.autocast(u.device.type, enabled=False):
            y = self._scan(x, time, b, c)
        output: Tensor = self.out_proj(y.to(x.dtype) * F.silu(z))
        return output

    def _scan(self, x: Tensor, time: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Return C h + D x in float32 or float64; `time` has neither bias nor softplus yet."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, time, b, c = (value.to(wide) for value in (x, time, b, c))
        a, bias = -self.A_log.to(wide).exp(), self.dt_proj.bias.to(wide)
        if self._kernel_wanted(x):
            return _kernel_scan(x, time, a, b, c, self.D.to(wide), bias)
        y = selective_scan(x, F.softplus(time + bias), a, b, c, chunk=self.chunk)
        return y + self.D.to(wide) * x

    def _kernel_wanted(self, x: Tensor) -> bool:
        if self.use_kernel == "never":
            return False
        possible = x.is_cuda and x.dtype == torch.float32 and importlib.util.find_spec("mamba_ssm") is not None
        if self.use_kernel == "always" and not possible:
            raise UsageError(
                f"The mamba_ssm kernel was asked for, but cannot run on {x.device} with {x.dtype}.",
                hint='Install `reidctl[mamba]` on a CUDA machine, or set use_kernel to "auto".',
            )
        return possible


def _kernel_scan(x: Tensor, time: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """mamba_ssm's fused scan, which wants the tokens last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, time, b, c = (value.transpose(1, 2).contiguous() for value in (x, time, b, c))
    y: Tensor = selective_scan_fn(x, time, a, b, c, d, z=None, delta_bias=bias, delta_softplus=True)
    return y.transpose(1, 2)


class _Block(nn.Module):
    """f = Mamba(f) + f, or Mamba(norm f) + f."""

    def __init__(self, mixer: Mamba, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, f: Tensor, mask: Tensor | None) -> Tensor:
        mixed: Tensor = self.mixer(f if self.norm is None else self.norm(f), mask)
        return mixed + f


class MambaStack(nn.Module):
    """Residual Mamba layers, f ← Mamba(f) + f, as the BDAM papers print them (no norm anywhere).

    With `prenorm` the layers and names are those of transformers' `MambaModel`: an RMSNorm before each layer and
    `norm_f` after the last. 875,520 parameters with two layers of the default sizes and no norm.

    Args:
        layers: number of layers; 0 is the identity (with `prenorm`, only `norm_f`).
        d_model: width.
        prenorm: normalise before each layer and at the end.
        options: passed on to `Mamba`.
    """

    def __init__(self, layers: int = 2, d_model: int = 256, *, prenorm: bool = False, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Block(Mamba(d_model, **options), nn.RMSNorm(d_model, eps=1e-5) if prenorm else None) for _ in range(layers)
        )
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5) if prenorm else nn.Identity()

    def forward(self, f: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the stack's output, shape (B, L, d_model), for the same shapes as `Mamba.forward`."""
        for block in self.layers:
            f = block(f, mask)
        output: Tensor = self.norm_f(f)
        return output
