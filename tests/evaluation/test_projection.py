"""Maps and silhouettes."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from reidctl.evaluation import projection


def groups(people=12, each=4, spread=0.05, width=6):
    rng = np.random.default_rng(0)
    person = np.repeat([f"p{number:02d}" for number in range(people)], each).astype(object)
    features = np.repeat(rng.normal(size=(people, width)), each, axis=0) + spread * rng.normal(
        size=(people * each, width)
    )
    return features, person


@pytest.mark.covers(159)
def test_silhouettes_equal_scikit_learn_and_their_control_is_lower():
    features, person = groups()
    found = projection.silhouette(features, person, person)
    expected = silhouette_samples(features, person.astype(str), metric="cosine")
    assert found.value.value == pytest.approx(expected.mean()) and found.value.value > 0.7
    assert found.value.low <= found.value.value <= found.value.high and found.control < 0
    assert found.images == 48 and found.people == 12


def test_labels_that_have_nothing_to_do_with_the_features_are_like_their_control():
    features, person = groups()
    label = np.repeat(["red", "blue", "green"] * 4, 4).astype(object)
    found = projection.silhouette(features, label, person)
    assert found.value.low <= found.control <= found.value.high
    planted = features + 20 * np.eye(6)[np.unique(label.astype(str), return_inverse=True)[1]]
    there = projection.silhouette(planted, label, person)
    assert there.value.low > there.control + 0.5


def test_a_single_label_has_no_silhouette_and_labels_of_one_image_count_nothing():
    features, person = groups()
    assert projection.silhouette(features, np.full(len(person), "x", dtype=object), person) is None
    label = np.array(["a"] + ["b"] * 47, dtype=object)
    each = silhouette_samples(features, label.astype(str), metric="cosine")
    assert projection.silhouette(features, label, person).value.value == pytest.approx(each.mean())


@pytest.mark.covers(159)
def test_a_map_keeps_neighbours_and_is_the_same_for_a_seed():
    features, person = groups()
    one, other = projection.tsne(features, seed=3), projection.tsne(features * 7, seed=3)
    assert one.shape == (48, 2)
    np.testing.assert_array_equal(one, projection.tsne(features, seed=3))
    np.testing.assert_allclose(one, other, atol=1e-2)  # only directions count
    distance = np.linalg.norm(one[:, None] - one[None], axis=2) + np.diag(np.full(48, np.inf))
    assert (person[distance.argmin(axis=1)] == person).mean() > 0.95


def test_equal_features_have_a_map_too():
    assert np.isfinite(projection.tsne(np.ones((12, 4)))).all()
