"""Evaluation after k-reciprocal re-ranking, named by its parameters because their numbers are not comparable.

All queries are re-ranked together, as in every published table: the result of a query then depends on the other
queries (it is transductive), which a search engine answering one query at a time does not have. `caveats` says
so for the record. There is no option to take each query alone, because nobody reports it and it would repeat the
neighbour search of the whole gallery per query; evaluate a protocol with one query for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from reidctl.evaluation.protocols import Evaluation, Protocol, check_cutoffs, evaluation_of, rank_by
from reidctl.metrics import CUTOFFS
from reidctl.retrieval.rerank import KReciprocal, Parameters


def condition_of(parameters: Parameters, condition: str = "standard") -> str:
    """Return the condition's name after re-ranking, e.g. `rerank-20/6/0.3`, behind that of degraded queries if any."""
    name = f"rerank-{parameters.name}"
    return name if condition == "standard" else f"{condition}+{name}"


def caveats(protocol: Protocol, parameters: Parameters) -> list[str]:
    """Return what a reader of the numbers must know, one sentence each."""
    found = [
        f"Re-ranking {parameters.name} is transductive: the neighbours of {len(protocol.query)} queries and "
        f"{len(protocol.gallery)} gallery items decide together, so a query's result depends on the other queries."
    ]
    if protocol.direction == "t2i":
        found.append(
            "Re-ranking text queries compares captions with captions and images with images too; where these "
            "similarities are higher than those between text and image, the neighbours of a caption are captions."
        )
    return found


def evaluate_reranked(
    protocol: Protocol,
    parameters: Parameters,
    *,
    top: int = 50,
    seed: int = 0,
    resamples: int = 1000,
    cutoffs: Sequence[int] | None = None,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Re-rank, score and summarise a protocol; the frames are those of `protocols.evaluate`.

    The condition is that of `condition_of`. Items that the protocol drops from a query's ranking (the same person in
    the same camera, say) do take part as neighbours, as in the published evaluators. In `rankings`, `score` is the
    negative re-ranked distance, in [-1, 0].

    Args:
        protocol: who is searched among whom; vectors must be unit vectors.
        parameters: see `retrieval.rerank`.
        top: how many items of each ranking to keep.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        cutoffs: see `protocols.evaluate`.
        device: where products are computed.
        advance: called with the number of queries after each block.

    Raises:
        DataError: see `retrieval.rerank.KReciprocal` and `protocols.check_cutoffs`.
        UsageError: a cutoff below 1.
    """
    check_cutoffs(protocol, cutoffs or ())
    query, gallery = protocol.query, protocol.gallery
    reranked = KReciprocal(
        query.vectors, gallery.vectors, parameters, query_id=query.item, gallery_id=gallery.item, device=device
    )
    near = lambda rows: -reranked.distances(rows)  # noqa: E731
    ranking = rank_by(protocol, near, top=top, cutoffs=cutoffs or CUTOFFS, advance=advance)
    named = replace(protocol, condition=condition_of(parameters, protocol.condition))
    return evaluation_of(named, ranking, seed=seed, resamples=resamples)
