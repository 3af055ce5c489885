"""Queries that are an image and a text together: "this person, but ..."."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError, UsageError
from reidctl.evaluation.protocols import Protocol, Side, image_to_image, text_to_image
from reidctl.retrieval.store import EmbeddingTable


def composed(
    images: pd.DataFrame,
    captions: pd.DataFrame,
    embeddings: EmbeddingTable,
    *,
    by_image: EmbeddingTable | None = None,
    dataset: str,
    split: str,
    weight: float = 0.5,
    condition: str = "standard",
    gallery_condition: str = "standard",
    kind: str = "full",
    cloth_changing: bool = False,
) -> Protocol:
    """Return the protocol of image+text queries, direction `it2i`: each caption with the image that it describes.

    query = unit(weight · image + (1 - weight) · text), from the unit vectors of both. Gallery and dropped images are
    those of `image_to_image`; the query's own image is always dropped. With weight 1 every caption of an image asks the
    image's own question, with 0 its text is searched under the rules of image-to-image. The gallery holds image vectors
    alone, so no query text can reach it.

    Where images are compared with images by vectors of their own (`by_image`), which no text can be added to, query and
    gallery are both vectors side by side: query = unit([weight · image, (1 - weight) · text]), image and gallery each
    as the two tasks see them. That is the same thing, because the cosine with a sum is the sum of the cosines: images
    are ranked by weight · cos(image, gallery image) + (1 - weight) · cos(text, gallery image).

    The sum is the simplest composition, not a trained one. Captions of public sets describe their image, so the text
    adds a second view of the same person here, it does not change it (as in composed image retrieval).

    Args:
        images: table `images`.
        captions: table `captions`; rows of `kind` with status ok that describe a query image are the queries' texts.
        embeddings: vectors of both.
        by_image: other vectors of the images, by which they are compared with each other; None, or `embeddings`
            itself: there are none.
        dataset: which dataset of the tables.
        split: which split.
        weight: the image's share, in [0, 1].
        condition: the queries' condition in `embeddings`, of image and text.
        gallery_condition: the gallery images' condition.
        kind: which captions.
        cloth_changing: drop gallery images in the query's outfit too.

    Raises:
        UsageError: a weight outside [0, 1].
        DataError: no query image has a caption, or see `image_to_image`.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"An image's share of {weight:g} in a query is not in [0, 1].")
    where = {"dataset": dataset, "split": split, "condition": condition, "gallery_condition": gallery_condition}
    seen = image_to_image(images, embeddings, **where, cloth_changing=cloth_changing)
    other = None if by_image is embeddings else by_image
    shown = seen if other is None else image_to_image(images, other, **where, cloth_changing=cloth_changing)
    told = text_to_image(images, captions, embeddings, **where, kind=kind).query
    place = pd.Index(shown.query.image).get_indexer(pd.Index(told.image))
    with_image = np.flatnonzero(place >= 0)
    if not len(with_image):
        raise DataError(
            f"No query image of {dataset}, split {split}, has a caption of kind {kind}.", hint="Evaluate i2i or t2i."
        )
    query = told.select(with_image)
    asked = shown.query.vectors[place[with_image]]
    if other is None:
        vectors = _unit_sum(asked, query, weight)
        return replace(shown, direction="it2i", query=replace(query, vectors=vectors))
    vectors = _beside(asked, query.vectors, weight)
    gallery = replace(shown.gallery, vectors=_beside(shown.gallery.vectors, seen.gallery.vectors, 0.5))
    return replace(shown, direction="it2i", query=replace(query, vectors=vectors), gallery=gallery)


def _beside(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], weight: float) -> npt.NDArray[np.float32]:
    """The unit rows of two matrices side by side, weighted, at length 1; equal rows of both stay equal."""
    both = np.concatenate([weight * one, (1 - weight) * other], axis=1, dtype=np.float64)
    return np.asarray(both / np.hypot(weight, 1 - weight), np.float32)


def _unit_sum(image: npt.NDArray[np.float32], query: Side, weight: float) -> npt.NDArray[np.float32]:
    """The weighted sums of image and text vectors at length 1.

    Raises:
        DataError: an image and its text cancel each other.
    """
    both = weight * image.astype(np.float64) + (1 - weight) * query.vectors.astype(np.float64)
    length = np.linalg.norm(both, axis=1, keepdims=True)
    nothing = np.flatnonzero(~(length[:, 0] > 1e-6))
    if len(nothing):
        raise DataError(f"Image and text of query {query.item[nothing[0]]} cancel each other at weight {weight:g}.")
    return np.asarray(both / length, np.float32)
