"""`finetune --dry-run`: what a training would cost and see, in under a minute and without training anything.

Everything is measured on the real model, the real data and the device asked for, on as large a part of the first batch
as the time allows: memory, operations, the speed of a step and that of the loader.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from reidctl import tables
from reidctl.data import TrainingSet, check_datasets, training_part
from reidctl.datasets.leaks import guard
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import Method
from reidctl.phrases.base import PhraseConfig, PhraseSource
from reidctl.runs import Run
from reidctl.stages import building, prompt_stage
from reidctl.stages.building import Settings
from reidctl.stages.dry_run_batch import batch_facts, draw_batch, epoch_facts, shares, text_facts
from reidctl.stages.dry_run_costs import (
    BUDGET,
    STAGE,
    Trial,
    count_work,
    learning_rates,
    memory_facts,
    operation_facts,
    parameter_facts,
    speed_facts,
)
from reidctl.stages.sources import Source, find_source
from reidctl.training.batches import epoch_batches
from reidctl.training.feed import Feed
from reidctl.training.memory import gib, in_words, measure_needs
from reidctl.training.optimizer import build_optimizer


def default_sheet(run: Run) -> Path:
    """Return where the picture of the first batch goes when nobody says."""
    return run.path / "dry-run.png"


def run(
    run: Run,
    recipe: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Path | None = None,
    captions: Path | None = None,
    device: str | None = None,
    devices: int = 1,
    save: Path | None = None,
) -> dict[str, Any]:
    """Return what `finetune` with the same arguments would cost and see; nothing is trained or written but `save`.

    Args:
        run, recipe, method, data, captions, device: as for `finetune.run`.
        devices: processes that would share each batch, each on a device like this one.
        save: a PNG file for a picture of the first batch; None: no picture.

    Returns:
        `parameters`, `learning_rates`, `memory` (bytes on each device), `operations` (a multiply-add being two),
        `speed`, `batch` (the first), `epoch`, `texts`, `shares` (with several devices), `notes`; plain values only.

    Raises:
        UsageError, DataError: whatever `finetune` would refuse before it trains, or fewer than one device.
    """
    started = time.perf_counter()
    if devices < 1:
        raise UsageError(f"{devices} devices cannot train.", hint="Give 1 or more.")
    if save is not None and save.suffix.lower() != ".png":
        raise UsageError(f"The picture of the first batch is a PNG file, not {save}.", hint="Name it *.png.")
    trial = _prepare(run, recipe, method, data, captions, device)
    target = next(trial.model.parameters()).device
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(trial.seed)
        record = _measured(trial, target, devices)
    if save is not None:
        draw_batch(trial.samples, trial.batch, trial.training, trial.model.backbone, save)
    record["sheet"] = None if save is None else str(save)
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def _measured(trial: Trial, device: torch.device, devices: int) -> dict[str, Any]:
    training, batches = trial.training, trial.batches
    # Before anything is measured: the model's numbers are of no use afterwards.
    parameters, rates = parameter_facts(trial.model), learning_rates(trial.optimizer)
    needs = measure_needs(
        trial.model,
        trial.batch,
        STAGE,
        training,
        checkpointing=trial.checked.towers.grad_checkpointing,
        devices=devices,
        seconds=BUDGET,
    )
    memory = memory_facts(needs, device)
    counted = count_work(trial, needs)
    record: dict[str, Any] = {
        "status": "dry-run",
        "method": trial.model.name,
        "device": str(device),
        "devices": devices,
        "precision": training.precision,
        "accumulate": training.accumulate,
        "grad_checkpointing": trial.checked.towers.grad_checkpointing,
        "parameters": parameters,
        "learning_rates": rates,
        "memory": memory,
        "operations": operation_facts(counted, trial, devices),
        "batch": batch_facts(trial.samples, batches[0]),
        "epoch": epoch_facts(trial.samples, batches),
        "texts": text_facts(trial.samples, trial.model.backbone),
        "shares": shares(trial.samples, batches, training, devices) if devices > 1 else [],
        "notes": trial.notes,
    }
    record["speed"] = speed_facts(trial, needs, counted, devices)
    return record


# What would be trained


def _prepare(
    run: Run,
    recipe: Mapping[str, Any],
    method: str | None,
    data: Path | None,
    captions: Path | None,
    device: str | None,
) -> Trial:
    """Everything that `finetune` does before its first step, but for what it writes."""
    recipe = building.resolve(recipe, method)
    checked = building.check(recipe)
    training = checked.training if device is None else checked.training.replace(device=device)
    target = resolve_device(training.device)
    source, seed = find_source(run, data, captions), int(recipe.get("seed", 0))
    images = tables.read_table(source.images, "images")
    check_datasets(images, checked.handling.datasets)
    notes = list(guard(images, checked.handling.leak_check))
    corpus = building.corpus_of(source, checked.handling, seed)
    train = training_part(corpus.of_split("train"), checked.handling.part)
    corpus.of_split(training.select)  # refuses a dataset by which no epoch could be chosen
    model = building.build_model(train, checked, training, seed)
    building.require_losses(model, STAGE)
    phrases = _phrases(run, source, checked.phrases, notes) if model.reads_phrases else None
    samples = building.training_set(train, model, training, seed, phrases)
    batches = epoch_batches(samples, training, seed, 0)
    _take_prompts(run, checked, source, model, samples, notes)
    feed = Feed(samples, training, seed, target)
    plan = feed.plan(0)
    loader = feed.measure(plan)
    batch = next(islice(feed.load(plan), 1))
    model.to(target)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    if training.compile:
        notes.append("train.compile is off here: steps on a GPU are faster with it, after some minutes.")
    optimizer = build_optimizer(model, STAGE, training)
    model.begin(STAGE)
    model.train()
    return Trial(checked, training, seed, model, samples, batches, batch, loader, feed.threads, optimizer, notes)


def _phrases(run: Run, source: Source, config: PhraseConfig, notes: list[str]) -> PhraseSource:
    """Who finds phrases here: nobody who is slow, costs money or writes into the run."""
    if config.backend in ("rules", "given", "file"):
        return building.find_phrases(run, source, config)
    notes.append(f"phrases.backend={config.backend} was not asked: the phrases here are those of the rules.")
    return building.find_phrases(run, source, PhraseConfig())


def _take_prompts(
    run: Run, checked: Settings, source: Source, model: Method, samples: TrainingSet, notes: list[str]
) -> None:
    """Take over what the prompt stage learnt, where it has; its numbers change no cost."""
    if not checked.method.needs_prompt_stage:
        return
    where = run if checked.prompts.use is None else Run(checked.prompts.use)
    try:
        prompt_stage.require(where, checked, source)
        prompt_stage.hand_over(where, model, samples.persons)
    except DataError as error:
        notes.append(f"The training itself would stop here: {error.message}")


# In words


def lines(record: Mapping[str, Any]) -> list[str]:
    """Return what a dry run found, as lines of plain text."""
    return [
        *_model_lines(record),
        "",
        *_memory_lines(record),
        "",
        *_speed_lines(record),
        "",
        *_batch_lines(record),
        *(f"note: {note}" for note in record["notes"]),
        *([f"picture of the first batch: {record['sheet']}"] if record["sheet"] else []),
        f"Nothing was trained. This took {record['seconds']:.0f} s.",
    ]


def _model_lines(record: Mapping[str, Any]) -> Iterator[str]:
    found = record["parameters"]
    yield f"{record['method']} on {record['device']}"
    yield f"{'parameters':<22}{'trainable':>14}{'frozen':>14}"
    for row in [*found["modules"], {"module": "together", **found}]:
        yield f"  {row['module'][:19]:<20}{row['trainable']:>14,}{row['frozen']:>14,}"
    yield f"{'learning rate':<22}{'weight decay':>14}{'numbers':>14}"
    for row in record["learning_rates"]:
        yield f"  {row['lr']:<20.3g}{row['weight_decay']:>14.3g}{row['numbers']:>14,}"


def _memory_lines(record: Mapping[str, Any]) -> Iterator[str]:
    found = record["memory"]
    where = "each device" if record["devices"] > 1 else "the device"
    yield f"memory of {where}: about {gib(found['total'])} at most, of {gib(found['device'])}"
    yield "  " + ", ".join(f"{name} {gib(size)}" for name, size in found["bytes"].items() if size)
    size = record["batch"]["samples"]
    if found["measured_samples"] < size:
        yield f"  (activations of {found['measured_samples']} samples were measured and continued to {size})"
    if not found["fits"]:
        ways = in_words([(change["settings"], change["bytes"]) for change in found["changes"]])
        yield f"  That does not fit. {f'These would: {ways}.' if ways else 'No setting makes it fit.'}"


def _speed_lines(record: Mapping[str, Any]) -> Iterator[str]:
    cost, speed = record["operations"], record["speed"]
    yield (
        f"operations: {_flops(cost['image'])} an image, {_flops(cost['step'])} a step on a device, "
        f"{_flops(cost['epoch'])} an epoch (forward and backward)"
    )
    step, loader = speed["step_images_per_second"], speed["loader_images_per_second"]
    yield (
        f"speed: {speed['images_per_second']:,.1f} images/s; the step gives {step:,.1f}, the loader {loader:,.1f} "
        f"({speed['threads']} threads); the {speed['slower']} is slower"
    )
    yield f"  {speed['way']}"
    count = record["devices"]
    if count > 1:
        yield f"  {count} devices are taken to be {count} times as fast; what they exchange comes on top"
    yield f"time: about {_hours(speed['hours'])} for {speed['epochs']} epochs, without validation"


def _batch_lines(record: Mapping[str, Any]) -> Iterator[str]:
    batch, epoch, texts = record["batch"], record["epoch"], record["texts"]
    low, mean, high = batch["per_person"]
    spread = f"{low}" if low == high else f"{low} to {high}, {mean:.1f} on average"
    yield f"first batch: {batch['samples']} samples of {batch['people']} people ({spread} each)"
    told, untold, repeated = (batch[name] for name in ("captioned", "uncaptioned", "repeated_images"))
    yield f"  {told} with a caption, {untold} without; {repeated} repeat an image"
    yield "  datasets: " + ", ".join(f"{name} {count}" for name, count in batch["datasets"].items())
    yield f"  each is told apart from {batch['negatives']:.1f} of other people on average"
    yield (
        f"epoch: {epoch['steps']:,} steps, {epoch['samples']:,} samples, {epoch['images']:,} of {epoch['of_images']:,} "
        f"images, {epoch['people']:,} of {epoch['of_people']:,} people"
    )
    if texts["captions"]:
        cut, most = 100 * texts["truncated"], texts["context_length"]
        yield f"texts: {cut:.1f} % of {texts['captions']:,} captions are cut at {most} tokens"
    for row in record["shares"]:
        yield (
            f"device {row['device']}: {row['samples']} samples of {row['people']} people in the first batch, "
            f"{row['steps']:,} steps"
        )
    if record["shares"]:
        yield f"  {record['shares'][0]['left_out']:,} samples of the epoch cannot be dealt evenly and are left out"


def _flops(count: float) -> str:
    """Operations as text, such as `1.2 TFLOP`."""
    power = min(max((len(str(round(count))) - 1) // 3, 0), 5)
    return f"{count / 1000**power:,.1f} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"
