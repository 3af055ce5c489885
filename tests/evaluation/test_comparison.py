import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pandas as pd
import pytest

from reidctl import tables
from reidctl.evaluation.comparison import SIZES, Context, compare, context_of
from reidctl.evaluation.origin import mark
from reidctl.evaluation.published import comparison
from reidctl.runs import Run, digest

LIKE_BDAM = Context(
    data="cuhk-pedes",
    folder="runs/cuhk/data",
    method="irra",
    recipe="irra",
    spec="clip:ViT-B-16/openai",
    selected_on="val",
    epoch=40,
    epochs=60,
    seed=0,
)


def facts(dataset="cuhk-pedes", direction="t2i", queries=6156, gallery=3074, people=1000, skipped=0, **rows):
    values = {name: [0.7, 0.68, 0.72] for name in ("rank1", "rank5", "rank10", "mAP", "mINP")}
    return {
        "direction": direction,
        "dataset": dataset,
        "queries": queries,
        "skipped": skipped,
        "gallery": gallery,
        "people": people,
        "rows": {"standard": values, "chance": {"rank1": [0.001, None, None]}, **rows},
    }


def shown(context=LIKE_BDAM, **changes):
    found = facts(**changes)
    return compare(found, dataset=found["dataset"], direction=found["direction"], context=context)


def reasons(context=LIKE_BDAM, **changes):
    return " ".join(shown(context, **changes).reasons)


@pytest.mark.covers(32)
def test_our_row_comes_first_with_its_interval_and_every_text_keeps_its_own_row():
    rows = shown().rows
    assert rows[0][0] == "ours" and rows[0][3] == "70.0 [68.0, 72.0]"
    bdam = [row for row in rows if row[0].startswith('"Ours" of bdam')]
    assert [(row[1], row[4]) for row in bdam] == [("bdam-icme, I", "91.93"), ("bdam-long, 5", "92.95")]
    assert [row[3] for row in rows if row[0] == "IRLT"] == ["73.67", "73.67", "74.46"]
    assert "chance" not in {row[0] for row in rows}
    entries = comparison(dataset="cuhk-pedes", direction="t2i")
    assert len(rows) == 1 + len({(e.paper, e.table, e.row) for e in entries})


@pytest.mark.covers(32, 33)
def test_rows_point_at_the_contradictions_that_they_are_part_of():
    found = shown()
    row = next(row for row in found.rows if row[1] == "bdam-icme, I" and row[0].startswith('"Ours"'))
    notes = [found.footnotes[int(number) - 1] for number in row[-1].split()]
    assert any("91.93" in note and "92.95" in note for note in notes)
    assert all(note.startswith(f"{number}. ") for number, note in zip(row[-1].split(), notes, strict=True))


def test_data_weights_and_protocol_are_always_named():
    for context in (LIKE_BDAM, Context(), replace(LIKE_BDAM, rendered=True)):
        data, weights, protocol = shown(context).lines
        assert data.startswith("Data: cuhk-pedes") and "test split" in data and "3,074 gallery images" in data
        assert weights.startswith("Weights: ") and "chosen on" in weights
        assert protocol.startswith("Protocol: 6,156 queries, 0 without") and "ties" in protocol
        assert "no re-ranking" in protocol


def test_the_epoch_chosen_on_val_does_not_compare_with_rows_that_chose_on_test_or_do_not_say():
    found = shown()
    (reason,) = found.reasons
    assert "chosen on val" in reason and found.banner == f"NOT COMPARABLE: {reason}"
    rows = [row for row in found.rows[1:] if row[-2] != "val"]
    unsaid = sum(row[-2] == "not said" for row in rows)
    assert f"{len(rows) - unsaid} chose theirs otherwise and {unsaid} do not say" in reason


def test_there_is_no_banner_where_nothing_speaks_against_the_comparison(monkeypatch):
    like = [e for e in comparison(dataset="cuhk-pedes", direction="t2i") if e.selection == "val"]
    monkeypatch.setattr("reidctl.evaluation.comparison.comparison", lambda **_: like)
    assert shown().banner is None and shown().reasons == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "val"}, "val split"),
        ({"rendered": True}, "rendered"),
        ({"spec": "clip:tiny"}, "started at random"),
        ({"spec": "clip:ViT-B-16"}, "started at random"),
        ({"spec": "vit-bert:micro"}, "started at random"),
        ({"spec": "clip:ViT-L-14/openai"}, "not known to be what the papers used"),
        ({"shuffled": True}, "shuffled labels"),
        ({"query": "identity+clothing"}, "identity+clothing texts"),
        ({"degraded": "typo, level 0.3"}, "typo, level 0.3"),
        ({"other_data": True}, "another dataset than the one"),
        ({"combined": True}, "several datasets together"),
        ({"selected_on": "test"}, "chosen on test"),
        ({"notes": ("Found 3 people. Published numbers do not compare.",)}, "Found 3 people"),
    ],
)
def test_every_difference_is_a_reason(changes, words):
    assert words in reasons(replace(LIKE_BDAM, **changes))
    assert words not in reasons()


@pytest.mark.parametrize("spec", ["clip:ViT-B-16/openai", "vit-bert:google/vit-base-patch16-224+bert-base-uncased"])
def test_the_papers_weights_are_no_reason(spec):
    assert "weights" not in reasons(replace(LIKE_BDAM, spec=spec)).lower()


@pytest.mark.parametrize(
    "counts",
    [{"queries": 6155}, {"gallery": 3073}, {"people": 999}, {"queries": 6200}, {"gallery": 30740, "people": 10000}],
)
def test_a_test_set_of_the_right_name_and_another_size_is_flagged(counts):
    assert "official test split has 6,156 queries of 1,000 people and 3,074 images" in reasons(**counts)


def test_skipped_queries_count_as_asked():
    assert "official" not in reasons(queries=6150, skipped=6)


@pytest.mark.parametrize(("gallery", "right"), [(15913, True), (19732, True), (15912, False)])
def test_market_is_counted_with_or_without_junk(gallery, right):
    found = reasons(dataset="Market-1501", direction="i2i", queries=3368, gallery=gallery, people=750)
    assert ("official" not in found) == right


@pytest.mark.parametrize(
    ("dataset", "direction", "queries", "gallery"),
    [
        ("icfg-pedes", "t2i", 19848, 19848),
        ("rstpreid", "t2i", 2000, 1000),
        ("msmt17", "i2i", 11659, 82161),
        ("dukemtmc-reid", "i2i", 2228, 17661),
    ],
)
def test_the_official_sizes_are_accepted(dataset, direction, queries, gallery):
    people = SIZES[direction, dataset.replace("-", "")].people
    kind = {"dataset": dataset, "direction": direction, "queries": queries, "gallery": gallery, "people": people}
    assert "official" not in reasons(**kind)
    assert "official" in reasons(**kind | {"queries": queries - 1})


def test_re_ranked_rows_are_ours_too_and_flagged():
    values = {"rank1": [0.8, 0.78, 0.82]}
    found = shown(**{"rerank-20/6/0.3": values, "histogram": values})
    assert [row[0] for row in found.rows[:2]] == ["ours", "ours, re-ranked 20/6/0.3"]
    assert "Re-ranking is on" in " ".join(found.reasons)
    assert "re-ranking in rerank-20/6/0.3 only" in found.lines[2]


def test_rows_of_another_protocol_are_flagged():
    assert "cloth-changing follow another protocol" in reasons(**{"cloth-changing": {"rank1": [0.2, 0.1, 0.3]}})


def test_chance_in_single_shot_galleries_is_no_row_of_ours():
    found = shown(**{name: {"rank1": [0.2, 0.1, 0.3]} for name in ("single-shot", "single-shot-chance")})
    assert [row[0] for row in found.rows if row[1] == "this run"] == ["ours", "ours, single-shot"]


def test_published_rows_with_re_ranking_say_so():
    found = shown(dataset="msmt17", direction="i2i", queries=11659, gallery=82161, people=3060)
    again = [row for row in found.rows if "re-ranked" in row[0]]
    assert [row[3] for row in again] == ["91.1", "91.7"]
    assert any("re-ranked, as they say" in reason for reason in found.reasons)


@pytest.mark.covers(32)
def test_rendered_people_are_shown_beside_every_benchmark_for_orientation_only():
    found = shown(replace(LIKE_BDAM, data="synthped", rendered=True), dataset="synthped-a", queries=360, gallery=180)
    assert {row[2] for row in found.rows} == {"synthped-a", "cuhk-pedes", "icfg-pedes", "rstpreid"}
    assert found.banner and found.banner.startswith("NOT COMPARABLE: The people are rendered")
    assert "for orientation" in found.footnotes[-1]
    assert "official" not in " ".join(found.reasons)


def test_rendered_people_under_a_benchmarks_name_are_not_set_beside_that_benchmark_alone():
    found = shown(replace(LIKE_BDAM, rendered=True))
    assert {row[2] for row in found.rows} == {"cuhk-pedes", "icfg-pedes", "rstpreid"}
    assert "for orientation" in found.footnotes[-1]


def test_a_rendered_part_of_a_combination_is_known_by_its_name():
    assert "rendered" in reasons(replace(LIKE_BDAM, data="combine", combined=True), dataset="synthped-b")


def test_a_direction_that_nobody_publishes_has_our_row_alone():
    found = shown(direction="it2i", queries=10)
    assert len(found.rows) == 1 and "No published number" in found.footnotes[-1]


def test_a_comparison_survives_json_and_does_not_depend_on_when_it_is_made():
    once = shown().as_dict()
    assert json.loads(json.dumps(once)) == once == shown().as_dict()
    assert once["notes"][0] == once["banner"]


def trained_run(folder, *, data, command=("reidctl", "finetune", "--recipe", "irra"), **training):
    run = Run(folder)
    settings = {"seed": 3, "backbone": {"spec": "clip:tiny"}, "train": {"shuffle_labels": False, **training}}
    extra = {"data": str(data), "method": "irra", "best_epoch": 4, "epochs": 9, "selected_on": "val"}
    inputs = inputs_of(data)
    record = run.finish(
        "finetune", settings=settings, inputs=inputs, outputs=[], started=datetime.now(UTC), extra=extra
    )
    path = run.stage_dir("finetune") / "stage.json"
    path.write_text(json.dumps({**record, "command": list(command)}))
    return run


def inputs_of(folder):
    """What a stage records of a data folder."""
    return {"images": digest(folder / "images.parquet")}


def dataset(folder, source, settings=None, *, pictures=None, names=("cuhk-pedes",), **extra):
    """A data folder with one image of each dataset, by default inside it."""
    run = Run(folder.parent)
    facts = {"width": 8, "height": 16, "split": "test"}
    rows = [
        {
            **facts, "image_id": f"{name}:1", "path": str((pictures or folder) / f"{name}.png"), "dataset": name,
            "person_id": f"{name}:{folder.parent.name}", "sha256": f"{name}-{source}",
        }
        for name in names
    ]  # fmt: skip
    tables.write_table(folder / "images.parquet", "images", pd.DataFrame(rows))
    extra = {"source": source, **extra}
    run.finish(folder.name, settings=settings or {}, inputs={}, outputs=[], started=datetime.now(UTC), extra=extra)
    return folder


def measured(folder, **settings):
    asked = {"query": "caption", **settings}
    return {"data": str(folder), "split": "test", "settings": asked, "inputs": inputs_of(folder)}


def test_the_context_is_read_from_the_records_of_the_run(tmp_path):
    notes = ["Read reid_raw.json.", "CUHK-PEDES test: found 2 people. Published numbers do not compare."]
    data = dataset(tmp_path / "a" / "data", "cuhk-pedes", notes=notes, root="/somewhere/else")
    run = trained_run(tmp_path / "a", data=data, shuffle_labels=True)
    found = context_of(run, measured(data, query="identity"))
    assert found == Context(
        data="cuhk-pedes",
        folder=str(data),
        query="identity",
        method="irra",
        recipe="irra",
        spec="clip:tiny",
        shuffled=True,
        selected_on="val",
        epoch=4,
        epochs=9,
        seed=3,
        notes=(notes[1],),
    )
    assert not found.pretrained


def test_layouts_of_rendered_people_stay_rendered_whatever_they_are_called(tmp_path):
    home = dataset(tmp_path / "synth" / "data", "synthped")
    root = home / "layouts" / "synthped-a" / "cuhk-pedes" / "CUHK-PEDES"
    copied = tmp_path / "elsewhere" / "CUHK-PEDES"
    copied.mkdir(parents=True)
    mark(copied)
    linked = tmp_path / "linked"
    linked.symlink_to(copied)
    for name, place in (("in-place", root), ("copied", copied / "imgs"), ("linked", linked / "imgs")):
        data = dataset(tmp_path / name / "data", "cuhk-pedes", pictures=place)
        found = context_of(trained_run(tmp_path / name, data=data), measured(data))
        assert found.rendered_datasets == ("cuhk-pedes",)
        assert "The people are rendered, not photographed." in reasons(found)
        assert "of other datasets" in shown(found).footnotes[-1]
    other = dataset(tmp_path / "c" / "data", "cuhk-pedes", pictures=tmp_path / "photos")
    found = context_of(trained_run(tmp_path / "c", data=other), measured(other))
    assert not found.rendered_datasets and "rendered" not in reasons(found)


def test_the_record_says_which_datasets_of_a_combination_are_rendered(tmp_path):
    names = ("cuhk-pedes", "icfg-pedes")
    data = dataset(tmp_path / "j" / "data", "combine", names=names, rendered=["icfg-pedes"])
    found = context_of(trained_run(tmp_path / "j", data=data), measured(data))
    assert "rendered" not in reasons(found) and "rendered" in reasons(found, dataset="icfg-pedes")


def test_a_copy_of_the_training_data_is_no_other_dataset_and_new_contents_are(tmp_path):
    data = dataset(tmp_path / "k" / "data", "cuhk-pedes", pictures=tmp_path)
    run = trained_run(tmp_path / "k", data=data)
    copied = shutil.copytree(run.path, tmp_path / "k3")
    assert not context_of(Run(copied), measured(copied / "data")).other_data
    dataset(data, "rstpreid", pictures=tmp_path)
    assert context_of(run, measured(data)).other_data, "imported again into the same folder"


def test_degraded_other_and_combined_data_are_recognised(tmp_path):
    home = dataset(tmp_path / "d" / "data", "synthped")
    spoilt = dataset(
        tmp_path / "e" / "data", "degrade", {"degrade": {"kind": "typo", "level": 0.3}}, pictures=home / "images"
    )
    joined = dataset(tmp_path / "f" / "data", "combine")
    found = context_of(trained_run(tmp_path / "g", data=joined), measured(spoilt))
    assert found.degraded == "typo, level 0.3" and found.other_data and found.combined
    assert found.rendered_datasets == ("cuhk-pedes",)
    assert "The captions were degraded (typo, level 0.3)." in reasons(found)


def test_of_given_embeddings_nothing_is_known(tmp_path):
    found = context_of(Run(tmp_path), {"data": None, "split": "test", "settings": {"query": "caption"}})
    assert found.given and not found.rendered
    table = shown(found)
    assert "what model, weights and training made them is not known" in " ".join(table.reasons)
    assert table.lines[1] == "Weights: those of whatever made the given embeddings, chosen on an unknown split."


def test_a_damaged_record_near_the_images_says_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "stage.json").write_text("{")
    data = dataset(tmp_path / "h" / "data", "folder", pictures=tmp_path / "photos" / "sub")
    assert not context_of(trained_run(tmp_path / "h", data=data), measured(data)).rendered_datasets


@pytest.mark.parametrize(
    ("command", "recipe"),
    [(["reidctl", "finetune", "--recipe=my.yaml"], "my.yaml"), (["reidctl", "finetune", "--method", "bdam"], "bdam")],
)
def test_the_recipe_is_what_the_command_line_named(tmp_path, command, recipe):
    data = dataset(tmp_path / "i" / "data", "folder")
    assert context_of(trained_run(tmp_path / "i", data=data, command=command), measured(data)).recipe == recipe
