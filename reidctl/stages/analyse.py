"""`analyse`: what the features of a trained model hold: attributes, identity, each other; what decides look-alikes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import log
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run, digest
from reidctl.stages import analyse_parts as parts
from reidctl.stages import analyse_prompts as prompts
from reidctl.stages import analyse_space as space
from reidctl.stages import analyse_tokens as tokens
from reidctl.stages.analyse_parts import Found, Material, NotApplicable
from reidctl.stages.features import part_of, whole_families
from reidctl.stages.index import model_digest, training_digest
from reidctl.stages.measuring import check_people, find_subject
from reidctl.stages.sources import find_source

STAGE = "analyse"
IMAGES = 4000

Analysis = Callable[[Material, Found], None]
ANALYSES: dict[str, Analysis] = {
    "probes": parts.probes,
    "dependence": parts.dependence,
    "clones": parts.clones,
    "gates": parts.gates,
    "compactness": space.compactness,
    "tsne": space.tsne,
    "efficiency": parts.efficiency,
    "architecture": parts.architecture,
    "attention": tokens.attention,
    "cam": tokens.cam,
    "pseudo": prompts.pseudo,
    "words": prompts.words,
    "alarms": prompts.alarms,
}
"""By name. Another analysis is another entry: it adds rows, notes and figures to `Found`, or raises `NotApplicable`."""
DEFAULT = tuple(name for name in ANALYSES if name != "efficiency")
"""What is done without `--what`: all but timings, which differ from run to run."""
_PLAIN = {"probes": "accuracy", "clones": "i2i", "gates": "mean", "tsne": "silhouette", "alarms": "raised"}
"""The metric of each analysis that the names of its numbers leave out."""
_STALE = ("*.png", "*.svg", "*.csv", "*.json", "*.parquet", "*.md")


def run(
    run: Run,
    *,
    what: Sequence[str] = (),
    lenient: bool = False,
    split: str = "test",
    sensitive: bool = False,
    highlight: Sequence[str] = (),
    features: Sequence[str] = (),
    limit: int = IMAGES,
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    against: Run | None = None,
    cache: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Analyse the features of the run's model on the images of a split.

    Writes the table `analysis` and, where they apply, `probes`, `clones`, `gates`, `tsne`, `tsne_against`, `cam` and
    `pseudo` as PNG, SVG and CSV, `words.csv`, `gates.json` and `architecture.md`. Features are kept in the run. The
    record's `metrics` holds numbers, or `{value, low, high, control, control_high, chance, p_value}`, whichever there
    are, by `ANALYSIS.FEATURE[.TARGET][.METRIC]`, such as `probes.identity.upper_colour`.

    Args:
        run: holds the trained model; where the stage writes.
        what: analyses, of `ANALYSES`; empty: every one of `DEFAULT` that applies. What does not apply is then a note.
        lenient: also an analysis that was asked for by name may not apply, and nothing at all is a result.
        split: whose images.
        sensitive: also probe skin and ethnicity.
        highlight: people who stand out in the t-SNE map; default: the two with most images.
        features: which features the probes read, such as `identity`; empty: all.
        limit: how many images at most, drawn as whole people.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        seed: of the draw, the halves, the permutations, the bootstrap and the map.
        against: a run whose model `tsne` and `compactness` set beside this one on the same images; only its kept
            features are written.
        cache: whether features are read from the run and kept there.
        force: do it again even if nothing changed.

    Raises:
        UsageError: an unknown analysis or device, or nothing that `against` could be compared by.
        DataError: no model, no such split, people that a model was trained on, an analysis that was asked for by name
            and does not apply, or none that does.
    """
    asked = _known(what)
    resolve_device(device)
    source = find_source(run, data, captions)
    check_people(source)
    settings: dict[str, Any] = {
        "split": split,
        "seed": seed,
        "model": model_digest(run),
        "training": training_digest(run),
        "analyse": {
            "what": list(asked) if what else "all",
            "sensitive": sensitive,
            "highlight": list(highlight),
            "features": list(features),
            "limit": limit,
            **_against(run, against, asked),
        },
    }
    inputs = source.digests()
    if source.parts.is_file() and set(asked) & set(tokens.READ_PARTS):
        inputs["parts"] = digest(source.parts)
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    subject = find_subject(run, split=split, device=device, data=data, captions=captions)
    _check_people(highlight, subject.corpus.images, split)
    rows = whole_families(subject.corpus.images, limit, seed=seed, first=highlight)
    shown, read = tuple(highlight), tuple(features)
    material = Material(subject, part_of(subject.corpus, rows), seed, sensitive, shown, read, cache)
    found = Found(notes=list(subject.notes) + _sampled(len(rows), subject.corpus.images))
    if against is not None:
        other = space.find_other(against, material, rows, split=split, device=device, captions=captions)
        found.notes += [f"{against.path}: {note}" for note in other.subject.notes]
        material = replace(material, against=other)
    done = _analyse(material, found, asked, strict=bool(what) and not lenient)
    if not done and not lenient:
        raise DataError(f"Nothing can be analysed here. {' '.join(found.notes)}")
    # Whatever can go wrong has; only now does the old result go.
    run.unfinish(STAGE)
    folder = run.stage_dir(STAGE)
    for stale in [path for pattern in _STALE for path in folder.glob(pattern)]:
        stale.unlink()
    outputs = [run.table(STAGE, "analysis")]
    tables.write_table(outputs[0], "analysis", pd.DataFrame(found.rows) if found.rows else tables.empty("analysis"))
    for draw in found.drawings:
        outputs += draw(folder)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(subject.device),
        metrics=summary(found.rows),
        extra={
            "split": split,
            "method": subject.method.name,
            "analyses": done,
            "images": len(material.images),
            "people": int(material.images["person_id"].nunique()),
            "features": material.features_read,
            **({} if material.against is None else {"against": _told(material.against)}),
            "notes": found.notes,
            "data": str(source.folder.resolve()),
        },
    )
    return {**record, "status": "done"}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float | dict[str, float]]:
    """Return the numbers by name: a number where nothing stands beside it, else `{value, low, high, control, ...}`."""
    beside = ("value", "low", "high", "control", "control_high", "chance", "p_value")
    numbers: dict[str, float | dict[str, float]] = {}
    for row in rows:
        plain = _PLAIN.get(row["analysis"]) == row["metric"]
        name = ".".join(
            row[key] for key in ("analysis", "feature", "target", *(() if plain else ("metric",))) if row[key]
        )
        entry = {key: float(row[key]) for key in beside if key in row and row[key] == row[key]}
        numbers[name] = entry["value"] if list(entry) == ["value"] else entry
    return numbers


def _known(what: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for text in what for name in text.split(",")]
    unknown = [name for name in names if name not in ANALYSES]
    if unknown:
        raise UsageError(f"`--what {unknown[0]}` is not known.", hint=f"One of: {', '.join(ANALYSES)}.")
    return tuple(name for name in ANALYSES if name in (names or DEFAULT))


def _against(run: Run, other: Run | None, asked: Sequence[str]) -> dict[str, Any]:
    """What the settings say about another run; nothing without one.

    Raises:
        UsageError: it is this run, or no analysis compares.
        DataError: it has no model.
    """
    if other is None:
        return {}
    if other.path.resolve() == run.path.resolve():
        raise UsageError(f"{run.path} would be compared with itself.", hint="Name another run.")
    if not set(asked) & set(space.COMPARED):
        raise UsageError(
            f"`--against` compares {' and '.join(space.COMPARED)}, and `--what` names neither.",
            hint="Add one: --what tsne,compactness.",
        )
    try:
        facts = {"model": model_digest(other), "training": training_digest(other)}
    except DataError as error:
        raise DataError(f"--against {other.path}: {error.message}", hint=error.hint) from None
    return {"against": {"run": str(other.path.resolve()), **facts}}


def _told(other: Material) -> dict[str, Any]:
    """What the record says about the other run."""
    subject = other.subject
    return {
        "run": str(subject.run.path.resolve()),
        "method": subject.method.name,
        "model": subject.weights,
        "features": other.features_read,
    }


def _check_people(highlight: Sequence[str], images: pd.DataFrame, split: str) -> None:
    unknown = sorted(set(highlight) - set(images["person_id"].astype(str)))
    if unknown:
        raise DataError(
            f"`{unknown[0]}` has no image in the {split} split.",
            hint=f"A person id is what the images table says, such as `{images['person_id'].iloc[0]}`.",
        )


def _analyse(material: Material, found: Found, names: Sequence[str], *, strict: bool) -> list[str]:
    """Do the analyses that apply; return their names.

    Raises:
        DataError: one does not apply, if `strict`.
    """
    done, reasons = [], []
    for name in names:
        try:
            ANALYSES[name](material, found)
            done.append(name)
        except NotApplicable as error:
            reasons.append(f"{name}: not done: {error}.")
            if strict:
                raise DataError(f"`--what {name}` does not apply: {error}.") from None
    found.notes += reasons
    return done


def _sampled(count: int, images: pd.DataFrame) -> list[str]:
    notes = []
    if count < len(images):
        notes.append(f"Analysed are {count:,} of {len(images):,} images, drawn as whole people (--limit).")
        log.info(notes[0])
    datasets = images["dataset"].nunique()
    if datasets > 1:
        notes.append(f"The images of {datasets} datasets are analysed together.")
    return notes
