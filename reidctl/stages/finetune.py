"""`finetune`: train a retrieval model; the epoch is chosen on validation people."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field

from reidctl import tables
from reidctl.backbones.base import Backbone
from reidctl.backbones.statistics import check_statistics
from reidctl.backbones.weights import build
from reidctl.config import Section, load_recipe, merge, parse_section, recipe_names
from reidctl.console import log
from reidctl.data import Corpus, TrainingSet
from reidctl.datasets.leaks import guard, seen_table
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import (
    Method,
    MethodConfig,
    build_method,
    load_method,
    method_class,
    method_names,
    save_method,
)
from reidctl.metrics import QueryMetrics
from reidctl.pixels import PixelStore
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.runs import Run, digest, fingerprint
from reidctl.stages.noise import exchange_descriptions
from reidctl.stages.sources import DataSettings, Source, find_source
from reidctl.training import Outcome, TrainConfig, Trainer, Validate, kept_epochs

STAGE = "finetune"


class BackboneSettings(Section):
    """Which towers to start from."""

    spec: str
    """`clip:<open_clip name>/<tag, hub id or path>`, `vit-bert:<hub id or path>+<hub id or path>`, `clip:tiny`, ..."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels; None: the checkpoint's own."""
    text_length: int | None = Field(None, ge=8, le=1024)
    """Most tokens of a text; None: the checkpoint's own (77 for CLIP). Longer texts lose their end."""
    pixel_statistics: Literal["checkpoint", "clip", "imagenet", "half"] = "checkpoint"
    """What pixels are normalised with. They belong to the checkpoint; others are allowed and warned about."""
    grad_checkpointing: bool = False
    start: Path | None = None
    """A run: its trained towers are the starting weights. `spec` and sizes must be those of that training, and whom it
    saw counts as seen by this one."""


def resolve(recipe: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Return the recipe with the method's shipped preset underneath.

    `method` is a method or the name of a shipped recipe (`bdam-icme`); the recipe's own `method.name` is used when it
    is None. Settings of the recipe win over the preset's.

    Raises:
        UsageError: no method was named, or there is none of that name.
    """
    named = method or dict(recipe.get("method") or {}).get("name")
    if named is None:
        known = ", ".join(name for name in recipe_names() if not name.endswith("quickstart"))
        raise UsageError("No method was named.", hint=f"Use --method with one of: {known}.")
    own = dict(recipe.get("method") or {})
    if named in recipe_names() and (method is not None or "backbone" not in recipe):
        preset = load_recipe(named)
    elif named in method_names():
        preset = {}
    else:
        raise UsageError(f"Unknown method `{named}`.", hint=f"One of: {', '.join(recipe_names())}.")
    chosen = dict(preset.get("method") or {}).get("name", named)
    if method is not None and own.get("name") not in (None, chosen, method):
        # A recipe written for another method brings its data and training settings, not its model's.
        recipe = {name: value for name, value in recipe.items() if name not in ("method", "backbone")}
    merged = merge(preset, recipe)
    merged["method"] = {**merged.get("method", {}), "name": chosen}
    return merged


@dataclass(frozen=True)
class Settings:
    """A resolved recipe, checked.

    Attributes:
        name: of the method.
        method, training, towers, handling: the sections `method`, `train`, `backbone` and `data`.
    """

    name: str
    method: MethodConfig
    training: TrainConfig
    towers: BackboneSettings
    handling: DataSettings


def check(recipe: Mapping[str, Any]) -> Settings:
    """Return the settings of a resolved recipe, or refuse what no training takes, before anything is loaded.

    Raises:
        UsageError: an unknown setting or a wrong value in `method`, `backbone`, `train` or `data`.
    """
    settings = dict(recipe["method"])
    name = settings.pop("name")
    return Settings(
        name,
        parse_section(method_class(name).Config, settings, "method"),
        parse_section(TrainConfig, recipe.get("train"), "train"),
        parse_section(BackboneSettings, recipe.get("backbone"), "backbone"),
        parse_section(DataSettings, recipe.get("data"), "data"),
    )


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
        recipe: sections `method`, `backbone`, `train`, `data` and `seed` are read.
        method: a method or preset name; wins over the recipe's.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        device: wins over `train.device`.
        force: train again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.
    """
    recipe = resolve(recipe, method)
    checked = check(recipe)
    name, towers, handling = checked.name, checked.towers, checked.handling
    training = checked.training if device is None else checked.training.replace(device=device)
    target = resolve_device(training.device)
    source = find_source(run, data, captions)
    seed = int(recipe.get("seed", 0))
    resolved = {
        "seed": seed,
        "method": {"name": name, **checked.method.model_dump()},
        # Where the starting run lies does not matter, what it learnt does: `inputs` has its digest.
        "backbone": towers.model_dump(exclude={"start"}),
        # What cannot change the weights does not make a training another one.
        "train": _what_matters(training),
        "device": target.type,
        # Only where it is used: runs from before it existed stay up to date.
        **({"description_noise": handling.description_noise} if handling.description_noise else {}),
    }
    inputs = source.digests()
    if towers.start is not None:
        inputs["start"] = digest(start_folder(towers.start) / "model.safetensors")
    # Before asking whether anything changed: a stricter check must not be skipped.
    notes = guard(tables.read_table(source.images, "images"), handling.leak_check)
    current = None if force else run.up_to_date(STAGE, resolved, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    corpus = exchange_descriptions(source.corpus(), handling.description_noise, seed=seed)
    run.unfinish(STAGE)
    folder = run.stage_dir(STAGE)
    if force:
        (folder / "last" / "state.pt").unlink(missing_ok=True)
    fresh = fingerprint(resolved, inputs)
    model, outcome = _train(corpus, checked, training, folder, seed, fresh)
    history = folder / "history.parquet"
    tables.write_table(history, "history", outcome.history)
    seen = run.table(STAGE, "seen")
    train = corpus.of_split("train").images
    tables.write_table(seen, "seen", _seen(train, source, towers.start))
    # Kept epochs are no outputs: whoever deletes them to win space must not train again.
    kept = kept_epochs(folder, fresh)
    outputs = [*save_method(model.cpu(), folder), history, seen]
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
            "start": str(towers.start.resolve()) if towers.start else None,
            "notes": notes,
            "best_epoch": outcome.best_epoch + 1,
            "epochs": training.epochs,
            "selected_on": training.select,
            "select_metric": training.select_metric,
            "kept_epochs": sorted(kept),
            "kept_bytes": sum(path.stat().st_size for path in kept.values()),
            "images_per_second": round(outcome.images_per_second, 1),
            # The loader alone and the step alone: which of the two training waits for.
            "loader_images_per_second": _last(outcome.history, "loader_images_per_second"),
            "step_images_per_second": _last(outcome.history, "step_images_per_second"),
            "resumed_from_epoch": outcome.resumed_from,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **model.training_facts(),
        },
    )
    return {**record, "status": "done"}


def _what_matters(training: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a training leaves; `keep_epochs` only where it is used, as it is a later one."""
    unused = set() if training.keep_epochs else {"keep_epochs"}
    return training.model_dump(exclude={"device", "workers", "cache_mb", "log_every", *unused})


def _train(
    corpus: Corpus,
    checked: Settings,
    training: TrainConfig,
    folder: Path,
    seed: int,
    digest: str,
) -> tuple[Method, Outcome]:
    name, towers = checked.name, checked.towers
    # The starting weights depend on the seed alone, not on what ran before in this process.
    torch.manual_seed(seed)
    backbone = _starting_towers(towers)
    backbone.set_grad_checkpointing(towers.grad_checkpointing)
    _prepare_images(backbone, towers, training)
    train = corpus.of_split("train")
    chosen = corpus.of_split(training.select)
    if training.select == "test":
        log.warning("The epoch is chosen on the TEST split: the result is not a test of anything unseen.")
    model = build_method(name, checked.method.model_dump(), backbone, train.images["person_id"].nunique())
    _check_sampler(model, training.sampler)
    samples = TrainingSet(
        train,
        size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        tokenize=backbone.tokenize,
        texts=model.train_texts,
        target=model.target_text,
        augment=training.augment,
        interpolation=backbone.interpolation,
        seed=seed,
        cache_bytes=training.cache_mb << 20,
        shuffle_labels=training.shuffle_labels,
        caption_free=training.sampler == "mixed",
    )
    cut = backbone.truncation_rate([str(text) for text in train.captions["text"]])
    log.info(
        f"{name}: {len(samples)} samples of {len(samples.persons)} people, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {100 * cut:.1f} % of captions are cut "
        f"at {backbone.context_length} tokens"
    )
    store = PixelStore(
        chosen.paths(),
        backbone.image_size,
        cache_bytes=training.cache_mb << 20,
        interpolation=backbone.interpolation,
    )
    validate = _validation(chosen, store, resolve_device(training.device))
    trainer = Trainer(model, samples, validate, training, folder, seed=seed, stage=STAGE, fingerprint=digest)
    return model, trainer.run()


def start_folder(start: Path) -> Path:
    """Return where a starting run keeps its model.

    Raises:
        DataError: it has no finished training.
    """
    run = Run(start)
    run.require("finetune")
    return run.stage_dir("finetune")


def _starting_towers(towers: BackboneSettings) -> Backbone:
    """The towers that `spec` names, with its weights or with those that the starting run learnt.

    Raises:
        UsageError: the starting run has other towers or sizes than this one asks for.
    """
    if towers.start is None:
        return build(towers.spec, image_size=towers.image_size, text_length=towers.text_length)
    backbone = load_method(start_folder(towers.start)).backbone
    for name, asked, found in (
        ("spec", towers.spec, backbone.config.spec),
        ("image_size", towers.image_size, backbone.image_size),
        ("text_length", towers.text_length, backbone.context_length),
    ):
        if asked is not None and asked != found:
            raise UsageError(
                f"`backbone.start` {towers.start} was trained with backbone.{name} {found}, this recipe has {asked}.",
                hint="Use the same, or another run to start from.",
            )
    return backbone


def _seen(train: pd.DataFrame, source: Source, start: Path | None) -> pd.DataFrame:
    """Digests of people and files that the model saw here or in the run that it started from."""
    mine = seen_table(train, source.person_digests(train)["digest"])
    if start is None:
        return mine
    before = tables.read_table(Run(start).table(STAGE, "seen"), "seen")
    return pd.concat([mine, before], ignore_index=True).drop_duplicates(ignore_index=True)


def _last(history: pd.DataFrame, name: str) -> float | None:
    values = history.loc[history["name"] == name, "value"]
    return round(float(values.iloc[-1]), 1) if len(values) else None


def _prepare_images(backbone: Backbone, towers: BackboneSettings, training: TrainConfig) -> None:
    """One preprocessing for training, index and search, whatever was chosen: it is saved with the model."""
    mean, std, warning = check_statistics(backbone.mean, backbone.std, towers.pixel_statistics)
    if warning:
        log.warning(warning)
    backbone.prepare_images(mean=mean, std=std, interpolation=training.augment.interpolation)


def _check_sampler(model: Method, sampler: str) -> None:
    if sampler == "mixed" and not model.learns_without_text:
        able = [name for name in method_names() if method_class(name).learns_without_text]
        raise UsageError(
            f"`{model.name}` learns nothing from images without a caption, so `train.sampler: mixed` is not for it.",
            hint=f"Methods that do: {', '.join(able)}. Or give the images captions.",
        )


def _validation(corpus: Corpus, store: PixelStore, device: torch.device) -> Validate:
    """Rank-1, mAP of text-to-image retrieval on a split; image-to-image when the split has no captions.

    `rank1` and `mAP` choose the epoch. Where both directions can be measured, `i2i.rank1` and `i2i.mAP` of the same
    image vectors stand beside them, so that one task cannot quietly pay for the other.
    """
    people = corpus.images["person_id"].to_numpy()
    texts = [str(text) for text in corpus.captions["text"]]
    owners = people[corpus.captions["row"].to_numpy(int)] if texts else people

    def validate(method: Method) -> dict[str, float]:
        gallery = embed_gallery(method, corpus, device=device, store=store)
        image = _image_to_image(corpus, gallery)
        found = image
        if texts:
            queries = embed_queries(method, texts, device=device)
            found = evaluate_ranking(queries, gallery, query_person=owners, gallery_person=people, top=0).queries
        if found is None or not found.scored:
            raise DataError(
                "No query of the split that chooses the epoch has a match, so no epoch can be chosen.",
                hint="It needs captions, or query and gallery roles with several cameras per person.",
            )
        both = {"i2i.": image} if texts and image is not None and image.scored else {}
        return {
            f"{prefix}{name}": part.means()[name]
            for prefix, part in ({"": found} | both).items()
            for name in ("rank1", "mAP")
        }

    return validate


def _image_to_image(corpus: Corpus, vectors: npt.NDArray[np.float32]) -> QueryMetrics | None:
    """Image-to-image metrics under other cameras, by role or, without roles, of every image; None if neither goes."""
    people, cameras = corpus.images["person_id"].to_numpy(), corpus.images["camera_id"].to_numpy()
    query, gallery = ((corpus.images["role"] == role).to_numpy() for role in ("query", "gallery"))
    if corpus.images["role"].isna().all() and corpus.images["camera_id"].notna().all():
        query = gallery = np.ones(len(people), bool)
    if not query.any() or not gallery.any():
        return None
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
