"""Identity and clothing texts by image, from a file: what a multimodal model wrote elsewhere, brought in as data.

Whoever gives such a file states that each text was written from its image alone. The texts may then describe the
gallery; a text that saw a query's caption would carry the answer there, and nothing in a file can show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reidctl.datasets.base import Draft, Entry
from reidctl.datasets.manifest import Complaints, Row, open_table, shown, text_of
from reidctl.errors import DataError

KINDS = ("identity", "clothing")
_ALIASES = {"path": "image", "image_id": "image", "identity_text": "identity", "clothing_text": "clothing"}


@dataclass
class Descriptions:
    """The texts of a file.

    Attributes:
        texts: (identity, clothing) by the image's name as the file writes it; "" where a text is missing.
        repeated: rows that say what an earlier row said.
        empty: images without any text.
        models: who wrote them, if the file says so.
        notes: what else there is to say about the file.
    """

    path: Path
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_descriptions(path: Path) -> Descriptions:
    """Return the texts of a CSV, TSV, JSON Lines or Parquet file.

    Columns: `image` (or `path`, `image_id`), `identity` and/or `clothing` (or `identity_text`, `clothing_text`);
    optional `model`. Others are not used.

    Raises:
        DataError: not a table, a column missing, an empty image name, or two rows of one image that disagree.
    """
    found = Descriptions(path)
    table = open_table(path, Complaints(), rename=_rename)
    for number, row in table.rows:
        if not found.texts:
            _check_columns(path, table.columns)
        _add(found, row, table.where(number))
    _check_columns(path, table.columns)
    found.notes = [f"{path.name}: {note}" for note in table.notes()]
    found.empty = [image for image, texts in found.texts.items() if not any(texts)]
    return found


def attach(draft: Draft, path: Path) -> Draft:
    """Return the draft with the texts of a file, and a note for every kind of mismatch.

    Images are found by their path inside the dataset, their full id (`<dataset>:<path>`), their path relative to the
    annotation file, or their absolute path.

    Raises:
        DataError: see `read_descriptions`; no row belongs to an image, two rows belong to one image and disagree, or
            the dataset has another text of the same kind.
    """
    found = read_descriptions(path)
    keys = _keys(draft)
    by_key: dict[str, tuple[str, str]] = {}
    extra = []
    for name, texts in found.texts.items():
        key = keys.get(name) or keys.get(name.replace("\\", "/").removeprefix("./"))
        if key is None:
            extra.append(name)
        elif by_key.setdefault(key, texts) == texts:
            continue
        else:
            raise DataError(f"{path}: the rows of image {key} disagree.", hint="Keep one row per image.")
    if not by_key and found.texts and draft.entries:
        raise DataError(
            f"{path}: none of its {_images(len(found.texts))} is in {draft.dataset} (first: {extra[0]}).",
            hint=f"Images of this dataset are called, for example, {draft.entries[0].key}.",
        )
    entries = [_with_texts(entry, by_key.get(entry.key, ("", "")), path) for entry in draft.entries]
    lacking = [entry.key for entry in draft.entries if entry.key not in by_key]
    notes = [*draft.notes, *_notes(found, by_key, lacking, extra)]
    return replace(draft, entries=entries, notes=notes, described_by=", ".join(sorted(found.models)))


def _rename(names: Sequence[str]) -> list[str]:
    found = [name.lower() for name in names]
    # An alias counts only where the column itself is not there.
    aliases = {alias: name for alias, name in _ALIASES.items() if name not in found}
    return [aliases.get(name, name) for name in found]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if not columns:
        raise DataError(f"{path} has no rows.")
    if "image" not in columns or not set(KINDS) & set(columns):
        raise DataError(
            f"{path} needs the columns `image` and `identity` or `clothing`; it has: {shown(columns)}.",
            hint="docs/datasets.md shows an example.",
        )


def _add(found: Descriptions, row: Row, where: str) -> None:
    image = text_of(row.get("image"), where, "image")
    if not image:
        raise DataError(f"{where}: `image` is empty.")
    texts = (text_of(row.get("identity"), where, "identity"), text_of(row.get("clothing"), where, "clothing"))
    model = text_of(row.get("model"), where, "model")
    if model:
        found.models.add(model)
    if image not in found.texts:
        found.texts[image] = texts
    elif found.texts[image] == texts:
        found.repeated.append(image)
    else:
        raise DataError(
            f"{where}: image {image} was described before with other texts.", hint="Keep one row per image."
        )


def _keys(draft: Draft) -> dict[str, str]:
    """Every name that an image answers to; a path inside the dataset wins over the others."""
    names: dict[str, str] = {}
    base = draft.annotation.absolute().parent if draft.annotation is not None else None
    for entry in draft.entries:
        names.setdefault(entry.path.as_posix(), entry.key)
        if base is not None and entry.path.is_relative_to(base):
            names.setdefault(entry.path.relative_to(base).as_posix(), entry.key)
    names |= {f"{draft.dataset}:{entry.key}": entry.key for entry in draft.entries}
    return names | {entry.key: entry.key for entry in draft.entries}


def _with_texts(entry: Entry, texts: tuple[str, str], path: Path) -> Entry:
    new = [(kind, text, "image") for kind, text in zip(KINDS, texts, strict=True) if text]
    for kind, text, _ in new:
        other = next((old for old in entry.texts if old[0] == kind and old[1] != text), None)
        if other is not None:
            raise DataError(
                f"{path}: {entry.key} has another {kind} text in the dataset itself.",
                hint="Remove the texts from one of the two files.",
            )
    # The same text in both: the statement that it saw the image alone is the newer one.
    kept = [old for old in entry.texts if not any(old[0] == kind for kind, _, _ in new)]
    return replace(entry, texts=[*kept, *new]) if new else entry


def _notes(found: Descriptions, by_key: dict[str, tuple[str, str]], lacking: list[str], extra: list[str]) -> list[str]:
    one_only = {
        kind: [key for key, texts in by_key.items() if any(texts) and not texts[place]]
        for place, kind in enumerate(KINDS)
    }
    by = f" by {', '.join(sorted(found.models))}" if found.models else ""
    told = sum(any(texts) for texts in by_key.values())
    cases = [
        (lacking, "image(s) are not described"),
        (extra, "described image(s) are not in the dataset; their texts were left out"),
        (found.repeated, "row(s) repeat an earlier one"),
        (found.empty, "image(s) have no text in their row"),
        *((one_only[kind], f"image(s) lack the {kind} text") for kind in KINDS),
    ]
    counted = [f"{found.path.name}: {len(case):,} {what}, the first: {case[0]}." for case, what in cases if case]
    first = f"{found.path.name}: texts of {_images(told)}{by}, taken as written from the image alone."
    return [first, *counted, *found.notes]


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
