"""What a dataset is: rendered people or photographs, and the tables that a model was trained on or others."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from reidctl import tables
from reidctl.errors import DataError
from reidctl.runs import Run

MARKER = "RENDERED-BY-REIDCTL"
"""The file in a layout of rendered images that travels with it, whatever the folder is called."""
_SAYS = "These people were rendered by `reidctl data synth`. They are no photographs and no public dataset.\n"


def mark(folder: Path) -> None:
    """Write the marker into a folder of rendered images."""
    tables.write_text(folder / MARKER, _SAYS)


def is_rendered(places: Iterable[Path]) -> bool:
    """Whether any of these files or folders is in a marked layout or in a folder that `data synth` finished.

    A layout without its marker, in another place, looks like photographs.
    """
    known = {path for place in places for path in (place.absolute(), place.resolve())}
    return any(_says_so(folder) for folder in {above for path in known for above in (path, *path.parents)})


def rendered_datasets(folder: Path) -> list[str]:
    """Return the names of the datasets in a data folder whose people are rendered, by its record or its images."""
    record = Run(folder.parent).record(folder.name) or {}
    if "rendered" in record:
        return [str(name) for name in record["rendered"]]
    # Written before that was recorded, or copied without the record.
    if not (folder / "images.parquet").is_file():
        return []
    first = tables.read_table(folder / "images.parquet", "images", ["dataset", "path"]).drop_duplicates("dataset")
    return sorted(str(row.dataset) for row in first.itertuples() if is_rendered([folder / str(row.path)]))


def other_tables(measured: Mapping[str, str], learned: Mapping[str, str]) -> list[str]:
    """Return which of the tables of images and captions differ, by their digests in two records' `inputs`.

    A copy of a dataset in another folder is the same dataset; other contents in the same folder are another one.
    """
    return [name for name in ("images", "captions") if measured.get(name) != learned.get(name)]


def _says_so(folder: Path) -> bool:
    try:
        if (folder / MARKER).is_file():
            return True
        return (Run(folder.parent).record(folder.name) or {}).get("source") == "synthped"
    except (DataError, OSError):
        return False  # a stage.json that is not ours, or a folder that may not be read, says nothing
