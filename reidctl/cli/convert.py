"""`reidctl convert`: read a published checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit

EPILOG = "Example:  reidctl convert best.pth --run runs/irra --from irra"


def command(
    file: Annotated[Path, typer.Argument(help="The checkpoint: .pth, .pt, .bin, .safetensors or OpenAI's archive.")],
    run: o.RunDir = o.DEFAULT_RUN,
    form: Annotated[
        str,
        typer.Option(
            "--from", help="Whose code wrote it: auto, irra, rde, clip-reid, mllm4text, open-clip or mta-clip."
        ),
    ] = "auto",
    persons: Annotated[
        int | None, typer.Option(help="Number of training people, where the file has no head that tells.", min=1)
    ] = None,
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width in pixels; default: what its code trains with, or a square."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Step between patches in pixels; default: what its positions fit.", min=1)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The towers by open_clip's name, e.g. ViT-B-16; default: by their shapes.")
    ] = None,
    cameras: Annotated[
        str | None,
        typer.Option(help="Names of its cameras in the file's order, e.g. market-1501/c1,market-1501/c2 (CLIP-ReID)."),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="A CLIP file with the table of words, which CLIP-ReID's files lack.")
    ] = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read a published checkpoint as the trained model of a run. Nothing in it is executed."""
    o.prepare(None, None, None, quiet)
    from reidctl.runs import Run
    from reidctl.stages import convert

    names = tuple(name.strip() for name in cameras.split(",")) if cameras else ()
    asked = convert.Options(form, model, image_size, stride, persons, names, words)
    record = convert.run(Run(run), file, asked, force=force)
    emit(record, run=run, as_json=json_, lines=_lines(record, file, run))


def _lines(record: dict[str, Any], file: Path, run: Path) -> list[str]:
    towers, dropped, initial = record["towers"], record["dropped"], record["initial"]
    size, grid = ("x".join(map(str, towers[name])) for name in ("image_size", "grid"))
    people = f", {record['train_people']:,} training people" if record["train_people"] else ""
    lines = [
        f"{file} is {record['form']}: {record['method']}, {record['parameters'] / 1e6:.2f} M parameters{people}",
        f"towers: {towers['spec']}, {size} pixels, {grid} patches with a step of {towers['stride']}, "
        f"{towers['activation']}",
        f"tensors: {record['taken']} taken, {len(dropped)} dropped, {len(initial)} missing",
        *(f"  dropped {name}: {reason}" for name, reason in dropped.items()),
        *(f"  missing {name}: as in an untrained model" for name in initial),
    ]
    towards = dict(record["to_train"])
    name = towards.pop("method")
    settings = [f"--set 'backbone.{key}={value}'" for key, value in {"start": run, **towards}.items()]
    return [*lines, f"to train on: reidctl finetune --method {name} {' '.join(settings)} --run ANOTHER"]
