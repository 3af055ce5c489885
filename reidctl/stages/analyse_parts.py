"""The analyses of `analyse`: each reads features and labels and adds rows, notes and figures to what was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.console import progress
from reidctl.data import Corpus
from reidctl.embedding import embed_queries
from reidctl.evaluation import clones as looks
from reidctl.evaluation import dependence as hsic
from reidctl.evaluation import probes as probing
from reidctl.evaluation.architecture import describe
from reidctl.evaluation.efficiency import measure_costs
from reidctl.evaluation.probes import Probe
from reidctl.metrics import Interval, bootstrap_interval
from reidctl.report.scatter import dot_panels, order_targets
from reidctl.stages.features import Features, families, whole_families
from reidctl.stages.gates import collect_gates, write_gates
from reidctl.stages.kept_features import Kept, kept_features
from reidctl.stages.measuring import Subject
from reidctl.tables import write_text

Row = dict[str, Any]
Labels = npt.NDArray[np.object_]
Draw = Callable[[Path], list[Path]]

COUPLED = (("identity", "clothing"), ("pooled_identity", "pooled_clothing"))
DEPENDENCE_IMAGES = 1000


class NotApplicable(Exception):
    """An analysis that this model or these data do not allow; says why in one sentence."""


@dataclass(frozen=True)
class Material:
    """What is analysed.

    Attributes:
        subject: the model and the split.
        corpus: the images of the split that are looked at, with their texts.
        seed: of all random choices.
        sensitive: whether skin and ethnicity are probed too.
        highlight: people who stand out in the t-SNE map; empty: the two with most images.
        probed: the features that probes read; empty: all.
        cache: whether features are read from the run and kept there.
        against: another model on the same images.
    """

    subject: Subject
    corpus: Corpus
    seed: int = 0
    sensitive: bool = False
    highlight: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    cache: bool = True
    against: "Material | None" = None

    @cached_property
    def kept(self) -> Kept:
        """The features of all images, and where they are kept."""
        return kept_features(self.subject, self.corpus, cache=self.cache)

    @property
    def features(self) -> Features:
        """The features of all images, by name."""
        return self.kept.features

    @property
    def features_read(self) -> dict[str, Any] | None:
        """What the record says about the features; None if no analysis has asked for them."""
        return self.kept.facts if "kept" in vars(self) else None

    @property
    def images(self) -> pd.DataFrame:
        """The rows of the table `images`."""
        return self.corpus.images

    @property
    def person(self) -> Labels:
        """The person of each image."""
        return self.images["person_id"].astype(str).to_numpy(dtype=object)


@dataclass
class Found:
    """What the analyses found so far; figures are drawn when all is known to be well.

    Attributes:
        rows: of the table `analysis`.
        notes: what readers of the numbers must know.
        drawings: write figures into a folder, and return their paths.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawings: list[Draw] = field(default_factory=list)

    def add(
        self,
        analysis: str,
        feature: str,
        target: str,
        metric: str,
        value: Interval | float,
        size: tuple[int, int],
        **beside: float,
    ) -> None:
        """Add a number that was measured on a number of (items, people), `beside` it its control, chance, ..."""
        numbers = vars(value) if isinstance(value, Interval) else {"value": value}
        named = {"analysis": analysis, "feature": feature, "target": target, "metric": metric}
        self.rows.append({**named, **numbers, **beside, "items": size[0], "people": size[1]})

    def of(self, analysis: str, metric: str) -> pd.DataFrame:
        """Return the rows of one analysis and metric, with low, high and control even where nobody has one."""
        rows = [row for row in self.rows if (row["analysis"], row["metric"]) == (analysis, metric)]
        return pd.DataFrame(rows).reindex(columns=["feature", "target", "value", "low", "high", "control"])


def probes(material: Material, found: Found) -> None:
    """Read every attribute and the person from every feature."""
    images, person = material.images, material.person
    family = families(images)
    labels, left_out = probing.attribute_labels(images, family, sensitive=material.sensitive)
    identity = _identity_tasks(images)
    if not labels and not identity:
        raise NotApplicable(
            "the images have no attribute that can be probed (2 to 20 values, at least 8 people), and no two people "
            "have two images each"
        )
    if left_out:
        found.notes.append(
            "probes: left out are attributes with fewer than 2 or more than 20 values (of two people or more each), or "
            f"on fewer than 8 people: {', '.join(sorted(left_out))}."
        )
    elif not labels:
        found.notes.append("probes: the images have no attributes, so only who somebody is was probed.")
    features = {name: v for name, v in material.features.items() if not material.probed or name in material.probed}
    if not features:
        raise NotApplicable(f"`{material.subject.method.name}` has none of the features {', '.join(material.probed)}")
    with progress("probes", len(features) * (len(labels) + len(identity)), unit="probes") as advance:
        for feature, values in features.items():
            groups: dict[str, list[Probe]] = {"clothing": [], "body": [], "other": []}
            for attribute in sorted(labels, key=lambda name: (list(groups).index(probing.group_of(name)), name)):
                label = labels[attribute]
                known = np.array([value is not None for value in label])
                probe = probing.probe_attribute(
                    values[known], label[known], person[known], family=family[known], seed=material.seed
                )
                groups[probing.group_of(attribute)].append(probe)
                _add_probe(found, feature, attribute, probe)
                advance()
            for group in ("clothing", "body"):
                _add_group(found, feature, group, groups[group], material.seed)
            for target, place in identity.items():
                one = probing.probe_identity(values, person, place, strict=target != "person", seed=material.seed)
                assert one is not None, "identity tasks have people"
                _add_probe(found, feature, target, one)
                advance()
    if "person" in identity and "person-across-outfits" not in identity:
        found.notes.append(
            "probes: nobody changes clothes in these images, so outfits name people, and a feature of clothes alone "
            "may name the person too."
        )
    found.drawings.append(lambda folder: _draw_probes(found, folder))


def _identity_tasks(images: pd.DataFrame) -> dict[str, Labels]:
    """What divides the images of a person, by the name of the question; only questions that two people can be asked."""
    person = images["person_id"].astype(str).to_numpy(dtype=object)
    name = images["image_id"].astype(str).to_numpy(dtype=object)
    camera = np.where(images["camera_id"].isna(), name, images["camera_id"].astype(object))
    tasks = {"person": camera.astype(object)}
    if images["outfit_id"].notna().all():
        tasks["person-across-outfits"] = images["outfit_id"].to_numpy(dtype=object)
    frames = {task: pd.DataFrame({"person": person, "place": place, "name": name}) for task, place in tasks.items()}
    enough = {
        task: (frame.groupby("person")["name" if task == "person" else "place"].nunique() > 1).sum()
        for task, frame in frames.items()
    }
    return {task: place for task, place in tasks.items() if enough[task] > 1}


def _add_probe(found: Found, feature: str, target: str, probe: Probe) -> None:
    size = probe.images, probe.people
    beside = {"control": probe.control, "chance": probe.chance}
    found.add("probes", feature, target, "accuracy", probe.accuracy, size, **beside)
    if probe.balanced is not None:
        beside = {"control": probe.balanced_control, "chance": 1 / probe.classes}
        found.add("probes", feature, target, "balanced-accuracy", probe.balanced, size, **beside)


def _add_group(found: Found, feature: str, group: str, members: list[Probe], seed: int) -> None:
    if not members:
        return
    size = sum(probe.images for probe in members), len({name for probe in members for name in probe.person})
    beside = {name: float(np.mean([getattr(probe, name) for probe in members])) for name in ("control", "chance")}
    found.add("probes", feature, group, "accuracy", probing.mean_accuracy(members, seed=seed), size, **beside)
    found.add("probes", feature, group, "excess", probing.excess(members, seed=seed), size)


def _draw_probes(found: Found, folder: Path) -> list[Path]:
    last = ("clothing", "body", "person", "person-across-outfits")
    rows = order_targets(found.of("probes", "accuracy"), last)
    means = {"clothing": "mean of clothing", "body": "mean of body"}
    rows["target"] = rows["target"].replace(means)
    label = "percent of images of unseen people (of other images, for person), 95 % interval"
    return dot_panels(rows, folder / "probes", label=label, control="exchanged labels")


def dependence(material: Material, found: Found) -> None:
    """Measure how much the two streams of a method depend on each other."""
    pairs = [pair for pair in COUPLED if set(pair) <= set(material.features)]
    if not pairs:
        raise NotApplicable(f"the method `{material.subject.method.name}` does not separate identity from clothing")
    rows = whole_families(material.images, DEPENDENCE_IMAGES, seed=material.seed)
    person = material.person[rows]
    people = len(set(person))
    if people < hsic.FEWEST_PEOPLE:
        raise NotApplicable(f"{people} people are too few to exchange; at least {hsic.FEWEST_PEOPLE} are needed")
    for one, other in pairs:
        sides = material.features[one][rows], material.features[other][rows]
        for metric, value in hsic.dependence(*sides, person, seed=material.seed).items():
            found.add("dependence", one, other, metric, size=(len(rows), people), **vars(value))
    if len(rows) < len(material.images):
        found.notes.append(f"dependence: measured on {len(rows):,} images, drawn as whole people.")
    if len(pairs) == 2 and getattr(material.subject.method.config, "gate", False):
        found.notes.append(
            "dependence: the gated features share their gate (g and 1 - g), which couples them by itself; the pooled "
            "pair is from before the gate."
        )


def clones(material: Material, found: Found) -> None:
    """Ask on look-alikes whether body or clothes decide."""
    alike = looks.look_alikes(material.images)
    if not alike.pairs:
        raise NotApplicable(
            "no two people are named as look-alikes (attributes `clone_of` and `clone_kind`, as of rendered people)"
        )
    if alike.pairs < looks.FEWEST_PAIRS:
        found.notes.append(f"clones: {alike.pairs} pair(s) of look-alikes are too few for intervals.")
    for feature, values in material.features.items():
        _add_shares(found, feature, "i2i", looks.image_shares(values, alike, seed=material.seed))
    texts = material.corpus.captions
    texts = texts[alike.partner[texts["row"].to_numpy(int)] >= 0]
    if len(texts):
        sentences = [str(text) for text in texts["text"]]
        with progress("texts", len(sentences), unit="texts") as advance:
            vectors = embed_queries(material.subject.method, sentences, device=material.subject.device, advance=advance)
        row = texts["row"].to_numpy(np.int64)
        found_shares = looks.text_shares(vectors, row, material.features["embedding"], alike, seed=material.seed)
        _add_shares(found, "embedding", "t2i", found_shares)
    found.drawings.append(lambda folder: _draw_clones(found, folder))


def _add_shares(found: Found, feature: str, metric: str, shares: dict[str, looks.Share]) -> None:
    for kind, share in shares.items():
        found.add("clones", feature, kind, metric, share.share, (share.questions, 2 * share.pairs), chance=0.5)


def _draw_clones(found: Found, folder: Path) -> list[Path]:
    named = {
        "outfit": "same outfit, other body",
        "body": "same body, other outfit",
        "outfit-changed": "other body in the old outfit",
        "strangers": "strangers",
    }
    images, texts = found.of("clones", "i2i"), found.of("clones", "t2i")
    images["target"] = images["target"].replace(named)
    texts["target"] = [f"{named[target]} (text)" for target in texts["target"]]
    label = "percent of comparisons that the person wins (dotted: chance), 95 % interval"
    return dot_panels(pd.concat([images, texts]), folder / "clones", label=label, control="", reference=0.5)


def gates(material: Material, found: Found) -> None:
    """Summarise the gates of a method, over images."""
    names, values = collect_gates(
        material.subject.method, material.corpus, device=material.subject.device, seed=material.seed
    )
    if not values:
        raise NotApplicable(f"the method `{material.subject.method.name}` has no gates here")
    of = dict(zip(material.images["image_id"], material.person, strict=True))
    person = np.array([of[name] for name in names], dtype=object)
    size = len(names), len(set(person))
    for gate, each in values.items():
        found.add("gates", gate, "", "mean", bootstrap_interval(each, person, seed=material.seed), size)
        found.add("gates", gate, "", "std", float(each.std()), size)
    if "image" not in values and hasattr(material.subject.method, "fusion"):
        found.notes.append("gates: the images have no identity texts, so there are no fusion weights to look at.")
    found.drawings.append(lambda folder: write_gates(folder, names, values))


def efficiency(material: Material, found: Found) -> None:
    """Measure what the parts of the model cost, on noise of its own input sizes."""
    costs = measure_costs(material.subject.method, device=material.subject.device)
    for part, cost in costs.items():
        size = cost.batch, 0
        for metric in ("parameters", "trainable", "flops", "kept_bytes", "items_per_second", "milliseconds"):
            found.add("efficiency", part, "", metric, float(getattr(cost, metric)), size)
        if cost.peak_bytes is not None:
            found.add("efficiency", part, "", "peak_bytes", float(cost.peak_bytes), size)
    one = next(iter(costs.values()))
    whole = ("image", "text", "fusion", "step")
    # `image_without_...` is no part but the encoder again: its row stands beside that of `image`.
    for part in [name for name in costs if name not in whole and not name.startswith("image_")]:
        cost, image = costs[part], costs["image"]
        found.notes.append(
            f"efficiency: {part}: {cost.parameters:,} parameters ({_share(cost.parameters, image.parameters)} of those "
            f"of image) and {cost.milliseconds:.3g} ms per batch ({_share(cost.milliseconds, image.milliseconds)})."
        )
    found.notes.append(
        f"efficiency: batches of {one.batch} on {one.device} with {one.threads} thread(s), longest texts; operations"
        " count a multiply-add as two; speed depends on what else the machine did."
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %"


def architecture(material: Material, found: Found) -> None:
    """Describe the built model: flow graph, parts with parameters and shapes, who reads what."""
    text = describe(material.subject.method)

    def write(folder: Path) -> list[Path]:
        write_text(folder / "architecture.md", text)
        return [folder / "architecture.md"]

    found.drawings.append(write)
