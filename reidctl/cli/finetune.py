"""`reidctl finetune`: train a retrieval model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent

EPILOG = "Example:  reidctl finetune --run runs/demo --method bdam-tiny --set train.epochs=2"
_TRIAL_STEPS = 100


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    method: Annotated[
        str | None, typer.Option(help="A method or preset; `reidctl methods` lists them, e.g. bdam, irra-tiny.")
    ] = None,
    device: o.Device = None,
    devices: o.Devices = None,
    data: o.Data = None,
    captions: o.Captions = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    seed: o.Seed = None,
    resume: o.Resume = False,
    force: o.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would cost, draw the first batch, and train nothing."),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Where --dry-run draws the first batch; default: RUN/dry-run.png.")
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Let the learning rate grow for some steps, suggest one, train nothing.")
    ] = False,
    overfit: Annotated[
        bool,
        typer.Option("--overfit", help="Train on one batch only; exit code 5 if it is not learnt by heart."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of --find-lr and --overfit.", min=10)] = _TRIAL_STEPS,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a model; the epoch is chosen on validation people. Killed runs continue where they were."""
    merged = o.prepare(recipe, set_, seed, quiet)
    asked = {"method": method, "data": data, "captions": captions, "device": device}
    trial = _trial(dry_run, find_lr, overfit)
    _alone(trial, {"--devices": devices not in (None, 1), "--sheet": sheet, "--resume": resume, "--force": force})
    if trial is not None:
        if o.speaks():
            _try(trial, run, merged, asked, steps, sheet, devices or 1, json_)
        return
    o.spread(devices, device or o.train_device(merged, "train"))
    from reidctl.runs import Run
    from reidctl.stages import finetune

    record = finetune.run(Run(run), merged, **asked, force=force, resume=resume)  # type: ignore[arg-type]
    if not o.speaks():
        return
    name, value = next(iter(record["metrics"].items()))
    lines = [
        f"{record['method']}: {record['parameters'] / 1e6:.2f} M parameters, {record['images_per_second']} images/s on "
        f"{_where(record)}",
        *_rates(record),
        f"best {name} {percent(value)} at epoch {record['best_epoch']} of {record['epochs']}",
        *_kept(record),
    ]
    emit(record, run=run, as_json=json_, lines=lines)


def _where(record: Mapping[str, Any]) -> str:
    count = record.get("devices", 1)
    return record["device"] if count == 1 else f"{count} x {record['device']}"


def _rates(record: Mapping[str, Any]) -> list[str]:
    loader, step = record["loader_images_per_second"], record["step_images_per_second"]
    return [] if loader is None else [f"the loader alone: {loader:,.0f} images/s; the step alone: {step:,.0f} images/s"]


def _kept(record: Mapping[str, Any]) -> list[str]:
    epochs = record.get("kept_epochs", [])
    return [f"kept the weights of {len(epochs)} epochs, {record['kept_bytes'] / 1e6:,.0f} MB"] if epochs else []


def _trial(dry_run: bool, find_lr: bool, overfit: bool) -> str | None:
    """Which of the trials is asked for.

    Raises:
        UsageError: more than one.
    """
    named = {"--dry-run": dry_run, "--find-lr": find_lr, "--overfit": overfit}
    chosen = [name for name, wanted in named.items() if wanted]
    if len(chosen) > 1:
        from reidctl.errors import UsageError

        raise UsageError(f"{chosen[0]} and {chosen[1]} are two different trials.", hint="Ask for one at a time.")
    return chosen[0] if chosen else None


def _alone(trial: str | None, given: Mapping[str, Any]) -> None:
    """Refuse flags that a trial, or a training, has no use for.

    Raises:
        UsageError: one is given.
    """
    useful = {"--dry-run": {"--devices", "--sheet"}, "": {"--devices", "--resume", "--force"}}.get(trial or "", set())
    idle = [name for name, value in given.items() if value and name not in useful]
    if idle:
        from reidctl.errors import UsageError

        raise UsageError(f"`{idle[0]}` has no use {f'beside {trial}' if trial else 'without --dry-run'}.")


def _try(
    trial: str,
    run: Path,
    recipe: Mapping[str, Any],
    asked: Mapping[str, Any],
    steps: int,
    sheet: Path | None,
    devices: int,
    as_json: bool,
) -> None:
    """Run a trial and print what it found."""
    from reidctl.runs import Run
    from reidctl.stages import dry_run, probing

    Run(run).check_writable()
    if trial == "--dry-run":
        save = sheet or dry_run.default_sheet(Run(run))
        found = dry_run.run(Run(run), recipe, **asked, devices=devices, save=save)
        record = {"stage": "finetune", "outputs": {}, "metrics": {}, **found}
        emit(record, run=run, as_json=as_json, lines=dry_run.lines(record))
    elif trial == "--find-lr":
        record = probing.search_rate(Run(run), recipe, **asked, steps=steps)
        emit(record, run=run, as_json=as_json, lines=_found_rate(record))
    else:
        record = probing.overfit_batch(Run(run), recipe, **asked, steps=steps)
        emit(record, run=run, as_json=as_json, lines=_overfitted(record, steps))
        if not record["learnt"]:
            from reidctl.errors import GateError

            raise GateError(
                f"One batch was not learnt by heart in {steps} steps: rank-1 in it is {percent(record['rank1'][1])}.",
                hint="Try --find-lr, more --steps, or look at the losses above.",
            )


def _found_rate(record: Mapping[str, Any]) -> list[str]:
    suggested, now = record["suggested"], record["now"]
    if suggested is None:
        return [f"the objective never fell (train.lr is {now:.1e}); see {record['picture']}"]
    return [
        f"the objective fell fastest at train.lr={suggested:.1e}; the recipe has {now:.1e}",
        f"the curve: {record['picture']}",
    ]


def _overfitted(record: Mapping[str, Any], steps: int) -> list[str]:
    first, last = record["first"], record["last"]
    losses = [f"{name}: {first[name]:.4g} -> {last[name]:.4g}" for name in last]
    before, after = record["rank1"]
    return [
        f"one batch, {steps} steps: rank-1 within it {percent(before)} -> {percent(after)}",
        *losses,
    ]
