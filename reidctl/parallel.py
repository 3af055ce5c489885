"""Several processes that train one model: who they are, and what they tell each other.

Every function works in a single process too, where it does nothing. Processes meet under `torchrun`, under Slurm, or as
`reidctl finetune --devices N` starts them (`reidctl/cli/devices.py`).
"""

import gc
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reidctl.errors import ReidctlError, UsageError
from reidctl.parts import Parts

T = TypeVar("T")

# One process may read a dataset or write a model while the others wait.
_PATIENCE = timedelta(hours=24)
_ALIGN = 16
_PORT = 29_500
PARENT = "REIDCTL_PARENT"
"""Names the process that started this one with `--devices`."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: rank 0 <= rank < world, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place() -> Place:
    """Return where this process stands among those that have joined; alone unless `joined`."""
    if not _active():
        return Place()
    return Place(dist.get_rank(), dist.get_world_size(), _announced(os.environ).local)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return place().rank == 0


def announced() -> Place:
    """Return the place that a launcher gave this process: torchrun's variables, else Slurm's; alone without any.

    Raises:
        UsageError: the variables contradict each other.
    """
    return _announced(os.environ)


def _announced(env: Mapping[str, str]) -> Place:
    for rank, world, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if rank in env and world in env:
            found = _numbers(env, rank, world, local)
            # A shell inside `salloc` has Slurm's variables of a job of one task, or of tasks that `srun` starts later.
            if rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in env:
                continue
            if not 0 <= found.rank < found.world:
                raise UsageError(f"{rank}={found.rank} is not one of {world}={found.world} processes.")
            return found
    return Place()


def _numbers(env: Mapping[str, str], rank: str, world: str, local: str) -> Place:
    try:
        return Place(int(env[rank]), int(env[world]), int(env.get(local, "0")))
    except ValueError:
        raise UsageError(
            f"{rank}={env[rank]} and {world}={env[world]} are no place among processes.", hint="Give whole numbers."
        ) from None


class LostPeer(ReidctlError):
    """Another process of the group has failed, so that this one cannot go on."""

    exit_code = 6


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """Join the other processes that a launcher started; yields the place, alone if there are none.

    Args:
        device: the kind of device, `cuda` or `cpu`, that training runs on.

    Raises:
        UsageError: the launcher does not say where the processes meet, or started more processes than CUDA devices.
    """
    found = announced()
    if found.world == 1 or _active():
        yield place()
        return
    require_devices(device, _gpu(found.local) + 1)
    for name, value in _meeting(os.environ, found).items():
        os.environ.setdefault(name, value)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(_gpu(found.local))
    # Numbers of the host (sizes, seeds) are exchanged over gloo, so that nobody waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    _watch_parent(os.environ.get(PARENT))
    dist.init_process_group(backend, rank=found.rank, world_size=found.world, timeout=_PATIENCE)
    try:
        yield found
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise LostPeer("Another process of this training has failed.", hint="Its own message says why.") from None
    # Only in order: with a failure on its way out, taking the group apart would wait for the others. None leaves before
    # all are done, and nothing that holds the group (DDP) outlives it: its threads would abort the interpreter's end.
    wait()
    gc.collect()
    dist.destroy_process_group()


def _gpu(local: int) -> int:
    """The number of this process's GPU: Slurm may show each task its own one alone."""
    alone = "SLURM_PROCID" in os.environ and "RANK" not in os.environ and torch.cuda.device_count() == 1
    return 0 if alone else local


def _is_lost(error: RuntimeError) -> bool:
    said = str(error).lower()
    signs = ("connection closed", "connection reset", "connection refused", "broken pipe", "nccl", "gloo", "socket")
    return type(error).__name__.startswith("Dist") or any(sign in said for sign in signs)


def _watch_parent(parent: str | None) -> None:
    """Die with the process that started this one: nobody else would stop it, and a second training would join it."""
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def require_devices(kind: str, count: int) -> None:
    """Refuse more processes than there are CUDA devices; CPUs share their cores.

    Raises:
        UsageError: there are too few.
    """
    if kind == "cuda" and torch.cuda.device_count() < count:
        raise UsageError(
            f"{count} devices were asked for; this machine has {torch.cuda.device_count()} CUDA device(s).",
            hint="Ask for as many, or use --device cpu.",
        )


def _meeting(env: Mapping[str, str], found: Place) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for processes that Slurm started; torchrun gives them itself."""
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return {}
    if "SLURM_PROCID" not in env:
        raise UsageError(
            f"There are {found.world} processes (WORLD_SIZE), but not where they meet.",
            hint="Set MASTER_ADDR and MASTER_PORT, or start them with torchrun or `--devices N`.",
        )
    address = env.get("SLURM_LAUNCH_NODE_IPADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    # Jobs that share a machine must not meet at one port.
    port = _PORT + int(env.get("SLURM_JOB_ID", "0")) % 10_000
    return {"MASTER_ADDR": env.get("MASTER_ADDR", address), "MASTER_PORT": env.get("MASTER_PORT", str(port))}


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: `node[03-05,09],gpu1` gives `node03`."""
    head = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\](\S*?)(?:,|$))?", hosts)
    if head is None:
        return hosts
    return head[1] + (head[2] or "") + (head[3] or "")


def own_device(device: torch.device) -> torch.device:
    """Return this process's own one of several CUDA devices; a CPU, or a single process's device, as it is."""
    here = place()
    return torch.device("cuda", _gpu(here.local)) if device.type == "cuda" and here.world > 1 else device


# What processes tell each other


def wait() -> None:
    """Wait until every process is here."""
    if _active():
        dist.barrier()


def from_first(value: T) -> T:
    """Return what the first process has; JSON values only."""
    told: list[Any] = everyone(value if is_first() else None)
    first: T = told[0]
    return first


def first_does(work: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; all return its result, or fail as it failed.

    Raises:
        What `work` raises, in the first process; the others leave with a UsageError that says so.
    """
    if not _active():
        return work()
    result: Any = None
    failure: Exception | None = None
    if is_first():
        try:
            result = work()
        except Exception as error:
            failure = error
    told = from_first("" if failure is None else f"The first process failed: {failure}")
    if failure is not None:
        raise failure
    if told:
        raise UsageError(told)
    outcome: T = from_first(result)
    return outcome


@contextmanager
def first_then_others() -> Iterator[None]:
    """Let the first process do something, and then all others, which find what it left on disk.

    Raises:
        UsageError: in the others, if the first one failed.
    """
    if not _active():
        yield
    elif is_first():
        failure = ""
        try:
            yield
        except Exception as error:
            failure = f"The first process failed: {error}"
            raise
        finally:
            from_first(failure)
    else:
        told = from_first("")
        if told:
            raise UsageError(told)
        yield


def everyone(value: T) -> list[T]:
    """Return what each process has, in order of rank; JSON values only."""
    if not _active():
        return [value]
    told: list[T] = [json.loads(text) for text in _exchange_bytes(json.dumps(value, default=str).encode())]
    return told


def _exchange_bytes(own: bytes) -> list[bytes]:
    """Return the bytes of all processes, in order of rank."""
    lengths = torch.empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(own)]))
    longest = max(int(lengths.max()), 1)
    buffer = torch.zeros(longest, dtype=torch.uint8)
    buffer[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else buffer[:0]
    received = torch.empty(longest * len(lengths), dtype=torch.uint8)
    dist.all_gather_into_tensor(received, buffer)
    pieces = zip(received.chunk(len(lengths)), lengths.tolist(), strict=True)
    return [piece[:length].numpy().tobytes() for piece, length in pieces]


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over processes; so is its gradient: every process's output reads every input."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor of one shape over all processes, with gradient."""
    if not _active():
        return tensor
    total: Tensor = _SumOverRanks.apply(tensor)
    return total


def mean_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in one exchange per data type.

    A parameter without a gradient here must have none anywhere.
    """
    if not _active():
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean_tensors(grads)


def mean_tensors(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over processes, in place."""
    if not _active() or not tensors:
        return
    for kind in sorted({str(tensor.dtype) for tensor in tensors}):
        members = [tensor for tensor in tensors if str(tensor.dtype) == kind]
        flat = torch.cat([member.reshape(-1) for member in members])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for member, values in zip(members, torch.split(flat, [member.numel() for member in members]), strict=True):
            member.copy_(values.view_as(member))


def exchange(parts: Parts) -> list[Parts]:
    """Return the parts of all processes, in order of rank; see `exchange_with`."""
    return exchange_with(parts, 0)[0]


def exchange_with(parts: Parts, number: int) -> tuple[list[Parts], int]:
    """Return the parts of all processes, in order of rank, and the first one's number; others' parts are constants.

    All tensors travel as bytes in one exchange, after one of their shapes. This process's own part is returned as it
    is, so that gradients reach what it was computed from.
    """
    if not _active():
        return [parts], number
    names = sorted(parts)
    shapes, first = _shapes(parts, number)
    own = _pack([parts[name] for name in names])
    sizes = [_packed_size(parts, names, theirs) for theirs in shapes]
    buffer = own.new_zeros(max(sizes))
    buffer[: len(own)] = own
    received = buffer.new_empty(len(buffer) * len(shapes))
    dist.all_gather_into_tensor(received, buffer)
    rank, found = dist.get_rank(), []
    for number, (theirs, piece) in enumerate(zip(shapes, received.chunk(len(shapes)), strict=True)):
        if number == rank:
            found.append(parts)
        else:
            found.append(parts.with_rows(_unpack(piece, parts, names, theirs)))
    return found, first


def _shapes(parts: Parts, number: int) -> tuple[list[list[list[int]]], int]:
    """The shapes of every tensor in every process, tensors by sorted name, and the first process's number."""
    dims = [parts[name].ndim for name in sorted(parts)]
    told = torch.tensor([number, *(size for name in sorted(parts) for size in parts[name].shape)], dtype=torch.int64)
    world = dist.get_world_size()
    received = torch.empty(len(told) * world, dtype=torch.int64)
    dist.all_gather_into_tensor(received, told)
    table = received.view(world, -1).numpy()
    ends = np.cumsum(dims)[:-1].tolist()
    return [[part.tolist() for part in np.split(row[1:], ends)] for row in table], int(table[0, 0])


def _bytes(count: int, item: int) -> int:
    return math.ceil(count * item / _ALIGN) * _ALIGN


def _packed_size(parts: Parts, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> int:
    sizes = zip(names, shapes, strict=True)
    return sum(_bytes(math.prod(shape), parts[name].element_size()) for name, shape in sizes)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors, each filled up to a multiple of 16."""
    pieces = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        pieces.append(nn.functional.pad(flat, (0, _bytes(tensor.numel(), tensor.element_size()) - len(flat))))
    return torch.cat(pieces)


def _unpack(packed: Tensor, like: Parts, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape) * like[name].element_size()
        found[name] = packed[start : start + size].view(like[name].dtype).view(*shape)
        start += _bytes(math.prod(shape), like[name].element_size())
    return found


# Shares of work without gradients


def share(count: int, block: int) -> slice:
    """Return this process's part of `count` items; parts begin at multiples of `block`.

    What is computed block by block is then computed in the same blocks as by one process, and so to the same bits.
    """
    here = place()
    blocks = math.ceil(count / block)
    first, last = here.rank * blocks // here.world, (here.rank + 1) * blocks // here.world
    return slice(min(first * block, count), min(last * block, count))


def gather_rows(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of all processes, in order of rank; a process may have none."""
    if not _active():
        return rows
    told: list[Any] = everyone([list(rows.shape), str(rows.dtype)])
    content = _exchange_bytes(np.ascontiguousarray(rows).tobytes())
    pieces = [
        np.frombuffer(data, dtype=np.dtype(kind)).reshape(shape)
        for data, (shape, kind) in zip(content, told, strict=True)
        if math.prod(shape)
    ]
    return np.concatenate(pieces) if pieces else rows
