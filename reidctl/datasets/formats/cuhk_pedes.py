"""CUHK-PEDES: people with two sentences per image (`reid_raw.json`, images under `imgs/`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from reidctl.datasets.base import SPLITS, Draft, Entry, Options, compare_counts, find_root, safe_join
from reidctl.errors import DataError

OPTIONS: frozenset[str] = frozenset()
NAME = "cuhk-pedes"
# People, images, captions: the release of 40,206 images with the split of Li et al. 2017.
OFFICIAL = {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)}


def read(root: Path, options: Options) -> Draft:
    """Return the images and sentences of `root` or `root/CUHK-PEDES`.

    Raises:
        DataError: no annotation file, the older `caption_all.json` only, or an entry that is not as documented.
    """
    folder = _locate(root)
    annotation = folder / "reid_raw.json"
    items = _load(annotation)
    entries: dict[str, Entry] = {}
    empty: list[str] = []
    repeated = 0
    for number, item in enumerate(items):
        entry = _entry(item, f"{annotation}, entry {number}", folder / "imgs", empty)
        known = entries.get(entry.key)
        if known is None:
            entries[entry.key] = entry
            continue
        if (known.person, known.split) != (entry.person, entry.split):
            raise DataError(f"{annotation}, entry {number}: {entry.key} was listed before with another id or split.")
        repeated += 1
        new = [text for text in entry.texts if text not in known.texts]
        entries[entry.key] = replace(known, texts=[*known.texts, *new])
    rows = list(entries.values())
    notes = compare_counts(rows, OFFICIAL, "CUHK-PEDES")
    if empty:
        notes.append(f"{len(empty)} empty caption(s) left out, the first of {empty[0]}.")
    if repeated:
        notes.append(f"{repeated} image(s) listed more than once; their captions were joined.")
    return Draft(NAME, rows, annotation, notes)


def _locate(root: Path) -> Path:
    for folder in (root, root / "CUHK-PEDES"):
        if not (folder / "reid_raw.json").exists() and (folder / "caption_all.json").exists():
            raise DataError(
                f"{folder} holds `caption_all.json`, the first release, which has no `split` field; "
                "`reid_raw.json` has one.",
                hint="Ask the authors for reid_raw.json: without the official split no number compares.",
            )
    return find_root(root, "CUHK-PEDES", "reid_raw.json")


def _load(path: Path) -> list[Any]:
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path} is not valid JSON ({error}).", hint="Is the download complete?") from None
    if not isinstance(items, list):
        raise DataError(f"{path} must be a list of images, not {type(items).__name__}.")
    return items


def _entry(item: Any, where: str, images: Path, empty: list[str]) -> Entry:
    if not isinstance(item, dict):
        raise DataError(f"{where}: must be an object, not {type(item).__name__}.")
    missing = [key for key in ("split", "captions", "file_path", "id") if key not in item]
    if missing:
        hint = "The older caption_all.json has no split." if missing == ["split"] else ""
        raise DataError(f"{where}: lacks {', '.join(missing)} (found: {', '.join(map(str, item))}).", hint=hint)
    name, person, split, captions = item["file_path"], item["id"], item["split"], item["captions"]
    if split not in SPLITS:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}.")
    if isinstance(person, bool) or not isinstance(person, int | str) or not str(person).strip():
        raise DataError(f"{where}: id {person!r} is not a number or a text.")
    if not isinstance(name, str):
        raise DataError(f"{where}: file_path {name!r} is not a text.")
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: captions must be a list of texts.")
    path = safe_join(images, name, where)
    texts = [_text(text, where) for text in captions]
    empty += [name for text in texts if not text]
    key = path.relative_to(images.absolute()).as_posix()
    return Entry(key, path, split, str(person), texts=[("full", text, "image") for text in texts if text])


def _text(text: str, where: str) -> str:
    if "\0" in text:
        raise DataError(f"{where}: a caption holds a NUL byte.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: a caption holds half a character (a lone surrogate).") from None
    return text.strip()
