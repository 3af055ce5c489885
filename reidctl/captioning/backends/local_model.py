"""Loading a vision-language model with its processor, and saying clearly why that fails."""

import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidctl.backbones.hub import local_only, offline
from reidctl.captioning.config import LocalConfig
from reidctl.console import log
from reidctl.errors import DataError, ReidctlError, UsageError

if TYPE_CHECKING:
    import torch

_NEEDED = "4.46"  # 4.44 has no AutoModelForImageTextToText
_SLICE = 2**20
_HUB_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")


def locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id in `name`, and the revision of a hub id.

    Raises:
        UsageError: it is neither.
        DataError: the folder is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), None
    if name.startswith((".", "/", "~")):
        raise DataError(f"There is no folder {folder}.", hint="hf: takes a model's folder or its id on the hub.")
    source, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(source) or ("@" in name and not revision):
        raise UsageError(f"`{name}` is neither a folder nor a hub id like `owner/name` or `owner/name@revision`.")
    return source, revision or None


def fingerprint(folder: Path) -> str:
    """Return a model folder's name and a digest of its configuration and of its weight files.

    Of each file of weights its name, its size, and its first and last megabyte count: a model has many gigabytes, and
    another training changes nearly all of them.

    Raises:
        DataError: it holds no configuration, or no weights in safetensors files.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{folder} is not a model: it has no config.json.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        raise DataError(
            f"{folder} has no weights in safetensors files{', only pickled ones' if pickles else ''}.",
            hint="Pickled weights can run code and are not read: convert them, or take a newer revision.",
        )
    digest = hashlib.sha256(config.read_bytes())
    for path in weights:
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_SLICE))
            stream.seek(max(0, path.stat().st_size - _SLICE))
            digest.update(stream.read(_SLICE))
    return f"{folder.resolve().name}#{digest.hexdigest()[:8]}"


def cached_commit(source: str) -> str | None:
    """Return the commit that a hub id's main branch has in the local cache; None without. Nothing is fetched."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # `load` says what is missing
        return None
    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def load(source: str, revision: str | None, settings: LocalConfig) -> tuple[Any, Any, "torch.device"]:
    """Return the model in eval mode on its device, its processor, and the device.

    Raises:
        UsageError: transformers is too old, a package is missing, or the model does not fit into the memory.
        DataError: the model cannot be fetched or read, or does not look at images.
    """
    from torch.cuda import OutOfMemoryError

    from reidctl.device import resolve_device

    device = resolve_device(settings.device)
    model_class, processor_class, config_class = _classes()
    if not log.isEnabledFor(logging.INFO):  # --quiet holds for the library's own bars too
        from transformers.utils import logging as library

        quieten: Any = library.disable_progress_bar  # without types
        quieten()
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_only(source)}
    if revision is not None:
        common["revision"] = revision
    try:
        config = config_class.from_pretrained(source, **common)
        _check_looks(config, source)
        processor = _load_processor(processor_class, source, common)
        model = _load_model(model_class, source, {**common, "config": config}, _dtype(settings.dtype, device))
        model = model.to(device).eval()
    except OutOfMemoryError:
        raise UsageError(f"{source} does not fit into the memory of {device}.", hint="Use a smaller model.") from None
    except Exception as error:  # anything: what the checkpoint's files can hold is not ours to foresee
        raise _explained(error, source, revision) from error
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log.info("caption: %s on %s, %s, %.1f million parameters", source, device, str(model.dtype)[6:], millions)
    return model, processor, device


def short(error: Exception) -> str:
    """Return an error's first lines on one line, bounded."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _classes() -> tuple[Any, Any, Any]:
    import transformers

    try:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise UsageError(
            f"Models in this process need transformers {_NEEDED} or newer; here is {transformers.__version__}.",
            hint='Run pip install --upgrade "transformers>=' + _NEEDED + '".',
        ) from None
    return AutoModelForImageTextToText, AutoProcessor, AutoConfig


def _check_looks(config: Any, source: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise DataError(
            f"{source} is a `{config.model_type}` model, which does not turn an image and a text into a text.",
            hint="Take a vision-language model, e.g. of the Qwen-VL, LLaVA or SmolVLM families.",
        )


def _load_processor(processor_class: Any, source: str, options: dict[str, Any]) -> Any:
    try:
        processor = processor_class.from_pretrained(source, **options)
    except OSError as error:  # the configuration was there, so this is no question of the network
        processor, reason = None, f": {short(error)}"
    else:
        reason = "."
    # Without its own file AutoProcessor settles for a tokenizer or an image processor alone.
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise DataError(
            f"{source} has no processor, the image settings or the tokenizer are missing{reason}",
            hint="Copy preprocessor_config.json or processor_config.json and the tokenizer beside the weights.",
        )
    # A tokenizer whose files are missing is made up as an empty one, without a word.
    tokenizer, words = processor.tokenizer, "describe the person"
    again = tokenizer.decode(tokenizer(words)["input_ids"], skip_special_tokens=True)
    if "".join(again.lower().split()) != words.replace(" ", ""):
        raise DataError(f"The tokenizer of {source} does not give back plain words: its files are missing or damaged.")
    return processor


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _load_model(model_class: Any, source: str, options: dict[str, Any], dtype: "torch.dtype") -> Any:
    """The model on the CPU; every weight must come from the files."""
    import transformers

    numbers = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options[("torch_dtype", "dtype")[numbers >= (4, 56)]] = dtype
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        model, info = model_class.from_pretrained(source, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, info = model_class.from_pretrained(source, attn_implementation="eager", **options)
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(f"The weights in {source} lack {len(missing)} tensors of the model ({', '.join(missing[:3])}).")
    return model


def _explained(error: Exception, source: str, revision: str | None) -> ReidctlError:
    """The error in the user's words."""
    if isinstance(error, ReidctlError):
        return error
    reason = short(error)
    if re.search(r"trust_remote_code|custom code|remote code", str(error)):
        return DataError(f"{source} brings program code of its own, which is never run.", hint="Take another model.")
    if isinstance(error, ImportError):
        return UsageError(f"{source} needs a package that is not installed: {reason}", hint="Install it with pip.")
    if "does not recognize this architecture" in str(error):
        import transformers

        return UsageError(
            f"transformers {transformers.__version__} does not know the model type of {source}.",
            hint="Upgrade transformers, or take another model.",
        )
    if Path(source).is_dir():
        return DataError(f"The model in {source} cannot be read: {reason}")
    if isinstance(error, OSError):
        why = "no network here" if offline() else reason.split(". ")[0].rstrip(".")
        command = f"hf download {source}{f' --revision {revision}' if revision else ''}"
        return DataError(
            f"The model {source} is not on this machine and could not be fetched ({why}).",
            hint=f"Download it first where there is a network (`{command}`), or give its folder.",
        )
    return DataError(f"The model {source} cannot be read: {reason}")
