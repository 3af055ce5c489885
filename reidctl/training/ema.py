"""An average of the weights over the steps, which is validated and kept in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from reidctl.methods.base import Method
from reidctl.training.sharding import like


class Average:
    """The exponential moving average of all weights that train: a <- decay a + (1 - decay) w after every step.

    It starts at the weights that training starts from. Statistics of norms are averages of their own and stay as they
    are.

    Args:
        method: whose weights; those that train must be known already.
        decay: in [0, 1).
    """

    def __init__(self, method: Method, decay: float) -> None:
        self.decay = decay
        self._weights = {name: value for name, value in method.named_parameters() if value.requires_grad}
        self._mean = {name: value.detach().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights of now."""
        if self._mean:
            torch._foreach_lerp_(list(self._mean.values()), list(self._weights.values()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the method for a while."""
        kept = {name: value.detach().clone() for name, value in self._weights.items()}
        self.adopt()
        try:
            yield
        finally:
            self._fill(kept)

    def adopt(self) -> None:
        """Put the average into the method for good."""
        self._fill(self._mean)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._weights.items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for name, value in self._mean.items():
            value.copy_(like(state[name], value))
