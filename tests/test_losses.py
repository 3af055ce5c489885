"""Losses against hand-worked examples and slow formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reidctl import losses

torch.manual_seed(0)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


PERSON = torch.tensor([3, 3, 7, 1, 7, 7])
A, B = features(6, 5, seed=1), features(6, 5, seed=2)


# --- sdm ---------------------------------------------------------------------------------------------------------


def slow_sdm(image: Tensor, text: Tensor, person: Tensor, temperature: float) -> float:
    """IRRA's formula with loops and math only."""
    rows, total = image.tolist(), 0.0
    columns = text.tolist()

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(p * q for p, q in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))

    for left, right in ((rows, columns), (columns, rows)):
        for i, x in enumerate(left):
            exps = [math.exp(cosine(x, y) / temperature) for y in right]
            same = [float(person[i] == person[j]) for j in range(len(right))]
            for value, label in zip(exps, same, strict=True):
                p = value / sum(exps)
                total += p * (math.log(p) - math.log(label / sum(same) + 1e-8)) / len(left)
    return total


@pytest.mark.covers(44)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_sdm_equals_the_published_formula_with_unbalanced_identities(temperature: float) -> None:
    assert losses.sdm(A, B, PERSON, temperature).item() == pytest.approx(slow_sdm(A, B, PERSON, temperature), rel=1e-10)


@pytest.mark.covers(44)
def test_sdm_is_zero_when_prediction_equals_target() -> None:
    # Two people at opposite ends: the softmax at 0.02 puts 1/2 on each same-person text.
    direction = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert losses.sdm(direction, 3 * direction, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.covers(44)
def test_sdm_by_hand_for_two_people_and_equal_scores() -> None:
    # p = (1/2, 1/2), q = (1, 0): each row 1/2 (log 1/2 - log 1) + 1/2 (log 1/2 - log 1e-8).
    row = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(1e-8))
    same = torch.ones(2, 4, dtype=torch.float64)
    assert losses.sdm(same, same, torch.tensor([0, 1])).item() == pytest.approx(2 * row, rel=1e-6)


@pytest.mark.covers(44)
def test_sdm_is_symmetric_under_swapping_the_modalities_and_ignores_length() -> None:
    value = losses.sdm(A, B, PERSON)
    assert torch.allclose(value, losses.sdm(B, A, PERSON))
    assert torch.allclose(value, losses.sdm(7 * A, 0.1 * B, PERSON))


@pytest.mark.covers(44)
def test_gradients_are_those_of_finite_differences() -> None:
    a, b = features(4, 3, seed=5).requires_grad_(), features(4, 3, seed=6).requires_grad_()
    person = torch.tensor([0, 0, 1, 2])
    functions = [
        lambda x, y: losses.sdm(x, y, person, 0.3),
        lambda x, y: losses.info_nce(x, y, temperature=0.3, positives=person),
        lambda x, y: losses.supcon(x, y, person, person),
        lambda x, y: losses.hsic(x, y),
        lambda x, y: losses.hsic(x, y, normalize="cka"),
        lambda x, y: losses.clothing_alignment(x, y, temperature=0.3, group=person),
        lambda x, y: losses.clothing_adversarial(x, y, temperature=0.3, group=person),
        lambda x, y: losses.clothing_adversarial(x, y, temperature=0.3, p_pos="sigmoid"),
        lambda x, y: losses.batch_hard_triplet(x, person),
        lambda x, y: losses.batch_hard_triplet(y, person, squared=True, mining="all"),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (a, b))


# --- contrastive -------------------------------------------------------------------------------------------------


@pytest.mark.covers(48)
def test_info_nce_equals_a_loop_over_rows_with_positives_summed() -> None:
    cosine = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T
    expected = 0.0
    for scores in (cosine / 0.1, cosine.T / 0.1):
        for i in range(6):
            mass = sum(math.exp(scores[i, j]) for j in range(6) if PERSON[i] == PERSON[j])
            expected -= math.log(mass / sum(math.exp(s) for s in scores[i])) / 12
    assert losses.info_nce(A, B, temperature=0.1, positives=PERSON).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.covers(48)
def test_info_nce_of_plain_pairs_is_cross_entropy_with_the_diagonal() -> None:
    logits, own = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T / 0.05, torch.arange(6)
    forward, backward = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)
    assert torch.allclose(losses.info_nce(A, B, direction="q2k"), forward)
    assert torch.allclose(losses.info_nce(A, B), (forward + backward) / 2)
    assert torch.allclose(losses.info_nce(A, B, multiple="mean"), (forward + backward) / 2)


@pytest.mark.covers(48)
def test_no_gradient_of_info_nce_pushes_two_features_of_one_person_apart() -> None:
    logits = features(6, 6, seed=3).requires_grad_()
    match = PERSON[:, None] == PERSON[None, :]
    (gradient,) = torch.autograd.grad(losses.contrast(logits, match), logits)
    assert (gradient[match] <= 0).all()
    assert (gradient[~match] >= 0).all()


@pytest.mark.covers(48, 57)
def test_info_nce_of_one_pair_or_of_one_person_is_zero() -> None:
    assert losses.info_nce(A[:1], B[:1]).item() == 0
    assert losses.info_nce(A, B, positives=torch.zeros(6)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.covers(48)
def test_rows_without_a_pair_are_neither_query_nor_key() -> None:
    valid = torch.tensor([True, False, True, True, False, True])
    poisoned = B.clone()
    poisoned[~valid] = torch.nan
    value = losses.info_nce(A, poisoned, positives=PERSON, valid=valid)
    assert torch.equal(value, losses.info_nce(A[valid], B[valid], positives=PERSON[valid]))


def test_contrast_skips_rows_without_a_positive_in_value_and_gradient() -> None:
    logits = features(3, 4, seed=4).requires_grad_()
    positive = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    kept = torch.tensor([0, 2])
    value = losses.contrast(logits, positive, multiple="mean")
    assert torch.allclose(value, losses.contrast(logits[kept], positive[kept], multiple="mean"))
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()


@pytest.mark.covers(49)
def test_supcon_equals_a_loop_over_positive_columns() -> None:
    person_b = torch.tensor([3, 7, 7, 1, 9, 3])
    scores, expected = A @ B.T / 0.7, 0.0
    for matrix, rows, columns in ((scores, PERSON, person_b), (scores.T, person_b, PERSON)):
        per_row = []
        for i in range(6):
            positives = [j for j in range(6) if rows[i] == columns[j]]
            if positives:  # person 9 has no column
                per_row.append(-sum(matrix[i].log_softmax(0)[j].item() for j in positives) / len(positives))
        expected += sum(per_row) / len(per_row)
    assert losses.supcon(A, B, PERSON, person_b, 0.7).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.covers(49)
def test_supcon_does_not_normalise_its_features() -> None:
    assert losses.supcon(A, B, PERSON, PERSON) != losses.supcon(2 * A, B, PERSON, PERSON)


def test_tal_equals_a_loop_over_rows() -> None:
    cosine, expected = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T, 0.0
    for scores in (cosine, cosine.T):
        for i in range(6):
            positives = [j for j in range(6) if PERSON[i] == PERSON[j]]
            weight = torch.softmax(scores[i, positives] / 0.2, 0)
            negative = sum(math.exp(scores[i, j] / 0.2) for j in range(6) if j not in positives)
            expected += max(0.0, 0.1 - (weight @ scores[i, positives]).item() + 0.2 * math.log(negative)) / 6
    assert losses.tal(A, B, PERSON, temperature=0.2, margin=0.1).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [losses.info_nce, losses.clothing_alignment, losses.clothing_adversarial])
def test_a_temperature_that_is_not_positive_is_refused(loss: object) -> None:
    with pytest.raises(ValueError, match="temperature"):
        loss(A, B, temperature=0.0)  # type: ignore[operator]


# --- classification ----------------------------------------------------------------------------------------------


@pytest.mark.covers(46)
def test_label_smoothing_spreads_epsilon_over_all_classes() -> None:
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    log_p = logits.log_softmax(1)[0]
    expected = -(0.9 + 0.1 / 3) * log_p[0] - 0.1 / 3 * (log_p[1] + log_p[2])
    assert losses.cross_entropy(logits, target, smoothing=0.1).item() == pytest.approx(expected.item())


@pytest.mark.covers(45)
def test_id_loss_is_the_mean_of_the_two_cross_entropies() -> None:
    # Equal scores over four classes: log 4.  Scores log 3 : 0 : 0 : 0 on the right class: p = 3 / 6.
    even, sure = torch.zeros(2, 4), torch.tensor([[math.log(3), 0, 0, 0]] * 2)
    value = losses.id_loss(even, sure, torch.tensor([0, 0]))
    assert value.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_mlm_averages_over_masked_tokens_only_and_is_zero_without_any() -> None:
    logits = features(2, 3, 11)
    labels = torch.tensor([[0, 4, 0], [0, 0, 9]])
    expected = -(logits[0, 1].log_softmax(0)[4] + logits[1, 2].log_softmax(0)[9]) / 2
    assert torch.allclose(losses.mlm(logits, labels), expected)
    assert losses.mlm(logits, torch.zeros_like(labels)).item() == 0


# --- triplet -----------------------------------------------------------------------------------------------------

LINE = torch.tensor([[0.0], [1.0], [3.0], [3.5], [10.0]])
OWNER = torch.tensor([0, 0, 0, 1, 2])
# Farthest positive and nearest negative on the line: 0 -> 3, 3.5;  1 -> 2, 2.5;  3 -> 3, 0.5.  3.5 and 10: no positive.


@pytest.mark.covers(47)
def test_triplet_by_hand_takes_the_hardest_pair_and_skips_people_with_one_image() -> None:
    assert losses.batch_hard_triplet(LINE, OWNER, margin=0.3).item() == pytest.approx((0 + 0 + 2.8) / 3)
    assert losses.batch_hard_triplet(LINE, OWNER, margin=1.0).item() == pytest.approx((0.5 + 0.5 + 3.5) / 3)
    assert losses.batch_hard_triplet(LINE, OWNER, margin=0.0).item() == pytest.approx(2.5 / 3)


@pytest.mark.covers(47)
def test_squared_triplet_compares_squared_distances() -> None:
    # 0: 9 - 12.25; 1: 4 - 6.25; 3: 9 - 0.25
    assert losses.batch_hard_triplet(LINE, OWNER, margin=0.3, squared=True).item() == pytest.approx(9.05 / 3)


@pytest.mark.covers(47)
def test_only_the_hardest_triplets_receive_gradient() -> None:
    line = LINE.clone().requires_grad_()
    losses.batch_hard_triplet(line, OWNER, margin=0.3).backward()
    # Anchor 3.0 alone is active: positive 0.0 (pull up), negative 3.5 (push up); the anchor gets both pulls.
    assert line.grad is not None
    assert torch.allclose(line.grad.squeeze() * 3, torch.tensor([-1.0, 0.0, 2.0, -1.0, 0.0]))


@pytest.mark.covers(47)
def test_all_mining_averages_over_every_valid_triplet() -> None:
    features_, person = features(7, 3, seed=8), torch.tensor([0, 0, 1, 1, 1, 2, 0])
    values = [
        max(0.0, (features_[i] - features_[j]).norm().item() - (features_[i] - features_[k]).norm().item() + 0.3)
        for i in range(7)
        for j in range(7)
        for k in range(7)
        if i != j and person[i] == person[j] and person[i] != person[k]
    ]
    value = losses.batch_hard_triplet(features_, person, mining="all")
    assert value.item() == pytest.approx(sum(values) / len(values))


@pytest.mark.covers(47)
def test_random_mining_is_seeded_and_never_harder_than_batch_hard() -> None:
    def draw(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return losses.batch_hard_triplet(A, PERSON, mining="random", generator=generator).item()

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(20)}) > 1
    assert max(draw(seed) for seed in range(20)) <= losses.batch_hard_triplet(A, PERSON).item() + 1e-9


@pytest.mark.covers(47, 57)
@pytest.mark.parametrize("person", [[0], [0, 1, 2], [4, 4, 4], []])
@pytest.mark.parametrize("mining", ["batch_hard", "random", "all"])
def test_triplet_without_any_triplet_is_zero_with_a_gradient(person: list[int], mining: str) -> None:
    x = features(len(person), 3).requires_grad_()
    value = losses.batch_hard_triplet(x, torch.tensor(person, dtype=torch.long), mining=mining)  # type: ignore[arg-type]
    value.backward()
    assert value.item() == 0
    assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.covers(47)
def test_identical_features_have_a_finite_gradient() -> None:
    x = torch.ones(4, 3).requires_grad_()
    value = losses.batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(0.3)
    assert x.grad is not None and x.grad.isfinite().all()


# --- hsic --------------------------------------------------------------------------------------------------------


def slow_hsic(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    n = len(gram_a)
    centre = torch.eye(n, dtype=gram_a.dtype) - 1 / n
    return torch.trace(gram_a @ centre @ gram_b @ centre) / (n - 1) ** 2


@pytest.mark.covers(50, 123)
@pytest.mark.parametrize("width", [3, 40])
def test_linear_hsic_equals_the_trace_and_the_squared_cross_covariance(width: int) -> None:
    a, b = features(20, width, seed=1) + 2, features(20, width, seed=2)
    covariance = torch.stack([a.T, b.T]) - torch.stack([a.T, b.T]).mean(dim=2, keepdim=True)
    cross = covariance[0] @ covariance[1].T / 19
    value = losses.hsic(a, b)
    assert torch.allclose(value, slow_hsic(a @ a.T, b @ b.T), rtol=1e-9)
    assert torch.allclose(value, cross.square().sum(), rtol=1e-9)


@pytest.mark.covers(50)
def test_the_two_hsic_algorithms_agree() -> None:
    a, b = features(12, 6, seed=1), features(12, 9, seed=2)
    assert torch.allclose(losses._squared_cross_covariance(a, b), losses._centred_trace(a, b, "linear"), rtol=1e-10)


@pytest.mark.covers(50)
def test_rbf_hsic_equals_the_trace_with_the_median_width() -> None:
    a, b = features(11, 3, seed=1), features(11, 4, seed=2)
    grams = []
    for x in (a, b):
        distances = torch.tensor([(x[i] - x[j]).norm() for i in range(11) for j in range(i)], dtype=torch.float64)
        width = distances.median()
        grams.append(torch.stack([torch.exp(-(x - row).square().sum(1) / (2 * width**2)) for row in x]))
    assert torch.allclose(losses.hsic(a, b, kernel="rbf"), slow_hsic(*grams), rtol=1e-9)


@pytest.mark.covers(50)
def test_scaling_one_side_by_ten_scales_linear_hsic_by_a_hundred_but_not_cka_or_l2() -> None:
    a, b = features(12, 4, seed=1), features(12, 4, seed=2)
    assert torch.allclose(losses.hsic(10 * a, b), 100 * losses.hsic(a, b))
    for normalize in ("l2", "cka"):
        assert torch.allclose(losses.hsic(10 * a, b, normalize=normalize), losses.hsic(a, b, normalize=normalize))


@pytest.mark.covers(50)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("normalize", ["none", "l2", "cka"])
def test_hsic_of_a_constant_or_of_one_sample_is_zero(kernel: str, normalize: str) -> None:
    options = {"kernel": kernel, "normalize": normalize}
    b = features(12, 4).requires_grad_()
    constant = losses.hsic(torch.full((12, 3), 0.7, dtype=torch.float64), b, **options)  # type: ignore[arg-type]
    constant.backward()
    assert constant.item() == pytest.approx(0, abs=1e-9)
    assert b.grad is not None and b.grad.isfinite().all()
    assert losses.hsic(b[:1], b[:1], **options).item() == 0  # type: ignore[arg-type]


@pytest.mark.covers(50)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_permuting_one_side_lowers_hsic_of_dependent_data(kernel: str) -> None:
    a = features(60, 4)
    b = a + 0.1 * features(60, 4, seed=9)
    shuffled = b[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert losses.hsic(a, shuffled, kernel=kernel) < 0.3 * losses.hsic(a, b, kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.covers(50)
def test_linear_hsic_misses_a_parabola_that_rbf_sees() -> None:
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    linear, rbf = (losses.hsic(x, x**2, kernel=kernel, normalize="cka") for kernel in ("linear", "rbf"))
    assert linear < 1e-12 and rbf > 0.05


@pytest.mark.covers(50)
def test_cka_of_a_feature_with_its_rotation_is_one() -> None:
    a = features(10, 4)
    rotation, _ = torch.linalg.qr(features(4, 4, seed=3))
    assert losses.hsic(a, 3 * a @ rotation, normalize="cka").item() == pytest.approx(1)


# --- clothing ----------------------------------------------------------------------------------------------------


@pytest.mark.covers(120)
def test_clothing_alignment_leaves_out_columns_with_the_same_text() -> None:
    group, expected = torch.tensor([0, 1, 0, 2, 2, 3]), 0.0
    cosine = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T / 0.2
    for i in range(6):
        columns = [j for j in range(6) if j == i or group[j] != group[i]]
        expected -= (cosine[i, i] - torch.logsumexp(cosine[i, columns], 0)).item() / 6
    assert losses.clothing_alignment(A, B, temperature=0.2, group=group).item() == pytest.approx(expected)
    plain = F.cross_entropy(cosine, torch.arange(6))
    assert torch.allclose(losses.clothing_alignment(A, B, temperature=0.2), plain)


@pytest.mark.covers(121)
def test_clothing_adversarial_starts_at_minus_log_of_63_64ths_for_64_equal_texts() -> None:
    value = losses.clothing_adversarial(torch.ones(64, 4), torch.ones(64, 4))
    assert value.item() == pytest.approx(-math.log(63 / 64), rel=1e-3)
    assert round(value.item(), 4) == 0.0157


@pytest.mark.covers(121)
def test_clothing_adversarial_equals_both_readings_of_p_pos() -> None:
    cosine = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T / 0.3
    softmax, sigmoid = cosine.softmax(1).diagonal(), cosine.diagonal().sigmoid()
    for reading, p in (("softmax", softmax), ("sigmoid", sigmoid)):
        value = losses.clothing_adversarial(A, B, temperature=0.3, p_pos=reading)  # type: ignore[arg-type]
        assert torch.allclose(value, -(1 - p).log().mean())


@pytest.mark.covers(121)
@pytest.mark.parametrize("reading", ["softmax", "sigmoid"])
def test_clothing_adversarial_is_bounded_when_p_goes_to_one(reading: str) -> None:
    corners = torch.eye(4).requires_grad_()
    value = losses.clothing_adversarial(corners, torch.eye(4), temperature=0.01, p_pos=reading)  # type: ignore[arg-type]
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-6), rel=1e-4)
    assert corners.grad is not None and corners.grad.isfinite().all()


# --- edges -------------------------------------------------------------------------------------------------------

PAIRWISE = {
    "sdm": lambda a, b, person: losses.sdm(a, b, person),
    "info_nce": lambda a, b, person: losses.info_nce(a, b, positives=person),
    "supcon": lambda a, b, person: losses.supcon(a, b, person, person),
    "tal": lambda a, b, person: losses.tal(a, b, person),
    "id_loss": lambda a, b, person: losses.id_loss(a, b, person, smoothing=0.1),
    "triplet": lambda a, b, person: losses.batch_hard_triplet(a, person),
    "hsic": lambda a, b, person: losses.hsic(a, b),
    "hsic_cka_rbf": lambda a, b, person: losses.hsic(a, b, kernel="rbf", normalize="cka"),
    "alignment": lambda a, b, person: losses.clothing_alignment(a, b, group=person),
    "adversarial": lambda a, b, person: losses.clothing_adversarial(a, b, group=person),
    "sigmoid": lambda a, b, person: losses.clothing_adversarial(a, b, p_pos="sigmoid"),
}


@pytest.mark.covers(57)
@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("person", [[0], [], [1, 1], [0, 0, 0, 2, 1], [3, 2, 1, 0]])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_loss_is_nan_for_any_batch_size_or_precision(
    name: str, dtype: torch.dtype, person: list[int], autocast: bool
) -> None:
    a = features(len(person), 8, seed=1, dtype=dtype).requires_grad_()
    b = features(len(person), 8, seed=2, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = PAIRWISE[name](a, b, torch.tensor(person, dtype=torch.long))
    value.backward()
    assert value.isfinite()
    assert value.dtype == torch.float32
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.covers(57)
@pytest.mark.parametrize("name", PAIRWISE)
def test_zero_features_give_no_nan(name: str) -> None:
    a, b = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8, requires_grad=True)
    PAIRWISE[name](a, b, torch.tensor([0, 0, 1, 2])).backward()
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.covers(57)
def test_autocast_does_not_change_a_float32_loss() -> None:
    a, b = A.float(), B.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.sdm(a, b, PERSON)
    assert torch.equal(inside, losses.sdm(a, b, PERSON))
