"""From images and captions to identity and clothing texts: styles, requests, checks, retries, and a table."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from reidctl.captioning.asking import NEUTRAL, Asker, checks_digest, stored_texts
from reidctl.captioning.backends.base import Describer, Request
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.journal import Entry, Index, Journal
from reidctl.captioning.plan import Plan, part_name
from reidctl.captioning.prompts import neutral_prompt
from reidctl.captioning.styles import Embed, discover_styles
from reidctl.captioning.validation import agreement
from reidctl.console import log
from reidctl.errors import DataError, UsageError
from reidctl.tables import TableWriter, empty, read_table, write_table, write_text

_CHUNK = 20_000
Stopped = Literal["budget", "pending", "part"]


@dataclass(frozen=True)
class CaptionRun:
    """What a run made.

    Attributes:
        path: the table of texts; not there when `stopped` is `pending` or `part`.
        styles: rows of the `styles` table.
        style_report: how the styles were found (`StyleReport.as_dict`), empty without styles.
        texts: rows by kind and status.
        totals: counts over all rows (`ok`, `rejected`, `failed`) and over this process (`asked`, `resumed`,
            `judged_again`, and `not_asked` where the budget was spent); tokens and `cost` over everything stored;
            `coverage` (mean over ok texts), `agreement` (share of statements that fit the known attributes),
            `clothing_words_in_identity` (found in all replies).
        codes: how often each check failed in the end.
        first_reason: why the first text without success has none.
        stopped: None when every text has its outcome; `budget` when `max_cost` ended the run, `pending` when requests
            are open in a batch, `part` when this was one shard.
        pending: requests open at the provider.
    """

    path: Path
    styles: pd.DataFrame
    style_report: dict[str, Any]
    texts: dict[str, dict[str, int]]
    totals: dict[str, float]
    codes: dict[str, int]
    first_reason: str | None
    stopped: Stopped | None = None
    pending: int = 0

    @property
    def captions(self) -> pd.DataFrame:
        """Rows of the `captions` table, one per image and kind."""
        frame: pd.DataFrame = read_table(self.path, "captions")
        return frame


def caption_images(
    images: pd.DataFrame,
    captions: pd.DataFrame | None,
    describer: Describer,
    config: CaptionConfig,
    out_dir: Path,
    *,
    embed: Embed = hashed,
    root: Path | None = None,
    ledger: Ledger | None = None,
    advance: Callable[[int, str], None] | None = None,
) -> CaptionRun:
    """Write two texts per image, resuming what an earlier run stored in `out_dir`.

    `out_dir` gets `styles.parquet` and `captions.parquet`, and `parts/` with every reply as it came. A text depends on
    its image, the prompt and the train captions' styles, never on a caption of the image: `conditioned_on` is `image`.

    Args:
        images: rows of the `images` table; `image_id`, `path`, `split`, and `attributes` where the template writes.
        captions: rows of the `captions` table whose human texts in the train split show the styles; None for no style.
        describer: see `backends.base.make_describer`.
        config: the `caption` section.
        out_dir: where the run lives.
        embed: neutral texts -> vectors, for the styles.
        root: folder that relative image paths start from.
        ledger: prices and budget; default: neither.
        advance: told the number of rows finished, and now and then what was spent.

    Raises:
        RemoteError: the service refuses everything; what was stored stays and the next run goes on from there.
        DataError: the folder cannot be written or another process writes it.
    """
    account = ledger or Ledger()
    tick = advance or (lambda n, note: None)
    with Journal(out_dir / "parts", part_name(config.shard), checks_digest(config)) as journal:
        account.pay_for(journal)
        asker = Asker(describer, config, journal, account, tick)
        styles, report, waiting = _styles(images, captions, asker, out_dir, embed)
        plan = Plan(images, styles, describer, config, root)
        _warn_of_other_prompts(plan, journal)
        # Without styles yet, or without money for them, no image is asked about.
        pending = waiting or (0 if account.stopped else asker.ask(plan.requests()))
        stopped: Stopped | None = (
            "pending" if pending else "budget" if account.stopped else "part" if config.shard else None
        )
        tally = _Tally(absent="open" if pending else "failed")
        if stopped in (None, "budget") and not (stopped and config.shard):
            _write(out_dir / "captions.parquet", plan, journal, tally)
        else:
            tally.count(plan, journal)
        totals = {**tally.totals(), **_spent(journal, account), **{k: float(v) for k, v in asker.counts.items()}}
    return CaptionRun(
        path=out_dir / "captions.parquet",
        styles=styles,
        style_report=report,
        texts={kind: dict(counts) for kind, counts in tally.texts.items()},
        totals=totals,
        codes=dict(tally.codes.most_common()),
        first_reason=tally.first_reason,
        stopped=stopped,
        pending=pending,
    )


def _warn_of_other_prompts(plan: Plan, stored: Index) -> None:
    """Say so before a second bill: replies are there, but none of them answers what is asked now."""
    if len(stored) and len(plan) and not any(stored.find(request.key) for request in plan.requests()):
        log.warning(
            "caption: none of the %d stored replies belongs to these prompts (another model, style or setting), so "
            "everything is asked anew",
            len(stored),
        )


@dataclass
class _Tally:
    """Counts over the wanted texts, taken while they stream by; `absent` is the status of one without a reply."""

    absent: str = "failed"
    texts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    codes: Counter[str] = field(default_factory=Counter)
    first_reason: str | None = None
    _coverage: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _agreement: list[int] = field(default_factory=lambda: [0, 0])
    _clothing_words: int = 0

    def count(self, plan: Plan, stored: Index) -> None:
        """Count all texts of a plan."""
        for request in plan.requests():
            entry = stored.entry(request.key)
            self.add(plan.row(request, entry), request, entry)

    def add(self, row: dict[str, Any], request: Request, entry: Entry | None) -> None:
        """Count one text."""
        status = self.absent if entry is None else row["status"]
        self.texts[row["kind"]][status] += 1
        if status not in ("ok", "open"):
            self.codes.update(entry.codes or ("failed",) if entry is not None else ("not-asked",))
            self.first_reason = self.first_reason or row["reason"]
        if entry is None:
            return
        if entry.kind == "identity":
            self._clothing_words += entry.clothing_words
        if row["status"] == "ok":
            if entry.coverage is not None:
                self._coverage = [self._coverage[0] + entry.coverage, self._coverage[1] + 1]
            if request.attributes:
                right, wrong = agreement(row["text"], row["kind"], request.attributes)
                self._agreement = [self._agreement[0] + right, self._agreement[1] + right + wrong]

    def totals(self) -> dict[str, float]:
        """Return the sums over all kinds."""
        status = sum(self.texts.values(), Counter[str]())
        return {
            "rows": status.total(),
            **{name: status[name] for name in ("ok", "rejected", "failed")},
            "asked": 0,
            "resumed": 0,
            "judged_again": 0,
            "not_asked": self.codes["not-asked"],
            "coverage": self._coverage[0] / self._coverage[1] if self._coverage[1] else math.nan,
            "agreement": self._agreement[0] / self._agreement[1] if self._agreement[1] else math.nan,
            "clothing_words_in_identity": self._clothing_words,
        }


def _write(path: Path, plan: Plan, stored: Index, tally: _Tally) -> None:
    """The table of texts, in the order of the images, a chunk at a time."""
    rows: list[dict[str, Any]] = []
    with TableWriter(path, "captions") as writer:
        for request in plan.requests():
            entry = stored.entry(request.key)
            rows.append(plan.row(request, entry))
            tally.add(rows[-1], request, entry)
            if len(rows) >= _CHUNK:
                writer.write(_frame(rows))
                rows = []
        writer.write(_frame(rows))


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # object: an absent text stays None, as the tables read it back, and does not become NaN
    columns = empty("captions").columns
    return pd.DataFrame(rows, dtype=object)[list(columns)] if rows else empty("captions")


def _spent(journal: Index, ledger: Ledger) -> dict[str, float]:
    cost = math.nan if ledger.price is None else ledger.spent
    return {"tokens_in": journal.tokens_in, "tokens_out": journal.tokens_out, "cost": cost}


def train_captions(images: pd.DataFrame, captions: pd.DataFrame) -> list[str]:
    """Return the human captions of train images, in caption order: the only ones that styles may be fitted on."""
    train = set(images.loc[images["split"] == "train", "image_id"])
    chosen = (
        captions["image_id"].isin(train)
        & (captions["source"] == "human")
        & (captions["kind"] == "full")
        & (captions["status"] == "ok")
        & captions["text"].notna()
    )
    return [str(text) for text in captions.loc[chosen, "text"]]


def _styles(
    images: pd.DataFrame, captions: pd.DataFrame | None, asker: Asker, out_dir: Path, embed: Embed
) -> tuple[pd.DataFrame, dict[str, Any], int]:
    """The styles, how they were found, and how many neutral texts are still open at the provider."""
    config = asker.config
    texts = style_texts(images, captions, config)
    if not texts:
        table: pd.DataFrame = empty("styles")
        write_table(out_dir / "styles.parquet", "styles", table)
        return table, {}, 0
    fingerprint = _fingerprint(texts, config, asker.describer)
    stored = stored_styles(out_dir, fingerprint)
    if stored is not None:
        return *stored, 0
    neutral: list[str] | None = None
    if config.style.neutralise == "mllm":
        wanted = list(neutral_requests(texts, config, asker.describer))
        if waiting := asker.ask(wanted):
            return empty("styles"), {}, waiting
        if asker.ledger.stopped:
            return empty("styles"), {}, 0
        told = stored_texts(asker.journal, wanted)
        # A caption that the model failed on is neutralised by the lexicon: it must not be left out of the styles.
        neutral = [told.get(_caption_id(text), text) for text in texts]
        log.info("styles: %d of %d captions neutralised by %s", len(told), len(wanted), asker.describer.model)
    styles = discover_styles(texts, embed, config.style, seed=config.seed, neutral=neutral)
    return *_keep(out_dir, styles.table, styles.report.as_dict(), fingerprint), 0


def preview_styles(
    texts: list[str], config: CaptionConfig, describer: Describer, out_dir: Path, embed: Embed
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the styles that a run would use and how they are found; nothing is asked or written.

    Where a model is to neutralise the captions first and has not, there are none yet.
    """
    if not texts:
        return empty("styles"), {}
    stored = stored_styles(out_dir, _fingerprint(texts, config, describer))
    if stored is not None:
        return stored
    if config.style.neutralise == "mllm":
        return empty("styles"), {}
    styles = discover_styles(texts, embed, config.style, seed=config.seed)
    report = styles.report.as_dict()
    log_styles(report)
    return styles.table, report


def style_texts(images: pd.DataFrame, captions: pd.DataFrame | None, config: CaptionConfig) -> list[str]:
    """Return the captions that the styles are fitted on; empty, with a warning, where there are none."""
    if config.style.algorithm == "none":
        return []
    texts = train_captions(images, captions) if captions is not None else []
    if not texts:
        log.warning("styles: no human captions of train images, so the texts follow no style")
    return texts


def neutral_requests(texts: Sequence[str], config: CaptionConfig, describer: Describer) -> list[Request]:
    """Return one request per distinct caption: the same sentence with general words in place of its content.

    Raises:
        UsageError: the describer writes from images or records only.
    """
    if describer.name not in ("openai", "command", "hf"):
        raise UsageError(
            f"`{describer.name}` cannot neutralise captions.", hint="Use caption.style.neutralise=lexicon with it."
        )
    found = []
    for text in sorted(set(texts)):
        prompt = neutral_prompt(text, config, model=describer.model)
        found.append(
            Request(
                image_id=_caption_id(text),
                image_path="",
                kind=NEUTRAL,
                system=prompt.system,
                prompt=prompt.text,
                digest=prompt.digest,
                attributes={"caption": text},
            )
        )
    return found


def _caption_id(text: str) -> str:
    return "caption:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _fingerprint(texts: list[str], config: CaptionConfig, describer: Describer) -> str:
    # What is left at its default is left out: a setting that a later version adds must not change the styles, and with
    # them all prompts, of a run that has been paid for.
    known: list[Any] = [texts, config.style.model_dump(exclude_defaults=True), config.seed]
    if config.style.neutralise == "mllm":
        known.append(describer.model)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def stored_styles(out_dir: Path, fingerprint: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """Return the styles of an earlier run on the same captions and settings, and their report; None without.

    They are kept because the prompts, and with them the keys of all paid replies, depend on them: an encoder that
    rounds differently on another machine must not make a resumed run pay again.

    Raises:
        DataError: the note beside them is damaged.
    """
    path, note = out_dir / "styles.parquet", out_dir / "styles.json"
    if not (path.is_file() and note.is_file()):
        return None
    try:
        stored = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{note} is not valid JSON.", hint="Delete it; the styles are found again.") from None
    if stored.get("fingerprint") != fingerprint:
        return None
    return read_table(path, "styles"), dict(stored["report"])


def _keep(
    out_dir: Path, table: pd.DataFrame, report: dict[str, Any], fingerprint: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    note = out_dir / "styles.json"
    note.unlink(missing_ok=True)  # a kill between the two writes must not pair old and new
    write_table(out_dir / "styles.parquet", "styles", table)
    write_text(note, json.dumps({"fingerprint": fingerprint, "report": report}, indent=1))
    log_styles(report)
    return table, report


def log_styles(report: dict[str, Any]) -> None:
    """Say how the styles were found."""
    eps = "" if report["eps"] is None else f", eps {report['eps']:.4f}"
    merged = f" ({report['found']} found, {report['merged']} merged)" if report["merged"] else ""
    noise = 100 * report["noise"]
    clusters, captions = report["clusters"], report["captions"]
    log.info("styles: %d styles%s among %d captions%s, noise %.1f%%", clusters, merged, captions, eps, noise)
    for note in report["notes"]:
        log.info("styles: %s", note)
