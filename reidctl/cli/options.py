"""Flags that the stages share, each with its help text."""

from pathlib import Path
from typing import Annotated, Any

import typer

RunDir = Annotated[
    Path,
    typer.Option("--run", envvar="REIDCTL_RUN", help="Run directory that holds all artifacts.", show_default=True),
]
Recipe = Annotated[str | None, typer.Option("--recipe", help="Recipe: a YAML file or the name of a shipped one.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one setting, e.g. train.epochs=5 (repeatable).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all random choices.", min=0)]
Force = Annotated[bool, typer.Option("--force", help="Do it again even if it is up to date.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder with images.parquet and captions.parquet; default: the run's own."),
]
Captions = Annotated[
    Path | None,
    typer.Option("--captions", help="Table of identity and clothing texts; default: the run's caption stage."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

DEFAULT_RUN = Path("runs/default")


def prepare(recipe: str | None, overrides: list[str] | None, seed: int | None, quiet: bool) -> dict[str, Any]:
    """Set up logging and return the merged recipe; `--seed` wins over the recipe's seed."""
    from reidctl import console
    from reidctl.config import load_recipe

    console.configure(quiet=quiet)
    merged = load_recipe(recipe, overrides or [])
    if seed is not None:
        merged["seed"] = seed
    merged.setdefault("seed", 0)
    return merged
