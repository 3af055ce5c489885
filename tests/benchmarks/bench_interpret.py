"""What counterfactual masking costs beside plain encoding of as many pictures, in the same run.

    python tests/benchmarks/bench_interpret.py [--spec vit-bert:tiny] [--queries 1000] [--image-size H W] [--fill mean]
        [--gallery 200] [--batch 128] [--threads 1] [--explainers 1] [--device cpu] [--rounds 2]
    python tests/benchmarks/bench_interpret.py --spec clip:ViT-B-16 --image-size 384 128 --queries 2 --batch 32

A backbone with random weights, random pictures (written as PNG and decoded from there) and random maps. `measure`
masks the target of every query with 6 fractions and 8 controls (`random` 10 times, `block` and `shifted` 3 times),
encodes, ranks and writes its parts. `plain` is the image tower alone on normalised pictures that lie in memory, in
batches of the same size. Both are measured turn by turn, `plain` before and after each `measure`; the ratio is that of
the medians of seconds per encoded picture: 1.00 means that the engine waits for nothing but the encoder. On a CPU
seconds are those of the process, which others on the same machine disturb less. Peak memory is that of the process,
with its part that was there before the first `measure`.
"""

import argparse
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from reidctl.backbones.base import dropping
from reidctl.backbones.weights import build
from reidctl.explain.controls import CONTROLS, Plan, pick_donors
from reidctl.explain.counterfactual import measure_parts
from reidctl.explain.masking import Judge, Pairs, Study
from reidctl.pixels import PixelStore

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class Counted:
    """Unit vectors of images, and how many were asked for."""

    def __init__(self, backbone):
        self.backbone, self.images = backbone, 0

    def __call__(self, images, keep, rows):
        self.images += len(images)
        if keep is None:
            return self.encode(images)
        with dropping(self.backbone.image, keep):
            return self.encode(images)

    def encode(self, images):
        return functional.normalize(self.backbone.encode_image(images).cls[:, 0], dim=1)


def pictures(folder, count):
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8))
        small.resize((128, 256), Image.Resampling.BICUBIC).save(path)
    return paths


def study_of(backbone, embed, paths, options):
    rng = np.random.default_rng(1)
    queries, gallery, dim = options.queries, len(paths), backbone.dim
    patches = backbone.grid[0] * backbone.grid[1]
    store = PixelStore(paths, backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation)
    judge = Judge(
        embed,
        store,
        mean=backbone.mean,
        std=backbone.std,
        grid=backbone.grid,
        device=options.device,
        batch=options.batch,
    )

    def unit(count):
        values = rng.standard_normal((count, dim)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    target = rng.integers(0, gallery, queries)
    people = [f"p{row // 4}" for row in range(gallery)]
    right = [np.arange(row // 4 * 4, min(row // 4 * 4 + 4, gallery)) for row in target]
    pairs = Pairs(
        [f"q{row}" for row in range(queries)],
        [f"i{row}" for row in target],
        [people[row] for row in target],
        unit(queries),
        target,
        right,
        unit(gallery),
        donor=pick_donors(people, target),
    )
    names = [f"map{number}" for number in range(options.explainers)]
    maps = {name: rng.random((queries, patches), dtype=np.float32) for name in names}
    others = {
        (name, control): rng.random((queries, patches), dtype=np.float32)
        for name in names
        for control in ("phrase", "query")
    }
    others["", "pooled"] = rng.random((queries, patches), dtype=np.float32)
    plan = Plan(fractions=FRACTIONS, fills=(options.fill,), controls=CONTROLS)
    return Study(judge, pairs, maps, backbone.grid, plan, others)


def plain(embed, backbone, options, images):
    """Seconds per picture of encoding alone."""
    batch = torch.randn(options.batch, 3, *backbone.image_size, device=options.device)
    with torch.inference_mode():
        embed.encode(batch)
        wait(options)
        started, done = now(options), 0
        while done < images:
            embed.encode(batch).float().cpu()
            done += len(batch)
        wait(options)
    return (now(options) - started) / done


def now(options):
    return time.process_time() if options.device == "cpu" else time.perf_counter()


def wait(options):
    if options.device != "cpu":
        torch.cuda.synchronize()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="vit-bert:tiny")
    parser.add_argument("--image-size", type=int, nargs=2)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--gallery", type=int, default=200)
    parser.add_argument("--explainers", type=int, default=1)
    parser.add_argument("--fill", default="mean")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = tuple(options.image_size) if options.image_size else None
    backbone = build(options.spec, image_size=size, load=False).eval().to(options.device)
    embed = Counted(backbone)
    print(f"{options.spec} {backbone.image_size}, {platform.machine()}, {options.threads} thread(s), {options.device}")
    alone, engine = [], []
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(backbone, embed, pictures(Path(folder), options.gallery), options)
        alone.append(plain(embed, backbone, options, max(options.batch, 4 * options.queries)))
        before = peak()
        for number in range(options.rounds):
            embed.images, rows, started = 0, 0, now(options)
            for frame in measure_parts(study, folder=Path(folder) / f"parts{number}"):
                rows += len(frame)
            engine.append((now(options) - started) / embed.images)
            alone.append(plain(embed, backbone, options, max(options.batch, 4 * options.queries)))
    one, other = statistics.median(alone), statistics.median(engine)
    print(f"plain    {1 / one:10,.1f} images/s   rounds: {', '.join(f'{1 / value:,.1f}' for value in alone)}")
    print(f"measure  {1 / other:10,.1f} images/s   rounds: {', '.join(f'{1 / value:,.1f}' for value in engine)}")
    print(f"measure / plain: {other / one:.3f} of the seconds per image; {embed.images:,} images, {rows:,} rows")
    print(f"peak memory: {peak():,.0f} MB, {before:,.0f} MB of it before the first `measure`")


if __name__ == "__main__":
    main()
