import re

import pytest

from reidctl.evaluation.published import comparison, contradictions, find, registry, titles

# The tables of the three texts, taken from them and not from the registry; a dash is a dash in print.
ICME = """
Table I
IRRA: 73.38 89.93 93.71 66.10 63.36 80.82 85.82 38.06 60.20 81.30 88.20 47.17
IRLT: 73.67 89.71 93.57 65.94 63.57 80.57 86.32 38.34 60.51 82.85 89.71 47.64
CFAM: 74.46 90.19 94.01 - 64.72 81.35 86.31 - 61.49 82.26 89.23 -
Propot: 74.89 89.90 94.17 67.12 65.12 81.57 86.97 42.93 61.87 83.63 89.70 47.82
RDE: 75.94 90.14 94.12 67.56 67.68 82.47 87.36 40.06 65.35 83.95 89.90 50.88
HAM: 77.99 91.34 95.03 69.72 69.95 83.88 88.39 42.72 72.50 87.70 91.95 55.47
CPCL: 70.03 87.28 91.78 63.19 62.60 79.07 84.46 36.16 58.35 81.05 87.65 45.81
PDReid: 71.59 87.95 92.45 65.03 60.93 77.96 84.11 36.44 56.65 77.40 84.70 45.27
SSAN: 61.37 80.15 86.73 - 54.23 72.63 79.53 - 43.50 67.80 77.15 -
CFine: 69.57 85.93 91.15 - 60.83 76.55 82.42 - 50.55 72.50 81.60 -
IVT: 65.59 83.11 89.21 - 56.04 73.60 80.22 - 46.70 70.00 78.80 -
Ours: 79.93 91.93 96.47 72.61 68.68 84.29 89.74 41.78 74.33 88.85 92.95 57.68
Table II
Baseline (w/o BDAM): 59.81 70.54 85.49 91.26
+ BDAM: 66.74 76.27 89.30 94.02
w/o Cross-Attn: 62.56 71.39 87.05 92.98
w/o Gate: 65.11 74.63 88.77 93.56
Shallow (3-layer): 64.27 73.74 88.09 93.32
Table III
Baseline (w/o Fusion): 59.81 70.54 85.49 91.26
Full Fusion: 72.61 79.93 90.74 95.11
w/o Mamba: 66.89 75.73 89.06 93.92
w/o Gate: 68.64 77.58 90.11 94.87
w/o Alignment: 68.15 77.09 89.84 94.53
Table IV
Full Model: 72.61 79.93 91.93 96.47
w/o InfoNCE: 28.14 36.55 55.21 65.83
w/o Triplet: 67.22 74.89 88.15 93.12
w/o Alignment: 69.15 76.92 89.53 94.22
w/o Decoupling: 70.03 77.81 90.11 94.98
w/o Weight Reg.: 71.98 79.23 91.35 95.71
Table V
Standard: 72.61 79.93 91.93 96.47
Identity-Only: 70.92 78.45 91.80 95.88
Clothes-Conflict: 68.24 76.12 89.65 94.30
"""
LONG = """
Table 1
Baseline(w/o BDAM): 59.81 70.54 85.49 91.26
+ BDAM: 66.74 76.27 89.30 94.02
w/o Cross-Attn: 62.56 71.39 87.05 92.98
w/o Gate: 65.11 74.63 88.77 93.56
Shallow(3-layer): 64.27 73.74 88.09 93.32
Table 2
Baseline(w/o Fusion): 59.81 70.54 85.49 91.26
Full Fusion: 69.58 78.42 90.74 95.11
w/o Mamba: 66.89 75.73 89.06 93.92
w/o Gate: 68.64 77.58 90.11 94.87
w/o Alignment: 68.15 77.09 89.84 94.53
Table 3
Full Model: 72.61 79.93 92.95 96.47
w/o InfoNCE: 28.14 36.55 55.21 65.83
w/o Triplet: 67.22 74.89 88.15 93.12
w/o Adversarial: 69.15 76.92 89.53 94.22
w/o Decoupling: 70.03 77.81 90.11 94.98
w/o Gate Reg.: 71.98 79.23 91.35 95.71
Table 4
Baseline (w/o Style): 71.22 79.18 91.51 95.79
+ Random: 71.95 79.54 91.66 95.82
+ K-Means: 71.85 79.20 91.60 95.90
+ GMM: 71.70 79.05 91.50 95.75
+ Agglomerative: 71.78 79.10 91.55 95.80
+ HDBSCAN: 72.20 79.40 91.95 96.10
+ DBSCAN (Ours): 72.61 79.93 92.95 96.47
Table 5
IRRA: 73.38 89.93 93.71 66.10 63.36 80.82 85.82 38.06 60.20 81.30 88.20 47.17
IRLT: 73.67 89.71 93.57 65.94 63.57 80.57 86.32 38.34 60.51 82.85 89.71 47.64
CFAM: 74.46 90.19 94.01 - 64.72 81.35 86.31 - 61.49 82.26 89.23 -
Propot: 74.89 89.90 94.17 67.12 65.12 81.57 86.97 42.93 61.87 83.63 89.70 47.82
RDE: 75.94 90.14 94.12 67.56 67.68 82.47 87.36 40.06 65.35 83.95 89.90 50.88
HAM: 77.99 91.34 95.03 69.72 69.95 83.88 88.39 42.72 72.50 87.70 91.95 55.47
CPCL: 70.03 87.28 91.78 63.19 62.60 79.07 84.46 36.16 58.35 81.05 87.65 45.81
PDReid: 71.59 87.95 92.45 65.03 60.93 77.96 84.11 36.44 56.65 77.40 84.70 45.27
SSAN: 61.37 80.15 86.73 - 54.23 72.63 79.53 - 43.50 67.80 77.15 -
CFine: 69.57 85.93 91.15 - 60.83 76.55 82.42 - 50.55 72.50 81.60 -
IVT: 65.59 83.11 89.21 - 56.04 73.60 80.22 - 46.70 70.00 78.80 -
Ours: 79.93 92.95 96.47 72.61 68.68 84.29 89.74 41.78 74.33 88.85 92.95 57.68
"""
HPL = """
Table 1
CFine: 69.57 - 60.83 - 50.55 -
IRRA: 73.38 66.13 63.46 38.06 60.20 47.17
MDRL: 74.56 - 65.88 - - -
TBPS-CLIP: 73.54 65.38 65.05 39.83 61.95 48.26
IRLT: 74.46 - 64.72 - 61.49 -
UMSA: 74.25 66.15 65.62 38.78 63.40 49.28
LSPM: 74.38 67.74 64.40 42.60 - -
FSRL: 74.86 67.57 64.93 40.67 60.65 48.18
Propot: 74.89 67.12 65.12 42.93 61.87 47.82
MMRef: 72.25 - 63.50 - 56.20 -
Ours: 76.28 70.90 66.61 44.14 64.00 53.13
Table 2
CDNet: 95.10 86.00 78.90 54.70 88.60 76.80
TransReID: 95.20 88.90 85.30 67.40 90.70 82.00
DRL-Net: 94.70 86.90 78.40 55.30 88.10 76.60
DCAL: 94.70 87.50 83.10 64.00 89.00 80.10
CLIP-ReID: 95.50 89.60 88.70 73.40 90.00 82.50
CLIP3DReID: 95.60 88.40 81.50 61.20 - -
Ours: 95.99 89.82 91.04 79.01 90.35 82.93
Table 3
none: 74.22 70.45 94.50 86.91
TRT: 75.27 70.80 95.36 88.98
TRT + HPL: 75.60 70.88 95.57 89.72
TRT + HPL + CMPR: 76.28 70.89 95.99 89.82
Table 4
neither: 75.27 70.80 95.36 88.98
tgps: 75.58 70.84 95.42 89.35
vgps: 75.60 70.82 95.69 89.59
tgps + vgps: 75.60 70.88 95.57 89.72
"""

# Rows of READMEs, read there: rank-k, then mAP and mINP where printed.
READMES = [
    ("irra-readme", "CLIP", "cuhk-pedes", "68.19 86.47 91.47 61.12 44.86"),
    ("irra-readme", "CLIP", "icfg-pedes", "56.74 75.72 82.26 31.84 5.03"),
    ("irra-readme", "CLIP", "rstpreid", "54.05 80.70 88.00 43.41 22.31"),
    ("irra-readme", "IRRA", "cuhk-pedes", "73.38 89.93 93.71 66.13 50.24"),
    ("irra-readme", "IRRA", "icfg-pedes", "63.46 80.24 85.82 38.05 7.92"),
    ("irra-readme", "IRRA", "rstpreid", "60.20 81.30 88.20 47.17 25.28"),
    ("rasa-readme", "RaSa", "icfg-pedes", "65.28 80.40 85.12 41.29"),
    ("mars-readme", "MARS", "rstpreid", "67.55 86.55 91.35 52.92"),
    ("plip-readme", "PLIP + CMPM/C", "icfg-pedes", "64.25 86.32"),
    ("plip-readme", "PLIP + ABDNet", "dukemtmc-reid", "90.9 81.6"),
    ("fast-reid-model-zoo", "SBS (R101-ibn)", "market-1501", "96.3 90.3 70.0"),
    ("transreid-readme", "TransReID* (ViT)", "msmt17", "85.3 67.8"),
    ("clip-reid-readme", "CLIP-ReID + SIE + OLP (ViT)", "msmt17", "91.1 86.7"),
    ("solider-readme", "SOLIDER (Swin Small)", "market-1501", "96.6 93.3"),
]
TEXTS = {"bdam-icme": ICME, "bdam-long": LONG, "hpl": HPL}
CAPTIONED = ("cuhk-pedes", "icfg-pedes", "rstpreid")
FULL = [(name, metric) for name in CAPTIONED for metric in ("rank1", "rank5", "rank10", "mAP")]
ABLATION = [("cuhk-pedes", metric) for metric in ("mAP", "rank1", "rank5", "rank10")]
BOTH = [(name, metric) for name in ("cuhk-pedes", "market-1501") for metric in ("rank1", "mAP")]
HEADS = {
    ("bdam-icme", "I"): FULL,
    ("bdam-long", "5"): FULL,
    ("hpl", "1"): [(name, metric) for name in CAPTIONED for metric in ("rank1", "mAP")],
    ("hpl", "2"): [
        (name, metric) for name in ("market-1501", "msmt17", "dukemtmc-reid") for metric in ("rank1", "mAP")
    ],
    ("hpl", "3"): BOTH,
    ("hpl", "4"): BOTH,
}


def printed_tables():
    for paper, text in TEXTS.items():
        table = ""
        for line in text.strip().splitlines():
            row, _, numbers = line.rpartition(": ")
            if not row:
                table = line.removeprefix("Table ")
                continue
            head = HEADS.get((paper, table), ABLATION)
            cells = zip(head, numbers.split(), strict=True)
            yield paper, table, row, {where: number for where, number in cells if number != "-"}


def one(paper, table, row, dataset, metric):
    (entry,) = [e for e in find(paper=paper, row=row, dataset=dataset) if (e.table, e.metric) == (table, metric)]
    return entry


def only(*, metric, **query):
    return [(e.paper, e.table, e.printed) for e in find(**query) if e.metric == metric and e.kind == "comparison"]


@pytest.mark.covers(32, 33, 162)
@pytest.mark.parametrize(("paper", "table", "row", "cells"), list(printed_tables()))
def test_a_row_is_quoted_as_printed(paper, table, row, cells):
    found = {(e.dataset, e.metric): e.printed for e in find(paper=paper, row=row) if e.table == table}
    assert found == cells


@pytest.mark.parametrize(("paper", "row", "dataset", "cells"), READMES)
def test_a_row_of_a_readme_is_quoted_as_printed(paper, row, dataset, cells):
    assert " ".join(entry.printed for entry in find(paper=paper, row=row, dataset=dataset)) == cells


@pytest.mark.covers(162)
def test_the_registry_has_every_row_of_these_tables_and_no_other():
    rows = {(e.paper, e.table, e.row) for e in registry() if e.paper in TEXTS and e.kind != "analysis"}
    assert rows == {(paper, table, row) for paper, table, row, _ in printed_tables()}
    assert len(rows) == 31 + 35 + 26


@pytest.mark.covers(32, 33)
def test_both_printed_rank5_numbers_of_bdam_are_kept_and_flagged():
    assert only(dataset="CUHK-PEDES", row="Ours", metric="rank5") == [
        ("bdam-icme", "I", "91.93"),
        ("bdam-long", "5", "92.95"),
    ]
    for entry in find(dataset="CUHK-PEDES", row="Ours"):
        if entry.metric == "rank5":
            assert any("91.93" in note and "92.95" in note for note in entry.notes)


@pytest.mark.covers(32)
def test_rows_of_one_method_from_different_texts_are_not_merged():
    assert only(dataset="cuhkpedes", row="IRLT", metric="rank1") == [
        ("bdam-icme", "I", "73.67"),
        ("bdam-long", "5", "73.67"),
        ("hpl", "1", "74.46"),
        ("irlt-paper", "results", "73.67"),
    ]
    assert only(dataset="icfg-pedes", row="IRRA", metric="rank5") == [
        ("bdam-icme", "I", "80.82"),
        ("bdam-long", "5", "80.82"),
        ("irra-readme", "README", "80.24"),
    ]


def test_numbers_are_fractions_and_keys_are_unique():
    entries = registry()
    keys = [(e.paper, e.table, e.row, e.direction, e.dataset, e.metric) for e in entries]
    assert len(set(keys)) == len(keys) > 700
    assert all(0 < e.value < 1 for e in entries)
    ranks = {"rank1", "rank5", "rank10", "mAP", "mINP"}
    assert {e.metric for e in entries if e.kind != "analysis"} == ranks
    assert all(e.value == pytest.approx(float(e.printed) / 100) for e in entries if e.metric in ranks)


@pytest.mark.covers(33)
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("hpl", "1", "IRRA", "cuhk-pedes", "mAP"), ("66.10", "66.13")),
        (("bdam-icme", "I", "IRRA", "cuhk-pedes", "mAP"), ("66.10", "66.13")),
        (("irra-readme", "README", "IRRA", "icfg-pedes", "rank1"), ("63.36", "63.46")),
        (("bdam-long", "5", "IRRA", "icfg-pedes", "rank1"), ("63.36", "63.46")),
        (("bdam-icme", "I", "IRRA", "icfg-pedes", "rank5"), ("80.82", "80.24")),
        (("hpl", "1", "IRLT", "rstpreid", "rank1"), ("CFAM", "60.51")),
        (("bdam-long", "5", "CFAM", "icfg-pedes", "rank1"), ("75.60", "ICL")),
        (("bdam-icme", "III", "Full Fusion", "cuhk-pedes", "mAP"), ("69.58", "72.61")),
        (("bdam-long", "5", "HAM", "icfg-pedes", "mAP"), ("HAM", "41.78")),
        (("hpl", "1", "Ours", "cuhk-pedes", "mAP"), ("70.90", "70.89")),
        (("hpl", "1", "Ours", "icfg-pedes", "rank1"), ("HAM", "67.68")),
        (("hpl", "2", "Ours", "dukemtmc-reid", "rank1"), ("TransReID", "90.70")),
        (("bdam-icme", "IV", "w/o InfoNCE", "cuhk-pedes", "rank1"), ("36.55",)),
        (("bdam-icme", "V", "Identity-Only", "cuhk-pedes", "rank1"), ("few distinct",)),
        (("bdam-icme", "I", "IVT", "cuhk-pedes", "rank5"), ("85.93", "CFine")),
        (("bdam-icme", "Fig. 5", "clothing", "cuhk-pedes", "mean"), ("0.39", "0.38")),
        (("hpl", "text", "CMPR", "cuhk-pedes", "rank1_gain"), ("+1.01", "0.68")),
    ],
)
def test_a_number_carries_the_contradictions_that_it_is_part_of(entry, words):
    assert any(all(word in note for word in words) for note in one(*entry).notes)


@pytest.mark.parametrize(
    "entry",
    [
        ("bdam-icme", "I", "IRRA", "cuhk-pedes", "rank1"),
        ("hpl", "2", "CDNet", "market-1501", "mAP"),
        ("solider-readme", "README", "SOLIDER (Swin Tiny)", "msmt17", "mAP"),
    ],
)
def test_a_number_that_nobody_contradicts_carries_no_note(entry):
    assert one(*entry).notes == ()


@pytest.mark.covers(33)
def test_every_contradiction_about_numbers_points_at_numbers_that_exist():
    flagged = {note for entry in registry() for note in entry.notes}
    assert flagged == set(contradictions(numbers=True))
    assert flagged < set(contradictions())
    assert len(contradictions()) == len(set(contradictions())) >= 30


def test_every_rank_or_map_that_a_contradiction_names_is_a_number_of_the_registry():
    known = {entry.printed for entry in registry()} | {"80.25"}  # said to be printed "elsewhere"
    for note in contradictions(numbers=True):
        assert set(re.findall(r"\b\d\d\.\d\d\b", note)) <= known, note


def test_dashes_are_absent_not_zero():
    assert "mAP" not in {e.metric for e in find(paper="bdam-icme", row="CFAM")}


def test_comparison_is_limited_to_a_direction():
    assert {e.direction for e in comparison(dataset="market1501", direction="i2i")} == {"i2i"}
    assert comparison(dataset="market1501", direction="t2i") == []
    assert comparison(direction="it2i") == []


@pytest.mark.covers(32)
def test_an_entry_knows_how_its_epoch_was_chosen_and_what_it_started_from():
    assert one("bdam-long", "5", "Ours", "cuhk-pedes", "rank1").selection == "val"
    assert one("bdam-icme", "I", "Ours", "cuhk-pedes", "rank1").selection == "not said"
    assert one("irra-readme", "README", "IRRA", "cuhk-pedes", "rank1").selection == "test"
    assert one("solider-readme", "README", "SOLIDER (Swin Tiny)", "msmt17", "mAP").selection == "last"
    assert one("bdam-icme", "I", "HAM", "cuhk-pedes", "rank1").backbone == "CLIP-ViT"
    assert "LUPerson" in one("hpl", "1", "Ours", "cuhk-pedes", "rank1").pretraining


def test_a_number_that_a_text_repeats_says_nothing_of_its_own_training():
    repeated = one("bdam-long", "5", "IRRA", "cuhk-pedes", "rank1")
    assert repeated.quoted and repeated.selection == "not said" and not repeated.pretraining
    assert not one("bdam-long", "1", "+ BDAM", "cuhk-pedes", "rank1").quoted


@pytest.mark.parametrize(
    ("paper", "row"), [("wizwand", "InterPartAbility"), ("tbps-clip-issue", "TBPS-CLIP"), ("clip-reid-paper", None)]
)
def test_what_was_not_read_in_its_text_is_unverified(paper, row):
    found = find(paper=paper, row=row)
    assert found and not any(e.verified for e in found)
    assert all(e.note for e in found)


def test_the_only_number_of_interpartability_is_a_third_partys():
    assert [(e.paper, e.printed, e.source) for e in find(row="InterPartAbility")] == [
        ("wizwand", "78.17", "leaderboard")
    ]


def test_re_ranked_numbers_are_marked():
    marked = {(e.paper, e.dataset, e.metric, e.printed) for e in registry() if e.reranked}
    assert ("clip-reid-readme", "msmt17", "mAP", "86.7") in marked and len(marked) == 6


def test_every_paper_has_a_title_and_every_title_a_number():
    assert set(titles()) == {entry.paper for entry in registry()}
