"""`reidctl evaluate`: retrieval metrics with intervals, beside chance and simple baselines."""

from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent, table
from reidctl.errors import GateError, UsageError

EPILOG = "Example:  reidctl evaluate --run runs/demo --min rank1=0.05"

METRICS = ("rank1", "rank5", "rank10", "mAP", "mINP")
ROWS = {
    "standard": "model",
    "histogram": "colour histogram",
    "oracle-caption": "oracle, attributes in the caption",
    "oracle": "oracle, all attributes",
    "shuffled": "label-shuffle control",
    "chance": "chance",
}


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    split: Annotated[str, typer.Option(help="Which people: test or val.")] = "test",
    query: Annotated[
        str, typer.Option(help="What a text query is: caption, identity+clothing, identity or clothing.")
    ] = "caption",
    minimum: Annotated[
        list[str] | None,
        typer.Option("--min", help="Fail with exit code 5 below this, e.g. rank1=0.7 or i2i.mAP=0.4 (repeatable)."),
    ] = None,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure retrieval on people the model never saw: text to image, and image to image where cameras are known."""
    gates = [_gate(text) for text in minimum or []]
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import evaluate

    record = evaluate.run(
        Run(run),
        split=split,
        query=query,
        device=device or "auto",
        data=data,
        captions=captions,
        seed=seed or 0,
        force=force,
    )
    emit(record, run=run, as_json=json_, lines=_lines(record))
    _check(gates, record["metrics"])


def _lines(record: dict[str, Any]) -> list[str]:
    lines = []
    titles = {"t2i": "text to image", "i2i": "image to image, other cameras"}
    for facts in record["tables"].values():
        title = (
            f"{facts['dataset']}, {titles[facts['direction']]} ({record['split']}): {facts['queries']} queries, "
            f"{facts['gallery']} images, {facts['people']} people, {facts['skipped']} queries without a match skipped; "
            "percent, 95 % intervals"
        )
        rows = [
            [ROWS.get(condition, condition), *(_cell(values.get(metric)) for metric in METRICS)]
            for condition, values in facts["rows"].items()
        ]
        lines += table(["", *METRICS], rows, title)
    return lines + list(record.get("notes", []))


def _cell(value: list[float | None] | None) -> str:
    if value is None:
        return "-"
    middle, low, high = value
    return percent(middle) if low is None else f"{percent(middle)} [{percent(low)}, {percent(high)}]"


def _gate(text: str) -> tuple[str, str, float]:
    name, separator, value = text.partition("=")
    direction, dot, metric = name.partition(".")
    if not dot:
        direction, metric = "t2i", name
    try:
        floor = float(value)
    except ValueError:
        floor = -1.0
    if not separator or metric not in METRICS or direction not in ("t2i", "i2i") or not 0 <= floor <= 1:
        raise UsageError(
            f"`--min {text}` is not METRIC=FRACTION.",
            hint=f"METRIC: {', '.join(METRICS)}, or i2i.METRIC; e.g. rank1=0.7.",
        )
    return direction, metric, floor


def _check(gates: list[tuple[str, str, float]], metrics: dict[str, Any]) -> None:
    for direction, metric, floor in gates:
        if direction not in metrics:
            raise GateError(f"There is no {direction} result to compare with {metric}={floor}.")
        value = metrics[direction][metric]
        # NaN is not above any floor.
        if not value >= floor:
            raise GateError(f"{direction} {metric} is {value:.4f}, below the floor of {floor}.")
