"""What every reader of a dataset shares: entries, safe paths, image facts, splits and the comparison with a release.

A reader parses annotations into a `Draft` (fast, opens no image); `measure` then opens every image once and makes
the tables. Between the two, the import stage can decide that nothing changed.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import progress
from reidctl.datasets.scan import Facts, Problem, scan
from reidctl.errors import DataError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
# Brackets, semicolons and words such as `import`, `return` or `class` are English too: those words count as code only
# where a statement may begin. The signs come first, one literal each, because every caption is searched.
_SIGNS = (
    r"[{}]|[=!]=|[+*/-]=\s|&&|```|<!--|__[a-z]+__",
    r"</?[A-Za-z][\w-]*(?:\s[^<>]*)?/?>",
    r"&(?:nbsp|amp|lt|gt|quot|apos|#\d+);",
    r"#\s?(?:include|define|ifdef|ifndef|endif|pragma)\b",
    r"\((?<=\w\()\)",
    r"\.(?<=[A-Za-z_)\]]\.)[a-z_]\w+(?:\(|\s=\s)",
    r"\.(?:(?<=\bself\.)|(?<=\bthis\.))[a-z_]",
    r"\[(?<=\w\[)(?:-?\d*:?-?\d*|'[^']*'|\"[^\"]*\"|[a-z])\]",
)
_WORDS = (
    r"(?:def \w+|in range|len|isinstance|enumerate|printf)\(",
    r"lambda(?: \w+(?:, ?\w+)*)?:\s*\S",
    r"SELECT\s.+\sFROM\s|INSERT INTO\s|DROP TABLE\s|DELETE FROM\s",
    r"(?:var|let|const|int|float|char|double|auto|bool) \w+ ?=",
)
_STATEMENTS = (
    r"import [\w.]+(?: as \w+)?(?:, ?[\w.]+)*\s*(?:$|;|#)|from [\w.]+ import [\w*]|print ?\(",
    r"for \w+(?:, ?\w+)? in [\w.]+(?:\(.*?\))?:|class \w+(?:\([\w., ]*\))?:|return(?: \S+)?\s*;?$",
    r"[a-z_][\w.\[\]]* ?= ?[\w\"'\[({-]|(?:None|nan|NaN|null|NULL|undefined)\s*$",
)
CODE = re.compile(
    rf"{'|'.join(_SIGNS)}|\b(?:{'|'.join(_WORDS)})|(?:^|[;:]\s)\s*(?:{'|'.join(_STATEMENTS)})", re.MULTILINE
)


@dataclass(frozen=True)
class Options:
    """What a user may choose when importing.

    Attributes:
        seed: of every random choice (splits, carve-out).
        carve_val: people moved from train to val.
        skip_bad: leave unreadable images out and count them, instead of stopping at the first.
        name: the dataset's name in ids; None: the format's, folder's or file's own.
        fractions: share of people in (train, val, test) where the source has no splits; None: 0.7, 0.1, 0.2.
        images: folder that relative image paths of a table start from; None: the table's folder.
        workers: processes that open images; 0: one per core.
        descriptions: a file of identity and clothing texts by image.
        lenient: skip entries that are not as documented and list them in `Draft.problems`, instead of stopping at the
            first; for `data check`.
    """

    seed: int = 0
    carve_val: int = 0
    skip_bad: bool = False
    name: str | None = None
    fractions: tuple[float, float, float] | None = None
    images: Path | None = None
    workers: int = 0
    descriptions: Path | None = None
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a dataset, before it was opened.

    Attributes:
        key: the image's name inside the dataset; its id is `<dataset>:<key>`.
        person: the raw person id; the table's is `<dataset>:<person>`.
        texts: (kind, text, conditioned_on), in order.
    """

    key: str
    path: Path
    split: str
    person: str
    role: str | None = None
    camera: str | None = None
    outfit: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[tuple[str, str, str]] = ()


@dataclass
class Draft:
    """A dataset as its annotations tell it.

    Attributes:
        dataset: the name in ids.
        annotation: the file the entries come from; None where file names are the annotation.
        notes: sentences for the user.
        known_people: whether equal person ids mean the same person (without them there are no metrics).
        problems: one sentence for every entry that a lenient reader skipped.
        described_by: the model that wrote the identity and clothing texts ("" if nobody says which); None where they
            are the dataset's own.
    """

    dataset: str
    entries: list[Entry]
    annotation: Path | None = None
    notes: list[str] = field(default_factory=list)
    known_people: bool = True
    problems: list[str] = field(default_factory=list)
    described_by: str | None = None


@dataclass(frozen=True)
class Probe:
    """What a format recognises in a folder, found without reading annotations or images.

    Attributes:
        folder: where the dataset is: the folder asked about or one inside it.
        variant: which of the layouts in circulation this is, in words.
        missing: files and sub-folders, relative to `folder`, that a whole copy has and this one lacks.
        notes: sentences for the user about this variant.
    """

    folder: Path
    variant: str
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Imported:
    """The two tables of a dataset, and what the user should know about them."""

    images: pd.DataFrame
    captions: pd.DataFrame
    notes: list[str]


def safe_join(root: Path, text: str, where: str) -> Path:
    """Return `root/text`, absolute, for a path that a file dictates.

    Links are followed: they were made on this machine (datasets are often linked from another disk); names that
    climb out of the folder were not.

    Raises:
        DataError: the path is empty, holds a NUL byte, or leads out of `root`.
    """
    name = text.strip().replace("\\", "/")
    if not name or "\0" in name:
        raise DataError(f"{where}: {text!r} is not a file name.")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(
            f"{where}: the path {text!r} leads outside {root}.",
            hint="Paths are relative to the dataset's image folder and stay inside it.",
        )
    return root.absolute() / name


def measure(draft: Draft, options: Options) -> Imported:
    """Open every image once and return the tables; memory grows with rows, not with pixels.

    Raises:
        DataError: no image, an id twice, a person in two splits, or (unless `skip_bad`) an unreadable image.
    """
    _check(draft)
    notes = list(draft.notes)
    kept: list[Entry] = []
    facts: list[Facts] = []
    bad: list[str] = []
    reading = scan([entry.path for entry in draft.entries], workers=options.workers)
    with closing(reading), progress("read images", len(draft.entries)) as advance:
        for entry, found in zip(draft.entries, reading, strict=True):
            advance()
            if not isinstance(found, Problem):
                kept.append(entry)
                facts.append(found)
            elif options.skip_bad:
                bad.append(found.message)
            else:
                raise DataError(found.message, hint="Replace the file, or import with --skip-bad.")
    if not kept:
        raise DataError(f"None of the {len(bad)} images of {draft.dataset} can be read.", hint=bad[0])
    if bad:
        notes.append(f"{len(bad)} unreadable image(s) left out, the first: {bad[0]}")
    captions = caption_table(draft.dataset, kept, described_by=draft.described_by)
    notes += _suspicious(captions)
    return Imported(_images(draft.dataset, kept, facts), captions, notes)


def _check(draft: Draft) -> None:
    if not draft.entries:
        raise DataError(f"The dataset {draft.dataset} has no images.", hint="Is this the right folder?")
    key, count = Counter(entry.key for entry in draft.entries).most_common(1)[0]
    if count > 1:
        raise DataError(f"Image {key} of {draft.dataset} is listed {count} times.")
    split_of: dict[str, str] = {}
    for entry in draft.entries:
        first = split_of.setdefault(entry.person, entry.split)
        if first != entry.split:
            raise DataError(
                f"Person {entry.person} of {draft.dataset} is in two splits, {first} and {entry.split} ({entry.key}).",
                hint="A person belongs to one split, or training sees the people it is tested on.",
            )


def _images(dataset: str, entries: Sequence[Entry], facts: Sequence[Facts]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [f"{dataset}:{e.key}" for e in entries],
            "path": [e.path.as_posix() for e in entries],
            "dataset": dataset,
            "split": [e.split for e in entries],
            "role": [e.role for e in entries],
            "person_id": [f"{dataset}:{e.person}" for e in entries],
            "camera_id": [e.camera for e in entries],
            "outfit_id": [e.outfit for e in entries],
            "width": [f.width for f in facts],
            "height": [f.height for f in facts],
            "sha256": [f.sha256 for f in facts],
            "attributes": [dict(e.attributes) or None for e in entries],
        }
    )


def caption_table(dataset: str, entries: Sequence[Entry], *, described_by: str | None = None) -> pd.DataFrame:
    """Return the texts of entries as rows of the captions table; see `Draft.described_by`."""
    names = ("caption_id", "image_id", "kind", "source", "conditioned_on", "text", "status", "model")
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for entry in entries:
        image_id = f"{dataset}:{entry.key}"
        for number, (kind, text, conditioned_on) in enumerate(entry.texts):
            name = str(number) if kind == "full" else kind
            written = described_by is not None and kind != "full"
            source, model = ("mllm", described_by or None) if written else ("human", None)
            values = (f"{image_id}#{name}", image_id, kind, source, conditioned_on, text, "ok", model)
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
    return pd.DataFrame(rows) if rows["text"] else tables.empty("captions")


def _suspicious(captions: pd.DataFrame) -> list[str]:
    """Captions that look like program text: known to occur in published annotation files."""
    found = captions[captions["text"].astype(str).str.contains(CODE)]
    if not len(found):
        return []
    first = found.iloc[0]
    return [f"{len(found)} caption(s) look like code, the first: {first['caption_id']}: {str(first['text'])[:80]!r}"]


def compare_counts(entries: Sequence[Entry], official: Mapping[str, tuple[int, int, int]], what: str) -> list[str]:
    """Return one note for every split whose (people, images, captions) differ from the release's.

    Numbers measured on such a split do not compare with published ones.
    """
    notes = []
    for split, expected in official.items():
        rows = [entry for entry in entries if entry.split == split]
        texts = sum(kind == "full" for entry in rows for kind, _, _ in entry.texts)
        counted = (len({entry.person for entry in rows}), len(rows), texts)
        if counted != expected:
            notes.append(
                f"{what} {split}: found {counted[0]:,} people, {counted[1]:,} images, {counted[2]:,} captions; the "
                f"release has {expected[0]:,}, {expected[1]:,}, {expected[2]:,}. Published numbers do not compare."
            )
    return notes


def listing_digest(draft: Draft) -> str:
    """Return the sha256 over what is known of every image and its file's size and time of change; opens none."""
    state = hashlib.sha256()
    for entry in draft.entries:
        try:
            facts = entry.path.stat()
            line = f"{entry.path}\0{facts.st_size}\0{facts.st_mtime_ns}\n"
        except OSError:
            line = f"{entry.path}\0missing\n"
        known = (entry.key, entry.split, entry.person, entry.role, entry.camera, entry.outfit)
        state.update(f"{known}\0{line}".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def readable_name(path: Path) -> str:
    """Return a file's name as text.

    Raises:
        DataError: the name is not UTF-8, so no table can hold it.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"The file name {path.name!r} in {str(path.parent)!a} is not UTF-8.") from None
    return path.name
