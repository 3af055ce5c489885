"""Images per second of a vision-language model in this process, for several batch sizes.

    python tests/benchmarks/bench_local.py [FOLDER or HUB ID] [--images N] [--batch 1,8] [--tokens N] [--device auto]

Without a model: a Qwen2-VL of random weights (4 layers, width 256), so the times say how batching pays, nothing about a
real model. Every reply is `--tokens` long there, since a random model does not end by itself. Loading is not counted:
the clock starts at the last reply of a first batch. PyTorch takes as many threads as it likes; set OMP_NUM_THREADS.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "captioning"))
import tinyvlm


def measure(model: str, pictures: list[Path], batch: int, tokens: int, device: str) -> float:
    """Seconds for one reply per picture."""
    from reidctl.captioning.backends.base import Request
    from reidctl.captioning.backends.local import LocalDescriber
    from reidctl.captioning.config import CaptionConfig

    config = CaptionConfig.model_validate(
        {"remote": {"temperature": 0, "max_tokens": tokens}, "local": {"batch": batch, "device": device}}
    )
    started = 0.0

    def requests() -> Iterator[Request]:
        for path in pictures:
            yield Request(path.stem, str(path), "clothing", "Be brief.", "Describe the clothing in a sentence.", "d")

    def after_warm_up() -> Iterator[Request]:
        yield from [next(requests())] * batch  # answered while the model is warming up
        yield from requests()

    for done, reply in enumerate(LocalDescriber(model, config).describe(after_warm_up()), start=1):
        assert reply.status != "failed", reply.reason
        if done == batch:
            started = time.perf_counter()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    logging.getLogger("reidctl").addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("reidctl").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(tinyvlm.save_vlm("qwen2_vl", folder / "random", ends=None, width=256, layers=4))
        pictures = [tinyvlm.save_picture(folder / f"{i}.png", i, size=(128, 256)) for i in range(options.images)]
        print(f"{options.images} images, {options.tokens} tokens, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        first = 0.0
        for batch in map(int, options.batch.split(",")):
            seconds = measure(model, pictures, batch, options.tokens, options.device)
            first = first or seconds
            rate = options.images / seconds
            print(f"batch {batch:3d}: {rate:7.2f} images/s, {first / seconds:5.2f} times the first", flush=True)


if __name__ == "__main__":
    main()
