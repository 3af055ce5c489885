"""The optimiser of a stage and its learning rates."""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from reidctl.errors import UsageError
from reidctl.methods.base import Method
from reidctl.training.config import ParameterRule, TrainConfig

Scale = tuple[float, float]
"""Learning rate and weight decay of a parameter."""


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
    """Return the optimiser with one parameter group for each pair of learning rate and weight decay.

    A parameter has the rate of its role (`lr`, `lr_text`, `lr_new`, `lr_prompt`), biases `bias_lr_factor` times that.
    Biases (unless `decay_biases`) and parameters flagged `_no_weight_decay` (A_log and D of a Mamba layer) have no
    decay. Then come the rules of `groups` in their order: each sets what it names, so the last one that matches wins.
    Parameters that a stage leaves out are frozen.

    Where every parameter lies on CUDA the step is one fused kernel; on the CPU it is torch's own loop, unless
    `config.fused` says otherwise.

    Raises:
        UsageError: a rule that is no regular expression, says nothing, or matches no parameter that trains.
    """
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    groups: dict[Scale, list[nn.Parameter]] = {}
    for _, parameter, scale in _scaled(method, stage, config):
        parameter.requires_grad_(True)
        groups.setdefault(scale, []).append(parameter)
    described = [
        {"params": owned, "lr": rate, "base_lr": rate, "weight_decay": decay} for (rate, decay), owned in groups.items()
    ]
    if not described:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    on_gpu = all(parameter.device.type == "cuda" for owned in groups.values() for parameter in owned)
    # None leaves the choice to torch: on the CPU a loop over parameters, bit for bit the same everywhere.
    fused = (True if on_gpu else None) if config.fused is None else config.fused
    return kind(described, betas=config.betas, eps=config.eps, fused=fused)


def require_groups(method: Method, stage: str, config: TrainConfig) -> None:
    """Refuse rules of `train.groups` that do not fit the method, before anything is written; changes nothing.

    Raises:
        UsageError: as `build_optimizer`.
    """
    _scaled(method, stage, config)


def _scaled(method: Method, stage: str, config: TrainConfig) -> list[tuple[str, nn.Parameter, Scale]]:
    """Every parameter that trains, with its name, rate and decay."""
    members = [
        (name, parameter, _by_role(role, name, parameter, config))
        for role, owned in method.parameters_by_role(stage).items()
        for name, parameter in owned
    ]
    scales = _ruled([name for name, _, _ in members], [scale for _, _, scale in members], config)
    return [(name, parameter, scale) for (name, parameter, _), scale in zip(members, scales, strict=True)]


def _by_role(role: str, name: str, parameter: nn.Parameter, config: TrainConfig) -> Scale:
    """What the rates of the roles and the rules about biases give a parameter."""
    rates = {
        "image": config.lr,
        "text": config.lr if config.lr_text is None else config.lr_text,
        "new": 5 * config.lr if config.lr_new is None else config.lr_new,
    }
    rates["prompt"] = rates["new"] if config.lr_prompt is None else config.lr_prompt
    bias = name.endswith("bias")
    bare = (bias and not config.decay_biases) or getattr(parameter, "_no_weight_decay", False)
    return rates[role] * (config.bias_lr_factor if bias else 1.0), 0.0 if bare else config.weight_decay


def _ruled(names: Sequence[str], scales: Sequence[Scale], config: TrainConfig) -> list[Scale]:
    """The rates and decays after the rules of `groups`."""
    found = list(scales)
    for place, rule in enumerate(config.groups):
        pattern = _pattern(rule, place)
        matched = [index for index, name in enumerate(names) if pattern.search(name)]
        if not matched:
            # One name of each module: enough to see how names are built.
            some = {tuple(name.split(".")[:2]): name for name in names}
            raise UsageError(
                f"`train.groups[{place}].match` is `{rule.match}`, which is found in no name of what trains here.",
                hint=f"Such names are: {', '.join(list(some.values())[:6]) or 'none, because nothing trains'}.",
            )
        for index in matched:
            found[index] = _changed(found[index], rule, config)
    return found


def _pattern(rule: ParameterRule, place: int) -> re.Pattern[str]:
    if rule.factor is not None and rule.lr is not None:
        raise UsageError(f"`train.groups[{place}]` names both `factor` and `lr`.", hint="Give one of them.")
    if rule.factor is None and rule.lr is None and rule.weight_decay is None:
        raise UsageError(f"`train.groups[{place}]` changes nothing.", hint="Give `factor`, `lr` or `weight_decay`.")
    try:
        return re.compile(rule.match)
    except re.error as error:
        raise UsageError(
            f"`train.groups[{place}].match` is `{rule.match}`, which is no regular expression ({error})."
        ) from None


def _changed(scale: Scale, rule: ParameterRule, config: TrainConfig) -> Scale:
    rate, decay = scale
    if rule.factor is not None:
        rate = config.lr * rule.factor
    if rule.lr is not None:
        rate = rule.lr
    return rate, decay if rule.weight_decay is None else rule.weight_decay
