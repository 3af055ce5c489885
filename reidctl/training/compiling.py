"""`torch.compile` for the Transformer blocks, where it works."""

import torch
from torch._functorch import config as functorch

from reidctl.backbones.base import Tower
from reidctl.console import log
from reidctl.methods.base import Method
from reidctl.training.config import TrainConfig


def compile_blocks(method: Method, config: TrainConfig) -> bool:
    """Compile the blocks of both towers, one graph for all blocks of a tower; return whether that worked.

    Only the blocks: what stands around them branches, and they are where the time goes. They are tried on tokens,
    forwards and backwards, before training begins; where the compiler fails the blocks stay as they are and the
    reason is logged.
    """
    # Reporting and GradNorm differentiate losses before the step does, so graphs must survive a backward pass.
    functorch.donated_buffer = False
    towers: list[Tower] = [method.backbone.image, method.backbone.text]
    done: list[Tower] = []
    try:
        for tower in towers:
            # One graph for texts of any length and batches of any size.
            tower.compiled = torch.compile(tower.run_block, dynamic=True)
            done.append(tower)
            _try(tower, config)
    except Exception as error:  # whatever a compiler, its back end or a missing C++ compiler raises: they share no kind
        for tower in done:
            tower.compiled = None
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        log.warning(f"torch.compile failed ({type(error).__name__}: {reason[:200]}); training goes on without.")
        return False
    return True


def _try(tower: Tower, config: TrainConfig) -> None:
    """One block on random tokens, as training runs it."""
    weight = next(tower.blocks[0].parameters())
    tokens = torch.zeros(2, 3, tower.width, device=weight.device, requires_grad=True)
    with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        found, _ = tower.through(tower.blocks[0], tokens, None, False)
    total = found.float().sum()
    torch.autograd.grad(total, weight, retain_graph=True, allow_unused=True)
    total.backward()  # type: ignore[no-untyped-call]
    for parameter in tower.blocks[0].parameters():
        parameter.grad = None
