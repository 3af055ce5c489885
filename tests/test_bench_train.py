"""The parts of the training benchmark that have a true answer; no time is measured."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_train", FOLDER / "bench_train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_train"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("bench_train", "train_sides", "train_irra", "train_data"):
            sys.modules.pop(name, None)


def test_the_table_has_medians_their_spread_ratios_and_the_share_of_the_peak(bench):
    rows = {
        "IRRA": bench.Row([90.0, 100.0, 120.0], flops=3e9, memory=2e9),
        "irra": bench.Row([250.0, 200.0, 210.0], bare="irra, bare", beside="IRRA", flops=2e9, memory=1.5e9),
        "irra, bare": bench.Row([280.0], flops=1e9),
    }
    lines = bench.table(rows, peak=1e12).splitlines()
    assert [len(line.split("|")) for line in lines] == [10] * 5
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        ["IRRA", "100", "20%", "", "", "3.00", "30.0%", "2.00 GB"],
        ["irra", "210", "19%", "2.10", "75%", "2.00", "42.0%", "1.50 GB"],
        ["irra, bare", "280", "0%", "", "", "1.00", "28.0%", ""],
    ]


def test_a_row_whose_partner_takes_no_part_has_no_ratio(bench):
    line = bench.table({"irra": bench.Row([5.0], bare="irra, bare", beside="IRRA")}, peak=1.0).splitlines()[2]
    assert line == "| irra | 5 | 0% |  |  |  |  |  |"


def test_batches_are_timed_from_the_request_for_the_first_that_counts_to_the_one_after_the_last(bench):
    now = [0.0]
    sides = sys.modules["train_sides"]
    assert sides.WARM == 2

    def loading():
        for size in (7, 7, 3, 4):
            now[0] += 10.0  # loading
            yield [0] * size

    clocked = sides.Clocked(loading(), len, torch.device("cpu"), lambda: now[0])
    for _ in clocked:
        now[0] += 1.0  # the step
    assert (clocked.images, clocked.seconds) == (7, 22.0)
    assert clocked.rate == pytest.approx(7 / 22)


def test_the_pictures_are_read_by_our_importer_as_cuhk_pedes(bench, tmp_path):
    data = sys.modules["train_data"]
    data.write_dataset(tmp_path / "raw", 10)
    corpus = data.read_corpus(tmp_path / "raw", tmp_path / "run")
    assert (len(corpus.images), len(corpus.captions), corpus.images["person_id"].nunique()) == (10, 20, 3)
    assert all(path.is_file() for path in corpus.paths())
    assert len(corpus.identity) == len(corpus.clothing) == 10 and all(corpus.identity)
