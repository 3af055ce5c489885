from dataclasses import replace

import numpy as np
import pytest

from reidctl.errors import DataError
from reidctl.evaluation.protocols import Protocol, Side, evaluate
from reidctl.evaluation.reranking import caveats, condition_of, evaluate_reranked
from reidctl.metrics import CUTOFFS, METRICS
from reidctl.retrieval.rerank import PRESETS, KReciprocal, Parameters
from reidctl.retrieval.scores import rank_scores

FEW = Parameters(7, 3, 0.3)


def side(letter, person, vectors, cameras):
    count = len(person)
    item = np.array([f"{letter}{number:04d}" for number in range(count)], dtype=object)
    camera = np.array([f"c{number % cameras}" for number in range(count)], dtype=object)
    who = np.array([f"toy:{number}" for number in person], dtype=object)
    return Side(item, item, who, camera, np.full(count, None, object), vectors)


def crowd(people=15, each=6, *, noise=1.6, width=48, direction="i2i", exclude="same_camera", seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(people, width))
    person = np.arange(people * (each + 1)) % people
    vectors = centre[person] + noise * rng.normal(size=(len(person), width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = side("q", person[:people], vectors[:people], 3)
    gallery = side("g", person[people:], vectors[people:], 4)
    return Protocol(direction, "toy", "test", "standard", query, gallery, exclude)


def moved(protocol, seed):
    rng = np.random.default_rng(seed)

    def shuffled(one):
        order = rng.permutation(len(one))
        return Side(*(getattr(one, name)[order] for name in ("item", "image", "person", "camera", "outfit", "vectors")))

    return replace(protocol, query=shuffled(protocol.query), gallery=shuffled(protocol.gallery))


def test_the_parameters_are_in_the_condition_and_the_rows_are_those_of_any_evaluation():
    protocol = crowd()
    for preset in PRESETS.values():
        found, plain = evaluate_reranked(protocol, preset), evaluate(protocol)
        for name in ("metrics", "queries", "rankings"):
            frame = getattr(found, name)
            assert list(frame.columns) == list(getattr(plain, name).columns)
            assert set(frame["condition"]) == {f"rerank-{preset.name}"}
        assert set(found.summary) == set(METRICS)
        assert (found.queries["matches"] == plain.queries["matches"]).all()
        assert (found.ranking.gallery == plain.ranking.gallery).all()
    degraded = replace(protocol, condition="blur")
    assert set(evaluate_reranked(degraded, FEW).metrics["condition"]) == {"blur+rerank-7/3/0.3"}
    assert condition_of(PRESETS["clip-reid"]) == "rerank-50/15/0.3"


def test_equals_ranking_the_distances_by_the_rules_of_market():
    protocol = crowd()
    query, gallery = protocol.query, protocol.gallery
    distance = KReciprocal(query.vectors, gallery.vectors, FEW, query_id=query.item, gallery_id=gallery.item).distances(
        slice(0, len(query))
    )
    precisions = []
    for i in range(len(query)):
        same = gallery.person == query.person[i]
        kept = ~(same & (gallery.camera == query.camera[i]))
        order = np.argsort(distance[i][kept])
        hits = np.flatnonzero(same[kept][order])
        precisions.append(np.mean([(n + 1) / (place + 1) for n, place in enumerate(hits)]))
    found = evaluate_reranked(protocol, FEW)
    np.testing.assert_allclose(found.queries["average_precision"], precisions, atol=1e-12)
    best = found.rankings[found.rankings["query_id"] == "q0000"].sort_values("rank")
    assert best["score"].is_monotonic_decreasing
    assert best["score"].between(-1, 0).all()


def test_re_ranking_raises_map_where_people_cluster():
    protocol = crowd(people=30, each=20, width=64)
    before, after = evaluate(protocol), evaluate_reranked(protocol, PRESETS["zhong"])
    assert after.summary["mAP"].value > before.summary["mAP"].value + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_order_of_rows(seed):
    protocol = crowd()
    first, other = evaluate_reranked(protocol, FEW), evaluate_reranked(moved(protocol, seed), FEW)
    assert first.metrics.equals(other.metrics)
    for name, keys in (("queries", ["query_id"]), ("rankings", ["query_id", "rank"])):
        frames = [getattr(one, name).sort_values(keys, ignore_index=True) for one in (first, other)]
        assert frames[0].equals(frames[1])


def test_another_query_can_change_a_query_s_result_and_the_caveat_says_so():
    protocol = crowd()
    distances = []
    for rows in (slice(0, 1), slice(0, 15)):
        alone = protocol.query.item[rows]
        reranked = KReciprocal(
            protocol.query.vectors[rows],
            protocol.gallery.vectors,
            FEW,
            query_id=alone,
            gallery_id=protocol.gallery.item,
        )
        distances.append(reranked.distances(slice(0, 1)))
    assert not np.array_equal(*distances)
    assert any("transductive" in note and "15 queries" in note for note in caveats(protocol, FEW))


def test_captions_may_be_re_ranked_and_a_caveat_names_similarities_within_text():
    protocol = crowd(direction="t2i", exclude="none")
    found = evaluate_reranked(protocol, FEW)
    assert set(found.metrics["direction"]) == {"t2i"}
    assert len(caveats(protocol, FEW)) == len(caveats(crowd(), FEW)) + 1
    assert "caption" in caveats(protocol, FEW)[-1]


def test_a_split_where_every_image_is_query_and_gallery_item_counts_each_once():
    one = crowd(exclude="same_item")
    whole = replace(one, query=one.gallery)
    found = evaluate_reranked(whole, FEW)
    assert (found.ranking.gallery == len(one.gallery) - 1).all()
    shown = found.rankings
    assert not (shown["query_id"] == shown["gallery_id"]).any()
    ids = one.gallery.item
    reranked = KReciprocal(one.gallery.vectors, one.gallery.vectors, FEW, query_id=ids, gallery_id=ids)
    expected = rank_scores(
        lambda rows: -reranked.distances(rows),
        queries=len(ids),
        gallery=len(ids),
        query_person=one.gallery.person,
        gallery_person=one.gallery.person,
        query_id=ids,
        gallery_id=ids,
        exclude="same_item",
    )
    assert reranked.items == len(ids)
    assert found.ranking.queries.means() == expected.queries.means()


def test_progress_cutoffs_and_top_are_passed_on():
    told = []
    found = evaluate_reranked(crowd(), FEW, top=3, cutoffs=(1, 2), advance=told.append)
    assert sum(told) == 15
    assert found.rankings["rank"].max() == 3
    assert "rank2" in found.summary
    assert set(CUTOFFS) - {1, 5, 10} == {20} and "rank20" not in found.summary


def test_more_neighbours_than_gallery_items_and_vectors_of_other_lengths_are_refused():
    protocol = crowd(people=5, each=4)
    with pytest.raises(DataError, match="k1=50 gallery items, there are 20"):
        evaluate_reranked(protocol, PRESETS["clip-reid"])
    short = replace(protocol, gallery=replace(protocol.gallery, vectors=protocol.gallery.vectors / 2))
    with pytest.raises(DataError, match=r"gallery vector in row 0 has length 0\.5"):
        evaluate_reranked(short, FEW)
