"""What readers of robustness rows must know, as sentences: notes of rows grouped, what was tested, what was drawn."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reidctl.evaluation.robustness import MEAN, TEXTS, Scores, against_control
from reidctl.stages.measuring import Subject
from reidctl.stages.spoiling import Asked, Measured

FEW_PEOPLE = 30
_DRAWN = ("word-dropout", "typos", "occlusion", "illumination")

Row = Mapping[str, Any]


def notes(
    subjects: Mapping[str, Subject],
    asked: Asked,
    measured: Mapping[str, Mapping[str, Measured]],
    scores: Mapping[tuple[str, str], Mapping[str, Scores]],
    rows: Sequence[Row],
    differences: Sequence[Row],
) -> list[str]:
    """Return what readers must know: of the models, of what was left out, of single rows, of the statistics.

    Args:
        subjects: model and control.
        asked: what was measured.
        measured: by model and case.
        scores: the model's, by direction and dataset, then by case.
        rows: as printed.
        differences: as printed.
    """
    said = [*subjects["model"].notes, *asked.notes]
    said += [f"Control: {note}" for note in subjects["control"].notes] if "control" in subjects else []
    for found in measured.values():
        said += [note for part in found.values() for note in part.notes]
    if subjects.get("control") and subjects["control"].method.gallery_texts and asked.ids[TEXTS]:
        said.append("Control: its gallery holds texts of the kind that identity + clothing queries are: not asked so.")
    said += row_notes(rows)
    for row in differences:
        if row["reference"] == TEXTS and row["seed"] in (MEAN, asked.seed) and "rank1" in row["values"]:
            said += against_control(row) if row["setting"] != "clothes-conflict" or row["seed"] == MEAN else []
    said += [*draw_notes(rows), *correction_notes(rows, differences), *people_notes(scores)]
    return list(dict.fromkeys(said))


def row_notes(rows: Sequence[Row]) -> list[str]:
    """Return the notes of rows with the rows that they are about, equal notes of several rows in one sentence."""
    places: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row["note"]:
            where = f"{row['dataset']} {row['direction']}"
            places.setdefault(row["note"], {}).setdefault((where, row["model"]), []).append(row)
    found = []
    for note, by_place in places.items():
        # Models with the same settings in one place stand together, then places with the same models and settings.
        models = _grouped((((where, _settings(part)), model) for (where, model), part in by_place.items()))
        wheres = _grouped((((settings, tuple(names)), where) for (where, settings), names in models.items()))
        found += [
            f"{' and '.join(where)}, {' and '.join(names)}, {settings}: {note}"
            for (settings, names), where in wheres.items()
        ]
    return found


def _grouped(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _settings(rows: Sequence[Row]) -> str:
    """The settings of rows; seeds are named only where the mean over them is not among the rows."""
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(row["setting"], []).append(row["seed"])
    return ", ".join(
        name
        if MEAN in drawn or name != "clothes-conflict"
        else f"{name} (seed {', '.join(str(seed) for seed in drawn)})"
        for name, drawn in seeds.items()
    )


def draw_notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on settings that drew at random once."""
    drawn = {row["setting"]: row["seed"] for row in rows if row["setting"] in _DRAWN and row["level"]}
    if not drawn:
        return []
    seed = next(iter(drawn.values()))
    return [
        f"Drawn at random once (seed {seed}): {', '.join(drawn)}. Their intervals are about other people, not about "
        "another draw."
    ]


def correction_notes(rows: Sequence[Row], differences: Sequence[Row]) -> list[str]:
    """Return a sentence on how many p-values there are; none is corrected."""
    drops, gaps = (
        sum(value[3] is not None for row in part for value in row[key].values())
        for part, key in ((rows, "drops"), (differences, "values"))
    )
    if not drops:
        return []
    against = f" and {gaps:,} differences of drops" if gaps else ""
    return [
        f"{drops:,} drops{against} were tested and no p-value is corrected for that: about one test in twenty gives "
        "p < 0.05 where nothing differs."
    ]


def people_notes(scores: Mapping[tuple[str, str], Mapping[str, Scores]]) -> list[str]:
    """Return a warning about few people, whose intervals are too narrow; captions and described texts may differ."""
    few = {}
    for (direction, dataset), parts in scores.items():
        people = min((len(set(part.person[part.valid])) for part in parts.values() if part.valid.any()), default=0)
        if 0 < people < FEW_PEOPLE:
            few[f"{dataset} {direction}"] = people
    if not few:
        return []
    counted = ", ".join(f"{people} ({where})" for where, people in few.items())
    return [f"Fewer than {FEW_PEOPLE} people: {counted}. 95 % intervals over so few are too narrow."]
