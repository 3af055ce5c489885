"""What a study says of a claim: holds, does not hold, or undecided, from paired differences over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from scipy import stats

from reidctl.config import Section

Verdict = Literal["holds", "does not hold", "undecided"]
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""condition -> seed -> measure -> value."""

LEVEL = 0.95


class Claim(Section):
    """One sentence and how it is tested; exactly one of `more`, `less` and `of` is given.

    Attributes:
        say: the sentence.
        measure: what is compared, a dotted name of a measured value.
        more: the condition that the sentence says is higher in `measure`.
        less: the condition that it says is lower.
        of: the condition whose own value the sentence bounds by `at_most`.
        than: the condition it is compared with; default: the same one (then `versus` must be another measure).
        versus: the measure of `than`; default: `measure`.
        at_most: with `of`, the largest value under which the sentence is true.
        matters: the smallest difference worth naming. A difference that is surely smaller counts as none. It has the
            unit of the measure and is fixed before anything is measured.
    """

    say: str = Field(min_length=1)
    measure: str = Field(min_length=1)
    more: str | None = None
    less: str | None = None
    of: str | None = None
    than: str | None = None
    versus: str | None = None
    at_most: float | None = None
    matters: float = Field(0.01, ge=0)

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        if sum(name is not None for name in (self.more, self.less, self.of)) != 1:
            raise ValueError("a claim names exactly one of `more`, `less` and `of`")
        if (self.of is None) != (self.at_most is None):
            raise ValueError("`of` and `at_most` belong together")
        if self.of is not None and (self.than is not None or self.versus is not None):
            raise ValueError("`of` compares with a number, not with a condition")
        if self.of is None and self.than is None and self.versus in (None, self.measure):
            raise ValueError("a comparison needs `than` (another condition) or `versus` (another measure)")
        return self

    @property
    def subject(self) -> str:
        """The condition that the sentence is about."""
        return self.more or self.less or self.of or ""

    @property
    def needs(self) -> list[tuple[str, str]]:
        """(condition, measure) of every value that the test reads."""
        if self.of is not None:
            return [(self.of, self.measure)]
        return [(self.subject, self.measure), (self.than or self.subject, self.versus or self.measure)]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        values: one per seed, in order of the seeds.
        mean: of the values.
        std: with n - 1; NaN for one value.
        low, high: Student's 95 % interval of the mean; infinite for one value.
    """

    values: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float

    @property
    def p_value(self) -> float:
        """Two-sided p of Student's t-test against 0; 1 where it cannot be computed."""
        count = len(self.values)
        if count < 2:
            return 1.0
        if self.std == 0:
            return 0.0 if self.mean else 1.0
        return float(2 * stats.t.sf(abs(self.mean) / (self.std / math.sqrt(count)), count - 1))


@dataclass(frozen=True)
class Judgement:
    """A claim and what the seeds say about it.

    Attributes:
        claim: what was tested.
        effect: how far the sentence is true: difference in the claimed direction, or the value itself for `at_most`.
        seeds: the seeds that have every value.
        verdict: see `judge`.
        reason: why, in words.
    """

    claim: Claim
    effect: Estimate | None
    seeds: tuple[int, ...]
    verdict: Verdict
    reason: str


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, standard deviation and Student's 95 % interval of independent values.

    mean ± t_{0.975, n-1} std / sqrt(n). With three seeds t is 4.30, so only differences of more than about 2.5
    standard deviations of the seeds can be told from 0.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("an estimate needs at least one value")
    kept = tuple(float(value) for value in values)
    mean = math.fsum(kept) / len(kept)
    if len(kept) == 1:
        return Estimate(kept, mean, math.nan, -math.inf, math.inf)
    std = float(np.std(kept, ddof=1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(kept) - 1)) * std / math.sqrt(len(kept))
    return Estimate(kept, mean, std, mean - half, mean + half)


def judge(claim: Claim, values: Values, seeds: Sequence[int]) -> Judgement:
    """Return whether a claim holds, over the seeds for which everything was measured.

    Comparison: d_s = (value of the subject - value of the other) of seed s, negated for `less`; both conditions of a
    seed share data and seed. With the 95 % interval [low, high] of the mean of d: `holds` if low > 0; `does not hold`
    if high < `matters`, so if the difference is the other way round or surely too small to matter; else `undecided`.
    Bound: `holds` if high <= `at_most`, `does not hold` if low > `at_most`, else `undecided`.

    Where the values know chance in the measure, a comparison of two conditions whose means are both below twice chance
    stays `undecided` instead of `does not hold`.

    Args:
        claim: what to test.
        values: condition -> seed -> measure -> value.
        seeds: the study's seeds.
    """
    found = {seed: [values.get(name, {}).get(seed, {}).get(measure) for name, measure in claim.needs] for seed in seeds}
    whole = {seed: [float(v) for v in row if v is not None and not math.isnan(v)] for seed, row in found.items()}
    whole = {seed: row for seed, row in whole.items() if len(row) == len(claim.needs)}
    if not whole:
        return Judgement(claim, None, (), "undecided", f"{_unmeasured(claim, values, seeds)} was not measured")
    if claim.of is not None:
        effect = estimate([row[0] for row in whole.values()])
    else:
        sign = 1.0 if claim.more is not None else -1.0
        effect = estimate([sign * (row[0] - row[1]) for row in whole.values()])
    verdict, reason = _decide(claim, effect)
    if verdict == "does not hold" and _at_chance(claim, values, tuple(whole)):
        # Models that learnt nothing are equal too; that says nothing about what distinguishes them.
        verdict, reason = "undecided", "neither condition is clearly above chance"
    return Judgement(claim, effect, tuple(whole), verdict, reason)


def _decide(claim: Claim, effect: Estimate) -> tuple[Verdict, str]:
    if len(effect.values) < 2:
        return "undecided", "one seed has no interval"
    if claim.at_most is not None:
        if effect.high <= claim.at_most:
            return "holds", f"the whole interval is at most {claim.at_most:g}"
        if effect.low > claim.at_most:
            return "does not hold", f"the whole interval is above {claim.at_most:g}"
        return "undecided", f"the interval contains {claim.at_most:g}"
    if effect.low > 0:
        return "holds", "the whole interval is on the claimed side"
    if effect.high < 0:
        return "does not hold", "the whole interval is on the other side"
    if effect.high < claim.matters:
        return "does not hold", "a difference that matters is excluded"
    return "undecided", "the interval contains no difference and one that matters"


def _at_chance(claim: Claim, values: Values, seeds: Sequence[int]) -> bool:
    for name, measure in claim.needs:
        rows = [values[name][seed] for seed in seeds]
        key = next((key for key in _names_of_chance(measure) if key in rows[0]), None)
        if key is None or math.fsum(row[measure] for row in rows) > 2 * math.fsum(row[key] for row in rows):
            return False
    return True


def _names_of_chance(measure: str) -> list[str]:
    """What chance may be called: of the measure, of its dataset (`other.chance.t2i.mAP`), of its direction."""
    parts = measure.split(".")
    placed = [".".join([*parts[:at], "chance", *parts[at:]]) for at in range(len(parts))]
    return [*placed, ".".join(["chance", *parts[-2:]])]


def _unmeasured(claim: Claim, values: Values, seeds: Sequence[int]) -> str:
    for name, measure in claim.needs:
        if not any(measure in values.get(name, {}).get(seed, {}) for seed in seeds):
            return f"{measure} of {name}"
    return claim.measure


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979): the i-th smallest times (m - i), made monotone, at most 1.

    Args:
        p_values: in [0, 1], m of them.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
