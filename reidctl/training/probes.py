"""Two questions to ask before hours of training: which learning rate, and whether the model can learn one batch."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reidctl.batch import Batch
from reidctl.console import progress
from reidctl.device import resolve_device
from reidctl.errors import UsageError
from reidctl.methods.base import Method
from reidctl.training.config import TrainConfig
from reidctl.training.feed import Feed
from reidctl.training.optimizer import build_optimizer
from reidctl.training.step import Step

_SMOOTHING = 0.9
_BLOWN_UP = 4.0
"""The search ends when the smoothed objective is this many times its smallest value."""


@dataclass(frozen=True)
class RateSearch:
    """Objectives while the learning rate grew.

    Attributes:
        rates: values of `train.lr`, rising; the other rates keep their ratio to it.
        objectives: the weighted sum of the losses at each, smoothed.
        suggested: the middle of the fifth of the search, before any jump up, over which the objective fell most;
            None if it never fell.
    """

    rates: list[float]
    objectives: list[float]
    suggested: float | None


@dataclass(frozen=True)
class Overfit:
    """What became of one batch that was trained on again and again.

    Attributes:
        first, last: objective and losses, by name, at the first and at the last step.
        rank1: share of the batch's queries whose nearest image shows their person, before and after.
        steps: taken.
    """

    first: dict[str, float]
    last: dict[str, float]
    rank1: tuple[float, float]
    steps: int

    @property
    def learnt(self) -> bool:
        """Whether every query of the batch finds its person."""
        return self.rank1[1] == 1.0


class _Bench:
    """A training without epochs, files or validation."""

    def __init__(self, method: Method, feed: Feed, config: TrainConfig, stage: str, seed: int) -> None:
        device = resolve_device(config.device)
        self.method = method.to(device)
        self.feed, self.config, self.stage = feed, config, stage
        self.optimizer = build_optimizer(method, stage, config)
        method.begin(stage)
        torch.manual_seed(seed * 1_000_003)
        method.train()
        self.step = Step(method, self.optimizer, config, stage)

    def batches(self) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from self.feed.load(self.feed.plan(epoch))

    def rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("base_lr", 0.0) * factor


def _unchecked(values: Mapping[str, Tensor]) -> None:
    """A search goes on until the objective blows up; that it does is the answer."""


def find_rate(
    method: Method,
    feed: Feed,
    config: TrainConfig,
    *,
    stage: str,
    seed: int,
    steps: int = 100,
    low: float = 1e-7,
    high: float = 1.0,
) -> RateSearch:
    """Let the learning rate grow evenly on a logarithmic scale and watch the objective; changes the method.

    Smith 2017, arXiv:1506.01186 (learning-rate range test). The objective is smoothed with a decay of 0.9 from
    the mean of some steps at the lowest rate; the search ends early where it is four times its smallest value or not
    finite.

    Args:
        method: untrained, on its starting weights.
        feed: its batches.
        config: of the training; its schedule is not used.
        stage: the training stage.
        seed: of dropout and masking.
        steps: from `low` to `high`.
        low, high: values of `train.lr`.

    Raises:
        UsageError: `train.lr` is 0, so that no rate has a ratio to it, or the range is empty.
    """
    if not config.lr > 0 or not 0 < low < high:
        raise UsageError("The search for a learning rate needs train.lr above 0 and a range of rates above 0.")
    bench = _Bench(method, feed, config, stage, seed)
    batches = bench.batches()
    # Batches differ more than the first steps do: the mean of some at the lowest rate is where the curve begins.
    before = max(steps // 10, 5)
    rates: list[float] = []
    smooth: list[float] = []
    with progress("learning rates", before + steps, unit="steps") as advance:

        def objective(rate: float) -> float:
            bench.rates(rate / config.lr)
            advance(1)
            return float(bench.step(next(batches), check=_unchecked).objective)

        now = sum(objective(low) for _ in range(before)) / before
        for number in range(steps):
            rate = low * (high / low) ** (number / max(steps - 1, 1))
            now = _SMOOTHING * now + (1 - _SMOOTHING) * objective(rate)
            if not math.isfinite(now) or (smooth and now > _BLOWN_UP * max(min(smooth), 1e-12)):
                break
            rates.append(rate)
            smooth.append(now)
    return RateSearch(rates, smooth, _steepest(rates, smooth))


def _steepest(rates: list[float], objectives: list[float]) -> float | None:
    """The middle of the fifth of the search over which the objective falls most; None if it never falls.

    Only what comes before the first jump up counts, by a quarter of the whole range in one step: features that have
    collapsed there give an objective that sinks to a constant.
    """
    jump = (max(objectives, default=0.0) - min(objectives, default=0.0)) / 4
    steps = itertools.pairwise(objectives)
    end = next((place for place, (one, other) in enumerate(steps, 1) if other - one > jump > 0), len(rates))
    width = max(end // 5, 1)
    falls = [(objectives[place + width] - objectives[place], place) for place in range(end - width)]
    if not falls or min(falls)[0] >= 0:
        return None
    place = min(falls)[1]
    return math.sqrt(rates[place] * rates[place + width])


def overfit(method: Method, feed: Feed, config: TrainConfig, *, stage: str, seed: int, steps: int = 100) -> Overfit:
    """Train on the first batch alone, at the full learning rate; changes the method.

    A model, loss and learning rate that are put together rightly learn one batch by heart within some hundred steps;
    where they do not, an epoch on everything will not help.
    """
    bench = _Bench(method, feed, config, stage, seed)
    loading = bench.batches()
    batch = next(loading)
    before = _rank1(bench, batch)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    bench.rates(1.0)
    with progress("one batch", steps, unit="steps") as advance:
        for _ in range(steps):
            done = bench.step(batch, check=_finite)
            last = {
                "total": float(done.objective),
                **{name: float(value.detach()) for name, value in done.losses.items()},
            }
            first = first or last
            advance(1)
    return Overfit(first, last, (before, _rank1(bench, batch)), steps)


def _finite(values: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise UsageError(f"`{bad[0]}` is not finite on the first batch.", hint="Lower train.lr.")


@torch.no_grad()
def _rank1(bench: _Bench, batch: Batch) -> float:
    """Rank-1 within the batch: texts among its images, or, without texts, images among the others."""
    method = bench.method.eval()
    given = bench.step.send(batch)
    person = given.require("person")
    made = method.embed_tasks(given)
    if "full" in given.texts and method.selects_by == "t2i":
        similarity = method.embed_texts(given) @ made["t2i"].T
        owner = person[given.image_of_text()]
    else:
        gallery = made["i2i"] if "i2i" in made else made["t2i"]
        similarity = gallery @ gallery.T
        similarity.fill_diagonal_(-math.inf)
        owner = person
        several = (person[:, None] == person).sum(dim=1) > 1
        similarity, owner = similarity[several], owner[several]
    method.train()
    right = person[similarity.argmax(dim=1)] == owner
    return float(right.float().mean()) if len(right) else 0.0
