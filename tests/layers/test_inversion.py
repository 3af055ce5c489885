import math

import pytest
import torch

from reidctl.layers.inversion import Inversion, diversity, mismatch

READOUTS = ["queries", "linear", "first", "pool"]


def network(readout="queries", seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"count": 3, "width": 16, "layers": 4, "heads": 2, "readout": readout, "scale": 0.05, **changes}
    return Inversion(settings.pop("inputs", 16), 8, **settings).eval()


def features(count=5, tokens=7, width=16, seed=1):
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed))


def lengths(*real, tokens=7):
    return torch.arange(tokens)[None] < torch.tensor(real)[:, None]


@pytest.mark.covers(67)
@pytest.mark.parametrize("readout", READOUTS)
def test_every_input_gets_m_pseudo_words_of_its_own(readout):
    found = network(readout)(features())
    assert found.shape == (5, 3, 8)
    assert torch.pdist(found.flatten(1)).min() > 1e-4
    assert torch.pdist(found[0]).min() > 1e-4  # and the words of one prompt differ
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(network(readout)(features()[order]), found[order])


@pytest.mark.covers(68)
def test_layers_counts_blocks_and_no_two_start_alike():
    sizes = [sum(p.numel() for p in network(layers=layers).parameters()) for layers in (1, 2, 4)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0
    blocks = network(layers=4).blocks.layers
    assert len(blocks) == 4
    weights = torch.stack([block.linear1.weight.flatten() for block in blocks])
    assert torch.pdist(weights).min() > 0.1


@pytest.mark.covers(68)
@pytest.mark.parametrize("readout", READOUTS)
def test_the_gradient_reaches_every_parameter_of_every_layer(readout):
    module = network(readout)
    module(features()).square().sum().backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@pytest.mark.covers(68)
def test_a_block_is_a_pre_norm_vit_block_that_sees_in_both_directions():
    """The whole network once more, from its weights, in plain arithmetic."""
    module, seen = network(layers=2), features(2, 4)

    def norm(x, layer):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    with torch.no_grad():
        x = torch.cat([norm(seen, module.norm_in), module.queries.expand(2, -1, -1)], dim=1)
        for block in module.blocks.layers:
            attention, inner = block.self_attn, norm(x, block.norm1)
            joined = inner @ attention.in_proj_weight.T + attention.in_proj_bias
            heads = []
            for head in range(2):
                query, key, value = (part[..., 8 * head : 8 * head + 8] for part in joined.split(16, dim=-1))
                weights = (query @ key.transpose(1, 2) / math.sqrt(8)).exp()
                heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value)
            x = x + torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias
            inner = norm(x, block.norm2) @ block.linear1.weight.T + block.linear1.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # GELU
            x = x + inner @ block.linear2.weight.T + block.linear2.bias
        expected = norm(x, module.blocks.norm)[:, 4:] @ module.leave.weight.T + module.leave.bias
        torch.testing.assert_close(module(seen), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.covers(69)
@pytest.mark.parametrize("readout", READOUTS)
def test_what_stands_in_the_padding_and_how_long_it_is_change_nothing(readout):
    module, mask = network(readout), lengths(3, 5, 7, 4, 6)
    ends = mask.sum(dim=1) - 1
    before = module(features(), mask, ends)
    changed = torch.where(mask[..., None], features(), 100 * features(seed=9))
    torch.testing.assert_close(module(changed, mask, ends), before, atol=1e-6, rtol=1e-5)
    longer = torch.cat([features(), torch.full((5, 4, 16), 7.0)], dim=1)
    wider = torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(module(longer, wider, ends), before, atol=1e-6, rtol=1e-5)
    # Without a mask the padding would have been read.
    assert not torch.allclose(module(changed)[:2], before[:2], atol=1e-3)
    token = features().requires_grad_()
    (gradient,) = torch.autograd.grad(module(token, mask, ends).square().sum(), token)
    assert not gradient[~mask].any() and (gradient[mask].abs().amax(dim=1) > 0).all()


@pytest.mark.covers(69)
@pytest.mark.parametrize("readout", READOUTS)
def test_without_gradients_the_output_is_the_same(readout):
    """PyTorch takes another path through its Transformer then."""
    module, mask = network(readout), lengths(3, 5, 7, 4, 6)
    expected = module(features(), mask).detach()
    with torch.no_grad():
        torch.testing.assert_close(module(features(), mask), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module(features()), module.train()(features()), atol=1e-5, rtol=1e-4)


@pytest.mark.covers(69)
def test_a_text_shorter_than_m_does_not_read_its_padding_either():
    module, mask = network("first"), lengths(2, 5, 7, 4, 6)
    changed = torch.where(mask[..., None], features(), 100 * features(seed=9))
    torch.testing.assert_close(module(changed, mask), module(features(), mask))


def test_the_linear_readout_reads_the_summary_token_and_the_first_by_default():
    module, tokens = network("linear"), features()
    last = torch.full((5,), 6)
    assert torch.equal(module(tokens), module(tokens, summary=torch.zeros(5, dtype=torch.long)))
    assert not torch.allclose(module(tokens, summary=last), module(tokens))
    # Tokens carry no positions of their own here: the last one moved to the front is the first.
    moved = tokens[:, [6, 1, 2, 3, 4, 5, 0]]
    torch.testing.assert_close(module(tokens, summary=last), module(moved))


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_pseudo_words_start_as_long_as_words(readout, scale):
    found = network(readout, scale=scale, width=64, heads=4, count=8)(features(64, tokens=20))
    size = float(found.detach().square().mean().sqrt())
    # An average of outputs is shorter than one of them.
    assert (0.6 if readout == "pool" else 0.75) * scale < size < 1.25 * scale


def test_token_features_of_another_width_enter_by_a_map():
    module = network(inputs=24)
    assert module(features(width=24)).shape == (5, 3, 8)
    assert sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in network().parameters()) == 24 * 16 + 16


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="width 16 cannot have 3 heads"):
        network(heads=3)


def test_the_first_outputs_of_too_few_tokens_repeat_the_last_one():
    found = network("first")(features(tokens=2))
    assert torch.equal(found[:, 1], found[:, 2]) and not torch.equal(found[:, 0], found[:, 1])


def test_diversity_is_zero_for_equal_prompts_one_for_opposite_ones_and_the_printed_ratio_between():
    same = torch.ones(4, 1, 2)
    assert diversity(same) == 0.0 and diversity(torch.zeros(4, 1, 2)) == 0.0
    assert diversity(torch.stack([same[0], -same[0]])) == pytest.approx(1.0)
    # (3, 0) and (1, 0): the mean is (2, 0), both are 1 away; their squares are 9 and 1, 5 in the mean.
    assert diversity(torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]])) == pytest.approx(math.sqrt(1 / 5))


def test_mismatch_is_zero_for_equal_prompts_and_a_distance_over_a_length():
    prompts = features(4, 2, 3)
    assert mismatch(prompts, prompts.clone()) == 0.0
    # One pair: distance^2 = 9 + 16 = 25; mean of the squared lengths = (9 + 16) / 2.
    assert mismatch(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])) == pytest.approx(math.sqrt(2))
