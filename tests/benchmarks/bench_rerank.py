"""Time and peak memory of blocked k-reciprocal re-ranking, beside the usual dense one.

Run: python tests/benchmarks/bench_rerank.py [--sizes small medium market msmt] [--parameters zhong] [--threads N]
`dense` has the memory and the loops of the published evaluators (N x N float32 distances, a full argsort of every row,
N x N encodings), `plain` is evaluation without re-ranking. Every case runs in its own process, so that its peak memory
is its own. Vectors are random with people that cluster loosely. The last columns are dense / blocked: seconds of CPU
(of all threads), and memory. `msmt` (11,659 x 82,161) runs without `dense`, which would need 100 GB there.
"""

import argparse
import multiprocessing
import resource
import time

SIZES = {"small": (1000, 4000), "medium": (2000, 8000), "market": (3368, 15913), "msmt": (11659, 82161)}
WIDTH = 512


def problem(name):
    import numpy as np

    queries, gallery = SIZES[name]
    rng = np.random.default_rng(0)
    people = gallery // 20
    centre = rng.standard_normal((people, WIDTH), dtype=np.float32)

    def draw(count):
        person = rng.integers(0, people, count)
        values = rng.standard_normal((count, WIDTH), dtype=np.float32)
        values *= 2.8
        values += centre[person]
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values, person

    return *draw(queries), *draw(gallery)


def names(letter, count):
    return [f"{letter}{number}" for number in range(count)]


def score(block, query_person, gallery_person):
    from reidctl.retrieval.scores import rank_scores

    found = rank_scores(
        block,
        queries=len(query_person),
        gallery=len(gallery_person),
        query_person=query_person,
        gallery_person=gallery_person,
    )
    return found.queries.means()["mAP"]


def plain(query, query_person, gallery, gallery_person, parameters):
    from reidctl.retrieval.exact import evaluate_ranking

    found = evaluate_ranking(query, gallery, query_person=query_person, gallery_person=gallery_person)
    return found.queries.means()["mAP"]


def blocked(query, query_person, gallery, gallery_person, parameters):
    from reidctl.retrieval.rerank import KReciprocal

    ids = {"query_id": names("q", len(query)), "gallery_id": names("g", len(gallery))}
    reranked = KReciprocal(query, gallery, parameters, **ids)
    return score(lambda rows: -reranked.distances(rows), query_person, gallery_person)


def dense(query, query_person, gallery, gallery_person, parameters):
    import numpy as np

    vectors = np.concatenate([query, gallery])
    count, queries = len(vectors), len(query)
    k1, k2, weight = parameters.k1, parameters.k2, np.float32(parameters.weight)
    distance = np.maximum(2 - 2 * (vectors @ vectors.T), 0)
    distance /= distance.max(axis=1, keepdims=True)
    nearest = np.argsort(distance, axis=1).astype(np.int32)

    def mutual(item, size):
        near = nearest[item, : size + 1]
        return near[(nearest[near, : size + 1] == item).any(axis=1)]

    encoding = np.zeros((count, count), np.float32)
    for item in range(count):
        first = mutual(item, k1)
        members = [first]
        for other in first:
            more = mutual(other, round(k1 / 2))
            if len(np.intersect1d(more, first)) > 2 / 3 * len(more):
                members.append(more)
        chosen = np.unique(np.concatenate(members))
        values = np.exp(-distance[item, chosen])
        encoding[item, chosen] = values / values.sum()
    distance = distance[:queries, queries:].copy()
    if k2 > 1:
        mean = np.zeros_like(encoding)
        for item in range(count):
            mean[item] = encoding[nearest[item, :k2]].mean(axis=0)
        encoding = mean
    having = [np.flatnonzero(column) for column in encoding.T]
    result = np.empty((queries, count - queries), np.float32)
    for item in range(queries):
        shared = np.zeros(count, np.float32)
        for column in np.flatnonzero(encoding[item]):
            rows = having[column]
            shared[rows] += np.minimum(encoding[item, column], encoding[rows, column])
        result[item] = (1 - shared / (2 - shared))[queries:] * (1 - weight) + distance[item] * weight
    return score(lambda rows: -result[rows].astype(np.float64), query_person, gallery_person)


def measure(name, what, text, threads, answers):
    import torch

    from reidctl.retrieval.rerank import Parameters, parse

    torch.set_num_threads(threads)
    data = problem(name)
    globals()[what](*(part[:64] for part in data), Parameters(3, 2, 0.3))  # imports and first-call costs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    value = globals()[what](*data, parse(text))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    answers.put((seconds, cpu, before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, value))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "medium"])
    parser.add_argument("--parameters", nargs="+", default=["zhong", "clip-reid"])
    parser.add_argument("--only", nargs="+", choices=["plain", "blocked", "dense"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    head = f"{'size':8}{'queries x gallery':>20}  {'parameters':12}{'what':9}{'seconds':>9}{'CPU':>9}{'MB before':>11}"
    print(f"{head}{'MB more':>9}{'mAP':>8}   dense / blocked: CPU, memory")
    for name, text in ((name, text) for name in options.sizes for text in options.parameters):
        found = {}
        for what in options.only or (["plain", "blocked"] + (["dense"] if name != "msmt" else [])):
            answers = context.SimpleQueue()
            worker = context.Process(target=measure, args=(name, what, text, options.threads, answers))
            worker.start()
            worker.join()
            shape = "{}x{}".format(*SIZES[name])
            if worker.exitcode:
                print(f"{name:8}{shape:>20}  {text:12}{what:9} failed with exit code {worker.exitcode}")
                continue
            seconds, cpu, before, peak, value = answers.get()
            found[what] = (cpu, peak - before)
            line = f"{name:8}{shape:>20}  {text:12}{what:9}{seconds:9.2f}{cpu:9.2f}"
            line += f"{before:11.0f}{peak - before:9.0f}{value:8.4f}"
            if what == "dense" and "blocked" in found:
                line += "".join(
                    f"   {mine / other:.1f}" for mine, other in zip(found[what], found["blocked"], strict=True)
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
