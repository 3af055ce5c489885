"""`data check`: look a dataset over and say what is wrong with it; nothing is written."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl import tables
from reidctl.console import progress
from reidctl.datasets import caption_checks, checks, image_checks, registry
from reidctl.datasets.base import Draft, Options, Probe, caption_table
from reidctl.datasets.checks import SEVERITIES, Finding, finding
from reidctl.datasets.named import check_listable
from reidctl.datasets.scan import Found, scan
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages.counting import count_splits

STAGE = "data"
# Formats that would take nearly any table or folder: chosen only when no other recognises it, the last one last.
_GENERIC = ("csv-table", "folder")
TOKENIZERS, _NO_TOKENIZER = ("clip", "bert"), "none"
# UFine6926's authors stretch CLIP's positions to 168 tokens.
_CLIP_CONTEXTS, _BERT_CONTEXTS = (77, 168), (64, 128, 512)


@dataclass(frozen=True)
class _Subject:
    """What is checked: tables, and what was found while reading them."""

    source: str
    images: pd.DataFrame
    captions: pd.DataFrame
    known_people: bool
    findings: list[Finding]


def run(
    run: Run,
    *,
    root: Path | None = None,
    format: str | None = None,
    images: Path | None = None,
    tokenizers: Sequence[str] = TOKENIZERS,
    workers: int = 0,
    near: bool = False,
) -> dict[str, Any]:
    """Check a dataset where it lies, or (without `root`) the tables of a run's `data` stage and the files they name.

    Args:
        run: read if there is no `root`; nothing is written into it.
        root: a dataset's folder or table.
        format: how to read it; None: what recognises it.
        images: folder that a table's image paths are relative to.
        tokenizers: `clip`, `bert`, a BERT `vocab.txt` or the folder of one, or `none`.
        workers: processes that read images; 0: one per core.
        near: also look for training images that nearly equal one of another split.

    Returns:
        A record with `status` (ok, problems), `findings` (worst first), `source` (the format), `root`, `datasets`,
        `splits` and `metrics` (errors, warnings, notes, images, captions, truncation by dataset).

    Raises:
        UsageError: an unknown format or tokenizer, `none` beside others, `images` of a run, or several formats
            recognise the folder.
        DataError: no such folder, it may not be read, nothing recognises it, or the run has no dataset.
    """
    started = time.monotonic()
    _check_tokenizers(tokenizers)
    if root is None and images is not None:
        raise UsageError("The option `images` goes with a table; a run knows where its images are.")
    subject = _of_run(run) if root is None else _of_folder(root, format, images)
    findings = list(subject.findings)
    truncation: dict[str, dict[str, float]] = {}
    if subject.source:
        findings += _check_images(subject, workers, near)
        findings += caption_checks.check_captions(subject.images, subject.captions, known_people=subject.known_people)
        cut, truncation = _check_lengths(subject, tokenizers)
        findings += cut
    findings.sort(key=lambda item: (SEVERITIES.index(item.severity), list(checks.CHECKS).index(item.check)))
    numbers = Counter(item.severity for item in findings)
    return {
        "stage": "data-check",
        "status": "problems" if numbers["error"] else "ok",
        "outputs": {},
        "metrics": {
            **{f"{name}s": numbers[name] for name in SEVERITIES},
            "images": len(subject.images),
            "captions": int(subject.captions["kind"].isin(caption_checks.KINDS).sum()),
            "truncation": truncation,
        },
        "seconds": round(time.monotonic() - started, 3),
        "source": subject.source,
        "root": None if root is None else str(root),
        "datasets": sorted(set(subject.images.get("dataset", ()))),
        "splits": count_splits(subject.images, subject.captions) if len(subject.images) else {},
        "findings": [item.row() for item in findings],
    }


def _of_run(run: Run) -> _Subject:
    record = run.require(STAGE, command="data import")
    images = tables.read_table(run.table(STAGE, "images"), "images")
    path = run.table(STAGE, "captions")
    captions = tables.read_table(path, "captions") if path.is_file() else tables.empty("captions")
    # Rendered images lie beside their table; imported ones stayed where they were.
    images["path"] = [str((run.stage_dir(STAGE) / name).absolute()) for name in images["path"]]
    notes = [str(note) for note in record.get("notes", [])]
    known = bool(record.get("known_people", True))
    kept = int((captions["kind"] == "full").sum())
    return _Subject(str(record.get("source") or "run"), images, captions, known, checks.check_notes(notes, kept))


def _of_folder(root: Path, format: str | None, images: Path | None) -> _Subject:
    check_listable(root)
    if not root.exists():
        raise DataError(f"{root} does not exist.", hint="Give the folder that holds the dataset.")
    name, probe = (format.replace("_", "-"), _probe(format, root)) if format else detect(root)
    if images is not None and "images" not in registry.supported_options(name):
        raise UsageError(f"The format {name} does not have the option `images`.")
    try:
        draft = registry.reader(name)(root, Options(lenient=True, images=images))
    except (DataError, PermissionError) as error:
        # Not every reader puts a folder that may not be read into words of its own.
        told = str(error) if isinstance(error, DataError) else f"{error.filename} may not be read: {error.strerror}."
        wrong = finding("bad-entries", "error", 1, 1, "entries", told)
        return _Subject(
            "", pd.DataFrame(), tables.empty("captions"), True, [*checks.check_layout(name, probe, None), wrong]
        )
    return _subject(name, probe, draft)


def _subject(name: str, probe: Probe | None, draft: Draft) -> _Subject:
    table = checks.draft_table(draft)
    captions = caption_table(draft.dataset, draft.entries)
    return _Subject(name, table, captions, draft.known_people, checks.check_layout(name, probe, draft))


def detect(root: Path) -> tuple[str, Probe]:
    """Return the format that recognises a folder or file, and what it recognised.

    A format of a public dataset goes before the general ones, a folder's own table before the folder, and a whole copy
    before one with missing parts.

    Raises:
        UsageError: several recognise it equally well.
        DataError: none does.
    """
    known = {name: probe for name in registry.format_names() if (probe := _probe(name, root)) is not None}
    if not known and (root / STAGE / "stage.json").is_file():
        raise DataError(
            f"No format recognises {root}: it is a run, not a dataset.", hint=f"`reidctl data check --run {root}`"
        )
    if not known:
        check_listable(root, sorted(path.name for path in root.iterdir()) if root.is_dir() else ())
        raise DataError(
            f"No format recognises {root}.",
            hint=f"Name one: `reidctl data check FORMAT {root}`, of {', '.join(registry.format_names())}.",
        )
    first = min(map(_generality, known))
    public = {name: probe for name, probe in known.items() if _generality(name) == first}
    best = {name: probe for name, probe in public.items() if not probe.missing} or public
    if len(best) > 1:
        raise UsageError(f"{root} could be {' or '.join(best)}.", hint=f"Name one: `reidctl data check FORMAT {root}`.")
    return next(iter(best.items()))


def _generality(name: str) -> int:
    return _GENERIC.index(name) + 1 if name in _GENERIC else 0


def _probe(name: str, root: Path) -> Probe | None:
    try:
        return registry.probe(name, root)
    except AttributeError as error:
        # A format need not be able to recognise itself.
        if error.name != "probe":
            raise
        return None
    except PermissionError as error:
        # It knew enough of the folder to look further.
        return Probe(root, f"with {error.filename}, which may not be read")
    except DataError:
        return None


def _check_images(subject: _Subject, workers: int, near: bool) -> list[Finding]:
    images = subject.images
    paths = [Path(path) for path in images["path"]] if len(images) else []
    found = checks.image_table(images, _advancing(paths, workers, near))
    findings = checks.check_files(found)
    if not len(images):
        return findings
    # An image listed twice is one mistake, not a duplicate of itself too.
    once = found.drop_duplicates("image_id")
    findings += image_checks.check_duplicates(once, known_people=subject.known_people)
    if near:
        findings += image_checks.check_near(once)
    if subject.known_people:
        findings += image_checks.check_people(once)
        findings += image_checks.check_queries(once, subject.captions)
    return findings


def _advancing(paths: Sequence[Path], workers: int, near: bool) -> Iterator[Found]:
    reading = scan(paths, workers=workers, pixels=True, near=near)
    with closing(reading), progress("read images", len(paths)) as advance:
        for item in reading:
            advance()
            yield item


class _Measure:
    """A tokenizer with the contexts that models give it."""

    def __init__(self, name: str, tokenizer: Any, contexts: Sequence[int], *, estimate: bool = False) -> None:
        self.name, self.tokenizer, self.contexts, self.estimate = name, tokenizer, contexts, estimate

    def length(self, text: str) -> int:
        """The tokens of a text, start and end included."""
        return len(self.tokenizer.encode(text)) + 2


def _check_tokenizers(names: Sequence[str]) -> None:
    """Refuse a mistake at once: the tokenizers themselves are loaded when there are captions to count."""
    if _NO_TOKENIZER in names and set(names) != {_NO_TOKENIZER}:
        raise UsageError("The tokenizer `none` stands alone.", hint="Leave it out, or the others.")
    for name in names:
        if name not in (*TOKENIZERS, _NO_TOKENIZER) and not _vocabulary(name).is_file():
            raise UsageError(
                f"No tokenizer `{name}`.", hint="One of: clip, bert, none, or a BERT vocab.txt or the folder of one."
            )


def _vocabulary(name: str) -> Path:
    path = Path(name)
    return path / "vocab.txt" if path.is_dir() else path


def _tokenizer(name: str) -> _Measure:
    # Imported here: a check without captions or tokenizers loads no torch.
    from reidctl.backbones.tokenizers import ClipTokenizer, WordPieceTokenizer

    if name == "clip":
        return _Measure("CLIP", ClipTokenizer(), _CLIP_CONTEXTS)
    cached = _cached_vocabulary() if name == "bert" else _vocabulary(name)
    if cached is None:
        # The shipped pieces are shorter than those of bert-base-uncased.
        return _Measure("BERT", WordPieceTokenizer(), _BERT_CONTEXTS, estimate=True)
    try:
        vocabulary = cached.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{cached} is not UTF-8 (byte {error.start}).") from None
    return _Measure("BERT", WordPieceTokenizer(vocabulary=vocabulary), _BERT_CONTEXTS)


def _cached_vocabulary() -> Path | None:
    """The vocabulary of bert-base-uncased, if it was downloaded before; nothing is downloaded here."""
    from huggingface_hub import try_to_load_from_cache

    for source in ("google-bert/bert-base-uncased", "bert-base-uncased"):
        found = try_to_load_from_cache(source, "vocab.txt")
        if isinstance(found, str):
            return Path(found)
    return None


def _check_lengths(subject: _Subject, tokenizers: Sequence[str]) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    if not len(subject.captions) or not len(subject.images):
        return [], {}
    texts = caption_checks.caption_texts(subject.images, subject.captions)
    if not len(texts):
        return [], {}
    findings: list[Finding] = []
    rates: dict[str, dict[str, float]] = {}
    distinct = texts["text"].unique()
    for measure in (_tokenizer(name) for name in dict.fromkeys(tokenizers) if name != _NO_TOKENIZER):
        with progress(f"count {measure.name} tokens", len(distinct), unit="texts") as advance:
            lengths = {}
            for text in distinct:
                lengths[text] = measure.length(text)
                advance()
        some, by_dataset = caption_checks.check_truncation(
            texts, [lengths[text] for text in texts["text"]], measure.name, measure.contexts, estimate=measure.estimate
        )
        findings += some
        for dataset, mine in by_dataset.items():
            rates.setdefault(dataset, {}).update(mine)
    return findings, rates
