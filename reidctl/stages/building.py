"""What `finetune` and `prompt-stage` share: recipes, settings, starting weights, the model and its training set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field

from reidctl import parallel, tables
from reidctl.backbones.base import Backbone
from reidctl.backbones.statistics import check_statistics
from reidctl.backbones.weights import build
from reidctl.config import Section, load_recipe, merge, parse_section, recipe_names
from reidctl.console import log
from reidctl.data import Corpus, TrainingSet, datasets_part, roster_of
from reidctl.errors import UsageError
from reidctl.methods.base import Method, MethodConfig, build_method, load_method, method_class, method_names
from reidctl.phrases.base import PhraseConfig, PhraseSource
from reidctl.runs import Run, digest
from reidctl.stages.noise import degrade_captions, exchange_descriptions
from reidctl.stages.phrases import phrase_source
from reidctl.stages.sources import DataSettings, Source
from reidctl.training.batches import epoch_batches
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.loop import Outcome
from reidctl.training.optimizer import require_groups
from reidctl.training.sharding import require_shardable


class BackboneSettings(Section):
    """Which towers to start from."""

    spec: str
    """`clip:<open_clip name>/<tag, hub id or path>`, `vit-bert:<hub id or path>+<hub id or path>`, `clip:tiny`, ..."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels; None: the checkpoint's own."""
    stride: int | None = Field(None, ge=1)
    """Step between patches in pixels: 12 with patches of 16 overlaps them, as in TransReID; None: the patch size."""
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
        method, training, prompts, towers, handling, phrases: the sections `method`, `train`, `prompt`, `backbone`,
            `data` and `phrases`.
    """

    name: str
    method: MethodConfig
    training: TrainConfig
    prompts: PromptConfig
    towers: BackboneSettings
    handling: DataSettings
    phrases: PhraseConfig


def check(recipe: Mapping[str, Any]) -> Settings:
    """Return the settings of a resolved recipe, or refuse what no training takes, before anything is loaded.

    Raises:
        UsageError: an unknown setting or a wrong value in `method`, `backbone`, `train`, `prompt`, `data` or `phrases`.
    """
    settings = dict(recipe["method"])
    name = settings.pop("name")
    return Settings(
        name,
        parse_section(method_class(name).Config, settings, "method"),
        parse_section(TrainConfig, recipe.get("train"), "train"),
        parse_section(PromptConfig, recipe.get("prompt"), "prompt"),
        parse_section(BackboneSettings, recipe.get("backbone"), "backbone"),
        parse_section(DataSettings, recipe.get("data"), "data"),
        parse_section(PhraseConfig, recipe.get("phrases"), "phrases"),
    )


def what_matters(training: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a training leaves; later ones only where they are used."""
    unused = set() if training.keep_epochs else {"keep_epochs"}
    unused |= {"lr_prompt"} if training.lr_prompt is None else set()
    # Younger than finished runs: they stay up to date.
    unused |= {name for name in _YOUNG if getattr(training, name) == TrainConfig.model_fields[name].default}
    return training.model_dump(exclude={*_HOW, *unused})


_YOUNG = (
    "decay_biases",
    "final_factor",
    "cosine_over",
    "first_epoch",
    "groups",
    "accumulate",
    "ema",
    "patience",
    "fused",
)
# Where and how fast, not what: a training goes on on another machine, or with other of these settings.
_HOW = ("device", "workers", "cache_mb", "log_every", "cache", "use", "compile", "channels_last", "parallel",
        "save_steps", "tensorboard", "wandb")  # fmt: skip


def towers_that_matter(towers: BackboneSettings) -> dict[str, Any]:
    """The settings of `backbone` that decide what a training leaves; where the starting run lies does not."""
    return towers.model_dump(exclude={"start", *(("stride",) if towers.stride is None else ())})


def where_used(handling: DataSettings) -> dict[str, Any]:
    """The settings of `data` that decide what a training leaves, where they are used at all."""
    used: dict[str, Any] = {}
    if handling.description_noise:
        used["description_noise"] = handling.description_noise
    if handling.caption_noise:
        used |= {"caption_noise": handling.caption_noise, "caption_noise_kind": handling.caption_noise_kind}
    if handling.part != "all":
        used["part"] = handling.part
    if handling.datasets:
        used["datasets"] = sorted(handling.datasets)
    return used


def phrase_settings(checked: Settings) -> dict[str, Any]:
    """The settings of `phrases`, for methods that read phrases; the rest of their backend is left out."""
    if not method_class(checked.name).reads_phrases:
        return {}
    return {
        "phrases": checked.phrases.model_dump(mode="json", exclude_defaults=True) | {"backend": checked.phrases.backend}
    }


def phrase_digest(checked: Settings) -> dict[str, str]:
    """Return the digest of ready phrases by the name `phrases`, where a method reads them from a file."""
    path = checked.phrases.file
    return {"phrases": digest(path)} if path is not None and method_class(checked.name).reads_phrases else {}


def find_phrases(run: Run, source: Source | None, config: PhraseConfig) -> PhraseSource:
    """Return what finds the phrases of captions as `config` says; answers of slow backends are kept in the run.

    Without a dataset nothing is `given`; phrases are then found by the rules, as for every text that has none.
    """
    captions = None
    if config.backend == "given":
        known = source is not None and source.captions.is_file()
        captions = tables.read_table(source.captions, "captions") if source and known else tables.empty("captions")
    return phrase_source(config, cache=run.path / "phrases" / "cache.jsonl", captions=captions)


def give_phrases(run: Run, source: Source | None, method: Method) -> None:
    """Let a trained method that reads phrases find those of new texts as in its training."""
    if method.reads_phrases:
        saved = dict(run.require("finetune")["settings"].get("phrases") or {})
        method.phrase_source = find_phrases(run, source, parse_section(PhraseConfig, saved, "phrases"))


def corpus_of(source: Source, handling: DataSettings, seed: int) -> Corpus:
    """Return the images and texts of the datasets asked for, with the texts exchanged that the settings ask for."""
    corpus = datasets_part(source.corpus(), handling.datasets)
    corpus = exchange_descriptions(corpus, handling.description_noise, seed=seed)
    return degrade_captions(corpus, handling.caption_noise_kind, handling.caption_noise, seed=seed)


def build_model(train: Corpus, checked: Settings, training: TrainConfig, seed: int) -> Method:
    """Return the untrained method for the people of a training split, on its starting weights."""
    towers = checked.towers
    # The starting weights depend on the seed alone, not on what ran before in this process.
    torch.manual_seed(seed)
    backbone = _starting_towers(towers)
    backbone.set_grad_checkpointing(towers.grad_checkpointing)
    _prepare_images(backbone, towers, training)
    persons = int(train.images["person_id"].nunique())
    model = build_method(checked.name, checked.method.model_dump(), backbone, persons, roster_of(train.images))
    _check_sampler(model, training.sampler)
    return model


def training_set(
    train: Corpus, model: Method, training: TrainConfig, seed: int, phrases: PhraseSource | None = None
) -> TrainingSet:
    """Return the samples that a method is trained on; `phrases` finds the phrases of captions, if it reads any."""
    backbone = model.backbone
    sentences = [str(text) for text in train.captions["text"]]
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
        phrases=model.phrase_table(sentences, phrases) if model.reads_phrases else None,
    )
    captions = "no captions are read"
    if "full" in model.train_texts:
        cut = backbone.truncation_rate(sentences)
        captions = f"{100 * cut:.1f} % of captions are cut at {backbone.context_length} tokens"
    log.info(
        f"{model.name}: {len(samples)} samples of {len(samples.persons)} people, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {captions}"
    )
    return samples


def start_digest(towers: BackboneSettings) -> dict[str, str]:
    """Return the digest of the starting run's weights, by the name `start`; empty without one."""
    return {} if towers.start is None else {"start": digest(start_folder(towers.start) / "model.safetensors")}


def start_path(towers: BackboneSettings) -> str | None:
    """Where the starting run lies, for records."""
    return str(towers.start.resolve()) if towers.start else None


def start_facts(towers: BackboneSettings) -> dict[str, Any]:
    """What a record inherits from the starting run: that nobody knows whom that one saw."""
    record = {} if towers.start is None else Run(towers.start).require("finetune")
    return {name: record[name] for name in ("seen_note",) if name in record}


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
        return build(towers.spec, image_size=towers.image_size, text_length=towers.text_length, stride=towers.stride)
    backbone = load_method(start_folder(towers.start)).backbone
    for name, asked, found in (
        ("spec", towers.spec, backbone.config.spec),
        ("image_size", towers.image_size, backbone.image_size),
        ("text_length", towers.text_length, backbone.context_length),
        ("stride", towers.stride, backbone.config.stride),
    ):
        if asked is not None and asked != found:
            raise UsageError(
                f"`backbone.start` {towers.start} was trained with backbone.{name} {found}, this recipe has {asked}.",
                hint="Use the same, or another run to start from.",
            )
    return backbone


def speed_facts(outcome: Outcome) -> dict[str, Any]:
    """What a record says about the speed of a training."""
    return {
        "devices": parallel.place().world,
        "images_per_second": round(outcome.images_per_second, 1),
        # The loader alone and the step alone: which of the two training waits for.
        "loader_images_per_second": last_value(outcome.history, "loader_images_per_second"),
        "step_images_per_second": last_value(outcome.history, "step_images_per_second"),
    }


def last_value(history: pd.DataFrame, name: str) -> float | None:
    """Return the last value of that name in a history, rounded; None if there is none."""
    if not len(history):
        return None
    values = history.loc[history["name"] == name, "value"]
    return round(float(values.iloc[-1]), 1) if len(values) else None


def _prepare_images(backbone: Backbone, towers: BackboneSettings, training: TrainConfig) -> None:
    """One preprocessing for training, index and search, whatever was chosen: it is saved with the model."""
    mean, std, warning = check_statistics(backbone.mean, backbone.std, towers.pixel_statistics)
    if warning:
        log.warning(warning)
    backbone.prepare_images(mean=mean, std=std, interpolation=training.augment.interpolation)


def require_trainable(model: Method, stage: str, training: TrainConfig) -> None:
    """Refuse what the loop would refuse when the old result is gone: rules that fit nothing, FSDP that cannot be.

    Raises:
        UsageError: it is so.
    """
    require_groups(model, stage, training)
    if training.parallel == "fsdp" and parallel.place().world > 1:
        require_shardable(model, training)


def require_losses(model: Method, stage: str) -> None:
    """Refuse a training without any loss.

    Raises:
        UsageError: every loss of the stage has weight 0.
    """
    if not model.current_weights(stage):
        raise UsageError(
            f"Every loss of `{model.name}` in `{stage}` has weight 0, so nothing would be learnt.",
            hint=f"Its losses: {', '.join(model.loss_weights)}.",
        )


def require_batches(samples: TrainingSet, training: TrainConfig, seed: int) -> None:
    """Refuse samples of which the sampler cannot make batches, before anything is written.

    Raises:
        DataError: there are too few people, or none of a kind.
    """
    if training.epochs:
        epoch_batches(samples, training, seed, 0)


def _check_sampler(model: Method, sampler: str) -> None:
    if sampler == "mixed" and "full" not in model.train_texts:
        raise UsageError(
            f"`{model.name}` reads no captions with these settings, so there is nothing to mix.",
            hint="Use the sampler `identity`, `random`, `alternating` or `alternating-random`.",
        )
    if sampler == "mixed" and not model.learns_without_text:
        able = [name for name in method_names() if method_class(name).learns_without_text]
        raise UsageError(
            f"`{model.name}` learns nothing from images without a caption, so `train.sampler: mixed` is not for it.",
            hint=f"Methods that do: {', '.join(able)}. Or give the images captions.",
        )
