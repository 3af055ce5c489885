"""What every section of the report reads: the run's records, tables and pictures, and where its figures go."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from reidctl import tables
from reidctl.errors import DataError
from reidctl.report import figures, html
from reidctl.report.figures import named_rows
from reidctl.runs import Run
from reidctl.stages.sources import Source, find_source

STAGE = "report"
Section = dict[str, Any] | None
"""What the template draws; None where the stage has not run."""


@dataclass
class Material:
    """A run, read once, and the figures that were written so far.

    Attributes:
        run: what is reported.
        records: of its finished stages.
        seed: of the choice of queries and pictures that are shown.
        files: figures written into the report's own folder.
    """

    run: Run
    records: Mapping[str, dict[str, Any]]
    seed: int
    files: list[Path] = field(default_factory=list)
    _embedded: dict[tuple[str, bool], html.Embedded | None] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source | None:
        """The run's data; None if they are gone."""
        try:
            return find_source(self.run)
        except DataError:
            return None

    @cached_property
    def images(self) -> pd.DataFrame:
        """The table `images`, empty without data."""
        return tables.read_table(self.source.images, "images") if self.source else tables.empty("images")

    @cached_property
    def captions(self) -> pd.DataFrame:
        """The table `captions` of the data, empty without one."""
        return self.read(self.source.captions if self.source else None, "captions")

    @cached_property
    def row_of(self) -> dict[str, Any]:
        """Rows of the table `images` by image."""
        return {row.image_id: row for row in named_rows(self.images)}

    @cached_property
    def sentences(self) -> dict[str, str]:
        """Texts by caption."""
        full = self.captions[self.captions["kind"].isin(["full", "identity", "clothing"])]
        texts = full[full["text"].notna()]
        return dict(zip(texts["caption_id"], texts["text"], strict=True))

    def record(self, stage: str) -> dict[str, Any]:
        """Return the record of a stage; empty if it has not finished."""
        return self.records.get(stage, {})

    def table(self, stage: str, name: str) -> pd.DataFrame:
        """Return a table of a finished stage; empty where there is none.

        Raises:
            DataError: it is damaged.
        """
        # What an unfinished stage has left behind is not a result.
        return self.read(self.run.table(stage, name) if stage in self.records else None, name)

    @staticmethod
    def read(path: Path | None, name: str) -> pd.DataFrame:
        """Return a table, empty if the file is not there."""
        return tables.read_table(path, name) if path is not None and path.is_file() else tables.empty(name)

    def points(self, stage: str, name: str, columns: tuple[str, ...]) -> pd.DataFrame | None:
        """Return a CSV file of a finished stage; None where there is none.

        Args:
            stage: which.
            name: of the file.
            columns: what it must have; x and y are numbers, the others text.

        Raises:
            DataError: it is damaged.
        """
        path = self.run.stage_dir(stage) / name
        if stage not in self.records or not path.is_file():
            return None
        try:
            found = pd.read_csv(path, dtype=str, keep_default_na=False)
            for axis in ("x", "y"):
                found[axis] = found[axis].astype(float)
            found = found[[*columns, *(name for name in found.columns if name not in columns)]]
        except (ValueError, KeyError, OSError) as error:
            raise damaged(path, stage) from error
        return found if len(found) and bool(found[["x", "y"]].notna().all(axis=None)) else None

    def json(self, path: Path, stage: str) -> Any:
        """Return a JSON file of a stage.

        Raises:
            DataError: it is damaged.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise damaged(path, stage) from error

    def path(self, image_id: str) -> Path | None:
        """Return an image's file."""
        row = self.row_of.get(image_id)
        if row is not None and self.source is not None:
            return Path(self.source.folder / row.path)
        # A picture that belongs to no dataset, explained by its file.
        file = self.records.get("interpret", {}).get("file")
        return Path(file) if file and Path(file).name == image_id else None

    def picture(self, image_id: str, *, small: bool = False) -> html.Embedded | None:
        """Return a picture for the page; None if it cannot be read."""
        if (image_id, small) not in self._embedded:
            path = self.path(image_id)
            self._embedded[image_id, small] = None if path is None else html.embed_file(path, small=small)
        return self._embedded[image_id, small]

    def stem(self, name: str) -> Path:
        """Return where a figure of the report is written, without the ending."""
        return self.run.stage_dir(STAGE) / "figures" / name

    def figure(self, paths: list[Path], title: str, alt: str) -> dict[str, Any]:
        """Return a figure for the template, from its PNG, SVG and CSV file.

        Raises:
            DataError: a file of an earlier stage is damaged.
        """
        self.files += [path for path in paths if path.is_relative_to(self.run.stage_dir(STAGE))]
        png, svg, _ = paths
        try:
            drawn = figures.inline_svg(svg.read_text(encoding="utf-8"), prefix=f"{svg.parent.name}-{svg.stem}")
        except (ValueError, IndexError, OSError) as error:
            raise damaged(svg, png.parent.name) from error
        name = f"{png.relative_to(self.run.path).with_suffix('')}.{{png,svg,csv}}"
        return {"svg": Markup(drawn), "title": title, "alt": alt, "file": name}

    def kept_figure(self, stage: str, name: str, title: str, alt: str) -> dict[str, Any] | None:
        """Return a figure that an earlier stage has written; None where there is none."""
        stem = self.run.stage_dir(stage) / name
        paths = [stem.with_suffix(ending) for ending in (".png", ".svg", ".csv")]
        if stage not in self.records or not all(path.is_file() for path in paths):
            return None
        return self.figure(paths, title, alt)


def damaged(path: Path, stage: str) -> DataError:
    """Return the error of a file that cannot be read."""
    return DataError(f"{path} is damaged.", hint=f"Run the stage `{stage}` again with --force.")
