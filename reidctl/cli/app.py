"""The Typer application: which commands there are. Importing it loads no heavy library."""

from typing import Annotated

import typer

from reidctl import __version__
from reidctl.cli import (
    analyse,
    caption,
    convert,
    data,
    doctor,
    evaluate,
    finetune,
    index,
    interpret,
    methods,
    prompt_stage,
    report,
    search,
    study,
)

app = typer.Typer(
    name="reidctl",
    help="Person re-identification by text and image: one command line from pixels to a tested report.",
    epilog="Example:  reidctl data synth --run runs/demo --people 60 && reidctl caption --run runs/demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reidctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.add_typer(data.app, name="data")
app.command("caption", epilog=caption.EPILOG)(caption.command)
app.command("prompt-stage", epilog=prompt_stage.EPILOG)(prompt_stage.command)
app.command("finetune", epilog=finetune.EPILOG)(finetune.command)
app.command("convert", epilog=convert.EPILOG)(convert.command)
app.command("index", epilog=index.EPILOG)(index.command)
app.command("search", epilog=search.EPILOG)(search.command)
app.command("evaluate", epilog=evaluate.EPILOG)(evaluate.command)
app.command("interpret", epilog=interpret.EPILOG)(interpret.command)
app.command("analyse", epilog=analyse.EPILOG)(analyse.command)
app.command("study", epilog=study.EPILOG)(study.command)
app.command("report", epilog=report.EPILOG)(report.command)
app.command("methods", epilog=methods.EPILOG)(methods.command)
app.command("doctor", epilog=doctor.EPILOG)(doctor.command)
