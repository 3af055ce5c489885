"""`data degrade`: the same images with worse captions, to measure how a model takes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import log
from reidctl.datasets.degrade import check, degrade, word_order, word_overlap, words_of
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.origin import rendered_datasets
from reidctl.runs import Run, digest
from reidctl.stages.counting import count_splits
from reidctl.stages.sources import Source, find_source

STAGE = "data"
NAME = "degrade"


def run(
    run: Run,
    *,
    source: Path,
    kind: str,
    level: float,
    splits: Sequence[str] = ("test",),
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Write the tables of a dataset with its full captions degraded; see `datasets.degrade` for the kinds.

    Ids and image files stay the same, so a result on the new tables compares query by query with one on the old.
    Identity and clothing texts stay too: they describe the gallery, and queries are what gets worse. Phrases of a
    changed caption are left out, because their places in the text no longer hold.

    Args:
        run: where the stage writes; another run than the source.
        source: a run with a dataset, or the folder that holds its tables.
        kind: drop, shorten, typo or shuffle.
        level: in [0, 1]; 0 changes nothing.
        splits: whose captions; `all` for every split.
        seed: of the draws; two levels with one seed change nested sets of words.
        force: do it again even if nothing changed.

    Returns:
        The stage's record with `status`, `splits`, `notes`, `root`, `known_people`, `described`, `rendered`, `source`
        and in `metrics` the number of captions, how many changed, and their mean `word_overlap` and, for shuffle,
        `word_order` with the originals.

    Raises:
        UsageError: an unknown kind or level, or `run` is the source itself.
        DataError: no dataset, no such split, no caption in it, or `run` holds another dataset.
    """
    check(kind, level)
    found = _find(source)
    _check_target(run, found)
    settings = {NAME: {"kind": kind, "level": level, "splits": sorted(set(splits)), "seed": seed}}
    inputs = found.digests()
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    images = tables.read_table(found.images, "images")
    captions = tables.read_table(found.captions, "captions") if found.captions.is_file() else tables.empty("captions")
    # Another run is another folder: a path relative to the old one would lead nowhere.
    images["path"] = [(found.folder.absolute() / path).as_posix() for path in images["path"]]
    changed = _degrade(captions, _chosen(images, splits), kind, level, seed)
    if not changed.overlaps:
        raise DataError(f"{found.folder} has no full caption in {_named(splits)}.", hint="Choose another --split.")
    run.unfinish(STAGE)
    made = {"images": images, "captions": changed.captions}
    if found.identities.is_file():
        # Who was who before datasets were combined: without it nobody sees that a test person was trained on.
        made["identities"] = tables.read_table(found.identities, "identities")
    for table, frame in made.items():
        tables.write_table(run.table(STAGE, table), table, frame)
    # Tables of a dataset that this one replaces do not belong to it.
    for table in {"parts", "identities", "purged"} - set(made):
        run.table(STAGE, table).unlink(missing_ok=True)
    _carry_texts(run, found, started)
    before = _record(found)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=[run.table(STAGE, table) for table in made],
        started=started,
        metrics=changed.metrics(),
        extra={
            "splits": count_splits(images, changed.captions),
            "notes": [*before.get("notes", []), *changed.notes(kind, level, splits, seed)],
            "root": before.get("root", found.folder.resolve().as_posix()),
            "source": NAME,
            "known_people": before.get("known_people", True),
            "described": before.get("described", False),
            "rendered": rendered_datasets(found.folder.absolute()),
        },
    )
    return {**record, "status": "done"}


def _find(source: Path) -> Source:
    if (source / "images.parquet").is_file():
        return find_source(Run(source.absolute().parent), data=source)
    if Run(source).record("data") is None:
        raise DataError(f"{source} is no run with a dataset.", hint="Make one with `reidctl data import` or `synth`.")
    return find_source(Run(source))


def _record(found: Source) -> dict[str, Any]:
    folder = found.folder.absolute()
    return Run(folder.parent).record(folder.name) or {}


def _check_target(run: Run, found: Source) -> None:
    if run.stage_dir(STAGE).resolve() == found.folder.resolve():
        raise UsageError(f"{run.path} is the source itself.", hint="Give another --run directory.")
    held = run.record(STAGE)
    if held is not None and held.get("source") != NAME:
        raise DataError(
            f"{run.path} holds another dataset ({held.get('source')}), which this would replace.",
            hint="Give another --run directory.",
        )


def _chosen(images: pd.DataFrame, splits: Sequence[str]) -> set[str]:
    """The ids of the images whose captions are to change."""
    present = set(images["split"])
    wanted = present if "all" in splits else set(splits)
    if wanted - present:
        missing = "`, `".join(sorted(wanted - present))
        raise DataError(
            f"The dataset has no `{missing}` split (it has: {', '.join(sorted(present))}).",
            hint="Choose another --split, or --split all.",
        )
    return set(images.loc[images["split"].isin(wanted), "image_id"])


def _named(splits: Sequence[str]) -> str:
    return "any split" if "all" in splits else f"the split {', '.join(splits)}"


@dataclass
class _Changed:
    """The new captions, and one number per caption that was chosen."""

    captions: pd.DataFrame
    overlaps: list[float] = field(default_factory=list)
    orders: list[float] = field(default_factory=list)
    before: int = 0
    after: int = 0
    changed: int = 0
    single: int = 0
    phrases: int = 0

    def metrics(self) -> dict[str, float]:
        total = len(self.overlaps)
        order = {"word_order": round(sum(self.orders) / total, 4)} if self.orders else {}
        return {
            "captions": total,
            "changed": self.changed,
            "word_overlap": round(sum(self.overlaps) / total, 4),
            **order,
            "words_before": round(self.before / total, 2),
            "words_after": round(self.after / total, 2),
        }

    def notes(self, kind: str, level: float, splits: Sequence[str], seed: int) -> list[str]:
        facts = self.metrics()
        order = f", {100 * facts['word_order']:.1f} % of the word pairs in order" if self.orders else ""
        said = [
            f"Captions of {_named(splits)} degraded ({kind}, level {level:g}, seed {seed}): {self.changed:,} of "
            f"{len(self.overlaps):,} changed; {100 * facts['word_overlap']:.1f} % of the words kept{order}."
        ]
        if self.phrases:
            said.append(f"{self.phrases:,} phrase(s) of changed captions left out: their places no longer hold.")
        if self.single and kind != "typo":
            said.append(
                f"{self.single:,} caption(s) are one word, so they stay as they are; words are found by their spaces."
            )
        for note in said:
            log.info(note)
        return said


def _degrade(captions: pd.DataFrame, chosen: set[str], kind: str, level: float, seed: int) -> _Changed:
    mine = (captions["kind"] == "full") & (captions["status"] == "ok") & captions["image_id"].isin(chosen)
    found = _Changed(captions.copy())
    texts, changed = list(captions["text"]), set()
    for row in mine.to_numpy().nonzero()[0]:
        old, name = str(texts[row]), str(captions["caption_id"].iloc[row])
        new = texts[row] = degrade(old, kind, level, seed=seed, key=name)
        words = len(words_of(old))
        found.overlaps.append(word_overlap(old, new))
        # Where words are lost, matching the k-th occurrence of a word would count losses as moves.
        found.orders += [word_order(old, new)] if kind == "shuffle" else []
        found.before, found.after = found.before + words, found.after + len(words_of(new))
        found.single += words == 1
        if new != old:
            changed.add(name)
    found.captions["text"] = texts
    stale = (captions["kind"] == "phrase") & captions["parent_id"].isin(changed)
    found.changed, found.phrases = len(changed), int(stale.sum())
    found.captions = found.captions[~stale].reset_index(drop=True)
    return found


def _carry_texts(run: Run, found: Source, started: datetime) -> None:
    """Take along the texts that describe the images: an evaluation looks for them beside the dataset it is given."""
    held = run.record("caption")
    if held is not None and held.get("source") != NAME:
        return
    # Texts that came with the dataset are in its own captions, which this stage has written.
    if found.described is None or found.described.resolve() == found.captions.resolve():
        run.unfinish("caption")
        return
    path = run.table("caption", "captions")
    tables.write_table(path, "captions", tables.read_table(found.described, "captions"))
    run.finish(
        "caption",
        settings={"carried_from": found.described.resolve().as_posix()},
        inputs={"images": digest(run.table(STAGE, "images")), "captions": digest(run.table(STAGE, "captions"))},
        outputs=[path],
        started=started,
        extra={"source": NAME},
    )
