"""Images per second of the synthetic benchmark, drawing alone and written to disk."""

import tempfile
import time
from pathlib import Path

from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset
from reidctl.synthped.render import render


def main() -> None:
    config = SynthConfig(people=60)
    total = config.people * config.images_per_person
    started = time.perf_counter()
    for number in range(100):
        render(config, number % 60, number // 60)
    print(f"render        {100 / (time.perf_counter() - started):6.1f} images/s per core")
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            write_dataset(config, Path(folder), workers=workers)
            rate = total / (time.perf_counter() - started)
        print(f"write_dataset {rate:6.1f} images/s with {workers} worker(s): {60 * rate:,.0f} per minute")


if __name__ == "__main__":
    main()
