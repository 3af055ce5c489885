"""`reidctl evaluate`: retrieval metrics with intervals, what they must be compared with, and how they hold up."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, public, table, write
from reidctl.errors import GateError, UsageError

EPILOG = "Example:  reidctl evaluate --run runs/demo --min rank1=0.05"

_SETTINGS = (
    "identity-only, clothes-conflict, word-dropout, typos, truncation, paraphrase, blur, low-resolution, occlusion, "
    "illumination, blank"
)
FORMATS = ("text", "markdown", "latex")
_MEASUREMENT = re.compile(
    r"(?:((?:joint\.)?(?:t2i|i2i|it2i))\.)?((?:[a-z0-9:-]+/)?(?:rank[1-9]\d*|mAP|mINP|rSum))=(.+)"
)

Runs = list[Path] | None
Record = dict[str, Any]


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    split: Annotated[str | None, typer.Option(help="Which people: test (default) or val.")] = None,
    query: Annotated[
        str, typer.Option(help="What a text query is: caption, identity+clothing, identity or clothing.")
    ] = "caption",
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="t2i, i2i, it2i (image+text), single-shot (repeatable). Default: t2i and i2i."
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Also, of combined datasets: all queries in one gallery of all images.")
    ] = False,
    weight: Annotated[float, typer.Option(help="The image's share in an image+text query.", min=0, max=1)] = 0.5,
    ranks: Annotated[str | None, typer.Option(help="The k of rank-k, e.g. 1,5,10,50. Default: 1,5,10,20.")] = None,
    rerank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K1/K2/LAMBDA",
            help="Also k-reciprocal re-ranking k1/k2/lambda: 20/6/0.3 or 50/15/0.3; or pairwise/50: the first 50 "
            "images of each text by the model's match head (repeatable).",
        ),
    ] = None,
    slices: Annotated[
        bool, typer.Option("--slices", help="Also by camera, view, occlusion, caption length, ...")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Also robustness: all, or {_SETTINGS} (repeatable)."),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="How much robustness settings spoil; default: each its own.", min=0, max=1)
    ] = None,
    control: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run to put beside this one in the settings.")
    ] = None,
    against: Annotated[Path | None, typer.Option(metavar="RUN", help="A run to test against, query by query.")] = None,
    seeds: Annotated[
        Runs, typer.Option(metavar="RUN", help="A run that differs in the seed alone (repeatable): mean and std.")
    ] = None,
    epochs: Annotated[bool, typer.Option(help="Also every kept epoch: selected on val beside best on test.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also published numbers beside these.")] = False,
    matrix: Annotated[
        Runs,
        typer.Option(
            metavar="RUN", help="Only: these runs' models on each other's data (repeatable), written to --run."
        ),
    ] = None,
    embeddings: Annotated[
        Runs,
        typer.Option(metavar="FILE", help="Only: these tables (or .npz) of embeddings, of any program (repeatable)."),
    ] = None,
    normalise: Annotated[bool, typer.Option(help="Bring given embeddings to length 1.")] = False,
    minimum: Annotated[
        list[str] | None,
        typer.Option(
            "--min",
            metavar="METRIC=FLOOR",
            help="Exit 5 below this, e.g. rank1=0.7, i2i.mAP=0.4, typos/rank1=0.3 (repeatable).",
        ),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="How tables are printed: text, markdown or latex.")] = "text",
    device: o.Device = None,
    devices: o.Devices = None,
    data: o.Data = None,
    captions: o.Captions = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure retrieval on people the model never saw: text to image, and image to image where cameras are known."""
    gates = [_gate(text) for text in minimum or []]
    if format_ not in FORMATS:
        raise UsageError(f"`--format {format_}` is not known.", hint=f"One of: {', '.join(FORMATS)}.")
    cutoffs = _cutoffs(ranks)
    if control is not None and not setting:
        raise UsageError("`--control` is a part of the robustness settings.", hint="Add --setting all.")
    if level is not None and not setting:
        raise UsageError("`--level` is a part of the robustness settings.", hint="Add --setting typos, say.")
    analyses = {"--setting": setting, "--against": against, "--seeds": seeds, "--epochs": epochs, "--compare": compare}
    measured = {"--protocol": protocol, "--joint": joint, "--rerank": rerank, "--ranks": ranks, "--slices": slices}
    _alone("--matrix", matrix, {"--embeddings": embeddings, "--captions": captions, **measured, **analyses})
    own = {"--protocol": protocol, "--joint": joint, "--data": data, "--captions": captions}
    _alone("--embeddings", embeddings, {**own, "--setting": setting, "--epochs": epochs})
    pairs = [text for text in rerank or [] if text.split("/")[0] == "pairwise"]
    _alone("--embeddings", embeddings, {f"--rerank {text}": text for text in pairs})
    _alone("--normalise", normalise, {"a trained model": not embeddings})
    _alone("--devices", devices, {"--matrix": matrix, "--embeddings": embeddings})
    o.prepare(None, None, seed, quiet)
    o.spread(devices, device)
    from reidctl.cli import evaluate_tables as shown
    from reidctl.runs import Run

    here = Run(run)
    common: Record = {"device": device or "auto", "seed": seed or 0, "force": force}
    asked: Record = {**common, "split": split or "test", "query": query}
    where: Record = {"data": data, "captions": captions}
    if matrix:
        record = _matrix(here, matrix, data, asked)
        _finish(record, [], run, shown.matrix(record), format_, json_, gates)
        return
    if embeddings:
        record = _given(
            here, embeddings, rerank, {**common, "split": split, "cutoffs": cutoffs, "normalise": normalise}
        )
    else:
        measure: Record = {"measure": protocol or ("t2i", "i2i"), "weight": weight, "rerank": rerank or ()}
        measure["joint"] = joint
        # An analysis needs the evaluation that is there, whatever was measured besides the standard rows.
        reuse = any([slices, *analyses.values()]) and not (protocol or rerank or cutoffs or joint)
        record = _own(here, {**asked, **where, **measure, "cutoffs": cutoffs, "reuse": reuse})
        if not o.speaks():
            return
    drawn, also = shown.evaluated(record, short=format_ == "text"), []
    if slices:
        drawn += shown.sliced(record, _slices(here))
    if setting:
        also.append(_robustness(here, control, {**asked, **where, "settings": setting, "level": level}))
        drawn += shown.robustness(also[-1])
    if epochs:
        also.append(_epochs(here, {**asked, **where}))
        drawn += shown.epochs(also[-1])
    if seeds:
        also.append(_seeds(here, seeds, force))
        drawn += shown.seeds(also[-1])
    if against:
        also.append(_against(here, against, seed or 0, force))
        drawn += shown.against(also[-1])
    if compare:
        found = _published(here, record)
        record = {**record, "published": [part.as_dict() for part in found]}
        drawn += [shown.comparison(part) for part in found]
    _finish(record, also, run, drawn, format_, json_, gates)


def _matrix(run: Any, models: Sequence[Path], data: Path | None, asked: Record) -> Record:
    from reidctl.runs import Run
    from reidctl.stages import matrix

    return matrix.run(run, [Run(path) for path in models], datasets=[data] if data else [], **asked)


def _given(run: Any, files: Sequence[Path], rerank: Sequence[str] | None, asked: Record) -> Record:
    from reidctl.stages import embeddings

    return embeddings.run(run, files, rerank=rerank or (), **asked)


def _own(run: Any, asked: Record) -> Record:
    from reidctl.stages import evaluate

    return evaluate.run(run, **asked)


def _slices(run: Any) -> list[Record]:
    from reidctl import tables

    frame = tables.read_table(run.table("evaluate", "slices"), "slices")
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def _robustness(run: Any, control: Path | None, asked: Record) -> Record:
    from reidctl.runs import Run
    from reidctl.stages import robustness

    return robustness.run(run, control=Run(control) if control else None, **asked)


def _epochs(run: Any, asked: Record) -> Record:
    from reidctl.stages import epochs

    return epochs.run(run, **asked)


def _seeds(run: Any, others: Sequence[Path], force: bool) -> Record:
    from reidctl.runs import Run
    from reidctl.stages import seeds

    return seeds.run(run, [Run(path) for path in others], force=force)


def _against(run: Any, other: Path, seed: int, force: bool) -> Record:
    from reidctl.runs import Run
    from reidctl.stages import against

    return against.run(run, Run(other), seed=seed, force=force)


def _published(run: Any, record: Record) -> list[Any]:
    from reidctl.evaluation import comparison
    from reidctl.evaluation.protocols import JOINT

    context = comparison.context_of(run, record)
    # Nothing is published about a gallery that nobody else has.
    ours = JOINT if record["settings"].get("joint") else None
    return [
        comparison.compare(facts, dataset=facts["dataset"], direction=facts["direction"], context=context)
        for facts in record["tables"].values()
        if facts["direction"] in ("t2i", "i2i") and not facts["about"] and facts["dataset"] != ours
    ]


def _finish(
    record: Record,
    also: Sequence[Record],
    run: Path,
    drawn: Sequence[Mapping[str, Any]],
    format_: str,
    as_json: bool,
    gates: Sequence[tuple[str, str, float]],
) -> None:
    notes = list(dict.fromkeys(note for part in (record, *also) for note in part.get("notes", [])))
    if as_json or format_ == "text":
        nested = {part["stage"]: _public(part) for part in also}
        emit({**record, **nested}, run=run, as_json=as_json, lines=[*_lines(drawn), *notes])
    else:
        from reidctl.evaluation import render

        draw: Callable[..., str] = render.markdown if format_ == "markdown" else render.latex
        write(draw(list(drawn), notes=notes).rstrip("\n").split("\n"))
    _check(gates, record["metrics"], {part["stage"]: part["metrics"] for part in also})


def _public(record: Record) -> Record:
    """A further analysis inside the JSON object, without what is for the program itself."""
    kept = {key: value for key, value in public(record).items() if key not in ("version", "git_commit")}
    return {**kept, "outputs": list(record["outputs"])}


def _lines(drawn: Sequence[Mapping[str, Any]]) -> list[str]:
    from reidctl.evaluation.render import BANNER

    lines: list[str] = []
    for part in drawn:
        # A banner that says what cannot be compared is read before the numbers.
        banner = [note for note in part["notes"] if note.startswith(BANNER)]
        lines += [*banner, *table(part["columns"], part["rows"], part["title"])]
        lines += [note for note in part["notes"] if note not in banner]
    return lines


def _alone(name: str, value: Any, others: Mapping[str, Any]) -> None:
    """Refuse flags that a measurement of its own has no use for."""
    clash = [other for other, given in others.items() if value and given]
    if clash:
        raise UsageError(f"`{name}` cannot be combined with `{clash[0]}`.", hint="Call evaluate twice.")


def _cutoffs(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"`--ranks {text}` is not a list of whole numbers from 1.", hint="E.g. --ranks 1,5,10,50.")
    return sorted({int(part) for part in parts})


def _gate(text: str) -> tuple[str, str, float]:
    found = _MEASUREMENT.fullmatch(text)
    try:
        floor = float(found[3]) if found else -1.0
    except ValueError:
        floor = -1.0
    if found is None or not 0 <= floor <= (3 if found[2].endswith("rSum") else 1):
        raise UsageError(
            f"`--min {text}` is not METRIC=FRACTION.",
            hint="As tables write it, in fractions: rank1=0.7, i2i.mAP=0.4, rSum=2.1; with --setting typos/rank1=0.3; "
            "with --joint joint.t2i.mAP=0.3.",
        )
    return found[1] or "t2i", found[2], floor


def _check(
    gates: Sequence[tuple[str, str, float]], metrics: Mapping[str, Any], also: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare every floor with its value, and name all that are missed.

    Raises:
        GateError: a value is below its floor, or was not measured.
    """
    missed, unknown = [], []
    for direction, name, floor in gates:
        metric = name.removeprefix("standard/")
        held = (also.get("robustness", {}) if "/" in metric else metrics).get(direction, {})
        if metric not in held:
            unknown.append(f"{direction} {name} was not measured")
        elif not held[metric] >= floor:  # NaN is not above any floor
            missed.append(f"{direction} {name} is {held[metric]:.4f}, below the floor of {floor}")
    if missed or unknown:
        measured = "; ".join(f"{direction}: {', '.join(held)}" for direction, held in metrics.items())
        hint = f"Measured are {measured}. See --ranks, --protocol, --joint and --setting." if unknown else ""
        raise GateError("; ".join([*missed, *unknown]) + ".", hint=hint)
