"""`evaluate`: retrieval metrics on unseen people, beside chance, a colour histogram and the attribute oracle."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl import parallel
from reidctl.console import progress
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import pairwise, protocols
from reidctl.evaluation.composed import composed
from reidctl.evaluation.pairwise import Pairwise
from reidctl.evaluation.protocols import JOINT, Direction, Evaluation, Protocol
from reidctl.evaluation.reranking import caveats, evaluate_reranked
from reidctl.evaluation.single_shot import single_shot
from reidctl.evaluation.slices import slice_rows
from reidctl.retrieval.rerank import Parameters, parse
from reidctl.retrieval.store import Stored
from reidctl.runs import Run
from reidctl.stages import results
from reidctl.stages.index import model_digest, training_digest
from reidctl.stages.measuring import (
    Subject,
    check_joint,
    check_people,
    check_query,
    datasets_of,
    embed,
    find_subject,
    joint_protocols,
    protocols_of,
    told_apart,
)
from reidctl.stages.references import chance_of, references
from reidctl.stages.sources import find_source

STAGE = results.STAGE
PROTOCOLS = ("t2i", "i2i", "it2i", "single-shot")
DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2i", "it2i")


@dataclass(frozen=True)
class Asked:
    """What is measured besides the standard rows.

    Attributes:
        protocols: of `PROTOCOLS`.
        cutoffs: the k of rank-k; None: 1, 5, 10, 20 as far as the gallery reaches.
        rerank: parameter sets of k-reciprocal re-ranking.
        pairwise: depths of re-ranking text queries by the model's match head.
        weight: the image's share in an image+text query.
        seed: of the bootstrap, the label shuffle and the single-shot draws.
        joint: also the queries of all datasets in one gallery.
    """

    protocols: tuple[str, ...] = ("t2i", "i2i")
    cutoffs: tuple[int, ...] | None = None
    rerank: tuple[Parameters, ...] = ()
    pairwise: tuple[Pairwise, ...] = ()
    weight: float = 0.5
    seed: int = 0
    joint: bool = False


@dataclass
class Found:
    """What was measured so far."""

    parts: list[Evaluation] = field(default_factory=list)
    slices: list[pd.DataFrame] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Evaluation) -> bool:
        """Keep a result, if a query could be scored; return whether one could."""
        if not part.ranking.queries.scored:
            return False
        self.parts.append(part)
        return True


def run(
    run: Run,
    *,
    split: str = "test",
    query: str = "caption",
    measure: Sequence[str] = ("t2i", "i2i"),
    cutoffs: Sequence[int] | None = None,
    rerank: Sequence[str] = (),
    weight: float = 0.5,
    joint: bool = False,
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    reuse: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Measure text-to-image retrieval and, where cameras or roles are known, image-to-image retrieval.

    Args:
        run: with a trained model; its index is used when it fits, else the gallery is embedded here.
        split: which people.
        query: what a text query is: the caption, or texts that a model wrote from the query's image.
        measure: protocols, of `PROTOCOLS`; those that the data do not allow are noted.
        cutoffs: the k of rank-k; default: 1, 5, 10, 20 as far as the gallery reaches.
        rerank: parameter sets of k-reciprocal re-ranking, such as `20/6/0.3`, and `pairwise/50` to re-rank the first 50
            images of every text query by the model's match head.
        weight: the image's share in an image+text query, in [0, 1].
        joint: also the queries of all datasets in one gallery of all of them, as a dataset named `joint`; their numbers
            are `joint.t2i` and so on in `metrics`, apart from the lowest of the datasets.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts.
        seed: of the bootstrap, the label shuffle and the single-shot draws.
        reuse: an earlier evaluation of the same queries with other protocols, cutoffs or re-rankings will do.
        force: measure again even if nothing changed.

    Raises:
        UsageError: an unknown kind of query, protocol or parameter set, or pairwise re-ranking that cannot be.
        DataError: no model, no such split, a cutoff beyond the gallery, nobody to find, or no joint gallery.
    """
    check_query(query)
    resolve_device(device)
    sets = tuple(dict.fromkeys(parse(text) for text in rerank if not pairwise.is_pairwise(text)))
    pairs = tuple(dict.fromkeys(pairwise.parse(text) for text in rerank if pairwise.is_pairwise(text)))
    asked = Asked(_known(measure), tuple(cutoffs) if cutoffs else None, sets, pairs, weight, seed, joint)
    source = find_source(run, data, captions)
    check_people(source)
    settings: dict[str, Any] = {
        "split": split,
        "query": query,
        "seed": seed,
        "model": model_digest(run),
        "training": training_digest(run),
        "measure": list(asked.protocols),
        "cutoffs": list(asked.cutoffs) if asked.cutoffs else None,
        "rerank": [*(parameters.name for parameters in asked.rerank), *(depth.name for depth in asked.pairwise)],
        "weight": weight,
        **({"joint": True} if joint else {}),  # evaluations without it have the fingerprint they always had
    }
    inputs = source.digests()

    def known() -> dict[str, Any] | None:
        current = None if force else run.up_to_date(STAGE, settings, inputs)
        if current is None and reuse and not force:
            current = run.up_to_date(STAGE, _held(run, settings), inputs)
        return current

    # Several processes embed together; then the first one goes on alone.
    with parallel.joined(resolve_device(device).type) as here:
        current = parallel.first_does(known)
        if current is not None:
            return {**current, "status": "up-to-date"}
        started = datetime.now(UTC)
        own = str(parallel.own_device(resolve_device(device)))
        subject = find_subject(run, split=split, query=query, device=own, data=data, captions=captions)
        _check_pairwise(subject, asked)
        if joint:
            check_joint(subject)
        parallel.first_does(lambda: run.unfinish(STAGE))
        stored = embed(subject)
    if here.rank:
        return {"stage": STAGE, "status": "shared", "metrics": {}, "outputs": {}, "seconds": 0.0}
    found = _measure(subject, stored, asked)
    outputs = results.write_results(run, found.parts, found.slices, split=split, notes=found.notes)
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(subject.device),
        metrics=_summary(found.parts, joint=joint),
        extra={
            "split": split,
            "tables": results.result_tables(found.parts),
            "notes": found.notes,
            "data": str(source.folder.resolve()),
        },
    )
    return {**record, "status": "done"}


def _held(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, except that what is measured is what the run's evaluation measured."""
    held = (run.record(STAGE) or {}).get("settings", {})
    return settings | {name: held[name] for name in ("measure", "cutoffs", "rerank", "weight", "joint") if name in held}


def _summary(parts: Sequence[Evaluation], *, joint: bool) -> dict[str, dict[str, float]]:
    """The model's own numbers by direction, those of the joint gallery apart: a gate says which of them it guards."""
    sides: tuple[list[Evaluation], list[Evaluation]] = ([], [])
    for part in parts:
        sides[joint and part.metrics["dataset"].iloc[0] == JOINT].append(part)
    single, of_all = (results.summary(side) for side in sides)
    return single | {f"{JOINT}.{direction}": held for direction, held in of_all.items()}


def _known(names: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise UsageError(f"`--protocol {' '.join(unknown)}` is not known.", hint=f"One of: {', '.join(PROTOCOLS)}.")
    return tuple(name for name in PROTOCOLS if name in names)


def _check_pairwise(subject: Subject, asked: Asked) -> None:
    """Refuse pairwise re-ranking that is not possible, before anything is computed or an old result is given up."""
    if asked.pairwise and "t2i" not in asked.protocols:
        raise UsageError(
            f"`--rerank {asked.pairwise[0].name}` re-ranks text queries, and none are measured.",
            hint="Add --protocol t2i.",
        )
    images = subject.corpus.images
    described = set(images.loc[images["image_id"].isin(set(subject.texts["image_id"])), "dataset"])
    for depth in asked.pairwise:
        for dataset, count in images.loc[images["dataset"].isin(described), "dataset"].value_counts().items():
            pairwise.check(subject.method, depth, int(count), f"{dataset}, {subject.split}")


def _measure(subject: Subject, stored: Stored, asked: Asked) -> Found:
    found = Found(notes=list(subject.notes))
    for dataset in datasets_of(subject):
        allowed, notes = protocols_of(subject, stored, dataset)
        found.notes += notes
        allowed += _composed(subject, stored, dataset, allowed, asked)
        _protocols(subject, stored, allowed, asked, found)
    if asked.joint:
        _joint(subject, stored, asked, found)
    if not found.parts:
        raise DataError(
            f"No query of the {subject.split} split has a match under `--protocol {' '.join(asked.protocols)}`, so "
            "there is nothing to measure.",
            hint="Metrics need person ids and, for each query, another image of the person.",
        )
    return found


def _joint(subject: Subject, stored: Stored, asked: Asked, found: Found) -> None:
    """Add the model and its reference rows on one gallery of all datasets."""
    apart = told_apart(subject)
    parts: dict[str, list[Protocol]] = {}
    for dataset in datasets_of(apart):
        allowed, _ = protocols_of(apart, stored, dataset)
        parts[dataset] = [*allowed, *_composed(apart, stored, dataset, allowed, asked)]
    shown = {"i2i"} if "single-shot" in asked.protocols else set()
    directions: list[Direction] = [name for name in DIRECTIONS if name in {*asked.protocols, *shown}]
    allowed, notes = joint_protocols(apart, stored, parts, directions=directions)
    found.notes += notes
    _protocols(subject, stored, allowed, asked, found)


def _protocols(subject: Subject, stored: Stored, allowed: Sequence[Protocol], asked: Asked, found: Found) -> None:
    """Add the model and its reference rows in the directions asked for."""
    for protocol in allowed:
        if protocol.direction in asked.protocols:
            _direction(subject, protocol, asked, found)
        if protocol.direction == "i2i" and "single-shot" in asked.protocols:
            _single_shot(protocol, asked, found, str(subject.device))
        if protocol.direction == "it2i":
            what = f"{asked.weight:g} image + {1 - asked.weight:g} text"
            own = f"ranked by the cosines {what}, each of its own vectors"
            how = f"unit({what})" if stored.i2i is stored.t2i else own
            found.notes.append(f"{protocol.dataset}: image+text queries are {how}, not trained.")


def _composed(
    subject: Subject, stored: Stored, dataset: str, allowed: Sequence[Protocol], asked: Asked
) -> list[Protocol]:
    """The protocol of image+text queries, if they are asked for and the data allow both."""
    rules = {protocol.direction: protocol.exclude for protocol in allowed}
    if "it2i" not in asked.protocols or set(rules) != {"t2i", "i2i"}:
        return []
    protocol = composed(
        subject.corpus.images,
        subject.texts,
        stored.t2i,
        by_image=stored.i2i,
        dataset=dataset,
        split=subject.split,
        weight=asked.weight,
        cloth_changing=rules["i2i"] in ("cloth_changing", "same_outfit"),
    )
    return [protocol]


def _direction(subject: Subject, protocol: Protocol, asked: Asked, found: Found) -> None:
    device = str(subject.device)
    with progress(f"rank {protocol.direction}", len(protocol.query), unit="queries") as advance:
        model = protocols.evaluate(protocol, cutoffs=asked.cutoffs, seed=asked.seed, device=device, advance=advance)
    if not found.add(model):
        found.notes.append(f"{protocol.dataset}, {protocol.direction}: no query has a match, so no result.")
        return
    found.notes += results.remarks(model)
    cut = lambda text: subject.method.backbone.truncation_rate([text]) > 0  # noqa: E731
    found.slices.append(slice_rows(protocol, model, subject.corpus.images, subject.texts, cut=cut, seed=asked.seed))
    for setting in protocols.clothes_settings(protocol):
        found.add(protocols.evaluate(setting, cutoffs=asked.cutoffs, seed=asked.seed, device=device))
    for parameters in asked.rerank:
        again = _again(protocol, parameters, asked, device)
        found.add(again)
        found.notes += caveats(protocol, parameters)
        _note_no_change(protocol, model, again, parameters.name, found)
    for depth in asked.pairwise if protocol.direction == "t2i" else ():
        again = _by_pairs(subject, protocol, depth, asked)
        found.add(again)
        found.notes.append(pairwise.caveat(protocol, depth))
        _note_no_change(protocol, model, again, depth.name, found)
    found.parts += references(
        subject.whole, protocol, model, subject.texts, found.notes, cutoffs=asked.cutoffs, seed=asked.seed
    )


def _note_no_change(protocol: Protocol, before: Evaluation, after: Evaluation, name: str, found: Found) -> None:
    if after.ranking.queries.means() == before.ranking.queries.means():
        found.notes.append(f"{protocol.dataset}, {protocol.direction}: re-ranking {name} changed no metric.")


def _by_pairs(subject: Subject, protocol: Protocol, depth: Pairwise, asked: Asked) -> Evaluation:
    corpus, texts = subject.corpus, subject.texts
    path_of = dict(zip(corpus.images["image_id"], corpus.paths(), strict=True))
    text_of = dict(zip(texts["caption_id"], texts["text"], strict=True))
    paths = [path_of[item] for item in protocol.gallery.item]
    sentences = [str(text_of[item]) for item in protocol.query.item]

    def score(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        with progress(f"re-rank {depth.name}", pairwise.count_pairs(sentences, rows), unit="pairs") as advance:
            return pairwise.score_pairs(subject.method, paths, sentences, rows, device=subject.device, advance=advance)

    return pairwise.evaluate_pairwise(
        protocol, depth, score, seed=asked.seed, cutoffs=asked.cutoffs, device=str(subject.device)
    )


def _single_shot(protocol: Protocol, asked: Asked, found: Found, device: str) -> None:
    """Add single-shot galleries of the plain protocol and of its clothes settings, with chance for the plain one."""
    for setting in (protocol, *protocols.clothes_settings(protocol)):
        part = single_shot(setting, cutoffs=asked.cutoffs, seed=asked.seed, device=device)
        if found.add(part) and setting is protocol:
            found.parts.append(chance_of(protocol, part, condition="single-shot-chance", seed=asked.seed))


def _again(protocol: Protocol, parameters: Parameters, asked: Asked, device: str) -> Evaluation:
    with progress(f"re-rank {parameters.name}", len(protocol.query), unit="queries") as advance:
        return evaluate_reranked(
            protocol, parameters, cutoffs=asked.cutoffs, seed=asked.seed, device=device, advance=advance
        )
