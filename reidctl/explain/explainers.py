"""Explainers: which patches of an image support a phrase. Every one of them runs on every method.

Some look at the phrase (`ppim`, `patch`, `chefer`, `gradcam`, `slots`), some at the image alone (`cls`, `rollout`),
some at neither (`centre`, `random`): what the latter score is what an explanation must beat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from reidctl.backbones.base import recording
from reidctl.batch import Batch, PhraseSets
from reidctl.errors import UsageError
from reidctl.layers.ppim import Ppim, PpimConfig
from reidctl.methods.base import Method


@dataclass(frozen=True)
class Asked:
    """P pairs of an image and a phrase, and the G captions that they belong to.

    Attributes:
        pairs: images (P) and phrases as texts `full`.
        captions: the images of the captions (G), the captions as texts `full`, and their phrases (G, K).
        group: the caption of each pair, shape (P,).
        place: which phrase of its caption a pair is, shape (P,); -1: the whole caption.
        names: one per pair; what is drawn at random depends on them alone.
    """

    pairs: Batch
    captions: Batch
    group: Tensor
    place: Tensor
    names: Sequence[str]


Aggregate = Literal["own", "weighted", "max", "mean"]
Explain = Callable[[Method, Asked, int], Tensor]
"""(method, pairs, seed) to relevance >= 0, shape (P, N), on any scale."""


def explainer(name: str) -> Explain:
    """Return an explainer by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in EXPLAINERS:
        raise UsageError(f"Unknown explainer `{name}`.", hint=f"One of: {', '.join(EXPLAINERS)}.")
    return EXPLAINERS[name]


def applies(name: str, method: Method | type[Method]) -> bool:
    """Whether a method has what an explainer reads."""
    kind = method if isinstance(method, type) else type(method)
    return name != "ppim" or kind.phrase_maps is not Method.phrase_maps


def check_explainer(name: str, method: Method) -> None:
    """Refuse an explainer that there is not, or that the method does not have.

    Raises:
        UsageError: so it is.
    """
    explainer(name)
    if not applies(name, method):
        raise UsageError(
            f"`ppim` is the phrase-patch module of `interpart`; `{method.name}` has none.",
            hint="Use `patch`, the cosine of each patch with the phrase, or another explainer.",
        )


def ppim(method: Method, asked: Asked, seed: int) -> Tensor:
    """The maps a_k of InterPartAbility's module; of a whole caption their sum, weighted by softmax_k of the scores.

    The softmax runs over cosines at temperature 0.05.
    """
    with torch.no_grad():
        maps = method.phrase_maps(asked.captions)
        assert maps is not None
        scores = _fit(method, asked.captions, maps)
    return _of_pairs(maps, scores, asked)


def patch(method: Method, asked: Asked, seed: int) -> Tensor:
    """The cosine of every patch with the phrase, negative values cut."""
    return method.patch_similarity(asked.pairs).clamp_min(0)


def gradcam(method: Method, asked: Asked, seed: int) -> Tensor:
    """Grad-CAM at the norm in front of the last block's attention; see `Method.explain`."""
    return method.explain(asked.pairs, "gradcam").flatten(1)


def cls(method: Method, asked: Asked, seed: int) -> Tensor:
    """Attention of the last block to the patches, mean of heads, from where the image vector is read."""
    with recording(method.backbone.image, -1) as seen, torch.no_grad():
        method.embed_images(asked.captions)
        rows = seen[-1].float().mean(dim=1)
    return _read_out(method, rows)[asked.group]


def rollout(method: Method, asked: Asked, seed: int) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): the product over all blocks of (mean of heads + identity) / 2."""
    with recording(method.backbone.image) as seen, torch.no_grad():
        method.embed_images(asked.captions)
        flow = None
        for block in seen:
            step = _with_residual(block.float().mean(dim=1))
            flow = step if flow is None else step @ flow
    assert flow is not None
    return _read_out(method, flow)[asked.group]


def _with_residual(attention: Tensor) -> Tensor:
    return (attention + torch.eye(attention.shape[-1], device=attention.device)) / 2


def chefer(method: Method, asked: Asked, seed: int, start: int = -1) -> Tensor:
    """Relevance of Chefer, Gur & Wolf 2021 (arXiv:2103.15679): R <- R + mean_heads(max(0, grad A * A)) R, from R = I.

    The gradient is that of cos(image, phrase), A the attention of the blocks from `start` on (default: the last).
    """
    with recording(method.backbone.image, start) as seen, torch.enable_grad():
        with torch.no_grad():
            text = method.embed_texts(asked.pairs)
        similarity = (_with_gradient(method, asked.pairs) * text).sum()
        maps = list(seen)
        grads = torch.autograd.grad(similarity, maps, allow_unused=True)
    return _read_out(method, relevance_of(maps, grads))


def relevance_of(maps: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Return R - I of Chefer's rule for attention maps and their gradients, each (B, heads, T, T); shape (B, T, T)."""
    eye = torch.eye(maps[0].shape[-1], device=maps[0].device)
    relevance = eye.expand(len(maps[0]), -1, -1)
    for attention, grad in zip(maps, grads, strict=True):
        if grad is None:
            continue
        step = (grad.float() * attention.float()).clamp_min(0).mean(dim=1)
        relevance = relevance + step @ relevance
    return (relevance - eye).detach()


def _with_gradient(method: Method, batch: Batch) -> Tensor:
    """Image vectors with a gradient, also of a model whose weights want none."""
    return method.embed_images(replace(batch, image=batch.require("image").detach().requires_grad_()))


def slots(method: Method, asked: Asked, seed: int) -> Tensor:
    """Slot attention without learnt weights: the phrases of a caption, and the average patch, compete for the patches.

    As in PLOT and DiCo, whose slots are learnt; these start from the phrases (`layers.ppim`, kind `slots`).
    """
    with torch.no_grad():
        patches = method.patch_features(asked.captions)
        phrases, mask = _encoded(method, asked.captions)
        ground = functional.normalize(patches.mean(dim=1, keepdim=True), dim=-1)
        module = Ppim(PpimConfig(kind="slots", background=False), patches.shape[-1]).to(patches.device).eval()
        seen = module(torch.cat([phrases, ground], dim=1), functional.pad(mask, (0, 1), value=True), patches)
    return _of_pairs(seen.maps[:, :-1], seen.scores[:, :-1], asked)


def _encoded(method: Method, captions: Batch) -> tuple[Tensor, Tensor]:
    """The phrases of captions as the method embeds texts, (G, K, D), and which there are."""
    sets = _sets(captions)
    vectors = method.embed_texts(Batch(texts={"full": sets.tokens}))
    return vectors[sets.index.clamp_min(0)], sets.mask


def _fit(method: Method, captions: Batch, maps: Tensor) -> Tensor:
    """How well each phrase fits the region that its map names: the cosine with the averaged patches, (G, K)."""
    phrases, _ = _encoded(method, captions)
    regions = maps @ method.patch_features(captions)
    return functional.cosine_similarity(regions, phrases, dim=-1)


def _of_pairs(maps: Tensor, scores: Tensor, asked: Asked, temperature: float = 0.05) -> Tensor:
    """Maps of captions' phrases (G, K, N) as those of pairs; a whole caption is the weighted sum of its phrases."""
    mask = _sets(asked.captions).mask
    share = (scores / temperature).masked_fill(~mask, -1e4).softmax(dim=1) * mask
    whole = torch.einsum("gk,gkn->gn", share, maps)
    own = maps[asked.group, asked.place.clamp_min(0)]
    return torch.where((asked.place < 0)[:, None], whole[asked.group], own)


def _sets(captions: Batch) -> PhraseSets:
    assert captions.phrases is not None
    return captions.phrases


def centre_map(size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return the prior that people are in the middle: 1 at the centre, falling to 0 at the corners, shape (H, W)."""
    y = (np.arange(size[0]) + 0.5) / size[0] * 2 - 1
    x = (np.arange(size[1]) + 0.5) / size[1] * 2 - 1
    return np.asarray(1 - np.hypot(y[:, None], x[None, :]) / np.sqrt(2), np.float32)


def centre(method: Method, asked: Asked, seed: int) -> Tensor:
    """That people are in the middle; see `centre_map`."""
    return torch.from_numpy(centre_map(method.backbone.grid).ravel()).expand(len(asked.group), -1)


def random(method: Method, asked: Asked, seed: int) -> Tensor:
    """A random order of the patches, the same for the same pair and seed."""
    count = method.backbone.grid[0] * method.backbone.grid[1]
    rows = [np.random.default_rng([seed, *name.encode()]).random(count, np.float32) for name in asked.names]
    return torch.from_numpy(np.stack(rows))


EXPLAINERS: dict[str, Explain] = {
    "ppim": ppim,
    "patch": patch,
    "cls": cls,
    "rollout": rollout,
    "chefer": chefer,
    "gradcam": gradcam,
    "slots": slots,
    "centre": centre,
    "random": random,
}


def _read_out(method: Method, rows: Tensor) -> Tensor:
    """What the rows of the image vector say of the patches, shape (B, N).

    Args:
        method: says from which rows its image vector is read (`reads_out`).
        rows: how much each token takes from each, shape (B, T, T), class tokens first.
    """
    patches = method.backbone.grid[0] * method.backbone.grid[1]
    first, average = method.reads_out
    found = first * rows[:, 0, -patches:]
    if average:
        found = found + average * rows[:, -patches:, -patches:].mean(dim=1)
    return found.clamp_min(0)


def relevance(method: Method, asked: Asked, name: str, *, seed: int = 0, aggregate: Aggregate = "own") -> Tensor:
    """Return relevance in [0, 1], each map divided by its maximum, shape (P, h, w); a map of zeros stays one.

    Args:
        method: in evaluation mode.
        asked: what to explain.
        name: the explainer.
        seed: of what it draws at random.
        aggregate: how whole captions are explained: `own`, as the explainer does it (by the caption's text, `ppim` and
            `slots` by the weighted sum of the phrases), or for every explainer alike from the maps of the phrases:
            `weighted` by softmax(cos(phrase, image) / 0.05), `max`, or `mean`.

    Raises:
        UsageError: unknown explainer, or one that the method does not have.
    """
    check_explainer(name, method)
    assert not method.training, "explanations are of a model in evaluation mode"
    found = explainer(name)(method, asked, seed).float()
    found = _scaled(found)
    if aggregate != "own":
        found = _scaled(_aggregated(method, asked, found, aggregate))
    return found.reshape(len(found), *method.backbone.grid)


def _scaled(maps: Tensor) -> Tensor:
    maps = maps.clamp_min(0)
    return maps / maps.amax(dim=1, keepdim=True).clamp_min(1e-12)


def _aggregated(method: Method, asked: Asked, maps: Tensor, how: Aggregate) -> Tensor:
    """The maps (P, N), those of whole captions made from those of their phrases; captions without phrases stay."""
    maps, part = maps.clone(), asked.place >= 0
    if how == "weighted":
        with torch.no_grad():
            fit = (method.embed_images(asked.pairs) * method.embed_texts(asked.pairs)).sum(dim=1) / 0.05
    for row in (~part).nonzero().flatten().tolist():
        mine = part & (asked.group == asked.group[row])
        if not mine.any():
            continue
        members = maps[mine]
        if how == "max":
            maps[row] = members.amax(dim=0)
        else:
            share = fit[mine].softmax(dim=0) if how == "weighted" else torch.full_like(members[:, 0], 1 / len(members))
            maps[row] = share.to(members) @ members
    return maps
