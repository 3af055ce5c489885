"""Requests per second and memory of captioning through a chat-completions server that takes its time.

    python tests/benchmarks/bench_caption.py                      the describer alone, 1 s per answer, 64 at a time
    python tests/benchmarks/bench_caption.py --latency 0.02 --images 20000    memory over many images
    python tests/benchmarks/bench_caption.py --what command       the whole `caption` command, in a process of its own

The server is another process that does nothing but wait. Client and server are pinned to one core each. The ideal is
concurrency / latency. Two texts are asked for per image; files are 128 x 384, half JPEG, half PNG, and come from the
page cache.
"""

import argparse
import asyncio
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IDENTITY = "The person is a young man with a slim build and tall stature."
CLOTHING = "The person is in a red shirt, blue trousers and white sneakers."
POINTS = (200, 1000, 2000, 5000, 10_000, 20_000)


class Service:
    """A chat-completions server that answers every request after the same time."""

    def __init__(self, latency: float) -> None:
        self.latency, self.count, self.first, self.last = latency, 0, 0.0, 0.0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: (\d+)", head, re.I)
                body = await reader.readexactly(int(length[1])) if length else b""
                content = self.stats() if head.startswith(b"GET") else await self.answer(body)
                kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
                writer.write(b"HTTP/1.1 200 OK\r\n" + kind + content)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    def stats(self) -> bytes:
        return json.dumps({"count": self.count, "first": self.first, "last": self.last}).encode()

    async def answer(self, body: bytes) -> bytes:
        self.count += 1
        name = f"chatcmpl-{self.count}"
        self.first = self.first or time.time()
        await asyncio.sleep(self.latency)
        self.last = time.time()
        asked_for_clothing = b"Describe the person's clothing" in body
        content = json.dumps({"description": CLOTHING if asked_for_clothing else IDENTITY})
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320}
        return json.dumps({"id": name, "object": "chat.completion", "choices": choices, "usage": usage}).encode()


async def serve(latency: float) -> None:
    server = await asyncio.start_server(Service(latency).talk, "127.0.0.1", 0, limit=2**24, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def make(folder: Path, number: int) -> list[str]:
    """Write `number` different pictures of 128 x 384; return their names."""
    rng = np.random.default_rng(0)
    base = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (24, 8, 3), dtype=np.uint8)).resize((128, 384)))
        for _ in range(64)
    ]
    names = [f"{i // 1000:04d}/{i:06d}.{('jpg', 'png')[i % 2]}" for i in range(number)]
    for i, name in enumerate(names):
        pixels = base[i % len(base)].copy()
        pixels[rng.integers(0, 384, 40), rng.integers(0, 128, 40)] = rng.integers(0, 256, (40, 3))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, ("JPEG", "PNG")[i % 2], compress_level=1)
        (folder / name).write_bytes(buffer.getvalue())
    return names


def resident(process: int | str = "self") -> tuple[float, float]:
    """Resident memory now and at its peak, in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    now, peak = (re.search(rf"{field}:\s+(\d+)", text) for field in ("VmRSS", "VmHWM"))
    return (int(now[1]) / 1024, int(peak[1]) / 1024) if now and peak else (0.0, 0.0)


def describe(port: int, folder: Path, concurrency: int, pause: float) -> dict[str, Any]:
    """Ask for two texts per picture with the describer alone; the caller takes `pause` seconds for each reply."""
    import openai  # noqa: F401  its import takes a second and belongs to no request

    from reidctl.captioning.backends.base import Request
    from reidctl.captioning.backends.openai import OpenAIDescriber
    from reidctl.captioning.config import CaptionConfig, RemoteConfig

    remote = RemoteConfig(base_url=f"http://127.0.0.1:{port}/v1", concurrency=concurrency, image_side=None)
    config = CaptionConfig(remote=remote)
    prompts = {"identity": config.identity_prompt, "clothing": config.clothing_prompt}

    # Plain strings: a Path keeps what it was asked for, and the list would seem to grow.
    paths = [str(path) for path in sorted(folder.rglob("*.*g"))]

    def requests() -> Iterator[Request]:
        for path in paths:
            for kind, prompt in prompts.items():
                yield Request(path, path, kind, "You describe pedestrians.", prompt, "digest")

    memory: dict[int, tuple[float, float]] = {}
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    done = bad = 0
    started = time.perf_counter()
    for reply in OpenAIDescriber("gpt-4", config).describe(requests()):
        time.sleep(pause)  # as a disk that is slow to confirm
        done += 1
        bad += reply.status != "ok"
        if done % 2 == 0 and done // 2 in POINTS:
            memory[done // 2] = resident()
    seconds = time.perf_counter() - started
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before
    return {"done": done, "bad": bad, "seconds": seconds, "cpu": cpu, "memory": memory}


def command(port: int, folder: Path, concurrency: int, names: list[str]) -> dict[str, Any]:
    """Run `reidctl caption` on the pictures and watch it; seconds are from the first request to the last answer."""
    table(folder, names)
    remote = ["--base-url", f"http://127.0.0.1:{port}/v1", "--concurrency", str(concurrency)]
    options = ["--run", str(folder / "run"), "--data", str(folder), "--mllm", "gpt-4", "--styles", "none", *remote]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "reidctl", "caption", *options, "--quiet"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "sk-benchmark"},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {0}),
    )
    memory: dict[int, tuple[float, float]] = {}
    stats = {"count": 0, "first": 0.0, "last": 0.0}
    while process.poll() is None:
        time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            stats = json.load(answer)
        for point in POINTS:
            if point not in memory and stats["count"] >= 2 * point:
                memory[point] = resident(process.pid)
    assert process.returncode == 0, f"the command ended with {process.returncode}"
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The server counts among our children too, but only once it has ended.
    return {
        "done": stats["count"],
        "bad": abs(stats["count"] - 2 * len(names)),
        "seconds": stats["last"] - stats["first"],
        "whole": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": memory,
    }


def table(folder: Path, names: list[str]) -> None:
    import hashlib

    import pandas as pd

    from reidctl.tables import write_table

    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    frame = pd.DataFrame({"image_id": [f"bench/{name}" for name in names], "path": names, "sha256": digests})
    frame["person_id"] = [f"bench/{i // 5}" for i in range(len(names))]
    write_table(
        folder / "images.parquet", "images", frame.assign(dataset="bench", split="train", width=128, height=384)
    )


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = make(folder, options.images)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--latency", str(options.latency)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            if options.what == "command":
                found = command(port, folder, options.concurrency, names)
            else:
                os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
                found = describe(port, folder, options.concurrency, options.pause)
        finally:
            server.terminate()
    report(found, options)


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    ideal = options.concurrency / options.latency
    rate = found["done"] / found["seconds"]
    odd = "more or fewer than texts" if options.what == "command" else "not ok"
    print(
        f"{options.what}, {options.images:,} images, {options.concurrency} at a time, {options.latency:g} s an answer: "
        f"{rate:,.1f} requests/s, {100 * rate / ideal:.1f} % of the ideal {ideal:,.0f}; "
        f"{found['seconds']:.1f} s for {found['done']:,} requests ({found['bad']} {odd}); "
        f"{1000 * found['cpu'] / found['done']:.2f} ms of processor per request"
        + (f" over the whole command of {found['whole']:.1f} s" if "whole" in found else "")
    )
    for point, (now, peak) in found["memory"].items():
        print(f"  after {point:6,} images: {now:6.1f} MiB resident, {peak:6.1f} MiB at most so far")
    print(f"  load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["describer", "command"], default="describer")
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that the caller takes for each reply")
    parser.add_argument("--serve", action="store_true", help="be the server")
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.latency))
    else:
        main(chosen)
