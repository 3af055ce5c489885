"""The formats that can be imported: the file names are the registry. Listing them loads no pandas."""

import difflib
import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reidctl import datasets
from reidctl.errors import UsageError

if TYPE_CHECKING:
    from reidctl.datasets.base import Draft, Options

_SHARED = frozenset({"base", "formats", "splits"})

Read = Callable[[Path, "Options"], "Draft"]


def format_names() -> list[str]:
    """The formats that can be imported; the file names are the registry, nothing is loaded."""
    found = (module.name for module in pkgutil.iter_modules(datasets.__path__))
    return sorted(name.replace("_", "-") for name in found if name not in _SHARED)


def reader(name: str) -> Read:
    """Return the function `read(root, options) -> Draft` of a format.

    Raises:
        UsageError: there is no such format.
    """
    return cast(Read, _module(name).read)


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
    return import_module(f"reidctl.datasets.{known.replace('-', '_')}")
