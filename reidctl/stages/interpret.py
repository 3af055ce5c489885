"""`interpret`: where phrases are seen, by any explainer of any method, and whether the maps survive being tested."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import torch

from reidctl import tables
from reidctl.console import log, progress
from reidctl.data import Corpus
from reidctl.device import resolve_device
from reidctl.explain.explainers import Aggregate
from reidctl.explain.fills import PLUGIN, plugin_digest
from reidctl.explain.grounding import PartNames, find_mask, part_names, summarise_grounding
from reidctl.explain.maps import Phrase, explain_phrases, grid_map, named_rows
from reidctl.explain.parsing import read_parsing
from reidctl.explain.pictures import draw_explanation
from reidctl.methods.base import Method, load_method
from reidctl.pixels import read_pixels
from reidctl.runs import Run, digest
from reidctl.stages import building
from reidctl.stages.gates import collect_gates, gate_summary, write_gates
from reidctl.stages.interpret_asked import (
    check_choice,
    check_judges,
    check_others,
    check_words,
    controls_of,
    encoder_of,
    explainers_of,
    judges_of,
    plan_of,
    tests_of,
    weights_of,
)
from reidctl.stages.interpret_picked import captions_of, corpus_of, file_of, on_all_positives, phrases_of, pick
from reidctl.stages.interpret_tests import (
    PARAMETERS,
    QUICK,
    Material,
    Model,
    labelled,
    run_tests,
)
from reidctl.stages.measuring import find_subject
from reidctl.stages.sources import find_source

STAGE = "interpret"
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
_ENOUGH = 30
"""People from which on a bootstrap over people is not too narrow; `evaluate` warns below it too."""


def run(
    run: Run,
    *,
    data: Path | None = None,
    captions: Path | None = None,
    samples: int = 100,
    explainer: str | Sequence[str] = (),
    what: Sequence[str] = (),
    lenient: bool = False,
    phrase: str | None = None,
    query: str | None = None,
    image: str | None = None,
    split: str = "test",
    fractions: Sequence[float] = FRACTIONS,
    fills: Sequence[str] = ("mean",),
    controls: Sequence[str] = (),
    draws: int = 10,
    scope: str = "target",
    level: str = "caption",
    aggregate: str = "own",
    judges: Sequence[Run] = (),
    encoder: str | None = None,
    parts: Path | None = None,
    phrases: str = "given",
    pictures: int = 24,
    batch: int = 128,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Explain phrases of captions on their images, test the maps, and plot the gates.

    Writes `explanations.parquet`, `pictures/*.png`, `interpretability.parquet` (every score, control and difference
    with intervals) and, where they apply, `faithfulness.parquet`, `grounding.csv` and `gates.json` with pictures.
    Long measurements are kept in parts: a run that was killed goes on where it stopped.

    Args:
        run: holds the trained model; where the stage writes.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        samples: how many captions, drawn at random.
        explainer: names of `explainers.EXPLAINERS`, or `all`; default `ppim` where the method has it, else `gradcam`.
        what: tests, of `interpret_tests.TESTS`, or `all` that apply; default: those that encode nothing again.
        lenient: also a test that was asked for by name may not apply.
        phrase: explain this text on `samples` random images (or on `image`) instead of the captions' own phrases.
        query: explain this caption, by its id or as words, on `image`, on its own image, or on random ones.
        image: the id of an image of the split, or the file of any picture.
        split: whose captions and images.
        fractions: shares of patches to remove.
        fills: what is put there; see `explain.fills.make_fill`.
        controls: what removes as many patches; default: all that the data allow.
        draws: of the control `random`, at least 10.
        scope: mask the `target` image, or `all_positives` of a query, which are then all explained.
        level: mask by the map of a `caption`, or by that of each `phrase`.
        aggregate: how a caption's map is made: `own` (as the explainer does it), or `weighted`, `max` or `mean` of its
            phrases' maps.
        judges: runs whose models see the masked pictures too, and whose own maps are compared.
        encoder: an independent encoder for `alignment`: a run directory, or a backbone's spec.
        parts: part masks: a `parts` table or a folder of label maps; default: the dataset's own.
        phrases: the backend that finds phrases: `given` (the dataset's, else rules), `rules`, `spacy`, or `trained`:
            as the model's training did.
        pictures: how many maps are also drawn as PNG.
        batch: masked images per forward pass.
        seed: of every draw.
        device: where to compute.
        force: do it again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`; `metrics` holds `{value, low, high}` by score.

    Raises:
        UsageError: an unknown explainer, test, fill, control or device, an empty phrase, or flags that exclude others.
        DataError: no trained model, no dataset, no captions, or a test that was asked for and does not apply.
    """
    names = [explainer] if isinstance(explainer, str) else list(explainer)
    check_words(phrase, query, image)
    asked_tests, by_name = tests_of(what)
    strict = by_name and not lenient
    chosen_controls = controls_of(controls, level)
    plan = plan_of(fractions, fills, [name for name in chosen_controls if name != "pooled"], draws, scope, seed)
    check_choice("level", level, ("caption", "phrase"))
    check_choice("aggregate", aggregate, get_args(Aggregate))
    check_choice("phrases", phrases, ("given", "rules", "spacy", "trained"))
    target = resolve_device(device)
    run.require("finetune")
    source = find_source(run, data, captions)
    mine = Model("", load_method(run.stage_dir("finetune"), target), weights_of(run))
    chosen = explainers_of(names, mine.method)
    others = judges_of(judges, target)
    independent = encoder_of(encoder, target, seed)
    check_others(mine, others, independent, asked_tests if strict else (), masks=parts or source.parts)
    inputs = {**source.digests(), "model": mine.digest, **{f"judge {m.name}": m.digest for m in others}}
    if independent is not None and independent.digest:
        inputs["encoder"] = independent.digest
    masks = parts or (source.parts if source.parts.exists() else None)
    if masks is not None:
        inputs["parts"] = digest(masks)
    inputs |= {f"fill {name}": code for name in fills if name.startswith(PLUGIN) and (code := plugin_digest(name))}
    settings = {
        "seed": seed,
        "interpret": {
            "samples": samples, "explainer": chosen, "what": list(asked_tests), "strict": strict,
            "phrase": phrase, "query": query, "image": image, "split": split, "pictures": pictures,
            "fractions": list(fractions), "fills": list(fills), "controls": list(chosen_controls), "draws": draws,
            "placements": plan.placements, "scope": scope, "level": level, "aggregate": aggregate,
            "judges": [m.name for m in others], "encoder": encoder, "phrases": phrases,
            "parts": None if parts is None else "user-supplied", **PARAMETERS,
        },
    }  # fmt: skip
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    if force:
        _forget(run.stage_dir(STAGE) / "parts")
    corpus, written = corpus_of(source, split, image), captions_of(source)
    known = phrases_of(run, source, phrases)
    building.give_phrases(run, source, mine.method)
    # Asked for by name, a backend stands in for the dataset's own phrases too.
    given = written if phrases == "given" else written[written["kind"] != "phrase"]
    picked = pick(corpus, given, known, samples=samples, seed=seed, phrase=phrase, query=query, image=image)
    if scope == "all_positives":
        picked = on_all_positives(picked, corpus)
    heavy = [name for name in asked_tests if name not in QUICK]
    if heavy:
        find_subject(run, split=split, device=device, data=data, captions=captions)  # refuses what would be no test
        check_judges(judges, encoder, source, corpus, split)
    folder = run.stage_dir(STAGE)
    maps = _explain(mine.method, corpus, picked, chosen, target, seed, cast(Aggregate, aggregate))
    true_parts, names_of = _parts(masks, corpus, supplied=parts is not None), part_names(written)
    if "pooled" in chosen_controls and len(true_parts):
        plan = replace(plan, controls=(*plan.controls, "pooled"))
    material = Material(
        mine, corpus, picked, maps, true_parts, names_of, plan, level, others, independent, target, batch, seed,
        folder / "parts",
    )  # fmt: skip
    rows, notes = run_tests(material, asked_tests, strict=strict)
    gates = collect_gates(mine.method, corpus, device=target, seed=seed)
    aside = folder / "new"
    with _emptied(aside):
        made = [aside / "explanations.parquet"]
        tables.write_table(made[0], "explanations", _joined(maps))
        made += _write(aside, rows, material.frames)
        made += _draw(aside / "pictures", maps[chosen[0]], corpus, true_parts, names_of, pictures)
        made += write_gates(aside, gates[0], gates[1])
        # Only now, when nothing can be refused any more, does an older result go.
        run.unfinish(STAGE)
        _clear(folder)
        outputs = [_moved(path, aside, folder) for path in made]
    _forget(folder / "parts")
    grounded = material.frames.get("grounding")
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics=_metrics(rows, grounded, chosen[0], seed),
        extra={
            "explained": len(picked),
            "explainers": chosen,
            "grounded": 0 if grounded is None else int((grounded["explainer"] == chosen[0]).sum()),
            "gates": gate_summary(gates[1]),
            "pictures": min(pictures, len(picked)),
            "parts": None if masks is None else "user-supplied" if parts is not None else "true",
            "file": file_of(corpus),
            "cautions": _few(material, rows),
            "notes": notes,
            "data": str(source.folder.resolve()),
        },
    )
    return {**record, "status": "done"}


def _few(material: Material, rows: pd.DataFrame) -> list[str]:
    """A warning where intervals over people say little."""
    people = len({material.person_of[phrase.image_id] for phrase in material.phrases})
    if people >= _ENOUGH or not len(rows):
        return []
    return [f"Fewer than {_ENOUGH} people: {people}. Intervals, stars and verdicts over so few are too sure."]


def _explain(
    method: Method,
    corpus: Corpus,
    picked: Sequence[Phrase],
    chosen: Sequence[str],
    device: torch.device,
    seed: int,
    aggregate: Aggregate,
) -> dict[str, pd.DataFrame]:
    maps: dict[str, pd.DataFrame] = {}
    similarity = None
    for name in chosen:
        with progress(f"explain ({name})", len(picked), unit="phrases") as advance:
            maps[name] = explain_phrases(
                method,
                corpus,
                picked,
                explainer=name,
                device=device,
                seed=seed,
                aggregate=aggregate,
                similarity=similarity,
                advance=advance,
            )
        similarity = maps[name]["similarity"].to_numpy(np.float32)
    return maps


def _joined(maps: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All maps, phrase by phrase, so that the explainers of a phrase stand together."""
    whole = pd.concat(list(maps.values()), keys=range(len(maps)), names=["explainer_", "row_"])
    return whole.sort_index(level=["row_", "explainer_"], kind="stable").reset_index(drop=True)


# What is written


def _clear(folder: Path) -> None:
    """Remove what an earlier run of this stage may have left and this one may not write; unfinished parts stay."""
    named = ("grounding.csv", "faithfulness.parquet", "interpretability.parquet")
    stale = [*(folder / name for name in named), *folder.glob("gates.*"), *(folder / "pictures").glob("*.png")]
    for path in stale:
        path.unlink(missing_ok=True)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Remove a folder of files that are not in their place yet, before and after they are made."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _moved(path: Path, aside: Path, folder: Path) -> Path:
    """Move a finished file from `aside` to its place in `folder`; return the place."""
    place = folder / path.relative_to(aside)
    place.parent.mkdir(parents=True, exist_ok=True)
    path.replace(place)
    return place


def _forget(folder: Path) -> None:
    """Remove the parts of long measurements; they are in the tables now."""
    for path in folder.glob("part-*"):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _parts(masks: Path | None, corpus: Corpus, *, supplied: bool) -> pd.DataFrame:
    if masks is None:
        log.info("The dataset has no part masks: the maps are drawn but not scored.")
        return tables.empty("parts")
    if supplied:
        found = read_parsing(masks, corpus.images)
        log.info(
            f"{masks}: part masks of {len(corpus.images) - found.missing:,} of {len(corpus.images):,} images; "
            f"{found.unused:,} belong to none of them."
        )
        return found.parts
    parts = tables.read_table(masks, "parts")
    return parts[parts["image_id"].isin(set(corpus.images["image_id"]))]


def _write(folder: Path, rows: pd.DataFrame, frames: dict[str, pd.DataFrame]) -> list[Path]:
    outputs = [folder / "interpretability.parquet"]
    tables.write_table(outputs[0], "interpretability", rows)
    if "faithfulness" in frames:
        outputs.append(folder / "faithfulness.parquet")
        tables.write_table(outputs[-1], "faithfulness", frames["faithfulness"])
    if "grounding" in frames:
        outputs.append(_write_csv(folder / "grounding.csv", frames["grounding"]))
    return outputs


def _write_csv(path: Path, frame: pd.DataFrame) -> Path:
    text = StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    tables.write_text(path, text.getvalue())
    return path


def _metrics(rows: pd.DataFrame, grounded: pd.DataFrame | None, first: str, seed: int) -> dict[str, Any]:
    """`{value, low, high}` of everything by name; the grounding of the first explainer also by its short names."""
    own = grounded[grounded["explainer"] == first] if grounded is not None else pd.DataFrame()
    short: dict[str, Any] = {name: asdict(entry) for name, entry in summarise_grounding(own, seed=seed).items()}
    return short | {
        name: {key: float(getattr(row, key)) for key in ("value", "low", "high")} for name, row in labelled(rows)
    }


def _draw(
    folder: Path, table: pd.DataFrame, corpus: Corpus, parts: pd.DataFrame, names: PartNames, count: int
) -> list[Path]:
    """The first maps of the table as PNG; a thousand pictures would help nobody."""
    facts = {row.image_id: row for row in named_rows(corpus.images)}
    written = []
    for number, row in enumerate(named_rows(table.head(count))):
        image: Any = facts[row.image_id]
        size = (int(image.height), int(image.width))
        of_image = named_rows(parts[parts["image_id"] == row.image_id])
        name = names.get((row.query_id, int(row.char_start), int(row.char_end)))
        truth = find_mask(str(row.phrase), of_image, size, name=name)
        path = folder / f"{number + 1:03d}.png"
        note = f"{row.image_id}   cos {row.similarity:.3f}   {row.explainer}"
        picture = read_pixels(corpus.root / str(image.path), size)
        draw_explanation(picture, grid_map(row), str(row.phrase), path, note=note, truth=truth)
        written.append(path)
    return written
