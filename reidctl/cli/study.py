"""`reidctl study`: many trainings, one table, and what it says of each claim."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, public, table
from reidctl.errors import UsageError

EPILOG = "Example:  reidctl study pipelines/studies/smoke.yaml --run runs/studies"


def command(
    files: Annotated[list[Path], typer.Argument(help="Study files (YAML), run together.", metavar="FILE...")],
    run: o.RunDir = o.DEFAULT_RUN,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the files', e.g. 0,1,2.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time; default: one per core.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Also write all results as one Markdown page here.", metavar="PAGE.md")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the results again; trainings are kept.")] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train and measure every condition of a study over its seeds, and say which claims hold."""
    o.prepare(None, None, None, quiet)
    from reidctl.runs import Run
    from reidctl.stages import study

    records = study.run(Run(run), files, seeds=_seeds(seeds), jobs=jobs, dry_run=dry_run, save=save, force=force)
    if json_ and len(records) > 1:
        parts = {record["stage"]: public(record) for record in records}
        emit(_together(records) | {"studies": parts}, run=run, as_json=True)
        return
    for record in records:
        emit(record if json_ else {**record, "stage": f"study {record['stage']}"}, run=run, as_json=json_,
             lines=_lines(record))  # fmt: skip


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"`--seeds {text}` is no list of whole numbers.", hint="Write --seeds 0,1,2.") from None


def _lines(record: dict[str, Any]) -> list[str]:
    if record["status"] == "dry-run":
        metrics = record["metrics"]
        conditions = ", ".join(record["conditions"])
        return [f"{metrics['trainings']} trainings ({metrics['finished']} finished): {conditions}; seeds "
                f"{', '.join(map(str, record['seeds']))}"]  # fmt: skip
    rows = [[claim["claim"], claim["verdict"], claim["reason"]] for claim in record["claims"]]
    lines = table(["claim", "verdict", "because"], rows) if rows else []
    return [*lines, f"The page: {record['page']}"]


def _together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record for several studies."""
    statuses = {record["status"] for record in records}
    counts: dict[str, int] = {}
    for record in records:
        for name, value in record["metrics"].items():
            counts[name] = counts.get(name, 0) + value
    return {
        "stage": "study",
        "status": statuses.pop() if len(statuses) == 1 else "done",
        "outputs": {name: facts for record in records for name, facts in record["outputs"].items()},
        "metrics": counts,
        "seconds": round(sum(record["seconds"] for record in records), 3),
    }
