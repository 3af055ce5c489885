"""One training step: features, losses of the whole batch, gradients and the optimiser, on one process or several.

The loss is always that of the whole batch. Samples are encoded apart, on several processes or in several passes; what
the losses read of them is joined, and every process computes the losses of all of it. A process differentiates them by
its own features only, so the towers' gradients are sums over processes, and those of the heads, which every process has
whole, are means. With the features' gradients scaled by the number of processes both are means.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from reidctl import parallel
from reidctl.batch import Batch
from reidctl.layers.gradients import local_gradients
from reidctl.methods.base import Method
from reidctl.parts import Parts, join
from reidctl.training.config import TrainConfig


@dataclass(frozen=True)
class Done:
    """What a step leaves for the record.

    Attributes:
        losses: unweighted, by name; scalars on the device.
        objective: their weighted sum.
        norms: the gradient norm of each loss at the shared weight; empty unless asked for.
        gradient: the norm of the whole gradient before clipping.
    """

    losses: dict[str, Tensor]
    objective: Tensor
    norms: dict[str, float]
    gradient: Tensor


class Step:
    """Computes training steps.

    Args:
        method: what is trained, on its device.
        optimizer: of its parameters.
        config: `precision`, `accumulate`, `clip_grad_norm`, `channels_last` are read.
        stage: the training stage.
        network: the forward pass of a method that is shared out (`sharding.py`); None for a whole one.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        stage: str,
        network: nn.Module | None = None,
    ) -> None:
        self.method, self.optimizer, self.config, self.stage = method, optimizer, config, stage
        self.device = next(method.parameters()).device
        self.world = parallel.place().world
        self.network: nn.Module = Losses(method, stage) if network is None else network
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.shares_out = network is not None
        if self.world > 1 and trained and config.accumulate == 1 and not self.shares_out:
            self.network = _distributed(self.network)
        self._trained = trained

    def __call__(self, batch: Batch, *, reporting: bool = False, check: Callable[[Mapping[str, Tensor]], None]) -> Done:
        """Train on this process's part of a batch, on the CPU.

        Args:
            batch: the part.
            reporting: whether the gradient norm of each loss is wanted.
            check: is given the losses before anything is changed, and the gradient's norm before the weights are.
        """
        batch = self.method.prepare(batch)
        many = split(batch, self.config.accumulate) if self.config.accumulate > 1 else [batch]
        if len(many) > 1:
            return _Passes(self, many).run(reporting, check)
        self.method.gradients = self._gradients
        with self.autocast():
            losses: dict[str, Tensor] = self.network(self.send(batch))
        check(losses)
        # Parameters that are shared out are not there whole for a gradient of their own.
        norms = self.method.gradient_norms(losses) if reporting and not self.shares_out else {}
        objective = self.method.objective(losses)
        self.optimizer.zero_grad(set_to_none=True)
        if objective.requires_grad:
            objective.backward()  # type: ignore[no-untyped-call]
        if self.config.accumulate > 1:
            parallel.mean_gradients(self._trained)
        return Done(losses, objective.detach(), norms, self.finish(check))

    def send(self, batch: Batch) -> Batch:
        """Return a batch on the device, its images ready to be encoded."""
        moved = batch.to(self.device).finished()
        if self.config.channels_last and moved.image is not None:
            moved = moved.with_image(moved.image.contiguous(memory_format=torch.channels_last))
        return moved

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the towers."""
        narrow = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)

    def finish(self, check: Callable[[Mapping[str, Tensor]], None]) -> Tensor:
        """Clip the gradient and change the weights; return the gradient's norm."""
        # Infinity clips nothing but still measures: a gradient that is not finite must not reach the weights.
        limit = math.inf if self.config.clip_grad_norm is None else self.config.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.method.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        check({"gradient of the objective": norm})
        self.optimizer.step()
        return norm

    def _gradients(self, losses: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        """Gradients of losses at weights, of the whole batch."""
        return _meaned(local_gradients(losses, weights))


def _distributed(network: nn.Module) -> DistributedDataParallel:
    """A network whose gradients are averaged over processes while the backward pass runs."""
    with warnings.catch_warnings():
        # The name that follows `broadcast_buffers` is younger than the oldest PyTorch that we run on.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network,
            # Batches may leave heads of other datasets, or a tower, without a gradient.
            find_unused_parameters=True,
            # Norms see the whole batch in every process, so their statistics are equal.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class Losses(nn.Module):
    """The losses of the whole batch from this process's part; one module, because DDP watches one `forward`."""

    def __init__(self, method: Method, stage: str) -> None:
        super().__init__()
        self.method, self.stage = method, stage

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.method.encode(batch, self.stage)
        every, seed = parallel.exchange_with(parts, _seed())
        if len(every) > 1:
            every[parallel.place().rank] = scaled(parts, len(every))
        with _shared_random(seed, every[0]):
            return self.method.losses_of(join(every), self.stage)


def _seed() -> int:
    """A number from the process's generator, on several processes; one process draws nothing more than it needs."""
    return int(torch.randint(2**62, ())) if parallel.place().world > 1 else 0


@contextmanager
def _shared_random(seed: int, parts: Parts) -> Iterator[None]:
    """Let all processes draw the same numbers (pairs to be matched, random triplets): they differentiate one loss."""
    if parallel.place().world == 1:
        yield
        return
    devices = {value.device for value in parts.rows.values() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


class _Passes:
    """One batch in several passes (GradCache, Gao et al. 2021, arXiv:2101.06983, section 3).

    1. Every pass is encoded without gradients. 2. The losses of the joined features give the features' gradients.
    3. Every pass is encoded again, with the same random numbers, and its features' gradients go back through it.
    """

    def __init__(self, step: Step, batches: Sequence[Batch]) -> None:
        self.step, self.batches = step, batches
        self.states: list[_RandomState] = []
        self.leaves: list[Parts] = []

    def run(self, reporting: bool, check: Callable[[Mapping[str, Tensor]], None]) -> Done:
        step, method = self.step, self.step.method
        method.gradients = self._gradients
        losses = self._losses()
        check(losses)
        norms = method.gradient_norms(losses) if reporting else {}
        objective = method.objective(losses)
        step.optimizer.zero_grad(set_to_none=True)
        if objective.requires_grad:
            objective.backward()  # type: ignore[no-untyped-call]
            self._back()
        parallel.mean_gradients(step._trained)
        return Done(losses, objective.detach(), norms, step.finish(check))

    def _losses(self) -> dict[str, Tensor]:
        step = self.step
        with torch.no_grad(), step.autocast(), _still(step.method):
            for batch in self.batches:
                self.states.append(_RandomState(step.device))
                self.leaves.append(_leaves(step.method.encode(step.send(batch), step.stage)))
        own = join([leaf.with_rows(_detached(leaf)) for leaf in self.leaves])
        every, seed = parallel.exchange_with(own, _seed())
        rank = parallel.place().rank
        with step.autocast(), _shared_random(seed, own):
            return step.method.losses_of(join([*every[:rank], *self.leaves, *every[rank + 1 :]]), step.stage)

    def _again(self) -> Iterable[tuple[Parts, Parts]]:
        """Encode every pass again with gradients; yields its features and the leaves they stand for."""
        step = self.step
        after = _RandomState(step.device)
        for batch, state, leaf in zip(self.batches, self.states, self.leaves, strict=True):
            state.restore()
            with step.autocast():
                made = step.method.encode(step.send(batch), step.stage)
            yield made, leaf
        after.restore()

    def _back(self) -> None:
        for made, leaf in self._again():
            pairs = [(made[name], leaf[name].grad) for name in leaf if made[name].requires_grad]
            wanted = [(value, grad * self.step.world) for value, grad in pairs if grad is not None]
            if wanted:
                torch.autograd.backward([value for value, _ in wanted], [grad for _, grad in wanted])

    def _gradients(self, losses: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        """Gradients of losses at weights: what reaches them beside the features, and through those of every pass."""
        tensors = [leaf[name] for leaf in self.leaves for name in leaf if leaf[name].requires_grad]
        found = local_gradients(losses, [*weights, *tensors])
        total = {name: list(grads[: len(weights)]) for name, grads in found.items()}
        toward = {name: grads[len(weights) :] for name, grads in found.items()}
        start = 0
        with _still(self.step.method):
            for made, leaf in self._again():
                names = [name for name in leaf if leaf[name].requires_grad]
                for loss, grads in toward.items():
                    here = dict(zip(names, grads[start : start + len(names)], strict=True))
                    _add(total[loss], _through(made, here, weights, self.step.world))
                start += len(names)
        return _meaned(total)


def _through(
    made: Parts, grads: Mapping[str, Tensor | None], weights: Sequence[Tensor], world: int
) -> Sequence[Tensor | None]:
    pairs = [(made[name], grad) for name, grad in grads.items() if grad is not None and made[name].requires_grad]
    if not pairs:
        return [None] * len(weights)
    outputs, seeds = [value for value, _ in pairs], [grad * world for _, grad in pairs]
    return torch.autograd.grad(outputs, weights, seeds, retain_graph=True, allow_unused=True)


def _add(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    for place, value in enumerate(more):
        before = total[place]
        if value is not None:
            total[place] = value if before is None else before + value


def _meaned(found: dict[str, list[Tensor | None]]) -> dict[str, list[Tensor | None]]:
    """Means over processes; a gradient that one lacks is lacked by all."""
    parallel.mean_tensors([grad for grads in found.values() for grad in grads if grad is not None])
    return found


class _Scale(torch.autograd.Function):
    """The same numbers; their gradient is multiplied on its way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scaled(parts: Parts, factor: int) -> Parts:
    """Return parts whose gradients are multiplied by a factor on their way back."""
    rows = {name: _Scale.apply(value, factor) if value.requires_grad else value for name, value in parts.rows.items()}
    return parts.with_rows(rows)


def _leaves(parts: Parts) -> Parts:
    """The same numbers as leaves of a new graph."""
    return parts.with_rows(
        {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in parts.rows.items()}
    )


def _detached(parts: Parts) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parts.rows.items()}


@contextmanager
def _still(method: nn.Module) -> Iterator[None]:
    """Let norms use the statistics of a batch without keeping them: a pass that is made twice would count twice."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class _RandomState:
    """The random numbers that come next on the CPU and the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def split(batch: Batch, count: int) -> list[Batch]:
    """Return a batch in `count` parts, fewer if it has fewer samples; each has its share of those with a caption."""
    every = torch.arange(len(batch))
    kinds = [every] if batch.has_text is None else [every[batch.has_text], every[~batch.has_text]]
    pieces = zip(*(torch.tensor_split(kind, count) for kind in kinds), strict=True)
    rows = [torch.cat(piece).tolist() for piece in pieces]
    return [batch.take(samples) for samples in rows if samples]
