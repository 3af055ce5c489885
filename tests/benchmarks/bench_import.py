"""Seconds and peak memory of reading a table of images, beside a bare `pandas.read_csv` of the same file.

    python tests/benchmarks/bench_import.py --rows 1000000 --per-image 2

Each measurement is a process of its own, so that its peak is its own; the peak of a process that only imports the same
modules is taken off. No image is opened: this is `csv_table.read`, not the whole import.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = """
import resource, sys, time
from pathlib import Path
import pandas as pd
from reidctl.datasets.base import Options
from reidctl.datasets.formats import csv_table
path, what = Path(sys.argv[1]), sys.argv[2]
start, cpu = time.perf_counter(), time.process_time()
if what == "reidctl":
    kept = csv_table.read(path, Options()); size = len(kept.entries)
elif what == "pandas":
    kept = pd.read_csv(path, dtype=str, keep_default_na=False); size = len(kept)
else:
    size = 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(time.perf_counter() - start, time.process_time() - cpu, peak, size)
"""
CAPTION = "A person in a red jumper, black trousers and white shoes walks to the left with a bag number"


def write_table(path: Path, rows: int, per_image: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write("image,person,split,camera,caption\n")
        for row in range(rows):
            image = row // per_image
            person = image // 5
            split = ("train", "train", "train", "val", "test")[person % 5]
            stream.write(f'imgs/{person:06d}/{image:07d}.jpg,{person},{split},c{image % 6},"{CAPTION} {row}."\n')


def measure(path: Path, what: str) -> tuple[float, float, float, int]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    seconds, cpu, peak, size = done.stdout.split()
    return float(seconds), float(cpu), float(peak), int(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--per-image", type=int, default=2, help="rows (captions) of one image")
    chosen = parser.parse_args()
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.csv"
            write_table(path, rows, chosen.per_image)
            floor = measure(path, "nothing")[2]
            print(f"{rows:,} rows, {chosen.per_image} per image, {path.stat().st_size / 2**20:.0f} MiB, load {load()}")
            for what in ("reidctl", "pandas"):
                seconds, cpu, peak, size = measure(path, what)
                took = f"{seconds:7.2f} s ({cpu:6.2f} s of CPU)"
                print(f"  {what:8} {took}  {peak - floor:6.3f} GiB above {floor:.3f}  {size:,} kept")


def load() -> str:
    """The machine's load now: a figure from a busy machine is an upper bound."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at {time.strftime('%H:%M')}"


if __name__ == "__main__":
    main()
