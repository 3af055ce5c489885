"""The sizes of a CLIP's towers, read from the shapes of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
from torch import Tensor

from reidctl.backbones.base import BackboneConfig
from reidctl.backbones.checkpoints import Grid, resize_positions
from reidctl.backbones.clip import configure
from reidctl.convert.names import IMAGE, TEXT, Form
from reidctl.convert.reading import Published
from reidctl.errors import DataError, UsageError

# Heads are 64 wide in all of OpenAI's CLIPs; no weight's shape tells.
_HEAD = 64
# The models that ReID codes start from, by open_clip's names.
_KNOWN = ("ViT-B-16", "ViT-B-32", "ViT-L-14")
# Steps between patches that published runs use beside the patch size itself.
_STRIDES = (12,)
_NEEDED = (
    f"{IMAGE}conv1.weight",
    f"{IMAGE}positional_embedding",
    f"{IMAGE}proj",
    f"{TEXT}token_embedding.weight",
    f"{TEXT}positional_embedding",
    f"{TEXT}ln_final.weight",
)


@dataclass(frozen=True)
class Asked:
    """What is told about the towers beside the file.

    Attributes:
        model: open_clip's name of the model; None: read from the shapes.
        image_size: (height, width); None: the size that the code trains with, or a square.
        stride: step between patches; None: what the position table fits.
    """

    model: str | None = None
    image_size: tuple[int, int] | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Layout:
    """How patches lie on an image: its size, the step between them, their grid, and what was assumed about it."""

    image_size: tuple[int, int]
    stride: int
    grid: Grid
    note: str = ""


def configure_towers(
    weights: Mapping[str, Tensor], form: Form, published: Published, asked: Asked
) -> tuple[BackboneConfig, dict[str, Tensor], list[str]]:
    """Return the configuration of the towers, their position table where it had to be resampled, and notes.

    Args:
        weights: tensors by our names.
        form: where the image size and the pixel statistics come from.
        published: the file.
        asked: what the user says of it.

    Raises:
        UsageError: an unknown model, or sizes that no head width divides.
        DataError: weights are missing, or the position table fits no image size that is known.
    """
    where = str(published.path)
    missing = [name for name in _NEEDED if name not in weights]
    if missing:
        raise DataError(
            f"{where} lacks {len(missing)} of {len(_NEEDED)} tensors that tell its sizes: {', '.join(missing[:3])}.",
            hint="It must hold both towers of a CLIP.",
        )
    patch = int(weights[f"{IMAGE}conv1.weight"].shape[-1])
    table = weights[f"{IMAGE}positional_embedding"]
    source = _source(len(table) - 1, patch, form, published, asked)
    size = asked.image_size or source.image_size
    stride = asked.stride or source.stride
    target = _grid(size, patch, stride)
    config, notes = _config(weights, form, published, asked, size, None if stride == patch else stride)
    notes = [note for note in (source.note, *notes) if note]
    if target == source.grid:
        return config, {}, notes
    notes.append(f"The position table was resampled from {_x(source.grid)} to {_x(target)} patches.")
    return config, {f"{IMAGE}positional_embedding": resize_positions(table, source.grid, target)}, notes


def _grid(size: tuple[int, int], patch: int, stride: int) -> Grid:
    return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1


def _x(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _source(rows: int, patch: int, form: Form, published: Published, asked: Asked) -> Layout:
    """How the patches of the file's own position table lie: as it says, as told, as its code trains, or square."""
    side = round(rows**0.5)
    fits = published.grid or (side, side)
    if published.grid is None:
        strides = (asked.stride,) if asked.stride else (patch, *(step for step in _STRIDES if step < patch))
        for size in filter(None, (asked.image_size, form.image_size)):
            for stride in strides:
                grid = _grid(size, patch, stride)
                if grid[0] * grid[1] == rows:
                    told = size == asked.image_size and (asked.stride or stride == patch)
                    note = f"Taken as {_x(size)} pixels with a step of {stride}: {form.says} trains so."
                    return Layout(size, stride, grid, "" if told else note)
    if fits[0] * fits[1] != rows:
        raise DataError(
            f"{published.path}: its position table has {rows} patches, which is no square"
            f"{f' and not what {_x(form.image_size)} pixels give' if form.image_size else ''}.",
            hint="Give --image-size HEIGHT WIDTH and, if patches overlap, --stride.",
        )
    return Layout((fits[0] * patch, fits[1] * patch), patch, fits)


def _config(
    weights: Mapping[str, Tensor],
    form: Form,
    published: Published,
    asked: Asked,
    size: tuple[int, int],
    stride: int | None,
) -> tuple[BackboneConfig, list[str]]:
    if asked.model is None:
        image, text, dim = _sizes(weights, str(published.path))
        name = next((known for known in _KNOWN if _same(known, image, text, dim)), "")
        quick, notes = _activation(form, published)
        config = BackboneConfig(
            kind="clip",
            spec=_spec(name or f"vit-{image['width']}x{image['layers']}", form, published),
            image_size=size,
            image=image,
            text=text,
            dim=dim,
            mean=open_clip.OPENAI_DATASET_MEAN,
            std=open_clip.OPENAI_DATASET_STD,
            stride=stride,
            quick_gelu=quick,
        )
    else:
        config = configure(
            f"clip:{asked.model}",
            image_size=size,
            text_length=len(weights[f"{TEXT}positional_embedding"]),
            stride=stride,
            quick_gelu=True if _of_openai(asked.model, form, published) else None,
        )
        config, notes = config.replace(spec=_spec(asked.model, form, published)), []
    if form.statistics is not None:
        half = (form.statistics,) * 3
        config = config.replace(mean=half, std=half)
    return config.replace(interpolation=form.interpolation), notes


def _sizes(weights: Mapping[str, Tensor], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The two towers in open_clip's words and the joint width."""
    conv = weights[f"{IMAGE}conv1.weight"]
    width, narrow = int(conv.shape[0]), int(weights[f"{TEXT}ln_final.weight"].shape[0])
    for tower, wide in (("image", width), ("text", narrow)):
        if wide % _HEAD:
            raise UsageError(
                f"{where}: the {tower} tower is {wide} wide, which heads of {_HEAD} do not divide.",
                hint="Give --model, open_clip's name of the architecture.",
            )
    image: dict[str, Any] = {
        "patch_size": int(conv.shape[-1]),
        "width": width,
        "layers": _layers(weights, IMAGE),
        "head_width": _HEAD,
    }
    ratio = weights[f"{IMAGE}transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width
    if ratio != 4:
        image["mlp_ratio"] = ratio
    text = {
        "context_length": len(weights[f"{TEXT}positional_embedding"]),
        "vocab_size": len(weights[f"{TEXT}token_embedding.weight"]),
        "width": narrow,
        "heads": narrow // _HEAD,
        "layers": _layers(weights, TEXT),
    }
    return image, text, int(weights[f"{IMAGE}proj"].shape[1])


def _layers(weights: Mapping[str, Tensor], tower: str) -> int:
    start = f"{tower}transformer.resblocks."
    return len({name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)})


def _same(known: str, image: Mapping[str, Any], text: Mapping[str, Any], dim: int) -> bool:
    """Whether towers are those of a model of open_clip; the context may be longer."""
    model = open_clip.get_model_config(known)
    theirs = {"head_width": _HEAD, **model["vision_cfg"]}
    alike = all(theirs.get(name) == value for name, value in image.items())
    words = {name: value for name, value in text.items() if name != "context_length"}
    return alike and dim == model["embed_dim"] and all(model["text_cfg"][name] == words[name] for name in words)


def _activation(form: Form, published: Published) -> tuple[bool, list[str]]:
    """Whether the towers have QuickGELU, and a note where the file does not say."""
    if form.openai or published.torchscript or "input_resolution" in published.weights:
        return True, []
    return False, [
        "No weight tells the activation: taken as GELU. For descendants of OpenAI's weights give --model with "
        "-quickgelu at its end, such as ViT-B-16-quickgelu."
    ]


def _of_openai(name: str, form: Form, published: Published) -> bool:
    """Whether OpenAI published towers of this name, and the file, or the code that wrote it, is of those."""
    known = open_clip.is_pretrained_cfg(name.removesuffix("-quickgelu"), "openai")
    return bool(known) and (form.openai or published.torchscript)


def _spec(name: str, form: Form, published: Published) -> str:
    """What the towers are called: OpenAI's weights where a code starts from them, else the file itself."""
    if _of_openai(name, form, published):
        return f"clip:{name.removesuffix('-quickgelu')}/openai"
    return f"clip:{name}/{published.path.resolve()}"
