"""Two runs on the same queries: differences, their intervals and p-values, all over people and not over queries.

Queries of one person are alike, so a test that treats them as independent finds differences where there are none. Here
a person with all its queries is the unit that is drawn again (interval) or has its sign flipped (p-value).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.errors import DataError
from reidctl.metrics import METRICS, Interval, mean

Floats = npt.NDArray[np.float64]
People = Sequence[str] | npt.NDArray[np.object_]

GROUP = ("direction", "dataset", "condition")
COLUMNS = {"rank1": "rank1", "rank5": "rank5", "rank10": "rank10", "rank20": "rank20", "mAP": "average_precision"}
COLUMNS |= {"mINP": "inp"}
EXACT = 16  # up to so many people that differ, all sign patterns are enumerated
_EQUAL = 1e-12  # differences up to this are rounding
_CELLS = 2_000_000  # 16 MB of float64 at a time


@dataclass(frozen=True)
class Difference:
    """One metric of two runs on the same queries.

    Attributes:
        value: our mean over the scored queries.
        other: the other run's.
        difference: ours minus the other's.
        low: of the 95 % percentile interval of the difference, from resampling people.
        high: its upper end.
        p_value: two-sided, from flipping the sign of whole people's differences.
        queries: scored queries.
        people: how many people they belong to.
        better: queries on which ours is better.
        worse: queries on which it is worse.
        equal: queries without a difference.
    """

    value: float
    other: float
    difference: float
    low: float
    high: float
    p_value: float
    queries: int
    people: int
    better: int
    worse: int
    equal: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        differences: one row per metric of each (direction, dataset, condition): the fields of `Difference`.
        paired: rows of the table `paired`, one per query; empty values where a query has no match.
        left_out: (direction, dataset, condition) that only one of the runs has.
        differing: of each row of `differences`, the number of people whose queries differ in sum.
    """

    differences: pd.DataFrame
    paired: pd.DataFrame
    left_out: tuple[str, ...]
    differing: tuple[int, ...]


def compare(ours: pd.DataFrame, other: pd.DataFrame, *, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Return how two runs differ on the same queries, for every (direction, dataset, condition) that both have.

    Equal numbers of gallery items and of matches are checked for each query; that the galleries hold the same images
    cannot be seen here (`stages.against` compares the digests of the data). Rank-k that neither run has, because the
    gallery is smaller than k, is left out. The order of the rows does not matter. Text to image comes first, and of the
    conditions the standard one.

    Args:
        ours: rows of the table `queries`.
        other: rows of the other run's.
        seed: of the bootstrap and of the sign flips.
        resamples: number of each.

    Raises:
        DataError: nothing in common, a query that only one run has or that occurs twice, other people, other
            galleries, or a scored query without a value.
    """
    here, there = _grouped(ours), _grouped(other)
    common = sorted(set(here) & set(there), key=_place)
    if not common:
        raise DataError(f"The runs have no evaluation in common: {_names(here)} here, {_names(there)} there.")
    differences, paired, differing = [], [], []
    for group in common:
        where, name = dict(zip(GROUP, group, strict=True)), " ".join(group)
        _check_same(here[group], there[group], name)
        scored = (here[group]["matches"] > 0).to_numpy()
        mine, its = _values(here[group], scored), _values(there[group], scored)
        paired.append(_paired_rows(here[group], where, mine, its, scored))
        if not scored.any():
            continue
        metrics = _measured(mine, its, name)
        person = here[group]["person_id"].to_numpy(dtype=object)[scored]
        mine, its = ({metric: values[metric] for metric in metrics} for values in (mine, its))
        found = paired_differences(mine, its, person, seed=seed, resamples=resamples)
        differences += [{**where, "metric": metric, **vars(found[metric])} for metric in metrics]
        total, _ = _totals([mine[metric] - its[metric] for metric in metrics], person)
        differing += [int(count) for count in (np.abs(total) > _EQUAL).sum(axis=1)]
    if not differences:
        raise DataError("No query has a match, so there is nothing to compare.")
    left_out = tuple(" ".join(group) for group in sorted(set(here) ^ set(there)))
    return Comparison(pd.DataFrame(differences), pd.concat(paired, ignore_index=True), left_out, tuple(differing))


def paired_differences(
    ours: Mapping[str, Floats], other: Mapping[str, Floats], person: People, *, seed: int = 0, resamples: int = 10_000
) -> dict[str, Difference]:
    """Return the difference of every metric of `ours`, with intervals and p-values over people.

    Interval: percentiles of Σ_p w_p D_p / Σ_p w_p n_p over draws of as many people as there are, D_p the sum of a
    person's differences, n_p the number of its queries (the rule of `metrics.bootstrap_interval`). It is too narrow
    with few people: on simulated clustered data it covered the truth in 87 % of cases with 12 people, 95 % with 60
    (`tests/evaluation/test_paired.py`).

    p-value: the share of sign patterns s in {-1, 1}^people with |Σ_p s_p D_p| >= |Σ_p D_p|, all of them where at most
    16 people differ, else `resamples` random ones, (1 + hits) / (1 + resamples). It assumes no more than that people
    are independent and that, without a true difference, a person's D_p is as likely as -D_p. With k people that differ
    it cannot be below 2^(1 - k). No correction for testing several metrics is made.

    Args:
        ours: values per query, shape (Q,), by metric; no NaN.
        other: the other run's values of the same queries and metrics.
        person: the person of each query, shape (Q,).
        seed: the same seed gives the same result in any order of the queries.
        resamples: number of bootstrap samples and of random sign patterns.
    """
    assert len(person), "at least one query"
    gaps = {metric: ours[metric] - other[metric] for metric in ours}
    total, count = _totals(list(gaps.values()), person)
    drawn = np.quantile(_resampled_means(total, count, seed, resamples), [0.025, 0.975], axis=1)
    p_values = _sign_flips(total, seed=seed, resamples=resamples)
    return {
        metric: Difference(
            value=mean(ours[metric]),
            other=mean(other[metric]),
            difference=mean(gap),
            low=float(drawn[0, row]),
            high=float(drawn[1, row]),
            p_value=p_values[row],
            queries=len(gap),
            people=len(count),
            better=int((gap > _EQUAL).sum()),
            worse=int((gap < -_EQUAL).sum()),
            equal=int((np.abs(gap) <= _EQUAL).sum()),
        )
        for row, (metric, gap) in enumerate(gaps.items())
    }


def intervals_over_people(
    values: Mapping[str, Floats], person: People, *, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """Return the mean of every metric with its interval over people, all from the same draws.

    Bit for bit what `metrics.bootstrap_interval` returns for each of them, but the people are drawn once.

    Args:
        values: values per query, shape (Q,), by metric; no NaN.
        person: the person of each query, shape (Q,).
        seed: of the draws.
        resamples: number of bootstrap samples.
    """
    total, count = _totals(list(values.values()), person)
    drawn = np.quantile(_resampled_means(total, count, seed, resamples), [0.025, 0.975], axis=1)
    return {
        metric: Interval(mean(value), float(drawn[0, row]), float(drawn[1, row]))
        for row, (metric, value) in enumerate(values.items())
    }


def _totals(values: Sequence[Floats], person: People) -> tuple[Floats, Floats]:
    """Each person's sum of each metric, shape (M, P), and number of queries, shape (P,); people in order of ids."""
    _, code = np.unique(np.asarray(person, dtype=object).astype(str), return_inverse=True)
    count = np.bincount(code).astype(np.float64)
    total = np.empty((len(values), len(count)))
    for row, value in enumerate(values):
        # bincount adds in the given order: sorted values make the sum independent of the order of the queries.
        order = np.lexsort((value, code))
        total[row] = np.bincount(code[order], weights=value[order])
    return total, count


def _resampled_means(total: Floats, count: Floats, seed: int, resamples: int) -> Floats:
    """Means of each metric over draws of people with replacement, shape (M, resamples)."""
    people = len(count)
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(total), resamples))
    step = max(1, _CELLS // people)
    for begin in range(0, resamples, step):
        weight = rng.multinomial(people, np.full(people, 1 / people), size=min(step, resamples - begin))
        queries = (weight * count).sum(axis=1)
        for row, values in enumerate(total):
            drawn[row, begin : begin + step] = (weight * values).sum(axis=1) / queries
    return drawn


def _sign_flips(total: Floats, *, seed: int, resamples: int) -> list[float]:
    """The p-value of each metric, from its people's sums, shape (M, P)."""
    # A sum that equals the observed one in theory may differ in its last bits.
    least = np.abs(total.sum(axis=1)) - 1e-10 * np.abs(total).sum(axis=1)
    differing = (np.abs(total) > _EQUAL).sum(axis=1)
    hits = np.zeros(len(total), np.int64)
    many = np.flatnonzero(differing > EXACT)
    people = total.shape[1]
    # Not the stream of the bootstrap.
    rng = np.random.default_rng((seed, 1))
    step = max(1, _CELLS // people)
    for begin in range(0, resamples if len(many) else 0, step):
        flipped = rng.random((min(step, resamples - begin), people)) < 0.5
        for row in many:
            hits[row] += (np.abs(np.where(flipped, -total[row], total[row]).sum(axis=1)) >= least[row]).sum()
    return [
        (1 + int(hits[row])) / (1 + resamples)
        if differing[row] > EXACT
        else _every_sign(total[row][np.abs(total[row]) > _EQUAL], float(least[row]))
        for row in range(len(total))
    ]


def _every_sign(sums: Floats, least: float) -> float:
    """The share of all sign patterns whose sum is at least `least` in size."""
    if not len(sums):
        return 1.0
    # A pattern and its opposite give the same size, so the last sign stays.
    pattern = np.arange(2 ** (len(sums) - 1))[:, None] >> np.arange(len(sums)) & 1
    return float((np.abs(np.where(pattern, -sums, sums).sum(axis=1)) >= least).mean())


def _grouped(frame: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """The queries of each (direction, dataset, condition), sorted by id."""
    found: dict[tuple[str, ...], pd.DataFrame] = {}
    for group, rows in frame.groupby(list(GROUP), observed=True):
        name = tuple(str(part) for part in group)
        twice = rows["query_id"][rows["query_id"].duplicated()]
        if len(twice):
            raise DataError(f"{' '.join(name)}: query `{twice.iloc[0]}` occurs more than once.")
        found[name] = rows.sort_values("query_id", kind="stable").reset_index(drop=True)
    return found


def _place(group: tuple[str, ...]) -> tuple[int, str, bool, str]:
    """Where a (direction, dataset, condition) stands in a table."""
    direction, dataset, condition = group
    known = ("t2i", "i2i", "it2i")
    return known.index(direction) if direction in known else len(known), dataset, condition != "standard", condition


def _names(groups: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(" ".join(group) for group in sorted(groups)) or "nothing"


def _check_same(ours: pd.DataFrame, other: pd.DataFrame, where: str) -> None:
    """Refuse two evaluations that do not ask the same queries of the same gallery; both are sorted by id."""
    here, there = set(ours["query_id"]), set(other["query_id"])
    if here != there:
        example = min(here ^ there)
        raise DataError(
            f"{where}: not the same queries: {len(here - there):,} are only here and {len(there - here):,} only in "
            f"the other run, e.g. `{example}`.",
            hint="Evaluate both runs on the same split of the same data, with the same --query.",
        )
    for columns, message in (
        (["person_id"], "not the same people"),
        (["matches", "gallery"], "not the same gallery or protocol"),
    ):
        differ = np.flatnonzero((ours[columns].to_numpy() != other[columns].to_numpy()).any(axis=1))
        if len(differ):
            one, two = (frame.iloc[differ[0]] for frame in (ours, other))
            facts = "; ".join(f"{name} {one[name]} here, {two[name]} there" for name in columns)
            raise DataError(
                f"{where}: {message} in {len(differ):,} of {len(ours):,} queries, e.g. `{one['query_id']}`: {facts}.",
                hint="Evaluate both runs on the same data with this version of reidctl.",
            )


def _measured(ours: Mapping[str, Floats], other: Mapping[str, Floats], where: str) -> list[str]:
    """The metrics that both runs have a value of for every scored query."""
    found = []
    for metric in METRICS:
        lacking = [np.isnan(values[metric]) for values in (ours, other)]
        # Rank-k of a gallery with fewer than k images is empty for every query.
        if all(empty.all() for empty in lacking):
            continue
        if any(empty.any() for empty in lacking):
            raise DataError(f"{where}: a query with a match has no {metric}.", hint="Run `reidctl evaluate` again.")
        found.append(metric)
    return found


def _values(frame: pd.DataFrame, scored: npt.NDArray[np.bool_]) -> dict[str, Floats]:
    """The values of the scored queries by metric."""
    found = {metric: frame[column].to_numpy(np.float64)[scored] for metric, column in COLUMNS.items()}
    return found | {"rSum": found["rank1"] + found["rank5"] + found["rank10"]}


def _paired_rows(
    frame: pd.DataFrame,
    where: Mapping[str, str],
    ours: Mapping[str, Floats],
    other: Mapping[str, Floats],
    scored: npt.NDArray[np.bool_],
) -> pd.DataFrame:
    rows: dict[str, Any] = {"query_id": frame["query_id"], "person_id": frame["person_id"]}
    for metric, column in COLUMNS.items():
        rows[f"{column}_difference"] = np.full(len(frame), np.nan)
        rows[f"{column}_difference"][scored] = ours[metric] - other[metric]
    return pd.DataFrame(rows).assign(**where)
