import pytest

from reidctl.evaluation.published import comparison, contradictions, find, registry


def only(**query):
    metric = query.pop("metric")
    return [(e.paper, e.table, e.value) for e in find(**query) if e.metric == metric and "comparison" in e.about]


@pytest.mark.covers(32, 33)
def test_both_printed_rank5_numbers_of_bdam_are_kept_and_flagged():
    assert only(dataset="CUHK-PEDES", row="Ours", metric="rank5") == [
        ("bdam-icme", "I", 0.9193),
        ("bdam-long", "5", 0.9295),
    ]
    for entry in find(dataset="CUHK-PEDES", row="Ours"):
        if entry.metric == "rank5":
            assert any("91.93" in note and "92.95" in note for note in entry.notes)


@pytest.mark.covers(32)
def test_rows_of_one_method_from_different_papers_are_not_merged():
    assert only(dataset="cuhkpedes", row="IRLT", metric="rank1") == [
        ("bdam-icme", "I", 0.7367),
        ("bdam-long", "5", 0.7367),
        ("hpl", "1", 0.7446),
    ]


def test_numbers_are_fractions_and_keys_are_unique():
    entries = registry()
    keys = [(e.paper, e.table, e.row, e.direction, e.dataset, e.metric) for e in entries]
    assert len(set(keys)) == len(keys) > 300
    assert all(0 < e.value < 1 for e in entries)
    assert all(e.metric in ("rank1", "rank5", "rank10", "mAP") for e in entries)


def test_spot_checks_by_hand():
    def one(paper, table, row, dataset, metric):
        (entry,) = [
            e
            for e in registry()
            if (e.paper, e.table, e.row, e.dataset, e.metric) == (paper, table, row, dataset, metric)
        ]
        return entry.value

    assert one("bdam-long", "5", "Ours", "rstpreid", "mAP") == 0.5768
    assert one("bdam-icme", "V", "Identity-Only", "cuhk-pedes", "rank1") == 0.7845
    assert one("bdam-long", "2", "Full Fusion", "cuhk-pedes", "rank1") == 0.7842
    assert one("hpl", "1", "Ours", "rstpreid", "rank1") == 0.6400
    assert one("hpl", "2", "Ours", "msmt17", "mAP") == 0.7901
    assert one("hpl", "3", "TRT", "market-1501", "mAP") == 0.8898


@pytest.mark.covers(33)
def test_every_contradiction_points_at_numbers_that_exist():
    flagged = {note for entry in registry() for note in entry.notes}
    assert flagged == set(contradictions())
    assert len(flagged) >= 15


def test_dashes_are_absent_not_zero():
    assert "mAP" not in {e.metric for e in find(paper="bdam-icme", row="CFAM")}


def test_comparison_is_limited_to_a_direction():
    assert {e.direction for e in comparison(dataset="market1501", direction="i2i")} == {"i2i"}
    assert comparison(dataset="market1501", direction="t2i") == []
