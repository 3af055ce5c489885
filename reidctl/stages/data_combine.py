"""`data combine`: datasets as one, with one identity map and no test person in any training split.

A single dataset is allowed: it is purged of what its own splits share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import log
from reidctl.datasets import identities, leaks
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.origin import rendered_datasets
from reidctl.runs import Run, digest
from reidctl.stages.counting import count_splits
from reidctl.stages.sources import DataSettings, Source, find_source

STAGE = "data"


@dataclass(frozen=True)
class _Joined:
    """The rows of all sources; people of earlier combinations under their own ids again.

    Attributes:
        links: who is who by earlier combinations.
        others: people of earlier combinations, with or without images left.
    """

    images: pd.DataFrame
    captions: pd.DataFrame
    parts: pd.DataFrame
    described: bool
    links: list[identities.Link]
    others: pd.DataFrame


def run(
    run: Run,
    sources: Sequence[Path],
    settings: DataSettings,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Join datasets: one person id for everybody who is linked, and test people out of every training split.

    Args:
        run: where the stage writes.
        sources: run directories with a finished `data` stage, or data folders; their order decides common names.
        settings: `identity_map`, a user's file of who is who (see `identities.read_links`); `purge`, whether images
            leave train (and val) whose person or file is in test (or val) of any dataset; `leak_check`, what to do
            when `purge` is off and such an image is found.
        force: join again even if nothing changed.

    Raises:
        UsageError: the run itself is among the sources.
        DataError: a dataset twice, people who are not known, a bad identity map, or a leak with `leak_check=error`.
    """
    found = _find(run, sources)
    resolved = {
        "sources": [source.folder.resolve().as_posix() for source in found],
        "purge": settings.purge,
        "leak_check": settings.leak_check,
    }
    inputs = {f"{number}.{name}": value for number, s in enumerate(found) for name, value in s.digests().items()}
    inputs |= {f"{number}.parts": digest(s.parts) for number, s in enumerate(found) if s.parts.is_file()}
    if settings.identity_map is not None:
        if not settings.identity_map.is_file():
            raise DataError(f"{settings.identity_map} is not a file.", hint="Give a CSV or JSON file of who is who.")
        inputs["identity_map"] = digest(settings.identity_map)
    current = None if force else run.up_to_date(STAGE, resolved, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    run.check_writable()
    started = datetime.now(UTC)
    joined = _join(found)
    links = [*joined.links, *identities.find_links(joined.images)]
    if settings.identity_map is not None:
        known = {*joined.images["person_id"], *joined.others["person_id"]}
        links += identities.read_links(settings.identity_map, known)
    people = identities.unify(joined.images, links, joined.others)
    images = identities.rename(joined.images, people)
    purged = tables.empty("purged")
    if settings.purge:
        images, purged = leaks.purge(images)
    notes = [
        *_notes(joined.images, people, purged),
        *_emptied(joined.images, images),
        *leaks.guard(images, settings.leak_check),
    ]
    run.unfinish(STAGE)
    made = _tables(joined, images, people, purged)
    for name, frame in made.items():
        tables.write_table(run.table(STAGE, name), name, frame)
    for name in {"parts"} - set(made):
        run.table(STAGE, name).unlink(missing_ok=True)
    record = run.finish(
        STAGE,
        settings=resolved,
        inputs=inputs,
        outputs=[run.table(STAGE, name) for name in made],
        started=started,
        metrics={
            "people": int(images["person_id"].nunique()),
            "linked_people": int((people["rule"] != "own").sum()),
            "purged_people": int(purged["person_id"].nunique()),
            "purged_images": len(purged),
        },
        extra={
            "splits": count_splits(images, made["captions"]),
            "by_dataset": {str(name): count_splits(part, made["captions"]) for name, part in _parts(images)},
            "purged": _purged_people(purged),
            "notes": notes,
            "source": "combine",
            "known_people": True,
            "described": joined.described,
            "rendered": sorted({name for source in found for name in rendered_datasets(source.folder.absolute())}),
        },
    )
    return {**record, "status": "done"}


def _find(run: Run, sources: Sequence[Path]) -> list[Source]:
    found = []
    for path in sources:
        holds = (path / "images.parquet").is_file()
        if not holds and Run(path).record(STAGE) is None:
            raise DataError(
                f"{path} is no run with a dataset.",
                hint=f"Read it first: `reidctl data import FORMAT {path} --run OTHER`, then combine OTHER.",
            )
        source = find_source(Run(path.parent if holds else path), path if holds else None)
        if source.folder.resolve() == run.stage_dir(STAGE).resolve():
            raise UsageError(f"{path} is the run that the combination is written to.", hint="Choose another --run.")
        record = Run(source.folder.parent).record(source.folder.name)
        if record is not None and record.get("known_people") is False:
            raise DataError(
                f"The images in {source.folder} were imported without person ids.",
                hint="A combination needs to know who is who; import them with one folder per person.",
            )
        found.append(source)
    return found


def _join(sources: Sequence[Source]) -> _Joined:
    images, captions, parts = [], [], []
    links: list[identities.Link] = []
    others = [pd.DataFrame({"person_id": [], "dataset": []})]
    seen: dict[str, Path] = {}
    described = any(source.described is not None for source in sources)
    for source in sources:
        frame = tables.read_table(source.images, "images")
        for name in sorted(set(frame["dataset"])):
            if name in seen:
                raise DataError(
                    f"The dataset {name} is in {seen[name]} and in {source.folder}.",
                    hint="Give each dataset once; own tables and folders are renamed with `data import --name`.",
                )
            seen[name] = source.folder
        if source.identities.is_file():
            known = tables.read_table(source.identities, "identities")
            frame = identities.restore(frame, known)
            links += identities.inherited(known)
            others.append(known[["original_id", "dataset"]].rename(columns={"original_id": "person_id"}))
        root = source.folder.resolve()
        images.append(frame.assign(path=[(root / path).as_posix() for path in frame["path"]]))
        captions.append(_texts(source, described))
        if source.parts.is_file():
            parts.append(tables.read_table(source.parts, "parts"))
    texts = pd.concat(captions, ignore_index=True)
    return _Joined(
        pd.concat(images, ignore_index=True),
        texts,
        pd.concat(parts, ignore_index=True) if parts else tables.empty("parts"),
        described,
        links,
        pd.concat(others, ignore_index=True),
    )


def _texts(source: Source, described: bool) -> pd.DataFrame:
    """The captions of a dataset; texts that `caption` wrote for it replace those of the same kinds.

    If the combination counts as described, a dataset that is not keeps no such texts: the true ones of rendered images
    are for measuring, and would pass for a model's.
    """
    own = tables.read_table(source.captions, "captions") if source.captions.is_file() else tables.empty("captions")
    if source.described is None:
        return own[~own["kind"].isin(("identity", "clothing"))] if described else own
    if source.described == source.captions:
        return own
    written = tables.read_table(source.described, "captions")
    return pd.concat([own[~own["kind"].isin(set(written["kind"]))], written], ignore_index=True)


def _tables(
    joined: _Joined, images: pd.DataFrame, people: pd.DataFrame, purged: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    kept = set(images["image_id"])
    made = {
        "images": images,
        "captions": joined.captions[joined.captions["image_id"].isin(kept)].reset_index(drop=True),
        "identities": people,
        "purged": purged,
    }
    if len(joined.parts):
        made["parts"] = joined.parts[joined.parts["image_id"].isin(kept)].reset_index(drop=True)
    return made


def _parts(images: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    return list(images.groupby(images["dataset"].astype(str), sort=True))


def _purged_people(purged: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry for every person and split that lost images, for people to read and for scripts."""
    groups = purged.groupby(["person_id", "dataset", "split", "reason"], observed=True, sort=True)
    return [
        {
            "person_id": str(person),
            "dataset": str(dataset),
            "split": str(split),
            "reason": str(reason),
            "images": len(rows),
            "evidence": str(rows["evidence"].iloc[0]),
        }
        for (person, dataset, split, reason), rows in groups
    ]


def _notes(images: pd.DataFrame, people: pd.DataFrame, purged: pd.DataFrame) -> list[str]:
    linked = people[people["rule"] != "own"]
    rules = ", ".join(f"{count:,} by {rule}" for rule, count in linked["rule"].value_counts().items())
    datasets = images["dataset"].nunique()
    of = f"{datasets} datasets" if datasets > 1 else "one dataset"
    common = people["person_id"].nunique()
    notes = [
        f"{len(people):,} person ids of {of} are {common:,} people: {len(linked):,} ids are linked"
        + (f" ({rules})." if len(linked) else ".")
    ]
    merged = identities.merged_within(people)
    if merged:
        notes.append(f"{len(merged)} people had several ids within one dataset, the first: {merged[0]}.")
    if len(purged):
        people_out = purged["person_id"].nunique()
        notes.append(
            f"{len(purged):,} images of {people_out:,} {'person' if people_out == 1 else 'people'} were taken out of "
            "training: they are in a test or validation split."
        )
    return notes


def _emptied(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """Sentences about splits of which the purge left nothing."""
    had, has = (set(zip(f["dataset"].astype(str), f["split"].astype(str), strict=True)) for f in (before, after))
    lost = sorted(had - has)
    notes = [f"Nothing is left of {split} of {dataset}: all of it is in a later split." for dataset, split in lost]
    for note in notes:
        log.warning(note)
    return notes
