"""Compares `clip-reid` with the published code, number by number: same weights, same batch, on the CPU.

    git clone https://github.com/Syliz517/CLIP-ReID && git -C CLIP-ReID checkout eb1898b
    python tests/benchmarks/parity_clip_reid.py CLIP-ReID [--size 64 32] [--text-layers 2] [--double]

Their code is imported, not copied. What keeps it from running here is patched from outside: `.cuda()` does nothing,
`turtle`, `yacs` and timm's old layer module are stand-ins, and OpenAI's weights are random numbers in a CLIP of the
published widths (768 / 512, 12 image blocks). Their settings are read from configs/person/vit_clipreid.yml, ours from
the recipe `clip-reid`. Compared are text features, both losses with every term and gradient, the retrieval features,
with cameras and with overlapping patches, the learning rate of every epoch, and rate and decay of every parameter;
and, in float32, retrieval and text features of their checkpoint read back by `reidctl.convert`.

Prints a table of differences: largest absolute one, and relative to the largest number of the row. Exits with 1 if a
relative one is above 1e-5. `--double` shows what is left of them without rounding, relative to the largest number of
each parameter; their LayerNorm, which computes in float32, is replaced for it. Two minutes at the default size. At
`--size 256 128 --text-layers 12` rounding to float32 alone moves gradients by 2e-5: compare that with `--double`.
"""

import argparse
import ast
import contextlib
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from reidctl.backbones.base import BackboneConfig
from reidctl.backbones.clip import ClipBackbone
from reidctl.batch import Batch, Roster
from reidctl.config import load_recipe, parse_section
from reidctl.convert.assembling import convert
from reidctl.convert.heads import Told
from reidctl.convert.towers import Asked
from reidctl.methods.base import Method, build_method
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor

LIMIT = 1e-5
PEOPLE, IMAGES, CAMERAS = 10, 4, 5
CHOSEN = (7, 2, 9, 0)
"""The people of the batch."""
PUBLISHED = Path("configs/person/vit_clipreid.yml")


class Node(dict[str, Any]):
    """As much of yacs's CfgNode as their settings need."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def merge_from_file(self, path: Path) -> None:
        self.merge(yaml.safe_load(path.read_text(encoding="utf-8")))

    def merge(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(self.get(name), Node):
                self[name].merge(value or {})  # DATASETS is to be filled in
                continue
            if isinstance(value, str):  # YAML reads 1e-6 as a text, yacs does not
                with contextlib.suppress(ValueError, SyntaxError):
                    value = ast.literal_eval(value)
            self[name] = value


class Theirs:
    """The modules of a checkout, made to run on a CPU, and their settings.

    Args:
        checkout: its folder.
        text_layers: of the text tower.
        dtype: of all weights.
    """

    def __init__(self, checkout: Path, text_layers: int, dtype: torch.dtype) -> None:
        self.checkout, self.text_layers, self.dtype = checkout, text_layers, dtype
        sys.path.insert(0, str(checkout))
        _stand_in("turtle", pd=None)
        _stand_in("yacs")
        _stand_in("yacs.config", CfgNode=Node)
        _stand_in("timm.models.layers", DropPath=None, to_2tuple=None, trunc_normal_=nn.init.trunc_normal_)
        move = nn.Module.to
        nn.Module.to = lambda self, *where, **how: self if where == ("cuda",) else move(self, *where, **how)
        torch.Tensor.cuda = lambda self, *where, **how: self
        self.model = importlib.import_module("model.make_model_clipreid")
        self.clip = importlib.import_module("model.clip.model")
        self.make_loss = importlib.import_module("loss.make_loss").make_loss
        self.supcon = importlib.import_module("loss.supcontrast").SupConLoss("cpu")
        self.optimizers = importlib.import_module("solver.make_optimizer_prompt")
        self.cosine = importlib.import_module("solver.scheduler_factory").create_scheduler
        self.multistep = importlib.import_module("solver.lr_scheduler").WarmupMultiStepLR
        if dtype == torch.float64:
            self.clip.LayerNorm.forward = nn.LayerNorm.forward

    def settings(self, size: tuple[int, int], stride: int, cameras: bool, neck: str = "before") -> Any:
        defaults = importlib.reload(importlib.import_module("config.defaults"))
        cfg = defaults._C
        cfg.merge_from_file(self.checkout / PUBLISHED)
        cfg.INPUT.SIZE_TRAIN, cfg.MODEL.STRIDE_SIZE = list(size), [stride, stride]
        cfg.MODEL.SIE_CAMERA, cfg.MODEL.SIE_COE, cfg.TEST.NECK_FEAT = cameras, 1.0, neck
        return cfg

    def build(self, cfg: Any) -> tuple[nn.Module, nn.Module]:
        """Return their model and the CLIP inside, with random weights, none of them 0 or 1."""
        kept = []

        def random_clip(name: str, rows: int, columns: int, stride: int) -> nn.Module:
            sizes = {"embed_dim": 512, "image_resolution": 0, "h_resolution": rows, "w_resolution": columns}
            vision = {"vision_layers": 12, "vision_width": 768, "vision_patch_size": 16, "vision_stride_size": stride}
            text = {"context_length": 77, "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8}
            made = self.clip.CLIP(**sizes, **vision, **text, transformer_layers=self.text_layers)
            kept.append(_shaken(made.to(self.dtype)))
            return made

        self.model.load_clip_to_cpu = random_clip
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            made = self.model.make_model(cfg, PEOPLE, CAMERAS, 1).to(self.dtype)
        for head in (made.classifier, made.classifier_proj):  # 0.001 would hide what multiplies it
            nn.init.normal_(head.weight, std=0.1)
        for norm in (made.bottleneck, made.bottleneck_proj):
            _shaken(norm)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.zeros_(norm.bias)
        return made, kept[0]


def _stand_in(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def _shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def our_name(name: str) -> str:
    """What a tensor of their model is called in ours."""
    for theirs, ours in (
        ("image_encoder.", "backbone.image.visual."),
        ("text_encoder.", "backbone.text.text."),
        ("bottleneck_proj.", "necks.0.proj.norm."),
        ("bottleneck.", "necks.0.hidden.norm."),
        ("classifier_proj.", "necks.0.proj.classifier."),
        ("classifier.", "necks.0.hidden.classifier."),
        ("prompt_learner.cls_ctx", "id_tokens"),
        ("cv_embed", "camera_vectors"),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


def our_model(theirs: nn.Module, clip: nn.Module, cfg: Any, recipe: Mapping[str, Any], **changes: Any) -> Method:
    """Return `clip-reid` with their weights; every tensor of either side has its counterpart."""
    config = BackboneConfig(
        kind="clip",
        spec="clip:parity",
        image_size=tuple(cfg.INPUT.SIZE_TRAIN),
        image={"patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
        text={
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": len(clip.transformer.resblocks),
        },
        dim=512,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        stride=None if cfg.MODEL.STRIDE_SIZE[0] == 16 else cfg.MODEL.STRIDE_SIZE[0],
        quick_gelu=True,
    )
    settings = {name: value for name, value in recipe["method"].items() if name != "name"} | changes
    settings["sie"] = {"camera": cfg.MODEL.SIE_CAMERA, "coefficient": cfg.MODEL.SIE_COE}
    roster = replace(Roster.single(PEOPLE), cameras=tuple(f"c{number}" for number in range(CAMERAS)))
    method = build_method("clip-reid", settings, ClipBackbone(config), PEOPLE, roster).to(clip.dtype)
    weights = {our_name(n): v for n, v in theirs.state_dict().items() if not n.startswith("prompt_learner.token_")}
    weights["backbone.text.text.token_embedding.weight"] = clip.token_embedding.weight
    missing, unexpected = method.load_state_dict(weights, strict=False)
    known = {name for name, _ in method.named_parameters()} | {n for n, _ in method.named_buffers() if "running" in n}
    if unexpected or known & set(missing):
        raise RuntimeError(f"no counterpart: {unexpected[:3]} {sorted(known & set(missing))[:3]}")
    return method


class Table:
    """Rows of differences."""

    def __init__(self) -> None:
        self.worst = 0.0
        print(f"{'what':58}{'largest value':>15}{'difference':>13}{'relative':>11}")

    def add(self, what: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
        """Compare tensors by name; each relative to the largest number of all, in double precision to its own."""
        if theirs.keys() != ours.keys():
            raise RuntimeError(f"{what}: {sorted(theirs.keys() ^ ours.keys())[:3]}")
        found = []
        for name, value in theirs.items():
            a, b = value.detach(), ours[name].detach()
            if a.shape != b.shape:
                raise RuntimeError(f"{what}: {name} has shapes {tuple(a.shape)} and {tuple(b.shape)}")
            found.append((float((a - b).abs().max()), float(a.abs().max())))
        largest = max(size for _, size in found)
        # Some gradients are 0 but for rounding, such as the last norm's shift in a loss of distances.
        floor = largest * (1e-3 if value.dtype == torch.float64 else 1.0)
        relative = max(gap / max(size, floor) for gap, size in found)
        self.worst = max(self.worst, relative)
        print(f"{what:58}{largest:15.6g}{max(gap for gap, _ in found):13.2g}{relative:11.2g}", flush=True)

    def one(self, what: str, theirs: Tensor, ours: Tensor) -> None:
        self.add(what, {"": theirs}, {"": ours})


def of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gradients(value: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    parts = zip(named, named.values(), found, strict=True)
    return {name: torch.zeros_like(own) if grad is None else grad for name, own, grad in parts}


def compare_model(code: Theirs, table: Table, size: tuple[int, int], stride: int, cameras: bool) -> None:
    label = f"stride {stride}{', cameras' if cameras else ''}: "
    cfg = code.settings(size, stride, cameras)
    theirs, clip = code.build(cfg)
    ours = our_model(theirs, clip, cfg, load_recipe("clip-reid"))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(len(CHOSEN) * IMAGES, 3, *size, generator=generator).to(code.dtype)
    person = torch.tensor(CHOSEN).repeat_interleave(IMAGES)
    camera = torch.randint(0, CAMERAS, (len(image),), generator=generator) if cameras else None
    batch = Batch(image=image, person=person, camera=camera)
    everybody = torch.arange(PEOPLE)

    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        with torch.no_grad():
            table.one(
                f"{label}text features, {'train' if mode else 'eval'}",
                theirs(label=everybody, get_text=True),
                ours.prompt_features(everybody),
            )

    # Stage 1, as do_train_stage1: features are computed without cameras.
    ours.begin("prompt-stage")
    ours.train()
    with torch.no_grad():
        seen = theirs(image, person, get_image=True)
        table.one(f"{label}stage 1 image features", seen, ours.frozen_features(Batch(image=image))["image"])
    text = theirs(label=person, get_text=True)
    first = code.supcon(seen, text, person, person) + code.supcon(text, seen, person, person)
    mine = ours.losses(replace(batch, frozen={"image": seen}), "prompt-stage")
    table.one(f"{label}stage 1 loss", first, ours.objective(mine))
    table.add(
        f"{label}stage 1 gradient of the prompts",
        gradients(first, {"id_tokens": theirs.prompt_learner.cls_ctx}),
        gradients(ours.objective(mine), {"id_tokens": ours.id_tokens}),
    )

    # Stage 2, as do_train_stage2.
    loss, _ = quiet(code.make_loss, cfg, PEOPLE)
    with torch.no_grad():
        texts = torch.cat([theirs(label=part, get_text=True) for part in everybody.split(4)])
    ours.begin("finetune")
    theirs.train(), ours.train()
    score, feature, projected = theirs(x=image, label=person, cam_label=camera, view_label=None)
    scores = projected @ texts.t()
    look = ours.see(batch)
    for name, a, b in zip(
        ("last but one", "hidden", "projected"), feature, (look.previous, look.hidden, look.proj), strict=True
    ):
        table.one(f"{label}stage 2 feature, {name}", a, b)
    mine = ours.losses(batch, "finetune")
    named = {our_name(n): v for n, v in theirs.named_parameters() if not n.startswith(("text_", "prompt_"))}
    trained = {n: v for members in ours.parameters_by_role("finetune").values() for n, v in members}
    named = {name: value for name, value in named.items() if value.requires_grad}
    published = (cfg.MODEL.ID_LOSS_WEIGHT, cfg.MODEL.TRIPLET_LOSS_WEIGHT, cfg.MODEL.I2T_LOSS_WEIGHT)
    names = ("ID_LOSS_WEIGHT", "TRIPLET_LOSS_WEIGHT", "I2T_LOSS_WEIGHT")
    for place, term in enumerate(("id", "triplet", "i2t")):
        cfg.MODEL.merge(dict(zip(names, (float(place == other) for other in range(3)), strict=True)))
        alone = loss(score, feature, person, None, scores)
        table.one(f"{label}stage 2 loss, {term}", alone, mine[term])
        table.add(f"{label}stage 2 gradients, {term}", gradients(alone, named), gradients(mine[term], trained))
    cfg.MODEL.merge(dict(zip(names, published, strict=True)))
    total = loss(score, feature, person, None, scores)
    table.one(f"{label}stage 2 loss, total", total, ours.objective(mine))
    table.add(f"{label}stage 2 gradients, total", gradients(total, named), gradients(ours.objective(mine), trained))
    running = ("running_mean", "running_var")
    table.add(
        f"{label}running statistics after the step",
        {our_name(n): v for n, v in theirs.named_buffers() if n.endswith(running)},
        {n: v for n, v in ours.named_buffers() if n.endswith(running)},
    )

    theirs.eval(), ours.eval()
    with torch.no_grad():
        for neck, feature_name in (("before", "concat"), ("after", "bn")):
            theirs.neck_feat = neck
            raw = theirs(image, cam_label=camera, view_label=None)
            ours.config = ours.config.replace(i2i_feature=feature_name)
            table.one(
                f"{label}retrieval feature, {neck} the norm",
                functional.normalize(raw, dim=1, p=2),
                ours.embed_tasks(batch)["i2i"],
            )
    if code.dtype == torch.float32:  # what is read back is float32 in any case
        compare_converted(table, theirs, clip, cfg, batch, label)


def compare_converted(table: Table, theirs: nn.Module, clip: nn.Module, cfg: Any, batch: Batch, label: str) -> None:
    """Their model as their training saves it, under DataParallel, read back by `reidctl.convert`."""
    with tempfile.TemporaryDirectory() as name:
        path, words = Path(name) / "ViT-B-16_60.pth", Path(name) / "words.pt"
        torch.save({f"module.{n}": value for n, value in theirs.state_dict().items()}, path)
        own = clip.state_dict()
        torch.save({n: own[n] for n in ("visual.class_embedding", "token_embedding.weight")}, words)
        cameras = tuple(f"c{number}" for number in range(CAMERAS)) if cfg.MODEL.SIE_CAMERA else ()
        asked = Asked(image_size=tuple(cfg.INPUT.SIZE_TRAIN), stride=cfg.MODEL.STRIDE_SIZE[0])
        found = convert(path, asked=asked, told=Told(cameras=cameras), words=words)
    if (found.form.name, found.initial) != ("clip-reid", []):
        raise RuntimeError(f"read as {found.form.name}, missing {found.initial[:3]}")
    everybody = torch.arange(PEOPLE)
    theirs.neck_feat = "before"
    with torch.no_grad():
        raw = theirs(batch.image, cam_label=batch.camera, view_label=None)
        made = found.method.embed_tasks(batch)["i2i"]
        table.one(f"{label}converted: retrieval feature", functional.normalize(raw, dim=1, p=2), made)
        text = theirs(label=everybody, get_text=True)
        table.one(f"{label}converted: text features", text, found.method.prompt_features(everybody))


def quiet(call: Any, *given: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*given)


def rates(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], field: str) -> dict[str, Tensor]:
    name_of = {id(value): name for name, value in named.items()}
    return {name_of[id(p)]: of(group[field]) for group in optimizer.param_groups for p in group["params"]}


def compare_optimisation(code: Theirs, table: Table, size: tuple[int, int]) -> None:
    recipe = load_recipe("clip-reid")
    cfg = code.settings(size, 16, cameras=True)
    theirs, clip = code.build(cfg)
    ours = our_model(theirs, clip, cfg, recipe)
    _, centre = quiet(code.make_loss, cfg, PEOPLE)
    first = code.optimizers.make_optimizer_1stage(cfg, theirs)
    second, _ = code.optimizers.make_optimizer_2stage(cfg, theirs, centre)
    solver = cfg.SOLVER
    one, two = solver.STAGE1, solver.STAGE2
    cosine = code.cosine(first, one.MAX_EPOCHS, one.LR_MIN, one.WARMUP_LR_INIT, one.WARMUP_EPOCHS)
    steps = code.multistep(second, two.STEPS, two.GAMMA, two.WARMUP_FACTOR, two.WARMUP_ITERS, two.WARMUP_METHOD)
    named = {our_name(n): v for n, v in theirs.named_parameters()}
    for stage, theirs_, kind, section, epochs, step in (
        ("prompt-stage", first, PromptConfig, "prompt", one.MAX_EPOCHS, cosine.step),
        ("finetune", second, TrainConfig, "train", two.MAX_EPOCHS, lambda epoch: steps.step()),
    ):
        config = parse_section(kind, recipe[section], section)
        mine = build_optimizer(ours, stage, config)
        if (type(theirs_), theirs_.defaults["betas"], theirs_.defaults["eps"]) != (
            type(mine),
            config.betas,
            config.eps,
        ):
            raise RuntimeError(f"{stage}: another optimiser")
        table.one(f"{stage}: epochs", of(epochs), of(config.epochs))
        table.one(
            f"{stage}: batch",
            of(cfg.SOLVER["STAGE1" if kind is PromptConfig else "STAGE2"].IMS_PER_BATCH),
            of(config.batch),
        )
        own = dict(ours.named_parameters())
        decays = rates(theirs_, named, "weight_decay"), rates(mine, own, "weight_decay")
        table.add(f"{stage}: weight decay of {len(decays[0])} parameters", *decays)
        theirs_rates: dict[str, Tensor] = {}
        our_rates: dict[str, Tensor] = {}
        for epoch in range(1, epochs + 1):
            theirs_.step()  # no gradients: only that their scheduler does not complain
            step(epoch)
            factor = learning_rate_factor(config, epoch - 1)
            for group in mine.param_groups:
                group["lr"] = group["base_lr"] * factor
            for kept, optimizer, names in ((theirs_rates, theirs_, named), (our_rates, mine, own)):
                kept |= {f"{name}, epoch {epoch}": rate for name, rate in rates(optimizer, names, "lr").items()}
        table.add(f"{stage}: rate of every parameter in {epochs} epochs", theirs_rates, our_rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of Syliz517/CLIP-ReID")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 32), help="height and width of the images")
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--double", action="store_true")
    given = parser.parse_args()
    code = Theirs(given.checkout, given.text_layers, torch.float64 if given.double else torch.float32)
    table, size = Table(), tuple(given.size)
    for stride, cameras in ((16, False), (16, True), (12, False), (12, True)):
        compare_model(code, table, size, stride, cameras)
    compare_optimisation(code, table, size)
    print(f"largest relative difference {table.worst:.2g}, allowed {LIMIT:g}")
    return int(table.worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
