import math

import pytest
import torch

from reidctl import losses
from reidctl.layers.fusion import Fusion
from reidctl.layers.matching import Encoded, MatchHead, join, matching_pairs

READINGS = [
    {"sequence": "vector"}, {"sequence": "pair"}, {"sequence": "chunks"}, {"sequence": "tokens"},
    {"sequence": "tokens", "order": "image_first"}, {"sequence": "tokens", "kind": "simple"},
    {"sequence": "tokens", "kind": "transformer", "layers": 1},
]  # fmt: skip


def sides(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)
    image_tokens = torch.randn(count, 3, 6, generator=generator)
    text_tokens = torch.randn(count, 7, 4, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 1, 7])[:count, None]
    return image, image_tokens, text, text_tokens, mask


def fusion(**settings):
    torch.manual_seed(0)
    return Fusion(6, 4, width=16, out_dim=8, dropout=0.0, **settings).eval()


@pytest.mark.covers(143)
@pytest.mark.parametrize("settings", READINGS)
def test_mixing_encoded_sides_equals_fusing_the_pair(settings):
    module = fusion(**settings)
    image, image_tokens, text, text_tokens, mask = sides()
    images, texts = module.encode_image(image, image_tokens), module.encode_text(text, text_tokens, mask)
    row, column = torch.tensor([0, 4, 2, 2, 1]), torch.tensor([3, 3, 0, 1, 2])
    expected = module(
        image[row],
        text[column],
        image_tokens=image_tokens[row],
        text_tokens=text_tokens[column],
        text_mask=mask[column],
    )
    found = module.mix(images[row], texts[column])
    assert torch.allclose(found.feature, expected.feature, atol=1e-6)
    assert torch.allclose(found.weights, expected.weights, atol=1e-6)


@pytest.mark.covers(143)
@pytest.mark.parametrize("settings", READINGS)
def test_joining_parts_of_other_lengths_changes_no_feature(settings):
    module = fusion(**settings)
    image, image_tokens, text, text_tokens, mask = sides()
    images, texts = module.encode_image(image, image_tokens), module.encode_text(text, text_tokens, mask)
    short = module.encode_text(text[1:2], text_tokens[1:2, :2], mask[1:2, :2])
    joined = join([texts[slice(0, 1)], short, texts[slice(2, 5)]])
    assert torch.allclose(module.mix(images, joined).feature, module.mix(images, texts).feature, atol=1e-6)
    if texts.tokens is not None:
        wrong = Encoded(joined.pooled, joined.tokens, torch.ones_like(joined.mask))
        assert not torch.allclose(module.mix(images, wrong).feature[1], module.mix(images, texts).feature[1])


def test_the_match_loss_is_binary_cross_entropy_by_hand():
    odds = torch.tensor([0.0, math.log(3), -math.log(3)])
    # Right at 1/2 and 3/4, wrong at 1/4: -(log 1/2 + log 3/4 + log 3/4) / 3.
    expected = -(math.log(0.5) + 2 * math.log(0.75)) / 3
    assert losses.match(odds, torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(expected)
    assert losses.match(torch.zeros(6), torch.tensor([1.0, 0, 0, 0, 1, 0])).item() == pytest.approx(math.log(2))
    far = torch.tensor([400.0, -400.0], requires_grad=True)
    losses.match(far, torch.tensor([0.0, 1.0])).backward()
    assert torch.isfinite(far.grad).all()
    nothing = torch.zeros(0, requires_grad=True)
    losses.match(nothing, torch.zeros(0)).backward()


@pytest.mark.covers(143)
def test_every_image_meets_its_own_text_and_one_wrong_text_and_every_text_one_wrong_image():
    person = torch.tensor([0, 0, 1, 2])
    wrong = person[:, None] != person
    for seed in range(20):
        torch.manual_seed(seed)
        image, text, label = matching_pairs(torch.randn(4, 4), wrong, 0.5)
        assert image.tolist()[:4] == text.tolist()[:4] == [0, 1, 2, 3] and label.tolist() == [1.0] * 4 + [0.0] * 8
        assert image[4:8].tolist() == [0, 1, 2, 3] == text[8:].tolist()
        assert wrong[image[4:], text[4:]].all()
    torch.manual_seed(19)
    again = matching_pairs(torch.randn(4, 4), wrong, 0.5)
    assert torch.equal(again[1], text), "deterministic under the process-wide generator"


@pytest.mark.covers(143)
def test_wrong_partners_are_drawn_by_similarity():
    # Image 0 likes text 1 over text 2 by log 4 at temperature 1: p = 0.8.
    similarity = torch.tensor([[9.0, math.log(4), 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    torch.manual_seed(0)
    wrong = ~torch.eye(3, dtype=torch.bool)
    drawn = [int(matching_pairs(similarity, wrong, 1.0)[1][3]) for _ in range(2000)]
    assert drawn.count(1) / 2000 == pytest.approx(0.8, abs=0.04)
    cold = [int(matching_pairs(similarity, wrong, 0.01)[1][3]) for _ in range(50)]
    assert set(cold) == {1}, "at a low temperature the hardest"


def test_a_batch_of_one_person_has_right_pairs_only():
    image, text, label = matching_pairs(torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool), 0.05)
    assert image.tolist() == text.tolist() == [0, 1, 2] and label.tolist() == [1.0, 1.0, 1.0]
    image, text, label = matching_pairs(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool), 0.05)
    assert len(image) == 1


def test_the_head_returns_one_number_per_pair():
    assert MatchHead(8)(torch.randn(5, 8)).shape == (5,)
