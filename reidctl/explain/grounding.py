"""Whether relevance lies on the part that a phrase names, measured against true part masks, beside controls.

A map is compared as an order of pixels or as a distribution over them, never by a threshold on its mass: a more
concentrated map would then be judged on a smaller area. Ties are counted as expectations over their order, so a map
without any preference scores exactly what chance scores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.explain.explainers import centre_map
from reidctl.explain.maps import Heat, Phrase, grid_map, named_rows, upsample
from reidctl.explain.parsing import part_of_phrase
from reidctl.masks import decode_mask
from reidctl.metrics import Interval, bootstrap_interval

Mask = npt.NDArray[np.bool_]

_ARTICLES = frozenset(("a", "an", "the", "his", "her", "their", "its", "some", "with", "and", "in", "of"))


def pointing_game(heat: Heat, mask: Mask, *, tolerance: int = 0) -> float:
    """Return the probability that the highest pixel of the map lies in the mask (Zhang et al. 2018).

    With several highest pixels each is taken with equal probability; a constant map scores the mask's area share.

    Args:
        heat: map at picture resolution, shape (H, W).
        mask: the true region, shape (H, W).
        tolerance: pixels (Euclidean) by which the point may miss; the original game uses 15 on photographs.
    """
    top = heat == heat.max()
    return float(_grow(mask, tolerance)[top].mean())


def mass_inside(heat: Heat, mask: Mask) -> float:
    """Return the share of the map's mass on the mask, in [0, 1]; a map of zeros counts as a constant one."""
    total = float(heat.sum(dtype=np.float64))
    return float(heat[mask].sum(dtype=np.float64)) / total if total > 0 else float(mask.mean())


def mask_iou(heat: Heat, mask: Mask) -> float:
    """Return the intersection over union of the mask with the map's highest pixels, as many as the mask has.

    Pixels that tie at the border of the region enter with their expected intersection E: IoU = E / (2 A - E), A the
    mask's area in pixels. A constant map scores s / (2 - s) for an area share s.
    """
    area = int(mask.sum())
    border = np.partition(heat.ravel(), heat.size - area)[heat.size - area]
    above, tied = heat > border, heat == border
    room = area - int(above.sum())
    inside = float(mask[above].sum()) + room * float(mask[tied].mean())
    return inside / (2 * area - inside)


SCORES: Mapping[str, Callable[[Heat, Mask], float]] = {"pointing": pointing_game, "mass": mass_inside, "iou": mask_iou}


def pooled_map(mask: Mask, grid: tuple[int, int]) -> Heat:
    """Return a mask as a grid of patches would draw it: the share of each patch inside, upsampled to (H, W)."""
    return upsample(pooled_cells(mask, grid), (mask.shape[0], mask.shape[1]))


def pooled_cells(mask: Mask, grid: tuple[int, int]) -> Heat:
    """Return the share of each patch of a grid (h, w) that a mask (H, W) covers, shape (h, w)."""
    height, width = mask.shape
    cells = np.zeros(grid, np.float32)
    rows = np.linspace(0, height, grid[0] + 1).round().astype(int)
    columns = np.linspace(0, width, grid[1] + 1).round().astype(int)
    for i in range(grid[0]):
        for j in range(grid[1]):
            cell = mask[rows[i] : max(rows[i + 1], rows[i] + 1), columns[j] : max(columns[j + 1], columns[j] + 1)]
            cells[i, j] = cell.mean() if cell.size else 0.0
    return cells


PartNames = Mapping[tuple[str, int, int], str]
"""The part that a phrase names, by (caption, char_start, char_end)."""


def part_names(captions: pd.DataFrame) -> PartNames:
    """Return which part each phrase of a `captions` table may name: the end of its id (`...-p0-upper` names `upper`).

    synthped writes its ids so; an ending that is no part of the image is ignored where the names are used.
    """
    phrases = captions[(captions["kind"] == "phrase") & captions["char_start"].notna() & captions["char_end"].notna()]
    return {
        (str(row.parent_id), int(row.char_start), int(row.char_end)): str(row.caption_id).rsplit("-", 1)[-1]
        for row in named_rows(phrases)
    }


def find_mask(phrase: str, parts: Sequence[Any], size: tuple[int, int], *, name: str | None = None) -> Mask | None:
    """Return the true region of a phrase in an image, or None if no part answers to it.

    The part called `name` wins if the image shows it. Else a part whose own phrase is the phrase (articles and case
    aside); else parts whose name means what the phrase says ("sneakers" finds "left shoe" and "right shoe", see
    `parsing.part_of_phrase`); else parts whose name, or the last word of whose phrase, is a word of the phrase ("the
    man's red backpack" finds "red backpack"). Several parts are united.

    Args:
        phrase: the text.
        parts: the image's rows of the `parts` table, with columns as attributes.
        size: (height, width) of the image.
        name: the part, where it is known.
    """
    words = _words(phrase)
    known = [part for part in parts if part.part == name]
    exact = [part for part in parts if part.phrase and _words(str(part.phrase)) == words]
    meant = set(part_of_phrase(phrase, [str(part.part) for part in parts]))
    named = [part for part in parts if str(part.part) in meant]
    chosen = known or exact or named or [part for part in parts if _names(part) & set(words)]
    masks = [decode_mask(part.mask, *size) for part in chosen]
    if not masks or not any(mask.any() for mask in masks):
        return None
    return np.asarray(np.any(masks, axis=0))


def true_mask(phrase: Phrase, parts: pd.DataFrame, images: pd.DataFrame, names: PartNames) -> Mask | None:
    """Return the true region of an explained phrase in its image, or None; see `find_mask`."""
    image = named_rows(images[images["image_id"] == phrase.image_id])[0]
    name = names.get((phrase.query_id, phrase.char_start, phrase.char_end))
    of_image = named_rows(parts[parts["image_id"] == phrase.image_id])
    return find_mask(phrase.text, of_image, (int(image.height), int(image.width)), name=name)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9']+", text.lower()) if word not in _ARTICLES]


def _names(part: Any) -> set[str]:
    return {*_words(str(part.part).replace("_", " ")), *(_words(str(part.phrase))[-1:] if part.phrase else [])}


def score_explanations(
    explanations: pd.DataFrame, parts: pd.DataFrame, images: pd.DataFrame, names: PartNames | None = None
) -> pd.DataFrame:
    """Return one row per explained phrase that has a true mask: every score of the map and of its controls.

    Columns: query_id, image_id, person_id, phrase, area (share of the picture), and for each of `SCORES`
    `<score>`, `<score>.random` (expectation for a uniformly random order of pixels), `<score>.centre` (the prior
    that people are in the middle, over the model's own patches) and `<score>.pooled` (the true mask averaged over
    these patches: roughly what its resolution allows).

    Args:
        explanations: rows of the `explanations` table.
        parts: rows of the `parts` table.
        images: rows of the `images` table; `width` and `height` are those of the masks.
        names: the part of each phrase, where it is known; see `part_names`.
    """
    facts = {row.image_id: row for row in named_rows(images)}
    of_image: dict[str, list[Any]] = {}
    wanted = parts[parts["image_id"].isin(set(explanations["image_id"]))]
    for part in named_rows(wanted):
        of_image.setdefault(str(part.image_id), []).append(part)
    rows = []
    for row in named_rows(explanations):
        image = facts[row.image_id]
        size = (int(image.height), int(image.width))
        name = (names or {}).get((str(row.query_id), int(row.char_start), int(row.char_end)))
        mask = find_mask(str(row.phrase), of_image.get(str(row.image_id), []), size, name=name)
        if mask is None:
            continue
        described = {"query_id": row.query_id, "image_id": row.image_id, "person_id": image.person_id}
        rows.append({**described, "phrase": row.phrase, "area": float(mask.mean()), **_scores(grid_map(row), mask)})
    return pd.DataFrame(rows)


def _scores(grid: Heat, mask: Mask) -> dict[str, float]:
    size = (mask.shape[0], mask.shape[1])
    maps = {
        "": upsample(grid, size),
        ".random": np.ones(size, np.float32),
        ".centre": upsample(centre_map((grid.shape[0], grid.shape[1])), size),
        ".pooled": pooled_map(mask, (grid.shape[0], grid.shape[1])),
    }
    return {f"{name}{kind}": score(heat, mask) for name, score in SCORES.items() for kind, heat in maps.items()}


def summarise_grounding(scores: pd.DataFrame, *, seed: int = 0) -> dict[str, Interval]:
    """Return each score, its controls and the paired differences to them, with 95 % intervals over people.

    Names are `pointing`, `pointing.random`, `pointing.centre`, `pointing.pooled`, `pointing-random` and
    `pointing-centre`; likewise for `mass` and `iou`. A claim to beat a control holds when the interval of the
    difference excludes 0. Empty if `scores` is.
    """
    found: dict[str, Interval] = {}
    if scores.empty:
        return found
    people = scores["person_id"].to_numpy(object)
    for name in SCORES:
        for kind in ("", ".random", ".centre", ".pooled"):
            found[name + kind] = bootstrap_interval(scores[name + kind].to_numpy(float), people, seed=seed)
        for control in ("random", "centre"):
            difference = (scores[name] - scores[f"{name}.{control}"]).to_numpy(float)
            found[f"{name}-{control}"] = bootstrap_interval(difference, people, seed=seed)
    return found


def _grow(mask: Mask, tolerance: int) -> Mask:
    """The mask and every pixel within `tolerance` of it."""
    if tolerance <= 0:
        return mask
    height, width = mask.shape
    grown = np.zeros_like(mask)
    for dy in range(-tolerance, tolerance + 1):
        reach = int(np.sqrt(tolerance**2 - dy**2))
        for dx in range(-reach, reach + 1):
            source = mask[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            grown[max(dy, 0) : height - max(-dy, 0), max(dx, 0) : width - max(-dx, 0)] |= source
    return grown
