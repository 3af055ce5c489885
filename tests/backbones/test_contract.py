"""What every backbone promises, on the smallest size of each kind."""

import copy

import pytest
import torch
from torch import Tensor

from reidctl.backbones import weights
from reidctl.backbones.base import Backbone
from reidctl.batch import Tokens
from reidctl.errors import UsageError

TEXTS = ["a man in a red coat", "a tall young woman wearing blue jeans, carrying a black bag", "shoes"]


@pytest.fixture(params=["clip:micro", "vit-bert:micro"])
def backbone(request) -> Backbone:
    torch.manual_seed(0)
    return weights.build(request.param).eval()


@pytest.fixture
def images(backbone) -> Tensor:
    return torch.randn(3, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def extra(backbone: Backbone, count: int = 1, seed: int = 2) -> Tensor:
    return torch.randn(count, backbone.width_image, generator=torch.Generator().manual_seed(seed))


def test_shapes_are_those_of_the_contract(backbone, images):
    features = backbone.encode_image(images)
    width, dim = backbone.width_image, backbone.dim
    assert features.cls.shape == (3, 1, dim)
    assert features.patches.shape == (3, 8, dim)
    assert features.hidden_cls.shape == features.previous_cls.shape == (3, 1, width)
    assert features.hidden_patches.shape == (3, 8, width)
    assert features.grid == backbone.grid == (4, 2)
    tokens = backbone.tokenize(TEXTS)
    text = backbone.encode_text(tokens)
    assert text.pooled.shape == (3, dim)
    assert text.tokens.shape == (*tokens.ids.shape, dim)
    assert text.hidden.shape == (*tokens.ids.shape, backbone.width_text)


@pytest.mark.covers(61)
def test_a_second_class_token_adds_one_token_and_keeps_the_patches(backbone, images):
    single = backbone.encode_image(images, attention=True)
    double = backbone.encode_image(images, extra_cls=extra(backbone), attention=True)
    assert single.attention[0].shape[-1] == 8 + 1
    assert double.attention[0].shape[-1] == 8 + 2
    assert double.cls.shape[1] == 2
    assert double.patches.shape == single.patches.shape


@pytest.mark.covers(61)
def test_a_copied_class_token_returns_the_same_feature_as_the_first(backbone, images):
    both = backbone.encode_image(images, extra_cls=backbone.image.class_token[None]).cls
    torch.testing.assert_close(both[:, 0], both[:, 1])


def test_full_isolation_makes_patches_independent_of_class_tokens(backbone, images):
    one = backbone.encode_image(images, extra_cls=extra(backbone, seed=2), isolation="full")
    two = backbone.encode_image(images, extra_cls=extra(backbone, seed=3), isolation="full")
    assert torch.equal(one.patches, two.patches)
    assert torch.equal(one.cls[:, 0], two.cls[:, 0])
    assert not torch.allclose(one.cls[:, 1], two.cls[:, 1])


def test_full_isolation_leaves_no_gradient_between_class_tokens(backbone, images):
    token = extra(backbone).requires_grad_()
    features = backbone.encode_image(images, extra_cls=token, isolation="full")
    (gradient,) = torch.autograd.grad(features.cls[:, 0].sum() + features.patches.sum(), token)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("isolation", "direct"), [("none", True), ("cls", False)])
def test_cls_isolation_closes_the_direct_path_but_not_the_one_through_patches(backbone, images, isolation, direct):
    features = backbone.encode_image(images, extra_cls=extra(backbone), isolation=isolation, attention=True)
    for probabilities in features.attention:
        assert bool((probabilities[:, :, 0, 1] > 0).all()) is direct
        assert (probabilities[:, :, 2:, 1] > 0).all()
    token = extra(backbone).requires_grad_()
    outputs = backbone.encode_image(images, extra_cls=token, isolation=isolation).cls[:, 0]
    (gradient,) = torch.autograd.grad(outputs.square().sum(), token)
    assert gradient.abs().max() > 0


def test_a_dropped_patch_changes_nothing_that_is_left(backbone, images):
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[:, 5] = False
    changed = images.clone()
    changed[:, :, 32:48, 16:32] = 7.0  # patch 5 of the 4 x 2 grid: third row, second column
    one, two = backbone.encode_image(images, keep=keep), backbone.encode_image(changed, keep=keep)
    assert torch.equal(one.cls, two.cls)
    assert torch.equal(one.patches[:, keep[0]], two.patches[:, keep[0]])
    assert not torch.allclose(backbone.encode_image(images).cls, backbone.encode_image(changed).cls)


def test_an_image_without_any_kept_patch_stays_finite(backbone, images):
    keep = torch.zeros(3, 8, dtype=torch.bool)
    assert backbone.encode_image(images, keep=keep).cls.isfinite().all()


def test_attention_rows_sum_to_one_and_padding_gets_none(backbone, images):
    for probabilities in backbone.encode_image(images, attention=True).attention:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities.sum(-1)))
    tokens = backbone.tokenize(TEXTS)
    for probabilities in backbone.encode_text(tokens, attention=True).attention:
        real = probabilities.transpose(1, 2)[tokens.mask]  # (real tokens, heads, L)
        torch.testing.assert_close(real.sum(-1), torch.ones_like(real.sum(-1)))
        padding = (~tokens.mask)[:, None, None, :].expand_as(probabilities).transpose(1, 2)[tokens.mask]
        assert padding.any()
        assert real[padding].abs().sum() == 0


def test_asking_for_attention_changes_no_feature_and_gives_gradients(backbone, images):
    plain, shown = backbone.encode_image(images), backbone.encode_image(images, attention=True)
    torch.testing.assert_close(plain.cls, shown.cls)
    assert plain.attention is None
    gradients = torch.autograd.grad(shown.cls.square().sum(), shown.attention)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_encode_text_equals_encoding_its_embeddings(backbone):
    tokens = backbone.tokenize(TEXTS)
    embeddings = backbone.embed_tokens(tokens.ids)
    assert embeddings.shape == (*tokens.ids.shape, backbone.width_text)
    ends = tokens.mask.sum(1) - 1
    one = backbone.encode_text(tokens)
    two = backbone.encode_embedded(embeddings, tokens.mask, ends)
    assert torch.equal(one.pooled, two.pooled)
    assert torch.equal(one.tokens, two.tokens)


def test_padding_and_what_stands_in_it_change_no_text_feature(backbone):
    tokens = backbone.tokenize(TEXTS)
    alone = torch.cat([backbone.encode_text(backbone.tokenize([text])).pooled for text in TEXTS])
    torch.testing.assert_close(backbone.encode_text(tokens).pooled, alone, atol=1e-5, rtol=1e-5)
    filled = Tokens(torch.where(tokens.mask, tokens.ids, 7), tokens.mask)
    torch.testing.assert_close(backbone.encode_text(filled).pooled, alone, atol=1e-5, rtol=1e-5)


def test_features_follow_the_order_of_the_batch(backbone, images):
    order = torch.tensor([2, 0, 1])
    tokens = backbone.tokenize(TEXTS)
    torch.testing.assert_close(backbone.encode_image(images[order]).cls, backbone.encode_image(images).cls[order])
    torch.testing.assert_close(backbone.encode_text(tokens[order]).pooled, backbone.encode_text(tokens).pooled[order])


@pytest.mark.covers(21)
def test_truncation_keeps_the_end_token_and_is_counted(backbone):
    long = " ".join(["red"] * 100)
    tokens = backbone.tokenize(["a red coat", long])
    assert tokens.ids.shape[1] == backbone.context_length
    ends = tokens.mask.sum(1) - 1
    assert ends.tolist() == [4, backbone.context_length - 1]
    assert tokens.ids[0, 4] == tokens.ids[1, -1] == backbone.tokenizer.end_id
    assert backbone.truncation_rate(["a red coat", long, "hat", "shoe"]) == 0.25
    assert backbone.truncation_rate([]) == 0.0
    fits = " ".join(["red"] * (backbone.context_length - 2))
    assert backbone.truncation_rate([fits]) == 0.0
    assert backbone.truncation_rate([fits + " red"]) == 1.0


def test_no_texts_give_no_rows(backbone):
    tokens = backbone.tokenize([])
    assert tokens.ids.shape[0] == 0
    assert tokens.mask.dtype == torch.bool


def test_offsets_point_at_the_words_behind_the_tokens(backbone):
    text = "A Man in  RED-white Nike shoes"
    spans = backbone.tokenize_offsets(text)
    assert len(spans) == int(backbone.tokenize([text]).mask.sum())
    assert spans[0] == (0, 0)
    assert spans[-1][0] == spans[-1][1]
    words = [text[start:end] for start, end in spans if end > start]
    assert words[:6] == ["A", "Man", "in", "RED", "-", "white"]
    assert "".join(words) == text.replace(" ", "")


def test_images_of_another_size_are_refused(backbone):
    with pytest.raises(UsageError, match="Images of 32x64"):
        backbone.encode_image(torch.zeros(1, 3, 32, 64))


def test_a_copied_text_tower_is_an_encoder_of_its_own(backbone):
    tokens = backbone.tokenize(TEXTS)
    before = backbone.encode_text(tokens).pooled
    other = copy.deepcopy(backbone.text)
    same = other.encode_embedded(other.embed_tokens(tokens.ids), tokens.mask)
    assert torch.equal(same.pooled, before)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert torch.equal(backbone.encode_text(tokens).pooled, before)


def test_every_weight_is_reached_by_the_features_it_should_move(backbone, images):
    features = backbone.encode_image(images)
    text = backbone.encode_text(backbone.tokenize(TEXTS))
    (features.cls.square().sum() + features.patches.square().sum() + text.pooled.square().sum()).backward()
    still = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert still == []
    assert backbone.image.last_mlp_weight.grad.abs().max() > 0


def test_checkpointing_changes_no_gradient(backbone, images):
    backbone.train()
    gradients = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        backbone.encode_image(images).cls.square().sum().backward()
        gradients.append(backbone.image.last_mlp_weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
