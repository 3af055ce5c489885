"""`finetune --find-lr` and `finetune --overfit`: short trials from the starting weights that train nothing for good."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reidctl import tables
from reidctl.device import resolve_device
from reidctl.report.rates import draw_rates
from reidctl.runs import Run
from reidctl.stages import finetune
from reidctl.stages.finetune import Loaded, Prepared
from reidctl.training.feed import Feed
from reidctl.training.probes import find_rate, overfit


def search_rate(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
    steps: int = 100,
) -> dict[str, Any]:
    """Let the learning rate grow over `steps` steps and draw the objective in `RUN/finetune-lr.png`.

    Returns:
        A record with `suggested` (a value for `train.lr`; None if the objective never fell), `now` (the recipe's) and
        `points` (rate, smoothed objective).

    Raises:
        UsageError, DataError: whatever `finetune` would refuse before it trains.
    """
    asked = finetune.prepare(run, recipe, method=method, data=data, captions=captions, device=device)
    began = time.monotonic()
    loaded = finetune.load(asked)
    feed = _feed(asked, loaded)
    found = find_rate(loaded.model, feed, asked.training, stage=finetune.STAGE, seed=asked.seed, steps=steps)
    picture = run.path / "finetune-lr.png"
    tables.write_bytes(picture, draw_rates(found.rates, found.objectives, found.suggested, asked.training.lr))
    points = [list(pair) for pair in zip(found.rates, found.objectives, strict=True)]
    facts = {"suggested": found.suggested, "now": asked.training.lr, "points": points, "picture": str(picture)}
    return _record(asked, began, facts)


def overfit_batch(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
    steps: int = 100,
) -> dict[str, Any]:
    """Train on the first batch alone for `steps` steps.

    Returns:
        A record with `first` and `last` (objective and losses by name), `rank1` (within the batch, before and after)
        and `learnt` (whether every query of the batch finds its person).

    Raises:
        UsageError, DataError: whatever `finetune` would refuse before it trains, or a loss that is not finite.
    """
    asked = finetune.prepare(run, recipe, method=method, data=data, captions=captions, device=device)
    began = time.monotonic()
    loaded = finetune.load(asked)
    feed = _feed(asked, loaded)
    found = overfit(loaded.model, feed, asked.training, stage=finetune.STAGE, seed=asked.seed, steps=steps)
    facts = {"first": found.first, "last": found.last, "rank1": list(found.rank1), "learnt": found.learnt}
    return _record(asked, began, facts)


def _feed(asked: Prepared, loaded: Loaded) -> Feed:
    return Feed(loaded.samples, asked.training, asked.seed, resolve_device(asked.training.device))


def _record(asked: Prepared, began: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"stage": finetune.STAGE, "status": "trial", "method": asked.checked.name, "outputs": {}, "metrics": {}}
    return {**plain, "seconds": round(time.monotonic() - began, 3), **facts}
