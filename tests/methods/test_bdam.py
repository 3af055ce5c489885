import dataclasses

import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import CPU, model, training_batch

from reidctl import losses
from reidctl.batch import Batch
from reidctl.embedding import embed_gallery
from reidctl.errors import DataError, UsageError
from reidctl.layers.decoupling import Decoupling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bdam") / "blocks", people=6)


def bdam(**changes):
    fusion = {"width": 16, "out_dim": 16, **changes.pop("fusion", {})}
    return model("bdam", fusion=fusion, **changes)


@pytest.fixture(scope="module")
def batch(folder):
    return training_batch(bdam(), folder)


def patches(count=3, tokens=5, width=8, seed=0):
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed))


def decoupling(**changes):
    torch.manual_seed(0)
    return Decoupling(8, depth=changes.pop("depth", 1), heads=2, dropout=0.0, **changes).eval()


@pytest.mark.covers(118)
def test_the_gate_lies_in_0_1_depends_on_the_input_and_its_halves_sum_to_one():
    streams = decoupling()(patches())
    assert (streams.gate > 0).all() and (streams.gate < 1).all()
    assert torch.allclose(streams.identity, streams.gate * streams.pooled_identity)
    assert torch.allclose(streams.clothing, (1 - streams.gate) * streams.pooled_clothing)
    assert not torch.allclose(streams.gate[0], streams.gate[1])
    without = decoupling(gated=False)(patches())
    assert without.gate is None and torch.equal(without.identity, without.pooled_identity)


@pytest.mark.covers(116)
@pytest.mark.parametrize("place", ["after", "interleaved", "none"])
def test_the_streams_see_each_other_exactly_when_cross_attention_is_on(place):
    module = decoupling(cross_attention=place)
    before = module(patches())
    for mine, other in (("project_clothing", "pooled_identity"), ("project_identity", "pooled_clothing")):
        changed = decoupling(cross_attention=place)
        with torch.no_grad():
            getattr(changed, mine).weight.add_(0.5)
        same = torch.equal(getattr(changed(patches()), other), getattr(before, other))
        assert same == (place == "none")


@pytest.mark.covers(114)
def test_the_branches_have_weights_of_their_own():
    module = decoupling()
    assert module.project_identity.weight.data_ptr() != module.project_clothing.weight.data_ptr()
    streams = module(patches())
    assert not torch.allclose(streams.pooled_identity, streams.pooled_clothing)


@pytest.mark.covers(115)
def test_depth_counts_self_attention_blocks_per_stream():
    count = [
        sum(p.numel() for p in decoupling(depth=depth, cross_attention="none").parameters()) for depth in (0, 3, 6)
    ]
    assert count[2] - count[1] == count[1] - count[0] > 0
    assert len(decoupling(depth=6).identity_blocks) == len(decoupling(depth=6).clothing_blocks) == 6


@pytest.mark.covers(117)
def test_the_pooled_features_do_not_depend_on_the_order_of_the_tokens():
    module = decoupling()
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.allclose(module(patches()).identity, module(patches()[:, order]).identity, atol=1e-6)


def test_the_mean_of_the_gated_tokens_is_the_gated_mean():
    streams = decoupling()(patches())
    assert torch.allclose(streams.identity_tokens.mean(dim=1), streams.identity, atol=1e-6)


@pytest.mark.covers(113)
def test_the_class_token_is_dropped(batch):
    method = bdam(decouple=False)
    features = method.backbone.encode_image(batch.image)
    assert method.streams(batch.image).identity_tokens.shape[1] == features.patches.shape[1]
    assert torch.equal(method.streams(batch.image).identity, features.hidden_patches.mean(dim=1))


@pytest.mark.covers(119, 144)
def test_overwriting_the_clothing_feature_changes_no_embedding_but_the_gate_lets_it_in(batch, monkeypatch):
    method = bdam()
    streams = method.streams(batch.image)
    wrong = dataclasses.replace(streams, clothing=torch.zeros_like(streams.clothing))
    assert torch.equal(method._image_feature(streams, batch), method._image_feature(wrong, batch))
    # What discarding does not stop: the pooled clothing stream moves the gate and with it the identity feature.
    tokens = patches(2, 4, 32).requires_grad_()
    module = method.decoupling
    moved = module._gate(tokens, torch.ones(2, 32, requires_grad=True) * tokens.mean())
    clothing = torch.ones(2, 32, requires_grad=True)
    gated = module._gate(tokens.detach(), clothing)
    assert torch.autograd.grad(gated.identity.sum(), clothing)[0].abs().sum() > 0
    assert moved.identity.shape == (2, 32)


@pytest.mark.covers(167)
def test_matching_and_identity_losses_do_not_read_the_clothing_output(batch):
    method = bdam(triplet={"margin": 2.0}).train()
    parts = method.encode(batch, "finetune")
    clothing = parts["clothing"].detach().requires_grad_()
    found = method.losses_of(parts.with_rows({**parts.rows, "clothing": clothing}), "finetune")
    grads = {
        name: torch.autograd.grad(value, clothing, retain_graph=True, allow_unused=True)[0]
        for name, value in found.items()
    }
    assert grads["decouple"].abs().sum() > 0 and grads["info"] is grads["triplet"] is None


@pytest.mark.covers(120)
def test_the_alignment_loss_is_the_printed_formula_with_the_texts(batch):
    method = bdam(clothing_loss=("aln",), mask_duplicates=False)
    streams = method.streams(batch.image)
    text = method.text_features(batch.texts["clothing"])[0]
    cosine = torch.cosine_similarity(method.clothing_head(streams.pooled_clothing)[:, None], text[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(cosine / 0.05, torch.arange(len(batch)))
    assert torch.allclose(method.losses(batch, "finetune")["aln"], expected, rtol=1e-4)


@pytest.mark.covers(122)
def test_the_critic_learns_while_the_identity_stream_is_pushed_the_other_way(batch):
    method = bdam(clothing_loss=("grl",), grl_strength=1.0)
    parts = method.encode(batch, "finetune")
    identity = parts["identity"].detach().requires_grad_()
    loss = method.losses_of(parts.with_rows({**parts.rows, "identity": identity}), "finetune")["grl"]
    through, own = torch.autograd.grad(loss, [identity, method.critic[0].weight])
    plain = losses.clothing_alignment(
        method.critic(identity),
        method.text_features(batch.texts["clothing"])[0].detach(),
        temperature=0.05,
        group=batch.clothing_group,
    )
    straight, same = torch.autograd.grad(plain, [identity, method.critic[0].weight])
    assert torch.allclose(through, -straight, atol=1e-6) and torch.allclose(own, same, atol=1e-6)


@pytest.mark.covers(151)
@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"weights": {"info": 0.0}}, "info"),
        ({"weights": {"triplet": 0.0}}, "triplet"),
        ({"clothing_loss": ()}, "aln"),
        ({"weights": {"decouple": 0.0}}, "decouple"),
    ],
)
def test_an_ablated_loss_is_absent_and_the_others_stay(batch, change, gone):
    full = set(bdam(clothing_loss=("aln",)).losses(batch, "finetune"))
    left = set(bdam(**{"clothing_loss": ("aln",), **change}).losses(batch, "finetune"))
    assert full - left == {gone} and left < full


@pytest.mark.covers(147)
def test_gate_regularisers_add_their_term_only(batch):
    plain = bdam(gradnorm=None).losses(batch, "finetune")
    for kind in ("balance", "entropy"):
        found = bdam(gradnorm=None, gate_regulariser=kind).losses(batch, "finetune")
        assert set(found) - set(plain) == {"gate"}
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.covers(143)
@pytest.mark.parametrize("protocol", ["image_only", "own_text", "visual", "pairwise"])
def test_every_protocol_trains_and_embeds_into_one_space(batch, protocol, folder):
    method = bdam(protocol=protocol)
    found = method.losses(training_batch(method, folder), "finetune")
    assert all(torch.isfinite(value) for value in found.values())
    image, text = method.embed_images(batch), method.embed_texts(batch)
    assert image.shape == text.shape


@pytest.mark.covers(142, 143)
def test_own_text_reads_the_described_text_of_the_gallery_image_and_refuses_to_go_without(folder):
    method, corpus = bdam(protocol="own_text"), corpus_of(folder)
    assert method.target_text == "caption", "the query must not be the text that sits in the gallery"
    before = embed_gallery(method, corpus, device=CPU)
    corpus.identity[0] = "Somebody else altogether."
    after = embed_gallery(method, corpus, device=CPU)
    moved = abs(before - after).max(axis=1)  # another text length pads the batch otherwise: last bits may differ
    assert moved[0] > 1e-3 and moved[1:].max() < 1e-6
    corpus.identity[0] = None
    with pytest.raises(DataError, match="reidctl caption"):
        embed_gallery(method, corpus, device=CPU)


@pytest.mark.covers(165)
@pytest.mark.parametrize("target", ["caption", "identity", "identity+clothing", "clothing", "mix"])
def test_every_text_source_trains_and_only_captions_meet_a_fused_feature(folder, target):
    method = bdam(target=target).train()
    batch = training_batch(method, folder)
    found = method.losses(batch, "finetune")
    assert all(torch.isfinite(value) for value in found.values()) and found["info"] > 0
    assert bool(batch.has_fusion.any()) == (target in ("caption", "mix"))
    if target not in ("caption", "mix"):
        with pytest.raises(UsageError, match="those very texts"):
            bdam(target=target, protocol="own_text")


@pytest.mark.covers(142)
def test_the_gallery_side_of_the_leak_free_protocols_reads_no_text(batch):
    for protocol in ("image_only", "visual", "pairwise"):
        method = bdam(protocol=protocol)
        assert method.gallery_texts == ()
        assert torch.equal(method.embed_images(batch), method.embed_images(Batch(image=batch.image)))


@pytest.mark.covers(139, 141)
@pytest.mark.parametrize("sequence", ["vector", "pair", "chunks", "tokens"])
def test_every_sequence_reading_runs_and_normalises_its_output(batch, sequence):
    method = bdam(fusion={"sequence": sequence})
    assert torch.isfinite(method.losses(batch, "finetune")["info"])
    assert torch.allclose(method.embed_images(batch).norm(dim=1), torch.ones(len(batch)), atol=1e-5)


@pytest.mark.covers(156)
def test_the_baseline_without_bdam_and_fusion_has_neither_streams_nor_clothing_losses(batch):
    method = bdam(decouple=False, fusion={"kind": "none", "sequence": "vector"})
    assert set(method.losses(batch, "finetune")) == {"info", "triplet"}
    assert not hasattr(method, "decoupling")


@pytest.mark.covers(145, 146)
def test_gradnorm_balances_while_training_and_its_state_survives(batch):
    method = bdam(gradnorm={"warm_steps": 1}).train()
    for _ in range(4):
        found = method.losses(batch, "finetune")
        method.objective(found).backward()
    weights = method.current_weights()
    assert sum(weights.values()) == pytest.approx(len(weights), rel=1e-6)
    assert any(abs(value - 1) > 1e-3 for value in weights.values())
    other = bdam(gradnorm={"warm_steps": 1})
    other.load_training_state(method.training_state())
    assert other.current_weights() == weights


@pytest.mark.covers(158)
def test_gates_are_shares_per_sample(batch):
    found = bdam().gates(batch)
    assert torch.allclose(found["image"] + found["text"], torch.ones(len(batch)))
    assert ((found["identity"] > 0) & (found["identity"] < 1)).all()


@pytest.mark.covers(118)
def test_features_are_those_of_the_streams_and_the_baseline_has_no_clothing(batch):
    method = bdam()
    found, streams = method.features(batch), method.streams(batch.image)
    assert list(found) == ["embedding", "identity", "clothing", "pooled_identity", "pooled_clothing"]
    for name in list(found)[1:]:
        assert torch.equal(found[name], getattr(streams, name))
    assert torch.allclose(found["identity"], streams.gate * found["pooled_identity"])
    baseline = bdam(decouple=False)
    assert list(baseline.features(batch)) == ["embedding", "identity"]


@pytest.mark.covers(143, 145)
def test_the_match_loss_exists_under_pairwise_alone_and_is_balanced_like_the_others(batch):
    assert "match" not in bdam().losses(batch, "finetune") and not hasattr(bdam(), "match_head")
    method = bdam(protocol="pairwise")
    assert set(method.losses(batch, "finetune")) == {*bdam().losses(batch, "finetune"), "match"}
    assert "match" in method.balancer.tasks and method.scores_pairs
    without = bdam(protocol="pairwise", weights={"match": 0.0})
    assert not without.scores_pairs and "match" not in without.losses(batch, "finetune")


@pytest.mark.covers(143)
def test_pairwise_changes_nothing_about_the_other_losses(batch):
    plain, method = bdam(), bdam(protocol="pairwise")
    method.load_state_dict(plain.state_dict(), strict=False)
    before, after = plain.losses(batch, "finetune"), method.losses(batch, "finetune")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.covers(143)
def test_other_peoples_identical_texts_are_no_wrong_pairs(batch, monkeypatch):
    seen = []
    monkeypatch.setattr("reidctl.methods.bdam.matching_pairs", lambda s, wrong, t: seen.append(wrong) or PAIRS)
    texts = {**batch.texts, "full": batch.texts["full"][torch.zeros(len(batch), dtype=torch.long)]}
    same_words = dataclasses.replace(batch, texts=texts)
    bdam(protocol="pairwise").losses(batch, "finetune")
    bdam(protocol="pairwise").losses(same_words, "finetune")
    bdam(protocol="pairwise", mask_duplicates=False).losses(same_words, "finetune")
    other = batch.person[:, None] != batch.person
    assert seen[0].any() and not (seen[0] & ~other).any()
    assert not seen[1].any() and torch.equal(seen[2], other)


PAIRS = (torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.ones(1))
