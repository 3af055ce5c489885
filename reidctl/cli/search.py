"""`reidctl search`: rank the indexed images for a sentence or an image."""

from pathlib import Path
from typing import Annotated

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, table

EPILOG = 'Example:  reidctl search "a woman in a red coat with a backpack" --run runs/demo --top 5 --save sheet.png'


def command(
    text: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(help="Look for the person in this image instead.")] = None,
    run: o.RunDir = o.DEFAULT_RUN,
    top: Annotated[int, typer.Option(help="How many results.", min=1)] = 10,
    save: Annotated[Path | None, typer.Option(help="Also write the results as a picture (PNG).")] = None,
    rerank: Annotated[
        int | None,
        typer.Option(metavar="K", help="Let the match head of a pairwise model order the first K items.", min=2),
    ] = None,
    device: o.Device = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Find the indexed images that fit a sentence, or that show the person in an image."""
    o.prepare(None, None, None, quiet)
    from reidctl.runs import Run
    from reidctl.stages import search

    record = search.run(Run(run), text=text, image=image, top=top, save=save, rerank=rerank, device=device or "auto")
    rows = [
        [str(hit["rank"]), f"{hit['score']:.4f}", hit["image_id"], hit["person_id"], hit["path"]]
        for hit in record["results"]
    ]
    emit(record, run=run, as_json=json_, lines=table(["rank", "score", "image", "person", "file"], rows))
