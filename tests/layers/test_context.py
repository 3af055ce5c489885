"""Hierarchical prompts: which words and vectors stand where, whom a gradient reaches, and what is refused."""

import math

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from reidctl.backbones.tokenizers import ClipTokenizer
from reidctl.backbones.weights import build
from reidctl.layers.context import HcpConfig, HierarchicalContext

NAMES = ("a", "b", "c")
WORDS = ("a photo of a", "person.")


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return build("clip:micro").eval()


def context(tower, *, names=NAMES, n_id=4, width=None, length=None, **changes):
    torch.manual_seed(1)
    return HierarchicalContext(
        HcpConfig(**changes), names, n_id, width or tower.width_text, tower.tokenize,
        context=length or tower.context_length,
    )  # fmt: skip


def people(tower, count=2, n_id=4):
    return torch.randn(count, n_id, tower.width_text, generator=torch.Generator().manual_seed(2))


def ids_of(tower, words):
    """Token ids without start and end."""
    return tower.tokenize([words]).ids[0, 1:-1]


def vectors(tower, *ids):
    """The embeddings of token ids, or vectors as they are, one after another."""
    parts = [tower.embed_tokens(one[None])[0] if one.dtype == torch.long else one for one in ids]
    return torch.cat([part for part in parts if len(part)])


def by_hand(tower, *middle):
    """[SOS] A photo of a <middle> person . [EOS]."""
    start, end = (torch.tensor([one]) for one in (tower.tokenizer.start_id, tower.tokenizer.end_id))
    before, after = (ids_of(tower, words) for words in WORDS)
    return vectors(tower, start, before, *middle, after, end)


# What stands where


@pytest.mark.covers(201, 202, 203)
def test_the_prompt_is_start_a_photo_of_a_shared_domain_person_tokens_person_dot_end(tower):
    made, tokens = context(tower, n_shared=4, n_domain=3, n_id=2), people(tower, n_id=2)
    for domain in range(3):
        prompt = made(tower.embed_tokens, tokens, domain)
        assert prompt.mask.all() and prompt.mask.shape == prompt.embeddings.shape[:2]
        for person in range(2):
            expected = by_hand(tower, made.shared, made.domain[domain], tokens[person])
            assert torch.equal(prompt.embeddings[person], expected), (domain, person)
    template = made.templates[0]
    assert [template.places(name) for name in ("shared", "domain", "id")] == [range(5, 9), range(9, 12), range(12, 14)]
    assert SimpleTokenizer().decode(ids_of(tower, WORDS[0]).tolist()).split() == ["a", "photo", "of", "a"]
    assert SimpleTokenizer().decode(ids_of(tower, WORDS[1]).tolist()).split() == ["person", "."]


@pytest.mark.covers(201, 202, 203)
def test_by_default_four_tokens_of_each_kind_make_20_of_clip_s_77(tower):
    tokenizer = ClipTokenizer(77)
    made = HierarchicalContext(HcpConfig(), NAMES, 4, 512, lambda words: tokenizer(words), context=77)
    assert made.shared.shape == (4, 512) and made.domain.shape == (3, 4, 512)
    assert made.templates[0].length == 20
    prompt = made(lambda ids: torch.zeros(*ids.shape, 512), torch.zeros(5, 4, 512), 1)
    assert prompt.embeddings.shape == (5, 20, 512)
    for parameter in (made.shared, made.domain):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1) and abs(parameter.mean().item()) < 2e-3
    assert HcpConfig().layout == "concat" and HcpConfig().enabled


@pytest.mark.covers(201, 202)
def test_the_order_of_the_template_is_kept(tower):
    made, tokens = context(tower, template="{id} of {domain}, {shared}"), people(tower, 1)
    prompt = made(tower.embed_tokens, tokens, 2).embeddings[0]
    start, end = (torch.tensor([one]) for one in (tower.tokenizer.start_id, tower.tokenizer.end_id))
    of, comma = ids_of(tower, "of"), ids_of(tower, ",")
    assert torch.equal(prompt, vectors(tower, start, tokens[0], of, made.domain[2], comma, made.shared, end))


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("gone", ["n_shared", "n_domain"])
def test_a_level_without_tokens_vanishes_and_its_cosine_to_the_other_too(tower, gone):
    made, tokens = context(tower, **{gone: 0}), people(tower)
    prompt = made(tower.embed_tokens, tokens, 1)
    kept = made.domain[1] if gone == "n_shared" else made.shared
    assert torch.equal(prompt.embeddings[1], by_hand(tower, kept, tokens[1]))
    assert made.cosines().numel() == 0
    loss = made.orthogonality()
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()


# Layouts


def test_add_puts_the_dataset_s_tokens_onto_the_person_s(tower):
    made, tokens = context(tower, layout="add"), people(tower)
    for domain in range(3):
        prompt = made(tower.embed_tokens, tokens, domain)
        for person in range(2):
            expected = by_hand(tower, made.shared, tokens[person] + made.domain[domain])
            assert torch.equal(prompt.embeddings[person], expected)
    assert made.templates[0].length == 16


def test_domain_has_no_tokens_of_people(tower):
    made, tokens = context(tower, layout="domain"), people(tower, 3)
    prompt = made(tower.embed_tokens, tokens, 1)
    expected = by_hand(tower, made.shared, made.domain[1])
    assert all(torch.equal(row, expected) for row in prompt.embeddings) and len(prompt.embeddings) == 3


def test_words_says_shared_and_dataset_in_plain_words_that_do_not_learn(tower):
    made, tokens = context(tower, layout="words", names=("market", "msmt17")), people(tower)
    assert not list(made.parameters()) and made.cosines().numel() == 0
    said = ids_of(tower, "pedestrian seen by a surveillance camera, market")
    prompt = made(tower.embed_tokens, tokens, 0)
    assert torch.equal(prompt.embeddings[1], by_hand(tower, said, tokens[1]))
    other = made(tower.embed_tokens, tokens, 1)
    assert torch.equal(
        other.embeddings[0],
        by_hand(tower, ids_of(tower, "pedestrian seen by a surveillance camera, msmt17"), tokens[0]),
    )


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("cuhk_{id}", "cuhk id"), ("{shared}", "shared"), ("{domain}{id}", "domain id"), ("{", ""),
        ("<b>&amp;</b>", "b amp b"), ("Größe-1", "Größe 1"), ("a.b/c\n[red]", "a b c red"), ("", ""),
    ],
)  # fmt: skip
def test_a_dataset_s_name_is_never_a_slot_or_markup(tower, name, read):
    made, tokens = context(tower, layout="words", names=(name,), shared_words="of {domain} {id}"), people(tower, 1)
    assert made.templates[0].slots == ("id",)
    prompt = made(tower.embed_tokens, tokens, 0)
    expected = ids_of(tower, f"of domain id {read}".strip())
    assert torch.equal(prompt.embeddings[0], by_hand(tower, expected, tokens[0]))


# Gradients


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("layout", ["concat", "add", "domain"])
def test_a_domain_s_prompt_reaches_the_shared_tokens_and_its_own_and_no_other_domain_s(tower, layout):
    made, tokens = context(tower, layout=layout), people(tower).requires_grad_()
    for domain in range(3):
        prompt = made(tower.embed_tokens, tokens, domain)
        value = tower.encode_embedded(prompt.embeddings, prompt.mask).pooled.square().sum()
        shared, domains, person = torch.autograd.grad(value, (made.shared, made.domain, tokens), allow_unused=True)
        assert shared.abs().amax(dim=1).min() > 0
        for other in range(3):
            reached = domains[other].abs().amax(dim=1)
            assert (reached > 0).all() if other == domain else (reached == 0).all(), "exactly"
        assert (person is None) == (layout == "domain")
        if person is not None:
            assert person.abs().amax(dim=2).min() > 0


# Decoupling


@pytest.mark.covers(204)
def test_cosines_and_their_mean_square_are_those_of_a_loop(tower):
    made = context(tower, n_shared=2, n_domain=3)
    found, total = made.cosines(), 0.0
    assert found.shape == (3, 2, 3)
    for domain in range(3):
        for one in range(2):
            for other in range(3):
                a, b = made.shared[one].tolist(), made.domain[domain, other].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                cosine = dot / math.hypot(*a) / math.hypot(*b)
                assert found[domain, one, other].item() == pytest.approx(cosine, abs=1e-6)
                total += cosine**2
    assert made.orthogonality().item() == pytest.approx(total / 18, abs=1e-6)


@pytest.mark.covers(204)
def test_the_orthogonality_loss_is_one_for_equal_tokens_zero_for_orthogonal_ones_and_blind_to_length(tower):
    made = context(tower, n_shared=1, n_domain=1)
    with torch.no_grad():
        made.domain.copy_(-3 * made.shared.expand(3, 1, -1))
        assert made.orthogonality().item() == pytest.approx(1)
        made.shared.zero_()[0, 0] = 5.0
        made.domain.zero_()[:, 0, 1] = 0.01
        assert made.orthogonality().item() == 0


@pytest.mark.covers(204)
def test_a_few_steps_of_the_orthogonality_loss_push_the_cosines_down(tower):
    made = context(tower)
    with torch.no_grad():
        made.domain += made.shared  # cosines of about 0.7
    before = made.cosines().detach().abs()
    optimizer = torch.optim.Adam(made.parameters(), lr=5e-3)
    for _ in range(20):
        optimizer.zero_grad()
        made.orthogonality().backward()
        optimizer.step()
    after = made.cosines().detach().abs()
    assert after.mean() < 0.3 * before.mean() and after.max() < before.max()


# What is refused


@pytest.mark.parametrize("slot", ["shared", "domain", "id"])
@pytest.mark.parametrize("layout", ["concat", "add", "domain", "words"])
def test_a_template_without_a_slot_is_refused_by_name(tower, slot, layout):
    text = HcpConfig().template.replace(f"{{{slot}}} ", "")
    with pytest.raises(ValueError, match=rf"hcp\.template has no slot \{{{slot}\}}"):
        context(tower, template=text, layout=layout)


def test_add_with_other_lengths_is_refused_and_equal_ones_are_not(tower):
    with pytest.raises(ValueError, match="layout add puts 3 tokens of a dataset onto 4 of a person"):
        context(tower, layout="add", n_domain=3)
    context(tower, layout="add", n_domain=2, n_id=2)
    context(tower, layout="concat", n_domain=3)


@pytest.mark.parametrize(
    "change",
    [
        {"n_shared": 20}, {"template": "A {shared} {domain} {id} {hat}"}, {"template": "A {id} {id} {shared} {domain}"},
        {"template": "{shared} {domain} {id} " + "red " * 40}, {"layout": "words", "shared_words": "red " * 40},
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_and_slots_that_nothing_fills_are_refused(tower, change):
    with pytest.raises(ValueError, match="template"):
        context(tower, **change)


def test_a_name_that_is_too_long_for_the_tower_is_refused(tower):
    with pytest.raises(ValueError, match="the text tower reads 32"):
        context(tower, layout="words", names=("market", "very " * 20))
