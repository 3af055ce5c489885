"""`reidctl data combine`: several datasets as one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, table
from reidctl.errors import UsageError

EPILOG = "Example:  reidctl data combine runs/cuhk runs/market --run runs/both"
CHECKS = ("error", "warn", "off")


def command(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Run directories (or data folders); one alone is purged of what its splits share."),
    ],
    run: o.RunDir = o.DEFAULT_RUN,
    identity_map: Annotated[
        Path | None,
        typer.Option(help="Who is who: CSV with dataset, person, identity, or JSON {dataset:person: identity}."),
    ] = None,
    purge: Annotated[
        bool | None,
        typer.Option("--purge/--no-purge", help="Take people of a test split out of every training split (default)."),
    ] = None,
    leak_check: Annotated[
        str | None, typer.Option(help="With --no-purge, when train and test share people or files: error, warn, off.")
    ] = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Join datasets into one: common person ids, and no test person in any training split."""
    merged = o.prepare(recipe, set_, None, quiet)
    if leak_check is not None and leak_check not in CHECKS:
        raise UsageError(f"`--leak-check {leak_check}` is not known.", hint=f"One of: {', '.join(CHECKS)}.")
    from reidctl.config import parse_section
    from reidctl.runs import Run
    from reidctl.stages import data_combine
    from reidctl.stages.sources import DataSettings

    given = {"leak_check": leak_check, "identity_map": identity_map, "purge": purge}
    settings = {**(merged.get("data") or {}), **{name: value for name, value in given.items() if value is not None}}
    record = data_combine.run(Run(run), sources, parse_section(DataSettings, settings, "data"), force=force)
    emit(record, run=run, as_json=json_, lines=_lines(record))


def _lines(record: dict[str, Any]) -> list[str]:
    rows = [
        [dataset, split, *(str(facts[name]) for name in ("people", "images", "captions"))]
        for dataset, splits in record["by_dataset"].items()
        for split, facts in splits.items()
    ]
    lines = table(["dataset", "split", "people", "images", "captions"], rows)
    if record["purged"]:
        gone = [
            [p["person_id"], p["dataset"], p["split"], str(p["images"]), p["reason"], p["evidence"]]
            for p in record["purged"]
        ]
        head = ["person", "dataset", "split", "images out", "shared", "found at"]
        lines += table(head, gone, title="Taken out of training:")
    return lines + [str(note) for note in record["notes"]]
