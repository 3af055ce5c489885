"""How much two features of the same images depend on each other, beside features of exchanged people.

HSIC and CKA are never 0 on a finite number of images, and they grow with the width of the features: the number to
compare with is the same measure after the rows of one side were exchanged. Two gated features f_id = g ⊙ a and
f_clo = (1 - g) ⊙ b share the gate g, which couples them even if a and b are independent: read the ungated pair beside.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reidctl import losses

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.object_]

PERMUTATIONS = 200
FEWEST_PEOPLE = 5  # 120 orders; fewer people cannot be told from chance
MEASURES = ("hsic-linear", "hsic-linear-unit", "cka-linear", "cka-rbf")


@dataclass(frozen=True)
class Dependence:
    """One measure and what it is when the people of one side are exchanged.

    Attributes:
        value: on rows that belong together.
        control: mean over permutations.
        control_high: the 95th percentile over permutations.
        p_value: (1 + permutations that reach the value) / (1 + permutations), one-sided.
    """

    value: float
    control: float
    control_high: float
    p_value: float


def dependence(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    person: Labels,
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> dict[str, Dependence]:
    """Return `MEASURES` of two features of the same images, by name, in float64.

    `hsic-linear`: squared Frobenius norm of the cross-covariance, in (units of a · units of b)²; `hsic-linear-unit`:
    the same of rows scaled to length 1, which is what `bdam` trains by default; `cka-linear` = hsic(a, b) /
    √(hsic(a, a) hsic(b, b)), in [0, 1]; `cka-rbf` likewise with the kernel exp(-d² / 2σ²), σ² the median of d² over
    pairs. The linear ones see linear relations alone. See `losses.hsic`.

    A permutation gives all images of a person the rows of another person, in random order. Exchanging single images
    would call any two features dependent that are alike within people, even if no person's one feature tells anything
    about the other. Where people have different numbers of images, rows of `b` repeat in a permutation.

    Args:
        a: shape (N, D_a).
        b: shape (N, D_b); row i belongs to row i of `a`.
        person: shape (N,).
        seed: of the permutations.
        permutations: how many.
    """
    left, right = (torch.from_numpy(np.asarray(side, np.float64)) for side in (a, b))
    values = {
        "hsic-linear": float(losses.hsic(left, right, normalize="none")),
        "hsic-linear-unit": float(losses.hsic(left, right, normalize="l2")),
        "cka-linear": float(losses.hsic(left, right, normalize="cka")),
        "cka-rbf": float(losses.hsic(left, right, kernel="rbf", normalize="cka")),
    }
    orders = exchanged_rows(person, seed=seed, permutations=permutations)
    unit = [torch.nn.functional.normalize(side, dim=1) for side in (left, right)]
    raw = _permuted(_linear(left), _linear(right), orders)
    rbf = _permuted(_rbf(left), _rbf(right), orders)
    shuffled = {
        "hsic-linear": raw,
        "hsic-linear-unit": _permuted(_linear(unit[0]), _linear(unit[1]), orders),
        "cka-linear": raw / _scale(_linear(left), _linear(right)),
        "cka-rbf": rbf / _scale(_rbf(left), _rbf(right)),
    }
    return {name: _compared(values[name], shuffled[name]) for name in MEASURES}


def exchanged_rows(person: Labels, *, seed: int = 0, permutations: int = PERMUTATIONS) -> list[npt.NDArray[np.int64]]:
    """Return row numbers (N,) for each permutation: every image gets a row of the person that its person drew.

    People draw from all people, so one may draw itself; its images are in random order then too.
    """
    people, code = np.unique(person.astype(str), return_inverse=True)
    rows = [np.flatnonzero(code == number) for number in range(len(people))]
    orders = []
    for number in range(permutations):
        rng = np.random.default_rng((seed, 34, number))
        order = np.empty(len(person), np.int64)
        for own, other in enumerate(rng.permutation(len(people))):
            order[rows[own]] = np.resize(rng.permutation(rows[other]), len(rows[own]))
        orders.append(order)
    return orders


def _compared(value: float, shuffled: Floats) -> Dependence:
    # Rounding must not make a difference between permutations that change nothing.
    reached = (shuffled >= value - 1e-9 * abs(value)).sum()
    return Dependence(
        value,
        float(shuffled.mean()),
        float(np.quantile(shuffled, 0.95)),
        float((1 + reached) / (1 + len(shuffled))),
    )


def _linear(x: torch.Tensor) -> Floats:
    x = x - x.mean(dim=0)
    return np.asarray((x @ x.T).numpy())


def _rbf(x: torch.Tensor) -> Floats:
    squared = torch.cdist(x, x) ** 2
    rows, columns = torch.triu_indices(len(x), len(x), offset=1)
    width = squared[rows, columns].median().clamp(min=torch.finfo(x.dtype).eps)
    return np.asarray((-squared / (2 * width)).exp().numpy())


def _centred(kernel: Floats) -> Floats:
    kernel = kernel - kernel.mean(axis=0, keepdims=True)
    return np.asarray(kernel - kernel.mean(axis=1, keepdims=True))


def _scale(a: Floats, b: Floats) -> float:
    """√(hsic(a, a) hsic(b, b)), not below the smallest number that can be divided by."""
    own = [float((_centred(kernel) * kernel).sum()) / (len(kernel) - 1) ** 2 for kernel in (a, b)]
    return float(np.sqrt(max(own[0] * own[1], np.finfo(np.float64).tiny)))


def _permuted(a: Floats, b: Floats, orders: list[npt.NDArray[np.int64]]) -> Floats:
    """HSIC of two kernel matrices with the second one's rows and columns exchanged, for each order."""
    centred, count = _centred(a), len(a)
    return np.array([np.vdot(centred, b[np.ix_(order, order)]) / (count - 1) ** 2 for order in orders])
