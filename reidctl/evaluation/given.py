"""Embeddings that another program made: tables and NumPy archives as protocols, without a model and without images.

Two kinds of files are read. A Parquet table `embeddings` (docs/evaluation.md), optionally with a column `outfit_id`. Or
an archive that `numpy.savez` wrote, with one row of features per item:

    gallery_features (G, D)  gallery_pids (G,)  [gallery_ids, gallery_camids, gallery_outfits]
    query_features   (Q, D)  query_pids   (Q,)  [query_ids, query_camids, query_outfits]      images as queries
    text_features    (T, D)  text_pids    (T,)  [text_ids]                                    sentences as queries
    [dataset] [split] [model]                                                                 one text each

Nothing is unpickled. A person of -1 is junk (Market-1501's convention): its items are dropped and counted; person 0
are distractors, which stay. A negative or empty camera is an unknown one.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation.protocols import Protocol, Side
from reidctl.retrieval import store
from reidctl.retrieval.labels import Exclude
from reidctl.retrieval.store import EmbeddingTable, Piece, Source

Objects = npt.NDArray[np.object_]

PREFIXES = {"text": ("query", "text"), "query": ("query", "image"), "gallery": ("gallery", "image")}
_COLUMNS = {"ids": "item_id", "camids": "camera_id", "outfits": "outfit_id"}
_FACTS = ("dataset", "split", "model")
_BLOCK = 1 << 22
_HOW = "Save plain arrays: numpy.savez(file, query_features=q, query_pids=p, gallery_features=g, gallery_pids=o)."
_NORMALISE = (
    "Divide every vector by its own length (features / numpy.linalg.norm(features, axis=1, keepdims=True)), "
    "or ask for it with --normalise."
)


@dataclass(frozen=True)
class Given:
    """What files of embeddings hold.

    Args:
        table: all vectors; `rows` may have `outfit_id`.
        models: by file, the digest of the model that made its vectors, None where the file does not say.
        notes: what was changed or dropped while reading.
    """

    table: EmbeddingTable
    models: dict[str, str | None]
    notes: tuple[str, ...]


def read_given(files: Sequence[Path], *, normalise: bool = False) -> Given:
    """Return the vectors of all files in one matrix, checked.

    Args:
        files: Parquet tables and NumPy archives.
        normalise: divide vectors by their lengths instead of refusing those that are not of length 1.

    Raises:
        DataError: a file that cannot be read, rows or files of different width, NaN, a zero vector, a length other
            than 1, an item twice, a missing person, an unknown role or modality, or files made by different models.
    """
    sources, models, notes = [], {}, []
    for path in files:
        if path.suffix == ".npz":
            source, model, said = _archive(path)
        else:
            source, model, said = store.parquet_source(path, extra=("outfit_id",)), tables.footer(path).get("model"), []
        sources.append(source)
        models[str(path)] = None if model is None else str(model)
        notes += said
        _check_labels(source)
    _check_models(sources, models)
    table = store.gather(sources)
    sizes = [(source.name, len(source.rows)) for source in sources]
    notes += _unit_length(table, sizes, normalise)
    store.check_ids(table.rows, sizes)
    silent = [name for name, model in models.items() if model is None]
    if silent and len(silent) < len(models):
        notes.append(f"{', '.join(silent)} does not say which model made it; nothing could be compared.")
    return Given(table, models, tuple(notes))


def _unit_length(table: EmbeddingTable, sizes: Sequence[tuple[str, int]], normalise: bool) -> list[str]:
    norms = tables.norms_of(table.vectors)
    store.check_norms(table.rows, norms, sizes)
    if not normalise:
        store.check_lengths(table.rows, norms, sizes, hint=_NORMALISE)
        return []
    store.normalise(table.vectors, norms)
    if not len(norms):
        return []
    return [f"The vectors were divided by their lengths, which were {norms.min():.4g} to {norms.max():.4g}."]


def _check_labels(source: Source) -> None:
    """Refuse rows that nothing can be done with; all are named by their first row."""
    rows = source.rows
    for column, known in (("role", ("query", "gallery")), ("modality", ("text", "image"))):
        _refuse(source, ~rows[column].isin(known), column, f"Known: {', '.join(known)}.")
    empty = rows["person_id"].isna() | (rows["person_id"] == "")
    _refuse(source, empty, "person_id", "Without people nothing can be counted as right or wrong.")


def _refuse(source: Source, wrong: "pd.Series[bool]", column: str, hint: str) -> None:
    found = np.flatnonzero(wrong.to_numpy())
    if len(found):
        row = int(found[0])
        value = source.rows[column].iloc[row]
        raise DataError(
            f"{source.name}: row {row} ({source.rows['item_id'].iloc[row]}) has the {column} "
            f"`{'' if pd.isna(value) else value}`; {len(found)} such row(s).",
            hint=hint,
        )


def _check_models(sources: Sequence[Source], models: dict[str, str | None]) -> None:
    said = [(source, model) for source in sources if (model := models[source.name]) is not None]
    for source, model in said[1:]:
        first, other = said[0]
        if model != other:
            raise DataError(
                f"{_whose(first)} were embedded by model {other[:12]}, {_whose(source)} by model {model[:12]}.",
                hint="Cosines between vectors of two models mean nothing; embed both sides with one.",
            )


def _whose(source: Source) -> str:
    roles = set(source.rows["role"].unique())
    what = {frozenset({"query"}): "the queries", frozenset({"gallery"}): "the gallery"}
    return f"{what.get(frozenset(roles), 'the items')} in {source.name}"


def _archive(path: Path) -> tuple[Source, str | None, list[str]]:
    if not path.is_file():
        raise DataError(f"No archive of embeddings at {path}.")
    with _legible(path), zipfile.ZipFile(path) as members, np.load(path, allow_pickle=False) as archive:
        names = set(archive.files)
        _check_names(path, names)
        small = {name: archive[name] for name in archive.files if not name.endswith("_features")}
        rows_of = {}
        for name in sorted(names - set(small)):
            with members.open(f"{name}.npy") as stream:
                rows_of[name] = _array_header(path, name, stream)[0][0]
    facts = {name: str(small[name]) for name in _FACTS if name in small and small[name].ndim == 0}
    parts, kept = [], {}
    for prefix in PREFIXES:
        if f"{prefix}_features" in names:
            frame, keep = _labels(path, prefix, rows_of[f"{prefix}_features"], small, facts)
            parts.append(frame)
            kept[f"{prefix}_features"] = keep
    rows = pd.concat(parts, ignore_index=True)
    junk = sum(int((~keep).sum()) for keep in kept.values())
    notes = [f"{path}: {junk} item(s) with person -1 are junk and were dropped."] if junk else []
    return Source(str(path), rows, _pieces(path, kept)), facts.get("model"), notes


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    """Turn what a damaged archive causes into an error that names it."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read: {what}.", hint=_HOW) from None


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


def _labels(
    path: Path, prefix: str, count: int, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, str]
) -> tuple[pd.DataFrame, npt.NDArray[np.bool_]]:
    """The rows of one side without junk, and which of all rows they are."""
    role, modality = PREFIXES[prefix]
    dataset = facts.get("dataset", "given")
    texts = {}
    for kind in ("pids", *_COLUMNS):
        values = arrays.get(f"{prefix}_{kind}")
        if values is not None and values.shape != (count,):
            raise DataError(
                f"{path}: {prefix}_{kind} has shape {values.shape}, but {prefix}_features has {count} row(s).",
                hint="One value per feature row.",
            )
        texts[kind] = _texts(values) if values is not None else None
    people = texts.pop("pids")
    assert people is not None
    keep = np.asarray(people != "-1")
    ids = np.array([f"{prefix}{row}" for row in range(count)], dtype=object)
    cameras = texts["camids"]
    if cameras is not None:
        cameras = np.array([None if value == "" or value.startswith("-") else value for value in cameras], object)
    frame = pd.DataFrame(
        {
            "item_id": texts["ids"] if texts["ids"] is not None else ids,
            "role": role,
            "modality": modality,
            "condition": "standard",
            "dataset": dataset,
            "split": facts.get("split", "test"),
            "person_id": np.array([f"{dataset}:{person}" if person else "" for person in people], object),
            "camera_id": cameras,
            "outfit_id": texts["outfits"],
        }
    )
    return frame[keep].reset_index(drop=True), keep


def _texts(values: npt.NDArray[Any]) -> Objects:
    """Numbers as whole numbers where they are, texts as they are, NaN as an empty text."""
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.round(values))
        found = [str(int(v)) if w else "" if np.isnan(v) else str(v) for v, w in zip(values, whole, strict=True)]
        return np.array(found, dtype=object)
    if values.dtype.kind == "S":
        return np.array([value.decode("utf-8", "replace") for value in values.tolist()], dtype=object)
    return np.array([str(value) for value in values.tolist()], dtype=object)


def _array_header(path: Path, name: str, stream: Any) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and type of a feature array, checked."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(stream)
    if len(shape) != 2 or kind.kind != "f":
        raise DataError(f"{path}: {name} has shape {shape} and type {kind}.", hint="Features are floats, one row each.")
    if fortran and min(shape) > 1:
        raise DataError(f"{path}: {name} is stored column by column.", hint="Save numpy.ascontiguousarray(features).")
    return (int(shape[0]), int(shape[1])), kind


def _pieces(path: Path, kept: dict[str, npt.NDArray[np.bool_]]) -> Iterator[Piece]:
    """The features of all sides, block by block, without a second copy of the whole."""
    with _legible(path), zipfile.ZipFile(path) as archive:
        for name, keep in kept.items():
            with archive.open(f"{name}.npy") as stream:
                (count, width), kind = _array_header(path, name, stream)
                step = max(1, _BLOCK // max(1, width))
                for start in range(0, count, step):
                    size = min(step, count - start)
                    raw = stream.read(size * width * kind.itemsize)
                    if len(raw) != size * width * kind.itemsize:
                        raise DataError(f"{path}: {name} is cut short.", hint="Save it again.")
                    values = np.frombuffer(raw, kind).reshape(size, width)[keep[start : start + size]]
                    yield np.full(len(values), width), np.asarray(values, np.float32).reshape(-1)


def protocols_of(table: EmbeddingTable, *, split: str) -> tuple[list[Protocol], list[str]]:
    """Return the protocols that the rows of one split allow, by dataset, direction and condition, with notes.

    Text queries are searched among all gallery images (t2i), image queries likewise without the images of the same
    person from the same camera (i2i). `standard` comes first. Under another condition each side uses its vectors of
    that condition if it has any, else its standard ones.

    Raises:
        DataError: a dataset without queries or gallery, no standard vectors, or an item that is one person as query
            and another in the gallery.
    """
    rows = table.rows
    here = (rows["split"] == split).to_numpy()
    asked = here & (rows["role"] == "query").to_numpy()
    gallery = here & ((rows["role"] == "gallery") & (rows["modality"] == "image")).to_numpy()
    if not asked.any() or not gallery.any():
        lacking = "role query" if not asked.any() else "role gallery and modality image"
        raise DataError(f"No rows with {lacking} in split {split}.", hint="Give both sides, in one file or in several.")
    found: list[Protocol] = []
    notes: list[str] = []
    for dataset in sorted(set(rows["dataset"][here])):
        mine = (rows["dataset"] == dataset).to_numpy()
        if not (mine & asked).any():
            notes.append(f"{dataset}: no queries, so its {(mine & gallery).sum():,} gallery images are left out.")
            continue
        ignored = int((mine & here & ~gallery & ~asked).sum())
        if ignored:
            notes.append(f"{dataset}: {ignored:,} text(s) with role gallery are left out; only images are searched.")
        found += _of_dataset(table, mine & asked, mine & gallery, str(dataset), split)
    return found, notes


def _of_dataset(
    table: EmbeddingTable, asked: npt.NDArray[np.bool_], gallery: npt.NDArray[np.bool_], dataset: str, split: str
) -> list[Protocol]:
    if not gallery.any():
        raise DataError(
            f"{dataset}, split {split}: no rows with role gallery and modality image.",
            hint="Queries are searched in the gallery of their own dataset and split; the names must be equal.",
        )
    rows, found = table.rows, []
    directions: tuple[tuple[str, Literal["t2i", "i2i"]], ...] = (("text", "t2i"), ("image", "i2i"))
    for modality, direction in directions:
        mine = asked & (rows["modality"] == modality).to_numpy()
        conditions = set(rows["condition"][mine]) | set(rows["condition"][gallery]) if mine.any() else set()
        for condition in sorted(conditions, key=lambda name: (name != "standard", name)):
            query = _side(table, _of_condition(rows, mine, condition, f"{dataset}, {modality} queries"))
            among = _side(table, _of_condition(rows, gallery, condition, f"{dataset}, gallery"))
            exclude: Exclude = "none"
            if direction == "i2i":
                cameras = pd.notna(query.camera).any() and pd.notna(among.camera).any()
                exclude = "same_camera" if cameras else "same_item"
            found.append(Protocol(direction, dataset, split, condition, query, among, exclude))
    return found


def _of_condition(rows: pd.DataFrame, side: npt.NDArray[np.bool_], condition: str, where: str) -> npt.NDArray[np.int64]:
    for name in (condition, "standard"):
        found = np.flatnonzero(side & (rows["condition"] == name).to_numpy())
        if len(found):
            return found
    known = ", ".join(sorted(set(rows["condition"][side])))
    raise DataError(
        f"{where}: no vectors of condition standard (found: {known}).",
        hint="Call the condition of the ordinary vectors `standard`.",
    )


def _side(table: EmbeddingTable, positions: npt.NDArray[np.int64]) -> Side:
    rows = table.rows
    item = _objects(rows["item_id"], positions)
    nothing = np.full(len(positions), None, dtype=object)
    return Side(
        item=item,
        image=item,
        person=_objects(rows["person_id"], positions),
        camera=_objects(rows["camera_id"], positions),
        outfit=_objects(rows["outfit_id"], positions) if "outfit_id" in rows else nothing,
        vectors=store.rows_of(table.vectors, positions),
    )


def _objects(column: "pd.Series[Any]", positions: npt.NDArray[np.int64]) -> Objects:
    values = column.iloc[positions].to_numpy(dtype=object).copy()
    values[pd.isna(values)] = None
    return values
