"""`reidctl prompt-stage`: learn prompts on frozen encoders."""

from typing import Annotated

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit

EPILOG = "Example:  reidctl prompt-stage --run runs/demo --method hpl-tiny --set prompt.epochs=2"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    method: Annotated[
        str | None, typer.Option(help="A method or preset that learns prompts, e.g. hpl, clip-reid, mta-clip-tiny.")
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
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn prompts while both encoders are frozen: stage I, before `finetune`. Killed runs continue."""
    merged = o.prepare(recipe, set_, seed, quiet)
    o.spread(devices, device or o.train_device(merged, "prompt"))
    from reidctl.runs import Run
    from reidctl.stages import prompt_stage

    record = prompt_stage.run(
        Run(run), merged, method=method, data=data, captions=captions, device=device, force=force, resume=resume
    )
    if not o.speaks():
        return
    losses = ", ".join(f"{name.removeprefix('loss/')} {value:.3f}" for name, value in record["metrics"].items())
    lines = [
        f"{record['method']}: prompts of {record['people']:,} people, {record['parameters'] / 1e6:.2f} M parameters "
        f"trained, {record['images_per_second']} images/s on {record['device']}",
        f"last losses: {losses}" if losses else "nothing was trained (prompt.epochs=0)",
    ]
    emit(record, run=run, as_json=json_, lines=lines)
