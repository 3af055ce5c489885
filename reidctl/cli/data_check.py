"""`reidctl data check`: the doctor for a dataset."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, printable, table
from reidctl.errors import DataError, UsageError

EPILOG = "Example:  reidctl data check market-1501 Market-1501-v15.09.15"


def check(
    format: Annotated[
        str | None,
        typer.Argument(help="How to read ROOT; left out: what recognises it.", show_default=False),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Argument(help="The dataset's folder or table; left out: the run's dataset.", show_default=False),
    ] = None,
    run: o.RunDir = o.DEFAULT_RUN,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose context captions must fit: clip, bert, a BERT vocab.txt, or none (repeatable); "
            "default: clip and bert."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that a table's image paths are relative to (csv-table).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images; 0: one per core.", min=0)] = 0,
    near: Annotated[
        bool, typer.Option("--near", help="Also look for resized or re-encoded copies of test images in train.")
    ] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Look a dataset over: layout, damaged and duplicate images, leaks between splits, captions. Changes nothing."""
    o.prepare(None, None, None, quiet)
    name, folder = _which(format, root)
    from reidctl.runs import Run
    from reidctl.stages import data_check

    record = data_check.run(
        Run(run),
        root=folder,
        format=name,
        images=images,
        tokenizers=tokenizer or data_check.TOKENIZERS,
        workers=workers,
        near=near,
    )
    emit(record, run=run, as_json=json_, lines=_lines(record))
    errors = [item for item in record["findings"] if item["severity"] == "error"]
    if errors:
        names = ", ".join(dict.fromkeys(item["check"] for item in errors))
        count = _plural(len(errors), "errors")
        raise DataError(f"{count} found in {folder or run}: {names}.", hint="Nothing was changed.")


def _which(first: str | None, second: Path | None) -> tuple[str | None, Path | None]:
    """A single argument is the folder."""
    if first is None or second is not None:
        return first, second
    from reidctl.datasets.registry import format_names

    if first.replace("_", "-") in format_names() and not Path(first).exists():
        raise UsageError(f"`data check {first}` lacks the folder.", hint=f"reidctl data check {first} ROOT")
    return None, Path(first)


def _lines(record: dict[str, Any]) -> list[str]:
    findings = record["findings"]
    rows = [
        [
            item["check"],
            item["severity"],
            f"{item['count']:,}",
            f"{item['total']:,}",
            _percent(item["rate"]),
            _about(item),
        ]
        for item in findings
    ]
    numbers = record["metrics"]
    counted = [_plural(numbers[name], name) for name in ("images", "captions", "errors", "warnings", "notes")]
    texts = [line for item in findings for line in _text(item)]
    summary = f"{' and '.join(counted[:2])}: {', '.join(counted[2:])}."
    return [*table(["check", "severity", "count", "of", "%", "what"], rows), *texts, summary]


def _text(item: dict[str, Any]) -> list[str]:
    head = f"{item['severity']} {item['check']}: {printable(item['sentence'])}"
    return [head, *(f"    {printable(example)}" for example in item["examples"])]


def _plural(number: int, things: str) -> str:
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def _about(item: dict[str, Any]) -> str:
    details = item["details"]
    return f"{details['tokenizer']} {details['context']}" if "context" in details else str(item["unit"])


def _percent(rate: float) -> str:
    """Three digits for rates that one decimal would show as nothing."""
    return f"{100 * rate:.3f}" if 0 < rate < 0.001 else f"{100 * rate:.1f}"
