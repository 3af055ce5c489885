"""Paths that a file of the user dictates: inside the dataset's folder, or refused in a sentence that is true."""

import os
import re
from pathlib import Path

from reidctl.datasets.base import safe_join
from reidctl.errors import DataError

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def inside(root: Path, text: str, where: str) -> Path:
    """Return what `base.safe_join` does, which refuses any `..` and any absolute path.

    Raises:
        DataError: as `safe_join`; a path of Windows, and one that would lead inside after all, have their own sentence.
    """
    if _WINDOWS.match(text.strip()):
        raise DataError(f"{where}: {text[:200]!r} is an absolute path of Windows.", hint=_hint(root))
    try:
        return safe_join(root, text, where)
    except DataError:
        if not _ends_inside(root, text):
            raise
        what = "paths must be relative to the folder; `..` and absolute paths are not allowed"
        raise DataError(f"{where}: {what} (got {text[:200]!r}).", hint=_hint(root)) from None


def _hint(root: Path) -> str:
    return f"Write the path as it continues below {root}, with no folder above it."


def _ends_inside(root: Path, text: str) -> bool:
    name = text.strip().replace("\\", "/")
    if not name or "\0" in name:
        return False
    bases = {root.absolute(), root.resolve()}
    return any(base in Path(os.path.normpath(base / name)).parents for base in bases)
