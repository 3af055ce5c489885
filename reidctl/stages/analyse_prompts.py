"""The analyses of `analyse` for `hpl`: its class tokens' attention and Grad-CAM, its pseudo-words, its training."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.console import progress
from reidctl.evaluation import alarms as rules
from reidctl.evaluation import attention as looking
from reidctl.evaluation import probes as probing
from reidctl.evaluation import projection
from reidctl.evaluation import pseudo as inverted
from reidctl.explain.maps import named_rows, pair_batch
from reidctl.explain.pictures import COLOURS, overlay
from reidctl.layers.inversion import diversity, mismatch
from reidctl.layers.prompts import nearest_words
from reidctl.methods.base import Task, unit
from reidctl.methods.hpl import Hpl
from reidctl.metrics import bootstrap_interval
from reidctl.pixels import PixelStore, read_pixels
from reidctl.report.tokens import Explained, map_sheet, pair_map
from reidctl.stages.analyse_parts import Found, Labels, Material, NotApplicable
from reidctl.stages.features import families, whole_families

Floats = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Maps = dict[str, Floats]

READ_PARTS = ("attention", "cam")
"""The analyses that read the table `parts`, where there is one."""
CAM_IMAGES = 200
DRAWN = 8
PAIRS = 300
BATCH = 64
DRAWS = 5
"""How often captions of other people are drawn for a mean."""
_NEEDS = {"interference": "task_cosine", "collapse": "pseudo/diversity", "over_regularisation": "pseudo/mismatch"}


def _hpl(material: Material) -> Hpl:
    method = material.subject.method
    if not isinstance(method, Hpl):
        raise NotApplicable(f"the method `{method.name}` has neither two class tokens nor pseudo-words")
    return method


def _inverting(material: Material) -> Hpl:
    method = _hpl(material)
    if not method.config.inverts:
        raise NotApplicable(f"this `hpl` has no inversion networks (method.prompts={method.config.prompts})")
    return method


def _batches(material: Material, rows: Sequence[int] | Ints, texts: Sequence[str] | None, name: str) -> Iterator[Batch]:
    """Batches of images `rows` of the corpus, with texts where given, on the subject's device."""
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


def _numbers(tensor: torch.Tensor) -> Vector:
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)


# Where the class tokens look


def attention(material: Material, found: Found) -> None:
    """Measure how spread and how different the two tokens' last attention is, and how much lies on objects."""
    method, person = _hpl(material), material.person
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
        for batch in _batches(material, range(len(material.images)), None, "attention"):
            seen = method.see(batch.require("image"), attention=True)
            assert seen.attention is not None
            maps.append(looking.over_patches(_numbers(seen.attention[-1]), seen.cls.shape[1]))
            features.append(_numbers(seen.cls))
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
    if len(on) == 2:
        found.add(analysis, "both", "", f"{region}-difference", measure(on["t2i"] - on["i2i"]), size)


def cam(material: Material, found: Found) -> None:
    """Compare the Grad-CAM maps of the two class features, and draw some."""
    method, seed = _hpl(material), material.seed
    rows, texts, partner = _cam_images(material)
    maps = _cams(material, method, rows, texts, partner)
    flat: Maps = {task: looking.as_distribution(each.reshape(len(rows), -1)) for task, each in maps.items()}
    person = material.person[rows]
    size = len(rows), len(set(person))
    likeness = bootstrap_interval(looking.correlation(flat["t2i"], flat["i2i"]), person, seed=seed)
    if likeness.value == likeness.value:
        found.add("cam", "both", "", "correlation", likeness, size)
    for region, wanted in (("person", None), ("objects", looking.OBJECTS)):
        shares = _part_shares(material, rows, wanted)
        if shares:
            _add_masses(material, found, "cam", region, flat, shares, rows)
    found.notes.append(
        "cam: t2i is the gradient of cos(v_t2i, own caption), i2i that of cos(v_i2i, v_i2i of another image of the "
        "person); images of people with a single image are left out. Their `control` is the mask of another person's "
        "image, `chance` the mask's share of the picture."
    )
    shown = _drawn(material, rows)
    found.drawings.append(lambda folder: _draw_cams(material, rows, maps, shown, folder))


def _cam_images(material: Material) -> tuple[Ints, list[str], Ints]:
    """Rows of images with a caption and another image of their person, those with objects first; texts; the others."""
    captions = material.corpus.captions.drop_duplicates("row")
    text = {int(row): str(sentence) for row, sentence in zip(captions["row"], captions["text"], strict=True)}
    next_one: dict[int, int] = {}
    for _, members in material.images.reset_index(drop=True).groupby("person_id", observed=True).groups.items():
        own = [int(row) for row in members]
        next_one |= {row: own[(number + 1) % len(own)] for number, row in enumerate(own) if len(own) > 1}
    usable = np.array([row for row in sorted(text) if row in next_one], np.int64)
    if not len(usable):
        raise NotApplicable("no image has both a caption and another image of its person")
    kept = usable[whole_families(material.images.iloc[usable].reset_index(drop=True), CAM_IMAGES, seed=material.seed)]
    return kept, [text[int(row)] for row in kept], np.array([next_one[int(row)] for row in kept], np.int64)


def _cams(material: Material, method: Hpl, rows: Ints, texts: list[str], partner: Ints) -> dict[Task, Vector]:
    pieces: dict[Task, list[Vector]] = {"t2i": [], "i2i": []}
    pairs = zip(_batches(material, rows, texts, "cam"), _batches(material, partner, None, "partners"), strict=True)
    for batch, other in pairs:
        for task, value in method.token_maps(batch, other.require("image")).items():
            pieces[task].append(_numbers(value))
    return {task: np.concatenate(members) for task, members in pieces.items()}


def _drawn(material: Material, rows: Ints) -> list[int]:
    """Places in `rows` of the images that are drawn: one per person, people with visible objects first."""
    objects = _part_shares(material, rows, looking.OBJECTS)
    order = sorted(range(len(rows)), key=lambda place: (-float(objects.get(place, np.zeros(1)).sum() > 0), place))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(str(material.person[rows[place]]), place)
    return list(first.values())[:DRAWN]


def _draw_cams(material: Material, rows: Ints, maps: dict[Task, Vector], shown: list[int], folder: Path) -> list[Path]:
    items, frames, size = [], [], material.subject.method.backbone.image_size
    size = (max(size[0], 192), max(size[0], 192) * size[1] // size[0])
    for place in shown:
        row = material.images.iloc[rows[place]]
        picture = read_pixels(material.corpus.root / str(row["path"]), size)
        over = [overlay(picture, maps[task][place]) for task in ("t2i", "i2i")]
        known = row["attributes"] if isinstance(row.get("attributes"), dict) else {}
        carried = known.get("carried") or "no object"
        items.append(Explained(f"{row['person_id']}\n{carried}", (picture, over[0], over[1])))
        frames.append(_map_rows(str(row["image_id"]), {task: maps[task][place] for task in ("t2i", "i2i")}))
    note = "Grad-CAM of the class token for texts (t2i: own caption) and for images (i2i: another image of the person)."
    return map_sheet(items, pd.concat(frames), folder / "cam", colours=COLOURS, note=note)


def _map_rows(name: str, maps: dict[str, Vector]) -> pd.DataFrame:
    height, width = maps["t2i"].shape
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    return pd.DataFrame({"image_id": name, "y": y, "x": x, **{task: each.ravel() for task, each in maps.items()}})


# What the pseudo-words hold


@dataclass(frozen=True)
class Inverted:
    """Images with a caption, their pseudo-tokens and prompts.

    Attributes:
        rows: of the images, (N,).
        person: (N,).
        texts: the captions.
        image, text: P^v and P^t, (N, M, W) each.
        image_prompt, text_prompt: unit v~ and t~, (N, D) each, of the template without identity tokens.
        caption: unit t_eos, (N, D).
    """

    rows: Ints
    person: Labels
    texts: list[str]
    image: Vector
    text: Vector
    image_prompt: Vector
    text_prompt: Vector
    caption: Vector


def _invert(material: Material, method: Hpl) -> Inverted:
    """Invert every image that has a caption, with its first one.

    Raises:
        NotApplicable: fewer than two people have one.
    """
    captions = material.corpus.captions.drop_duplicates("row").sort_values("row")
    rows, texts = captions["row"].to_numpy(np.int64), [str(text) for text in captions["text"]]
    person = material.person[rows]
    if len(set(person)) < 2:
        raise NotApplicable("fewer than two people have a caption")
    pieces: dict[str, list[Vector]] = defaultdict(list)
    with torch.inference_mode():
        for batch in _batches(material, rows, texts, "pseudo-words"):
            for name, value in _invert_batch(method, batch).items():
                pieces[name].append(_numbers(value))
    return Inverted(rows, person, texts, **{name: np.concatenate(members) for name, members in pieces.items()})


def _invert_batch(method: Hpl, batch: Batch) -> dict[str, torch.Tensor]:
    words = method.backbone.encode_text(batch.texts["full"])
    image = method.pseudo_image(method.split(method.see(batch.require("image"))).tokens)
    text = method.pseudo_text(method.text_tokens(words), batch.texts["full"].mask)
    return {
        "image": image,
        "text": text,
        "image_prompt": unit(method.prompted(image, None)),
        "text_prompt": unit(method.prompted(text, None)),
        "caption": unit(words.pooled),
    }


def pseudo(material: Material, found: Found) -> None:
    """Ask whether an image and its caption invert to the same, and count what the modules cost."""
    method = _hpl(material)
    _add_parameters(method, found)
    if not method.config.inverts:
        found.notes.append(f"pseudo: method.prompts={method.config.prompts}: there are only parameters to count.")
        return
    given = _invert(material, method)
    _add_distances(given, found, material.seed)
    _add_captions(given, found, material.seed)
    _add_agreement(given, found, material.seed)
    size = len(given.rows), len(set(given.person))
    image, text = torch.from_numpy(given.image), torch.from_numpy(given.text)
    for metric, value in (
        ("diversity-image", diversity(image)),
        ("diversity-text", diversity(text)),
        ("mismatch", mismatch(image, text)),
    ):
        found.add("pseudo", "", "", metric, value, size)
    found.notes.append(
        f"pseudo: {size[0]:,} images with their first captions. Test people have no identity tokens, so v~ and t~ are "
        f"of the template `{method.config.instance_template}`."
    )
    found.drawings.append(lambda folder: _draw_pairs(material, given, folder))


def _add_parameters(method: Hpl, found: Found) -> None:
    parts = inverted.parameter_parts((name, value.numel()) for name, value in method.named_parameters())
    for part, count in parts.items():
        found.add("pseudo", "", "", f"parameters.{part}", float(count), (1, 0))
        if part != "towers":
            found.add("pseudo", "", "", f"overhead.{part}", count / parts["towers"], (1, 0))


def _draws(person: Labels, seed: int) -> list[Ints]:
    """Rows of other people, several times."""
    return [inverted.others(person, np.random.default_rng((seed, 43, number))) for number in range(DRAWS)]


def _add_distances(given: Inverted, found: Found, seed: int) -> None:
    """Matched and mismatched ||P^t - P^v||, and by how much the latter is larger."""
    own = inverted.distances(given.image, given.text)
    foreign = np.mean([inverted.distances(given.image, given.text[o]) for o in _draws(given.person, seed)], axis=0)
    size = len(own), len(set(given.person))
    for metric, values in (("matched", own), ("mismatched", foreign), ("difference", foreign - own)):
        interval = bootstrap_interval(values, given.person, seed=seed)
        found.add("pseudo", "distance", "", metric, interval, size)


def _add_captions(given: Inverted, found: Found, seed: int) -> None:
    """How well cos(v~, t_eos) tells the own caption from those of other people; control: captions exchanged."""
    score, person = given.image_prompt @ given.caption.T, given.person
    own = bootstrap_interval(inverted.caption_auc(score, person), person, seed=seed)

    def auc(other: Ints) -> float:
        return float(np.nanmean(inverted.caption_auc(score[:, other], person)))

    control = inverted.exchanged(auc, person, seed=seed)
    beside = {"control": control.mean, "control_high": control.high, "chance": 0.5}
    found.add("pseudo", "caption", "", "auc", own, (len(score), len(set(person))), **beside)


def _add_agreement(given: Inverted, found: Found, seed: int) -> None:
    """Whether near pseudo-tokens make near prompts: rank correlation of distance and cosine, negative if so."""
    near = {"matched": np.arange(len(given.rows)), "mismatched": _draws(given.person, seed)[0]}
    apart = {kind: inverted.distances(given.image, given.text[o]) for kind, o in near.items()}
    alike = {kind: looking.cosine(given.image_prompt, given.text_prompt[o]) for kind, o in near.items()}
    whole = [np.concatenate([side["matched"], side["mismatched"]]) for side in (apart, alike)]
    people = np.concatenate([given.person, given.person])
    for metric, values, owner in (
        ("all", whole, people),
        ("matched", [apart["matched"], alike["matched"]], given.person),
    ):
        interval = inverted.spearman_interval(values[0], values[1], owner, seed=seed)
        found.add("pseudo", "spearman", "", metric, interval, (len(owner), len(set(owner))))


def _draw_pairs(material: Material, given: Inverted, folder: Path) -> list[Path]:
    images = material.images.iloc[given.rows].reset_index(drop=True)
    some = whole_families(images, PAIRS, seed=material.seed)
    flat = [side[some].reshape(len(some), -1) for side in (given.image, given.text)]
    if 2 * len(some) < 5:
        return []
    place = projection.tsne(np.concatenate(flat), seed=material.seed)
    frames = [
        pd.DataFrame(
            {
                "modality": side,
                "image_id": images["image_id"].iloc[some].to_numpy(),
                "person_id": given.person[some],
                "x": part[:, 0],
                "y": part[:, 1],
            }
        )
        for side, part in zip(("image", "text"), np.split(place, 2), strict=True)
    ]
    note = (
        f"{len(some):,} images of {len(set(given.person[some])):,} people with a caption each. Neighbourhoods can be "
        "read, lengths and gaps cannot: the distances are in the table."
    )
    return pair_map(pd.concat(frames, ignore_index=True), folder / "pseudo", note=note)


# Pseudo-words as words


@dataclass(frozen=True)
class Decoded:
    """The nearest words of the images' pseudo-tokens.

    Attributes:
        ids: token ids, (N, M).
        cosine: with the pseudo-tokens, (N, M).
        table: unit embeddings of all words, (V, W).
    """

    ids: Ints
    cosine: Floats
    table: Vector


def words(material: Material, found: Found) -> None:
    """Decode the pseudo-tokens of images by their nearest words, and ask what these say."""
    method = _inverting(material)
    decoded = _decode(material, method)
    name = {int(token): method.backbone.tokenizer.word(int(token)) for token in np.unique(decoded.ids)}
    _add_purity(material, decoded, found)
    _add_captioned(material, method, decoded, found)
    size = len(decoded.ids), len(set(material.person))
    cosine = bootstrap_interval(decoded.cosine.mean(axis=1), material.person, seed=material.seed)
    found.add("words", "", "", "cosine", cosine, size)
    found.add("words", "", "", "distinct", float(len(name)), size)
    found.notes.append(
        "words: the nearest word embedding by cosine, whatever it is; special and unused tokens are left out. "
        "Pseudo-tokens need not lie near any word: read the cosines."
    )
    count = decoded.ids.shape[1]
    table = pd.DataFrame(
        {
            "image_id": np.repeat(material.images["image_id"].to_numpy(dtype=object), count),
            "position": np.tile(np.arange(count), len(decoded.ids)),
            "word": [name[int(token)] for token in decoded.ids.ravel()],
            "cosine": decoded.cosine.ravel().round(6),
        }
    )
    found.drawings.append(lambda folder: [_write_csv(folder / "words.csv", table)])


def _decode(material: Material, method: Hpl) -> Decoded:
    pieces = []
    with torch.inference_mode():
        for batch in _batches(material, range(len(material.images)), None, "words"):
            pieces.append(method.pseudo_image(method.split(method.see(batch.require("image"))).tokens).cpu())
        whole = torch.cat(pieces)
        table = method.word_table.float().cpu()
    allowed = torch.tensor(_words_of(method), dtype=torch.int64)
    place, cosine = nearest_words(whole.flatten(0, 1), table[allowed])
    shape = whole.shape[:2]
    ids, near = allowed[place[:, 0]].reshape(shape), cosine[:, 0].reshape(shape)
    embeddings = torch.nn.functional.normalize(table, dim=-1).numpy()
    return Decoded(ids.numpy().astype(np.int64), near.numpy().astype(np.float64), embeddings)


def _words_of(method: Hpl) -> list[int]:
    """Ids of ordinary words: neither special nor a placeholder such as BERT's `[unused7]`."""
    tokenizer = method.backbone.tokenizer
    return [token for token in tokenizer.word_ids if not tokenizer.word(token).startswith("[unused")]


def _add_purity(material: Material, decoded: Decoded, found: Found) -> None:
    """How well the words predict true attributes, mean over positions, beside the same with exchanged attributes."""
    family, person = families(material.images), material.person
    labels, _ = probing.attribute_labels(material.images, family, sensitive=material.sensitive)
    for attribute, label in labels.items():
        known = np.array([value is not None for value in label])
        ids, true, owner = decoded.ids[known], label[known], person[known]
        chance = float(np.unique(true.astype(str), return_counts=True)[1].max() / len(true))
        for metric, measure in (("purity", inverted.purity), ("nmi", inverted.mutual_information)):
            mean = partial(inverted.mean_over_positions, measure, ids)
            control = inverted.exchanged(lambda other: mean(true[other]), owner, seed=material.seed)  # noqa: B023
            beside = {"control": control.mean, "control_high": control.high}
            beside |= {"chance": chance} if metric == "purity" else {}
            found.add("words", "", attribute, metric, mean(true), (len(ids), len(set(owner))), **beside)
    if not labels:
        found.notes.append("words: the images have no attribute that words could be compared with.")


def _add_captioned(material: Material, method: Hpl, decoded: Decoded, found: Found) -> None:
    """Whether the words are nearer to those of the own caption than to those of other people's captions."""
    captions = material.corpus.captions.drop_duplicates("row").sort_values("row")
    rows = captions["row"].to_numpy(np.int64)
    person = material.person[rows]
    if len(set(person)) < 2:
        found.notes.append("words: fewer than two people have a caption, so words are not compared with captions.")
        return
    said = [set(method.backbone.tokenizer.encode(str(text))) for text in captions["text"]]
    bags = np.stack([decoded.table[sorted(own)].mean(axis=0) for own in said])
    ids = decoded.ids[rows]
    size, measure = (len(rows), len(set(person))), partial(bootstrap_interval, person=person, seed=material.seed)
    measures: dict[str, Callable[[Ints], Floats]] = {
        "similarity": lambda of: inverted.bag_similarity(decoded.table[ids], bags[of]),
        "hits": lambda of: inverted.bag_hits(ids, [said[row] for row in of]),
    }
    for metric, compare in measures.items():
        own, foreign = (
            compare(np.arange(len(rows))),
            np.mean([compare(o) for o in _draws(person, material.seed)], axis=0),
        )
        found.add("words", "caption", "", metric, measure(own), size, control=float(foreign.mean()))
        found.add("words", "caption", "", f"{metric}-difference", measure(own - foreign), size)


def _write_csv(path: Path, frame: pd.DataFrame) -> Path:
    text = StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    tables.write_text(path, text.getvalue())
    return path


# What the training went through


def alarms(material: Material, found: Found) -> None:
    """Say which alarms the training's history raises: 1 raised, 0 not; those that it cannot judge are left out."""
    _hpl(material)
    path = material.subject.run.table("finetune", "history")
    if not path.is_file():
        raise NotApplicable("the run has no history of its training")
    history = tables.read_table(path, "history")
    logged = set(history["name"].astype(str))
    judged = {name: rule for name, rule in rules.ALARMS.items() if _NEEDS.get(name) in {None, *logged}}
    if not judged:
        raise NotApplicable("the history of the training holds none of the numbers that alarms read")
    for name, rule in judged.items():
        sentence = rule(history)
        found.add("alarms", name, "", "raised", float(sentence is not None), (len(history), 0))
        if sentence is not None:
            found.notes.append(f"alarms: {sentence}")
    for name in rules.ALARMS.keys() - judged.keys():
        found.notes.append(f"alarms: {name}: the history holds no `{_NEEDS[name]}`.")
