import numpy as np
import pytest
from PIL import Image

from reidctl.errors import DataError
from reidctl.evaluation.baselines import (
    attribute_oracle,
    caption_oracle,
    chance_of,
    colour_histograms,
    fit_words_to_colours,
    histogram,
)
from reidctl.retrieval.exact import evaluate_ranking

COLOURS = {
    "red": (200, 20, 20),
    "blue": (20, 20, 200),
    "green": (20, 160, 20),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
}


def dressed(upper, lower, rng):
    pixels = np.empty((16, 8, 3))
    pixels[:8], pixels[8:] = COLOURS[upper], COLOURS[lower]
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def wardrobe(seed, each=3):
    """20 people, one for each ordered pair of different colours."""
    rng = np.random.default_rng(seed)
    outfits = [(upper, lower) for upper in COLOURS for lower in COLOURS if upper != lower]
    people = np.repeat(np.arange(len(outfits)), each)
    pictures = [dressed(*outfits[p], rng) for p in people]
    texts = [f"a person in a {outfits[p][0]} shirt and {outfits[p][1]} trousers" for p in people]
    attributes = [{"upper": outfits[p][0], "lower": outfits[p][1], "view": str(i % 2)} for i, p in enumerate(people)]
    return people.astype(str), pictures, texts, attributes


def test_histogram_counts_colours_and_forgets_their_places():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0] = 255
    found = histogram(pixels, bins=2)
    assert found[0] == found[7] == pytest.approx(np.sqrt(0.5))
    assert (histogram(pixels[::-1], bins=2) == found).all()


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        colour_histograms([tmp_path / "broken.png"])


@pytest.mark.covers(35)
def test_colours_find_people_better_than_chance_but_not_perfectly(tmp_path):
    people, pictures, _, _ = wardrobe(0)
    paths = []
    for row, pixels in enumerate(pictures):
        paths.append(tmp_path / f"{row}.png")
        Image.fromarray(pixels).save(paths[-1])
    found = colour_histograms(paths)
    ids = np.arange(len(people)).astype(str)
    ranking = evaluate_ranking(
        found, found, query_person=people, gallery_person=people, query_id=ids, gallery_id=ids, exclude="same_item"
    )
    score, chance = ranking.queries.means()["mAP"], chance_of(ranking).means()["mAP"]
    # Red over blue and blue over red have one histogram: layout is out of reach.
    assert 2 * chance < score < 0.9


@pytest.mark.covers(35)
def test_words_predict_colours_of_unseen_people_better_than_chance():
    people, pictures, texts, _ = wardrobe(1)
    colours = np.stack([histogram(pixels) for pixels in pictures])
    train = people.astype(int) % 2 == 0
    model = fit_words_to_colours([t for t, use in zip(texts, train, strict=True) if use], colours[train])
    query = model.predict([t for t, use in zip(texts, train, strict=True) if not use])
    ranking = evaluate_ranking(query, colours[~train], query_person=people[~train], gallery_person=people[~train])
    assert ranking.queries.means()["mAP"] > 2 * chance_of(ranking).means()["mAP"]


def test_ridge_equals_the_closed_form_solved_another_way():
    rng = np.random.default_rng(2)
    words = ["red", "blue", "green", "white"]
    texts = [" ".join(rng.choice(words, 2, replace=False)) for _ in range(30)]
    target = rng.random((30, 5)).astype(np.float32)
    model = fit_words_to_colours(texts, target, penalty=0.7)
    # Augmented least squares; the intercept is eliminated by centring, because it carries no penalty.
    bag = np.array([[word in text.split() for word in model.vocabulary] for text in texts], float)
    middle = bag - bag.mean(0)
    rows = np.vstack([middle, np.sqrt(0.7) * np.eye(4)])
    expected = np.linalg.lstsq(rows, np.vstack([target - target.mean(0), np.zeros((4, 5))]), rcond=None)[0]
    np.testing.assert_allclose(model.weights[:-1], expected, atol=1e-6)


def test_prediction_of_a_text_without_known_words_is_the_mean_colour_not_nan():
    model = fit_words_to_colours(["red top", "red top", "blue top", "blue top"], np.eye(4, dtype=np.float32))
    found = model.predict(["xyzzy", ""])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.covers(35)
def test_attribute_oracle_is_perfect_without_clones_and_ties_clones():
    people, _, _, attributes = wardrobe(3)
    vectors = attribute_oracle(attributes, attributes)
    assert vectors is not None
    ids = np.arange(len(people)).astype(str)
    call = dict(query_id=ids, gallery_id=ids, exclude="same_item")
    perfect = evaluate_ranking(*vectors, query_person=people, gallery_person=people, **call)
    means = perfect.queries.means()
    assert means.pop("rSum") == 3.0
    assert set(means.values()) == {1.0}
    clones = np.where(people == "1", "0x", people)
    attributes = [attributes[0] if p in ("0", "1") else a for p, a in zip(people, attributes, strict=True)]
    tied = evaluate_ranking(
        *attribute_oracle(attributes, attributes), query_person=clones, gallery_person=clones, **call
    )
    # Two right images (the query itself is dropped) among five alike: 1 - (3/5) is the chance of a right first one.
    assert tied.queries.hits[1][0] == pytest.approx(2 / 5)


def test_attribute_oracle_ignores_what_belongs_to_the_picture():
    query, gallery = attribute_oracle([{"top": "red", "view": "front"}], [{"top": "red", "view": "back"}])
    assert (query == gallery).all()


@pytest.mark.covers(35)
def test_caption_oracle_knows_only_what_the_caption_names():
    values = [
        {"upper": "red", "lower": "blue"},
        {"upper": "red", "lower": "black"},
        {"upper": "green", "lower": "blue"},
    ]
    vectors = caption_oracle(
        ["a RED shirt", "red shirt, black trousers", "somebody"], [values[0], values[1], values[2]], values
    )
    assert vectors is not None
    ranking = evaluate_ranking(*vectors, query_person=list("abc"), gallery_person=list("abc"))
    # Query 1 names red: images 0 and 1 tie. Query 2 is decided. Query 3 names nothing: all three tie.
    assert ranking.queries.hits[1].tolist() == pytest.approx([1 / 2, 1, 1 / 3])


def test_caption_oracle_reads_values_of_several_words_and_plurals():
    values = [{"upper": "light_blue", "shoes": "boot"}, {"upper": "blue", "shoes": "sandal"}]
    query, gallery = caption_oracle(["a light blue shirt and boots"], [values[0]], values)
    assert (query @ gallery.T)[0].tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("missing", [None, {}])
def test_oracles_decline_data_without_attributes(missing):
    assert attribute_oracle([missing], [{"a": "b"}]) is None
    assert caption_oracle(["text"], [{"a": "b"}], [missing]) is None
