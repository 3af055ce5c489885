"""The fast path against slow exact arithmetic, where float32 alone would go wrong."""

import numpy as np
import pytest
import torch

from reidctl.metrics import chance
from reidctl.retrieval import exact, products
from reidctl.retrieval.counting import Best, Levels, _reached
from reidctl.retrieval.crowd import crowded_levels
from reidctl.retrieval.exact import evaluate_ranking, search
from reidctl.retrieval.products import Block, Gallery, full_precision, lattice, places

CPU = torch.device("cpu")


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def near_ties(seed, queries=20, gallery=300, width=64, *, spread=1e-6):
    """Unit vectors that all nearly agree: most scores lie within the error of a float32 product of each other."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=width)
    q = unit(centre + 1e-3 * rng.normal(size=(queries, width)))
    g = unit(centre + spread * rng.normal(size=(gallery, width)))
    return q, g


def whole_numbers(q, g):
    """Scores in units of 2^-52, in Python's integers."""
    rows = [[[int(v) for v in np.rint(row.astype(np.float64) * 2**26)] for row in side] for side in (q, g)]
    return np.array([[sum(a * b for a, b in zip(one, two, strict=True)) for two in rows[1]] for one in rows[0]])


@pytest.mark.parametrize("spread", [1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("people", [3, 40])
def test_near_ties_are_ordered_by_exact_arithmetic(spread, people):
    q, g = near_ties(people, spread=spread)
    rng = np.random.default_rng(7)
    query_person, gallery_person = rng.integers(0, people, len(q)), rng.integers(0, people, len(g))
    found = evaluate_ranking(q, g, query_person=query_person, gallery_person=gallery_person, top=40, gallery_block=37)
    scores = whole_numbers(q, g)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert (found.index == order[:, :40]).all()
    for i in range(len(q)):
        positive = scores[i][gallery_person == query_person[i]]
        if len(positive):
            top = positive.max()
            above, tied = (scores[i] > top).sum(), (scores[i] == top).sum()
            right = (positive == top).sum()
            assert found.queries.first_match[i] == above + (tied + 1) / (right + 1)
            assert found.queries.matches[i] == len(positive)


def test_near_ties_differ_in_float32():
    # The test above would be empty if a float32 product sorted these items correctly.
    q, g = near_ties(3)
    assert (np.argsort(-(q @ g.T), axis=1, kind="stable") != np.argsort(-whole_numbers(q, g), axis=1)).any()


@pytest.mark.parametrize("width", [1, 16, 512, 4096])
@pytest.mark.parametrize("kind", ["random", "constant", "alternating", "one large"])
def test_the_fast_score_is_never_further_off_than_the_slack(width, kind):
    rng = np.random.default_rng(width)
    shape = (40, width)
    q, g = {
        "random": lambda: (rng.normal(size=shape), rng.normal(size=shape)),
        "constant": lambda: (np.ones(shape) + 1e-3 * rng.random(shape), np.ones(shape) + 1e-3 * rng.random(shape)),
        "alternating": lambda: (np.ones(shape), np.tile([1.0, -1.0], width)[:width] + 1e-3 * rng.random(shape)),
        "one large": lambda: (np.eye(40, width) * 100 + rng.random(shape), np.eye(40, width) * 100 + rng.random(shape)),
    }[kind]()
    q, g = unit(q), unit(g)
    gallery = Gallery(g, np.arange(40), 40, CPU)
    query = lattice(q, CPU)
    (block,) = gallery.blocks(query)
    row, column = np.divmod(np.arange(1600), 40)
    true = gallery.pair_scores(query, row, column).view(40, 40)
    assert (block.scores.double() - true).abs().max() <= gallery.slack


@pytest.mark.parametrize("pairs", [0, 1, 60, 900])
def test_all_ways_to_an_exact_score_give_the_same_bits(pairs, monkeypatch):
    rng = np.random.default_rng(pairs)
    q, g = lattice(unit(rng.normal(size=(30, 48))), CPU), lattice(unit(rng.normal(size=(50, 48))), CPU)
    flat = torch.from_numpy(np.sort(rng.choice(1500, pairs, replace=False)))
    row, column = flat // 50, flat % 50
    found = []
    for few, dense in ((10_000, 2.0), (-1, 2.0), (10_000, -1.0)):  # gathered, sampled, everything
        monkeypatch.setattr(products, "_FEW", few)
        monkeypatch.setattr(products, "_DENSE", dense)
        found.append(Block(0, q.double(), g, q @ g.T).exact(row, column).numpy())
    truth = (q.double()[row] * g.double()[column]).sum(1).numpy()
    assert all(way.tobytes() == truth.tobytes() for way in found)


def test_reduced_precision_products_are_switched_off_while_ranking():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        q, g = near_ties(5)
        person = np.zeros(len(q)), np.arange(len(g)) % 9
        fast = evaluate_ranking(q, g, query_person=person[0], gallery_person=person[1])
        torch.set_float32_matmul_precision("highest")
        slow = evaluate_ranking(q, g, query_person=person[0], gallery_person=person[1])
        assert fast.index.tobytes() == slow.index.tobytes()
    finally:
        torch.set_float32_matmul_precision(before)


def test_levels_count_by_hand():
    levels = Levels(torch.tensor([[0.1, 0.3], [0.2, torch.inf]], dtype=torch.float64), slack=0.01)
    row = torch.tensor([0, 0, 0, 0, 1, 1])
    score = torch.tensor([0.05, 0.2, 0.295, 0.5, 0.9, 0.2], dtype=torch.float64)
    above, doubtful = levels.place(row, score)
    assert doubtful.tolist() == [False, False, True, False, False, True]
    assert above[~doubtful].tolist() == [0, 1, 2, 1]
    levels.tally.add(row, above)
    true = levels.place_exactly(row[doubtful], torch.tensor([0.3, 0.2], dtype=torch.float64))
    levels.tally.correct(row[doubtful], above[doubtful], *true)
    above, reach = levels.tally.result()
    # Row 0: 0.2, 0.3 and 0.5 above 0.1; only 0.5 above 0.3, which 0.3 reaches. Row 1: 0.9 above 0.2, 0.2 reaches it.
    assert above.tolist() == [[3, 1], [1, 0]]
    assert reach.tolist() == [[3, 2], [2, 0]]


def test_overlapping_levels_leave_no_item_undecided():
    levels = Levels(torch.tensor([[0.1, 0.1, 0.1 + 1e-9, 0.2]], dtype=torch.float64), slack=1e-3)
    row = torch.zeros(3, dtype=torch.int64)
    above, doubtful = levels.place(row, torch.tensor([0.0985, 0.1, 0.15], dtype=torch.float64))
    assert doubtful.tolist() == [False, True, False]
    assert above[2] == 3
    above, reach = levels.place_exactly(row[:1], torch.tensor([0.1], dtype=torch.float64))
    assert (above.tolist(), reach.tolist()) == ([0], [2])


def test_the_best_are_kept_by_score_then_position_over_many_calls():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 6, (5, 400)) / 8.0)
    best = Best(5, 20, CPU)
    for start in range(0, 400, 10):
        part = scores[:, start : start + 10]
        row, column = torch.nonzero(torch.ones_like(part), as_tuple=True)
        best.add(row, column + start, part[row, column])
    best.merge()
    expected = torch.sort(scores, dim=1, descending=True, stable=True)
    assert (best.position == expected.indices[:, :20]).all()
    assert (best.score == expected.values[:, :20]).all()


def test_most_scores_of_a_good_model_are_never_computed_exactly(monkeypatch):
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(50, 64))
    person = np.repeat(np.arange(50), 40)
    g = unit(centre[person] + 0.5 * rng.normal(size=(2000, 64)))
    q = unit(centre + 0.5 * rng.normal(size=(50, 64)))
    asked = []
    whole = Block.exact
    monkeypatch.setattr(Block, "exact", lambda self, row, column: (asked.append(len(row)), whole(self, row, column))[1])
    evaluate_ranking(q, g, query_person=np.arange(50), gallery_person=person, top=10, gallery_block=500)
    assert sum(asked) < 0.1 * q.shape[0] * g.shape[0]


def test_a_collapsed_model_of_many_blocks_still_scores_chance():
    q, g = np.full((40, 8), 8**-0.5, np.float32), np.full((900, 8), 8**-0.5, np.float32)
    person = np.arange(40) % 10, np.arange(900) % 30
    found = evaluate_ranking(q, g, query_person=person[0], gallery_person=person[1], gallery_block=128, query_block=9)
    assert found.queries.means() == chance(found.queries.matches, found.gallery).means()
    assert (found.index == np.arange(50)).all()


def test_search_finds_the_best_of_a_gallery_sorted_from_worst_to_best():
    # Every block beats all before it, the worst case for a threshold that only rises.
    angle = np.linspace(1.5, 0.0, 1000)
    g = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    index, score = search(np.array([[1, 0]], np.float32), g, top=7, gallery_block=10)
    assert index[0].tolist() == list(range(999, 992, -1))
    np.testing.assert_allclose(score[0], g[index[0], 0], atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_places_are_those_of_numpy_with_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in ((13, 17), (1, 1), (2, 0)):
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
            assert places(mask).tolist() == np.flatnonzero(mask.numpy()).tolist()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lowest", [0, 1, 3, 6])
@pytest.mark.parametrize("spread", [1e-6, 1.0])
def test_comparing_the_lowest_levels_with_every_score_counts_the_same(lowest, spread, monkeypatch):
    q, g = near_ties(lowest, gallery=1500, spread=spread)
    rng = np.random.default_rng(3)
    labels = dict(query_person=rng.integers(0, 300, len(q)), gallery_person=rng.integers(0, 300, len(g)))
    labels |= dict(query_camera=rng.integers(0, 2, len(q)), gallery_camera=rng.integers(0, 2, len(g)))
    found = []
    for count in (0, lowest):
        monkeypatch.setattr(exact, "crowded_levels", lambda scores, levels, count=count: min(count, levels.count))
        result = evaluate_ranking(q, g, **labels, exclude="same_camera", gallery_block=700)
        found.append([result.queries.average_precision, result.queries.inp, result.queries.first_match, result.index])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*found, strict=True))


def test_levels_are_called_crowded_where_most_scores_lie_above_them():
    scores = torch.linspace(-1, 1, 3200).expand(4, -1).contiguous()
    low = Levels(torch.tensor([[-0.9, -0.8, 0.9999]] * 4, dtype=torch.float64), 1e-5)
    high = Levels(torch.tensor([[0.998, 0.999, 0.9999]] * 4, dtype=torch.float64), 1e-5)
    assert crowded_levels(scores, low) == 2
    assert crowded_levels(scores, high) == 0


@pytest.mark.parametrize(
    ("items", "count"), [(1, 1), (5, 9), (30, 30), (800, 50), (801, 50), (4096, 50), (2400, 50), (290, 6)]
)
def test_the_first_bound_is_reached_by_enough_items(items, count):
    scores = torch.randn(7, items, generator=torch.Generator().manual_seed(items))
    reached = _reached(scores, count)
    assert ((scores >= reached[:, None]).sum(1) >= min(items, count)).all()
    if items >= 48 * count:  # and by few more: else everything would be computed exactly
        assert ((scores >= reached[:, None]).sum(1) < 2 * count).all()


@pytest.mark.parametrize("spread", [1e-9, 1e-6, 1.0])
@pytest.mark.parametrize("people", [3, 40])  # 100 and 8 positives of a query: searched and compared with each
def test_blocks_computed_exactly_as_a_whole_count_the_same(spread, people, monkeypatch):
    q, g = near_ties(people, gallery=300, spread=spread)
    rng = np.random.default_rng(9)
    labels = dict(query_person=rng.integers(0, people, len(q)), gallery_person=rng.integers(0, people, len(g)))
    labels |= dict(query_camera=rng.integers(0, 2, len(q)), gallery_camera=rng.integers(0, 2, len(g)))
    found = []
    for whole in (lambda start: False, lambda start: True, lambda start: start in (0, 128), lambda start: start == 64):
        monkeypatch.setattr(exact, "is_crowded", lambda block, levels, best, whole=whole: whole(block.start))
        result = evaluate_ranking(q, g, **labels, exclude="same_camera", gallery_block=64, top=30)
        queries = result.queries
        parts = (queries.average_precision, queries.inp, queries.first_match, result.index, result.score)
        found.append([part.tobytes() for part in parts])
    assert all(other == found[0] for other in found[1:])


def test_a_collapsed_model_is_counted_block_by_block_in_float64(monkeypatch):
    q, g = near_ties(1, queries=30, gallery=900, spread=1e-9)
    seen = []
    whole = exact.take_in_whole
    monkeypatch.setattr(exact, "take_in_whole", lambda block, *rest: (seen.append(block.start), whole(block, *rest)))
    monkeypatch.setattr(Block, "exact", lambda *_: pytest.fail("looked at single pairs"))
    evaluate_ranking(q, g, query_person=np.zeros(30), gallery_person=np.arange(900) % 50, gallery_block=300, top=5)
    assert seen == [0, 300, 600]


def test_a_healthy_model_is_not_counted_in_float64():
    rng = np.random.default_rng(1)
    q, g = unit(rng.normal(size=(50, 64))), unit(rng.normal(size=(900, 64)))
    person = np.arange(50), np.arange(900) % 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "take_in_whole", lambda *_: pytest.fail("not crowded"))
        evaluate_ranking(q, g, query_person=person[0], gallery_person=person[1], gallery_block=450, top=5)


@pytest.mark.parametrize("setting", ["tf32", "bf16", "none"])
def test_a_precision_set_by_the_new_switches_is_respected_and_restored(setting):
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = setting
        q, g = near_ties(5)
        fast = search(q, g, top=9)
        assert backend.fp32_precision == setting
        backend.fp32_precision = "ieee"
        assert fast[0].tobytes() == search(q, g, top=9)[0].tobytes()
    finally:
        backend.fp32_precision = before


def test_search_without_any_positive_and_without_a_top():
    q, g = near_ties(2)
    assert search(q, g, top=0)[0].shape == (len(q), 0)
    found = evaluate_ranking(q, g, query_person=["a"] * len(q), gallery_person=["b"] * len(g), top=0)
    assert found.queries.skipped == len(q)
