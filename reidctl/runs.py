"""The run directory: one folder per stage and a `stage.json` that exists if and only if the stage finished."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from reidctl import __version__, tables
from reidctl.errors import DataError

FORMAT = 1
_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pandas", "pyarrow", "scikit-learn")


class Run:
    """A run directory.

    Args:
        path: the directory; made when the first stage writes into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage (`data`, `caption`, `finetune`, ...)."""
        return self.path / stage

    def table(self, stage: str, name: str) -> Path:
        """Where a stage keeps a table."""
        return self.stage_dir(stage) / f"{name}.parquet"

    def record(self, stage: str) -> dict[str, Any] | None:
        """Return the record of a finished stage, or None.

        Raises:
            DataError: the record is damaged or from another version of the format.
        """
        path = self.stage_dir(stage) / "stage.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            raise DataError(f"{path} is damaged.", hint="Run the stage again with --force.") from None
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise DataError(
                f"{self.path} was written by another version (run format {found}; this reidctl reads {FORMAT}).",
                hint="Use a new --run directory, or run the stages again with --force.",
            )
        return dict(record)

    def require(self, stage: str, *, command: str | None = None) -> dict[str, Any]:
        """Return the record of a stage that must be there.

        Raises:
            DataError: the stage has not finished in this run.
        """
        record = self.record(stage)
        if record is None:
            raise DataError(
                f"{self.path} has no finished `{stage}` stage.",
                hint=f"Run `reidctl {command or stage} --run {self.path}` first.",
            )
        return record

    def up_to_date(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the stage's record if the same settings and inputs made it and its outputs are there, else None."""
        record = self.record(stage)
        if record is None or record["fingerprint"] != fingerprint(settings, inputs):
            return None
        return record if all((self.path / name).exists() for name in record["outputs"]) else None

    def finish(
        self,
        stage: str,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        outputs: Sequence[Path],
        started: datetime,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """Write `stage.json`, the last file of a stage, and return its content.

        Args:
            stage: the stage's folder name.
            settings: the resolved recipe sections, JSON values only.
            inputs: digest by name of what was read.
            outputs: the files written, for digests and row counts.
            started: when the stage began (UTC).
            metrics: summary numbers.
            extra: further facts of this stage (counts, notes).
            device: where it ran.
        """
        finished = datetime.now(UTC)
        record = {
            "format": FORMAT,
            "stage": stage,
            "command": [Path(sys.argv[0]).name.replace("__main__.py", "reidctl"), *sys.argv[1:]],
            "version": __version__,
            "git_commit": _git_commit(),
            "settings": dict(settings),
            "inputs": dict(inputs),
            "fingerprint": fingerprint(settings, inputs),
            "outputs": {str(path.relative_to(self.path)): _describe(path) for path in outputs},
            "started": started.isoformat(),
            "finished": finished.isoformat(),
            "seconds": round((finished - started).total_seconds(), 3),
            "device": device,
            "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
            "libraries": _versions(),
            "metrics": dict(metrics or {}),
            **dict(extra or {}),
        }
        tables.write_text(self.stage_dir(stage) / "stage.json", json.dumps(record, indent=2, default=str) + "\n")
        return record

    @contextmanager
    def locked(self, stage: str) -> Iterator[None]:
        """Keep another process from writing the same stage's state at the same time.

        Raises:
            DataError: one is doing so.
        """
        path = self.stage_dir(stage) / "last" / ".lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(
                    f"Another process is training in {self.stage_dir(stage)}.",
                    hint="Wait for it, stop it, or use another --run.",
                ) from None
            yield

    def check_writable(self) -> None:
        """Find out before hours of work whether the run directory can be written; leaves nothing behind.

        Raises:
            DataError: its place is a file, or takes no files.
        """
        place = self.path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise DataError(f"{place} is a file, so {self.path} cannot be a run.", hint="Choose another --run.")
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise DataError(f"{place} cannot be written to ({error.strerror}).", hint="Choose another --run.") from None

    def unfinish(self, stage: str) -> None:
        """Remove a stage's record before its outputs change: a half-redone stage must not look finished.

        Temporary files that a killed process could not remove go too.
        """
        (self.stage_dir(stage) / "stage.json").unlink(missing_ok=True)
        for stale in self.stage_dir(stage).rglob(".*.tmp"):
            stale.unlink(missing_ok=True)


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the digest of settings and inputs that decides whether a stage is up to date."""
    text = json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents in a folder, in order.

    Raises:
        DataError: there is no such file.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    state = hashlib.sha256()
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            state.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                state.update(chunk)
    return state.hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"sha256": digest(path)}
    if path.suffix == ".parquet":
        facts["rows"] = tables.rows(path)
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None  # a checkout without git, as in a slim container
    return result.stdout.strip() or None
