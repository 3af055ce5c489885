"""`reidctl data degrade`: the same images with worse captions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent, table

EPILOG = "Example:  reidctl data degrade --from runs/demo --run runs/demo-drop30 --kind drop --level 0.3"


def command(
    source: Annotated[Path, typer.Option("--from", help="Run directory (or data folder) whose captions get worse.")],
    kind: Annotated[str, typer.Option(help="drop, shorten, typo or shuffle (words).")],
    level: Annotated[float, typer.Option(help="How much: 0 nothing, 0.3 about 30 % of the words, 1 all but one word.")],
    run: o.RunDir = o.DEFAULT_RUN,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Whose captions: test (default), val, train or all (repeatable)."),
    ] = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Degrade captions by a known amount, to measure how retrieval holds: evaluate with --data RUN/data afterwards."""
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import data_degrade

    record = data_degrade.run(
        Run(run), source=source, kind=kind, level=level, splits=split or ["test"], seed=seed or 0, force=force
    )
    emit(record, run=run, as_json=json_, lines=_lines(record))


def _lines(record: dict[str, Any]) -> list[str]:
    facts = record["metrics"]
    rows = [
        ["captions chosen", f"{facts['captions']:,}"],
        ["changed", f"{facts['changed']:,}"],
        ["words per caption", f"{facts['words_before']:.1f} -> {facts['words_after']:.1f}"],
        ["words kept, %", percent(facts["word_overlap"])],
    ]
    if "word_order" in facts:
        rows.append(["word pairs in order, %", percent(facts["word_order"])])
    return table(["captions", ""], rows) + [str(note) for note in record["notes"]]
