import math
import tracemalloc

import numpy as np
import pytest
import torch

from reidctl.errors import DataError, UsageError
from reidctl.metrics import chance
from reidctl.retrieval.rerank import PRESETS, KReciprocal, Parameters, parse
from reidctl.retrieval.scores import rank_scores


def crowd(queries, gallery, people, width=16, noise=0.8, seed=0):
    """Unit vectors that cluster by person; the legacy generator's stream is frozen by NumPy."""
    rng = np.random.RandomState(seed)
    centre = rng.standard_normal((people, width))
    person = np.concatenate([np.arange(queries), np.arange(gallery)]) % people
    values = (centre[person] + noise * rng.standard_normal((len(person), width))).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values[:queries], values[queries:], person[:queries], person[queries:]


def names(letter, count):
    return [f"{letter}{number:05d}" for number in range(count)]


def built(query, gallery, parameters, **more):
    ids = {"query_id": names("q", len(query)), "gallery_id": names("g", len(gallery))}
    return KReciprocal(query, gallery, parameters, **{**ids, **more})


def every(reranked, queries):
    return reranked.distances(slice(0, queries))


def slow(query, gallery, parameters):
    """The definition with sets and loops, in integers where anything is compared; shape (Q, G)."""
    whole = np.rint(np.concatenate([query, gallery]).astype(np.float64) * 2**26).astype(np.int64)
    product = whole @ whole.T  # exact
    items = range(len(whole))
    distance = np.maximum(2 - 2 * (product / 2.0**52), 0)
    farthest = distance.max(axis=1)

    def near(i, count):
        others = sorted((int(product[i, j]), j) for j in items if j != i)[::-1]
        if count < len(others):
            others = [(value, j) for value, j in others[:count] if value > others[count][0]]
        return {i} | {j for _, j in others}

    k1, k2 = parameters.k1, parameters.k2
    lists = {count: [near(i, count) for i in items] for count in {k1, int(np.around(k1 / 2)), k2 - 1}}

    def reciprocal(i, count):
        return {j for j in lists[count][i] if i in lists[count][j]}

    encoding = np.zeros((len(whole), len(whole)))
    for i in items:
        start = reciprocal(i, k1)
        members = set(start)
        for j in start:
            more = reciprocal(j, int(np.around(k1 / 2)))
            if 3 * len(more & start) > 2 * len(more):
                members |= more
        for j in members:
            encoding[i, j] = math.exp(-distance[i, j] / farthest[i] if farthest[i] else 0)
        encoding[i] /= encoding[i].sum()
    encoding = np.stack([encoding[sorted(lists[k2 - 1][i])].mean(axis=0) for i in items])
    result = np.zeros((len(query), len(gallery)))
    for i in range(len(query)):
        for g in range(len(gallery)):
            j = len(query) + g
            shared = np.minimum(encoding[i], encoding[j]).sum()
            original = distance[i, j] / farthest[i] if farthest[i] else 0
            result[i, g] = (1 - parameters.weight) * (1 - shared / (2 - shared)) + parameters.weight * original
    return result


@pytest.mark.parametrize("text", ["20/6/0.3", "50/15/0.3", "7/3/0.5", "1/1/0", "5/9/1", "12/1/0.3"])
def test_equals_sets_and_loops(text):
    q, g, *_ = crowd(12, 90, 9)
    parameters = parse(text)
    np.testing.assert_allclose(every(built(q, g, parameters), 12), slow(q, g, parameters), rtol=0, atol=1e-13)


def test_equals_sets_and_loops_with_ties_everywhere():
    q, g, *_ = crowd(12, 90, 9)
    rng = np.random.RandomState(1)
    q, g = q[rng.randint(0, 8, 12)], g[rng.randint(0, 40, 90)]
    for parameters in (Parameters(7, 3, 0.3), Parameters(20, 6, 0.3)):
        np.testing.assert_allclose(every(built(q, g, parameters), 12), slow(q, g, parameters), rtol=0, atol=1e-13)


def test_four_people_on_a_circle_by_hand():
    angle = np.radians([0, 10, 60, 75])
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    found = every(built(vectors[:1], vectors[1:], Parameters(1, 1, 0.25)), 1)[0]
    # Mutually nearest: 0 and 10 degrees, 60 and 75. The rest share nothing, so their Jaccard distance is 1.
    d = lambda a, b: 2 - 2 * math.cos(math.radians(a - b))  # noqa: E731
    first, second = math.exp(-d(0, 10) / d(0, 75)), math.exp(-d(0, 10) / d(10, 75))
    shared = first / (1 + first) + second / (1 + second)
    expected = [
        0.75 * (1 - shared / (2 - shared)) + 0.25 * d(0, 10) / d(0, 75),
        0.75 + 0.25 * d(0, 60) / d(0, 75),
        0.75 + 0.25,
    ]
    np.testing.assert_allclose(found, expected, atol=1e-7)


# Made by running the files named here, fetched from GitHub, on `crowd(4, 60, 6)`: the first six distances of each
# query. fast-reid's and torchreid's squares what it is given, so it was given Euclidean distances in float64.
UPSTREAM = {
    # JDAI-CV/fast-reid fastreid/evaluation/rerank.py @ c9bc3ce, float32
    ("fast-reid", "20/6/0.3"): [
        [0.118735, 0.8858752, 0.8456437, 0.9204039, 0.957217, 0.7318208],
        [0.7383384, 0.1353832, 0.8877867, 0.9466453, 0.7885353, 0.8560981],
        [0.8639746, 0.8582776, 0.1412412, 0.7890679, 0.6387827, 0.6129435],
        [0.9007436, 0.8329969, 0.7627086, 0.1971168, 0.3726847, 0.9238973],
    ],
    ("fast-reid", "50/15/0.3"): [
        [0.1201775, 0.4575659, 0.3576919, 0.4476043, 0.4687976, 0.2915533],
        [0.2780725, 0.0961704, 0.3981771, 0.4622804, 0.3190305, 0.3742728],
        [0.4044787, 0.3616633, 0.1072358, 0.3565889, 0.2679658, 0.284323],
        [0.4164855, 0.3474304, 0.3691421, 0.1097604, 0.1643084, 0.4525877],
    ],
    # Syliz517/CLIP-ReID utils/reranking.py @ eb1898b, float16 inside
    ("CLIP-ReID", "50/15/0.3"): [
        [0.122204, 0.4590696, 0.3575534, 0.4471242, 0.4696791, 0.2911635],
        [0.278519, 0.0966256, 0.3973693, 0.461771, 0.3187637, 0.3739133],
        [0.4036493, 0.3607651, 0.1069774, 0.3561788, 0.2673342, 0.2834923],
        [0.4153379, 0.3467008, 0.3692305, 0.1096918, 0.1643783, 0.4526071],
    ],
}


@pytest.mark.parametrize(("source", "text"), UPSTREAM)
def test_equals_upstream_code_up_to_its_precision(source, text):
    q, g, *_ = crowd(4, 60, 6)
    found = every(built(q, g, parse(text)), 4)[:, :6]
    tolerance = {"fast-reid": 2e-6, "CLIP-ReID": 5e-3}[source]
    np.testing.assert_allclose(found, UPSTREAM[source, text], rtol=0, atol=tolerance)


@pytest.mark.parametrize("tied", [False, True])
def test_bits_depend_neither_on_blocks_nor_threads_nor_slices(tied):
    q, g, *_ = crowd(30, 100, 10, width=96)
    if tied:
        g[50:90] = g[:40]
    parameters = Parameters(20, 6, 0.3)
    expected = every(built(q, g, parameters), 30)
    before = torch.get_num_threads()
    try:
        for block, threads in ((1, 1), (17, 2), (64, 3)):
            torch.set_num_threads(threads)
            found = built(q, g, parameters, block=block)
            assert every(found, 30).tobytes() == expected.tobytes()
            for rows in (slice(0, 1), slice(11, 30), slice(29, 99)):
                assert found.distances(rows).tobytes() == expected[rows].tobytes()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_order_of_rows(seed, tied):
    q, g, *_ = crowd(30, 200, 20)
    if tied:
        g[50:120] = g[:70]
        q[3] = q[4] = g[60]
    parameters = Parameters(20, 6, 0.3)
    expected = every(built(q, g, parameters), 30)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(30), rng.permutation(200)
    moved = built(
        q[rows],
        g[columns],
        parameters,
        query_id=np.array(names("q", 30), object)[rows],
        gallery_id=np.array(names("g", 200), object)[columns],
        block=17,
    )
    assert every(moved, 30).tobytes() == expected[rows][:, columns].tobytes()


def test_renaming_items_moves_no_more_than_rounding():
    # Ids order the sums and nothing else; where lists end in a tie, an argsort would let them choose neighbours.
    q, g, *_ = crowd(10, 60, 6)
    g[30:] = g[:30]
    parameters = Parameters(7, 3, 0.3)
    other = built(q, g, parameters, query_id=names("x", 10)[::-1], gallery_id=names("a", 60)[::-1])
    np.testing.assert_allclose(every(other, 10), every(built(q, g, parameters), 10), rtol=0, atol=1e-14)


@pytest.mark.covers(29)
def test_a_collapsed_model_scores_exactly_chance_although_ids_are_sorted_by_person():
    q, g = np.full((20, 4), 0.5, np.float32), np.full((60, 4), 0.5, np.float32)
    people = {"query_person": np.arange(20) // 4, "gallery_person": np.arange(60) // 12}
    reranked = KReciprocal(
        q,
        g,
        Parameters(20, 6, 0.3),
        query_id=[f"p{i // 4}-q{i}" for i in range(20)],
        gallery_id=[f"p{i // 12}-g{i}" for i in range(60)],
    )
    found = rank_scores(lambda rows: -reranked.distances(rows), queries=20, gallery=60, **people)
    assert found.queries.means() == chance(found.queries.matches, found.gallery).means()


def test_an_image_that_is_query_and_gallery_item_counts_once():
    _, g, *_ = crowd(1, 80, 8)
    ids = names("i", 80)
    both = KReciprocal(g[:5], g, Parameters(7, 3, 0.3), query_id=ids[:5], gallery_id=ids)
    assert both.items == 80
    expected = slow(g[:5], g[5:], Parameters(7, 3, 0.3))
    np.testing.assert_allclose(every(both, 5)[:, 5:], expected, rtol=0, atol=1e-13)
    changed = g[:5][:, ::-1].copy()  # the same ids, e.g. degraded queries, are other items
    assert KReciprocal(changed, g, Parameters(7, 3, 0.3), query_id=ids[:5], gallery_id=ids).items == 85


def test_re_ranking_helps_where_people_cluster_and_leaves_distances_in_the_unit_interval():
    q, g, query_person, gallery_person = crowd(60, 600, 30, width=64, noise=1.7)
    reranked = built(q, g, PRESETS["zhong"])
    people = {"queries": 60, "gallery": 600, "query_person": query_person, "gallery_person": gallery_person}
    before = rank_scores(lambda rows: (q[rows] @ g.T).astype(np.float64), **people).queries.means()["mAP"]
    after = rank_scores(lambda rows: -reranked.distances(rows), **people).queries.means()["mAP"]
    assert after > before + 0.05
    found = every(reranked, 60)
    assert found.min() >= 0 and found.max() <= 1


def peak(items, parameters, width=16, block=64):
    q, g, *_ = crowd(100, items - 100, items // 20, width=width)
    tracemalloc.start()
    try:
        reranked = built(q, g, parameters, block=block)
        for start in range(0, 100, block):
            reranked.distances(slice(start, start + block))
        return tracemalloc.get_traced_memory()[1], reranked.nonzeros / reranked.items
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("items", "preset", "width"), [(2000, "zhong", 128), (5000, "zhong", 16), (2000, "clip-reid", 16)]
)
def test_memory_stays_below_the_stated_bound(items, preset, width):
    # NumPy and SciPy report to tracemalloc; PyTorch, which does not, holds blocks only.
    parameters, b = PRESETS[preset], 64
    used, w = peak(items, parameters, width, b)
    k1, k = parameters.k1, max(parameters.k1, parameters.k2)
    assert w <= parameters.k2 * (k1 + 1) * (k1 + 8) / 6
    linear = 12 * width + 50 * (k + 2) + 32 * w
    assert used < items * linear + b * (16 * items + 16 * k1**2) + 2**18 * width
    assert used < 8 * items**2


def hubs(items, width=64, count=60):
    """Vectors far from one another, all near a few hubs, which are in everybody's lists."""
    rng = np.random.RandomState(0)
    centre = np.eye(1, width)
    far = rng.standard_normal((items, width))
    values = 1.2 * centre + far / np.linalg.norm(far, axis=1, keepdims=True)
    values[:count] = centre + 0.02 * rng.standard_normal((count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_the_buffers_of_one_query_stay_below_their_stated_bound_where_hubs_are_everywhere():
    values = hubs(3000)
    reranked = built(values[-5:], values[:-5], PRESETS["zhong"])
    gallery, most = len(values) - 5, 0
    for number in range(5):
        mine = reranked._rows.indices[slice(*reranked._rows.indptr[number : number + 2])]
        touched = int(np.diff(reranked._columns.indptr)[mine].sum())
        assert touched <= gallery * len(mine)
        tracemalloc.start()
        reranked._jaccard(number)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert used < 40 * touched + 40 * gallery + 20_000
        most = max(most, touched)
    assert most > 2 * gallery  # the case that the bound is about


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(parameters=Parameters(91, 6, 0.3)), "k1=91 .* 90"),
        (lambda c: c.update(parameters=Parameters(20, 91, 0.3)), "k2=91 .* 90"),
        (lambda c: c.update(query=c["query"][:0], query_id=[]), "0 and 90"),
        (lambda c: c.update(query=c["query"][:, :8]), "width 8, the gallery 16"),
        (lambda c: c["gallery"].__setitem__((7, 3), np.nan), "gallery vector in row 7 has length nan"),
        (lambda c: c["query"].__setitem__(2, 0), "query vector in row 2 has length 0"),
        (lambda c: c["gallery_id"].__setitem__(4, "g00003"), "gallery id g00003 occurs 2 times"),
        (lambda c: c["query_id"].__setitem__(4, "q00003"), "query id q00003 occurs 2 times"),
        (lambda c: c["query_id"].pop(), "query id labels has 11 for 12 items"),
        (lambda c: c["gallery_id"].append("g"), "gallery id labels has 91 for 90 items"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, g, *_ = crowd(12, 90, 9)
    call = {"query": q, "gallery": g, "parameters": PRESETS["zhong"]}
    call |= {"query_id": names("q", 12), "gallery_id": names("g", 90)}
    change(call)
    with pytest.raises(DataError, match=message):
        KReciprocal(
            call["query"], call["gallery"], call["parameters"], query_id=call["query_id"], gallery_id=call["gallery_id"]
        )


def test_as_many_neighbours_as_gallery_items_are_allowed():
    q, g, *_ = crowd(3, 20, 4)
    parameters = Parameters(20, 20, 0.3)
    np.testing.assert_allclose(every(built(q, g, parameters), 3), slow(q, g, parameters), rtol=0, atol=1e-13)
    one = built(q[:1], g, parameters)  # every list then holds all items
    np.testing.assert_allclose(every(one, 1), slow(q[:1], g, parameters), rtol=0, atol=1e-13)


def test_both_parameter_sets_in_use_have_names():
    assert {preset.name for preset in PRESETS.values()} == {"20/6/0.3", "50/15/0.3"}
    assert parse("clip-reid") == parse("50/15/0.30") == Parameters(50, 15, 0.3)
    assert parse("zhong") == parse("20/6/0.3")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("20/6/0.3000001", "20/6/0.3000001"),
        ("020/6/.30", "20/6/0.3"),
        ("20/6/1", "20/6/1"),
        ("20/6/0", "20/6/0"),
        ("20/6/-0", "20/6/0"),
        ("20/6/1e-7", "20/6/1e-07"),
    ],
)
def test_different_parameters_have_different_names_and_a_name_is_read_back(text, name):
    assert parse(text).name == name
    assert parse(name) == parse(text)


@pytest.mark.parametrize("text", ["", "20/6", "20/6/x", "20.5/6/0.3", "0/6/0.3", "20/0/0.3", "20/6/1.5", "20/6/nan"])
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(UsageError, match=r"(Unknown r|R)e-ranking parameters"):
        parse(text)
