"""Entropy, divergence and mass of attention, from hand-worked values; Grad-CAM of a model whose gradient is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from reidctl.evaluation import attention
from reidctl.masks import encode_mask
from reidctl.methods.base import Method


@pytest.mark.covers(93)
def test_entropy_is_log_n_when_uniform_and_zero_when_one_hot():
    assert attention.entropy(np.full(192, 1 / 192)) == pytest.approx(math.log(192))
    assert attention.entropy(np.eye(5)).tolist() == [0] * 5
    assert attention.entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5 * math.log(2))
    assert attention.entropy(np.full((2, 3, 4), 0.25)).shape == (2, 3)


@pytest.mark.covers(90)
def test_divergence_is_zero_for_tied_tokens_and_log_two_for_disjoint_ones():
    rng = np.random.default_rng(0)
    p = attention.as_distribution(rng.random((6, 12)))
    q = attention.as_distribution(rng.random((6, 12)))
    assert attention.js_divergence(p, p) == pytest.approx(np.zeros(6), abs=1e-12)
    assert attention.js_divergence([1.0, 0, 0], [0, 0.5, 0.5]) == pytest.approx(math.log(2))
    # (1, 0) with (1/2, 1/2): the middle is (3/4, 1/4).
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert attention.js_divergence([1, 0], [0.5, 0.5]) == pytest.approx(expected)
    assert attention.js_divergence(p, q) == pytest.approx(attention.js_divergence(q, p))
    assert (attention.js_divergence(p, q) > 0).all() and (attention.js_divergence(p, q) < math.log(2)).all()


def test_attention_to_patches_leaves_the_class_tokens_out_and_sums_to_one():
    heads = np.zeros((1, 2, 4, 4))  # 2 class tokens, 2 patches
    heads[0, 0, 0] = [0.5, 0.1, 0.3, 0.1]
    heads[0, 1, 0] = [0.5, 0.1, 0.1, 0.3]
    heads[0, :, 1] = [0, 0.2, 0.6, 0.2]
    heads[0, :, 2:] = 0.25
    assert attention.over_patches(heads, 2) == pytest.approx(np.array([[[0.5, 0.5], [0.75, 0.25]]]))
    assert attention.as_distribution(np.zeros(4)) == pytest.approx(np.full(4, 0.25))


def test_a_mask_is_brought_to_the_grid_by_area_also_where_patches_cut_pixels():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    assert attention.patch_shares(mask, (2, 2)) == pytest.approx(np.full((2, 2), 0.25))
    # Three pixels in two cells: the middle pixel lies half in each, the left one in the first alone.
    assert attention.patch_shares(np.array([[0, 1, 0]]), (1, 2)) == pytest.approx(np.array([[1 / 3, 1 / 3]]))
    assert attention.patch_shares(np.array([[1, 0, 0]]), (1, 2)) == pytest.approx(np.array([[2 / 3, 0]]))
    random = np.random.default_rng(0).random((37, 23)) < 0.3
    assert attention.patch_shares(random, (5, 7)).mean() == pytest.approx(random.mean())


@pytest.mark.covers(94)
def test_mass_on_an_object_is_all_of_it_none_of_it_or_its_area():
    bag, phone = np.zeros((4, 2), bool), np.zeros((4, 2), bool)
    bag[0, 0] = phone[0, 1] = True
    parts = [SimpleNamespace(part="bag", mask=encode_mask(bag)), SimpleNamespace(part="phone", mask=encode_mask(phone))]
    shares = attention.union_shares(parts, (4, 2), (4, 2))
    assert shares is not None and shares.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    inside = np.stack([shares.ravel()] * 3)
    looks = np.stack([np.eye(8)[0], np.eye(8)[7], np.full(8, 1 / 8)])
    assert attention.mass(looks, inside) == pytest.approx([1, 0, 0.25])
    assert attention.union_shares([], (4, 2), (4, 2)) is None
    assert attention.union_shares([SimpleNamespace(mask=[8])], (4, 2), (4, 2)) is None, "an object nobody can see"


def test_correlation_of_maps_is_pearsons_and_unknown_for_a_constant_map():
    a = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 1, 1], [0, 1, 0, 3]])
    b = np.array([[2.0, 4, 6, 8], [4, 3, 2, 1], [1, 2, 3, 4], [1, 0, 2, 2]])
    found = attention.correlation(a, b)
    assert found[:2] == pytest.approx([1, -1]) and np.isnan(found[2])
    assert found[3] == pytest.approx(np.corrcoef(a[3], b[3])[0, 1])
    assert attention.cosine([3, 4], [4, 3]) == pytest.approx(24 / 25) and attention.cosine([0, 0], [1, 1]) == 0


@pytest.mark.covers(87)
def test_gradcam_of_a_linear_score_sums_up_to_the_score():
    """For a score that is linear in the tokens, gradient x activation is what each token adds to it."""
    tokens = torch.rand(2, 1 + 6, 3)  # a class token and a grid of 3 x 2
    weight = torch.rand(7, 3)
    image = SimpleNamespace(last_norm=nn.Identity())
    model = SimpleNamespace(backbone=SimpleNamespace(image=image, grid=(3, 2)))

    def score():
        return (image.last_norm(tokens) * weight).sum()

    found = Method._gradcam(model, None, score)  # type: ignore[arg-type]
    assert found.shape == (2, 6) and not found.requires_grad
    assert torch.allclose(found, (tokens * weight).sum(-1)[:, 1:])
    added = (tokens * weight).sum(-1)[:, :1].sum()
    assert torch.allclose(found.sum() + added, score())
    weight[2] = -weight[2]  # what speaks against the score is cut
    assert torch.equal(Method._gradcam(model, None, score)[:, 1], torch.zeros(2))  # type: ignore[arg-type]
