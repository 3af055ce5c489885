"""What can be changed or watched in an image tower's attention, and patches that are taken away from any method."""

import math

import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import SETTINGS, model
from torch import Tensor

from reidctl.backbones import weights
from reidctl.backbones.attention import Local, attend, attend_alike, biased, distance_bias, split_heads
from reidctl.backbones.base import Backbone, dropping, fill_dropped, recording
from reidctl.batch import Batch
from reidctl.explain.maps import pair_batch
from reidctl.pixels import PixelStore


@pytest.fixture(params=["clip:micro", "vit-bert:micro"])
def backbone(request) -> Backbone:
    torch.manual_seed(0)
    return weights.build(request.param).eval()


@pytest.fixture
def images(backbone) -> Tensor:
    return torch.randn(3, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def distances(grid: tuple[int, int]) -> Tensor:
    """Squared distance of all pairs of patches in sides of the longer axis, pair by pair."""
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return torch.tensor([[((a - c) ** 2 + (b - d) ** 2) / max(grid) ** 2 for c, d in places] for a, b in places])


# Distance bias


@pytest.mark.covers(178)
def test_the_distance_bias_is_a_gaussian_of_the_distance_in_picture_heights():
    bias = distance_bias((4, 2), 0.25)
    torch.testing.assert_close(bias, -distances((4, 2)) / (2 * 0.25**2), atol=1e-5, rtol=1e-5)
    assert bias[0, 6].item() == pytest.approx(-((3 / 4) ** 2) / 0.125)  # three rows down: d = 3/4


@pytest.mark.covers(178)
def test_the_bias_makes_logits_of_far_patches_smaller_and_leaves_the_class_tokens_rows_as_they_were(backbone, images):
    local = Local(bias=distance_bias(backbone.grid, 0.25), blocks=1)
    plain = backbone.encode_image(images, attention="last")
    near = backbone.encode_image(images, attention="last", local=local)
    before, after = plain.attention[0], near.attention[0]
    torch.testing.assert_close(after[:, :, 0], before[:, :, 0])
    # Ratios of probabilities of one row are differences of logits: those to a patch itself are not changed.
    logits = lambda maps: (maps[:, :, 1:, 1:] / torch.diagonal(maps[:, :, 1:, 1:], dim1=2, dim2=3)[..., None]).log()  # noqa: E731
    change = logits(after) - logits(before)
    expected = (-distances(backbone.grid) / 0.125).expand_as(change)
    torch.testing.assert_close(change, expected, atol=1e-3, rtol=1e-3)
    far = distances(backbone.grid) > 0.2
    assert (change[..., far] < -1).all()
    to_class = (after[:, :, 1:, 0] / torch.diagonal(after[:, :, 1:, 1:], dim1=2, dim2=3)).log()
    was = (before[:, :, 1:, 0] / torch.diagonal(before[:, :, 1:, 1:], dim1=2, dim2=3)).log()
    torch.testing.assert_close(to_class, was, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(near.patches, plain.patches, atol=1e-3)


@pytest.mark.covers(178)
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_bias_acts_in_so_many_of_the_last_blocks(backbone, images, blocks):
    local = Local(bias=distance_bias(backbone.grid, 0.1), blocks=blocks)
    plain = backbone.encode_image(images, attention=True).attention
    near = backbone.encode_image(images, attention=True, local=local).attention
    count = len(plain)
    first = max(0, count - blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain[:first], near[:first], strict=True))
    far = distances(backbone.grid) > 0.2
    for before, after in zip(plain[first:], near[first:], strict=True):
        assert after[:, :, 1:, 1:][..., far].mean() < before[:, :, 1:, 1:][..., far].mean() / 2


@pytest.mark.covers(178)
@pytest.mark.parametrize("local", [None, Local(), Local(bias=torch.zeros(8, 8), blocks=9)])
def test_no_bias_or_a_bias_of_zero_is_the_plain_pass(backbone, images, local):
    plain, other = backbone.encode_image(images), backbone.encode_image(images, local=local)
    for name in ("cls", "patches", "previous_cls", "hidden_patches"):
        torch.testing.assert_close(getattr(other, name), getattr(plain, name), atol=1e-6, rtol=1e-6)


def test_a_bias_and_dropped_patches_go_together(backbone, images):
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[1, 5] = keep[2, :4] = False
    local = Local(bias=distance_bias(backbone.grid, 0.5), blocks=9)
    seen = backbone.encode_image(images, keep=keep, attention=True, local=local)
    for probabilities in seen.attention:
        others = probabilities[:, :, :1, 1:].expand(-1, -1, 8, -1)[:, 0, 0]
        assert others[~keep].abs().max() == 0 and others[keep].min() > 0
    whole = backbone.encode_image(images, keep=torch.ones_like(keep), local=local)
    torch.testing.assert_close(whole.cls, backbone.encode_image(images, local=local).cls)


def test_a_mask_of_logits_forbids_what_the_mask_forbids_and_adds_the_bias_elsewhere():
    bias, mask = -torch.rand(2, 2), torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    found = biased(mask, bias, 1)
    assert found.isinf().tolist() == (~mask).tolist()
    assert torch.equal(found[1:, 1:], bias) and found[0, :2].tolist() == [0, 0] and found[1, 0] == 0
    assert torch.equal(biased(None, bias, 1)[1:, 1:], bias)


# Keys with keys, values with values


def slow_attention(rows: Tensor, columns: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One image: (heads, T, width) three times; the probabilities and the joined output, row by row."""
    heads, count, width = rows.shape
    shares = torch.zeros(heads, count, count)
    output = torch.zeros(count, heads * width)
    for head in range(heads):
        for t in range(count):
            logits = torch.tensor([float(rows[head, t] @ columns[head, s]) / math.sqrt(width) for s in range(count)])
            shares[head, t] = logits.softmax(dim=0)
            output[t, head * width : (head + 1) * width] = sum(
                p * v for p, v in zip(shares[head, t], value[head], strict=True)
            )
    return shares, output


@pytest.mark.covers(178)
@pytest.mark.parametrize("alike", ["key", "value"])
@pytest.mark.parametrize("classes", [1, 2])
def test_patches_compare_keys_with_keys_or_values_with_values_and_class_tokens_do_not(alike, classes):
    query, key, value = split_heads(torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0)), 2)
    output, shares = attend_alike(query, key, value, alike, classes, mask=None, attention=True)
    fused, none = attend_alike(query, key, value, alike, classes, mask=None, attention=False)
    assert none is None
    torch.testing.assert_close(fused, output)
    other = key if alike == "key" else value
    for image in range(2):
        plain = slow_attention(query[image], key[image], value[image])
        same = slow_attention(other[image], other[image], value[image])
        torch.testing.assert_close(shares[image, :, :classes], plain[0][:, :classes], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shares[image, :, classes:], same[0][:, classes:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output[image, :classes], plain[1][:classes], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output[image, classes:], same[1][classes:], atol=1e-5, rtol=1e-4)


def test_comparing_alike_obeys_the_mask_of_each_row():
    query, key, value = split_heads(torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0)), 1)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False], [True, True, True, True], [True] * 4])
    _, shares = attend_alike(query, key, value, "key", 1, mask=mask, attention=True)
    assert torch.equal(shares[0, 0] == 0, ~mask)


@pytest.mark.covers(178)
@pytest.mark.parametrize("alike", ["key", "value"])
def test_only_the_patches_of_the_last_block_compare_alike(backbone, images, alike):
    plain = backbone.encode_image(images, attention=True)
    seen = backbone.encode_image(images, attention=True, local=Local(alike=alike))
    for before, after in zip(plain.attention[:-1], seen.attention[:-1], strict=True):
        assert torch.equal(before, after)
    last = seen.attention[-1]
    torch.testing.assert_close(last[:, :, 0], plain.attention[-1][:, :, 0])
    torch.testing.assert_close(seen.cls, plain.cls)
    assert not torch.allclose(last[:, :, 1:], plain.attention[-1][:, :, 1:], atol=1e-3)
    assert not torch.allclose(seen.patches, plain.patches, atol=1e-3)
    # x.y = y.x: before the softmax the looks of two patches at each other are equal.
    patches = last[:, :, 1:, 1:]
    logits = patches.log() - torch.diagonal(patches, dim1=2, dim2=3)[..., None].log()
    own = torch.diagonal(torch.zeros_like(patches), dim1=2, dim2=3)
    torch.testing.assert_close(torch.diagonal(logits, dim1=2, dim2=3), own)


@pytest.mark.covers(178)
def test_keys_with_keys_in_the_last_block_equal_a_slow_block():
    torch.manual_seed(0)
    backbone = weights.build("vit-bert:micro").eval()
    images = torch.randn(1, 3, *backbone.image_size)
    kept: list[Tensor] = []
    handle = backbone.image.last_norm.register_forward_hook(lambda module, given, output: kept.append(output))
    with torch.no_grad():
        shares = backbone.encode_image(images, attention="last", local=Local(alike="key")).attention[0][0]
        handle.remove()
        block = backbone.image.blocks[-1]
        query, key, value = split_heads(block.qkv(kept[0]), block.heads)
        expected = slow_attention(key[0], key[0], value[0])[0]
        expected[:, 0] = slow_attention(query[0], key[0], value[0])[0][:, 0]
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


# Watching


def test_the_last_block_s_attention_alone_is_the_last_of_all(backbone, images):
    every, last = backbone.encode_image(images, attention=True), backbone.encode_image(images, attention="last")
    assert len(last.attention) == 1 and len(every.attention) == len(backbone.image.blocks)
    torch.testing.assert_close(last.attention[0], every.attention[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(last.cls, every.cls, atol=1e-6, rtol=1e-5)


@pytest.mark.covers(181)
@pytest.mark.parametrize("start", [0, 1, -1, -2])
def test_a_recording_sees_what_the_contract_returns_whoever_calls_the_tower(backbone, images, start):
    expected = backbone.encode_image(images, attention=True).attention[start:]
    plain = backbone.encode_image(images).cls
    with recording(backbone.image, start) as seen:
        watched = backbone.encode_image(images)
        assert watched.attention is None
        torch.testing.assert_close(watched.cls, plain, atol=1e-5, rtol=1e-4)
        assert len(seen) == len(expected)
        for found, shown in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, shown, atol=1e-6, rtol=1e-4)
        backbone.encode_image(images[:1])
        assert len(seen) == len(expected) and len(seen[0]) == 1, "those of the last pass"
        assert backbone.text.recorded is None
    backbone.encode_image(images)
    assert len(seen[0]) == 1 and backbone.image.recorded is None


@pytest.mark.covers(181)
def test_what_is_recorded_is_what_the_feature_was_computed_from(backbone, images):
    with recording(backbone.image) as seen:
        feature = backbone.encode_image(images.requires_grad_()).cls[:, 0]
        maps = list(seen)
    grads = torch.autograd.grad(feature.square().sum(), maps)
    assert all(grad.abs().max() > 0 for grad in grads)
    # Only the class token's row of the last block leads to its feature.
    assert grads[-1][:, :, 1:].abs().max() == 0 < grads[-1][:, :, 0].abs().max()


def test_recordings_end_with_their_block_also_after_an_error(backbone, images):
    with pytest.raises(ZeroDivisionError), recording(backbone.image, -1):
        _ = 1 / 0
    assert backbone.image.recorded is None and backbone.image.record_from == 0
    with recording(backbone.image) as outer:
        with recording(backbone.image, -1) as inner:
            backbone.encode_image(images)
        assert len(inner) == 1 and not outer
        backbone.encode_image(images)
        assert len(outer) == 2


def test_a_recording_sees_every_pass_also_where_blocks_are_computed_twice(backbone, images):
    backbone.train().set_grad_checkpointing()
    with recording(backbone.image, -1) as seen:
        backbone.encode_image(images.requires_grad_())
    assert len(seen) == 1


# Dropping


def test_dropped_patches_become_the_mean_of_the_kept_ones():
    patches = torch.tensor([[[1.0], [3.0], [8.0]], [[1.0], [2.0], [4.0]]])
    keep = torch.tensor([[True, True, False], [False, False, False]])
    assert fill_dropped(patches, keep)[0].flatten().tolist() == [1, 3, 2]
    assert fill_dropped(patches, keep)[1].isfinite().all()
    assert fill_dropped(patches, None) is patches


def test_a_pass_that_drops_equals_one_that_is_told_to(backbone, images):
    keep = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[:, 0] = True
    told = backbone.encode_image(images, keep=keep)
    with dropping(backbone.image, keep):
        let = backbone.encode_image(images)
    assert torch.equal(let.cls, told.cls) and torch.equal(let.patches, told.patches)
    assert torch.equal(backbone.encode_image(images).cls, backbone.encode_image(images, keep=None).cls)
    assert backbone.image.kept is None
    for row in range(3):
        kept = told.hidden_patches[row, keep[row]].mean(dim=0)
        for place in (~keep[row]).nonzero().flatten():
            torch.testing.assert_close(told.hidden_patches[row, place], kept)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(write_dataset(tmp_path_factory.mktemp("dropping") / "blocks", people=6))


@pytest.mark.covers(185)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_method_reads_a_patch_that_is_dropped(name, corpus):
    method = model(name)
    rows = [0, 4, 8]
    given = pair_batch(method, corpus, rows, None, PixelStore(corpus.paths(), method.backbone.image_size))
    height, width = method.backbone.grid
    keep = torch.ones(3, height * width, dtype=torch.bool)
    dropped = [(0, 0), (2, 1), (3, 0)]
    for y, x in dropped:
        keep[:, y * width + x] = False
    image = given.image
    unseen, seen = image.clone(), image.clone()
    for y, x in dropped:
        unseen[:, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = torch.randn(3, 3, 16, 16)
    seen[:, :, 16:32, :16] = torch.randn(3, 3, 16, 16)  # patch (1, 0) is kept

    def embed(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return method.embed_images(Batch(image=pixels, texts=given.texts, camera=given.camera))

    whole = embed(image)
    with dropping(method.backbone.image, keep):
        before = embed(image)
        assert torch.equal(embed(unseen), before)
        assert not torch.allclose(embed(seen), before, atol=1e-5)
    assert not torch.allclose(before, whole, atol=1e-5)
    assert torch.equal(embed(image), whole)
    assert not torch.allclose(embed(unseen), whole, atol=1e-5)


def test_numbers_that_are_added_to_logits_are_those_of_the_fused_kernel():
    query, key, value = split_heads(torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)), 2)
    bias = -torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) * 3
    fused, _ = attend(query, key, value, mask=bias)
    shown, shares = attend(query, key, value, mask=bias, attention=True)
    torch.testing.assert_close(fused, shown)
    plain = (query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
    torch.testing.assert_close(shares, (plain + bias).softmax(dim=-1))


@pytest.mark.covers(178, 181)
@pytest.mark.parametrize("alike", ["key", "value"])
def test_a_recording_can_be_differentiated_by_where_patches_compare_keys_with_keys(backbone, images, alike):
    local = Local(alike=alike)
    plain = backbone.encode_image(images, local=local).cls[:, 0]
    with recording(backbone.image, -1) as seen:
        shown = backbone.encode_image(images, local=local)
    torch.testing.assert_close(shown.cls[:, 0], plain, atol=1e-5, rtol=1e-4)
    (grad,) = torch.autograd.grad(shown.cls[:, 0].square().sum(), seen)
    assert grad[:, :, 0].abs().max() > 0  # the class token's row
