"""t-SNE maps of the page: points that show their picture and person when pointed at, drawn as SVG by the template.

Colours of people are the page's own; words for colours are drawn as what they say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.colors import is_color_like, to_hex

from reidctl.report.figures import SERIES, named_rows

SIDE, _EDGE = 440.0, 14.0
"""Side of a map in its own units, and the room that stays free around its points."""
THUMBNAILS = 400
"""At most so many pictures are put into the page."""
_CROSS = ("clothing",)
"""Features whose points are crosses, where a map has several."""
_MOST = 8


@dataclass(frozen=True)
class Mark:
    """A point.

    Attributes:
        x, y: its place in the map, from the upper left corner.
        image: id of its image.
        person: who it is.
        text: what people read: image, person, feature and label.
        colour: of the page's series (`s1`, ...), `rest`, or a colour as #rrggbb.
        cross: whether it is drawn as a cross.
    """

    x: float
    y: float
    image: str
    person: str
    text: str
    colour: str
    cross: bool


@dataclass(frozen=True)
class Key:
    """A line of a legend: what a colour or form means."""

    text: str
    colour: str
    cross: bool = False


@dataclass(frozen=True)
class PointMap:
    """A map of points.

    Attributes:
        title: what it shows.
        marks: its points; those of people that stand out are the last, so they are drawn above the others.
        keys: its legend.
    """

    title: str
    marks: tuple[Mark, ...]
    keys: tuple[Key, ...]


def point_maps(points: pd.DataFrame, *, highlight: Sequence[str], titles: Mapping[str, str]) -> list[PointMap]:
    """Return one map per panel.

    Args:
        points: columns panel, feature, image_id, person_id, x, y; label and model may be there.
        highlight: people with a colour of their own where points have no label.
        titles: what people read for a panel; a panel without one keeps its name.
    """
    maps = []
    for panel in dict.fromkeys(points["panel"]):
        rows = points[points["panel"] == panel].reset_index(drop=True)
        title = titles.get(str(panel), str(panel))
        title += f": {rows['model'].iloc[0]}" if "model" in rows else ""
        labels = [] if "label" not in rows or panel == "streams" else [str(v) for v in rows["label"].fillna("")]
        maps.append(_map(rows, title, labels, highlight))
    return maps


def _map(rows: pd.DataFrame, title: str, labels: Sequence[str], highlight: Sequence[str]) -> PointMap:
    named = [str(name) for name in rows["person_id"]]
    by_label = bool(labels) and set(labels) <= {""} | _frequent(labels)
    shown = labels if by_label else named
    colour = _palette(_order(labels) if by_label else list(highlight), words=by_label)
    features = list(dict.fromkeys(rows["feature"].astype(str)))
    crossed = {name for name in features if len(features) > 1 and name in _CROSS}
    place = _placed(rows[["x", "y"]].to_numpy(float))
    marks = [
        Mark(
            x=round(float(at[0]), 1),
            y=round(float(at[1]), 1),
            image=str(row.image_id),
            person=person,
            text=_text(row, person, labels[number] if labels else ""),
            colour=colour.get(value, "rest"),
            cross=str(row.feature) in crossed,
        )
        for number, (row, person, value, at) in enumerate(zip(named_rows(rows), named, shown, place, strict=True))
    ]
    marks.sort(key=lambda mark: mark.colour != "rest")
    rest = "others" if by_label else "everybody else"
    return PointMap(title, tuple(marks), tuple(_keys(marks, colour, rest, features, crossed)))


def _text(row: object, person: str, label: str) -> str:
    feature = str(getattr(row, "feature", ""))
    return "; ".join(part for part in (str(getattr(row, "image_id", "")), person, feature, label) if part)


def _keys(
    marks: Sequence[Mark], colour: Mapping[str, str], rest: str, features: Sequence[str], crossed: set[str]
) -> list[Key]:
    forms = [Key(name, "ink", cross=name in crossed) for name in features] if crossed else []
    used = {mark.colour for mark in marks}
    colours = [Key(name, value) for name, value in colour.items() if value in used]
    return [*forms, *colours, *([Key(rest, "rest")] if "rest" in used else [])]


def _frequent(labels: Sequence[str]) -> set[str]:
    """The labels, if there are few enough for colours; nothing otherwise."""
    found = set(labels) - {""}
    return found if len(found) <= 14 else set()


def _order(labels: Sequence[str]) -> list[str]:
    return sorted(set(labels) - {""})


def _palette(names: Sequence[str], *, words: bool) -> dict[str, str]:
    """Colours by name: what the words say if all of them are colours, else the page's, as far as they last."""
    if words and names and all(is_color_like(name) for name in names):
        return {name: to_hex(name) for name in names}
    return {name: f"s{number + 1}" for number, name in enumerate(names[: min(_MOST, len(SERIES))])}


def _placed(place: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Places in the map's own units: both axes with one scale, y upwards as in the figure."""
    low, high = place.min(axis=0), place.max(axis=0)
    scale = (SIDE - 2 * _EDGE) / max(float((high - low).max()), 1e-9)
    moved = (place - (low + high) / 2) * scale
    moved[:, 1] *= -1
    return np.asarray(moved + SIDE / 2, np.float64)


def thumbnail_order(points: pd.DataFrame, highlight: Sequence[str]) -> list[str]:
    """Return the images whose pictures are put into the page: all, or some, those of highlighted people first."""
    images = points.drop_duplicates("image_id")
    first = images["person_id"].astype(str).isin(list(highlight))
    order = [*images.loc[first, "image_id"].astype(str), *images.loc[~first, "image_id"].astype(str)]
    return order[:THUMBNAILS]


def most_pictured(points: pd.DataFrame, count: int) -> list[str]:
    """Return the people with most images."""
    images = points.drop_duplicates("image_id")["person_id"].astype(str).value_counts()
    return sorted(images.index, key=lambda name: (-images[name], name))[:count]
