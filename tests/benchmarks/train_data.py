"""Random pictures and sentences in the layout of CUHK-PEDES, for `bench_train.py`."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from reidctl.data import Corpus
from reidctl.runs import Run
from reidctl.stages import data_import
from reidctl.stages.sources import find_source

LANES = ("CUHK01/{}.png", "CUHK03/{}.png", "Market/{}.jpg", "train_query/{}.jpg", "test_query/{}.jpg")
SIZES = ((160, 60), (300, 120), (128, 64), (400, 150), (260, 100))
"""Heights and widths in the folders of `LANES`."""
WORDS = ("man", "woman", "red", "blue", "black", "white", "jacket", "shirt", "trousers", "jeans", "shoes", "bag", "hat")


def write_dataset(root: Path, images: int) -> None:
    """Write pictures and sentences in the layout of CUHK-PEDES, two sentences per image, four images per person."""
    rng, words = np.random.default_rng(0), random.Random(0)
    entries = []
    for number in range(images + 2):
        split = "train" if number < images else ("val", "test")[number - images]
        name = LANES[number % len(LANES)].format(f"{number:06d}")
        height, width = SIZES[number % len(SIZES)]
        path = root / "CUHK-PEDES" / "imgs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Coarse colours under fine noise: a photograph's number of bytes, not that of pure noise.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 5, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)
        # CUHK-PEDES has 23.5 words per sentence on average and 96 in the longest.
        lengths = [round(min(max(words.lognormvariate(3.1, 0.33), 8), 96)) for _ in range(2)]
        sentences = [" ".join(words.choices(WORDS, k=length)) for length in lengths]
        person = number // 4 + 1 if number < images else images // 4 + 2 + number - images
        entries.append({"split": split, "captions": sentences, "file_path": name, "processed_tokens": [], "id": person})
    (root / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(entries), encoding="utf-8")


def read_corpus(root: Path, folder: Path) -> Corpus:
    """Import the dataset as a user does, and put words in the places of the texts that a captioner writes."""
    run = Run(folder)
    data_import.run(run, format="cuhk-pedes", root=root)
    train = find_source(run, None, None).corpus().of_split("train")
    first = train.captions.drop_duplicates("row").sort_values("row")["text"].tolist()
    return replace(train, identity=[f"someone, {text}" for text in first], clothing=first)
