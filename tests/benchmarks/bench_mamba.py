"""Time, memory and operations of the fusion's sequence models against sequence length, with fitted exponents.

    python tests/benchmarks/bench_mamba.py [--lengths 64 128 256 512 1024 2048] [--batch 2] [--repeats 5] [--threads N]
                                           [--out FILE.md]

Prints the machine and one Markdown table per quantity; `--out` writes the same text to a file. `ours` is two residual
Mamba layers, `transformers` the same two layers with Hugging Face's CPU path (a Python loop over tokens), `attention` a
Transformer encoder of four layers, as in the papers' efficiency figure, and `attention, dropout` the same with the
fusion's dropout of 0.1, which keeps PyTorch's CPU from using its fused kernel in training: only there is the L x L
matrix held, and only there does memory grow with the square of the length.

A time is the median of the repeats, the fastest in brackets: on a machine that others use the two drift apart, and then
neither is worth much. Exponents are slopes of log(median) on log(L): over all lengths, and over the upper half of them,
because a short sequence costs what starting the operations costs. Memory is what autograd keeps between forward and
backward, operations are counted (`reidctl.evaluation.efficiency`); both are the same on every machine.
"""

import argparse
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from reidctl.evaluation.efficiency import count_flops, kept_bytes, seconds
from reidctl.layers.fusion import _transformer
from reidctl.layers.mamba import MambaStack

WIDTH = 256
DROPOUT = "attention, dropout"
Cell = tuple[float, ...]


def fitted_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) on log(length); NaN for fewer than two lengths."""
    if len(lengths) < 2:
        return math.nan
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


class TransformersStack(nn.Module):
    """Two residual layers of transformers' MambaMixer, weights taken from ours."""

    def __init__(self, stack: MambaStack) -> None:
        super().__init__()
        config = transformers.MambaConfig(
            vocab_size=2, hidden_size=WIDTH, num_hidden_layers=len(stack.layers), use_cache=False
        )
        self.mixers = nn.ModuleList(block.mixer for block in transformers.MambaModel(config).layers)
        for mixer, block in zip(self.mixers, stack.layers, strict=True):
            mixer.load_state_dict(block.mixer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = mixer(x) + x
        return x


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = MambaStack(2, WIDTH)
    return {
        "ours": ours,
        "transformers": TransformersStack(ours),
        "attention": _transformer(WIDTH, 4, 8, 0.0),
        DROPOUT: _transformer(WIDTH, 4, 8, 0.1),
    }


def timed(model: nn.Module, x: Tensor, repeats: int, *, train: bool) -> Cell:
    """Median and fastest pass, in milliseconds."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    model.train(train)
    with torch.set_grad_enabled(train):
        times = seconds(step if train else lambda: model(x), repeats)
    return 1e3 * statistics.median(times), 1e3 * min(times)


def kept(model: nn.Module, x: Tensor) -> Cell:
    model.train()
    return (kept_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()]) / 1e6,)


def counted(model: nn.Module, x: Tensor) -> Cell:
    with torch.no_grad():
        return (count_flops(lambda: model.eval()(x), model) / 1e9,)


def machine() -> str:
    """What the numbers depend on, one line each."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []  # fmt: skip
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    lines = [
        f"{names[0] if names else platform.processor() or 'unknown processor'}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {load} at the start",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(title: str, lengths: Sequence[int], columns: dict[str, dict[int, Cell]]) -> str:
    """One Markdown table; a length that a model was not measured at is a dash."""
    lines = [f"{title}\n", "| L | " + " | ".join(columns) + " |", "|" + "---:|" * (len(columns) + 1)]
    for length in lengths:
        cells = [column.get(length, ()) for column in columns.values()]
        lines.append(f"| {length} | " + " | ".join(map(_cell, cells)) + " |")
    middle = sorted(lengths)[len(lengths) // 2]
    for label, lowest in (("exponent", 0), (f"exponent, L >= {middle}", middle)):
        slopes = []
        for column in columns.values():
            used = {length: cell[0] for length, cell in column.items() if length >= lowest}
            slopes.append(fitted_exponent(list(used), list(used.values())))
        lines.append(f"| {label} | " + " | ".join("–" if math.isnan(s) else f"{s:.2f}" for s in slopes) + " |")
    return "\n".join(lines)


def _cell(values: Cell) -> str:
    if not values:
        return "–"
    first, *rest = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
    return first + "".join(f" ({value})" for value in rest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--reference-limit", type=int, default=256, help="longest one that `transformers` passes back")
    parser.add_argument("--out", type=Path, help="also write the text to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    said: list[str] = []

    def say(text: str) -> None:
        print(text + "\n", flush=True)
        said.append(text)
        if options.out:  # after every table, so that a run that is broken off leaves what it has
            options.out.write_text("\n\n".join(said) + "\n", encoding="utf-8")

    say(machine())
    say(f"Batch {options.batch}, width {WIDTH}, float32, median (fastest) of {options.repeats} passes after one.")
    quantities: dict[str, Callable[[nn.Module, Tensor], Cell]] = {
        "forward, ms": lambda model, x: timed(model, x, options.repeats, train=False),
        "forward + backward, ms": lambda model, x: timed(model, x, options.repeats, train=True),
        "kept for backward, MB": kept,
        "forward, GFLOP (multiply-add = 2)": counted,
    }
    built = models()
    for title, measure in quantities.items():
        columns: dict[str, dict[int, Cell]] = {name: {} for name in built}
        if title.startswith("forward,"):
            del columns[DROPOUT]  # no dropout without training
        for length in options.lengths:
            x = torch.randn(options.batch, length, WIDTH)
            for name, column in columns.items():
                # Its backward pass costs minutes at 1,024 tokens: every step's gradient is as long as the sequence.
                # Its scan is no layer of ours, so its elementwise operations would not be counted.
                passes_back = title != "forward, ms"
                unfit = measure is counted or (passes_back and length > options.reference_limit)
                if not (name == "transformers" and unfit):
                    column[length] = measure(built[name], x)
        say(table(title, options.lengths, columns))


if __name__ == "__main__":
    main()
