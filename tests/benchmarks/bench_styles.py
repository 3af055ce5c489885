"""Seconds and peak memory of our DBSCAN beside scikit-learn's, and what each style algorithm finds.

    python tests/benchmarks/bench_styles.py                       both parts
    python tests/benchmarks/bench_styles.py --sizes 5000 20000 80000 --threads 2 --double
    python tests/benchmarks/bench_styles.py --sizes --captions 2000 10000     the second part alone

First part: unit vectors of width 512 in 30 dense clusters, eps 0.15, min_samples 5, float32 on disk; ours and
scikit-learn each in a process of its own, address space capped at 14 GiB. The peak is that of the whole process. In
float32, scikit-learn's faster case, its own rounding may decide a pair near eps; `--double` also runs it in float64,
which is what our labels equal by definition. Processor time is told too: on a busy machine it is the fairer ratio.
Second part: captions of the synthetic benchmark in six known styles.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, CLUSTERS, EPS, MIN_SAMPLES = 512, 30, 0.15, 5
LIMIT = 14 * 2**30


def write_points(count: int, path: Path) -> None:
    """Unit vectors around 30 random directions; two of a cluster are about 0.17 apart."""
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(CLUSTERS, WIDTH))
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    points = np.empty((count, WIDTH), np.float32)
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        part = middle[rng.integers(CLUSTERS, size=size)] + 0.02 * rng.normal(size=(size, WIDTH))
        points[start : start + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
    np.save(path, points)


def peak() -> float:
    """Peak resident memory of this process in MiB; getrusage would count what the parent held before exec."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def processor() -> float:
    """Seconds of processor that this process has used."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def case(which: str, path: Path) -> None:
    """Cluster the points in this process, keep the labels, print seconds and peak memory as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    points = np.load(path)
    if which == "ours":
        import scipy.sparse.csgraph  # noqa: F401 - imports are outside the clock for both
        import threadpoolctl  # noqa: F401

        from reidctl.captioning.dbscan import dbscan

        before, started = processor(), time.perf_counter()
        labels = dbscan(points, EPS, MIN_SAMPLES)
    else:
        from sklearn.cluster import DBSCAN

        points = points.astype(which, copy=False)
        before, started = processor(), time.perf_counter()
        labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="cosine").fit(points).labels_
    seconds = time.perf_counter() - started
    cpu = processor() - before
    np.save(path.with_name(f"{which}.npy"), labels)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak(), "clusters": int(labels.max()) + 1}))


def compare(sizes: list[int], threads: int, double: bool) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    print(f"{threads} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "points.npy"
            write_points(size, path)
            found = {}
            for which in ("ours", "float32", *(("float64",) if double else ())):
                command = [sys.executable, __file__, "--case", which, str(path)]
                result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                load = f"load {os.getloadavg()[0]:.1f}"
                label = "ours, float32" if which == "ours" else f"scikit-learn, {which}"
                if result.returncode:
                    last = (result.stderr.strip().splitlines() or [f"signal {-result.returncode}"])[-1]
                    print(f"{size:7,d}  {label:22s} failed: {last[:100]}", flush=True)
                    continue
                found[which] = json.loads(result.stdout)
                found[which]["labels"] = np.load(path.with_name(f"{which}.npy"))
                print(
                    f"{size:7,d}  {label:22s} {found[which]['seconds']:7.1f} s "
                    f"({found[which]['cpu']:.1f} s of processor), peak {found[which]['peak']:6,.0f} MiB, "
                    f"{found[which]['clusters']} clusters, noise {(found[which]['labels'] < 0).mean():.1%}, {load}"
                    + beside(found, which),
                    flush=True,
                )


def beside(found: dict, which: str) -> str:
    if which == "ours" or "ours" not in found:
        return ""
    differ = int((found["ours"]["labels"] != found[which]["labels"]).sum())
    ratio = found[which]["seconds"] / found["ours"]["seconds"]
    memory = found[which]["peak"] / found["ours"]["peak"]
    work = found[which]["cpu"] / found["ours"]["cpu"]
    equal = "labels equal" if not differ else f"{differ} labels differ"
    return f"; ours {ratio:.1f} x faster ({work:.1f} x by processor time), {memory:.1f} x smaller, {equal}"


def algorithms(count: int, encoder: str) -> None:
    """Print what each algorithm finds among captions of six known styles."""
    from sklearn.metrics import adjusted_rand_score

    from reidctl import tables
    from reidctl.captioning.config import ALGORITHMS, StyleConfig
    from reidctl.captioning.embedding import make_embed
    from reidctl.captioning.styles import discover_styles, neutral_texts
    from reidctl.synthped.config import SynthConfig
    from reidctl.synthped.dataset import write_dataset

    with tempfile.TemporaryDirectory() as name:
        people = max(5, -(-count // 36))
        config = SynthConfig(people=people, images_per_person=6, captions_per_image=6, size=(32, 16))
        write_dataset(config, Path(name), workers=2)
        frame = tables.read_table(next(Path(name).rglob("captions.parquet")), "captions")
    frame = frame[frame["kind"] == "full"].sample(n=count, random_state=0)
    texts, truth = frame["text"].tolist(), frame["style_id"].tolist()
    neutral = neutral_texts(texts, "lexicon")
    distinct = sorted(set(neutral))
    started = time.perf_counter()
    known = dict(zip(distinct, make_embed(encoder)(distinct), strict=True))
    print(
        f"\n{count:,} synthped captions, 6 styles, {len(distinct):,} distinct neutral texts, encoder {encoder} "
        f"({time.perf_counter() - started:.0f} s)\nalgorithm       ARI  clusters  found  noise  fitted  seconds"
    )
    for algorithm in ALGORITHMS:
        started = time.perf_counter()
        styles = discover_styles(
            texts,
            lambda wanted: np.stack([known[text] for text in wanted]),
            StyleConfig(algorithm=algorithm),
            neutral=neutral,
        )
        seconds = time.perf_counter() - started
        report = styles.report
        print(
            f"{algorithm:14s} {adjusted_rand_score(truth, styles.labels):5.3f}  {report.clusters:8d}  "
            f"{report.found:5d}  {report.noise:5.1%}  {report.fitted:6,d}  {seconds:7.1f}"
            + (f"  eps {report.eps:.4f}" if report.eps is not None else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[5000, 20000, 80000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--double", action="store_true", help="also scikit-learn in float64")
    parser.add_argument("--captions", type=int, nargs="*", default=[2000])
    parser.add_argument("--encoder", default="hashed", help="hashed, clip:... or sentence:...")
    parser.add_argument("--case", nargs=2, metavar=("WHICH", "POINTS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        case(chosen.case[0], Path(chosen.case[1]))
        return
    compare(chosen.sizes, chosen.threads, chosen.double)
    for count in chosen.captions:
        algorithms(count, chosen.encoder)


if __name__ == "__main__":
    main()
