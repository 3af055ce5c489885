"""Notes of robustness rows: grouped, counted, and said once."""

import numpy as np

from reidctl.evaluation.robustness import Scores
from reidctl.stages.robustness_notes import correction_notes, draw_notes, people_notes, row_notes


def row(setting, note=None, *, model="model", direction="t2i", dataset="d", seed=0, level=0.3, drops=None):
    where = {"model": model, "direction": direction, "dataset": dataset}
    return {**where, "setting": setting, "seed": seed, "level": level, "note": note, "drops": drops or {}}


def test_equal_notes_of_several_rows_are_one_sentence():
    rows = [
        row(setting, "Same.", model=model, direction=direction)
        for direction in ("t2i", "i2i")
        for model in ("model", "control")
        for setting in ("typos", "blur")
    ]
    assert row_notes(rows) == ["d t2i and d i2i, model and control, typos, blur: Same."]
    # Where the places differ they are named one by one.
    assert row_notes(rows[:-1]) == [
        "d t2i, model and control, typos, blur: Same.",
        "d i2i, model, typos, blur: Same.",
        "d i2i, control, typos: Same.",
    ]
    assert row_notes([row("typos")]) == []


def test_a_seed_is_named_only_where_the_mean_does_not_say_the_same():
    seeds = [row("clothes-conflict", "Equal.", seed=seed) for seed in (0, 2)]
    assert row_notes(seeds) == ["d t2i, model, clothes-conflict (seed 0, 2): Equal."]
    assert row_notes([*seeds, row("clothes-conflict", "Equal.", seed=-1)]) == ["d t2i, model, clothes-conflict: Equal."]


def test_what_was_drawn_once_is_named_unless_nothing_was_drawn():
    rows = [row("typos", seed=4), row("blur", seed=4), row("occlusion", seed=4), row("illumination", seed=4, level=0.0)]
    (note,) = draw_notes(rows + rows)
    assert note.startswith("Drawn at random once (seed 4): typos, occlusion. ")
    assert draw_notes([row("blur")]) == []


def test_tests_are_counted_with_those_against_the_control():
    rows = [row("typos", drops={"rank1": [0.1, 0, 0.2, 0.5], "mAP": [0.1, 0, 0.2, None]}), row("standard")]
    assert correction_notes(rows, [])[0].startswith("1 drops were tested")
    assert correction_notes(rows, [{"values": {"mAP": [0, 0, 0, 1.0]}}])[0].startswith(
        "1 drops and 1 differences of drops"
    )
    assert correction_notes([row("standard")], []) == []


def test_few_people_are_counted_among_the_scored_queries():
    def scores(people, scored):
        names = np.asarray([f"p{number}" for number in range(people)], object)
        return {"x": Scores(names, names, (np.arange(people) < scored).astype(np.int64), np.ones(people, np.int64), {})}

    (note,) = people_notes({("t2i", "d"): scores(40, 29), ("i2i", "d"): scores(40, 30)})
    assert "Fewer than 30 people: 29 (d t2i)." in note and "too narrow" in note
    assert people_notes({("t2i", "d"): scores(30, 30), ("i2i", "d"): scores(9, 0)}) == []
