"""From a spec or a saved folder to a backbone, and back to files that need neither network nor the original weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reidctl.backbones.base import Backbone, BackboneConfig
from reidctl.backbones.checkpoints import Grid, fill
from reidctl.config import parse_section
from reidctl.errors import DataError, UsageError

CONFIG_FILE, WEIGHTS_FILE = "backbone.json", "backbone.safetensors"


def build(
    spec: str, image_size: tuple[int, int] | None = None, *, load: bool = True, grid: Grid | None = None, **options: Any
) -> Backbone:
    """Return the backbone that a spec names, with its pretrained weights.

    Specs: `clip:<open_clip model>/<tag, file or hf-hub:id>`, `clip:<open_clip model>` (random weights),
    `vit-bert:<hub id or folder>+<hub id or folder>`, and the small `clip:tiny`, `clip:micro`, `vit-bert:tiny`,
    `vit-bert:micro`, which start from random weights.

    Args:
        image_size: (height, width); default: the checkpoint's own. The position table is interpolated to it.
        load: False builds the same model with random weights (a configuration may still need the network).
        grid: (h, w) in patches of a checkpoint whose position table is not square and that does not say so.
        options: `text_length`, most tokens of a text (a longer context than the checkpoint's is interpolated for CLIP,
            limited to the checkpoint's positions for BERT); `stride` (both); `quick_gelu` (clip); `dim`, `pool` = cls,
            mean or pooler (vit-bert).

    Raises:
        UsageError: a malformed spec or an unknown model.
        DataError: weights that cannot be found, downloaded, read, or that do not fit.
    """
    # The towers import open_clip and transformers, which take seconds: only the one that is asked for.
    kind, colon, _ = spec.partition(":")
    if colon and kind == "clip":
        from reidctl.backbones import clip

        config = clip.configure(spec, image_size=image_size, **options)
        path = clip.find_weights(spec) if load else None
        backbone = clip.ClipBackbone(config)
        if path is not None:
            clip.load_clip(backbone, path, grid)
        return backbone
    if colon and kind == "vit-bert":
        from reidctl.backbones import vit_bert, vit_bert_weights

        config = vit_bert_weights.configure(spec, image_size=image_size, **options)
        model = vit_bert.VitBertBackbone(config)
        if load and spec.removeprefix("vit-bert:") not in vit_bert_weights.SIZES:
            vit_bert_weights.load_vit_bert(model, spec, grid)
        return model
    raise UsageError(f"Unknown backbone `{spec}`.", hint="Use clip:..., vit-bert:..., for instance clip:tiny.")


def to_config(backbone: Backbone) -> dict[str, Any]:
    """Return what `from_config` needs, as JSON types."""
    return backbone.config.model_dump(mode="json")


def from_config(values: Mapping[str, Any]) -> Backbone:
    """Return a backbone with random weights from `to_config`'s dictionary; no network, no file.

    Raises:
        UsageError: an unknown or wrong setting.
    """
    config = parse_section(BackboneConfig, values, "backbone")
    if config.kind == "clip":
        from reidctl.backbones.clip import ClipBackbone

        return ClipBackbone(config)
    from reidctl.backbones.vit_bert import VitBertBackbone

    return VitBertBackbone(config)


def save(backbone: Backbone, folder: Path) -> None:
    """Write the backbone's weights (safetensors) and configuration (JSON) into `folder`; the JSON comes last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    temporary = folder / (WEIGHTS_FILE + ".tmp")
    save_file(weights, temporary, metadata={"grid": f"{backbone.grid[0]}x{backbone.grid[1]}"})
    os.replace(temporary, folder / WEIGHTS_FILE)
    described = folder / (CONFIG_FILE + ".tmp")
    described.write_text(json.dumps(to_config(backbone), indent=1) + "\n", encoding="utf-8")
    os.replace(described, folder / CONFIG_FILE)


def load(folder: Path) -> Backbone:
    """Return the backbone that `save` wrote.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise DataError(f"No saved backbone in {folder}: {error.filename or WEIGHTS_FILE} is missing.") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise DataError(f"The saved backbone in {folder} is damaged: {error}.") from None
    backbone = from_config(values)
    fill(backbone, weights, str(folder / WEIGHTS_FILE))
    return backbone
