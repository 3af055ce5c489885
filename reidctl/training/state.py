"""The files of a training: its state after each epoch, and the weights that it keeps."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reidctl.errors import DataError
from reidctl.methods.base import Method, unique_state


def kept_epochs(folder: Path, fingerprint: str) -> dict[int, Path]:
    """Return the weights that a training kept (`keep_epochs`), by epoch from 1.

    Files of another training, and unreadable ones, are not among them.

    Args:
        folder: of the stage.
        fingerprint: of the training.
    """
    return {epoch: path for path, epoch in epoch_files(folder).items() if _fingerprint_of(path) == fingerprint}


def epoch_files(folder: Path) -> dict[Path, int]:
    """Return the files of kept epochs, whoever wrote them, with the number of each."""
    names = {path: re.fullmatch(r"epoch-(\d+)\.safetensors", path.name) for path in (folder / "epochs").glob("*")}
    return {path: int(match[1]) for path, match in sorted(names.items()) if match}


def _fingerprint_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as stream:
            return (stream.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError):
        return None


def save_whole(state: Mapping[str, Any], path: Path) -> None:
    """Write training state, whole or not at all, without a second copy in memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # PyTorch reports a full disk as a RuntimeError of its zip writer, and an interrupted one too.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise DataError(f"Cannot write {path}: {str(error).splitlines()[0]}.", hint="Is the disk full?") from None
    finally:
        # Gone after a success; an interrupt may come at any moment before.
        temporary.unlink(missing_ok=True)


def tensors(method: Method) -> dict[str, Tensor]:
    """Return the weights of a method on the CPU, each once."""
    return {name: value.detach().cpu().contiguous() for name, value in unique_state(method).items()}
