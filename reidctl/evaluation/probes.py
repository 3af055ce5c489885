"""What a linear classifier can read from features: attributes of people it never saw, and who they are.

A probe that succeeds shows that the information is there and linearly readable, not that retrieval uses it; one that
fails shows that this classifier did not find it in this many images. Every probe is therefore read beside its control:
the same procedure, choice of regularisation included, on labels that belong to somebody else.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.metrics import Interval, bootstrap_interval

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.object_]
Mask = npt.NDArray[np.bool_]

STRENGTHS = (1.0, 10.0, 100.0)
"""Regularisations to choose from: C times the number of training images, C as scikit-learn counts it."""
_UNDECIDED = 10.0  # where the training half is too small to choose
PERMUTATIONS = 3
FEWEST_PEOPLE = 8  # below, half of them teach a probe nothing
MOST_VALUES = 20  # an attribute with more values is a description, not a class
_PER_VALUE = 2  # people (families) with a value: one on each side
_SKEWED = 1.5  # times the share that equally frequent values would have

_BODY = ("gender", "age", "build", "stature", "skin", "hair_length", "hair_colour", "hair", "beard")
_CLOTHING = ("upper", "lower", "shoe", "boots", "sleeve", "dress", "hat", "outfit_colour")
SENSITIVE = frozenset({"skin", "ethnicity", "race"})
# Who somebody is or where a row is from, under another name.
_BOOKKEEPING = frozenset({"outfit", "true_person", "clone_of", "clone_kind", "domain", "carried_at", "occluded_share"})


@dataclass(frozen=True)
class Probe:
    """How often a probe is right on people (or images) that it was not fitted on.

    Attributes:
        accuracy: share of images, with a 95 % interval from resampling people.
        control: the accuracy of the same procedure on labels that were exchanged, mean over permutations.
        chance: the share of the most frequent label (attributes), or 1 / people (identity).
        balanced: mean over the values of the share of their images that is right; None if no value prevails.
        balanced_control: likewise on exchanged labels; NaN if no value prevails.
        right: of each image, 1 if it is right, in [0, 1], shape (N,).
        control_right: of each image, how often the control is right.
        person: of each image, shape (N,).
        family: who is drawn together by the bootstrap, shape (N,).
        classes: number of values.
    """

    accuracy: Interval
    control: float
    chance: float
    balanced: Interval | None
    balanced_control: float
    right: Floats
    control_right: Floats
    person: Labels
    family: Labels
    classes: int

    @property
    def images(self) -> int:
        """How many images were asked about."""
        return len(self.right)

    @property
    def people(self) -> int:
        """How many people they show."""
        return len(set(self.person))


def group_of(attribute: str) -> str:
    """Return `body`, `clothing` or `other`: what kind of thing an attribute says, by its name."""
    if attribute in _BODY:
        return "body"
    return "clothing" if attribute.startswith(_CLOTHING) else "other"


def attribute_labels(
    images: pd.DataFrame, family: Labels, *, sensitive: bool = False
) -> tuple[dict[str, Labels], list[str]]:
    """Return the labels of each attribute that can be probed, shape (N,), None where unknown, and those that cannot.

    An attribute can be probed with 2 to 20 values on at least 8 families. Values in fewer than 2 become unknown: they
    cannot be on both sides. An empty text is unknown too. Left out are ids under another name (`outfit`,
    `clone_of`, ...) and, unless `sensitive`, skin and ethnicity.

    Args:
        images: rows of the table `images`.
        family: whose image each is, look-alikes being one family, shape (N,).
        sensitive: also skin and ethnicity.
    """
    column = images["attributes"] if "attributes" in images else [None] * len(images)
    known: list[Mapping[str, str]] = [row if isinstance(row, dict) else {} for row in column]
    hidden = _BOOKKEEPING | (frozenset() if sensitive else SENSITIVE)
    names = [name for name in dict.fromkeys(name for row in known for name in row) if name not in hidden]
    found: dict[str, Labels] = {}
    left_out = []
    for name in names:
        label = np.array([row.get(name) or None for row in known], dtype=object)
        people = pd.DataFrame({"label": label, "family": family}).dropna().drop_duplicates()
        frequent = people["label"].value_counts()
        kept = set(frequent.index[frequent >= _PER_VALUE])
        people = people[people["label"].isin(kept)]
        if 2 <= len(kept) <= MOST_VALUES and people["family"].nunique() >= FEWEST_PEOPLE:
            found[name] = np.array([value if value in kept else None for value in label], dtype=object)
        else:
            left_out.append(name)
    return found, left_out


def probe_attribute(
    features: npt.NDArray[Any],
    label: Labels,
    person: Labels,
    *,
    family: Labels | None = None,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> Probe:
    """Return how well a linear probe reads an attribute of people that it was not fitted on.

    Multinomial logistic regression with an L2 penalty on standardised features, fitted on the images of half of the
    people and tested on the other half, both ways. The halves hold every value alike as far as possible. Statistics of
    the features and the strength of the penalty (of `STRENGTHS`, fitted on one half of the training people and judged
    by the accuracy on the other, ties to the strongest) come from training images alone.

    The control exchanges the labels between people (all images of a person get the labels of another one) and does all
    of it again, so it keeps how the images of a person share their labels.

    Args:
        features: shape (N, D).
        label: one value per image, none missing, shape (N,).
        person: shape (N,).
        family: who is never on both sides, exchanges labels and is drawn by the bootstrap together, such as
            look-alikes; default: everybody alone. An image of a look-alike in the same clothes on the other side would
            answer for what the feature knows about bodies.
        seed: of the halves, the permutations and the bootstrap.
        permutations: how many controls the mean is taken over.
    """
    from threadpoolctl import threadpool_limits

    family = person if family is None else family
    features = np.asarray(features, np.float64)
    shuffled = []
    # Hundreds of fits of milliseconds: threads make them several times slower.
    with threadpool_limits(1):
        right = _right(features, label, family, np.random.default_rng((seed, 31)))
        for number in range(permutations):
            rng = np.random.default_rng((seed, 32, number))
            exchanged = labels_of_others(label, person, rng, family=family)
            shuffled.append((exchanged, _right(features, exchanged, family, rng)))
    values, counts = np.unique(label.astype(str), return_counts=True)
    skewed = counts.max() / len(label) > _SKEWED / len(values)
    return Probe(
        accuracy=bootstrap_interval(right, family, seed=seed),
        control=float(np.mean([hit.mean() for _, hit in shuffled])),
        chance=float(counts.max() / len(label)),
        balanced=_balanced(right, label, family, seed) if skewed else None,
        balanced_control=float(np.mean([_recall(hit, given) for given, hit in shuffled])) if skewed else np.nan,
        right=right,
        control_right=np.mean([hit for _, hit in shuffled], axis=0),
        person=person,
        family=family,
        classes=len(values),
    )


def probe_identity(
    features: npt.NDArray[Any],
    person: Labels,
    place: Labels,
    *,
    strict: bool = False,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> Probe | None:
    """Return how often the nearest class mean of other images names the person; None with fewer than 2 such people.

    Images of a person are divided by `place` (camera, or outfit): class means come from one part, questions from the
    other, both ways, Euclidean distance of features standardised on the first part; people equally near share the vote.
    The control exchanges the labels of single images in the first part.

    Identity is no leak by itself: in a dataset where everybody wears one outfit, outfits name people, and a perfect
    clothing feature does too. Only `place` = outfit, where people own several, asks for more than the clothes.

    Args:
        features: shape (N, D).
        person: shape (N,).
        place: what the parts of a person's images differ in, shape (N,).
        strict: leave out people with a single place; else their images are divided in turn.
        seed: of the permutations and the bootstrap.
        permutations: how many controls the mean is taken over.
    """
    half = _halves_of_images(person, place, strict=strict)
    kept = half >= 0
    person, half, features = person[kept], half[kept], np.asarray(features, np.float64)[kept]
    people, code = np.unique(person.astype(str), return_inverse=True)
    if len(people) < 2:
        return None
    right = _nearest(features, code, half)
    rng = np.random.default_rng((seed, 33))
    shuffled = [_nearest(features, code, half, rng) for _ in range(permutations)]
    return Probe(
        accuracy=bootstrap_interval(right, person, seed=seed),
        control=float(np.mean(shuffled)),
        chance=1 / len(people),
        balanced=None,
        balanced_control=np.nan,
        right=right,
        control_right=np.mean(shuffled, axis=0),
        person=person,
        family=person,
        classes=len(people),
    )


def mean_accuracy(probes: Sequence[Probe], *, seed: int = 0) -> Interval:
    """Return the mean of the probes' accuracies, with a 95 % interval from resampling people, the same for all."""
    return _over_probes(probes, [probe.right for probe in probes], seed)


def excess(probes: Sequence[Probe], *, seed: int = 0) -> Interval:
    """Return the mean over probes of accuracy minus control, with a 95 % interval from resampling people.

    A resample draws the same people for all probes and takes their controls along, so it also holds what the controls'
    few permutations leave uncertain. 0 is what features without any of it give.
    """
    return _over_probes(probes, [probe.right - probe.control_right for probe in probes], seed)


def _over_probes(probes: Sequence[Probe], values: Sequence[Floats], seed: int) -> Interval:
    people = sorted({str(name) for probe in probes for name in probe.family})
    total, count = np.zeros((len(probes), len(people))), np.zeros((len(probes), len(people)))
    for row, (probe, value) in enumerate(zip(probes, values, strict=True)):
        column = np.searchsorted(people, probe.family.astype(str))
        np.add.at(total[row], column, value)
        np.add.at(count[row], column, 1)
    return _mean_of_ratios(total, count, seed)


def labels_of_others(
    label: Labels, person: Labels, rng: np.random.Generator, *, family: Labels | None = None
) -> Labels:
    """Return labels of which every family has those of another one, shape (N,); in turn if it has more images.

    Nobody keeps their own. Labels stay together by person as far as the numbers of images allow, and which image of a
    person gets which is random: images that share a camera do not keep sharing it.

    Args:
        label: shape (N,).
        person: shape (N,).
        rng: the choice.
        family: who exchanges labels with another family together; default: everybody alone.
    """
    family = person if family is None else family
    mixed = rng.permutation(len(label))
    people, of = np.unique(person.astype(str), return_inverse=True)
    rank = rng.permutation(len(people))[of]
    rows = mixed[np.argsort(rank[mixed], kind="stable")]  # people in random order, their images too
    families, code = np.unique(family.astype(str), return_inverse=True)
    groups = [rows[code[rows] == number] for number in rng.permutation(len(families))]
    exchanged = label.copy()
    for number, own in enumerate(groups):
        exchanged[own] = label[np.resize(groups[(number + 1) % len(groups)], len(own))]
    return exchanged


def _right(features: Floats, label: Labels, family: Labels, rng: np.random.Generator) -> Floats:
    """Whether the label of each image is predicted by a probe of the other half, shape (N,)."""
    half = _halves(label, family, rng)
    right = np.zeros(len(label))
    for side in (False, True):
        train, test = half != side, half == side
        if train.any() and test.any():
            right[test] = _fitted(features[train], label[train], family[train], features[test], rng) == label[test]
    return right


def _halves(label: Labels, family: Labels, rng: np.random.Generator) -> Mask:
    """A half for each family, in turn among those with the same label (their most frequent one), shape (N,)."""
    families, code = np.unique(family.astype(str), return_inverse=True)
    values, value = np.unique(label.astype(str), return_inverse=True)
    counts = np.zeros((len(families), len(values)))
    np.add.at(counts, (code, value), 1)
    main = counts.argmax(axis=1)
    order = np.lexsort((rng.permutation(len(families)), main))
    side = np.empty(len(families), bool)
    side[order] = (np.arange(len(families)) + rng.integers(2)) % 2 == 1
    return np.asarray(side[code])


def _fitted(train: Floats, label: Labels, family: Labels, test: Floats, rng: np.random.Generator) -> Labels:
    """Predictions for `test` by a probe of `train`, whose penalty is chosen between two halves of `train`."""
    middle, scale = train.mean(axis=0), train.std(axis=0)
    # A feature that never changes (up to rounding) says nothing, and must not become noise of size 1.
    scale = np.where(scale > 1e-7 * np.maximum(np.abs(middle), 1e-12), scale, np.inf)
    train, test = (train - middle) / scale, (test - middle) / scale
    inside = _halves(label, family, rng)
    taught = set(label[inside])
    # A value that only one training family has is on one side: no penalty could get it right.
    judged = ~inside & np.array([value in taught for value in label])
    if not judged.any() or len(taught) < 2:
        return _logistic(train, label, test, _UNDECIDED)
    scores = [
        (_logistic(train[inside], label[inside], train[judged], strength) == label[judged]).sum()
        for strength in STRENGTHS
    ]
    return _logistic(train, label, test, STRENGTHS[int(np.argmax(scores))])


def _logistic(train: Floats, label: Labels, test: Floats, strength: float) -> Labels:
    from sklearn.linear_model import LogisticRegression

    if len(set(label)) == 1:
        return np.full(len(test), label[0], dtype=object)
    model = LogisticRegression(C=strength / len(train), tol=1e-3, max_iter=300)
    with warnings.catch_warnings():
        # A fit that was stopped early is one with a stronger penalty; few images of many values are what there is.
        warnings.simplefilter("ignore", UserWarning)
        model.fit(train, label.astype(str))
    return np.asarray(model.predict(test), dtype=object)


def _halves_of_images(person: Labels, place: Labels, *, strict: bool) -> npt.NDArray[np.int64]:
    """0 or 1 for each image, places of a person in turn; -1 for people whose images cannot be divided."""
    half = np.full(len(person), -1)
    frame = pd.DataFrame({"person": person, "place": [str(value) for value in place]})
    for _, rows in frame.groupby("person", sort=True):
        code = pd.factorize(rows["place"], sort=True)[0]
        if code.max() == 0 and not strict:
            code = np.arange(len(rows))
        if code.max() > 0:
            half[rows.index.to_numpy()] = code % 2
    return half


def _nearest(
    features: Floats,
    code: npt.NDArray[np.int64],
    half: npt.NDArray[np.int64],
    shuffle: np.random.Generator | None = None,
) -> Floats:
    """The share of the vote that the right class mean of the other half gets, shape (N,)."""
    right, classes = np.zeros(len(code)), int(code.max()) + 1
    for side in (0, 1):
        train, test = features[half != side], features[half == side]
        given = code[half != side] if shuffle is None else shuffle.permutation(code[half != side])
        scale = train.std(axis=0)
        scale = np.where(scale > 1e-7 * np.maximum(np.abs(train.mean(axis=0)), 1e-12), scale, np.inf)
        means = np.zeros((classes, features.shape[1]))
        np.add.at(means, given, train / scale)
        means /= np.bincount(given, minlength=classes)[:, None]
        asked = test / scale
        distance = (asked**2).sum(1)[:, None] - 2 * asked @ means.T + (means**2).sum(1)[None]
        near = distance <= distance.min(axis=1, keepdims=True) + 1e-9 * (1 + np.abs(asked).max(initial=0)) ** 2
        right[half == side] = near[np.arange(len(asked)), code[half == side]] / near.sum(axis=1)
    return right


def _recall(right: Floats, label: Labels) -> float:
    """The mean over values of the share of their images that is right."""
    return float(pd.Series(right).groupby(label.astype(str)).mean().mean())


def _balanced(right: Floats, label: Labels, family: Labels, seed: int) -> Interval:
    values, value = np.unique(label.astype(str), return_inverse=True)
    people, column = np.unique(family.astype(str), return_inverse=True)
    hits, count = np.zeros((len(values), len(people))), np.zeros((len(values), len(people)))
    np.add.at(hits, (value, column), right)
    np.add.at(count, (value, column), 1)
    return _mean_of_ratios(hits, count, seed)


def _mean_of_ratios(total: Floats, count: Floats, seed: int, resamples: int = 1000) -> Interval:
    """The mean over rows of Σ total / Σ count, shapes (rows, people), and its 95 % interval from resampling people.

    A row that a resample has no image of is left out of its mean.
    """
    rng = np.random.default_rng(seed)
    people = total.shape[1]
    weight = rng.multinomial(people, np.full(people, 1 / people), size=resamples).astype(np.float64)
    some = np.vstack([np.ones(people), weight])
    found = some @ count.T
    ratio = np.divide(some @ total.T, found, out=np.full(found.shape, np.nan), where=found > 0)
    means = np.nanmean(ratio, axis=1)
    low, high = np.quantile(means[1:], [0.025, 0.975])
    return Interval(float(means[0]), float(low), float(high))
