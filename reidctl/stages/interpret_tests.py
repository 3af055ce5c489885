"""The tests of maps that `interpret` runs: each takes what was explained and returns rows of `interpretability`."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from reidctl import tables
from reidctl.backbones.base import dropping
from reidctl.batch import Batch
from reidctl.console import progress
from reidctl.data import Corpus, known_cameras
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import DataError, UsageError
from reidctl.explain import alignment, binding, concentration, counterfactual, curves, sanity
from reidctl.explain.controls import Plan, pick_donors
from reidctl.explain.fills import PLUGIN, plugin_digest
from reidctl.explain.grounding import PartNames, pooled_cells, score_explanations, true_mask
from reidctl.explain.maps import Phrase, explain_phrases, named_rows
from reidctl.explain.masking import Judge, Pairs, Study
from reidctl.methods.base import Method
from reidctl.phrases.base import PARTS
from reidctl.phrases.base import Phrase as PartPhrase
from reidctl.phrases.rules import swap_attributes
from reidctl.pixels import PixelStore

Ints = npt.NDArray[np.int64]
Maps = npt.NDArray[np.float32]

GROUNDING: Mapping[str, Sequence[str]] = {name: ("random", "centre", "pooled") for name in ("pointing", "mass", "iou")}
_SANITY = 200
"""Phrases whose maps are drawn again by a model without information, and for exchanged phrases."""
_STEPS = 11
_CROPS = 10
PARAMETERS: Mapping[str, object] = {
    "curve_steps": _STEPS,
    "curve_temperature": curves.TEMPERATURE,
    "alignment_window": list(alignment.WINDOW),
    "alignment_draws": _CROPS,
    "sanity_phrases": _SANITY,
    "pointing_tolerance": 0,
    "top_mass_share": 0.1,
    "caption_map_temperature": 0.05,
    "bootstrap_resamples": 1000,
}
"""What decides numbers and is no flag; kept in the stage's record."""


class NotApplicable(Exception):
    """A test says nothing here; its text says why."""


@dataclass(frozen=True)
class Model:
    """A model that judges: its name in tables, and the digest of its weights."""

    name: str
    method: Method
    digest: str


@dataclass(frozen=True)
class Independent:
    """An encoder that had no part in the maps: its name, and the digest of its weights if it is a run's."""

    name: str
    encoder: alignment.Encoder
    digest: str = ""


@dataclass(frozen=True)
class Material:
    """What was explained, and with what it is tested.

    Attributes:
        model: the explained model; its name is empty.
        corpus: images and captions of the split.
        phrases: the explained phrases, caption by caption; whole captions stand in front of theirs.
        maps: their rows of `explanations` by explainer, in the order of `phrases`.
        parts: rows of the `parts` table, empty without true or given masks.
        names: the part that each phrase names, where it is known.
        plan: fractions, fills, controls and draws.
        level: what is masked and asked for: whole captions, or single phrases.
        judges: other models that see the masked pictures.
        encoder: what judges in `alignment`; None: there is none.
        device: where to compute.
        batch: images per forward pass.
        seed: of every draw.
        folder: where parts of long measurements are kept.
    """

    model: Model
    corpus: Corpus
    phrases: Sequence[Phrase]
    maps: Mapping[str, pd.DataFrame]
    parts: pd.DataFrame
    names: PartNames
    plan: Plan
    level: str
    judges: Sequence[Model]
    encoder: Independent | None
    device: torch.device
    batch: int
    seed: int
    folder: Path
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Tables that tests leave beside their rows, by name."""

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each image."""
        return {str(name): row for row, name in enumerate(self.corpus.images["image_id"])}

    @cached_property
    def people(self) -> npt.NDArray[np.object_]:
        """The person of each image."""
        return self.corpus.images["person_id"].astype(str).to_numpy(object)

    @cached_property
    def person_of(self) -> dict[str, str]:
        """The person of each image by its name."""
        return {name: str(self.people[row]) for name, row in self.row_of.items()}

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        return self.model.method.backbone.grid

    def rows(self, *, whole: bool) -> Ints:
        """Which of `phrases` are whole captions, or are not."""
        return np.asarray([row for row, phrase in enumerate(self.phrases) if is_whole(phrase) == whole], np.int64)

    def relevance(self, explainer: str, rows: Ints) -> Maps:
        """Maps of some phrases, (M, N)."""
        return np.asarray(tables.matrix(self.maps[explainer]["relevance"].iloc[rows]), np.float32)


def is_whole(phrase: Phrase) -> bool:
    """Whether it is a caption, not a phrase of one."""
    return phrase.whole


def grounding(material: Material) -> pd.DataFrame:
    """Pointing game, mass and IoU on true part masks, and the differences to the controls and other explainers."""
    if not len(material.parts):
        raise NotApplicable("there are no part masks; give parsing masks with --parts")
    scored = {
        name: score_explanations(
            frame.iloc[_phrase_rows(material)], material.parts, material.corpus.images, material.names
        )
        for name, frame in material.maps.items()
    }
    scored = {name: frame for name, frame in scored.items() if len(frame)}
    if not scored:
        raise NotApplicable("no explained phrase names a part that has a mask")
    material.frames["grounding"] = pd.concat(
        [frame.assign(explainer=name) for name, frame in scored.items()], ignore_index=True
    )
    others = [name for name in scored if name not in ("random", "centre")]
    pieces = []
    for name, frame in scored.items():
        beside = {
            f"{metric}.{other}": scored[other][metric].to_numpy()
            for metric in GROUNDING
            for other in others
            if other != name
        }
        shown = {metric: [*kinds, *(other for other in others if other != name)] for metric, kinds in GROUNDING.items()}
        rows = frame.assign(explainer=name, **beside)
        pieces.append(concentration.summarise_scores(rows, material.person_of, shown, seed=material.seed))
    return pd.concat(pieces, ignore_index=True)


def concentrated(material: Material) -> pd.DataFrame:
    """Entropy, mass in the highest tenth and spatial spread of phrase maps."""
    rows = _phrase_rows(material)
    scores = pd.concat([concentration.score_concentration(frame.iloc[rows]) for frame in material.maps.values()])
    return concentration.summarise_scores(scores, material.person_of, concentration.METRICS, seed=material.seed)


def _phrase_rows(material: Material) -> Ints:
    """The phrases; where only whole captions were explained, these."""
    rows = material.rows(whole=False)
    return rows if len(rows) else np.arange(len(material.phrases))


def masking(material: Material) -> pd.DataFrame:
    """Counterfactual masking, judged by the model itself and by every other judge."""
    frames = []
    for model in (material.model, *material.judges):
        study = study_of(material, model)
        total = counterfactual.count_images(study)
        with progress(f"mask{_named(model)}", total, unit="images") as advance:
            frames.append(
                counterfactual.measure(study, folder=material.folder, key=_key(material, model), advance=advance)
            )
    material.frames["faithfulness"] = pd.concat(frames, ignore_index=True)
    return counterfactual.summarise(material.frames["faithfulness"], seed=material.seed)


def _key(material: Material, model: Model) -> str:
    """What masked pictures depend on beside maps and plan: the weights, and the code of plug-in fills."""
    fills = [plugin_digest(name) for name in material.plan.fills if name.startswith(PLUGIN)]
    return " ".join([model.digest, *fills])


def _named(model: Model) -> str:
    return f" ({model.name})" if model.name else ""


def curve_areas(material: Material) -> pd.DataFrame:
    """Deletion and insertion areas, on the model itself."""
    study = study_of(material, material.model)
    fill = next((name for name in material.plan.fills if name in curves.SUBSTRATES), "mean")
    with progress("delete and insert", curves.count_curve_images(study), unit="images") as advance:
        frame = curves.measure_curves(
            study, steps=_STEPS, fill=fill, folder=material.folder, key=_key(material, material.model), advance=advance
        )
    return curves.summarise_curves(frame, seed=material.seed)


def specificity(material: Material) -> pd.DataFrame:
    """How much more a phrase loses by its own region than the other phrases of its caption."""
    judge = judge_of(material, material.model)
    captions = phrase_maps(material)
    if not captions:
        raise NotApplicable("no explained caption has two phrases")
    vectors = _phrase_vectors(material)

    def score(images: Tensor, keep: Tensor | None, caption: counterfactual.PhraseMaps) -> Tensor:
        rows = np.full(len(images), caption.row)
        seen = judge.embed(images, keep, rows)
        return seen @ vectors[caption.query_id, caption.image_id].to(seen)

    fills = tuple(name for name in material.plan.fills if name != "swap")
    if not fills:
        raise NotApplicable("the fill `swap` shows another person, who has phrases of their own")
    plan = replace(material.plan, fills=fills, controls=("random", "phrase"), scope="target")
    with progress("specificity", len(captions), unit="captions") as advance:
        frame = counterfactual.measure_specificity(score, judge, captions, plan, grid=material.grid, advance=advance)
    return counterfactual.summarise_specificity(frame, seed=material.seed)


def phrase_maps(material: Material) -> list[counterfactual.PhraseMaps]:
    """Return the captions with two phrases or more, and their maps by every explainer."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in material.rows(whole=False).tolist():
        phrase = material.phrases[row]
        groups.setdefault((phrase.query_id, phrase.image_id), []).append(row)
    return [
        counterfactual.PhraseMaps(
            query,
            image,
            material.person_of[image],
            material.row_of[image],
            {name: material.relevance(name, np.asarray(rows)) for name in material.maps},
        )
        for (query, image), rows in groups.items()
        if len(rows) > 1
    ]


def _phrase_vectors(material: Material) -> dict[tuple[str, str], Tensor]:
    """The phrases of each caption as vectors of the model, (D, K)."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in material.rows(whole=False).tolist():
        phrase = material.phrases[row]
        found.setdefault((phrase.query_id, phrase.image_id), []).append(phrase.text)
    texts = [text for members in found.values() for text in members]
    vectors = iter(torch.from_numpy(embed_queries(material.model.method, texts, device=material.device)))
    return {key: torch.stack([next(vectors) for _ in members]).T for key, members in found.items()}


def aligned(material: Material) -> pd.DataFrame:
    """Whether an encoder that had no part in the maps finds the phrase in the region that they name."""
    if material.encoder is None:
        raise NotApplicable("no independent encoder was named (--encoder RUN or --encoder SPEC)")
    rows = _phrase_rows(material)
    frame = pd.concat([maps.iloc[rows] for maps in material.maps.values()], ignore_index=True)
    with progress("align", len(frame), unit="maps") as advance:
        scores = alignment.score_alignment(
            material.encoder.encoder,
            material.corpus,
            frame,
            draws=_CROPS,
            seed=material.seed,
            device=material.device,
            advance=advance,
        )
    return concentration.summarise_scores(
        scores, material.person_of, alignment.METRICS, judge=material.encoder.name, seed=material.seed
    )


def sane(material: Material) -> pd.DataFrame:
    """Rank correlation of maps with those of a model without information, and with those of exchanged phrases."""
    rows = _phrase_rows(material)[:_SANITY]
    phrases = [replace(material.phrases[row], sentence="") for row in rows.tolist()]
    blank = sanity.randomised(material.model.method, material.seed).eval()
    pieces = []
    compared = [(sanity.WEIGHTS, blank, phrases)]
    # One phrase on many images cannot be exchanged for another; its maps still can be compared by weights.
    with suppress(DataError):
        compared.append((sanity.PHRASES, material.model.method, sanity.shuffled_phrases(phrases, seed=material.seed)))
    for name in material.maps:
        plain = _again(material, material.model.method, phrases, name)
        for metric, method, asked in compared:
            scores = sanity.compare_maps(plain, _again(material, method, asked, name), metric)
            pieces.append(concentration.summarise_scores(scores, material.person_of, {metric: ()}, seed=material.seed))
    return pd.concat(pieces, ignore_index=True)


def _again(material: Material, method: Method, phrases: Sequence[Phrase], explainer: str) -> pd.DataFrame:
    with progress(f"explain again ({explainer})", len(phrases), unit="phrases") as advance:
        return explain_phrases(
            method,
            material.corpus,
            phrases,
            explainer=explainer,
            device=material.device,
            seed=material.seed,
            similarity=np.full(len(phrases), np.nan, np.float32),  # nobody reads it here
            advance=advance,
        )


def stable(material: Material) -> pd.DataFrame:
    """Rank correlation of maps with those of other trained models, the judges, for the same phrases and images."""
    if not material.judges:
        raise NotApplicable("no other model was named (--judge RUN)")
    rows = _phrase_rows(material)
    phrases = [material.phrases[row] for row in rows.tolist()]
    pieces = []
    for judge in material.judges:
        for name, maps in material.maps.items():
            try:
                other = _again(material, judge.method, phrases, name)
            except UsageError:
                continue  # the other model lacks this explainer
            scores = sanity.stability(maps.iloc[rows], other)
            pieces.append(
                concentration.summarise_scores(
                    scores, material.person_of, {sanity.STABILITY: ()}, judge=judge.name, seed=material.seed
                )
            )
    if not pieces:
        raise NotApplicable(f"no other model has the explainer {' or '.join(material.maps)}")
    return pd.concat(pieces, ignore_index=True)


def bound(material: Material) -> pd.DataFrame:
    """How often a caption beats itself with the colours of two garments exchanged, and captions of others."""
    wholes = _described(material)
    if not wholes:
        raise NotApplicable("no caption of the split was explained on an image of its person")
    members: dict[tuple[str, str], list[PartPhrase]] = {}
    for row in material.rows(whole=False).tolist():
        phrase = material.phrases[row]
        members.setdefault((phrase.query_id, phrase.image_id), []).append(_part_phrase(material, phrase))
    swapped = [swap_attributes(one.text, members.get((one.query_id, one.image_id), [])) for one in wholes]
    if not any(swapped):
        raise NotApplicable("no caption names two garments of different colours")
    frame = pd.DataFrame(
        {
            "caption_id": [one.query_id for one in wholes],
            "image_id": [one.image_id for one in wholes],
            "person_id": [material.person_of[one.image_id] for one in wholes],
            "text": [one.text for one in wholes],
        }
    )
    method, device = material.model.method, material.device
    rows = np.asarray([material.row_of[one.image_id] for one in wholes])
    images = gallery_of(material, material.model)[rows]
    scores = binding.score_binding(
        frame, swapped, images, lambda texts: embed_queries(method, list(texts), device=device)
    )
    return binding.summarise_binding(scores, seed=material.seed)


def _described(material: Material) -> list[Phrase]:
    """The explained captions that are true of their image, each once."""
    rows = _asked_for(replace(material, level="caption"))
    first = {material.phrases[row].query_id: material.phrases[row] for row in reversed(rows.tolist())}
    return [first[name] for name in reversed(first)]


def _part_phrase(material: Material, phrase: Phrase) -> PartPhrase:
    """A phrase with the part that it names, from the dataset's own names where there are any."""
    from reidctl.phrases.rules import part_of

    part = phrase.part if phrase.part in PARTS and phrase.part != "whole" else part_of(phrase.text)
    return PartPhrase(phrase.text, phrase.char_start, phrase.char_end, part)


TESTS: dict[str, Callable[[Material], pd.DataFrame]] = {
    "grounding": grounding,
    "concentration": concentrated,
    "masking": masking,
    "curves": curve_areas,
    "specificity": specificity,
    "alignment": aligned,
    "sanity": sane,
    "stability": stable,
    "binding": bound,
}
QUICK = ("grounding", "concentration")
"""Tests that encode no picture again."""


def run_tests(material: Material, names: Sequence[str], *, strict: bool) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of the tests that apply, and notes on those that do not.

    Raises:
        DataError: one does not apply, if `strict`.
    """
    rows, notes = [], []
    for name in names:
        try:
            rows.append(TESTS[name](material))
        except NotApplicable as error:
            if strict:
                raise DataError(f"`--what {name}` does not apply: {error}.") from None
            notes.append(f"{name}: not done: {error}.")
    whole = pd.concat(rows, ignore_index=True) if rows else tables.empty("interpretability")
    return whole[list(tables.empty("interpretability").columns)], notes


# What is masked


def study_of(material: Material, model: Model) -> Study:
    """Return who judges which maps of which pairs.

    Raises:
        NotApplicable: nothing that was explained is a caption of the split, or there is one person.
    """
    rows = _asked_for(material)
    if not len(rows):
        raise NotApplicable("no caption of the split was explained on its person, so no ranking could suffer")
    if len(set(material.people)) < 2:
        raise NotApplicable("the split shows one person, so there is nobody to confuse them with")
    phrases = [material.phrases[row] for row in rows.tolist()]
    target = np.asarray([material.row_of[phrase.image_id] for phrase in phrases], np.int64)
    method = model.method
    pairs = Pairs(
        [f"{p.query_id}:{p.char_start}-{p.char_end}" if material.level == "phrase" else p.query_id for p in phrases],
        [phrase.image_id for phrase in phrases],
        [material.person_of[phrase.image_id] for phrase in phrases],
        embed_queries(method, [phrase.text for phrase in phrases], device=material.device),
        target,
        _right(material, target),
        gallery_of(material, model),
        pick_donors(list(material.people), target, seed=material.seed) if "swap" in material.plan.fills else None,
    )
    maps = {name: material.relevance(name, rows) for name in material.maps}
    return Study(judge_of(material, model), pairs, maps, material.grid, material.plan, _others(material, rows, maps))


def _asked_for(material: Material) -> Ints:
    """The explained captions, or phrases, whose image shows the person whom their caption describes."""
    captions = material.corpus.captions
    owner = dict(zip(captions["caption_id"], material.people[captions["row"].to_numpy(np.int64)], strict=True))
    rows = material.rows(whole=material.level == "caption").tolist()
    phrases = [material.phrases[row] for row in rows]
    right = [owner.get(phrase.query_id) == material.person_of[phrase.image_id] for phrase in phrases]
    return np.asarray([row for row, fits in zip(rows, right, strict=True) if fits], np.int64)


def _right(material: Material, target: Ints) -> list[Ints]:
    rows_of: dict[object, list[int]] = {}
    for row, person in enumerate(material.people):
        rows_of.setdefault(person, []).append(row)
    return [np.asarray(rows_of[material.people[row]], np.int64) for row in target.tolist()]


def gallery_of(material: Material, model: Model) -> npt.NDArray[np.float32]:
    """Return the vectors of all images of the split, made once per model."""
    kept = material.frames.get(f"gallery {model.digest}")
    if kept is None:
        with progress(f"embed the gallery{_named(model)}", len(material.corpus.images), unit="images") as advance:
            vectors = embed_gallery(model.method, material.corpus, device=material.device, advance=advance)
        kept = material.frames[f"gallery {model.digest}"] = pd.DataFrame(vectors)
    return np.ascontiguousarray(kept.to_numpy(np.float32))


def judge_of(material: Material, model: Model) -> Judge:
    """Return a model as one that sees masked pictures; what it reads beside pixels it reads as in its index."""
    method, backbone, corpus = model.method, model.method.backbone, material.corpus
    cameras = known_cameras(corpus.images, method.cameras)
    texts = {kind: [str(text or "") for text in getattr(corpus, kind)] for kind in method.gallery_texts}

    def embed(images: Tensor, keep: Tensor | None, rows: Ints) -> Tensor:
        tokens = {kind: backbone.tokenize([lines[row] for row in rows.tolist()]) for kind, lines in texts.items()}
        camera = None if cameras is None else cameras[torch.from_numpy(rows)]
        given = Batch(image=images, texts=tokens, camera=camera).to(material.device)
        if keep is None:
            return method.embed_images(given)
        with dropping(backbone.image, keep.to(material.device)):
            return method.embed_images(given)

    store = PixelStore(corpus.paths(), backbone.image_size, cache_bytes=0, interpolation=backbone.interpolation)
    return Judge(embed, store, backbone.mean, backbone.std, backbone.grid, model.name, material.device, material.batch)


def _others(material: Material, rows: Ints, maps: Mapping[str, Maps]) -> dict[tuple[str, str], Maps]:
    """Maps of other phrases of the same caption, of other queries, and the true masks."""
    others: dict[tuple[str, str], Maps] = {}
    mates, strangers = _mates(material, rows), _strangers(material, rows)
    for name, own in maps.items():
        if "phrase" in material.plan.controls:
            others[name, "phrase"] = _taken(material.relevance(name, np.maximum(mates, 0)), mates)
        if "query" in material.plan.controls:
            others[name, "query"] = _taken(own[np.maximum(strangers, 0)], strangers)
    if "pooled" in material.plan.controls:
        others["", "pooled"] = np.stack([_truth(material, row) for row in rows.tolist()])
    return others


def _taken(maps: Maps, rows: Ints) -> Maps:
    """Maps, NaN where there is none."""
    return np.where((rows >= 0)[:, None], maps, np.float32(math.nan))


def _mates(material: Material, rows: Ints) -> Ints:
    """For each of `rows` another phrase of its caption, drawn at random; -1 if it has none."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in material.rows(whole=False).tolist():
        phrase = material.phrases[row]
        groups.setdefault((phrase.query_id, phrase.image_id), []).append(row)
    found = []
    for row in rows.tolist():
        phrase = material.phrases[row]
        some = [other for other in groups.get((phrase.query_id, phrase.image_id), []) if other != row]
        rng = np.random.default_rng((material.seed, 61, row))
        found.append(int(rng.choice(some)) if some else -1)
    return np.asarray(found, np.int64)


def _strangers(material: Material, rows: Ints) -> Ints:
    """For each of `rows` the place among them of one of another person, drawn at random; -1 if there is none."""
    person = np.asarray([material.person_of[material.phrases[row].image_id] for row in rows.tolist()], object)
    found = []
    for place in range(len(rows)):
        some = np.flatnonzero(person != person[place])
        rng = np.random.default_rng((material.seed, 62, int(rows[place])))
        found.append(int(rng.choice(some)) if len(some) else -1)
    return np.asarray(found, np.int64)


def _truth(material: Material, row: int) -> Maps:
    """The true masks of a phrase, or of all phrases of a caption, as the model's patches see them; NaN without any."""
    phrase = material.phrases[row]
    members = [phrase]
    if is_whole(phrase):
        same = (phrase.query_id, phrase.image_id)
        members = [p for p in material.phrases if (p.query_id, p.image_id) == same and not is_whole(p)]
    masks = [true_mask(member, material.parts, material.corpus.images, material.names) for member in members]
    known = [mask for mask in masks if mask is not None]
    if not known:
        return np.full(material.grid[0] * material.grid[1], math.nan, np.float32)
    return pooled_cells(np.asarray(np.any(known, axis=0)), material.grid).ravel()


def labelled(rows: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Return the rows of `interpretability` with their names: `EXPLAINER.METRIC[@REMOVED][.FILL][.JUDGE][-CONTROL]`.

    The fill is left out where all rows have the same, the judge of `alignment` always: there is one. A control's own
    value is `...:CONTROL`.
    """
    fills = sorted(set(rows["fill"]) - {""})
    found = []
    for row in named_rows(rows):
        name = ".".join(part for part in (row.explainer, row.metric) if part)
        name += "" if row.removed is None or row.removed != row.removed else f"@{row.removed:g}"
        name += f".{row.fill}" if row.fill and len(fills) > 1 else ""
        name += f".{row.judge}" if row.judge and row.metric != "alignment" else ""
        name += {"difference": f"-{row.control}", "control": f":{row.control}"}.get(row.kind, "")
        found.append((name, row))
    return found
