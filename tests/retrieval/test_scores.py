import numpy as np
import pytest

from reidctl.errors import DataError, UsageError
from reidctl.metrics import chance
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.retrieval.labels import SamePerson, keys_of, tie_order
from reidctl.retrieval.scores import rank_scores

RULES = ["none", "same_camera", "same_outfit", "same_item", "cloth_changing", "same_clothes"]


def labels(rng, queries, gallery, people=12):
    def draw(letter, kinds, count):
        return np.array([f"{letter}{i}" for i in rng.integers(0, kinds, count)], dtype=object)

    found = {}
    for side, count in (("query", queries), ("gallery", gallery)):
        found[f"{side}_person"] = draw("p", people, count)
        found[f"{side}_camera"] = draw("c", 3, count)
        found[f"{side}_outfit"] = draw("o", 3, count)
        found[f"{side}_camera"][:5] = None
    found["query_id"] = draw("i", gallery, queries)
    found["gallery_id"] = np.array([f"i{i}" for i in range(gallery)], dtype=object)
    return found


def ranked(scores, seen=None, **more):
    def block(rows):
        if seen is not None:
            seen.append((rows.start, rows.stop))
        return scores[rows]

    return rank_scores(block, queries=scores.shape[0], gallery=scores.shape[1], **more)


def as_bits(ranking):
    queries = ranking.queries
    arrays = [queries.matches, queries.first_match, queries.average_precision, queries.inp, *queries.hits.values()]
    return [a.tobytes() for a in (*arrays, ranking.gallery, ranking.index, ranking.score, ranking.match)]


@pytest.mark.covers(25, 26, 28)
def test_three_queries_by_four_images_by_hand():
    scores = np.array([[9.0, 1.0, 4.0, 2.0], [-3.0, 5.0, 1.0, 60.0], [2.0, 3.0, 4.0, -np.inf]])
    # People of the images: a b a c. Query a: ranks 1, 2. Query b: rank 2. Query c: rank 4.
    found = ranked(scores, query_person=list("abc"), gallery_person=list("abac"))
    assert found.queries.first_match.tolist() == [1, 2, 4]
    assert found.queries.average_precision.tolist() == [1.0, 0.5, 0.25]
    assert found.queries.inp.tolist() == [1.0, 0.5, 0.25]
    assert found.index.tolist() == [[0, 2, 3, 1], [3, 1, 2, 0], [2, 1, 0, 3]]
    assert found.match.tolist()[0] == [True, True, False, False]
    assert found.score.tolist()[1] == [60, 5, 1, -3]


def test_ties_are_worth_their_expected_value_and_shown_by_gallery_id():
    # Two of the three best items tie, one of them right: rank 1 or 2.
    found = ranked(
        np.array([[5.0, 5.0, 1.0]]), query_person=["a"], gallery_person=["b", "a", "b"], gallery_id=["z", "y", "x"]
    )
    assert found.queries.first_match.tolist() == [1.5]
    assert found.queries.hits[1].tolist() == [0.5]
    assert found.queries.average_precision.tolist() == [0.75]
    assert found.index.tolist() == [[1, 0, 2]]


@pytest.mark.covers(24, 25, 26, 27, 28)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("exclude", RULES)
def test_equals_the_evaluation_of_vectors_when_the_scores_are_their_products(exclude, discrete):
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(40, 6)), rng.normal(size=(70, 6))
    if discrete:
        q, g = q[rng.integers(0, 4, 40)], g[rng.integers(0, 9, 70)]
    # Small integers over 64: products are exact in any arithmetic, so both sides see the same ties.
    q, g = (np.rint(v / np.linalg.norm(v, axis=1, keepdims=True) * 24) / 32 for v in (q, g))
    call = dict(labels(rng, 40, 70), exclude=exclude, top=9)
    expected = evaluate_ranking(q.astype(np.float32), g.astype(np.float32), **call)
    assert as_bits(ranked(q @ g.T, **call, query_block=7)) == as_bits(expected)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("query_block", [1, 7, 64, 1000])
def test_bits_do_not_depend_on_the_block_size_and_every_query_is_asked_for_once(query_block, discrete):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(40, 70))
    scores = np.rint(scores) if discrete else scores
    call = dict(labels(rng, 40, 70), exclude="same_camera", top=20)
    seen, told = [], []
    found = ranked(scores, seen, **call, query_block=query_block, advance=told.append)
    assert as_bits(found) == as_bits(ranked(scores, **call))
    assert [row for start, stop in seen for row in range(start, stop)] == list(range(40))
    assert sum(told) == 40


@pytest.mark.parametrize("discrete", [False, True])
def test_bits_do_not_depend_on_the_order_of_rows(discrete):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(40, 70))
    scores = np.rint(scores) if discrete else scores
    known = labels(rng, 40, 70)
    first = ranked(scores, **known, exclude="same_camera", top=20)
    rows, columns = rng.permutation(40), rng.permutation(70)
    moved = {key: value[rows if key.startswith("query") else columns] for key, value in known.items()}
    other = ranked(scores[rows][:, columns], **moved, exclude="same_camera", top=20, query_block=9)
    assert other.queries.average_precision.tobytes() == first.queries.average_precision[rows].tobytes()
    assert other.queries.inp.tobytes() == first.queries.inp[rows].tobytes()
    assert (moved["gallery_id"][other.index] == known["gallery_id"][first.index][rows]).all()


@pytest.mark.covers(29)
def test_equal_scores_are_worth_exactly_chance():
    rng = np.random.default_rng(3)
    found = ranked(np.full((40, 70), -2.5), **labels(rng, 40, 70), exclude="same_camera")
    assert found.queries.means() == chance(found.queries.matches, found.gallery).means()


@pytest.mark.covers(27)
def test_dropped_items_are_nowhere_and_a_query_left_without_a_match_is_skipped_and_counted():
    found = ranked(
        np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]),
        query_person=["a", "b"],
        gallery_person=["a", "b", "a"],
        query_camera=["c1", "c2"],
        gallery_camera=["c1", "c2", "c2"],
        exclude="same_camera",
    )
    assert found.gallery.tolist() == [2, 2]
    assert found.index.tolist() == [[1, 2, -1], [0, 2, -1]]
    assert np.isnan(found.score[:, 2]).all() and not found.match[:, 2].any()
    assert found.queries.matches.tolist() == [1, 0]
    assert found.queries.skipped == 1


def test_no_queries_no_result_and_top_is_cut_at_the_gallery():
    found = ranked(np.zeros((0, 3)), query_person=[], gallery_person=list("abc"), top=9)
    assert found.index.shape == (0, 3)
    assert found.queries.scored == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda rows: np.where(np.arange(rows.start, rows.stop)[:, None] == 5, np.nan, np.zeros(4)), "query row 5"),
        (lambda rows: np.zeros((rows.stop - rows.start, 3)), r"queries 0 to 3 have shape \(4, 3\), not \(4, 4\)"),
    ],
)
def test_nan_and_wrong_shapes_are_refused_by_name(scores, message):
    with pytest.raises(DataError, match=message):
        rank_scores(scores, queries=9, gallery=4, query_person=["a"] * 9, gallery_person=["a"] * 4, query_block=4)


def test_a_rule_without_its_label_is_refused():
    with pytest.raises(DataError, match="exclude=same_camera needs"):
        ranked(np.zeros((1, 1)), query_person=["a"], gallery_person=["a"], exclude="same_camera")


def test_a_tuple_is_one_label():
    people = {"query_person": [(1, "a"), (2, "a")], "gallery_person": [(1, "a"), (1, "b"), (2, "a"), None]}
    found = ranked(np.ones((2, 4)), gallery_id=[(0, 1), (0, 0), (1, 0), (1, 1)], **people)
    assert found.queries.matches.tolist() == [1, 1]
    assert found.index.tolist() == [[1, 0, 2, 3]] * 2  # by the ids as texts
    alone = ranked(np.ones((1, 1)), query_person=[(1, 2)], gallery_person=[(1, 2)])
    assert alone.queries.matches.tolist() == [1]


LISTS = ["query_person", "gallery_person", "query_camera", "gallery_camera", "gallery_id", "query_id", "query_outfit"]


@pytest.mark.parametrize("change", [lambda labels: labels[:-1], lambda labels: [*labels, labels[0]]])
@pytest.mark.parametrize("name", [*LISTS, "gallery_outfit"])
def test_a_list_of_labels_of_the_wrong_length_is_named(name, change):
    known = labels(np.random.default_rng(0), 6, 8)
    known[name] = change(known[name])
    rule = {"camera": "same_camera", "outfit": "same_outfit", "id": "same_item"}.get(name.split("_")[1], "none")
    count = 6 if name.startswith("query") else 8
    side, kind = name.split("_")
    called = f"{side} {'item' if name == 'query_id' else kind}"
    with pytest.raises(DataError, match=f"list of the {called} labels has {len(known[name])} for {count} items"):
        ranked(np.zeros((6, 8)), **known, exclude=rule)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exclude": "same_hat"}, UsageError, "no rule exclude=same_hat.*Known: none, same_camera"),
        ({"top": -1}, UsageError, "top=-1"),
        ({"query_block": 0}, UsageError, "query_block=0"),
        ({"query_block": -3}, UsageError, "query_block=-3"),
        ({"query_person": [["a"]]}, DataError, "person labels cannot be compared.*texts or numbers"),
        ({"query_person": np.zeros((1, 2))}, DataError, r"shape \(1, 2\)"),
    ],
)
def test_an_impossible_request_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        ranked(np.zeros((1, 1)), **{"query_person": ["a"], "gallery_person": ["a"], **change})


@pytest.mark.parametrize("exclude", RULES)
def test_pairs_equal_nested_loops_over_the_rules_and_missing_labels_equal_nothing(exclude):
    rng = np.random.default_rng(4)
    known = labels(rng, 25, 40, people=5)
    known["query_person"][3] = known["gallery_person"][8] = None
    keys = keys_of(
        exclude,
        camera=(known["query_camera"], known["gallery_camera"]),
        outfit=(known["query_outfit"], known["gallery_outfit"]),
        item=(known["query_id"], known["gallery_id"]),
    )
    order = tie_order(known["gallery_id"], 40)
    people = SamePerson(known["query_person"], known["gallery_person"], keys, order)
    found = set()
    for start in (0, 11):
        pairs = people.of(start, min(start + 11, 25) if start == 0 else 25)
        found |= {
            (start + int(i), int(order[j]), bool(drop))
            for i, j, drop in zip(pairs.row, pairs.column, pairs.drop, strict=True)
        }
    expected = set()
    for i in range(25):
        for j in range(40):
            person = known["query_person"][i]
            if person is None or person != known["gallery_person"][j]:
                continue
            mine, theirs = known["query_camera"][i], known["gallery_camera"][j]
            camera = mine is not None and mine == theirs
            outfit = known["query_outfit"][i] == known["gallery_outfit"][j]
            item = known["query_id"][i] == known["gallery_id"][j]
            drop = {"none": False, "same_camera": camera, "same_outfit": outfit, "same_item": item}
            drop |= {"cloth_changing": camera or outfit, "same_clothes": camera or not outfit}
            expected.add((i, j, drop[exclude]))
    assert found == expected
