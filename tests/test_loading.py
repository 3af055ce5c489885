import threading
import time

import pytest

from reidctl.loading import load_ahead, loader_threads


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_whatever_takes_longest(threads):
    def load(item):
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * item

    assert list(load_ahead(load, range(20), threads=threads)) == [item * item for item in range(20)]


@pytest.mark.parametrize(("ahead", "most"), [(None, 4), (3, 3), (6, 6)])
def test_no_more_than_two_per_thread_are_made_ahead_unless_told_otherwise(ahead, most):
    begun = []
    loading = load_ahead(lambda item: begun.append(item) or item, range(100), threads=2, ahead=ahead)
    assert next(loading) == 0
    deadline = time.monotonic() + 5
    while len(begun) < most + 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(begun) == most + 1, "the one that was taken, and those ahead"
    loading.close()
    assert len(begun) == most + 1 and not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_threads_go_on_while_the_next_result_in_order_takes_long():
    others, wait = [], threading.Event()

    def load(item):
        if item == 1:
            wait.wait(5)
        others.append(item)
        return item

    loading = load_ahead(load, range(10), threads=2)
    assert next(loading) == 0
    deadline = time.monotonic() + 5
    while len(others) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert others == [0, 2, 3, 4], "one thread waits, the other makes all that may wait"
    wait.set()
    assert list(loading) == list(range(1, 10))


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_at_its_place_and_ends_the_threads(threads):
    def load(item):
        if item == 3:
            raise ValueError("image 3")
        return item

    loading = load_ahead(load, range(10), threads=threads)
    assert [next(loading) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="image 3"):
        next(loading)
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_a_gpu_gets_threads_and_a_cpu_that_computes_gets_none():
    assert loader_threads("cpu") == 0 < loader_threads("cuda") <= 8
