"""Images per second of the loader alone, beside a torchvision pipeline and beside the training step it feeds.

    python tests/benchmarks/bench_loader.py                       # all sizes, about ten minutes
    python tests/benchmarks/bench_loader.py --sizes 384x128 --files jpg128x64 --steps tiny
    python tests/benchmarks/bench_loader.py --profile             # where the time of one image goes
    python tests/benchmarks/bench_loader.py --cpu-time            # on a machine that does other things too
    python tests/benchmarks/bench_loader.py --decoders            # other decoders and resizers, and whether they agree
    python tests/benchmarks/bench_loader.py --ahead               # how many batches must wait for a step

Prints one Markdown table. `torchvision` is IRRA's pipeline written with torchvision in a DataLoader: PIL open, Resize,
RandomHorizontalFlip, Pad, RandomCrop, ToTensor, Normalize, RandomErasing; it loads no texts, ours does. `workers` are
its processes and our threads; 0 loads when asked. `first` is our epoch over files that were not decoded before,
`later` the next one with the same TrainingSet, which keeps decoded images (all of these fit into its cache). Both are
measured with numbers (what a CPU trains on) and with bytes (what a GPU gets, which finishes them itself). A rate is the
median of `--repeats` epochs, all pipelines in turn, so that a busy moment of the machine hits all of them; `spread` is
the largest distance of a rate from its median. The step is forward and backward of the image tower alone with random
weights, so a whole method takes longer. `waits` is the time that loading bytes takes longer than the step, as a share
of loading, if they ran side by side: 0 means that nothing waits. With `--cpu-time` a rate is images per second of
processor time, that of the workers included: the cost, not the speed.
"""

import argparse
import cProfile
import io
import math
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.io import decode_jpeg, decode_png

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
) -> dict[str, list[float]]:
    """The rates of each pipeline, one per turn."""
    found: dict[str, list[float]] = {}
    for turn in range(repeats):
        found.setdefault("torchvision", []).append(epoch_rate(Torchvision(paths, size), workers, turn, clock))
        for kind in ("numbers", "bytes"):
            samples = ours(paths, size)
            samples.raw = kind == "bytes"
            for place, name in enumerate(("first", "later")):
                rate = epoch_rate(samples, workers, 2 * turn + place, clock)
                found.setdefault(f"{name}, {kind}", []).append(rate)
    return found


def spread(rates: Iterable[Sequence[float]]) -> str:
    """The largest distance of a rate from the median of its row."""
    return f"{max(abs(rate / np.median(row) - 1) for row in rates for rate in row):.0%}"


def rate_cells(found: Mapping[str, Sequence[float]]) -> list[str]:
    """Each pipeline's rate with its ratio to the first one's."""
    middle = {name: float(np.median(row)) for name, row in found.items()}
    base = middle["torchvision"]
    cells = [f"{base:.0f}"]
    for name, rate in middle.items():
        if name != "torchvision":
            cells += [f"{rate:.0f}", f"{rate / base:.2f}"]
    return [*cells, spread(found.values())]


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


def microseconds(call: Callable[[int], object], count: int) -> float:
    """Microseconds per call, the best of five rounds: what the work costs when nothing disturbs it."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for number in range(count):
            call(number)
        best = min(best, time.perf_counter() - started)
    return 1e6 * best / count


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    gaps = [np.abs(a.astype(int) - b.astype(int)) for a, b in zip(ours, theirs, strict=True)]
    return f"{max(int(gap.max()) for gap in gaps)} in {np.mean([(gap > 0).mean() for gap in gaps]):.3%} of the numbers"


def decoders(kind: str, paths: Sequence[Path], size: tuple[int, int]) -> None:
    """Print what decoding and resizing cost with Pillow and with torch, and how far their bytes are apart."""
    count = len(paths)
    payload = [path.read_bytes() for path in paths]
    buffers = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in payload]
    decode = decode_jpeg if kind.startswith("jpg") else decode_png
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in payload]
    arrays = [np.array(picture) for picture in pictures]
    other = [decode(buffer).permute(1, 2, 0).numpy() for buffer in buffers]
    rows = [
        ("decode", "Pillow", microseconds(lambda n: Image.open(io.BytesIO(payload[n])).load(), count), ""),
        ("decode", "torchvision", microseconds(lambda n: decode(buffers[n]), count), difference(arrays, other)),
    ]
    tensors = [torch.from_numpy(array).permute(2, 0, 1)[None] for array in arrays]
    for mode in ("bilinear", "bicubic"):
        way = Image.Resampling[mode.upper()]

        def small(number: int, way: Image.Resampling = way) -> Image.Image:
            return pictures[number].resize((size[1], size[0]), way)

        def smaller(number: int, mode: str = mode) -> torch.Tensor:
            return torch.nn.functional.interpolate(tensors[number], size, mode=mode, antialias=True)

        gap = difference(
            [np.asarray(small(n)) for n in range(count)], [smaller(n)[0].permute(1, 2, 0).numpy() for n in range(count)]
        )
        rows.append((f"resize {mode}", "Pillow", microseconds(small, count), ""))
        rows.append((f"resize {mode}", "torch", microseconds(smaller, count), gap))
    for step, who, cost, gap in rows:
        print(f"| {kind} | {step} | {who} | {cost:.0f} | {gap} |", flush=True)


def ahead_table(threads: int = 8, steps: int = 150, seconds: float = 0.01) -> None:
    """Print the time of `load_ahead` over the ideal one when loading times differ by 30 %; all sleep, none computes."""
    spread_of_log = math.sqrt(math.log(1 + 0.3**2))
    print(
        "| loader / step | " + " | ".join(f"{ahead} ahead" for ahead in (threads + 1, 2 * threads, 3 * threads)) + " |"
    )
    print("| --- |" + " ---: |" * 3)
    for ratio in (0.8, 1.0, 1.25, 1.5):
        draws = np.random.default_rng(0).lognormal(-(spread_of_log**2) / 2, spread_of_log, steps)
        times = [float(draw) for draw in draws * seconds * threads / ratio]
        cells = []
        for ahead in (threads + 1, 2 * threads, 3 * threads):
            started = time.perf_counter()
            for _ in load_ahead(time.sleep, times, threads=threads, ahead=ahead):
                time.sleep(seconds)
            ideal = max(sum(times) / threads, steps * seconds)
            cells.append(f"{(time.perf_counter() - started) / ideal:.2f}")
        print(f"| {ratio} | " + " | ".join(cells) + " |", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["384x128", "256x128", "224x224"], help="network input, HxW")
    parser.add_argument("--files", nargs="+", default=["jpg128x64", "jpg400x150", "png400x150"], help="suffix and HxW")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", nargs="*", default=list(TOWERS), choices=list(TOWERS), help="towers to compare with")
    parser.add_argument("--device", default="cpu", help="where the step runs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--decoders", action="store_true")
    parser.add_argument("--ahead", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args()


def compare(given: argparse.Namespace, files: Mapping[str, Sequence[Path]], clock: Clock) -> None:
    """Print the table of loaders."""
    for kind, paths in files.items():
        print(f"{kind}: {np.mean([path.stat().st_size for path in paths]) / 1000:.1f} kB per file")
    for workers in given.workers:
        seconds = start_seconds(Torchvision(next(iter(files.values())), (64, 32)), workers)
        print(f"torchvision with {workers} workers: {seconds:.2f} s until the first batch of one small image")
    unit = "images per second of processor time" if given.cpu_time else "images per second"
    print(f"epochs of {given.images} images in batches of {BATCH}, worker start included; {unit}")
    pipelines = [f"{name}, {kind}" for kind in ("numbers", "bytes") for name in ("first", "later")]
    columns = ["size", "files", "workers", "torchvision", *(c for name in pipelines for c in (name, "ratio")), "spread"]
    columns += [part for tower in given.steps for part in (f"{tower} step", "first waits", "later waits")]
    print("\n| " + " | ".join(columns) + " |")
    print("|" + " ---: |" * len(columns))
    for shape in given.sizes:
        size = pair(shape)
        steps = {tower: step_rate(tower, size, given.device, clock) for tower in given.steps}
        for kind, paths in files.items():
            for workers in given.workers:
                found = loader_rates(paths, size, workers, given.repeats, clock)
                first, later = (float(np.median(found[f"{name}, bytes"])) for name in ("first", "later"))
                cells = [shape, kind, str(workers), *rate_cells(found)]
                for step in steps.values():
                    cells += [f"{step:.3g}", waiting(first, step), waiting(later, step)]
                print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    given = parsed()
    torch.set_num_threads(1)
    if given.ahead:
        ahead_table()
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: write_files(Path(folder), kind, given.images) for kind in given.files}
        if given.decoders:
            print("| files | step | by | µs per image | differs from Pillow by at most |\n|" + " --- |" * 5)
        for kind, paths in files.items():
            if given.profile:
                profile(paths, pair(given.sizes[0]))
            elif given.decoders:
                decoders(kind, paths[:64], pair(given.sizes[0]))
        if not (given.profile or given.decoders):
            compare(given, files, cpu_seconds if given.cpu_time else time.perf_counter)


if __name__ == "__main__":
    main()
