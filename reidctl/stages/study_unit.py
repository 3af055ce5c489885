"""One training of a study and everything that is measured of it; runs in a process of its own."""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import console, tables
from reidctl.config import parse_section
from reidctl.errors import ReidctlError, UsageError
from reidctl.evaluation.alarms import ALARMS
from reidctl.evaluation.protocols import JOINT
from reidctl.evaluation.study import Measures
from reidctl.runs import Run, fingerprint

_FORMAT = 1
"""Of the stored values: a change of what a name means gets another number, and is then measured again."""

_JOINING = ("identity_map", "purge", "leak_check")
"""Settings of the section `data` that decide how two rendered datasets become one."""

Values = dict[str, float]
Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Dataset:
    """People to render and, if the recipe has a `caption` section, texts to write.

    Attributes:
        home: of the study's runs.
        recipe: sections `synth`, `caption`, `seed` and, for two datasets, `data`.
    """

    home: Path
    recipe: Recipe

    @property
    def pictures(self) -> Run:
        """Where the people are."""
        facts = {name: self.recipe.get(name) for name in ("synth", "seed")}
        return Run(self.home / "people" / fingerprint(facts, {})[:12])

    @property
    def texts(self) -> Run | None:
        """Where the identity and clothing texts are; None if none are asked for."""
        if "caption" not in self.recipe:
            return None
        facts = {name: self.recipe.get(name) for name in ("synth", "seed", "caption")} | _joining(self.recipe)
        return Run(self.home / "texts" / fingerprint(facts, {})[:12])

    @property
    def both(self) -> Run | None:
        """Where the two datasets of `synth.domain: both` are one, purged of each other's test people; else None."""
        if not _two(self.recipe):
            return None
        facts = {name: self.recipe.get(name) for name in ("synth", "seed")} | _joining(self.recipe)
        return Run(self.home / "combined" / fingerprint(facts, {})[:12])

    @property
    def folder(self) -> Path:
        """Where the tables of the people are."""
        return (self.both or self.pictures).stage_dir("data")

    @property
    def captions(self) -> Path | None:
        """The table of identity and clothing texts."""
        return self.texts.table("caption", "captions") if self.texts else None

    def make(self) -> None:
        """Render and describe, if that is not done yet."""
        from reidctl.stages import caption, data_combine, data_synth
        from reidctl.stages.sources import DataSettings

        joining = parse_section(DataSettings, _joining(self.recipe).get("data"), "data")
        with locked(self.pictures.path):
            data_synth.run(self.pictures, self.recipe, workers=1)
        if self.both is not None:
            with locked(self.both.path):
                data_combine.run(self.both, [self.pictures.path], joining)
        if self.texts is not None:
            with locked(self.texts.path):
                caption.run(self.texts, self.recipe, data=self.folder)


def _two(recipe: Recipe) -> bool:
    """Whether a recipe asks for people of two datasets."""
    return dict(recipe.get("synth") or {}).get("domain") == "both"


def _joining(recipe: Recipe) -> dict[str, Any]:
    """The section `data` as far as it decides how two datasets become one; empty if it says nothing of it."""
    given = dict(recipe.get("data") or {})
    asked = {name: given[name] for name in _JOINING if name in given}
    return {"data": asked} if asked and _two(recipe) else {}


@dataclass(frozen=True)
class Unit:
    """One training: a recipe with seed, its data, and where its towers start from.

    Attributes:
        home: of the study's runs.
        recipe: resolved, with `seed`; `start` is not in it.
        start: the training that it starts from; None: `backbone.spec`.
    """

    home: Path
    recipe: Recipe
    start: "Unit | None" = None

    @property
    def dataset(self) -> Dataset:
        """The people it is trained, validated and tested on."""
        people = {name: part for name, part in self.recipe.items() if name in ("synth", "caption", "seed")}
        return Dataset(self.home, people | _joining(self.recipe))

    @property
    def name(self) -> str:
        """What its run is called: the same for equal trainings, whatever study asks for them."""
        facts = {"recipe": dict(self.recipe), "start": self.start.name if self.start else None}
        return fingerprint(facts, {})[:12]

    @property
    def run(self) -> Run:
        """Its run."""
        return Run(self.home / "units" / self.name)

    @property
    def whole(self) -> dict[str, Any]:
        """The recipe with the run that its towers start from."""
        recipe = dict(self.recipe)
        if self.start is not None:
            recipe["backbone"] = {**recipe["backbone"], "start": str(self.start.run.path)}
        return recipe

    @property
    def prompts(self) -> "Prompts | None":
        """The prompt stage that it builds on; None if it needs none."""
        from reidctl.stages import building

        checked = building.check(self.recipe)
        if not checked.method.needs_prompt_stage:
            return None
        asked = {name: self.recipe[name] for name in ("seed", "backbone", "prompt", "data") if name in self.recipe}
        method = {"name": checked.name, **checked.method.prompt_settings()}
        start = self.start.name if self.start else None
        facts = {**asked, "method": method, "people": self.dataset.recipe, "start": start}
        return Prompts(self, fingerprint(facts, {})[:12])

    def train(self) -> dict[str, Any]:
        """Train, if that is not done yet; return the record."""
        from reidctl.stages import finetune

        recipe, prompts = self.whole, self.prompts
        if prompts is not None:
            prompts.make()
            recipe["prompt"] = {**(recipe.get("prompt") or {}), "use": str(prompts.run.path)}
        return finetune.run(self.run, recipe, data=self.dataset.folder, captions=self.dataset.captions)


@dataclass(frozen=True)
class Prompts:
    """The prompt stage of a training, shared by all trainings of a study that would repeat it.

    Attributes:
        unit: one of those trainings.
        name: what its run is called.
    """

    unit: Unit
    name: str

    @property
    def run(self) -> Run:
        """Its run."""
        return Run(self.unit.home / "prompts" / self.name)

    def make(self) -> None:
        """Learn the prompts, if that is not done yet."""
        from reidctl.stages import prompt_stage

        people = self.unit.dataset
        people.make()
        with locked(self.run.path):
            prompt_stage.run(self.run, self.unit.whole, data=people.folder, captions=people.captions)


@dataclass(frozen=True)
class Job:
    """What a worker does: make data, train, or train and measure.

    Attributes:
        work: a dataset, a prompt stage or a training.
        measures: what is measured of a training, study by study.
    """

    work: Dataset | Prompts | Unit
    measures: tuple[Measures, ...] = ()


@dataclass(frozen=True)
class Done:
    """What a job left: values for each of its measures, or why it failed."""

    job: Job
    values: tuple[Values, ...]
    error: str
    seconds: float


def home_of(work: Dataset | Prompts | Unit) -> Run:
    """Return the run that a piece of work writes to."""
    return (work.texts or work.both or work.pictures) if isinstance(work, Dataset) else work.run


def work(job: Job) -> Done:
    """Do a job; a mistake that the user can mend becomes `error`, a bug is raised."""
    import torch

    # One thread each: another number gives other last bits, and results must not depend on how many run at a time.
    torch.set_num_threads(1)
    run = home_of(job.work)
    started = time.monotonic()
    with _logged(run.path / "log.txt"):
        try:
            values = _do(job)
        except ReidctlError as error:
            console.log.error(str(error))
            return Done(job, (), str(error), time.monotonic() - started)
    return Done(job, values, "", time.monotonic() - started)


def _do(job: Job) -> tuple[Values, ...]:
    if not isinstance(job.work, Unit):
        job.work.make()
        return ()
    unit = job.work
    unit.dataset.make()
    with locked(unit.run.path):
        record = unit.train()
        return tuple(measure(unit, record, measures) for measures in job.measures)


def measure(unit: Unit, trained: Mapping[str, Any], measures: Measures) -> Values:
    """Return every measured value by its dotted name; each measurement is kept and not repeated.

    `t2i.mAP`, `cloth-changing.i2i.rank1` (conditions of `evaluate`), `joint.t2i.mAP` (all datasets in one gallery),
    `chance.t2i.rank1`, `identity-only.t2i.mAP` and `.drop` (robustness), `NAME.t2i.mAP` (elsewhere), names of
    `analyse`, `maps.ppim.iou` (`interpret`), `train.images_per_second`, `train.seconds`, `prompt.seconds`,
    `weight.LOSS`, `pseudo.diversity`, `task_cosine`, `alarm.collapse`, ...
    """
    seed = int(unit.recipe["seed"])
    found = _of_training(unit.run, trained)
    for name, synth in measures.elsewhere.items():
        recipe = {**unit.dataset.recipe, "synth": {**unit.dataset.recipe.get("synth", {}), **synth}}
        other = Dataset(unit.home, recipe)
        other.make()
        # A lone dataset elsewhere has no joint gallery.
        there = measures if _two(recipe) else measures.replace(joint=False)
        asked = {"recipe": recipe, **_asked(there)}
        values = _kept(unit, f"elsewhere-{name}", asked, lambda o=other, m=there: _evaluate(unit, m, seed, o))
        found |= {f"{name}.{key}": value for key, value in values.items()}
    if measures.settings:
        found |= _kept(unit, "robustness", {"settings": measures.settings}, lambda: _robustness(unit, measures, seed))
    if measures.analyses:
        asked = {"what": measures.analyses, "features": measures.features}
        found |= _kept(unit, "analyse", asked, lambda: _analyse(unit, measures, seed))
    if measures.interpret is not None:
        asked = measures.interpret.model_dump(mode="json")
        found |= _kept(unit, "interpret", asked, lambda: _interpret(unit, measures, seed))
    # The standard evaluation comes last: its tables are the ones that stay in the run.
    return found | _kept(unit, "evaluate", _asked(measures), lambda: _evaluate(unit, measures, seed, unit.dataset))


def _asked(measures: Measures) -> dict[str, Any]:
    """What decides the values of an evaluation; measured without `joint`, they are filed as before there was one."""
    joint = {"joint": True} if measures.joint else {}
    return {"query": measures.query, "rerank": measures.rerank, **joint}


def _kept(unit: Unit, kind: str, asked: Mapping[str, Any], compute: Any) -> Values:
    """Values from the file of an equal measurement, else computed and filed."""
    model = unit.run.require("finetune")["outputs"]["finetune/model.safetensors"]["sha256"]
    name = fingerprint({"format": _FORMAT, "kind": kind, "asked": dict(asked), "model": model}, {})[:12]
    path = unit.run.stage_dir("values") / f"{kind}-{name}.json"
    if path.is_file():
        values: Values = json.loads(path.read_text(encoding="utf-8"))
        return values
    values = compute()
    tables.write_text(path, json.dumps(values, indent=0) + "\n")
    return values


def _of_training(run: Run, trained: Mapping[str, Any]) -> Values:
    history = tables.read_table(run.table("finetune", "history"), "history")
    last = history.groupby("name", observed=True)["value"].last()
    found = {str(name).replace("/", "."): float(value) for name, value in last.items() if "weight/" in str(name)}
    said = ("pseudo/", "task_cosine")
    found |= {str(name).replace("/", "."): float(value) for name, value in last.items() if str(name).startswith(said)}
    found |= {f"train.{name}": float(trained[name]) for name in ("images_per_second", "parameters", "best_epoch")}
    # Trainings from before they were recorded have no seconds.
    found |= {"train.seconds": float(trained["training_seconds"])} if "training_seconds" in trained else {}
    prompts = trained.get("prompts")
    found |= {"prompt.seconds": float(prompts["seconds"])} if prompts else {}
    raised = {name: rule(history) is not None for name, rule in ALARMS.items()}
    return found | {f"alarm.{name}": float(is_on) for name, is_on in raised.items()}


def _evaluate(unit: Unit, measures: Measures, seed: int, dataset: Dataset) -> Values:
    from reidctl.stages import evaluate

    record = evaluate.run(
        unit.run,
        query=measures.query,
        rerank=measures.rerank,
        joint=measures.joint,
        seed=seed,
        data=dataset.folder,
        captions=dataset.captions,
    )
    shown = [facts for facts in record["tables"].values() if not facts["about"]]
    single = [facts for facts in shown if not (measures.joint and facts["dataset"] == JOINT)]
    every = {facts["dataset"] for facts in single}
    found: Values = {}
    for facts in shown:
        having = {other["dataset"] for other in single if other["direction"] == facts["direction"]}
        places = _places(facts["dataset"], every, having) if facts in single else [f"{JOINT}."]
        for where in places:
            for condition, metrics in facts["rows"].items():
                prefix = "" if condition == "standard" else f"{condition}."
                for metric, (value, _, _) in metrics.items():
                    found[f"{where}{prefix}{facts['direction']}.{metric}"] = float(value)
    return found


def _places(dataset: str, every: Collection[str], having: Collection[str]) -> list[str]:
    """What stands before the names of a dataset's values: nothing, unless several datasets were measured.

    Then it is the dataset; values that only one of them has, as of text queries where one has captions, keep their
    plain names too.
    """
    if len(every) == 1:
        return [""]
    return [f"{dataset}.", *([""] if len(having) == 1 else [])]


def _robustness(unit: Unit, measures: Measures, seed: int) -> Values:
    from reidctl.stages import robustness

    people = unit.dataset
    robustness.run(unit.run, settings=measures.settings, seed=seed, data=people.folder, captions=people.captions)
    frame = tables.read_table(unit.run.table("robustness", "robustness"), "robustness")
    every = set(frame["dataset"])
    found: Values = {}
    for (setting, direction, metric), measured in frame.groupby(["setting", "direction", "metric"], observed=True):
        for dataset, rows in measured.groupby("dataset", observed=True):
            # Several draws of a setting have a row for their mean, seed -1.
            row = rows[rows["seed"] == rows["seed"].min()].iloc[0]
            for where in _places(str(dataset), every, set(measured["dataset"])):
                name = f"{where}{setting}.{direction}.{metric}"
                parts = {name: row["value"], f"{name}.drop": row["drop"], f"{name}.ceiling": row["ceiling"]}
                found |= {key: float(value) for key, value in parts.items() if not pd.isna(value)}
    return found


def _analyse(unit: Unit, measures: Measures, seed: int) -> Values:
    from reidctl.stages import analyse

    people = unit.dataset
    record = analyse.run(
        unit.run,
        what=measures.analyses,
        lenient=True,  # a baseline without streams has no dependence between them
        features=measures.features,
        seed=seed,
        data=people.folder,
        captions=people.captions,
    )
    # The next analysis of this run replaces the files of this one.
    figures = unit.run.path / "figures"
    figures.mkdir(exist_ok=True)
    for name in record["outputs"]:
        if not name.endswith(".parquet"):
            shutil.copy2(unit.run.path / name, figures)
    return flatten(record["metrics"])


def _interpret(unit: Unit, measures: Measures, seed: int) -> Values:
    from reidctl.explain.explainers import applies
    from reidctl.methods.base import method_class
    from reidctl.stages import interpret

    asked = measures.interpret
    assert asked is not None
    method = method_class(str(unit.run.require("finetune")["method"]))
    explainers = [name for name in asked.explainers if name == "all" or applies(name, method)]
    if not explainers:
        return {}  # a method that has none of them; the default would be another one
    encoder = asked.encoder
    if encoder in ("start", "other-start"):
        encoder = _judging(unit, other=encoder == "other-start")
    people = unit.dataset
    record = interpret.run(
        unit.run,
        samples=asked.samples,
        explainer=explainers,
        what=asked.what,
        lenient=True,
        fractions=asked.fractions,
        fills=asked.fills,
        controls=asked.controls,
        level=asked.level,
        encoder=encoder,
        pictures=0,
        seed=seed,
        data=people.folder,
        captions=people.captions,
    )
    return flatten({"maps": record["metrics"]})


def _judging(unit: Unit, *, other: bool) -> str:
    """The run of the model that the training started from, or of one trained like it from the next seed.

    Raises:
        UsageError: the training did not start from a model.
    """
    if unit.start is None:
        raise UsageError("The encoder of `interpret` is a starting model, and the study has no `start`.")
    judge = unit.start
    if other:
        judge = replace(judge, recipe={**judge.recipe, "seed": int(judge.recipe["seed"]) + 1})
        judge.dataset.make()
        with locked(judge.run.path):
            judge.train()
    return str(judge.run.path)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Values:
    """Return nested numbers by dotted names; of `{value, low, high, ...}` the value has the bare name."""
    found: Values = {}
    for key, value in metrics.items():
        name = prefix if key == "value" and prefix else f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            found |= flatten(value, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; another study that wants it waits. The lock of a killed process is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what this process writes to stdout and stderr to a log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    console.configure()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, start=1):
            os.dup2(saved, number)
            os.close(saved)


def end_with_parent() -> None:
    """Make this worker end when the study's process is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
