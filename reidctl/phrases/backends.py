"""Phrases from the dataset itself, from spaCy and from a file."""

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidctl.errors import DataError, UsageError
from reidctl.phrases.base import PARTS, Phrase, PhraseSource
from reidctl.phrases.lexicon import lexicon
from reidctl.phrases.reading import Missing, read_phrases
from reidctl.phrases.rules import extract, part_of

if TYPE_CHECKING:
    import pandas as pd

# What synthped calls the parts of its pictures; a name that is neither here nor in PARTS is no part.
_NAMES = {
    "person": "whole",
    "hair": "head",
    "face": "head",
    "hat": "head",
    "shoes": "feet",
    "bag": "carried",
    "umbrella": "carried",
    "phone": "carried",
} | {part: part for part in PARTS}


def rules_source(limit: int) -> PhraseSource:
    """Return the source that needs nothing: `rules.extract`."""
    return lambda captions: [extract(text, limit=limit) for text in captions]


def given_source(captions: "pd.DataFrame", limit: int) -> PhraseSource:
    """Return the phrases that a dataset brings along, by the text of their caption.

    These are the rows of kind `phrase`; `parent_id` names the caption. The part is the end of a row's id (`...-upper`)
    where that is a part, else by the rules. Texts without a given phrase get those of the rules, with a counted
    warning.

    Args:
        captions: rows of the `captions` table.
        limit: most phrases of a caption.
    """
    table = _given(captions, limit)
    return _looked_up(table, limit, "have no given phrases: the rules find them")


def _given(captions: "pd.DataFrame", limit: int) -> dict[str, list[Phrase]]:
    told = captions[captions["text"].notna() & (captions["status"] == "ok")]
    texts = dict(zip(told["caption_id"], told["text"], strict=True))
    lists: dict[str, list[dict[str, Any]]] = {}
    phrases = told[(told["kind"] == "phrase") & told["parent_id"].isin(set(texts))]
    for name, text, parent, start, end in zip(
        *(phrases[column] for column in ("caption_id", "text", "parent_id", "char_start", "char_end")), strict=True
    ):
        part = _NAMES.get(str(name).rsplit("-", 1)[-1])
        lists.setdefault(str(parent), []).append(
            {"text": text, "start": _whole(start), "end": _whole(end), "part": part}
        )
    table: dict[str, list[Phrase]] = {}
    for parent, values in lists.items():
        table.setdefault(texts[parent], read_phrases(values, texts[parent], limit))
    return table


def _whole(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


def _looked_up(table: dict[str, list[Phrase]], limit: int, why: str) -> PhraseSource:
    """A source that reads a table, and uses the rules for what is not there."""
    missing = Missing(why)

    def find(captions: Sequence[str]) -> list[list[Phrase]]:
        missing.add(sum(text not in table for text in captions))
        return [list(table[text]) if text in table else extract(text, limit=limit) for text in captions]

    return find


def file_source(path: Path, limit: int) -> PhraseSource:
    """Return the phrases that a file holds; other captions get those of the rules, with a counted warning.

    JSON: an object caption -> phrases, or a list of rows. JSON lines (`.jsonl`, `.ndjson`) and Parquet: rows with
    `caption` and `phrases`; the cache of another backend is such a file. Phrases: see `reading.read_phrases`.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    table: dict[str, list[Phrase]] = {}
    for where, caption, values in _rows(path):
        if not isinstance(caption, str):
            raise DataError(f"{where}: `caption` is no text.")
        try:
            table.setdefault(caption, read_phrases(values, caption, limit))
        except ValueError as error:
            raise DataError(f"{where}: {error}.", hint='Give a list of texts, or of {"text", "part"}.') from None
    return _looked_up(table, limit, f"are not in {path.name}: the rules find their phrases")


def _rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Where, the caption and its phrases, row by row."""
    if not path.is_file():
        raise DataError(f"No file of phrases at {path}.", hint="Give a JSON, JSON lines or Parquet file.")
    if path.suffix == ".parquet":
        rows = enumerate(_parquet(path))
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = enumerate((_json(line, f"{path}, line {n}") for n, line in _lines(path)), 1)
    else:
        whole = _json(_text(path), str(path))
        pairs = (
            [{"caption": key, "phrases": value} for key, value in whole.items()] if isinstance(whole, dict) else whole
        )
        if not isinstance(pairs, list):
            raise DataError(f"{path} is neither an object nor a list.", hint='Write {"caption": ["phrase", ...]}.')
        rows = enumerate(pairs)
    for number, row in rows:
        if not isinstance(row, dict) or not {"caption", "phrases"} <= set(row):
            raise DataError(f"{path}, row {number} lacks `caption` or `phrases`.")
        yield f"{path}, row {number}", row["caption"], row["phrases"]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line: JSON may hold other separators inside a text.
    return ((number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"Cannot read {path}: {reason}.") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not valid JSON.") from None


def _parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        names = [name for name in ("caption", "phrases") if name in table.column_names]
        rows: list[Any] = table.select(names).to_pylist()
    except (pa.ArrowException, OSError):
        raise DataError(f"{path} is not a readable Parquet file.") from None
    return rows


def spacy_source(model: str, limit: int) -> tuple[PhraseSource, str]:
    """Return a source of spaCy's noun chunks and what identifies it: the library, the model and their versions.

    Left out: pronouns and, by our lexicon, people, places, directions and nouns that say nothing alone ("her neck");
    determiners and possessives in front are taken off. The part is found by the rules.

    Raises:
        UsageError: spaCy or its model is not installed.
    """
    try:
        spacy: Any = import_module("spacy")
    except ImportError:
        raise UsageError(
            "phrases.backend=spacy needs spaCy, which is not installed.", hint="pip install spacy"
        ) from None
    try:
        language: Any = spacy.load(model, exclude=["ner", "lemmatizer"])
    except (OSError, ImportError):
        raise UsageError(
            f"There is no spaCy model `{model}`.", hint=f"Install it: python -m spacy download {model}"
        ) from None

    def find(captions: Sequence[str]) -> list[list[Phrase]]:
        documents = language.pipe(captions, batch_size=64)
        return [
            read_phrases([chunk for chunk in map(_chunk, document.noun_chunks) if chunk], text, limit)
            for text, document in zip(captions, documents, strict=True)
        ]

    return find, f"spacy {spacy.__version__} {model} {language.meta.get('version', '')}"


def _tells(noun: str) -> bool:
    """Whether a noun without an adjective names a thing: not "her neck", not "clothes"."""
    return not lexicon().is_body(noun) and not lexicon().has("bare", noun)


def _chunk(chunk: Any) -> dict[str, Any] | None:
    """A noun chunk without its determiners; None for one that names nothing on a person."""
    root = chunk.root
    if root.pos_ == "PRON" or lexicon().has("others", root.text.lower()):
        return None
    tokens = list(chunk)
    while tokens and tokens[0].pos_ in ("DET", "PRON", "PUNCT", "SPACE"):
        tokens.pop(0)
    if not tokens or (len(tokens) == 1 and not _tells(root.text.lower())):
        return None
    start, end = tokens[0].idx, tokens[-1].idx + len(tokens[-1].text)
    text = chunk.doc.text[start:end]
    return {"text": text, "start": start, "end": end, "part": part_of(text)}
