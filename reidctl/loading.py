"""Loading ahead: the next batches are decoded by threads while the GPU computes.

Threads rather than processes: decoding and resizing release the interpreter lock, all threads share one cache of
decoded images, and no tensor is copied between processes. What is loaded never depends on their number.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 8


def loader_threads(device: str, processes: int = 1) -> int:
    """Return how many threads load when nobody says: one per core up to eight beside a GPU, none beside a CPU.

    Several processes of a machine share its cores.

    Threads that decode while the CPU computes fight with it for cores and the interpreter lock: on two cores one of
    them halved the speed of `bdam-tiny`, whose loader needs a twentieth of a step's time.
    """
    return min(_MOST, max((os.cpu_count() or 1) // processes, 1)) if device == "cuda" else 0


def load_ahead(load: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int | None = None) -> Generator[R]:
    """Yield `load(item)` for every item, in order.

    Args:
        load: makes one result; is called from other threads unless `threads` is 0.
        items: what to load.
        threads: 0 loads in the calling thread, when asked.
        ahead: how many results are made or wait at a time, which bounds the memory; None: two per thread. While the
            next one in order takes long, the threads need others to begin: with one more than threads, eight of them
            whose times differ by 30 % deliver 10 to 20 % less where they are no faster than what they feed
            (`tests/benchmarks/bench_loader.py --ahead`).

    Raises:
        Whatever `load` raises, at the place of the item; what was not begun is dropped.
    """
    if threads == 0:
        yield from map(load, items)
        return
    queue = iter(items)
    ahead = 2 * threads if ahead is None else ahead
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    try:
        waiting.extend(pool.submit(load, item) for item in islice(queue, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(load, item) for item in islice(queue, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
