"""`reidctl finetune`: train a retrieval model."""

from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent

EPILOG = "Example:  reidctl finetune --run runs/demo --method bdam-tiny --set train.epochs=2"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    method: Annotated[
        str | None, typer.Option(help="A method or preset; `reidctl methods` lists them, e.g. bdam, irra-tiny.")
    ] = None,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a model; the epoch is chosen on validation people. Killed runs continue where they were."""
    merged = o.prepare(recipe, set_, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import finetune

    record = finetune.run(Run(run), merged, method=method, data=data, captions=captions, device=device, force=force)
    name, value = next(iter(record["metrics"].items()))
    lines = [
        f"{record['method']}: {record['parameters'] / 1e6:.2f} M parameters, {record['images_per_second']} images/s on "
        f"{record['device']}",
        *_rates(record),
        f"best {name} {percent(value)} at epoch {record['best_epoch']} of {record['epochs']}",
        *_kept(record),
    ]
    emit(record, run=run, as_json=json_, lines=lines)


def _rates(record: dict[str, Any]) -> list[str]:
    loader, step = record["loader_images_per_second"], record["step_images_per_second"]
    return [] if loader is None else [f"the loader alone: {loader:,.0f} images/s; the step alone: {step:,.0f} images/s"]


def _kept(record: dict[str, Any]) -> list[str]:
    epochs = record.get("kept_epochs", [])
    return [f"kept the weights of {len(epochs)} epochs, {record['kept_bytes'] / 1e6:,.0f} MB"] if epochs else []
