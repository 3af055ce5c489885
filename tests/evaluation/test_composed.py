"""Image+text queries, and galleries of one image per person."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl.datasets.base import Options, measure
from reidctl.datasets.registry import reader
from reidctl.errors import DataError, UsageError
from reidctl.evaluation import single_shot as single_shots
from reidctl.evaluation.composed import composed
from reidctl.evaluation.protocols import clothes_settings, evaluate, image_to_image
from reidctl.evaluation.single_shot import single_shot
from reidctl.retrieval.store import EmbeddingTable

WHERE = {"dataset": "toy", "split": "test"}


def toy(rows, captions=(), *, width=16, seed=0):
    """Images from (id, person, camera, role, outfit), captions from (id, image); random unit vectors for all."""
    rng = np.random.default_rng(seed)
    images = pd.DataFrame(rows, columns=["image_id", "person_id", "camera_id", "role", "outfit_id"]).astype(object)
    images = images.assign(dataset="toy", split="test")
    texts = pd.DataFrame(captions, columns=["caption_id", "image_id"]).assign(kind="full", status="ok", text="a man")
    kept = pd.DataFrame(
        {
            "item_id": [*images["image_id"], *texts["caption_id"]],
            "role": "gallery",
            "modality": ["image"] * len(images) + ["text"] * len(texts),
            "condition": "standard",
        }
    )
    values = rng.normal(size=(len(kept), width))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return images, texts, EmbeddingTable(kept, values)


def two_people(camera=lambda name: f"c{name[-1]}", roles=True):
    rows = [
        (name, f"toy:{name[0]}", camera(name), ("query" if name[-1] == "0" else "gallery") if roles else None, None)
        for name in ("a0", "a1", "a2", "b0", "b1")
    ]
    return toy(rows, [("a0-x", "a0"), ("a0-y", "a0"), ("a1-x", "a1"), ("b0-x", "b0")])


def vector(stored, item):
    return stored.vectors[list(stored.rows["item_id"]).index(item)].astype(float)


def test_a_composed_query_is_the_unit_sum_of_its_image_and_its_caption():
    images, texts, stored = two_people()
    found = composed(images, texts, stored, **WHERE, weight=0.25)
    # Captions of gallery images ask nothing.
    assert (found.direction, list(found.query.item)) == ("it2i", ["a0-x", "a0-y", "b0-x"])
    assert list(found.query.image) == ["a0", "a0", "b0"]
    for row, (item, image) in enumerate(zip(found.query.item, found.query.image, strict=True)):
        both = 0.25 * vector(stored, image) + 0.75 * vector(stored, item)
        assert found.query.vectors[row] == pytest.approx(both / np.linalg.norm(both), abs=1e-6)
    result = evaluate(found)
    assert result.metrics["direction"].eq("it2i").all() and result.ranking.queries.matches.tolist() == [2, 2, 1]


def test_weight_1_asks_the_image_alone_and_weight_0_its_text_under_the_same_rules():
    images, texts, stored = two_people()
    by_image = evaluate(image_to_image(images, stored, **WHERE)).queries.set_index("query_id")
    whole = evaluate(composed(images, texts, stored, **WHERE, weight=1.0)).queries.set_index("query_id")
    for caption, image in (("a0-x", "a0"), ("a0-y", "a0"), ("b0-x", "b0")):
        assert whole.loc[caption, "average_precision"] == by_image.loc[image, "average_precision"]
    text = composed(images, texts, stored, **WHERE, weight=0.0)
    assert text.query.vectors[0] == pytest.approx(vector(stored, "a0-x"), abs=1e-6)


def test_query_texts_leave_every_bit_of_the_gallery_as_it_was():
    images, texts, stored = two_people()
    expected = image_to_image(images, stored, **WHERE).gallery
    values = stored.vectors.copy()
    values[stored.rows["modality"] == "text"] *= -1
    for table, weight in ((stored, 0.0), (stored, 0.7), (EmbeddingTable(stored.rows, values), 0.5)):
        gallery = composed(images, texts, table, **WHERE, weight=weight).gallery
        assert gallery.vectors.tobytes() == expected.vectors.tobytes()
        assert list(gallery.item) == list(expected.item)


def test_vectors_of_their_own_for_images_weigh_cosines_as_the_sum_does_where_there_is_one_vector():
    images, texts, stored = two_people()
    same = EmbeddingTable(stored.rows, stored.vectors.copy())
    usual, apart = (composed(images, texts, stored, **WHERE, weight=0.3, by_image=table) for table in (stored, same))
    assert usual.query.vectors.shape[1] == 16 and apart.query.vectors.shape[1] == 32
    ranked = [evaluate(part).rankings[["query_id", "rank", "gallery_id"]] for part in (usual, apart)]
    pd.testing.assert_frame_equal(*ranked)
    # Other vectors, of another width: each cosine is one of its own space.
    other = toy([tuple(row) for row in images.iloc[:, :5].to_numpy()], width=9, seed=5)[2]
    found = composed(images, texts, stored, **WHERE, weight=0.3, by_image=other)
    scale = np.hypot(0.3, 0.7) * np.sqrt(2)
    scores = found.query.vectors.astype(float) @ found.gallery.vectors.astype(float).T
    for row, (item, image) in enumerate(zip(found.query.item, found.query.image, strict=True)):
        for column, name in enumerate(found.gallery.item):
            by_image = vector(other, image) @ vector(other, name)
            by_text = vector(stored, item) @ vector(stored, name)
            assert scores[row, column] * scale == pytest.approx(0.3 * by_image + 0.7 * by_text, abs=1e-6)
    for side in (found.query, found.gallery):
        assert np.linalg.norm(side.vectors, axis=1) == pytest.approx(np.ones(len(side)), abs=1e-6)
    # The image alone asks what it asks in image-to-image retrieval, and texts do not reach the gallery.
    alone = composed(images, texts, stored, **WHERE, weight=1.0, by_image=other)
    by_image = evaluate(image_to_image(images, other, **WHERE)).queries.set_index("query_id")
    whole = evaluate(alone).queries.set_index("query_id")
    assert whole.loc["a0-x", "average_precision"] == by_image.loc["a0", "average_precision"]
    values = stored.vectors.copy()
    values[stored.rows["modality"] == "text"] *= -1
    changed = composed(images, texts, EmbeddingTable(stored.rows, values), **WHERE, weight=0.3, by_image=other)
    assert changed.gallery.vectors.tobytes() == found.gallery.vectors.tobytes()


@pytest.mark.parametrize("camera", [lambda name: "c0", lambda name: None, lambda name: None if name == "a0" else "c1"])
def test_the_query_s_own_image_is_never_its_match_whether_or_not_cameras_are_known(camera):
    images, texts, stored = two_people(camera, roles=False)
    result = evaluate(composed(images, texts, stored, **WHERE, weight=1.0))
    own = result.rankings.merge(texts.rename(columns={"caption_id": "query_id"}), on="query_id")
    assert len(own) and (own["gallery_id"] != own["image_id"]).all()
    counts = dict(zip(result.queries["query_id"], result.ranking.queries.matches, strict=True))
    if camera("a0") is None and camera("a1") is None:
        assert counts == {"a0-x": 2, "a0-y": 2, "a1-x": 2, "b0-x": 1}
    elif camera("a0") is None:  # an unknown camera equals none, a known one drops what it shot
        assert counts == {"a0-x": 2, "a0-y": 2, "a1-x": 1, "b0-x": 0}
    else:
        assert not any(counts.values())


def test_what_cannot_be_composed_is_refused_by_name():
    images, texts, stored = two_people()
    with pytest.raises(UsageError, match=r"1\.5"):
        composed(images, texts, stored, **WHERE, weight=1.5)
    with pytest.raises(DataError, match="No query image of toy"):
        composed(images, texts[texts["image_id"] == "a1"], stored, **WHERE)
    opposite = stored.vectors.copy()
    opposite[list(stored.rows["item_id"]).index("b0-x")] = -opposite[list(stored.rows["item_id"]).index("b0")]
    with pytest.raises(DataError, match=r"b0-x cancel each other at weight 0\.5"):
        composed(images, texts, EmbeddingTable(stored.rows, opposite), **WHERE)


# --- single-shot


def prcc(people=6, shots=3, *, width=8, seed=0):
    """People in two outfits: cameras A and B see one, C the other; A is the gallery."""
    rows = [
        (f"{person}{camera}{shot}", f"toy:{person}", camera, "gallery" if camera == "A" else "query", outfit)
        for person in range(people)
        for camera, outfit in (("A", f"{person}-1"), ("B", f"{person}-1"), ("C", f"{person}-2"))
        for shot in range(shots)
    ]
    images, _, stored = toy(rows, width=width, seed=seed)
    return images, stored


def settings(images, stored):
    return clothes_settings(image_to_image(images, stored, **WHERE))


@pytest.mark.covers(24)
def test_single_shot_on_prcc_scores_c_and_b_apart_against_one_image_of_a_per_person():
    images, stored = prcc()
    changed, same = (single_shot(setting) for setting in settings(images, stored))
    for found, camera, name in ((changed, "C", "cloth-changing"), (same, "B", "same-clothes")):
        assert found.metrics["condition"].unique().tolist() == [f"single-shot-{name}"]
        row = found.metrics.iloc[0]
        assert (row["queries"], row["skipped"], row["gallery"]) == (18, 18, 6)
        scored = found.queries[found.queries["matches"] > 0]
        assert scored["matches"].eq(1).all() and scored["query_id"].str[1].eq(camera).all()
        assert found.left_out == ("rank10", "rank20", "rSum")
    assert list(changed.unmatched) == sorted(images.loc[images["camera_id"] == "B", "image_id"])


@pytest.mark.covers(24)
def test_single_shot_is_the_mean_over_the_drawn_galleries_by_a_loop(monkeypatch):
    images, stored = prcc(people=4, shots=5)
    setting = settings(images, stored)[0]
    gallery, query = setting.gallery, setting.query
    rng = np.random.default_rng(7)
    people = sorted(set(gallery.person))
    draws = [np.sort([rng.choice(np.flatnonzero(gallery.person == person)) for person in people]) for _ in range(9)]
    given = iter(draws)
    monkeypatch.setattr("reidctl.evaluation.single_shot._draw", lambda side, rng: next(given))
    found = single_shot(setting, trials=9, resamples=2).queries.set_index("query_id")
    cosine = query.vectors.astype(float) @ gallery.vectors.astype(float).T
    for row in np.flatnonzero(query.camera == "C"):
        own = [next(place for place in drawn if gallery.person[place] == query.person[row]) for drawn in draws]
        rank = np.array([1 + (cosine[row, drawn] > cosine[row, o]).sum() for drawn, o in zip(draws, own, strict=True)])
        line = found.loc[query.item[row]]
        assert line["average_precision"] == line["inp"] == pytest.approx(np.mean(1 / rank))
        assert (line["rank1"], line["first_match"]) == pytest.approx((np.mean(rank == 1), np.mean(rank)))


def test_a_draw_takes_each_image_of_a_person_equally_often_and_one_per_person():
    images, stored = prcc(people=2, shots=4)
    gallery = image_to_image(images, stored, **WHERE).gallery
    rng = np.random.default_rng(0)
    drawn = np.stack([single_shots._draw(gallery, rng) for _ in range(2000)])
    assert (gallery.person[drawn] == ["toy:0", "toy:1"]).all()
    assert np.bincount(drawn.ravel()) == pytest.approx(np.full(8, 500), abs=80)  # four standard deviations


def test_a_draw_depends_on_ids_and_seed_not_on_the_order_of_rows():
    images, stored = prcc()
    first = single_shot(settings(images, stored)[0], trials=3)
    shuffled = single_shot(settings(images.sample(frac=1, random_state=3), stored)[0], trials=3)
    assert first.summary == shuffled.summary
    assert single_shot(settings(images, stored)[0], trials=3, seed=1).summary != first.summary


def test_with_one_gallery_image_per_person_single_shot_is_the_ordinary_evaluation():
    images, stored = prcc(people=12, shots=1)
    protocol = image_to_image(images, stored, **WHERE)
    found, usual = single_shot(protocol, trials=3), evaluate(protocol)
    for name, value in usual.summary.items():
        assert vars(found.summary[name]) == pytest.approx(vars(value))
    assert found.metrics["condition"].eq("single-shot").all()
    assert (found.ranking.index == usual.ranking.index).all() and len(found.rankings) == len(usual.rankings)


def test_rankings_of_single_shot_are_rows_of_the_whole_gallery():
    images, stored = prcc()
    setting = settings(images, stored)[0]
    found = single_shot(setting, top=2)
    row = found.rankings[found.rankings["rank"] == 1].set_index("query_id")["gallery_id"]
    assert list(row[list(setting.query.item)]) == list(setting.gallery.item[found.ranking.index[:, 0]])


def test_a_trial_that_leaves_a_query_without_a_match_does_not_count_for_it():
    # Two gallery images, one under the query's own camera: half of the draws score.
    own = [("q", "toy:0", "A", "query", None), ("g0", "toy:0", "A", "gallery", None)]
    images, _, stored = toy(
        [*own, ("g1", "toy:0", "B", "gallery", None)]
        + [(f"d{n}", f"toy:{n}", "B", "gallery", None) for n in range(1, 5)]
    )
    protocol = image_to_image(images, stored, **WHERE)
    found = single_shot(protocol, trials=20)
    cosine = protocol.gallery.vectors @ protocol.query.vectors[0]
    place = 1 + (cosine[2:] > cosine[1]).sum()
    assert found.queries["average_precision"].iloc[0] == pytest.approx(1 / place)
    with pytest.raises(UsageError, match="0 trials"):
        single_shot(protocol, trials=0)


# --- Market-1501 end to end


def market(folder):
    """Six people under two cameras, junk, five distractors, and a person whose only other image is by her camera."""

    def picture(place, name):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(folder / place / f"{name}.jpg")

    picture("bounding_box_train", "0001_c1s1_000001_01")
    for person in range(2, 8):
        picture("query", f"{person:04d}_c1s1_000001_00")
        for camera, shot in ((1, 2), (2, 3), (3, 4)):
            picture("bounding_box_test", f"{person:04d}_c{camera}s1_00000{shot}_01")
    picture("query", "0009_c1s1_000001_00")
    picture("bounding_box_test", "0009_c1s1_000002_01")
    for number in range(5):
        picture("bounding_box_test", f"-1_c2s1_00001{number}_01")
        picture("bounding_box_test", f"0000_c2s1_00002{number}_01")
    chosen = Options(lenient=True)
    return measure(reader("market-1501")(folder, chosen), chosen).images


@pytest.mark.covers(27)
def test_market_1501_end_to_end_junk_never_counts_distractors_do_and_unmatched_queries_are_named(tmp_path):
    images = market(tmp_path)
    images = images[images["split"] == "test"].assign(dataset="toy")
    rows = images[["image_id", "person_id", "camera_id", "role"]].assign(outfit_id=None).to_numpy().tolist()
    stored = toy(rows, width=4)[2]
    protocol = image_to_image(images.assign(outfit_id=None), stored, **WHERE)
    found = evaluate(protocol)
    assert len(protocol.gallery) == 18 + 1 + 5 and not any("/-1_" in item for item in protocol.gallery.item)
    assert found.unmatched == ("market-1501:query/0009_c1s1_000001_00.jpg",)
    assert (found.ranking.queries.scored, found.ranking.queries.skipped) == (6, 1)
    # torchreid's and fast-reid's rules as loops over one query: same person and camera out, the rest ranked.
    for row, item in enumerate(protocol.query.item):
        cosine = protocol.gallery.vectors.astype(float) @ protocol.query.vectors[row].astype(float)
        own = protocol.gallery.person == protocol.query.person[row]
        kept = ~(own & (protocol.gallery.camera == protocol.query.camera[row]))
        right = own[kept][np.argsort(-cosine[kept], kind="stable")]
        line = found.queries.set_index("query_id").loc[item]
        assert line["gallery"] == kept.sum() == 23
        if not right.any():
            continue
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        assert line["average_precision"] == pytest.approx(precision[right].mean())
        assert line["inp"] == pytest.approx(right.sum() / (np.flatnonzero(right)[-1] + 1))
        assert [line[f"rank{k}"] for k in (1, 5, 10, 20)] == [float(right[:k].any()) for k in (1, 5, 10, 20)]
    # Distractors are wrong answers of their own: without them every metric can only rise.
    few = image_to_image(images[~images["person_id"].str.endswith(":0000")].assign(outfit_id=None), stored, **WHERE)
    without = evaluate(few)
    assert without.summary["mAP"].value > found.summary["mAP"].value
    # All five stay in a gallery of one image per person.
    assert single_shot(protocol, trials=2).metrics["gallery"].eq(7 + 5).all()
