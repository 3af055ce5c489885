"""ViT and BERT towers against transformers, through folders that transformers wrote."""

from pathlib import Path

import pytest
import torch
import transformers

from reidctl.backbones import weights
from reidctl.backbones.tokenizers import shipped_vocabulary
from reidctl.errors import DataError, UsageError

TEXTS = ["A man in a red coat.", "a tall woman with long black hair, wearing blue jeans and white sneakers", "bag"]


def write_vit(folder: Path, **changes) -> transformers.ViTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**{**sizes, "image_size": 64, "patch_size": 16, **changes})
    model = transformers.ViTModel(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def write_bert(folder: Path, **changes) -> transformers.BertModel:
    torch.manual_seed(1)
    vocabulary = shipped_vocabulary()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(
        **{**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 40, **changes}
    )
    model = transformers.BertModel(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return model


def randomise(model: torch.nn.Module) -> None:
    """Give norms and biases, which start at ones and zeros, values that a wrong mapping would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    vit, bert = write_vit(folder / "vit"), write_bert(folder / "bert")
    return vit, bert, f"vit-bert:{folder / 'vit'}+{folder / 'bert'}"


@pytest.mark.covers(42)
def test_vit_hidden_states_equal_transformers(pair):
    vit, _, spec = pair
    backbone = weights.build(spec).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = vit(images).last_hidden_state
        for attention in (False, True):
            ours = backbone.encode_image(images, attention=attention)
            torch.testing.assert_close(ours.hidden_cls[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.hidden_patches, expected[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.covers(42)
def test_vit_attention_equals_transformers(pair):
    vit, _, spec = pair
    images = torch.randn(2, 3, 64, 64)
    vit.set_attn_implementation("eager")
    with torch.no_grad():
        expected = vit(images, output_attentions=True).attentions
        ours = weights.build(spec).eval().encode_image(images, attention=True).attention
    vit.set_attn_implementation("sdpa")
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.covers(42, 43)
@pytest.mark.parametrize("image_size", [(96, 32), (128, 64)])
def test_vit_of_another_input_size_equals_transformers_interpolation(pair, image_size):
    vit, _, spec = pair
    images = torch.randn(2, 3, *image_size)
    with torch.no_grad():
        expected = vit(images, interpolate_pos_encoding=True).last_hidden_state
        ours = weights.build(spec, image_size).eval().encode_image(images)
    torch.testing.assert_close(ours.hidden_patches, expected[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.covers(42)
def test_bert_hidden_states_equal_transformers(pair):
    _, bert, spec = pair
    backbone = weights.build(spec).eval()
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        expected = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long())
        for attention in (False, True):
            ours = backbone.encode_text(tokens, attention=attention)
            wanted = expected.last_hidden_state[tokens.mask]
            torch.testing.assert_close(ours.hidden[tokens.mask], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
def test_pooled_text_is_the_projection_of_the_chosen_feature(pair, pool):
    _, bert, spec = pair
    backbone = weights.build(spec, pool=pool).eval()
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        expected = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long())
        states = expected.last_hidden_state
        mean = torch.stack([row[mask].mean(0) for row, mask in zip(states, tokens.mask, strict=True)])
        feature = {"cls": states[:, 0], "mean": mean, "pooler": expected.pooler_output}[pool]
        pooled = backbone.encode_text(tokens).pooled
    torch.testing.assert_close(pooled, backbone.text.project(feature), atol=1e-5, rtol=1e-5)


@pytest.mark.covers(21)
def test_word_pieces_equal_transformers_tokenizer(pair):
    spec = pair[2]
    backbone = weights.build(spec)
    reference = transformers.AutoTokenizer.from_pretrained(spec.partition("+")[2])
    texts = [*TEXTS, "", "Café, naïve! unbelievably T-SHIRTS: 3/4 \u4eba", "red " * 60]
    for text in texts:
        expected = reference(text, truncation=True, max_length=backbone.context_length)["input_ids"]
        tokens = backbone.tokenize([text])
        assert tokens.ids[0, tokens.mask[0]].tolist() == expected


@pytest.mark.covers(20, 42)
def test_standard_size_has_196_patches_of_width_768():
    from reidctl.backbones.vit_bert import VitSize, VitTower

    tower = VitTower(VitSize(num_hidden_layers=1), (224, 224), 512)
    features = tower.encode(torch.randn(1, 3, 224, 224))
    assert features.hidden_patches.shape == (1, 196, 768)
    assert features.hidden_cls.shape == (1, 1, 768)


@pytest.mark.covers(20)
def test_pixel_statistics_come_from_the_preprocessor_file_or_are_a_half(tmp_path):
    write_vit(tmp_path / "vit")
    write_bert(tmp_path / "bert")
    spec = f"vit-bert:{tmp_path / 'vit'}+{tmp_path / 'bert'}"
    assert weights.build(spec).mean == (0.5, 0.5, 0.5)
    statistics = '{"image_mean": [0.4, 0.3, 0.2], "image_std": [0.1, 0.2, 0.3], "resample": 3}'
    (tmp_path / "vit" / "preprocessor_config.json").write_text(statistics)
    backbone = weights.build(spec)
    assert (backbone.mean, backbone.std) == ((0.4, 0.3, 0.2), (0.1, 0.2, 0.3))
    assert backbone.config.interpolation == "bicubic"


def test_weights_that_lack_a_layer_are_refused_not_filled_with_noise(tmp_path):
    write_vit(tmp_path / "vit")
    write_bert(tmp_path / "bert")
    config = transformers.ViTConfig.from_pretrained(tmp_path / "vit")
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "vit")
    with pytest.raises(DataError, match="lack 16 tensors of a ViTModel"):
        weights.build(f"vit-bert:{tmp_path / 'vit'}+{tmp_path / 'bert'}")


def test_other_model_types_are_refused(tmp_path):
    transformers.DeiTConfig().save_pretrained(tmp_path / "deit")
    with pytest.raises(UsageError, match="is a `deit` model, not a `vit`"):
        weights.build(f"vit-bert:{tmp_path / 'deit'}+{tmp_path / 'deit'}")


def test_the_small_bert_embeds_every_id_of_the_shipped_vocabulary():
    backbone = weights.build("vit-bert:micro")
    assert backbone.text.words.num_embeddings == len(shipped_vocabulary())
    assert backbone.tokenize(["zebra-crossing w/ 2 TROLLEYS?"]).ids.max() < len(shipped_vocabulary())


@pytest.mark.covers(21)
def test_the_context_of_a_bert_can_be_shorter_but_not_longer_than_its_positions():
    assert weights.build("vit-bert:micro", text_length=12).context_length == 12
    with pytest.raises(UsageError, match=r"positions, so a text cannot have 9000 tokens.*text_length"):
        weights.build("vit-bert:micro", text_length=9000)
