"""Where a stage finds what it reads: the dataset folder and the texts that describe its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field, field_validator

from reidctl import tables
from reidctl.config import Section
from reidctl.datasets.identities import known_as
from reidctl.datasets.leaks import LeakCheck
from reidctl.errors import DataError
from reidctl.runs import Run, digest, fingerprint

if TYPE_CHECKING:
    from reidctl.data import Corpus


class DataSettings(Section):
    """The recipe section `data`."""

    leak_check: LeakCheck = "error"
    """What to do when two splits share people or image files: refuse (`error`), go on with a warning, or not look."""
    identity_map: Path | None = None
    """A file that says who is who across datasets; read by `data combine`."""
    purge: bool = True
    """Whether `data combine` takes people of a test split out of every training split."""
    description_noise: float = Field(0.0, ge=0, le=1)
    """Share of described train images that `finetune` gives the texts of another person: a study of their quality."""

    caption_noise: float = Field(0.0, ge=0, le=1)
    """Level at which the training captions are made worse in the way of `caption_noise_kind`, as `data degrade` does it
    for queries (a study of how much a training owes to their quality), or the share that is exchanged."""
    caption_noise_kind: Literal["drop", "shorten", "typo", "shuffle", "exchange"] = "drop"
    """`exchange` gives captions to other images: the noisy correspondence that `rde` is made for."""
    part: Literal["all", "captioned", "caption-free"] = "all"
    """Which training images `finetune` and `prompt-stage` use: a single-task model sees only its own set."""

    datasets: tuple[str, ...] = ()
    """Names of the datasets, of several combined ones, that `finetune` and `prompt-stage` train on and choose the epoch
    by; empty: all. The others then count as unseen."""

    @field_validator("datasets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("leak_check", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML reads a bare `off` as false.
        return "off" if value is False else value


@dataclass(frozen=True)
class Source:
    """A dataset as files.

    Attributes:
        folder: holds `images.parquet` and, if there are captions, `captions.parquet`.
        described: the table of identity and clothing texts; None if the images were not described.
    """

    folder: Path
    described: Path | None

    @property
    def images(self) -> Path:
        """The images table."""
        return self.folder / "images.parquet"

    @property
    def captions(self) -> Path:
        """The captions table; need not exist."""
        return self.folder / "captions.parquet"

    @property
    def parts(self) -> Path:
        """The table of true part masks; need not exist."""
        return self.folder / "parts.parquet"

    @property
    def identities(self) -> Path:
        """The table of who was who before datasets were combined; need not exist."""
        return self.folder / "identities.parquet"

    def person_digests(self, images: pd.DataFrame) -> pd.DataFrame:
        """Return digests of the people of some images under all their names, columns person_id and digest.

        The names are the id, those from before datasets were combined, and those by which other releases know them.
        """
        people = images["person_id"].astype(str).drop_duplicates()
        names = [pd.DataFrame({"person_id": people, "name": people}), known_as(images)]
        if self.identities.is_file():
            known = tables.read_table(self.identities, "identities").astype(str)
            known = known[known["person_id"].isin(people)]
            names.append(known[["person_id", "original_id"]].rename(columns={"original_id": "name"}))
        every = pd.concat(names, ignore_index=True).drop_duplicates(ignore_index=True)
        return every.assign(digest=[fingerprint({"person": name}, {}) for name in every["name"]])

    def digests(self) -> dict[str, str]:
        """Digest by name of the tables there are: what decides whether a stage is up to date."""
        files = {"images": self.images, "captions": self.captions, "described": self.described}
        if self.identities.is_file():
            files["identities"] = self.identities
        return {name: digest(path) for name, path in files.items() if path is not None and path.is_file()}

    def corpus(self) -> "Corpus":
        """Read the tables and join them; see `build_corpus` for what is raised."""
        from reidctl.data import build_corpus  # brings torch, which stages like `caption` can do without

        images = tables.read_table(self.images, "images")
        captions = tables.read_table(self.captions, "captions") if self.captions.is_file() else tables.empty("captions")
        described = tables.read_table(self.described, "captions") if self.described is not None else None
        return build_corpus(images, captions, described, self.folder)


def find_source(run: Run, data: Path | None = None, captions: Path | None = None) -> Source:
    """Return the dataset of a run: the folder given, else the run's own, else the one its model was trained on.

    Raises:
        DataError: there is none, or a given path does not exist.
    """
    if data is not None:
        folder = data
        if not (folder / "images.parquet").is_file():
            raise DataError(f"{folder} holds no images.parquet.", hint="Give the folder of a finished `data` stage.")
    else:
        folder = _own_folder(run)
    if captions is not None and not captions.is_file():
        raise DataError(f"No table of texts at {captions}.")
    return Source(folder, captions or _own_texts(run, folder))


def _own_folder(run: Run) -> Path:
    if run.record("data") is not None:
        return run.stage_dir("data")
    trained = run.record("finetune")
    if trained is not None:
        folder = Path(trained["data"])
        # The run's own folder without a record is a dataset that was never finished.
        if folder != run.stage_dir("data").resolve() and (folder / "images.parquet").is_file():
            return folder
    raise DataError(
        f"{run.path} has no dataset.",
        hint=f"Run `reidctl data synth --run {run.path}` or `reidctl data import`, or give --data FOLDER.",
    )


def _own_texts(run: Run, folder: Path) -> Path | None:
    """Texts written for exactly these images: the run's own, those beside the dataset, those trained with, or those
    that the dataset came with."""
    images = digest(folder / "images.parquet") if (folder / "images.parquet").is_file() else ""
    for other in (run, Run(folder.resolve().parent)):
        record = other.record("caption")
        if record is not None and record["inputs"]["images"] == images:
            return other.table("caption", "captions")
    trained = run.record("finetune")
    if trained is not None and trained["inputs"].get("images") == images and trained.get("described"):
        path = Path(trained["described"])
        return path if path.is_file() else None
    imported = Run(folder.resolve().parent).record(folder.resolve().name)
    return folder / "captions.parquet" if imported is not None and imported.get("described") else None
