"""`reidctl index`: embed a gallery."""

from pathlib import Path
from typing import Annotated

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit

EPILOG = "Example:  reidctl index --run runs/demo --split test"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    split: Annotated[str, typer.Option(help="Which images: test, val, train or all.")] = "test",
    images: Annotated[
        Path | None, typer.Option(help="Index a folder of own images instead of the dataset; no ids needed.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 128,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn images into vectors that `search` and `evaluate` read. No query text is involved."""
    o.prepare(None, None, None, quiet)
    from reidctl.runs import Run
    from reidctl.stages import index

    record = index.run(
        Run(run),
        split=split,
        images=images,
        batch=batch,
        device=device or "auto",
        data=data,
        captions=captions,
        force=force,
    )
    facts = record["metrics"]
    lines = [f"{facts['images']} images of {facts['dimensions']} dimensions, {facts['images_per_second']} images/s"]
    emit(record, run=run, as_json=json_, lines=lines)
