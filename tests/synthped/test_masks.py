"""Run lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reidctl.errors import DataError
from reidctl.masks import decode_mask, encode_mask, mask_box


def test_runs_of_a_small_mask_are_those_worked_out_by_hand():
    assert encode_mask(np.array([[0, 1], [1, 0]])) == [1, 2, 1]
    assert encode_mask(np.array([[1, 1, 0]])) == [0, 2, 1]
    assert encode_mask(np.zeros((2, 2))) == [4]
    assert encode_mask(np.ones((1, 3))) == [0, 3]


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_decoding_gives_the_mask_back(height, width, rng):
    mask = np.array([[rng.random() < 0.5 for _ in range(width)] for _ in range(height)])
    assert np.array_equal(decode_mask(encode_mask(mask), height, width), mask)


def test_runs_of_another_size_are_refused():
    with pytest.raises(DataError, match="4x4"):
        decode_mask([1, 2, 1], 4, 4)
    with pytest.raises(DataError):
        decode_mask([6, -2], 2, 2)


def test_box_is_half_open():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    assert mask_box(mask) == [2, 1, 5, 3]
    assert mask_box(np.zeros((2, 2), bool)) == [0, 0, 0, 0]
