"""From images and captions to identity and clothing texts: styles, requests, checks, retries, and a table."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.captioning.backends.base import Describer, Key, Reply, Request
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.form import parse_instruction
from reidctl.captioning.journal import Entry, Journal
from reidctl.captioning.prompts import RETRY_MARK, Prompt, build_prompt, retry_text
from reidctl.captioning.styles import Embed, discover_styles, style_of_image
from reidctl.captioning.validation import check_reply
from reidctl.console import log
from reidctl.errors import DataError, RemoteError
from reidctl.tables import empty, read_table, write_table, write_text


@dataclass(frozen=True)
class CaptionRun:
    """What a run made.

    Attributes:
        captions: rows of the `captions` table, one per image and kind.
        styles: rows of the `styles` table.
        style_report: how the styles were found (`StyleReport.as_dict`), empty without styles.
        totals: counts over all rows (`ok`, `rejected`, `failed`), over this run (`asked`, `resumed`), tokens over
            everything stored, `coverage` (mean, ok texts), `clothing_words_in_identity` (found in all replies).
    """

    captions: pd.DataFrame
    styles: pd.DataFrame
    style_report: dict[str, Any]
    totals: dict[str, float]


def caption_images(
    images: pd.DataFrame,
    captions: pd.DataFrame | None,
    describer: Describer,
    config: CaptionConfig,
    out_dir: Path,
    *,
    embed: Embed = hashed,
    root: Path | None = None,
    advance: Callable[[int], None] | None = None,
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
        advance: told the number of rows finished.

    Raises:
        RemoteError: the service refuses everything; what was stored stays and the next run goes on from there.
        DataError: the folder cannot be written or another process writes it.
    """
    styles, report = _styles(images, captions, config, out_dir, embed)
    plan = _Plan(images, styles, describer, config, root)
    tick = advance or (lambda n: None)
    with Journal(out_dir / "parts") as journal:
        counts = _ask_all(plan, journal, describer, config, tick)
        frame = plan.table(journal.entries)
        totals = _totals(frame, plan, journal, counts)
    write_table(out_dir / "captions.parquet", "captions", frame)
    return CaptionRun(frame, styles, report, totals)


class _Plan:
    """Which texts are wanted: the requests, in order, and the rows that they become."""

    def __init__(
        self, images: pd.DataFrame, styles: pd.DataFrame, describer: Describer, config: CaptionConfig, root: Path | None
    ) -> None:
        wanted = len(images) if config.limit is None else config.limit
        self._images = images.drop_duplicates("image_id").head(wanted)
        self._instruction: dict[str | None, str] = dict(zip(styles["style_id"], styles["instruction"], strict=True))
        self._instruction[None] = ""
        self._style_ids = styles["style_id"].tolist()
        self._describer = describer
        self._config = config
        self._root = root
        self._prompts: dict[tuple[str, str | None], Prompt] = {}

    def __len__(self) -> int:
        return len(self._images) * len(self._config.kinds)

    def requests(self) -> Iterator[Request]:
        """Yield the first attempt of every text."""
        columns = (self._column(name) for name in ("image_id", "path", "sha256", "attributes"))
        for image_id, path, sha256, given in zip(*columns, strict=True):
            attributes = dict(given) if isinstance(given, Mapping) else {}
            style_id = style_of_image(image_id, self._style_ids, seed=self._config.seed)
            for kind in self._config.kinds:
                prompt = self._prompt(kind, style_id)
                yield Request(
                    image_id=image_id,
                    image_path=str(self._root / path if self._root else path),
                    kind=kind,
                    system=prompt.system,
                    prompt=prompt.text,
                    digest=prompt.digest,
                    style_id=style_id,
                    instruction=self._instruction[style_id],
                    attributes=attributes,
                    image_version=self._version(sha256, attributes),
                )

    def table(self, entries: Mapping[Key, Entry]) -> pd.DataFrame:
        """Return the `captions` rows of all wanted texts that have an entry."""
        rows = [
            _row(request, entry, self._describer) for request in self.requests() if (entry := entries.get(request.key))
        ]
        # object: an absent text stays None, as the tables read it back, and does not become NaN
        frame = pd.DataFrame(rows, dtype=object) if rows else empty("captions")
        return frame[list(empty("captions").columns)]

    def _column(self, name: str) -> list[Any]:
        return self._images[name].tolist() if name in self._images else [None] * len(self._images)

    def _version(self, sha256: str | None, attributes: Mapping[str, str]) -> str:
        """The image's digest; where the text comes from the attributes, theirs."""
        if self._describer.source != "template":
            return sha256 or ""
        return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()

    def _prompt(self, kind: str, style_id: str | None) -> Prompt:
        if (kind, style_id) not in self._prompts:
            instruction = self._instruction[style_id]
            self._prompts[kind, style_id] = build_prompt(kind, instruction, self._config, model=self._describer.model)
        return self._prompts[kind, style_id]


def _ask_all(
    plan: _Plan, journal: Journal, describer: Describer, config: CaptionConfig, tick: Callable[[int], None]
) -> Counter[str]:
    """Ask for everything that is not stored; then, in rounds, for what failed its checks."""
    counts: Counter[str] = Counter()
    again: list[Request] = []
    streak = 0
    source: Iterator[Request] = _open_requests(plan, journal, counts, tick)
    while True:
        with closing(describer.describe(source)) as replies:
            for reply in replies:
                entry = _judge(reply, describer, config)
                journal.append(entry)
                counts["asked"] += 1
                if entry.status == "retry":
                    again.append(_next_attempt(reply.request, entry))
                else:
                    tick(1)
                streak = streak + 1 if entry.status == "failed" else 0
                if streak >= config.remote.max_failures and describer.source == "mllm" and describer.name != "replay":
                    raise RemoteError(f"{streak} requests in a row failed, the last one: {entry.reason}.")
        if not again:
            return counts
        log.info("caption: %d replies failed a check and are asked again", len(again))
        source, again = iter(again), []


def _open_requests(
    plan: _Plan, journal: Journal, counts: Counter[str], tick: Callable[[int], None]
) -> Iterator[Request]:
    """The requests without a final reply, each at the attempt where an earlier run left it."""
    for request in plan.requests():
        entry = journal.entries.get(request.key)
        if entry is not None and entry.final:
            counts["resumed"] += 1
            tick(1)
        elif entry is not None and entry.status == "retry":
            yield _next_attempt(request, entry)
        else:
            yield request


def _next_attempt(request: Request, entry: Entry) -> Request:
    # The first prompt is kept below the reason of the last attempt only: reasons must not pile up.
    first = request.prompt.split(RETRY_MARK, 1)[0]
    return replace(request, prompt=retry_text(first, entry.reason or "unknown"), attempt=entry.attempt + 1)


def _judge(reply: Reply, describer: Describer, config: CaptionConfig) -> Entry:
    """The journal entry for a reply: checked, and either kept, refused for good, or marked for another attempt."""
    request = reply.request
    entry = Entry(
        image_id=request.image_id,
        image_version=request.image_version,
        kind=request.kind,
        prompt_sha256=request.digest,
        attempt=request.attempt,
        status=reply.status,
        text=reply.text,
        reason=reply.reason,
        tokens_in=reply.tokens_in,
        tokens_out=reply.tokens_out,
    )
    if reply.status == "ok":
        verdict = check_reply(
            reply.text or "",
            request.kind,
            config,
            prompt=request.prompt,
            form=parse_instruction(request.instruction) if request.instruction else None,
            # A model must say all we expect; a template can only say what is known.
            attributes=request.attributes if describer.source == "template" else None,
        )
        entry = replace(
            entry,
            status="ok" if verdict.ok else "rejected",
            text=verdict.text,
            reason="; ".join(verdict.reasons) or None,
            coverage=verdict.coverage,
            clothing_words=len(verdict.clothing_words),
        )
    # A template gives the same text again: another attempt would only cost time.
    retry = entry.status == "rejected" and request.attempt <= config.retries and describer.source != "template"
    return replace(entry, status="retry") if retry else entry


def _row(request: Request, entry: Entry, describer: Describer) -> dict[str, Any]:
    name = hashlib.sha256("\0".join(entry.key).encode("utf-8", "surrogatepass")).hexdigest()[:20]
    # A retry that nobody came back for (the run was stopped) has no usable text either.
    status = "failed" if entry.status == "retry" else entry.status
    return {
        "caption_id": f"{request.kind}-{name}",
        "image_id": request.image_id,
        "kind": request.kind,
        "source": describer.source,
        "conditioned_on": "image",
        "text": entry.text if status == "ok" else None,
        "parent_id": None,
        "char_start": None,
        "char_end": None,
        "style_id": request.style_id,
        "model": describer.model,
        "prompt_sha256": request.digest,
        "status": status,
        "reason": entry.reason,
    }


def _totals(frame: pd.DataFrame, plan: _Plan, journal: Journal, counts: Counter[str]) -> dict[str, float]:
    wanted = {request.key for request in plan.requests()}
    entries = [entry for key, entry in journal.entries.items() if key in wanted]
    covered = [entry.coverage for entry in entries if entry.status == "ok" and entry.coverage is not None]
    status = Counter(frame["status"])
    return {
        "rows": len(frame),
        "ok": status["ok"],
        "rejected": status["rejected"],
        "failed": status["failed"],
        "asked": counts["asked"],
        "resumed": counts["resumed"],
        "tokens_in": journal.tokens_in,
        "tokens_out": journal.tokens_out,
        "coverage": sum(covered) / len(covered) if covered else math.nan,
        "clothing_words_in_identity": sum(entry.clothing_words for entry in entries if entry.kind == "identity"),
    }


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
    images: pd.DataFrame, captions: pd.DataFrame | None, config: CaptionConfig, out_dir: Path, embed: Embed
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The styles of an earlier run on the same captions and settings, else new ones.

    They are kept because the prompts, and with them the keys of all paid replies, depend on them: an encoder that
    rounds differently on another machine must not make a resumed run pay again.
    """
    texts = train_captions(images, captions) if captions is not None and config.style.algorithm != "none" else []
    if not texts:
        if config.style.algorithm != "none":
            log.warning("styles: no human captions of train images, so the texts follow no style")
        table: pd.DataFrame = empty("styles")
        write_table(out_dir / "styles.parquet", "styles", table)
        return table, {}
    identity = json.dumps([texts, config.style.model_dump(), config.seed], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
    path, note = out_dir / "styles.parquet", out_dir / "styles.json"
    if path.is_file() and (stored := _stored_report(note, fingerprint)) is not None:
        return read_table(path, "styles"), stored
    styles = discover_styles(texts, embed, config.style, seed=config.seed)
    note.unlink(missing_ok=True)  # a kill between the two writes must not pair old and new
    write_table(path, "styles", styles.table)
    report = styles.report.as_dict()
    write_text(note, json.dumps({"fingerprint": fingerprint, "report": report}, indent=1))
    eps = "" if report["eps"] is None else f", eps {report['eps']:.4f}"
    noise = 100 * report["noise"]
    log.info("styles: %d styles among %d captions%s, noise %.1f%%", report["clusters"], len(texts), eps, noise)
    return styles.table, report


def _stored_report(note: Path, fingerprint: str) -> dict[str, Any] | None:
    if not note.is_file():
        return None
    try:
        stored = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{note} is not valid JSON.", hint="Delete it; the styles are found again.") from None
    return dict(stored["report"]) if stored.get("fingerprint") == fingerprint else None
