"""`study`: train and measure every condition of a study over its seeds, and judge its claims.

Trainings are units named by everything that decides them, so studies share them, a killed study goes on where it was,
and a changed setting trains what it changes. Test people are looked at once per unit; nothing is selected on them.
"""

import math
import multiprocessing
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.config import merge
from reidctl.console import log, progress
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.claims import Judgement, judge
from reidctl.evaluation.study import Condition, Measures, Study, load_study, study_name
from reidctl.evaluation.study_tables import claim_rows, column_of, overview, page, value_rows
from reidctl.report.radar import radar
from reidctl.report.study_figures import Panel, study_bars, study_curve
from reidctl.runs import Run, fingerprint
from reidctl.stages import building
from reidctl.stages.study_unit import Done, Job, Prompts, Unit, Values, end_with_parent, home_of, work

Place = tuple[str, int]
"""Condition and seed."""

# Folders of the trainings and of a run's own stages: a study may share a run directory with them.
_RESERVED = frozenset({"units", "people", "texts", "combined", "prompts", "data", "caption", "prompt-stage", "finetune"}
                      | {"index", "evaluate", "robustness", "against", "seeds", "matrix", "epochs", "interpret"}
                      | {"analyse", "report"})  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A study and its trainings."""

    name: str
    file: Path
    study: Study
    units: Mapping[Place, Unit]


def run(
    run: Run,
    files: Sequence[Path],
    *,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    save: Path | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Run studies together: equal trainings are done once, all of them in parallel.

    Args:
        run: where results (`<study>/`), trainings (`units/`) and data (`people/`, ...) go.
        files: study files, see `evaluation.study`.
        seeds: instead of those of the files.
        jobs: processes; default: one per core. Each computes with one thread, so results do not depend on it.
        dry_run: only say what would be done.
        save: also write all pages as one Markdown file here, pictures in a folder beside it.
        force: write the results again, even if nothing changed. Finished trainings are kept.

    Returns:
        One record per study, with `status` `done`, `up-to-date` or `dry-run`.

    Raises:
        UsageError: a wrong study file, two of one name, or an unknown method or setting.
        DataError: a training failed; what succeeded is kept and not repeated.
    """
    plans = _plans(run.path, files, seeds)
    wanted = _wanted(plans)
    if dry_run:
        return [_dry(plan) for plan in plans]
    run.check_writable()
    found = _train(wanted, jobs or os.cpu_count() or 1)
    records = [_finish(run, plan, found, force=force) for plan in plans]
    if save is not None:
        _save(run, plans, found, save)
    return records


def _plans(home: Path, files: Sequence[Path], seeds: Sequence[int] | None) -> list[Plan]:
    if not files:
        raise UsageError("Name at least one study file.", hint="Those of the project lie in pipelines/studies/.")
    plans: list[Plan] = []
    for path in files:
        name = study_name(path)
        if name in _RESERVED or name in (plan.name for plan in plans):
            raise UsageError(f"The results of {path} cannot be called `{name}`.", hint="Rename the study file.")
        study = load_study(path, {} if seeds is None else {"seeds": list(seeds)})
        plans.append(Plan(name, path, study, _units(home, study)))
    return plans


def _units(home: Path, study: Study) -> dict[Place, Unit]:
    start = None
    if study.start is not None:
        start = Unit(home, {"seed": 0, **_checked(building.resolve(study.start, None))})
    return {
        (name, seed): _unit(home, study, condition, seed, start)
        for name, condition in study.conditions.items()
        for seed in study.seeds
    }


def _unit(home: Path, study: Study, condition: Condition, seed: int, start: Unit | None) -> Unit:
    recipe = building.resolve(merge(study.recipe, condition.set), condition.method or study.method)
    return Unit(home, {**_checked(recipe), "seed": seed}, start)


def _checked(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, after refusing settings that would only be refused when its training starts."""
    building.check(recipe)
    return {name: value for name, value in recipe.items() if name != "about"}


def _wanted(plans: Sequence[Plan]) -> list[Job]:
    """Every training once, with what any study measures of it."""
    units: dict[str, Unit] = {}
    asked: dict[str, list[Measures]] = {}
    for plan in plans:
        for (name, _), unit in plan.units.items():
            units[unit.name] = unit
            mine = asked.setdefault(unit.name, [])
            measures = _measures(plan.study, name)
            if measures not in mine:
                mine.append(measures)
    return [Job(unit, tuple(asked[name])) for name, unit in units.items()]


def _measures(study: Study, condition: str) -> Measures:
    return study.conditions[condition].measure or study.measure


Measured = dict[str, dict[str, Values]]
"""unit -> what was measured (as JSON) -> values."""


def _train(wanted: Sequence[Job], workers: int) -> Measured:
    """Make the data, train what trainings start from, then train and measure everything.

    Raises:
        DataError: something failed, after everything else was done.
    """
    units = [job.work for job in wanted if isinstance(job.work, Unit)]
    starts = {unit.start.name: unit.start for unit in units if unit.start is not None}
    datasets = {home_of(it).path: it for it in (unit.dataset for unit in [*starts.values(), *units])}
    stages = (
        ("data", "datasets", [Job(dataset) for dataset in datasets.values()]),
        ("starting weights", "trainings", [Job(unit) for unit in starts.values()]),
        ("prompts", "prompt stages", [Job(prompts) for prompts in _prompts(units)]),
        ("study", "trainings", wanted),
    )
    found: Measured = {}
    for title, noun, jobs in stages:
        if not jobs:
            continue
        failed = []
        with progress(title, len(jobs), unit=noun) as advance:
            for done in _parallel(jobs, min(workers, len(jobs))):
                advance(1)
                if done.error:
                    failed.append(done)
                    log.error(f"{_place_of(done)}: {done.error}")
                elif isinstance(done.job.work, Unit):
                    values = {_key(m): v for m, v in zip(done.job.measures, done.values, strict=True)}
                    found[done.job.work.name] = values
        if failed:
            raise DataError(
                f"{len(failed)} of {len(jobs)} {noun} failed, the first in {_place_of(failed[0])}: {failed[0].error}",
                hint="What succeeded is kept; mend the cause and run the same command again.",
            )
    return found


def _prompts(units: Sequence[Unit]) -> list[Prompts]:
    """The prompt stages that trainings build on, each once."""
    every = [prompts for unit in units if (prompts := unit.prompts) is not None]
    return list({prompts.name: prompts for prompts in every}.values())


def _place_of(done: Done) -> str:
    return str(home_of(done.job.work).path)


def _key(measures: Measures) -> str:
    return measures.model_dump_json()


def _parallel(jobs: Sequence[Job], workers: int) -> Iterator[Done]:
    """Yield what the jobs left, as they end; no process outlives an interrupt.

    Raises:
        DataError: a process was killed.
    """
    if not jobs:
        return
    # Forking after torch has started threads can deadlock, so the workers start clean.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "A training process was killed from outside, perhaps because memory ran out.",
            hint="What is finished is kept: run the same command again, with fewer --jobs.",
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _dry(plan: Plan) -> dict[str, Any]:
    """What a study would do, without doing it."""
    units = {unit.name: unit for unit in plan.units.values()}
    finished = [name for name, unit in units.items() if unit.run.record("finetune") is not None]
    return {
        "stage": plan.name,
        "status": "dry-run",
        "outputs": {},
        "metrics": {"trainings": len(units), "finished": len(finished)},
        "seconds": 0.0,
        "conditions": list(plan.study.conditions),
        "seeds": list(plan.study.seeds),
    }


def _finish(run: Run, plan: Plan, found: Measured, *, force: bool) -> dict[str, Any]:
    """Judge the claims, write tables, page and figure, and the record."""
    study = plan.study
    values = _values(plan, found)
    settings = {"study": study.model_dump(mode="json", exclude={"base"}), "units": _names(plan)}
    inputs = {"values": fingerprint({"values": values}, {})}
    current = None if force else run.up_to_date(plan.name, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    run.unfinish(plan.name)
    judged = _judged(study, values)
    folder = run.stage_dir(plan.name)
    outputs = [run.table(plan.name, "study"), run.table(plan.name, "claims")]
    tables.write_table(outputs[0], "study", value_rows(values))
    tables.write_table(outputs[1], "claims", claim_rows(judged))
    pictures = _draw(study, values, folder / "figure")
    shown = page(
        study, plan.name, values, judged, figure="figure.png" if pictures else "", command=_command(run, [plan])
    )
    tables.write_text(folder / "study.md", shown)
    return {
        **run.finish(
            plan.name,
            settings=settings,
            inputs=inputs,
            outputs=[*outputs, folder / "study.md", *pictures],
            started=started,
            metrics=_summary(judged),
            extra={"claims": [_shown(judgement) for judgement in judged], "page": str(folder / "study.md")},
        ),
        "status": "done",
    }


def _values(plan: Plan, found: Measured) -> dict[str, dict[int, Values]]:
    """What was measured, by condition and seed."""
    values: dict[str, dict[int, Values]] = {name: {} for name in plan.study.conditions}
    for (name, seed), unit in plan.units.items():
        values[name][seed] = found[unit.name][_key(_measures(plan.study, name))]
    return values


def _judged(study: Study, values: Mapping[str, Mapping[int, Values]]) -> list[Judgement]:
    return [judge(claim, values, study.seeds) for claim in study.claims]


def _command(run: Run, plans: Sequence[Plan]) -> str:
    return f"reidctl study {' '.join(str(plan.file) for plan in plans)} --run {run.path}"


def _save(run: Run, plans: Sequence[Plan], found: Measured, target: Path) -> None:
    """Write one page of all studies, with their pictures in a folder beside it."""
    pictures = target.with_suffix("")
    shown, pages = [], []
    for plan in plans:
        values = _values(plan, found)
        judged = _judged(plan.study, values)
        shown.append((plan.name, plan.study, judged))
        figure = run.stage_dir(plan.name) / "figure.png"
        where = ""
        if figure.is_file():
            where = f"{pictures.name}/{plan.name}.png"
            pictures.mkdir(parents=True, exist_ok=True)
            tables.write_bytes(target.parent / where, figure.read_bytes())
        text = page(plan.study, plan.name, values, judged, figure=where, command=_command(run, [plan]))
        # One level down: the file has a title of its own.
        pages.append(re.sub(r"^#", "##", text, flags=re.MULTILINE))
    title = f"# {target.stem}\n\nMade by `{_command(run, plans)} --save {target}`.\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(target, "\n".join([title, overview(shown), *pages]))


def _draw(study: Study, values: Mapping[str, Mapping[int, Values]], stem: Path) -> list[Path]:
    """The study's figure; nothing if none is asked for, or if nothing that it shows was measured."""
    asked = study.draw.measures or tuple(column.measure for column in study.table)
    measured = {name for by_seed in values.values() for found in by_seed.values() for name in found}
    shown = [name for name in asked if name in measured]
    if study.draw.kind == "none" or not shown:
        return []
    drawn = {name: part for name, part in study.conditions.items() if name not in study.draw.without}
    values = {name: values[name] for name in drawn}
    labels = [condition.label or name for name, condition in drawn.items()]
    if study.draw.kind == "radar":
        raw = {_title(study, name): [_mean(by_seed.values(), name) for by_seed in values.values()] for name in shown}
        costs = [_title(study, name) for name in study.draw.costs]
        return radar(pd.DataFrame(raw, index=labels), stem, costs=costs, units={})
    panels = [_panel(study, values, name) for name in shown]
    if study.draw.kind == "curve":
        x = [condition.x or 0.0 for condition in drawn.values()]
        return study_curve(labels, x, panels, stem, axis=study.draw.axis)
    return study_bars(labels, panels, stem)


def _panel(study: Study, values: Mapping[str, Mapping[int, Values]], name: str) -> Panel:
    column = column_of(study, name)
    factor = 100.0 if column.unit == "percent" else column.scale
    rows = [[factor * found.get(name, math.nan) for found in by_seed.values()] for by_seed in values.values()]
    return Panel(f"{_title(study, name)}, percent" if column.unit == "percent" else _title(study, name), rows)


def _title(study: Study, name: str) -> str:
    short = dict(zip(study.draw.measures, study.draw.names, strict=False))
    return short.get(name) or column_of(study, name).title or name


def _mean(found: Iterable[Values], name: str) -> float:
    kept = [values[name] for values in found if name in values]
    return statistics.fmean(kept) if kept else math.nan


def _names(plan: Plan) -> dict[str, str]:
    return {f"{name}-{seed}": unit.name for (name, seed), unit in plan.units.items()}


def _summary(judged: Sequence[Judgement]) -> dict[str, int]:
    return {verdict: sum(j.verdict == verdict for j in judged) for verdict in ("holds", "does not hold", "undecided")}


def _shown(judgement: Judgement) -> dict[str, Any]:
    return {
        "claim": judgement.claim.say,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "seeds": list(judgement.seeds),
        **({} if judgement.effect is None else asdict(judgement.effect)),
    }
