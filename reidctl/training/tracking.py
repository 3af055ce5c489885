"""The history for programs that draw it while it grows: TensorBoard and Weights & Biases; both are optional."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from reidctl import parallel
from reidctl.errors import UsageError
from reidctl.training.config import TrainConfig

Row = Mapping[str, Any]


class Tracker:
    """Gives rows of the history to whoever wants them."""

    def __init__(self, writers: Sequence["Writer"]) -> None:
        self.writers = writers

    def write(self, rows: Sequence[Row]) -> None:
        """Pass rows on; those of one call belong to one step."""
        for writer in self.writers:
            writer.write(rows)


class Writer(Protocol):
    """One program."""

    def write(self, rows: Sequence[Row]) -> None:
        """Take rows of one step."""


class TensorBoard:
    """TensorBoard's event files, one scalar per row."""

    def __init__(self, folder: Path) -> None:
        module = _need("torch.utils.tensorboard", "train.tensorboard", "tensorboard")
        self.events = module.SummaryWriter(str(folder))

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.events.add_scalar(f"{row['split']}/{row['name']}", row["value"], row["step"], row["seconds"])

    def close(self) -> None:
        self.events.close()


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, project: str, folder: Path, stage: str, settings: Mapping[str, Any]) -> None:
        module = _need("wandb", "train.wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = module.init(
            project=project, dir=str(folder), job_type=stage, name=folder.resolve().parent.name, config=dict(settings)
        )

    def write(self, rows: Sequence[Row]) -> None:
        if rows:
            values = {f"{row['split']}/{row['name']}": row["value"] for row in rows}
            self.run.log({**values, "epoch": rows[0]["epoch"]}, step=rows[0]["step"])

    def close(self) -> None:
        self.run.finish()


@contextmanager
def open_trackers(config: TrainConfig, folder: Path, stage: str) -> Iterator[Tracker]:
    """Open what the settings ask for; only the first process writes.

    Raises:
        UsageError: a package is missing.
    """
    with ExitStack() as stack:
        writers: list[Writer] = []
        if config.tensorboard and parallel.is_first():
            board = TensorBoard(folder / "tensorboard")
            stack.callback(board.close)
            writers.append(board)
        if config.wandb is not None and parallel.is_first():
            remote = WeightsAndBiases(config.wandb, folder, stage, config.model_dump(mode="json"))
            stack.callback(remote.close)
            writers.append(remote)
        yield Tracker(writers)


def require_trackers(config: TrainConfig) -> None:
    """Refuse trackers whose package is missing, before anything is written.

    Raises:
        UsageError: it is.
    """
    if config.tensorboard:
        _need("torch.utils.tensorboard", "train.tensorboard", "tensorboard")
    if config.wandb is not None:
        _need("wandb", "train.wandb", "wandb")


def _need(module: str, setting: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"`{setting}` needs the package `{package}`, which is not installed.",
            hint=f"Run `pip install {package}`, or leave the setting out; the history is kept in the run anyway.",
        ) from None
