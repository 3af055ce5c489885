"""A method with two vectors per image, made for tests, and a run that holds one."""

from datetime import UTC, datetime

import pandas as pd
import torch

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.methods import clip
from reidctl.methods.base import build_method, save_method, unit
from reidctl.runs import Run, digest


class TwoTask(clip.Clip):
    """`clip` that compares images with images by one of its features, bent and spread; counts its forward passes."""

    passes = 0

    @property
    def tasks(self):
        return ("t2i", "i2i")

    def embed_images(self, batch):
        return self.embed_tasks(batch)["t2i"]

    def embed_tasks(self, batch):
        type(self).passes += 1
        features = self.backbone.encode_image(batch.require("image")).cls[:, 0].float()
        mixing = torch.randn(features.shape[1], features.shape[1], generator=torch.Generator().manual_seed(7))
        return {"t2i": unit(features), "i2i": unit((features[:, :1] @ mixing[:1]).sin())}


class Swapped(TwoTask):
    """The same with the two vectors exchanged."""

    def embed_tasks(self, batch):
        made = super().embed_tasks(batch)
        return {"t2i": made["i2i"], "i2i": made["t2i"]}


def install(monkeypatch, method=TwoTask):
    """Make `method` what runs of the method `clip` load, and forget its passes."""
    monkeypatch.setattr(clip, "METHOD", method)
    monkeypatch.setattr(TwoTask, "passes", 0)
    monkeypatch.setattr(Swapped, "passes", 0)


def made():
    """An untrained model, whichever class `clip` stands for now."""
    torch.manual_seed(0)
    return build_method("clip", {}, build("clip:micro"), 4).eval()


def trained(folder, data):
    """A run with an untrained model that claims to have been trained on nobody of `data`."""
    run = Run(folder)
    files = save_method(made(), run.stage_dir("finetune"))
    tables.write_table(run.table("finetune", "seen"), "seen", tables.empty("seen"))
    run.finish(
        "finetune", settings={}, inputs={"images": digest(data / "images.parquet")}, outputs=files,
        started=datetime.now(UTC),
        extra={
            "method": "clip", "data": str(data.resolve()), "selected_on": "val",
            "described": str(data / "described.parquet"),
        },
    )  # fmt: skip
    return run


def other_captions(data):
    """Give every image of a folder another caption."""
    captions = tables.read_table(data / "captions.parquet", "captions")
    captions["text"] = pd.Series([f"another text, number {row}" for row in range(len(captions))], dtype=str)
    tables.write_table(data / "captions.parquet", "captions", captions)
