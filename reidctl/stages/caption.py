"""`caption`: an identity and a clothing text per image, in the writing styles of the train captions."""

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.captioning.backends.base import make_describer
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.run import caption_images
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.errors import DataError, RemoteError
from reidctl.runs import Run
from reidctl.stages.sources import find_source

STAGE = "caption"


def run(run: Run, recipe: Mapping[str, Any], *, data: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Write the texts that `--mllm` gives for every image, checked, and the styles that guided them.

    Replies are kept as they arrive: a killed stage goes on where it was and asks nothing twice. `force` runs the stage
    again but still uses the replies it has, because they may have been paid for.

    Args:
        run: where the stage writes.
        recipe: sections `caption` and `seed` are read.
        data: the dataset folder; default: the run's.
        force: run again even if nothing changed.

    Raises:
        DataError: no text at all passed the checks.
    """
    section = {"seed": recipe.get("seed", 0), **(recipe.get("caption") or {})}
    config = parse_section(CaptionConfig, section, "caption")
    source = find_source(run, data)
    settings = {"caption": config.model_dump(mode="json")}
    inputs = {name: value for name, value in source.digests().items() if name != "described"}
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    run.unfinish(STAGE)
    images = tables.read_table(source.images, "images")
    captions = tables.read_table(source.captions, "captions") if source.captions.is_file() else None
    describer = make_describer(config)
    total = min(len(images), config.limit if config.limit is not None else len(images)) * len(config.kinds)
    with progress(f"caption ({describer.model})", total, unit="texts") as advance:
        done = caption_images(
            images,
            captions,
            describer,
            config,
            run.stage_dir(STAGE),
            embed=_embedder(config.style.encoder),
            root=source.folder,
            advance=advance,
        )
    totals = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in done.totals.items()}
    if total and not totals["ok"]:
        reasons = done.captions["reason"].dropna()
        why = f"; the first reason: {reasons.iloc[0]}" if len(reasons) else ""
        if describer.source == "mllm" and totals["failed"] == total:
            raise RemoteError(
                f"{describer.model} answered none of the {total} requests{why}.",
                hint="Check the address and the key, then run again: nothing was lost.",
            )
        raise DataError(f"None of the {total} texts is usable{why}.", hint="See the captions table for all reasons.")
    bad = done.totals["rejected"] + done.totals["failed"]
    if bad:
        log.warning(f"{bad} of {total} texts are not usable; the reasons are in {run.table(STAGE, 'captions')}.")
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, "captions"), run.table(STAGE, "styles")],
        started=started,
        metrics=totals,
        extra={
            "model": describer.model,
            "texts": _counts(done.captions),
            "styles": {"algorithm": config.style.algorithm, "count": len(done.styles), **done.style_report},
        },
    )
    return {**record, "status": "done"}


def _counts(captions: Any) -> dict[str, dict[str, int]]:
    grouped = captions.groupby(["kind", "status"]).size()
    return {kind: {s: int(n) for s, n in grouped[kind].items()} for kind in captions["kind"].unique()}


def _embedder(encoder: str) -> Callable[[list[str]], npt.NDArray[Any]]:
    """The text encoder that styles are clustered in: `hashed` needs no weights, anything else is a CLIP spec."""
    if encoder == "hashed":
        return hashed
    backbone = build(encoder if ":" in encoder else f"clip:{encoder}").eval()

    def embed(texts: list[str]) -> npt.NDArray[Any]:
        with torch.inference_mode():
            parts = [
                backbone.encode_text(backbone.tokenize(texts[start : start + 256])).pooled.float().numpy()
                for start in range(0, len(texts), 256)
            ]
        return np.concatenate(parts)

    return embed
