"""Time and memory of the fusion's sequence models against sequence length, with fitted exponents.

    python tests/benchmarks/bench_mamba.py --lengths 64 128 256 512 1024 2048 --batch 2 --repeats 3

Prints one Markdown table per quantity. `ours` is two residual Mamba layers, `transformers` the same two layers with
Hugging Face's CPU path (a Python loop over tokens), `attention` a Transformer encoder of four layers, as in the
papers' efficiency figure. Memory is what autograd keeps between forward and backward, the same on every machine.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reidctl.layers.fusion import _transformer
from reidctl.layers.mamba import MambaStack

WIDTH = 256


def fitted_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) on log(length)."""
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


class TransformersStack(nn.Module):
    """Two residual layers of transformers' MambaMixer, weights taken from ours."""

    def __init__(self, stack: MambaStack) -> None:
        super().__init__()
        from transformers import MambaConfig, MambaModel

        config = MambaConfig(vocab_size=2, hidden_size=WIDTH, num_hidden_layers=len(stack.layers), use_cache=False)
        self.mixers = nn.ModuleList(block.mixer for block in MambaModel(config).layers)
        for mixer, block in zip(self.mixers, stack.layers, strict=True):
            mixer.load_state_dict(block.mixer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = mixer(x) + x
        return x


def kept_bytes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of the different storages that autograd keeps for the backward pass, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(storages.values())


def seconds(model: Callable[[Tensor], Tensor], x: Tensor, repeats: int, *, train: bool) -> float:
    """The fastest of `repeats` passes: the others only met a busier machine."""
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        if train:
            model(x).sum().backward()
        else:
            with torch.no_grad():
                model(x)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-limit", type=int, default=256, help="longest sequence for `transformers`")
    options = parser.parse_args()
    torch.manual_seed(0)
    ours = MambaStack(2, WIDTH)
    models = {"ours": ours, "transformers": TransformersStack(ours), "attention": _transformer(WIDTH, 4, 8, 0.0)}
    quantities: dict[str, Callable[[nn.Module, Tensor], float]] = {
        "forward, ms": lambda model, x: 1e3 * seconds(model, x, options.repeats, train=False),
        "forward + backward, ms": lambda model, x: 1e3 * seconds(model, x, options.repeats, train=True),
        "kept for backward, MB": lambda model, x: kept_bytes(model, x) / 1e6,
    }
    for title, measure in quantities.items():
        print(
            f"\n{title} (batch {options.batch})\n\n| L | " + " | ".join(models) + " |\n|" + "---:|" * (len(models) + 1)
        )
        columns: dict[str, list[float]] = {name: [] for name in models}
        for length in options.lengths:
            x = torch.randn(options.batch, length, WIDTH)
            for name, model in models.items():
                # Its backward pass costs minutes at 1,024 tokens: every step's gradient is as long as the sequence.
                skipped = name == "transformers" and length > options.reference_limit
                columns[name].append(math.nan if skipped else measure(model, x))
            print(f"| {length} | " + " | ".join(f"{columns[name][-1]:.1f}" for name in models) + " |", flush=True)
        exponents = []
        for column in columns.values():
            measured = [(n, value) for n, value in zip(options.lengths, column, strict=True) if not math.isnan(value)]
            exponents.append(fitted_exponent(*zip(*measured, strict=True)) if len(measured) > 1 else math.nan)
        print("| exponent | " + " | ".join(f"{value:.2f}" for value in exponents) + " |")


if __name__ == "__main__":
    main()
