"""A table of images as CSV, TSV, JSON Lines or Parquet: `image, person` and whatever else is known.

One row per image, or several that agree: a table with one row per caption is fine.
"""

import csv
import gc
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reidctl.datasets.base import IMAGE_SUFFIXES, SPLITS, Draft, Entry, Options, Probe, readable_name
from reidctl.datasets.manifest import (
    SUFFIXES,
    Complaints,
    Row,
    Table,
    columns_of,
    facts_of,
    list_of,
    open_table,
    shown,
    text_of,
)
from reidctl.datasets.paths import inside
from reidctl.datasets.splits import count_people, split_people
from reidctl.datasets.writing import captions_of, place, rows
from reidctl.errors import DataError, UsageError

OPTIONS = frozenset({"seed", "name", "fractions", "images"})
DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
CONDITIONS = ("none", "image", "image+caption")
# More is no description of one image, and each new text is compared with the earlier ones.
MAX_TEXTS = 1000
MAX_NAME = 4096
# What a folder's table is called, so that the folder itself can be given.
MANIFEST = "manifest"
_FACTS = ("person", "split", "role", "camera", "outfit")
_KINDS = {"identity_text": "identity", "clothing_text": "clothing"}
_KNOWN = frozenset({"image", "captions", "attributes", "conditioned_on", *_FACTS, *_KINDS})
_ALLOWED = {"split": ("", *SPLITS), "role": ("", "query", "gallery"), "conditioned_on": ("", *CONDITIONS)}
_ATTRIBUTE = "attributes."
_CAPTION = re.compile(r"caption(_\d+)?")
# Names that need no look at the disk: relative, forward slashes, no component of dots alone, no drive of Windows.
_PLAIN = re.compile(r"(?![A-Za-z]:/)(?!\.{1,2}(?:/|$))[^/\\\0]+(?:/(?!\.{1,2}(?:/|$))[^/\\\0]+)*")
Text = tuple[str, str, str]


def read(root: Path, options: Options) -> Draft:
    """Return the rows of a table, or of the file `manifest.*` in a folder; rows of one image are joined if they agree.

    Columns: `image` (or `path`), `person`; optional `split`, `role`, `camera`, `outfit`, `caption`, `caption_2`...,
    `captions` (a list, in CSV as JSON), `identity_text`, `clothing_text`, `conditioned_on` (of those two),
    `attributes.NAME` or `attributes` (an object).

    Raises:
        DataError: the file is not a table or has no rows, a column is missing, a value is not allowed, two rows
            contradict, or there is no folder `options.images`.
        UsageError: `fractions` for a table that has splits.
    """
    file = _locate(root)
    if options.images is not None and not options.images.is_dir():
        raise DataError(
            f"The images' folder {options.images} is missing.", hint="Give the folder that paths start from."
        )
    complain = Complaints(options.lenient)
    table = open_table(file, complain, rename=_rename, needed=() if _is_json(file) else ("image", "person"))
    base = (options.images or file.parent).absolute()
    with _no_collection():
        groups, count = _read_rows(table, base, complain)
        entries = [_entry(key, groups[key], base) for key in groups]
    if not count and not options.lenient:
        raise DataError(f"{file} has no rows.", hint="One row per image is expected, below the names of the columns.")
    notes = table.notes()
    if count > len(groups):
        notes.append(f"{count - len(groups):,} further row(s) of images listed before; their texts were joined.")
    unknown = [name for name in table.columns if name and not _is_known(name)]
    if unknown:
        notes.append(f"Columns not used: {shown(unknown)}.")
    entries, note = _split(entries, file, options, complain)
    name = options.name or (file.stem if file.stem != MANIFEST else readable_name(file.absolute().parent)) or MANIFEST
    return Draft(name, entries, file, notes + note, problems=complain.sentences())


def probe(root: Path) -> Probe | None:
    """Recognise a table by its columns `image` (or `path`) and `person`, or a folder that holds one as `manifest.*`."""
    files = [root] if root.is_file() else _manifests(root)
    if len(files) != 1 or files[0].suffix.lower() not in SUFFIXES:
        return None
    columns = _rename(columns_of(files[0]))
    if not {"image", "person"} <= set(columns):
        return None
    facts: tuple[str, ...] = ("split", "camera", "outfit")
    has = [name for name in facts if name in columns]
    has += ["captions"] if any(_CAPTION.fullmatch(name) or name == "captions" for name in columns) else []
    variant = f"table {files[0].name} of images and people"
    return Probe(root, f"{variant} with {', '.join(has)}" if has else variant)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Write `manifest.csv` beside a folder `images` and return the table; phrases cannot be expressed.

    Raises:
        UsageError: the rows are of several datasets.
    """
    table = _laid_out(images, captions, source, out)
    names = sorted({name for row in table for name in row["attributes"]})
    columns = [name for name in table[0] if name != "attributes"] if table else ["image", "person"]
    path = out / f"{MANIFEST}.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*columns, *(f"{_ATTRIBUTE}{name}" for name in names)])
        for row in table:
            texts = json.dumps(row["captions"], ensure_ascii=False) if row["captions"] else ""
            cells = [texts if name == "captions" else row[name] for name in columns]
            writer.writerow([*cells, *(row["attributes"].get(name, "") for name in names)])
    return path


def write_parquet(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Write `manifest.parquet` beside a folder `images`: captions as a list, attributes as a map.

    Raises:
        UsageError: the rows are of several datasets.
    """
    table = _laid_out(images, captions, source, out)
    path = out / f"{MANIFEST}.parquet"
    kinds = {"captions": pa.list_(pa.string()), "attributes": pa.map_(pa.string(), pa.string())}
    columns = list(table[0]) if table else ["image", "person"]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    arrays = []
    for column in schema:
        values = [list(row[column.name].items()) if column.name == "attributes" else row[column.name] for row in table]
        arrays.append(pa.array(values, type=column.type))
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
    return path


def file_names(images: pd.DataFrame) -> list[str]:
    """Return a relative path for every image, made of its id; no two are the same and none climbs."""
    taken: Counter[str] = Counter()
    names = []
    for row in images.itertuples(index=False):
        suffix = Path(str(row.path)).suffix
        stem = str(row.image_id).removeprefix(f"{row.dataset}:").replace("\\", "/")
        parts = [part for part in stem.split("/") if part not in ("", ".", "..")] or ["image"]
        name = "/".join(parts)
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            name = name[: -len(Path(name).suffix)]
        taken[name + suffix] += 1
        # The first of a name keeps it; ids are unique, so this is for ids that differ in dots or dashes alone.
        names.append(name + (f"~{taken[name + suffix]}" if taken[name + suffix] > 1 else "") + suffix)
    return names


def _laid_out(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> list[dict[str, Any]]:
    """Place the image files and return the rows of the manifest."""
    texts = {kind: captions_of(captions, kind) for kind in ("full", "identity", "clothing")}
    conditions = _conditions(captions)
    table = []
    for row, name in zip(rows(images), file_names(images), strict=True):
        place(source / row.path, out / "images" / name)
        table.append(
            {
                "image": f"images/{name}",
                "person": str(row.person_id).removeprefix(f"{row.dataset}:"),
                "split": row.split,
                "role": row.role or "",
                "camera": row.camera_id or "",
                "outfit": row.outfit_id or "",
                "captions": texts["full"].get(row.image_id, []),
                **{column: " ".join(texts[kind].get(row.image_id, [])[:1]) for column, kind in _KINDS.items()},
                "conditioned_on": conditions.get(row.image_id, ""),
                "attributes": {name: value for name, value in (row.attributes or {}).items() if value},
            }
        )
    return table


def _conditions(captions: pd.DataFrame) -> dict[str, str]:
    """What the identity and clothing texts of an image were written from; `none` where the two differ."""
    described = captions[captions["kind"].isin(list(_KINDS.values())) & (captions["status"] == "ok")]
    found: dict[str, str] = {}
    for image, condition in zip(described["image_id"], described["conditioned_on"], strict=True):
        found[image] = condition if found.get(image, condition) == condition else "none"
    return found


def _locate(root: Path) -> Path:
    if not root.is_dir():
        return root
    files = _manifests(root)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(
            f"{root} is a folder and should hold one {MANIFEST}.csv, .tsv, .jsonl or .parquet (found: {found}).",
            hint="Give the table file itself.",
        )
    return files[0]


def _manifests(folder: Path) -> list[Path]:
    return sorted(path for suffix in SUFFIXES - {".txt"} if (path := folder / f"{MANIFEST}{suffix}").is_file())


def _is_json(file: Path) -> bool:
    return file.suffix.lower() in {".jsonl", ".ndjson"}


def _rename(names: Sequence[str]) -> list[str]:
    """Known columns in lower case; `path` is the image where no column is called so."""
    found = [name.lower() if _is_known(name.lower()) or name.lower() == "path" else name for name in names]
    old = "image" if "image" in found else "path"
    return ["image" if name == old else name for name in found]


def _is_known(name: str) -> bool:
    return _role(name) != ""


@dataclass(slots=True)
class _Group:
    """The rows of one image: facts by `_FACTS`, texts in order and without repetition."""

    facts: tuple[str, ...]
    attributes: dict[str, str]
    texts: list[Text]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the search for reference cycles: rows make none, and millions of new objects set it off again and again."""
    held = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if held:
            gc.enable()


def _read_rows(table: Table, base: Path, complain: Complaints) -> tuple[dict[str, _Group], int]:
    """The images, and the number of good rows."""
    groups: dict[str, _Group] = {}
    count = 0
    for number, row in table.rows:
        try:
            _add(groups, row, base, table.where(number))
            count += 1
        except DataError as error:
            complain(error)
    return groups, count


def _add(groups: dict[str, _Group], row: Row, base: Path, where: str) -> None:
    """Join a row to its image; a row that is refused leaves no trace."""
    image = text_of(row.get("image"), where, "image")
    facts = tuple([text_of(row[name], where, name) if name in row else "" for name in _FACTS])
    condition = text_of(row["conditioned_on"], where, "conditioned_on") if "conditioned_on" in row else ""
    _check_values(image, facts, condition, where)
    attributes, texts = _contents(row, condition, where)
    key = _key(image, base, where)
    group = groups.get(key)
    if group is None:
        groups[key] = _Group(facts, attributes, texts)
    else:
        _join(group, _Group(facts, attributes, texts), f"{where}: ", image)


def _join(group: _Group, new: _Group, where: str, image: str) -> None:
    for old, found, name in zip(group.facts, new.facts, _FACTS, strict=True):
        if old and found and old != found:
            raise DataError(f"{where}`{name}` of {image} differs from an earlier row.")
    for name, value in new.attributes.items():
        if group.attributes.get(name, value) != value:
            raise DataError(f"{where}`{_ATTRIBUTE}{name}` of {image} differs from an earlier row.")
    texts = [text for text in new.texts if text not in group.texts]
    for kind in {text[0] for text in texts} - {"full"}:
        if any(text[0] == kind for text in group.texts):
            raise DataError(f"{where}{image} has two different {kind} texts.")
    if len(group.texts) + len(texts) > MAX_TEXTS:
        raise DataError(f"{where}{image} has more than {MAX_TEXTS:,} texts.", hint="Is `image` the right column?")
    if group.facts != new.facts:
        group.facts = tuple([old or found for old, found in zip(group.facts, new.facts, strict=True)])
    group.attributes.update(new.attributes)
    group.texts += texts


def _check_values(image: str, facts: tuple[str, ...], condition: str, where: str) -> None:
    if not image or not facts[0]:
        raise DataError(f"{where}: `{'person' if image else 'image'}` is empty.")
    if len(image) > MAX_NAME:
        raise DataError(f"{where}: `image` has {len(image):,} characters; no file name is that long.")
    for column, value in (("split", facts[1]), ("role", facts[2]), ("conditioned_on", condition)):
        if value not in _ALLOWED[column]:
            choices = ", ".join(filter(None, _ALLOWED[column]))
            hint = "Query and gallery are roles: use the column `role`." if value in ("query", "gallery") else ""
            raise DataError(f"{where}: `{column}` is none of {choices} (got {value[:80]!r}).", hint=hint)


def _key(image: str, base: Path, where: str) -> str:
    if _PLAIN.fullmatch(image):
        return image
    return inside(base, image, where).relative_to(base).as_posix()


def _contents(row: Row, condition: str, where: str) -> tuple[dict[str, str], list[Text]]:
    """The attributes and the texts of a row."""
    attributes: dict[str, str] = {}
    texts: dict[Text, None] = {}
    for name, value in row.items():
        role = _role(name)
        if role == "caption" and (text := text_of(value, where, name)):
            texts["full", text, "image"] = None
        elif role == "captions":
            texts.update(dict.fromkeys(("full", text, "image") for text in list_of(value, where, name)))
        elif role == "attributes":
            attributes |= facts_of(value, where, name)
        elif role == "attribute" and (text := text_of(value, where, name)):
            attributes[name.removeprefix(_ATTRIBUTE)] = text
        elif role in _KINDS and (text := text_of(value, where, name)):
            # Unless the table says so, nobody knows that the text was written from the image alone.
            texts[_KINDS[role], text, condition or "none"] = None
    return attributes, list(texts)


@lru_cache(maxsize=4096)
def _role(name: str) -> str:
    """What a column means: `caption`, `attribute`, or its own name if it is known, else nothing."""
    if _CAPTION.fullmatch(name):
        return "caption"
    if name.startswith(_ATTRIBUTE):
        return "attribute"
    return name if name in _KNOWN else ""


def _entry(key: str, group: _Group, base: Path) -> Entry:
    person, split, role, camera, outfit = group.facts
    return Entry(
        key, base / key, split, person, role or None, camera or None, outfit or None, group.attributes, group.texts
    )


def _split(entries: list[Entry], file: Path, options: Options, complain: Complaints) -> tuple[list[Entry], list[str]]:
    """Give every image a split: its own, its person's, or where there is none at all, one drawn by person."""
    given = {entry.person: entry.split for entry in entries if entry.split}
    if given and options.fractions is not None:
        raise UsageError(f"{file} has splits, so `fractions` has no meaning.", hint="Leave --fractions out.")
    if not given and entries:
        fractions = options.fractions or DEFAULT_FRACTIONS
        drawn = split_people([entry.person for entry in entries], fractions, options.seed)
        shares = "/".join(f"{share:g}" for share in fractions)
        note = f"No `split` given: {count_people(len(drawn))} split {shares} into train/val/test (seed {options.seed})."
        return [replace(entry, split=drawn[entry.person]) for entry in entries], [note]
    lacking = [entry for entry in entries if not entry.split]
    lost = [entry for entry in lacking if entry.person not in given]
    if lost:
        complain(
            DataError(
                f"{file}: `split` is empty for {len(lost):,} image(s) of people without any, the first {lost[0].key}.",
                hint="Fill the column, or remove it to split by person at random.",
            )
        )
    if not lacking:
        return entries, []
    filled = [e if e.split else replace(e, split=given[e.person]) for e in entries if e.split or e.person in given]
    known = len(lacking) - len(lost)
    return filled, [f"{known:,} image(s) without a split got the one of their person."] if known else []


VARIANTS = {"parquet": write_parquet}
