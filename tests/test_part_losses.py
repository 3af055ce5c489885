"""Losses on phrase-patch maps against loops over plain numbers, worked values and batches without anything."""

import math

import pytest
import torch
from torch.nn import functional

from reidctl import part_losses

PERSON = torch.tensor([0, 0, 1, 2])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_of(*shape, seed=0):
    return drawn(*shape, seed=seed).softmax(dim=-1)


def slow_contrast(rows, right, valid):
    """-log of the share of right answers among the valid ones, the mean over the rows that have a right one."""
    found = []
    for i, row in enumerate(rows):
        good = [math.exp(value) for j, value in enumerate(row) if right[i][j]]
        every = [math.exp(value) for j, value in enumerate(row) if valid[i][j]]
        if good:
            found.append(-math.log(sum(good) / sum(every)))
    return sum(found) / len(found) if found else 0.0


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def slow_both(scores, right, valid, temperature):
    rows = [[value / temperature for value in row] for row in scores.tolist()]
    return (
        slow_contrast(rows, right, valid) + slow_contrast(transposed(rows), transposed(right), transposed(valid))
    ) / 2


# The contrast of sets


@pytest.mark.covers(176)
def test_the_contrast_of_sets_equals_a_loop_with_all_pairs_of_a_person_as_positives():
    scores = drawn(4, 4) / 5
    same = [[a == b for b in PERSON.tolist()] for a in PERSON.tolist()]
    every = [[True] * 4] * 4
    found = part_losses.set_contrast(scores, PERSON, temperature=0.3)
    assert found.item() == pytest.approx(slow_both(scores, same, every, 0.3), rel=1e-10)
    assert found.item() != pytest.approx(part_losses.set_contrast(scores, torch.arange(4), temperature=0.3).item())


def test_the_contrast_of_equal_scores_is_the_logarithm_of_how_many_answers_there_are():
    scores = torch.full((4, 4), 0.3)
    assert part_losses.set_contrast(scores, torch.arange(4)).item() == pytest.approx(math.log(4), rel=1e-5)
    # Two people of two images each: half of the answers are right.
    assert part_losses.set_contrast(scores, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(math.log(2), rel=1e-5)
    assert part_losses.set_contrast(torch.eye(4) * 9, torch.arange(4)).item() < 1e-6


# The contrast of phrases


def slow_phrase_contrast(scores, index, person, phrases, temperature, similar):
    count, images = scores.shape
    said = [[p in [k for k in row if k >= 0] for p in range(count)] for row in index.tolist()]
    unit = functional.normalize(phrases, dim=1)
    cosine = (unit @ unit.T).tolist()
    people = person.tolist()
    right = [
        [any(said[j][p] and people[j] == people[i] for j in range(images)) for i in range(images)] for p in range(count)
    ]
    near = [
        [any(said[i][q] and cosine[p][q] > similar for q in range(count)) for i in range(images)] for p in range(count)
    ]
    valid = [[right[p][i] or not near[p][i] for i in range(images)] for p in range(count)]
    return slow_both(scores, right, valid, temperature)


@pytest.mark.covers(176)
@pytest.mark.parametrize("similar", [-1.0, 0.2, 0.9, 1.0])
def test_the_contrast_of_phrases_equals_a_loop_over_who_says_what(similar):
    phrases = drawn(5, 3, seed=1)
    phrases[3] = phrases[1] + 0.01  # two ways to say one thing
    index = torch.tensor([[0, 1, -1], [2, -1, -1], [3, 4, 0], [-1, -1, -1]])
    scores = drawn(5, 4, seed=2) / 4
    found = part_losses.phrase_contrast(scores, index, PERSON, phrases, temperature=0.3, similar=similar)
    assert found.item() == pytest.approx(slow_phrase_contrast(scores, index, PERSON, phrases, 0.3, similar), rel=1e-9)


@pytest.mark.covers(176)
def test_a_phrase_that_two_captions_share_is_a_negative_for_neither_image():
    """Both people wear black trousers (phrase 1); the coats differ. The score of the shared phrase must not matter."""
    phrases, person = torch.eye(3, dtype=torch.float64), torch.arange(2)
    index = torch.tensor([[0, 1], [1, 2]])
    scores = drawn(3, 2) / 5

    def gradient(given):
        values = scores.clone().requires_grad_()
        part_losses.phrase_contrast(values, given, person, phrases, temperature=0.5).backward()
        return values.grad

    shared = gradient(index)
    # The row of the shared phrase has two right answers and no wrong one; it only helps each image.
    assert (shared[1] <= 0).all()
    assert shared[0, 1] > 0 and shared[2, 0] > 0, "the other's coat is wrong"
    # Were it another phrase of the same words, image 1 would be a wrong answer to it.
    alone = gradient(torch.tensor([[0, 1], [2, -1]]))
    assert alone[1, 1] > 0


@pytest.mark.covers(176)
def test_a_phrase_that_means_the_same_is_left_out_and_one_below_the_threshold_is_not():
    angle = math.radians(20)  # cosine 0.9397
    phrases = torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    index, person = torch.tensor([[0], [1]]), torch.arange(2)
    scores = torch.tensor([[0.5, 0.4], [0.1, 0.6]], dtype=torch.float64)
    assert part_losses.phrase_contrast(scores, index, person, phrases, similar=0.93).item() == 0.0
    found = part_losses.phrase_contrast(scores, index, person, phrases, similar=0.95, temperature=1.0)
    rows = (math.log(1 + math.exp(-0.1)) + math.log(1 + math.exp(-0.5))) / 2
    columns = (math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-0.2))) / 2
    assert found.item() == pytest.approx((rows + columns) / 2, rel=1e-10)


def test_no_gradient_goes_into_the_embeddings_by_which_phrases_are_compared():
    phrases = drawn(3, 4).requires_grad_()
    scores = drawn(3, 2).requires_grad_()
    part_losses.phrase_contrast(scores, torch.tensor([[0, 1], [2, -1]]), torch.arange(2), phrases).backward()
    assert phrases.grad is None and scores.grad.abs().sum() > 0


@pytest.mark.covers(176)
def test_a_phrase_that_no_caption_says_is_a_wrong_answer_to_none():
    """Two tables of phrases, one behind the other, hold what the other's captions say."""
    phrases, scores, person = drawn(4, 3, seed=1), drawn(4, 2, seed=2) / 4, torch.arange(2)
    twice = torch.tensor([0, 1, 2, 1, 3, 0])  # phrases 1 and 0 once more, and the row 2 below is said by none
    index = torch.tensor([[0, 1], [4, 3]])
    said_once = torch.tensor([[0, 1], [2, 1]])
    firsts = part_losses.firsts(index, twice)
    assert firsts.tolist() == [[0, 1], [4, 1]]
    assert part_losses.firsts(torch.tensor([-1, 5, 3, 2]), twice).tolist() == [-1, 0, 1, 2]
    found = part_losses.phrase_contrast(scores[twice], firsts, person, phrases[twice], words=twice, temperature=0.3)
    rows = torch.tensor([0, 1, 3])
    alone = part_losses.phrase_contrast(scores[rows], said_once, person, phrases[rows], temperature=0.3)
    assert found.item() == pytest.approx(alone.item(), rel=1e-9) and alone.item() > 0.01
    counted_twice = part_losses.phrase_contrast(
        scores[twice], index, person, phrases[twice], words=twice, temperature=0.3
    )
    assert found.item() != pytest.approx(counted_twice.item(), rel=1e-3)


# The spread of maps


def slow_spread(weights, grid):
    height, width = grid
    place = [((row + 0.5) / height, (column + 0.5) / width) for row in range(height) for column in range(width)]
    y = sum(w * p[0] for w, p in zip(weights, place, strict=True))
    x = sum(w * p[1] for w, p in zip(weights, place, strict=True))
    return sum(w * ((p[0] - y) ** 2 + (p[1] - x) ** 2) for w, p in zip(weights, place, strict=True))


def test_the_spread_is_the_variance_of_places_and_each_axis_counts_from_0_to_1():
    maps = maps_of(2, 3, 12)
    found = part_losses.spread(maps, (4, 3))
    expected = [[slow_spread(row, (4, 3)) for row in rows] for rows in maps.tolist()]
    assert found.tolist() == [pytest.approx(row, rel=1e-9) for row in expected]
    corners = torch.tensor([0.5, 0, 0, 0.5])
    assert part_losses.spread(corners, (4, 1)).item() == pytest.approx(0.375**2)
    assert part_losses.spread(corners, (2, 2)).item() == pytest.approx(2 * 0.25**2)
    assert part_losses.spread(torch.eye(8), (4, 2)).abs().max() < 1e-6


@pytest.mark.covers(178)
def test_compactness_counts_what_is_above_the_floor():
    maps = torch.stack([torch.eye(4)[0], torch.tensor([0.5, 0, 0, 0.5]), torch.tensor([0.5, 0.5, 0, 0])])
    found = part_losses.compactness(part_losses.spread(maps, (4, 1)), floor=0.015)  # spreads 0, 0.140625 and 0.015625
    assert found.tolist() == pytest.approx([0, 0.125625, 0.000625], abs=1e-6)
    drawn_maps = maps_of(6, 8)
    expected = [max(0.0, slow_spread(row, (4, 2)) - 0.1) for row in drawn_maps.tolist()]
    assert 0 < sum(value == 0 for value in expected) < 6
    found = part_losses.compactness(part_losses.spread(drawn_maps, (4, 2)), floor=0.1)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.covers(178)
def test_a_map_below_the_floor_is_left_alone_and_one_above_is_drawn_together():
    logits = torch.tensor([[5.0, 0, 0, 0], [1.0, 0, 0, 1.0]], requires_grad=True)
    spreads = part_losses.spread(logits.softmax(dim=-1), (4, 1))
    low, high = spreads.tolist()
    part_losses.average(part_losses.compactness(spreads, floor=(low + high) / 2)).backward()
    assert logits.grad[0].abs().max() == 0 and logits.grad[1].abs().max() > 0
    after = (logits - logits.grad).softmax(dim=-1)
    assert part_losses.spread(after[1], (4, 1)).item() < high


# Alignment with attention


@pytest.mark.covers(178)
def test_alignment_is_the_divergence_of_the_attention_from_the_average_map():
    maps, attention = maps_of(2, 2, 6), maps_of(2, 6, seed=4)
    mask = torch.tensor([[True, True], [False, True]])
    expected = []
    for i in range(2):
        rows = [maps[i, k].tolist() for k in range(2) if mask[i, k]]
        mean = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        expected.append(sum(p * math.log(p / q) for p, q in zip(mean, attention[i].tolist(), strict=True)))
    assert part_losses.alignment(maps, mask, attention).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.covers(178)
def test_alignment_is_zero_where_the_attention_covers_the_phrases_and_pulls_it_there_otherwise():
    maps = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert part_losses.alignment(maps, mask, torch.tensor([[0.5, 0.5, 0, 0]])).item() == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = part_losses.alignment(maps, mask, logits.softmax(dim=-1))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    assert (logits.grad[0, :2] < 0).all() and (logits.grad[0, 2:] > 0).all()


# Diversity


@pytest.mark.covers(179)
def test_overlap_is_the_cosine_of_pairs_of_maps_by_their_places():
    maps, pairs = maps_of(2, 4, 6), [(0, 0, 1), (0, 2, 1), (1, 3, 0)]
    expected = []
    for i, k, other in pairs:
        a, b = maps[i, k].tolist(), maps[i, other].tolist()
        inner = sum(x * y for x, y in zip(a, b, strict=True))
        expected.append(inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    places = torch.tensor([16 * i + 4 * k + other for i, k, other in pairs])
    assert part_losses.overlap(maps, places).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.covers(179)
def test_overlap_is_one_for_one_place_and_zero_for_two():
    pair, here, there = torch.tensor([1]), torch.eye(4)[0], torch.eye(4)[2]
    assert part_losses.overlap(torch.stack([here, here])[None], pair).tolist() == pytest.approx([1])
    assert part_losses.overlap(torch.stack([here, there])[None], pair).tolist() == [0]


# Grounding


@pytest.mark.covers(196)
def test_grounding_asks_that_the_map_s_patches_hurt_by_a_margin_more_than_random_ones():
    without_map = torch.tensor([0.3, 0.5, 0.52], requires_grad=True)
    without_random = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    loss = part_losses.grounding(without_map, without_random, margin=0.05)
    assert loss.tolist() == pytest.approx([0, 0.05, 0.07], rel=1e-5)
    part_losses.average(loss).backward()
    assert without_map.grad.tolist() == pytest.approx([0, 1 / 3, 1 / 3])
    assert without_random.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])


# Nothing to compare, and half precision

NOBODY = torch.zeros(0, dtype=torch.long)
EMPTY = {
    "set_contrast": lambda x: part_losses.set_contrast(x.new_zeros(0, 0) * x.sum(), NOBODY) + 0 * x.sum(),
    "phrase_contrast": lambda x: part_losses.phrase_contrast(
        x[0, :, :2], torch.full((2, 1), -1), torch.arange(2), torch.eye(3)
    ),
    "compactness": lambda x: part_losses.average(
        part_losses.compactness(part_losses.spread(x[:0, 0].softmax(-1), (2, 2)))
    ),
    "alignment": lambda x: part_losses.average(
        part_losses.alignment(x[:0].softmax(-1), torch.zeros(0, 3, dtype=torch.bool), x[:0, 0].softmax(-1))
    ),
    "overlap": lambda x: part_losses.average(part_losses.overlap(x.softmax(-1), NOBODY)),
    "grounding": lambda x: part_losses.average(part_losses.grounding(x[:0, 0, 0], x[:0, 0, 1])),
}


@pytest.mark.parametrize("loss", EMPTY)
def test_a_batch_without_any_phrase_costs_nothing_and_can_be_learnt_from(loss):
    given = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = EMPTY[loss](given)
    found.backward()
    assert found.item() == 0 and found.shape == ()
    assert given.grad.abs().max() == 0


FULL = torch.ones(4, 3, dtype=torch.bool)
LOSSES = {
    "set_contrast": lambda x: part_losses.set_contrast(x[0, :, :4] / 9, PERSON),
    "phrase_contrast": lambda x: part_losses.phrase_contrast(
        x[0, :, :4] / 9, torch.arange(4)[:, None], PERSON, torch.eye(4)
    ),
    "compactness": lambda x: part_losses.average(
        part_losses.compactness(part_losses.spread(x[:, :3].flatten(0, 1).softmax(-1), (4, 2)))
    ),
    "alignment": lambda x: part_losses.average(part_losses.alignment(x[:, :3].softmax(-1), FULL, x[:, 3].softmax(-1))),
    "overlap": lambda x: part_losses.average(part_losses.overlap(x[:, :3].softmax(-1), torch.tensor([1, 2, 14]))),
    "grounding": lambda x: part_losses.average(part_losses.grounding(x[0, 0], x[0, 1])),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_full_and_gives_a_finite_gradient(loss):
    given = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    found = LOSSES[loss](given)
    assert found.dtype == torch.float32 and found.item() > 0
    found.backward()
    assert given.grad.isfinite().all() and given.grad.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = LOSSES[loss](given.detach().float())
    assert again.dtype == torch.float32
    assert again.item() == pytest.approx(LOSSES[loss](given.detach().float()).item(), rel=1e-6)
