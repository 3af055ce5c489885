"""Reading other people's weights: files, downloads, key prefixes, position tables; nothing is unpickled."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reidctl.errors import DataError

Grid = tuple[int, int]
StateDict = dict[str, Tensor]

# Wrappers that training codes put around a CLIP: DistributedDataParallel, IRRA and its relatives, Lightning.
PREFIXES = ("module.", "base_model.", "clip_model.", "model.")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they lay in a file.

    Attributes:
        weights: tensors by name, wrapper prefixes removed.
        path: where they came from.
        grid: the position table's (h, w) if the file says so.
        torchscript: whether the file is OpenAI's original TorchScript archive.
        wrapped: whether a prefix was removed, so that other keys beside the backbone were dropped.
    """

    weights: StateDict
    path: Path
    grid: Grid | None = None
    torchscript: bool = False
    wrapped: bool = False


def read_checkpoint(path: Path, anchor: str) -> Checkpoint:
    """Return the weights in a `.safetensors` or PyTorch file.

    Args:
        path: the file.
        anchor: the name of a weight that must be there; what stands before it is a wrapper's prefix.

    Raises:
        DataError: no such file, not a weights file, pickled code in it, or the anchor is missing.
    """
    found = read_tensors(path)
    inner, prefix = _strip(found.weights, anchor)
    if anchor not in inner:
        first = ", ".join(list(found.weights)[:3]) or "nothing"
        raise DataError(f"{path} holds no `{anchor}` among its {len(found.weights)} tensors (first: {first}).",
                        hint="Is it a checkpoint of this kind of backbone?")  # fmt: skip
    return replace(found, weights=inner, wrapped=bool(prefix.replace("module.", "")))


def read_tensors(path: Path) -> Checkpoint:
    """Return the tensors in a `.safetensors`, PyTorch or TorchScript file under the names that they have there.

    Raises:
        DataError: no such file, not a weights file, or pickled code in it.
    """
    if not path.is_file():
        raise DataError(f"No weights file at {path}.", hint="Check the path.")
    if path.suffix == ".safetensors":
        weights, grid = _read_safetensors(path)
        return Checkpoint(weights, path, grid)
    if _is_torchscript(path):
        return Checkpoint(_read_torchscript(path), path, torchscript=True)
    return Checkpoint(_read_torch(path), path)


def _read_safetensors(path: Path) -> tuple[StateDict, Grid | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}.") from None
    match = re.fullmatch(r"(\d+)x(\d+)", metadata.get("grid", ""))
    return weights, (int(match[1]), int(match[2])) if match else None


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    try:
        # TorchScript's own reader builds tensors and modules only; the module's code is never called here.
        archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DataError(f"{path} is not a readable TorchScript archive: {str(error).splitlines()[0]}.") from None
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {name: value for name, value in archive.state_dict().items() if name not in sizes}


def _read_torch(path: Path) -> StateDict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if _first_bytes(path) not in (b"PK", b"\x80\x02"):
            raise DataError(f"{path} is not a PyTorch file.") from None
        raise DataError(
            f"{path} is not a plain table of tensors: reading it would run code stored in the file, so it was refused.",
            hint="Save its state_dict as .safetensors with the program that wrote it.",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise DataError(f"{path} is not a readable PyTorch file: {reason}.") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a table of tensors.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _strip(weights: StateDict, anchor: str) -> tuple[StateDict, str]:
    """Remove the prefix that stands before `anchor`, and the keys that do not share it."""
    prefix = ""
    while prefix + anchor not in weights:
        longer = next((p for p in PREFIXES if any(name.startswith(prefix + p) for name in weights)), None)
        if longer is None:
            return weights, ""
        prefix += longer
    if not prefix:
        return weights, ""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, prefix


def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str, *, ignore: tuple[str, ...] = ()) -> None:
    """Copy `weights` into `module`, all of them or none.

    Args:
        ignore: prefixes of names that the module does not need.

    Raises:
        DataError: names missing, names too many, or shapes that differ; with the counts and the first few of each.
    """
    own = module.state_dict()
    given = {name: value for name, value in weights.items() if name in own or not name.startswith(ignore)}
    problems = [
        _listing("missing", [name for name in own if name not in given]),
        _listing("unknown", [name for name in given if name not in own]),
        _listing("of another shape", [
            f"{name} {tuple(given[name].shape)} for {tuple(value.shape)}"
            for name, value in own.items() if name in given and given[name].shape != value.shape
        ]),
    ]  # fmt: skip
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise DataError(f"The weights in {where} do not fit the model: {found}.",
                        hint="Check the model name and image size in the backbone's spec.")  # fmt: skip
    module.load_state_dict(dict(given))


def _listing(what: str, names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{more})" if names else ""


def source_grid(rows: int, target: Grid, where: str, stated: Grid | None = None) -> Grid:
    """Return the (h, w) of a position table with `rows` patch rows.

    A stated grid wins. Otherwise a table that already has the target's number of rows is taken as it is,
    and any other must be square: a row count does not tell 24x8 from 16x12.

    Raises:
        DataError: the stated grid does not fit, or the table is not square and no grid is stated.
    """
    if stated is not None:
        if stated[0] * stated[1] != rows:
            raise DataError(f"{where}: a grid of {stated[0]}x{stated[1]} for a position table of {rows} patches.")
        return stated
    if rows == target[0] * target[1]:
        return target
    side = round(rows**0.5)
    if side * side != rows:
        raise DataError(
            f"{where}: its position table has {rows} patches, which is no square, and the file does not name its grid.",
            hint="Give `source_grid` (height, width in patches) for this backbone.",
        )
    return side, side


def resize_positions(table: Tensor, source: Grid, target: Grid, *, antialias: bool = True) -> Tensor:
    """Return a position table (1 + N, C) resampled to another patch grid; the class token's row stays.

    Bicubic, pixel centres aligned at half pixels. With `antialias` as open_clip does it, without as transformers.
    The same grid returns the same tensor.
    """
    if source == target:
        return table
    first, patches = table[:1], table[1:].float()
    field = patches.reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    field = F.interpolate(field, size=target, mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([first, field.flatten(2)[0].t().to(table.dtype)])


def resize_text_positions(table: Tensor, length: int) -> Tensor:
    """Return a text position table (L, C) for another context length.

    A shorter context takes the first rows. A longer one is interpolated linearly between them, first and last row
    staying at the ends; UFine6926's authors stretch CLIP's 77 positions to 168 so (their code was not at hand: the
    choice of linear with fixed ends is ours).
    """
    if length <= len(table):
        return table[:length]
    rows = table.float().t().unsqueeze(0)  # (1, C, L)
    return F.interpolate(rows, size=length, mode="linear", align_corners=True)[0].t().to(table.dtype)
