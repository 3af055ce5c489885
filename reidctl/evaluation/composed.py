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

    The sum is the simplest composition, not a trained one. Captions of public sets describe their image, so the text
    adds a second view of the same person here, it does not change it (as in composed image retrieval).

    Args:
        images: table `images`.
        captions: table `captions`; rows of `kind` with status ok that describe a query image are the queries' texts.
        embeddings: vectors of both.
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
    shown = image_to_image(images, embeddings, **where, cloth_changing=cloth_changing)
    told = text_to_image(images, captions, embeddings, **where, kind=kind).query
    place = pd.Index(shown.query.image).get_indexer(pd.Index(told.image))
    with_image = np.flatnonzero(place >= 0)
    if not len(with_image):
        raise DataError(
            f"No query image of {dataset}, split {split}, has a caption of kind {kind}.", hint="Evaluate i2i or t2i."
        )
    query = told.select(with_image)
    vectors = _unit_sum(shown.query.vectors[place[with_image]], query, weight)
    return replace(shown, direction="it2i", query=replace(query, vectors=vectors))


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
