"""Writing styles of captions: clusters of neutral texts, each turned into an instruction for a describer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.captioning import clustering
from reidctl.captioning.config import StyleConfig
from reidctl.captioning.embedding import Embed as Embed
from reidctl.captioning.embedding import unit
from reidctl.captioning.form import Form, form_of
from reidctl.captioning.neutralise import neutralise_all
from reidctl.console import log
from reidctl.errors import DataError
from reidctl.tables import vectors

Floats = npt.NDArray[np.floating]
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
        merged: clusters that joined another because they were small or too many.
        noise: share of fitted captions that the algorithm left out and the nearest centroid took in.
        distinct: different neutral texts among the captions.
        neutralised: who took the content out: `lexicon`, `mllm` or `none`.
        warnings: degenerate outcomes, in words.
        notes: what a reader should know and need not mend.
    """

    algorithm: str
    encoder: str
    captions: int
    fitted: int
    eps: float | None
    clusters: int
    found: int
    noise: float
    merged: int = 0
    distinct: int = 0
    neutralised: str = "lexicon"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {**asdict(self), "warnings": list(self.warnings), "notes": list(self.notes)}


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

    def assign(self, texts: Sequence[str], embed: Embed, *, neutral: Sequence[str] | None = None) -> list[str]:
        """Return the style id of other captions: the nearest centroid. The styles do not change.

        Args:
            texts: captions; they are neutralised as the fitted ones were, by the lexicon where a model did that.
            embed: the encoder that the styles were found with.
            neutral: the captions already neutralised.
        """
        if not len(self.table):
            return []
        how = "none" if self.report.neutralised == "none" else "lexicon"
        given = neutral_texts(texts, how) if neutral is None else _checked(texts, neutral)
        nearest = clustering.nearest(unit_vectors(given, embed), self._centroids)
        return self.table["style_id"].iloc[nearest].tolist()


def discover_styles(
    texts: Sequence[str],
    embed: Embed,
    config: StyleConfig,
    *,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
) -> Styles:
    """Return the writing styles among captions.

    Neutralise, embed, scale to unit length, cluster by cosine distance, give noise to the nearest centroid, merge
    small clusters, measure the most central captions of each (001 section III-B, 002 section 3.3; neither states
    eps or min_samples). DBSCAN's eps comes from the sorted k-distance curve, see `clustering`.

    Args:
        texts: captions of the TRAIN split only: styles fitted on test captions would leak.
        embed: neutral texts -> vectors (N, D), any scale; see `embedding.make_embed`.
        config: see `StyleConfig`.
        seed: of subsampling and of the algorithms that draw numbers.
        neutral: the captions already neutralised (by a language model), one per caption; by default the lexicon does
            it, or nobody where `config.neutralise` is `none`.

    Returns:
        Styles; at least one row unless `texts` is empty.

    Raises:
        DataError: `neutral` has another length, `config.neutralise` is `mllm` without it, or a vector is not finite.
    """
    given = neutral_texts(texts, config.neutralise) if neutral is None else _checked(texts, neutral)
    points = unit_vectors(given, embed)
    fitted = clustering.subsample(len(points), config.fit_limit, seed)
    # All of them in order are the points themselves; indexing would copy them.
    seen = points if len(fitted) == len(points) else points[fitted]
    grouping = clustering.group(seen, config, seed)
    labels = _labels(points, seen, fitted, grouping.labels, config, seed)
    return _named(list(texts), points, labels, grouping, config, len(set(given)))


def neutral_texts(texts: Sequence[str], how: str) -> list[str]:
    """Return captions without their content, by the lexicon, or as they are where `how` is `none`.

    Raises:
        DataError: `how` is `mllm`: a model's texts are not made here.
    """
    if how == "mllm":
        raise DataError(
            "Captions that a model neutralises must be given as `neutral`.", hint="This is a bug: report it."
        )
    return list(texts) if how == "none" else neutralise_all(texts)


def unit_vectors(neutral: Sequence[str], embed: Embed) -> npt.NDArray[np.float32]:
    """Return the unit vectors of neutral texts, shape (N, D), float32; each distinct text is embedded once.

    Raises:
        DataError: the encoder gave another number of vectors, or one that is not finite.
    """
    if not neutral:
        return np.zeros((0, 1), np.float32)
    distinct = sorted(set(neutral))
    row = {text: index for index, text in enumerate(distinct)}
    embedded = np.asarray(embed(distinct), np.float32)
    if embedded.ndim != 2 or len(embedded) != len(distinct):
        raise DataError(f"The text encoder gave {embedded.shape} values for {len(distinct)} texts.")
    if not np.isfinite(embedded).all():
        raise DataError("The text encoder gave a vector that is not finite.", hint="Check its weights and precision.")
    embedded = np.asarray(unit(embedded), np.float32)
    if distinct == list(neutral):
        return embedded
    return embedded[[row[text] for text in neutral]]


def _checked(texts: Sequence[str], neutral: Sequence[str]) -> list[str]:
    if len(neutral) != len(texts):
        raise DataError(f"There are {len(neutral)} neutral texts for {len(texts)} captions.")
    return list(neutral)


def _labels(points: Floats, seen: Floats, fitted: Ints, found: Ints, config: StyleConfig, seed: int) -> Ints:
    """The cluster of every caption: as found where it was fitted, the nearest centroid elsewhere."""
    if not len(points) or len(seen) == len(points):
        return found
    centroids = clustering.centroids(seen, found)
    if config.algorithm == "random":
        # Random groups share one centroid, so "nearest" would not be random.
        return np.random.default_rng(seed).integers(len(centroids), size=len(points)).astype(np.int64)
    labels = clustering.nearest(points, centroids)
    labels[fitted] = found
    return labels


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
    texts: list[str], points: Floats, labels: Ints, grouping: clustering.Grouping, config: StyleConfig, distinct: int
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
        fitted=grouping.seen,
        eps=grouping.eps,
        clusters=len(order),
        found=grouping.found,
        noise=grouping.noise,
        merged=grouping.merged,
        distinct=distinct,
        neutralised=config.neutralise,
        warnings=_warnings(len(texts), len(order), grouping, config),
        notes=_notes(len(texts), grouping, config),
    )
    for warning in report.warnings:
        log.warning("styles: %s", warning)
    return Styles(table, labels, report, middle)


def _central(texts: list[str], points: Floats, labels: Ints, label: int, count: int) -> list[str]:
    """The captions nearest to their cluster's centroid, without repeats, nearest first."""
    rows = np.flatnonzero(labels == label)
    own = points[rows]
    closeness = dict(zip(rows.tolist(), np.round(own @ own.mean(axis=0, dtype=np.float64), 6).tolist(), strict=True))
    # Rounding keeps the order the same where two machines sum in another order.
    ranked = sorted(closeness, key=lambda row: (-closeness[row], texts[row]))
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


def _notes(captions: int, grouping: clustering.Grouping, config: StyleConfig) -> tuple[str, ...]:
    found = []
    if grouping.seen < captions:
        rest = f"{config.algorithm} was fitted on {grouping.seen} of {captions} captions drawn by the seed"
        found.append(f"{rest}; the others went to the nearest centroid")
    return tuple(found)


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
    if clusters == config.max_styles < grouping.found:
        found.append(f"{grouping.found} clusters were merged into the {clusters} allowed: eps may be too small")
    return tuple(found)
