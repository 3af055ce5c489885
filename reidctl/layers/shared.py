"""Which parameter GradNorm measures gradients at: one that every balanced loss moves."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from reidctl.errors import UsageError
from reidctl.layers.gradients import Gradients, local_gradients

LAST_MLP, AUTO = "last_mlp", "auto"


class SharedLayer:
    """Chooses a parameter in the first training steps and keeps it.

    `last_mlp` is the last image block's MLP output weight if it trains and every loss has a non-zero gradient there,
    and otherwise what `auto` finds: the last weight (two or more dimensions, so that biases and gains of norms are
    passed over) that has a non-zero gradient from every loss. "Last" is the order of `parameters`, which for
    `named_parameters()` is that of construction. Any other rule is the name of a parameter.

    **A gradient can be absent or zero.** Absent, because the loss does not depend on the parameter: that never
    changes and decides at the first step, on which `UsageError` is raised if no parameter is left. Zero, because
    of values: the HSIC of a batch of equal features, a triplet loss whose margins are all kept. That says nothing yet,
    so the choice waits for the other steps of the warm-up, in which all weights are 1 and no layer is needed; a
    gradient seen in any of them counts. A loss that is still zero everywhere when the warm-up ends is judged by its
    graph alone.

    Args:
        rule: `last_mlp`, `auto` or a name.
        tasks: the balanced losses.
        last_mlp: the name of the last image block's MLP output weight.

    Attributes:
        wanted: the parameter that the rule names; None for `auto`.
        name: the chosen parameter; None before the choice.
        reason: why it is another than asked for; empty if it is not.
    """

    def __init__(self, rule: str, tasks: Sequence[str], last_mlp: str) -> None:
        self.rule, self.tasks = rule, tuple(tasks)
        self.wanted = None if rule == AUTO else last_mlp if rule == LAST_MLP else rule
        self.name: str | None = None
        self.reason = ""
        self._moved: dict[str, set[str]] = {task: set() for task in self.tasks}

    def choose(
        self,
        losses: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        *,
        wait: bool,
        gradients: Gradients = local_gradients,
    ) -> bool:
        """Look at one step's losses unless the choice is made; return whether this call made it.

        No `.grad` is touched; the graph is kept.

        Args:
            losses: scalar per task.
            parameters: those that train, by name.
            wait: whether a loss without a gradient may still get one in a later step.
            gradients: how they are found.

        Raises:
            UsageError: no parameter is under all losses, or the named one is not.
        """
        if self.name is not None:
            return False
        if self.wanted is not None and self.wanted in parameters:
            wired = self._look(losses, {self.wanted: parameters[self.wanted]}, gradients)
            absent = [task for task in self.tasks if not wired[task]]
            if not absent:
                if all(self.wanted in self._moved[task] for task in self.tasks):
                    return self._take(self.wanted)
                if wait:
                    return False
            if self.rule != LAST_MLP:
                if absent:
                    raise self._refusal(f"{_listed(absent)} {_do(absent)} not depend on `{self.wanted}`")
                return self._take(self.wanted)
        return self._search(losses, parameters, gradients, wait=wait)

    def _search(
        self,
        losses: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        *,
        wait: bool,
    ) -> bool:
        weights = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
        wired = self._look(losses, weights, gradients)
        if not set.intersection(*wired.values()):
            raise self._refusal(_nothing_shared(wired))
        silent = [task for task in self.tasks if not self._moved[task]]
        if silent and wait:
            return False
        under = [wired[task] if task in silent else self._moved[task] & wired[task] for task in self.tasks]
        found = [name for name in weights if all(name in names for names in under)]
        if found:
            chosen = self.wanted if self.wanted in found else found[-1]
            missing = "does not train" if self.wanted not in parameters else "is not under every loss"
            if self.wanted is not None and chosen != self.wanted:
                self.reason = f"`{self.wanted}` {missing}"
            return self._take(chosen)
        if wait:
            return False
        raise self._refusal(f"no weight gets a non-zero gradient from all of {_listed(self.tasks)}")

    def _look(
        self, losses: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], gradients: Gradients
    ) -> dict[str, set[str]]:
        """On which parameters each loss depends; notes where its gradient is not zero."""
        every = gradients({task: losses[task] for task in self.tasks}, list(parameters.values()))
        wired: dict[str, set[str]] = {}
        for task in self.tasks:
            reached = {name: grad for name, grad in zip(parameters, every[task], strict=True) if grad is not None}
            wired[task] = set(reached)
            self._moved[task] |= {name for name, grad in reached.items() if bool(grad.any())}
        return wired

    def _take(self, name: str | None) -> bool:
        self.name = name
        return True

    def _refusal(self, why: str) -> UsageError:
        return UsageError(
            f"GradNorm needs one layer under all its losses, and {why}.",
            hint="Use method.gradnorm=null (fixed weights), another method.gradnorm.layer, or a smaller method.freeze.",
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to choose as this one would; plain values only."""
        moved = {task: sorted(names) for task, names in self._moved.items()}
        return {"name": self.name, "reason": self.reason, "moved": {} if self.name else moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.name, self.reason = state["name"], state["reason"]
        self._moved = {task: set(state["moved"].get(task, ())) for task in self.tasks}


def _nothing_shared(wired: Mapping[str, set[str]]) -> str:
    """Which losses share nothing, in words: the ones that move nothing, else a pair, else all."""
    idle = [task for task, names in wired.items() if not names]
    if idle:
        return f"{_listed(idle)} {_do(idle)} not depend on any weight that trains"
    for one, other in itertools.combinations(wired, 2):
        if not wired[one] & wired[other]:
            return f"`{one}` and `{other}` share no weight that trains"
    return f"{_listed(list(wired))} share no weight that trains"


def _listed(names: Sequence[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"
