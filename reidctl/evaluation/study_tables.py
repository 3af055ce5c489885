"""A study's results as tables and as a Markdown page, ours beside the printed numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from reidctl.evaluation.claims import Estimate, Judgement, Values, estimate, holm
from reidctl.evaluation.published import Published, registry
from reidctl.evaluation.render import BANNER, Grid, escape_markdown, markdown
from reidctl.evaluation.study import Column, Study
from reidctl.naming import DIRECTIONS
from reidctl.schemas import SCHEMAS

_FRACTIONS = frozenset({"rank1", "rank5", "rank10", "rank20", "mAP", "mINP", "drop", "ceiling"})
_DIFFERENT = (
    f"{BANNER}: our people are rendered, the towers are small and were trained on rendered people; the printed numbers "
    "are of photographs, pretrained ViT-B/16 and BERT. Only the order of rows can be looked at, not their values."
)


def value_rows(values: Values) -> pd.DataFrame:
    """Return the table `study`: one row per condition, seed and measure."""
    return pd.DataFrame(
        [
            {"condition": condition, "seed": seed, "measure": measure, "value": value}
            for condition, by_seed in values.items()
            for seed, found in by_seed.items()
            for measure, value in sorted(found.items())
        ],
        columns=SCHEMAS["study"].names,
    )


def claim_rows(judged: Sequence[Judgement]) -> pd.DataFrame:
    """Return the table `claims`: one row per claim, with its test."""
    rows = []
    for judgement, adjusted in zip(judged, _adjusted(judged), strict=True):
        claim, effect = judgement.claim, judgement.effect
        rows.append(
            {
                "claim": claim.say,
                "measure": claim.measure,
                "condition": claim.subject,
                "other": claim.than or "",
                "other_measure": claim.versus or "",
                "direction": "more" if claim.more else "less" if claim.less else "at most",
                "bound": claim.at_most,
                "matters": claim.matters,
                "seeds": len(judgement.seeds),
                "effect": effect.mean if effect else None,
                "low": _finite(effect.low) if effect else None,
                "high": _finite(effect.high) if effect else None,
                "p_value": effect.p_value if effect and claim.of is None else None,
                "p_holm": adjusted,
                "verdict": judgement.verdict,
                "reason": judgement.reason,
            }
        )
    return pd.DataFrame(rows, columns=SCHEMAS["claims"].names)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _adjusted(judged: Sequence[Judgement]) -> list[float | None]:
    """Holm's p of the comparisons; bounds have none."""
    tested = [place for place, j in enumerate(judged) if j.effect is not None and j.claim.of is None]
    found: list[float | None] = [None] * len(judged)
    p_values = [j.effect.p_value for j in judged if j.effect is not None and j.claim.of is None]
    for place, value in zip(tested, holm(p_values), strict=True):
        found[place] = value
    return found


def page(study: Study, name: str, values: Values, judged: Sequence[Judgement], *, figure: str, command: str) -> str:
    """Return a study's page: what was done, the table, the claims, and the value of every seed.

    Args:
        study: the study.
        name: of its results.
        values: condition -> seed -> measure -> value.
        judged: its claims.
        figure: where its picture lies, relative to the page; empty if there is none.
        command: what produced it.
    """
    parts = [f"# {escape_markdown(name)}", "", escape_markdown(study.about), "", f"Made by `{command}`.", ""]
    parts += [f"{escape_markdown(_setup(study))}", ""]
    parts += [markdown([_table(study, values)])]
    if judged:
        parts += [markdown([_claims(study, judged)])]
    if figure:
        parts += [f"![{escape_markdown(study.about)}]({figure})", ""]
    parts += [markdown([_seeds(study, values)])]
    parts += [f"- {escape_markdown(note)}" for note in study.notes]
    return "\n".join(parts).rstrip("\n") + "\n"


def overview(shown: Sequence[tuple[str, Study, Sequence[Judgement]]]) -> str:
    """Return one table of the claims of several studies: what holds, what does not, what is undecided.

    Args:
        shown: name, study and judged claims, in order.
    """
    rows = []
    for name, study, judged in shown:
        for judgement in judged:
            claim, effect = judgement.claim, judgement.effect
            column = column_of(study, claim.measure)
            cell = "-" if effect is None else _effect_cell(column, effect, signed=claim.of is None)
            unit = "" if effect is None else _unit(column)
            rows.append((claim.say, f"{cell} {unit}".strip(), judgement.verdict, name))
    counts = {verdict: sum(row[2] == verdict for row in rows) for verdict in ("holds", "does not hold", "undecided")}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    heads = ("claim", "effect [95 % interval]", "verdict", "study")
    return markdown([Grid(f"{len(rows)} claims: {said}", heads, tuple(rows))])


def _unit(column: Column) -> str:
    return "points" if column.unit == "percent" else ""


def _setup(study: Study) -> str:
    synth, train = study.recipe.get("synth", {}), study.recipe.get("train", {})
    seeds = ", ".join(map(str, study.seeds))
    said = [f"Seeds {seeds}: each renders people of its own and trains with itself as seed; the epoch is chosen on "
            "validation people, test people are measured once."]  # fmt: skip
    if "people" in synth:
        said.append(f"{synth['people']} people per seed.")
    if "epochs" in train:
        said.append(f"{train['epochs']} epochs.")
    if study.start is not None:
        people = study.start.get("synth", {}).get("people", "other")
        said.append(f"All trainings start from the same towers, trained once on {people} other rendered people.")
    return " ".join(said)


def _table(study: Study, values: Values) -> Grid:
    named = {p: t for p, t in study.published.items() if any(c.printed_row(p) for c in study.conditions.values())}
    printed = [column for paper, table in named.items() for column in _printed(study, paper, table)]
    heads = ("condition", *(_title(column) for column in study.table), *(title for title, _ in printed))
    rows = []
    for name, condition in study.conditions.items():
        own = [
            _mean_cell(column, [found.get(column.measure) for found in values[name].values()]) for column in study.table
        ]
        rows.append((condition.label or name, *own, *(cells[name] for _, cells in printed)))
    notes = [f"ours: mean ± standard deviation over {len(study.seeds)} seeds"]
    if study.published:
        notes = [_DIFFERENT, *notes, *_papers(study)]
    return Grid("Results", heads, tuple(rows), tuple(notes))


def _title(column: Column) -> str:
    title = column.title or column.measure
    return f"{title}, percent" if column.unit == "percent" else title


def _mean_cell(column: Column, found: Sequence[float | None]) -> str:
    kept = [value for value in found if value is not None and not math.isnan(value)]
    if not kept:
        return "-"
    whole = estimate(kept)
    mean, std = _show(column, whole.mean), _show(column, whole.std)
    return mean if len(kept) == 1 else f"{mean} ± {std}"


def _show(column: Column, value: float) -> str:
    factor = 100.0 if column.unit == "percent" else column.scale
    # A rounded zero has no sign.
    return f"{round(factor * value, column.digits) + 0.0:.{column.digits}f}"


def _printed(study: Study, paper: str, table: str) -> list[tuple[str, dict[str, str]]]:
    """Columns of printed numbers: heading and cell by condition; only metrics that the study shows too."""
    entries = [entry for entry in registry() if entry.paper == paper and entry.table == table]
    shown = {(part[-2] if len(part) > 1 else "", part[-1]) for part in (c.measure.split(".") for c in study.table)}
    several = len({entry.direction for entry in entries}) > 1
    kinds = [(entry.direction, entry.metric) for entry in entries if (entry.direction, entry.metric) in shown]
    found = []
    for direction, metric in dict.fromkeys(kinds):
        mine = [entry for entry in entries if (entry.direction, entry.metric) == (direction, metric)]
        cells = {
            name: _printed_cell(mine, condition.printed_row(paper), metric)
            for name, condition in study.conditions.items()
        }
        found.append((f"{paper} {table}: {f'{direction} ' if several else ''}{metric}", cells))
    return found


def _printed_cell(entries: Sequence[Published], row: str, metric: str) -> str:
    cells = [entry.printed for entry in entries if entry.row == row and entry.metric == metric]
    return cells[0] if cells else "-"


def _papers(study: Study) -> list[str]:
    """Where the printed columns come from, and the contradictions they are part of."""
    found = []
    for paper, table in study.published.items():
        entries = [entry for entry in registry() if entry.paper == paper and entry.table == table]
        for entry in {entry.direction: entry for entry in reversed(entries)}.values():
            where = f"{entry.dataset}, {DIRECTIONS.get(entry.direction, entry.direction)}"
            found.append(f"{paper} {table}: {entry.about}, {where}, as printed")
        if not any(condition.printed_row(paper) for condition in study.conditions.values()):
            found += _printed_rows(entries)
        found += list(dict.fromkeys(note for entry in entries for note in entry.notes))
    return list(dict.fromkeys(found))


def _printed_rows(entries: Sequence[Published]) -> list[str]:
    """A table whose rows are no conditions of ours (settings, gates), row by row."""
    rows: dict[str, list[str]] = {}
    for entry in entries:
        rows.setdefault(entry.row, []).append(f"{entry.metric} {entry.printed}")
    return [f"{entries[0].paper} {entries[0].table}, {row}: {', '.join(cells)}" for row, cells in rows.items()]


def _claims(study: Study, judged: Sequence[Judgement]) -> Grid:
    rows = []
    for judgement, adjusted in zip(judged, _adjusted(judged), strict=True):
        claim, effect = judgement.claim, judgement.effect
        tested = claim.measure + (f" against {claim.versus}" if claim.versus else "")
        column = column_of(study, claim.measure)
        rows.append(
            (
                claim.say,
                tested,
                "-" if effect is None else _effect_cell(column, effect, signed=claim.of is None),
                "-" if adjusted is None else f"{effect.p_value:.3f} / {adjusted:.3f}" if effect else "-",
                judgement.verdict,
                judgement.reason,
            )
        )
    heads = ("claim", "measure", "effect [95 % interval]", "p / Holm", "verdict", "because")
    note = (
        "effect: mean over seeds of the paired difference in the claimed direction (or the value itself where a bound "
        f"is claimed), Student's interval with {len(study.seeds) - 1} degrees of freedom; Holm: p for "
        f"{len(judged)} claims of this study together. The verdict rests on the interval alone."
    )
    return Grid("Claims", heads, tuple(rows), (note,))


def column_of(study: Study, measure: str) -> Column:
    """How a measure is shown: as its column of the table, else in per cent if it is a fraction."""
    for column in study.table:
        if column.measure == measure:
            return column
    parts = measure.split(".")
    fraction = bool(_FRACTIONS & set(parts)) or parts[0] in ("probes", "clones", "gates")
    return Column(measure=measure) if fraction else Column(measure=measure, unit="number", digits=3)


def _effect_cell(column: Column, effect: Estimate, *, signed: bool) -> str:
    mean = _show(column, effect.mean)
    if signed and effect.mean > 0:
        mean = f"+{mean}"
    if not math.isfinite(effect.low):
        return mean
    return f"{mean} [{_show(column, effect.low)}, {_show(column, effect.high)}]"


def _seeds(study: Study, values: Values) -> Grid:
    """The value of every seed: three numbers say more than their mean."""
    heads = ("condition", "seed", *(_title(column) for column in study.table))
    rows = [
        (study.conditions[name].label or name, str(seed), *(_seed_cell(column, found) for column in study.table))
        for name, by_seed in values.items()
        for seed, found in by_seed.items()
    ]
    return Grid("Every seed", heads, tuple(rows))


def _seed_cell(column: Column, found: Mapping[str, Any]) -> str:
    return _show(column, found[column.measure]) if column.measure in found else "-"
