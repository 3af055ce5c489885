"""`reidctl study` from the command line: the example of its help, several studies at once, wrong input."""

from pathlib import Path

import pytest
from cli.commandline import cli, leftovers, refused

SMOKE = Path("pipelines/studies/smoke.yaml").resolve()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    again = folder / "again.yaml"
    again.write_text(f"base: {SMOKE}\nabout: the same trainings under another name\n")
    asked = ("study", SMOKE, again, "--run", folder / "runs", "--save", folder / "pages" / "all.md", "--json")
    return folder, cli(*asked)


@pytest.mark.slow
@pytest.mark.covers(223, 230)
def test_two_studies_share_their_trainings_and_print_one_object(done):
    folder, result = done
    assert result.code == 0, result.err
    shown = result.json
    assert {"stage", "status", "run", "outputs", "metrics", "seconds", "studies"} <= shown.keys()
    assert shown["stage"] == "study" and shown["status"] == "done" and set(shown["studies"]) == {"smoke", "again"}
    assert len(list((folder / "runs" / "units").iterdir())) == 4
    assert not leftovers(folder)


@pytest.mark.slow
def test_the_saved_page_holds_every_study_its_claims_and_its_pictures(done):
    folder, _ = done
    text = (folder / "pages" / "all.md").read_text()
    assert text.startswith("# all\n") and "## smoke" in text and "## again" in text
    assert "### 2 claims: 0 holds, 0 does not hold, 2 undecided" in text or "2 claims" in text
    for name in ("smoke", "again"):
        assert f"](all/{name}.png)" in text and (folder / "pages" / "all" / f"{name}.png").is_file()
    assert text.count("--save") == 1 and str(SMOKE) in text


@pytest.mark.slow
def test_people_see_a_table_of_verdicts_and_where_the_page_is(done):
    folder, _ = done
    result = cli("study", SMOKE, "--run", folder / "runs")
    assert result.code == 0 and "BDAM helps" in result.out and "study.md" in result.out
    assert "up to date" in result.out


def test_a_dry_run_says_what_would_be_trained_and_touches_nothing(tmp_path):
    result = cli("study", SMOKE, "--run", tmp_path / "runs", "--dry-run", "--seeds", "4,5,6")
    assert result.code == 0 and "6 trainings (0 finished): baseline, full; seeds 4, 5, 6" in result.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "pieces"),
    [
        (("nowhere.yaml",), ("nowhere.yaml", "pipelines/studies")),
        ((SMOKE, "--seeds", "a,b"), ("--seeds a,b", "0,1,2")),
        ((SMOKE, "--seeds", "1,1"), ("different numbers",)),
        ((SMOKE, "--jobs", "0"), ("--jobs",)),
        ((SMOKE, SMOKE), ("Rename the study file",)),
        ((), ("FILE",)),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(args, pieces, tmp_path):
    refused(2, *pieces, args=("study", *args, "--run", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way_of_the_run_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "taken").write_text("mine")
    refused(3, "taken", args=("study", SMOKE, "--run", tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "mine"
