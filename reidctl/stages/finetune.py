"""`finetune`: train a retrieval model; the epoch is chosen on validation people."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import parallel, tables
from reidctl.console import log
from reidctl.data import Corpus, TrainingSet, camera_names, check_datasets, training_part
from reidctl.datasets.leaks import guard, seen_table
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery_tasks, embed_queries
from reidctl.errors import DataError
from reidctl.evaluation.alarms import alarms
from reidctl.methods.base import Method, save_method
from reidctl.metrics import QueryMetrics
from reidctl.pixels import PixelStore
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.runs import Run, digest, fingerprint
from reidctl.stages import building, prompt_stage
from reidctl.stages.building import Settings
from reidctl.stages.sources import Source, find_source
from reidctl.training.config import TrainConfig
from reidctl.training.loop import Outcome, Trainer, Validate
from reidctl.training.state import kept_epochs, require_state
from reidctl.training.tracking import require_trackers

STAGE = "finetune"


@dataclass(frozen=True)
class Prepared:
    """A training whose settings and inputs were looked at; nothing has been loaded or written.

    Attributes:
        resolved: the settings that decide what it leaves, for the record.
        inputs: digests of what it reads.
        target: the device.
        prompts: the run whose prompt stage it builds on.
        notes: of the leak check.
    """

    run: Run
    checked: Settings
    training: TrainConfig
    target: torch.device
    source: Source
    seed: int
    resolved: dict[str, Any]
    inputs: dict[str, str]
    prompts: Run | None
    notes: list[str]

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return self.run.stage_dir(STAGE)

    @property
    def fingerprint(self) -> str:
        """Of settings and inputs."""
        return fingerprint(self.resolved, self.inputs)


@dataclass(frozen=True)
class Loaded:
    """The untrained model on its starting weights, its training set, and the split that chooses the epoch."""

    model: Method
    samples: TrainingSet
    train: Corpus
    chosen: Corpus


def prepare(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
) -> Prepared:
    """Return a training as the settings ask for it; see `run`.

    Raises:
        UsageError: a setting is wrong.
        DataError: the data leak, or the method builds on a prompt stage that has not finished or ran otherwise.
    """
    recipe = building.resolve(recipe, method)
    checked = building.check(recipe)
    run.check_writable()
    training = checked.training if device is None else checked.training.replace(device=device)
    require_trackers(training)
    target = resolve_device(training.device)
    source = find_source(run, data, captions)
    seed = int(recipe.get("seed", 0))
    resolved = {
        "seed": seed,
        "method": {"name": checked.name, **checked.method.model_dump()},
        # Where the starting run lies does not matter, what it learnt does: `inputs` has its digest.
        "backbone": building.towers_that_matter(checked.towers),
        # What cannot change the weights does not make a training another one.
        "train": building.what_matters(training),
        "device": target.type,
        # Only where it is used: runs from before it existed stay up to date.
        **building.where_used(checked.handling),
        **building.phrase_settings(checked),
    }
    inputs = source.digests() | building.start_digest(checked.towers) | building.phrase_digest(checked)
    images = tables.read_table(source.images, "images")
    check_datasets(images, checked.handling.datasets)
    prompts = _prompts(run, checked, source)
    if prompts is not None:
        inputs["prompts"] = digest(prompt_stage.prompts_file(prompts))
    # Before asking whether anything changed: a stricter check must not be skipped.
    notes = guard(images, checked.handling.leak_check)
    return Prepared(run, checked, training, target, source, seed, resolved, inputs, prompts, notes)


def load(asked: Prepared) -> Loaded:
    """Return the model and what it trains on.

    Raises:
        UsageError: the settings contradict each other or the data.
        DataError: too few people, a text that the method needs is missing, ...
    """
    checked, training, seed = asked.checked, asked.training, asked.seed
    corpus = building.corpus_of(asked.source, checked.handling, seed)
    train = training_part(corpus.of_split("train"), checked.handling.part)
    chosen = corpus.of_split(training.select)
    model = building.build_model(train, checked, training, seed)
    building.require_losses(model, STAGE)
    building.require_trainable(model, STAGE, training)
    # The first process finds phrases and keeps them; the others read what it kept.
    with parallel.first_then_others():
        phrases = building.find_phrases(asked.run, asked.source, checked.phrases) if model.reads_phrases else None
        samples = building.training_set(train, model, training, seed, phrases)
    building.require_batches(samples, training, seed)
    if asked.prompts is not None:
        prompt_stage.hand_over(asked.prompts, model, samples.persons)
    return Loaded(model, samples, train, chosen)


def run(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
    force: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a method on a dataset and write model, history and record.

    Under torchrun, Slurm or `--devices` every process calls it; the first one writes, and all return the record.

    Args:
        run: where the stage writes.
        recipe: sections `method`, `backbone`, `train`, `prompt`, `data` and `seed` are read.
        method: a method or preset name; wins over the recipe's.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        device: wins over `train.device`.
        force: train again even if nothing changed.
        resume: refuse to begin anew: a training that was stopped must be there.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.

    Raises:
        DataError: the method builds on a prompt stage that has not finished, or was run with other settings; or there
            is nothing to resume.
    """
    asked = prepare(run, recipe, method=method, data=data, captions=captions, device=device)
    with parallel.joined(asked.target.type):
        current = parallel.first_does(lambda: None if force else run.up_to_date(STAGE, asked.resolved, asked.inputs))
        if current is not None:
            return {**current, "status": "up-to-date"}
        if resume:
            require_state(asked.folder / "last" / "state.pt", asked.fingerprint)
        started = datetime.now(UTC)
        loaded = load(asked)
        with ExitStack() as held:

            def clear() -> None:
                held.enter_context(run.locked(STAGE))
                _clear(asked, force)

            parallel.first_does(clear)
            outcome = _train(asked, loaded)
            record = parallel.first_does(lambda: _finish(asked, loaded, outcome, started))
    return {**record, "status": "done"}


def _clear(asked: Prepared, force: bool) -> None:
    """Whatever the settings can be wrong about has been looked at; only now does the old result go."""
    asked.run.unfinish(STAGE)
    if force:
        (asked.folder / "last" / "state.pt").unlink(missing_ok=True)


def _finish(asked: Prepared, loaded: Loaded, outcome: Outcome, started: datetime) -> dict[str, Any]:
    """Write what the training leaves; return its record."""
    training, checked, source, folder = asked.training, asked.checked, asked.source, asked.folder
    model = loaded.model
    history = folder / "history.parquet"
    tables.write_table(history, "history", outcome.history)
    seen = asked.run.table(STAGE, "seen")
    tables.write_table(seen, "seen", _seen(loaded.train.images, source, checked.towers.start))
    # Kept epochs are no outputs: whoever deletes them to win space must not train again.
    kept = kept_epochs(folder, asked.fingerprint)
    outputs = [*save_method(model.cpu(), folder), history, seen]
    raised = alarms(outcome.history)
    for alarm in raised:
        log.warning(alarm)
    return asked.run.finish(
        STAGE,
        settings=asked.resolved,
        inputs=asked.inputs,
        outputs=outputs,
        started=started,
        device=str(asked.target),
        metrics={f"{training.select}.{training.select_metric}": outcome.best_value},
        extra={
            "data": str(source.folder.resolve()),
            "described": str(source.described.resolve()) if source.described else None,
            "method": checked.name,
            "train_people": model.persons,
            "start": building.start_path(checked.towers),
            **building.start_facts(checked.towers),
            "prompts": _told(asked.prompts),
            "notes": asked.notes,
            "best_epoch": outcome.best_epoch + 1,
            "epochs": training.epochs,
            "stopped_early": outcome.stopped,
            "selected_on": training.select,
            "select_metric": training.select_metric,
            "kept_epochs": sorted(kept),
            "kept_bytes": sum(path.stat().st_size for path in kept.values()),
            **building.speed_facts(outcome),
            "resumed_from_epoch": outcome.resumed_from,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **({"alarms": raised} if asked.prompts is not None or raised else {}),
            "training_seconds": round(outcome.seconds, 3),
            **model.training_facts(),
        },
    )


def _prompts(run: Run, checked: Settings, source: Source) -> Run | None:
    """The run whose prompt stage this training builds on; None for methods and settings without one."""
    if not checked.method.needs_prompt_stage:
        return None
    where = run if checked.prompts.use is None else Run(checked.prompts.use)
    prompt_stage.require(where, checked, source)
    return where


def _told(prompts: Run | None) -> dict[str, Any] | None:
    """What a record says of the prompt stage."""
    if prompts is None:
        return None
    record = prompts.require(prompt_stage.STAGE)
    return {"run": str(prompts.path.resolve()), **{name: record[name] for name in ("training_seconds", "seconds")}}


def _train(asked: Prepared, loaded: Loaded) -> Outcome:
    training = asked.training
    if training.select == "test":
        log.warning("The epoch is chosen on the TEST split: the result is not a test of anything unseen.")
    trainer = Trainer(
        loaded.model,
        loaded.samples,
        validation(loaded, training),
        training,
        asked.folder,
        seed=asked.seed,
        stage=STAGE,
        fingerprint=asked.fingerprint,
    )
    return trainer.run()


def validation(loaded: Loaded, training: TrainConfig) -> Validate:
    """Return what measures a model on the split that chooses the epoch."""
    backbone = loaded.model.backbone
    store = PixelStore(
        loaded.chosen.paths(),
        backbone.image_size,
        cache_bytes=training.cache_mb << 20,
        interpolation=backbone.interpolation,
    )
    return _validation(loaded.chosen, store, parallel.own_device(resolve_device(training.device)))


def _seen(train: pd.DataFrame, source: Source, start: Path | None) -> pd.DataFrame:
    """Digests of people and files that the model saw here or in the run that it started from."""
    mine = seen_table(train, source.person_digests(train)["digest"])
    if start is None:
        return mine
    before = tables.read_table(Run(start).table(STAGE, "seen"), "seen")
    return pd.concat([mine, before], ignore_index=True).drop_duplicates(ignore_index=True)


def _validation(corpus: Corpus, store: PixelStore, device: torch.device) -> Validate:
    """Rank-1, mAP of text-to-image retrieval on a split; image-to-image when the split has no captions.

    `rank1` and `mAP` choose the epoch. Where both directions can be measured, `i2i.rank1` and `i2i.mAP` of the image
    vectors of that task, from the same forward pass, stand beside them, so that one task cannot quietly pay for the
    other. A method that `selects_by` image to image is measured by that alone; all datasets are one gallery then.
    """
    people = corpus.images["person_id"].to_numpy()
    texts = [str(text) for text in corpus.captions["text"]]
    owners = people[corpus.captions["row"].to_numpy(int)] if texts else people

    def validate(method: Method) -> dict[str, float]:
        gallery = embed_gallery_tasks(method, corpus, device=device, store=store)
        image = _image_to_image(corpus, gallery["i2i"], always=method.selects_by == "i2i")
        found = image
        by_image = method.selects_by == "i2i" and image is not None and bool(image.scored)
        if texts and not by_image:
            queries = embed_queries(method, texts, device=device)
            found = evaluate_ranking(queries, gallery["t2i"], query_person=owners, gallery_person=people, top=0).queries
        if found is None or not found.scored:
            raise DataError(
                "No query of the split that chooses the epoch has a match, so no epoch can be chosen.",
                hint="It needs captions, or query and gallery roles with several cameras per person.",
            )
        both = {"i2i.": image} if texts and not by_image and image is not None and image.scored else {}
        return {
            f"{prefix}{name}": part.means()[name]
            for prefix, part in ({"": found} | both).items()
            for name in ("rank1", "mAP")
        }

    return validate


def _image_to_image(corpus: Corpus, vectors: npt.NDArray[np.float32], *, always: bool = False) -> QueryMetrics | None:
    """Image-to-image metrics of all datasets in one gallery, by role or, where a dataset has no roles, of every image.

    Matches by the query's own camera do not count; cameras of two datasets are different ones. None if that leaves no
    query or no gallery; with `always` every image is then asked for all others of its person.
    """
    images = corpus.images
    people, cameras = images["person_id"].to_numpy(), camera_names(images)
    known = images["camera_id"].notna().groupby(images["dataset"], observed=True).transform("all").to_numpy()
    without = images["role"].isna().groupby(images["dataset"], observed=True).transform("all").to_numpy() & known
    query, gallery = ((images["role"] == role).to_numpy() | without for role in ("query", "gallery"))
    if query.any() and gallery.any():
        return evaluate_ranking(
            vectors[query],
            vectors[gallery],
            query_person=people[query],
            gallery_person=people[gallery],
            query_camera=cameras[query],
            gallery_camera=cameras[gallery],
            exclude="same_camera",
            top=0,
        ).queries
    if not always:
        return None
    names = images["image_id"].to_numpy()
    return evaluate_ranking(
        vectors,
        vectors,
        query_person=people,
        gallery_person=people,
        query_id=names,
        gallery_id=names,
        exclude="same_item",
        top=0,
    ).queries
