"""`interpart`: what each loss and setting does, what the constraint does to attention, and scores by parts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import CPU, training_batch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from reidctl import losses, part_losses
from reidctl.backbones.weights import build
from reidctl.batch import Batch, PhraseSets, Tokens
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import UsageError
from reidctl.evaluation.pairwise import Pairwise, evaluate_pairwise, score_pairs
from reidctl.evaluation.protocols import Protocol, Side, rank
from reidctl.methods.base import build_method, load_method, save_method
from reidctl.methods.interpart import InterpartConfig, to_patches
from reidctl.part_losses import spread
from reidctl.phrases.base import Phrase
from reidctl.pixels import PixelStore, normalise

EVERY = {"sdm", "id", "ppim", "compact", "align", "diverse"}
ONE_WAY = {"sdm": 0.0, "id": 0.0, "ppim": 0.0}
SPAN = {"phrase_encode": "span"}


def make(**changes):
    torch.manual_seed(0)
    return build_method("interpart", changes, build("clip:micro"), 12).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("interpart") / "blocks", people=12)


@pytest.fixture(scope="module")
def corpus(folder):
    return corpus_of(folder)


def batch_of(method, folder, rows=range(0, 24, 2)):
    """Twelve images of eight people; from the seventh on, trousers have another colour than the shirt."""
    return training_batch(method, folder, rows)


@pytest.fixture(scope="module")
def batch(folder):
    return batch_of(make(), folder)


def grads(value: Tensor, module) -> dict[str, Tensor]:
    """Gradients by name; what a loss does not reach is left out."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None and grad.abs().max() > 1e-9}


def steps(method, batch, count, *, lr=1e-3, seed=0):
    """Train on one batch; returns the losses before every step."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(method.train().parameters(), lr=lr)
    history = []
    for _ in range(count):
        found = method.losses(batch, "finetune")
        history.append({name: float(value.detach()) for name, value in found.items()})
        optimizer.zero_grad()
        method.objective(found).backward()
        optimizer.step()
    method.eval()
    return history


def test_the_tests_batch_has_captions_of_two_phrases_about_different_parts(batch):
    sets = batch.phrases
    assert sets.index.shape == (12, 2) and sets.mask.all()
    assert (sets.part[:, 0] != sets.part[:, 1]).all()
    assert len(sets.tokens) < 24, "shirts and trousers of one colour are shared"
    assert len(set(batch.person.tolist())) == 8


# Losses and settings


@pytest.mark.covers(170)
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, EVERY),
        ({"base_loss": "tal"}, EVERY - {"sdm"} | {"tal"}),
        ({"attn_constraint": "none"}, {"sdm", "id", "ppim"}),
        ({"attn_constraint": "bias"}, {"sdm", "id", "ppim"}),
        ({"attn_constraint": "selfself"}, {"sdm", "id", "ppim"}),
        ({"weights": {"ground": 0.5}}, EVERY | {"ground"}),
        ({"weights": {"ppim": 0.0, "align": 0.0}}, EVERY - {"ppim", "align"}),
        ({"weights": {"ppim": 0.0}, "attn_constraint": "none"}, {"sdm", "id"}),
    ],
)
def test_settings_decide_which_losses_there_are_and_all_of_them_are_finite_and_teach_something(changes, names, batch):
    method = make(**changes).train()
    found = method.losses(batch, "finetune")
    assert set(found) == names == set(method.current_weights())
    for name, value in found.items():
        assert value.isfinite() and value.shape == (), name
        assert grads(value, method), name


@pytest.mark.covers(170)
def test_base_losses_are_those_of_the_global_features(batch):
    method = make(base_loss="tal", tal={"temperature": 0.1, "margin": 0.3})
    found = method.losses(batch, "finetune")
    with torch.no_grad():
        v = method.backbone.encode_image(batch.image).cls[:, 0]
        t = method.backbone.encode_text(batch.texts["full"]).pooled
        assert torch.allclose(found["tal"], losses.tal(v, t, batch.person, temperature=0.1, margin=0.3), atol=1e-6)
        plain = make(temperature=0.05).losses(batch, "finetune")
        assert torch.allclose(plain["sdm"], losses.sdm(v, t, batch.person, temperature=0.05), atol=1e-6)
        logits = [functional.linear(each, method.classifier.weight, method.classifier.bias) for each in (v, t)]
        expected = sum(functional.cross_entropy(each, batch.person) for each in logits) / 2
        assert torch.allclose(found["id"], expected, atol=1e-6)


@pytest.mark.covers(170)
def test_tal_equals_its_formula_term_by_term(batch):
    """Per direction max(0, m - sum_pos alpha s + tau log sum_neg exp(s / tau)), alpha the softmax of the positives."""
    tau, margin = 0.1, 0.3
    method = make(base_loss="tal", tal={"temperature": tau, "margin": margin})
    with torch.no_grad():
        found = float(method.losses(batch, "finetune")["tal"])
        cosine = (method.embed_images(batch) @ method.embed_texts(batch).T).tolist()
    person, count = batch.person.tolist(), len(batch)
    total = 0.0
    for one in range(count):
        for row in (cosine[one], [cosine[other][one] for other in range(count)]):
            right = [s for s, p in zip(row, person, strict=True) if p == person[one]]
            wrong = [s for s, p in zip(row, person, strict=True) if p != person[one]]
            mass = sum(math.exp(s / tau) for s in right)
            positive = sum(s * math.exp(s / tau) / mass for s in right)
            total += max(0.0, margin - positive + tau * math.log(sum(math.exp(s / tau) for s in wrong)))
    assert found == pytest.approx(total / count, rel=1e-4)


@pytest.mark.covers(176)
def test_the_set_contrast_is_that_of_every_caption_with_every_image_pair_by_pair(batch):
    method, sets = make(), batch.phrases
    with torch.no_grad():
        found = method.losses(batch, "finetune")["ppim"]
        words = method.backbone.encode_text(sets.tokens).pooled
        patches = method.backbone.encode_image(batch.image).patches
        one = torch.ones(1, 2, dtype=torch.bool)
        scores = torch.stack(
            [
                torch.stack([method.ppim(words[row][None], one, image[None]).scores.mean() for image in patches])
                for row in sets.index
            ]
        )
    assert torch.allclose(found, part_losses.set_contrast(scores, batch.person, temperature=0.05), atol=1e-5)


@pytest.mark.covers(176)
def test_the_phrase_contrast_asks_which_image_shows_a_phrase(batch):
    method, sets = make(ppim={"contrast": "phrase_masked", "similar": 0.95}), batch.phrases
    with torch.no_grad():
        found = method.losses(batch, "finetune")["ppim"]
        words = method.backbone.encode_text(sets.tokens).pooled
        scores = method.ppim.phrase_scores(words, method.backbone.encode_image(batch.image).patches)
        expected = part_losses.phrase_contrast(scores, sets.index, batch.person, words, temperature=0.05, similar=0.95)
        other = part_losses.phrase_contrast(scores, sets.index, batch.person, words, temperature=0.05, similar=1.0)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(expected, other)


@pytest.mark.covers(170)
@pytest.mark.parametrize(
    "changes", [{}, {"base_loss": "tal"}, {"ppim": {"kind": "slots"}}, {"attn_constraint": "bias"}, SPAN]
)
def test_some_steps_on_one_batch_lower_every_loss_that_has_not_won_already(changes, folder):
    method = make(**changes)
    history = steps(method, batch_of(method, folder), 25)
    total = [sum(method.weight(name) * value for name, value in step.items()) for step in history]
    assert total[-1] < 0.8 * total[0]
    assert all(math.isfinite(value) for value in total)
    base = "tal" if "base_loss" in changes else "sdm"
    assert history[-1][base] < history[0][base] and history[-1]["ppim"] < history[0]["ppim"]


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValidationError, match="slots score whole captions"):
        InterpartConfig(ppim={"kind": "slots", "contrast": "phrase_masked"})
    for template in ("a person", "{} and {}"):
        with pytest.raises(ValidationError, match=r"needs \{\} where the phrase stands, once"):
            InterpartConfig(phrase_template=template)
    assert make(phrase_template="wearing {}").phrase_sentence("a {}") == "wearing a {}"
    method = make()
    texts = {"full": method.backbone.tokenize(["a", "b"])}
    with pytest.raises(ValueError, match="carries no phrases"):
        method.losses(Batch(image=torch.zeros(2, 3, 64, 32), person=torch.arange(2), texts=texts), "finetune")


def without_phrases(batch: Batch) -> Batch:
    none = torch.full_like(batch.phrases.index, -1)
    nothing = Tokens(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.bool))
    return replace(batch, phrases=PhraseSets(nothing, none, none, batch.phrases.span * 0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"ppim": {"kind": "slots"}}, {"ppim": {"contrast": "phrase_masked"}}, {"weights": {"ground": 1.0}}, SPAN],
)
def test_a_batch_without_any_phrase_is_learnt_from_without_nan(changes, folder):
    method = make(**changes).train()
    found = method.losses(without_phrases(batch_of(method, folder)), "finetune")
    method.objective(found).backward()
    assert all(value.isfinite() for value in found.values())
    assert found["compact"] == found["align"] == found["diverse"] == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in method.parameters())


# What reads what


@pytest.mark.covers(178)
def test_alignment_moves_the_attention_and_not_the_maps_unless_they_may_be_moved(batch):
    for stop in (True, False):
        method = make(align_stop=stop)
        found = grads(method.losses(batch, "finetune")["align"], method)
        assert "backbone.image.visual.transformer.resblocks.1.attn.in_proj_weight" in found
        assert ("ppim.query.weight" in found) is not stop
        assert any(name.startswith("backbone.text.") for name in found) is not stop
        assert "backbone.image.visual.transformer.resblocks.1.mlp.c_proj.weight" not in found or not stop


@pytest.mark.covers(178)
def test_the_attention_that_is_aligned_is_the_class_token_s_last_to_the_patches(batch):
    method = make()
    with torch.no_grad():
        seen = method.backbone.encode_image(batch.image, attention=True)
        rows = torch.stack([row[1:] / row[1:].sum() for row in seen.attention[-1].mean(dim=1)[:, 0]])
        torch.testing.assert_close(to_patches(seen.attention[-1]), rows)
        maps = method.phrase_maps(batch)
        expected = part_losses.alignment(maps, batch.phrases.mask, rows).mean()
        found = method.losses(batch, "finetune")
    assert torch.allclose(found["align"], expected, atol=1e-5)
    assert torch.allclose(found["compact"], part_losses.compactness(spread(maps, (4, 2))).mean(), atol=1e-5)
    one, other = functional.normalize(maps, dim=-1).unbind(dim=1)  # each caption has two phrases about two parts
    assert torch.allclose(found["diverse"], (one * other).sum(dim=1).mean(), atol=1e-5)
    report = method.training_report()
    assert report["cls/spread"] == pytest.approx(float(spread(rows, (4, 2)).mean()), rel=1e-4)
    assert report["ppim/spread"] == pytest.approx(float(spread(maps, (4, 2)).mean()), rel=1e-4)


def cls_spread(method, batch) -> float:
    with torch.no_grad():
        return float(spread(to_patches(method.see(batch.image, attention=True).attention[-1]), (4, 2)).mean())


@pytest.mark.covers(178)
def test_the_class_token_s_attention_becomes_compact_where_it_is_constrained(batch):
    """Only the compactness and the alignment term train; without the second the attention has no reason to follow."""
    method = make(weights={**ONE_WAY, "diverse": 0.0, "compact": 1.0, "align": 1.0})
    before = cls_spread(method, batch)
    history = steps(method, batch, 40)
    assert cls_spread(method, batch) < 0.7 * before
    assert history[-1]["align"] < 0.5 * history[0]["align"] and history[-1]["compact"] < 0.7 * history[0]["compact"]
    alone = make(weights={**ONE_WAY, "diverse": 0.0, "compact": 1.0, "align": 0.0})
    steps(alone, batch, 40)
    assert cls_spread(alone, batch) > 0.5 * before
    loose = make(attn_constraint="none")
    assert cls_spread(loose, batch) == before
    for name in ("compact", "align", "diverse"):
        assert not loose.active(name)


@pytest.mark.covers(178)
def test_without_a_constraint_the_tower_is_the_backbone_and_with_one_patches_look_near_or_alike(batch):
    plain = make(attn_constraint="none")
    seen = plain.see(batch.image, attention=True)
    torch.testing.assert_close(seen.cls, plain.backbone.encode_image(batch.image).cls)
    by_loss = make().see(batch.image, attention=True)
    assert torch.equal(by_loss.cls, seen.cls), "the terms change what is learnt, not what is computed"
    near = make(attn_constraint="bias", bias={"sigma": 0.2, "blocks": 1}).see(batch.image, attention=True)
    place = part_losses.places((4, 2), seen.cls)
    far = (place[:, None] - place).abs()[..., 0] > 0.4  # two rows of four, or more
    patches = lambda features: features.attention[-1].mean(dim=1)[:, 1:, 1:]  # noqa: E731
    assert (patches(near)[:, far] < patches(seen)[:, far]).all()
    assert patches(near)[:, far].mean() < 0.2 * patches(seen)[:, far].mean()
    torch.testing.assert_close(near.attention[-1][:, :, 0], seen.attention[-1][:, :, 0])
    wide = make(attn_constraint="bias", bias={"sigma": 1e4}).see(batch.image)
    torch.testing.assert_close(wide.patches, seen.patches)
    for alike in ("key", "value"):
        self = make(attn_constraint="selfself", alike=alike).see(batch.image)
        torch.testing.assert_close(self.cls, seen.cls)
        assert not torch.allclose(self.patches, seen.patches, atol=1e-4)
    assert not torch.allclose(near.patches, seen.patches, atol=1e-4)


@pytest.mark.covers(178)
@pytest.mark.parametrize("changes", [{"attn_constraint": "bias"}, {"attn_constraint": "selfself", "alike": "value"}])
def test_what_is_trained_with_a_changed_attention_is_embedded_and_explained_with_it(changes, batch):
    method, plain = make(**changes), make()
    with torch.no_grad():
        seen = method.see(batch.image)
        assert torch.equal(method.embed_images(batch), functional.normalize(seen.cls[:, 0], dim=1))
        assert torch.equal(method.patch_features(batch), functional.normalize(seen.patches, dim=-1))
        assert torch.equal(method.encode_pair_images(batch).tokens, seen.patches)
        assert not torch.allclose(method.patch_similarity(batch), plain.patch_similarity(batch), atol=1e-4)
        assert not torch.allclose(method.phrase_maps(batch), plain.phrase_maps(batch), atol=1e-4)


@pytest.mark.covers(178)
@pytest.mark.parametrize("changes", [{"attn_constraint": "bias"}, {"attn_constraint": "selfself"}])
def test_the_activation_of_patches_is_that_of_the_tower_that_was_trained(changes, batch):
    method = make(**changes)
    with torch.no_grad():
        seen = method.see(batch.image)
        cosine = functional.cosine_similarity(seen.patches, seen.cls, dim=-1).clamp_min(0)
        torch.testing.assert_close(method.activation(batch).flatten(1), cosine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"attn_constraint": "bias"}, {"attn_constraint": "selfself"}, {"ppim": {"kind": "slots"}}, SPAN]
)
def test_losses_in_half_precision_and_with_blocks_computed_twice_are_the_same_losses(changes, batch, folder):
    method = make(**{**changes, "weights": {"ground": 1.0}}).train()
    given = batch_of(method, folder)

    def losses_of() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return method.losses(given, "finetune")

    plain = losses_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses_of()
    method.backbone.set_grad_checkpointing()
    again = losses_of()
    assert set(half) == set(plain) == set(again)
    for name, value in plain.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.1), name
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-4, msg=name)
    method.objective(half).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in method.parameters())
    method.zero_grad()
    method.objective(again).backward()
    assert method.backbone.image.blocks[0].attn.in_proj_weight.grad.abs().max() > 0


@pytest.mark.covers(170)
@pytest.mark.parametrize("changes", [{}, {"attn_constraint": "selfself"}, SPAN])
def test_the_method_stands_on_any_backbone(changes, folder):
    torch.manual_seed(0)
    method = build_method("interpart", changes, build("vit-bert:micro"), 12)
    given = batch_of(method, folder)
    history = steps(method, given, 15)
    assert history[-1]["sdm"] < history[0]["sdm"] and history[-1]["ppim"] < history[0]["ppim"]
    with torch.no_grad():
        assert method.phrase_maps(given).shape == (12, 2, 8)


def overlap_of(method, batch) -> float:
    with torch.no_grad():
        return float(part_losses.overlap(method.phrase_maps(batch), batch.phrases.located().apart).mean())


@pytest.mark.covers(179)
def test_maps_of_different_parts_fall_on_one_place_without_the_diversity_term_and_apart_with_it(batch):
    """Compactness alone is content with one place for all phrases; no loss of retrieval works against it here."""
    after = {}
    for weight in (0.0, 1.0):
        method = make(weights={**ONE_WAY, "align": 0.0, "compact": 1.0, "diverse": weight})
        before = overlap_of(method, batch)
        steps(method, batch, 40)
        after[weight] = overlap_of(method, batch)
    assert after[0.0] > before > after[1.0], (before, after)
    assert after[1.0] < 0.5 * after[0.0]


@pytest.mark.covers(196)
def test_the_grounding_term_is_off_unless_asked_for_and_then_reaches_the_tower(batch):
    assert not make().active("ground") and "ground" not in make().losses(batch, "finetune")
    method = make(weights={"ground": 1.0}, ground_margin=5.0)
    torch.manual_seed(0)
    loss = method.losses(batch, "finetune")["ground"]
    assert 3 < loss.item() < 7  # margin + a difference of two cosines
    found = grads(loss, method)
    assert any(name.startswith("backbone.image.") for name in found)
    assert not any(name.startswith(("ppim.", "classifier.")) for name in found), (
        "which patches go is not differentiable"
    )
    content = make(weights={"ground": 1.0}, ground_margin=-5.0)
    assert grads(content.losses(batch, "finetune")["ground"], content) == {}


@pytest.mark.covers(196)
def test_the_grounding_term_removes_the_highest_patches_of_a_phrase_and_as_many_random_ones(batch, monkeypatch):
    method = make(weights={"ground": 1.0}, ground_share=0.26)
    removed = []
    plain = method.see

    def watched(images, keep=None, **options):
        if keep is not None:
            removed.append(~keep)
        return plain(images, keep, **options)

    monkeypatch.setattr(method, "see", watched)
    method.losses(batch, "finetune")
    named, drawn = removed
    assert (named.sum(dim=1) == 2).all() and (drawn.sum(dim=1) == 2).all()  # 0.26 of 8 patches
    with torch.no_grad():
        tops = method.phrase_maps(batch).topk(2, dim=-1).indices.sort(dim=-1).values.tolist()
    for image, gone in enumerate(named):
        assert gone.nonzero().flatten().tolist() in tops[image]
    assert not torch.equal(named, drawn)


# Phrases


def test_phrases_are_encoded_alone_in_their_template_and_shared_ones_once(batch):
    method = make(phrase_template="look, {} !")
    table = method.phrase_table(["A person wears a red shirt.", "Red shirt and blue trousers."])
    sets = table.sets(["A person wears a red shirt.", "Red shirt and blue trousers."])
    with torch.no_grad():
        vectors, index = method.encode_phrases(sets)
        alone = method.backbone.encode_text(method.backbone.tokenize(["look, red shirt !"])).pooled[0]
    assert torch.equal(index, sets.index) and len(vectors) == 2
    torch.testing.assert_close(vectors[index[0, 0]], alone)
    assert index[0, 0] == index[1, 0]


def test_a_span_is_the_average_of_its_tokens_features_in_the_caption(folder):
    method = make(**SPAN)
    assert method.reads_phrase_places and not make().reads_phrase_places
    captions = ["A person wears a red shirt and blue trousers.", "Blue trousers, and the red shirt of somebody."]
    tokens, sets = method.backbone.tokenize(captions), method.phrases_of(captions)
    with torch.no_grad():
        words = method.backbone.encode_text(tokens)
        vectors, index = method.encode_phrases(sets, words)
        for row, caption in enumerate(captions):
            offsets = method.backbone.tokenize_offsets(caption)
            for place, text in enumerate(
                ("red shirt", "blue trousers") if row == 0 else ("Blue trousers", "red shirt")
            ):
                start = caption.index(text)
                end = start + len(text)
                own = [n for n, (low, high) in enumerate(offsets) if start <= low < high <= end]
                assert len(own) >= 2
                expected = words.tokens[row, own].mean(dim=0)
                torch.testing.assert_close(vectors[index[row, place]], expected)
    first, second = vectors[index[0, 0]], vectors[index[1, 1]]
    assert not torch.allclose(first, second, atol=1e-3), "the rest of the caption is mixed in"


def test_a_phrase_whose_place_is_not_known_is_encoded_alone():
    method, captions = make(**SPAN), ["A person wears a red shirt.", "A person."]
    method.phrase_source = lambda texts: [[Phrase("red shirt", 17, 26, "upper"), Phrase("green hat", 0, 0, "head")], []]
    sets, tokens = method.phrases_of(captions), method.backbone.tokenize(captions)
    with torch.no_grad():
        words = method.backbone.encode_text(tokens)
        vectors, index = method.encode_phrases(sets, words)
        alone = method.backbone.encode_text(method.backbone.tokenize(["a person with green hat"])).pooled[0]
        without, plain = method.encode_phrases(sets)
    torch.testing.assert_close(vectors[index[0, 1]], alone)
    torch.testing.assert_close(without[plain[0, 1]], alone)
    assert index[1].tolist()[1] == -1 and (index >= 0).tolist() == sets.mask.tolist()


@pytest.mark.covers(176)
@pytest.mark.parametrize("encode", ["separate", "span"])
def test_one_phrase_in_two_captions_is_right_for_both_images_however_it_is_encoded(encode):
    """Two people wear a red shirt, and nothing else is said: nothing is a wrong answer to anything."""
    method = make(ppim={"contrast": "phrase_masked", "similar": 1.0}, phrase_encode=encode)
    found = [contrast_of(method, ["A red shirt.", shirt]) for shirt in ("Somebody has a red shirt.", "A blue shirt.")]
    assert found[0] == pytest.approx(0, abs=1e-6) and found[1] > 0.01


def contrast_of(method, captions, padding=0) -> float:
    """The phrase contrast of noise images of two people with these captions."""
    image = torch.randn(2, 3, *method.backbone.image_size, generator=torch.Generator().manual_seed(0))
    sets, texts = method.phrases_of(captions), {"full": method.backbone.tokenize(captions)}
    wider = PhraseSets(
        sets.tokens,
        functional.pad(sets.index, (0, padding), value=-1),
        functional.pad(sets.part, (0, padding), value=-1),
        functional.pad(sets.span, (0, 0, 0, padding)),
    )
    with torch.no_grad():
        given = Batch(image=image, person=torch.arange(2), texts=texts, phrases=wider)
        return float(method.losses(given, "finetune")["ppim"])


@pytest.mark.covers(176)
@pytest.mark.parametrize("encode", ["separate", "span"])
def test_places_without_a_phrase_are_no_wrong_answers_in_the_masked_contrast(encode):
    method = make(ppim={"contrast": "phrase_masked"}, phrase_encode=encode)
    captions = ["A red shirt, blue trousers and black shoes.", "A green coat."]
    found = [contrast_of(method, captions, padding) for padding in (0, 2)]
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] > 0.01


@pytest.mark.covers(173)
def test_a_user_s_phrase_gives_a_map_that_follows_its_words(batch):
    method = make()
    some = Batch(image=batch.image[:1].expand(2, -1, -1, -1), texts={"full": method.backbone.tokenize(["x", "y"])})
    method.phrase_source = lambda texts: [[Phrase(text, 0, len(text), "whole")] for text in texts]
    with torch.no_grad():
        maps = method.phrase_maps(replace(some, phrases=method.phrases_of(["turquoise serape", "green hat"])))
    assert maps.shape == (2, 1, 8)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 1))
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)


# The module


@pytest.mark.covers(175)
def test_the_module_is_light_and_its_cost_has_a_row_of_its_own(batch):
    method = make()
    assert sum(p.numel() for p in method.ppim.parameters()) == 3 * 32**2
    assert 3 * 512**2 < 1_000_000  # the same three matrices in a CLIP of 512
    parts = method.extra_parts(batch)
    assert list(parts) == ["ppim"] and parts["ppim"]().shape == (12, 8)


@pytest.mark.covers(174)
def test_before_training_maps_are_the_softmax_of_the_plain_cosines_of_clip(batch):
    method = make()
    with torch.no_grad():
        maps = method.phrase_maps(batch)
        words = method.backbone.encode_text(batch.phrases.tokens).pooled[batch.phrases.index]
        patches = method.backbone.encode_image(batch.image).patches
        cosine = functional.normalize(words, dim=-1) @ functional.normalize(patches, dim=-1).transpose(1, 2)
    torch.testing.assert_close(maps, (cosine / 0.05).softmax(dim=-1), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"ppim": {"kind": "slots"}}, {"ppim": {"kind": "sigmoid"}}, {"attn_constraint": "bias"}, SPAN]
)
def test_a_saved_model_sees_what_it_saw(changes, folder, tmp_path):
    method = make(**changes)
    batch = batch_of(method, folder)
    steps(method, batch, 2)
    save_method(method, tmp_path)
    back = load_method(tmp_path)
    assert back.config == method.config and back.reads_phrase_places == method.reads_phrase_places
    with torch.no_grad():
        assert torch.equal(back.embed_images(batch), method.embed_images(batch))
        assert torch.equal(back.phrase_maps(batch), method.phrase_maps(batch))


# Retrieval


def sides(method, folder, count=6):
    batch = batch_of(method, folder, range(0, 3 * count, 3))
    with torch.no_grad():
        return (
            method.encode_pair_images(Batch(image=batch.image)),
            method.encode_pair_texts(Batch(texts=batch.texts, phrases=batch.phrases)),
            batch,
        )


@pytest.mark.covers(177)
@pytest.mark.parametrize("kind", ["xattn", "slots", "max", "sigmoid"])
def test_the_score_of_a_pair_is_the_cosine_and_a_share_of_the_mean_phrase_score(kind, folder):
    method = make(beta=0.7, ppim={"kind": kind})
    images, texts, batch = sides(method, folder)
    left, right = torch.tensor([0, 5, 2, 2]), torch.tensor([1, 1, 0, 4])
    with torch.no_grad():
        found = method.pair_scores(images[left], texts[right])
        v, t = method.embed_images(batch), method.embed_texts(batch)
        patches = method.see(batch.image).patches
        words = method.backbone.encode_text(batch.phrases.tokens).pooled
        for place, (i, j) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
            own = words[batch.phrases.index[j]][None]
            s = method.ppim(own, torch.ones(own.shape[:2], dtype=torch.bool), patches[i : i + 1]).scores[0]
            expected = 20 * (float(v[i] @ t[j]) + 0.7 * float(s.mean()))
            assert found[place].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.covers(177)
def test_the_score_of_a_pair_does_not_know_the_other_pairs_nor_how_many_phrases_their_captions_have(folder):
    method = make(ppim={"kind": "slots"})
    images, _, _ = sides(method, folder)
    long = "A red shirt, blue trousers, black shoes, a white hat and a green bag."
    given = [long, "A red shirt."]
    texts = lambda some: Batch(texts={"full": method.backbone.tokenize(some)}, phrases=method.phrases_of(some))  # noqa: E731
    with torch.no_grad():
        both, alone = method.encode_pair_texts(texts(given)), method.encode_pair_texts(texts(given[1:]))
        pick = torch.tensor([3, 3])
        together = method.pair_scores(images[pick], both[torch.tensor([0, 1])])
        single = method.pair_scores(images[pick[:1]], alone)
    assert both.tokens.shape[1] == 5 and alone.tokens.shape[1] == 1
    torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-5)


@pytest.mark.covers(177)
def test_without_a_share_of_the_parts_the_order_is_that_of_the_cosine(folder):
    plain, parts = make(beta=0.0), make(beta=5.0)
    orders = []
    for method in (plain, parts):
        images, texts, _ = sides(method, folder)
        i, j = torch.arange(6).repeat(6), torch.arange(6).repeat_interleave(6)
        with torch.no_grad():
            orders.append(method.pair_scores(images[i], texts[j]).view(6, 6).argsort(dim=1))
        cosine = texts.pooled @ images.pooled.T
    assert torch.equal(orders[0], cosine.argsort(dim=1)) and not torch.equal(orders[1], orders[0])
    off = make(weights={"ppim": 0.0})
    assert not off.scores_pairs
    with pytest.raises(UsageError, match=r"no match head.*--method interpart"):
        off.encode_pair_images(Batch(image=torch.zeros(1, 3, 64, 32)))


def protocol_of(method, corpus) -> Protocol:
    people = corpus.images["person_id"].to_numpy()
    camera = corpus.images["camera_id"].to_numpy()
    row = corpus.captions["row"].to_numpy()
    query = embed_queries(method, list(corpus.captions["text"]), device=CPU)
    gallery = embed_gallery(method, corpus, device=CPU)
    names = corpus.images["image_id"].to_numpy()
    caption = corpus.captions["caption_id"].to_numpy()
    none = np.full(len(row), None, object)
    return Protocol(
        "t2i", "blocks", "train", "standard",
        Side(caption, names[row], people[row], camera[row], none, query),
        Side(names, names, people, camera, none, gallery), "none",
    )  # fmt: skip


@pytest.mark.covers(177)
def test_part_wise_matching_orders_the_first_k_and_leaves_the_rest(corpus):
    method = make(beta=3.0)
    protocol, depth = protocol_of(method, corpus), 8
    texts = list(corpus.captions["text"])
    score = lambda rows: score_pairs(method, corpus.paths(), texts, rows, device=CPU)  # noqa: E731
    count = len(protocol.gallery)
    before = rank(protocol, top=count).index
    found = evaluate_pairwise(protocol, Pairwise(depth), score, top=count).ranking
    after = found.index
    moved = 0
    for query in range(len(protocol.query)):
        assert set(after[query, :depth]) == set(before[query, :depth]) and len(set(after[query])) == count
        assert after[query, depth:].tolist() == before[query, depth:].tolist()
        moved += after[query, :depth].tolist() != before[query, :depth].tolist()
    assert moved > len(protocol.query) / 2
    # The order among the first is that of the scores of single pairs.
    pictures = pixels_of(method, corpus)
    with torch.no_grad():
        images = method.encode_pair_images(Batch(image=pictures[before[0, :depth].tolist()]))
        words = Batch(texts={"full": method.backbone.tokenize(texts[:1])}, phrases=method.phrases_of(texts[:1]))
        alone = method.pair_scores(images, method.encode_pair_texts(words)[torch.zeros(depth, dtype=torch.long)])
    by_hand = before[0, :depth][alone.argsort(descending=True).numpy()]
    assert after[0, :depth].tolist() == by_hand.tolist()
    # Without the share of the parts nothing moves.
    off = make(beta=0.0)
    same = evaluate_pairwise(
        protocol, Pairwise(depth), lambda rows: score_pairs(off, corpus.paths(), texts, rows, device=CPU), top=count
    ).ranking
    near = lambda a, b: abs(protocol.query.vectors[0] @ (protocol.gallery.vectors[a] - protocol.gallery.vectors[b]))  # noqa: E731
    assert all(a == b or near(a, b) < 1e-4 for a, b in zip(same.index[0], before[0], strict=True))


def pixels_of(method, corpus) -> Tensor:
    store = PixelStore(corpus.paths(), method.backbone.image_size, interpolation=method.backbone.interpolation)
    pixels = np.stack([store[row] for row in range(len(corpus.images))])
    return normalise(pixels, method.backbone.mean, method.backbone.std)


@pytest.mark.covers(142)
def test_the_gallery_is_bit_identical_whatever_queries_and_phrases_there_are(corpus, folder):
    method, other = make(), corpus_of(folder)
    before = embed_gallery(method, corpus, device=CPU)
    other.captions["text"] = ["a violet cape and a golden crown"] * len(other.captions)
    method.phrase_source = lambda texts: [[Phrase("golden crown", 0, 0, "head")] for _ in texts]
    embed_queries(method, list(other.captions["text"]), device=CPU)
    batch = batch_of(method, folder, range(4))
    assert np.array_equal(before, embed_gallery(method, other, device=CPU))
    with torch.no_grad():
        whole = method.encode_pair_images(batch)
        alone = method.encode_pair_images(Batch(image=batch.image))
    assert torch.equal(whole.pooled, alone.pooled) and torch.equal(whole.tokens, alone.tokens)
