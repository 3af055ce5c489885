"""Labels beside scikit-learn's, which reidctl's DBSCAN replaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from reidctl.captioning import dbscan as module
from reidctl.captioning.dbscan import dbscan
from reidctl.errors import DataError


def reference(points, eps: float, min_samples: int, weight=None) -> np.ndarray:
    model = DBSCAN(eps=eps, min_samples=min_samples, metric="cosine")
    return model.fit(np.asarray(points, np.float64), sample_weight=weight).labels_


def at(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def clouds(count: int, width: int, groups: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(groups, width))
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    points = middle[rng.integers(groups, size=count)] + noise * rng.normal(size=(count, width))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.covers(127)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 60),
    width=st.integers(1, 6),
    grid=st.booleans(),
    single=st.booleans(),
    eps=st.sampled_from([1e-4, 0.01, 0.05, 0.1, 0.25, 0.4, 0.7, 1.0, 1.3, 1.9, 2.0, 3.0]),
    min_samples=st.integers(1, 6),
    weighing=st.sampled_from(["none", "whole", "parts", "negative"]),
    block=st.sampled_from([1, 3, 16, 1024]),
)
def test_labels_equal_scikit_learn(seed, count, width, grid, single, eps, min_samples, weighing, block) -> None:
    rng = np.random.default_rng(seed)
    # A coarse grid brings repeats, opposite rows, rows of zeros and right angles (distance exactly 1).
    points = rng.integers(-1, 2, size=(count, width)) if grid else rng.normal(size=(count, width))
    points = points.astype(np.float32 if single else np.float64)
    choices = {"whole": [1, 2, 3, 9], "parts": [0.1, 0.2, 0.5, 1.0], "negative": [-1.0, 1.0, 2.0]}
    weight = None if weighing == "none" else rng.choice(choices[weighing], size=count)
    ours = dbscan(points, eps, min_samples, weight=weight, block=block)
    np.testing.assert_array_equal(ours, reference(points, eps, min_samples, weight))


@pytest.mark.parametrize("cosine", [0.6, 0.5, 2 / 3, 1 / np.sqrt(2), 2 / np.sqrt(5)])
@pytest.mark.parametrize("width", [2, 4])
def test_points_exactly_at_eps_are_joined_where_scikit_learn_joins_them(cosine: float, width: int) -> None:
    rng = np.random.default_rng(width)
    points = rng.integers(-2, 3, size=(70, width)).astype(np.float64)
    for eps in (1 - cosine, np.nextafter(1 - cosine, 0), np.nextafter(1 - cosine, 2)):
        for min_samples in (2, 12):
            expected = reference(points, eps, min_samples)
            np.testing.assert_array_equal(dbscan(points, eps, min_samples), expected)
            np.testing.assert_array_equal(dbscan(points, eps, min_samples, block=16), expected)


@pytest.mark.covers(127)
def test_a_border_point_of_two_clusters_joins_the_one_whose_core_comes_first() -> None:
    eps = 1 - np.cos(np.radians(10.5))
    left, right, between = [0, 2, 4, 6, 8], [28, 30, 32, 34, 36], [18]
    # 18 degrees reaches 8 and 28 only: too few for a core of min_samples 4.
    assert dbscan(at(*left, *between, *right), eps, 4).tolist() == [0] * 6 + [1] * 5
    assert dbscan(at(*right, *between, *left), eps, 4).tolist() == [0] * 6 + [1] * 5
    assert dbscan(at(*between, *right, *left), eps, 4).tolist() == [0] + [0] * 5 + [1] * 5
    for block in (1, 2, 4):
        assert dbscan(at(*between, *right, *left), eps, 4, block=block).tolist() == [0] + [0] * 5 + [1] * 5


def test_a_chain_through_all_tiles_is_one_cluster() -> None:
    points = at(*np.random.default_rng(0).permutation(np.arange(0, 90, 0.25)))
    eps = 1 - np.cos(np.radians(0.3))
    assert (dbscan(points, eps, 2, block=16) == 0).all()
    without_middle = np.delete(points, np.argmin(np.abs(points[:, 0] - points[:, 1])), axis=0)
    labels = dbscan(without_middle, eps, 2, block=16)
    assert labels.max() == 1 and (labels == reference(without_middle, eps, 2)).all()


@pytest.mark.parametrize("eps", [0.05, 0.12, 0.2, 0.3, 0.9, 1.5])
@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_pruned_and_unpruned_tiles_give_scikit_learns_labels(eps: float, noise: float) -> None:
    points = clouds(1500, 48, 12, noise)
    expected = reference(points, eps, 5)
    for given_points in (points, points[:, ::-1]):
        np.testing.assert_array_equal(dbscan(given_points, eps, 5, block=64), expected)
    np.testing.assert_array_equal(dbscan(points, eps, 5), expected)


def test_tiles_out_of_reach_are_never_computed(monkeypatch) -> None:
    computed = []
    real = module._tile
    monkeypatch.setattr(
        module, "_tile", lambda space, eps, key, weight: computed.append(key) or real(space, eps, key, weight)
    )
    points = clouds(2000, 32, 10, 0.01)
    labels = dbscan(points, 0.05, 5, block=64)
    assert labels.max() == 9
    blocks = -(-2000 // 64)
    assert len(computed) < 0.3 * blocks * (blocks + 1) / 2


def test_float32_rounding_does_not_decide() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=256)
    base /= np.linalg.norm(base)
    side = rng.normal(size=256)
    side -= (side @ base) * base
    side /= np.linalg.norm(side)
    eps = 0.05
    # Neighbours of the base a hair (2e-9, a thirtieth of what float32 resolves) nearer or farther than eps.
    cosine = 1 - eps + np.where(np.arange(40) % 2, 2e-9, -2e-9)
    signs = np.where(np.arange(40) % 4 < 2, 1, -1)
    others = cosine[:, None] * base + (signs * np.sqrt(1 - cosine**2))[:, None] * side
    for other in others:
        pair = np.stack([base, other])
        np.testing.assert_array_equal(dbscan(pair, eps, 2), reference(pair, eps, 2))
    assert (dbscan(np.stack([base, others[1]]), eps, 2) == 0).all()
    assert (dbscan(np.stack([base, others[0]]), eps, 2) == -1).all()


def test_weights_are_repeats() -> None:
    rng = np.random.default_rng(3)
    points = rng.normal(size=(40, 3))
    weight = rng.integers(1, 6, size=40)
    repeated = np.repeat(points, weight, axis=0)
    first = np.cumsum(weight) - weight
    np.testing.assert_array_equal(dbscan(points, 0.05, 6, weight=weight), dbscan(repeated, 0.05, 6)[first])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("min_samples", [1, 2, 6])
@pytest.mark.parametrize("eps", [1e-6, 0.5, 2.0, 10.0])
def test_few_or_equal_points(count: int, min_samples: int, eps: float) -> None:
    for points in (np.ones((count, 3)), np.eye(5)[:count], np.zeros((count, 3)), -np.eye(5, dtype=np.float32)[:count]):
        ours = dbscan(points, eps, min_samples)
        assert ours.dtype == np.int64 and ours.shape == (count,)
        if count:
            np.testing.assert_array_equal(ours, reference(points, eps, min_samples))


def test_all_noise_one_cluster_and_each_its_own() -> None:
    points = clouds(300, 8, 5, 0.1)
    assert (dbscan(points, 1e-6, 2, block=32) == -1).all()
    assert (dbscan(points, 2.0, 5, block=32) == 0).all()
    assert dbscan(points, 1e-6, 1, block=32).tolist() == list(range(300))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_a_data_error(value: float) -> None:
    points = np.eye(3)
    points[1, 1] = value
    with pytest.raises(DataError, match="finite"):
        dbscan(points, 0.5, 2)
    with pytest.raises(DataError, match="finite"):
        dbscan(np.eye(3), 0.5, 2, weight=np.array([1, value, 1]))


def test_vectors_of_any_length_are_scaled_and_left_as_they_were() -> None:
    points = clouds(200, 6, 4, 0.1)
    scaled = points * np.random.default_rng(1).uniform(1e-3, 1e3, size=(200, 1))
    before = scaled.copy()
    np.testing.assert_array_equal(dbscan(scaled, 0.05, 4), reference(scaled, 0.05, 4))
    np.testing.assert_array_equal(scaled, before)


def test_threads_do_not_change_the_labels() -> None:
    from threadpoolctl import threadpool_limits

    points = clouds(1200, 24, 6, 0.1)
    with threadpool_limits(2, user_api="blas"):
        two = dbscan(points, 0.25, 5, block=64)
    with threadpool_limits(1, user_api="blas"):
        np.testing.assert_array_equal(two, dbscan(points, 0.25, 5, block=64))
