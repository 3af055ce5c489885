"""The optimiser of a stage and its learning rates."""

import math

import torch
from torch import nn

from reidctl.methods.base import Method
from reidctl.training.config import TrainConfig


def learning_rate_factor(config: TrainConfig, epoch: float) -> float:
    """Return the factor on every learning rate at `epoch` (0-based, fractional when scheduled by step).

    Warm-up: linear from `warmup_factor` to 1 over `warmup_epochs`. Then cosine: f + (1 - f) (1 + cos(pi p)) / 2 with f
    the `final_factor` and p the share of the remaining epochs, or of all (`cosine_over`); step: gamma per milestone
    passed; exponential: gamma ** epoch. Epochs are counted from `first_epoch`.
    """
    epoch += config.first_epoch
    if epoch < config.warmup_epochs:
        share = epoch / config.warmup_epochs
        return config.warmup_factor * (1 - share) + share
    if config.schedule == "cosine":
        start = config.warmup_epochs if config.cosine_over == "rest" else 0.0
        share = min((epoch - start) / max(config.epochs - start, 1e-9), 1.0)
        return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "step":
        return float(config.gamma ** sum(epoch >= milestone for milestone in config.milestones))
    if config.schedule == "exponential":
        return float(config.gamma**epoch)
    return 1.0


def build_optimizer(method: Method, stage: str, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser with one parameter group per role, decay and bias rule.

    Parameters that a stage leaves out are frozen. Biases (unless `decay_biases`) and parameters flagged
    `_no_weight_decay` (A_log and D of a Mamba layer) have no decay.
    """
    rates = {
        "image": config.lr,
        "text": config.lr if config.lr_text is None else config.lr_text,
        "new": 5 * config.lr if config.lr_new is None else config.lr_new,
    }
    rates["prompt"] = rates["new"] if config.lr_prompt is None else config.lr_prompt
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    for role, members in method.parameters_by_role(stage).items():
        for name, parameter in members:
            parameter.requires_grad_(True)
            bias = name.endswith("bias")
            rate = rates[role] * (config.bias_lr_factor if bias else 1.0)
            bare = (bias and not config.decay_biases) or getattr(parameter, "_no_weight_decay", False)
            groups.setdefault((rate, 0.0 if bare else config.weight_decay), []).append(parameter)
    described = [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
    if not described:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(described, betas=config.betas, eps=config.eps)
