"""Single-shot galleries: one random image of each person, several times, as PRCC, VIPeR and CUHK03 were published."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from reidctl.datasets.identities import DISTRACTORS
from reidctl.errors import UsageError
from reidctl.evaluation.protocols import Evaluation, Protocol, Side, check_cutoffs, evaluation_of, rank
from reidctl.metrics import CUTOFFS, QueryMetrics
from reidctl.retrieval.exact import Ranking

Rows = npt.NDArray[np.int64]


def single_shot(
    protocol: Protocol,
    *,
    trials: int = 10,
    seed: int = 0,
    top: int = 50,
    cutoffs: Sequence[int] | None = None,
    resamples: int = 1000,
    device: str = "cpu",
) -> Evaluation:
    """Evaluate with one random gallery image per person in each trial; a query's metrics are the means over trials.

    The condition is `single-shot`, or `single-shot-cloth-changing` and so on. For PRCC, `cloth-changing` scores the
    queries of camera C and `same-clothes` those of camera B, each against one image per person from camera A, 10 draws:
    the protocol of Yang et al. 2019 (PRCC), whose tables give the mean rank-k over 10 draws. With one match per query
    AP = INP = 1 / rank. Numbers of papers that search the whole of camera A (multi-shot, as CAL's code does) are those
    of `evaluate`, not of this.

    Where the gallery is one camera (PRCC's A, VIPeR's b) nothing else needs deciding. Elsewhere a trial in which a
    person's only image is dropped for a query (same camera) does not count for this query. torchreid's `eval_cuhk03`
    draws anew for each query, among what is not dropped: the same expectation where the gallery is one camera.

    Images under a common distractor id (Market-1501's 0000) are different people and all stay. Intervals are over
    people and take the draws as given. `rankings` are those of the first trial, and so is `ranking.index`, whose
    rows are the protocol's. A draw depends on the ids and the seed, not on the order of rows.

    Args:
        protocol: image-to-image, or any other with several gallery images per person.
        trials: how many galleries are drawn.
        seed: of the draws and of the bootstrap.
        top: see `evaluate`.
        cutoffs: see `evaluate`; a single-shot gallery has as many images as people.
        resamples: of the bootstrap.
        device: where to compute.

    Raises:
        UsageError: no trial.
        DataError: see `evaluate`.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials cannot be averaged.", hint="The published number is 10.")
    draws = [_draw(protocol.gallery, np.random.default_rng((seed, trial))) for trial in range(trials)]
    name = "single-shot" if protocol.condition == "standard" else f"single-shot-{protocol.condition}"
    parts = [replace(protocol, condition=name, gallery=protocol.gallery.select(rows)) for rows in draws]
    check_cutoffs(parts[0], cutoffs or ())
    rankings = [rank(part, top=top, cutoffs=cutoffs or CUTOFFS, device=device) for part in parts]
    joined = replace(rankings[0], queries=_mean([ranking.queries for ranking in rankings]))
    found = evaluation_of(parts[0], joined, seed=seed, resamples=resamples)
    return replace(found, ranking=_of_whole_gallery(joined, draws[0]))


def _draw(gallery: Side, rng: np.random.Generator) -> Rows:
    """Rows of one gallery, ascending: one of each person, and all distractors."""
    order = np.lexsort((gallery.item.astype(str), gallery.person.astype(str)))
    _, first, count = np.unique(gallery.person[order].astype(str), return_index=True, return_counts=True)
    chosen = order[first + rng.integers(count)]
    nobody = np.array([person in DISTRACTORS for person in gallery.person], bool)
    return np.sort(np.concatenate([chosen[~nobody[chosen]], np.flatnonzero(nobody)]))


def _mean(trials: Sequence[QueryMetrics]) -> QueryMetrics:
    """The mean over the trials in which a query has a match."""
    scored = np.sum([trial.valid for trial in trials], axis=0)

    def mean(values: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        return np.asarray(np.nansum(values, axis=0) / np.where(scored, scored, np.nan), np.float64)

    return QueryMetrics(
        matches=np.max([trial.matches for trial in trials], axis=0),
        first_match=mean([trial.first_match for trial in trials]),
        average_precision=mean([trial.average_precision for trial in trials]),
        inp=mean([trial.inp for trial in trials]),
        hits={k: mean([trial.hits[k] for trial in trials]) for k in trials[0].hits},
    )


def _of_whole_gallery(ranking: Ranking, rows: Rows) -> Ranking:
    return replace(ranking, index=np.where(ranking.index < 0, -1, rows[ranking.index]))
