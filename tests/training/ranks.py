"""Runs a function in two gloo processes; imported by them, so it imports no test."""

import multiprocessing
import os
import queue
import socket
import traceback
import warnings


def in_processes(function, *arguments, count=2, timeout=300):
    """Return `function(rank, *arguments)` of each of `count` processes that have joined each other, in order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [
        context.Process(target=_run, args=(function, rank, count, port, arguments, answers)) for rank in range(count)
    ]
    for child in children:
        child.start()
    found = {}
    try:
        while len(found) < count:
            rank, value, failure = answers.get(timeout=timeout)
            assert failure is None, f"process {rank}:\n{failure}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"only {sorted(found)} of {count} processes answered") from None
    finally:
        for child in children:
            child.join(20)
            child.kill()
    return [found[rank] for rank in range(count)]


def _run(function, rank, count, port, arguments, answers):
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    warnings.simplefilter("ignore")
    try:
        import torch

        from reidctl import parallel

        torch.set_num_threads(1)
        with parallel.joined("cpu"):
            answers.put((rank, function(rank, *arguments), None))
            parallel.wait()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
