"""Flags that the stages share, each with its help text."""

import os
import sys
from collections.abc import Mapping
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
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        min=1,
        help="Share the work among this many devices of this machine. Not needed under torchrun or Slurm.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Only go on with a stopped training; refuse to begin anew.")]

DEFAULT_RUN = Path("runs/default")


def spread(devices: int | None, device: str | None) -> None:
    """Start the command once per device and leave with its exit code; nothing for one device, or where one started it.

    Raises:
        UsageError: there are fewer devices, or a launcher started another number of processes.
    """
    if devices is None:
        return
    from reidctl import parallel
    from reidctl.device import resolve_device
    from reidctl.errors import UsageError

    started = parallel.announced().world
    if started > 1:
        if started != devices:
            raise UsageError(
                f"--devices {devices} was asked for, but a launcher started {started} processes.",
                hint="Leave --devices out under torchrun or Slurm.",
            )
        return
    if devices == 1:
        return
    found = resolve_device(device or "auto")
    if found.index is not None:
        raise UsageError(
            f"--device {device} names one device, --devices asks for {devices}.", hint="Say --device cuda."
        )
    parallel.require_devices(found.type, devices)
    from reidctl.cli import devices as processes

    raise typer.Exit(processes.launch(devices, processes.without_devices(sys.argv[1:])))


def train_device(recipe: Mapping[str, Any], section: str) -> str | None:
    """Return the device that a recipe's section names, if any."""
    found = dict(recipe.get(section) or {}).get("device")
    return None if found is None else str(found)


def prepare(recipe: str | None, overrides: list[str] | None, seed: int | None, quiet: bool) -> dict[str, Any]:
    """Set up logging and return the merged recipe; `--seed` wins over the recipe's seed."""
    from reidctl import console
    from reidctl.config import load_recipe

    # Of several processes one speaks.
    console.configure(quiet=quiet or not speaks())
    merged = load_recipe(recipe, overrides or [])
    if seed is not None:
        merged["seed"] = seed
    merged.setdefault("seed", 0)
    return merged


def speaks() -> bool:
    """Whether this process is the first of those that a launcher started; without loading torch where none did."""
    if not {"RANK", "SLURM_PROCID"} & set(os.environ):
        return True
    from reidctl import parallel

    return parallel.announced().rank == 0
