"""What a model costs: parameters, floating-point operations, memory and speed, for any method and part by part.

**Operations.** A multiply-add counts as two. Counted are matrix products, convolutions and attention, by PyTorch's
`FlopCounterMode`, and the selective scan, by `scan_flops`; norms, activations, softmax and other elementwise work are
not, as is usual. Attention counts all L x L entries, whatever mask lies over them.

**Memory.** `kept_bytes` is what a forward pass in training leaves alive for its backward pass: a property of the model,
the same on every machine with the same attention kernel. It is not the peak, which only CUDA reports.
"""

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from reidctl.batch import Batch, PhraseSets, Tokens
from reidctl.errors import UsageError
from reidctl.layers.fusion import Fusion, Kind
from reidctl.layers.fusion import Sequence as FusionSequence
from reidctl.layers.mamba import Mamba
from reidctl.methods.base import Method
from reidctl.phrases.base import PARTS

ROLES = ("full", "identity", "clothing", "fusion")


@dataclass(frozen=True)
class Costs:
    """What one part of a model costs.

    Attributes:
        parameters: numbers that the part reads; a parameter that two parts share is in both.
        trainable: those of them that the stage trains.
        flops: operations per item, a multiply-add being two; see the module.
        kept_bytes: bytes per item that a forward pass in training leaves alive for its backward pass. Parameters,
            buffers and the part's inputs are not among them.
        peak_bytes: most bytes allocated on the CUDA device during the timed passes, for the whole batch, weights
            included; None on a CPU, which does not say.
        items_per_second: batch / median time of one pass in float32, after one pass that warms up.
        batch: items per pass. Of `step` an item is a pair of image and text.
        threads: CPU threads that PyTorch was allowed to use.
        device: where it ran.
    """

    parameters: int
    trainable: int
    flops: float
    kept_bytes: float
    peak_bytes: int | None
    items_per_second: float
    batch: int
    threads: int
    device: str

    @property
    def milliseconds(self) -> float:
        """The median time of one pass over the whole batch; with `batch=1` it is the latency."""
        return 1e3 * self.batch / self.items_per_second


def measure_costs(
    method: Method,
    *,
    batch: int = 8,
    text_length: int | None = None,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    stage: str = "finetune",
) -> dict[str, Costs]:
    """Return what a method costs on random pixels and words, by part; the method itself is not changed.

    Parts: `image` (`embed_images`), `text` (`embed_texts`), `fusion` if the method has one (see `measure_fusion`), and
    `step` (losses and backward pass; GradNorm is at its first step, where it takes no gradients of its own); behind
    `text` each of the method's `extra_parts`, on inputs that it gets for nothing. All but `step` are timed and counted
    as in retrieval, in evaluation mode and without gradients.

    Args:
        batch: images and texts per pass, >= 1.
        text_length: tokens of every text, special ones included; default: the longest that the text tower takes.
        repeats: timed passes, >= 1.
        device: where to measure.
        stage: which training stage `step` and `trainable` are about.

    Raises:
        UsageError: a size below 1, or texts longer than the tower takes.
    """
    _check_sizes(batch=batch, repeats=repeats)
    device = torch.device(device)
    model = copy.deepcopy(method).to(device)
    trained = {id(p) for part in model.parameters_by_role(stage).values() for _, p in part if p.requires_grad}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        given = example_batch(model, batch, text_length=text_length).to(device)
        runs: dict[str, Callable[[], Tensor]] = {
            "image": lambda: model.embed_images(given),
            "text": lambda: model.embed_texts(given),
        }
        measure = _Measure(model, trained, list(_tensors(given)), batch=batch, repeats=repeats, device=device)
        runs |= _extra_parts(model, given)
        found = {part: measure(run) for part, run in runs.items()}
        fusion = getattr(model, "fusion", None)
        if isinstance(fusion, Fusion):
            patches = model.backbone.grid[0] * model.backbone.grid[1]
            length = given.texts["full"].ids.shape[1]
            found["fusion"] = _measure_fusion(fusion, trained, patches, length, batch, repeats, device)
        found["step"] = measure(lambda: model.objective(model.losses(given, stage)), train=True)
    return found


def _extra_parts(model: Method, given: Batch) -> dict[str, Callable[[], Tensor]]:
    """The method's own parts; what they read is made here, so that it is no part of their cost."""
    model.eval()
    with torch.no_grad():
        found = model.extra_parts(given)
    taken = sorted({"image", "text", "fusion", "step"} & set(found))
    assert not taken, f"`{model.name}` calls a part `{taken[0]}`"
    return found


def measure_fusion(
    fusion: Fusion,
    *,
    patches: int,
    text_length: int,
    batch: int = 8,
    repeats: int = 5,
    device: torch.device | str = "cpu",
) -> Costs:
    """Return what one fused feature costs when both modalities are given; the module itself is not changed.

    Args:
        patches: image tokens; read by the `tokens` sequence only, like `text_length`.
        text_length: text tokens, all of them real.
        batch, repeats, device: see `measure_costs`.

    Raises:
        UsageError: a size below 1.
    """
    _check_sizes(patches=patches, text_length=text_length, batch=batch, repeats=repeats)
    device = torch.device(device)
    module = copy.deepcopy(fusion).to(device)
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return _measure_fusion(module, trained, patches, text_length, batch, repeats, device)


def compare_fusions(
    image_dim: int,
    text_dim: int,
    *,
    patches: int,
    text_length: int,
    sequence: FusionSequence = "tokens",
    kinds: Sequence[Kind] = ("simple", "transformer", "mamba"),
    batch: int = 8,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Costs]:
    """Return what each kind of fusion costs with everything else equal ("002" Fig. 5: simple, Transformer, Mamba).

    Args:
        image_dim, text_dim: widths of the features that are fused.
        sequence: what the sequence model reads; `simple` reads the two vectors whatever it says.
        kinds: see `Fusion`.
        options: passed on to `Fusion`.
        patches, text_length, batch, repeats, device: see `measure_fusion`.
    """
    found: dict[str, Costs] = {}
    for kind in kinds:
        assert kind in get_args(Kind), kind
        fusion = Fusion(image_dim, text_dim, kind=kind, sequence=sequence, **options)
        found[kind] = measure_fusion(
            fusion, patches=patches, text_length=text_length, batch=batch, repeats=repeats, device=device
        )
    return found


def costs_table(costs: Mapping[str, Costs]) -> pd.DataFrame:
    """Return one row per part (or model): `name`, every field of `Costs`, and `milliseconds` per pass."""
    rows = [{"name": name, **asdict(cost), "milliseconds": cost.milliseconds} for name, cost in costs.items()]
    return pd.DataFrame(rows).astype({"peak_bytes": "Int64"}) if rows else pd.DataFrame(rows)


_PHRASES = 4
"""Phrases of a caption in an example batch, all different: captions of people name about as many parts."""


def _phrases(tokens: Callable[[int, int], Tokens], size: int, length: int) -> PhraseSets:
    number = torch.arange(size * _PHRASES).view(size, _PHRASES)
    first = torch.arange(_PHRASES).expand(size, -1).clamp_max(length - 1)
    span = torch.stack([first, (first + 1).clamp_max(length)], dim=-1)
    return PhraseSets(tokens(size * _PHRASES, min(length, 8)), number, number % len(PARTS), span)


def example_batch(method: Method, size: int, *, text_length: int | None = None, seed: int = 0) -> Batch:
    """Return a training batch of noise images and random words for a method, on the CPU.

    Two neighbours are one person where there are enough people; every text is `text_length` real tokens long.

    Args:
        size: images, and texts of each role.
        text_length: default: the backbone's context length.
        seed: of pixels and words; the global random state is not touched.

    Raises:
        UsageError: fewer than 3 tokens (start, a word, end), or more than the tower takes.
    """
    backbone = method.backbone
    length = backbone.context_length if text_length is None else text_length
    if not 3 <= length <= backbone.context_length:
        raise UsageError(
            f"Texts of {length} tokens do not fit: the text tower takes 3 to {backbone.context_length}.",
            hint="Choose another text length.",
        )
    random = torch.Generator().manual_seed(seed)
    words = backbone.tokenizer.word_ids

    def tokens(count: int = size, long: int = length) -> Tokens:
        ids = torch.randint(words.start, words.stop, (count, long), generator=random)
        ids[:, 0], ids[:, -1] = backbone.tokenizer.start_id, backbone.tokenizer.end_id
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    rows = torch.arange(size)
    return Batch(
        image=torch.randn(size, 3, *backbone.image_size, generator=random),
        person=rows // 2 % max(method.persons, 1),
        texts={role: tokens() for role in ROLES},
        phrases=_phrases(tokens, size, length) if method.reads_phrases else None,
        clothing_group=rows,
        has_fusion=torch.ones(size, dtype=torch.bool),
        domain=torch.zeros_like(rows),
        camera=torch.zeros_like(rows) if method.cameras else None,
    )


def count_flops(run: Callable[[], object], model: nn.Module) -> int:
    """Return the operations of `run`, a multiply-add being two.

    Fused kernels hide what they do: PyTorch's counter sees 0 operations in a `TransformerEncoderLayer` in evaluation
    mode. So attention runs as plain products here, the fast path of encoder layers is off, and Mamba layers run their
    PyTorch scan. In a backward pass a scan counts twice its forward operations, as a matrix product does; recomputed
    products count again, because they run again.

    Args:
        run: what to count, forward passes and backward passes; anything.
        model: holds every Mamba layer that `run` uses.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Mamba)]
    kernels = [layer.use_kernel for layer in layers]
    scans = _Scans()
    hooks = [layer.register_forward_hook(scans.see) for layer in layers]
    try:
        for layer in layers:
            layer.use_kernel = "never"
        opaque = _Opaque()  # type: ignore[no-untyped-call]
        with sdpa_kernel(SDPBackend.MATH), _no_fast_path(), opaque, _counter() as counter:
            run()
        return int(counter.get_total_flops()) + scans.total
    finally:
        for hook in hooks:
            hook.remove()
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.use_kernel = kernel


def scan_flops(tokens: int, channels: int, states: int) -> int:
    """Return the elementwise operations of one selective scan over `tokens` tokens.

    h = exp(Δ A) h + (Δ x) B;  y = C h + D x

    Per token, channel and state 5: Δ·A, exp, (Δ x)·B, ·h, +. Per token and channel 3: Δ·x, D·x, +. C h is a matrix
    product (2 more per state), which the counter sees itself. This is the recurrence's own work: a scan in log depth
    does up to 2.5 times the last two of the five, to be parallel.

    Args:
        tokens: of the whole batch.
        channels: E, the inner width.
        states: N per channel.
    """
    return tokens * channels * (5 * states + 3)


def kept_bytes(run: Callable[[], Tensor], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes that are alive after a forward pass because its backward pass needs them.

    Measured as the storages that operations of `run` made and that live as long as the graph does. It therefore holds
    what a checkpoint keeps to compute again, which hooks on saved tensors do not see.

    Args:
        run: the forward pass; its output need not be a scalar, and is itself counted only if the graph needs it.
        known: tensors that exist anyway: parameters, buffers, inputs.
    """
    alive = _Alive(known)
    # What only a reference cycle holds would be counted by chance. Without collections in between, all cycles of the
    # pass are in the youngest generation, which is quick to search.
    enabled = gc.isenabled()
    gc.disable()
    try:
        with alive:
            graph = run().sum().grad_fn
        gc.collect(0)
        kept = alive.bytes()
        del graph
        return kept
    finally:
        if enabled:
            gc.enable()


def seconds(run: Callable[[], object], repeats: int, device: torch.device | str = "cpu") -> list[float]:
    """Return the times of `repeats` runs, after one that warms up; on CUDA each waits until the device is done."""
    device = torch.device(device)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def graph_leaves(value: Tensor) -> set[int]:
    """Return the `id` of every leaf that a tensor's graph leads to: what it has a gradient for, be it zero."""
    found: set[int] = set()
    if value.requires_grad and value.grad_fn is None:
        found.add(id(value))
    seen: set[Any] = set()
    ahead: list[Any] = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)  # also keeps it alive, so that no other one can take its place
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [following for following, _ in node.next_functions]
    return found


class _Measure:
    """Measures one pass after another over the same model and inputs."""

    def __init__(
        self,
        model: nn.Module,
        trained: set[int],
        inputs: Sequence[Tensor],
        *,
        batch: int,
        repeats: int,
        device: torch.device,
    ) -> None:
        self.model, self.trained, self.inputs = model, trained, inputs
        self.batch, self.repeats, self.device = batch, repeats, device

    def __call__(self, run: Callable[[], Tensor], *, train: bool = False) -> Costs:
        """Return the costs of `run`; with `train` it ends in a loss, and its backward pass is part of it."""
        used = self._used(run)
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in self.trained)
        self.model.train()
        with torch.enable_grad():
            kept = kept_bytes(run, [*self.model.parameters(), *self.model.buffers(), *self.inputs])
        self.model.train(train)
        timed = (lambda: self._step(run)) if train else run
        with torch.set_grad_enabled(train):
            flops = count_flops(timed, self.model)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            times = seconds(timed, self.repeats, self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Costs(
            parameters=sum(parameter.numel() for parameter in used),
            trainable=sum(parameter.numel() for parameter in used if id(parameter) in self.trained),
            flops=flops / self.batch,
            kept_bytes=kept / self.batch,
            peak_bytes=peak,
            items_per_second=self.batch / statistics.median(times),
            batch=self.batch,
            threads=torch.get_num_threads(),
            device=str(self.device),
        )

    def _used(self, run: Callable[[], Tensor]) -> list[nn.Parameter]:
        """The parameters that a run reads: those that its output's graph leads to."""
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.model.eval()
        with torch.enable_grad():
            read = graph_leaves(run())
        return [parameter for parameter in parameters if id(parameter) in read]

    def _step(self, run: Callable[[], Tensor]) -> None:
        self.model.zero_grad(set_to_none=True)
        loss = run()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]


def _measure_fusion(
    fusion: Fusion,
    trained: set[int],
    patches: int,
    text_length: int,
    batch: int,
    repeats: int,
    device: torch.device,
) -> Costs:
    random = torch.Generator().manual_seed(0)
    image_dim, text_dim = _input_width(fusion.align_image), _input_width(fusion.align_text)
    shapes = {
        "image": (batch, image_dim),
        "text": (batch, text_dim),
        "image_tokens": (batch, patches, image_dim),
        "text_tokens": (batch, text_length, text_dim),
    }
    given = {name: torch.randn(*shape, generator=random).to(device) for name, shape in shapes.items()}
    given["text_mask"] = torch.ones(batch, text_length, dtype=torch.bool, device=device)
    measure = _Measure(fusion, trained, list(given.values()), batch=batch, repeats=repeats, device=device)

    def run() -> Tensor:
        feature: Tensor = fusion(**given).feature
        return feature

    return measure(run)


def _input_width(align: nn.Module) -> int:
    return next(layer.in_features for layer in align.modules() if isinstance(layer, nn.Linear))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} must be at least 1, got {size}.")


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (value for value in vars(batch).values() if isinstance(value, Tensor))
    for tokens in batch.texts.values():
        yield from (tokens.ids, tokens.mask)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Scans:
    """Adds up the scans of Mamba layers: once when a layer runs, twice more when a gradient comes back."""

    def __init__(self) -> None:
        self.total = 0

    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, Mamba)
        batch, length, _ = inputs[0].shape
        scans = 2 if layer.bidirectional else 1
        flops = scans * scan_flops(batch * length, layer.D.numel(), layer.d_state)
        self.total += flops
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(2 * flops))  # type: ignore[no-untyped-call]

    def _add(self, flops: int) -> None:
        self.total += flops


class _Alive(TorchDispatchMode):
    """Weak references to the storages that operations make."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {self._reference(tensor).cdata for tensor in known}
        # A weak reference keeps the address from being used again, so that addresses tell storages apart.
        self._born: dict[int, tuple[StorageWeakRef, int]] = {}

    @staticmethod
    def _reference(tensor: Tensor) -> StorageWeakRef:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                reference = self._reference(value)
                if reference.cdata not in self._known:
                    self._born[reference.cdata] = (reference, value.untyped_storage().nbytes())
        return out

    def bytes(self) -> int:
        """Bytes of those that are still alive."""
        return sum(size for reference, size in self._born.values() if not reference.expired())  # type: ignore[misc,no-untyped-call]


class _Opaque(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops at an operation that does much and that the counter, which has already had its turn, does not know."""

    _HEAVY = ("attention", "encoder_layer", "lstm", "gru", "rnn_", "mkldnn", "_linear", "addbmm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        known = func in flop_registry or func.overloadpacket in flop_registry
        assert known or not any(word in name for word in self._HEAVY), f"{func} would count as 0 operations"
        return func(*args, **(kwargs or {}))


def _counter() -> FlopCounterMode:
    """PyTorch's counter; it leaves out products with a vector, and overrates gradients of grouped convolutions."""
    aten = torch.ops.aten
    mapping = {
        aten.mv: lambda matrix, *_, **__: _product(matrix),
        aten.dot: lambda vector, *_, **__: _product(vector),
        aten.addmv: lambda _, matrix, *__, **___: _product(matrix),
        aten.convolution_backward: _convolution_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _product(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


def _convolution_backward(
    gradient: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Each gradient, of input and weight, costs the forward pass; PyTorch counts the weight's once per group."""
    return (wanted[0] + wanted[1]) * 2 * math.prod(inputs if transposed else gradient) * math.prod(weight[1:])


@contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
