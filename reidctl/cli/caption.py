"""`reidctl caption`: an identity and a clothing text per image."""

from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, table

EPILOG = "Example:  reidctl caption --run runs/demo --mllm template"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    mllm: Annotated[
        str | None,
        typer.Option(
            help="Who writes: template (from attribute tables), replay:FILE, command:PROGRAM, gpt-4 or another OpenAI "
            "model. Images leave this machine only with an OpenAI model or a --base-url elsewhere."
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, e.g. vLLM.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    styles: Annotated[
        str | None,
        typer.Option(help="Style clustering: dbscan, hdbscan, kmeans, gmm, agglomerative, random or none."),
    ] = None,
    data: o.Data = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Let a language model write two texts per image, in the writing styles of the train captions."""
    merged = o.prepare(recipe, set_, seed, quiet)
    section: dict[str, Any] = dict(merged.get("caption") or {})
    section |= {k: v for k, v in {"mllm": mllm, "limit": limit}.items() if v is not None}
    remote = {k: v for k, v in {"base_url": base_url, "concurrency": concurrency}.items() if v is not None}
    if remote:
        section["remote"] = {**section.get("remote", {}), **remote}
    if styles is not None:
        section["style"] = {**section.get("style", {}), "algorithm": styles}
    merged["caption"] = section
    from reidctl.runs import Run
    from reidctl.stages import caption

    record = caption.run(Run(run), merged, data=data, force=force)
    emit(record, run=run, as_json=json_, lines=_lines(record))


def _lines(record: dict[str, Any]) -> list[str]:
    rows = [
        [kind, *(str(counts.get(status, 0)) for status in ("ok", "rejected", "failed"))]
        for kind, counts in record["texts"].items()
    ]
    styles = record["styles"]
    note = f"{styles['count']} styles by {styles['algorithm']}; written by {record['model']}"
    return [*table(["text", "ok", "rejected", "failed"], rows), note]
