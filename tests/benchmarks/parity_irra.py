"""Compares converted checkpoints of IRRA and its relatives with the code that wrote them, number by number, on the CPU.

    git clone https://github.com/anosorae/IRRA && git -C IRRA checkout cfc2378
    python tests/benchmarks/parity_irra.py IRRA
    python tests/benchmarks/parity_irra.py RDE/2024-CVPR-RDE --form rde            (QinYang79/RDE at b3fd396)
    python tests/benchmarks/parity_irra.py MLLM4Text-ReID --form mllm4text         (WentaoTan/MLLM4Text-ReID at 8f19e67)

Their code is imported, not copied. Their model is built from a CLIP of random numbers, saved by their own
`Checkpointer` (as float16 too) and read back by `reidctl.convert`. What keeps it from running in float32 on a CPU is
patched from outside: `.half()` does nothing, OpenAI's download is a file. Compared are token ids and embeddings; for
IRRA all losses of one batch with all gradients, with the masked caption everywhere (as it runs) and a clean one; for
IRRA and RDE rate and decay of every parameter in every epoch, from their solver and from our recipe.

Prints a table of differences: largest absolute one, and relative to the largest number of the row. Exits with 1 if a
relative one is above 1e-5. Half a minute at the default size.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from parity_clip_reid import LIMIT, Table, gradients, of, quiet, rates
from torch import Tensor, nn

from reidctl import losses
from reidctl.backbones.tokenizers import ClipTokenizer
from reidctl.batch import Batch, Tokens
from reidctl.config import load_recipe, parse_section
from reidctl.convert.assembling import Converted, convert
from reidctl.convert.heads import Told
from reidctl.convert.names import FORMS, rename
from reidctl.convert.towers import Asked
from reidctl.methods.base import Method, unit
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor

PEOPLE, BATCH, CONTEXT = 10, 12, 77
SENTENCES = (
    "A man with short black hair wears a grey T-shirt & blue jeans.",
    "the woman's red dress ends at her knees; she's carrying a white hand-bag (small)...",
    "Ein Mädchen mit grünem Rucksack, 2 Zöpfen und weißen Schuhen.",
    "A person " * 60,
)


class Theirs:
    """The modules of a checkout, made to run in float32 on a CPU.

    Args:
        checkout: its folder.
        form: whose it is.
        size: of the images.
        layers: of both towers.
    """

    def __init__(self, checkout: Path, form: str, size: tuple[int, int], layers: int) -> None:
        self.form, self.size, self.layers = form, size, layers
        sys.path.insert(0, str(checkout))
        self.half = torch.Tensor.half
        torch.Tensor.half = lambda self: self
        self.build = importlib.import_module("model.build")
        self.solver = importlib.import_module("solver")
        self.checkpointer = importlib.import_module("utils.checkpoint").Checkpointer
        self.tokenizer = importlib.import_module("utils.simple_tokenizer").SimpleTokenizer()

    def options(self, weights: Path) -> SimpleNamespace:
        """Their options: the defaults of utils/options.py, and of run_irra.sh or run_rde.sh."""
        before, sys.argv = sys.argv, ["train.py"]
        args = importlib.import_module("utils.options").get_args()
        sys.argv = before
        published = {"pretrain_choice": str(weights), "img_size": self.size, "num_epoch": 60, "batch_size": 64}
        more = {"irra": {"loss_names": "sdm+mlm+id"}, "rde": {"loss_names": "TAL+sr0.3_tau0.015_margin0.1_n0.0"}}
        return SimpleNamespace(**{**vars(args), **published, **more.get(self.form, {"loss_names": "sdm"})})

    def model(self, folder: Path, **changes: Any) -> tuple[nn.Module, SimpleNamespace]:
        """Return their model with random weights, none of them 0 or 1, and its options."""
        vision = {"image_size": 224, "patch_size": 16, "width": 128, "layers": self.layers, "head_width": 64}
        text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 128, "heads": 2, "layers": self.layers}
        torch.manual_seed(0)
        # The token selection layers of RDE's code take 512 channels, whatever the towers give.
        state = open_clip.CLIP(512 if self.form == "rde" else 128, vision, text, quick_gelu=True).state_dict()
        torch.save({n: v for n, v in state.items() if n not in ("logit_scale", "attn_mask")}, folder / "openai.pt")
        args = self.options(folder / "openai.pt")
        args.__dict__.update(changes)
        kind = self.build.RDE if self.form == "rde" else self.build.IRRA
        with contextlib.redirect_stdout(io.StringIO()):
            made = kind(args, PEOPLE)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            for norm in (module for module in made.modules() if isinstance(module, nn.BatchNorm1d)):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2.0)
        return made, args

    def save(self, model: nn.Module, args: SimpleNamespace, folder: Path, name: str) -> Path:
        """Save as their training does, with the states of optimiser and schedule."""
        optimizer = quiet(self.solver.build_optimizer, args, model)
        scheduler = self.solver.build_lr_scheduler(args, optimizer)
        self.checkpointer(model, optimizer, scheduler, str(folder), True).save(name, epoch=3, num_epoch=60, iteration=0)
        return folder / f"{name}.pth"


def read(path: Path, size: tuple[int, int]) -> Converted:
    return convert(path, asked=Asked(image_size=size), told=Told())


def sentences(code: Theirs) -> Tensor:
    """Their token ids of the sentences, (S, 77)."""
    start, end = (code.tokenizer.encoder[f"<|{name}oftext|>"] for name in ("start", "end"))
    ids = torch.zeros(len(SENTENCES), CONTEXT, dtype=torch.long)
    for row, sentence in enumerate(SENTENCES):
        tokens = [start, *code.tokenizer.encode(sentence), end][:CONTEXT]
        tokens[-1] = end
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def draw(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, captions (B, 77), masked captions and labels (0: not asked), made of random words."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, *size, generator=generator)
    ids = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
    for row in range(BATCH):
        count = int(torch.randint(5, CONTEXT - 2, (1,), generator=generator))
        words = torch.randint(1, 49405, (count,), generator=generator)
        ids[row, : count + 2] = torch.cat([torch.tensor([49406]), words, torch.tensor([49407])])
    asked = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids > 0) & (ids < 49405)
    asked[:, 1] = True
    return images, ids, ids.masked_fill(asked, 49405), ids.where(asked, torch.zeros_like(ids))


def tokens(ids: Tensor) -> Tokens:
    return Tokens(ids, ids > 0)


def compare_embeddings(code: Theirs, table: Table, theirs: nn.Module, ours: Method, label: str) -> None:
    images, ids, _, _ = draw(code.size)
    batch = Batch(image=images, texts={"full": tokens(ids)})
    theirs.eval(), ours.eval()
    with torch.no_grad():
        for name, own in (("image", ours.embed_images(batch)), ("text", ours.embed_texts(batch))):
            found = [unit(getattr(theirs, f"encode_{name}")(images if name == "image" else ids))]
            if code.form == "rde":  # the mean of two cosines is the cosine of both vectors side by side
                found.append(unit(getattr(theirs, f"encode_{name}_tse")(images if name == "image" else ids)))
            table.one(f"{label}: {name} embedding", torch.cat(found, dim=1) / len(found) ** 0.5, own)


def compare_losses(code: Theirs, table: Table, theirs: nn.Module, ours: Method) -> None:
    images, ids, masked, labels = draw(code.size)
    person = torch.arange(BATCH) % (BATCH // 2)
    asked = labels.nonzero()
    words = {"asked": asked, "answer": labels[asked[:, 0], asked[:, 1]], "masked": tokens(masked)}
    batch = Batch(image=images, person=person, texts={"full": tokens(ids)}, **words)
    named = rename(dict(theirs.named_parameters()), FORMS["irra"], "their model").weights
    trained = {name: value for members in ours.parameters_by_role("finetune").values() for name, value in members}
    theirs.train(), ours.train()
    for everywhere in (True, False):
        ours.config = ours.config.replace(masked_caption_everywhere=everywhere)
        label = "masked caption everywhere" if everywhere else "clean caption"
        given = {"images": images, "pids": person, "caption_ids": masked if everywhere else ids}
        found = theirs({**given, "mlm_ids": masked, "mlm_labels": labels})
        own = ours.losses_of(ours.encode(batch, "finetune"), "finetune")
        for name in ("sdm", "id", "mlm"):
            table.one(f"{label}: {name}", found[f"{name}_loss"], own[name])
            table.add(
                f"{label}: gradients of {name}", gradients(found[f"{name}_loss"], named), gradients(own[name], trained)
            )
        total = sum(value for name, value in found.items() if "loss" in name)
        table.one(f"{label}: all of them", total, ours.objective(own))
        table.add(f"{label}: gradients of all", gradients(total, named), gradients(ours.objective(own), trained))
        if everywhere:
            theirs.current_task = ["itc"]
            itc = theirs({**given, "mlm_ids": masked, "mlm_labels": labels})["itc_loss"]
            quiet(theirs._set_task)
            parts = ours.encode(batch, "finetune")
            table.one(f"{label}: itc", itc, losses.info_nce(parts["image"], parts["text"], temperature=0.02))


def compare_optimisation(code: Theirs, table: Table, theirs: nn.Module, args: Any, ours: Method) -> None:
    """Rates of all epochs and decays of all parameters, ours from the recipe `irra-paper` or `rde-paper`."""
    config = parse_section(TrainConfig, load_recipe(f"{code.form}-paper")["train"], "train")
    optimizer = quiet(code.solver.build_optimizer, args, theirs)
    scheduler = code.solver.build_lr_scheduler(args, optimizer)
    mine = build_optimizer(ours, "finetune", config)
    settings = optimizer.defaults["betas"], optimizer.defaults["eps"], type(optimizer)
    if settings != (config.betas, config.eps, type(mine)):
        raise RuntimeError(f"another optimiser: {settings}")
    table.one("epochs", of(args.num_epoch), of(config.epochs))
    table.one("batch", of(args.batch_size), of(config.batch))
    named = rename(dict(theirs.named_parameters()), FORMS[code.form], "their model").weights
    own = dict(ours.named_parameters())
    decays = held(optimizer, named, "weight_decay"), rates(mine, own, "weight_decay")
    table.add(f"weight decay of {len(decays[0])} parameters", *decays)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for epoch in range(config.epochs):
        factor = learning_rate_factor(config, epoch)
        for group in mine.param_groups:
            group["lr"] = group["base_lr"] * factor
        for kept, now in zip(found, (held(optimizer, named, "lr"), rates(mine, own, "lr")), strict=True):
            kept |= {f"{name}, epoch {epoch}": rate for name, rate in now.items()}
        optimizer.step()  # no gradients: only that their schedule does not complain
        scheduler.step()
    table.add(f"rate of every parameter in {config.epochs} epochs", *found)


def held(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], field: str) -> dict[str, Tensor]:
    """A number of each parameter that has a place in our model: RDE's code holds layers that it never calls."""
    name_of = {id(value): name for name, value in named.items()}
    groups = [(group[field], parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return {name_of[id(parameter)]: of(value) for value, parameter in groups if id(parameter) in name_of}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder with model/build.py")
    parser.add_argument("--form", default="irra", choices=("irra", "rde", "mllm4text"))
    parser.add_argument("--size", type=int, nargs=2, default=(384, 128), help="height and width of the images")
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    code, table = Theirs(given.checkout.resolve(), given.form, tuple(given.size), given.layers), Table()
    own = ClipTokenizer()(SENTENCES).ids
    table.one("token ids", sentences(code)[:, : own.shape[1]].double(), own.double())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs, args = code.model(folder)
        found = read(code.save(theirs, args, folder, "best"), code.size)
        if (found.form.name, found.initial) != (code.form, []):
            raise RuntimeError(f"read as {found.form.name}, missing {found.initial[:3]}")
        compare_embeddings(code, table, theirs, found.method, "float32 file")
        if code.form == "irra":
            compare_losses(code, table, theirs, found.method)
        if code.form != "mllm4text":
            compare_optimisation(code, table, theirs, args, found.method)
        torch.Tensor.half = code.half
        code.build.convert_weights(theirs)
        halved = read(code.save(theirs, args, folder, "half"), code.size)
        torch.Tensor.half = lambda self: self
        compare_embeddings(code, table, theirs.float(), halved.method, "float16 file")
    print(f"largest relative difference {table.worst:.2g}, allowed {LIMIT:g}")
    return int(table.worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
