"""Who is who across datasets: links between people, and one id for everybody who is linked.

Public sets were cut from each other: CUHK-PEDES contains pictures of Market-1501, ICFG-PEDES and RSTPReid were drawn
from MSMT17. Trained on one and tested on the other, a model has seen its test people. Links come from file names that
two releases have in common, from image files that are equal byte by byte, and from a file of the user.
"""

import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from reidctl.errors import DataError

# Nobody in particular: all distractors of a gallery share these ids, so a link through them would join strangers.
DISTRACTORS = frozenset({"market-1501:0000", "dukemtmc-reid:0000"})
_MARKET_IN_CUHK = re.compile(r"cuhk-pedes:Market/(\d{4})[^/]*$")
_MSMT_NAME = re.compile(r"(?:.*[:/])?(\d{4}_\d{3}_\d{2}_\w+?_\d+_\d+(?:_\w+)?)\.\w+$")
_MSMT_SETS = ("msmt17:", "icfg-pedes:", "rstpreid:")
_MAX_USER_FILE = 256 << 20
_RENDERED = "synthped-"
_BODY = ("gender", "age", "build", "stature", "skin", "hair_length", "hair_colour", "beard")


@dataclass(frozen=True, order=True)
class Link:
    """Two `person_id`s that are one person, and how we know (`file-name`, `same-image`, `rendered` or `user`)."""

    first: str
    second: str
    rule: str


def find_links(images: pd.DataFrame) -> list[Link]:
    """Return the links that file names and equal files give, each once, between people of different datasets.

    Args:
        images: rows of the `images` table of all datasets together.
    """
    people = images[~images["person_id"].isin(DISTRACTORS)]
    found = {*_market_in_cuhk(people), *_msmt_names(people), *_equal_files(people), *_rendered(people)}
    best: dict[tuple[str, str], str] = {}
    for link in sorted(found):
        # `file-name` sorts before `same-image`: the simpler reason is the one that is reported.
        best.setdefault((link.first, link.second), link.rule)
    return [Link(first, second, rule) for (first, second), rule in best.items()]


def _market_in_cuhk(images: pd.DataFrame) -> Iterator[Link]:
    """CUHK-PEDES' folder `Market/` keeps the four digits with which Market-1501's file names begin."""
    known = {name.removeprefix("market-1501:").zfill(4): name for name in _people_of(images, "market-1501")}
    mine = images[images["image_id"].str.startswith("cuhk-pedes:Market/")]
    for image, person in zip(mine["image_id"], mine["person_id"], strict=True):
        match = _MARKET_IN_CUHK.match(image)
        if match and match[1] in known:
            yield _link(person, known[match[1]], "file-name")


def _people_of(images: pd.DataFrame, dataset: str) -> list[str]:
    return [str(name) for name in images.loc[images["dataset"] == dataset, "person_id"].unique()]


def _msmt_names(images: pd.DataFrame) -> Iterator[Link]:
    """Datasets drawn from MSMT17 whose files kept the long name person_number_camera_time_frame_box."""
    drawn = images[images["image_id"].str.startswith(_MSMT_SETS)]
    stems = drawn["image_id"].str.extract(_MSMT_NAME, expand=False)
    frame = drawn.assign(stem=stems).dropna(subset="stem")
    yield from _links_by(frame, "stem", "file-name")


def _equal_files(images: pd.DataFrame) -> Iterator[Link]:
    yield from _links_by(images[images["sha256"] != ""], "sha256", "same-image")


def _rendered(images: pd.DataFrame) -> Iterator[Link]:
    """Rendered people whose number and body are the same; the number alone could come from two renderings."""
    mine = images[images["dataset"].astype(str).str.startswith(_RENDERED)]
    if not len(mine) or "attributes" not in mine:
        return
    known = [row if isinstance(row, dict) else {} for row in mine["attributes"]]
    body = ["/".join([row.get("true_person", ""), *(str(row.get(part)) for part in _BODY)]) for row in known]
    frame = mine.assign(body=body)[np.asarray([bool(row.get("true_person")) for row in known])]
    yield from _links_by(frame, "body", "rendered")


def _links_by(frame: pd.DataFrame, column: str, rule: str) -> Iterator[Link]:
    """Link the people of different datasets whose images share a value; a value of two people of ONE dataset says
    nothing about who it is and is left out."""
    owners = frame[[column, "dataset", "person_id"]].astype(str).drop_duplicates()
    owners = owners[owners.duplicated(column, keep=False)].sort_values([column, "person_id"])
    values = owners.groupby(column, sort=False)
    owners = owners[values["dataset"].transform("nunique") == values["dataset"].transform("size")]
    first = owners.groupby(column, sort=False)["person_id"].transform("first")
    pairs = pd.DataFrame({"first": first, "other": owners["person_id"]}).drop_duplicates()
    for one, other in zip(pairs["first"], pairs["other"], strict=True):
        if one != other:
            yield _link(one, other, rule)


def _link(one: str, other: str, rule: str) -> Link:
    return Link(min(one, other), max(one, other), rule)


def read_links(path: Path, known: Collection[str]) -> list[Link]:
    """Return the links of a user's file: everybody with the same `identity` is one person.

    Either CSV with the columns `dataset, person, identity`, or a JSON object `{"<dataset>:<person>": "<identity>"}`.

    Args:
        path: the file.
        known: the ids of all people there are.

    Raises:
        DataError: the file is neither, names somebody whom no dataset has or a distractor, or gives a person twice.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file.", hint="Give a CSV or JSON file that says who is who.")
    pairs = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)
    people = set(known)
    members: dict[str, list[str]] = {}
    identity_of: dict[str, str] = {}
    for person, identity in pairs:
        if person not in people:
            raise DataError(
                f"{path} names {person!r}, whom no dataset has.",
                hint="People are named <dataset>:<raw id>, as in the images table.",
            )
        if person in DISTRACTORS:
            raise DataError(f"{path} names {person}, the common id of all distractors, who is nobody in particular.")
        if identity_of.setdefault(person, identity) != identity:
            raise DataError(f"{path} gives {person} two identities, {identity_of[person]!r} and {identity!r}.")
        members.setdefault(identity, []).append(person)
    return [_link(names[0], other, "user") for names in members.values() for other in names[1:] if other != names[0]]


def _read_json(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(content, dict) or not all(isinstance(value, str | int) for value in content.values()):
        raise DataError(f'{path} must be an object such as {{"cuhk-pedes:12": "anna"}}.')
    return [(str(person), str(identity)) for person, identity in content.items()]


def _read_csv(path: Path) -> list[tuple[str, str]]:
    try:
        lines = _text(path).splitlines()
        separator = max(",;\t", key=(lines[0] if lines else "").count)
        table = csv.DictReader(lines, delimiter=separator)
        columns = [name.strip() for name in table.fieldnames or ()]
        table.fieldnames = columns
        rows = list(table)
    except csv.Error as error:
        raise DataError(f"{path} is not a regular table ({error}).") from None
    if not {"dataset", "person", "identity"} <= set(columns):
        has = ", ".join(columns)[:200] or "none"
        raise DataError(f"{path} lacks one of the columns dataset, person, identity (it has: {has}).")
    pairs = []
    for number, row in enumerate(rows, start=1):
        values = [(row[name] or "").strip() for name in ("dataset", "person", "identity")]
        if not all(values):
            raise DataError(f"{path}, data row {number}: dataset, person and identity must not be empty.")
        pairs.append((f"{values[0]}:{values[1]}", values[2]))
    return pairs


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_USER_FILE:
            raise DataError(f"{path} is larger than {_MAX_USER_FILE >> 20} MiB; it should name people, no images.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    if "\0" in text:
        raise DataError(f"{path} holds a NUL byte; it is not a text file.")
    return text


def restore(images: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Return images of an earlier combination with the person ids from before it, which the file-name rules read.

    Where several ids of one dataset had become one person, the first of them stands for all.

    Args:
        images: the `images` table of a combination.
        known: its `identities` table.
    """
    first = known.astype(str).drop_duplicates(["dataset", "person_id"]).set_index(["dataset", "person_id"])
    names = first["original_id"].to_dict()
    keys = zip(images["dataset"].astype(str), images["person_id"].astype(str), strict=True)
    return images.assign(person_id=[names.get(key, key[1]) for key in keys])


def inherited(known: pd.DataFrame) -> list[Link]:
    """Return the links that the `identities` table of an earlier combination holds."""
    links = []
    for _, rows in known[known["rule"] != "own"].groupby("person_id", sort=False):
        first, *others = zip(rows["original_id"].astype(str), rows["rule"].astype(str), strict=True)
        links += [_link(first[0], other, rule) for other, rule in others]
    return links


def known_as(images: pd.DataFrame) -> pd.DataFrame:
    """Return further names of people, by which other releases know them: columns person_id and name.

    A person of CUHK-PEDES' folder `Market/` is `market-1501:<number>`; a picture from MSMT17 is known by its long name.
    With these, `evaluate` recognises people in a dataset that was never combined with the training set.
    """
    people = images.loc[~images["person_id"].isin(DISTRACTORS), ["image_id", "person_id"]].astype(str)
    market = people["image_id"].str.extract(_MARKET_IN_CUHK, expand=False)
    stems = people["image_id"].where(people["image_id"].str.startswith(_MSMT_SETS))
    stems = stems.str.extract(_MSMT_NAME, expand=False)
    found = [
        pd.DataFrame({"person_id": people["person_id"], "name": prefix + values})
        for prefix, values in (("market-1501:", market), ("msmt17-file:", stems))
    ]
    return pd.concat(found, ignore_index=True).dropna(subset="name").drop_duplicates(ignore_index=True)


def unify(images: pd.DataFrame, links: Sequence[Link], others: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the `identities` table: every person's common id, and the rule that gave it.

    Linked people form a connected component; its id is that of the member whose dataset comes first in `images`, so
    the order of the datasets decides names and nothing else. Rule `own` marks people without a link.

    Args:
        images: rows of all datasets.
        links: who is who.
        others: further people without images here, columns person_id and dataset; their names are kept.
    """
    people = images[["person_id", "dataset"]].astype(str)
    if others is not None:
        people = pd.concat([people, others[["person_id", "dataset"]].astype(str)])
    people = people.drop_duplicates("person_id").reset_index(drop=True)
    place = {name: number for number, name in enumerate(people["person_id"])}
    edges = np.asarray([(place[link.first], place[link.second]) for link in links], np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(people), len(people)))
    component = connected_components(graph, directed=False)[1]
    # The first of a component in the order of the table names it.
    first = pd.Series(people["person_id"]).groupby(component).first()
    rules = _rules(links)
    return pd.DataFrame(
        {
            "original_id": people["person_id"],
            "dataset": people["dataset"].astype(str),
            "person_id": first.loc[component].to_numpy(),
            "rule": [rules.get(name, "own") for name in people["person_id"]],
        }
    )


def _rules(links: Sequence[Link]) -> Mapping[str, str]:
    """The strongest rule of every linked person: the user's word, the renderer's, then names, then equal files."""
    strength = {"user": 0, "rendered": 1, "file-name": 2, "same-image": 3}
    rules: dict[str, str] = {}
    for link in sorted(links, key=lambda item: strength[item.rule]):
        rules.setdefault(link.first, link.rule)
        rules.setdefault(link.second, link.rule)
    return rules


def merged_within(identities: pd.DataFrame) -> list[str]:
    """Return the common ids under which several people of one dataset came together, sorted."""
    sizes = identities.groupby(["dataset", "person_id"], observed=True).size()
    return sorted({str(name) for _, name in sizes[sizes > 1].index})


def rename(images: pd.DataFrame, identities: pd.DataFrame) -> pd.DataFrame:
    """Return the images with common person ids."""
    common: dict[str, Any] = dict(zip(identities["original_id"], identities["person_id"], strict=True))
    return images.assign(person_id=[common[name] for name in images["person_id"]])
