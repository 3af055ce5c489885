"""`reidctl data`: make a dataset or read one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import data_check, data_combine, data_degrade
from reidctl.cli import options as o
from reidctl.cli.output import emit, table
from reidctl.datasets.registry import format_names
from reidctl.errors import UsageError

app = typer.Typer(
    help="Make, import, check, combine or degrade a dataset.",
    epilog="Example:  reidctl data synth --run runs/demo --people 60",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("check", epilog=data_check.EPILOG)(data_check.check)
app.command("combine", epilog=data_combine.EPILOG)(data_combine.command)
app.command("degrade", epilog=data_degrade.EPILOG)(data_degrade.command)


@app.command("synth", epilog="Example:  reidctl data synth --run runs/demo --people 60 --images-per-person 4 --seed 1")
def synth(
    run: o.RunDir = o.DEFAULT_RUN,
    people: Annotated[int | None, typer.Option(help="Identities per dataset.")] = None,
    images_per_person: Annotated[int | None, typer.Option(help="Images of each identity.")] = None,
    size: Annotated[str | None, typer.Option(help="Image size as HEIGHTxWIDTH, e.g. 128x64.")] = None,
    domain: Annotated[str | None, typer.Option(help="Visual world: a, b, c or both (a and b).")] = None,
    variant: Annotated[str | None, typer.Option(help="standard or cloth-changing.")] = None,
    clone_pairs: Annotated[float | None, typer.Option(help="Look-alike pairs: a number, or a share below 1.")] = None,
    crossing: Annotated[int | None, typer.Option(help="Identities in both datasets (with --domain both).")] = None,
    captioned: Annotated[
        str | None, typer.Option(help="With --domain both: which dataset has captions: both, a or b.")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Also lay the dataset out as a public one, e.g. cuhk-pedes or msmt17:v2 (repeatable)."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that render; default: one per core.", min=1)] = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Render the synthetic benchmark: people with known attributes, parts and texts."""
    merged = o.prepare(recipe, set_, seed, quiet)
    given: dict[str, Any] = {
        "people": people,
        "images_per_person": images_per_person,
        "size": _size(size),
        "domain": domain,
        "variant": variant,
        "clone_pairs": int(clone_pairs) if clone_pairs is not None and clone_pairs.is_integer() else clone_pairs,
        "crossing": crossing,
        "captioned": captioned,
    }
    merged["synth"] = {**merged.get("synth", {}), **{k: v for k, v in given.items() if v is not None}}
    from reidctl.runs import Run
    from reidctl.stages import data_synth

    record = data_synth.run(Run(run), merged, layouts=layout or (), workers=workers, force=force)
    laid_out = [f"{name}: {path}" for name, path in record["layouts"].items()]
    emit(record, run=run, as_json=json_, lines=[*_counts(record), *laid_out])


@app.command("import", epilog="Example:  reidctl data import folder photos/ --run runs/mine")
def import_(
    format: Annotated[str, typer.Argument(help=f"One of: {', '.join(format_names())}.")],
    root: Annotated[Path, typer.Argument(help="The dataset's folder, or the CSV or Parquet file.")],
    run: o.RunDir = o.DEFAULT_RUN,
    carve_val: Annotated[
        int, typer.Option(help="Take this many people out of train as a validation split, where the set has none.")
    ] = 0,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the dataset in all ids (folder, csv-table); default: the folder's or file's."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that a table's image paths are relative to (csv-table).")
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            help="Table of texts that a model wrote from each image ALONE: columns image, identity, clothing "
            "(CSV, JSON lines or Parquet)."
        ),
    ] = None,
    fractions: Annotated[
        str | None, typer.Option(help="Shares of people in train,val,test where no split is given, e.g. 0.7,0.1,0.2.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave unreadable images out, counted, instead of stopping.")] = False,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read a public dataset, a folder of images or a CSV file; images stay where they are."""
    o.prepare(None, None, seed, quiet)
    from reidctl.runs import Run
    from reidctl.stages import data_import

    record = data_import.run(
        Run(run),
        format=format,
        root=root,
        seed=seed or 0,
        force=force,
        carve_val=carve_val,
        skip_bad=skip_bad,
        name=name,
        images=images,
        fractions=_fractions(fractions),
        descriptions=descriptions,
    )
    emit(record, run=run, as_json=json_, lines=_counts(record))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not all(part.isascii() and part.isdecimal() for part in (height, width)):
        raise UsageError(f"`--size {text}` is not HEIGHTxWIDTH.", hint="For example --size 128x64.")
    return int(height), int(width)


def _fractions(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`--fractions {text}` is not three numbers.", hint="For example 0.7,0.1,0.2.") from None
    return train, val, test


def _counts(record: dict[str, Any]) -> list[str]:
    rows = [
        [split, str(facts["people"]), str(facts["images"]), str(facts["captions"])]
        for split, facts in record["splits"].items()
    ]
    return table(["split", "people", "images", "captions"], rows) + [str(note) for note in record.get("notes", [])]
