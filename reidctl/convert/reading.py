"""The tensors of a published file under the names that its code gave them, without the wrappers around the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reidctl.backbones.checkpoints import Grid, read_tensors
from reidctl.errors import DataError

# DataParallel, and two ways in which trainers keep the model that they train.
_WRAPPERS = ("module.", "model.", "clip_model.", "net.")


@dataclass(frozen=True)
class Published:
    """A file as it was written.

    Attributes:
        path: of the file.
        weights: tensors by name; wrappers' prefixes that all names share are gone.
        wrappers: those prefixes, joined.
        grid: (h, w) of the position table, if the file says so.
        torchscript: whether it is OpenAI's TorchScript archive.
    """

    path: Path
    weights: Mapping[str, Tensor]
    wrappers: str = ""
    grid: Grid | None = None
    torchscript: bool = False


def read(path: Path) -> Published:
    """Return the tensors of a `.safetensors`, PyTorch or TorchScript file; nothing in it is run.

    Raises:
        DataError: no such file, not a file of weights, without any tensor, or one that would have to be unpickled.
    """
    found = read_tensors(path)
    if not found.weights:
        raise DataError(
            f"{path} holds no tensors by name.",
            hint="A state dict is needed, alone or under `model`, `state_dict` or `model_state_dict`.",
        )
    inner, wrappers = _unwrap(found.weights)
    return Published(path, inner, wrappers, found.grid, found.torchscript)


def _unwrap(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Take away prefixes that all names share."""
    inner, removed = dict(weights), ""
    while prefix := next((one for one in _WRAPPERS if all(name.startswith(one) for name in inner)), ""):
        inner = {name.removeprefix(prefix): value for name, value in inner.items()}
        removed += prefix
    return inner, removed
