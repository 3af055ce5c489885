"""Time and peak memory of exact evaluation, beside a bare float32 product and the usual full argsort.

Run: python tests/benchmarks/bench_evaluate.py [--sizes cuhk icfg] [--large] [--threads N] [--device cuda]
Every case runs in its own process, so that its peak memory is its own. Vectors are random with positives mixed in such
that rank-1 is neither 0 nor 1. `--large` adds 10,000 queries against 1,000,000 images.
"""

import argparse
import multiprocessing
import resource
import time

SIZES = {
    "small": (1000, 2000, 3),
    "cuhk": (6156, 3074, 3),
    "icfg": (19848, 19848, 20),
    "large": (10_000, 1_000_000, 20),
}
WIDTH = 512


def problem(name):
    """Unit vectors whose people cluster loosely: (query, gallery, query_person, gallery_person)."""
    import numpy as np

    queries, gallery, each = SIZES[name]
    rng = np.random.default_rng(0)
    people = max(2, gallery // each)
    centre = rng.standard_normal((people, WIDTH), dtype=np.float32)

    def draw(person):
        values = rng.standard_normal((len(person), WIDTH), dtype=np.float32)
        values *= 2.2
        values += centre[person]
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values

    query_person, gallery_person = rng.integers(0, people, queries), rng.integers(0, people, gallery)
    return draw(query_person), draw(gallery_person), query_person, gallery_person


def evaluate(q, g, query_person, gallery_person, device):
    from reidctl.retrieval.exact import evaluate_ranking

    found = evaluate_ranking(q, g, query_person=query_person, gallery_person=gallery_person, device=device)
    return found.queries.means()["rank1"]


def bare(q, g, query_person, gallery_person, device, dtype="float32"):
    import torch

    kind = getattr(torch, dtype)
    q, g = torch.from_numpy(q).to(device, kind), torch.from_numpy(g).to(device, kind)
    total = 0.0
    for i in range(0, len(q), 1024):
        for j in range(0, len(g), 4096):
            total = float((q[i : i + 1024] @ g[j : j + 4096].T)[0, 0])
    return total


def bare64(*args):
    return bare(*args, dtype="float64")


def argsort(q, g, query_person, gallery_person, device):
    """IRRA's evaluator: the whole similarity matrix, a full argsort, cumulative sums."""
    import torch

    similarity = torch.from_numpy(q) @ torch.from_numpy(g).T
    order = torch.argsort(similarity, dim=1, descending=True)
    match = torch.from_numpy(gallery_person)[order] == torch.from_numpy(query_person)[:, None]
    running = match.cumsum(1)
    precision = running / torch.arange(1, match.shape[1] + 1)
    ap = (precision * match).sum(1) / match.sum(1)
    return float(ap.nanmean() * 0 + match[:, 0].float().mean())


def measure(name, what, threads, device, answers):
    import torch

    torch.set_num_threads(threads)
    data = problem(name)
    globals()[what](*(part[:64] for part in data), "cpu")  # imports and first-call costs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    value = globals()[what](*data, device)
    seconds = time.perf_counter() - start
    answers.put((seconds, before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, value))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "cuhk", "icfg"])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'size':8}{'queries x gallery':>20}  {'what':10}{'seconds':>9}{'MB before':>11}{'MB peak':>9}{'value':>9}")
    for name in [*options.sizes, *(["large"] if options.large else [])]:
        whats = ["bare", "bare64", "evaluate"] + ([] if name == "large" else ["argsort"])
        for what in whats:
            answers = context.SimpleQueue()
            worker = context.Process(target=measure, args=(name, what, options.threads, options.device, answers))
            worker.start()
            worker.join()
            if worker.exitcode:
                print(f"{name:8}{'':20}  {what:10} failed with exit code {worker.exitcode}")
                continue
            seconds, before, peak, value = answers.get()
            shape = "{}x{}".format(*SIZES[name][:2])
            print(f"{name:8}{shape:>20}  {what:10}{seconds:9.2f}{before:11.0f}{peak:9.0f}{value:9.4f}", flush=True)


if __name__ == "__main__":
    main()
