"""Who is searched among whom: query and gallery sets from tables, and result tables from their evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError, UsageError
from reidctl.metrics import CUTOFFS, Interval, summarise
from reidctl.retrieval.exact import Ranking, evaluate_ranking
from reidctl.retrieval.labels import Exclude
from reidctl.retrieval.scores import Scores, rank_scores
from reidctl.retrieval.store import EmbeddingTable

Direction = Literal["t2i", "i2i", "it2i"]
Objects = npt.NDArray[np.object_]

JOINT = "joint"
"""What the table of all datasets in one gallery is called, where a dataset's name stands."""


@dataclass(frozen=True)
class Side:
    """Queries or gallery: row i of every field is item i. Missing cameras and outfits are None.

    Args:
        item: caption or image ids, shape (N,).
        image: the image an item shows or describes, shape (N,).
        person: shape (N,).
        camera: shape (N,).
        outfit: shape (N,).
        vectors: shape (N, D), length at most 1.
    """

    item: Objects
    image: Objects
    person: Objects
    camera: Objects
    outfit: Objects
    vectors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.item)

    def select(self, rows: npt.NDArray[np.int64]) -> "Side":
        """Return some of the items, in the order of `rows`."""
        return Side(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Protocol:
    """One evaluation: queries, gallery, and which gallery items of the query's person are dropped."""

    direction: Direction
    dataset: str
    split: str
    condition: str
    query: Side
    gallery: Side
    exclude: Exclude


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives: the ranking, its summary, and rows for the three result tables.

    Attributes:
        ranking: per query, in the order of the protocol's queries.
        summary: every metric with its interval.
        metrics: rows of the table of that name; none if no query is scored.
        queries: likewise.
        rankings: likewise.
        left_out: default metrics that the gallery is too small for; neither in `summary` nor in `metrics`.
        unmatched: ids of the queries without a match, which were skipped, sorted.
        rule: the protocol's `exclude`.
    """

    ranking: Ranking
    summary: dict[str, Interval]
    metrics: pd.DataFrame
    queries: pd.DataFrame
    rankings: pd.DataFrame
    left_out: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    rule: str = "none"


def text_to_image(
    images: pd.DataFrame,
    captions: pd.DataFrame,
    embeddings: EmbeddingTable,
    *,
    dataset: str,
    split: str,
    condition: str = "standard",
    gallery_condition: str = "standard",
    kind: str = "full",
) -> Protocol:
    """Return the text-to-image protocol: every caption of the split against every image of the split.

    Both roles of images are searched and no camera is dropped, as in CUHK-PEDES, ICFG-PEDES and RSTPReid. The gallery
    consists of vectors of modality `image` only, so no query text can have reached it through a text vector.

    Args:
        images: table `images`.
        captions: table `captions`; rows of `kind` with status ok are the queries.
        embeddings: vectors of both.
        dataset: which dataset of the tables.
        split: which split.
        condition: the queries' condition in `embeddings`.
        gallery_condition: the images' condition.
        kind: which captions.

    Raises:
        DataError: no images, no captions, or an item without its vector.
    """
    pictures = _of_split(images, dataset, split)
    texts = captions[(captions["kind"] == kind) & (captions["status"] == "ok")]
    texts = texts.merge(pictures.drop(columns="role"), on="image_id", how="inner")
    if not len(texts):
        raise DataError(
            f"Split {split} of {dataset} has no captions of kind {kind}.", hint="Evaluate i2i, or write captions first."
        )
    query = _side(texts, "caption_id", embeddings, "text", "query", condition)
    gallery = _side(pictures, "image_id", embeddings, "image", "gallery", gallery_condition)
    return Protocol("t2i", dataset, split, condition, query, gallery, "none")


def image_to_image(
    images: pd.DataFrame,
    embeddings: EmbeddingTable,
    *,
    dataset: str,
    split: str,
    condition: str = "standard",
    gallery_condition: str = "standard",
    cloth_changing: bool = False,
) -> Protocol:
    """Return the image-to-image protocol: images with role query against images with role gallery.

    Gallery images of the query's person from the query's camera are dropped (Market-1501's rule); with
    `cloth_changing` those in the query's outfit are dropped too. In a split where no image has a role (a
    validation split cut out of training data) every image is a query and a gallery item, under the same rule;
    without cameras only the query image itself is dropped.

    Raises:
        DataError: no images, roles without queries or gallery, an item without its vector, or no outfits.
    """
    pictures = _of_split(images, dataset, split)
    query, gallery = pictures, pictures
    if pictures["role"].notna().any():
        query, gallery = pictures[pictures["role"] == "query"], pictures[pictures["role"] == "gallery"]
        if not len(query) or not len(gallery):
            raise DataError(f"Split {split} of {dataset} has {len(query)} query and {len(gallery)} gallery images.")
    exclude: Exclude = "same_camera" if pictures["camera_id"].notna().any() else "same_item"
    if cloth_changing:
        if pictures["outfit_id"].isna().any():
            raise DataError(
                f"Split {split} of {dataset} has images without outfit_id.", hint="Cloth-changing needs them all."
            )
        exclude = "cloth_changing" if pictures["camera_id"].notna().all() else "same_outfit"
    return Protocol(
        "i2i",
        dataset,
        split,
        condition,
        _side(query, "image_id", embeddings, "image", "query", condition),
        _side(gallery, "image_id", embeddings, "image", "gallery", gallery_condition),
        exclude,
    )


def together(parts: Sequence[Protocol], *, dataset: str = JOINT) -> Protocol:
    """Return the protocol in which the queries of all parts search one gallery, that of all parts.

    Somebody who is in several parts is one person. Dropped is what the parts agree to drop. Where they do not, it is
    the same person in the same camera, or, where no part knows cameras, the query image alone: a part with a rule about
    outfits has no gallery image in its queries' outfits, and an unknown camera equals its own image only.

    Args:
        parts: plain protocols of one direction, split and condition, whose cameras have names of their own in each.
        dataset: what it is called.
    """
    first = parts[0]
    alike = {(part.direction, part.split, part.condition) for part in parts}
    assert len(alike) == 1, "parts of one direction, split and condition"
    rules: set[Exclude] = {part.exclude for part in parts}
    exclude: Exclude = "same_camera" if rules & {"same_camera", "cloth_changing"} else "same_item"
    return replace(
        first,
        dataset=dataset,
        query=_stacked([part.query for part in parts]),
        gallery=_stacked([part.gallery for part in parts]),
        exclude=first.exclude if len(rules) == 1 else exclude,
    )


def clothes_settings(protocol: Protocol) -> list[Protocol]:
    """Return the two settings of cloth-changing sets, where somebody has images in several outfits; else nothing.

    `cloth-changing` drops gallery images of the query's person in its camera or its outfit, `same-clothes` those in
    its camera or in another outfit. Queries that are left without a match are skipped and counted: in PRCC that
    leaves the queries of camera C, respectively B.
    """
    query, gallery = protocol.query, protocol.gallery
    known = all(label is not None for side in (query, gallery) for label in (*side.outfit, *side.camera))
    if protocol.direction == "t2i" or not known:
        return []
    worn: dict[object, set[object]] = {}
    for person, outfit in zip(gallery.person, gallery.outfit, strict=True):
        worn.setdefault(person, set()).add(outfit)
    pairs = [(outfit, worn.get(person, set())) for person, outfit in zip(query.person, query.outfit, strict=True)]
    if not any(outfits - {outfit} for outfit, outfits in pairs) or not any(own in outfits for own, outfits in pairs):
        return []
    settings: tuple[tuple[str, Exclude], ...] = (
        ("cloth-changing", "cloth_changing"),
        ("same-clothes", "same_clothes"),
    )
    return [replace(protocol, condition=name, exclude=exclude) for name, exclude in settings]


def with_vectors(
    protocol: Protocol, query: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32], *, condition: str
) -> Protocol:
    """Return the same protocol with other vectors, e.g. a baseline's, under another condition name."""
    return replace(
        protocol,
        condition=condition,
        query=replace(protocol.query, vectors=query),
        gallery=replace(protocol.gallery, vectors=gallery),
    )


def evaluate(
    protocol: Protocol,
    *,
    top: int = 50,
    cutoffs: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Rank, score and summarise a protocol; frames fit the tables `metrics`, `queries` and `rankings`.

    In `metrics`, `queries` counts the scored queries, `skipped` those without a match, `gallery` all gallery items.
    Intervals are over people (see `metrics.bootstrap_interval`). Ranks in `rankings` count from 1.

    Args:
        protocol: who is searched among whom.
        top: how many items of each ranking to keep.
        cutoffs: the k of rank-k, besides those of rSum. None: 1, 5, 10 and 20, without those beyond the gallery.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        device: where to compute.
        advance: called with the number of queries after each block.

    Raises:
        DataError: an asked cutoff is beyond the gallery; else see `evaluate_ranking`.
        UsageError: a cutoff below 1.
    """
    check_cutoffs(protocol, cutoffs or ())
    ranking = rank(protocol, top=top, cutoffs=cutoffs or CUTOFFS, device=device, advance=advance)
    return evaluation_of(protocol, ranking, seed=seed, resamples=resamples)


def check_cutoffs(protocol: Protocol, cutoffs: Sequence[int]) -> None:
    """Refuse rank-k where k is more than there are gallery images: it would be certain, not measured.

    Raises:
        DataError: a cutoff is beyond the gallery.
        UsageError: a cutoff below 1.
    """
    for k in cutoffs:
        if k < 1:
            raise UsageError(f"rank-{k} means nothing.", hint="Cutoffs are whole numbers from 1.")
        if k > len(protocol.gallery):
            raise DataError(
                f"rank-{k} needs a gallery of at least {k} images; {protocol.dataset} {protocol.split} has "
                f"{len(protocol.gallery)}.",
                hint="Ask for a smaller k, or measure on more images.",
            )


def evaluation_of(protocol: Protocol, ranking: Ranking, *, seed: int = 0, resamples: int = 1000) -> Evaluation:
    """Summarise a ranking of the protocol, e.g. a re-ranked one; see `evaluate`.

    Rank-k beyond the gallery, and rSum if rank-10 is, are left out of `summary` and `metrics` and named in `left_out`;
    their columns in `queries` are empty.
    """
    found = summarise(ranking.queries, protocol.query.person, seed=seed, resamples=resamples)
    beyond = {f"rank{k}" for k in ranking.queries.hits if k > len(protocol.gallery)}
    beyond |= {"rSum"} if "rank10" in beyond else set()
    summary = {name: value for name, value in found.items() if name not in beyond}
    unmatched = protocol.query.item[ranking.queries.matches == 0]
    return Evaluation(
        ranking,
        summary,
        _metrics_frame(protocol, ranking, summary),
        _queries_frame(protocol, ranking, beyond),
        _rankings_frame(protocol, ranking),
        left_out=tuple(name for name in found if name in beyond),
        unmatched=tuple(sorted(str(item) for item in unmatched)),
        rule=protocol.exclude,
    )


def rank(
    protocol: Protocol,
    *,
    top: int = 50,
    cutoffs: Sequence[int] = CUTOFFS,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Ranking:
    """Return the ranking of the gallery for every query under the protocol's rules; see `evaluate_ranking`."""
    query, gallery = protocol.query.vectors, protocol.gallery.vectors
    return evaluate_ranking(
        query, gallery, **_labels(protocol), top=top, cutoffs=cutoffs, device=device, advance=advance
    )


def rank_by(
    protocol: Protocol,
    block: Callable[[slice], Scores],
    *,
    top: int = 50,
    cutoffs: Sequence[int] = CUTOFFS,
    advance: Callable[[int], None] | None = None,
) -> Ranking:
    """Return the ranking by given scores instead of the vectors' products, under the same rules; see `rank_scores`."""
    queries, gallery = len(protocol.query), len(protocol.gallery)
    return rank_scores(
        block, queries=queries, gallery=gallery, **_labels(protocol), top=top, cutoffs=cutoffs, advance=advance
    )


def _labels(protocol: Protocol) -> dict[str, Any]:
    """Who everybody is and what is dropped, as the evaluators take it."""
    query, gallery = protocol.query, protocol.gallery
    return {
        "query_person": query.person,
        "gallery_person": gallery.person,
        "query_camera": cameras_of(query),
        "gallery_camera": cameras_of(gallery),
        "query_outfit": query.outfit,
        "gallery_outfit": gallery.outfit,
        # A query that contains an image is dropped from its own gallery, under whatever name it is asked.
        "query_id": query.image,
        "gallery_id": gallery.item,
        "exclude": protocol.exclude,
    }


def cameras_of(side: Side) -> Objects:
    """Return the cameras, an unknown one being the image's own: it equals that of the same image and of no other."""
    return np.array(
        [f"\0{image}" if camera is None else camera for camera, image in zip(side.camera, side.image, strict=True)],
        dtype=object,
    )


def _metrics_frame(protocol: Protocol, ranking: Ranking, summary: dict[str, Interval]) -> pd.DataFrame:
    counts = {"queries": ranking.queries.scored, "skipped": ranking.queries.skipped, "gallery": len(protocol.gallery)}
    where = {key: getattr(protocol, key) for key in ("direction", "dataset", "split", "condition")}
    rows = [{**where, "metric": metric, **vars(summary[metric]), **counts} for metric in summary]
    # A split where every query is skipped has no metrics: the column `value` must not be empty.
    return pd.DataFrame(rows if counts["queries"] else rows[:0], columns=list(rows[0]))


def _queries_frame(protocol: Protocol, ranking: Ranking, beyond: set[str]) -> pd.DataFrame:
    queries = ranking.queries
    hits = {f"rank{k}": queries.hits[k] for k in CUTOFFS if k in queries.hits and f"rank{k}" not in beyond}
    return pd.DataFrame(
        {
            "direction": protocol.direction,
            "dataset": protocol.dataset,
            "query_id": protocol.query.item,
            "condition": protocol.condition,
            "person_id": protocol.query.person,
            "matches": queries.matches,
            "gallery": ranking.gallery,
            "first_match": queries.first_match,
            "average_precision": queries.average_precision,
            "inp": queries.inp,
            **{f"rank{k}": hits.get(f"rank{k}", np.nan) for k in CUTOFFS},
        }
    )


def _rankings_frame(protocol: Protocol, ranking: Ranking) -> pd.DataFrame:
    row, place = np.nonzero(ranking.index >= 0)
    return pd.DataFrame(
        {
            "direction": protocol.direction,
            "dataset": protocol.dataset,
            "query_id": protocol.query.item[row],
            "condition": protocol.condition,
            "rank": place + 1,
            "gallery_id": protocol.gallery.item[ranking.index[row, place]],
            "score": ranking.score[row, place],
            "match": ranking.match[row, place],
        }
    )


def _stacked(sides: Sequence[Side]) -> Side:
    return Side(**{name: np.concatenate([getattr(side, name) for side in sides]) for name in vars(sides[0])})


def _of_split(images: pd.DataFrame, dataset: str, split: str) -> pd.DataFrame:
    found = images[(images["dataset"] == dataset) & (images["split"] == split)]
    if not len(found):
        known = sorted(set(zip(images["dataset"], images["split"], strict=True)))
        raise DataError(f"No images of dataset {dataset}, split {split}.", hint=f"Known: {known}.")
    columns = ["image_id", "person_id", "role", "camera_id", "outfit_id"]
    return found.reindex(columns=columns)


def _side(frame: pd.DataFrame, item: str, embeddings: EmbeddingTable, modality: str, role: str, condition: str) -> Side:
    def objects(column: str) -> Objects:
        values = frame[column].to_numpy(dtype=object, copy=True)
        values[pd.isna(values)] = None
        return values

    return Side(
        objects(item),
        objects("image_id"),
        objects("person_id"),
        objects("camera_id"),
        objects("outfit_id"),
        _vectors(frame[item], embeddings, modality, role, condition),
    )


def _vectors(
    items: pd.Series, embeddings: EmbeddingTable, modality: str, role: str, condition: str
) -> npt.NDArray[np.float32]:
    """The items' vectors: those of the wanted role, else of the other one (an image may serve as both)."""
    rows = embeddings.rows
    fit = np.flatnonzero((rows["modality"] == modality) & (rows["condition"] == condition))
    preferred = fit[np.argsort((rows["role"].to_numpy()[fit] != role), kind="stable")]
    ids = pd.Index(rows["item_id"].to_numpy()[preferred])
    first = ~ids.duplicated()
    place = ids[first].get_indexer(items)
    if (place < 0).any():
        missing = items.to_numpy()[place < 0]
        raise DataError(
            f"{len(missing)} of {len(items)} {role} items have no {modality} vector of condition {condition}, "
            f"e.g. {missing[0]}.",
            hint="Embed them with `reidctl index`.",
        )
    return np.asarray(embeddings.vectors[preferred[first][place]])
