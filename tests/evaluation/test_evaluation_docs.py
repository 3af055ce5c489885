import re
from pathlib import Path

import pyarrow as pa
import pytest

from reidctl import tables
from reidctl.evaluation.comparison import SIZES
from reidctl.evaluation.published import plain, registry
from reidctl.evaluation.settings import SETTINGS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
KINDS = {
    pa.string(): "text",
    pa.int32(): "int",
    pa.int64(): "int",
    pa.float32(): "float",
    pa.float64(): "float",
    pa.bool_(): "bool",
}
# What the commands of `evaluate` write, and what it reads.
TABLES = {
    "metrics",
    "queries",
    "rankings",
    "embeddings",
    "slices",
    "differences",
    "paired",
    "seeds",
    "matrix",
    "robustness",
    "epochs",
}


def kind(field):
    if pa.types.is_dictionary(field.type):
        name = "enum"
    else:
        name = "list of float" if pa.types.is_list(field.type) else KINDS[field.type]
    return f"{name}?" if field.nullable else name


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def section(heading, level=2):
    marks = "#" * level
    return re.split(rf"^#{{1,{level}}} ", PAGE.split(f"\n{marks} {heading}\n", 1)[1], flags=re.MULTILINE)[0]


def documented():
    found = {}
    for part in section("Tables").split("\n### ")[1:]:
        name = re.search(r"^`(\w+)`: ", part, re.MULTILINE).group(1)
        rows = [cells(line) for line in part.splitlines() if line.startswith("| `")]
        found[name] = part, [(row[0].strip("`"), row[1]) for row in rows], rows
    return found


def test_every_table_of_the_evaluation_is_documented():
    assert set(documented()) == TABLES <= set(tables.SCHEMAS)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_columns_and_types_are_those_of_the_schema_in_its_order(name):
    assert documented()[name][1] == [(field.name, kind(field)) for field in tables.SCHEMAS[name]]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_version_other_than_one_is_documented(name):
    said = re.search(r"Version (\d+)", documented()[name][0])
    assert int(said.group(1) if said else 1) == tables.version(name)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_column_has_a_meaning(name):
    for row in documented()[name][2]:
        assert len(row) == 4 and row[3]


def test_every_setting_is_documented_with_its_level():
    rows = [cells(line) for line in section("Robustness").splitlines() if line.startswith("| `")]
    levels = {row[0].strip("`"): float(row[2]) if row[2] else None for row in rows}
    assert levels == {name: setting.level for name, setting in SETTINGS.items()}


def test_the_official_sizes_are_documented():
    found = {}
    for line in section("Published numbers").splitlines():
        row = cells(line)
        if len(row) == 5 and row[1] in ("t2i", "i2i"):
            numbers = [[int(number.replace(",", "")) for number in re.findall(r"[\d,]+", cell)] for cell in row[2:]]
            found[row[1], plain(row[0])] = (numbers[0][0], numbers[1][0], tuple(numbers[2]))
    assert found == {key: (size.queries, size.people, size.gallery) for key, size in SIZES.items()}


def test_numbers_that_the_page_quotes_are_in_the_registry():
    quoted = set(re.findall(r"\b\d\d\.\d\d\b", section("Published numbers")))
    assert {"91.93", "92.95", "78.17"} <= quoted <= {entry.printed for entry in registry()}


def test_links_within_the_page_have_a_target():
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
