"""Time and peak memory of exact evaluation, as ratios to a bare float32 matrix product in the same run.

Run: python tests/benchmarks/bench_evaluate.py [--sizes cuhk icfg market msmt17 large] [--data trained random]
     [--threads N] [--rounds N] [--what evaluate argsort] [--device cuda]

Compared at the sizes of public test sets, and of 10,000 queries among 1,000,000 images (`large`), D = 512:
  bare      the blocked float32 product alone, 1,024 queries x 4,096 images at a time: nothing can be faster
  evaluate  `evaluate_ranking`: exact metrics and the 50 best of every query
  argsort   the usual evaluator: all similarities, a full argsort, cumulative sums (IRRA's `utils/metrics.py` in
            outline), over 256 queries at a time, where the original takes all at once; `~` marks seconds scaled up
            from fewer queries
Vectors are random. `trained`: those of one person share a centre, and rank-1 is neither 0 nor 1. `random`: they share
nothing, so positives lie anywhere in the ranking. `collapsed`: all are nearly equal, the worst case. Every case runs in
its own process, so that its peak memory is its own; MB is the growth over the vectors.
"""

import argparse
import multiprocessing
import pathlib
import statistics
import time

SIZES = {  # queries, gallery, gallery images per person
    "small": (1000, 2000, 3),
    "cuhk": (6156, 3074, 3),
    "icfg": (19_848, 19_848, 20),
    "market": (3368, 15_913, 21),
    "msmt17": (11_659, 82_161, 27),
    "large": (10_000, 1_000_000, 20),
}
WIDTH = 512
ARGSORT_PAIRS = 400_000_000


def problem(name, data="trained"):
    """Unit vectors: (query, gallery, query_person, gallery_person)."""
    import numpy as np

    queries, gallery, each = SIZES[name]
    rng = np.random.default_rng(0)
    people = max(2, gallery // each)
    centre = rng.standard_normal((people, WIDTH), dtype=np.float32)

    def draw(person):
        values = rng.standard_normal((len(person), WIDTH), dtype=np.float32)
        if data == "trained":
            values *= 2.2
            values += centre[person]
        if data == "collapsed":
            values *= 1e-6
            values += centre[0]
        for start in range(0, len(values), 65_536):  # no second copy of the gallery
            part = values[start : start + 65_536]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return values

    query_person, gallery_person = rng.integers(0, people, queries), rng.integers(0, people, gallery)
    return draw(query_person), draw(gallery_person), query_person, gallery_person


def evaluate(q, g, query_person, gallery_person, device):
    from reidctl.retrieval.exact import evaluate_ranking

    found = evaluate_ranking(q, g, query_person=query_person, gallery_person=gallery_person, device=device)
    return found.queries.means()["rank1"], 1.0


def bare(q, g, query_person, gallery_person, device):
    import torch

    q, g = torch.from_numpy(q).to(device), torch.from_numpy(g).to(device)
    total = 0.0
    for i in range(0, len(q), 1024):
        for j in range(0, len(g), 4096):
            total = float((q[i : i + 1024] @ g[j : j + 4096].T)[0, 0])
    return total, 1.0


def argsort(q, g, query_person, gallery_person, device):
    import torch

    asked = min(len(q), max(256, ARGSORT_PAIRS // len(g)))
    gallery, people = torch.from_numpy(g).to(device), torch.from_numpy(gallery_person).to(device)
    place = torch.arange(1, len(g) + 1, device=device)
    hits, precisions = [], []
    for start in range(0, asked, 256):
        some = slice(start, min(start + 256, asked))
        similarity = torch.from_numpy(q[some]).to(device) @ gallery.T
        order = torch.argsort(similarity, dim=1, descending=True)
        match = people[order] == torch.from_numpy(query_person[some]).to(device)[:, None]
        precisions.append(((match.cumsum(1) / place) * match).sum(1) / match.sum(1))
        hits.append(match[match.any(1), 0].double())
    assert len(torch.cat(precisions)) == asked
    return float(torch.cat(hits).mean()), len(q) / asked


def measure(name, data, what, threads, device, answers):
    import torch

    torch.set_num_threads(threads)
    vectors = problem(name, data)
    globals()[what](*(part[:64] for part in vectors), "cpu")  # imports and first-call costs
    before = forget_peak()
    start = time.perf_counter()
    value, scale = globals()[what](*vectors, device)
    seconds = time.perf_counter() - start
    answers.put((seconds * scale, peak() - before, value, scale))


def forget_peak():
    """Make the process's peak memory what it holds now (Linux), and return it in MB."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(context, *case):
    answers = context.SimpleQueue()
    worker = context.Process(target=measure, args=(*case, answers))
    worker.start()
    worker.join()
    return None if worker.exitcode else answers.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["cuhk", "icfg", "market"])
    parser.add_argument("--data", nargs="+", choices=["trained", "random", "collapsed"], default=["trained"])
    parser.add_argument("--what", nargs="+", choices=["evaluate", "argsort"], default=["evaluate", "argsort"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"threads {options.threads}, device {options.device}, medians of {options.rounds}")
    print(
        f"{'size':8}{'queries x gallery':>20} {'data':8}{'what':9}{'seconds':>10}{'to bare':>9}{'MB':>7}{'rank-1':>8}"
    )
    for name in options.sizes:
        shape = "{:,} x {:,}".format(*SIZES[name][:2])
        for data in options.data:
            times = {what: [] for what in ("bare", *options.what)}
            last = {}
            for _ in range(options.rounds):
                for what in times:
                    found = run(context, name, data, what, options.threads, options.device)
                    if found is None:
                        print(f"{name:8}{shape:>20} {data:8}{what:9} failed")
                        continue
                    times[what].append(found[0])
                    last[what] = found
            for what, seconds in times.items():
                if not seconds:
                    continue
                middle, floor = statistics.median(seconds), statistics.median(times["bare"])
                _, grown, value, scale = last[what]
                shown = f"{'~' if scale > 1 else ''}{middle:.2f}"
                rank1 = "" if what == "bare" else f"{value:.4f}"
                line = f"{name:8}{shape:>20} {data:8}{what:9}{shown:>10}{middle / floor:>9.2f}{grown:>7.0f}{rank1:>8}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
