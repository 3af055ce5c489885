"""`prompt-stage`: stage I of methods that learn prompts: the encoders are frozen, only the prompts' modules train."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from reidctl import parallel, tables
from reidctl.console import progress
from reidctl.data import TrainingSet, training_part
from reidctl.datasets.leaks import guard
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.frozen import FrozenFeatures, forget_features, keep_features
from reidctl.methods.base import Method, method_class, method_names
from reidctl.runs import Run, fingerprint
from reidctl.stages import building
from reidctl.stages.building import Settings
from reidctl.stages.sources import Source, find_source
from reidctl.training.config import PromptConfig
from reidctl.training.loop import Outcome, Trainer
from reidctl.training.state import require_state
from reidctl.training.tracking import require_trackers

STAGE = "prompt-stage"
_SPOILT = ("caption_noise", "caption_noise_kind", "part", "datasets")


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
    """Learn prompts on frozen encoders and write them, their modules and a record.

    Writes the table `prompts` (every learnt token vector), `prompts.safetensors` (what `finetune` takes over) and
    `history`. Nothing is selected: the last epoch stays.

    Args:
        run: where the stage writes.
        recipe: sections `method`, `backbone`, `prompt`, `data` and `seed` are read.
        method: a method or preset name; wins over the recipe's.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        device: wins over `prompt.device`.
        force: train again even if nothing changed.
        resume: refuse to begin anew: a training that was stopped must be there.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.

    Raises:
        UsageError: the method has no prompt stage, or nothing to learn in it with these settings.
    """
    recipe = building.resolve(recipe, method)
    checked = building.check(recipe)
    _check(checked)
    run.check_writable()
    training = checked.prompts if device is None else checked.prompts.replace(device=device)
    require_trackers(training)
    target = resolve_device(training.device)
    source = find_source(run, data, captions)
    seed = int(recipe.get("seed", 0))
    resolved = {
        "seed": seed,
        "method": {"name": checked.name, **checked.method.prompt_settings()},
        "backbone": building.towers_that_matter(checked.towers),
        "prompt": {**building.what_matters(training), "cache": training.cache},
        "device": target.type,
        **building.where_used(checked.handling),
    }
    inputs = source.digests() | building.start_digest(checked.towers)
    notes = guard(tables.read_table(source.images, "images"), checked.handling.leak_check)
    with parallel.joined(target.type):
        current = parallel.first_does(lambda: None if force else run.up_to_date(STAGE, resolved, inputs))
        if current is not None:
            return {**current, "status": "up-to-date"}
        if resume:
            require_state(run.stage_dir(STAGE) / "last" / "state.pt", fingerprint(resolved, inputs))
        with ExitStack() as held:
            parallel.first_does(lambda: held.enter_context(run.locked(STAGE)))
            record = _learn(run, checked, training, target, source, seed, resolved, inputs, notes, force)
    return {**record, "status": "done"}


def _learn(
    run: Run,
    checked: Settings,
    training: PromptConfig,
    target: torch.device,
    source: Source,
    seed: int,
    resolved: Mapping[str, Any],
    inputs: Mapping[str, str],
    notes: list[str],
    force: bool,
) -> dict[str, Any]:
    """Train, write what that leaves and return the record."""
    started = datetime.now(UTC)
    corpus = building.corpus_of(source, checked.handling, seed)
    train = training_part(corpus.of_split("train"), checked.handling.part)
    model = building.build_model(train, checked, training, seed)
    building.require_losses(model, STAGE)
    building.require_trainable(model, STAGE, training)
    samples = building.training_set(train, model, training, seed)
    building.require_batches(samples, training, seed)
    folder = run.stage_dir(STAGE)
    parallel.first_does(lambda: _clear(run, folder, force))
    fresh = fingerprint(resolved, inputs)
    before = _encoders(model)
    # The first process encodes and keeps; the others open what it kept.
    with parallel.first_then_others():
        samples.frozen = _freeze(model, samples, training, folder / "frozen", fresh, target)
    began = datetime.now(UTC)
    outcome = Trainer(model, samples, None, training, folder, seed=seed, stage=STAGE, fingerprint=fresh).run()
    model = model.cpu().eval()
    if _encoders(model) != before:
        raise RuntimeError("a frozen encoder changed in the prompt stage")

    def finish() -> dict[str, Any]:
        outputs = _write(run, model, samples.persons, outcome)
        forget_features(folder / "frozen")
        return run.finish(
            STAGE,
            settings=resolved,
            inputs=inputs,
            outputs=outputs,
            started=started,
            device=str(target),
            metrics=_last_losses(outcome.history),
            extra={
                "data": str(source.folder.resolve()),
                "method": checked.name,
                "people": len(samples.persons),
                "people_digest": people_digest(samples.persons),
                "start": building.start_path(checked.towers),
                "epochs": training.epochs,
                "notes": notes,
                "parameters": sum(value.numel() for value in model.prompt_state().values()),
                **building.speed_facts(outcome),
                "training_seconds": round(outcome.seconds, 3),
                "encoding_seconds": round((began - started).total_seconds(), 3),
                "resumed_from_epoch": outcome.resumed_from,
            },
        )

    return parallel.first_does(finish)


def _clear(run: Run, folder: Path, force: bool) -> None:
    """Whatever the settings can be wrong about has been looked at; only now does the old result go."""
    run.unfinish(STAGE)
    if force:
        (folder / "last" / "state.pt").unlink(missing_ok=True)


def _check(checked: Settings) -> None:
    """Refuse a method without prompts, or with none to learn.

    Raises:
        UsageError: it is one.
    """
    if STAGE not in method_class(checked.name).stages:
        able = [name for name in method_names() if STAGE in method_class(name).stages]
        raise UsageError(f"`{checked.name}` has no prompt stage.", hint=f"Methods that do: {', '.join(able)}.")
    if not checked.method.needs_prompt_stage:
        raise UsageError(
            f"With these settings `{checked.name}` learns nothing in a prompt stage.", hint="Run `reidctl finetune`."
        )


def _freeze(
    model: Method, samples: TrainingSet, training: PromptConfig, folder: Path, key: str, device: torch.device
) -> FrozenFeatures | None:
    """What the encoders give, kept on disk; None to compute it at every step."""
    model.begin(STAGE)
    model.to(device).eval()
    if training.cache == "off" or not training.epochs:
        forget_features(folder)
        return None
    texts = len(samples.tokens.unique) if "full" in samples.texts else 0
    with progress("encode once", len(samples.store) + texts, unit="items") as advance:
        return keep_features(model, samples, folder, key, precision=training.cache, device=device, advance=advance)


def _encoders(model: Method) -> str:
    """Digest of the encoders' weights, on the CPU."""
    state = hashlib.sha256()
    for parameter in model.backbone.parameters():
        state.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _write(run: Run, model: Method, persons: list[str], outcome: Outcome) -> list[Path]:
    paths = [run.table(STAGE, "prompts"), run.table(STAGE, "history"), run.stage_dir(STAGE) / "prompts.safetensors"]
    rows = [
        {"scope": scope, "key": key, "position": place, "vector": vector}
        for scope, key, vectors in model.prompt_rows(persons)
        for place, vector in enumerate(vectors.detach().float().cpu().numpy())
    ]
    tables.write_table(paths[0], "prompts", pd.DataFrame(rows) if rows else tables.empty("prompts"))
    tables.write_table(paths[1], "history", outcome.history if len(outcome.history) else tables.empty("history"))
    state = {name: value.detach().cpu().contiguous() for name, value in model.prompt_state().items()}
    tables.write_bytes(paths[2], save(state))
    return paths


def _last_losses(history: pd.DataFrame) -> dict[str, float]:
    if not len(history):
        return {}
    losses = history[history["name"].str.startswith("loss/")]
    return {str(name): float(rows["value"].iloc[-1]) for name, rows in losses.groupby("name", observed=True)}


def people_digest(persons: list[str]) -> str:
    """Return the digest of training people in order: identity tokens belong to numbers, not to names."""
    return fingerprint({"people": persons}, {})


def prompts_file(run: Run) -> Path:
    """Where a run keeps what its prompt stage hands over."""
    return run.stage_dir(STAGE) / "prompts.safetensors"


def require(run: Run, checked: Settings, source: Source) -> dict[str, Any]:
    """Return the record of the prompt stage that a training builds on.

    Raises:
        DataError: it has not finished, or ran with other settings or on other data.
    """
    record = run.record(STAGE)
    if record is None:
        raise DataError(
            f"{run.path} has no finished prompt stage, which `{checked.name}` builds on.",
            hint=f"Run `reidctl prompt-stage --method {checked.name} --run {run.path}` first, name another run with "
            f"`--set prompt.use=RUN`, or do without: `--set {checked.method.spares_prompt_stage}`.",
        )
    asked = {"name": checked.name, **checked.method.prompt_settings()}
    learnt = record["settings"]["method"]
    towers = checked.towers.model_dump(mode="json", exclude={"start"})
    for section, own, found in (("method", asked, learnt), ("backbone", towers, record["settings"]["backbone"])):
        differs = _first_difference(section, own, found)
        if differs is not None:
            key, now, before = differs
            raise DataError(
                f"The prompt stage in {run.path} was run with other settings: `{key}` was {before!r}, now it is "
                f"{now!r}.",
                hint="Run `reidctl prompt-stage` with these settings.",
            )
    mine = {name: value for name, value in source.digests().items() if name != "described"}
    theirs = {name: value for name, value in record["inputs"].items() if name not in ("described", "start")}
    spoilt = {name: record["settings"][name] for name in _SPOILT if name in record["settings"]}
    if mine != theirs or spoilt != {k: v for k, v in building.where_used(checked.handling).items() if k in _SPOILT}:
        raise DataError(
            f"The prompts in {run.path} were learnt on other images or captions.",
            hint="Run `reidctl prompt-stage` on this dataset.",
        )
    if building.start_digest(checked.towers).get("start") != record["inputs"].get("start"):
        raise DataError(f"The prompt stage in {run.path} started from other weights.", hint="Run it again.")
    return record


def _first_difference(key: str, own: Any, found: Any) -> tuple[str, Any, Any] | None:
    """Return the dotted key and both values of the first setting that differs; keys that `own` lacks do not count."""
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        each = (_first_difference(f"{key}.{name}", value, found.get(name)) for name, value in own.items())
        return next((one for one in each if one is not None), None)
    return None if own == found else (key, own, found)


def hand_over(run: Run, model: Method, persons: list[str]) -> None:
    """Put what the prompt stage learnt into an untrained model.

    Raises:
        DataError: it was learnt on other people, or the file is damaged.
    """
    if run.require(STAGE)["people_digest"] != people_digest(persons):
        raise DataError(
            f"The prompts in {run.path} belong to other training people.",
            hint="Run `reidctl prompt-stage` on this dataset.",
        )
    path = prompts_file(run)
    try:
        state: dict[str, Tensor] = load_file(path)
        model.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path} is damaged ({str(error).splitlines()[0]}).", hint="Run the prompt stage again."
        ) from None
    missing = sorted(set(model.prompt_state()) - set(state))
    if missing:
        raise DataError(f"{path} lacks `{missing[0]}`.", hint="Run `reidctl prompt-stage` again.")
