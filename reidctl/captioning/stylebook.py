"""The styles of a run: found once among the train captions, kept, and taken up again by every later run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.captioning.asking import NEUTRAL, SERVICES, Asker, stored_texts
from reidctl.captioning.backends.base import Describer, Request
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.neutralise import neutralise
from reidctl.captioning.prompts import neutral_prompt
from reidctl.captioning.styles import Embed, discover_styles
from reidctl.console import log
from reidctl.errors import DataError, RemoteError, UsageError
from reidctl.tables import empty, read_table, write_table, write_text


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


def find_styles(texts: list[str], asker: Asker, folder: Path, embed: Embed) -> tuple[pd.DataFrame, dict[str, Any], int]:
    """Return the styles, how they were found, and how many neutral texts have no outcome yet.

    Where these are open in a batch or the budget was spent on them, there are no styles yet.

    Args:
        texts: see `style_texts`.
        asker: asked only where a model neutralises the captions.
        folder: of the stored replies: styles are kept beside what was paid for in them, and travel with it.
        embed: neutral texts -> vectors.

    Raises:
        RemoteError: a model was to neutralise the captions and gave not one usable text.
    """
    config = asker.config
    if not texts:
        return empty("styles"), {}, 0
    fingerprint = _fingerprint(texts, config, asker.describer)
    stored = stored_styles(folder, fingerprint)
    if stored is not None:
        return *stored, 0
    neutral: list[str] | None = None
    if config.style.neutralise == "mllm":
        wanted = list(neutral_requests(texts, config, asker.describer))
        waiting = asker.ask(wanted, counted=False)
        if waiting or asker.ledger.stopped:
            return empty("styles"), {}, waiting
        neutral = _told(texts, wanted, asker)
    styles = discover_styles(texts, embed, config.style, seed=config.seed, neutral=neutral)
    return *_keep(folder, styles.table, styles.report.as_dict(), fingerprint), 0


def _told(texts: Sequence[str], wanted: Sequence[Request], asker: Asker) -> list[str]:
    """Every caption as the model neutralised it; the lexicon does it where the model gave no usable text."""
    told = stored_texts(asker.journal, wanted)
    model = asker.describer.model
    if not told:
        raise RemoteError(f"{model} gave no usable neutral text.", hint="Use caption.style.neutralise=lexicon.")
    log.info("styles: %d of %d captions neutralised by %s", len(told), len(wanted), model)
    if missing := len(wanted) - len(told):
        log.warning("styles: %d captions got no usable neutral text and were neutralised by the lexicon", missing)
    return [told.get(_caption_id(text)) or neutralise(text) for text in texts]


def preview_styles(
    texts: list[str], config: CaptionConfig, describer: Describer, folder: Path, embed: Embed
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the styles that a run would use and how they are found; nothing is asked or written.

    Where a model is to neutralise the captions first and has not, there are none yet.
    """
    if not texts:
        return empty("styles"), {}
    stored = stored_styles(folder, _fingerprint(texts, config, describer))
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
    if describer.name not in SERVICES:
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


def stored_styles(folder: Path, fingerprint: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """Return the styles of an earlier run on the same captions and settings, and their report; None without.

    They are kept because the prompts, and with them the keys of all paid replies, depend on them: an encoder that
    rounds differently on another machine must not make a resumed run pay again.

    Raises:
        DataError: the note beside them is damaged.
    """
    path, note = _places(folder, fingerprint)
    if not (path.is_file() and note.is_file()):
        return None
    try:
        report = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{note} is not valid JSON.", hint="Delete it; the styles are found again.") from None
    return read_table(path, "styles"), dict(report)


def _places(folder: Path, fingerprint: str) -> tuple[Path, Path]:
    name = f"styles-{fingerprint[:12]}"
    return folder / f"{name}.parquet", folder / f"{name}.json"


def _keep(
    folder: Path, table: pd.DataFrame, report: dict[str, Any], fingerprint: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    path, note = _places(folder, fingerprint)
    write_table(path, "styles", table)
    write_text(note, json.dumps(report, indent=1))  # last: without it the table does not count
    log_styles(report)
    return table, report


def log_styles(report: dict[str, Any]) -> None:
    """Say how the styles were found."""
    eps = "" if report["eps"] is None else f", eps {report['eps']:.4f}"
    merged = f" ({report['found']} found, {report['merged']} merged)" if report["merged"] else ""
    noise = 100 * report["noise"]
    clusters, captions = report["clusters"], report["captions"]
    found = "1 style" if clusters == 1 else f"{clusters} styles"
    log.info("styles: %s%s among %d captions%s, noise %.1f%%", found, merged, captions, eps, noise)
    for note in report["notes"]:
        log.info("styles: %s", note)
