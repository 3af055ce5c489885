"""`reidctl methods`: what can be trained."""

import json

from reidctl.cli import options as o
from reidctl.cli.output import table, write

EPILOG = "Example:  reidctl methods"


def command(json_: o.Json = False) -> None:
    """List the shipped recipes: what each trains and from which weights it starts."""
    from reidctl.config import load_recipe, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        rows.append([name, recipe["method"]["name"], recipe["backbone"]["spec"], str(recipe["about"])])
    if json_:
        keys = ("recipe", "method", "backbone", "about")
        write([json.dumps([dict(zip(keys, row, strict=True)) for row in rows])])
        return
    write(table(["recipe", "method", "starts from", "about"], rows))
