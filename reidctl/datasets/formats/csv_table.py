"""A table of images as CSV or Parquet: `image, person` and whatever else is known, one or more rows per image."""

import csv
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reidctl.datasets.base import SPLITS, Draft, Entry, Options, safe_join
from reidctl.datasets.splits import split_people
from reidctl.errors import DataError

OPTIONS = frozenset({"seed", "name", "fractions", "images"})
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
CONDITIONS = ("none", "image", "image+caption")
_FACTS = ("person", "split", "role", "camera", "outfit")
_KINDS = {"identity_text": "identity", "clothing_text": "clothing"}
_ATTRIBUTE = "attributes."


def read(root: Path, options: Options) -> Draft:
    """Return the rows of a `.csv`, `.tsv` or `.parquet` file; rows of one image are joined if they agree.

    Columns: `image` (or `path`), `person`; optional `split`, `role`, `camera`, `outfit`, `caption`, `caption_2`...,
    `captions` (a JSON list), `identity_text`, `clothing_text`, `conditioned_on` (of those two), `attributes.NAME`.

    Raises:
        DataError: the file is not text, a column is missing, a value is not allowed, or two rows contradict.
    """
    if not root.is_file():
        raise DataError(f"{root} is not a file.", hint="Give the CSV or Parquet file itself.")
    frame = _read_parquet(root) if root.suffix.lower() in {".parquet", ".pq"} else _read_text(root)
    if "path" in frame.columns and "image" not in frame.columns:
        frame = frame.rename(columns={"path": "image"})
    for column in ("image", "person"):
        if column not in frame.columns:
            raise DataError(f"{root} lacks the column `{column}`; it has: {', '.join(frame.columns)}.")
    frame = frame.apply(lambda column: column.str.strip())
    _check_values(frame, root)
    entries, repeated = _entries(frame, root, (options.images or root.parent).absolute())
    notes = [f"{repeated:,} further row(s) of images listed before; their texts were joined."] if repeated else []
    unknown = [name for name in frame.columns if not _is_known(name)]
    if unknown:
        notes.append(f"Columns not used: {', '.join(unknown)}.")
    if "split" not in frame.columns:
        entries, note = _split(entries, options)
        notes.append(note)
    return Draft(options.name or root.stem, entries, root, notes)


def _read_text(path: Path) -> pd.DataFrame:
    _check_bytes(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
        separator = max(",;\t", key=first.count)
        header = next(csv.reader([first], delimiter=separator), [])
        names = [name.strip() for name in header]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"{path} has the column(s) {', '.join(repeated)} twice.")
        with warnings.catch_warnings():
            # Pandas only warns when a row is longer than the header, and drops the rest.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                sep=separator,
                dtype=str,
                keep_default_na=False,
                encoding="utf-8-sig",
                index_col=False,
                low_memory=False,
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}).", hint="Save it as CSV UTF-8.") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, csv.Error) as error:
        raise DataError(f"{path} is not a regular table ({str(error).strip().splitlines()[0]}).") from None
    frame.columns = pd.Index(names)
    return frame.fillna("")


def _check_bytes(path: Path) -> None:
    """NUL bytes end a field silently in some parsers: refuse them, and name what usually causes them."""
    with path.open("rb") as stream:
        start = stream.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16, not UTF-8.", hint="Save it as CSV UTF-8.")
        stream.seek(0)
        offset = 0
        while chunk := stream.read(1 << 20):
            if (place := chunk.find(b"\0")) >= 0:
                raise DataError(f"{path} holds a NUL byte at offset {offset + place}; it is not a text file.")
            offset += len(chunk)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    return pd.DataFrame({name: _as_text(table.column(name)) for name in table.column_names}, dtype=object)


def _as_text(column: pa.ChunkedArray) -> Sequence[str]:
    if pa.types.is_nested(column.type):
        return ["" if row is None else json.dumps(row, default=str) for row in column.to_pylist()]
    try:
        values = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = [None if row is None else str(row) for row in column.to_pylist()]
    return ["" if value is None else value for value in values]


def _check_values(frame: pd.DataFrame, path: Path) -> None:
    for column in ("image", "person"):
        _refuse(frame, frame[column] == "", path, f"`{column}` is empty")
    allowed: dict[str, Sequence[str]] = {
        "split": SPLITS,
        "role": ("", "query", "gallery"),
        "conditioned_on": ("", *CONDITIONS),
    }
    for column, values in allowed.items():
        if column in frame.columns:
            choices = ", ".join(value for value in values if value)
            _refuse(frame, ~frame[column].isin(values), path, f"`{column}` is none of {choices}", column)


def _refuse(frame: pd.DataFrame, wrong: "pd.Series[bool]", path: Path, what: str, column: str = "") -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        got = f" (got {frame[column].iloc[row]!r})" if column else ""
        raise DataError(f"{path}, data row {row + 1}: {what}{got}; {int(wrong.sum())} such row(s).")


def _is_known(name: str) -> bool:
    known = {"image", "captions", "conditioned_on", *_FACTS, *_KINDS}
    return name in known or name.startswith(_ATTRIBUTE) or _is_caption(name)


def _is_caption(name: str) -> bool:
    return name == "caption" or (name.startswith("caption_") and name.removeprefix("caption_").isdigit())


class _Group:
    """The rows of one image: facts of the first, texts of all."""

    __slots__ = ("attributes", "facts", "path", "texts")

    def __init__(self, path: Path, facts: tuple[str, ...], attributes: dict[str, str]) -> None:
        self.path, self.facts, self.attributes = path, facts, attributes
        # A dict keeps order and drops a text that a later row repeats.
        self.texts: dict[tuple[str, str, str], None] = {}


def _entries(frame: pd.DataFrame, file: Path, base: Path) -> tuple[list[Entry], int]:
    """Join rows by image, in one pass of plain lists: a million rows take seconds."""
    nothing = [""] * len(frame)
    images = frame["image"].tolist()
    facts = zip(*(frame[name].tolist() if name in frame.columns else nothing for name in _FACTS), strict=True)
    attributes = _attributes(frame)
    texts = _texts(frame, file)
    groups: dict[str, _Group] = {}
    for row, (image, known) in enumerate(zip(images, facts, strict=True)):
        group = groups.get(image)
        if group is None:
            path = safe_join(base, image, f"{file}, data row {row + 1}")
            group = groups[image] = _Group(path, known, attributes(row))
        elif group.facts != known:
            column = next(n for n, a, b in zip(_FACTS, group.facts, known, strict=True) if a != b)
            raise DataError(f"{file}, data row {row + 1}: `{column}` of {image} differs from an earlier row.")
        group.texts.update(dict.fromkeys(texts(row)))
    entries = [_entry(group, base, file) for group in groups.values()]
    return entries, len(images) - len(groups)


def _entry(group: _Group, base: Path, file: Path) -> Entry:
    key = group.path.relative_to(base).as_posix()
    person, split, role, camera, outfit = group.facts
    texts = list(group.texts)
    for kind in _KINDS.values():
        if sum(text[0] == kind for text in texts) > 1:
            raise DataError(f"{file}: {key} has two different {kind} texts.")
    return Entry(key, group.path, split, person, role or None, camera or None, outfit or None, group.attributes, texts)


def _attributes(frame: pd.DataFrame) -> Callable[[int], dict[str, str]]:
    columns = {n.removeprefix(_ATTRIBUTE): frame[n].tolist() for n in frame.columns if n.startswith(_ATTRIBUTE)}
    return lambda row: {name: values[row] for name, values in columns.items() if values[row]}


def _texts(frame: pd.DataFrame, file: Path) -> Callable[[int], Iterator[tuple[str, str, str]]]:
    captions = [frame[name].tolist() for name in frame.columns if _is_caption(name)]
    lists = frame["captions"].tolist() if "captions" in frame.columns else None
    described = [(kind, frame[name].tolist()) for name, kind in _KINDS.items() if name in frame.columns]
    conditions = frame["conditioned_on"].tolist() if "conditioned_on" in frame.columns else None

    def of_row(row: int) -> Iterator[tuple[str, str, str]]:
        for column in captions:
            if column[row]:
                yield "full", column[row], "image"
        for text in _parse_list(lists[row], f"{file}, data row {row + 1}") if lists else ():
            yield "full", text, "image"
        for kind, values in described:
            if values[row]:
                # Unless the table says so, nobody knows that the text was written from the image alone.
                yield kind, values[row], (conditions[row] or "none") if conditions else "none"

    return of_row


def _parse_list(text: str, where: str) -> list[str]:
    if not text:
        return []
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f'{where}: `captions` is not a JSON list such as ["one", "two"].') from None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: `captions` must be a JSON list of texts.")
    return [value.strip() for value in values if value.strip()]


def _split(entries: list[Entry], options: Options) -> tuple[list[Entry], str]:
    fractions = options.fractions or DEFAULT_FRACTIONS
    split = split_people([entry.person for entry in entries], fractions, options.seed)
    shares = "/".join(f"{share:g}" for share in fractions)
    note = f"No `split` column: {len(split)} people split {shares} into train/val/test (seed {options.seed})."
    return [replace(entry, split=split[entry.person]) for entry in entries], note
