"""The same metrics on parts of the queries: by camera, occlusion, view, caption length, number of relevant images.

Every slice divides all queries of a protocol into disjoint parts, so the parts' values, weighted by their scored
queries, average to the whole. A part is a choice of queries: the gallery stays whole, and in text-to-image retrieval a
query's picture, whose camera or view names its part, is in that gallery beside other pictures of the person.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError
from reidctl.evaluation.paired import intervals_over_people
from reidctl.evaluation.protocols import Evaluation, Protocol, Side
from reidctl.metrics import Interval

Labels = npt.NDArray[np.object_]

# Attributes of the query's picture that make a slice, and the slice's name: what holds of a picture, not of a person.
ATTRIBUTES = {
    "occluded": "occlusion",
    "occluder": "occluder",
    "view": "view",
    "viewpoint": "view",
    "pose": "pose",
    "carried": "carried",
    "carrying": "carried",
    "background": "background",
    "illumination": "illumination",
    "lighting": "illumination",
    "weather": "weather",
    "time": "time",
    "blur": "blur",
    "resolution": "resolution",
}
# Whose value is a list of things: only whether there is one makes a part.
_ANY = frozenset({"carried", "carrying"})
MOST_PARTS = 20  # an attribute with more values is no slice
FEWEST_PEOPLE = 5  # below, a part has no interval
WORDS = ((1, 10), (11, 20), (21, 40), (41, None))
MATCHES = ((1, 1), (2, 4), (5, None))
UNKNOWN = "unknown"


def slice_rows(
    protocol: Protocol,
    evaluation: Evaluation,
    images: pd.DataFrame,
    captions: pd.DataFrame | None,
    *,
    cut: Callable[[str], bool] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return rows of the table `slices`: every metric of the evaluation on each part of its queries.

    Slices: `camera` (of the query image, or of the image that a text describes); the attributes of that image named
    in `ATTRIBUTES`; `match-camera` (whether the relevant images come from that camera: all, some, none); `matches`
    (number of relevant images 1, 2-4, 5+); for texts `words` (1-10, 11-20, 21-40, 41+, separated by white space) and
    `cut` (whether the text tower cuts the text). What nobody recorded is the part `unknown`, an empty attribute
    `none`. A part without a scored query has no row, and a slice with a single part is left out. Parts with fewer than
    5 people have values but no interval. The more parts, the more of them look remarkable by chance.

    Args:
        protocol: the queries and the gallery.
        evaluation: its evaluation.
        images: table `images`, with all images of the queries.
        captions: table `captions`, with the texts of text queries; None, or none of these queries: no slices by text.
        cut: says whether a text is longer than the text tower reads; None: no such slice.
        seed: of the bootstrap over people.
        resamples: number of bootstrap samples.

    Raises:
        DataError: a query's image is not in `images`, or its text not in `captions`.
    """
    queries = evaluation.ranking.queries
    values = {metric: queries.values(metric) for metric in evaluation.summary}
    where = {key: getattr(protocol, key) for key in ("direction", "dataset", "split", "condition")}
    rows: list[dict[str, Any]] = []
    for name, labels, order in _slices(protocol, queries.matches, images, captions, cut):
        parts = [part for part in order if (queries.valid & (labels == part)).any()]
        for part in parts if len(parts) > 1 else []:
            scored = queries.valid & (labels == part)
            person = protocol.query.person[scored]
            people = len(set(person))
            counts = {"queries": int(scored.sum()), "skipped": int((labels == part).sum() - scored.sum())}
            found = intervals_over_people(
                {metric: value[scored] for metric, value in values.items()}, person, seed=seed, resamples=resamples
            )
            named = {**where, "slice": name, "part": part, **counts, "people": people}
            rows += [{**named, "metric": metric, **_numbers(found[metric], people)} for metric in found]
    columns = [*where, "slice", "part", "metric", "value", "low", "high", "queries", "skipped", "people"]
    return pd.DataFrame(rows, columns=columns)


def _numbers(interval: Interval, people: int) -> dict[str, float]:
    if people < FEWEST_PEOPLE:
        return {"value": interval.value, "low": np.nan, "high": np.nan}
    return vars(interval)


def _slices(
    protocol: Protocol,
    matches: npt.NDArray[np.int64],
    images: pd.DataFrame,
    captions: pd.DataFrame | None,
    cut: Callable[[str], bool] | None,
) -> Iterator[tuple[str, Labels, list[str]]]:
    """Name, label of each query, and order of the parts of every slice."""
    yield from _sorted("camera", [UNKNOWN if camera is None else str(camera) for camera in protocol.query.camera])
    yield from _by_attribute(protocol.query, images)
    yield from _by_match_camera(protocol)
    yield from _binned("matches", matches, MATCHES)
    texts = [] if captions is None else _texts(protocol.query, captions)
    if not texts:
        return
    yield from _binned("words", np.array([len(text.split()) for text in texts], np.int64), WORDS)
    if cut is not None:
        yield from _sorted("cut", ["yes" if cut(text) else "no" for text in texts])


def _sorted(name: str, labels: Sequence[str]) -> Iterator[tuple[str, Labels, list[str]]]:
    """A slice whose parts come in order of their names, `unknown` last."""
    parts = sorted(set(labels), key=lambda part: (part == UNKNOWN, part))
    yield name, np.array(labels, dtype=object), parts


def _binned(
    name: str, numbers: npt.NDArray[np.int64], bins: Sequence[tuple[int, int | None]]
) -> Iterator[tuple[str, Labels, list[str]]]:
    """A slice by a number; a number below the first bin is a part `0`."""
    labels = np.full(len(numbers), "0", dtype=object)
    names = []
    for low, high in bins:
        names.append(f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}")
        labels[numbers >= low] = names[-1]
    yield name, labels, ["0", *names]


def _by_attribute(query: Side, images: pd.DataFrame) -> Iterator[tuple[str, Labels, list[str]]]:
    """A slice for each known attribute of the queries' images with few enough values."""
    row_of = {name: row for row, name in enumerate(images["image_id"])}
    missing = [name for name in query.image if name not in row_of]
    if missing:
        raise DataError(f"{len(missing):,} images of queries are not in the images table, e.g. `{missing[0]}`.")
    column = images["attributes"].to_numpy(dtype=object)
    found = [column[row_of[name]] for name in query.image]
    # An image without attributes holds None, or NaN in a frame that was not read from a table.
    attributes: list[dict[str, str]] = [known if isinstance(known, dict) else {} for known in found]
    done: set[str] = set()
    for attribute, name in ATTRIBUTES.items():
        if name in done or not any(attribute in known for known in attributes):
            continue
        labels = [_label(known.get(attribute), attribute) for known in attributes]
        if len(set(labels)) <= MOST_PARTS:
            done.add(name)
            yield from _sorted(name, labels)


def _label(value: str | None, attribute: str) -> str:
    if value is None:
        return UNKNOWN
    if attribute in _ANY:
        return "something" if value.strip() else "nothing"
    return str(value).strip() or "none"


def _by_match_camera(protocol: Protocol) -> Iterator[tuple[str, Labels, list[str]]]:
    """Whether a query's relevant images come from its own camera: only where none of them is dropped for it."""
    query, gallery = protocol.query, protocol.gallery
    if protocol.exclude != "none" or any(camera is None for side in (query, gallery) for camera in side.camera):
        return
    every, pairs = Counter(gallery.person), Counter(zip(gallery.person, gallery.camera, strict=True))
    total = np.array([every[person] for person in query.person])
    own = np.array([pairs[pair] for pair in zip(query.person, query.camera, strict=True)])
    labels = np.where(own == total, "same", np.where(own == 0, "other", "both")).astype(object)
    yield "match-camera", labels, ["same", "both", "other"]


def _texts(query: Side, captions: pd.DataFrame) -> list[str]:
    """The queries' texts; nothing if the queries are images."""
    text_of = dict(zip(captions["caption_id"], captions["text"], strict=True))
    missing = [name for name in query.item if name not in text_of]
    if len(missing) == len(query.item):
        return []
    if missing:
        raise DataError(f"{len(missing):,} text queries are not in the captions table, e.g. `{missing[0]}`.")
    return [str(text_of[name]) for name in query.item]
