"""Alarms that a training history can raise: the failures that HPL's readers expect, as rules with stated thresholds.

A threshold is a choice of ours, made so that planted failures raise the alarm and healthy trainings do not
(tests/evaluation/test_alarms.py); an alarm says what was measured, so that nobody has to believe the threshold.
"""

import math
from collections.abc import Callable

import pandas as pd

COSINE = -0.2
"""Mean cosine of the tasks' gradients below which they are called opposed."""
LOST = 0.15
"""Share of its best validation value that a task may lose while the other keeps nine tenths of its own."""
DIVERSITY = 0.02
"""Share of a pseudo-token's length that depends on the input, below which it is called constant."""
SHRUNK = 0.5
"""Share of the first epoch's diversity below which, with equal pairs, the regularisation is called too strong."""
EQUAL = 0.1
"""Distance of a pair's pseudo-tokens over their length, below which they are called equal."""


def alarms(history: pd.DataFrame) -> list[str]:
    """Return one sentence for each alarm that a training raises; none for methods that log nothing of the kind.

    Args:
        history: rows of the table `history`.
    """
    return [alarm for rule in ALARMS.values() if (alarm := rule(history)) is not None]


def interference(history: pd.DataFrame) -> str | None:
    """Say whether the two tasks hurt each other: opposed gradients, or one validation curve falls under the other.

    Fires where the mean `task_cosine` of the last epoch is below -0.2, or where it is below 0 and one task ends 15 % or
    more below its best validation rank-1 while the other ends within 10 % of its own. A falling curve alone is
    overfitting.
    """
    cosine = _of_epochs(history, "task_cosine")
    if not len(cosine) or cosine.iloc[-1] >= 0:
        return None
    if cosine.iloc[-1] < COSINE:
        return (
            f"Task interference: the gradients of the two tasks at the shared weight oppose each other (mean cosine "
            f"{cosine.iloc[-1]:.2f} in the last epoch)."
        )
    curves = {"text to image": _curve(history, "rank1"), "image to image": _curve(history, "i2i.rank1")}
    lost = {task: 1 - curve.iloc[-1] / curve.max() for task, curve in curves.items() if len(curve) and curve.max() > 0}
    if len(lost) == 2:
        worse, better = sorted(lost, key=lambda task: -lost[task])
        if lost[worse] >= LOST and lost[better] <= 0.1:
            return (
                f"Task interference: validation rank-1 of {worse} ended {100 * lost[worse]:.0f} % below its best epoch "
                f"while {better} kept its own."
            )
    return None


def collapse(history: pd.DataFrame) -> str | None:
    """Say whether the pseudo-tokens no longer depend on the input: diversity below 0.02 in the last epoch."""
    found = _of_epochs(history, "pseudo/diversity")
    if not len(found) or found.iloc[-1] >= DIVERSITY:
        return None
    return (
        f"Pseudo-token collapse: only {100 * found.iloc[-1]:.2f} % of their length depends on the image "
        "(the inversion network gives nearly the same tokens to everybody)."
    )


def over_regularisation(history: pd.DataFrame) -> str | None:
    """Say whether CMPR made prompts equal at the price of what they say.

    Fires where pairs are equal (distance below 0.1 of their length) and diversity fell below half of the first epoch's.
    """
    varied, apart = _of_epochs(history, "pseudo/diversity"), _of_epochs(history, "pseudo/mismatch")
    if not len(varied) or not len(apart) or math.isclose(varied.iloc[0], 0.0):
        return None
    shrunk = varied.iloc[-1] / _first(history, "pseudo/diversity")
    if apart.iloc[-1] >= EQUAL or shrunk >= SHRUNK:
        return None
    return (
        f"Over-regularisation by CMPR: the pseudo-tokens of image and text differ by {100 * apart.iloc[-1]:.1f} % of "
        f"their length, and their diversity fell to {100 * shrunk:.0f} % of what it was at first."
    )


ALARMS: dict[str, Callable[[pd.DataFrame], str | None]] = {
    "interference": interference,
    "collapse": collapse,
    "over_regularisation": over_regularisation,
}


def _of_epochs(history: pd.DataFrame, name: str) -> pd.Series:
    """The mean of a logged number in each epoch, in order."""
    rows = history[history["name"] == name] if len(history) else history
    return rows.groupby("epoch")["value"].mean().sort_index() if len(rows) else pd.Series(dtype=float)


def _first(history: pd.DataFrame, name: str) -> float:
    """The first value of a logged number."""
    rows = history[history["name"] == name].sort_values("step", kind="stable")
    return float(rows["value"].iloc[0])


def _curve(history: pd.DataFrame, name: str) -> pd.Series:
    """A validation metric by epoch."""
    if not len(history):
        return pd.Series(dtype=float)
    rows = history[(history["name"] == name) & (history["split"] != "train")]
    return rows.sort_values("epoch")["value"].reset_index(drop=True)
