"""The analyses of `analyse` of learnt words: which words they are nearest to; `hpl`'s pseudo-words and its alarms."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from reidctl import tables
from reidctl.batch import Batch
from reidctl.evaluation import alarms as rules
from reidctl.evaluation import attention as looking
from reidctl.evaluation import probes as probing
from reidctl.evaluation import projection
from reidctl.evaluation import pseudo as inverted
from reidctl.layers.inversion import diversity, mismatch
from reidctl.layers.prompts import nearest_words
from reidctl.methods.base import Method, unit
from reidctl.methods.hpl import Hpl
from reidctl.metrics import bootstrap_interval
from reidctl.report.tokens import pair_map
from reidctl.stages.analyse_parts import Found, Labels, Material, NotApplicable
from reidctl.stages.analyse_tokens import Floats, Ints, Vector, batches, hpl_of, numbers
from reidctl.stages.features import families, whole_families

PAIRS = 300
PEOPLE = 20
"""How many people's learnt prompts are decoded."""
DRAWS = 5
"""How often captions of other people are drawn for a mean."""
_NEEDS = {"interference": "task_cosine", "collapse": "pseudo/diversity", "over_regularisation": "pseudo/mismatch"}


def _inverting(material: Material) -> Hpl:
    method = hpl_of(material)
    if not method.config.inverts:
        raise NotApplicable(f"this `hpl` has no inversion networks (method.prompts={method.config.prompts})")
    return method


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
        for batch in batches(material, rows, texts, "pseudo-words"):
            for name, value in _invert_batch(method, batch).items():
                pieces[name].append(numbers(value))
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
    method = hpl_of(material)
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
    """Decode the pseudo-tokens of images by their nearest words, and ask what these say; else the learnt prompts."""
    if not isinstance(material.subject.method, Hpl):
        _prompt_words(material, found)
        return
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
        for batch in batches(material, range(len(material.images)), None, "words"):
            pieces.append(method.pseudo_image(method.split(method.see(batch.require("image"))).tokens).cpu())
        whole = torch.cat(pieces)
        table = method.word_table.float().cpu()
    allowed = torch.tensor(_words_of(method), dtype=torch.int64)
    place, cosine = nearest_words(whole.flatten(0, 1), table[allowed])
    shape = whole.shape[:2]
    ids, near = allowed[place[:, 0]].reshape(shape), cosine[:, 0].reshape(shape)
    embeddings = torch.nn.functional.normalize(table, dim=-1).numpy()
    return Decoded(ids.numpy().astype(np.int64), near.numpy().astype(np.float64), embeddings)


def _prompt_words(material: Material, found: Found) -> None:
    """Decode the prompts that a method learnt for all, for datasets and for some of its people."""
    method = material.subject.method
    prompts = method.prompt_rows([str(number) for number in range(method.persons)])
    people = [prompt for prompt in prompts if prompt[0] == "person"]
    some = people[:: -(-len(people) // PEOPLE)] if people else []
    prompts = [prompt for prompt in prompts if prompt[0] != "person"] + some
    if not prompts:
        raise NotApplicable(f"the method `{method.name}` has neither pseudo-words nor learnt prompts here")
    allowed = torch.tensor(_words_of(method), dtype=torch.int64)
    with torch.inference_mode():
        table = method.backbone.embed_tokens(allowed[None].to(material.subject.device))[0].float().cpu()
    rows = []
    for scope, key, vectors in prompts:
        place, cosine = nearest_words(vectors.detach().float().cpu(), table)
        words = [method.backbone.tokenizer.word(int(token)) for token in allowed[place[:, 0]]]
        facts = zip(range(len(words)), words, cosine[:, 0].double().numpy().round(6), strict=True)
        rows += [{"scope": scope, "key": key, "position": n, "word": word, "cosine": near} for n, word, near in facts]
    frame = pd.DataFrame(rows)
    for scope in dict.fromkeys(frame["scope"]):
        group = frame[frame["scope"] == scope]
        size = len(group), len(some) if scope == "person" else 0
        found.add("words", scope, "", "cosine", float(group["cosine"].mean()), size)
        found.add("words", scope, "", "distinct", float(group["word"].nunique()), size)
    found.notes.append(
        f"words: the nearest word embedding by cosine of every token of the learnt prompts, of {len(some)} of "
        f"{len(people)} people, who are numbered in the order of training. Learnt tokens need not lie near any word: "
        "read the cosines."
    )
    found.drawings.append(lambda folder: [_write_csv(folder / "words.csv", frame)])


def _words_of(method: Method) -> list[int]:
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
    hpl_of(material)
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
