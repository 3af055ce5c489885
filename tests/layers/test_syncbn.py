"""Batch normalisation over left-out rows and over processes."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from reidctl.layers.syncbn import SyncBatchNorm


def pair(width: int = 5) -> tuple[SyncBatchNorm, nn.BatchNorm1d]:
    """Two norms of the same state, none of it 0 or 1."""
    torch.manual_seed(0)
    ours, plain = SyncBatchNorm(width), nn.BatchNorm1d(width)
    with torch.no_grad():
        for tensor in (plain.weight, plain.bias, plain.running_mean):
            tensor.normal_()
        plain.running_var.uniform_(0.5, 2.0)
    assert not ours.load_state_dict(plain.state_dict()).missing_keys
    return ours, plain


def backward(norm: nn.Module, x: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of the input and of the parameters, and the state afterwards."""
    x = x.clone().requires_grad_()
    out = norm(x, *more)
    (out * torch.linspace(-1, 2, out.shape[1]) * torch.arange(len(out))[:, None].sin()).sum().backward()
    grads = [parameter.grad for parameter in norm.parameters()]
    return [out.detach(), x.grad, *grads, *norm.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("training", [True, False])
def test_without_left_out_rows_it_is_batch_norm_bit_for_bit(training: bool) -> None:
    ours, plain = pair()
    ours.train(training), plain.train(training)
    x = torch.randn(12, 5) * 3 + 1
    for a, b in zip(backward(ours, x), backward(plain, x), strict=True):
        assert torch.equal(a, b)


def test_left_out_rows_change_nothing_but_are_normalised_too() -> None:
    ours, plain = pair()
    x = torch.randn(20, 5) * 3 + 1
    keep = torch.arange(20) % 3 != 0
    out = ours(x, keep)
    torch.testing.assert_close(out[keep], plain(x[keep]), atol=1e-5, rtol=1e-5)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    mean, deviation = x[keep].mean(0), (x[keep].var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(out[~keep], (x[~keep] - mean) / deviation * plain.weight + plain.bias)
    other = torch.where(keep[:, None], x, torch.randn(20, 5) * 100)
    assert torch.equal(pair()[0](other, keep)[keep], pair()[0](x, keep)[keep])


def test_the_gradient_with_left_out_rows_is_that_of_the_formula() -> None:
    norm = pair(3)[0].double()
    x, keep = torch.randn(7, 3, dtype=torch.float64), torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    x.requires_grad_()

    def formula(x: torch.Tensor) -> torch.Tensor:
        seen = x[keep]
        normal = (x - seen.mean(0)) / (seen.var(0, unbiased=False) + norm.eps).sqrt()
        return normal * norm.weight + norm.bias

    upstream = torch.randn(7, 3, dtype=torch.float64)
    found = torch.autograd.grad((norm(x, keep) * upstream).sum(), x)[0]
    expected = torch.autograd.grad((formula(x) * upstream).sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_numbers_far_from_zero_do_not_cancel_once_the_running_mean_is_near() -> None:
    ours, plain = pair()
    x, keep = torch.randn(50, 5) + 3000, torch.ones(50, dtype=torch.bool)
    for norm in (ours, plain):
        norm.running_mean.fill_(3000)
    torch.testing.assert_close(ours(x, keep), plain(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("keep", [None, torch.tensor([True]), torch.tensor([False])])
def test_a_single_row_is_normalised_by_the_running_statistics_and_leaves_them(keep: torch.Tensor | None) -> None:
    ours, plain = pair()
    before = [buffer.clone() for buffer in ours.buffers()][:2]
    x = torch.randn(1, 5)
    torch.testing.assert_close(ours(x, keep), plain.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), before, strict=False))


def test_without_gradients_the_statistics_are_the_batches_and_the_running_ones_stay() -> None:
    ours, plain = pair()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(9, 5)
    with torch.no_grad():
        for keep in (None, torch.ones(9, dtype=torch.bool)):
            torch.testing.assert_close(ours(x, keep), plain(x))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_under_autocast_statistics_are_full_precision() -> None:
    ours, plain = pair()
    x, keep = (torch.randn(64, 5) + 20).bfloat16(), torch.ones(64, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, keep)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x.float()), atol=0.03, rtol=0.01)
    torch.testing.assert_close(ours.running_var, plain.running_var, atol=1e-4, rtol=1e-4)


RANK = """
    import json, torch
    from layers.test_syncbn import pair
    from reidctl.parallel import joined
    with joined("cpu") as place:
        torch.set_num_threads(1)
        x = torch.randn(14, 5, generator=torch.Generator().manual_seed(3)) * 3 + 1
        keep = torch.arange(14) % 4 != 1
        seed = torch.randn(14, 5, generator=torch.Generator().manual_seed(4))
        rows = (slice(0, 9), slice(9, 14))[place.rank]
        said = []
        for masked in (False, True):
            norm = pair()[0]
            own = x[rows].clone().requires_grad_()
            out = norm(own, keep[rows] if masked else None)
            (out * seed[rows]).sum().backward()
            said.append([value.tolist() for value in (out, own.grad, norm.running_mean, norm.running_var)])
        print(json.dumps(said))
"""


def test_two_processes_normalise_as_one_does_with_the_same_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        env = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": tests}
        command = [sys.executable, "-c", textwrap.dedent(RANK)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    x = torch.randn(14, 5, generator=torch.Generator().manual_seed(3)) * 3 + 1
    seed = torch.randn(14, 5, generator=torch.Generator().manual_seed(4))
    keep = torch.arange(14) % 4 != 1
    for masked in (False, True):
        norm, own = pair()[0], x.clone().requires_grad_()
        out = norm(own, keep if masked else None)
        (out * seed).sum().backward()
        for place, value in enumerate((out, own.grad)):
            both = torch.tensor(said[0][masked][place] + said[1][masked][place])
            torch.testing.assert_close(both, value.detach(), atol=1e-5, rtol=1e-5)
        for rank in range(2):
            for place, value in ((2, norm.running_mean), (3, norm.running_var)):
                torch.testing.assert_close(torch.tensor(said[rank][masked][place]), value, atol=1e-5, rtol=1e-5)
