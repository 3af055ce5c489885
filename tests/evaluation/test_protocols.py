import numpy as np
import pandas as pd
import pytest

from reidctl.errors import DataError, UsageError
from reidctl.evaluation.baselines import chance_of, label_shuffle
from reidctl.evaluation.protocols import (
    clothes_settings,
    evaluate,
    evaluation_of,
    image_to_image,
    text_to_image,
    with_vectors,
)
from reidctl.metrics import METRICS
from reidctl.retrieval.store import from_frame
from reidctl.tables import read_table, vectors, write_table


def people_tables(people=6, each=4, *, roles=True, cameras=True, captions=2, width=32, noise=0.0, seed=0):
    """Images (each shot by its own camera, the first one a query), captions and perfect or noisy vectors."""
    rng = np.random.default_rng(seed)
    images, texts, rows, values = [], [], [], []
    centres = rng.normal(size=(people, width))
    for person in range(people):
        for shot in range(each):
            image = f"p{person}s{shot}"
            role = ("query" if shot == 0 else "gallery") if roles else None
            images.append(
                {"image_id": image, "path": image, "dataset": "toy", "split": "test", "role": role,
                 "person_id": f"toy:{person}", "camera_id": f"c{shot % 3}" if cameras else None,
                 "outfit_id": f"{person}-{shot % 2}", "width": 1, "height": 1, "sha256": "", "attributes": None}
            )  # fmt: skip
            rows.append((image, role or "gallery", "image", person))
            values.append(centres[person] + noise * rng.normal(size=width))
            for number in range(captions):
                texts.append(
                    {"caption_id": f"{image}t{number}", "image_id": image, "kind": "full", "source": "human",
                     "conditioned_on": "none", "text": "someone", "status": "ok"}
                )  # fmt: skip
                rows.append((f"{image}t{number}", "query", "text", person))
                values.append(centres[person] + noise * rng.normal(size=width))
    values = np.asarray(values)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    embeddings = pd.DataFrame(
        [
            {"item_id": item, "role": role, "modality": modality, "condition": "standard", "dataset": "toy",
             "split": "test", "person_id": f"toy:{person}", "camera_id": None}
            for item, role, modality, person in rows
        ]
    ).assign(embedding=vectors(values))  # fmt: skip
    return pd.DataFrame(images), pd.DataFrame(texts), embeddings


@pytest.mark.covers(14)
def test_every_caption_is_a_query_and_both_roles_are_the_gallery():
    images, captions, embeddings = people_tables()
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    assert len(protocol.query) == len(captions) == 48
    assert len(protocol.gallery) == len(images) == 24
    assert protocol.exclude == "none"
    result = evaluate(protocol)
    assert result.ranking.queries.means() == {**dict.fromkeys(METRICS, 1.0), "rSum": 3.0}
    assert (result.left_out, result.unmatched) == ((), ())
    assert (result.ranking.queries.matches == 4).all()


def test_other_splits_kinds_and_failed_captions_are_not_queries():
    images, captions, embeddings = people_tables()
    captions.loc[0, "kind"] = "identity"
    captions.loc[1, "status"] = "failed"
    images.loc[images["person_id"] == "toy:5", "split"] = "train"
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    assert len(protocol.query) == 40 - 2
    assert "toy:5" not in set(protocol.gallery.person) | set(protocol.query.person)


def test_an_item_without_its_vector_is_named():
    images, captions, embeddings = people_tables()
    with pytest.raises(DataError, match="p0s0t1"):
        text_to_image(
            images, captions, from_frame(embeddings[embeddings["item_id"] != "p0s0t1"]), dataset="toy", split="test"
        )


def test_a_text_vector_never_serves_as_gallery():
    images, captions, embeddings = people_tables()
    embeddings.loc[embeddings["item_id"] == "p1s1", "modality"] = "text"
    with pytest.raises(DataError, match="no image vector"):
        text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")


def test_gallery_vectors_stay_when_the_queries_are_degraded():
    images, captions, embeddings = people_tables()
    other = embeddings[embeddings["modality"] == "text"].assign(condition="typos")
    other["embedding"] = vectors(-np.stack(other["embedding"].to_list()))
    table = from_frame(pd.concat([embeddings, other], ignore_index=True))
    standard = text_to_image(images, captions, table, dataset="toy", split="test")
    typos = text_to_image(images, captions, table, dataset="toy", split="test", condition="typos")
    assert typos.gallery.vectors.tobytes() == standard.gallery.vectors.tobytes()
    assert (typos.query.vectors == -standard.query.vectors).all()


@pytest.mark.covers(27)
def test_image_to_image_follows_roles_and_drops_the_same_camera():
    images, _, embeddings = people_tables()
    protocol = image_to_image(images, from_frame(embeddings), dataset="toy", split="test")
    assert (len(protocol.query), len(protocol.gallery), protocol.exclude) == (6, 18, "same_camera")
    # Shots 1, 2, 3 by cameras 1, 2, 0; the query's camera is 0.
    assert (evaluate(protocol).ranking.queries.matches == 2).all()


@pytest.mark.covers(24)
def test_cloth_changing_leaves_no_match_in_the_query_s_outfit():
    images, _, embeddings = people_tables()
    protocol = image_to_image(images, from_frame(embeddings), dataset="toy", split="test", cloth_changing=True)
    result = evaluate(protocol)
    outfit = images.set_index("image_id")["outfit_id"]
    hits = result.rankings[result.rankings["match"]]
    assert len(hits)
    assert (outfit[hits["gallery_id"]].to_numpy() != outfit[hits["query_id"]].to_numpy()).all()
    # Shots 1 and 3 wear the other outfit; shot 3 is by the query's camera.
    assert (result.ranking.queries.matches == 1).all()
    unknown = images.assign(camera_id=None)
    protocol = image_to_image(unknown, from_frame(embeddings), dataset="toy", split="test", cloth_changing=True)
    assert (evaluate(protocol).ranking.queries.matches == 2).all()


@pytest.mark.covers(24)
def test_a_cloth_changing_set_is_measured_in_both_settings():
    images, _, embeddings = people_tables()
    protocol = image_to_image(images, from_frame(embeddings), dataset="toy", split="test")
    changed, same = clothes_settings(protocol)
    assert (changed.condition, same.condition) == ("cloth-changing", "same-clothes")
    # The query (shot 0) wears outfit 0, so do shots 2 (gallery); shots 1 and 3 wear outfit 1; shot 3 is by its camera.
    assert (evaluate(changed).ranking.queries.matches == 1).all()
    assert (evaluate(same).ranking.queries.matches == 1).all()
    hits = evaluate(changed).rankings.query("match")["gallery_id"]
    assert set(hits.str[-2:]) == {"s1"}
    # Nobody changes clothes, outfits are unknown, or all queries do: one setting says it all.
    for outfits in ("one", None, images["image_id"]):
        other = image_to_image(images.assign(outfit_id=outfits), from_frame(embeddings), dataset="toy", split="test")
        assert clothes_settings(other) == []


@pytest.mark.parametrize("cameras", [True, False])
def test_without_roles_every_image_is_both_yet_never_its_own_match(cameras):
    images, _, embeddings = people_tables(roles=False, cameras=cameras)
    result = evaluate(image_to_image(images, from_frame(embeddings), dataset="toy", split="test"))
    assert len(result.ranking.gallery) == 24
    assert not ((result.rankings["query_id"] == result.rankings["gallery_id"]) & result.rankings["match"]).any()
    assert not (result.rankings["query_id"] == result.rankings["gallery_id"]).any()


@pytest.mark.covers(37)
def test_result_frames_fit_their_tables_and_agree_with_each_other(tmp_path):
    images, captions, embeddings = people_tables(noise=2.0)
    result = evaluate(text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test"))
    for name in ("metrics", "queries", "rankings"):
        write_table(tmp_path / f"{name}.parquet", name, getattr(result, name))
    metrics = read_table(tmp_path / "metrics.parquet", "metrics").set_index("metric")
    queries = read_table(tmp_path / "queries.parquet", "queries")
    rankings = read_table(tmp_path / "rankings.parquet", "rankings")
    assert list(metrics.index) == list(METRICS)
    assert metrics.loc["mAP", "value"] == pytest.approx(queries["average_precision"].mean())
    first = rankings[rankings["match"]].groupby("query_id")["rank"].min()
    assert (first == queries.set_index("query_id")["first_match"][first.index]).all()
    assert metrics.loc["rank1", "value"] == pytest.approx((queries["first_match"] == 1).mean())
    assert (metrics["low"] <= metrics["value"]).all()
    assert (metrics["value"] <= metrics["high"]).all()
    assert metrics["queries"].tolist() == [48] * 7
    for k in (1, 5, 10, 20):
        assert metrics.loc[f"rank{k}", "value"] == pytest.approx(queries[f"rank{k}"].mean())
    assert metrics.loc["rSum", "value"] == pytest.approx(sum(metrics.loc[f"rank{k}", "value"] for k in (1, 5, 10)))
    assert set(queries["direction"]) == set(rankings["direction"]) == {"t2i"}
    assert set(queries["dataset"]) == set(rankings["dataset"]) == {"toy"} and queries["gallery"].eq(24).all()
    assert rankings.groupby("query_id").size().eq(24).all()


def test_a_split_of_skipped_queries_writes_no_metrics_but_all_queries(tmp_path):
    images, _, embeddings = people_tables(each=2)
    images["camera_id"] = "c0"
    result = evaluate(image_to_image(images, from_frame(embeddings), dataset="toy", split="test"))
    assert result.ranking.queries.skipped == 6
    assert len(result.metrics) == 0 and result.unmatched == tuple(f"p{person}s0" for person in range(6))
    write_table(tmp_path / "metrics.parquet", "metrics", result.metrics)
    write_table(tmp_path / "queries.parquet", "queries", result.queries)
    assert read_table(tmp_path / "queries.parquet", "queries")["average_precision"].isna().all()


def test_rank_k_beyond_the_gallery_is_left_out_by_default_and_refused_when_asked_for(tmp_path):
    images, captions, embeddings = people_tables(people=4, each=3, noise=1.0)
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    result = evaluate(protocol)
    assert result.left_out == ("rank20",)
    assert list(result.metrics["metric"]) == [*result.summary] == [name for name in METRICS if name != "rank20"]
    assert result.queries["rank20"].isna().all() and result.queries["rank10"].notna().all()
    write_table(tmp_path / "queries.parquet", "queries", result.queries)
    with pytest.raises(DataError, match=r"rank-20 needs a gallery of at least 20 images; toy test has 12\."):
        evaluate(protocol, cutoffs=(1, 20))
    with pytest.raises(UsageError, match="rank-0"):
        evaluate(protocol, cutoffs=(0,))


def test_a_gallery_below_ten_images_has_no_rsum():
    images, captions, embeddings = people_tables(people=2, each=4)
    result = evaluate(text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test"))
    assert result.left_out == ("rank10", "rank20", "rSum")
    assert list(result.summary) == ["rank1", "rank5", "mAP", "mINP"]


def test_asked_cutoffs_take_the_place_of_the_usual_ones():
    images, captions, embeddings = people_tables(noise=2.0)
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    result = evaluate(protocol, cutoffs=(1, 3))
    assert list(result.summary) == ["rank1", "rank3", "rank5", "rank10", "mAP", "mINP", "rSum"]
    assert result.summary["rank3"].value == pytest.approx((result.queries["first_match"] <= 3).mean())
    assert result.queries["rank20"].isna().all()


def test_a_ranking_made_elsewhere_is_summarised_alike():
    images, captions, embeddings = people_tables(noise=2.0)
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    usual = evaluate(protocol, seed=3)
    again = evaluation_of(protocol, usual.ranking, seed=3)
    assert again.summary == usual.summary and again.queries.equals(usual.queries)
    assert again.metrics.equals(usual.metrics) and again.rankings.equals(usual.rankings)


def test_an_image_without_a_camera_is_not_its_own_match_among_images_with_one():
    images, _, embeddings = people_tables(roles=False, captions=0)
    images.loc[images["image_id"] == "p0s1", "camera_id"] = None
    result = evaluate(image_to_image(images, from_frame(embeddings), dataset="toy", split="test"))
    assert not (result.rankings["query_id"] == result.rankings["gallery_id"]).any()
    # It equals no camera, so the other three shots of the person are its matches.
    assert result.queries.set_index("query_id").loc["p0s1", "matches"] == 3


@pytest.mark.covers(36)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_labels_bring_a_perfect_model_down_to_chance(seed):
    images, captions, embeddings = people_tables(people=60, each=4, captions=1)
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    assert evaluate(protocol).summary["rank1"].value == 1.0
    shuffled = label_shuffle(protocol, seed=seed)
    result = evaluate(shuffled)
    chance = chance_of(result.ranking).means()
    # All queries of a person meet the same gallery: the interval over people is the honest one.
    assert result.summary["rank10"].low <= chance["rank10"] <= result.summary["rank10"].high
    assert sorted(shuffled.gallery.person) == sorted(protocol.gallery.person)


@pytest.mark.covers(29)
def test_equal_vectors_score_exactly_chance_in_a_protocol():
    images, captions, embeddings = people_tables()
    protocol = text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="test")
    same = with_vectors(protocol, np.ones((48, 1), np.float32), np.ones((24, 1), np.float32), condition="collapsed")
    result = evaluate(same)
    assert result.ranking.queries.means() == chance_of(result.ranking).means()
    assert result.metrics["condition"].eq("collapsed").all()


def test_unknown_split_lists_the_known_ones():
    images, captions, embeddings = people_tables()
    with pytest.raises(DataError, match=r"\('toy', 'test'\)"):
        text_to_image(images, captions, from_frame(embeddings), dataset="toy", split="val")


def test_an_image_embedded_under_both_roles_uses_each_in_its_place():
    images, _, embeddings = people_tables(roles=False, captions=0)
    other = embeddings.assign(role="query", embedding=vectors(-np.stack(embeddings["embedding"].to_list())))
    for order in ([embeddings, other], [other, embeddings]):
        table = from_frame(pd.concat(order, ignore_index=True))
        protocol = image_to_image(images, table, dataset="toy", split="test")
        assert (protocol.gallery.vectors == np.stack(embeddings["embedding"].to_list())).all()
        assert (protocol.query.vectors == -protocol.gallery.vectors).all()
