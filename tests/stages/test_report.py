"""The report of a run."""

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakerun import INJECTION, finish, make_data, make_run

from reidctl import tables
from reidctl.errors import DataError
from reidctl.runs import Run, digest
from reidctl.stages import report
from reidctl.stages.report_maps import HITS

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, text and addresses, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.addresses, self.alts, self.ids, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href", "action", "srcset", "poster") if name in values]
        self.addresses += re.findall(r"url\(([^)]*)\)", values.get("style") or "")
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:])
        self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run") / "r")
    record = report.run(run)
    text = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")
    return run, record, text, Page(text)


def test_the_page_is_well_formed_and_its_ids_are_unique(made):
    page = made[3]
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {a.removeprefix("#") for a in page.addresses if a.startswith("#")} <= set(page.ids)


def test_nothing_is_requested_from_outside(made):
    _, _, text, page = made
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:|@import|url\(\s*[\"']?https?:", text)
    assert "default-src 'none'" in text


def test_a_caption_with_a_script_stays_text(made):
    _, _, text, page = made
    assert page.tags.count("script") == 1
    assert '<script>alert("pwned")' not in text
    assert INJECTION in "".join(page.text)
    assert "<b>bold</b>" not in text


def test_every_section_is_there_and_linked(made):
    _, record, text, _ = made
    expected = ["results", "rankings", "maps", "gates", "training", "recipe", "captions", "data", "missing"]
    expected += ["provenance"]
    assert record["sections"] == expected
    for anchor in expected:
        assert f'href="#{anchor}"' in text and f'id="{anchor}"' in text


def test_pictures_are_inside_and_described(made):
    _, _, text, page = made
    assert text.count("data:image/") > 30
    assert len(page.alts) == page.tags.count("img") and all(page.alts)


def test_tables_have_captions_and_header_cells(made):
    page = made[3]
    assert page.tags.count("caption") == page.tags.count("table") > 4
    assert "th" in page.tags


def test_synthetic_data_are_announced(made):
    assert "not comparable with published numbers" in made[2]


def test_real_data_get_no_synthetic_banner(tmp_path):
    run = Run(tmp_path / "r")
    make_data(run.stage_dir("data"), dataset="cuhk-pedes", people=2)
    finish(run, "data")
    report.run(run)
    text = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")
    assert "Synthetic data" not in text and "cuhk-pedes" in text


@pytest.mark.covers(37)
def test_marks_agree_with_the_rankings_table(made):
    run, _, text, _ = made
    ranks = tables.read_table(run.table("evaluate", "rankings"), "rankings")
    ranks = ranks[ranks["rank"] <= HITS]
    for article in re.findall(r'<article class="query".*?</article>', text, flags=re.DOTALL):
        person = re.search(r"(synthped:\d+)", article).group(1)
        marks = [mark == "right" for mark in re.findall(r'<li class="(right|wrong)"', article)]
        queries = tables.read_table(run.table("evaluate", "queries"), "queries")
        own = set(queries.loc[queries["person_id"] == person, "query_id"])
        lists = ranks[ranks["query_id"].isin(own)].sort_values("rank").groupby("query_id")["match"].apply(list)
        assert marks in list(lists)


@pytest.mark.covers(231)
def test_figures_lie_beside_the_page_with_their_data(made):
    run, record, _, _ = made
    names = {Path(name).name for name in record["outputs"]}
    for stem in ("metrics-1", "metrics-2", "losses", "validation"):
        assert {f"{stem}.png", f"{stem}.svg", f"{stem}.csv"} <= names
    saved = pd.read_csv(run.stage_dir("report") / "figures" / "metrics-1.csv")
    table = tables.read_table(run.table("evaluate", "metrics"), "metrics")
    assert saved["value"].tolist() == pytest.approx(table[table["direction"] == "t2i"]["value"].tolist())


def test_the_choice_rule_and_provenance_are_stated(made):
    text = made[2]
    assert "drawn at random (seed 0)" in text
    assert "No model can exceed rank-1 99.0 %." in text
    assert digest(made[0].table("data", "images"))[:12] in text  # the input digest, shortened
    assert "&#34;seed&#34;: 3" in text


def test_a_second_report_is_up_to_date_and_a_new_stage_makes_it_stale(made, tmp_path):
    run = Run(tmp_path / "copy")
    shutil.copytree(made[0].path, run.path)
    assert report.run(run)["status"] == "up-to-date"
    stage = run.stage_dir("evaluate") / "stage.json"
    stage.write_text(stage.read_text().replace('"seed": 3', '"seed": 4'))
    assert report.run(run)["status"] == "done"


def test_the_page_is_reproducible(made, tmp_path):
    first = made[2]
    report.run(made[0], force=True, out=tmp_path / "deep" / "copy.html")
    assert (tmp_path / "deep" / "copy.html").read_text(encoding="utf-8") == first


def test_missing_stages_are_named_with_their_command(tmp_path, made):
    run = Run(tmp_path / "r")
    shutil.copytree(made[0].stage_dir("data"), run.stage_dir("data"))
    record = report.run(run)
    text = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")
    assert record["sections"] == ["data", "missing", "provenance"]
    for command in ("caption", "finetune --method bdam", "evaluate", "evaluate --setting all", "analyse", "interpret"):
        assert f"reidctl {command} --run" in text
    assert "reidctl data synth" not in text
    Page(text)


def test_an_unreadable_picture_is_shown_as_such(tmp_path, made):
    run = Run(tmp_path / "r")
    shutil.copytree(made[0].path, run.path)
    for path in (run.stage_dir("data") / "images").glob("p0*"):
        path.write_bytes(b"broken")
    report.run(run, force=True)
    text = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")
    assert 'class="missing"' in text
    Page(text)


def test_an_empty_run_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no finished stage"):
        report.run(Run(tmp_path))


@pytest.mark.covers(220)
def test_the_ranked_lists_are_those_of_each_dataset_though_a_joint_gallery_was_measured_too(made, tmp_path):
    run = Run(tmp_path / "joint")
    shutil.copytree(made[0].path, run.path)
    for name in ("rankings", "queries"):
        rows = tables.read_table(run.table("evaluate", name), name)
        rows["dataset"] = rows["dataset"].astype(str)
        again = rows.assign(dataset="joint")
        if name == "rankings":
            again["match"] = ~again["match"]
        tables.write_table(run.table("evaluate", name), name, pd.concat([rows, again], ignore_index=True))
    stage = run.stage_dir("evaluate") / "stage.json"
    stage.write_text(stage.read_text().replace('"seed": 3', '"seed": 3, "joint": true'))
    assert '"joint": true' in stage.read_text()
    report.run(run, force=True)
    text = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")

    def articles(page):
        return re.findall(r'<article class="query".*?</article>', page, flags=re.DOTALL)

    assert articles(text) == articles(made[2]) and articles(text)
