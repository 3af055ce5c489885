"""Phrases that look at patches: distributions, a start at plain cosines, competition, and scores of all pairs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from reidctl.layers.ppim import Ppim, PpimConfig, one_of_each, set_mean

KINDS = ("xattn", "max", "slots", "sigmoid")
ALONE = ("xattn", "max", "sigmoid")
"""Kinds in which a phrase does not see the other phrases of its caption."""
B, K, N, D = 3, 4, 6, 5
MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * K])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(kind: str = "xattn", *, stirred: bool = True, **settings: object) -> Ppim:
    """A module whose weights are no longer the identity, as after some training."""
    torch.manual_seed(0)
    made = Ppim(PpimConfig(kind=kind, **settings), D)
    if stirred:
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters()):
                parameter.add_(0.3 * drawn(*parameter.shape, seed=number + 10))
    return made.eval()


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def slow(ppim: Ppim, phrase: Tensor, patches: Tensor) -> tuple[list[float], float]:
    """One phrase (D,) and one image (N, D), number by number: its map and its score."""
    kind, tau = ppim.config.kind, ppim.config.temperature
    query, keys = ppim.query.weight @ phrase, [ppim.key.weight @ patch for patch in patches]
    seen = torch.tensor([cosine(query, key) for key in keys])
    soft = ((seen - seen.max()) / tau).exp()
    if kind == "sigmoid":
        soft = 1 / (1 + (-(seen - ppim.threshold) / tau).exp())
    weights = soft / soft.sum()
    if kind == "max":
        return weights.tolist(), float(seen.max())
    region = sum(w * (ppim.value.weight @ patch) for w, patch in zip(weights, patches, strict=True))
    return weights.tolist(), cosine(region, phrase)


# Maps


@pytest.mark.covers(174)
@pytest.mark.parametrize("kind", ALONE)
def test_maps_and_scores_equal_the_formula_number_by_number(kind):
    ppim, phrases, patches = module(kind), drawn(B, K, D), drawn(B, N, D, seed=1)
    with torch.no_grad():
        found = ppim(phrases, MASK, patches)
        for image, phrase in MASK.nonzero().tolist():
            weights, score = slow(ppim, phrases[image, phrase], patches[image])
            assert found.maps[image, phrase].tolist() == pytest.approx(weights, abs=1e-5)
            assert found.scores[image, phrase].item() == pytest.approx(score, abs=1e-5)


@pytest.mark.covers(174)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_over_patches_sum_to_one_for_each_phrase_that_there_is(kind):
    found = module(kind)(drawn(B, K, D), MASK, drawn(B, N, D, seed=1))
    assert found.maps.shape == (B, K, N) and found.scores.shape == (B, K)
    assert found.maps.min() >= 0 and found.scores.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(found.maps.sum(dim=-1), MASK.float())
    assert found.scores[~MASK].abs().max() == 0 and found.scores[MASK].abs().min() > 0


@pytest.mark.covers(174)
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_place_of_a_phrase_that_is_not_there_changes_nothing(kind):
    ppim, phrases, patches = module(kind), drawn(B, K, D), drawn(B, N, D, seed=1)
    other = torch.where(MASK[..., None], phrases, 9 * drawn(B, K, D, seed=2))
    one, two = ppim(phrases, MASK, patches), ppim(other, MASK, patches)
    assert torch.equal(one.maps, two.maps) and torch.equal(one.scores, two.scores)
    # What is there does count, also that it is there.
    assert not torch.allclose(one.maps, ppim(other, MASK | True, patches).maps)
    wider = ppim(functional.pad(phrases, (0, 0, 0, 2)), functional.pad(MASK, (0, 2)), patches)
    torch.testing.assert_close(wider.scores[:, :K], one.scores)


@pytest.mark.covers(174)
@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_patches_stand_in_the_order_of_their_cosines_with_the_phrase(kind):
    ppim = module(kind, stirred=False, background=False, iterations=1, temperature=0.5)
    phrases, patches = drawn(B, 1, D), drawn(B, N, D, seed=1)
    if kind == "slots":  # one slot takes every patch whole: give it a rival that is equally far from all patches
        patches[..., -1] = 0
        rival = torch.zeros(B, 1, D)
        rival[..., -1] = 1
        phrases = torch.cat([phrases, rival], dim=1)
    with torch.no_grad():
        maps = ppim(phrases, torch.ones(phrases.shape[:2], dtype=torch.bool), patches).maps[:, 0]
    plain = torch.einsum(
        "bd,bnd->bn", functional.normalize(phrases[:, 0], dim=-1), functional.normalize(patches, dim=-1)
    )
    assert torch.equal(maps.argsort(dim=1), plain.argsort(dim=1))
    if kind == "xattn":
        torch.testing.assert_close(maps, (plain / 0.5).softmax(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_patches_in_another_order_give_the_same_map_in_that_order(kind):
    ppim, phrases, patches = module(kind), drawn(B, K, D), drawn(B, N, D, seed=1)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    one, two = ppim(phrases, MASK, patches), ppim(phrases, MASK, patches[:, order])
    torch.testing.assert_close(two.maps, one.maps[..., order])
    torch.testing.assert_close(two.scores, one.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_computed_in_full_precision_and_can_be_learnt_from(kind):
    ppim, phrases, patches = module(kind), drawn(B, K, D), drawn(B, N, D, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ppim(phrases, MASK, patches)
    assert found.maps.dtype == found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, ppim(phrases, MASK, patches).scores)
    found.scores.sum().backward()
    for name, parameter in ppim.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or (kind == "max" and name == "value.weight"), name


# Slots


@pytest.mark.covers(182)
@pytest.mark.parametrize("background", [True, False])
def test_every_patch_is_divided_among_the_slots_that_there_are(background):
    ppim = module("slots", background=background)
    mask = MASK.clone()
    mask[2, 1] = True
    assigned = ppim(drawn(B, K, D), mask, drawn(B, N, D, seed=1)).assigned
    assert assigned.shape == (B, K + background, N)
    torch.testing.assert_close(assigned.sum(dim=1), torch.ones(B, N))
    assert assigned[:, :K][~mask].abs().max() == 0


@pytest.mark.covers(182)
def test_slots_equal_a_loop_over_rounds_patches_and_phrases():
    ppim, phrases, patches = module("slots", iterations=2, temperature=0.3), drawn(1, 2, D), drawn(1, N, D, seed=1)
    with torch.no_grad():
        found = ppim(phrases, torch.ones(1, 2, dtype=torch.bool), patches)
        slots = [phrases[0, 0] / phrases[0, 0].norm(), phrases[0, 1] / phrases[0, 1].norm(), ppim.background]
        for _ in range(2):
            looks = [[cosine(ppim.query.weight @ z, ppim.key.weight @ x) / 0.3 for x in patches[0]] for z in slots]
            shares = torch.tensor(looks).softmax(dim=0)
            weights = shares / shares.sum(dim=1, keepdim=True)
            regions = [
                sum(w * (ppim.value.weight @ x) for w, x in zip(row, patches[0], strict=True)) for row in weights
            ]
            slots = [z + r / r.norm() for z, r in zip(slots, regions, strict=True)]
        torch.testing.assert_close(found.assigned[0], shares)
        torch.testing.assert_close(found.maps[0], weights[:2])
        expected = [cosine(r, e) for r, e in zip(regions[:2], phrases[0], strict=True)]
    assert found.scores[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.covers(182)
def test_phrases_compete_where_they_want_the_same_patch_and_the_background_takes_the_rest():
    """Patches: coat, coat, trousers, wall. Two phrases name coat and trousers; nobody names the wall."""
    coat, trousers, wall = torch.eye(D)[:3]
    patches = torch.stack([coat, coat, trousers, wall])[None]
    ppim, both = module("slots", stirred=False), torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        ppim.background.copy_(wall)
        found = ppim(torch.stack([coat, trousers])[None], both, patches)
        torch.testing.assert_close(found.assigned[0].argmax(dim=0), torch.tensor([0, 0, 1, 2]))
        torch.testing.assert_close(found.maps[0], torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]]), atol=1e-3, rtol=0)
        alone = ppim(torch.stack([coat, coat])[None], torch.tensor([[True, False]]), patches)
        shared = ppim(torch.stack([coat, coat])[None], both, patches)
    assert alone.assigned[0, 0, 0].item() == pytest.approx(1, abs=1e-3)
    assert shared.assigned[0, :2, 0].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("background", [True, False])
def test_a_caption_without_any_phrase_gives_no_nan_and_a_gradient(background):
    ppim, phrases = module("slots", background=background), drawn(B, K, D).requires_grad_()
    found = ppim(phrases, torch.zeros(B, K, dtype=torch.bool), drawn(B, N, D, seed=1))
    (found.scores.sum() + found.maps.sum()).backward()
    assert found.scores.abs().max() == 0 and phrases.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ppim.parameters())


# All phrases with all images


@pytest.mark.parametrize("kind", ALONE)
def test_scores_of_all_phrases_with_all_images_equal_a_loop_over_single_pairs(kind):
    ppim, phrases, patches = module(kind), drawn(7, D), drawn(5, N, D, seed=1)
    one = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        found = ppim.phrase_scores(phrases, patches)
        assert found.shape == (7, 5)
        for p in range(7):
            for i in range(5):
                alone = ppim(phrases[None, p : p + 1], one, patches[i : i + 1]).scores
                assert found[p, i].item() == pytest.approx(alone.item(), abs=1e-6)
        for chunk in (1, 2, 5):
            torch.testing.assert_close(ppim.phrase_scores(phrases, patches, chunk=chunk), found)


@pytest.mark.covers(177)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_all_captions_with_all_images_equal_a_loop_over_single_pairs(kind):
    ppim, phrases, patches = module(kind), drawn(7, D), drawn(5, N, D, seed=1)
    index = torch.tensor([[0, 3, -1], [2, -1, -1], [6, 5, 0], [-1, -1, -1]])
    with torch.no_grad():
        found = ppim.set_scores(phrases, index, patches)
        assert found.shape == (4, 5) and found[3].abs().max() == 0
        for t in range(3):
            own = phrases[index[t][index[t] >= 0]][None]
            for i in range(5):
                scores = ppim(own, torch.ones(own.shape[:2], dtype=torch.bool), patches[i : i + 1]).scores
                assert found[t, i].item() == pytest.approx(scores.mean().item(), abs=1e-5)
        for chunk in (1, 3, 5):
            torch.testing.assert_close(ppim.set_scores(phrases, index, patches, chunk=chunk), found)
    assert not torch.allclose(found[0], found[1])


def test_the_mean_of_a_set_is_that_of_its_phrases():
    scores, mask = torch.tensor([[1.0, 3.0, 9.0], [5.0, 5.0, 5.0]]), torch.tensor([[True, True, False], [False] * 3])
    assert set_mean(scores, mask).tolist() == [2.0, 0.0]


def test_one_phrase_of_each_row_is_drawn_as_multinomial_draws_it_and_none_that_is_not_there():
    torch.manual_seed(0)
    found = torch.stack([one_of_each(MASK) for _ in range(300)])
    torch.manual_seed(0)
    weight = MASK.float() + 1e-6
    assert torch.equal(found, torch.stack([torch.multinomial(weight, 1).squeeze(1) for _ in range(300)]))
    for place, share in enumerate((1 / 3, 1 / 3, 0, 1 / 3)):
        assert (found[:, 0] == place).float().mean().item() == pytest.approx(share, abs=0.08)
    assert (found[:, 1] == 0).all() and len(found[:, 2].unique()) == K


# Size


@pytest.mark.covers(175)
@pytest.mark.parametrize(
    ("kind", "matrices", "more"), [("xattn", 3, 0), ("max", 2, 0), ("sigmoid", 3, 1), ("slots", 3, 512)]
)
def test_at_the_width_of_clip_the_module_has_less_than_a_million_parameters(kind, matrices, more):
    count = sum(parameter.numel() for parameter in Ppim(PpimConfig(kind=kind), 512).parameters())
    assert count == matrices * 512**2 + more
    assert count < 1_000_000
