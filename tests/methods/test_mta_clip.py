"""`mta-clip`: prompts, adapter and losses of several datasets, what each stage trains, and what it reduces to."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of
from methods.twodatasets import (
    LOCAL,
    READOUTS,
    ROSTER,
    SMALL,
    grads,
    make,
    of_domain,
    rows_of,
    same,
    samples_of,
    stirred,
    text_of,
    two_datasets,
    with_noise,
)
from torch.nn import functional

from reidctl.batch import Batch, Roster
from reidctl.data import roster_of
from reidctl.errors import UsageError
from reidctl.methods.mta_clip import MtaClipConfig
from reidctl.training.batches import epoch_batches
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_datasets(tmp_path_factory.mktemp("mta") / "both")


@pytest.fixture(scope="module")
def corpus(data):
    return corpus_of(data).of_split("train")


@pytest.fixture(scope="module")
def samples(corpus):
    return samples_of(corpus)


@pytest.fixture(scope="module")
def mixed(samples):
    """All 32 training images: 14 of a, 18 of b, in an order that mixes them."""
    order = np.random.default_rng(0).permutation(len(samples))
    return samples.collate([samples[(0, int(row), place)] for place, row in enumerate(order)])


def test_the_tests_datasets_are_what_they_say(samples, corpus, mixed):
    roster = roster_of(corpus.images)
    assert roster == ROSTER
    assert torch.bincount(mixed.domain).tolist() == [14, 18]
    assert {(int(p), int(d)) for p, d in zip(mixed.person, mixed.domain, strict=True)} == {
        (person, domain) for domain in (0, 1) for person in LOCAL[domain]
    }


# HCP


@pytest.mark.covers(201, 202, 203)
def test_the_text_of_a_person_is_the_sentence_of_shared_dataset_and_person_tokens(mixed):
    method = stirred(make())
    for domain in (0, 1):
        with torch.no_grad():
            found = method.prompt_features(torch.tensor(LOCAL[domain]), domain)
            for person, feature in zip(LOCAL[domain], found, strict=True):
                assert same(feature, text_of(method, person, domain))
    assert method.context.templates[0].length == 20 and method.id_tokens.shape == (8, 4, 32)
    assert MtaClipConfig().n_id_tokens == MtaClipConfig().hcp.n_shared == MtaClipConfig().hcp.n_domain == 4


@pytest.mark.covers(203)
@pytest.mark.parametrize("layout", ["concat", "add", "words"])
def test_two_people_of_one_dataset_have_different_texts_which_domain_prompts_alone_cannot_give(layout):
    method = stirred(make(hcp={"layout": layout}))
    with torch.no_grad():
        for domain in (0, 1):
            texts = functional.normalize(method.prompt_features(torch.tensor(LOCAL[domain]), domain), dim=1)
            assert torch.pdist(texts).min() > 1e-3
        alike = stirred(make(hcp={"layout": "domain"})).prompt_features(torch.arange(4), 0)
        assert same(alike, alike[:1].expand_as(alike))


@pytest.mark.covers(202, 204)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_exchanging_the_tokens_of_two_datasets_exchanges_their_texts(layout):
    method = stirred(make(hcp={"layout": layout}))
    person = torch.tensor([3])  # in both
    with torch.no_grad():
        before = [method.prompt_features(person, domain) for domain in (0, 1)]
        method.context.domain.copy_(method.context.domain.flip(0))
        after = [method.prompt_features(person, domain) for domain in (0, 1)]
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0])
    assert functional.cosine_similarity(before[0], before[1]).item() < 0.999


def con_gradients(method, batch):
    method.begin("prompt-stage")
    loss = method.losses(batch, "prompt-stage")["con"]
    found = torch.autograd.grad(loss, (method.context.shared, method.context.domain, method.id_tokens))
    return dict(zip(("shared", "domain", "person"), found, strict=True))


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_l_con_of_one_dataset_s_batch_reaches_shared_tokens_and_its_own_and_exactly_no_others(mixed, layout):
    for domain in (0, 1):
        found = con_gradients(stirred(make(hcp={"layout": layout})), of_domain(mixed, domain))
        assert found["shared"].abs().amax(dim=1).min() > 0
        assert found["domain"][domain].abs().amax(dim=1).min() > 0
        assert (found["domain"][1 - domain] == 0).all()
        members = torch.zeros(8, dtype=torch.bool)
        members[list(LOCAL[domain])] = True
        assert (found["person"][members].abs().amax(dim=(1, 2)) > 0).all()
        assert (found["person"][~members] == 0).all()


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_in_a_mixed_batch_too_a_dataset_s_tokens_learn_from_its_own_images_alone(mixed, layout):
    method = stirred(make(hcp={"layout": layout}))
    found = con_gradients(method, mixed)
    for domain in (0, 1):
        other = con_gradients(method, with_noise(mixed, mixed.domain != domain))
        assert torch.equal(other["domain"][domain], found["domain"][domain])
        assert not same(other["domain"][1 - domain], found["domain"][1 - domain])
        assert not same(other["shared"], found["shared"])
        assert same(con_gradients(method, of_domain(mixed, domain))["domain"][domain], found["domain"][domain])


@pytest.mark.covers(204)
def test_orth_is_off_unless_it_has_a_weight_and_then_it_counts_and_falls(mixed):
    assert "orth" not in make().losses(mixed, "prompt-stage")
    method = make(weights={"orth": 0.5})
    assert method.current_weights("prompt-stage") == {"con": 1.0, "orth": 0.5}
    assert "orth" not in method.current_weights("finetune")
    with torch.no_grad():
        method.context.domain += method.context.shared
    found = method.losses(mixed, "prompt-stage")
    cosine = functional.cosine_similarity(method.context.shared[None, :, None], method.context.domain[:, None], dim=-1)
    assert same(found["orth"], cosine.square().mean()) and found["orth"] > 0.1
    torch.testing.assert_close(method.objective(found), found["con"] + 0.5 * found["orth"])
    assert method.training_report()["hcp/cosine"] == pytest.approx(cosine.abs().mean().item(), abs=1e-6)
    left = {}
    for weight in (0.0, 20.0):
        trained = make(weights={"orth": weight})
        trained.load_state_dict(method.state_dict())
        optimizer = build_optimizer(trained, "prompt-stage", PromptConfig(lr_prompt=5e-3))
        trained.begin("prompt-stage")
        for _ in range(10):
            optimizer.zero_grad()
            trained.objective(trained.losses(mixed, "prompt-stage")).backward()
            optimizer.step()
        left[weight] = trained.context.orthogonality().item()
    assert left[20.0] < 0.5 * left[0.0] and left[20.0] < 0.4 * found["orth"].item()
    assert not make(weights={"orth": 0.5}, hcp={"layout": "words"}).active("orth")
    assert not make(weights={"orth": 0.5}, hcp={"enabled": False}).active("orth")


@pytest.mark.covers(202)
def test_the_layout_domain_tells_datasets_apart_and_classifies_among_them(mixed):
    """Every dataset's prompt is there once, also in a batch of one dataset, which still pushes the other's away."""
    method = stirred(make(hcp={"layout": "domain"}))
    method.begin("prompt-stage")
    seen = functional.normalize(method.frozen_features(mixed)["image"], dim=1)
    texts = functional.normalize(method.domain_features().detach(), dim=1)
    labels = mixed.domain.tolist()
    scores = seen @ texts.T / 0.07
    expected = functional.cross_entropy(scores, mixed.domain)
    for k in (0, 1):
        own = [row for row, label in enumerate(labels) if label == k]
        expected -= scores[:, k].log_softmax(dim=0)[own].mean() / 2
    found = method.losses(mixed, "prompt-stage")["con"]
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    assert min(grads(found, method.context.shared, method.context.domain)) > 0 and grads(found, method.id_tokens) == [0]
    alone = method.losses(of_domain(mixed, 0), "prompt-stage")["con"]
    assert torch.autograd.grad(alone, method.context.domain)[0][1].abs().sum() > 0
    names = [name for name, _ in method.parameters_by_role("prompt-stage")["prompt"]]
    assert names == ["context.shared", "context.domain"]
    assert [row[:2] for row in method.prompt_rows([f"p{n}" for n in range(8)])] == [
        ("shared", ""), ("domain", "a"), ("domain", "b")
    ]  # fmt: skip
    method.begin("finetune")
    assert torch.equal(method.group_texts(0), method.group_texts(1)) and len(method.group_texts(0)) == 2
    proj = functional.normalize(method.look(mixed.image).proj, dim=1)
    scores = proj @ texts.T / 0.07
    expected = sum(
        functional.cross_entropy(scores[mixed.domain == k], mixed.domain[mixed.domain == k], label_smoothing=0.1)
        for k in (0, 1)
    )
    assert same(method.losses(mixed, "finetune")["i2t"], expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hcp": {"template": "A photo of a {shared} {id} person."}}, r"hcp\.template has no slot \{domain\}"),
        ({"hcp": {"layout": "add", "n_domain": 3}}, "layout add puts 3 tokens of a dataset onto 4"),
        ({"hcp": {"n_shared": 30}}, "tokens"),
        ({"heads": "joint"}, r"method\.heads: joint.*method\.hcp\.enabled=false"),
        ({"i2i_feature": "bn"}, r"i2i_feature: bn.*method\.heads=joint"),
        ({"unfreeze_blocks": 3}, r"unfreeze_blocks` is 3; the image encoder has 2 blocks"),
        ({"unfreeze_blocks": -1}, r"unfreeze_blocks` is -1"),
        ({"unfreeze_blocks": "some"}, "unfreeze_blocks"),
        ({"sga": {"kind": "ssm"}}, "kind"),
        ({"sga": {"groups": 0}}, "groups"),
        ({"weights": {"i2tt": 1.0}}, "no loss `i2tt`"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, said):
    with pytest.raises(UsageError, match=said):
        make(**changes)


def test_prompts_of_datasets_alone_need_several_datasets_and_joint_heads_one_or_plain_prompts():
    with pytest.raises(UsageError, match=r"layout: domain.*one dataset.*data combine"):
        make(roster=Roster.single(8), hcp={"layout": "domain"})
    make(roster=Roster.single(8), heads="joint")
    make(heads="joint", hcp={"enabled": False})
    make(heads="joint", hcp={"enabled": False}, i2i_feature="bn")
    make(roster=Roster.single(8), i2i_feature="bn")


# SGA in the model


@pytest.mark.covers(212)
@pytest.mark.parametrize("kind", ["gate", "linear", "ema"])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_adapter_reaches_the_retrieved_vectors_for_every_readout(mixed, readout, kind):
    method = make(sga={**SMALL["sga"], "readout": readout, "kind": kind})
    made = method.embed_tasks(mixed)
    for task in ("i2i", "t2i"):
        value = (made[task] * made[task].detach().roll(1, 0)).sum()
        reached = dict(zip(dict(method.sga.named_parameters()), grads(value, *method.sga.parameters()), strict=True))
        assert min(reached.values()) > 0, (task, reached)
    with torch.no_grad():
        for name, parameter in method.sga.named_parameters():
            before = parameter.clone()
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            changed = method.embed_tasks(mixed)
            assert all((changed[task] - made[task]).abs().max() > 1e-6 for task in made), name
            parameter.copy_(before)
        again = method.embed_tasks(mixed)
    assert all(torch.equal(again[task], made[task]) for task in made)


@pytest.mark.covers(212)
@pytest.mark.parametrize("readout", READOUTS)
def test_every_image_loss_reaches_the_adapter(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout}, triplet={"margin": 100.0, "squared": False}).train()
    with torch.no_grad():
        for neck in method.necks:  # started near zero, they hardly pass anything
            for head in neck.values():
                head.classifier.weight.normal_()
    for name, value in method.losses(mixed, "finetune").items():
        assert min(grads(value, method.sga.gamma, method.sga.fusion, *method.sga.local.parameters())) > 0, name


@pytest.mark.covers(212)
def test_the_class_token_alone_would_not_see_the_adapter(mixed):
    """The trap: CLIP's own feature is the class token of the last layer, which is made before the adapter."""
    with torch.no_grad():
        plain, adapted = make(sga={"enabled": False}), make()
        cls = plain.look(mixed.image)
        hidden = adapted.backbone.encode_image(mixed.image).hidden_patches
        for readout in READOUTS[:3]:
            method = make(sga={**SMALL["sga"], "readout": readout})
            out = method.sga(hidden, method.backbone.grid).mean(dim=1)
            first = cls.hidden
            hiddens = {"cls_plus_gap": first + out, "gap": out, "concat": torch.cat([first, out], dim=1)}
            joint = out if readout == "gap" else first + out
            seen = method.look(mixed.image)
            assert same(seen.hidden, hiddens[readout]) and same(seen.previous, cls.previous)
            assert same(seen.proj, joint @ method.backbone.image.visual.proj)
            assert method.embed_tasks(mixed)["i2i"].shape[1] == (96 if readout == "concat" else 64)
        last = make(sga={**SMALL["sga"], "readout": "pre_last"}).look(mixed.image)
        assert same(last.previous, cls.previous) and not same(last.hidden, cls.hidden)


@pytest.mark.covers(205, 211, 212)
@pytest.mark.parametrize("readout", READOUTS)
def test_stage_one_sees_no_adapter_and_stage_two_begins_with_what_it_saw(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout, "gamma_init": 0.0})
    method.begin("prompt-stage")
    with torch.no_grad():
        first = method.look(mixed.image)
        kept = method.frozen_features(mixed)["image"]
    method.begin("finetune")
    with torch.no_grad():
        second = method.look(mixed.image)
        for name in ("previous", "hidden", "proj"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert torch.equal(kept, second.proj)
        method.sga.gamma.fill_(0.3)
        assert not same(method.look(mixed.image).proj, second.proj)
        method.begin("prompt-stage")
        assert torch.equal(method.frozen_features(mixed)["image"], kept), "stage 1: the adapter is off"


@pytest.mark.parametrize("readout", READOUTS)
def test_without_an_adapter_the_read_out_alone_is_what_gamma_zero_gives(mixed, readout):
    """`sga.kind: none`: the control that tells the adapter from the other feature."""
    none = make(sga={"kind": "none", "readout": readout})
    still = make(sga={**SMALL["sga"], "readout": readout, "gamma_init": 0.0})
    assert not hasattr(none, "sga") and none.gates(mixed) == none.extra_parts(mixed) == {}
    assert "sga/gamma" not in none.training_report()
    names = [name for name, _ in still.named_parameters() if not name.startswith("sga.")]
    assert [name for name, _ in none.named_parameters()] == names
    none.load_state_dict(still.state_dict(), strict=False)
    with torch.no_grad():
        one, two = none.embed_tasks(mixed), still.embed_tasks(mixed)
    assert all(torch.equal(one[task], two[task]) for task in ("t2i", "i2i"))


def test_a_batch_that_does_not_say_its_datasets_is_an_error(mixed):
    for stage in ("prompt-stage", "finetune"):
        with pytest.raises(ValueError, match="no `domain`"):
            make().losses(replace(mixed, domain=None), stage)
        make(hcp={"enabled": False}, heads="joint").losses(replace(mixed, domain=None), stage)


@pytest.mark.parametrize("kind", ["gate", "none"])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_activation_map_is_the_cosine_of_the_patches_that_are_read_with_the_image_s_feature(mixed, readout, kind):
    """With `pre_last` the adapter stands before the last block: the patches behind it have seen it."""
    method = make(sga={**SMALL["sga"], "readout": readout, "kind": kind})

    def adapt(patches):
        return method.sga(patches, method.backbone.grid) if kind == "gate" else patches

    with torch.no_grad():
        if kind == "gate":
            method.sga.gamma.fill_(2.0)
        early = readout == "pre_last"
        hidden = method.backbone.encode_image(mixed.image, adapt=adapt if early else None).hidden_patches
        patches = (hidden if early else adapt(hidden)) @ method.backbone.image.visual.proj
        feature = method.embed_images(mixed)[:, None]
        expected = functional.cosine_similarity(patches, feature, dim=2).clamp_min(0)
        found = method.activation(mixed)
    assert found.shape == (32, 4, 2) and expected.max() > 0.01
    assert same(found.flatten(1), expected)


@pytest.mark.covers(208, 209)
@pytest.mark.parametrize("readout", READOUTS)
def test_the_gates_of_both_streams_can_be_looked_at(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout})
    with torch.no_grad():
        found = method.gates(mixed)
    assert {name: value.shape for name, value in found.items()} == {"sga_local": (32, 32), "sga_global": (32, 32)}
    assert all(value.min() > 0 and value.max() < 1 for value in found.values())
    assert make(sga={"enabled": False}).gates(mixed) == {}


def test_the_cost_of_the_adapter_stands_beside_that_of_the_encoder_without_it(mixed):
    method = make()
    parts = method.extra_parts(Batch(image=mixed.image))
    assert set(parts) == {"sga", "image_without_sga"}
    with torch.no_grad():
        assert parts["sga"]().shape == (32, 8, 32)
        same_readout = make(sga={"kind": "none"})
        assert torch.equal(parts["image_without_sga"](), same_readout.look(mixed.image).proj)
        assert not torch.equal(parts["image_without_sga"](), method.look(mixed.image).proj)
        assert make(sga={"enabled": False}).extra_parts(mixed) == {}
    assert (
        sum(value.numel() for value in method.sga.parameters()) == 32 * 10 + 32 * 9 + (32 * 8 + 8) + (8 * 32 + 32) + 3
    )


# PTSO stage 1


def slow_contrast(images, texts, labels, temperature=0.07):
    """One text per image; every column of the label is a positive; image to text plus text to image."""
    both = 0.0
    for rows, columns in ((images, texts), (texts, images)):
        total = 0.0
        for i in range(len(labels)):
            scores = [float(rows[i] @ columns[j]) / temperature for j in range(len(labels))]
            whole = math.log(sum(math.exp(score) for score in scores))
            right = [scores[j] for j in range(len(labels)) if labels[j] == labels[i]]
            total += whole - sum(right) / len(right)
        both += total / len(labels)
    return both


@pytest.mark.covers(206)
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_l_stage1_is_the_sum_over_the_datasets_of_a_batch_of_both_directions_within_each(mixed, present):
    method = stirred(make())
    method.begin("prompt-stage")
    rows = [row for row, domain in enumerate(mixed.domain.tolist()) if domain in present]
    batch = rows_of(mixed, torch.tensor(rows))
    expected, halves = 0.0, []
    with torch.no_grad():
        seen = functional.normalize(method.look(batch.image).proj, dim=1)
        for domain in present:
            own = [row for row in range(len(rows)) if batch.domain[row] == domain]
            labels = [int(batch.person[row]) for row in own]
            texts = [functional.normalize(text_of(method, person, domain), dim=0) for person in labels]
            expected += slow_contrast(seen[own], texts, labels)
            halves.append(slow_contrast(seen[own], texts, labels) / len(present))
        found = method.losses(batch, "prompt-stage")
        frozen = replace(batch, image=None, frozen=method.frozen_features(batch))
        assert torch.equal(method.losses(frozen, "prompt-stage")["con"], found["con"])
    assert set(found) == {"con"} and found["con"].item() == pytest.approx(expected, rel=1e-5)
    if len(present) == 2:
        assert abs(found["con"].item() - sum(halves)) > 0.1, "a sum, not a mean"


@pytest.mark.covers(206)
def test_contrast_over_all_people_together_would_be_another_loss(mixed):
    """With plain prompts and joint heads the people of both datasets are contrasted with each other."""
    values = {}
    for heads in ("per_domain", "joint"):
        method = make(hcp={"enabled": False}, heads=heads)
        method.begin("prompt-stage")
        values[heads] = method.losses(mixed, "prompt-stage")["con"].item()
    assert abs(values["joint"] - values["per_domain"]) > 0.1


def encoders(method):
    return {name: value.clone() for name, value in method.state_dict().items() if name.startswith("backbone.")}


@pytest.mark.covers(201, 202, 205)
def test_the_optimiser_of_stage_one_holds_the_prompts_and_nothing_of_encoders_heads_or_adapter():
    method = make()
    optimizer = build_optimizer(method, "prompt-stage", PromptConfig())
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    names = {name for name, value in method.named_parameters() if id(value) in held}
    assert names == {"id_tokens", "context.shared", "context.domain"}
    assert {name for name, value in method.named_parameters() if value.requires_grad} == names
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    words = make(hcp={"layout": "words"}).parameters_by_role("prompt-stage")
    assert [name for members in words.values() for name, _ in members] == ["id_tokens"]


# PTSO stage 2


@pytest.mark.covers(213)
@pytest.mark.parametrize("count", [0, 1, 2, "all"])
def test_stage_two_trains_the_last_blocks_norm_and_projection_adapter_and_heads_and_no_text(mixed, count):
    method = make(unfreeze_blocks=count)
    build_optimizer(method, "finetune", TrainConfig())
    visual = "backbone.image.visual."
    names = {name for name, _ in method.named_parameters()}
    image = {name for name in names if name.startswith("backbone.image.")}
    tail = {f"{visual}ln_post.weight", f"{visual}ln_post.bias", f"{visual}proj"}
    first = 2 - count if count != "all" else 0
    blocks = {name for name in image for n in range(first, 2) if name.startswith(f"{visual}transformer.resblocks.{n}.")}
    assert tail <= image and len(blocks) == 12 * (2 - first)
    expected = {name for name in names if name.startswith("sga.")}
    expected |= {name for name in names if name.startswith("necks.") and not name.endswith("norm.bias")}
    expected |= image if count == "all" else blocks | tail
    assert {name for name, value in method.named_parameters() if value.requires_grad} == expected
    facts = method.training_facts()
    assert facts == {"domains": {"a": 4, "b": 5}, "trained_blocks": list(range(first + 1, 3))}
    assert MtaClipConfig().unfreeze_blocks == 4
    # A step moves exactly these.
    before = {name: value.clone() for name, value in method.named_parameters()}
    optimizer = build_optimizer(method.train(), "finetune", TrainConfig(lr=1e-2))
    method.begin("finetune")
    for _ in range(2):
        optimizer.zero_grad()
        method.objective(method.losses(mixed, "finetune")).backward()
        optimizer.step()
    moved = {name for name, value in method.named_parameters() if not torch.equal(value, before[name])}
    assert moved == expected


def slow_losses(method, batch, present):
    """L_id, L_tri and L_i2t of every dataset by loops over images and classes, summed over datasets."""
    seen = method.look(batch.image)
    found = {"id": 0.0, "triplet": 0.0, "i2t": 0.0}
    for domain in present:
        rows = [row for row in range(len(batch)) if batch.domain[row] == domain]
        people = [int(batch.person[row]) for row in rows]
        target = [LOCAL[domain].index(person) for person in people]
        heads = method.necks[domain]
        for name in ("hidden", "proj"):
            feature = getattr(seen, name)[rows]
            normed = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt()
            found["id"] += smoothed(normed * heads[name].norm.weight @ heads[name].classifier.weight.T, target)
        for name in ("previous", "hidden", "proj"):
            feature = getattr(seen, name)[rows]
            for i in range(len(rows)):
                gap = {True: [], False: []}
                for j in range(len(rows)):
                    if i != j:
                        distance = (feature[i] - feature[j]).square().sum().sqrt()
                        gap[people[i] == people[j]].append(distance)
                margin = method.config.triplet.margin
                found["triplet"] += (max(gap[True]) - min(gap[False]) + margin).clamp_min(0) / len(rows)
        texts = torch.stack([text_of(method, person, domain) for person in LOCAL[domain]])
        scores = functional.normalize(seen.proj[rows], dim=1) @ functional.normalize(texts, dim=1).T / 0.07
        found["i2t"] += smoothed(scores, target)
    return found


def smoothed(scores, target, epsilon=0.1):
    """Cross-entropy with label smoothing, image by image and class by class."""
    total = 0.0
    for i in range(len(target)):
        whole = scores[i].logsumexp(0)
        for k in range(scores.shape[1]):
            share = epsilon / scores.shape[1] + (1 - epsilon) * (k == target[i])
            total = total + share * (whole - scores[i, k]) / len(target)
    return total


@pytest.mark.covers(214)
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_l_total_is_the_sum_over_datasets_of_id_triplet_and_image_to_text_each_with_its_own_heads(mixed, present):
    # A margin near the distances, and pictures of noise: some triplets count and others do not.
    method = stirred(make(triplet={"squared": False, "normalize": False, "margin": 0.5})).train()
    method.begin("finetune")
    with torch.no_grad():
        for neck in method.necks:
            for head in neck.values():
                head.classifier.weight.normal_(std=0.2)
        noisy = with_noise(mixed, torch.arange(len(mixed)) % 3 > 0)
        batch = rows_of(noisy, torch.tensor([r for r, d in enumerate(mixed.domain.tolist()) if d in present]))
        expected = slow_losses(method, batch, present)
        found = method.losses(batch, "finetune")
    assert set(found) == set(expected) == {"id", "triplet", "i2t"} and min(found.values()) > 0.1
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-4), name
    total = 0.25 * expected["id"] + 1.0 * expected["triplet"] + 1.0 * expected["i2t"]
    assert method.objective(found).item() == pytest.approx(float(total), rel=1e-4)


@pytest.mark.covers(214)
def test_every_dataset_has_classifiers_of_its_own_size_and_a_person_of_both_is_in_both(mixed):
    method = stirred(make())
    for domain, members in enumerate(LOCAL):
        heads = method.necks[domain]
        assert heads["hidden"].classifier.weight.shape == heads["proj"].classifier.weight.shape == (len(members), 32)
        texts = method.group_texts(domain)
        assert same(texts, torch.stack([text_of(method, person, domain) for person in members]))
    assert method.local.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3, 4]]
    joint = make(hcp={"enabled": False}, heads="joint")
    assert [len(head["proj"].classifier.weight) for head in joint.necks] == [8]
    # The images of person 3 in a are told from a's people, those in b from b's.
    method.train().begin("finetune")
    for domain in (0, 1):
        own = of_domain(mixed, domain)
        found = method.losses(own, "finetune")
        weights = [method.necks[k]["proj"].classifier.weight for k in (0, 1)]
        reached = grads(found["id"], *weights)
        assert reached[domain] > 0 and reached[1 - domain] == 0
        rows = torch.autograd.grad(found["id"], weights[domain], retain_graph=True)[0].abs().amax(dim=1)
        assert (rows > 0).all()
    alone = rows_of(mixed, (mixed.person == 3).nonzero().flatten())
    assert all(torch.isfinite(value) for value in method.losses(alone, "finetune").values())


@pytest.mark.covers(214)
def test_only_the_direction_from_image_to_text_counts_in_stage_two(mixed):
    """The mean of what every image gives alone: a softmax over images would couple them."""
    method = stirred(make())
    method.begin("finetune")
    batch = of_domain(mixed, 1)
    with torch.no_grad():
        whole = method.losses(batch, "finetune")["i2t"]
        each = [method.losses(rows_of(batch, torch.tensor([row])), "finetune")["i2t"] for row in range(len(batch))]
    assert same(whole, torch.stack(each).mean())


@pytest.mark.covers(213)
def test_texts_are_fixed_in_stage_two_and_get_no_gradient(mixed):
    method = stirred(make()).train()
    optimizer = build_optimizer(method, "finetune", TrainConfig(lr=1e-2))
    method.begin("finetune")
    texts = [method.group_texts(domain).clone() for domain in (0, 1)]
    assert not any(text.requires_grad for text in texts)
    method.objective(method.losses(mixed, "finetune")).backward()
    optimizer.step()
    for name, value in method.named_parameters():
        if name.startswith(("context.", "id_tokens", "backbone.text.")):
            assert value.grad is None and not value.requires_grad, name
    method._texts = []
    assert all(same(method.group_texts(domain), texts[domain]) for domain in (0, 1))


def test_a_training_step_in_half_precision_is_near_that_in_full(mixed):
    for readout in READOUTS:
        method = make(sga={**SMALL["sga"], "readout": readout}).train()
        for stage in ("prompt-stage", "finetune"):
            method.begin(stage)
            wide = method.losses(mixed, stage)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                narrow = method.losses(mixed, stage)
            for name, value in wide.items():
                assert narrow[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.05), (readout, name)


# Batches of one dataset


def epoch_of(samples, epoch=0, **settings):
    """The batches of an epoch, loaded."""
    dealt = epoch_batches(samples, TrainConfig(instances=2, **settings), 0, epoch)
    return [samples.collate([samples[(epoch, int(row), 0)] for row in rows]) for rows in dealt]


@pytest.mark.parametrize("sampler", ["alternating", "alternating-random"])
def test_every_batch_of_the_training_set_is_of_one_dataset_and_both_have_turns(samples, sampler):
    for epoch in range(3):
        counts = [0, 0]
        for batch in epoch_of(samples, epoch, sampler=sampler, batch=6):
            (domain,) = set(batch.domain.tolist())
            counts[domain] += 1
            assert set(batch.person.tolist()) <= set(LOCAL[domain])
            if sampler == "alternating":
                assert torch.bincount(batch.person).unique().tolist() in ([0, 2], [2])
        # Shares of 14 ** 0.5 to 18 ** 0.5.
        assert min(counts) >= 2 and abs(counts[0] / sum(counts) - 0.469) < 0.5 / sum(counts) + 1e-6


def test_identity_batches_of_two_datasets_are_mixed(samples):
    assert any(len(set(batch.domain.tolist())) == 2 for batch in epoch_of(samples, sampler="identity", batch=8))


@pytest.mark.covers(218)
@pytest.mark.parametrize("readout", ["gap", "cls_plus_gap"])
def test_grad_cam_sees_the_patches_that_the_feature_averages(mixed, readout):
    """Through the class token alone (as for `clip-reid`) Grad-CAM would miss what the mean of the patches carries."""
    method = make(sga={**SMALL["sga"], "readout": readout})
    batch, partner = Batch(image=mixed.image[:4]), mixed.image[4:8]
    found = method.token_maps(batch, partner)["i2i"].flatten(1)
    with torch.no_grad():
        other = method.embed_tasks(Batch(image=partner))["i2i"]
    seen = method.backbone.encode_image(batch.image)
    patches = seen.hidden_patches.detach().requires_grad_()
    pooled = method.sga(patches, method.backbone.grid).mean(dim=1)
    joint = pooled if readout == "gap" else pooled + seen.hidden_cls[:, 0].detach()
    vector = functional.normalize(torch.cat([joint, method.backbone.image.project(joint)], dim=-1), dim=-1)
    grad = torch.autograd.grad((vector * other).sum(), patches)[0]
    pooled_part = (grad * patches).sum(dim=-1)
    if readout == "gap":
        expected = pooled_part.relu()
        expected = expected / expected.amax(dim=1, keepdim=True).clamp_min(1e-12)
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    else:
        assert pooled_part.abs().max() > 0
        plain = make(sga={"enabled": False})
        plain.load_state_dict(method.state_dict(), strict=False)
        assert not torch.allclose(found, plain.token_maps(batch, partner)["i2i"].flatten(1), atol=1e-3)
    assert method._cut is None


def test_frozen_blocks_are_in_evaluation_mode_and_trained_ones_are_not():
    method = make(unfreeze_blocks=1).train()
    assert [block.training for block in method.backbone.image.blocks] == [False, True]
    assert not method.backbone.text.training
