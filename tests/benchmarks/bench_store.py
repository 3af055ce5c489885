"""Time and memory of writing and reading a large table of embeddings.

Run: python tests/benchmarks/bench_store.py [--rows 1000000] [--width 512] [--scratch FOLDER] [--compare]
Writes random unit vectors in blocks to FOLDER (default: a temporary folder below the current one), reads them in a
process of its own, prints seconds, GB/s (of float32 numbers) and the peak resident memory beyond the matrix, and
deletes the file. `--compare` also reads it as one Python object per vector (pandas), as reidctl did before.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

BLOCK = 8192


def labels(start, count):
    import pandas as pd

    return pd.DataFrame(
        {
            "item_id": [f"camera{row % 15:02d}/{row:09d}.jpg" for row in range(start, start + count)],
            "role": "gallery",
            "modality": "image",
            "condition": "standard",
            "dataset": "bench",
            "split": "test",
            "person_id": [f"bench:{row // 20}" for row in range(start, start + count)],
            "camera_id": [f"c{row % 15}" for row in range(start, start + count)],
        }
    )


def write(path, rows, width):
    import numpy as np

    from reidctl.tables import TableWriter

    rng = np.random.default_rng(0)
    spent = 0.0
    with TableWriter(path, "embeddings", facts={"model": "0" * 64}) as writer:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            values = rng.standard_normal((count, width), dtype=np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            frame = labels(start, count)
            begin = time.perf_counter()
            writer.write(frame, matrices={"embedding": values})
            spent += time.perf_counter() - begin
    return spent


def streamed(path):
    from reidctl.retrieval.store import read_embeddings

    return read_embeddings(path).vectors.nbytes


def objects(path):
    """One NumPy object per row, stacked: what a plain pandas reader does."""
    import numpy as np
    import pandas as pd

    frame = pd.read_parquet(path)
    return np.stack([np.asarray(row, np.float32) for row in frame["embedding"]]).nbytes


def measure(what, path, answers):
    import reidctl.retrieval.store  # noqa: F401  the imports are no part of the reading

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    size = globals()[what](path)
    seconds = time.perf_counter() - begin
    answers.put((seconds, size, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def in_process(context, what, path):
    answers = context.SimpleQueue()
    worker = context.Process(target=measure, args=(what, path, answers))
    worker.start()
    worker.join()
    if worker.exitcode:
        print(f"{what}: failed with exit code {worker.exitcode}")
        return
    seconds, size, before, peak = answers.get()
    print(
        f"read {what}: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, peak {peak / 2**30:.2f} GiB, "
        f"beyond matrix {(peak - size) / 2**30:.2f} GiB (of which {before / 2**30:.2f} GiB before reading)",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scratch", type=Path, default=Path("."))
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder) / "embeddings.parquet"
        seconds = write(path, options.rows, options.width)
        size = options.rows * options.width * 4
        print(
            f"write: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, file {os.path.getsize(path) / 2**30:.2f} GiB, "
            f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
            flush=True,
        )
        for what in ["streamed", *(["objects"] if options.compare else [])]:
            in_process(context, what, path)


if __name__ == "__main__":
    main()
