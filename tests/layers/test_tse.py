"""Token selection: which tokens are taken, and what is made of them."""

import pytest
import torch
from torch import Tensor, nn

from reidctl.layers.tse import TokenSelection


def head(**changes: int) -> TokenSelection:
    torch.manual_seed(0)
    made = TokenSelection(6, 8)
    nn.init.normal_(made.norm.running_mean)
    return made.eval()


def by_hand(head: TokenSelection, tokens: Tensor) -> Tensor:
    """The embedding of one item whose selected tokens are given, (K, D)."""
    z = tokens / tokens.norm(dim=1, keepdim=True)
    norm = head.norm
    hidden = (head.hidden(z) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    return (head.out(hidden.clamp(min=0)) + head.linear(z)).amax(dim=0)


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 7, 6), torch.rand(3, 7)


def test_the_most_attended_tokens_and_no_others_make_the_embedding(given) -> None:
    tokens, looks = given
    layer = head()
    found = layer(tokens, looks, 3)
    for row in range(3):
        torch.testing.assert_close(found[row], by_hand(layer, tokens[row, looks[row].argsort(descending=True)[:3]]))
    lowest = looks.argsort(dim=1)[:, :4]
    changed = tokens.scatter(1, lowest[..., None].expand(-1, -1, 6), 9.0)
    assert torch.equal(found, layer(changed, looks, 3))


def test_only_usable_tokens_are_taken_even_where_they_are_fewer_than_asked_for(given) -> None:
    tokens, looks = given
    usable = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1] * 7]).bool()
    layer = head()
    found = layer(tokens, looks, 3, usable)
    torch.testing.assert_close(found[0], by_hand(layer, tokens[0, :2]))
    torch.testing.assert_close(found[1], by_hand(layer, tokens[1, 6:]))
    torch.testing.assert_close(found[2], by_hand(layer, tokens[2, looks[2].argsort(descending=True)[:3]]))


def test_padding_never_enters_the_embedding_or_the_norm(given) -> None:
    """Texts of one batch, padded or not, give the same numbers and the same running statistics in training."""
    tokens, looks = given
    usable = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 4 + [0] * 3, [1, 1, 0, 0, 0, 0, 0]]).bool()
    long, short = head().train(), head().train()
    noise = torch.where(usable[..., None], tokens, torch.randn(3, 7, 6) * 50)
    one, two = long(noise, looks, 5, usable), short(tokens[:, :4], looks[:, :4], 5, usable[:, :4])
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(long.norm.running_mean, short.norm.running_mean)
    torch.testing.assert_close(long.norm.running_var, short.norm.running_var)


def test_a_token_alone_gives_what_each_says_of_it(given) -> None:
    tokens, looks = given
    layer = head()
    alone = torch.stack([layer(tokens[:, [place]], looks[:, [place]], 1) for place in range(7)], dim=1)
    torch.testing.assert_close(layer.each(tokens), alone)


def test_length_of_tokens_does_not_matter_and_a_token_of_zeros_has_a_finite_gradient(given) -> None:
    tokens, looks = given
    layer = head()
    torch.testing.assert_close(layer(tokens * 7, looks, 3), layer(tokens, looks, 3), atol=1e-5, rtol=1e-5)
    zeros = torch.zeros(2, 4, 6, requires_grad=True)
    layer(zeros, torch.rand(2, 4), 2).sum().backward()
    assert zeros.grad is not None and torch.isfinite(zeros.grad).all()


def test_attention_says_which_tokens_are_taken_and_gets_no_gradient(given) -> None:
    tokens, looks = given
    looks.requires_grad_(), tokens.requires_grad_()
    head()(tokens, looks, 3).sum().backward()
    assert looks.grad is None
    reached = tokens.grad.abs().sum(dim=2) > 0
    assert (reached.sum(dim=1) <= 3).all() and reached.any(dim=1).all()
    assert (looks[reached] >= looks.topk(3, dim=1).values.amin(dim=1, keepdim=True).expand(-1, 7)[reached]).all()
