"""`caption`: an identity and a clothing text per image, in the writing styles of the train captions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.captioning.asking import checks_digest
from reidctl.captioning.backends.base import Describer, make_describer
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import make_embed
from reidctl.captioning.estimate import asks
from reidctl.captioning.forecast import dearest, forecast
from reidctl.captioning.journal import Index
from reidctl.captioning.plan import Plan
from reidctl.captioning.pricing import Price, load_prices, price_of
from reidctl.captioning.run import CaptionRun, caption_images, neutral_requests, preview_styles, style_texts
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.errors import DataError, RemoteError, UsageError
from reidctl.runs import Run
from reidctl.stages.sources import Source, find_source

STAGE = "caption"
_IMAGE_COLUMNS = ("image_id", "path", "split", "sha256", "width", "height", "attributes")


def run(
    run: Run, recipe: Mapping[str, Any], *, data: Path | None = None, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Write the texts that `--mllm` gives for every image, checked, and the styles that guided them.

    Replies are kept as they arrive: a killed stage goes on where it was and asks nothing twice. `force` runs the stage
    again but still uses the replies it has, because they may have been paid for. The stage counts as up to date only
    when no text failed, so that running it again asks for what a service did not answer.

    Args:
        run: where the stage writes.
        recipe: sections `caption` and `seed` are read.
        data: the dataset folder; default: the run's.
        force: run again even if nothing changed.
        dry_run: say what would be asked and what it would cost; nothing is sent or written.

    Returns:
        The stage's record with `status`: `done`, `up-to-date`, `dry-run`, `part` (one shard) or `pending` (requests are
        open in a batch); the last three write no record. `stopped` is `budget` where `max_cost` ended the run.

    Raises:
        UsageError: settings that contradict each other, a budget without a known price, open batches.
        DataError: no text at all passed the checks.
        RemoteError: the service answered nothing.
    """
    section = {"seed": recipe.get("seed", 0), **(recipe.get("caption") or {})}
    config = parse_section(CaptionConfig, section, "caption")
    source = find_source(run, data)
    settings = {"caption": config.model_dump(mode="json")}
    inputs = {name: value for name, value in source.digests().items() if name != "described"}
    current = None if force or dry_run else run.up_to_date(STAGE, settings, inputs)
    if current is not None and not current["metrics"].get("failed"):
        return {**current, "status": "up-to-date"}
    job = _prepare(run, source, config)
    if dry_run:
        return _dry(run, job)
    _refuse_open_batches(run, config)
    started = datetime.now(UTC)
    run.check_writable()
    run.unfinish(STAGE)
    done = _describe(run, job, source.folder)
    _check_usable(done, job)
    totals = {name: None if math.isnan(value) else value for name, value in done.totals.items()}
    extra = {
        "model": job.describer.model,
        "asked_for": config.mllm,
        "texts": done.texts,
        "refused_by_check": done.codes,
        "currency": job.currency if job.price else None,
        "stopped": done.stopped,
        "pending": done.pending,
        "styles": {"algorithm": config.style.algorithm, "count": len(done.styles), **done.style_report},
    }
    if done.stopped in ("pending", "part") or (done.stopped and config.shard):
        return {"stage": STAGE, "outputs": {}, "metrics": totals, "seconds": _since(started), **extra} | {
            "status": "pending" if done.stopped == "pending" else "part"
        }
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, "captions"), run.table(STAGE, "styles")],
        started=started,
        metrics=totals,
        extra=extra,
    )
    return {**record, "status": "done"}


@dataclass(frozen=True)
class _Job:
    """What a run needs before it asks anything."""

    images: pd.DataFrame
    captions: pd.DataFrame | None
    config: CaptionConfig
    describer: Describer
    price: Price | None
    currency: str


def _prepare(run: Run, source: Source, config: CaptionConfig) -> _Job:
    describer = make_describer(config, run.stage_dir(STAGE))
    prices = load_prices(config.prices)
    price = price_of(prices, config, describer.model)
    if config.max_cost is not None and price is None:
        raise UsageError(
            f"There is no price for {describer.model}, so --max-cost cannot be kept.",
            hint="Add it to a table and give that with --prices; docs/captioning.md shows one.",
        )
    images = tables.read_table(source.images, "images", _IMAGE_COLUMNS)
    captions = tables.read_table(source.captions, "captions") if source.captions.is_file() else None
    return _Job(images, captions, config, describer, price, prices.currency)


def _describe(run: Run, job: _Job, root: Path) -> CaptionRun:
    config = job.config
    bound = _bound(job)
    ledger = Ledger(job.price, bound=bound, max_cost=config.max_cost, batch=config.batch.enabled)
    total = len(Plan(job.images, tables.empty("styles"), job.describer, config))
    with progress(f"caption ({job.describer.model})", total, unit="texts") as advance:
        return caption_images(
            job.images,
            job.captions,
            job.describer,
            config,
            run.stage_dir(STAGE),
            embed=make_embed(config.style.encoder),
            root=root,
            ledger=ledger,
            advance=advance,
        )


def _bound(job: _Job) -> float:
    """What the dearest request can cost; the styles are not known yet, so the longest instruction is assumed."""
    if job.price is None:
        return 0.0
    config, model = job.config, job.describer.model
    neutral = style_texts(job.images, job.captions, config) if config.style.neutralise == "mllm" else []
    return dearest(asks(config, ["x" * 800], model), job.images, neutral, job.price, config, model)


def _check_usable(done: CaptionRun, job: _Job) -> None:
    """Say what went wrong; stop where nothing at all came of it."""
    total, ok, failed = (int(done.totals[name]) for name in ("rows", "ok", "failed"))
    if done.stopped == "pending":
        return
    why = f"; the first reason: {done.first_reason}" if done.first_reason else ""
    if total and not ok and not done.stopped:
        if job.describer.source == "mllm" and failed == total:
            raise RemoteError(
                f"{job.describer.model} answered none of the {total} requests{why}.",
                hint="Check the address and the key, then run again: nothing was lost.",
            )
        raise DataError(f"None of the {total} texts is usable{why}.", hint="See the captions table for all reasons.")
    if bad := total - ok:
        log.warning(f"{bad} of {total} texts are not usable{why}.")


def _refuse_open_batches(run: Run, config: CaptionConfig) -> None:
    if config.batch.enabled or not (run.stage_dir(STAGE) / "batches.jsonl").is_file():
        return
    from reidctl.captioning.backends.batch import open_requests

    if waiting := open_requests(run.stage_dir(STAGE)):
        raise UsageError(
            f"{waiting} requests are open in a batch at the provider; asking them again would be paid twice.",
            hint="Run with --batch to fetch them, or with --batch --cancel to give them up.",
        )


def _dry(run: Run, job: _Job) -> dict[str, Any]:
    """What a run would ask for and cost."""
    config, folder = job.config, run.stage_dir(STAGE)
    started = datetime.now(UTC)
    stored = Index(folder / "parts", checks_digest(config)).load()
    texts = style_texts(job.images, job.captions, config)
    neutral = neutral_requests(texts, config, job.describer) if config.style.neutralise == "mllm" and texts else []
    styles, report = preview_styles(texts, config, job.describer, folder, make_embed(config.style.encoder))
    plan = Plan(job.images, styles, job.describer, config)
    ahead = forecast(plan, neutral, stored, job.price)
    spent = Ledger(job.price)
    spent.pay_for(stored)
    stored.close()
    return {
        "stage": STAGE,
        "status": "dry-run",
        "outputs": {},
        "seconds": _since(started),
        "model": job.describer.model,
        "asked_for": config.mllm,
        "currency": job.currency if job.price else None,
        "metrics": {**ahead, "spent": spent.spent},
        "styles": {"algorithm": config.style.algorithm, "count": len(styles), **report},
    }


def _since(started: datetime) -> float:
    return round((datetime.now(UTC) - started).total_seconds(), 3)


def cancel(run: Run, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Cancel the batches that are open at the provider; what they had finished is fetched by the next run.

    Raises:
        RemoteError: the provider refused.
    """
    from reidctl.captioning.backends.batch import cancel_all

    config = parse_section(CaptionConfig, dict(recipe.get("caption") or {}), "caption")
    started = datetime.now(UTC)
    cancelled = cancel_all(config, run.stage_dir(STAGE))
    outcome = {"stage": STAGE, "status": "cancelled", "outputs": {}, "metrics": {"cancelled": cancelled}}
    return {**outcome, "seconds": _since(started)}
