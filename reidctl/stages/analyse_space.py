"""The analyses of `analyse` of how features lie in space: maps, silhouettes, distances; alone or beside another model.

Two models are compared on the same images and people; each with the feature by which it compares images with images.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.data import camera_names
from reidctl.errors import DataError
from reidctl.evaluation import compactness as distances
from reidctl.evaluation import projection
from reidctl.evaluation.compactness import Spread
from reidctl.metrics import Interval, bootstrap_interval
from reidctl.report.scatter import Side, tsne_map, tsne_sides
from reidctl.runs import Run
from reidctl.stages.analyse_parts import Found, Labels, Material, NotApplicable
from reidctl.stages.features import Features, Rows, part_of, whole_families
from reidctl.stages.measuring import find_subject

COMPARED = ("tsne", "compactness")
"""The analyses that set another model beside this one."""
TSNE_IMAGES = 600
TSNE_LEAST = 10
COLOURED_BY = ("upper_colour", "lower_colour")
HIGHLIGHTED = 7
"""How many people have a colour of their own where two models are compared."""
MAPS_NOTE = (
    "Identity and clothing features come from different heads, so they lie apart in any t-SNE map, whatever they hold: "
    "read the silhouettes (computed in each feature's own space), the probes and the dependence instead."
)
SIDES_NOTE = (
    "Lengths, sizes and gaps of two t-SNE maps cannot be compared; the silhouettes can "
    "(computed in the features' own spaces, 95 % intervals over people)."
)


# Another model


def find_other(
    other: Run, material: Material, rows: Rows, *, split: str, device: str, captions: Path | None
) -> Material:
    """Return another run's model on the same images; its features are kept in its own run.

    Args:
        other: where that model is.
        material: this run's.
        rows: which images of the split are looked at.
        split: which people.
        device: where to compute.
        captions: the table of identity and clothing texts; default: what that run knows of these images.

    Raises:
        DataError: it has no model, or its model was trained on people or files of the split.
    """
    folder = material.subject.source.folder
    try:
        subject = find_subject(other, split=split, device=device, data=folder, captions=captions)
    except DataError as error:
        raise DataError(f"--against {other.path}: {error.message}", hint=error.hint) from None
    return Material(subject, part_of(subject.corpus, rows), material.seed, cache=material.cache)


def compared(features: Features) -> str:
    """Return the name of the feature by which a model compares images with images."""
    return "i2i" if "i2i" in features else "embedding"


def _title(material: Material, other: Material) -> str:
    """The method and the run; all of the run's path where its last part is the other's too."""
    path, beside = material.subject.run.path, other.subject.run.path
    name = path.name if path.name != beside.name else str(path)
    return f"{material.subject.method.name} ({name})"


# Maps


def tsne(material: Material, found: Found) -> None:
    """Draw the features in two dimensions, and measure silhouettes where they are."""
    rows = whole_families(material.images, TSNE_IMAGES, seed=material.seed, first=material.highlight)
    if len(rows) < TSNE_LEAST:
        raise NotApplicable(f"{len(rows)} images are too few for a map; at least {TSNE_LEAST} are needed")
    images, person = material.images.iloc[rows].reset_index(drop=True), material.person[rows]
    features = {name: values[rows] for name, values in material.features.items()}
    coloured_by, label = _colouring(images, person)
    for feature, values in features.items():
        for target, labels in {"person": person, coloured_by: label}.items():
            known = np.array([value is not None for value in labels])
            fit = projection.silhouette(values[known], labels[known], person[known], seed=material.seed)
            if fit is not None:
                size = fit.images, fit.people
                found.add("tsne", feature, target, "silhouette", fit.value, size, control=fit.control)
    points = _points(images, person, features, ["" if value is None else str(value) for value in label], material.seed)
    most = most_pictured(person)
    note = f"{len(rows):,} images of {len(most):,} people."
    if "streams" in set(points["panel"]):
        note += f" {MAPS_NOTE}"
        found.notes.append(f"tsne: {MAPS_NOTE}")
    highlight = material.highlight or most[:2]
    found.drawings.append(
        lambda folder: tsne_map(points, folder / "tsne", highlight=highlight, coloured_by=coloured_by, note=note)
    )
    if material.against is not None:
        _tsne_against(
            material, material.against, found, rows, material.highlight or of_each_dataset(images, HIGHLIGHTED)
        )


def most_pictured(person: Labels) -> tuple[str, ...]:
    """Return all people, those with most images first."""
    counts = pd.Series(person).value_counts()
    return tuple(sorted(counts.index, key=lambda name: (-counts[name], name)))


def of_each_dataset(images: pd.DataFrame, count: int) -> tuple[str, ...]:
    """Return up to `count` people of a table `images`, those with most images first, the datasets in turns."""
    person = images["person_id"].astype(str).to_numpy(dtype=object)
    groups = [most_pictured(person[rows]) for _, rows in _datasets(images)]
    turns = [group[place] for place in range(max(map(len, groups))) for group in groups if place < len(group)]
    return tuple(dict.fromkeys(turns))[:count]


def _colouring(images: pd.DataFrame, person: Labels) -> tuple[str, Labels]:
    """The name and the values of what the map of the retrieved feature is coloured by."""
    known = [row if isinstance(row, dict) else {} for row in images["attributes"]]
    for name in COLOURED_BY:
        values = np.array([row.get(name) or None for row in known], dtype=object)
        if len(set(values) - {None}) > 1:
            return name, values
    return "person", person


def _points(images: pd.DataFrame, person: Labels, features: Features, label: Iterable[str], seed: int) -> pd.DataFrame:
    """The maps as rows: both streams in one map, the retrieved feature in another."""
    named = {"image_id": images["image_id"], "person_id": person, "label": list(label)}
    maps = [("embedding", [compared(features)])]
    if {"identity", "clothing"} <= set(features):
        maps.insert(0, ("streams", ["identity", "clothing"]))
    frames = []
    for panel, members in maps:
        place = projection.tsne(np.concatenate([features[name] for name in members]), seed=seed)
        for number, name in enumerate(members):
            part = place[number * len(images) : (number + 1) * len(images)]
            frames.append(pd.DataFrame({"panel": panel, "feature": name, **named, "x": part[:, 0], "y": part[:, 1]}))
    return pd.concat(frames, ignore_index=True)


def _tsne_against(material: Material, other: Material, found: Found, rows: Rows, highlight: tuple[str, ...]) -> None:
    """Draw the same images by two models, side by side with the same seed, and compare how tight people are."""
    images, person, seed = material.images.iloc[rows], material.person[rows], material.seed
    size = len(rows), len(set(person))
    sides, frames, each = [], [], []
    # The other model stands on the left: what one starts from.
    for model, beside, prefix in ((other, material, "against."), (material, other, "")):
        feature = compared(model.features)
        values = model.features[feature][rows]
        fit = projection.silhouette(values, person, person, seed=seed)
        if fit is None:
            found.notes.append("tsne: nobody has two images here, so no silhouettes of people are compared.")
            return
        if prefix:
            found.add("tsne", f"against.{feature}", "person", "silhouette", fit.value, size, control=fit.control)
        each.append(projection.silhouettes(values, person))
        sides.append(Side("against" if prefix else "this", _title(model, beside), feature, _below(fit.value)))
        place = projection.tsne(values, seed=seed)
        named = {"panel": sides[-1].panel, "model": sides[-1].title, "feature": feature}
        frames.append(
            pd.DataFrame(
                {
                    **named,
                    "image_id": images["image_id"].to_numpy(),
                    "person_id": person,
                    "x": place[:, 0],
                    "y": place[:, 1],
                }
            )
        )
    difference = bootstrap_interval(each[1] - each[0], person, seed=seed)
    found.add("tsne", f"difference.{sides[1].feature}", "person", "silhouette", difference, size)
    points = pd.concat(frames, ignore_index=True)
    note = f"The same {size[0]:,} images of {size[1]:,} people, seed {seed}. {SIDES_NOTE}"
    found.notes.append(f"tsne: {SIDES_NOTE}")
    found.drawings.append(
        lambda folder: tsne_sides(points, sides, folder / "tsne_against", highlight=highlight, note=note)
    )


def _below(value: Interval) -> str:
    return f"silhouette of people {value.value:.3f}  [{value.low:.3f}, {value.high:.3f}]"


# Distances


def compactness(material: Material, found: Found) -> None:
    """Measure how near a person's images lie to each other, and how far from others, in every feature."""
    parts = _parts(material.images)
    done = [
        _add_distances(material, found, feature, target, rows, values)
        for feature, values in material.features.items()
        for target, rows in parts
    ]
    if not any(done):
        raise NotApplicable("there are no two people, or nobody has two images under different cameras")
    found.notes.append(
        "compactness: cosine distances; every person counts the same. `intra` is over a person's images under "
        "different cameras (an unknown camera counts as another one), `inter` over images of two people. `ratio` is 0 "
        "if everybody is a point and 1 if people are no nearer to themselves than to others."
    )
    if material.against is not None:
        _compactness_against(material, material.against, found, parts)


def _parts(images: pd.DataFrame) -> list[tuple[str, Rows]]:
    """All images and, where there are several, those of each dataset."""
    parts, each = [("", np.arange(len(images)))], _datasets(images)
    return parts + (each if len(each) > 1 else [])


def _datasets(images: pd.DataFrame) -> list[tuple[str, Rows]]:
    """The rows of each dataset, by its name."""
    datasets = images["dataset"].astype(str).to_numpy()
    return [(name, np.flatnonzero(datasets == name)) for name in sorted(set(datasets))]


def _spread(material: Material, rows: Rows, values: npt.NDArray[np.float32]) -> Spread | None:
    return distances.spread(values[rows], material.person[rows], camera_names(material.images.iloc[rows]))


def _add_distances(
    material: Material, found: Found, feature: str, target: str, rows: Rows, values: npt.NDArray[np.float32]
) -> bool:
    """Add the numbers of one feature on some images; return whether there are any."""
    given, person, seed = _spread(material, rows, values), material.person[rows], material.seed
    if given is None:
        return False
    measured = distances.compactness(given, seed=seed)
    size = len(rows), len(set(person))
    found.add("compactness", feature, target, "intra", measured.intra, size)
    found.add("compactness", feature, target, "inter", measured.inter, size)
    if measured.ratio.value == measured.ratio.value:  # equal features have none
        found.add("compactness", feature, target, "ratio", measured.ratio, size, chance=1.0)
    fit = projection.silhouette(values[rows], person, person, seed=seed)
    if fit is not None:
        found.add("compactness", feature, target, "silhouette", fit.value, size, control=fit.control)
    return True


def _compactness_against(material: Material, other: Material, found: Found, parts: list[tuple[str, Rows]]) -> None:
    names = compared(material.features), compared(other.features)
    ours, theirs = material.features[names[0]], other.features[names[1]]
    for target, rows in parts:
        if not _add_distances(other, found, f"against.{names[1]}", target, rows, theirs):
            continue
        person, seed = material.person[rows], material.seed
        size, feature = (len(rows), len(set(person))), f"difference.{names[0]}"
        one, two = _spread(material, rows, ours), _spread(other, rows, theirs)
        assert one is not None and two is not None, "the same pairs of images"
        ratio = distances.ratio_difference(one, two, seed=seed)
        if ratio.value == ratio.value:
            found.add("compactness", feature, target, "ratio", ratio, size)
        each = projection.silhouettes(ours[rows], person) - projection.silhouettes(theirs[rows], person)
        found.add("compactness", feature, target, "silhouette", bootstrap_interval(each, person, seed=seed), size)
    found.notes.append(
        f"compactness: differences are `{names[0]}` of {_title(material, other)} less `{names[1]}` of "
        f"{_title(other, material)}, on the same images; a lower ratio and a higher silhouette are tighter."
    )
