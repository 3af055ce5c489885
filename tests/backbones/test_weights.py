"""Weights from the formats people have, into our towers, and out again."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from reidctl.backbones import hub, weights
from reidctl.backbones.checkpoints import resize_positions, source_grid
from reidctl.backbones.clip import SIZES
from reidctl.errors import DataError, UsageError

MICRO = SIZES["micro"]


def clip_weights(**changes) -> dict[str, torch.Tensor]:
    """A state dict with OpenAI's names, random weights."""
    torch.manual_seed(3)
    vision = {**MICRO["vision_cfg"], **changes}
    return open_clip.CLIP(MICRO["embed_dim"], vision, MICRO["text_cfg"]).state_dict()


def image_feature(spec: str, **options) -> torch.Tensor:
    backbone = weights.build(spec, **options).eval()
    images = torch.ones(1, 3, *backbone.image_size)
    with torch.no_grad():
        return backbone.encode_image(images).cls


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.mark.covers(41)
def test_every_file_format_gives_the_same_backbone(tmp_path):
    state = clip_weights()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "training.pt")
    save_file(state, tmp_path / "safe.safetensors")
    irra = {f"base_model.{name}": value for name, value in state.items()}
    torch.save({"model": {**irra, "classifier.weight": torch.zeros(5, 32)}}, tmp_path / "irra.pth")
    files = ("plain.pt", "training.pt", "safe.safetensors", "irra.pth")
    features = [image_feature(f"clip:micro/{tmp_path / file}") for file in files]
    for feature in features[1:]:
        assert torch.equal(feature, features[0])
    assert not torch.allclose(features[0], image_feature("clip:micro"))


class Archive(torch.nn.Module):
    """Holds a state dict under its names, as OpenAI's TorchScript files do."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.covers(41)
def test_openai_torchscript_archives_are_read_without_running_them(tmp_path, caplog):
    torch.manual_seed(3)
    model = open_clip.CLIP(MICRO["embed_dim"], MICRO["vision_cfg"], MICRO["text_cfg"])
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.jit.trace(Archive(model), torch.zeros(1)).save(str(tmp_path / "jit.pt"))
    scripted = image_feature(f"clip:micro/{tmp_path / 'jit.pt'}")
    assert torch.equal(scripted, image_feature(f"clip:micro/{tmp_path / 'plain.pt'}"))


def test_files_with_code_in_them_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    torch.save({"visual.class_embedding": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(DataError, match="would run code"):
        weights.build(f"clip:micro/{tmp_path / 'bomb.pt'}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["text.pt", "text.safetensors", "empty.pt"])
def test_files_that_are_no_weights_are_named(tmp_path, name):
    (tmp_path / name).write_text("" if name.startswith("empty") else "hello, this is not a checkpoint")
    with pytest.raises(DataError, match=name):
        weights.build(f"clip:micro/{tmp_path / name}")


def test_a_missing_file_is_named_before_any_model_is_built():
    with pytest.raises(DataError, match=r"No weights file at /nowhere/clip\.pt"):
        weights.build("clip:ViT-B-16//nowhere/clip.pt")


def test_weights_that_do_not_fit_are_counted_and_named(tmp_path):
    torch.save(clip_weights(layers=3), tmp_path / "deeper.pt")
    with pytest.raises(DataError, match=r"12 unknown \(image.visual.transformer.resblocks.2"):
        weights.build(f"clip:micro/{tmp_path / 'deeper.pt'}")
    torch.save(clip_weights(layers=1), tmp_path / "shallower.pt")
    with pytest.raises(DataError, match="12 missing"):
        weights.build(f"clip:micro/{tmp_path / 'shallower.pt'}")
    torch.save(clip_weights(patch_size=8, image_size=[32, 16]), tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"1 of another shape \(image.visual.conv1.weight \(32, 3, 8, 8\)"):
        weights.build(f"clip:micro/{tmp_path / 'other.pt'}")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "none.pt")
    with pytest.raises(DataError, match=r"holds no `visual.class_embedding` among its 1 tensors \(first: weight\)"):
        weights.build(f"clip:micro/{tmp_path / 'none.pt'}")


@pytest.mark.parametrize(
    "spec",
    [
        "clip:ViT-B-16/openai",
        "clip:ViT-B-32/laion2b_s34b_b79k",
        "clip:any/hf-hub:nobody/nothing",
        "vit-bert:google/vit-base-patch16-224+bert-base-uncased",
    ],
)
def test_without_network_the_message_says_what_was_sought_and_how_to_give_a_file(spec, no_network):
    with pytest.raises(DataError) as caught:
        weights.build(spec)
    assert "Could not get" in caught.value.message
    assert "nothing was downloaded" in caught.value.message
    assert "clip:ViT-B-16//path/to/file.safetensors" in caught.value.hint


def test_offline_is_believed_when_the_user_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.offline()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert not hub.offline()


@pytest.mark.parametrize(
    "spec", ["clip", "resnet:50", "vit-bert:only-one", "clip:ViT-Z-99", "clip:ViT-B-16/no_such_tag"]
)
def test_malformed_specs_are_usage_errors(spec):
    with pytest.raises(UsageError) as caught:
        weights.build(spec)
    assert caught.value.hint


@pytest.mark.covers(43)
def test_resizing_positions_to_their_own_grid_is_the_identity():
    table = torch.randn(1 + 12, 5)
    assert torch.equal(resize_positions(table, (4, 3), (4, 3)), table)


@pytest.mark.covers(43)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("target", [(24, 8), (16, 8), (7, 7), (28, 14)])
def test_a_linear_field_is_reproduced_on_the_new_grid(antialias, target):
    def field(height: int, width: int) -> torch.Tensor:
        """2 y - 3 x at the centres of the cells of the unit square, shape (1 + height * width, 1)."""
        y = (torch.arange(height) + 0.5)[:, None] / height
        x = (torch.arange(width) + 0.5)[None] / width
        return torch.cat([torch.tensor([9.0]), (2 * y - 3 * x).flatten()])[:, None]

    resized = resize_positions(field(14, 14), (14, 14), target, antialias=antialias)
    error = (resized - field(*target)).abs()
    assert error[0] == 0
    inner = error[1:].view(target)[2:-2, 2:-2]  # at the border bicubic has no neighbours to follow
    assert inner.numel() > 0
    assert inner.max() < 0.02


@pytest.mark.covers(43)
def test_a_non_square_table_is_resized_only_with_its_grid(tmp_path):
    state = clip_weights(image_size=[96, 32])  # 6 x 2 patches
    torch.save(state, tmp_path / "oblong.pt")
    spec = f"clip:micro/{tmp_path / 'oblong.pt'}"
    with pytest.raises(DataError, match="12 patches, which is no square"):
        weights.build(spec)
    backbone = weights.build(spec, grid=(6, 2))
    expected = resize_positions(state["visual.positional_embedding"], (6, 2), (4, 2))
    assert torch.equal(backbone.image.visual.positional_embedding, expected)
    save_file(state, tmp_path / "oblong.safetensors", metadata={"grid": "6x2"})
    named = weights.build(f"clip:micro/{tmp_path / 'oblong.safetensors'}")
    assert torch.equal(named.image.visual.positional_embedding, expected)


def test_a_stated_grid_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="a grid of 5x5 for a position table of 24 patches"):
        source_grid(24, (4, 2), "file", (5, 5))
    assert source_grid(16, (8, 2), "file") == (8, 2)
    assert source_grid(16, (4, 2), "file") == (4, 4)
    assert source_grid(16, (4, 2), "file", (8, 2)) == (8, 2)


@pytest.mark.covers(41, 42)
@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
def test_saved_backbones_return_bit_identical_without_their_origin(spec, tmp_path, no_network):
    torch.manual_seed(5)
    backbone = weights.build(spec, (96, 32)).eval()
    weights.save(backbone, tmp_path / "saved")
    again = weights.load(tmp_path / "saved").eval()
    images = torch.randn(2, 3, 96, 32)
    tokens = backbone.tokenize(["a red coat"])
    assert torch.equal(again.tokenize(["a red coat"]).ids, tokens.ids)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images).cls, backbone.encode_image(images).cls)
        assert torch.equal(again.encode_text(tokens).pooled, backbone.encode_text(tokens).pooled)


def test_configurations_survive_json(tmp_path):
    backbone = weights.build("vit-bert:micro", pool="mean", stride=8)
    values = json.loads(json.dumps(weights.to_config(backbone)))
    again = weights.from_config(values)
    assert again.config == backbone.config
    assert again.grid == (7, 3)
    assert again.text.pool == "mean"
    with pytest.raises(UsageError, match=r"backbone\.colour"):
        weights.from_config({**values, "colour": "red"})


def test_incomplete_or_damaged_folders_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="No saved backbone"):
        weights.load(tmp_path)
    weights.save(weights.build("clip:micro"), tmp_path)
    (tmp_path / "backbone.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged"):
        weights.load(tmp_path)
    (tmp_path / "backbone.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        weights.load(tmp_path)


@pytest.mark.covers(41, 42)
@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
def test_the_smallest_size_learns_to_match_four_pairs(spec):
    torch.manual_seed(0)
    backbone = weights.build(spec).train()
    images = torch.rand(4, 3, 1, 1).expand(4, 3, 64, 32) * 4 - 2
    tokens = backbone.tokenize(["red coat", "blue jeans", "white hat", "black bag"])
    optimiser = torch.optim.Adam(backbone.parameters(), lr=2e-3)
    target = torch.arange(4)
    for _ in range(60):
        image = torch.nn.functional.normalize(backbone.encode_image(images).cls[:, 0], dim=-1)
        text = torch.nn.functional.normalize(backbone.encode_text(tokens).pooled, dim=-1)
        loss = torch.nn.functional.cross_entropy(image @ text.T / 0.1, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (image @ text.T).argmax(1).tolist() == [0, 1, 2, 3]
    assert loss < 0.5
