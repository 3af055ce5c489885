"""DukeMTMC-reID: eight cameras, in Market-1501's layout. Its authors withdrew it in 2019; there is no downloader."""

from pathlib import Path

import pandas as pd

from reidctl.datasets.base import Draft, Options, Probe
from reidctl.datasets.formats.market_1501 import DUKE_STYLE, MARKET_STYLE, NO_YES, SHARED_FIELDS, Release
from reidctl.datasets.matlab import AttributeFile

OPTIONS = frozenset({"seed", "carve_val"})
WITHDRAWN = "DukeMTMC was withdrawn by its authors in 2019: people were filmed without being asked. Do not pass it on."
# Codes from the README of github.com/vana77/DukeMTMC-attribute.
ATTRIBUTES = AttributeFile(
    name="duke_attribute",
    folders=("", "attribute", "DukeMTMC-attribute"),
    fields={
        **SHARED_FIELDS,
        "top": ("upper_length", ("short", "long")),
        "boots": ("boots", NO_YES),
        "shoes": ("shoe_colour", ("dark", "light")),
    },
    colours=(
        ("up", "upper_colour", ("black", "white", "red", "purple", "gray", "blue", "green", "brown")),
        ("down", "lower_colour", ("black", "white", "red", "gray", "blue", "green", "brown")),
    ),
)
DUKE = Release(
    name="dukemtmc-reid",
    title="DukeMTMC-reID",
    roots=(
        "DukeMTMC-reID",
        "dukemtmcreid/DukeMTMC-reID",
        "dukemtmc-reid/DukeMTMC-reID",
        "dukemtmcreid",
        "dukemtmc-reid",
    ),
    # 702 test people with queries and 408 people who are only in the gallery.
    official={"train": (702, 16522, 0), "test": (702 + 408, 2228 + 17661, 0)},
    roles={"query": 2228, "gallery": 17661},
    cameras=8,
    style=DUKE_STYLE,
    relative=("market-1501", MARKET_STYLE),
    file="{person:04d}_c{camera}_f{frame:07d}{suffix}",
    attributes=ATTRIBUTES,
)


def read(root: Path, options: Options) -> Draft:
    """Return the images of DukeMTMC-reID; see `Release.read`.

    Raises:
        DataError: see `Release.read`.
        UsageError: `carve_val` asks for more people than train has.
    """
    draft = DUKE.read(root, options)
    test = [entry for entry in draft.entries if entry.split == "test"]
    alone = {entry.person for entry in test} - {entry.person for entry in test if entry.role == "query"}
    if alone:
        draft.notes.append(
            f"{len(alone):,} people of the gallery have no query: distractors, kept with ids of their own."
        )
    draft.notes.append(WITHDRAWN)
    return draft


def probe(root: Path) -> Probe | None:
    """Return what there is of DukeMTMC-reID."""
    return DUKE.probe(root)


def write(images: pd.DataFrame, captions: pd.DataFrame, source: Path, out: Path) -> Path:
    """Lay images out as DukeMTMC-reID; see `Release.write`. Captions have no place in it."""
    return DUKE.write(images, source, out)
