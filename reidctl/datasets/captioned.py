"""What the captioned sets share: one JSON list of images with person, sentences and, as a rule, a split.

CUHK-PEDES began it, ICFG-PEDES, RSTPReid and UFine6926 follow. A set differs from the others in file names, in the
key that holds the image's path and in what it counts; `Release` says that, and everything else is here.
"""

import codecs
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from reidctl.datasets.base import SPLITS, Draft, Entry, Options, Probe, compare_counts
from reidctl.datasets.paths import inside
from reidctl.datasets.splits import carve_validation, count_people
from reidctl.datasets.writing import captions_of
from reidctl.errors import DataError, UsageError

# The largest public file of the family is far below; Python needs about ten times the size to hold the list.
MAX_JSON = 512 << 20
# Some public code keeps the annotation file here instead of beside the images.
_ASIDE = "annotations"
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CAMERA = re.compile(r"c(\d+)")


@dataclass(frozen=True)
class Release:
    """How one set of the family is laid out.

    Attributes:
        name: the format's name and the dataset's in ids.
        title: its name in sentences.
        inner: folders inside ROOT that may hold it.
        annotations: the file's names in circulation, the one to prefer first.
        official: (people, images, captions) of every split as the release counts them, entry by entry.
        images: folders that paths may start from, the release's first.
        subfolders: folders below `images` that a whole copy has.
        renamed: another name in circulation for the first folder of paths.
        path_key: the key that holds an image's path.
        camera: what finds the camera's number in a file name.
    """

    name: str
    title: str
    inner: tuple[str, ...]
    annotations: tuple[str, ...]
    official: Mapping[str, tuple[int, int, int]]
    images: tuple[str, ...] = ("imgs",)
    subfolders: tuple[str, ...] = ()
    renamed: str = ""
    path_key: str = "file_path"
    camera: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Place:
    """The folder that holds a set, and its annotation file."""

    folder: Path
    annotation: Path


def find(root: Path, release: Release) -> Place | None:
    """Return where the set is: in `root` or one of its inner folders, the file perhaps in `annotations/`; or None.

    `root` may be the annotation file itself, which is then the one to read.
    """
    if (above := _folder(root, release)) != root:
        return Place(above, root.absolute())
    for folder in (root, *(root / inner for inner in release.inner)):
        for name in release.annotations:
            for annotation in (folder / name, folder / _ASIDE / name):
                # Unlike `Path.exists`, this says no where a folder may not be read.
                if os.path.exists(annotation):
                    return Place(folder, annotation)
    return None


def _folder(root: Path, release: Release) -> Path:
    """The folder of an annotation file that was given in place of it."""
    if root.name not in release.annotations or not root.is_file():
        return root
    above = root.absolute().parent
    return above.parent if above.name == _ASIDE else above


def locate(root: Path, release: Release) -> Place:
    """Return where the set is.

    Raises:
        DataError: there is no annotation file in any of the places.
    """
    place = find(root, release)
    if place is None:
        names = " or ".join(f"`{name}`" for name in release.annotations)
        if root.is_file():
            raise DataError(
                f"{root} is a file, not a folder of {release.title}.", hint=f"Give the folder with {names}."
            )
        raise DataError(
            f"Neither {root} nor {root / release.inner[0]} holds {names}.",
            hint="Give the folder that holds it; docs/datasets.md shows the expected folder tree.",
        )
    return place


def probe(root: Path, release: Release) -> Probe | None:
    """Return what of the set is in `root`, by names of files and top folders only."""
    place = find(root, release)
    root = _folder(root, release)
    if place is not None:
        aside = f" in {_ASIDE}/" if place.annotation.parent != place.folder else ""
        below = "" if place.folder == root else f", one folder below in {place.folder.relative_to(root)}/"
        variant = f"{release.title} by {place.annotation.name}{aside}{below}"
        return Probe(place.folder, variant, _missing(place.folder, release))
    for folder in (root, *(root / inner for inner in release.inner)):
        # The name is the only evidence: other sets keep images under `imgs/` too.
        if folder.name in release.inner and folder.is_dir():
            missing = (release.annotations[0], *_missing(folder, release))
            return Probe(folder, f"{release.title} without its annotation file", missing)
    return None


def _missing(folder: Path, release: Release) -> tuple[str, ...]:
    if _is_renamed(folder, release):
        return ()
    bases = [name for name in release.images if (folder / name).is_dir()]
    if not bases:
        return (release.images[0],)
    best = max(bases, key=lambda base: sum((folder / base / name).is_dir() for name in release.subfolders))
    names = [PurePosixPath(best, name).as_posix() for name in release.subfolders]
    return tuple(name for name in names if not (folder / name).is_dir())


def _is_renamed(folder: Path, release: Release) -> bool:
    """Whether the folder that paths begin with is there under its other name alone."""
    own = (folder / base / name for base in release.images for name in release.subfolders)
    return bool(release.renamed) and (folder / release.renamed).is_dir() and not any(path.is_dir() for path in own)


def load(path: Path) -> list[Any]:
    """Return the list that an annotation file holds.

    Raises:
        DataError: not a regular file, above 512 MiB (said without reading it), not UTF-8, not JSON, or no list.
    """
    hint = "Is the download complete?"
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{path} is not a regular file.", hint=hint)
        if facts.st_size > MAX_JSON:
            size = f"{facts.st_size >> 20:,} MiB; the limit is {MAX_JSON >> 20} MiB"
            raise DataError(f"{path} has {size}.", hint="It should hold one short entry per image.")
        items = json.loads(_decode(path.read_bytes(), path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", hint=hint) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            # Python's own sentence speaks of a setting of the interpreter.
            raise DataError(f"{path} holds a number of thousands of digits.", hint=hint) from None
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
        raise DataError(f"{path} is not valid JSON ({reason}).", hint=hint) from None
    if not isinstance(items, list):
        raise DataError(f"{path} must be a list of images, not {type(items).__name__}.")
    return items


def _decode(content: bytes, path: Path) -> str:
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    try:
        return content[len(mark) :].decode()
    except UnicodeDecodeError as error:
        where = error.start + len(mark)
        raise DataError(f"{path} is not UTF-8 (byte {where}).", hint="Save it as UTF-8, without changing it.") from None


@dataclass
class _Reading:
    """What reading one file has found so far."""

    rows: dict[str, Entry] = field(default_factory=dict)
    listed: list[Entry] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(place: Place, release: Release, options: Options, items: list[Any], *, split: str | None = None) -> Draft:
    """Return the images that the entries of an annotation file list, with notes on what is unlike the release.

    Args:
        place: where the set is.
        release: how it is laid out.
        options: `lenient`, and `carve_val` with its `seed`, are heeded.
        items: what `load` returned.
        split: the split of every entry, where the file names none.

    Raises:
        DataError: an entry that is not as documented, or no folder of images at all (unless `options.lenient`).
        UsageError: `carve_val` asks for more people than train has.
    """
    found = _Reading()
    images = _image_folder(place.folder, release, items).absolute()
    for number, item in enumerate(items):
        where = f"{place.annotation}, entry {number}"
        try:
            entry = _entry(item, where, images, release, split, found.empty)
            known = found.rows.get(entry.key)
            found.rows[entry.key] = entry if known is None else _join(known, entry, where)
        except DataError as error:
            if not options.lenient:
                raise
            found.problems.append(error.message)
        else:
            found.listed.append(entry)
    if found.rows and not options.lenient:
        _check_images(place.folder, release)
    # Counted entry by entry, as the releases count: ICFG-PEDES lists one image twice.
    notes = compare_counts(found.listed, release.official, release.title)
    rows = _found_below(place.folder, release, list(found.rows.values()))
    draft = Draft(release.name, rows, place.annotation, [*notes, *_notes(found)], problems=found.problems)
    carve(draft, options)
    return draft


def _check_images(folder: Path, release: Release) -> None:
    """Refuse a copy without images in one sentence: each of them would be missing."""
    own = [folder / (release.subfolders[0] if name == "." else name) for name in release.images]
    if not any(map(os.path.isdir, own)):
        names = " or ".join(f"`{path.name}/`" for path in own)
        hint = "Is the copy complete? `reidctl data check` names what it lacks."
        raise DataError(f"{folder} holds no folder {names}, where the images of {release.title} lie.", hint=hint)


def _found_below(folder: Path, release: Release, rows: list[Entry]) -> list[Entry]:
    """The entries, with their files below the other name of their first folder if that is what the copy has."""
    if not _is_renamed(folder, release):
        return rows
    base, old = folder.absolute() / release.renamed, f"{release.subfolders[0]}/"
    return [replace(row, path=base / row.key.removeprefix(old)) if row.key.startswith(old) else row for row in rows]


def _notes(found: _Reading) -> list[str]:
    notes = []
    if found.empty:
        notes.append(f"{len(found.empty)} empty caption(s) left out, the first of {found.empty[0]}.")
    silent = [entry.key for entry in found.rows.values() if not entry.texts]
    if silent:
        notes.append(f"{len(silent)} image(s) have no caption, the first: {silent[0]}.")
    repeated = len(found.listed) - len(found.rows)
    if repeated:
        notes.append(f"{repeated} image(s) listed more than once; their captions were joined.")
    return notes


def carve(draft: Draft, options: Options) -> None:
    """Move `options.carve_val` people from train to val in place, without roles.

    Raises:
        UsageError: train has not that many people.
    """
    if not options.carve_val:
        return
    carved = carve_validation(draft.entries, options.carve_val, options.seed)
    # Roles are of image-to-image search; here every image is in the gallery and every caption is a query.
    draft.entries = [replace(entry, role=None) if entry.role else entry for entry in carved]
    draft.notes.append(f"{count_people(options.carve_val)} moved from train to val (seed {options.seed}).")


def _image_folder(folder: Path, release: Release, items: list[Any]) -> Path:
    """The first of the release's folders in which the first entry's image exists, else the release's own."""
    first = items[0].get(release.path_key) if items and isinstance(items[0], dict) else None
    if not isinstance(first, str):
        return folder / release.images[0]
    # `os.path.exists` says no to a NUL byte where `Path.exists` would raise.
    found = (name for name in release.images if os.path.exists(os.path.join(folder, name, first)))
    return folder / next(found, release.images[0])


def _entry(item: Any, where: str, images: Path, release: Release, split: str | None, empty: list[str]) -> Entry:
    if not isinstance(item, dict):
        raise DataError(f"{where}: must be an object, not {type(item).__name__}.")
    wanted = ("captions", release.path_key, "id") if split else ("split", "captions", release.path_key, "id")
    missing = [key for key in wanted if key not in item]
    if missing:
        keys = ", ".join(str(key)[:40] for key in list(item)[:10])
        raise DataError(f"{where}: lacks {', '.join(missing)} (found: {keys}).")
    split = split or _known_split(item["split"], where)
    name = item[release.path_key]
    if not isinstance(name, str):
        raise DataError(f"{where}: {release.path_key} {name!r} is not a text.")
    path = inside(images, _clean(name, where, release.path_key), where)
    key = path.as_posix()[len(images.as_posix()) + 1 :]
    texts = _sentences(item["captions"], where)
    empty += [key for text in texts if not text]
    match = release.camera.fullmatch(path.stem) if release.camera else None
    camera = f"c{int(match[1])}" if match else None
    spoken = [("full", text, "image") for text in texts if text]
    return Entry(key, path, split, _person(item["id"], where), camera=camera, texts=spoken)


def _known_split(split: Any, where: str) -> str:
    if split not in SPLITS:
        raise DataError(f"{where}: split {str(split)[:80]!r} is none of {', '.join(SPLITS)}.")
    return str(split)


def _person(person: Any, where: str) -> str:
    if isinstance(person, bool) or not isinstance(person, int | str) or not str(person).strip():
        raise DataError(f"{where}: id {str(person)[:80]!r} is not a whole number or a text.")
    return _clean(str(person), where, "the id").strip()


def _sentences(captions: Any, where: str) -> list[str]:
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: captions must be a list of texts.")
    return [_clean(text, where, "a caption").strip() for text in captions]


def _clean(text: str, where: str, what: str) -> str:
    if "\0" in text:
        raise DataError(f"{where}: {what} holds a NUL byte.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {what} holds half a character (a lone surrogate).") from None
    return text


def _join(known: Entry, entry: Entry, where: str) -> Entry:
    if (known.person, known.split) != (entry.person, entry.split):
        raise DataError(f"{where}: {entry.key} was listed before with another id or split.")
    new = [text for text in entry.texts if text not in known.texts]
    return replace(known, texts=[*known.texts, *new])


# --- writing


def sentences_to_write(images: pd.DataFrame, captions: pd.DataFrame, title: str) -> dict[str, list[str]]:
    """Return the full captions by image id.

    Raises:
        UsageError: no image has one, so a captioned set would be empty of what it is for.
    """
    texts = captions_of(captions)
    if not any(name in texts for name in images["image_id"].astype(str)):
        raise UsageError(
            f"No image has a caption, and {title} is a list of captions.",
            hint="Write the layout of a set without captions, such as market-1501, or write captions first.",
        )
    return texts


def ranked_people(images: pd.DataFrame, start: int) -> dict[str, int]:
    """Return a number from `start` for every `person_id`: train first, then val and test, without a gap.

    Public code for these sets takes the training people's numbers as class labels and requires that.
    """
    order = {split: number for number, split in enumerate(SPLITS)}
    people = images[["person_id", "split"]].astype(str).drop_duplicates("person_id")
    ranked = sorted(zip(people["split"].map(order), people["person_id"], strict=True))
    return {person: number for number, (_, person) in enumerate(ranked, start=start)}


def camera_number(camera: Any) -> int | None:
    """Return 4 for the camera id "c4"; None for no camera or an id of another form."""
    match = _CAMERA.fullmatch(str(camera))
    return int(match[1]) if match else None


def words(text: str) -> list[str]:
    """Return the lower-case words of a sentence, which the releases store as `processed_tokens`."""
    return _WORD.findall(text.lower())


def save(path: Path, items: list[dict[str, Any]]) -> None:
    """Write an annotation file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items), encoding="utf-8")
