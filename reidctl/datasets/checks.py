"""What can be wrong with a dataset: pure functions from its tables to findings; no file is opened here.

`CHECKS` is the list of names, which stay: programs read them from `data check --json`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from reidctl.datasets.base import Draft, Probe
from reidctl.datasets.scan import Facts, Found

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CHECKS: dict[str, str] = {
    "layout": "which format, variant and folder were recognised",
    "missing-parts": "files or sub-folders of a whole copy that are absent",
    "bad-entries": "entries that are not as the format documents; an import would stop at the first",
    "reader-notes": "what the reader has to say about this copy",
    "no-images": "no entry names an image",
    "repeated-ids": "one image listed several times",
    "split-counts": "people, images or captions of a split unlike the official release",
    "missing-images": "image files that do not exist",
    "unreadable-images": "files that are not images, no regular files, or may not be read",
    "truncated-images": "images that do not decode to their last row",
    "huge-images": "images with more pixels or bytes than a picture of a person can have",
    "changed-images": "files that are not the ones that were imported",
    "leaked-images": "the same picture in two splits",
    "ambiguous-images": "the same picture under two people",
    "duplicate-images": "the same picture several times within one person and split",
    "query-in-gallery": "a query's picture in the gallery it searches, where no camera rule drops it",
    "near-duplicates": "training images that look like an image of another split (--near)",
    "people-in-two-splits": "people that training and test, or two other splits, share",
    "single-image-people": "people with one image",
    "single-camera-people": "people with several images under one camera",
    "no-queries": "splits with a gallery that neither a query image nor a caption searches",
    "queries-without-match": "image queries that nothing in their gallery answers",
    "orphan-captions": "captions of images that are not in the table",
    "uncaptioned-images": "images without a caption in a split that has captions",
    "empty-captions": "captions without a word",
    "code-captions": "captions that look like program text",
    "encoding-captions": "captions with signs of a wrong encoding, or with control characters",
    "short-captions": "captions of fewer than three words",
    "shared-captions": "the same caption for several people",
    "duplicate-captions": "the same caption twice for one image",
    "left-right": "captions that name a side",
    "truncated-captions": "captions longer than a tokenizer's context",
    "image-sizes": "median and smallest size",
    "wide-images": "images wider than tall",
}

# How `compare_counts` ends its notes.
_UNOFFICIAL = "Published numbers do not compare."
_EMPTY_NOTE = re.compile(r"^([\d,]+) empty caption")
EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One thing to know about a dataset.

    Attributes:
        check: a name of `CHECKS`.
        count: how many of `total` are concerned.
        unit: what is counted: images, captions, people, ...
        examples: up to five ids, paths or texts.
        details: further numbers, by name.
    """

    check: str
    severity: Severity
    count: int
    total: int
    unit: str
    sentence: str
    examples: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """The fraction concerned; 0.0 of nothing."""
        return self.count / self.total if self.total else 0.0

    def row(self) -> dict[str, Any]:
        """The finding as JSON values."""
        names = ("check", "severity", "count", "total", "rate", "unit", "sentence")
        found = {name: getattr(self, name) for name in names}
        return {**found, "examples": list(self.examples), "details": dict(self.details)}


def finding(
    check: str,
    severity: Severity,
    count: int,
    total: int,
    unit: str,
    sentence: str,
    examples: Iterable[object] = (),
    **more: Any,
) -> Finding:
    """Return a finding with printable examples, the first five."""
    assert check in CHECKS, check
    shown = tuple(_printable(str(item)) for item, _ in zip(examples, range(EXAMPLES), strict=False))
    return Finding(check, severity, int(count), int(total), unit, sentence, shown, more)


def _printable(text: str) -> str:
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return safe if len(safe) <= 160 else f"{safe[:157]}..."


def are(count: int, one: str, many: str = "") -> str:
    """Return `1 image is`, `2 images are`."""
    return f"{count:,} {one} is" if count == 1 else f"{count:,} {many or one + 's'} are"


def draft_table(draft: Draft) -> pd.DataFrame:
    """Return the entries of a draft as an images table without what only the files tell (sizes, sha256)."""
    return pd.DataFrame(
        {
            "image_id": [f"{draft.dataset}:{entry.key}" for entry in draft.entries],
            "path": [str(entry.path) for entry in draft.entries],
            "dataset": draft.dataset,
            "split": [entry.split for entry in draft.entries],
            "role": [entry.role for entry in draft.entries],
            "person_id": [f"{draft.dataset}:{entry.person}" for entry in draft.entries],
            "camera_id": [entry.camera for entry in draft.entries],
        }
    )


def image_table(images: pd.DataFrame, found: Iterable[Found]) -> pd.DataFrame:
    """Return the images with what their files hold: columns file_width, file_height, file_sha256, pixels, dhash,
    problem and message; unreadable files have zeros, empty texts and their problem.
    """
    nothing = Facts(0, 0, "")
    rows = []
    for item in found:
        facts = item if isinstance(item, Facts) else nothing
        kind, message = ("", "") if isinstance(item, Facts) else (item.kind, item.message)
        rows.append((facts.width, facts.height, facts.sha256, facts.pixels or "", facts.dhash or 0, kind, message))
    columns = ("file_width", "file_height", "file_sha256", "pixels", "dhash", "problem", "message")
    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    held: dict[str, Any] = {name: list(column) for name, column in zip(columns, values, strict=True)}
    held["dhash"] = np.asarray(held["dhash"], dtype=np.uint64)
    return images.reset_index(drop=True).assign(**held)


def check_layout(format: str, probe: Probe | None, draft: Draft | None) -> list[Finding]:
    """What the format recognised, what is absent, and what its lenient reader had to skip or say."""
    findings = []
    if probe is not None:
        findings.append(finding("layout", "note", 1, 1, "folders", f"{format}: {probe.variant}, in {probe.folder}."))
        if probe.missing:
            text = f"{are(len(probe.missing), 'part')} missing from {probe.folder}; a whole {format} copy has them."
            findings.append(
                finding(
                    "missing-parts", "warning", len(probe.missing), len(probe.missing), "parts", text, probe.missing
                )
            )
    notes = [*(probe.notes if probe else ()), *(draft.notes if draft else ())]
    if draft is not None and draft.problems:
        total = len(draft.entries) + len(draft.problems)
        text = f"{are(len(draft.problems), 'entry', 'entries')} not as {format} documents and would stop an import."
        findings.append(finding("bad-entries", "error", len(draft.problems), total, "entries", text, draft.problems))
    kept = sum(kind == "full" for entry in draft.entries for kind, _, _ in entry.texts) if draft else 0
    return findings + check_notes(notes, kept)


def check_notes(notes: Sequence[str], captions: int = 0) -> list[Finding]:
    """Sort what a reader said into findings: counts unlike the release, empty captions that it left out, the rest.

    Args:
        notes: the reader's sentences.
        captions: how many whole captions it kept.
    """
    findings = []
    differ = [note for note in notes if note.endswith(_UNOFFICIAL)]
    if differ:
        # People, images and captions of a split are one sentence, its roles another.
        splits = len({note.split(": found")[0] for note in differ})
        text = f"{are(splits, 'split')} unlike the official release; published numbers do not compare."
        findings.append(finding("split-counts", "warning", splits, splits, "splits", text, differ))
    for note in notes:
        if match := _EMPTY_NOTE.match(note):
            count = int(match[1].replace(",", ""))
            findings.append(finding("empty-captions", "warning", count, captions + count, "captions", note))
    rest = [note for note in notes if note not in differ and not _EMPTY_NOTE.match(note)]
    if rest:
        text = f"The reader left {len(rest)} note{'s' if len(rest) > 1 else ''}."
        findings.append(finding("reader-notes", "note", len(rest), len(rest), "notes", text, rest))
    return findings


def check_files(images: pd.DataFrame) -> list[Finding]:
    """Files that are missing, damaged, absurd or changed, and the sizes of the others (`image_table`)."""
    total = len(images)
    if not total:
        return [finding("no-images", "error", 0, 0, "images", "No entry names an image.")]
    findings = []
    ids = images["image_id"]
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].unique()
        findings.append(
            finding(
                "repeated-ids",
                "error",
                len(twice),
                total,
                "images",
                f"{are(len(twice), 'image')} listed several times.",
                twice,
            )
        )
    findings += _missing(images)
    what = {
        "unreadable": "not readable as an image",
        "truncated": "truncated or damaged",
        "huge": "far too large for a picture of a person",
    }
    for kind, words in what.items():
        bad = images[images["problem"] == kind]
        if len(bad):
            text = f"{are(len(bad), 'image')} {words}."
            findings.append(finding(f"{kind}-images", "error", len(bad), total, "images", text, bad["message"]))
    good = images[images["problem"] == ""]
    return findings + _changed(good) + _sizes(good)


def _missing(images: pd.DataFrame) -> list[Finding]:
    gone = (images["problem"] == "missing").to_numpy()
    if not gone.any():
        return []
    folders = _subfolders(images["path"].tolist())
    totals = Counter(folders)
    counts = Counter(name for name, absent in zip(folders, gone, strict=True) if absent).most_common()
    parts = [f"{name} {count:,} of {totals[name]:,}" for name, count in counts[:EXAMPLES]]
    more = f" and {len(counts) - EXAMPLES:,} more folders" if len(counts) > EXAMPLES else ""
    text = f"{are(int(gone.sum()), 'image')} missing: {', '.join(parts)}{more}."
    by_folder = {name: {"missing": count, "total": totals[name]} for name, count in counts[:50]}
    rows = images.loc[gone, "path"]
    return [finding("missing-images", "error", len(rows), len(images), "images", text, rows, folders=by_folder)]


def _subfolders(paths: Sequence[str]) -> list[str]:
    """The first folder of every path below the one that all share."""
    parents = [os.path.dirname(path) for path in paths]
    distinct = sorted(set(parents))
    base = os.path.commonpath(distinct) if len(distinct) > 1 else os.path.dirname(distinct[0])
    name = {parent: (Path(os.path.relpath(parent, base or ".")).parts or (".",))[0] for parent in distinct}
    return [name[parent] for parent in parents]


def _changed(good: pd.DataFrame) -> list[Finding]:
    """Only a table of an import says what the files were."""
    if "sha256" not in good.columns:
        return []
    other = good[good["sha256"] != good["file_sha256"]]
    if not len(other):
        return []
    text = f"{are(len(other), 'file')} not what was imported: the bytes differ from the table's sha256."
    return [finding("changed-images", "error", len(other), len(good), "images", text, other["path"])]


def _sizes(good: pd.DataFrame) -> list[Finding]:
    if not len(good):
        return []
    width, height = good["file_width"], good["file_height"]
    smallest = good.iloc[int((width * height).to_numpy().argmin())]
    median = (int(width.median()), int(height.median()))
    least = (int(smallest["file_width"]), int(smallest["file_height"]))
    text = f"Images are {median[0]}x{median[1]} (width x height) in the median; the smallest is {least[0]}x{least[1]}."
    findings = [
        finding(
            "image-sizes",
            "note",
            len(good),
            len(good),
            "images",
            text,
            [smallest["image_id"]],
            median=median,
            smallest=least,
        )
    ]
    wide = good[width > height]
    if len(wide):
        text = f"{are(len(wide), 'image')} wider than tall; people are taller than wide."
        findings.append(finding("wide-images", "note", len(wide), len(good), "images", text, wide["image_id"]))
    return findings
