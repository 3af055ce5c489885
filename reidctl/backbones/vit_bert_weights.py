"""Where a ViT + BERT comes from: specs, transformers' configurations, vocabularies and weights under our names."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from reidctl.backbones.base import BackboneConfig
from reidctl.backbones.checkpoints import Grid, StateDict, fill, resize_positions, source_grid
from reidctl.backbones.hub import local_only, unreachable
from reidctl.backbones.tokenizers import shipped_vocabulary
from reidctl.backbones.vit_bert import BertSize, Pool, VitBertBackbone, VitSize
from reidctl.errors import DataError, UsageError


def _small(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        # 0.02 is right for width 768; at this width it would leave every block near zero for the first epochs.
        "initializer_range": round(width**-0.5, 4),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# Sizes that train from scratch on a laptop: (image size, ViT, BERT). Their vocabulary is the shipped one.
SIZES: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "tiny": ((64, 32), {**_small(64, 3, 4), "patch_size": 8}, {**_small(64, 2, 4), "max_position_embeddings": 64}),
    "micro": ((64, 32), _small(32, 2, 2), {**_small(32, 2, 2), "max_position_embeddings": 32}),
}


def configure(
    spec: str,
    *,
    image_size: tuple[int, int] | None = None,
    text_length: int | None = None,
    stride: int | None = None,
    dim: int | None = None,
    pool: Pool = "cls",
) -> BackboneConfig:
    """Return the configuration that `vit-bert:<hub id or folder>+<hub id or folder>` (or `vit-bert:tiny`) names.

    Raises:
        UsageError: a malformed spec, other model types than ViT and BERT, or texts longer than the BERT's positions.
        DataError: configuration or vocabulary neither here nor downloadable.
    """
    name = spec.removeprefix("vit-bert:")
    if name in SIZES:
        size, vit, bert = SIZES[name]
        length = _text_length(text_length, bert["max_position_embeddings"], spec)
        text = {**bert, "vocab_size": len(shipped_vocabulary()), "context_length": length}
        return _config(spec, image_size or size, VitSize(**vit), text, dim=dim, pool=pool, stride=stride)
    image_source, text_source = parse(spec)
    vit_config, bert_config = _hub_config(image_source, "vit"), _hub_config(text_source, "bert")
    native = vit_config["image_size"]
    size = image_size or ((native, native) if isinstance(native, int) else (native[0], native[1]))
    known = {key: vit_config[key] for key in VitSize.model_fields if key in vit_config}
    text = {key: bert_config[key] for key in BertSize.model_fields if key in bert_config}
    if text_length is not None:
        text["context_length"] = _text_length(text_length, int(bert_config["max_position_embeddings"]), spec)
    vocabulary, lower_case = _vocabulary(text_source)
    config = _config(spec, size, VitSize(**known), text, dim=dim, pool=pool, stride=stride)
    return config.replace(vocabulary=vocabulary, lower_case=lower_case, **_pixel_statistics(image_source))


def _text_length(wanted: int | None, most: int, spec: str) -> int:
    if wanted is not None and wanted > most:
        raise UsageError(
            f"Backbone {spec}: its BERT has {most} positions, so a text cannot have {wanted} tokens.",
            hint="Lower backbone.text_length.",
        )
    return wanted or most


def parse(spec: str) -> tuple[str, str]:
    """Split `vit-bert:<image source>+<text source>`."""
    image, plus, text = spec.removeprefix("vit-bert:").partition("+")
    if not (image and plus and text):
        raise UsageError(
            f"Backbone `{spec}` is not of the form vit-bert:<ViT>+<BERT>.",
            hint="For instance vit-bert:google/vit-base-patch16-224+bert-base-uncased, or vit-bert:tiny.",
        )
    return image, text


def _config(
    spec: str, image_size: tuple[int, int], vit: VitSize, text: dict[str, Any],
    *, dim: int | None, pool: Pool, stride: int | None,
) -> BackboneConfig:  # fmt: skip
    return BackboneConfig(
        kind="vit-bert",
        spec=spec,
        image_size=image_size,
        image=vit.model_dump(),
        text=text,
        dim=dim or min(vit.hidden_size, 512),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        pool=pool,
        stride=stride,
    )


def _hub_config(source: str, model_type: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_only(source))
    except (OSError, ValueError) as error:
        raise unreachable(
            f"the configuration of {source}", "that folder, the Hugging Face cache and hub", error
        ) from None
    if config.model_type != model_type:
        raise UsageError(f"{source} is a `{config.model_type}` model, not a `{model_type}`.")
    return cast(dict[str, Any], config.to_dict())


def _vocabulary(source: str) -> tuple[tuple[str, ...], bool]:
    """Return the WordPiece vocabulary of a BERT, in order, and whether it is lower-cased."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only(source))
    except (OSError, ValueError) as error:
        raise unreachable(f"the vocabulary of {source}", "that folder, the Hugging Face cache and hub", error) from None
    ids = cast(dict[str, int], tokenizer.get_vocab())
    return tuple(sorted(ids, key=ids.__getitem__)), bool(getattr(tokenizer, "do_lower_case", True))


def _pixel_statistics(source: str) -> dict[str, Any]:
    """Return what a folder's or hub model's preprocessor file says of pixel statistics; ViT's 0.5 without one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local_only(source))
    except (OSError, ValueError):
        return {}
    found = {
        ours: tuple(content[name]) for ours, name in (("mean", "image_mean"), ("std", "image_std")) if name in content
    }
    resample = {2: "bilinear", 3: "bicubic"}.get(content.get("resample", 2), "bilinear")  # Pillow's codes
    return {**found, "interpolation": resample}


def load_vit_bert(backbone: VitBertBackbone, spec: str, grid: Grid | None = None) -> None:
    """Fill both towers from the folders or hub ids of a spec; the joint projections keep their initial values.

    Raises:
        DataError: weights neither here nor downloadable, or that do not fit.
    """
    image_source, text_source = parse(spec)
    vit = _rename(_hub_weights(image_source, "ViTModel"), _VIT_NAMES)
    table = vit["positions"][0]
    source = source_grid(len(table) - 1, backbone.grid, image_source, grid)
    vit["positions"] = resize_positions(table, source, backbone.grid, antialias=False)
    vit["cls_token"] = vit["cls_token"].flatten()
    bert = _rename(_hub_weights(text_source, "BertModel", pooler=backbone.text.pool == "pooler"), _BERT_NAMES)
    for tower, weights, where in ((backbone.image, vit, image_source), (backbone.text, bert, text_source)):
        own = {"projection.weight": tower.projection.weight.detach()}
        fill(tower, {**weights, **own}, where, ignore=("pooler.",))


def _hub_weights(source: str, architecture: str, *, pooler: bool = False) -> StateDict:
    """Return a model's weights as transformers reads them: any file layout and any of its historical names."""
    import transformers

    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            source, output_loading_info=True, local_files_only=local_only(source)
        )
    except (OSError, ValueError) as error:
        raise unreachable(f"the weights of {source}", "that folder, the Hugging Face cache and hub", error) from None
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(name for name in info["missing_keys"] if pooler or not name.startswith("pooler."))
    if missing:
        raise DataError(
            f"The weights in {source} lack {len(missing)} tensors of a {architecture} ({', '.join(missing[:3])})."
        )
    return cast(StateDict, model.state_dict())


# transformers' names, today's and those before version 5, and ours.
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_VIT_NAMES: dict[str, str] = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "positions",
    r"embeddings\.patch_embeddings\.projection\.(.*)": r"patch_projection.\1",
    r"layernorm\.(.*)": r"norm.\1",
    _LAYER + r"attention\.attention\.(query|key|value)\.(.*)": r"layers.\1.\2.\3",
    _LAYER + r"attention\.q_proj\.(.*)": r"layers.\1.query.\2",
    _LAYER + r"attention\.k_proj\.(.*)": r"layers.\1.key.\2",
    _LAYER + r"attention\.v_proj\.(.*)": r"layers.\1.value.\2",
    _LAYER + r"attention\.(?:output\.dense|o_proj)\.(.*)": r"layers.\1.out.\2",
    _LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.*)": r"layers.\1.fc1.\2",
    _LAYER + r"(?:output\.dense|mlp\.fc2)\.(.*)": r"layers.\1.fc2.\2",
    _LAYER + r"layernorm_before\.(.*)": r"layers.\1.norm1.\2",
    _LAYER + r"layernorm_after\.(.*)": r"layers.\1.norm2.\2",
    r"pooler\.dense\.(.*)": r"pooler.\1",
}
_BERT_NAMES: dict[str, str] = {
    r"embeddings\.word_embeddings\.weight": "words.weight",
    r"embeddings\.position_embeddings\.weight": "positions.weight",
    r"embeddings\.token_type_embeddings\.weight": "types.weight",
    r"embeddings\.LayerNorm\.(.*)": r"norm.\1",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(.*)": r"layers.\1.\2.\3",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)": r"layers.\1.out.\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.*)": r"layers.\1.norm1.\2",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)": r"layers.\1.fc1.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(.*)": r"layers.\1.fc2.\2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.*)": r"layers.\1.norm2.\2",
    r"pooler\.dense\.(.*)": r"pooler.\1",
}


def _rename(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> StateDict:
    """Give transformers' weights our names and join query, key and value into one matrix."""
    renamed: StateDict = {}
    for name, value in weights.items():
        for pattern, ours in names.items():
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, ours, name)] = value
                break
    for name in [name for name in renamed if ".query." in name]:
        trio = [renamed.pop(name.replace(".query.", part)) for part in (".query.", ".key.", ".value.")]
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(trio)
    return renamed
