"""CLIP: open_clip's towers, run block by block so that prompts, extra class tokens and attention maps fit in."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from reidctl.backbones.attention import Alike, Isolation, Local, attend, attend_alike, split_heads, token_mask
from reidctl.backbones.base import (
    Adapt,
    Backbone,
    BackboneConfig,
    ImageFeatures,
    ImageTower,
    Shown,
    TextFeatures,
    TextTower,
    Tower,
    check_stride,
    fill_dropped,
    join_class_tokens,
    last_real,
    of_patches,
)
from reidctl.backbones.checkpoints import (
    Checkpoint,
    Grid,
    fill,
    read_checkpoint,
    resize_positions,
    resize_text_positions,
    source_grid,
)
from reidctl.backbones.hub import hub_file, unreachable
from reidctl.backbones.tokenizers import ClipTokenizer
from reidctl.console import log
from reidctl.errors import DataError, UsageError

# Sizes that train from scratch on a laptop: the same classes, other numbers. 64 tokens hold long captions.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": [128, 64], "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "micro": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": [64, 32], "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
}
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_ANCHOR = "visual.class_embedding"
# Weights of a CLIP that the towers do not hold: the methods bring their own temperature.
_UNUSED = ("logit_scale", "logit_bias", "text.attn_mask", "attn_mask")
_BLOCK_CHANGES = (
    "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc",
)  # fmt: skip
_TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")


class _ClipTower(Tower):
    """Runs open_clip's residual attention blocks with an attention that can show its probabilities."""

    causal = False

    def run_block(
        self,
        block: nn.Module,
        tokens: Tensor,
        mask: Tensor | None,
        attention: bool,
        alike: Alike | None = None,
        classes: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Equal to `block(tokens)`."""
        parts = cast(Any, block)
        attn = parts.attn
        joined = nn.functional.linear(parts.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        looks = split_heads(joined, attn.num_heads)
        if alike is None:
            mixed, probabilities = attend(*looks, mask=mask, causal=self.causal, attention=attention)
        else:
            mixed, probabilities = attend_alike(*looks, alike, classes, mask=mask, attention=attention)
        tokens = tokens + parts.ls_1(attn.out_proj(mixed))
        return tokens + parts.ls_2(parts.mlp(parts.ln_2(tokens))), probabilities


class ClipImageTower(_ClipTower, ImageTower):
    """open_clip's `VisionTransformer`."""

    def __init__(self, visual: VisionTransformer, image_size: tuple[int, int], stride: int | None = None) -> None:
        super().__init__()
        self.visual = visual
        self.image_size = image_size
        self.patch_size = (int(visual.patch_size[0]), int(visual.patch_size[1]))
        self.width = int(visual.conv1.out_channels)
        if stride is not None:
            _overlap(visual, image_size, stride)
        self.grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.visual.transformer.resblocks)

    @property
    def class_token(self) -> Tensor:
        return cast(Tensor, self.visual.class_embedding)

    @property
    def last_norm(self) -> nn.Module:
        return cast(nn.Module, self.blocks[-1].ln_1)

    @property
    def tail(self) -> Sequence[nn.Parameter]:
        return [*self.visual.ln_post.parameters(), cast(nn.Parameter, self.visual.proj)]

    @property
    def last_mlp_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.blocks[-1]).mlp.c_proj.weight)

    def project(self, hidden: Tensor) -> Tensor:
        return hidden @ cast(Tensor, self.visual.proj)

    def encode(
        self,
        images: Tensor,
        *,
        extra_cls: Tensor | None = None,
        isolation: Isolation = "none",
        keep: Tensor | None = None,
        attention: Shown = False,
        shift: Tensor | None = None,
        adapt: Adapt | None = None,
        local: Local | None = None,
    ) -> ImageFeatures:
        patches = self.visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, V)
        classes = join_class_tokens(self.class_token, extra_cls, len(images), shift).to(patches.dtype)  # (B, K, V)
        table = self.visual.positional_embedding.to(patches.dtype)
        # Extra class tokens share the first one's position, so they differ only by content.
        tokens = self.visual.ln_pre(torch.cat([classes + table[0], patches + table[1:]], dim=1))
        count = classes.shape[1]
        mask = token_mask(count, patches.shape[1], isolation, keep, patches.device)
        tokens, previous, maps = self.run_blocks(tokens, mask, attention, of_patches(adapt, count, keep), local, count)
        hidden = self.visual.ln_post(tokens)
        joint = self.project(hidden)
        return ImageFeatures(
            cls=joint[:, :count],
            patches=fill_dropped(joint[:, count:], keep),
            grid=self.grid,
            hidden_cls=hidden[:, :count],
            hidden_patches=fill_dropped(hidden[:, count:], keep),
            previous_cls=previous[:, :count],
            attention=maps,
        )


class ClipTextTower(_ClipTower, TextTower):
    """open_clip's `TextTransformer`; the feature is the one at the end token."""

    causal = True

    def __init__(self, transformer: TextTransformer) -> None:
        super().__init__()
        self.text = transformer
        self.width = int(transformer.width)
        self.context_length = int(transformer.context_length)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.text.transformer.resblocks)

    def project(self, hidden: Tensor) -> Tensor:
        projection = self.text.text_projection
        return cast(Tensor, projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.text.token_embedding(ids))

    def encode_embedded(
        self, embeddings: Tensor, mask: Tensor, eos_index: Tensor | None = None, *, attention: bool = False
    ) -> TextFeatures:
        tokens = embeddings + self.text.positional_embedding[: embeddings.shape[1]].to(embeddings.dtype)
        # Causal attention never looks right, where the padding is: it needs no padding mask.
        tokens, _, maps = self.run_blocks(tokens, None, attention)
        hidden = self.text.ln_final(tokens)
        joint = self.project(hidden)
        end = last_real(mask) if eos_index is None else eos_index
        pooled = joint[torch.arange(len(joint), device=joint.device), end]
        return TextFeatures(pooled=pooled, tokens=joint, hidden=hidden, attention=maps)


class ClipBackbone(Backbone):
    """A CLIP from its configuration, with random weights until `load_clip` fills it."""

    image: ClipImageTower
    text: ClipTextTower

    def __init__(self, config: BackboneConfig) -> None:
        _check(config)
        vision = {**config.image, "image_size": list(config.image_size)}
        towers = open_clip.CustomTextCLIP(config.dim, vision, config.text, quick_gelu=config.quick_gelu)
        super().__init__(
            config,
            image=ClipImageTower(towers.visual, config.image_size, config.stride),
            text=ClipTextTower(towers.text),
            tokenizer=ClipTokenizer(int(towers.text.context_length)),
        )


def _overlap(visual: VisionTransformer, image_size: tuple[int, int], stride: int) -> None:
    """Let the patches overlap: a smaller step of the same patch projection gives a finer grid (TransReID)."""
    check_stride(stride, int(visual.patch_size[0]))
    visual.conv1.stride = (stride, stride)
    size = cast(tuple[int, int], visual.patch_size)
    visual.grid_size = tuple((whole - patch) // stride + 1 for whole, patch in zip(image_size, size, strict=True))
    rows = visual.grid_size[0] * visual.grid_size[1] + 1
    width = visual.conv1.out_channels
    visual.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(rows, width))


def _check(config: BackboneConfig) -> None:
    """Refuse the open_clip architectures that have no class token and patch tokens of the plain kind."""
    image, text = config.image, config.text
    plain_text = not text.get("hf_model_name") and not text.get("embed_cls") and not text.get("no_causal_mask")
    plain = {
        "a timm image tower": not image.get("timm_model_name"),
        "a ResNet image tower": isinstance(image.get("layers", 12), int),
        "attentional pooling": not image.get("attentional_pool"),
        "a pooled image feature without class token": image.get("pool_type", "tok") == "tok",
        "patch dropout": not image.get("patch_dropout"),
        "a text tower that is not causal": plain_text,
        "a text feature not at the end token": text.get("pool_type", "argmax") in ("argmax", "eos"),
        "no text projection": text.get("proj_type", "linear") != "none",
    }
    plain["changed attention blocks"] = not any(side.get(key) for side in (image, text) for key in _BLOCK_CHANGES)
    for what, fine in plain.items():
        if not fine:
            raise UsageError(f"Backbone {config.spec}: {what} is not supported.",
                             hint="Use a plain ViT model such as clip:ViT-B-16/openai.")  # fmt: skip


def configure(
    spec: str,
    *,
    image_size: tuple[int, int] | None = None,
    text_length: int | None = None,
    stride: int | None = None,
    quick_gelu: bool | None = None,
) -> BackboneConfig:
    """Return the configuration that `clip:<name>/<source>` names.

    Raises:
        UsageError: no such model or tag.
        DataError: a hub model whose configuration cannot be fetched.
    """
    name, source = parse(spec)
    model, statistics = _describe(name, source, spec)
    size = image_size or _pair(model["vision_cfg"].get("image_size", 224))
    gelu = bool(statistics.get("quick_gelu") or model.get("quick_gelu")) if quick_gelu is None else quick_gelu
    return BackboneConfig(
        kind="clip",
        spec=spec,
        image_size=size,
        image={key: value for key, value in model["vision_cfg"].items() if key != "image_size"},
        text={**model["text_cfg"], **({"context_length": text_length} if text_length else {})},
        dim=model["embed_dim"],
        mean=tuple(statistics.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(statistics.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=statistics.get("interpolation") or "bicubic",
        stride=stride,
        quick_gelu=gelu,
    )


def parse(spec: str) -> tuple[str, str]:
    """Split `clip:<name>[/<tag, path or hub id>]` into name and source; the source may be empty."""
    name, _, source = spec.removeprefix("clip:").partition("/")
    return name, source


def is_path(source: str) -> bool:
    """Whether a source is meant as a file rather than a pretrained tag."""
    return source.startswith(("/", "./", "../", "~")) or bool(re.search(r"\.(pt|pth|bin|safetensors)$", source))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _describe(name: str, source: str, spec: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return open_clip's model configuration and the pixel statistics of the pretrained tag."""
    if source.startswith("hf-hub:"):
        return _describe_hub(source)
    model = SIZES.get(name) or open_clip.get_model_config(name)
    if model is None:
        raise UsageError(f"Backbone {spec}: open_clip knows no model `{name}`.",
                         hint="Names are those of open_clip.list_models(), or tiny, micro.")  # fmt: skip
    if not source or is_path(source):
        return model, {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.is_pretrained_cfg(name, source):
        raise UsageError(
            f"Backbone {spec}: `{name}` has no pretrained weights `{source}`.",
            hint=f"Known tags: {', '.join(tags) or 'none'}; a file is given as clip:{name}//path/to/file.",
        )
    return model, open_clip.get_pretrained_cfg(name, source)


def _describe_hub(source: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    path = hub_file(source.removeprefix("hf-hub:"), ["open_clip_config.json"])
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["model_cfg"], content.get("preprocess_cfg", {})


def find_weights(spec: str) -> Path | None:
    """Return the file that a spec names, downloading it if it is a tag or hub id; None for random weights.

    Raises:
        DataError: no such file, or neither in the cache nor downloadable.
    """
    name, source = parse(spec)
    if not source:
        return None
    if is_path(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(
                f"No weights file at {path} (backbone {spec}).", hint="Check the path after the model's name."
            )
        return path
    if source.startswith("hf-hub:"):
        return hub_file(source.removeprefix("hf-hub:"), _HUB_FILES)
    return _pretrained(name, source)


def _pretrained(name: str, tag: str) -> Path:
    """Return the file of a pretrained tag: CLIP's own cache, then the hub's cache and site, then the original site."""
    settings = open_clip.get_pretrained_cfg(name, tag)
    url, hub = settings.get("url", ""), settings.get("hf_hub", "")
    cached = Path("~/.cache/clip").expanduser() / url.rsplit("/", 1)[-1]
    if hub and not (url and cached.is_file()):
        repository, _, file = hub.rpartition("/")
        safe = re.sub(r"\.(bin|pth|pt)$", ".safetensors", file)
        return hub_file(repository, list(dict.fromkeys([safe, file])) if file else _HUB_FILES)
    try:
        return Path(open_clip.download_pretrained(settings, prefer_hf_hub=False))
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(f"the weights `{tag}` of {name}", f"{cached} and {url}", error) from None


def load_clip(backbone: ClipBackbone, path: Path, grid: Grid | None = None) -> None:
    """Fill a CLIP from a file in OpenAI's, open_clip's or a re-identification code's format.

    Args:
        grid: (h, w) of the file's position table, if it is not square and the file does not say.

    Raises:
        DataError: unreadable, or weights that do not fit.
    """
    checkpoint = read_checkpoint(path, _ANCHOR)
    _warn_about_activation(backbone, checkpoint)
    weights = {_tower_name(name): value for name, value in checkpoint.weights.items()}
    table = weights["image.visual.positional_embedding"]
    stated = grid or checkpoint.grid
    source = source_grid(len(table) - 1, backbone.grid, str(path), stated)
    weights["image.visual.positional_embedding"] = resize_positions(table, source, backbone.grid)
    name = "text.text.positional_embedding"
    weights[name] = resize_text_positions(weights[name], backbone.context_length)
    fill(backbone, weights, str(path), ignore=_UNUSED)


def _tower_name(name: str) -> str:
    """Rename a CLIP weight: `visual.` to the image tower, OpenAI's flat text names to the text tower."""
    if name.startswith("visual."):
        return f"image.{name}"
    if name.startswith(_TEXT_PARTS):
        return f"text.text.{name}"
    return f"text.{name}" if name.startswith("text.") and name != "text.attn_mask" else name


def _warn_about_activation(backbone: ClipBackbone, checkpoint: Checkpoint) -> None:
    if (checkpoint.torchscript or checkpoint.wrapped) and not backbone.config.quick_gelu:
        log.warning(
            "%s looks like OpenAI weights or a descendant, which use QuickGELU; the model uses GELU. "
            "Append -quickgelu to the model name if that is so.",
            checkpoint.path,
        )
