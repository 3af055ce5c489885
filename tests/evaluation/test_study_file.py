"""Study files: what is read, what lies underneath, and what is refused before anything is trained."""

from pathlib import Path

import pytest

from reidctl.errors import UsageError
from reidctl.evaluation.study import load_study, study_name
from reidctl.stages import study as stage

STUDIES = sorted(Path("pipelines/studies").glob("*.yaml"))
SMALL = """
about: a study
method: bdam-tiny
conditions:
  a: {label: one}
  b: {set: {method: {gate: false}}}
"""


def write(folder, text, name="study.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_base_lies_underneath_and_its_conditions_stay(tmp_path):
    write(tmp_path, SMALL + "recipe: {train: {epochs: 3, lr: 0.1}}\n", "base.yaml")
    above = "base: base.yaml\nabout: above\nrecipe: {train: {epochs: 5}}\nconditions: {c: {}}\n"
    study = load_study(write(tmp_path, above, "top.yaml"))
    assert list(study.conditions) == ["a", "b", "c"] and study.about == "above"
    assert study.recipe == {"train": {"epochs": 5, "lr": 0.1}}


def test_a_circle_of_bases_is_refused(tmp_path):
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(UsageError, match="on top of itself"):
        load_study(tmp_path / "a.yaml")


@pytest.mark.covers(224)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claim: []", r"Unknown setting `study.claim`. Did you mean `claims`"),
        ("conditions: {a: {lable: x}}", r"Unknown setting `study.conditions.a.lable`. Did you mean `label`"),
        ("conditions: {a: {set: {metod: {}}}}", "unknown recipe section `metod`"),
        ("conditions: {a: {set: {train: 3}}}", "must hold settings"),
        ("conditions: {}", "needs conditions"),
        ("conditions: {A/b: {}}", "names are lower-case"),
        ("seeds: [0, 0]", "different numbers"),
        ("seeds: []", "seeds"),
        ("claims: [{say: x, measure: m, more: a, than: zz}]", "names `zz`, which is no condition"),
        ("draw: {kind: curve}", "a curve needs `x`"),
        ("measure: {analyses: [tea-leaves]}", "unknown analysis `tea-leaves`"),
        ("recipe: {seed: {}}", "unknown recipe section `seed`"),
        ("measure: {joint: true}", "condition `a`: `measure.joint` needs `synth.domain: both`"),
        ("measure: {joint: true, elsewhere: {joint: {}}}", "cannot be called `joint`"),
    ],
)
def test_a_wrong_study_is_refused_with_the_key_and_what_was_meant(tmp_path, text, message):
    base = {"about": "about: a study", "method": "method: bdam-tiny", "conditions": "conditions: {a: {}, b: {}}"}
    base[text.split(":")[0]] = text
    with pytest.raises(UsageError, match=message):
        load_study(write(tmp_path, "\n".join(base.values())))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(UsageError):
        load_study(write(tmp_path, text))


def test_a_missing_file_a_folder_and_binary_data_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UsageError):
            load_study(path)


def test_a_wrong_setting_of_one_condition_is_found_before_anything_is_trained(tmp_path):
    wrong = SMALL.replace("gate: false", "gaet: false")
    with pytest.raises(UsageError, match=r"method\.gaet.*gate"):
        stage.run(stage.Run(tmp_path / "home"), [write(tmp_path, wrong)], dry_run=True)
    assert not (tmp_path / "home").exists()


def test_results_may_not_lie_where_trainings_lie_nor_in_one_folder(tmp_path):
    home = stage.Run(tmp_path / "home")
    for name in ("units", "people", "evaluate"):
        with pytest.raises(UsageError, match=f"cannot be called `{name}`"):
            stage.run(home, [write(tmp_path, SMALL, f"{name}.yaml")], dry_run=True)
    twice = write(tmp_path, SMALL)
    with pytest.raises(UsageError, match="Rename"):
        stage.run(home, [twice, twice], dry_run=True)
    with pytest.raises(UsageError, match="no name for results"):
        study_name(tmp_path / "ä.yaml")


def test_equal_trainings_of_two_studies_are_one(tmp_path):
    other = SMALL.replace("a: {label: one}", "again: {label: another name}")
    plans = stage._plans(tmp_path, [write(tmp_path, SMALL), write(tmp_path, other, "other.yaml")], [0, 1])
    assert len(stage._wanted(plans)) == 4
    assert plans[0].units["a", 1].name == plans[1].units["again", 1].name != plans[0].units["a", 0].name


def test_a_study_without_a_joint_gallery_reads_as_before_there_was_one(tmp_path):
    """Or finished studies would be judged again."""
    both = SMALL + "recipe: {synth: {domain: both}}\nmeasure: {joint: true}\n"
    plain, joint = load_study(write(tmp_path, SMALL)), load_study(write(tmp_path, both, "joint.yaml"))
    names = {"query", "settings", "analyses", "features", "elsewhere", "rerank"}
    assert set(plain.model_dump(mode="json")["measure"]) == names
    assert joint.model_dump(mode="json")["measure"] == {**plain.model_dump(mode="json")["measure"], "joint": True}
    assert joint.measure.replace(rerank=("1/1/0.3",)).joint
    assert "joint" not in plain.measure.model_dump_json() and plain.measure != joint.measure


def test_another_seed_or_start_is_another_training(tmp_path):
    start = "start: {method: {name: clip}, backbone: {spec: 'clip:micro'}}\n"
    plain, started = (stage._plans(tmp_path, [write(tmp_path, SMALL + extra)], None)[0].units for extra in ("", start))
    assert plain["a", 0].name != started["a", 0].name and started["a", 0].start is not None


@pytest.mark.covers(230)
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_is_valid_and_seeds_are_three(path, tmp_path):
    record = stage.run(stage.Run(tmp_path), [path], dry_run=True)[0]
    assert record["status"] == "dry-run" and record["metrics"]["trainings"] > 0
    if path.stem != "smoke":
        assert record["seeds"] == [0, 1, 2]


def test_rows_and_tables_that_studies_name_are_printed_in_the_papers():
    from reidctl.evaluation.published import registry

    printed = {(entry.paper, entry.table): set() for entry in registry()}
    for entry in registry():
        printed[entry.paper, entry.table].add(entry.row)
    for path in STUDIES:
        study = load_study(path)
        for paper, table in study.published.items():
            rows = printed[paper, table]
            for name, condition in study.conditions.items():
                row = condition.printed_row(paper)
                assert not row or row in rows, (path.name, name, row, sorted(rows))


def test_a_study_knows_every_analysis_that_there_is():
    from reidctl.evaluation.study import ANALYSES
    from reidctl.stages import analyse

    assert set(ANALYSES) == set(analyse.ANALYSES)


def test_trainings_of_a_study_do_not_lie_in_a_stage_of_the_same_run(tmp_path):
    """`REIDCTL_RUN` may name a run with data of its own; `data synth` clears its folder."""
    for unit in stage._plans(tmp_path, [write(tmp_path, SMALL)], None)[0].units.values():
        places = [unit.run, unit.dataset.pictures]
        assert {place.path.relative_to(tmp_path).parts[0] for place in places} == {"units", "people"}
