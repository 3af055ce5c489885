"""Bdam in parts: halves of a batch that are encoded apart give the losses and gradients of the whole."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import write_dataset
from methods.test_bdam import PAIRS, bdam
from methods.test_method_contract import training_batch

from reidctl import tables
from reidctl.batch import Tokens
from reidctl.layers.gradients import local_gradients
from reidctl.layers.matching import matching_pairs
from reidctl.parts import join


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("parts") / "blocks", people=6)


HALVED = {
    "default": {},
    "own_text": {"protocol": "own_text"},
    "visual": {"protocol": "visual", "clothing_loss": ("adv",)},
    "pairwise": {"protocol": "pairwise"},
    "pairwise of vectors": {"protocol": "pairwise", "fusion": {"sequence": "vector"}},
    "pairwise, transformer": {"protocol": "pairwise", "fusion": {"kind": "transformer", "layers": 1}},
    "balance": {"gate_regulariser": "balance", "clothing_loss": ("aln", "adv", "grl")},
    "entropy": {"gate_regulariser": "entropy", "mask_duplicates": False},
    "sigmoid": {"clothing_loss": ("adv",), "p_pos": "sigmoid"},
    "critic alone": {"clothing_loss": ("grl",), "weights": {"decouple": 0.0, "triplet": 0.0}},
    "printed": {
        "triplet": {"normalize": False, "margin": 500.0},
        "hsic": {"normalize": "none"},
        "info_nce": {"direction": "v2t"},
    },
    "baseline": {"decouple": False, "text_pool": "end"},
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Every second image, counted over people, has longer texts."""
    folder = write_dataset(tmp_path_factory.mktemp("uneven") / "blocks", people=6)
    for name in ("captions", "described"):
        frame = tables.read_table(folder / f"{name}.parquet", "captions")
        person, number = frame["image_id"].str.extract(r"p(\d+)-(\d+)").astype(int).to_numpy().T
        frame["text"] += np.where((3 * person + number) % 2, " Seen from behind in bright light.", "")
        tables.write_table(folder / f"{name}.parquet", "captions", frame)
    return folder


def halved(method, folder):
    """A batch and its halves, of the same people: short texts in one, long ones in the other."""
    batch = training_batch(method, folder, [*range(0, 18, 2), *range(1, 18, 2)])
    halves = [batch.take(rows) for rows in (range(9), range(9, 18))]
    for role in ("full", "clothing"):
        short, long = (half.texts[role].ids.shape[1] for half in halves)
        assert short < long
    assert all(half.has_fusion.any() for half in halves)
    assert len({frozenset(half.person.tolist()) for half in halves}) == 1
    return batch, halves


def gradients(method, parts):
    """Losses, and the gradient of each at every parameter that it reaches."""
    torch.manual_seed(0)  # wrong pairs are drawn
    found = method.losses_of(parts, "finetune")
    names = [name for name, _ in method.named_parameters()]
    each = local_gradients(found, list(method.parameters()))
    return found, {
        (loss, name): grad
        for loss, grads in each.items()
        for name, grad in zip(names, grads, strict=True)
        if grad is not None
    }


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], 1e-9, 1e-12) for name in one)


def exact(method, batch):
    """What the losses read, in double precision, in which the order of sums is no difference."""
    return method.double().encode(dataclasses.replace(batch, image=batch.image.double()), "finetune")


@pytest.mark.parametrize("name", HALVED)
def test_halves_encoded_apart_give_the_losses_and_gradients_of_the_whole(name, uneven):
    method = bdam(**{"triplet": {"margin": 2.0}, **HALVED[name]})  # so that the triplet loss has a gradient
    batch, halves = halved(method, uneven)
    whole, apart = (gradients(method, join([exact(method, part) for part in parts])) for parts in ([batch], halves))
    assert set(whole[0]) == set(method.current_weights()) == {loss for loss, _ in whole[1]}
    assert all(value.item() > 0 for value in whole[0].values())
    assert close(apart[0], whole[0]) and close(apart[1], whole[1])


def test_a_part_without_any_fused_feature_joins_the_others(folder):
    method = bdam(protocol="pairwise", gate_regulariser="balance")
    batch = training_batch(method, folder, range(18))
    usable = batch.has_fusion
    order = usable.nonzero().flatten().tolist() + (~usable).nonzero().flatten().tolist()
    batch, split = batch.take(order), int(usable.sum())
    assert 0 < split < len(order)
    parts = [exact(method, batch.take(rows)) for rows in (range(split), range(split, len(order)))]
    assert [len(part["usable"]) for part in parts] == [split, 0]
    whole, apart = (gradients(method, p) for p in (exact(method, batch), join(parts)))
    assert close(apart[0], whole[0]) and close(apart[1], whole[1])


@pytest.mark.covers(143)
def test_identical_texts_are_found_across_parts_that_are_padded_to_other_lengths(uneven, monkeypatch):
    seen = []
    monkeypatch.setattr("reidctl.methods.bdam.matching_pairs", lambda s, wrong, t: seen.append(wrong) or PAIRS)
    method = bdam(protocol="pairwise")
    batch, _ = halved(method, uneven)
    # A text of the short half also belongs to somebody else in the long half.
    alike = next(row for row in range(9, 18) if batch.person[row] != batch.person[0])
    rows = torch.arange(18)
    rows[alike] = 0
    full = batch.texts["full"][rows]
    full = Tokens(full.ids.masked_fill(~full.mask, 9), full.mask)  # what stands in the padding is no word
    batch = dataclasses.replace(batch, texts={**batch.texts, "full": full})
    halves = [batch.take(rows) for rows in (range(9), range(9, 18))]
    assert halves[0].texts["full"].ids.shape[1] < halves[1].texts["full"].ids.shape[1]
    method.losses(batch, "finetune")
    method.losses_of(join([method.encode(half, "finetune") for half in halves]), "finetune")
    assert not seen[0][0, alike] and seen[0][1:9, 9:].any() and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("count", [2, 33])
def test_wrong_pairs_are_those_that_multinomial_draws(count):
    """Trained models must stay what they were; multinomial itself asks the device whether its shares are sound."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(count, count, generator=generator)
    wrong = ~torch.eye(count, dtype=torch.bool)
    wrong[0] = wrong[:, 0] = False  # nobody is wrong for the first
    torch.manual_seed(0)
    image, text, label = matching_pairs(similarity, wrong, 0.5)
    torch.manual_seed(0)
    if count == 2:
        assert image.tolist() == text.tolist() == [0, 1]
        return
    shares = (
        (scores / 0.5).masked_fill(~wrong, -torch.inf)[1:].softmax(dim=1) for scores in (similarity, similarity.T)
    )
    texts, images = (torch.multinomial(each, 1).flatten() for each in shares)
    rows = torch.arange(1, count)
    assert torch.equal(text[count:], torch.cat([texts, rows])) and torch.equal(image[count:], torch.cat([rows, images]))
    assert label.tolist() == [1.0] * count + [0.0] * (2 * count - 2)
