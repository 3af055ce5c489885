"""`reidctl report`: one HTML file from a run."""

from pathlib import Path
from typing import Annotated

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit

EPILOG = "Example:  reidctl report --run runs/demo"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    out: Annotated[Path | None, typer.Option(help="Also copy the page here.")] = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write one self-contained HTML page with everything the run measured; it makes no external request."""
    o.prepare(None, None, None, quiet)
    from reidctl.runs import Run
    from reidctl.stages import report

    record = report.run(Run(run), out=out, force=force)
    emit(record, run=run, as_json=json_, lines=[f"report: {run / 'report' / 'report.html'}"])
