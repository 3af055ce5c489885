"""A model and a training set of two datasets, for the tests of `mta-clip`."""

from dataclasses import replace

import torch
from conftest import write_dataset

from reidctl import tables
from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.batch import Roster
from reidctl.data import TrainingSet
from reidctl.device import resolve_device
from reidctl.methods.base import build_method

CPU = resolve_device("cpu")
READOUTS = ("cls_plus_gap", "concat", "gap", "pre_last")
LOCAL = (0, 1, 2, 3), (3, 4, 5, 6, 7)
"""The people of datasets a and b; 3 is in both."""
COSINE = {"con": {"normalize": True, "temperature": 0.07}, "i2t": {"normalize": True, "temperature": 0.07}}
SMALL = {"sga": {"groups": 4, "reduction": 4, "gamma_init": 0.3}, "unfreeze_blocks": 1, **COSINE}
NEITHER = {
    "hcp": {"enabled": False},
    "sga": {"enabled": False},
    "unfreeze_blocks": "all",
    "heads": "joint",
    **COSINE,
}
"""The settings with which it is `clip-reid`."""


def two_datasets(folder, people=16, *, one=False, shared=3):
    """People 0-7 train, 8-11 validate, 12-15 test; the first half of each is in dataset a, the others in b.

    Of person 3 two images are in each. `one` puts all into a.
    """
    splits = {**dict.fromkeys(range(8, 12), "val"), **dict.fromkeys(range(12, 16), "test")}
    write_dataset(folder, people=people, per_person=4, splits=splits)
    if one:
        return with_dataset(folder, lambda person, number: "a")
    first = {0, 1, 2, 8, 9, 12, 13}
    return with_dataset(
        folder, lambda person, number: "a" if person in first or (person == shared and number < 2) else "b"
    )


def with_dataset(folder, rule):
    images = tables.read_table(folder / "images.parquet", "images")
    names = [name[1:].split("-") for name in images["image_id"]]
    images["dataset"] = [rule(int(person), int(number)) for person, number in names]
    tables.write_table(folder / "images.parquet", "images", images)
    return folder


def samples_of(corpus):
    tower = build("clip:micro")
    return TrainingSet(
        corpus, size=tower.image_size, mean=tower.mean, std=tower.std, tokenize=tower.tokenize, texts=(),
        augment=AugmentConfig(flip=0, pad=0, erase=0),
    )  # fmt: skip


def rows_of(batch, rows):
    kept = {name: getattr(batch, name)[rows] for name in ("image", "person", "domain", "camera")}
    return replace(batch, image_id=(), text_id=(), clothing_group=None, has_fusion=None, **kept)


def of_domain(batch, domain):
    return rows_of(batch, (batch.domain == domain).nonzero().flatten())


def with_noise(batch, rows):
    image = batch.image.clone()
    image[rows] = torch.randn(image[rows].shape, generator=torch.Generator().manual_seed(5))
    return replace(batch, image=image)


ROSTER = Roster(("a", "b"), LOCAL, tuple(f"{d}/c{n}" for d in "ab" for n in range(4)))


def make(name="mta-clip", roster=ROSTER, **changes):
    torch.manual_seed(0)
    settings = changes if name == "clip-reid" else {**SMALL, **changes}
    return build_method(name, settings, build("clip:micro"), 8, roster).eval()


def stirred(method):
    """The same with prompts that are far apart and an adapter that is not where it started."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in method.named_parameters():
            if name.startswith(("context.", "id_tokens")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
            elif name.startswith("sga."):
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return method


def grads(value, *of):
    """Largest absolute gradient of each; 0 where none arrives."""
    found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
    return [0.0 if grad is None else float(grad.abs().max()) for grad in found]


def same(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def text_of(method, person, domain):
    """The text feature of one person of one dataset, from the towers and the tokens alone."""
    tower = method.backbone
    before, after = (tower.tokenize([words]).ids for words in ("a photo of a", "person."))
    middle = [method.context.shared, method.context.domain[domain], method.id_tokens[person]]
    whole = [tower.embed_tokens(before[:, :-1])[0], *middle, tower.embed_tokens(after[:, 1:])[0]]
    joined = torch.cat(whole)[None]
    return tower.encode_embedded(joined, torch.ones(joined.shape[:2], dtype=torch.bool)).pooled[0]
