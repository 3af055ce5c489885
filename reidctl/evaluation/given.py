"""Embeddings that another program made: tables and NumPy archives as protocols, without a model and without images.

Two kinds of files are read: Parquet tables `embeddings` (docs/evaluation.md), optionally with a column `outfit_id`, and
NumPy archives (see `archive`). In both a person of -1 is junk (Market-1501's convention): its items are dropped and
counted. Everybody else is a person, 0 too: Market-1501's distractors match nobody because no query is person 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation.archive import archive_source
from reidctl.evaluation.protocols import Protocol, Side
from reidctl.retrieval import store
from reidctl.retrieval.labels import Exclude
from reidctl.retrieval.store import EmbeddingTable, Source

Objects = npt.NDArray[np.object_]

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
        _check_kind(path)
        if path.suffix == ".npz":
            source, model = archive_source(path)
        else:
            source, facts = store.parquet_source(path, extra=("outfit_id",)), tables.footer(path)
            model = facts.get("model")
            notes += _other_task(source, facts.get("task"))
        source, said = _without_junk(source)
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


def _check_kind(path: Path) -> None:
    """Refuse what is neither a Parquet file nor an archive, before a library says so in its own words."""
    how = "Give a Parquet table `embeddings` or a .npz archive; docs/evaluation.md, 'Given embeddings', shows both."
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file of embeddings.", hint=how)
    if path.suffix == ".npz" or not path.is_file():
        return
    with path.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            raise DataError(f"{path} is neither a Parquet table nor a .npz archive.", hint=how)


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


def _other_task(source: Source, task: object) -> list[str]:
    """A warning about image queries among vectors by which their model does not compare images with images."""
    if task != "t2i" or not ((source.rows["role"] == "query") & (source.rows["modality"] == "image")).any():
        return []
    return [
        f"{source.name} holds the vectors that its model compares with texts; images it compares by others: "
        "measure the `embeddings_i2i.parquet` of its index instead."
    ]


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


def _without_junk(source: Source) -> tuple[Source, list[str]]:
    """The source without the people `-1` and `<dataset>:-1`, and how many items that were."""
    person, dataset = source.rows["person_id"], source.rows["dataset"]
    junk = (person == "-1").to_numpy()
    for name in dataset.unique():
        junk = junk | ((dataset == name) & (person == f"{name}:-1")).to_numpy()
    if not junk.any():
        return source, []
    note = f"{source.name}: {int(junk.sum()):,} item(s) with person -1 are junk and were dropped."
    return store.without(source, junk), [note]


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
    if not (asked & (rows["condition"] == "standard").to_numpy()).any():
        others = ", ".join(sorted(set(rows["condition"][asked])))
        raise DataError(
            f"No query of split {split} has the condition standard (there are: {others}).",
            hint="Call the plain vectors `standard`; other conditions are measured beside them.",
        )
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
