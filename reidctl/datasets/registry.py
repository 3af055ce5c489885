"""The formats that can be imported: the files in `formats/` are the registry. Listing them loads no pandas.

A format is a module with

    OPTIONS: frozenset[str]                                  the fields of `Options` that it heeds
    read(root: Path, options: Options) -> Draft              parse annotations or file names, open no image
    probe(root: Path) -> Probe | None                        None: nothing of this format here
    write(images, captions, source: Path, out: Path) -> Path lay a dataset out in this format; what `read` takes back
"""

import difflib
import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reidctl.datasets import formats
from reidctl.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from reidctl.datasets.base import Draft, Options, Probe

Read = Callable[[Path, "Options"], "Draft"]
Write = Callable[["pd.DataFrame", "pd.DataFrame", Path, Path], Path]


def format_names() -> list[str]:
    """The formats that can be imported; the file names are the registry, nothing is loaded."""
    found = (module.name for module in pkgutil.iter_modules(formats.__path__))
    return sorted(name.replace("_", "-") for name in found)


def reader(name: str) -> Read:
    """Return the function `read(root, options) -> Draft` of a format.

    Raises:
        UsageError: there is no such format.
    """
    return cast(Read, _module(name).read)


def writer(name: str) -> Write:
    """Return the function `write(images, captions, source, out) -> root` of a format, or of `FORMAT:VARIANT`.

    It lays the rows of ONE dataset (tables `images` and `captions`; image paths relative to `source`) out below the
    folder `out` and returns what `read` takes: a folder, or a file for tables. A format's `VARIANTS` are other files
    or folders in which it circulates.

    Raises:
        UsageError: there is no such format or variant.
    """
    format, colon, variant = name.partition(":")
    module = _module(format)
    variants: dict[str, Write] = getattr(module, "VARIANTS", {})
    if not colon:
        return cast(Write, module.write)
    if variant not in variants:
        raise UsageError(
            f"The format {format} has no layout `{variant}`.", hint=f"It has: {', '.join(variants) or 'none'}."
        )
    return variants[variant]


def layout_names() -> list[str]:
    """Every layout that can be written: the formats and their variants. Loads all formats."""
    names = format_names()
    return sorted([*names, *(f"{n}:{variant}" for n in names for variant in getattr(_module(n), "VARIANTS", {}))])


def probe(name: str, root: Path) -> "Probe | None":
    """Return what a format recognises in a folder; None if nothing.

    Raises:
        UsageError: there is no such format.
    """
    return cast("Probe | None", _module(name).probe(root))


def supported_options(name: str) -> frozenset[str]:
    """Return the options that a format heeds, besides `skip_bad` and `workers`."""
    return frozenset(_module(name).OPTIONS)


def _module(name: str) -> Any:
    names = format_names()
    known = name.replace("_", "-")
    if known not in names:
        close = difflib.get_close_matches(known, names, n=1, cutoff=0.5)
        hint = f"Did you mean `{close[0]}`?" if close else f"One of: {', '.join(names)}."
        raise UsageError(f"No dataset format `{name}`.", hint=hint)
    return import_module(f"reidctl.datasets.formats.{known.replace('-', '_')}")
