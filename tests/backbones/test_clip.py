"""CLIP towers against open_clip's own forward pass."""

import open_clip
import pytest
import torch
from torch.nn import functional as F

from reidctl.backbones import weights
from reidctl.backbones.base import Backbone
from reidctl.errors import UsageError

CAPTIONS = ["A man in a red coat.", "a tall woman with long black hair, wearing blue jeans and white sneakers", "bag"]


def reference(
    name: str, *, custom: bool, quick_gelu: bool, image_size: tuple[int, int] | None = None
) -> torch.nn.Module:
    """An open_clip model with random weights; small unless a name of open_clip's own is given."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name) if name.startswith("ViT") else dict(SMALL[name])
    vision = {**config["vision_cfg"]}
    if image_size:
        vision["image_size"] = image_size
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(config["embed_dim"], vision, config["text_cfg"], quick_gelu=quick_gelu).eval()


SMALL = {
    "micro": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": [64, 32], "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": [128, 64], "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
}


def twin(model: torch.nn.Module, spec: str, tmp_path, **options) -> Backbone:
    """The same weights in our backbone, through a file in open_clip's format."""
    path = tmp_path / "open_clip.pt"
    torch.save(model.state_dict(), path)
    return weights.build(f"{spec}/{path}", **options).eval()


@pytest.mark.covers(41)
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_pooled_features_equal_open_clip(name, custom, quick_gelu, tmp_path):
    model = reference(name, custom=custom, quick_gelu=quick_gelu)
    backbone = twin(model, f"clip:{name}", tmp_path, quick_gelu=quick_gelu)
    images = torch.randn(3, 3, *backbone.image_size)
    ids = open_clip.tokenize(CAPTIONS, context_length=backbone.context_length)
    with torch.no_grad():
        for attention in (False, True):
            ours = backbone.encode_image(images, attention=attention)
            torch.testing.assert_close(ours.cls[:, 0], model.encode_image(images), atol=1e-5, rtol=1e-5)
            text = backbone.encode_text(backbone.tokenize(CAPTIONS), attention=attention)
            torch.testing.assert_close(text.pooled, model.encode_text(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.covers(41)
@pytest.mark.slow
def test_vit_b_16_equals_open_clip_with_openai_settings(tmp_path):
    model = reference("ViT-B-16-quickgelu", custom=False, quick_gelu=True)
    backbone = twin(model, "clip:ViT-B-16-quickgelu", tmp_path)
    assert (backbone.width_image, backbone.width_text, backbone.dim, backbone.context_length) == (768, 512, 512, 77)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours = backbone.encode_image(images)
        torch.testing.assert_close(ours.cls[:, 0], model.encode_image(images), atol=1e-5, rtol=1e-5)
        text = backbone.encode_text(backbone.tokenize(CAPTIONS)).pooled
        torch.testing.assert_close(text, model.encode_text(open_clip.tokenize(CAPTIONS)), atol=1e-5, rtol=1e-5)


@pytest.mark.covers(43)
def test_position_table_of_a_square_checkpoint_is_resized_as_open_clip_does(tmp_path):
    square = reference("tiny", custom=False, quick_gelu=False, image_size=(96, 96))
    oblong = reference("tiny", custom=False, quick_gelu=False)
    path = tmp_path / "square.pt"
    torch.save(square.state_dict(), path)
    open_clip.load_checkpoint(oblong, str(path))
    backbone = weights.build(f"clip:tiny/{path}").eval()
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.encode_image(images).cls[:, 0], oblong.encode_image(images), atol=1e-5, rtol=1e-5
        )


@pytest.mark.covers(21)
def test_a_longer_context_reads_longer_texts_and_interpolates_the_checkpoints_positions(tmp_path):
    model = reference("micro", custom=False, quick_gelu=False)
    short, long = (twin(model, "clip:micro", tmp_path, text_length=length) for length in (None, 63))
    text = " ".join(["red"] * 50)
    assert (short.tokenize([text]).ids.shape[1], long.tokenize([text]).ids.shape[1]) == (32, 52)
    assert (short.truncation_rate([text]), long.truncation_rate([text])) == (1.0, 0.0)
    table, stretched = (b.text.text.positional_embedding.detach() for b in (short, long))
    # 31 steps become 62: every second row is one of the checkpoint's, those between are means of two.
    torch.testing.assert_close(stretched[::2], table)
    torch.testing.assert_close(stretched[1::2], (table[:-1] + table[1:]) / 2)
    cut = twin(model, "clip:micro", tmp_path, text_length=16)
    assert torch.equal(cut.text.text.positional_embedding, table[:16])
    with torch.no_grad():
        assert torch.isfinite(long.encode_text(long.tokenize([text])).pooled).all()
        few = short.tokenize(CAPTIONS[:1])
        torch.testing.assert_close(cut.encode_text(few).pooled, short.encode_text(few).pooled)


def test_patches_pass_the_last_norm_and_the_projection(tmp_path):
    model = reference("micro", custom=False, quick_gelu=False)
    backbone = twin(model, "clip:micro", tmp_path)
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        tokens = model.visual.forward_intermediates(images, output_fmt="NLC", normalize_intermediates=True)
        expected = tokens["image_intermediates"][-1]
        ours = backbone.encode_image(images)
    torch.testing.assert_close(ours.hidden_patches, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.patches, expected @ model.visual.proj, atol=1e-5, rtol=1e-5)


def test_tokens_equal_open_clip_tokenizer_up_to_padding():
    backbone = weights.build("clip:micro")
    texts = [*CAPTIONS, "", "café — naïve", "x" * 300, "  many   spaces\tand it's TIE-DYED &amp; new 12345"]
    expected = open_clip.tokenize(texts, context_length=backbone.context_length)
    tokens = backbone.tokenize(texts)
    padded = F.pad(tokens.ids, (0, backbone.context_length - tokens.ids.shape[1]))
    assert torch.equal(padded, expected)
    assert torch.equal(tokens.mask, tokens.ids != 0)


def test_overlapping_patches_refine_the_grid():
    backbone = weights.build("clip:micro", stride=8)
    assert backbone.grid == (7, 3)  # (64 - 16) / 8 + 1 and (32 - 16) / 8 + 1
    assert backbone.encode_image(torch.randn(1, 3, 64, 32)).patches.shape == (1, 21, 32)


@pytest.mark.covers(20)
@pytest.mark.parametrize(
    ("image_size", "grid"), [((384, 128), (24, 8)), ((256, 128), (16, 8)), ((224, 224), (14, 14)), (None, (8, 4))]
)
def test_patch_count_follows_the_image_size(image_size, grid):
    backbone = weights.build("clip:tiny", image_size)
    assert backbone.grid == grid
    features = backbone.encode_image(torch.randn(1, 3, *backbone.image_size))
    assert features.grid == grid
    assert features.patches.shape[1] == grid[0] * grid[1]


@pytest.mark.covers(20)
def test_pixel_statistics_are_the_checkpoints():
    backbone = weights.build("clip:ViT-B-32/laion2b_s34b_b79k", load=False)
    assert backbone.mean == (0.48145466, 0.4578275, 0.40821073)
    assert backbone.std == (0.26862954, 0.26130258, 0.27577711)
    from reidctl.backbones.clip import configure

    inception = configure("clip:ViT-B-16/datacomp_xl_s13b_b90k")
    assert inception.quick_gelu is False
    assert configure("clip:ViT-B-16/openai").quick_gelu is True


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32"])
def test_architectures_without_plain_class_and_patch_tokens_are_refused(name):
    with pytest.raises(UsageError, match="is not supported"):
        weights.build(f"clip:{name}", load=False)
