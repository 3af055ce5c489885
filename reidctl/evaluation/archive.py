"""NumPy archives of embeddings, as `numpy.savez` writes them, with one row of features per item:

    gallery_features (G, D)  gallery_pids (G,)  [gallery_ids, gallery_camids, gallery_outfits]
    query_features   (Q, D)  query_pids   (Q,)  [query_ids, query_camids, query_outfits]      images as queries
    text_features    (T, D)  text_pids    (T,)  [text_ids]                                    sentences as queries
    [dataset] [split] [model]                                                                 one text each

A negative or empty camera is an unknown one. Archives come from anywhere: nothing is unpickled, and every header is
checked, against the others and against the size of its member, before an array is loaded.
"""

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError
from reidctl.retrieval.store import Piece, Source

Objects = npt.NDArray[np.object_]

PREFIXES = {"text": ("query", "text"), "query": ("query", "image"), "gallery": ("gallery", "image")}
_COLUMNS = {"ids": "item_id", "camids": "camera_id", "outfits": "outfit_id"}
_FACTS = ("dataset", "split", "model")
_BLOCK = 1 << 22  # numbers of a feature array at a time
_LONGEST = 1 << 14  # bytes of one label; more is no label, but makes a small archive a large array
_HOW = "Save plain arrays: numpy.savez(file, query_features=q, query_pids=p, gallery_features=g, gallery_pids=o)."
# RuntimeError is an encrypted member and, as NotImplementedError, an unknown compression.
_UNREADABLE = (
    *(OSError, ValueError, EOFError, LookupError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    kind: np.dtype[Any]


def archive_source(path: Path) -> tuple[Source, str | None]:
    """Return an archive as a source, and the model that it says its vectors are from.

    Raises:
        DataError: a file that cannot be read, an unknown or missing array, or one of the wrong shape or type.
    """
    if not path.is_file():
        raise DataError(f"No archive of embeddings at {path}.")
    with _legible(path), zipfile.ZipFile(path) as archive:
        headers = _headers(path, archive)
        _check_names(path, set(headers))
        _check_features(path, headers)
        _check_labels(path, headers)
        small = {name: _loaded(archive, name) for name in headers if not name.endswith("_features")}
    facts = {name: str(_texts(small[name].reshape(-1))[0]) for name in _FACTS if name in small}
    counts = {prefix: headers[f"{prefix}_features"].shape[0] for prefix in PREFIXES if f"{prefix}_features" in headers}
    parts = [_rows(prefix, count, small, facts) for prefix, count in counts.items()]
    rows = pd.concat(parts, ignore_index=True)
    return Source(str(path), rows, _pieces(path, list(counts))), facts.get("model")


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    """Turn what a damaged or foreign archive causes into an error that names it."""
    try:
        yield
    except _UNREADABLE as error:
        what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read: {what}.", hint=_HOW) from None


def _headers(path: Path, archive: zipfile.ZipFile) -> dict[str, _Header]:
    """The header of every member, which is an array and as large as its header says."""
    found: dict[str, _Header] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename or name in found:
            wrong = " twice" if name in found else ", which is no NumPy array (.npy)"
            raise DataError(f"{path} holds {member.filename}{wrong}.", hint=_HOW)
        with archive.open(member) as stream:
            header = found[name] = _header(path, name, stream)
            needed, held = prod(header.shape) * header.kind.itemsize, member.file_size - stream.tell()
        if header.kind.hasobject:
            raise DataError(f"{path}: {name} holds Python objects, which are not unpickled.", hint=_HOW)
        if min(header.shape, default=0) < 0 or needed != held:
            raise DataError(
                f"{path}: {name} is damaged: {header.kind} of shape {header.shape} needs {needed:,} bytes, and there "
                f"are {held:,}.",
                hint="Save it again.",
            )
    return found


def _header(path: Path, name: str, stream: IO[bytes]) -> _Header:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return _Header(*read(stream))
    # All that parsing a damaged header as Python can raise; what reading raises is left to `_legible`.
    except (ValueError, TypeError, SyntaxError, LookupError, RecursionError, tokenize.TokenError) as error:
        what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path}: {name} is no NumPy array: {what}.", hint=_HOW) from None


def _check_names(path: Path, names: set[str]) -> None:
    known = {f"{prefix}_{kind}" for prefix in PREFIXES for kind in ("features", "pids", *_COLUMNS)} | {*_FACTS}
    unknown = sorted(names - known)
    if unknown:
        raise DataError(
            f"{path} holds the unknown array(s) {', '.join(unknown)}.", hint=f"Known: {', '.join(sorted(known))}."
        )
    prefixes = {name.split("_")[0] for name in names if "_" in name}
    missing = [f"{prefix}_{kind}" for prefix in sorted(prefixes) for kind in ("features", "pids")]
    missing = [name for name in missing if name not in names]
    if missing or not prefixes:
        raise DataError(f"{path} lacks the array(s) {', '.join(missing) or 'gallery_features, ...'}.", hint=_HOW)
    cameras = [side for side in ("query", "gallery") if f"{side}_camids" in names]
    if {"query", "gallery"} <= prefixes and len(cameras) == 1:
        raise DataError(
            f"{path} holds {cameras[0]}_camids alone: nothing could be said to be of the same camera.",
            hint="Save query_camids and gallery_camids, or neither.",
        )


def _check_features(path: Path, headers: Mapping[str, _Header]) -> None:
    widths = {}
    for name, header in headers.items():
        if not name.endswith("_features"):
            continue
        shape, kind = header.shape, header.kind
        if len(shape) != 2 or shape[1] == 0 or kind.kind != "f":
            raise DataError(
                f"{path}: {name} has shape {shape} and type {kind}.", hint="Features are floats, one row each."
            )
        if header.fortran and min(shape) > 1:
            raise DataError(
                f"{path}: {name} is stored column by column.", hint="Save numpy.ascontiguousarray(features)."
            )
        widths[name] = shape[1]
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} has width {width}" for name, width in widths.items())
        raise DataError(f"{path}: {said}.", hint="Queries and gallery must be embedded by one model.")


def _check_labels(path: Path, headers: Mapping[str, _Header]) -> None:
    for name, header in headers.items():
        if name.endswith("_features"):
            continue
        features = f"{name.split('_')[0]}_features"
        if name in _FACTS and prod(header.shape) != 1:
            raise DataError(f"{path}: {name} has shape {header.shape}.", hint="Save one text.")
        if name not in _FACTS and header.shape != headers[features].shape[:1]:
            raise DataError(
                f"{path}: {name} has shape {header.shape}, but {features} has {headers[features].shape[0]} row(s).",
                hint="One value per feature row.",
            )
        if header.kind.kind not in "iufUS" or header.kind.itemsize > _LONGEST:
            raise DataError(f"{path}: {name} has type {header.kind}.", hint="Save whole numbers or short texts.")


def _loaded(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _rows(prefix: str, count: int, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, str]) -> pd.DataFrame:
    """The labels of one side."""
    role, modality = PREFIXES[prefix]
    dataset = facts.get("dataset") or "given"
    texts = {kind: _texts(arrays[name]) if (name := f"{prefix}_{kind}") in arrays else None for kind in _COLUMNS}
    ids, cameras = texts["ids"], texts["camids"]
    if cameras is not None:
        cameras = np.array([None if value == "" or value.startswith("-") else value for value in cameras], object)
    return pd.DataFrame(
        {
            "item_id": np.array([f"{prefix}{row}" for row in range(count)], object) if ids is None else ids,
            "role": role,
            "modality": modality,
            "condition": "standard",
            "dataset": dataset,
            "split": facts.get("split") or "test",
            "person_id": np.array([f"{dataset}:{p}" if p else "" for p in _texts(arrays[f"{prefix}_pids"])], object),
            "camera_id": cameras,
            "outfit_id": texts["outfits"],
        }
    )


def _texts(values: npt.NDArray[Any]) -> Objects:
    """Numbers as whole numbers where they are, texts as they are, NaN as an empty text."""
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.round(values))
        found = [str(int(v)) if w else "" if np.isnan(v) else str(v) for v, w in zip(values, whole, strict=True)]
        return np.array(found, dtype=object)
    if values.dtype.kind == "S":
        return np.array([value.decode("utf-8", "replace") for value in values.tolist()], dtype=object)
    return np.array([str(value) for value in values.tolist()], dtype=object)


def _pieces(path: Path, prefixes: list[str]) -> Iterator[Piece]:
    """The features of all sides, block by block, without a second copy of the whole."""
    with _legible(path), zipfile.ZipFile(path) as archive:
        for name in (f"{prefix}_features" for prefix in prefixes):
            with archive.open(f"{name}.npy") as stream:
                header = _header(path, name, stream)
                count, width = header.shape
                step = max(1, _BLOCK // width)
                for start in range(0, count, step):
                    size = min(step, count - start)
                    raw = stream.read(size * width * header.kind.itemsize)
                    if len(raw) != size * width * header.kind.itemsize:
                        raise DataError(f"{path}: {name} is cut short.", hint="Save it again.")
                    values = np.frombuffer(raw, header.kind).astype(np.float32, copy=False)
                    yield np.full(size, width), values
