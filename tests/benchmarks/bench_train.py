"""Training speed of `irra` and `bdam` beside IRRA's own program, the bare towers, the loaders and the device's peak.

    git clone https://github.com/anosorae/IRRA && git -C IRRA checkout cfc2378
    python tests/benchmarks/bench_train.py IRRA                                   # a small model on the CPU, minutes
    python tests/benchmarks/bench_train.py IRRA --device cuda --batches 64 256    # ViT-B/16 at 384x128
    python tests/benchmarks/bench_train.py IRRA --cpu-time                        # on a machine that does other things
    python tests/benchmarks/bench_train.py IRRA --where                           # what a step does beyond the towers

Both sides train on the same files: random pictures of CUHK-PEDES's sizes in its layout, decoded anew in every round
(ours without its cache). Ours is `Trainer.run` with the recipe's settings, in bfloat16 on a GPU and with and without
`train.compile`. Theirs is `do_train` with the options of run_irra.sh; its code is imported, not copied, and weights are
random numbers in a CLIP of the same shape. It runs in float16 on a GPU, where nothing of it is changed but the
TensorBoard writer. On a CPU "cuda" is read as the CPU and float16 as float32, from outside.

All take turns, `--rounds` times, after one round that is not counted. A rate is the median over rounds of images per
second from the request for batch `WARM` to the request after the last one, loading included; `spread` is the largest
distance of a round from its median. One step in `train.log_every`, and the last, reports the gradient norm of every
loss too, as in any training of ours. `bare` is forward and backward of the same towers on one batch that lies on the
device: no data, losses or optimiser. `GFLOP` are the operations per image that a step executes, forward and backward;
`of peak` is their rate over the device's: the data sheet's for bfloat16 on a GPU, a large float32 product's on a CPU,
measured in the same rounds. `memory` is the most that one training needs, measured in a process of its own: of
PyTorch's allocator on a GPU, of the process beyond what it had before the model on a CPU.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from train_data import read_corpus, write_dataset
from train_irra import Theirs
from train_sides import WARM, Clock, Ours, clock_of, wait_for

PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bfloat16 (float16 before Ampere) operations per second as data sheets say, by part of the device's name."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        rates: images per second of each round.
        bare, beside: names of the rows whose rates it is compared with.
        flops: per image.
        memory: bytes.
    """

    rates: list[float]
    bare: str = ""
    beside: str = ""
    flops: float | None = None
    memory: float | None = None

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def table(rows: Mapping[str, Row], peak: float) -> str:
    """Return the rows as a Markdown table; `peak` is in operations per second."""
    lines = ["| what | images/s | spread | of IRRA | of bare | GFLOP | of peak | memory |", "| --- |" + " ---: |" * 7]
    for name, row in rows.items():
        spread = max(abs(rate / row.rate - 1) for rate in row.rates)
        cells = [
            f"{row.rate:.3g}" if row.rate < 100 else f"{row.rate:.0f}",
            f"{spread:.0%}",
            f"{row.rate / rows[row.beside].rate:.2f}" if row.beside in rows else "",
            f"{row.rate / rows[row.bare].rate:.0%}" if row.bare in rows else "",
            "" if row.flops is None else f"{row.flops / 1e9:.2f}",
            "" if row.flops is None else f"{row.flops * row.rate / peak:.1%}",
            "" if row.memory is None else f"{row.memory / 1e9:.2f} GB",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The run


def peak_of(device: torch.device) -> float | None:
    """What the data sheet says, None for a CPU or an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def product_rate(device: torch.device, clock: Clock) -> float:
    """Operations per second of a large matrix product, the best of three."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(3):
        wait_for(device)
        started = clock()
        left @ left
        wait_for(device)
        best = max(best, 2 * size**3 / (clock() - started))
    return best


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes: its memory now, and the most it ever had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def sides(given: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """What takes part: label, recipe (empty: theirs) and whether it is compiled."""
    found = {"IRRA": ("", False)} if given.checkout else {}
    for method in given.methods:
        found[method] = (method, False)
        if given.device == "cuda":
            found[f"{method}, compiled"] = (method, True)
    return found


def made(label: str, given: argparse.Namespace, batch: int, folder: Path) -> Ours | Theirs:
    name, compiled = sides(given)[label]
    root = folder / f"data-{batch}"
    if not name:
        return Theirs(root, given, batch, folder)
    return Ours(name, read_corpus(root, folder / f"run-{batch}"), given, batch, compiled)


def alone(label: str, given: argparse.Namespace, batch: int, folder: Path) -> float:
    """Bytes that one side needs, from a process of its own."""
    words = [*sys.argv[1:], "--alone", label, "--batches", str(batch), "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{label} alone: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def needs(label: str, given: argparse.Namespace) -> float:
    device = torch.device(given.device)
    before = resident("VmRSS")
    made(label, given, given.batches[0], given.folder).train()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


def rows_of(label: str, side: Ours | Theirs) -> tuple[dict[str, Row], dict[str, Callable[[], float]]]:
    """The lines of a side, and what measures their rates."""
    if isinstance(side, Theirs):
        rows = {label: Row([], flops=side.flops()), f"{label}, loader": Row([])}
        return rows, {label: side.train, f"{label}, loader": side.load}
    whole, bare = side.flops()
    fair = "IRRA" if side.method.name == "irra" else ""
    rows = {label: Row([], bare=f"{label}, bare", beside=fair, flops=whole), f"{label}, bare": Row([], flops=bare)}
    turns = {label: side.train, f"{label}, bare": side.bare}
    if not side.config.compile:
        rows[f"{label}, loader"] = Row([], beside=f"{fair}, loader")
        turns[f"{label}, loader"] = side.load
    return rows, turns


def compare(given: argparse.Namespace, batch: int, folder: Path) -> None:
    """Print the table of one batch size."""
    device = torch.device(given.device)
    write_dataset(folder / f"data-{batch}", (given.steps + WARM) * batch // 2)
    rows: dict[str, Row] = {}
    turns: dict[str, Callable[[], float]] = {}
    built = {label: made(label, given, batch, folder) for label in sides(given)}
    for label, side in built.items():
        lines, work = rows_of(label, side)
        rows |= lines
        turns |= work
    products = []
    for number in range(given.rounds + 1):
        products.append(product_rate(device, clock_of(given)))
        for label, turn in turns.items():
            rate = turn()
            if number:
                rows[label].rates.append(rate)
    for label in built:
        rows[label].memory = alone(label, given, batch, folder)
    peak = peak_of(device) or max(products)
    print("\nrates by processor time" if given.cpu_time else "")
    print(f"batches of {batch}, {given.steps} steps in each of {given.rounds} rounds; peak {peak / 1e12:.3g} TFLOP/s")
    print(f"(a large product in these rounds: {', '.join(f'{rate / 1e12:.3g}' for rate in products)})\n")
    print(table(rows, peak), flush=True)
    if given.where:
        for label, side in built.items():
            if isinstance(side, Ours):
                print_parts(label, side.where(given.steps))


def print_parts(label: str, seconds: Mapping[str, float]) -> None:
    print(f"\n| {label}: part of a step | ms |\n| --- | ---: |")
    total = sum(value for name, value in seconds.items() if name != "bare towers")
    for name, value in {**seconds, "all parts": total}.items():
        print(f"| {name} | {1000 * value:.1f} |")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="folder of anosorae/IRRA; without it ours alone")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 8 on a CPU, 64 and 256 on a GPU")
    parser.add_argument("--steps", type=int, help="timed steps per round; default: 10 on a CPU, 40 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of both loaders; default: ours and theirs, on a CPU none")
    parser.add_argument("--methods", nargs="*", default=["irra", "bdam"])
    parser.add_argument("--cpu-time", action="store_true", help="rates by processor time, on a machine that is busy")
    parser.add_argument("--where", action="store_true", help="print the parts of a step too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    gpu = given.device == "cuda"
    if given.cpu_time and (gpu or given.workers):
        parser.error("--cpu-time counts this process alone: on a CPU, without workers")
    given.batches = given.batches or ([64, 256] if gpu else [8])
    given.steps = given.steps or (40 if gpu else 10)
    return given


def main() -> None:
    given = parsed()
    logging.disable(logging.INFO)
    if given.alone:
        print(needs(given.alone, given))
        return
    with tempfile.TemporaryDirectory() as folder:
        for batch in given.batches:
            compare(given, batch, Path(folder))
    print("\nTargets: 1.5 of IRRA or more on a GPU, 90 % of bare or more, memory no higher than IRRA's.")


if __name__ == "__main__":
    main()
