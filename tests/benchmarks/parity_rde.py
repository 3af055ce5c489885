"""Compares `rde` with the published code, number by number: same weights, same batch, on the CPU.

    git clone https://github.com/QinYang79/RDE && git -C RDE checkout b3fd396
    python tests/benchmarks/parity_rde.py RDE [--size 128 64] [--layers 3] [--double]

Their code is imported, not copied. What keeps it from running here is patched from outside: `.cuda()` and `.half()` do
nothing, weights stay in float32, and tensorboard, prettytable and easydict are stand-ins. A CLIP of random weights (512
joint, 128 inside) is saved in OpenAI's format and read by their own loader. Their settings are those of run_rde.sh over
utils/options.py, ours those of the recipe `rde`. Compared are both embeddings of images and texts, their similarity,
the four losses with every gradient, losses of single pairs, running statistics, the division of planted losses, the
changed captions (with the same random numbers given to both), rate and decay of every parameter, and the rate of every
epoch.

Captions of training steps are long enough that their code, too, selects words alone; see `TokenSelection`. Prints a
table of differences: largest absolute one, and relative to the largest number of the row. Exits with 1 if a relative
one is above 1e-5. `--double` shows what is left of them without rounding. Half a minute.
"""

import argparse
import importlib
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from parity_clip_reid import LIMIT, Table, _shaken, _stand_in, gradients, of, quiet, rates
from torch import Tensor, nn
from torch.nn import functional

from reidctl.backbones.base import BackboneConfig
from reidctl.backbones.clip import ClipBackbone
from reidctl.batch import Batch, Tokens
from reidctl.config import load_recipe, parse_section
from reidctl.layers.division import divide, split
from reidctl.methods.base import Method, build_method
from reidctl.methods.rde import change_words
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor

LOSSES = {"TAL": "tal", "TRL": "trl", "InfoNCE": "infonce", "SDM": "sdm"}
PERSON = (3, 3, 7, 0, 0, 0, 5, 1, 1, 2, 9, 9)
CLEAN = (1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1)
WIDTH, JOINT, CONTEXT, VOCABULARY = 128, 512, 77, 49408


class Theirs:
    """The modules of a checkout, made to run on a CPU, and their settings.

    Args:
        checkout: its folder.
        dtype: of all weights.
    """

    def __init__(self, checkout: Path, dtype: torch.dtype) -> None:
        self.folder = checkout / "2024-CVPR-RDE"
        sys.path.insert(0, str(self.folder))
        _stand_in("torch.utils.tensorboard", SummaryWriter=None)
        _stand_in("prettytable", PrettyTable=None)
        _stand_in("easydict", EasyDict=dict)
        torch.Tensor.cuda = lambda self, *where, **how: self
        torch.Tensor.half = lambda self: self
        if dtype == torch.float64:
            plain = torch.Tensor.float
            torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else plain(self)
        self.dtype = dtype
        self.build_module = importlib.import_module("model.build")
        self.build_module.convert_weights = lambda model: None
        self.clip = importlib.import_module("model.clip_model")
        if dtype == torch.float64:
            self.clip.LayerNorm.forward = nn.LayerNorm.forward
        self.processor = importlib.import_module("processor.processor")
        self.solver = importlib.import_module("solver")
        self.bases = importlib.import_module("datasets.bases")
        self.options = importlib.import_module("utils.options")

    def settings(self) -> Any:
        """Their options as run_rde.sh sets them."""
        text = (self.folder / "run_rde.sh").read_text(encoding="utf-8")
        values = dict(re.findall(r"^(\w+)=([^\s#]*)", text, flags=re.MULTILINE))
        call = text.split("train.py", 1)[1].replace("\\\n", " ")
        for _ in range(2):
            call = re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], call)
        before, sys.argv = sys.argv, ["train.py", *call.split()]
        try:
            return self.options.get_args()
        finally:
            sys.argv = before

    def build(self, args: Any, size: tuple[int, int], layers: int, folder: Path) -> nn.Module:
        """Return their model with random weights, none of them 0 or 1, read from a file by their loader."""
        torch.manual_seed(0)
        square = {"image_resolution": (64, 64), "vision_patch_size": 16, "stride_size": 16}
        vision = {"vision_layers": layers, "vision_width": WIDTH, **square}
        text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "transformer_heads": WIDTH // 64}
        source = self.clip.CLIP(JOINT, **vision, **text, transformer_width=WIDTH, transformer_layers=layers)
        torch.save(_shaken(source).state_dict(), folder / "clip.pt")
        args.pretrain_choice, args.img_size = str(folder / "clip.pt"), size
        made: nn.Module = quiet(self.build_module.build_model, args).to(self.dtype)
        for layer in (made.visul_emb_layer, made.texual_emb_layer):
            _shaken(layer)
            layer.mlp.bns[0].running_mean.normal_(std=0.1)
            layer.mlp.bns[0].running_var.uniform_(0.5, 2.0)
        return made


def our_name(name: str) -> str | None:
    """What a tensor of their model is called in ours; None for those that their model never reads."""
    if name.startswith(("visul_emb_layer.linear.", "visul_emb_layer.mlp.bns.1.", "texual_emb_layer.mlp.bns.1.")):
        return None
    for theirs, ours in (
        ("base_model.visual.", "backbone.image.visual."),
        ("base_model.", "backbone.text.text."),
        ("visul_emb_layer.fc.", "tse_image.linear."),
        ("visul_emb_layer.", "tse_image."),
        ("texual_emb_layer.linear.", "tse_text.linear."),
        ("texual_emb_layer.", "tse_text."),
    ):
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            for old, new in (("mlp.layers.0.", "hidden."), ("mlp.layers.1.", "out."), ("mlp.bns.0.", "norm.")):
                rest = rest.replace(old, new)
            return ours + rest
    raise KeyError(name)


def ours_by_name(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {our_name(name): value for name, value in named.items()}
    return {name: value for name, value in found.items() if name is not None}


def our_model(
    theirs: nn.Module, size: tuple[int, int], layers: int, recipe: Mapping[str, Any], **changes: Any
) -> Method:
    """Return `rde` with their weights; every tensor of either side has its counterpart."""
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY}
    config = BackboneConfig(
        kind="clip",
        spec="clip:parity",
        image_size=size,
        image={"patch_size": 16, "width": WIDTH, "layers": layers, "head_width": 64},
        text=text | {"width": WIDTH, "heads": WIDTH // 64, "layers": layers},
        dim=JOINT,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        quick_gelu=True,
    )
    settings = {name: value for name, value in recipe["method"].items() if name != "name"} | changes
    method = build_method("rde", settings, ClipBackbone(config), max(PERSON) + 1).to(next(theirs.parameters()).dtype)
    missing, unexpected = method.load_state_dict(ours_by_name(theirs.state_dict()), strict=False)
    known = {name for name, _ in method.named_parameters()} | {n for n, _ in method.named_buffers() if "running" in n}
    if unexpected or known & set(missing):
        raise RuntimeError(f"no counterpart: {unexpected[:3]} {sorted(known & set(missing))[:3]}")
    return method


def captions(words: tuple[int, int], seed: int) -> Tensor:
    """Random captions of a number of words in a range, padded to 77 tokens as theirs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(PERSON), CONTEXT, dtype=torch.long)
    for row in ids:
        count = int(torch.randint(*words, (1,), generator=generator))
        row[0], row[count + 1] = VOCABULARY - 2, VOCABULARY - 1
        row[1 : count + 1] = torch.randint(1, VOCABULARY - 3, (count,), generator=generator)
    return ids


def example(code: Theirs, size: tuple[int, int], words: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], Batch]:
    """The same batch for both."""
    image = torch.randn(len(PERSON), 3, *size, generator=torch.Generator().manual_seed(seed)).to(code.dtype)
    ids, person = captions(words, seed), torch.tensor(PERSON)
    theirs = {"images": image, "caption_ids": ids, "pids": person, "label_hat": torch.tensor(CLEAN).to(code.dtype)}
    longest = int((ids != 0).sum(dim=1).max())
    texts = {"full": Tokens(ids[:, :longest], ids[:, :longest] != 0)}
    return theirs, Batch(image=image, person=person, texts=texts, sample=torch.arange(len(person)))


def sides(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their four embeddings."""
    image, text = given["images"], given["caption_ids"]
    return {
        "image, BGE": model.encode_image(image),
        "text, BGE": model.encode_text(text),
        "image, TSE": model.encode_image_tse(image),
        "text, TSE": model.encode_text_tse(text),
    }


def our_sides(method: Method, batch: Batch) -> dict[str, Tensor]:
    parts = method.encode(batch, "finetune")
    names = {"image, BGE": "image", "text, BGE": "text", "image, TSE": "image_tse", "text, TSE": "text_tse"}
    return {name: parts[own] for name, own in names.items()}


def compare_embeddings(code: Theirs, table: Table, theirs: nn.Module, ours: Method, size: tuple[int, int]) -> None:
    for label, words, mode in (
        ("", (25, 40), False),
        ("short texts, ", (1, 15), False),
        ("training, ", (25, 40), True),
    ):
        given, batch = example(code, size, words, seed=1)
        theirs.train(mode), ours.train(mode)
        with torch.no_grad():
            before = {name: value.clone() for name, value in theirs.state_dict().items()}
            expected, found = sides(theirs, given), our_sides(ours, batch)
            theirs.load_state_dict(before)
        for name in expected:
            table.one(f"{label}{name}", expected[name], found[name])
        if mode:
            continue
        unit = {name: functional.normalize(value, p=2, dim=1) for name, value in expected.items()}
        both = [unit[f"text, {kind}"] @ unit[f"image, {kind}"].t() for kind in ("BGE", "TSE")]
        with torch.no_grad():
            found_ = ours.embed_texts(batch) @ ours.embed_images(batch).T
        table.one(f"{label}similarity, (BGE + TSE) / 2", (both[0] + both[1]) / 2, found_)


def compare_losses(
    code: Theirs, table: Table, args: Any, size: tuple[int, int], layers: int, folder: Path, eval_norm: bool
) -> None:
    recipe, label = load_recipe("rde"), "training in eval mode, " if eval_norm else ""
    for kind in list(LOSSES)[: 1 if eval_norm else None]:
        args.loss_names = kind
        theirs = code.build(args, size, layers, folder)
        ours = our_model(theirs, size, layers, recipe, loss=LOSSES[kind], eval_norm=eval_norm)
        given, batch = example(code, size, (25, 40), seed=2)
        ours._labels = given["label_hat"]
        theirs.eval(), ours.eval()
        with torch.no_grad():
            first, second, _, _ = theirs.compute_per_loss(given)
            looked = ours._look(batch)
        table.add(f"{label}{kind}, losses of pairs", {"bge": first, "tse": second}, looked)
        theirs.train(not eval_norm), ours.train()
        expected = {name.removesuffix("_loss"): v for name, v in theirs(given).items() if name.endswith("_loss")}
        found = ours.losses_of(ours.encode(batch, "finetune"), "finetune")
        table.add(f"{label}{kind}, losses", expected, found)
        named, own = ours_by_name(dict(theirs.named_parameters())), dict(ours.named_parameters())
        for loss in ("bge", "tse"):
            table.add(
                f"{label}{kind}, gradients of {loss}", gradients(expected[loss], named), gradients(found[loss], own)
            )
        running = ("running_mean", "running_var")
        table.add(
            f"{label}{kind}, running statistics after the step",
            {n: v for n, v in ours_by_name(dict(theirs.named_buffers())).items() if n.endswith(running)},
            {n: v for n, v in ours.named_buffers() if n.endswith(running)},
        )


class PlantedPairs:
    """As much of a model, a loader and a dataset as their `get_loss` needs: two losses of every sample."""

    real_correspondences = None

    def __init__(self, first: Tensor, second: Tensor, noise: float, dataset: str) -> None:
        self.table, self.dataset = (first, second), self
        self.args = SimpleNamespace(noisy_rate=noise, dataset_name=dataset)

    def __len__(self) -> int:
        return len(self.table[0])

    def eval(self) -> None:
        """Nothing to do."""

    def __iter__(self) -> Any:
        for rows in torch.arange(len(self)).split(64):
            yield {"index": rows}

    def compute_per_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        rows = batch["index"]
        return self.table[0][rows], self.table[1][rows], rows, rows


def compare_division(code: Theirs, table: Table) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random(2000) > 0.3
    losses = [
        torch.from_numpy(np.where(clean, rng.normal(0.3, 0.1, 2000), rng.normal(1.1, 0.2, 2000))) for _ in range(2)
    ]
    # Some pairs on which the views disagree.
    losses[1][:100] = losses[0].flip(0)[:100]
    for fit, noise, dataset in (("coarse", 0.2, "CUHK-PEDES"), ("fine", 0.5, "CUHK-PEDES"), ("fine", 0.0, "RSTPReid")):
        planted = PlantedPairs(losses[0].float(), losses[1].float(), noise, dataset)
        np.random.seed(0)
        first, second = _on_cpu(code.processor.get_loss, planted, planted)
        votes = (first + second).long()
        ours = divide({"bge": losses[0].float(), "tse": losses[1].float()}, fit=fit)
        table.one(
            f"division, votes ({dataset}, noise {noise}; {(votes == 1).sum()} uncertain)",
            votes.double(),
            ours.votes.double(),
        )
        sure = votes != 1
        table.one(
            f"division, labels of the certain pairs ({dataset}, noise {noise})",
            (votes == 2)[sure].double(),
            ours.labels[sure].double(),
        )
    everybody = rng.uniform(0.6, 1.0, 950)
    forced = torch.from_numpy(quiet(code.processor.split_prob, everybody, 0.5)).double()
    table.one(
        f"division, {int((forced == 0).sum())} of 950 forced", forced, torch.from_numpy(split(everybody)).double()
    )


def _on_cpu(call: Any, *given: Any) -> Any:
    """Their function moves tensors to a device that it names itself."""
    move = torch.Tensor.to
    torch.Tensor.to = lambda self, *where, **how: self if where == ("cuda",) else move(self, *where, **how)
    try:
        return quiet(call, *given)
    finally:
        torch.Tensor.to = move


def compare_words(code: Theirs, table: Table, ours: Method) -> None:
    """Their loader changes one token after another with Python's random numbers: it is given those that we drew."""
    ids = captions((5, 60), seed=3)
    torch.manual_seed(4)
    found = change_words(Tokens(ids, ids != 0), ours.backbone, 0.2)
    torch.manual_seed(4)
    draws, words = torch.rand(ids.shape), torch.randint(1, VOCABULARY - 3, ids.shape)
    reader = SimpleNamespace(tokenizer=quiet(code.bases.SimpleTokenizer))
    made = []
    kept = random.random, random.choice
    for row, drawn, other in zip(ids, draws.double(), words, strict=True):
        places = [place for place, token in enumerate(row.tolist()) if 0 < token < VOCABULARY - 3]
        ahead, here = iter(places), {"place": -1}

        def draw(ahead: Any = ahead, here: dict[str, int] = here, drawn: Tensor = drawn) -> float:
            here["place"] = next(ahead)
            return float(drawn[here["place"]])

        random.random = draw
        random.choice = lambda options, here=here, other=other: int(other[here["place"]])
        try:
            made.append(code.bases.ImageTextDataset.txt_data_aug(reader, row.numpy()))
        finally:
            random.random, random.choice = kept
    expected = torch.stack(made)[:, : found.ids.shape[1]]
    changed = int((torch.stack(made) != ids).sum())
    table.one(f"captions with changed words ({changed} tokens differ)", expected.double(), found.ids.double())


def compare_optimisation(code: Theirs, table: Table, args: Any, theirs: nn.Module, ours: Method) -> None:
    config = parse_section(TrainConfig, load_recipe("rde")["train"], "train")
    optimizer = quiet(code.solver.build_optimizer, args, theirs)
    schedule = code.solver.build_lr_scheduler(args, optimizer)
    mine = build_optimizer(ours, "finetune", config)
    solver = type(optimizer), optimizer.defaults["betas"], optimizer.defaults["eps"]
    if solver != (type(mine), config.betas, config.eps):
        raise RuntimeError("another optimiser")
    table.one("epochs", of(args.num_epoch), of(config.epochs))
    table.one("batch", of(args.batch_size), of(config.batch))
    names = ("temperature", "margin", "select_ratio", "contrast_temperature")
    published = (args.tau, args.margin, args.select_ratio, args.temperature)
    table.add(
        "temperatures, margin and ratio",
        dict(zip(names, map(of, published), strict=True)),
        {name: of(getattr(ours.config, name)) for name in names},
    )
    named, own = ours_by_name(dict(theirs.named_parameters())), dict(ours.named_parameters())
    read = {id(value) for value in named.values()}
    for group in optimizer.param_groups:
        group["params"] = [value for value in group["params"] if id(value) in read]
    decays = rates(optimizer, named, "weight_decay"), rates(mine, own, "weight_decay")
    table.add(f"weight decay of {len(decays[0])} parameters", *decays)
    their_rates: dict[str, Tensor] = {}
    our_rates: dict[str, Tensor] = {}
    for epoch in range(1, args.num_epoch + 1):
        for group in mine.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(config, epoch - 1)
        for kept, of_whom, parameters in ((their_rates, optimizer, named), (our_rates, mine, own)):
            kept |= {f"{name}, epoch {epoch}": rate for name, rate in rates(of_whom, parameters, "lr").items()}
        optimizer.step()  # no gradients: only that their scheduler does not complain
        schedule.step()
    table.add(f"rate of every parameter in {args.num_epoch} epochs", their_rates, our_rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of QinYang79/RDE")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64), help="height and width of the images")
    parser.add_argument("--layers", type=int, default=3, help="blocks of either tower")
    parser.add_argument("--double", action="store_true")
    given = parser.parse_args()
    size, layers = tuple(given.size), given.layers
    code = Theirs(given.checkout.resolve(), torch.float64 if given.double else torch.float32)
    args, table = code.settings(), Table()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        theirs = code.build(args, size, layers, folder)
        ours = our_model(theirs, size, layers, load_recipe("rde"))
        compare_embeddings(code, table, theirs, ours, size)
        for eval_norm in (False, True):
            compare_losses(code, table, args, size, layers, folder, eval_norm)
        compare_division(code, table)
        compare_words(code, table, ours)
        compare_optimisation(code, table, code.settings(), theirs, ours)
    print(f"largest relative difference {table.worst:.2g}, allowed {LIMIT:g}")
    return int(table.worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
