"""Shared fixtures: a small corpus of coloured rectangles that needs no renderer, and tiny models."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from reidctl import tables
from reidctl.data import build_corpus

OPENAI_KEY = "sk-test-0123456789abcdefSECRET"
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
RGB = [(200, 30, 30), (30, 160, 40), (30, 60, 200), (220, 210, 40), (20, 20, 20), (240, 240, 240)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: threads cost more than they give, and one thread is the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture
def openai_key(monkeypatch):
    """A key in the environment, and no address that a developer's shell may have set."""
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI_KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def picture(tmp_path):
    """The path of a picture, 300 x 900."""
    path = tmp_path / "person.png"
    Image.new("RGB", (300, 900), (10, 20, 30)).save(path)
    return str(path)


def write_dataset(folder, people=8, per_person=3, *, size=(64, 32), splits=None):
    """Write images, captions and described texts of people who are two coloured blocks; return the folder."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, captions = [], []
    for person in range(people):
        upper, lower = person % 6, (person // 6 + person) % 6
        split = (splits or {}).get(person, "train")
        for number in range(per_person):
            name = f"p{person}-{number}"
            pixels = np.zeros((*size, 3), np.uint8)
            half = size[0] // 2
            pixels[:half], pixels[half:] = RGB[upper], RGB[lower]
            noise = rng.integers(-15, 16, pixels.shape)
            Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
            images.append(
                {
                    "image_id": name,
                    "path": f"images/{name}.png",
                    "dataset": "blocks",
                    "split": split,
                    "role": "query" if number == 0 else "gallery",
                    "person_id": f"blocks:{person}",
                    "camera_id": f"c{number}",
                    "width": size[1],
                    "height": size[0],
                    "sha256": name,
                    "attributes": {"upper_colour": COLOURS[upper], "lower_colour": COLOURS[lower]},
                }
            )
            clothing = f"A {COLOURS[upper]} shirt and {COLOURS[lower]} trousers."
            texts = {
                "full": f"A person wears a {COLOURS[upper]} shirt and {COLOURS[lower]} trousers.",
                "identity": f"A {'tall' if number % 2 else 'young'} person of build {person}.",
                "clothing": clothing,
            }
            for kind, text in texts.items():
                captions.append(
                    {
                        "caption_id": f"{name}-{kind}",
                        "image_id": name,
                        "kind": kind,
                        "source": "human" if kind == "full" else "template",
                        "conditioned_on": "image",
                        "text": text,
                        "status": "ok",
                    }
                )
    frame = pd.DataFrame(captions)
    tables.write_table(folder / "images.parquet", "images", pd.DataFrame(images))
    tables.write_table(folder / "captions.parquet", "captions", frame[frame["kind"] == "full"])
    tables.write_table(folder / "described.parquet", "captions", frame[frame["kind"] != "full"])
    return folder


@pytest.fixture
def blocks(tmp_path):
    """A folder with images.parquet, captions.parquet and described.parquet: 8 people, 3 images each, split train."""
    return write_dataset(tmp_path / "blocks")


def corpus_of(folder):
    """Return the corpus of a folder that `write_dataset` made."""
    return build_corpus(
        tables.read_table(folder / "images.parquet", "images"),
        tables.read_table(folder / "captions.parquet", "captions"),
        tables.read_table(folder / "described.parquet", "captions"),
        folder,
    )


def without_captions(folder, people):
    """Take the captions of some people away and make them a dataset of their own, `bare`."""
    images = tables.read_table(folder / "images.parquet", "images")
    names = {f"blocks:{person}" for person in people}
    bare = images["person_id"].isin(names)
    images["dataset"] = images["dataset"].astype(str).where(~bare, "bare")
    captions = tables.read_table(folder / "captions.parquet", "captions")
    tables.write_table(folder / "images.parquet", "images", images)
    kept = captions[~captions["image_id"].isin(images.loc[bare, "image_id"])]
    tables.write_table(folder / "captions.parquet", "captions", kept)
    return folder
