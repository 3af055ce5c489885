import math

import pytest
import torch

from reidctl import prompt_losses


def some(count, width=6, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return float(sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))) / float(a.norm() * b.norm())


PERSON = torch.tensor([4, 7, 4, 9, 7, 4])
OWNER = torch.tensor([4, 7, 9])


@pytest.mark.covers(72, 76)
def test_the_feature_distance_is_a_squared_length_on_the_sphere_or_as_it_is():
    a, b = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    # Unit: (1,0)-(0,1) is 2, (1,0)-(-1,0) is 4. Raw: (1,-2) is 5, (3,0) is 9.
    assert prompt_losses.feature_distance(a, b).item() == pytest.approx(3.0)
    assert prompt_losses.feature_distance(a, b, space="raw").item() == pytest.approx(7.0)
    assert prompt_losses.feature_distance(a, 5 * a).item() == pytest.approx(0.0, abs=1e-6)
    rows, others = some(5), some(5, seed=1)
    by_loop = sum(2 - 2 * cosine(x, y) for x, y in zip(rows, others, strict=True)) / 5
    assert prompt_losses.feature_distance(rows, others).item() == pytest.approx(by_loop)


@pytest.mark.covers(73)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_literal_identity_contrast_is_the_printed_sum(temperature):
    image, prompt = some(6), some(3, seed=1)
    own = [prompt[OWNER.tolist().index(person)] for person in PERSON.tolist()]
    t2i = i2t = 0.0
    for i in range(6):
        scores = [math.exp(cosine(image[j], own[i]) / temperature) for j in range(6)]
        t2i -= math.log(scores[i] / sum(scores)) / 6
        scores = [math.exp(cosine(image[i], own[j]) / temperature) for j in range(6)]
        i2t -= math.log(scores[i] / sum(scores)) / 6
    found = prompt_losses.identity_contrast(image, prompt, PERSON, OWNER, temperature=temperature, positives="literal")
    assert [value.item() for value in found] == pytest.approx([t2i, i2t])


@pytest.mark.covers(73)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_with_several_positives_each_prompt_stands_once_and_no_image_of_the_person_is_a_negative(temperature):
    image, prompt = some(6), some(3, seed=1)
    t2i = i2t = 0.0
    for u, owner in enumerate(OWNER.tolist()):
        scores = [math.exp(cosine(image[j], prompt[u]) / temperature) for j in range(6)]
        mine = [j for j in range(6) if PERSON[j] == owner]
        t2i -= sum(math.log(scores[j] / sum(scores)) for j in mine) / len(mine) / 3
    for i, person in enumerate(PERSON.tolist()):
        scores = [math.exp(cosine(image[i], row) / temperature) for row in prompt]
        i2t -= math.log(scores[OWNER.tolist().index(person)] / sum(scores)) / 6
    found = prompt_losses.identity_contrast(image, prompt, PERSON, OWNER, temperature=temperature)
    assert [value.item() for value in found] == pytest.approx([t2i, i2t])
    literal = prompt_losses.identity_contrast(
        image, prompt, PERSON, OWNER, temperature=temperature, positives="literal"
    )
    assert all(abs(a - b) > 1e-3 for a, b in zip(found, literal, strict=True))


@pytest.mark.covers(73)
def test_both_readings_agree_when_nobody_is_there_twice_and_the_default_temperature_is_0_02():
    image, prompt, person = some(4), some(4, seed=1), torch.tensor([3, 0, 2, 1])
    order = person.argsort()
    found = [
        prompt_losses.identity_contrast(
            image, prompt[order], person, person[order], positives=positives, temperature=0.02
        )
        for positives in ("id", "literal")
    ]
    assert [v.item() for v in found[0]] == pytest.approx([v.item() for v in found[1]])
    plain = prompt_losses.identity_contrast(image, prompt[order], person, person[order])
    assert torch.equal(plain[0], found[0][0])


@pytest.mark.covers(78)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_classification_among_all_prompts_is_the_printed_formula_and_sum_is_b_times_mean(temperature):
    image, prompt, person = some(5), some(9, seed=1), torch.tensor([0, 8, 3, 3, 5])
    by_loop = 0.0
    for i, own in enumerate(person.tolist()):
        scores = [math.exp(cosine(image[i], row) / temperature) for row in prompt]
        by_loop -= math.log(scores[own] / sum(scores))
    asked = {"temperature": temperature}
    assert prompt_losses.prompt_classification(image, prompt, person, **asked).item() == pytest.approx(by_loop / 5)
    summed = prompt_losses.prompt_classification(image, prompt, person, reduction="sum", **asked)
    assert summed.item() == pytest.approx(by_loop)


@pytest.mark.covers(73)
@pytest.mark.parametrize("positives", ["id", "literal"])
def test_of_a_person_with_several_prompts_the_contrast_reads_the_first_alone(positives):
    image, prompt = some(6), some(5, seed=1).requires_grad_()
    owner = torch.tensor([4, 7, 4, 9, 7])
    asked = {"temperature": 0.5, "positives": positives}
    found = prompt_losses.identity_contrast(image, prompt, PERSON, owner, **asked)
    expected = prompt_losses.identity_contrast(image, prompt[[0, 1, 3]], PERSON, OWNER, **asked)
    for one, other in zip(found, expected, strict=True):
        assert one.item() == pytest.approx(other.item())
        grads = [torch.autograd.grad(value, prompt, retain_graph=True)[0] for value in (one, other)]
        torch.testing.assert_close(*grads)
        assert not grads[0][[2, 4]].any()
    last = prompt_losses.identity_contrast(image, prompt[[2, 4, 3]], PERSON, OWNER, **asked)
    assert all(abs(a - b) > 1e-3 for a, b in zip(found, last, strict=True))


@pytest.mark.covers(78)
def test_classification_among_the_prompts_of_some_people_reads_the_first_of_each():
    image, every, person = some(5), some(9, seed=1).requires_grad_(), torch.tensor([0, 8, 3, 3, 5])
    whole = prompt_losses.prompt_classification(image, every, person, temperature=0.5)
    order = torch.tensor([8, 0, 5, 3, 1, 2, 4, 7, 6])
    asked = {"temperature": 0.5}
    assert prompt_losses.prompt_classification(image, every[order], person, order, **asked).item() == pytest.approx(
        whole.item()
    )
    owner, rows = torch.tensor([8, 0, 8, 5, 3, 0]), torch.tensor([8, 0, 1, 5, 3, 2])
    found = prompt_losses.prompt_classification(image, every[rows], person, owner, **asked)
    by_loop = 0.0
    for i, own in enumerate(person.tolist()):
        scores = {name: math.exp(cosine(image[i], every[name].detach()) / 0.5) for name in (8, 0, 5, 3)}
        by_loop -= math.log(scores[own] / sum(scores.values())) / 5
    assert found.item() == pytest.approx(by_loop) and found < whole
    grad = torch.autograd.grad(found, every)[0]
    assert torch.isfinite(grad).all() and not grad[[1, 2, 4, 6, 7]].any() and grad[[0, 3, 5, 8]].any(dim=1).all()


@pytest.mark.covers(78)
def test_without_a_temperature_the_loss_of_11003_people_hardly_moves():
    """Why the printed formula (temperature 1) gets one: chance 9.31, perfect 8.31 or, at best, 7.31."""
    for negative, expected in ((1.0, 9.306), (0.0, 8.306), (-1.0, 7.306)):
        other = torch.tensor([[negative, math.sqrt(1 - negative**2)]], dtype=torch.float64).expand(11002, -1)
        prompt = torch.cat([torch.tensor([[1.0, 0.0]], dtype=torch.float64), other])
        image, person = prompt[:1], torch.tensor([0])
        found = prompt_losses.prompt_classification(image, prompt, person, temperature=1.0).item()
        assert found == pytest.approx(expected, abs=2e-3)
        by_hand = math.log(math.e + 11002 * math.exp(negative)) - 1
        assert found == pytest.approx(by_hand)


@pytest.mark.covers(79)
def test_prompt_regularisation_sums_over_the_numbers_of_a_prompt_and_averages_over_pairs():
    text = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    image = torch.tensor([[[1.0, 0.0], [3.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    # 0 + 4 + 0 + 9 = 13 and 4: 8.5 in the mean.
    assert prompt_losses.prompt_regularisation(text, image).item() == 8.5
    assert prompt_losses.prompt_regularisation(text, text.clone()).item() == 0.0
    # A constant difference of 1 counts every one of the M * W numbers.
    wide = torch.zeros(3, 4, 512)
    assert prompt_losses.prompt_regularisation(wide, wide + 1).item() == 4 * 512


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_all_are_computed_in_full_precision_and_zero_with_a_gradient_of_zeros_when_nothing_takes_part(narrow):
    a, b, person = some(4, dtype=torch.float32).to(narrow), some(4, seed=1).to(narrow), torch.arange(4)
    calls = [
        lambda x, y, p: prompt_losses.feature_distance(x, y),
        lambda x, y, p: prompt_losses.identity_contrast(x, y, p, torch.arange(4))[0],
        lambda x, y, p: prompt_losses.identity_contrast(x, y, p, torch.arange(4))[1],
        lambda x, y, p: prompt_losses.prompt_classification(x, y, p),
        lambda x, y, p: prompt_losses.prompt_regularisation(x[:, None], y[:, None]),
    ]
    for call in calls:
        found = call(a, b, person)
        assert found.dtype == torch.float32 and torch.equal(found, call(a.float(), b.float(), person))
        nothing = a[:0].float().requires_grad_()
        other = b[:0].float() if call is calls[0] or call is calls[-1] else b.float()
        zero = call(nothing, other, person[:0])
        assert zero.item() == 0.0
        zero.backward()
        assert nothing.grad.shape == nothing.shape


def dots(rows, columns, temperature=1.0):
    return [[sum(a * b for a, b in zip(x, y, strict=True)) / temperature for y in columns] for x in rows]


def share_of(scores, place):
    return math.log(math.exp(scores[place]) / sum(math.exp(score) for score in scores))


def contrast_by_loop(image, text, person, temperature=1.0):
    """Both directions, each the mean over rows of the mean over all columns of the same person."""
    whole = 0.0
    for table in (dots(image, text, temperature), dots(text, image, temperature)):
        for row, own in enumerate(person):
            mine = [place for place, other in enumerate(person) if other == own]
            whole -= sum(share_of(table[row], place) for place in mine) / len(mine) / len(person)
    return whole


@pytest.mark.covers(206, 222)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_prompt_contrast_repeats_prompts_with_their_people_and_sums_both_directions(temperature, normalize):
    image, prompt = some(6), some(3, seed=1)
    scale = (lambda rows: rows / rows.norm(dim=1, keepdim=True)) if normalize else (lambda rows: rows)
    own = [OWNER.tolist().index(person) for person in PERSON.tolist()]
    expected = contrast_by_loop(scale(image).tolist(), scale(prompt)[own].tolist(), PERSON.tolist(), temperature)
    asked = {"temperature": temperature, "normalize": normalize}
    found = prompt_losses.prompt_contrast(image, prompt, PERSON, OWNER, **asked)
    assert found.item() == pytest.approx(expected)
    # The order of the prompts, and prompts of people who are not there, change nothing.
    shuffled = torch.tensor([2, 0, 1])
    more = torch.cat([some(1, seed=9), prompt[shuffled]])
    owners = torch.cat([torch.tensor([1]), OWNER[shuffled]])
    assert prompt_losses.prompt_contrast(image, more, PERSON, owners, **asked).item() == pytest.approx(expected)


@pytest.mark.covers(222)
def test_the_prompt_contrast_is_worked_by_hand_and_is_of_raw_dot_products_by_default():
    image, prompt = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    people = torch.tensor([0, 1])
    # Dot products 1 0 / 0 2 in both directions: -log(e / (e + 1)) and -log(e^2 / (e^2 + 1)), in the mean, twice.
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))
    assert prompt_losses.prompt_contrast(image, prompt, people, people).item() == pytest.approx(expected)
    cosine = prompt_losses.prompt_contrast(image, prompt, people, people, normalize=True).item()
    assert cosine == pytest.approx(2 * math.log(1 + math.exp(-1)))
    # Two images of one person alone: both columns are right, and each has half of the mass.
    alone = prompt_losses.prompt_contrast(image[:1].expand(2, 2), prompt[:1], torch.tensor([0, 0]), torch.tensor([0]))
    assert alone.item() == pytest.approx(2 * math.log(2))


@pytest.mark.covers(214, 222)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.1), (0.3, 0.0)])
def test_image_to_text_is_a_smoothed_classification_among_all_people(normalize, temperature, smoothing):
    image, prompt, target = some(5), some(9, seed=1), [0, 8, 3, 3, 5]
    scale = (lambda rows: rows / rows.norm(dim=1, keepdim=True)) if normalize else (lambda rows: rows)
    expected = 0.0
    for scores, own in zip(dots(scale(image).tolist(), scale(prompt).tolist(), temperature), target, strict=True):
        for place in range(9):
            wanted = smoothing / 9 + (1 - smoothing) * (place == own)
            expected -= wanted * share_of(scores, place) / 5
    asked = {"normalize": normalize, "temperature": temperature, "smoothing": smoothing}
    found = prompt_losses.image_to_text(image, prompt, torch.tensor(target), **asked)
    assert found.item() == pytest.approx(expected)


def test_image_to_text_smooths_by_a_tenth_and_neither_scales_nor_normalises_by_default():
    image, prompt = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    # Scores 3 and 0: 0.95 on the first, 0.05 on the second.
    expected = 0.95 * math.log(1 + math.exp(-3)) + 0.05 * (3 + math.log(1 + math.exp(-3)))
    assert prompt_losses.image_to_text(image, prompt, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_clip_reid_s_losses_are_computed_in_full_precision_and_zero_without_images(narrow):
    image, prompt, person = some(4, dtype=torch.float32).to(narrow), some(4, seed=1).to(narrow), torch.arange(4)
    calls = [
        lambda x, p: prompt_losses.prompt_contrast(x, prompt.to(x.dtype), p, torch.arange(4)),
        lambda x, p: prompt_losses.image_to_text(x, prompt.to(x.dtype), p),
    ]
    for call in calls:
        found = call(image, person)
        assert found.dtype == torch.float32 and torch.equal(found, call(image.float(), person))
        nothing = image[:0].float().requires_grad_()
        zero = call(nothing, person[:0])
        assert zero.item() == 0.0
        zero.backward()
        assert nothing.grad.shape == nothing.shape
