"""When rendered people are up to date, and what a dataset without captions is good for."""

from cli.commandline import cli

from reidctl import tables
from reidctl.runs import Run
from reidctl.stages import data_synth

SMALL = {"people": 6, "images_per_person": 2, "size": [32, 16]}


def rendered(run, **synth):
    return data_synth.run(run, {"synth": {**SMALL, **synth}}, workers=1)


def test_people_rendered_before_sets_could_lack_captions_stay_up_to_date(tmp_path):
    run = Run(tmp_path / "run")
    assert "captioned" not in rendered(run, domain="both")["settings"]["synth"]
    assert rendered(run, domain="both", captioned="both")["status"] == "up-to-date"
    assert rendered(run, domain="both", captioned="a")["status"] == "done"
    assert rendered(run, domain="both", captioned="b")["status"] == "done"
    alone = Run(tmp_path / "alone")
    rendered(alone, domain="b")
    assert rendered(alone, domain="b", captioned="b")["status"] == "up-to-date"


def test_a_caption_free_set_is_rendered_by_option_or_setting_and_passes_the_doctor(tmp_path):
    words = ("data", "synth", "--people", 6, "--images-per-person", 4, "--size", "64x32", "--workers", 1)
    asked = ("--domain", "both", "--captioned", "a")
    assert cli(*words, *asked, "--run", tmp_path / "run").code == 0
    record = Run(tmp_path / "run").require("data")
    assert record["settings"]["synth"]["captioned"] == "a"
    captions = tables.read_table(tmp_path / "run" / "data" / "captions.parquet", "captions")
    told = captions.loc[captions["kind"] == "full", "image_id"]
    assert told.nunique() == 6 * 4 and told.str.startswith("synthped-a").all()
    same = cli(*words, "--set", "synth.domain=both", "--set", "synth.captioned=a", "--run", tmp_path / "run", "--json")
    assert same.json["status"] == "up-to-date"
    found = cli("data", "check", "--run", tmp_path / "run", "--json")
    assert found.code == 0 and "uncaptioned-images" not in {finding["check"] for finding in found.json["findings"]}
