"""Our numbers beside the published ones, with everything that keeps them from being compared.

A published number is a model, weights, a dataset, a split, a query, a rule for choosing the epoch and a ranking. Where
ours differs in one of them, or where the text does not say, the banner says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reidctl.evaluation.origin import other_tables, rendered_datasets
from reidctl.evaluation.published import Published, comparison, plain
from reidctl.evaluation.render import BANNER, TIES, interval
from reidctl.naming import DIRECTIONS, label
from reidctl.runs import Run

METRICS = ("rank1", "rank5", "rank10", "mAP", "mINP")
COLUMNS = ("", "source", "dataset", *METRICS, "backbone", "epoch chosen on", "notes")
# Rows of an evaluation that are not the model's.
_REFERENCES = frozenset({"histogram", "oracle-caption", "oracle", "shuffled", "chance", "single-shot-chance"})
# What the papers start from; anything else may be better or worse than theirs.
_WEIGHTS = {
    "clip:ViT-B-16/openai": "CLIP ViT-B/16 (OpenAI)",
    "vit-bert:google/vit-base-patch16-224+bert-base-uncased": "ViT-B/16 (ImageNet) and BERT",
}
_RANDOM = ("tiny", "micro")


@dataclass(frozen=True)
class Size:
    """The test split of a benchmark.

    Attributes:
        people: with at least one query.
        queries: captions (t2i) or query images (i2i).
        gallery: images; several where two ways to count are in use.
    """

    people: int
    queries: int
    gallery: tuple[int, ...]


# Market-1501: 19,732 files, 15,913 of them without junk.
SIZES: dict[tuple[str, str], Size] = {
    ("t2i", "cuhkpedes"): Size(1000, 6156, (3074,)),
    ("t2i", "icfgpedes"): Size(1000, 19848, (19848,)),
    ("t2i", "rstpreid"): Size(200, 2000, (1000,)),
    ("i2i", "market1501"): Size(750, 3368, (15913, 19732)),
    ("i2i", "msmt17"): Size(3060, 11659, (82161,)),
    ("i2i", "dukemtmcreid"): Size(702, 2228, (17661,)),
}


@dataclass(frozen=True)
class Context:
    """What a run's numbers are numbers of.

    Attributes:
        data: where the images come from: `synthped`, the format they were imported from, `combine`, `degrade`; empty
            if unknown.
        rendered: whether the images are rendered people, under whatever dataset name.
        rendered_datasets: those of several datasets whose people are rendered.
        folder: of the dataset.
        split: which people.
        query: what a text query is; `caption` is what papers use.
        degraded: how the captions were spoilt; empty if they were not.
        other_data: whether the model was trained on another dataset than the one of the test.
        combined: whether it was trained on several datasets together.
        method: of the model.
        recipe: file or name, if the command line named one.
        spec: which weights the training started from.
        shuffled: whether the model was trained on shuffled labels, as a control.
        selected_on: the split that chose the epoch.
        epoch: the chosen epoch, from 1.
        epochs: how many there were.
        seed: of the training.
        given: whether embeddings were given, so that neither the model nor the images are known.
        notes: sentences of the import that say that its numbers are not the release's.
    """

    data: str = ""
    rendered: bool = False
    rendered_datasets: tuple[str, ...] = ()
    folder: str = ""
    split: str = "test"
    query: str = "caption"
    degraded: str = ""
    other_data: bool = False
    combined: bool = False
    method: str = ""
    recipe: str = ""
    spec: str = ""
    shuffled: bool = False
    selected_on: str = ""
    epoch: int | None = None
    epochs: int | None = None
    seed: int | None = None
    given: bool = False
    notes: tuple[str, ...] = ()

    @property
    def pretrained(self) -> bool:
        """Whether the training started from pretrained weights, by the specification of the backbone."""
        kind, _, name = self.spec.partition(":")
        return "/" in name if kind == "clip" else bool(name) and name not in _RANDOM


@dataclass(frozen=True)
class Comparison:
    """A table of our numbers and published ones, ready to be drawn.

    Attributes:
        title: what is compared.
        banner: `NOT COMPARABLE: ...` with every reason; None if nothing speaks against it.
        reasons: the banner's reasons, one sentence each.
        lines: what our row is a number of: data, weights, protocol.
        columns: headings.
        rows: cells as text; ours come first.
        footnotes: what the numbers in the column `notes` refer to.
    """

    title: str
    banner: str | None
    reasons: tuple[str, ...]
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footnotes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; `render` draws it with `notes` (banner, lines, footnotes)."""
        notes = [*([self.banner] if self.banner else []), *self.lines, *self.footnotes]
        return {**{name: _lists(value) for name, value in asdict(self).items()}, "notes": notes}


def compare(facts: Mapping[str, Any], *, dataset: str, direction: str, context: Context) -> Comparison:
    """Return this run's rows, then the published ones of the same benchmark, each under the text that prints it.

    For a dataset of which nothing is published (rendered people) the rows of all benchmarks of the direction are shown
    for orientation.

    Args:
        facts: one entry of an evaluate record's `tables`: counts, and `rows` of condition, metric, [value, low, high].
        dataset: its dataset.
        direction: its direction.
        context: see `context_of`.
    """
    where = DIRECTIONS.get(direction, direction)
    if plain(dataset).startswith("synthped") or dataset in context.rendered_datasets:
        # One of several datasets that were combined.
        context = replace(context, rendered=True)
    shown = comparison(dataset=dataset, direction=direction)
    oriented = not shown or context.rendered
    if oriented:
        shown = comparison(direction=direction)
    own = {name: values for name, values in facts["rows"].items() if name not in _REFERENCES}
    reasons = _reasons(facts, own, dataset, direction, context, shown, oriented)
    numbers = _Footnotes()
    rows = [_own_row(name, values, dataset, context) for name, values in own.items()]
    rows += [_published_row(entries, numbers) for entries in _by_row(shown)]
    footnotes = list(numbers.lines)
    if not shown:
        footnotes.append(f"No published number of this registry is {where}.")
    elif oriented:
        footnotes.append("The published rows are those of other datasets: for orientation, not for comparison.")
    return Comparison(
        title=f"{dataset}, {where} ({context.split}): ours beside published numbers, percent",
        banner=f"{BANNER}: {' '.join(reasons)}" if reasons else None,
        reasons=tuple(reasons),
        lines=tuple(_lines(facts, dataset, context)),
        columns=COLUMNS,
        rows=tuple(rows),
        footnotes=tuple(footnotes),
    )


def context_of(run: Run, record: Mapping[str, Any]) -> Context:
    """Return what the numbers of an evaluation are numbers of.

    Args:
        run: with the trained model.
        record: of `evaluate`: `data`, `split`, `settings` and `inputs` are read. Of an evaluation of given embeddings
            `data` is None, and the run's training, if it has one, did not make them.

    Raises:
        DataError: the run has no finished training.
    """
    if record["data"] is None:
        return Context(data="given embeddings", split=str(record["split"]), spec="given embeddings", given=True)
    trained = run.require("finetune")
    settings = trained["settings"]
    folder, learned = Path(str(record["data"])), Path(str(trained["data"]))
    data = Run(folder.parent).record(folder.name) or {}
    source = str(data.get("source", ""))
    spoilt = data.get("settings", {}).get("degrade", {}) if source == "degrade" else {}
    return Context(
        data=source,
        rendered=source == "synthped",
        rendered_datasets=tuple(rendered_datasets(folder)),
        folder=str(folder),
        split=str(record["split"]),
        query=str(record["settings"].get("query", "caption")),
        degraded=f"{spoilt['kind']}, level {spoilt['level']:g}" if spoilt else "",
        other_data=trained.get("source") != "convert" and bool(other_tables(record["inputs"], trained["inputs"])),
        combined=(Run(learned.parent).record(learned.name) or {}).get("source") == "combine",
        method=str(trained["method"]),
        recipe=_option(trained["command"], "--recipe") or _option(trained["command"], "--method"),
        spec=_origin(str(settings["backbone"]["spec"]), trained.get("start")),
        shuffled=bool(settings["train"].get("shuffle_labels", False)),
        selected_on=str(trained["selected_on"]),
        epoch=trained.get("best_epoch"),
        epochs=trained.get("epochs"),
        seed=settings.get("seed"),
        notes=(
            *(str(note) for note in data.get("notes", ()) if "ublished" in str(note)),
            *([str(trained["seen_note"])] if "seen_note" in trained else []),
        ),
    )


def _origin(spec: str, start: str | None) -> str:
    """What the weights of a training started from."""
    return f"{spec}, trained before in {start}" if start else spec


def _reasons(
    facts: Mapping[str, Any],
    own: Mapping[str, Any],
    dataset: str,
    direction: str,
    context: Context,
    shown: Sequence[Published],
    oriented: bool,
) -> list[str]:
    """Why the numbers do not compare, the gravest first."""
    found = []
    if context.rendered:
        found.append("The people are rendered, not photographed.")
    if oriented and not context.rendered:
        found.append(f"No number of {dataset} is published here.")
    if context.split != "test":
        found.append(f"These are the people of the {context.split} split; papers print the test split.")
    elif not oriented:
        found += _size_reasons(facts, dataset, direction)
    found += context.notes
    if context.degraded:
        found.append(f"The captions were degraded ({context.degraded}).")
    if direction != "i2i" and context.query != "caption":
        found.append(f"The queries are {context.query} texts of a model, not human captions.")
    if context.other_data:
        found.append("The model was trained on another dataset than the one it is tested on.")
    if context.combined:
        found.append("The model was trained on several datasets together; most of the published ones were not.")
    return found + _weight_reasons(context) + _ranking_reasons(own, context, shown)


def _size_reasons(facts: Mapping[str, Any], dataset: str, direction: str) -> list[str]:
    size = SIZES.get((direction, plain(dataset)))
    if size is None:
        return [f"The size of the official test split of {dataset} is not known here, so it was not checked."]
    asked = facts["queries"] + facts["skipped"]
    right = (
        asked == size.queries and facts["gallery"] in size.gallery and facts.get("people", size.people) == size.people
    )
    if right:
        return []
    images = " or ".join(f"{count:,}" for count in size.gallery)
    return [
        f"The official test split has {size.queries:,} queries of {size.people:,} people and {images} images; this one "
        f"has {asked:,}, {facts.get('people', 0):,} and {facts['gallery']:,}."
    ]


def _weight_reasons(context: Context) -> list[str]:
    if context.given:
        return ["Embeddings were given: what model, weights and training made them is not known."]
    found = []
    if not context.pretrained:
        found.append(f"The weights started at random ({context.spec or 'unknown'}); the papers' were pretrained.")
    elif context.spec not in _WEIGHTS:
        found.append(f"The weights started from {context.spec}, which is not known to be what the papers used.")
    if context.shuffled:
        found.append("The model was trained on shuffled labels, as a control.")
    return found


def _ranking_reasons(own: Mapping[str, Any], context: Context, shown: Sequence[Published]) -> list[str]:
    found = []
    again = [name for name in own if "rerank" in name]
    if again:
        names = ", ".join(label(name) for name in again)
        found.append(f"Re-ranking is on in the row(s) {names}; published rows are without unless they say so.")
    others = [name for name in own if name != "standard" and name not in again]
    if others:
        found.append(f"The row(s) {', '.join(label(name) for name in others)} follow another protocol.")
    rows = _by_row(shown)
    differing = [entries for entries in rows if entries[0].selection != context.selected_on]
    if differing:
        unsaid = sum(entries[0].selection == "not said" for entries in differing)
        found.append(
            f"Our epoch was chosen on {context.selected_on or 'an unknown split'}; of the {len(rows)} published rows "
            f"{len(differing) - unsaid} chose theirs otherwise and {unsaid} do not say."
        )
    if any(entries[0].reranked for entries in rows) and not again:
        found.append("Some published rows are re-ranked, as they say; ours is not.")
    return found


def _lines(facts: Mapping[str, Any], dataset: str, context: Context) -> list[str]:
    people = f"{facts['people']:,} people, " if "people" in facts else ""
    kind = "rendered people" if context.rendered else context.data or "unknown origin"
    spoilt = f", captions degraded ({context.degraded})" if context.degraded else ""
    start = "pretrained" if context.pretrained else "random"
    seed = f", seed {context.seed}" if context.seed is not None else ""
    recipe = f", recipe {context.recipe}" if context.recipe else ""
    chosen = f"epoch {context.epoch} of {context.epochs}, " if context.epoch is not None else ""
    query = f", queries: {context.query}" if facts["direction"] != "i2i" else ""
    again = sorted(name for name in facts["rows"] if "rerank" in name)
    rerank = f"re-ranking in {', '.join(again)} only" if again else "no re-ranking"
    weights = f"{context.method or 'unknown method'} on {context.spec or 'unknown weights'} ({start} start)"
    if context.given:
        weights = "those of whatever made the given embeddings"
    counted = f"{facts['queries']:,} queries, {facts['skipped']:,} without a match skipped"
    return [
        f"Data: {dataset} ({kind}), {context.split} split, {people}{facts['gallery']:,} gallery images{spoilt}.",
        f"Weights: {weights}{recipe}{seed}, {chosen}chosen on {context.selected_on or 'an unknown split'}.",
        f"Protocol: {counted}{query}; {TIES}; {rerank}; 95 % intervals over people.",
    ]


class _Footnotes:
    """Sentences numbered in the order in which rows need them."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def refer(self, sentences: Sequence[str]) -> str:
        """Return the numbers of the sentences, as a cell."""
        found = {self._number.setdefault(sentence, len(self._number) + 1) for sentence in sentences}
        return " ".join(str(number) for number in sorted(found))

    @property
    def lines(self) -> list[str]:
        """The sentences with their numbers."""
        return [f"{number}. {sentence}" for sentence, number in self._number.items()]


def _own_row(condition: str, values: Mapping[str, Any], dataset: str, context: Context) -> tuple[str, ...]:
    cells = [interval(*values[metric]) if metric in values else "-" for metric in METRICS]
    name = label(condition).removeprefix("model").lstrip(", ")
    return (f"ours{f', {name}' if name else ''}", "this run", dataset, *cells, context.spec, context.selected_on, "")


def _published_row(entries: Sequence[Published], numbers: _Footnotes) -> tuple[str, ...]:
    first = entries[0]
    printed = {entry.metric: entry.printed for entry in entries}
    said = [note for entry in entries for note in entry.notes]
    if first.note:
        said.append(f"{first.paper}: {first.note}")
    marks = [text for text, holds in (("re-ranked", first.reranked), ("unverified", not first.verified)) if holds]
    # Every paper calls its own method so; above them stands our own row.
    name = f'"Ours" of {first.paper}' if first.row == "Ours" else first.row
    return (
        f"{name} ({', '.join(marks)})" if marks else name,
        f"{first.paper}, {first.table}{', quoted' if first.quoted else ''}",
        first.dataset,
        *(printed.get(metric, "-") for metric in METRICS),
        first.backbone or first.pretraining or "not said",
        first.selection,
        numbers.refer(said),
    )


def _by_row(entries: Sequence[Published]) -> list[list[Published]]:
    """The numbers of one row of one table on one dataset together, in printed order."""
    found: dict[tuple[str, ...], list[Published]] = {}
    for entry in entries:
        found.setdefault((entry.paper, entry.table, entry.row, entry.dataset), []).append(entry)
    return list(found.values())


def _option(command: Sequence[str], name: str) -> str:
    """The value that a command line gave an option, if it did."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return ""


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
