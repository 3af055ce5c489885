"""`reidctl interpret`: where phrases are seen, and whether the maps survive being tested."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, percent, table

EPILOG = "Example:  reidctl interpret --run runs/demo --samples 8 --explainer gradcam,centre --what grounding"

_EXPLAINERS = "ppim, patch, cls, rollout, chefer, gradcam, slots, centre, random"
_TESTS = "grounding, concentration, masking, curves, specificity, alignment, sanity, stability, binding"
_AT = 0.2
"""The share of patches whose removal the short table shows, if it was measured."""
# (heading, metric, whether it is a fraction that people read as percent, the control that is shown beside it)
_COLUMNS = (
    ("pointing", "pointing", True, "random"),
    ("IoU", "iou", True, "random"),
    ("similarity drop", "similarity_drop", False, "random"),
    ("mAP drop", "mAP_drop", True, "random"),
    ("deletion", "deletion", False, "random"),
    ("insertion", "insertion", False, "random"),
    ("specificity", "specificity", False, "random"),
    ("alignment", "alignment", False, "random"),
    ("entropy", "entropy", False, ""),
    ("spread", "spread", False, ""),
    ("new weights", "sanity.weights", False, ""),
    ("other phrase", "sanity.phrases", False, ""),
)


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    samples: Annotated[int, typer.Option(help="How many test captions to explain.", min=1)] = 100,
    explainer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"With commas or repeated: {_EXPLAINERS}, or all. Default: ppim, else gradcam."
        ),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEST",
            help=f"Tests of the maps, with commas or repeated: {_TESTS}, or all that apply. Default: grounding, "
            "concentration.",
        ),
    ] = None,
    phrase: Annotated[str | None, typer.Option(help="Explain this phrase instead of the captions' own.")] = None,
    query: Annotated[
        str | None, typer.Option(metavar="TEXT|ID", help="Explain this caption, by its id or as words.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="ID|FILE", help="On this image: an id, or the file of any picture.")
    ] = None,
    split: Annotated[str, typer.Option(help="Whose captions and images: test or val.")] = "test",
    removed: Annotated[
        str, typer.Option(metavar="LIST", help="Shares of the patches that are removed, in percent.")
    ] = "5,10,20,30,50",
    fill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILL",
            help="What is put there, with commas or repeated: mean, zero, blur, noise, drop, swap, "
            "plugin:PACKAGE.MODULE:FUNCTION. Default: mean.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What removes as many patches: random, block, centre, least, phrase, query, shifted, pooled. "
            "Default: all that apply.",
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of the control `random`.", min=10)] = 10,
    scope: Annotated[str, typer.Option(help="Mask the target image, or all_positives of a query.")] = "target",
    level: Annotated[str, typer.Option(help="Mask by the map of a caption, or of each phrase.")] = "caption",
    aggregate: Annotated[
        str, typer.Option(help="A caption's map: own, or weighted, max or mean of its phrases'.")
    ] = "own",
    judge: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Its model sees the masked images too, and its maps are compared (repeatable)."
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="RUN|SPEC", help="Independent encoder of the test `alignment`.")
    ] = None,
    parts: Annotated[
        Path | None, typer.Option(help="Part masks of your own: a `parts` table, or a folder of label maps.")
    ] = None,
    phrases: Annotated[
        str, typer.Option(help="Who finds phrases: given (the dataset's, else rules), rules, spacy, trained.")
    ] = "given",
    batch: Annotated[int, typer.Option(help="Masked images per forward pass.", min=1)] = 128,
    device: o.Device = None,
    data: o.Data = None,
    captions: o.Captions = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw phrase maps, test them against masks, controls and other models, and plot the gates."""
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import interpret

    record = interpret.run(
        Run(run),
        samples=samples,
        explainer=explainer or (),
        what=what or (),
        phrase=phrase,
        query=query,
        image=image,
        split=split,
        fractions=_fractions(removed),
        fills=[name.strip() for text in fill or ("mean",) for name in text.split(",")],
        controls=control or (),
        draws=draws,
        scope=scope,
        level=level,
        aggregate=aggregate,
        judges=[Run(path) for path in judge or ()],
        encoder=encoder,
        parts=parts,
        phrases=phrases,
        batch=batch,
        device=device or "auto",
        data=data,
        captions=captions,
        seed=seed or 0,
        force=force,
    )
    lines = [] if json_ else [*_lines(run, record.get("explainers", [])), *record["notes"], *record.get("cautions", [])]
    emit(record, run=run, as_json=json_, lines=lines)


def _fractions(text: str) -> list[float]:
    from reidctl.errors import UsageError

    try:
        found = [float(word) / 100 for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < value <= 1 for value in found):
        raise UsageError(
            f"`--removed {text}` is no list of shares in percent, above 0 and at most 100.",
            hint="For instance 5,10,20.",
        )
    return found


def _lines(run: Path, order: list[str]) -> list[str]:
    """The explainer x metric table: each value, and its difference to an equal random area where there is one."""
    from reidctl import tables
    from reidctl.runs import Run

    path = Run(run).table("interpret", "interpretability")
    if not path.is_file():  # a record of an older version
        return []
    frame = tables.read_table(path, "interpretability")
    own = frame[(frame["judge"] == "") | (frame["metric"] == "alignment")]
    explainers = [name for name in dict.fromkeys([*order, *own["explainer"]]) if name in set(own["explainer"]) - {""}]
    cells = {
        heading: [_cell(own[own["explainer"] == name], metric, percents, control) for name in explainers]
        for heading, metric, percents, control in _COLUMNS
    }
    shown = [heading for heading, column in cells.items() if any(column)]
    if not shown:
        return _binding(frame)
    rows = [[name, *(cells[heading][place] or "-" for heading in shown)] for place, name in enumerate(explainers)]
    return [*table(["explainer", *shown], rows, _title(own, shown, rows)), *_binding(frame)]


def _title(frame: Any, shown: list[str], rows: list[list[str]]) -> str:
    """What the table shows, as far as it shows it."""
    said = ["Each value"]
    if any("(" in cell for row in rows for cell in row):
        said = [
            "Each value, and in brackets its difference to random patches of equal area (* = the 95 % interval over "
            "people excludes 0)"
        ]
    if frame["removed"].notna().any():
        fills = [name for name in dict.fromkeys(frame["fill"]) if name]
        said.append(f"Drops at {_at(frame):.0%} removed" + (f" and fill {fills[0]}" if len(fills) > 1 else ""))
    percents = [heading for heading, _, fraction, _ in _COLUMNS if fraction and heading in shown]
    if percents:
        said.append(f"Percent: {', '.join(percents)}")
    return ". ".join([*said, "All of it: interpret/interpretability.parquet"])


def _at(frame: Any) -> float:
    """The removed share that is shown: 20 %, or the nearest that was measured."""
    measured = sorted(set(frame["removed"].dropna().round(4)))
    return float(min(measured, key=lambda value: abs(value - _AT))) if measured else _AT


def _cell(frame: Any, metric: str, percents: bool, control: str) -> str:
    part = frame[frame["metric"] == metric]
    if not len(part):
        return ""
    if part["removed"].notna().any():
        part = part[(part["removed"].round(4) == round(_at(part), 4))]
    part = part[part["fill"] == part["fill"].iloc[0]]
    show = percent if percents else _plain
    value = part[part["kind"] == "value"]["value"]
    text = show(float(value.iloc[0])) if len(value) else "-"
    beside = part[(part["kind"] == "difference") & (part["control"] == control)]
    if not len(beside):
        return text
    row = beside.iloc[0]
    sure = "*" if row["low"] > 0 or row["high"] < 0 else ""
    sign = "+" if row["value"] >= 0 else ""
    return f"{text} ({sign}{show(float(row['value']))}{sure})"


def _binding(frame: Any) -> list[str]:
    found = {
        row.metric: row for row in frame[frame["kind"] == "value"].itertuples() if row.metric.startswith("binding.")
    }
    if not found:
        return []
    named = {"binding.swap": "the same words with two colours exchanged", "binding.random": "another person's caption"}
    return [
        f"The true caption beats {named[name]} in {percent(row.value)} % of {row.items} cases "
        f"[{percent(row.low)}, {percent(row.high)}]; chance is 50."
        for name, row in found.items()
    ]


def _plain(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"
