"""Writing styles of captions: clusters of neutral texts, each turned into an instruction for a describer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.captioning import clustering
from reidctl.captioning.config import StyleConfig
from reidctl.captioning.embedding import unit
from reidctl.captioning.form import Form, form_of
from reidctl.captioning.neutralise import neutralise_all
from reidctl.console import log
from reidctl.tables import vectors

Embed = Callable[[list[str]], npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EXEMPLAR_LIMIT = 300
_MAX_NOISE = 0.5


@dataclass(frozen=True)
class StyleReport:
    """How the styles came about; goes into the stage record.

    Attributes:
        algorithm, encoder: as configured.
        captions, fitted: captions given, and captions that the clustering saw (see `StyleConfig.fit_limit`).
        eps: cosine distance used; None where the algorithm has none.
        clusters: styles in the end.
        found: clusters before small ones were merged.
        noise: share of fitted captions that the algorithm left out and the nearest centroid took in.
        warnings: degenerate outcomes, in words.
    """

    algorithm: str
    encoder: str
    captions: int
    fitted: int
    eps: float | None
    clusters: int
    found: int
    noise: float
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {**asdict(self), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Styles:
    """Styles and the style of every caption they were fitted on.

    Attributes:
        table: rows of the `styles` table, largest style first.
        labels: row of `table` per caption, shape (N,).
        report: how they were found.
    """

    table: pd.DataFrame
    labels: Ints
    report: StyleReport
    _centroids: Floats = field(repr=False)

    @property
    def style_ids(self) -> list[str]:
        """The style id of every fitted caption."""
        ids = self.table["style_id"].tolist()
        return [ids[label] for label in self.labels]

    def assign(self, texts: Sequence[str], embed: Embed) -> list[str]:
        """Return the style id of other captions: the nearest centroid. The styles do not change."""
        if not len(self.table):
            return []
        nearest = clustering.nearest(unit_vectors(texts, embed), self._centroids)
        return self.table["style_id"].iloc[nearest].tolist()


def discover_styles(texts: Sequence[str], embed: Embed, config: StyleConfig, *, seed: int = 0) -> Styles:
    """Return the writing styles among captions.

    Neutralise, embed, scale to unit length, cluster by cosine distance, give noise to the nearest centroid, merge
    small clusters, measure the most central captions of each (001 section III-B, 002 section 3.3; neither states
    eps or min_samples). DBSCAN's eps is the knee of the sorted k-distance curve, k = min_samples.

    Args:
        texts: captions of the TRAIN split only: styles fitted on test captions would leak.
        embed: neutral texts -> vectors (N, D), any scale; `embedding.hashed` or a CLIP text encoder.
        config: see `StyleConfig`.
        seed: of subsampling and of the algorithms that draw numbers.

    Returns:
        Styles; at least one row unless `texts` is empty.
    """
    points = unit_vectors(texts, embed)
    fitted = clustering.subsample(len(points), config.fit_limit, seed)
    grouping = clustering.group(points[fitted], config, seed)
    if not len(points):
        return _named(list(texts), points, np.zeros(0, np.int64), grouping, config, fitted)
    centroids = clustering.centroids(points[fitted], grouping.labels)
    if config.algorithm == "random":
        # Random groups share one centroid, so "nearest" would not be random.
        labels = np.random.default_rng(seed).integers(len(centroids), size=len(points)).astype(np.int64)
    else:
        labels = clustering.nearest(points, centroids)
        labels[fitted] = grouping.labels
    return _named(list(texts), points, labels, grouping, config, fitted)


def unit_vectors(texts: Sequence[str], embed: Embed) -> Floats:
    """Return the unit vectors of neutral texts, shape (N, D); each distinct neutral text is embedded once."""
    neutral = neutralise_all(texts)
    if not neutral:
        return np.zeros((0, 1))
    distinct = sorted(set(neutral))
    row = {text: index for index, text in enumerate(distinct)}
    embedded = unit(np.asarray(embed(distinct), np.float64))
    return np.asarray(embedded[[row[text] for text in neutral]], np.float64)


def style_of_image(image_id: str, style_ids: Sequence[str], *, seed: int = 0) -> str | None:
    """Return the style an image's texts are written in: a fair draw from its id.

    It must not come from the image's own caption: then the style of a query would reach the gallery's text.
    """
    if not style_ids:
        return None
    import hashlib

    code = hashlib.sha256(f"{seed}\0{image_id}".encode()).digest()
    return style_ids[int.from_bytes(code[:8], "big") % len(style_ids)]


def _named(
    texts: list[str], points: Floats, labels: Ints, grouping: clustering.Grouping, config: StyleConfig, fitted: Ints
) -> Styles:
    """The largest style first, equal sizes by their most central caption: names do not depend on the algorithm."""
    central = {int(label): _central(texts, points, labels, int(label), config.exemplars) for label in np.unique(labels)}
    sizes = {label: int((labels == label).sum()) for label in central}
    order = sorted(central, key=lambda label: (-sizes[label], central[label]))
    position = {label: index for index, label in enumerate(order)}
    labels = np.asarray([position[int(label)] for label in labels], np.int64)
    middle = clustering.centroids(points, labels) if len(points) else np.zeros((0, 1))
    table = pd.DataFrame(
        {
            "style_id": [f"style-{index:02d}" for index in range(len(order))],
            "size": [sizes[label] for label in order],
            "instruction": instructions([central[label] for label in order]),
            "exemplars": [[text[:_EXEMPLAR_LIMIT] for text in central[label]] for label in order],
            "centroid": vectors(middle),
        }
    )
    report = StyleReport(
        algorithm=config.algorithm,
        encoder=config.encoder,
        captions=len(texts),
        fitted=len(fitted),
        eps=grouping.eps,
        clusters=len(order),
        found=grouping.found,
        noise=grouping.noise,
        warnings=_warnings(len(texts), len(order), grouping, config),
    )
    for warning in report.warnings:
        log.warning("styles: %s", warning)
    return Styles(table, labels, report, middle)


def _central(texts: list[str], points: Floats, labels: Ints, label: int, count: int) -> list[str]:
    """The captions nearest to their cluster's centroid, without repeats, nearest first."""
    rows = np.flatnonzero(labels == label)
    middle = points[rows].mean(axis=0)
    # Rounding keeps the order the same where two machines sum in another order.
    ranked = sorted(rows, key=lambda row: (-round(float(points[row] @ middle), 6), texts[row]))
    return list(dict.fromkeys(texts[row] for row in ranked))[:count]


def instructions(exemplars: Sequence[Sequence[str]]) -> list[str]:
    """Return one instruction per style, measured on its central captions; no two are equal."""
    forms = [form_of(texts) for texts in exemplars]
    taken: set[Form] = set()
    for index, form in enumerate(forms):
        # Two clusters that look alike at this resolution still get different orders: the length tells them apart.
        step = 1
        while forms[index] in taken:
            forms[index] = replace(form, words=form.words + step)
            step += 1
        taken.add(forms[index])
    return [form.instruction() for form in forms]


def _warnings(captions: int, clusters: int, grouping: clustering.Grouping, config: StyleConfig) -> tuple[str, ...]:
    if config.algorithm == "none":
        return ()
    found = []
    if captions < 2 * config.min_cluster_size:
        found.append(f"only {captions} captions: too few to tell styles apart")
    if clusters == 1:
        found.append("all captions fell into one style")
    if grouping.noise > _MAX_NOISE:
        found.append(f"{grouping.noise:.0%} of the captions were noise: eps {grouping.eps} may be too small")
    return tuple(found)
