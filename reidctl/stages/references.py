"""What the model's numbers are printed beside: chance, shuffled labels, a colour histogram, and attribute oracles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reidctl.data import Corpus
from reidctl.evaluation import baselines, protocols
from reidctl.metrics import Interval, distinct_query_ceiling, summarise

REFERENCES = ("histogram", "oracle-caption", "oracle", "shuffled", "chance", "single-shot-chance")
"""Their condition names; every other condition is the model's own."""

CONTROL_PAIRS = 10**9


def references(
    whole: Corpus,
    protocol: protocols.Protocol,
    model: protocols.Evaluation,
    texts: pd.DataFrame,
    notes: list[str],
    *,
    cutoffs: Sequence[int] | None = None,
    seed: int = 0,
) -> list[protocols.Evaluation]:
    """Return the reference rows of a protocol that have a scored query; what is lacking is added to `notes`.

    Args:
        whole: every split; the colour histogram of texts is learned from its training captions.
        protocol: as the model was measured.
        model: the model's result.
        texts: the text queries.
        notes: sentences for the reader of the numbers; appended to.
        cutoffs: the k of rank-k.
        seed: of the shuffle and the bootstrap.
    """
    control, said = control_of(protocol, cutoffs=cutoffs, seed=seed)
    notes += said
    found = [chance_of(protocol, model, seed=seed), control]
    for condition, vectors in _simple_vectors(whole, protocol, texts, notes).items():
        other = protocols.with_vectors(protocol, *vectors, condition=condition)
        found.append(protocols.evaluate(other, cutoffs=cutoffs, seed=seed))
    return [part for part in found if len(part.metrics)]


def control_of(
    protocol: protocols.Protocol, *, cutoffs: Sequence[int] | None = None, seed: int = 0, device: str = "cpu"
) -> tuple[protocols.Evaluation, list[str]]:
    """Return the label-shuffle control, and a note if it was measured on some of the queries only.

    Shuffled positives lie anywhere in the ranking, which is the slowest case to count. Where all queries and gallery
    items make more than 10^9 pairs, as many queries as make so many, at least 1,000, are drawn: for a control
    that must merely stay at chance they are plenty.
    """
    shuffled = replace(baselines.label_shuffle(protocol, seed=seed), condition="shuffled")
    queries, most = len(protocol.query), max(1000, CONTROL_PAIRS // max(len(protocol.gallery), 1))
    if queries <= most:
        return protocols.evaluate(shuffled, cutoffs=cutoffs, seed=seed, device=device), []
    by_id = np.argsort(protocol.query.item.astype(str), kind="stable")
    chosen = np.sort(by_id[np.random.default_rng((seed, 3)).choice(queries, most, replace=False)])
    part = replace(shuffled, query=protocol.query.select(chosen))
    where = f"{protocol.dataset}, {protocol.direction}"
    note = f"{where}: the label-shuffle control was measured on {most:,} of {queries:,} queries, drawn at random."
    return protocols.evaluate(part, cutoffs=cutoffs, seed=seed, device=device), [note]


def chance_of(
    protocol: protocols.Protocol, model: protocols.Evaluation, *, condition: str = "chance", seed: int = 0
) -> protocols.Evaluation:
    """Return the row of a random ranking of the same queries and galleries, computed, not drawn."""
    expected = summarise(baselines.chance_of(model.ranking), protocol.query.person, seed=seed)
    rows = model.metrics.assign(condition=condition)
    for metric, interval in expected.items():
        rows.loc[rows["metric"] == metric, ["value", "low", "high"]] = [interval.value, None, None]
    plain = {name: Interval(expected[name].value, float("nan"), float("nan")) for name in model.summary}
    return replace(model, summary=plain, metrics=rows, queries=model.queries.iloc[:0], rankings=model.rankings.iloc[:0])


def _simple_vectors(
    whole: Corpus, protocol: protocols.Protocol, texts: pd.DataFrame, notes: list[str]
) -> dict[str, tuple[Any, Any]]:
    images = whole.images
    row_of = {name: row for row, name in enumerate(images["image_id"])}
    paths = whole.paths()
    attributes = list(images["attributes"])
    gallery_rows = [row_of[name] for name in protocol.gallery.image]
    query_rows = [row_of[name] for name in protocol.query.image]
    gallery = baselines.colour_histograms([paths[row] for row in gallery_rows])
    found: dict[str, tuple[Any, Any]] = {}
    if protocol.direction != "t2i":
        found["histogram"] = (baselines.colour_histograms([paths[row] for row in query_rows]), gallery)
    else:
        text_of = dict(zip(texts["caption_id"], texts["text"], strict=True))
        asked = [str(text_of[name]) for name in protocol.query.item]
        learned = _words_to_colours(whole, paths)
        if learned is None:
            notes.append("No training captions: the colour-histogram baseline for text queries is left out.")
        else:
            found["histogram"] = (learned.predict(asked), gallery)
        found |= _named(
            "oracle-caption",
            baselines.caption_oracle(asked, [attributes[r] for r in query_rows], [attributes[r] for r in gallery_rows]),
        )
        ceiling = distinct_query_ceiling(asked, list(protocol.query.person))
        if ceiling < 1:
            notes.append(
                f"{protocol.dataset}: no model can exceed rank-1 {100 * ceiling:.1f} % with these query texts."
            )
    full = baselines.attribute_oracle([attributes[r] for r in query_rows], [attributes[r] for r in gallery_rows])
    found |= _named("oracle", full)
    if full is None:
        notes.append(f"{protocol.dataset}: no true attributes, so no attribute oracle.")
    return found


def _named(name: str, vectors: tuple[Any, Any] | None) -> dict[str, tuple[Any, Any]]:
    return {} if vectors is None else {name: vectors}


def _words_to_colours(whole: Corpus, paths: list[Path]) -> baselines.WordsToColours | None:
    train = (whole.images["split"] == "train").to_numpy()
    captions = whole.captions[train[whole.captions["row"].to_numpy(int)]]
    if not len(captions):
        return None
    rows = sorted(set(captions["row"]))
    place = {row: number for number, row in enumerate(rows)}
    histograms = baselines.colour_histograms([paths[row] for row in rows])
    return baselines.fit_words_to_colours(
        [str(text) for text in captions["text"]], histograms[[place[row] for row in captions["row"]]]
    )
