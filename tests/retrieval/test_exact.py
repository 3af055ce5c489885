import numpy as np
import pytest
import torch

from reidctl.errors import DataError, UsageError
from reidctl.metrics import METRICS, chance, distinct_query_ceiling
from reidctl.retrieval.exact import evaluate_ranking, search
from reidctl.retrieval.products import Gallery, lattice


def unit(rng, rows, width):
    values = rng.normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def problem(seed, queries=60, gallery=90, people=12, width=16, *, discrete=False):
    rng = np.random.default_rng(seed)
    q, g = unit(rng, queries, width), unit(rng, gallery, width)
    if discrete:  # few distinct vectors: ties everywhere
        q, g = q[rng.integers(0, 4, queries)], g[rng.integers(0, 9, gallery)]
    names = np.array([f"p{i}" for i in range(people)], dtype=object)
    cameras = np.array(["c1", "c2", "c3"], dtype=object)
    return (
        q,
        g,
        dict(
            query_person=names[rng.integers(0, people, queries)],
            gallery_person=names[rng.integers(0, people, gallery)],
            query_camera=cameras[rng.integers(0, 3, queries)],
            gallery_camera=cameras[rng.integers(0, 3, gallery)],
            query_outfit=cameras[rng.integers(0, 3, queries)],
            gallery_outfit=cameras[rng.integers(0, 3, gallery)],
        ),
    )


def exact_scores(q, g):
    """All scores, each computed on its own by one of the three ways (`ways` below compares them)."""
    gallery = Gallery(g, np.arange(len(g)), len(g), torch.device("cpu"))
    row, position = np.divmod(np.arange(len(q) * len(g)), len(g))
    return gallery.pair_scores(lattice(q, torch.device("cpu")), row, position).view(len(q), len(g))


def slow_metrics(scores, labels, exclude):
    """Three nested loops over the definitions; only for scores without ties."""
    rows = []
    for i in range(scores.shape[0]):
        kept = []
        for j in range(scores.shape[1]):
            same = labels["query_person"][i] == labels["gallery_person"][j]
            camera = labels["query_camera"][i] == labels["gallery_camera"][j]
            outfit = labels["query_outfit"][i] == labels["gallery_outfit"][j]
            dropped = {"none": False, "same_camera": camera, "same_outfit": outfit}
            dropped |= {"cloth_changing": camera or outfit, "same_clothes": camera or not outfit}
            if same and dropped[exclude]:
                continue
            kept.append((-scores[i, j], same))
        kept.sort(key=lambda pair: pair[0])
        places = [place for place, (_, same) in enumerate(kept, 1) if same]
        if places:
            precision = 0.0
            for hits, place in enumerate(places, 1):
                precision += hits / place
            found = [float(places[0] <= k) for k in (1, 5, 10, 20)]
            rows.append([*found, precision / len(places), len(places) / places[-1], sum(found[:3])])
    return dict(zip(METRICS, np.mean(rows, axis=0), strict=True)), scores.shape[0] - len(rows)


@pytest.mark.covers(25, 26, 28)
def test_three_queries_by_four_images_by_hand():
    scores = np.array([[0.9, 0.1, 0.4, 0.2], [0.3, 0.5, 0.1, 0.6], [0.2, 0.3, 0.4, 0.1]], np.float32)
    # People of the images: a b a c. Query a: ranks 1, 2. Query b: rank 2. Query c: rank 4.
    found = evaluate_ranking(
        np.eye(3, dtype=np.float32),
        np.ascontiguousarray(scores.T),
        query_person=list("abc"),
        gallery_person=list("abac"),
    )
    assert found.queries.first_match.tolist() == [1, 2, 4]
    assert found.queries.average_precision.tolist() == [1.0, 0.5, 0.25]
    assert found.queries.inp.tolist() == [1.0, 0.5, 0.25]
    assert found.queries.means()["rank1"] == pytest.approx(1 / 3)
    assert found.queries.means()["rank5"] == 1.0
    assert found.index.tolist() == [[0, 2, 3, 1], [3, 1, 0, 2], [2, 1, 0, 3]]
    assert found.match.tolist()[0] == [True, True, False, False]
    np.testing.assert_allclose(found.score[0], [0.9, 0.4, 0.2, 0.1], atol=1e-7)


@pytest.mark.covers(24, 25, 26, 27, 28)
@pytest.mark.parametrize("exclude", ["none", "same_camera", "same_outfit", "cloth_changing", "same_clothes"])
@pytest.mark.parametrize("people", [4, 30])  # many and few matches take different counting code
def test_equals_three_nested_loops_on_random_input(exclude, people):
    q, g, labels = problem(0, people=people)
    found = evaluate_ranking(q, g, **labels, exclude=exclude, query_block=7, gallery_block=11)
    expected, skipped = slow_metrics(q.astype(np.float64) @ g.T.astype(np.float64), labels, exclude)
    assert found.queries.skipped == skipped
    for metric, value in found.queries.means().items():
        assert value == pytest.approx(expected[metric], abs=1e-12)


def irra_metrics(similarity, query_person, gallery_person):
    """The rules of anosorae/IRRA utils/metrics.py, written anew: full argsort, cumulative sums, no tie rule."""
    order = np.argsort(-similarity, axis=1)
    match = gallery_person[order] == query_person[:, None]
    running = match.cumsum(1)
    ranks = {f"rank{k}": (running[:, k - 1] > 0).mean() for k in (1, 5, 10, 20)}
    ranks["rSum"] = ranks["rank1"] + ranks["rank5"] + ranks["rank10"]
    precision = running / np.arange(1, match.shape[1] + 1)
    ap = (precision * match).sum(1) / match.sum(1)
    last = match.shape[1] - 1 - match[:, ::-1].argmax(1)
    return {**ranks, "mAP": ap.mean(), "mINP": (match.sum(1) / (last + 1)).mean()}


@pytest.mark.covers(25, 26, 28)
def test_agrees_with_the_rules_of_irra_where_nothing_is_tied():
    q, g, labels = problem(1, people=5)
    expected = irra_metrics(q @ g.T, labels["query_person"], labels["gallery_person"])
    found = evaluate_ranking(q, g, query_person=labels["query_person"], gallery_person=labels["gallery_person"])
    assert found.queries.means() == pytest.approx(expected, abs=1e-12)


def as_bits(ranking):
    queries = ranking.queries
    arrays = [queries.matches, queries.first_match, queries.average_precision, queries.inp, *queries.hits.values()]
    return [a.tobytes() for a in (*arrays, ranking.gallery, ranking.index, ranking.score, ranking.match)]


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 90), (7, 13), (60, 2), (64, 64), (1000, 1000)])
def test_bits_do_not_depend_on_the_block_sizes(blocks, discrete):
    q, g, labels = problem(2, discrete=discrete)
    call = dict(labels, exclude="same_camera", top=20)
    expected = as_bits(evaluate_ranking(q, g, **call))
    assert as_bits(evaluate_ranking(q, g, **call, query_block=blocks[0], gallery_block=blocks[1])) == expected


@pytest.mark.covers(26)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_bits_do_not_depend_on_the_order_of_rows(seed, discrete):
    q, g, labels = problem(3, discrete=discrete)
    ids = np.array([f"image{i:03d}" for i in range(len(g))], dtype=object)
    first = evaluate_ranking(q, g, **labels, exclude="same_camera", gallery_id=ids)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(q)), rng.permutation(len(g))
    moved = {key: value[rows if key.startswith("query") else columns] for key, value in labels.items()}
    other = evaluate_ranking(
        q[rows], g[columns], **moved, exclude="same_camera", gallery_id=ids[columns], query_block=17, gallery_block=19
    )
    assert other.queries.average_precision.tobytes() == first.queries.average_precision[rows].tobytes()
    assert other.queries.inp.tobytes() == first.queries.inp[rows].tobytes()
    assert other.queries.means() == first.queries.means()
    shown = [np.where(r.index < 0, "", i[r.index]) for r, i in ((other, ids[columns]), (first, ids))]
    assert (shown[0] == shown[1][rows]).all()
    assert other.score.tobytes() == first.score[rows].tobytes()


def test_bits_do_not_depend_on_the_number_of_threads():
    q, g, labels = problem(4, queries=200, gallery=700, width=96)
    expected = as_bits(evaluate_ranking(q, g, **labels))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert as_bits(evaluate_ranking(q, g, **labels)) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [3, 512, 2048])
def test_scores_are_exact_in_any_order_of_summation(width):
    rng = np.random.default_rng(width)
    q, g = unit(rng, 5, width), unit(rng, 7, width)
    scores = exact_scores(q, g)
    for i in range(5):
        for j in range(7):
            whole = [int(v) for v in np.rint(q[i].astype(np.float64) * 2**26)]
            other = [int(v) for v in np.rint(g[j].astype(np.float64) * 2**26)]
            truth = sum(a * b for a, b in zip(whole, other, strict=True))  # Python integers
            assert int(scores[i, j] * 2**52) == truth


def test_rounding_the_input_costs_less_than_a_float32_product():
    rng = np.random.default_rng(5)
    q, g = unit(rng, 50, 512), unit(rng, 400, 512)
    truth = q.astype(np.float64) @ g.T.astype(np.float64)
    index, score = search(q, g, top=400)
    ours = np.abs(exact_scores(q, g).numpy() - truth).max()
    assert ours < np.abs(q @ g.T - truth).max()
    np.testing.assert_allclose(score, np.take_along_axis(truth, index, 1), atol=1e-7)


@pytest.mark.covers(29)
def test_a_collapsed_model_scores_exactly_chance():
    _, _, labels = problem(6)
    q, g = np.full((60, 4), 0.5, np.float32), np.full((90, 4), 0.5, np.float32)
    found = evaluate_ranking(q, g, **labels, exclude="same_camera", query_block=13, gallery_block=8)
    expected = chance(found.queries.matches, found.gallery)
    assert found.queries.means() == expected.means()
    assert found.queries.means()["rank1"] < 0.2


@pytest.mark.covers(27)
def test_a_query_whose_only_match_shares_its_camera_is_skipped_and_counted():
    q = g = np.eye(3, dtype=np.float32)
    found = evaluate_ranking(
        q,
        g,
        query_person=["a", "b", "z"],
        gallery_person=["a", "b", "b"],
        query_camera=["c1", "c1", "c1"],
        gallery_camera=["c1", "c1", "c2"],
        exclude="same_camera",
    )
    # a: only match dropped. b: its same-camera match dropped, the other stays. z: nobody in the gallery.
    assert found.queries.matches.tolist() == [0, 1, 0]
    assert found.queries.skipped == 2
    assert found.gallery.tolist() == [2, 2, 3]
    assert 0 not in found.index[0].tolist()
    assert found.index[0].tolist()[2] == -1
    assert np.isnan(found.score[0, 2])


@pytest.mark.covers(27)
def test_other_people_of_the_same_camera_and_distractors_stay_in_the_ranking():
    q = np.array([[1, 0]], np.float32)
    g = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    found = evaluate_ranking(
        q,
        g,
        query_person=["a"],
        gallery_person=["0", "b", "a"],
        query_camera=["c1"],
        gallery_camera=["c1", "c1", "c2"],
        exclude="same_camera",
    )
    assert found.queries.first_match.tolist() == [3.0]


def test_a_missing_camera_equals_no_camera():
    q = g = np.eye(2, dtype=np.float32)
    found = evaluate_ranking(
        q,
        g,
        query_person=["a", "b"],
        gallery_person=["a", "b"],
        query_camera=[None, "c1"],
        gallery_camera=[None, None],
        exclude="same_camera",
    )
    assert found.queries.matches.tolist() == [1, 1]


@pytest.mark.covers(24)
def test_same_outfit_drops_the_query_s_own_clothes():
    q = np.array([[1, 0]], np.float32)
    g = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    found = evaluate_ranking(
        q,
        g,
        query_person=["a"],
        gallery_person=["a", "b", "a"],
        query_outfit=["a1"],
        gallery_outfit=["a1", "b1", "a2"],
        exclude="same_outfit",
    )
    assert found.queries.matches.tolist() == [1]
    assert found.queries.first_match.tolist() == [2.0]


@pytest.mark.covers(37)
@pytest.mark.parametrize("discrete", [False, True])
def test_best_items_agree_with_the_metrics_and_with_sorting_everything(discrete):
    q, g, labels = problem(7, discrete=discrete)
    found = evaluate_ranking(q, g, **labels, exclude="none", top=25, gallery_block=10)
    scores = exact_scores(q, g)
    expected = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :25].numpy()
    assert (found.index == expected).all()
    if not discrete:
        shown = np.where(found.match.any(1), found.match.argmax(1) + 1, np.inf)
        assert (shown[np.isfinite(shown)] == found.queries.first_match[np.isfinite(shown)]).all()


@pytest.mark.parametrize("block", [1, 5, 100])
def test_search_orders_equal_scores_by_id(block):
    g = np.ones((6, 1), np.float32)
    ids = ["d", "b", "f", "a", "c", "e"]
    index, score = search(np.ones((2, 1), np.float32), g, top=4, gallery_id=ids, gallery_block=block)
    assert [[ids[i] for i in row] for row in index] == [list("abcd")] * 2
    assert (score == 1).all()


def test_no_model_exceeds_the_distinct_query_ceiling():
    q, g, labels = problem(8, discrete=True)
    texts = [row.tobytes().hex() for row in q]
    found = evaluate_ranking(q, g, **labels)
    assert found.queries.means()["rank1"] <= distinct_query_ceiling(texts, labels["query_person"])


def test_queries_do_not_influence_each_other():
    q, g, labels = problem(9)
    whole = evaluate_ranking(q, g, **labels)
    alone = evaluate_ranking(q[:1], g, **{k: v[:1] if k.startswith("query") else v for k, v in labels.items()})
    assert alone.queries.average_precision[0] == whole.queries.average_precision[0]
    assert alone.score.tobytes() == whole.score[:1].tobytes()


def test_empty_sides_are_answered_not_crashed_on():
    none, one = np.zeros((0, 3), np.float32), np.eye(3, dtype=np.float32)
    assert evaluate_ranking(none, one, query_person=[], gallery_person=list("abc")).index.shape == (0, 3)
    found = evaluate_ranking(one, none, query_person=list("abc"), gallery_person=[])
    assert found.queries.skipped == 3
    assert search(one, none, top=4)[0].shape == (3, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0])
def test_a_vector_that_would_break_exactness_is_named(bad):
    g = np.eye(3, dtype=np.float32)
    g[1, 1] = bad
    with pytest.raises(DataError, match="gallery vector in row 1"):
        search(np.eye(3, dtype=np.float32), g)


def test_widths_must_agree():
    with pytest.raises(DataError, match="width 2"):
        search(np.eye(2, dtype=np.float32), np.eye(3, dtype=np.float32))


def test_an_exclusion_without_its_labels_is_refused():
    with pytest.raises(DataError, match="same_camera"):
        evaluate_ranking(
            np.eye(2, dtype=np.float32),
            np.eye(2, dtype=np.float32),
            query_person=list("ab"),
            gallery_person=list("ab"),
            exclude="same_camera",
        )


@pytest.mark.parametrize("sizes", [{"top": -1}, {"query_block": 0}, {"gallery_block": 0}])
def test_sizes_that_mean_nothing_are_refused(sizes):
    one = np.eye(2, dtype=np.float32)
    with pytest.raises(UsageError, match="top="):
        search(one, one, **sizes)
    with pytest.raises(UsageError, match="top="):
        evaluate_ranking(one, one, query_person=list("ab"), gallery_person=list("ab"), **sizes)


def test_a_list_of_people_of_the_wrong_length_is_named():
    one = np.eye(2, dtype=np.float32)
    with pytest.raises(DataError, match="query person labels has 1 for 2"):
        evaluate_ranking(one, one, query_person=["a"], gallery_person=list("ab"))
