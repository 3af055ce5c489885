"""What HPL costs: stage I on kept features of many images, and a step of stage II against a step of `irra`.

    python tests/benchmarks/bench_hpl.py stage1 [--images 50000] [--steps 3] [--threads N] [--size vit-b-16|tiny]
    python tests/benchmarks/bench_hpl.py stage2 [--pairs 64] [--bare 64] [--repeats 3] [--threads N] [--people 11003]

`stage1` writes a store of features of that many images (random numbers, as large as real: 194 tokens of 512 numbers
in half precision are 199 kB per image) and measures, per step of 64 pairs and 64 images: reading the rows a step needs,
in random order; the inversion networks; the prompt encoder; the whole step. The question is whether a step waits for
data. With --images 50000 at ViT-B/16 the store takes 10 GB of disk.

`stage2` measures forward, backward and optimiser step of `irra` and of `hpl` on one and the same batch, turn by turn,
for ViT-B/16 at 384x128 with random weights, and prints the ratio of the medians. The floor is the encoders alone, which
both have in common: their forward and backward pass with a sum as loss. A time is the median, the fastest in brackets.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reidctl.backbones.weights import build
from reidctl.batch import Batch, Tokens
from reidctl.frozen import FrozenFeatures
from reidctl.methods.base import Method, build_method
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer

SIZES = {"vit-b-16": ("clip:ViT-B-16", (384, 128)), "tiny": ("clip:tiny", None), "micro": ("clip:micro", None)}
WORDS = 40


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def cell(seconds: list[float]) -> str:
    """Median and fastest in milliseconds."""
    return f"{1000 * statistics.median(seconds):,.1f} ({1000 * min(seconds):,.1f})"


def batch_of(method: Method, pairs: int, bare: int, people: int) -> Batch:
    """Random pixels and words: pairs first, then images without a caption, four of each person."""
    height, width = method.backbone.image_size
    whole = pairs + bare
    length = min(WORDS, method.backbone.context_length)
    ids = torch.randint(300, 1000, (pairs, length))
    ids[:, 0], ids[:, -1] = method.backbone.tokenizer.start_id, method.backbone.tokenizer.end_id
    return Batch(
        image=torch.randn(whole, 3, height, width),
        person=torch.arange(whole) // 4 % people,
        texts={"full": Tokens(ids, torch.ones_like(ids, dtype=torch.bool))},
        has_text=torch.arange(whole) < pairs,
    )


def stepper(method: Method, stage: str, config: TrainConfig, batch: Callable[[], Batch]) -> Callable[[], None]:
    """One training step."""
    method.begin(stage)
    method.train()
    optimizer = build_optimizer(method, stage, config)

    def step() -> None:
        total = method.objective(method.losses(batch(), stage))
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def stage1(args: argparse.Namespace) -> None:
    """Reading against computing, per step."""
    spec, size = SIZES[args.size]
    backbone = build(spec, image_size=size)
    people = max(args.images // 8, 8)
    method = build_method("hpl", {}, backbone, people)
    tokens = (2 + backbone.grid[0] * backbone.grid[1], backbone.dim)
    length = min(WORDS, backbone.context_length)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        images = filled(Path(home) / "image.npy", (args.images, *tokens), rng)
        store = FrozenFeatures(
            {"image": images[:, 0], "image_tokens": images},
            {"text": filled(Path(home) / "eos.npy", (args.images, backbone.dim), rng),
             "text_tokens": filled(Path(home) / "text.npy", (args.images, length, backbone.dim), rng)},
        )  # fmt: skip
        mask = torch.ones(args.pairs, length, dtype=torch.bool)
        texts = {"full": Tokens(torch.zeros_like(mask, dtype=torch.long), mask)}
        whole = args.pairs + args.bare

        def read() -> Batch:
            rows = rng.integers(0, args.images, whole)
            person = torch.from_numpy(rng.integers(0, people, whole // 4)).repeat_interleave(4)
            return Batch(
                frozen=store.images(rows) | store.texts(rows[: args.pairs]),
                person=person,
                texts=texts,
                has_text=torch.arange(whole) < args.pairs,
            )

        held = read()
        pseudo = torch.randn(whole + args.pairs, 4, backbone.width_text, requires_grad=True)
        owners = torch.arange(len(pseudo)) % people

        def invert() -> None:
            total = method.pseudo_image(held.frozen["image_tokens"].float()).sum()  # type: ignore[operator]
            words = held.frozen["text_tokens"].float()
            (total + method.pseudo_text(words, mask).sum()).backward()  # type: ignore[operator]

        def prompts() -> None:
            total = method.prompted(pseudo, owners).sum()  # type: ignore[operator]
            (total + method.identity_prompts(torch.arange(whole // 4)).sum()).backward()  # type: ignore[operator]

        config = PromptConfig()
        rows = {
            "reading": timed(read, max(args.steps, 20)),
            "inversion networks": timed(invert, args.steps),
            "prompt encoder": timed(prompts, args.steps),
            "whole step, reading included": timed(stepper(method, "prompt-stage", config, read), args.steps),
        }
    size = f"{args.images:,} images kept, {images.nbytes / 1e9:.2f} GB"
    print(f"{size}; {args.pairs} pairs + {args.bare} images per step\n")
    print("| part | ms per step | share of the whole |\n|---|---:|---:|")
    total = statistics.median(rows["whole step, reading included"])
    for name, seconds in rows.items():
        print(f"| {name} | {cell(seconds)} | {100 * statistics.median(seconds) / total:.1f} % |")


def filled(path: Path, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A file of random half-precision numbers."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    some = rng.standard_normal((min(shape[0], 512), *shape[1:])).astype(np.float16)
    for start in range(0, shape[0], len(some)):
        array[start : start + len(some)] = some[: shape[0] - start]
    array.flush()
    return array


def stage2(args: argparse.Namespace) -> None:
    """A step of `hpl` against a step of `irra` on the same batch."""
    spec, size = SIZES[args.size]
    steps: dict[str, Callable[[], None]] = {}
    first: Batch | None = None
    for name in ("irra", "hpl"):
        torch.manual_seed(0)
        method = build_method(name, {}, build(spec, image_size=size), args.people)
        first = first or batch_of(method, args.pairs, args.bare, args.people)
        steps[name] = stepper(method, "finetune", TrainConfig(), lambda held=first: held)
    backbone = build(spec, image_size=size)

    def encoders() -> None:
        assert first is not None
        image = backbone.encode_image(first.require("image")).cls.sum()
        total: Tensor = image + backbone.encode_text(first.texts["full"]).pooled.sum()
        total.backward()  # type: ignore[no-untyped-call]

    steps["encoders alone, no optimiser"] = encoders
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats + 1):
        for name, work in steps.items():
            found[name] += timed(work, 1)
    kept = {name: seconds[1:] for name, seconds in found.items()}  # the first turn warms up
    base = statistics.median(kept["irra"])
    shape = "x".join(map(str, backbone.image_size))
    print(f"{args.pairs} pairs + {args.bare} images of {shape}, {args.people:,} people\n")
    print("| | ms per step | ratio to irra |\n|---|---:|---:|")
    for name, seconds in kept.items():
        print(f"| {name} | {cell(seconds)} | {statistics.median(seconds) / base:.2f} |")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stage1", "stage2"))
    parser.add_argument("--size", choices=SIZES, default="vit-b-16")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--people", type=int, default=11_003)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--bare", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", default=None, help="where the store lies; default: the system's temporary folder")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    {"stage1": stage1, "stage2": stage2}[args.what](args)


if __name__ == "__main__":
    main()
