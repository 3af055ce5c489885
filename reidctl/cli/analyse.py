"""`reidctl analyse`: what the features of a trained model contain."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent, table

EPILOG = "Example:  reidctl analyse --run runs/demo --what probes,clones"

_WHAT = (
    "probes, dependence, clones, gates, compactness, tsne, cam, attention, pseudo, words, alarms, efficiency, "
    "architecture"
)
# What the short table shows; every number is in the table `analysis`.
_SHOWN = {
    "probes": {"clothing", "body", "person", "person-across-outfits"},
    "dependence": {"cka-linear", "cka-rbf", "hsic-linear-unit"},
}


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    what: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Only these, with commas or repeated: {_WHAT}. Default: all that apply but efficiency.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which people: test or val.")] = "test",
    limit: Annotated[int, typer.Option(help="Images to analyse at most, drawn as whole people.", min=1)] = 4000,
    highlight: Annotated[
        list[str] | None,
        typer.Option(metavar="PERSON", help="Person id to colour in the t-SNE map (repeatable). Default: two."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Features that probes read, e.g. identity (repeatable). Default: all."),
    ] = None,
    sensitive: Annotated[bool, typer.Option("--sensitive", help="Also probe skin and ethnicity.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Set its model beside this one on the same images (tsne, compactness)."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute features anew and keep none (RUN/features).")
    ] = False,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Probe what features contain, how far streams depend, what tells look-alikes apart, and what a model costs."""
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import analyse

    record = analyse.run(
        Run(run),
        what=what or (),
        split=split,
        sensitive=sensitive,
        highlight=highlight or (),
        features=features or (),
        limit=limit,
        device=device or "auto",
        data=data,
        captions=captions,
        seed=seed or 0,
        against=Run(against) if against else None,
        cache=not no_cache,
        force=force,
    )
    lines = [] if json_ else [*_lines(run), *record["notes"]]
    emit(record, run=run, as_json=json_, lines=lines)


def _lines(run: Path) -> list[str]:
    from reidctl import tables
    from reidctl.runs import Run

    frame = tables.read_table(Run(run).table("analyse", "analysis"), "analysis")
    rows = [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
    shown = [row for row in rows if _short(row)]
    costs = _costs([row for row in rows if row["analysis"] == "efficiency"])
    if not shown:
        return costs
    columns = ["analysis", "value", "low", "high", "control", "chance", "p"]
    title = (
        "Percent with 95 % intervals; dependence, distances, silhouettes and std as they are. All of it: "
        "analyse/analysis.parquet"
    )
    return [*table(columns, [_cells(row) for row in shown], title), *costs]


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    """What each part costs, one line per part; nothing if it was not measured."""
    parts: dict[str, dict[str, float]] = {}
    for row in rows:
        parts.setdefault(row["feature"], {})[row["metric"]] = row["value"]
    if not parts:
        return []
    columns = ["part", "parameters", "trainable", "GFLOP/item", "kept MiB/item", "ms/batch", "items/s"]
    lines = [
        [
            part,
            f"{cost['parameters']:,.0f}",
            f"{cost['trainable']:,.0f}",
            f"{cost['flops'] / 1e9:.3g}",
            f"{cost['kept_bytes'] / 2**20:.3g}",
            f"{cost['milliseconds']:.3g}",
            f"{cost['items_per_second']:,.0f}",
        ]
        for part, cost in parts.items()
    ]
    return table(columns, lines, f"Costs of each part, batches of {rows[0]['items']}")


def _short(row: dict[str, Any]) -> bool:
    """Whether a number is among those that sum up an analysis."""
    if row["analysis"] == "efficiency":
        return False
    if (row["feature"].startswith("pooled_") and row["analysis"] != "dependence") or row["metric"] == "std":
        return False
    if row["analysis"] == "probes":
        return row["target"] in _SHOWN["probes"] and row["metric"] in ("accuracy", "excess")
    return row["analysis"] != "dependence" or row["metric"] in _SHOWN["dependence"]


def _cells(row: dict[str, Any]) -> list[str]:
    fraction = row["analysis"] in ("probes", "clones") or row["metric"].removesuffix("-difference") in (
        "mean",
        "person",
        "objects",
    )
    show = percent if fraction else _plain
    named = [row["analysis"], row["feature"], row["target"], "" if row["metric"] == "accuracy" else row["metric"]]
    numbers = [show(row[key]) for key in ("value", "low", "high", "control", "chance")]
    return [" ".join(part for part in named if part), *numbers, _plain(row["p_value"])]


def _plain(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
