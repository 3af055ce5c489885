"""Tables of a user: CSV, TSV, JSON Lines or Parquet, read row by row, whatever is in them.

Files are streamed, so memory grows with what a reader keeps of the rows and not with the file. What cannot be a table
is refused in one sentence that names the line and byte: NUL bytes, UTF-16, bytes that are not UTF-8, an open quotation
mark, a row longer than the header, a line or a field without end.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reidctl.errors import DataError

PARQUET = frozenset({".parquet", ".pq"})
JSON_LINES = frozenset({".jsonl", ".ndjson"})
DELIMITED = frozenset({".csv", ".tsv", ".txt"})
SUFFIXES = PARQUET | JSON_LINES | DELIMITED
# A million images with ten sentences each are about 1 GB; more than this is another kind of file.
MAX_FILE = 4 << 30
MAX_LINE = 1 << 20
MAX_FIELD = 131_072
MAX_PROBLEMS = 1000
_BATCH = 4096
# What Excel reads in the first line as the name of the separator; saved again, the row may be padded.
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?\1*\s*', re.IGNORECASE)
# First bytes of what is renamed to .csv now and then.
_OTHERS = {
    b"PK\x03\x04": ("is an Excel workbook (or another zip file), not a table", "Save it as CSV UTF-8."),
    b"\xd0\xcf\x11\xe0": ("is an old Excel workbook, not a table", "Save it as CSV UTF-8."),
    b"\x1f\x8b": ("is compressed", "Unpack it first."),
    b"PAR1": ("is Parquet under another name", "Name it .parquet."),
}

Row = dict[str, Any]
Rename = Callable[[Sequence[str]], list[str]]


@dataclass
class Complaints:
    """What is wrong with single rows: the first stops the reading or, if `lenient`, each is noted and skipped."""

    lenient: bool = False
    problems: list[str] = field(default_factory=list)
    further: int = 0

    def __call__(self, error: DataError) -> None:
        """Raise the error, or remember its sentence."""
        if not self.lenient:
            raise error
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(error.message)
        else:
            self.further += 1

    def sentences(self) -> list[str]:
        """All sentences; the last says how many more there were."""
        what = "row is" if self.further == 1 else "rows are"
        return [*self.problems, *([f"{self.further:,} further {what} not as documented."] if self.further else [])]


@dataclass
class Table:
    """An open table.

    Attributes:
        columns: names after renaming; of JSON Lines they are known only when all rows have been read.
        rows: (number of the data row, value by column); values are texts, or what JSON and Parquet hold.
        blank: rows of empty cells passed over so far, as a spreadsheet writes them below its last row.
    """

    path: Path
    columns: list[str]
    rows: Iterator[tuple[int, Row]]
    blank: int = 0

    def where(self, number: int) -> str:
        """Return how an error names a row."""
        return f"{self.path}, data row {number}"

    def notes(self) -> list[str]:
        """What the user should know when all rows have been read."""
        return [f"{self.blank:,} row(s) of empty cells passed over."] if self.blank else []


def open_table(path: Path, complain: Complaints, *, rename: Rename = list, needed: Sequence[str] = ()) -> Table:
    """Open a table; its rows are read while they are asked for.

    Args:
        path: the file; its suffix tells the format, an unknown one means CSV.
        complain: takes what is wrong with single rows.
        rename: returns the names to use for the columns found.
        needed: columns (after renaming) without which the file is refused.

    Raises:
        DataError: no regular file, larger than `MAX_FILE`, not a table, a column missing or there twice.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file.", hint="Give the CSV, TSV, JSON Lines or Parquet file itself.")
    size, suffix = path.stat().st_size, path.suffix.lower()
    if size > MAX_FILE:
        raise DataError(
            f"{path} has {size / 2**30:.1f} GiB; the limit is {MAX_FILE >> 30} GiB.",
            hint="Import it in parts, as several datasets.",
        )
    if suffix == ".json":
        raise DataError(f"{path} is JSON, not a table.", hint="Write one object per line and name it .jsonl.")
    if suffix not in PARQUET:
        _refuse_others(path)
    checked = _checker(path, rename, needed)
    if suffix in PARQUET:
        return _parquet(path, complain, checked)
    return (_json_lines if suffix in JSON_LINES else _delimited)(path, complain, checked)


def _refuse_others(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(4)
    for mark, (what, hint) in _OTHERS.items():
        if start.startswith(mark):
            raise DataError(f"{path} {what}.", hint=hint)


def columns_of(path: Path) -> list[str]:
    """Return the columns of a table from its first row; empty if it cannot be read as one."""
    try:
        table = open_table(path, Complaints())
        if path.suffix.lower() in JSON_LINES:
            next(table.rows, None)
        return table.columns
    except (DataError, OSError):
        return []


def shown(names: Sequence[str]) -> str:
    """Return names for a sentence: a file that is no table may have thousands, and long ones."""
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:20]]
    return ", ".join(short + ([f"and {len(names) - 20:,} more"] if len(names) > 20 else [])) or "none"


def text_of(value: Any, where: str, column: str) -> str:
    """Return a cell as text without surrounding space: 7 and 7.0 are "7", absent and NaN are "".

    Raises:
        DataError: a list, an object or bytes, a NUL byte, or half a character.
    """
    if isinstance(value, str):
        text = value.strip()
        if not text.isascii() or "\0" in text:
            _check_text(text, where, column)
        return text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict | bytes | bytearray):
        raise DataError(f"{where}: `{column}` must be a text, not {type(value).__name__}.")
    # Pandas writes whole numbers as 7.0 as soon as one cell of a column is empty.
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value)) if whole else str(value)


def _check_text(text: str, where: str, column: str) -> None:
    if "\0" in text:
        raise DataError(f"{where}: `{column}` holds a NUL byte.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: `{column}` holds half a character (a lone surrogate).") from None


def list_of(value: Any, where: str, column: str) -> list[str]:
    """Return the texts of a cell that holds a list, or a JSON list as text; empty texts are left out.

    Raises:
        DataError: it is no list of texts.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f'{where}: `{column}` is not a JSON list such as ["one", "two"].') from None
    if not isinstance(value, list) or not all(isinstance(item, str | None) for item in value):
        raise DataError(f"{where}: `{column}` must be a list of texts.")
    texts = [text_of(item, where, column) for item in value]
    return [text for text in texts if text]


def facts_of(value: Any, where: str, column: str) -> dict[str, str]:
    """Return the facts of a cell that holds an object, a map, or a JSON object as text; empty ones are left out.

    Raises:
        DataError: it is none of these.
    """
    if value is None or value == "":
        return {}
    try:
        found = dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, RecursionError):
        raise DataError(f'{where}: `{column}` is not an object such as {{"hat": "yes"}}.') from None
    texts = {str(name): text_of(item, where, f"{column}.{name}") for name, item in found.items()}
    return {name: text for name, text in texts.items() if text}


def _checker(path: Path, rename: Rename, needed: Sequence[str]) -> Rename:
    def checked(names: Sequence[str]) -> list[str]:
        found = rename([name.strip() for name in names])
        repeated = sorted(name for name, count in Counter(found).items() if name and count > 1)
        if repeated:
            raise DataError(f"{path} has the column(s) {shown(repeated)} twice.")
        for column in needed:
            if column not in found:
                raise DataError(
                    f"{path} lacks the column `{column}`; it has: {shown(found)}.",
                    hint=f"Rename the one that holds it to `{column}`.",
                )
        return found

    return checked


def _lines(path: Path, complain: Complaints) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, in bounded memory; lines that are no text are complained about."""
    offset = 0
    with path.open("rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16, not UTF-8.", hint="Save it as CSV UTF-8.")
        stream.seek(0)
        for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), start=1):
            start, offset = offset, offset + len(raw)
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                what = f"{path}, line {number} is longer than {MAX_LINE >> 20} MiB."
                mac = number == 1 and b"\r" in raw[:-1]
                complain(_mac(path) if mac else DataError(what, hint="Is it a text table?"))
                offset += _skip_line(stream)
                continue
            try:
                yield _decode(raw, path, number, start)
            except DataError as error:
                complain(error)


def _skip_line(stream: Any) -> int:
    skipped = 0
    while rest := stream.readline(MAX_LINE):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _decode(raw: bytes, path: Path, number: int, start: int) -> str:
    if (place := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} holds a NUL byte at offset {start + place} (line {number}); it is not a text file.")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number} is not UTF-8 (byte {start + error.start} of the file is 0x{raw[error.start]:02X}).",
            hint="Save it as CSV UTF-8.",
        ) from None


def _delimited(path: Path, complain: Complaints, rename: Rename) -> Table:
    lines = _lines(path, complain)
    filled = (line for line in lines if line.strip(" ,;\t\r\n"))
    first = next(filled, "")
    named = _SEPARATOR.fullmatch(first)
    first = next(filled, "") if named else first
    if not first:
        raise DataError(f"{path} is empty.")
    likely = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    separator = named[1] if named else likely
    # Strict: text after a closing quotation mark is a mistake and not part of the field.
    reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    try:
        columns = rename(next(reader))
    except csv.Error as error:
        if "new-line" in str(error):
            raise _mac(path) from None
        raise DataError(f"{path}: the header is not a regular row ({_reason(error)}).") from None
    table = Table(path, columns, iter(()))
    table.rows = _csv_rows(table, reader, complain)
    return table


def _mac(path: Path) -> DataError:
    what = "has the line ends of old Macs (a carriage return alone)"
    return DataError(f"{path} {what}.", hint="Save it as CSV UTF-8, with line ends of Unix or Windows.")


def _csv_rows(table: Table, reader: Any, complain: Complaints) -> Iterator[tuple[int, Row]]:
    columns, number = table.columns, 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            complain(DataError(f"{table.where(number)}: {_reason(error)}."))
            continue
        if not cells:
            number -= 1  # a blank line is no row
        elif not any(map(str.strip, cells)):
            table.blank += 1
        elif len(cells) > len(columns):
            what = f"{len(cells)} cells, but the header has {len(columns)}"
            hint = "Put texts that hold the separator in quotation marks."
            complain(DataError(f"{table.where(number)}: {what}.", hint=hint))
        else:
            # Trailing cells that a spreadsheet left out are empty.
            yield number, dict(zip(columns, cells, strict=False))


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text:
        return f"a field is longer than {csv.field_size_limit():,} characters; is a quotation mark left open?"[:-1]
    if "unexpected end" in text:
        return "a quotation mark is not closed before the end of the file"
    if "new-line" in text:
        return "a carriage return stands alone outside quotation marks"
    return f"not a regular row ({text})"


def _json_lines(path: Path, complain: Complaints, rename: Rename) -> Table:
    table = Table(path, [], iter(()))

    def rows() -> Iterator[tuple[int, Row]]:
        seen: set[str] = set()
        keys: tuple[str, ...] = ()
        names: list[str] = []
        for number, line in enumerate((line for line in _lines(path, complain) if line.strip()), start=1):
            try:
                item = _object(line, table.where(number))
                if tuple(item) != keys:  # rows of one program have one order of keys
                    names = rename(list(item))
                    keys = tuple(item)
                    table.columns += [name for name in names if name not in seen]
                    seen.update(names)
            except DataError as error:
                complain(error)
                continue
            yield number, dict(zip(names, item.values(), strict=True))

    table.rows = rows()
    return table


def _object(line: str, where: str) -> Row:
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{where} is not valid JSON.") from None
    except ValueError:
        raise DataError(f"{where} holds a number of thousands of digits.", hint="Write it as a text.") from None
    if not isinstance(item, dict):
        raise DataError(f"{where} must be an object, not {type(item).__name__}.")
    return item


def _parquet(path: Path, complain: Complaints, rename: Rename) -> Table:
    try:
        file = pq.ParquetFile(path)
        columns = rename(file.schema_arrow.names)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise _unreadable(path, error) from None

    def rows() -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            for batch in file.iter_batches(_BATCH):
                for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    if any(isinstance(cell, str) and len(cell) > MAX_FIELD for cell in cells):
                        what = f"a field is longer than {MAX_FIELD:,} characters"
                        complain(DataError(f"{path}, data row {number}: {what}."))
                        continue
                    yield number, dict(zip(columns, cells, strict=True))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from None

    return Table(path, columns, rows())


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable Parquet file ({str(error).strip().splitlines()[0].rstrip('.')}).")
