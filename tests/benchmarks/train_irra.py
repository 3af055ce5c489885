"""IRRA's program as one side of `bench_train.py`: imported, and patched from outside where a CPU needs it."""

import argparse
import contextlib
import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from train_sides import COUNTED, SHAPES, Clocked, Shape, clock_of

from reidctl.evaluation.efficiency import count_flops


@contextlib.contextmanager
def as_published(device: torch.device) -> Iterator[None]:
    """Let their code run: on a CPU "cuda" means the CPU and half precision means single; cuDNN as in their train.py."""
    before, half = torch.Tensor.to, torch.Tensor.half
    with torch.backends.cudnn.flags(deterministic=True, benchmark=True):
        if device.type == "cpu":
            torch.Tensor.to = lambda self, *where, **how: self if where == ("cuda",) else before(self, *where, **how)
            torch.Tensor.half = lambda self: self
        try:
            yield
        finally:
            torch.Tensor.to, torch.Tensor.half = before, half


class Theirs:
    """IRRA's program.

    Args:
        root: the dataset.
        given: the options; `checkout` is its folder.
        batch: images per batch.
        folder: for its starting weights.
    """

    def __init__(self, root: Path, given: argparse.Namespace, batch: int, folder: Path) -> None:
        self.device, self.clock = torch.device(given.device), clock_of(given)
        shape = SHAPES[self.device.type]
        with contextlib.redirect_stdout(io.StringIO()), as_published(self.device):
            self.processor = imported(given.checkout, "processor.processor")
            model = imported(given.checkout, "model.build")
            if self.device.type == "cpu":
                model.convert_weights = lambda made: None
            self.args = self.options(root, given, batch, folder / f"clip-{batch}.pt", shape)
            self.loader, _, _, people = imported(given.checkout, "datasets").build_dataloader(self.args)
            self.model = model.build_model(self.args, people)
            self.model.to(self.device)
            solver = imported(given.checkout, "solver")
            self.optimizer = solver.build_optimizer(self.args, self.model)
            self.scheduler = solver.build_lr_scheduler(self.args, self.optimizer)
        self.epoch = 0

    def options(
        self, root: Path, given: argparse.Namespace, batch: int, weights: Path, shape: Shape
    ) -> argparse.Namespace:
        """The options of run_irra.sh, for this dataset and shape."""
        workers = (8 if self.device.type == "cuda" else 0) if given.workers is None else given.workers
        words = ["train.py", "--img_aug", "--MLM", "--dataset_name", "CUHK-PEDES", "--loss_names", "sdm+mlm+id"]
        words += ["--batch_size", str(batch), "--root_dir", str(root), "--num_workers", str(workers)]
        words += ["--pretrain_choice", str(weights)]
        kept, sys.argv = sys.argv, words
        try:
            args: argparse.Namespace = imported(given.checkout, "utils.options").get_args()
        finally:
            sys.argv = kept
        args.img_size, args.stride_size, args.output_dir = shape.image, shape.patch, str(weights.parent)
        args.distributed = False
        torch.manual_seed(0)
        image = {"image_resolution": shape.image, "vision_layers": shape.layers, "vision_width": shape.width}
        image |= {"vision_patch_size": shape.patch, "stride_size": shape.patch, "embed_dim": shape.dim}
        text = {"context_length": 77, "vocab_size": 49408, "transformer_width": shape.text_width}
        text |= {"transformer_heads": shape.text_width // 64, "transformer_layers": shape.text_layers}
        clip = imported(given.checkout, "model.clip_model").CLIP(**image, **text)
        torch.save(clip.state_dict(), weights)
        return args

    def train(self) -> float:
        self.epoch += 1
        self.args.num_epoch = self.epoch
        clock = Clocked(self.loader, lambda batch: len(batch["pids"]), self.device, self.clock)
        # It ends with an error unless an epoch was evaluated and kept.
        evaluator = types.SimpleNamespace(eval=lambda model: 1.0)
        checkpointer = types.SimpleNamespace(save=lambda *names, **what: None)
        with as_published(self.device):
            self.processor.do_train(
                self.epoch, self.args, self.model, clock, evaluator, self.optimizer, self.scheduler, checkpointer
            )
        return clock.rate

    def load(self) -> float:
        clock = Clocked(self.loader, lambda batch: len(batch["pids"]), self.device, self.clock)
        for _ in clock:
            pass
        return clock.rate

    def flops(self) -> float:
        """Operations per image of a step."""
        batch = {name: value[:COUNTED].to(self.device) for name, value in next(iter(self.loader)).items()}

        def step() -> None:
            found = self.model(batch)
            sum(value for name, value in found.items() if "loss" in name).backward()

        self.model.train()
        with as_published(self.device):
            counted = count_flops(step, self.model)
        self.model.zero_grad(set_to_none=True)
        return counted / len(batch["pids"])


def imported(checkout: Path, name: str) -> Any:
    """A module of their checkout; what it imports and this does not need are stand-ins."""
    for needed, members in (
        ("torch.utils.tensorboard", {"SummaryWriter": Silent}),
        ("prettytable", {"PrettyTable": Silent}),
        ("easydict", {"EasyDict": dict}),
    ):
        module = types.ModuleType(needed)
        module.__dict__.update(members)
        sys.modules.setdefault(needed, module)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(name)


class Silent:
    """Stands for a writer or a table: takes everything, does nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: None
