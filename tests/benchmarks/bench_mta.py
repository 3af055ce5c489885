"""What the adapter of MTA-CLIP and the two stages of CLIP-ReID cost, at the paper's shape with random weights.

    python tests/benchmarks/bench_mta.py sga [--batch 16] [--repeats 9] [--threads N] [--size vit-b-16|tiny]
    python tests/benchmarks/bench_mta.py stage1 [--batch 64] [--repeats 5] [--threads N] [--people 751]
    python tests/benchmarks/bench_mta.py stage2 [--batch 16] [--repeats 3] [--threads N] [--people 751]

`sga`: embedding a batch of images with and without the adapter, turn by turn, each kind and read-out; parameters,
milliseconds and the ratio to the encoder without it. `stage1`: a step on kept image features, against the same step
that computes them, and against the published code's prompts of 77 tokens (ours have no padding). `stage2`: forward,
backward and optimiser step of `clip-reid` and of `mta-clip` with all blocks and with the last four, on one batch,
against the image encoder's bare forward and backward pass. A time is the median, the fastest in brackets.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reidctl.backbones.weights import build
from reidctl.batch import Batch, Roster
from reidctl.config import load_recipe
from reidctl.methods.base import Method, build_method
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer

SIZES: dict[str, tuple[str, tuple[int, int] | None]] = {
    "vit-b-16": ("clip:ViT-B-16", (256, 128)),
    "tiny": ("clip:tiny", None),
}
Work = Callable[[], object]


def in_turns(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every round, after a round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def cell(seconds: list[float]) -> str:
    """Median and fastest in milliseconds."""
    return f"{1000 * statistics.median(seconds):,.1f} ({1000 * min(seconds):,.1f})"


def method_of(name: str, args: argparse.Namespace, **settings: Any) -> Method:
    """A method at the asked size, for people of one dataset, or half of them in each of two."""
    spec, size = SIZES[args.size]
    half = args.people // 2
    two = Roster(("a", "b"), (tuple(range(half)), tuple(range(half, args.people))))
    torch.manual_seed(0)
    return build_method(name, settings, build(spec, image_size=size), args.people, two)


def batch_of(method: Method, args: argparse.Namespace) -> Batch:
    """Random pixels, four of each person, all of the first dataset."""
    height, width = method.backbone.image_size
    person = torch.arange(args.batch) // 4 % (args.people // 2)
    return Batch(image=torch.randn(args.batch, 3, height, width), person=person, domain=torch.zeros_like(person))


def stepper(method: Method, stage: str, config: TrainConfig, batch: Batch) -> Work:
    """One training step."""
    method.begin(stage)
    method.train()
    optimizer = build_optimizer(method, stage, config)

    def step() -> None:
        total = method.objective(method.losses(batch, stage))
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def sga(args: argparse.Namespace) -> None:
    """The adapter's share of embedding images."""
    variants: dict[str, dict[str, Any]] = {
        "without": {"enabled": False},
        "gate, 8 groups": {},
        "linear, 8 groups": {"kind": "linear"},
        "ema, 8 groups": {"kind": "ema"},
        "gate, before the last block": {"readout": "pre_last"},
    }
    methods = {name: method_of("mta-clip", args, sga=settings).eval() for name, settings in variants.items()}
    batch = batch_of(methods["without"], args)
    with torch.inference_mode():
        embed: dict[str, Work] = {name: (lambda m=m: m.embed_tasks(batch)) for name, m in methods.items()}  # type: ignore[misc]
        seconds = in_turns(embed, args.repeats)
    base = statistics.median(seconds["without"])
    towers = sum(value.numel() for value in methods["without"].backbone.image.parameters())
    print(f"| adapter | parameters | of the image encoder | ms per batch of {args.batch} | ratio |")
    print("|---|---:|---:|---:|---:|")
    for name, method in methods.items():
        own = sum(value.numel() for key, value in method.named_parameters() if key.startswith("sga."))
        ratio = statistics.median(seconds[name]) / base
        print(f"| {name} | {own:,} | {100 * own / towers:.2f} % | {cell(seconds[name])} | {ratio:.3f} |")


def stage1(args: argparse.Namespace) -> None:
    """A step of prompt learning, and what keeping features and short prompts spare."""
    method: Any = method_of("clip-reid", args)
    batch = batch_of(method, args)
    kept = Batch(person=batch.person, domain=batch.domain, frozen=method.eval().frozen_features(batch))
    config = TrainConfig(lr_prompt=3.5e-4)
    length = method.backbone.context_length
    prompt = method.prompt(method.id_tokens[:1].detach(), 0)
    short = prompt.embeddings.shape[1]

    def padded() -> None:
        owner = torch.unique(batch.require("person"))
        given = method.prompt(method.id_tokens[owner], 0)
        rest = given.embeddings[:, -1:].expand(-1, length - short, -1)
        mask = torch.cat([given.mask, torch.zeros(len(owner), length - short, dtype=torch.bool)], dim=1)
        whole = torch.cat([given.embeddings, rest], dim=1)
        method.backbone.encode_embedded(whole, mask).pooled.sum().backward()

    def ours() -> None:
        method.prompt_features(torch.unique(batch.require("person"))).sum().backward()

    steps = {
        "step on kept features": stepper(method, "prompt-stage", config, kept),
        "step that computes them": stepper(method, "prompt-stage", config, batch),
        f"prompts of {short} tokens, forward and backward": ours,
        f"prompts of {length} tokens, forward and backward": padded,
    }
    table(in_turns(steps, args.repeats), "step on kept features", args)


def stage2(args: argparse.Namespace) -> None:
    """A step of stage 2 against the bare encoder."""
    train = TrainConfig(**load_recipe("clip-reid")["train"])
    methods = {
        "clip-reid": method_of("clip-reid", args),
        "mta-clip, all blocks": method_of("mta-clip", args, unfreeze_blocks="all"),
        "mta-clip, last four blocks": method_of("mta-clip", args, unfreeze_blocks=4),
    }
    batch = batch_of(methods["clip-reid"], args)
    bare = method_of("clip-reid", args).backbone

    def forward_backward() -> None:
        total: Tensor = bare.encode_image(batch.require("image")).cls.sum()
        bare.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]

    steps: dict[str, Work] = {"image encoder alone": forward_backward}
    steps |= {name: stepper(method, "finetune", train, batch) for name, method in methods.items()}
    table(in_turns(steps, args.repeats), "image encoder alone", args)


def table(seconds: dict[str, list[float]], baseline: str, args: argparse.Namespace) -> None:
    """Print medians and their ratio to a baseline."""
    base = statistics.median(seconds[baseline])
    print(f"| batch of {args.batch}, {args.people} people | ms, median (fastest) | ratio to {baseline} |")
    print("|---|---:|---:|")
    for name, each in seconds.items():
        print(f"| {name} | {cell(each)} | {statistics.median(each) / base:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sga", "stage1", "stage2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--people", type=int, default=751)
    parser.add_argument("--size", choices=list(SIZES), default="vit-b-16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.size}, cpu, float32\n")
    {"sga": sga, "stage1": stage1, "stage2": stage2}[args.what](args)


if __name__ == "__main__":
    main()
