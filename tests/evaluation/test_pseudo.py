"""Distances, AUC, rank correlation and purity of pseudo-tokens: hand-worked values and planted cases."""

import numpy as np
import pytest

from reidctl.evaluation import pseudo

RNG = np.random.default_rng(0)
PEOPLE = np.repeat([f"p{n:02d}" for n in range(20)], 3).astype(object)


def test_the_distance_is_the_frobenius_norm():
    image = np.zeros((2, 2, 2))
    text = np.array([[[1.0, 1], [1, 1]], [[3, 0], [0, 4]]])
    assert pseudo.distances(image, text) == pytest.approx([2, 5])


@pytest.mark.covers(88)
def test_matched_pairs_are_nearer_than_mismatched_ones_only_if_the_text_says_something():
    image = RNG.normal(size=(60, 4, 8))
    other = pseudo.others(PEOPLE, np.random.default_rng(1))
    assert (PEOPLE[other] != PEOPLE).all()
    near = image + 0.1 * RNG.normal(size=image.shape)
    assert (pseudo.distances(image, near) < pseudo.distances(image, near[other])).all()
    noise = RNG.normal(size=image.shape)
    gap = pseudo.distances(image, noise[other]) - pseudo.distances(image, noise)
    assert abs(gap.mean()) < 4 * gap.std() / 60**0.5


def test_auc_counts_captions_of_other_people_and_halves_ties():
    person = np.array(["a", "a", "b", "c"], dtype=object)
    score = np.array([[0.5, 0.9, 0.1, 0.7], [0.0, 0.4, 0.4, 0.1], [0.1, 0.2, 0.0, 0.0], [0.9, 0.1, 0.2, 0.8]])
    # Image 0: b below, c above; its person's other caption does not count. Image 1: b equal, c below.
    assert pseudo.caption_auc(score, person) == pytest.approx([1 / 2, 3 / 4, 1 / 6, 2 / 3])
    assert np.isnan(pseudo.caption_auc(np.eye(2), np.array(["a", "a"], dtype=object))).all()


@pytest.mark.covers(96)
def test_captions_that_fit_are_found_and_exchanged_ones_are_a_coin_flip():
    prompt = RNG.normal(size=(60, 16))
    caption = prompt + 0.5 * RNG.normal(size=prompt.shape)
    score = prompt @ caption.T
    assert pseudo.caption_auc(score, PEOPLE).mean() > 0.95

    def auc(other):
        return float(pseudo.caption_auc(score[:, other], PEOPLE).mean())

    control = pseudo.exchanged(auc, PEOPLE)
    assert control.mean == pytest.approx(0.5, abs=0.05) and control.mean <= control.high < 0.7


@pytest.mark.covers(103)
def test_rank_correlation_knows_order_ties_and_constants():
    assert pseudo.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert pseudo.spearman([1, 2, 3, 4], [0, -1, -5, -6]) == pytest.approx(-1)
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert pseudo.spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)
    # Ranks 1 2 3 and 1.5 1.5 3: covariance 1.5 over sqrt(2 * 1.5).
    assert pseudo.spearman([1, 2, 3], [0, 0, 1]) == pytest.approx(1.5 / 3**0.5)
    assert pseudo.spearman([1, 2, 3], [7, 7, 7]) == 0


def test_the_interval_of_a_rank_correlation_holds_it_and_is_wider_for_fewer_people():
    a = RNG.normal(size=60)
    b = a + RNG.normal(size=60)
    found = pseudo.spearman_interval(a, b, PEOPLE)
    assert found.low < found.value < found.high and found.low > 0
    few = pseudo.spearman_interval(a[:12], b[:12], PEOPLE[:12])
    assert few.high - few.low > found.high - found.low
    assert found == pseudo.spearman_interval(a, b, PEOPLE)


@pytest.mark.covers(100)
def test_words_that_name_an_attribute_are_pure_and_exchanged_labels_are_not():
    label = np.repeat(np.array(["red", "blue", "green", "black"], dtype=object)[np.arange(20) % 4], 3)
    words = np.unique(label.astype(str), return_inverse=True)[1]
    assert pseudo.purity(words, label) == 1 and pseudo.mutual_information(words, label) == pytest.approx(1)
    for measure in (pseudo.purity, pseudo.mutual_information):
        control = pseudo.exchanged(lambda other, m=measure: m(words, label[other]), PEOPLE)
        assert control.high < 0.7
        noise = np.repeat(RNG.integers(4, size=20), 3)
        control = pseudo.exchanged(lambda other, m=measure, n=noise: m(n, label[other]), PEOPLE)
        assert measure(noise, label) < control.high + 0.15


def test_purity_and_information_of_a_small_table():
    word, label = np.array([1, 1, 1, 2, 2, 2]), np.array(["a", "a", "b", "b", "b", "b"])
    assert pseudo.purity(word, label) == pytest.approx(5 / 6)
    half, third = -np.log(1 / 2), -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))
    shared = half + third - -(1 / 3 * np.log(1 / 3) + 1 / 6 * np.log(1 / 6) + 1 / 2 * np.log(1 / 2))
    assert pseudo.mutual_information(word, label) == pytest.approx(2 * shared / (half + third))
    assert pseudo.mutual_information(word, np.zeros(6)) == 0 == pseudo.mutual_information(np.zeros(6), np.zeros(6))
    both = np.stack([word, np.zeros(6)], axis=1)
    assert pseudo.mean_over_positions(pseudo.purity, both, label) == pytest.approx((5 / 6 + 4 / 6) / 2)


@pytest.mark.covers(95)
def test_words_of_the_own_caption_are_nearer_than_those_of_another():
    table = np.eye(6)
    ids = np.array([[0, 1], [2, 3]])
    said = [{0, 1, 4}, {2, 5}]
    bags = np.stack([table[sorted(own)].mean(axis=0) for own in said])
    # 2 of 2 x 3 pairs, 1 of 2 x 2 pairs are the same word.
    assert pseudo.bag_similarity(table[ids], bags) == pytest.approx([1 / 3, 1 / 4])
    assert pseudo.bag_hits(ids, said) == pytest.approx([1, 1 / 2])
    assert pseudo.bag_similarity(table[ids], bags[::-1]) == pytest.approx([0, 0])
    assert pseudo.bag_hits(ids, said[::-1]) == pytest.approx([0, 0])


@pytest.mark.covers(104)
def test_parameters_are_counted_by_what_they_belong_to():
    sizes = [("backbone.image.a", 5), ("backbone.text.b", 3), ("second_token", 2), ("invert_image.leave.weight", 7)]
    sizes += [("invert_image.leave.bias", 1), ("classifier.weight", 100)]
    assert pseudo.parameter_parts(sizes) == {"second_token": 2, "inversion_image": 8, "towers": 8}
