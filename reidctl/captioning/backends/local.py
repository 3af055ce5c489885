"""A describer in this process: a vision-language model that transformers loads from a folder or the hub."""

import contextlib
import hashlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidctl.backbones.hub import local_only
from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.backends.chat import unwrap_description, without_reasoning
from reidctl.captioning.backends.local_model import cached_commit, fingerprint, load, locate, short
from reidctl.captioning.backends.local_prompt import ChatPrompts, special_tokens
from reidctl.captioning.backends.picture import open_picture
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# What a processor or a model raises for one picture or text that it cannot take.
_TROUBLE = (ValueError, TypeError, RuntimeError, LookupError, OSError, ArithmeticError, MemoryError)
# Put aside of a checkpoint's own generation settings: the temperature alone shapes a reply.
_PLAIN_DECODING: Mapping[str, Any] = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_k": None, "top_p": None, "min_p": None,
    "typical_p": None, "repetition_penalty": None, "no_repeat_ngram_size": None, "max_length": None,
}  # fmt: skip


class LocalDescriber:
    """Asks a model on this machine, `config.local.batch` requests at a time.

    Every model that transformers' AutoModelForImageTextToText and AutoProcessor load: Qwen-VL, LLaVA, SmolVLM and
    others. Weights are read from safetensors files only, and no program code that comes with a model is run.

    Each text goes through the processor's chat template; where there is none, the prompt is that of LLaVA 1.5:
    `USER: <image>`, a line break, the system text, an empty line and the prompt, then ` ASSISTANT:`. Control tokens
    inside a text are broken up by a space, so that they stay text.

    Temperature 0 takes the likeliest token. Above it each request draws from a generator of its own, seeded by
    `config.seed`, the attempt and the request's key (an argmax over logits / temperature + Gumbel noise, which is a
    draw from their softmax). So a reply depends neither on the order nor on its neighbours, up to rounding: padding to
    a longer neighbour changes the last bits of the logits, in bfloat16 enough to turn a near tie. Top-k, top-p and
    repetition penalty of the checkpoint are not used.

    Only new tokens are read. Reasoning between `<think>` and `</think>` is dropped, a description wrapped into JSON is
    taken out, and what did not end within `max_tokens` is rejected.

    The model is loaded at the first request and stays until `close`, or until nobody holds the describer any more.

    Args:
        name: a folder, or a hub id with an optional `@revision`; without one, the commit that the local cache holds.
        config: see `LocalConfig`; of `RemoteConfig` the temperature, `max_tokens` and `image_side`.

    Raises:
        UsageError: the name is neither a path nor a hub id.
        DataError: the folder holds no model, or none whose weights are safetensors.
    """

    name = "hf"
    source = "mllm"
    deferred = False
    repeats = False  # a retry has another prompt and another seed

    def __init__(self, name: str, config: CaptionConfig) -> None:
        self._source, self._revision = locate(name)
        if Path(self._source).is_dir():
            name = fingerprint(Path(self._source))
        elif self._revision is None and (commit := cached_commit(self._source)) is not None:
            self._revision, name = commit, f"{name}@{commit}"
        self.model = f"hf:{name}"
        self._config = config
        self._batch = config.local.batch
        self._answered = False
        self._speaker: _Speaker | None = None
        self._release: Callable[[], object] = lambda: None

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield replies batch by batch; while one batch is answered, the next is read, one ahead at most.

        Raises:
            UsageError: transformers is too old for it, the device is not there, or the memory is too small.
            DataError: the model is not here and cannot be fetched, or it cannot look at images.
        """
        source = iter(requests)
        group = list(islice(source, self._batch))
        if not group:
            return
        speaker = self._loaded()
        with ThreadPoolExecutor(1, "reidctl-pictures") as pool:
            ahead: Future[_Prepared] | None = pool.submit(speaker.prepare, group)
            while ahead is not None:
                prepared = ahead.result()
                group = list(islice(source, self._batch))
                ahead = pool.submit(speaker.prepare, group) if group else None
                yield from prepared.failed
                for chunk in prepared.chunks:
                    yield from self._answer(speaker, chunk)

    def close(self) -> None:
        """Let the model go; the next request loads it again."""
        self._speaker = None
        self._release()

    def _loaded(self) -> "_Speaker":
        if self._speaker is None:
            if self._revision is None and not local_only(self._source):
                log.warning(
                    "caption: %s is fetched now and its texts are stored without its commit; a later run knows the "
                    "commit and asks anew. Run `hf download %s` first to avoid that",
                    self._source,
                    self._source,
                )
            self._speaker = _Speaker(*load(self._source, self._revision, self._config.local), self._config)
            self._release = freed = weakref.finalize(self, self._speaker.close)
            freed.atexit = False  # the process takes everything with it
        return self._speaker

    def _answer(self, speaker: "_Speaker", whole: "_Chunk") -> Iterator[Reply]:
        """The replies of a chunk: halved when the memory is too small, one by one when something in it is bad."""
        from torch.cuda import OutOfMemoryError

        # It was read before an earlier one was found to be too large.
        waiting = deque([whole] if len(whole.items) <= self._batch else whole.split(self._batch))
        while waiting:
            chunk = waiting.popleft()
            size = len(chunk.items)
            try:
                replies, problem = speaker.reply(chunk), ""
            except (OutOfMemoryError, MemoryError):
                replies, problem = [], "out of memory"
            except _TROUBLE as error:
                replies, problem = [], f"the model cannot take it: {short(error)}"
            if not problem:
                self._answered = True
                yield from replies
            elif problem == "out of memory":
                yield from self._shrink(speaker, chunk, waiting)
            elif size > 1:
                waiting.extendleft(reversed(chunk.split(1)))
            else:
                yield failed(chunk.items[0].request, problem)

    def _shrink(self, speaker: "_Speaker", chunk: "_Chunk", waiting: "deque[_Chunk]") -> Iterator[Reply]:
        """Put the halves in front of what waits; a single request fails, the first one ends the run."""
        speaker.free_cache()
        if len(chunk.items) > 1:
            half = (len(chunk.items) + 1) // 2
            self._batch = min(self._batch, half)
            log.warning("caption: out of memory with %d requests, on with %d", len(chunk.items), half)
            waiting.extendleft(reversed(chunk.split(half)))
        elif self._answered:
            yield failed(chunk.items[0].request, "out of memory")
        else:
            raise UsageError(
                f"{self.model} does not fit into the memory of {speaker.device} with a single image.",
                hint="Use a smaller model, --set caption.remote.image_side=256, or caption.local.device=cpu.",
            )


@dataclass(frozen=True)
class _Item:
    request: Request
    picture: "Image | None"


@dataclass(frozen=True)
class _Chunk:
    """Items for one forward pass, all with a picture or all without; inputs are made again where they are None."""

    items: Sequence[_Item]
    inputs: Any = None

    def split(self, size: int) -> "list[_Chunk]":
        return [_Chunk(self.items[start : start + size]) for start in range(0, len(self.items), size)]


@dataclass
class _Prepared:
    chunks: list[_Chunk] = field(default_factory=list)
    failed: list[Reply] = field(default_factory=list)


class _Speaker:
    """A loaded model with its processor."""

    def __init__(self, model: Any, processor: Any, device: "torch.device", config: CaptionConfig) -> None:
        self.device = device
        self._model, self._processor, self._config = model, processor, config
        self._prompts = ChatPrompts(processor)
        # The tokenizer sets its padding in place: used by two threads at once it raises "Already borrowed".
        self._lock = threading.Lock()
        tokenizer = processor.tokenizer
        own = model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
        self._ends = sorted({end for end in ends if end is not None})
        tokenizer.padding_side = "left"  # new tokens follow the prompt
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        for key, value in _PLAIN_DECODING.items():
            setattr(model.generation_config, key, value)

    def prepare(self, requests: Sequence[Request]) -> _Prepared:
        """Return the requests as inputs of the model, those with and those without a picture apart."""
        prepared, side = _Prepared(), self._config.remote.image_side
        kinds: dict[bool, list[_Item]] = {True: [], False: []}
        for request in requests:
            try:
                picture = open_picture(request.image_path, side) if request.image_path else None
            except DataError as error:
                prepared.failed.append(failed(request, str(error), own_fault=True))
            else:
                kinds[picture is not None].append(_Item(request, picture))
        for items in filter(None, kinds.values()):
            inputs = None
            with contextlib.suppress(*_TROUBLE):  # `reply` meets it again and finds out whose it is
                inputs = self._encode(items)
            prepared.chunks.append(_Chunk(items, inputs))
        return prepared

    def reply(self, chunk: _Chunk) -> list[Reply]:
        """Return one reply per item."""
        import torch

        inputs = chunk.inputs if chunk.inputs is not None else self._encode(chunk.items)
        inputs = inputs.to(self.device, dtype=self._model.dtype)
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                max_new_tokens=self._config.remote.max_tokens,
                eos_token_id=self._ends or None,
                pad_token_id=self._processor.tokenizer.pad_token_id,
                logits_processor=self._sampler([item.request for item in chunk.items]),
            )
        asked = inputs["input_ids"]
        if torch.equal(ids[:, : asked.shape[1]], asked):  # encoder-decoders and some others leave the prompt out
            ids = ids[:, asked.shape[1] :]
        sent = inputs.get("attention_mask", torch.ones_like(asked)).sum(1).tolist()
        with self._lock:
            return [self._finish(*row) for row in zip(chunk.items, ids.tolist(), sent, strict=True)]

    def free_cache(self) -> None:
        """Give back the memory that a failed forward pass left behind."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let the model go, then the memory that PyTorch keeps for it."""
        self._model = self._processor = None
        self.free_cache()

    def _encode(self, items: Sequence[_Item]) -> Any:
        with self._lock:
            texts = [
                self._prompts.text(item.request.system, item.request.prompt, image=item.picture is not None)
                for item in items
            ]
            options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
            if items[0].picture is not None:
                options["images"] = [[item.picture] for item in items]
            start = self._processor.tokenizer.bos_token
            if start and texts[0].startswith(start):
                options["add_special_tokens"] = False  # the template has already written it
            return self._processor(text=texts, **options)

    def _sampler(self, requests: Sequence[Request]) -> Any:
        from transformers import LogitsProcessorList

        temperature = self._config.remote.temperature
        if temperature == 0:
            return LogitsProcessorList()
        seeds = [_seed(request, self._config.seed) for request in requests]
        return LogitsProcessorList([_GumbelNoise(seeds, temperature, self.device)])

    def _finish(self, item: _Item, ids: list[int], sent: int) -> Reply:
        """The reply in a row of new tokens; an unusable one is `rejected`, so that it is asked again."""
        request = item.request
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        counts = {"tokens_in": sent, "tokens_out": len(ids) if end is None else end + 1}
        if end is None:
            return rejected(request, "the reply breaks off: it ran into max_tokens", **counts)
        prompt = self._prompts.text(request.system, request.prompt, image=item.picture is not None)
        text = without_reasoning(self._decode(ids[:end]), thinking=prompt.rstrip().endswith("<think>"))
        if text is None:
            return rejected(request, "the reply is nothing but reasoning", **counts)
        if not text.strip():
            return rejected(request, "the reply is empty", **counts)
        text = unwrap_description(text, structured=False)
        if text is None:
            return rejected(request, "the reply is broken JSON", **counts)
        return Reply(request, "ok", text, tokens_in=sent, tokens_out=counts["tokens_out"])

    def _decode(self, ids: list[int]) -> str:
        """The tokens as text, without special ones, but with those around reasoning even where they are special."""
        tokenizer = self._processor.tokenizer
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for mark in sorted(special_tokens(tokenizer) - {"<think>", "</think>"}, key=len, reverse=True):
            text = text.replace(mark, "")
        return text.strip()


class _GumbelNoise:
    """A logits processor that makes the argmax of each row a draw from softmax(logits / temperature)."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: "torch.device") -> None:
        import torch

        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)  # -log of it is Gumbel noise
        return scores.float() / self._temperature - noise.clamp_min(torch.finfo(torch.float32).tiny).log()


def _seed(request: Request, seed: int) -> int:
    """A seed for this request and attempt alone."""
    parts = (str(seed + request.attempt - 1), *request.key)
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:7], "big")
