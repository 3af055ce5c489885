"""From images and captions to identity and clothing texts: styles, requests, checks, retries, and a table."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from reidctl.captioning.asking import Asker, checks_digest
from reidctl.captioning.backends.base import Describer, Request
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.journal import Entry, Index, Journal
from reidctl.captioning.plan import Plan, part_name
from reidctl.captioning.stylebook import find_styles, style_texts
from reidctl.captioning.styles import Embed
from reidctl.captioning.validation import agreement
from reidctl.console import log
from reidctl.errors import UsageError
from reidctl.tables import TableWriter, empty, read_table, write_table

_CHUNK = 20_000
Stopped = Literal["budget", "pending", "part"]


@dataclass(frozen=True)
class CaptionRun:
    """What a run made.

    Attributes:
        path: the table of texts; written only when nothing stopped the run.
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
            are open in a batch, `part` when this was one shard or asked about no image.
        pending: texts that wait in a batch, or for the next one.
        over_budget: whether `max_cost` kept a request back; with `pending` it may be both.
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
    over_budget: bool = False

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
    before_writing: Callable[[], None] = lambda: None,
) -> CaptionRun:
    """Write two texts per image, resuming what an earlier run stored in `out_dir`.

    `out_dir` gets `styles.parquet` and `captions.parquet` when all is done; `parts/` gets every reply as it comes, and
    the styles that the prompts were made with. A text depends on
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
        before_writing: called before the tables of an earlier run are replaced, and not at all if they are not.

    Raises:
        RemoteError: the service refuses everything; what was stored stays and the next run goes on from there.
        DataError: the folder cannot be written or another process writes it.
        UsageError: a text that is wanted is in an open batch, and the describer is not the batch's.
    """
    account = ledger or Ledger()
    tick = advance or (lambda n, note: None)
    path = out_dir / "captions.parquet"
    with Journal(out_dir / "parts", part_name(config.shard), checks_digest(config)) as journal:
        account.pay_for(journal)
        asker = Asker(describer, config, journal, account, tick)
        texts = style_texts(images, captions, config)
        styles, report, waiting = find_styles(texts, asker, out_dir / "parts", embed)
        plan = Plan(images, styles, describer, config, root)
        # Without styles yet, or without money for them, no image is asked about.
        pending = waiting or (0 if account.stopped else _ask_all(asker, plan, out_dir))
        stopped = _stopped(pending, account, config)
        tally = _Tally(absent="open" if pending else "failed")
        if stopped is None:
            before_writing()
            write_table(out_dir / "styles.parquet", "styles", styles)
            _write(path, plan, journal, tally)
        else:
            tally.count(plan, journal)
        totals = {**tally.totals(), **_spent(journal, account), **asker.counts}
    return CaptionRun(
        path=path,
        styles=styles,
        style_report=report,
        texts={kind: dict(counts) for kind, counts in tally.texts.items()},
        totals=totals,
        codes=dict(tally.codes.most_common()),
        first_reason=tally.first_reason,
        stopped=stopped,
        pending=pending,
        over_budget=account.stopped,
    )


def _stopped(pending: int, account: Ledger, config: CaptionConfig) -> Stopped | None:
    if pending:
        return "pending"
    if account.stopped:
        return "budget"
    return "part" if config.shard or config.limit == 0 else None


def _ask_all(asker: Asker, plan: Plan, folder: Path) -> int:
    _warn_of_other_prompts(plan, asker.journal)
    _refuse_open_batches(asker, plan, folder)
    return asker.ask(plan.requests())


def _refuse_open_batches(asker: Asker, plan: Plan, folder: Path) -> None:
    """Raise where a text is about to be asked for that an open batch brings, or a fetched one has brought."""
    if asker.describer.deferred or not (folder / "batches.jsonl").is_file():
        return
    from reidctl.captioning.backends.batch_replies import known_requests
    from reidctl.captioning.backends.batch_state import custom_id

    known = known_requests(folder)
    waiting = sum(custom_id(request) in known for request in asker.due(plan.requests()))
    if waiting:
        raise UsageError(
            f"{waiting} of the texts are in a batch; asking for them again would be paid twice.",
            hint="Fetch them with --batch, or give them up with --batch --cancel and then --batch --no-wait; if the "
            f"service has lost them, delete {folder / 'batches.jsonl'}.",
        )


def _warn_of_other_prompts(plan: Plan, stored: Index) -> None:
    """Say so before a second bill: replies are there that answer another question."""
    mine = plan.prompt_digests()
    other = sum(n for (kind, digest), n in stored.prompts.items() if kind in plan.config.kinds and digest not in mine)
    if other:
        log.warning(
            "caption: %d stored replies belong to other prompts (another model, style or setting) and are not used",
            other,
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
    cost = math.nan if ledger.price is None and not ledger.spent else ledger.spent
    return {"tokens_in": journal.tokens_in, "tokens_out": journal.tokens_out, "cost": cost}
