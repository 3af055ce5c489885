"""FSDP2: parameters, gradients and optimiser state shared out over processes, for models that do not fit on one device.

Each Transformer block is gathered when it runs and let go afterwards; the rest of the model is gathered for a step. The
whole model comes together on every device only to be validated, without gradients and optimiser state.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from reidctl import parallel
from reidctl.backbones.base import Tower
from reidctl.errors import UsageError
from reidctl.methods.base import Method
from reidctl.training.config import TrainConfig


def require_shardable(method: Method, config: TrainConfig) -> None:
    """Refuse what needs whole parameters between the forward and the backward pass.

    Raises:
        UsageError: several passes, or gradients of single losses.
    """
    if config.accumulate > 1:
        raise UsageError(
            "`train.parallel: fsdp` does not work with train.accumulate.",
            hint="Save memory with backbone.grad_checkpointing=true, or use ddp.",
        )
    if method.balances:
        raise UsageError(
            f"`{method.name}` balances its losses by their gradients at one layer, which FSDP shares out.",
            hint="Use method.gradnorm=null, or train.parallel=ddp.",
        )


class Sharded(nn.Module):
    """A network around a copy of a method whose parameters are shared out.

    Args:
        network: its forward pass is a training step's.
        method: inside the network; its towers' blocks are gathered one by one.
        device: of this process.
    """

    def __init__(self, network: nn.Module, method: Method, device: torch.device) -> None:
        super().__init__()
        self.network, self.method = network, method
        mesh = init_device_mesh(device.type, (parallel.place().world,))
        self.towers: list[Tower] = [method.backbone.image, method.backbone.text]
        for tower in self.towers:
            for block in tower.blocks:
                # The hooks that gather a block's parameters hang on its own call.
                block.forward = partial(tower.run_block, block)
                fully_shard(block, mesh=mesh)
            tower.compiled = _call
        fully_shard(network, mesh=mesh)

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def _groups(self) -> list[FSDPModule]:
        return [module for module in self.network.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all parameters for a while, to use the method without training it."""
        for group in self._groups():
            group.unshard()
        try:
            yield
        finally:
            for group in self._groups():
                group.reshard()


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def copy_to_share(method: Method, device: torch.device) -> Method:
    """Return a copy of a method on the device, to be shared out; the original stays whole on the CPU."""
    return copy.deepcopy(method).to(device)


def full(values: Any) -> Any:
    """Return a structure with every shared tensor put together; every process must ask."""
    if isinstance(values, DTensor):
        return values.full_tensor()
    if isinstance(values, Mapping):
        return {name: full(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [full(value) for value in values]
    return values


@torch.no_grad()
def fill(method: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a method whose parameters are shared out."""
    own = method.state_dict()
    for name, value in state.items():
        own[name].copy_(like(value, own[name]))


def like(value: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor shared out as another is."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value.to(other.device)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def share_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimiser's whole state shared out as its parameters are."""
    shared = {
        number: {
            name: like(value, parameters[int(number)]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    return {**state, "state": shared}
