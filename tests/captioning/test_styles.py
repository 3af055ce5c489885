import numpy as np
import pytest
from sixstyles import captions
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from reidctl.captioning import clustering
from reidctl.captioning.config import ALGORITHMS, StyleConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.form import Form, form_of, parse_instruction
from reidctl.captioning.neutralise import neutralise_all
from reidctl.captioning.styles import discover_styles, instructions, style_of_image, unit_vectors
from reidctl.errors import DataError
from reidctl.tables import read_table, write_table


@pytest.mark.covers(126, 127)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dbscan_finds_six_known_styles(seed: int) -> None:
    texts, truth = captions(480, seed)
    styles = discover_styles(texts, hashed, StyleConfig())
    assert adjusted_rand_score(truth, styles.labels) > 0.8
    assert (styles.labels >= 0).all()
    assert styles.table["size"].min() >= StyleConfig().min_cluster_size
    assert styles.table["size"].sum() == len(texts)


@pytest.mark.covers(129)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_and_real_ones_beat_random(algorithm: str) -> None:
    texts, truth = captions(240)
    styles = discover_styles(texts, hashed, StyleConfig(algorithm=algorithm))
    score = adjusted_rand_score(truth, styles.labels)
    if algorithm in ("none", "random"):
        assert abs(score) < 0.1
    else:
        assert score > 0.5
    assert len(styles.style_ids) == len(texts)


@pytest.mark.covers(128)
def test_report_holds_eps_clusters_and_noise() -> None:
    texts, _ = captions(240)
    report = discover_styles(texts, hashed, StyleConfig()).report
    assert report.eps is not None and 0 < report.eps < 1
    assert report.clusters == 6
    assert 0 <= report.noise <= 1
    assert report.warnings == ()
    assert report.as_dict()["encoder"] == "hashed"


@pytest.mark.covers(128)
def test_degenerate_cases_warn() -> None:
    one = discover_styles(["A man in a red shirt."] * 40, hashed, StyleConfig())
    assert "all captions fell into one style" in one.report.warnings
    few = discover_styles(["A man in a red shirt.", "woman, blue jeans"], hashed, StyleConfig())
    assert any("too few" in warning for warning in few.report.warnings)
    scattered = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0]
    rows = iter(range(60))
    lonely = discover_styles(
        [f"zq{'x' * index} walks" for index in range(60)],
        lambda texts: scattered[[next(rows) for _ in texts]],
        StyleConfig(eps=0.1),
    )
    assert any("noise" in warning for warning in lonely.report.warnings)


@pytest.mark.covers(128)
def test_report_counts_what_was_merged_and_what_was_equal() -> None:
    texts, _ = captions(240)
    report = discover_styles(texts, hashed, StyleConfig(max_styles=3)).report
    assert report.clusters == 3
    assert report.merged == report.found - 3 > 0
    assert report.distinct == len(set(neutralise_all(texts))) < report.captions == report.fitted == 240
    assert report.neutralised == "lexicon"
    assert report.as_dict()["notes"] == []


def test_a_vector_that_is_not_finite_is_a_data_error() -> None:
    with pytest.raises(DataError, match="finite"):
        discover_styles(["a man", "women"], lambda texts: np.full((len(texts), 3), np.nan), StyleConfig())
    with pytest.raises(DataError, match="for 2 texts"):
        discover_styles(["a man runs", "who"], lambda texts: np.ones((1, 3)), StyleConfig())


@pytest.mark.covers(125)
def test_captions_are_neutralised_once_by_whoever_is_asked() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return hashed(texts)

    texts = ["A man in a red shirt.", "a woman, blue jeans"]
    discover_styles(texts, embed, StyleConfig())
    assert sorted(seen) == sorted(neutralise_all(texts))
    seen.clear()
    plain = discover_styles(texts, embed, StyleConfig(neutralise="none"))
    assert sorted(seen) == sorted(texts)
    seen.clear()
    told = discover_styles(texts, embed, StyleConfig(neutralise="mllm"), neutral=["Someone in it.", "someone, that"])
    assert seen == ["Someone in it.", "someone, that"]
    assert plain.report.neutralised == "none" and told.report.neutralised == "mllm"
    seen.clear()
    plain.assign(["A boy"], embed)
    told.assign(["A boy"], embed, neutral=["One"])
    assert seen == ["A boy", "One"]


def test_neutral_texts_must_be_there_and_one_per_caption() -> None:
    with pytest.raises(DataError, match="1 neutral texts for 2 captions"):
        discover_styles(["a", "b"], hashed, StyleConfig(), neutral=["a"])
    with pytest.raises(DataError, match="neutral"):
        discover_styles(["a", "b"], hashed, StyleConfig(neutralise="mllm"))


def test_vectors_stay_float32_and_equal_texts_are_embedded_once() -> None:
    asked = []
    points = unit_vectors(["b", "a", "b", "b"], lambda texts: asked.append(texts) or np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert asked == [["a", "b"]]
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, [[0, 0], [0.6, 0.8], [0, 0], [0, 0]], atol=1e-7)


@pytest.mark.covers(128)
def test_more_clusters_than_styles_are_allowed_is_said() -> None:
    texts, _ = captions(240)
    report = discover_styles(texts, hashed, StyleConfig(max_styles=3)).report
    assert report.clusters == 3 and report.warnings == (
        "6 clusters were merged into the 3 allowed: eps may be too small",
    )


def test_no_captions_give_no_styles() -> None:
    styles = discover_styles([], hashed, StyleConfig())
    assert len(styles.table) == 0 and len(styles.labels) == 0


def test_subsample_fits_and_the_rest_follows_the_nearest_centroid() -> None:
    texts, truth = captions(600)
    styles = discover_styles(texts, hashed, StyleConfig(fit_limit=200))
    assert styles.report.fitted == 200 and styles.report.captions == 600
    assert adjusted_rand_score(truth, styles.labels) > 0.8


def test_new_captions_join_existing_styles_without_changing_them() -> None:
    texts, _ = captions(240)
    styles = discover_styles(texts, hashed, StyleConfig())
    later, later_truth = captions(60, seed=9)
    assert adjusted_rand_score(later_truth, styles.assign(later, hashed)) > 0.8


@pytest.mark.covers(127)
def test_noise_goes_to_the_nearest_centroid_and_small_clusters_merge() -> None:
    angles = np.radians([0, 1, 2, 3, 20, 90, 91, 92, 93, 70])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    raw = np.array([0, 0, 0, 0, -1, 1, 1, 1, 1, 2])
    settled = clustering.settle(points, raw, StyleConfig(min_cluster_size=2))
    # 20 degrees is noise nearest to the first; 70 degrees is a cluster of one nearest to the second.
    assert settled.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_more_than_the_allowed_styles_are_merged() -> None:
    texts, _ = captions(240)
    assert len(discover_styles(texts, hashed, StyleConfig(max_styles=3)).table) == 3


def test_knee_is_the_point_furthest_below_the_chord() -> None:
    assert clustering.knee(np.array([0.0, 0.1, 0.2, 1.0])) == pytest.approx(0.2)
    assert clustering.knee(np.array([0.3, 0.3])) == pytest.approx(0.3)


def test_k_distance_agrees_with_a_full_sort() -> None:
    points = np.random.default_rng(0).normal(size=(30, 4))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    slow = np.sort(np.sort(1 - points @ points.T, axis=1)[:, 4])
    np.testing.assert_allclose(clustering.k_distances(points, 5), slow, atol=1e-12)


def test_rows_of_the_curve_are_measured_against_all_points() -> None:
    points = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = np.array([3, 17, 40])
    slow = np.sort(np.sort(1 - points[rows] @ points.T, axis=1)[:, 4])
    np.testing.assert_allclose(clustering.k_distances(points, 5, rows=rows), slow, atol=1e-6)


def test_distinct_rows_are_numbered_by_their_first_place() -> None:
    points = np.array([[1, 0], [0, 1], [1, 0], [0, 2], [0, 1], [1, 0]], np.float32)
    first, back, count = clustering.distinct_rows(points)
    assert (first.tolist(), back.tolist(), count.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1, 0], [3, 2, 1])


def test_repeated_vectors_change_no_cluster() -> None:
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    repeated = points[np.random.default_rng(1).integers(60, size=400)]
    config = StyleConfig(eps=0.02, min_samples=8, min_cluster_size=1, max_styles=1000)
    found = clustering.group(repeated, config, 0)
    whole = DBSCAN(eps=0.02, min_samples=8, metric="cosine").fit(repeated.astype(np.float64)).labels_
    assert found.found == whole.max() + 1 > 1
    assert found.noise == pytest.approx((whole < 0).mean())
    np.testing.assert_array_equal(found.labels[whole >= 0], whole[whole >= 0])


@pytest.mark.covers(129)
@pytest.mark.parametrize("algorithm", ["agglomerative", "hdbscan", "kmeans", "gmm"])
def test_algorithms_that_cannot_take_all_captions_say_so_and_still_find_the_styles(algorithm, monkeypatch) -> None:
    monkeypatch.setitem(clustering.FIT_ROWS, algorithm, 120)
    texts, truth = captions(600)
    styles = discover_styles(texts, hashed, StyleConfig(algorithm=algorithm, clusters=6))
    assert adjusted_rand_score(truth, styles.labels) > 0.5
    assert styles.report.fitted == 120 and styles.report.captions == 600
    assert f"{algorithm} was fitted on 120 of 600 captions" in styles.report.notes[0]
    assert len(styles.style_ids) == 600


def test_uniform_prototypes_give_every_vector_one_of_the_wanted_styles() -> None:
    rng = np.random.default_rng(0)
    middle = np.eye(8)[:4]
    points = (middle[np.arange(400) % 4] + 0.05 * rng.normal(size=(400, 8))).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for count in (1, 2, 7, 40):
        labels = clustering.ups(points, count, sigma=7.0, samples=200, seed=0)
        assert labels.shape == (400,) and sorted(set(labels.tolist())) == list(range(labels.max() + 1))
        assert labels.max() < count
        np.testing.assert_array_equal(labels, clustering.ups(points, count, sigma=7.0, samples=200, seed=0))
    # k-means alone has centres for half of the wanted eight; the uniform prototypes claim vectors for others.
    assert clustering.ups(points, 8, sigma=7.0, samples=10, seed=0).max() >= 4


@pytest.mark.covers(130)
def test_different_styles_give_different_instructions_that_match_their_form() -> None:
    texts, truth = captions(480)
    styles = discover_styles(texts, hashed, StyleConfig())
    assert styles.table["instruction"].nunique() == len(styles.table) == 6
    forms = {}
    for style_id, label in zip(styles.style_ids, truth, strict=True):
        row = styles.table.loc[styles.table["style_id"] == style_id, "instruction"].iloc[0]
        forms[label] = parse_instruction(row)
    assert forms[0].fragments and forms[0].lower
    assert forms[1].sentences >= 2 and not forms[1].hedged
    assert forms[2].hedged
    assert forms[3].ornate
    assert forms[4].opening == "label"
    assert forms[5].exclaiming and forms[5].opening == "imperative"


def test_equal_forms_still_get_different_instructions() -> None:
    exemplars = [["A man in a red shirt walks."]] * 3
    assert len(set(instructions(exemplars))) == 3


def test_an_instruction_reads_back_as_its_form() -> None:
    form = Form(words=35, sentences=2, opening="image", hedged=True, connected=True, separators=True)
    assert parse_instruction(form.instruction()) == form
    assert parse_instruction("") == Form()
    assert form_of([]).words == 5


def test_styles_are_the_same_twice(tmp_path) -> None:
    texts, _ = captions(240)
    for name in ("a", "b"):
        write_table(tmp_path / name, "styles", discover_styles(texts, hashed, StyleConfig()).table)
    first, second = (read_table(tmp_path / name, "styles") for name in ("a", "b"))
    assert first["instruction"].tolist() == second["instruction"].tolist()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_draws_its_style_from_its_id_alone() -> None:
    ids = [f"style-{index:02d}" for index in range(6)]
    drawn = [style_of_image(f"image-{index}", ids) for index in range(600)]
    counts = [drawn.count(style) for style in ids]
    assert min(counts) > 60
    assert drawn == [style_of_image(f"image-{index}", ids) for index in range(600)]
    assert style_of_image("x", []) is None
