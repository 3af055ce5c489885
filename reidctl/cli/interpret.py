"""`reidctl interpret`: which image regions a phrase rests on, and the gates."""

from typing import Annotated

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent, table

EPILOG = "Example:  reidctl interpret --run runs/demo --samples 8"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    samples: Annotated[int, typer.Option(help="How many test captions to explain.", min=1)] = 100,
    explainer: Annotated[str, typer.Option(help="gradcam or patch.")] = "gradcam",
    phrase: Annotated[str | None, typer.Option(help="Explain this phrase instead of the captions' own.")] = None,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw patch-phrase maps, score them against true part masks where there are any, and plot the gates."""
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import interpret

    record = interpret.run(
        Run(run),
        samples=samples,
        explainer=explainer,
        phrase=phrase,
        device=device or "auto",
        data=data,
        captions=captions,
        seed=seed or 0,
        force=force,
    )
    rows = [
        [name, *(percent(entry[key]) for key in ("value", "low", "high"))]
        for name, entry in record["metrics"].items()
        if isinstance(entry, dict)
    ]
    lines = table(["measure (percent)", "value", "low", "high"], rows) if rows else []
    emit(record, run=run, as_json=json_, lines=lines)
