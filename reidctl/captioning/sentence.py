"""Any transformers sentence encoder, pooled as its sentence-transformers files say, as a function of texts."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.console import progress
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError

POOLINGS = ("mean", "cls", "max", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_TOKENS = 8192  # in one forward pass, padding included: bounds its memory whatever the texts
_CHUNK = 1024
_LONG = 2000


@dataclass(frozen=True)
class SentenceSettings:
    """What the files beside a sentence encoder say.

    Attributes:
        folder: of the transformer itself.
        pooling: one of `POOLINGS`.
        normalise: whether vectors are scaled to length 1.
        length: most tokens of a text; None where no file says.
        lower: whether texts are lower-cased first.
    """

    folder: Path
    pooling: str = "mean"
    normalise: bool = False
    length: int | None = None
    lower: bool = False


class SentenceEncoder:
    """Texts -> float32 vectors (N, D); a text's vector does not depend on the texts beside it.

    Equal to `SentenceTransformer(source).encode(texts)` without prompts: a prompt that a model card asks for is not
    added. Weights come from safetensors files only, and no code that lies beside them is run.

    Args:
        source: a folder, or an id on the Hugging Face hub (from its cache without network).
        device: see `resolve_device`.

    Raises:
        DataError: no such folder or model, or no safetensors weights in it.
        UsageError: a pooling or a module that is not supported, or an unknown device.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        self.settings = read_settings(_folder(source))
        self._device = resolve_device(device)
        self._tokenizer, self._model = _load(self.settings.folder)
        self._model.to(self._device)
        limits = [
            self.settings.length,
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", None),
        ]
        self._length = min([limit for limit in limits if limit and limit > 0], default=512)

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return one vector per text, in order, shape (N, D); texts longer than the model reads are cut."""
        import torch

        out = np.zeros((len(texts), int(self._model.config.hidden_size)), np.float32)
        shown = progress("embed texts", len(texts), unit="texts") if len(texts) >= _LONG else nullcontext(_silent)
        with torch.inference_mode(), shown as advance:
            for rows, tokens in self._batches(texts):
                out[rows] = self._encode(tokens)
                advance(len(rows))
        return out

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Rows and token ids of texts of about one length, so that little is padding."""
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(texts), _CHUNK):
            rows = by_length[start : start + _CHUNK]
            given = [texts[row].lower() if self.settings.lower else texts[row] for row in rows]
            ids = self._tokenizer(given, truncation=True, max_length=self._length)["input_ids"]
            # A tokenizer without special tokens makes nothing of an empty text; its vector stays zero.
            ready = sorted(
                ((row, one) for row, one in zip(rows, ids, strict=True) if one), key=lambda pair: len(pair[1])
            )
            while ready:
                # The last of a batch is its longest; doubling finds a size that fits without trying each.
                size = min(len(ready), max(1, _TOKENS // len(ready[0][1])))
                while size > 1 and size * len(ready[size - 1][1]) > _TOKENS:
                    size = (size + 1) // 2
                yield [row for row, _ in ready[:size]], [one for _, one in ready[:size]]
                ready = ready[size:]

    def _encode(self, tokens: list[list[int]]) -> npt.NDArray[np.float32]:
        import torch

        longest = max(len(one) for one in tokens)
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros((len(tokens), longest), dtype=torch.int64)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        mask = mask.to(self._device)
        states = self._model(input_ids=ids.to(self._device), attention_mask=mask).last_hidden_state.float()  # (B, L, D)
        pooled = _pool(states, mask, self.settings.pooling)
        if self.settings.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        return np.asarray(pooled.cpu().numpy(), np.float32)


def read_settings(folder: Path) -> SentenceSettings:
    """Return how to pool a model in a folder: `modules.json` and the files it names; the mean without them.

    Raises:
        DataError: a file that is not valid JSON.
        UsageError: a pooling or module beyond `POOLINGS` and `Normalize`.
    """
    modules = _json(folder / "modules.json") or []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise DataError(f"{folder / 'modules.json'} is not a list of modules.")
    inner, pooling, normalise = folder, "mean", False
    for module in modules:
        path, kind = folder / str(module.get("path", "")), str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Transformer":
            inner = path
        elif kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind == "Normalize":
            normalise = True
        else:
            raise UsageError(
                f"The sentence encoder in {folder} has a module `{kind}`, which is not supported.",
                hint="Choose one that is a Transformer with Pooling and perhaps Normalize.",
            )
    limits = _json(inner / "sentence_bert_config.json") or {}
    return SentenceSettings(inner, pooling, normalise, limits.get("max_seq_length"), bool(limits.get("do_lower_case")))


def _pooling(path: Path) -> str:
    found = _json(path) or {}
    named = found.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if found.get(flag)] or "mean"
    mode = named[0] if isinstance(named, list) and len(named) == 1 else named
    if mode not in POOLINGS:
        raise UsageError(f"{path} asks for the pooling {mode}.", hint=f"Supported are {', '.join(POOLINGS)}.")
    return str(mode)


def _pool(states: Any, mask: Any, pooling: str) -> Any:
    """One vector per text of token states (B, L, D); padding, which follows the text, takes no part."""
    import torch

    real = mask[:, :, None].to(states.dtype)
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    if pooling == "max":
        return states.masked_fill(real == 0, float("-inf")).amax(dim=1)
    return (states * real).sum(dim=1) / real.sum(dim=1)


def _folder(source: str) -> Path:
    """The folder of a model: itself, or the files of a hub id, downloaded without pickles."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", source):
        raise DataError(f"There is no folder {source}.", hint="Give a folder or an id on the Hugging Face hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from reidctl.backbones.hub import offline

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES), local_files_only=offline()))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = "no network here" if offline() else " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"Could not get the sentence encoder {source}: no such folder, not in the Hugging Face cache ({reason}).",
            hint="Copy the model to this machine and give its folder: sentence:/path/to/model.",
        ) from None


def _load(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the model in evaluation mode, float32."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    if not any(folder.glob("*.safetensors")):
        pickled = any((*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        raise DataError(
            f"{folder} has no safetensors weights{', only pickled ones, which are never opened' if pickled else ''}.",
            hint="Convert the checkpoint to safetensors where you trust it, or choose another.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            dtype="float32",
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"The sentence encoder in {folder} cannot be loaded: {' '.join(str(error).split())[:160]}.",
            hint="It must be in the transformers format, complete, and need no code of its own.",
        ) from None
    # transformers fills what is missing with random numbers and only warns; the pooler is not used.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise DataError(f"The weights in {folder} lack {len(missing)} tensors ({', '.join(missing[:3])}).")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return tokenizer, model.eval()


def _json(path: Path) -> Any:
    """The content of a JSON file; None without the file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise DataError(f"{path} is not valid JSON.", hint="Copy the model again.") from None


def _silent(n: int = 1, note: str = "") -> None:
    """Progress of a task that is too short to show."""
