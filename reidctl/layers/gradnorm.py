"""GradNorm: loss weights that balance how hard each loss pulls at a shared layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reidctl.config import Section
from reidctl.layers.gradients import Gradients, local_gradients
from reidctl.layers.shared import LAST_MLP

_SMALLEST_RATIO = 1e-12
_SMALLEST_SHARE = 1e-3


class GradNormConfig(Section):
    """Settings of the balancer; the defaults are the BDAM papers' (seeds 001 and 002).

    The papers' alpha = 1.5 is ambiguous: in BDAM's Eq. 6 it multiplies L_GradNorm (`coef`), in the original GradNorm
    it is the exponent of the training rate (`exponent`). We take it as printed. Since the weights have an optimiser of
    their own, `coef` then matters only relative to `weight_reg`.

    Attributes:
        coef: factor of L_GradNorm.
        exponent: power of the relative training rate r.
        ref: the reference norm: that of the first task (seed 002) or the mean (Chen et al. 2018).
        targets: `literal` is r_k^exponent · G_ref as printed; `feasible` divides it by r_1^exponent (ref first) or by
            the mean of r^exponent (ref mean). Same ratios between tasks, but weights that sum to K can meet them.
            With `ref="first"` and `literal`, a first task that falls more slowly than the others (r_1 > 1) is
            always below its own target and every other weight falls to the lower clip within some hundred steps.
            For training that is meant to work, take `ref="mean", targets="feasible"`.
        lr: Adam step of the log-weights.
        clip: smallest and largest weight; must contain 1.
        weight_reg: λ of λ Σ (log w)²; 0 is the papers' ablation "w/o weight regularisation".
        every: balance at every n-th step.
        warm_steps: L_k0 is the mean loss of that many first steps, during which all weights stay 1.
        floor: smallest L_k0; HSIC and L_adv start near 0.
        layer: where gradients are measured: `last_mlp` (the papers' "final shared layer" as we read it), `auto` or the
            name of a parameter; see `layers.shared.SharedLayer`.
    """

    coef: float = Field(default=1.5, ge=0)
    exponent: float = Field(default=1.0, ge=0)
    ref: Literal["first", "mean"] = "first"
    targets: Literal["literal", "feasible"] = "literal"
    lr: float = Field(default=0.025, gt=0)
    clip: tuple[float, float] = (1e-4, 10.0)
    weight_reg: float = Field(default=1e-3, ge=0)
    every: int = Field(default=1, ge=1)
    warm_steps: int = Field(default=10, ge=1)
    floor: float = Field(default=1e-3, gt=0)
    layer: str = LAST_MLP

    @model_validator(mode="after")
    def _clip_contains_one(self) -> "GradNormConfig":
        if not 0 < self.clip[0] <= 1 <= self.clip[1]:
            raise ValueError(f"clip must satisfy 0 < low <= 1 <= high, got {self.clip}")
        return self


class GradNorm:
    """Learns one weight w_k = exp(s_k) per loss, with an Adam of its own.

    L_GN = Σ_k | w_k ‖∇_θ L_k‖ - r_k^exponent · G_ref / c |,   r_k = (L_k / L_k0) / mean_j (L_j / L_j0)
    step on  coef · L_GN + weight_reg · Σ_k s_k²,  then  s = log clip(K w / Σ w).
    Chen et al. 2018, arXiv:1711.02257, Eq. 1-2; BDAM Eq. 5-6 (G_ref, coef, regulariser, clip).
    c is 1 as printed; `targets="feasible"` changes it, see `GradNormConfig`.

    The papers do not state who receives which gradient; we take: L_GN and the regulariser move s only (targets are
    constants), Σ w_k L_k moves the network only (weights are constants). If s also received the gradient of
    Σ w_k L_k, every weight would fall to the lower clip.

    The state is a handful of float64 numbers on the CPU; losses may live anywhere.

    Args:
        tasks: the names of the losses; the first is the reference of `ref="first"`.
        config: settings.

    Raises:
        ValueError: no task, or a name twice.
    """

    def __init__(self, tasks: Sequence[str], config: GradNormConfig | None = None) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks must be different names, got {list(tasks)}")
        self.tasks = tuple(tasks)
        self.config = config or GradNormConfig()
        self.log_weights = torch.zeros(len(self.tasks), dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.log_weights], lr=self.config.lr)
        self._initial_sum = torch.zeros(len(self.tasks), dtype=torch.float64)
        self._steps = 0

    def weights(self) -> dict[str, float]:
        """The weights, within `clip` and summing to the number of tasks."""
        return dict(zip(self.tasks, self.log_weights.detach().exp().tolist(), strict=True))

    def combine(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return Σ_k w_k L_k with constant weights: what the network is trained on.

        Raises:
            ValueError: `losses` are not exactly the tasks.
        """
        self._check(losses)
        weights = self.weights()
        return torch.stack([weights[task] * losses[task] for task in self.tasks]).sum()

    @property
    def warming(self) -> bool:
        """Whether the next step is one of the first, which average the losses and need no layer."""
        return self._steps < self.config.warm_steps

    def step(
        self, losses: Mapping[str, Tensor], shared: Tensor | None, gradients: Gradients = local_gradients
    ) -> dict[str, float]:
        """Update the weights; call before `combine(losses).backward()`, whose graph stays intact.

        Neither `shared.grad` nor that of any other parameter is touched. A step with a loss or a gradient that is not
        finite changes nothing but the step count.

        Args:
            losses: scalar per task, unweighted.
            shared: the parameter θ at which the gradients are measured; may be None while `warming`.
            gradients: how they are found.

        Returns:
            For the history: `gradnorm` (L_GN), and per task `weight_<task>` (after the step) and, when balanced,
            `gradient_<task>` (w_k ‖∇ L_k‖ before it) and `ratio_<task>` (r_k).

        Raises:
            ValueError: `losses` are not exactly the tasks, or `shared` is None after the warm-up.
        """
        self._check(losses)
        if shared is None and not self.warming:
            raise ValueError("GradNorm needs a shared parameter after its warm-up")
        values = torch.stack([losses[task].detach().double() for task in self.tasks]).cpu()
        self._steps += 1
        report: dict[str, float] = {}
        if self._steps <= self.config.warm_steps:
            self._initial_sum += torch.where(values.isfinite(), values, 0.0)
        elif shared is not None and self._steps % self.config.every == 0:
            found = gradients({task: losses[task] for task in self.tasks}, [shared])
            norms = torch.stack([_norm(found[task][0], shared) for task in self.tasks]).double().cpu()
            if values.isfinite().all() and norms.isfinite().all():
                report = self._balance(norms, self._ratios(values))
        return report | {f"weight_{task}": weight for task, weight in self.weights().items()}

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        if set(losses) != set(self.tasks):
            raise ValueError(f"GradNorm balances {sorted(self.tasks)}, got {sorted(losses)}")

    def _ratios(self, values: Tensor) -> Tensor:
        """Relative inverse training rates r_k, mean 1: a loss that fell less than the others has r > 1."""
        initial = (self._initial_sum / self.config.warm_steps).clamp(min=self.config.floor)
        progress = (values / initial).clamp(min=0)  # SDM can be a hair below 0
        return progress / progress.mean().clamp(min=_SMALLEST_RATIO)

    def _balance(self, norms: Tensor, ratios: Tensor) -> dict[str, float]:
        config = self.config
        pulls = self.log_weights.exp() * norms
        loss = (pulls - self._targets(pulls.detach(), ratios)).abs().sum()
        regulariser = self.log_weights.square().sum()
        (self.log_weights.grad,) = torch.autograd.grad(
            config.coef * loss + config.weight_reg * regulariser, self.log_weights
        )
        self._optimizer.step()
        with torch.no_grad():
            self.log_weights.copy_(_renormalise(self.log_weights.exp(), *config.clip).log())
        return {
            "gradnorm": loss.item(),
            **{f"gradient_{task}": value for task, value in zip(self.tasks, pulls.tolist(), strict=True)},
            **{f"ratio_{task}": value for task, value in zip(self.tasks, ratios.tolist(), strict=True)},
        }

    def _targets(self, pulls: Tensor, ratios: Tensor) -> Tensor:
        """What each weighted gradient norm should be: constants, shape (K,)."""
        first = self.config.ref == "first"
        shares = ratios**self.config.exponent
        if self.config.targets == "feasible":
            shares = shares / (shares[0] if first else shares.mean()).clamp(min=_SMALLEST_SHARE)
        return shares * (pulls[0] if first else pulls.mean())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue bit for bit; tensors and plain values only."""
        return {
            "tasks": list(self.tasks),
            "steps": self._steps,
            "log_weights": self.log_weights.detach().clone(),
            "initial_sum": self._initial_sum.clone(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state belongs to other tasks or to another order of them.
        """
        if tuple(state["tasks"]) != self.tasks:
            raise ValueError(f"the saved state balances {state['tasks']}, this run {list(self.tasks)}")
        self._steps = int(state["steps"])
        with torch.no_grad():
            self.log_weights.copy_(state["log_weights"])
        self._initial_sum = state["initial_sum"].to("cpu", torch.float64, copy=True)
        self._optimizer.load_state_dict(state["optimizer"])


def _norm(gradient: Tensor | None, shared: Tensor) -> Tensor:
    """‖∂loss/∂shared‖₂, 0 if the loss does not depend on it."""
    if gradient is None:
        return torch.zeros((), device=shared.device)
    norm: Tensor = torch.linalg.vector_norm(gradient.detach().float())
    return norm


def _renormalise(weights: Tensor, low: float, high: float) -> Tensor:
    """Scale to a sum of K and clip, again until both hold; low <= 1 <= high makes that possible.

    Differs from the papers, which clip once: then the weights no longer sum to K.
    """
    count = len(weights)
    for _ in range(200):
        weights = (weights * (count / weights.sum())).clamp(low, high)
        if abs(weights.sum().item() - count) < 1e-9 * count:
            break
    return weights
