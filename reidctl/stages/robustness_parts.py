"""Finished robustness measurements as files, so that a killed or repeated analysis makes each of them once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reidctl import tables
from reidctl.console import log
from reidctl.errors import DataError
from reidctl.evaluation.robustness import Case
from reidctl.runs import digest, fingerprint
from reidctl.stages.index import training_digest
from reidctl.stages.measuring import Subject
from reidctl.stages.spoiling import Bench, Measured

PART = 2
"""Rises whenever a measurement can come out differently."""


class Parts:
    """Measurements named by everything that they depend on: a table of queries, and facts about it written last."""

    def __init__(self, folder: Path, *, force: bool) -> None:
        self.folder, self.force = folder, force
        self._used: set[str] = set()

    def measure(self, bench: Bench, case: Case) -> Measured:
        """Return a measurement, read or made; what is half-written or damaged is made again."""
        name = _part_name(bench, case)
        table, facts = (self.folder / f"{name}.{ending}" for ending in ("parquet", "json"))
        self._used.add(name)
        if facts.is_file() and table.is_file() and not self.force:
            try:
                return _read(table, facts)
            except (DataError, OSError, ValueError) as error:
                log.warning(f"{facts}: damaged, measured again ({error}).")
        log.info(f"{bench.subject.run.path}: {case.key}")
        facts.unlink(missing_ok=True)
        found = bench.measure(case)
        tables.write_table(table, "queries", found.queries)
        known = {"facts": found.facts, "notes": found.notes, "table": digest(table)}
        tables.write_text(facts, json.dumps(known) + "\n")
        return found

    def forget_others(self, keep: Sequence[Subject]) -> None:
        """Remove the parts of models that are no longer measured."""
        names = tuple(_model_name(subject) for subject in keep)
        for path in self.folder.glob("*"):
            if path.stem not in self._used and not path.name.startswith(names):
                path.unlink(missing_ok=True)


def _read(table: Path, facts: Path) -> Measured:
    """A finished measurement.

    Raises:
        DataError: the table cannot be read.
        ValueError: the facts are not what was written, or belong to another table.
    """
    known: Any = json.loads(facts.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or set(known) != {"facts", "notes", "table"}:
        raise ValueError("facts are missing")
    if known["table"] != digest(table):
        raise ValueError("the table is not the one that was written")
    return Measured(tables.read_table(table, "queries"), known["facts"], tuple(known["notes"]))


def _part_name(bench: Bench, case: Case) -> str:
    """Model, data and case in a file name; the first half is the model on its data."""
    facts = {
        "row": case.row, "seed": case.seed, "level": case.level, "texts": case.texts,
        "ids": bench.asked.ids[case.reference], "part": PART,
    }  # fmt: skip
    return f"{_model_name(bench.subject)}-{fingerprint(facts, {})[:20]}"


def _model_name(subject: Subject) -> str:
    facts = {
        "weights": subject.weights,
        "training": training_digest(subject.run),
        "split": subject.split,
        "device": subject.device.type,
    }
    return fingerprint(facts, subject.source.digests())[:20]
