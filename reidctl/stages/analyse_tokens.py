"""The analyses of `analyse` of where a model looks: Grad-CAM and activation, and attention of `hpl`'s class tokens."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.console import progress
from reidctl.evaluation import attention as looking
from reidctl.evaluation import pseudo as inverted
from reidctl.explain.maps import named_rows, pair_batch
from reidctl.explain.pictures import COLOURS, overlay
from reidctl.methods.base import Method
from reidctl.methods.hpl import Hpl
from reidctl.metrics import bootstrap_interval
from reidctl.pixels import PixelStore, read_pixels
from reidctl.report.tokens import Explained, map_sheet
from reidctl.stages.analyse_parts import Found, Labels, Material, NotApplicable
from reidctl.stages.features import whole_families

Floats = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Maps = dict[str, Floats]

READ_PARTS = ("attention", "cam")
"""The analyses that read the table `parts`, where there is one."""
CAM_IMAGES = 200
DRAWN = 8
FLAT = 0.05
"""A variation of the activation below which its map says nothing of places."""
EQUAL = 1e-4
"""A relative difference of activations that is only rounding."""
BATCH = 64


def hpl_of(material: Material) -> Hpl:
    """Return the model, if it is an `hpl`.

    Raises:
        NotApplicable: it is another.
    """
    method = material.subject.method
    if not isinstance(method, Hpl):
        raise NotApplicable(f"the method `{method.name}` has neither two class tokens nor pseudo-words")
    return method


def batches(material: Material, rows: Sequence[int] | Ints, texts: Sequence[str] | None, name: str) -> Iterator[Batch]:
    """Yield batches of images `rows` of the corpus, with texts where given, on the subject's device."""
    method = material.subject.method
    backbone = method.backbone
    store = PixelStore(
        material.corpus.paths(), backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation
    )
    with progress(name, len(rows)) as advance:
        for start in range(0, len(rows), BATCH):
            part = [int(row) for row in rows[start : start + BATCH]]
            given = None if texts is None else texts[start : start + BATCH]
            yield pair_batch(method, material.corpus, part, given, store).to(material.subject.device)
            advance(len(part))


def numbers(tensor: torch.Tensor) -> Vector:
    """Return a tensor as float32 numbers on the CPU."""
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)


# Where the class tokens look


def attention(material: Material, found: Found) -> None:
    """Measure how spread and how different the two tokens' last attention is, and how much lies on objects."""
    method, person = hpl_of(material), material.person
    maps, features = _attention(material, method)
    size, measure = (len(person), len(set(person))), partial(bootstrap_interval, person=person, seed=material.seed)
    for task, each in maps.items():
        found.add(
            "attention", task, "", "entropy", measure(looking.entropy(each)), size, chance=float(np.log(each.shape[1]))
        )
    if len(maps) == 2:
        found.add("attention", "both", "", "js", measure(looking.js_divergence(maps["t2i"], maps["i2i"])), size)
        found.add("attention", "both", "", "cosine", measure(looking.cosine(features[:, 0], features[:, 1])), size)
    else:
        found.notes.append("attention: one class token serves both tasks, so there is nothing that could diverge.")
    shares = _part_shares(material, np.arange(len(person)), looking.OBJECTS)
    if not shares:
        found.notes.append("attention: no image has a true mask of an object, so nothing is said of objects.")
    else:
        _add_masses(material, found, "attention", "objects", maps, shares)
        found.notes.append(
            "attention: the last block's, mean over heads. `objects` are bag, phone, umbrella and cap; its `control` "
            "is the object of another person's image, `chance` the object's share of the picture."
        )


def _attention(material: Material, method: Hpl) -> tuple[Maps, Vector]:
    """Each token's attention (N, patches) by task, and the class features (N, K, D)."""
    maps, features = [], []
    with torch.inference_mode():
        for batch in batches(material, range(len(material.images)), None, "attention"):
            seen = method.see(batch.require("image"), attention=True)
            assert seen.attention is not None
            maps.append(looking.over_patches(numbers(seen.attention[-1]), seen.cls.shape[1]))
            features.append(numbers(seen.cls))
    whole = np.concatenate(maps)
    return {task: whole[:, number] for number, task in enumerate(("t2i", "i2i")[: whole.shape[1]])}, np.concatenate(
        features
    )


def _part_shares(material: Material, rows: Ints, wanted: frozenset[str] | None = None) -> dict[int, Floats]:
    """The share of each patch (N,) on an image's parts (of these names), by the place in `rows`; visible ones only."""
    path = material.subject.source.parts
    if not path.is_file():
        return {}
    images = material.images.iloc[rows]
    place = {str(name): number for number, name in enumerate(images["image_id"])}
    parts = tables.read_table(path, "parts")
    parts = parts[parts["image_id"].isin(set(place))]
    of_image: dict[int, list[Any]] = defaultdict(list)
    for part in named_rows(parts if wanted is None else parts[parts["part"].isin(wanted)]):
        of_image[place[str(part.image_id)]].append(part)
    found = {}
    for number, members in sorted(of_image.items()):
        row = images.iloc[number]
        grid = material.subject.method.backbone.grid
        shares = looking.union_shares(members, (int(row["height"]), int(row["width"])), grid)
        if shares is not None:
            found[number] = shares.ravel()
    return found


def _add_masses(
    material: Material,
    found: Found,
    analysis: str,
    region: str,
    maps: Maps,
    shares: dict[int, Floats],
    rows: Ints | None = None,
) -> None:
    """Add the share of every map on regions, beside that on the region of another person's image, and t2i minus i2i."""
    at = np.array(list(shares))
    person = material.person[at if rows is None else rows[at]]
    inside = np.stack(list(shares.values()))
    size, measure = (len(at), len(set(person))), partial(bootstrap_interval, person=person, seed=material.seed)
    chance = float(inside.mean())
    on = {task: looking.mass(each[at], inside) for task, each in maps.items()}
    for task, each in maps.items():
        control = inverted.exchanged(
            lambda other, each=each: float(looking.mass(each[at], inside[other]).mean()),  # type: ignore[misc]
            person,
            seed=material.seed,
        )
        found.add(analysis, task, "", region, measure(on[task]), size, control=control.mean, chance=chance)
    if {"t2i", "i2i"} <= set(on):
        found.add(analysis, "both", "", f"{region}-difference", measure(on["t2i"] - on["i2i"]), size)


def cam(material: Material, found: Found) -> None:
    """Compare what the vectors of an image rest on with what is active in it, and draw some maps."""
    method, seed = material.subject.method, material.seed
    if method.gallery_texts:
        raise NotApplicable(f"this `{method.name}` embeds an image with a text, and its partner's is not handed over")
    rows, texts, partner = _cam_images(material)
    maps = _maps(material, method, rows, texts, partner)
    flat: Maps = {name: looking.as_distribution(each.reshape(len(rows), -1)) for name, each in maps.items()}
    person = material.person[rows]
    size = len(rows), len(set(person))
    if "t2i" in flat:
        likeness = bootstrap_interval(looking.correlation(flat["t2i"], flat["i2i"]), person, seed=seed)
        if likeness.value == likeness.value:
            found.add("cam", "both", "", "correlation", likeness, size)
    masked = False
    for region, wanted in (("person", None), ("objects", looking.OBJECTS)):
        shares = _part_shares(material, rows, wanted)
        if shares:
            masked = True
            _add_masses(material, found, "cam", region, flat, shares, rows)
    _add_variation(found, maps["activation"], person, seed)
    found.notes += _cam_notes(material, texts, masked)
    blank = {name: int((~each.reshape(len(each), -1).any(axis=1)).sum()) for name, each in maps.items()}
    for name, count in blank.items():
        if count:
            found.notes.append(
                f"cam: {count} of {len(rows)} images have no place that speaks for them in `{name}`: their map is grey."
            )
    shown = _drawn(material, rows)
    found.drawings.append(lambda folder: _draw_maps(material, rows, maps, shown, folder))


def _add_variation(found: Found, activation: Vector, person: Labels, seed: int) -> None:
    """Add how much the activation of an image's patches differs: its standard deviation over its mean."""
    each = activation.reshape(len(activation), -1).astype(np.float64)
    varied = bootstrap_interval(each.std(axis=1) / np.maximum(each.mean(axis=1), 1e-12), person, seed=seed)
    found.add("cam", "activation", "", "variation", varied, (len(each), len(set(person))))
    if varied.value < FLAT:
        found.notes.append(
            f"cam: the activations of an image's patches hardly differ (by {100 * varied.value:.2g} % of their mean), "
            "so `activation` lies on a mask as its share of the picture does."
        )


def _cam_notes(material: Material, texts: list[str] | None, masked: bool) -> list[str]:
    by_text = "t2i follows cos(v_t2i, own caption), " if texts else ""
    notes = [
        f"cam: {by_text}i2i follows cos(v_i2i, v_i2i of another image of the person), `activation` is the cosine "
        "of each patch with its image's own feature, negative ones cut; images of people with a single image are left "
        "out. Their `control` is the mask of another person's image, `chance` the mask's share of the picture."
    ]
    if not texts:
        notes.append("cam: no image has a caption, so there is no t2i map.")
    elif material.corpus.captions["row"].nunique() < len(material.images):
        notes.append("cam: images without a caption are left out.")
    if not masked:
        notes.append("cam: no image has a true mask, so the maps are drawn and not measured.")
    return notes


def _cam_images(material: Material) -> tuple[Ints, list[str] | None, Ints]:
    """Rows of images with another image of their person, their captions, the other images.

    Only images with a caption are taken, if there are any; else the texts are None.
    """
    captions = material.corpus.captions.drop_duplicates("row")
    text = {int(row): str(sentence) for row, sentence in zip(captions["row"], captions["text"], strict=True)}
    next_one: dict[int, int] = {}
    for _, members in material.images.reset_index(drop=True).groupby("person_id", observed=True).groups.items():
        own = [int(row) for row in members]
        next_one |= {row: own[(number + 1) % len(own)] for number, row in enumerate(own) if len(own) > 1}
    captioned = sorted(set(text) & set(next_one))
    usable = np.array(captioned or sorted(next_one), np.int64)
    if not len(usable):
        raise NotApplicable("nobody has two images")
    kept = usable[whole_families(material.images.iloc[usable].reset_index(drop=True), CAM_IMAGES, seed=material.seed)]
    texts = [text[int(row)] for row in kept] if captioned else None
    return kept, texts, np.array([next_one[int(row)] for row in kept], np.int64)


def _maps(material: Material, method: Method, rows: Ints, texts: list[str] | None, partner: Ints) -> dict[str, Vector]:
    """The Grad-CAM maps by task and the activation, each (N, h, w)."""
    pieces: dict[str, list[Vector]] = defaultdict(list)
    pairs = zip(batches(material, rows, texts, "cam"), batches(material, partner, None, "partners"), strict=True)
    for batch, other in pairs:
        for task, value in method.token_maps(batch, other.require("image")).items():
            pieces[task].append(numbers(value))
        with torch.inference_mode():
            pieces["activation"].append(numbers(method.activation(batch)))
    return {name: np.concatenate(members) for name, members in pieces.items()}


def _drawn(material: Material, rows: Ints) -> list[int]:
    """Places in `rows` of the images that are drawn: one per person, people with visible objects first."""
    objects = _part_shares(material, rows, looking.OBJECTS)
    order = sorted(range(len(rows)), key=lambda place: (-float(objects.get(place, np.zeros(1)).sum() > 0), place))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(str(material.person[rows[place]]), place)
    return list(first.values())[:DRAWN]


def _draw_maps(material: Material, rows: Ints, maps: dict[str, Vector], shown: list[int], folder: Path) -> list[Path]:
    items, frames, size = [], [], material.subject.method.backbone.image_size
    size = (max(size[0], 192), max(size[0], 192) * size[1] // size[0])
    for place in shown:
        row = material.images.iloc[rows[place]]
        picture = read_pixels(material.corpus.root / str(row["path"]), size)
        drawn = {name: _stretched(each[place]) if name == "activation" else each[place] for name, each in maps.items()}
        known = row["attributes"] if isinstance(row.get("attributes"), dict) else {}
        title = [str(row["person_id"]), *([known.get("carried") or "no object"] if known else [])]
        over = {name: overlay(picture, each) for name, each in drawn.items()}
        items.append(Explained("\n".join(title), {"picture": picture, **over}))
        frames.append(_map_rows(str(row["image_id"]), drawn))
    by_text = "t2i: Grad-CAM of the cosine with the own caption. " if "t2i" in maps else ""
    note = f"{by_text}i2i: Grad-CAM of the cosine with another image of the person. activation: cosine of each patch "
    note += "with its image's feature, from its least to its most in the image."
    return map_sheet(items, pd.concat(frames), folder / "cam", colours=COLOURS, note=note)


def _stretched(values: Vector) -> Vector:
    """From 0 for the least to 1 for the most, because cosines of patches may lie close together; 0 if all are equal."""
    low, high = float(values.min()), float(values.max())
    if high - low < EQUAL * high:
        return np.zeros_like(values)
    return np.asarray((values - low) / (high - low), np.float32)


def _map_rows(name: str, maps: dict[str, Vector]) -> pd.DataFrame:
    height, width = next(iter(maps.values())).shape
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    return pd.DataFrame({"image_id": name, "y": y, "x": x, **{task: each.ravel() for task, each in maps.items()}})
