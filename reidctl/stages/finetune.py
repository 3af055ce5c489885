"""`finetune`: train a retrieval model; the epoch is chosen on validation people."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import tables
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
from reidctl.training.state import kept_epochs

STAGE = "finetune"


def run(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Train a method on a dataset and write model, history and record.

    Args:
        run: where the stage writes.
        recipe: sections `method`, `backbone`, `train`, `prompt`, `data` and `seed` are read.
        method: a method or preset name; wins over the recipe's.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        device: wins over `train.device`.
        force: train again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.

    Raises:
        DataError: the method builds on a prompt stage that has not finished, or was run with other settings.
    """
    recipe = building.resolve(recipe, method)
    checked = building.check(recipe)
    name, towers, handling = checked.name, checked.towers, checked.handling
    training = checked.training if device is None else checked.training.replace(device=device)
    target = resolve_device(training.device)
    source = find_source(run, data, captions)
    seed = int(recipe.get("seed", 0))
    resolved = {
        "seed": seed,
        "method": {"name": name, **checked.method.model_dump()},
        # Where the starting run lies does not matter, what it learnt does: `inputs` has its digest.
        "backbone": building.towers_that_matter(towers),
        # What cannot change the weights does not make a training another one.
        "train": building.what_matters(training),
        "device": target.type,
        # Only where it is used: runs from before it existed stay up to date.
        **building.where_used(handling),
        **building.phrase_settings(checked),
    }
    inputs = source.digests() | building.start_digest(towers) | building.phrase_digest(checked)
    images = tables.read_table(source.images, "images")
    check_datasets(images, handling.datasets)
    prompts = _prompts(run, checked, source)
    if prompts is not None:
        inputs["prompts"] = digest(prompt_stage.prompts_file(prompts))
    # Before asking whether anything changed: a stricter check must not be skipped.
    notes = guard(images, handling.leak_check)
    current = None if force else run.up_to_date(STAGE, resolved, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    corpus = building.corpus_of(source, handling, seed)
    train = training_part(corpus.of_split("train"), handling.part)
    chosen = corpus.of_split(training.select)
    model = building.build_model(train, checked, training, seed)
    building.require_losses(model, STAGE)
    phrases = building.find_phrases(run, source, checked.phrases) if model.reads_phrases else None
    samples = building.training_set(train, model, training, seed, phrases)
    building.require_batches(samples, training, seed)
    if prompts is not None:
        prompt_stage.hand_over(prompts, model, samples.persons)
    # Whatever the settings can be wrong about has been looked at; only now does the old result go.
    run.unfinish(STAGE)
    folder = run.stage_dir(STAGE)
    if force:
        (folder / "last" / "state.pt").unlink(missing_ok=True)
    fresh = fingerprint(resolved, inputs)
    outcome = _train(model, samples, chosen, training, folder, seed, fresh)
    history = folder / "history.parquet"
    tables.write_table(history, "history", outcome.history)
    seen = run.table(STAGE, "seen")
    tables.write_table(seen, "seen", _seen(train.images, source, towers.start))
    # Kept epochs are no outputs: whoever deletes them to win space must not train again.
    kept = kept_epochs(folder, fresh)
    outputs = [*save_method(model.cpu(), folder), history, seen]
    raised = alarms(outcome.history)
    for alarm in raised:
        log.warning(alarm)
    record = run.finish(
        STAGE,
        settings=resolved,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics={f"{training.select}.{training.select_metric}": outcome.best_value},
        extra={
            "data": str(source.folder.resolve()),
            "described": str(source.described.resolve()) if source.described else None,
            "method": name,
            "train_people": model.persons,
            "start": building.start_path(towers),
            "prompts": _told(prompts),
            "notes": notes,
            "best_epoch": outcome.best_epoch + 1,
            "epochs": training.epochs,
            "selected_on": training.select,
            "select_metric": training.select_metric,
            "kept_epochs": sorted(kept),
            "kept_bytes": sum(path.stat().st_size for path in kept.values()),
            "images_per_second": round(outcome.images_per_second, 1),
            # The loader alone and the step alone: which of the two training waits for.
            "loader_images_per_second": building.last_value(outcome.history, "loader_images_per_second"),
            "step_images_per_second": building.last_value(outcome.history, "step_images_per_second"),
            "resumed_from_epoch": outcome.resumed_from,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **({"alarms": raised} if prompts is not None or raised else {}),
            "training_seconds": round(outcome.seconds, 3),
            **model.training_facts(),
        },
    )
    return {**record, "status": "done"}


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


def _train(
    model: Method, samples: TrainingSet, chosen: Corpus, training: TrainConfig, folder: Path, seed: int, digest: str
) -> Outcome:
    if training.select == "test":
        log.warning("The epoch is chosen on the TEST split: the result is not a test of anything unseen.")
    store = PixelStore(
        chosen.paths(),
        model.backbone.image_size,
        cache_bytes=training.cache_mb << 20,
        interpolation=model.backbone.interpolation,
    )
    validate = _validation(chosen, store, resolve_device(training.device))
    return Trainer(model, samples, validate, training, folder, seed=seed, stage=STAGE, fingerprint=digest).run()


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
