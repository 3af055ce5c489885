"""Images per second of the loader alone, beside a torchvision pipeline and beside the training step it feeds.

    python tests/benchmarks/bench_loader.py                       # all sizes, about ten minutes
    python tests/benchmarks/bench_loader.py --sizes 384x128 --files jpg128x64 --steps tiny
    python tests/benchmarks/bench_loader.py --profile             # where the time of one image goes
    python tests/benchmarks/bench_loader.py --cpu-time            # on a machine that does other things too

Prints one Markdown table. `torchvision` is IRRA's pipeline written with torchvision in a DataLoader: PIL open, Resize,
RandomHorizontalFlip, Pad, RandomCrop, ToTensor, Normalize, RandomErasing; it loads no texts, ours does. `workers` are
its processes and our threads; 0 loads when asked. `first` is our epoch over files that were not decoded before, `later`
the next one with the same TrainingSet, which keeps decoded images (all of these fit into its cache). A rate is the best
of `--repeats` epochs, all pipelines in turn. The step is forward and backward of the image tower alone with random
weights, so a whole method takes longer. `waits` is the time that loading takes longer than the step, as a share of
loading, if they ran side by side: 0 means that nothing waits. With `--cpu-time` a rate is images per second of
processor time, that of the workers included: the cost, not the speed.
"""

import argparse
import cProfile
import io
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from reidctl import tables
from reidctl.augment import AugmentConfig
from reidctl.backbones.statistics import STATISTICS
from reidctl.backbones.weights import build
from reidctl.batch import Tokens
from reidctl.data import TrainingSet, build_corpus
from reidctl.loading import load_ahead
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.render import render

MEAN, STD = STATISTICS["clip"]
Clock = Callable[[], float]
BATCH = 64
CAPTION = "A person wears a bright coat and dark trousers and carries a bag."
TOWERS = {"tiny": ("clip:tiny", 32), "ViT-B/16": ("clip:ViT-B-16", 2)}


def write_files(folder: Path, kind: str, count: int) -> list[Path]:
    """Write pictures of people with camera noise; `kind` is the suffix and the size, such as jpg400x150."""
    suffix, (height, width) = kind[:3], pair(kind[3:])
    base = [render(SynthConfig(people=8, images_per_person=2), n // 2, n % 2).pixels for n in range(16)]
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        picture = Image.fromarray(base[number % 16]).resize((width, height)).filter(ImageFilter.GaussianBlur(0.6))
        noisy = np.asarray(picture).astype(np.int16) + rng.integers(-6, 7, (height, width, 3))
        paths.append(folder / f"{kind}-{number}.{suffix}")
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def pair(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def ours(paths: Sequence[Path], size: tuple[int, int]) -> TrainingSet:
    rows = [
        {
            "image_id": path.stem,
            "path": path.name,
            "dataset": "bench",
            "split": "train",
            "person_id": f"bench:{number // 4}",
            "width": 1,
            "height": 1,
            "sha256": path.stem,
        }
        for number, path in enumerate(paths)
    ]
    texts = [
        {
            "caption_id": path.stem,
            "image_id": path.stem,
            "kind": "full",
            "source": "human",
            "conditioned_on": "image",
            "text": f"{CAPTION} {number}",
            "status": "ok",
        }
        for number, path in enumerate(paths)
    ]
    images = pd.DataFrame(rows, columns=list(tables.empty("images").columns))
    captions = pd.DataFrame(texts, columns=list(tables.empty("captions").columns))
    corpus = build_corpus(images, captions, None, paths[0].parent)
    augment = AugmentConfig()
    return TrainingSet(
        corpus,
        size=size,
        mean=MEAN,
        std=STD,
        tokenize=tokenize,
        texts=("full",),
        augment=augment,
        interpolation=augment.interpolation or "bicubic",
    )


def tokenize(texts: list[str]) -> Tokens:
    ids = torch.ones(len(texts), 77, dtype=torch.long)
    return Tokens(ids, ids > 0)


class Torchvision(Dataset[torch.Tensor]):
    """IRRA's training transforms."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = list(paths)
        self.transform = T.Compose(
            [
                T.Resize(size),
                T.RandomHorizontalFlip(0.5),
                T.Pad(10),
                T.RandomCrop(size),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
                T.RandomErasing(scale=(0.02, 0.4), value=MEAN),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        image: torch.Tensor = self.transform(Image.open(self.paths[number]).convert("RGB"))
        return image


def loader(samples: TrainingSet | Torchvision, order: list[int], epoch: int, workers: int) -> Iterable[Any]:
    """The batches of an epoch as each side's training loads them."""
    if isinstance(samples, Torchvision):
        return DataLoader(samples, batch_sampler=chunks(order), num_workers=workers)
    keys = [(epoch, sample, place) for place, sample in enumerate(order)]
    return load_ahead(lambda batch: samples.collate([samples[key] for key in batch]), chunks(keys), threads=workers)


def chunks(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def cpu_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def epoch_rate(samples: TrainingSet | Torchvision, workers: int, epoch: int, clock: Clock = time.perf_counter) -> float:
    """Images per second of one epoch, start of the workers included."""
    order = np.random.default_rng(epoch).permutation(len(samples)).tolist()
    started = clock()
    for _ in loader(samples, order, epoch, workers):
        pass
    return len(samples) / (clock() - started)


def start_seconds(samples: Torchvision, workers: int) -> float:
    """Seconds until new workers have delivered a batch of one image; training pays them once an epoch."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in DataLoader(samples, batch_sampler=[[0]], num_workers=workers):
            pass
        best = min(best, time.perf_counter() - started)
    return best


def loader_rates(
    paths: Sequence[Path], size: tuple[int, int], workers: int, repeats: int, clock: Clock
) -> dict[str, float]:
    """The best rate of each pipeline; they take turns so that a busy moment of the machine hits all of them."""
    best = {"torchvision": 0.0, "first": 0.0, "later": 0.0}
    for turn in range(repeats):
        samples = ours(paths, size)
        found = {
            "torchvision": epoch_rate(Torchvision(paths, size), workers, turn, clock),
            "first": epoch_rate(samples, workers, 2 * turn, clock),
            "later": epoch_rate(samples, workers, 2 * turn + 1, clock),
        }
        best = {name: max(best[name], found[name]) for name in best}
    return best


def step_rate(tower: str, size: tuple[int, int], device: str, clock: Clock) -> float:
    """Images per second of forward and backward of an image tower."""
    spec, batch = TOWERS[tower]
    batch = batch if device == "cpu" else BATCH
    model = build(spec, image_size=size).to(device)
    images = torch.randn(batch, 3, *size, device=device)
    best = 0.0
    for _ in range(4):  # the first warms up
        started = clock()
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            loss = model.encode_image(images).cls.float().square().mean()
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, batch / (clock() - started))
    return best


def waiting(loader: float, step: float) -> str:
    return f"{max(0.0, 1 - loader / step):.0%}"


def profile(paths: Sequence[Path], size: tuple[int, int]) -> None:
    """Print what one epoch spends its time on, in this process."""
    samples = ours(paths, size)
    for name in ("first", "later"):
        recorder = cProfile.Profile()
        recorder.enable()
        epoch_rate(samples, 0, 0)
        recorder.disable()
        shown = io.StringIO()
        pstats.Stats(recorder, stream=shown).sort_stats("tottime").print_stats(14)
        kept = [line for line in shown.getvalue().splitlines() if line.strip()]
        print(f"{name} epoch, {len(paths)} images of {paths[0].name.split('-')[0]} at {size[0]}x{size[1]}")
        print("\n".join(kept[2:]), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["384x128", "256x128", "224x224"], help="network input, HxW")
    parser.add_argument("--files", nargs="+", default=["jpg128x64", "jpg400x150", "png400x150"], help="suffix and HxW")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", nargs="*", default=list(TOWERS), choices=list(TOWERS), help="towers to compare with")
    parser.add_argument("--device", default="cpu", help="where the step runs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    clock = cpu_seconds if given.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: write_files(Path(folder), kind, given.images) for kind in given.files}
        if given.profile:
            for kind in given.files:
                profile(files[kind], pair(given.sizes[0]))
            return
        for kind, paths in files.items():
            print(f"{kind}: {np.mean([path.stat().st_size for path in paths]) / 1000:.1f} kB per file")
        for workers in given.workers:
            seconds = start_seconds(Torchvision(next(iter(files.values())), (64, 32)), workers)
            print(f"torchvision with {workers} workers: {seconds:.2f} s until the first batch of one small image")
        heads = [f"{tower} step | first waits | later waits" for tower in given.steps]
        print(
            f"epochs of {given.images} images in batches of {BATCH}, worker start included; images per second", end=""
        )
        print(" of processor time" if given.cpu_time else "")
        columns = ["size", "files", "workers", "torchvision", "first", "ratio", "later", "ratio", *heads]
        print("\n| " + " | ".join(columns) + " |")
        print("|" + " ---: |" * " | ".join(columns).count("|") + " ---: |")
        for shape in given.sizes:
            size = pair(shape)
            steps = {tower: step_rate(tower, size, given.device, clock) for tower in given.steps}
            for kind, paths in files.items():
                for workers in given.workers:
                    found = loader_rates(paths, size, workers, given.repeats, clock)
                    base, first, later = found["torchvision"], found["first"], found["later"]
                    cells = [shape, kind, str(workers), f"{base:.0f}", f"{first:.0f}", f"{first / base:.2f}"]
                    cells += [f"{later:.0f}", f"{later / base:.2f}"]
                    for step in steps.values():
                        cells += [f"{step:.3g}", waiting(first, step), waiting(later, step)]
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
