"""What a setting costs: the queries of each setting, drops against a reference paired by query, and spoilt pictures.

Texts of two kinds cannot be compared, so there are two references: `standard`, the captions, for settings that change
captions or pictures, and `standard-texts`, identity text + clothing text, for the two that change those.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from reidctl.augment import Interpolation
from reidctl.evaluation.exchange import conflicting_donors
from reidctl.evaluation.paired import COLUMNS, Difference, intervals_over_people, paired_differences
from reidctl.evaluation.paraphrase import STYLES, paraphrase
from reidctl.evaluation.protocols import Protocol
from reidctl.evaluation.settings import SETTINGS, degrade_image, degrade_texts, level_of
from reidctl.metrics import METRICS, Interval, bootstrap_interval, chance, mean
from reidctl.pixels import PixelStore, read_pixels

Floats = npt.NDArray[np.float64]
Objects = npt.NDArray[np.object_]

CAPTIONS, TEXTS = "standard", "standard-texts"
"""The two reference rows."""
MEAN = -1
"""The `seed` of a row that is the mean over seeds."""
RESAMPLES = 2000
"""Bootstrap samples and sign patterns of a drop."""


@dataclass(frozen=True)
class Case:
    """One measurement: a setting, or one style of it, with one seed.

    Attributes:
        row: how tables name it: the setting, with a colon and the style for a paraphrase.
        setting: the setting of the registry.
        reference: what it is compared with, `standard` or `standard-texts`.
        seed: of its random choices.
        level: its strength; None where it has none.
        texts: the queries of the reference, changed, in its order; None for a setting of pictures.
    """

    row: str
    setting: str
    reference: str
    seed: int
    level: float | None = None
    texts: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """What tells it apart: the row and the seed."""
        return f"{self.row}#{self.seed}"

    def spoils(self, direction: str) -> str | None:
        """Return which side it spoils: `queries`, `gallery` or `both`; None for a reference."""
        if self.row == self.reference:
            return None
        if self.texts is not None:
            return "queries"
        if direction == "t2i":
            return "gallery"
        return "both" if self.setting == "blank" else "queries"


def caption_cases(
    names: Sequence[str], ids: Sequence[str], texts: Sequence[str], *, seed: int = 0, level: float | None = None
) -> list[Case]:
    """Return the settings that change captions, one case per style for `paraphrase`."""
    found: list[Case] = []
    for name in names:
        if SETTINGS[name].kind != "caption":
            continue
        own = level_of(name, level)
        if name != "paraphrase":
            changed = degrade_texts(name, ids, texts, seed=seed, share=own)
            found.append(Case(name, name, CAPTIONS, seed, own, tuple(changed)))
            continue
        for style in STYLES:
            changed = [paraphrase(text, style) for text in texts]
            found.append(Case(f"paraphrase:{style}", name, CAPTIONS, seed, None, tuple(changed)))
    return found


def described_cases(names: Sequence[str], rows: pd.DataFrame, *, seed: int = 0, clothing: bool = True) -> list[Case]:
    """Return the settings that change identity and clothing texts.

    Args:
        names: settings; others than these are passed over.
        rows: one query each: caption_id, dataset, person_id, outfit_id (None where unknown), identity, clothing.
        seed: clothes-conflict takes this one and the next two.
        clothing: whether the queries hold the clothing text at all; without it no setting can change them.

    Raises:
        DataError: nobody to exchange clothes with, see `conflicting_donors`.
    """
    identity = [str(text) for text in rows["identity"]]
    found: list[Case] = []
    if "identity-only" in names:
        found.append(Case("identity-only", "identity-only", TEXTS, seed, None, tuple(identity)))
    if "clothes-conflict" in names:
        for number in range(seed, seed + 3):
            texts = _conflict(rows, number) if clothing else identity
            found.append(Case("clothes-conflict", "clothes-conflict", TEXTS, number, None, tuple(texts)))
    return found


def _conflict(rows: pd.DataFrame, seed: int) -> list[str]:
    """Identity texts with somebody else's clothing text, exchanged within each dataset."""
    worn = np.empty(len(rows), object)
    for dataset in sorted(set(rows["dataset"])):
        place = np.flatnonzero(rows["dataset"] == dataset)
        mine = rows.iloc[place]
        clothing = [str(text) for text in mine["clothing"]]
        donors = conflicting_donors(
            clothing,
            [str(name) for name in mine["person_id"]],
            outfits=[name if isinstance(name, str) else None for name in mine["outfit_id"]],
            ids=[str(name) for name in mine["caption_id"]],
            seed=seed,
        )
        worn[place] = [clothing[donor] for donor in donors]
    return [f"{identity} {clothing}".strip() for identity, clothing in zip(rows["identity"], worn, strict=True)]


def image_cases(names: Sequence[str], *, seed: int = 0, level: float | None = None) -> list[Case]:
    """Return the settings that change pictures."""
    chosen = [name for name in names if SETTINGS[name].kind == "image"]
    return [Case(name, name, CAPTIONS, seed, level_of(name, level)) for name in chosen]


class SpoiltImages(PixelStore):
    """Images under a setting: decoded at their own size, changed, then resized as the checkpoint wants them.

    Nothing is kept in memory: a setting reads every image once.

    Args:
        paths: one file per row.
        names: image ids; each seeds its own random stream.
        sizes: (height, width) of each file.
        size: (height, width) of what is returned.
        interpolation: how they are resized.
        setting: one of `settings.IMAGE_SETTINGS`.
        level: its strength.
        seed: of its random choices.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        names: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        size: tuple[int, int],
        *,
        interpolation: Interpolation,
        setting: str,
        level: float | None,
        seed: int,
    ) -> None:
        super().__init__(paths, size, cache_bytes=0, interpolation=interpolation)
        self.names, self.sizes = list(names), list(sizes)
        self.setting, self.level, self.seed = setting, level, seed

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """Return image `row`, shape (H, W, 3), spoilt; see `read_pixels` for what is raised."""
        pixels = read_pixels(self.paths[row], self.sizes[row])  # at its own size nothing is resampled
        changed = degrade_image(self.setting, self.names[row], pixels, seed=self.seed, strength=self.level)
        resampling = Image.Resampling[self.interpolation.upper()]
        return np.asarray(Image.fromarray(changed).resize((self.size[1], self.size[0]), resampling))


@dataclass(frozen=True)
class Scores:
    """What the queries of one measurement scored, sorted by query id.

    Attributes:
        query: query ids, shape (Q,).
        person: the person of each.
        matches: relevant gallery items of each; 0 for a skipped query.
        ranked: gallery items ranked for each.
        values: per-query values by metric, NaN for a skipped query; rank-k beyond the gallery is left out.
        vectors: digest of all vectors that were compared: equal digests mean the same numbers, bit for bit.
    """

    query: Objects
    person: Objects
    matches: npt.NDArray[np.int64]
    ranked: npt.NDArray[np.int64]
    values: dict[str, Floats]
    vectors: str = ""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Which queries have a match and are therefore scored."""
        return np.asarray(self.matches > 0)

    def intervals(self, seed: int = 0) -> dict[str, Interval]:
        """Return every metric with its interval over people; nothing if no query is scored."""
        kept = self.valid
        if not kept.any():
            return {}
        scored = {name: values[kept] for name, values in self.values.items()}
        return intervals_over_people(scored, self.person[kept], seed=seed)


def scores_of(frame: pd.DataFrame, vectors: str = "") -> Scores:
    """Return the rows of a `queries` table, one per query, as scores."""
    frame = frame.sort_values("query_id", kind="stable")
    values = {name: frame[column].to_numpy(np.float64) for name, column in COLUMNS.items()}
    values["rSum"] = values["rank1"] + values["rank5"] + values["rank10"]
    matches = frame["matches"].to_numpy(np.int64)
    # Rank-k of a gallery with fewer than k images is empty for every query.
    known = {name: values[name] for name in METRICS if not np.isnan(values[name][matches > 0]).any()}
    people = frame["person_id"].to_numpy(object)
    return Scores(
        frame["query_id"].to_numpy(object), people, matches, frame["gallery"].to_numpy(np.int64), known, vectors
    )


def averaged(parts: Sequence[Scores]) -> Scores:
    """Return each query's mean over several seeds: one value per query, so that intervals are still over people."""
    first = parts[0]
    assert all((part.query == first.query).all() for part in parts), "the same queries under every seed"
    values = {name: np.mean([part.values[name] for part in parts], axis=0) for name in first.values}
    alike = len({part.vectors for part in parts}) == 1
    return replace(first, values=values, vectors=first.vectors if alike else "")


def drops(reference: Scores, setting: Scores, *, seed: int = 0) -> dict[str, Difference]:
    """Return by metric what a setting costs, reference minus setting, paired by query; see `paired_differences`.

    Args:
        reference: the scores of unchanged queries.
        setting: those of the same queries (by id) under the setting.
        seed: of the interval and the p-value.
    """
    return _paired(reference.values, setting.values, (reference, setting), seed)


def drop_differences(
    model: tuple[Scores, Scores], control: tuple[Scores, Scores], *, seed: int = 0
) -> dict[str, Difference]:
    """Return by metric the model's drop minus the control's, paired by query; each pair is (reference, setting).

    Below zero the model loses less than the control.
    """
    mine, theirs = (
        {name: before.values[name] - after.values[name] for name in before.values} for before, after in (model, control)
    )
    return _paired(mine, theirs, (*model, *control), seed)


def _paired(
    ours: Mapping[str, Floats], other: Mapping[str, Floats], parts: Sequence[Scores], seed: int
) -> dict[str, Difference]:
    first = parts[0]
    assert all(np.array_equal(part.query, first.query) for part in parts), "paired by query"
    kept = first.valid
    if not kept.any():
        return {}
    mine, its = ({name: values[name][kept] for name in ours} for values in (ours, other))
    return paired_differences(mine, its, first.person[kept], seed=seed, resamples=RESAMPLES)


def vectors_digest(protocol: Protocol) -> str:
    """Return the digest of all vectors that a protocol compares, query side and gallery side."""
    state = hashlib.sha256()
    for side in (protocol.query, protocol.gallery):
        # By id, so that the order of the rows does not matter.
        order = np.argsort(side.item.astype(str), kind="stable")
        state.update(np.ascontiguousarray(side.vectors[order]).tobytes())
    return state.hexdigest()


def chance_note(scores: Scores) -> str:
    """Return a sentence on whether blank pictures gave chance, as they must."""
    expected = chance(scores.matches, scores.ranked)
    wrong = [
        name
        for name, values in scores.values.items()
        if not np.allclose(values, expected.values(name), rtol=0, atol=1e-9, equal_nan=True)
    ]
    if wrong:
        return f"Blank pictures must give chance and do not ({', '.join(wrong)}): something else tells them apart."
    return "Exactly chance, as blank pictures must give: nothing but the picture reaches the gallery."


def weakness_note(reference: Scores, *, seed: int = 0) -> str:
    """Return a warning where the reference is not above chance: what finds nothing cannot fall; "" elsewhere.

    Not above chance: the 95 % interval over people of AP minus its value by chance reaches zero.
    """
    if not reference.valid.any():
        return ""
    own, expected = reference.values["mAP"], chance(reference.matches, reference.ranked).values("mAP")
    if bootstrap_interval(own - expected, reference.person, seed=seed).low > 0:
        return ""
    kept = reference.valid
    return (
        f"Not above chance (mAP {100 * mean(own[kept]):.1f} % against {100 * mean(expected[kept]):.1f} %): what finds "
        "nothing cannot fall, so small drops against it are no robustness."
    )


def equality_note(case: Case, reference: Scores, scores: Scores, *, same_texts: bool) -> str:
    """Return why a row equals its reference, so that nobody takes it for robustness; "" where it does not.

    Args:
        case: the setting.
        reference: what it is compared with.
        scores: what it scored.
        same_texts: whether every query text is the reference's.
    """
    if same_texts and case.reference == TEXTS:
        return (
            "The queries contain no clothing text, so the setting cannot change anything: "
            "equal by construction, not robustness."
        )
    if same_texts or (case.level == 0 and case.texts is None):
        return "The setting left every query as it was: equal by construction, not robustness."
    if reference.vectors and reference.vectors == scores.vectors:
        return (
            "The model does not read what the setting changes (all vectors are equal): by construction, not robustness."
        )
    if all(np.array_equal(values, scores.values[name], equal_nan=True) for name, values in reference.values.items()):
        return "The setting changed vectors, but the metrics of no query."
    return ""


def against_control(row: Mapping[str, Any]) -> list[str]:
    """Return a sentence on how the model's drop of rank-1 compares with the control's, whichever way it goes."""
    value, low, high, p = (100 * number if number is not None else math.nan for number in row["values"]["rank1"])
    verdict = "" if low > 0 or high < 0 else ", which may be chance"
    more = f"{abs(value):.1f} points {'less' if value < 0 else 'more'} than" if value else "as far as"
    return [
        f"{row['dataset']}, {row['setting']}: rank-1 falls {more} the control's "
        f"(difference of drops {value:.1f}, 95 % interval {low:.1f} to {high:.1f}, p = {p / 100:.3f}){verdict}."
    ]


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return printed rows as rows of the `robustness` table: one per metric, the ceiling in those of rank1."""
    kept = ("model", "direction", "dataset", "split", "setting", "reference", "seed", "queries", "skipped", "gallery")
    found = []
    for row in rows:
        for metric, (value, low, high) in row["values"].items():
            drop = dict(zip(("drop", "drop_low", "drop_high", "p_value"), row["drops"].get(metric, ()), strict=False))
            ceiling = row["ceiling"] if metric == "rank1" else None
            common = {name: row[name] for name in (*kept, "level", "note")}
            found.append(
                {**common, "metric": metric, "value": value, "low": low, "high": high, **drop, "ceiling": ceiling}
            )
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the model's values by direction: `rank1` of the captions, `typos/rank1` of a setting.

    Of several datasets and seeds the lowest, so that a floor guards them all.
    """
    lowest: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] != "model":
            continue
        held = lowest.setdefault(row["direction"], {})
        for metric, (value, _, _) in row["values"].items():
            name = metric if row["setting"] == CAPTIONS else f"{row['setting']}/{metric}"
            held[name] = min(value, held.get(name, math.inf))
    return lowest


def shown(found: Mapping[str, Difference]) -> dict[str, list[float | None]]:
    """Return differences by metric as [mean, low, high, p], JSON values."""
    return {name: numbers(it.difference, it.low, it.high, it.p_value) for name, it in found.items()}


def numbers(*values: float) -> list[float | None]:
    """Return numbers as JSON values: None for NaN."""
    return [None if math.isnan(value) else value for value in values]
