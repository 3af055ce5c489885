"""Images per second and peak memory of the dataset doctor, beside a plain loop over the files.

    python tests/benchmarks/bench_data_check.py [N]      N files, default 100,000 (half JPEG, half PNG, 128 x 64)
    python tests/benchmarks/bench_data_check.py --near   what the difference hash finds

Files have just been written, so they come from the page cache: this measures decoding and hashing, not a disk.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

PER_FOLDER = 1000
CASES = ("plain", "import-1", "import-2", "check-1", "check-2", "doctor-1", "doctor-2")
WHAT = {
    "plain": "plain loop: open, load, sha256 (baseline)",
    "import": "scan as an import does: decode, sha256",
    "check": "scan as a check does: + pixel digest + difference hash",
    "doctor": "`data check --near`, CLIP tokenizer, whole",
}


def render() -> list[Image.Image]:
    """300 pictures of 75 people, 128 x 64."""
    from reidctl.synthped.config import SynthConfig
    from reidctl.synthped.dataset import write_dataset

    with tempfile.TemporaryDirectory() as rendered:
        write_dataset(SynthConfig(people=75, images_per_person=4), Path(rendered), workers=2)
        return [Image.open(path).convert("RGB") for path in sorted(Path(rendered).rglob("*.png"))]


def near() -> None:
    """Print how many altered copies the difference hash finds, and how many other pairs it takes for copies."""
    from reidctl.datasets.scan import difference_hash

    def jpeg(image: Image.Image, quality: int) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    pictures = render()
    hashes = [difference_hash(image) for image in pictures]
    changes = {
        "JPEG quality 90": lambda image: jpeg(image, 90),
        "JPEG quality 60": lambda image: jpeg(image, 60),
        "half size": lambda image: image.resize((32, 64)),
        "double size": lambda image: image.resize((128, 256)),
        "384 x 128, JPEG 85": lambda image: jpeg(image.resize((128, 384)), 85),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "2 pixels cut off each side": lambda image: image.crop((2, 2, 62, 126)),
    }
    for name, change in changes.items():
        distances = [(a ^ difference_hash(change(b))).bit_count() for a, b in zip(hashes, pictures, strict=True)]
        print(f"{name:28s} {sum(d <= 4 for d in distances):3d} of {len(distances)} copies found")
    pairs = [(a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)]
    print(f"{'different pictures':28s} {sum(d <= 4 for d in pairs)} of {len(pairs):,} pairs taken for copies")


def make(folder: Path, number: int) -> None:
    """Write `number` different pictures of a few hundred rendered ones, and a table that names them."""
    base = [np.asarray(image) for image in render()]
    rng = np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "person", "split", "caption"])
        for i in range(number):
            pixels = base[i % len(base)].copy()
            pixels[rng.integers(0, 128, 40), rng.integers(0, 64, 40)] = rng.integers(0, 256, (40, 3))
            kind = ("jpg", "png")[i % 2]
            name = f"{i // PER_FOLDER:04d}/{i:06d}.{kind}"
            (folder / name).parent.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, *(("JPEG",) if kind == "jpg" else ("PNG",)), compress_level=1)
            (folder / name).write_bytes(buffer.getvalue())
            split = ("train", "train", "test")[i // 5 % 3]
            rows.writerow([name, i // 5, split, f"Person {i // 5} in picture {i} wears a red coat and carries a bag."])


def plain(paths: list[Path]) -> int:
    for path in paths:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
        hashlib.sha256(content).hexdigest()
    return len(paths)


def case(name: str, folder: Path) -> None:
    """Run one case in this process and print its seconds and peak memory as JSON."""
    paths = [folder / line.split(",", 1)[0] for line in (folder / "table.csv").read_text().splitlines()[1:]]
    kind, _, workers = name.partition("-")
    if kind == "doctor":
        from reidctl.runs import Run
        from reidctl.stages import data_check
    from reidctl.datasets.scan import scan

    watch = Watch()
    started = time.perf_counter()
    if kind == "plain":
        done = plain(paths)
    elif kind == "doctor":
        record = data_check.run(
            Run(folder / "none"), root=folder / "table.csv", format="csv-table", tokenizers=["clip"],
            workers=int(workers), near=True,
        )  # fmt: skip
        done = record["metrics"]["images"]
        assert not any(item["check"] in ("unreadable-images", "missing-images") for item in record["findings"])
    else:
        done = sum(1 for _ in scan(paths, workers=int(workers), pixels=kind == "check", near=kind == "check"))
    seconds = time.perf_counter() - started
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"done": done, "seconds": seconds, "cpu": cpu, "own": peak(os.getpid()), "child": watch.stop()}))


def peak(process: int) -> float:
    """Peak resident memory in MiB; getrusage would count what the parent held before exec."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1024


class Watch(threading.Thread):
    """The largest peak of any child process, asked five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                with contextlib.suppress(OSError, TypeError):
                    self.most = max(self.most, peak(int(child)))

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return self.most


def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        make(folder, number)
        size = sum(path.stat().st_size for path in folder.rglob("*.*g"))
        print(f"{number:,} files, {size / 2**20:,.0f} MiB, made in {time.perf_counter() - started:.0f} s")
        for chosen in CASES:
            result = subprocess.run(
                [sys.executable, __file__, "--case", chosen, str(folder)], capture_output=True, text=True, check=True
            )
            found = json.loads(result.stdout)
            kind, _, workers = chosen.partition("-")
            memory = f"{found['own']:5.0f} MiB" + (f" + {workers} x {found['child']:.0f} MiB" if workers == "2" else "")
            print(
                f"{WHAT[kind]:56s} workers {workers or 1}: {found['done'] / found['seconds']:7,.0f} images/s, "
                f"{found['seconds']:6.1f} s ({found['cpu']:.0f} s of processor), peak {memory}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--near"]:
        near()
    elif sys.argv[1:2] == ["--case"]:
        case(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
