"""`caption`: an identity and a clothing text per image, in the writing styles of the train captions."""

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.captioning.asking import SERVICES, checks_digest
from reidctl.captioning.backends.base import Describer, make_describer
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import make_embed
from reidctl.captioning.estimate import asks
from reidctl.captioning.forecast import dearest, forecast
from reidctl.captioning.journal import Index
from reidctl.captioning.plan import Plan
from reidctl.captioning.pricing import FREE, Price, Prices, load_prices, price_of
from reidctl.captioning.run import CaptionRun, caption_images
from reidctl.captioning.stylebook import neutral_requests, preview_styles, style_texts
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.errors import DataError, RemoteError, UsageError
from reidctl.runs import Run, digest
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
        The stage's record with `status`: `done`, `up-to-date`, `dry-run`, `part` (one shard), `pending` (requests are
        open in a batch) or `budget` (`max_cost` ended the run). Only the first two stand for a finished stage; after
        the others tables and record of an earlier run are as they were.

    Raises:
        UsageError: settings that contradict each other, a budget without a known price, open batches.
        DataError: no text at all passed the checks.
        RemoteError: the service answered nothing.
    """
    section = {"seed": recipe.get("seed", 0), **(recipe.get("caption") or {})}
    config = parse_section(CaptionConfig, section, "caption")
    if force and not dry_run:
        _forget_damaged(run)
    source = find_source(run, data)
    inputs = _inputs(source, config)
    current = None if force or dry_run else run.up_to_date(STAGE, _settings(config), inputs)
    if current is not None and not current["metrics"].get("failed"):
        return {**current, "status": "up-to-date"}
    job = _prepare(run, source, config)
    if dry_run:
        return _dry(run, job)
    started = datetime.now(UTC)
    run.check_writable()
    done = _describe(run, job, source.folder)
    close = getattr(job.describer, "close", None)
    if close is not None:  # a local model; what follows needs no memory on the GPU
        close()
    _check_usable(done, job)
    totals = {name: None if math.isnan(value) else value for name, value in done.totals.items()}
    facts = _facts(done, job)
    if done.stopped:
        record = {"stage": STAGE, "status": done.stopped, "outputs": {}, "metrics": totals}
        return {**record, "seconds": _since(started), **facts}
    record = run.finish(
        STAGE,
        settings=_settings(config),
        inputs=inputs,
        outputs=[run.table(STAGE, "captions"), run.table(STAGE, "styles")],
        started=started,
        metrics=totals,
        extra={**facts, "command": _command()},
    )
    return {**record, "status": "done"}


def _forget_damaged(run: Run) -> None:
    """Remove a record that cannot be read: with `force` it would only stand in the way."""
    try:
        run.record(STAGE)
    except DataError:
        run.unfinish(STAGE)


def _inputs(source: Source, config: CaptionConfig) -> dict[str, str]:
    """Digests of what is read; recorded texts are an input like the images."""
    inputs = {name: value for name, value in source.digests().items() if name != "described"}
    name, _, argument = config.mllm.partition(":")
    if name in ("file", "replay") and Path(argument).exists():
        place = Path(argument)
        # Of a run's folder only the replies: its other files change when the replay writes them.
        parts = sorted(place.rglob("replies-*.jsonl")) if place.is_dir() else [place]
        inputs["texts"] = " ".join(digest(part) for part in parts)
    if config.prices is not None and config.prices.is_file():
        inputs["prices"] = digest(config.prices)
    return inputs


def _settings(config: CaptionConfig) -> dict[str, Any]:
    return {"caption": {**config.model_dump(mode="json"), "mllm": _without_arguments(config.mllm)}}


def _command() -> list[str]:
    """The command line as it is recorded."""
    return [Path(sys.argv[0]).name, *(_without_arguments(word) for word in sys.argv[1:])]


def _without_arguments(word: str) -> str:
    """`command:PROGRAM ARGS` with a digest for the arguments, which may hold a secret; anything else as it is."""
    option, found, line = word.partition("command:")
    if not found or option not in ("", "--mllm=", "caption.mllm="):
        return word
    program = line.split()[0] if line.split() else ""
    return f"{option}command:{program}#{hashlib.sha256(line.encode('utf-8', 'replace')).hexdigest()[:12]}"


def _facts(done: CaptionRun, job: "_Job") -> dict[str, Any]:
    return {
        "model": job.describer.model,
        "asked_for": _without_arguments(job.config.mllm),
        "texts": done.texts,
        "refused_by_check": done.codes,
        "currency": job.currency if done.totals["cost"] == done.totals["cost"] else None,
        "pending": done.pending,
        "over_budget": done.over_budget,
        "styles": {"algorithm": job.config.style.algorithm, "count": len(done.styles), **done.style_report},
    }


@dataclass(frozen=True)
class _Job:
    """What a run needs before it asks anything."""

    images: pd.DataFrame
    captions: pd.DataFrame | None
    config: CaptionConfig
    describer: Describer
    prices: Prices
    price: Price | None

    @property
    def currency(self) -> str:
        return self.prices.currency

    def embed(self, texts: list[str]) -> npt.NDArray[Any]:
        """Vectors of texts; the encoder is loaded when there is something to encode."""
        return make_embed(self.config.style.encoder)(texts)


def _prepare(run: Run, source: Source, config: CaptionConfig) -> _Job:
    describer = make_describer(config, run.stage_dir(STAGE))
    prices = load_prices(config.prices)
    price = price_of(prices, config, describer.model)
    if config.max_cost is not None and price is None:
        raise UsageError(
            f"There is no price for {describer.model}, so --max-cost cannot be kept.",
            hint="Add it to a table and give that with --prices; docs/captioning.md shows one.",
        )
    if config.max_cost is not None and price is FREE:
        log.warning("%s costs nothing by the price table, so --max-cost stops nothing.", describer.model)
    images = tables.read_table(source.images, "images", _IMAGE_COLUMNS)
    captions = tables.read_table(source.captions, "captions") if source.captions.is_file() else None
    return _Job(images, captions, config, describer, prices, price)


def _describe(run: Run, job: _Job, root: Path) -> CaptionRun:
    config = job.config
    ledger = Ledger(
        job.price, most=_most(job), max_cost=config.max_cost, batch=config.batch.enabled, price_of=job.prices.find
    )
    total = len(Plan(job.images, tables.empty("styles"), job.describer, config))
    with progress(f"caption ({job.describer.model})", total, unit="texts") as advance:
        return caption_images(
            job.images,
            job.captions,
            job.describer,
            config,
            run.stage_dir(STAGE),
            embed=job.embed,
            root=root,
            ledger=ledger,
            advance=advance,
            before_writing=lambda: run.unfinish(STAGE),
        )


def _most(job: _Job) -> tuple[int, int]:
    """The tokens of the dearest request; the styles are not known yet, so the longest instruction is assumed."""
    if job.price is None:
        return 0, 0
    config, model = job.config, job.describer.model
    neutral = style_texts(job.images, job.captions, config) if config.style.neutralise == "mllm" else []
    return dearest(asks(config, ["x" * 800], model), job.images, neutral, job.price, config, model)


def _check_usable(done: CaptionRun, job: _Job) -> None:
    """Say what went wrong; stop where nothing at all came of it."""
    total, ok, failed = (int(done.totals[name]) for name in ("rows", "ok", "failed"))
    if done.stopped in ("pending", "budget"):
        return
    why = f"; the first reason: {done.first_reason}" if done.first_reason else ""
    if total and not ok:
        if job.describer.name in SERVICES and failed == total:
            raise RemoteError(
                f"{job.describer.model} answered none of the {total} requests{why}.",
                hint="Mend what the reason says and run it again: nothing that was stored is lost.",
            )
        raise DataError(f"None of the {total} texts is usable{why}.", hint="See the captions table for all reasons.")
    if bad := total - ok:
        log.warning("%d of %d texts are not usable%s.", bad, total, why)


def _dry(run: Run, job: _Job) -> dict[str, Any]:
    """What a run would ask for and cost."""
    config, folder = job.config, run.stage_dir(STAGE)
    started = datetime.now(UTC)
    stored = Index(folder / "parts", checks_digest(config)).load()
    texts = style_texts(job.images, job.captions, config)
    neutral = neutral_requests(texts, config, job.describer) if config.style.neutralise == "mllm" and texts else []
    styles, report = preview_styles(texts, config, job.describer, folder / "parts", job.embed)
    plan = Plan(job.images, styles, job.describer, config)
    ahead = forecast(plan, neutral, stored, job.price)
    spent = Ledger(job.price, price_of=job.prices.find)
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
