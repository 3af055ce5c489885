"""A method of ours as one side of `bench_train.py`, and the clock of both."""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reidctl.backbones import vit_bert_weights
from reidctl.backbones.base import Backbone, BackboneConfig
from reidctl.backbones.statistics import STATISTICS
from reidctl.backbones.weights import from_config
from reidctl.batch import Batch, Tokens
from reidctl.config import load_recipe, parse_section
from reidctl.data import Corpus
from reidctl.evaluation.efficiency import count_flops
from reidctl.methods.base import Method, build_method
from reidctl.stages.building import training_set
from reidctl.training.compiling import compile_blocks
from reidctl.training.config import TrainConfig
from reidctl.training.feed import EpochPlan, Feed
from reidctl.training.loop import Trainer
from reidctl.training.optimizer import build_optimizer

Clock = Callable[[], float]
WARM = 2
COUNTED = 16
"""Images whose operations are counted."""


@dataclass(frozen=True)
class Shape:
    """A CLIP: image size, patch, widths and depths of both towers, joint width."""

    image: tuple[int, int]
    patch: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    dim: int


SHAPES = {"cpu": Shape((128, 64), 16, 256, 4, 256, 4, 256), "cuda": Shape((384, 128), 16, 768, 12, 512, 12, 512)}


# Rounds


def clock_of(given: argparse.Namespace) -> Clock:
    return time.process_time if given.cpu_time else time.perf_counter


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clocked:
    """Batches, timed from the request for batch `WARM` to the request after the last."""

    def __init__(self, batches: Iterable[Any], size: Callable[[Any], int], device: torch.device, clock: Clock) -> None:
        self.batches, self.size, self.device, self.clock = batches, size, device, clock
        self.images = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches, started = iter(self.batches), 0.0
        for number in itertools.count():
            if number == WARM:
                wait_for(self.device)
                self.images, started = 0, self.clock()
            batch = next(batches, None)
            if batch is None:
                break
            self.images += self.size(batch)
            yield batch
        wait_for(self.device)
        self.seconds = self.clock() - started

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    @property
    def batch_size(self) -> int:
        return int(self.batches.batch_size)  # type: ignore[attr-defined]

    @property
    def rate(self) -> float:
        return self.images / self.seconds


class ClockedFeed(Feed):
    """A trainer's feed, timed."""

    clock: Clock
    timed: Clocked

    def load(self, plan: EpochPlan, start: int = 0) -> Iterator[Batch]:  # type: ignore[override]
        self.timed = Clocked(super().load(plan, start), len, self.device, self.clock)
        return iter(self.timed)

    def measure(self, plan: EpochPlan) -> float:
        """Nothing: the loader is measured in turn."""
        return float("inf")


class Ours:
    """A method of ours on its recipe.

    Args:
        name: of the recipe.
        corpus: what it trains on.
        given: the options.
        batch: images per batch.
        compiled: whether blocks are compiled.
    """

    def __init__(self, name: str, corpus: Corpus, given: argparse.Namespace, batch: int, compiled: bool) -> None:
        self.device, self.clock = torch.device(given.device), clock_of(given)
        narrow = self.device.type == "cuda"
        recipe = load_recipe(name)
        settings = dict(recipe["method"])
        if name == "bdam" and not narrow:
            settings = dict(load_recipe("bdam-tiny")["method"])  # scans over all tokens take minutes on a CPU
        changes = {"epochs": 1, "batch": batch, "device": given.device, "workers": given.workers, "cache_mb": 0}
        changes |= {"precision": "bf16" if narrow else "fp32", "compile": compiled}
        self.config = parse_section(TrainConfig, {**recipe["train"], **changes}, "train")
        torch.manual_seed(0)
        backbone = from_config(towers(name, SHAPES[self.device.type]).model_dump(mode="json"))
        persons = int(corpus.images["person_id"].nunique())
        del settings["name"]
        self.method: Method = build_method(name, settings, backbone, persons)
        self.samples = training_set(corpus, self.method, self.config, 0)
        self.epoch = 0
        self.kept: Batch | None = None

    def train(self) -> float:
        """Train for an epoch; return its images per second."""
        with tempfile.TemporaryDirectory() as folder:
            given = {"seed": self.epoch, "stage": "finetune", "fingerprint": "bench"}
            trainer = Trainer(self.method, self.samples, None, self.config, Path(folder), **given)
            trainer.feed = feed = self.feed()
            trainer.run()
        self.epoch += 1
        if self.method.backbone.image.compiled is not None:
            self.config = self.config.replace(compile=False)  # they stay compiled
        return feed.timed.rate

    def feed(self) -> ClockedFeed:
        feed = ClockedFeed(self.samples, self.config, self.epoch, self.device)
        feed.clock = self.clock
        return feed

    def load(self) -> float:
        feed = self.feed()
        for _ in feed.load(feed.plan(0)):
            pass
        return feed.timed.rate

    def batch(self) -> Batch:
        """The first batch of an epoch, on the CPU."""
        if self.kept is None:
            feed = Feed(self.samples, self.config, 0, self.device)
            self.kept = next(feed.load(feed.plan(0)))
        return self.kept

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def calls(self) -> tuple[Tensor, list[Tokens]]:
        """The images and texts that the method encodes of a batch."""
        seen: list[Tokens] = []
        batch = self.method.prepare(self.batch()).to(self.device).finished()
        backbone = self.method.to(self.device).backbone

        def note(tokens: Tokens, **how: Any) -> Any:
            seen.append(tokens)
            return Backbone.encode_text(backbone, tokens, **how)

        backbone.encode_text = note  # type: ignore[method-assign]
        try:
            with torch.no_grad(), self.autocast():
                self.method.encode(batch, "finetune")
        finally:
            del backbone.encode_text
        return batch.require("image"), seen

    def bare_step(self, image: Tensor, texts: Sequence[Tokens]) -> None:
        backbone = self.method.backbone
        with self.autocast():
            seen = backbone.encode_image(image).cls
            read = [backbone.encode_text(tokens).pooled for tokens in texts]
        total = torch.stack([value.float().square().mean() for value in (seen, *read)]).sum()
        self.method.zero_grad(set_to_none=True)
        total.backward()

    def bare(self) -> float:
        """Images per second of the towers on one batch."""
        if self.config.compile:
            compile_blocks(self.method, self.config)
        image, texts = self.calls()
        repeats = len(Feed(self.samples, self.config, 0, self.device).plan(0).batches) - WARM
        clock = Clocked([image] * (WARM + repeats), len, self.device, self.clock)
        for pixels in clock:
            self.bare_step(pixels, texts)
        return clock.rate

    def flops(self) -> tuple[float, float]:
        """Operations per image of a step and of the bare one."""
        batch = self.batch().take(range(min(COUNTED, len(self.batch()))))
        self.method.to(self.device).train()
        given = self.method.prepare(batch).to(self.device).finished()
        whole = count_flops(
            lambda: self.method.objective(self.method.losses(given, "finetune")).backward(), self.method
        )
        image, texts = self.calls()
        bare = count_flops(lambda: self.bare_step(image, texts), self.method)
        self.method.zero_grad(set_to_none=True)
        return whole / len(batch), bare / len(image)

    def where(self, repeats: int) -> dict[str, float]:
        """Seconds of each part of a step, medians, each awaited; and of the bare one."""
        method = self.method.to(self.device).train()
        optimizer = build_optimizer(method, "finetune", self.config)
        image, texts = self.calls()
        found: dict[str, list[float]] = {}
        for _ in range(repeats + 1):
            state: dict[str, Any] = {}
            for name, work in self.parts(method, optimizer, state).items():
                found.setdefault(name, []).append(self.timed(work))
            found.setdefault("bare towers", []).append(self.timed(lambda: self.bare_step(image, texts)))
        return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}

    def timed(self, work: Callable[[], object]) -> float:
        wait_for(self.device)
        started = self.clock()
        work()
        wait_for(self.device)
        return self.clock() - started

    def parts(self, method: Method, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """What a step does, one thing after the other, as `training.step.Step` on one process."""

        def encode() -> None:
            with self.autocast():
                state["parts"] = method.encode(state["batch"], "finetune")

        def compare() -> None:
            with self.autocast():
                state["losses"] = method.losses_of(state["parts"], "finetune")

        def send() -> None:
            state["batch"] = method.prepare(self.batch()).to(self.device).finished()

        def back() -> None:
            optimizer.zero_grad(set_to_none=True)
            state["objective"].backward()

        return {
            "prepare, copy, finish": send,
            "encode": encode,
            "losses": compare,
            "weighting": lambda: state.update(objective=method.objective(state["losses"])),
            "backward": back,
            "gradient's norm": lambda: torch.nn.utils.clip_grad_norm_(method.parameters(), float("inf")),
            "optimiser": optimizer.step,
        }


def towers(name: str, shape: Shape) -> BackboneConfig:
    """Return towers with random weights: IRRA's, or for `bdam` ViT and BERT of the same depth and width."""
    heads = {"width": shape.width, "layers": shape.layers, "head_width": 64, "patch_size": shape.patch}
    if name != "bdam":
        text = {"context_length": 77, "vocab_size": 49408, "width": shape.text_width, "layers": shape.text_layers}
        text["heads"] = shape.text_width // 64
        mean, std = STATISTICS["clip"]
        given = {"image_size": shape.image, "image": heads, "text": text, "dim": shape.dim, "mean": mean, "std": std}
        return BackboneConfig(kind="clip", spec="clip:bench", quick_gelu=True, **given)
    tiny = vit_bert_weights.configure("vit-bert:tiny", image_size=shape.image)
    size = {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.width // 64}
    size |= {"intermediate_size": 4 * shape.width, "initializer_range": 0.02}
    vit = {**tiny.image, **size, "patch_size": shape.patch}
    return tiny.replace(spec="vit-bert:bench", image=vit, text={**tiny.text, **size}, dim=shape.dim)
