"""Attributes of people in MATLAB files: a struct per split, in it an array of codes per attribute.

The files are read here and not by scipy, whose reader ends the process (segmentation fault) on some damaged ones.
"""

import io
import math
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reidctl.datasets.named import Reading
from reidctl.errors import DataError

Words = Mapping[str, str]
# The published files have 11 KB, unpacked 130.
MAX_BYTES = 1 << 20
MAX_UNPACKED = 16 << 20
# The published files nest four deep: variable, split, field, text.
MAX_DEPTH = 8
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMBERS = range(6, 16)
# Element types of the format ("MAT-File Level 5", MathWorks) that hold numbers.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


@dataclass(frozen=True)
class AttributeFile:
    """A MATLAB file with a struct per split: an array of codes per field, one code per person.

    Attributes:
        name: of the file and of its variable.
        folders: where it may lie, below the dataset's folder.
        fields: file's field -> (attribute, words for the codes 1, 2, ...).
        colours: (prefix of the fields, attribute, colours): code 2 in `upblack` is the colour black.
    """

    name: str
    folders: tuple[str, ...]
    fields: Mapping[str, tuple[str, tuple[str, ...]]]
    colours: tuple[tuple[str, str, tuple[str, ...]], ...]

    def read(self, folder: Path, reading: Reading) -> tuple[Path | None, dict[int, dict[str, str]]]:
        """Return the file, if there is one, and the attributes in words by person.

        Raises:
            DataError: unless lenient: the file is damaged, too large, of MATLAB 7.3, or names a person twice.
        """
        places = [folder / place / f"{self.name}.mat" for place in self.folders]
        path = next((place for place in places if place.is_file()), None)
        people: dict[int, dict[str, str]] = {}
        if path is None:
            return None, people
        try:
            for part in _structs(path, self.name):
                for person, words in self._people(part, path):
                    if person in people:
                        raise DataError(f"{path} describes person {person} twice.")
                    people[person] = words
        except DataError as error:
            reading.reject(error.message, error.hint or "Download it again, or move it away to go on without it.")
        return path, people

    def _people(self, part: Mapping[str, Any], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        index = part["image_index"]
        numbers = [str(value) for value in (index if isinstance(index, list) else [index])]
        wanted = [*self.fields, *(f"{prefix}{colour}" for prefix, _, names in self.colours for colour in names)]
        columns = {name: part[name] for name in wanted if name in part}
        for name, column in columns.items():
            if not isinstance(column, np.ndarray) or len(column) != len(numbers):
                raise DataError(f"{path}: the field `{name}` does not hold one number per person.")
        for row, number in enumerate(numbers):
            if re.fullmatch(r"[0-9]{1,9}", number.strip()) is None:
                raise DataError(f"{path}: image_index {number[:40]!r} is not a person's number.")
            yield int(number), self._words({name: column[row] for name, column in columns.items()})

    def _words(self, codes: Mapping[str, float]) -> dict[str, str]:
        words: dict[str, str] = {}
        for name, (attribute, meanings) in self.fields.items():
            code = codes.get(name, 0)
            # A code without a meaning occurs in the published files (`top` = 0): nothing is known then.
            if code in range(1, len(meanings) + 1):
                words[attribute] = meanings[int(code) - 1]
        for prefix, attribute, colours in self.colours:
            worn = [colour for colour in colours if codes.get(f"{prefix}{colour}", 0) == 2]
            if worn:
                words[attribute] = ", ".join(worn).replace("gray", "grey")
        return _with_garments(words)

    def write(self, folder: Path, people: Mapping[str, Mapping[int, Words]]) -> None:
        """Write the attributes of people, by split; a word without a code becomes 0."""
        from scipy.io import savemat

        parts = {split: self._codes(described) for split, described in people.items()}
        stream = io.BytesIO()
        savemat(stream, {self.name: parts}, do_compression=True)
        # The header names the machine and the time; the same data must give the same bytes.
        header = b"MATLAB 5.0 MAT-file, written by reidctl".ljust(116)
        (folder / f"{self.name}.mat").write_bytes(header + stream.getvalue()[116:])

    def _codes(self, people: Mapping[int, Words]) -> dict[str, Any]:
        codes: dict[str, list[int]] = defaultdict(list)
        for words in people.values():
            for name, (attribute, meanings) in self.fields.items():
                word = words.get(attribute, "")
                codes[name].append(meanings.index(word) + 1 if word in meanings else 0)
            for prefix, attribute, colours in self.colours:
                worn = words.get(attribute, "").replace("grey", "gray").split(", ")
                for colour in colours:
                    codes[f"{prefix}{colour}"].append(2 if colour in worn else 1)
        index = np.empty((1, len(people)), dtype=object)
        index[0, :] = [f"{person:04d}" for person in people]
        return {name: np.array([values], np.uint8) for name, values in codes.items()} | {"image_index": index}


def _with_garments(words: dict[str, str]) -> dict[str, str]:
    """Name garments as the rendered benchmark does, so that what is written from attributes reads the same."""
    if "sleeves" in words:
        words["upper_type"] = f"{words['sleeves']}-sleeved top"
    elif "upper_length" in words:
        words["upper_type"] = f"{words['upper_length']} top"
    if words.get("lower_type") == "trousers" and words.get("lower_length") == "short":
        words["lower_type"] = "shorts"
    return words


def _structs(path: Path, variable: str) -> Iterator[Mapping[str, Any]]:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is not the published file.")
    content = path.read_bytes()
    if content.startswith(b"\x89HDF") or b"MATLAB 7.3" in content[:128]:
        raise DataError(f"{path} is in the MATLAB 7.3 format (HDF5); the published file is MATLAB 5.")
    try:
        found = variables(content).get(variable)
    except (ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a readable MATLAB 5 file ({error}).") from None
    parts = list(found.values()) if isinstance(found, dict) else []
    if not parts or not all(isinstance(part, dict) and "image_index" in part for part in parts):
        raise DataError(f"{path} lacks the variable `{variable}` with `image_index` for every split.")
    yield from parts


def variables(content: bytes) -> dict[str, Any]:
    """Return the variables of a MATLAB 5 file: structs as dicts, cells as lists, texts, and flat arrays of numbers.

    Raises:
        ValueError: the content is not of that format, cut off, or uses parts of it that are not read here.
        struct.error: likewise.
        zlib.error: compressed content is damaged.
    """
    if content[126:128] != b"IM":
        raise ValueError("no little-endian MATLAB 5 header")
    found: dict[str, Any] = {}
    for kind, body in _elements(content[128:]):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(body, MAX_UNPACKED)
            kind, body = next(_elements(unpacked), (0, b""))
        if kind == _MATRIX:
            name, value = _matrix(body, 0)
            found[name] = value
    return found


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, data) of the elements that follow each other in some data."""
    place = 0
    while place < len(content):
        kind, size = struct.unpack_from("<II", content, place)
        if kind >> 16:
            # Up to four bytes of data lie in the tag itself, its size in the upper half of the type.
            kind, size, start, after = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        else:
            start = place + 8
            after = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(content):
            raise ValueError(f"cut off: {size:,} bytes announced where {len(content) - start:,} are left")
        yield kind, content[start : start + size]
        place = after


def _matrix(body: bytes, depth: int) -> tuple[str, Any]:
    if not body:
        return "", np.zeros(0)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    parts = list(_elements(body))
    if len(parts) < 3 or len(parts[0][1]) != 8:
        raise ValueError("an array without flags, size or name")
    kind = parts[0][1][0]
    name = parts[2][1].decode("latin-1")
    if kind == _STRUCT:
        return name, _struct(parts, depth)
    if kind == _CELL:
        return name, [_matrix(data, depth + 1)[1] for part, data in parts[3:] if part == _MATRIX]
    if len(parts) < 4:
        raise ValueError(f"array {name!r} has no values")
    if kind == _CHAR:
        encoding = _ENCODINGS.get(parts[3][0], "")
        if not encoding:
            raise ValueError(f"text {name!r} is of an unknown type")
        return name, parts[3][1].decode(encoding)
    if kind not in _NUMBERS or parts[3][0] not in _TYPES:
        raise ValueError(f"array {name!r} is of an unknown type")
    return name, np.frombuffer(parts[3][1], dtype=f"<{_TYPES[parts[3][0]]}")


def _struct(parts: list[tuple[int, bytes]], depth: int) -> dict[str, Any]:
    (size,) = struct.unpack_from("<i", parts[3][1]) if len(parts) > 4 else (0,)
    shape = np.frombuffer(parts[1][1], dtype="<i4")
    if size < 1 or math.prod(shape.tolist()) != 1:
        raise ValueError("a struct without fields, or several in one")
    names = parts[4][1]
    fields = [names[place : place + size].split(b"\0")[0].decode("latin-1") for place in range(0, len(names), size)]
    values = [_matrix(data, depth + 1)[1] for part, data in parts[5:] if part == _MATRIX]
    if len(fields) != len(values):
        raise ValueError(f"a struct of {len(fields)} fields has {len(values)} values")
    return dict(zip(fields, values, strict=True))
